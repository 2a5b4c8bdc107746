"""Batches: every image once, with its own label, the same in any repetition; DN, resizing and augmentation exact."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
import torch
import torchvision.transforms.functional as tv
from conftest import generated_images
from torch import Tensor

from bandmask import batches
from bandmask.batches import Batch, Batches, blur, flip, to_reflectance

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine: CUDA batches untested")


@pytest.fixture(scope="module")
def pack(tmp_path_factory, make_pack):
    """30 images of 8 × 8; B01 of image i is 1000 + i, whatever is flipped, blurred or resized; B04, B05 are bright."""
    images = generated_images(30, 8)
    images[:, 3], images[:, 4] = 32_768, 65_535
    return make_pack(tmp_path_factory.mktemp("batches"), images=images)


def together(batches: Batches, epoch: int = 0) -> Batch:
    """One epoch as one batch."""
    parts = list(batches.epoch(epoch))
    return Batch(*(torch.cat([getattr(part, name) for part in parts]) for name in ("images", "labels", "samples")))


def bits(dn: np.ndarray) -> Tensor:
    return torch.from_numpy(dn.astype(np.uint16).view(np.int16))


@pytest.mark.parametrize("split", ["train", "val", "test"])
@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("batch_size", [3, 64])
def test_every_image_of_a_split_comes_once_an_epoch(pack, split, shuffle, batch_size):
    batches = Batches(pack, split, batch_size=batch_size, shuffle=shuffle)
    for epoch in (0, 1):
        parts = list(batches.epoch(epoch))
        assert len(parts) == len(batches) == math.ceil(len(pack.rows(split)) / batch_size)
        samples = torch.cat([part.samples for part in parts])
        assert sorted(samples.tolist()) == pack.rows(split).tolist()
        assert shuffle or samples.tolist() == pack.rows(split).tolist()


@pytest.mark.parametrize("augmented", [False, True])
def test_labels_and_row_numbers_stay_with_their_images(pack, augmented):
    batches = Batches(pack, "train", batch_size=6, shuffle=True, augment=augmented, image_size=16)
    seen = []
    for batch in batches.epoch(3):
        carried = (batch.images[:, 0] * 10_000 - 1000).round().long()
        assert torch.equal(carried.amin((1, 2)), batch.samples)
        assert torch.equal(carried.amax((1, 2)), batch.samples)
        assert torch.equal(batch.labels, torch.tensor(pack.labels)[batch.samples])
        seen += batch.samples.tolist()
    assert seen != sorted(seen), "nothing was shuffled, so this proved nothing"


def test_an_epoch_is_the_same_in_every_repetition(pack):
    """A resumed run makes the batches anew and starts in the middle."""
    options = {"batch_size": 4, "shuffle": True, "augment": True, "seed": 7}
    batches = Batches(pack, "train", **options)
    first = [together(batches, epoch) for epoch in range(4)]
    next(batches.epoch(1))  # half an epoch, and the global seed, change nothing
    torch.manual_seed(99)
    before = torch.get_rng_state()
    for again in (batches, Batches(pack, "train", **options)):
        for epoch in (3, 1):
            repeated = together(again, epoch)
            assert torch.equal(repeated.samples, first[epoch].samples)
            assert torch.equal(repeated.images, first[epoch].images)
    assert torch.equal(torch.get_rng_state(), before), "batches drew from torch's global generator"


def test_other_epochs_and_seeds_are_other_orders_and_other_augmentations(pack):
    def made(seed: int, epoch: int, shuffle: bool) -> Batch:
        return together(Batches(pack, "train", shuffle=shuffle, augment=True, seed=seed), epoch)

    for seed, epoch in ((0, 1), (1, 0), (0, -1), (2**32, 0)):
        assert not torch.equal(made(seed, epoch, True).samples, made(0, 0, True).samples)
        assert not torch.equal(made(seed, epoch, False).images, made(0, 0, False).images)


@pytest.mark.parametrize("count", [19, 20, 21])
def test_a_last_batch_that_is_not_full_can_be_left_out(pack, count):
    batches = Batches(pack, np.arange(count), batch_size=5, drop_last=True, shuffle=True)
    parts = list(batches.epoch())
    assert [len(part.images) for part in parts] == [5] * (count // 5)
    assert len(batches) == count // 5
    kept = [set(torch.cat([part.samples for part in batches.epoch(e)]).tolist()) for e in range(6)]
    assert set().union(*kept) == set(range(count)), "shuffled epochs leave out other images each time"


def test_changing_a_batch_changes_neither_the_pack_nor_the_next_epoch(pack):
    batches = Batches(pack, "train")
    before = together(batches)
    for batch in batches.epoch():
        for part in (batch.images, batch.labels, batch.samples):
            part.zero_()
    again = together(batches)
    assert all(torch.equal(getattr(again, part), getattr(before, part)) for part in ("images", "labels", "samples"))


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_the_parts_of_all_ranks_are_the_batches_of_one(pack, ranks):
    """Images, flips and blur, in their order: how many share a batch decides nothing."""
    options = {"batch_size": 6, "augment": True, "shuffle": True, "drop_last": True, "seed": 3}
    whole = list(Batches(pack, "train", **options).epoch(2))
    shares = [list(Batches(pack, "train", **options, shard=(rank, ranks)).epoch(2)) for rank in range(ranks)]
    assert len(whole) == 3
    for batch, *parts in zip(whole, *shares, strict=True):
        assert {len(part.samples) for part in parts} == {6 // ranks}
        for name in ("samples", "labels", "images"):
            joined = torch.cat([getattr(part, name) for part in parts])
            torch.testing.assert_close(joined, getattr(batch, name), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([], {}, "one or more integers"),
        ([0, 30], {}, "from 0 to 29"),
        ([-1, 0], {}, "from 0 to 29"),
        (np.arange(30) % 2 == 0, {}, "bool"),  # read as integers: the images 0 and 1, again and again
        ("train", {"batch_size": 21, "drop_last": True}, "20 images don't fill one batch of 21; lower batch_size"),
        ("train", {"targets": True}, "a label an image, and none a pixel; choose a data set for segmentation"),
        ("train", {"batch_size": 6, "shard": (0, 4), "drop_last": True}, "can't be shared evenly"),
        ("train", {"batch_size": 6, "shard": (0, 2)}, "can't be shared evenly"),
        ("train", {"batch_size": 6, "shard": (2, 2), "drop_last": True}, "can't be shared evenly"),
    ],
)
def test_impossible_batches_are_errors(pack, rows, options, message):
    with pytest.raises(ValueError, match=message):
        Batches(pack, rows if isinstance(rows, str) else np.array(rows, None if len(rows) else int), **options)


def test_reflectance_is_exactly_dn_over_10000_for_every_uint16():
    dn = np.arange(2**16, dtype=np.uint16).reshape(1, 1, 256, 256)
    reflectance = to_reflectance(bits(dn), 256)
    assert reflectance.dtype == torch.float32
    assert np.array_equal(reflectance.numpy(), dn.astype(np.float32) / np.float32(10_000))
    assert reflectance.max() > 6.5, "DN above 32767 survive, and nothing is clipped"


@pytest.mark.parametrize("size", [8, 27])
def test_resizing_is_bilinear_between_pixel_centres(pack, size):
    made = together(Batches(pack, "val", image_size=size)).images
    plain = torch.tensor(pack.images[pack.rows("val")].astype(np.float32)) / 10_000
    expected = torch.stack([tv.resize(image, [size, size], antialias=False) for image in plain])
    assert made.shape == expected.shape == (len(plain), 13, size, size)
    assert torch.allclose(made, expected, atol=1e-6)


def with_marker(count: int, size: int = 12, seed: int = 0) -> Tensor:
    """Noise, and in channel 0 one bright pixel at (3, 4), from which flips and blur can be read off."""
    images = torch.rand(count, 13, size, size, generator=torch.Generator().manual_seed(seed))
    images[:, 0] = 0
    images[:, 0, 3, 4] = 1
    return images


def read_off(image: Tensor) -> tuple[bool, bool, float]:
    """Flipped left-right, flipped top-bottom, sigma of the blur of an augmented image with the marker."""
    marker = image[0].double()
    row, column = divmod(int(marker.argmax()), marker.shape[1])
    centre, beside = marker[row, column], marker[row, column + 1]
    return column != 4, row != 3, math.sqrt(-1 / (2 * math.log(beside / centre)))


def test_each_image_is_flipped_and_blurred_as_torchvision_does_it_alone():
    """What was done is read off the marker, not off the generator, so the order of draws is free to change."""
    images = with_marker(64)
    draws = torch.rand(3, len(images), generator=torch.Generator().manual_seed(1))
    augmented = blur(flip(images.clone(), draws[:2]), draws[2])
    done = [read_off(image) for image in augmented]
    assert len({(horizontal, vertical) for horizontal, vertical, _ in done}) == 4
    assert len({round(sigma, 3) for *_, sigma in done}) > 50, "each image has a blur of its own"
    for image, made, (horizontal, vertical, sigma) in zip(images, augmented, done, strict=True):
        expected = tv.hflip(image) if horizontal else image
        expected = tv.vflip(expected) if vertical else expected
        expected = tv.gaussian_blur(expected, [3, 3], [sigma, sigma])
        assert torch.allclose(made, expected, atol=2e-5)


def test_flips_are_fair_and_independent_and_sigma_is_uniform_from_a_tenth_to_two():
    draws = torch.rand(3, 2000, generator=torch.Generator().manual_seed(2))
    done = [read_off(image) for image in blur(flip(with_marker(2000), draws[:2]), draws[2])]
    horizontal, vertical, sigma = (np.array(values, float) for values in zip(*done, strict=True))
    assert abs(horizontal.mean() - 0.5) < 6 * 0.5 / math.sqrt(2000)
    assert abs(vertical.mean() - 0.5) < 6 * 0.5 / math.sqrt(2000)
    for one, other in ((horizontal, vertical), (horizontal, sigma), (vertical, sigma)):
        assert abs(np.corrcoef(one, other)[0, 1]) < 6 / math.sqrt(2000)
    assert sigma.min() >= 0.0999
    assert sigma.max() <= 2.0001
    quartiles = np.quantile(sigma, [0.25, 0.5, 0.75])
    assert quartiles == pytest.approx([0.575, 1.05, 1.525], abs=0.15)


@needs_gpu
@pytest.mark.parametrize("share", [0.5, 0.0])
def test_batches_on_cuda_are_those_of_the_cpu(pack, share, monkeypatch):
    """Where the split lives on the device, and where it streams."""
    monkeypatch.setattr(batches, "DEVICE_SHARE", share)
    options = {"batch_size": 4, "shuffle": True, "augment": True, "image_size": 32, "seed": 5}
    on_cpu = together(Batches(pack, "train", **options), 3)
    on_gpu = together(Batches(pack, "train", device="cuda", **options), 3)
    assert on_gpu.images.is_cuda
    assert on_gpu.labels.is_cuda
    assert torch.equal(on_gpu.samples.cpu(), on_cpu.samples)
    assert torch.allclose(on_gpu.images.cpu(), on_cpu.images, atol=1e-5)


@pytest.fixture(scope="module")
def labelled_pack(tmp_path_factory, make_pack):
    """12 generated images of 8 px whose target is B02 itself, so that a pixel and its class can't part unnoticed."""
    draw = np.random.default_rng(3)
    images = draw.integers(100, 2000, (12, 13, 8, 8), dtype=np.uint16)
    targets = np.stack([draw.permutation(4).reshape(2, 2) for _ in range(12)]).repeat(4, 1).repeat(4, 2).astype("u1")
    images[:, 1] = 1000 + 100 * targets.astype(np.uint16)
    images[:, 10] = 10
    both, index = list(zip(images, targets, strict=True)), pd.DataFrame({"split": ["train"] * 10 + ["val", "test"]})
    return make_pack(tmp_path_factory.mktemp("labelled"), images=both, index=index, classes=6, targets=True)


