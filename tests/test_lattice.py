"""Codes of subsets, samples of them, and figures with intervals: exact where they can be, honest where they can't."""

from __future__ import annotations

from math import comb

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bandmask import bands
from bandmask.robustness import lattice
from bandmask.robustness.lattice import COMPLETE, Scores


def scores(codes: np.ndarray, images: int = 40, heads: int = 2, *, seed: int = 0, groups: int = 0) -> Scores:
    """Generated: the more bands are visible, the likelier an image is right."""
    draw = np.random.default_rng(seed)
    chance = 0.2 + 0.05 * (13 - lattice.lost_bands(codes))
    correct = draw.random((len(codes), heads, images)) < chance[:, None, None]
    samples = np.arange(100, 100 + images)
    return Scores(
        codes, correct, samples, samples % 3, np.arange(images) % groups if groups else samples, np.arange(heads)
    )


@given(st.sets(st.sampled_from(bands.NAMES)))
def test_a_code_and_its_bands_are_the_same_thing(visible):
    code = lattice.code_of(visible)
    assert lattice.visible_bands(code) == tuple(name for name in bands.NAMES if name in visible)
    assert lattice.patterns(np.array([code]))[0].tolist() == [name in visible for name in bands.NAMES]
    assert lattice.lost_bands(np.array([code])) == [13 - len(visible)]


def test_known_codes():
    assert lattice.code_of(bands.NAMES) == COMPLETE == 8191
    assert lattice.code_of([]) == 0
    assert lattice.code_of("B01 nir") == 1 + 128
    with pytest.raises(ValueError, match="unknown band 'B99'"):
        lattice.code_of("B99")


