"""One packed array a data set: uint16 DN in SatCLIP order, with labels, splits and provenance; whole or not there.

A pack is a folder: `images.npy` (N, 13, H, W) uint16, `index.parquet` (a row an image: label, split, file, group),
`pack.json` (the card: data set, bands, classes, source, mean DN per band, checksums), and, where pixels have labels,
`targets.npy` (N, H, W) uint8. It is made in `.<name>.packing` beside it: data are flushed to the disk before
`progress.json` says so, so a kill loses one interval at most, and the same call goes on there.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
import weakref
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from filelock import FileLock, Timeout
from tqdm import tqdm

from bandmask import bands, files, identity

FORMAT = 1
SPLITS = ("train", "val", "test")
IGNORE = 255  # of a target: this pixel has no label
DN_PER_REFLECTANCE = 10_000.0  # L1C and L2A before processing baseline 04.00
SAVE_ROWS, SAVE_BYTES = 256, 64_000_000  # after so many rows or bytes an interrupted packing can go on
BAD_LISTED = 50  # bad images named in one error; their number is always said
_CHECKED = ".checked.json"  # size, time and checksum of each file when it was last read
_PARTS = {"images.npy", "targets.npy", "index.parquet", "pack.json", _CHECKED}

Item = Any  # image, (image, target), or (image, target, {"what was counted": n})


class BadImagesError(ValueError):
    """Some files of a data set can't be read; the message names each with its problem."""


@dataclass(frozen=True)
class Pack:
    """A packed data set, opened.

    Attributes:
        path: its folder.
        images: (N, 13, H, W) uint16 DN, SatCLIP order, read-only memory map.
        index: one row an image; `label` (int) and `split` always, `file` and others by data set. Images of one
            `group` (scene, block), where that column is there, are not independent.
        card: `pack.json`.
        targets: (N, H, W) uint8 class of each pixel, `IGNORE` where it has none, read-only memory map; None for a
            data set that has no pixel labels.
    """

    path: Path
    images: np.ndarray
    index: pd.DataFrame
    card: dict[str, Any]
    targets: np.ndarray | None = None

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names; a label, of an image or a pixel, is an index into them."""
        return tuple(self.card["classes"])

    @property
    def absent(self) -> tuple[str, ...]:
        """Bands that the data set lacks, such as B10 of L2A: 0 in `images`, NaN in batches and means."""
        return tuple(self.card.get("absent", ()))

    @property
    def checksum(self) -> str:
        """Checksum of the source, which results and encoder cards carry."""
        return str(self.card["source_checksum"])

    @property
    def fingerprint(self) -> str:
        """Checksum of the card: source, rules of cutting and labelling, means. What is trained on it depends on it."""
        return files.checksum_of({key: value for key, value in self.card.items() if key != "sums"})

    @property
    def labels(self) -> np.ndarray:
        """(N,) int64; of a pack with targets that has no labels of its own: each image's most frequent class, or −1."""
        return self.index["label"].to_numpy(np.int64)

    def rows(self, split: str) -> np.ndarray:
        """Row numbers of a split, (n,) int64.

        Raises:
            ValueError: no such split, or no image in it.
        """
        rows = np.flatnonzero((self.index["split"] == split).to_numpy())
        if len(rows) == 0:
            counts = self.index["split"].value_counts().to_dict()
            raise ValueError(f"the pack {self.path} has no image in split {split!r}; it has {counts}")
        return rows

    def band_means(self, split: str = "train") -> np.ndarray:
        """Mean reflectance per band over a split, (13,) float64, as recorded when the pack was written."""
        if split == "train" and "moments" in self.card:  # of others: this data set has test images alone
            return np.array(self.card["moments"]["mean"])
        self.rows(split)  # an empty split has no mean: say so
        means = np.array(self.card["mean_dn"][split]) / DN_PER_REFLECTANCE
        return np.where(np.isin(bands.NAMES, self.absent), np.nan, means)

    def spectra(self, *, split: str = "train", pixels: int = 200_000, seed: int = 0) -> np.ndarray:
        """Reflectance (n, 13) of pixels drawn at random from a split; `train`, so that test images stay unseen."""
        draw = np.random.default_rng(seed)
        rows = np.sort(draw.permutation(self.rows(split))[:2000])
        size = self.images[0, 0].size
        drawn = draw.permutation(len(rows) * size)[:pixels]
        spectra = np.empty((len(drawn), len(bands.NAMES)))
        images, image = Rows(self), np.empty((1, *self.images.shape[1:]), self.images.dtype)
        order = np.argsort(drawn, kind="stable")
        ends = np.searchsorted(drawn[order], size * np.arange(1, len(rows)))  # of the pixels of each image
        for row, places in zip(rows, np.split(order, ends), strict=True):  # one image at a time is in memory
            images.read(row[None], image)
            spectra[places] = image.reshape(-1, size).T[drawn[places] % size]
        spectra[:, bands.channel_indices(self.absent)] = np.nan  # 0 DN there is no measurement
        return spectra / DN_PER_REFLECTANCE


