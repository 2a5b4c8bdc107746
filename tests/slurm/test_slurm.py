"""A grid of notebooks on a cluster: a real Slurm of two nodes, one of them lost in the middle. By `make test-slurm`."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cluster as slurm
import pandas as pd
import pytest
from probes import Project, until
from slow import kills

LONG = 900  # seconds: far more than it takes, on a busy machine too


@pytest.fixture(scope="module")
def cluster() -> Iterator[slurm.Cluster]:
    if reason := slurm.why_not():
        pytest.skip(reason)
    with slurm.cluster() as running:
        yield running


def test_a_grid_ends_with_every_result_though_a_node_is_lost(cluster: slurm.Cluster, tmp_path: Path) -> None:
    """`n2` dies while a notebook runs on it; its job is queued again, and nobody touches the graph."""
    grid = kills.Grid(tmp_path, kills.FIRST, cluster)

    def records() -> list[dict[str, Any]]:
        """Of the runs that began, while one is being written too."""
        return [json.loads(path.read_text()) for mask in ("none", "B8") for path in (grid.out / mask).glob("0*.json")]

    def state_of(job: str) -> str:
        return {number: state for number, state, *_ in cluster.queue()}[job]

    def ended() -> bool:
        cluster.hurry()
        return running.poll() is not None

    running = grid.start()
    try:
        until(lambda: any(r["state"] == "running" and r["host"] == "n2" for r in records()), LONG)
        cluster.kill_node("n2")
        (lost,) = (job for job, state, node, _ in cluster.queue() if state == "RUNNING" and node == "n2")
        until(lambda: state_of(lost) == "PENDING", LONG)
        cluster.start_node("n2")
        until(ended, LONG)
    finally:
        running.kill()
    assert running.wait() == 0, (tmp_path / "log.txt").read_text()[-3000:]
    assert state_of(lost) == "COMPLETED", "Slurm ran the lost job again, under its own number"
    assert {record["state"] for record in records()} == {"done"}
    assert {record["host"] for record in records()} == {"n1", "n2"}, "both nodes worked"
    rows = pd.read_parquet(grid.out / "results.parquet").groupby("mask")["task"].agg(set).to_dict()
    assert rows == {"none": {"classification"}, "B8": {"alignment", "classification"}}, "every mask has all its rows"


@pytest.mark.parametrize("how", ["Ctrl-C", "snakemake killed", "graph killed"])
def test_nothing_of_a_graph_that_ends_is_left_on_the_cluster(cluster: slurm.Cluster, tmp_path: Path, how: str) -> None:
    """With probes for notebooks; Slurm itself gives what it cancels `KillWait` seconds."""
    project = Project(tmp_path)
    project.order("01_data_exploration", sleep=600)
    started = project.start("graph", *kills.ONE_CORE, *kills.ON_SLURM, start_new_session=True)
    title = "packs/sample/01_data_exploration"
    until(lambda: project.record(title)["state"] == "running" and (project.orders / "kernel").exists(), LONG)
    began = time.monotonic()
    if how == "Ctrl-C":
        os.killpg(started.pid, signal.SIGINT)
    elif how == "graph killed":
        started.kill()
    else:
        next(p for p in project.processes() if "snakemake" in p.cmdline() and p.ppid() == started.pid).kill()
    until(lambda: not project.processes(), 30)
    took = time.monotonic() - began
    print(f"{how}: nothing runs after {took:.1f} s")
    assert started.wait() == 128 + signal.SIGINT if how == "Ctrl-C" else started.wait() != 0
    assert took < (3 if os.getloadavg()[0] < 2 else 9), "thrice that on a busy machine"
    until(lambda: not [job for job, state, *_ in cluster.queue() if state not in ("CANCELLED", "COMPLETED")], 30)
