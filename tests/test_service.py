"""A guarded model: complete images pass untouched, gaps are filled from what is visible alone, what it says holds."""

import importlib.util
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from sklearn.dummy import DummyClassifier

import bandmask as bm
from bandmask import bands, datasets, files, fills, models, moments, stats

SIX = ("B02", "B03", "B04", "B08", "B11", "B12")
PLACES = [bands.NAMES.index(name) for name in SIX]
INSTALLED, L2A = models.installed(), moments.Moments.shipped("L2A")


@pytest.fixture(scope="module")
def dates() -> np.ndarray:
    """Five real dates (5, 13, 101, 100) DN, two of them cloudy."""
    return bm.sample_clouds().values


@pytest.fixture(scope="module")
def network() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Conv2d(6, 8, 3, padding=1), torch.nn.ReLU(), torch.nn.Conv2d(8, 3, 1)).eval()


def echo(images: np.ndarray) -> np.ndarray:
    return images


class Answers(torch.nn.Module):
    """A module that says this."""

    def __init__(self, what: Any) -> None:
        super().__init__()
        self.what = what

    def forward(self, _: torch.Tensor) -> Any:
        return self.what


def bright(*images: np.ndarray) -> Any:
    """One class an image, 0 or 1."""
    return bm.guard(lambda x: (x[:, 3].mean((1, 2)) > 0.2).astype(int), SIX, images=images)


@pytest.mark.parametrize("unit", ["reflectance", "DN"])
def test_a_complete_image_gives_bit_for_bit_what_the_model_alone_gives(dates, network, unit):
    dn = dates[2][PLACES].astype(np.float32)
    given = dn if unit == "DN" else dn / np.float32(10_000)
    mean, sd = given.mean((1, 2)), given.std((1, 2))
    model = bm.guard(network, SIX, unit=unit, mean=mean, sd=sd)
    with torch.inference_mode():
        alone = network(torch.from_numpy((given - mean[:, None, None]) / sd[:, None, None])[None])[0].numpy()
    every = xr.DataArray(dates[2], dims=("band", "y", "x"), coords={"band": list(bands.NAMES)})
    for images in (dn, dn.astype(np.uint16), given, torch.from_numpy(given), every):
        answer = model(images)
        assert type(answer.values) is type(images)
        np.testing.assert_array_equal(np.asarray(answer), alone)
        assert not answer.filled
        assert answer.by == ""


@pytest.mark.parametrize("takes", ["images", "pixels"])
def test_what_is_visible_stays_to_the_last_bit_and_what_is_hidden_is_not_read(dates, takes):
    """The model hands back what it was given."""
    given = dates[1].astype(np.float32)
    hidden = np.random.default_rng(0).random(given.shape) < 0.3
    hidden[10], hidden[:, 5, 5] = True, True
    broken, other = np.where(hidden, np.nan, given), np.where(hidden, 65_535, given)
    model = bm.guard(echo, bands.NAMES, takes=takes, unit="DN")
    answer = model(broken)
    found = answer.values
    assert (found == given)[~hidden].all()
    assert np.isnan(found[:, 5, 5]).all()
    assert answer.nodata.sum() == 1
    assert answer.filled["B10"] == 1
    assert np.isfinite(found[:, ~answer.nodata]).all()
    np.testing.assert_array_equal(model(other).values, found)


def test_whole_bands_are_told_by_the_regression_of_the_pool_that_is_named(dates):
    gone = ("B8A", "B11")
    given = torch.tensor(dates[:2] / 10_000, dtype=torch.float32)
    model = bm.guard(echo, bands.NAMES)
    hidden = torch.ones(2, 2, *given.shape[2:], dtype=torch.bool)
    for pool in ("all", "land"):
        expected = fills.RidgeFill(model.fills[pool], gone)(given, hidden)
        found = model(given, distrust=gone, fill=pool)
        torch.testing.assert_close(found.values[:, [8, 11]], expected, atol=1e-5, rtol=0)
        assert found.by == pool
    absent = model(given[:, :8], names=bands.NAMES[:8])
    assert set(absent.filled) == set(bands.NAMES[8:])


