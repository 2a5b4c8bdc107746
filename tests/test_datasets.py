"""The sample scene is where it says it is, band by band, and its patches, labels and splits are honest."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import rasterio
import xarray as xr

from bandmask import bands, files
from bandmask.datasets import (
    SAMPLE_CLASSES,
    SAMPLE_FOLDER,
    class_counts,
    open_dataset,
    pack_sample,
    pack_sample_256,
    read_sample,
    sample_patches,
    sample_pixel_labels,
)
from bandmask.packs import Pack

COARSE = [band for band in bands.BANDS if band.gsd_m > 10]
TILE = 64


@pytest.fixture(scope="module")
def scene() -> xr.DataArray:
    return read_sample()


@pytest.fixture(scope="module")
def pixel_labels(scene: xr.DataArray) -> np.ndarray:
    return sample_pixel_labels(scene)


def stored(name: str) -> tuple[np.ndarray, rasterio.Affine]:
    with rasterio.open(SAMPLE_FOLDER / f"{name}.tif") as tif:
        return tif.read(1).astype(np.float64), tif.transform


# --- the files


def test_the_files_are_the_ones_whose_checksums_are_recorded() -> None:
    recorded = json.loads((SAMPLE_FOLDER / "checksums.json").read_text())
    assert set(recorded) == set(bands.NAMES) == {p.stem for p in SAMPLE_FOLDER.glob("*.tif")}
    for name in bands.NAMES:
        assert files.sha256(SAMPLE_FOLDER / f"{name}.tif") == recorded[name]["sha256"]


def test_the_sample_is_small_enough_to_be_embedded() -> None:
    assert sum(p.stat().st_size for p in SAMPLE_FOLDER.rglob("*") if p.is_file()) < 10_000_000


@pytest.mark.parametrize("band", bands.BANDS, ids=bands.NAMES)
def test_each_file_is_on_its_native_grid_and_covers_the_scene(band: bands.Band) -> None:
    with rasterio.open(SAMPLE_FOLDER / f"{band.name}.tif") as tif, rasterio.open(SAMPLE_FOLDER / "B02.tif") as b02:
        assert (tif.transform.a, tif.transform.e) == (band.gsd_m, -band.gsd_m)
        assert tif.crs.to_epsg() == 32618
        assert tif.dtypes == ("uint16",)
        inside, outside = b02.bounds, tif.bounds
        assert outside.left <= inside.left
        assert outside.right >= inside.right
        assert outside.bottom <= inside.bottom
        assert outside.top >= inside.top


# --- the scene


def test_the_scene_has_13_named_bands_on_one_10_m_grid(scene: xr.DataArray) -> None:
    assert scene.dims == ("band", "y", "x")
    assert scene.shape == (13, 1024, 1024)
    assert scene.dtype == np.float32
    assert list(scene["band"].values) == list(bands.NAMES)
    assert list(scene["wavelength_nm"].values) == [band.wavelength_nm for band in bands.BANDS]
    assert scene.rio.crs.to_epsg() == 32618
    assert scene.rio.transform() == stored("B02")[1]
    assert scene.rio.resolution() == (10, -10)
    assert np.isfinite(scene.values).all()
    assert scene.attrs["units"] == "DN"


@pytest.mark.parametrize("name", ["B02", "B03", "B04", "B08"])
def test_10_m_bands_are_the_files_own_dn(scene: xr.DataArray, name: str) -> None:
    assert np.array_equal(scene.sel(band=name).values, stored(name)[0])


@pytest.mark.parametrize("band", COARSE, ids=[band.name for band in COARSE])
def test_coarse_bands_are_interpolated_at_the_centres_of_10_m_pixels(scene: xr.DataArray, band: bands.Band) -> None:
    """Bilinear interpolation by hand, in map coordinates, of every pixel."""
    values, transform = stored(band.name)
    column = (scene["x"].values - transform.c) / band.gsd_m - 0.5  # in units of coarse pixel centres
    row = (transform.f - scene["y"].values) / band.gsd_m - 0.5
    left, top = np.floor(column).astype(int), np.floor(row).astype(int)
    assert left.min() >= 0
    assert top.min() >= 0
    assert left.max() + 1 < values.shape[1]
    assert top.max() + 1 < values.shape[0]
    right_share, bottom_share = (column - left)[None, :], (row - top)[:, None]
    upper = values[top][:, left] * (1 - right_share) + values[top][:, left + 1] * right_share
    lower = values[top + 1][:, left] * (1 - right_share) + values[top + 1][:, left + 1] * right_share
    expected = upper * (1 - bottom_share) + lower * bottom_share
    assert np.abs(scene.sel(band=band.name).values - expected).max() < 0.01


@pytest.mark.parametrize(
    ("coarse", "fine"), [("B8A", "B08"), ("B05", "B04"), ("B12", "B04"), ("B01", "B02"), ("B09", "B08")]
)
def test_coarse_bands_lie_where_a_like_10_m_band_lies(scene: xr.DataArray, coarse: str, fine: str) -> None:
    """Of all shifts by up to 40 m, none fits better than none: the ground itself says that the warp is right."""
    first = scene.sel(band=coarse).values[100:-100, 100:-100].ravel()
    second = scene.sel(band=fine).values
    fit = {
        (dy, dx): np.corrcoef(first, second[100 + dy : 924 + dy, 100 + dx : 924 + dx].ravel())[0, 1]
        for dy in range(-4, 5)
        for dx in range(-4, 5)
    }
    assert max(fit, key=lambda shift: fit[shift]) == (0, 0)


# --- patches, labels, splits


def test_every_patch_lies_in_the_scene_and_in_one_split(sample_pack: Pack) -> None:
    index = sample_pack.index
    assert len(index) == len(index[["row", "col"]].drop_duplicates()) == 576
    assert index["row"].between(0, 1024 - TILE).all()
    assert index["col"].between(0, 1024 - TILE).all()
    assert set(index["split"]) == {"train", "val", "test"}
    assert index["split"].value_counts().min() >= 36


def test_patches_of_two_splits_are_320_m_apart(sample_pack: Pack) -> None:
    """Overlap or adjacency between training and test patches would let a model be tested on what it learned."""
    index = sample_pack.index
    for first, second in (("train", "test"), ("train", "val"), ("val", "test")):
        one, other = (index[index["split"] == split][["row", "col"]].to_numpy() for split in (first, second))
        gap = np.abs(one[:, None] - other[None]) - TILE  # (n, m, 2); below 0 in both axes: they overlap
        assert gap.max(axis=2).min() >= 32, (first, second)


def test_patches_are_cut_out_of_the_scene(sample_pack: Pack, scene: xr.DataArray) -> None:
    for row in (0, 137, 288, 575):
        y, x = sample_pack.index.loc[row, ["row", "col"]].astype(int)
        expected = scene.values[:, y : y + TILE, x : x + TILE]
        assert np.abs(sample_pack.images[row] - expected).max() <= 0.5
        assert np.array_equal(sample_pack.images[row][1], expected[1])


def test_labels_are_those_of_the_pixels(sample_pack: Pack, pixel_labels: np.ndarray) -> None:
    built = SAMPLE_CLASSES.index("built-up")
    for row, label in enumerate(sample_pack.labels):
        y, x = sample_pack.index.loc[row, ["row", "col"]].astype(int)
        counts = Counter(pixel_labels[y : y + TILE, x : x + TILE].ravel().tolist())
        if counts[built] >= 0.1 * TILE * TILE:
            assert label == built
        else:
            assert counts[label] == max(counts.values())


def test_labels_are_of_the_samples_classes_and_train_has_them_all(sample_pack: Pack) -> None:
    assert sample_pack.classes == SAMPLE_CLASSES
    assert set(sample_pack.labels) == set(range(len(SAMPLE_CLASSES)))
    assert set(sample_pack.labels[sample_pack.rows("train")]) == set(range(len(SAMPLE_CLASSES)))
    assert set(sample_pack.labels[sample_pack.rows("test")]) == set(range(len(SAMPLE_CLASSES)))


def test_pixel_labels_mean_what_they_are_called(scene: xr.DataArray, pixel_labels: np.ndarray) -> None:
    """Each class by a property that its rule doesn't use."""
    assert pixel_labels.shape == (1024, 1024)
    assert set(np.unique(pixel_labels)) == set(range(len(SAMPLE_CLASSES)))

    def median(band: str, name: str) -> float:
        return float(np.median(scene.sel(band=band).values[pixel_labels == SAMPLE_CLASSES.index(name)]))

    assert median("B8A", "water") < 0.5 * median("B8A", "tidal marsh")
    assert median("B12", "water") < median("B12", "tidal marsh") < median("B12", "bare or sparse")
    assert median("B07", "green crops") > median("B07", "forest") > median("B07", "water")
    assert median("B04", "built-up") > median("B04", "forest")


