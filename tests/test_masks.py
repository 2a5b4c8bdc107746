"""Masks: what is hidden depends on nothing but (seed, epoch, sample, band, pixel), and hidden values never get out."""

import hashlib
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare
from torch import Tensor

from bandmask import bands, masks
from bandmask.masks import SHAPES, AnyMask, MaskSpec, fill_values, hide, mask_batch

MEANS = torch.linspace(0.1, 0.4, 13)
SIZE = (16, 16)
SAMPLES = torch.arange(20_000)

some_bands = st.sets(st.sampled_from(bands.NAMES), min_size=1, max_size=12).map(bands.parse_bands)
sizes = st.tuples(st.integers(1, 40), st.integers(1, 40))
seeds = st.integers(-(2**63), 2**63 - 1)
epochs = st.integers(-1, 1000)
samples_ = st.lists(st.integers(0, 2**40), min_size=1, max_size=5, unique=True)


def draw(samples, ratio=0.5, names=("B02", "B8A"), size=SIZE, epoch=-1, **options) -> Tensor:
    return MaskSpec(names, ratio, **options).hidden(torch.tensor(list(samples)), size, epoch=epoch)


def bits(images: Tensor) -> Tensor:
    """To compare bit for bit, NaN and −0 included."""
    return images.contiguous().view(torch.int32)


def generated(count: int = 3, size: tuple[int, int] = SIZE) -> Tensor:
    return torch.rand(count, 13, *size, generator=torch.Generator().manual_seed(0))


def from_visible(names: tuple[str, ...]):
    """A fill that mixes all visible bands of a pixel."""
    visible = [c for c in range(13) if bands.NAMES[c] not in names]
    weight = torch.randn(len(names), len(visible), generator=torch.Generator().manual_seed(0))
    return lambda batch, hidden: torch.einsum("kv,bvhw->bkhw", weight.to(batch), batch[:, visible])


# --- which pixels


@given(st.sampled_from(SHAPES), some_bands, st.floats(0, 1), sizes, seeds, epochs, samples_, st.data())
def test_no_mask_depends_on_its_batch_or_on_other_bands(shape, names, ratio, size, seed, epoch, samples, data):
    options = {"size": size, "seed": seed, "epoch": epoch, "shape": shape}
    together = draw(samples, ratio, names, **options)
    assert together.dtype == torch.bool
    assert together.shape == (len(samples), len(names), *size)
    order = data.draw(st.permutations(range(len(samples))))
    assert torch.equal(draw([samples[i] for i in order], ratio, names, **options), together[list(order)])
    place = data.draw(st.integers(0, len(samples) - 1))
    assert torch.equal(draw([samples[place]], ratio, names, **options)[0], together[place])
    alone = data.draw(st.sampled_from(names))
    assert torch.equal(draw(samples, ratio, (alone,), **options)[:, 0], together[:, names.index(alone)])


@given(st.sampled_from(SHAPES), st.floats(0, 1), st.floats(0, 1), sizes, seeds)
def test_a_higher_ratio_hides_the_same_pixels_and_more(shape, first, second, size, seed):
    low, high = sorted((first, second))
    less, more = (draw(range(2), ratio, size=size, seed=seed, shape=shape) for ratio in (low, high))
    assert (less <= more).all()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("ratio", [0.1, 0.5, 0.9])
def test_the_expected_share_is_the_ratio(shape, ratio):
    """Of many images, with the spread that so many independent units have; of clouds in each image exactly."""
    count, side = 3000, 24
    share = draw(range(count), ratio, size=(side, side), shape=shape).double().mean((2, 3))  # (B, k)
    units = {"pixel": side**2, "band": 1, "stripe": side, "block": 64}  # blocks: 64 whole ones, or more cut ones
    if shape == "cloud":
        assert (share == round(ratio * side**2) / side**2).all()
        return
    sd = math.sqrt(ratio * (1 - ratio) / count / units[shape])
    assert ((share.mean(0) - ratio).abs() < 5 * sd).all()
    assert share.std(0) == pytest.approx(math.sqrt(ratio * (1 - ratio) / units[shape]), rel=0.15)
    assert shape == "block" or abs(torch.corrcoef(share.T)[0, 1]) < 6 / math.sqrt(count), "bands share their draw"


