"""Shared figures show what was measured, in colours that agree from figure to figure."""

from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from predictions import history

from bandmask import bands, datasets, plots

mpl.use("Agg")
import matplotlib.pyplot as plt

pytestmark = pytest.mark.filterwarnings("error")


@pytest.fixture
def axes() -> Any:
    figure, axis = plt.subplots()
    yield axis
    plt.close(figure)


def test_curves_draw_the_mean_and_a_band_of_one_sd_or_say_that_nothing_is_there(axes: Any):
    table = pd.concat([history("B8", [2.0, 1.0, 0.5], runs=3), history("none", [0.4, 0.3, 0.2], runs=3)])
    plots.plot_curves(table, axes, ylabel="validation loss", scale=100)
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["none", "B8"]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("epoch", "validation loss")
    for line, band, losses in zip(axes.lines, axes.collections, ([0.4, 0.3, 0.2], [2.0, 1.0, 0.5]), strict=True):
        mean, sd = 100 * (np.array(losses) + 0.02), 100 * np.std([0, 0.02, 0.04], ddof=1)
        np.testing.assert_allclose(line.get_xydata().T, [[0, 1, 2], mean])
        vertices = band.get_paths()[0].vertices
        for epoch in range(3):
            heights = vertices[vertices[:, 0] == epoch, 1]
            assert (heights.min(), heights.max()) == pytest.approx((mean[epoch] - sd, mean[epoch] + sd))
    axes.clear()
    names = ("pre-trained", "fine-tuned")
    plots.plot_curves(pd.concat([history("B8", [2.0, 1.0], runs=1, method=m) for m in names]), axes, by="method")
    assert [line.get_color() for line in axes.lines] == [plots.METHOD_COLOURS[m] for m in names]
    assert set(axes.collections[0].get_paths()[0].vertices[:, 1].round(9)) <= {2.0, 1.0}, "one run has no SD"
    plots.plot_curves(history("B8", [1.0]).iloc[:0], axes)
    assert "make run" in axes.texts[0].get_text()


CLASSES = {
    "sample": datasets.SAMPLE_CLASSES,
    "EuroSAT": datasets.EUROSAT_CLASSES,
    "IGBP": datasets.SIMPLIFIED,
    "unknown": ["water", "forest", "a", "b", "c"],
}
PALETTES = {name: plots.class_colours(names) for name, names in CLASSES.items()}
PALETTES |= {"lines": plots.LINE_COLOURS, "methods": [*plots.METHOD_COLOURS.values()]}


@pytest.mark.parametrize("eyes", ["normal", "protan", "deutan", "tritan"])
@pytest.mark.parametrize("name", PALETTES)
def test_every_class_and_every_line_is_told_apart_by_all_eyes(name: str, eyes: str):
    """CIE 1976; 2.3 is just seen side by side, and patches of a map lie apart."""
    colours = lab(np.array([mpl.colors.to_rgb(colour) for colour in PALETTES[name]]), eyes)
    apart = np.linalg.norm(colours[:, None] - colours, axis=-1)[np.triu_indices(len(colours), 1)]
    assert apart.min() > (10 if name == "methods" else 15)
    assert len(set(plots.class_colours(list(map(str, range(254)))))) == 254


SIDE = 12
VIEWS = [name for names in plots.VIEWS.values() for name in names]
HIDDEN = np.array([[int(c[i : i + 2], 16) for i in (1, 3, 5)] for c in (plots.HIDDEN_COLOUR, plots.HATCH_COLOUR)])
# Colours as those see them who lack one kind of cones, of linear RGB (Machado et al. 2009, severity 1).
EYES = {
    "normal": np.eye(3),
    "protan": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deutan": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritan": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}


def image(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(0.02, 0.5, (13, SIDE, SIDE)).astype(np.float32)


def half() -> np.ndarray:
    """Hidden in the upper half."""
    return np.arange(SIDE)[:, None] + np.zeros((SIDE, SIDE)) < SIDE // 2


def shown(view: str, hidden: dict[str, np.ndarray], values: np.ndarray | None = None) -> np.ndarray:
    return plots.picture(image() if values is None else values, view, plots.stretch_limits(image()), hidden)


def lab(colours: np.ndarray, eyes: str) -> np.ndarray:
    """CIE L*a*b* (D65) of sRGB, 0 to 1, as these eyes see it."""
    linear = np.where(colours <= 0.04045, colours / 12.92, ((colours + 0.055) / 1.055) ** 2.4)
    linear = linear @ np.transpose(EYES[eyes])
    to_xyz = [[0.41246, 0.35758, 0.18044], [0.21267, 0.71515, 0.07218], [0.01933, 0.11919, 0.95030]]
    xyz = np.clip(linear, 0, 1) @ np.transpose(to_xyz) / [0.95047, 1, 1.08883]
    x, y, z = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116).T
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], -1)


