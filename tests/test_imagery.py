"""A scene of one's own: the right numbers in the right place under the right name, read only when asked for.

The reference for the 20 and 60 m bands is GDAL's warper, which `imagery` doesn't use. Products are generated in ESA's
layout with the sample's pixels, see `safe`.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import rasterio
import rioxarray
import xarray as xr
from safe import CORNER, SIZE, loose_folder, native, safe_tree, sample_dn, write_band, write_stack

from bandmask import bands, datasets
from bandmask.readers.imagery import open_scene

TEN_METRES = [band.name for band in bands.BANDS if band.gsd_m == 10]


@pytest.fixture(scope="module")
def l1c(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return safe_tree(tmp_path_factory.mktemp("l1c"))


def image(product: Path, band: str) -> Path:
    """The file of a band, the finest there is."""
    return min(product.glob(f"GRANULE/*/IMG_DATA/**/*_{band}*.jp2"))


@pytest.fixture(scope="module")
def sample() -> xr.DataArray:
    return open_scene(datasets.SAMPLE_FOLDER)


# --- the right numbers in the right place


def test_the_sample_is_what_gdals_warper_makes_of_it(sample: xr.DataArray):
    """Its coarse grids are shifted by 10 and 20 m, so counting pixels would not do."""
    ours, theirs = sample.values, datasets.read_sample()
    seen = ~np.isnan(ours)
    assert np.abs(ours - theirs.values)[seen].max() < 0.01
    assert np.flatnonzero((~seen).any((1, 2))).tolist() == [bands.NAMES.index("B10")]  # which holds zeros
    assert np.array_equal(sample.x, theirs.x)
    assert np.array_equal(sample.y, theirs.y)
    assert sample.rio.crs == theirs.rio.crs
    assert sample.rio.transform() == theirs.rio.transform()


def test_bands_have_names_wavelengths_and_units(sample: xr.DataArray):
    assert tuple(sample.band.values) == bands.NAMES
    assert sample.dims == ("band", "y", "x")
    assert sample.dtype == np.float32
    assert float(sample.sel(band="B8A").wavelength_nm) == 865
    assert sample.attrs["units"] == "DN"
    assert sample.attrs["hidden_bands"] == ()
    assert sample.attrs["level"] == "L1C"


def test_a_window_is_a_part_of_the_whole(sample: xr.DataArray):
    """To the bit: what a tile sees must not depend on how the scene is cut."""
    whole = sample.values
    for y, x in ((slice(0, 7), slice(0, 5)), (slice(511, 640), slice(333, 334)), (slice(1000, 1024), slice(900, 1024))):
        assert np.array_equal(sample[:, y, x].values, whole[:, y, x], equal_nan=True)
    picked = sample.sel(band=["B8A", "B02"]).isel(y=[9, 3], x=-1)
    assert np.array_equal(picked.values, whole[[8, 1]][:, [9, 3], -1])
    assert np.array_equal(sample[4, ::100, ::-200].values, whole[4, ::100, ::-200])
    assert sample[:, 5:5].shape == (13, 0, 1024)
    assert sample[:, 5:5].values.size == 0


def test_a_safe_product_holds_what_was_written_into_it(l1c: Path):
    """JPEG 2000 without loss; coarse bands as GDAL's warper gives them."""
    scene = open_scene(l1c)
    for band in TEN_METRES:
        assert np.array_equal(scene.sel(band=band).values, native(band))
    for name in ("B05", "B09"):
        reference, coarse = (rioxarray.open_rasterio(image(l1c, band)).astype("float32") for band in ("B02", name))
        warped = coarse.rio.reproject_match(reference, resampling=rasterio.enums.Resampling.bilinear).values[0]
        assert np.abs(scene.sel(band=name).values - warped).max() < 0.01


def test_every_way_of_keeping_a_scene_gives_the_same_numbers(l1c: Path, tmp_path: Path):
    archive = shutil.make_archive(str(tmp_path / "product"), "zip", l1c.parent)
    loose = loose_folder(tmp_path / "loose")
    expected = open_scene(l1c).values
    for path in (archive, loose, [loose / f"{band}.tif" for band in bands.NAMES]):
        assert np.array_equal(open_scene(path).values, expected)


def test_a_stack_is_read_by_names_whatever_its_order(tmp_path: Path):
    path = write_stack(tmp_path / "stack.tif", bands.ORDERS["eurosat"])
    assert np.array_equal(open_scene(path, order="eurosat").values, sample_dn())


# --- offset


@pytest.mark.parametrize("level", ["L1C", "L2A"])
def test_the_offset_of_baseline_04_is_taken_off(l1c: Path, tmp_path: Path, level: str):
    """The product holds 1000 DN more, as ESA's do; the scene is the same as before."""
    product = safe_tree(tmp_path, level, "04.00", offset=-1000)
    stored = rioxarray.open_rasterio(image(product, "B02")).values[0]
    assert np.array_equal(stored, native("B02") + 1000)
    scene, before = open_scene(product), open_scene(l1c)
    assert scene.attrs["processing_baseline"] == "04.00"
    seen = [band for band in bands.NAMES if band != "B10"]
    assert np.abs(scene.sel(band=seen).values - before.sel(band=seen).values).max() < 0.01


