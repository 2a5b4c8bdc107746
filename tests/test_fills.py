"""Free fills: each equals a slow reference, reads nothing that is hidden, and orders by error as it should."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import generated_images, generated_index, reflectance
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import Ridge
from torch import Tensor

from bandmask import api, bands, fills
from bandmask.fills import LocalFill, NearestFill, RidgeFill, RidgeLocalFill, make_fill
from bandmask.masks import FITTED, SHAPES, VALUES, MaskSpec, fill_values, hide
from bandmask.moments import ALPHA, ERROR_PRIOR, VALUE_PRIOR, WIDTHS, Moments, fill_gaps
from bandmask.packs import Pack
from bandmask.train import fill_checksum

SIZE = (6, 5)
NEW = [NearestFill, LocalFill, RidgeLocalFill]
ALL = [*NEW, RidgeFill]
some_bands = st.sets(st.sampled_from(bands.NAMES), min_size=1, max_size=12).map(bands.parse_bands)
any_bands = st.sets(st.sampled_from(bands.NAMES), min_size=1).map(bands.parse_bands)
ratios = st.sampled_from([0.0, 1.0]) | st.floats(0, 1)
BROKEN = [math.nan, math.inf, -math.inf]
patterns = st.lists(st.booleans(), min_size=13, max_size=13).map(np.array)  # True = visible


def spectra(seed: int = 0, pixels: int = 500) -> np.ndarray:
    """Correlated reflectance (n, 13), generated."""
    draw = np.random.default_rng(seed)
    mixed = draw.normal(size=(pixels, 4)) @ draw.normal(size=(4, 13)) * 0.05
    return mixed + np.linspace(0.1, 0.4, 13) + draw.normal(0, 0.01, (pixels, 13))


SPECTRA = spectra()
MOMENTS = Moments.of_spectra(SPECTRA)


def generated(n: int = 2, size: tuple[int, int] = SIZE, seed: int = 3) -> Tensor:
    draw = np.random.default_rng(seed)
    mixed = np.einsum("nkhw,kc->nchw", draw.normal(size=(n, 4, *size)), draw.normal(size=(4, 13)) * 0.05)
    return torch.tensor(mixed + np.linspace(0.1, 0.4, 13)[:, None, None], dtype=torch.float32)


def drawn(names: tuple[str, ...], ratio: float, seed: int, n: int = 2, shape: str = "pixel", size=SIZE) -> Tensor:
    spec = MaskSpec(names, ratio, seed=seed, shape=shape)
    return spec.hidden(torch.arange(n), size)


def bits(images: Tensor) -> Tensor:
    return images.contiguous().view(torch.int32)


def pixels_of(pack: Pack, split: str) -> np.ndarray:
    return pack.images[pack.rows(split)].transpose(0, 2, 3, 1).reshape(-1, 13) / 10_000


# --- moments


def test_moments_are_numpys_in_double_and_what_has_none_is_refused() -> None:
    assert np.allclose(MOMENTS.mean, SPECTRA.mean(0), rtol=1e-12)
    assert np.allclose(MOMENTS.covariance, np.cov(SPECTRA.T, bias=True), rtol=1e-10)
    same = Moments.of_spectra(np.full((100_000, 13), 60_001, np.uint16))
    assert (same.mean == 60_001).all(), "uint16 doesn't overflow"
    for wrong in (np.zeros((5, 12)), np.zeros((1, 13))):
        with pytest.raises(ValueError, match=r"spectra of 13 bands, two or more; got \("):
            Moments.of_spectra(wrong)
    for broken in (np.vstack([np.zeros((3, 13)), np.full(13, np.inf)]), np.full((3, 13), np.nan)):
        with pytest.raises(ValueError, match="NaN or infinite values; leave pixels without data out"):
            Moments.of_spectra(broken)
    with pytest.raises(ValueError, match="available: L1C, L2A"):
        Moments.shipped("L1B")


@given(patterns)
def test_a_regression_is_scikit_learns_and_many_at_once_are_each_the_one(visible: np.ndarray) -> None:
    seen, hidden = np.flatnonzero(visible), np.flatnonzero(~visible)
    weight, bias = MOMENTS.regression(hidden, seen)
    weights, biases = MOMENTS.regressions(np.array([visible, ~visible]))
    assert (weights[0][:, hidden] == 0).all(), "a hidden band is read"
    assert np.allclose(weights[0][hidden][:, seen], weight, rtol=1e-8, atol=1e-10)
    assert np.allclose(biases[0][hidden], bias, rtol=1e-8, atol=1e-10)
    if not len(seen):
        assert np.allclose(bias, SPECTRA.mean(0))
    elif len(hidden):
        reference = Ridge(ALPHA, solver="svd").fit(SPECTRA[:, seen], SPECTRA[:, hidden])
        assert np.allclose(weight, np.atleast_2d(reference.coef_), rtol=1e-7, atol=1e-9)
        assert np.allclose(bias, reference.intercept_, rtol=1e-7, atol=1e-9)


def test_nothing_is_learned_from_validation_or_test_images(tmp_path: Path, make_pack: Callable[..., Pack]) -> None:
    images, index = generated_images(24, 8), generated_index(24)
    pack = make_pack(tmp_path / "one", images=images, index=index)
    spoilt = images.copy()
    spoilt[index["split"].to_numpy() != "train", 3] = 7
    other = make_pack(tmp_path / "two", images=spoilt, index=index)
    found, train = Moments.of(pack, pixels=10**9), pixels_of(pack, "train")
    assert np.allclose(found.mean, train.mean(0), rtol=1e-6)
    assert np.allclose(found.covariance, np.cov(train.T, bias=True), rtol=1e-8)
    assert np.array_equal(Moments.of(pack).covariance, Moments.of(other).covariance)
    assert torch.equal(make_fill("ridge", pack, ["B08"]).weight, make_fill("ridge", other, ["B08"]).weight)
    assert np.array_equal(pack.band_means(), other.band_means())
    assert Moments.of(other, split="test").mean[3] == pytest.approx(7 / 10_000)


@pytest.mark.parametrize(("level", "absent"), [("L1C", ()), ("l2a", ("B10",))])
def test_shipped_moments_predict_real_pixels(level: str, absent: tuple[str, ...], sample_pack: Pack) -> None:
    moments = Moments.shipped(level)
    assert tuple(np.array(bands.NAMES)[~moments.known]) == absent
    assert 0.01 < np.nanmean(moments.mean) < 0.5, "reflectance, not DN"
    assert np.linalg.eigvalsh(moments.covariance[np.ix_(moments.known, moments.known)]).min() > 0
    assert "Copernicus Sentinel" in moments.source
    error = errors(sample_pack, ("B03", "B08", "B12"), 0.9, moments, 10 if absent else None)
    assert error["ridge_local"] < 0.5 * error["band_mean"], error


@pytest.mark.parametrize("value", FITTED)
def test_a_band_that_the_source_lacks_is_neither_read_nor_told(value: str) -> None:
    lacking = SPECTRA.copy()
    lacking[:, 10] = np.nan
    moments, names = Moments.of_spectra(lacking, "L2A"), ("B02", "B8A", "B11")
    fill, hidden, images = make_fill(value, moments, names), drawn(names, 0.6, 1), generated()
    expected = fill(images, hidden)
    assert expected[hidden].isfinite().all()
    images[:, 10] = 9.0
    assert torch.equal(fill(images, hidden), expected)
    with pytest.raises(ValueError, match=r"moments \(L2A\) know nothing of B10.*B09, B11"):
        make_fill(value, moments, ("B02", "B10"))


# --- nothing hidden is read, nothing visible is changed, and what is not finite is not seen


@pytest.mark.parametrize("make", ALL)
@given(some_bands, ratios, st.integers(0, 10**6), st.sampled_from(SHAPES), st.sampled_from([*BROKEN, 1e30, 7.0]))
@settings(max_examples=30)
def test_what_is_hidden_never_reaches_the_output(make, names, ratio, seed, shape, other) -> None:
    images, hidden, fill = generated(), drawn(names, ratio, seed, shape=shape), make(MOMENTS, names)
    changed = images.clone()
    channels = bands.channel_indices(names)
    changed[:, channels] = changed[:, channels].masked_fill(hidden, other)
    assert torch.equal(bits(fill(changed, hidden)[hidden]), bits(fill(images, hidden)[hidden]))  # not zeroed before
    filled = hide(images, hidden, MaskSpec(names), fill)
    assert torch.equal(bits(hide(changed, hidden, MaskSpec(names), fill)), bits(filled))
    assert filled.isfinite().all()
    visible = torch.ones_like(images, dtype=torch.bool)
    visible[:, channels] = ~hidden
    assert torch.equal(bits(filled)[visible], bits(images)[visible])


@pytest.mark.parametrize("make", ALL)
@given(some_bands, ratios, st.integers(0, 10**6), st.sampled_from(BROKEN))
@settings(max_examples=30)
def test_a_visible_pixel_that_is_not_finite_counts_as_not_seen(make, names, ratio, seed, other) -> None:
    """Ridge regressions gave NaN there, for a sensor's dead line as for the edge of a swath."""
    images, hidden, fill = generated(), drawn(names, ratio, seed), make(MOMENTS, names)
    broken = torch.rand(images.shape, generator=torch.Generator().manual_seed(seed)) < 0.2
    broken[0, :, 0] = True  # nothing is seen at all
    broken[1, seed % 13] = True  # a whole band
    filled = fill(images.masked_fill(broken, other), hidden)
    assert filled[hidden].isfinite().all()
    whole = ~broken.any(1, keepdim=True).expand_as(hidden) & hidden
    if make in (NearestFill, RidgeFill):  # pixel by pixel: the others are what they were
        assert torch.allclose(filled[whole], fill(images, hidden)[whole], atol=1e-6)


