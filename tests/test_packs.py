"""Packs: what goes in comes out; a failed or killed write loses nothing; what is damaged or changed is not opened."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from conftest import generated_images, generated_index

from bandmask import bands, packs
from bandmask.packs import IGNORE, Pack, open_if_same, open_pack, write_pack

CARD: dict[str, Any] = {
    "name": "generated",
    "classes": ["class 0", "class 1", "class 2"],
    "source": "generated data, no satellite saw it",
    "source_checksum": "generated",
}
EUROSAT_ORDER = [0, 1, 2, 3, 4, 5, 6, 7, 9, 10, 11, 12, 8]  # SatCLIP channels as EuroSAT's files hold them


def listing(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def contents(pack: Pack) -> dict[str, bytes]:
    return {name: (pack.path / name).read_bytes() for name in listing(pack.path)}


def generated_targets(n: int, size: int = 8) -> np.ndarray:
    """(n, size, size) uint8, generated: mostly class i % 3 in image i, a few pixels of others and without a label."""
    targets = np.repeat(np.arange(n, dtype=np.uint8) % 3, size * size).reshape(n, size, size)
    targets[:, 0], targets[:, 1, :3] = 2, IGNORE
    return targets


@pytest.fixture
def old(tmp_path: Path, make_pack: Callable[..., Pack]) -> Pack:
    """A pack that lies where the next one is to be written."""
    return make_pack(tmp_path, n=6)


def replace_old(old: Pack, images: Any, index: pd.DataFrame | None = None, **card: Any) -> Pack:
    index, read = generated_index(6) if index is None else index, images if callable(images) else images.__getitem__
    return write_pack(old.path, read, index, **{**CARD, "source_checksum": "new", **card})


# --- there and back


def test_what_is_written_is_read(tmp_path: Path, make_pack: Callable[..., Pack]) -> None:
    images, index = generated_images(24, 8), generated_index(24)
    written = make_pack(tmp_path, n=24, size=8, images=images[:, EUROSAT_ORDER], order="eurosat", note="further")
    for pack in (written, open_pack(str(written.path))):
        assert np.array_equal(pack.images, images)
        assert (pack.images.dtype, pack.labels.dtype) == (np.uint16, np.int64)
        pd.testing.assert_frame_equal(pack.index, index, check_dtype=False)
        assert (pack.classes, pack.checksum) == (("class 0", "class 1", "class 2"), "generated-0")
        assert pack.card["bands"] == list(bands.NAMES)
        assert [pack.card[key] for key in ("note", "dataset", "stored_order")] == ["further", "generated", "eurosat"]
        for split in ("train", "val", "test"):
            rows = pack.rows(split)
            assert set(pack.index["split"].iloc[rows]) == {split}
            assert pack.band_means(split) * 1e4 == pytest.approx(images[rows].mean((0, 2, 3)), abs=1e-4)
    assert listing(tmp_path) == ["generated"]
    with pytest.raises(ValueError, match="read-only"):
        written.images[0] = 0
    with pytest.raises(FileNotFoundError, match=r"not-there.*01_data_exploration"):
        open_pack(tmp_path / "not-there")
    for ask in (Pack.rows, Pack.band_means):
        with pytest.raises(ValueError, match=r"'other'.*train"):
            ask(written, "other")


def test_targets_come_out_as_they_went_in_and_label_their_images(tmp_path: Path) -> None:
    targets, images = generated_targets(6), generated_images(6, 8)
    targets[4] = IGNORE
    items = list(zip(images[:, EUROSAT_ORDER], targets, strict=True)).__getitem__
    options = {**CARD, "order": "eurosat", "targets": True}
    pack = write_pack(tmp_path / "pack", items, generated_index(6).drop(columns="label"), **options)
    assert np.array_equal(pack.targets, targets)
    assert np.array_equal(pack.images, images), "reordering channels must not touch targets"
    assert pack.labels.tolist() == [
        np.bincount(target[target != IGNORE]).argmax() if i != 4 else -1 for i, target in enumerate(targets)
    ]
    own = generated_index(6).assign(label=[2, -1, 0, 1, 2, 0])
    assert write_pack(tmp_path / "own", items, own, **options).labels.tolist() == own["label"].tolist()


def test_rows_are_read_and_no_page_of_them_is_kept(tmp_path: Path, make_pack: Callable[..., Pack]) -> None:
    """24 MB of pages touched through the map would count as the process' memory for as long as the pack is open."""
    pack = make_pack(tmp_path, n=240, size=64)

    def resident() -> int:
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssFile"))
        return int(line.split()[1])

    out, before = np.empty((24, 13, 64, 64), np.uint16), resident()
    for rows in np.random.default_rng(0).permutation(240).reshape(10, 24):
        pack.read(rows, out)
        assert np.array_equal(out[:, 0, 0, 0], 1000 + rows)
    pack.spectra()
    assert resident() - before < 8_000


