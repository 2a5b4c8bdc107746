"""A real Slurm of two nodes on loopback: daemons, keys and state in a temporary folder, all gone when the block ends.

Slurm's commands find their cluster by `/etc/slurm/slurm.conf` and jobs don't inherit `SLURM_CONF`, so the file is
written there: only where there is none, or where one of ours was left by a killed test. A machine that belongs to a
Slurm already is never touched.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

CONFIG = Path("/etc/slurm/slurm.conf")
MARK = "# bandmask's test cluster, of process"  # first line of a file of ours, with the process' id
NODES = ("n1", "n2")
COMMANDS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scontrol", "setpriv")

# One CPU a node, whatever the machine has: two jobs run at once and each node gets one, n2 the first. Short timeouts,
# so that a lost node is noticed in seconds; on a real cluster it takes SlurmdTimeout, 300 s unless set.
CONFIGURATION = """\
{mark} {owner}: safe to delete when that process is gone
ClusterName=loopback
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort=17000
SlurmUser=root
SlurmdUser=root
AuthInfo=socket={folder}/munge.socket
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmdParameters=config_overrides
SlurmdTimeout=6
MessageTimeout=5
KillWait=5
ReturnToService=2
MinJobAge=3600
NodeName=DEFAULT CPUs=1 RealMemory=64000
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port=17001 Weight=2
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port=17002 Weight=1
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def why_not() -> str | None:
    """Why the cluster can't run here, with the way out; None where it can."""
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    if missing := [command for command in COMMANDS if shutil.which(command, path=path) is None]:
        return f"Slurm is absent ({', '.join(missing)}): apt-get install --no-install-recommends slurm-wlm munge"
    if os.geteuid() != 0:
        return f"{CONFIG} can only be written by root: run it in a container or as root"
    if CONFIG.exists() and not CONFIG.read_text().startswith(MARK):
        return f"this machine belongs to a Slurm already, and {CONFIG} is left as it is: run it on another machine"
    if (owner := _owner()) and psutil.pid_exists(owner):
        return f"process {owner} runs the test cluster now: wait for it"
    return None


def _owner() -> int | None:
    found = re.match(rf"{re.escape(MARK)} (\d+)", CONFIG.read_text()) if CONFIG.exists() else None
    return int(found[1]) if found else None


@contextmanager
def cluster() -> Iterator[Cluster]:
    """Yield a running cluster; at the end, and on any error, every daemon and job of it is killed.

    Should this process itself be killed, its daemons die with it and the next call sweeps what its jobs left.

    Raises:
        RuntimeError: it can't run here, or didn't start within a minute; the message ends with the daemons' words.
    """
    if reason := why_not():
        raise RuntimeError(reason)
    if CONFIG.exists():
        _sweep()
    folder = Path(tempfile.mkdtemp(prefix="bandmask-slurm-"))
    started = Cluster(folder)
    try:
        started.start()
        yield started
    finally:
        started.stop()
        CONFIG.unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)


def _sweep() -> None:
    """Jobs, folder and configuration that a killed test left; its daemons died with it, but not slurmctld's helper."""
    for name in ("slurmctld", *NODES):
        _kill(_processes_of(name))
    if folder := re.search(r"^StateSaveLocation=(.*)/state$", CONFIG.read_text(), re.MULTILINE):
        shutil.rmtree(folder[1], ignore_errors=True)
    CONFIG.unlink()


