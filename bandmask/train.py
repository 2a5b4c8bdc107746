"""The one loop: device, precision, seeds, a checkpoint each epoch, and going on from it to the same figures.

Several processes train one model as a single one would, by torch's own means: each takes its part of every batch.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import math
import multiprocessing
import os
import socket
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from bandmask import files

SECONDS = 2.0  # between two states of the progress line


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


def seed_of(seed: int, epoch: int, step: int = 1_000_003) -> int:
    """A seed for an epoch of a training, which torch takes whatever the seed is."""
    return (int(seed) * step + epoch) % 2**63


def weights_checksum(model: nn.Module) -> str:
    """SHA-256 of a model's parameters and buffers, and of what one for every loss fills and mixes by."""
    mixing = [part for part in model.modules() if {"fill", "gate"} <= {*vars(part)}]
    return _digest("".join(f"{fill_checksum(part.fill)} {part.gate}" for part in mixing), model.state_dict())


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
        batches: `batches(epoch)` gives the batches of a 0-based epoch.
        loss: `loss(batch, epoch)` gives a scalar.
        key: everything beside the model's first weights that decides the result, JSON-able: `batch_size`, `image_size`,
            `seed`, data, code. A mark of both is added to the checkpoint's name: another key is another training.
        watch: figures after each epoch, and before the first.
        path: `fine_tuning.pt`, written after each epoch as `fine_tuning-1f3a9c20.pt`; None keeps nothing.

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
        if count is not None and (not hasattr(count, "__index__") or count < 1):
            raise ValueError(f"{label}: {name} is 1 or more, got {count!r}")
    mark = files.checksum_of({**key, "epochs": epochs, "weights": weights_checksum(model)})[:8] if path else ""
    path = Path(path).with_name(f"{Path(path).stem}-{mark}{Path(path).suffix}") if path else None
    history = _resume(path, model, optimizer) if path and path.exists() else []
    rank, processes = compute.shard
    line = _Line(label, epochs) if rank == 0 else None

    def row_of(epoch: int, loss: float) -> dict[str, Any]:  # Python's floats: numpy's would have to be unpickled
        return {"epoch": epoch, "train_loss": loss, **{name: float(value) for name, value in watch().items()}}

    model.eval()
    history = history or [row_of(0, math.nan)]
    for epoch in range(len(history) - 1, epochs):
        torch.manual_seed(seed_of(key.get("seed", 0), epoch))
        model.train()
        images, total = 0, torch.zeros((), device=compute.device)
        for batch in batches(epoch):
            optimizer.zero_grad(set_to_none=True)
            try:
                value = loss(batch, epoch)
                value.backward()
            except torch.OutOfMemoryError as error:
                asked = " and ".join(f"{name} {count}" for name, count in sizes.items())
                raise MemoryError(f"{label}: {asked} do not fit in memory; lower one of them") from error
            optimizer.step()
            size = len(getattr(batch, "samples", batch)) * processes
            total += value.detach() * size  # stays on the device: reading it each step would stall the queue
            images += size
            if line:
                line.step(size, epoch, history[-1])
        if processes > 1:
            torch.distributed.all_reduce(total)
        mean = float(total) / processes / max(images, 1)
        broken = [name for name, tensor in model.state_dict().items() if not tensor.isfinite().all()]
        if not math.isfinite(mean) or broken:
            what = f"weights {', '.join(broken[:3])} are not finite" if math.isfinite(mean) else f"loss is {mean}"
            said = f"{label}: after epoch {epoch + 1} the {what}; the checkpoint of epoch {epoch} is kept"
            raise FloatingPointError(f"{said}. Lower the learning rate, or look for NaN: a band that the pack lacks?")
        model.eval()
        history.append(row_of(epoch + 1, mean))
        if path and rank == 0:
            kept = optimizer.state_dict() if epoch + 1 < epochs else None  # finished, it is only read
            content = io.BytesIO()  # to a file torch would report a full disk as an error of its own
            torch.save({"model": model.state_dict(), "optimizer": kept, "history": history}, content)
            with files.writing(path) as partial:
                partial.write_bytes(content.getbuffer())
    if line:
        line.show(f"{epochs} epochs", history[-1], last=True)
    return pd.DataFrame(history)


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


