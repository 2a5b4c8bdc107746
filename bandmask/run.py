"""The graph of notebooks: what an experiment needs, how it stands, and the one door through which it runs.

`python -m bandmask.run graph sample`, and `plan`, `status` in its place. A node is one notebook, executed by
papermill. Its record (`03_fine_tuning.json`: parameters, code, checksums of what it read and left) alone decides
whether it is done; Snakemake, which schedules, looks for a marker that is put there by what the record says.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import resource
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import IO, Any

import yaml
from filelock import FileLock

from bandmask import bands, datasets, files, params, provenance

SILENT_AFTER = 600.0  # seconds without a word before a running node is called stalled; papermill saves each
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


@dataclass(frozen=True, eq=False)
class Node:
    """One execution of a notebook."""

    notebook: str  # such as `03_fine_tuning`
    folder: Path  # where the executed notebook, its record and its log go
    title: str  # for people, and unique: `B8/03_fine_tuning`
    given: Mapping[str, Any]  # parameters above the notebook's defaults; other notebooks' may be among them
    inputs: tuple[Path, ...]  # files that it reads
    outputs: tuple[Path, ...]  # files that it must leave
    makers: Mapping[Path, Node]  # of its inputs; a file that is given from outside has none
    gpu: int  # how many it wants where there are any

    @property
    def record(self) -> Path:
        """What the last execution was made from, and how it went; the executed notebook and its log lie beside it."""
        return self.folder / f"{self.notebook}.json"

    @property
    def marker(self) -> Path:
        """There while the record says done: Snakemake's only output."""
        return self.folder / f".{self.notebook}.done"

    @property
    def lock(self) -> Path:
        """Held by whoever executes it."""
        return self.folder / f".{self.notebook}.lock"

    @property
    def after(self) -> list[str]:
        """Titles of the nodes that it waits for."""
        return list(dict.fromkeys(maker.title for maker in self.makers.values()))

    def made_from(self, done: Container[str] = ()) -> dict[str, Any]:
        """Everything that decides what it makes; an input that is not what its own record says counts as absent.

        Records of the nodes in `done` were asked already.
        """
        read = provenance.file_checksums(self.inputs, self.folder)
        for path, name in zip(self.inputs, read, strict=True):
            maker = self.makers.get(path)
            if not (maker and maker.title in done) and files.distrust(path, [maker.record] if maker else None):
                read[name] = None
        values, code = provenance.values_of(self.notebook, self.given), provenance.code_of_notebook(self.notebook)
        return {"parameters": values, "code": code, "inputs": read}

    def left(self, *more: Path) -> dict[str, str | None]:
        """Checksums of what lies where its outputs belong, and of `more`."""
        return provenance.file_checksums([*self.outputs, *more], self.folder)


