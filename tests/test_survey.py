"""A scene is judged by tiles spread over it; what can't be judged is refused with the reason."""

from __future__ import annotations

import numpy as np
import pytest
import xarray as xr

from bandmask import bands, datasets
from bandmask.diagnosis.survey import spread_tiles
from bandmask.readers.imagery import open_scene


def scene_of(values: np.ndarray, names=bands.NAMES, **attributes: object) -> xr.DataArray:
    return xr.DataArray(values, dims=("band", "y", "x"), coords={"band": list(names)}, attrs=attributes)


def numbered(rows: int, columns: int, size: int = 16) -> np.ndarray:
    """DN that tell a tile's place: 1000 + its number, in every band."""
    numbers = 1000.0 + np.arange(rows * columns).reshape(rows, columns)
    return np.broadcast_to(np.kron(numbers, np.ones((size, size))), (13, rows * size, columns * size)).copy()


def test_small_scenes_are_read_whole_and_each_tile_once() -> None:
    images, absent = spread_tiles(scene_of(numbered(3, 5)), 16, 64)
    assert images.shape == (15, 13, 16, 16)
    assert sorted((images[:, 0, 0, 0] * 10_000).round().tolist()) == list(range(1000, 1015))
    assert np.ptp(images.reshape(15, -1), axis=1).max() == 0
    assert not absent.any()


@pytest.mark.parametrize(("rows", "columns"), [(20, 20), (1, 100), (37, 11)])
def test_tiles_of_a_large_scene_are_spread_over_it(rows: int, columns: int) -> None:
    images, _ = spread_tiles(scene_of(numbered(rows, columns)), 16, 32)
    places = (images[:, 0, 0, 0] * 10_000).round().astype(int) - 1000
    assert len(set(places)) == 32
    for place, length in ((places // columns, rows), (places % columns, columns)):
        if length > 8:
            quarters = np.bincount(place * 4 // length, minlength=4)
            assert quarters.min() >= 3


def test_only_the_tiles_that_are_judged_are_read() -> None:
    scene = open_scene(datasets.SAMPLE_FOLDER)
    read = []
    lazy = scene.variable._data.array
    original = type(lazy)._read

    def counted(self, key):
        read.append(key)
        return original(self, key)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(lazy), "_read", counted)
        spread_tiles(scene, 64, 5)
    assert len(read) == 5


def test_dn_are_whole_as_in_packs() -> None:
    """Interpolated bands without it are smoother than rounded ones ever are, and look blurred to a detector."""
    images, _ = spread_tiles(scene_of(numbered(2, 2) + 0.4), 16, 4)
    dn = images.astype(np.float64) * 10_000
    assert np.abs(dn - dn.round()).max() < 1e-3


def test_tiles_beside_the_swath_are_passed_over() -> None:
    values = numbered(8, 8)
    values[:, :64] = np.nan
    images, absent = spread_tiles(scene_of(values), 16, 16)
    assert len(images) == 16
    assert np.isfinite(images).all()
    assert not absent.any()


def test_a_band_that_most_tiles_lack_is_absent_and_a_tile_that_lacks_another_is_left_out() -> None:
    values = numbered(4, 4)
    values[10, :48] = np.nan
    values[3, :16, :16] = np.nan
    images, absent = spread_tiles(scene_of(values), 16, 64)
    assert np.flatnonzero(absent).tolist() == [10]
    assert len(images) == 15
    assert np.isnan(images[:, 10]).all()


@pytest.mark.parametrize(
    ("scene", "message"),
    [
        (xr.DataArray(np.ones((13, 32, 32)), dims=("band", "y", "x")), "ESA band names"),
        (xr.DataArray(np.ones((32, 32)), dims=("y", "x")), "dimensions"),
        (scene_of(numbered(2, 2)[:12], bands.NAMES[:12]), "lacking: B12"),
        (scene_of(numbered(2, 2), (*bands.NAMES[:12], "B11")), "lacking: B12"),
        (scene_of(numbered(2, 2), range(13)), "unknown band '0'"),
        (scene_of(numbered(2, 2)[:, :10]), "10 × 32 pixels, a tile takes 16"),
        (scene_of(numbered(2, 2) / 10_000), "its values are no DN"),
        (scene_of(numbered(2, 2) * np.nan), "none of 4 tiles"),
        (scene_of(numbered(2, 2), dn_per_reflectance=1), "dn_per_reflectance is wrong"),
    ],
    ids=["no names", "no bands", "too few", "twice", "numbered", "small", "reflectance", "empty", "other scale"],
)
def test_what_is_no_scene_is_refused(scene: xr.DataArray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        spread_tiles(scene, 16, 8)
