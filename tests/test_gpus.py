"""One run a GPU: locks that no two hold, and that a killed process does not keep. GPUs are names here, none is used."""

import os
import signal
import subprocess
import sys
import time

import pytest

from bandmask.runs import gpus

HOLD = """
import time
from bandmask.runs import gpus
with gpus.claim({n}, poll_s=0.05) as got:
    print(got, flush=True)
    time.sleep({s})
"""


@pytest.fixture(autouse=True)
def own_locks(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)


def hold(n=1, seconds=60.0, devices="0,1"):
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": devices}
    command = [sys.executable, "-c", HOLD.format(n=n, s=seconds)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


def test_visible_devices_are_those_of_the_variable(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-1a, 3")
    assert gpus.visible() == ["GPU-1a", "3"]
    for none in ("", "-1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", none)
        assert gpus.visible() == []


@pytest.mark.parametrize(
    ("script", "expected"),
    [("echo GPU-aa; echo GPU-bb", ["GPU-aa", "GPU-bb"]), ("echo no driver >&2; exit 9", [])],
)
def test_else_those_of_nvidia_smi(script, expected, tmp_path, monkeypatch):
    """A script under that name stands in for the driver's tool, which is not on every machine."""
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\n{script}\n")
    tool.chmod(0o755)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert gpus.visible() == expected


def test_no_two_hold_one_and_a_third_waits(monkeypatch):
    first, second = hold(seconds=3), hold(seconds=3)
    got = {first.stdout.readline().strip(), second.stdout.readline().strip()}
    assert got == {"['0']", "['1']"}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    began = time.monotonic()
    with gpus.claim(poll_s=0.05) as mine:
        waited = time.monotonic() - began
        assert mine in (["0"], ["1"])
    assert waited > 0.5
    assert first.wait() == second.wait() == 0


def test_a_killed_process_gives_its_gpu_back_at_once(monkeypatch):
    holder = hold(devices="0")
    assert holder.stdout.readline().strip() == "['0']"
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    began = time.monotonic()
    with gpus.claim(poll_s=0.05) as mine:
        assert mine == ["0"]
    assert time.monotonic() - began < 1


def test_several_are_taken_together_or_not_at_all():
    """Two that want both would each hold one and wait for ever; here one after the other gets both."""
    both = [hold(n=2, seconds=0.2) for _ in range(3)]
    assert [process.wait(timeout=60) for process in both] == [0, 0, 0]
    assert {process.stdout.read().strip() for process in both} == {"['0', '1']"}


def test_what_a_scheduler_gave_is_taken_without_a_lock(monkeypatch):
    """Every job of Slurm calls its GPU 0: one that waited for the other's lock would wait for nothing."""
    holder = hold(devices="0")
    assert holder.stdout.readline().strip() == "['0']"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    with gpus.claim(poll_s=0.05) as mine:
        assert mine == ["0"]
    holder.kill()
    holder.wait()


def test_more_than_there_are_is_refused(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    with pytest.raises(ValueError, match=r"wants 2 GPU\(s\), and 1 are visible \(0\); lower"), gpus.claim(2):
        pass
    with gpus.claim(0) as none:
        assert none == []
