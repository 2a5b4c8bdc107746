"""Parameters: a misspelt or mistyped one stops a run, and every file in params/ is valid."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from IPython.core.interactiveshell import InteractiveShell

from bandmask import bands, files, params

ROOT = files.project_root()
BASE = ROOT / "params" / "experiments" / "thesis.yaml"
VARIANTS = sorted((ROOT / "params" / "thesis").glob("*.yaml"))
NOTEBOOKS = sorted(path.stem for path in (ROOT / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", sorted((ROOT / "params").rglob("*.yaml")), ids=lambda p: f"{p.parent.name}/{p.name}")
def test_every_parameter_file_is_valid(path, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for own in {*re.findall(r"outputs/packs/[\w-]+", path.read_text())}:  # packs that docs/findings/clouds.md makes
        Path(own).mkdir(parents=True)
        Path(own, "pack.json").touch()
    assert params.load(path)


def test_every_thesis_mask_has_its_file():
    folder = ROOT / "params" / "masks"
    assert {path.stem for path in folder.glob("*.yaml")} == {bands.mask_slug(mask) for mask in bands.THESIS_MASKS}
    for mask in bands.THESIS_MASKS:
        assert params.load(folder / f"{bands.mask_slug(mask)}.yaml") == {"mask": mask, "mask_scheme": "named"}


@pytest.mark.parametrize("path", VARIANTS, ids=lambda p: p.stem)
def test_a_variant_holds_what_differs(path):
    base, own = params.load(BASE), params.load(path)
    same = {name for name, value in own.items() if base.get(name) == value}
    assert same <= {"weights"}, "weights: a file given in the base is SatCLIP's"
    assert own["experiment"] == f"thesis-{path.stem}"


def test_one_name_means_one_thing_in_all_notebooks():
    """A YAML serves several notebooks, so a parameter has one default."""
    defaults = {}
    for notebook in NOTEBOOKS:
        for name, default in params.declared(notebook).items():
            if (name, notebook[:2]) not in (("dataset", "01"), ("dataset", "02")):  # they show real labels
                defaults.setdefault(name, {})[notebook] = default
    # 02 opens with the mask that shows most; 08 and 09 with real labels, and what comes with the package
    allowed = {"mask", "experiment", "dataset", "encoder"}
    differing = {name: where for name, where in defaults.items() if len(set(map(repr, where.values()))) > 1}
    assert set(differing) <= allowed, differing


def test_sample_experiment_repeats_the_notebooks_defaults():
    """Run All with defaults and `make demo` are the same job; its masks are the thesis', which mean the same here."""
    defaults, sample = params.vocabulary(), params.load(ROOT / "params/experiments/sample.yaml")
    assert {k for k, v in sample.items() if defaults[k] != v} == {"mask_scheme", "masks"}
    assert not any(bands.two_readings(mask) for mask in sample["masks"])


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("mask_rato", 0.5, "unknown parameter 'mask_rato'; did you mean 'mask_ratio'"),
        ("zzzz", 0.5, "unknown parameter 'zzzz'; known: .*mask_ratio"),
        *[("seeds", wrong, "is a .*; expected list") for wrong in (3, ["a"])],
        *[("batch_size", wrong, "is a .*; expected int, such as 64") for wrong in (1.5, True)],
        ("mask_ratio", "0.9", "is a str; expected float, .*; YAML takes 1e-4 for a word"),
        ("exact", 1, "is a int; expected bool"),
    ],
)
def test_a_misspelt_or_mistyped_parameter_is_an_error_that_says_what_is_valid(name, value, said):
    with pytest.raises(ValueError, match=f"my.yaml: .*{said}"):
        params.validate({name: value}, "my.yaml")