def test_a_band_with_holes_is_corrected_around_them_as_ridge_local_does(dates):
    given = dates[1].astype(np.float32) / 10_000
    broken = bm.hide(given, "B11 B12", ratio=0.9)
    errors = {
        "ours": abs(bm.guard(echo, bands.NAMES)(broken).values - given).mean(),
        "ridge_local": abs(bm.fill(broken) - given).mean(),
        "ridge": abs(bm.fill(broken, "ridge") - given).mean(),
    }
    assert errors["ours"] < 0.8 * errors["ridge"]
    assert errors["ours"] == pytest.approx(errors["ridge_local"], rel=0.02)
    assert (bm.guard(echo, bands.NAMES)(broken, fill="zero").values[np.isnan(broken)] == 0).all()


@pytest.mark.parametrize(("takes", "margin"), [("pixels", 0), ("images", 2)])
def test_tiles_give_what_the_whole_gives(dates, network, takes, margin):
    predict = network if takes == "images" else (lambda x: x @ np.arange(6, dtype=np.float32))
    broken = dates[0][PLACES].astype(np.float32)
    broken[3] = np.nan
    whole = bm.guard(predict, SIX, takes=takes)(broken)
    tiled = bm.guard(predict, SIX, takes=takes, tile=40, margin=margin)(broken)
    np.testing.assert_allclose(tiled.values, whole.values, atol=1e-5)
    assert tiled.filled == whole.filled == {"B08": 1.0}
    with pytest.raises(ValueError, match="tile=None"):
        bm.guard(lambda x: x.mean((2, 3)), SIX, tile=40)(broken)


def test_the_unit_is_that_of_the_image_whatever_the_first_tile_holds(dates):
    dn = np.full((13, 200, 100), np.nan, np.float32)
    dn[:, 99:] = dates[2]
    answer = bm.guard(echo, bm.BANDS, unit="reflectance", tile=50)(dn)
    np.testing.assert_array_equal(answer.values[:, 99:], dates[2] / np.float32(10_000))
    assert np.isnan(answer.values[:, :99]).all()


def test_zeros_throughout_a_band_are_no_measurement_but_for_cirrus(dates):
    dn = dates[2].copy()
    dn[[7, 10]] = 0
    assert set(bm.guard(echo, bands.NAMES)(dn).filled) == {"B08"}
    late = dates[2:4].astype(np.float32)
    late[1, 7] = 0  # of one image of a batch
    answer = bm.guard(echo, bands.NAMES, unit="DN")(late)
    assert answer.filled == {"B08": 0.5}
    assert answer.values[1, 7].min() > 0
    corner = dates[2].copy()
    corner[7, :50, :50] = 0  # all that a tile sees, but not all of the image
    assert bm.guard(echo, bands.NAMES, tile=50)(corner).filled == {}


def test_a_guard_is_shown_in_a_few_lines(dates):
    model = bm.guard(echo, SIX, level="l1c", images=dates, decide=np.float32(0.5))
    assert len(repr(model)) < 500
    assert (model.level, model.decide) == ("L1C", 0.5)


def test_a_scene_of_another_level_is_said():
    with pytest.warns(UserWarning, match="the scene is L2A, the model takes L1C"):
        bm.guard(echo, bands.NAMES)(bm.sample_clouds()[2].assign_attrs(level="L2A"))


