"""`make status` tells what is done, runs, failed and remains, as text, live and as a page, whatever lies on disk."""

from __future__ import annotations

import html.parser
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from records import progressed, record, running

from bandmask import files
from bandmask.runs import states, status, status_page
from bandmask.runs.states import Node, State

__all__ = ["running"]  # a fixture

EXPERIMENT = """
experiment: trial
dataset: sample
encoder: stand-in
masks: ["none", "B8"]
tasks: ["classification"]
"""
TITLES = [
    "packs/sample/01_data_exploration",
    "00_sample_encoder",
    "none/03_fine_tuning",
    "none/04_scene_classification",
    "B8/03_fine_tuning",
    "B8/04_scene_classification",
    "06_results",
]


@pytest.fixture(autouse=True)
def outputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "outputs"
    monkeypatch.setenv("BANDMASK_OUTPUTS", str(folder))
    return folder


@pytest.fixture
def experiment(tmp_path: Path) -> Path:
    path = tmp_path / "trial.yaml"
    path.write_text(EXPERIMENT)
    return path


@pytest.fixture
def trial(experiment: Path) -> dict[str, Node]:
    """Its nodes by title."""
    return {node.title: node for node in states.nodes(status.parameters_of(str(experiment)))}


def done(node: Node, **changes: Any) -> None:
    record(node, **changes)
    node.output.parent.mkdir(parents=True, exist_ok=True)
    if node.output.suffix == ".json":
        node.output.touch()
    else:
        import pandas as pd

        columns = ["split", "metric", "method", "protocol", "epoch", "value"]
        rows = [("val", "val_cosine", "fine-tuned", "", 1, 0.934)]
        rows += [("test", "overall_accuracy", "fine-tuned", protocol, 1, 0.85) for protocol in ("retrained", "kept")]
        pd.DataFrame(rows, columns=columns).to_parquet(node.output)


def command(*arguments: Path | str) -> list[str]:
    return [sys.executable, "-m", "bandmask.runs.status", *map(str, arguments)]


def run(*arguments: Path | str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*arguments), capture_output=True, text=True, check=False)


def made_up(name: str, seconds: float | None = None, notebook: str = "03_fine_tuning", **more: Any) -> State:
    place = Path("nowhere")
    return State(Node(notebook, "B8", place / f"{notebook}.ipynb", place / "out"), name, seconds, **more)


def test_the_total_in_one_line() -> None:
    found = [
        *[made_up("done", 480.0)] * 17,
        *[made_up("running", 0.0)] * 2,
        made_up("failed"),
        *[made_up("to do")] * 18,
    ]
    assert status.total(found) == "17 of 38 done, 2 running, 1 failed, 18 to do; about 1 h 20 min left"


def test_time_left_is_only_told_from_finished_nodes_of_the_same_notebook() -> None:
    to_do, other = made_up("to do"), made_up("to do", notebook="04_scene_classification")
    assert status.time_left([to_do, other]) == "time left unknown"
    assert status.time_left([made_up("done"), to_do]) == "time left unknown", "a node without record has no time"
    finished = [made_up("done", 60.0), made_up("done", 180.0)]
    assert status.time_left([*finished, to_do]) == "about 2 min of work left"
    assert status.time_left([*finished, to_do, other]) == "at least 2 min of work left"
    assert status.time_left([*finished, made_up("lost"), made_up("stopped")]) == "about 4 min of work left"
    assert status.time_left([*finished, made_up("failed")]) == "", "it waits for someone"
    assert status.time_left([*finished, made_up("to do", notebook="06_results"), to_do]) == "about 2 min of work left"


def test_time_left_counts_what_a_run_has_done_and_says_itself() -> None:
    finished = [made_up("done", 600.0)]
    assert status.time_left([*finished, made_up("running", 540.0)]) == "about 1 min left"
    talkative = made_up("running", 9.0, notebook="04_scene_classification", progress={"seconds_left": 80.0})
    assert status.time_left([talkative]) == "time left unknown", "nothing is finished"
    assert status.time_left([*finished, talkative]) == "at least 1 min left"
    late = made_up("running", 700.0, progress={"seconds_left": 300.0})
    assert status.time_left([*finished, late]) == "about 5 min left"
    assert status.time_left([*finished, made_up("running", 0.0), made_up("running", 590.0)]) == "about 10 min left"


