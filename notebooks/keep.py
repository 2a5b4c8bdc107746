"""Run the notebooks and keep in git what a reader sees: figures, tables, printed lines. `make notebooks`.

`python notebooks/keep.py 01 04` runs these, and what they need that is not there; without numbers, all that are old.
`--check` runs nothing: errors for what must not be in git, warnings where code is newer than the figures.
"""

from __future__ import annotations

import base64
import io
import itertools
import json
import os
import re
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
from PIL import Image, ImageOps

from bandmask import files, params, provenance

HOME = Path(__file__).resolve().parent
FIGURE, NOTEBOOK, TOGETHER = 60_000, 400_000, 4_000_000  # bytes that may be kept
THUMBNAIL, README = (360, 240), "12_model_in_service"  # pixels; the notebook whose first figure README opens with
WIDEST = 1100  # pixels of a figure: a page shows 800, and letters of 8 points are then 8 pixels high
PASSING = r"\d (?:images|it)/s|\d s left|\d+%\||PosixPath\(|\bat 0x"  # times, progress bars, what Python says of itself
STRANGE = re.compile(r"(?<![\w.:/])/(?:home|root|tmp|mnt|Users|private|var)/|[A-Z]:\\\\?Users|" + PASSING)


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"metadata": {}, "cells": []}


def mark(notebook: str) -> dict[str, str]:
    """What made its figures: the first digits of checksums of its cells, its defaults and the modules it imports."""
    code = {**provenance.code_of_notebook(notebook), "defaults": files.checksum_of(params.declared(notebook))}
    return {name: checksum[:8] for name, checksum in code.items()}


def newer(path: Path) -> list[str]:
    """What changed since the figures in a notebook were made."""
    was, now = read(path)["metadata"].get("bandmask", {}), mark(path.stem)
    return sorted(name for name in {*was, *now} if was.get(name) != now.get(name))


