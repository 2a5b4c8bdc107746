"""The figure shows what it says: complete left, incomplete beside it under one stretch, pixels where one clicks."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from bandmask import bands
from bandmask.visualizer import panels, pictures
from bandmask.visualizer.bandview import State, mask_image
from bandmask.visualizer.panels import layout_of, pixel_at, render

MEANS = np.linspace(0.1, 0.4, 13)
VIEWS = ("true colour", "swir", pictures.FIGURE_3_1, "B08", "ndvi")


def image(size: tuple[int, int] = (16, 16)) -> np.ndarray:
    return np.random.default_rng(2).uniform(0.02, 0.5, (13, *size)).astype(np.float32)


def pixels(figure: Figure) -> np.ndarray:
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].astype(int)


def panel(drawn: np.ndarray, state: State, size: tuple[int, int], place: int) -> np.ndarray:
    """The part of a drawn figure that shows complete (0), incomplete (1) or difference (2)."""
    layout = layout_of(state, size)
    box = layout.panels[place]
    top = (layout.height - box.bottom - box.height) * panels.DPI
    rows = slice(round(top), round(top + box.height * panels.DPI))
    return drawn[rows, round(box.left * panels.DPI) : round(box.x(1) * panels.DPI)]


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.axes[0].texts]


def layers(figure: Figure) -> dict[str, np.ndarray]:
    return {shown.get_gid(): np.asarray(shown.get_array()) for shown in figure.axes[0].images}


@pytest.mark.parametrize("view", VIEWS)
def test_hiding_bands_leaves_the_complete_panel_as_it_was(view: str) -> None:
    state = State(view=view, ratio=0.5)
    before = pixels(render(state, image(), MEANS))
    after = pixels(render(replace(state, mask=pictures.bands_of(view)), image(), MEANS))
    assert (panel(before, state, (16, 16), 0) == panel(after, state, (16, 16), 0)).all()
    assert (panel(before, state, (16, 16), 1) != panel(after, state, (16, 16), 1)).any()
    assert (panel(before, state, (16, 16), 2) != panel(after, state, (16, 16), 2)).any()


def test_the_same_state_gives_the_same_picture_and_nothing_else_is_touched() -> None:
    given_, before = image(), image()
    state = State(mask=("B04",), shape="cloud")
    assert (pixels(render(state, given_, MEANS)) == pixels(render(state, given_, MEANS))).all()
    np.testing.assert_array_equal(given_, before)


def test_both_panels_show_their_image_under_the_limits_of_the_complete_one() -> None:
    state = State(mask=("B03",), ratio=0.5, value=5.0, stretch=(10.0, 90.0))
    shown = layers(render(state, image(), MEANS))
    masked, limits = mask_image(state, image(), MEANS), pictures.stretch_limits(image(), 10, 90)
    np.testing.assert_array_equal(shown["complete"], pictures.picture(masked.complete, state.view, limits, {}))
    expected = pictures.picture(masked.incomplete, state.view, limits, masked.hidden)
    np.testing.assert_array_equal(shown["incomplete"], expected)


def test_the_figure_says_what_is_hidden() -> None:
    said = texts(render(State(mask=("B02", "B04", "B11"), ratio=1.0), image(), MEANS))
    assert said[0] == "10 of 13 bands visible · hidden: B02 100%, B04 100%, B11 100% · pixel"
    assert "hidden: B04 (red), B02 (blue)" in said
    assert "true colour · B04 B03 B02" in said
    assert said.count("−100%") == 3


def test_the_spectrum_stands_over_wavelength_complete_and_incomplete() -> None:
    state = State(mask=("B04", "B08"), ratio=1.0, value=0.3, pixel=(3, 5))
    figure = render(state, image(), MEANS)
    lines = {line.get_label(): line for line in figure.axes[0].lines}
    complete, hidden = lines["complete"].get_xydata(), lines["hidden: mask value"].get_xydata()
    nm = np.array([band.wavelength_nm for band in bands.BANDS])
    np.testing.assert_allclose(np.diff(complete[:, 0]) / np.diff(nm), np.diff(complete[:, 0])[0] / np.diff(nm)[0])
    slope, start = np.polyfit(image()[:, 3, 5], complete[:, 1], 1)
    np.testing.assert_allclose(slope * image()[:, 3, 5] + start, complete[:, 1], atol=1e-5)
    np.testing.assert_allclose(hidden[:, 1], slope * 0.3 + start, atol=1e-5)
    np.testing.assert_allclose(hidden[:, 0], complete[[3, 7], 0])
    assert len(lines["visible"].get_xydata()) == 11
    assert "spectrum of pixel (3, 5)" in texts(figure)


@given(
    st.sampled_from(VIEWS),
    st.tuples(st.integers(1, 300), st.integers(1, 300)),
    st.sampled_from([0, 1, 2]),
    st.data(),
)
def test_a_click_on_a_pixel_is_that_pixel(view: str, size: tuple[int, int], place: int, data: st.DataObject) -> None:
    state = State(view=view)
    row, column = data.draw(st.integers(0, size[0] - 1)), data.draw(st.integers(0, size[1] - 1))
    copies = 3 if view == pictures.FIGURE_3_1 else 1
    copy = data.draw(st.integers(0, copies - 1))
    layout = layout_of(state, size)
    box = layout.panels[place]
    x = box.x((column + 0.5) / size[1]) / panels.WIDTH
    y = 1 - box.y(1 - (copy * size[0] + row + 0.5) / (size[0] * copies)) / layout.height
    assert pixel_at(state, size, x, y) == (row, column)


@pytest.mark.parametrize(("x", "y"), [(0.001, 0.001), (0.5, 0.99), (0.34, 0.3), (0.999, 0.5)])
def test_a_click_beside_the_pictures_is_none(x: float, y: float) -> None:
    assert pixel_at(State(), (64, 64), x, y) is None


@pytest.mark.parametrize("size", [(64, 64), (256, 100), (30, 500), (1, 1), (600, 3)])
@pytest.mark.parametrize("view", VIEWS)
def test_everything_fits_on_the_figure_and_nothing_overlaps(view: str, size: tuple[int, int]) -> None:
    layout = layout_of(State(view=view), size)
    boxes = [*layout.panels, layout.spectrum, layout.histograms]
    for box in boxes:
        assert box.left >= 0
        assert box.bottom >= 0
        assert box.x(1) <= panels.WIDTH
        assert box.y(1) <= layout.height
    for first, second in zip(layout.panels[:-1], layout.panels[1:], strict=True):
        assert first.x(1) < second.left
    assert layout.panels[0].bottom > layout.spectrum.y(1)
    copies = 3 if view == pictures.FIGURE_3_1 else 1
    assert layout.panels[0].width / size[1] == pytest.approx(layout.panels[0].height / size[0] / copies)
    assert render(State(view=view, mask=("B04",)), image(size), MEANS).get_size_inches()[1] == pytest.approx(
        layout.height
    )


def test_a_large_picture_is_averaged_down_not_picked_from() -> None:
    """Every n-th pixel of a mask of columns would show all or none of them."""
    columns = np.zeros((600, 600, 3), np.uint8)
    columns[:, ::2] = 200
    fitted = panels._fitted(columns, 300)
    assert fitted.shape == (300, 300, 3)
    assert (fitted == 100).all()


def test_a_torn_image_is_drawn() -> None:
    torn = image()
    torn[bands.NAMES.index("B10")] = np.nan
    torn[:, :8, :8] = np.nan
    for view in (*VIEWS, "B10"):
        pixels(render(State(view=view, mask=("B04",), pixel=(2, 2)), torn, MEANS))
    pixels(render(State(), np.full((13, 4, 4), np.nan, np.float32), MEANS))
