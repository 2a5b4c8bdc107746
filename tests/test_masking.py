"""Masks: what is hidden depends on nothing but (seed, epoch, sample, band, pixel), and hidden values never get out."""

from __future__ import annotations

import hashlib
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from bandmask import bands
from bandmask.imputation import RidgeFill
from bandmask.masking import FITTED, VALUES, MaskSpec, fill_values, hidden_pixels, hide, mask_batch, parse_value

MEANS = torch.linspace(0.1, 0.4, 13)
SIZE = (16, 16)

some_bands = st.sets(st.sampled_from(bands.NAMES), min_size=1, max_size=12).map(bands.parse_bands)
ratios = st.floats(0.1, 0.9)  # of 256 pixels: two independent draws are equal with probability < 1e-22
seeds = st.integers(-(2**63), 2**63 - 1)
epochs = st.integers(-1, 1000)
samples_ = st.lists(st.integers(0, 2**40), min_size=1, max_size=6, unique=True)


def draw(spec: MaskSpec, samples: list[int] | range, size: tuple[int, int] = SIZE, epoch: int = -1) -> Tensor:
    return hidden_pixels(spec, torch.tensor(list(samples)), size, epoch=epoch)


def bits(images: Tensor) -> Tensor:
    """To compare bit for bit, NaN and −0 included."""
    return images.contiguous().view(torch.int32)


def generated(count: int = 3, size: tuple[int, int] = SIZE, seed: int = 0) -> Tensor:
    return torch.rand(count, 13, *size, generator=torch.Generator().manual_seed(seed))


def spread(hidden: Tensor, spec: MaskSpec) -> Tensor:
    """(B, k, H, W) to (B, 13, H, W)."""
    everywhere = torch.zeros(len(hidden), 13, *hidden.shape[2:], dtype=torch.bool)
    everywhere[:, spec.channels] = hidden
    return everywhere


def ridge(hidden: tuple[str, ...], seed: int = 0) -> RidgeFill:
    generator = torch.Generator().manual_seed(seed)
    k = len(hidden)
    return RidgeFill(hidden, torch.randn(k, 13 - k, generator=generator), torch.randn(k, generator=generator))


# --- which pixels


def test_true_is_hidden() -> None:
    spec = MaskSpec(("B02", "B08"), ratio=0.9, value=-1)
    hidden = draw(spec, range(3))
    assert hidden.dtype == torch.bool
    assert hidden.shape == (3, 2, *SIZE)
    assert 0.8 < hidden.float().mean() < 1
    masked = hide(generated(), hidden, spec, fill_values(-1, MEANS))
    assert torch.equal(masked[:, [1, 7]] == -1, hidden)


@given(some_bands, ratios, seeds, epochs, samples_, st.data())
def test_a_mask_does_not_depend_on_batch_size_or_order(
    names: tuple[str, ...], ratio: float, seed: int, epoch: int, samples: list[int], data: st.DataObject
) -> None:
    spec = MaskSpec(names, ratio=ratio, seed=seed)
    together = draw(spec, samples, epoch=epoch)
    order = data.draw(st.permutations(range(len(samples))))
    assert torch.equal(draw(spec, [samples[i] for i in order], epoch=epoch), together[list(order)])
    for index, sample in enumerate(samples):
        assert torch.equal(draw(spec, [sample], epoch=epoch)[0], together[index])


@given(some_bands, ratios, seeds, epochs, st.data())
def test_a_bands_mask_does_not_depend_on_the_other_bands(
    names: tuple[str, ...], ratio: float, seed: int, epoch: int, data: st.DataObject
) -> None:
    together = draw(MaskSpec(names, ratio=ratio, seed=seed), [5, 7], epoch=epoch)
    alone = data.draw(st.sampled_from(names))
    assert torch.equal(
        draw(MaskSpec((alone,), ratio=ratio, seed=seed), [5, 7], epoch=epoch)[:, 0], together[:, names.index(alone)]
    )