def test_an_empty_folder_is_all_to_do(experiment: Path, outputs: Path) -> None:
    told = run(experiment, "--no-html")
    assert told.returncode == 0, told.stderr
    assert told.stdout.endswith("\n\n0 of 7 done, 7 to do; time left unknown\n")
    assert told.stdout.count("to do") == 7 + 1
    assert not outputs.exists()


def test_a_half_finished_grid(
    experiment: Path,
    trial: dict[str, Node],
    outputs: Path,
    running: Callable[[], subprocess.Popen[bytes]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(outputs.parent)
    pack, encoder, none, none_scenes, b8, _, _ = trial.values()
    pack.output.parent.mkdir(parents=True)
    pack.output.touch()  # from before there were records
    record(encoder, "failed", error="ValueError: no\x1b[31m such\tband", seconds=6.0)
    encoder.executed.write_text("{}")
    done(none, seconds=120.0)
    started = (datetime.now(UTC) - timedelta(seconds=58)).isoformat()  # a minute later its process would be another one
    record(none_scenes, "running", pid=running().pid, started=started)
    progressed(none_scenes, label="head, seed 2")
    b8.record.parent.mkdir(parents=True)
    b8.record.write_text('{"state": "done", "sec')
    told = run(experiment)
    assert told.returncode == 0, "a run that failed is no error of this command"
    assert told.stderr == ""
    expected = """
run           notebook                 state    min
packs/sample  01_data_exploration      done
              00_sample_encoder        failed   0.1  ValueError: no [31m such band
                                                     outputs/trial/00_sample_encoder.ipynb
none          03_fine_tuning           done     2.0  val cosine 0.934
none          04_scene_classification  running  1.0  head, seed 2: epoch 3/6, loss 2.31, 88 images/s, 1 min left
B8            03_fine_tuning           to do
B8            04_scene_classification  to do
              06_results               to do

Note: {b8.record} can't be read (Unterminated string starting at: line 1 column 19 (char 18))

2 of 7 done, 1 running, 1 failed, 3 to do; at least 3 min left
Page: outputs/trial/status.html
"""
    assert told.stdout == expected.lstrip("\n").replace("{b8.record}", str(b8.record))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], r"no parameter file .*nowhere\.yaml; beside it: .*sample\.yaml"),
        (["thesis", "--variant", "colour"], r"no parameter file .*colour\.yaml; beside it: .*moco\.yaml"),
        (["nowhere.yaml"], "no parameter file nowhere.yaml"),
        (["sample", "--html", "x", "--no-html"], "not allowed with"),
    ],
)
def test_bad_input_is_named_and_the_only_error(arguments: list[str], message: str, tmp_path: Path) -> None:
    told = subprocess.run(command(*arguments), capture_output=True, text=True, check=False)
    assert told.returncode == 2
    assert re.search(message, told.stderr), told.stderr
    assert "Traceback" not in told.stderr


def test_an_experiment_without_name_or_masks_is_bad_input(experiment: Path) -> None:
    for lacking in ("experiment: trial", 'masks: ["none", "B8"]'):
        experiment.write_text(EXPERIMENT.replace(lacking, ""))
        with pytest.raises(ValueError, match=r"needs `experiment` .* and `masks`"):
            status.parameters_of(str(experiment))


def test_a_variant_is_laid_over_its_experiment() -> None:
    assert status.parameters_of("thesis")["experiment"] == "thesis"
    assert status.parameters_of("thesis", "position")["experiment"] == "thesis-position"
    assert len(states.nodes(status.parameters_of("thesis"))) == 2 + 12 * 3 + 1


