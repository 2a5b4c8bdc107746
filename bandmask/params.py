"""Parameters of notebooks: what exists, what was passed, and where a run writes.

YAML in `params/` goes through papermill into notebook variables, and from there into explicit keyword arguments.
papermill itself only warns about an unknown parameter; `check` makes it an error.
"""

from __future__ import annotations

import ast
import difflib
import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from bandmask import bands, files

RUN_FILES = {  # what each task of a run leaves in its folder
    "alignment": "alignment.parquet",
    "classification": "results.parquet",
    "segmentation": "segmentation.parquet",
}
TASKS = tuple(task for task in RUN_FILES if task != "alignment")  # an experiment's choice; alignment is always done
BEYOND = {  # what an experiment may ask for past the thesis: notebook, folder in the experiment's, what it leaves there
    "any_band": ("08_any_band_encoder", "any-band", "any_band.parquet"),
    "robustness": ("09_robustness_map", "robustness", "robustness.parquet"),
    "faulty_bands": ("10_faulty_bands", "faults", "closed_loop.parquet"),
}
_NOTEBOOKS = files.project_root() / "notebooks"


def notebook_path(notebook: str) -> Path:
    """Where a notebook lies.

    Raises:
        FileNotFoundError: no such notebook; names those there are.
    """
    path = _NOTEBOOKS / f"{notebook}.ipynb"
    if not path.exists():
        names = ", ".join(sorted(p.stem for p in _NOTEBOOKS.glob("*.ipynb")))
        raise FileNotFoundError(f"no notebook {notebook!r} in {_NOTEBOOKS}; available: {names}")
    return path


def declared(notebook: str) -> dict[str, Any]:
    """Parameters of a notebook with their defaults, read from its cell tagged `parameters`.

    Raises:
        FileNotFoundError: no such notebook.
        ValueError: it has no such cell, or a default that is no plain literal.
    """
    path = notebook_path(notebook)
    return dict(_declared(path, path.stat().st_mtime_ns))


@functools.lru_cache(maxsize=64)
def _declared(path: Path, _modified: int) -> dict[str, Any]:
    """Parsed once for each version of a notebook: a graph of hundreds of runs asks for every run."""
    for cell in json.loads(path.read_text())["cells"]:
        if "parameters" in cell["metadata"].get("tags", []):
            return _assignments("".join(cell["source"]))
    raise ValueError(f"{path} has no cell tagged 'parameters'")


