"""One node of the graph, run for real: done, failing, killed, orphaned, twice at once. The notebook is a probe."""

import json
import os
import signal
import subprocess
import sys
import time

import nbformat
import psutil
import pytest

from bandmask import files

CELLS = [
    "import os, time\nfrom pathlib import Path",
    'where = "."  # folder to write in\nseconds = 0.0  # to sleep\nfail = False  # raise',
    "Path(where, 'pid').write_text(str(os.getpid()))\nprint('threads', os.environ['OMP_NUM_THREADS'])",
    'Path(os.environ[\'BANDMASK_PROGRESS\']).write_text(\'{"label": "probing", "epoch": 1, "epochs": 2}\')',
    "time.sleep(seconds)",
    "if fail:\n    raise ValueError('the probe was told to\\nfail')",
    "Path(where, 'made.txt').write_text(os.environ.get('CUDA_VISIBLE_DEVICES', 'no GPU'))\nprint('end reached')",
]
RUNNER = """
import sys
from pathlib import Path
from bandmask.runs import execution
from bandmask import params
params._NOTEBOOKS = Path(sys.argv.pop(1))
sys.exit(execution.main())
"""

pytestmark = pytest.mark.slow


@pytest.fixture
def probe(tmp_path):
    """Starts the probe as the graph does; `call(...)` waits for it, `start(...)` does not."""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in CELLS])
    notebook.cells[1].metadata["tags"] = ["parameters"]
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    (tmp_path / "notebooks").mkdir()
    nbformat.write(notebook, tmp_path / "notebooks" / "09_probe.ipynb")
    (tmp_path / "input.txt").write_text("one")
    return Probe(tmp_path)


class Probe:
    def __init__(self, folder):
        self.folder, self.executed, self.record = folder, folder / "09_probe.ipynb", folder / "09_probe.json"
        self.made = folder / "made.txt"

    def command(self, *arguments, **values):
        given = [f"{name}={value}" for name, value in {"where": self.folder, **values}.items()]
        return [
            *(sys.executable, "-c", RUNNER, str(self.folder / "notebooks"), "09_probe", str(self.executed)),
            *("--inputs", str(self.folder / "input.txt"), "--outputs", str(self.made), "--set", *given, *arguments),
        ]

    @property
    def environment(self):
        return {**os.environ, "BANDMASK_OUTPUTS": str(self.folder), "TMPDIR": str(self.folder)}

    def start(self, *arguments, **values):
        return subprocess.Popen(
            self.command(*arguments, **values), env=self.environment, stderr=subprocess.PIPE, text=True
        )

    def call(self, *arguments, **values):
        process = self.start(*arguments, **values)
        _, said = process.communicate(timeout=120)
        return process.returncode, said

    def said(self):
        return json.loads(self.record.read_text())

    def kernel(self):
        """Process number of the running kernel, once it has written it."""
        return int(until(lambda: (self.folder / "pid").read_text() or None))


def until(look, seconds=30):
    deadline = time.monotonic() + seconds
    while True:
        try:
            if (found := look()) is not None:
                return found
        except (OSError, ValueError):
            pass
        assert time.monotonic() < deadline, "it never came to that"
        time.sleep(0.05)


def gone(pid):
    return True if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE else None


def test_a_run_leaves_its_notebook_its_log_and_what_it_was_made_from(probe):
    status, said = probe.call("--threads", "3")
    assert status == 0, said
    record = probe.said()
    assert record["state"] == "done"
    assert record["parameters"] == {"where": str(probe.folder), "seconds": 0.0, "fail": False}
    assert record["inputs"] == {"input.txt": files.sha256(probe.folder / "input.txt")}
    assert record["outputs"] == {"made.txt": files.sha256(probe.made)}
    assert "notebook" in record["code"]
    assert record["threads"] == 3
    assert record["gpu"] is None
    assert record["peak_memory_mib"] > 20
    assert "threads 3" in probe.executed.with_suffix(".log").read_text()
    assert nbformat.read(probe.executed, 4).cells[-1].outputs[0].text == "end reached\n"
    assert json.loads((probe.folder / ".09_probe.progress.json").read_text())["label"] == "probing"


def test_what_is_there_is_not_made_again_unless_something_changed(probe):
    assert probe.call()[0] == 0
    written = probe.made.stat().st_mtime_ns
    status, said = probe.call()
    assert (status, probe.made.stat().st_mtime_ns) == (0, written)
    assert "already there, from the same parameters, code and inputs" in said
    for change in (
        lambda: (probe.folder / "input.txt").write_text("two"),
        lambda: probe.made.write_text("spoilt"),
        lambda: probe.made.unlink(),
        lambda: probe.record.write_text("half a rec"),
    ):
        change()
        assert probe.call()[0] == 0
        assert probe.made.stat().st_mtime_ns != written
        written = probe.made.stat().st_mtime_ns
    assert probe.call("--anew")[0] == 0
    assert probe.made.stat().st_mtime_ns != written, "asked for"


