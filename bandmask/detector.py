"""Which bands of an image to distrust, how sure that is, and what a classifier gains if they are replaced.

Every band is compared, at its own resolution, with its ridge prediction from the others: coarse bands are first made
anew from their own pixels (`identity.regrid`), so how they came to 10 m plays no part. A faulty band spoils the
predictions of its neighbours, so bands are taken out one at a time: that whose removal leaves the others most normal.
What is normal, and the threshold, come from healthy images, each judged as if it had not been fitted on. Of a scene
unlike all of those only what lies far outside of normal is named.
Source: conformal prediction by leave-one-out residuals (Vovk et al. 2005; Barber et al. 2021, doi:10.1214/20-AOS1965).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bandmask import bands
from bandmask.batches import Batches
from bandmask.faults import Fault, inject
from bandmask.fills import RidgeLocalFill
from bandmask.heads import SceneHeads
from bandmask.identity import regrid
from bandmask.masks import MaskSpec, hide
from bandmask.moments import Moments
from bandmask.packs import DN_PER_REFLECTANCE, Pack
from bandmask.scene import note_of_pixels
from bandmask.stats import drawn, interval
from bandmask.train import Compute

if TYPE_CHECKING:
    import xarray as xr

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
METHODS = ("healthy", "healthy, detector on", "do nothing", "detector", "oracle")
FOLDS = 5
_BANDS = len(bands.NAMES)
_ANY = MaskSpec(bands.NAMES, allow_all_bands=True)
# numbers of images, and channels that are distrusted in all of them, to scores (images, 13)
Look = Callable[[np.ndarray, tuple[int, ...]], np.ndarray]


class Sketch(NamedTuple):
    """What a detector keeps of N images, float64: enough to judge any linear combination of bands without pixels."""

    mean: np.ndarray  # (N, 13), in reflectance
    spread: np.ndarray  # covariance of the 13 bands, their gradients across, and those down, (N, 39, 39)
    grain: np.ndarray  # second moments of Immerkær's noise filter, blind to rows and columns: SD σ is σ², (N, 13, 13)
    columns: np.ndarray  # those of second differences of column means: column offsets of SD s give s², (N, 13, 13)
    absent: np.ndarray  # bands without a value, (N, 13) bool; their entries elsewhere are 0

    @classmethod
    def of(cls, images: Tensor | np.ndarray) -> Sketch:
        """Of reflectance (N, 13, H, W), coarse bands on their own grids; NaN is a pixel without a value.

        A pixel counts where every band of its image that has values in at least half of the image has one; a band with
        fewer is absent from that image.

        Raises:
            ValueError: another shape, images narrower than 8 pixels, or one with too few complete pixels.
        """
        images = torch.as_tensor(images).cpu()
        if images.ndim != 4 or images.shape[1] != _BANDS or min(images.shape[2:]) < 8:
            raise ValueError(
                f"a detector takes images (N, {_BANDS}, H, W) of 8 pixels or more a side; got {tuple(images.shape)}"
            )
        # 8 images at a time are 10 MB in float64 with gradients, which caches hold; 64 took 2.7 times as long
        return cls.join(_sketch(torch.from_numpy(regrid(part.double().numpy()))) for part in images.split(8))

    @classmethod
    def join(cls, parts: Iterable[Sketch]) -> Sketch:
        """The images of several, in order."""
        return cls(*map(np.concatenate, zip(*parts, strict=True)))

    def take(self, rows: np.ndarray) -> Sketch:
        """Those of some images."""
        return Sketch(*(part[rows] for part in self))


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
            f"image {int(counts.argmin())} has {int(counts.min())} pixels with a value in every band and around it, "
            f"a detector needs {LEAST_PIXELS}"
        )
    weight = inner.double() / counts[:, None, None]
    layers = torch.cat([images[..., 1:-1, 1:-1], wide / 2, high / 2], 1)  # (N, 39, H − 2, W − 2)
    mean = torch.einsum("nchw,nhw->nc", layers, weight)
    spread = _products(layers - mean[..., None, None], weight)
    grain = _products(images.diff(n=2, dim=-1).diff(n=2, dim=-2) / 6, weight)
    rows = seen.sum(-2)  # (N, W)
    of_columns = (images * seen[:, None]).sum(-2) / rows.clamp(min=1)[:, None]
    usable = _all_seen(rows >= max(seen.shape[-2] // 4, 1), -1)
    share = usable.double() / usable.sum(-1, keepdim=True).clamp(min=1)
    columns = _products((of_columns.diff(n=2) / 6**0.5)[..., None, :], share[:, None])
    return Sketch(*(part.cpu().numpy() for part in (mean[:, :_BANDS], spread, grain, columns, absent)))


def _inner(seen: Tensor) -> tuple[Tensor, Tensor]:
    """Pixels seen with all their neighbours, (N, H − 2, W − 2), and how many they are."""
    inner = _all_seen(_all_seen(seen, -1), -2)
    return inner, inner.flatten(1).sum(-1)


def _all_seen(seen: Tensor, axis: int) -> Tensor:
    size = seen.shape[axis]
    return seen.narrow(axis, 0, size - 2) & seen.narrow(axis, 1, size - 2) & seen.narrow(axis, 2, size - 2)


def _products(layers: Tensor, weight: Tensor) -> Tensor:
    """Weighted products of all pairs of layers: (N, C, H, W) and (N, H, W) give (N, C, C)."""
    flat = layers.flatten(2)
    return (flat * weight.flatten(1)[:, None]) @ flat.transpose(1, 2)


def symptoms(sketch: Sketch, moments: Moments, distrusted: Sequence[int] = ()) -> tuple[np.ndarray, np.ndarray]:
    """Symptoms (N, 13, 9) of all bands, and what of the trusted bands explains them: features (N, 13, 42).

    No band is predicted from distrusted ones; its own features and theirs are 0. What is normal depends on the scene: a
    town leaves a rougher residual than a lake.
    """
    own = np.eye(_BANDS)
    trusted = 1 - own
    trusted[:, list(distrusted)] = 0
    weights, biases = moments.regressions(trusted)
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

    def __init__(self, sketch: Sketch, moments: Moments, distrusted: tuple[int, ...] = ()) -> None:
        """Symptoms are predicted from features; what is left of an image is taken as if it had not been fitted on."""
        self.distrusted, self.moments = distrusted, moments
        found, features = symptoms(sketch, moments, distrusted)
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
        found, features = symptoms(sketch, self.moments, self.distrusted)
        shown = (features - self.centre) / self.scale
        shown = shown.clip(-CLIP, CLIP) if far else shown
        away = found - np.einsum("ncf,cfs->ncs", shown, self.slope, optimize=True) - self.middle
        return away / np.where(away < 0, self.below, self.above)

    def scores(self, sketch: Sketch, far: bool = False) -> np.ndarray:
        """The largest deviation of each band, (N, 13); −∞ of distrusted channels.

        The largest, and no distance: a fault shows in one or two symptoms, and each has its own long tail. A level says
        nothing of images unlike all known.
        """
        scores = (np.abs(self.deviations(sketch, far)) * np.where(far & (PLACE[0] == PLACE), 0, PLACE)).max(-1)
        scores[:, list(self.distrusted)] = -np.inf
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


def take_out(look: Look, absent: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Take faulty bands out until no score is above 1; `absent` bands (N, 13) are not there.

    Of the suspicious bands, that one goes first without which the others look most normal: the worst score often
    belongs to a neighbour, whose prediction leaned on the faulty band.

    Returns:
        Scores (N, 13): of a faulty band when it was taken out, of the others at the end, −∞ of absent bands. Faulty
        bands, (N, 13) bool.
    """
    out, faulty, rows = absent.copy(), np.zeros_like(absent), np.arange(len(absent))
    latest = _grouped(look, rows, out)
    scores = latest.copy()
    while True:
        most = np.minimum(MOST_FAULTY, (~absent[rows]).sum(1) - 3)  # three bands are left to compare
        going_on = (latest.max(1) > 1) & (faulty[rows].sum(1) < most)
        rows, latest = rows[going_on], latest[going_on]
        if not len(rows):
            return scores, faulty
        chosen, least, after = latest.argmax(1), np.full(len(rows), np.inf), latest.copy()
        for candidate in range(_BANDS):
            tried = np.flatnonzero(latest[:, candidate] > 1)
            without = out[rows[tried]]
            without[:, candidate] = True
            found = _grouped(look, rows[tried], without)
            # a sum: the worst of the others says nothing while another faulty band is among them
            left = np.log(np.maximum(found, 1)).sum(1)
            better = left < least[tried]
            places = tried[better]
            chosen[places], least[places], after[places] = candidate, left[better], found[better]
        latest = after
        out[rows, chosen] = faulty[rows, chosen] = True
        scores[rows] = np.where(out[rows], scores[rows], latest)