class Page(html.parser.HTMLParser):
    """What a browser would see: tags, links and text."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_data(self, data: str) -> None:
        self.text += data

    @property
    def links(self) -> list[str]:
        return [value for name, value in self.attributes if name == "href"]


HOSTILE = "<script>alert(1)</script>\"'&<img src=x onerror=alert(1)>"


def test_the_page_is_whole_in_itself_and_escapes_what_files_say(
    experiment: Path, trial: dict[str, Node], outputs: Path
) -> None:
    _, encoder, none, scenes, *_ = trial.values()
    record(encoder, "failed", error=f"ValueError: {HOSTILE}")
    record(none, "running", host="n2")
    progressed(none, label=HOSTILE)
    record(scenes, "stopped", error=HOSTILE)
    encoder.executed.write_text("{}")
    none.executed.write_text("{}")
    told = run(experiment)
    assert told.stderr == ""
    page = Page(outputs / "trial" / "status.html")
    assert not {"script", "img", "link", "iframe"} & set(page.tags)
    assert page.text.count(HOSTILE) == 3
    assert page.links == ["00_sample_encoder.ipynb", "none/03_fine_tuning.ipynb"]
    assert not [value for _, value in page.attributes if "//" in value], "nothing from elsewhere"
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    source = (outputs / "trial" / "status.html").read_text()
    assert "prefers-color-scheme: dark" in source
    assert ("http-equiv", "refresh") in page.attributes
    assert "0 of 7 done, 1 running, 1 failed, 1 stopped, 4 to do" in page.text
    assert [path.name for path in (outputs / "trial").iterdir() if "partial" in path.name] == []


def test_a_page_of_what_rests_does_not_load_itself_anew(experiment: Path, outputs: Path) -> None:
    run(experiment)
    assert ("http-equiv", "refresh") not in Page(outputs / "trial" / "status.html").attributes


def test_links_lead_from_wherever_the_page_lies(experiment: Path, trial: dict[str, Node], tmp_path: Path) -> None:
    node = trial["B8/03_fine_tuning"]
    record(node, "failed", error="no")
    node.executed.write_text("{}")
    (node.executed.parent.parent / "06_results.html").write_text("the report")
    target = tmp_path / "a folder" / "deep" / "page.html"
    assert f"Page: {target}" in run(experiment, "--html", target).stdout
    links = Page(target).links
    assert len(links) == 2
    for link in links:
        assert not link.startswith("/")
        assert (target.parent / link).exists(), link


def test_an_odd_name_of_a_run_is_a_link_that_works(tmp_path: Path) -> None:
    folder = tmp_path / 'B8 #1 "?%20'
    folder.mkdir()
    node = Node("03_fine_tuning", folder.name, folder / "03_fine_tuning.ipynb", folder / "out")
    node.executed.touch()
    made = status_page.render_html([State(node, "done")], "t", "total", folder=tmp_path, report=tmp_path / "none.html")
    (tmp_path / "page.html").write_text(made)
    from urllib.parse import unquote

    (link,) = Page(tmp_path / "page.html").links
    assert (tmp_path / unquote(link)).exists()
    assert not set(' "#?') & set(link)


def test_a_page_that_can_not_be_written_is_said_and_no_error(experiment: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    told = run(experiment, "--html", tmp_path / "file" / "page.html")
    assert told.returncode == 0
    assert "7 to do" in told.stdout
    assert "no page: " in told.stderr


def test_a_reader_that_closes_early_is_no_error(experiment: Path) -> None:
    shell = " ".join(f"'{word}'" for word in command(experiment, "--no-html"))
    told = subprocess.run(f"{shell} | true", shell=True, capture_output=True, text=True, check=False)
    assert told.stderr == ""


class Followed:
    """`--follow` in a process of its own, its output line by line."""

    def __init__(self, *arguments: Path | str, terminal: bool = False) -> None:
        self.reading, writing = pty.openpty() if terminal else os.pipe()
        environment = {**os.environ, "COLUMNS": "60", "LINES": "20", "PYTHONUNBUFFERED": "1"}
        self.process = subprocess.Popen(
            command(*arguments, "--follow"), stdout=writing, stderr=subprocess.PIPE, env=environment, text=True
        )
        os.close(writing)
        self.output = ""

    def until(self, text: str, seconds: float = 30) -> str:
        """Everything written up to and with `text`, from where the last call ended."""
        end = time.monotonic() + seconds
        while text not in self.output:
            ready, _, _ = select.select([self.reading], [], [], max(end - time.monotonic(), 0))
            assert ready, f"{text!r} never came; so far: {self.output!r}"
            self.output += self._read()
        before, _, self.output = self.output.partition(text)
        return before + text

    def ended(self) -> tuple[int, str, str]:
        """Exit code, the rest of the output, and errors."""
        while chunk := self._read():
            self.output += chunk
        _, errors = self.process.communicate(timeout=30)
        return self.process.returncode, self.output, errors

    def _read(self) -> str:
        try:
            return os.read(self.reading, 65536).decode()
        except OSError:  # what a terminal says at its end
            return ""


@pytest.fixture
def follow() -> Iterator[Callable[..., Followed]]:
    started: list[Followed] = []

    def start(*arguments: Path | str, terminal: bool = False) -> Followed:
        started.append(Followed(*arguments, terminal=terminal))
        return started[-1]

    yield start
    for one in started:
        one.process.kill()
        one.process.communicate()
        os.close(one.reading)


def test_following_without_a_terminal_prints_a_line_whenever_something_changes(
    experiment: Path,
    trial: dict[str, Node],
    outputs: Path,
    follow: Callable[..., Followed],
    running: Callable[[], subprocess.Popen[bytes]],
) -> None:
    one = follow(experiment)
    assert one.until("left unknown\n")[9:] == "0 of 7 done, 7 to do; time left unknown\n"
    node, process = trial["B8/03_fine_tuning"], running()
    record(node, "running", pid=process.pid)
    assert "B8/03_fine_tuning: running, for " in one.until("1 running, 6 to do; time left unknown\n")
    for epoch in (1, 2):
        progressed(node, epoch=epoch)
        assert f"B8/03_fine_tuning: running, fine-tuning on B08, seed 0: epoch {epoch}/6" in one.until("1 min left\n")
    progressed(node, epoch=2, loss=1.0)
    time.sleep(2.2)  # two more looks: neither state nor epoch is another
    process.kill()
    process.wait()
    said = one.until("1 lost, 6 to do; time left unknown\n")
    assert said.count("\n") == 2
    assert f"B8/03_fine_tuning: lost, process {process.pid} on" in said
    one.process.send_signal(signal.SIGTERM)
    assert one.ended() == (0, "", "")
    assert "1 lost" in Page(outputs / "trial" / "status.html").text
    assert "\x1b" not in said


def test_following_ends_when_everything_is_done(
    experiment: Path, trial: dict[str, Node], outputs: Path, follow: Callable[..., Followed]
) -> None:
    *others, last = trial.values()
    for node in others:
        done(node)
    one = follow(experiment)
    one.until("6 of 7 done, 1 to do; about 0 s of work left\n")
    done(last)
    code, said, errors = one.ended()
    assert (code, errors) == (0, "")
    assert said.splitlines()[-1].endswith("7 of 7 done")
    assert "7 of 7 done" in Page(outputs / "trial" / "status.html").text


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_following_on_a_terminal_redraws_a_block_and_restores_the_cursor(
    experiment: Path,
    trial: dict[str, Node],
    follow: Callable[..., Followed],
    running: Callable[[], subprocess.Popen[bytes]],
    number: signal.Signals,
) -> None:
    node, other = trial["B8/03_fine_tuning"], trial["none/03_fine_tuning"]
    record(node, "running", pid=running().pid)
    progressed(node, epoch=1)
    record(other, "running", pid=running().pid)
    one = follow(experiment, "--no-html", terminal=True)
    first = one.until("2 running, 5 to do; time left unknown\r\n")
    assert first.startswith("\x1b[?25l")
    progressed(node, epoch=2)
    second = one.until("epoch 2/6")
    assert "\x1b[3F\x1b[J" in second, "back over two runs and the total"
    record(other, "failed", error="out of memory")
    third = one.until("1 failed")
    assert "none/03_fine_tuning: failed, out of memory\r\n" in third, "what ends stays above the block"
    assert one.until("\x1b[2F\x1b[J", seconds=10)
    one.process.send_signal(number)
    code, rest, errors = one.ended()
    assert (code, errors) == (0, "")
    assert rest.endswith("\x1b[?25h")
    for line in (first + second).replace("\x1b[J", "\n").split("\n"):
        assert len(re.sub(r"\x1b\[[?0-9]*[a-zA-Z]", "", line).rstrip("\r")) < 60, line


def test_more_runs_than_lines_are_counted() -> None:
    found = [made_up("running", 1.0)] * 30
    block = status.live_block(found, os.terminal_size((80, 10)))
    assert len(block) == 9
    assert block[-2] == "... and 23 more"


def test_names_of_states_have_a_colour_on_the_page() -> None:
    for name in states.NAMES:
        assert f"--{name.replace(' ', '')}:" in status_page._STYLE


def test_the_page_is_replaced_whole(trial: dict[str, Node], outputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A browser that loads it anew meets the old page or the new one."""
    page = outputs / "trial" / "status.html"
    found = status.look(list(trial.values()))
    status.write_page(found, "trial", page)
    old = page.read_text()
    monkeypatch.setattr(files, "_sync", lambda path: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space left"):
        status.write_page(found, "trial", page)
    assert page.read_text() == old
    assert json.dumps(sorted(path.name for path in page.parent.iterdir())) == '["status.html"]'