@pytest.mark.parametrize(
    ("call", "word"),
    [
        (lambda x: bm.guard(echo, "B02 B99"), "B99"),
        (lambda x: bm.guard(echo, SIX, takes="patches"), "pixels"),
        (lambda x: bm.guard(echo), "B04 B08"),
        (lambda x: bm.guard("cloudless"), "s2cloudless"),
        (lambda x: bm.guard(echo, SIX)(x[:4]), "names"),
        (lambda x: bm.guard(echo, SIX)(x / 300), "neither"),
        (lambda x: bm.guard(echo, SIX)((x / 40).astype(np.uint8)), "uint8"),
        (lambda x: bm.guard(echo, SIX)(x, distrust="B08", fill="magic"), "mixture"),
        (lambda x: bm.guard(echo, bm.BANDS)(x[bands.reorder("satclip", "eurosat")]), "eurosat"),
        (lambda x: bm.guard(echo, SIX, images=[np.where(x > 3000, np.nan, x)]), "complete"),
        (lambda x: bm.guard(lambda i: i.mean((2, 3)), SIX)(np.full((2, 6, 4, 4), np.nan)), "no value"),
        (lambda x: bm.guard(echo, bm.BANDS, fills={"l2a": L2A})(x, distrust="B10", fill="l2a"), "B10"),
        (lambda x: bm.guard(lambda i: i.mean((2, 3))[:, :5], SIX)(np.full((5, 6, 5, 5), np.nan)), "image 0 of 5 holds"),
        (lambda x: bm.guard(echo, SIX, fills={"m": moments.Moments.of_spectra(x.reshape(13, -1).T)}), "reflectance; m"),
        (lambda x: bm.guard(echo, SIX, fills={"m": 3}), "the fill 'm' is 3"),
        (lambda x: bm.guard(echo, SIX, sd=[0] * 6), "no sd 0"),
        (lambda x: bm.guard(echo, SIX, fills={"zero": L2A}), "zero are the guard's own"),
        (lambda x: bm.guard(echo, SIX, tile=-4), "tile is a whole number of pixels, 1 or more; got -4"),
        (lambda x: bm.guard(DummyClassifier().fit(np.eye(6), np.arange(6)), SIX), "takes='pixels'"),
        (lambda x: bm.guard(echo, SIX, margin=1.5), "margin is a whole"),
        (lambda x: bm.guard(echo, SIX, multiple="32"), "multiple is a whole"),
        (lambda x: bm.guard(echo, SIX, mean={"B02": 1}), "mean is one number a band"),
        (lambda x: bm.guard(echo, SIX, decide="0.5"), "decide is a threshold"),
        (lambda x: bm.guard(echo, SIX, decide=True), "decide is a threshold"),
        (lambda x: bm.guard("s2cloudless", "B02 B03"), "knows its bands"),
        (lambda x: bm.guard("s2cloudless", unit="DN"), "knows its unit, for images of any unit"),
        (lambda x: bm.guard(echo, {"B04", "B08"}), "in their order"),
        (lambda x: bm.guard(echo, SIX, sd=[1e4] * 6), "not of reflectance; say which `unit`"),
        (lambda x: bm.guard(echo, SIX, unit="DN", mean=[0.1] * 6), "not of DN; say which `unit`"),
        (lambda x: bm.guard(echo, SIX, decide=np.nan), "decide is a threshold"),
        (lambda x: bm.guard(echo, SIX, images=[x]).robustness(losses=["B08"], fills=["none"]), "answers NaN to gaps"),
        (lambda x: bm.guard(lambda i: i[:, 0] > 9, SIX, images=[x]).robustness(labels=[x[0].T > 9]), r"\(100, 101\)"),
        (lambda x: bm.guard(echo, SIX, images=3), "a list of arrays"),
        (lambda x: bm.guard(echo, SIX, images=[x]).robustness(losses=None), "losses are single"),
        (lambda x: bm.guard(echo, SIX)(x[None][:0]), "no image in"),
        (lambda x: bm.guard(Answers({"out": 1, "aux": 2}), SIX)(x), "a dict of out, aux"),
        (lambda x: bm.guard(lambda i: (i.mean((2, 3)), i.max((2, 3))), SIX)(np.stack([x, x])), "a tuple of 2"),
        (lambda x: bm.guard(lambda i: [(1, 0.5)] * 2, SIX)(np.stack([x, x])), "a list of 2"),
        (lambda x: bm.guard(torch.nn.AvgPool2d(2), SIX, multiple=32)(x / 1e4), "partly of padding"),
        (lambda x: bm.guard(echo, SIX)(x[:, :0]), r"images are .*got ndarray \(13, 0, 100\)"),
        (lambda x: bm.guard(lambda i: np.moveaxis(i, 1, -1), SIX)(x), "have their classes last"),
        (lambda x: bm.guard(echo, "B03 B08", images=[x, x[[2, 7]]]), "all of the same bands"),
        (lambda x: bm.guard(echo, bm.BANDS, images=[x[bands.reorder("satclip", "eurosat")]]), "images: .* 'eurosat'"),
        (lambda x: bm.guard(lambda i: None, SIX)(x), r"answers \(\) to \(1, 6, 101, 100\)"),
        (lambda x: bm.guard(lambda i: i[:5, 0], SIX, takes="pixels")(x), "each of pixels"),
        (lambda x: bm.guard(lambda i: (i[:, 0] > 9) - 1, SIX, images=[x]).robustness(), "classes count from 0"),
        (lambda x: bm.guard(echo, SIX).adapt([x, x], "B08", fill="none"), "adapt stands behind a fill"),
        (lambda x: bm.guard(echo, SIX).robustness(), "images"),
        (lambda x: bm.guard(None, SIX), "a model is a function"),
        (lambda x: bm.guard(echo, SIX, images=[x]).robustness(losses="pairs"), "few-left"),
        (lambda x: bm.guard(echo, SIX, images=[x]).robustness(labels=[1, 2]), "2 labels for 1 images"),
        (lambda x: bright(x).robustness(labels=["dark"]), r"in classes from 0 on, \(1,\) .* labels are words"),
        (lambda x: bright(x).robustness(labels=[np.zeros((9, 9), int)]), r"classes from 0 on, \(9, 9\)"),
        (lambda x: bm.guard(echo, "B08 B11", images=[x]).robustness(labels=[x[7] * 0 + 2]), "labels are numbers"),
        (lambda x: bm.guard(echo, "B08 B11", images=[x]).robustness(labels=[x[7].astype(int)]), "classes below 2"),
    ],
)
def test_what_would_be_wrong_is_refused(dates, call, word):
    with pytest.raises(ValueError, match=word):
        call(dates[0].astype(np.float32))


