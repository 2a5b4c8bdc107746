"""Shapley values and interactions: equal to brute force over orders, right on known games, estimates from samples."""

from __future__ import annotations

import functools
from itertools import combinations, permutations
from math import comb, factorial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bandmask.robustness import lattice, shapley

GAMES = st.integers(2, 6).flatmap(
    lambda n: st.tuples(st.just(n), st.lists(st.floats(-1, 1), min_size=2**n, max_size=2**n).map(np.array))
)


def by_orders(values: np.ndarray, count: int) -> np.ndarray:
    """Marginal contributions, averaged over all orders."""
    found = np.zeros(count)
    for order in permutations(range(count)):
        code = 0
        for player in order:
            found[player] += values[code | 1 << player] - values[code]
            code |= 1 << player
    return found / factorial(count)


def interaction_by_subsets(values: np.ndarray, count: int, first: int, second: int) -> float:
    """Grabisch and Roubens' sum over subsets without the two."""
    rest = [p for p in range(count) if p not in (first, second)]
    a, b, total = 1 << first, 1 << second, 0.0
    for size in range(count - 1):
        for chosen in combinations(rest, size):
            code = sum(1 << p for p in chosen)
            step = values[code | a | b] - values[code | a] - values[code | b] + values[code]
            total += step / ((count - 1) * comb(count - 2, size))
    return total


value_weights = functools.cache(lambda count: shapley.value_weights(np.arange(2**count), count))
interaction_weights = functools.cache(lambda count: shapley.interaction_weights(np.arange(2**count), count))


def values_of(game: np.ndarray, count: int) -> np.ndarray:
    return value_weights(count) @ game


def interactions_of(game: np.ndarray, count: int) -> np.ndarray:
    return shapley.as_matrix(interaction_weights(count) @ game, count)


@given(GAMES)
def test_values_are_the_mean_over_all_orders(game):
    count, values = game
    np.testing.assert_allclose(values_of(values, count), by_orders(values, count), atol=1e-12)


@given(GAMES)
def test_interactions_are_the_sum_over_all_subsets(game):
    count, values = game
    found = interactions_of(values, count)
    for first, second in combinations(range(count), 2):
        expected = interaction_by_subsets(values, count, first, second)
        np.testing.assert_allclose(found[first, second], expected, atol=1e-12)
        assert found[first, second] == found[second, first]


@given(st.integers(0, 2**32 - 1))
def test_thirteen_bands_share_out_the_whole_accuracy(seed):
    game = np.random.default_rng(seed).random(2**13)
    np.testing.assert_allclose(values_of(game, 13).sum(), game[-1] - game[0], atol=1e-10)


def test_a_null_player_gets_nothing_and_equal_players_the_same():
    codes = lattice.every_subset()
    seen = lattice.patterns(codes)
    game = (seen[:, 2] | seen[:, 7]) * 0.6 + seen[:, 4] * seen[:, 5] * 0.3
    found, pairs = values_of(game, 13), interactions_of(game, 13)
    np.testing.assert_allclose(found[[2, 7, 4, 5]], [0.3, 0.3, 0.15, 0.15], atol=1e-12)
    assert np.abs(np.delete(found, [2, 4, 5, 7])).max() < 1e-12
    assert pairs[2, 7] < -0.1 < 0.1 < pairs[4, 5]  # one stands in for the other; only together
    assert np.abs(pairs[0, 1:]).max() < 1e-12


def test_known_games():
    additive = lattice.patterns(np.arange(32), 5) @ np.array([1.0, 2, 0, -1, 5])
    np.testing.assert_allclose(values_of(additive, 5), [1, 2, 0, -1, 5], atol=1e-12)
    assert np.nanmax(np.abs(interactions_of(additive, 5))) < 1e-12
    majority = (lattice.patterns(np.arange(32), 5).sum(1) >= 3).astype(float)
    np.testing.assert_allclose(values_of(majority, 5), 0.2, atol=1e-12)
    # gloves: player 0 has a left one, 1 and 2 a right one each; a pair is worth 1 (values 4/6, 1/6, 1/6)
    seen = lattice.patterns(np.arange(8), 3)
    gloves = (seen[:, 0] & (seen[:, 1] | seen[:, 2])).astype(float)
    np.testing.assert_allclose(values_of(gloves, 3), [2 / 3, 1 / 6, 1 / 6], atol=1e-12)


@settings(max_examples=15)
@given(st.integers(0, 2**32 - 1))
def test_a_sample_gives_additive_games_exactly_and_always_adds_up(seed):
    draw = np.random.default_rng(seed)
    codes = lattice.some_subsets(1, 13, seed=seed)
    weights = shapley.value_weights(codes)
    worth, by_size = draw.normal(size=13), draw.normal(size=14)
    additive = lattice.patterns(codes) @ worth + by_size[lattice.lost_bands(codes)]
    expected = worth - worth.mean() + (additive[-1] - additive[0]) / 13
    np.testing.assert_allclose(weights @ additive, expected, atol=1e-9)
    anything = draw.random(len(codes))
    np.testing.assert_allclose((weights @ anything).sum(), anything[-1] - anything[0], atol=1e-9)


def test_estimates_come_close_to_the_exact_values_of_a_game_with_interactions():
    seen = lattice.patterns(lattice.every_subset()).astype(float)
    draw = np.random.default_rng(1)
    game = 1 / (1 + np.exp(3 - seen @ draw.uniform(0, 1, 13) - 0.5 * (seen @ draw.normal(size=(13, 4)) > 1).sum(1)))
    exact = values_of(game, 13)
    errors = []
    for seed in range(5):
        codes = lattice.some_subsets(2, 39, seed=seed)
        errors.append(shapley.value_weights(codes) @ game[codes] - exact)
    assert np.abs(errors).mean() < 0.15 * exact.std()


def test_first_losses_compare_both_with_the_two_added_up():
    codes = lattice.some_subsets(2, 13)
    seen = lattice.patterns(codes)
    game = 0.5 * (seen[:, 3] | seen[:, 8]) + 0.1 * seen[:, 1]
    found = shapley.as_matrix(shapley.first_loss_weights(codes) @ game)
    assert found[3, 8] == pytest.approx(-0.5)  # neither loss alone costs anything, both cost 0.5
    found[[3, 8], [8, 3]] = 0
    assert np.nanmax(np.abs(found)) < 1e-12


def test_what_is_missing_is_named():
    codes = lattice.every_subset()
    with pytest.raises(ValueError, match="all bands and with none"):
        shapley.value_weights(codes[:-1])
    with pytest.raises(ValueError, match="too few to tell 13 apart; draw more"):
        shapley.value_weights(np.array([0, 1, 3, 7, 8191]))
    with pytest.raises(ValueError, match="need all 8192 subsets, these are 8191"):
        shapley.interaction_weights(codes[1:])
    with pytest.raises(ValueError, match="subset 8188 is missing"):
        shapley.first_loss_weights(np.setdiff1d(codes, [8188]))
    with pytest.raises(ValueError, match="distinct codes from 0 to 7"):
        shapley.value_weights(np.array([0, 0, 7]), 3)
    with pytest.raises(ValueError, match="13 players have 78 pairs, got 3"):
        shapley.as_matrix(np.zeros(3))