def _grouped(look: Look, rows: np.ndarray, out: np.ndarray) -> np.ndarray:
    """Scores (N, 13); images without the same bands are looked at together."""
    scores = np.empty(out.shape)
    if len(rows):
        sets, group = np.unique(out, axis=0, return_inverse=True)
        for number, channels in enumerate(sets):
            places = np.flatnonzero(group.ravel() == number)
            scores[places] = look(rows[places], tuple(np.flatnonzero(channels).tolist()))
    return scores


@dataclass(frozen=True)
class Detector:
    """Fitted on healthy images of one size and processing level: symptoms depend on both."""

    moments: Moments  # of their spectra, for the predictions
    healthy: Sketch  # what is normal
    rate: float  # share of healthy images in which any band may be called faulty
    image_size: int  # side in pixels
    level: str = "L1C"
    name: str = ""  # of the data set
    _worst: dict[bool, np.ndarray] = field(default_factory=dict, init=False, repr=False, compare=False)
    _known: dict[tuple[int, ...], Normal] = field(default_factory=dict, init=False, repr=False, compare=False)

    @classmethod
    def fit(cls, pack: Pack, *, rate: float = RATE, seed: int = 0) -> Detector:
        """Fit on up to 2,000 images of training and validation, of a pack that has neither on all; all are healthy.

        Raises:
            ValueError: too few images to fit on, or to hold that rate of false alarms; images without a band.
        """
        splits = pack.index["split"].to_numpy()
        rows = np.flatnonzero(splits != "test") if (splits != "test").any() else np.arange(len(splits))
        rows = np.sort(np.random.default_rng(seed).permutation(rows)[:2000])
        if len(rows) < 50:
            raise ValueError(f"a detector takes 50 healthy images or more; {pack.path} has {len(rows)}")
        healthy = Sketch.join(Sketch.of(batch.images) for batch in Batches(pack, rows).epoch())
        if healthy.absent.any():
            raise ValueError(f"{pack.path} has images without a band; fit on complete ones")
        size, level = pack.images.shape[-1], str(pack.card.get("level") or "L1C")
        found = cls(Moments.of(pack, seed=seed), healthy, rate, size, level, str(pack.card["dataset"]))
        found.threshold_at(rate)
        return found

    def worst(self, far: bool = False) -> np.ndarray:
        """Largest deviation of any band of healthy images that are like all others (or, `far`, of all), sorted.

        Each is judged by what is normal in four fifths of images that it is not among.
        """
        if far not in self._worst:
            fold = np.random.default_rng(0).permutation(len(self.healthy.mean)) % FOLDS
            found = np.empty(len(fold))
            for number in range(FOLDS):
                normal = Normal(self.healthy.take(fold != number), self.moments)
                away = normal.deviations(self.healthy.take(fold == number), far)
                found[fold == number] = np.abs(away).max((1, 2))
            self._worst[far] = np.sort(found if far else found[~self._outside(self.healthy, itself=True).any(1)])
        return self._worst[far]

    def threshold_at(self, rate: float, far: bool = False) -> float:
        """What the worst band of a healthy image exceeds with at most this chance; ValueError: too few to say."""
        worst = self.worst(far)
        allowed = int(np.floor(rate * (len(worst) + 1) + 1e-9)) - 1  # healthy images that may be above
        if not 0 < rate < 1 or allowed < 0:
            raise ValueError(
                f"{len(worst)} healthy images can't hold a rate of false alarms of {rate}; choose one from "
                f"{1 / (len(worst) + 1):.3g} to 1, or give more images"
            )
        return float(worst[::-1][allowed])

    def chance(self, scores: np.ndarray, far: bool = False) -> np.ndarray:
        """How often the worst band of a healthy image scores as high: a p-value for all bands together."""
        worst = self.worst(far)
        return (1 + len(worst) - np.searchsorted(worst, scores, side="left")) / (1 + len(worst))

    def normal(self, distrusted: Iterable[int] = ()) -> Normal:
        """What is normal when these channels are distrusted; each set is worked out once and kept."""
        key = tuple(sorted(int(channel) for channel in distrusted))
        if key not in self._known:
            self._known[key] = Normal(self.healthy, self.moments, key)
        return self._known[key]

    def sketch(self, images: Tensor | np.ndarray | Sketch) -> Sketch:
        """What it sees of images of its size; all that takes images takes this too, and is spared the pixels."""
        if isinstance(images, Sketch):
            return images
        if tuple(images.shape[-2:]) != (self.image_size, self.image_size):
            raise ValueError(
                f"fitted on images of {self.image_size} × {self.image_size} pixels, got {tuple(images.shape[-2:])}; "
                "cut tiles of that size, or fit on images of yours"
            )
        return Sketch.of(images)

    def _outside(self, sketch: Sketch, itself: bool = False) -> np.ndarray:
        """Bands (N, 13) with a level or texture outside of all that were fitted on.

        `itself`: the images are among those, and are held against the others.
        """
        known = np.sort(_looks(self.healthy), axis=0)
        low, high = (known[1], known[-2]) if itself else (known[0], known[-1])
        looks = _looks(sketch)
        return ((looks < low) | (looks > high)).reshape(len(looks), 3, _BANDS).any(1) & ~sketch.absent

    def _far(self, sketch: Sketch, faulty: np.ndarray) -> np.ndarray:
        """Images (N,) unlike all that were fitted on: by bands that aren't faulty, by two bands, or by many faults."""
        outside = self._outside(sketch)
        return (outside & ~faulty).any(1) | (outside.sum(1) > 1) | (faulty.sum(1) > MOST_NAMED)

    def examine(self, images: Tensor | np.ndarray | Sketch) -> tuple[np.ndarray, np.ndarray]:
        """Scores (B, 13), above 1 if faulty, and bands to distrust (B, 13) bool, of each image by itself.

        `images` is reflectance (B, 13, S, S), NaN where there is no value; or what `sketch` gave.
        """
        sketch = self.sketch(images)

        def look(far: bool, of: Sketch) -> Look:
            threshold = self.threshold_at(self.rate, far)
            return lambda rows, distrusted: self.normal(distrusted).scores(of.take(rows), far) / threshold

        scores, faulty = take_out(look(False, sketch), sketch.absent)
        far = self._far(sketch, faulty)
        if far.any():
            some = sketch.take(far)
            scores[far], faulty[far] = take_out(look(True, some), some.absent)
        return scores, faulty

    def words(self, sketch: Sketch, faulty: np.ndarray, absent: np.ndarray, far: bool = False) -> dict[str, str]:
        """What each faulty band of a scene looks like, by the median over its images, such as `{"B08": "noisy"}`."""
        if not faulty.any():
            return {}
        distrusted = np.flatnonzero(faulty | absent).tolist()
        away = np.median(self.normal(distrusted).deviations(sketch, far), axis=0)
        own = np.median(symptoms(sketch, self.moments, distrusted)[0], axis=0)
        mean = np.median(sketch.mean, axis=0)
        return {bands.NAMES[c]: looks_like(away[c], own[c], mean[c]) for c in np.flatnonzero(faulty)}

    def distrust(self, scene: xr.DataArray, *, tiles: int = 64) -> pd.DataFrame:
        """Which bands of a scene to distrust, a row a band.

        Tiles of one scene are alike, so they don't count as independent: the p-value is twice the median over tiles,
        which holds however they depend on one another (Rüger 1978; Vovk and Wang 2020, doi:10.1093/biomet/asaa027).
        A fault in less than half of the scene is therefore not seen; cut there and ask again. In a scene unlike those
        fitted on only dead, stuck, striped and noisy bands are named; of another level only constant ones.

        Args:
            scene: DN (13, y, x) with ESA band names, as `scene.open_scene` gives it; NaN is a pixel without a value.
            tiles: at most so many are read, spread over the scene.

        Returns:
            `band`, `score` (median over tiles; above 1 is suspicious), `false_alarm` (chance of as high a score in a
            healthy scene), `suspicious`, `looks_like`. `attrs`: `tiles`, `note`: what speaks against believing it.

        Raises:
            ValueError: no band names, values that are no DN, a scene smaller than a tile, or without enough values.
        """
        images, absent = spread_tiles(scene, self.image_size, tiles)
        sketch, factor = Sketch.of(images), 1 if len(images) == 1 else 2
        thresholds = {far: self.threshold_at(self.rate / factor, far) for far in (False, True)}

        def look(far: bool, of: Sketch = sketch) -> Look:
            return lambda _, out: _middle(self.normal(out).scores(of, far))[None] / thresholds[far]

        (scores,), (faulty,) = take_out(look(False), absent[None])
        level, notes = scene.attrs.get("level"), list[str]()
        other = level in ("L1C", "L2A") and level != self.level
        pair = () if other else self._exchanged(look, images, faulty, absent)
        far = not pair and (other or self._far(sketch, np.tile(faulty, (len(images), 1))).mean() > 0.5)
        if far:
            (scores,), (faulty,) = take_out(look(True), absent[None])
            notes.append(f"unlike anything it was fitted on ({self.name}): only plain faults are named, and unsurely")
        if other:
            notes.append(f"the scene is {level}, the detector was fitted on {self.level}: levels differ in every band")
            warnings.warn(notes[-1], stacklevel=2)
        words = self.words(sketch, faulty, absent, far)
        words |= {name: f"exchanged with {second}" for name, second in zip(pair, pair[::-1], strict=True)}
        plain = WORDS[: 2 if other or faulty.sum() > MOST_NAMED else 4] if far else {*words.values()}
        named = np.array([words.get(name) in plain for name in bands.NAMES])
        notes += [note] if (note := note_of_pixels(scene)) else []
        if absent.any():
            gone = " ".join(np.array(bands.NAMES)[absent])
            notes.append(f"{gone}: no values, so nothing is said about them, and the others are judged without them")
        chance = np.minimum(factor * self.chance(scores * thresholds[far], far), 1)
        unknown = absent | other | (far & ~named)
        table = pd.DataFrame({"band": bands.NAMES, "score": np.where(absent, np.nan, scores)})
        table["false_alarm"] = np.where(unknown, np.nan, chance)
        table["suspicious"] = named
        said = [words.get(name, "") if bad else "" for name, bad in zip(bands.NAMES, named, strict=True)]
        table["looks_like"] = np.where(absent, "absent", said)
        table.attrs.update(tiles=len(images), note="; ".join(notes))
        return table

    def _exchanged(
        self, look: Callable[..., Look], images: np.ndarray, faulty: np.ndarray, absent: np.ndarray
    ) -> tuple[str, ...]:
        """The two bands that, exchanged back, leave nothing above the threshold in a scene; () if no two do."""
        out, best, found = tuple(np.flatnonzero(absent).tolist()), 1.0, tuple[str, ...]()
        there = np.flatnonzero(~absent).tolist() if 0 < faulty.sum() <= MOST_FAULTY else []
        for first, second in [(a, b) for a in there for b in there if a < b and (faulty[a] or faulty[b])]:
            order = np.arange(_BANDS)
            order[[first, second]] = second, first
            worst = look(False, Sketch.of(images[:8, order]))(np.zeros(1, int), out).max()
            if worst <= best:
                best, found = worst, (bands.NAMES[first], bands.NAMES[second])
        return found


