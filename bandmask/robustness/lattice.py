"""Every subset of bands by one number, which of them to look at, and what was right on each: a table of 8,192 scores.

Bit i of a code is set if band i of `bands.NAMES` is visible: 8191 is a complete image, 0 nothing at all. Whatever is
linear in the accuracies (means by number of lost bands, Shapley values, differences) is a matrix of weights over
subsets, so one function gives all their figures and intervals. No torch here.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import pandas as pd

from bandmask import bands, files
from bandmask.stats import drawn, interval

BANDS = len(bands.NAMES)
COMPLETE = 2**BANDS - 1
_ARRAYS = ("codes", "correct", "samples", "labels", "groups", "head_seeds")


@dataclass(frozen=True)
class Scores:
    """Which images were classified rightly, with each subset of bands visible.

    Attributes:
        codes: (P,) int64, ascending.
        correct: (P, K, N) bool, by subset, head and image.
        samples: (N,) rows of the images in their pack.
        labels: (N,) their classes.
        groups: (N,) images of one group are not independent; each its own, unless the pack says otherwise.
        head_seeds: (K,).
    """

    codes: np.ndarray
    correct: np.ndarray
    samples: np.ndarray
    labels: np.ndarray
    groups: np.ndarray
    head_seeds: np.ndarray

    @property
    def accuracy(self) -> np.ndarray:
        """(P,) share of images, mean over heads."""
        return self.correct.mean((1, 2))

    @property
    def lost(self) -> np.ndarray:
        """(P,) how many of the 13 bands are hidden."""
        return lost_bands(self.codes)

    def at(self, code: int) -> float:
        """Accuracy with one subset visible.

        Raises:
            ValueError: it was not looked at.
        """
        place = int(np.searchsorted(self.codes, code))
        if place == len(self.codes) or self.codes[place] != code:
            raise ValueError(f"subset {code} ({' '.join(visible_bands(code)) or 'nothing'}) is not among the scores")
        return float(self.correct[place].mean())

    def table(self, **described: Any) -> pd.DataFrame:
        """A row a subset and head, with names of bands and counts of images, for Parquet.

        Returns:
            The columns of `described`, then `code`, `visible`, `hidden`, `lost` (how many), `head_seed`, `correct`
            (how many images), `images`, `accuracy`.
        """
        correct = self.correct.sum(2).ravel()
        heads = len(self.head_seeds)
        names = {code: (visible_bands(code), visible_bands(COMPLETE - code)) for code in self.codes.tolist()}
        columns: dict[str, Any] = {
            **described,
            "code": np.repeat(self.codes, heads),
            "visible": [" ".join(names[code][0]) for code in self.codes.tolist() for _ in range(heads)],
            "hidden": [" ".join(names[code][1]) for code in self.codes.tolist() for _ in range(heads)],
            "lost": np.repeat(self.lost, heads),
            "head_seed": np.tile(self.head_seeds, len(self.codes)),
            "correct": correct,
            "images": len(self.samples),
            "accuracy": correct / len(self.samples),
        }
        return pd.DataFrame(columns)

    def save(self, path: Path | str) -> Path:
        """Write `.npz`, whole or not at all."""
        with files.writing(path) as partial, partial.open("wb") as file:
            np.savez_compressed(file, **{name: getattr(self, name) for name in _ARRAYS})
        return Path(path)

    @classmethod
    def load(cls, path: Path | str) -> Scores:
        """What `save` wrote.

        Raises:
            FileNotFoundError: nothing there.
            ValueError: damaged, or another file.
        """
        path = files.require(path, "notebooks/09_robustness_map.ipynb, or benchmarks/robustness.py")
        try:
            with np.load(path, allow_pickle=False) as saved:
                return cls(**{name: saved[name] for name in _ARRAYS})
        except (OSError, ValueError, KeyError, BadZipFile) as error:
            raise ValueError(f"{path} is damaged, or holds no scores of subsets ({error}); delete it") from error


def code_of(visible: str | Iterable[str]) -> int:
    """Code of the subset in which these bands are visible; ESA or common names."""
    return sum(1 << channel for channel in bands.channel_indices(bands.parse_bands(visible)))


def visible_bands(code: int) -> tuple[str, ...]:
    """ESA names of the bands that a subset leaves visible, in order of wavelength."""
    return tuple(name for channel, name in enumerate(bands.NAMES) if code >> channel & 1)


def patterns(codes: np.ndarray, count: int = BANDS) -> np.ndarray:
    """(P, count) bool: which bands each subset leaves visible."""
    return (np.asarray(codes)[:, None] >> np.arange(count) & 1).astype(bool)


def lost_bands(codes: np.ndarray, count: int = BANDS) -> np.ndarray:
    """(P,) how many bands of `count` each subset hides."""
    return count - patterns(codes, count).sum(1)


def every_subset() -> np.ndarray:
    """All 8,192 codes, ascending."""
    return np.arange(2**BANDS)


def some_subsets(complete_to: int = 2, each: int = 39, *, seed: int = 0) -> np.ndarray:
    """A cheap look: all subsets with few bands lost or few visible, and a balanced sample of each size between them.

    A sample holds whole turns: a subset and the 12 others that come of moving it around a circle of the bands, in a
    random order of its own for each size. So every band is lost equally often, no two bands' effects are mixed up, and
    each subset of a size is equally likely to be drawn: means are without bias.

    Args:
        complete_to: all subsets that hide, or show, so many bands or fewer.
        each: how many are drawn of every other size, at least; rounded up to a multiple of 13.
        seed: of the draw.

    Returns:
        Codes, ascending.

    Raises:
        ValueError: `each` is not 1 or more.
    """
    if each < 1:
        raise ValueError(f"each is how many subsets are drawn of every size, 1 or more; got {each}")
    draw, codes = np.random.default_rng(seed), every_subset()
    chosen, lost = [], lost_bands(codes)
    for size in range(BANDS + 1):
        layer = codes[lost == size]
        if not (size <= complete_to or BANDS - size <= complete_to or len(layer) <= each):
            turned = [(layer << step | layer >> BANDS - step) & COMPLETE for step in range(BANDS)]
            turn = np.min(turned, axis=0)  # the same for all 13 of a turn; 13 is prime, so none is shorter
            drawn = draw.choice(np.unique(turn), -(-each // BANDS), replace=False)
            order = draw.permutation(BANDS)
            layer = patterns(layer[np.isin(turn, drawn)])[:, order] @ (1 << np.arange(BANDS))
        chosen.append(layer)
    return np.sort(np.concatenate(chosen))


def mean_weights(codes: np.ndarray) -> np.ndarray:
    """(14, P) weights of the mean over the subsets that lose 0 to 13 bands; NaN where none was looked at."""
    layer = lost_bands(codes) == np.arange(BANDS + 1)[:, None]
    return layer / np.where(layer.any(1), layer.sum(1), np.nan)[:, None]


def overall_weights(codes: np.ndarray) -> np.ndarray:
    """(1, P) weights of one figure for all losses: every number of lost bands from 1 to 12 counts the same."""
    return np.nanmean(mean_weights(codes)[1:BANDS], axis=0, keepdims=True)


def estimate(
    scores: Scores,
    weights: np.ndarray,
    *,
    minus: Scores | None = None,
    draws: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> pd.DataFrame:
    """Figures that are linear in the accuracies, with intervals from resampling groups of images, and heads.

    Where only some subsets were looked at, the interval says nothing of those left out.

    Args:
        scores: of one method.
        weights: (Q, P), a row a figure.
        minus: subtracted; both are given the same drawn images and heads, so what they have in common cancels.
        draws: number of draws.
        level: of the interval.
        seed: of the draws.

    Returns:
        A row a figure: `value`, `low`, `high`, as shares.

    Raises:
        ValueError: weights of other subsets; methods that were scored on other subsets, images or heads.
    """
    if weights.ndim != 2 or weights.shape[1] != len(scores.codes):
        raise ValueError(f"weights have shape {weights.shape}; for {len(scores.codes)} subsets a row has one for each")
    found = _by_image(scores, weights)
    if minus is not None:
        if differs := [name for name in _ARRAYS if name != "correct" and not _equal(scores, minus, name)]:
            raise ValueError(f"the two methods differ in {', '.join(differs)}; score both on the same")
        found = found - _by_image(minus, weights)
    groups, owner = np.unique(scores.groups, return_inverse=True)
    draw = np.random.default_rng(seed)
    times = drawn(draw, len(groups), draws)[:, owner]  # (draws, N)
    times = times / times.sum(1, keepdims=True)
    shares = drawn(draw, len(scores.head_seeds), draws) / len(scores.head_seeds)
    rows = []
    for figure in found:  # (K, N)
        low, high = interval((shares * (times @ figure.T)).sum(1), level)
        rows.append({"value": float(figure.mean()), "low": low, "high": high})
    return pd.DataFrame(rows, columns=["value", "low", "high"])


def extremes(scores: Scores, *, worst: bool = True) -> pd.DataFrame:
    """For each number of lost bands the subset with the lowest accuracy, or the highest.

    The lowest of many noisy figures lies below the truth: of 1,716 subsets more so than of 13.

    Returns:
        A row a number: `lost`, `code`, `hidden`, `visible`, `accuracy`, `subsets` (how many were looked at).
    """
    accuracy, lost = scores.accuracy, scores.lost
    rows = []
    for size in np.unique(lost):
        (places,) = np.nonzero(lost == size)
        place = places[accuracy[places].argmin() if worst else accuracy[places].argmax()]
        code = int(scores.codes[place])
        names = {"hidden": " ".join(visible_bands(COMPLETE - code)), "visible": " ".join(visible_bands(code))}
        figures = {"accuracy": float(accuracy[place]), "subsets": len(places)}
        rows.append({"lost": int(size), "code": code, **names, **figures})
    return pd.DataFrame(rows)


def pair_losses(scores: Scores) -> np.ndarray:
    """(13, 13) accuracy with two bands lost; one on the diagonal.

    Raises:
        ValueError: a pair was not looked at.
    """
    bits = 1 << np.arange(BANDS)
    return np.array([[scores.at(COMPLETE & ~int(a | b)) for b in bits] for a in bits])


def stratified(labels: np.ndarray, rows: Sequence[int] | np.ndarray, count: int, *, seed: int = 0) -> np.ndarray:
    """Some of these rows, each class in its proportion, drawn at random; ascending.

    Args:
        labels: class of every image of a pack.
        rows: row numbers to draw from.
        count: how many; 0, or as many as there are, takes all.
        seed: of the draw. A larger count contains a smaller one.
    """
    rows = np.asarray(rows, np.int64)
    if count < 0:
        raise ValueError(f"count is the number of images, 0 for all; got {count}")
    if count == 0 or count >= len(rows):
        return np.sort(rows)
    shuffled = pd.Series(np.random.default_rng(seed).permutation(rows))
    label = pd.Series(np.asarray(labels)[shuffled])
    within = (label.groupby(label).cumcount() + 0.5) / label.groupby(label).transform("size")
    return np.sort(shuffled[within.sort_values(kind="stable").index[:count]].to_numpy())


def _by_image(scores: Scores, weights: np.ndarray) -> np.ndarray:
    """(Q, K, N): what each image adds; by head, because all subsets and images at once would be copied as floats."""
    heads = range(len(scores.head_seeds))
    return np.stack([weights @ scores.correct[:, head].astype(float) for head in heads], axis=1)


def _equal(one: Scores, other: Scores, name: str) -> bool:
    return np.array_equal(getattr(one, name), getattr(other, name))
