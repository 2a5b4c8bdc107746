"""Tiles cover the scene once and each pixel comes from the most central one; seams are nowhere where they need not be.

The scene is generated and lies in memory, or, where reading is watched, is made window by window.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import xarray as xr
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from xarray.backends import BackendArray
from xarray.core import indexing

from bandmask.readers.tiles import patches, predict_strips, spans

CPU = torch.device("cpu")
FILL = torch.linspace(0.1, 0.3, 13)


def scene(height: int, width: int, seed: int = 0) -> xr.DataArray:
    """Generated DN, smooth enough for classes to form regions."""
    draw = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 13, 9, 9, generator=draw)
    dn = 4000 * F.interpolate(coarse, (height, width), mode="bicubic")[0] + 50 * torch.rand(13, height, width)
    return xr.DataArray(dn.clamp(1, 10_000).numpy(), dims=("band", "y", "x"))


def predict(array: xr.DataArray, what, tile: int, overlap: int, batch_size: int = 5) -> tuple[np.ndarray, np.ndarray]:
    rows, columns = (spans(array.sizes[dim], tile, overlap) for dim in ("y", "x"))
    strips = list(predict_strips(array, what, FILL, rows, columns, tile, batch_size, CPU))
    return np.concatenate([strip[1] for strip in strips]), np.concatenate([strip[2] for strip in strips])


# --- where tiles lie


@given(st.integers(1, 400), st.integers(1, 80), st.data())
def test_every_pixel_is_owned_once_by_a_tile_in_the_scene(length: int, tile: int, data: st.DataObject):
    tile = min(tile, length)
    overlap = data.draw(st.integers(0, tile - 1))
    found = spans(length, tile, overlap)
    assert [pixel for span in found for pixel in range(span.low, span.high)] == list(range(length))
    for span in found:
        assert 0 <= span.start <= length - tile
        assert span.skip == span.low - span.start >= 0
        assert span.high - span.start <= tile
    for span, following in itertools.pairwise(found):
        assert min(span.start + tile - span.high, following.low - following.start) >= overlap // 2


@given(st.integers(1, 300), st.integers(1, 64), st.data())
def test_a_pixel_belongs_to_the_tile_whose_centre_is_nearest(length: int, tile: int, data: st.DataObject):
    tile = min(tile, length)
    found = spans(length, tile, data.draw(st.integers(0, tile - 1)))
    for span in found:
        for pixel in range(span.low, span.high):
            distances = [abs(pixel + 0.5 - (other.start + tile / 2)) for other in found]
            assert distances[found.index(span)] <= min(distances) + 0.5


@pytest.mark.parametrize(("overlap", "message"), [(-1, "overlap is 0 to 31"), (32, "got 32")])
def test_an_overlap_that_leaves_no_step_is_refused(overlap: int, message: str):
    with pytest.raises(ValueError, match=message):
        spans(100, 32, overlap)


def test_a_scene_smaller_than_a_tile_is_refused():
    for make in (lambda: spans(31, 32, 8), lambda: patches(31, 32)):
        with pytest.raises(ValueError, match="the scene is 31 pixels long, a tile takes 32"):
            make()


def test_patches_leave_out_what_fills_no_tile():
    assert [(span.start, span.low, span.high) for span in patches(100, 32)] == [(0, 0, 1), (32, 1, 2), (64, 2, 3)]


# --- what comes out


class Near:
    """A network whose field of view ends after 6 pixels, without pooling over the image: three 5×5 convolutions."""

    def __init__(self) -> None:
        draw = torch.Generator().manual_seed(3)
        self.weights = [torch.randn(4, fan, 5, 5, generator=draw) / fan for fan in (13, 4, 4)]

    def __call__(self, images: Tensor) -> Tensor:
        for weight in self.weights:
            images = torch.tanh(F.conv2d(images, weight, padding=2))
        return images.softmax(1)


@pytest.mark.parametrize("size", [(64, 64), (97, 70)])
def test_away_from_borders_tiles_equal_one_pass_over_the_whole_scene(size: tuple[int, int]):
    """Overlap 12 is twice the field of view's reach; with less, seams show."""
    array, network = scene(*size), Near()
    chance, best = network(torch.from_numpy(array.values)[None] / 10_000)[0].max(0)
    classes, confidence = predict(array, network, 32, 12)
    assert len(np.unique(classes)) > 1
    assert (classes == best.numpy()).mean() == 1  # at borders too: padding is the same there
    assert np.abs(confidence - 100 * chance.numpy()).max() <= 0.51
    seams, _ = predict(array, network, 32, 0)
    assert (seams != best.numpy()).any()


def test_batches_do_not_change_the_map():
    array, network = scene(80, 100), Near()
    first, second = (predict(array, network, 32, 8, batch_size) for batch_size in (1, 64))
    assert np.array_equal(first[0], second[0])