@pytest.mark.parametrize("make", [RidgeFill, RidgeLocalFill])
def test_where_a_band_is_not_finite_the_regression_is_that_of_the_others(make: Any) -> None:
    names, images = ("B04", "B11"), generated()
    images[0, 5, :3], images[1, 0, 2:4], images[1, 7] = math.nan, math.inf, math.nan
    hidden = torch.ones(2, 2, *SIZE, dtype=torch.bool)
    filled = make(MOMENTS, names)(images, hidden).numpy()
    for row, y, x in np.ndindex(2, *SIZE):
        pixel = images[row, :, y, x].double().numpy()
        seen = [c for c in range(13) if np.isfinite(pixel[c]) and bands.NAMES[c] not in names]
        weight, bias = MOMENTS.regression(bands.channel_indices(names), seen)
        assert np.abs(filled[row, :, y, x] - weight @ pixel[seen] - bias).max() < 1e-5


@pytest.mark.parametrize("make", ALL)
def test_images_of_other_channels_are_refused(make: Any) -> None:
    with pytest.raises(ValueError, match=r"\(B, 13, H, W\).*in the order B01"):
        make(MOMENTS, ("B02",))(generated()[:, :12], drawn(("B02",), 0.5, 0))
    with pytest.raises(ValueError, match="the fill is for bands"):
        hide(generated(), drawn(("B02", "B08"), 0.7, 0), MaskSpec(("B02", "B08")), make(MOMENTS, ("B02", "B03")))


