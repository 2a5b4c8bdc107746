"""The one loop: device, precision, seeds, a checkpoint each epoch, and going on from it to the same figures.

Several processes train one model as a single one would, by Lightning Fabric: each takes its part of every batch.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
import math
import os
import re
import signal
import socket
import sys
import tempfile
import time
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from torch import Tensor, nn

from bandmask import files

if TYPE_CHECKING:
    from lightning.fabric import Fabric

ENVIRONMENT = "BANDMASK_PROGRESS"  # names a JSON file that says how far the training is; who runs a notebook sets it
SECONDS = 2.0  # between two writes of that file
LISTENERS: list[Callable[[str, Mapping[str, float]], object]] = []  # get (label, row of the history), from epoch 0 on
_NO_MEMORY = ("CUDA error: out of memory", "_STATUS_ALLOC_FAILED", "DefaultCPUAllocator: can't allocate memory")


@dataclass(frozen=True)
class Compute:
    """Where and how to compute.

    Attributes:
        device: `cpu`, `cuda`, `cuda:1`.
        amp: bfloat16 autocast. On CUDA only: CPUs without native bfloat16 emulate it, 10 to 40 times slower.
        channels_last: memory format that convolutions prefer on CUDA.
        compile: `torch.compile` the models.
        fabric: of a process among several (`in_processes`).
    """

    device: torch.device
    amp: bool = False
    channels_last: bool = False
    compile: bool = False
    fabric: Fabric | None = None

    @classmethod
    def of(cls, device: str = "auto", *, compile: bool | None = None) -> Compute:
        """CUDA with bfloat16, channels-last and `torch.compile` if there is a GPU; plain float32 on a CPU.

        Raises:
            ValueError: a device that this machine lacks.
        """
        chosen = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
        try:
            torch.empty(0, device=chosen)
        except (RuntimeError, AssertionError) as error:
            raise ValueError(f"device {device!r} can't be used ({error}); try 'auto' or 'cpu'") from error
        on_gpu = torch.device(chosen).type == "cuda"
        return cls(torch.device(chosen), on_gpu, on_gpu, on_gpu if compile is None else compile)

    def place(self, model: nn.Module) -> nn.Module:
        """The model on the device in the chosen memory format; the same object."""
        if self.channels_last:
            model = model.to(memory_format=torch.channels_last)
        return model.to(self.device)

    def faster(self, model: nn.Module) -> Callable[..., Any]:
        """What to call in the loop: compiled if so chosen, joined to other processes; parameters are the model's."""
        if self.fabric and any(parameter.requires_grad for parameter in model.parameters()):
            if self.device.type == "cuda":
                from timm.layers import convert_sync_batchnorm  # torch's would drop timm's activations

                model = convert_sync_batchnorm(model)
            return self.fabric.setup_module(model, move_to_device=False)
        return torch.compile(model) if self.compile else model

    def images(self, images: Tensor) -> Tensor:
        """A batch in the chosen memory format."""
        return images.contiguous(memory_format=torch.channels_last) if self.channels_last else images

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Context of a forward pass."""
        return torch.autocast(self.device.type, torch.bfloat16) if self.amp else contextlib.nullcontext()

    @property
    def shard(self) -> tuple[int, int]:
        """(rank, processes), for `Batches(shard=…)`: this process' part of each batch."""
        return (self.fabric.global_rank, self.fabric.world_size) if self.fabric else (0, 1)

    def gather(self, part: Tensor) -> Tensor:
        """The rows of all processes, (processes · B, …), in the order of ranks; the gradient is of the whole batch."""
        if self.fabric is None:
            return part
        gathered = self.fabric.all_gather(part, sync_grads=part.requires_grad)
        assert isinstance(gathered, Tensor)
        return gathered.flatten(0, 1)


