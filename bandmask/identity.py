"""What pixels say of themselves: order of bands, level, added offset, scale, and how 20 and 60 m bands came to 10 m.

Means and covariances of a few thousand pixels are held against those of real images, for every order that people write
in, each level, with and without 1000 DN added. What fits best is told with how sure that is and what comes next; where
nothing fits, or two fit alike, nothing is told. The one guard of scenes, packs and models in service asks the same.
"""

import functools
import itertools
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bandmask import bands
from bandmask.images import LOWEST, PIXELS, SATURATED, as_array
from bandmask.moments import LEVELS, Moments

# Who stacks bands in which order; thirteen in those of `bands.ORDERS`.
_STACKS = {
    "twelve": "B01 B02 B03 B04 B05 B06 B07 B08 B8A B09 B11 B12",  # L2A; BigEarthNet in TorchGeo, TerraMesh
    "twelve-b8a-last": "B01 B02 B03 B04 B05 B06 B07 B08 B09 B11 B12 B8A",
    "olmoearth": "B02 B03 B04 B08 B05 B06 B07 B8A B11 B12 B01 B09",  # allenai/olmoearth_pretrain_minimal
    "ten": "B02 B03 B04 B05 B06 B07 B08 B8A B11 B12",  # PASTIS, WorldCereal's Presto, reBEN from 0.2 on
    "bigearthnet": "B02 B03 B04 B08 B05 B06 B07 B11 B12 B8A",  # reBEN 0.1, ConfigILM
    "ten-10m-first": "B02 B03 B04 B08 B05 B06 B07 B8A B11 B12",
    "ten-b8a-last": "B02 B03 B04 B05 B06 B07 B08 B11 B12 B8A",
    "tessera": "B04 B02 B03 B08 B8A B05 B06 B07 B11 B12",  # ucam-eo/tessera
    "six": "B02 B03 B04 B08 B11 B12",
    "six-red-first": "B04 B03 B02 B08 B11 B12",
    "four": "B02 B03 B04 B08",
    "four-red-first": "B04 B03 B02 B08",
}
ORDERS: dict[str, tuple[str, ...]] = {
    **{name: bands.ORDERS[name] for name in ("satclip", "eurosat")},
    **{name: tuple(stack.split()) for name, stack in _STACKS.items()},
}
SCALES = {"DN": 1e-4, "DN / 1000": 1e-3, "0-1": 1.0, "0-255": 1 / 255}  # to reflectance; pictures tell only the order
BRIGHT = 900  # DN: of no band are all pixels above, but for cloud, snow, or what was added
ADDED = 1000  # DN, from processing baseline 04.00 on
MISFIT = 1.2  # log of 1 + squared distance a band to all real images, above which nothing is told
SLOPE = 8.0  # how fast one is sure: a margin of 0.4 is 96 %
SURE = 0.9
DARKER = np.log(SURE / (1 - SURE)) / SLOPE  # margin of ten times as bright: real images are below −2.8, dark sea −0.3
REFUSE = 0.5  # margin by which another order must fit better than the stated one
LEAST = 64  # pixels with a value in every band that are needed; `PIXELS` are looked at
METHODS = ("nearest", "bilinear", "cubic", "cubic spline")  # GDAL's; averaging and interpolating again is none of them


@dataclass(frozen=True)
class Guess:
    """What fits best (None: can't tell), how sure that is, and what fits next."""

    value: Any
    sure: float
    runner_up: Any = None

    def __str__(self) -> str:
        """For people: `eurosat (99 % sure; next: satclip)`."""
        after = "" if self.runner_up is None else f"; next: {self.runner_up}"
        return "can't tell" if self.value is None else f"{self.value} ({self.sure:.0%} sure{after})"


@dataclass(frozen=True)
class Identity:
    """What `identify` found. `offset` is to be added: −1000 or 0 DN; `misfit` is 0 to 1 for images like those known."""

    order: Guess  # a key of `ORDERS`
    level: Guess  # L1C or L2A
    offset: Guess
    scale: Guess  # a key of `SCALES`
    resampling: dict[int, Guess]  # metres of the native grid: of `METHODS`
    misfit: float

    def __str__(self) -> str:
        """A line each."""
        grids = {f"{gsd} m bands": guess for gsd, guess in self.resampling.items()}
        told = {"order": self.order, "level": self.level, "offset": self.offset, "scale": self.scale, **grids}
        return "\n".join(f"{name}: {guess}" for name, guess in told.items())


