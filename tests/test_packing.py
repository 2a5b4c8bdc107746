"""Packing: what goes in comes out, reordered; a failed or killed write loses nothing, and a long one goes on."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from conftest import generated_images, generated_index

from bandmask import bands
from bandmask.packs import IGNORE, Pack, open_pack
from bandmask.readers import streaming
from bandmask.readers.packing import write_pack
from bandmask.readers.streaming import BadImagesError

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
from bandmask.readers.packing import write_pack

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


def test_channels_are_put_in_satclip_order(tmp_path: Path, make_pack: Callable[..., Pack]) -> None:
    images = generated_images(6, 8)
    pack = make_pack(tmp_path, images=images[:, EUROSAT_ORDER], order="eurosat")
    assert np.array_equal(pack.images, images)
    assert pack.card["stored_order"] == "eurosat"
    dark = pack.band_means() < 0.005
    assert [name for name, is_dark in zip(bands.NAMES, dark, strict=True) if is_dark] == ["B10"]


@pytest.mark.parametrize("as_function", [False, True])
def test_images_are_streamed_one_at_a_time(tmp_path: Path, make_pack: Callable[..., Pack], as_function: bool) -> None:
    made: list[weakref.ref[np.ndarray]] = []

    def images(_: int = 0) -> Iterator[np.ndarray]:
        for image in generated_images(6, 8):
            made.append(weakref.ref(image))
            assert sum(reference() is not None for reference in made) <= 2
            yield image

    make_pack(tmp_path, images=images if as_function else images(), index=generated_index(6))
    assert len(made) == 6


def test_an_opened_pack_stays_readable_while_it_is_replaced(old: Pack) -> None:
    before = np.array(old.images)
    new = replace_old(old, generated_images(6, 8, seed=1))
    assert np.array_equal(old.images, before)
    assert not np.array_equal(new.images, before)


# --- the guard on band order


def test_files_read_in_the_wrong_order_are_refused_with_the_order_that_fits(old: Pack) -> None:
    before, images = contents(old), generated_images(6, 8)
    with pytest.raises(ValueError, match=r"read as 'satclip'.*order='eurosat'"):
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


# --- targets


def generated_targets(n: int, size: int = 8) -> np.ndarray:
    """(n, size, size) uint8, generated: mostly class i % 3 in image i, a few pixels of others and without a label."""
    targets = np.repeat(np.arange(n, dtype=np.uint8) % 3, size * size).reshape(n, size, size)
    targets[:, 0] = 2
    targets[:, 1, :3] = IGNORE
    return targets


def test_targets_come_out_as_they_went_in(tmp_path: Path) -> None:
    targets, images = generated_targets(6), generated_images(6, 8)
    items = zip(images[:, EUROSAT_ORDER], targets, strict=True)
    pack = write_pack(tmp_path / "pack", items, generated_index(6), **CARD, order="eurosat", targets=True)
    assert pack.targets is not None
    assert np.array_equal(pack.targets, targets)
    assert np.array_equal(pack.images, images), "reordering channels must not touch targets"
    assert listing(pack.path) == ["images.npy", "index.parquet", "pack.json", "targets.npy"]


def test_without_labels_an_image_has_its_most_frequent_class_and_minus_one_where_no_pixel_has_one(
    tmp_path: Path,
) -> None:
    targets = generated_targets(6)
    targets[4] = IGNORE
    index = generated_index(6).drop(columns="label")
    pack = write_pack(tmp_path / "pack", zip(generated_images(6, 8), targets, strict=True), index, **CARD, targets=True)
    expected = [np.bincount(target[target != IGNORE]).argmax() if i != 4 else -1 for i, target in enumerate(targets)]
    assert pack.labels.tolist() == expected
    own = generated_index(6).assign(label=[2, -1, 0, 1, 2, 0])
    items = zip(generated_images(6, 8), targets, strict=True)
    assert write_pack(tmp_path / "own", items, own, **CARD, targets=True).labels.tolist() == own["label"].tolist()


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (np.zeros((8, 9), np.uint8), r"target 2 is \(8, 9\) uint8; expected \(8, 8\)"),
        (np.zeros((8, 8), np.int64), r"target 2 is \(8, 8\) int64"),
        (np.full((8, 8), 3, np.uint8), r"target 2 has classes \[3\]; there are 3.*255"),
        (np.full((8, 8), 254, np.uint8), r"target 2 has classes \[254\]"),
    ],
    ids=["other size", "other numbers", "no such class", "neither class nor ignore"],
)
def test_targets_that_mean_nothing_are_refused_by_number(tmp_path: Path, target: np.ndarray, message: str) -> None:
    targets = [*generated_targets(6)]
    targets[2] = target
    items = zip(generated_images(6, 8), targets, strict=True)
    with pytest.raises(ValueError, match=message):
        write_pack(tmp_path / "pack", items, generated_index(6), **CARD, targets=True)
    assert listing(tmp_path) == []


def test_counts_of_single_images_are_summed_up_in_the_card(tmp_path: Path) -> None:
    counts = [{"code 99": 2}, {}, {"code 99": 1, "code 7": 5}, {}, {}, {}]
    items = zip(generated_images(6, 8), generated_targets(6), counts, strict=True)
    pack = write_pack(tmp_path / "pack", items, generated_index(6), **CARD, targets=True)
    assert pack.card["counts"] == {"code 99": 3, "code 7": 5}


# --- bad images


def test_bad_images_are_all_named_and_counted_or_left_out_and_listed(tmp_path: Path) -> None:
    images: list[Any] = [*generated_images(24, 8)]
    images[3], images[7] = ValueError("12 bands, expected 13"), OSError("can't be opened")
    message = r"(?s)2 of 24 images.*generated/3: 12 bands.*generated/7: can't.*skip_bad.*No pack was written"
    with pytest.raises(BadImagesError, match=message):
        write_pack(tmp_path / "pack", images, generated_index(24), **CARD)
    assert listing(tmp_path) == []
    pack = write_pack(tmp_path / "pack", images, generated_index(24), **CARD, skip_bad=True)
    good = [row for row in range(24) if row not in (3, 7)]
    assert pack.card["skipped"] == {"generated/3": "12 bands, expected 13", "generated/7": "can't be opened"}
    assert np.array_equal(pack.images, generated_images(24, 8)[good])
    assert pack.index["file"].tolist() == [f"generated/{row}" for row in good]
    rows = pack.rows("train")
    assert pack.band_means() == pytest.approx(pack.images[rows].mean((0, 2, 3), dtype=np.float64) / 10_000, abs=1e-8)


def test_very_many_bad_images_are_counted_and_the_first_named(tmp_path: Path) -> None:
    with pytest.raises(BadImagesError, match=r"200 of 200 images can't be packed:\n(  .*\n){50}  … and 150 more"):
        write_pack(tmp_path / "pack", [ValueError("nothing but zeros")] * 200, generated_index(200), **CARD)


def test_with_no_good_image_there_is_no_pack(tmp_path: Path) -> None:
    with pytest.raises(BadImagesError, match="6 of 6 images"):
        write_pack(tmp_path / "pack", [ValueError("empty")] * 6, generated_index(6), **CARD, skip_bad=True)


# --- disk


def test_too_small_a_disk_is_known_before_the_first_byte(old: Pack, monkeypatch: pytest.MonkeyPatch) -> None:
    before, asked = contents(old), []

    def images() -> Iterator[np.ndarray]:
        for image in generated_images(6, 8):
            asked.append(image)
            yield image

    usage = shutil.disk_usage(old.path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=9_000))
    for given in (images(), lambda start: images()):
        asked.clear()
        with pytest.raises(OSError, match=r"6 images: 10\.1 kB needed, 9\.0 kB free in .*BANDMASK_OUTPUTS"):
            replace_old(old, given)
        assert len(asked) == 1
    assert contents(open_pack(old.path)) == before
    partial = old.path.with_name(".generated.packing")
    assert (partial / "images.npy").stat().st_size == 0


def test_the_disk_needed_is_said_beforehand(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    targets = generated_targets(24, 64)
    items = zip(generated_images(24, 64), targets, strict=True)
    pack = write_pack(tmp_path / "pack", items, generated_index(24), **CARD, targets=True, progress=True)
    words = r"packing generated: 24 images: ([\d.]+) MB needed, [\d.,]+ .B free in (.*)"
    said = re.search(words, capsys.readouterr().out)
    assert said is not None
    taken = sum((pack.path / name).stat().st_size for name in ("images.npy", "targets.npy"))
    assert float(said[1]) == pytest.approx(taken / 1e6, abs=0.05)
    assert said[2] == str(tmp_path)


# --- a packing that goes on where it stopped


class Source:
    """Images as a function of the first row; notes from where they were asked for, and may break at a row."""

    def __init__(self, n: int = 24, breaks_at: int | None = None) -> None:
        self.items = list(zip(generated_images(n, 8), generated_targets(n), strict=True))
        self.breaks_at, self.starts, self.given = breaks_at, [], 0

    def __call__(self, start: int) -> Iterable[Any]:
        self.starts.append(start)
        for row in range(start, len(self.items)):
            if row == self.breaks_at:
                raise RuntimeError("the reader broke")
            self.given += 1
            yield self.items[row]


@pytest.fixture
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Note the progress every 4 rows."""
    monkeypatch.setattr(streaming, "SAVE_ROWS", 4)


