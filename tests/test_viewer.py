"""Pictures show what was there: one stretch for both rows, hidden pixels in the hidden colour, lost channels named."""

from __future__ import annotations

from collections.abc import Iterator

import matplotlib as mpl
import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bandmask import bands
from bandmask.masking import MaskSpec, hidden_pixels
from bandmask.visualizer import viewer

mpl.use("Agg")
import matplotlib.pyplot as plt

SIZE = 20


@pytest.fixture(autouse=True)
def close_figures() -> Iterator[None]:
    yield
    plt.close("all")


def image() -> np.ndarray:
    """(13, H, W): band c is a ramp of its own, from 100·c upwards, so a value tells its band."""
    ramp = np.linspace(0, 50, SIZE * SIZE).reshape(SIZE, SIZE)
    return 100.0 * np.arange(13)[:, None, None] + ramp


def hidden_of(names: tuple[str, ...], ratio: float = 0.5) -> np.ndarray:
    return hidden_pixels(MaskSpec(names, ratio), torch.tensor([3]), (SIZE, SIZE))[0].numpy()


def rgb(axis: Axes) -> np.ndarray:
    """What is on the screen: the axis' image as (H, W, 3)."""
    shown = axis.images[0]
    return np.asarray(shown.to_rgba(shown.get_array()))[..., :3]


# --- composites -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", bands.COMPOSITES)
def test_composite_stretches_each_of_its_bands_and_no_other(name: str):
    picture = viewer.composite(image(), name)
    assert picture.shape == (SIZE, SIZE, 3)
    for channel, band in enumerate(bands.COMPOSITES[name]):
        layer = image()[bands.NAMES.index(band)]
        low, high = np.percentile(layer, [2, 98])
        np.testing.assert_allclose(picture[..., channel], np.clip((layer - low) / (high - low), 0, 1))


def test_both_images_under_the_limits_of_the_complete_one():
    """A constant over half the red band must not restretch the rest: green, blue and visible red stay as they were."""
    complete, red = image(), bands.NAMES.index("B04")
    incomplete = complete.copy()
    incomplete[red, :10] = 1000.0
    limits = viewer.stretch_limits(complete)
    before, after = (viewer.composite(picture, "true colour", limits) for picture in (complete, incomplete))
    np.testing.assert_array_equal(after[..., 1:], before[..., 1:])
    np.testing.assert_array_equal(after[10:, :, 0], before[10:, :, 0])
    assert (after[:10, :, 0] == 1).all()  # far above the limit, and clipped
    assert not np.array_equal(viewer.composite(incomplete, "true colour")[10:, :, 0], before[10:, :, 0])


def test_limits_are_percentiles_a_band():
    low, high = viewer.stretch_limits(image(), 10, 90)
    assert low.shape == high.shape == (13,)
    np.testing.assert_allclose(low, np.percentile(image(), 10, axis=(1, 2)))
    np.testing.assert_allclose(high, np.percentile(image(), 90, axis=(1, 2)))


def test_a_flat_band_is_no_division_by_zero():
    flat = np.full((13, 4, 4), 7.0)
    assert np.isfinite(viewer.composite(flat, "swir")).all()


def test_three_bands_of_ones_own():
    np.testing.assert_array_equal(
        viewer.composite(image(), ("nir", "B4", "b03")), viewer.composite(image(), "colour infrared")
    )


def test_an_unknown_composite_lists_what_exists():
    with pytest.raises(ValueError, match="unknown composite 'false colour'; available: true colour, ") as error:
        viewer.composite(image(), "false colour")
    assert all(name in str(error.value) for name in bands.COMPOSITES)
    with pytest.raises(ValueError, match=r"three bands, got \['B04', 'B03'\]"):
        viewer.composite(image(), ["B04", "B03"])
    with pytest.raises(ValueError, match="unknown band 'B99'"):
        viewer.composite(image(), ["B04", "B03", "B99"])


# --- all bands ------------------------------------------------------------------------------------------------------


def band_axes(figure: Figure) -> list[list[Axes]]:
    return [figure.axes[:13], figure.axes[13:]]


