"""Spectra in a few numbers: means and covariances, all that a regression of any bands from any others needs.

Those that ship with the package lie beside this file, with what they are of. NumPy alone: a pixel model in service
needs no torch.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from bandmask import bands

COUNT = len(bands.NAMES)
ALPHA = 1e-3  # ridge penalty on sums of squared reflectance
NOISE = 1e-3  # SD of a reflectance, so that a kind whose bands hardly vary is not sure of everything
LEVELS = ("L1C", "L2A")
FOLDER = Path(__file__).parent
KINDS = {"land": 0.6, "water": 0.1, "cloud": 0.3}  # of the mixture, and how common each is taken to be
FREEDOM = 4.0  # of the t distribution that says how likely a kind is: a pixel unlike all of them is no one's for sure
# Local means are taken in ever narrower Gaussian windows, of these SD in pixels. How many visible pixels a wider
# window's mean counts as in the narrower one's was chosen on training images of the sample and of EuroSAT: errors of a
# regression are noisier than the band itself, so they are averaged over more.
WIDTHS, ERROR_PRIOR, VALUE_PRIOR = (16.0, 4.0, 1.0), 3.0, 0.3
FEW = 0.05  # of an image: a band with no more missing, by accident, still predicts others where it is there
PLAIN = ("zero", "mean", "nearest")  # what people do without a regression


@dataclass(frozen=True)
class Moments:
    """Mean and covariance of spectra in reflectance: all that ridge regressions of any bands from any others need.

    Source: Hoerl and Kennard 1970 (ridge regression), with an intercept that is not penalised, as scikit-learn has it.
    """

    mean: np.ndarray  # (13,) float64, SatCLIP order; NaN of a band that the source doesn't have, such as B10 of L2A
    covariance: np.ndarray = field(repr=False)  # (13, 13), divided by the number of pixels; NaN likewise
    pixels: int  # how many there were
    level: str = ""  # of processing, `L1C` or `L2A`, where it is known
    source: str = ""  # whose spectra they are, and how they were taken

    @classmethod
    def of(cls, pack: Any, **drawn: Any) -> Moments:
        """Of complete pixels of a pack's training split; of one that has test images alone, what it recorded of others.

        `drawn` is as in `Pack.spectra`: `split`, `pixels`, `seed`.
        """
        if drawn.get("split", "train") == "train" and (known := pack.card.get("moments")):
            return cls(np.array(known["mean"]), np.array(known["covariance"]), known["pixels"])
        return cls.of_spectra(pack.spectra(**drawn))

    @classmethod
    def of_spectra(cls, spectra: np.ndarray, level: str = "", source: str = "") -> Moments:
        """Of reflectance (n, 13); a band that is NaN throughout is one that the source doesn't have.

        Raises:
            ValueError: another shape, fewer than two pixels, or values that are not finite.
        """
        spectra = np.asarray(spectra, np.float64)
        if spectra.ndim != 2 or spectra.shape[1] != COUNT or len(spectra) < 2:
            raise ValueError(f"moments need spectra of {COUNT} bands, two or more; got {spectra.shape}")
        if not np.isfinite(spectra[:, ~np.isnan(spectra).all(0)]).all() or np.isnan(spectra).all():
            raise ValueError("spectra hold NaN or infinite values; leave pixels without data out")
        mean = spectra.mean(0)
        return cls(mean, (spectra - mean).T @ (spectra - mean) / len(spectra), len(spectra), level, source)

    @classmethod
    def shipped(cls, level: str) -> Moments:
        """Of real Sentinel-2 images that come with the package; a ValueError of a level but `L1C` and `L2A`."""
        return shipped(level)["all"]

    @property
    def known(self) -> np.ndarray:
        """(13,) bool: bands that the source has."""
        return np.isfinite(self.mean)

    def regression(self, hidden: Sequence[int], visible: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Ridge coefficients (k, v) and intercepts (k,) of hidden channels from visible ones; of none: the means."""
        hidden, visible = list(hidden), list(visible)
        penalised = self.covariance[np.ix_(visible, visible)] + ALPHA / self.pixels * np.eye(len(visible))
        weight = np.linalg.solve(penalised, self.covariance[np.ix_(visible, hidden)]).T
        return weight, self.mean[hidden] - weight @ self.mean[visible]

    def regressions(self, visible: np.ndarray, noise: np.ndarray | float = 0.0) -> tuple[np.ndarray, np.ndarray]:
        """`regression` of all 13 bands for many patterns of visible bands at once, (P, 13) bool.

        `noise` is the variance of the errors that the visible bands are known with, (P, 13) or one for all. Bands that
        the source doesn't have are never visible.

        Returns:
            Coefficients (P, 13, 13), zero where a band is hidden, and intercepts (P, 13). Rows of visible bands
            predict them from themselves, up to the penalty; of bands that the source doesn't have, NaN.
        """
        seen, covariance = np.asarray(visible, float) * self.known, np.nan_to_num(self.covariance)
        # a hidden band becomes a unit of its own, so that one solver takes patterns of all sizes
        matrix = covariance * seen[:, :, None] * seen[:, None, :]
        matrix += np.eye(len(self.mean)) * np.where(seen > 0, ALPHA / self.pixels + noise, 1.0)[:, None, :]
        weight = np.linalg.solve(matrix, covariance * seen[:, :, None]).transpose(0, 2, 1)
        return weight, self.mean - weight @ np.nan_to_num(self.mean)

    def tell(self, spectra: np.ndarray, visible: Sequence[int], hidden: Sequence[int]) -> np.ndarray:
        """Hidden channels (k, N) of spectra (v, N) of visible ones, by `regression`."""
        weight, bias = self.regression(hidden, visible)
        return weight.astype(spectra.dtype) @ spectra + bias.astype(spectra.dtype)[:, None]

    def unexplained(self, visible: np.ndarray) -> np.ndarray:
        """Share of each band's variance that ridge regression from the visible ones (P, 13) leaves, (P, 13), 0 to 1.

        A visible band, or one that the source doesn't have, leaves 0.
        """
        weight, covariance = self.regressions(visible)[0], np.nan_to_num(self.covariance)
        explained = 2 * np.einsum("pij,ij->pi", weight, covariance)
        explained -= np.einsum("pij,jk,pik->pi", weight, covariance, weight)
        left = 1 - explained / np.diag(covariance).clip(1e-300)
        return np.where(visible | ~self.known, 0.0, left.clip(0, 1))


