"""What a detector keeps of an image: a few matrices, from which any linear combination of bands can be judged.

A residual `band − ridge prediction` is a linear combination of bands, and its mean, scatter, fine grain, column
structure and correlation with a gradient are linear and quadratic forms of it. So one pass over the pixels serves every
regression: predicting again without a distrusted band costs matrices of 13 × 13, not images.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from bandmask import bands

CHUNK = 8  # images at a time: in float64 with gradients they are 10 MB, which caches hold; 64 took 2.7 times as long
LEAST_PIXELS = 64  # of an image, that all of its bands have
_BANDS = len(bands.NAMES)


@dataclass(frozen=True)
class Sketch:
    """Of N images, float64, in reflectance.

    Attributes:
        mean: (N, 13).
        spread: covariance of the 13 bands, their gradients across, and their gradients down, (N, 39, 39).
        grain: second moments of what Immerkær's noise filter leaves, (N, 13, 13). It has no response to columns or
            rows, and white noise of SD σ gives σ².
        columns: second moments of the second differences of column means, (N, 13, 13). Column offsets of SD s give s².
        absent: bands without a value, (N, 13) bool; their entries elsewhere are 0.
    """

    mean: np.ndarray
    spread: np.ndarray
    grain: np.ndarray
    columns: np.ndarray
    absent: np.ndarray

    @classmethod
    def of(cls, images: Tensor | np.ndarray) -> Sketch:
        """Of reflectance (N, 13, H, W); NaN is a pixel without a value.

        A pixel counts where every band of its image that has values in at least half of the image has one; a band with
        fewer is absent from that image.

        Raises:
            ValueError: another shape, images narrower than 8 pixels, or one with too few complete pixels.
        """
        images = torch.as_tensor(images)
        if images.ndim != 4 or images.shape[1] != _BANDS or min(images.shape[2:]) < 8:
            raise ValueError(
                f"a detector takes images (N, {_BANDS}, H, W) of 8 pixels or more a side; got {tuple(images.shape)}"
            )
        return cls.join(_sketch(part.double()) for part in images.split(CHUNK))

    @classmethod
    def join(cls, parts: Iterable[Sketch]) -> Sketch:
        """The images of several, in order."""
        parts = list(parts)
        return cls(*(np.concatenate([getattr(part, field.name) for part in parts]) for field in fields(cls)))

    def __len__(self) -> int:
        """Images."""
        return len(self.mean)

    def take(self, rows: np.ndarray) -> Sketch:
        """Those of some images."""
        return Sketch(*(getattr(self, field.name)[rows] for field in fields(self)))

    def exchanged(self, first: int, second: int) -> Sketch:
        """As if two channels had been exchanged in every image."""
        order = np.arange(_BANDS)
        order[[first, second]] = second, first
        three = np.concatenate([order, _BANDS + order, 2 * _BANDS + order])
        return Sketch(
            self.mean[:, order],
            self.spread[:, three][:, :, three],
            self.grain[:, order][:, :, order],
            self.columns[:, order][:, :, order],
            self.absent[:, order],
        )


def _sketch(images: Tensor) -> Sketch:
    finite = images.isfinite()
    absent = finite.flatten(2).float().mean(-1) < 0.5  # (N, 13)
    seen = (finite | absent[..., None, None]).all(1)  # (N, H, W)
    # a far-away level would cost digits in the products below; what is hidden counts nowhere, so any value will do
    images = torch.where(finite & ~absent[..., None, None], images, 0.0)
    wide, high = images[..., 1:-1, 2:] - images[..., 1:-1, :-2], images[..., 2:, 1:-1] - images[..., :-2, 1:-1]
    inner, counts = _inner(seen)
    if (counts < LEAST_PIXELS).any():
        raise ValueError(
            f"image {int(counts.argmin())} has {int(counts.min())} pixels with a value in every band and around it; "
            f"a detector needs {LEAST_PIXELS}"
        )
    weight = inner.double() / counts[:, None, None]
    layers = torch.cat([images[..., 1:-1, 1:-1], wide / 2, high / 2], 1)  # (N, 39, H − 2, W − 2)
    mean = torch.einsum("nchw,nhw->nc", layers, weight)
    spread = _products(layers - mean[..., None, None], weight)
    grain = _products(_second(_second(images, -1), -2) / 6, weight)
    return Sketch(*(part.cpu().numpy() for part in (mean[:, :_BANDS], spread, grain, _columns(images, seen), absent)))


def complete(images: np.ndarray) -> np.ndarray:
    """Which images (N, 13, H, W) have enough pixels with a value in every band that is not all NaN, (N,) bool."""
    finite = torch.from_numpy(np.isfinite(images))
    seen = (finite | ~finite.flatten(2).any(-1)[..., None, None]).all(1)
    return (_inner(seen)[1] >= LEAST_PIXELS).numpy()


def _inner(seen: Tensor) -> tuple[Tensor, Tensor]:
    """Pixels seen with all their neighbours, (N, H − 2, W − 2), and how many they are."""
    inner = _all_seen(_all_seen(seen, -1), -2)
    return inner, inner.flatten(1).sum(-1)


def _columns(images: Tensor, seen: Tensor) -> Tensor:
    """Second moments of the second differences of column means, (N, 13, 13)."""
    rows = seen.sum(-2)  # (N, W)
    means = (images * seen[:, None]).sum(-2) / rows.clamp(min=1)[:, None]
    usable = _all_seen(rows >= max(seen.shape[-2] // 4, 1), -1)
    weight = usable.double() / usable.sum(-1, keepdim=True).clamp(min=1)
    return _products((_second(means, -1) / 6**0.5)[..., None, :], weight[:, None])


def _products(layers: Tensor, weight: Tensor) -> Tensor:
    """Weighted products of all pairs of layers: (N, C, H, W) and (N, H, W) give (N, C, C)."""
    flat = layers.flatten(2)
    return (flat * weight.flatten(1)[:, None]) @ flat.transpose(1, 2)


def _second(values: Tensor, axis: int) -> Tensor:
    """Second differences, 1 −2 1."""
    return values.diff(n=2, dim=axis)


def _all_seen(seen: Tensor, axis: int) -> Tensor:
    """Where a pixel and both its neighbours are seen."""
    size = seen.shape[axis]
    return seen.narrow(axis, 0, size - 2) & seen.narrow(axis, 1, size - 2) & seen.narrow(axis, 2, size - 2)
