"""The detector keeps its rate of false alarms, finds what is broken, and says what it can't judge."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom

from bandmask import bands, datasets
from bandmask.diagnosis.detection import measure
from bandmask.diagnosis.detector import Detector
from bandmask.diagnosis.elimination import Judge
from bandmask.diagnosis.faults import Fault, inject
from bandmask.packs import Pack


def reflectance(pack: Pack, rows: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(pack.images[rows].astype(np.float32) / 10_000)


@pytest.fixture(scope="module")
def detector(sample_pack: Pack) -> Detector:
    return Detector.fit(sample_pack)


@pytest.fixture(scope="module")
def images(sample_pack: Pack) -> torch.Tensor:
    return reflectance(sample_pack, sample_pack.rows("test")[::6])


@pytest.fixture(scope="module")
def scene() -> xr.DataArray:
    return datasets.read_sample()


def broken_scene(scene: xr.DataArray, *faults: Fault) -> xr.DataArray:
    broken = torch.from_numpy(scene.values[None] / 10_000)
    for fault in faults:
        broken = inject(broken, torch.zeros(1, dtype=torch.int64), fault)
    return scene.copy(data=broken[0].numpy() * 10_000)


# --- how sure


@given(st.lists(st.sampled_from([0.3, 0.5, 0.7, 0.9, 1.1, 1.6]), min_size=19, max_size=60), st.floats(0.05, 0.95))
def test_the_threshold_leaves_no_more_healthy_images_above_than_the_rate_allows(
    worst: list[float], rate: float
) -> None:
    detector = Detector(Judge(None, None), np.array(worst), rate, 64)  # type: ignore[arg-type]
    above = np.array(worst) > detector.threshold
    # of V + 1 exchangeable images, the new one is among the highest with at most this chance
    assert (above.sum() + 1) / (len(worst) + 1) <= rate + 1e-9
    called = np.array([s for s in (*worst, 2.0) if s > detector.threshold])
    assert (detector.chance(called) <= rate + 1e-9).all()
    assert (np.diff(detector.chance(np.sort(worst))) <= 0).all()
    assert detector.chance(np.array([-np.inf, np.inf])).tolist() == [1.0, 1 / (len(worst) + 1)]


def test_false_alarms_on_real_healthy_images_are_as_rare_as_stated(eurosat_pack: Pack) -> None:
    detector = Detector.fit(eurosat_pack, rate=0.1)
    called = detector.faulty(reflectance(eurosat_pack, eurosat_pack.rows("test"))).any(1)
    # validation images vary too, so the limit is that of a wider binomial
    assert called.sum() <= binom.ppf(0.999, len(called), 0.15)
    assert called.any()  # a detector that is never wrong on these was not set to this rate
    found = measure(
        detector,
        reflectance(eurosat_pack, eurosat_pack.rows("test")[::4]),
        torch.from_numpy(eurosat_pack.rows("test")[::4]),
        [Fault("noisy", ("B11",), 0.01), Fault("offset", ("B11",), 0.1), Fault("stuck", ("B03",), 0.1)],
    )
    assert found.groupby("kind")["found"].mean().min() > 0.9


def test_a_rate_that_the_images_cannot_hold_is_refused(sample_pack: Pack, detector: Detector) -> None:
    with pytest.raises(ValueError, match="72 healthy validation images can't hold a rate"):
        Detector.fit(sample_pack, rate=0.01)
    with pytest.raises(ValueError, match=r"choose one from 0\.0137 to 1"):
        detector.threshold_at(0)


# --- what is found


@pytest.mark.parametrize(
    "fault",
    [
        Fault("dead", ("B04",), 0.0),
        Fault("stuck", ("B8A",), 0.2),
        Fault("noisy", ("B03",), 0.01),
        Fault("striped", ("B02",), 0.01),
        Fault("dead columns", ("B11",), 0.2),
        Fault("gain", ("B08",), 1.5),
        Fault("offset", ("B05",), 0.05),
        Fault("swapped", ("B04", "B11")),
        Fault("noisy", ("B03", "B12"), 0.02),
    ],
    ids=lambda fault: fault.label,
)
def test_a_plain_fault_is_found(detector: Detector, images: torch.Tensor, fault: Fault) -> None:
    found = measure(detector, images, torch.arange(len(images)), [fault])
    assert found["detected"].mean() > 0.9
    assert found["found"].mean() > 0.7


def test_an_image_does_not_depend_on_its_batch(detector: Detector, images: torch.Tensor) -> None:
    broken = inject(images, torch.arange(len(images)), Fault("noisy", ("B03",), 0.01))
    mixed = torch.cat([images[:4], broken[:4]])
    together, alone = detector.scores(mixed), np.concatenate([detector.scores(one[None]) for one in mixed])
    assert together == pytest.approx(alone, rel=1e-6)
    assert np.array_equal(detector.faulty(mixed), together > detector.threshold)


def test_a_lost_band_is_no_faulty_one_and_others_are_still_judged(detector: Detector, images: torch.Tensor) -> None:
    lost = inject(images, torch.arange(len(images)), Fault("noisy", ("B03",), 0.02))
    lost[:, 7] = torch.nan
    scores, faulty = detector.examine(lost)
    assert np.isneginf(scores[:, 7]).all()
    assert faulty[:, 2].mean() > 0.9
    assert not faulty[:, 7].any()


# --- kept and loaded


def test_a_saved_detector_gives_the_same_answers(detector: Detector, images: torch.Tensor, tmp_path: Path) -> None:
    loaded = Detector.load(detector.save(tmp_path / "detector.npz"))
    assert np.array_equal(loaded.scores(images), detector.scores(images))
    assert loaded.threshold == detector.threshold
    assert (loaded.data, loaded.level, loaded.image_size) == (detector.data, "L1C", 64)
    assert [path.name for path in tmp_path.iterdir()] == ["detector.npz"]


def test_a_damaged_or_foreign_file_is_refused(detector: Detector, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="10_faulty_bands"):
        Detector.load(tmp_path / "none.npz")
    path = detector.save(tmp_path / "detector.npz")
    whole = path.read_bytes()
    for spoilt in (b"", whole[: len(whole) // 2], b"<html>", whole[:200] + bytes(50) + whole[250:]):
        path.write_bytes(spoilt)
        with pytest.raises(ValueError, match="is no whole detector"):
            Detector.load(path)
    np.savez(path, card=np.array(json.dumps({"format": 99, "bands": list(bands.NAMES)})))
    with pytest.raises(ValueError, match="format 99, this is 1"):
        Detector.load(path)


def test_a_failed_write_leaves_the_old_detector(
    detector: Detector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = detector.save(tmp_path / "detector.npz")
    before = path.read_bytes()
    (tmp_path / "full").symlink_to("/dev/full")

    def fail(file, **arrays) -> None:
        with open("/dev/full", "wb", buffering=0) as full:  # noqa: PTH123
            full.write(b"x")

    monkeypatch.setattr(np, "savez_compressed", fail)
    with pytest.raises(OSError, match="No space left"):
        detector.save(path)
    assert path.read_bytes() == before


def test_images_it_was_not_fitted_for_are_refused(detector: Detector, make_pack, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"fitted on images of 64 × 64 pixels, got \(32, 32\); cut tiles"):
        detector.scores(torch.zeros(2, 13, 32, 32))
    with pytest.raises(ValueError, match="50 training images or more"):
        Detector.fit(make_pack(tmp_path, n=24, size=16))


# --- a whole scene


def test_a_healthy_scene_is_trusted(detector: Detector, scene: xr.DataArray) -> None:
    table = detector.distrust(scene)
    assert tuple(table["band"]) == bands.NAMES
    assert not table["suspicious"].any()
    assert (table["false_alarm"] > detector.rate).all()
    assert (table["looks_like"] == "").all()
    assert table.attrs["note"] == ""
    assert table.attrs["tiles"] == 64


@pytest.mark.parametrize(
    ("fault", "word"),
    [
        (Fault("dead", ("B04",), 0.0001), "dead"),
        (Fault("stuck", ("B8A",), 0.2), "stuck"),
        (Fault("noisy", ("B03",), 0.01), "noisy"),
        (Fault("striped", ("B02",), 0.01), "striped"),
        (Fault("offset", ("B05",), 0.05), "offset or gain"),
        (Fault("swapped", ("B04", "B11")), "exchanged with B04"),
    ],
    ids=lambda value: value.label if isinstance(value, Fault) else "",
)
def test_the_broken_band_of_a_scene_is_named_and_described(
    detector: Detector, scene: xr.DataArray, fault: Fault, word: str
) -> None:
    table = detector.distrust(broken_scene(scene, fault), tiles=16).set_index("band")
    assert tuple(table.index[table["suspicious"]]) == fault.bands
    assert table.loc[fault.bands[-1], "looks_like"] == word
    assert (table["false_alarm"] <= detector.rate).tolist() == table["suspicious"].tolist()


def test_lost_pixels_and_lost_bands_are_lived_with_and_named(detector: Detector, scene: xr.DataArray) -> None:
    lost = broken_scene(scene, Fault("noisy", ("B03",), 0.01))
    lost.values[:, :200] = np.nan  # the swath ends
    lost.values[6, 300:400, 300:500] = np.nan
    lost.values[bands.NAMES.index("B10")] = np.nan
    table = detector.distrust(lost, tiles=32)
    assert table["band"][table["suspicious"]].tolist() == ["B03"]
    cirrus = table.set_index("band").loc["B10"]
    assert cirrus["looks_like"] == "absent"
    assert np.isnan(cirrus["score"])
    assert np.isnan(cirrus["false_alarm"])
    assert "B10: no values" in table.attrs["note"]


def test_another_processing_level_is_said_aloud(detector: Detector, scene: xr.DataArray) -> None:
    other = scene.assign_attrs(level="L2A")
    with pytest.warns(UserWarning, match="the scene is L2A, the detector was fitted on L1C"):
        table = detector.distrust(other, tiles=4)
    assert "not calibrated" in table.attrs["note"]


def test_bands_are_taken_by_name(detector: Detector, scene: xr.DataArray) -> None:
    turned = scene.isel(band=slice(None, None, -1))
    expected, table = detector.distrust(scene, tiles=4), detector.distrust(turned, tiles=4)
    assert table["score"].to_numpy() == pytest.approx(expected["score"].to_numpy())
