"""Scores of confusion counts, and intervals: groups of images and runs are drawn anew, the same for all compared.

Groups (a scene, a block, or each image for itself) are drawn, and with them each method's runs. All methods and masks
of one question are given the same draws, so what they have in common cancels. Source: thesis §3.3.2, whose "average
accuracy" is the overall accuracy here; Efron and Tibshirani 1993, chapters 8 and 13 (bootstrap of clustered data).
"""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

if TYPE_CHECKING:
    from torch import Tensor

METRICS = ("overall_accuracy", "macro_accuracy", "miou_all", "miou_present")
KEYS = ("mask", "scheme", "protocol")
SEEDS = ("encoder_seed", "head_seed")
# what happens to the head when bands are lost, and how figures call it; its old words are read, never written
PROTOCOLS = {"complete": "complete images", "kept": "head kept", "retrained": "head retrained"}
_OLD_WORDS = {"transfer": "kept", "thesis": "retrained"}
_CHUNK = 250  # draws at a time: 250 draws of 5,400 images are 11 MB

Side = tuple[str, Hashable]  # role (which method) and place (which mask)


def read_protocol(word: str) -> str:
    """A protocol by its name, by what figures call it, or by its old word (`transfer`, `thesis`); else a ValueError."""
    names = {**{name: name for name in PROTOCOLS}, **{shown: name for name, shown in PROTOCOLS.items()}, **_OLD_WORDS}
    if word not in names:
        raise ValueError(f"unknown protocol {word!r}; available: {', '.join(PROTOCOLS)}")
    return names[word]


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


def difference_of_runs(
    after: Sequence[pd.Series], before: Sequence[pd.Series] = (), *, draws: int = 2000
) -> tuple[float, float, float]:
    """Mean of `after` minus mean of `before`, with an interval over runs alone: figure, low, high.

    Each series holds the runs of one mask, indexed by run; masks count alike. Series with the same runs are given the
    same drawn runs: a seed does the same thing in all of them. Of three runs it is little more than their range.
    """
    draw, shares = np.random.default_rng(0), dict[Hashable, np.ndarray]()
    figure, spread = 0.0, np.zeros(draws)
    for sign, side in ((1, after), (-1, before)):
        for values in side:
            runs = sign, *values.index
            if runs not in shares:
                shares[runs] = drawn(draw, len(values), draws) / len(values)
            figure += sign * float(values.mean()) / len(side)
            spread += sign * (shares[runs] @ values.to_numpy(float)) / len(side)
    return figure, *interval(spread)


def bootstrap_interval(values: Sequence[float], draws: int = 2000) -> tuple[float, float]:
    """Interval of the mean of a few runs."""
    return difference_of_runs([pd.Series(values, dtype=float)], draws=draws)[1:]


def summarise(table: pd.DataFrame, by: Sequence[str]) -> pd.DataFrame:
    """`mean`, `sd` and interval (`low`, `high`) of `value`; one row a group, `runs` says over how many."""
    rows = []
    for key, group in table.groupby(list(by), sort=False, dropna=False):
        values = group["value"]
        interval = bootstrap_interval(values.tolist())
        rows.append((*key, values.mean(), values.std(ddof=1), *interval, len(values)))
    return pd.DataFrame(rows, columns=[*by, "mean", "sd", "low", "high", "runs"])


@dataclass(frozen=True)
class Resampled:
    """A score, mean over runs."""

    value: float  # of all images, a share
    draws: np.ndarray  # in each draw of groups and runs, (n,)
    images: int
    groups: int
    runs: int


