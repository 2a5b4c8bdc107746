"""What a result was made from: code, parameters and files, as checksums.

Code counts by what it does: comments, docstrings and layout may change without a run being made again. A notebook
depends on the modules it imports and on what those import. What only reports (`REPORTS`) decides no figure.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from bandmask import files, params

HOW = frozenset({"processes", "restart", "track"})  # parameters that say how a result is made, not which
REPORTS = frozenset({"progress", "provenance", "tracking"})


@functools.cache
def module_checksums() -> dict[str, str]:
    """Checksum of the code of every module of the package, by name without `bandmask.`, such as `runs.states`."""
    folder = files.project_root() / "bandmask"
    paths = sorted([*folder.glob("[a-z]*.py"), *folder.glob("*/[a-z]*.py")])
    found = {".".join(path.relative_to(folder).with_suffix("").parts): path for path in paths}
    return {name: code_checksum(path.read_text(encoding="utf-8")) for name, path in found.items()}


def code_checksum(source: str) -> str:
    """SHA-256 of Python code without comments, docstrings and layout."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and _documented(node):
            node.body = node.body[1:] or [ast.Pass()]
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest()


def code_of(modules: Iterable[str]) -> dict[str, str]:
    """Checksums of modules and of all that they import from the package, by name, sorted.

    Args:
        modules: names such as `alignment`, `bandmask.alignment` or `runs.states`.

    Raises:
        ValueError: a module that does not exist; lists those that do.
    """
    known, found = module_checksums(), set()
    for module in modules:
        name = module.removeprefix("bandmask.")
        if name not in known:
            raise ValueError(f"bandmask has no module {name!r}; available: {', '.join(known)}")
        found |= {name, *_imported_by(name)}
    return {name: known[name] for name in sorted(found - REPORTS)}


def code_of_notebook(notebook: str) -> dict[str, str]:
    """Checksums of what a notebook runs: its own cells as `notebook`, the parameters cell left out, and its modules.

    Raises:
        FileNotFoundError: no such notebook.
    """
    path = params.notebook_path(notebook)
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    source = "\n".join("".join(cell["source"]) for cell in code if "parameters" not in cell["metadata"].get("tags", []))
    return {"notebook": code_checksum(source), **code_of(_imports(ast.parse(source)))}


def checksum_of_code(*modules: str) -> str:
    """One checksum of modules and what they import: a checkpoint carries it, so that code changed is not resumed."""
    return files.checksum_of(code_of(modules))


def values_of(notebook: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters that decide what a notebook makes: its own defaults, and what is given for them."""
    return {name: value for name, value in params.complete(notebook, given).items() if name not in HOW}


def file_checksums(paths: Iterable[Path | str]) -> dict[str, str | None]:
    """Checksum of each file, relative to the outputs folder where it lies below it; None for one that is not there."""
    root = files.outputs_root()
    found: dict[str, str | None] = {}
    for path in map(Path, paths):
        name = str(path.relative_to(root) if path.is_relative_to(root) else path)
        found[name] = files.sha256(path) if path.is_file() else None
    return found


@functools.cache
def _imported_by(module: str) -> frozenset[str]:
    found = _graph().find_upstream_modules(f"bandmask.{module}")
    return frozenset(name.removeprefix("bandmask.") for name in found) & module_checksums().keys()


@functools.cache
def _graph() -> Any:
    import grimp

    return grimp.build_graph("bandmask", cache_dir=None, exclude_type_checking_imports=True)


def _imports(tree: ast.Module) -> set[str]:
    """Modules of the package that code imports, wherever it does so."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return {name.removeprefix("bandmask.") for name in found} & module_checksums().keys()


def _documented(node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    first = node.body[0] if node.body else None
    return isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str)
