"""Wall time and peak memory of a command with everything it starts: `python benchmarks/peak_memory.py make demo`.

Memory is the proportional set size (shared pages are counted once) summed over all processes, sampled twice a second.
"""

import contextlib
import subprocess
import sys
import time

import psutil

started, peak, name = time.monotonic(), 0, subprocess.list2cmdline(sys.argv[1:])
command = psutil.Popen(sys.argv[1:])
while command.poll() is None:
    total = 0
    with contextlib.suppress(psutil.NoSuchProcess):  # ended just now
        for process in (command, *command.children(recursive=True)):
            with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                total += process.memory_full_info().pss
    peak = max(peak, total)
    time.sleep(0.5)
minutes = (time.monotonic() - started) / 60
print(f"\n{name}: {minutes:.1f} min, peak {peak / 2**30:.2f} GiB, exit status {command.returncode}")
sys.exit(command.returncode)
