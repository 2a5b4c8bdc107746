"""A run says how far it is, once for all who listen: a file for `make status`, a log, a notebook's own callback.

`training.fit` reports; nothing here knows what is trained. A listener can slow a run down, never stop it.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bandmask import files

ENVIRONMENT = "BANDMASK_PROGRESS"  # names the file to keep; whoever executes a notebook sets it for the kernel
SECONDS = 2.0  # between two writes of that file


@dataclass(frozen=True)
class Event:
    """How far a training is.

    Attributes:
        label: which training, such as `fine-tuning on B08, seed 0`; a notebook does several, one after the other.
        epoch: the running one from 1, or the one just done if there are `figures`; 0 is before training.
        epochs: in all.
        loss: mean over the epoch so far; NaN before training.
        images_per_second: while training.
        seconds_left: until the last epoch of this training is done.
        figures: of the epoch just done, a row of the history; None inside an epoch.
        steady: speed and time left are from full epochs; else from the first batches, slow starts included.
    """

    label: str
    epoch: int
    epochs: int
    loss: float
    images_per_second: float
    seconds_left: float
    figures: Mapping[str, float] | None = None
    steady: bool = False


Listener = Callable[[Event], object]


class FileListener:
    """Keeps the last event in a JSON file, at most one write each `SECONDS`, but every row of figures.

    Attributes:
        path: the file; whoever reads it sees a whole one.
    """

    def __init__(self, path: Path | str) -> None:
        """Nothing is written before the first event."""
        self.path = Path(path)
        self._written = -math.inf
        self._last: Event | None = None  # the last row of figures of this training

    def __call__(self, event: Event) -> None:
        """Write the event, with the figures of the last epoch where it has none of its own.

        Raises:
            OSError: the file can't be written.
        """
        if event.figures is not None:
            self._last = event
        elif time.monotonic() - self._written < SECONDS:
            return
        known = self._last.figures if self._last and self._last.label == event.label else None
        entry = {
            **asdict(event),
            "figures": {name: _plain(float(value)) for name, value in (known or {}).items()},
            "updated": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        self._written = time.monotonic()  # before the attempt: a full disk is not asked at every step
        with files.writing(self.path) as partial:
            partial.write_text(json.dumps({name: _plain(value) for name, value in entry.items()}), encoding="utf-8")


_listeners: list[Listener] = []
_faulty: list[Listener] = []  # have raised, and were named once
_file: FileListener | None = None


def report(
    label: str,
    *,
    epoch: int,
    epochs: int,
    loss: float,
    images_per_second: float,
    seconds_left: float,
    figures: Mapping[str, float] | None = None,
    steady: bool = False,
) -> None:
    """Hand an event to everyone who listens, and to the file that `BANDMASK_PROGRESS` names, if it is set.

    A listener's error is warned of once and the run goes on: it costs days, what listens can be had again. What
    is no `Exception` (Ctrl-C, a scheduler's signal) was meant for the run and passes.

    Args:
        label: see `Event`, as all the others.
        epoch: the running one, from 1.
        epochs: in all.
        loss: mean over the epoch so far.
        images_per_second: while training.
        seconds_left: of this training.
        figures: a row of the history, after an epoch.
        steady: speed and time left are from full epochs.
    """
    event = Event(
        label, epoch, epochs, loss, images_per_second, seconds_left, None if figures is None else dict(figures), steady
    )
    everyone: list[Listener] = [*_listeners, *_file_listener()]
    for listener in everyone:
        try:
            listener(event)
        except Exception as error:
            _warn(listener, error)


@dataclass
class Clock:
    """Times a training, epoch by epoch, and reports it.

    Attributes:
        label: see `Event`.
        epochs: in all.
        images: of an epoch, once known.
    """

    label: str
    epochs: int
    images: int | None = None
    epoch: int = 0
    durations: list[float] = field(default_factory=list)  # of whole epochs, validation included
    started: float = 0.0
    told: float = 0.0

    def start(self, epoch: int) -> None:
        """An epoch begins, counted from 1."""
        self.epoch, self.started = epoch, time.perf_counter()

    def seconds(self) -> float:
        """Since the epoch began."""
        return time.perf_counter() - self.started

    def due(self) -> bool:
        """The last report is old enough for another: the loss must be fetched from the device for it."""
        return time.perf_counter() - self.told >= SECONDS

    def tell(self, loss: float, images: int, row: Mapping[str, float] | None = None) -> None:
        """Report a mean loss and the images so far; with a row of the history, that the epoch is done."""
        speed = images / self.seconds() if row is None else row["images_per_second"]
        self.told = time.perf_counter()
        if row is not None:
            self.images = images
            self.durations.append(self.seconds())
        to_come = self.epochs - self.epoch
        if self.durations:
            each = sum(self.durations) / len(self.durations)
            left = each * to_come + (max(each - self.seconds(), 0.0) if row is None else 0.0)
        elif self.images:
            left = (self.images * (to_come + 1) - images) / speed
        else:
            left = float("nan")
        report(
            self.label,
            epoch=self.epoch,
            epochs=self.epochs,
            loss=loss,
            images_per_second=speed,
            seconds_left=left,
            figures=row,
            steady=bool(self.durations),
        )


def attach(listener: Listener) -> None:
    """Call `listener(event)` at every report from now on; attached twice, it is called once."""
    if listener not in _listeners:
        _listeners.append(listener)


def detach(listener: Listener) -> None:
    """Call it no more; nothing happens if it was not attached."""
    for known in (_listeners, _faulty):
        if listener in known:
            known.remove(listener)


@contextmanager
def listen(listener: Listener) -> Iterator[None]:
    """Have it called inside the block only."""
    attach(listener)
    try:
        yield
    finally:
        detach(listener)


def _file_listener() -> list[FileListener]:
    """The listener of the file that is asked for now; the variable may be set after the import."""
    global _file
    path = os.environ.get(ENVIRONMENT)
    if not path:
        return []
    if _file is None or str(_file.path) != path:
        _file = FileListener(path)
    return [_file]


def _warn(listener: Listener, error: Exception) -> None:
    if listener in _faulty:
        return
    _faulty.append(listener)
    name = getattr(listener, "__qualname__", type(listener).__name__)
    text = f"{name} failed on a progress report ({type(error).__name__}: {error}); the run goes on without it"
    try:
        warnings.warn(text, RuntimeWarning, stacklevel=3)
    except RuntimeWarning:  # where warnings are made errors: this one must not stop a run either
        print(text, file=sys.stderr, flush=True)


def _plain(value: Any) -> Any:
    """What JSON can hold: no NaN or infinity."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
