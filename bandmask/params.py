"""Parameters of notebooks: what exists, what was passed, and where a run writes.

YAML in `params/` goes through papermill into notebook variables, and from there into explicit keyword arguments.
papermill itself only warns about an unknown parameter; `check` makes it an error.
"""

import ast
import difflib
import functools
import json
import math
import re
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from bandmask import bands, files

TASK_FILES = {  # which notebook does which task of a run, and what it leaves: rows first
    "classification": ("04_scene_classification", "results.parquet", "predictions.parquet"),
    "segmentation": ("05_image_segmentation", "segmentation.parquet", "segmentation_predictions.parquet"),
}
RUN_FILES = {"alignment": "alignment.parquet", **{task: names[1] for task, names in TASK_FILES.items()}}
BEYOND = {  # what an experiment may ask for past the thesis: notebook, its folder, what it leaves there
    "any_band": ("08_any_band_encoder", "any-band", ("any_band.parquet", "found.md")),
    "robustness": ("09_robustness_map", "robustness", ("robustness.parquet",)),
    "faulty_bands": ("10_faulty_bands", "faults", ("closed_loop.parquet",)),
}
HEAD_FILES = ("heads.safetensors", "settings.json")  # of heads in service
ENCODER_FILES = ("model.safetensors", "card.json")
ANY_BAND_FILES = (*ENCODER_FILES, "moments.npz", "gate.json", *(f"pre-trained/{name}" for name in ENCODER_FILES))
_ROOT = files.project_root()
_NOTEBOOKS = _ROOT / "notebooks"
_OF_THE_GRAPH: dict[str, Any] = {  # parameters of no notebook
    "timeout_minutes": 0.0,  # a notebook that takes longer is ended; 0 never
    "folds": [],  # of notebook 11: a run of it for each and each task, and nothing else
}
SMALL = ("small", "stand-in")  # the encoder of the experiment's folder, and its old name
_CHOICES = {  # what these may be, so that a graph need not start, nor torch be imported, to refuse a misspelt one
    "dataset": ("sample", "eurosat-mini", "eurosat", "eurosat-spatial", "eurosat-mini-train", "sen12ms", "dfc2020"),
    "encoder": (
        *(*SMALL, "mini", "galileo-nano", "presto", "olmoearth-nano", "ukis-csmask-6b-l1c", "ukis-csmask-6b-l2a"),
        *(f"satclip-{net}-{degree}" for net in ("resnet18", "resnet50", "vit16") for degree in ("l10", "l40")),
        *("moco-resnet18", "moco-resnet50", "dino-resnet50", "moco-vit-small"),
    ),
    "mask_scheme": bands.SCHEMES,
    "mask_schedule": ("constant", "gradual", "staircase"),
    "mask_shape": ("pixel", "band", "stripe", "block", "cloud"),
    "mask_value": ("dataset_mean", "band_mean", "nearest", "local", "ridge", "ridge_local", "native"),
    "align": ("embedding", "features", "both"),
    "device": ("auto", "cpu", "cuda"),
    "tasks": tuple(TASK_FILES),  # alignment is always done
    "beyond": tuple(BEYOND),
    "methods": (
        *("pre-trained", "native", "nearest", "local", "ridge", "ridge_local"),
        *("mapped", "native mapped", "fine-tuned", "any-band"),
    ),
}
_CHOICES["segmentation_dataset"] = _CHOICES["dataset"]
_CHOICES["teacher"] = ("", *(name for name in _CHOICES["encoder"] if name not in SMALL))
_CHOICES["healthy_images"] = ("", *_CHOICES["dataset"])
_OWN = dict.fromkeys(("dataset", "segmentation_dataset", "healthy_images"), "pack.json")  # or a folder that holds this
_OWN |= dict.fromkeys(("encoder", "teacher"), "card.json")
_FROM_ONE = ("epochs", "size", "width", "processes", "lr", "count", "ratio")  # words of names of what is above 0
_LARGEST = 1_000_000  # bytes of a parameter file


class ParameterError(ValueError):
    """Parameters that can't be meant; a notebook shows what it says, without the way there."""

    def _render_traceback_(self) -> list[str]:  # of IPython
        return [f"{type(self).__name__}: {self}"]


def notebook_path(notebook: str) -> Path:
    """Where a notebook lies; a FileNotFoundError if there is no such one."""
    if not (path := _NOTEBOOKS / f"{notebook}.ipynb").exists():
        names = ", ".join(sorted(p.stem for p in _NOTEBOOKS.glob("*.ipynb")))
        raise FileNotFoundError(f"no notebook {notebook!r}; available: {names}")
    return path


@functools.cache
def declared(notebook: str) -> Mapping[str, Any]:
    """Parameters of a notebook with their defaults, plain literals, read once from its cell tagged `parameters`."""
    cells = json.loads(notebook_path(notebook).read_bytes())["cells"]
    tagged = [cell for cell in cells if "parameters" in cell["metadata"].get("tags", [])]
    return _assignments("".join(tagged[0]["source"])) if tagged else {}


