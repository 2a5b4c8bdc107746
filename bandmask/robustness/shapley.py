"""What each band is worth, and each pair: Shapley values and interaction indices of accuracy over subsets of bands.

A band's Shapley value is what it adds to the accuracy, averaged over all orders in which bands could come back one by
one. They add up to the accuracy with all bands minus that with none. All are linear in the accuracies, so they are
matrices of weights over subsets, for `lattice.estimate`.
Source: Shapley 1953; Grabisch and Roubens 1999 (interaction index); Charnes et al. 1988 (least squares, as here).
"""

from __future__ import annotations

from itertools import combinations
from math import comb

import numpy as np

from bandmask.robustness.lattice import BANDS, lost_bands, patterns


def value_weights(codes: np.ndarray, count: int = BANDS) -> np.ndarray:
    """Weights (count, P) that make Shapley values of a game's values on subsets; rows are bands.

    With all 2^count subsets they are exact. Of a sample that holds enough subsets of every size they are an estimate:
    the additive effects of each size come from a least-squares fit, so the values add up to v(all) − v(none) even so,
    and a game that is additive within each size is recovered exactly.

    Args:
        codes: (P,) distinct subsets, bit i = player i takes part; the empty one and the full one are needed.
        count: number of players.

    Raises:
        ValueError: the empty or the full subset is missing, or a size has too few subsets to tell players apart.
    """
    codes = _distinct(codes, count)
    taken, size = patterns(codes, count), count - lost_bands(codes, count)
    weights = np.zeros((count, len(codes)))
    for whole, sign in ((count, 1), (0, -1)):
        if not (size == whole).any():
            raise ValueError("Shapley values need the scores with all bands and with none; one of them is missing")
        weights[:, size == whole] = sign / count
    for layer in range(1, count):  # φᵢ = (v(all) − v(none)) / n + the mean over sizes of i's effect among equal sizes
        (places,) = np.nonzero(size == layer)
        design = np.column_stack([np.ones(len(places)), taken[places] - layer / count])
        if np.linalg.matrix_rank(design) < count:  # the effects of a size add up to 0, so one direction is free
            raise ValueError(
                f"{len(places)} subsets of {layer} bands are too few to tell {count} apart; draw more of each size"
            )
        weights[:, places] += np.linalg.pinv(design, rcond=1e-10)[1:] / (count - 1)
    return weights


def interaction_weights(codes: np.ndarray, count: int = BANDS) -> np.ndarray:
    """Weights (pairs, P) of the Shapley interaction index of each pair, in the order of `pairs`.

    Above 0 the two bands are worth more together than apart; below 0 each stands in for the other.

    Args:
        codes: all 2^count subsets, in any order.
        count: number of players.

    Raises:
        ValueError: a subset is missing: pairs can't be estimated from a few.
    """
    codes = _distinct(codes, count)
    if len(codes) < 2**count:
        raise ValueError(
            f"interactions need all {2**count} subsets, these are {len(codes)}; score all of them (exact=True), or "
            "take lattice.pair_losses, which needs those that lose two bands or fewer"
        )
    taken, size = patterns(codes, count), count - lost_bands(codes, count)
    weights = []
    for first, second in pairs(count):
        both = taken[:, first].astype(int) + taken[:, second]
        rest = size - both  # size of the subset without the two
        orders = np.array([comb(count - 2, r) for r in range(count - 1)])
        sign = np.where(both == 1, -1.0, 1.0)
        weights.append(sign / orders[rest] / (count - 1))
    return np.array(weights)


def first_loss_weights(codes: np.ndarray, count: int = BANDS) -> np.ndarray:
    """Weights (pairs, P) of v(all) − v(without i) − v(without j) + v(without both), in the order of `pairs`.

    The interaction where bands begin to fail: below 0 losing both costs more than the two losses added up, so each
    stood in for the other. It needs only the subsets that lose two bands or fewer.

    Raises:
        ValueError: one of those is missing.
    """
    codes = _distinct(codes, count)
    full = 2**count - 1
    place = {code: i for i, code in enumerate(codes.tolist())}
    weights = np.zeros((len(pairs(count)), len(codes)))
    for row, (first, second) in enumerate(pairs(count)):
        a, b = 1 << first, 1 << second
        for code, sign in ((full, 1), (full - a, -1), (full - b, -1), (full - a - b, 1)):
            if code not in place:
                raise ValueError(f"subset {code} is missing; score all subsets that lose two bands or fewer")
            weights[row, place[code]] += sign
    return weights


def pairs(count: int = BANDS) -> list[tuple[int, int]]:
    """Pairs of players (i, j), i < j, in the order of the rows of weights: 78 of 13."""
    return list(combinations(range(count), 2))


def as_matrix(values: np.ndarray, count: int = BANDS) -> np.ndarray:
    """A value of each pair as a symmetric (count, count) matrix with NaN on the diagonal."""
    if len(values) != len(pairs(count)):
        raise ValueError(f"{count} players have {len(pairs(count))} pairs, got {len(values)} values")
    matrix = np.full((count, count), np.nan)
    for (first, second), value in zip(pairs(count), values, strict=True):
        matrix[first, second] = matrix[second, first] = value
    return matrix


def _distinct(codes: np.ndarray, count: int) -> np.ndarray:
    codes = np.asarray(codes)
    if len(np.unique(codes)) < len(codes) or len(codes) == 0 or codes.min() < 0 or codes.max() >= 2**count:
        raise ValueError(f"subsets of {count} players are distinct codes from 0 to {2**count - 1}")
    return codes
