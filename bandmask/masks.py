"""Which pixels are hidden, and what is written over them. `True` = hidden.

Whether a pixel is hidden is an integer hash of (seed, epoch, sample, band, pixel) alone, computed on the batch's own
device: the same on any device, at any batch size, after any resume. What is lost together:

- `pixel`: each pixel on its own, as in the thesis.
- `band`: a band of an image, whole or not at all.
- `stripe`: dead detector lines: single columns, because Sentinel-2's detectors sweep along the track.
- `block`: lost packets, squares on a grid that begins elsewhere in every image and band.
- `cloud`: blobs at the same place in all chosen bands; towards the edge ever fewer of their pixels are hidden.

Source: Petcu 2024, §3.1.2 (pixel-wise masks, schedules, mask values), Table A.5.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from bandmask import bands as band_table

SHAPES = ("pixel", "band", "stripe", "block", "cloud")
SCHEDULES = ("constant", "gradual", "staircase")
START_RATIO, STAIRS = 0.2, 4  # where schedules begin, and the levels of `staircase` (thesis, Table A.5)
CONSTANTS = ("dataset_mean", "band_mean")  # one reflectance a band
FITTED = ("nearest", "local", "ridge", "ridge_local")  # functions of the image: `fills.make_fill`
NATIVE = "native"  # NaN, for encoders that were trained to know what is missing
VALUES = (*CONSTANTS, *FITTED, NATIVE)
VALIDATION_EPOCH = -1  # validation and test draw the same pixels every time
BLOCKS_A_SIDE = 8  # a lost packet is a square, an eighth of the image's shorter side
CLOUDS_A_SIDE = 3  # a cloud is about a third of it

# What replaces hidden pixels: one value per band (13,), or a function of the batch and its hidden pixels that
# returns (B, k, H, W). The function is given the batch with hidden pixels zeroed, so it can't leak them.
Fill: TypeAlias = Tensor | Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class MaskSpec:
    """What is hidden from an image: which bands, how much of them, what stands there instead.

    `value` is what is written over them, in reflectance: a number (−1 and 0 in the thesis), `dataset_mean` (one value,
    the mean over all bands and pixels of the training split; the thesis' choice), `band_mean`, or one of `FITTED`,
    which take it from what is visible: the nearest band, the pixels around, a ridge regression.
    """

    bands: tuple[str, ...] = ()  # ESA names of those that lose pixels; empty hides nothing
    ratio: float = 0.9  # expected share of each band's pixels that is hidden, 0 to 1; where a schedule ends
    value: str | float = "dataset_mean"
    schedule: str = "constant"  # `gradual`: rises each epoch from `START_RATIO` to `ratio`; `staircase`: in `STAIRS`
    seed: int = 0  # another seed, another draw
    shape: str = "pixel"  # what is lost together, one of `SHAPES`

    def __post_init__(self) -> None:
        """Check every field, and normalise `bands` to ESA names in SatCLIP order."""
        object.__setattr__(self, "bands", band_table.parse_bands(self.bands))
        ratio = self.ratio
        if hasattr(ratio, "dtype"):  # NumPy's
            object.__setattr__(self, "ratio", ratio := float(ratio))
        if isinstance(ratio, bool) or not isinstance(ratio, int | float) or not 0 <= ratio <= 1:
            raise ValueError(f"ratio is the share of hidden pixels, from 0 to 1; got {ratio!r}")
        for name, known in (("schedule", SCHEDULES), ("shape", SHAPES)):
            if getattr(self, name) not in known:
                raise ValueError(f"unknown mask {name} {getattr(self, name)!r}; available: {', '.join(known)}")
        object.__setattr__(self, "value", _value(self.value))

    @property
    def channels(self) -> list[int]:
        """0-based channels of the hidden bands in SatCLIP order."""
        return band_table.channel_indices(self.bands)

    def hidden(
        self, samples: Tensor, size: tuple[int, int], *, epoch: int = VALIDATION_EPOCH, epochs: int = 1
    ) -> Tensor:
        """Hidden pixels, (B, k, H, W) bool, k = number of `bands`, on the device of `samples`.

        `samples` (B,) are the images' rows in their pack, `epoch` is 0-based, negative for validation and test, and
        schedules need to know of how many `epochs`. The share of hidden pixels is the ratio: of clouds in every image,
        to half a pixel; else in expectation, to 2⁻³³, because each pixel, column, block or band is drawn on its own. A
        higher ratio hides the same and more.
        """
        return _draw(self.shape, self.seed, epoch, samples, self.channels, size, self.ratio_at(epoch, epochs))

    def ratio_at(self, epoch: int, epochs: int) -> float:
        """Ratio in a 0-based epoch of a run of `epochs`; validation (a negative epoch) uses the final ratio."""
        if self.schedule == "constant" or epoch < 0:
            return self.ratio
        levels = epochs if self.schedule == "gradual" else min(STAIRS, epochs)
        level = min(epoch * levels // max(epochs, 1), levels - 1)
        if level == levels - 1:
            return self.ratio  # exactly, whatever the rounding on the way
        return START_RATIO + (self.ratio - START_RATIO) * level / (levels - 1)


@dataclass(frozen=True)
class AnyMask:
    """Whole bands lost by each image: how many, then which; stands where a `MaskSpec` does.

    One encoder that is to see through every loss must meet them all in training. Each number from `fewest` to `most`
    (0 leaves some images complete) is equally likely, then each set of that size.
    """

    fewest: int = 0
    most: int = 11
    seed: int = 0
    bands: tuple[str, ...] = band_table.NAMES  # each of them may be hidden

    def __post_init__(self) -> None:
        """Check the numbers."""
        count = len(band_table.NAMES)
        if not 0 <= (few := self.fewest) <= self.most < count:
            raise ValueError(f"an image keeps one band: 0 ≤ fewest ≤ most < {count}; got {few} and {self.most}")

    @property
    def channels(self) -> list[int]:
        """All channels: what `hidden` speaks of."""
        return list(range(len(band_table.NAMES)))

    def hidden(
        self, samples: Tensor, size: tuple[int, int], *, epoch: int = VALIDATION_EPOCH, epochs: int = 1
    ) -> Tensor:
        """(B, 13, H, W) bool, as of a `MaskSpec`. There is no schedule: `epochs` is not used."""
        key = _keys(self.seed, epoch, samples)
        # further keys of the same images, for draws that have nothing to do with one another
        own = [mix64(key ^ mix64(torch.full((), n, device=key.device))) for n in (1, *range(3, 3 + len(self.bands)))]
        number = self.fewest + _integers(self.most - self.fewest + 1, own[0])
        order = torch.stack(own[1:], dim=1)
        rank = order.argsort(dim=1).argsort(dim=1)  # each band's place in a random order of the bands
        lost = rank < number[:, None]  # (B, 13)
        return lost[..., None, None].expand(*lost.shape, *size).contiguous()


Mask: TypeAlias = MaskSpec | AnyMask


def _value(value: str | float) -> str | float:
    """A mask value as notebooks give it, such as `"-1"`: a known name or a finite number."""
    if isinstance(value, str) and value in VALUES:
        return value
    with suppress(TypeError, ValueError):
        if not isinstance(value, bool) and math.isfinite(number := float(value)):
            return number
    raise ValueError(f"unknown mask value {value!r}; available: {', '.join(VALUES)}, or a number: finite reflectance")


def fill_values(value: str | float, band_means: Tensor) -> Tensor:
    """Reflectance written over hidden pixels, one per band (13,) float32: of a number, also as text, or `CONSTANTS`.

    Of `native` it is NaN. `band_means` (13,) are those of the training split, NaN of bands that it lacks. A ValueError
    of what is no constant.
    """
    if value in FITTED:
        constants = f"one value a band is {', '.join(CONSTANTS)}, or a number"
        raise ValueError(f"{value!r} depends on the image and is made by fills.make_fill; {constants}")
    if value == "band_mean":
        return band_means.float()
    if value == NATIVE:
        return torch.full_like(band_means, torch.nan, dtype=torch.float32)
    constant = band_means.nanmean() if value == "dataset_mean" else _value(value)
    return torch.full_like(band_means, float(constant), dtype=torch.float32)


def check_batch(images: Tensor, hidden: Tensor, names: Sequence[str]) -> None:
    """A ValueError unless images are (B, 13, H, W) float and `hidden` (B, k, H, W) bool, k the number of names.

    A channel would be taken for another, or broadcast, without a word.
    """
    count = len(band_table.NAMES)
    if images.ndim != 4 or images.shape[1] != count or not images.is_floating_point():
        found = f"{tuple(images.shape)} {images.dtype}; put each band at its place, and hide those that are absent"
        order = ", ".join(band_table.NAMES)
        raise ValueError(f"images are reflectance (B, {count}, H, W), float, in the order {order}; got {found}")
    expected = (len(images), len(names), *images.shape[2:])
    if tuple(hidden.shape) != expected or hidden.dtype != torch.bool:
        found = f"hidden pixels are {tuple(hidden.shape)} {hidden.dtype}"
        raise ValueError(f"{found}; for bands {tuple(names)} expected {expected} bool")


def hide(images: Tensor, hidden: Tensor, spec: Mask, fill: Fill) -> Tensor:
    """A copy of the batch with hidden pixels overwritten; the original values of hidden pixels don't reach it.

    Reflectance (B, 13, H, W) gives the same dtype and memory format; `hidden` (B, k, H, W) is what `spec` drew. A
    ValueError where the parts belong to other channels or bands.
    """
    check_batch(images, hidden, spec.bands)
    masked = images.clone()
    if not spec.bands:
        return masked
    if isinstance(fill, Tensor):
        if fill.shape != images.shape[1:2]:
            raise ValueError(f"a fill is one value per band, (13,); got {tuple(fill.shape)}")
        for index, channel in enumerate(spec.channels):  # a list of channels would have to be copied to the device
            masked[:, channel].masked_fill_(hidden[:, index], fill[channel])
        return masked
    for index, channel in enumerate(spec.channels):
        masked[:, channel].masked_fill_(hidden[:, index], 0)
    made_for = getattr(fill, "bands", spec.bands)
    values = fill(masked, hidden).to(images.dtype) if made_for == spec.bands else torch.empty(0)
    if values.shape != hidden.shape:
        raise ValueError(f"the fill is for bands {made_for}, shape {tuple(values.shape)}; the mask hides {spec.bands}")
    for index, channel in enumerate(spec.channels):
        masked[:, channel] = torch.where(hidden[:, index], values[:, index], masked[:, channel])
    return masked


def mask_batch(images: Tensor, samples: Tensor, spec: Mask, fill: Fill, **when: int) -> Tensor:
    """Draw and hide in one call: the incomplete batch, (B, 13, H, W); `when` is `epoch` and `epochs`."""
    size = (images.shape[-2], images.shape[-1])
    return hide(images, spec.hidden(samples.to(images.device), size, **when), spec, fill)


# --- the draws: integers only, so that every device gives the same pixels; no loop over images


def _draw(
    shape: str, seed: int, epoch: int, samples: Tensor, channels: Sequence[int], size: tuple[int, int], ratio: float
) -> Tensor:
    result = (len(samples), len(channels), *size)
    threshold = round(ratio * 2**32) - 2**31
    if abs(threshold) >= 2**31 or 0 in result:  # none or all of the 2³² values: nothing to draw
        return torch.full(result, threshold > 0, dtype=torch.bool, device=samples.device)
    key = _keys(seed, epoch, samples)  # (B,)
    if shape == "cloud":
        return _clouds(key, size, round(ratio * size[0] * size[1]))[:, None].expand(result).contiguous()
    key = torch.stack([mix64(key ^ channel) for channel in channels], 1)[..., None, None]  # (B, k, 1, 1)
    height, width = size
    if shape == "block":
        side = max(min(size) // BLOCKS_A_SIDE, 1)
        place = mix64(key)  # where the grid begins, drawn apart from what it hides
        rows = (_count(height, key)[:, None] + _integers(side, place)) // side
        unit = rows * (width // side + 2) + (_count(width, key) + _integers(side, place >> 16)) // side  # (B, k, H, W)
    elif shape == "pixel":
        unit = _count(height * width, key).view(size)
    else:
        unit = _count(width if shape == "stripe" else 1, key)
    return (uniform(unit, key) < threshold).expand(result).contiguous()  # all pixels of a unit share its draw


def _clouds(key: Tensor, size: tuple[int, int], count: int) -> Tensor:
    """The `count` cloudiest pixels of each image, (B, H, W) bool, from keys (B,).

    Cloudiness is a smooth random field and, for the soft edge, a draw of each pixel on its own: inside a blob every
    pixel is hidden, outside none.
    """
    height, width = size
    if not count:
        return torch.zeros(len(key), height, width, dtype=torch.bool, device=key.device)
    thickness = torch.zeros(len(key), height, width, dtype=torch.int32, device=key.device)
    for octave in range(3):  # large forms, then finer ones at half the height
        key = mix64(key)
        thickness += _smooth_field(key[:, None], size, max(min(size) // CLOUDS_A_SIDE >> octave, 1)) << (2 - octave)
    pixel = _count(height * width, key)
    edge = uniform(pixel, mix64(key)[:, None]) >> 17  # ±2¹⁴, a quarter of the SD of the field
    rank = (thickness.flatten(1) + edge).long() * (height * width) + pixel  # the pixel's number breaks ties
    return (rank <= rank.kthvalue(count, dim=1, keepdim=True).values).view(len(key), height, width)


def _smooth_field(key: Tensor, size: tuple[int, int], spacing: int) -> Tensor:
    """Value noise: draws of ±2¹⁵ on a lattice that begins elsewhere in every image, (B, H, W) int32, of keys (B, 1)."""
    rows, columns = (length // spacing + 3 for length in size)
    field = (uniform(_count(rows * columns, key), key) >> 16).view(-1, rows, columns)
    for length, shift in zip(size, (0, 16), strict=True):  # along rows, then along columns
        place = _count(length, key) * 256 // spacing + _integers(256, mix64(key) >> shift)  # (B, length), 1/256 spacing
        index, part = (place >> 8).long()[..., None].expand(-1, -1, field.shape[2]), (place & 255)[..., None]
        below, above = field.gather(1, index), field.gather(1, index + 1)
        weight = part * part * (768 - 2 * part) >> 16  # smoothstep, 0..256
        field = (below + ((above - below) * weight >> 8)).transpose(1, 2)
    return field


def _count(end: int, key: Tensor) -> Tensor:
    return torch.arange(end, dtype=torch.int32, device=key.device)


def _keys(seed: int, epoch: int, samples: Tensor) -> Tensor:
    """A well-mixed key for each image, (B,) int64, on the device of `samples`: what all draws come from."""
    key = mix64(torch.full((), _signed64(seed), device=samples.device))
    return mix64(mix64(key ^ _signed64(epoch)) ^ samples.long())


def _integers(limit: int, key: Tensor) -> Tensor:
    """An integer from 0 to `limit` − 1 of each key, int32, uniform to `limit` / 2¹⁶."""
    return (((key & 0xFFFF) * limit) >> 16).to(torch.int32)


def uniform(unit: Tensor, key: Tensor) -> Tensor:
    """A draw for each unit, uniform over int32: units (n,) or (…, n) and keys (…, 1) give (…, n).

    A 32-bit mixer with low bias (C. Wellons' `lowbias32`, public domain), in wrapping int32. The key's upper half
    enters halfway, so that two images whose keys are neighbours don't share shifted copies of one mask.
    """
    x = unit ^ key.to(torch.int32)
    x = x ^ ((x >> 16) & 0xFFFF)
    x.mul_(0x7FEB352D).bitwise_xor_((x >> 15).bitwise_and_(0x1FFFF)).bitwise_xor_((key >> 32).to(torch.int32))
    x.mul_(-0x7B935975).bitwise_xor_((x >> 16).bitwise_and_(0xFFFF))  # −0x7B935975 = 0x846CA68B as int32
    return x


def _signed64(value: int) -> int:
    """Python integer to two's complement, which is what torch's int64 wraps to."""
    return (value + 2**63) % 2**64 - 2**63


def mix64(x: Tensor) -> Tensor:
    """SplitMix64's finaliser (Steele et al. 2014, doi:10.1145/2714064.2660195) in wrapping int64."""
    x = x + _signed64(0x9E3779B97F4A7C15)
    x = (x ^ ((x >> 30) & (2**34 - 1))) * _signed64(0xBF58476D1CE4E5B9)
    x = (x ^ ((x >> 27) & (2**37 - 1))) * _signed64(0x94D049BB133111EB)
    return x ^ ((x >> 31) & (2**33 - 1))
