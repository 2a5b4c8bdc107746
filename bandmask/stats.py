"""Scores of confusion counts, and intervals: groups of images and runs are drawn anew, the same for all compared.

Groups (a scene, a block, or each image for itself) are drawn, and with them each method's runs. All methods and masks
of one question are given the same draws, so what they have in common cancels. Source: thesis §3.3.2, whose "average
accuracy" is the overall accuracy here; Efron and Tibshirani 1993, chapters 8 and 13 (bootstrap of clustered data).
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

if TYPE_CHECKING:
    from torch import Tensor

METRICS = ("overall_accuracy", "macro_accuracy", "miou_all", "miou_present")
KEYS = ("mask", "scheme", "protocol")
SEEDS = ("encoder_seed", "head_seed")
# what happens to the head when bands are lost, and how figures call it
PROTOCOLS = {"complete": "complete images", "kept": "head kept", "retrained": "head retrained"}
_CHUNK = 250  # draws at a time: 250 draws of 5,400 images are 11 MB


def scores(confusion: Tensor, names: Sequence[str] = ()) -> dict[str, float]:
    """Scores of counts (C, C), rows true; those of an empty matrix are NaN.

    Returns:
        `overall_accuracy`: share of all that is right. `macro_accuracy`: mean recall over classes that occur in the
        target. `miou_all`: mean IoU over all classes, absent ones (no target, no prediction) counted as 0, as a
        plain mean over C does. `miou_present`: over classes that occur in the target. With the classes' names their
        IoU, `iou <name>`, NaN where a class is neither in target nor in prediction.
    """
    counts = confusion.double()
    right, true, predicted = counts.diagonal(), counts.sum(1), counts.sum(0)
    either, present = true + predicted - right, true > 0
    iou = right / either.clamp(min=1)
    values = right.sum() / counts.sum(), (right[present] / true[present]).mean(), iou.mean(), iou[present].mean()
    found = {n: float(value) if present.any() else float("nan") for n, value in zip(METRICS, values, strict=True)}
    return found | {f"iou {name}": float(value) for name, value in zip(names, right / either, strict=False)}


def _score(metric: str, right: np.ndarray, true: np.ndarray, said: np.ndarray) -> np.ndarray:
    """A metric of counts by class, (…, C): pixels that are right, of the class, and said to be of it."""
    if metric == "overall_accuracy":
        return right.sum(-1) / true.sum(-1)
    either = true + said - right if metric == "miou_present" else true
    return (right / np.where(either > 0, either, 1) * (true > 0)).sum(-1) / (true > 0).sum(-1)


def drawn(draw: np.random.Generator, units: int, draws: int) -> np.ndarray:
    """How often each unit (a group of images, a run) is drawn, (draws, units); a row sums to `units`.

    The one bootstrap of this project: `interval(drawn(draw, N, draws) @ values / N)` is that of a mean.
    """
    return draw.multinomial(units, np.full(units, 1 / units), size=draws).astype(float)


def interval(spread: np.ndarray, level: float = 0.95) -> tuple[float, float]:
    """Percentile interval of what came out in the draws."""
    low, high = np.quantile(spread, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def verdict(low: float, high: float) -> str:
    """What an interval of a difference decides: `higher`, `lower`, or `not decided` where it holds zero or is NaN."""
    return "higher" if low > 0 else "lower" if high < 0 else "not decided"


@dataclass(frozen=True)
class Resampled:
    """A score, mean over runs."""

    value: float  # of all images, a share
    draws: np.ndarray  # in each draw of groups and runs, (n,); NaN of one group
    images: int
    groups: int
    runs: int


def resample(
    sides: Mapping[Any, pd.DataFrame],
    *,
    metric: str = "overall_accuracy",
    draws: int = 2000,
    seed: int | np.random.Generator = 0,
) -> dict[Any, Resampled]:
    """Scores of several sets of runs on the same images, in draws that all of them share.

    Args:
        sides: predictions by (role, place), such as ("fine-tuned", "B8"). Columns `encoder_seed`, `head_seed`,
            `sample`, `label`, `predicted`; where a row counts pixels, `pixels`; where images are not independent,
            `group`. Sides of one role that have the same seeds are given the same drawn runs.
        metric: of `METRICS` but `miou_all`, which counts classes that nobody met; its mean over runs is taken.
        draws: number of draws.
        seed: or a generator, which goes on where it is.

    Raises:
        ValueError: unknown metric; sides that predicted different images or saw other labels; an image that one run
            predicted twice, or that is in two groups.
    """
    if metric not in (known := [name for name in METRICS if name != "miou_all"]):
        raise ValueError(f"unknown metric {metric!r}; available: {', '.join(known)}")
    if not sides:
        return {}
    classes = max(int(rows[["label", "predicted"]].to_numpy().max()) + 1 for rows in sides.values())
    draw, first = np.random.default_rng(seed), next(iter(sides))
    seen: dict[Any, pd.DataFrame] = {}
    runs: dict[Any, tuple[Hashable, ...]] = {}
    counted: dict[Any, tuple[np.ndarray, ...]] = {}
    for side, rows in sides.items():
        seen[side], runs[side], counts = _counted(rows, classes, side)
        true = counts[0].sum(2)  # (G, C), the same for all runs; what is right, and what was said, is (R, G, C)
        said = counts.sum(2) if metric == "miou_present" else true
        parts: tuple[np.ndarray, ...] = (np.diagonal(counts, axis1=2, axis2=3), true, said)
        counted[side] = tuple(part.sum(-1, keepdims=True) for part in parts) if metric == METRICS[0] else parts
        if not seen[side].equals(seen[first]):
            raise ValueError(f"{first} and {side} did not predict the same images and labels; run both anew")
    groups, scored = seen[first]["group"].nunique(), {side: list[np.ndarray]() for side in sides}
    for start in range(0, draws, _CHUNK):
        # how often each group is drawn, instead of gathering what was drawn
        weights = drawn(draw, groups, min(_CHUNK, draws - start))
        for side, parts in counted.items():
            scored[side].append(_score(metric, *(weights @ part for part in parts)))  # (R, n)
    out, shares = {}, dict[Hashable, np.ndarray]()
    for side, parts in counted.items():
        count, same = len(runs[side]), (side[0], runs[side])
        if same not in shares:
            shares[same] = drawn(draw, count, draws) / count
        spread = (shares[same] * np.concatenate(scored[side], axis=1).T).sum(1)
        spread[:] = spread if groups > 1 else np.nan  # one group is drawn again and again: no interval
        value = float(_score(metric, *(part.sum(-2) for part in parts)).mean())
        out[side] = Resampled(value, spread, int(seen[side]["images"].sum()), groups, count)
    return out


def _counted(rows: pd.DataFrame, classes: int, side: Any) -> tuple[pd.DataFrame, tuple[Any, ...], np.ndarray]:
    """What was predicted: a row an image, with its `group`; the runs' seeds; counts (runs, groups, true, predicted)."""
    if "pixels" in rows:
        rows = rows[rows["pixels"] > 0]
    elif rows.duplicated([*SEEDS, "sample"]).any():
        raise ValueError(f"{side}: one run predicted an image twice; compare one experiment at a time")
    pixels = rows["pixels"].to_numpy(float) if "pixels" in rows else None
    group = rows["group" if "group" in rows and rows["group"].notna().any() else "sample"]
    if group.isna().any():
        raise ValueError(f"{side}: some images have no group; give every image one, or leave the column out")
    run, runs = pd.MultiIndex.from_frame(rows[list(SEEDS)].astype("Int64").fillna(-1)).factorize(sort=True)
    sample, samples = pd.factorize(rows["sample"], sort=True)
    place, groups = pd.factorize(group, sort=True)
    owner = pd.Series(place).groupby(sample)
    if (owner.max() != owner.min()).any():
        raise ValueError(f"{side}: an image is in two groups; `group` must belong to the image")
    label, predicted = rows["label"].to_numpy(int), rows["predicted"].to_numpy(int)
    labels = _total((run, sample, label), pixels, (len(runs), len(samples), classes))
    if (labels != labels[:1]).any():
        raise ValueError(f"{side}: its runs did not predict the same images; run them anew")
    images = rows["images"].groupby(sample).first().to_numpy() if "images" in rows else 1
    seen = pd.DataFrame(labels[0], samples).assign(group=groups[owner.first()], images=images)
    counts = _total((run, place, label, predicted), pixels, (len(runs), len(groups), classes, classes))
    return seen, tuple(runs), counts


