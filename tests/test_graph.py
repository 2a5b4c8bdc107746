"""The graph under faults, run for real with probes for notebooks: one record a node is the truth that all tell."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import time

import nbformat
import psutil
import pytest
from probes import EXPERIMENT, ROOT, Project, until
from slow import kills

pytestmark = pytest.mark.slow
CHANGED = EXPERIMENT + "head_epochs: 9\n"
RESULTS = "04_scene_classification"


def gone(project: Project, seconds: float) -> None:
    """Nothing of the project runs any more after so many seconds; a busy machine gets three times as long."""
    until(lambda: not project.processes(), 3 * seconds)


def running(project: Project, title: str) -> bool:
    there = (project.out / f"{title}.json").exists() and (project.orders / "kernel").exists()
    return there and project.record(title)["state"] == "running"


def kernels_of(project: Project, title: str) -> list[psutil.Process]:
    nodes = [process for process in project.processes() if title in process.cmdline()]
    return [
        child for node in nodes for child in node.children(recursive=True) if "ipykernel_launcher" in child.cmdline()
    ]


@pytest.fixture(scope="module")
def story(tmp_path_factory):
    """A grid killed, run again with one run that fails, mended, changed, its re-run killed, finished; what was seen."""
    project = Project(tmp_path_factory.mktemp("grid"))
    seen: dict = {}

    project.order("03_fine_tuning", "B8", sleep=600)
    project.order("03_fine_tuning", "none", sleep=600)
    project.order("03_fine_tuning", "B11", sleep=600)
    started = project.start("graph")
    until(lambda: any(running(project, f"{run}/03_fine_tuning") for run in ("none", "B8", "B11")), 300)
    seen["second"] = project.do("graph")
    started.kill()
    started.wait()
    gone(project, 5)
    seen["killed"] = project.stamps()
    seen["plan of killed"] = project.plan()

    project.obey()
    project.order("03_fine_tuning", "B11", fail="told to\nfail")
    seen["failed"], seen["half"] = project.do("graph"), project.stamps()
    seen["rows of half"], seen["plan of half"] = project.rows(), project.plan()
    seen["attempts"] = project.record("B11/03_fine_tuning")["attempt"]
    seen["notebook"] = nbformat.read(project.out / "B11" / "03_fine_tuning.ipynb", 4)

    project.obey()
    seen["mended"], seen["whole"] = project.do("graph"), project.stamps()
    seen["again"], seen["rows"] = project.do("graph"), project.rows()
    return project, seen


def test_a_killed_graph_goes_on_and_does_nothing_again_and_a_second_one_beside_it_is_refused(story):
    _, seen = story
    assert seen["second"].returncode == 1
    assert "another graph works in" in seen["second"].stderr
    assert "encoder/model.safetensors" in seen["killed"]
    assert seen["killed"].items() <= seen["whole"].items()
    assert "00_sample_encoder" not in seen["plan of killed"]
    assert any("lost" in why or "stopped" in why for why in seen["plan of killed"].values())


def test_a_failed_run_is_named_and_the_others_finish(story):
    _, seen = story
    assert seen["failed"].returncode == 1
    assert re.search(r"B11/03_fine_tuning +failed .* ValueError: told to\n", seen["failed"].stderr)
    assert seen["notebook"].cells[-1].outputs[0].ename == "ValueError"
    assert seen["attempts"] == 1, "an error of its own is not tried again"
    assert set(seen["plan of half"]) == {"B11/03_fine_tuning", f"B11/{RESULTS}", "06_results"}
    assert seen["plan of half"]["B11/03_fine_tuning"].startswith("failed")
    assert {"B8/results.parquet", "none/results.parquet"} <= set(seen["rows of half"])
    assert not any(name.startswith("B11") for name in seen["rows of half"])


def test_mended_only_what_is_missing_runs_and_then_nothing(story):
    project, seen = story
    assert seen["mended"].returncode == 0, seen["mended"].stderr
    assert {name for name, stamp in seen["whole"].items() if seen["half"].get(name) != stamp} == {
        *(f"B11/{name}" for name in ("alignment.parquet", "results.parquet", "predictions.parquet")),
        *("B11/encoder-seed0/model.safetensors", "results.parquet", "06_results.html"),
    }
    assert seen["again"].returncode == 0
    assert "nothing to be done" in seen["again"].stdout
    assert project.stamps() == seen["whole"]
    assert len(seen["rows"]) == 9
    record = project.record(f"B8/{RESULTS}")  # what it was made from
    assert record["parameters"]["mask"] == "B8"
    assert record["inputs"]["encoder-seed0/model.safetensors"]
    assert set(record["outputs"]) == {"results.parquet", "predictions.parquet", f"{RESULTS}.ipynb"}
    assert record["peak_memory_mib"] > 20


def test_changed_code_re_runs_what_uses_it_and_remarks_nothing(story):
    project, _ = story
    module = project.root / "bandmask" / "scorer.py"
    before = module.read_text()
    try:
        module.write_text(before + "# only a remark\n")
        assert project.plan() == {}
        module.write_text(before.replace("1", "2"))
        found = project.plan()
    finally:
        module.write_text(before)
    assert set(found) == {*(f"{run}/{RESULTS}" for run in ("none", "B8", "B11")), "06_results"}
    assert "code of scorer" in found[f"none/{RESULTS}"]


def test_outputs_copied_elsewhere_are_done_there_too(story, tmp_path):
    project, _ = story
    shutil.copytree(project.folder / "outputs", tmp_path / "a copy")
    elsewhere = {"BANDMASK_OUTPUTS": str(tmp_path / "a copy")}
    assert "Nothing to be done" in project.do("plan", **elsewhere).stdout
    run = project.do("graph", **elsewhere)
    assert run.returncode == 0
    assert "nothing to be done" in run.stdout
    assert f"the table of {tmp_path / 'a copy' / 'tiny'}\n" in run.stdout


def test_a_re_run_of_something_changed_that_fails_leaves_no_old_figure_as_current(story):
    """Its kernel is killed three times; then plan, run, rows and report agree, and mended it ends whole."""
    project, seen = story
    project.write(CHANGED)
    project.order(RESULTS, "B8", sleep=600)
    title, started = f"B8/{RESULTS}", project.start("graph")
    for attempt in (1, 2, 3):
        until(lambda now=attempt: project.record(title)["attempt"] == now and running(project, title), 300)
        kernel = until(lambda: kernels_of(project, title))[0]
        kernel.kill()
        until(lambda: project.record(title)["state"] != "running")
    assert started.wait(300) == 1
    project.obey()
    found = project.plan()
    assert set(found) == {f"B8/{RESULTS}", "06_results"}
    assert "kernel was killed" in found[f"B8/{RESULTS}"]
    assert not {"B8/results.parquet", "B8/predictions.parquet"} & set(project.rows()), "old rows are not current"
    assert (project.out / "B8" / "results.parquet").exists(), "nor are they lost"
    assert project.do("graph").returncode == 0
    assert project.plan() == {}
    assert len(project.rows()) == 9
    assert project.rows() != seen["rows"]
    project.write(EXPERIMENT)
    assert project.do("graph").returncode == 0
    assert project.rows() == seen["rows"]


def test_a_full_disk_is_no_end_of_the_truth(story, tmp_path):
    """The outputs lie on a small disk of their own; the changed run fills it."""
    project, _ = story
    project.write(CHANGED)
    project.order(RESULTS, "B8", bytes=40_000_000)
    command = " ".join(f"'{part}'" for part in project.command("graph"))
    plan, disk = command.replace("'graph'", "'plan'"), project.folder / "outputs"
    script = f"cp -r '{disk}' '{tmp_path}/all' && mount -t tmpfs -o size=12m tmpfs '{disk}'"
    script += f" && cp -r '{tmp_path}/all/.' '{disk}'"
    script += f" && {command}; echo status $?; {plan}; cat '{project.out}/results.parquet'"
    enter = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script]
    done = subprocess.run(enter, env=project.environment, cwd=project.root, capture_output=True, text=True, check=False)
    project.obey()
    project.write(EXPERIMENT)
    if "mount:" in done.stderr or "unshare:" in done.stderr:
        pytest.skip("no small disk: `unshare` can't mount a tmpfs for this user here")
    assert "status 1" in done.stdout, done.stderr
    assert "can't write" in done.stderr
    plan_said = done.stdout.split("status 1")[1]
    assert f"B8/{RESULTS}" in plan_said
    assert '"B8/results.parquet"' not in plan_said, "no old row in the report"


@pytest.fixture
def asleep(tmp_path):
    """A project whose first notebook sleeps."""
    project = Project(tmp_path)
    project.order("01_data_exploration", sleep=600)
    return project


def asleep_at(project: Project) -> None:
    until(lambda: running(project, "packs/sample/01_data_exploration"), 180)


ENDS = [("graph", signal.SIGINT), ("graph", signal.SIGTERM), ("graph", signal.SIGHUP), ("make", signal.SIGTERM)]


@pytest.mark.parametrize(("who", "number"), [*ENDS, ("make", signal.SIGKILL)])
def test_a_signal_ends_everything_and_starts_nothing(asleep, who, number):
    experiment = f"EXPERIMENT={asleep.folder / 'tiny.yaml'}"
    started = asleep.make("run", experiment) if who == "make" else asleep.start("graph", start_new_session=True)
    asleep_at(asleep)
    if number == signal.SIGINT:
        os.killpg(started.pid, number)  # as a terminal does
    else:
        started.send_signal(number)
    gone(asleep, 3 if who == "graph" else 5)
    assert started.wait() == 128 + number or who == "make"
    assert asleep.record("packs/sample/01_data_exploration")["state"] == "stopped"
    assert len(list(asleep.out.rglob("*.json"))) == 1, "nothing was started"


@pytest.mark.parametrize("victim", kills.VICTIMS)
def test_kill_9_of_anything_leaves_nothing_behind(asleep, victim):
    asleep.order("00_sample_encoder", fail="enough")
    started = asleep.start("graph")
    asleep_at(asleep)
    found = until(lambda: [p for p in asleep.processes() if kills.VICTIMS[victim] in p.cmdline()])
    asleep.obey()
    asleep.order("01_data_exploration", fail="enough")
    for process in found:
        with contextlib.suppress(psutil.NoSuchProcess):  # ended with one killed before it
            process.kill()
    if victim in ("graph", "snakemake"):
        gone(asleep, 5)
    kernels = [p for p in found if p.pid != started.pid]
    until(lambda: not any(psutil.pid_exists(p.pid) and p.status() != psutil.STATUS_ZOMBIE for p in kernels), 15)
    assert started.wait(180) != 0
    gone(asleep, 5)


@pytest.mark.parametrize("command", ["run", "lab", "viewer"])
def test_what_a_command_listens_on_is_the_loopback_alone(asleep, command):
    """Others: `site` has no kernel, those that test start the same; several processes, tests/test_train.py."""

    def listened() -> list[str]:
        sockets = [socket for process in asleep.processes() for socket in process.net_connections("inet")]
        return [socket.laddr.ip for socket in sockets if socket.status == psutil.CONN_LISTEN]

    root = asleep.root if command == "run" else ROOT
    started = asleep.make(
        command, f"EXPERIMENT={asleep.folder / 'tiny.yaml' if command == 'run' else 'mini'}", root=root
    )
    enough = 5 if command == "run" else 1  # a kernel has five
    found = until(lambda: addresses if len(addresses := listened()) >= enough else None, 240)
    started.kill()
    for process in asleep.processes():
        with contextlib.suppress(psutil.NoSuchProcess):  # ended with one killed before it
            process.kill()
    assert set(found) <= {"127.0.0.1", "::1"}


def test_a_run_that_takes_too_long_is_ended_and_not_tried_again(asleep):
    """All its cells together: none of them takes as long."""
    asleep.order("01_data_exploration", sleep=6, after=6)
    asleep.write(EXPERIMENT + "timeout_minutes: 0.15\n")
    done = asleep.do("graph")
    assert done.returncode == 1
    said = "timed out: it took longer than timeout_minutes = 0.15"
    record = asleep.record("packs/sample/01_data_exploration")
    assert (record["state"], record["error"], record["attempt"]) == ("failed", said, 1)
    assert re.search(rf"01_data_exploration +failed +\d\.\d min +{re.escape(said)}", done.stderr)
    gone(asleep, 3)


def test_a_stalled_run_says_since_when_and_a_clock_that_jumped_makes_no_run_lost(asleep):
    started = asleep.start("node", "--title", "packs/sample/01_data_exploration")
    asleep_at(asleep)

    def stalled() -> bool:
        for path in (asleep.out / "packs" / "sample").glob("01_data_exploration.[ij]*"):
            os.utime(path, (time.time() - 3600, time.time() - 3600))
        return re.search(r"stalled .* silent since \d\d", asleep.do("status").stdout) is not None

    until(stalled)
    started.terminate()
    assert started.wait(30) == 128 + signal.SIGTERM
    assert "stopped" in asleep.do("status").stdout


def test_of_two_at_once_the_second_waits_and_finds_it_there(asleep):
    asleep.order("01_data_exploration", sleep=5)
    title = "packs/sample/01_data_exploration"
    first = asleep.start("node", "--title", title)
    until(lambda: running(asleep, title))
    second = asleep.do("node", "--title", title)
    assert first.wait() == second.returncode == 0
    assert "already there" in second.stdout


def test_kills_at_random_during_first_runs_and_re_runs_change_no_row(tmp_path):
    """Real notebooks; more of it by `python tests/slow/kills.py 28`, and on a cluster with `--slurm`."""
    kills.campaign(tmp_path, 4)