def nodes(given: Mapping[str, Any]) -> dict[str, Node]:
    """What an experiment (its parameters, of `params.load_experiment`) needs, by title, in an order that can be made.

    What is in service is a node even where no mask is `none`, so that all who stand on it stand on the same.
    """
    p = {**params.vocabulary(), **given}
    given = {**given, "dataset": p["dataset"], "encoder": p["encoder"]}  # notebooks differ in what is taken for granted
    out, tasks, beyond = params.experiment_folder(p["experiment"]), p["tasks"], set(p["beyond"])
    found: dict[str, Node] = {}

    def add(notebook: str, where: str, leaves: Sequence[Path], reads: Sequence[Path], gpu: int = 1, **own: Any) -> None:
        made = {path: node for node in found.values() for path in node.outputs}
        reads = tuple(dict.fromkeys(reads))
        makers = {path: made[path] for path in reads if path in made}
        title = f"{where}/{notebook}" if where else notebook
        found[title] = Node(notebook, out / where, title, {**given, **own}, reads, tuple(leaves), makers, gpu)

    def saved(folder: Path | str, names: Sequence[str] = params.ENCODER_FILES) -> list[Path]:
        return [Path(folder, name) for name in names] if Path(folder).is_dir() and folder else []

    def outside(name: str) -> list[Path]:
        """Files of a parameter that names one, or a folder of them."""
        path = Path(p[name])
        return [] if not p[name] else sorted(filter(Path.is_file, path.iterdir())) if path.is_dir() else [path]

    def encoders(where: str, names: Sequence[str] = params.ENCODER_FILES) -> list[Path]:
        return [out / where / f"encoder-seed{seed}" / name for seed in p["seeds"] for name in names]

    packs, wanted = {}, {"dataset": True, "segmentation_dataset": "segmentation" in tasks}
    wanted["healthy_images"] = "faulty_bands" in beyond
    for key in (key for key, needed in wanted.items() if needed and p[key]):
        folder = datasets.pack_folder(p[key])
        packs[key] = folder / "pack.json"
        if p[key] in datasets.PACKERS:  # else a pack of one's own, which is there
            add("01_data_exploration", f"packs/{folder.name}", [packs[key]], [], gpu=0, dataset=p[key])
    encoder = saved(files.MINI / "encoder", params.ANY_BAND_FILES) if p["encoder"] == "mini" else saved(p["encoder"])
    encoder += outside("weights")
    if p["folds"]:  # every method on every loss: a fold each, then the tables of all of them
        for task in tasks:
            pack = packs["dataset" if task == "classification" else "segmentation_dataset"]
            told: list[Path] = []
            for fold in p["folds"]:
                left = [out / f"{task}-fold{fold}" / name for name in ("findings.parquet", "costs.csv")]
                add("11_findings", left[0].parent.name, left, [pack, *encoder], task=task, fold=fold)
                told += left
            pages = [out / f"{task}.{kind}" for kind in ("md", "parquet")]
            add("11_findings", f"{task}-tables", pages, told, gpu=0, task=task, report="folds")
        return found
    if p["encoder"] in params.SMALL:
        encoder = [out / "encoder" / name for name in params.ENCODER_FILES]
        add("00_sample_encoder", "", encoder, [packs["dataset"], *saved(p["teacher"]), *outside("teacher_weights")])

    runs = {bands.mask_slug(mask, p["mask_scheme"]): mask for mask in given.get("masks", ())}
    beyond |= {"any_band"} if runs and tasks and "any-band" in p["methods"] else set()
    reads = {"classification": [packs["dataset"], *encoder]}
    pixels = [packs.get("segmentation_dataset", packs["dataset"]), *outside("decoder_weights")]
    reads["segmentation"] = [*reads["classification"], *pixels]
    served = {task: [out / "in_service" / task / name for name in params.HEAD_FILES] for task in reads}
    trained = [task for task in reads if (task in tasks and runs) or (task == "classification" and beyond)]
    if p["dataset"] == "eurosat-mini":  # test images alone, so its heads come with the package
        served["classification"], trained = saved(files.MINI / "heads", params.HEAD_FILES), []
    for task in trained:
        notebook, *names = params.TASK_FILES[task]
        add(notebook, "none", [*(out / "none" / name for name in names), *served[task]], reads[task], mask="none")

    def go_beyond(name: str, reads_too: Sequence[Path] = (), leaves_too: Sequence[Path] = ()) -> None:
        notebook, where, leaves = params.BEYOND[name]
        left = [*(out / where / leaf for leaf in leaves), *leaves_too]
        add(notebook, where, left, [*reads["classification"], *served["classification"], *reads_too])

    every = encoders("any-band", params.ANY_BAND_FILES)
    if "any_band" in beyond:
        go_beyond("any_band", [files.RECORDS / name for name in ("recommend.csv", "subsets.parquet")], every)
    else:
        every = [path for path in every if path.is_file()]
    for run, mask in runs.items():
        left = [out / run / "alignment.parquet", *encoders(run)]
        add("03_fine_tuning", run, left, reads["classification"], p["processes"], mask=mask)
        for task in tasks if mask != "none" else ():
            notebook, *names = params.TASK_FILES[task]
            tuned = [*encoders(run), *(every if "any-band" in p["methods"] else [])]
            add(notebook, run, [out / run / name for name in names], [*reads[task], *served[task], *tuned], mask=mask)
    if "robustness" in beyond:
        made = {"any-band": every} | {run: encoders(run) for run in runs}
        shown = files.project_root() / "docs/findings/robustness.parquet"
        go_beyond("robustness", [shown, *(path for run in p["fine_tuned"] for path in made.get(run, ()))])
    if "faulty_bands" in beyond:
        go_beyond("faulty_bands", [packs["healthy_images"]] if "healthy_images" in packs else [])
    if runs:
        kept = {"alignment.parquet", *(name for task in tasks for name in params.TASK_FILES[task][1:])}
        rows = [path for node in found.values() for path in node.outputs if path.name in kept]
        others = [path for name in p["variants"] for path in sorted(params.experiment_folder(name).glob("*/*.parquet"))]
        rows += [path for path in others if path.name in kept and not files.distrust(path)]
        add("06_results", "", [out / name for name in ("results.parquet", "06_results.html", "found.md")], rows, gpu=0)
    return found