@pytest.mark.parametrize("make", ALL)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_type_of_the_batch_is_kept(make: Any, dtype: torch.dtype) -> None:
    names = ("B02", "B8A", "B11")
    images = generated().to(dtype)
    hidden, fill = drawn(names, 0.6, 2), make(MOMENTS, names)
    filled = hide(images, hidden, MaskSpec(names), fill)
    assert filled.dtype == dtype
    exact = hide(images.double(), hidden, MaskSpec(names), fill)
    assert (filled.double() - exact).abs().max() < 16 * torch.finfo(dtype).eps
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(hide(images, hidden, MaskSpec(names), fill), filled), "autocast does not coarsen them"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine: fills on CUDA untested")
@pytest.mark.parametrize("make", ALL)
def test_the_same_on_cuda(make: Any) -> None:
    images, hidden, fill = generated(), drawn(bands.NAMES[2:9], 0.6, 2), make(MOMENTS, bands.NAMES[2:9])
    assert torch.allclose(fill(images.cuda(), hidden.cuda()).cpu(), fill(images, hidden), atol=1e-5)


# --- slow references, written apart from the module


def nearest_by_hand(image: np.ndarray, lost: np.ndarray, target: int) -> np.ndarray:
    wavelengths = [band.wavelength_nm for band in bands.BANDS]
    result = np.full(image.shape[1:], MOMENTS.mean[target])
    for row, column in np.ndindex(*image.shape[1:]):
        seen = [c for c in range(13) if c != target and not lost[c, row, column]]
        ground = [c for c in seen if bands.NAMES[c] != "B10"] or seen
        if ground:
            best = min(ground, key=lambda c: abs(wavelengths[c] - wavelengths[target]))
            result[row, column] = image[best, row, column] + MOMENTS.mean[target] - MOMENTS.mean[best]
    return result