def complete(notebook: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Every parameter of a notebook: as given, else its default there; what it does not declare is left out."""
    return {name: given.get(name, default) for name, default in declared(notebook).items()}


def load_experiment(experiment: str, variant: str = "") -> dict[str, Any]:
    """What `params/experiments/<experiment>.yaml`, or a YAML file of this path, and `<variant>` laid over it give.

    The rest are the notebooks' defaults, as `vocabulary` has them. Raises what `load` does, and a ValueError if it
    lacks `experiment`, or all of `masks`, `folds` and `beyond`.
    """
    folder = _ROOT / "params"
    named = Path(experiment) if experiment.endswith((".yaml", ".yml")) else folder / f"experiments/{experiment}.yaml"
    given = load(named, *([folder / experiment / f"{variant}.yaml"] if variant else []))
    if not given.get("experiment") or not any(given.get(name) for name in ("masks", "folds", "beyond")):
        raise ValueError(f"{experiment}: an experiment needs `experiment` (a name), and `masks`, `folds` or `beyond`")
    if given.get("folds") and (beside := [name for name in ("masks", "beyond") if given.get(name)]):
        raise ValueError(f"{experiment}: folds run notebook 11 alone; give {' and '.join(beside)} in another file")
    if given.get("dataset") == "eurosat-mini" and {*given.get("masks", ())} - {"none"}:
        raise ValueError(f"{experiment}: masks are trained for, and eurosat-mini has test images alone; take another")
    return given


def vocabulary() -> dict[str, Any]:
    """Parameters of all notebooks; one YAML serves several, so a name must be known to one of them."""
    notebooks = sorted(_NOTEBOOKS.glob("*.ipynb"))
    return {**_OF_THE_GRAPH, **{name: value for path in notebooks for name, value in declared(path.stem).items()}}


def check(notebook: str, namespace: Mapping[str, Any]) -> None:
    """Stop a notebook whose parameters can't be meant, by its `globals()` behind what papermill injected."""
    injected = [cell for cell in namespace.get("In", []) if cell.startswith("# Parameters\n")]
    passed = _assignments(injected[-1]) if injected else {}
    values = {name: namespace[name] for name in declared(notebook) if name in namespace}
    validate({**passed, **values}, f"notebooks/{notebook}.ipynb")


def validate(parameters: Mapping[str, Any], source: str) -> None:
    """Check names, kinds and values of parameters against all notebooks, before anything heavy is imported.

    A ParameterError lists every unknown name, with the nearest known one, and every value that can't be meant.
    """
    known = vocabulary()
    given = {**known, **{n: v for n, v in parameters.items() if n in known and _same_kind(v, known[n])}}
    problems = []
    for name, value in parameters.items():
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(sorted(known))}"
            problems.append(f"unknown parameter {name!r}; {hint}")
        elif not _same_kind(value, known[name]):
            kind, shown = type(known[name]).__name__, reprlib.repr(value)
            word = isinstance(value, str) and not isinstance(known[name], str) and _is_number(value)
            hint = "; YAML takes 1e-4 for a word, write 1.0e-4" if word else ""
            if isinstance(known[name], str):
                hint = "; quote it in YAML; for papermill -r in place of -p"
            kind += f" of {type(known[name][0]).__name__}" if isinstance(known[name], list) and known[name] else ""
            said = f"{name} = {shown} is a {type(value).__name__}"
            problems.append(f"{said}; expected {kind}, such as {known[name]!r}{hint}")
        elif problem := _out_of_range(name, value, given):
            problems.append(f"{name} = {reprlib.repr(value)}: {problem}")
    if problems:
        raise ParameterError(f"{source}: " + "; ".join(problems))


def load(*paths: Path | str) -> dict[str, Any]:
    """Merged parameters of YAML files, later ones first in rank, checked.

    A FileNotFoundError names those beside it, a ValueError what is no flat YAML mapping, or no parameter.
    """
    merged: dict[str, Any] = {}
    for path in map(Path, paths):
        if not path.exists():
            beside = ", ".join(sorted(p.name for p in path.parent.glob("*.yaml"))) or "none"
            raise FileNotFoundError(f"no parameter file {path}; beside it: {beside}")
        try:
            if path.stat().st_size > _LARGEST:
                raise ValueError(f"it has {path.stat().st_size:,} bytes; parameters take a few hundred")
            text = path.read_text(encoding="utf-8")
            depth = 0
            for event in yaml.parse(text):  # a few aliases unfold to gigabytes, and a few kB of brackets take hours
                depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
                if isinstance(event, yaml.AliasEvent) or depth > 2:
                    raise ValueError("values are numbers, words and flat lists, without YAML aliases (*name)")
            if not isinstance(entries := yaml.safe_load(text) or {}, dict):
                raise ValueError(f"it should hold `name: value` lines, it holds a {type(entries).__name__}")
            node = yaml.compose(text)  # of a name that stands twice, YAML keeps the last
            names = [name.value for name, _ in node.value] if isinstance(node, yaml.MappingNode) else []
            if twice := sorted({name for name in names if names.count(name) > 1}):
                raise ValueError(f"it gives {', '.join(twice)} more than once")
        except (yaml.YAMLError, ValueError) as error:
            raise ValueError(f"{path} can't be used: {str(error)[:500]}") from error
        merged.update(entries)
        validate(merged, str(path))
    return merged


