"""Reports reach all who listen and a file that is always whole; no listener, broken or full, can stop a run."""

from __future__ import annotations

import json
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from torch import nn

from bandmask import progress, training
from bandmask.progress import Event

ROW = {"epoch": 2, "train_loss": 1.5, "val_cosine": 0.9, "images_per_second": 80.0}


def report(epoch: int = 1, figures: dict[str, float] | None = None, **changes: Any) -> None:
    values = {"epochs": 6, "loss": 2.5, "images_per_second": 88.0, "seconds_left": 80.0, **changes}
    progress.report(values.pop("label", "training"), epoch=epoch, figures=figures, **values)


def strictly(path: Path) -> dict[str, Any]:
    """JSON as the standard has it: Python's own reader would take NaN."""

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    found = json.loads(path.read_text(), parse_constant=refuse)
    assert isinstance(found, dict)
    return found


@pytest.fixture(autouse=True)
def nobody_listens(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("BANDMASK_PROGRESS", raising=False)
    monkeypatch.setattr(progress, "_file", None)
    yield
    assert progress._listeners == []
    assert progress._faulty == [], "a listener that is gone must not be remembered"


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "B8" / ".03_fine_tuning.progress.json"
    monkeypatch.setenv("BANDMASK_PROGRESS", str(path))
    return path


def test_everyone_who_listens_hears_it_once_and_only_while_listening() -> None:
    first: list[Event] = []
    second: list[Event] = []
    report()
    progress.attach(first.append)
    progress.attach(first.append)
    with progress.listen(second.append):
        report(2, ROW, steady=True)
    report(3)
    progress.detach(first.append)
    progress.detach(first.append)
    report(4)
    assert [event.epoch for event in first] == [2, 3]
    assert second == [Event("training", 2, 6, 2.5, 88.0, 80.0, ROW, True)]


def test_listening_ends_with_the_block_even_if_it_fails() -> None:
    heard: list[Event] = []
    with pytest.raises(ValueError, match="the run"), progress.listen(heard.append):
        raise ValueError("the run")
    report()
    assert heard == []


def test_a_listener_that_raises_is_warned_of_once_and_the_others_hear_on() -> None:
    heard: list[Event] = []

    def broken(event: Event) -> None:
        raise ConnectionError("server is gone")

    with progress.listen(broken), progress.listen(heard.append):
        with pytest.warns(RuntimeWarning, match=r"broken failed.*ConnectionError: server is gone.*run goes on"):
            report(1)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            report(2)
    with progress.listen(broken), pytest.warns(RuntimeWarning):
        report(3)  # attached anew, it is named anew
    assert [event.epoch for event in heard] == [1, 2]


def test_where_warnings_are_errors_a_broken_listener_still_stops_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with progress.listen(lambda event: 1 / 0), warnings.catch_warnings():
        warnings.simplefilter("error")
        report()
    assert "ZeroDivisionError" in capsys.readouterr().err


@pytest.mark.parametrize("meant_for_the_run", [KeyboardInterrupt, SystemExit])
def test_what_is_meant_for_the_run_is_not_swallowed(meant_for_the_run: type[BaseException]) -> None:
    def interrupted(event: Event) -> None:
        raise meant_for_the_run

    with progress.listen(interrupted), pytest.raises(meant_for_the_run):
        report()


def test_a_listener_can_not_change_the_history() -> None:
    row = dict(ROW)
    with progress.listen(lambda event: event.figures.clear()):
        report(2, row)
    assert row == ROW


def test_the_file_holds_the_last_event_with_the_figures_of_the_last_epoch(file: Path) -> None:
    report(2, ROW)
    entry = strictly(file)
    updated = pd.Timestamp(entry.pop("updated"))
    assert abs((pd.Timestamp.now("UTC") - updated).total_seconds()) < 60
    about = {"label": "training", "epoch": 2, "epochs": 6, "loss": 2.5, "images_per_second": 88.0, "seconds_left": 80.0}
    assert entry == {**about, "figures": ROW, "steady": False}
    progress._file._written -= 3  # as if seconds had passed
    report(3)
    assert strictly(file)["epoch"] == 3
    assert strictly(file)["figures"] == ROW
    progress._file._written -= 3
    report(1, label="the next training")
    assert strictly(file)["figures"] == {}, "figures of another training"


def test_figures_that_are_no_number_are_null_in_the_file(file: Path) -> None:
    report(0, {"train_loss": float("nan"), "val_loss": float("inf")}, loss=float("nan"), seconds_left=float("nan"))
    entry = strictly(file)
    assert (entry["loss"], entry["seconds_left"]) == (None, None)
    assert entry["figures"] == {"train_loss": None, "val_loss": None}


def test_the_file_is_written_each_two_seconds_at_most_but_for_every_row(file: Path) -> None:
    versions = []
    for step in range(50):
        report(1, loss=float(step))
        versions.append(strictly(file)["loss"])
    assert set(versions) == {0.0}
    for epoch in range(1, 6):
        report(epoch, ROW)
        assert strictly(file)["epoch"] == epoch


def test_the_file_may_be_asked_for_after_the_import_and_moved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("first", "second"):
        monkeypatch.setenv("BANDMASK_PROGRESS", str(tmp_path / name))
        report(label=name)
    assert [strictly(tmp_path / name)["label"] for name in ("first", "second")] == ["first", "second"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first", "second"], "and nothing beside"


def test_a_reader_never_sees_half_a_file(file: Path) -> None:
    report(0, ROW)
    ended = threading.Event()
    read: list[int] = []

    def reader() -> None:
        while not ended.is_set():
            read.append(strictly(file)["epoch"])

    thread = threading.Thread(target=reader)
    thread.start()
    for epoch in range(200):
        report(epoch, {**ROW, "note": float(epoch)})
    ended.set()
    thread.join()
    assert len(set(read)) > 5
    assert read == sorted(read)


def test_a_folder_that_can_not_be_written_stops_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "folder").write_text("a file is in the way")
    monkeypatch.setenv("BANDMASK_PROGRESS", str(tmp_path / "folder" / "progress.json"))
    heard: list[Event] = []
    with progress.listen(heard.append), warnings.catch_warnings(record=True) as said:
        for epoch in range(5):
            report(epoch, ROW)
    assert len(heard) == 5
    assert ["FileListener failed" in str(one.message) and "can't write" in str(one.message) for one in said] == [True]
    progress._faulty.clear()


def test_a_full_disk_stops_nothing_and_once_there_is_room_the_file_goes_on(on_small_disk) -> None:
    script = """
import json, os
from pathlib import Path
os.environ["BANDMASK_PROGRESS"] = "progress.json"
from bandmask import progress
def row(epoch):
    values = dict(epochs=9, loss=1.0, images_per_second=1.0, seconds_left=1.0, figures={"epoch": float(epoch)})
    progress.report("training", epoch=epoch, **values)
row(1)
filler = Path("filler").open("wb", buffering=0)
try:
    while True:
        filler.write(bytes(4096))
except OSError:
    pass
row(2); row(3)
print("full:", json.loads(Path("progress.json").read_text())["epoch"])
Path("filler").unlink(); filler.close()
row(4)
print("room:", json.loads(Path("progress.json").read_text())["epoch"], sorted(os.listdir()))
"""
    answer = on_small_disk(script, options="size=64k")
    assert answer.stdout == "full: 1\nroom: 4 ['progress.json']\n", answer.stderr
    assert answer.stderr.count("No space left on device") == 1


class Steps(nn.Module):
    """Learns one number."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))


def fit(
    epochs: int, after_epoch: Any = lambda epoch: {"val_loss": 1.0 / (1 + epoch)}, pause: float = 0.0
) -> pd.DataFrame:
    model = Steps()

    def loss(batch: torch.Tensor, epoch: int) -> torch.Tensor:
        time.sleep(pause)
        return ((model.weight - batch) ** 2).mean()

    return training.fit(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        lambda epoch: [torch.ones(4)] * 3,
        loss,
        epochs=epochs,
        after_epoch=after_epoch,
        settings={},
        label="three steps",
        progress=False,
    )


def test_a_training_reports_every_row_of_its_history(file: Path) -> None:
    heard: list[Event] = []
    with progress.listen(heard.append):
        history = fit(4)
    rows = pd.DataFrame([event.figures for event in heard if event.figures is not None])
    pd.testing.assert_frame_equal(rows, history[history["epoch"] > 0].reset_index(drop=True), check_dtype=False)
    assert {event.label for event in heard} == {"three steps"}
    assert heard[-1].seconds_left == pytest.approx(0.0, abs=1e-6)
    assert strictly(file)["epoch"] == 4


def test_a_training_reports_within_an_epoch_and_its_time_left_comes_true(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "SECONDS", 0.05)
    heard: list[tuple[float, Event]] = []
    with progress.listen(lambda event: heard.append((time.perf_counter(), event))):
        fit(4, pause=0.1)
    ended = time.perf_counter()
    inside = [event for _, event in heard if event.figures is None]
    assert {event.epoch for event in inside} == {1, 2, 3, 4}
    assert not any(event.steady for event in inside if event.epoch == 1)
    steady = [(at, event) for at, event in heard if event.steady]
    assert len(steady) > 6
    for at, event in steady:
        assert event.seconds_left == pytest.approx(ended - at, abs=0.35), event
