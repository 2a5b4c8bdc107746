"""The graph of notebooks: what an experiment needs, how it stands, and the one door through which it runs.

`python -m bandmask.run graph sample`, and `plan`, `status`, `report`, `thesis` in its place. A node is one notebook,
executed by papermill. Its record (`03_fine_tuning.json`: parameters, code, checksums of what it read and left) alone
decides whether it is done; Snakemake, which schedules, looks for a marker that is put there by what the record says.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from bandmask import bands, datasets, files, params, provenance

SILENT_AFTER = 120.0  # seconds without work before a running node is called stalled
STEP = 0.3  # seconds between two looks


@dataclass(frozen=True)
class Node:
    """One execution of a notebook.

    Attributes:
        notebook: such as `03_fine_tuning`.
        folder: where the executed notebook, its record and its log go.
        given: parameters above the notebook's defaults; other notebooks' may be among them.
        inputs: files it reads that other nodes leave, or that are given from outside.
        outputs: files it must leave.
        title: for people, and unique: `B8/03_fine_tuning`.
        makers: of inputs that other nodes make, where these keep their records.
        after: titles of those nodes.
        gpus: how many it wants where there are any.
    """

    notebook: str
    folder: Path
    given: Mapping[str, Any]
    inputs: tuple[Path, ...]
    outputs: tuple[Path, ...]
    title: str
    makers: Mapping[Path, Path]
    after: tuple[str, ...]
    gpus: int

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

    def made_from(self, done: Container[Path | None] = ()) -> dict[str, Any]:
        """Everything that decides what it makes; an input that is not what its own record says counts as absent.

        Args:
            done: records that were asked already, and say so: what their nodes left is as they say.
        """
        read = provenance.file_checksums(self.inputs, self.folder)
        for path, name in zip(self.inputs, read, strict=True):
            if self.makers.get(path) not in done and self.distrust(path):
                read[name] = None
        values, code = provenance.values_of(self.notebook, self.given), provenance.code_of_notebook(self.notebook)
        return {"parameters": values, "code": code, "inputs": read}

    def distrust(self, path: Path) -> str:
        """Why one of its inputs must not be used; empty if nothing speaks against it."""
        return files.distrust(path, [self.makers[path]] if path in self.makers else None)

    def left(self) -> dict[str, str | None]:
        """Checksums of what lies where its outputs belong."""
        return provenance.file_checksums(self.outputs, self.folder)


def _pack_of(name: str, parameters: Mapping[str, Any]) -> Path:
    return datasets.pack_folder(name)


def nodes(given: Mapping[str, Any]) -> dict[str, Node]:
    """What an experiment needs, by title, in an order in which it can be made.

    Args:
        given: its parameters, as `params.load_experiment` reads them.
    """
    p = {**params.vocabulary(), **given}
    out, tasks, scheme = params.experiment_folder(p["experiment"]), p["tasks"], p["mask_scheme"]
    found: dict[str, Node] = {}

    def add(
        notebook: str, where: str, leaves: Sequence[Path], reads: Sequence[Path] = (), gpus: int = 1, **own: Any
    ) -> None:
        reads = list(dict.fromkeys(reads))
        made = {path: node for node in found.values() for path in node.outputs}
        makers = {path: made[path].record for path in reads if path in made}
        after = tuple(dict.fromkeys(made[path].title for path in makers))
        title = f"{where}/{notebook}" if where else notebook
        values = {**given, **own}
        found[title] = Node(notebook, out / where, values, tuple(reads), tuple(leaves), title, makers, after, gpus)

    def encoders(where: str) -> list[Path]:
        return [out / where / f"encoder-seed{seed}" / name for seed in p["seeds"] for name in params.ENCODER_FILES]

    used = ("dataset", *(["segmentation_dataset"] if "segmentation" in tasks else []))
    packs = {key: _pack_of(p[key], p) / "pack.json" for key in used}
    for card, key in {card: key for key, card in packs.items() if Path(p[key]).name == p[key]}.items():
        add("01_data_exploration", f"packs/{card.parent.name}", [card], gpus=0, dataset=p[key])
    for task in tasks if p["folds"] else ():  # every method on every loss: a fold each, then the tables of all of them
        told = [out / f"{task}-fold{fold}" / "findings.parquet" for fold in p["folds"]]
        for fold, table in zip(p["folds"], told, strict=True):
            pack = packs["dataset" if task == "classification" else "segmentation_dataset"]
            add("11_findings", table.parent.name, [table, table.with_name("costs.csv")], [pack], task=task, fold=fold)
        pages = [out / f"{task}.{kind}" for kind in ("md", "parquet")]
        add("11_findings", f"{task}-tables", pages, told, gpus=0, task=task, report="folds")
    if p["folds"]:
        return found
    encoder = [Path(p["weights"])] if p["weights"] else []
    if p["encoder"] in params.SMALL:
        encoder = [out / "encoder" / name for name in params.ENCODER_FILES]
        add("00_sample_encoder", "", encoder, [packs["dataset"]])
    elif p["encoder"] == "mini":
        encoder = [files.MINI / "encoder" / name for name in params.ENCODER_FILES]
    elif Path(p["encoder"]).is_dir():  # one's own, saved by `save_encoder`
        encoder = [Path(p["encoder"]) / name for name in params.ENCODER_FILES]
    runs = {bands.mask_slug(mask, scheme): mask for mask in given.get("masks", ())}
    for run in sorted(runs, key=lambda run: runs[run] != "none"):  # what is in service first
        reads, mask = [packs["dataset"], *encoder], {"mask": runs[run]}
        add("03_fine_tuning", run, [out / run / "alignment.parquet", *encoders(run)], reads, p["processes"], **mask)
        for task in tasks:
            notebook, *names = params.TASK_FILES[task]
            tuned = [] if runs[run] == "none" else encoders(run)
            served = [out / "none" / names[0]] if "none" in runs and runs[run] != "none" else []
            pixels = [packs[used[1]], *map(Path, filter(None, [p["decoder_weights"]]))] if len(used) > 1 else []
            more = [*(pixels if task == "segmentation" else []), *served, *tuned]
            add(notebook, run, [out / run / name for name in names], [*reads, *more], **mask)
    for name, (notebook, where, leaves, needs) in params.BEYOND.items():
        if name not in p["beyond"]:
            continue
        served = [out / "none" / "results.parquet"] if "none" in runs and "classification" in tasks else []
        any_band = [path for other in needs if other in p["beyond"] for path in encoders(params.BEYOND[other][1])]
        left = [out / where / leaf for leaf in leaves] + (encoders(where) if name == "any_band" else [])
        add(notebook, where, left, [packs["dataset"], *encoder, *any_band, *served])
    if not runs:  # it asks for what goes past the thesis alone
        return found
    kept = {"alignment.parquet", *(name for names in params.TASK_FILES.values() for name in names[1:])}
    rows = [path for node in found.values() for path in node.outputs]
    rows += [path for name in p["variants"] for path in sorted(params.experiment_folder(name).glob("*/*.parquet"))]
    left = [out / "results.parquet", out / "06_results.html"]
    add("06_results", "", left, [path for path in rows if path.name in kept], gpus=0)
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
    for title, node in of.items():
        record = files.read_record(node.record)
        done = {of[other].record for other in found if found[other].name == "done"}
        why = provenance.difference(record, node.made_from(done), node.left())
        again = next((other for other in node.after if found[other].name != "done"), None)
        kind, seconds = record.get("state"), record.get("seconds")
        if kind == "running" and _held(node.lock):
            heard = node.record.stat().st_mtime
            stalled = time.time() - heard > SILENT_AFTER
            since = f"no work since {datetime.fromtimestamp(heard):%d %b %H:%M}" if stalled else record["started"]
            found[title] = State("stalled" if stalled else "running", since)
        elif kind == "running":
            found[title] = State("lost", "its process is gone; the next run goes on from its checkpoint")
        elif why and kind in ("failed", "stopped") and why.startswith(kind):
            found[title] = State(kind, record.get("error") or "", seconds)
        elif why or again:
            found[title] = State("to do", why or f"{again} is made again first", seconds)
        else:
            found[title] = State("done", "", seconds)
    return found


def settle(of: Mapping[str, Node]) -> list[str]:
    """Put markers where records say done, and say in the others that they are outdated; titles of what must run.

    Old figures stay on disk, but nothing shows them as current: a report that is to be made again steps aside, and
    runs of a mask that the experiment no longer has, made from who knows which parameters, do not count.
    """
    states, records = look(of), {node.record for node in of.values()}
    out = params.experiment_folder(next(iter(of.values())).given["experiment"])
    for path in out.glob("*/[0-9][0-9]_*.json"):
        if path not in records and (record := files.read_record(path)).get("state") == "done":
            _write_record(path, {**record, "state": "outdated", "error": "the experiment no longer asks for it"})
    for title, node in of.items():
        record, state = files.read_record(node.record), states[title]
        node.folder.mkdir(parents=True, exist_ok=True)
        if state.name == "done":
            if record["state"] == "outdated":
                _write_record(node.record, {**record, "state": "done", "error": None})
            node.marker.touch()
            continue
        node.marker.unlink(missing_ok=True)
        if record.get("state") == "done":
            _write_record(node.record, {**record, "state": "outdated", "error": state.why})
        if node.notebook == "06_results":
            for path in node.outputs:
                with suppress(FileNotFoundError):
                    path.replace(path.with_name(f"outdated_{path.name}"))
    return [title for title, state in states.items() if state.name != "done"]


class Failed(Exception):
    """A notebook ended in an error, or without what it should leave."""


def execute(
    node: Node, *, threads: int = 1, gpus: int = 0, attempt: int = 1, anew: bool = False, parent: int = 0
) -> str:
    """Execute a node and keep its record; `done`, or `already there` if its record says so.

    Args:
        node: which.
        threads: cores.
        gpus: claimed for it alone.
        attempt: counted from 1; an error of the notebook itself is not tried twice.
        anew: execute it even if it is there, from whatever of its inputs is.
        parent: process it ends with; 0 takes the one that started this.

    Raises:
        Failed: an error of the notebook, its first line, or a killed kernel.
        ValueError: GPUs that are not there.
    """
    from filelock import FileLock

    node.folder.mkdir(parents=True, exist_ok=True)
    if _held(node.lock):
        print(f"{node.title}: waiting for another process that executes it", file=sys.stderr, flush=True)
    with FileLock(node.lock):
        made_from, last = node.made_from(), files.read_record(node.record)
        why = provenance.difference(last, made_from, node.left())
        if not why and not anew:
            if last["state"] == "outdated":
                _write_record(node.record, {**last, "state": "done", "error": None})
            node.marker.touch()
            return "already there"
        if attempt > 1 and why.startswith("failed"):
            raise Failed("")  # said before: an error of the notebook, not of the machine, is not tried again
        for path in () if anew else node.inputs:
            if wrong := node.distrust(path) if path.is_file() else "it is not there":
                raise Failed(f"reads {path}, which must not be used: {wrong}")
        with claim(gpus) as claimed:
            _record_while(node, made_from, threads, claimed, attempt, parent)
        for path in () if anew else node.outputs:  # what stepped aside for them
            path.with_name(f"outdated_{path.name}").unlink(missing_ok=True)
        node.marker.touch()
        return "done"


def _record_while(
    node: Node, made_from: Mapping[str, Any], threads: int, gpus: Sequence[str], attempt: int, parent: int
) -> None:
    import resource
    import socket

    host = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
    record = {"state": "running", "notebook": node.notebook, **made_from, "outputs": dict.fromkeys(node.left())}
    record |= {"attempt": attempt, "threads": threads, "gpu": ",".join(gpus) or None, "host": host, "error": None}
    record |= {"started": datetime.now().astimezone().isoformat(timespec="seconds"), "ended": None}
    began = time.perf_counter()

    def note(state: str, error: str | None = None, **more: Any) -> None:
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
        record.update(state=state, error=error, seconds=round(time.perf_counter() - began, 1), **more)
        record.update(peak_memory_mib=round(peak, 1), ended=datetime.now().astimezone().isoformat(timespec="seconds"))
        _write_record(node.record, record)

    _write_record(node.record, record)
    try:
        _watch(node, lambda: _papermill(node, threads, gpus), lambda why: note("stopped", why), parent)
        left = node.left()
        if missing := [name for name, checksum in left.items() if checksum is None]:
            raise Failed(f"{node.notebook} ended without writing {', '.join(missing)}")
    except Failed as error:
        note("failed", str(error).splitlines()[0])
        raise
    except Exception as error:  # of Jupyter, papermill or the disk, not of a cell: another time it may go well
        died = "kernel died" in str(error).lower()
        said = f"the kernel was killed (out of memory?): {error}" if died else f"{type(error).__name__}: {error}"
        note("stopped", said.splitlines()[0])
        raise Failed(said) from error
    note("done", outputs=left)


def _papermill(node: Node, threads: int, gpus: Sequence[str]) -> None:
    import papermill
    from jupyter_client.manager import AsyncKernelManager
    from papermill.exceptions import PapermillExecutionError

    class Kernel(AsyncKernelManager):
        """A kernel that is killed with this process."""

        def format_kernel_cmd(self, extra_arguments: list[str] | None = None) -> list[str]:
            return bound_to_parent(super().format_kernel_cmd(extra_arguments), "KILL")

    os.environ.update(dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(threads)))
    os.environ["BANDMASK_RECORD"] = str(node.record)
    if gpus:
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
    declared, executed = params.declared(node.notebook), node.record.with_suffix(".ipynb")
    with node.record.with_suffix(".log").open("w", encoding="utf-8") as log:
        before = os.dup(2)
        os.dup2(log.fileno(), 2)  # what the kernel's process itself says, a crash of a library above all
        try:
            papermill.execute_notebook(
                str(params.notebook_path(node.notebook)),
                str(executed),
                parameters={name: value for name, value in node.given.items() if name in declared},
                progress_bar=False,
                stdout_file=log,
                stderr_file=log,
                kernel_manager_class=Kernel,
            )
        except PapermillExecutionError as error:
            _end_with_failing_cell(executed)
            raise Failed(f"{error.ename}: {error.evalue}") from None
        finally:
            os.dup2(before, 2)
            os.close(before)
    if (page := executed.with_suffix(".html")) in node.outputs:
        from bandmask import results

        results.write_page(executed, page)


def _watch(node: Node, work: Callable[[], None], last_words: Callable[[str], None], parent: int) -> None:
    """Do the work in a thread (in the main one nbclient takes the signals), and end it, kernel and all, in time.

    At a signal, after `timeout_minutes`, or when whoever started this is gone: nobody would wait for the result.
    While the kernel works, which its processor time and its log tell, the record is touched.
    """
    from concurrent.futures import ThreadPoolExecutor, wait

    import psutil

    def stop(why: str, status: int) -> None:
        children = psutil.Process().children(recursive=True)
        for child in children:
            with suppress(psutil.NoSuchProcess):
                child.kill()
        with suppress(Exception):  # a full disk must not keep it alive
            last_words(why)
        os._exit(status)

    parent, limit = parent or os.getppid(), float(node.given.get("timeout_minutes", 0)) * 60
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda got, _: stop(f"ended by {signal.Signals(got).name}", 128 + got))
    began = heard = time.monotonic()
    worked = 0.0
    log = node.record.with_suffix(".log")
    with ThreadPoolExecutor(max_workers=1) as pool:
        done = pool.submit(work)
        while not wait([done], timeout=STEP).done:
            now = time.monotonic()
            if os.getppid() != parent:
                stop("the graph that started it is gone", 1)
            if limit and now - began > limit:
                stop(f"it took longer than timeout_minutes = {limit / 60:g}", 1)
            if now - heard > 10:
                heard, total = now, float(log.stat().st_size if log.exists() else 0)
                with suppress(psutil.Error, OSError):
                    total += sum(sum(child.cpu_times()[:2]) for child in psutil.Process().children(recursive=True))
                    if total - worked > 0.5:
                        os.utime(node.record)
                worked = total
        done.result()


def _end_with_failing_cell(executed: Path) -> None:
    """Leave out the cells that were not reached: whoever opens a failed notebook finds the failure at its end."""
    notebook = json.loads(executed.read_text(encoding="utf-8"))
    failing = [i for i, cell in enumerate(notebook["cells"]) if cell["metadata"].get("papermill", {}).get("exception")]
    if failing:
        notebook["cells"] = notebook["cells"][: failing[-1] + 1]
        with files.writing(executed) as partial:
            partial.write_text(json.dumps(notebook, indent=1), encoding="utf-8")


def _write_record(path: Path, record: Mapping[str, Any]) -> None:
    with files.writing(path) as partial:
        partial.write_text(json.dumps(record, indent=1), encoding="utf-8")


def _held(lock: Path) -> bool:
    """Whether a process holds it: on this host or another, in whatever PID namespace."""
    if not lock.exists():
        return False
    try:
        free = files.free_lock(lock)
    except OSError:  # not ours to lock: somebody else's run
        return True
    if free:
        free.release()
    return free is None


def bound_to_parent(command: Sequence[str], number: str) -> list[str]:
    """The command, to be sent this signal when its parent dies, however; as it is where Linux' `setpriv` is absent."""
    return ["setpriv", "--pdeathsig", number, *command] if shutil.which("setpriv") else list(command)