def open_pack(path: Path | str) -> Pack:
    """Open a pack, memory-mapped; a file that is new here, or was changed, is read once and its checksum compared.

    Raises:
        FileNotFoundError: nothing there.
        ValueError: written by another format version, damaged, or changed since it was packed.
    """
    path = files.require(path, "run notebooks/01_data_exploration.ipynb, or bandmask.datasets.pack_*")
    try:
        card = json.loads((path / "pack.json").read_text())
        if not isinstance(card, dict):
            raise ValueError("pack.json holds no mapping")
        images = np.load(path / "images.npy", mmap_mode="r")
        index = pd.read_parquet(path / "index.parquet")
        targets = np.load(path / "targets.npy", mmap_mode="r") if card.get("targets") else None
        _check_sums(path, card.get("sums", {}))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is not a whole pack ({error}); delete the folder and pack again") from error
    fits = images.dtype == np.uint16 and images.ndim == 4 and images.shape[:2] == (len(index), len(bands.NAMES))
    if targets is not None:
        fits = fits and targets.dtype == np.uint8 and targets.shape == (len(images), *images.shape[2:])
    if card.get("format") != FORMAT or card.get("bands") != list(bands.NAMES) or not fits:
        raise ValueError(
            f"{path} was written in another pack format ({card.get('format')!r}, this is {FORMAT}), or its parts "
            f"don't fit one another (images {images.shape} {images.dtype}, expected ({len(index)}, 13, H, W) uint16); "
            "delete the folder and pack again"
        )
    return Pack(path, images, index, card, targets)


def _check_sums(path: Path, sums: dict[str, int], fresh: bool = False) -> None:
    """Compare checksums where size or time of a file are not those that were last seen, and note them."""
    known: dict[str, Any] = {}
    with suppress(OSError, ValueError):
        known = json.loads((path / _CHECKED).read_text())
    stats = {name: (path / name).stat() for name in sums}
    now = {name: [stat.st_size, stat.st_mtime_ns, sums[name]] for name, stat in stats.items()}
    for name, expected in sums.items():
        if not fresh and now[name] != known.get(name) and _sum_of(path / name) != expected:
            raise ValueError(f"{name} was changed since it was packed: its checksum is another one")
    if now != known:
        with suppress(OSError), files.writing(path / _CHECKED) as new:  # a read-only disk is read again each time
            new.write_text(json.dumps(now))


def _sum_of(path: Path) -> int:
    """CRC-32 of a file's bytes."""
    with path.open("rb") as file:
        return functools.reduce(lambda found, part: zlib.crc32(part, found), iter(lambda: file.read(1 << 22), b""), 0)


class Rows:
    """A pack's images or targets, mapped anew for each read: pages count as memory while the map they came by lives."""

    def __init__(self, pack: Pack, name: str = "images") -> None:
        """Open `<name>.npy` anew; it is closed with this object.

        Raises:
            ValueError: the pack was made anew, another one, since it was opened: its labels would be of other images.
        """
        self._file = (pack.path / f"{name}.npy").open("rb")
        weakref.finalize(self, self._file.close)
        whole: np.memmap = np.load(pack.path / f"{name}.npy", mmap_mode="r")
        self.dtype, self.offset, self.shape = whole.dtype, whole.offset, whole.shape
        card = json.loads((pack.path / "pack.json").read_text())  # asked last: a pack comes to its place as a whole
        if any(card.get(key) != pack.card.get(key) for key in ("source_checksum", "options", "mean_dn")):
            raise ValueError(f"the pack {pack.path} was made anew while it was in use; open it again")

    def read(self, rows: np.ndarray, out: np.ndarray) -> None:
        """Copy rows, which are there, to `out`, (len(rows), …) of the file's dtype, C-contiguous; in any thread."""
        whole = np.memmap(self._file, self.dtype, "r", self.offset, self.shape)
        np.take(whole, rows, 0, out, "clip")  # any other mode would copy twice


