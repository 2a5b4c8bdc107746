"""The one loop: device, precision, seeds, a checkpoint each epoch, and going on from it to the same figures.

Several processes train one model as a single one would, by torch's own means: each takes its part of every batch.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import math
import os
import pickle
import re
import socket
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from bandmask import files

SECONDS = 2.0  # between two states of the progress line
_TRACKED: list[Path] = []  # where `track` has TensorBoard write, if anywhere
_NO_MEMORY = ("CUDA error: out of memory", "_STATUS_ALLOC_FAILED", "DefaultCPUAllocator: can't allocate memory")


@dataclass(frozen=True)
class Compute:
    """Where and how to compute."""

    device: torch.device
    amp: bool = False  # bfloat16, on CUDA only: CPUs without native bfloat16 emulate it, 10 to 40 times slower
    channels_last: bool = False  # memory format that convolutions prefer on CUDA
    compile: bool = False  # by `torch.compile`
    shard: tuple[int, int] = (0, 1)  # rank and number of processes, for `Batches(shard=…)`: the part of each batch

    @classmethod
    def of(cls, device: str = "auto", *, compile: bool | None = None) -> Compute:
        """A GPU with bfloat16, channels-last and `torch.compile`, or a CPU in float32; a ValueError if it lacks."""
        chosen = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
        try:
            torch.empty(0, device=chosen)
        except (RuntimeError, AssertionError) as error:
            raise ValueError(f"device {device!r} can't be used ({error}); try 'auto' or 'cpu'") from error
        on_gpu = torch.device(chosen).type == "cuda"
        return cls(torch.device(chosen), on_gpu, on_gpu, on_gpu if compile is None else compile)

    def place(self, model: nn.Module) -> nn.Module:
        """The model on the device in the chosen memory format; the same object."""
        return (model.to(memory_format=torch.channels_last) if self.channels_last else model).to(self.device)

    def faster(self, model: nn.Module) -> Callable[..., Any]:
        """What to call in the loop: compiled if so chosen, joined to other processes; parameters are the model's."""
        if self.shard[1] > 1 and any(parameter.requires_grad for parameter in model.parameters()):
            if self.device.type == "cuda":
                from timm.layers import convert_sync_batchnorm  # torch's would drop timm's activations

                model = convert_sync_batchnorm(model)
            return nn.parallel.DistributedDataParallel(model)
        return torch.compile(model) if self.compile else model

    def images(self, images: Tensor) -> Tensor:
        """A batch in the chosen memory format."""
        return images.contiguous(memory_format=torch.channels_last) if self.channels_last else images

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Context of a forward pass."""
        return torch.autocast(self.device.type, torch.bfloat16) if self.amp else contextlib.nullcontext()

    def gather(self, part: Tensor) -> Tensor:
        """The rows of all processes, (processes · B, …), in the order of ranks; the gradient is of the whole batch."""
        if self.shard[1] == 1:
            return part
        from torch.distributed.nn.functional import all_gather

        return torch.cat(all_gather(part))


def weights_checksum(model: nn.Module) -> str:
    """SHA-256 of a model's parameters and buffers: tells two encoders of one name apart."""
    return _digest("", model.state_dict())


def fill_checksum(fill: Tensor | Callable[..., Any]) -> str:
    """SHA-256 of what stands in hidden pixels: values per band, or a fitted function with its coefficients."""
    parts = {"": fill} if isinstance(fill, Tensor) else {k: v for k, v in vars(fill).items() if isinstance(v, Tensor)}
    return _digest(type(fill).__name__, parts)