def resample(
    sides: Mapping[Any, pd.DataFrame],
    *,
    metric: str = "overall_accuracy",
    classes: int | None = None,
    draws: int = 2000,
    seed: int | np.random.Generator = 0,
) -> dict[Any, Resampled]:
    """Scores of several sets of runs on the same images, in draws that all of them share.

    Args:
        sides: predictions by (role, place), such as ("fine-tuned", "B8"). Columns `encoder_seed`, `head_seed`,
            `sample`, `label`, `predicted`; where a row counts pixels, `pixels`; where images are not independent,
            `group`. Sides of one role that have the same seeds are given the same drawn runs.
        metric: one of `METRICS`; its mean over runs is taken.
        classes: number of classes, for `miou_all`; without it, as many as occur in any side.
        draws: number of draws.
        seed: or a generator, which goes on where it is.

    Raises:
        ValueError: unknown metric; sides that predicted different images or saw other labels; an image that one run
            predicted twice, or that is in two groups.
    """
    if metric not in METRICS:
        raise ValueError(f"unknown metric {metric!r}; available: {', '.join(METRICS)}")
    draw = np.random.default_rng(seed)
    found = max((int(rows[["label", "predicted"]].to_numpy().max()) + 1 for rows in sides.values()), default=1)
    if classes is not None and found > classes:
        raise ValueError(f"class {found - 1} occurs in the predictions, but there are {classes} classes from 0 on")
    counted = {side: _Counts.of(rows, classes or found, metric, side) for side, rows in sides.items()}
    names, same = list(counted), ("samples", "labels", "groups", "owner")
    for name in names[1:]:
        if not all(np.array_equal(getattr(counted[names[0]], f), getattr(counted[name], f)) for f in same):
            raise ValueError(f"{names[0]} and {name} did not predict the same images and labels; run both anew")
    groups = len(counted[names[0]].groups) if counted else 1
    scored: dict[Side, list[np.ndarray]] = {side: [] for side in counted}
    for start in range(0, draws, _CHUNK):
        # how often each group is drawn, instead of gathering what was drawn
        weights = drawn(draw, groups, min(_CHUNK, draws - start))
        for side, counts in counted.items():
            scored[side].append(counts.scores(weights))
    shares: dict[Hashable, np.ndarray] = {}
    out = {}
    for side, counts in counted.items():
        runs = side[0], counts.runs
        if runs not in shares:
            shares[runs] = drawn(draw, len(counts.runs), draws) / len(counts.runs)
        value = float(counts.scores(np.ones((1, groups))).mean())
        spread = (shares[runs] * np.concatenate(scored[side], axis=1).T).sum(1)
        out[side] = Resampled(value, spread, counts.images, groups, len(counts.runs))
    return out


@dataclass(frozen=True)
class _Counts:
    """What a metric needs of the confusion matrices of each run (R) and group (G): the diagonal and the two margins."""

    metric: str
    runs: tuple[tuple[int, ...], ...]
    images: int
    samples: np.ndarray  # (S,)
    groups: np.ndarray  # (G,)
    owner: np.ndarray  # (S,) group of each sample
    labels: np.ndarray  # (S, C) pixels of each true class
    right: np.ndarray  # (R, G, C); C = 1 for the overall accuracy, which needs no classes
    said: np.ndarray  # (R, G, C)
    true: np.ndarray  # (G, C)

    @classmethod
    def of(cls, rows: pd.DataFrame, classes: int, metric: str, side: Side) -> _Counts:
        """Count predictions; `side` is for error messages."""
        if "pixels" in rows:
            rows = rows[rows["pixels"] > 0]
        elif rows.duplicated([*SEEDS, "sample"]).any():
            raise ValueError(f"{side}: one run predicted an image twice; compare one experiment at a time")
        pixels = rows["pixels"].to_numpy(float) if "pixels" in rows else np.ones(len(rows))
        label, predicted = rows["label"].to_numpy(int), rows["predicted"].to_numpy(int)
        seeds = rows[list(SEEDS)].astype("Int64").fillna(-1).to_numpy(int)
        runs, run = np.unique(seeds, axis=0, return_inverse=True)
        samples, first, sample = np.unique(rows["sample"].to_numpy(), return_index=True, return_inverse=True)
        seen = _total((run, sample, label), pixels, (len(runs), len(samples), classes))
        if (seen != seen[:1]).any():
            raise ValueError(f"{side}: its runs did not predict the same images; run them anew")
        named = rows["group" if "group" in rows and rows["group"].notna().any() else "sample"]
        if named.isna().any():
            raise ValueError(f"{side}: some images have no group; give every image one, or leave the column out")
        group = named.to_numpy()
        if (group != group[first][sample]).any():
            raise ValueError(f"{side}: an image is in two groups; `group` must belong to the image")
        images = int(rows["images"].iloc[first].sum()) if "images" in rows else len(samples)
        groups, owner = np.unique(group[first], return_inverse=True)
        hit, place = pixels * (label == predicted), owner[sample]
        if metric == "overall_accuracy":
            label, predicted, classes = np.zeros_like(label), np.zeros_like(predicted), 1
        shape = len(runs), len(groups), classes
        right, said, true = (
            _total((run, place, of), weights, shape)
            for of, weights in ((label, hit), (predicted, pixels), (label, pixels))
        )
        return cls(
            metric, tuple(map(tuple, runs.tolist())), images, samples, groups, owner, seen[0], right, said, true[0]
        )

    def scores(self, weights: np.ndarray) -> np.ndarray:
        """The metric of each run where group g counts `weights[:, g]` times: (n, G) to (R, n)."""
        right, true = weights @ self.right, weights @ self.true  # (R, n, C), (n, C)
        if self.metric == "overall_accuracy":
            return right[..., 0] / true[..., 0]
        base = true + weights @ self.said - right if self.metric.startswith("miou") else true
        shares, present = right / np.where(base > 0, base, 1), true > 0
        return shares.mean(-1) if self.metric == "miou_all" else (shares * present).sum(-1) / present.sum(-1)