@dataclass(frozen=True)
class Mixture:
    """Several kinds of spectra, each with moments: a pixel is told by the kinds that its visible bands speak for.

    A ridge regression a kind, weighted by how likely the visible bands are in it, under a t distribution.
    Source: Ghahramani and Jordan 1993 (missing data by mixtures); Peel and McLachlan 2000 (mixtures of t).
    """

    kinds: dict[str, Moments]
    weights: tuple[float, ...]  # of the kinds, before anything is seen

    @property
    def known(self) -> np.ndarray:
        """(13,) bool: bands that every kind has."""
        return np.all([kind.known for kind in self.kinds.values()], axis=0)

    def tell(self, spectra: np.ndarray, visible: Sequence[int], hidden: Sequence[int]) -> np.ndarray:
        """Hidden channels (k, N) of spectra (v, N) of visible ones."""
        likely, told = [], []
        for kind, weight in zip(self.kinds.values(), self.weights, strict=True):
            root = np.linalg.cholesky(kind.covariance[np.ix_(visible, visible)] + NOISE**2 * np.eye(len(visible)))
            inverse = np.linalg.inv(root).astype(spectra.dtype)
            away = np.square(inverse @ (spectra - kind.mean[visible, None].astype(spectra.dtype))).sum(0)
            tail = (FREEDOM + len(visible)) / 2 * np.log1p(away / FREEDOM)
            likely.append(np.log(weight) - np.log(np.diag(root)).sum() - tail)
            told.append(kind.tell(spectra, visible, hidden))
        shares = np.exp(np.array(likely, spectra.dtype) - np.max(likely, axis=0))
        shares /= shares.sum(0)
        return np.einsum("mn,mkn->kn", shares, np.array(told))


def shipped(level: str) -> dict[str, Any]:
    """What ships for a level, `L1C` or `L2A`: `all` and, for L1C, kinds of scenes and their `mixture`."""
    if str(level).upper() not in LEVELS:
        raise ValueError(f"no moments of level {level!r} are shipped; available: {', '.join(LEVELS)}")
    found: dict[str, Any] = {}
    for path in sorted(FOLDER.glob(f"{level.lower()}*.json"), key=lambda path: path.stem):
        saved = json.loads(path.read_text(encoding="utf-8"))
        mean = np.array(saved["mean"], float)
        lower = np.array([row + [0] * (COUNT - len(row)) for row in saved["covariance"]], float)
        known = Moments(mean, lower + np.tril(lower, -1).T, saved["pixels"], saved["level"], saved["source"])
        found[path.stem[4:] or "all"] = known
    if "land" in found:
        found["mixture"] = Mixture({kind: found[kind] for kind in KINDS}, tuple(KINDS.values()))
    return found


