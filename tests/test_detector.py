"""The detector keeps its rate of false alarms, finds what is broken, and says what it can't judge."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr
from conftest import reflectance
from hypothesis import given
from hypothesis import strategies as st
from scipy.signal import convolve2d
from scipy.stats import binom
from sklearn.linear_model import Ridge
from test_identity import CLOUD, SEA, flat
from test_identity import tiles as real_tiles

import bandmask as bm
from bandmask import bands, datasets, moments
from bandmask import detector as detection
from bandmask.detector import FEW_GROUPS, MOST_FAULTY, Detector, Normal, Sketch, spread_tiles, symptoms, take_out
from bandmask.faults import Fault, inject
from bandmask.identity import regrid
from bandmask.packs import Pack

IMMERKAER = np.array([[1, -2, 1], [-2, 4, -2], [1, -2, 1]]) / 6


@pytest.fixture(scope="module")
def detector() -> Detector:
    return Detector.shipped()


@pytest.fixture(scope="module")
def images(sample_pack: Pack) -> torch.Tensor:
    """Of another place than those that the detector was fitted on."""
    return reflectance(sample_pack, sample_pack.rows("test")[::6])


@pytest.fixture(scope="module")
def scene() -> xr.DataArray:
    return datasets.sample_scene()


def broken_scene(scene: xr.DataArray, fault: Fault) -> xr.DataArray:
    broken = inject(torch.from_numpy(scene.values[None] / 10_000), torch.zeros(1, dtype=torch.int64), fault)
    return scene.copy(data=broken[0].numpy() * 10_000)


# --- what is kept of an image


@pytest.fixture(scope="module")
def real(sample_pack: Pack) -> np.ndarray:
    return reflectance(sample_pack, sample_pack.rows("test")[::20]).numpy()


def form(matrix: np.ndarray, row: np.ndarray) -> np.ndarray:
    return np.einsum("a,nab,b->n", row, matrix, row)


def test_quadratic_forms_are_those_of_the_pixels(real: np.ndarray) -> None:
    row = np.random.default_rng(0).normal(size=13)
    combined, sketch = np.einsum("a,nahw->nhw", row, regrid(real)), Sketch.of(real)
    inner = combined[:, 1:-1, 1:-1]
    assert sketch.mean @ row == pytest.approx(inner.mean((1, 2)))
    assert form(sketch.spread[:, :13, :13], row) == pytest.approx(inner.var((1, 2)))
    for part, axis in ((slice(13, 26), 2), (slice(26, 39), 1)):
        gradient = np.gradient(combined, axis=axis)[:, 1:-1, 1:-1]
        assert form(sketch.spread[:, part, part], row) == pytest.approx(gradient.var((1, 2)))
        covariance = ((inner - inner.mean((1, 2), keepdims=True)) * gradient).mean((1, 2))
        assert form(sketch.spread[:, :13, part], row) == pytest.approx(covariance, abs=1e-12)
    filtered = np.stack([convolve2d(image, IMMERKAER, "valid") for image in combined])
    assert form(sketch.grain, row) == pytest.approx((filtered**2).mean((1, 2)))
    columns = np.diff(combined.mean(1), 2) / 6**0.5
    assert form(sketch.columns, row) == pytest.approx((columns**2).mean(1))


def test_pixels_without_a_value_count_nowhere(real: np.ndarray) -> None:
    lost = real.copy()
    lost[:, 3, :, 40:] = np.nan  # one band is enough: the others can't be compared with it there
    sketch, cropped = Sketch.of(lost), Sketch.of(real[..., :40])
    some = np.ix_(range(len(real)), range(1, 4), range(1, 4))  # of 10 m; coarse bands see a little beyond the edge
    assert sketch.mean[:, 1:4] == pytest.approx(cropped.mean[:, 1:4])
    for name in ("grain", "columns"):
        assert getattr(sketch, name)[some] == pytest.approx(getattr(cropped, name)[some], abs=1e-12)
    assert not sketch.absent.any()


def test_a_band_that_is_mostly_lost_is_absent_and_spoils_no_other(real: np.ndarray) -> None:
    lost = real.copy()
    lost[:, 10] = np.nan
    lost[:, 10, :3] = 9.0
    sketch, complete = Sketch.of(lost), Sketch.of(real)
    there = np.arange(13) != 10
    assert (sketch.absent == ~there).all()
    assert sketch.mean[:, there] == pytest.approx(complete.mean[:, there])
    assert sketch.grain[:, there][:, :, there] == pytest.approx(complete.grain[:, there][:, :, there], abs=1e-9)
    assert not sketch.mean[:, 10].any()


def test_what_cannot_be_judged_is_refused(real: np.ndarray, detector: Detector, make_pack, tmp_path: Path) -> None:
    scattered = real.copy()
    scattered[1, 5, ::2] = np.nan  # half of the pixels, and none with all its neighbours
    refused = {
        r"takes images \(N, 13, H, W\) of 8 pixels or more": lambda: Sketch.of(real[:, :12]),
        "got .*7": lambda: Sketch.of(real[..., :7]),
        "image 1 has 0 pixels with a value in every band": lambda: Sketch.of(scattered),
        r"fitted on images of 64 × 64 pixels, got \(32, 32\); cut tiles": lambda: detector.examine(real[..., :32, :32]),
        "three or more, not 2": lambda: detector.examine(real[:2], scene=True),
        "50 healthy images or more": lambda: Detector.fit(make_pack(tmp_path, n=24, size=16)),
        "healthy images can't hold a rate": lambda: Detector.shipped(0.001),
    }
    for message, call in refused.items():
        with pytest.raises(ValueError, match=message):
            call()


# --- symptoms


@pytest.mark.parametrize("distrusted", [(), (3, 10)])
def test_level_scatter_and_likeness_are_those_of_scikit_learns_prediction(sample_pack: Pack, distrusted) -> None:
    images = reflectance(sample_pack, sample_pack.rows("train")[::40]).numpy().astype(np.float64)
    spectra = images.transpose(0, 2, 3, 1).reshape(-1, 13)
    found, _ = symptoms(Sketch.of(images), moments.Moments.of_spectra(spectra), distrusted)
    inner = regrid(images)[:, :, 1:-1, 1:-1].transpose(1, 0, 2, 3).reshape(13, len(images), -1)
    for channel, own in enumerate(inner):
        others = [c for c in range(13) if c != channel and c not in distrusted]
        model = Ridge(alpha=moments.ALPHA).fit(spectra[:, others], spectra[:, channel])
        expected = model.predict(inner[others].reshape(len(others), -1).T).reshape(own.shape)
        assert found[:, channel, 0] == pytest.approx((own - expected).mean(1), abs=1e-8)
        assert np.exp(found[:, channel, 1]) == pytest.approx((own - expected).std(1), rel=2e-3, abs=1e-6)
        if own.std(1).min() > 1e-3:
            likeness = [np.corrcoef(a, b)[0, 1] for a, b in zip(own, expected, strict=True)]
            assert found[:, channel, 6] == pytest.approx(likeness, abs=1e-3)


def test_an_image_is_judged_as_if_it_had_not_been_fitted_on(detector: Detector) -> None:
    """The scale comes from leave-one-out residuals by formula; here they are made by leaving images out."""
    few, known = detector.healthy.take(np.arange(0, 796, 9)), detector.moments
    normal, rows = Normal(few, known), np.arange(len(few.mean))
    left = []
    for row in rows:
        rest = few.take(rows != row)
        others, (found, features) = Normal(rest, known), symptoms(few.take([row]), known)
        usual = np.einsum("ncf,cfs->ncs", (features - others.centre) / others.scale, others.slope)
        left.append((found - symptoms(rest, known)[0].mean(0) - usual)[0])
    middle, (low, high) = np.median(left, 0), np.quantile(left, (0.005, 0.995), axis=0)
    assert np.median(np.abs(normal.above / (high - middle) - 1)) < 0.05
    assert np.median(np.abs(normal.below / (middle - low) - 1)) < 0.05


# --- taken out one at a time


def spoilt(broken: set[int], own: float = 3.0, neighbour: float = 5.0):
    """Scores of a world in which a faulty band that is trusted makes its neighbours look worse than itself."""

    def look(out: np.ndarray) -> np.ndarray:
        scores = np.full(13, 0.5)
        for band in broken - set(np.flatnonzero(out)):
            scores[[band - 1, (band + 1) % 13]] = neighbour
        scores[list(broken)] = own
        return np.where(out, -np.inf, scores)

    return look


@given(st.sets(st.sampled_from([0, 3, 6, 9]), max_size=3), st.sets(st.sampled_from([2, 5, 8])))
def test_the_faulty_bands_are_found_though_their_neighbours_look_worse(broken: set[int], gone: set[int]) -> None:
    absent = np.isin(np.arange(13), list(gone))
    scores, faulty = take_out(spoilt(broken), absent)
    assert set(np.flatnonzero(faulty)) == broken
    assert (scores > 1).tolist() == faulty.tolist()
    assert np.isneginf(scores[absent]).all()


@pytest.mark.parametrize("absent", [0, 8, 10, 12])
def test_it_ends_where_everything_looks_faulty(absent: int) -> None:
    gone = np.arange(13) < absent
    _, faulty = take_out(lambda out: np.where(out, -np.inf, 9.0), gone)
    assert faulty.sum() == max(min(MOST_FAULTY, 13 - absent - 3), 0)
    assert not (faulty & gone).any()


# --- how sure


def test_false_alarms_on_real_healthy_images_are_as_rare_as_stated(detector, eurosat_pack, scene) -> None:
    """5 % is stated: of EuroSAT's test images, and of tiles of scenes of other places, some cloudy, some nearest."""
    called = detector.examine(reflectance(eurosat_pack, eurosat_pack.rows("test")[::2]))[1].any(1)
    assert called.sum() <= binom.ppf(0.999, len(called), 0.05)
    scenes = [scene.values[:, :512, :512].round(), *bm.sample_clouds().values]
    scenes += [dn - added for dn, level, added in real_tiles().values() if level == "L1C"]
    tiles, alarms = 0, 0
    for dn in scenes:
        assert not detector.distrust(scene_of(dn))["suspicious"].any()
        corners = [[*range(0, length - 63, 64 if length > 128 else length - 64)] for length in dn.shape[1:]]
        parts = np.stack([dn[:, y : y + 64, x : x + 64] for y in corners[0] for x in corners[1]]) / 1e4
        tiles, alarms = tiles + len(parts), alarms + detector.examine(parts, scene=True)[1].any(1).sum()
    assert alarms <= 0.05 * tiles  # 3 of 111


