"""A model in service meets an incomplete image: what is missing is hidden and filled, and what to expect is measured.

Complete images give bit for bit what the model alone gives. NumPy alone, unless the model needs torch.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from tqdm import tqdm

from bandmask import bands as band_table
from bandmask import identity, models, moments
from bandmask.stats import Agreement

ALL, DN = band_table.NAMES, 10_000.0
SATURATED = 65_535  # DN of a pixel that is too bright, as ESA and most archives write it
PIXELS = 4096  # of an image, that losses of a pixel model are tried on
FEW = ("B02 B03 B04 B08", "B02 B04")  # what may be left
EVERY = (slice(None), slice(None))


class Expected(NamedTuple):
    """Agreement with the model's own answers to complete images, for one loss; the interval is over images."""

    score: float
    low: float
    high: float
    metric: str  # `F1` of class 1, `mIoU`, `accuracy` where an image is one answer, or `R²` of numbers
    by: str  # which fill
    images: int


@dataclass
class Answer:
    """What the model says, and of what: numpy takes it for its `values`."""

    values: Any  # as the model gives it, of the kind that came in: (B, …), or without B of one image
    filled: dict[str, float]  # share of pixels that were filled, of each band that the model takes
    by: str  # which fill, "" where nothing was missing
    nodata: np.ndarray  # bool (B, H, W) or (H, W): nothing is visible there, and maps of numbers are NaN
    _expect: Callable[[], Expected | None] = field(repr=False)

    @cached_property
    def expected(self) -> Expected | None:
        """What this loss costs, measured on the guard's own complete images; None without such images."""
        return self._expect()

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """The values, so that an answer can be drawn and counted."""
        return np.asarray(self.values, dtype)


def guard(
    predict: Any, bands: str | Iterable[str] = (), *, images: Iterable[Any] = (),
    fills: Mapping[str, Any] | None = None, **options: Any,
) -> Guard:  # fmt: skip
    """A model that takes incomplete images: `model(scene)` hides what is missing, fills it, and asks the model.

    Args:
        predict: a torch module, an ONNX session, a LightGBM booster, a scikit-learn estimator, any function of an
            array; or a name of `bm.models.NAMES`, which knows the rest.
        bands: what the model takes, in its order.
        images: complete images of your own, each (C, H, W): for each loss the fill that agrees best on them is used,
            and `answer.expected` says how well it does.
        fills: more of them by name, such as `{"mine": bm.fit_moments(images)}`.
        options: `takes`, `unit`, `mean`, `sd`, `multiple`, `level`, `decide`, `tile`, `margin`: see `Guard`.

    Raises:
        ValueError: unknown words or bands, images with gaps.

    >>> model = guard(lambda x: x.mean(1), "B04 B08")
    >>> answer = model(np.stack([np.full((4, 4), 0.1), np.full((4, 4), np.nan)]))
    >>> answer.filled, answer.by, answer.values.shape
    ({'B08': 1.0}, 'all', (4, 4))
    """
    known = models.load(predict) if isinstance(predict, str) else {"predict": predict, "bands": bands}
    return Guard(**{**known, **options}, fills=dict(fills or {}), images=list(images))


