"""Notebooks follow the template, are committed clean, and stop with a clear message when something is amiss.

That they run is nbval's part of `make test`; here they are run only to see them stop.
"""

import ast
import base64
import importlib.util
import io
import json
import os
import re
import statistics
import subprocess
import sys
from dataclasses import replace

import pytest
from PIL import Image

from bandmask import datasets, files, params

ROOT = files.project_root()
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
CHECKED = "nbval-check-output"
spec = importlib.util.spec_from_file_location("keep", ROOT / "notebooks" / "keep.py")
keep = importlib.util.module_from_spec(spec)
spec.loader.exec_module(keep)


def cells(path, kind=None):
    found = json.loads(path.read_text())["cells"]
    return [cell for cell in found if kind is None or cell["cell_type"] == kind]


def source(cell):
    return "".join(cell["source"])


def pictures(cell):
    return [output["data"]["image/png"] for output in cell["outputs"] if "image/png" in output.get("data", {})]


def kept_cells(path):
    """Code cells with their outputs; a notebook whose cells were just rewritten has none until `make notebooks`."""
    if "bandmask" not in json.loads(path.read_text())["metadata"]:
        pytest.skip("run `make notebooks` first")
    return cells(path, "code")


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def notebook(request):
    return request.param


def test_follows_the_template(notebook):
    """What it needs, which `keep.py` reads; imports, parameters, a check of them; checks that nbval compares."""
    opening, code = source(cells(notebook)[0]), cells(notebook, "code")
    assert opening.startswith(f"# {notebook.stem[:2]} · ")
    assert "| Needs" in opening
    assert "parameters" in code[1]["metadata"].get("tags", [])
    for line in source(code[1]).splitlines():
        name, _, comment = line.partition("  # ")
        assert comment, f"{name} has no comment"
        ast.literal_eval(name.partition(" = ")[2])
    assert f'params.check("{notebook.stem}", globals())' in source(code[2])
    assert any(CHECKED in cell["metadata"].get("tags", []) for cell in code)


def test_cells_hold_a_few_lines_and_no_machinery_and_every_link_leads_somewhere(notebook):
    texts = [source(cell) for cell in cells(notebook, "code")]
    sizes = [len(text.splitlines()) for text in texts]
    assert statistics.median(sizes) <= 6
    assert max(sizes) <= 40
    assert not re.findall(r"^ *class |sys\.path|[!%]pip|import \*|except:|except Exception", "\n".join(texts), re.M)
    text = "\n".join(source(cell) for cell in cells(notebook, "markdown"))
    targets = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text)
    assert all((notebook.parent / target).exists() for target in targets if not target.startswith("https://"))


@pytest.mark.parametrize("story", NOTEBOOKS[1:6], ids=lambda path: path.stem)
def test_the_first_picture_comes_within_forty_lines(story):
    code = kept_cells(story)
    shown = next(place for place, cell in enumerate(code) if pictures(cell))
    assert sum(len(source(cell).splitlines()) for cell in code[: shown + 1]) <= 40
    imported = ast.parse(source(code[0])).body
    assert sum(len(node.names) for node in imported if isinstance(node, ast.Import | ast.ImportFrom)) <= 15
    assert len(params.declared(story.stem)) <= 25


def test_letters_are_legible_and_a_widget_leaves_its_picture(notebook):
    """A page shows 800 pixels of a figure, so that letters of 8 points in one of 1,100 are 8 pixels high."""
    for cell in kept_cells(notebook):
        if "plots.explore(" in source(cell):
            assert pictures(cell)
        assert all(float(size) >= 8 for size in re.findall(r"fontsize=([\d.]+)", source(cell)))
        for png in pictures(cell):
            assert Image.open(io.BytesIO(base64.b64decode(png))).width <= keep.WIDEST


def test_what_is_kept_has_a_limit_and_names_no_machine():
    assert all(not keep.faults(path) for path in NOTEBOOKS)
    assert sum(path.stat().st_size for path in NOTEBOOKS) <= keep.TOGETHER