def open_if_same(path: Path, checksum: str, options: dict[str, Any]) -> Pack | None:
    """The pack at `path`, if it was made from this source with these options; else None, and it may be made anew."""
    try:
        pack = open_pack(path)
    except (FileNotFoundError, ValueError):
        return None  # damaged, or another format: made anew, and replaced only once the new one is whole
    return pack if pack.checksum == checksum and pack.card.get("options") == options else None


def write_pack(
    path: Path | str,
    images: Callable[[int], Item],
    index: pd.DataFrame,
    *,
    name: str,
    classes: Sequence[str],
    source: str,
    source_checksum: str,
    order: str = "satclip",
    strict_guard: bool = True,
    targets: bool = False,
    skip_bad: bool = False,
    progress: bool = False,
    **card: Any,
) -> Pack:
    """Write and open a pack, in memory that does not depend on its length; one that was interrupted goes on.

    Args:
        path: folder to make; an older pack there is replaced only once the new one is whole.
        images: reads the item of a row of `index`: a (13, H, W) uint16 image, channels in `order`; with `targets` the
            pair of it and its target, (H, W) uint8, and, as a third part if wanted, counts that the card sums up as
            `counts`. A ValueError or OSError makes an image bad.
        index: column `split` at least, and `label`; with `targets` the label may be left out, and is the most
            frequent class of the image then, −1 where no pixel has one.
        name: of the data set.
        classes: names; labels and targets index into them.
        source: where it came from, for people.
        source_checksum: of the source.
        order: file order of the channels, a key of `bands.ORDERS`.
        strict_guard: refuse a pack whose cirrus channel is not where `order` says; False warns instead.
        targets: items come with the class of each pixel.
        skip_bad: leave bad images out, and list them in the card as `skipped`, instead of stopping once all are known.
        progress: show a progress bar.
        card: further entries of `pack.json`: `skipped`, files known to be bad beforehand; `absent`, bands that are 0.

    Raises:
        ValueError: images of different shapes, targets of no class, or channels in another order than `order`.
        BadImagesError: bad images, named. Those that were good are kept: with `skip_bad` they are not read again.
        OSError: the folder can't be written, or the disk is too small (known before the first image is written).
        BlockingIOError: another process is packing to the same path.
    """
    path = Path(path)
    about = {**card, "dataset": name, "classes": list(classes), "source": source, "source_checksum": source_checksum}
    about |= {"format": FORMAT, "bands": list(bands.NAMES), "stored_order": order, "targets": targets}
    _check_index(index, classes, targets)
    bands.file_order(order)
    if path.exists() and not (path.is_dir() and {p.name for p in path.iterdir()} <= _PARTS):
        raise ValueError(f"{path} is there and is no pack; it is not overwritten. Choose another folder for the pack")

    def read(row: int) -> Item:
        try:
            return images(row)
        except (ValueError, OSError) as error:
            return error

    folder = path.with_name(f".{path.name}.packing")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / "lock", timeout=0):
            try:
                writer = _Writer(folder, index, about, skip_bad=skip_bad)
                left = range(writer.note["read"], len(index))
                bar = tqdm(left, f"packing {name}", len(index), initial=left.start, disable=not progress, mininterval=1)
                for row, item in zip(bar, read_ahead(read, left), strict=True):
                    writer.add(row, item)
                writer.finish(skip_bad, strict_guard)
            except Exception as error:
                if isinstance(error, ValueError) and not isinstance(error, BadImagesError):
                    shutil.rmtree(folder, ignore_errors=True)  # of no use to anyone
                raise
            (folder / "lock").unlink()
            with files.writing(path) as partial:
                os.replace(folder, partial)
    except Timeout as error:
        problem = f"another process is packing to {path} right now; wait until it is done, or choose another folder"
        raise BlockingIOError(problem) from error
    except OSError as error:
        raise OSError(
            error.errno,
            f"can't write {path}: {error.strerror or error}. What was there before is untouched. Free some space, pack "
            "fewer images, or set BANDMASK_OUTPUTS to another folder; the same call goes on with what is read so far.",
        ) from error
    return open_pack(path)


