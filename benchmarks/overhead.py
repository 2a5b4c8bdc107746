"""What the graph costs: a grid through Snakemake and its runner against the same notebooks by papermill alone.

    python benchmarks/overhead.py

Some masks on the embedded scene, fine-tuned for one epoch with a small encoder, one run at a time with one thread:
(1) the graph; (2) a second call with nothing to do; (3) papermill called for each of the same notebooks, in order, into
a fresh folder. Both grids must give the same rows.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pandas as pd

sys.path.append(str(Path(__file__).resolve().parent))
from faults import MASKS, ROOT, Grid

from bandmask import bands, params


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--masks", type=int, default=4)
    masks = MASKS[: parser.parse_args().masks]
    with tempfile.TemporaryDirectory(prefix="bandmask-overhead-") as folder:
        graph, plain = (Grid(Path(folder) / name, masks, cores="1") for name in ("graph", "plain"))
        for path in (graph.folder / "faults.yaml", plain.folder / "faults.yaml"):
            path.write_text(path.read_text().replace("bands: 3", "bands: 1").replace("band: 3", "band: 1"))
        timed = {"graph": run(graph), "nothing to do": run(graph), "papermill alone": papermill(plain, masks)}
        pd.testing.assert_frame_equal(plain.table(), graph.table(), check_exact=True)
    nodes = 3 + 2 * len(masks)
    print("\n| | seconds | a run |\n| --- | --- | --- |")
    for name, seconds in timed.items():
        print(f"| {name} | {seconds:.0f} | {seconds / nodes:.2f} |")
    each, ratio = (timed["graph"] - timed["papermill alone"]) / nodes, timed["graph"] / timed["papermill alone"]
    print(f"\n{nodes} runs; the graph adds {each:.2f} s a run: {ratio:.2f} times papermill alone")


def run(grid: Grid) -> float:
    """Seconds of one call of the graph."""
    began = time.monotonic()
    grid.start()
    assert grid.controller is not None
    if grid.controller.wait() != 0:
        raise SystemExit((grid.folder / "log.txt").read_text()[-3000:])
    return time.monotonic() - began


def papermill(grid: Grid, masks: list[str]) -> float:
    """Seconds of the same notebooks by the papermill command, one after the other."""
    given = grid.folder / "faults.yaml"
    calls = [("01_data_exploration", "packs", None), ("00_sample_encoder", "", None)]
    for mask in masks:
        slug = bands.mask_slug(mask)
        calls += [("03_fine_tuning", slug, slug), ("04_scene_classification", slug, slug)]
    calls.append(("06_results", "", None))
    environment = {**os.environ, "BANDMASK_OUTPUTS": str(grid.folder), "OMP_NUM_THREADS": "1"}
    began = time.monotonic()
    for notebook, place, mask in calls:
        (grid.out / place).mkdir(parents=True, exist_ok=True)
        files = [given, *([ROOT / "params" / "masks" / f"{mask}.yaml"] if mask else [])]
        command = [sys.executable, "-m", "papermill", str(params.notebook_path(notebook))]
        command += [str(grid.out / place / f"{notebook}.ipynb"), "--no-progress-bar"]
        for file in files:
            command += ["-f", str(file)]
        subprocess.run(command, env=environment, check=True, capture_output=True)
    return time.monotonic() - began


if __name__ == "__main__":
    main()