@pytest.mark.parametrize("shape", SHAPES)
def test_every_pixel_is_as_likely_to_be_hidden_as_any_other(shape):
    """No rim, corner or lattice shows through: the chance of each pixel over many images is the ratio."""
    per_pixel = draw(range(6000), 0.4, ("B02",), shape=shape).double().mean((0, 1))
    assert ((per_pixel - 0.4).abs() < 5 * math.sqrt(0.4 * 0.6 / 6000)).all()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("ratio", "share"), [(0, 0), (1e-12, 0), (1, 1), (1 - 1e-12, 1), (math.nextafter(1, 0), 1)])
def test_ratios_0_and_1_are_exact_and_so_is_what_rounds_to_them(shape, ratio, share):
    assert draw(range(4), ratio, size=(64, 64), shape=shape).float().mean() == share


def test_hiding_no_band_is_a_copy_and_hiding_every_band_leaves_nothing():
    images = generated()
    for fill in (fill_values("dataset_mean", MEANS), lambda batch, hidden: batch[:, :2]):
        masked = hide(images, draw(range(3), names=()), MaskSpec(), fill)
        assert torch.equal(masked, images)
        assert masked.data_ptr() != images.data_ptr()
    assert draw([], names=("B02",)).shape[:2] == (0, 1)
    spec = MaskSpec(bands.NAMES, ratio=1.0, value=0)
    assert not mask_batch(images, torch.arange(3), spec, fill_values(0, MEANS)).any()


GOLDEN = {
    "pixel": "b643bb3b8a098f6da8ee5a104ad127f53943b0f6180c63a03a5b96484e045ec8",
    "band": "800a845e5b509269fc78b157baf906806538fd898cb7759b4236103f06bc51b2",
    "stripe": "04f6ef97f79f62e8ab4e6a30404a21ccb4768e2e6e4c05353d690d98da17aebc",
    "block": "20d21b39de84e05d6e6dcfb98f285e1d7999706b16e40607215f3906e362f121",
    "cloud": "9b20635857d37ad70363d8c50bf58396dcbdf4104f8b9765bb3063323ca49c7b",
}
FAR = {  # seeds and samples beyond 32 bit, and a negative one
    "pixel": "8552e63c3a2093c0",
    "band": "b603d6d35aac79ed",
    "stripe": "97ea0688d5a440ac",
    "block": "0b48ee34cb62c461",
    "cloud": "e2bcdc58e1782808",
}


@pytest.mark.parametrize("shape", SHAPES)
def test_masks_stay_the_same_between_releases_and_torch_versions(shape):
    """If this fails, results of earlier runs can't be repeated: change the hash only with a new major version."""
    hidden = draw(range(100, 108), 0.9, ("B02", "B8A", "B12"), (64, 64), seed=42, epoch=3, shape=shape)
    assert hashlib.sha256(np.packbits(hidden.numpy()).tobytes()).hexdigest() == GOLDEN[shape]
    far = [draw([2**40], size=(8, 8), seed=seed, epoch=-1, shape=shape) for seed in (-1, 12345678901234567890)]
    assert hashlib.sha256(np.packbits(torch.stack(far).numpy()).tobytes()).hexdigest()[:16] == FAR[shape]


# --- each shape is what it says


def test_a_band_is_lost_whole_and_a_stripe_is_a_column_of_one_band():
    lost = draw(range(100), shape="band").flatten(2)
    assert (lost.all(2) | ~lost.any(2)).all()
    stripes = draw(range(20), size=(24, 40), shape="stripe")
    assert (stripes == stripes[:, :, :1]).all()
    assert not torch.equal(stripes[:, 0], stripes[:, 1])


