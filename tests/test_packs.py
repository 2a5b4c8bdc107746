"""Packs: an opened one says what it holds; a damaged one, or one of other data, is not mistaken for it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import generated_images, generated_index

from bandmask import bands
from bandmask.packs import IGNORE, Pack, check_band_order, fitting_order, open_if_same, open_pack
from bandmask.readers.packing import write_pack

CARD: dict[str, Any] = {
    "name": "generated",
    "classes": ["class 0", "class 1", "class 2"],
    "source": "generated data, no satellite saw it",
    "source_checksum": "generated",
}


@pytest.fixture
def old(tmp_path: Path, make_pack: Callable[..., Pack]) -> Pack:
    """A pack that was made before."""
    return make_pack(tmp_path, n=6)


def test_rows_and_means_are_those_of_the_split(tmp_path: Path, make_pack: Callable[..., Pack]) -> None:
    pack = make_pack(tmp_path, n=24)
    parts = [pack.rows(split) for split in ("train", "val", "test")]
    assert sorted(np.concatenate(parts)) == list(range(24))
    for split, rows in zip(("train", "val", "test"), parts, strict=True):
        assert set(pack.index["split"].iloc[rows]) == {split}
        expected = pack.images[rows].mean((0, 2, 3), dtype=np.float64) / 10_000
        assert pack.band_means(split) == pytest.approx(expected, abs=1e-8)


@pytest.mark.parametrize("ask", [lambda pack: pack.rows("val"), lambda pack: pack.band_means("val")])
def test_a_split_without_images_is_an_error_that_lists_those_there(
    tmp_path: Path, make_pack: Callable[..., Pack], ask: Callable[[Pack], object]
) -> None:
    pack = make_pack(tmp_path, n=4)
    with pytest.raises(ValueError, match=r"'val'.*train"):
        ask(pack)


def test_images_are_a_read_only_memory_map(tmp_path: Path, make_pack: Callable[..., Pack]) -> None:
    images = make_pack(tmp_path).images
    assert isinstance(images, np.memmap)
    with pytest.raises(ValueError, match="read-only"):
        images[0] = 0


@pytest.mark.parametrize(
    ("dark", "advice"), [([], "no known"), (["B10", "B12"], "no known"), (["B02"], "no known"), (["B09"], "'eurosat'")]
)
def test_only_a_dark_b10_alone_passes_the_guard(dark: list[str], advice: str) -> None:
    means = np.array([11.0 if name in dark else 1000.0 for name in bands.NAMES])
    with pytest.raises(ValueError, match=advice):
        check_band_order(means)
    with pytest.warns(UserWarning, match=advice):
        check_band_order(means, strict=False)


ARID = (1397, 1266, 1311, 1614, 1837, 2241, 2541, 2483, 2887, 749, 59, 3444, 2449)  # real tiles' means, L1C
OFFSET = (2518, 2276, 2142, 1970, 2092, 2529, 2756, 2693, 2900, 1523, 1010, 2318, 1861)  # with 1000 DN added
SEA = (1130, 770, 463, 237, 197, 169, 148, 122, 110, 60, 7.4, 18, 8.9)  # EuroSAT's SeaLake_2374
CLOUDS = (1768, 1509, 1348, 1190, 1451, 2545, 3036, 2986, 3267, 1304, 257, 1922, 1376)


@pytest.mark.parametrize("means", [ARID, OFFSET, SEA, CLOUDS])
def test_the_order_that_fits_is_found_where_no_fixed_darkness_holds(means: tuple[float, ...]) -> None:
    check_band_order(means)
    for order in ("satclip", "eurosat"):
        stored = np.array(means)[bands.reorder("satclip", order)]
        name, sure = fitting_order(stored)
        assert bands.ORDERS[name] == bands.ORDERS[order]
        assert 0.5 < sure <= 1
        wrong = "eurosat" if order == "satclip" else "satclip"
        with pytest.raises(ValueError, match=repr(name)):
            check_band_order(stored[bands.reorder(wrong)], wrong)


def test_without_values_of_b10_the_order_is_not_judged() -> None:
    means = np.where(np.array(bands.NAMES) == "B10", np.nan, 1000.0)
    check_band_order(means)
    assert fitting_order(np.full(13, np.nan))[1] == 0.5


def test_a_pack_that_is_not_there_is_an_error_that_says_what_makes_it(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"not-there.*01_data_exploration"):
        open_pack(tmp_path / "not-there")


@pytest.mark.parametrize(
    "damage",
    [
        *("", "{", "[]", "null", "3", '"text"', "{}", '{"format": 0}', '{"format": 1}', "\udcff"),
        *("cut images", "no images", "cut index", "shorter index"),
    ],
)
def test_a_damaged_pack_is_an_error_that_says_to_pack_again(old: Pack, damage: str) -> None:
    if damage == "cut images":
        content = (old.path / "images.npy").read_bytes()
        (old.path / "images.npy").write_bytes(content[: len(content) // 2])
    elif damage == "no images":
        (old.path / "images.npy").unlink()
    elif damage == "cut index":
        (old.path / "index.parquet").write_bytes((old.path / "index.parquet").read_bytes()[:100])
    elif damage == "shorter index":
        generated_index(5).to_parquet(old.path / "index.parquet")
    else:
        (old.path / "pack.json").write_bytes(damage.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=f"{re.escape(str(old.path))}.*delete the folder and pack again"):
        open_pack(old.path)
    assert open_if_same(old.path, "generated-0", {}) is None
    again = write_pack(old.path, generated_images(6, 8), generated_index(6), **CARD)
    assert np.array_equal(again.images, generated_images(6, 8))


def test_a_pack_is_opened_only_if_source_and_options_are_the_same(tmp_path: Path) -> None:
    options = {"order": "satclip", "skip_bad": False}
    path = tmp_path / "pack"
    assert open_if_same(path, "generated", options) is None
    write_pack(path, generated_images(6, 8), generated_index(6), **CARD, options=options)
    assert open_if_same(path, "generated", dict(options)) is not None
    assert open_if_same(path, "another source", options) is None
    assert open_if_same(path, "generated", {**options, "skip_bad": True}) is None


def test_the_card_is_json_that_people_can_read(tmp_path: Path, make_pack: Callable[..., Pack]) -> None:
    pack = make_pack(tmp_path)
    card = json.loads((pack.path / "pack.json").read_text())
    assert "generated" in card["source"]
    assert card["format"] == 1
    assert set(card["mean_dn"]) == {"train", "val", "test"}


# --- targets


def with_targets(path: Path, n: int = 6, size: int = 8) -> tuple[Pack, np.ndarray]:
    """A pack of generated images with generated pixel classes: row i is of class i % 3, a corner has no label."""
    targets = np.repeat(np.arange(n, dtype=np.uint8) % 3, size * size).reshape(n, size, size)
    targets[:, :2, :2] = IGNORE
    items = zip(generated_images(n, size), targets, strict=True)
    return write_pack(path, items, generated_index(n), **CARD, targets=True), targets


def test_a_pack_without_pixel_labels_has_no_targets(old: Pack) -> None:
    assert old.targets is None
    assert old.card["targets"] is False


def test_a_pack_of_before_targets_existed_is_opened(old: Pack) -> None:
    card = json.loads((old.path / "pack.json").read_text())
    del card["targets"]
    (old.path / "pack.json").write_text(json.dumps(card))
    assert open_pack(old.path).targets is None


def test_targets_are_a_read_only_memory_map_of_class_indices(tmp_path: Path) -> None:
    pack, expected = with_targets(tmp_path / "pack")
    for opened in (pack, open_pack(pack.path)):
        assert opened.targets is not None
        assert isinstance(opened.targets, np.memmap)
        assert opened.targets.dtype == np.uint8
        assert np.array_equal(opened.targets, expected)
        with pytest.raises(ValueError, match="read-only"):
            opened.targets[0] = 0


@pytest.mark.parametrize("damage", ["no targets", "fewer targets", "smaller targets", "other numbers"])
def test_targets_that_do_not_fit_the_images_are_an_error(tmp_path: Path, damage: str) -> None:
    pack, targets = with_targets(tmp_path / "pack")
    file = pack.path / "targets.npy"
    file.unlink()
    if damage != "no targets":
        others = {"fewer targets": targets[1:], "smaller targets": targets[:, 1:], "other numbers": targets.astype(int)}
        np.save(file, others[damage])
    with pytest.raises(ValueError, match="delete the folder and pack again"):
        open_pack(pack.path)
