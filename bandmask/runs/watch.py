"""Work that ends with whoever started it, and leaves no process behind."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress
from typing import NoReturn

PARENT_POLL_S = 0.5
HEARTBEAT_S = 20.0


def watched(
    work: Callable[[], None],
    *,
    last_words: Callable[[str], None],
    parent: int | None = None,
    heartbeat: Callable[[], None] = lambda: None,
) -> None:
    """Do the work in a thread, and end it, kernel and all, at a signal or when whoever started this is gone.

    Nobody would wait for the result, and the next graph would meet a run of the last one. The thread is for nbclient:
    in the main one it takes the signals for itself, shuts the kernel down and waits for it.

    Args:
        work: what to do.
        last_words: called with the reason before the end.
        parent: process to end with, which may be gone already; default: the one that is the parent now.
        heartbeat: called every `HEARTBEAT_S`, for those who look from another machine; its errors are passed over.
    """

    def stop(why: str, status: int) -> NoReturn:
        with suppress(Exception):  # a full disk must not keep it alive
            last_words(why)
        _kill_children()
        os._exit(status)

    parent = parent or os.getppid()
    handlers = {
        number: signal.signal(number, lambda got, _: stop(f"ended by {signal.Signals(got).name}", 128 + got))
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    }
    try:
        with ThreadPoolExecutor(max_workers=1) as pool:
            done, beaten = pool.submit(work), time.monotonic()
            while not wait([done], timeout=PARENT_POLL_S).done:
                if time.monotonic() - beaten > HEARTBEAT_S:
                    beaten = time.monotonic()
                    with suppress(OSError):
                        heartbeat()
                if os.getppid() != parent:
                    stop("the graph that started it is gone", 1)
            done.result()
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _kill_children() -> None:
    import psutil

    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            child.kill()
