"""The one loop: device, precision, seeds, a checkpoint each epoch, and resuming from it to the same figures."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn
from tqdm import tqdm

from bandmask import files
from bandmask.memory import explain_out_of_memory
from bandmask.progress import Clock
from bandmask.ranks import Ranks, check_same


@dataclass(frozen=True)
class Compute:
    """Where and how to compute.

    Attributes:
        device: `cpu`, `cuda`, `cuda:1`.
        amp: bfloat16 autocast. On CUDA only: CPUs without native bfloat16 emulate it, 10 to 40 times slower.
        channels_last: memory format that convolutions prefer on CUDA.
        compile: `torch.compile` the models.
    """

    device: torch.device
    amp: bool = False
    channels_last: bool = False
    compile: bool = False

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
        """What to call in the loop: the model, compiled if so chosen. Parameters are shared with `model`."""
        return torch.compile(model) if self.compile else model

    def images(self, images: Tensor) -> Tensor:
        """A batch in the chosen memory format."""
        return images.contiguous(memory_format=torch.channels_last) if self.channels_last else images

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Context of a forward pass."""
        return torch.autocast(self.device.type, torch.bfloat16) if self.amp else contextlib.nullcontext()


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
    """AdamW without weight decay on biases and norms, as SatCLIP uses it."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    decayed = [p for p in parameters if p.ndim > 1]
    plain = [p for p in parameters if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr)


def fit(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Callable[[int], Iterable[Any]],
    loss: Callable[[Any, int], Tensor],
    *,
    epochs: int,
    after_epoch: Callable[[int], Mapping[str, float]],
    settings: Mapping[str, Any],
    checkpoint: Path | None = None,
    restart: bool = False,
    compute: Compute | None = None,
    label: str = "training",
    progress: bool = True,
    images_per_epoch: int | None = None,
) -> pd.DataFrame:
    """Train, and keep what is needed to go on after any interruption.

    Everything random in an epoch must be a function of its number (`batches`, masks); torch's own generator is
    seeded from it too. So a run that was killed and resumed gives the figures of one that was not, on one machine.
    Of several processes (`ranks`) the main one writes the checkpoint, and all go on from it.

    Args:
        model: its parameters and buffers are checkpointed; those that require a gradient are trained.
        optimizer: over them.
        batches: `batches(epoch)` gives the batches of a 0-based epoch.
        loss: `loss(batch, epoch)` gives a scalar.
        epochs: number of epochs.
        after_epoch: called with the number of epochs done, 0 before the first; its figures go into the history.
        settings: everything that decides the result, JSON-able: parameters, data, weights, code. `batch_size`,
            `image_size` and `seed` are known by these names. A checkpoint of other settings is refused.
        checkpoint: file written after each epoch; None keeps none.
        restart: ignore and overwrite an existing checkpoint.
        compute: device and precision.
        label: for the progress line.
        progress: show it.
        images_per_epoch: to tell the time left within the first epoch.

    Returns:
        One row an epoch, from 0 (before training): `epoch`, `train_loss`, `images_per_second`, and what
        `after_epoch` gave. The model is left in eval mode.

    Raises:
        ValueError: the checkpoint belongs to other settings, or is damaged.
        FloatingPointError: the loss is not finite.
        MemoryError: the batch doesn't fit; says what it needed.
    """
    compute, ranks = compute or Compute.of("cpu"), Ranks.now()
    fingerprint = _fingerprint(settings, epochs)
    history: list[dict[str, float]] = []
    if checkpoint and checkpoint.exists() and not restart:
        history = _resume(checkpoint, model, optimizer, fingerprint)
    check_same(len(history), f"the epochs done in {checkpoint}")
    clock = Clock(label, epochs, images_per_epoch)
    batch_size, image_size = int(settings.get("batch_size", 0)), settings.get("image_size")
    with explain_out_of_memory(label, batch_size, image_size=image_size):
        if not history:
            model.eval()
            history.append({"epoch": 0, "train_loss": float("nan"), **_plain(after_epoch(0))})
        bar = tqdm(
            total=epochs,
            initial=len(history) - 1,
            desc=label,
            disable=not (progress and ranks.main),
            unit="epoch",
            mininterval=0,
        )
        for epoch in range(len(history) - 1, epochs):
            torch.manual_seed(int(settings.get("seed", 0)) * 1_000_003 + epoch)
            model.train()
            images, total = 0, torch.zeros((), device=compute.device)
            clock.start(epoch + 1)
            for batch in batches(epoch):
                optimizer.zero_grad(set_to_none=True)
                value = loss(batch, epoch)
                value.backward()
                optimizer.step()
                size = len(getattr(batch, "samples", batch)) * ranks.count
                total += value.detach() * size  # stays on the device: reading it each step would stall the queue
                images += size
                if ranks.main and clock.due():
                    clock.tell(float(total) / images, images)
            mean = float(total) / max(images, 1)
            if not torch.isfinite(total):
                raise FloatingPointError(
                    f"{label}: the loss of epoch {epoch + 1} is {mean}; lower the learning rate, or look for NaN in "
                    f"the images. The checkpoint of epoch {epoch} is kept."
                )
            speed = images / clock.seconds()
            model.eval()
            figures = _plain(after_epoch(epoch + 1))
            row = {"epoch": epoch + 1, "train_loss": mean, **figures, "images_per_second": speed}
            history.append(row)
            if ranks.main:
                clock.tell(mean, images, row)
            bar.set_postfix_str("  ".join(f"{k} {v:.3g}" for k, v in row.items() if k != "epoch"), refresh=False)
            bar.update()
            if checkpoint and ranks.main:
                finished = epoch + 1 == epochs  # a finished run is only read again: it needs no optimizer state
                _save(checkpoint, model, None if finished else optimizer, history, fingerprint)
        bar.close()
    model.eval()
    return pd.DataFrame(history)


def checkpoint_of(path: Path | None, settings: Mapping[str, Any], epochs: int) -> Path | None:
    """`fine_tuning-seed0.pt` with a mark of the settings, `fine_tuning-seed0-1f3a9c20.pt`, for `fit`.

    So other parameters, data, weights or code are another training: it neither goes on from this one nor overwrites
    it, and whoever goes back to the old ones finds it again.
    """
    if path is None:
        return None
    mark = hashlib.sha256(_fingerprint(settings, epochs).encode()).hexdigest()[:8]
    return path.with_name(f"{path.stem}-{mark}{path.suffix}")


def _fingerprint(settings: Mapping[str, Any], epochs: int) -> str:
    return json.dumps({**settings, "epochs": epochs}, sort_keys=True, default=str)


def _plain(figures: Mapping[str, float]) -> dict[str, float]:
    """Figures as Python floats: a checkpoint is loaded without unpickling, which numpy's would need."""
    return {name: float(value) for name, value in figures.items()}


