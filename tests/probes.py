"""A copy of the project whose notebooks are probes: real graph, real kernels, and no network trained.

A probe takes its notebook's parameters and writes files with its notebook's names, as text of the parameters it took
and the files it read. `<title>.json` in the folder `orders` makes it sleep, fail or fill its disk.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbformat
import psutil

ROOT = Path(__file__).resolve().parent.parent
EXPERIMENT = """
experiment: tiny
masks: ["none", "B8", "B11"]
mask_scheme: named
tasks: ["classification"]
head_seeds: [0, 1]
"""
HEAD = """import hashlib, json, os, time
from pathlib import Path
from bandmask import {uses}files, params"""
ORDERS = """order = Path(os.environ["ORDERS"], "{notebook}-" + str(globals().get("mask", "")) + ".json")
order = json.loads(order.read_text()) if order.exists() else {{}}
Path(os.environ["ORDERS"], "kernel").write_text(str(os.getpid()))"""
FAIL = """if "fail" in order:
    raise ValueError(order["fail"])"""
WAIT = """time.sleep(order.get("sleep", 0))"""
WORK = """out = params.experiment_folder(globals().get("experiment", "packs-only"))
run = out / params.bands.mask_slug(mask, mask_scheme) if "mask" in globals() else out
taken = {name: globals()[name] for name in params.declared("{notebook}")}
read = []
def leave(path, *reads):
    read = [hashlib.sha256(Path(p).read_bytes()).hexdigest() for p in reads]
    with files.writing(path) as partial:
        partial.write_text(json.dumps([taken, read]) + " " * order.get("bytes", 0))
encoder = [out / "encoder" / name for name in params.ENCODER_FILES]
tuned = [run / f"encoder-seed{seed}" / name for seed in globals().get("seeds", []) for name in params.ENCODER_FILES]
"""
DOES = {
    "00_sample_encoder": "for path in encoder: leave(path)",
    "01_data_exploration": "from bandmask import datasets\nleave(datasets.pack_folder(dataset) / 'pack.json')",
    "03_fine_tuning": "for path in [*tuned, run / 'alignment.parquet']: leave(path, *encoder)",
    "04_scene_classification": "heads = [out / 'in_service' / 'classification' / name for name in params.HEAD_FILES]\n"
    "for path in [run / 'results.parquet', run / 'predictions.parquet', *(heads if mask == 'none' else [])]:\n"
    "    leave(path, *encoder, *([*tuned, *heads] if mask != 'none' else []))",
    "05_image_segmentation": "for name in ('segmentation', 'segmentation_predictions'): leave(run / f'{name}.parquet')",
    "06_results": "rows = sorted(p for p in out.glob('*/*.parquet') if not files.distrust(p))\n"
    "with files.writing(out / 'results.parquet') as partial:\n"
    "    partial.write_text(json.dumps({str(p.relative_to(out)): p.read_text().strip() for p in rows}))\n"
    "(out / 'found.md').write_text('what was found')",
}
RESULTS = """from bandmask import files

def write_page(executed, page):
    with files.writing(page) as partial:
        partial.write_text("report")

def closing(out):
    return f"the table of {out}"
