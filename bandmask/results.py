"""Tidy results: one row a measurement, tables for reading and for papers, curves.

A row has the columns of `COLUMNS`. Predictions are kept too, so that two methods can be compared image by image.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from bandmask import bands, files, params
from bandmask.stats import PROTOCOLS, class_iou, read_protocol, scores, summarise

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLUMNS = (
    "experiment",
    "dataset",
    "encoder",  # name on the pre-trained encoder's card
    "mask",  # label of the mask set
    "scheme",
    "bands",  # ESA names, what was really hidden
    "ratio",
    "mask_value",
    "schedule",  # of the mask ratio in fine-tuning
    "shape",  # of what is lost together
    "task",  # alignment, classification, segmentation
    "protocol",  # complete, kept, retrained
    "method",  # pre-trained, fine-tuned, ridge
    "encoder_seed",
    "head_seed",  # of the scene head or the decoder
    "split",
    "epoch",
    "metric",
    "value",
)
# besides the mask
SETTINGS = ("experiment", "dataset", "encoder", "scheme", "ratio", "mask_value", "schedule", "shape")
METHODS = ("pre-trained", "ridge", "fine-tuned")
MAKERS = {  # which notebook does which task of a run
    "alignment": "03_fine_tuning",
    "classification": "04_scene_classification",
    "segmentation": "05_image_segmentation",
}
ABSENT = "–"


def tidy(measurements: Iterable[Mapping[str, Any]], **common: Any) -> pd.DataFrame:
    """Rows of the results table, from what differs (`measurements`) and what all share (`common`).

    Raises:
        ValueError: a column that the table doesn't have.
    """
    rows = [{**common, **row} for row in measurements]
    if unknown := {key for row in rows for key in row} - set(COLUMNS):
        raise ValueError(f"unknown result column {sorted(unknown)}; available: {', '.join(COLUMNS)}")
    table = pd.DataFrame(rows, columns=list(COLUMNS))
    for column in ("encoder_seed", "head_seed", "epoch"):
        table[column] = table[column].astype("Int64")
    return table.astype({"value": float, "ratio": float}).astype({"mask_value": str})


def write_table(table: pd.DataFrame, path: Path | str) -> Path:
    """Write Parquet, whole or not at all."""
    with files.writing(path) as partial:
        table.to_parquet(partial, index=False)
    return Path(path)


def read_table(path: Path | str) -> pd.DataFrame:
    """Read Parquet; results that were written before schedules and shapes were kept had constant ones of pixels."""
    table = pd.read_parquet(path)
    if "protocol" in table:
        table["protocol"] = table["protocol"].map(read_protocol, na_action="ignore")
    if "mask_value" in table:
        before = "mask_value"
        for column, value in (("schedule", "constant"), ("shape", "pixel")):
            if column not in table:
                table.insert(list(table.columns).index(before) + 1, column, value)
            before = column
    return table


def collect(
    folder: Path | str,
    name: str = "results.parquet",
    each: Callable[[pd.DataFrame], pd.DataFrame] = pd.DataFrame,
) -> pd.DataFrame:
    """The tables of all finished runs below an experiment's folder: `<folder>/<mask>/<name>`.

    Args:
        folder: of the experiment.
        name: of the file.
        each: done to each table before they are joined, such as `comparison.by_group` to pixel predictions, which
            would not fit in memory together.

    Raises:
        FileNotFoundError: not one run has finished.
    """
    found = sorted(Path(folder).glob(f"*/{name}"))
    if not found:
        maker = MAKERS.get(name.removesuffix(".parquet").split("_")[0], MAKERS["classification"])
        raise FileNotFoundError(
            f"no finished run below {folder} ({name}). Make one first: notebooks/{maker}.ipynb, or `make demo`"
        )
    return pd.concat([each(read_table(path)) for path in found], ignore_index=True)


def gather(folders: Iterable[Path | str], tasks: Iterable[str]) -> pd.DataFrame:
    """Rows of all finished runs of several experiments and tasks; what is not there yet is left out.

    Args:
        folders: of experiments, the one that counts first in front.
        tasks: keys of `params.RUN_FILES`.

    Raises:
        FileNotFoundError: not one run of the first experiment has finished; says which notebook makes one.
    """
    found: list[pd.DataFrame] = []
    missing: FileNotFoundError | None = None
    for place, folder in enumerate(folders):
        for task in tasks:
            try:
                found.append(collect(folder, params.RUN_FILES[task]))
            except FileNotFoundError as error:
                missing = error
        if place == 0 and not found and missing:
            raise missing
    return pd.concat(found, ignore_index=True)


def score_predictions(predictions: pd.DataFrame, classes: int | Sequence[str]) -> list[dict[str, Any]]:
    """Scores of each run in a predictions table, as measurements for `tidy`.

    Args:
        predictions: `label` and `predicted` of each image; or, with a column `pixels`, how many pixels of an image
            have this label and this prediction.
        classes: their number or, for an IoU of each, their names.

    Returns:
        Overall and macro accuracy; of pixels also `miou_all`, `miou_present` and, with names, `iou <class>`, which is
        NaN where a class is neither in the labels nor predicted.
    """
    import torch

    count = classes if isinstance(classes, int) else len(classes)
    metrics, names = ["overall_accuracy", "macro_accuracy"], []
    if "pixels" in predictions:
        metrics += ["miou_all", "miou_present"]
        names = [] if isinstance(classes, int) else [f"iou {name}" for name in classes]
    keys = [c for c in predictions.columns if c not in ("sample", "label", "predicted", "pixels", "group", "images")]
    measurements = []
    for values, run in predictions.groupby(keys, dropna=False):
        cell = run["label"].to_numpy(int) * count + run["predicted"].to_numpy(int)
        pixels = run["pixels"].to_numpy(float) if "pixels" in run else None  # exact up to 2⁵³ pixels
        counts = torch.from_numpy(np.bincount(cell, pixels, minlength=count * count)).view(count, count)
        found = {name: value for name, value in scores(counts).items() if name in metrics}
        ious = dict(zip(names, class_iou(counts).tolist(), strict=False))  # none without names
        described = dict(zip(keys, values if isinstance(values, tuple) else (values,), strict=True))
        measurements += [{**described, "metric": name, "value": value} for name, value in {**found, **ious}.items()]
    return measurements


def pixel_classes(table: pd.DataFrame) -> int | None:
    """How many classes the segmentation of a results table had, from its `iou <class>` rows; None if it has none."""
    metrics = table.loc[table["task"] == "segmentation", "metric"].astype(str)
    return metrics[metrics.str.startswith("iou ")].nunique() or None


def accuracy_table(table: pd.DataFrame, metric: str = "overall_accuracy", task: str = "classification") -> pd.DataFrame:
    """For reading: a row a mask and protocol, a column a method, `mean ± SD` in percent over seeds.

    Where the table holds several experiments or settings, columns say which is which.
    """
    rows = table[(table["metric"] == metric) & (table["split"] == "test") & (table["task"] == task)]
    settings = [c for c in SETTINGS if c in rows and rows[c].nunique() > 1]
    keys = ["mask", "bands", *settings, "protocol"]
    columns = ["mask", "hidden bands", *settings, "protocol"]
    if rows.empty:
        return pd.DataFrame(columns=[*columns, *METHODS])
    summary = summarise(rows, by=(*keys, "method"))
    summary["text"] = [percent(mean, sd) for mean, sd in zip(summary["mean"], summary["sd"], strict=True)]
    wide = summary.pivot(index=keys, columns="method", values="text")
    others = [method for method in wide.columns if method not in METHODS]  # such as the published model
    wide = wide.reindex(columns=[*METHODS, *others]).astype(object).fillna(ABSENT).reset_index()
    wide["mask"] = pd.Categorical(wide["mask"], mask_order(wide["mask"]))
    wide = wide.sort_values(["mask", *settings, "protocol"]).astype({"mask": str}).rename(columns={"bands": columns[1]})
    wide["protocol"] = wide["protocol"].replace(PROTOCOLS)
    return wide.rename_axis(columns=None).reset_index(drop=True)


def percent(mean: float, sd: float = float("nan")) -> str:
    """`84.2 ± 0.3` from shares."""
    return f"{100 * mean:.1f}" + ("" if np.isnan(sd) else f" ± {100 * sd:.1f}")


def mask_order(masks: Iterable[str]) -> list[str]:
    """Mask sets in the thesis' order, others after them by name."""
    found = set(masks)
    return [m for m in bands.THESIS_MASKS if m in found] + sorted(found - set(bands.THESIS_MASKS))