def smaller(png: bytes) -> bytes:
    """A figure as large, and of as many colours, as `FIGURE` bytes allow."""
    picture, written = Image.open(io.BytesIO(png)).convert("RGB"), io.BytesIO()
    picture.thumbnail((WIDEST, picture.height))
    # letters of 8 points stay 8 pixels high; photographs suffer more from few colours than from few pixels
    sizes, counts = (1, 0.85, 0.72), (256, 128, 64)
    for width, colours in itertools.product(sizes, counts):
        size = round(picture.width * width), round(picture.height * width)
        written = io.BytesIO()
        reduced = picture.resize(size).quantize(colours, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
        palette = np.array(reduced.getpalette()).reshape(-1, 3)
        palette[(255 - palette).sum(axis=1).argmin()] = 255  # paper stays white
        reduced.putpalette(palette.ravel().tolist())
        reduced.save(written, "PNG", optimize=True)
        if written.tell() <= FIGURE:
            break
    return written.getvalue()


def seen(output: dict[str, Any]) -> dict[str, Any] | None:
    """What a reader sees of an output, without places of this machine; None for what is of no use to one."""
    places = {
        str(files.outputs_root()): "outputs",
        f"{HOME.parent}/": "",
        tempfile.gettempdir(): "",
        str(Path.home()): "~",
    }

    def clean(text: str | list[str]) -> str:
        text = "".join(text)
        for place, name in places.items():
            text = text.replace(place, name)
        return text

    if output["output_type"] == "stream":
        return {**output, "text": clean(output["text"])} if output["name"] == "stdout" else None
    data = output.get("data", {})
    kept = {kind: clean(data[kind]) for kind in ("text/html", "text/markdown", "text/latex") if kind in data}
    if "image/png" in data:
        kept["image/png"] = base64.b64encode(smaller(base64.b64decode(data["image/png"]))).decode()
    return {"output_type": "display_data", "metadata": {}, "data": kept} if kept else None


def keep(path: Path, executed: Path) -> None:
    """Put the outputs of an executed notebook, and the mark of what made them, into the one in git."""
    notebook, ran, count = read(path), read(executed), 0
    for cell, done in zip(notebook["cells"], ran["cells"], strict=True):
        if cell["cell_type"] == "code":
            count += 1
            cell |= {"outputs": list(filter(None, map(seen, done["outputs"]))), "execution_count": count}
    notebook["metadata"] = {"bandmask": mark(path.stem), "kernelspec": ran["metadata"]["kernelspec"]}
    with files.writing(path) as partial:
        nbformat.write(nbformat.from_dict(notebook), partial)
    outputs = [output for cell in notebook["cells"] for output in cell.get("outputs", ())]
    if png := next((output["data"]["image/png"] for output in outputs if "image/png" in output.get("data", {})), ""):
        first = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB")  # for README and the book's front page
        small = first if path.stem == README else ImageOps.pad(first, THUMBNAIL, color="white")
        with files.writing(HOME.parent / "docs" / "gallery" / f"{path.stem[:2]}.png") as partial:
            small.quantize(128, dither=Image.Dither.NONE).save(partial, "PNG", optimize=True)


def run(path: Path, done: set[Path]) -> None:
    """Execute a notebook, after those that its row *Needs* names unless they were executed here by this code."""
    import papermill

    executed, began = files.outputs_root() / "executed" / path.name, time.monotonic()
    needs = re.search(r"\| Needs.*", "".join(read(path)["cells"][0]["source"]))
    for name in sorted(set(re.findall(r"\b\d\d_\w+", needs[0] if needs else ""))):
        if HOME / f"{name}.ipynb" not in done and newer(executed.with_stem(name)):
            run(HOME / f"{name}.ipynb", done)
    if path.stem.startswith("00"):  # all else stands on its encoder
        for stale in (files.outputs_root() / "sample", executed.parent):
            shutil.rmtree(stale, ignore_errors=True)
    running = executed.with_stem("running")  # ends in the failing cell if one fails
    running.parent.mkdir(parents=True, exist_ok=True)
    papermill.execute_notebook(path, running, cwd=HOME.parent, progress_bar=False, kernel_name="python3")
    keep(path, running)
    executed.write_text(json.dumps({"metadata": read(path)["metadata"], "cells": read(running)["cells"]}))
    done.add(path)
    print(f"{path.stem}: {time.monotonic() - began:.0f} s, {path.stat().st_size / 1000:.0f} kB", flush=True)


def faults(path: Path) -> list[str]:
    """What must not be in git."""
    notebook, size = read(path), path.stat().st_size
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    found = [f"{size:,} bytes, more than {NOTEBOOK:,}"] * (size > NOTEBOOK)
    if extra := notebook["metadata"].keys() - {"kernelspec", "bandmask"}:
        found.append(f"metadata of a run: {', '.join(sorted(extra))}")
    if "bandmask" in notebook["metadata"] and any(cell["execution_count"] != n for n, cell in enumerate(code, 1)):
        found.append("cells were not run once, in their order")
    for place, output in ((place, output) for place, cell in enumerate(code, 1) for output in cell["outputs"]):
        data = output.get("data", {})
        if png := base64.b64decode(data.get("image/png", "")):
            if len(png) > FIGURE or Image.open(io.BytesIO(png)).width > WIDEST:
                found.append(f"cell {place}: a figure of {len(png):,} bytes, or wider than {WIDEST} px")
        elif wrong := STRANGE.search(json.dumps(output)):
            found.append(f"cell {place}: {wrong[0]}")
        if any("widget" in kind for kind in data) or output.get("name") == "stderr" or set(data) == {"text/plain"}:
            found.append(f"cell {place}: a widget's state, a warning or a returned value")
    return found


def check() -> int:
    """Print errors and warnings; 1 if there is an error."""
    paths = sorted(HOME.glob("*.ipynb"))
    wrong = [f"{path.name}: {fault}" for path in [*paths, *HOME.glob("voila/*.ipynb")] for fault in faults(path)]
    if (total := sum(path.stat().st_size for path in paths)) > TOGETHER:
        wrong.append(f"{total:,} bytes together, more than {TOGETHER:,}")
    old = {path.stem: changed for path in paths if (changed := newer(path))}
    for name, changed in old.items():
        print(f"warning: {name} shows figures of older code ({', '.join(changed[:4])}); run make notebooks")
    print(*wrong, sep="\n", end="\n" * bool(wrong), file=sys.stderr)
    return int(bool(wrong))


def main(asked: list[str]) -> int:
    """The command line."""
    os.environ["BANDMASK_OUTPUTS"] = str(files.outputs_root() / "notebooks")  # no other run's results are met there
    paths, done = sorted(HOME.glob("[0-9]*.ipynb")), set[Path]()
    if unknown := {*asked} - {"--check"} - {path.name[:2] for path in paths}:
        sys.exit(f"no notebook {', '.join(unknown)}; there are {', '.join(path.name[:2] for path in paths)}")
    for path in [] if "--check" in asked else paths:
        if path not in done and (path.name[:2] in asked if asked else newer(path)):
            run(path, done)
    return check()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
