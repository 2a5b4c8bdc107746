"""Runs against runs: those that may be compared, their summaries over seeds, differences on the same test images."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
import pandas as pd

from bandmask.resampling import Side, interval, resample, run_shares

KEYS = ("mask", "scheme", "protocol")
_SEEDS = ("encoder_seed", "head_seed")


def select(
    table: pd.DataFrame,
    *,
    scheme: str = "named",
    ratio: float | None = 0.9,
    mask_value: str | None = "dataset_mean",
    schedule: str | None = "constant",
    shape: str | None = "pixel",
) -> pd.DataFrame:
    """Rows of one setting; those of mask `none`, which hides nothing, belong to every setting.

    Args:
        table: collected results of one or more experiments.
        scheme: how mask labels were read.
        ratio: share of hidden pixels where the schedule ends; None takes all.
        mask_value: what stood in hidden pixels; None takes all.
        schedule: of the ratio; None takes all.
        shape: of what is lost together; None takes all.

    Raises:
        ValueError: results of several encoders or data sets in one task; means over them would say nothing.
    """
    fits = table["scheme"] == scheme
    if ratio is not None:
        fits &= np.isclose(table["ratio"].astype(float), ratio)
    if mask_value is not None:
        fits &= table["mask_value"] == mask_value
    if schedule is not None:
        fits &= table["schedule"].fillna("constant") == schedule
    if shape is not None:
        fits &= table["shape"].fillna("pixel") == shape
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


def bootstrap_interval(
    values: Sequence[float], *, draws: int = 2000, level: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of a few runs; with three runs it is little more than their range."""
    array = np.asarray(values, float)
    picks = np.random.default_rng(seed).integers(len(array), size=(draws, len(array)))
    return interval(array[picks].mean(1), level)


def summarise(table: pd.DataFrame, by: Sequence[str] | None = None) -> pd.DataFrame:
    """Mean, SD and bootstrap interval over seeds; one row a group, `runs` says over how many runs.

    Without `by`, a group is everything but the seeds: tasks, splits, epochs and settings are never averaged over.
    """
    by = [c for c in table.columns if c not in (*_SEEDS, "value")] if by is None else list(by)
    rows = []
    for key, group in table.groupby(by, sort=False, dropna=False):
        low, high = bootstrap_interval(group["value"].tolist())
        spread = group["value"].std(ddof=1) if len(group) > 1 else float("nan")
        described = dict(zip(by, key if isinstance(key, tuple) else (key,), strict=True))
        rows.append(
            {**described, "mean": group["value"].mean(), "sd": spread, "low": low, "high": high, "runs": len(group)}
        )
    return pd.DataFrame(rows, columns=[*by, "mean", "sd", "low", "high", "runs"])


