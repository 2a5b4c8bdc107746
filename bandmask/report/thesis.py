"""The thesis' tables with ours beside them: differences, intervals, contradictions, and what is still missing.

`beside` gives every number as a tidy table; `table_4_1` to `table_a6` show them as the thesis does. All take the
collected results of one or more experiments and work on a half-finished grid, where absent cells are "–".
Source: Petcu 2024, Tables 4.1 to 4.4 and A.3 to A.6.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from bandmask import bands
from bandmask.comparison import bootstrap_interval, paired_difference, select
from bandmask.report.printed import TABLES, printed_rows
from bandmask.results import ABSENT, MAKERS, pixel_classes

_METHODS = {"pretrained": "pre-trained", "finetuned": "fine-tuned", "ridge": "ridge"}
_MEASURES = {  # of the thesis: our task, split, metric, and the factor from ours to its unit
    "val_loss": ("alignment", "val", "val_loss", 1),
    "test_loss": ("alignment", "test", "test_loss", 1),
    "val_accuracy_percent": ("classification", "val", "overall_accuracy", 100),
    "test_accuracy_percent": ("classification", "test", "overall_accuracy", 100),
    "average_accuracy_percent": ("segmentation", "test", "overall_accuracy", 100),
    "miou": ("segmentation", "test", "miou_all", 1),
}
_DOWNSTREAM = ("4.3", "4.4")


def beside(
    results: pd.DataFrame,
    table: str,
    *,
    scheme: str = "named",
    mask_value: str = "dataset_mean",
    miou: str = "miou_all",
) -> pd.DataFrame:
    """Each number of a thesis' table with ours beside it: a row a number, in the thesis' order and unit.

    Ours are of heads trained on incomplete images (protocol `retrained`), as the thesis'. Where several experiments
    made the same run, the one whose length is nearest to the thesis' counts, then the first. Ridge imputation, which
    the thesis lacks, has rows of its own in Tables 4.3 and 4.4.

    Args:
        results: collected results of one or more experiments; one encoder, and one data set a task.
        table: one of `printed.TABLES`.
        scheme: how mask labels are read.
        mask_value: what stood in hidden pixels.
        miou: `miou_all` is the thesis' formula (Figure 3.4); `miou_present` leaves absent classes out.

    Returns:
        The columns `table`, `block`, `mask`, `mask_ratio`, `schedule`, `length`, `metric`, `epoch` and `marks` of
        `printed.printed_rows`, `hidden bands`, `method`; `thesis` and `thesis_sd`; ours as `ours`, `sd`, `low`,
        `high` (bootstrap over runs), `runs`, `our_epoch` (the nearest there is); and `difference` (ours minus the
        thesis'), `difference_low`, `difference_high`, which take the thesis' figure as given.

    Raises:
        ValueError: unknown table; results of several encoders or data sets.
    """
    if table not in TABLES:
        raise ValueError(f"unknown table {table!r} of the thesis; available: {', '.join(TABLES)}")
    chosen = select(results, scheme=scheme, ratio=None, mask_value=mask_value, schedule=None)
    printed = printed_rows()
    out = []
    for _, block in printed[printed["table"] == table].groupby("block", sort=False):
        lines = block.to_dict("records")
        runs = _runs_like(chosen, lines[0])
        if table in _DOWNSTREAM and lines[0]["mask"] != "none":
            nothing: dict[Hashable, Any] = {"encoder": "ridge", "value": np.nan, "sd": np.nan}
            lines += [{**line, **nothing} for line in lines if line["encoder"] == "pretrained"]
        for line in lines:
            task, split, metric, factor = _MEASURES[line["metric"]]
            wanted = (task, split, miou if metric == "miou_all" else metric)
            ours = _ours(runs, line, wanted, factor)
            known = {name: line[name] for name in printed.columns if name not in ("encoder", "value", "sd", "note")}
            known |= {"hidden bands": _hidden_bands(runs, line["mask"], scheme), "method": _METHODS[line["encoder"]]}
            out.append({**known, "thesis": line["value"], "thesis_sd": line["sd"], **ours})
    found = pd.DataFrame(out)
    for end, of in (("difference", "ours"), ("difference_low", "low"), ("difference_high", "high")):
        found[end] = found[of] - found["thesis"]
    return found


def table_4_1(results: pd.DataFrame, **options: Any) -> pd.DataFrame:
    """Alignment with one masked band: validation loss along the epochs, and test loss; `options` as in `beside`.

    Where our runs were shorter or longer than the thesis', cells say which epoch they are from.
    """
    return _alignment(beside(results, "4.1", **options))


def table_4_2(results: pd.DataFrame, **options: Any) -> pd.DataFrame:
    """Alignment with several masked bands; as `table_4_1`."""
    return _alignment(beside(results, "4.2", **options))


def table_4_3(results: pd.DataFrame, predictions: pd.DataFrame | None = None, **options: Any) -> pd.DataFrame:
    """Scene classification: test accuracy (%) with either encoder, and with ridge imputation, which is ours alone.

    Args:
        results: as in `beside`.
        predictions: of the same runs; with them a column says what fine-tuning wins on the same test images.
        options: as in `beside`.
    """
    measures = {"test_accuracy_percent": ("accuracy (%)", 2)}
    return _downstream(beside(results, "4.3", **options), measures, _gains(results, predictions, measures, options))


def table_4_4(results: pd.DataFrame, predictions: pd.DataFrame | None = None, **options: Any) -> pd.DataFrame:
    """Segmentation: overall accuracy (%), and below it mIoU, on test images; as `table_4_3`."""
    measures = {"average_accuracy_percent": ("accuracy (%)", 2), "miou": ("mIoU", 3)}
    return _downstream(beside(results, "4.4", **options), measures, _gains(results, predictions, measures, options))


def table_a3(results: pd.DataFrame, **options: Any) -> pd.DataFrame:
    """Scene classification with the fine-tuned encoder: accuracy (%), validation along the epochs, and test."""
    return _heads(beside(results, "A.3", **options))


def table_a4(results: pd.DataFrame, **options: Any) -> pd.DataFrame:
    """Scene classification with the pre-trained encoder; as `table_a3`."""
    return _heads(beside(results, "A.4", **options))


def table_a5(results: pd.DataFrame, **options: Any) -> pd.DataFrame:
    """Alignment under mask schedules: constant 0.9, gradual and staircase 0.2 to 0.8; as `table_4_1`."""
    rows = beside(results, "A.5", **options)
    return _alignment(rows, {"mask strategy": rows["schedule"] + ", " + rows["mask_ratio"]})


def table_a6(results: pd.DataFrame, **options: Any) -> pd.DataFrame:
    """Alignment at other mask ratios and lengths; as `table_4_1`."""
    rows = beside(results, "A.6", **options)
    return _alignment(rows, {"mask ratio": rows["mask_ratio"], "epochs": rows["length"].astype(str)})


def missing_runs(results: pd.DataFrame, tables: Sequence[str] = TABLES, **options: Any) -> pd.DataFrame:
    """What the tables still lack: a row a table and run, the measures that are absent, the notebook that makes them."""
    out = []
    for table in tables:
        rows = beside(results, table, **options)
        for _, lacking in rows[rows["ours"].isna()].groupby(["block", "method"], sort=False):
            first = lacking.iloc[0]
            run = {"table": table, "mask": first["mask"], "mask ratio": first["mask_ratio"] or ABSENT}
            run |= {"schedule": first["schedule"] or ABSENT, "epochs": first["length"], "method": first["method"]}
            measures = ", ".join(dict.fromkeys(lacking["metric"]))
            out.append({**run, "missing": measures, "notebook": MAKERS[_MEASURES[first["metric"]][0]]})
    columns = ["table", "mask", "mask ratio", "schedule", "epochs", "method", "missing", "notebook"]
    return pd.DataFrame(out, columns=columns)


def _runs_like(chosen: pd.DataFrame, line: Mapping[Any, Any]) -> pd.DataFrame:
    runs = chosen[chosen["mask"] == line["mask"]]
    if line["mask"] == "none":
        return runs
    ratio = float(line["mask_ratio"].split("-")[-1])  # "0.2-0.8" ends at 0.8
    same = np.isclose(runs["ratio"].astype(float), ratio)
    return runs[same & (runs["schedule"].fillna("constant") == line["schedule"])]


def _ours(
    runs: pd.DataFrame, line: Mapping[Any, Any], wanted: tuple[str, str, str], factor: float
) -> dict[str, float | int | None]:
    """Mean, SD and interval over the runs that the thesis' number is of, at the nearest epoch."""
    task, split, metric = wanted
    fits = (runs["metric"] == metric) & (runs["task"] == task) & (runs["split"] == split)
    fits &= (runs["method"] == _METHODS[line["encoder"]]) & (runs["epoch"] != 0).fillna(True)  # 0: before training
    if task != "alignment":
        fits &= runs["protocol"] == ("complete" if line["mask"] == "none" else "retrained")
    rows = runs.loc[fits, ["experiment", "epoch", "value"]]
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
    low, high = bootstrap_interval(values.tolist())
    spread = float(values.std(ddof=1)) if len(values) > 1 else np.nan
    return {"ours": values.mean(), "sd": spread, "low": low, "high": high, "runs": len(values), "our_epoch": epoch}


def _hidden_bands(runs: pd.DataFrame, mask: str, scheme: str) -> str:
    if len(runs):
        return str(runs["bands"].iloc[0]) or ABSENT
    return " ".join(bands.resolve_mask(mask)) or ABSENT if scheme == "named" else ABSENT


def _alignment(rows: pd.DataFrame, more: Mapping[str, pd.Series] | None = None) -> pd.DataFrame:
    out = []
    for _, block in rows.groupby("block", sort=False):
        line = _head(block) | {name: column[block.index[0]] for name, column in (more or {}).items()}
        names = ["val start", "val middle", "val end"] if more else [f"val ep {epoch}" for epoch in block["epoch"][:3]]
        for name, row in zip([*names, "test"], block.to_dict("records"), strict=True):
            line |= {f"{name}: thesis": _printed(row, 3), f"{name}: ours": _cell(row, 3)}
        out.append({**line, "test: difference": _change(row, 3)})
    return pd.DataFrame(out)


def _heads(rows: pd.DataFrame) -> pd.DataFrame:
    out = []
    for _, block in rows.groupby("block", sort=False):
        line = _head(block)
        for row in block.to_dict("records"):
            name = "test" if row["metric"].startswith("test") else f"val ep {row['epoch']}"
            line |= {f"{name}: thesis": _printed(row, 2), f"{name}: ours": _cell(row, 2)}
        out.append({**line, "test: difference": _change(row, 2)})
    return pd.DataFrame(out)


def _downstream(
    rows: pd.DataFrame, measures: Mapping[str, tuple[str, int]], gains: Mapping[tuple[str, str], str] | None
) -> pd.DataFrame:
    out = []
    for measure, (name, decimals) in measures.items():
        for mask, block in rows[rows["metric"] == measure].groupby("mask", sort=False):
            line = _head(block) | ({"metric": name} if len(measures) > 1 else {})
            found = {row["method"]: row for row in block.to_dict("records")}
            for method in ("pre-trained", "fine-tuned"):
                row = found.get(method, {})
                line |= {f"{method}: thesis": _printed(row, decimals), f"{method}: ours": _cell(row, decimals)}
                line |= {f"{method}: difference": _change(row, decimals)}
            line["ridge: ours"] = _cell(found.get("ridge", {}), decimals)
            if gains is not None:
                line["fine-tuned − pre-trained: ours"] = gains.get((measure, str(mask)), ABSENT)
            out.append(line)
    return pd.DataFrame(out)


def _gains(
    results: pd.DataFrame,
    predictions: pd.DataFrame | None,
    measures: Mapping[str, tuple[str, int]],
    options: Mapping[str, Any],
) -> dict[tuple[str, str], str] | None:
    """What fine-tuning wins on the same test images, by measure and mask."""
    if predictions is None:
        return None
    out = {}
    for measure, (_, decimals) in measures.items():
        _, _, metric, factor = _MEASURES[measure]
        metric = options.get("miou", metric) if metric == "miou_all" else metric
        classes = pixel_classes(results) if metric == "miou_all" else None
        found = paired_difference(predictions, "pre-trained", "fine-tuned", metric=metric, classes=classes)
        mine = (found["protocol"] == "retrained") & (found["scheme"] == options.get("scheme", "named"))
        for row in found[mine].to_dict("records"):
            change = {f"difference{end}": factor * row[end.strip("_") or "difference"] for end in ("", "_low", "_high")}
            out[measure, row["mask"]] = _change({**change, "runs": 2}, decimals)
    return out


def _head(block: pd.DataFrame) -> dict[str, str]:
    first, marks = block.iloc[0], sorted({mark for cell in block["marks"] for mark in cell})
    return {"mask": first["mask"] + (f" [{', '.join(marks)}]" if marks else ""), "hidden bands": first["hidden bands"]}


def _printed(row: Mapping[Any, Any], decimals: int) -> str:
    """The thesis' figure with all its digits."""
    if pd.isna(row.get("thesis")):
        return ABSENT
    figures = [row["thesis"], *([] if pd.isna(row["thesis_sd"]) else [row["thesis_sd"]])]
    return " ± ".join(f"{value:.{max(decimals, len(f'{value:g}'.partition('.')[2]))}f}" for value in figures)


def _cell(row: Mapping[Any, Any], decimals: int) -> str:
    """Ours: `0.512 ± 0.003 (ep 8)`, the epoch where it isn't the thesis'."""
    if pd.isna(row.get("ours")):
        return ABSENT
    text = f"{row['ours']:.{decimals}f}" + ("" if pd.isna(row["sd"]) else f" ± {row['sd']:.{decimals}f}")
    return (
        text if pd.isna(row["our_epoch"]) or row["our_epoch"] == row["epoch"] else f"{text} (ep {row['our_epoch']:g})"
    )


def _change(row: Mapping[Any, Any], decimals: int) -> str:
    """`+0.31 [−0.20, +0.82]`; one run has no interval."""
    if pd.isna(row.get("difference")):
        return ABSENT
    text = f"{row['difference']:+.{decimals}f}"
    if row["runs"] > 1:
        text += f" [{row['difference_low']:+.{decimals}f}, {row['difference_high']:+.{decimals}f}]"
    return text.replace("-", "−")
