"""A pack is whole or not there, whatever happens while it is written; a long packing goes on where it was killed.

Images given as an iterable are written under a temporary name that is removed if anything fails. Images given as a
function of the first row go into `.<name>.packing` beside the target: data are flushed to the disk before
`progress.json` says so, thus a kill loses at most one interval, and the next call goes on from there.
"""

from __future__ import annotations

import os
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import pandas as pd

from bandmask import bands, files
from bandmask.packs import IGNORE, SPLITS, Pack, open_pack
from bandmask.readers.streaming import BadImagesError, Item, Job, State, Writer


def write_pack(
    path: Path | str,
    images: Iterable[Item] | Callable[[int], Iterable[Item]],
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
    """Write and open a pack. Images are streamed, so memory does not depend on their number.

    Args:
        path: folder to make; an older pack there is replaced only once the new one is whole.
        images: an item a row of `index`, in its order; or a function that gives those from a row on, and then a
            packing that was interrupted goes on where it stopped, if source, options, index, name and order are the
            same. An item is a (13, H, W) uint16 image, channels in `order`; with `targets` the pair of it and its
            target, (H, W) uint8, and, as a third part if wanted, a dictionary of counts that the card sums up as
            `counts`; or an exception: this image is bad for that reason.
        index: column `split` at least, and `label`; with `targets` the label may be left out, and is the most
            frequent class of the image then, −1 where no pixel has one.
        name: of the data set.
        classes: names; labels and targets index into them.
        source: where it came from, for people.
        source_checksum: of the source.
        order: file order of the channels, a key of `bands.ORDERS`.
        strict_guard: refuse a pack whose cirrus channel is not where `order` says; False warns instead, for a
            single scene (open sea alone can break the rule).
        targets: items come with the class of each pixel.
        skip_bad: leave bad images out, and list them in the card as `skipped`, instead of stopping once all are
            known.
        progress: show a progress bar, and say beforehand how much disk is needed.
        card: further entries of `pack.json`.

    Raises:
        ValueError: images of different shapes, targets of no class, or channels in another order than `order`.
        BadImagesError: bad images, named. Those that were good are kept if packing can go on: the same call with
            `skip_bad=True` does not read them again.
        OSError: the folder can't be written, or the disk is too small (known before the first image is written).
        BlockingIOError: another process is packing to the same path (only where packing can go on).
    """
    path = Path(path)
    _check_index(index, classes, targets)
    bands.file_order(order)
    if path.exists() and not _replaceable(path):
        raise ValueError(f"{path} is there and is no pack; it is not overwritten. Choose another folder for the pack")
    about = {"dataset": name, "classes": list(classes), "source": source, "source_checksum": source_checksum}
    job = Job(path, index, order, targets, skip_bad, strict_guard, progress, {**card, **about})
    if callable(images):
        _pack_resumably(job, images)
        return open_pack(path)
    with files.writing(path) as partial:
        partial.mkdir(parents=True)
        with (partial / "images.npy").open("w+b") as file:  # no memory map: on a full disk that dies of SIGBUS
            writer = Writer(job, partial, file, State())
            with writer.opened():
                writer.run(images)
                writer.check_order()
                writer.finish()
    return open_pack(path)


def _replaceable(path: Path) -> bool:
    """A pack, an empty folder, or what is left of a pack whose card is gone: never a folder of anything else."""
    known = {"pack.json", "images.npy", "index.parquet", "targets.npy"}
    return path.is_dir() and {file.name for file in path.iterdir()} <= known


def _pack_resumably(job: Job, images: Callable[[int], Iterable[Item]]) -> None:
    """Pack into a folder that stays if this is interrupted; rename it to the target once it is whole."""
    folder = job.path.with_name(f".{job.path.name}.packing")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _locked(folder, job.path) as file:
            state, fingerprint = State.load(folder), job.fingerprint()
            hopeless = state.read == len(job.index) and state.bad and not job.skip_bad  # unless files were put right
            if state.fingerprint != fingerprint or hopeless:
                (folder / "progress.json").unlink(missing_ok=True)  # before the data it speaks of go
                (folder / "targets.npy").unlink(missing_ok=True)
                state = State(fingerprint)
            _fill(Writer(job, folder, file, state), images)
            if job.path.is_dir():
                with files.writing(job.path) as partial:
                    os.replace(folder, partial)
            else:
                os.replace(folder, job.path)
            (job.path / "progress.json").unlink(missing_ok=True)
    except BlockingIOError:
        raise
    except OSError as error:
        place = folder if error.filename is None else Path(error.filename)
        if folder not in (place, *place.parents) and place not in folder.parents:
            raise  # a source that can't be read is not a target that can't be written
        raise OSError(
            error.errno,
            f"can't write {job.path}: {error.strerror or error}. What is packed so far stays, and the same call goes "
            "on there. Free some space, pack fewer images, or set BANDMASK_OUTPUTS to another folder.",
        ) from error


def _fill(writer: Writer, images: Callable[[int], Iterable[Item]]) -> None:
    with writer.opened():
        try:
            if writer.state.read < len(writer.job.index):
                writer.run(images(writer.state.read), save=True)
        except Exception:
            with suppress(OSError):  # on a full disk the last note stands
                writer.save()
            raise
        writer.save()
        try:
            writer.check_order()
        except BadImagesError:
            raise  # the good ones are of use once the bad ones may be skipped
        except ValueError:
            shutil.rmtree(writer.folder, ignore_errors=True)  # channels in the wrong order are of no use to anyone
            raise
        writer.finish()


@contextmanager
def _locked(folder: Path, path: Path) -> Iterator[BinaryIO]:
    """`images.npy` of a partial folder, open and locked: two processes packing to one path would spoil both."""
    import fcntl  # POSIX only, thus here

    while True:
        folder.mkdir(exist_ok=True)
        try:
            descriptor = os.open(folder / "images.npy", os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:
            continue  # the other process has just renamed its folder
        with os.fdopen(descriptor, "r+b") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise BlockingIOError(
                    f"another process is packing to {path} right now; wait until it is done, or choose another folder"
                ) from None
            if _is_at(file, folder / "images.npy"):
                yield file
                return


def _is_at(file: BinaryIO, path: Path) -> bool:
    """Whether an open file is still where it was opened: the one who held the lock may have renamed it meanwhile."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _check_index(index: pd.DataFrame, classes: Sequence[str], targets: bool) -> None:
    required = {"split"} if targets else {"label", "split"}
    if missing := required - set(index.columns):
        names = " and ".join(map(repr, sorted(required)))
        raise ValueError(f"the index of a pack needs columns {names}; {sorted(missing)} are not there")
    if index.empty:
        raise ValueError("0 rows, so no image: a pack holds one at least")
    if len(classes) >= IGNORE:
        raise ValueError(f"{len(classes)} classes; a pack holds fewer than {IGNORE}")
    labels = set(index["label"]) if "label" in index else set()
    if wrong := sorted(labels - set(range(-1 if targets else 0, len(classes)))):
        raise ValueError(f"labels {wrong[:5]} have no class; there are {len(classes)}, counted from 0")
    if unknown := set(index["split"]) - set(SPLITS):
        raise ValueError(f"unknown split {sorted(map(str, unknown))}; available: {', '.join(SPLITS)}")


def read_ahead(read: Callable[[Any], Any], keys: Iterable[Any], workers: int = 4) -> Iterator[Any]:
    """Results in order, a few read in advance: disks and decoding overlap, memory stays flat."""
    with ThreadPoolExecutor(workers) as pool:
        waiting: deque[Any] = deque()
        for key in keys:
            waiting.append(pool.submit(read, key))
            if len(waiting) > 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