def test_the_sample_says_that_its_labels_are_no_land_cover(sample_pack: Pack) -> None:
    assert "not land cover" in sample_pack.card["label_note"]
    assert "contains Copernicus Sentinel data" in sample_pack.card["source"]


def test_b10_is_the_dark_band_of_the_sample_too(sample_pack: Pack) -> None:
    for split in ("train", "val", "test"):
        dark = sample_pack.band_means(split) < 0.005
        assert [name for name, is_dark in zip(bands.NAMES, dark, strict=True) if is_dark] == ["B10"]


def test_patches_do_not_depend_on_anything_but_the_labels(pixel_labels: np.ndarray) -> None:
    pd.testing.assert_frame_equal(sample_patches(pixel_labels), sample_patches(pixel_labels.copy()))
    all_water = sample_patches(np.zeros_like(pixel_labels))
    assert set(all_water["label"]) == {SAMPLE_CLASSES.index("water")}


# --- targets


@pytest.fixture(scope="module")
def tiles_pack(outputs: Path) -> Pack:
    return open_dataset("sample-256")


@pytest.mark.parametrize("name", ["sample", "sample-256"])
def test_targets_are_the_labels_of_the_pixels(name: str, pixel_labels: np.ndarray) -> None:
    pack = open_dataset(name)
    size = pack.images.shape[-1]
    assert pack.targets is not None
    for target, row, col in zip(pack.targets, pack.index["row"], pack.index["col"], strict=True):
        assert np.array_equal(target, pixel_labels[row : row + size, col : col + size])


