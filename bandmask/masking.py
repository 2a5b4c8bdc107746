"""Which pixels are hidden, and what is written over them.

`True` = hidden. Whether a pixel is hidden is a function of (seed, epoch, sample, band, pixel) alone, computed by an
integer hash on the batch's own device: the same on any device, at any batch size, after any resume.
Source: Petcu 2024, §3.1.2 (pixel-wise masks, schedules, mask values), Table A.5.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from bandmask import bands as band_table
from bandmask import shapes

SCHEDULES = ("constant", "gradual", "staircase")
CONSTANTS = ("dataset_mean", "band_mean")  # one reflectance a band
FITTED = ("nearest", "local", "ridge", "ridge_local")  # functions of the image: `fills.make_fill`
VALUES = CONSTANTS + FITTED
VALIDATION_EPOCH = -1  # validation and test draw the same pixels every time

# What replaces hidden pixels: one value per band (13,), or a function of the batch and its hidden pixels that
# returns (B, k, H, W). The function is given the batch with hidden pixels zeroed, so it can't leak them.
Fill = Tensor | Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class MaskSpec:
    """What is hidden from an image: which bands, how much of them, what stands there instead.

    Attributes:
        bands: ESA names of the bands that lose pixels; empty hides nothing.
        ratio: expected share of each band's pixels that is hidden, 0 to 1, whatever the shape; where a schedule ends.
        value: what is written over them, in reflectance: a number (−1 and 0 in the thesis), `dataset_mean` (one
            value, the mean over all bands and pixels of the training split; the thesis' choice), `band_mean`, or one
            of `FITTED`, which take it from what is visible: the nearest band, the pixels around, a ridge regression.
        schedule: `constant`; `gradual`: the ratio rises each epoch from `start_ratio` to `ratio`; `staircase`: it
            rises in `stairs` steps.
        start_ratio: where `gradual` and `staircase` begin (thesis: 0.2).
        stairs: number of levels of `staircase`.
        seed: another seed, another draw.
        shape: what is lost together: `pixel` (the thesis), `band`, `stripe`, `block` or `cloud`; see `shapes`.
        allow_all_bands: hiding every band leaves an encoder nothing, so it must be asked for.
    """

    bands: tuple[str, ...] = ()
    ratio: float = 0.9
    value: str | float = "dataset_mean"
    schedule: str = "constant"
    start_ratio: float = 0.2
    stairs: int = 4
    seed: int = 0
    shape: str = "pixel"
    allow_all_bands: bool = field(default=False, compare=False)

    def __post_init__(self) -> None:
        """Check every field, and normalise `bands` to ESA names in SatCLIP order."""
        object.__setattr__(self, "bands", band_table.parse_bands(self.bands))
        for name in ("ratio", "start_ratio"):
            ratio = getattr(self, name)
            if isinstance(ratio, bool) or not isinstance(ratio, int | float) or not 0 <= ratio <= 1:
                raise ValueError(f"{name} is the share of hidden pixels, from 0 to 1; got {ratio!r}")
        if self.schedule not in SCHEDULES:
            raise ValueError(f"unknown schedule {self.schedule!r}; available: {', '.join(SCHEDULES)}")
        if self.shape not in shapes.SHAPES:
            raise ValueError(f"unknown mask shape {self.shape!r}; available: {', '.join(shapes.SHAPES)}")
        if isinstance(self.value, str):
            if self.value not in VALUES:
                raise ValueError(f"unknown mask value {self.value!r}; available: {', '.join(VALUES)}, or a number")
        elif isinstance(self.value, bool) or not isinstance(self.value, int | float) or not math.isfinite(self.value):
            raise ValueError(
                f"the mask value is a finite reflectance or one of {', '.join(VALUES)}; got {self.value!r}"
            )
        if self.stairs < 1:
            raise ValueError(f"stairs counts the levels of a staircase, 1 or more; got {self.stairs}")
        if len(self.bands) == len(band_table.NAMES) and not self.allow_all_bands:
            raise ValueError("this mask hides all 13 bands; leave one visible, or set allow_all_bands=True")

    @property
    def channels(self) -> list[int]:
        """0-based channels of the hidden bands in SatCLIP order."""
        return band_table.channel_indices(self.bands)

    def hidden(
        self, samples: Tensor, size: tuple[int, int], *, epoch: int = VALIDATION_EPOCH, epochs: int = 1
    ) -> Tensor:
        """See `hidden_pixels`."""
        ratio = self.ratio_at(epoch, epochs)
        return shapes.draw(self.shape, self.seed, epoch, samples, self.channels, size, ratio)

    def ratio_at(self, epoch: int, epochs: int) -> float:
        """Ratio in a 0-based epoch of a run of `epochs`; validation (a negative epoch) uses the final ratio."""
        if self.schedule == "constant" or epoch < 0:
            return self.ratio
        levels = epochs if self.schedule == "gradual" else min(self.stairs, epochs)
        level = min(epoch * levels // max(epochs, 1), levels - 1)
        if level == levels - 1:
            return self.ratio  # exactly, whatever the rounding on the way
        return self.start_ratio + (self.ratio - self.start_ratio) * level / (levels - 1)


class Mask(Protocol):
    """What hides pixels: a `MaskSpec`, or `draws.AnyMask`, which draws other bands for each image."""

    @property
    def bands(self) -> tuple[str, ...]:
        """ESA names of the bands that it may hide pixels of, in SatCLIP order."""

    @property
    def channels(self) -> list[int]:
        """Their channels."""

    def hidden(self, samples: Tensor, size: tuple[int, int], *, epoch: int, epochs: int) -> Tensor:
        """(B, k, H, W) bool; see `hidden_pixels`."""


def hidden_pixels(
    spec: Mask, samples: Tensor, size: tuple[int, int], *, epoch: int = VALIDATION_EPOCH, epochs: int = 1
) -> Tensor:
    """Boolean mask of the chosen bands, True = hidden, on the device of `samples`.

    The share of hidden pixels is `ratio` in expectation, to 2⁻³², where each pixel, column, block or band is drawn on
    its own; of clouds it is `ratio` in every image, to half a pixel.

    Args:
        spec: what to hide.
        samples: integer identity of each image in its pack, (B,).
        size: height and width of the images.
        epoch: 0-based; negative for validation and test.
        epochs: length of the run, which schedules need.

    Returns:
        (B, k, H, W), k = number of bands in `spec`, in SatCLIP order.
    """
    return spec.hidden(samples, size, epoch=epoch, epochs=epochs)


def parse_value(text: str | float) -> str | float:
    """A mask value as notebooks give it, such as `"-1"`, as `MaskSpec` takes it.

    Raises:
        ValueError: neither a known name nor a number.
    """
    if text in VALUES:
        return text
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"unknown mask value {text!r}; available: {', '.join(VALUES)}, or a number") from None


def fill_values(value: str | float, band_means: Tensor) -> Tensor:
    """Reflectance written over hidden pixels, one per band, for mask values that are constants.

    Args:
        value: a number or one of `CONSTANTS`.
        band_means: mean reflectance per band of the training split, (13,).

    Returns:
        (13,) float32 on the device of `band_means`.

    Raises:
        ValueError: a value that is no constant; `fills.make_fill` makes those.
    """
    if value in FITTED:
        raise ValueError(
            f"the mask value {value!r} depends on the image and is made by fills.make_fill; what takes one value a "
            f"band takes {', '.join(CONSTANTS)}, or a number"
        )
    if value == "band_mean":
        return band_means.float()
    constant = float(band_means.mean()) if value == "dataset_mean" else float(value)
    return torch.full_like(band_means, constant, dtype=torch.float32)


def hide(images: Tensor, hidden: Tensor, spec: Mask, fill: Fill) -> Tensor:
    """A copy of the batch with hidden pixels overwritten; the original values of hidden pixels don't reach it.

    Args:
        images: reflectance, (B, 13, H, W), any memory format.
        hidden: from `hidden_pixels`, (B, k, H, W).
        spec: the bands that `hidden` speaks of.
        fill: one value per band (13,), or a function of (batch with hidden pixels zeroed, hidden).

    Returns:
        (B, 13, H, W), same dtype and memory format; NaN in a hidden pixel is gone too.

    Raises:
        ValueError: `hidden` or `fill` belongs to other bands; broadcasting would spread one band over several.
    """
    expected = (len(images), len(spec.bands), *images.shape[2:])
    if tuple(hidden.shape) != expected:
        raise ValueError(f"hidden pixels have shape {tuple(hidden.shape)}; for bands {spec.bands} expected {expected}")
    masked = images.clone()
    if not spec.bands:
        return masked
    if callable(fill):
        chosen = torch.stack([images[:, channel] for channel in spec.channels], 1).masked_fill(hidden, 0)
        _write(masked, spec, chosen)
        values = fill(masked, hidden).to(images.dtype)
        made_for = getattr(fill, "bands", spec.bands)
        if values.shape != chosen.shape or made_for != spec.bands:
            raise ValueError(
                f"the fill is for bands {made_for}, shape {tuple(values.shape)}; the mask hides {spec.bands}"
            )
        _write(masked, spec, torch.where(hidden, values, chosen))
    else:
        for index, channel in enumerate(spec.channels):  # one pass a band, no gather of the other twelve
            masked[:, channel].masked_fill_(hidden[:, index], fill[channel])
    return masked


def _write(images: Tensor, spec: Mask, values: Tensor) -> None:
    """Values (B, k, H, W) over the bands of a mask; by slices, since an index would have to be copied to the device."""
    for index, channel in enumerate(spec.channels):
        images[:, channel] = values[:, index]


def mask_batch(
    images: Tensor,
    samples: Tensor,
    spec: Mask,
    fill: Fill,
    *,
    epoch: int = VALIDATION_EPOCH,
    epochs: int = 1,
) -> Tensor:
    """Draw and hide in one call: the incomplete batch, (B, 13, H, W)."""
    size = (images.shape[-2], images.shape[-1])
    hidden = hidden_pixels(spec, samples.to(images.device), size, epoch=epoch, epochs=epochs)
    return hide(images, hidden, spec, fill)
