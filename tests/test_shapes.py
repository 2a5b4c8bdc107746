"""Shapes of loss: the share is the ratio, structure lies where it should, and no pixel depends on its batch."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from bandmask import bands, shapes
from bandmask.masking import MaskSpec, fill_values, hidden_pixels, hide

SIZES = st.tuples(st.integers(1, 40), st.integers(1, 40))
STRUCTURED = ("band", "stripe", "block", "cloud")
some_bands = st.sets(st.sampled_from(bands.NAMES), min_size=1, max_size=12).map(bands.parse_bands)
samples_ = st.lists(st.integers(0, 2**40), min_size=1, max_size=5, unique=True)
seeds, epochs = st.integers(-(2**63), 2**63 - 1), st.integers(-1, 1000)


def draw(
    shape: str,
    samples: list[int] | range,
    ratio: float = 0.5,
    size: tuple[int, int] = (32, 32),
    names: tuple[str, ...] = ("B02", "B8A"),
    seed: int = 0,
    epoch: int = -1,
) -> Tensor:
    spec = MaskSpec(names, ratio, shape=shape, seed=seed)
    return hidden_pixels(spec, torch.tensor(list(samples)), size, epoch=epoch)


# --- what all shapes share


@given(st.sampled_from(shapes.SHAPES), some_bands, st.floats(0, 1), SIZES, seeds, epochs, samples_, st.data())
def test_no_mask_depends_on_its_batch(
    shape: str,
    names: tuple[str, ...],
    ratio: float,
    size: tuple[int, int],
    seed: int,
    epoch: int,
    samples: list[int],
    data: st.DataObject,
) -> None:
    together = draw(shape, samples, ratio, size, names, seed, epoch)
    assert together.dtype == torch.bool
    assert together.shape == (len(samples), len(names), *size)
    order = data.draw(st.permutations(range(len(samples))))
    assert torch.equal(draw(shape, [samples[i] for i in order], ratio, size, names, seed, epoch), together[list(order)])
    place = data.draw(st.integers(0, len(samples) - 1))
    assert torch.equal(draw(shape, [samples[place]], ratio, size, names, seed, epoch)[0], together[place])
    alone = data.draw(st.sampled_from(names))
    one = draw(shape, samples, ratio, size, (alone,), seed, epoch)[:, 0]
    assert torch.equal(one, together[:, names.index(alone)]), "a band's mask does not depend on the other bands"


@given(st.sampled_from(shapes.SHAPES), st.floats(0, 1), st.floats(0, 1), SIZES, seeds)
def test_a_higher_ratio_hides_the_same_pixels_and_more(
    shape: str, first: float, second: float, size: tuple[int, int], seed: int
) -> None:
    low, high = sorted((first, second))
    assert (draw(shape, range(2), low, size, seed=seed) <= draw(shape, range(2), high, size, seed=seed)).all()


@pytest.mark.parametrize("shape", shapes.SHAPES)
@pytest.mark.parametrize("ratio", [0.1, 0.5, 0.9])
def test_the_expected_share_is_the_ratio(shape: str, ratio: float) -> None:
    """Of many images, with the error that so many independent units may have; of clouds in each image exactly."""
    count, side = 3000, 24
    share = draw(shape, range(count), ratio, (side, side)).double().mean((2, 3))  # (B, k)
    units = {"pixel": side**2, "band": 1, "stripe": side, "block": 64}  # blocks: 64 whole ones, or more cut ones
    if shape == "cloud":
        assert (share == round(ratio * side**2) / side**2).all()
        return
    sd = math.sqrt(ratio * (1 - ratio) / count / units[shape])
    assert ((share.mean(0) - ratio).abs() < 5 * sd).all()
    assert share.std(0) == pytest.approx(math.sqrt(ratio * (1 - ratio) / units[shape]), rel=0.15)


@pytest.mark.parametrize("shape", shapes.SHAPES)
def test_every_pixel_is_as_likely_to_be_hidden_as_any_other(shape: str) -> None:
    """No rim, corner or lattice shows through: the chance of each pixel over many images is the ratio."""
    count, ratio = 6000, 0.4
    per_pixel = draw(shape, range(count), ratio, (16, 16), ("B02",)).double().mean((0, 1))
    sd = math.sqrt(ratio * (1 - ratio) / count)
    assert ((per_pixel - ratio).abs() < 5 * sd).all()


@pytest.mark.parametrize("shape", shapes.SHAPES)
@pytest.mark.parametrize("ratio", [0, 1])
def test_ratios_0_and_1_are_exact(shape: str, ratio: float) -> None:
    assert draw(shape, range(4), ratio).double().mean() == ratio


@pytest.mark.parametrize("shape", STRUCTURED)
def test_other_seeds_epochs_and_samples_are_other_masks(shape: str) -> None:
    base = draw(shape, range(64))
    assert not torch.equal(base, draw(shape, range(64), seed=1))
    assert not torch.equal(base, draw(shape, range(64), epoch=0))
    assert not torch.equal(base, draw(shape, range(64, 128)))
    flat = base.flatten(1).double() - 0.5
    close = (flat[:-1] * flat[1:]).mean(1) * 4  # correlation of neighbouring samples
    assert close.mean().abs() < 0.3
    assert not (base[:-1] == base[1:]).flatten(1).all(1).all()


# --- each shape is what it says


def test_pixel_is_the_default_and_what_it_always_was() -> None:
    assert MaskSpec(("B02",)).shape == "pixel"
    spec = MaskSpec(("B02", "B8A"))
    given_ = hidden_pixels(spec, torch.arange(3), (8, 8))
    assert torch.equal(given_, draw("pixel", range(3), 0.9, (8, 8)))


def test_a_band_is_lost_whole_or_not_at_all_and_by_its_own_draw() -> None:
    lost = draw("band", range(500)).flatten(2)
    assert (lost.all(2) | ~lost.any(2)).all()
    pair = torch.corrcoef(lost[:, :, 0].double().T)[0, 1]
    assert abs(pair) < 0.25


def test_stripes_are_whole_columns_that_differ_between_bands() -> None:
    lost = draw("stripe", range(20), size=(24, 40))
    assert (lost == lost[:, :, :1]).all()
    assert 0.3 < lost[:, :, 0].double().mean() < 0.7
    assert not torch.equal(lost[:, 0], lost[:, 1])


@pytest.mark.parametrize("size", [(64, 64), (40, 72)])
def test_blocks_are_squares_of_an_eighth_of_the_shorter_side(size: tuple[int, int]) -> None:
    """Where masks change between neighbours, they change on grid lines one block apart, elsewhere in each image."""
    side = min(size) // shapes.BLOCKS_A_SIDE
    starts = set()
    for image in draw("block", range(60), 0.5, size, ("B02",))[:, 0]:
        for axis in (0, 1):
            edges = np.flatnonzero(image.diff(dim=axis).any(1 - axis).numpy()) + 1
            assert len(set(edges % side)) == 1
            starts.add((axis, int(edges[0] % side)))
    assert len(starts) == 2 * side, "every place of the grid occurs"


def test_clouds_lie_at_the_same_place_in_all_bands() -> None:
    lost = draw("cloud", range(10), names=("B02", "B08", "B12"))
    assert (lost == lost[:, :1]).all()


def test_clouds_are_blobs_with_soft_edges() -> None:
    """Neighbours agree far more often than at random; between the whole and the empty there is scattered loss."""
    lost = draw("cloud", range(40), 0.4, (64, 64), ("B02",))[:, 0].double()
    agree = (lost[:, 1:] == lost[:, :-1]).double().mean()
    assert agree > 0.85, "at random 0.52"
    around = torch.nn.functional.avg_pool2d(lost[:, None], 5, stride=1)[:, 0]
    whole, empty = (around > 0.99).double().mean(), (around < 0.01).double().mean()
    assert whole > 0.15
    assert empty > 0.25
    between = 1 - whole - empty
    assert between > 0.15
    edge = lost[:, 2:-2, 2:-2][(around > 0.3) & (around < 0.7)]
    assert 0.4 < edge.mean() < 0.6, "in the edge a pixel is hidden by chance"


def reference_cloud(seed: int, sample: int, side: int, count: int) -> np.ndarray:
    """Clouds in plain Python integers, pixel by pixel."""

    def mix64(x: int) -> int:
        x = (x + 0x9E3779B97F4A7C15) % 2**64
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
        return x ^ (x >> 31)

    def uniform(unit: int, key: int) -> int:
        x = unit ^ (key % 2**32)
        x = (x ^ (x >> 16)) * 0x7FEB352D % 2**32
        x = (x ^ (x >> 15) ^ (key >> 32)) * 0x846CA68B % 2**32
        x ^= x >> 16
        return x - 2**32 if x >= 2**31 else x

    key = mix64(seed % 2**64)
    key = mix64(mix64(key ^ (2**64 - 1)) ^ sample)  # epoch −1
    thickness = [0] * side * side
    for octave in range(3):
        key = mix64(key)
        spacing = max(side // 3 >> octave, 1)
        nodes = side // spacing + 3
        begin = [(((mix64(key) >> shift) & 0xFFFF) * 256) >> 16 for shift in (0, 16)]
        for y in range(side):
            for x in range(side):
                (i, s), (j, t) = (divmod(p * 256 // spacing + b, 256) for p, b in zip((y, x), begin, strict=True))
                s, t = s * s * (768 - 2 * s) >> 16, t * t * (768 - 2 * t) >> 16
                a, b, c, d = (uniform(r * nodes + q, key) >> 16 for r in (i, i + 1) for q in (j, j + 1))
                left, right = a + ((c - a) * s >> 8), b + ((d - b) * s >> 8)
                thickness[y * side + x] += (left + ((right - left) * t >> 8)) << (2 - octave)
    key = mix64(key)
    rank = [(thickness[p] + (uniform(p, key) >> 17)) * side * side + p for p in range(side * side)]
    limit = sorted(rank)[count - 1]
    return np.array([r <= limit for r in rank]).reshape(side, side)


@pytest.mark.parametrize(("seed", "sample"), [(0, 0), (-1, 26_999), (2**40, 2**40)])
def test_clouds_are_the_field_computed_by_plain_integers(seed: int, sample: int) -> None:
    drawn = draw("cloud", [sample], 0.4, (20, 20), ("B02",), seed)[0, 0]
    assert np.array_equal(drawn.numpy(), reference_cloud(seed, sample, 20, 160))


# --- with the rest


@pytest.mark.parametrize("shape", shapes.SHAPES)
def test_masks_can_be_written_to_and_hide_what_they_say(shape: str) -> None:
    lost = draw(shape, range(3))
    before = lost.clone()
    lost[:, :, 0, 0] = ~lost[:, :, 0, 0]  # an expanded view would change whole columns
    assert (lost != before).sum() == 6
    images = torch.rand(3, 13, 32, 32)
    masked = hide(images, before, MaskSpec(("B02", "B8A"), shape=shape), fill_values(-1, torch.zeros(13)))
    assert torch.equal(masked[:, [1, 8]] == -1, before)


def test_a_schedule_reaches_every_shape() -> None:
    for shape in shapes.SHAPES:
        spec = MaskSpec(("B02",), 0.8, shape=shape, schedule="gradual", start_ratio=0.2)
        shares = [hidden_pixels(spec, torch.arange(800), (16, 16), epoch=e, epochs=2).double().mean() for e in (0, 1)]
        assert shares == pytest.approx([0.2, 0.8], abs=0.08)


def test_an_unknown_shape_lists_what_exists() -> None:
    with pytest.raises(ValueError, match="unknown mask shape 'circle'; available: pixel, band, stripe, block, cloud"):
        MaskSpec(("B02",), shape="circle")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine: CUDA shapes are not compared")
@pytest.mark.parametrize("shape", shapes.SHAPES)
def test_shapes_are_the_same_on_cuda(shape: str) -> None:
    spec = MaskSpec(("B02", "B8A", "B12"), 0.6, shape=shape, seed=42)
    samples = torch.tensor([0, 1, 26_999, 2**40])
    for size in ((256, 256), (61, 100)):
        on_cpu = hidden_pixels(spec, samples, size, epoch=3)
        assert torch.equal(hidden_pixels(spec, samples.cuda(), size, epoch=3).cpu(), on_cpu)
