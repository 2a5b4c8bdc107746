"""Where things are; how they are written: beside, then renamed, so that a failure loses nothing; what to trust."""

import contextlib
import ctypes
import functools
import hashlib
import importlib.util
import json
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

RECORDS = Path(__file__).parent / "records"  # of measurements, and the thesis' printed tables
MINI = Path(__file__).parent / "mini"  # images with real labels, and what was trained on others: see its README


def project_root() -> Path:
    """The repository's root, whatever the working directory (papermill and nbval run notebooks in different ones)."""
    return Path(__file__).resolve().parent.parent


def outputs_root() -> Path:
    """Where runs write: `BANDMASK_OUTPUTS` if set, else `outputs/` in the repository."""
    return Path(os.environ.get("BANDMASK_OUTPUTS") or project_root() / "outputs")


def data_root() -> Path | None:
    """Where data sets lie: `BANDMASK_DATA` if set, else `../shared/data` where that exists, else None."""
    if given := os.environ.get("BANDMASK_DATA"):
        return Path(given)
    beside = project_root().parent / "shared" / "data"
    return beside if beside.is_dir() else None


@contextmanager
def writing(path: Path | str) -> Iterator[Path]:
    """Yield a temporary path for `path` (file or folder) of the same name; rename it over `path` if the block succeeds.

    A process killed inside the block leaves what was at `path` untouched, and the next writer of the same path
    sweeps what it left. Whether a writer lives is asked of its lock, which ends with it, in whatever PID namespace
    or on whatever host it runs.

    Raises:
        OSError: the folder can't be written, or the disk is full; the message names the path and the way out.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _sweep(path)
        lock = None
        while lock is None:  # a folder that this process alone writes to
            folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.partial-", dir=path.parent))
            with contextlib.suppress(FileNotFoundError):  # swept before it was locked: another one
                lock = free_lock(folder / "~lock")
    except OSError as error:
        raise cannot_write(path, error) from error
    partial = folder / path.name
    try:
        yield partial
        _sync(partial)
        _rename_over(partial, path)
    except OSError as error:
        if error.filename is None or str(error.filename).startswith(str(partial)):
            raise cannot_write(path, error) from error
        raise  # a source that can't be read is not a target that can't be written
    finally:
        if path.exists() or not (folder / "~old").exists():
            shutil.rmtree(folder, ignore_errors=True)  # an error here would hide the one that matters
        lock.release()


def free_lock(path: Path | str) -> FileLock | None:
    """The lock of this name, held until it is released or the process ends; None if another process holds it.

    A symbolic link there is not followed, and nothing is emptied.
    """
    lock = FileLock(path, thread_local=False)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        return None
    return lock


def _sweep(path: Path) -> None:
    """Remove what writers of `path` left when they were killed; put back a folder stepped aside."""
    for leftover in list(path.parent.iterdir()):  # no glob: a name may hold brackets
        if not leftover.name.startswith(f".{path.name}.partial-") or not leftover.is_dir():
            continue
        with contextlib.suppress(FileNotFoundError, PermissionError):  # just removed by its writer, or another user's
            if lock := free_lock(leftover / "~lock"):
                if (leftover / "~old").exists() and not path.exists():
                    os.replace(leftover / "~old", path)
                shutil.rmtree(leftover, ignore_errors=True)
                lock.release()


def cannot_write(path: Path, error: OSError) -> OSError:
    """What to raise where a file or folder can't be written: which, why, and the way out."""
    return OSError(
        error.errno,
        f"can't write {path}: {error.strerror or error}. What was there before is untouched. Free some space, make the "
        "folder writable, or set BANDMASK_OUTPUTS to another folder, and call again: what can go on goes on.",
    )


def _rename_over(partial: Path, path: Path) -> None:
    if not path.is_dir():
        os.replace(partial, path)
        return
    aside = partial.with_name("~old")  # a folder can't be renamed over a full one: step it aside
    os.replace(path, aside)
    try:
        os.replace(partial, path)
    except BaseException:
        os.replace(aside, path)
        raise


def sha256(path: Path | str) -> str:
    """Checksum of a file's bytes, as hex; they are read once a process, as long as time and size stay."""
    now = Path(path).stat()
    return _sha256(Path(path), now.st_ino, now.st_mtime_ns, now.st_size)


