"""Rows are appended to the files of a pack in the making, and `progress.json` never says more than the disk holds.

`packing` decides where; here is what is checked, written and counted, row by row, in memory that does not grow.
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pandas as pd
from tqdm import tqdm

from bandmask import bands
from bandmask.packs import FORMAT, IGNORE, check_band_order

SAVE_ROWS, SAVE_BYTES = 256, 64_000_000  # after so many rows or bytes an interrupted packing can go on
BAD_LISTED = 50  # bad images named in one error; their number is always said

Item = Any  # image, (image, target), (image, target, {"what was counted": n}), or the exception that reading it raised


class BadImagesError(ValueError):
    """Some files of a data set can't be read; the message names each with its problem."""


@dataclass(frozen=True)
class Job:
    """What is to be written where."""

    path: Path
    index: pd.DataFrame
    order: str
    targets: bool
    skip_bad: bool
    strict_guard: bool
    progress: bool
    card: dict[str, Any]

    @property
    def classes(self) -> int:
        """How many there are."""
        return len(self.card["classes"])

    def fingerprint(self) -> str:
        """The same for calls that would write the same images in the same order."""
        words = [FORMAT, self.order, self.targets, *(self.card.get(key) for key in ("dataset", "classes", "options"))]
        words += [self.card["source_checksum"], list(self.index.columns)]
        hashed = hashlib.sha256(json.dumps(words, sort_keys=True).encode())
        hashed.update(pd.util.hash_pandas_object(self.index, index=False).to_numpy().tobytes())
        return hashed.hexdigest()


@dataclass
class State:
    """How far a packing is: `progress.json`, which never says more than the disk holds."""

    fingerprint: str = ""
    shape: list[int] = field(default_factory=list)  # (13, H, W)
    read: int = 0  # rows, good and bad
    totals: dict[str, list[float]] = field(default_factory=dict)  # per split: sum over images of mean DN per band
    labels: list[int] = field(default_factory=list)
    bad: dict[str, str] = field(default_factory=dict)  # row: problem
    counts: dict[str, int] = field(default_factory=dict)

    @property
    def kept(self) -> int:
        """Rows that are written."""
        return self.read - len(self.bad)

    @classmethod
    def load(cls, folder: Path) -> State:
        """What the last note says; nothing is packed if there is none."""
        try:
            return cls(**json.loads((folder / "progress.json").read_text()))
        except (OSError, ValueError, TypeError):
            return cls()  # none, or of another version: from the beginning

    def save(self, folder: Path) -> None:
        """Write beside and rename, so that a kill leaves the last note or this one."""
        new = folder / "progress.json.new"
        with new.open("w") as file:
            json.dump(asdict(self), file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, folder / "progress.json")