def test_spectra_are_those_of_pixels_of_the_split(tmp_path: Path, make_pack: Callable[..., Pack]) -> None:
    pack = make_pack(tmp_path, n=24, size=8)
    found = pack.spectra(split="val", pixels=100)
    assert found.shape == (100, 13)
    there = {tuple(spectrum) for image in pack.images[pack.rows("val")] for spectrum in image.reshape(13, -1).T}
    drawn = [tuple(spectrum) for spectrum in (found * 1e4).round().astype(int).tolist()]
    assert set(drawn) <= there
    assert len(set(drawn)) > 90, "no pixel twice"


def test_an_opened_pack_stays_readable_while_it_is_replaced(old: Pack) -> None:
    before = np.array(old.images)
    new = replace_old(old, generated_images(6, 8, seed=1))
    assert np.array_equal(old.images, before)
    assert not np.array_equal(new.images, before)


# --- the guard on band order


def test_what_the_guard_refuses_is_not_packed_and_it_sees_bands_in_satclip_order(old: Pack) -> None:
    before, images = contents(old), generated_images(6, 8)

    def check(spectra: np.ndarray) -> None:
        assert spectra.shape[::2] == (6, 13)
        assert set(spectra[..., 0].flat) <= set(images[:, 0].flat)
        if spectra[..., 10].max() > 100:
            raise ValueError("B10 is bright")

    with pytest.raises(ValueError, match="B10 is bright"):
        replace_old(old, images, order="eurosat", check=check)
    assert contents(open_pack(old.path)) == before
    assert listing(old.path.parent) == ["generated"]
    assert np.array_equal(replace_old(old, images[:, EUROSAT_ORDER], order="eurosat", check=check).images, images)


# --- what can't be packed, and what is no pack

NO_IMAGES = {
    "other size": [*generated_images(5, 8), np.zeros((13, 9, 8), np.uint16)],
    "float": generated_images(6, 8).astype(np.float32),
    "12 bands": generated_images(6, 8)[:, :12],
    "no image": generated_images(6, 8)[:, :, 0],
}
NO_INDEX = {
    "no label": generated_index(6).drop(columns="label"),
    "no split": generated_index(6).drop(columns="split"),
    "unknown split": generated_index(6).assign(split="validation"),
    "label beyond classes": generated_index(6).assign(label=3),
    "negative label": generated_index(6).assign(label=-1),
    "no rows": generated_index(6)[:0],
}


@pytest.mark.parametrize("what", [*NO_IMAGES, *NO_INDEX, "order"])
def test_what_does_not_fit_a_pack_is_refused_and_the_old_one_stays(old: Pack, what: str) -> None:
    before = contents(old)
    order = "landsat" if what == "order" else "satclip"
    with pytest.raises(ValueError):  # noqa: PT011
        replace_old(old, NO_IMAGES.get(what, generated_images(6, 8)), NO_INDEX.get(what), order=order)
    assert contents(open_pack(old.path)) == before
    assert listing(old.path.parent) == ["generated"]


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (np.zeros((8, 9), np.uint8), r"generated/2: the target is \(8, 9\) uint8; expected \(8, 8\)"),
        (np.zeros((8, 8), np.int64), r"generated/2: the target is \(8, 8\) int64"),
        (np.full((8, 8), 3, np.uint8), r"generated/2: the target has classes \[3\]; there are 3"),
        (np.full((8, 8), 254, np.uint8), r"generated/2: the target has classes \[254\]"),
    ],
)
def test_targets_that_mean_nothing_are_refused_by_name(tmp_path: Path, target: np.ndarray, message: str) -> None:
    targets = [*generated_targets(6)]
    targets[2] = target
    items = list(zip(generated_images(6, 8), targets, strict=True)).__getitem__
    with pytest.raises(ValueError, match=message):
        write_pack(tmp_path / "pack", items, generated_index(6), **CARD, targets=True)
    assert listing(tmp_path) == []


@pytest.mark.parametrize("named", ["folder", "file"])
def test_what_is_no_pack_is_not_replaced_by_one(tmp_path: Path, named: str) -> None:
    """`path=` a data folder, or one's home, must not delete it."""
    target = tmp_path / "thesis"
    if named == "folder":
        target.mkdir()
    mine = target / "chapter1.txt" if named == "folder" else target
    mine.write_text("years of work")
    with pytest.raises((ValueError, OSError), match=re.escape(str(target))):
        write_pack(target, generated_images(6, 8).__getitem__, generated_index(6), **CARD)
    assert mine.read_text() == "years of work"