def test_all_bands_hides_the_hidden_pixels_and_only_them():
    names = ("B04", "B08", "B11")
    hidden = hidden_of(names)
    complete, incomplete = band_axes(viewer.plot_all_bands(image(), hidden, names, title="B8"))
    colour = np.array(mpl.colors.to_rgb(viewer.HIDDEN_COLOUR))
    for channel, name in enumerate(bands.NAMES):
        above, below = rgb(complete[channel]), rgb(incomplete[channel])
        expected = hidden[names.index(name)] if name in names else np.zeros((SIZE, SIZE), bool)
        shown = np.isclose(below, colour, atol=1e-6).all(-1)
        np.testing.assert_array_equal(shown, expected)
        np.testing.assert_array_equal(below[~expected], above[~expected])
        assert np.ptp(above, axis=-1).max() < 1e-6  # greys; the hidden colour is none


def test_all_bands_shows_each_bands_own_values_under_its_own_limits():
    figure = viewer.plot_all_bands(image(), hidden_of(("B08",)), ("B08",))
    low, high = viewer.stretch_limits(image())
    for row in band_axes(figure):
        for channel, axis in enumerate(row):
            shown = axis.images[0]
            np.testing.assert_array_equal(np.ma.getdata(shown.get_array()), image()[channel])
            assert shown.get_clim() == (low[channel], high[channel])


def test_all_bands_titles_say_which_band_and_wavelength_and_stress_the_hidden():
    figure = viewer.plot_all_bands(image(), hidden_of(("B8A",)), ("B8A",), title="what is lost")
    titles = [axis.title for axis in band_axes(figure)[0]]
    assert [title.get_text() for title in titles] == [f"{band.name}\n{band.wavelength_nm} nm" for band in bands.BANDS]
    assert [t.get_text()[:3] for t in titles if t.get_fontweight() == "bold"] == ["B8A"]
    assert figure.get_suptitle() == "what is lost"
    assert [row[0].get_ylabel() for row in band_axes(figure)] == ["complete", "incomplete"]


def test_all_bands_with_nothing_hidden():
    complete, incomplete = band_axes(viewer.plot_all_bands(image(), np.zeros((0, SIZE, SIZE), bool), ()))
    for above, below in zip(complete, incomplete, strict=True):
        np.testing.assert_array_equal(rgb(above), rgb(below))


def test_all_bands_refuses_masks_that_do_not_match_their_bands():
    with pytest.raises(ValueError, match=r"zip\(\)|hidden"):
        viewer.plot_all_bands(image(), hidden_of(("B04", "B08")), ("B04",))
    with pytest.raises(ValueError, match="unknown band 'B99'"):
        viewer.plot_all_bands(image(), hidden_of(("B04",)), ("B99",))


def test_all_bands_knows_other_spellings():
    """`B8` hides B08: a figure that shows it complete would be wrong in silence."""
    _, incomplete = band_axes(viewer.plot_all_bands(image(), hidden_of(("B08",)), ("B8",)))
    shown = incomplete[bands.NAMES.index("B08")].images[0].get_array()
    np.testing.assert_array_equal(np.ma.getmaskarray(shown), hidden_of(("B08",))[0])


# --- composites beside each other -----------------------------------------------------------------------------------


def test_composites_name_the_channels_that_lost_pixels():
    incomplete = image()
    names = ("true colour", "swir", "agriculture", "colour infrared")
    figure = viewer.plot_composites(image(), incomplete, ("B04", "B8A", "B08"), names, title="B8")
    above, below = figure.axes[:4], figure.axes[4:]
    assert [axis.get_title() for axis in above] == [
        "true colour\nB04 B03 B02",
        "swir\nB12 B8A B04",
        "agriculture\nB11 B08 B02",
        "colour infrared\nB08 B04 B03",
    ]
    assert [axis.get_title() for axis in below] == [
        "hidden: B04 (red)",
        "hidden: B8A (green), B04 (blue)",
        "hidden: B08 (green)",
        "hidden: B08 (red), B04 (green)",
    ]
    assert figure.get_suptitle() == "B8"


def test_composites_say_where_nothing_is_hidden():
    figure = viewer.plot_composites(image(), image(), ("B10",), ("true colour", "swir"))
    assert [axis.get_title() for axis in figure.axes[2:]] == ["nothing hidden", "nothing hidden"]


@pytest.mark.parametrize("spelling", ["B8", "b08", "nir"])
def test_composites_know_other_spellings(spelling: str):
    """The caption `nothing hidden` under a channel that lost nine tenths would be wrong in silence."""
    figure = viewer.plot_composites(image(), image(), (spelling,), ("colour infrared",))
    assert figure.axes[1].get_title() == "hidden: B08 (red)"


