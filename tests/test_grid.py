"""The plan names every run of the thesis, what it lacks and what it takes, and leaves the disk as it was."""

from __future__ import annotations

import os
import re
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from models import TINY

from bandmask import bands, files
from bandmask.runs import grid
from bandmask.runs.costs import Throughput
from bandmask.runs.inputs import Images

SPEED = Throughput(embedding=1000, fine_tuning=250, mapping=1000, decoder_training=100, decoding=300, how="by hand")
BOTH = ("classification", "segmentation")


@pytest.fixture(scope="module")
def thesis() -> dict[str, dict[str, Any]]:
    return grid.experiments("thesis")


@pytest.fixture(autouse=True)
def bare_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No data and no outputs but those a test makes."""
    monkeypatch.setenv("BANDMASK_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("BANDMASK_OUTPUTS", str(tmp_path / "outputs"))
    return tmp_path / "outputs"


def finish(run: grid.Run, *names: str) -> None:
    for path in run.outputs:
        if not names or path.name in names:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()


def test_the_thesis_is_63_runs_of_14_experiments(thesis):
    """12 mask sets in two schemes and with two encoders; 2 + 2 schedules, 2 + 1 + 1 ratios, 3 + 1 epochs, 3 values."""
    counts = {key: len(grid.runs(parameters)) for key, parameters in thesis.items()}
    full = {"base", "position", "moco", "moco-position"}
    assert next(iter(counts)) == "base"
    assert {key: count for key, count in counts.items() if count == 12} == dict.fromkeys(full, 12)
    assert sum(counts.values()) == 4 * 12 + 4 + 4 + 4 + 3
    assert len(counts) == 14
    for key, parameters in thesis.items():
        assert parameters["seeds"] == [0, 1, 2]
        assert tuple(parameters["tasks"]) == (BOTH if key in full else ())


def test_no_two_runs_write_to_one_folder(thesis):
    folders = [run.outputs[0].parent for parameters in thesis.values() for run in grid.runs(parameters)]
    assert len(set(folders)) == len(folders) == 63


def test_masked_runs_wait_for_what_is_in_service(thesis):
    after = {run.mask: run.after for run in grid.runs(thesis["base"])}
    assert after.pop("none") == ()
    assert set(after.values()) == {("none",)}
    assert {run.after for run in grid.runs(thesis["ratio-1.0"])} == {()}, "alignment alone waits for nothing"


def test_without_none_the_first_run_trains_what_is_in_service(thesis):
    runs = grid.runs({**thesis["base"], "masks": ["B8", "B2"]})
    assert [run.after for run in runs] == [(), ("B8",)]
    first, second = (run.cost(Images(64, 64, 64), Images(64, 64, 64)) for run in runs)
    assert (first.heads - second.heads, first.decoders - second.decoders) == (3, 3)


def test_unknown_task_lists_those_there_are(thesis):
    with pytest.raises(ValueError, match=r"unknown task \['detection'\]; available: classification, segmentation"):
        grid.runs({**thesis["base"], "tasks": ["detection"]})


def test_a_run_is_done_when_all_it_makes_is_there(thesis, bare_machine: Path):
    run = next(run for run in grid.runs(thesis["position"]) if run.mask == "B8 B11")
    assert {str(path.relative_to(bare_machine)) for path in run.outputs} == {
        "thesis-position/B8_B11-position/alignment.parquet",
        "thesis-position/B8_B11-position/results.parquet",
        "thesis-position/B8_B11-position/segmentation.parquet",
    }
    finish(run, "alignment.parquet", "results.parquet")
    assert not run.done
    finish(run)
    assert run.done
    assert [path.name for path in grid.runs(thesis["gradual"])[0].outputs] == ["alignment.parquet"]


def test_the_table_marks_done_runs_and_counts_their_hours_out(thesis):
    chosen = {"base": thesis["base"], "gradual": thesis["gradual"]}
    before = grid.totals(grid.run_table(chosen, SPEED)).set_index("experiment")
    finish(grid.runs(thesis["gradual"])[0])
    table = grid.run_table(chosen, SPEED)
    assert table.loc[table["state"] == "done", ["experiment", "mask"]].to_numpy().tolist() == [["thesis-gradual", "B2"]]
    after = grid.totals(table).set_index("experiment")
    assert before.loc["thesis-gradual", "hours left"] == before.loc["thesis-gradual", "hours"]
    assert after.loc["thesis-gradual", "hours left"] == pytest.approx(after.loc["thesis-gradual", "hours"] / 2)
    assert after.loc["all", "hours left"] == pytest.approx(before.loc["all", "hours left"] - table["hours"].iloc[-1])
    assert after.loc["all", ["runs", "done"]].tolist() == [14, 1]


def test_the_thesis_trains_168_heads_and_as_many_decoders_an_experiment(thesis):
    """11 masks with pre-trained, ridge and three fine-tuned encoders, and one in service; three seeds each."""
    table = grid.totals(grid.run_table(thesis, SPEED)).set_index("experiment")
    assert table.loc["thesis", ["heads", "decoders"]].tolist() == [(11 * 5 + 1) * 3] * 2
    assert table.loc["all", ["heads", "decoders"]].tolist() == [4 * 168] * 2


def test_fine_tuning_of_the_thesis_counted_by_hand(thesis):
    """EuroSAT's 16,200 training images fill 253 batches of 64; four masks hide at most one band, eight several."""
    table = grid.run_table({"base": thesis["base"], "gradual": thesis["gradual"]}, SPEED)
    steps = 253 * 64
    sums = table.groupby("experiment")["fine-tuning"].sum()
    assert sums["thesis"] == 3 * steps * (4 * 15 + 8 * 25)
    assert sums["thesis-gradual"] == 3 * steps * 2 * 15
    row = table[table["experiment"] == "thesis-gradual"].iloc[0]
    watched = 3 * 2 * (5_400 // 64 * 64) * (16 + 1)  # validation images 16 times, as many test images once
    assert row["forward"] == watched
    assert row["hours"] == pytest.approx((watched / 1000 + 3 * steps * 15 / 250) / 3600)


def test_what_is_missing_is_named_with_the_way_out(thesis):
    chosen = {"base": {**thesis["base"], "weights": "/nowhere/satclip.ckpt"}, "gradual": thesis["gradual"]}
    text = grid.describe(chosen, SPEED)
    assert "lacks eurosat, sen12ms, satclip |" in text
    for way_out in ("download_eurosat", "download_sen12ms", "/nowhere/satclip.ckpt", "`decoder_weights`"):
        assert way_out in text
    found = grid.input_table(chosen).set_index("input")
    assert found.loc["eurosat", "images"] == "16,200 + 5,400 + 5,400, official count"
    assert found.loc["sen12ms", ["state", "experiments"]].tolist() == ["missing", 1]
    assert found.loc["dfc2020 decoder", "state"] == "not given"


def test_an_unknown_variant_lists_those_there_are(capsys):
    with pytest.raises(SystemExit) as stopped:
        grid.main(["thesis", "--variants", "positon"])
    assert stopped.value.code == 2
    assert re.search(r"thesis has no variant positon; available: base, .*position", capsys.readouterr().err)


def test_an_unknown_experiment_lists_those_there_are(capsys):
    with pytest.raises(SystemExit):
        grid.main(["thesiss", "--commands"])
    assert "thesis.yaml" in capsys.readouterr().err


def test_commands_are_those_of_the_parameter_files(capsys):
    grid.main(["thesis", "--commands"])
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "make run EXPERIMENT=thesis"
    assert len(printed) == 15
    assert printed[-1] == "make report EXPERIMENT=thesis"
    for command in printed[1:-1]:
        variant = re.fullmatch(r"make run EXPERIMENT=thesis VARIANT=([\w.-]+)", command)[1]
        text = (files.project_root() / "params" / "thesis" / f"{variant}.yaml").read_text()
        assert f"# Run: {command}\n" in text


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A project with one experiment on the sample and one variant; parameters that are not given are notebooks' own."""
    (tmp_path / "params" / "experiments").mkdir(parents=True)
    (tmp_path / "params" / "tiny").mkdir()
    (tmp_path / "params" / "experiments" / "tiny.yaml").write_text(
        f"experiment: tiny\narchitecture: {TINY}\nimage_size: 32\nsegmentation_image_size: 32\ndecoder_width: 8\n"
        'masks: ["none", "B8"]\ntasks: ["classification", "segmentation"]\n'
    )
    (tmp_path / "params" / "tiny" / "short.yaml").write_text('experiment: tiny-short\nmasks: ["B2"]\ntasks: []\n')
    monkeypatch.setattr(files, "project_root", lambda: tmp_path)


def test_the_plan_is_made_end_to_end_and_nothing_is_written(tiny, tmp_path: Path, capsys):
    before = sorted(tmp_path.rglob("*"))
    grid.main(["tiny", "--device", "cpu"])
    assert sorted(tmp_path.rglob("*")) == before
    text = capsys.readouterr().out
    assert text.startswith("3 runs of 2 experiments, 0 done. Nothing was run.")
    for line in (
        r"\| tiny +\| none +\| +0 +\| classification, segmentation +\| +\| ready",
        r"\| tiny +\| B8 +\| +0 +\| classification, segmentation +\| none +\| ready",
        r"\| tiny-short +\| B2 +\| +0 +\| alignment only +\| +\| ready",
        r"\| all +\| +3 +\| +0 ",
        r"Images per second: embedding [\d,.]+, fine tuning [\d,.]+, mapping [\d,.]+, decoder training",
        rf"{TINY} at 32 px, batches of 2, float32, on CPU \(threads: 1\)",
        "leave out reading",
    ):
        assert re.search(line, text), line


def test_chosen_variants_stand_alone(tiny, capsys):
    grid.main(["tiny", "--variants", "short", "--commands"])
    assert capsys.readouterr().out == "make run EXPERIMENT=tiny VARIANT=short\n"


@pytest.mark.slow
def test_done_means_what_the_graph_makes(bare_machine: Path):
    """Snakemake's own list of files for one experiment holds what the plan waits for, and no run more."""
    parameters = grid.experiments("thesis", ["ratio-1.0"])["ratio-1.0"]
    command = [
        *(sys.executable, "-m", "snakemake", "--snakefile", str(files.project_root() / "Snakefile"), "--summary")
    ]
    options = [
        "--cores",
        "1",
        "--directory",
        str(bare_machine.parent),
        "--config",
        "experiment=thesis",
        "variant=ratio-1.0",
    ]
    listed = subprocess.run([*command, *options], capture_output=True, text=True, check=True, env=dict(os.environ))
    made = {line.split("\t")[0] for line in listed.stdout.splitlines()}
    runs = grid.runs(parameters)
    assert {str(path) for run in runs for path in run.outputs} <= made
    assert {Path(path).parent.name for path in made if path.endswith("alignment.parquet")} == {
        bands.mask_slug(run.mask) for run in runs
    }


@pytest.fixture
def stub_venv(tmp_path: Path) -> Path:
    """What `make` takes for its installed environment: real Python, and a snakemake that only notes its call."""
    bin_folder = tmp_path / "venv" / "bin"
    bin_folder.mkdir(parents=True)
    scripts = {
        "python": f'exec {sys.executable} "$@"',
        "snakemake": f'echo "$@" >> {tmp_path}/calls; case "$*" in *variant=gradual*) exit 1;; esac',
    }
    for name, script in scripts.items():
        path = bin_folder / name
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    (tmp_path / "venv" / ".installed").touch()
    return tmp_path


@pytest.mark.slow
def test_make_thesis_goes_on_after_a_failure_and_names_it(stub_venv: Path):
    made = subprocess.run(
        ["make", "thesis", f"VENV={stub_venv / 'venv'}"],
        cwd=files.project_root(),
        capture_output=True,
        text=True,
        check=False,
        env={name: value for name, value in os.environ.items() if not name.startswith("MAKE")},
    )
    assert made.returncode != 0
    configs = [line.split("--config ")[1].split() for line in (stub_venv / "calls").read_text().splitlines()]
    expected = [["experiment=thesis", *([f"variant={key}"] if key != "base" else [])] for key in grid.experiments()]
    last = ["experiment=thesis", "report_only=yes", "--forcerun", "results"]
    assert configs == [*expected, last], "each experiment once, in order, those after the failure too; then the report"
    failed = made.stdout.split("Failed;")[1].splitlines()
    assert [line.strip() for line in failed[1:] if line.strip()] == ["make run EXPERIMENT=thesis VARIANT=gradual"]


@pytest.mark.slow
def test_make_thesis_succeeds_when_all_do(stub_venv: Path):
    (stub_venv / "venv" / "bin" / "snakemake").write_text("#!/bin/sh\nexit 0\n")
    made = subprocess.run(
        ["make", "thesis", f"VENV={stub_venv / 'venv'}"], cwd=files.project_root(), capture_output=True, check=False
    )
    assert made.returncode == 0


def test_totals_of_a_table_by_hand():
    row = {"forward": 10, "fine-tuning": 4, "heads": 3, "decoders": 0, "hours": 1.5}
    table = pd.DataFrame(
        [
            {"experiment": "a", "state": "done", **row},
            {"experiment": "a", "state": "ready", **row},
            {"experiment": "b", "state": "lacks eurosat", **row},
        ]
    )
    found = grid.totals(table).set_index("experiment")
    assert found.loc["a"].tolist() == [2, 1, 20, 8, 6, 0, 3.0, 1.5]
    assert found.loc["all"].tolist() == [3, 1, 30, 12, 9, 0, 4.5, 3.0]