def pack_from(source: Any, path: Path, index: pd.DataFrame | None = None, **card: Any) -> Pack:
    index = generated_index(24).drop(columns="label") if index is None else index
    return write_pack(path, source, index, **{**CARD, "options": {"rules": 1}, **card}, targets=True)


def test_a_function_of_the_first_row_packs_what_an_iterable_packs(tmp_path: Path) -> None:
    source = Source()
    assert contents(pack_from(source, tmp_path / "a")) == contents(pack_from(source.items, tmp_path / "b"))
    assert listing(tmp_path) == ["a", "b"]
    assert source.starts == [0]


def test_an_interrupted_packing_goes_on_and_ends_the_same(tmp_path: Path, often: None) -> None:
    expected = contents(pack_from(Source(), tmp_path / "undisturbed"))
    for row in (10, 17):
        with pytest.raises(RuntimeError, match="the reader broke"):
            pack_from(Source(breaks_at=row), tmp_path / "pack")
        assert not (tmp_path / "pack").exists()
    last = Source()
    assert contents(pack_from(last, tmp_path / "pack")) == expected
    assert last.starts == [17]
    assert listing(tmp_path) == ["pack", "undisturbed"]


def test_rows_that_no_note_speaks_of_are_cut_off(tmp_path: Path, often: None) -> None:
    """As a kill between writing and noting leaves them."""
    expected = contents(pack_from(Source(), tmp_path / "undisturbed"))
    with pytest.raises(RuntimeError):
        pack_from(Source(breaks_at=10), tmp_path / "pack")
    for name in ("images.npy", "targets.npy"):
        with (tmp_path / ".pack.packing" / name).open("ab") as file:
            file.write(b"half a row")
    assert contents(pack_from(Source(), tmp_path / "pack")) == expected