def _total(index: tuple[np.ndarray, ...], weights: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    return np.bincount(np.ravel_multi_index(index, shape), weights, minlength=int(np.prod(shape))).reshape(shape)


def paired_difference(
    predictions: pd.DataFrame,
    first: str,
    second: str,
    *,
    metric: str = "overall_accuracy",
    by: Sequence[str] = KEYS,
    average: bool = False,
    seed: int = 0,
    **options: Any,
) -> pd.DataFrame:
    """Score of method `second` minus `first` on the same test images, with an interval over images and seeds.

    Both methods see the same images, so resampling images in pairs tells a small gain from luck where two separate
    intervals can't.

    Args:
        predictions: as in `resample`, with `method` and the columns of `by`.
        first: method subtracted.
        second: method it is subtracted from.
        metric: one of `METRICS`.
        by: what must be equal in both.
        average: a row for all masks of a scheme and protocol, in the same drawn groups and seeds: the mean over masks.
        seed: of the draws.
        options: `classes` and `draws` of `resample`.

    Returns:
        A row per mask, scheme and protocol: `difference`, `low`, `high` (as shares), `images`, `groups`, and `runs`
        of the method that has fewer. Where a method is missing there is no row.

    Raises:
        ValueError: the two methods predicted different images.
    """
    if first == second:
        raise ValueError(f"{first!r} against itself says nothing; methods: {', '.join(predictions['method'].unique())}")
    together: dict[Any, dict[tuple[Any, ...], list[pd.DataFrame]]] = {}
    for key, group in predictions.groupby(list(by), sort=False):
        both = [group[group["method"] == name] for name in (first, second)]
        if all(map(len, both)):
            same = tuple(value for name, value in zip(by, key, strict=True) if name != "mask") if average else key
            together.setdefault(same, {})[key] = both
    generator, rows = np.random.default_rng(seed), []
    for pairs in together.values():
        sides = {(n, key): side for key, both in pairs.items() for n, side in zip((first, second), both, strict=True)}
        scored = resample(sides, metric=metric, seed=generator, **options)
        ends = [(scored[first, key], scored[second, key]) for key in pairs]
        low, high = interval(np.mean([after.draws - before.draws for before, after in ends], axis=0))
        described = dict(zip(by, next(iter(pairs)), strict=True))
        if average:
            described["mask"] = f"mean of {len(pairs)}"
        figures = {"difference": float(np.mean([after.value - before.value for before, after in ends]))}
        counts = {"images": ends[0][0].images, "groups": ends[0][0].groups}
        runs = min(side.runs for pair in ends for side in pair)
        rows.append({**described, **figures, "low": low, "high": high, **counts, "runs": runs})
    return pd.DataFrame(rows, columns=[*by, "difference", "low", "high", "images", "groups", "runs"])


def paired_differences(predictions: pd.DataFrame, methods: Sequence[str], **options: Any) -> pd.DataFrame:
    """`paired_difference` of every two methods, the later minus the earlier one; `comparison` names them."""
    pairs = [
        paired_difference(predictions, first, second, **options).assign(comparison=f"{second} − {first}")
        for first, second in itertools.combinations(methods, 2)
    ]
    return pd.concat(pairs, ignore_index=True) if pairs else pd.DataFrame()


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


def select(table: pd.DataFrame, *, scheme: str = "named", **settings: Any) -> pd.DataFrame:
    """Rows of one setting; those of mask `none`, which hides nothing, belong to every setting.

    Args:
        table: collected results of one or more experiments.
        scheme: how mask labels were read.
        settings: `ratio`, `mask_value`, `schedule`, `shape`; those of the thesis by default, None takes all.

    Raises:
        ValueError: results of several encoders or data sets in one task; means over them would say nothing.
    """
    usual: dict[str, Any] = {"ratio": 0.9, "mask_value": "dataset_mean", "schedule": "constant", "shape": "pixel"}
    if unknown := settings.keys() - usual:
        raise ValueError(f"unknown setting {sorted(unknown)}; available: {', '.join(usual)}")
    fits = table["scheme"] == scheme
    for name, value in (usual | settings).items():
        if value is not None:
            there = table[name].astype(float).round(9) if name == "ratio" else table[name].fillna(str(usual[name]))
            fits &= there == value
    rows = table[fits | (table["mask"] == "none")]
    for task, group in rows.groupby("task"):
        for column in ("dataset", "encoder"):
            if len(found := group[column].dropna().unique()) > 1:
                raise ValueError(
                    f"the {task} results are of several {column}s: {', '.join(map(str, found))}. Give those of one, "
                    f"such as table[table['{column}'] == {str(found[0])!r}]"
                )
    return rows


def first_experiment(table: pd.DataFrame) -> pd.DataFrame:
    """Where several experiments made the same runs, those of the first; else they would count twice."""
    settings = ["scheme", "ratio", "mask_value", "schedule", "shape"]
    keys = table[["task", "mask", "protocol", "method", *settings]].astype(object)
    keys.loc[table["mask"] == "none", settings] = ""  # it hides nothing, whatever the setting
    first = table["experiment"].groupby([keys[name] for name in keys], dropna=False).transform("first")
    return table[(table["experiment"] == first) | table["experiment"].isna()]


@dataclass(frozen=True)
class Agreement:
    """How alike answers to the same images are, with what it takes to draw the images anew."""

    per_image: np.ndarray  # (N, C, C) pixels of each class that got each class, or (N, 4) sums of numbers
    metric: str  # `F1` of class 1, `mIoU` over classes that occur, `accuracy` where an image is one answer, `R²`

    @classmethod
    def of(cls, own: Sequence[np.ndarray], found: Sequence[np.ndarray], classes: int = 0) -> Agreement:
        """Of one array an image: floats are numbers, anything else is a class; -1 is left out."""
        if own[0].dtype.kind == "f":
            sums = []
            for a, b in zip(own, found, strict=True):
                fine = np.isfinite(a) & np.isfinite(b)
                x, y = a[fine].astype(float), b[fine].astype(float)
                sums.append((x.size, x.sum(), np.square(x).sum(), np.square(x - y).sum()))
            return cls(np.array(sums), "R²")
        if own[0].dtype.kind not in "iub":
            words = np.unique(np.concatenate([part.ravel() for part in (*own, *found)]))
            own, found = ([np.searchsorted(words, part) for part in side] for side in (own, found))
        size = max(2, classes, *(int(part.max()) + 1 for part in (*own, *found)))
        pairs = [(a.astype(int) * size + b)[a >= 0] for a, b in zip(own, found, strict=True)]
        counts = [np.bincount(pair, minlength=size**2).reshape(size, size) for pair in pairs]
        single = all(part.size == 1 for part in own)
        return cls(np.array(counts), "accuracy" if single else "F1" if size == 2 else "mIoU")

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
                right, true, said = np.einsum("dii->di", total), total.sum(2), total.sum(1)
                if self.metric == "accuracy":
                    result = right.sum(1) / true.sum(1)
                elif self.metric == "F1":
                    result = 2 * right[:, 1] / (true + said)[:, 1]
                else:
                    shares = np.where(true > 0, right / (true + said - right), 0)
                    result = shares.sum(1) / (true > 0).sum(1)
        return result if weights is not None else float(result[0])

    def interval(self, draws: int = 1000) -> tuple[float, float]:
        """Over images; NaN of fewer than three."""
        count = len(self.per_image)
        spread = self.score(drawn(np.random.default_rng(0), count, draws)) if count > 2 else np.array([np.nan])
        return interval(spread[np.isfinite(spread)] if np.isfinite(spread).any() else np.array([np.nan]))
