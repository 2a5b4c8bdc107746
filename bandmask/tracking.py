"""Figures of every epoch go to TensorBoard or MLflow, by one parameter; the tidy results table stays the truth.

A log is replaced from the epoch on that a resumed training reports anew: no step is there twice, none is lost.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import importlib
import math
import os
import re
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bandmask import files, progress
from bandmask.progress import Event

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Run
    from torch.utils.tensorboard import SummaryWriter


class Tracker:
    """A log that listens to `progress` until it is closed; this one, of the kind "", keeps nothing."""

    def __call__(self, event: Event) -> None:
        """Take the figures of an epoch; events without any are not logged."""

    def close(self) -> None:
        """Listen no more, and finish what is written. Twice is once."""
        progress.detach(self)


class TensorBoard(Tracker):
    """Event files below `<folder>/tensorboard/<name>`: a TensorBoard run a training, a scalar a figure.

    So one chart shows a figure of all trainings, and `<name>/<label>` says which line is which.
    """

    def __init__(self, folder: Path, name: str, parameters: Mapping[str, Any]) -> None:
        """Write the parameters, as a table in TensorBoard's tab `Text`, over those of an earlier attempt."""
        importlib.import_module("tensorboard")  # says that it is missing before torch takes its seconds
        self.folder = folder / "tensorboard" / name
        self._writers: dict[str, SummaryWriter] = {}
        for earlier in self.folder.glob("events.out.tfevents.*"):  # trainings have folders of their own
            earlier.unlink()
        rows = [f"| {key} | `{value!r}` |" for key, value in parameters.items()]
        writer = self._writer("", 0)
        writer.add_text("parameters", "\n".join(["| parameter | value |", "| --- | --- |", *rows]), 0)
        writer.flush()

    def __call__(self, event: Event) -> None:
        """Add a scalar a figure, and have them on disk."""
        if event.figures is None:
            return
        writer = self._writer(event.label, event.epoch)
        for figure, value in event.figures.items():
            if figure != "epoch":
                writer.add_scalar(figure, value, event.epoch)
        writer.flush()

    def close(self) -> None:
        """As `Tracker.close`."""
        super().close()
        for writer in self._writers.values():
            writer.close()
        self._writers.clear()

    def _writer(self, label: str, epoch: int) -> SummaryWriter:
        """The training's own: what an earlier attempt logged of it from `epoch` on is void, of others nothing is."""
        if label not in self._writers:
            from torch.utils.tensorboard import SummaryWriter

            place = self.folder / re.sub(r"[^\w .,=+-]", "_", label).lstrip(".")
            self._writers[label] = SummaryWriter(str(place), purge_step=epoch)
        return self._writers[label]


