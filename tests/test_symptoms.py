"""Symptoms are those of scikit-learn's residuals, and each fault moves the one that was made for it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge

from bandmask import bands
from bandmask.diagnosis.faults import Fault, inject
from bandmask.diagnosis.sketches import Sketch
from bandmask.diagnosis.symptoms import SYMPTOMS, Normal, symptoms
from bandmask.moments import ALPHA, Moments
from bandmask.packs import Pack


def reflectance(pack: Pack, rows: np.ndarray) -> np.ndarray:
    return pack.images[rows].astype(np.float32) / 10_000


@pytest.fixture(scope="module")
def healthy(sample_pack: Pack) -> Sketch:
    return Sketch.of(reflectance(sample_pack, sample_pack.rows("train")))


@pytest.fixture(scope="module")
def moments(sample_pack: Pack) -> Moments:
    return Moments.of(sample_pack)


@pytest.fixture(scope="module")
def test_images(sample_pack: Pack) -> torch.Tensor:
    return torch.from_numpy(reflectance(sample_pack, sample_pack.rows("test")[::3]))


@pytest.mark.parametrize("distrusted", [(), (3, 10)])
def test_level_scatter_and_likeness_are_those_of_scikit_learns_prediction(
    sample_pack: Pack, distrusted: tuple[int, ...]
) -> None:
    images = reflectance(sample_pack, sample_pack.rows("train")[::40]).astype(np.float64)
    spectra = images.transpose(0, 2, 3, 1).reshape(-1, 13)
    found, _ = symptoms(Sketch.of(images), Moments.of_spectra(spectra), distrusted)
    inner = images[:, :, 1:-1, 1:-1]
    for channel in range(13):
        others = [c for c in range(13) if c != channel and c not in distrusted]
        model = Ridge(alpha=ALPHA).fit(spectra[:, others], spectra[:, channel])
        expected = model.predict(inner[:, others].transpose(0, 2, 3, 1).reshape(-1, len(others))).reshape(
            len(images), -1
        )
        own = inner[:, channel].reshape(len(images), -1)
        assert found[:, channel, 0] == pytest.approx((own - expected).mean(1), abs=1e-8)
        assert np.exp(found[:, channel, 1]) == pytest.approx((own - expected).std(1), rel=2e-3, abs=1e-6)
        if own.std(1).min() > 1e-3:
            likeness = [np.corrcoef(a, b)[0, 1] for a, b in zip(own, expected, strict=True)]
            assert found[:, channel, 6] == pytest.approx(likeness, abs=1e-3)


def test_healthy_images_are_normal(healthy: Sketch, moments: Moments) -> None:
    away = Normal.of(healthy, moments).deviations(healthy, moments)
    assert np.abs(np.median(away, axis=0)).max() < 0.1
    assert (np.abs(away) < 1).mean() > 0.98  # by the scale's definition, were they not fitted on


def test_an_image_is_judged_as_if_it_had_not_been_fitted_on(healthy: Sketch, moments: Moments) -> None:
    """The scale comes from leave-one-out residuals by formula; here they are made by leaving images out."""
    few = healthy.take(np.arange(0, 360, 4))
    normal = Normal.of(few, moments)
    left = []
    for row in range(len(few)):
        others = Normal.of(few.take(np.delete(np.arange(len(few)), row)), moments)
        found, features = symptoms(few.take(np.array([row])), moments)
        usual = np.einsum("ncf,cfs->ncs", (features - others.centre) / others.scale, others.slope)
        mean = symptoms(few.take(np.delete(np.arange(len(few)), row)), moments)[0].mean(0)
        left.append((found - mean - usual)[0])
    middle, (low, high) = np.median(left, 0), np.quantile(left, (0.005, 0.995), axis=0)
    assert np.median(np.abs(normal.above / (high - middle) - 1)) < 0.05
    assert np.median(np.abs(normal.below / (middle - low) - 1)) < 0.05


@pytest.mark.parametrize(
    ("fault", "symptom"),
    [
        (Fault("noisy", ("B03",), 0.005), "grain"),
        (Fault("striped", ("B03",), 0.005), "columns"),
        (Fault("offset", ("B03",), 0.02), "level"),
        (Fault("stuck", ("B03",), 0.1), "own scatter"),
        (Fault("gain", ("B03",), 1.3), "level"),
    ],
)
def test_a_fault_moves_the_symptom_made_for_it(
    healthy: Sketch, moments: Moments, test_images: torch.Tensor, fault: Fault, symptom: str
) -> None:
    normal = Normal.of(healthy, moments)
    samples = torch.arange(len(test_images))
    before = normal.deviations(Sketch.of(test_images), moments)[:, 2]
    after = normal.deviations(Sketch.of(inject(test_images, samples, fault)), moments)[:, 2]
    moved = np.abs(np.median(after - before, axis=0))
    assert moved[SYMPTOMS.index(symptom)] > 1


def test_a_shift_shows_in_the_gradients(healthy: Sketch, moments: Moments, test_images: torch.Tensor) -> None:
    normal, samples = Normal.of(healthy, moments), torch.arange(len(test_images))
    moved = inject(test_images, samples, Fault("shift", ("B03",), 1.0))
    before, after = (normal.deviations(Sketch.of(images), moments)[:, 2, 7:] for images in (test_images, moved))
    assert np.median(np.abs(after).max(1)) > 2 * np.median(np.abs(before).max(1))


def test_what_is_distrusted_is_not_looked_at(healthy: Sketch, moments: Moments, test_images: torch.Tensor) -> None:
    normal, samples = Normal.of(healthy, moments, (7,)), torch.arange(len(test_images))
    broken = inject(test_images, samples, Fault("noisy", ("B08",), 0.5))
    expected, scores = (normal.scores(Sketch.of(images), moments) for images in (test_images, broken))
    others = np.arange(13) != 7
    assert scores[:, others] == pytest.approx(expected[:, others], rel=1e-6)
    assert np.isneginf(scores[:, 7]).all()
    assert (normal.deviations(Sketch.of(broken), moments)[:, 7, 2] > 1).all()  # it can still be described


def test_a_band_without_any_variation_has_finite_symptoms(
    healthy: Sketch, moments: Moments, test_images: torch.Tensor
) -> None:
    flat = test_images.clone()
    flat[:, bands.NAMES.index("B10")] = 0
    flat[0] = 0
    assert np.isfinite(Normal.of(healthy, moments).deviations(Sketch.of(flat), moments)).all()