@pytest.mark.parametrize("size", [(64, 64), (40, 72)])
def test_blocks_are_squares_of_an_eighth_of_the_shorter_side(size):
    """Where masks change between neighbours, they change on grid lines one block apart, elsewhere in each image."""
    side = min(size) // masks.BLOCKS_A_SIDE
    starts = set()
    for image in draw(range(60), 0.5, ("B02",), size, shape="block")[:, 0]:
        for axis in (0, 1):
            edges = np.flatnonzero(image.diff(dim=axis).any(1 - axis).numpy()) + 1
            assert len(set(edges % side)) == 1
            starts.add((axis, int(edges[0] % side)))
    assert len(starts) == 2 * side, "every place of the grid occurs"


@pytest.mark.parametrize("shape", SHAPES)
def test_a_mask_can_be_written_to(shape):
    lost = draw(range(3), shape=shape)
    before = lost.clone()
    lost[:, :, 0, 0] = ~lost[:, :, 0, 0]  # an expanded view would change whole columns
    assert (lost != before).sum() == 6


# --- schedules


@given(st.sampled_from(["gradual", "staircase"]), st.floats(0, 1), st.integers(1, 60))
def test_schedules_begin_and_end_exactly_where_they_say_and_never_turn(schedule, end, length):
    stairs = MaskSpec(("B02",), ratio=0.8, schedule="staircase")
    assert [round(10 * stairs.ratio_at(epoch, 12)) for epoch in range(12)] == [2, 2, 2, 4, 4, 4, 6, 6, 6, 8, 8, 8]
    spec = MaskSpec(("B02",), ratio=end, schedule=schedule)
    path = [spec.ratio_at(epoch, length) for epoch in range(length)]
    levels = length if schedule == "gradual" else min(masks.STAIRS, length)
    assert path[-1] == spec.ratio_at(-1, length) == end, "validation uses the final ratio"
    assert path[0] == (masks.START_RATIO if levels > 1 else end)
    assert path == sorted(path, reverse=end < masks.START_RATIO)
    assert len(set(path)) <= levels
    assert all(0 <= ratio <= 1 for ratio in path)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_schedule_reaches_the_masks_and_validation_is_the_same_whatever_the_length_of_the_run(shape):
    spec = MaskSpec(("B02",), 0.8, shape=shape, schedule="gradual")
    drawn = [spec.hidden(SAMPLES[:800], SIZE, epoch=epoch, epochs=3) for epoch in (0, 1, 2, -1)]
    assert [d.double().mean().item() for d in drawn] == pytest.approx([0.2, 0.5, 0.8, 0.8], abs=0.08)
    assert torch.equal(drawn[3], spec.hidden(SAMPLES[:800], SIZE, epochs=25))


# --- bands drawn for each image


def lost(mask: AnyMask, samples: Tensor, **when: int) -> Tensor:
    """(B, 13) bool; each band is hidden whole or not at all."""
    hidden = mask.hidden(samples, (2, 3), **when).flatten(2)
    assert (hidden.all(2) == hidden.any(2)).all()
    return hidden.all(2)


@given(seeds, epochs, st.integers(0, 2**40))
def test_what_an_image_loses_does_not_depend_on_its_batch(seed, epoch, start):
    samples = start + torch.arange(12)
    together = lost(AnyMask(seed=seed), samples, epoch=epoch)
    assert torch.equal(together[[7, 2]], lost(AnyMask(seed=seed), samples[[7, 2]], epoch=epoch))


def test_every_number_of_lost_bands_is_equally_likely_and_so_is_every_band():
    drawn = lost(AnyMask(), SAMPLES, epoch=3)
    numbers = torch.bincount(drawn.sum(1), minlength=14).numpy()
    assert numbers[12:].sum() == 0
    assert chisquare(numbers[:12]).pvalue > 1e-3
    assert chisquare(drawn.sum(0).numpy()).pvalue > 1e-3
    pairs = lost(AnyMask(fewest=2, most=2), SAMPLES)
    _, counts = np.unique((pairs.long() @ (2 ** torch.arange(13))).numpy(), return_counts=True)
    assert len(counts) == 78
    assert chisquare(counts).pvalue > 1e-3, "sets of one size"
    share = drawn.float().mean()
    for other in (lost(AnyMask(), SAMPLES, epoch=4), lost(AnyMask(seed=1), SAMPLES, epoch=3)):  # draws of their own
        assert (drawn == other).float().mean() == pytest.approx(float(share**2 + (1 - share) ** 2), abs=0.03)