def test_what_a_loss_costs_is_measured_on_images_that_the_fill_was_not_chosen_on(dates):
    """NDVI reads two bands: the others cost nothing, and every subset is tried."""
    ndvi = bm.guard(lambda x: (x[:, 1] - x[:, 0]) / (x[:, 1] + x[:, 0]), "B04 B08 B11", takes="pixels", images=dates)
    table = ndvi.robustness(losses="all")
    assert table["lost"].nunique() == 1 + 6
    ignored = table[table["lost"].isin(["", "B11"])]
    assert (ignored["score"] == 1).all()
    scores = table[table["lost"] == "B08"].set_index("fill")["score"]
    assert scores["zero"] < scores["mean"] < scores["all"] < 1
    best = table[table["lost"] == "B08"]["score"].max()
    answer = ndvi(dates[0], distrust="B08")
    assert answer.expected.metric == "R²"
    assert answer.expected.low <= answer.expected.score <= best
    assert answer.expected.by == answer.by
    assert bm.guard(ndvi.predict, ndvi.bands)(dates[0], distrust="B08").expected is None
    rest = bm.guard(ndvi.predict, ndvi.bands, takes="pixels", images=dates[1:])
    told = [g.robustness(dates[:1], ["B08"], fills=["own"])["score"].iloc[1] for g in (ndvi, rest)]
    assert told[0] == told[1]  # of the guard's own images, one is held out
    other = ndvi.robustness(images=[dates[0] + 100], losses=["B08"], fills=["own"])  # one image: by the guard's own
    assert 0 < other["score"].iloc[1] < 1


def test_images_of_a_guard_stay_as_they_were_given_and_what_it_does_not_take_helps_where_all_it_takes_is_lost(dates):
    mine = dates[:3].copy()
    model, other = (bm.guard(lambda x: x[:, 0], "B08", images=list(given)) for given in (mine, dates[:3]))
    mine[:, 7] = 0
    assert model.expect("B08") == other.expect("B08")
    assert (model.robustness(losses="single")["lost"] == "B08").any()


def test_a_fill_that_does_not_know_a_lost_band_is_left_out_of_the_table(dates):
    model = bm.guard(lambda x: x[:, 10] + x[:, 3], bm.BANDS, images=dates[:2], fills={"mine": L2A})
    fills_of = model.robustness(losses=["B10", "B04"]).groupby("lost")["fill"].agg(set)
    assert fills_of["B04"] - fills_of["B10"] == {"mine"}
    with pytest.warns(UserWarning, match="no row of B01 B02"):
        assert set(model.robustness(losses=["B04", " ".join(bands.NAMES)])["lost"]) == {"", "B04"}