def _total(index: tuple[np.ndarray, ...], weights: np.ndarray | None, shape: tuple[int, ...]) -> np.ndarray:
    return np.bincount(np.ravel_multi_index(index, shape), weights, minlength=int(np.prod(shape))).reshape(shape)


def paired_differences(
    predictions: pd.DataFrame,
    pairs: Iterable[tuple[str, str]],
    *,
    metric: str = "overall_accuracy",
    by: Sequence[str] = KEYS,
    average: bool = False,
    draws: int = 2000,
) -> pd.DataFrame:
    """Scores of two methods on the same test images, the second minus the first, with intervals over images and seeds.

    Images are drawn in pairs: that tells a small gain from luck where two separate intervals can't.

    Args:
        predictions: as in `resample`, with `method` and the columns of `by`, which must be equal in both.
        pairs: of methods: of `("ridge", "fine-tuned")` the difference is fine-tuned − ridge.
        metric, draws: as in `resample`, whose errors these are.
        by: see `predictions`.
        average: a row for all masks of a scheme and protocol, in the same drawn groups and seeds: the mean over masks.

    Returns:
        A row a pair, mask, scheme and protocol: `comparison`, `difference`, `low`, `high` (as shares), `images`,
        `groups`, and `runs` of the method that has fewer. Where a method is missing there is no row.
    """
    rows = []
    for pair in pairs:
        if pair[0] == pair[1]:
            available = ", ".join(predictions["method"].unique())
            raise ValueError(f"{pair[0]!r} against itself says nothing; methods: {available}")
        together: dict[Any, dict[Any, pd.DataFrame]] = {}
        for key, group in predictions.groupby(list(by), sort=False):
            if {*pair} <= {*group["method"]}:
                place = tuple(value for name, value in zip(by, key, strict=True) if name != "mask") if average else key
                sides = {(method, key): group[group["method"] == method] for method in pair}
                together.setdefault(place, {}).update(sides)
        generator = np.random.default_rng(0)
        for sides in together.values():
            scored = resample(sides, metric=metric, draws=draws, seed=generator)
            keys = list(dict.fromkeys(key for _, key in sides))
            before, after = ([scored[method, key] for key in keys] for method in pair)
            differences = [b.value - a.value for a, b in zip(before, after, strict=True)]
            low, high = interval(np.mean([b.draws - a.draws for a, b in zip(before, after, strict=True)], axis=0))
            described = dict(zip(by, keys[0], strict=True)) | ({"mask": f"mean of {len(keys)}"} if average else {})
            about = {"comparison": f"{pair[1]} − {pair[0]}", "difference": float(np.mean(differences))}
            counts = {"images": after[0].images, "groups": after[0].groups}
            runs = min(side.runs for side in scored.values())
            rows.append({**described, **about, "low": low, "high": high, **counts, "runs": runs})
    columns = [*by, "comparison", "difference", "low", "high", "images", "groups", "runs"]
    return pd.DataFrame(rows, columns=columns)