@pytest.mark.parametrize("fault", [Fault("striped", ("B04",), 0.01), Fault("noisy", ("B11",), 0.01)])
def test_a_fault_in_a_part_of_a_scene_shows_in_the_tiles_that_have_it(detector, scene, fault: Fault) -> None:
    part = scene.isel(y=slice(0, 512), x=slice(0, 512)).copy(deep=True)
    part.values[:, :128] = broken_scene(part, fault).values[:, :128]
    table = detector.distrust(part).set_index("band")
    assert not table["suspicious"].any()
    off = table["tiles_off"]
    assert off.idxmax() == fault.bands[0]
    assert off.max() == pytest.approx(0.25, abs=0.05)
    assert off.drop(off.idxmax()).max() < 0.05


def test_what_is_shipped_is_what_its_page_makes(detector: Detector, eurosat_pack: Pack, tmp_path: Path) -> None:
    code = re.search(r"```python\n(.*?)```", (moments.FOLDER / "README.md").read_text(), re.DOTALL)[1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets, "open_dataset", lambda name: eurosat_pack)
        patch.setattr(detection, "SHIPPED", tmp_path / "made.npz")
        exec(code, made := {})
        again = Detector.shipped.__wrapped__(Detector)
    fitted = made["made"]
    for one in (detector, again):
        assert one.threshold_at(0.05) == pytest.approx(fitted.threshold_at(0.05), rel=0.01)
        difference = symptoms(one.healthy, one.moments)[0] - symptoms(fitted.healthy, fitted.moments)[0]
        assert np.quantile(np.abs(difference), 0.99, axis=(0, 1)).max() < 0.02
    assert detection.SHIPPED.stat().st_size < 1_500_000


