"""One packed array a data set: uint16 DN in SatCLIP order, with labels, splits and provenance; whole or not there.

A pack is a folder: `images.npy` (N, 13, H, W) uint16, `index.parquet` (a row an image: label, split, file, group),
`pack.json` (the card: data set, bands, classes, source, mean DN per band, checksums), and, where pixels have labels,
`targets.npy` (N, H, W) uint8. It is made in `.<name>.packing` beside it: data are flushed to the disk before
`progress.json` says so, so a kill loses a few images at most, and the same call goes on there.
"""

import functools
import json
import mmap
import os
import shutil
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from filelock import FileLock, Timeout
from tqdm import tqdm

from bandmask import bands, files
from bandmask.bands import DN_PER_REFLECTANCE

FORMAT = 1
SPLITS = ("train", "val", "test")
IGNORE = 255  # of a target: this pixel has no label
AT_ONCE = 32  # images in memory while a pack is written; after so many an interrupted packing can go on
BAD_LISTED = 50  # bad images named in one error; their number is always said
_PARTS = {"images.npy", "targets.npy", "index.parquet", "pack.json", ".checked.json"}  # the last of old packs


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
    images: np.ndarray = field(repr=False)
    index: pd.DataFrame = field(repr=False)
    card: dict[str, Any] = field(repr=False)
    targets: np.ndarray | None = field(default=None, repr=False)

    def __repr__(self) -> str:
        """`Pack(eurosat: 600 train, 197 val, 200 test images of 64 px, 10 classes, in …/packs/eurosat)`."""
        counts = ", ".join(f"{count} {split}" for split, count in self.index["split"].value_counts().items())
        lacks = f", without {' '.join(self.absent)}" if self.absent else ""
        about = f"{counts} images of {self.images.shape[-1]} px{lacks}, {len(self.classes)} classes"
        return f"Pack({self.card['dataset']}: {about}, in {self.path})"

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names; a label, of an image or a pixel, is an index into them."""
        return tuple(self.card["classes"])

    @property
    def absent(self) -> tuple[str, ...]:
        """Bands that the data set lacks, such as B10 of L2A: 0 in `images`, NaN in batches and means."""
        return tuple(self.card.get("absent", ()))

    def require_complete(self, taker: str, needed: Sequence[str] = bands.NAMES) -> None:
        """A ValueError where it lacks bands that what takes complete images can't do without."""
        if {*self.absent} & {*needed}:
            lacks = f"{self.card['dataset']} lacks {' '.join(self.absent)}, {taker} takes complete images"
            raise ValueError(f"{lacks}; take other images, or bm.load_encoder('mini'), in notebooks galileo-nano")

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

    def read(self, rows: np.ndarray, out: np.ndarray, name: str = "images") -> None:
        """Copy rows of `images` or `targets` to `out`, of their dtype, C-contiguous; no page stays in memory."""
        np.take(getattr(self, name), rows, 0, out, "clip")  # any other mode would copy twice
        forget(getattr(self, name))

    def spectra(self, *, split: str = "train", pixels: int = 200_000, seed: int = 0) -> np.ndarray:
        """Reflectance (n, 13) of pixels drawn at random from a split; `train`, so that test images stay unseen."""
        draw = np.random.default_rng(seed)
        rows = np.sort(draw.permutation(self.rows(split))[:2000])
        size = self.images[0, 0].size
        image, pixel = np.divmod(draw.permutation(len(rows) * size)[:pixels], size)
        spectra = np.empty((len(pixel), len(bands.NAMES)))
        for number, row in enumerate(rows):  # one image at a time is in memory
            drawn = image == number
            spectra[drawn] = self.images[row].reshape(-1, size)[:, pixel[drawn]].T
            forget(self.images)
        spectra[:, bands.channel_indices(self.absent)] = np.nan  # 0 DN there is no measurement
        return spectra / DN_PER_REFLECTANCE


def forget(array: np.ndarray) -> None:
    """Free the memory that pages of a memory map take; they are read again when they are asked for."""
    if isinstance(array, np.memmap):
        array._mmap.madvise(mmap.MADV_DONTNEED)  # type: ignore[attr-defined]


