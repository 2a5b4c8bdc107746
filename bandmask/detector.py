"""Which bands of an image to distrust, and how sure that is.

Every band is compared, at its own resolution, with its ridge prediction from the others: coarse bands are first made
anew from their own pixels (`identity.regrid`), so how they came to 10 m plays no part. A faulty band spoils the
predictions of its neighbours, so bands are taken out one at a time: that whose removal leaves the others most normal.
What is normal, and the threshold, come from healthy images, each judged as if it had not been fitted on. Of a scene
unlike all of those only what lies far outside of normal is named.
Source: conformal prediction by leave-one-out residuals (Vovk et al. 2005; Barber et al. 2021, doi:10.1214/20-AOS1965).
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import xarray as xr
from numpy.lib.stride_tricks import sliding_window_view

from bandmask import bands, moments
from bandmask.bands import DN_PER_REFLECTANCE
from bandmask.identity import regrid
from bandmask.images import Source, level_of
from bandmask.moments import Moments
from bandmask.packs import Pack
from bandmask.scene import note_of_pixels

SHIPPED = moments.FOLDER / "healthy-l1c.npz"  # README.md beside it says of what
RATE = 0.05  # of healthy images in which any band is called faulty
LEAST_PIXELS = 64  # of an image, that all of its bands have
MOST_FAULTY = 6  # bands of an image: with fewer than seven left there is little to compare with
MOST_NAMED = 2  # bands at once: more are no fault of a band, but another place or season
# Of residuals (a band less its prediction): mean, log SD, that of noise, that of column offsets. Of the band itself:
# log SD, that of noise, correlation with its prediction. Of a shift: correlation of residuals with the gradients.
SYMPTOMS = ("level", "scatter", "grain", "columns", "own scatter", "own grain", "likeness", "across", "down")
# How much of a deviation counts: at other places levels lie up to 1.4 times, and bands are registered up to twice as
# far from normal as the rarest of EuroSAT. Chosen on three tiles and one place, see docs/findings/detection.md.
PLACE = np.array([0.7, 1, 1, 1, 1, 1, 1, 0.45, 0.45])
CLIP = 3.0  # SD of a feature, beyond which nothing is extrapolated where a scene is unlike all known
WORDS = ("dead", "stuck", "striped", "noisy", "offset or gain", "shifted or blurred", "unlike the other bands")
FEW_GROUPS = 30  # of images, below which healthy images of elsewhere are called faulty too often
FOLDS = 5
_BANDS = len(bands.NAMES)


class Sketch(NamedTuple):
    """What a detector keeps of N images, float64: enough to judge any linear combination of bands without pixels."""

    mean: np.ndarray  # (N, 13), in reflectance
    spread: np.ndarray  # covariance of the 13 bands, their gradients across, and those down, (N, 39, 39)
    grain: np.ndarray  # second moments of Immerkær's noise filter, blind to rows and columns: SD σ is σ², (N, 13, 13)
    columns: np.ndarray  # those of second differences of column means: column offsets of SD s give s², (N, 13, 13)
    absent: np.ndarray  # bands without a value, (N, 13) bool; their entries elsewhere are 0

    @classmethod
    def of(cls, images: Any) -> Sketch:
        """Of reflectance (N, 13, H, W), coarse bands on their own grids; NaN is a pixel without a value.

        A pixel counts where every band of its image that has values in at least half of the image has one; a band with
        fewer is absent from that image.

        Raises:
            ValueError: another shape, images narrower than 8 pixels, or one with too few complete pixels.
        """
        images = np.asarray(images)
        if images.ndim != 4 or images.shape[1] != _BANDS or min(images.shape[2:]) < 8:
            raise ValueError(f"a detector takes images (N, {_BANDS}, H, W) of 8 pixels or more; got {images.shape}")
        # 8 images at a time are 10 MB in float64 with gradients, which caches hold; 64 took 2.7 times as long
        parts = (images[start : start + 8].astype(np.float64) for start in range(0, len(images), 8))
        return cls.join(_sketch(regrid(part)) for part in parts)

    @classmethod
    def join(cls, parts: Iterable[Sketch]) -> Sketch:
        """Of several, in order."""
        return cls(*map(np.concatenate, zip(*parts, strict=True)))

    def take(self, rows: Any) -> Sketch:
        """Those of some images."""
        return Sketch(*(part[rows] for part in self))

    def reordered(self, order: np.ndarray) -> Sketch:
        """With its bands in another order."""
        mean, spread, grain, columns, absent = self
        wide = np.concatenate([order, order + _BANDS, order + 2 * _BANDS])
        forms = [part[:, by][:, :, by] for part, by in ((spread, wide), (grain, order), (columns, order))]
        return Sketch(mean[:, order], forms[0], forms[1], forms[2], absent[:, order])


def _sketch(images: np.ndarray) -> Sketch:
    finite = np.isfinite(images)
    absent = finite.mean((2, 3)) < 0.5  # (N, 13)
    seen = (finite | absent[..., None, None]).all(1)  # (N, H, W)
    # a far-away level would cost digits in the products below; what is hidden counts nowhere, so any value will do
    images = np.where(finite & ~absent[..., None, None], images, 0.0)
    inner = _inside(seen)
    counts = inner.sum((1, 2))
    if (counts < LEAST_PIXELS).any():
        found = f"image {counts.argmin()} has {counts.min()} pixels"
        raise ValueError(f"{found} with a value in every band and around it, a detector needs {LEAST_PIXELS}")
    weight = inner / counts[:, None, None]
    wide, high = images[..., 1:-1, 2:] - images[..., 1:-1, :-2], images[..., 2:, 1:-1] - images[..., :-2, 1:-1]
    layers = np.concatenate([images[..., 1:-1, 1:-1], wide / 2, high / 2], 1)  # (N, 39, H − 2, W − 2)
    mean = np.einsum("nchw,nhw->nc", layers, weight)
    spread = _products(layers - mean[..., None, None], weight)
    grain = _products(np.diff(np.diff(images, 2, axis=-1), 2, axis=-2) / 6, weight)
    rows = seen.sum(1)  # (N, W)
    of_columns = (images * seen[:, None]).sum(2) / np.maximum(rows, 1)[:, None]  # (N, 13, W)
    usable = sliding_window_view(rows >= max(seen.shape[1] // 4, 1), 3, axis=1).all(-1)
    share = usable / np.maximum(usable.sum(1, keepdims=True), 1)
    columns = _products((np.diff(of_columns, 2) / 6**0.5)[..., None, :], share[:, None])
    return Sketch(mean[:, :_BANDS], spread, grain, columns, absent)


def _inside(seen: np.ndarray) -> np.ndarray:
    """Pixels seen with all their neighbours, (N, H − 2, W − 2)."""
    return np.asarray(sliding_window_view(seen, (3, 3), (1, 2)).all((-2, -1)))


def _products(layers: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Weighted products of all pairs of layers: (N, C, H, W) and (N, H, W) give (N, C, C)."""
    flat = layers.reshape(*layers.shape[:2], -1)
    return (flat * weight.reshape(len(flat), 1, -1)) @ flat.transpose(0, 2, 1)