def test_the_threshold_is_conformal(detector: Detector) -> None:
    for far in (False, True):
        worst, threshold = detector.worst(far), detector.threshold_at(0.05, far)
        assert (worst > threshold).sum() + 1 <= 0.05 * (len(worst) + 1)
        assert detector.chance(np.array([np.inf]), far) == 1 / (len(worst) + 1)


# --- what is found


PLAIN = {
    "dead": Fault("dead", ("B04",), 0.0001),
    "stuck": Fault("stuck", ("B8A",), 0.2),
    "noisy": Fault("noisy", ("B03",), 0.01),
    "striped": Fault("striped", ("B02",), 0.01),
    "offset or gain": Fault("gain", ("B08",), 1.5),
    "exchanged with B04": Fault("swapped", ("B04", "B11")),
}


@pytest.mark.parametrize("fault", [*PLAIN.values(), Fault("noisy", ("B03", "B12"), 0.02)], ids=lambda it: it.label)
def test_a_plain_fault_is_found(detector: Detector, images: torch.Tensor, fault: Fault) -> None:
    _, called = detector.examine(inject(images, torch.arange(len(images)), fault))
    assert called.any(1).mean() > 0.9
    assert called[:, fault.channels].all(1).mean() > 0.7


def test_an_image_does_not_depend_on_its_batch(detector: Detector, images: torch.Tensor) -> None:
    broken = inject(images, torch.arange(len(images)), Fault("noisy", ("B03",), 0.01))
    mixed = torch.cat([images[:4], broken[:4]])
    together, alone = detector.examine(mixed)[0], np.concatenate([detector.examine(o[None])[0] for o in mixed])
    assert together == pytest.approx(alone, rel=1e-6)
    assert np.array_equal(detector.examine(mixed)[1], together > 1)