def open_pack(path: Path | str) -> Pack:
    """Open a pack, memory-mapped. Each process reads its files once and compares their checksums.

    Raises:
        FileNotFoundError: nothing there.
        ValueError: written by another format version, damaged, or changed since it was packed.
    """
    path = files.require(path, "run notebooks/01_data_exploration.ipynb, or bm.open_dataset")
    try:
        card = files.unsealed(path / "pack.json")
        images = np.load(path / "images.npy", mmap_mode="r")
        index = pd.read_parquet(path / "index.parquet")
        targets = np.load(path / "targets.npy", mmap_mode="r") if card.get("targets") else None
        for name, expected in card.get("sums", {}).items():
            if _sum_of(path / name) != expected:
                raise ValueError(f"{name} was changed since it was packed: its checksum is another one")
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is not a whole pack ({error}); delete the folder and pack again") from error
    fits = images.dtype == np.uint16 and images.ndim == 4 and images.shape[:2] == (len(index), len(bands.NAMES))
    fits &= targets is None or (targets.dtype == np.uint8 and targets.shape == (len(images), *images.shape[2:]))
    if card.get("format") != FORMAT or card.get("bands") != list(bands.NAMES) or not fits:
        found = f"images {images.shape} {images.dtype}, expected ({len(index)}, 13, H, W) uint16"
        written = f"of format {card.get('format')!r}, this is {FORMAT}, or its parts don't fit ({found})"
        raise ValueError(f"{path} is a pack {written}; delete the folder and pack again")
    return Pack(path, images, index, card, targets)


def _sum_of(path: Path) -> int:
    """CRC-32 of a file's bytes, which are read once a process, as long as time and size stay: 2.5 GB/s."""
    stat = path.stat()
    return _crc32(path, stat.st_ino, stat.st_mtime_ns, stat.st_size)


@functools.lru_cache(maxsize=256)
def _crc32(path: Path, *_: int) -> int:
    with path.open("rb") as file:
        return functools.reduce(lambda found, part: zlib.crc32(part, found), iter(lambda: file.read(1 << 22), b""), 0)


def open_if_same(path: Path, checksum: str, options: dict[str, Any]) -> Pack | None:
    """The pack at `path`, if it was made from this source with these options; else None, and it may be made anew."""
    try:
        pack = open_pack(path)
    except (FileNotFoundError, ValueError):
        return None  # damaged, or another format: made anew, and replaced only once the new one is whole
    return pack if pack.checksum == checksum and pack.card.get("options") == options else None