@pytest.mark.parametrize("eyes", EYES)
def test_what_is_hidden_is_no_grey_and_no_index_to_any_eyes(eyes: str):
    """CIE 1976 colour differences; 2.3 is just seen. Lines of a second colour tell it from whatever else is there."""
    hidden = lab(HIDDEN / 255, eyes)
    for name, least in (("gray", (40, 30)), (plots.INDEX_MAP, (20, 15))):
        others = lab(plt.get_cmap(name)(np.linspace(0, 1, 64))[:, :3], eyes)
        assert (np.linalg.norm(hidden[:, None] - others, axis=-1).min(1) > least).all()
    assert np.linalg.norm(hidden[0] - hidden[1]) > 15


@pytest.mark.parametrize("name", bands.COMPOSITES)
def test_a_composite_has_one_gain_so_that_grey_stays_grey(name: str):
    limits = plots.stretch_limits(image())
    channels = bands.channel_indices(bands.COMPOSITES[name])
    gain = max(limits[1][channels] - limits[0][channels])
    found = plots.composite(image(), name)
    for place, channel in enumerate(channels):
        np.testing.assert_allclose(found[..., place], np.clip((image()[channel] - limits[0][channel]) / gain, 0, 1))
    np.testing.assert_allclose(shown(name, {}), 255 * found, atol=1)
    brighter = image() + np.float32(0.05)  # the same step of light in three bands is the same step of colour
    step = plots.composite(brighter, name, limits) - found
    within = (found > 0).all(-1) & (plots.composite(brighter, name, limits) < 1).all(-1)
    assert np.ptp(step[within], axis=-1).max() < 1e-5


def test_limits_are_percentiles_a_band_of_one_image_or_of_all():
    many = np.stack([image(seed) for seed in range(4)])
    for given_, values in ((image(), image().reshape(13, -1)), (many, many.swapaxes(0, 1).reshape(13, -1))):
        found = plots.stretch_limits(given_, 10, 90)
        np.testing.assert_allclose(found, np.percentile(values, [10, 90], axis=1))
    torn = image()
    torn[3, 0, 0] = torn[10] = np.nan
    low, high = plots.stretch_limits(torn)
    np.testing.assert_allclose([low[3], high[3]], np.percentile(torn[3].ravel()[1:], [2, 98]))
    assert (low[10], high[10]) == (0, 1)
    assert np.isfinite(plots.composite(np.full((13, 4, 4), 7.0), "swir")).all()


def test_what_does_not_exist_lists_what_does():
    with pytest.raises(ValueError, match=r"unknown view 'evi'; available: .*true colour"):
        plots.mode_of("evi")


@given(st.sampled_from(list(bands.COMPOSITES)), st.sampled_from(bands.NAMES), st.integers(0, 9))
def test_a_hidden_channel_is_dark_and_the_others_are_as_they_were(view: str, name: str, seed: int):
    lost = np.random.default_rng(seed).random((SIDE, SIDE)) < 0.5
    found, whole = shown(view, {name: lost}), shown(view, {})
    for channel, band in enumerate(plots.bands_of(view)):
        expected = np.where(lost, 0, whole[..., channel]) if band == name else whole[..., channel]
        np.testing.assert_array_equal(found[..., channel], expected)


@pytest.mark.parametrize("view", VIEWS)
def test_what_was_under_hidden_pixels_never_shows_and_is_hatched(view: str):
    hidden = {name: half() for name in plots.bands_of(view)}
    other, torn = image(), image()
    other[:, half()] = np.random.default_rng(5).uniform(-1, 1, (13, half().sum()))
    torn[:, half()] = np.nan
    found = shown(view, hidden)
    np.testing.assert_array_equal(shown(view, hidden, other), found)
    np.testing.assert_array_equal(shown(view, {}, torn), found)
    is_hidden = (found[:SIDE, :, None] == HIDDEN).all(-1)
    assert is_hidden[half()].any(-1).all()
    assert is_hidden[half()].any(0).all()
    assert not is_hidden[~half()].any()


@pytest.mark.parametrize("name", bands.INDICES)
def test_an_index_is_its_formula_and_needs_both_its_bands(name: str):
    first, second = (image()[bands.NAMES.index(band)].astype(float) for band in bands.INDICES[name])
    expected = (first - second) / (first + second)
    np.testing.assert_allclose(plots.values_of(image(), name, ()), expected, rtol=1e-5, atol=1e-6)
    assert (plots.values_of(np.zeros((13, 2, 2)), name, ()) == 0).all()
    assert (shown(name, {bands.INDICES[name][0]: half()})[half()][:, None] == HIDDEN).all(-1).any(-1).all()


@pytest.mark.parametrize("view", VIEWS)
def test_change_is_drawn_where_something_changed(view: str):
    limits = plots.stretch_limits(image())
    assert (plots.change(image(), image(), view, limits)[0] == 0).all()
    changed = image()
    changed[bands.NAMES.index(plots.bands_of(view)[0]), 3, 4] = 0.26
    found, end = plots.change(image(), changed, view, limits)
    assert np.flatnonzero(found[:SIDE]).tolist() == [3 * SIDE + 4]
    assert end > 0
    if plots.mode_of(view) == "band":
        np.testing.assert_allclose(found, (changed - image())[bands.NAMES.index(view)])