def test_a_failed_run_keeps_its_notebook_with_the_failing_cell_last(probe):
    probe.made.write_text("of an earlier run")
    status, said = probe.call(fail=True)
    assert status == 1
    assert "ValueError: the probe was told to" in said
    record = probe.said()
    assert (record["state"], record["error"]) == ("failed", "ValueError: the probe was told to")
    cells = nbformat.read(probe.executed, 4).cells
    assert cells[-1].source == CELLS[5]
    assert cells[-1].outputs[0].ename == "ValueError"
    assert probe.made.read_text() == "of an earlier run"

    began = time.monotonic()
    status, said = probe.call("--attempt", "2", fail=True)
    assert status == 1
    assert "not tried again" in said
    assert time.monotonic() - began < 5
    assert probe.call("--attempt", "2", fail=False)[0] == 0, "another parameter is another run"


def test_a_run_that_leaves_no_output_is_none(probe):
    status, said = probe.call("--outputs", str(probe.folder / "never.txt"))
    assert status == 1
    assert "09_probe ended without writing never.txt" in said
    assert probe.said()["state"] == "failed"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_kernel_and_is_recorded(probe, number):
    process = probe.start(seconds=60)
    kernel = probe.kernel()
    process.send_signal(number)
    assert process.wait(timeout=10) == 128 + number
    until(lambda: gone(kernel), 5)
    record = probe.said()
    assert (record["state"], record["error"]) == ("stopped", f"ended by {number.name}")
    assert not probe.made.exists()


def test_kill_9_leaves_no_kernel_behind(probe):
    process = probe.start(seconds=60)
    kernel = probe.kernel()
    process.kill()
    process.wait()
    until(lambda: gone(kernel), 10)
    assert probe.said()["state"] == "running", "nobody was left to say otherwise"
    assert probe.call(seconds=0.1)[0] == 0, "and the next one is not kept out"


def test_a_run_ends_with_the_graph_that_started_it(probe):
    """The graph is a shell here, killed with SIGKILL; the run it started notices."""
    shell = subprocess.Popen(["bash", "-c", '"$@"; true', "graph", *probe.command(seconds=60)], env=probe.environment)
    kernel = probe.kernel()
    runner = psutil.Process(shell.pid).children()[0].pid
    shell.kill()
    shell.wait()
    until(lambda: gone(kernel), 10)
    until(lambda: gone(runner), 10)
    record = probe.said()
    assert (record["state"], record["error"]) == ("stopped", "the graph that started it is gone")


def test_a_graph_that_was_gone_before_the_run_began_is_noticed(probe):
    dead = subprocess.Popen(["true"])
    dead.wait()
    status, _ = probe.call("--parent", str(dead.pid), seconds=60)
    assert status == 1
    assert probe.said()["error"] == "the graph that started it is gone"


def test_a_killed_kernel_is_no_error_of_the_notebook(probe):
    process = probe.start(seconds=60)
    os.kill(probe.kernel(), signal.SIGKILL)
    assert process.wait(timeout=30) == 1
    assert probe.said()["state"] == "stopped"
    assert probe.said()["error"].startswith("the kernel was killed (out of memory?)")
    assert probe.call("--attempt", "2")[0] == 0, "so it is tried again"


def test_a_kernel_killed_before_it_could_speak_is_no_error_of_the_notebook_either(probe):
    process = probe.start(seconds=60)
    children = until(lambda: psutil.Process(process.pid).children() or None)
    children[0].kill()
    assert process.wait(timeout=60) == 1
    assert probe.said()["state"] == "stopped"
    assert "kernel" in probe.said()["error"].lower()
    assert probe.call("--attempt", "2")[0] == 0


def test_of_two_at_once_the_second_waits_and_finds_it_there(probe):
    first = probe.start(seconds=3)
    probe.kernel()
    status, said = probe.call(seconds=3)
    assert status == 0
    assert "waiting: another process executes" in said
    assert "already there" in said
    assert first.wait() == 0


def test_runs_side_by_side_hold_a_gpu_each(probe, monkeypatch):
    """Devices are names here: what is tested is who gets which."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    holder = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "from bandmask.runs import gpus; import time\nwith gpus.claim(): print(1); time.sleep(30)",
        ],
        env=probe.environment,
        stdout=subprocess.PIPE,
    )
    until(lambda: next((probe.folder / f"bandmask-gpus-{os.getuid()}").glob("0.lock"), None))
    time.sleep(0.3)
    assert probe.call("--gpus", "1")[0] == 0
    holder.kill()
    assert probe.made.read_text() == "1"
    assert probe.said()["gpu"] == "1"
