"""One fine-tuning in several processes, under torchrun: the epochs of notebook 03, and the checkpoint it then reads.

`torchrun --nproc-per-node 8 -m bandmask.runs.distributed params/experiments/thesis.yaml params/masks/B8.yaml`
A process takes one GPU (NCCL) or some cores (gloo), and its part of every batch. The checkpoint is the one that a
single process would write, to rounding: it can be taken up by any number of processes, one included.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import yaml
from torch.distributed.elastic.multiprocessing.errors import record

from bandmask import files, params, progress
from bandmask.ranks import Ranks, main_first
from bandmask.training import Compute
from bandmask.tuning import Tuning, complete

COMMAND = "torchrun --nproc-per-node N -m bandmask.runs.distributed params/experiments/X.yaml params/masks/Y.yaml"
LAUNCHED = "BANDMASK_LAUNCHED"  # set for ranks whose standard input ends when the process that wanted them does
_ASKED_OF_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_POLL_S = 1.0
_EVENT = "@progress "  # before a report of progress among what a rank prints


def launch(parameters: Mapping[str, Any] | Sequence[Path | str], processes: int) -> None:
    """Fine-tune in several processes of this machine, and wait for them; what they print is printed.

    Args:
        parameters: of notebook 03, or YAML files of them, later ones first in rank.
        processes: one a GPU; on CPUs they share the threads of this one.

    Raises:
        ValueError: a batch that can't be shared evenly, more processes than GPUs, or no backend for the device.
        RuntimeError: a process failed; says which, and its error.
    """
    given = parameters if isinstance(parameters, Mapping) else params.load(*parameters)
    _check(complete(given), processes, processes)
    with tempfile.TemporaryDirectory(prefix="bandmask-ranks-") as folder:
        file = Path(folder) / "parameters.yaml"
        file.write_text(yaml.safe_dump(dict(given)), encoding="utf-8")
        logs = Path(folder) / "logs"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        command += [f"--log-dir={logs}", "-m", "bandmask.runs.distributed", str(file)]
        threads = str(max(1, torch.get_num_threads() // processes))
        path = os.pathsep.join(filter(None, [str(files.project_root()), os.environ.get("PYTHONPATH")]))
        environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": threads, LAUNCHED: "1"}
        status, said = _run(command, environment)
        if status:
            raise RuntimeError(_cause(logs, processes) or _last_words(processes, status, said))


def _run(command: Sequence[str], environment: Mapping[str, str]) -> tuple[int, Sequence[str]]:
    """Exit status of a command whose output and progress are passed on, and its last lines; it ends with us."""
    said: deque[str] = deque(maxlen=20)
    with subprocess.Popen(
        command,
        env=environment,
        stdin=subprocess.PIPE,  # never written to: it ends when this process does
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    ) as process:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                text, marked, event = line.partition(_EVENT)  # behind a progress bar it does not begin a line
                if marked:
                    with suppress(ValueError):  # another process printed into the line: one report is lost
                        progress.report(**json.loads(event))
                if text:
                    print(text, end="", flush=True)
                    said.append(text.rstrip())
        except BaseException:
            process.terminate()  # torchrun ends its ranks
            raise
    return process.returncode, said


def _cause(logs: Path, processes: int) -> str:
    """The error of the rank that failed first, from what torchrun had each of them leave; empty if none did."""
    left = sorted(logs.rglob("error.json"), key=lambda path: path.stat().st_mtime_ns)
    for path in left:
        try:
            message = json.loads(path.read_text(encoding="utf-8"))["message"]["message"]
        except (ValueError, KeyError, TypeError):
            continue
        return f"process {path.parent.name} of {processes} failed: {message}"
    return ""


def _last_words(processes: int, status: int, said: Sequence[str]) -> str:
    lines = "\n".join(f"  {line}" for line in said)
    return (
        f"the {processes} processes ended with status {status} and no error of their own: killed, or out of memory? "
        f"Started again they go on from the last checkpoint. Their last lines:\n{lines}"
    )


@contextmanager
def joined(parameters: Mapping[str, Any]) -> Iterator[Compute]:
    """Join the processes that torchrun started; inside, `ranks.Ranks.now()` knows them. Gives device and precision.

    Raises:
        RuntimeError: torchrun did not start this process.
        ValueError: as `launch`.
    """
    if missing := [name for name in _ASKED_OF_TORCHRUN if name not in os.environ]:
        raise RuntimeError(f"this is no process of torchrun ({', '.join(missing)} not set); start it with\n  {COMMAND}")
    count, local = int(os.environ["WORLD_SIZE"]), int(os.environ["LOCAL_RANK"])
    backend = _check(parameters, count, int(os.environ["LOCAL_WORLD_SIZE"]))
    _end_with_parent()
    _report_once(int(os.environ["RANK"]))
    if backend == "nccl":
        torch.cuda.set_device(local)
    # Not compiled: batch norms talk to the other processes in the middle of the graph, and nobody has tested that.
    compute = Compute.of(f"cuda:{local}" if backend == "nccl" else "cpu", compile=False)
    dist.init_process_group(backend)
    yield compute
    dist.destroy_process_group()  # not after an error: it would wait for processes that may be gone


def _report_once(rank: int) -> None:
    """Progress is told by the main rank alone; of launched ones, to who launched them."""
    launched = bool(os.environ.get(LAUNCHED))
    if rank or launched:
        os.environ.pop(progress.ENVIRONMENT, None)
    if launched and not rank:
        progress.attach(lambda event: sys.stdout.write(f"{_EVENT}{json.dumps(asdict(event))}\n"))  # torchrun's -u


def _check(parameters: Mapping[str, Any], processes: int, here: int) -> str:
    """The backend for these parameters, if so many processes, of which some are on this machine, can work with them."""
    device, batch_size = parameters["device"], parameters["batch_size"]
    if processes < 1:
        raise ValueError(f"processes is 1 or more, got {processes}")
    if batch_size % processes:
        divisors = [number for number in range(1, batch_size + 1) if batch_size % number == 0]
        raise ValueError(
            f"batch_size {batch_size} can't be shared evenly by {processes} processes; use {divisors} processes, or a "
            f"batch_size that is a multiple of {processes}"
        )
    if device not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device {device!r} is one device, and {processes} processes need one each; give auto or cuda")
    gpus = torch.cuda.device_count()
    on_gpus = device == "cuda" or (device == "auto" and gpus > 0)
    if on_gpus and here > gpus:
        raise ValueError(
            f"{here} processes on this machine need a GPU each, and {gpus} are visible; use {max(gpus, 1)} processes, "
            "or device: cpu"
        )
    backend = "nccl" if on_gpus else "gloo"
    if not (dist.is_available() and dist.is_backend_available(backend)):
        raise ValueError(f"this torch ({torch.__version__}) has no {backend} backend; fine-tune with processes: 1")
    return backend


def _end_with_parent() -> None:
    """End this rank as soon as torchrun, or the process that called `launch`, is gone: nobody would fetch its work."""
    parent, watched = os.getppid(), [0] if os.environ.get(LAUNCHED) else []

    def watch() -> None:
        while os.getppid() == parent:
            ended, _, _ = select.select(watched, [], [], _POLL_S)
            if ended and not os.read(0, 1):
                break
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@record
def main(arguments: Sequence[str] | None = None) -> None:
    """What each rank does: fine-tune every seed, to its checkpoint."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given:
        raise ValueError(f"give files of parameters:\n  {COMMAND}")
    parameters = complete(params.load(*given))
    with joined(parameters) as compute:
        with main_first():  # a pack is made, an encoder fetched, once
            tuning = Tuning.of(parameters)
        for seed in parameters["seeds"]:
            _, history = tuning.fine_tune(seed, compute=compute, restart=parameters["restart"])
            if Ranks.now().main:
                print(f"seed {seed}:\n{history.tail(1).round(4).to_string(index=False)}", flush=True)


if __name__ == "__main__":
    main()
