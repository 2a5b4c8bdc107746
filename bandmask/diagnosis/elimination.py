"""Faulty bands are taken out one at a time, because one of them spoils the predictions of its neighbours.

Of the suspicious bands, that one goes first without which the others look most normal: the worst score often belongs to
a neighbour, whose prediction leaned on the faulty band.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from bandmask import bands
from bandmask.diagnosis.sketches import Sketch
from bandmask.diagnosis.symptoms import Normal, symptoms
from bandmask.diagnosis.verdicts import looks_like
from bandmask.moments import Moments

MOST_FAULTY = 6  # bands of an image: with fewer than seven left there is little to compare with
_LEAST_LEFT = 3  # bands, absent and faulty ones apart
# numbers of images, and channels that are distrusted in all of them, to scores (images, 13)
Look = Callable[[np.ndarray, tuple[int, ...]], np.ndarray]


class Judge:
    """Knows what is normal, whichever bands are distrusted; each set is worked out once and kept."""

    def __init__(self, moments: Moments, healthy: Sketch) -> None:
        """From moments of healthy spectra, and healthy images."""
        self.moments, self.healthy = moments, healthy
        self._known: dict[tuple[int, ...], Normal] = {}

    def normal(self, distrusted: Sequence[int] | np.ndarray = ()) -> Normal:
        """What is normal when these channels are distrusted."""
        key = tuple(sorted(int(channel) for channel in distrusted))
        if key not in self._known:
            self._known[key] = Normal.of(self.healthy, self.moments, key)
        return self._known[key]

    def first_look(self, sketch: Sketch) -> np.ndarray:
        """Scores (N, 13) when all bands that are there are trusted; −∞ of absent ones."""
        return _grouped(self._each(sketch), np.arange(len(sketch)), sketch.absent)

    def search(self, sketch: Sketch, threshold: float) -> tuple[np.ndarray, np.ndarray]:
        """Scores and faulty bands of each image by itself, (N, 13) both; see `take_out`."""
        return take_out(self._each(sketch), sketch.absent, threshold)

    def search_together(self, sketch: Sketch, absent: np.ndarray, threshold: float) -> tuple[np.ndarray, np.ndarray]:
        """Scores and faulty bands of images of one scene, by their median score, (13,) both."""

        def look(_: np.ndarray, distrusted: tuple[int, ...]) -> np.ndarray:
            return _middle(self.normal(distrusted).scores(sketch, self.moments))[None]

        scores, faulty = take_out(look, absent[None], threshold)
        return scores[0], faulty[0]

    def words(self, sketch: Sketch, faulty: np.ndarray, absent: np.ndarray) -> dict[str, str]:
        """What each faulty band looks like, by the median over images of one scene."""
        if not faulty.any():
            return {}
        distrusted = np.flatnonzero(faulty | absent).tolist()
        away = np.median(self.normal(distrusted).deviations(sketch, self.moments), axis=0)
        own = np.median(symptoms(sketch, self.moments, distrusted)[0], axis=0)
        mean = np.median(sketch.mean, axis=0)
        return {bands.NAMES[c]: looks_like(away[c], own[c], mean[c]) for c in np.flatnonzero(faulty)}

    def exchanged(
        self, sketch: Sketch, faulty: np.ndarray, absent: np.ndarray, threshold: float
    ) -> tuple[str, str] | None:
        """The two bands that, exchanged back, leave nothing above the threshold in a scene; None if no two do."""
        normal, best, found = self.normal(np.flatnonzero(absent)), threshold, None
        there = np.flatnonzero(~absent).tolist()
        for first, second in [(a, b) for a in there for b in there if a < b and (faulty[a] or faulty[b])]:
            worst = _middle(normal.scores(sketch.exchanged(first, second), self.moments)).max()
            if worst <= best:
                best, found = worst, (bands.NAMES[first], bands.NAMES[second])
        return found

    def _each(self, sketch: Sketch) -> Look:
        return lambda rows, distrusted: self.normal(distrusted).scores(sketch.take(rows), self.moments)


def take_out(look: Look, absent: np.ndarray, threshold: float) -> tuple[np.ndarray, np.ndarray]:
    """Take faulty bands out until no score is above the threshold.

    Args:
        look: gives scores.
        absent: bands that are not there, (N, 13) bool.
        threshold: what is above it is too much.

    Returns:
        Scores (N, 13): of a faulty band when it was taken out, of the others at the end, −∞ of absent bands. Faulty
        bands, (N, 13) bool.
    """
    out, faulty, rows = absent.copy(), np.zeros_like(absent), np.arange(len(absent))
    latest = _grouped(look, rows, out)
    scores = latest.copy()
    while True:
        most = np.minimum(MOST_FAULTY, (~absent[rows]).sum(1) - _LEAST_LEFT)
        going_on = (latest.max(1) > threshold) & (faulty[rows].sum(1) < most)
        rows, latest = rows[going_on], latest[going_on]
        if not len(rows):
            return scores, faulty
        chosen, latest = _best_candidate(look, rows, out[rows], latest, threshold)
        out[rows, chosen] = faulty[rows, chosen] = True
        scores[rows] = np.where(out[rows], scores[rows], latest)


def _best_candidate(
    look: Look, rows: np.ndarray, out: np.ndarray, latest: np.ndarray, threshold: float
) -> tuple[np.ndarray, np.ndarray]:
    """Of each image's suspicious bands, that without which the others are least so; and the scores without it."""
    chosen, least, after = latest.argmax(1), np.full(len(rows), np.inf), latest.copy()
    for candidate in range(latest.shape[1]):
        tried = np.flatnonzero(latest[:, candidate] > threshold)
        without = out[tried]
        without[:, candidate] = True
        found = _grouped(look, rows[tried], without)
        # a sum: the worst of the others says nothing while another faulty band is among them
        left = np.log(np.maximum(found / threshold, 1)).sum(1)
        better = left < least[tried]
        places = tried[better]
        chosen[places], least[places], after[places] = candidate, left[better], found[better]
    return chosen, after


def _grouped(look: Look, rows: np.ndarray, out: np.ndarray) -> np.ndarray:
    """Scores (N, 13); images without the same bands are looked at together."""
    scores = np.empty(out.shape)
    if len(rows):
        sets, group = np.unique(out, axis=0, return_inverse=True)
        for number, channels in enumerate(sets):
            places = np.flatnonzero(group.ravel() == number)
            scores[places] = look(rows[places], tuple(np.flatnonzero(channels).tolist()))
    return scores


def _middle(scores: np.ndarray) -> np.ndarray:
    """Median over images; of two middle ones the lower, which accuses nobody too soon."""
    return np.quantile(scores, 0.5, axis=0, method="lower")