@dataclass(frozen=True)
class State:
    """How a node stands: `done`, `running`, `stalled`, `failed`, `stopped`, `lost` or `to do`, and why."""

    name: str
    why: str = ""
    seconds: float | None = None


def look(of: Mapping[str, Node]) -> dict[str, State]:
    """How nodes stand, by title, from their records and the files that lie there; nothing is written."""
    found: dict[str, State] = {}
    done: set[str] = set()
    for title, node in of.items():
        record = files.read_record(node.record)
        why = files.stale(record, node.left(), **node.made_from(done))
        again = next((other for other in node.after if other not in done), None)
        kind, seconds, executed = record.get("state"), record.get("seconds"), node.record.with_suffix(".ipynb")
        if kind == "running" and _held(node.lock):
            heard = max(path.stat().st_mtime for path in (node.record, executed) if path.exists())
            silent = time.time() - heard > SILENT_AFTER
            since = f"silent since {datetime.fromtimestamp(heard):%d %b %H:%M}" if silent else record["started"]
            found[title] = State("stalled" if silent else "running", since)
        elif kind == "running":
            found[title] = State("lost", "its process is gone; the next run goes on from its checkpoint")
        elif kind in ("failed", "stopped") and why.startswith(kind):
            found[title] = State(kind, record.get("error") or "", seconds)
        elif why or again:
            found[title] = State("to do", why or f"{again} is made again first", seconds)
        else:
            found[title] = State("done", "", seconds)
            done.add(title)
    return found


def settle(of: Mapping[str, Node]) -> list[str]:
    """Put markers where records say done, and say in the others that they are outdated; titles of what must run.

    Old figures stay on disk, but nothing shows them as current: a report that is to be made again steps aside, and
    runs of a mask that the experiment no longer has, made from who knows which parameters, do not count.
    """
    states, records = look(of), {node.record for node in of.values()}
    out = params.experiment_folder(next(iter(of.values())).given["experiment"])
    for path in out.glob("*/[0-9][0-9]_*.json"):
        if path not in records:
            _restate(path, "done", "outdated", "the experiment no longer asks for it")
    for title, node in of.items():
        node.folder.mkdir(parents=True, exist_ok=True)
        if states[title].name == "done":
            _restate(node.record, "outdated", "done")
            node.marker.touch()
            continue
        node.marker.unlink(missing_ok=True)
        _restate(node.record, "done", "outdated", states[title].why)
        left = [*node.outputs, node.folder / "tables"] if node.notebook == "06_results" else []
        for path in (path for path in left if path.exists()):
            shutil.rmtree(aside := path.with_name(f"outdated_{path.name}"), ignore_errors=True)
            path.replace(aside)
    return [title for title, state in states.items() if state.name != "done"]


class Failed(Exception):
    """A notebook ended in an error, or without what it should leave; empty if that was said before."""


class Stopped(Exception):
    """By which signal, and the status to end with."""


