"""Records and progress files as the runner writes them, and real processes to be recorded."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import Any

import pytest

from bandmask.runs.states import Node

SAMPLE = {
    "experiment": "sample",
    "dataset": "sample",
    "segmentation_dataset": "sample-256",
    "encoder": "stand-in",
    "masks": ["none", "B8", "B2 B3 B4"],
    "mask_scheme": "named",
    "tasks": ["classification", "segmentation"],
}


def record(node: Node, state: str = "done", **changes: Any) -> None:
    """As the runner writes it."""
    entry = {
        "state": state,
        "notebook": node.notebook,
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "attempt": 1,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "ended": None,
        "seconds": 90.0,
        "threads": 2,
        "gpu": None,
        "peak_memory_mib": 812.0,
        "error": None,
        "parameters": {"seeds": [0]},
        "code": {},
        "inputs": {},
        "outputs": {},
        **changes,
    }
    node.record.parent.mkdir(parents=True, exist_ok=True)
    node.record.write_text(json.dumps(entry, indent=1))


def progressed(node: Node, **changes: Any) -> None:
    entry = {
        "label": "fine-tuning on B08, seed 0",
        "epoch": 3,
        "epochs": 6,
        "loss": 2.314,
        "images_per_second": 88.2,
        "seconds_left": 80.0,
        "updated": datetime.now(UTC).isoformat(timespec="seconds"),
        "figures": {},
        **changes,
    }
    node.progress.parent.mkdir(parents=True, exist_ok=True)
    node.progress.write_text(json.dumps(entry))


@pytest.fixture
def running() -> Iterator[Callable[[], subprocess.Popen[bytes]]]:
    """Real processes that sleep; ended afterwards."""
    started: list[subprocess.Popen[bytes]] = []

    def start() -> subprocess.Popen[bytes]:
        started.append(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()
