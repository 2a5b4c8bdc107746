"""A grid of notebooks on a cluster: a real Slurm of two nodes, one of them lost in the middle. By `make test-slurm`."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import cluster as slurm
import pandas as pd
import pytest
from probes import Project, until

from bandmask import files

OPTIONS = ["--profile", str(files.project_root() / "profiles" / "slurm"), "--cores", "1", "--max-threads", "1"]
OPTIONS += ["--slurm-init-seconds-before-status-checks", "4"]
TINY = """
experiment: tiny
dataset: sample
encoder: stand-in
architecture: resnet10t
image_size: 32
pretrain_epochs: 1
pretrain_crop_size: 32
masks: ["none", "B8"]
tasks: [classification]
epochs_one_band: 1
head_epochs: 2
encoder_passes: 1
head_seeds: [0, 1]
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[slurm.Cluster]:
    if reason := slurm.why_not():
        pytest.skip(reason)
    with slurm.cluster() as running:
        yield running


@contextlib.contextmanager
def graph(folder: Path, *arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    """The experiment's graph with the profile people use; the jobs are of one core, which is what the nodes have."""
    (folder / "tiny.yaml").write_text(TINY)
    command = [sys.executable, "-m", "bandmask.run", "graph", str(folder / "tiny.yaml")]
    command += [*OPTIONS, *arguments]
    environment = {**os.environ, "BANDMASK_OUTPUTS": str(folder)}
    with (folder / "log.txt").open("ab") as log:
        started = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        yield started
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(started.pid, signal.SIGKILL)
        started.wait()


def wait_for(
    ready: Callable[[], bool], what: str, folder: Path, running: subprocess.Popen[bytes] | None = None
) -> None:
    """Look every second; a quarter of an hour is far more than it takes, on a busy machine too."""
    deadline = time.monotonic() + 900
    while not ready():
        assert running is None or running.poll() is None, f"the graph ended before {what}:\n{tail(folder)}"
        assert time.monotonic() < deadline, f"no {what}:\n{tail(folder)}"
        time.sleep(1)


def tail(folder: Path) -> str:
    return (folder / "log.txt").read_text()[-3000:]


def records(folder: Path) -> dict[str, dict]:
    """Of every node of the graph that began, by its path below the experiment's folder."""
    out = folder / "tiny"
    found = {}
    for path in out.rglob("0*.json"):
        with contextlib.suppress(ValueError):
            found[str(path.relative_to(out).with_suffix(""))] = json.loads(path.read_text())
    return found


def test_a_grid_ends_with_every_result_though_a_node_is_lost(cluster: slurm.Cluster, tmp_path: Path) -> None:
    """`n2` dies while a notebook runs on it; its job is queued again, and nobody touches the graph."""

    def works_on_n2() -> bool:
        of_runs = (record for path, record in records(tmp_path).items() if path.startswith(("none/", "B8/")))
        return any(record["state"] == "running" and record["host"] == "n2" for record in of_runs)

    def state_of(job: str) -> str:
        return {number: state for number, state, *_ in cluster.queue()}[job]

    def ended() -> bool:
        cluster.hurry()
        return running.poll() is not None

    with graph(tmp_path) as running:
        wait_for(works_on_n2, "notebook of a run on n2", tmp_path, running)
        cluster.kill_node("n2")
        (lost,) = (job for job, state, node, _ in cluster.queue() if state == "RUNNING" and node == "n2")
        wait_for(lambda: state_of(lost) == "PENDING", "lost job in the queue again", tmp_path, running)
        cluster.start_node("n2")
        wait_for(ended, "end of the graph", tmp_path)
    assert running.returncode == 0, tail(tmp_path)

    assert state_of(lost) == "COMPLETED", "Slurm ran the lost job again, under its own number"
    done = records(tmp_path)
    assert {record["state"] for record in done.values()} == {"done"}
    assert {record["host"] for record in done.values()} == {"n1", "n2"}, "both nodes worked"
    results = pd.read_parquet(tmp_path / "tiny" / "results.parquet")
    rows = results.groupby("mask")["task"].agg(set).to_dict()
    assert rows == {mask: {"alignment", "classification"} for mask in ("none", "B8")}, "every mask has all its rows"


@pytest.mark.parametrize("how", ["Ctrl-C", "snakemake killed"])
def test_nothing_of_a_graph_that_ends_is_left_on_the_cluster(cluster: slurm.Cluster, tmp_path: Path, how: str) -> None:
    """With probes for notebooks; Slurm itself gives what it cancels `KillWait` seconds."""
    project = Project(tmp_path)
    project.order("01_data_exploration", sleep=600)
    started = project.start("graph", *OPTIONS, start_new_session=True)
    title = "packs/sample/01_data_exploration"
    until(lambda: project.record(title)["state"] == "running" and (project.orders / "kernel").exists(), 600)
    began = time.monotonic()
    if how == "Ctrl-C":
        os.killpg(started.pid, signal.SIGINT)
    else:
        next(p for p in project.processes() if "snakemake" in p.cmdline() and p.ppid() == started.pid).kill()
    until(lambda: not project.processes(), 30)
    took = time.monotonic() - began
    print(f"{how}: nothing runs after {took:.1f} s")
    assert started.wait() == 128 + signal.SIGINT if how == "Ctrl-C" else started.wait() != 0
    assert took < (3 if os.getloadavg()[0] < 2 else 9), "thrice that on a busy machine"
    until(lambda: not [job for job, state, *_ in cluster.queue() if state not in ("CANCELLED", "COMPLETED")], 30)
