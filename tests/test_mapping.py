"""Pictures show the figures they are given: each line, bar and cell is the score of the subset it stands for."""

from __future__ import annotations

import io

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest

matplotlib.use("Agg")

from test_lattice import scores

from bandmask import bands
from bandmask.robustness import lattice, mapping, shapley


@pytest.fixture
def axes():
    figure, axes = plt.subplots(layout="constrained")
    yield axes
    figure.savefig(io.BytesIO(), format="png")  # it can be drawn
    plt.close(figure)


@pytest.fixture(scope="module")
def sampled() -> lattice.Scores:
    return scores(lattice.some_subsets(2, 13))


@pytest.fixture(scope="module")
def exact() -> lattice.Scores:
    return scores(lattice.every_subset(), images=9, heads=1)


def test_curves_are_mean_best_and_worst_of_each_size(axes, sampled):
    other = scores(sampled.codes, seed=1)
    mapping.plot_losses({"one": sampled, "other": other}, axes, chance=0.2)
    drawn = [100 * np.array(line.get_ydata()) / 100 for line in axes.lines]
    for number, given in enumerate((sampled, other)):
        layers = [100 * given.accuracy[given.lost == size] for size in range(14)]
        best, worst, mean = drawn[3 * number : 3 * number + 3]
        np.testing.assert_allclose(best, [layer.max() for layer in layers])
        np.testing.assert_allclose(worst, [layer.min() for layer in layers])
        np.testing.assert_allclose(mean, [layer.mean() for layer in layers])
    assert axes.lines[0].get_color() != axes.lines[3].get_color()
    assert [text.get_text() for text in axes.get_legend().get_texts()][:2] == ["one", "other"]


def test_bars_are_the_bands_worth_in_points_in_order_of_wavelength(axes, sampled):
    worth = lattice.estimate(sampled, shapley.value_weights(sampled.codes), draws=100)
    mapping.plot_worth({"one": worth, "twice": 2 * worth}, axes, note="estimated")
    heights = [[bar.get_height() for bar in group] for group in axes.containers if hasattr(group, "patches")]
    np.testing.assert_allclose(heights, [100 * worth["value"], 200 * worth["value"]])
    labels = [label.get_text().split("\n") for label in axes.get_xticklabels()]
    assert [name for name, *_ in labels] == list(bands.NAMES)
    assert sorted(int(nm) for *_, nm in labels) == [int(nm) for *_, nm in labels]
    assert axes.get_title().endswith("\nestimated")


def test_pairs_show_the_change_against_complete_images_once(axes, sampled):
    mapping.plot_pairs(sampled, axes)
    shown = np.asarray(axes.images[0].get_array().filled(np.nan))
    change = 100 * (sampled.at(lattice.COMPLETE - lattice.code_of("B02 B08")) - sampled.at(lattice.COMPLETE))
    assert shown[7, 1] == pytest.approx(change)
    assert np.isfinite(shown).sum() == 13 * 14 // 2
    assert len(axes.texts) == 13 * 14 // 2


def test_interactions_are_centred_on_zero(axes):
    matrix = shapley.as_matrix(np.linspace(-0.03, 0.01, 78))
    mapping.plot_interactions(matrix, axes, title="interaction")
    picture = axes.images[0]
    assert picture.get_clim() == pytest.approx((-3, 3))
    shown = np.asarray(picture.get_array().filled(np.nan))
    assert shown[1, 0] == pytest.approx(-3)
    assert np.isfinite(shown).sum() == 78
    assert "−3.0" in [text.get_text() for text in axes.texts]


@pytest.mark.parametrize("worst", [True, False])
def test_extremes_show_the_lost_bands_of_each_row(axes, sampled, worst):
    mapping.plot_extremes(sampled, axes, worst=worst)
    lost = np.asarray(axes.collections[0].get_array()).reshape(14, 13)
    found = lattice.extremes(sampled, worst=worst)
    for row, hidden in zip(lost, found["hidden"], strict=True):
        assert [name for name, value in zip(bands.NAMES, row, strict=True) if value] == hidden.split()
    assert f"{100 * found['accuracy'].iloc[3]:.0f} %" in [text.get_text() for text in axes.texts]


def test_the_map_holds_every_subset_once_and_neighbours_differ_in_one_band(axes, exact):
    exact = lattice.Scores(**{**vars(exact), "correct": exact.correct.copy()})
    exact.correct[...] = False
    exact.correct[lattice.code_of("B01 B08 B12")] = True
    mapping.plot_map(exact, axes)
    shown = np.asarray(axes.images[0].get_array())
    assert shown.shape == (128, 64)
    assert (shown == 100).sum() == 1
    ((row, column),) = np.argwhere(shown == 100)
    down, across = (np.asarray(strip.images[0].get_array()) for strip in axes.child_axes)
    assert down[row].tolist() == [1, 0, 0, 0, 0, 0, 0]  # B01 of B01 … B07
    assert across[:, column].tolist() == [1, 0, 0, 0, 0, 1]  # B08 and B12 of B08 … B12
    for strip in (down, across.T):
        assert len(np.unique(strip, axis=0)) == len(strip)
        assert (np.abs(np.diff(strip, axis=0)).sum(1) == 1).all()
    assert down[0].all()  # complete images in the corner
    assert across[:, 0].all()


def test_subsets_that_were_not_looked_at_are_empty_on_the_map(axes, sampled):
    mapping.plot_map(sampled, axes)
    shown = axes.images[0].get_array().filled(np.nan)
    assert np.isfinite(shown).sum() == len(sampled.codes)


def test_a_method_has_its_colour_and_seven_are_too_many():
    found = mapping.colours("abcdef")
    assert len(set(found.values())) == 6
    assert mapping.colours("ab") == {"a": found["a"], "b": found["b"]}
    with pytest.raises(ValueError, match="7 methods in one figure"):
        mapping.colours("abcdefg")
