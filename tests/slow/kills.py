"""Kills while real notebooks run: the same rows in the end, and plan, status, run and report agree after each.

`python tests/slow/kills.py 28`; with `--slurm` on two nodes of a real Slurm, one of which is lost too. Half of the
kills (SIGKILL, chosen by seed) meet a grid that is made again with other parameters, half one that is made first.
Every second one lets a notebook end first, so that they meet all of them.
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
head_epochs: 2
"""
FIRST, CHANGED = GRID + "epochs_one_band: 1\n", GRID + "epochs_one_band: 2\n"
VICTIMS = {name: name for name in ("graph", "snakemake", "node", "papermill")} | {"kernel": "ipykernel_launcher"}
ONE_CORE = ["--cores", "1"]  # last digits depend on the number of threads
ON_SLURM = ["--profile", str(ROOT / "profiles" / "slurm"), "--max-threads", "1"]
ON_SLURM += ["--slurm-init-seconds-before-status-checks", "4"]
TIMES = ["images_per_second", "seconds"]  # never the same twice


class Grid:
    """A grid in a folder of its own."""

    def __init__(self, folder: Path, text: str, cluster: Any = None) -> None:
        self.folder, self.out, self.cluster = folder, folder / "tiny", cluster
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "grid.yaml").write_text(text)
        own = {"BANDMASK_OUTPUTS": str(folder), "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
        self.environment = {**os.environ, **own}

    def command(self, name: str, *more: str) -> list[str]:
        return [sys.executable, "-m", "bandmask.run", name, str(self.folder / "grid.yaml"), *more]

    def start(self) -> subprocess.Popen[bytes]:
        command = self.command("graph", *ONE_CORE, *(ON_SLURM if self.cluster else []))
        log = (self.folder / "log.txt").open("ab")
        return subprocess.Popen(command, env=self.environment, cwd=ROOT, stdout=log, stderr=log)

    def finish(self) -> dict[str, pd.DataFrame]:
        """Every table, by its place, of the grid made undisturbed."""
        assert self.start().wait() == 0, self.folder / "log.txt"
        paths = sorted(self.out.rglob("[!o]*.parquet"))
        tables = {str(path.relative_to(self.out)): pd.read_parquet(path) for path in paths}
        return {place: table.drop(columns=TIMES, errors="ignore") for place, table in tables.items()}

    def processes(self, word: str) -> list[psutil.Process]:
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get("BANDMASK_OUTPUTS") == str(self.folder) and word in process.cmdline():
                    found.append(process)
        return found

    def done(self) -> int:
        return len([*self.folder.rglob(".*.done")])

    def wait(self, running: subprocess.Popen[bytes], seconds: float, more: bool = False) -> int | None:
        """The status of a run, None if it goes on after so many seconds, or with `more` once another notebook ended."""
        deadline, before = time.monotonic() + seconds, self.done()
        while running.poll() is None and time.monotonic() < deadline and not (more and self.done() > before):
            if self.cluster:
                self.cluster.hurry()  # a lost node's job would wait for two minutes
            time.sleep(0.5)
        return running.poll()

    def kill(self, victim: str, chance: random.Random, running: subprocess.Popen[bytes]) -> bool:
        """Whether there was one, now or soon."""
        if victim == "machine":
            self.cluster.kill_node("n2")
            self.cluster.start_node("n2")
            return True
        while not (found := self.processes(VICTIMS[victim])) and self.wait(running, 1) is None:
            pass
        if found:
            chance.choice(found).kill()
        return bool(found)

    def agreed(self) -> tuple[int, int]:
        """How many notebooks plan and status call due, and of how many the report shows rows; none is both."""
        said, alive = [], self.processes("graph") or self.processes("node")
        for name in ("plan", "status"):
            done = subprocess.run(self.command(name), env=self.environment, cwd=ROOT, capture_output=True, check=True)
            lines = [line.split() for line in done.stdout.decode().splitlines() if "  " in line]
            said.append({line[0] for line in lines if line[1] != "done"})
        assert said[0] == said[1] or alive or self.processes("graph"), said
        report = self.out / "results.parquet"
        rows = pd.read_parquet(report)[["mask", "task"]] if report.exists() else pd.DataFrame(columns=["mask", "task"])
        makers = {"alignment": "03_fine_tuning", "classification": "04_scene_classification"}
        shown = {f"{row.mask}/{makers[row.task]}" for row in rows.itertuples()}
        assert not said[0] & shown, f"rows are shown of what is due: {shown}"
        return len(said[0]), len(shown)

    def disturb(self, during: str, first: int, last: int, chance: random.Random) -> int:
        """Kill and go on until so many kills are done, or all is; the number of the next kill."""
        victims = [*VICTIMS, *(["machine"] if self.cluster else [])]
        running = self.start()
        while first < last:
            status = self.wait(running, 1200, more=True) if first % 2 else None
            status = self.wait(running, chance.uniform(2, 20)) if status is None else status
            if status is not None:
                due, _ = self.agreed()
                assert status or not due, f"the run ended with 0, and {due} notebooks are due"
                if not due:
                    break
                running = self.start()
            elif self.kill(victim := victims[first % len(victims)], chance, running):
                first, status = first + 1, self.wait(running, 4)
                said = "goes on" if status is None else f"ended with {status}"
                due, shown = self.agreed()
                print(f"| {first} | {victim} | {during} | {said} | {due} | {shown} |", flush=True)
        self.wait(running, 3600)
        return first


def campaign(folder: Path, kills: int, cluster: Any = None, seed: int = 0) -> None:
    """Print a line for each kill; stop at the first thing that does not agree."""
    chance, before = random.Random(seed), Grid(folder / "first", FIRST)
    first = before.finish()
    after = Grid(folder / "changed", CHANGED)
    if not after.out.exists():
        for part in ("tiny", "packs"):
            shutil.copytree(before.folder / part, after.folder / part)
    changed, compared, kill = after.finish(), 0, 0
    print("| kill | of | during | the run | due, by plan and status | tables shown |\n" + "| --- " * 6 + "|")
    for during, text, expected in (("a changed re-run", CHANGED, changed), ("a first run", FIRST, first)):
        end = kills if text == FIRST else kills // 2
        while kill < end:
            grid = Grid(folder / f"{'slurm' if cluster else 'one'}{len([*folder.iterdir()])}", text, cluster)
            for part in ("tiny", "packs") if text == CHANGED else ():
                shutil.copytree(before.folder / part, grid.folder / part)
            kill = grid.disturb(during, kill, end, chance)
            found = grid.finish()
            assert found.keys() == expected.keys()
            for name, table in expected.items():
                pd.testing.assert_frame_equal(found[name], table, check_exact=True)
                compared += len(table)
    print(f"\n0 of {compared} rows differ", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kills", type=int, nargs="?", default=28)
    parser.add_argument("--slurm", action="store_true")
    parser.add_argument("--folder", type=Path, help="where undisturbed grids lie already, or will")
    asked = parser.parse_args()
    sys.path.append(str(ROOT / "tests" / "slurm"))
    import cluster as slurm

    with slurm.cluster() if asked.slurm else contextlib.nullcontext() as nodes:
        campaign(asked.folder or Path(tempfile.mkdtemp(prefix="kills-")), asked.kills, nodes)