def test_scores_of_classes_are_those_of_the_confusion_counts():
    draw = np.random.default_rng(0)
    own, found = draw.integers(0, 3, (4, 9, 9)), draw.integers(0, 3, (4, 9, 9))
    agreement = stats.Agreement.of(list(own), list(found))
    iou = [((own == c) & (found == c)).sum() / ((own == c) | (found == c)).sum() for c in range(3)]
    assert agreement.score() == pytest.approx(np.mean(iou))
    assert agreement.same == pytest.approx((own == found).mean())
    low, high = agreement.interval()
    assert low < agreement.score() < high
    clouds = np.zeros((4, 9, 9), bool)
    clouds[0, :3] = True  # of one image: draws of it are all alike, and no interval
    assert np.isnan(stats.Agreement.of(list(clouds), list(np.roll(clouds, 1, 1))).interval()).all()
    own[:, :3] = -1
    assert stats.Agreement.of(list(own), list(found)).same == pytest.approx((own == found)[:, 3:].mean())
    none = np.where(own == found, found, -1)  # an answer that stays out is a wrong one, and no other class's
    recall = [((own == c) & (found == c)).sum() / (own == c).sum() for c in range(3)]
    assert stats.Agreement.of(list(own), list(none)).score() == pytest.approx(np.mean(recall))
    words = np.array(["sea", "land"])
    assert stats.Agreement.of(list(words[own % 2]), list(words[found % 2])).metric == "F1"


def test_a_mixture_of_one_kind_is_its_regression_and_of_several_knows_which(dates):
    shipped = moments.shipped("L1C")
    visible, hidden = [1, 2, 3, 8], [7, 11]
    spectra = dates.transpose(1, 0, 2, 3).reshape(13, -1)[visible].astype(np.float32) / 10_000
    twice = moments.Mixture({"a": shipped["land"], "b": shipped["land"]}, (0.5, 0.5))
    expected = shipped["land"].tell(spectra, visible, hidden)
    np.testing.assert_allclose(twice.tell(spectra, visible, hidden), expected, atol=1e-5)
    water = np.tile(shipped["water"].mean[visible, None], 5).astype(np.float32)
    near = shipped["mixture"].tell(water, visible, hidden)
    assert abs(near - shipped["water"].mean[hidden, None]).max() < 0.02


def test_a_pixel_model_needs_no_torch():
    code = (
        "import sys, numpy as np, bandmask as bm; "
        "x = np.full((13, 9, 9), 0.1, np.float32); x[7] = np.nan; "
        "bm.guard(lambda p: p[:, 7], bm.BANDS, takes='pixels')(x); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.slow
def test_a_band_that_looks_broken_is_replaced_where_that_is_asked_for():
    scene = bm.sample_scene()[:, :256, :256].load()
    broken = scene.copy(deep=True)
    broken[7] = broken[7].mean()
    model = bm.guard(echo, bm.BANDS, unit="DN")
    assert set(model(broken, distrust="auto").filled) == {"B08"}
    assert not model(scene, distrust="auto").filled
    with pytest.raises(ValueError, match="scene"):
        model(scene.values, distrust="auto")


@pytest.mark.skipif("s2cloudless" not in INSTALLED, reason="s2cloudless or lightgbm is not installed")
def test_s2cloudless_is_its_booster_and_sees_clouds_without_cirrus(dates):
    import lightgbm

    path = files.of_package("s2cloudless", "models/pixel_s2_cloud_detector_lightGBM_v0.1.txt")
    ten = [0, 1, 3, 4, 7, 8, 9, 10, 11, 12]
    pixels = (dates / np.float32(10_000)).transpose(0, 2, 3, 1)[..., ten].reshape(-1, 10)
    alone = lightgbm.Booster(model_file=str(path)).predict(pixels).reshape(5, 101, 100)
    model = bm.guard("s2cloudless")
    np.testing.assert_array_equal(model(dates).values, alone)
    cloudy = (alone > 0.4).mean((1, 2))
    assert (cloudy[:2] > 0.9).all()  # what the two cloudy dates are
    assert (cloudy[2:] == 0).all()
    repaired = model(dates, distrust="B10").values > 0.4
    assert (repaired == (alone > 0.4)).mean() > 0.99
    broken = model(dates, distrust="B01 B09 B10", fill="zero").values > 0.4
    assert broken[:2].mean() < 0.5


@pytest.mark.skipif("ukis-csmask-6b-l1c" not in INSTALLED, reason="ukis-csmask or onnxruntime is not installed")
def test_the_unet_sees_clouds_in_squares_of_256_pixels(dates):
    answer = bm.guard("ukis-csmask-6b-l1c")(dates[:3, :, :100, :100].astype(np.float32))
    assert answer.values.shape == (3, 3, 100, 100)
    cloudy = (answer.values.argmax(1) == 1).mean((1, 2))
    assert cloudy[0] > 0.5 > cloudy[2]


@pytest.mark.skipif("snap-lai" not in INSTALLED, reason="satellitetools is not installed")
def test_snaps_net_gives_esas_test_cases():
    cases = np.loadtxt(
        files.of_package("satellitetools", "biophys/snap-auxdata/biophysical/2_1/LAI/LAI_TestCases"), delimiter=","
    )
    np.testing.assert_allclose(models.load("snap-lai")["predict"](cases[:, :11]), cases[:, 11], atol=5e-4)


def test_a_model_that_is_not_installed_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(models.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="pip install --no-deps"):
        bm.guard("s2cloudless")
    assert models.installed() == ()


def onnx_relu() -> bytes:
    """An ONNX file whose one node is Relu, of four dimensions of any length; without the onnx package."""

    def part(number: int, *inside: bytes | int) -> bytes:
        (value,) = inside if len(inside) == 1 else (b"".join(inside),)  # type: ignore[arg-type]
        if isinstance(value, int):
            return bytes([number << 3, value])
        return bytes([number << 3 | 2, len(value)]) + value

    shape = part(2, *(part(1, part(2, name)) for name in (b"b", b"c", b"h", b"w")))
    ends = [part(field, part(1, name), part(2, part(1, part(1, 1), shape))) for field, name in ((11, b"x"), (12, b"y"))]
    node = part(1, part(1, b"x"), part(2, b"y"), part(4, b"Relu"))
    return part(1, 8) + part(7, node, part(2, b"graph"), *ends) + part(8, part(2, 13))


def test_the_five_line_uses_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "yours.onnx").write_bytes(onnx_relu())
    blocks = re.findall(r"```python\n(.*?)```", (files.project_root() / "docs" / "service.md").read_text(), re.DOTALL)
    assert len(blocks) >= 4
    for block in blocks:
        needs = [name for name in ("onnxruntime", "lightgbm") if name in block]
        if all(importlib.util.find_spec(name) for name in needs):
            exec(block, {})


