"""What a result was made from: a change that does something is seen, one that does nothing is not."""

import json
import shutil

import pytest

import bandmask
from bandmask import files, params, provenance

SOURCE = '''"""What it is."""
def double(x):
    """Twice."""
    return 2 * x  # as it says
'''


SAME = {"What it is.": "Something else.", "Twice.": "Two times.", "  # as it says": "", "2 * x": "(2 *\n  x)"}
OTHER = {
    "2 *": "3 *",
    "double": "twice",
    "return": "y = 'a string'\n    return",
    '    """Twice."""\n    return': "    return 'a',",
}


@pytest.mark.parametrize(("old", "new"), [*SAME.items(), ('    """Twice."""\n', ""), *OTHER.items()])
def test_what_code_does_counts_and_comments_docstrings_and_layout_do_not(old, new):
    assert SOURCE.count(old)
    same = provenance.code_checksum(SOURCE.replace(old, new)) == provenance.code_checksum(SOURCE)
    assert same == (old not in OTHER)


def test_every_module_counts_with_the_figures_that_lie_beside_it_and_what_only_reports_does_not(tmp_path, monkeypatch):
    """A package's `__init__` was passed by: `moments` could change, and nothing was made again."""
    folder = files.project_root() / "bandmask"
    every = {path.stem for path in folder.glob("[a-z]*.py")}
    every |= {path.parent.name for path in folder.glob("*/__init__.py")}
    assert {*provenance.module_checksums()} == every, "the page apart, whose names are followed"
    assert "moments" in provenance.code_of(["fills"])
    assert not provenance.REPORTS & provenance.code_of(["align"]).keys()
    assert every >= provenance.REPORTS, "a renamed module must be renamed here too"
    before = provenance.module_checksums()
    shutil.copytree(folder, tmp_path / "bandmask", ignore=shutil.ignore_patterns("mini", "sample", "__pycache__"))
    monkeypatch.setattr(files, "project_root", lambda: tmp_path)
    (tmp_path / "bandmask" / "moments" / "l1c.json").write_text("{}")
    (tmp_path / "bandmask" / "foundation" / "__init__.py").write_text("changed = 1")
    after = provenance.module_checksums.__wrapped__()
    assert [name for name in after if after[name] != before[name]] == ["foundation", "moments"]


@pytest.mark.parametrize(
    ("notebook", "uses", "spares"),
    [
        ("00_sample_encoder", {"align", "masks"}, {"thesis", "viewer"}),
        ("03_fine_tuning", {"align", "masks", "batches", "train", "packs"}, {"thesis", "evaluation"}),
        ("04_scene_classification", {"evaluation", "fills"}, {"thesis", "viewer"}),
        ("05_image_segmentation", {"evaluation", "heads"}, {"thesis", "viewer"}),
        ("06_results", {"results", "thesis", "stats"}, {"train", "align"}),
    ],
)
def test_a_notebook_depends_on_its_modules_alone(notebook, uses, spares):
    code = provenance.code_of_notebook(notebook)
    assert {"notebook", *uses} <= code.keys()
    assert not spares & code.keys()


def test_cells_count_and_the_parameters_cell_does_not(tmp_path, monkeypatch):
    """Parameters are compared by value: a default that nobody takes must not re-run everyone."""
    monkeypatch.setattr(params, "_NOTEBOOKS", tmp_path)
    monkeypatch.setattr(provenance, "code_of_notebook", provenance.code_of_notebook.__wrapped__)
    path = tmp_path / "03_fine_tuning.ipynb"
    shutil.copy(files.project_root() / "notebooks" / path.name, path)
    before = provenance.code_of_notebook("03_fine_tuning")

    def change(tagged, text):
        notebook = json.loads(path.read_text())
        for cell in notebook["cells"]:
            is_parameters = "parameters" in cell["metadata"].get("tags", [])
            if cell["cell_type"] == "code" and is_parameters == tagged:
                cell["source"] = [*cell["source"], text]
                break
        path.write_text(json.dumps(notebook))

    change(True, "\nunheard_of = 1")
    assert provenance.code_of_notebook("03_fine_tuning") == before
    change(False, "\nunheard_of = 1")
    after = provenance.code_of_notebook("03_fine_tuning")
    assert [name for name in after if after[name] != before[name]] == ["notebook"]


@pytest.mark.parametrize(
    ("line", "uses", "spares"),
    [
        ("import bandmask as bm", {"masks", "evaluation", "results"}, set()),
        ("def f():\n    import bandmask, json", {"masks", "evaluation", "results"}, set()),
        ("from bandmask import *", {"masks", "evaluation", "results"}, set()),
        ("from bandmask import unheard_of", {"masks", "evaluation", "results"}, set()),
        ("from bandmask import hide", {"masks", "bands"}, {"evaluation", "results", "train"}),
        ("import bandmask.masks as m", {"masks", "bands"}, {"evaluation", "results", "train"}),
        ("from bandmask.masks import MaskSpec", {"masks", "bands"}, {"evaluation", "results", "train"}),
        ("import json", set(), {"bands", "masks"}),
    ],
)
def test_a_name_of_the_page_counts_the_module_it_lies_in(line, uses, spares, tmp_path, monkeypatch):
    """`bm.hide` is found when it is first used: an import of the package alone must not hide what stands behind it."""
    monkeypatch.setattr(bandmask, "_HOME", {"hide": "masks"}, raising=False)
    monkeypatch.setattr(params, "_NOTEBOOKS", tmp_path)
    cell = {"cell_type": "code", "metadata": {}, "source": [line]}
    (tmp_path / "mine.ipynb").write_text(json.dumps({"cells": [cell]}))
    code = provenance.code_of_notebook.__wrapped__("mine")
    assert {"notebook", *uses} <= code.keys()
    assert not spares & code.keys()
