"""Scores of resampled images and runs: everything that intervals are made of.

Groups of images (a scene, or each image for itself) are drawn anew, and with them each method's runs. All methods and
masks of one question are given the same drawn groups, so what they have in common cancels.
Source: Efron and Tibshirani 1993, chapters 8 and 13 (bootstrap of clustered data).
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

METRICS = ("overall_accuracy", "macro_accuracy", "miou_all", "miou_present")  # as bandmask.metrics.scores has them
_SEEDS = ("encoder_seed", "head_seed")
_CHUNK = 250  # draws at a time: 250 draws of 5,400 images are 11 MB

Side = tuple[str, Hashable]  # role (which method) and place (which mask)


@dataclass(frozen=True)
class Resampled:
    """A score, mean over runs, and the same score in each draw of groups and runs.

    Attributes:
        value: of all images and runs, as a share.
        draws: of resampled ones, (draws,).
        images: how many there are.
        groups: how many are drawn from.
        runs: how many there are.
    """

    value: float
    draws: np.ndarray
    images: int
    groups: int
    runs: int


def resample(
    sides: Mapping[Side, pd.DataFrame],
    *,
    metric: str = "overall_accuracy",
    classes: int | None = None,
    draws: int = 2000,
    seed: int | np.random.Generator = 0,
) -> dict[Side, Resampled]:
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
    _same_images(counted)
    if not counted:
        return {}
    count = len(next(iter(counted.values())).groups)
    scored = {side: np.empty((draws, len(counts.runs))) for side, counts in counted.items()}
    for start in range(0, draws, _CHUNK):
        stop = min(start + _CHUNK, draws)
        # how often each group is drawn, instead of gathering what was drawn
        weights = draw.multinomial(count, np.full(count, 1 / count), size=stop - start).astype(float)
        for side, counts in counted.items():
            scored[side][start:stop] = counts.scores(weights).T
    shares: dict[tuple[str, tuple[Any, ...]], np.ndarray] = {}
    out = {}
    for side, counts in counted.items():
        runs = (side[0], counts.runs)
        if runs not in shares:
            shares[runs] = run_shares(draw, len(counts.runs), draws)
        value = float(counts.scores(np.ones((1, count))).mean())
        spread = (shares[runs] * scored[side]).sum(1)
        out[side] = Resampled(value, spread, len(counts.samples), count, len(counts.runs))
    return out


def run_shares(draw: np.random.Generator, runs: int, draws: int) -> np.ndarray:
    """How much each of a few runs counts in each draw, (draws, runs)."""
    return draw.multinomial(runs, np.full(runs, 1 / runs), size=draws) / runs


def interval(spread: np.ndarray, level: float = 0.95) -> tuple[float, float]:
    """Percentile interval of what came out in the draws."""
    low, high = np.quantile(spread, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


@dataclass(frozen=True)
class _Counts:
    """What a metric needs of the confusion matrices of each run (R) and group (G), by class (C).

    Only the diagonal and the two margins: they are C numbers where the matrix has C².
    """

    metric: str
    runs: tuple[tuple[int, int], ...]
    samples: np.ndarray  # (S,)
    groups: np.ndarray  # (G,)
    owner: np.ndarray  # (S,) group of each sample
    labels: np.ndarray  # (S, C) pixels of each true class
    right: np.ndarray  # (R, G, C); C = 1 for the overall accuracy, which needs no classes
    predicted: np.ndarray  # (R, G, C), empty where the metric needs none
    true: np.ndarray  # (G, C)

    @classmethod
    def of(cls, rows: pd.DataFrame, classes: int, metric: str, side: Side) -> _Counts:
        """Count predictions; `side` is for error messages."""
        if "pixels" in rows:
            rows = rows[rows["pixels"] > 0]
        elif rows.duplicated([*_SEEDS, "sample"]).any():
            raise ValueError(f"{side}: one run predicted an image twice; compare one experiment at a time")
        pixels = rows["pixels"].to_numpy(float) if "pixels" in rows else np.ones(len(rows))
        label, predicted = rows["label"].to_numpy(int), rows["predicted"].to_numpy(int)
        seeds = np.stack([rows[name].astype("Int64").fillna(-1).to_numpy(int) for name in _SEEDS], axis=1)
        runs, run = np.unique(seeds, axis=0, return_inverse=True)
        samples, first, sample = np.unique(rows["sample"].to_numpy(), return_index=True, return_inverse=True)
        shape = len(runs), len(samples), classes
        seen = _total((run, sample, label), pixels, shape)
        if (seen != seen[:1]).any():
            raise ValueError(f"{side}: its runs did not predict the same images; run them anew")
        group = _groups(rows, side)
        if (group != group[first][sample]).any():
            raise ValueError(f"{side}: an image is in two groups; `group` must belong to the image")
        groups, owner = np.unique(group[first], return_inverse=True)
        hit, place = pixels * (label == predicted), owner[sample]
        if metric == "overall_accuracy":
            label, predicted, classes = np.zeros_like(label), np.zeros_like(predicted), 1
        shape = len(runs), len(groups), classes
        return cls(
            metric,
            tuple((int(encoder), int(head)) for encoder, head in runs),
            samples,
            groups,
            owner,
            seen[0],
            _total((run, place, label), hit, shape),
            _total((run, place, predicted), pixels, shape) if metric.startswith("miou") else np.empty((0, 0, 0)),
            _total((run, place, label), pixels, shape)[0],
        )

    def scores(self, weights: np.ndarray) -> np.ndarray:
        """The metric of each run where group g counts `weights[:, g]` times: (n, G) to (R, n)."""
        right, true = weights @ self.right, weights @ self.true  # (R, n, C), (n, C)
        if self.metric == "overall_accuracy":
            return right[..., 0] / true[..., 0]
        present = true > 0
        base = true + weights @ self.predicted - right if self.metric.startswith("miou") else true
        shares = right / np.where(base > 0, base, 1)
        return shares.mean(-1) if self.metric == "miou_all" else (shares * present).sum(-1) / present.sum(-1)


def _same_images(counted: Mapping[Side, _Counts]) -> None:
    names = list(counted)
    for name in names[1:]:
        one, other = counted[names[0]], counted[name]
        same = all(np.array_equal(getattr(one, f), getattr(other, f)) for f in ("samples", "labels", "groups", "owner"))
        if not same:
            raise ValueError(f"{names[0]} and {name} did not predict the same images and labels; run both anew")


def _groups(rows: pd.DataFrame, side: Side) -> np.ndarray:
    if "group" not in rows or rows["group"].isna().all():
        return rows["sample"].to_numpy()
    if rows["group"].isna().any():
        raise ValueError(f"{side}: some images have no group; give every image one, or leave the column out")
    return rows["group"].to_numpy()


def _total(index: tuple[np.ndarray, ...], weights: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    flat = np.ravel_multi_index(index, shape)
    return np.bincount(flat, weights, minlength=int(np.prod(shape))).reshape(shape)