def complete_runs(predictions: pd.DataFrame) -> pd.DataFrame:
    """Predictions of the pre-trained encoder on complete images, once: each mask's run has its copy of them."""
    complete = predictions[(predictions["protocol"] == "complete") & (predictions["method"] == "pre-trained")]
    masks = complete["mask"].unique()
    return complete[complete["mask"] == ("none" if "none" in masks else next(iter(masks), "none"))]


def by_group(predictions: pd.DataFrame) -> pd.DataFrame:
    """Pixels summed over the images of a group (`sample` then), `images` of them: fewer rows, the same intervals."""
    keys = [c for c in predictions.columns if c not in ("sample", "pixels")]
    summed = predictions.groupby(keys, sort=False, dropna=False, observed=True)["pixels"].sum().reset_index()
    images = predictions.groupby("group")["sample"].nunique()
    return summed.assign(sample=summed["group"], images=summed["group"].map(images))


@dataclass(frozen=True)
class Agreement:
    """How alike answers to the same images are, with what it takes to draw the images anew."""

    per_image: np.ndarray  # (N, C, C) pixels of each class that got each class, or (N, 4) sums of numbers
    metric: str  # `F1` of class 1, `mIoU` over classes that occur, `accuracy` where an image is one answer, `R²`

    @classmethod
    def of(cls, own: Sequence[np.ndarray], found: Sequence[np.ndarray], classes: int = 0) -> Agreement:
        """Of one array an image: floats are numbers, anything else a class; what is -1 in `own` is left out."""
        if own[0].dtype.kind == "f":
            fine = [np.isfinite(a) & np.isfinite(b) for a, b in zip(own, found, strict=True)]
            pairs = [(a[at].astype(float), b[at].astype(float)) for a, b, at in zip(own, found, fine, strict=True)]
            return cls(np.array([(x.size, x.sum(), (x**2).sum(), ((x - y) ** 2).sum()) for x, y in pairs]), "R²")
        if own[0].dtype.kind not in "iub":
            words = np.unique(np.concatenate([part.ravel() for part in (*own, *found)]))
            own, found = ([np.searchsorted(words, part) for part in side] for side in (own, found))
        size = kinds = max(2, classes, *(int(part.max()) + 1 for part in (*own, *found)))
        if size > 64:  # such as 0 and 255: a matrix of all numbers between would be slow
            there = np.unique(np.concatenate([part[part >= 0] for part in (*own, *found)]))
            own, found = ([np.where(p < 0, -1, np.searchsorted(there, p)) for p in side] for side in (own, found))
            size = max(2, len(there))
        if any((part < 0).any() for part in found):  # no answer is no class that anything is of
            size, found = size + 1, [np.where(part < 0, size, part) for part in found]
        cells = [(a.astype(int) * size + b.astype(int))[a >= 0] for a, b in zip(own, found, strict=True)]
        counts = [np.bincount(cell, minlength=size**2).reshape(size, size) for cell in cells]
        single = all(part.size == 1 for part in own)
        return cls(np.array(counts), "accuracy" if single else "F1" if kinds == 2 else "mIoU")

    @property
    def same(self) -> float:
        """Share of equal classes; NaN of numbers."""
        total = self.per_image.sum(0)
        return float("nan") if self.metric == "R²" else float(np.trace(total) / total.sum())

    def score(self, weights: np.ndarray | None = None) -> Any:
        """Of all images, or (draws,) of how often each counts, (draws, N); NaN where nothing was to be found."""
        total = np.tensordot(np.ones((1, len(self.per_image))) if weights is None else weights, self.per_image, 1)
        with np.errstate(invalid="ignore", divide="ignore"):
            if self.metric == "R²":
                n, sums, squares, errors = total.T
                result = 1 - errors / (squares - sums**2 / n)
            else:
                right, true, said = np.diagonal(total, axis1=1, axis2=2), total.sum(2), total.sum(1)
                result = 2 * right[:, 1] / (true + said)[:, 1]  # F1
                if self.metric != "F1":
                    result = _score("miou_present" if self.metric == "mIoU" else METRICS[0], right, true, said)
        return result if weights is not None else float(result[0])

    def interval(self, draws: int = 1000) -> tuple[float, float]:
        """Over images; NaN where fewer than three of them have anything to be found: draws would all be alike."""
        count = len(self.per_image)
        telling = np.isfinite(self.score(np.eye(count))).sum()
        spread = self.score(drawn(np.random.default_rng(0), count, draws)) if telling > 2 else np.empty(0)
        found = spread[np.isfinite(spread)]
        return interval(found) if len(found) else (float("nan"), float("nan"))
