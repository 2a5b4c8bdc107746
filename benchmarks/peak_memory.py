"""Wall time and peak memory of a command with everything it starts.

Run:  python benchmarks/peak_memory.py make demo

Memory is the proportional set size (shared pages are counted once) summed over all processes, sampled twice a second.
"""

import subprocess
import sys
import time

import psutil


def family(command: psutil.Popen) -> list[psutil.Process]:
    try:
        return command.children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def proportional_set_size(process: psutil.Process) -> int:
    try:
        return process.memory_full_info().pss
    except (psutil.NoSuchProcess, psutil.AccessDenied):  # ended between listing and reading
        return 0


def main() -> None:
    started, peak = time.monotonic(), 0
    command = psutil.Popen(sys.argv[1:])
    while command.poll() is None:
        peak = max(peak, sum(map(proportional_set_size, [command, *family(command)])))
        time.sleep(0.5)
    minutes = (time.monotonic() - started) / 60
    name = subprocess.list2cmdline(sys.argv[1:])
    print(f"\n{name}: {minutes:.1f} min, peak {peak / 2**30:.2f} GiB, exit status {command.returncode}")
    sys.exit(command.returncode)


if __name__ == "__main__":
    main()
