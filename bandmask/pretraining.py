"""The stand-in: an encoder trained on the spot where no foundation model can be downloaded."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor, nn

from bandmask.batches import Batch, Batches, augment
from bandmask.objectives import clip_loss
from bandmask.packs import Pack
from bandmask.provenance import checksum_of_code
from bandmask.training import Compute, adamw, checkpoint_of, fit


def pretrain_stand_in(
    model: nn.Module,
    pack: Pack,
    *,
    epochs: int,
    batch_size: int = 64,
    image_size: int = 64,
    crop_size: int = 64,
    lr: float = 1e-3,
    weight_decay: float = 0.01,
    temperature: float = 0.1,
    seed: int = 0,
    compute: Compute | None = None,
    checkpoint: Path | None = None,
    restart: bool = False,
    progress: bool = True,
) -> pd.DataFrame:
    """Train an encoder on complete training images without labels: two views of an image, one embedding (SimCLR).

    Views differ by crop, flips, blur and brightness; no band is ever hidden, so the encoder knows nothing of loss.
    It stands in for a foundation model where none can be downloaded. Source: Chen et al. 2020, arXiv:2002.05709.

    Args:
        model: trained in place.
        pack: only its `train` split is seen.
        epochs: over the split.
        batch_size: images, two views each.
        image_size: side the images come in.
        crop_size: side of the views.
        lr: peak of a cosine schedule with a tenth of the run as warm-up.
        weight_decay: of AdamW.
        temperature: of the contrastive loss.
        seed: of order and views.
        compute: device and precision.
        checkpoint: file to resume from; a mark of all that decides the result is added to its name.
        restart: begin anew.
        progress: show it.

    Returns:
        The history: `train_loss` is the contrastive loss.
    """
    from kornia.augmentation import RandomResizedCrop

    compute = compute or Compute.of()
    compute.place(model)
    learn = compute.faster(model)
    batches = Batches(
        pack,
        "train",
        batch_size=min(batch_size, len(pack.rows("train"))),
        image_size=image_size,
        shuffle=True,
        drop_last=True,
        seed=seed,
        device=compute.device,
    )
    crop = RandomResizedCrop((crop_size, crop_size), scale=(0.3, 1.0), ratio=(0.8, 1.25))
    optimizer = adamw(model, lr=lr, weight_decay=weight_decay)

    def two_views(epoch: int) -> Iterator[Batch]:
        progressed = (epoch + 0.5) / epochs
        scale = min(progressed / 0.1, 1.0) * 0.5 * (1 + math.cos(math.pi * progressed))
        for group in optimizer.param_groups:
            group["lr"] = lr * scale
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        for batch in batches.epoch(epoch):
            images = torch.cat([_view(batch.images, crop, generator), _view(batch.images, crop, generator)])
            yield Batch(images, batch.labels, batch.samples)

    def loss(batch: Batch, _: int) -> Tensor:
        with compute.autocast():
            first, second = learn(compute.images(batch.images)).chunk(2)
        return clip_loss(first, second, 1 / temperature)

    settings = {
        "task": "pretrain_stand_in",
        "batch_size": batch_size,
        "image_size": image_size,
        "crop_size": crop_size,
        "lr": lr,
        "weight_decay": weight_decay,
        "temperature": temperature,
        "seed": seed,
        "data": pack.fingerprint,
        "code": checksum_of_code(__name__),
    }
    return fit(
        model,
        optimizer,
        two_views,
        loss,
        epochs=epochs,
        after_epoch=lambda _: {},
        settings=settings,
        checkpoint=checkpoint_of(checkpoint, settings, epochs),
        restart=restart,
        compute=compute,
        images_per_epoch=len(batches) * batches.batch_size,
        label="pre-training the stand-in",
        progress=progress,
    )


def _view(images: Tensor, crop: Callable[[Tensor], Tensor], generator: torch.Generator) -> Tensor:
    brightness = 0.8 + 0.4 * torch.rand(len(images), 1, 1, 1, generator=generator).to(images.device)
    return augment(crop(images), generator) * brightness
