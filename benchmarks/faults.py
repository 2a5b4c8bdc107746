"""A fault campaign: kill runs, kernels and the graph itself, start again, compare with an undisturbed grid.

    python benchmarks/faults.py --kills 24 --slurm
    python benchmarks/faults.py --kills 3 --masks 2

Twelve masks of the thesis on the embedded scene, fine-tuned and classified: a run a mask and step, small encoder, few
epochs. First without disturbance, then again in a fresh folder, where processes are killed with SIGKILL: the kernel of
a notebook, the process that executes it, the graph's controller, and a node with all that runs on it, which is this
machine, or with `--slurm` one of two nodes of a real Slurm cluster on it. Kills are spread over the grid by its own
progress: each is due when a number of runs drawn beforehand has finished, and some seconds more. Whatever is down is
started again. The undisturbed grid runs without a cluster, so its rows also say whether a cluster gives the same.
At the end every row of the results must equal that of the undisturbed grid.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import pandas as pd
import psutil

ROOT = Path(__file__).resolve().parent.parent
MASKS = ["none", "B2", "B8", "B11", "B2 B11", "B2 B8", "B8 B11", "B2 B3 B4", "B2 B8 B11", "B2 B4 B8 B11"]
MASKS += ["B4 B8 B9 B13", "B8 B9 B10 B11 B12"]
GRID = """
experiment: faults
dataset: sample
encoder: stand-in
architecture: resnet10t
image_size: 32
pretrain_epochs: 3
pretrain_crop_size: 32
masks: {masks}
tasks: ["classification"]
epochs_one_band: 3
epochs_several_bands: 3
head_epochs: 3
encoder_passes: 1
head_seeds: [0, 1]
"""
TARGETS = ("kernel", "run", "controller", "node")


class Grid:
    """A small grid in a folder of its own, on this machine or on a cluster."""

    def __init__(self, folder: Path, masks: list[str], cluster=None, cores: str = "all") -> None:
        self.folder, self.cluster, self.cores = folder, cluster, cores
        folder.mkdir(parents=True)
        (folder / "faults.yaml").write_text(GRID.format(masks=json.dumps(masks)))
        self.out = folder / "faults"
        self.controller: subprocess.Popen | None = None
        self.starts = 0

    def start(self) -> None:
        """Start the graph's controller, as `make run` does."""
        command = [
            *(
                sys.executable,
                "-m",
                "snakemake",
                "--snakefile",
                str(ROOT / "Snakefile"),
                "--directory",
                str(self.folder),
            ),
            *("--nolock", "--keep-going", "--rerun-incomplete", "--retries", "20", "--quiet", "all"),
            *("--max-checksum-file-size", "4000000000"),
        ]
        if self.cluster:
            command += ["--workflow-profile", str(ROOT / "profiles" / "slurm"), "--max-threads", "1"]
            command += ["--cores", "1", "--slurm-init-seconds-before-status-checks", "4"]
        else:
            command += ["--cores", self.cores, "--resources", "gpu=0"]
        log = (self.folder / "log.txt").open("a")
        environment = {**os.environ, "BANDMASK_OUTPUTS": str(self.folder), "CUDA_VISIBLE_DEVICES": ""}
        config = ["--config", f"experiment={self.folder / 'faults.yaml'}", "threads=1"]
        self.controller = subprocess.Popen(
            [*command, *config], env=environment, stdout=log, stderr=log, start_new_session=True
        )
        self.starts += 1

    def running(self) -> bool:
        assert self.controller is not None
        return self.controller.poll() is None

    def executions(self) -> list[psutil.Process]:
        """Processes that execute a notebook of this grid right now."""
        found = []
        for process in psutil.process_iter(["cmdline"]):
            line = process.info["cmdline"] or []
            if "bandmask.runs.execution" in line and any(str(self.folder) in part for part in line):
                found.append(process)
        return found

    def table(self) -> pd.DataFrame:
        """All that was measured, in a fixed order."""
        parts = [pd.read_parquet(path) for path in sorted(self.out.glob("*/*.parquet")) if "predict" not in path.stem]
        rows = pd.concat([*parts, pd.read_parquet(self.out / "results.parquet")], ignore_index=True)
        return rows.sort_values(list(rows.columns), na_position="first", ignore_index=True)

    def records(self) -> list[dict]:
        return [json.loads(path.read_text()) for path in sorted(self.out.rglob("0*.json"))]