@functools.cache
def _known(level: str) -> tuple[np.ndarray, np.ndarray]:
    """Mean and covariance of the images of a level whose moments ship with the package."""
    known = Moments.shipped(level)
    spread = known.covariance + np.diag(1e-3 * np.diag(known.covariance) + 1e-6)
    spread[10, 10] += 0.03**2  # thick cirrus is rarer than its scenes
    return known.mean, spread


def _scores(spectra: np.ndarray, orders: Mapping[str, Sequence[str]], added: Sequence[float]) -> dict[tuple, tuple]:
    """Score and misfit of spectra (n, C), reflectance, by (order, level, offset); heavy-tailed, in nats a band."""
    mean, covariance = spectra.mean(0), np.cov(spectra.T, bias=True)
    dark = np.percentile(spectra, 1, axis=0).min()
    found: dict[tuple, tuple] = {}
    for (name, order), level, offset in itertools.product(orders.items(), LEVELS, added):
        places = [bands.NAMES.index(band) for band in order]
        middle, known = _known(level)
        # a pixel darker than what was added says that nothing was
        if not np.isfinite(middle[places]).all() or (offset and dark < 0.95 * offset):
            continue
        inverse = np.linalg.inv(known[np.ix_(places, places)])
        away = mean - offset - middle[places]
        misfit = np.log1p((inverse * (covariance + np.outer(away, away))).sum() / len(places))
        score = -0.5 * np.linalg.slogdet(inverse)[1] / len(places) + 0.75 * misfit
        if 10 in places:  # cirrus sees no ground: the darkest band over fields, sand, sea and cloud alike
            light = (mean - offset).clip(0) + 5e-4
            score -= 0.4 * np.log(np.delete(light, places.index(10)).min() / light[places.index(10)])
        key = (name, level, -round(offset / SCALES["DN"]))
        found[key] = min((score, misfit), found.get(key, (np.inf, np.inf)))
    return found


def _guess(scores: Mapping[tuple, tuple], place: int, fits: bool) -> Guess:
    """The best value of one part of the keys, against the best of another value of it."""
    best: dict[Any, float] = {}
    for key, (score, _) in scores.items():
        best[key[place]] = min(score, best.get(key[place], np.inf))
    first, *others = sorted(best, key=lambda value: best[value])
    margin = best[others[0]] - best[first] if others else 1.0
    sure = float(1 / (1 + np.exp(-SLOPE * margin)))
    return Guess(first if fits and sure >= SURE else None, sure, others[0] if others else None)