class _Line:
    """How far a training is, in a line that rewrites itself; an executed notebook or a log keeps its last state."""

    def __init__(self, label: str, epochs: int) -> None:
        shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
        self.label, self.epochs, self.kernel, self.handle = label, epochs, hasattr(shell, "kernel"), None
        self.images, self.began = 0, time.perf_counter()
        self.told = self.began

    def step(self, images: int, done: int, row: Mapping[str, float]) -> None:
        """So many more images are through, `done` epochs are, and `row` is the last of the history."""
        self.images, now = self.images + images, time.perf_counter()
        if now - self.told > SECONDS:
            self.told, speed = now, self.images / (now - self.began)
            self.show(f"epoch {done + 1} of {self.epochs}, {speed:.0f} images/s", row)

    def show(self, state: str, row: Mapping[str, float], *, last: bool = False) -> None:
        figures = [f"{name} {value:.3g}" for name, value in row.items() if name != "epoch" and not math.isnan(value)]
        text = ", ".join([f"{self.label}: {state}", *figures[:6]])
        if self.kernel:
            from IPython.display import display

            if self.handle is None:
                self.handle = display({"text/plain": text}, raw=True, display_id=True)
            else:
                self.handle.update({"text/plain": text}, raw=True)
        elif sys.stderr.isatty():
            print(f"\r\x1b[K{text}", end="\n" if last else "", file=sys.stderr, flush=True)
        elif last:
            print(text, file=sys.stderr, flush=True)


def in_processes(function: Callable[..., object], processes: int, compute: Compute, *arguments: Any) -> None:
    """Call `function(compute, *arguments)` in several processes of this machine, one a GPU, and wait for them.

    They meet in a file that is this user's alone, talk over the loopback interface alone, and end with this process.
    Dropout and stochastic depth draw other numbers than in one process; on GPUs batch norms take the statistics of the
    whole batch. The function is a module's, such as `align.part`; its result is lost, its checkpoint stays. A
    ValueError where there are fewer GPUs than processes, or whatever a process raised.
    """
    kind, gpus = compute.device.type, torch.cuda.device_count()
    if processes < 2 or (kind == "cuda" and processes > gpus):
        raise ValueError(f"processes is 2 or more, and one a GPU ({gpus} visible); got {processes} on {kind}")
    others, spawn = multiprocessing.active_children(), multiprocessing.get_context("spawn")
    with (
        tempfile.TemporaryDirectory(prefix="bandmask-") as folder,
        ProcessPoolExecutor(processes, spawn, files.end_with_parent) as pool,
    ):
        given = (processes, kind, max(1, torch.get_num_threads() // processes), folder, function, arguments)
        try:
            for done in as_completed([pool.submit(_join, rank, *given) for rank in range(processes)]):
                done.result()
        except BaseException:  # the others would wait for the one that failed
            for process in set(multiprocessing.active_children()) - set(others):
                process.kill()
            raise


def _join(rank: int, processes: int, kind: str, threads: int, folder: str, function: Any, given: Any) -> None:
    """What each of several processes does."""
    loopback = next(name for _, name in socket.if_nameindex() if name.startswith("lo"))
    os.environ |= {"GLOO_SOCKET_IFNAME": loopback, "NCCL_SOCKET_IFNAME": loopback}
    torch.set_num_threads(threads)
    device = torch.device(kind, rank) if kind == "cuda" else torch.device(kind)
    if kind == "cuda":
        torch.cuda.set_device(rank)
    backend, meeting = "nccl" if kind == "cuda" else "gloo", f"file://{folder}/meeting"
    torch.distributed.init_process_group(backend, init_method=meeting, rank=rank, world_size=processes)
    # Not compiled: batch norms talk to the other processes in the middle of the graph, and nobody has tested that.
    function(Compute(device, kind == "cuda", kind == "cuda", shard=(rank, processes)), *given)
    torch.distributed.destroy_process_group()