# --- what stands there instead


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        *((value, torch.full((13,), value)) for value in (-1.0, 0.0, 0.25)),
        ("dataset_mean", torch.full((13,), 0.25)),
        ("band_mean", MEANS),
    ],
)
def test_hidden_pixels_hold_the_value_asked_for(value, expected):
    fill = fill_values(value, MEANS.double())
    assert fill.dtype == torch.float32
    assert torch.allclose(fill, expected)
    spec = MaskSpec(("B03", "B8A", "B12"), value=value)
    hidden = draw(range(3), 0.9, spec.bands)
    masked = hide(generated(), hidden, spec, fill)
    for index, channel in enumerate(spec.channels):
        assert torch.equal(masked[:, channel][hidden[:, index]].unique(), fill[channel : channel + 1])


masks_ = st.builds(MaskSpec, some_bands, st.floats(0, 1), seed=seeds) | st.builds(AnyMask, seed=seeds)


@given(masks_, st.sampled_from([math.nan, math.inf, -math.inf, 1e30, 7.0]), st.booleans())
def test_original_values_of_hidden_pixels_never_reach_the_output(spec, other, impute):
    """The claim everything rests on: change what is hidden as you like, and the incomplete image is the same."""
    fill = from_visible(spec.bands) if impute else fill_values("band_mean", MEANS)
    images = generated(2)
    images[0, :, 0, 0], images[1, :, 1, 1], images[1, :, 2, 2] = 3.0, -0.0, math.inf
    before, changed = images.clone(), images.clone()
    hidden = spec.hidden(torch.arange(2), SIZE)
    changed[:, spec.channels] = changed[:, spec.channels].masked_fill(hidden, other)
    masked = hide(images, hidden, spec, fill)
    assert torch.equal(bits(masked), bits(hide(changed, hidden, spec, fill)))
    visible = torch.ones_like(images, dtype=torch.bool)
    visible[:, spec.channels] = ~hidden
    assert torch.equal(bits(masked)[visible], bits(images)[visible]), "what is visible is kept bit for bit"
    assert torch.equal(bits(images), bits(before)), "the input was modified"


