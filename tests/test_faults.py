"""Injected faults are of the stated size, in the stated bands, and depend on (sample, band, pixel) alone."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bandmask import bands
from bandmask.faults import KINDS, Fault, inject

B02, B03, B08 = bands.channel_indices(["B02", "B03", "B08"])
AMOUNTS = {"dead": 0.0, "stuck": 0.1, "noisy": 0.01, "striped": 0.01, "dead columns": 0.5, "gain": 1.1, "offset": 0.02}
AMOUNTS |= {"shift": 0.5, "detector": 0.01, "lost packets": 0.5, "swapped": None}


def some_images(count: int = 6, size: int = 24, seed: int = 0) -> torch.Tensor:
    """Smooth waves, generated."""
    draw = np.random.default_rng(seed)
    y, x = np.mgrid[:size, :size] / size
    phase = draw.uniform(0, 6, (count, 13, 1, 1))
    return torch.tensor(0.2 + 0.1 * np.sin(5 * x + 3 * y + phase), dtype=torch.float32)


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_faulty_bands_change_and_the_batch_itself_does_not(kind: str) -> None:
    images = some_images()
    before = images.clone()
    faulty = inject(images, torch.arange(6), Fault(kind, ("B02", "B08"), AMOUNTS[kind]))
    others = [c for c in range(13) if c not in (B02, B08)]
    assert torch.equal(images, before)
    assert torch.equal(faulty[:, others], images[:, others])
    for channel in (B02, B08):
        assert ((faulty[:, channel] != images[:, channel]).flatten(1).any(1)).all()


@given(kind=st.sampled_from(list(KINDS)), rows=st.lists(st.integers(0, 5), min_size=1, unique=True))
def test_a_fault_does_not_depend_on_the_batch(kind: str, rows: list[int]) -> None:
    images, samples = some_images(), torch.tensor([3, 1, 4, 15, 9, 2**40])
    fault = Fault(kind, ("B02", "B08"), AMOUNTS[kind])
    together = inject(images, samples, fault)
    assert torch.allclose(inject(images[rows], samples[rows], fault), together[rows], atol=1e-6)
    assert together.dtype == images.dtype
    assert inject(images.double(), samples, fault).dtype == torch.float64


@pytest.mark.parametrize("kind", ["noisy", "striped", "dead columns", "shift"])
def test_samples_and_bands_have_draws_of_their_own(kind: str) -> None:
    images = some_images(1).expand(3, -1, -1, -1).clone()
    images[:, B08] = images[:, B02]
    change = inject(images, torch.tensor([1, 2, 1]), Fault(kind, ("B02", "B08"), AMOUNTS[kind])) - images
    assert torch.equal(change[0], change[2])
    assert not torch.equal(change[0], change[1])
    if kind != "shift":  # bands of one detector move together
        assert not torch.equal(change[0, B02], change[0, B08])


def test_noise_is_gaussian_with_the_stated_sd() -> None:
    images = some_images(8, 64)
    noise = (inject(images, torch.arange(8), Fault("noisy", ("B03",), 0.01)) - images)[:, B03].double().flatten()
    assert abs(noise.mean()) < 5 * 0.01 / len(noise) ** 0.5
    assert noise.std().item() == pytest.approx(0.01, rel=0.02)
    inside = [((noise.abs() < 0.01 * k).double().mean()).item() for k in (1, 2, 3)]
    assert inside == pytest.approx([0.6827, 0.9545, 0.9973], abs=0.01)
    assert np.corrcoef(noise[:-1], noise[1:])[0, 1] == pytest.approx(0, abs=0.03)


def test_stripes_are_one_offset_a_column_with_the_stated_sd() -> None:
    images = some_images(20, 64)
    change = (inject(images, torch.arange(20), Fault("striped", ("B03",), 0.02)) - images)[:, B03]
    assert torch.allclose(change, change[:, :1].expand_as(change), atol=1e-6)
    assert change[:, 0].std().item() == pytest.approx(0.02, rel=0.1)


def test_dead_columns_are_whole_and_a_larger_share_holds_the_smaller() -> None:
    images = some_images(20, 64)
    few, many = (
        inject(images, torch.arange(20), Fault("dead columns", ("B03",), share))[:, B03] == 0 for share in (0.1, 0.3)
    )
    for dead, share in ((few, 0.1), (many, 0.3)):
        assert torch.equal(dead.any(1), dead.all(1))
        assert dead.float().mean().item() == pytest.approx(share, abs=0.03)
    assert (many | ~few).all()


def test_gain_offset_level_and_exchange_are_exact() -> None:
    images, samples = some_images(), torch.arange(6)
    assert torch.equal(inject(images, samples, Fault("gain", ("B03",), 1.1))[:, B03], images[:, B03] * 1.1)
    assert torch.equal(inject(images, samples, Fault("offset", ("B03",), 0.02))[:, B03], images[:, B03] + 0.02)
    assert (inject(images, samples, Fault("stuck", ("B03",), 0.1))[:, B03] == torch.tensor(0.1)).all()
    swapped = inject(images, samples, Fault("swapped", ("B08", "B02")))
    assert torch.equal(swapped[:, [B02, B08]], images[:, [B08, B02]])


@pytest.mark.parametrize("pixels", [0.25, 0.5, 1.0, 3.0])
def test_a_shift_moves_a_known_wave_by_the_stated_distance(pixels: float) -> None:
    size = 64
    y, x = np.mgrid[:size, :size]
    waves = torch.tensor(np.stack([np.sin(0.3 * x + 0.2 * y), np.cos(0.3 * x + 0.2 * y)]), dtype=torch.float64)
    images = torch.zeros(5, 13, size, size, dtype=torch.float64)
    images[:, [B02, B03]] = waves
    moved = inject(images, torch.arange(5), Fault("shift", ("B02", "B03"), pixels))[:, [B02, B03], 8:-8, 8:-8]
    # sin and cos of one phase: the phase that is left tells how far along (0.3, 0.2) each image has moved
    phase = torch.atan2(moved[:, 0], moved[:, 1]) - torch.atan2(waves[0], waves[1])[8:-8, 8:-8]
    along = (-torch.atan2(phase.sin(), phase.cos())).flatten(1)
    assert (along.std(1) < 0.01).all()
    most = pixels * np.hypot(0.3, 0.2)
    assert (along.mean(1).abs() <= 1.3 * most).all()  # cubic interpolation of a wave of 17 pixels is off by up to that
    assert along.mean(1).abs().max() > 0.5 * most  # directions differ, so some go along it


def test_faults_of_a_detector_have_edges_and_coarse_bands_coarse_pixels() -> None:
    images, samples = some_images(40, 48), torch.arange(40)
    step = (inject(images, samples, Fault("detector", ("B03",), 0.01)) - images)[:, B03]
    assert torch.allclose(step, step[:, :1].expand_as(step), atol=1e-6)
    assert ((step[:, 0].diff(dim=1).abs() > 1e-3).sum(1) == 1).all()  # one edge an image
    lost = (inject(images, samples, Fault("lost packets", ("B03",), 0.5)) != images)[:, B03]
    assert 0.1 < lost.double().mean() < 0.4
    assert torch.equal(lost[:, ::4], lost[:, 3::4])  # whole packets
    noise = (inject(images, samples, Fault("noisy", ("B11", "B09"), 0.01)) - images)[:, bands.channel_indices(["B09"])]
    assert torch.allclose(noise[..., ::6, ::6], noise[..., 5::6, 5::6], atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "names", "amount", "message"),
    [
        ("broken", ("B02",), 1.0, "unknown fault 'broken'; available: dead, stuck"),
        ("noisy", (), 1.0, "no fault"),
        ("noisy", ("B99",), 1.0, "unknown band 'B99'"),
        ("noisy", ("B02",), None, "SD in reflectance; got .*None"),
        ("noisy", ("B02",), float("nan"), "nan"),
        ("noisy", ("B02",), -0.1, "-0.1"),
        ("dead columns", ("B02",), 1.5, "0 to 1; got .*1.5"),
        ("swapped", ("B02",), None, "two bands exchanged"),
        ("swapped", ("B02", "B03"), 1.0, "no amount"),
    ],
)
def test_what_is_no_fault_is_refused(kind: str, names: tuple[str, ...], amount: float | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Fault(kind, names, amount)


def test_images_of_another_shape_are_refused() -> None:
    fault = Fault("offset", ("B02",), 0.1)
    for images, samples in ((some_images()[:, :12], 6), (some_images()[0], 6), (some_images(), 5)):
        with pytest.raises(ValueError, match="a sample each"):
            inject(images, torch.arange(samples), fault)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine: faults on CUDA untested")
@pytest.mark.parametrize("kind", KINDS)
def test_a_fault_is_the_same_on_cuda(kind: str) -> None:
    images, fault = some_images(), Fault(kind, ("B02", "B08"), AMOUNTS[kind])
    there = inject(images.cuda(), torch.arange(6), fault).cpu()
    assert torch.allclose(there, inject(images, torch.arange(6), fault), atol=1e-5)