def execute(node: Node, *, threads: int = 1, gpu: int = 0, attempt: int = 1, anew: bool = False) -> str:
    """Execute a node and keep its record; `done`, or `already there` if its record says so.

    GPUs are claimed for it alone; at a second `attempt`, an error of the notebook itself is not tried again; `anew`
    executes what is there already, from whatever of its inputs is.

    Raises:
        Failed: an error of the notebook, or a killed kernel.
        ValueError: GPUs that are not there.
    """
    node.folder.mkdir(parents=True, exist_ok=True)
    with FileLock(node.lock):
        made_from, began, executed = node.made_from(), time.time(), node.record.with_suffix(".ipynb")
        why = files.stale(files.read_record(node.record), node.left(), **made_from)
        if not why and not anew:
            _restate(node.record, "outdated", "done")
            return "already there"
        if attempt > 1 and why.startswith("failed"):
            raise Failed("")  # an error of the notebook, not of the machine
        if not anew and (wrong := [name for name, checksum in made_from["inputs"].items() if not checksum]):
            raise Failed(f"reads {', '.join(wrong)}: not there, or not what its own record vouches for")
        with claim(gpu) as claimed:
            host = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
            record = {"state": "running", "error": None, **made_from, "outputs": dict.fromkeys(node.left(executed))}
            record |= {"started": f"{datetime.fromtimestamp(began):%d %b %H:%M}", "attempt": attempt, "host": host}
            record |= {"threads": threads, "gpu": ",".join(claimed) or None}
            _write_json(node.record, record)
            try:
                record["state"], error = _papermill(node, threads, claimed)
            except Stopped as stopped:
                _write_json(node.record, {**record, "state": "stopped", "error": str(stopped.args[0])})
                raise
        record |= {"error": error or None, "outputs": node.left(executed), "seconds": round(time.time() - began, 1)}
        record["peak_memory_mib"] = round(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024, 1)
        _write_json(node.record, record)
        if error:
            raise Failed(error)
        return "done"


def _papermill(node: Node, threads: int, gpus: Sequence[str]) -> tuple[str, str]:
    """How the notebook ended: `done`, `failed` by an error of its own, or `stopped` by anything else; and why."""
    executed, log = node.record.with_suffix(".ipynb"), node.record.with_suffix(".log")
    executed.unlink(missing_ok=True)
    values = {name: value for name, value in node.given.items() if name in params.declared(node.notebook)}
    command = [sys.executable, "-m", "papermill", "--no-progress-bar", "--log-output", "-y", yaml.safe_dump(values)]
    os.environ.update(dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(threads)))
    os.environ["BANDMASK_RECORD"] = str(node.record)
    if gpus:
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
    command += [str(params.notebook_path(node.notebook)), str(executed)]
    minutes = node.given.get("timeout_minutes") or None
    try:
        with log.open("w", encoding="utf-8") as out:
            status = supervise(command, out=out, seconds=minutes and 60 * minutes)
    except subprocess.TimeoutExpired:
        return "failed", f"timed out: it took longer than timeout_minutes = {minutes:g}"
    if error := _failing_cell(executed):
        return "failed", error
    if status:
        said = re.findall(r"^[\w.]+(?:Error|Exception): .*", log.read_text(encoding="utf-8", errors="replace"), re.M)
        dead = any("Kernel died" in line for line in said)
        said = ["the kernel was killed (out of memory?)"] if dead else said or [f"papermill ended with {status}"]
        return "stopped", said[-1]
    if (page := executed.with_suffix(".html")) in node.outputs:
        from bandmask import results

        results.write_page(executed, page)
    lacking = [name for name, checksum in node.left().items() if checksum is None]
    return ("failed", f"ended without writing {', '.join(lacking)}") if lacking else ("done", "")


def _failing_cell(executed: Path) -> str:
    """The error that ended a notebook; the cells that were not reached are left out, so that it stands at the end."""
    notebook: dict[str, Any] = {"cells": []}
    with suppress(OSError, ValueError):  # papermill was killed before it had written it, or while it did
        notebook = json.loads(executed.read_bytes())
    for number, cell in enumerate(notebook["cells"]):
        if cell["metadata"].get("papermill", {}).get("exception"):
            notebook["cells"] = notebook["cells"][: number + 1]
            _write_json(executed, notebook)
            error = next(output for output in cell["outputs"] if output["output_type"] == "error")
            return f"{error['ename']}: {error['evalue']}".splitlines()[0]
    return ""


