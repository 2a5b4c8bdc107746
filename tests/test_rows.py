"""Rows read from the file are those of the array, in any order, from any thread; damage is an error, no crash."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import generated_images

from bandmask.batches import Batches
from bandmask.packs import Pack, open_pack
from bandmask.rows import Rows, open_rows


@pytest.fixture
def pack(tmp_path: Path, make_pack: Callable[..., Pack]) -> Pack:
    return make_pack(tmp_path, n=30, size=8)


def read(rows: Rows, where: list[int]) -> np.ndarray:
    out = np.empty((len(where), *rows.array.shape[1:]), rows.array.dtype)
    rows.read(np.array(where), out)
    return out


@pytest.mark.parametrize("where", [[0], [29, 0, 7, 7, 8, 9], list(range(30))])
def test_rows_are_those_of_the_array(pack: Pack, where: list[int]) -> None:
    rows, targets = open_rows(pack)
    assert targets is None
    assert np.array_equal(read(rows, where), generated_images(30, 8)[where])


def test_a_memory_map_is_not_touched_and_arrays_and_parts_of_maps_are_read_as_they_are(pack: Pack) -> None:
    touched = Rows(pack.images)
    touched.array = np.zeros_like(pack.images)  # what is read comes from the file
    assert np.array_equal(read(touched, [3, 1]), generated_images(30, 8)[[3, 1]])
    for array in (generated_images(30, 8), pack.images[5:], pack.images[:, :, ::2], pack.images.astype(np.float32)):
        assert np.array_equal(read(Rows(array), [3, 1]), array[[3, 1]])


def test_threads_read_beside_each_other(pack: Pack) -> None:
    rows, expected = Rows(pack.images), generated_images(30, 8)
    where = [np.random.default_rng(i).permutation(30).tolist() for i in range(200)]
    with ThreadPoolExecutor(8) as pool:
        for order, found in zip(where, pool.map(lambda order: read(rows, order), where), strict=True):
            assert np.array_equal(found, expected[order])


def test_a_file_that_was_cut_is_an_error_that_names_it(pack: Pack) -> None:
    batches = Batches(pack, "train", batch_size=4)  # through a memory map this would be SIGBUS
    os.truncate(pack.path / "images.npy", 8000)
    with pytest.raises(OSError, match=r"images\.npy ends early: the pack is damaged"):
        list(batches.epoch())


def test_a_pack_made_anew_in_the_meantime_is_refused(pack: Pack, make_pack: Callable[..., Pack]) -> None:
    before = open_pack(pack.path)
    make_pack(pack.path.parent, n=30, size=8, seed=0)
    Batches(before, "train")  # the same pack
    other = make_pack(pack.path.parent, n=30, size=8, seed=1)
    with pytest.raises(ValueError, match=r"was made anew while it was in use; open it again"):
        Batches(before, "train")
    Batches(other, "train")
    Batches(replace(other, card={**other.card, "classes": ["x", "y", "z"]}), "train")  # other names, the same images


def test_a_pack_that_is_removed_or_replaced_is_read_to_the_end(pack: Pack, make_pack: Callable[..., Pack]) -> None:
    batches = Batches(pack, "train", batch_size=4)
    first = [batch.images for batch in batches.epoch()]
    make_pack(pack.path.parent, n=30, size=8, seed=1)
    shutil.rmtree(pack.path)
    assert all((a == b.images).all() for a, b in zip(first, batches.epoch(), strict=True))


def test_files_are_closed_with_their_rows(pack: Pack) -> None:
    def count() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    before = count()
    rows = [Rows(pack.images) for _ in range(5)]
    assert count() == before + 5
    del rows
    assert count() == before


def test_a_split_kept_on_the_device_is_the_same(pack: Pack) -> None:
    resident, streamed = (Batches(pack, "train", batch_size=4, shuffle=True, resident=kept) for kept in (True, False))
    for ours, theirs in zip(resident.epoch(3), streamed.epoch(3), strict=True):
        assert (ours.images == theirs.images).all()
        assert (ours.samples == theirs.samples).all()


def test_epochs_that_are_read_side_by_side_do_not_mix(pack: Pack) -> None:
    batches = Batches(pack, "train", batch_size=8, shuffle=True)
    alone = [[batch.images for batch in batches.epoch(number)] for number in (0, 1)]
    both = list(zip(batches.epoch(0), batches.epoch(1), strict=True))
    for number in (0, 1):
        assert all((a == pair[number].images).all() for a, pair in zip(alone[number], both, strict=True))
