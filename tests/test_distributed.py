"""`torchrun` and `launch` do the epochs of notebook 03, say what went wrong, and leave no process behind."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml
from models import ROOT, TINY, same_weights

from bandmask import alignment, encoders, objectives, params, progress
from bandmask.packs import Pack
from bandmask.runs import distributed
from bandmask.training import Compute
from bandmask.tuning import Tuning, complete

CPU = Compute.of("cpu")


@pytest.fixture(scope="module")
def parameters(sample_pack: Pack) -> dict[str, Any]:
    """A tiny run on the sample, whose encoder lies where notebook 00 leaves it."""
    model = encoders.create_encoder(TINY, embedding_dim=16)
    card = encoders.Card("tiny", TINY, embedding_dim=16, image_size=32)
    encoders.save_encoder(model, card, params.experiment_folder("ranks") / "encoder")
    return {
        "experiment": "ranks",
        "mask": "B2 B3 B4",
        "image_size": 32,
        "epochs_several_bands": 1,
        "batch_size": 36,
        "seeds": [0, 1],
        "device": "cpu",
    }


def wait_for(what: Callable[[], bool], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.2)


# --- what users start


@pytest.mark.slow
def test_what_processes_fine_tuned_the_notebook_only_reads(
    parameters: dict[str, Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    reported = tmp_path / "progress.json"
    monkeypatch.setenv("BANDMASK_PROGRESS", str(reported))
    told: list[progress.Event] = []
    with progress.listen(told.append):  # as a log of figures does
        distributed.launch(parameters, 2)
    rows = [event.figures for event in told if event.figures is not None]
    printed = capsys.readouterr().out
    assert "@progress" not in printed
    assert printed.count("\nseed 0:\n") == printed.count("\nseed 1:\n") == 1  # by one rank
    assert '"label": "fine-tuning on B02 B03 B04, seed 1"' in reported.read_text()
    assert [row["epoch"] for row in rows] == [1, 1]  # of two seeds
    tuning = Tuning.of(parameters)
    trained = [
        alignment.fine_tune(
            tuning.teacher,
            tuning.pack,
            tuning.spec(seed),
            tuning.fill,
            epochs=1,
            batch_size=36,
            image_size=32,
            seed=seed,
            compute=CPU,
            progress=False,
        )
        for seed in (0, 1)
    ]
    monkeypatch.setattr(objectives, "clip_loss", lambda *_: pytest.fail("a finished run must not train"))
    for seed, (student, history) in enumerate(trained):
        read, found = Tuning.of(parameters).fine_tune(seed, compute=CPU, progress=False)
        assert rows[seed]["val_loss"] == found["val_loss"].iloc[-1]
        for column in ("train_loss", "val_loss", "val_cosine"):
            assert found[column].tolist() == pytest.approx(history[column].tolist(), rel=1e-3, nan_ok=True)
        assert not same_weights(read, tuning.teacher)
        ours, theirs = (torch.cat([p.detach().flatten() for p in model.parameters()]) for model in (read, student))
        assert float((ours - theirs).abs().max()) < 1e-3


@pytest.mark.slow
def test_the_error_of_a_process_is_the_error_of_the_launch(parameters: dict[str, Any]):
    with pytest.raises(RuntimeError, match=r"^process \d of 2 failed: FileNotFoundError: no encoder at .*00_sample"):
        distributed.launch({**parameters, "experiment": "none-such"}, 2)


@pytest.mark.slow
def test_no_process_outlives_who_wanted_it(parameters: dict[str, Any], tmp_path: Path):
    """A kernel that is killed takes torchrun and its ranks along; the run goes on from its last epoch."""
    long = {**parameters, "experiment": "ranks", "mask": "B8", "epochs_one_band": 200, "seeds": [0]}
    file = tmp_path / "long.yaml"
    file.write_text(yaml.safe_dump(long))
    code = "import sys; from bandmask.runs import distributed; distributed.launch([sys.argv[1]], 2)"
    launcher = subprocess.Popen([sys.executable, "-c", code, str(file)], cwd=ROOT, stdout=subprocess.DEVNULL)
    checkpoints = params.run_folder("ranks", "B8") / "checkpoints"
    try:
        wait_for(lambda: any(checkpoints.glob("*.pt")))
        family = psutil.Process(launcher.pid).children(recursive=True)
        assert len([process for process in family if "bandmask.runs.distributed" in process.cmdline()]) >= 2
    finally:
        launcher.kill()
        launcher.wait()
    wait_for(lambda: not any(process.is_running() and process.status() != "zombie" for process in family), 20)
    (checkpoint,) = checkpoints.glob("*.pt")
    assert 1 < len(torch.load(checkpoint, weights_only=True)["history"]) < 200


# --- wrong uses, before anything is started


def test_a_batch_must_be_shared_evenly(parameters: dict[str, Any]):
    with pytest.raises(
        ValueError, match=r"batch_size 36 can't be shared evenly by 5 .*\[1, 2, 3, 4, 6, 9, 12, 18, 36\]"
    ):
        distributed.launch(parameters, 5)


def test_it_takes_a_process(parameters: dict[str, Any]):
    with pytest.raises(ValueError, match="1 or more, got 0"):
        distributed.launch(parameters, 0)


def test_a_gpu_each(parameters: dict[str, Any], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for device in ("cuda", "auto"):
        with pytest.raises(ValueError, match=r"2 processes .* need a GPU each, and 1 are visible; use 1 "):
            distributed.launch({**parameters, "device": device}, 2)
    with pytest.raises(ValueError, match="'cuda:1' is one device"):
        distributed.launch({**parameters, "device": "cuda:1"}, 2)


def test_a_backend_must_be_there(parameters: dict[str, Any], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.distributed, "is_backend_available", lambda name: name != "gloo")
    with pytest.raises(ValueError, match="no gloo backend; fine-tune with processes: 1"):
        distributed.launch(parameters, 2)


def test_not_under_torchrun(parameters: dict[str, Any], monkeypatch: pytest.MonkeyPatch):
    for name in list(os.environ):
        if name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
            monkeypatch.delenv(name)
    with (
        pytest.raises(
            RuntimeError, match=r"no process of torchrun \(RANK, WORLD_SIZE, .*\n  torchrun --nproc-per-node"
        ),
        distributed.joined(complete(parameters)),
    ):
        pass
