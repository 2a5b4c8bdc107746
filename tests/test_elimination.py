"""Bands are taken out until none is suspicious, the culprit before the neighbours that it spoils."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bandmask.diagnosis.elimination import MOST_FAULTY, take_out


def spoilt(truth: list[set[int]], own: float = 3.0, neighbour: float = 5.0):
    """Scores of a world in which a faulty band that is trusted makes its neighbours look worse than itself."""

    def look(rows: np.ndarray, distrusted: tuple[int, ...]) -> np.ndarray:
        scores = np.full((len(rows), 13), 0.5)
        for place, row in enumerate(rows):
            trusted = truth[row] - set(distrusted)
            for band in trusted:
                scores[place, [band - 1, (band + 1) % 13]] = neighbour
            scores[place, list(truth[row])] = own
        scores[:, list(distrusted)] = -np.inf
        return scores

    return look


@given(st.lists(st.sets(st.sampled_from([0, 3, 6, 9]), max_size=3), min_size=1, max_size=6))
def test_the_faulty_bands_are_found_though_their_neighbours_look_worse(truth: list[set[int]]) -> None:
    scores, faulty = take_out(spoilt(truth), np.zeros((len(truth), 13), bool), threshold=1.0)
    for row, bands in enumerate(truth):
        assert set(np.flatnonzero(faulty[row])) == bands
        assert (scores[row] > 1).tolist() == faulty[row].tolist()


def test_images_are_judged_each_by_itself() -> None:
    truth = [{2}, set(), {7}, {2}, {11}]
    together = take_out(spoilt(truth), np.zeros((5, 13), bool), 1.0)
    for row in range(5):
        alone = take_out(spoilt([truth[row]]), np.zeros((1, 13), bool), 1.0)
        assert np.array_equal(alone[0][0], together[0][row])
        assert np.array_equal(alone[1][0], together[1][row])


def test_absent_bands_are_neither_faulty_nor_scored() -> None:
    absent = np.zeros((1, 13), bool)
    absent[0, [5, 6]] = True
    scores, faulty = take_out(spoilt([{5, 9}]), absent, 1.0)
    assert np.flatnonzero(faulty).tolist() == [9]
    assert np.isneginf(scores[0, [5, 6]]).all()


@pytest.mark.parametrize("absent", [0, 8, 10, 12])
def test_it_ends_where_everything_looks_faulty(absent: int) -> None:
    def look(rows: np.ndarray, distrusted: tuple[int, ...]) -> np.ndarray:
        scores = np.full((len(rows), 13), 9.0)
        scores[:, list(distrusted)] = -np.inf
        return scores

    gone = (np.arange(13) < absent)[None]
    _, faulty = take_out(look, gone, 1.0)
    assert faulty.sum() == max(min(MOST_FAULTY, 13 - absent - 3), 0)
    assert not (faulty & gone).any()