LOST = {"true colour": "hidden: B04 (red)", "colour infrared": "hidden: B08 (red), B04 (green)"}
LOST |= {"moisture": "nothing hidden here", "ndvi": "hidden: B08, B04", "B11": "nothing hidden here"}


@pytest.mark.parametrize(("view", "said"), LOST.items())
def test_lost_channels_are_named_and_no_others(view: str, said: str):
    assert plots.lost_channels(view, ("B04", "B08")) == said


def test_pictures_beside_each_other_stand_under_one_stretch_that_of_the_complete():
    images = [image(seed) * (seed + 1) for seed in range(7)]
    gallery = plots.plot_gallery(images, list("abcdefg"))
    assert [axis.get_title() for axis in gallery.axes if axis.get_visible()] == list("abcdefg")
    limits, whole = plots.stretch_limits(np.stack(images)), np.stack(images[:2])
    for axis, one in zip(gallery.axes, images, strict=False):
        np.testing.assert_allclose(axis.images[0].get_array(), plots.composite(one, "true colour", limits))
    pairs = plots.plot_before_after(whole, whole / 2, ("nir", "B4"), ("one", "two"))
    limits = plots.stretch_limits(whole)
    for axis, one in zip(pairs.axes, [*whole, *(whole / 2)], strict=True):
        np.testing.assert_allclose(axis.images[0].get_array(), plots.composite(one, "colour infrared", limits))
    plt.close("all")


def test_class_maps_have_the_classes_colours_and_a_legend_of_what_is_there():
    names = ("water", "forest", "Croplands")
    rows = {"true colour": [np.zeros((2, 2, 3))], "label": [np.array([[0, 1], [0, 255]], np.uint8)]}
    figure = plots.plot_images(rows, classes=names)
    drawn = figure.axes[1].images[0]
    colours = [plots.class_colours(names)[code] for code in (0, 1, 0)] + ["#ffffff"]  # no label is white
    expected = list(map(mpl.colors.to_rgb, colours))
    np.testing.assert_allclose(drawn.to_rgba(drawn.get_array())[..., :3].reshape(4, 3), expected, atol=1e-6)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["water", "forest"]
    plt.close("all")


def test_the_typical_image_is_nearest_to_the_median_of_its_class(make_pack: Any, tmp_path: Any):
    pack = make_pack(tmp_path, n=36)
    rows, found = pack.rows("test"), plots.typical_rows(pack)
    means = np.array([np.asarray(pack.images[row]).mean((1, 2)) for row in rows])
    for label in set(pack.labels[rows]):
        own = np.flatnonzero(pack.labels[rows] == label)
        off = (abs(means[own] - np.median(means[own], axis=0)) / means.std(0)).sum(1)
        assert found.pop(label) == rows[own[off.argmin()]]
    assert not found


def test_a_widget_redraws_what_is_chosen_and_leaves_the_first_picture(monkeypatch: pytest.MonkeyPatch):
    """A front end without a kernel shows the PNG, and one with a kernel the controls."""
    from IPython import display as shell

    shown: list[dict[str, Any]] = []
    monkeypatch.setattr(shell, "display", lambda data, raw: shown.append(data))
    drawn: list[tuple[Any, ...]] = []

    def draw(name: str, row: int, band: bool) -> Any:
        drawn.append((name, row, band))
        return plt.figure(figsize=(1, 1))

    plots.explore(draw, name=["a", "b"], row=range(3), band=[True])
    assert {"image/png", "application/vnd.jupyter.widget-view+json"} <= set(shown[0])
    from ipywidgets.widgets.widget import _instances

    controls = {getattr(widget, "description", ""): widget for widget in _instances.values()}
    controls["row"].value, controls["band"].value = 2, False
    assert drawn == [("a", 0, True), ("a", 2, True), ("a", 2, False)]
    assert not plt.get_fignums()


def test_differences_are_drawn_where_they_are_in_points(axes: Any):
    row = {"protocol": ["retrained"], "comparison": ["a − b"], "difference": [0.05], "low": [-0.01], "high": [0.1]}
    plots.plot_differences(pd.DataFrame(row), axes, xlabel="points")
    np.testing.assert_allclose(axes.collections[0].get_segments()[0][:, 0], [-1, 10])
    np.testing.assert_allclose(axes.lines[0].get_xdata(), 5)
    assert [label.get_text() for label in axes.get_yticklabels()] == ["head retrained: a − b"]


def test_no_letter_is_lower_than_8_pixels_where_a_page_shows_800():
    names = datasets.EUROSAT_CLASSES
    plots.plot_gallery([image()] * 10, names)
    plots.plot_images({"label": [np.arange(9).reshape(3, 3)] * 6}, ["title"] * 6, names)
    plots.plot_curves(history("B8", [2.0, 1.0]), plt.subplots(figsize=(9, 4))[1])
    for number in plt.get_fignums():
        figure = plt.figure(number)
        shown = 100 / 72 * min(1, 800 / (100 * figure.get_figwidth()))
        small = {text.get_text() for text in figure.findobj(mpl.text.Text) if text.get_fontsize() * shown < 8}
        assert not {text for text in small if text}
    plt.close("all")
