"""Every state a node can be in is told from real files and real processes, damaged ones too; and reading is cheap."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from records import SAMPLE, progressed, record, running

from bandmask import datasets, params, results
from bandmask.runs import headlines, states
from bandmask.runs.states import Node, State

__all__ = ["running"]  # a fixture


@pytest.fixture(autouse=True)
def outputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("BANDMASK_OUTPUTS", str(tmp_path))
    return tmp_path


@pytest.fixture
def node() -> Node:
    return next(node for node in states.nodes(SAMPLE) if node.title == "B8/03_fine_tuning")


def aligned(path: Path, cosine: float = 0.934) -> None:
    rows = [{"split": "val", "epoch": epoch, "metric": "val_cosine", "value": 0.1 * epoch} for epoch in range(3)]
    rows += [{"split": "val", "epoch": 3, "metric": "val_cosine", "value": cosine + d} for d in (-0.01, 0.01)]
    rows += [{"split": "val", "epoch": 3, "metric": "val_loss", "value": 7.0}]
    rows += [{"split": "test", "epoch": 3, "metric": "test_loss", "value": 1.25}]
    path.parent.mkdir(parents=True, exist_ok=True)
    results.write_table(results.tidy(rows, task="alignment", mask_value="0"), path)


def scored(path: Path, metric: str, scores: dict[tuple[str, str], list[float]]) -> None:
    rows: list[dict[str, Any]] = []
    for (method, protocol), values in scores.items():
        about = {"method": method, "protocol": protocol}
        rows += [{**about, "split": "test", "metric": metric, "value": value} for value in values]
        rows += [{**about, "split": "test", "metric": "macro_accuracy", "value": 0.01}]
        rows += [{**about, "split": "val", "metric": metric, "epoch": 1, "value": 0.02}]
    path.parent.mkdir(parents=True, exist_ok=True)
    results.write_table(results.tidy(rows, mask_value="0"), path)


def test_an_experiment_needs_packs_encoder_runs_and_report(outputs: Path) -> None:
    titles = [node.title for node in states.nodes(SAMPLE)]
    tasks = ["03_fine_tuning", "04_scene_classification", "05_image_segmentation"]
    runs = [f"{run}/{task}" for run in ("none", "B8", "B2_B3_B4") for task in tasks]
    packs = ["packs/sample/01_data_exploration", "packs/sample-256/01_data_exploration"]
    assert titles == [*packs, "00_sample_encoder", *runs, "06_results"]
    of_b8 = states.nodes(SAMPLE)[6]
    assert of_b8.executed == outputs / "sample" / "B8" / "03_fine_tuning.ipynb"
    assert of_b8.record == outputs / "sample" / "B8" / "03_fine_tuning.json"
    assert of_b8.progress == outputs / "sample" / "B8" / ".03_fine_tuning.progress.json"
    assert of_b8.output == outputs / "sample" / "B8" / "alignment.parquet"


def test_what_an_experiment_does_not_do_is_not_needed() -> None:
    alone = {**SAMPLE, "tasks": [], "encoder": "satclip-resnet50-l40", "mask_scheme": "position", "masks": ["B8", "B8"]}
    titles = [node.title for node in states.nodes(alone)]
    assert titles == ["packs/sample/01_data_exploration", "B8-position/03_fine_tuning", "06_results"]
    with pytest.raises(ValueError, match=r"unknown task \['detection'\]; available: classification, segmentation"):
        states.nodes({**SAMPLE, "tasks": ["detection"]})


def test_what_goes_past_the_thesis_is_listed_before_the_report(outputs: Path) -> None:
    found = states.nodes({**SAMPLE, "beyond": ["any_band", "faulty_bands"]})
    titles = [node.title for node in found[-3:]]
    assert titles == ["any-band/08_any_band_encoder", "faults/10_faulty_bands", "06_results"]
    assert found[-3].output == outputs / "sample" / "any-band" / "any_band.parquet"


def test_packs_lie_where_the_data_sets_say(outputs: Path) -> None:
    settings = {"season": "ROIs1868_summer", "labels": "igbp", "split": "scenes", "max_patches": 500}
    given = {**SAMPLE, "dataset": "eurosat", "segmentation_dataset": "sen12ms"}
    given["sen12ms"] = settings
    found = states.nodes(given)[:2]
    assert [node.output.parent for node in found] == [
        datasets.pack_folder("eurosat"),
        datasets.pack_folder("sen12ms", **settings),
    ]
    assert found[1].executed.parent == outputs / "sample" / "packs" / found[1].output.parent.name
    plain = set(datasets.PACKERS) - {"sen12ms"}
    assert all(datasets.pack_folder(name) == outputs / "packs" / name for name in plain)


def test_notebooks_of_runs_are_those_that_make_results() -> None:
    assert headlines.OF_RUN == results.MAKERS
    assert headlines.OF_RUN.keys() == params.RUN_FILES.keys()


def test_nothing_there_is_to_do(node: Node) -> None:
    assert states.state_of(node) == State(node, "to do")


def test_done_has_minutes_and_figures_of_the_last_epoch(node: Node) -> None:
    record(node)
    aligned(node.output)
    assert states.state_of(node) == State(node, "done", 90.0, figures="val cosine 0.934, test loss 1.250")


def test_figures_are_means_of_the_fine_tuned_encoder_in_both_protocols(outputs: Path) -> None:
    _, scenes, pixels = states.nodes(SAMPLE)[6:9]
    others = {("pre-trained", "retrained"): [0.1], ("ridge", "kept"): [0.2]}
    mine = {("fine-tuned", "retrained"): [0.8, 0.9], ("fine-tuned", "kept"): [0.7]}
    scored(scenes.output, "overall_accuracy", {**others, **mine})
    scored(pixels.output, "miou_all", {**mine, **others})
    assert states.state_of(scenes).figures == "accuracy: retrained 85.0 %, kept 70.0 %"
    assert states.state_of(pixels).figures == "mIoU: retrained 85.0 %, kept 70.0 %"
    complete = states.nodes(SAMPLE)[4]
    scored(complete.output, "overall_accuracy", {("pre-trained", "complete"): [0.5, 0.6]})
    assert states.state_of(complete).figures == "accuracy: complete 55.0 %"


def test_figures_follow_a_file_that_is_made_anew(node: Node) -> None:
    for cosine, shown in ((0.5, "0.500"), (0.75, "0.750")):
        aligned(node.output, cosine)
        assert f"val cosine {shown}" in states.state_of(node).figures


def test_outputs_from_before_there_were_records_count_as_done(node: Node) -> None:
    aligned(node.output)
    state = states.state_of(node)
    assert (state.name, state.seconds, state.problems) == ("done", None, ())


def test_a_record_of_what_is_gone_is_to_do_again(node: Node) -> None:
    record(node)
    state = states.state_of(node)
    assert state.name == "to do"
    assert "alignment.parquet is gone" in state.problems[0]


def test_a_running_process_has_a_live_line(node: Node, running: Callable[[], subprocess.Popen[bytes]]) -> None:
    started = datetime.now(UTC) - timedelta(seconds=30)
    record(node, "running", pid=running().pid, started=started.isoformat(timespec="seconds"), seconds=None)
    progressed(node)
    state = states.state_of(node)
    assert state.name == "running"
    assert 30 <= (state.seconds or 0) < 40
    assert state.live == "fine-tuning on B08, seed 0: epoch 3/6, loss 2.31, 88 images/s, 1 min left"


def test_progress_of_an_earlier_attempt_is_not_shown(
    node: Node, running: Callable[[], subprocess.Popen[bytes]]
) -> None:
    record(node, "running", pid=running().pid)
    progressed(node, updated=(datetime.now(UTC) - timedelta(minutes=5)).isoformat())
    assert states.state_of(node).live == ""


@pytest.mark.parametrize("reaped", [True, False], ids=["gone", "zombie"])
def test_a_killed_process_is_lost(node: Node, running: Callable[[], subprocess.Popen[bytes]], reaped: bool) -> None:
    process = running()
    record(node, "running", pid=process.pid)
    progressed(node)
    assert states.state_of(node).name == "running"
    process.send_signal(signal.SIGKILL)
    if reaped:
        process.wait()
    else:
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # dead, and its parent has not asked yet
    state = states.state_of(node)
    assert state.name == "lost"
    assert state.error == f"process {process.pid} on {socket.gethostname()} is gone"
    assert "epoch 3/6" in state.live


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="only Linux tells when a process began")
def test_another_process_of_the_same_number_is_not_the_run(
    node: Node, running: Callable[[], subprocess.Popen[bytes]]
) -> None:
    yesterday = (datetime.now(UTC) - timedelta(days=1)).isoformat()
    record(node, "running", pid=running().pid, started=yesterday)
    assert states.state_of(node).name == "lost"


def test_a_run_on_another_machine_lives_while_its_files_do(node: Node) -> None:
    record(node, "running", host="n2", pid=1)
    progressed(node)
    assert states.state_of(node).name == "running"
    for path, age in ((node.record, 500), (node.progress, 30)):
        os.utime(path, (time.time() - age, time.time() - age))
    assert states.state_of(node).name == "running"
    assert states.state_of(node, datetime.now(UTC) + timedelta(seconds=40)).name == "lost"


def test_a_run_on_another_machine_that_holds_its_lock_lives(node: Node) -> None:
    """However long it says nothing: not everything it does is training."""
    record(node, "running", host="n2", pid=1)
    lock = node.executed.with_name(".03_fine_tuning.lock")
    hold = "import fcntl, sys, time\nf = open(sys.argv[1], 'w')\nfcntl.flock(f, 2)\nprint('held', flush=True)\n"
    hold += "time.sleep(60)"
    holder = subprocess.Popen([sys.executable, "-c", hold, str(lock)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        later = datetime.now(UTC) + timedelta(hours=1)
        assert states.state_of(node, later).name == "running"
    finally:
        holder.kill()
        holder.communicate()
    assert states.state_of(node, later).name == "lost"


def test_failed_and_stopped_say_why(node: Node) -> None:
    record(node, "failed", error="MemoryError: batch of 64 needs 9 GiB\nTraceback")
    state = states.state_of(node)
    assert (state.name, state.error, state.seconds) == ("failed", "MemoryError: batch of 64 needs 9 GiB", 90.0)
    record(node, "stopped", error="ended by SIGTERM")
    progressed(node)
    state = states.state_of(node)
    assert (state.name, state.error) == ("stopped", "ended by SIGTERM")
    assert state.live == "fine-tuning on B08, seed 0: epoch 3/6, loss 2.31, 88 images/s"


def test_an_executed_notebook_without_record_tells_its_error(node: Node, tmp_path: Path) -> None:
    import nbformat
    import papermill

    notebook = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_code_cell("x = 1"), nbformat.v4.new_code_cell("raise ValueError('no such band\\nB99')")],
        metadata={"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}},
    )
    nbformat.write(notebook, tmp_path / "failing.ipynb")
    node.executed.parent.mkdir(parents=True)
    with pytest.raises(papermill.PapermillExecutionError):
        papermill.execute_notebook(str(tmp_path / "failing.ipynb"), str(node.executed), progress_bar=False)
    assert states.state_of(node) == State(node, "failed", error="ValueError: no such band")
    record(node, "failed", error=None)
    assert states.state_of(node).error == "ValueError: no such band"


DAMAGES = {
    "empty": b"",
    "half": b'{"state": "done", "seco',
    "binary": bytes(range(256)),
    "a list": b"[1, 2]",
    "deep": b"[" * 100_000,
    "unknown state": b'{"state": "resting"}',
    "state of another kind": b'{"state": ["done"]}',
    "no state": b'{"seconds": 3}',
}


@pytest.mark.parametrize("content", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_record_is_named_and_the_outputs_decide(node: Node, content: bytes) -> None:
    node.record.parent.mkdir(parents=True)
    node.record.write_bytes(content)
    state = states.state_of(node)
    assert state.name == "to do"
    assert len(state.problems) == 1
    assert state.problems[0].startswith(str(node.record))
    aligned(node.output)
    state = states.state_of(node)
    assert (state.name, state.figures) == ("done", "val cosine 0.934, test loss 1.250")
    assert len(state.problems) == 1


@pytest.mark.parametrize("content", [b"", b'{"epoch": 3', b"[]"])
def test_damaged_progress_is_named_and_the_run_still_runs(node: Node, content: bytes) -> None:
    record(node, "running")
    node.progress.write_bytes(content)
    state = states.state_of(node)
    assert (state.name, state.live) == ("running", "")
    assert state.problems[0].startswith(str(node.progress))


@pytest.mark.parametrize("content", [b"", b"PAR1", b"x" * 1000])
def test_a_damaged_table_is_named_and_the_node_is_done(node: Node, content: bytes) -> None:
    record(node)
    node.output.write_bytes(content)
    state = states.state_of(node)
    assert (state.name, state.figures) == ("done", "")
    assert state.problems[0].startswith(f"{node.output} can't be read")


def test_a_table_of_other_columns_is_named(node: Node) -> None:
    node.output.parent.mkdir(parents=True)
    pd.DataFrame({"a": [1]}).to_parquet(node.output)
    assert states.state_of(node).problems[0].startswith(f"{node.output} can't be read")


@pytest.mark.parametrize("wrong", [None, "soon", -1, [], {}, float("nan"), True, 1e400])
def test_values_of_the_wrong_kind_are_left_out(node: Node, wrong: Any) -> None:
    for state in ("running", "done", "failed", "stopped"):
        record(node, state, started=wrong, seconds=wrong, error=wrong, host=wrong, pid=wrong)
        progressed(node, epoch=wrong, epochs=wrong, loss=wrong, images_per_second=wrong, seconds_left=wrong)
        found = states.state_of(node)
        assert found.name in states.NAMES
        assert isinstance(found.live, str)
    progressed(node, label=wrong, updated=wrong)
    assert isinstance(states.state_of(node).live, str)


def test_a_file_where_a_folder_should_be_is_named(node: Node, outputs: Path) -> None:
    (outputs / "sample").mkdir()
    (outputs / "sample" / "B8").write_text("in the way")
    state = states.state_of(node)
    assert state.name == "to do"
    assert "Not a directory" in state.problems[0]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        *((-1, "0 s"), (0.4, "0 s"), (59.4, "59 s"), (59.6, "1 min"), (3569, "59 min"), (3599, "1 h 0 min")),
        *((4800, "1 h 20 min"), (86_399, "1 d 0 h"), (180_000, "2 d 2 h")),
    ],
)
def test_durations_as_people_say_them(seconds: float, text: str) -> None:
    assert states.duration(seconds) == text


def test_500_nodes_take_less_than_a_second_and_no_torch(outputs: Path) -> None:
    """Half of them finished, with tables as large as the thesis'; imports and the interpreter's start included.

    Seconds of CPU: a busy machine is no failure.
    """
    labels = [f"B{n}" for n in range(1, 14)]
    masks = [f"{a} {b} {c}" for i, a in enumerate(labels) for j, b in enumerate(labels[:i]) for c in labels[:j]][:166]
    parameters = {**SAMPLE, "masks": masks}
    needed = states.nodes(parameters)
    assert len(needed) >= 500
    many = {(method, protocol): [0.5] * 90 for method in ("ridge", "fine-tuned") for protocol in ("retrained", "kept")}
    aligned(outputs / "03_fine_tuning")
    scored(outputs / "04_scene_classification", "overall_accuracy", many)
    scored(outputs / "05_image_segmentation", "miou_all", many)
    assert len(pd.read_parquet(outputs / "04_scene_classification")) > 350
    for node in needed[3 : len(needed) // 2]:
        record(node)
        node.output.write_bytes((outputs / node.notebook).read_bytes())
    script = f"""
import sys, time
from bandmask.runs import states
found = [states.state_of(node) for node in states.nodes({parameters!r})]
print(len(found), sum(bool(state.figures) for state in found), "torch" in sys.modules, time.process_time())
"""
    alone = {**os.environ, "OMP_NUM_THREADS": "1"}
    told = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=alone)
    count, with_figures, torch, seconds = told.stdout.split()
    assert (int(count), torch) == (len(needed), "False")
    assert int(with_figures) > 200
    assert float(seconds) < 1.0