def visible() -> list[str]:
    """GPUs that this process may use, as `CUDA_VISIBLE_DEVICES` names them; empty without any.

    Of that variable, if it is set; else of `nvidia-smi`, so that torch need not be imported to count them.
    """
    if (chosen := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [name.strip() for name in chosen.split(",") if name.strip() not in ("", "-1")]
    command = ["nvidia-smi", "--query-gpu=uuid", "--format=csv,noheader"]
    try:
        listed = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []  # a driver that doesn't answer has no GPU to give
    return [line.strip() for line in listed.stdout.splitlines() if line.strip()] if listed.returncode == 0 else []


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
    from filelock import FileLock

    folder = Path(tempfile.gettempdir()) / f"bandmask-gpus-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    held: dict[str, Any] = {}
    with FileLock(folder / ".claim"):  # one at a time: two who each hold half of what they want would wait for ever
        while len(held) < wanted:
            for name in known:
                if len(held) < wanted and name not in held:
                    held |= {name: lock} if (lock := files.free_lock(folder / f"{name.replace('/', '_')}.lock")) else {}
            time.sleep(STEP if len(held) < wanted else 0)
    try:
        yield list(held)
    finally:
        for lock in held.values():
            lock.release()


class Stopped(Exception):
    """A signal came, or `make` is gone; the number to end with."""


def supervise(command: Sequence[str], *, remote: bool = False, **environment: str) -> int:
    """Run a command and return its status; at Ctrl-C, SIGTERM or SIGHUP end all that it started, within 3 s.

    Args:
        command: started in a session of its own, so that a terminal's signals come here alone.
        remote: it has jobs on a cluster, and is given time to cancel them.
        environment: on top of this process' own.

    Raises:
        Stopped: all has ended.
    """
    import psutil

    got: list[int] = []
    parent = os.getppid() if "MAKELEVEL" in os.environ else 0  # a shell may end, and `nohup` be meant
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, lambda number, _: got.append(number))
    child = subprocess.Popen(
        bound_to_parent(command, "INT" if remote else "KILL"), env={**os.environ, **environment}, start_new_session=True
    )
    while child.poll() is None and not got and (not parent or os.getppid() == parent):
        time.sleep(STEP / 3)
    if child.returncode is not None and not got:
        return child.returncode
    family = psutil.Process(child.pid).children(recursive=True) if child.returncode is None else []
    if remote:
        child.send_signal(signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            child.wait(10)
    child.kill()  # first: it must not start another
    for stage in (psutil.Process.terminate, psutil.Process.kill):
        for process in family:
            with suppress(psutil.NoSuchProcess):
                stage(process)
        psutil.wait_procs(family, timeout=1.5)
    child.wait()
    raise Stopped(128 + (got[0] if got else signal.SIGHUP))


def graph(
    named: str, variant: str = "", *, profile: str = "", gpu: int = 0, report: bool = False, more: Sequence[str] = ()
) -> int:
    """Run an experiment: what its records say is done is not done again; a failed run leaves the others running.

    Args:
        named: of `params/experiments`, or the path of a YAML file.
        variant: of `params/<named>`.
        profile: of Snakemake, for a cluster: `profiles/slurm`.
        gpu: that a job of the cluster asks for; on this machine they are counted.
        report: make the report alone, from whatever is there.
        more: arguments of Snakemake, above ours.

    Returns:
        0 if all is done.

    Raises:
        ValueError: parameters that can't be used, or another graph that works in this folder.
        Stopped: by a signal.
    """
    given = params.load_experiment(named, variant)
    of, out = nodes(given), params.experiment_folder(given["experiment"])
    out.mkdir(parents=True, exist_ok=True)
    lock = files.free_lock(out / ".graph.lock")
    if lock is None:
        raise ValueError(
            f"another graph works in {out}. Wait until it is done (`make status` shows how far it is), stop it, or "
            "give your experiment another name"
        )
    try:
        todo, status = settle(of), 0
        own = ["--experiment", named, "--variant", variant]
        if todo and not report:
            print(f"{out}: {len(todo)} of {len(of)} notebooks to run", flush=True)
            here, cores = 0 if given.get("device") == "cpu" else len(visible()), os.cpu_count() or 1
            threads = 8 if profile else max(1, cores // here) if here else min(cores, 4)
            command = [sys.executable, "-m", "snakemake", "--snakefile", str(files.project_root() / "Snakefile")]
            command += ["--nolock", "--keep-going", "--rerun-incomplete", "--retries", "2", "--rerun-triggers", "mtime"]
            command += ["--workflow-profile", profile] if profile else ["--cores", "all", "--resources", f"gpu={here}"]
            command += ["--quiet", "all", *more, "--config", f"experiment={named}", f"variant={variant}"]
            command += [f"threads={threads}", f"gpu={gpu if profile else int(bool(here))}"]
            status = supervise(command, remote=bool(profile), BANDMASK_GRAPH=str(os.getpid()))
        last = [*of.values()][-1]  # 06_results, the tables of folds, or what goes past the thesis
        failed = {title: state for title, state in look(of).items() if state.name in ("failed", "stopped", "lost")}
        if failed:
            print(f"\n{len(failed)} failed; each keeps its notebook, with the failing cell last:", file=sys.stderr)
            for title, state in failed.items():
                print(f"  {of[title].record.with_suffix('.ipynb')}\n    {state.why}", file=sys.stderr)
        if report or (status and any(path.is_file() and not last.distrust(path) for path in last.inputs)):
            print("The report is made from what has finished.", file=sys.stderr, flush=True)
            made = supervise([sys.executable, "-m", "bandmask.run", "node", last.title, *own, "--anew"])
            status = status or made
        elif not todo:
            print(f"{out}: nothing to be done")
        shown = last.notebook == "06_results" or "any-band/08_any_band_encoder" in of
        if shown and last.outputs[0].exists() and not files.distrust(last.outputs[0]):
            subprocess.run([sys.executable, "-m", "bandmask.results", str(out)], check=False)
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
    count = len(of) - sum(state.name == "done" for state in states.values())
    said = f"{count} of {len(of)} to run" if count else "Nothing to be done"
    return "\n".join([*lines, f"{said}: what is done has a record with these parameters, code and checksums."])


def variants(named: str = "thesis") -> dict[str, dict[str, Any]]:
    """Parameters of an experiment, called "", and of its variants in `params/<named>/`."""
    beside = sorted(path.stem for path in (files.project_root() / "params" / named).glob("*.yaml"))
    return {name: params.load_experiment(named, name) for name in ("", *beside)}


def missing(given: Mapping[str, Any]) -> dict[str, str]:
    """What an experiment needs from outside and is not on this machine, with how to get it."""
    p = {**params.vocabulary(), **given}
    files_of = {p[name]: name for name in ("weights", "decoder_weights") if p[name]}
    found = {path: f"put the file that `{of}` names there" for path, of in files_of.items() if not Path(path).exists()}
    for name in {p["dataset"], *([p["segmentation_dataset"]] if "segmentation" in p["tasks"] else [])}:
        if not (name in ("sample", "eurosat-mini") or (_pack_of(name, p) / "pack.json").exists()):
            official = name.split("-")[0]
            if datasets.find_source(official) is None:
                found[name] = datasets.how_to_get(official)
    if p["encoder"] in params.SMALL or p["weights"] or Path(p["encoder"]).is_dir():
        return found
    kind, net = p["encoder"].split("-", 1)
    if kind == "satclip":
        from huggingface_hub import try_to_load_from_cache

        source = "microsoft/SatCLIP-" + net.replace("resnet", "ResNet").replace("vit", "ViT").replace("-l", "-L")
        here = isinstance(try_to_load_from_cache(source, f"{p['encoder']}.ckpt"), str)
    else:
        home, source = os.environ.get("TORCH_HOME", Path.home() / ".cache" / "torch"), "TorchGeo"
        here = any((Path(home) / "hub" / "checkpoints").glob(f"{net.replace('-', '_')}*{kind}*"))
    return found if here else {**found, p["encoder"]: f"the first run downloads it, from {source}; or give `weights`"}


def thesis_plan(named: str = "thesis") -> str:
    """Every run of an experiment and its variants, and what they need that is not here, with how to get it."""
    lines: list[str] = []
    lacking: dict[str, str] = {}
    runs = done = 0
    for variant, given in variants(named).items():
        of, lacks = nodes(given), missing(given)
        lacking |= lacks
        lines.append(f"\nmake run EXPERIMENT={named}{f' VARIANT={variant}' if variant else ''}")
        ended = {title for title, state in look(of).items() if state.name == "done"}
        for folder in [node.folder for node in of.values() if node.notebook == "03_fine_tuning"]:
            titles = {title for title, node in of.items() if node.folder == folder}
            runs, done = runs + 1, done + (titles <= ended)
            state = f"{len(titles & ended)} of {len(titles)} notebooks done"
            lines.append(f"  {folder.name:24} {state}{'; lacks ' + ', '.join(lacks) if lacks else ''}")
    needs = [f"  {name}: {way_out}" for name, way_out in lacking.items()] or ["  nothing"]
    return "\n".join([f"{runs} runs, {done} done. Nothing was run.", *lines, "\nMissing here:", *needs])


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; 0 if what was asked for is there afterwards."""
    parser = argparse.ArgumentParser(prog="python -m bandmask.run", description="Run notebooks as a graph.")
    commands = "graph", "report", "plan", "status", "thesis", "thesis-plan", "node"
    parser.add_argument(
        "command", choices=commands, help="thesis: an experiment with all its variants; as `make` has it"
    )
    parser.add_argument("named", nargs="?", help="an experiment; of `node` one of its notebooks: B8/03_fine_tuning")
    for option, does in (("experiment", "of `node`"), ("variant", ""), ("profile", "of Snakemake: profiles/slurm")):
        parser.add_argument(f"--{option}", default="", help=does)
    for option, default in (("gpu", 0), ("threads", os.cpu_count() or 1), ("gpus", 0), ("attempt", 1), ("parent", 0)):
        parser.add_argument(f"--{option}", type=int, default=default)
    parser.add_argument("--anew", action="store_true", help="a node even if it is there")
    asked, more = parser.parse_known_args(arguments)
    named = asked.named or ("thesis" if asked.command.startswith("thesis") else "sample")
    if more and asked.command != "graph":
        parser.error(f"unknown: {' '.join(more)}")
    try:
        if asked.command in ("graph", "report"):
            only = asked.command == "report"
            return graph(named, asked.variant, profile=asked.profile, gpu=asked.gpu, report=only, more=more)
        if asked.command == "thesis":
            return _all_variants(named, ["--profile", asked.profile, "--gpu", str(asked.gpu)])
        if asked.command == "node":
            return _one_node(named, asked)
        of = nodes(params.load_experiment(named, asked.variant)) if asked.command != "thesis-plan" else {}
        print(show(of, plan=asked.command == "plan") if of else thesis_plan(named))
    except (Failed, ValueError, OSError) as error:
        if str(error):
            print(f"{named}: {error}", file=sys.stderr, flush=True)
        return 1
    except Stopped as stopped:
        print("Stopped; the next run goes on from here.", file=sys.stderr)
        return int(stopped.args[0])
    return 0


def _all_variants(named: str, options: Sequence[str]) -> int:
    failed = []
    for command in [*(["graph", f"--variant={name}"] for name in variants(named)), ["report"]]:
        line = ["bandmask.run", command[0], named, *command[1:]]
        print(" ".join(line), flush=True)
        failed += [" ".join(line)] if supervise([sys.executable, "-m", *line, *options]) else []
    print("\n".join(["Failed; repeated, each goes on where it stopped:", *failed]) if failed else "All done.")
    return int(bool(failed))


def _one_node(title: str, asked: argparse.Namespace) -> int:
    of = nodes(params.load_experiment(asked.experiment, asked.variant))
    if title not in of:
        raise ValueError(f"no such notebook in {asked.experiment}; available: {', '.join(of)}")
    how = {name: getattr(asked, name) for name in ("threads", "gpus", "attempt", "anew", "parent")}
    began, said = time.monotonic(), execute(of[title], **how)
    print(f"{title}: {said} ({time.monotonic() - began:.0f} s)", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
