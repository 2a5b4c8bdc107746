"""How images reach a head or a decoder: through an encoder, with pixels hidden from it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from bandmask.batches import Batch, Batches
from bandmask.encoders import default_taps, embed, tap_strides
from bandmask.masking import VALIDATION_EPOCH, Fill, MaskSpec, mask_batch
from bandmask.memory import explain_out_of_memory
from bandmask.training import Compute

TAPS = ("layer1", "layer4")  # what DeepLabV3+ takes of a ResNet: S/4 and S/32 (thesis §3.2.2)
STRIDES = (4, 32)
CACHE_SHARE = 0.5  # of the memory that kept feature maps may take


@dataclass(frozen=True)
class View:
    """An encoder, and what is hidden from it."""

    encoder: nn.Module
    spec: MaskSpec
    fill: Fill
    image_size: int = 256
    batch_size: int = 64


class Features(NamedTuple):
    """What a decoder sees of images: `low` (B, C₁, S/4, S/4), `high` (B, C₄, S/32, S/32), targets and samples."""

    low: Tensor
    high: Tensor
    targets: Tensor
    samples: Tensor

    def take(self, rows: Tensor) -> Features:
        """Those of some images."""
        return Features(*(field[rows] for field in self))

    def split(self, size: int) -> Iterator[Features]:
        """Parts of `size` images, the last one smaller."""
        return map(Features._make, zip(*(field.split(size) for field in self), strict=True))


@torch.no_grad()
def embed_batches(
    view: View,
    batches: Batches,
    compute: Compute,
    *,
    epoch: int = 0,
    mask_epoch: int = VALIDATION_EPOCH,
    epochs: int = 1,
) -> tuple[Tensor, Tensor]:
    """Embeddings (N, D) float32 and labels (N,) of one pass over the images."""
    compute.place(view.encoder).eval()
    embeddings, labels = [], []
    with explain_out_of_memory("embedding images", view.batch_size, image_size=view.image_size):
        for batch in batches.epoch(epoch):
            images = _incomplete(view, batch, mask_epoch, epochs)
            with compute.autocast():
                embeddings.append(view.encoder(compute.images(images)).float())
            labels.append(batch.labels)
    return torch.cat(embeddings), torch.cat(labels)


def feature_batches(
    view: View,
    batches: Batches,
    compute: Compute,
    *,
    epoch: int = 0,
    mask_epoch: int = VALIDATION_EPOCH,
    epochs: int = 1,
) -> Iterator[Features]:
    """Feature maps of one pass, batch by batch: at 256 px a ResNet50's take 5 MB an image, too much to keep.

    Args:
        view: encoder and mask.
        batches: with targets.
        compute: device and precision.
        epoch: of order and augmentation.
        mask_epoch: of the mask's draw.
        epochs: length of the run, which schedules need.

    Raises:
        ValueError: the encoder has no such maps, see `decoder_taps`.
    """
    compute.place(view.encoder).eval()
    low, high = taps = decoder_taps(view.encoder)
    for batch in batches.epoch(epoch):
        with torch.no_grad(), compute.autocast():
            _, maps = embed(view.encoder, compute.images(_incomplete(view, batch, mask_epoch, epochs)), taps)
        assert batch.targets is not None  # Batches refuses a pack without
        yield Features(maps[low], maps[high], batch.targets, batch.samples)


def keep_features(parts: Iterator[Features], batches: int) -> Features:
    """Feature maps of a whole pass, in memory.

    Args:
        parts: from `feature_batches`.
        batches: number of batches that will be kept in all, for the check.

    Raises:
        ValueError: so many don't fit in half of the memory; found out at the first batch.
    """
    kept: list[Features] = []
    for part in parts:
        if not kept:
            device, needed = part.low.device, batches * sum(field.nbytes for field in part)
            there = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else _memory()
            if needed > CACHE_SHARE * there:
                raise ValueError(
                    f"feature maps of all passes take {needed / 2**30:.1f} GiB, more than half of the "
                    f"{there / 2**30:.1f} GiB there are; set passes (decoder_passes) lower, or to 0, which keeps none"
                )
        kept.append(part)
    return Features(*map(torch.cat, zip(*kept, strict=True)))


def _memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def decoder_taps(encoder: nn.Module) -> tuple[str, str]:
    """What DeepLabV3+ takes of an encoder: the maps at S/4 and S/32, which are `TAPS` of a ResNet.

    Segmentation alone asks for them: the decoder draws edges from the fine map and context from the coarse one.
    Fine-tuning and scene heads see embeddings only, and take any encoder.

    Raises:
        ValueError: the encoder has no maps of these sizes, as a ViT, whose maps are all at S/16.
    """
    taps, strides = default_taps(encoder), tap_strides(encoder)
    if tuple(strides[tap] for tap in taps) != STRIDES:
        there = ", ".join(f"{tap} (S/{stride})" for tap, stride in strides.items())
        raise ValueError(
            f"no tap at S/4 and S/32, as a ResNet's layer1 and layer4, in {type(encoder).__name__}; available: "
            f"{there}. Segmentation needs a ResNet or a ConvNeXt; fine-tuning and scene heads take any encoder"
        )
    return taps


def tap_channels(view: View, compute: Compute) -> tuple[int, int]:
    """Channels of the two taps: 256 and 2048 of a ResNet50.

    Raises:
        ValueError: the encoder has no such maps, see `decoder_taps`.
    """
    low, high = taps = decoder_taps(view.encoder)
    probe = torch.zeros(1, 13, 64, 64, device=compute.device)
    with torch.no_grad():
        _, maps = embed(compute.place(view.encoder).eval(), probe, taps)
    return maps[low].shape[1], maps[high].shape[1]


def _incomplete(view: View, batch: Batch, epoch: int, epochs: int) -> Tensor:
    return mask_batch(batch.images, batch.samples, view.spec, view.fill, epoch=epoch, epochs=epochs)
