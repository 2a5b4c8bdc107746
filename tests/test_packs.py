"""Packs: what goes in comes out, reordered; a failed, killed or impossible write loses nothing and leaves nothing."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from conftest import generated_images, generated_index

from bandmask import bands
from bandmask.packs import Pack, check_band_order, open_if_same, open_pack, write_pack

CARD: dict[str, Any] = {
    "name": "generated",
    "classes": ["class 0", "class 1", "class 2"],
    "source": "generated data, no satellite saw it",
    "source_checksum": "generated",
}
EUROSAT_ORDER = [0, 1, 2, 3, 4, 5, 6, 7, 9, 10, 11, 12, 8]  # SatCLIP channels as EuroSAT's files hold them

# A writer in its own process: `sys.argv` is the pack's folder, then how many images to make before doing `then`.
WRITER = """
import resource, sys, time
import numpy as np, pandas as pd
from bandmask.packs import write_pack

def images(count):
    for i in range(count):
        image = np.full((13, 64, 64), 2000 + i, np.uint16)
        image[10] = 7
        yield image
        {during}

index = pd.DataFrame({{"label": 0, "split": ["train"] * {count}}})
{before}
try:
    write_pack(sys.argv[1], images({count}), index, name="generated", classes=["a"], source="generated data",
               source_checksum="new")
except OSError as error:
    print(error)