def experiment_folder(experiment: str) -> Path:
    """`outputs/<experiment>`; a ValueError if that is no folder of its own there, such as `..` or `packs`."""
    if not re.fullmatch(r"\w[\w.+-]*", experiment) or experiment == "packs":
        raise ValueError(f"experiment names a folder of its own below outputs/, such as my-test; got {experiment!r}")
    return files.outputs_root() / experiment


def run_folder(experiment: str, mask: str, scheme: str = "named") -> Path:
    """`outputs/<experiment>/<mask>`, such as `outputs/sample/B2_B3_B4`."""
    return experiment_folder(experiment) / bands.mask_slug(mask, scheme)


def encoder_source(experiment: str, encoder: str) -> Path | str:
    """What `encoders.load_encoder` takes for the parameter `encoder`: a small one lies in its experiment's folder."""
    return experiment_folder(experiment) / "encoder" if encoder in SMALL else encoder


def _assignments(source: str) -> dict[str, Any]:
    """`name = literal` lines of a cell."""
    lines = [line for line in ast.parse(source).body if isinstance(line, ast.Assign)]
    try:
        return {ast.unparse(line.targets[0]): ast.literal_eval(line.value) for line in lines}
    except ValueError as error:  # papermill writes nan as float('nan')
        raise ParameterError(f"parameters are plain literals, and finite: {source.strip()}") from error


def _out_of_range(name: str, value: Any, given: Mapping[str, Any]) -> str:
    """What is wrong with a value of the right kind, beside what else is given; empty if nothing is."""
    values = value if isinstance(value, list) else [value]
    known = _CHOICES.get(name, values)
    for strange in (v for v in values if v not in known and not (name == "mask_value" and _is_number(v))):
        places = [Path(strange).expanduser(), *([_ROOT / strange] if _OWN.get(name) == "pack.json" else [])]
        if not (strange and name in _OWN and any((place / _OWN[name]).is_file() for place in places)):
            own = f", or a folder with {_OWN[name]}" if name in _OWN else ""
            return f"unknown {strange!r}; available: {', '.join(filter(None, known))}{own}"
    try:
        for mask in values if name in ("mask", "masks") else ():
            if not bands.resolve_mask(mask, given["mask_scheme"]) and mask != "none":
                return f"{mask!r} names no band; 'none' is the mask that hides nothing"
        for band in values if name == "fault_bands" else ():
            bands.parse_band(band)
        if name == "experiment":
            experiment_folder(value)
    except ValueError as error:
        return str(error)
    runs = {bands.resolve_mask(mask, given["mask_scheme"]) for mask in values} if name == "masks" else {*values}
    if (name in ("masks", "methods") or name.endswith("seeds")) and not len(values) == len(runs) > 0:
        return "give at least one, and none twice"
    if name in ("folds", "tasks", "beyond", "variants", "fine_tuned") and len(values) > len(runs):
        return "give none twice"
    if name in ("fold", "folds") and not {*map(repr, values)} <= {*map(repr, range(5))}:
        return "folds are 0, 1, 2, 3 and 4"
    if name == "report" and value != "folds" and not (_ROOT / value).resolve().is_relative_to(_ROOT):
        return "give a folder in the repository, such as docs/findings"
    if name in ("fewest_lost", "most_lost") and not given["fewest_lost"] <= given["most_lost"] <= 12:
        return f"fewest_lost {given['fewest_lost']} to most_lost {given['most_lost']} of 13 bands: at most 12"
    if name == "scene_offset" and value and not _is_number(value):
        return "leave it empty, or give a finite number, such as '-1000'"
    least = any(word in _FROM_ONE for word in name.split("_")) and name != "any_lr"
    for number in (v for v in values if isinstance(v, int | float) and not isinstance(v, bool)):
        if not math.isfinite(number) or number < 0 or (number == 0 and least):
            return "must be finite and greater than 0" if least else "must be finite and not negative"
        if number >= 2**63:
            return "must be below 2⁶³"
        if number > 1 and name in ("mask_ratio", "false_alarm_rate"):
            return "must be between 0 and 1"
    return ""


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _same_kind(value: Any, default: Any) -> bool:
    if isinstance(value, bool) or isinstance(default, bool):
        return isinstance(value, bool) and isinstance(default, bool)
    if isinstance(default, float):
        return isinstance(value, int | float)
    if isinstance(default, list):
        return isinstance(value, list) and (not default or all(_same_kind(v, default[0]) for v in value))
    return isinstance(value, type(default))