def test_composites_show_both_images_under_one_stretch():
    complete = image()
    incomplete = complete.copy()
    incomplete[bands.NAMES.index("B04"), :10] = 1000.0
    above, below = viewer.plot_composites(complete, incomplete, ("B04",), ("true colour",)).axes
    limits = viewer.stretch_limits(complete)
    for axis, picture in ((above, complete), (below, incomplete)):
        np.testing.assert_allclose(axis.images[0].get_array(), viewer.composite(picture, "true colour", limits))


# --- others ---------------------------------------------------------------------------------------------------------


def test_gallery_shows_each_image_and_hides_empty_places():
    images = [image() + 5 * i for i in range(3)]
    figure = viewer.plot_gallery(images, ["a", "b", "c"], columns=2)
    assert [axis.get_title() for axis in figure.axes] == ["a", "b", "c", ""]
    assert [axis.get_visible() for axis in figure.axes] == [True, True, True, False]
    for axis, shown in zip(figure.axes, images, strict=False):
        np.testing.assert_allclose(axis.images[0].get_array(), viewer.composite(shown, "true colour"))


def test_spectra_stand_over_their_bands_in_order_of_wavelength():
    _, axis = plt.subplots()
    means = np.random.default_rng(0).random((3, 13))
    viewer.plot_spectra(means, ["water", "forest", "built-up"], axis)
    assert [line.get_label() for line in axis.lines] == ["water", "forest", "built-up"]
    labels = {tick: text.get_text() for tick, text in zip(axis.get_xticks(), axis.get_xticklabels(), strict=True)}
    for line, spectrum in zip(axis.lines, means, strict=True):
        named = [labels[place] for place in line.get_xdata()]
        assert named == [f"{band.name}\n{band.wavelength_nm}" for band in bands.BANDS]
        assert list(line.get_ydata()) == list(spectrum)
    wavelengths = [int(labels[place].split()[1]) for place in sorted(labels)]
    assert wavelengths == sorted(wavelengths)


def test_more_classes_than_colours_are_all_drawn():
    _, axis = plt.subplots()
    viewer.plot_spectra(np.ones((12, 13)), [f"class {i}" for i in range(12)], axis)
    assert len(axis.lines) == 12


def test_pictures_do_not_change_their_images():
    complete, incomplete, names = image(), image() / 2, ("B08",)
    kept = complete.copy(), incomplete.copy()
    viewer.plot_all_bands(complete, hidden_of(names), names)
    viewer.plot_composites(complete, incomplete, names)
    np.testing.assert_array_equal(complete, kept[0])
    np.testing.assert_array_equal(incomplete, kept[1])


# --- segmentation -----------------------------------------------------------------------------------------------------

CLASSES = ("water", "forest", "Croplands")


def test_class_maps_stand_beside_their_images_in_the_classes_colours():
    maps = {"label": [np.array([[0, 1], [2, 255]], np.uint8)], "predicted": [np.array([[0, 0], [2, 1]], np.uint8)]}
    figure = viewer.plot_segmentation({"true colour": [np.zeros((2, 2, 3))]}, maps, CLASSES)
    assert [axis.get_title() for axis in figure.axes] == ["true colour", "label", "predicted"]
    label = rgb(figure.axes[1])
    expected = [mpl.colors.to_rgb(colour) for colour in viewer.class_colours(CLASSES)]
    np.testing.assert_allclose(label[0, 0], expected[0], atol=1e-6)
    np.testing.assert_allclose(label[0, 1], expected[1], atol=1e-6)
    np.testing.assert_allclose(label[1, 0], expected[2], atol=1e-6)
    np.testing.assert_allclose(label[1, 1], [1, 1, 1])  # no label is white
    assert [text.get_text() for text in figure.legends[0].get_texts()] == list(CLASSES)


def test_differences_are_drawn_where_they_are_in_points():
    import pandas as pd

    rows = {"protocol": ["retrained"], "comparison": ["a − b"], "difference": [0.05], "low": [-0.01], "high": [0.1]}
    _, axis = plt.subplots()
    viewer.plot_differences(pd.DataFrame(rows), axis, xlabel="points")
    interval, dot = axis.lines[0].get_xdata(), axis.lines[1].get_xdata()
    np.testing.assert_allclose(interval, [-1, 10])
    np.testing.assert_allclose(dot, 5)
    assert [label.get_text() for label in axis.get_yticklabels()] == ["head retrained: a − b"]