def _middle(scores: np.ndarray) -> np.ndarray:
    """Median over images; of two middle ones the lower, which accuses nobody too soon."""
    return np.quantile(scores, 0.5, axis=0, method="lower")


def spread_tiles(scene: xr.DataArray, size: int, most: int) -> tuple[np.ndarray, np.ndarray]:
    """Reflectance (K, 13, size, size) of up to `most` tiles in SatCLIP order, and which bands are absent, (13,) bool.

    Tiles lie on a grid without overlap; of a large scene evenly spread ones are read, not the whole. A band that most
    of them lack is absent. A tile counts where every band that is there has enough values. DN are rounded, as in packs.
    """
    if scene.dims != ("band", "y", "x") or "band" not in scene.coords:
        raise ValueError(f"a scene has dimensions (band, y, x) and ESA band names; got {scene.dims}")
    names = [bands.parse_band(str(name)) for name in scene["band"].values]
    if sorted(names) != sorted(bands.NAMES):
        lacking = ", ".join(sorted(set(bands.NAMES) - set(names))) or "none, but some are there twice"
        raise ValueError(f"a scene has 13 bands, absent ones NaN; lacking: {lacking}. `scene.open_scene` adds them")
    rows, columns = scene.sizes["y"] // size, scene.sizes["x"] // size
    if not rows or not columns:
        raise ValueError(f"the scene is {scene.sizes['y']} × {scene.sizes['x']} pixels, a tile takes {size}")
    order = [names.index(name) for name in bands.NAMES]
    per_reflectance = float(scene.attrs.get("dn_per_reflectance", DN_PER_REFLECTANCE))
    count, tiles = rows * columns, []
    step = next(s for s in range(max(round(count * 0.618), 1), 2 * count + 1) if np.gcd(s, count) == 1)
    for number in range(min(count, 4 * most)):  # the first of them are spread already; many lie outside of a swath
        row, column = divmod(number * step % count, columns)
        part = scene.isel(y=slice(row * size, (row + 1) * size), x=slice(column * size, (column + 1) * size))
        # packs hold whole DN: unrounded, an interpolated band is smoother than any that a detector was fitted on
        values = np.asarray(part.values, np.float32)[order].round()
        if np.isfinite(values).mean() > 0.25:
            tiles.append(values / per_reflectance)
        if len(tiles) == most:
            break
    if not tiles:
        raise ValueError(f"no tile of the scene that was tried, of {count}, has values in a quarter of its pixels")
    images = np.stack(tiles)
    there = np.isfinite(images).mean((2, 3)) >= 0.5  # (K, 13)
    absent = there.mean(0) < 0.5
    images[:, absent] = np.nan
    seen = torch.from_numpy((np.isfinite(images) | absent[:, None, None]).all(1))
    fits = (there | absent).all(1) & (_inner(seen)[1] >= LEAST_PIXELS).numpy()
    if not fits.any() or (~absent).sum() < 2:
        raise ValueError(
            "no tile of the scene has pixels with a value in every band; mark bands that are mostly empty as lost, "
            "with scene.open_scene(..., hide=...)"
        )
    middle = float(np.nanmedian(np.abs(images[fits])))
    if not 1e-3 < middle < 2:
        raise ValueError(
            f"the scene's median is {middle:.3g} as reflectance, expected about 0.1: its values are no DN, or its "
            "attribute dn_per_reflectance is wrong; `scene.open_scene` sets it"
        )
    return images[fits], absent


