"""One node of the graph: one notebook, executed by papermill under watch, with a record of what it was made from.

`python -m bandmask.runs.execution 03_fine_tuning out/03_fine_tuning.ipynb -f params/experiments/sample.yaml`
The executed notebook stays, a failed one with the failing cell last; its record lies beside it as `.json`, what it
printed as `.log`. A run that is already there, from the same parameters, code and inputs, is not made again.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import resource
import socket
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TextIO

import yaml

from bandmask import files, params, progress, provenance
from bandmask.runs import gpus
from bandmask.runs.watch import watched

THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")


@dataclass(frozen=True)
class Node:
    """What one execution is given.

    Attributes:
        notebook: name of a notebook, such as `03_fine_tuning`.
        executed: where the executed one goes; record and log lie beside it.
        files: YAML of parameters, later ones first in rank.
        inputs: files it reads that other nodes made, or that were given from outside.
        outputs: files it must leave.
        threads: cores of this run.
        gpus: number of them.
        attempt: counted from 1; an error of the notebook itself is not tried twice.
        anew: execute even if it is already there.
        set: parameters above all files.
        parent: process it ends with; default: the one that started it.
    """

    notebook: str
    executed: Path
    files: Sequence[Path] = ()
    inputs: Sequence[Path] = ()
    outputs: Sequence[Path] = ()
    threads: int = 1
    gpus: int = 0
    attempt: int = 1
    anew: bool = False
    set: Sequence[tuple[str, Any]] = ()
    parent: int | None = None

    @property
    def record(self) -> Path:
        """State and provenance of the last execution."""
        return self.executed.with_suffix(".json")

    def parameters(self) -> dict[str, Any]:
        """Those of the files that the notebook declares; one YAML serves several notebooks."""
        given = {**params.load(*self.files), **dict(self.set)}
        return {name: given[name] for name in params.declared(self.notebook) if name in given}

    def made_from(self) -> dict[str, Any]:
        """Everything that decides what it makes."""
        return {
            "notebook": self.notebook,
            "parameters": provenance.values_of(self.notebook, self.parameters()),
            "code": provenance.code_of_notebook(self.notebook),
            "inputs": provenance.file_checksums(self.inputs),
        }


class Failed(Exception):
    """The notebook ended in an error, or without what it should leave."""


def run(node: Node) -> str:
    """Execute a node and keep its record.

    Returns:
        `done`, or `already there`.

    Raises:
        Failed: an error of the notebook, its first line; the executed notebook ends with the failing cell.
        ValueError: parameters or GPUs that can't be used.
    """
    node.executed.parent.mkdir(parents=True, exist_ok=True)
    with _alone(node):
        made_from = node.made_from()
        last = read_record(node.record)
        if not node.anew and is_whole(node, last, made_from):
            return "already there"
        if node.attempt > 1 and last.get("state") == "failed" and _same(last, made_from):
            raise Failed(f"{last['error']} (not tried again: an error of the notebook, not of the machine)")
        with gpus.claim(node.gpus) as claimed:
            return _execute(node, made_from, claimed)


def read_record(path: Path) -> dict[str, Any]:
    """The record of an execution; empty if there is none, or none that can be read."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def is_whole(node: Node, record: Mapping[str, Any], made_from: Mapping[str, Any]) -> bool:
    """The last execution ended well, from the same things, and what it left lies there unchanged."""
    if record.get("state") != "done" or not _same(record, made_from):
        return False
    return bool(record["outputs"] == provenance.file_checksums(node.outputs)) and None not in record["outputs"].values()


def _same(record: Mapping[str, Any], made_from: Mapping[str, Any]) -> bool:
    return all(record.get(key) == json.loads(json.dumps(value)) for key, value in made_from.items())


def _execute(node: Node, made_from: dict[str, Any], claimed: Sequence[str]) -> str:
    started = time.perf_counter()
    record = {
        "state": "running",
        **made_from,
        "pid": os.getpid(),
        "host": os.environ.get("SLURMD_NODENAME") or socket.gethostname(),
        "attempt": node.attempt,
        "threads": node.threads,
        "gpu": ",".join(claimed) or None,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "ended": None,
        "error": None,
        "outputs": {},
    }

    def note(**changes: Any) -> None:
        seconds = round(time.perf_counter() - started, 1)
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
        ended = {"ended": datetime.now(UTC).isoformat(timespec="seconds"), "seconds": seconds} if changes else {}
        record.update(changes, **ended, peak_memory_mib=round(peak, 1))
        with files.writing(node.record) as partial:
            partial.write_text(json.dumps(record, indent=1), encoding="utf-8")

    note()
    try:
        watched(
            lambda: _papermill(node, claimed),
            last_words=lambda why: note(state="stopped", error=why),
            parent=node.parent,
            heartbeat=lambda: os.utime(node.record),
        )
        left = provenance.file_checksums(node.outputs)
        if missing := [name for name, checksum in left.items() if checksum is None]:
            raise Failed(f"{node.notebook} ended without writing {', '.join(missing)}")
    except Failed as error:
        note(state="failed", error=str(error).splitlines()[0])
        raise
    except Exception as error:  # of Jupyter, papermill or the disk, not of a cell: another time it may go well
        died = "kernel died" in str(error).lower()
        said = f"the kernel was killed (out of memory?): {error}" if died else f"{type(error).__name__}: {error}"
        note(state="stopped", error=said.splitlines()[0])
        raise Failed(said) from error
    note(state="done", outputs=left)
    return "done"