@given(ratios, seeds, seeds, epochs, epochs, st.integers(0, 2**40), st.integers(0, 2**40), st.data())
def test_another_seed_epoch_sample_or_band_is_another_mask(
    ratio: float, seed: int, seed2: int, epoch: int, epoch2: int, sample: int, sample2: int, data: st.DataObject
) -> None:
    first, second = data.draw(st.permutations(bands.NAMES))[:2]

    def mask(seed: int = seed, epoch: int = epoch, sample: int = sample, band: str = first) -> Tensor:
        return draw(MaskSpec((band,), ratio=ratio, seed=seed), [sample], epoch=epoch)

    assert torch.equal(mask(), mask())
    assert not torch.equal(mask(), mask(band=second))
    if seed != seed2:
        assert not torch.equal(mask(), mask(seed=seed2))
    if epoch != epoch2:
        assert not torch.equal(mask(), mask(epoch=epoch2))
    if sample != sample2:
        assert not torch.equal(mask(), mask(sample=sample2))


@given(some_bands, st.floats(0.005, 0.995), seeds, epochs)
def test_the_share_of_hidden_pixels_is_the_ratio(names: tuple[str, ...], ratio: float, seed: int, epoch: int) -> None:
    hidden = draw(MaskSpec(names, ratio=ratio, seed=seed), range(4), (64, 64), epoch)
    sd = math.sqrt(ratio * (1 - ratio) / hidden[:, 0].numel())
    assert ((hidden.double().mean((0, 2, 3)) - ratio).abs() < 6 * sd).all()


@given(some_bands, st.floats(0, 1), st.floats(0, 1), seeds)
def test_a_higher_ratio_hides_the_same_pixels_and_more(
    names: tuple[str, ...], first: float, second: float, seed: int
) -> None:
    low, high = sorted((first, second))
    less, more = (draw(MaskSpec(names, ratio=ratio, seed=seed), range(2)) for ratio in (low, high))
    assert (less <= more).all()


@pytest.mark.parametrize(
    ("ratio", "share"), [(0, 0), (0.0, 0), (1e-12, 0), (1, 1), (1.0, 1), (1 - 1e-12, 1), (math.nextafter(1, 0), 1)]
)
def test_ratios_0_and_1_are_exact_and_so_is_what_rounds_to_them(ratio: float, share: float) -> None:
    assert draw(MaskSpec(("B02", "B12"), ratio=ratio), range(4), (64, 64)).float().mean() == share


def test_no_band_hides_nothing() -> None:
    images = generated()
    spec = MaskSpec()
    hidden = draw(spec, range(3))
    assert hidden.shape == (3, 0, *SIZE)
    for fill in (fill_values("dataset_mean", MEANS), lambda batch, hidden: batch[:, :0]):
        masked = hide(images, hidden, spec, fill)
        assert torch.equal(masked, images)
        assert masked.data_ptr() != images.data_ptr(), "a copy, as with any other mask"


def test_an_empty_batch_gives_an_empty_mask() -> None:
    assert hidden_pixels(MaskSpec(("B02",)), torch.zeros(0, dtype=torch.int64), SIZE).shape == (0, 1, *SIZE)


def test_hiding_every_band_must_be_asked_for() -> None:
    with pytest.raises(ValueError, match=r"all 13 bands.*allow_all_bands=True"):
        MaskSpec(bands.NAMES)
    spec = MaskSpec(bands.NAMES, ratio=1.0, value=0, allow_all_bands=True)
    assert not mask_batch(generated(), torch.arange(3), spec, fill_values(0, MEANS)).any()
    assert len(MaskSpec(bands.NAMES[:12]).bands) == 12


# --- the generator behind it

GOLDEN = "b643bb3b8a098f6da8ee5a104ad127f53943b0f6180c63a03a5b96484e045ec8"


