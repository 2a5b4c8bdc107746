"""A run that was killed, filled the disk, or met NaN goes on to the figures of an undisturbed one."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import models
import nbformat
import numpy as np
import psutil
import pytest
import torch
import torch.nn.functional as F
from models import ROOT, TINY, Evil, Run, assert_same_run, settled_encoder
from probes import until
from torch import Tensor, nn

from bandmask import align, packs, train
from bandmask.align import Objective
from bandmask.encoders import create_encoder
from bandmask.masks import MaskSpec, fill_values
from bandmask.train import Compute, adamw, fit

EPOCHS = 4
KEY = {"lr": 0.01, "seed": 0, "mask": {"bands": ["B08"], "ratio": 0.9}}
CPU = Compute.of("cpu")
ON_PATH = {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}


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
    path: Path | None,
    *,
    on_batch: Callable[[nn.Module, int, int], object] = lambda model, epoch, step: None,
    broken: Callable[[int, Tensor], Tensor] = lambda epoch, value: value,
    key: Mapping[str, Any] = KEY,
    figure: type = float,
    **options: Any,
) -> Run:
    """A run of seconds; `on_batch(model, epoch, step)` disturbs it, `broken` spoils its loss."""
    model = small_model()
    probe = torch.randn(32, 6, generator=torch.Generator().manual_seed(1))

    def batches(epoch: int) -> Iterator[Examples]:
        for step, batch in enumerate(examples(epoch)):
            on_batch(model, epoch, step)
            yield batch

    def loss(batch: Examples, epoch: int) -> Tensor:
        return broken(epoch, F.cross_entropy(model(batch.inputs), batch.labels))

    @torch.no_grad()
    def watch() -> dict[str, float]:
        assert not model.training
        return {"val": figure(float(model(probe).square().mean()))}

    optimizer = adamw(model, lr=key["lr"], weight_decay=0.01)
    options = {"epochs": EPOCHS, "watch": watch, **options}
    return model, fit(model, optimizer, batches, loss, key=key, path=path, **options)


@pytest.fixture(scope="module")
def undisturbed():
    return small_fit(None)


def refuse(*_: Any) -> None:
    raise AssertionError("a finished run must not train")


def only(folder: Path) -> Path:
    (kept,) = folder.iterdir()  # leftovers are swept
    return kept


def epochs_in(path: Path) -> int:
    return len(torch.load(path, weights_only=True)["history"]) - 1


def test_train_loss_is_the_mean_over_images_not_over_batches():
    model, sizes = nn.Linear(6, 3), (8, 8, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)

    def loss(batch: Examples, _: int) -> Tensor:
        return F.cross_entropy(model(batch.inputs), batch.labels)

    history = fit(model, optimizer, lambda epoch: examples(epoch, sizes), loss, epochs=1, key={})
    everything = list(examples(0, sizes))
    inputs, labels = (torch.cat([getattr(batch, part) for batch in everything]) for part in ("inputs", "labels"))
    assert history["train_loss"].iloc[1] == pytest.approx(F.cross_entropy(model(inputs), labels).item(), rel=1e-5)


def kill_in_an_epoch(path: Path) -> None:
    """SIGKILL within the third epoch."""
    small_fit(path, on_batch=lambda _, epoch, step: (epoch, step) == (2, 2) and os.kill(os.getpid(), signal.SIGKILL))


def kill_in_a_save(path: Path) -> None:
    """SIGKILL when half of the second checkpoint is on disk."""
    whole, saved = Path.write_bytes, []

    def half(file: Path, content: Any) -> int:
        saved.append(1)
        if len(saved) < 2:
            return whole(file, content)
        whole(file, content[: len(content) // 2])
        return os.kill(os.getpid(), signal.SIGKILL) or 0

    Path.write_bytes = half
    small_fit(path)


def fill_the_disk(path: Path) -> None:
    """From the third epoch on, no file may grow over a kilobyte."""
    import resource

    limit = (1024, resource.RLIM_INFINITY)
    small_fit(path, on_batch=lambda _, epoch, step: epoch == 2 and resource.setrlimit(resource.RLIMIT_FSIZE, limit))


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
def disturbed(tmp_path_factory):
    """A folder a disturbed run."""
    folder = tmp_path_factory.mktemp("disturbed")
    code = "import sys, pathlib, test_train; test_train.disturb_runs(pathlib.Path(sys.argv[1]))"
    ran = models.run_script(code, folder)
    assert ran.returncode == 0, ran.stderr
    return folder


@pytest.mark.parametrize(
    ("kind", "ended", "done"),
    [("kill_in_an_epoch", -signal.SIGKILL, 2), ("kill_in_a_save", -signal.SIGKILL, 1), ("fill_the_disk", 3, 2)],
)
def test_a_disturbed_run_resumes_to_the_same_figures(kind, ended, done, disturbed, undisturbed):
    assert (disturbed / f"{kind}.exit").read_text() == str(int(ended))
    (kept,) = (disturbed / kind).glob("last-????????.ckpt")
    assert epochs_in(kept) == done
    if ended == 3:
        assert all(word in (disturbed / f"{kind}.error").read_text() for word in (str(kept), "BANDMASK_OUTPUTS"))
    trained: set[int] = set()
    resumed = small_fit(disturbed / kind / "last.ckpt", on_batch=lambda _, epoch, step: trained.add(epoch))
    assert sorted(trained) == list(range(done, EPOCHS))  # only what was missing
    assert_same_run(resumed, undisturbed)
    assert only(disturbed / kind) == kept


def interrupted(path: Path, done: int = 2) -> Path:
    """Stop a run as Ctrl-C does; its checkpoint."""

    def stop(_: nn.Module, epoch: int, step: int) -> None:
        if epoch == done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        small_fit(path, on_batch=stop, figure=np.float64)  # a float to everyone but torch's safe loader
    return only(path.parent)


def spoil_weights(model: nn.Module, epoch: int, step: int) -> None:
    """The last step of the third epoch leaves an infinite weight, which its own loss has not seen."""
    if (epoch, step) == (2, 3):
        last = model[4].weight
        last.register_hook(lambda gradient: gradient.index_fill(0, torch.tensor([1]), torch.inf))


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"broken": lambda epoch, loss: loss * (float("inf") if epoch == 2 else 1)}, "loss is (inf|nan)"),
        ({"on_batch": spoil_weights}, r"weights 4\.weight are not finite"),
    ],
)
def test_what_is_not_finite_stops_and_keeps_the_checkpoint_before(options, named, tmp_path, undisturbed):
    with pytest.raises(FloatingPointError, match=f"fine-tuning B8: after epoch 3 the {named}"):
        small_fit(tmp_path / "last.ckpt", label="fine-tuning B8", **options)
    assert epochs_in(only(tmp_path)) == 2
    assert_same_run(small_fit(tmp_path / "last.ckpt"), undisturbed)


@pytest.mark.parametrize(
    "options",
    [
        {"epochs": 0},
        {"epochs": "2"},
        *({"key": {**KEY, **wrong}} for wrong in ({"image_size": 0}, {"batch_size": -1}, {"lr": 0.0})),
    ],
    ids=str,
)
def test_a_training_of_nothing_is_refused(options, tmp_path):
    with pytest.raises(ValueError, match=r"is 1 or more|lr is above 0"):
        small_fit(tmp_path / "last.ckpt", **options)
    assert not list(tmp_path.iterdir())


def test_a_finished_run_is_only_read(tmp_path):
    first = small_fit(tmp_path / "last.ckpt")
    before = only(tmp_path).stat().st_mtime_ns
    again = small_fit(str(tmp_path / "last.ckpt"), on_batch=refuse)  # type: ignore[arg-type]
    assert_same_run(again, first)
    assert not again[0].training
    assert only(tmp_path).stat().st_mtime_ns == before


@pytest.mark.parametrize("change", [{"key": {**KEY, "lr": 0.02}}, {"key": {**KEY, "seed": 3}}, {"epochs": 6}], ids=str)
def test_another_training_neither_goes_on_from_a_checkpoint_nor_overwrites_it(change, tmp_path):
    kept = interrupted(tmp_path / "last.ckpt")
    before = kept.read_bytes()
    assert_same_run(small_fit(tmp_path / "last.ckpt", **change), small_fit(None, **change))
    assert kept.read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 2


def flip_a_bit(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[raw.index(torch.load(path, weights_only=True)["model"]["0.weight"].numpy().tobytes()) + 1] ^= 1
    path.write_bytes(raw)


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "a flipped bit": flip_a_bit,
    "another model": lambda path: torch.save({"model": nn.Linear(6, 3).state_dict()}, path),
    "no dictionary": lambda path: torch.save([1, 2], path),
    "code": lambda path: torch.save({"history": Evil(path.with_name("marker"))}, path),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_checkpoint_is_refused_and_left_alone(kind, tmp_path, undisturbed):
    kept = interrupted(tmp_path / "last.ckpt")
    DAMAGE[kind](kept)
    before = kept.read_bytes()
    with pytest.raises(ValueError, match=r"last-.*\.ckpt is damaged .*delete it"):
        small_fit(tmp_path / "last.ckpt")
    assert only(tmp_path) == kept  # no code ran
    assert kept.read_bytes() == before
    kept.unlink()
    assert_same_run(small_fit(tmp_path / "last.ckpt"), undisturbed)


@pytest.mark.parametrize("device", ["cuda:99", "gpu", ""])
def test_an_unusable_device_is_a_clear_error(device):
    with pytest.raises(ValueError, match=f"device {device!r} can't be used"):
        Compute.of(device)


def test_adamw_decays_weights_but_not_biases_and_norms_and_no_frozen_parameter():
    model = create_encoder(TINY, embedding_dim=8)
    model.layer1.requires_grad_(False)
    torch.nn.init.ones_(model.fc.bias)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = adamw(model, lr=0.1, weight_decay=0.5)
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)  # so that decay alone moves anything
    optimizer.step()
    norms = {name for name, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)}
    for name, p in model.named_parameters():
        plain = name.endswith("bias") or name.rpartition(".")[0] in norms or name.startswith("layer1")
        torch.testing.assert_close(p.detach(), before[name] * (1 if plain else 0.95), msg=name)


def test_out_of_memory_names_batch_and_image_size():
    def too_large(batch: Examples, _: int) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    optimizer = adamw(small_model(), lr=0.1, weight_decay=0.0)
    with pytest.raises(MemoryError, match="training: batch_size 64 and image_size 256 do not fit"):
        fit(small_model(), optimizer, examples, too_large, epochs=1, key={"batch_size": 64, "image_size": 256})


def test_an_executed_notebook_keeps_one_line_and_a_log_too(tmp_path, capsys):
    small_fit(None)
    printed = capsys.readouterr().err
    assert printed.startswith("training: 4 epochs")
    assert printed.count("\n") == 1
    assert "\r" not in printed
    from nbclient import NotebookClient

    code = "import test_train\ntest_train.train.SECONDS = 0.0\nhistory = test_train.small_fit(None)"
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)])
    NotebookClient(notebook, kernel_name="python3").execute(env={**os.environ, **ON_PATH})
    (output,) = notebook.cells[0].outputs
    assert output["data"]["text/plain"].startswith("training: 4 epochs, train_loss")


TUNING: dict[str, Any] = {"epochs": 2, "batch_size": 16, "image_size": 32, "lr": 3e-4, "gentle": True}
SPEC = MaskSpec(("B04", "B08", "B11", "B12"))


def in_two(teacher: nn.Module, pack: packs.Pack, path: Path, **options: Any) -> Run:
    """As notebook 03 does: processes leave the checkpoint that is read here."""
    fill, options = fill_values("dataset_mean", torch.tensor(pack.band_means())), {**TUNING, **options}
    train.in_processes(align.part, 2, CPU, teacher, pack.path, SPEC, fill, {**options, "checkpoint": path})
    return align.fine_tune(teacher, pack, SPEC, fill, compute=CPU, **options, checkpoint=path)


@pytest.mark.slow
@pytest.mark.parametrize("objective", [Objective(), Objective.of("both", distance=0.5)], ids=["clip", "all terms"])
def test_two_processes_give_the_loss_of_one(objective, pack, tmp_path):
    """Encoders compute in float64; the loss is float32, and sums over images come in another order.

    Batch norms keep the teacher's statistics, else each process would take those of its own images.
    """
    teacher, fill = models.InDouble(settled_encoder(pack)), fill_values("dataset_mean", torch.tensor(pack.band_means()))
    alone = align.fine_tune(teacher, pack, SPEC, fill, compute=CPU, objective=objective, **TUNING)
    together = in_two(teacher, pack, tmp_path / "two.pt", objective=objective)
    assert epochs_in(only(tmp_path)) == 2
    for column in alone[1].columns:
        assert together[1][column].tolist() == pytest.approx(alone[1][column].tolist(), rel=1e-5, nan_ok=True)
    moved = max_apart(alone[0], teacher)
    assert max_apart(together[0], alone[0]) < 0.01 * moved


def max_apart(first: nn.Module, second: nn.Module) -> float:
    other = second.state_dict()
    return max(float((value - other[name]).abs().max()) for name, value in first.state_dict().items())


@pytest.mark.slow
def test_several_processes_refuse_what_they_cannot_share(pack, tmp_path):
    features = {"objective": Objective.of("features")}
    for options, said in (({"gentle": False}, "batch norms"), ({"batch_size": 15}, "15"), (features, "every weight")):
        with pytest.raises(ValueError, match=said):
            in_two(settled_encoder(pack), pack, tmp_path / "two.pt", **options)
    with pytest.raises(ValueError, match="processes is 2 or more"):
        train.in_processes(align.part, 0, CPU)


FOR_EVER = """
import sys
from pathlib import Path