def weights_checksum(model: nn.Module) -> str:
    """SHA-256 of a model's parameters and buffers: tells two encoders of one name apart."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def fill_checksum(fill: Tensor | Callable[..., Any]) -> str:
    """SHA-256 of what stands in hidden pixels: values per band, or a fitted function with its coefficients."""
    parts = {"": fill} if isinstance(fill, Tensor) else {k: v for k, v in vars(fill).items() if isinstance(v, Tensor)}
    digest = hashlib.sha256(type(fill).__name__.encode())
    for name, tensor in sorted(parts.items()):
        digest.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def adamw(model: nn.Module, *, lr: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW without weight decay on biases and norms, as SatCLIP uses it.

    Raises:
        ValueError: a learning rate that trains nothing.
    """
    if not 0 < lr < math.inf:
        raise ValueError(f"lr is above 0 and finite, such as 0.0001; got {lr}")
    parameters = [p for p in model.parameters() if p.requires_grad]
    decayed = [p for p in parameters if p.ndim > 1]
    plain = [p for p in parameters if p.ndim <= 1]
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
        key: everything that decides the result, JSON-able: parameters, data, weights, code. `batch_size`,
            `image_size` and `seed` are known by these names. A mark of it is added to the checkpoint's name: another
            key is another training beside this one, and whoever goes back to the old one finds it again.
        watch: figures after each epoch, and before the first.
        path: `fine_tuning.pt`, written after each epoch as `fine_tuning-1f3a9c20.pt`; None keeps nothing.
        compute: device and precision.
        label: for the progress line and `LISTENERS`.

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
    progress = _Progress(label, epochs, silent=rank > 0)
    with explain_out_of_memory(label, sizes["batch_size"] or 0, image_size=sizes["image_size"]):
        model.eval()
        history = history or [{"epoch": 0, "train_loss": math.nan, **_plain(watch())}]
        for row in history:  # a log that was cut off has them again, and none twice
            progress.listen(row)
        for epoch in range(len(history) - 1, epochs):
            torch.manual_seed(int(key.get("seed", 0)) * 1_000_003 + epoch)
            model.train()
            images, total = 0, torch.zeros((), device=compute.device)
            progress.begin(epoch + 1)
            for batch in batches(epoch):
                optimizer.zero_grad(set_to_none=True)
                value = loss(batch, epoch)
                value.backward()
                optimizer.step()
                size = len(getattr(batch, "samples", batch)) * processes
                total += value.detach() * size  # stays on the device: reading it each step would stall the queue
                images += size
                progress.tell(images, history[-1])
            total = compute.fabric.all_reduce(total, reduce_op="mean") if compute.fabric else total  # type: ignore[assignment]
            mean = float(total) / max(images, 1)
            broken = [name for name, tensor in model.state_dict().items() if not tensor.isfinite().all()]
            if not math.isfinite(mean) or broken:
                what = f"weights {', '.join(broken[:3])} are not finite" if math.isfinite(mean) else f"loss is {mean}"
                raise FloatingPointError(
                    f"{label}: after epoch {epoch + 1} the {what}; lower the learning rate, or look for NaN in the "
                    f"images. The checkpoint of epoch {epoch} is kept."
                )
            model.eval()
            history.append({"epoch": epoch + 1, "train_loss": mean, **_plain(watch())})
            progress.tell(images, history[-1], done=True)
            progress.listen(history[-1])
            if path and rank == 0:
                finished = epoch + 1 == epochs  # a finished run is only read again: it needs no optimizer state
                _save(path, model, None if finished else optimizer, history)
    progress.end(history[-1])
    return pd.DataFrame(history)