def write_pack(
    path: Path | str,
    read: Callable[[int], Any],
    index: pd.DataFrame,
    *,
    name: str,
    classes: Sequence[str],
    source: str,
    source_checksum: str,
    order: str = "satclip",
    targets: bool = False,
    check: Callable[[np.ndarray], object] | None = None,
    **card: Any,
) -> Pack:
    """Write a pack, in memory that does not depend on its length, and open it; one that was interrupted goes on.

    What was made from the same source, with the same `options` of the card, is opened as it is.

    Args:
        path: folder to make; an older pack there is replaced only once the new one is whole.
        read: gives the image of a row of `index`, (13, H, W) uint16, channels in `order`; with `targets` the pair of
            it and its target, (H, W) uint8. A ValueError or OSError makes an image bad.
        index: column `split` at least, and `label`; with `targets` the label may be left out, and is the most
            frequent class of the image then, −1 where no pixel has one.
        classes: names; labels and targets index into them.
        source: where it came from, for people.
        order: of the channels as read, a key of `bands.ORDERS`.
        check: given spectra of some images (n, pixels, 13), DN in SatCLIP order; raises a ValueError if they can't be
            what they are called, and no pack is written.
        card: further entries of `pack.json`, such as `absent`, bands that are 0.

    Raises:
        ValueError: images that can't be read, of another shape, or with targets of no class, all of them named; an
            index that does not fit, or spectra that `check` refuses.
        OSError: the folder can't be written, or the disk is too small (known before the first image is written).
        BlockingIOError: another process is packing to the same path.
    """
    path = Path(path)
    about = {**card, "dataset": name, "classes": list(classes), "source": source, "source_checksum": source_checksum}
    about |= {"format": FORMAT, "bands": list(bands.NAMES), "stored_order": order, "targets": targets}
    _check_index(index, classes, targets)
    bands.file_order(order)
    if "options" in card and (same := open_if_same(path, source_checksum, card["options"])) is not None:
        return same
    if path.exists() and not (path.is_dir() and {p.name for p in path.iterdir()} <= _PARTS):
        raise ValueError(f"{path} is there and is no pack; it is not overwritten. Choose another folder for the pack")

    folder = path.with_name(f".{path.name}.packing")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / "lock", timeout=0):
            try:
                _write_rows(folder, read, index, about)
                _finish(folder, index, about, check)
            except ValueError:
                shutil.rmtree(folder, ignore_errors=True)  # of no use to anyone
                raise
            (folder / "lock").unlink()
            with files.writing(path) as partial:
                os.replace(folder, partial)
    except Timeout as error:
        problem = f"another process is packing to {path} right now; wait until it is done, or choose another folder"
        raise BlockingIOError(problem) from error
    except OSError as error:
        raise files.cannot_write(path, error) from error
    return open_pack(path)


def _check_index(index: pd.DataFrame, classes: Sequence[str], targets: bool) -> None:
    if missing := ({"split"} if targets else {"split", "label"}) - set(index.columns):
        raise ValueError(f"the index of a pack has no column {' and no '.join(map(repr, sorted(missing)))}")
    if index.empty:
        raise ValueError("0 rows, so no image: a pack holds one at least")
    if len(classes) >= IGNORE:
        raise ValueError(f"{len(classes)} classes; a pack holds fewer than {IGNORE}")
    if twice := sorted({name for name in classes if list(classes).count(name) > 1}):
        raise ValueError(f"{len(classes)} classes, of which {', '.join(twice)} twice; give each its own name")
    labels = set(index["label"]) if "label" in index else set()
    if wrong := sorted(labels - set(range(-1 if targets else 0, len(classes)))):
        raise ValueError(f"labels {wrong[:5]} have no class; there are {len(classes)}, counted from 0")
    if unknown := set(index["split"]) - set(SPLITS):
        raise ValueError(f"unknown split {sorted(map(str, unknown))}; available: {', '.join(SPLITS)}")


def _write_rows(folder: Path, read: Callable[[int], Any], index: pd.DataFrame, about: dict[str, Any]) -> None:
    """Write the rows that are not written yet; `progress.json`, which counts them, is never ahead of the disk."""
    key, noted = files.checksum_of([about, index.to_csv()]), folder / "progress.json"
    arrays = [folder / name for name in ("images.npy", "targets.npy")[: 1 + about["targets"]]]
    note, bad = {}, dict[int, str]()
    with suppress(OSError, ValueError):
        note = json.loads(noted.read_text())
    if note.get("key") != key or not all(file.exists() for file in arrays):
        note = {"key": key, "rows": 0}
        for file in (noted, *arrays):  # the note goes before the data it speaks of
            file.unlink(missing_ok=True)

    def item(row: int) -> Sequence[np.ndarray] | Exception:
        try:
            return _checked(read(row) if about["targets"] else (read(row),), about)
        except (ValueError, OSError) as error:
            return error

    starts, name = range(note["rows"], len(index), AT_ONCE), about["dataset"]
    with ThreadPoolExecutor(4) as pool:
        for start in tqdm(starts, f"packing {name}", unit_scale=AT_ONCE, disable=len(index) < 1000):
            rows = range(start, min(start + AT_ONCE, len(index)))
            items = list(pool.map(item, rows))
            bad |= {row: str(found) for row, found in zip(rows, items, strict=True) if isinstance(found, Exception)}
            if bad:  # nothing is written any more: what is still read is read to name all that is bad
                continue
            for file, values in zip(arrays, zip(*items, strict=True), strict=True):
                _write(file, values, start, len(index))
            with files.writing(noted) as new:
                new.write_text(json.dumps({**note, "rows": rows.stop}))
    if bad:
        named = index["file"] if "file" in index else pd.Series([f"image {row}" for row in range(len(index))])
        lines = [f"  {named[row]}: {problem}" for row, problem in list(bad.items())[:BAD_LISTED]]
        lines += [f"  … and {len(bad) - BAD_LISTED} more"] if len(bad) > BAD_LISTED else []
        lines += ["Mend that, or take these images out of the data set. No pack was written."]
        raise ValueError("\n".join([f"{len(bad)} of {len(index)} images can't be packed:", *lines]))