def symptoms(sketch: Sketch, known: Moments, distrusted: Sequence[int] = ()) -> tuple[np.ndarray, np.ndarray]:
    """Symptoms (N, 13, 9) of all bands, and what of the trusted bands explains them: features (N, 13, 42).

    No band is predicted from distrusted ones; its own features and theirs are 0. What is normal depends on the scene: a
    town leaves a rougher residual than a lake.
    """
    own = np.eye(_BANDS)
    trusted = 1 - own
    trusted[:, list(distrusted)] = 0
    weights, biases = known.regressions(trusted)
    places = np.arange(_BANDS)
    predict, bias = weights[places, places], biases[places, places]  # (13, 13): a row predicts its band
    rest = own - predict
    covariance, across, down = np.split(sketch.spread[:, :_BANDS], 3, axis=2)
    steep = [sketch.spread[:, part, part] for part in (slice(_BANDS, 2 * _BANDS), slice(2 * _BANDS, None))]
    scatter, own_scatter, expected_scatter = (_form(covariance, row) for row in (rest, own, predict))
    grain, own_grain, expected_grain = (_form(sketch.grain, row) for row in (rest, own, predict))
    columns, expected_columns = (_form(sketch.columns, row) for row in (rest, predict))
    found = [
        sketch.mean - (sketch.mean @ predict.T + bias),
        *(np.log(_sd(part)) for part in (scatter, grain, columns, own_scatter, own_grain)),
        _form(covariance, own, predict) / (_sd(own_scatter) * _sd(expected_scatter)),
        _form(across, rest, predict) / (_sd(scatter) * _sd(_form(steep[0], predict))),
        _form(down, rest, predict) / (_sd(scatter) * _sd(_form(steep[1], predict))),
    ]
    of_trusted = _looks(sketch)[:, None] * np.tile(trusted, 3)  # (N, 13, 39)
    of_prediction = np.stack([np.log(_sd(part)) for part in (expected_scatter, expected_grain, expected_columns)], -1)
    return np.stack(found, -1), np.concatenate([of_trusted, of_prediction], -1)


