"""Bands as colours: what is hidden looks hidden, what is not is untouched, and one stretch holds for both images."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.colors import to_rgb

from bandmask import bands
from bandmask.visualizer import pictures

SIDE = 12
HIDDEN = np.array([round(255 * part) for part in to_rgb(pictures.HIDDEN_COLOUR)])
ALL_VIEWS = [name for names in pictures.VIEWS.values() for name in names]


def image(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(0.02, 0.5, (13, SIDE, SIDE)).astype(np.float32)


def half() -> np.ndarray:
    """Hidden in the upper half."""
    lost = np.zeros((SIDE, SIDE), bool)
    lost[: SIDE // 2] = True
    return lost


def shown(view: str, hidden: dict[str, np.ndarray], picture: np.ndarray | None = None) -> np.ndarray:
    picture = image() if picture is None else picture
    return pictures.picture(picture, view, pictures.stretch_limits(image()), hidden)


def test_every_view_has_one_mode_and_bands_that_exist() -> None:
    assert len(ALL_VIEWS) == len(set(ALL_VIEWS)) == len(bands.COMPOSITES) + 1 + 13 + len(bands.INDICES)
    for mode, names in pictures.VIEWS.items():
        for name in names:
            assert pictures.mode_of(name) == mode
            assert set(pictures.bands_of(name)) <= set(bands.NAMES)
    assert pictures.bands_of("B8A") == ("B8A",)
    assert pictures.bands_of("ndmi") == ("B8A", "B11")


def test_an_unknown_view_lists_what_exists() -> None:
    with pytest.raises(ValueError, match=r"unknown view 'evi'; available: composite: true colour, .*; index: ndvi"):
        pictures.mode_of("evi")


def test_figure_3_1_of_the_thesis_is_visible_swir_and_agriculture_by_its_labels() -> None:
    """It names Agricultural RGB B2, B8, B12 and SWIR B4, B9, B13, by its own Table A.1."""
    by_thesis = {name: set(bands.resolve_mask(name)) for name in ("B2 B3 B4", "B4 B9 B13", "B2 B8 B12")}
    assert [set(bands.COMPOSITES[name]) for name in bands.FIGURE_3_1] == list(by_thesis.values())
    parts = [shown(name, {}) for name in bands.FIGURE_3_1]
    np.testing.assert_array_equal(shown(pictures.FIGURE_3_1, {}), np.concatenate(parts))


@pytest.mark.parametrize("view", bands.COMPOSITES)
def test_a_composite_is_its_three_bands_stretched(view: str) -> None:
    expected = pictures.composite(image(), view) * 255
    np.testing.assert_allclose(shown(view, {}), expected, atol=1)


@given(st.sampled_from(list(bands.COMPOSITES)), st.sampled_from(bands.NAMES), st.integers(0, 9))
def test_a_hidden_channel_is_dark_and_the_others_are_as_they_were(view: str, name: str, seed: int) -> None:
    """Never another band in its place: values of all other bands may change, and nothing appears in the dark."""
    lost = np.random.default_rng(seed).random((SIDE, SIDE)) < 0.5
    found, whole = shown(view, {name: lost}), shown(view, {})
    for channel, band in enumerate(pictures.bands_of(view)):
        if band == name:
            assert (found[lost, channel] == 0).all()
            np.testing.assert_array_equal(found[~lost, channel], whole[~lost, channel])
        else:
            np.testing.assert_array_equal(found[..., channel], whole[..., channel])
    if name not in pictures.bands_of(view):
        np.testing.assert_array_equal(found, whole)


@pytest.mark.parametrize("view", ALL_VIEWS)
def test_what_was_under_hidden_pixels_never_shows(view: str) -> None:
    hidden = {name: half() for name in pictures.bands_of(view)}
    other = image()
    other[:, half()] = np.random.default_rng(5).uniform(-1, 1, (13, half().sum()))
    np.testing.assert_array_equal(shown(view, hidden, other), shown(view, hidden))


@pytest.mark.parametrize("view", ["true colour", "B08", "ndvi"])
def test_where_nothing_is_left_to_show_stands_the_colour_of_what_is_hidden(view: str) -> None:
    found = shown(view, {name: half() for name in pictures.bands_of(view)})
    assert (found[half()] == HIDDEN).all()
    assert not (found[~half()] == HIDDEN).all(-1).any()


def test_an_index_needs_both_its_bands() -> None:
    assert (shown("ndvi", {"B04": half()})[half()] == HIDDEN).all()
    np.testing.assert_array_equal(shown("ndvi", {"B11": half()}), shown("ndvi", {}))


@pytest.mark.parametrize("name", bands.INDICES)
def test_an_index_is_its_formula(name: str) -> None:
    first, second = (image()[bands.NAMES.index(band)].astype(float) for band in bands.INDICES[name])
    np.testing.assert_allclose(
        pictures.normalised_difference(image(), name), (first - second) / (first + second), rtol=1e-5, atol=1e-6
    )


def test_an_index_of_nothing_is_0_and_stays_within_its_bounds() -> None:
    dark = np.zeros((13, 2, 2), np.float32)
    assert (pictures.normalised_difference(dark, "ndvi") == 0).all()
    dark[bands.NAMES.index("B08")], dark[bands.NAMES.index("B04")] = 0.3, -0.2
    assert (pictures.normalised_difference(dark, "ndvi") == 1).all()


@pytest.mark.parametrize("view", ALL_VIEWS)
def test_no_change_is_drawn_where_nothing_changed(view: str) -> None:
    limits = pictures.stretch_limits(image())
    nothing, end = pictures.change(image(), image(), view, limits)
    assert (nothing == 0).all()
    assert end > 0
    changed = image()
    changed[bands.NAMES.index(pictures.bands_of(view)[0]), 3, 4] += 0.1
    found, _ = pictures.change(image(), changed, view, limits)
    assert np.flatnonzero(found[:SIDE]).tolist() == [3 * SIDE + 4]


def test_the_change_of_a_band_is_signed_and_in_reflectance() -> None:
    changed = image()
    changed[bands.NAMES.index("B08")] -= 0.25
    found, _ = pictures.change(image(), changed, "B08", pictures.stretch_limits(image()))
    np.testing.assert_allclose(found, -0.25, rtol=1e-5)


@pytest.mark.parametrize("name", [pictures.INDEX_MAP, pictures.CHANGE_MAP, pictures.SIGNED_MAP])
def test_maps_can_be_told_apart_by_the_colour_blind(name: str) -> None:
    """By lightness alone, which nobody lacks: a diverging map falls on both sides, a sequential one rises."""
    ramp = pictures.coloured(np.linspace(0, 1, 256)[None], name, 0, 1)[0] / 255
    lightness = ramp @ [0.2126, 0.7152, 0.0722]
    if name == pictures.CHANGE_MAP:
        assert (np.diff(lightness[::16]) > 0).all()
        return
    assert (np.diff(lightness[:128:16]) > 0).all()
    assert (np.diff(lightness[128::16]) < 0).all()
    # the two halves differ for eyes without red or green cones: in blue against yellow
    yellow = ramp[:, :2].mean(1) - ramp[:, 2]
    assert yellow[20] - yellow[-20] > 0.2


def test_a_pixel_never_seen_is_hidden_and_does_not_move_the_stretch() -> None:
    torn = image()
    torn[:, 0, 0] = np.nan
    torn[bands.NAMES.index("B10")] = np.nan
    limits = pictures.stretch_limits(torn)
    expected = np.percentile(torn[3].ravel()[1:], [2, 98])
    np.testing.assert_allclose([limits[0][3], limits[1][3]], expected)
    assert np.isfinite(limits).all()
    missing = {name: ~np.isfinite(layer) for name, layer in zip(bands.NAMES, torn, strict=True)}
    for view in ("true colour", "B10", "ndvi"):
        assert (pictures.picture(torn, view, limits, missing)[0, 0] == HIDDEN).all()
