"""One run a GPU: who holds its lock may use it, and a lock goes with its process, however that ends.

Locks are per user and machine, so two graphs side by side don't meet on one GPU. What a job of Slurm sees is its own
already, and called 0 in every job, so there nothing is locked.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def visible() -> list[str]:
    """GPUs that this process may use, as `CUDA_VISIBLE_DEVICES` names them; empty without any.

    Of that variable, if it is set; else of `nvidia-smi`, so that torch need not be imported to count them.
    """
    if (chosen := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [name.strip() for name in chosen.split(",") if name.strip() not in ("", "-1")]
    if shutil.which("nvidia-smi") is None:
        return []
    command = ["nvidia-smi", "--query-gpu=uuid", "--format=csv,noheader"]
    try:
        listed = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []  # a driver that doesn't answer has no GPU to give
    return [line.strip() for line in listed.stdout.splitlines() if line.strip()] if listed.returncode == 0 else []


@contextmanager
def claim(wanted: int = 1, *, poll_s: float = 1.0) -> Iterator[list[str]]:
    """GPUs that nobody else holds while the block runs; waits until there are as many.

    Args:
        wanted: how many; 0 gives none and waits for none.
        poll_s: seconds between two looks.

    Raises:
        ValueError: more are wanted than there are.
    """
    known = visible() if wanted else []
    if wanted > len(known):
        raise ValueError(
            f"the run wants {wanted} GPU(s), and {len(known)} are visible ({', '.join(known) or 'none'}); lower "
            "--resources gpu=N and `processes`, or look at CUDA_VISIBLE_DEVICES and nvidia-smi"
        )
    if "SLURM_JOB_ID" in os.environ:
        yield known[:wanted]
        return
    held: dict[str, int] = {}
    told = False
    try:
        while len(held) < wanted:
            for name in known:
                if len(held) < wanted and name not in held and (descriptor := _try_lock(name)) is not None:
                    held[name] = descriptor
            if len(held) < wanted:
                for descriptor in held.values():  # two who each hold half of what they want would wait for ever
                    os.close(descriptor)
                held.clear()
                if not told:
                    print(f"waiting for {wanted} of {len(known)} GPUs", file=sys.stderr, flush=True)
                told = True
                time.sleep(poll_s)
        yield list(held)
    finally:
        for descriptor in held.values():
            os.close(descriptor)


def _try_lock(name: str) -> int | None:
    """A descriptor that holds the GPU's lock until it is closed, or None."""
    folder = Path(tempfile.gettempdir()) / f"bandmask-gpus-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    descriptor = os.open(folder / f"{name.replace('/', '_')}.lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor


if __name__ == "__main__":
    print(len(visible()))
