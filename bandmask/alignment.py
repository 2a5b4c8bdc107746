"""A copy of an encoder learns to embed incomplete images as the frozen original embeds complete ones."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from bandmask import objectives
from bandmask.batches import Batch, Batches
from bandmask.draws import AnyMask
from bandmask.encoders import embed
from bandmask.masking import Fill, MaskSpec, mask_batch
from bandmask.objectives import Objective
from bandmask.packs import Pack
from bandmask.provenance import checksum_of_code
from bandmask.ranks import Ranks, gather, together
from bandmask.training import Compute, adamw, checkpoint_of, fill_checksum, fit, weights_checksum

BATCH_NORMS = ("train", "frozen")
LR_SCHEDULES = ("constant", "cosine")


def fine_tune(
    teacher: nn.Module,
    pack: Pack,
    spec: MaskSpec | AnyMask,
    fill: Fill,
    *,
    objective: Objective | None = None,
    taps: Sequence[str] = ("layer1", "layer4"),
    batch_norm: str = "train",
    epochs: int = 15,
    batch_size: int = 64,
    image_size: int = 256,
    lr: float = 1e-4,
    lr_schedule: str = "constant",
    weight_decay: float = 0.01,
    seed: int = 0,
    compute: Compute | None = None,
    checkpoint: Path | None = None,
    restart: bool = False,
    settings: dict[str, Any] | None = None,
    progress: bool = True,
) -> tuple[nn.Module, pd.DataFrame]:
    """A copy of the encoder that embeds incomplete images as the frozen original embeds complete ones.

    Teacher and student see the same flipped and blurred image, the student with pixels hidden. As given, this is the
    thesis' method (§3.3.1 and Figure 3.2); `objective` goes past it. Several processes (`distributed`) share each
    batch, and the result is that of one.

    Args:
        teacher: the pre-trained encoder; it is frozen and left unchanged.
        pack: images; `train` is trained on, `val` watched.
        spec: what is hidden, of all images or drawn for each; its seed decides the mask, `seed` the rest.
        fill: what stands in hidden pixels.
        objective: what the student is pulled to; default: the thesis' CLIP loss alone.
        taps: levels of feature maps that `objective.features` aligns; what a decoder takes.
        batch_norm: `train`: batch norms take the statistics of incomplete batches and follow them slowly; `frozen`:
            they keep the teacher's, so that the student starts as the teacher exactly, on few images above all.
        epochs: the thesis used 15 for one band, 25 for several.
        batch_size: also the number of candidates each image is told apart from, so losses depend on it; of all
            processes together.
        image_size: side after resizing.
        lr: of AdamW.
        lr_schedule: `constant` (the thesis), or `cosine`: rises over a fifth of the epochs, because the first steps of
            AdamW are large and throw a well-trained encoder far off, and falls to 0.
        weight_decay: none on biases and norms.
        seed: of order and augmentation.
        compute: device and precision.
        checkpoint: file to resume from; a mark of all that decides the result is added to its name.
        restart: begin anew.
        settings: more that decides the result, to tell checkpoints apart (which encoder, which data).
        progress: show it.

    Returns:
        The student in eval mode, and the history with `val_loss` and `val_cosine`; row 0 is the pre-trained encoder.

    Raises:
        ValueError: `batch_size` can't be shared evenly by the processes; an unknown `batch_norm`; the encoder has no
            such taps; features alone with several processes.
    """
    ranks, objective = Ranks.now(), objective or Objective()
    compute = compute or Compute.of()
    for name, value, known in (("batch_norm", batch_norm, BATCH_NORMS), ("lr_schedule", lr_schedule, LR_SCHEDULES)):
        if value not in known:
            raise ValueError(f"unknown {name} {value!r}; available: {', '.join(known)}")
    if ranks.count > 1 and not (objective.clip or objective.distance):
        raise ValueError("with several processes every weight must have a gradient; align 'both', or use one process")
    levels = tuple(taps) if objective.features else ()
    teacher = compute.place(teacher).eval().requires_grad_(False)
    student = compute.place(copy.deepcopy(teacher)).requires_grad_(True)
    teach = compute.faster(_Tapped(teacher, levels))
    common: dict[str, Any] = {
        "batch_size": batch_size,
        "image_size": image_size,
        "device": compute.device,
        "shuffle": True,
        "drop_last": True,
        "seed": seed,
    }
    views = [spec]
    train = Batches(pack, "train", augment=True, **common, shard=(ranks.rank, ranks.count))
    watched = min(batch_size, len(pack.rows("val")))
    watch = Batches(pack, "val", **{**common, "batch_size": watched}, shard=ranks.shard_of(watched))

    optimizer = adamw(student, lr=lr, weight_decay=weight_decay)

    def batches(epoch: int) -> Iterator[Batch]:
        if lr_schedule == "cosine":
            for group in optimizer.param_groups:
                group["lr"] = lr * min(5 * (epoch + 1) / epochs, 1) * (1 + math.cos(math.pi * epoch / epochs)) / 2
        return train.epoch(epoch)

    def loss(batch: Batch, epoch: int) -> Tensor:
        incomplete = torch.cat([_masked(batch, view, fill, epoch, epochs) for view in views])
        if batch_norm == "frozen":
            _freeze_norms(student)
        with compute.autocast():
            with torch.no_grad():
                target, target_maps = teach(compute.images(batch.images))
            embedded, maps = learn(compute.images(incomplete))
            return objective(_gather_views(embedded, len(views)), gather(target), maps, target_maps)

    def after_epoch(_: int) -> dict[str, float]:
        return alignment_scores(student, teacher, watch, spec, fill, compute)

    decisive = {
        "mask": asdict(spec),
        "fill": fill_checksum(fill),
        "objective": asdict(objective),
        "taps": list(levels),
        "batch_norm": batch_norm,
        "batch_size": batch_size,
        "image_size": image_size,
        "lr": lr,
        "lr_schedule": lr_schedule,
        "weight_decay": weight_decay,
        "seed": seed,
        "data": pack.fingerprint,
        "code": checksum_of_code(__name__),
        "weights_checksum": weights_checksum(teacher),
        **(settings or {}),
    }
    with together(_Tapped(student, levels)) as learner:
        learn = compute.faster(learner)
        history = fit(
            student,
            optimizer,
            batches,
            loss,
            epochs=epochs,
            after_epoch=after_epoch,
            settings=decisive,
            checkpoint=checkpoint_of(checkpoint, decisive, epochs),
            restart=restart,
            compute=compute,
            images_per_epoch=len(train) * batch_size,
            label=f"fine-tuning on {_described(spec)}, seed {seed}",
            progress=progress,
        )
    return student, history


@torch.no_grad()
def alignment_scores(
    student: nn.Module, teacher: nn.Module, batches: Batches, spec: MaskSpec | AnyMask, fill: Fill, compute: Compute
) -> dict[str, float]:
    """CLIP loss, mean cosine similarity and `distance`, student on incomplete against teacher on complete images.

    The images and their hidden pixels are the same at every call. Only full batches count, so that the loss always
    has the same number of candidates. Of batches that are shared by processes, each gets the scores of all.
    """
    student.eval()
    losses, cosines, distances = [], [], []
    for batch in batches.epoch(0):
        incomplete = mask_batch(batch.images, batch.samples, spec, fill)
        with compute.autocast():
            embedded = student(compute.images(incomplete)).float()
            target = teacher(compute.images(batch.images)).float()
        if batches.shard[1] > 1:
            embedded, target = gather(embedded), gather(target)
        losses.append(objectives.clip_loss(embedded, target))
        cosines.append(torch.cosine_similarity(embedded, target).mean())
        distances.append(objectives.distance(embedded, target))
    found = {"val_loss": losses, "val_cosine": cosines, "val_distance": distances}
    return {name: float(torch.stack(values).mean()) for name, values in found.items()}


class _Tapped(nn.Module):
    """An encoder with its feature maps: embeddings (B, D), and the map of each tap."""

    def __init__(self, model: nn.Module, taps: Sequence[str]) -> None:
        super().__init__()
        self.model, self.taps = model, tuple(taps)

    def forward(self, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return embed(self.model, images, self.taps)


def _another(spec: MaskSpec | AnyMask, number: int) -> MaskSpec | AnyMask:
    """A further view's mask: the same law, other draws."""
    return replace(spec, seed=spec.seed + 1_000_003 * number)


def _masked(batch: Batch, spec: MaskSpec | AnyMask, fill: Fill, epoch: int, epochs: int) -> Tensor:
    return mask_batch(batch.images, batch.samples, spec, fill, epoch=epoch, epochs=epochs)


def _gather_views(embedded: Tensor, views: int) -> Tensor:
    """Embeddings (V·B, D) of this rank to (V·N, D) of all ranks, views one after another."""
    if views == 1 or Ranks.now().count == 1:
        return gather(embedded)
    return torch.cat([gather(part) for part in embedded.chunk(views)])


def _freeze_norms(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()


def _described(spec: MaskSpec | AnyMask) -> str:
    if isinstance(spec, AnyMask):
        return f"{spec.fewest} to {spec.most} lost bands"
    return " ".join(spec.bands) or "complete images"
