"""Scene classification on a frozen encoder, in the thesis' protocol and in transfer.

Thesis protocol: the head is trained on masked images. Transfer: the head was trained once, on complete images with
the pre-trained encoder, and is in service when bands break; only what stands before it may change.
Source: thesis §3.2.2, §4.2.1.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor

from bandmask.batches import Batches
from bandmask.heads import SceneHeads
from bandmask.packs import Pack
from bandmask.provenance import checksum_of_code
from bandmask.training import Compute, checkpoint_of, fill_checksum, fit, weights_checksum
from bandmask.views import View, embed_batches


def train_heads(
    view: View,
    pack: Pack,
    *,
    seeds: Sequence[int] = (0, 1, 2),
    epochs: int = 20,
    lr: float = 0.01,
    head_batch_size: int = 64,
    passes: int = 0,
    seed: int = 0,
    compute: Compute | None = None,
    checkpoint: Path | None = None,
    restart: bool = False,
    settings: dict[str, Any] | None = None,
    label: str = "training heads",
    progress: bool = True,
) -> tuple[SceneHeads, pd.DataFrame]:
    """Train the heads of all seeds side by side, on one pass of the frozen encoder an epoch.

    Each head has its own initial weights and its own order of the images; flips, blur and hidden pixels of an epoch
    are shared, because they belong to the pass.

    Args:
        view: encoder and mask.
        pack: `train` is trained on, `val` watched.
        seeds: one head each.
        epochs: over the training split.
        lr: of Adam.
        head_batch_size: of the heads' steps.
        passes: number of different encoder passes; epoch e uses pass e mod `passes`. 0 makes a new one every
            epoch, as the thesis does; fewer are cheaper and show the heads fewer draws.
        seed: of augmentation and order of the passes.
        compute: device and precision.
        checkpoint: file to resume from; a mark of all that decides the result is added to its name.
        restart: begin anew.
        settings: what tells checkpoints apart.
        label: for the progress line.
        progress: show it.

    Returns:
        The heads in eval mode, and the history, a row an epoch and head: `epoch`, `head_seed`, `val_accuracy`,
        `train_loss` (mean over heads).
    """
    compute = compute or Compute.of()
    passes = min(passes, epochs) or epochs
    options: dict[str, Any] = {
        "batch_size": view.batch_size,
        "image_size": view.image_size,
        "device": compute.device,
        "seed": seed,
    }
    train = Batches(pack, "train", augment=True, **options)
    watched = embed_batches(view, Batches(pack, "val", **options), compute)
    heads = SceneHeads(watched[0].shape[1], len(pack.classes), seeds).to(compute.device)
    cache: dict[int, tuple[Tensor, Tensor]] = {}

    def batches(epoch: int) -> Iterator[Tensor]:
        turn = epoch % passes
        if turn not in cache:
            if passes == epochs:
                cache.clear()  # each pass is used once: don't keep them
            cache[turn] = embed_batches(view, train, compute, epoch=turn, mask_epoch=turn, epochs=passes)
        count = len(cache[turn][0])
        orders = [torch.randperm(count, generator=torch.Generator().manual_seed(s * 100_003 + epoch)) for s in seeds]
        yield from torch.stack(orders, dim=1).to(compute.device).split(head_batch_size)  # (B, K) rows of the pass

    def loss(rows: Tensor, epoch: int) -> Tensor:
        embeddings, labels = cache[epoch % passes]
        logits = heads(embeddings[rows.T])  # (K, B, C)
        # mean over the batch, sum over heads: each head gets the gradient it would get alone
        return F.cross_entropy(logits.flatten(0, 1), labels[rows.T].flatten()) * rows.shape[1]

    @torch.no_grad()
    def after_epoch(_: int) -> dict[str, float]:
        right = (heads(watched[0]).argmax(-1) == watched[1]).float().mean(1)
        return {f"val_accuracy_{head_seed}": float(value) for head_seed, value in zip(seeds, right, strict=True)}

    decisive = {
        "mask": asdict(view.spec),
        "fill": fill_checksum(view.fill),
        "seeds": list(seeds),
        "lr": lr,
        "batch_size": head_batch_size,
        "passes": passes,
        "seed": seed,
        "image_size": view.image_size,
        "data": pack.fingerprint,
        "code": checksum_of_code(__name__),
        "weights_checksum": weights_checksum(view.encoder),
        **(settings or {}),
    }
    wide = fit(
        heads,
        torch.optim.Adam(heads.parameters(), lr=lr),
        batches,
        loss,
        epochs=epochs,
        after_epoch=after_epoch,
        settings=decisive,
        checkpoint=checkpoint_of(checkpoint, decisive, epochs),
        restart=restart,
        compute=compute,
        label=label,
        progress=progress,
    )
    accuracies = [f"val_accuracy_{head_seed}" for head_seed in seeds]
    tidy = wide.melt(["epoch", "train_loss"], accuracies, "head_seed", "val_accuracy")
    tidy["head_seed"] = tidy["head_seed"].str.removeprefix("val_accuracy_").astype(int)
    tidy["train_loss"] /= len(seeds)
    return heads, tidy


@torch.no_grad()
def predict(
    view: View,
    heads: SceneHeads,
    pack: Pack,
    split: str = "test",
    *,
    compute: Compute | None = None,
) -> pd.DataFrame:
    """Predicted class of every image by every head: `head_seed`, `sample` (row in the pack), `label`, `predicted`."""
    compute = compute or Compute.of()
    batches = Batches(pack, split, batch_size=view.batch_size, image_size=view.image_size, device=compute.device)
    embeddings, labels = embed_batches(view, batches, compute)
    predicted = heads.to(compute.device)(embeddings).argmax(-1).cpu()  # (K, N)
    frames = [
        pd.DataFrame({"head_seed": seed, "sample": batches.rows, "label": labels.cpu(), "predicted": row})
        for seed, row in zip(heads.seeds, predicted, strict=True)
    ]
    return pd.concat(frames, ignore_index=True)
