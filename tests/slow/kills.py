"""Kills while real notebooks run: the same rows in the end, and plan, status, run and report agree after each.

`python tests/slow/kills.py 28`; with `--slurm` on two nodes of a real Slurm, which are lost too. A small grid is made,
then made again with other parameters, to and fro; each time something of it is killed with SIGKILL, chosen by seed.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pandas as pd
import psutil

ROOT = Path(__file__).resolve().parents[2]
GRID = """
experiment: tiny
dataset: sample
architecture: resnet10t
image_size: 32
pretrain_epochs: 1
pretrain_crop_size: 32
masks: ["B8"]
tasks: [classification]
encoder_passes: 1
head_seeds: [0]
"""
FIRST, CHANGED = GRID + "epochs_one_band: 1\nhead_epochs: 2\n", GRID + "epochs_one_band: 2\nhead_epochs: 3\n"
VICTIMS = {name: name for name in ("graph", "snakemake", "node", "papermill")} | {"kernel": "ipykernel_launcher"}
TIMES = ["images_per_second", "seconds"]  # never the same twice
ON_SLURM = ["--profile", str(ROOT / "profiles" / "slurm"), "--cores", "1", "--max-threads", "1"]
ON_SLURM += ["--slurm-init-seconds-before-status-checks", "4"]


class Grid:
    """A grid in a folder of its own, one thread a node."""

    def __init__(self, folder: Path, options: list[str]) -> None:
        self.folder, self.out, self.options = folder, folder / "tiny", options
        folder.mkdir(parents=True, exist_ok=True)
        own = {"BANDMASK_OUTPUTS": str(folder), "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
        self.environment = {**os.environ, **own}

    def command(self, name: str) -> list[str]:
        more = self.options if name == "graph" else []
        return [sys.executable, "-m", "bandmask.run", name, str(self.folder / "grid.yaml"), *more]

    def start(self, text: str) -> subprocess.Popen[bytes]:
        (self.folder / "grid.yaml").write_text(text)
        log = (self.folder / "log.txt").open("ab")
        return subprocess.Popen(self.command("graph"), env=self.environment, cwd=ROOT, stdout=log, stderr=log)

    def says(self, name: str) -> list[str]:
        """Lines of `plan` or `status`, the last one a sum."""
        done = subprocess.run(self.command(name), env=self.environment, cwd=ROOT, capture_output=True, check=True)
        return done.stdout.decode().splitlines()

    def processes(self, word: str) -> list[psutil.Process]:
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                ours = process.environ().get("BANDMASK_OUTPUTS") == str(self.folder)
                if ours and process.status() != psutil.STATUS_ZOMBIE and word in process.cmdline():
                    found.append(process)
        return found

    def tables(self) -> dict[str, pd.DataFrame]:
        """Every table of results, by its place, without times."""
        paths = sorted(self.out.rglob("[!o]*.parquet"))
        tables = {str(path.relative_to(self.out)): pd.read_parquet(path) for path in paths}
        return {name: table.drop(columns=TIMES, errors="ignore") for name, table in tables.items()}


def agreed(grid: Grid) -> tuple[int, int]:
    """How many notebooks plan and status would run, and of how many runs the report shows rows: none of these."""
    plan, status = grid.says("plan"), grid.says("status")
    due = {line.split()[0] for line in plan[:-1]}
    if not grid.processes("graph"):
        assert plan[-1] == status[-1]
        assert due == {line.split()[0] for line in status[:-1] if line.split()[1] != "done"}
    report = grid.out / "results.parquet"
    shown = pd.read_parquet(report)[["mask", "task"]].drop_duplicates() if report.exists() else pd.DataFrame()
    for mask, task in shown.itertuples(index=False):
        notebook = "03_fine_tuning" if task == "alignment" else "04_scene_classification"
        assert f"{mask}/{notebook}" not in due, f"{mask}/{notebook} is due, and the report shows its rows"
    return len(due), len(shown)


def differing(found: dict[str, pd.DataFrame], expected: dict[str, pd.DataFrame]) -> int:
    """Rows that are not to the last bit what they should be."""
    assert found.keys() == expected.keys(), found.keys() ^ expected.keys()
    rows = 0
    for name, table in expected.items():
        assert found[name].shape == table.shape, name
        same = (found[name] == table) | (found[name].isna() & table.isna())
        rows += int((~same).any(axis=1).sum())
    return rows


def wait(running: subprocess.Popen[bytes], seconds: float, cluster: Any) -> int | None:
    """The status of a run, None if it goes on after so many seconds."""
    deadline = time.monotonic() + seconds
    while running.poll() is None and time.monotonic() < deadline:
        if cluster:
            cluster.hurry()  # a lost node's job would wait for two minutes
        time.sleep(0.5)
    return running.poll()


def kill(grid: Grid, victim: str, chance: random.Random, cluster: Any) -> bool:
    """Whether there was one."""
    if victim == "machine":
        cluster.kill_node("n2")
        cluster.start_node("n2")
        return True
    found = grid.processes(VICTIMS[victim])
    if found:
        chance.choice(found).kill()
    return bool(found)


def campaign(folder: Path, kills: int, *, cluster: Any = None, seed: int = 0) -> None:
    """Print a line for each kill; stop at the first thing that does not agree."""
    chance, options = random.Random(seed), ON_SLURM if cluster else []
    first, changed = Grid(folder / "first", []), Grid(folder / "changed", [])  # undisturbed
    assert first.start(FIRST).wait() == 0, first.folder
    if not changed.out.exists():
        shutil.copytree(first.folder, changed.folder, dirs_exist_ok=True)
    assert changed.start(CHANGED).wait() == 0, changed.folder
    expected = {FIRST: first.tables(), CHANGED: changed.tables()}
    print(
        "| kill | of | during | after | the run | due, by plan and status | shown |\n" + "| --- " * 7 + "|", flush=True
    )
    victims, done, rows, compared, laps = [*VICTIMS, *(["machine"] if cluster else [])], 0, 0, 0, 0
    where = folder / ("slurm" if cluster else "one")
    grid, text = Grid(where / "0", options), FIRST
    running, began = grid.start(text), time.monotonic()
    while True:
        status = wait(running, chance.uniform(2, 20) if done < kills else 3600, cluster)
        if status is None:
            victim = victims[done % len(victims)]
            if kill(grid, victim, chance, cluster):
                done, after = done + 1, time.monotonic() - began
                ended = wait(running, 4, cluster)
                due, shown = agreed(grid)
                during = "a first run" if text == FIRST else "a changed re-run"
                said = "goes on" if ended is None else f"ended with {ended}"
                print(f"| {done} | {victim} | {during} | {after:.0f} s | {said} | {due} | {shown} |", flush=True)
            continue
        due, _ = agreed(grid)
        assert (status == 0) == (due == 0), f"the run ended with {status}, and {due} notebooks are due"
        if not due:
            rows += differing(grid.tables(), expected[text])
            compared += sum(map(len, expected[text].values()))
            if done >= kills:
                break
            laps += text == CHANGED
            grid = Grid(where / str(laps), options) if text == CHANGED else grid
            text = CHANGED if text == FIRST else FIRST
        running, began = grid.start(text), time.monotonic()
    print(f"\n{rows} of {compared} rows differ", flush=True)
    assert rows == 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kills", type=int, nargs="?", default=28)
    parser.add_argument("--slurm", action="store_true")
    parser.add_argument("--folder", type=Path, help="where an undisturbed grid lies already, or will")
    asked = parser.parse_args()
    sys.path.append(str(ROOT / "tests" / "slurm"))
    import cluster as slurm

    with slurm.cluster() if asked.slurm else contextlib.nullcontext() as nodes:
        campaign(asked.folder or Path(tempfile.mkdtemp(prefix="kills-")), asked.kills, cluster=nodes)
