"""A run that was killed, filled the disk, or met NaN goes on to the figures of an undisturbed one."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from models import TINY, run_script, same_weights
from torch import Tensor, nn

from bandmask.encoders import create_encoder
from bandmask.training import Compute, adamw, fit

EPOCHS = 4
SETTINGS = {"lr": 0.01, "mask": {"bands": ["B08"], "ratio": 0.9}}


@dataclass(frozen=True)
class Examples:
    inputs: Tensor
    labels: Tensor
    samples: Tensor


def small_model() -> nn.Module:
    """Batch norm has buffers and dropout draws from torch's generator: both must survive an interruption."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 3))


def examples(epoch: int, sizes: tuple[int, ...] = (8, 8, 8, 5)) -> Iterator[Examples]:
    draw = torch.Generator().manual_seed(100 + epoch)
    for size in sizes:
        inputs = torch.randn(size, 6, generator=draw)
        yield Examples(inputs, (inputs[:, 0] > 0).long() + (inputs[:, 1] > 0.5).long(), torch.arange(size))


def small_fit(
    checkpoint: Path | None,
    *,
    on_batch: Callable[[int, int], None] = lambda epoch, step: None,
    broken: Callable[[int, Tensor], Tensor] = lambda epoch, value: value,
    settings: dict[str, Any] = SETTINGS,
    epochs: int = EPOCHS,
    figure: type = float,
    **options: Any,
) -> tuple[nn.Module, pd.DataFrame]:
    """A run of seconds; `on_batch(epoch, step)` disturbs it, `broken` spoils its loss."""
    model = small_model()
    probe = torch.randn(32, 6, generator=torch.Generator().manual_seed(1))

    def batches(epoch: int) -> Iterator[Examples]:
        for step, batch in enumerate(examples(epoch)):
            on_batch(epoch, step)
            yield batch

    def loss(batch: Examples, epoch: int) -> Tensor:
        return broken(epoch, F.cross_entropy(model(batch.inputs), batch.labels))

    @torch.no_grad()
    def after_epoch(_: int) -> dict[str, float]:
        return {"val": figure(float(model(probe).square().mean()))}

    optimizer = adamw(model, lr=settings["lr"], weight_decay=0.01)
    options = {"compute": Compute.of("cpu"), "progress": False, **options}
    history = fit(
        model,
        optimizer,
        batches,
        loss,
        epochs=epochs,
        after_epoch=after_epoch,
        settings=settings,
        checkpoint=checkpoint,
        **options,
    )
    return model, history


@pytest.fixture(scope="module")
def undisturbed() -> tuple[nn.Module, pd.DataFrame]:
    return small_fit(None)


def assert_same_run(found: tuple[nn.Module, pd.DataFrame], expected: tuple[nn.Module, pd.DataFrame]) -> None:
    """Equal to the last bit, speed aside."""
    ours, theirs = (run[1].drop(columns="images_per_second") for run in (found, expected))
    pd.testing.assert_frame_equal(ours, theirs, check_exact=True)
    assert same_weights(found[0], expected[0])


def refuse(*_: Any) -> None:
    raise AssertionError("a finished run must not train")


# --- history --------------------------------------------------------------------------------------------------------


def test_history_has_a_row_before_training_and_one_an_epoch(undisturbed: tuple[nn.Module, pd.DataFrame]):
    model, history = undisturbed
    assert history["epoch"].tolist() == [0, 1, 2, 3, 4]
    assert set(history.columns) == {"epoch", "train_loss", "val", "images_per_second"}
    assert history["train_loss"].isna().tolist() == [True, False, False, False, False]
    assert not model.training
    assert not same_weights(model, small_model())


def test_train_loss_is_the_mean_over_images_not_over_batches():
    model = nn.Linear(6, 3)
    sizes = (8, 8, 1)
    history = fit(
        model,
        torch.optim.SGD(model.parameters(), lr=0.0),
        lambda epoch: examples(epoch, sizes),
        lambda batch, epoch: F.cross_entropy(model(batch.inputs), batch.labels),
        epochs=1,
        after_epoch=lambda _: {},
        settings={},
        progress=False,
    )
    everything = list(examples(0, sizes))
    inputs, labels = (torch.cat([getattr(batch, part) for batch in everything]) for part in ("inputs", "labels"))
    expected = F.cross_entropy(model(inputs), labels).detach()
    assert history["train_loss"].iloc[1] == pytest.approx(float(expected), rel=1e-5)