def test_check_sees_what_papermill_injected_and_what_was_edited_and_passes_other_notebooks_parameters():
    """An experiment's file is given to every notebook."""
    params.check("03_fine_tuning", {"In": ["# Parameters\nhead_epochs = 3\n"]})
    namespace = {**params.declared("03_fine_tuning"), "In": ["import x", "# Parameters\nmask_rato = 0.5\n"]}
    with pytest.raises(ValueError, match="mask_rato"):
        params.check("03_fine_tuning", namespace)
    with pytest.raises(ValueError, match="head_epochs = 'ten' is a str"):
        params.check("04_scene_classification", {"head_epochs": "ten"})
    with pytest.raises(FileNotFoundError, match="03_fine_tuning"):
        params.declared("99_nothing")


def test_files_that_can_not_be_used_are_refused_in_a_sentence(tmp_path):
    bomb = ["a: &a [x, x, x, x, x, x, x, x, x]"]
    bomb += [f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]" for old, new in zip("abcdefg", "bcdefgh", strict=True)]
    texts = {"bomb": "\n".join(bomb), "large": "a: 1\n" * 300_000, "deep": "a: " + "[" * 300_000}
    texts |= {"long": f"seeds: {'x' * 500_000}\n", "list": "- a\n- b\n", "open": "a: [1\n", "words": "just words"}
    texts["twice"] = "experiment: a\nmasks: [B8]\nmasks: [B11]\n"
    for name, text in texts.items():
        (tmp_path / f"{name}.yaml").write_text(text)
        with pytest.raises(ValueError, match=f"{name}.yaml") as refused:
            params.load(tmp_path / f"{name}.yaml")
        assert len(str(refused.value)) < 2000
    with pytest.raises(FileNotFoundError, match=r"no parameter file .*B99.yaml; beside it: .*B8.yaml"):
        params.load(ROOT / "params" / "masks" / "B99.yaml")


REFUSED = {
    "epochs_one_band pretrain_epochs head_epochs image_size processes": [0, -1],
    "mask_scheme mask_shape mask_schedule align device": ["thesis", "both and more", ""],
    "dataset segmentation_dataset": ["landsat", "../eurosat", "eurosatt", "", "tests", "."],
    "encoder": ["resnet", "satclip-resnet51-l40", "", "tests", ".."],
    "encoder_passes timeout_minutes": [-1],
    "seeds head_seeds": [[], [0, 0], [-1], [10**23]],
    "batch_size": [0],
    "lr": [0.0, -0.1, float("nan"), float("inf")],
    "mask_ratio": [1.5, -0.1, 0],
    "masks": [[], ["B8", "B8"], ["B99"], ["B2 B8", "B8 B2"], ["B2 B8", "B2_B8"], [""]],
    "mask": ["B99", "", " "],
    "mask_value": ["mean", "nan"],
    "methods": [[], ["ridgy"]],
    "tasks": [["detection"], ["classification", "classification"]],
    "beyond": [["robustnes"], ["any_band", "any_band"]],
    "experiment": ["", "..", ".", "a/b", "../up", "/tmp", "packs", ".hidden"],
    "teacher": ["galileo-nan", "small"],
    "healthy_images": ["eurosa", "tests"],
    "report": ["../elsewhere", "/tmp"],
    "fault_bands": [["B3", "B99"]],
    "folds": [[5], [0, 0], ["1"], [True]],
    "fold": [5],
    "most_lost": [2, 13],
    "scene_offset": ["-1000 DN", "nan"],
}
REFUSED = {name: values for names, values in REFUSED.items() for name in names.split()}


@pytest.mark.parametrize("name", REFUSED)
def test_a_value_that_can_not_be_meant_is_refused_by_name(name):
    for value in REFUSED[name]:
        with pytest.raises(ValueError, match=rf"my.yaml: {name} = |experiment names a folder") as refused:
            params.validate({name: value}, "my.yaml")
        assert len(str(refused.value)) < 1000