def test_image_labels_of_the_sample_are_those_of_its_rule_not_the_most_frequent_pixels(
    sample_pack: Pack, pixel_labels: np.ndarray
) -> None:
    assert np.array_equal(sample_pack.labels, sample_patches(pixel_labels)["label"])
    most = [np.bincount(target.ravel()).argmax() for target in np.asarray(sample_pack.targets)]
    assert not np.array_equal(sample_pack.labels, most)


def test_blocks_are_the_groups_and_no_group_is_in_two_splits(sample_pack: Pack, tiles_pack: Pack) -> None:
    for pack in (sample_pack, tiles_pack):
        assert (pack.index["group"] == pack.index["block"]).all()
        assert pack.index["group"].nunique() == 16
        assert (pack.index.groupby("group")["split"].nunique() == 1).all()
    one = sample_pack.index.groupby("group")["split"].first()
    pd.testing.assert_series_equal(one, tiles_pack.index.groupby("group")["split"].first())


def test_tiles_of_256_px_cover_the_scene_once(tiles_pack: Pack, scene: xr.DataArray, pixel_labels: np.ndarray) -> None:
    assert tiles_pack.images.shape == (16, 13, 256, 256)
    assert "not land cover" in tiles_pack.card["label_note"]
    seen = np.zeros((1024, 1024), int)
    for row, col, image in zip(tiles_pack.index["row"], tiles_pack.index["col"], tiles_pack.images, strict=True):
        seen[row : row + 256, col : col + 256] += 1
        assert np.abs(image - scene.values[:, row : row + 256, col : col + 256]).max() <= 0.5
    assert (seen == 1).all()
    for label, row, col in zip(tiles_pack.labels, tiles_pack.index["row"], tiles_pack.index["col"], strict=True):
        assert label == np.bincount(pixel_labels[row : row + 256, col : col + 256].ravel()).argmax()


def test_one_path_for_two_data_sets_is_packed_anew_not_mistaken(tmp_path: Path) -> None:
    path = tmp_path / "pack"
    assert len(pack_sample_256(path).images) == 16
    assert len(pack_sample(path).images) == 576


# --- by name


def test_the_sample_is_opened_not_packed_again(sample_pack: Pack) -> None:
    before = (sample_pack.path / "images.npy").stat()
    for again in (open_dataset("sample"), pack_sample(), pack_sample(str(sample_pack.path))):
        after = (again.path / "images.npy").stat()
        assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert sample_pack.path == files.outputs_root() / "packs" / "sample"


def test_an_unknown_data_set_is_an_error_that_lists_those_there_are() -> None:
    with pytest.raises(ValueError, match="unknown data set 'landsat'; available: sample, sample-256, eurosat"):
        open_dataset("landsat")


def test_class_counts_have_a_row_for_every_class_and_a_column_for_every_split(sample_pack: Pack) -> None:
    table = class_counts(sample_pack)
    assert list(table.index) == list(SAMPLE_CLASSES)
    assert list(table.columns) == ["train", "val", "test"]
    assert table.to_numpy().sum() == 576
    rows = sample_pack.rows("test")
    for label, name in enumerate(SAMPLE_CLASSES):
        assert table.loc[name, "test"] == (sample_pack.labels[rows] == label).sum()
    assert list(class_counts(sample_pack, ["test"]).columns) == ["test"]


def test_class_counts_show_a_class_without_images(tmp_path, make_pack) -> None:
    pack = make_pack(tmp_path, n=12, classes=3, index=None)
    only = make_pack(tmp_path / "only", images=pack.images, index=pack.index.assign(label=1))
    assert class_counts(only).sum(axis=1).to_dict() == {"class 0": 0, "class 1": 12, "class 2": 0}
