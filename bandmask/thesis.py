"""The thesis beside ours: its printed numbers, and our figures in its tables.

All take collected results of one or more experiments and work on a half-finished grid, where absent cells are "–".
Source: Petcu 2024, Tables 4.1 to 4.4 and A.3 to A.6 (`records/thesis_tables.csv`).
"""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from bandmask import bands, files
from bandmask.results import ABSENT

TABLES = {  # and the task that each is of
    **dict.fromkeys(("4.1", "4.2"), "alignment"),
    **dict.fromkeys(("4.3", "A.3", "A.4"), "classification"),
    "4.4": "segmentation",
    **dict.fromkeys(("A.5", "A.6"), "alignment"),
}
ENCODER = "satclip-resnet50-l40"
DATA = {"alignment": "eurosat", "classification": "eurosat", "segmentation": "sen12ms"}
_MEASURES = {  # of the thesis: our split, metric, the factor from ours to its unit, digits, and what it is called
    "val_loss": ("val", "val_loss", 1, 3, "loss"),
    "test_loss": ("test", "test_loss", 1, 3, "loss"),
    "val_accuracy_percent": ("val", "overall_accuracy", 100, 2, "accuracy (%)"),
    "test_accuracy_percent": ("test", "overall_accuracy", 100, 2, "accuracy (%)"),
    "average_accuracy_percent": ("test", "overall_accuracy", 100, 2, "accuracy (%)"),
    "miou": ("test", "miou_all", 1, 3, "mIoU"),
}


def select(table: pd.DataFrame, *, scheme: str = "named", variants: bool = False) -> pd.DataFrame:
    """Rows of the thesis' setting (`variants`: other ratios and schedules too); those of mask `none` belong to each.

    A ValueError of several encoders or data sets in one task: means over them would say nothing.
    """
    usual = {"mask_value": "dataset_mean", "shape": "pixel"} | ({} if variants else {"schedule": "constant"})
    fits = (table["scheme"] == scheme) & (variants | np.isclose(table["ratio"].astype(float), 0.9))
    for name, value in usual.items():
        fits &= table[name].fillna(value) == value
    rows = table[fits | (table["mask"] == "none")]
    for task, group in rows.groupby("task"):
        for column in ("dataset", "encoder"):
            if len(found := group[column].dropna().unique()) > 1:
                said = f"the {task} results are of several {column}s: {', '.join(map(str, found))}"
                raise ValueError(f"{said}; give those of one: table[table['{column}'] == {str(found[0])!r}]")
    return rows


def first_experiment(table: pd.DataFrame) -> pd.DataFrame:
    """Where several experiments made the same runs, those of the first; else they would count twice."""
    settings = ["scheme", "ratio", "mask_value", "schedule", "shape"]
    keys = table[["task", "mask", "protocol", "method", *settings]].astype(object)
    keys.loc[table["mask"] == "none", settings] = ""  # it hides nothing, whatever the setting
    first = table["experiment"].groupby([keys[name] for name in keys], dropna=False).transform("first")
    return table[(table["experiment"] == first) | table["experiment"].isna()]


def printed_rows() -> pd.DataFrame:
    """Every number of the thesis' Tables 4.1 to 4.4 and A.3 to A.6, tidy, by thesis labels, with what the layout says.

    `epoch` counts from 1 (Tables A.5 and A.6 print 0 and 14 for 1 and 15); `block` counts the printed rows of a table
    from 0; `length` is the last epoch of the block; `marks` are those of `contradictions.csv` that touch a number.
    """
    text = dict.fromkeys(("table", "mask_ratio", "schedule", "note", "marks"), str)
    return pd.read_csv(files.RECORDS / "thesis_tables.csv", dtype=text, keep_default_na=False, na_values={"sd": [""]})


def footnotes(frame: pd.DataFrame) -> list[str]:
    """The notes that a table for reading refers to, by its marks such as `B8 [d]`."""
    cells = " ".join(str(value) for value in frame.to_numpy().ravel())
    used = {key for marks in re.findall(r"\[([a-z](?:, [a-z])*)\]", cells) for key in marks.split(", ")}
    notes = pd.read_csv(files.RECORDS / "contradictions.csv").itertuples()
    return [f"[{row.mark}] {row.note}" for row in notes if row.mark in used]


def comparable(results: pd.DataFrame) -> list[str]:
    """Tables of the thesis that ours may stand beside: those of runs with its encoder on its data."""
    same = results[(results["encoder"] == ENCODER) & (results["dataset"] == results["task"].map(DATA))]
    return [name for name, task in TABLES.items() if task in set(same["task"])]


