"""Ridge imputation, of fixed bands and of any: equals scikit-learn, and reads nothing that is hidden."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import generated_images, generated_index
from sklearn.linear_model import Ridge

from bandmask import bands
from bandmask.imputation import RidgeFill
from bandmask.masking import MaskSpec, fill_values, hidden_pixels, hide
from bandmask.moments import Moments
from bandmask.packs import Pack

B02, B03, B04, B08, B11 = bands.channel_indices(["B02", "B03", "B04", "B08", "B11"])


@pytest.fixture(scope="module")
def linear(tmp_path_factory: pytest.TempPathFactory, make_pack: Callable[..., Pack]) -> Pack:
    """A pack in which, exactly in DN, B08 = 2·B03 + B02 − B04 + 100 and B11 = B02 + 300."""
    images = generated_images(24, 16).astype(np.int64)
    images[:, B08] = 2 * images[:, B03] + images[:, B02] - images[:, B04] + 100
    images[:, B11] = images[:, B02] + 300
    return make_pack(tmp_path_factory.mktemp("linear"), images=images.astype(np.uint16), index=generated_index(24))


def reflectance(pack: Pack, split: str) -> torch.Tensor:
    return torch.tensor(pack.images[pack.rows(split)].astype(np.float32)) / 10_000


@pytest.mark.parametrize("names", [("B08",), ("B11",), ("B08", "B11")])
def test_an_exact_linear_relation_is_recovered(linear: Pack, names: tuple[str, ...]) -> None:
    images = reflectance(linear, "test")
    spec = MaskSpec(names)
    hidden = hidden_pixels(spec, torch.arange(len(images)), (16, 16))
    restored = hide(images, hidden, spec, RidgeFill.fit(linear, names, alpha=1e-6))
    assert hidden.float().mean() > 0.8
    assert (restored - images).abs().max() < 1e-4  # one DN


def test_predictions_are_scikit_learns(sample_pack: Pack) -> None:
    names = ("B02", "B8A", "B12")
    channels = bands.channel_indices(names)
    visible = [c for c in range(13) if c not in channels]
    everything = 10**9
    fill = RidgeFill.fit(sample_pack, names, pixels=everything, alpha=0.5)
    train = sample_pack.images[sample_pack.rows("train")].transpose(0, 2, 3, 1).reshape(-1, 13) / 10_000
    reference = Ridge(alpha=0.5).fit(train[:, visible], train[:, channels])
    test = sample_pack.images[sample_pack.rows("test")[:5]]
    expected = reference.predict(test.transpose(0, 2, 3, 1).reshape(-1, 13)[:, visible] / 10_000)
    images = torch.tensor(test.astype(np.float32)) / 10_000
    predicted = fill(images, torch.ones(5, 3, 64, 64, dtype=torch.bool))
    assert predicted.shape == (5, 3, 64, 64)
    assert np.abs(predicted.permute(0, 2, 3, 1).reshape(-1, 3).numpy() - expected).max() < 1e-5


def test_only_visible_bands_are_read(linear: Pack) -> None:
    fill = RidgeFill.fit(linear, ["B08", "B11"])
    images = reflectance(linear, "val")
    hidden = torch.ones(len(images), 2, 16, 16, dtype=torch.bool)
    expected = fill(images, hidden)
    for value in (0.0, 5.0, torch.nan, torch.inf):
        spoilt = images.clone()
        spoilt[:, [B08, B11]] = value
        assert torch.equal(fill(spoilt, hidden), expected)
    spoilt = images.clone()
    spoilt[:, B02] += 1
    assert not torch.equal(fill(spoilt, hidden), expected)


def test_nothing_is_learned_from_validation_or_test_images(linear: Pack, tmp_path: Path, make_pack) -> None:
    images = np.array(linear.images)
    rest = linear.index["split"].to_numpy() != "train"
    images[rest, B08] = 3
    other = make_pack(tmp_path, images=images, index=linear.index)
    one, two = RidgeFill.fit(linear, ["B08"]), RidgeFill.fit(other, ["B08"])
    assert torch.equal(one.weight, two.weight)
    assert torch.equal(one.bias, two.bias)
    assert not torch.equal(RidgeFill.fit(other, ["B08"], split="test").weight, one.weight)


def test_the_same_seed_draws_the_same_pixels(sample_pack: Pack) -> None:
    def weight(seed: int) -> torch.Tensor:
        return RidgeFill.fit(sample_pack, ["B08"], pixels=500, seed=seed).weight

    assert torch.equal(weight(0), weight(0))
    assert not torch.equal(weight(0), weight(1))


def test_the_order_in_which_bands_are_named_does_not_matter(linear: Pack) -> None:
    """`MaskSpec` sorts its bands; imputation in another order would swap one band's values with another's."""
    images = reflectance(linear, "test")
    spec = MaskSpec(("B08", "B02"))
    hidden = hidden_pixels(spec, torch.arange(len(images)), (16, 16))
    filled = [
        hide(images, hidden, spec, RidgeFill.fit(linear, names))
        for names in (("B02", "B08"), ("B08", "B02"), ("nir", "b2"), spec.bands)
    ]
    for other in filled[1:]:
        assert torch.allclose(other, filled[0], atol=1e-6)


def test_imputation_fitted_for_other_bands_is_refused(linear: Pack) -> None:
    images = reflectance(linear, "test")
    spec = MaskSpec(("B08", "B02"))
    hidden = hidden_pixels(spec, torch.arange(len(images)), (16, 16))
    for names in (["B08"], ["B08", "B11"], ["B02", "B08", "B11"]):
        with pytest.raises(ValueError, match=r"B02.*B08|shape|bands"):
            hide(images, hidden, spec, RidgeFill.fit(linear, names))


@pytest.mark.parametrize(("names", "count"), [((), 0), (bands.NAMES, 13)])
def test_hidden_and_visible_bands_are_both_needed(linear: Pack, names: tuple[str, ...], count: int) -> None:
    with pytest.raises(ValueError, match=f"needs hidden and visible bands; {count} of 13 are hidden"):
        RidgeFill.fit(linear, names)


def test_on_a_real_scene_it_beats_the_band_mean_several_times_over(sample_pack: Pack) -> None:
    images = reflectance(sample_pack, "test")
    spec = MaskSpec(("B03", "B08", "B12"))
    hidden = hidden_pixels(spec, torch.arange(len(images)), (64, 64))
    means = torch.from_numpy(sample_pack.band_means())

    def rmse(fill) -> torch.Tensor:
        error = (hide(images, hidden, spec, fill) - images)[:, spec.channels]
        return (error.masked_fill(~hidden, 0).square().sum((0, 2, 3)) / hidden.sum((0, 2, 3))).sqrt()

    ratio = rmse(fill_values("band_mean", means)) / rmse(RidgeFill.fit(sample_pack, spec.bands))
    assert (ratio > 3).all(), ratio


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_fill_follows_the_type_of_the_batch(linear: Pack, dtype: torch.dtype) -> None:
    images = reflectance(linear, "val").to(dtype).to(memory_format=torch.channels_last)
    spec = MaskSpec(("B08",))
    hidden = hidden_pixels(spec, torch.arange(len(images)), (16, 16))
    filled = hide(images, hidden, spec, RidgeFill.fit(linear, ["B08"]))
    assert filled.dtype == dtype
    assert filled.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine: ridge imputation on CUDA untested")
def test_the_fill_is_the_same_on_cuda(linear: Pack) -> None:
    images = reflectance(linear, "val")
    fill, hidden = RidgeFill.fit(linear, ["B08", "B11"]), torch.ones(len(images), 2, 16, 16, dtype=torch.bool)
    assert torch.allclose(fill(images.cuda(), hidden.cuda()).cpu(), fill(images, hidden), atol=1e-5)


def test_the_fill_is_as_exact_under_autocast(linear: Pack) -> None:
    images, fill = reflectance(linear, "val"), RidgeFill.of(Moments.of(linear), ["B08", "B11"])
    hidden = torch.ones(len(images), 2, 16, 16, dtype=torch.bool)
    expected = fill(images, hidden)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(fill(images, hidden), expected)
