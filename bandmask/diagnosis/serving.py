"""The loop closed: detect faulty bands, hide them, fill them in, and ask the classifier in service.

Beside it stand what bounds it: an oracle that knows which bands are faulty, doing nothing, and healthy images. The
detector also sees the healthy images, because a false alarm costs accuracy where nothing was broken.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bandmask import bands
from bandmask.batches import Batches
from bandmask.diagnosis.detector import Detector
from bandmask.diagnosis.faults import Fault, inject
from bandmask.fills import RidgeLocalFill
from bandmask.heads import SceneHeads
from bandmask.masking import MaskSpec, hide
from bandmask.packs import Pack
from bandmask.training import Compute

_HEALTHY = ("healthy", "healthy, detector on")
METHODS = (*_HEALTHY, "do nothing", "detector", "oracle")
_ANY = MaskSpec(bands.NAMES, allow_all_bands=True)


def repair(images: Tensor, faulty: np.ndarray | Tensor, fill: RidgeLocalFill) -> Tensor:
    """The batch with whole bands predicted from the bands that are trusted; nothing of a faulty band is left.

    Args:
        images: reflectance, (B, 13, H, W).
        faulty: bands to replace, (B, 13) bool, as `Detector.faulty` gives them.
        fill: of all 13 bands. Where all are faulty it gives their means.

    Raises:
        ValueError: `faulty` is of another shape.
    """
    faulty = torch.as_tensor(faulty, dtype=torch.bool, device=images.device)
    if faulty.shape != images.shape[:2]:
        raise ValueError(
            f"faulty says of each band of each image, {tuple(images.shape[:2])}; got {tuple(faulty.shape)}"
        )
    repaired = images.clone()
    touched = faulty.any(1)
    if touched.any():
        hidden = faulty[touched][..., None, None].expand(-1, -1, *images.shape[2:])
        repaired[touched] = hide(images[touched], hidden, _ANY, fill)
    return repaired


def break_each(images: Tensor, samples: Tensor, faults: Sequence[Fault]) -> tuple[Tensor, Tensor]:
    """The batch with one fault an image, and which bands that made faulty, (B, 13) bool.

    An image's fault is `faults[sample % len(faults)]`, so it doesn't depend on the batch.

    Raises:
        ValueError: no fault.
    """
    if not faults:
        raise ValueError("give one fault or more; `faults.Fault(kind, bands, amount)` makes one")
    broken, faulty = images.clone(), torch.zeros(images.shape[:2], dtype=torch.bool, device=images.device)
    turn = samples.to(images.device) % len(faults)
    for number, fault in enumerate(faults):
        rows = torch.nonzero(turn == number).squeeze(1)
        if len(rows):
            broken[rows] = inject(images[rows], samples.to(images.device)[rows], fault)
            faulty[rows[:, None], torch.tensor(fault.channels, device=images.device)] = True
    return broken, faulty


@torch.no_grad()
def closed_loop(
    pack: Pack,
    faults: Sequence[Fault],
    detector: Detector,
    fill: RidgeLocalFill,
    encoder: nn.Module,
    heads: SceneHeads,
    *,
    split: str = "test",
    image_size: int | None = None,
    batch_size: int = 64,
    compute: Compute | None = None,
    methods: Sequence[str] = METHODS,
) -> pd.DataFrame:
    """Predicted class of every image by every head and method, one fault an image (`break_each`).

    Args:
        pack: complete, healthy images.
        faults: what breaks.
        detector: fitted on complete images of this size.
        fill: what stands in the place of distrusted bands.
        encoder: trained on complete images.
        heads: trained on its embeddings of complete images (`classification.train_heads`).
        split: of the pack.
        image_size: side that the encoder takes; the detector sees the pack's.
        batch_size: images a forward.
        compute: device and precision.
        methods: some of `METHODS`.

    Returns:
        `method`, `encoder_seed` (none), `head_seed`, `sample` (row in the pack), `label`, `predicted`, as
        `comparison.paired_difference` takes them; and `named`: exactly the faulty bands were distrusted.

    Raises:
        ValueError: an unknown method.
    """
    if unknown := [method for method in methods if method not in METHODS]:
        raise ValueError(f"unknown method {unknown[0]!r}; available: {', '.join(METHODS)}")
    compute = compute or Compute.of()
    compute.place(encoder).eval()
    heads.to(compute.device)
    frames = []
    for batch in Batches(pack, split, batch_size=batch_size, device=compute.device).epoch():
        broken, faulty = break_each(batch.images, batch.samples, faults)
        for method in methods:
            seen, distrusted = _seen(method, batch.images, broken, faulty, detector, fill)
            named = (distrusted == (faulty & (method not in _HEALTHY))).all(1)
            with compute.autocast():
                embeddings = encoder(compute.images(_resized(seen, image_size))).float()
            common = {"sample": batch.samples.cpu(), "label": batch.labels.cpu(), "named": named.cpu()}
            frames += [
                pd.DataFrame({"method": method, "head_seed": seed, **common, "predicted": predicted.cpu()})
                for seed, predicted in zip(heads.seeds, heads(embeddings).argmax(-1), strict=True)
            ]
    rows = pd.concat(frames, ignore_index=True)
    rows["encoder_seed"] = pd.Series(pd.NA, rows.index, dtype="Int64")
    return rows


def _seen(
    method: str, healthy: Tensor, broken: Tensor, faulty: Tensor, detector: Detector, fill: RidgeLocalFill
) -> tuple[Tensor, Tensor]:
    """What the encoder sees, (B, 13, H, W), and which bands are distrusted, (B, 13) bool."""
    images, distrusted = (healthy if method in _HEALTHY else broken), torch.zeros_like(faulty)
    if method == "oracle":
        distrusted = faulty
    elif method in ("detector", "healthy, detector on"):
        distrusted = torch.from_numpy(detector.faulty(images.cpu())).to(images.device)
    return repair(images, distrusted, fill), distrusted


def _resized(images: Tensor, size: int | None) -> Tensor:
    if size is None or images.shape[-2:] == (size, size):
        return images
    return F.interpolate(images, size=(size, size), mode="bilinear", align_corners=False)
