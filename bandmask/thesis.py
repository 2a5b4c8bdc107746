"""The thesis beside ours: its printed numbers, our figures in its tables, its research questions as a table.

All take collected results of one or more experiments and work on a half-finished grid, where absent cells are "–".
Source: Petcu 2024, Tables 4.1 to 4.4 and A.3 to A.6 (`records/thesis_tables.csv`), chapter 1 (the questions).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from bandmask import bands, stats
from bandmask.results import ABSENT, MAKERS, mask_order, with_interval

TABLES = {  # and the task that each is of
    **dict.fromkeys(("4.1", "4.2"), "alignment"),
    **dict.fromkeys(("4.3", "A.3", "A.4"), "classification"),
    "4.4": "segmentation",
    **dict.fromkeys(("A.5", "A.6"), "alignment"),
}
ENCODER = "satclip-resnet50-l40"
DATA = {"alignment": "eurosat", "classification": "eurosat", "segmentation": "sen12ms"}
METRICS = {"classification": ("overall_accuracy",), "segmentation": ("overall_accuracy", "miou_all")}
QUESTIONS = ("RQ0", "RQ1", "RQ2", "RQ3", "main")
COMPARISONS = (  # first − second; with a third, as a share of what lies between second and third
    ("RQ1", "fine-tuned", "pre-trained"),
    ("RQ1", "fine-tuned", "ridge"),
    ("RQ2", "fine-tuned", "complete"),
    ("main", "pre-trained", "complete"),
    ("main", "fine-tuned", "pre-trained", "complete"),
    ("main", "ridge", "pre-trained", "complete"),
)
SUMMARY = {  # the three lines of `summary`
    "pre-trained − complete": "what losing bands costs: pre-trained − complete",
    "fine-tuned − pre-trained": "what fine-tuning wins back: fine-tuned − pre-trained",
    "fine-tuned − ridge": "against a fill that trains no encoder: fine-tuned − ridge",
}
_METHODS = {"pretrained": "pre-trained", "finetuned": "fine-tuned", "ridge": "ridge"}
_MEASURES = {  # of the thesis: our split, metric, the factor from ours to its unit, digits, and what it is called
    "val_loss": ("val", "val_loss", 1, 3, "loss"),
    "test_loss": ("test", "test_loss", 1, 3, "loss"),
    "val_accuracy_percent": ("val", "overall_accuracy", 100, 2, "accuracy (%)"),
    "test_accuracy_percent": ("test", "overall_accuracy", 100, 2, "accuracy (%)"),
    "average_accuracy_percent": ("test", "overall_accuracy", 100, 2, "accuracy (%)"),
    "miou": ("test", "miou_all", 1, 3, "mIoU"),
}
_RECORDS = Path(__file__).parent / "records"
_NONE = (np.nan, np.nan, np.nan)
Figures = Callable[[Sequence[str]], tuple[float, float, float]]  # of some masks: figure, low, high
Asked = tuple[tuple[str, ...], Figures, list[str], str]  # about, figures, masks that have runs, what is drawn anew


def printed_rows() -> pd.DataFrame:
    """Every number of the thesis' Tables 4.1 to 4.4 and A.3 to A.6, tidy, by thesis labels, with what the layout says.

    `epoch` counts from 1 (Tables A.5 and A.6 print 0 and 14 for 1 and 15); `block` counts the printed rows of a table
    from 0; `length` is the last epoch of the block; `marks` are those of `contradictions.csv` that touch a number.
    """
    text = dict.fromkeys(("table", "mask_ratio", "schedule", "note", "marks"), str)
    return pd.read_csv(_RECORDS / "thesis_tables.csv", dtype=text, keep_default_na=False, na_values={"sd": [""]})


def footnotes(frame: pd.DataFrame) -> list[str]:
    """The notes that a table for reading refers to, by its marks such as `B8 [d]`."""
    cells = " ".join(str(value) for value in frame.to_numpy().ravel())
    used = {key for marks in re.findall(r"\[([a-z](?:, [a-z])*)\]", cells) for key in marks.split(", ")}
    notes = pd.read_csv(_RECORDS / "contradictions.csv").itertuples()
    return [f"[{row.mark}] {row.note}" for row in notes if row.mark in used]


def comparable(results: pd.DataFrame) -> list[str]:
    """Tables of the thesis that ours may stand beside: those of runs with its encoder on its data."""
    same = results[(results["encoder"] == ENCODER) & (results["dataset"] == results["task"].map(DATA))]
    return [name for name, task in TABLES.items() if task in set(same["task"])]


def beside(results: pd.DataFrame, table: str, *, scheme: str = "named") -> pd.DataFrame:
    """Each number of a thesis' table with ours beside it: a row a number, in the thesis' order and unit.

    Ours are of retrained heads, as the thesis'. Where several experiments made the same run, the one whose length is
    nearest to the thesis' counts, then the first. Ridge imputation, which the thesis lacks, has rows in 4.3 and 4.4.

    Returns:
        The columns of `printed_rows`, `hidden bands`, `method`; `thesis`, `thesis_sd`; ours as `ours`, `sd`, `low`,
        `high` (bootstrap over runs), `runs`, `our_epoch` (the nearest there is); and `difference` (ours minus the
        thesis'), `difference_low`, `difference_high`, which take the thesis' figure as given.

    Raises:
        ValueError: unknown table; results of several encoders or data sets.
    """
    if table not in TABLES:
        raise ValueError(f"unknown table {table!r} of the thesis; available: {', '.join(TABLES)}")
    chosen = stats.select(results, scheme=scheme, ratio=None, schedule=None)
    chosen = chosen[(chosen["task"] == TABLES[table]) & (chosen["epoch"] != 0).fillna(True)]  # 0: before training
    printed = printed_rows()
    out = []
    for _, block in printed[printed["table"] == table].groupby("block", sort=False):
        lines: list[dict[Any, Any]] = block.to_dict("records")
        mask, runs = lines[0]["mask"], chosen[chosen["mask"] == lines[0]["mask"]]
        if mask != "none":
            ratio = float(lines[0]["mask_ratio"].split("-")[-1])  # "0.2-0.8" ends at 0.8
            same = np.isclose(runs["ratio"].astype(float), ratio)
            runs = runs[same & (runs["schedule"].fillna("constant") == lines[0]["schedule"])]
            if table in ("4.3", "4.4"):
                more = [line for line in lines if line["encoder"] == "pretrained"]
                lines += [{**line, "encoder": "ridge", "value": np.nan, "sd": np.nan} for line in more]
        hidden = runs["bands"].iloc[0] if len(runs) else " ".join(bands.resolve_mask(mask)) if scheme == "named" else ""
        for line in lines:
            line |= {"hidden bands": hidden or ABSENT, "method": _METHODS[line.pop("encoder")]}
            line |= {"thesis": line.pop("value"), "thesis_sd": line.pop("sd")}
            out.append({**line, **_ours(runs, line)})
    found = pd.DataFrame(out)
    for end, of in (("difference", "ours"), ("difference_low", "low"), ("difference_high", "high")):
        found[end] = found[of] - found["thesis"]
    return found


def _ours(runs: pd.DataFrame, line: Mapping[Any, Any]) -> dict[str, Any]:
    """Mean, SD and interval over the runs that the thesis' number is of, at the nearest epoch."""
    split, metric, factor, _, _ = _MEASURES[line["metric"]]
    protocol = "complete" if line["mask"] == "none" else "retrained"
    fits = (runs["metric"] == metric) & (runs["split"] == split) & (runs["method"] == line["method"])
    rows = runs[fits & ((runs["task"] == "alignment") | (runs["protocol"] == protocol))]
    if rows["experiment"].nunique() > 1:
        last = rows.groupby("experiment", sort=False)["epoch"].max()
        rows = rows[rows["experiment"] == (last - line["length"]).abs().fillna(0).idxmin()]
    epoch = None
    if len(epochs := rows["epoch"].dropna().unique()):
        epoch = int(min(epochs, key=lambda there: (abs(there - line["epoch"]), there)))
        rows = rows[rows["epoch"] == epoch]
    if rows.empty:
        return {"ours": np.nan, "sd": np.nan, "low": np.nan, "high": np.nan, "runs": 0, "our_epoch": None}
    values = factor * rows["value"].to_numpy(float)
    spread = values.std(ddof=1) if len(values) > 1 else np.nan
    low, high = stats.bootstrap_interval(values.tolist())
    return {"ours": values.mean(), "sd": spread, "low": low, "high": high, "runs": len(values), "our_epoch": epoch}


def table(results: pd.DataFrame, name: str, *, scheme: str = "named") -> pd.DataFrame:
    """`beside` laid out as the thesis has it, to read; a cell says which epoch ours are from where it is another."""
    out, downstream = [], name in ("4.3", "4.4")
    rows = beside(results, name, scheme=scheme)
    for _, block in rows.groupby(["metric", "block"] if downstream else "block"):
        first, marks = block.iloc[0], ", ".join(sorted(set("".join(block["marks"]))))
        digits, called = _MEASURES[first["metric"]][3:]
        line = {"mask": first["mask"] + (f" [{marks}]" if marks else ""), "hidden bands": first["hidden bands"]}
        if name == "4.4":
            line["metric"] = called
        if name == "A.5":
            line["mask strategy"] = ", ".join(filter(None, (first["schedule"], first["mask_ratio"]))) or ABSENT
        if name == "A.6":
            line |= {"mask ratio": first["mask_ratio"] or ABSENT, "epochs": str(first["length"])}
        for place, row in enumerate(block.to_dict("records")):
            at = ("start", "middle", "end", "")[place] if name in ("A.5", "A.6") else f"ep {row['epoch']}"
            at = row["method"] if downstream else "test" if row["metric"].startswith("test") else f"val {at}"
            line |= {f"{at}: {key}": text for key, text in _cells(row, digits).items()}
        out.append(line)
    drop = r"ridge: (thesis|difference)|val .*: difference"
    return pd.DataFrame(out).fillna(ABSENT).pipe(lambda found: found.loc[:, ~found.columns.str.fullmatch(drop)])


def _cells(row: Mapping[Any, Any], digits: int) -> dict[str, str]:
    """The thesis' figure with all its digits; ours, `0.512 ± 0.003 (ep 8)`; `+0.31 [−0.20, +0.82]`, of several runs."""
    printed = [value for value in (row["thesis"], row["thesis_sd"]) if not pd.isna(value)]
    printed = [f"{value:.{max(digits, len(f'{value:g}'.partition('.')[2]))}f}" for value in printed]
    ours = " ± ".join(f"{value:.{digits}f}" for value in (row["ours"], row["sd"]) if not pd.isna(value))
    if not pd.isna(row["our_epoch"]) and row["our_epoch"] != row["epoch"]:
        ours += f" (ep {row['our_epoch']:g})"
    low, high = (row["difference_low"], row["difference_high"]) if row["runs"] > 1 else _NONE[1:]
    change = "" if pd.isna(row["difference"]) else with_interval(row["difference"], low, high, digits)
    found = {"thesis": " ± ".join(printed), "ours": ours, "difference": change}
    return {key: text or ABSENT for key, text in found.items()}


def questions(
    results: pd.DataFrame,
    predictions: Mapping[str, pd.DataFrame],
    *,
    masks: Sequence[str] = (),
    scheme: str = "named",
    tasks: Sequence[str] = tuple(METRICS),
    draws: int = 2000,
) -> pd.DataFrame:
    """The thesis' research questions, a row a comparison: figure, interval, verdict, and what is not there yet.

    RQ0: does the alignment converge? RQ1: fine-tuned against pre-trained. RQ2: fine-tuned on incomplete against
    pre-trained on complete images. RQ3: do heads learn more slowly? main: what losing bands costs, and the share of
    that which is won back. RQ1 and main are asked of ridge imputation too, which trains no encoder. Figures are means
    over mask sets, all given the same drawn images and seeds; masks are chosen, not drawn.

    Args:
        results: collected results of one or more experiments, alignment and learning curves included.
        predictions: by task, of one experiment; pixel predictions of a large data set go through `by_group` first.
        masks: mask sets that should be there; without them, those that are found.
        scheme: how mask labels were read.
        tasks: that are asked of.
        draws: of the bootstrap.

    Returns:
        `question`, `task`, `protocol`, `metric`, `comparison`; `unit`, and in it `figure`, `low`, `high` (95 %);
        `verdict` (`no run` where nothing could be computed); how many `masks` count, and on how many of them the
        figure is above 0 (`higher on`); `drawn`, what the interval is over; `missing` masks and what makes them.

    Raises:
        ValueError: results of several encoders or data sets, or methods that predicted different images.
    """
    rows = stats.first_experiment(stats.select(results, scheme=scheme))
    wanted, options = [mask for mask in masks if mask != "none"], {"draws": draws}
    scores = rows.loc[rows["task"] == "segmentation", "metric"].astype(str)
    classes = scores[scores.str.startswith("iou ")].nunique() or None  # one that never occurs counts too
    asked = [_converges(rows, options)]
    for task in tasks:
        found = predictions.get(task, pd.DataFrame({"scheme": [], "mask": [], "protocol": [], "method": []}))
        found = found[(found["scheme"] == scheme) | (found["mask"] == "none")]
        for metric in METRICS[task]:
            asked += _compares(found, task, metric, options | {"classes": classes if metric == "miou_all" else None})
            asked += _learns(rows, task, metric, options)
    asked.sort(key=lambda one: QUESTIONS.index(one[0][0]))
    return pd.DataFrame([_row(*one, wanted) for one in asked])


def _row(about: Sequence[str], figures: Figures, counted: Sequence[str], drawn: str, wanted: Sequence[str]) -> Any:
    """One answer; `figures` gives figure, low and high of the mean over some masks, of which `counted` have runs."""
    figure, low, high = figures(counted) if counted else _NONE
    missing = [mask for mask in mask_order([*wanted, *counted]) if mask not in counted]
    return {
        **dict(zip(("question", "task", "protocol", "metric", "comparison", "unit"), about, strict=True)),
        **{"figure": figure, "low": low, "high": high},
        "verdict": stats.verdict(low, high) if counted else "no run",
        "masks": len(counted),
        "higher on": sum(figures([mask])[0] > 0 for mask in counted),
        "drawn": drawn if counted else "",
        "missing": f"{', '.join(missing)}: {MAKERS[about[1]]}".strip(": ") if missing or not counted else "",
    }


def _compares(found: pd.DataFrame, task: str, metric: str, options: Mapping[str, Any]) -> Iterator[Asked]:
    """RQ1, RQ2 and main: differences and shares of scores, all methods and masks in the same draws."""
    for protocol in ("retrained", "kept"):
        groups = found[found["protocol"] == protocol].groupby(["mask", "method"], sort=False)
        frames: dict[stats.Side, pd.DataFrame] = {(str(method), str(mask)): part for (mask, method), part in groups}
        masks = mask_order(str(mask) for _, mask in frames)
        if len(complete := stats.complete_runs(found)):
            frames["complete", ""] = complete
        sides = stats.resample(frames, metric=metric, **options)
        # mean over runs, and behind it the same in each draw: (1 + draws,)
        drawn = {side: 100 * np.r_[scored.value, scored.draws] for side, scored in sides.items()}
        drawn |= {("complete", mask): drawn["complete", ""] for mask in masks if ("complete", "") in drawn}
        over = "images" if min((side.runs for side in sides.values()), default=0) < 2 else "images, runs"
        for question, *methods in COMPARISONS:

            def figures(masks: Sequence[str], methods: Sequence[str] = methods, drawn: Any = drawn) -> Any:
                first, second, *top = (np.mean([drawn[method, mask] for mask in masks], axis=0) for method in methods)
                values = first - second
                for best in top:
                    if stats.interval((best - second)[1:])[0] <= 0:
                        return _NONE  # that need not be a loss, so there is none to win back
                    with np.errstate(divide="ignore", invalid="ignore"):  # a draw without a loss has no share of it
                        values = 100 * values / (best - second)
                return float(values[0]), *stats.interval(values[1:])

            comparison, unit = " − ".join(methods[:2]), "points"
            if methods[2:]:
                comparison, unit = f"({comparison}) / (complete − pre-trained)", "%"
            counted = [mask for mask in masks if all((method, mask) in drawn for method in methods)]
            yield (question, task, protocol, metric, comparison, unit), figures, counted, over


def _converges(rows: pd.DataFrame, options: Mapping[str, Any]) -> Asked:
    """RQ0: validation loss at the last epoch minus that of the pre-trained encoder (epoch 0)."""
    rows = rows[(rows["task"] == "alignment") & (rows["metric"] == "val_loss") & (rows["mask"] != "none")]
    curves = {mask: _by_run(rows[rows["mask"] == mask]) for mask in mask_order(rows["mask"])}
    falls = {m: curve.iloc[:, -1] - curve[0] for m, curve in curves.items() if 0 in curve and len(curve.columns) > 1}
    of_masks = len(falls) >= 3 and min(map(len, falls.values())) < 2  # some have one encoder

    def figures(masks: Sequence[str]) -> tuple[float, float, float]:
        some = [falls[mask] for mask in masks]
        together = of_masks and len(masks) >= 3
        return _over_runs([pd.Series([fall.mean() for fall in some])] if together else some, [], options)

    about = ("RQ0", "alignment", "", "val_loss", "last epoch − epoch 0", "loss")
    return about, figures, list(falls), "masks" if of_masks else "encoders"


def _learns(rows: pd.DataFrame, task: str, metric: str, options: Mapping[str, Any]) -> Iterator[Asked]:
    """RQ3: heads on fine-tuned encoders and incomplete images against heads on pre-trained and complete images."""
    rows = rows[(rows["task"] == task) & (rows["metric"] == metric) & (rows["split"] == "val") & (rows["epoch"] > 0)]
    control = _by_run(rows[(rows["protocol"] == "complete") & (rows["method"] == "pre-trained")])
    tuned = rows[(rows["protocol"] == "retrained") & (rows["method"] == "fine-tuned")]
    curves = {mask: _by_run(tuned[tuned["mask"] == mask]) for mask in mask_order(tuned["mask"]) if len(control)}
    for unit, name, measure in (
        ("points", "score after epoch 1", lambda curve: 100 * curve.iloc[:, 0]),
        ("epochs", "epochs to 95 % of the final score", _epochs_to),
    ):

        def figures(masks: Sequence[str], measure: Any = measure) -> tuple[float, float, float]:
            return _over_runs([measure(curves[mask]) for mask in masks], [measure(control)], options)

        about = ("RQ3", task, "retrained", metric, f"fine-tuned − complete, {name}", unit)
        yield about, figures, list(curves), "runs"


def _epochs_to(curve: pd.DataFrame) -> pd.Series:
    """First epoch at which each run has 95 % of its own final score."""
    return curve.ge(0.95 * curve.iloc[:, -1], axis=0).idxmax(axis=1).astype(float)


def _by_run(curve: pd.DataFrame) -> pd.DataFrame:
    """A row a run, a column an epoch, in order."""
    seeds = {name: curve[name].astype("Int64").fillna(-1) for name in stats.SEEDS}
    return curve.assign(**seeds).pivot_table(index=list(seeds), columns="epoch", values="value").sort_index(axis=1)


def _over_runs(after: Sequence[pd.Series], before: Sequence[pd.Series], options: Mapping[str, Any]) -> Any:
    """As `stats.difference_of_runs`; without an interval where a side has one run, which resampling would not move."""
    figure, low, high = stats.difference_of_runs(after, before, **options)
    return (figure, low, high) if min(map(len, (*after, *before))) > 1 else (figure, np.nan, np.nan)


def readable(answers: pd.DataFrame) -> pd.DataFrame:
    """`questions` to read: the figure with its interval, the head in words."""
    cells = zip(answers["figure"], answers["low"], answers["high"], answers["unit"], strict=True)
    texts = [ABSENT if np.isnan(v) else with_interval(v, low, high, 1 + (u == "loss")) for v, low, high, u in cells]
    higher = answers["higher on"].astype(str) + " of " + answers["masks"].astype(str)
    higher = higher.where(answers["figure"].notna(), ABSENT)
    heads = answers["protocol"].map(stats.PROTOCOLS).fillna(ABSENT)
    found = answers.copy()
    found[["head", "figure [95 %]", "higher on"]] = pd.DataFrame({"head": heads, "text": texts, "higher": higher})
    shown = ["question", "task", "head", "metric", "comparison", "figure [95 %]", "unit", "verdict", "higher on"]
    return found[[*shown, "drawn", "missing"]]


def summary(answers: pd.DataFrame) -> pd.DataFrame:
    """What was found, of `questions`: three lines of points, a column a task (by its last metric) and head."""
    last = answers["metric"] == answers["task"].map({task: metrics[-1] for task, metrics in METRICS.items()})
    chosen = readable(answers[last & answers["comparison"].isin(SUMMARY)])
    chosen = chosen.assign(where=chosen["task"] + ", " + chosen["head"])
    wide = chosen.pivot(index="comparison", columns="where", values="figure [95 %]").reindex(list(SUMMARY))
    return wide.rename(SUMMARY).fillna(ABSENT).rename_axis(index="points", columns=None).reset_index()