class MLflow(Tracker):
    """A run of MLflow, `<folder>/<name>`, for each set of parameters; metrics are `<label>/<figure>`.

    The store is `outputs/mlflow/mlflow.db` (SQLite: MLflow's own choice without a server, since 3.14 refuses plain
    folders), or what `MLFLOW_TRACKING_URI` names, such as a server that all nodes of a cluster reach.
    """

    def __init__(self, folder: Path, name: str, parameters: Mapping[str, Any]) -> None:
        """Find the run of an earlier attempt, or make one and log its parameters."""
        _quiet()
        from mlflow import MlflowClient

        root = files.outputs_root() / "mlflow"
        uri = os.environ.get("MLFLOW_TRACKING_URI")
        local = None if uri else root
        self._parameters = {_word(key): str(value)[:6000] for key, value in parameters.items()}
        self._folder, self._name = folder.resolve(), name
        self._key = files.checksum_of([str(self._folder), name, self._parameters])
        self._seen: set[str] = set()
        with _one_at_a_time(root) if local else contextlib.nullcontext():
            uri = uri or f"sqlite:///{root.resolve() / 'mlflow.db'}?timeout=60"  # many runs may write at once
            self._client: MlflowClient = MlflowClient(tracking_uri=uri)
            experiment = str(parameters.get("experiment") or self._folder.name)
            self._experiment = self._experiment_id(experiment, local)
            same = self._client.search_runs([self._experiment], f"tags.`bandmask.key` = '{self._key}'", max_results=1)
            self.run_id: str = same[0].info.run_id if same else self._new_run()
        self._client.update_run(self.run_id, status="RUNNING")

    def __call__(self, event: Event) -> None:
        """Log a metric a figure."""
        from mlflow.entities import Metric

        if event.figures is None:
            return
        if event.label not in self._seen:
            self._drop_from(event.label, event.epoch)
            self._seen.add(event.label)
        now = int(time.time() * 1000)
        figures = {key: value for key, value in event.figures.items() if key != "epoch" and not math.isnan(value)}
        metrics = [Metric(_metric(event.label, key), value, now, event.epoch) for key, value in figures.items()]
        self._client.log_batch(self.run_id, metrics=metrics)

    def close(self) -> None:
        """As `Tracker.close`; the run counts as finished."""
        super().close()
        if self.run_id:
            with contextlib.suppress(Exception):  # the store may be gone by now; the figures are in
                self._client.set_terminated(self.run_id)
            self.run_id = ""

    def _experiment_id(self, name: str, local: Path | None) -> str:
        from mlflow.exceptions import MlflowException

        artifacts = (local / "artifacts").resolve().as_uri() if local else None  # else MLflow takes the working folder
        found = self._client.get_experiment_by_name(name)
        if found is None:
            try:
                return str(self._client.create_experiment(name, artifacts))
            except MlflowException:  # another run may just have made it
                found = self._client.get_experiment_by_name(name)
                if found is None:
                    raise
        return str(found.experiment_id)

    def _new_run(self) -> str:
        from mlflow.entities import Param

        run = self._client.create_run(
            self._experiment, run_name=f"{self._folder.name}/{self._name}", tags={"bandmask.key": self._key}
        )
        parameters = [Param(key, value) for key, value in self._parameters.items()]
        for first in range(0, len(parameters), 100):  # the most that MLflow takes in a call
            self._client.log_batch(run.info.run_id, params=parameters[first : first + 100])
        return str(run.info.run_id)

    def _drop_from(self, label: str, epoch: int) -> None:
        """Void what an earlier attempt logged of a training from `epoch` on.

        MLflow deletes no metric, so the run is copied without them, and the old one deleted.
        """
        old: Run = self._client.get_run(self.run_id)
        logged: list[Metric] = [
            m for key in old.data.metrics for m in self._client.get_metric_history(self.run_id, key)
        ]
        kept = [m for m in logged if not (m.key.startswith(_metric(label, "")) and m.step >= epoch)]
        if len(kept) == len(logged):
            return
        new = self._new_run()
        for first in range(0, len(kept), 1000):  # the most that MLflow takes in a call
            self._client.log_batch(new, metrics=kept[first : first + 1000])
        self._client.delete_run(self.run_id)
        self.run_id = new


KINDS: dict[str, type[Tracker]] = {"tensorboard": TensorBoard, "mlflow": MLflow}
_PACKAGES = {"tensorboard": "tensorboard", "mlflow": "mlflow-skinny sqlalchemy alembic"}
_open: dict[str, Tracker] = {}


def track(kind: str, folder: Path | str, name: str, parameters: Mapping[str, Any]) -> Tracker:
    """Log the parameters once and from now on every figure of every epoch, until closed or the interpreter ends.

    One call in a notebook is enough; a second one of the same kind closes the log of the first. Each epoch is on
    disk when the next begins, so that a killed run keeps what it had; resumed, it goes on in the same log.

    Args:
        kind: "tensorboard", "mlflow", or "" for nothing.
        folder: of the run; TensorBoard's files lie in `tensorboard/` below it.
        name: of what is trained there, such as `alignment`.
        parameters: of the run.

    Raises:
        ValueError: an unknown kind; lists those there are.
        ImportError: its package is not installed; says how to install it.
    """
    if kind and kind not in KINDS:
        choices = ", ".join(map(repr, KINDS))
        raise ValueError(f"unknown tracking {kind!r}; available: {choices}, or '' for none")
    if not kind:
        return Tracker()
    if earlier := _open.pop(kind, None):
        earlier.close()
    try:
        tracker = KINDS[kind](Path(folder), name, parameters)  # type: ignore[call-arg]
    except ImportError as error:
        raise ImportError(
            f"tracking={kind!r} needs a package that is not installed ({error}). Install it with "
            f"`python -m pip install {_PACKAGES[kind]}`, or set tracking=''"
        ) from error
    _open[kind] = tracker
    progress.attach(tracker)
    return tracker


@atexit.register
def _close_all() -> None:
    for tracker in _open.values():
        tracker.close()


@contextlib.contextmanager
def _one_at_a_time(folder: Path) -> Iterator[None]:
    """MLflow makes and upgrades its tables at first contact; runs that start together would break each other's."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _quiet() -> None:
    """Have MLflow send nothing anywhere of its own, and not hold up training where a server is gone."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")


def _metric(label: str, figure: str) -> str:
    return f"{_word(label)}/{_word(figure)}"


def _word(text: str) -> str:
    """As MLflow lets names be: without commas and brackets."""
    return re.sub(r"[^\w .:-]", "", text)