def export_table(frame: pd.DataFrame, stem: Path | str) -> list[Path]:
    """Write a table as CSV, LaTeX (needs `booktabs`) and Markdown beside each other: all three or none.

    Args:
        frame: for reading, without index.
        stem: path without suffix, such as `outputs/thesis/tables/table_4.3`.

    Returns:
        The paths `<stem>.csv`, `<stem>.tex`, `<stem>.md`.
    """
    stem = Path(stem)
    texts = {
        ".csv": frame.to_csv(index=False, lineterminator="\n"),
        ".tex": to_latex(frame),
        ".md": frame.to_markdown(index=False, disable_numparse=True) + "\n",
    }
    paths = [stem.with_name(stem.name + suffix) for suffix in texts]
    with ExitStack() as stack:  # nothing is renamed before all is written
        partials = [stack.enter_context(files.writing(path)) for path in paths]
        for partial, text in zip(partials, texts.values(), strict=True):
            partial.write_text(text, encoding="utf-8")
    return paths


_LATEX: dict[str, str | int | None] = {character: "\\" + character for character in "&%$#_{}"}
_LATEX |= {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "–": "--", "−": "$-$"}
_LATEX |= {"<": "$<$", ">": "$>$", "±": r"$\pm$", "×": r"$\times$", "→": r"$\to$"}
_LATEX |= {"[": "{[}", "]": "{]}"}  # after a line's end it would be read as a length