def by_the_book(seed: int, epoch: int, sample: int, channel: int, pixels: int, ratio: float) -> np.ndarray:
    """The hash in plain Python integers: SplitMix64's finaliser for the key, lowbias32 with a salt for the pixel."""

    def mix64(x: int) -> int:
        x = (x + 0x9E3779B97F4A7C15) % 2**64
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
        return x ^ (x >> 31)

    key = mix64(seed % 2**64)
    for part in (epoch, sample, channel):
        key = mix64(key ^ (part % 2**64))
    hidden = []
    for pixel in range(pixels):
        x = pixel ^ (key % 2**32)
        x = (x ^ (x >> 16)) * 0x7FEB352D % 2**32
        x = (x ^ (x >> 15) ^ (key >> 32)) * 0x846CA68B % 2**32
        x ^= x >> 16
        signed = x - 2**32 if x >= 2**31 else x
        hidden.append(signed < round(ratio * 2**32) - 2**31)
    return np.array(hidden)


@pytest.mark.parametrize("seed", [0, 1, -1, 12345678901234567890, 2**63])
@pytest.mark.parametrize(("epoch", "sample"), [(-1, 0), (0, 1), (14, 26_999), (3, 2**40)])
def test_masks_are_the_hash_computed_by_plain_integers(seed: int, epoch: int, sample: int) -> None:
    hidden = draw(MaskSpec(("B02", "B8A"), ratio=0.7, seed=seed), [sample], (9, 11), epoch)
    for index, channel in enumerate((1, 8)):
        expected = by_the_book(seed, epoch, sample, channel, 99, 0.7)
        assert np.array_equal(hidden[0, index].flatten().numpy(), expected)


def test_masks_stay_the_same_between_releases_and_torch_versions() -> None:
    """If this fails, results of earlier runs can't be repeated: change the hash only with a new major version."""
    spec = MaskSpec(("B02", "B8A", "B12"), ratio=0.9, seed=42)
    hidden = draw(spec, range(100, 108), (64, 64), epoch=3)
    assert hashlib.sha256(np.packbits(hidden.numpy()).tobytes()).hexdigest() == GOLDEN


def test_neighbouring_samples_epochs_seeds_and_bands_share_no_copy_of_a_mask() -> None:
    """Correlation of masks with integer neighbours as keys, at every shift and at every XOR of the pixel number.

    Both are how a weak hash betrays itself. 65,536 correlations of 65,536 pixels each: their maximum is near
    4.5/256 if masks are independent; 7/256 has a chance of 1e-7.
    """

    def signs(seed: int = 0, epoch: int = 0, sample: int = 0, band: str = "B02") -> np.ndarray:
        hidden = draw(MaskSpec((band,), ratio=0.5, seed=seed), [sample], (256, 256), epoch)[0, 0]
        return hidden.numpy() * 2.0 - 1

    def walsh(x: np.ndarray) -> np.ndarray:
        x = x.reshape((2,) * 16)
        for axis in range(16):
            first, second = np.take(x, 0, axis), np.take(x, 1, axis)
            x = np.stack([first + second, first - second], axis)
        return x.ravel()

    base = signs()
    others = [signs(sample=s) for s in (1, 2, 3, 256)] + [signs(epoch=1), signs(seed=1), signs(band="B03")]
    for other in (base, *others):
        by_shift = np.fft.ifft2(np.fft.fft2(base) * np.conj(np.fft.fft2(other))).real.ravel() / 65_536
        by_xor = walsh(walsh(base) * walsh(other)) / 65_536 / 65_536
        if other is base:
            assert by_shift[0] == pytest.approx(1)
            assert by_xor[0] == pytest.approx(1)
            by_shift, by_xor = by_shift[1:], by_xor[1:]
        assert np.abs(by_shift).max() < 7 / 256
        assert np.abs(by_xor).max() < 7 / 256


def test_counts_over_imagesspread_as_binomial_draws_do() -> None:
    """Neither too even (a low-discrepancy pattern) nor too uneven (images that share a draw)."""
    hidden = draw(MaskSpec(("B02", "B03"), ratio=0.9), range(8000), SIZE).double()
    variance = 0.9 * 0.1
    per_image, per_pixel = hidden.sum((2, 3)), hidden.sum(0)
    assert per_image.var(0) / (256 * variance) == pytest.approx([1, 1], abs=6 * math.sqrt(2 / 8000))
    assert per_pixel.flatten().var() / (8000 * variance) == pytest.approx(1, abs=6 * math.sqrt(2 / 512))
    pair = torch.corrcoef(per_image.T)[0, 1]
    assert abs(pair) < 6 / math.sqrt(8000)