def local_by_hand(band: np.ndarray, seen: np.ndarray, level: float, prior: float) -> np.ndarray:
    result = np.full(band.shape, level)
    for row, column in np.ndindex(*band.shape):
        for width in WIDTHS:
            total, count = prior * result[row, column], prior
            for other in zip(*np.nonzero(seen), strict=True):
                weight = math.exp(-((row - other[0]) ** 2 + (column - other[1]) ** 2) / (2 * width**2))
                total, count = total + weight * band[other], count + weight
            result[row, column] = total / count
    return result


def ridge_by_hand(image: np.ndarray, whole: list[int], target: int, noise: np.ndarray | float = 0.0) -> np.ndarray:
    covariance = MOMENTS.covariance[np.ix_(whole, whole)] + np.eye(len(whole)) * (ALPHA / MOMENTS.pixels + noise)
    weight = np.linalg.solve(covariance, MOMENTS.covariance[whole, target])
    return np.einsum("v,vhw->hw", weight, image[whole] - MOMENTS.mean[whole, None, None]) + MOMENTS.mean[target]


def ridge_local_by_hand(image: np.ndarray, lost: np.ndarray) -> np.ndarray:
    whole = [c for c in range(13) if not lost[c].any()]
    some = [c for c in range(13) if not lost[c].all()]
    result, noise = image.copy(), fills.FILL_NOISE * lost.mean((1, 2)) * np.diag(MOMENTS.covariance)
    for target in set(some) - set(whole):
        seen, trend = ~lost[target], ridge_by_hand(image, whole, target)
        error = image[target] - trend
        level = error[seen].sum() / (seen.sum() + ERROR_PRIOR)
        corrected = trend + local_by_hand(error, seen, level, ERROR_PRIOR)
        result[target] = np.where(seen, image[target], corrected)
    for target in set(range(13)) - set(some):
        result[target] = ridge_by_hand(result, some, target, noise[some])
    return result


@given(names=any_bands, ratio=ratios, seed=st.integers(0, 10**6), shape=st.sampled_from(SHAPES))
@settings(max_examples=15)
def test_each_equals_its_slow_reference(names: tuple[str, ...], ratio: float, seed: int, shape: str) -> None:
    images, hidden = generated(), drawn(names, ratio, seed, shape=shape)
    channels = bands.channel_indices(names)
    lost = np.zeros((2, 13, *SIZE), bool)
    lost[:, channels] = hidden.numpy()
    for row, part in enumerate(lost):
        part[channels[: row + 1]] |= ratio > 0.3  # bands that are gone beside others that aren't
    hidden = torch.from_numpy(lost[:, channels])
    results = {make: make(MOMENTS, names)(images, hidden).numpy() for make in NEW}
    for row, (image, gone) in enumerate(zip(images.double().numpy(), lost, strict=True)):
        corrected = ridge_local_by_hand(image, gone)
        for index, target in enumerate(channels):
            where, seen = gone[target], ~gone[target]
            level = image[target][seen].mean() if seen.any() else MOMENTS.mean[target]
            expected = {
                NearestFill: nearest_by_hand(image, gone, target),
                LocalFill: local_by_hand(image[target], seen, level, VALUE_PRIOR),
                RidgeLocalFill: corrected[target],
            }
            for make, result in results.items():
                assert np.abs(result[row, index] - expected[make])[where].max(initial=0) < 2e-5, make


def test_the_guards_fill_in_numpy_is_ridge_local(sample_pack: Pack) -> None:
    """It sums Gaussian windows to 3.5 SD, and pixels of one band at a time."""
    images = reflectance(sample_pack, sample_pack.rows("test")[:4])
    hidden = drawn(("B08", "B11"), 0.9, 0, 4, "block", (64, 64))
    expected = make_fill("ridge_local", MOMENTS, ("B08", "B11"))(images, hidden).numpy()
    gaps = np.zeros((13, 4, 64, 64), bool)
    gaps[[7, 11]] = hidden.numpy().swapaxes(0, 1)
    spectra = np.where(gaps, 0, images.numpy().swapaxes(0, 1))
    fill_gaps(spectra, gaps, MOMENTS)
    told, true = spectra[[7, 11]].swapaxes(0, 1)[hidden], images[:, [7, 11]].numpy()[hidden]
    assert np.abs(told - expected[hidden]).max() < 0.1 * (expected[hidden] - true).std()


# --- real pixels