def test_what_can_be_meant_passes():
    zeros = dict.fromkeys(("encoder_passes", "decoder_passes", "test_images"), 0)
    params.validate({**zeros, "seeds": [5], "tasks": [], "mask_ratio": 1, "timeout_minutes": 30}, "my.yaml")
    params.validate({"teacher": "mini", "fault_bands": ["nir", "B8A"], "report": "docs/findings"}, "my.yaml")
    params.validate({"folds": [4, 0], "fewest_lost": 0, "most_lost": 0, "scene_offset": "-1000"}, "my.yaml")
    params.validate({"teacher": "", "healthy_images": "", "folds": [], "scene_offset": ""}, "my.yaml")
    params.validate({"mask": "B8A", "mask_scheme": "esa", "mask_value": "-1"}, "my.yaml")


def test_names_are_those_that_the_readers_know():
    """The list stands in `params`, so that a name is refused before torch is imported."""
    from bandmask import align, datasets, encoders, foundation, masks

    assert set(params._CHOICES["dataset"]) == set(datasets.PACKERS)
    published = {*encoders.PUBLISHED, *foundation.ADAPTERS, *foundation.CLOUD_LEVELS}
    assert set(params._CHOICES["encoder"]) == {*params.SMALL, encoders.MINI, *published}
    chosen = {name: params._CHOICES[f"mask_{name}"] for name in ("shape", "schedule", "value")}
    assert chosen == {"shape": masks.SHAPES, "schedule": masks.SCHEDULES, "value": masks.VALUES}
    assert all(align.Objective.of(way) for way in params._CHOICES["align"])


def test_a_folder_of_ones_own_is_a_data_set_or_an_encoder_by_what_it_holds(tmp_path):
    mine = dict.fromkeys(("dataset", "segmentation_dataset", "healthy_images", "encoder", "teacher"), str(tmp_path))
    for name in ("pack.json", "card.json"):
        with pytest.raises(ValueError, match=f"or a folder with {name}"):
            params.validate(mine, "my.yaml")
        (tmp_path / name).touch()
    params.validate(mine, "my.yaml")


def test_files_are_checked_as_they_go_together(tmp_path):
    few, most = tmp_path / "few.yaml", tmp_path / "most.yaml"
    few.write_text("fewest_lost: 1\n")
    most.write_text("most_lost: 2\n")
    assert params.load(few, most) == {"fewest_lost": 1, "most_lost": 2}
    with pytest.raises(ValueError, match=r"most\.yaml: most_lost = 2: fewest_lost 3 to most_lost 2"):
        params.load(most)


def test_what_is_trained_needs_training_images(tmp_path):
    (tmp_path / "mine.yml").write_text("experiment: a\nmasks: [B8]\ndataset: eurosat-mini\n")
    with pytest.raises(ValueError, match="eurosat-mini has test images alone; take another"):
        params.load_experiment(str(tmp_path / "mine.yml"))
    (tmp_path / "mine.yml").write_text("experiment: a\nfolds: [0]\nbeyond: [any_band]\n")
    with pytest.raises(ValueError, match="folds run notebook 11 alone; give beyond in another file"):
        params.load_experiment(str(tmp_path / "mine.yml"))


def test_in_a_notebook_a_refused_parameter_is_one_line_without_a_traceback(capsys):
    shell = InteractiveShell.instance()
    try:
        shell.run_cell('from bandmask import params; mask_rato = 1; params.validate({"mask_rato": 1}, "my.yaml")')
    finally:
        InteractiveShell.clear_instance()
    said = capsys.readouterr().out.strip()
    assert said == "ParameterError: my.yaml: unknown parameter 'mask_rato'; did you mean 'mask_ratio'?"


def test_nothing_heavy_is_imported_to_read_parameters():
    """Nor for the package, bands and folders, which this imports: tools that never train need them."""
    heavy = {"numpy", "torch", "timm", "torchgeo", "pandas", "matplotlib", "sklearn", "rasterio", "xarray"}
    code = f"import sys, bandmask.params; print({heavy} & sys.modules.keys(), 'bandmask.bands' in sys.modules)"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said == "set() True\n"
