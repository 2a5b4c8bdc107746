"""Logs hold every figure of every epoch once, as each library's own reader finds them, after kills and resumes too."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bandmask import progress, tracking

EXPERIMENT = {"experiment": "sample", "masks": ["none", "B8"], "lr": 1e-4, "mask": "B8 | `B2`"}
NAME = "B8/03_fine_tuning"
LABEL = "fine-tuning on B08, seed 0"

SCRIPT = f"""
import os, signal, sys
from bandmask import progress, tracking
kind, ending, folder, label = sys.argv[1:5]
first, last, scale = map(int, sys.argv[5:])
tracking.track(kind, folder, {NAME!r}, {EXPERIMENT!r})
for epoch in range(first, last + 1):
    row = {{"epoch": float(epoch), "train_loss": scale / epoch, "val_cosine": epoch / 10}}
    values = dict(epochs=6, loss=1 / epoch, images_per_second=1.0, seconds_left=1.0)
    progress.report(label, epoch=epoch, **values)
    progress.report(label, epoch=epoch, figures=row, **values)
if ending == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("BANDMASK_OUTPUTS", str(tmp_path))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    yield
    tracking._close_all()
    tracking._open.clear()
    assert progress._listeners == []


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Outputs with one store of MLflow for several tests: making its tables takes it seconds."""
    return tmp_path_factory.mktemp("store")


@pytest.fixture
def mlflow_outputs(store: Path, own_folder: None, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("BANDMASK_OUTPUTS", str(store))
    return store


def row(epoch: int, label: str = LABEL, **figures: float) -> None:
    values: dict[str, Any] = {"epochs": 6, "loss": 1.0, "images_per_second": 1.0, "seconds_left": 1.0}
    progress.report(label, epoch=epoch, figures={"epoch": float(epoch), **figures}, **values)


def command(
    kind: str, first: int, last: int, ending: str, folder: Path, label: str = LABEL, scale: int = 1
) -> list[str]:
    about = [kind, ending, str(folder), label, *map(str, (first, last, scale))]
    return [sys.executable, "-c", SCRIPT, *about]


def in_its_own_process(kind: str, first: int, last: int, ending: str, folder: Path, **options: Any) -> None:
    run = command(kind, first, last, ending, folder, **options)
    ended = subprocess.run(run, capture_output=True, text=True, check=False)
    assert ended.returncode == (-9 if ending == "killed" else 0), ended.stderr


def tensorboard_scalars(folder: Path, label: str = LABEL) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = EventAccumulator(str(folder / "tensorboard" / NAME / label)).Reload()
    tags = log.Tags()["scalars"]
    return {tag: [(event.step, round(event.value, 4)) for event in log.Scalars(tag)] for tag in tags}


def tensorboard_texts(folder: Path) -> list[str]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = EventAccumulator(str(folder / "tensorboard" / NAME)).Reload()
    assert log.Tags()["tensors"] == ["parameters/text_summary"]
    return [event.tensor_proto.string_val[0].decode() for event in log.Tensors("parameters/text_summary")]


def mlflow_runs(outputs: Path, experiment: str = "sample") -> list[Any]:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{outputs / 'mlflow' / 'mlflow.db'}")
    found = client.get_experiment_by_name(experiment)
    return list(client.search_runs([found.experiment_id]))


def mlflow_history(outputs: Path, run: Any, key: str) -> list[tuple[int, float]]:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{outputs / 'mlflow' / 'mlflow.db'}")
    history = client.get_metric_history(run.info.run_id, key)
    return sorted((metric.step, round(metric.value, 4)) for metric in history)


def test_unknown_kind_lists_the_choices() -> None:
    with pytest.raises(
        ValueError, match="unknown tracking 'wandb'; available: 'tensorboard', 'mlflow', or '' for none"
    ):
        tracking.track("wandb", "outputs/sample", NAME, EXPERIMENT)


def test_no_kind_keeps_nothing_and_imports_nothing(tmp_path: Path) -> None:
    script = (
        "import sys\nfrom bandmask import tracking\n"
        "with_nothing = tracking.track('', 'folder', 'name', {})\nwith_nothing.close()\n"
        "print([name for name in ('torch', 'tensorboard', 'mlflow') if name in sys.modules])"
    )
    told = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert told.stdout == "[]\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("kind", "lacking", "command"),
    [
        ("tensorboard", "tensorboard", "python -m pip install tensorboard`"),
        ("mlflow", "mlflow", "python -m pip install mlflow-skinny sqlalchemy alembic`"),
    ],
)
def test_a_missing_package_is_named_with_the_command(kind: str, lacking: str, command: str, tmp_path: Path) -> None:
    script = (
        f"import sys\nsys.modules[{lacking!r}] = None\nfrom bandmask import tracking\n"
        f"try:\n    tracking.track({kind!r}, 'folder', 'name', {{}})\nexcept ImportError as error:\n    print(error)"
    )
    told = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert command in told.stdout
    assert f"tracking={kind!r}" in told.stdout


def test_tensorboard_has_each_figure_of_each_epoch_and_the_parameters(tmp_path: Path) -> None:
    tracker = tracking.track("tensorboard", tmp_path / "sample", NAME, EXPERIMENT)
    for epoch in range(1, 4):
        row(epoch, train_loss=1 / epoch, val_cosine=epoch / 10)
        assert len(tensorboard_scalars(tmp_path / "sample")["train_loss"]) == epoch, "on disk before the next begins"
    row(1, "head, seed 1: a/b", val_accuracy=0.5)
    tracker.close()
    row(4, train_loss=0.0)
    assert tensorboard_scalars(tmp_path / "sample") == {
        "train_loss": [(1, 1.0), (2, 0.5), (3, 0.3333)],
        "val_cosine": [(1, 0.1), (2, 0.2), (3, 0.3)],
    }
    assert tensorboard_scalars(tmp_path / "sample", "head, seed 1_ a_b") == {"val_accuracy": [(1, 0.5)]}
    (text,) = tensorboard_texts(tmp_path / "sample")
    assert "| masks | `['none', 'B8']` |" in text
    assert "| lr | `0.0001` |" in text


def test_a_label_stays_inside_its_folder(tmp_path: Path) -> None:
    tracking.track("tensorboard", tmp_path / "sample", NAME, {}).close()
    tracking.track("tensorboard", tmp_path / "sample", NAME, {})
    row(1, "../../../../escaped", loss=1.0)
    assert [path.name for path in tmp_path.iterdir()] == ["sample"]


def test_a_second_call_ends_the_first_log(tmp_path: Path) -> None:
    tracking.track("tensorboard", tmp_path / "first", NAME, EXPERIMENT)
    row(1, train_loss=1.0)
    tracking.track("tensorboard", tmp_path / "second", NAME, EXPERIMENT)
    row(2, train_loss=0.5)
    assert tensorboard_scalars(tmp_path / "first") == {"train_loss": [(1, 1.0)]}
    assert tensorboard_scalars(tmp_path / "second") == {"train_loss": [(2, 0.5)]}


@pytest.mark.slow
def test_a_killed_tensorboard_log_keeps_what_it_had_and_goes_on_without_double_steps(tmp_path: Path) -> None:
    folder = tmp_path / "sample"
    in_its_own_process("tensorboard", 1, 4, "killed", folder)
    assert [step for step, _ in tensorboard_scalars(folder)["train_loss"]] == [1, 2, 3, 4]
    # the kill came between the report of epoch 4 and its checkpoint; and another training has an epoch 1 too
    in_its_own_process("tensorboard", 1, 1, "in order", folder, label="the next training")
    in_its_own_process("tensorboard", 4, 6, "in order", folder, scale=10)
    expected = [(1, 1.0), (2, 0.5), (3, 0.3333), (4, 2.5), (5, 2.0), (6, 1.6667)]
    assert tensorboard_scalars(folder)["train_loss"] == expected
    assert tensorboard_scalars(folder, "the next training")["train_loss"] == [(1, 1.0)]
    assert len(tensorboard_texts(folder)) == 1, "parameters are there once"


@pytest.mark.slow
def test_mlflow_has_each_figure_of_each_epoch_and_the_parameters(mlflow_outputs: Path, tmp_path: Path) -> None:
    tracker = tracking.track("mlflow", tmp_path / "sample", NAME, {**EXPERIMENT, "experiment": "figures"})
    for epoch in range(1, 4):
        row(epoch, train_loss=1 / epoch, nothing=float("nan"))
    (run,) = mlflow_runs(mlflow_outputs, "figures")
    assert run.info.status == "RUNNING"
    tracker.close()
    (run,) = mlflow_runs(mlflow_outputs, "figures")
    assert (run.info.run_name, run.info.status) == (f"sample/{NAME}", "FINISHED")
    assert run.data.params == {"experiment": "figures", "masks": "['none', 'B8']", "lr": "0.0001", "mask": "B8 | `B2`"}
    assert run.data.metrics.keys() == {"fine-tuning on B08 seed 0/train_loss"}, "MLflow allows no comma"
    history = mlflow_history(mlflow_outputs, run, "fine-tuning on B08 seed 0/train_loss")
    assert history == [(1, 1.0), (2, 0.5), (3, 0.3333)]
    assert list(tmp_path.iterdir()) == [], "nothing in the working folder"
    assert os.environ["MLFLOW_DISABLE_TELEMETRY"] == "true"


@pytest.mark.slow
def test_other_parameters_are_another_run_of_mlflow(mlflow_outputs: Path, tmp_path: Path) -> None:
    for lr in (1e-4, 1e-3, 1e-4):
        tracking.track("mlflow", tmp_path, NAME, {"experiment": "rates", "lr": lr}).close()
    assert sorted(run.data.params["lr"] for run in mlflow_runs(mlflow_outputs, "rates")) == ["0.0001", "0.001"]


@pytest.mark.slow
def test_a_killed_mlflow_run_keeps_what_it_had_and_goes_on_without_double_steps(
    mlflow_outputs: Path, tmp_path: Path
) -> None:
    folder, key = tmp_path / "sample", "fine-tuning on B08 seed 0/train_loss"
    in_its_own_process("mlflow", 1, 4, "killed", folder)
    (killed,) = mlflow_runs(mlflow_outputs)
    assert [step for step, _ in mlflow_history(mlflow_outputs, killed, key)] == [1, 2, 3, 4]
    in_its_own_process("mlflow", 4, 6, "in order", folder, scale=10)
    (run,) = mlflow_runs(mlflow_outputs)
    expected = [(1, 1.0), (2, 0.5), (3, 0.3333), (4, 2.5), (5, 2.0), (6, 1.6667)]
    assert mlflow_history(mlflow_outputs, run, key) == expected
    assert run.data.params["lr"] == "0.0001"
    assert run.info.status == "FINISHED", "closed when the interpreter ended"


@pytest.mark.slow
def test_runs_that_start_together_all_get_into_one_new_store(tmp_path: Path) -> None:
    """Without the lock, MLflow's own making of tables fails: duplicate column name."""
    runs = [command("mlflow", 1, 3, "in order", tmp_path / name / "sample") for name in "ab"]
    started = [subprocess.Popen(run, stderr=subprocess.PIPE, text=True) for run in runs]
    for process in started:
        _, said = process.communicate()
        assert process.returncode == 0, said
    found = mlflow_runs(tmp_path)
    assert len(found) == 2
    for run in found:
        assert len(mlflow_history(tmp_path, run, "fine-tuning on B08 seed 0/val_cosine")) == 3


@pytest.mark.slow
def test_an_mlflow_server_that_is_not_there_is_said_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not after an hour of training, nor after minutes of trying."""
    from mlflow.exceptions import MlflowException

    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    with pytest.raises(MlflowException, match=r"127\.0\.0\.1"):
        tracking.track("mlflow", tmp_path / "sample", NAME, EXPERIMENT)
    assert not (tmp_path / "mlflow").exists()