# --- schedules


def test_constant_is_the_ratio_in_every_epoch() -> None:
    spec = MaskSpec(("B02",), ratio=0.9)
    assert {spec.ratio_at(epoch, 15) for epoch in range(-1, 15)} == {0.9}


def test_gradual_rises_each_epoch() -> None:
    spec = MaskSpec(("B02",), ratio=0.8, schedule="gradual", start_ratio=0.2)
    assert [round(spec.ratio_at(epoch, 4), 6) for epoch in range(4)] == [0.2, 0.4, 0.6, 0.8]


def test_staircase_rises_in_stairs_of_equal_length() -> None:
    spec = MaskSpec(("B02",), ratio=0.8, schedule="staircase", start_ratio=0.2, stairs=4)
    ratios_ = [round(spec.ratio_at(epoch, 12), 6) for epoch in range(12)]
    assert ratios_ == [0.2] * 3 + [0.4] * 3 + [0.6] * 3 + [0.8] * 3


@given(
    st.sampled_from(["gradual", "staircase"]),
    st.floats(0, 1),
    st.floats(0, 1),
    st.integers(1, 60),
    st.integers(1, 12),
)
def test_schedules_begin_and_end_exactly_where_they_say_and_never_turn(
    schedule: str, start: float, end: float, length: int, stairs: int
) -> None:
    spec = MaskSpec(("B02",), ratio=end, schedule=schedule, start_ratio=start, stairs=stairs)
    path = [spec.ratio_at(epoch, length) for epoch in range(length)]
    levels = length if schedule == "gradual" else min(stairs, length)
    assert path[-1] == end
    assert path[0] == (start if levels > 1 else end)
    assert path == sorted(path, reverse=end < start)
    assert len(set(path)) <= levels
    assert spec.ratio_at(-1, length) == end, "validation uses the final ratio"
    assert all(0 <= ratio <= 1 for ratio in path)


def test_a_schedule_reaches_the_masks() -> None:
    spec = MaskSpec(("B02",), ratio=0.8, schedule="gradual", start_ratio=0.2)
    shares = [
        hidden_pixels(spec, torch.arange(4), (64, 64), epoch=epoch, epochs=4).float().mean().item()
        for epoch in (0, 1, 2, 3, -1)
    ]
    assert shares == pytest.approx([0.2, 0.4, 0.6, 0.8, 0.8], abs=0.02)


def test_validation_masks_are_the_same_whatever_the_length_of_the_run() -> None:
    spec = MaskSpec(("B02",), schedule="gradual")
    first, second = (hidden_pixels(spec, torch.arange(2), SIZE, epochs=epochs) for epochs in (1, 25))
    assert torch.equal(first, second)


# --- what stands there instead


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (-1, torch.full((13,), -1.0)),
        (0, torch.zeros(13)),
        (0.25, torch.full((13,), 0.25)),
        ("dataset_mean", torch.full((13,), 0.25)),
        ("band_mean", MEANS),
    ],
)
def test_hidden_pixels_hold_the_value_asked_for(value: str | float, expected: Tensor) -> None:
    fill = fill_values(value, MEANS.double())
    assert fill.dtype == torch.float32
    assert torch.allclose(fill, expected)
    spec = MaskSpec(("B03", "B8A", "B12"), value=value)
    hidden = draw(spec, range(3))
    masked = hide(generated(), hidden, spec, fill)
    for index, channel in enumerate(spec.channels):
        assert torch.equal(masked[:, channel][hidden[:, index]].unique(), fill[channel : channel + 1])