def flipped(pack: Pack) -> None:
    """A bit, in the file's old size and time, as a failing disk leaves it."""
    path, before = pack.path / "images.npy", (pack.path / "images.npy").stat()
    content = bytearray(path.read_bytes())
    content[500] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def another_mean(pack: Pack) -> None:
    card = json.loads((pack.path / "pack.json").read_text())
    (pack.path / "pack.json").write_text(json.dumps({**card, "mean_dn": {"train": [0.0] * 13}}))


DAMAGE: dict[str, Callable[[Pack], Any]] = {
    "of NaN": lambda pack: np.save(pack.path / "images.npy", np.full(pack.images.shape, np.nan, np.float32)),
    "labels edited": lambda pack: pack.index.assign(label=0).to_parquet(pack.path / "index.parquet", index=False),
    "a bit flipped": flipped,
    "another format": lambda pack: (pack.path / "pack.json").write_text(json.dumps({**pack.card, "format": 99})),
    "means edited": another_mean,
    "no images": lambda pack: (pack.path / "images.npy").unlink(),
    "half": lambda pack: os.truncate(pack.path / "images.npy", 3000),
    "empty card": lambda pack: (pack.path / "pack.json").write_text(""),
    "a list for a card": lambda pack: (pack.path / "pack.json").write_text("[]"),
    "no table": lambda pack: (pack.path / "index.parquet").write_bytes(b"nothing"),
    "fewer rows": lambda pack: pack.index[:5].to_parquet(pack.path / "index.parquet"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_what_was_damaged_or_changed_since_it_was_packed_is_not_opened(old: Pack, damage: str) -> None:
    assert open_if_same(old.path, "generated-0", {}) is None
    DAMAGE[damage](old)
    packs._crc32.cache_clear()  # as another process
    with pytest.raises(ValueError, match="pack again"):
        open_pack(old.path)
    assert open_if_same(old.path, "generated-0", old.card.get("options")) is None


# --- bad images


def test_bad_images_are_all_named_and_the_old_pack_stays(old: Pack) -> None:
    problems = {3: ValueError("12 bands, expected 13"), 170: OSError("can't be opened")}

    def images(row: int) -> np.ndarray:
        if row in problems:
            raise problems[row]
        return generated_images(1, 8)[0]

    before = contents(old)
    message = r"(?s)2 of 200 images.*generated/3: 12 bands.*generated/170: can't be.*No pack was written"
    with pytest.raises(ValueError, match=message):
        replace_old(old, images, generated_index(200))
    problems = dict.fromkeys(range(200), ValueError("zeros"))
    with pytest.raises(ValueError, match=r"200 of 200 images can't be packed:\n(  .*\n){50}  … and 150 more"):
        replace_old(old, images, generated_index(200))
    assert contents(open_pack(old.path)) == before
    assert listing(old.path.parent) == ["generated"]


# --- a packing that goes on where it stopped


class Source:
    """Reads a row; notes which were asked for, and may break at one."""

    def __init__(self, breaks_at: int | None = None) -> None:
        self.items: list[Any] = list(zip(generated_images(24, 8), generated_targets(24), strict=True))
        self.breaks_at, self.asked = breaks_at, []

    def __call__(self, row: int) -> Any:
        self.asked.append(row)
        if row == self.breaks_at:
            raise RuntimeError("the reader broke")
        return self.items[row]


@pytest.fixture
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Note the progress every 4 rows."""
    monkeypatch.setattr(packs, "AT_ONCE", 4)


def pack_from(source: Any, path: Path, index: pd.DataFrame | None = None, **card: Any) -> Pack:
    index = generated_index(24).drop(columns="label") if index is None else index
    return write_pack(path, source, index, **{**CARD, "options": {"rules": 1}, **card}, targets=True)


def test_an_interrupted_packing_goes_on_and_ends_the_same(tmp_path: Path, often: None) -> None:
    expected = contents(pack_from(Source(), tmp_path / "undisturbed"))
    for row in (10, 17):
        with pytest.raises(RuntimeError, match="the reader broke"):
            pack_from(Source(breaks_at=row), tmp_path / "pack")
        assert not (tmp_path / "pack").exists()
    for name in ("images.npy", "targets.npy"):  # as a kill between writing and noting leaves them
        np.load(tmp_path / ".pack.packing" / name, mmap_mode="r+")[18:] = 77
    last = Source()
    assert contents(pack_from(last, tmp_path / "pack")) == expected
    assert min(last.asked) == 16
    assert listing(tmp_path) == ["pack", "undisturbed"]


@pytest.mark.parametrize("change", ["source", "options", "index", "name", "order", "images.npy", "targets.npy"])
def test_another_packing_to_the_same_place_begins_anew(tmp_path: Path, change: str, often: None) -> None:
    with pytest.raises(RuntimeError):
        pack_from(Source(breaks_at=10), tmp_path / "pack")
    index, source = generated_index(24).drop(columns="label"), Source()
    cards = {"source": {"source_checksum": "new"}, "options": {"options": 2}, "name": {"name": "other"}}
    if change == "index":
        index["file"] = index["file"].str.upper()
    elif change == "order":
        source.items = [(image[EUROSAT_ORDER], target) for image, target in source.items]
    elif change.endswith(".npy"):
        (tmp_path / ".pack.packing" / change).unlink()
    card = {"order": "eurosat"} if change == "order" else cards.get(change, {})
    pack = pack_from(source, tmp_path / "pack", index, **card)
    assert min(source.asked) == 0
    assert np.array_equal(pack.images, generated_images(24, 8))
    assert np.array_equal(pack.targets, generated_targets(24))


def test_two_packings_to_one_place_at_once_are_refused(tmp_path: Path) -> None:
    def read(row: int) -> Any:
        if row == 5:
            with pytest.raises(BlockingIOError, match="another process is packing"):
                pack_from(Source(), tmp_path / "pack")
        return Source().items[row]

    assert np.array_equal(pack_from(read, tmp_path / "pack").images, generated_images(24, 8))


# A writer in its own process: argv is the pack's folder and, if it is to sleep at row 29, a word more.
KILLED = """
import sys, time
import numpy as np, pandas as pd
from bandmask import packs

packs.AT_ONCE = 8
rows, slow = {rows}, len(sys.argv) > 2

def read(row):
    if slow and row == 29:
        print("half", flush=True)
        time.sleep(600)
    image = np.full((13, {size}, {size}), 2000 + row, np.uint16)
    image[10] = 7
    return image, np.full(({size}, {size}), row % 2, np.uint8)

index = pd.DataFrame({{"file": [f"generated/{{row}}" for row in range(rows)]}})
index["split"] = ["train", "test"] * (rows // 2)
def write():
    try:
        return packs.write_pack(sys.argv[1], read, index, name="generated", classes=["a", "b"], source="generated data",
                                source_checksum=str(rows), targets=True)
    except OSError as error:
        print(error)
"""


def test_killed_with_kill_9_it_goes_on_and_ends_as_if_nothing_had_happened(tmp_path: Path) -> None:
    script = KILLED.format(rows=40, size=16) + "write()"
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "undisturbed")], timeout=300, check=True)
    slow = [sys.executable, "-c", script, str(tmp_path / "pack"), "slow"]
    with subprocess.Popen(slow, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "half\n"
        finally:
            process.kill()
    assert process.returncode == -signal.SIGKILL
    assert not (tmp_path / "pack").exists()
    assert json.loads((tmp_path / ".pack.packing" / "progress.json").read_text())["rows"] in (16, 24)
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "pack")], timeout=300, check=True)
    assert contents(open_pack(tmp_path / "pack")) == contents(open_pack(tmp_path / "undisturbed"))
    assert listing(tmp_path) == ["pack", "undisturbed"]


def test_a_full_disk_is_known_before_the_first_image_and_the_old_pack_stays(on_small_disk: Callable[..., Any]) -> None:
    """4 MB of disk, an old pack of 1 MB and a new one of 21 MB: a memory map alone would end in a bus error."""
    script = "import sys\nsys.argv = ['', 'pack']\n" + KILLED.format(rows=10, size=64) + "write()\n"
    script += KILLED.format(rows=200, size=64) + "write()\nprint(len(packs.open_pack('pack').images))\n"
    script += "import subprocess\nsubprocess.run(['mount', '-o', 'remount,size=90m', '.'], check=True)\n"
    script += "print(len(write().images))\nsubprocess.run(['mount', '-o', 'remount,ro', '.'], check=True)\nwrite()\n"
    answer = on_small_disk(script + "print(len(packs.open_pack('pack').images))")
    assert answer.returncode == 0, answer.stderr
    full, before, after, read_only, still = answer.stdout.splitlines()
    assert "can't write pack: No space left on device" in full
    assert "BANDMASK_OUTPUTS" in full
    assert "Read-only file system" in read_only
    assert (before, after, still) == ("10", "200", "200")