def _checked(item: Sequence[np.ndarray], about: dict[str, Any]) -> Sequence[np.ndarray]:
    """An image in SatCLIP order, and its target if it has one; a ValueError if they are none."""
    image, *target = item
    if image.ndim != 3 or len(image) != len(bands.NAMES) or image.dtype != np.uint16:
        raise ValueError(f"{image.shape} {image.dtype}; a pack holds (13, H, W) uint16, DN (reflectance × 10000)")
    for classes in target:
        if classes.shape != image.shape[1:] or classes.dtype != np.uint8:
            raise ValueError(f"the target is {classes.shape} {classes.dtype}; expected {image.shape[1:]} uint8")
        known = len(about["classes"])
        if wrong := sorted({*np.unique(classes).tolist()} - {*range(known), IGNORE})[:5]:
            raise ValueError(f"the target has classes {wrong}; there are {known}, from 0 on, and {IGNORE} for none")
    return image[bands.reorder(about["stored_order"])], *target


def _write(file: Path, values: Sequence[np.ndarray], start: int, count: int) -> None:
    """Put values into an array's file of so many rows, from row `start` on, and on the disk; room is taken first."""
    if not file.exists():
        np.lib.format.open_memmap(file, "w+", values[0].dtype, (count, *values[0].shape))
        with file.open("r+b") as made:
            os.posix_fallocate(made.fileno(), 0, file.stat().st_size)  # "no space left" before the first image
    array = np.load(file, mmap_mode="r+")
    for row, value in enumerate(values, start):
        if array.shape[1:] != value.shape:
            raise ValueError(f"image {row} is {value.shape}, those before are {array.shape[1:]}; a pack holds one size")
        array[row] = value
    array.flush()


def _finish(
    folder: Path, index: pd.DataFrame, about: dict[str, Any], check: Callable[[np.ndarray], object] | None
) -> None:
    """Let `check` look at some pixels of up to 256 images; write what stands beside the arrays."""
    images, means = np.load(folder / "images.npy", mmap_mode="r"), np.empty((len(index), len(bands.NAMES)))
    every, some, spectra = max(len(images) // 256, 1), max(images[0, 0].size // 64, 1) | 1, []
    for row, image in enumerate(images):
        means[row] = image.mean(axis=(1, 2), dtype=np.float64)
        if row % every == 0:
            spectra.append(image.reshape(len(image), -1)[:, ::some].T.copy())
        forget(images)
    if check is not None:
        check(np.stack(spectra))
    if "label" not in index:
        targets = np.load(folder / "targets.npy", mmap_mode="r")
        pixels = [np.bincount(target.ravel(), minlength=IGNORE + 1)[:IGNORE] for target in targets]
        index = index.assign(label=[int(of.argmax()) if of.any() else -1 for of in pixels])
    index.to_parquet(folder / "index.parquet", index=False)
    sums = {path.name: _sum_of(path) for path in sorted(folder.iterdir()) if path.name in _PARTS}
    mean_dn = {split: means[index["split"] == split].mean(0).round(4).tolist() for split in index["split"].unique()}
    (folder / "pack.json").write_text(files.sealed({**about, "mean_dn": mean_dn, "sums": sums}))
    (folder / "progress.json").unlink()
