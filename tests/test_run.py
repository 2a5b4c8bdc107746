"""What an experiment needs, and how it stands, from its parameters and records alone; nothing is executed here."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from bandmask import bands, files, params, provenance, run


@pytest.fixture(autouse=True)
def outputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("BANDMASK_OUTPUTS", str(tmp_path))
    monkeypatch.setenv("BANDMASK_DATA", str(tmp_path / "data"))
    return tmp_path


def given(name: str = "sample", **changes: Any) -> dict[str, Any]:
    masks = {"masks": ["none", "B8", "B2 B3 B4"]} if name == "sample" else {}
    return {**params.load_experiment(name), **masks, **changes}


def finish(node: run.Node, **changes: Any) -> None:
    """What a node leaves when it ends well."""
    node.folder.mkdir(parents=True, exist_ok=True)
    for path in node.outputs:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(node.title)
    record = {"state": "done", "error": None, **node.made_from(), "outputs": node.left(), "seconds": 90.0, **changes}
    node.record.write_text(json.dumps(record))


def finished(**changes: Any) -> dict[str, run.Node]:
    of = run.nodes(given(**changes))
    for node in of.values():
        finish(node)
    return of


PACK, SCENES, PIXELS = "packs/sample/01_data_exploration", "04_scene_classification", "05_image_segmentation"
SERVICE = ["none/04_scene_classification", "none/05_image_segmentation"]


def test_an_experiment_needs_packs_encoder_heads_in_service_runs_and_report():
    masked = [f"{mask}/{notebook}" for mask in ("B8", "B2_B3_B4") for notebook in ("03_fine_tuning", SCENES, PIXELS)]
    of = run.nodes(given())
    assert list(of) == [PACK, "00_sample_encoder", *SERVICE, "none/03_fine_tuning", *masked, "06_results"]
    assert set(of["06_results"].after) == {*SERVICE, "none/03_fine_tuning", *masked}
    wanted = {node.notebook: node.gpu for node in run.nodes(given(processes=2)).values()}
    assert wanted == {
        **dict.fromkeys(("01_data_exploration", "06_results"), 0),
        **dict.fromkeys(("00_sample_encoder", SCENES, PIXELS), 1),
        "03_fine_tuning": 2,
    }
    alone = given(tasks=[], masks=["B8"], mask_scheme="position", encoder="moco-resnet50")
    assert list(run.nodes(alone)) == [PACK, "B8-position/03_fine_tuning", "06_results"]
    own = run.nodes(given(masks=["B8A swir16"], mask_scheme="esa", tasks=["classification"]))
    assert own["B8A_swir16-esa/03_fine_tuning"].given["mask"] == "B8A swir16"
    assert SERVICE[0] in own, "what is in service is a node, whatever the masks"
    assert own[SERVICE[0]].given["mask"] == "none"


ANY, MAP, FAULTS = (f"{folder}/{notebook}" for notebook, folder, _ in params.BEYOND.values())
WAITS = {  # of parameters: a node, and whom it waits for; all of these once read what nobody had told the graph of
    "its encoders and heads": ({}, "B8/04_scene_classification", {SERVICE[0], "B8/03_fine_tuning"}),
    "other heads": ({}, "B8/05_image_segmentation", {SERVICE[1], "B8/03_fine_tuning"}),
    "heads alone": ({"masks": [], "beyond": ["any_band"], "tasks": []}, ANY, {SERVICE[0]}),
    "any-band": ({"methods": ["any-band"]}, "B8/04_scene_classification", {SERVICE[0], "B8/03_fine_tuning", ANY}),
    "map": ({"beyond": ["any_band", "robustness"]}, MAP, {SERVICE[0], ANY}),
    "map of one": ({"beyond": ["robustness"], "fine_tuned": ["B8"]}, MAP, {SERVICE[0], "B8/03_fine_tuning"}),
    "map of none": ({"beyond": ["any_band", "robustness"], "fine_tuned": []}, MAP, {SERVICE[0]}),
    "detector": (
        {"beyond": ["faulty_bands"], "healthy_images": "eurosat-mini"},
        FAULTS,
        {SERVICE[0], "packs/eurosat-mini/01_data_exploration"},
    ),
}


@pytest.mark.parametrize("name", WAITS)
def test_a_node_waits_for_all_that_it_reads(name: str):
    changes, title, makers = WAITS[name]
    assert {*run.nodes(given(**changes))[title].after} == {PACK, "00_sample_encoder"} | makers


def test_figures_that_a_page_shows_make_it_again_where_they_change():
    of = run.nodes(given(beyond=["any_band", "robustness"]))
    assert {"recommend.csv", "subsets.parquet"} <= {path.name for path in of[ANY].inputs}
    assert files.project_root() / "docs/findings/robustness.parquet" in of[MAP].inputs
    folds, task = run.nodes(given("foundation", folds=[0, 1])), "classification"
    assert {*folds[f"{task}-tables/11_findings"].inputs} >= {*folds[f"{task}-fold1/11_findings"].outputs}


def test_what_was_not_made_here_is_read_as_it_is(tmp_path: Path):
    for name in ("pack.json", *params.ENCODER_FILES):
        (tmp_path / name).touch()
    mine = {"dataset": str(tmp_path), "encoder": str(tmp_path), "tasks": ["classification"], "masks": ["B8"]}
    of = run.nodes(given(**mine))
    assert {*of["B8/03_fine_tuning"].inputs} == {tmp_path / name for name in ("pack.json", *params.ENCODER_FILES)}
    assert list(of) == [SERVICE[0], "B8/03_fine_tuning", "B8/04_scene_classification", "06_results"]
    more = {"teacher": str(tmp_path), "weights": "w.pt", "decoder_weights": "d.pt", "masks": ["B8"]}
    of = run.nodes(given(**more))
    assert tmp_path / "model.safetensors" in of["00_sample_encoder"].inputs
    assert Path("d.pt") in of["B8/05_image_segmentation"].inputs
    assert Path("w.pt") in run.nodes(given(**more, encoder="galileo-nano"))["B8/03_fine_tuning"].inputs
    folds = given("foundation", weights=str(tmp_path), folds=[0])
    read = run.nodes(folds)["classification-fold0/11_findings"].inputs
    assert {path for path in read if path.parent == tmp_path} == set(tmp_path.iterdir()), "a folder: each of its files"


def test_what_comes_with_the_package_counts_too():
    of = run.nodes(params.load_experiment("mini"))
    assert list(of) == ["packs/eurosat-mini/01_data_exploration", ANY, MAP]
    there = {path.relative_to(files.MINI).as_posix() for path in of[ANY].inputs if files.MINI in path.parents}
    assert there == {
        *(f"encoder/{name}" for name in params.ANY_BAND_FILES),
        *(f"heads/{name}" for name in params.HEAD_FILES),
    }
    assert all(path.is_file() for path in of[ANY].inputs if files.MINI in path.parents)


def test_what_a_yaml_leaves_out_is_the_same_to_every_notebook():
    """Notebooks 08 to 10 take other data and another encoder for granted than 03 and 04."""
    of = run.nodes(
        {"experiment": "a", "masks": ["B8"], "tasks": ["classification"], "beyond": ["any_band", "robustness"]}
    )
    made = {name: [node.made_from()["parameters"].get(name) for node in of.values()] for name in ("dataset", "encoder")}
    assert {name: {*values} - {None} for name, values in made.items()} == {"dataset": {"sample"}, "encoder": {"small"}}


def test_folds_are_a_run_each_and_their_tables_wait_for_all_of_them():
    of = run.nodes(given("findings", folds=[0, 3]))
    runs = [
        f"{task}-{k}/11_findings" for task in ("classification", "segmentation") for k in ("fold0", "fold3", "tables")
    ]
    assert list(of)[2:] == runs
    assert of["segmentation-tables/11_findings"].after == runs[3:5]
    assert of["segmentation-fold3/11_findings"].after == [PACK]
    assert of["classification-fold3/11_findings"].given["fold"] == 3


def test_the_thesis_is_63_runs_of_14_experiments_and_no_two_write_to_one_folder():
    chosen = ["", *(path.stem for path in (files.project_root() / "params" / "thesis").glob("*.yaml"))]
    full = {"", "position", "moco", "moco-position"}
    folders = []
    for name in chosen:
        parameters = params.load_experiment("thesis", name)
        folders += [node.folder for node in run.nodes(parameters).values() if node.notebook == "03_fine_tuning"]
        assert parameters["seeds"] == [0, 1, 2]
        assert (len(parameters["masks"]) == 12) == (name in full) == bool(parameters["tasks"])
    assert len(chosen) == 14
    assert len(folders) == len(set(folders)) == 63


def test_the_plan_of_the_thesis_takes_no_torch_and_writes_nothing(outputs: Path):
    code = "import sys; from bandmask import run; run.main(sys.argv[1:]); print('torch' in sys.modules)"
    command = [sys.executable, "-c", code, "plan", "thesis", "--variant=all"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert said.count("03_fine_tuning ") == 63
    assert "thesis, variant moco-position" in said
    assert said.endswith("False\n"), "torch is not imported for it"
    assert not list(outputs.rglob("*"))


def test_states_are_told_from_records_and_files_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    of = run.nodes(given(tasks=["classification"], masks=["none", "B8"]))
    assert {state.name for state in run.look(of).values()} == {"to do"}
    assert len(run.show(of, plan=True).splitlines()) == len(of) + 1  # the sample comes with the package
    monkeypatch.setenv("BANDMASK_DATA", str(tmp_path))
    absent = run.nodes(given(tasks=["classification"], masks=["B8"], dataset="eurosat-spatial"))
    assert "eurosat-spatial is not there yet: set BANDMASK_DATA" in run.show(absent, plan=True)
    for node in of.values():
        finish(node)
    assert run.settle(of) == []
    assert {state.name for state in run.look(of).values()} == {"done"}
    assert all(node.marker.exists() for node in of.values())

    last = of["B8/04_scene_classification"]
    finish(last, state="failed", error="ValueError: no")
    assert run.look(of)[last.title] == run.State("failed", "ValueError: no", 90.0)
    said = run.show(of, plan=True)
    assert re.search(r"04_scene_classification +failed +1.5 min +ValueError: no\n.*\n2 of 7 to run, about 3 min", said)
    finish(last, state="running")
    assert run.look(of)[last.title].name == "lost"
    finish(last)
    of["B8/03_fine_tuning"].outputs[0].write_text("edited")
    (of["06_results"].folder / "tables").mkdir()
    (of["06_results"].folder / "tables" / "paper.tex").touch()
    states = run.look(of)
    assert states["B8/03_fine_tuning"].why == "alignment.parquet is not what was written"
    assert states[last.title].why == "B8/03_fine_tuning is made again first"
    assert run.settle(of) == ["B8/03_fine_tuning", last.title, "06_results"]
    assert not last.marker.exists()
    assert "outdated" in files.distrust(last.outputs[0])
    assert not of["06_results"].outputs[1].exists()
    assert (last.folder.parent / "outdated_06_results.html").exists()
    assert (last.folder.parent / "outdated_tables" / "paper.tex").exists()


RERUN = {  # by a parameter
    "head_epochs": {SERVICE[0], f"B8/{SCENES}", "06_results"},
    "epochs_one_band": {"none/03_fine_tuning", "B8/03_fine_tuning", f"B8/{SCENES}", "06_results"},
    "processes": set(),
}


@pytest.mark.parametrize("name", RERUN)
def test_a_changed_parameter_re_runs_what_takes_it(name: str):
    chosen = {"tasks": ["classification"], "masks": ["none", "B8"]}
    finished(**chosen)
    states = run.look(run.nodes(given(**chosen, **{name: 9})))
    assert {title for title, state in states.items() if state.name != "done"} == RERUN[name]
    assert any(state.why.startswith(f"{name} = 9, was ") for state in states.values()) == bool(RERUN[name])


@pytest.mark.parametrize("how", ["edited", "flipped", "emptied", "deleted"])
def test_a_spoilt_file_is_noticed_by_its_checksum(how: str):
    """Of the same time and size where a bit flipped: a disk does not say so."""
    of = finished(masks=["B8"])
    for maker, path in ((node, path) for node in of.values() for path in node.outputs):
        before, when = path.read_bytes(), path.stat()
        spoilt = {"edited": before + b" ", "flipped": bytes([before[0] ^ 1]) + before[1:], "emptied": b""}
        path.write_bytes(spoilt.get(how, before))
        os.utime(path, ns=(when.st_atime_ns, when.st_mtime_ns))
        if how == "deleted":
            path.unlink()
        files._sha256.cache_clear()  # as another process finds it
        states = run.look(of)
        assert states[maker.title].why.endswith("is gone" if how == "deleted" else "is not what was written")
        assert states["06_results"].name == "to do"
        path.write_bytes(before)
    assert {state.name for state in run.look(of).values()} == {"done"}


def test_a_report_made_without_an_outdated_run_is_made_again_once_that_run_counts_again():
    of = finished(tasks=[], masks=["B8"])
    first, last = of["B8/03_fine_tuning"], of["06_results"]
    first.record.write_text(json.dumps({**files.read_record(first.record), "state": "outdated"}))
    finish(last)
    assert list(files.read_record(last.record)["inputs"].values()) == [None]
    assert [title for title, state in run.look(of).items() if state.name != "done"] == ["06_results"]
    assert run.settle(of) == ["06_results"]
    assert files.read_record(first.record)["state"] == "done"


def test_runs_of_a_mask_that_was_taken_out_no_longer_count_and_do_once_it_is_back():
    of = finished(tasks=["classification"], masks=["none", "B8"])
    rows = of["B8/04_scene_classification"].outputs[0]
    assert run.settle(run.nodes(given(tasks=["classification"], masks=["none"]))) == ["06_results"]
    assert "the experiment no longer asks for it" in files.distrust(rows)
    assert run.settle(of) == ["06_results"], "it stepped aside"
    assert files.distrust(rows) == ""


def test_a_report_reads_of_other_experiments_what_is_current(outputs: Path):
    """What is outdated there must not fail it: those who made it come after it, and then it is made again."""
    of = finished(experiment="other", tasks=[], masks=["B8"])
    rows = outputs / "other" / "B8" / "alignment.parquet"

    def read() -> bool:
        return rows in run.nodes(given(variants=["other"]))["06_results"].inputs

    assert read()
    finish(of["B8/03_fine_tuning"], state="outdated")
    assert not read()


@pytest.mark.parametrize(
    ("name", "failed", "made"), [("sample", [], 1), ("sample", ["06_results"], 0), ("mini", [], 0)]
)
def test_of_what_has_finished_a_report_is_made_and_nothing_else(name, failed, made, monkeypatch: pytest.MonkeyPatch):
    """The last notebook of `mini` is a map: made from an outdated encoder, it would stand as current."""
    of = run.nodes(params.load_experiment(name))
    for title, node in of.items():
        finish(node, state="failed" if title in failed or "03" in title or "08" in title else "done")
    executed: list[str] = []
    monkeypatch.setattr(run, "supervise", lambda *_, **__: 1)
    monkeypatch.setattr(run, "execute", lambda node, **_: executed.append(node.title))
    assert run.graph(name) == 1
    assert executed == ["06_results"] * made


DAMAGES = (b"", b'{"state": "do', bytes(range(256)), b"[1, 2]", b"[" * 100_000, b'{"state": 3}')


@pytest.mark.parametrize("content", DAMAGES)
def test_a_damaged_record_is_none(content: bytes):
    of = finished(masks=["B8"], tasks=[])
    of["B8/03_fine_tuning"].record.write_bytes(content)
    assert run.look(of)["B8/03_fine_tuning"] == run.State("to do", "no record of a run")


def test_an_input_that_its_record_does_not_vouch_for_counts_as_absent_and_is_not_read():
    of = finished(masks=["B8"], tasks=[])
    before = of["B8/03_fine_tuning"].made_from()["inputs"]
    of["00_sample_encoder"].outputs[0].write_text("another")
    after = of["B8/03_fine_tuning"].made_from()["inputs"]
    assert [name for name in before if before[name] != after[name]] == ["../encoder/model.safetensors"]
    assert after["../encoder/model.safetensors"] is None
    with pytest.raises(run.Failed, match=r"model\.safetensors: not there, or not what its own record vouches for"):
        run.execute(of["B8/03_fine_tuning"])


def test_500_nodes_take_little_time_and_no_torch(outputs: Path):
    labels = [f"B{n}" for n in range(1, 14)]
    masks = [f"{a} {b} {c}" for i, a in enumerate(labels) for j, b in enumerate(labels[:i]) for c in labels[:j]][:166]
    of = finished(masks=masks)
    began = time.process_time()
    assert {state.name for state in run.look(of).values()} == {"done"}
    assert time.process_time() - began < 5
    assert len(of) > 500


def test_a_gpu_is_held_by_one_run_and_given_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Devices are names here: what is tested is who gets which."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0, 1")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    hold = "from bandmask import run; import time\nwith run.claim(1) as held: print(*held, flush=True); time.sleep(60)"
    other = subprocess.Popen([sys.executable, "-c", hold], stdout=subprocess.PIPE, text=True, env=dict(os.environ))
    try:
        assert other.stdout is not None
        assert other.stdout.readline() == "0\n"
        with run.claim(1) as mine:
            assert mine == ["1"]
        with run.claim(0) as none:
            assert none == []
        with pytest.raises(ValueError, match=r"wants 3 GPU\(s\), and 2 are visible: 0, 1"), run.claim(3):
            pass
        other.kill()
        other.wait()
        with run.claim(2) as both:
            assert sorted(both) == ["0", "1"]
    finally:
        other.kill()
        other.communicate()


def test_gpus_are_those_that_the_environment_or_a_driver_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for chosen, found in {"": [], "-1": [], "0,2": ["0", "2"], "GPU-abc": ["GPU-abc"]}.items():
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", chosen)
        assert run.visible() == found
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setenv("PATH", str(tmp_path))
    for script, found in {"exit 9": [], "echo GPU-1; echo GPU-2": ["GPU-1", "GPU-2"]}.items():
        (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "nvidia-smi").chmod(0o755)
        assert run.visible() == found


def test_experiments_that_can_not_be_run_say_so_in_a_line(tmp_path: Path):
    (tmp_path / "mine.yaml").write_text("experiment: mine\nmasks: [B8]\nhead_epoch: 3\n")
    for name, said in (
        (str(tmp_path / "mine.yaml"), "unknown parameter 'head_epoch'; did you mean 'head_epochs'"),
        ("thesiss", "thesis.yaml"),
    ):
        asked = subprocess.run(
            [sys.executable, "-m", "bandmask.run", "plan", name], capture_output=True, text=True, check=False
        )
        assert asked.returncode == 1
        assert said in asked.stderr
        assert "Traceback" not in asked.stderr


def test_notebooks_leave_what_the_graph_waits_for():
    beyond = [(notebook, f'\\"{folder}\\"', *leaves) for notebook, folder, leaves in params.BEYOND.values()]
    for notebook, *names in [*params.TASK_FILES.values(), *beyond]:
        text = params.notebook_path(notebook).read_text(encoding="utf-8")
        assert all(name in text for name in names)
    assert set(provenance.code_of_notebook("03_fine_tuning")) >= {"notebook", "bands", "files"}
    assert bands.mask_slug("none") in {node.folder.name for node in run.nodes(given()).values()}