def test_hidden_pixels_get_the_fill_and_unseen_ones_no_class():
    array = scene(64, 64)
    array[3, 10:20] = np.nan
    array[:, 40:, :20] = np.nan
    seen: list[Tensor] = []

    def look(images: Tensor) -> Tensor:
        seen.append(images)
        return torch.ones(len(images), 2, 32, 32) * torch.tensor([0.3, 0.7])[:, None, None]

    classes, confidence = predict(array, look, 32, 0)
    first = seen[0][0]
    assert torch.allclose(first[3, 10:20], FILL[3])
    assert torch.allclose(first[2], torch.from_numpy(array.values[2, :32, :32]) / 10_000)
    assert not torch.cat(seen).isnan().any()
    unseen = np.zeros((64, 64), bool)
    unseen[40:, :20] = True
    assert np.array_equal(classes == 255, unseen)
    assert np.array_equal(confidence == 255, unseen)
    assert set(np.unique(classes[~unseen])) == {1}
    assert set(np.unique(confidence[~unseen])) == {70}


def test_an_imputer_is_asked_for_hidden_pixels_of_its_bands_alone():
    array = scene(32, 32)
    array[3, 10:20] = np.nan
    array[5, 15:25] = np.nan
    seen: list[Tensor] = []

    class Half:
        """B04 is half of B01; B05 it sees, but doesn't touch."""

        bands = ("B04",)

        def __call__(self, images: Tensor, hidden: Tensor) -> Tensor:
            assert not images.isnan().any()
            assert hidden.shape == (1, 1, 32, 32)
            return images[:, :1] / 2

    def look(images: Tensor) -> Tensor:
        seen.append(images)
        return torch.ones(1, 1, 32, 32)

    rows = spans(32, 32, 0)
    list(predict_strips(array, look, FILL, rows, rows, 32, 1, CPU, impute=Half()))
    given, dn = seen[0][0], torch.from_numpy(array.values) / 10_000
    assert torch.allclose(given[3, 10:20], dn[0, 10:20] / 2)
    assert torch.allclose(given[3, :10], dn[3, :10])
    assert torch.allclose(given[5, 15:25], FILL[5])


def test_tiles_that_nothing_was_seen_in_are_not_predicted():
    """Half of a Sentinel-2 tile can lie outside the swath."""
    array = scene(64, 64)
    array[:, :, :32] = np.nan
    predicted = 0

    def count(images: Tensor) -> Tensor:
        nonlocal predicted
        predicted += len(images)
        return torch.ones(len(images), 1, 32, 32)

    classes, _ = predict(array, count, 32, 0)
    assert predicted == 2
    assert (classes[:, :32] == 255).all()
    empty = xr.full_like(array, np.nan)
    assert (predict(empty, count, 32, 0)[0] == 255).all()
    assert predicted == 2


def test_of_one_answer_a_tile_half_must_have_been_seen():
    array = scene(64, 96)
    array[:, :17, :32] = np.nan
    array[:, :16, 32:64] = np.nan
    rows, columns = patches(64, 32), patches(96, 32)

    def one(images: Tensor) -> Tensor:
        return torch.ones(len(images), 3, 1, 1) / 3

    strips = [strip for _, strip, _ in predict_strips(array, one, FILL, rows, columns, 32, 2, CPU)]
    assert np.concatenate(strips).tolist() == [[255, 0, 0], [0, 0, 0]]


class Watched(BackendArray):
    """A scene that is made when it is read, and notes how much."""

    def __init__(self, shape: tuple[int, int]) -> None:
        self.shape, self.dtype = (13, *shape), np.dtype(np.float32)
        self.read: list[tuple[int, ...]] = []

    def __getitem__(self, key: indexing.ExplicitIndexer) -> np.ndarray:
        return indexing.explicit_indexing_adapter(key, self.shape, indexing.IndexingSupport.BASIC, self._make)

    def _make(self, key: tuple) -> np.ndarray:
        shape = tuple(len(range(*part.indices(size))) for part, size in zip(key, self.shape, strict=True))
        self.read.append(shape)
        return np.full(shape, 1000, np.float32)


def test_no_more_is_read_at_once_than_a_batch_of_tiles():
    """However large the scene: this one would take 5 GB."""
    watched = Watched((10_000, 10_000))
    array = xr.DataArray(xr.Variable(("band", "y", "x"), indexing.LazilyIndexedArray(watched)))
    rows, columns = spans(10_000, 320, 80), spans(10_000, 320, 80)

    def one(images: Tensor) -> Tensor:
        return torch.ones(len(images), 1, 320, 320)

    strips = predict_strips(array, one, FILL, rows, columns, 320, 4, CPU)
    row, classes, _ = next(strips)
    assert classes.shape == (row.high, 10_000)
    assert max(watched.read) == (13, 320, 320 + 3 * 240)
    assert len(watched.read) <= -(-len(columns) // 4) + 1  # one row of tiles, and one batch ahead
    strips.close()