class Cluster:
    """Two nodes, `n1` and `n2`, each a slurmd on this machine; `SLURMD_NODENAME` tells a job which one it is on."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}

    def start(self) -> None:
        """Start munged, slurmctld and both nodes; return when both are idle."""
        self.folder.chmod(0o755)  # munged wants its socket within everyone's reach
        for name in ("state", *NODES):
            (self.folder / name).mkdir()
        key = self.folder / "munge.key"
        key.touch(0o600)
        key.write_bytes(os.urandom(128))
        host = socket.gethostname()
        CONFIG.parent.mkdir(exist_ok=True)
        CONFIG.write_text(CONFIGURATION.format(mark=MARK, owner=os.getpid(), host=host, folder=self.folder))
        files = (f"--{kind}-file={self.folder}/munge.{kind}" for kind in ("key", "log", "pid", "seed"))
        self._daemon("munged", "munged", "--foreground", f"--socket={self.folder}/munge.socket", *files)
        self._wait(lambda: (self.folder / "munge.socket").exists(), "munged")
        self._daemon("slurmctld", "slurmctld", "-D", SLURMD_NODENAME="slurmctld")
        for name in NODES:
            self.start_node(name)
        self._wait(lambda: all(self.node_state(name) == "idle" for name in NODES), "the nodes")

    def start_node(self, name: str) -> None:
        """Start slurmd `name`, for the first time or after `kill_node`."""
        self._daemon(name, "slurmd", "-D", "-N", name, SLURMD_NODENAME=name)

    def kill_node(self, name: str) -> None:
        """SIGKILL to slurmd `name` and to all that runs on it, as when its power fails. Nobody is told."""
        _kill([psutil.Process(self._daemons[name].pid), *_processes_of(name)])
        while left := _processes_of(name):  # born while the others died
            _kill(left)
        self._daemons.pop(name).wait()

    def queue(self) -> list[tuple[str, str, str, str]]:
        """(job, state, node, comment) of every job slurmctld remembers; the comment names the rule and wildcards."""
        lines = _run("squeue", "--states=all", "--noheader", "--format=%i|%T|%N|%k").splitlines()
        return [tuple(line.split("|", 3)) for line in lines]  # type: ignore[misc]

    def node_state(self, name: str) -> str:
        """Such as "idle", "allocated", "down"; with `*` where the node doesn't answer."""
        return _run("sinfo", "--noheader", f"--nodes={name}", "--format=%T", check=False).strip()

    def hurry(self) -> None:
        """Let requeued jobs start at once: Slurm holds the job of a lost node back for two minutes."""
        for job in _run("squeue", "--states=PD", "--noheader", "--format=%i|%r").splitlines():
            if job.endswith("|BeginTime"):
                _run("scontrol", "update", f"JobId={job.split('|')[0]}", "StartTime=now", check=False)

    def logs(self) -> str:
        """The last lines of every daemon."""
        tails = ((path.name, path.read_text(errors="replace").splitlines()[-20:]) for path in self.folder.glob("*.out"))
        return "\n".join(f"{name}: {line}" for name, lines in sorted(tails) for line in lines)

    def stop(self) -> None:
        """Kill every job and daemon, whatever their state."""
        for name in NODES:
            while left := _processes_of(name):
                _kill(left)
        while self._daemons:
            _kill_group(self._daemons.popitem()[1])

    def _daemon(self, name: str, command: str, *arguments: str, **environment: str) -> None:
        path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
        with (self.folder / f"{name}.out").open("ab") as out:
            bound = ["setpriv", "--pdeathsig", "KILL", command, *arguments]  # it never outlives this process
            options: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": out, "stderr": out}
            own = {**os.environ, "PATH": path, **environment}
            self._daemons[name] = subprocess.Popen(bound, env=own, start_new_session=True, **options)

    def _wait(self, ready: Callable[[], bool], what: str, seconds: float = 60) -> None:
        deadline = time.monotonic() + seconds
        while not ready():
            dead = [name for name, daemon in self._daemons.items() if daemon.poll() is not None]
            if dead or time.monotonic() > deadline:
                raise RuntimeError(f"{what} didn't start{f' ({dead[0]} ended)' if dead else ''}:\n{self.logs()}")
            time.sleep(0.1)


def _run(*command: str, check: bool = True) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=check, timeout=60).stdout


def _processes_of(node: str) -> list[psutil.Process]:
    """Job steps of a node with all their children, by their environment; and slurmstepd, their parent."""
    found = {}
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.environ().get("SLURMD_NODENAME") == node and process.pid != os.getpid():
                found[process.pid] = process
                for parent in process.parents():
                    if parent.name().startswith("slurmstepd"):
                        found[parent.pid] = parent
    return list(found.values())


def _kill_group(daemon: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(daemon.pid, signal.SIGKILL)  # slurmctld has a helper of its own
    daemon.wait()


def _kill(processes: list[psutil.Process]) -> None:
    for process in processes:
        with contextlib.suppress(psutil.Error):
            process.send_signal(signal.SIGKILL)
    psutil.wait_procs(processes, timeout=5)
