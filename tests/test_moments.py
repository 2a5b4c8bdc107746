"""Moments of spectra give the ridge regressions that scikit-learn fits, for any bands from any others."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import generated_images, generated_index
from hypothesis import given
from hypothesis import strategies as st
from sklearn.linear_model import Ridge

from bandmask.moments import ALPHA, Moments
from bandmask.packs import Pack

patterns = st.lists(st.booleans(), min_size=13, max_size=13).map(np.array)  # True = visible
penalties = st.sampled_from([1e-6, ALPHA, 0.5, 100.0])


def spectra(n: int = 300, seed: int = 0) -> np.ndarray:
    """Correlated reflectance (n, 13), generated."""
    draw = np.random.default_rng(seed)
    return draw.normal(size=(n, 4)) @ draw.normal(size=(4, 13)) * 0.05 + draw.normal(0.2, 0.02, (n, 13))


SPECTRA = spectra()
MOMENTS = Moments.of_spectra(SPECTRA)


def train_spectra(pack: Pack) -> np.ndarray:
    images = pack.images[pack.rows("train")]
    return images.transpose(0, 2, 3, 1).reshape(-1, 13) / 10_000


# --- of spectra


def test_mean_and_covariance_are_numpys() -> None:
    assert np.allclose(MOMENTS.mean, SPECTRA.mean(0), rtol=1e-12)
    assert np.allclose(MOMENTS.covariance, np.cov(SPECTRA.T, bias=True), rtol=1e-10)
    assert MOMENTS.pixels == 300


@given(st.permutations(range(13)), st.integers(0, 10**6))
def test_order_of_pixels_and_of_bands_changes_nothing_else(order: list[int], seed: int) -> None:
    shuffled = Moments.of_spectra(np.random.default_rng(seed).permutation(SPECTRA)[:, order])
    assert np.allclose(shuffled.mean, MOMENTS.mean[order], rtol=1e-12)
    assert np.allclose(shuffled.covariance, MOMENTS.covariance[np.ix_(order, order)], rtol=1e-9, atol=1e-15)


def test_small_integers_and_single_precision_are_summed_in_double() -> None:
    """A mean of many equal DN is that DN, and uint16 doesn't overflow."""
    same = np.full((100_000, 13), 60_001, np.uint16)
    assert (Moments.of_spectra(same).mean == 60_001).all()
    assert (Moments.of_spectra(same).covariance == 0).all()
    offset = SPECTRA.astype(np.float32) + np.float32(1000)
    assert np.allclose(Moments.of_spectra(offset).covariance, np.cov(offset.astype(float).T, bias=True), rtol=1e-9)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (np.zeros((5, 12)), r"spectra of 13 bands, two or more; got \(5, 12\)"),
        (np.zeros((1, 13)), r"two or more; got \(1, 13\)"),
        (np.zeros((2, 13, 4)), r"got \(2, 13, 4\)"),
        (np.full((3, 13), np.nan), "NaN or infinite values; leave pixels without data out"),
        (np.vstack([np.zeros((3, 13)), np.full(13, np.inf)]), "NaN or infinite"),
    ],
)
def test_what_has_no_moments_is_refused(wrong: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Moments.of_spectra(wrong)


# --- regressions


@given(patterns, penalties)
def test_a_regression_is_scikit_learns(visible: np.ndarray, alpha: float) -> None:
    seen, hidden = np.flatnonzero(visible), np.flatnonzero(~visible)
    weight, bias = MOMENTS.regression(hidden, seen, alpha)
    assert weight.shape == (len(hidden), len(seen))
    if not len(seen):
        assert np.allclose(bias, SPECTRA.mean(0))
    elif len(hidden):
        reference = Ridge(alpha, solver="svd").fit(SPECTRA[:, seen], SPECTRA[:, hidden])
        assert np.allclose(weight, np.atleast_2d(reference.coef_), rtol=1e-7, atol=1e-9)
        assert np.allclose(bias, reference.intercept_, rtol=1e-7, atol=1e-9)


@given(st.lists(patterns, max_size=8), penalties)
def test_many_at_once_are_each_the_one(several: list[np.ndarray], alpha: float) -> None:
    visible = np.array([*several, np.ones(13, bool), np.zeros(13, bool)])
    weights, biases = MOMENTS.regressions(visible, alpha)
    assert weights.shape == (len(visible), 13, 13)
    for pattern, weight, bias in zip(visible, weights, biases, strict=True):
        expected, intercept = MOMENTS.regression(range(13), np.flatnonzero(pattern), alpha)
        assert (weight[:, ~pattern] == 0).all(), "a hidden band is read"
        assert np.allclose(weight[:, pattern], expected, rtol=1e-8, atol=1e-10)
        assert np.allclose(bias, intercept, rtol=1e-8, atol=1e-10)


def test_visible_bands_predict_themselves_up_to_the_penalty() -> None:
    weights, biases = MOMENTS.regressions(np.ones((1, 13), bool), alpha=1e-9)
    assert np.allclose(weights[0], np.eye(13), atol=1e-5)
    assert np.allclose(biases, 0, atol=1e-5)


def test_a_heavy_penalty_leaves_the_means() -> None:
    weight, bias = MOMENTS.regression([3], [1, 2, 5], alpha=1e12)
    assert np.allclose(weight, 0, atol=1e-9)
    assert np.allclose(bias, MOMENTS.mean[3])


@given(patterns, st.lists(st.floats(-0.1, 0.1), min_size=13, max_size=13).map(np.array))
def test_levels_of_bands_only_move_the_intercept(visible: np.ndarray, shift: np.ndarray) -> None:
    """An offset of a sensor, known in training too, is not mistaken for a relation between bands."""
    seen, hidden = np.flatnonzero(visible), np.flatnonzero(~visible)
    weight, bias = MOMENTS.regression(hidden, seen)
    moved, other = Moments.of_spectra(SPECTRA + shift).regression(hidden, seen)
    assert np.allclose(moved, weight, rtol=1e-6, atol=1e-8)
    assert np.allclose(other, bias + shift[hidden] - weight @ shift[seen], atol=1e-8)


@given(patterns, st.integers(0, 12))
def test_one_more_visible_band_never_predicts_training_pixels_worse(visible: np.ndarray, band: int) -> None:
    def error(pattern: np.ndarray) -> np.ndarray:
        weight, bias = MOMENTS.regressions(pattern[None], alpha=1e-12)
        return np.square(SPECTRA @ weight[0].T + bias[0] - SPECTRA).mean(0)

    more = visible.copy()
    more[band] = True
    assert (error(more) <= error(visible) + 1e-12).all()


# --- of a pack


def test_moments_of_all_training_pixels_are_those_of_the_images(sample_pack: Pack) -> None:
    found = Moments.of(sample_pack, pixels=10**9)
    expected = train_spectra(sample_pack)
    assert found.pixels == len(expected)
    assert np.allclose(found.mean, expected.mean(0), rtol=1e-10)
    assert np.allclose(found.mean, sample_pack.band_means(), rtol=1e-6)
    assert np.allclose(found.covariance, np.cov(expected.T, bias=True), rtol=1e-8)


def test_pixels_drawn_at_random_stand_for_all(sample_pack: Pack) -> None:
    drawn = Moments.of(sample_pack, pixels=20_000, seed=1)
    assert drawn.pixels == 20_000
    deviation = train_spectra(sample_pack).std(0)
    assert (np.abs(drawn.mean - sample_pack.band_means()) < 5 * deviation / np.sqrt(20_000)).all()


def test_the_same_seed_draws_the_same_pixels_and_another_others(sample_pack: Pack) -> None:
    first, again, other = (Moments.of(sample_pack, pixels=500, seed=seed) for seed in (0, 0, 1))
    assert np.array_equal(first.covariance, again.covariance)
    assert not np.array_equal(first.covariance, other.covariance)


def test_nothing_of_other_splits_is_read(tmp_path: Path, make_pack: Callable[..., Pack]) -> None:
    images, index = generated_images(24, 8), generated_index(24)
    pack = make_pack(tmp_path / "one", images=images, index=index)
    spoilt = images.copy()
    spoilt[index["split"].to_numpy() != "train", 3] = 7
    other = make_pack(tmp_path / "two", images=spoilt, index=index)
    assert np.array_equal(Moments.of(pack).covariance, Moments.of(other).covariance)
    assert Moments.of(other, split="test").mean[3] == pytest.approx(7 / 10_000)
    with pytest.raises(ValueError, match="no image in split 'holdout'"):
        Moments.of(pack, split="holdout")


def test_an_eurosat_regression_predicts_test_pixels_as_scikit_learns_does(eurosat_pack: Pack) -> None:
    def pixels(split: str, images: int) -> np.ndarray:
        return eurosat_pack.images[eurosat_pack.rows(split)[:images]].transpose(0, 2, 3, 1).reshape(-1, 13) / 10_000

    hidden, seen = [1, 2, 3], [0, *range(4, 13)]
    train, test = pixels("train", 30), pixels("test", 10)
    weight, bias = Moments.of_spectra(train).regression(hidden, seen)
    reference = Ridge(ALPHA).fit(train[:, seen], train[:, hidden])
    assert np.abs(test[:, seen] @ weight.T + bias - reference.predict(test[:, seen])).max() < 1e-7
