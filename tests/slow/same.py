"""Does this tree make the same figures as another commit? `make same REF=<commit>`; about ten minutes on two cores.

A small but complete experiment (two masks, alignment, both tasks, one encoder for every loss, robustness, faulty bands,
a mapped scene, a killed and resumed run) is executed in both trees, notebook by notebook, and every table, map and
weight is compared to the last bit. What may differ has its bound in `BOUNDS`, written before the step that needs it.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import rasterio
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[2]
SMALL = {
    "experiment": "sample",
    "dataset": "sample",
    "encoder": "stand-in",  # as both trees call it
    "mask_scheme": "named",
    "pretrain_epochs": 1,
    "epochs_one_band": 2,
    "epochs_several_bands": 2,
    "seeds": [0],
    "head_seeds": [0, 1],
    "head_epochs": 3,
    "encoder_passes": 1,
    "decoder_seeds": [0, 1],
    "decoder_epochs": 1,
    "decoder_width": 16,
    "any_epochs": 1,
    "test_images": 2,
    "fine_tuned": ["any-band", "B2_B3_B4"],
    "fault_bands": ["B08"],
    "device": "cpu",
}
STAGES = [  # notebook and mask; those of a stage need nothing of one another
    ["00_sample_encoder"],
    ["04_scene_classification none", "05_image_segmentation none", "03_fine_tuning B8", "03_fine_tuning B2 B3 B4"],
    ["04_scene_classification B8", "05_image_segmentation B8", "04_scene_classification B2 B3 B4"],
    ["08_any_band_encoder", "07_your_own_scene B8", "10_faulty_bands"],
    ["09_robustness_map"],
]
KILLED = "03_fine_tuning B2 B3 B4"  # in the new tree, once it has left a checkpoint
BOUNDS = {"low": 1e-4, "high": 1e-4}  # ends of intervals: the order of draws, a hundredth of a point
TIMES = ("images_per_second", "seconds")  # never the same twice
KEYS = ("protocol", "method", "encoder_seed", "head_seed", "split", "epoch", "metric", "sample", "label", "predicted")
WORDS = {"transfer": "kept", "thesis": "retrained"}  # what a protocol was called before


def declared(tree: Path, notebook: str) -> set[str]:
    """Names of a notebook's parameters, read without importing the tree."""
    cells = json.loads((tree / "notebooks" / f"{notebook}.ipynb").read_text())["cells"]
    source = next("".join(c["source"]) for c in cells if "parameters" in c["metadata"].get("tags", []))
    return {node.targets[0].id for node in ast.parse(source).body}  # type: ignore[attr-defined]


def execute(tree: Path, outputs: Path, step: str, *, kill: bool = False) -> None:
    """One notebook in a tree, under papermill; with `kill`, ended by SIGKILL at its first checkpoint and run again."""
    notebook, _, mask = step.partition(" ")
    name = step.replace(" ", "_")
    if (outputs / f"{name}.done").exists():
        return
    given = {k: v for k, v in {**SMALL, "mask": mask}.items() if k in declared(tree, notebook)}
    executed = outputs / f"{name}.ipynb"
    command = [sys.executable, "-m", "papermill", str(tree / "notebooks" / f"{notebook}.ipynb"), str(executed)]
    for key, value in given.items():
        command += ["-y", json.dumps({key: value})]
    one = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONPATH": str(tree), "BANDMASK_OUTPUTS": str(outputs)}
    started = time.perf_counter()
    with (outputs / f"{name}.log").open("w") as log:
        options = {"cwd": tree, "env": {**os.environ, **one}, "stdout": log, "stderr": log}
        if kill:
            first = subprocess.Popen(command, start_new_session=True, **options)  # type: ignore[call-overload]
            left = outputs / "sample" / mask.replace(" ", "_") / "checkpoints"
            while first.poll() is None and not (left.is_dir() and list(left.glob("*.pt"))):
                time.sleep(0.05)
            assert first.poll() is None, f"{name} ended before it left a checkpoint; see {log.name}"
            os.killpg(first.pid, signal.SIGKILL)
            first.wait()
        failed = subprocess.run(command, **options).returncode  # type: ignore[call-overload]
    if failed:
        sys.exit(f"{name} failed in {tree}; see {outputs / name}.log")
    print(f"  {name}: {time.perf_counter() - started:.0f} s{', killed and resumed' if kill else ''}", flush=True)
    (outputs / f"{name}.done").touch()


