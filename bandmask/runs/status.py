"""How far an experiment is: `python -m bandmask.runs.status sample`, while it runs, half finished, or after a night.

Prints a table of all nodes with their figures and errors, writes the same as a page for a browser, and with
`--follow` shows a live line for each run in flight. It reads what lies on disk, so it needs no connection to the graph.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TextIO

from bandmask import files, params
from bandmask.runs.states import NAMES, Node, State, duration, nodes, number, state_of
from bandmask.runs.status_page import render_html

LOOK_EVERY = 1.0  # seconds, of --follow
PAGE_EVERY = 10.0


def parameters_of(experiment: str, variant: str = "") -> dict[str, Any]:
    """Complete parameters of an experiment, as the graph reads them.

    Args:
        experiment: a name in `params/experiments`, or the path of a YAML file.
        variant: a name in `params/<experiment>`, laid over it.

    Raises:
        FileNotFoundError: no such experiment or variant; names those there are.
        ValueError: a file that can't be used, or that lacks `experiment` or `masks`.
    """
    return params.load_experiment(*params.experiment_files(experiment, variant))


def look(needed: Sequence[Node], now: datetime | None = None) -> list[State]:
    """The state of each node, now."""
    now = now or datetime.now(UTC)
    return [state_of(node, now) for node in needed]


def total(states: Sequence[State]) -> str:
    """`17 of 38 done, 2 running, 1 failed, 18 to do; about 1 h 20 min left`."""
    counts = {name: sum(state.name == name for state in states) for name in NAMES}
    shown = [f"{counts['done']} of {len(states)} done"]
    shown += [f"{counts[name]} {name}" for name in ("running", "failed", "stopped", "lost") if counts[name]]
    if counts["to do"]:
        shown.append(f"{counts['to do']} to do")
    left = time_left(states)
    return ", ".join(shown) + (f"; {left}" if left else "")


def time_left(states: Sequence[State]) -> str:
    """What remains, from the finished nodes of the same notebook and as many at once as run now; empty if nothing does.

    Failed nodes are not counted: they wait for someone. Neither is the report, which takes a minute.
    """
    known: dict[str, list[float]] = {}
    for state in states:
        if state.name == "done" and state.seconds is not None:
            known.setdefault(state.node.notebook, []).append(state.seconds)
    means = {notebook: sum(seconds) / len(seconds) for notebook, seconds in known.items()}
    open_ones = [state for state in states if state.name not in ("done", "failed")]
    if not open_ones:
        return ""
    rests, unknown = [], False
    for state in open_ones:
        mean, said = means.get(state.node.notebook), number(state.progress.get("seconds_left")) or 0.0
        spent = (state.seconds or 0.0) if state.name == "running" else 0.0
        rests.append(max((mean or 0.0) - spent, said if state.name == "running" else 0.0, 0.0))
        unknown |= mean is None and state.node.notebook != "06_results"
    if unknown and not (means and any(rests)):
        return "time left unknown"
    running = sum(state.name == "running" for state in states)
    seconds = max(sum(rests) / max(running, 1), *rests, 0.0)
    return f"{'at least' if unknown else 'about'} {duration(seconds)} {'left' if running else 'of work left'}"


def render_text(states: Sequence[State]) -> str:
    """A line a node: run, notebook, state, minutes, and figures, live line or error; then the total."""
    rows = [
        (state.node.run, state.node.notebook, state.name, _minutes(state.seconds), _clean(_detail(state)))
        for state in states
    ]
    run, notebook, name, minutes = (max(map(len, column)) for column in list(zip(*rows, strict=True))[:4])
    lines = [f"{'run':{run}}  {'notebook':{notebook}}  {'state':{name}}  {'min':>{max(minutes, 3)}}"]
    for state, row in zip(states, rows, strict=True):
        start = f"{row[0]:{run}}  {row[1]:{notebook}}  {row[2]:{name}}  {row[3]:>{max(minutes, 3)}}  "
        lines.append((start + row[4]).rstrip())
        if state.name == "failed" and state.node.executed.exists():
            lines.append(" " * len(start) + _near(state.node.executed))
    notes = [f"Note: {_clean(problem)}" for state in states for problem in state.problems]
    return "\n".join([*lines, "", *notes, *([""] if notes else []), total(states)])


def write_page(states: Sequence[State], experiment: str, path: Path) -> None:
    """The page, whole or not at all.

    Raises:
        OSError: it can't be written.
    """
    report = params.experiment_folder(experiment) / "06_results.html"
    text = render_html(states, experiment, total(states), folder=path.resolve().parent, report=report)
    with files.writing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def follow(needed: Sequence[Node], experiment: str, page: Path | None, stop: threading.Event, out: TextIO) -> None:
    """Look once a second until everything is done or `stop` is set.

    On a terminal, a block with a live line for each run in flight is drawn over and over, and what ends is left above
    it; elsewhere a line is printed whenever the state or epoch of a run changes.
    """
    terminal = out.isatty()
    before: list[State] = []
    height, written = 0, -PAGE_EVERY
    with _cursor_hidden(out):
        while True:
            states = look(needed)
            finished = all(state.name == "done" for state in states)
            if page and (finished or time.monotonic() - written >= PAGE_EVERY):
                _try_page(states, experiment, page)
                written = time.monotonic()
            news = list(changes(before, states, epochs=not terminal)) if before or not terminal else []
            if not terminal and [state.name for state in before] != [state.name for state in states]:
                news.append(total(states))
            block = live_block(states, shutil.get_terminal_size()) if terminal else []
            above = f"\x1b[{height}F\x1b[J" if height else ""  # back over the last block
            clock = datetime.now().strftime("%H:%M:%S")
            out.write(above + "".join(f"{line}\n" for line in [*(f"{clock} {line}" for line in news), *block]))
            out.flush()
            before, height = states, len(block)
            if finished or stop.wait(LOOK_EVERY):
                break
    if page and not finished:
        _try_page(states, experiment, page)


def changes(before: Sequence[State], after: Sequence[State], *, epochs: bool) -> Iterator[str]:
    """A line for each node whose state, or with `epochs` whose epoch, is another than at the last look.

    Args:
        before: of the last look; empty at the first, which tells what runs.
        after: of this look.
        epochs: tell epochs too.
    """
    old = {state.node: state for state in before}
    for state in after:
        was = old.get(state.node)
        other = state.name in ("running", "lost") if was is None else state.name != was.name
        further = epochs and was is not None and state.name == "running" and _place(state) != _place(was)
        if other or further:
            detail = _detail(state)
            yield _clean(f"{state.node.title}: {state.name}" + (f", {detail}" if detail else ""))


def live_block(states: Sequence[State], size: os.terminal_size) -> list[str]:
    """A line for each run in flight, cut to the terminal, and the total below."""
    running = [state for state in states if state.name == "running"]
    shown = running[: max(size.lines - 3, 1)]
    lines = [f"{state.node.title}  {_detail(state)}" for state in shown]
    if len(running) > len(shown):
        lines.append(f"... and {len(running) - len(shown)} more")
    return [_clean(line)[: max(size.columns - 1, 20)] for line in [*lines, total(states)]]


def _detail(state: State) -> str:
    """What there is to say of a node in its state."""
    if state.name == "running":
        return state.live or f"for {duration(state.seconds or 0.0)}"
    if state.name in ("stopped", "lost"):
        return "; ".join(part for part in (state.error, f"was at {state.live}" if state.live else "") if part)
    return state.error if state.name == "failed" else state.figures


def _place(state: State) -> tuple[Any, Any]:
    return state.progress.get("label"), state.progress.get("epoch")


def _minutes(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds / 60:.1f}"


def _clean(text: str) -> str:
    """One line without control characters: an error may hold colours and worse."""
    return "".join(character if character.isprintable() else " " for character in text)


def _near(path: Path) -> str:
    """As one would type it here."""
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def _try_page(states: Sequence[State], experiment: str, page: Path) -> bool:
    try:
        write_page(states, experiment, page)
    except OSError as error:
        print(f"no page: {error}", file=sys.stderr)
        return False
    return True


@contextmanager
def _cursor_hidden(out: TextIO) -> Iterator[None]:
    if not out.isatty():
        yield
        return
    out.write("\x1b[?25l")
    try:
        yield
    finally:
        out.write("\x1b[?25h")
        out.flush()


@contextmanager
def _ending_at_signals() -> Iterator[threading.Event]:
    """An event that SIGTERM and SIGINT set, so that a loop ends in order; handlers are put back."""
    stop = threading.Event()
    old = {number: signal.signal(number, lambda *_: stop.set()) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number_, handler in old.items():
            signal.signal(number_, handler)


def main(arguments: Sequence[str] | None = None) -> None:
    """`python -m bandmask.runs.status EXPERIMENT`: how far it is. That a run failed is news, not an error."""
    parser = argparse.ArgumentParser(prog="python -m bandmask.runs.status", description=main.__doc__)
    parser.add_argument("experiment", nargs="?", default="sample", help="of params/experiments, or a .yaml file")
    parser.add_argument("--variant", default="", help="of params/<experiment>")
    parser.add_argument("--follow", action="store_true", help="show it live, until all is done or Ctrl-C")
    pages = parser.add_mutually_exclusive_group()
    pages.add_argument(
        "--html", type=Path, metavar="PATH", help="where the page goes; outputs/<experiment>/status.html"
    )
    pages.add_argument("--no-html", action="store_true", help="write no page")
    options = parser.parse_args(arguments)
    try:
        parameters = parameters_of(options.experiment, options.variant)
        needed = nodes(parameters)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    name = parameters["experiment"]
    page = None if options.no_html else options.html or params.experiment_folder(name) / "status.html"
    try:
        if options.follow:
            with _ending_at_signals() as stop:
                follow(needed, name, page, stop, sys.stdout)
            return
        states = look(needed)
        print(render_text(states))
        if page and _try_page(states, name, page):
            print(f"Page: {_near(page.resolve())}")
        sys.stdout.flush()
    except BrokenPipeError:  # `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    main()
