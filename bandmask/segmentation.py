"""Land-cover segmentation on a frozen encoder: decoders of all seeds on one encoder pass, in both protocols.

Thesis protocol: the decoder is trained on incomplete images. Transfer: it was trained once, on complete images with
the pre-trained encoder, and is in service when bands break.
Source: thesis §3.2.2, §4.2.2.
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
from bandmask.decoders import SegmentationDecoders, create_decoder, load_decoder
from bandmask.maps import confusions
from bandmask.metrics import scores
from bandmask.packs import IGNORE, Pack
from bandmask.provenance import checksum_of_code
from bandmask.training import Compute, checkpoint_of, fill_checksum, fit, weights_checksum
from bandmask.views import Features, View, feature_batches, keep_features, tap_channels

WATCHED = ("overall_accuracy", "miou_all", "miou_present")  # each epoch, on validation images


def make_decoders(
    view: View,
    classes: int,
    seeds: Sequence[int] = (0, 1, 2),
    *,
    width: int = 256,
    weights: Path | str | None = None,
    compute: Compute | None = None,
) -> tuple[SegmentationDecoders, str]:
    """Decoders that fit an encoder's taps, one a seed, and a sentence on where their weights are from.

    Args:
        view: its encoder decides the channels.
        classes: of the task.
        seeds: of fresh weights and dropout.
        width: channels inside; the published decoder has 256.
        weights: the published DFC2020 checkpoint, else they start from scratch.
        compute: device.

    Raises:
        ValueError: the encoder has no such taps, or other channels than the published decoder takes.
    """
    low, high = tap_channels(view, compute or Compute.of())
    if weights is None:
        fresh = [create_decoder(high, low, classes, width=width, seed=seed) for seed in seeds]
        return SegmentationDecoders(fresh, seeds), "decoders start from scratch: no checkpoint was given"
    if (low, high) != (256, 2048):
        raise ValueError(
            f"the published decoder takes 256 and 2048 channels (ResNet50), this encoder's taps have {low} and {high}; "
            "leave decoder_weights empty, or take a ResNet50"
        )
    loaded, messages = zip(*(load_decoder(weights, classes=classes, seed=seed) for seed in seeds), strict=True)
    return SegmentationDecoders(loaded, seeds), messages[0]


def train_decoders(
    view: View,
    pack: Pack,
    decoders: SegmentationDecoders,
    *,
    epochs: int = 20,
    lr: float = 0.01,
    passes: int = 0,
    seed: int = 0,
    compute: Compute | None = None,
    checkpoint: Path | None = None,
    restart: bool = False,
    settings: dict[str, Any] | None = None,
    label: str = "training decoders",
    progress: bool = True,
) -> pd.DataFrame:
    """Train the decoders of all seeds on the same pass of the frozen encoder, each as if it were alone.

    They differ in their fresh weights and in dropout; order, blur and hidden pixels of an epoch belong to the pass.
    Only blur augments, as in the thesis (§3.1.1). It names no optimizer for this task; this is Adam, as for its MLP.

    Args:
        view: encoder and mask; `batch_size` is also that of the decoders' steps.
        pack: with targets; `train` is trained on, `val` watched.
        decoders: trained in place.
        epochs: over the training split.
        lr: of Adam.
        passes: number of different encoder passes, kept in memory; epoch e uses pass e mod `passes`. 0 makes a new
            one every epoch and keeps none, as the thesis does and as large data sets need.
        seed: of blur and order.
        compute: device and precision.
        checkpoint: file to resume from; a mark of all that decides the result is added to its name.
        restart: begin anew.
        settings: what tells checkpoints apart.
        label: for the progress line.
        progress: show it.

    Returns:
        The history, a row an epoch and decoder: `epoch`, `head_seed`, `train_loss` (mean over decoders), and
        validation `overall_accuracy`, `miou_all`, `miou_present`.

    Raises:
        ValueError: the passes don't fit in memory, or the pack has no targets.
    """
    compute = compute or Compute.of()
    passes = min(passes, epochs)
    decoders.to(compute.device)
    options: dict[str, Any] = {"image_size": view.image_size, "device": compute.device, "seed": seed, "targets": True}
    size = min(view.batch_size, len(pack.rows("train")))
    train = Batches(
        pack, "train", batch_size=size, augment=True, flip=False, shuffle=True, drop_last=passes == 0, **options
    )
    watched = Batches(pack, "val", batch_size=view.batch_size, **options)
    kept: dict[int, Features] = {}  # by turn; the validation images under −1
    outputs = pack.targets.shape[1:] if pack.targets is not None else ()

    def one_pass(turn: int) -> Features:
        if turn not in kept:
            split = watched if turn < 0 else train
            drawn = {} if turn < 0 else {"epoch": turn, "mask_epoch": turn, "epochs": passes}
            parts = feature_batches(view, split, compute, **drawn)
            kept[turn] = keep_features(parts, passes * len(train) + len(watched))
        return kept[turn]

    def batches(epoch: int) -> Iterator[Features]:
        if passes == 0:
            yield from feature_batches(view, train, compute, epoch=epoch, mask_epoch=epoch, epochs=epochs)
            return
        everything = one_pass(epoch % passes)
        order = torch.randperm(len(train.rows), generator=torch.Generator().manual_seed(seed * 100_003 + epoch))
        for part in order.to(compute.device).split(size):
            if len(part) == size:  # a last, small batch would upset batch norms
                yield everything.take(part)

    def loss(batch: Features, _: int) -> Tensor:
        with compute.autocast():
            logits = decoders(batch.low, batch.high, outputs)  # (K, B, C, H, W)
        return sum_of_losses(logits.float(), batch.targets)

    @torch.no_grad()
    def after_epoch(_: int) -> dict[str, float]:
        parts = feature_batches(view, watched, compute) if passes == 0 else one_pass(-1).split(view.batch_size)
        totals = sum(confusions(decoders, part, len(pack.classes), compute).sum(1) for part in parts)
        assert isinstance(totals, Tensor)
        return {
            f"{metric}:{head_seed}": value
            for head_seed, total in zip(decoders.seeds, totals.cpu(), strict=True)
            for metric, value in scores(total).items()
            if metric in WATCHED
        }

    decisive = {
        "mask": asdict(view.spec),
        "fill": fill_checksum(view.fill),
        "seeds": list(decoders.seeds),
        "decoders_checksum": weights_checksum(decoders),
        "lr": lr,
        "batch_size": size,
        "passes": passes,
        "seed": seed,
        "image_size": view.image_size,
        "data": pack.fingerprint,
        "code": checksum_of_code(__name__),
        "weights_checksum": weights_checksum(view.encoder),
        **(settings or {}),
    }
    wide = fit(
        decoders,
        torch.optim.Adam(decoders.parameters(), lr=lr),
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
    return _tidy(wide, decoders.seeds)


def sum_of_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of each decoder's logits (K, B, C, H, W), mean over labelled pixels, summed over decoders.

    The sum gives each decoder the gradient that it would get alone. A batch without one labelled pixel gives 0.
    """
    count = logits.shape[0]
    shared = targets.expand(count, *targets.shape).flatten(0, 1)
    total = F.cross_entropy(logits.flatten(0, 1), shared, ignore_index=IGNORE, reduction="sum")
    return total / (targets != IGNORE).sum().clamp(min=1)


def _tidy(wide: pd.DataFrame, seeds: Sequence[int]) -> pd.DataFrame:
    frames = []
    for head_seed in seeds:
        columns = {f"{metric}:{head_seed}": metric for metric in WATCHED}
        frame = wide[["epoch", "train_loss", *columns]].rename(columns=columns)
        frames.append(frame.assign(head_seed=head_seed, train_loss=wide["train_loss"] / len(seeds)))
    return pd.concat(frames, ignore_index=True)