def measure(detector: Detector, images: Tensor, samples: Tensor, faults: Sequence[Fault]) -> pd.DataFrame:
    """What the detector says of every healthy image (N, 13, S, S), reflectance, with every fault, a row each.

    `worst` is the highest score; `detected`: any band is called faulty; `found`: all faulty ones are among those;
    `named`: no others are. `sample` is the image's row in its pack.
    """
    frames = []
    for fault in faults:
        scores, called = detector.examine(inject(images, samples, fault))
        truth = np.isin(np.arange(_BANDS), fault.channels)
        rows = {"worst": scores.max(1), "detected": called.any(1)}
        rows |= {"found": called[:, truth].all(1), "named": (called == truth).all(1)}
        described = {"kind": fault.kind, "amount": fault.amount, "bands": " ".join(fault.bands)}
        frames.append(pd.DataFrame({**described, "sample": samples.numpy(), **rows}))
    return pd.concat(frames, ignore_index=True)


def mean_interval(figures: np.ndarray, groups: np.ndarray | None = None, seed: int = 0) -> tuple[float, float, float]:
    """Mean of a figure an image, (N,), with a 95 % interval; images of one of `groups` (N,) are drawn together."""
    owner = np.unique(np.arange(len(figures)) if groups is None else groups, return_inverse=True)[1]
    times = drawn(np.random.default_rng(seed), owner.max() + 1, 2000)[:, owner]
    return float(figures.mean()), *interval(times @ figures / times.sum(1))