def _plain(figures: Mapping[str, float]) -> dict[str, float]:
    """Figures as Python floats: a checkpoint is loaded without unpickling, which numpy's would need."""
    return {name: float(value) for name, value in figures.items()}


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
def explain_out_of_memory(
    what: str, batch_size: int, *, image_size: int | None = None, advice: str = ""
) -> Iterator[None]:
    """Turn torch's out-of-memory errors inside the block into a `MemoryError` that names the batch and the way out."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and not any(sign in str(error) for sign in _NO_MEMORY):
            raise
        size = f"batch_size {batch_size}" + (f" and image_size {image_size}" if image_size else "")
        lower = "lower one of them" if image_size else "lower it"
        raise MemoryError(f"{what}: {size} do not fit in memory; {lower}. {advice}".strip()) from error


class _Progress:
    """How far a training is: one line that rewrites itself, the file of `ENVIRONMENT`, and `LISTENERS`.

    In a notebook the line is one output, of which the executed copy keeps the last state; a log gets only the last.
    """

    def __init__(self, label: str, epochs: int, *, silent: bool = False) -> None:
        shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
        self.label, self.epochs, self.silent, self.kernel = label, epochs, silent, hasattr(shell, "kernel")
        self.handle: Any = None
        self.epoch, self.began, self.told, self.durations = 0, 0.0, -math.inf, list[float]()

    def begin(self, epoch: int) -> None:
        self.epoch, self.began = epoch, time.perf_counter()

    def tell(self, images: int, row: Mapping[str, float], *, done: bool = False) -> None:
        """So many images of this epoch are through, and `row` is the last of the history."""
        now = time.perf_counter()
        if self.silent or (now - self.told < SECONDS and not done):
            return
        self.told, spent = now, now - self.began
        if done:
            self.durations.append(spent)
        each = sum(self.durations) / len(self.durations) if self.durations else math.nan
        left = each * (self.epochs - self.epoch + (not done)) - (0 if done else min(spent, each))
        event = {"label": self.label, "epoch": self.epoch, "epochs": self.epochs, "loss": row["train_loss"]}
        event |= {"images_per_second": images / spent, "seconds_left": left, "steady": bool(self.durations)}
        event |= {"updated": datetime.now(UTC).isoformat(timespec="seconds")}
        self._show(f"epoch {self.epoch} of {self.epochs}, {images / spent:.0f} images/s, {left:.0f} s left", row)
        if file := os.environ.get(ENVIRONMENT):
            with contextlib.suppress(OSError), files.writing(file) as partial:  # what watches must not stop a training
                partial.write_text(json.dumps({**_json(event), "figures": _json(row)}), encoding="utf-8")

    def end(self, row: Mapping[str, float]) -> None:
        """The line's last state."""
        self._show(f"{self.epochs} epochs", row, last=True)

    def listen(self, row: Mapping[str, float]) -> None:
        """Hand a row to all who listen; whoever fails is warned of and left out, and the training goes on."""
        for listener in [] if self.silent else list(LISTENERS):
            try:
                listener(self.label, row)
            except Exception as error:
                LISTENERS.remove(listener)
                warnings.warn(
                    f"{listener!r} failed and is asked no more: {type(error).__name__}, {error}", stacklevel=3
                )

    def _show(self, state: str, row: Mapping[str, float], *, last: bool = False) -> None:
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
        elif sys.stderr.isatty():
            print(f"\r\x1b[K{text}", end="\n" if last else "", file=sys.stderr, flush=True)
        elif last:
            print(text, file=sys.stderr, flush=True)