def to_latex(frame: pd.DataFrame) -> str:
    """A `tabular` with booktabs' rules; every special character of LaTeX is escaped, numbers stand to the right.

    Written here because pandas' own needs jinja2, which nothing else here does.
    """
    numeric = [pd.api.types.is_numeric_dtype(kind) for kind in frame.dtypes]
    lines = [[str(name) for name in frame.columns]]
    lines += [[ABSENT if pd.isna(value) else str(value) for value in row] for row in frame.itertuples(index=False)]
    head, *body = [" & ".join(cell.translate(str.maketrans(_LATEX)) for cell in line) + r" \\" for line in lines]
    return "\n".join(
        [
            r"\begin{tabular}{" + "".join("r" if number else "l" for number in numeric) + "}",
            *(r"\toprule", head, r"\midrule", *body, r"\bottomrule"),
            r"\end{tabular}" + "\n",
        ]
    )


def plot_curves(table: pd.DataFrame, axes: Axes, *, by: str = "mask", ylabel: str = "", scale: float = 1.0) -> None:
    """Mean over runs against epoch, a line a group, shaded by one standard deviation (Figures 4.1 to 4.4)."""
    from matplotlib.ticker import MaxNLocator

    order = mask_order(table[by]) if by == "mask" else list(dict.fromkeys(table[by]))
    for name in order:
        group = table[table[by] == name].groupby("epoch")["value"]
        mean, spread = group.mean() * scale, group.std(ddof=1).fillna(0) * scale
        epochs = mean.index.to_numpy(float)
        (line,) = axes.plot(epochs, mean.to_numpy(float), label=str(name), marker="o", markersize=3)
        low, high = (mean - spread).to_numpy(float), (mean + spread).to_numpy(float)
        axes.fill_between(epochs, low, high, color=line.get_color(), alpha=0.2, linewidth=0)
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylabel(ylabel)
    axes.legend(title=by, frameon=False)


def main() -> None:
    """`python -m bandmask.results outputs/sample`: print the tables of an experiment, and where its report is."""
    import sys

    if len(sys.argv) != 2:
        sys.exit("usage: python -m bandmask.results outputs/<experiment>")
    folder = Path(sys.argv[1])
    table = read_table(files.require(folder / "results.parquet", "notebooks/06_results.ipynb, or `make demo`"))
    print(f"\nMean ± SD over runs. Encoder: {table['encoder'].iloc[0]}.")
    if "sample" in "".join(table["dataset"].astype(str)):
        print("Labels are derived from spectral indices of the complete bands: they prove the pipeline only.")
    shown = [("classification", "overall_accuracy"), ("segmentation", "overall_accuracy"), ("segmentation", "miou_all")]
    for task, metric in shown:
        if len(accuracy := accuracy_table(table, metric, task)):
            print(f"\n{task.capitalize()}, {metric.replace('_', ' ')} on test images (%):\n")
            print(accuracy.to_markdown(index=False))
    report = folder / "06_results.html"
    print(f"\nReport: {report.resolve() if report.exists() else 'not made; notebooks/06_results.ipynb makes it'}")


if __name__ == "__main__":
    main()