def test_an_offset_given_by_hand_is_added(tmp_path: Path):
    for band in bands.BANDS:
        write_band(tmp_path / f"{band.name}.tif", native(band.name) + np.uint16(1000), band.gsd_m)
    assert np.array_equal(open_scene(tmp_path, offset=-1000).sel(band="B02").values, native("B02"))


# --- hidden pixels


@pytest.mark.parametrize("value", [0, 65_535])
def test_no_data_and_saturated_pixels_are_hidden_before_the_offset(tmp_path: Path, value: int):
    product = safe_tree(tmp_path, "L1C", "04.00", offset=-1000)
    fine, coarse = (image(product, band) for band in ("B02", "B05"))
    for path, gsd_m in ((fine, 10), (coarse, 20)):
        dn = native("B02" if gsd_m == 10 else "B05") + np.uint16(1000)
        dn[30, 40] = value
        write_band(path, dn, gsd_m)
    scene = open_scene(product)
    assert np.argwhere(np.isnan(scene.sel(band="B02").values)).tolist() == [[30, 40]]
    hidden = np.isnan(scene.sel(band="B05").values)
    assert hidden[59:63, 79:83].all()  # its own four pixels, and those interpolated from it
    assert hidden.sum() == 16
    others = scene.drop_sel(band=["B02", "B05"])
    assert not np.isnan(others.values).any()


def test_no_value_of_a_hidden_pixel_reaches_another(tmp_path: Path):
    """Saturation is a large number: mixed into its neighbours it would be a bright halo."""
    folder = loose_folder(tmp_path)
    dn = native("B05")
    dn[30, 40] = 65_535
    write_band(folder / "B05.tif", dn, 20)
    values = open_scene(folder).sel(band="B05").values
    assert np.nanmax(values) <= np.delete(dn.ravel(), 30 * dn.shape[1] + 40).max()


def test_l2a_has_no_b10_and_says_so(tmp_path: Path):
    scene = open_scene(safe_tree(tmp_path, "L2A", "02.14"))
    assert scene.attrs["hidden_bands"] == ("B10",)
    assert "L2A has no B10: it is hidden, not zero" in scene.attrs["note"]
    assert np.isnan(scene.sel(band="B10").values).all()
    assert not np.isnan(scene.drop_sel(band="B10").values).any()


def test_a_plane_of_zeros_is_a_hidden_band(tmp_path: Path):
    """L2A is exported with B10 = 0 to make up thirteen channels."""
    path = write_stack(tmp_path / "stack.tif", bands.NAMES, described=True)
    with rasterio.open(path, "r+") as tif:
        tif.write(np.zeros((SIZE, SIZE), np.uint16), bands.NAMES.index("B10") + 1)
    scene = open_scene(path)
    assert scene.attrs["hidden_bands"] == ("B10",)
    assert "B10 holds no value" in scene.attrs["note"]


def test_missing_bands_are_an_error_unless_they_are_to_be_hidden(tmp_path: Path):
    folder = loose_folder(tmp_path)
    (folder / "B05.tif").unlink()
    (folder / "B11.tif").unlink()
    with pytest.raises(ValueError, match=r"lacks B05, B11; .*hide_missing=True"):
        open_scene(folder)
    scene = open_scene(folder, hide_missing=True)
    assert scene.attrs["hidden_bands"] == ("B05", "B11")
    assert np.isnan(scene.sel(band=["B05", "B11"]).values).all()


def test_a_band_can_be_hidden_though_it_is_there(l1c: Path):
    scene = open_scene(l1c, hide="nir B2")
    assert scene.attrs["hidden_bands"] == ("B02", "B08")
    assert np.isnan(scene.sel(band=["B02", "B08"]).values).all()
    with pytest.raises(ValueError, match="every band is hidden"):
        open_scene(l1c, hide=bands.NAMES)
    with pytest.raises(ValueError, match="unknown band 'B99'"):
        open_scene(l1c, hide="B99")


# --- lazily


def test_nothing_is_read_before_it_is_asked_for(l1c: Path, tmp_path: Path):
    """The second half of a file is gone: it opens, its first rows are read, and the rest is an error that names it."""
    product = shutil.copytree(l1c, tmp_path / l1c.name)
    path = image(product, "B02")
    write_band(tmp_path / "whole.tif", native("B02"), 10).rename(path)  # GDAL goes by content: a GeoTIFF, row by row
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    scene = open_scene(product)
    assert scene[1:2, :50].shape == (1, 50, SIZE)
    assert scene.drop_sel(band="B02").shape == (12, SIZE, SIZE)
    with pytest.raises(ValueError, match=r"B02 can't be read from .*_B02.jp2"):
        np.asarray(scene.sel(band="B02"))


def test_a_copy_and_an_operation_of_rioxarray_keep_it_whole(l1c: Path):
    scene = open_scene(l1c)
    cut = scene.rio.clip_box(CORNER[0], CORNER[1] - 500, CORNER[0] + 400, CORNER[1])
    assert np.array_equal(cut.values, scene[:, :50, :40].values)
    assert scene.copy(deep=True).rio.crs == scene.rio.crs