def repair(images: Tensor, faulty: Tensor, fill: RidgeLocalFill) -> Tensor:
    """Reflectance (B, 13, H, W) with distrusted bands, (B, 13) bool, filled from the others; nothing of them stays."""
    repaired, touched = images.clone(), faulty.any(1)
    if touched.any():
        hidden = faulty[touched][..., None, None].expand(-1, -1, *images.shape[2:])
        repaired[touched] = hide(images[touched], hidden, _ANY, fill)
    return repaired


def break_each(images: Tensor, samples: Tensor, faults: Sequence[Fault]) -> tuple[Tensor, Tensor]:
    """The batch with one fault an image, `faults[sample % len(faults)]`, and which bands that broke, (B, 13) bool."""
    broken, faulty = images.clone(), torch.zeros(images.shape[:2], dtype=torch.bool, device=images.device)
    for row, sample in enumerate(samples.tolist()):
        fault = faults[sample % len(faults)]
        broken[row] = inject(images[row : row + 1], samples[row : row + 1], fault)[0]
        faulty[row, fault.channels] = True
    return broken, faulty


@torch.no_grad()
def closed_loop(
    pack: Pack,
    faults: Mapping[str, Sequence[Fault]],
    detector: Detector,
    encoder: nn.Module,
    heads: SceneHeads,
    *,
    image_size: int | None = None,
    compute: Compute | None = None,
) -> pd.DataFrame:
    """Detect, hide, fill, classify: the class of every test image by head and method, one fault an image.

    Beside the detector stand what bounds it: an oracle that knows which bands are faulty, doing nothing, and healthy
    images; those also with the detector on, because a false alarm costs accuracy where nothing was broken.

    Returns:
        `fault` (key of `faults`; healthy images stand under the first), `method` (of `METHODS`), `encoder_seed` (none),
        `head_seed`, `sample` (row in the pack), `label`, `predicted`, and `group` where the pack has it, as
        `stats.paired_difference` takes them; `named`: just the faulty bands were distrusted.
    """
    compute, fill = compute or Compute.of(), RidgeLocalFill(detector.moments)
    compute.place(encoder).eval()
    heads.to(compute.device)
    frames = []
    for number, (kind, of_kind) in enumerate(faults.items()):
        for batch in Batches(pack, "test", batch_size=64, device=compute.device).epoch():
            broken, faulty = break_each(batch.images, batch.samples, of_kind)
            for method in METHODS[2 * (number > 0) :]:
                images, truth = (broken, faulty) if method in METHODS[2:] else (batch.images, faulty & False)
                distrusted = truth if method == "oracle" else torch.zeros_like(faulty)
                if "detector" in method:
                    distrusted = torch.from_numpy(detector.examine(images.cpu())[1]).to(faulty)
                seen = repair(images, distrusted, fill)
                if image_size not in (None, seen.shape[-1]):
                    seen = F.interpolate(seen, size=(image_size, image_size), mode="bilinear", align_corners=False)
                with compute.autocast():
                    embeddings = encoder(compute.images(seen)).float()
                rows = {"fault": kind, "method": method, "sample": batch.samples.cpu(), "label": batch.labels.cpu()}
                rows["named"] = (distrusted == truth).all(1).cpu()
                for seed, predicted in zip(heads.seeds, heads(embeddings).argmax(-1), strict=True):
                    frames.append(pd.DataFrame({**rows, "head_seed": seed, "predicted": predicted.cpu()}))
    table = pd.concat(frames, ignore_index=True)
    table["encoder_seed"] = pd.Series(pd.NA, table.index, dtype="Int64")
    if "group" in pack.index:
        table["group"] = pack.index["group"].to_numpy()[table["sample"]]
    return table