def test_a_map_of_answers_is_kept_only_where_it_beats_the_fills(dates):
    """A regression of all bands at once does better than the pools; where nothing is lost, nothing can be won."""
    images = [date[:, :64, :64] for date in (*dates, *dates[:, :, 32:, 32:])]
    model = bm.guard(echo, "B01 B02 B03 B04 B08 B09 B10 B11", decide="none")
    better = model.adapt(images, "B11 B12")
    told = better.adaptation
    assert told["kept"] == (told["after"].score > told["before"].score) == bool(better.maps)
    np.testing.assert_array_equal(better(images[0]).values, model(images[0]).values)
    by = told["after"].by
    (known,) = better.maps.values()
    alone, mapped = model(images[1], distrust="B11 B12", fill=by).values, better(images[1], distrust="B11 B12")
    expected = np.einsum("ij,jhw->ihw", known.coef_, alone) + known.intercept_[:, None, None]
    np.testing.assert_allclose(mapped.values, expected, atol=1e-6)
    assert (mapped.by, mapped.expected) == (by, told["after"])
    of = {"distrust": "B11 B12", "fill": "mean"}  # the map is of one loss behind one fill
    np.testing.assert_array_equal(better(images[1], **of).values, model(images[1], **of).values)
    ignores = bm.guard(lambda x: x[:, 1:], "B10 B02").adapt(images, "B10")
    assert not ignores.adaptation["kept"]
    assert not ignores.maps
    with pytest.raises(ValueError, match="in numbers"):
        bm.guard(lambda x: x[:, 0] > 0, SIX).adapt(images, "B08")
    with pytest.raises(ValueError, match="two images"):
        bm.guard(echo, SIX).adapt(images[:1], "B08")


def test_a_map_of_an_embedding_longer_than_images_are_many_is_no_worse():
    """By plain least squares it was: R² −18 where the fill alone has 0.81."""
    images = datasets.open_dataset("eurosat-mini").images[::5] / np.float32(1e4)
    directions = np.random.default_rng(0).normal(size=(13 * 16, 60))

    def embed(x):
        return np.tanh(2 * x.reshape(len(x), 13, 4, 16, 4, 16).mean((3, 5)).reshape(len(x), -1) @ directions)

    lost = [name for name in bands.NAMES if name not in ("B02", "B04")]
    told = bm.guard(embed, bm.BANDS, decide="none").adapt(images, lost, fill="land").adaptation
    assert told["after"].score > told["same fill"].score