@pytest.mark.parametrize("impute", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_format_and_dtype_are_kept(impute, dtype):
    spec = MaskSpec(("B02", "B11"))
    hidden = spec.hidden(torch.arange(3), SIZE)
    fill = from_visible(spec.bands) if impute else fill_values("band_mean", MEANS)
    plain = generated().to(dtype)
    last = plain.to(memory_format=torch.channels_last)
    masked = hide(last, hidden, spec, fill)
    assert masked.dtype == dtype
    assert masked.is_contiguous(memory_format=torch.channels_last)
    assert not masked.is_contiguous()
    reference = hide(plain, hidden, spec, fill)
    assert reference.is_contiguous()
    assert torch.allclose(masked.double(), reference.double(), rtol=1e-2 if impute else 0, atol=1e-6)


@pytest.mark.parametrize(
    "wrong", [generated()[:, :12], generated()[0], generated().movedim(1, -1), (10_000 * generated()).short()]
)
@pytest.mark.parametrize("spec", [MaskSpec(("B02", "B08"), 0.5), MaskSpec(())])
def test_images_of_other_channels_are_refused_before_the_wrong_band_is_hidden(wrong, spec):
    """A 12-band array was masked on the bands next to those that were meant."""
    hidden = spec.hidden(torch.arange(3), SIZE)
    for call in (
        lambda: hide(wrong, hidden, spec, fill_values(0, MEANS)),
        lambda: mask_batch(wrong, torch.arange(3), spec, fill_values(0, MEANS)),
    ):
        with pytest.raises(ValueError, match=r"\(B, 13, H, W\), float, in the order B01, B02.*got \("):
            call()


def test_a_fill_or_a_mask_for_other_bands_is_refused():
    """Broadcasting would write one band's values over two bands without a word."""
    spec, images = MaskSpec(("B02", "B08")), generated()
    hidden = spec.hidden(torch.arange(3), SIZE)
    for other, fill in (
        (hidden, from_visible(("B02",))),
        (hidden[:, :1], fill_values(0, MEANS)),
        (hidden.repeat(1, 2, 1, 1), fill_values(0, MEANS)),
        (hidden[:2], fill_values(0, MEANS)),
        (hidden.float(), fill_values(0, MEANS)),
        (hidden, MEANS[:12]),
    ):
        with pytest.raises(ValueError, match=r"expected|bands|one value per band"):
            hide(images, other, spec, fill)


# --- what can't be asked for


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"bands": "B02 B99"}, "unknown band 'B99'"),
        *(({"ratio": ratio}, "ratio is the share") for ratio in (1.2, -0.1, math.nan, True, "0.9")),
        ({"schedule": "linear"}, "unknown mask schedule 'linear'; available: constant, gradual, staircase"),
        ({"value": "mean"}, "unknown mask value 'mean'; available: dataset_mean, band_mean, nearest, .*, or a number"),
        *(({"value": value}, "unknown mask value.*finite") for value in (math.nan, math.inf, False, None)),
        ({"shape": "circle"}, "unknown mask shape 'circle'; available: pixel, band, stripe, block, cloud"),
        ({"fewest": -1}, "0 ≤ fewest ≤ most < 13"),
        ({"most": 13}, "got 0 and 13"),
        ({"fewest": 5, "most": 4}, "got 5 and 4"),
    ],
)
def test_impossible_masks_are_errors_that_say_what_is_possible(wrong, message):
    with pytest.raises(ValueError, match=message):
        AnyMask(**wrong) if wrong.keys() & {"fewest", "most"} else MaskSpec(**{"bands": ("B02",), **wrong})


def test_a_spec_is_the_same_however_its_bands_and_value_are_written():
    spec = MaskSpec(("nir", "B12", "b2"), value="0.25")
    assert spec == MaskSpec("B12 B8 B2", value=0.25)
    assert (spec.bands, spec.channels) == (("B02", "B08", "B12"), [1, 7, 12])
    assert [MaskSpec(value=value).value for value in ("-1", *masks.VALUES)] == [-1.0, *masks.VALUES]


@pytest.mark.parametrize("value", masks.FITTED)
def test_a_value_that_depends_on_the_image_is_no_constant(value):
    with pytest.raises(ValueError, match=f"{value}.*fills.make_fill.*dataset_mean, band_mean, or a number"):
        fill_values(value, MEANS)


# --- the same everywhere


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine: CUDA masks are not compared")
@pytest.mark.parametrize("mask", [*(MaskSpec(("B02", "B8A", "B12"), 0.6, shape=s, seed=42) for s in SHAPES), AnyMask()])
def test_masks_and_masked_batches_are_the_same_on_cuda(mask):
    samples, fill = torch.tensor([0, 1, 26_999, 2**40]), fill_values("band_mean", MEANS)
    for size in ((256, 256), (61, 100)):
        on_cpu, on_gpu = (mask.hidden(s, size, epoch=3) for s in (samples, samples.cuda()))
        assert torch.equal(on_gpu.cpu(), on_cpu)
        images = generated(4, size)
        for memory_format in (torch.contiguous_format, torch.channels_last):
            masked = hide(images.cuda().to(memory_format=memory_format), on_gpu, mask, fill.cuda())
            assert torch.equal(masked.cpu(), hide(images, on_cpu, mask, fill))