@dataclass(frozen=True)
class Plain:
    """What people do without a regression: `zero`, the `mean`, the `nearest` band in wavelength at its own level."""

    how: str
    of: Moments

    @property
    def known(self) -> np.ndarray:
        """(13,) bool: bands that their moments know."""
        return self.of.known

    def tell(self, spectra: np.ndarray, visible: Sequence[int], hidden: Sequence[int]) -> np.ndarray:
        """As `Moments.tell`."""
        mean, shape = self.of.mean.astype(np.float32), (len(hidden), spectra.shape[1])
        if self.how != "nearest":
            return np.broadcast_to(mean[hidden, None] if self.how == "mean" else np.float32(0), shape)
        near = [next(c for c in bands.nearest(channel) if c in visible) for channel in hidden]
        return spectra[[list(visible).index(c) for c in near]] + (mean[hidden] - mean[near])[:, None]


Fill: TypeAlias = Moments | Mixture | Plain


def require_reflectance(source: Any, name: str = "these") -> None:
    """A ValueError of what fills nothing, and of moments of DN."""
    if not hasattr(source, "tell"):
        raise ValueError(f"the fill {name!r} is {source!r:.40}; expected moments, as of bm.fit_moments")
    for kind in getattr(source, "kinds", {name: source}).values():
        if (typical := np.nanmedian(getattr(kind, "mean", 0))) > 3:
            found = f"{name} have a mean of {typical:.4g}: divide spectra by 10,000"
            raise ValueError(f"moments are of reflectance; {found}")


def fill_gaps(spectra: np.ndarray, hidden: np.ndarray, source: Fill, wanted: Sequence[int] = range(COUNT)) -> None:
    """Write wanted channels of reflectance (13, B, H, W) where hidden, in place, from what is visible at each pixel.

    Of a band that is visible in part, a regression is corrected by the mean of its errors around, as
    `fills.RidgeLocalFill` does. A pixel of which nothing is visible stays.
    """
    some = hidden.any((1, 2, 3))
    for image in range(spectra.shape[1]) if some.any() else ():
        values, gaps = spectra[:, image], hidden[:, image].copy()
        there = ~gaps.all(0)
        missing = gaps[:, there].mean(1) if there.any() else np.ones(COUNT)
        partly = [c for c in wanted if source.known[c] and missing[c] > 0 and not gaps[c].all()]
        whole = [c for c in range(COUNT) if source.known[c] and missing[c] <= FEW]
        steps: list[list[int]] = [[c for c in partly if c not in whole], *([c] for c in partly if c in whole)]
        for lost in steps if not isinstance(source, Plain) else ():  # zero is zero
            others = [c for c in whole if c not in lost]
            if not lost or not others:
                continue
            told = source.tell(values[others].reshape(len(others), -1), others, lost).reshape(-1, *there.shape)
            was = hidden[:, image]
            fine = there & ~was[others].any(0)
            seen = ~was[lost] & fine
            near = told + _error_around(np.where(seen, values[lost] - told, 0), seen)
            values[lost] = np.where(was[lost] & fine, near, values[lost])
            gaps[lost] &= ~fine
        _fill_pixels(values.reshape(COUNT, -1), gaps.reshape(COUNT, -1), source, wanted)


def _fill_pixels(values: np.ndarray, gaps: np.ndarray, source: Fill, wanted: Sequence[int]) -> None:
    seen = ~gaps & source.known[:, None]
    codes = np.zeros(values.shape[1], np.uint16)  # which bands a pixel shows, a bit each
    for channel, visible in enumerate(seen):
        codes |= visible.astype(np.uint16) << channel
    for code in np.flatnonzero(np.bincount(codes, minlength=2**13)):
        visible = [c for c in range(COUNT) if code >> c & 1]
        lost = [c for c in wanted if source.known[c] and c not in visible]
        if visible and lost:
            pixels = slice(None) if (here := codes == code).all() else np.flatnonzero(here)
            told = source.tell(values[visible][:, pixels], visible, lost)
            for channel, band in zip(lost, told, strict=True):
                values[channel, pixels] = band


def _error_around(error: np.ndarray, seen: np.ndarray) -> np.ndarray:
    from scipy.ndimage import gaussian_filter  # type: ignore[import-untyped]

    seen = seen.astype(np.float32)
    result = (error.sum((1, 2)) / (seen.sum((1, 2)) + ERROR_PRIOR))[:, None, None]
    for width in WIDTHS:
        near = [gaussian_filter(part, (0, width, width), mode="constant", truncate=3.5) for part in (error, seen)]
        result = (near[0] + result * ERROR_PRIOR / (area := 2 * np.pi * width**2)) / (near[1] + ERROR_PRIOR / area)
    return result