class Writer:
    """Appends rows to the files of a pack that is being made in `folder`."""

    def __init__(self, job: Job, folder: Path, images: BinaryIO, state: State) -> None:
        """`images` is `images.npy`, open for reading and writing; the caller closes it."""
        self.job, self.folder, self.state = job, folder, state
        self.open_files = {"images.npy": images}

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Open the targets too, and go to the end of what `state` says is written."""
        if self.job.targets:
            file = self.folder / "targets.npy"
            self.open_files["targets.npy"] = file.open("r+b" if file.exists() else "w+b")
        try:
            for name, opened in self.open_files.items():
                end = self._bytes(name, self.state.kept) if self.state.shape else 0
                if opened.seek(0, os.SEEK_END) < end:
                    raise ValueError(f"{self.folder / name} is shorter than progress.json says; delete {self.folder}")
                opened.truncate(end)
                opened.seek(end)
            yield
        finally:
            if self.job.targets:
                with suppress(OSError):  # what counts is synced before; here it could only hide the first error
                    self.open_files["targets.npy"].close()

    def run(self, items: Iterable[Item], save: bool = False) -> None:
        """Write the items that are missing; with `save`, note how far it is now and then."""
        state, count = self.state, len(self.job.index)
        if state.shape:
            self._check_space()
        rows = unsaved = 0
        desc, hide = f"packing {self.job.card['dataset']}", not self.job.progress
        with tqdm(total=count, initial=state.read, desc=desc, disable=hide, mininterval=1) as bar:
            for item in items:
                if state.read == count:
                    raise ValueError(f"more than {count} images for {count} rows; there must be one a row")
                unsaved += self.add(item)
                rows += 1
                bar.update()
                if save and (rows == SAVE_ROWS or unsaved >= SAVE_BYTES):
                    self.save()
                    rows = unsaved = 0
        if state.read != count:
            raise ValueError(f"{state.read} images for {count} rows; there must be one a row")

    def add(self, item: Item) -> int:
        """Write one row; its size in bytes."""
        state, row = self.state, self.state.read
        if isinstance(item, Exception):
            state.bad[str(row)] = str(item)
            state.read += 1
            return 0
        image, target, *counts = item if self.job.targets else (item, None)
        self._check_image(image, row)
        label = -1 if target is None else self._check_target(target, image.shape[1:], row)
        if not state.shape:
            self._begin(image.shape)
        ordered = np.ascontiguousarray(image[bands.reorder(self.job.order)], dtype="<u2")
        self.open_files["images.npy"].write(ordered.data)
        if target is not None:
            self.open_files["targets.npy"].write(np.ascontiguousarray(target).data)
            state.labels.append(label)
        split = str(self.job.index["split"].iloc[row])
        mean = ordered.mean(axis=(1, 2), dtype=np.float64)
        state.totals[split] = (np.array(state.totals.get(split, 0.0)) + mean).tolist()
        for what, number in counts[0].items() if counts else ():
            state.counts[what] = state.counts.get(what, 0) + int(number)
        state.read += 1
        return ordered.nbytes + (target.nbytes if target is not None else 0)

    def save(self) -> None:
        """Data first, then the note about them."""
        self._sync()
        self.state.save(self.folder)

    def check_order(self) -> None:
        """Refuse bad images, then channels in another order."""
        job, state = self.job, self.state
        if state.bad and (not job.skip_bad or state.kept == 0):
            raise BadImagesError(
                f"{listing_of(self._skipped(), len(job.index))}\n"
                "Fetch these files again, or pass skip_bad=True to leave them out. No pack was written."
            )
        overall = np.sum([np.array(total) for total in state.totals.values()], axis=0) / state.kept
        check_band_order(overall, order=job.order, strict=job.strict_guard)

    def finish(self) -> None:
        """Write what stands beside the arrays."""
        job, state = self.job, self.state
        good = ~np.isin(np.arange(len(job.index)), [int(row) for row in state.bad])
        index = job.index[good].reset_index(drop=True)
        if "label" not in index:
            index["label"] = state.labels
        if state.bad:  # there are fewer rows than the headers say
            for name, file in self.open_files.items():
                file.seek(0)
                file.write(self._header(name, state.kept))
        self._sync()
        counts = index["split"].value_counts()
        mean_dn = {split: np.array(total) / counts[split] for split, total in state.totals.items()}
        index.to_parquet(self.folder / "index.parquet", index=False)
        extra: dict[str, Any] = {"counts": dict(sorted(state.counts.items()))} if state.counts else {}
        if state.bad:
            extra["skipped"] = {**job.card.get("skipped", {}), **self._skipped()}
        everything = {
            **job.card,
            **extra,
            "format": FORMAT,
            "bands": list(bands.NAMES),
            "stored_order": job.order,
            "targets": job.targets,
            "mean_dn": {split: [round(float(v), 4) for v in mean] for split, mean in mean_dn.items()},
        }
        (self.folder / "pack.json").write_text(json.dumps(everything, indent=2))

    def _begin(self, shape: tuple[int, ...]) -> None:
        self.state.shape = list(shape)
        try:
            self._check_space()
            for name, file in self.open_files.items():
                file.write(self._header(name, len(self.job.index)))
        except OSError:
            self.state.shape = []  # no header is there, so no row can follow
            raise

    def _check_space(self) -> None:
        """Say how much disk is needed, and stop before the first byte if there is less."""
        count = len(self.job.index) - self.state.read
        needed = sum(self._bytes(name, count) for name in self.open_files)
        free = shutil.disk_usage(self.folder).free
        start = f", going on at {self.state.read:,}" if self.state.read else ""
        words = f"{count:,} images{start}: {_size(needed)} needed, {_size(free)} free in {self.folder.parent.resolve()}"
        if self.job.progress:
            tqdm.write(f"packing {self.job.card['dataset']}: {words}")
        if needed > free:
            raise OSError(errno.ENOSPC, f"No space left on device ({words})")

    def _bytes(self, name: str, rows: int) -> int:
        """Size of a file with so many rows."""
        row = self.state.shape if name == "images.npy" else self.state.shape[1:]
        return len(self._header(name, rows)) + rows * int(np.prod(row)) * (2 if name == "images.npy" else 1)

    def _header(self, name: str, rows: int) -> bytes:
        """Of the same length for any number of rows: numpy leaves room for the first axis to grow."""
        descr, row = ("<u2", self.state.shape) if name == "images.npy" else ("|u1", self.state.shape[1:])
        buffer = io.BytesIO()
        fields = {"descr": descr, "fortran_order": False, "shape": (rows, *row)}
        np.lib.format.write_array_header_1_0(buffer, fields)
        return buffer.getvalue()

    def _sync(self) -> None:
        for file in self.open_files.values():
            file.flush()
            os.fsync(file.fileno())

    def _check_image(self, image: np.ndarray, row: int) -> None:
        shape = tuple(self.state.shape) or (len(bands.NAMES), *image.shape[1:])
        if image.shape != shape or image.ndim != 3 or image.dtype != np.uint16:
            raise ValueError(
                f"image {row} is {image.shape} {image.dtype}; a pack holds (13, H, W) uint16 of one size, here {shape}"
            )

    def _check_target(self, target: np.ndarray, size: tuple[int, ...], row: int) -> int:
        """The most frequent class of a target, or −1."""
        if target.shape != size or target.dtype != np.uint8:
            raise ValueError(f"target {row} is {target.shape} {target.dtype}; expected {size} uint8")
        pixels = np.bincount(target.ravel(), minlength=IGNORE + 1)
        pixels[IGNORE] = 0
        if wrong := [value for value in np.flatnonzero(pixels).tolist() if value >= self.job.classes]:
            raise ValueError(
                f"target {row} has classes {wrong[:5]}; there are {self.job.classes}, counted from 0, and {IGNORE} for "
                "pixels without a label"
            )
        return int(pixels.argmax()) if pixels.any() else -1

    def _skipped(self) -> dict[str, str]:
        """`{file: problem}` of the bad images."""
        index = self.job.index
        named = index["file"] if "file" in index else pd.Series([f"image {row}" for row in range(len(index))])
        return {str(named.iloc[int(row)]): problem for row, problem in self.state.bad.items()}


def listing_of(problems: dict[str, str], total: int) -> str:
    """`3 of 100 images can't be packed:` and a line for each; of very many, the first only."""
    lines = [f"  {file}: {problem}" for file, problem in list(problems.items())[:BAD_LISTED]]
    if len(problems) > BAD_LISTED:
        lines.append(f"  … and {len(problems) - BAD_LISTED} more")
    return "\n".join([f"{len(problems)} of {total} images can't be packed:", *lines])


def _size(count: float) -> str:
    """Bytes for people: `70.1 GB`."""
    for unit in ("bytes", "kB", "MB"):
        if count < 1000:
            return f"{count:.1f} {unit}" if unit != "bytes" else f"{count:.0f} bytes"
        count /= 1000
    return f"{count:,.1f} GB"