def _looks(sketch: Sketch) -> np.ndarray:
    """Mean, log SD and log grain of every band, (N, 39)."""
    spreads = (np.diagonal(part, axis1=1, axis2=2) for part in (sketch.spread[:, :_BANDS, :_BANDS], sketch.grain))
    return np.concatenate([sketch.mean, *(np.log(_sd(part)) for part in spreads)], 1)


def _form(matrix: np.ndarray, left: np.ndarray, right: np.ndarray | None = None) -> np.ndarray:
    """`left[c] · matrix[n] · right[c]` for every image and band, (N, 13)."""
    return np.einsum("ncb,cb->nc", left @ matrix, left if right is None else right)


def _sd(variance: np.ndarray) -> np.ndarray:
    """At least a tenth of a DN, so that a constant band has a logarithm."""
    return np.sqrt(np.maximum(variance, 0) + 1e-5**2)


class Normal:
    """What is normal in healthy images when some channels are distrusted."""

    def __init__(self, sketch: Sketch, known: Moments, distrusted: Sequence[int] = ()) -> None:
        """Symptoms are predicted from features; what is left of an image is taken as if it had not been fitted on."""
        self.distrusted, self.known = list(distrusted), known
        found, features = symptoms(sketch, known, distrusted)
        self.centre, scale = features.mean(0), features.std(0)
        self.scale = np.where(scale > 1e-9, scale, 1.0)  # (13, 42)
        shown = ((features - self.centre) / self.scale).transpose(1, 0, 2)  # (13, N, 42)
        mean = found.mean(0)
        inverse = np.linalg.inv(shown.transpose(0, 2, 1) @ shown + 10.0 * np.eye(shown.shape[2]))  # penalty: 10 images
        self.slope = inverse @ shown.transpose(0, 2, 1) @ (found - mean).transpose(1, 0, 2)  # (13, 42, 9)
        leverage = ((shown @ inverse) * shown).sum(-1) + 1 / len(sketch.mean)
        left = (found - mean).transpose(1, 0, 2) - shown @ self.slope
        left /= (1 - leverage)[..., None]  # leave-one-out residuals of a ridge regression (Golub et al. 1979)
        # a deviation of 1: one healthy image in 200 lies beyond it, on either side; symptoms differ most in their tails
        middle, (low, high) = np.median(left, 1), np.quantile(left, (0.005, 0.995), axis=1)
        self.below, self.above = np.maximum(middle - low, 1e-12), np.maximum(high - middle, 1e-12)  # (13, 9)
        self.middle = middle + mean

    def deviations(self, sketch: Sketch, far: bool = False) -> np.ndarray:
        """How far symptoms are from what is normal for such a scene, in units of a rare healthy one, (N, 13, 9).

        Of images unlike all that were fitted on, `far`, features are clipped: nothing is extrapolated.
        """
        found, features = symptoms(sketch, self.known, self.distrusted)
        shown = (features - self.centre) / self.scale
        shown = shown.clip(-CLIP, CLIP) if far else shown
        away = found - np.einsum("ncf,cfs->ncs", shown, self.slope, optimize=True) - self.middle
        return away / np.where(away < 0, self.below, self.above)

    def scores(self, sketch: Sketch, far: bool = False, beside: bool = False) -> np.ndarray:
        """The largest deviation of each band, (N, 13); −∞ of distrusted channels.

        The largest, and no distance: a fault shows in one or two symptoms, and each has its own long tail. A level says
        nothing of images unlike all known. `beside`: less what is usual in the others of these images.
        """
        away = self.deviations(sketch, far)
        if beside:
            away -= np.stack([np.median(np.delete(away, row, 0), 0) for row in range(len(away))])
        scores = (np.abs(away) * np.where(far & (PLACE[0] == PLACE), 0, PLACE)).max(-1)
        scores[:, self.distrusted] = -np.inf
        return scores