def beside(results: pd.DataFrame, table: str, *, scheme: str = "named") -> pd.DataFrame:
    """Each number of a thesis' table with ours beside it: a row a number, in the thesis' order and unit.

    Ours are of retrained heads, as the thesis'. Where several experiments made the same run, the one whose length is
    nearest to the thesis' counts, then the first. Beside the columns of `printed_rows` there are `hidden bands`,
    `method`, `thesis`, `thesis_sd`, `ours`, `sd`, `runs` and `our_epoch`, the nearest there is. Errors are those of
    `select`.
    """
    chosen = select(results, scheme=scheme, variants=True)
    chosen = chosen[(chosen["task"] == TABLES[table]) & (chosen["epoch"] != 0).fillna(True)]  # 0: before training
    printed = printed_rows().rename(columns={"value": "thesis", "sd": "thesis_sd"})
    printed["method"] = printed.pop("encoder").map({"pretrained": "pre-trained", "finetuned": "fine-tuned"})
    lines: list[dict[Any, Any]] = printed[printed["table"] == table].to_dict("records")
    out = []
    for line in lines:
        runs = chosen[chosen["mask"] == line["mask"]]
        if line["mask"] != "none":
            ratio = float(line["mask_ratio"].split("-")[-1])  # "0.2-0.8" ends at 0.8
            same = np.isclose(runs["ratio"].astype(float), ratio)
            runs = runs[same & (runs["schedule"].fillna("constant") == line["schedule"])]
        named = " ".join(bands.resolve_mask(line["mask"])) if scheme == "named" else ""
        hidden = runs["bands"].iloc[0] if len(runs) else named
        out.append({**line, "hidden bands": hidden or ABSENT, **_ours(runs, line)})
    return pd.DataFrame(out)


def _ours(runs: pd.DataFrame, line: Mapping[Any, Any]) -> dict[str, Any]:
    """Mean and SD over the runs that the thesis' number is of, at the nearest epoch."""
    split, metric, factor, *_ = _MEASURES[line["metric"]]
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
    values = factor * rows["value"]
    return {"ours": values.mean(), "sd": values.std(), "runs": len(values), "our_epoch": epoch}


def table(results: pd.DataFrame, name: str, *, scheme: str = "named") -> pd.DataFrame:
    """`beside` laid out as the thesis has it, to read; a cell says which epoch ours are from where it is another."""
    out, downstream = [], name in ("4.3", "4.4")
    rows = beside(results, name, scheme=scheme)
    for _, block in rows.groupby(["metric", "block"] if downstream else "block"):
        first, marks = block.iloc[0], ", ".join(sorted(set("".join(block["marks"]))))
        line = {"mask": first["mask"] + (f" [{marks}]" if marks else ""), "hidden bands": first["hidden bands"]}
        if name == "4.4":
            line["metric"] = _MEASURES[first["metric"]][-1]
        if name == "A.5":
            line["mask strategy"] = ", ".join(filter(None, (first["schedule"], first["mask_ratio"]))) or ABSENT
        if name == "A.6":
            line |= {"mask ratio": first["mask_ratio"] or ABSENT, "epochs": str(first["length"])}
        for place, row in enumerate(block.to_dict("records")):
            at = ("start", "middle", "end", "")[place] if name in ("A.5", "A.6") else f"ep {row['epoch']}"
            at = row["method"] if downstream else "test" if row["metric"].startswith("test") else f"val {at}"
            digits = _MEASURES[row["metric"]][3]
            line[f"{at}: thesis"] = _cell(row["thesis"], row["thesis_sd"], digits, printed=True)
            line[f"{at}: ours"] = _cell(row["ours"], row["sd"], digits)
            if row["our_epoch"] not in (None, row["epoch"]) and not pd.isna(row["our_epoch"]):
                line[f"{at}: ours"] += f" (ep {row['our_epoch']:g})"
        out.append(line)
    return pd.DataFrame(out).fillna(ABSENT)


def _cell(value: float, sd: float, digits: int, *, printed: bool = False) -> str:
    """`0.512 ± 0.003`; a printed figure has all its digits."""
    there = [figure for figure in (value, sd) if not pd.isna(figure)]
    more = [max(digits, len(f"{figure:g}".partition(".")[2])) if printed else digits for figure in there]
    return " ± ".join(f"{figure:.{count}f}" for figure, count in zip(there, more, strict=True)) or ABSENT
