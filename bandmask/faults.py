"""Faults of bands, put into healthy images: what a detector is measured on.

An image of a broken sensor is rare and its truth unknown; an injected fault is known exactly, and its size stands in
physical units. It is one of the sensor: noise, stripes and packets are drawn a pixel of the band's own grid. Every draw
is an integer hash of (sample, band, pixel), so a fault does not depend on the batch it came in. Values are not clipped:
noise on a dark band may go below zero, as DN may since processing baseline 04.00.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from bandmask import bands as band_table
from bandmask import masks

# What each fault is, and what its amount means.
KINDS: dict[str, str] = {
    "dead": "every pixel at a level near 0; amount: the level in reflectance",
    "stuck": "every pixel at one level; amount: the level in reflectance",
    "noisy": "Gaussian noise on every pixel; amount: its SD in reflectance",
    "striped": "an offset a column; amount: SD of the offsets in reflectance",
    "dead columns": "columns at 0; amount: the share of columns that is dead, 0 to 1",
    "gain": "every pixel times a factor; amount: the factor",
    "offset": "every pixel plus a constant; amount: the constant in reflectance",
    "shift": "misregistration: the band moved in a direction drawn for each image; amount: how far, in pixels",
    "detector": "a constant where another of the twelve detectors begins; amount: the constant in reflectance",
    "lost packets": "blocks of lines of one detector at low DN; amount: the share of its lines, 0 to 1",
    "swapped": "two bands exchanged; it has no amount",
}
# So that no two kinds share their draws.
_STREAMS = {"noisy": 1, "striped": 2, "dead columns": 3, "shift": 4, "detector": 5, "lost packets": 6}
_HIGHEST = dict.fromkeys(("noisy", "striped", "shift"), math.inf) | {"dead columns": 1, "lost packets": 1}  # from 0 on


@dataclass(frozen=True)
class Fault:
    """A `kind` of `KINDS` in these `bands` (ESA names; two for `swapped`), of an `amount` in the unit that says.

    ValueError: an unknown kind or band, an amount that is none of its.
    """

    kind: str
    bands: tuple[str, ...]
    amount: float | None = None

    def __post_init__(self) -> None:
        """Check every field, and bring `bands` to ESA names in SatCLIP order."""
        if self.kind not in KINDS:
            raise ValueError(f"unknown fault {self.kind!r}; available: {', '.join(KINDS)}")
        object.__setattr__(self, "bands", band_table.parse_bands(self.bands))
        if self.kind == "swapped":
            fits = len(self.bands) == 2 and self.amount is None
        else:
            amount = math.nan if self.amount is None else float(self.amount)
            in_range = self.kind not in _HIGHEST or 0 <= amount <= _HIGHEST[self.kind]
            fits = bool(self.bands) and math.isfinite(amount) and in_range
        if not fits:
            raise ValueError(f"no fault: {self.kind}, {KINDS[self.kind]}; got {self.bands}, amount {self.amount!r}")

    @property
    def channels(self) -> list[int]:
        """0-based channels of the faulty bands in SatCLIP order."""
        return band_table.channel_indices(self.bands)

    @property
    def label(self) -> str:
        """For people: `noisy 0.01, B08`."""
        return f"{self.kind}{'' if self.amount is None else f' {self.amount:g}'}, {' '.join(self.bands)}"


def inject(images: Tensor, samples: Tensor, fault: Fault) -> Tensor:
    """A copy of reflectance (B, 13, H, W) in which the fault's bands are faulty and all others are untouched.

    `samples` (B,) says which image of its pack each is. ValueError: another shape, or not one sample an image.
    """
    if images.ndim != 4 or images.shape[1] != len(band_table.NAMES) or samples.shape != images.shape[:1]:
        found = f"{tuple(images.shape)} and samples {tuple(samples.shape)}"
        raise ValueError(f"images are (B, 13, H, W) with a sample each; got {found}")
    faulty, amount = images.clone(), float(fault.amount or 0.0)
    key = masks.mix64(torch.tensor(_STREAMS.get(fault.kind, 0), device=images.device))
    key = masks.mix64(key ^ samples.to(images.device).long())[:, None]  # (B, 1)
    for channel, other in zip(fault.channels, reversed(fault.channels), strict=True):
        layer = images[:, channel]  # (B, H, W)
        if fault.kind == "swapped":
            changed = images[:, other]
        elif fault.kind in ("dead", "stuck"):
            changed = torch.full_like(layer, amount)
        elif fault.kind == "gain":
            changed = layer * amount
        elif fault.kind == "offset":
            changed = layer + amount
        elif fault.kind == "shift":  # one direction an image: bands of one detector move together
            changed = _moved(layer[:, None], amount, 2 * math.pi * _chance(1, key))[:, 0]
        else:
            step = band_table.BANDS[channel].gsd_m // 10
            changed = _drawn(fault.kind, layer, amount, masks.mix64(key ^ channel), step)
        faulty[:, channel] = changed
    return faulty


def _drawn(kind: str, layer: Tensor, amount: float, key: Tensor, step: int) -> Tensor:
    """A band (B, H, W) with a fault that is drawn for each of its own pixels, `step` pixels of 10 m a side."""
    height, width = (-(-length // step) for length in layer.shape[1:])

    def spread(values: Tensor) -> Tensor:  # own pixels to those of 10 m; one row stands for all
        values = values.repeat_interleave(step, 2)[..., : layer.shape[2]]
        return values if values.shape[1] == 1 else values.repeat_interleave(step, 1)[:, : layer.shape[1]]

    if kind == "noisy":
        normal = torch.special.ndtri(_chance(height * width, key)).view(-1, height, width)
        return layer + amount * spread(normal).to(layer)
    columns = _chance(width, key)[:, None]  # (B, 1, W)
    if kind == "striped":
        return layer + amount * spread(torch.special.ndtri(columns)).to(layer)
    if kind == "dead columns":
        return layer.masked_fill(spread(columns < amount), 0)
    edge = (0.25 + 0.5 * _chance(1, key)) * width  # where the next detector begins
    detector = spread((torch.arange(width, device=layer.device) >= edge)[:, None])  # (B, 1, W)
    if kind == "detector":
        return layer + amount * detector.to(layer)
    lines = (_chance(-(-height // 4), masks.mix64(key)) < amount).repeat_interleave(4 * step, 1)[:, : layer.shape[1]]
    return layer.masked_fill(detector & lines[..., None], 0.01)  # ESA's packets hold 4 lines or so of low DN


def _chance(units: int, key: Tensor) -> Tensor:
    """A draw for each unit, between 0 and 1 without the ends, (…, units) float64, of keys (…, 1)."""
    drawn = masks.uniform(torch.arange(units, dtype=torch.int32, device=key.device), key)
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
