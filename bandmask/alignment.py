"""The thesis' fine-tuning: a copy of an encoder learns to embed incomplete images as the original embeds complete ones."""

from __future__ import annotations

import copy
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from bandmask.batches import Batch, Batches
from bandmask.masking import Fill, MaskSpec, mask_batch
from bandmask.objectives import clip_loss
from bandmask.packs import Pack
from bandmask.provenance import checksum_of_code
from bandmask.ranks import Ranks, gather, together
from bandmask.training import Compute, adamw, checkpoint_of, fill_checksum, fit, weights_checksum


def fine_tune(
    teacher: nn.Module,
    pack: Pack,
    spec: MaskSpec,
    fill: Fill,
    *,
    epochs: int = 15,
    batch_size: int = 64,
    image_size: int = 256,
    lr: float = 1e-4,
    weight_decay: float = 0.01,
    seed: int = 0,
    compute: Compute | None = None,
    checkpoint: Path | None = None,
    restart: bool = False,
    settings: dict[str, Any] | None = None,
    progress: bool = True,
) -> tuple[nn.Module, pd.DataFrame]:
    """A copy of the encoder that embeds incomplete images as the frozen original embeds complete ones.

    Teacher and student see the same flipped and blurred image, the student with pixels hidden. The student's batch
    norms are in train mode, as in any fine-tuning. Several processes (`distributed`) share each batch, and the result
    is that of one. Source: thesis §3.3.1 and Figure 3.2.

    Args:
        teacher: the pre-trained encoder; it is frozen and left unchanged.
        pack: images; `train` is trained on, `val` watched.
        spec: what is hidden; its seed decides the mask, `seed` the rest.
        fill: what stands in hidden pixels.
        epochs: the thesis used 15 for one band, 25 for several.
        batch_size: also the number of candidates each image is told apart from, so losses depend on it; of all
            processes together.
        image_size: side after resizing.
        lr: of AdamW.
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
        ValueError: `batch_size` can't be shared evenly by the processes.
    """
    ranks = Ranks.now()
    compute = compute or Compute.of()
    teacher = compute.place(teacher).eval().requires_grad_(False)
    student = compute.place(copy.deepcopy(teacher)).requires_grad_(True)
    teach = compute.faster(teacher)
    common: dict[str, Any] = {
        "batch_size": batch_size,
        "image_size": image_size,
        "device": compute.device,
        "shuffle": True,
        "drop_last": True,
        "seed": seed,
    }
    train = Batches(pack, "train", augment=True, **common, shard=(ranks.rank, ranks.count))
    watched = min(batch_size, len(pack.rows("val")))
    watch = Batches(pack, "val", **{**common, "batch_size": watched}, shard=ranks.shard_of(watched))

    def loss(batch: Batch, epoch: int) -> Tensor:
        incomplete = mask_batch(batch.images, batch.samples, spec, fill, epoch=epoch, epochs=epochs)
        with compute.autocast():
            with torch.no_grad():
                target = teach(compute.images(batch.images))
            return clip_loss(gather(learn(compute.images(incomplete))), gather(target))

    def after_epoch(_: int) -> dict[str, float]:
        return alignment_scores(student, teacher, watch, spec, fill, compute)

    decisive = {
        "mask": asdict(spec),
        "fill": fill_checksum(fill),
        "batch_size": batch_size,
        "image_size": image_size,
        "lr": lr,
        "weight_decay": weight_decay,
        "seed": seed,
        "data": pack.fingerprint,
        "code": checksum_of_code(__name__),
        "weights_checksum": weights_checksum(teacher),
        **(settings or {}),
    }
    with together(student) as learner:
        learn = compute.faster(learner)
        history = fit(
            student,
            adamw(student, lr=lr, weight_decay=weight_decay),
            train.epoch,
            loss,
            epochs=epochs,
            after_epoch=after_epoch,
            settings=decisive,
            checkpoint=checkpoint_of(checkpoint, decisive, epochs),
            restart=restart,
            compute=compute,
            images_per_epoch=len(train) * batch_size,
            label=f"fine-tuning on {' '.join(spec.bands) or 'complete images'}, seed {seed}",
            progress=progress,
        )
    return student, history


@torch.no_grad()
def alignment_scores(
    student: nn.Module, teacher: nn.Module, batches: Batches, spec: MaskSpec, fill: Fill, compute: Compute
) -> dict[str, float]:
    """CLIP loss and mean cosine similarity, student on incomplete against teacher on complete images.

    The images and their hidden pixels are the same at every call. Only full batches count, so that the loss always
    has the same number of candidates. Of batches that are shared by processes, each gets the scores of all.
    """
    student.eval()
    losses, cosines = [], []
    for batch in batches.epoch(0):
        incomplete = mask_batch(batch.images, batch.samples, spec, fill)
        with compute.autocast():
            embedded = student(compute.images(incomplete)).float()
            target = teacher(compute.images(batch.images)).float()
        if batches.shard[1] > 1:
            embedded, target = gather(embedded), gather(target)
        losses.append(clip_loss(embedded, target))
        cosines.append(torch.cosine_similarity(embedded, target).mean())
    return {"val_loss": float(torch.stack(losses).mean()), "val_cosine": float(torch.stack(cosines).mean())}