def errors(pack: Pack, names: tuple[str, ...], ratio: float, moments: Moments, hole: int | None = None) -> dict:
    """RMSE in DN over the hidden pixels of up to 60 test images, of each mask value; one channel may be NaN."""
    images, spec = reflectance(pack, pack.rows("test")[:60]), MaskSpec(names, ratio)
    hidden = spec.hidden(torch.arange(len(images)), (64, 64))
    given_ = images.clone()
    if hole is not None:
        given_[:, hole] = math.nan
    found = {}
    for value in VALUES:
        source = pack if value in ("dataset_mean", "band_mean") else moments
        filled = hide(given_, hidden, spec, make_fill(value, source, names))
        found[value] = float((filled - images)[:, spec.channels][hidden].square().mean().sqrt() * 10_000)
    return found


@pytest.mark.parametrize("names", [("B08",), ("B02", "B03", "B04"), ("B08", "B8A", "B09", "B10", "B11")])
def test_errors_on_real_pixels_are_in_the_order_they_should_be(sample_pack: Pack, names: tuple[str, ...]) -> None:
    error = errors(sample_pack, names, 0.9, Moments.of(sample_pack))
    assert error["ridge_local"] < error["ridge"] < error["local"] < error["band_mean"] < error["dataset_mean"], error
    assert error["nearest"] < error["dataset_mean"], error


# --- from a mask value


def test_a_constant_is_the_packs(sample_pack: Pack) -> None:
    means = torch.tensor(sample_pack.band_means())
    for value in ("dataset_mean", "band_mean", -1.0):
        assert torch.equal(make_fill(value, sample_pack, ("B08",)), fill_values(value, means))
    nothing, none = make_fill("ridge_local", sample_pack, ()), torch.zeros(2, 0, *SIZE, dtype=torch.bool)
    assert torch.equal(hide(generated(), none, MaskSpec(()), nothing), generated())


@pytest.mark.parametrize("value", FITTED)
def test_what_decides_a_fill_is_in_its_checksum(value: str, sample_pack: Pack) -> None:
    """A checkpoint made with another fill must not be taken up."""
    names = ("B02", "B08")

    def checksum(moments: Moments, of: str = value) -> str:
        return fill_checksum(make_fill(of, sample_pack, names, moments))

    assert checksum(MOMENTS) == checksum(Moments.of_spectra(spectra()))
    assert checksum(MOMENTS) != checksum(Moments.of_spectra(spectra(1)))
    others = [checksum(MOMENTS, other) for other in FITTED if other != value]
    assert checksum(MOMENTS) not in others


def test_a_fill_that_can_not_be_made_says_what_can() -> None:
    with pytest.raises(
        ValueError, match=r"unknown mask value 'Ridge'.*dataset_mean, .*ridge_local, native, or a number"
    ):
        make_fill("Ridge", MOMENTS, ("B08",))
    with pytest.raises(ValueError, match=r"13 of 13 are hidden.*use 'ridge_local'"):
        make_fill("ridge", MOMENTS, bands.NAMES)


@pytest.mark.parametrize("method", api.METHODS)
def test_an_image_is_filled_as_it_is_alone_whatever_the_others_of_its_batch_lost(method: str) -> None:
    images = generated(3, (8, 8)).clamp(min=0.01)
    images[0, 7], images[1, 3, :5], images[2, 11, 3, 3] = math.nan, math.nan, math.nan
    together = fills.complete(images, method, MOMENTS)
    for row, filled in enumerate(together):
        alone = fills.complete(images[row : row + 1], method, MOMENTS)[0]
        torch.testing.assert_close(filled, alone, rtol=0, atol=1e-6)


# --- what can't be told


def test_what_is_unexplained_is_the_share_of_variance_that_regression_leaves() -> None:
    train = SPECTRA
    fill, lost = RidgeLocalFill(Moments.of_spectra(train)), bands.channel_indices(["B08", "B11"])
    hidden = torch.zeros(5, 13, 40, 40, dtype=torch.bool)
    hidden[1, lost] = True
    hidden[2] = True
    hidden[3, lost[0]], hidden[3, lost[1], 20:] = True, True
    hidden[4] = drawn(bands.NAMES, 0.9, 0, 1, size=(40, 40))
    visible = [c for c in range(13) if c not in lost]
    left = train[:, lost] - Ridge(alpha=1e-3).fit(train[:, visible], train[:, lost]).predict(train[:, visible])
    found = fill.unexplained(hidden)
    assert found[0] == 0, "a complete image"
    assert float(found[1]) == pytest.approx((left.var(0) / train[:, lost].var(0)).sum() / 13, rel=1e-3)
    assert float(found[2]) == pytest.approx(1), "nothing is visible"
    assert 0 < found[3] < found[1], "half of B11 says what the other half is"
    assert found[4] == 0, "of every band a tenth is left"