"""


def listing(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def contents(pack: Pack) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(pack.path.iterdir())}


@pytest.fixture
def old(tmp_path: Path, make_pack: Callable[..., Pack]) -> Pack:
    """A pack that lies where the next one is to be written."""
    return make_pack(tmp_path, n=6)


def replace_old(old: Pack, images: Any, index: pd.DataFrame | None = None, **card: Any) -> Pack:
    index = generated_index(6) if index is None else index
    return write_pack(old.path, images, index, **{**CARD, "source_checksum": "new", **card})


# --- there and back


def test_what_is_written_is_read(tmp_path: Path, make_pack: Callable[..., Pack]) -> None:
    images, index = generated_images(24, 8), generated_index(24)
    written = make_pack(tmp_path, n=24, size=8, note="a further entry")
    for pack in (written, open_pack(written.path), open_pack(str(written.path))):
        assert np.array_equal(pack.images, images)
        assert pack.images.dtype == np.uint16
        pd.testing.assert_frame_equal(pack.index, index, check_dtype=False)
        assert pack.labels.dtype == np.int64
        assert pack.classes == ("class 0", "class 1", "class 2")
        assert pack.checksum == "generated-0"
        assert pack.card["note"] == "a further entry"
        assert pack.card["bands"] == list(bands.NAMES)
        assert pack.card["dataset"] == "generated"
    assert listing(tmp_path) == ["generated"]


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


def test_channels_are_put_in_satclip_order(tmp_path: Path, make_pack: Callable[..., Pack]) -> None:
    images = generated_images(6, 8)
    pack = make_pack(tmp_path, images=images[:, EUROSAT_ORDER], order="eurosat")
    assert np.array_equal(pack.images, images)
    assert pack.card["stored_order"] == "eurosat"
    dark = pack.band_means() < 0.005
    assert [name for name, is_dark in zip(bands.NAMES, dark, strict=True) if is_dark] == ["B10"]


def test_images_are_streamed_one_at_a_time(tmp_path: Path, make_pack: Callable[..., Pack]) -> None:
    made: list[weakref.ref[np.ndarray]] = []

    def images() -> Iterator[np.ndarray]:
        for image in generated_images(6, 8):
            made.append(weakref.ref(image))
            assert sum(reference() is not None for reference in made) <= 2
            yield image

    make_pack(tmp_path, images=images(), index=generated_index(6))


def test_an_opened_pack_stays_readable_while_it_is_replaced(old: Pack) -> None:
    before = np.array(old.images)
    new = replace_old(old, generated_images(6, 8, seed=1))
    assert np.array_equal(old.images, before)
    assert not np.array_equal(new.images, before)


# --- the guard on band order


def test_files_read_in_the_wrong_order_are_refused_with_the_order_that_fits(old: Pack) -> None:
    before, images = contents(old), generated_images(6, 8)
    with pytest.raises(ValueError, match=r"read as 'satclip', cirrus.*'B09'.*order='eurosat'.*B01 \d+, B02 \d+"):
        replace_old(old, images[:, EUROSAT_ORDER], order="satclip")
    with pytest.raises(ValueError, match=r"read as 'eurosat'.*it would fit if read as order='satclip'"):
        replace_old(old, images, order="eurosat")
    assert contents(open_pack(old.path)) == before
    assert listing(old.path.parent) == ["generated"]


def test_the_guard_warns_where_it_is_not_strict(old: Pack) -> None:
    images = generated_images(6, 8)[:, EUROSAT_ORDER]
    with pytest.warns(UserWarning, match=r"band order is wrong.*order='eurosat'"):
        pack = replace_old(old, images, strict_guard=False)
    assert np.array_equal(pack.images, images)


@pytest.mark.parametrize(
    ("dark", "message"),
    [
        ([], r"dark channels are none; no known order fits"),
        (["B10", "B12"], r"\['B10', 'B12'\]; no known order fits"),
        (["B02"], r"\['B02'\]; no known order fits"),
        (["B09"], r"\['B09'\]; it would fit if read as order='eurosat'"),
    ],
)
def test_only_a_dark_b10_alone_passes_the_guard(dark: list[str], message: str) -> None:
    means = np.array([11.0 if name in dark else 1000.0 for name in bands.NAMES])
    with pytest.raises(ValueError, match=message):
        check_band_order(means)
    check_band_order(np.array([11.0 if name == "B10" else 1000.0 for name in bands.NAMES]))


# --- what can't be packed


@pytest.mark.parametrize("count", [0, 5, 7])
def test_another_number_of_images_than_rows_is_refused(old: Pack, count: int) -> None:
    before = contents(old)
    with pytest.raises(ValueError, match=r"images for 6 rows"):
        replace_old(old, generated_images(count, 8))
    assert contents(open_pack(old.path)) == before


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([*generated_images(5, 8), np.zeros((13, 9, 8), np.uint16)], r"image 5 is \(13, 9, 8\)"),
        (generated_images(6, 8).astype(np.float32), r"image 0 is .* float32"),
        (generated_images(6, 8).astype(np.int16), r"image 0 is .* int16"),
        (generated_images(6, 8)[:, :12], r"image 0 is \(12, 8, 8\)"),
        (np.concatenate([generated_images(6, 8)] * 2, axis=1)[:, :14], r"image 0 is \(14, 8, 8\)"),
        (generated_images(6, 8)[:, :, 0], r"image 0 is \(13, 8\)"),
    ],
    ids=["other size", "float", "signed", "12 bands", "14 bands", "no image"],
)
def test_images_that_do_not_fit_a_pack_are_refused_by_number(old: Pack, images: Any, message: str) -> None:
    before = contents(old)
    with pytest.raises(ValueError, match=message):
        replace_old(old, images)
    assert contents(open_pack(old.path)) == before
    assert listing(old.path.parent) == ["generated"]


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (generated_index(6).drop(columns="label"), "label"),
        (generated_index(6).drop(columns="split"), "split"),
        (generated_index(6).assign(label=3), "3"),
        (generated_index(6).assign(label=-1), "-1"),
        (generated_index(6)[:0], "0 rows"),
    ],
    ids=["no label", "no split", "label beyond classes", "negative label", "no rows"],
)
def test_rows_that_mean_nothing_are_refused_before_they_are_packed(
    old: Pack, index: pd.DataFrame, message: str
) -> None:
    before = contents(old)
    with pytest.raises(ValueError, match=message):
        replace_old(old, generated_images(len(index), 8) if len(index) else [], index)
    assert contents(open_pack(old.path)) == before


def test_an_unknown_order_is_refused(old: Pack) -> None:
    with pytest.raises(ValueError, match="unknown channel order 'landsat'; available: satclip, sen12ms, eurosat"):
        replace_old(old, generated_images(6, 8), order="landsat")


@pytest.mark.parametrize("named", ["folder", "file"])
def test_what_is_no_pack_is_not_replaced_by_one(tmp_path: Path, named: str) -> None:
    """`path=` a data folder, or one's home, must not delete it."""
    target = tmp_path / "thesis"
    if named == "folder":
        target.mkdir()
    mine = target / "chapter1.txt" if named == "folder" else target
    mine.write_text("years of work")
    with pytest.raises((ValueError, OSError), match=re.escape(str(target))):
        write_pack(target, generated_images(6, 8), generated_index(6), **CARD)
    assert mine.read_text() == "years of work"
    assert listing(tmp_path) == ["thesis"]


def test_an_empty_folder_may_be_packed_into(tmp_path: Path) -> None:
    (tmp_path / "pack").mkdir()
    assert len(write_pack(tmp_path / "pack", generated_images(6, 8), generated_index(6), **CARD).images) == 6


# --- opening


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
    again = replace_old(old, generated_images(6, 8))
    assert np.array_equal(again.images, generated_images(6, 8))


