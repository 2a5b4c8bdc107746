"""From a sketch, every linear combination of bands is judged as its own pixels would be."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.signal import convolve2d

from bandmask.diagnosis import sketches
from bandmask.diagnosis.faults import Fault, inject
from bandmask.diagnosis.sketches import Sketch
from bandmask.packs import Pack

IMMERKAER = np.array([[1, -2, 1], [-2, 4, -2], [1, -2, 1]]) / 6


@pytest.fixture(scope="module")
def real(sample_pack: Pack) -> np.ndarray:
    return sample_pack.images[sample_pack.rows("test")[::20]].astype(np.float32) / 10_000


def form(matrix: np.ndarray, row: np.ndarray) -> np.ndarray:
    return np.einsum("a,nab,b->n", row, matrix, row)


@given(seed=st.integers(0, 2**32 - 1))
def test_quadratic_forms_are_those_of_the_pixels(real: np.ndarray, seed: int) -> None:
    row = np.random.default_rng(seed).normal(size=13)
    combined = np.einsum("a,nahw->nhw", row, real.astype(np.float64))
    sketch, inner = Sketch.of(real), combined[:, 1:-1, 1:-1]
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


def test_noise_and_stripes_are_measured_apart() -> None:
    flat, samples = torch.full((16, 13, 64, 64), 0.2), torch.arange(16)
    noisy = Sketch.of(inject(flat, samples, Fault("noisy", ("B08",), 0.01)))
    striped = Sketch.of(inject(flat, samples, Fault("striped", ("B08",), 0.01)))
    assert np.sqrt(noisy.grain[:, 7, 7].mean()) == pytest.approx(0.01, rel=0.02)
    assert np.sqrt(striped.columns[:, 7, 7].mean()) == pytest.approx(0.01, rel=0.1)
    assert striped.grain[:, 7, 7].max() < 1e-12
    assert np.sqrt(noisy.columns[:, 7, 7].mean()) == pytest.approx(0.01 / 8, rel=0.1)  # averaged over 64 rows


def test_pixels_without_a_value_count_nowhere(real: np.ndarray) -> None:
    lost = real.copy()
    lost[:, 3, :, 40:] = np.nan  # one band is enough: the others can't be compared with it there
    sketch, cropped = Sketch.of(lost), Sketch.of(real[..., :40])
    for name in ("mean", "spread", "grain", "columns"):
        assert getattr(sketch, name) == pytest.approx(getattr(cropped, name), abs=1e-12)
    assert not sketch.absent.any()


def test_a_band_that_is_mostly_lost_is_absent_and_spoils_no_other(real: np.ndarray) -> None:
    lost = real.copy()
    lost[:, 10] = np.nan
    lost[:, 10, :3] = 9.0
    sketch, complete = Sketch.of(lost), Sketch.of(real)
    there = np.arange(13) != 10
    assert (sketch.absent == ~there).all()
    assert np.array_equal(sketch.mean[:, there], complete.mean[:, there])
    assert np.array_equal(sketch.grain[:, there][:, :, there], complete.grain[:, there][:, :, there])
    assert not sketch.mean[:, 10].any()


def test_an_image_does_not_depend_on_its_batch(real: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Sketch.of(real)
    assert len(whole) == len(real)
    monkeypatch.setattr(sketches, "CHUNK", 3)
    for parts in (Sketch.of(real), Sketch.join(Sketch.of(image[None]) for image in real)):
        for name in ("mean", "spread", "grain", "columns"):
            assert getattr(parts, name) == pytest.approx(getattr(whole, name), abs=1e-13)
    assert np.array_equal(whole.take(np.array([2, 0])).grain, whole.grain[[2, 0]])


def test_exchanging_channels_of_a_sketch_exchanges_those_of_its_images(real: np.ndarray) -> None:
    order = np.arange(13)
    order[[2, 9]] = 9, 2
    ours, theirs = Sketch.of(real).exchanged(2, 9), Sketch.of(real[:, order])
    for name in ("mean", "spread", "grain", "columns", "absent"):
        assert getattr(ours, name) == pytest.approx(getattr(theirs, name), abs=1e-13)


def test_what_cannot_be_judged_is_refused(real: np.ndarray) -> None:
    for images in (real[0], real[:, :12], real[..., :7]):
        with pytest.raises(ValueError, match=r"takes images \(N, 13, H, W\) of 8 pixels or more"):
            Sketch.of(images)
    scattered = real.copy()
    scattered[1, 5, ::2] = np.nan  # half of the pixels, and none with all its neighbours
    with pytest.raises(ValueError, match="image 1 has 0 pixels with a value in every band"):
        Sketch.of(scattered)
    assert sketches.complete(scattered).tolist() == [True, False] + [True] * (len(real) - 2)