def looks_like(deviations: np.ndarray, own: np.ndarray, mean: float) -> str:
    """One of `WORDS` for a band, from its deviations (9,), its symptoms (9,) and its mean reflectance.

    Words say where to look first; that a band is faulty is decided by its score alone.
    """
    away, shown = (dict(zip(SYMPTOMS, values, strict=True)) for values in (deviations, own))
    if np.exp(shown["own scatter"]) < 3e-5:  # the SD that rounding to whole DN leaves, 1e-4 / √12
        return "dead" if abs(mean) < 0.0025 else "stuck"  # 25 DN, below any band but cirrus
    # noise has column offsets too: log of their ratio is −2.1 of white noise in 64 rows, above 0 of column offsets
    if away["columns"] > 1 and shown["columns"] - shown["grain"] > -1:
        return "striped"
    size = {
        "noisy": max(away["grain"], away["own grain"]),
        "offset or gain": abs(away["level"]),
        "shifted or blurred": max(abs(away["across"]), abs(away["down"]), -away["grain"], -away["own grain"]),
        "unlike the other bands": max(abs(away[name]) for name in ("scatter", "own scatter", "likeness")),
    }
    return max(size, key=lambda word: size[word])


def take_out(look: Callable[[np.ndarray], np.ndarray], absent: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Take faulty bands out until no score is above 1; `absent` bands (13,) bool are not there.

    Of the suspicious bands, that one goes first without which the others look most normal: the worst score often
    belongs to a neighbour, whose prediction leaned on the faulty band.

    Args:
        look: scores (13,) of the bands where some, (13,) bool, are out: −∞ of those.
        absent: bands that are out from the beginning.

    Returns:
        Scores (13,): of a faulty band when it was taken out, of the others at the end, −∞ of absent bands. Faulty
        bands, (13,) bool.
    """
    out, faulty, latest = absent.copy(), np.zeros_like(absent), look(absent)
    scores, most = latest, min(MOST_FAULTY, int((~absent).sum()) - 3)  # three bands are left to compare
    while latest.max() > 1 and faulty.sum() < most:
        without = {c: look(out | (np.arange(_BANDS) == c)) for c in np.flatnonzero(latest > 1).tolist()}
        # a sum: the worst of the others says nothing while another faulty band is among them
        band = min(without, key=lambda c: np.log(np.maximum(without[c], 1)).sum())
        latest = without[band]
        out[band] = faulty[band] = True
        scores = np.where(out, scores, latest)
    return scores, faulty


@dataclass(frozen=True, eq=False)
class Detector:
    """Fitted on healthy images of one size and processing level: symptoms depend on both."""

    moments: Moments  # of their spectra, for the predictions
    healthy: Sketch  # what is normal
    rate: float = RATE  # share of healthy images in which any band may be called faulty
    image_size: int = 64  # side in pixels
    level: str = "L1C"
    name: str = ""  # of the data set
    groups: int | None = None  # scenes or places that its images come from, where somebody says
    _kept: dict[Any, Any] = field(default_factory=dict, init=False, repr=False)  # what was worked out before

    def __post_init__(self) -> None:
        """Check that the rate can be held."""
        self.threshold_at(self.rate)

    @classmethod
    def fit(cls, pack: Pack, rate: float = RATE) -> Detector:
        """Fit on up to 2,000 healthy images of training and validation, of a pack that has neither on all.

        Raises:
            ValueError: too few images to fit on, or to hold that rate of false alarms; images without a band.
        """
        splits = pack.index["split"].to_numpy()
        rows = np.flatnonzero(splits != "test") if (splits != "test").any() else np.arange(len(splits))
        rows = np.sort(np.random.default_rng(0).permutation(rows)[:2000])
        if len(rows) < 50 or pack.absent:
            had = f"{len(rows)}" + (f", without {' '.join(pack.absent)}" if pack.absent else "")
            raise ValueError(f"a detector takes 50 healthy images or more, of all 13 bands; {pack.path} has {had}")
        parts = (pack.images[some].astype(np.float32) / np.float32(DN_PER_REFLECTANCE) for some in rows[:, None])
        healthy, size = Sketch.join(map(Sketch.of, parts)), pack.images.shape[-1]
        level = str(pack.card.get("level") or "L1C")
        groups = int(pack.index["group"].iloc[rows].nunique()) if "group" in pack.index else None
        return cls(Moments.of(pack), healthy, rate, size, level, str(pack.card["dataset"]), groups)

    @classmethod
    @functools.cache
    def shipped(cls, rate: float = RATE) -> Detector:
        """That which comes with the package: fitted on 796 images of EuroSAT, L1C, of which it holds statistics."""
        with np.load(SHIPPED, allow_pickle=False) as file:
            mean, known = file["mean"].astype(np.float64), Moments(file["spectrum"], file["covariance"], 200_000)
            spread, grain, columns = (_unpacked(file[name]) for name in ("spread", "grain", "columns"))
        healthy = Sketch(mean, spread, grain, columns, absent=np.zeros(mean.shape, bool))
        return cls(known, healthy, rate, name="EuroSAT")

    def worst(self, far: bool = False) -> np.ndarray:
        """Largest deviation of any band of healthy images that are like all others (or, `far`, of all), sorted.

        Each is judged by what is normal in four fifths of images that it is not among.
        """
        if far not in self._kept:
            fold = np.random.default_rng(0).permutation(len(self.healthy.mean)) % FOLDS
            found = np.empty(len(fold))
            for number in range(FOLDS):
                normal = Normal(self.healthy.take(fold != number), self.moments)
                away = normal.deviations(self.healthy.take(fold == number), far)
                found[fold == number] = np.abs(away).max((1, 2))
            self._kept[far] = np.sort(found if far else found[~self._outside(self.healthy, itself=True).any(1)])
        return self._kept[far]

    def threshold_at(self, rate: float, far: bool = False) -> float:
        """What the worst band of a healthy image exceeds with at most this chance; ValueError: too few to say."""
        worst = self.worst(far)
        allowed = int(np.floor(rate * (len(worst) + 1) + 1e-9)) - 1  # healthy images that may be above
        if not 0 < rate < 1 or allowed < 0:
            possible = f"choose one from {1 / (len(worst) + 1):.3g} to 1, or give more"
            raise ValueError(f"{len(worst)} healthy images can't hold a rate of false alarms of {rate}; {possible}")
        return float(worst[::-1][allowed])

    def chance(self, scores: np.ndarray, far: bool = False) -> np.ndarray:
        """How often the worst band of a healthy image scores as high: a p-value for all bands together."""
        worst = self.worst(far)
        return (1 + len(worst) - np.searchsorted(worst, scores, side="left")) / (1 + len(worst))

    def normal(self, out: np.ndarray) -> Normal:
        """What is normal when these bands, (13,) bool, are distrusted; each set is worked out once and kept."""
        channels = tuple(np.flatnonzero(out).tolist())
        if channels not in self._kept:
            self._kept[channels] = Normal(self.healthy, self.moments, channels)
        return self._kept[channels]

    def examine(self, images: Any, *, scene: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """Scores (B, 13), above 1 if faulty, and bands to distrust (B, 13) bool, of each image by itself.

        `images` is reflectance (B, 13, S, S), NaN where there is no value. Of tiles of one `scene`, three or more, each
        is held against the others: what is as strange in all of them is the place's, or `distrust` names it.
        """
        if tuple(images.shape[-2:]) != (self.image_size, self.image_size):
            fitted = f"fitted on images of {self.image_size} × {self.image_size} pixels"
            raise ValueError(f"{fitted}, got {tuple(images.shape[-2:])}; cut tiles of that size, or fit on yours")
        sketch = Sketch.of(images)
        if scene:
            if len(images) < 3:
                raise ValueError(f"tiles of a scene are held against the others: give three or more, not {len(images)}")
            return self._beside(sketch, np.any(sketch.absent, 0), bool(self._outside(sketch).any(1).mean() > 0.5))
        found = []
        for row, absent in enumerate(sketch.absent):
            one = sketch.take([row])
            judged = self._judged(one, absent, self.rate)
            found.append(self._judged(one, absent, self.rate, far=True) if self._is_far(one, judged[1]) else judged)
        return _stacked(found)

    def _beside(self, sketch: Sketch, absent: np.ndarray, far: bool) -> tuple[np.ndarray, np.ndarray]:
        """Scores and faulty bands (N, 13) of tiles of one scene, each less what is usual in the others."""

        @functools.cache
        def scores(*out: bool) -> np.ndarray:
            return self.normal(np.array(out)).scores(sketch, far, beside=True) / self.threshold_at(self.rate, far)

        def judged(row: int) -> tuple[np.ndarray, np.ndarray]:
            return take_out(lambda out: scores(*out)[row], absent)

        return _stacked([judged(row) for row in range(len(sketch.mean))])

    def _judged(
        self, sketch: Sketch, absent: np.ndarray, rate: float, far: bool = False
    ) -> tuple[np.ndarray, np.ndarray]:
        """Scores and faulty bands, (13,), by the median of images; of two middle ones the lower, which accuses less."""
        threshold = self.threshold_at(rate, far)

        def look(out: np.ndarray) -> np.ndarray:
            return np.quantile(self.normal(out).scores(sketch, far), 0.5, axis=0, method="lower") / threshold

        return take_out(look, absent)

    def _outside(self, sketch: Sketch, itself: bool = False) -> np.ndarray:
        """Bands (N, 13) with a level or texture outside of all that were fitted on.

        `itself`: the images are among those, and are held against the others.
        """
        known = np.sort(_looks(self.healthy), axis=0)
        low, high = (known[1], known[-2]) if itself else (known[0], known[-1])
        looks = _looks(sketch)
        return ((looks < low) | (looks > high)).reshape(len(looks), 3, _BANDS).any(1) & ~sketch.absent

    def _is_far(self, sketch: Sketch, faulty: np.ndarray) -> bool:
        """Are most images unlike all fitted on: by a band that isn't faulty, by two bands, or by many faults?"""
        outside = self._outside(sketch)
        strange = (outside & ~faulty).any(1) | (outside.sum(1) > 1)
        return bool(faulty.sum() > MOST_NAMED or strange.mean() > 0.5)

    def distrust(self, scene: xr.DataArray, *, tiles: int = 64) -> pd.DataFrame:
        """Which bands of a scene to distrust, a row a band.

        Tiles of one scene are alike, so they don't count as independent: the p-value is twice the median over tiles,
        which holds however they depend on one another (Rüger 1978; Vovk and Wang 2020, doi:10.1093/biomet/asaa027).
        A fault in less than half of the scene shows in `tiles_off` alone. In a scene unlike those fitted on only dead,
        stuck, striped and noisy bands are named; of another level only constant ones.

        Args:
            scene: DN (13, y, x) with ESA band names, as `scene.open_scene` gives it; NaN is a pixel without a value.
            tiles: at most so many are read, spread over the scene.

        Returns:
            `band`, `score` (median over tiles), `false_alarm` (chance of as high a score in a healthy scene), both NaN
            where nothing can be said; `suspicious`, where the score is above 1; `looks_like`; `tiles_off`, share of the
            tiles in which the band is unlike itself in the others, NaN of fewer than three. `attrs`: `tiles`, `note`:
            what speaks against believing it.

        Raises:
            ValueError: no band names, values that are no DN, a scene smaller than a tile, or without enough values.
        """
        images, absent = spread_tiles(scene, self.image_size, tiles)
        sketch, factor = Sketch.of(images), 1 if len(images) == 1 else 2
        rate, level, notes = self.rate / factor, level_of(scene), list[str]()
        other = level not in ("", self.level)
        scores, faulty = self._judged(sketch, absent, rate)
        pair = [] if other else self._exchanged(images, faulty, absent, rate)
        if far := not pair and (other or self._is_far(sketch, faulty)):
            scores, faulty = self._judged(sketch, absent, rate, far)
            notes.append(f"unlike anything it was fitted on ({self.name}): only plain faults are named, and unsurely")
        if other:
            notes.append(f"the scene is {level}, the detector was fitted on {self.level}: levels differ in every band")
            warnings.warn(notes[-1], stacklevel=2)
        if self.groups is not None and self.groups < FEW_GROUPS:
            of = f"fitted on {self.groups} groups of images ({self.name}), which are like one another"
            notes.append(f"{of}: more healthy images than the stated {self.rate:.0%} are called faulty elsewhere")
        notes.append(note_of_pixels(scene))
        if absent.any():
            gone = " ".join(np.array(bands.NAMES)[absent])
            notes.append(f"{gone}: no values, so nothing is said about them, and the others are judged without them")
        words = self._words(sketch, faulty, absent, far)
        named = faulty.copy()
        if pair:
            named, scores[pair] = np.isin(np.arange(_BANDS), pair), scores[pair].max()
            words[pair] = [f"exchanged with {bands.NAMES[channel]}" for channel in reversed(pair)]
        elif far:
            named &= np.isin(words, WORDS[: 2 if other or faulty.sum() > MOST_NAMED else 4])
        said = ~absent & (named | (not far))
        chance = np.minimum(factor * self.chance(scores * self.threshold_at(rate, far), far), 1)
        table = pd.DataFrame({"band": bands.NAMES, "score": np.where(said, scores, np.nan)})
        table["false_alarm"] = np.where(said & (not other), chance, np.nan)
        table["suspicious"] = named
        table["looks_like"] = np.where(absent, "absent", np.where(named, words, ""))
        table["tiles_off"] = self._beside(sketch, absent, far)[1].mean(0) if len(images) > 2 else np.nan
        table.attrs.update(tiles=len(images), note="; ".join(filter(None, notes)))
        return table

    def _words(self, sketch: Sketch, faulty: np.ndarray, absent: np.ndarray, far: bool) -> np.ndarray:
        """What each faulty band of a scene looks like, (13,), by the median over its images."""
        normal, words = self.normal(faulty | absent), np.full(_BANDS, "", object)
        away = np.median(normal.deviations(sketch, far), axis=0)
        own = np.median(symptoms(sketch, self.moments, normal.distrusted)[0], axis=0)
        mean = np.median(sketch.mean, axis=0)
        for channel in np.flatnonzero(faulty):
            words[channel] = looks_like(away[channel], own[channel], mean[channel])
        return words

    def _exchanged(self, images: np.ndarray, faulty: np.ndarray, absent: np.ndarray, rate: float) -> list[int]:
        """The two bands that, exchanged back, leave nothing above the threshold in a scene; [] if no two do."""
        some, there, judged = Sketch.of(images[:8]), np.flatnonzero(~absent).tolist(), dict[tuple[int, int], float]()
        pairs = [(a, b) for a in there for b in there if a < b and (faulty[a] or faulty[b])]

        def worst(sketch: Sketch) -> float:
            return float(np.quantile(self.normal(absent).scores(sketch), 0.5, axis=0, method="lower").max())

        def order(a: int, b: int) -> np.ndarray:
            return np.where(np.arange(_BANDS) == a, b, np.where(np.arange(_BANDS) == b, a, np.arange(_BANDS)))

        # their statistics exchanged say nearly the same at no cost, but for the grids that they were brought to
        likely = sorted(pairs, key=lambda pair: worst(some.reordered(order(*pair))))
        for pair in likely[:5] if faulty.sum() <= MOST_FAULTY else []:
            judged[pair] = worst(Sketch.of(images[:8, order(*pair)]))
        best = min(judged, key=lambda pair: judged[pair], default=None)
        return [*best] if best and judged[best] <= self.threshold_at(rate) else []


def _stacked(judged: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    scores, faulty = zip(*judged, strict=True)
    return np.stack(scores), np.stack(faulty)


def _unpacked(triangles: np.ndarray) -> np.ndarray:
    """Forms (N, C, C) from triangles of their Cholesky factors in DN, in which float16 is enough for residuals."""
    side = int((2 * triangles.shape[1]) ** 0.5)
    factors = np.zeros((len(triangles), side, side))
    factors[:, *np.tril_indices(side)] = triangles
    return factors @ factors.transpose(0, 2, 1) / DN_PER_REFLECTANCE**2


def spread_tiles(scene: xr.DataArray, size: int, most: int) -> tuple[np.ndarray, np.ndarray]:
    """Reflectance (K, 13, size, size) of up to `most` tiles in SatCLIP order, and which bands are absent, (13,) bool.

    Tiles lie on a grid without overlap; of a large scene evenly spread ones are read, not the whole. A band that most
    of them lack is absent. A tile counts where every band that is there has enough values. DN are rounded, as in packs.
    """
    if "band" not in getattr(scene, "coords", ()):
        got = getattr(scene, "dims", type(scene).__name__)
        raise ValueError(f"a scene has dimensions and ESA's names of bands, as open_scene gives it; got {got}")
    source = Source(scene)
    if source.batched or (lacking := sorted(set(bands.NAMES) - set(source.names))):
        add = "scene.reindex(band=[band.name for band in bm.BANDS]) adds them"
        found = f"several dates, {scene.dims}" if source.batched else f"lacking: {', '.join(lacking)}; {add}"
        raise ValueError(f"a scene is one, of 13 bands, absent ones NaN; {found}")
    (height, width), order = source.size, [source.names.index(name) for name in bands.NAMES]
    rows, columns = height // size, width // size
    if not rows or not columns:
        raise ValueError(f"the scene is {height} × {width} pixels, a tile takes {size}")
    to_dn, count, tiles = np.float32(DN_PER_REFLECTANCE / source.scale), rows * columns, []
    step = next(s for s in range(max(round(count * 0.618), 1), 2 * count + 1) if np.gcd(s, count) == 1)
    for number in range(min(count, 4 * most)):  # the first of them are spread already; many lie outside of a swath
        row, column = divmod(number * step % count, columns)
        window = slice(row * size, (row + 1) * size), slice(column * size, (column + 1) * size)
        # packs hold whole DN: unrounded, an interpolated band is smoother than any that a detector was fitted on
        values = (source.numbers(window)[0, order] * to_dn).round()
        values[:, (np.nan_to_num(values) == 0).all(0)] = np.nan  # outside of the swath
        if np.isfinite(values).mean() > 0.25:
            tiles.append(values / DN_PER_REFLECTANCE)
        if len(tiles) == most:
            break
    images = np.stack(tiles) if tiles else np.full((1, _BANDS, size, size), np.nan, np.float32)
    there = np.isfinite(images).mean((2, 3)) >= 0.5  # (K, 13)
    absent = there.mean(0) < 0.5
    images[:, absent] = np.nan
    seen = (np.isfinite(images) | absent[:, None, None]).all(1)
    fits = (there | absent).all(1) & (_inside(seen).sum((1, 2)) >= LEAST_PIXELS)
    if not fits.any() or (~absent).sum() < 2:
        empty = "mark bands that are mostly empty as lost: scene.open_scene(..., hide=...)"
        raise ValueError(f"no tile of the scene, of {count}, has pixels with a value in every band; {empty}")
    return images[fits], absent
