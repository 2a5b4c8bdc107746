"""Class maps, and pixels by true and predicted class: of our decoders, and of the published DFC2020 model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from bandmask.batches import Batches
from bandmask.decoders import DFC2020_CLASSES, Dfc2020Model, SegmentationDecoders
from bandmask.encoders import embed
from bandmask.masking import Fill, MaskSpec, mask_batch
from bandmask.packs import IGNORE, Pack
from bandmask.training import Compute
from bandmask.views import TAPS, Features, View, feature_batches


@torch.no_grad()
def predict(
    view: View,
    decoders: SegmentationDecoders,
    pack: Pack,
    split: str = "test",
    *,
    compute: Compute | None = None,
) -> pd.DataFrame:
    """Pixels by true and predicted class, of every image and decoder; pixels without a label are left out.

    Returns:
        `head_seed`, `sample` (row in the pack), `group` (what intervals resample: the scene or block of an image),
        `label`, `predicted` (class indices), `pixels`.
    """
    compute = compute or Compute.of()
    decoders.to(compute.device).eval()
    options: dict[str, Any] = {"batch_size": view.batch_size, "image_size": view.image_size, "device": compute.device}
    frames = []
    for part in feature_batches(view, Batches(pack, split, targets=True, **options), compute):
        counts = confusions(decoders, part, len(pack.classes), compute)
        frames.append(_rows(counts, part.samples, decoders.seeds, pack))
    return pd.concat(frames, ignore_index=True).sort_values(["head_seed", "sample"], kind="stable", ignore_index=True)


@torch.no_grad()
def predict_published(
    model: Dfc2020Model,
    pack: Pack,
    spec: MaskSpec,
    fill: Fill,
    split: str = "test",
    *,
    batch_size: int = 16,
    compute: Compute | None = None,
) -> pd.DataFrame:
    """The same of the complete published model, as a reference: nothing of it was trained here; its seed is −1.

    Raises:
        ValueError: the pack lacks a class that the model knows by name.
    """
    if missing := [name for name in DFC2020_CLASSES if name not in pack.classes]:
        raise ValueError(
            f"the published model predicts {', '.join(missing)}, which {pack.path} has no class for; it goes with the "
            "simplified IGBP scheme"
        )
    compute = compute or Compute.of()
    compute.place(model).eval()
    ours = torch.tensor([pack.classes.index(name) for name in DFC2020_CLASSES], device=compute.device)
    frames = []
    for batch in Batches(pack, split, targets=True, batch_size=batch_size, device=compute.device).epoch():
        assert batch.targets is not None
        incomplete = mask_batch(batch.images, batch.samples, spec, fill)
        with compute.autocast():
            predicted = ours[model(compute.images(incomplete)).argmax(1)]
        counts = _counted(predicted[None], batch.targets, len(pack.classes))
        frames.append(_rows(counts, batch.samples, (-1,), pack))
    return pd.concat(frames, ignore_index=True)


@torch.no_grad()
def segment(
    view: View,
    decoders: SegmentationDecoders,
    images: Tensor,
    samples: Tensor,
    size: tuple[int, int] | None = None,
    *,
    compute: Compute | None = None,
) -> Tensor:
    """Class of every pixel by every decoder, (K, B, H, W) uint8, of complete images that the view then masks.

    Args:
        view: encoder and mask.
        decoders: in any mode; left in eval mode.
        images: reflectance (B, 13, S, S), S a multiple of 32.
        samples: identity of each image, (B,), which the draw of hidden pixels depends on.
        size: H and W of the answer; default S, S.
        compute: device and precision.
    """
    compute = compute or Compute.of()
    decoders.to(compute.device).eval()
    images, samples = images.to(compute.device), samples.to(compute.device)
    incomplete = mask_batch(images, samples, view.spec, view.fill)
    with compute.autocast():
        _, maps = embed(compute.place(view.encoder).eval(), compute.images(incomplete), TAPS)
        logits = decoders(maps[TAPS[0]], maps[TAPS[1]], size or tuple(images.shape[-2:]))
    return logits.argmax(2).to(torch.uint8).cpu()


@torch.no_grad()
def confusions(decoders: SegmentationDecoders, part: Features, classes: int, compute: Compute) -> Tensor:
    """Counts (K, B, C, C) int64 of true and predicted classes, for each decoder and image."""
    height, width = part.targets.shape[1:]
    with compute.autocast():
        predicted = decoders(part.low, part.high, (height, width)).argmax(2)  # (K, B, H, W)
    return _counted(predicted, part.targets, classes)


def _counted(predicted: Tensor, targets: Tensor, classes: int) -> Tensor:
    heads, images = predicted.shape[:2]
    labelled = targets != IGNORE
    cells = torch.where(labelled, targets, 0) * classes + predicted
    cells += torch.arange(heads * images, device=cells.device).view(heads, images, 1, 1) * classes**2
    counts = torch.bincount(cells[labelled.expand_as(cells)], minlength=heads * images * classes**2)
    return counts.view(heads, images, classes, classes)


def _rows(counts: Tensor, samples: Tensor, seeds: Sequence[int], pack: Pack) -> pd.DataFrame:
    """One row a count that is not zero."""
    head, image, label, predicted = counts.nonzero().T.cpu()
    rows = samples.cpu()[image].numpy()
    groups = pack.index["group"].iloc[rows] if "group" in pack.index else pd.Series(rows)
    return pd.DataFrame(
        {
            "head_seed": torch.tensor(seeds)[head].numpy(),
            "sample": rows,
            "group": groups.astype(str).to_numpy(),
            "label": label.numpy(),
            "predicted": predicted.numpy(),
            "pixels": counts[counts > 0].cpu().numpy(),
        }
    )
