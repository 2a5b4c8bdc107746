"""Where things are, and how they are written: beside, then renamed, so that a failure loses nothing."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


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
    """Yield a temporary path beside `path` (file or folder); rename it over `path` if the block succeeds.

    A process killed inside the block leaves what was at `path` untouched, and the next writer of the same path
    sweeps the leftovers of dead writers.

    Raises:
        OSError: the folder can't be written, or the disk is full; the message names the path and the way out.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _sweep(path)
        _remove(partial)
    except OSError as error:
        raise _cannot_write(path, error) from error
    try:
        yield partial
        _sync(partial)
        _rename_over(partial, path)
    except OSError as error:
        _remove(partial)
        if error.filename is None or str(error.filename).startswith(str(partial)):
            raise _cannot_write(path, error) from error
        raise  # a source that can't be read is not a target that can't be written
    except BaseException:
        _remove(partial)
        raise


def _cannot_write(path: Path, error: OSError) -> OSError:
    return OSError(
        error.errno,
        f"can't write {path}: {error.strerror or error}. What was there before is untouched. Free some space, make the "
        "folder writable, or set BANDMASK_OUTPUTS to another folder.",
    )


def _rename_over(partial: Path, path: Path) -> None:
    if not path.is_dir():
        os.replace(partial, path)
        return
    aside = partial.with_name(f"{partial.name}-old")  # a folder can't be renamed over a full one: step it aside
    os.replace(path, aside)
    try:
        os.replace(partial, path)
    except BaseException:
        os.replace(aside, path)
        raise
    _remove(aside)


def sha256(path: Path | str) -> str:
    """Checksum of a file's bytes, as hex."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def checksum_of(value: object) -> str:
    """SHA-256 of anything that JSON can hold, as hex."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def require(path: Path | str, made_by: str) -> Path:
    """`path`, if it is there; else an error that says which step makes it.

    Raises:
        FileNotFoundError: nothing at `path`; names it and `made_by`.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} is not there yet. Make it first: {made_by}")
    return path


def _sweep(path: Path) -> None:
    """Remove partial files that writers of `path` left when they were killed; put back a folder stepped aside."""
    for leftover in list(path.parent.iterdir()):  # no glob: a name may hold brackets
        if not leftover.name.startswith(f".{path.name}.partial-"):
            continue
        pid = leftover.name.split(".partial-")[1].removesuffix("-old")
        if pid.isdigit() and _alive(int(pid)):
            continue
        if leftover.name.endswith("-old") and not path.exists():
            os.replace(leftover, path)
        else:
            _remove(leftover)


def _alive(pid: int) -> bool:
    if pid == os.getpid():
        return False  # our own earlier attempt
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _remove(path: Path) -> None:
    """Clean up as far as possible; an error here would hide the one that matters."""
    with contextlib.suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    """Have the data on disk before the rename: a crash must not leave a whole name on a half file."""
    for file in [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]:
        with file.open("rb") as handle:
            os.fsync(handle.fileno())