def _papermill(node: Node, claimed: Sequence[str]) -> None:
    import papermill
    from papermill.exceptions import PapermillExecutionError

    os.environ.update(dict.fromkeys(THREADS, str(node.threads)))
    os.environ[progress.ENVIRONMENT] = str(node.executed.with_name(f".{node.notebook}.progress.json"))
    if claimed:
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(claimed)
    with node.executed.with_suffix(".log").open("w", encoding="utf-8") as log, _stderr_to(log):
        try:
            papermill.execute_notebook(
                str(params.notebook_path(node.notebook)),
                str(node.executed),
                parameters=node.parameters(),
                progress_bar=False,
                stdout_file=log,
                stderr_file=log,
            )
        except PapermillExecutionError as error:
            _end_with_failing_cell(node.executed)
            raise Failed(f"{error.ename}: {error.evalue}") from None
    if node.executed.with_suffix(".html") in node.outputs:
        _write_page(node.executed)


def _end_with_failing_cell(executed: Path) -> None:
    """Leave out the cells that were not reached: whoever opens a failed notebook finds the failure at its end."""
    notebook = json.loads(executed.read_text(encoding="utf-8"))
    failing = [i for i, cell in enumerate(notebook["cells"]) if cell["metadata"].get("papermill", {}).get("exception")]
    if failing:
        notebook["cells"] = notebook["cells"][: failing[-1] + 1]
        with files.writing(executed) as partial:
            partial.write_text(json.dumps(notebook, indent=1), encoding="utf-8")


@contextmanager
def _stderr_to(log: TextIO) -> Iterator[None]:
    """What the kernel's process itself says, a crash of a library above all, belongs to the run's log."""
    before = os.dup(2)
    os.dup2(log.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(before, 2)
        os.close(before)


def _write_page(executed: Path) -> None:
    """The executed notebook without its code, as a page to hand on."""
    from nbconvert import HTMLExporter

    page, _ = HTMLExporter(exclude_input=True).from_filename(str(executed))
    with files.writing(executed.with_suffix(".html")) as partial:
        partial.write_text(page, encoding="utf-8")


@contextmanager
def _alone(node: Node) -> Iterator[None]:
    """Wait until no other process executes this node: one whose controller was killed may still be at it."""
    lock = node.executed.with_name(f".{node.notebook}.lock")
    with lock.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting: another process executes {node.executed}", file=sys.stderr, flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _assignment(text: str) -> tuple[str, Any]:
    name, _, value = text.partition("=")
    return name, yaml.safe_load(value)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; 0 if the node is there afterwards."""
    parser = argparse.ArgumentParser(
        prog="python -m bandmask.runs.execution", description="Execute one node of the graph."
    )
    parser.add_argument("notebook", help="such as 03_fine_tuning")
    parser.add_argument("executed", type=Path, help="where the executed notebook goes")
    parser.add_argument("-f", "--files", type=Path, nargs="*", default=[], help="YAML of parameters, later ones on top")
    parser.add_argument("--set", type=_assignment, nargs="*", default=[], help="parameters above all files: name=value")
    parser.add_argument("--inputs", type=Path, nargs="*", default=[])
    parser.add_argument("--outputs", type=Path, nargs="*", default=[])
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--gpus", type=int, default=0)
    parser.add_argument("--attempt", type=int, default=1)
    parser.add_argument("--parent", type=int, help="process to end with; default: whoever starts this")
    parser.add_argument("--anew", action="store_true", help="execute even if it is already there")
    node = Node(**vars(parser.parse_args(arguments)))
    try:
        said = run(node)
    except (Failed, ValueError, FileNotFoundError) as error:
        print(f"{node.executed}: {error}", file=sys.stderr, flush=True)
        return 1
    if said == "already there":
        print(f"{node.executed}: already there, from the same parameters, code and inputs", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