def test_after_epoch_is_told_how_many_epochs_are_done():
    told, model = [], small_model()
    fit(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        examples,
        lambda batch, epoch: model(batch.inputs).mean(),
        epochs=3,
        after_epoch=lambda done: told.append((done, model.training)) or {},
        settings={},
        progress=False,
    )
    assert told == [(0, False), (1, False), (2, False), (3, False)]  # always in eval mode


# --- interruptions --------------------------------------------------------------------------------------------------


def kill_in_an_epoch(checkpoint: Path) -> None:
    """SIGKILL within the third epoch."""

    def kill(epoch: int, step: int) -> None:
        if (epoch, step) == (2, 2):
            os.kill(os.getpid(), signal.SIGKILL)

    small_fit(checkpoint, on_batch=kill)


def kill_in_a_save(checkpoint: Path) -> None:
    """SIGKILL when half of the second checkpoint is on disk."""
    whole, saved = torch.save, []

    def half(state: Any, file: Any) -> None:
        saved.append(1)
        whole(state, file)
        if len(saved) == 2:
            file.flush()
            os.truncate(file.name, file.tell() // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    torch.save = half
    small_fit(checkpoint)


def fill_the_disk(checkpoint: Path) -> None:
    """From the third epoch on, no file may grow over a kilobyte."""
    import resource

    def limit(epoch: int, _: int) -> None:
        if epoch == 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1024, resource.RLIM_INFINITY))

    small_fit(checkpoint, on_batch=limit)


def disturb_runs(folder: Path) -> None:
    """Called in a process of its own: a child a disturbance, which shares the imports; writes how each one ended."""
    adamw(small_model(), lr=0.1, weight_decay=0.0)  # the first optimizer imports for seconds
    for disturbance in (kill_in_an_epoch, kill_in_a_save, fill_the_disk):
        run = folder / disturbance.__name__
        run.mkdir()
        child = os.fork()
        if child == 0:
            try:
                disturbance(run / "last.ckpt")
            except OSError as error:
                (folder / f"{run.name}.error").write_text(str(error))
                os._exit(3)
            os._exit(0)
        ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        (folder / f"{run.name}.exit").write_text(str(ended))


@pytest.fixture(scope="module")
def disturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder a disturbed run."""
    if not hasattr(os, "fork"):
        pytest.skip("kills children of a fork: POSIX only")
    folder = tmp_path_factory.mktemp("disturbed")
    code = "import sys, pathlib, test_training; test_training.disturb_runs(pathlib.Path(sys.argv[1]))"
    ran = run_script(code, folder)
    assert ran.returncode == 0, ran.stderr
    return folder


@pytest.mark.parametrize(("kind", "epochs_done"), [("kill_in_an_epoch", 2), ("kill_in_a_save", 1)])
def test_a_killed_run_resumes_to_the_same_figures(
    kind: str, epochs_done: int, disturbed: Path, undisturbed: tuple[nn.Module, pd.DataFrame]
):
    assert (disturbed / f"{kind}.exit").read_text() == str(-signal.SIGKILL)
    checkpoint = disturbed / kind / "last.ckpt"
    assert len(torch.load(checkpoint, weights_only=True)["history"]) == 1 + epochs_done
    trained = []
    resumed = small_fit(checkpoint, on_batch=lambda epoch, step: trained.append(epoch))
    assert sorted(set(trained)) == list(range(epochs_done, EPOCHS))  # only what was missing
    assert_same_run(resumed, undisturbed)
    assert [path.name for path in checkpoint.parent.iterdir()] == ["last.ckpt"]  # leftovers are swept


def test_a_full_disk_is_a_clear_error_and_the_last_checkpoint_is_kept(
    disturbed: Path, undisturbed: tuple[nn.Module, pd.DataFrame]
):
    checkpoint = disturbed / "fill_the_disk" / "last.ckpt"
    assert (disturbed / "fill_the_disk.exit").read_text() == "3"
    message = (disturbed / "fill_the_disk.error").read_text()
    assert str(checkpoint) in message
    assert "File too large" in message  # what a limit on the file size is called; a full disk is another errno
    assert "What was there before is untouched" in message
    assert "BANDMASK_OUTPUTS" in message
    assert [path.name for path in checkpoint.parent.iterdir()] == ["last.ckpt"]
    assert len(torch.load(checkpoint, weights_only=True)["history"]) == 3  # of two epochs
    assert_same_run(small_fit(checkpoint), undisturbed)


def interrupted(checkpoint: Path, epochs_done: int = 2) -> bytes:
    """Stop a run as Ctrl-C does; the checkpoint's bytes."""

    def stop(epoch: int, _: int) -> None:
        if epoch == epochs_done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        small_fit(checkpoint, on_batch=stop)
    return checkpoint.read_bytes()