def difference_of_runs(
    after: Sequence[pd.Series],
    before: Sequence[pd.Series] = (),
    *,
    draws: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> tuple[float, float, float]:
    """Mean of `after` minus mean of `before`, with an interval over runs alone: figure, low, high.

    Each series holds the runs of one mask, indexed by run; masks count alike. Series with the same runs are given the
    same drawn runs, because a seed does the same thing in all of them.
    """
    draw = np.random.default_rng(seed)
    figure, spread = 0.0, np.zeros(draws)
    for sign, group in ((1, after), (-1, before)):
        shares: dict[tuple[Hashable, ...], np.ndarray] = {}
        for values in group:
            runs = tuple(values.index)
            if runs not in shares:
                shares[runs] = run_shares(draw, len(runs), draws)
            figure += sign * float(values.mean()) / len(group)
            spread += sign * (shares[runs] @ values.to_numpy(float)) / len(group)
    return figure, *interval(spread, level)


def paired_difference(
    predictions: pd.DataFrame,
    first: str,
    second: str,
    *,
    metric: str = "overall_accuracy",
    by: Sequence[str] = KEYS,
    average: bool = False,
    classes: int | None = None,
    draws: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> pd.DataFrame:
    """Score of method `second` minus `first` on the same test images, with an interval over images and seeds.

    Both methods see the same images, so resampling images in pairs tells a small gain from luck where two separate
    intervals can't. Groups of images are drawn anew, and with them each method's runs.

    Args:
        predictions: as in `resample`, with `method` and the columns of `by`.
        first: method subtracted.
        second: method it is subtracted from.
        metric: one of `resampling.METRICS`.
        by: what must be equal in both.
        average: a row for all masks of a scheme and protocol instead of one each: the mean over masks, which are all
            given the same drawn groups and seeds.
        classes: number of classes, for `miou_all`.
        draws: number of draws.
        level: of the interval.
        seed: of the draws.

    Returns:
        A row per mask, scheme and protocol: `difference`, `low`, `high` (as shares), `images`, `groups`, and `runs`
        of the method that has fewer. Where a method is missing there is no row.

    Raises:
        ValueError: the two methods predicted different images.
    """
    if first == second:
        raise ValueError(f"{first!r} against itself says nothing; methods: {', '.join(predictions['method'].unique())}")
    pairs = []
    for key, group in predictions.groupby(list(by), sort=False):
        before, after = group[group["method"] == first], group[group["method"] == second]
        if len(before) and len(after):
            pairs.append((dict(zip(by, key, strict=True)), ((first, key), before), ((second, key), after)))
    return _differences(pairs, by, metric, average, classes, draws, level, seed)


def paired_against(
    reference: pd.DataFrame,
    predictions: pd.DataFrame,
    *,
    metric: str = "overall_accuracy",
    by: Sequence[str] = (*KEYS, "method"),
    average: bool = False,
    classes: int | None = None,
    draws: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> pd.DataFrame:
    """Score of each set of runs minus that of one reference on the same test images (the thesis' RQ2).

    Args:
        reference: predictions of the runs to compare with, such as `complete_runs`.
        predictions: of any masks, protocols and methods; a row of the result for each value of `by`.
        metric: one of `resampling.METRICS`.
        by: what tells sets of runs apart.
        average: the mean over masks instead; see `paired_difference`.
        classes: number of classes, for `miou_all`.
        draws: number of draws.
        level: of the interval.
        seed: of the draws.

    Returns:
        The columns of `by`, and those of `paired_difference`; nothing if there is no reference.

    Raises:
        ValueError: a set of runs predicted other images than the reference.
    """
    pairs = []
    for key, group in predictions.groupby(list(by), sort=False):
        if len(reference):
            known = dict(zip(by, key, strict=True))
            pairs.append((known, (("reference", "complete"), reference), (("compared", key), group)))
    return _differences(pairs, by, metric, average, classes, draws, level, seed)


def complete_runs(predictions: pd.DataFrame) -> pd.DataFrame:
    """Predictions of the pre-trained encoder on complete images, once: each mask's run has its copy of them."""
    complete = predictions[(predictions["protocol"] == "complete") & (predictions["method"] == "pre-trained")]
    masks = complete["mask"].unique()
    return complete[complete["mask"] == ("none" if "none" in masks else next(iter(masks), "none"))]


def by_group(predictions: pd.DataFrame) -> pd.DataFrame:
    """Pixels summed over the images of a group: many times fewer rows, and the same scores and intervals."""
    keys = [c for c in predictions.columns if c not in ("sample", "pixels")]
    summed = predictions.groupby(keys, sort=False, dropna=False, observed=True)["pixels"].sum().reset_index()
    return summed.assign(sample=summed["group"])


def verdict(low: float, high: float) -> str:
    """What an interval of a difference decides: `higher`, `lower`, or `not decided` where it holds zero or is NaN."""
    return "higher" if low > 0 else "lower" if high < 0 else "not decided"


def _differences(
    pairs: Sequence[tuple[dict[str, Any], tuple[Side, pd.DataFrame], tuple[Side, pd.DataFrame]]],
    by: Sequence[str],
    metric: str,
    average: bool,
    classes: int | None,
    draws: int,
    level: float,
    seed: int,
) -> pd.DataFrame:
    together: dict[Any, list[int]] = {}
    for place, (key, _, _) in enumerate(pairs):
        same = tuple(value for name, value in key.items() if name != "mask") if average else place
        together.setdefault(same, []).append(place)
    generator = np.random.default_rng(seed)
    rows = []
    for places in together.values():
        chosen = [pairs[place] for place in places]
        sides = {side: frame for _, *both in chosen for side, frame in both}
        scored = resample(sides, metric=metric, classes=classes, draws=draws, seed=generator)
        ends = [(scored[before], scored[after]) for _, (before, _), (after, _) in chosen]
        low, high = interval(np.mean([after.draws - before.draws for before, after in ends], axis=0), level)
        rows.append(
            {
                **chosen[0][0],
                **({"mask": f"mean of {len(chosen)}"} if average else {}),
                "difference": float(np.mean([after.value - before.value for before, after in ends])),
                "low": low,
                "high": high,
                "images": ends[0][0].images,
                "groups": ends[0][0].groups,
                "runs": min(side.runs for pair in ends for side in pair),
            }
        )
    return pd.DataFrame(rows, columns=[*by, "difference", "low", "high", "images", "groups", "runs"])