def complete(notebook: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Every parameter of a notebook: as given, else its default there; what it does not declare is left out."""
    return {name: given.get(name, default) for name, default in declared(notebook).items()}


def experiment_files(experiment: str, variant: str = "") -> list[Path]:
    """YAML files of an experiment, later ones on top.

    Args:
        experiment: a name in `params/experiments`, or the path of a YAML file.
        variant: a name in `params/<experiment>`, laid over it.
    """
    folder = files.project_root() / "params"
    named = Path(experiment) if experiment.endswith(".yaml") else folder / f"experiments/{experiment}.yaml"
    return [named, *([folder / experiment / f"{variant}.yaml"] if variant else [])]


def load_experiment(*paths: Path) -> dict[str, Any]:
    """Complete parameters of an experiment: its files over the notebooks' defaults.

    Raises:
        FileNotFoundError: names the missing file and those beside it.
        ValueError: a file that can't be used, or that lacks `experiment` or `masks`.
    """
    given = load(*paths)
    if not given.get("experiment") or not given.get("masks"):
        raise ValueError(f"{paths[-1]}: an experiment needs `experiment` (a name) and `masks` (a list)")
    return {**vocabulary(), **given}


def vocabulary() -> dict[str, Any]:
    """Parameters of all notebooks; one YAML serves several, so a name must be known to one of them."""
    return {
        name: default for path in sorted(_NOTEBOOKS.glob("*.ipynb")) for name, default in declared(path.stem).items()
    }


def check(notebook: str, namespace: Mapping[str, Any]) -> None:
    """Stop a notebook whose parameters are misspelt or of the wrong kind.

    Args:
        notebook: its name, such as `03_fine_tuning`.
        namespace: its `globals()`, after the parameters cell and what papermill injected behind it.

    Raises:
        ValueError: unknown or mistyped parameters, each with what is valid.
    """
    defaults = declared(notebook)
    injected = [cell for cell in namespace.get("In", []) if cell.startswith("# Parameters\n")]
    passed = _assignments(injected[-1]) if injected else {}
    values = {name: namespace[name] for name in defaults if name in namespace}
    validate({**passed, **values}, f"notebooks/{notebook}.ipynb")


def validate(parameters: Mapping[str, Any], source: str) -> None:
    """Check names and kinds of parameters against all notebooks.

    Raises:
        ValueError: lists every unknown name, with the nearest known one, and every value of another kind.
    """
    known = vocabulary()
    problems = []
    for name, value in parameters.items():
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(sorted(known))}"
            problems.append(f"unknown parameter {name!r}; {hint}")
        elif not _same_kind(value, known[name]):
            kind = type(known[name]).__name__
            problems.append(f"{name} = {value!r} is a {type(value).__name__}; expected {kind}, such as {known[name]!r}")
    if problems:
        raise ValueError(f"{source}: " + "; ".join(problems))


def load(*paths: Path | str) -> dict[str, Any]:
    """Merged parameters of YAML files, later ones first in rank, checked.

    Raises:
        FileNotFoundError: names the missing file and those beside it.
        ValueError: a file that is no flat YAML mapping, or unknown or mistyped parameters.
    """
    merged: dict[str, Any] = {}
    for path in map(Path, paths):
        if not path.exists():
            beside = ", ".join(sorted(p.name for p in path.parent.glob("*.yaml"))) or "none"
            raise FileNotFoundError(f"no parameter file {path}; beside it: {beside}")
        try:
            entries = yaml.safe_load(path.read_text()) or {}
        except yaml.YAMLError as error:
            raise ValueError(f"{path} is no YAML: {error}") from error
        if not isinstance(entries, dict):
            raise ValueError(f"{path} should hold `name: value` lines, it holds a {type(entries).__name__}")
        validate(entries, str(path))
        merged.update(entries)
    return merged


def beyond(parameters: Mapping[str, Any]) -> dict[str, tuple[str, str, str]]:
    """The entries of `BEYOND` that an experiment asks for.

    Raises:
        ValueError: an unknown one; lists those there are.
    """
    asked = parameters.get("beyond", [])
    if unknown := set(asked) - set(BEYOND):
        raise ValueError(f"unknown in beyond: {', '.join(sorted(unknown))}; available: {', '.join(BEYOND)}")
    return {name: made for name, made in BEYOND.items() if name in asked}


def experiment_folder(experiment: str) -> Path:
    """`outputs/<experiment>`."""
    if not experiment or Path(experiment).name != experiment:
        raise ValueError(f"experiment names a folder below outputs/, without slashes; got {experiment!r}")
    return files.outputs_root() / experiment


def run_folder(experiment: str, mask: str, scheme: str = "named") -> Path:
    """`outputs/<experiment>/<mask>`, such as `outputs/sample/B2_B3_B4`."""
    return experiment_folder(experiment) / bands.mask_slug(mask, scheme)


def encoder_source(experiment: str, encoder: str) -> Path | str:
    """What `encoders.load_encoder` takes for the parameter `encoder`: a stand-in lies in its experiment's folder."""
    return experiment_folder(experiment) / "encoder" if encoder == "stand-in" else encoder


def _assignments(source: str) -> dict[str, Any]:
    """`name = literal` lines of a cell."""
    found = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
            target = node.targets[0] if isinstance(node, ast.Assign) else node.target
            try:
                found[ast.unparse(target)] = ast.literal_eval(node.value)
            except ValueError as error:
                raise ValueError(f"parameter {ast.unparse(target)} must be a plain literal") from error
    return found


def _same_kind(value: Any, default: Any) -> bool:
    if isinstance(value, bool) or isinstance(default, bool):
        return isinstance(value, bool) and isinstance(default, bool)
    if isinstance(default, float):
        return isinstance(value, int | float)
    if isinstance(default, list):
        return isinstance(value, list) and (not default or all(_same_kind(v, default[0]) for v in value))
    return isinstance(value, type(default))