def kill(grid: Grid, target: str, chance: random.Random) -> bool:
    """Kill one process of a kind, or a node with all its processes; False if none is there to be killed."""
    if target == "controller":
        assert grid.controller is not None
        if not grid.running():
            return False
        grid.controller.kill()
        grid.controller.wait()
        return True
    if target == "node" and grid.cluster is None:  # the machine itself: all that runs, at once
        assert grid.controller is not None
        lost = [psutil.Process(grid.controller.pid)] if grid.running() else []
        lost += [*grid.executions(), *(child for run in grid.executions() for child in run.children(recursive=True))]
        for process in lost:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        grid.controller.wait()
        return True
    if target == "node":
        node = chance.choice(["n1", "n2"])
        grid.cluster.kill_node(node)
        time.sleep(2)
        grid.cluster.start_node(node)
        return True
    with contextlib.suppress(psutil.NoSuchProcess):
        if not (runs := grid.executions()):
            return False
        victim = chance.choice(runs)
        if target == "kernel":
            kernels = [child for child in victim.children(recursive=True) if "ipykernel_launcher" in child.cmdline()]
            if not kernels:
                return False
            victim = kernels[0]
        victim.kill()
        return True
    return False


def disturb(grid: Grid, kills: int, targets: list[str], runs: int, seed: int) -> list[tuple[str, int]]:
    """Run the grid to its end under random kills; the kinds in turn, so that each has its share.

    Returns what was killed, with how many of the `runs` had finished then.
    """
    chance, done = random.Random(seed), []
    after = sorted(chance.randrange(runs) for _ in range(kills))  # a kill is due when so many runs have finished,
    delay = [chance.uniform(1, 12) for _ in range(kills)]  # and so many seconds more, anywhere in the runs that follow
    reached: float | None = None
    grid.start()
    waited: list[str] = []
    while True:
        time.sleep(0.5)
        if grid.cluster:
            grid.cluster.hurry()  # Slurm holds a lost node's jobs back for two minutes
        if not grid.running():
            assert grid.controller is not None
            if grid.controller.returncode == 0 and (grid.out / "06_results.html").exists():
                return done
            if grid.starts > kills + 10:
                raise SystemExit(f"the grid doesn't come to an end; see {grid.folder / 'log.txt'}")
            grid.start()
        if len(done) == kills:
            continue
        finished = sum(record["state"] == "done" for record in grid.records())
        if finished >= after[len(done)]:
            reached = reached or time.monotonic()
            waited = waited or chance.sample(targets, len(targets))
            if time.monotonic() > reached + delay[len(done)] and kill(grid, waited[-1], chance):
                done.append((waited.pop(), finished))
                reached = None
                print(f"  kill {len(done):2}: {done[-1][0]} after {finished} of {runs} runs", flush=True)


def campaign(folder: Path, kills: int, masks: list[str], seed: int, cluster=None) -> None:
    """Both grids, one after the other, and what came of it as Markdown."""
    quiet, faulty = Grid(folder / "quiet", masks), Grid(folder / "faulty", masks, cluster)
    began = time.monotonic()
    quiet.start()
    assert quiet.controller is not None
    if quiet.controller.wait() != 0:
        raise SystemExit(f"the undisturbed grid failed; see {quiet.folder / 'log.txt'}")
    undisturbed = time.monotonic() - began
    began = time.monotonic()
    killed = disturb(faulty, kills, list(TARGETS), len(quiet.records()), seed)
    disturbed = time.monotonic() - began
    expected, found = quiet.table(), faulty.table()
    pd.testing.assert_frame_equal(found, expected, check_exact=True)
    states = Counter(record["state"] for record in faulty.records())
    kinds, thirds = Counter(kind for kind, _ in killed), Counter(3 * at // len(quiet.records()) for _, at in killed)
    row = {"runs": f"{len(faulty.records())} ({dict(states)})", "kills": len(killed), **kinds}
    row |= {f"in the {name} third": thirds[third] for third, name in enumerate(("first", "second", "last"))}
    row |= {"starts": faulty.starts, "rows": len(expected), "rows that differ": 0}
    row |= {"undisturbed": f"{undisturbed / 60:.1f} min", "disturbed": f"{disturbed / 60:.1f} min"}
    for line in (row, ["---"] * len(row), row.values()):
        print(f"| {' | '.join(map(str, line))} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=24)
    parser.add_argument("--masks", type=int, default=len(MASKS), help="use only the first N masks")
    parser.add_argument("--seed", type=int, default=0, help="of what is killed when")
    parser.add_argument("--slurm", action="store_true", help="on a Slurm cluster of two nodes on this machine")
    parser.add_argument("--folder", type=Path, help="keep everything here; default: a temporary folder")
    given = parser.parse_args()
    with contextlib.ExitStack() as stack:
        folder = given.folder or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bandmask-faults-")))
        cluster = None
        if given.slurm:
            sys.path.insert(0, str(ROOT / "tests" / "slurm"))
            from cluster import cluster as two_nodes

            cluster = stack.enter_context(two_nodes())
        campaign(folder, given.kills, MASKS[: given.masks], given.seed, cluster)


if __name__ == "__main__":
    main()