def run(tree: Path, outputs: Path, *, kill: bool) -> None:
    """The whole experiment in a tree, two notebooks at a time, a core each: sums in another order are other sums."""
    outputs.mkdir(parents=True, exist_ok=True)
    for stage in STAGES:
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(lambda step: execute(tree, outputs, step, kill=kill and step == KILLED), stage))


def tables_of(path: Path) -> dict[str, object]:
    """What a file holds, by name: columns of a table, tensors, pixels."""
    if path.suffix == ".parquet":
        table = pd.read_parquet(path)
        if "protocol" in table:
            table["protocol"] = table["protocol"].replace(WORDS)
            keys = [name for name in KEYS if name in table]  # a protocol's word decides its place in a sorted table
            table = table.sort_values(keys, kind="stable", key=lambda column: column.astype(str), ignore_index=True)
        return {name: table[name].to_numpy() for name in table if name not in TIMES}
    if path.suffix == ".safetensors":
        return {name: tensor.numpy() for name, tensor in load_file(path).items()}
    if path.suffix == ".pt":
        weights = torch.load(path, map_location="cpu", weights_only=True)["model"]
        return {name: tensor.numpy() for name, tensor in weights.items()}
    if path.suffix == ".npy":
        return {"": np.load(path, mmap_mode="r")}
    with rasterio.open(path) as tif:
        return {"": tif.read()}


def found(outputs: Path) -> dict[str, Path]:
    """Files to compare, by a name without the mark of their settings."""
    kinds = (".parquet", ".safetensors", ".pt", ".tif", ".npy")
    paths = [p for p in sorted(outputs.rglob("*")) if p.suffix in kinds and not p.name.startswith(".")]
    return {re.sub(r"-[0-9a-f]{8,}(?=\.|/|$)", "", str(p.relative_to(outputs))): p for p in paths}


def difference(before: object, after: object) -> float:
    """Largest difference of two arrays: 0 to the last bit, infinite where they can't be compared."""
    first, second = np.asarray(before), np.asarray(after)
    if first.shape != second.shape:
        return float("inf")
    if first.dtype.kind in "fiub" and second.dtype.kind in "fiub":
        same = (first == second) | ((first != first) & (second != second))
        return float(np.abs(first.astype(float) - second.astype(float))[~same].max()) if not same.all() else 0.0
    missing = pd.isna(first) & pd.isna(second)
    return 0.0 if ((first.astype(str) == second.astype(str)) | missing).all() else float("inf")


def compare(before: Path, after: Path) -> int:
    """Print what differs, and by how much; the number of files that do."""
    ours, theirs, wrong = found(after), found(before), 0
    for name in sorted(ours.keys() | theirs.keys()):
        if name not in ours or name not in theirs:
            print(f"  only {'before' if name in theirs else 'now'}: {name}")
            continue
        old, new = tables_of(theirs[name]), tables_of(ours[name])
        gaps = {key: difference(old[key], new[key]) for key in old.keys() & new.keys()}
        said = [f"{key} by {gap:.3g}" for key, gap in gaps.items() if gap > BOUNDS.get(key, 0.0)]
        said += [f"{key} is {'new' if key in new else 'gone'}" for key in sorted(old.keys() ^ new.keys())]
        wrong += any(gap > BOUNDS.get(key, 0.0) for key, gap in gaps.items())
        print(f"  {'DIFFERS' if said else 'same'}: {name}{': ' + '; '.join(said[:6]) if said else ''}")
    return wrong


def main() -> int:
    """The command line; 0 if nothing differs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("ref", help="commit to compare with, such as 47b73a7")
    ref = parser.parse_args().ref
    name = subprocess.check_output(["git", "rev-parse", "--short=7", ref], cwd=ROOT, text=True).strip()
    kept = ROOT / "outputs" / ".same"
    tree, before, after = kept / f"tree-{name}", kept / name, kept / "now"
    if not tree.exists():
        subprocess.run(["git", "worktree", "add", "--quiet", "--detach", str(tree), name], cwd=ROOT, check=True)
    print(f"{name}, kept in {before}:")
    run(tree, before, kill=False)
    subprocess.run(["rm", "-rf", str(after)], check=True)
    print("this tree:")
    run(ROOT, after, kill=True)
    wrong = compare(before, after)
    print(f"{wrong} files differ" if wrong else f"the same as {name}, to the last bit")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
