"""Faults of bands, put into healthy images: what a detector is measured on.

An image of a broken sensor is rare and its truth unknown; an injected fault is known exactly, and its size stands in
physical units. Every draw is an integer hash of (seed, sample, band, pixel), so a fault does not depend on the batch it
came in. Values are not clipped: noise on a dark band may go below zero, as DN may since processing baseline 04.00.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from bandmask import bands as band_table
from bandmask import shapes

# What each fault is, and what its amount means.
KINDS: dict[str, str] = {
    "dead": "every pixel at a level near 0; amount: the level in reflectance",
    "stuck": "every pixel at one level; amount: the level in reflectance",
    "noisy": "Gaussian noise on every pixel; amount: its SD in reflectance",
    "striped": "an offset a column; amount: SD of the offsets in reflectance",
    "dead columns": "columns at 0; amount: the share of columns that is dead, 0 to 1",
    "gain": "every pixel times a factor; amount: the factor",
    "offset": "every pixel plus a constant; amount: the constant in reflectance",
    "shift": "the band moved in a direction drawn for each image; amount: how far, in pixels",
    "swapped": "two bands exchanged; it has no amount",
}
_STREAMS = {"noisy": 1, "striped": 2, "dead columns": 3, "shift": 4}  # so that no two kinds share their draws


@dataclass(frozen=True)
class Fault:
    """One kind of fault, in these bands, of this size.

    Attributes:
        kind: a key of `KINDS`.
        bands: ESA names of the bands that are faulty; two for `swapped`.
        amount: in the unit that `KINDS` says; of `swapped` it is left out.
        seed: another seed, another draw.
    """

    kind: str
    bands: tuple[str, ...]
    amount: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        """Check every field, and normalise `bands` to ESA names in SatCLIP order."""
        if self.kind not in KINDS:
            raise ValueError(f"unknown fault {self.kind!r}; available: {', '.join(KINDS)}")
        object.__setattr__(self, "bands", band_table.parse_bands(self.bands))
        if not self.bands:
            raise ValueError(f"a {self.kind!r} fault needs a band; available: {', '.join(band_table.NAMES)}")
        if self.kind == "swapped":
            if len(self.bands) != 2 or self.amount is not None:
                raise ValueError(f"'swapped' takes two bands and no amount; got {self.bands} and {self.amount!r}")
        elif (
            isinstance(self.amount, bool) or not isinstance(self.amount, int | float) or not math.isfinite(self.amount)
        ):
            raise ValueError(f"a {self.kind!r} fault needs a finite amount ({KINDS[self.kind]}); got {self.amount!r}")
        elif (self.kind in _STREAMS and self.amount < 0) or (self.kind == "dead columns" and self.amount > 1):
            raise ValueError(f"amount {self.amount!r} is out of range ({KINDS[self.kind]})")

    @property
    def channels(self) -> list[int]:
        """0-based channels of the faulty bands in SatCLIP order."""
        return band_table.channel_indices(self.bands)

    @property
    def label(self) -> str:
        """For people: `noisy 0.01, B08`."""
        amount = "" if self.amount is None else f" {self.amount:g}"
        return f"{self.kind}{amount}, {' '.join(self.bands)}"


def inject(images: Tensor, samples: Tensor, fault: Fault) -> Tensor:
    """A copy of the batch in which the fault's bands are faulty and all others are untouched.

    Args:
        images: reflectance, (B, 13, H, W), float.
        samples: integer identity of each image in its pack, (B,).
        fault: what to inject.

    Returns:
        (B, 13, H, W), same type.

    Raises:
        ValueError: images of another shape, or not one sample an image.
    """
    if images.ndim != 4 or images.shape[1] != len(band_table.NAMES) or samples.shape != images.shape[:1]:
        raise ValueError(
            f"images are (B, {len(band_table.NAMES)}, H, W) with a sample each; got {tuple(images.shape)} and samples "
            f"{tuple(samples.shape)}"
        )
    faulty = images.clone()
    channels = torch.tensor(fault.channels, device=images.device)
    if fault.kind == "swapped":
        faulty[:, channels] = images[:, channels.flip(0)]
    else:
        faulty[:, channels] = _changed(images[:, channels], samples.to(images.device), channels, fault)
    return faulty


def _changed(layers: Tensor, samples: Tensor, channels: Tensor, fault: Fault) -> Tensor:
    """The faulty bands, (B, k, H, W), of the healthy ones."""
    amount = float(fault.amount or 0.0)
    if fault.kind in ("dead", "stuck"):
        return torch.full_like(layers, amount)
    if fault.kind == "gain":
        return layers * amount
    if fault.kind == "offset":
        return layers + amount
    height, width = layers.shape[-2:]
    key = shapes.mix64(torch.tensor(shapes.signed64(fault.seed), device=layers.device) ^ _STREAMS[fault.kind])
    if fault.kind == "shift":  # one direction an image: bands of one detector move together
        return _moved(layers, amount, 2 * math.pi * _chance(1, shapes.mix64(key ^ samples.long())[:, None]))
    key = shapes.mix64(shapes.mix64(key ^ samples.long())[:, None] ^ channels)[..., None]  # (B, k, 1)
    if fault.kind == "noisy":
        noise = torch.special.ndtri(_chance(height * width, key)).view(*key.shape[:2], height, width)
        return layers + amount * noise.to(layers)
    columns = _chance(width, key)[:, :, None]  # (B, k, 1, W)
    if fault.kind == "striped":
        return layers + amount * torch.special.ndtri(columns).to(layers)
    return layers.masked_fill(columns < amount, 0)


def _chance(units: int, key: Tensor) -> Tensor:
    """A draw for each unit, between 0 and 1 without the ends, (…, units) float64, of keys (…, 1)."""
    drawn = shapes.uniform(torch.arange(units, dtype=torch.int32, device=key.device), key)
    return (drawn.double() + 2**31 + 0.5) / 2**32


def _moved(layers: Tensor, pixels: float, angle: Tensor) -> Tensor:
    """Bands (B, k, H, W) moved by a distance in a direction (B, 1), by cubic interpolation; edges repeat."""
    height, width = layers.shape[-2:]
    move = torch.zeros(len(layers), 2, 3, dtype=layers.dtype, device=layers.device)
    move[:, 0, 0] = move[:, 1, 1] = 1
    # grid_sample takes from where a pixel comes, in half image widths
    move[:, :, 2] = torch.cat([angle.cos() / width, angle.sin() / height], 1).to(layers) * (-2 * pixels)
    grid = F.affine_grid(move, list(layers.shape), align_corners=False)
    return F.grid_sample(layers, grid, mode="bicubic", padding_mode="border", align_corners=False)