@pytest.mark.parametrize("takes", ["images", "pixels"])
@pytest.mark.parametrize("own", [False, True])
def test_an_image_is_answered_and_told_alike_alone_and_in_a_batch(dates, takes, own):
    """The batch chose the fill, and whether answers were mapped; bands that the model doesn't take hid the map."""
    images = [part for date in dates / np.float32(1e4) for part in (date[:, :64, :64], date[:, 32:96, 32:96])]
    model = bm.guard(echo, SIX, takes=takes, decide="none", images=[i[PLACES] for i in images] * own)
    better = model.adapt([image[PLACES] for image in images], "B11 B12", fill="land")
    told, whole = better.adaptation, images[1]
    late, partly, fewer = whole.copy(), whole.copy(), whole.copy()
    late[11:], partly[11], partly[12, 9:], fewer[[0, 9, 10, 11, 12]] = np.nan, np.nan, np.nan, np.nan
    assert told["kept"] or own
    for given, mapped in ((late[PLACES], True), (fewer, True), (partly, False)):
        alone, plain = better(given), model(given)
        if mapped and told["kept"]:
            assert (alone.by, alone.expected) == ("land", told["after"])
            assert (alone.values != plain.values).any()
        else:
            assert (alone.by, alone.expected) == (plain.by, plain.expected)
            np.testing.assert_array_equal(alone.values, plain.values)
        batch = better(np.stack([given, images[2][PLACES] if len(given) == 6 else images[2]]))
        np.testing.assert_array_equal(batch.values[0], alone.values)
        assert (batch.by, batch.expected) == (alone.by, alone.expected)
    both = better(np.stack([late, partly, images[3]]))
    np.testing.assert_array_equal(both.values[1], better(partly).values)
    assert both.filled == pytest.approx({"B11": 2 / 3, "B12": (1 + 55 / 64) / 3})
    assert better(late, fill="water").expected == (model.expect("B11 B12", "water") if own else None)


def test_a_torch_model_in_training_is_asked_as_in_use_and_stays_as_it_is(dates):
    net = torch.nn.Sequential(torch.nn.BatchNorm2d(6), torch.nn.Dropout(), torch.nn.Conv2d(6, 2, 1))
    net[1].eval()
    given, before = dates[2][PLACES] / np.float32(1e4), {k: v.clone() for k, v in net.state_dict().items()}
    found = bm.guard(net, SIX)(given).values
    assert [part.training for part in net.modules()] == [True, True, False, True]
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    with torch.inference_mode():
        np.testing.assert_array_equal(found, net.eval()(torch.from_numpy(given)[None])[0].numpy())


def test_answers_of_eight_threads_are_those_of_one(dates):
    """37 of 64 differed: one thread's module was back in training while another asked it."""
    net = torch.nn.Sequential(torch.nn.Conv2d(6, 8, 3, padding=1), torch.nn.BatchNorm2d(8), torch.nn.Dropout())
    model, given = bm.guard(net, SIX), dates[2]
    first = model(given).values
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(8) as pool:
            assert all(np.array_equal(first, answer.values) for answer in pool.map(model, [given] * 32))
    finally:
        sys.setswitchinterval(5e-3)
    assert int(net[1].num_batches_tracked) == 0


def test_an_answer_is_kept_as_the_model_gave_it(dates):
    """Words were cut to the length of the first rows', 1.5 to 1; one array written into again was every answer."""
    given, once = np.tile(dates[2], (1, 6, 6)) / 1e4, np.empty((1, 6), np.float32)
    given[[3, 7], :500], given[[3, 7], 500:] = 0.1, 0.3
    said = bm.guard(lambda p: np.array(["forest" if v > 0.2 else "sea" for v in p[:, 0]]), "B04 B08", takes="pixels")
    assert np.unique(said(given).values).tolist() == ["forest", "sea"]
    told = bm.guard(lambda p: np.float32(1.5) * (p[:, 0] > 0.2) if p.max() > 0.2 else p[:, 0].astype(int), "B04, B08",
                    takes="pixels")  # fmt: skip
    assert np.unique(told(given).values).tolist() == [0, 1.5]
    hidden = bm.guard(lambda x: np.ma.masked_greater(x[:, 0], 0.2), "B04 B08")(given).values
    assert np.isnan(hidden[500:]).all()
    assert np.isfinite(hidden[:500]).all()
    model = bm.guard(lambda x: np.copyto(once, x.mean((2, 3))) or once, SIX, decide="none", images=list(dates))
    assert model.expect("B08 B11").score < 1
    np.testing.assert_array_equal(model(dates[0], distrust=np.array(["B08"])).filled["B08"], 1)


