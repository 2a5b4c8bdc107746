"""What can be written over hidden pixels for free, from the same image alone: no fill here knows the task.

Each is a `fill` of `masking.hide`, as the ridge regressions of `imputation` are, and is made for the bands of a mask;
for masks that hide other bands in each image, for all 13. A pixel that is NaN or infinite counts as not seen.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bandmask import bands
from bandmask.imputation import RidgeFill
from bandmask.masking import FITTED, VALUES, Fill, fill_values
from bandmask.moments import ALPHA, Moments
from bandmask.packs import Pack

CIRRUS = bands.NAMES.index("B10")
WIDTHS = (16.0, 4.0, 1.0)  # SD of the Gaussian windows in pixels, wide to narrow
# How many visible pixels a wider window's mean counts as in the narrower one's. Chosen on training images of the
# sample and of EuroSAT; the errors of a regression are noisier than the band, so they are averaged over more.
VALUE_PRIOR, ERROR_PRIOR = 0.3, 3.0
FILL_NOISE = 0.01  # variance of a filled pixel's error, of its band's; chosen likewise among 0 and 1e-4 to 0.1
NEIGHBOURS = 100  # pixels that a visible one speaks for: at ratio 0.99 of single pixels most of an error is corrected


class NearestFill:
    """Copies the nearest band by wavelength that is visible at that very pixel, shifted to the hidden band's level.

    The shift is the difference of the two bands' training means: neighbours see the same ground, but one is brighter
    throughout, and without it copied pixels would stand out by that offset. Cirrus (B10) is copied last, because it
    sees no ground. Where nothing is visible, the band's mean.
    """

    def __init__(self, moments: Moments, hidden_bands: Sequence[str] = bands.NAMES) -> None:
        """For masks of these bands."""
        self.bands = bands.parse_bands(hidden_bands)
        self.means = torch.tensor(moments.mean)  # (13,) float64
        place = {channel: index for index, channel in enumerate(bands.channel_indices(self.bands))}
        self._sources = [(target, _sources(target, place)) for target in place]

    def __call__(self, images: Tensor, hidden: Tensor) -> Tensor:
        """(B, k, H, W) from a batch (B, 13, H, W) with hidden pixels zeroed, and `hidden` (B, k, H, W)."""
        means = self.means.to(images)
        filled = []
        for target, sources in self._sources:
            value = means[target].expand(images[:, 0].shape)
            for source, place in reversed(sources):  # the nearest is written last
                shifted = images[:, source] + (means[target] - means[source])
                seen = shifted.isfinite() if place is None else shifted.isfinite() & ~hidden[:, place]
                value = torch.where(seen, shifted, value)
            filled.append(value)
        return torch.stack(filled, 1)


def _sources(target: int, place: dict[int, int]) -> list[tuple[int, int | None]]:
    """Channels to copy from, nearest first, with their place among the mask's bands; None = never hidden."""
    wavelengths = [band.wavelength_nm for band in bands.BANDS]
    others = [channel for channel in range(len(wavelengths)) if channel != target]
    others.sort(key=lambda channel: (channel == CIRRUS, abs(wavelengths[channel] - wavelengths[target])))
    return [(channel, place.get(channel)) for channel in others]


class LocalFill:
    """The mean of the band's own visible pixels around, in a Gaussian window that widens where few are visible.

    Means of ever narrower windows are taken; each counts the wider one's mean as `VALUE_PRIOR` visible pixels, so a
    window in which none is visible keeps the wider one's. The widest is the image; a band that is wholly hidden gets
    its training mean.
    Source: Knutsson and Westin 1993, doi:10.1109/CVPR.1993.341081 (normalised convolution).
    """

    def __init__(self, moments: Moments, hidden_bands: Sequence[str] = bands.NAMES) -> None:
        """For masks of these bands."""
        self.bands = bands.parse_bands(hidden_bands)
        self.channels = bands.channel_indices(self.bands)
        self.means = torch.tensor(moments.mean)  # (13,) float64

    def __call__(self, images: Tensor, hidden: Tensor) -> Tensor:
        """(B, k, H, W) from a batch (B, 13, H, W) with hidden pixels zeroed, and `hidden` (B, k, H, W)."""
        own = images[:, self.channels].to(torch.promote_types(images.dtype, torch.float32))
        seen = own.isfinite() & ~hidden
        level = _level(own, seen, self.means[self.channels].to(own), prior=0.0)
        return local_mean(own, seen, level, VALUE_PRIOR)


