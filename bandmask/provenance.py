"""What a result was made from: code, parameters and files, as checksums. A node's record holds them, and decides alone.

Code counts by what it does: comments, docstrings and layout may change without a run being made again. A notebook
depends on the modules it imports and on what those import. What only reports (`REPORTS`) decides no figure.
"""

import ast
import functools
import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import bandmask
from bandmask import files, params

HOW = frozenset({"processes"})  # parameters that say how a result is made, not which
REPORTS = frozenset({"provenance"})


@functools.cache
def module_checksums() -> dict[str, str]:
    """Checksum of every module of the package, by name without `bandmask.`; of a folder with all that it holds."""
    found, folder = {}, files.project_root() / "bandmask"
    for path in folder.glob("[a-z]*.py"):
        found[path.stem] = code_checksum(path.read_text(encoding="utf-8"))
    for path in folder.glob("*/__init__.py"):  # with the figures that lie beside it
        beside = sorted(file for kind in ("json", "npz") for file in path.parent.glob(f"*.{kind}"))
        own = [code_checksum(part.read_text(encoding="utf-8")) for part in sorted(path.parent.glob("*.py"))]
        found[path.parent.name] = files.checksum_of([*own, *map(files.sha256, beside)])
    return dict(sorted(found.items()))


def code_checksum(source: str) -> str:
    """SHA-256 of Python code without comments, docstrings and layout."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        kinds = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
        if isinstance(node, kinds) and ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest()


def code_of(modules: Iterable[str]) -> dict[str, str]:
    """Checksums of modules, such as `align`, and of all that they import from the package, by name, sorted."""
    known, found = module_checksums(), set(modules)
    for name in modules:
        found |= {other.removeprefix("bandmask.") for other in _graph().find_upstream_modules(f"bandmask.{name}")}
    return {name: known[name] for name in sorted((found & known.keys()) - REPORTS)}


@functools.cache
def code_of_notebook(notebook: str) -> Mapping[str, str]:
    """Checksums of what a notebook runs: its own cells as `notebook`, the parameters cell left out, and its modules."""
    cells = json.loads(params.notebook_path(notebook).read_bytes())["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    source = "\n".join("".join(cell["source"]) for cell in code if "parameters" not in cell["metadata"].get("tags", []))
    return {"notebook": code_checksum(source), **code_of(_imports(ast.parse(source)))}


def checksum_of_code(*modules: str) -> str:
    """One checksum of modules and what they import: a checkpoint carries it, so that code changed is not resumed."""
    return files.checksum_of(code_of([name.removeprefix("bandmask.") for name in modules]))


def values_of(notebook: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters that decide what a notebook makes: its own defaults, and what is given for them."""
    return {name: value for name, value in params.complete(notebook, given).items() if name not in HOW}


def file_checksums(paths: Iterable[Path | str], folder: Path | str) -> dict[str, str | None]:
    """Checksum of each file, None where there is none, by its path from `folder`; absolute outside the outputs."""
    root, found = files.outputs_root().resolve(), {}
    for path in (Path(path).resolve() for path in paths):
        name = os.path.relpath(path, Path(folder).resolve()) if path.is_relative_to(root) else str(path)
        found[name] = files.sha256(path) if path.is_file() else None
    return found


@functools.cache
def _graph() -> Any:
    import grimp

    return grimp.build_graph("bandmask", cache_dir=None, exclude_type_checking_imports=True)


def _imports(tree: ast.Module) -> set[str]:
    """Modules of the package that code imports, wherever it does so; all, where it imports the package itself.

    Names of the page lie in modules that are loaded when they are first used.
    """
    found, known = set(), module_checksums().keys()
    home = getattr(bandmask, "_HOME", {})
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module == "bandmask":
            names = {home.get(alias.name, alias.name) for alias in node.names}
            found |= {f"bandmask.{name}" if name in known else "bandmask" for name in names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    found = _graph().modules if "bandmask" in found else found
    return {name.removeprefix("bandmask.") for name in found} & known