def test_two_numbers_an_image_are_not_taken_for_two_classes_without_a_word(dates):
    """Of leaf area and brightness the larger was always the first: agreement 1, whatever was lost."""
    images = [date[PLACES] for date in dates]
    two = {"predict": lambda x: np.stack([x[:, 3] * 10, x[:, 0]], 1).mean((2, 3)), "bands": SIX, "images": images}
    with pytest.warns(UserWarning, match="decide='none'"):
        bm.guard(**two).robustness(losses=["B08"], fills="mean")
    assert bm.guard(**two, decide="none").robustness(losses=["B08"], fills="mean")["score"].iloc[1] < 0.99


def test_where_nothing_is_to_be_found_the_best_fill_finds_nothing(dates):
    """No cloud on any image: a fill that sees some was chosen, since NaN is above and below no score."""
    bright = bm.guard(lambda p: (p[:, 0] > 0.9).astype(int), "B08 B11", takes="pixels", images=dates[2:])
    bright.fills = {"all": moments.Plain("mean", replace(moments.Moments.shipped("L1C"), mean=np.ones(13))),
                    "land": bright.fills["land"]}  # fmt: skip
    assert bright._best(frozenset({"B08"}))[0] == "land"


def test_a_map_keeps_its_place_and_its_dates():
    given = bm.sample_scene()[:, 20:40, 30:60].load()
    answer = bm.guard(lambda x: x[:, :2], "B02 B08")(given).values
    assert answer.dims == ("class", "y", "x")
    assert answer.rio.crs == given.rio.crs
    assert answer.rio.transform() == given.rio.transform()
    dates = bm.sample_clouds().assign_coords(date=np.arange(5))
    answer = bm.guard(lambda x: x[:, 7], bands.NAMES)(dates.transpose("band", "y", "x", "date")).values
    assert answer.dims == ("date", "y", "x")
    assert answer["date"].values.tolist() == [*range(5)]


def test_a_swath_s_edge_is_not_filled(dates):
    given = dates[2] / np.float32(1e4)
    given[:, :60] = np.nan
    answer = bm.guard(echo, bands.NAMES, images=dates)(given)
    assert (answer.filled, answer.by, answer.expected) == ({}, "", None)
    given[7] = np.nan
    answer = bm.guard(echo, bands.NAMES, images=dates)(given)
    assert answer.filled == {"B08": 1.0}
    assert answer.expected.by == answer.by


def test_labels_that_nobody_knows_are_left_out_and_numbers_are_compared_with_numbers(dates):
    table = bright(*dates[:3]).robustness(losses=[], labels=[1, 255, 0], fills="zero mean")
    known = bright(*dates[:3]).robustness(losses=[], labels=[1, -1, 0])
    assert table["truth"].iloc[0] == known["truth"].iloc[0]
    masks = [(date[1] > 2000).astype(np.uint8) for date in dates[:2]]
    for high in (1, 255):  # a class, where the model answers it
        model = bm.guard(lambda x, h=high: (x[:, 0] > 0.2).astype(np.uint8) * h, "B02 B03", images=dates[:2, 1:3])
        told = model.robustness(losses=["B02"], labels=[mask * np.uint8(high) for mask in masks], fills="all")
        np.testing.assert_array_equal(told["truth"], told["score"])
    assert told["metric"].iloc[0] == "mIoU"
    words = bm.guard(lambda x: np.where(x[:, 0] > 0.2, "cloud", "clear"), "B02 B03", images=dates[:2, 1:3])
    with pytest.raises(ValueError, match=r"answers in clear, cloud, .* labels are Clear, Cloud"):
        words.robustness(labels=[np.where(mask, "Cloud", "Clear") for mask in masks])
    with pytest.raises(ValueError, match="labels are 0, 255"):
        bm.guard(lambda x: (x[:, 0] > 0.2) * 1, "B02 B03", images=dates[:2, 1:3]).robustness(
            labels=[mask * np.uint8(255) for mask in masks]
        )
    height = bm.guard(lambda x: x[:, 0] * 2, "B08", unit="DN", images=[dates[0]])
    assert height.robustness(losses=[], labels=[dates[0][7] * 2])["truth"].iloc[0] == 1