class RidgeLocalFill:
    """Ridge regression, corrected by the local mean of its own errors at the band's visible pixels.

    A band that has lost some pixels is predicted from the bands that lost nothing in that image; where its own pixels
    are visible, the errors of that prediction are known, and nearby hidden pixels share them. Where few are visible the
    correction shrinks to zero. A band that is gone altogether is then predicted from all others, completed as above; if
    the others lost nothing this is the ridge regression exactly. With no band to predict from it is the training means,
    corrected in the same way.
    Source: regression kriging (Hengl et al. 2007, doi:10.1016/j.cageo.2007.05.001), with fixed Gaussian windows in
    place of a fitted variogram.
    """

    def __init__(self, moments: Moments, hidden_bands: Sequence[str] = bands.NAMES, *, alpha: float = ALPHA) -> None:
        """For masks of these bands; `alpha` is the ridge penalty."""
        self.moments, self.alpha = moments, alpha
        self.bands = bands.parse_bands(hidden_bands)
        self.channels = bands.channel_indices(self.bands)
        # decides what is filled in, so it is what `training.fill_checksum` sees
        penalty = np.full(len(bands.NAMES), alpha / moments.pixels)
        self.statistics = torch.tensor(np.vstack([moments.mean, moments.covariance, penalty]))

    def __call__(self, images: Tensor, hidden: Tensor) -> Tensor:
        """(B, k, H, W) from a batch (B, 13, H, W) with hidden pixels zeroed, and `hidden` (B, k, H, W)."""
        exact = images.to(torch.promote_types(images.dtype, torch.float32))
        own = exact[:, self.channels]
        seen = own.isfinite() & ~hidden
        touched, gone = hidden.flatten(2).any(2), ~seen.flatten(2).any(2)
        broken, gone = touched & ~gone, touched & gone
        some = broken.any(0).nonzero().squeeze(1)  # the others are spared the work
        if len(some):
            predicted = self._predicted(exact, touched, some)
            error = own[:, some] - predicted
            known = error.isfinite() & seen[:, some]
            level = _level(error, known, error.new_zeros(len(some)), ERROR_PRIOR)
            corrected = predicted + local_mean(error, known, level, ERROR_PRIOR)
            filled = hidden[:, some] & broken[:, some, None, None]
            own[:, some] = torch.where(filled, corrected, own[:, some])
        lost = gone.any(0).nonzero().squeeze(1)
        if len(lost):
            exact = exact.index_copy(1, torch.tensor(self.channels, device=exact.device), own)
            share = hidden.flatten(2).float().mean(2) * broken
            own[:, lost] = torch.where(
                gone[:, lost, None, None], self._predicted(exact, gone, lost, share), own[:, lost]
            )
        return own

    def _predicted(self, images: Tensor, missing: Tensor, wanted: Tensor, filled: Tensor | None = None) -> Tensor:
        """Wanted ones of the masks' bands from those that aren't missing, (B, w, H, W).

        `filled` says how much of each band was filled before, (B, k): it is trusted less.
        """
        lost = all_bands(missing, self.channels)
        noise = np.zeros(lost.shape)
        if filled is not None:
            noise[:, self.channels] = FILL_NOISE * filled.double().cpu().numpy()
            noise *= np.diag(self.moments.covariance)
        weights, biases = self.moments.regressions(~lost.cpu().numpy(), self.alpha, noise)
        channels = np.array(self.channels)[wanted.cpu().numpy()]
        weight, bias = (torch.tensor(part[:, channels]).to(images) for part in (weights, biases))
        there = images.masked_fill(lost[..., None, None], 0)
        with torch.autocast(images.device.type, enabled=False):  # bfloat16 holds three digits
            return torch.einsum("bkc,bchw->bkhw", weight, there) + bias[..., None, None]

    def unexplained(self, hidden: Tensor) -> Tensor:
        """How much of each image the regressions can't tell, (B,): 0 for a complete one, 1 if nothing is visible.

        Of a band that is gone, the share of its variance over training spectra that the others don't explain; it falls
        fast with what is visible of the band itself, each such pixel speaking for some `NEIGHBOURS` around, and is 0
        where that explains all but a thousandth. Mean over the 13 bands.

        Args:
            hidden: (B, k, H, W) bool, True = hidden.
        """
        visible = (~hidden).flatten(2).float().mean(2).cpu().numpy()
        share = np.where(visible < 1, np.exp(-NEIGHBOURS * visible), 0)  # that its own pixels say nothing of, (B, k)
        gone = all_bands(hidden.flatten(2).all(2), self.channels).cpu().numpy()  # (B, 13)
        itself = np.eye(len(bands.NAMES), dtype=bool)[self.channels]  # (k, 13)
        rows, places = np.nonzero(share > 1e-3)
        result = np.zeros(share.shape)
        if len(rows):
            others = ~(gone[rows] | itself[places])  # what each of these bands is predicted from, (n, 13)
            patterns, which = np.unique(others, axis=0, return_inverse=True)
            left = self.moments.unexplained(patterns, self.alpha)[which.reshape(-1), np.array(self.channels)[places]]
            result[rows, places] = left
        return torch.tensor((share * result).sum(1) / len(bands.NAMES), dtype=torch.float32, device=hidden.device)