def test_readers_see_figures_tables_and_lines_and_nothing_that_passes(tmp_path):
    png = io.BytesIO()
    Image.effect_noise((900, 400), 90).convert("RGB").save(png, "PNG")
    widget = {"application/vnd.jupyter.widget-view+json": {"model_id": "0"}, "text/plain": "VBox()"}
    figure = {**widget, "image/png": base64.b64encode(png.getvalue()).decode()}
    outputs = [
        {"output_type": "stream", "name": "stdout", "text": f"written {files.outputs_root()}/sample/a.tif"},
        {"output_type": "stream", "name": "stderr", "text": "UserWarning"},
        {"output_type": "display_data", "metadata": {}, "data": {"text/plain": "epoch 1, 30 images/s"}},
        {"output_type": "execute_result", "metadata": {}, "data": {"text/plain": "[PosixPath('/home/me')]"}},
        {"output_type": "execute_result", "metadata": {}, "data": {"text/plain": "a", "text/html": "<table></table>"}},
        {"output_type": "display_data", "metadata": {}, "data": figure},
    ]
    kept = [keep.seen(output) for output in outputs]
    assert [place for place, output in enumerate(kept) if output] == [0, 4, 5]
    assert kept[0]["text"] == "written outputs/sample/a.tif"
    assert list(kept[4]["data"]) == ["text/html"]
    assert list(kept[5]["data"]) == ["image/png"]
    assert len(base64.b64decode(kept[5]["data"]["image/png"])) < len(png.getvalue()) / 3


def test_a_run_is_kept_marked_and_found_old_when_its_code_changes(tmp_path, monkeypatch):
    cell = {"cell_type": "code", "execution_count": None, "id": "a", "metadata": {}, "outputs": [], "source": "1"}
    bare = {"cells": [cell], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}
    path, executed = tmp_path / "01_data_exploration.ipynb", tmp_path / "executed.ipynb"
    path.write_text(json.dumps(bare))
    assert keep.newer(path)
    said = {"output_type": "stream", "name": "stdout", "text": "one\n"}
    kernel = {"kernelspec": {"name": "a", "display_name": "b"}}
    executed.write_text(json.dumps({**bare, "cells": [{**cell, "outputs": [said]}], "metadata": kernel}))
    keep.keep(path, executed)
    assert not keep.newer(path)
    assert not keep.faults(path)
    assert cells(path)[0]["outputs"][0]["text"] == ["one\n"]
    monkeypatch.setattr(keep, "mark", lambda _: {**json.loads(path.read_text())["metadata"]["bandmask"], "plots": "0"})
    assert keep.newer(path) == ["plots"]
    leaky = json.loads(path.read_text())
    leaky["cells"][0] |= {"outputs": [{**said, "text": "/home/me/a.tif"}], "execution_count": 4}
    path.write_text(json.dumps(leaky))
    assert len(keep.faults(path)) == 2


FIRST = """
import contextlib, io, json, sys
for path in sys.argv[1:]:
    kernel = {"display": print}
    cells = [cell for cell in json.load(open(path, encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
    said = "it ran"
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            for cell in cells:
                exec("".join(cell["source"]), kernel)
    except FileNotFoundError as error:
        said = str(error)
    print(json.dumps(said))
"""


def test_each_says_which_notebook_to_run_first(tmp_path):
    asked = [path for path in NOTEBOOKS if path.stem[:2] in {"03", "04", "05", "06", "07"}]  # the others need none
    environment = {**os.environ, "BANDMASK_OUTPUTS": str(tmp_path), "MPLBACKEND": "agg"}
    command = [sys.executable, "-c", FIRST, *map(str, asked)]  # one process: imports are most of it
    done = subprocess.run(command, cwd=ROOT / "notebooks", env=environment, capture_output=True, text=True, check=False)
    said = [json.loads(line) for line in done.stdout.splitlines()]
    assert [path.stem for path, words in zip(asked, said, strict=True) if "notebooks/0" not in words] == [], done.stderr


@pytest.mark.parametrize("number", ["08", "09", "10"])
def test_a_pack_that_lacks_bands_is_refused_before_anything_is_trained(number, tmp_path, make_pack, monkeypatch):
    own = make_pack(tmp_path)
    monkeypatch.setattr(datasets, "open_dataset", lambda _: replace(own, card={**own.card, "absent": ["B10"]}))
    imports, defaults, first = cells(next(ROOT.glob(f"notebooks/{number}_*.ipynb")), "code")[:3]
    values = {}
    exec(source(imports) + "\n" + source(defaults), values)
    with pytest.raises(ValueError, match="lacks B10, this notebook takes complete images"):
        exec(source(first), values)


def test_a_parameter_that_is_not_there_stops_the_documented_command(tmp_path):
    command = [sys.executable, "-m", "papermill", "notebooks/03_fine_tuning.ipynb", tmp_path / "out.ipynb"]
    command += ["-p", "mask_rato", "0.5"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode != 0
    assert "unknown parameter 'mask_rato'; did you mean 'mask_ratio'" in done.stderr
