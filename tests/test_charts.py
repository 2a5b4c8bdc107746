"""Charts: histograms are numpy's, and both themes can be read."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.colors import to_hex

from bandmask.visualizer import charts, pictures
from bandmask.visualizer.bandview import THEMES, State
from bandmask.visualizer.panels import render


@given(st.integers(0, 2**32 - 1), st.floats(0.05, 0.4), st.floats(0.45, 0.9))
def test_histograms_are_those_of_numpy(seed: int, low: float, high: float) -> None:
    values = np.random.default_rng(seed).uniform(-0.2, 1.2, (20, 20))
    expected, _ = np.histogram(values, np.linspace(low, high, charts.BINS + 1))
    found = charts.bin_counts(values, low, high)
    assert abs(found - expected).sum() <= 2, "a value on an edge may fall on either side"


@pytest.mark.parametrize("theme", THEMES)
def test_text_can_be_read_in_both_themes(theme: str) -> None:
    """Contrast by WCAG 2.2: 4.5 for text, 3 for marks, and the two series differ in lightness or hue."""
    colours = charts.THEMES[theme]
    assert contrast(colours.text, colours.background) > 4.5
    for mark in (colours.complete, colours.incomplete, pictures.HIDDEN_COLOUR):
        assert contrast(mark, colours.background) > 3
    figure = render(State(theme=theme), np.full((13, 4, 4), 0.2, np.float32), np.zeros(13))
    assert to_hex(figure.get_facecolor()) == colours.background
    assert {to_hex(text.get_color()) for text in figure.axes[0].texts} == {colours.text}


def contrast(first: str, second: str) -> float:
    def luminance(colour: str) -> float:
        parts = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
        linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
        return float(linear @ [0.2126, 0.7152, 0.0722])

    high, low = sorted((luminance(first), luminance(second)), reverse=True)
    return (high + 0.05) / (low + 0.05)
