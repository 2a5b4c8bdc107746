"""A model in service meets an incomplete image: what is missing is hidden and filled, and what to expect is measured.

Complete images give bit for bit what the model alone gives. NumPy alone, unless the model needs torch.
"""

from __future__ import annotations

import copy
import itertools
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from tqdm import tqdm

from bandmask import bands as band_table
from bandmask import identity, models, moments
from bandmask.bands import DN_PER_REFLECTANCE
from bandmask.images import Source, Window, level_of
from bandmask.packs import IGNORE
from bandmask.stats import Agreement

ALL = band_table.NAMES
PIXELS = 4096  # of an image, that losses of a pixel model are tried on
FEW = ("B02 B03 B04 B08", "B02 B04")  # what may be left


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
    filled: dict[str, float]  # share of pixels that were filled, where anything is visible, a band that the model takes
    by: str  # which fill, "" where nothing was missing; several where images or tiles lost other bands
    nodata: np.ndarray = field(repr=False)  # bool (B, H, W) or (H, W): nothing visible; maps of numbers are NaN
    _expect: Callable[[], Expected | None] = field(repr=False)

    @cached_property
    def expected(self) -> Expected | None:
        """What this loss costs, measured on complete images; None without them, or where images lost other bands."""
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
        options: `takes`: `images`, float32 (B, C, H, W), or `pixels`, (n, C). `unit` and `level` of what it takes:
            `reflectance` or `DN`, `L1C` or `L2A`. `mean` and `sd`, one a band in that unit: taken off, divided by.
            `multiple`: sides are padded to it. `decide`: a threshold that makes classes of answers, or `none`;
            default: the largest channel. `tile`, `margin`: pixels a side asked at a time, and seen around.

    Raises:
        ValueError: unknown words or bands, images with gaps.

    >>> model = guard(lambda x: x.mean(1), "B04 B08")
    >>> answer = model(np.stack([np.full((4, 4), 0.1), np.full((4, 4), np.nan)]))
    >>> answer.filled, answer.by, answer.values.shape
    ({'B08': 1.0}, 'all', (4, 4))
    """
    if unknown := options.keys() - (known_options := [*Guard.__dataclass_fields__][2:11]):
        raise ValueError(f"unknown option {', '.join(sorted(unknown))}; available: {', '.join(known_options)}")
    if taken := {*moments.PLAIN, "none", "own"} & {*(fills or ())}:
        raise ValueError(f"fills named {', '.join(sorted(taken))} are the guard's own; give yours another name")
    given = {"takes", "unit", "mean", "sd", "multiple"} & options.keys() | ({"bands"} if bands else set())
    if isinstance(predict, str) and given:
        raise ValueError(f"{predict!r} knows its {', '.join(sorted(given))}, for images of any unit; leave that out")
    known = models.load(predict) if isinstance(predict, str) else {"predict": predict, "bands": bands}
    if not isinstance(images, Iterable):
        raise ValueError(f"images is a list of arrays (C, H, W), such as list(pack.images); got {images!r:.40}")
    return Guard(**{**known, **options}, fills=dict(fills or {}), images=list(images))


@dataclass
class Guard:
    """What `guard` makes; call it with images."""

    predict: Any = field(repr=False)
    bands: Any  # ESA names, in the model's order
    takes: str = "images"  # float32 (B, C, H, W), or `pixels`, (n, C)
    unit: str = "reflectance"  # of what it takes: DN / 10000, or `DN`
    mean: Any = field(default=None, repr=False)  # taken off before the model, one a band, in that unit
    sd: Any = field(default=None, repr=False)  # divided by, likewise
    multiple: int = 1  # sides are padded to a multiple of this, and a map is cut again
    level: str = "L1C"  # of what it takes, `L1C` or `L2A`: whose spectra gaps are filled by
    decide: Any = None  # makes classes of answers: a threshold; `none` of an embedding; default: the largest channel
    tile: int | None = None  # pixels a side that are read and asked at a time; default: rows of pixels, whole images
    margin: int = 0  # pixels around a tile that the model sees too
    fills: dict[str, Any] = field(default_factory=dict, repr=False)
    images: list[Any] = field(default_factory=list, repr=False)
    maps: dict[tuple[frozenset[str], str], Any] = field(default_factory=dict, repr=False)  # `adapt`, by loss and fill
    adaptation: dict[str, Any] = field(default_factory=dict)  # how that went

    def __post_init__(self) -> None:
        """Check every word, and take statistics of the images."""
        if not (callable(self.predict) or hasattr(self.predict, "predict") or hasattr(self.predict, "run")):
            raise ValueError(f"a model is a function, or has `predict` or `run`; got {self.predict!r:.40}")
        self.bands = band_table.ordered(self.bands)
        for name, known in (("takes", ("images", "pixels")), ("unit", ("reflectance", "DN"))):
            if getattr(self, name) not in known:
                raise ValueError(f"unknown {name} {getattr(self, name)!r}; available: {', '.join(known)}")
        if self.takes == "images" and hasattr(self.predict, "n_features_in_"):
            raise ValueError(f"a {type(self.predict).__name__} takes spectra, (n, C): say takes='pixels'")
        for name, least in (("tile", 1), ("margin", 0), ("multiple", 1)):
            value = getattr(self, name)
            if (value is not None or name != "tile") and (not isinstance(value, int | np.integer) or value < least):
                raise ValueError(f"{name} is a whole number of pixels, {least} or more; got {value!r}")
        if self.decide not in (None, "none") and (isinstance(self.decide, bool | str) or not abs(self.decide) < np.inf):
            raise ValueError(f"decide is a threshold, such as 0.4, 'none' or None; got {self.decide!r}")
        self.decide = self.decide if self.decide in (None, "none") else float(self.decide)
        self.level = str(self.level).upper()
        for name in ("mean", "sd"):
            if (value := getattr(self, name)) is not None:
                value = np.asarray([] if isinstance(value, str | dict) else value, np.float32)
                if value.size != len(self.bands) or not np.isfinite(value).all() or (name == "sd" and not value.all()):
                    raise ValueError(f"{name} is one number a band of {' '.join(self.bands)}, no sd 0; got {value}")
                if np.abs(value).max() > 3 if self.unit != "DN" else 0 < np.abs(value).max() <= 3 and name == "mean":
                    raise ValueError(f"{name} {value.ravel()} is not of {self.unit}; say which `unit` the model takes")
                setattr(self, name, value.reshape(len(self.bands), 1, 1))
        self.channels = [ALL.index(name) for name in self.bands]
        shipped = moments.shipped(self.level)
        if not shipped["all"].known[self.channels].all():  # B10 of an L2A model: told as at the top of the atmosphere
            shipped = moments.shipped("L1C")
        self.images, self._classes = list(self._complete()), 0
        for name, source in self.fills.items():
            moments.require_reflectance(source, name)
        self.fills = {**shipped, **self.fills}
        if len(self.images) > 1:  # on one image it could not be held out
            self.fills["own"] = moments.Moments.of_spectra(np.vstack([image.spectra for image in self.images]))
        self._plain = {word: moments.Plain(word, self.fills["all"]) for word in moments.PLAIN}
        self._chosen: dict[frozenset[str], tuple[str, Expected]] = {}
        self._adapted: dict[tuple[frozenset[str], frozenset[str]], tuple[str, Expected]] = {}  # by loss, of which bands
        self._alone = self  # of a copy that has maps, the guard without

    def __call__(
        self, images: Any, *, names: str | Sequence[str] | None = None, distrust: str | Iterable[str] = (),
        fill: str | None = None,
    ) -> Answer:  # fmt: skip
        """The model's answer.

        Args:
            images: `(C, H, W)` or `(B, C, H, W)`, numpy, torch or xarray with a dimension `band`; DN or reflectance.
                NaN is missing; so are masked pixels, 65535, what lies below −1000 DN, and 0 in all bands, or in all
                pixels of a band but B10.
            names: of the channels; without them those of the array, else the model's own, or all 13 in SatCLIP's
                order. Bands that the model doesn't take help to fill.
            distrust: bands to treat as lost though they are there, or `auto`: what `bm.detect` names, of a scene.
            fill: one of `self.fills`, `zero`, `mean`, `nearest`, or `none`, which hands NaN to the model. Default:
                what agrees best on the guard's own images, else `all`.

        Raises:
            ValueError: channels without names, or in another order than pixels say; numbers that are neither DN nor
                reflectance; unknown words; an answer that is no map where tiles are asked for.
        """
        source = Source(images, names, self.bands)
        level, gone = level_of(images), self._distrusted(images, distrust)
        if not source.count:
            raise ValueError(f"there is no image in {tuple(source.images.shape)}")
        if level not in ("", self.level):
            said = f"the scene is {level}, the model takes {self.level}: its answers may mean nothing"
            warnings.warn(f"{said}. Open the other product, or guard(…, level={level!r})", stacklevel=2)
        identity.check(source.spectra(gone), source.names, source="these images", level="" if level else self.level)
        values, ways, missing, nodata = self._run(source, gone, fill)
        is_map, empty = _is_map(values, source.size), nodata.all((1, 2))
        if not is_map and empty.any():
            raise ValueError(f"image {int(empty.argmax())} of {source.count} holds no value; nothing can be asked")
        if is_map and nodata.any() and values.dtype.kind == "f":
            values = np.where(nodata if values.ndim == 3 else nodata[:, None], values.dtype.type(np.nan), values)
        seen = (~nodata).sum((1, 2))
        filled = dict(zip(ALL, (missing.sum(0) / max(1, seen.sum())).tolist(), strict=True))
        filled = {name: filled[name] for name in self.bands if filled[name]}
        losses = {self._lost(gaps / there) for gaps, there in zip(missing, seen, strict=True) if there} - {frozenset()}
        where, by = nodata if source.batched else nodata[0], " ".join(sorted({name for name, _ in ways}))

        def expect() -> Expected | None:
            if len(losses) != 1 or len(ways) != 1:
                return None
            (lost,), ((name, mapped),) = losses, ways
            return (self if mapped else self._alone).expect(lost, name)

        return Answer(source.back(values, is_map), filled, by, where, expect)

    def _run(
        self, source: Source, distrusted: Iterable[str], fill: Any
    ) -> tuple[np.ndarray, set[tuple[str, bool]], np.ndarray, np.ndarray]:
        """Answers (B, …), by which fills and whether mapped, missing pixels (B, 13), and where nothing is visible."""
        if self.takes == "pixels" and source.count > 1:  # each by the rows that it has alone
            parts = zip(*(self._run(part, distrusted, fill) for part in source.each()), strict=True)
            values, ways, missing, nodata = parts
            return np.concatenate(values), set().union(*ways), np.concatenate(missing), np.concatenate(nodata)
        nodata = np.zeros((source.count, *source.size), bool)
        values, ways, visible = np.empty(0), set(), np.zeros((source.count, len(ALL)), int)
        places = [ALL.index(name) for name in source.names]
        for seen, own, inner in tqdm(list(self._windows(source)), "tiles", delay=20):
            block, hidden = source.read(seen, distrusted)
            images = [(block[i : i + 1], hidden[i : i + 1]) for i in range(source.count)]
            ready, used, maps = zip(*(self.fill(*image, source, fill) for image in images), strict=True)
            answer = self.ask(np.concatenate(ready), maps)
            ways |= {(name, known is not None) for name, known in zip(used, maps, strict=True) if name}
            visible[:, places] += (~hidden[(..., *inner)]).sum((2, 3))
            nodata[(..., *own)] = hidden[(..., *inner)].all(1)
            if not _is_map(answer, block.shape[-2:]):
                if block.shape[-2:] != source.size:
                    raise ValueError(f"an answer of shape {answer.shape} is no map of its tile; leave tile=None")
                values = answer
                break
            values = values if values.size else np.empty((*answer.shape[:-2], *source.size), answer.dtype)
            values = values.astype(np.result_type(values, answer), copy=False)  # longer words, floats after integers
            values[(..., *own)] = answer[(..., *inner)]
        return values, ways, (~nodata).sum((1, 2))[:, None] - visible, nodata

    def _lost(self, share: np.ndarray) -> frozenset[str]:
        """Bands of which half is missing, or more; where the model takes none of these, what it takes with gaps."""
        lost = frozenset(np.array(ALL)[share >= 0.5].tolist())
        return lost if lost & set(self.bands) else frozenset(np.array(ALL)[share > 0].tolist()) & set(self.bands)

    def _windows(self, source: Source) -> Iterator[tuple[Window, Window, Window]]:
        """Rows and columns that a tile sees, those it answers for, and where these lie in what it sees."""
        (height, width), margin = source.size, self.margin
        rows = height if self.takes == "images" else max(1, 2**18 // width)
        down, across = self.tile or rows, self.tile or width
        if self.tile and max(source.size) <= self.tile + 2 * margin:  # one tile sees all of it
            down, across = source.size
        for y, x in itertools.product(range(0, height, down), range(0, width, across)):
            own = slice(y, min(y + down, height)), slice(x, min(x + across, width))
            starts = max(0, y - margin), max(0, x - margin)
            ends = min(own[0].stop + margin, height), min(own[1].stop + margin, width)
            inner = [slice(part.start - start, part.stop - start) for part, start in zip(own, starts, strict=True)]
            yield (slice(starts[0], ends[0]), slice(starts[1], ends[1])), own, (inner[0], inner[1])

    def expect(self, lost: str | Iterable[str], fill: str = "") -> Expected | None:
        """What losing these whole bands costs, on the guard's own images; None without images, a loss, or a band left.

        Without a fill it is the best: chosen on one half of the images and measured on the other, both ways round.
        """
        gone = frozenset(band_table.parse_bands(lost))
        best, expected = self._best(gone)
        if fill in ("", best) or expected is None:
            return expected
        return self._measured(gone, [fill])[1] if self.images else None

    def robustness(
        self, images: Iterable[Any] = (), losses: str | Sequence[str] = "single groups few-left", *,
        labels: Sequence[Any] | None = None, fills: Sequence[str] = (),
    ) -> pd.DataFrame:  # fmt: skip
        """Agreement with the model's own answers to complete images, for each loss of whole bands and each fill.

        Args:
            images: complete ones, each `(C, H, W)`; default: those that the guard was made with.
            losses: `single`, `groups` (of `bands.GROUPS`), `few-left`, `all` (every subset), or a list of band sets
                that are lost: `["B10", "B01 B09 B10"]`.
            labels: the truth of each image, one or a map, of the same kind as the model's answers; of classes -1 is
                unknown, and 255 where the model doesn't answer it, of numbers NaN. Adds `truth` and its interval.
            fills: default: zero, mean, nearest and all that the guard has and that know the bands.

        Returns:
            A row a loss and fill: `lost`, `left` (how many bands), `fill`, `score`, `low`, `high`, `same` (share of
            equal classes), `metric`. The complete images come first. Intervals are over images: NaN of fewer than 3.
        """
        if given := list(images):
            other = replace(self, images=given)
            for image in other.images if len(given) == 1 else ():  # one of the guard's own stays held out
                mine = (own for own in self.images if np.array_equal(own.spectra, image.spectra, equal_nan=True))
                image.others = next((own.others for own in mine), None)
            return other.robustness(losses=losses, labels=labels, fills=fills)
        if not self.images:
            raise ValueError("give complete images: robustness(images), or guard(…, images=…)")
        rows, asked = [], fills.split() if isinstance(fills, str) else list(fills)
        true = None if labels is None else self._true(labels)
        for gone in tqdm([frozenset(), *self._losses(losses)], "losses", delay=20):
            for name in asked or [*moments.PLAIN, *self._knowing(gone)] if gone else ["complete"]:
                found = [self._lose(image, gone, name) for image in self.images]
                like = Agreement.of(self._own, found, self._classes)
                low, high = like.interval()
                row = {"lost": " ".join(band_table.parse_bands(gone)), "left": len(set(self.bands) - gone)}
                row |= {"fill": name, "score": like.score(), "low": low, "high": high}
                row |= {"same": like.same, "metric": like.metric}
                if true is not None:
                    right = Agreement.of(true, [part.reshape(t.shape) for t, part in zip(true, found, strict=True)])
                    low, high = right.interval()
                    row |= {"truth": right.score(), "truth_low": low, "truth_high": high}
                rows.append(row)
        return pd.DataFrame(rows)

    def adapt(self, images: Iterable[Any], lost: str | Iterable[str], *, fill: str = "") -> Guard:
        """A guard that brings the model's answers to images without these bands nearer to the complete ones; no labels.

        By ridge regression answers become a linear map of themselves: of the channels of a pixel, or of an embedding.
        Every second image fits it, behind the fill that is best with it there; the others judge: it is kept only if
        it agrees better on them than the model alone behind the fill that is best on them. `adaptation` of what is
        returned says how well both do.

        Args:
            images: complete ones, each `(C, H, W)`, two or more.
            lost: bands that are gone; for other losses, and complete images, the model goes on alone.
            fill: the one to stand behind.

        Raises:
            ValueError: fewer than two images, none of the model's bands, or answers that are no floating-point numbers.
        """
        from sklearn.linear_model import RidgeCV

        gone, given = frozenset(band_table.parse_bands(lost)), list(images)
        if len(given) < 2 or not gone & set(self.bands):
            raise ValueError("adapt takes two images or more, and bands that the model takes")
        if fill and fill not in {*moments.PLAIN, *self.fills}:
            raise ValueError(f"adapt stands behind a fill; available: {', '.join((*moments.PLAIN, *self.fills))}")
        train, test = (replace(self, images=part, maps={}) for part in (given[::2], given[1::2]))
        knowing, mine = self._knowing(gone), gone & set(self.bands)
        names = [name for name in knowing if name != "own"]
        alone = {name: test._measured(gone, [name])[1] for name in {*knowing, fill or names[0]}}
        complete = _rows([train._answer(image, frozenset(), None) for image in train.images])
        if complete.dtype.kind != "f":
            raise ValueError("adapt takes a model that answers in numbers, such as probabilities of classes")
        for name in [fill] if fill else names:
            filled = _rows([train._answer(image, gone, name) for image in train.images])
            penalties = np.logspace(-4, 3, 15) * (
                float(filled.var()) or 1.0
            )  # embeddings may be longer than images many
            train.maps[mine, name] = RidgeCV(penalties).fit(filled, complete)
        best = train._measured(gone, [name for _, name in train.maps])[0]
        test.maps = {(mine, best): train.maps[mine, best]}
        after, before = test._measured(gone, [best])[1], max(alone.values(), key=lambda expected: expected.score)
        better, kept = copy.copy(self), after.score > before.score
        better.adaptation = {"before": before, "same fill": alone[best], "after": after, "kept": kept}
        if kept:
            better.maps = {**self.maps, **test.maps}
            held = frozenset(train.images[0].source.names)
            better._chosen, better._adapted = {}, {**self._adapted, (gone & held, held): (best, after)}
        return better

    def fill(self, block: np.ndarray, hidden: np.ndarray, source: Source, how: Any) -> tuple[np.ndarray, str, Any]:
        """What the model takes of one image, but for scaling, by which fill (`how`: its name, or it), and its map."""
        held, scale = list(source.names), source.scale
        shape = len(block), len(self.bands), *block.shape[2:]
        there, mine = [n in held for n in self.bands], [held.index(n) for n in self.bands if n in held]
        gaps, ready = np.ones(shape, bool), np.zeros(shape, np.float32)
        gaps[:, there], ready[:, there] = hidden[:, mine], block[:, mine]
        seen = ~hidden.all(1, keepdims=True)
        if not (gaps & seen).any():
            return self._united(np.where(gaps, np.float32(0), ready), scale), "", None
        share = (hidden & seen).sum((0, 2, 3)) / seen.sum()
        gone = frozenset(ALL).difference(np.array(held)[share < 0.5].tolist())
        lost, whole = gone & set(self.bands), np.array(self.bands)[gaps.all((0, 2, 3))].tolist()
        maps = self.maps if lost == set(whole) else {}  # they are of whole bands
        if how is None:
            how, _ = (self if maps else self._alone)._best(gone)
        name = how if isinstance(how, str) else "own"  # moments of the images beside the one that is tried
        if name == "none":
            return self._united(np.where(gaps, np.float32(np.nan), ready), scale), name, None
        teller = {**self.fills, **self._plain}.get(how) if isinstance(how, str) else how
        if teller is None:
            raise ValueError(f"unknown fill {name!r}; available: {', '.join((*moments.PLAIN, 'none', *self.fills))}")
        if lacking := np.array(self.bands)[gaps.any((0, 2, 3)) & ~teller.known[self.channels]].tolist():
            raise ValueError(f"{name!r} knows nothing of {', '.join(lacking)}; take one of {', '.join(self.fills)}")
        spectra, unseen = (np.full((13, len(block), *block.shape[2:]), value) for value in (np.float32(0), True))
        places = [ALL.index(n) for n in held]
        unseen[places] = hidden.swapaxes(0, 1)
        spectra[places] = np.where(hidden, np.float32(0), block).swapaxes(0, 1) / np.float32(scale)
        moments.fill_gaps(spectra, unseen, teller, self.channels)
        told = self._united(spectra[self.channels].swapaxes(0, 1), 1.0)
        return np.where(gaps, told, self._united(ready, scale)), name, maps.get((lost, name))

    def ask(self, ready: np.ndarray, maps: Sequence[Any] = ()) -> np.ndarray:
        """The model's answer to (B, C, h, w) in its unit, scaled and padded for it; cut again where it is a map.

        Answers to images that have a map, one of `maps` an image, are brought nearer by it.
        """
        batch, channels, height, width = ready.shape
        ready = ready if self.mean is None else ready - self.mean
        ready = ready if self.sd is None else ready / self.sd
        if self.takes == "pixels":
            ready = np.ascontiguousarray(np.moveaxis(ready, 1, -1)).reshape(-1, channels)
        else:
            more = [(0, -side % self.multiple) for side in (height, width)]
            ready = np.ascontiguousarray(np.pad(ready, ((0, 0), (0, 0), *more), mode="edge"))
        found = models.ask(self.predict, ready)
        if found.shape[:1] != ready.shape[:1]:
            raise ValueError(f"the model answers {found.shape} to {ready.shape}; it must answer each of {self.takes}")
        if self.takes == "pixels":
            found = found.reshape(batch, height, width, *found.shape[1:])
            found = np.moveaxis(found, -1, 1) if found.ndim == 4 else found
        elif _is_map(found, ready.shape[-2:]):
            found = found[..., :height, :width]
        elif found.ndim == 4 and found.shape[1:3] == ready.shape[-2:]:
            raise ValueError(f"answers {found.shape} have their classes last; move them: np.moveaxis(answer, -1, 1)")
        elif found.ndim > 2 and ready.shape[-2:] != (height, width) and found.shape[-2:] != (1, 1):
            raise ValueError(f"answers {found.shape} are partly of padding; cut images to multiples of {self.multiple}")
        for image, known in enumerate(maps):
            if known is not None:
                last = _channels_last(found[image : image + 1])
                told = known.predict(last.reshape(-1, last.shape[-1])).reshape(last.shape)
                found[image] = np.moveaxis(told, -1, 1)[0] if found.ndim in (2, 4) else told[0, ..., 0]
        return found

    def _complete(self) -> Iterator[_Image]:
        """Complete images to try losses on; for pixel models thinned to some `PIXELS` each."""
        sources = [Source(image, None, self.bands) for image in self.images]
        spectra = []
        for source in sources:
            block, hidden = source.read((slice(None), slice(None)), ())
            if source.batched or hidden.any() or {*self.bands, *sources[0].names} ^ set(source.names):
                raise ValueError("losses are tried on complete images, all of the same bands and the model's")
            some = np.full((block[0, 0].size, 13), np.nan)
            some[:, [ALL.index(n) for n in source.names]] = block[0].reshape(block.shape[1], -1).T
            spectra.append(some[:: max(1, len(some) // 10_000)] / source.scale)
        if sources:
            count, order = min(PIXELS, *map(len, spectra)), [ALL.index(name) for name in sources[0].names]
            some = np.stack([part[:: len(part) // count][:count, order] for part in spectra]) * DN_PER_REFLECTANCE
            level = "" if any(map(level_of, self.images)) else self.level
            identity.check(some, sources[0].names, source="the guard's images", level=level)
        for place, source in enumerate(sources):
            step = math.ceil(math.sqrt(math.prod(source.size) / PIXELS)) if self.takes == "pixels" else 1
            thin = slice(None, None, step), slice(None, None, step)
            others = spectra[:place] + spectra[place + 1 :]  # so that it stays held out
            known = moments.Moments.of_spectra(np.vstack(others)) if others else None
            yield _Image(source.thinned(thin), thin, spectra[place], known)

    @cached_property
    def _own(self) -> list[np.ndarray]:
        """Answers to the complete images."""
        found = [self._lose(image, frozenset()) for image in self.images]
        if self._classes and len(_values_of(found)) == 1:
            said = f"the largest of {self._classes} channels is number {found[0].flat[0]} everywhere"
            warnings.warn(f"{said}: agreement says little; of numbers, such as LAI, say `decide='none'`", stacklevel=3)
        return found

    def _answer(self, image: _Image, gone: frozenset[str], fill: str | None) -> np.ndarray:
        held_out = fill == "own" and image.others is not None  # of one image alone nothing is held out
        return self._run(image.source, gone, image.others if held_out else fill)[0]

    def _lose(self, image: _Image, gone: frozenset[str], fill: str | None = None) -> np.ndarray:
        """Answer, as it is compared, to an image without these bands."""
        answer = self._answer(image, gone, fill)
        if fill == "none" and answer.dtype.kind == "f" and np.isnan(answer).any():
            raise ValueError("the model answers NaN to gaps, which agrees with nothing; leave the fill 'none' out")
        if isinstance(self.decide, float):
            return answer > self.decide
        if answer.dtype.kind == "i" and answer.size and answer.min() < 0:
            raise ValueError(f"classes count from 0; the model answers {answer.min()}: give one that adds it")
        if self.decide == "none" or answer.dtype.kind != "f" or answer.ndim not in (2, 4) or answer.shape[1] == 1:
            return answer
        self._classes = answer.shape[1]
        return answer.argmax(1)

    def _true(self, labels: Sequence[Any]) -> list[np.ndarray]:
        """Labels beside the answers, -1 or NaN where unknown; a ValueError where the two can't be the same thing."""
        if len(labels) != len(self.images):
            raise ValueError(f"{len(labels)} labels for {len(self.images)} images; give one an image")
        kinds, found = {"f": "numbers", **dict.fromkeys("iub", "classes from 0 on")}, []
        sides = ([part for part in side if np.asarray(part).dtype.kind != "f"] for side in (self._own, labels))
        answered, given = map(_values_of, sides)
        apart = min(len(answered), len(given - {-1, IGNORE})) > 1 and answered.isdisjoint(given)
        apart |= given == {0, IGNORE} and answered <= {0, 1}  # a mask, but 255 is unknown
        for image, label, own in zip(self.images, map(np.asarray, labels), self._own, strict=True):
            told, said = (kinds.get(part.dtype.kind, "words") for part in (own, label))
            part = label[image.thinned] if label.ndim > 1 else label.reshape(-1)
            if told == said == "classes from 0 on":
                part = np.where((part == IGNORE) & (IGNORE not in answered), -1, part.astype(int))
                classes = 2 if own.dtype == bool else self._classes
                told = f"classes below {classes}" if classes and part.max() >= classes else told
            elif told == "numbers" != said and label.dtype.kind in "iu":
                part, said = part.astype(float), told
            if told == said and apart:  # such as `Cloud` beside `cloud`, or 10, 20, 30 beside 0, 1, 2
                told, said = (", ".join(map(str, sorted(side)[:3])) for side in (answered, given))
            if told != said or np.squeeze(part).shape != np.squeeze(own).shape:
                raise ValueError(
                    f"the model answers in {told}, {own.shape} an image; labels are {said}, {part.shape}, such as "
                    f"{part.ravel().tolist()[:1]}: give both alike (`decide` makes classes of numbers)"
                )
            found.append(part)
        return found

    def _losses(self, losses: str | Sequence[str]) -> list[frozenset[str]]:
        known: dict[str, list[Any]] = {
            "single": [[name] for name in self.bands],
            "groups": [*band_table.GROUPS.values()],
            "few-left": [set(ALL) - set(left.split()) for left in FEW],
            "all": [g for k in range(1, len(self.bands)) for g in itertools.combinations(self.bands, k)],
        }
        words = losses.split() if isinstance(losses, str) else []
        if not isinstance(losses, str | Sequence) or set(words) - set(known):
            raise ValueError(f"losses are {', '.join(known)}, or a list such as ['B10', 'B11 B12']; got {losses!r}")
        asked = [gone for word in words for gone in known[word]]
        asked += [band_table.parse_bands(gone) for gone in losses if not words]
        mine, there = set(self.bands), set(self.images[0].source.names)  # all of these gone, or none of the first
        found = list(dict.fromkeys(g for g in map(frozenset, asked) if g & mine and there - g))
        if not words and (rest := [" ".join(gone) for gone in asked if frozenset(gone) not in found]):
            warnings.warn(f"no row of {', '.join(rest)}: of the model's bands all are lost, or none", stacklevel=3)
        return found

    def _best(self, gone: frozenset[str]) -> tuple[str, Expected | None]:
        """The fill that agrees best where these bands are gone, and how well; `all` where no image can tell."""
        for (lost_bands, held), found in self._adapted.items():
            if gone & held == lost_bands:
                return found
        there = {name for image in self.images for name in image.source.names}
        gone &= there
        if not gone & set(self.bands) or gone == there:
            return "all", None
        if gone not in self._chosen:
            self._chosen[gone] = self._measured(gone, self._knowing(gone))
        return self._chosen[gone]

    def _knowing(self, gone: frozenset[str]) -> list[str]:
        """Fills of the guard's own that know all of these bands that the model takes."""
        lost = [ALL.index(name) for name in gone & set(self.bands)]
        return [name for name, fill in self.fills.items() if fill.known[lost].all()]

    def _measured(self, gone: frozenset[str], names: Sequence[str]) -> tuple[str, Expected]:
        """Which of some fills agrees best, and how well: chosen on each half, measured on the other."""
        asked = tqdm(names, f"fills for the loss of {' '.join(band_table.parse_bands(gone))}", delay=2, leave=False)
        found = {name: [self._lose(image, gone, name) for image in self.images] for name in asked}
        tried = {name: Agreement.of(self._own, answers, self._classes) for name, answers in found.items()}

        def good(name: str, images: Any = None) -> float:
            nothing = 1.0 if tried[name].metric == "F1" else -np.inf  # was to be found: an F1 is NaN where none was
            return float(np.nan_to_num(np.ravel(tried[name].score(images))[0], nan=nothing))

        best = max(names, key=good)
        held, odd = tried[best].per_image.copy(), np.arange(len(self.images)) % 2 == 1
        for half in (odd, ~odd) if len(self.images) > 1 else ():
            chosen = max(names, key=partial(good, images=half[None].astype(float)))
            held[~half] = tried[chosen].per_image[~half]
        like = Agreement(held, tried[best].metric)
        return best, Expected(like.score(), *like.interval(), like.metric, best, len(self.images))

    def _distrusted(self, images: Any, distrust: str | Iterable[str]) -> tuple[str, ...]:
        if not isinstance(distrust, str) or distrust != "auto":
            return band_table.parse_bands(distrust)
        from bandmask.detector import Detector

        table = Detector.shipped().distrust(images)
        return tuple(table["band"][table["suspicious"].astype(bool)])

    def _united(self, values: np.ndarray, scale: float) -> np.ndarray:
        """From DN or reflectance to the model's unit; what is in it stays to the last bit."""
        wanted = DN_PER_REFLECTANCE if self.unit == "DN" else 1.0
        if wanted == scale:
            return values
        return values / np.float32(scale) if wanted == 1 else values * np.float32(wanted / scale)


@dataclass
class _Image:
    """A complete image that losses are tried on."""

    source: Source
    thinned: Window  # which of its rows and columns these are
    spectra: np.ndarray  # (n, 13) reflectance of some of its pixels
    others: Any  # moments that know nothing of it


def _is_map(answer: np.ndarray, size: tuple[int, ...]) -> bool:
    """Whether an answer (B, …) is one of each pixel; (B, D) is none, whatever D is."""
    return answer.ndim > 2 and answer.shape[-2:] == size


def _channels_last(answer: np.ndarray) -> np.ndarray:
    """Channels of (B, K, h, w) or (B, K) at the end; of answers without any, one."""
    return np.moveaxis(answer, 1, -1) if answer.ndim in (2, 4) else answer[..., None]


def _values_of(parts: Iterable[Any]) -> set[Any]:
    """Each value that occurs in some arrays."""
    return set().union(*(np.unique(part).tolist() for part in parts))


def _rows(answers: Sequence[np.ndarray]) -> np.ndarray:
    """(n, K), all vectors of some answers."""
    last = [_channels_last(answer) for answer in answers]
    return np.concatenate([part.reshape(-1, part.shape[-1]) for part in last])