def work(compute, folder):
    import torch  # not above: a process imports its script first

    while True:
        compute.gather(torch.ones(2, 4, requires_grad=True)).sum().backward()
        (folder / f"rank{compute.shard[0]}").touch()

if __name__ == "__main__":
    import script
    from bandmask import train
    train.in_processes(script.work, 2, train.Compute.of("cpu"), Path(sys.argv[1]))
"""


@contextlib.contextmanager
def two_for_ever(folder: Path) -> Iterator[psutil.Process]:
    """A process that has two others train without end."""
    (folder / "script.py").write_text(FOR_EVER)
    parent = psutil.Popen([sys.executable, str(folder / "script.py"), str(folder)], env={**os.environ, **ON_PATH})
    try:
        yield parent
    finally:
        parent.kill()
        parent.wait()


def alive(processes: list[psutil.Process]) -> list[psutil.Process]:
    return [one for one in processes if one.is_running() and one.status() != "zombie"]


@pytest.mark.slow
@pytest.mark.parametrize("training", [True, False])
def test_processes_listen_on_the_loopback_alone_and_end_with_who_wanted_them(training, tmp_path):
    """Whoever reaches a meeting place on the network can have it run code. Those that still import end too."""
    with two_for_ever(tmp_path) as parent:
        there = (lambda: len(list(tmp_path.glob("rank?"))) == 2) if training else parent.children
        until(lambda: there() or not parent.is_running(), 240)
        family = parent.children(recursive=True)
        sockets = [socket for one in (parent, *family) for socket in one.net_connections("inet")]
        assert family
        assert any(socket.status == "LISTEN" for socket in sockets) == training, "two that train talk to each other"
        assert {socket.laddr.ip for socket in sockets} <= {"127.0.0.1", "::1"}, sockets
    until(lambda: not alive(family), 5)