# --- a whole scene


def test_a_healthy_scene_is_trusted_whatever_the_order_of_its_bands(detector: Detector, scene: xr.DataArray) -> None:
    table = detector.distrust(scene, tiles=16)
    assert tuple(table["band"]) == bands.NAMES
    assert not table["suspicious"].any()
    assert (table["false_alarm"] > detector.rate).all()
    assert (table["looks_like"] == "").all()
    assert (table.attrs["note"], table.attrs["tiles"]) == ("", 16)
    turned = detector.distrust(scene.isel(band=slice(None, None, -1)), tiles=16)
    assert turned["score"].to_numpy() == pytest.approx(table["score"].to_numpy())


def test_a_detector_of_few_groups_says_so(sample_pack: Pack, detector: Detector, scene: xr.DataArray) -> None:
    fitted = Detector.fit(sample_pack)
    there = sample_pack.index["group"][sample_pack.index["split"] != "test"].nunique()
    assert fitted.groups == there < FEW_GROUPS
    few = f"fitted on {there} groups of images (sample)"
    assert few in fitted.distrust(scene, tiles=4).attrs["note"]
    assert "groups" not in detector.distrust(scene, tiles=4).attrs["note"]


@pytest.mark.parametrize("word", PLAIN)
def test_the_broken_band_of_a_scene_is_named_and_described(detector: Detector, scene: xr.DataArray, word: str) -> None:
    table = detector.distrust(broken_scene(scene, PLAIN[word]), tiles=8).set_index("band")
    assert set(table.index[table["suspicious"]]) == set(PLAIN[word].bands)
    assert table.loc[PLAIN[word].bands[-1], "looks_like"] == word


def test_lost_pixels_and_lost_bands_are_lived_with_and_named(detector: Detector, scene: xr.DataArray) -> None:
    lost = broken_scene(scene, Fault("noisy", ("B03",), 0.01))
    lost.values[:, :200] = np.nan  # the swath ends
    lost.values[6, 300:400, 300:500] = np.nan
    lost.values[bands.NAMES.index("B10")] = np.nan
    table = detector.distrust(lost, tiles=16)
    assert table["band"][table["suspicious"]].tolist() == ["B03"]
    cirrus = table.set_index("band").loc["B10"]
    assert cirrus["looks_like"] == "absent"
    assert np.isnan(cirrus["score"])
    assert np.isnan(cirrus["false_alarm"])
    assert "B10: no values" in table.attrs["note"]


@pytest.mark.parametrize("spectrum", [SEA, CLOUD], ids=["open sea", "cloud deck"])
def test_of_a_scene_unlike_all_it_knows_only_plain_faults_are_named(detector, scene, spectrum) -> None:
    foreign = scene.isel(y=slice(0, 128), x=slice(0, 64)).copy(data=flat(spectrum, (128, 64)))
    table = detector.distrust(foreign, tiles=2)
    assert "unlike anything it was fitted on" in table.attrs["note"]
    assert not table["suspicious"].any()
    stuck = detector.distrust(broken_scene(foreign, Fault("stuck", ("B8A",), 0.2)), tiles=2).set_index("band")
    assert stuck.loc["B8A", "looks_like"] == "stuck"