@functools.lru_cache(maxsize=4096)
def _sha256(path: Path, *_: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def checksum_of(value: object) -> str:
    """SHA-256 of anything that JSON can hold, as hex."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def sealed(entries: Mapping[str, Any]) -> str:
    """JSON with a checksum of itself, `sum`: for files that say what others are made of."""
    return json.dumps({**entries, "sum": checksum_of(json.loads(json.dumps(entries)))}, indent=2)


def unsealed(path: Path | str) -> dict[str, Any]:
    """What `sealed` wrote, or an older version without a checksum; a ValueError of no mapping, and of an edited one."""
    entries = json.loads(Path(path).read_text(encoding="utf-8"))
    if not isinstance(entries, dict):
        raise ValueError(f"{Path(path).name} holds no mapping")
    if entries.pop("sum", None) not in (None, checksum_of(entries)):
        raise ValueError(f"{Path(path).name} was edited: its checksum is another one")
    return entries


def is_litter(name: str) -> bool:
    """Whether macOS left a file beside others: `._x.tif` and `__MACOSX/` are no images."""
    return any(part.startswith("._") or part == "__MACOSX" for part in Path(name).parts)


def require(path: Path | str, made_by: str) -> Path:
    """`path`, if it is there; else a FileNotFoundError that says which step makes it."""
    if not Path(path).exists():
        raise FileNotFoundError(f"{path} is not there yet. Make it first: {made_by}")
    return Path(path)


def read_record(path: Path | str) -> dict[str, Any]:
    """The record of a notebook's execution; empty if there is none, or none that can be read."""
    try:
        record = json.loads(Path(path).read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return record if isinstance(record, dict) and isinstance(record.get("outputs"), dict) else {}


def stale(record: Mapping[str, Any], outputs: Mapping[str, str | None], **made_from: Mapping[str, Any]) -> str:
    """Why what a record tells of must not be shown, used or kept; empty if nothing speaks against it.

    Args:
        record: of `read_record`.
        outputs: what lies there now: checksums by name from the record's folder, None where nothing does.
        made_from: `parameters`, `code` and `inputs` as they are now, where it is asked whether a node must run: then an
            outdated record counts again if it was made from these.
    """
    if not record:
        return "no record of a run"
    for kind, values in made_from.items():
        was, now = record.get(kind) or {}, json.loads(json.dumps(values))
        for name in [*now, *(name for name in was if name not in now)]:
            if was.get(name) != now.get(name):
                said = {"code": f"code of {name} changed", "inputs": f"reads {name}, which changed"}
                return said.get(kind, f"{name} = {now.get(name)!r}, was {was.get(name)!r}")
    if record.get("state") not in ("done", "outdated" if made_from else "done"):
        return f"{record.get('state')}: {record.get('error') or 'it has not ended'}"
    for name, now in outputs.items():
        if now is None or record["outputs"].get(name) != now:
            return f"{name} is {'gone' if now is None else 'not what was written'}"
    return ""


def distrust(path: Path | str, records: Iterable[Path] | None = None) -> str:
    """Why a file must not be shown or used: its run's record, and why that is `stale`.

    Empty for a file that is as its record says, and for one that no record tells of: a notebook run by hand keeps none.
    Of the record that is being written, `BANDMASK_RECORD`, nothing is asked: its notebook may read what it just left.

    Args:
        path: the file.
        records: where to look; default: beside it and in the two folders above.
    """
    path = Path(path)
    beside = (file for folder in path.parents[:3] for file in folder.glob("[0-9][0-9]_*.json"))
    for file in sorted(beside) if records is None else records:
        record, name = read_record(file), os.path.relpath(path.resolve(), file.parent.resolve())
        asked = name in record.get("outputs", {}) and str(file) != os.environ.get("BANDMASK_RECORD")
        if asked and (why := stale(record, {name: sha256(path) if path.is_file() else None})):
            return f"{file.stem}: {why}"
    return ""


def of_package(package: str, part: str = "", *, pip: str = "") -> Path:
    """A file or folder of an installed package, without running it; else a FileNotFoundError says how to get it."""
    found, pip = importlib.util.find_spec(package), pip or package.replace("_", "-")
    path = Path(found.origin).parent / part if found and found.origin else None
    if path is None or not path.exists():
        raise FileNotFoundError(f"{pip} or its {part or 'code'} is not installed: pip install --no-deps {pip}")
    return path


def _sync(path: Path) -> None:
    """Have the data on disk before the rename: a crash must not leave a whole name on a half file."""
    for file in [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]:
        with file.open("rb") as handle:
            os.fsync(handle.fileno())


def end_with_parent() -> None:
    """Tie this process' end to that of the one that started it, even by SIGKILL; called before what takes long."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    parent = multiprocessing.parent_process()
    if parent is not None and not parent.is_alive():
        sys.exit("the process that started this one is gone")
