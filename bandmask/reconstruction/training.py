"""Training the heads of `reconstruction`: on hidden pixels alone, resumable, the encoder frozen."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, is_dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bandmask.batches import Batch, Batches, flip
from bandmask.fills import all_bands
from bandmask.masking import VALIDATION_EPOCH, Mask, hidden_pixels
from bandmask.moments import Moments
from bandmask.packs import Pack
from bandmask.provenance import checksum_of_code
from bandmask.reconstruction.heads import Reconstruction
from bandmask.training import Compute, adamw, checkpoint_of, fit, weights_checksum
from bandmask.views import TAPS


def train_reconstruction(
    encoder: nn.Module | None,
    pack: Pack,
    mask: Mask,
    moments: Moments,
    *,
    seeds: Sequence[int] = (0, 1, 2),
    epochs: int = 12,
    lr: float = 3e-3,
    weight_decay: float = 1e-4,
    width: int = 32,
    batch_size: int = 32,
    image_size: int | None = None,
    taps: Sequence[str] = TAPS,
    seed: int = 0,
    compute: Compute | None = None,
    checkpoint: Path | None = None,
    restart: bool = False,
    settings: dict[str, Any] | None = None,
    label: str = "training reconstruction",
    progress: bool = True,
) -> tuple[Reconstruction, pd.DataFrame]:
    """Train heads of all seeds side by side on hidden pixels, each as if it were alone; the encoder stays as it is.

    The error is in SDs of each band, so that cirrus, with a mean near 11 DN, counts as near infrared does. It is
    quadratic up to one SD and linear beyond (Huber), so that a few roofs and clouds don't decide. Images are flipped,
    not blurred: a blurred image is easier to restore than those that come.

    Args:
        encoder: frozen; sees the ridge-filled image. None for heads without one.
        pack: `train` is trained on, `val` watched.
        mask: what is hidden in training; `draws.AnyMask` gives one head for every loss, a `MaskSpec` a head for one.
        moments: of training spectra in reflectance, for ridge imputation and SDs.
        seeds: a head each; they share order, flips and masks.
        epochs: over the training split.
        lr: where AdamW begins; falls to 0 along a cosine, an epoch a step.
        weight_decay: of AdamW.
        width: channels inside a head.
        batch_size: images a step.
        image_size: side in pixels; None keeps the pack's. Enlarged images leak: a visible pixel carries a trace of
            its hidden neighbours.
        taps: where the encoder is tapped, shallow to deep.
        seed: of order, flips and `torch`.
        compute: device and precision.
        checkpoint: file to resume from; a mark of all that decides the result is added to its name.
        restart: begin anew.
        settings: what tells checkpoints apart.
        label: for the progress line.
        progress: show it.

    Returns:
        The reconstruction in eval mode, and the history, a row an epoch and head: `epoch`, `head_seed`, `train_loss`
        (mean over heads), `val_error`, and `val_ridge_error`, both root mean squares in SDs over hidden pixels.

    Raises:
        ValueError: no seed, an encoder without the taps, or a mask that hides nothing.
    """
    if not mask.bands:
        raise ValueError("this mask hides nothing, so there is nothing to learn from; give a mask with bands")
    compute = compute or Compute.of()
    made = Reconstruction.of(encoder, moments, seeds=seeds, width=width, taps=taps, compute=compute)
    options: dict[str, Any] = {"image_size": image_size, "device": compute.device, "seed": seed}
    train = Batches(pack, "train", batch_size=min(batch_size, len(pack.rows("train"))), shuffle=True, **options)
    watched = Batches(pack, "val", batch_size=batch_size, **options)
    optimizer = adamw(made.heads, lr=lr, weight_decay=weight_decay)

    def incomplete(batch: Batch, epoch: int) -> tuple[Tensor, Tensor, Tensor]:
        size = (batch.images.shape[-2], batch.images.shape[-1])
        drawn = hidden_pixels(mask, batch.samples, size, epoch=epoch, epochs=epochs)
        hidden = all_bands(drawn, mask.channels)
        filled = made.filled(batch.images, hidden)
        return filled, hidden, (batch.images - filled) / made.heads.sd[:, None, None]  # type: ignore[index]

    def batches(epoch: int) -> Iterator[Batch]:
        for group in optimizer.param_groups:
            group["lr"] = lr * (1 + np.cos(np.pi * epoch / epochs)) / 2
        draw = torch.Generator().manual_seed(seed * 100_003 + epoch)
        for batch in train.epoch(epoch):
            yield replace(batch, images=flip(batch.images, torch.rand(2, len(batch.images), generator=draw)))

    def loss(batch: Batch, epoch: int) -> Tensor:
        filled, hidden, missing = incomplete(batch, epoch)
        found = made.corrections(filled, hidden)
        wrong = F.huber_loss(found, missing.expand_as(found), reduction="none")
        # sum over heads: each gets the gradient that it would get alone
        return (wrong * hidden).sum() / hidden.sum().clamp(min=1)

    @torch.no_grad()
    def after_epoch(_: int) -> dict[str, float]:
        totals, count = torch.zeros(len(made.heads.seeds) + 1, dtype=torch.float64), 0
        for batch in watched.epoch():
            filled, hidden, missing = incomplete(batch, VALIDATION_EPOCH)
            wrong = torch.cat([missing - made.corrections(filled, hidden), missing[None]])
            totals += (wrong.square() * hidden).sum((1, 2, 3, 4)).double().cpu()
            count += int(hidden.sum())
        return dict(zip(names, (totals / max(count, 1)).sqrt().tolist(), strict=True))

    names = [*(f"val_error_{head_seed}" for head_seed in made.heads.seeds), "val_ridge_error"]
    decisive = {
        "mask": [type(mask).__name__, asdict(mask) if is_dataclass(mask) else repr(mask)],
        "moments": made.ridge.statistics.tolist(),
        "seeds": list(seeds),
        "lr": lr,
        "weight_decay": weight_decay,
        "width": width,
        "batch_size": batch_size,
        "image_size": train.image_size,
        "taps": list(made.taps),
        "seed": seed,
        "data": pack.fingerprint,
        "code": checksum_of_code(__name__),
        "weights_checksum": weights_checksum(encoder) if encoder is not None else None,
        **(settings or {}),
    }
    wide = fit(
        made.heads,
        optimizer,
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
    tidy = wide.melt(["epoch", "train_loss", "val_ridge_error"], names[:-1], "head_seed", "val_error")
    tidy["head_seed"] = tidy["head_seed"].str.removeprefix("val_error_").astype(int)
    return made, tidy.assign(train_loss=tidy["train_loss"] / len(made.heads.seeds))