def test_every_pixel_keeps_its_class_through_shuffling_and_flips(labelled_pack):
    options = {"batch_size": 4, "shuffle": True, "augment": True, "targets": True}
    flipped = 0
    for batch in Batches(labelled_pack, "train", **options).epoch(3):
        assert batch.targets.dtype == torch.int64
        for image, target, row in zip(batch.images, batch.targets, batch.samples.tolist(), strict=True):
            stored = labelled_pack.targets[row]
            ways = [stored, stored[:, ::-1], stored[::-1], stored[::-1, ::-1]]
            assert any(np.array_equal(target, way) for way in ways)
            flipped += not np.array_equal(target, stored)
            # blurred at the edges of its four squares, yet B02 still goes up and down with the target it was made of
            assert np.corrcoef(image[1].flatten(), target.flatten())[0, 1] > 0.8
    assert flipped > 0


def test_blur_alone_leaves_every_pixel_where_it_was(labelled_pack):
    options = {"batch_size": 5, "augment": True, "flip": False, "targets": True}
    for batch in Batches(labelled_pack, "train", **options, image_size=16).epoch(1):  # targets keep their own grid
        assert np.array_equal(batch.targets, labelled_pack.targets[batch.samples.numpy()])
        plain = to_reflectance(bits(labelled_pack.images[batch.samples.numpy()]), 16)
        assert not torch.equal(batch.images, plain), "it is blurred"