def _save(
    path: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    history: list[dict[str, float]],
    fingerprint: str,
) -> None:
    state = {
        "model": model.state_dict(),
        "optimizer": _plain_groups(optimizer.state_dict()) if optimizer else None,
        "history": history,
        "settings": fingerprint,
    }
    with files.writing(path) as partial, partial.open("wb") as file:
        try:
            torch.save(state, file)
        except RuntimeError as error:  # torch reports a full disk as a failed write of its own
            cause = error.__context__
            raise (cause if isinstance(cause, OSError) else OSError(f"writing failed: {error}")) from error


def _plain_groups(state: dict[str, Any]) -> dict[str, Any]:
    """An optimizer's state whose learning rates, which a schedule may have made with numpy, are Python's."""
    groups = [{k: float(v) if isinstance(v, float) else v for k, v in group.items()} for group in state["param_groups"]]
    return {**state, "param_groups": groups}


def _resume(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, fingerprint: str) -> list[dict[str, float]]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        saved, history = json.loads(state["settings"]), list(state["history"])
        weights, optimizer_state = state["model"], state["optimizer"]
    except Exception as error:  # torch, zip and pickle each have their own
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"checkpoint {path} is damaged ({reason}); pass restart=True to begin anew") from error
    if state["settings"] != fingerprint:
        ours, theirs = json.loads(fingerprint), saved
        keys = sorted(k for k in ours.keys() | theirs.keys() if ours.get(k) != theirs.get(k))
        changes = "; ".join(f"{k}: {theirs.get(k)!r} there, {ours.get(k)!r} now" for k in keys)
        raise ValueError(
            f"checkpoint {path} belongs to other settings ({changes}). Write to another folder, or pass restart=True "
            "to overwrite it"
        )
    try:
        model.load_state_dict(weights)
        if optimizer_state is not None:
            optimizer.load_state_dict(optimizer_state)
    except (RuntimeError, ValueError) as error:
        raise ValueError(
            f"checkpoint {path} is of another model ({str(error).splitlines()[0]}). Write to another folder, or pass "
            "restart=True to overwrite it"
        ) from error
    return history