@pytest.mark.parametrize("epochs_done", [1, 2, 3])
def test_interrupted_after_any_epoch(epochs_done: int, tmp_path: Path, undisturbed: tuple[nn.Module, pd.DataFrame]):
    interrupted(tmp_path / "last.ckpt", epochs_done)
    assert_same_run(small_fit(tmp_path / "last.ckpt"), undisturbed)


def test_figures_from_numpy_survive_a_resume(tmp_path: Path):
    """`np.float64` is a float to everyone but torch's safe loader."""
    checkpoint = tmp_path / "last.ckpt"
    _, first = small_fit(checkpoint, figure=np.float64)
    _, second = small_fit(checkpoint, figure=np.float64)
    pd.testing.assert_frame_equal(first, second)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_and_keeps_the_checkpoint_before(
    value: float, tmp_path: Path, undisturbed: tuple[nn.Module, pd.DataFrame]
):
    checkpoint = tmp_path / "last.ckpt"
    with pytest.raises(FloatingPointError, match="epoch 3") as error:
        small_fit(checkpoint, broken=lambda epoch, loss: loss * value if epoch == 2 else loss, label="fine-tuning B8")
    assert "fine-tuning B8" in str(error.value)
    assert "learning rate" in str(error.value)
    assert len(torch.load(checkpoint, weights_only=True)["history"]) == 3
    assert_same_run(small_fit(checkpoint), undisturbed)


# --- checkpoints ----------------------------------------------------------------------------------------------------


def test_a_finished_run_is_only_read(tmp_path: Path):
    checkpoint = tmp_path / "last.ckpt"
    model, history = small_fit(checkpoint)
    before = checkpoint.read_bytes(), checkpoint.stat().st_mtime_ns
    again, read = small_fit(checkpoint, on_batch=refuse)
    pd.testing.assert_frame_equal(read, history, check_exact=True)
    assert same_weights(again, model)
    assert not again.training
    assert (checkpoint.read_bytes(), checkpoint.stat().st_mtime_ns) == before


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"settings": {**SETTINGS, "lr": 0.02}}, "lr: 0.01 there, 0.02 now"),
        ({"settings": {**SETTINGS, "seed": 3}}, "seed: None there, 3 now"),
        ({"epochs": 6}, "epochs: 4 there, 6 now"),
    ],
)
@pytest.mark.parametrize("finished", [True, False])
def test_other_settings_are_refused_by_name(change: dict[str, Any], named: str, finished: bool, tmp_path: Path):
    checkpoint = tmp_path / "last.ckpt"
    if finished:
        small_fit(checkpoint)
        before = checkpoint.read_bytes()
    else:
        before = interrupted(checkpoint)
    with pytest.raises(ValueError, match="belongs to other settings") as error:
        small_fit(checkpoint, on_batch=refuse, **change)
    assert f"({named})" in str(error.value)  # this key and no other
    assert str(checkpoint) in str(error.value)
    assert "restart=True" in str(error.value)
    assert checkpoint.read_bytes() == before


def test_restart_begins_anew_whatever_is_there(tmp_path: Path, undisturbed: tuple[nn.Module, pd.DataFrame]):
    checkpoint = tmp_path / "last.ckpt"
    small_fit(checkpoint, settings={"lr": 0.5})
    trained = []
    found = small_fit(checkpoint, restart=True, on_batch=lambda epoch, step: trained.append(epoch))
    assert sorted(set(trained)) == [0, 1, 2, 3]
    assert_same_run(found, undisturbed)
    assert_same_run(small_fit(checkpoint, on_batch=refuse), undisturbed)