@dataclass
class Guard:
    """What `guard` makes; call it with images."""

    predict: Any
    bands: Any  # ESA names, in the model's order
    takes: str = "images"  # float32 (B, C, H, W), or `pixels`, (n, C)
    unit: str = "reflectance"  # of what it takes: DN / 10000, or `DN`
    mean: Any = None  # taken off before the model, one a band, in that unit
    sd: Any = None  # divided by, likewise
    multiple: int = 1  # sides are padded to a multiple of this, and a map is cut again
    level: str = "L1C"  # of what it takes, `L1C` or `L2A`: whose spectra gaps are filled by
    decide: Any = None  # makes classes of answers: a threshold, a function, `none`; default: the largest channel
    tile: int | None = None  # pixels a side that are read and asked at a time; default: rows of pixels, whole images
    margin: int = 0  # pixels around a tile that the model sees too
    fills: dict[str, Any] = field(default_factory=dict)
    images: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Check every word, and take statistics of the images."""
        words = self.bands.split() if isinstance(self.bands, str) else [getattr(b, "name", b) for b in self.bands]
        self.bands = band_table.channels_of((len(words), 1, 1), words)
        for name, known in (("takes", ("images", "pixels")), ("unit", ("reflectance", "DN"))):
            if getattr(self, name) not in known:
                raise ValueError(f"unknown {name} {getattr(self, name)!r}; available: {', '.join(known)}")
        for name in ("mean", "sd"):
            if (value := getattr(self, name)) is not None:
                setattr(self, name, np.asarray(value, np.float32).reshape(len(self.bands), 1, 1))
        if not self.bands:
            raise ValueError("say which bands the model takes, in its order: guard(predict, 'B04 B08')")
        self.channels = [ALL.index(name) for name in self.bands]
        shipped = moments.shipped(self.level)
        if not shipped["all"].known[self.channels].all():  # B10 of an L2A model: told as at the top of the atmosphere
            shipped = moments.shipped("L1C")
        self.adapted: dict[frozenset[str], Any] = {}  # models for one loss, which `adapt` makes
        self.adaptation: dict[str, Any] = {}  # how that went
        self._chosen: dict[frozenset[str], tuple[str, Expected]] = {}
        self.images = self._complete(self.images)
        own = {}
        if len(self.images) > 1:  # on one image it could not be held out
            own["own"] = moments.Moments.of_spectra(np.vstack([image.spectra for image in self.images]))
        self.fills = {**shipped, **own, **self.fills}

    def __call__(
        self, images: Any, *, names: str | Sequence[str] | None = None, mask: Any = None,
        distrust: str | Iterable[str] = (), fill: str | None = None, check: bool = True, progress: bool = False,
    ) -> Answer:  # fmt: skip
        """The model's answer.

        Args:
            images: `(C, H, W)` or `(B, C, H, W)`, numpy, torch or xarray with a dimension `band`; DN or reflectance.
                NaN is missing; so are 65535, and 0 in all bands, or in all pixels of a band but B10.
            names: of the channels; without them those of the array, else the model's own, or all 13 in SatCLIP's
                order. Bands that the model doesn't take help to fill.
            mask: bool, True where a pixel is missing: `(H, W)` or of the images' shape, such as ESA's quality masks.
            distrust: bands to treat as lost though they are there, or `auto`: what `bm.detect` names, of a scene.
            fill: one of `self.fills`, `zero`, `mean`, `nearest`, or `none`, which hands NaN to the model. Default:
                what agrees best on the guard's own images, else `all`.
            check: refuse pixels that contradict the order of bands they are read in, as `bm.identify` knows it.
            progress: show a bar over tiles.

        Raises:
            ValueError: channels without names, or in another order; numbers that are neither DN nor reflectance;
                unknown words; an answer that is no map where tiles are asked for.
        """
        source = _Source(images, names, self.bands)
        distrusted, (height, width) = self._distrusted(images, distrust), source.size
        step = self.tile or (height if self.takes == "images" else max(1, 2**18 // (width * source.count)))
        tops, lefts = range(0, height, step), range(0, width, self.tile or width)
        windows = [
            (slice(y, min(y + step, height)), slice(x, min(x + (self.tile or width), width)))
            for y, x in itertools.product(tops, lefts)
        ]
        values, filled, missing, by = np.empty(0), np.zeros(len(self.bands)), np.zeros(len(source.names)), ""
        nodata = np.zeros((source.count, height, width), bool)
        for rows, columns in tqdm(windows, "tiles", disable=not progress):
            near, inner = _grown(rows, self.margin, height), _grown(columns, self.margin, width)
            cut = (
                slice(rows.start - near.start, rows.stop - near.start),
                slice(columns.start - inner.start, columns.stop - inner.start),
            )
            block, hidden = source.read((near, inner), mask, distrusted)
            if check and rows.start == columns.start == 0:
                spectra = np.where(hidden, np.nan, block).swapaxes(0, 1).reshape(block.shape[1], -1).T
                dn = spectra[:: max(1, len(spectra) // PIXELS)] * (DN / source.scale())
                identity.check(dn, source.names, source="these images")
            ready, gaps, nothing, used = self.fill(block, hidden, source, fill)
            answer, by = self.ask(ready, gaps), used or by
            filled += gaps[(slice(None), slice(None), *cut)].sum((0, 2, 3))
            missing += hidden[(slice(None), slice(None), *cut)].sum((0, 2, 3))
            nodata[:, rows, columns] = nothing[(slice(None), *cut)]
            if len(windows) == 1:
                values = answer
                break
            if answer.shape[-2:] != ready.shape[-2:]:
                raise ValueError(f"an answer of shape {answer.shape} is no map of its tile; leave tile=None")
            if not values.size:
                values = np.empty((*answer.shape[:-2], height, width), answer.dtype)
            values[..., rows, columns] = answer[(..., *cut)]
        is_map = values.shape[-2:] == (height, width)
        if not is_map and (empty := nodata.all((1, 2))).any():
            raise ValueError(
                f"image {int(empty.argmax())} of {source.count} holds no value; there is nothing to ask of"
            )
        if is_map and nodata.any() and values.dtype.kind == "f":
            values = np.where(nodata if values.ndim == 3 else nodata[:, None], values.dtype.type(np.nan), values)
        shares = dict(zip(self.bands, (filled / nodata.size).tolist(), strict=True))
        lost = _gone(source.names, missing / nodata.size)
        lost = lost if lost & set(self.bands) else frozenset(name for name, share in shares.items() if share)
        shares = {name: share for name, share in shares.items() if share}
        where = nodata if source.batched else nodata[0]
        return Answer(source.back(values, is_map), shares, by, where, lambda: self.expect(lost, by))

    def expect(self, lost: str | Iterable[str], fill: str = "") -> Expected | None:
        """What the loss of these whole bands costs, on the guard's own images; None without images or a loss.

        Without a fill it is the best: chosen on one half of the images and measured on the other, both ways round.
        """
        gone = frozenset(band_table.parse_bands(lost))
        best = self._best(gone)
        if best[1] is None:
            return None
        return best[1] if fill in ("", best[0]) else self._measured(gone, [fill])[1]

    def robustness(
        self, images: Iterable[Any] = (), losses: str | Sequence[str] = "single groups few-left", *,
        labels: Sequence[Any] | None = None, fills: Sequence[str] = (), progress: bool = False,
    ) -> pd.DataFrame:  # fmt: skip
        """Agreement with the model's own answers to complete images, for each loss of whole bands and each fill.

        Args:
            images: complete ones, each `(C, H, W)`; default: those that the guard was made with.
            losses: `single`, `groups` (of `bands.GROUPS`), `few-left`, `all` (every subset), or a list of band sets
                that are lost: `["B10", "B01 B09 B10"]`.
            labels: the truth of each image as the model's classes, -1 where unknown; adds `truth` and its interval.
            fills: default: zero, mean, nearest and all that the guard has.
            progress: show a bar.

        Returns:
            A row a loss and fill: `lost`, `left` (how many bands), `fill`, `score`, `low`, `high`, `same` (share of
            equal classes), `metric`. The complete images come first. Intervals are over images: NaN of fewer than 3.
        """
        given = self._complete(images) or self.images
        if not given:
            raise ValueError("give complete images: robustness(images), or guard(…, images=…)")
        own, rows = [self._lose(image, frozenset()) for image in given], []
        names = list(fills) or [*moments.PLAIN, *self.fills]
        for gone in tqdm([frozenset(), *self._losses(losses)], "losses", disable=not progress):
            for name in names if gone else ["complete"]:
                found = [self._lose(image, gone, name) for image in given]
                like = Agreement.of(own, found, self._channels)
                row = {"lost": " ".join(band_table.parse_bands(gone)), "left": len(set(self.bands) - gone)}
                row |= {"fill": name, "score": like.score(), **dict(zip(("low", "high"), like.interval(), strict=True))}
                row |= {"same": like.same, "metric": like.metric}
                if labels is not None:
                    true = [
                        np.asarray(t)[i.thinned] if np.ndim(t) else np.array([t])
                        for t, i in zip(labels, given, strict=True)
                    ]
                    right = Agreement.of(true, [part.reshape(t.shape) for part, t in zip(found, true, strict=True)])
                    row |= {"truth": right.score()}
                    row |= dict(zip(("truth_low", "truth_high"), right.interval(), strict=True))
                rows.append(row)
        return pd.DataFrame(rows)

    def adapt(
        self, images: Iterable[Any], lost: str | Iterable[str], *, fill: str = "", steps: int = 100,
        batch_size: int = 4, side: int = 256, lr: float = 1e-4, taps: Sequence[str] = ("encoder",), seed: int = 0,
    ) -> Guard:  # fmt: skip
        """A guard with a copy of a torch model that was aligned for the loss of these bands; no labels.

        The copy sees filled images, and learns the original's features and outputs of the complete ones; batch norms
        stay. Every second image trains, the others judge: the copy is kept only if it agrees better on them than the
        original behind the fill that is best on them. `adaptation` of what is returned says how well both do.

        Args:
            images: complete ones, each `(C, H, W)`, two or more.
            lost: bands that are gone; for other losses, and complete images, the original goes on.
            fill: what the copy is aligned behind; default: what agrees best on the images that train.
            steps: of training.
            batch_size: crops a step.
            side: of the crops, pixels.
            lr: of AdamW.
            taps: submodules whose outputs are aligned beside the model's, where it has them.
            seed: of the crops.

        Raises:
            ValueError: no torch module, or fewer than two images.
        """
        import torch

        gone, given = frozenset(band_table.parse_bands(lost)), list(images)
        if not isinstance(self.predict, torch.nn.Module) or len(given) < 2 or not gone & set(self.bands):
            raise ValueError("adapt takes a torch module, two images or more, and bands that the model takes")
        train, test = (replace(self, images=part) for part in (given[::2], given[1::2]))
        names = [name for name in self.fills if name != "own"]
        best, pairs = fill or train._measured(gone, names)[0], []
        for image in train.images:
            hidden = np.broadcast_to(np.isin(image.source.names, list(gone))[:, None, None], image.block.shape)
            both = [train.fill(image.block, h, image.source, best)[0] for h in (hidden & False, hidden)]
            pairs.append([torch.from_numpy(self._scaled(part)) for part in both])
        side = side // self.multiple * self.multiple
        student = align(self.predict, pairs, steps, batch_size, side, lr, taps, seed)
        own = [test._lose(image, frozenset()) for image in test.images]

        def judged(fill: str) -> Expected:
            like = Agreement.of(own, [test._lose(image, gone, fill) for image in test.images], test._channels)
            return Expected(like.score(), *like.interval(), like.metric, fill, len(own))

        fills = {name: judged(name) for name in {*names, best}}
        before = max(fills.values(), key=lambda expected: expected.score)
        test.adapted = {gone & set(self.bands): student}
        after = judged(best)
        better = copy.copy(self)
        better.adaptation = {
            "before": before,
            "same fill": fills[best],
            "after": after,
            "kept": after.score > before.score,
        }
        if after.score > before.score:
            better.adapted = {**self.adapted, **test.adapted}
            better._chosen = {**self._chosen, gone: (best, after)}
        return better

    def fill(
        self, block: np.ndarray, hidden: np.ndarray, source: _Source, how: Any
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, str]:
        """Channels as the model takes them but for scaling, their gaps, where nothing is visible, and by which fill."""
        held, shape = list(source.names), (len(block), len(self.bands), *block.shape[2:])
        there, mine = [n in held for n in self.bands], [held.index(n) for n in self.bands if n in held]
        gaps, ready = np.ones(shape, bool), np.zeros(shape, np.float32)
        nothing = np.asarray(hidden.all(1))
        gaps[:, there], ready[:, there] = hidden[:, mine], block[:, mine]
        scale = source.scale()
        if not gaps.any() or nothing.all():
            return self._united(np.where(gaps, np.float32(0), ready), scale), gaps, nothing, ""
        if how is None:
            how = self._best(_gone(held, hidden.mean((0, 2, 3))))[0]
        name = how if isinstance(how, str) else "own"  # moments of the images beside the one that is tried
        if name == "none":
            return self._united(np.where(gaps, np.float32(np.nan), ready), scale), gaps, nothing, name
        teller = moments.Plain(name, self.fills["all"]) if name in moments.PLAIN else self.fills.get(name)
        teller = teller if isinstance(how, str) else how
        if teller is None:
            raise ValueError(f"unknown fill {name!r}; available: {', '.join((*moments.PLAIN, 'none', *self.fills))}")
        needed = gaps.any((0, 2, 3)) & ~teller.known[self.channels]
        if needed.any():
            lacking = ", ".join(np.array(self.bands)[needed])
            raise ValueError(f"the fill {name!r} knows nothing of {lacking}; take another of {', '.join(self.fills)}")
        spectra = np.zeros((13, *shape[:1], *shape[2:]), np.float32)
        unseen = np.ones(spectra.shape, bool)
        places = [ALL.index(n) for n in held]
        unseen[places] = hidden.swapaxes(0, 1)
        spectra[places] = np.where(hidden, np.float32(0), block).swapaxes(0, 1) / np.float32(scale)
        moments.fill_gaps(spectra, unseen, teller, self.channels)
        told = self._united(spectra[self.channels].swapaxes(0, 1), 1.0)
        return np.where(gaps, told, self._united(ready, scale)), gaps, nothing, name

    def ask(self, ready: np.ndarray, gaps: np.ndarray | None = None) -> np.ndarray:
        """The model's answer to (B, C, h, w) in its unit, scaled and padded for it; cut again where it is a map."""
        gone = np.zeros(len(self.bands), bool) if gaps is None else gaps.all((0, 2, 3))
        model = self.adapted.get(frozenset(np.array(self.bands)[gone].tolist()), self.predict)
        batch, channels, height, width = ready.shape
        ready = self._scaled(ready)
        if self.takes == "pixels":
            found = models.ask(model, np.ascontiguousarray(np.moveaxis(ready, 1, -1)).reshape(-1, channels))
            found = found.reshape(batch, height, width, *found.shape[1:])
            return np.moveaxis(found, -1, 1) if found.ndim == 4 else found
        more = [-side % self.multiple for side in (height, width)]
        if any(more):
            ready = np.pad(ready, ((0, 0), (0, 0), (0, more[0]), (0, more[1])), mode="edge")
        found = models.ask(model, np.ascontiguousarray(ready))
        return found[..., :height, :width] if found.shape[-2:] == ready.shape[-2:] else found

    def _scaled(self, ready: np.ndarray) -> np.ndarray:
        ready = ready if self.mean is None else ready - self.mean
        return ready if self.sd is None else ready / self.sd

    # --- what to expect

    def _complete(self, images: Iterable[Any]) -> list[_Image]:
        """Complete images to try losses on; for pixel models thinned to some `PIXELS` each."""
        found = []
        for image in images:
            source = _Source(image, None, self.bands)
            block, hidden = source.read(EVERY, None, ())
            if source.batched or hidden.any() or set(self.bands) - set(source.names):
                raise ValueError("losses are tried on complete images, each (C, H, W), with all of the model's bands")
            step = math.ceil(math.sqrt(block[0, 0].size / PIXELS)) if self.takes == "pixels" else 1
            thin = (slice(None, None, step), slice(None, None, step))
            spectra = np.full((block[0, 0].size, 13), np.nan)
            spectra[:, [ALL.index(n) for n in source.names]] = block[0].reshape(block.shape[1], -1).T
            spectra = spectra[:: max(1, len(spectra) // 10_000)] / source.scale()
            found.append(_Image(block[(..., *thin)], source, thin, spectra))
        for image in found:  # moments of the images beside it, so that it stays held out
            others = [other.spectra for other in found if other is not image]
            image.others = moments.Moments.of_spectra(np.vstack(others)) if others else None
        return found

    def _lose(self, image: _Image, gone: frozenset[str], fill: str | None = None) -> np.ndarray:
        """Answer, as it is compared, to an image without these bands."""
        hidden = np.zeros(image.block.shape, bool)
        hidden[:, [n in gone for n in image.source.names]] = True
        ready, gaps, _, _ = self.fill(image.block, hidden, image.source, image.others if fill == "own" else fill)
        answer = self.ask(ready, gaps)
        if callable(self.decide):
            return np.asarray(self.decide(answer))
        if isinstance(self.decide, int | float):
            return answer > self.decide
        if self.decide == "none" or answer.dtype.kind != "f" or answer.ndim not in (2, 4) or answer.shape[1] == 1:
            return answer
        self._channels = answer.shape[1]
        return answer.argmax(1)

    _channels = 0  # of answers that are classes

    def _losses(self, losses: str | Sequence[str]) -> list[frozenset[str]]:
        every = set(ALL)
        known: dict[str, list[Any]] = {
            "single": [{name} for name in self.bands],
            "groups": [set(group) for group in band_table.GROUPS.values()],
            "few-left": [every - set(left.split()) for left in FEW],
            "all": [set(g) for k in range(1, len(self.bands)) for g in itertools.combinations(self.bands, k)],
        }
        if isinstance(losses, str) and (unknown := set(losses.split()) - set(known)):
            raise ValueError(f"unknown losses {unknown}; available: {', '.join(known)}, or a list of band sets")
        asked = [gone for word in losses.split() for gone in known[word]] if isinstance(losses, str) else []
        asked += [] if isinstance(losses, str) else [set(band_table.parse_bands(bands)) for bands in losses]
        mine = set(self.bands)  # what takes none of them, or all, costs nothing or everything
        return list(dict.fromkeys(frozenset(gone) for gone in asked if gone & mine and mine - gone))

    def _best(self, gone: frozenset[str]) -> tuple[str, Expected | None]:
        known = {name for image in self.images for name in image.source.names}
        if gone not in self._chosen and not gone & known & set(self.bands):
            return "all", None
        if gone not in self._chosen:
            gone &= known
        if gone not in self._chosen:
            lost = [ALL.index(name) for name in gone & set(self.bands)]
            self._chosen[gone] = self._measured(gone, [n for n, fill in self.fills.items() if fill.known[lost].all()])
        return self._chosen[gone]

    def _measured(self, gone: frozenset[str], names: list[str]) -> tuple[str, Expected]:
        """Which of some fills agrees best, and how well: chosen on each half, measured on the other."""
        own = [self._lose(image, frozenset()) for image in self.images]
        tried = {n: Agreement.of(own, [self._lose(i, gone, n) for i in self.images], self._channels) for n in names}
        best = max(names, key=lambda name: tried[name].score())
        held, odd = tried[best].per_image.copy(), np.arange(len(own)) % 2 == 1
        for half in (odd, ~odd) if len(own) > 1 else ():
            chosen = max(names, key=lambda name: float(np.nan_to_num(tried[name].score(half[None].astype(float))[0])))
            held[~half] = tried[chosen].per_image[~half]
        measured = Agreement(held, tried[best].metric)
        return best, Expected(measured.score(), *measured.interval(), measured.metric, best, len(own))

    # --- what comes in

    def _distrusted(self, images: Any, distrust: str | Iterable[str]) -> tuple[str, ...]:
        if distrust != "auto":
            return band_table.parse_bands(distrust)
        if not hasattr(images, "dims"):
            raise ValueError("distrust='auto' needs a scene, from open_scene; of an array give the bands")
        from bandmask.detector import Detector

        table = Detector.shipped().distrust(images)
        return tuple(table["band"][table["suspicious"].astype(bool)])

    def _united(self, values: np.ndarray, scale: float) -> np.ndarray:
        """From DN or reflectance to the model's unit; what is in it stays to the last bit."""
        wanted = DN if self.unit == "DN" else 1.0
        if wanted == scale:
            return values
        return values / np.float32(scale) if wanted == 1 else values * np.float32(wanted / scale)


@dataclass
class _Image:
    """A complete image that losses are tried on."""

    block: np.ndarray  # (1, C, H, W)
    source: _Source
    thinned: tuple[slice, slice]  # of its rows and columns
    spectra: np.ndarray  # (n, 13) reflectance of some of its pixels
    others: Any = None  # moments that know nothing of it


class _Source:
    """An image, a batch or a scene: read by windows as (B, C, h, w) float32, with what is missing."""

    def __init__(self, images: Any, names: str | Sequence[str] | None, own: Sequence[str]) -> None:
        if hasattr(images, "dims") and "band" in images.dims:
            others = [d for d in images.dims if d != "band"]
            images = images.transpose(*others[:-2], "band", *others[-2:])
            names = [str(n) for n in images["band"].values] if names is None and "band" in images.coords else names
        if getattr(images, "ndim", 0) not in (3, 4):
            raise ValueError(f"images are arrays (C, H, W) or (B, C, H, W); got {getattr(images, 'shape', images)}")
        self.images, shape = images, tuple(images.shape)
        self.batched, self.size = len(shape) == 4, (shape[-2], shape[-1])
        self.count = shape[0] if self.batched else 1
        self.names = band_table.channels_of(shape, own if names is None and shape[-3] == len(own) else names)
        kind = np.dtype(str(images.dtype).removeprefix("torch."))
        if kind.itemsize == 1:
            raise ValueError(f"values of type {kind} are neither DN nor reflectance; give the bands as measured")
        stated = getattr(images, "attrs", {}).get("dn_per_reflectance", DN if kind.kind in "iu" else None)
        self._scale = None if stated is None else float(stated)

    def read(self, window: tuple[slice, slice], mask: Any, distrusted: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Values and what of them is missing, bool, both (B, C, h, w)."""
        part = self.images[(..., *window)]
        part = np.asarray(part.detach().cpu() if hasattr(part, "detach") else part).astype(np.float32)
        part = part if self.batched else part[None]
        hidden = ~np.isfinite(part) | (part == SATURATED)
        nought = (part == 0) | hidden
        hidden |= nought.all(1, keepdims=True)
        empty = nought.all((0, 2, 3)) & (np.array(self.names) != "B10")  # cirrus may be 0 throughout
        hidden[:, empty | np.isin(self.names, list(distrusted))] = True
        return part, hidden if mask is None else hidden | np.asarray(mask, bool)[(..., *window)]

    def scale(self) -> float:
        """DN a reflectance: stated, or told by values that can only be one of the two."""
        if self._scale is None:
            step = max(1, min(self.size) // 64)
            values = self.images[..., ::step, ::step]
            values = np.asarray(values.detach().cpu() if hasattr(values, "detach") else values)
            values = values[np.isfinite(values) & (values != SATURATED) & (values != 0)]
            high = float(np.quantile(values, 0.99)) if values.size else 0.0
            if 3 < high < 50:
                raise ValueError(f"1 % of the values are above {high:.3g}: neither reflectance (below 3) nor DN")
            self._scale = DN if high >= 50 else 1.0
        return self._scale

    def back(self, values: np.ndarray, is_map: bool) -> Any:
        """An answer as what came in: a tensor, a map with the scene's coordinates, or numpy."""
        values = values if self.batched else values[0]
        if hasattr(self.images, "detach"):
            import torch

            return torch.from_numpy(np.ascontiguousarray(values)).to(self.images.device)
        if not hasattr(self.images, "dims") or not is_map or self.batched:
            return values
        import xarray as xr

        axes = self.images.dims[-2:]
        at = {axis: self.images[axis] for axis in axes if axis in self.images.coords}
        return xr.DataArray(values, at, axes if values.ndim == 2 else ("class", *axes))


def _gone(names: Sequence[str], missing: np.ndarray) -> frozenset[str]:
    """Bands that are absent, or of which half or more is missing."""
    return frozenset(ALL) - {name for name, share in zip(names, missing.tolist(), strict=True) if share < 0.5}


def _grown(part: slice, margin: int, end: int) -> slice:
    return slice(max(0, part.start - margin), min(end, part.stop + margin))


def align(
    model: Any, pairs: Sequence[Sequence[Any]], steps: int, batch_size: int, side: int, lr: float,
    taps: Sequence[str], seed: int,
) -> Any:  # fmt: skip
    """A copy of a torch model that gives for filled images (1, C, H, W) what the model gives for their complete ones.

    The loss is the divergence of the classes (or the squared error of numbers) and the squared error of each tapped
    feature map over its variance.
    """
    import torch
    from torch.nn import functional as F

    student, draw = copy.deepcopy(model).eval(), np.random.default_rng(seed)
    features: dict[Any, list[Any]] = {}
    tapped = [(n, name) for n in (model, student) for name in set(taps) & {name for name, _ in n.named_modules()}]
    hooks = [
        n.get_submodule(name).register_forward_hook(partial(_keep, features, (n is model, name))) for n, name in tapped
    ]
    optimiser = torch.optim.AdamW(student.parameters(), lr=lr)
    for _ in range(steps):
        crops = []
        for number in draw.integers(len(pairs), size=batch_size).tolist():
            height, width = pairs[number][0].shape[-2:]
            y, x = (int(draw.integers(max(0, length - side) + 1)) for length in (height, width))
            crops.append([part[..., y : y + side, x : x + side] for part in pairs[number]])
        complete, filled = (torch.cat(part) for part in zip(*crops, strict=True))
        with torch.no_grad():
            wanted = model(complete)
        found = student(filled)
        if wanted.ndim in (2, 4) and wanted.shape[1] > 1:
            loss = (
                F.kl_div(found.log_softmax(1), wanted.log_softmax(1), log_target=True, reduction="none").sum(1).mean()
            )
        else:
            loss = F.mse_loss(found, wanted) / wanted.var().clamp(min=1e-12)
        for name in {name for _, name in tapped}:
            both = list(zip(features[False, name], features[True, name], strict=True))
            loss = loss + sum(F.mse_loss(a, b) / b.var().clamp(min=1e-6) for a, b in both) / len(both)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    for hook in hooks:
        hook.remove()
    return student


def _keep(features: dict[Any, Any], key: Any, module: Any, given: Any, found: Any) -> None:
    features[key] = list(found) if isinstance(found, list | tuple) else [found]