@pytest.mark.parametrize("change", ["source", "options", "index", "name", "order"])
def test_another_packing_to_the_same_place_begins_anew(tmp_path: Path, change: str, often: None) -> None:
    with pytest.raises(RuntimeError):
        pack_from(Source(breaks_at=10), tmp_path / "pack")
    index, card = generated_index(24).drop(columns="label"), {}
    if change == "index":
        index["file"] = index["file"].str.upper()
    else:
        new = {"source": ("source_checksum", "new"), "options": ("options", {"rules": 2}), "name": ("name", "other")}
        key, value = new.get(change, ("order", "eurosat"))
        card = {key: value}
    source = Source()
    if change == "order":
        source.items = [(image[EUROSAT_ORDER], target) for image, target in source.items]
    pack = pack_from(source, tmp_path / "pack", index, **card)
    assert source.starts == [0]
    assert np.array_equal(pack.images, generated_images(24, 8))


def test_bad_images_do_not_make_the_good_ones_be_read_again(tmp_path: Path, often: None) -> None:
    source = Source()
    source.items[2], source.items[9] = ValueError("truncated"), ValueError("12 bands")
    with pytest.raises(BadImagesError, match=r"2 of 24 images(.|\n)*generated/2: truncated\n  generated/9: 12 bands"):
        pack_from(source, tmp_path / "pack")
    again = Source()
    pack = pack_from(again, tmp_path / "pack", skip_bad=True)
    assert again.given == 0
    good = [row for row in range(24) if row not in (2, 9)]
    assert np.array_equal(pack.images, generated_images(24, 8)[good])
    assert np.array_equal(pack.targets, generated_targets(24)[good])
    assert list(pack.card["skipped"]) == ["generated/2", "generated/9"]
    assert listing(tmp_path) == ["pack"]


def test_files_put_right_are_read_again(tmp_path: Path) -> None:
    source = Source()
    source.items[2] = ValueError("truncated")
    with pytest.raises(BadImagesError):
        pack_from(source, tmp_path / "pack")
    assert len(pack_from(Source(), tmp_path / "pack").images) == 24


def test_the_guard_holds_here_too_and_leaves_nothing(tmp_path: Path) -> None:
    source = Source()
    source.items = [(image[EUROSAT_ORDER], target) for image, target in source.items]
    with pytest.raises(ValueError, match="it would fit if read as order='eurosat'"):
        pack_from(source, tmp_path / "pack")
    assert listing(tmp_path) == []