def all_bands(of_bands: Tensor, channels: Sequence[int]) -> Tensor:
    """What is said of some bands among all of them: (B, k, ...) bool to (B, 13, ...); False of the others."""
    spread = of_bands.new_zeros(len(of_bands), len(bands.NAMES), *of_bands.shape[2:])
    spread[:, list(channels)] = of_bands
    return spread


def local_mean(values: Tensor, seen: Tensor, level: Tensor, prior: float) -> Tensor:
    """Mean of what is seen around each pixel, by normalised convolution with windows of `WIDTHS`, wide to narrow.

    Args:
        values: (B, k, H, W); read only where `seen`.
        seen: bool, same shape.
        level: what stands where nothing is seen, (B, k, 1, 1).
        prior: seen pixels that a wider window's mean counts as.

    Returns:
        (B, k, H, W).
    """
    values, count, result = values.masked_fill(~seen, 0), seen.to(values), level.expand(values.shape)
    with torch.autocast(values.device.type, enabled=False):
        for width in WIDTHS:
            rows, columns = (_window(length, width).to(values) for length in values.shape[-2:])
            # separable, and as matrices rather than convolutions: no edge to pad, however wide the window
            result = (rows @ values @ columns + prior * result) / (rows @ count @ columns + prior)
    return result


def _window(length: int, width: float) -> Tensor:
    """Gaussian weight of each pixel of a line for each other, 1 at the pixel itself: (length, length)."""
    place = torch.arange(length, dtype=torch.float64) / width
    return torch.exp(-(place[:, None] - place).square() / 2)


def _level(values: Tensor, seen: Tensor, default: Tensor, prior: float) -> Tensor:
    """Mean of each image's seen pixels, (B, k, 1, 1), in which the default (k,) counts as `prior` pixels."""
    count = seen.sum((2, 3))
    mean = (values.masked_fill(~seen, 0).sum((2, 3)) + prior * default) / (count + prior).clamp(min=1)
    return torch.where(count > 0, mean, default)[..., None, None]


_MAKERS: dict[str, Callable[[Moments, Sequence[str]], Any]] = {
    "nearest": NearestFill,
    "local": LocalFill,
    "ridge": RidgeFill.of,
    "ridge_local": RidgeLocalFill,
}


def make_fill(value: str | float, pack: Pack, hidden_bands: Sequence[str], moments: Moments | None = None) -> Fill:
    """What a mask value stands for: reflectance a band (13,), or a function fitted to the training split.

    Args:
        value: as `MaskSpec.value`.
        pack: whose training split it is fitted to.
        hidden_bands: ESA names of the bands that masks hide; with none every value is a constant that is never used.
        moments: of the training split; None takes them from `pack`, about a second.

    Raises:
        ValueError: an unknown value, or `ridge` where no band is always visible.
    """
    names = bands.parse_bands(hidden_bands)
    if isinstance(value, str) and value not in VALUES:
        raise ValueError(f"unknown mask value {value!r}; available: {', '.join(VALUES)}, or a number")
    if value not in FITTED or not names:
        return fill_values("dataset_mean" if value in FITTED else value, torch.tensor(pack.band_means()))
    if value == "ridge" and len(names) == len(bands.NAMES):
        raise ValueError(
            "the mask value 'ridge' reads bands that are never hidden, and here each may be; use 'ridge_local'"
        )
    fill: Fill = _MAKERS[str(value)](moments or Moments.of(pack), names)
    return fill