def spectra_of(images: Any) -> np.ndarray:
    """Spectra (n, C) float64 of up to 4,096 evenly spread pixels; channels without any value are NaN.

    Raises:
        ValueError: no image, or too few pixels with a value in every channel that has any.
    """
    values = np.array(as_array(images), np.float64)
    if values.ndim not in (2, 3, 4):
        raise ValueError(f"pixels are (C, H, W), (N, C, H, W) or spectra (n, C); got {values.shape}")
    values[np.isin(values, SATURATED) | (values < 1.001 * LOWEST * bands.DN_PER_REFLECTANCE)] = np.nan
    flat = values if values.ndim == 2 else np.moveaxis(values, -3, -1).reshape(-1, values.shape[-3])
    flat = flat[:: max(len(flat) // (4 * PIXELS), 1) | 1]  # odd, so that it walks through all columns
    there = np.isfinite(flat).mean(0) > 0.1
    whole = flat[np.isfinite(flat[:, there]).all(1)]
    if len(whole) < LEAST or there.sum() < 3:
        raise ValueError(f"{len(whole)} pixels, values in {there.sum()} bands; {LEAST} and three bands tell something")
    return whole[:: max(len(whole) // PIXELS, 1)]


def identify(images: Any) -> Identity:
    """What an array or a scene holds, from its pixels alone: names and attributes are not looked at.

    Args:
        images: (C, H, W), (N, C, H, W), spectra (n, C), or a scene, in any order, unit and level; NaN is no value.

    Returns:
        Order, level, offset, scale and resampling, each with how sure it is and the runner-up; None is "can't tell".

    Raises:
        ValueError: no order of so many channels is known, or too few pixels.

    >>> import bandmask as bm
    >>> identify(bm.sample_scene()[:, :256, :256]).order.value
    'satclip'
    """
    spectra = spectra_of(images)
    count, there = spectra.shape[1], np.isfinite(spectra).all(0)
    orders = {name: order for name, order in ORDERS.items() if len(order) == count}
    if not orders:
        raise ValueError(f"no order of {count} channels is known; known: {sorted({len(o) for o in ORDERS.values()})}")
    spectra = spectra[:, there]
    orders = {name: tuple(np.array(order)[there].tolist()) for name, order in orders.items()}
    high = np.percentile(spectra, 99)
    scale = "0-1" if high <= 3 else "0-255" if spectra.max() <= 255 else "DN"
    spectra = spectra * SCALES[scale]
    if scale == "0-255":  # stretched by an unknown factor: that which makes it as bright as others are
        spectra = spectra * (0.18 / max(spectra.mean(), 1e-9))
    told = scale != "0-255"
    as_read = _scores(spectra, orders, (0.0, ADDED * SCALES["DN"])[: 1 + told])
    scores = {(*key, scale): found for key, found in as_read.items()}
    if scale == "DN":
        scores |= {(*key, "DN / 1000"): found for key, found in _scores(10 * spectra, orders, (0.0,)).items()}
    misfit = min(far for _, far in scores.values())
    fits = [misfit <= MISFIT and (told or not place) for place in range(3)] + [True]
    order, level, offset, told_scale = (_guess(scores, place, fit) for place, fit in enumerate(fits))
    if np.percentile(spectra, 1, axis=0).min() > 0.2:  # bright throughout: cloud, snow, or what was added
        offset = Guess(None, 0.5, offset.runner_up)
    values, grids = np.asarray(as_array(images), np.float64), dict[int, Guess]()
    if values.ndim > 2 and min(values.shape[-2:]) >= 24:
        known = ORDERS[order.value] if order.value else ()
        for gsd in (60, 20):
            some = [place for place, band in enumerate(known) if bands.BY_NAME[band].gsd_m == gsd and there[place]]
            if some:
                likely = grids[60].value if grids else ""
                grids[gsd] = resampling(values.reshape(-1, *values.shape[-3:])[:64, some], gsd // 10, likely)[0]
    return Identity(order, level, offset, told_scale, grids, float(misfit))


def _kernel(method: str, away: np.ndarray) -> np.ndarray:
    """Weight of a coarse pixel, by its distance in coarse pixels."""
    x = np.abs(away)
    if method == "nearest":
        return ((away > -0.5) & (away <= 0.5)).astype(float)
    if method == "bilinear":
        return np.clip(1 - x, 0, None)
    if method == "cubic":  # Keys 1981, a = −0.5
        near, far = 1.5 * x**3 - 2.5 * x**2 + 1, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    else:
        near, far = 2 / 3 - x**2 + x**3 / 2, (2 - x).clip(0) ** 3 / 6
    return np.where(x < 1, near, np.where(x < 2, far, 0))


@functools.cache
def _upsampling(method: str, size: int, ratio: int, phase: int) -> np.ndarray:
    """(size, k): pixels of 10 m from coarse ones along an axis, whose grid begins `phase` pixels before."""
    place = (np.arange(size) + phase + 0.5) / ratio - 0.5
    return _kernel(method, place[:, None] - np.arange(np.floor(place[0]) - 1, np.ceil(place[-1]) + 2))


@functools.cache
def _again(method: str, size: int, ratio: int, phase: int) -> np.ndarray:
    """(size, size): undo an interpolation by least squares and make it anew as a cubic spline; edges repeat."""
    weight = _upsampling(method, size, ratio, phase)
    used = np.flatnonzero(np.abs(weight).sum(0) > 1e-9)
    nearest = np.abs(np.arange(weight.shape[1])[:, None] - used).argmin(1)
    return _upsampling("cubic spline", size, ratio, phase) @ np.linalg.pinv(weight[:, used], 1e-3)[nearest]


@functools.cache
def _outside(method: str, size: int, ratio: int, phase: int) -> np.ndarray:
    """(size, size): what upsampling along an axis can't have made, in units of what it keeps of a random signal."""
    made, values, _ = np.linalg.svd(_upsampling(method, size, ratio, phase), full_matrices=False)
    made = made[:, values > 1e-3 * values[0]]
    return (np.eye(size) - made @ made.T) / np.sqrt(1 - made.shape[1] / size)


def _unexplained(layers: np.ndarray, method: str, ratio: int, phase: int) -> float:
    """RMS of what interpolation down bands (N, k, H, W) can't have made, by the median of bands, of each 4th column."""
    left = _outside(method, layers.shape[-2], ratio, phase) @ layers[..., ::4]
    return float(np.median(np.sqrt((left**2).mean((-2, -1)))))


def resampling(layers: np.ndarray, ratio: int, likely: str = "") -> tuple[Guess, tuple[int, int]]:
    """How bands (N, k, H, W) of a grid `ratio` times as coarse came to 10 m, and the grid's phase (down, across).

    Interpolation leaves a signal in a linear space of its own: what lies outside it is rounding. Bands and images
    decide by their median, so a broken one doesn't. At a ratio of 2 bilinear and cubic span one space; then what is
    `likely`, such as by the bands of 60 m, is named.
    """
    flat = np.nan_to_num(layers - np.nanmean(layers, axis=(-2, -1), keepdims=True))
    found, turned = {}, (flat, flat.swapaxes(-2, -1))
    for method in dict.fromkeys([likely, *METHODS] if likely in METHODS else METHODS):
        down, across = (min((_unexplained(one, method, ratio, p), p) for p in range(ratio)) for one in turned)
        found[method] = max(down[0], across[0]), (down[1], across[1])
    best, typical = min(found.values())[0], max(float(np.median(flat.std((-2, -1)))), 1e-12)
    rounding = 0.5 if typical > 0.5 else 0.5e-4  # of DN, or of them as reflectance
    fits = best < max(rounding, 0.02 * typical)
    method, *others = sorted(found, key=lambda name: max(found[name][0] - best, 0.1 * rounding))
    return Guess(method if fits else None, 0.99 if fits else 0.5, others[0]), found[method][1]


def regrid(images: np.ndarray) -> np.ndarray:
    """Images (N, 13, H, W), 20 and 60 m bands made anew from their own pixels: alike however they came to 10 m.

    Each image's interpolation is found and undone by least squares, then made as a cubic spline; where none explains
    it, means of blocks stand in. NaN stays.
    """
    result, height, width = np.array(images, np.float64), *images.shape[2:]
    for image in result:
        likely = ""
        for gsd in (60, 20):
            there = [c for c, band in enumerate(bands.BANDS) if band.gsd_m == gsd and np.isfinite(image[c]).any()]
            if there:
                values, ratio = image[there], gsd // 10
                whole = np.where(np.isfinite(values), values, np.nanmean(values, axis=(-2, -1), keepdims=True))
                guess, (down, across) = resampling(whole[None], ratio, likely)
                likely = guess.value or "nearest"
                again = _again(likely, height, ratio, down) @ whole @ _again(likely, width, ratio, across).T
                image[there] = np.where(np.isfinite(values), again, np.nan)
    return result


def too_dark(dn: np.ndarray, name: str) -> float | None:
    """The DN at which a band lies below no light at all, as where an offset was taken off that none had added; or None.

    NaN is no value. B10, which sees no ground, is near 0 throughout; of others a shadow may be somewhat below.
    """
    share, least = (50, -50) if name == "B10" else (5, -300)
    low = float(np.nanpercentile(dn, share))
    return low if low < least else None


def check_offset(offset: float | None) -> None:
    """A ValueError of an `offset=` that takes nothing off: above 0, less than a DN, or no number."""
    if offset is not None and (isinstance(offset, bool | str) or not (offset == 0 or -np.inf < offset <= -1)):
        raise ValueError(f"offset={offset!r} is no DN to take off; give -1000 if 1000 were added, or 0 if none were")


def of_tags(scale: float, offset: float) -> tuple[float, float]:
    """What a raster's tags state, as DN = factor × stored + offset; they may speak of reflectance, or of DN.

    A ValueError of tags that can be meant by nobody.
    """
    if not 0 < scale < np.inf or not np.isfinite(offset):
        raise ValueError(f"tags state scale {scale:g} and offset {offset:g}; write them anew")
    if scale >= 0.01 and 0 < abs(offset) < 1:  # of reflectance, beside DN
        raise ValueError(f"tags state an offset of {offset:g}, reflectance, and a scale of {scale:g}; write both anew")
    unit = 1e4 if scale < 0.01 else 1.0
    return scale * unit, offset * unit


def check(spectra: np.ndarray, names: Sequence[str], *, source: str = "", told: bool = False, level: str = "") -> str:
    """The one guard of scenes, packs and models: do pixels contradict the order that they were read in?

    Args:
        spectra: (n, C) DN without the added offset, or (N, n, C) of several images; channels without values are NaN.
        names: of the channels, as they were read.
        source: whose they are.
        told: whether 1000 DN were added is known, or asked elsewhere.
        level: whose spectra are taken because nobody states one; else "".

    Returns:
        A note, warned of as well, where 1000 DN may have been added, DN are surely 1000 a reflectance (of fewer than
        13 bands often not told), B10 isn't the darkest band, or pixels are surely of the other level; else "".

    Raises:
        ValueError: another order fits clearly better; it is named, and how sure that is.
    """
    some = some_bright(spectra) if spectra.ndim == 3 and not told else ""
    spectra = spectra.reshape(-1, spectra.shape[-1])
    names, there = tuple(names), np.isfinite(spectra).any(0)
    spectra = spectra[:, there][np.isfinite(spectra[:, there]).all(1)] * SCALES["DN"]
    if len(spectra) < LEAST or there.sum() < 3:
        return ""
    rivals = {"": names} | {n: o for n, o in ORDERS.items() if len(o) == len(names) and o != names}
    rivals = {n: tuple(np.array(o)[there].tolist()) for n, o in rivals.items()}
    scores = _scores(spectra, rivals, (0.0,))
    best = min(scores, key=lambda key: scores[key])
    as_read = {key: score for key, score in scores.items() if not key[0]}
    margin = min(as_read.values())[0] - scores[best][0]
    means, source = spectra.mean(0), f"{source}: " if source else ""
    if margin > REFUSE and ("B10" in rivals[""] or scores[best][1] < MISFIT):
        listed = ", ".join(f"{name} {value / SCALES['DN']:.0f}" for name, value in zip(rivals[""], means, strict=True))
        sure = f"{1 / (1 + np.exp(-SLOPE * margin)):.0%} sure"
        raise ValueError(
            f"{source}band order is wrong: pixels are in the order of {best[0]!r} ({sure}): "
            f"{' '.join(ORDERS[best[0]])}. Read it in that. Mean DN as read: {listed}"
        )
    low, note = np.percentile(spectra, 1, axis=0).min() / SCALES["DN"], ""
    if not told and low > BRIGHT:
        note = f"darkest pixels are at {low:.0f} DN: 1000 were added, or there is cloud or bright ground everywhere"
        note += "; if added, take them off, 0.1 of reflectance (open_scene does)"
    elif min(as_read.values())[0] - min(_scores(10 * spectra, {"": rivals[""]}, (0.0,)).values())[0] > DARKER:
        note = "ten times too dark for any image: 1000 DN a reflectance? Multiply by 10"
    elif some:
        note = some
    elif "B10" in rivals[""] and rivals[""][means.argmin()] != "B10":
        note = "B10 isn't the darkest band, as it should be: thick cirrus, or another order of bands"
    elif level and (found := _guess(as_read, 1, scores[best][1] <= MISFIT).value or level) != level:
        note = f"pixels look like {found}, and {level} is taken; "
        note += f"say so where one can: bm.fill(…, moments={found!r}), bm.guard(…, level={found!r}), bm.pack likewise"
    if note:
        warnings.warn(source + note, stacklevel=3)
    return note


def some_bright(dn: np.ndarray) -> str:
    """A note where of several images, (N, n, C) DN, NaN is no value, some have no dark pixel; else ""."""
    least = np.where(np.isnan(dn), np.inf, dn).min((1, 2))
    bright = (least > BRIGHT) & np.isfinite(least)
    if not bright.any():
        return ""
    return (
        f"{bright.sum()} of {len(bright)} images have no pixel below {BRIGHT} DN: cloud or bright ground, or 1000 DN "
        "of a later processing baseline in them alone: take those off"
    )


def judge(
    stored: np.ndarray, names: Sequence[str], added: Any = 0.0, *, source: str = "", doubt: Any = None, level: str = ""
) -> str:
    """The guard of scenes and packs: can these be DN, in this order, without 1000 that nobody mentions? A note, or "".

    Args:
        stored: (n, C) before the offset, NaN where there is no value.
        names: of the channels.
        added: the offset, one or (C,).
        source: whose they are.
        doubt: why 1000 DN may have been added, "" if only nobody says; None where somebody does.
        level: as of `check`.

    Raises:
        ValueError: reflectance, percent or 8 bit; a band below no light; another order; an offset to be asked for.
    """
    where, dn = f"{source}: " if source else "", stored + added
    middle, high, top = np.nanmedian(stored), np.nanpercentile(stored, 99), np.nanmax(stored)
    fractions = (np.nan_to_num(stored) % 1).any()
    if middle <= 3 and fractions:
        raise ValueError(f"{where}values are in reflectance already (median {middle:.3g}); multiply by 10000")
    if top <= 255 or (high <= 255 and fractions):
        said = f"values are 8 bit or percent (median {middle:.3g}, up to {top:.0f}), a picture and no measurement"
        raise ValueError(f"{where}{said}; DN are 10000 a reflectance, 16 bit")
    if middle > 20_000:
        raise ValueError(f"{where}half of all values are above {middle:.0f} DN; check the scale in its tags")
    some = np.flatnonzero(np.isfinite(stored).any(0)).tolist()
    small = [names[c] for c in some if np.nanmax(stored[:, c]) <= 3 and (np.nan_to_num(stored[:, c]) % 1).any()]
    if small:  # one file of several
        raise ValueError(f"{where}{', '.join(small)} in reflectance, the others in DN; multiply by 10000")
    for name, values, offset in [(names[c], dn[:, c], np.broadcast_to(added, len(names))[c]) for c in some]:
        if offset < 0 and (low := too_dark(values, name)) is not None:
            said = f"an offset of {offset:g} puts {name} at {low:.0f} DN, below no light at all"
            raise ValueError(f"{where}{said}: none was added, or it was taken off already; give offset=0")
    why, asked = doubt or "", bool(doubt)
    dark = {names[c]: float(np.nanpercentile(dn[:, c], 1)) for c in some}
    if "B10" in dark:
        why, asked = f"B10, which sees no ground, is at {dark['B10']:.0f} DN", dark["B10"] > BRIGHT
    elif not why:
        why, asked = f"darkest pixels are at {min(dark.values()):.0f} DN", min(dark.values()) > BRIGHT
    note = check(dn.astype(np.float64), names, source=source, told=True, level=level)
    if asked and doubt is not None:
        raise ValueError(
            f"{where}{why}. Processing baseline 04.00 on adds 1000 DN, to what it reprocessed too, and no file says. "
            "Open the whole SAFE product, or give offset=-1000 (or 0, if none was added or it was taken off already)"
        )
    untold = doubt is not None and "B10" not in dark
    return "; ".join([note] * bool(note) + [f"{why}: nothing says whether 1000 DN were added; 0 is taken"] * untold)