@given(some_bands, st.floats(0, 1), seeds, st.sampled_from([math.nan, math.inf, -math.inf, 1e30, 7.0]), st.booleans())
def test_original_values_of_hidden_pixels_never_reach_the_output(
    names: tuple[str, ...], ratio: float, seed: int, other: float, impute: bool
) -> None:
    """The claim everything rests on: change what is hidden as you like, and the incomplete image is the same."""
    spec = MaskSpec(names, ratio=ratio, seed=seed)
    fill = ridge(names) if impute else fill_values("band_mean", MEANS)
    images = generated(2)
    hidden = draw(spec, range(2))
    changed = images.clone()
    changed[:, spec.channels] = changed[:, spec.channels].masked_fill(hidden, other)
    assert torch.equal(changed != images, spread(hidden, spec))  # the change is one, and only in hidden pixels
    assert torch.equal(bits(hide(images, hidden, spec, fill)), bits(hide(changed, hidden, spec, fill)))


@given(some_bands, st.floats(0, 1), seeds, st.booleans())
def test_visible_pixels_are_kept_bit_for_bit(names: tuple[str, ...], ratio: float, seed: int, impute: bool) -> None:
    spec = MaskSpec(names, ratio=ratio, seed=seed)
    images = generated(2)
    images[0, :, 0, 0], images[1, :, 1, 1], images[1, :, 2, 2] = math.nan, -0.0, math.inf
    before = images.clone()
    hidden = draw(spec, range(2))
    masked = hide(images, hidden, spec, ridge(names) if impute else fill_values(-1, MEANS))
    visible = ~spread(hidden, spec)
    assert torch.equal(bits(masked)[visible], bits(images)[visible])
    assert torch.equal(bits(images), bits(before)), "the input was modified"