def _write_json(path: Path, held: Mapping[str, Any]) -> None:
    with files.writing(path) as partial:
        partial.write_text(json.dumps(held, indent=1), encoding="utf-8")


def _restate(path: Path, was: str, now: str, why: str | None = None) -> None:
    """Change the state of a record that has a certain one."""
    if (record := files.read_record(path)).get("state") == was:
        _write_json(path, {**record, "state": now, "error": why})


def _held(lock: Path) -> bool:
    """Whether a process holds it: on this host or another, in whatever PID namespace."""
    try:
        free = files.free_lock(lock)
    except OSError:  # not ours to lock: somebody else's run
        return True
    if free:
        free.release()
    return free is None


def visible() -> list[str]:
    """GPUs that this process may use: of `CUDA_VISIBLE_DEVICES` if it is set, else of `nvidia-smi`."""
    if (chosen := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [name.strip() for name in chosen.split(",") if name.strip() not in ("", "-1")]
    command = ["nvidia-smi", "--query-gpu=uuid", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout.split()
    except (OSError, subprocess.SubprocessError):
        return []  # a driver that doesn't answer has no GPU to give


@contextmanager
def claim(wanted: int) -> Iterator[list[str]]:
    """GPUs that nobody else holds while the block runs, per user and machine; waits until there are as many.

    What a job of Slurm sees is its own already, and called 0 in every job, so there nothing is locked.

    Raises:
        ValueError: more are wanted than there are.
    """
    known = visible() if wanted else []
    if wanted > len(known):
        raise ValueError(f"the run wants {wanted} GPU(s), and {len(known)} are visible: {', '.join(known) or 'none'}")
    if not wanted or "SLURM_JOB_ID" in os.environ:
        yield known[:wanted]
        return
    folder = Path(tempfile.gettempdir()) / f"bandmask-gpus-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    held: dict[str, FileLock] = {}
    try:
        with FileLock(folder / ".claim"):  # one at a time: two who each hold half of what they want wait for ever
            for name in itertools.cycle(known):
                if name not in held and (lock := files.free_lock(folder / f"{name.replace('/', '_')}.lock")):
                    held[name] = lock
                if len(held) == wanted:
                    break
                time.sleep(0.3)
        yield list(held)
    finally:
        for lock in held.values():
            lock.release()


def supervise(
    command: Sequence[str],
    *,
    out: IO[str] | None = None,
    jobs: str = "",
    seconds: float | None = None,
    bound: str = "KILL",
) -> int:
    """Run a command and return its status; however this call ends, all that the command started ends within 3 s.

    It gets a session of its own, so that a terminal's signals come here alone, and writes to `out`. Jobs on a cluster
    whose names begin with `jobs` are cancelled if it leaves any. After so many seconds a `subprocess.TimeoutExpired`.
    Should this process be killed, the command gets the signal `bound`.
    """
    binding = ["setpriv", "--pdeathsig", bound] if shutil.which("setpriv") else []  # of Linux
    child = subprocess.Popen([*binding, *command], stdout=out, stderr=out, start_new_session=True)
    try:
        return child.wait(seconds)
    finally:
        if child.returncode is None:
            _end(child)
        if child.returncode and jobs and shutil.which("squeue"):  # Snakemake would, after up to three minutes
            told = subprocess.run(["squeue", "--me", "--noheader", "--format=%j %i"], capture_output=True, text=True)
            left = [line.split()[1] for line in told.stdout.splitlines() if line.startswith(jobs)]
            ended = subprocess.run(["scancel", *left], capture_output=True, text=True) if left else told
            if ended.returncode:
                print(f"jobs named {jobs}_… may go on: {ended.stderr.strip()}", file=sys.stderr)


def keep(jobs: str, *command: str) -> int:
    """Between a graph and Snakemake on a cluster: whichever of the three is killed, no job goes on.

    Snakemake itself, told of its parent's end, stays for half a minute and may miss a job it has just submitted.
    """
    _handle_signals()
    try:
        return supervise(command, jobs=jobs)
    except Stopped as stopped:
        return int(stopped.args[1])


def _end(child: subprocess.Popen[bytes]) -> None:
    """End a process and all in its session."""
    child.kill()  # first: it must not start another
    child.wait()
    for number in (signal.SIGTERM, signal.SIGKILL):
        deadline = time.monotonic() + 1.5
        with suppress(ProcessLookupError):
            os.killpg(child.pid, number)
            while time.monotonic() < deadline:
                os.killpg(child.pid, 0)  # as long as one of them is there
                time.sleep(0.1)


def graph(named: str, variant: str = "", *, profile: str = "", gpu: int = 0, more: Sequence[str] = ()) -> int:
    """Run an experiment; 0 if all is done. What is done is not done again; a failed run leaves the others running.

    Arguments are the command line's; `more` are Snakemake's, above ours. A ValueError if another graph works there.
    """
    given = params.load_experiment(named, variant)
    of, out = nodes(given), params.experiment_folder(given["experiment"])
    out.mkdir(parents=True, exist_ok=True)
    lock = files.free_lock(out / ".graph.lock")
    if lock is None:
        raise ValueError(f"another graph works in {out}: wait (`make status`), stop it, or take another experiment")
    try:
        todo = settle(of)
        said = f"{len(todo)} of {len(of)} notebooks to run; how far they are: make status EXPERIMENT={named}"
        print(f"{out}: {said + f' VARIANT={variant}' * bool(variant) if todo else 'nothing to be done'}", flush=True)
        here, cores = 0 if given.get("device") == "cpu" else len(visible()), os.cpu_count() or 1
        threads, jobs = max(1, cores // here) if here else min(cores, 4), ""
        command = [sys.executable, "-m", "snakemake", "--snakefile", str(files.project_root() / "Snakefile")]
        command += ["--nolock", "--keep-going", "--rerun-incomplete", "--retries", "2", "--rerun-triggers", "mtime"]
        if profile:
            threads, jobs = 8, f"bandmask-{uuid.uuid4().hex}"
            command += ["--workflow-profile", profile, "--slurm-jobname-prefix", jobs]
        else:
            command += ["--cores", "all", "--resources", f"gpu={here}"]
            gpu = int(bool(here))
        command += ["--quiet", "all", *more, "--config", f"experiment={named}", f"variant={variant}"]
        os.environ["BANDMASK_GRAPH"] = str(os.getpid())
        command += [f"threads={threads}", f"gpu={gpu}", f"shared={int(not (profile or here))}"]
        if jobs:
            keeper = "import sys; from bandmask import run; sys.exit(run.keep(*sys.argv[1:]))"
            command = [sys.executable, "-c", keeper, jobs, *command]
        status = supervise(command, jobs=jobs, bound="TERM" if jobs else "KILL") if todo else 0
        last = [*of.values()][-1]  # a report (06_results, the tables of folds), or what goes past the thesis
        if status:
            print(f"\n{show(of, plan=True)}\nA notebook that failed ends in its failing cell.", file=sys.stderr)
        report = last.gpu == 0 and files.read_record(last.record).get("state") != "failed"
        if status and report and any(last.made_from()["inputs"].values()):
            print("The report is made from what has finished.", file=sys.stderr, flush=True)
            execute(last, threads=cores, anew=True)
        shown = last.notebook == "06_results" or "any-band/08_any_band_encoder" in of
        if shown and last.outputs[0].exists() and not files.distrust(last.outputs[0]):
            from bandmask import results

            print(results.closing(out), flush=True)
        return status
    finally:
        lock.release()


def show(of: Mapping[str, Node], *, plan: bool = False) -> str:
    """How nodes stand, a line each; of a plan only those that would run."""
    states = look(of)
    shown = {title: state for title, state in states.items() if not plan or state.name != "done"}
    width = max(map(len, shown), default=0)
    minutes = {title: f"{s.seconds / 60:.1f} min" if s.seconds is not None else "" for title, s in shown.items()}
    lines = [f"{title:{width}}  {s.name:8} {minutes[title]:>9}  {s.why}".rstrip() for title, s in shown.items()]
    packs = {of[title].given["dataset"] for title in shown if of[title].notebook == "01_data_exploration"}
    lines += [f"{name} is not there yet: {how}" for name in sorted(packs) if plan and (how := datasets.absent(name))]
    due = sum(state.name != "done" for state in states.values())
    said = f"{due} of {len(of)} to run" if due else "Nothing to be done"
    took: dict[str, list[float]] = {}  # seconds that each notebook took, whenever it ended
    for title, state in states.items():
        took.setdefault(of[title].notebook, []).extend([state.seconds] if state.seconds else [])
    like = [took[of[title].notebook] for title, state in states.items() if state.name != "done"]
    if known := [statistics.median(times) for times in like if times]:
        said += f", about {sum(known) / 60:.0f} min one after another for {len(known)} of them, as their like took"
    return "\n".join([*lines, f"{said}: what is done has a record with these parameters, code and checksums."])


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; 0 if what was asked for is there afterwards."""
    parser = argparse.ArgumentParser(prog="python -m bandmask.run", description="Run notebooks as a graph.")
    add = parser.add_argument
    add("command", choices=["graph", "plan", "status", "node"])
    add("named", nargs="?", default="sample", help="of `params/experiments`, or the path of a YAML file")
    add("--variant", default="", help="in params/<experiment>/; `all`: the experiment and each of them")
    add("--title", default="", help="of a node: B8/03_fine_tuning")
    add("--profile", default="", help="of Snakemake: profiles/slurm")
    add("--gpu", type=int, default=0, help="that a job of the cluster asks for, or a node claims")
    add("--threads", type=int, default=os.cpu_count() or 1, help="of a node")
    add("--attempt", type=int, default=1, help="at a node; an error of the notebook gets one")
    asked, more = parser.parse_known_args(arguments)
    if more and asked.command != "graph":
        parser.error(f"unknown: {' '.join(more)}")
    _handle_signals()
    wanted, ended = [asked.variant], dict[str, int]()
    if asked.variant == "all":  # the experiment's report comes once more, with theirs, and that end counts
        beside = sorted(path.stem for path in (files.project_root() / "params" / asked.named).glob("*.yaml"))
        wanted = ["", *beside, *([""] if asked.command == "graph" else [])]
    for variant in wanted:
        try:
            ended[variant] = _do(asked, variant, more)
        except (Failed, ValueError, OSError) as error:
            ended[variant] = 1
            if str(error):
                print(f"{asked.named}: {error}", file=sys.stderr)
        except Stopped as stopped:
            print(f"Stopped: {stopped.args[0]}. The next run goes on from here.", file=sys.stderr)
            return int(stopped.args[1])
    return next(filter(None, ended.values()), 0)


def _handle_signals() -> None:
    for number in SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:  # as `nohup` has it
            signal.signal(number, _stop)


def _stop(number: int, _: object) -> None:
    for each in SIGNALS:  # a second Ctrl-C must not cut the ending short
        signal.signal(each, signal.SIG_IGN)
    raise Stopped(f"ended by {signal.Signals(number).name}", 128 + number)


def _do(asked: argparse.Namespace, variant: str, more: Sequence[str]) -> int:
    if asked.command == "graph":
        return graph(asked.named, variant, profile=asked.profile, gpu=asked.gpu, more=more)
    given = params.load_experiment(asked.named, variant)
    of = nodes(given)
    if asked.command == "node":
        options = {name: getattr(asked, name) for name in ("threads", "gpu", "attempt")}
        print(f"{asked.title}: {execute(of[asked.title], **options)}", flush=True)
        return 0
    if asked.variant == "all":
        print(f"\n{asked.named}{f', variant {variant}' if variant else ''}")
    print(show(of, plan=asked.command == "plan"))
    if asked.command == "status" and (index := params.experiment_folder(given["experiment"]) / "index.html").exists():
        print(f"Every notebook with its figures: {index.resolve()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