def halve(checkpoint: Path) -> None:
    checkpoint.write_bytes(checkpoint.read_bytes()[: checkpoint.stat().st_size // 2])


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "truncated": halve,
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("no checkpoint"),
    "other content": lambda path: torch.save({"weights": torch.zeros(2)}, path),
    "no dictionary": lambda path: torch.save([1, 2], path),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_checkpoint_is_refused_and_left_alone(
    kind: str, tmp_path: Path, undisturbed: tuple[nn.Module, pd.DataFrame]
):
    checkpoint = tmp_path / "last.ckpt"
    interrupted(checkpoint)
    DAMAGE[kind](checkpoint)
    before = checkpoint.read_bytes()
    with pytest.raises(ValueError, match="is damaged") as error:
        small_fit(checkpoint)
    assert str(checkpoint) in str(error.value)
    assert "restart=True" in str(error.value)
    assert checkpoint.read_bytes() == before
    assert_same_run(small_fit(checkpoint, restart=True), undisturbed)


def test_code_in_a_checkpoint_does_not_run(tmp_path: Path):
    checkpoint = tmp_path / "last.ckpt"
    torch.save({"history": Evil(str(tmp_path / "marker"))}, checkpoint)
    with pytest.raises(ValueError, match=r"last\.ckpt"):
        small_fit(checkpoint)
    assert not (tmp_path / "marker").exists()


class Evil:
    def __init__(self, marker: str) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (self.marker,)


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path):
    """The settings agree, as they do where they don't name the encoder; the weights don't fit."""
    checkpoint, model = tmp_path / "last.ckpt", nn.Linear(6, 3)
    small_fit(checkpoint)
    before = checkpoint.read_bytes()
    with pytest.raises(ValueError, match=r"last\.ckpt"):
        fit(
            model,
            adamw(model, lr=0.01, weight_decay=0.01),
            refuse,
            refuse,
            epochs=EPOCHS,
            after_epoch=lambda _: {},
            settings=SETTINGS,
            checkpoint=checkpoint,
            progress=False,
        )
    assert checkpoint.read_bytes() == before


# --- device and precision -------------------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_gpu_that_is_not_there_is_a_clear_error():
    with pytest.raises(ValueError, match=r"device 'cuda' can't be used .*try 'auto' or 'cpu'"):
        Compute.of("cuda")


@pytest.mark.parametrize("device", ["cuda:99", "gpu", ""])
def test_an_unusable_device_is_a_clear_error(device: str):
    with pytest.raises(ValueError, match="can't be used") as error:
        Compute.of(device)
    assert repr(device) in str(error.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_auto_is_plain_cpu():
    assert Compute.of() == Compute(torch.device("cpu"), amp=False, channels_last=False, compile=False)


def test_a_cpu_run_stays_float32():
    """bfloat16 is emulated on many CPUs, and far slower; nothing here may fall into it."""
    compute, model = Compute.of("cpu"), small_model()
    seen = set()
    for module in model.modules():
        module.register_forward_hook(lambda _, inputs, output: seen.update({inputs[0].dtype, output.dtype}))

    def loss(batch: Examples, _: int) -> Tensor:
        with compute.autocast():
            value = F.cross_entropy(compute.faster(compute.place(model))(compute.images(batch.inputs)), batch.labels)
        seen.add(value.dtype)
        return value

    optimizer = adamw(model, lr=0.01, weight_decay=0.01)
    fit(
        model,
        optimizer,
        examples,
        loss,
        epochs=1,
        after_epoch=lambda _: {},
        settings={},
        compute=compute,
        progress=False,
    )
    seen |= {p.dtype for p in model.parameters()} | {p.grad.dtype for p in model.parameters()}
    seen |= {value.dtype for state in optimizer.state.values() for value in state.values()}
    assert seen == {torch.float32}


# --- optimizer ------------------------------------------------------------------------------------------------------


def test_adamw_decays_weights_but_not_biases_and_norms():
    model = create_encoder(TINY, embedding_dim=8)
    torch.nn.init.ones_(model.fc.bias)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = adamw(model, lr=0.1, weight_decay=0.5)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)  # so that decay alone moves anything
    optimizer.step()
    plain = {
        f"{name}.{kind}"
        for name, m in model.named_modules()
        if isinstance(m, nn.BatchNorm2d)
        for kind in ("weight", "bias")
    }
    plain |= {name for name in before if name.endswith(".bias")}
    assert {"fc.bias", "bn1.weight"} <= plain
    for name, p in model.named_parameters():
        expected = before[name] if name in plain else before[name] * (1 - 0.1 * 0.5)
        torch.testing.assert_close(p.detach(), expected, msg=name)


def test_adamw_trains_each_free_parameter_once_and_no_frozen_one():
    model = create_encoder(TINY, embedding_dim=8)
    model.layer1.requires_grad_(False)
    optimizer = adamw(model, lr=0.1, weight_decay=0.5)
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert len(held) == len(set(held))
    assert set(held) == {id(p) for p in model.parameters() if p.requires_grad}
