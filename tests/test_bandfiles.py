"""A file that can't be a band of a scene is refused with what is wrong and what to do; each fault is made for real."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from rasterio.transform import Affine, from_origin
from safe import CORNER, loose_folder, native, write_band, write_stack

from bandmask import bands
from bandmask.readers.bandfiles import hidden_as_nan
from bandmask.readers.imagery import open_scene


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return loose_folder(tmp_path / "scene")


B05 = native("B05")


@pytest.mark.parametrize(
    ("dn", "gsd_m", "options", "message"),
    [
        (B05, 20, {"crs": None}, "B05 of .* has no coordinate system"),
        (B05, 20, {"crs": "EPSG:4326"}, "B05 of .* is in EPSG:4326; expected metres"),
        (B05, 20, {"crs": "EPSG:2225"}, "expected metres"),  # a grid in US feet
        (B05, 20, {"crs": "EPSG:32617"}, "mixes grids: B05 is in EPSG:32617, B02 in EPSG:32618"),
        (native("B05", 30), 30, {}, "mixes grids: pixels of B05 measure 30 m; Sentinel-2 has 10, 20 and 60 m"),
        (B05[:100], 20, {}, "B05 has the wrong size: 120 × 100 pixels of 20 m don't cover the 240 × 240 pixels of B02"),
        (B05, 20, {"transform": from_origin(CORNER[0] + 20, CORNER[1], 20, 20)}, "B05 has the wrong size"),
        (B05, 20, {"transform": Affine(20, 0, CORNER[0], 0, 20, CORNER[1])}, "rotated or uneven grid"),
        (B05, 20, {"transform": Affine(19, 5, CORNER[0], 5, -19, CORNER[1])}, "rotated or uneven grid"),
        ((B05 / 40).astype(np.uint8), 20, {}, "B05 of .* is 8 bit, a picture and no measurement"),
        (B05.astype(np.complex64), 20, {}, "B05 of .* is complex64"),
    ],
)
def test_a_band_on_another_grid_or_of_another_kind_is_named(folder: Path, dn, gsd_m, options, message: str):
    write_band(folder / "B05.tif", dn, gsd_m, **options)
    with pytest.raises(ValueError, match=message):
        open_scene(folder)


def test_a_damaged_file_is_named(folder: Path):
    (folder / "B05.tif").write_bytes(b"<html>404</html>")
    with pytest.raises(ValueError, match=r"B05 can't be read from .*B05.tif .*fetch the file again"):
        open_scene(folder)


def test_a_file_of_three_bands_is_no_band(folder: Path):
    write_stack(folder / "B05.tif", ("B04", "B03", "B02"))
    with pytest.raises(ValueError, match=r"B05 of .* lies in a file of 3 bands"):
        open_scene(folder)


def test_a_scene_without_its_10_m_bands_has_no_grid(folder: Path):
    for band in bands.BANDS:
        if band.gsd_m == 10:
            (folder / f"{band.name}.tif").unlink()
    with pytest.raises(ValueError, match=r"finest pixels, of B05, measure 20 m; .*Add the bands of 10 m, or resample"):
        open_scene(folder, hide_missing=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda dn: (dn / 10_000).astype(np.float32), "is in reflectance already"),
        (lambda dn: (dn // 256).astype(np.uint16), "is 8 bit .*, a picture and no measurement"),
        (lambda dn: dn + np.uint16(1000), "B10, which sees no ground, is at 10.* DN, so 1000 DN were added"),
        (lambda dn: dn * 0, "holds no value"),
    ],
)
def test_numbers_that_are_no_dn_are_refused(folder: Path, change, message: str):
    for band in bands.BANDS:
        write_band(folder / f"{band.name}.tif", change(native(band.name)), band.gsd_m)
    with pytest.raises(ValueError, match=message):
        open_scene(folder)


def test_dn_stored_as_float_are_taken(tmp_path: Path):
    scene = open_scene(write_stack(tmp_path / "float.tif", bands.NAMES, described=True, dtype="float32"))
    assert np.array_equal(scene.sel(band="B02").values, native("B02"))


def test_zero_saturated_no_data_and_not_finite_are_hidden_and_nothing_else():
    dn = np.array([0, 1, 9, 65534, 65535], np.uint16)
    assert np.isnan(hidden_as_nan(dn, None)).tolist() == [True, False, False, False, True]
    assert np.isnan(hidden_as_nan(dn, 9)).tolist() == [True, False, True, False, True]
    floats = np.array([np.nan, np.inf, -np.inf, -1, -9999], np.float32)
    assert np.isnan(hidden_as_nan(floats, -9999)).tolist() == [True, True, True, False, True]
    assert np.isnan(hidden_as_nan(floats, np.nan)).tolist() == [True, True, True, False, False]