def test_a_pack_is_opened_only_if_source_and_options_are_the_same(tmp_path: Path) -> None:
    options = {"order": "satclip", "skip_bad": False}
    path = tmp_path / "pack"
    assert open_if_same(path, "generated", options) is None
    write_pack(path, generated_images(6, 8), generated_index(6), **CARD, options=options)
    assert open_if_same(path, "generated", dict(options)) is not None
    assert open_if_same(path, "another source", options) is None
    assert open_if_same(path, "generated", {**options, "skip_bad": True}) is None


# --- faults


def test_a_failing_source_leaves_the_old_pack_and_no_litter(old: Pack) -> None:
    before = contents(old)

    def images() -> Iterator[np.ndarray]:
        yield from generated_images(3, 8)
        raise RuntimeError("the reader broke")

    with pytest.raises(RuntimeError, match="the reader broke"):
        replace_old(old, images())
    assert contents(open_pack(old.path)) == before
    assert listing(old.path.parent) == ["generated"]


def test_killed_while_packing_the_old_pack_stays_and_packing_again_sweeps(old: Pack) -> None:
    before, folder = contents(old), old.path.parent
    script = WRITER.format(count=50, before="", during="if i == 20: print('half', flush=True); time.sleep(600)")
    with subprocess.Popen([sys.executable, "-c", script, str(old.path)], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "half\n"
        finally:
            process.kill()
    assert process.returncode == -signal.SIGKILL
    assert contents(open_pack(old.path)) == before
    assert len(listing(folder)) == 2, "the killed writer left nothing, so the kill came too late to prove anything"
    images = generated_images(6, 8, seed=5)
    assert np.array_equal(replace_old(old, images).images, images)
    assert listing(folder) == ["generated"]


def test_a_full_disk_is_an_error_and_no_crash(on_small_disk: Callable[..., Any]) -> None:
    """4 MB of disk, an old pack of 1 MB and a new one of 21 MB: a memory map alone would end in a bus error."""
    first = WRITER.format(count=10, before="sys.argv = ['', 'pack']", during="")
    second = WRITER.format(count=200, before="", during="")
    check = (
        "import os\nfrom bandmask.packs import open_pack\n"
        "pack = open_pack('pack')\nprint(os.listdir(), pack.images.shape, int(pack.images[9, 0, 0, 0]))"
    )
    answer = on_small_disk(first + second + check)
    assert answer.returncode == 0, f"exit {answer.returncode}: {answer.stderr}"
    assert "can't write pack: No space left on device" in answer.stdout
    assert "BANDMASK_OUTPUTS" in answer.stdout
    assert answer.stdout.endswith("['pack'] (10, 13, 64, 64) 2009\n")


def test_a_limit_on_file_size_is_an_error_and_leaves_the_old_pack(old: Pack) -> None:
    before = contents(old)
    limit = "resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))"
    script = WRITER.format(count=200, before=limit, during="")
    answer = subprocess.run(
        [sys.executable, "-c", script, str(old.path)], capture_output=True, text=True, timeout=300, check=False
    )
    assert f"can't write {old.path}: File too large" in answer.stdout, answer.stderr
    assert contents(open_pack(old.path)) == before
    assert listing(old.path.parent) == ["generated"]


@pytest.mark.parametrize("below", ["file/pack", "file/deeper/pack"])
def test_a_place_that_can_not_hold_a_pack_is_named(tmp_path: Path, below: str) -> None:
    (tmp_path / "file").write_text("a file, not a folder")
    target = tmp_path / below
    with pytest.raises(OSError, match=f"can't write {re.escape(str(target))}.*BANDMASK_OUTPUTS"):
        write_pack(target, generated_images(6, 8), generated_index(6), **CARD)
    assert listing(tmp_path) == ["file"]


def test_a_pack_on_a_read_only_disk_can_be_read_and_not_replaced(on_small_disk: Callable[..., Any]) -> None:
    script = (
        WRITER.format(count=10, before="sys.argv = ['', 'pack']", during="")
        + "import subprocess\nsubprocess.run(['mount', '-o', 'remount,ro', '.'], check=True)\n"
        + WRITER.format(count=20, before="", during="")
        + "from bandmask.packs import open_pack\nprint(open_pack('pack').images.shape)"
    )
    answer = on_small_disk(script)
    assert "can't write pack: Read-only file system" in answer.stdout, answer.stderr
    assert answer.stdout.endswith("(10, 13, 64, 64)\n")


def test_the_card_is_json_that_people_can_read(tmp_path: Path, make_pack: Callable[..., Pack]) -> None:
    pack = make_pack(tmp_path)
    card = json.loads((pack.path / "pack.json").read_text())
    assert "generated" in card["source"]
    assert card["format"] == 1
    assert set(card["mean_dn"]) == {"train", "val", "test"}