def test_two_packings_to_one_place_at_once_are_refused(tmp_path: Path) -> None:
    problems = []

    def images(start: int) -> Iterator[Any]:
        for row, item in enumerate(Source().items[start:], start):
            if row == 5:
                with pytest.raises(BlockingIOError, match=f"another process is packing to {re.escape(str(path))}") as e:
                    pack_from(Source(), path)
                problems.append(e)
            yield item

    path = tmp_path / "pack"
    assert np.array_equal(pack_from(images, path).images, generated_images(24, 8))
    assert len(problems) == 1


def test_an_old_pack_is_replaced_only_once_the_new_one_is_whole(old: Pack) -> None:
    before = contents(old)
    with pytest.raises(RuntimeError):
        pack_from(Source(breaks_at=10), old.path)
    assert contents(open_pack(old.path)) == before
    assert len(pack_from(Source(), old.path).images) == 24
    assert listing(old.path.parent) == ["generated"]


KILLED = """
import sys, time
import numpy as np, pandas as pd
from bandmask.readers import streaming
from bandmask.readers.packing import write_pack

streaming.SAVE_ROWS = 8
rows, slow = 40, len(sys.argv) > 2

def images(start):
    print("from", start, flush=True)
    for row in range(start, rows):
        if slow and row == 29:
            print("half", flush=True)
            time.sleep(600)
        image = np.full((13, 16, 16), 2000 + row, np.uint16)
        image[10] = 7
        yield image, np.full((16, 16), row % 2, np.uint8)

index = pd.DataFrame({"file": [f"generated/{row}" for row in range(rows)], "split": ["train", "test"] * (rows // 2)})
write_pack(sys.argv[1], images, index, name="generated", classes=["a", "b"], source="generated data",
           source_checksum="new", targets=True)
"""


def test_killed_with_kill_9_it_goes_on_and_ends_as_if_nothing_had_happened(tmp_path: Path) -> None:
    def run(path: Path) -> str:
        script = [sys.executable, "-c", KILLED, str(path)]
        return subprocess.run(script, capture_output=True, text=True, timeout=300, check=True).stdout

    assert run(tmp_path / "undisturbed") == "from 0\n"
    script = [sys.executable, "-c", KILLED, str(tmp_path / "pack"), "slow"]
    with subprocess.Popen(script, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert [process.stdout.readline() for _ in range(2)] == ["from 0\n", "half\n"]
        finally:
            process.kill()
    assert process.returncode == -signal.SIGKILL
    assert not (tmp_path / "pack").exists()
    assert json.loads((tmp_path / ".pack.packing" / "progress.json").read_text())["read"] == 24
    assert run(tmp_path / "pack") == "from 24\n", "at most one interval of 8 rows is read again"
    assert contents(open_pack(tmp_path / "pack")) == contents(open_pack(tmp_path / "undisturbed"))
    assert listing(tmp_path) == ["pack", "undisturbed"]


def test_a_disk_that_fills_up_keeps_what_is_packed(on_small_disk: Callable[..., Any]) -> None:
    """4 MB of disk that claims to have more; the same call goes on once there is space."""
    writer = KILLED.replace("40", "400").replace("(16, 16)", "(64, 64)").replace("13, 16, 16", "13, 64, 64")
    call, again = writer.split("\nwrite_pack(")
    again = f"write_pack({again}"
    lies = "import shutil\nusage = shutil.disk_usage\nshutil.disk_usage = lambda p: usage(p)._replace(free=10**12)\n"
    guarded = "try:\n    " + again.strip().replace("\n", "\n    ") + "\nexcept OSError as error:\n    print(error)\n"
    larger = "import subprocess\nsubprocess.run(['mount', '-o', 'remount,size=90m', '.'], check=True)\n"
    script = "import sys\nsys.argv = ['', 'pack']\n" + call + "\n" + lies + guarded + larger + again
    answer = on_small_disk(script + "from bandmask.packs import open_pack\nprint(open_pack('pack').images.shape)")
    assert answer.returncode == 0, answer.stderr
    first, problem, second, shape = answer.stdout.splitlines()
    assert first == "from 0"
    assert "can't write pack: No space left on device. What is packed so far stays" in problem
    assert int(second.removeprefix("from ")) > 0
    assert shape == "(400, 13, 64, 64)"


def test_what_is_left_of_a_pack_without_its_card_is_packed_over(old: Pack) -> None:
    """Whoever deletes the card takes the pack away, but must not keep the next packing out."""
    (old.path / "pack.json").unlink()
    replaced = replace_old(old, generated_images(6, 8))
    assert listing(replaced.path) == ["images.npy", "index.parquet", "pack.json"]