def _digest(name: str, tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(name.encode())
    for part, tensor in sorted(tensors.items()):
        digest.update(part.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def adamw(model: nn.Module, *, lr: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW without weight decay on biases and norms, as SatCLIP uses it; a ValueError if `lr` would train nothing."""
    if not 0 < lr < math.inf:
        raise ValueError(f"lr is above 0 and finite, such as 0.0001; got {lr}")
    parameters = [p for p in model.parameters() if p.requires_grad]
    decayed, plain = [p for p in parameters if p.ndim > 1], [p for p in parameters if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": float(weight_decay)}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=float(lr))


def fit(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Callable[[int], Iterable[Any]],
    loss: Callable[[Any, int], Tensor],
    *,
    epochs: int,
    key: Mapping[str, Any],
    watch: Callable[[], Mapping[str, float]] = dict,
    path: Path | None = None,
    compute: Compute | None = None,
    label: str = "training",
) -> pd.DataFrame:
    """Train, and keep what is needed to go on after any interruption.

    Everything random in an epoch must be a function of its number (`batches`, masks); torch's own generator is
    seeded from it too. So a run that was killed and goes on gives the figures of one that was not, on one machine.

    Args:
        model: its parameters and buffers are kept; those that require a gradient are trained.
        optimizer: over them.
        batches: `batches(epoch)` gives the batches of a 0-based epoch.
        loss: `loss(batch, epoch)` gives a scalar.
        epochs: 1 or more.
        key: everything that decides the result, JSON-able: `batch_size`, `image_size`, `seed`, data, weights, code. A
            mark of it is added to the checkpoint's name: another key is another training beside this one.
        watch: figures after each epoch, and before the first.
        path: `fine_tuning.pt`, written after each epoch as `fine_tuning-1f3a9c20.pt`; None keeps nothing.
        compute: device and precision.
        label: for the progress line and `track`.

    Returns:
        One row an epoch, from 0 (before training): `epoch`, `train_loss` (mean over images), and what `watch` gave.
        The model is left in eval mode.

    Raises:
        ValueError: no epoch or image to train on; a checkpoint that is damaged or of another model.
        FloatingPointError: loss or weights are not finite; the checkpoint of the epoch before is kept.
        MemoryError: the batch doesn't fit.
    """
    compute = compute or Compute.of("cpu")
    sizes = {name: key.get(name) for name in ("batch_size", "image_size")}
    for name, count in {"epochs": epochs, **sizes}.items():
        if count is not None and count < 1:
            raise ValueError(f"{label}: {name} is 1 or more, got {count}")
    written = json.dumps({**key, "epochs": epochs}, sort_keys=True, default=str)
    path = path and path.with_name(f"{path.stem}-{hashlib.sha256(written.encode()).hexdigest()[:8]}{path.suffix}")
    history = _resume(path, model, optimizer) if path and path.exists() else []
    rank, processes = compute.shard
    line = _Line(label, epochs, max(len(history) - 1, 0), silent=rank > 0)
    board: Any = _board(label) if _TRACKED else None

    def row_of(epoch: int, loss: float) -> dict[str, Any]:  # Python's floats: numpy's would have to be unpickled
        return {"epoch": epoch, "train_loss": loss, **{name: float(value) for name, value in watch().items()}}

    def log(row: Mapping[str, float]) -> None:
        for figure in row.keys() - {"epoch"} if board else ():
            board.add_scalar(figure, row[figure], int(row["epoch"]))

    with explain_out_of_memory(label, sizes["batch_size"] or 0, image_size=sizes["image_size"]):
        model.eval()
        history = history or [row_of(0, math.nan)]
        for row in history:  # a log that was cut off has them again, and none twice
            log(row)
        for epoch in range(len(history) - 1, epochs):
            torch.manual_seed(int(key.get("seed", 0)) * 1_000_003 + epoch)
            model.train()
            images, total = 0, torch.zeros((), device=compute.device)
            for batch in batches(epoch):
                optimizer.zero_grad(set_to_none=True)
                value = loss(batch, epoch)
                value.backward()
                optimizer.step()
                size = len(getattr(batch, "samples", batch)) * processes
                total += value.detach() * size  # stays on the device: reading it each step would stall the queue
                images += size
                line.step(size, epoch, history[-1])
            if processes > 1:
                torch.distributed.all_reduce(total)
            mean = float(total) / processes / max(images, 1)
            broken = [name for name, tensor in model.state_dict().items() if not tensor.isfinite().all()]
            if not math.isfinite(mean) or broken:
                what = f"weights {', '.join(broken[:3])} are not finite" if math.isfinite(mean) else f"loss is {mean}"
                raise FloatingPointError(
                    f"{label}: after epoch {epoch + 1} the {what}; lower the learning rate, or look for NaN in the "
                    f"images. The checkpoint of epoch {epoch} is kept."
                )
            model.eval()
            history.append(row_of(epoch + 1, mean))
            log(history[-1])
            if path and rank == 0:
                _save(path, model, optimizer if epoch + 1 < epochs else None, history)  # finished, it is only read
    line.show(f"{epochs} epochs", history[-1], last=True)
    if board:
        board.close()
    return pd.DataFrame(history)


def _save(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer | None, history: list[dict[str, Any]]) -> None:
    state = {"model": model.state_dict(), "optimizer": optimizer and optimizer.state_dict(), "history": history}
    with files.writing(path) as partial, partial.open("wb") as file:
        try:
            torch.save(state, file)
        except RuntimeError as error:  # torch reports a full disk as a failed write of its own
            cause = error.__context__
            raise (cause if isinstance(cause, OSError) else OSError(f"writing failed: {error}")) from error


def _resume(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    try:
        with zipfile.ZipFile(path) as archive:
            if damaged := archive.testzip():  # torch doesn't look at checksums
                raise ValueError(f"{damaged} is not what was written")
        state = torch.load(path, map_location="cpu", weights_only=True)
        model.load_state_dict(state["model"])
        if state["optimizer"] is not None:
            optimizer.load_state_dict(state["optimizer"])
        return list(state["history"])
    except Exception as error:  # torch, zip and pickle each have their own
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"checkpoint {path} is damaged or another model's ({reason}); delete it") from error


@contextlib.contextmanager
def explain_out_of_memory(what: str, batch_size: int, *, image_size: int | None = None) -> Iterator[None]:
    """Turn torch's out-of-memory errors inside the block into a `MemoryError` that names the batch and the way out."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and not any(sign in str(error) for sign in _NO_MEMORY):
            raise
        size = f"batch_size {batch_size}" + (f" and image_size {image_size}" if image_size else "")
        raise MemoryError(
            f"{what}: {size} do not fit in memory; lower {'one of them' if image_size else 'it'}"
        ) from error


class _Line:
    """How far a training is, in a line that rewrites itself; an executed notebook or a log keeps its last state."""

    def __init__(self, label: str, epochs: int, done: int, *, silent: bool) -> None:
        shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
        self.label, self.epochs, self.silent, self.kernel = label, epochs, silent, hasattr(shell, "kernel")
        self.first, self.done, self.images = done, done, 0
        self.handle: Any = None
        self.began = self.ended = self.told = time.perf_counter()

    def step(self, images: int, done: int, row: Mapping[str, float]) -> None:
        """So many more images are through, `done` epochs are, and `row` is the last of the history."""
        self.images, now = self.images + images, time.perf_counter()
        if done > self.done:
            self.done, self.ended = done, now
        if now - self.told > SECONDS:
            self.told, each = now, (self.ended - self.began) / max(done - self.first, 1)
            left = f", {each * (self.epochs - done) - now + self.ended:.0f} s left" if each else ""
            self.show(f"epoch {done + 1} of {self.epochs}, {self.images / (now - self.began):.0f} images/s{left}", row)

    def show(self, state: str, row: Mapping[str, float], *, last: bool = False) -> None:
        figures = [f"{name} {value:.3g}" for name, value in row.items() if name != "epoch" and not math.isnan(value)]
        text = ", ".join([f"{self.label}: {state}", *figures[:6]])
        if self.silent:
            return
        if self.kernel:
            from IPython.display import display

            if self.handle is None:
                self.handle = display({"text/plain": text}, raw=True, display_id=True)
            else:
                self.handle.update({"text/plain": text}, raw=True)
        elif sys.stderr.isatty() or last:
            start, end = ("\r\x1b[K", "\n" if last else "") if sys.stderr.isatty() else ("", "\n")
            print(start + text, end=end, file=sys.stderr, flush=True)


def track(kind: str, folder: Path | str, name: str, parameters: Mapping[str, Any]) -> None:
    """From now on have the figures of every epoch in TensorBoard too, a run a training below `<folder>/tensorboard`.

    Args:
        kind: "tensorboard", or "" for nothing; a ValueError for another word.
        folder: of the run.
        name: of what is trained there, such as `alignment`.
        parameters: of the run.
    """
    if kind not in ("", "tensorboard"):
        raise ValueError(f"unknown tracking {kind!r}; available: 'tensorboard', or '' for none")
    _TRACKED.clear()
    if kind:
        _TRACKED.append(Path(folder) / "tensorboard" / name)
        table = ["| parameter | value |", "| --- | --- |", *(f"| {k} | `{v!r}` |" for k, v in parameters.items())]
        _board("").add_text("parameters", "\n".join(table))


def _board(label: str) -> Any:
    """A new TensorBoard run; what an earlier attempt logged is void, since every row comes again."""
    from torch.utils.tensorboard import SummaryWriter

    place = _TRACKED[0] / re.sub(r"[^\w .,=+-]", "_", label).lstrip(".")
    for earlier in place.glob("events.out.tfevents.*"):
        earlier.unlink()
    return SummaryWriter(str(place))


def in_processes(function: Callable[..., object], processes: int, compute: Compute, *arguments: Any) -> None:
    """Call `function(compute, *arguments)` in several processes of this machine, one a GPU, and wait for them.

    They meet in a file that is this user's alone, talk over the loopback interface alone, and end with this process.
    Dropout and stochastic depth draw other numbers than in one process; on GPUs batch norms take the statistics of the
    whole batch.

    Args:
        function: of a module, such as `align.fine_tune`; its result is lost, its checkpoint stays.
        processes: 2 or more.
        compute: its device's kind.
        arguments: pickled for the processes.

    Raises:
        ValueError: fewer GPUs than processes.
        RuntimeError: a process failed; says how.
    """
    kind, gpus = compute.device.type, torch.cuda.device_count()
    if processes < 2 or (kind == "cuda" and processes > gpus):
        raise ValueError(f"processes is 2 or more, and one a GPU ({gpus} visible); got {processes} on {kind}")
    with tempfile.TemporaryDirectory(prefix="bandmask-") as folder:
        threads, work, running = max(1, torch.get_num_threads() // processes), Path(folder) / "work", []
        given = functools.partial(_join, Path(folder), processes, kind, threads, function, arguments)
        work.write_bytes(pickle.dumps(sys.path) + pickle.dumps(given))
        try:
            for rank in range(processes):
                command = [sys.executable, "-P", "-c", _PROCESS, str(os.getpid()), str(rank)]
                with work.open("rb") as stdin:
                    running.append(subprocess.Popen(command, stdin=stdin))
            work.unlink()  # they hold it open; nothing is left of it should this process be killed
            while None in (codes := [process.poll() for process in running]) and not any(codes):
                time.sleep(0.1)
        finally:
            for process in running:
                process.kill()
                process.wait()
        if failed := [code for code in codes if code]:
            said = Path(folder) / "failed"
            why = said.read_text(encoding="utf-8") if said.exists() else f"it ended with {failed[0]}"
            raise RuntimeError(f"one of {processes} processes failed: {why}")


# What a process begins with: before it imports anything that takes long, its end is tied to its parent's.
_PROCESS = """
import ctypes, os, pickle, signal, sys
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
if os.getppid() != int(sys.argv[1]):
    sys.exit("the process that started this one is gone")
sys.path[:] = pickle.load(sys.stdin.buffer)
pickle.load(sys.stdin.buffer)(int(sys.argv[2]))
"""


def _join(folder: Path, processes: int, kind: str, threads: int, function: Any, given: Any, rank: int) -> None:
    """What each of several processes does."""
    loopback = next(name for _, name in socket.if_nameindex() if name.startswith("lo"))
    os.environ |= {"GLOO_SOCKET_IFNAME": loopback, "NCCL_SOCKET_IFNAME": loopback}
    torch.set_num_threads(threads)
    backend, device = ("nccl", f"cuda:{rank}") if kind == "cuda" else ("gloo", "cpu")
    try:
        if kind == "cuda":
            torch.cuda.set_device(rank)
        meeting = f"file://{folder}/meeting"
        torch.distributed.init_process_group(backend, init_method=meeting, rank=rank, world_size=processes)
        # Not compiled: batch norms talk to the other processes in the middle of the graph, and nobody has tested that.
        function(replace(Compute.of(device, compile=False), shard=(rank, processes)), *given)
    except Exception as error:
        with contextlib.suppress(FileExistsError), (folder / "failed").open("x", encoding="utf-8") as file:
            file.write(f"{type(error).__name__}: {error}")  # of the first one; the others then fail for want of it
        raise
    torch.distributed.destroy_process_group()