"""
USES = {"03_fine_tuning": "tuner, ", "04_scene_classification": "scorer, "}  # modules of the copy alone


class Project:
    """The copy, with its experiment in `tiny.yaml` and its outputs beside it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.root, self.out = folder, folder / "project", folder / "outputs" / "tiny"
        self.orders = folder / "orders"
        self.orders.mkdir(parents=True)
        self.root.mkdir()
        for part in ("bandmask", "params", "profiles"):
            shutil.copytree(ROOT / part, self.root / part, ignore=shutil.ignore_patterns("__pycache__", "*.tif"))
        shutil.copy(ROOT / "Snakefile", self.root / "Snakefile")
        (self.root / "bandmask" / "results.py").write_text(RESULTS)
        for module in ("tuner", "scorer"):
            (self.root / "bandmask" / f"{module}.py").write_text('"""What one notebook uses."""\n\nREVISION = 1\n')
        (self.root / "notebooks").mkdir()
        for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
            self._probe(path)
        self.write(EXPERIMENT)

    def _probe(self, path: Path) -> None:
        real = nbformat.read(path, 4)
        parameters = next(cell for cell in real.cells if "parameters" in cell.metadata.get("tags", []))
        parts = [HEAD.format(uses=USES.get(path.stem, "")), ORDERS.format(notebook=path.stem), FAIL, WAIT]
        parts += [WORK.replace("{notebook}", path.stem) + DOES.get(path.stem, ""), WAIT.replace('"sleep"', '"after"')]
        cells = [nbformat.v4.new_code_cell(part) for part in parts]
        cells.insert(1, nbformat.v4.new_code_cell(parameters.source, metadata={"tags": ["parameters"]}))
        kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
        probe = nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel})
        nbformat.write(probe, self.root / "notebooks" / path.name)

    def write(self, text: str) -> None:
        (self.folder / "tiny.yaml").write_text(text)

    def order(self, notebook: str, mask: str = "", **orders: Any) -> None:
        (self.orders / f"{notebook}-{mask}.json").write_text(json.dumps(orders))

    def obey(self) -> None:
        """No orders any more."""
        for path in self.orders.glob("*.json"):
            path.unlink()

    @property
    def environment(self) -> dict[str, str]:
        own = {
            "BANDMASK_OUTPUTS": str(self.folder / "outputs"),
            "PYTHONPATH": str(self.root),
            "TMPDIR": str(self.folder),
            "PYTHONDONTWRITEBYTECODE": "",  # a node's imports compiled anew take longer than all the rest of it
            "PYTHONPYCACHEPREFIX": str(self.folder.parent / "bytecode"),
        }
        return {**os.environ, **own, "ORDERS": str(self.orders), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}

    def command(self, name: str, *more: str) -> list[str]:
        return [sys.executable, "-m", "bandmask.run", name, str(self.folder / "tiny.yaml"), *more]

    def do(self, name: str, *more: str, **environment: str) -> subprocess.CompletedProcess[str]:
        options: dict[str, Any] = {"capture_output": True, "text": True, "timeout": 600, "check": False}
        return subprocess.run(self.command(name, *more), env=self.environment | environment, cwd=self.root, **options)

    def start(self, name: str, *more: str, **options: Any) -> subprocess.Popen[str]:
        log = (self.folder / "log.txt").open("a")
        where: dict[str, Any] = {"env": self.environment, "cwd": self.root, "stdout": log, "stderr": log}
        return subprocess.Popen(self.command(name, *more), text=True, **where, **options)

    def make(self, *words: str, root: Path | None = None) -> subprocess.Popen[bytes]:
        """`make` in the copy or in the repository, with an environment that is there already."""
        place, root = self.folder / "venv" / "bin", root or self.root
        place.mkdir(parents=True)
        (place / "python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
        (place / "python").chmod(0o755)
        for name in ("Makefile", "requirements.lock", "models.lock", "pyproject.toml"):
            shutil.copy(ROOT / name, self.root)
        (place.parent / ".installed").touch()  # the newest
        environment = {name: value for name, value in self.environment.items() if not name.startswith("MAKE")}
        environment |= {"BROWSER": "true", "PATH": f"{Path(sys.executable).parent}:{environment['PATH']}"}
        command = ["make", f"VENV={place.parent}", *words]
        return subprocess.Popen(command, env=environment, cwd=root, stdin=subprocess.DEVNULL)

    def plan(self) -> dict[str, str]:
        """What `plan` says would run: title, and why; `status` must say the same."""
        found, other = self.do("plan"), self.do("status")
        assert found.returncode == other.returncode == 0, found.stderr + other.stderr
        lines = found.stdout.splitlines()
        assert set(lines[:-1]) <= {" ".join(line.split(" ")) for line in other.stdout.splitlines()} | set(lines)
        assert lines[-1].split(":")[0] == other.stdout.splitlines()[-1].split(":")[0], "plan and status agree"
        return {line.split()[0]: " ".join(line.split()[1:]) for line in lines[:-1]}

    def record(self, title: str) -> dict[str, Any]:
        return json.loads((self.out / f"{title}.json").read_text())

    def rows(self) -> dict[str, str]:
        """What the results hold, by file."""
        return json.loads((self.out / "results.parquet").read_text())

    def processes(self) -> list[psutil.Process]:
        """Everything that runs for this project."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get("ORDERS") == str(self.orders) and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def stamps(self) -> dict[str, int]:
        """When each output was last written."""
        kept = [path for kind in ("[!o]*.parquet", "*.safetensors", "0*.html") for path in self.out.rglob(kind)]
        return {str(path.relative_to(self.out)): path.stat().st_mtime_ns for path in kept}


def until(look: Callable[[], Any], seconds: float = 120) -> Any:
    """What `look` gives, as soon as it gives something; what goes while it looks is looked for again."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            if found := look():
                return found
        except (OSError, ValueError, KeyError, psutil.Error):
            pass
        assert time.monotonic() < deadline, "it never came to that"
        time.sleep(0.05)
