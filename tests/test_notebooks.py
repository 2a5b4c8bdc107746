"""Notebooks follow the template, are committed clean, and stop with a clear message when something is amiss.

That they run is nbval's part of `make test`; here they are run only to see them stop.
"""

import ast
import json
import subprocess
import sys

import pytest

from bandmask import files

ROOT = files.project_root()
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
CHECKED = "nbval-check-output"


def cells(path, kind=None):
    found = json.loads(path.read_text())["cells"]
    return [cell for cell in found if kind is None or cell["cell_type"] == kind]


def source(cell):
    return "".join(cell["source"])


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def notebook(request):
    return request.param


def test_opens_with_the_question_and_what_it_takes(notebook):
    opening = source(cells(notebook)[0])
    assert opening.startswith(f"# {notebook.stem[:2]} · ")
    for word in ("**Question", "You will learn", "Needs", "Runtime", "Writes"):
        assert word in opening


def test_parameters_come_third_and_every_one_is_explained(notebook):
    code = cells(notebook, "code")
    assert "parameters" in code[1]["metadata"].get("tags", [])
    for line in source(code[1]).splitlines():
        name, _, comment = line.partition("  # ")
        assert comment, f"{name} has no comment"
        ast.literal_eval(name.partition(" = ")[2])
    assert f'params.check("{notebook.stem}", globals())' in source(code[2])


def test_ends_with_checks_and_limits(notebook):
    everything = cells(notebook)
    assert any(CHECKED in cell["metadata"].get("tags", []) for cell in everything)
    assert "next" in source(everything[-1]).splitlines()[0].lower()


def test_cells_are_short_and_hold_no_machinery(notebook):
    for cell in cells(notebook, "code"):
        text = source(cell)
        assert len(text.splitlines()) <= 40, text.splitlines()[0]
        for forbidden in ("class ", "sys.path", "!pip", "%pip", "import *", "except:", "except Exception"):
            assert forbidden not in text


def test_only_check_cells_keep_their_output(notebook):
    for cell in cells(notebook, "code"):
        kept = CHECKED in cell["metadata"].get("tags", [])
        assert bool(cell["outputs"]) == kept, source(cell)[:80]


def run(notebook, tmp_path, *arguments):
    command = [
        sys.executable,
        "-m",
        "papermill",
        str(ROOT / "notebooks" / f"{notebook}.ipynb"),
        str(tmp_path / "out.ipynb"),
    ]
    environment = {**__import__("os").environ, "BANDMASK_OUTPUTS": str(tmp_path / "outputs")}
    return subprocess.run(
        [*command, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False
    )


@pytest.mark.parametrize("notebook", [path.stem for path in NOTEBOOKS if "03" <= path.stem < "11"])
def test_says_which_notebook_to_run_first(notebook, tmp_path):
    done = run(notebook, tmp_path, "-f", "params/experiments/sample.yaml")
    assert done.returncode != 0
    assert "FileNotFoundError" in done.stderr
    assert "notebooks/0" in done.stderr.split("FileNotFoundError")[-1]


def test_mistyped_parameter_stops_the_documented_command(tmp_path):
    arguments = ["-f", "params/experiments/sample.yaml", "-f", "params/masks/B8.yaml", "-p", "mask_rato", "0.5"]
    done = run("03_fine_tuning", tmp_path, *arguments)
    assert done.returncode != 0
    assert "unknown parameter 'mask_rato'; did you mean 'mask_ratio'" in done.stderr


def test_unknown_band_stops_it_and_lists_what_exists(tmp_path):
    done = run("02_band_visualization", tmp_path, "-p", "mask", "B99", "-p", "mask_scheme", "esa")
    assert done.returncode != 0
    assert "unknown band 'B99'" in done.stderr
    assert "B8A (nir08)" in done.stderr
