"""The state of an experiment as one HTML file: no scripts, nothing from elsewhere, light and dark."""

from __future__ import annotations

import os
from collections.abc import Sequence
from datetime import datetime
from html import escape
from pathlib import Path
from urllib.parse import quote

from bandmask.runs.states import NAMES, State, duration

REFRESH = 10  # seconds, while something runs
_STYLE = """
:root { color-scheme: light dark; --ink: #1c2128; --faint: #66707c; --paper: #ffffff; --line: #d8dde3;
  --done: #1a7f45; --running: #1f6feb; --failed: #c62f3b; --stopped: #a86200; --lost: #a86200; --todo: #66707c; }
@media (prefers-color-scheme: dark) { :root { --ink: #dfe5ec; --faint: #929daa; --paper: #14181d; --line: #323a44;
  --done: #46b877; --running: #6aa6ff; --failed: #ff7b80; --stopped: #e0a042; --lost: #e0a042; --todo: #929daa; } }
body { margin: 2rem auto; max-width: 76rem; padding: 0 1rem; font: 15px/1.5 system-ui, sans-serif;
  color: var(--ink); background: var(--paper); }
h1 { font-size: 1.4rem; margin: 0 0 .25rem; } h2 { font-size: 1.1rem; margin: 2rem 0 .5rem; }
.faint { color: var(--faint); } a { color: inherit; }
.bar { display: flex; height: .6rem; margin: 1rem 0; border-radius: .3rem; overflow: hidden; background: var(--line); }
.wide { overflow-x: auto; } table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; padding: .3rem .9rem .3rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th { font-weight: 600; color: var(--faint); } td.number, th.number { text-align: right; }
td.number { font-variant-numeric: tabular-nums; } td.detail { overflow-wrap: anywhere; }
.state { white-space: nowrap; font-weight: 600; }
progress { width: 100%; max-width: 20rem; height: .5rem; display: block; accent-color: var(--running); }
"""


def render_html(states: Sequence[State], title: str, total: str, *, folder: Path, report: Path) -> str:
    """The whole page.

    Args:
        states: a row each.
        title: name of the experiment.
        total: the line that sums up.
        folder: where the page will lie; links are relative to it.
        report: linked if it is there.

    Returns:
        HTML that loads itself anew while something runs. All that comes from files is escaped.
    """
    running = any(state.name == "running" for state in states)
    refresh = f'<meta http-equiv="refresh" content="{REFRESH}">' if running else ""
    written = datetime.now().astimezone().strftime("%Y-%m-%d %H:%M:%S %Z")
    linked = f' · <a href="{_link(report, folder)}">report</a>' if report.exists() else ""
    problems = [f"<li>{escape(problem)}</li>" for state in states for problem in state.problems]
    notes = f"<h2>Files that can't be read or are gone</h2><ul>{''.join(problems)}</ul>" if problems else ""
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">{refresh}
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{escape(title)}: {escape(total)}</title><style>{_STYLE}</style></head><body>
<h1>{escape(title)}</h1>
<div>{escape(total)}</div>
{_bar(states)}
<div class="wide"><table>
<tr><th>run</th><th>notebook</th><th>state</th><th class="number">minutes</th><th>figures, progress or error</th></tr>
{"".join(_row(state, folder) for state in states)}</table></div>
{notes}<p class="faint">As of {escape(written)}{linked}</p>
</body></html>
"""


def _bar(states: Sequence[State]) -> str:
    counts = {name: sum(state.name == name for state in states) for name in NAMES if name != "to do"}
    parts = [f'<span style="flex: {count}; background: {_colour(name)}"></span>' for name, count in counts.items()]
    rest = len(states) - sum(counts.values())
    return f'<div class="bar" aria-hidden="true">{"".join(parts)}<span style="flex: {rest}"></span></div>'


def _row(state: State, folder: Path) -> str:
    node = state.node
    notebook = escape(node.notebook)
    if node.executed.exists():
        notebook = f'<a href="{_link(node.executed, folder)}">{notebook}</a>'
    minutes = "" if state.seconds is None else f"{state.seconds / 60:.1f}"
    name = f'<td class="state" style="color: {_colour(state.name)}">{escape(state.name)}</td>'
    return (
        f'<tr><td>{escape(node.run)}</td><td>{notebook}</td>{name}<td class="number">{minutes}</td>'
        f'<td class="detail">{_detail(state)}</td></tr>\n'
    )


def _detail(state: State) -> str:
    if state.name == "running":
        epoch, epochs = state.progress.get("epoch"), state.progress.get("epochs")
        known = isinstance(epoch, int) and isinstance(epochs, int) and epochs > 0
        bar = f'<progress value="{epoch}" max="{epochs}"></progress>' if known else ""
        return escape(state.live or f"for {duration(state.seconds or 0.0)}") + bar
    return "<br>".join(escape(part) for part in (state.error, state.figures) if part)


def _colour(name: str) -> str:
    return f"var(--{name.replace(' ', '')})"


def _link(path: Path, folder: Path) -> str:
    return escape(quote(os.path.relpath(path.resolve(), folder).replace(os.sep, "/")), quote=True)
