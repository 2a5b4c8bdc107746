"""The page of the API: what it promises, run as it stands; the kind of thing that goes in comes out."""

import doctest
import re
import subprocess
import sys
import warnings
from dataclasses import asdict, replace
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch

import bandmask as bm
from bandmask import api, bands, datasets, encoders, evaluation, files, fills, masks, service, stats

TEN = "B02 B03 B04 B05 B06 B07 B08 B8A B11 B12"


@pytest.fixture(scope="module")
def scene():
    return bm.sample_scene().isel(y=slice(0, 128), x=slice(0, 128)).load()


@pytest.fixture(scope="module")
def images(scene):
    return (scene.values / 1e4).astype(np.float32)


@pytest.fixture(scope="module")
def small():
    card = encoders.Card("random weights", "resnet10t", embedding_dim=16, image_size=32)
    return bm.Encoder(encoders.create_encoder("resnet10t", embedding_dim=16), card)


def test_importing_costs_nothing_and_every_name_is_there_with_a_docstring():
    heavy = "import sys, bandmask; sys.exit(any(m in sys.modules for m in ('torch', 'numpy', 'pandas', 'rasterio')))"
    assert subprocess.run([sys.executable, "-c", heavy], check=False).returncode == 0
    assert all(getattr(bm, name).__doc__ for name in bm.__all__ if name != "BANDS")
    assert len(bm.__all__) <= 25
    with pytest.raises(AttributeError, match="available"):
        bm.nothing  # noqa: B018
    modules = {path.stem for path in (files.project_root() / "bandmask").glob("*.py")}
    assert not modules & set(bm.__all__), "a module would hide the name of the page"


@pytest.mark.parametrize("module", [api, datasets, service])
def test_examples_of_the_docstrings(module):
    assert doctest.testmod(module).failed == 0


