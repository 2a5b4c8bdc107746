"""Pixels of real images say their order, level, offset, scale and resampling; where they don't, nothing is guessed."""

from collections import Counter

import numpy as np
import pytest
import rasterio
from conftest import real_tiles
from hypothesis import given
from hypothesis import strategies as st
from scipy.ndimage import zoom

import bandmask as bm
from bandmask import bands, datasets, identity
from bandmask.identity import ORDERS, check
from bandmask.packs import Pack

N = bands.NAMES
SEA = [1350, 980, 700, 480, 440, 400, 390, 350, 330, 140, 8, 110, 80]
CLOUD = [6500, 6400, 6200, 6300, 6500, 6600, 6700, 6600, 6700, 3500, 150, 3800, 2900]
SNOW = [8800, 9000, 8900, 8900, 8700, 8600, 8300, 8200, 8000, 4000, 20, 1000, 800]


def stacked(image: np.ndarray, order: tuple[str, ...]) -> np.ndarray:
    """Of an image in SatCLIP's order, (..., 13, H, W)."""
    return image[..., bands.channel_indices(order), :, :]


def flat(spectrum: list[int], size: tuple[int, int] = (64, 64)) -> np.ndarray:
    """DN of one kind of ground or cloud throughout, generated."""
    draw = np.random.default_rng(0)
    return np.array(spectrum)[:, None, None] * (1 + 0.05 * draw.normal(size=size)) + draw.normal(0, 8, (13, *size))


def tiles() -> dict[str, tuple[np.ndarray, str, int]]:
    """Real tiles in SatCLIP's order, NaN for B10 of L2A, with level and what was added to them."""
    found = {}
    for path in real_tiles():
        with rasterio.open(path) as file:
            dn = file.read().astype(np.float32)
        level = path.stem[-3:]
        added = 1000 * ((level == "L1C" and "38D" not in path.stem) or "433D" in path.stem)
        found[path.stem] = (dn if level == "L1C" else np.insert(dn, 10, np.nan, axis=0)), level, added
    return found


def test_real_tiles_are_told_whole() -> None:
    """282D and 433D carry 1000 DN, the arid 38D none with B10 at 59 DN; all were repeated to 10 m."""
    for name, (dn, level, added) in tiles().items():
        for order in ("satclip", "eurosat") if level == "L1C" else ("twelve", "olmoearth", "ten", "tessera"):
            told = identity.identify(stacked(dn, ORDERS[order]))
            assert (told.order.value, told.level.value, told.offset.value) == (order, level, -added), (name, order)
            assert (told.scale.value, told.resampling[20].value) == ("DN", "nearest")
        pixels = identity.spectra_of(stacked(dn - added, ORDERS["ten"]))
        with pytest.raises(ValueError, match="pixels are in the order of 'ten'"):
            check(pixels, ORDERS["tessera"])


def test_cloudy_dates_are_told_too() -> None:
    for date in bm.sample_clouds().values / 1e4:
        told = identity.identify(stacked(date, ORDERS["eurosat"]))
        assert (told.order.value, told.level.value, told.scale.value) == ("eurosat", "L1C", "0-1")
        assert told.offset.value in (0, None)  # bright throughout: nothing says that none was added


def test_real_images_are_told_in_tens_always_and_one_by_one_never_wrongly(eurosat_pack: Pack) -> None:
    draw, counts = np.random.default_rng(0), Counter()
    for order in ("eurosat", "twelve-b8a-last", "bigearthnet", "tessera"):
        for ten in draw.permutation(eurosat_pack.rows("test"))[:100].reshape(10, 10):
            images = stacked(eurosat_pack.images[np.sort(ten)].astype(np.float32), ORDERS[order])
            assert identity.identify(images).order.value == order
            counts.update(identity.identify(image).order.value == order for image in images[:4])
            assert not {identity.identify(image).order.value for image in images[:4]} - {order, None}
    assert counts[True] / counts.total() > 0.9


@pytest.mark.parametrize("spectrum", [SEA, CLOUD, SNOW], ids=["sea", "cloud", "snow"])
@pytest.mark.parametrize("order", ["satclip", "eurosat", "ten", "bigearthnet", "four"])
def test_what_pixels_do_not_tell_is_not_guessed_nor_refused(spectrum: list[int], order: str) -> None:
    image = stacked(flat(spectrum), ORDERS[order])
    told = identity.identify(image)
    assert told.order.value in (order, None)
    assert told.offset.value in (0, None)
    check(identity.spectra_of(image), ORDERS[order])


@pytest.fixture(scope="module")
def sample() -> np.ndarray:
    return datasets.sample_scene().values


@given(add=st.sampled_from([0, 1000]), scale=st.sampled_from([1.0, 1e-4]), seed=st.integers(0, 99))
def test_scale_and_offset_are_told_of_any_part(sample: np.ndarray, add: int, scale: float, seed: int) -> None:
    y, x = np.random.default_rng(seed).integers(0, 900, 2)
    part = sample[:, y : y + 96, x : x + 96]
    told = identity.identify((part + add) * scale)
    assert told.scale.value == ("DN" if scale == 1 else "0-1")
    assert identity.identify(np.round(part / 10)).scale.value != "DN"
    assert told.offset.value in (-add, None)
    assert told.level.value in ("L1C", None)


@pytest.mark.parametrize("phase", [0, 1])
def test_coarse_pixels_are_found_again_however_they_came_to_10_m(phase: int) -> None:
    """Interpolated by SciPy, which knows nothing of ours; then all come to one image, whichever way they took."""
    draw, again = np.random.default_rng(0), {}
    coarse = [draw.normal(2000, 300, (72 * 10 // band.gsd_m,) * 2) for band in bands.BANDS]
    for name, order in (("nearest", 0), ("bilinear", 1)):
        image = [zoom(one, 72 // len(one), order=order, grid_mode=True, mode="nearest").round() for one in coarse]
        part = np.stack(image)[None, :, phase:64, phase:64]
        for gsd in (20, 60):
            some = [c for c, band in enumerate(bands.BANDS) if band.gsd_m == gsd]
            guess, found = identity.resampling(part[:, some], gsd // 10, name)
            assert (guess.value, found) == (name, (phase, phase))
        again[name] = identity.regrid(part)
        assert np.array_equal(again[name][:, 1:4], part[:, 1:4])  # of 10 m
    assert np.abs(again["nearest"] - again["bilinear"])[..., 6:-6, 6:-6].max() < 3  # of 300: rounding, inverted


def test_what_is_no_measurement_does_not_count(sample: np.ndarray) -> None:
    broken = np.where(sample > np.quantile(sample, 0.97), 65535, sample).astype(np.float32)
    broken[3, :50] = -9999
    found = identity.identify(broken)
    assert (found.order.value, found.level.value, found.scale.value) == ("satclip", "L1C", "DN")


def test_no_values_no_order_and_too_few_pixels() -> None:
    with pytest.raises(ValueError, match=r"no order of 5 channels is known; known: \[4, 6, 10, 12, 13\]"):
        identity.identify(np.ones((5, 32, 32)))
    with pytest.raises(ValueError, match="values in 0 bands"):
        identity.identify(np.full((13, 32, 32), np.nan))
    dark = stacked(flat(SEA), N)
    dark[10] = 900
    with pytest.warns(UserWarning, match="B10 isn't the darkest band"):
        check(identity.spectra_of(dark), N)
    with pytest.warns(UserWarning, match=r"darkest pixels are at \d+ DN: 1000 were added, or there is cloud"):
        check(identity.spectra_of(stacked(flat(SEA), N) + 1000), N)
