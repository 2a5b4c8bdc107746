"""What state every node of an experiment is in, from what lies on disk alone; nothing heavy is imported or read.

A node is one execution of a notebook. Beside its executed notebook lies a record, which says how it went; what was
made before there were records counts by its outputs.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bandmask import bands, files, params
from bandmask.runs.headlines import OF_RUN, headline

NAMES = ("done", "running", "failed", "stopped", "lost", "to do")
LOST_AFTER = 60.0  # seconds without a sign of life from another machine


@dataclass(frozen=True)
class Node:
    """One execution of a notebook that an experiment needs.

    Attributes:
        notebook: such as `03_fine_tuning`.
        run: folder name of the mask set, or of the data set of a pack; empty where there is one an experiment.
        executed: where the executed notebook lies, or will.
        output: the file that is there once it is done.
    """

    notebook: str
    run: str
    executed: Path
    output: Path

    @property
    def record(self) -> Path:
        """How it went: state, process, times, error."""
        return self.executed.with_suffix(".json")

    @property
    def progress(self) -> Path:
        """How far it is, while it runs."""
        return self.executed.with_name(f".{self.notebook}.progress.json")

    @property
    def title(self) -> str:
        """For people: `B2_B3_B4/03_fine_tuning`."""
        return f"{self.run}/{self.notebook}" if self.run else self.notebook


@dataclass(frozen=True)
class State:
    """How a node stands.

    Attributes:
        node: which.
        name: one of `NAMES`. `stopped` was ended by a signal, `lost` says it runs, but its process is gone.
        seconds: it took, or has taken so far; None if nobody knows.
        progress: the last report of its training; empty without one.
        error: last line of what went wrong.
        figures: what came out, for people.
        problems: files that can't be read, and why.
    """

    node: Node
    name: str
    seconds: float | None = None
    progress: Mapping[str, Any] = field(default_factory=dict)
    error: str = ""
    figures: str = ""
    problems: tuple[str, ...] = ()

    @property
    def live(self) -> str:
        """The last report in a line; empty without one."""
        epoch, epochs, label = (self.progress.get(name) for name in ("epoch", "epochs", "label"))
        if not label:
            return ""
        parts = [f"{label}: epoch {epoch}/{epochs}"]
        if (loss := number(self.progress.get("loss"))) is not None:
            parts.append(f"loss {loss:.3g}")
        if (speed := number(self.progress.get("images_per_second"))) is not None:
            parts.append(f"{speed:,.0f} images/s")
        if (left := number(self.progress.get("seconds_left"))) is not None and self.name == "running":
            parts.append(f"{duration(left)} left")
        return ", ".join(parts)


def nodes(parameters: Mapping[str, Any]) -> list[Node]:
    """What an experiment needs, as it can be made: packs, stand-in encoder, runs, what goes past the thesis, report.

    Args:
        parameters: complete, as `{**params.vocabulary(), **params.load(...)}`.

    Raises:
        ValueError: an unknown task, or an experiment without a name.
    """
    if unknown := set(parameters["tasks"]) - set(params.TASKS):
        raise ValueError(f"unknown task {sorted(unknown)}; available: {', '.join(params.TASKS)}, or none of them")
    folder = params.experiment_folder(parameters["experiment"])
    data = [parameters["dataset"]]
    if "segmentation" in parameters["tasks"]:
        data.append(parameters["segmentation_dataset"])
    found = []
    for pack in dict.fromkeys(_pack_folder(name, parameters) for name in data):
        run = f"packs/{pack.name}"
        found.append(Node("01_data_exploration", run, folder / run / "01_data_exploration.ipynb", pack / "pack.json"))
    if parameters["encoder"] == "stand-in":
        made = folder / "encoder" / "card.json"
        found.append(Node("00_sample_encoder", "", folder / "00_sample_encoder.ipynb", made))
    for run in dict.fromkeys(bands.mask_slug(mask, parameters["mask_scheme"]) for mask in parameters["masks"]):
        for task in ("alignment", *parameters["tasks"]):
            executed = folder / run / f"{OF_RUN[task]}.ipynb"
            found.append(Node(OF_RUN[task], run, executed, folder / run / params.RUN_FILES[task]))
    for notebook, name, left in params.beyond(parameters).values():
        found.append(Node(notebook, name, folder / name / f"{notebook}.ipynb", folder / name / left))
    return [*found, Node("06_results", "", folder / "06_results.ipynb", folder / "results.parquet")]


def state_of(node: Node, now: datetime | None = None) -> State:
    """How a node stands; nothing that lies there can make this fail.

    Args:
        node: which.
        now: to measure ages from; the time of the call if None.
    """
    now = now or datetime.now(UTC)
    problems: list[str] = []
    record = _read(node.record, problems)
    name = record.get("state")
    if record and name not in ("running", "done", "failed", "stopped"):
        problems.append(f"{node.record}: unknown state {name!r}")
        record, name = {}, None
    if not record:
        return _without_record(node, problems)
    started, seconds, error = moment(record.get("started")), number(record.get("seconds")), _line(record.get("error"))
    if name == "done" and not node.output.exists():
        return State(node, "to do", problems=(*problems, f"{node.output} is gone; it is made again"))
    if name == "done":
        return State(node, "done", seconds, figures=_figures(node, problems), problems=tuple(problems))
    progress = _read(node.progress, problems)
    if started and (updated := moment(progress.get("updated"))) and updated < started.replace(microsecond=0):
        progress = {}  # of an earlier attempt
    if name == "running" and not _lives(node, record, started, now):
        name, error = "lost", f"process {record.get('pid')} on {record.get('host')} is gone"
    if name == "running":
        seconds = max((now - started).total_seconds(), 0.0) if started else None
    if name == "failed" and not error:
        error = _notebook_error(node.executed, problems)
    return State(node, name or "", seconds, progress, error, problems=tuple(problems))


def duration(seconds: float) -> str:
    """`45 s`, `12 min`, `1 h 20 min`, `2 d 3 h`."""
    minutes = round(seconds / 60)
    if seconds < 59.5:
        return f"{max(seconds, 0):.0f} s"
    if minutes < 60:
        return f"{minutes} min"
    if minutes < 24 * 60:
        return f"{minutes // 60} h {minutes % 60} min"
    hours = round(minutes / 60)
    return f"{hours // 24} d {hours % 24} h"


def number(value: Any) -> float | None:
    """A finite number, or None for whatever else a file holds."""
    usable = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if usable else None


def moment(value: Any) -> datetime | None:
    """A time as records write it; without a zone it is UTC. None for whatever else a file holds."""
    try:
        found = datetime.fromisoformat(value)
    except (TypeError, ValueError):
        return None
    return found if found.tzinfo else found.replace(tzinfo=UTC)


def _pack_folder(name: str, parameters: Mapping[str, Any]) -> Path:
    if name != "sen12ms":  # the one whose settings are in its pack's name; the import takes half a second
        return files.outputs_root() / "packs" / name
    from bandmask import datasets

    return datasets.pack_folder(name, **datasets.settings_of(name, parameters))


def _without_record(node: Node, problems: list[str]) -> State:
    """Made before there were records, or the record is damaged: the outputs decide, then the executed notebook."""
    if node.output.exists():
        return State(node, "done", figures=_figures(node, problems), problems=tuple(problems))
    error = _notebook_error(node.executed, problems)
    return State(node, "failed" if error else "to do", error=error, problems=tuple(problems))


def _read(path: Path, problems: list[str]) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        problems.append(f"{path} can't be read ({_line(str(error)) or type(error).__name__})")
        return {}
    if not isinstance(found, dict):
        problems.append(f"{path} holds no record")
        return {}
    return found


def _figures(node: Node, problems: list[str]) -> str:
    try:
        return headline(node.notebook, node.output)
    except Exception as error:  # pyarrow has its own, and a damaged file may raise any
        problems.append(f"{node.output} can't be read ({_line(str(error)) or type(error).__name__})")
        return ""


def _line(text: Any) -> str:
    """The first line that says something."""
    return next((line.strip() for line in str(text or "").splitlines() if line.strip()), "")


def _notebook_error(path: Path, problems: list[str]) -> str:
    """The error that an executed notebook ends in; empty if it has none, or is not there."""
    cells = _read(path, problems).get("cells")
    for cell in reversed(cells if isinstance(cells, list) else []):
        for output in cell.get("outputs", []) if isinstance(cell, dict) else []:
            if isinstance(output, dict) and output.get("output_type") == "error":
                return _line(f"{output.get('ename')}: {output.get('evalue')}")
    return ""


def _lives(node: Node, record: Mapping[str, Any], started: datetime | None, now: datetime) -> bool:
    """Whether what says it runs does: its process here; elsewhere its lock, or a sign of life within a minute."""
    if record.get("host") == socket.gethostname() and isinstance(record.get("pid"), int):
        return _process_lives(record["pid"], started)
    touched = [path.stat().st_mtime for path in (node.record, node.progress) if path.exists()]
    return _locked(node) or (bool(touched) and now.timestamp() - max(touched) < LOST_AFTER)


def _locked(node: Node) -> bool:
    """Whether an execution holds the node's lock, which ends with it; not every network disk passes that on."""
    try:
        with node.executed.with_name(f".{node.notebook}.lock").open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        pass  # no lock there, or a disk that knows none
    return False


def _process_lives(pid: int, started: datetime | None) -> bool:
    """Neither ended nor a zombie, nor another process that was given the number after a reboot."""
    try:
        os.kill(max(pid, 1), 0)
    except PermissionError:
        pass  # somebody else's, but there
    except (ProcessLookupError, OverflowError):
        return False
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        begun = time.time() - time.clock_gettime(time.CLOCK_BOOTTIME) + int(fields[19]) / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError, IndexError, ValueError):
        return True  # not Linux: what could be asked, was
    return fields[0] not in "ZX" and (started is None or begun < started.timestamp() + LOST_AFTER)