@pytest.mark.parametrize("page", ["docs/api.md", "README.md"])
def test_snippets_run_as_they_stand(page, tmp_path, small, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small.save(tmp_path / "outputs" / "sample" / "encoder")
    names: dict[str, object] = {}
    blocks = re.findall(r"```python\n(.*?)```", (files.project_root() / page).read_text(), re.DOTALL)
    assert blocks
    for block in blocks:
        exec(block, names)


def test_a_scene_an_array_and_a_tensor_come_out_as_they_went_in(scene):
    array = scene.values / 10_000
    gaps = [bm.hide(given, "B8A swir16", ratio=0.5, seed=3) for given in (scene, array, torch.from_numpy(array))]
    hidden = [np.isnan(np.asarray(gap)) for gap in gaps]
    assert [type(gap).__name__ for gap in gaps] == ["DataArray", "ndarray", "Tensor"]
    assert bm.hide(torch.ones(13, 4, 4, dtype=torch.bfloat16), "B08").dtype == torch.float32
    exact = array.astype(np.float64) + 1e-10
    filled = bm.fill(bm.hide(exact, "B08", ratio=np.float32(0.5)))
    assert (filled == exact).mean() > 12 / 13  # to the last bit
    assert (hidden[0] == hidden[1]).all()
    assert (hidden[0] == hidden[2]).all()
    assert set(np.flatnonzero(hidden[0].any((1, 2)))) == set(bands.channel_indices(["B8A", "B11"]))
    whole = bm.fill(gaps[0])
    assert (whole.values == scene.values)[~hidden[0]].all()  # to the last bit
    assert np.isfinite(whole.values).all()
    assert whole.attrs == scene.attrs
    np.testing.assert_allclose(bm.fill(gaps[1]), whole.values / 10_000, atol=2e-6)


@pytest.mark.parametrize("stated", [{"missing_value": "7"}, {"_FillValue": np.float64(1e20)}, {"nodata": 7}])
def test_a_no_data_value_that_a_scene_states_in_any_way_is_a_gap(scene, stated):
    given = scene.where(scene.y != scene.y[0], float(*stated.values())).assign_attrs(stated)
    assert np.isnan(bm.hide(given, "B08")[0, 0]).all()


def test_a_no_data_value_that_a_scene_states_is_a_gap(scene):
    broken = scene.where(scene.band != "B08", -9999).assign_attrs(scene.attrs | {"_FillValue": -9999})
    np.testing.assert_array_equal(bm.fill(broken), bm.fill(bm.hide(scene, "B08")))
    np.testing.assert_array_equal(bm.guard(lambda x: x, bands.NAMES, unit="DN")(broken).filled, {"B08": 1.0})


def test_moments_of_some_bands_fill_these(scene):
    no_cirrus, ten = scene.where(scene.band != "B10").assign_attrs(scene.attrs), scene.sel(band=TEN.split())
    for mine in (no_cirrus, ten):
        whole, gap = bm.fill(mine, moments=bm.fit_moments(mine)), bm.hide(mine, "B08 B11")
        np.testing.assert_array_equal(whole, mine)  # B10 stays NaN
        filled = bm.fill(gap, moments=bm.fit_moments(mine)).sel(band=["B08", "B11"])
        assert float(abs(filled - scene.sel(band=["B08", "B11"])).mean()) < 150


def test_dn_beside_reflectance_look_alike(scene):
    pictures = [axis.images[0].get_array() for axis in bm.show(scene, scene.values / 1e4).get_axes()]
    np.testing.assert_allclose(*pictures, atol=1e-3)


def test_fewer_bands_by_name_are_those_of_thirteen(images):
    channels = bands.channel_indices(TEN.split())
    whole = np.where(np.isin(np.arange(13), channels)[:, None, None], images, np.float32(np.nan))
    broken = bm.hide(whole[channels], "B11 B12", names=TEN)
    assert (np.isnan(broken) == np.isnan(bm.hide(whole, "B11 B12"))[channels]).all()
    expected = bm.fill(bm.hide(whole, "B11 B12"))[channels]
    np.testing.assert_array_equal(bm.fill(broken, names=TEN), expected)


@pytest.mark.parametrize(
    ("call", "word"),
    [
        (lambda s: bm.hide(s.values[:12], "B11"), "names"),
        (lambda s: bm.hide(s.values[:10], "B10", names=TEN), "B10"),
        (lambda s: bm.hide(s.assign_coords(band=np.arange(1, 14)), "B11"), "only count channels; say which"),
        (lambda s: bm.show(s.assign_coords(band=[f"band {n}" for n in range(1, 14)])), "are no names of bands"),
        (lambda s: bm.hide(s.rename(band="channel"), "B11"), "a scene has dimensions band"),
        (lambda s: bm.fill(s.assign_attrs(scale_factor=1e-4, add_offset=-0.1)), "a scale or offset that its values"),
        (lambda s: bm.fill(np.full((13, 4, 4), np.nan)), "no value"),
        (lambda s: bm.fill(s, "magic"), "ridge_local"),
        (lambda s: bm.fill(s, moments="L3"), "L2A"),
        (lambda s: bm.fill(s, moments=fills.Moments.of_spectra(s.values.reshape(13, -1).T)), "moments are of refl"),
        (lambda s: bm.hide("picture.png", "B11"), "scene"),
        (lambda s: bm.hide(s.sel(band=["B04", "B03"]), "B04", names="B02 B03"), "the scene's own labels"),
        (lambda s: bm.hide(s, "B11", seed="a"), "whole number; got a"),
        (lambda s: bm.open_scene(s), "a scene is opened from a file; got DataArray"),
        (lambda s: bm.fill(s, moments=np.ones(13)), "no moments of level"),
        (lambda s: bm.fit_moments(s.values[:, :9, :9] / 1e4), "81 pixels with a value in each of B01 .*1,000"),
        (lambda s: bm.fill(s.values / 100), "neither reflectance .*of percent, divide by 100"),
        (lambda s: bm.show(), "one image or more"),
        (lambda s: bm.show(s, s, titles=["one"]), "a title each; got 2"),
        (lambda s: bm.show(np.stack([s.values, s.values])), "a batch of 2; give one image each"),
        (lambda s: bm.fine_tune(bm.load_encoder("mini"), "eurosat-mini", ""), "nothing is lost: lost='', ratio=0.9"),
        (lambda s: bm.evaluate(bm.load_encoder("mini"), "eurosat-mini", "B08", ratio=0), "nothing is lost: lost='B08'"),
        (lambda s: bm.evaluate("mini", "eurosat-mini", "B08"), "bm.load_encoder, or several by name; got 'mini'"),
        (lambda s: bm.evaluate({}, "eurosat-mini", "B08"), "bm.load_encoder"),
        (lambda s: bm.fine_tune("mini", "eurosat-mini", "B08"), "bm.load_encoder"),
        (lambda s: bm.hide(s.values, "B08", names={*bm.BANDS}), "in their order"),
        (lambda s: bm.guard(str, TEN, take="pixels"), "unknown option take; available: takes, unit, mean"),
        (lambda s: bm.load_encoder("nowhere/encoder"), "nowhere"),
        (lambda s: bm.load_encoder("mini", weights="/nope"), "has weights of its own"),
    ],
)
def test_what_would_be_wrong_is_refused(scene, call, word):
    with pytest.raises((ValueError, FileNotFoundError), match=word):
        call(scene)


@pytest.mark.parametrize("share_hidden", [0.0, 0.9])
@pytest.mark.parametrize("put", [0.0, -1.0, torch.nan])
def test_dn_are_told_from_reflectance_whatever_stands_in_gaps(put, share_hidden, sample_pack):
    dn = torch.tensor(sample_pack.images[:4].astype("float32"))
    hidden = torch.rand(dn.shape, generator=torch.Generator().manual_seed(0)) < share_hidden
    bm.fill((dn / 10_000).masked_fill(hidden, put))
    with pytest.raises(ValueError, match="DN where reflectance is due; divide by 10,000"):
        bm.fill(dn.masked_fill(hidden, put))


def test_an_encoder_refuses_what_it_would_read_wrongly(scene, small, sample_pack):
    patch, mini = scene.isel(y=slice(0, 32), x=slice(0, 32)), bm.load_encoder("mini")
    reflectance = torch.from_numpy(patch.values / 1e4)
    with torch.inference_mode():
        expected = small.model(reflectance[None])[0]
    assert torch.equal(small(reflectance), expected)
    np.testing.assert_array_equal(small(patch), expected.numpy())
    np.testing.assert_array_equal(small(reflectance.double()), expected)
    lacking = replace(sample_pack, card=sample_pack.card | {"absent": ["B10"]})
    assert small(patch.values[None][:0] / 1e4).shape == (0, 16)
    for word, call in (
        ("have no B10, which is missing already", lambda: bm.fine_tune(mini, lacking, "B08 B10")),
        ("have no B10, which is missing already", lambda: bm.evaluate(mini, lacking, "B08 B10")),
        ("sample lacks B10, .* takes complete images; take other", lambda: bm.fine_tune(small, lacking, "B08")),
        ("sample lacks B10, .* takes complete images; take other", lambda: bm.evaluate(small, lacking, "B08")),
        ("native masking is of", lambda: bm.fine_tune(small, sample_pack, "B08", method="native")),
        ("B08 have gaps", lambda: small(bm.hide(patch, "B08"))),
        ("DN", lambda: small(patch.values)),
        ("gaps", lambda: small(patch.values[1:9] / 1e4, names=bands.NAMES[1:9])),
        ("small 16, mini 128", lambda: bm.evaluate({"small": small, "mini": mini}, sample_pack, "B08")),
    ):
        with pytest.raises(ValueError, match=word):
            call()


@pytest.mark.slow
def test_fine_tuning_and_evaluation_on_a_pack(small, make_pack, tmp_path):
    pack = make_pack(tmp_path, n=48, size=32)
    tuned, history = bm.fine_tune(small, pack, "B08", epochs=1, batch_size=8)
    assert len(history) == 2
    assert tuned.card.mask["bands"] == ("B08",)
    table = bm.evaluate({"pre-trained": small, "fine-tuned": tuned}, pack, "B08", epochs=2, seeds=(0, 1))
    assert set(table["head"]) == {"complete", "kept", "retrained"}
    assert len(table) == 1 + 2 * 3
    assert ((table["low"] <= table["accuracy"]) & (table["accuracy"] <= table["high"])).all()
    again = bm.evaluate(small, pack, "B08", methods=["ridge_local", "ridge mapped", 0], epochs=2, seeds=(0, 1))
    assert (again["method"] == "pre-trained, ridge mapped").sum() == 2
    assert again["accuracy"].iloc[0] == table["accuracy"].iloc[0]


def test_a_copy_of_an_encoder_that_takes_gaps_learns_to_take_them(make_pack, tmp_path):
    """The data set's mean stood there by default: `mini` without B08 began at a cosine of 0.91."""
    pack = make_pack(tmp_path, n=48, size=64)
    tuned, history = bm.fine_tune(bm.load_encoder("mini"), pack, "B08", epochs=1, batch_size=8)
    assert tuned.card.mask["value"] == "native"
    assert history["val_cosine"][0] > 0.99


@pytest.mark.parametrize(("value", "gets"), [(None, torch.nan), (0.0, 0.0), (0.25, 0.25)])
def test_a_copy_is_evaluated_behind_what_it_was_fine_tuned_behind(value, gets, small, make_pack, tmp_path, monkeypatch):
    """And at its own side: a copy of one for every loss was given gaps, 0.80 where it has 0.58."""
    seen, mini = [], bm.load_encoder("mini")
    monkeypatch.setattr(evaluation, "train", lambda task, view, pack: (None, None))
    monkeypatch.setattr(evaluation, "predict", lambda view, head, pack: seen.append(view) or pd.DataFrame())
    monkeypatch.setattr(stats, "resample", lambda found: {})
    card = replace(mini.card, mask=asdict(masks.MaskSpec("B08", value=value)) if value is not None else mini.card.mask)
    copy = bm.Encoder(mini.model, replace(card, image_size=48, embedding_dim=small.card.embedding_dim))
    bm.evaluate({"small": small, "copy": copy}, make_pack(tmp_path), "B08", methods=[])
    assert [view.image_size for view in seen[::2]] == [32, 48]
    np.testing.assert_array_equal(seen[-1].fill, torch.full((13,), gets))


def test_a_turned_or_read_only_array_is_taken_as_it_lies(scene):
    turned = (scene.values[:, ::-1, ::-1] / 1e4).astype(np.float64)[..., ::-1]
    turned.flags.writeable = False
    with warnings.catch_warnings(action="error"):
        np.testing.assert_array_equal(bm.hide(turned, "B08"), bm.hide(turned.copy(), "B08"))


def test_a_dead_pixel_costs_no_band(scene):
    """80 DN without it; a band with one was no predictor any more: 289 DN, and `ridge` was refused."""
    broken = bm.hide(scene, "B08", ratio=0.9, shape="stripe")
    gap, broken.values[:, 0, 0], broken.values[3, 5, 5] = np.isnan(broken.values), np.nan, np.nan
    for method, most in (("ridge_local", 82), ("ridge", 101)):
        whole = bm.fill(broken, method)
        assert float(np.nanmean(abs(whole - scene).values[gap])) < most
        assert np.isnan(whole.values[:, 0, 0]).all()  # nothing is seen there
        assert np.isnan(whole.values).sum() == 13
        assert abs(float(whole[3, 5, 5] - scene[3, 5, 5])) < 200
    model = bm.guard(lambda x: x[:, 7], bands.NAMES, unit="DN")
    edge = broken.copy()
    edge.values[:, :, :64] = np.nan  # half of it lies outside of the swath
    whole = bm.fill(edge)
    assert np.isnan(whole.values).sum() == 13 * 128 * 64
    error, worse = (np.nanmean(abs(filled - scene).values[gap]) for filled in (whole, bm.fill(edge, "ridge")))
    assert error < worse < 110
    assert np.nanmean(abs(np.asarray(model(broken)) - scene.values[7])[gap[7]]) < 85


def test_no_data_of_any_kind_is_a_gap_to_all(images):
    model = bm.guard(lambda x: x[:, 7], bands.NAMES)
    gap = images.copy()
    gap[7, :9] = np.nan
    masked = np.ma.masked_array(images, np.isnan(gap))
    lost = {str(value): np.nan_to_num(gap, nan=value) for value in (-9999, 65535, 6.5535, 6.4535)}
    for name, given in {"masked": masked, **lost}.items():
        np.testing.assert_array_equal(bm.fill(given), bm.fill(gap), err_msg=name)
        assert model(given).filled == model(gap).filled, name
        assert np.isnan(bm.hide(given, "B02")[7, :9]).all() or name.startswith("6."), name
    half = torch.from_numpy(gap).bfloat16()
    assert np.abs(bm.fill(half).numpy() - bm.fill(gap)).max() < 0.01
    assert model(half).filled == model(gap).filled


def test_zeros_that_a_guard_takes_as_missing_are_said_by_all(images):
    """B08 of zeros moved an embedding by 8.5, B08 of NaN by 0.7: without a word."""
    zeros = images[:, :64, :64].copy()
    zeros[[7, 10]] = 0  # cirrus may be
    for call in (bm.fill, bm.fit_moments, bm.load_encoder("mini")):
        with pytest.warns(UserWarning, match="^B08: 0 throughout"):
            call(np.stack([images[:, :64, :64], zeros]))


def test_of_what_only_a_person_can_tell_a_warning_speaks(images):
    """1000 DN in one image of a batch, and a level that the encoder never saw."""
    mini, small = bm.load_encoder("mini"), images[:, :64, :64]
    for call in (bm.fill, mini, bm.guard(lambda x: x, bands.NAMES)):
        with pytest.warns(UserWarning, match="1 of 2 images have no pixel below 900 DN: .* 1000 DN"):
            call(np.stack([small, small + np.float32(0.1)]))
        with pytest.warns(UserWarning, match="ten times too dark"):
            call(small / 10)
    scene = bm.sample_clouds()[2].assign_attrs(level="L2A")
    with pytest.warns(UserWarning, match="the scene is L2A, .* was trained on L1C"):
        mini(bm.hide(scene, "B10"))


@pytest.mark.parametrize("level", ["L1C", "L2A"])
def test_pixels_of_a_level_that_nobody_states_and_is_not_taken_are_said(level, tmp_path):
    """The package's spectra of L1C filled L2A with up to twice the error: without a word."""
    ten, draw = "B02 B03 B04 B05 B06 B07 B08 B8A B11 B12", np.random.default_rng(0)
    of, at = bm.Moments.shipped(level), bands.channel_indices(ten.split())
    spectra = draw.multivariate_normal(of.mean[at], of.covariance[np.ix_(at, at)], 4096).clip(0.001)
    array = spectra.T.reshape(10, 64, 64).astype(np.float32)

    def pack(array):
        options = {"unit": "reflectance", "offset": 0, "path": tmp_path / "pack"}
        bm.pack(array.reshape(10, 64, 8, 8).swapaxes(0, 1), [0] * 64, bands=ten, **options)

    mini = partial(bm.load_encoder("mini"), names=ten)
    for call in (bm.guard(lambda x: x, ten), lambda array: bm.fill(array, names=ten), pack, mini):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            call(array)
        assert [f"look like {level}, and" in str(one.message) for one in said] == [True] * (level == "L2A")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bm.fill(array, moments=level, names=ten)


def test_the_unit_is_that_of_the_scene_where_its_middle_is_empty(scene):
    """DN of 4,980 were filled in as reflectance: a unit was looked for in the middle 1,024 pixels alone."""
    whole = scene.pad(y=(0, 1100), x=(0, 1100), mode="wrap").drop_attrs()
    whole[:, 60:1150, 60:1150] = np.nan
    for call in (bm.fill, bm.fit_moments):
        with pytest.raises(ValueError, match="DN where reflectance"):
            call(whole)
    assert float(np.nanmax(np.asarray(bm.guard(lambda x: x[:, 7], bands.NAMES)(whole, distrust="B08")))) < 2


def test_axes_go_by_their_names_and_an_order_that_is_given_wins_over_labels_that_count(scene):
    counted = scene.assign_coords(band=np.arange(1, 14))
    gap = bm.hide(counted.transpose("y", "x", "band"), "B08", names=bands.NAMES)
    assert gap.dims == ("y", "x", "band")
    np.testing.assert_array_equal(gap.transpose("band", "y", "x").values, bm.hide(scene, "B08").values)
    np.testing.assert_array_equal(bm.fill(gap, names=bands.NAMES)[..., 7].values, bm.fill(bm.hide(scene, "B08"))[7])
    dates = bm.sample_clouds()[2:4]
    gap = bm.hide(dates.transpose("band", "x", "y", "date"), "B08", ratio=0.5)
    np.testing.assert_array_equal(gap.transpose(*dates.dims), bm.hide(dates, "B08", ratio=0.5))
    told = bm.identify(bm.sample_clouds().transpose("band", "date", "y", "x"))
    assert told.order.value == bm.identify(torch.from_numpy(bm.sample_clouds().values)).order.value == "satclip"


@pytest.mark.parametrize(
    ("given", "word"),
    [
        (lambda s: s.copy(data=s.values / 1e4), "in reflectance already"),  # xarray keeps attributes
        (lambda s: s.assign_attrs(dn_per_reflectance=1), "DN where reflectance"),
        (lambda s: (s / 100).assign_attrs(dn_per_reflectance=1), "by 10,000, or dn_per_reflectance=1, which"),
        (lambda s: s.assign_attrs(dn_per_reflectance=1000), "dn_per_reflectance=1000, which is stated, is wrong"),
        (lambda s: s.assign_attrs(dn_per_reflectance=-10_000), "dn_per_reflectance=-10000, which"),
        (lambda s: s.values[bands.reorder("satclip", "eurosat")] / 1e4, "eurosat"),
        (lambda s: np.stack([s.values * np.nan, s.values / 1e4, s.values]), r"images \[2\] of the batch hold DN"),
        (lambda s: s.to_dataset("band"), "Dataset"),
        (lambda s: s.rename(y="time"), "dimensions band, and y/x"),
    ],
)
def test_what_contradicts_its_values_is_refused_by_all(scene, given, word):
    for call in (bm.fill, bm.fit_moments, bm.load_encoder("mini"), bm.guard(lambda x: x, bands.NAMES)):
        with pytest.raises(ValueError, match=word):
            call(given(scene))


def test_an_image_of_another_size_is_embedded_as_heads_met_it_and_a_gap_takes_what_is_left(images):
    mini, whole = bm.load_encoder("mini"), torch.from_numpy(images)[None]
    smaller, striped = torch.nn.functional.interpolate(whole, (64, 64), mode="bilinear"), whole.clone()
    torch.testing.assert_close(mini(whole), mini(smaller), atol=1e-5, rtol=1e-4)
    striped[:, 7, :, ::2] = torch.nan  # of each pixel half is left, and no other band is touched
    smaller[:, 7] = torch.nn.functional.avg_pool2d(whole[..., 1::2][:, 7:8], (2, 1))[:, 0]
    torch.testing.assert_close(mini(striped), mini(smaller), atol=1e-5, rtol=1e-4)


def test_an_encoder_for_every_loss_is_saved_whole(images, tmp_path):
    mini = bm.load_encoder("mini")
    mini.save(tmp_path / "x")
    np.testing.assert_array_equal(bm.load_encoder(tmp_path / "x")(images), mini(images))