@settings(max_examples=20)
@given(st.integers(0, 4), st.integers(1, 100), st.integers(0, 2**32 - 1))
def test_a_sample_holds_all_small_losses_and_loses_every_band_equally_often(complete_to, each, seed):
    codes = lattice.some_subsets(complete_to, each, seed=seed)
    assert (np.diff(codes) > 0).all()
    lost = lattice.lost_bands(codes)
    for size in range(14):
        layer = lattice.patterns(codes[lost == size])
        whole = min(size, 13 - size) <= complete_to
        assert len(layer) == (comb(13, size) if whole else min(-(-each // 13) * 13, comb(13, size)))
        assert len(set(layer.sum(0))) == 1
        if 0 < size < 13:
            assert np.linalg.matrix_rank(layer.astype(float)) == 13  # the effects of all bands can be told apart
    np.testing.assert_array_equal(codes, lattice.some_subsets(complete_to, each, seed=seed))


def test_every_subset_of_a_size_is_drawn_equally_often():
    draws = 300
    counts = np.bincount(np.concatenate([lattice.some_subsets(2, 13, seed=s) for s in range(draws)]), minlength=8192)
    lost = lattice.lost_bands(lattice.every_subset())
    for size in (3, 6):
        expected = draws * 13 / comb(13, size)
        assert counts[lost == size].mean() == pytest.approx(expected)
        # a Poisson count each, if none is favoured; what a turn shares makes no count likelier
        assert counts[lost == size].var() == pytest.approx(expected, rel=0.35)


def test_an_empty_sample_is_refused():
    with pytest.raises(ValueError, match="1 or more; got 0"):
        lattice.some_subsets(2, 0)


def test_means_by_number_of_lost_bands_are_pandas():
    found = scores(lattice.some_subsets(1, 13))
    expected = pd.Series(found.accuracy).groupby(found.lost).mean()
    estimated = lattice.estimate(found, lattice.mean_weights(found.codes), draws=50)
    np.testing.assert_allclose(estimated["value"], expected, atol=1e-12)
    overall = lattice.estimate(found, lattice.overall_weights(found.codes), draws=50)
    np.testing.assert_allclose(overall["value"], expected[1:13].mean(), atol=1e-12)


def test_a_size_that_was_not_looked_at_has_no_mean():
    found = scores(np.array([0, COMPLETE]))
    estimated = lattice.estimate(found, lattice.mean_weights(found.codes), draws=50)
    assert estimated["value"].notna().tolist() == [True, *[False] * 12, True]


def test_intervals_are_those_of_a_plain_bootstrap_and_hold_the_truth_as_often_as_they_say():
    codes = np.array([COMPLETE])
    draw, inside, widths = np.random.default_rng(0), 0, []
    for trial in range(200):
        right = draw.random((1, 1, 80)) < 0.7
        found = Scores(codes, right, np.arange(80), np.zeros(80), np.arange(80), np.zeros(1))
        row = lattice.estimate(found, np.ones((1, 1)), draws=400, seed=trial).iloc[0]
        inside += row["low"] <= 0.7 <= row["high"]
        widths.append(row["high"] - row["low"])
    assert 0.88 < inside / 200 < 0.99
    assert np.mean(widths) == pytest.approx(2 * 1.96 * np.sqrt(0.7 * 0.3 / 80), rel=0.08)


def test_images_of_one_group_are_drawn_together():
    codes = np.array([COMPLETE])
    right = np.repeat(np.random.default_rng(0).random(10) < 0.5, 12)[None, None]
    alone = Scores(codes, right, np.arange(120), np.zeros(120), np.arange(120), np.zeros(1))
    together = Scores(codes, right, np.arange(120), np.zeros(120), np.repeat(np.arange(10), 12), np.zeros(1))
    narrow, wide = (lattice.estimate(s, np.ones((1, 1))).iloc[0] for s in (alone, together))
    assert narrow["value"] == wide["value"]
    assert (wide["high"] - wide["low"]) > 2.5 * (narrow["high"] - narrow["low"])  # √12 in theory


def test_a_pair_sees_the_same_images_so_what_they_share_cancels():
    codes = lattice.some_subsets(1, 13)
    one = scores(codes, seed=1)
    better = Scores(**{**vars(one), "correct": one.correct.copy()})
    better.correct[:, :, 0] = True
    weights = lattice.mean_weights(codes)
    itself = lattice.estimate(one, weights, minus=one)
    assert (itself.to_numpy() == 0).all()
    found = lattice.estimate(better, weights, minus=one)
    np.testing.assert_allclose(
        found["value"], lattice.estimate(better, weights)["value"] - lattice.estimate(one, weights)["value"]
    )
    assert (found["low"] >= 0).all()  # an image that gained can't make a draw worse
    with pytest.raises(ValueError, match="differ in samples, labels"):
        lattice.estimate(
            one, weights, minus=Scores(**{**vars(one), "samples": one.samples + 1, "labels": one.labels + 1})
        )
    with pytest.raises(ValueError, match=r"weights have shape \(1, 2\)"):
        lattice.estimate(one, np.ones((1, 2)))


def test_worst_and_best_are_those_of_a_search():
    found = scores(lattice.some_subsets(2, 13), images=7)
    for worst, pick in ((True, min), (False, max)):
        table = lattice.extremes(found, worst=worst)
        for row in table.itertuples():
            layer = [a for a, lost in zip(found.accuracy, found.lost, strict=True) if lost == row.lost]
            assert row.accuracy == pick(layer) == found.at(row.code)
            assert row.subsets == len(layer)
            assert set(row.hidden.split()) | set(row.visible.split()) == set(bands.NAMES)
            assert len(row.hidden.split()) == row.lost


def test_pairs_are_looked_up_by_their_bands():
    found = scores(lattice.some_subsets(2, 13))
    pairs = lattice.pair_losses(found)
    assert pairs[1, 7] == pairs[7, 1] == found.at(COMPLETE - lattice.code_of("B02 B08"))
    assert pairs[4, 4] == found.at(COMPLETE - lattice.code_of("B05"))
    with pytest.raises(ValueError, match="is not among the scores"):
        lattice.pair_losses(scores(np.array([0, COMPLETE])))


def test_the_table_counts_images(tmp_path):
    found = scores(np.array([0, 129, COMPLETE]))
    table = found.table(method="ridge")
    assert len(table) == 6
    assert table["visible"].tolist()[2:4] == ["B01 B08", "B01 B08"]
    assert table["hidden"].iloc[-1] == ""
    assert table["visible"].iloc[0] == ""
    assert table["correct"].tolist() == found.correct.sum(2).ravel().tolist()
    table.to_parquet(tmp_path / "table.parquet")
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "table.parquet"), table)


def test_saved_scores_come_back_and_a_damaged_file_is_named(tmp_path):
    found = scores(lattice.some_subsets(1, 13))
    path = found.save(tmp_path / "ridge.npz")
    loaded = Scores.load(path)
    assert all(np.array_equal(getattr(loaded, name), getattr(found, name)) for name in vars(found))
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(ValueError, match=r"ridge\.npz is damaged"):
        Scores.load(path)
    with pytest.raises(FileNotFoundError, match="09_robustness_map"):
        Scores.load(tmp_path / "absent.npz")


@given(st.lists(st.integers(0, 4), min_size=5, max_size=60), st.integers(1, 60), st.integers(0, 99))
def test_drawn_images_keep_the_proportion_of_classes(labels, count, seed):
    labels = np.array(labels)
    rows = np.arange(len(labels))
    drawn = lattice.stratified(labels, rows, count, seed=seed)
    assert len(np.unique(drawn)) == len(drawn) == min(count, len(rows))
    for label in np.unique(labels):
        expected = (labels == label).sum() * len(drawn) / len(labels)
        assert abs((labels[drawn] == label).sum() - expected) <= 2
    more = lattice.stratified(labels, rows, count + 3, seed=seed)
    assert set(drawn) <= set(more)


def test_all_images_are_taken_if_asked_for():
    rows = np.array([9, 3, 5])
    np.testing.assert_array_equal(lattice.stratified(np.zeros(10), rows, 0), [3, 5, 9])
    with pytest.raises(ValueError, match="0 for all; got -1"):
        lattice.stratified(np.zeros(10), rows, -1)