def test_another_processing_level_is_said_aloud(detector: Detector, scene: xr.DataArray) -> None:
    other = scene.assign_attrs(level="L2A")
    with pytest.warns(UserWarning, match="the scene is L2A, the detector was fitted on L1C"):
        table = detector.distrust(other, tiles=4)
    assert not table["suspicious"].any()
    coarse = scene.coarsen(y=2, x=2).mean().assign_attrs(scene.attrs)
    with pytest.warns(UserWarning, match="pixels of 20 m"):
        detector.distrust(coarse, tiles=4)


def scene_of(values: np.ndarray, names=bands.NAMES, **attributes: object) -> xr.DataArray:
    return xr.DataArray(values, dims=("band", "y", "x"), coords={"band": list(names)}, attrs=attributes)


def numbered(rows: int, columns: int, size: int = 16) -> np.ndarray:
    """DN that tell a tile's place: 1000 + its number, in every band."""
    numbers = 1000.0 + np.arange(rows * columns).reshape(rows, columns)
    return np.broadcast_to(np.kron(numbers, np.ones((size, size))), (13, rows * size, columns * size)).copy()


@pytest.mark.parametrize(("rows", "columns"), [(1, 100), (37, 11)])
def test_tiles_of_a_large_scene_are_spread_over_it(rows: int, columns: int) -> None:
    images, _ = spread_tiles(scene_of(numbered(rows, columns)), 16, 32)
    places = (images[:, 0, 0, 0] * 10_000).round().astype(int) - 1000
    assert len(set(places)) == 32
    for place, length in ((places // columns, rows), (places % columns, columns)):
        if length > 8:
            quarters = np.bincount(place * 4 // length, minlength=4)
            assert quarters.min() >= 3


def test_only_the_tiles_that_are_judged_are_read() -> None:
    whole = scene_of(np.broadcast_to(np.float32(1000), (13, 640_000, 64_000)))  # 2 TB, were it read
    assert len(spread_tiles(whole, 64, 5)[0]) == 5


def test_a_band_that_most_tiles_lack_is_absent_and_a_tile_that_lacks_another_is_left_out() -> None:
    values = numbered(4, 4) + 0.4
    values[10, :48] = np.nan
    values[3, :16, :16] = np.nan
    images, absent = spread_tiles(scene_of(values), 16, 64)
    assert np.flatnonzero(absent).tolist() == [10]
    assert len(images) == 15
    assert np.isnan(images[:, 10]).all()
    dn = np.delete(images, 10, axis=1) * 1e4  # whole, as in packs: else bands look blurred to a detector
    assert np.abs(dn - dn.round()).max() < 1e-2


@pytest.mark.parametrize("value", [-9999, 65535, 7])
def test_what_is_no_measurement_breaks_no_band_whatever_the_unit(value: float) -> None:
    """B08 was broken where 2 % of it are −9999 or 65535; a scene in reflectance was refused."""
    values = numbered(4, 4)
    gap, edge = np.random.default_rng(0).random(values.shape[1:]) < 0.02, values.copy()
    values[7, gap], edge[7, gap], edge[:, 40:] = np.nan, value, 0
    values[:, 40:] = np.nan
    expected = spread_tiles(scene_of(values), 16, 64)[0]
    np.testing.assert_array_equal(spread_tiles(scene_of(edge, _FillValue=7), 16, 64)[0], expected)
    np.testing.assert_array_equal(spread_tiles(scene_of(values / 10_000), 16, 64)[0], expected)


@pytest.mark.parametrize(
    ("scene", "message"),
    [
        (xr.DataArray(np.ones((13, 32, 32)), dims=("band", "y", "x")), "dimensions and ESA's names of bands"),
        (scene_of(numbered(2, 2)[:12], bands.NAMES[:12]), "lacking: B12"),
        (scene_of(numbered(2, 2), (*bands.NAMES[:12], "B11")), "13 channels need 13 different names"),
        (scene_of(numbered(2, 2), range(1, 14)), r"only count channels; say which: .*assign_coords"),
        (scene_of(numbered(2, 2)[:, :10]), "10 × 32 pixels, a tile takes 16"),
        (scene_of(numbered(2, 2) / 10_000, dn_per_reflectance=10_000), "in reflectance already"),
        (scene_of(numbered(2, 2) * np.nan), "no tile of the scene, of 4"),
        (scene_of(numbered(2, 2), dn_per_reflectance=1), "dn_per_reflectance=1, which is stated, is wrong"),
    ],
)
def test_what_is_no_scene_is_refused(scene: xr.DataArray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        spread_tiles(scene, 16, 8)