@pytest.mark.parametrize("impute", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_memory_format_and_dtype_are_kept(impute: bool, dtype: torch.dtype) -> None:
    spec = MaskSpec(("B02", "B11"))
    hidden = draw(spec, range(3))
    fill = ridge(spec.bands) if impute else fill_values("band_mean", MEANS)
    plain = generated().to(dtype)
    last = plain.to(memory_format=torch.channels_last)
    masked = hide(last, hidden, spec, fill)
    assert masked.dtype == dtype
    assert masked.is_contiguous(memory_format=torch.channels_last)
    assert not masked.is_contiguous()
    reference = hide(plain, hidden, spec, fill)
    assert reference.is_contiguous()
    assert torch.allclose(masked.double(), reference.double(), rtol=1e-2 if impute else 0, atol=1e-6)


def test_a_slice_of_a_larger_tensor_is_masked_and_the_larger_one_kept() -> None:
    large = generated(6, (32, 32))
    before = large.clone()
    spec = MaskSpec(("B02",), value=-1)
    masked = hide(large[1::2, :, 4:20, 8:24], draw(spec, range(3)), spec, fill_values(-1, MEANS))
    assert (masked[:, 1] == -1).float().mean() > 0.8
    assert torch.equal(large, before)


def test_a_function_that_fills_is_given_zeros_in_hidden_pixels() -> None:
    spec = MaskSpec(("B02", "B08"))
    images, hidden = generated() + 1, draw(spec, range(3))
    seen: list[Tensor] = []

    def fill(batch: Tensor, where: Tensor) -> Tensor:
        seen.append(batch.clone())
        assert torch.equal(where, hidden)
        return torch.full(where.shape, 5.0)

    masked = hide(images, hidden, spec, fill)
    assert torch.equal(seen[0][:, spec.channels] == 0, hidden)
    assert torch.equal(masked[:, spec.channels] == 5, hidden)


def test_a_fill_or_a_mask_for_another_number_of_bands_is_refused() -> None:
    """Broadcasting would write one band's imputation over two bands without a word."""
    spec = MaskSpec(("B02", "B08"))
    images, hidden = generated(), draw(spec, range(3))
    with pytest.raises(ValueError, match=r"shape|bands"):
        hide(images, hidden, spec, ridge(("B02",)))
    with pytest.raises(ValueError, match=r"shape|bands"):
        hide(images, hidden[:, :1], spec, fill_values(0, MEANS))
    with pytest.raises(ValueError, match=r"shape|bands"):
        hide(images, draw(MaskSpec(("B02", "B08", "B11")), range(3)), spec, fill_values(0, MEANS))


def test_mask_batch_is_draw_then_hide() -> None:
    spec = MaskSpec(("B02", "B11"), schedule="gradual", seed=3)
    images, samples, fill = generated(), torch.tensor([9, 4, 26_000]), fill_values("band_mean", MEANS)
    hidden = hidden_pixels(spec, samples, SIZE, epoch=2, epochs=5)
    both = mask_batch(images, samples, spec, fill, epoch=2, epochs=5)
    assert torch.equal(both, hide(images, hidden, spec, fill))


# --- what can't be asked for


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"bands": "B02 B99"}, "unknown band 'B99'"),
        ({"ratio": 1.2}, "ratio is the share.*got 1.2"),
        ({"ratio": -0.1}, "ratio is the share"),
        ({"ratio": math.nan}, "ratio is the share"),
        ({"ratio": True}, "ratio is the share"),
        ({"ratio": "0.9"}, "ratio is the share"),
        ({"start_ratio": 2}, "start_ratio is the share"),
        ({"schedule": "linear"}, "unknown schedule 'linear'; available: constant, gradual, staircase"),
        ({"value": "mean"}, "unknown mask value 'mean'; available: dataset_mean, band_mean, nearest, .*, or a number"),
        ({"value": math.nan}, "finite reflectance"),
        ({"value": math.inf}, "finite reflectance"),
        ({"value": False}, "finite reflectance"),
        ({"value": None}, "finite reflectance"),
        ({"stairs": 0}, "stairs counts the levels"),
    ],
)
def test_impossible_masks_are_errors_that_say_what_is_possible(wrong: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MaskSpec(**{"bands": ("B02",), **wrong})


def test_bands_are_put_in_satclip_order_whatever_order_they_come_in() -> None:
    spec = MaskSpec(("nir", "B12", "b2"))
    assert spec.bands == ("B02", "B08", "B12")
    assert spec.channels == [1, 7, 12]
    assert spec == MaskSpec("B12 B8 B2")


# --- the same everywhere


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine: CUDA masks are not compared")
@pytest.mark.parametrize("epoch", [-1, 0, 7])
def test_masks_and_masked_batches_are_the_same_on_cuda(epoch: int) -> None:
    spec = MaskSpec(("B02", "B8A", "B12"), ratio=0.9, seed=42)
    samples = torch.tensor([0, 1, 26_999, 2**40])
    on_cpu = hidden_pixels(spec, samples, (256, 256), epoch=epoch)
    on_gpu = hidden_pixels(spec, samples.cuda(), (256, 256), epoch=epoch)
    assert on_gpu.is_cuda
    assert torch.equal(on_gpu.cpu(), on_cpu)
    images, fill = generated(4, (256, 256)), fill_values("band_mean", MEANS)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        masked = hide(images.cuda().to(memory_format=memory_format), on_gpu, spec, fill.cuda())
        assert masked.is_contiguous(memory_format=memory_format)
        assert torch.equal(masked.cpu(), hide(images, on_cpu, spec, fill))


@pytest.mark.parametrize(("text", "value"), [("-1", -1.0), ("0", 0.0), ("0.1431", 0.1431), *((v, v) for v in VALUES)])
def test_a_mask_value_as_text_is_what_the_spec_takes(text: str, value: str | float):
    assert parse_value(text) == value
    assert MaskSpec(("B08",), value=parse_value(text)).value == value


@pytest.mark.parametrize("value", FITTED)
def test_a_value_that_depends_on_the_image_is_no_constant(value: str):
    with pytest.raises(ValueError, match=f"{value}.*fills.make_fill.*dataset_mean, band_mean, or a number"):
        fill_values(value, MEANS)


def test_an_unknown_mask_value_names_the_known_ones():
    with pytest.raises(
        ValueError, match=r"'mean'; available: dataset_mean, band_mean, nearest, local, .*ridge_local, or a number"
    ):
        parse_value("mean")
