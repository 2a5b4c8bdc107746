"""Shared figures show what was measured, in colours that agree from figure to figure."""

from __future__ import annotations

from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from predictions import history

from bandmask import plots

mpl.use("Agg")
import matplotlib.pyplot as plt

pytestmark = pytest.mark.filterwarnings("error")


@pytest.fixture
def axes() -> Any:
    figure, axis = plt.subplots()
    yield axis
    plt.close(figure)


def test_curves_draw_the_mean_and_a_band_of_one_sd(axes: Any):
    table = pd.concat([history("B8", [2.0, 1.0, 0.5], runs=3), history("none", [0.4, 0.3, 0.2], runs=3)])
    plots.plot_curves(table, axes, ylabel="validation loss", scale=100)
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["none", "B8"]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("epoch", "validation loss")
    for line, band, losses in zip(axes.lines, axes.collections, ([0.4, 0.3, 0.2], [2.0, 1.0, 0.5]), strict=True):
        mean, sd = 100 * (np.array(losses) + 0.02), 100 * np.std([0, 0.02, 0.04], ddof=1)
        assert line.get_xdata().tolist() == [0, 1, 2]
        np.testing.assert_allclose(line.get_ydata(), mean)
        vertices = band.get_paths()[0].vertices
        for epoch in range(3):
            heights = vertices[vertices[:, 0] == epoch, 1]
            assert (heights.min(), heights.max()) == pytest.approx((mean[epoch] - sd, mean[epoch] + sd))
        assert band.get_facecolor()[0, :3] == pytest.approx(mpl.colors.to_rgb(line.get_color()))


def test_curves_of_one_run_have_no_band_and_methods_have_their_colours(axes: Any):
    names = ("pre-trained", "fine-tuned")
    plots.plot_curves(pd.concat([history("B8", [2.0, 1.0], runs=1, method=m) for m in names]), axes, by="method")
    assert [(line.get_label(), line.get_color()) for line in axes.lines] == [
        (m, plots.METHOD_COLOURS[m]) for m in names
    ]
    assert set(axes.collections[0].get_paths()[0].vertices[:, 1].round(9)) <= {2.0, 1.0}


def test_curves_of_nothing_say_so(axes: Any):
    plots.plot_curves(history("B8", [1.0]).iloc[:0], axes)
    assert len(axes.lines) == 0
    assert "make run" in axes.texts[0].get_text()


def test_spectra_have_the_colours_of_the_maps_and_a_marker_each(axes: Any):
    names = ["water", "forest", "somewhere", "built-up"]
    plots.plot_spectra(np.arange(52.0).reshape(4, 13), names, axes)
    assert [line.get_color() for line in axes.lines] == plots.class_colours(names)
    assert len({line.get_marker() for line in axes.lines}) == 4
    np.testing.assert_array_equal(axes.lines[1].get_ydata(), np.arange(13.0, 26.0))


def test_every_class_of_a_map_has_a_colour_of_its_own():
    for names in (["water", "forest", "a", "b", "c"], list(plots.CLASS_COLOURS)[:10]):
        assert len(set(plots.class_colours(names))) == len(names)
    assert plots.class_colours(["Water"]) == [plots.CLASS_COLOURS["Water"]]