def _json(values: Mapping[str, Any]) -> dict[str, Any]:
    """Without NaN and infinity, which JSON can't hold."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}


class _TensorBoard:
    """A listener that writes a TensorBoard run a training, `<folder>/<label>`, a scalar a figure."""

    def __init__(self, folder: Path, parameters: Mapping[str, Any]) -> None:
        self.folder, self.writers = folder, dict[str, Any]()
        table = ["| parameter | value |", "| --- | --- |", *(f"| {k} | `{v!r}` |" for k, v in parameters.items())]
        self._writer("").add_text("parameters", "\n".join(table))

    def __call__(self, label: str, row: Mapping[str, float]) -> None:
        writer = self._writer(label) if row["epoch"] == 0 else self.writers[label]
        for figure, value in row.items():
            if figure != "epoch":
                writer.add_scalar(figure, value, int(row["epoch"]))
        writer.flush()

    def _writer(self, label: str) -> Any:
        """A new one; what an earlier attempt logged is void, since every row comes again."""
        from torch.utils.tensorboard import SummaryWriter

        place = self.folder / re.sub(r"[^\w .,=+-]", "_", label).lstrip(".")
        for earlier in place.glob("events.out.tfevents.*"):
            earlier.unlink()
        self.writers[label] = SummaryWriter(str(place))
        return self.writers[label]


def track(kind: str, folder: Path | str, name: str, parameters: Mapping[str, Any]) -> None:
    """From now on have the figures of every epoch in TensorBoard too, below `<folder>/tensorboard/<name>`.

    Args:
        kind: "tensorboard", or "" for nothing.
        folder: of the run.
        name: of what is trained there, such as `alignment`.
        parameters: of the run.

    Raises:
        ValueError: an unknown kind.
    """
    if kind not in ("", "tensorboard"):
        raise ValueError(f"unknown tracking {kind!r}; available: 'tensorboard', or '' for none")
    LISTENERS[:] = [listener for listener in LISTENERS if not isinstance(listener, _TensorBoard)]
    if kind:
        LISTENERS.append(_TensorBoard(Path(folder) / "tensorboard" / name, parameters))


def in_processes(function: Callable[..., object], processes: int, compute: Compute, *arguments: Any) -> None:
    """Call `function(compute, *arguments)` in several processes of this machine, one a GPU, and wait for them.

    They meet in a file and talk over the loopback interface alone. Dropout and stochastic depth draw other numbers
    than in one process; on GPUs batch norms take the statistics of the whole batch.

    Args:
        function: of a module, such as `align.fine_tune`; its result is lost, its checkpoint stays.
        processes: 2 or more.
        compute: its device's kind.
        arguments: pickled for each process.

    Raises:
        ValueError: fewer GPUs than processes.
        RuntimeError: a process failed; says how.
    """
    kind, gpus = compute.device.type, torch.cuda.device_count()
    if processes < 2 or (kind == "cuda" and processes > gpus):
        raise ValueError(f"processes is 2 or more, and one a GPU ({gpus} visible); got {processes} on {kind}")
    with tempfile.TemporaryDirectory(prefix="bandmask-") as folder:
        threads = max(1, torch.get_num_threads() // processes)
        given = (processes, kind, f"{folder}/meeting", threads, function, arguments)
        running = torch.multiprocessing.start_processes(_join, given, processes, join=False, start_method="spawn")
        try:
            while not running.join():
                pass
        except torch.multiprocessing.ProcessRaisedException as error:
            raise RuntimeError(f"one of {processes} processes failed: {str(error).strip().splitlines()[-1]}") from error
        finally:
            for process in running.processes:
                process.kill()


def _join(
    rank: int, processes: int, kind: str, meeting: str, threads: int, function: Callable[..., object], arguments: Any
) -> None:
    """What each of several processes does."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # end with the process that wants the work
    loopback = next(name for _, name in socket.if_nameindex() if name.startswith("lo"))
    os.environ |= {"LOCAL_RANK": str(rank), "GLOO_SOCKET_IFNAME": loopback, "NCCL_SOCKET_IFNAME": loopback}
    torch.set_num_threads(threads)
    from lightning.fabric import Fabric

    backend = {"cuda": "nccl"}.get(kind, "gloo")
    torch.distributed.init_process_group(backend, init_method=f"file://{meeting}", rank=rank, world_size=processes)
    fabric = Fabric(accelerator=kind, devices=processes, strategy="ddp")
    fabric.launch()
    # Not compiled: batch norms talk to the other processes in the middle of the graph, and nobody has tested that.
    function(replace(Compute.of(str(fabric.device), compile=False), fabric=fabric), *arguments)
    torch.distributed.destroy_process_group()