class _Writer:
    """Puts rows into the arrays of a pack in the making; its note is never ahead of the disk, where room is kept."""

    def __init__(self, folder: Path, index: pd.DataFrame, card: dict[str, Any], skip_bad: bool) -> None:
        self.folder, self.index, self.card = folder, index, card
        hashed = pd.util.hash_pandas_object(index, index=False).to_numpy().tobytes()
        key = files.checksum_of([card, list(index.columns), hashlib.sha256(hashed).hexdigest()])
        self.note: dict[str, Any] = {"key": key, "read": 0, "totals": {}, "labels": [], "counts": {}, "bad": {}}
        self.arrays: dict[str, np.memmap] = {}
        note, self.note_file, self.unsaved = {}, folder / "progress.json", 0
        with suppress(OSError, ValueError):
            note = json.loads(self.note_file.read_text())
        hopeless = note.get("read") == len(index) and note["bad"] and not skip_bad  # unless files were put right
        there = all((folder / name).exists() for name in ("images.npy", "targets.npy")[: 1 + card["targets"]])
        if note.get("key") == key and there and not hopeless:
            self.note = note
        else:  # the note goes before the data it speaks of
            for file in (self.note_file, folder / "images.npy", folder / "targets.npy"):
                file.unlink(missing_ok=True)

    def add(self, row: int, item: Item) -> None:
        """Write one row, and now and then the note of how far it is."""
        note = self.note
        if isinstance(item, Exception):
            note["bad"][str(row)] = str(item)
        else:
            image, target, *counts = item if self.card["targets"] else (item, None)
            if image.ndim != 3 or len(image) != len(bands.NAMES) or image.dtype != np.uint16:
                raise ValueError(f"image {row} is {image.shape} {image.dtype}; a pack holds (13, H, W) uint16")
            ordered = image[bands.reorder(self.card["stored_order"])]
            self._put("images.npy", ordered, row)
            if target is not None:
                note["labels"].append(self._label_of(target, row, image.shape[1:]))
                self._put("targets.npy", target, row)
            split, mean = str(self.index["split"].iloc[row]), ordered.mean(axis=(1, 2), dtype=np.float64)
            note["totals"][split] = (np.array(note["totals"].get(split, 0.0)) + mean).tolist()
            for what, number in counts[0].items() if counts else ():
                note["counts"][what] = note["counts"].get(what, 0) + int(number)
            self.unsaved += ordered.nbytes
        note["read"] += 1
        if note["read"] % SAVE_ROWS == 0 or self.unsaved >= SAVE_BYTES or note["read"] == len(self.index):
            for array in self.arrays.values():  # data first, then the note about them
                array.flush()
            self.arrays.clear()  # what is mapped counts as memory
            self.unsaved = 0
            with files.writing(self.note_file) as new:
                new.write_text(json.dumps(note))

    def _put(self, name: str, value: np.ndarray, row: int) -> None:
        path = self.folder / name
        if name not in self.arrays:
            if not path.exists():
                np.lib.format.open_memmap(path, "w+", value.dtype, (len(self.index), *value.shape))
                with path.open("r+b") as file:
                    os.posix_fallocate(file.fileno(), 0, path.stat().st_size)  # "no space left" before the first image
            self.arrays[name] = np.load(path, mmap_mode="r+")
        if (size := self.arrays[name].shape[1:]) != value.shape:
            raise ValueError(f"image {row} is {value.shape} in {name}, those before are {size}; a pack holds one size")
        self.arrays[name][self.note["read"] - len(self.note["bad"])] = value

    def _label_of(self, target: np.ndarray, row: int, size: tuple[int, ...]) -> int:
        """The most frequent class of a target, or −1."""
        if target.shape != size or target.dtype != np.uint8:
            raise ValueError(f"target {row} is {target.shape} {target.dtype}; expected {size} uint8")
        pixels, known = np.bincount(target.ravel(), minlength=IGNORE + 1)[:IGNORE], len(self.card["classes"])
        if wrong := (known + np.flatnonzero(pixels[known:])[:5]).tolist():
            raise ValueError(f"target {row} has classes {wrong}; there are {known}, from 0 on, and {IGNORE} for none")
        return int(pixels.argmax()) if pixels.any() else -1

    def finish(self, skip_bad: bool, strict: bool) -> None:
        """Refuse bad images, then channels in another order; write what stands beside the arrays."""
        note, card, index, known = self.note, self.card, self.index, self.card.get("skipped", {})
        kept = len(index) - len(note["bad"])
        lost = np.isin(np.arange(len(index)), [int(row) for row in note["bad"]])
        named = index["file"] if "file" in index else pd.Series([f"image {row}" for row in range(len(index))])
        bad = {**known, **dict(zip(named[lost], note["bad"].values(), strict=True))}
        if bad and (not skip_bad or kept == 0):
            lines = [f"  {file}: {problem}" for file, problem in list(bad.items())[:BAD_LISTED]]
            lines += [f"  … and {len(bad) - BAD_LISTED} more"] if len(bad) > BAD_LISTED else []
            raise BadImagesError(
                f"{len(bad)} of {len(index) + len(known)} images can't be packed:\n" + "\n".join(lines) + "\n"
                "Fetch these files again, or pass skip_bad=True to leave them out. No pack was written."
            )
        self._check_order(kept, strict)
        index = index[~lost].reset_index(drop=True)
        if "label" not in index:
            index["label"] = note["labels"]
        arrays = [path for path in (self.folder / "images.npy", self.folder / "targets.npy") if path.exists()]
        for path in arrays if note["bad"] else ():  # the header keeps its length: numpy leaves room for it to grow
            array = np.load(path, mmap_mode="r")
            fields = {"descr": array.dtype.str, "fortran_order": False, "shape": (kept, *array.shape[1:])}
            with path.open("r+b") as file:
                np.lib.format.write_array_header_1_0(file, fields)
                file.truncate(array.offset + array[:1].nbytes * kept)
        index.to_parquet(self.folder / "index.parquet", index=False)
        sums = {path.name: _sum_of(path) for path in (*arrays, self.folder / "index.parquet")}
        numbers = index["split"].value_counts()
        means = {split: (np.array(total) / numbers[split]).round(4).tolist() for split, total in note["totals"].items()}
        card = {**card, **({"counts": dict(sorted(note["counts"].items()))} if note["counts"] else {})}
        card |= {"skipped": bad} if note["bad"] else {}
        (self.folder / "pack.json").write_text(json.dumps({**card, "mean_dn": means, "sums": sums}, indent=2))
        self.note_file.unlink()
        _check_sums(self.folder, sums, fresh=True)

    def _check_order(self, kept: int, strict: bool) -> None:
        """Of some pixels of up to 256 images, in the order of the file."""
        images = np.load(self.folder / "images.npy", mmap_mode="r")[:kept]
        some = images[:: max(kept // 256, 1)]
        flat = some.reshape(*some.shape[:2], -1)[..., :: max(some[0, 0].size // 64, 1) | 1]
        order, absent, given = self.card["stored_order"], self.card.get("absent", ()), self.card.get("options")
        names = (isinstance(given, dict) and given.get("bands")) or bands.file_order(order)
        spectra = flat.transpose(0, 2, 1).reshape(-1, len(bands.NAMES))[:, bands.channel_indices(names)].astype(float)
        spectra[:, np.isin(names, absent)] = np.nan
        identity.check(spectra, names, order=order if len(names) == len(bands.NAMES) else "", strict=strict)


def _check_index(index: pd.DataFrame, classes: Sequence[str], targets: bool) -> None:
    if missing := ({"split"} if targets else {"split", "label"}) - set(index.columns):
        raise ValueError(f"the index of a pack has no column {' and no '.join(map(repr, sorted(missing)))}")
    if index.empty:
        raise ValueError("0 rows, so no image: a pack holds one at least")
    if len(classes) >= IGNORE:
        raise ValueError(f"{len(classes)} classes; a pack holds fewer than {IGNORE}")
    labels = set(index["label"]) if "label" in index else set()
    if wrong := sorted(labels - set(range(-1 if targets else 0, len(classes)))):
        raise ValueError(f"labels {wrong[:5]} have no class; there are {len(classes)}, counted from 0")
    if unknown := set(index["split"]) - set(SPLITS):
        raise ValueError(f"unknown split {sorted(map(str, unknown))}; available: {', '.join(SPLITS)}")


def read_ahead(read: Callable[[Any], Any], keys: Iterable[Any]) -> Iterator[Any]:
    """Results in order, a few read in advance: disks and decoding overlap, memory stays flat."""
    with ThreadPoolExecutor(4) as pool:
        waiting: deque[Any] = deque()
        for key in keys:
            waiting.append(pool.submit(read, key))
            if len(waiting) > 8:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
