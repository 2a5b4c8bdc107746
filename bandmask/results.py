"""Tidy results: one row a measurement, summaries with intervals, the thesis' figures beside ours, curves.

A row has the columns of `COLUMNS`. Predictions are kept too, so that two methods can be compared image by image.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from bandmask import bands, files
from bandmask.metrics import confusion_matrix, scores

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
    "task",  # alignment, classification
    "protocol",  # complete, thesis, transfer
    "method",  # pre-trained, fine-tuned, ridge
    "encoder_seed",
    "head_seed",
    "split",
    "epoch",
    "metric",
    "value",
)
METHODS = ("pre-trained", "ridge", "fine-tuned")
PROTOCOLS = ("complete", "thesis", "transfer")


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


def collect(folder: Path | str, name: str = "results.parquet") -> pd.DataFrame:
    """The tables of all finished runs below an experiment's folder: `<folder>/<mask>/<name>`.

    Raises:
        FileNotFoundError: not one run has finished.
    """
    found = sorted(Path(folder).glob(f"*/{name}"))
    if not found:
        raise FileNotFoundError(
            f"no finished run below {folder}. Make one first: notebooks/04_scene_classification.ipynb, or `make demo`"
        )
    return pd.concat([pd.read_parquet(path) for path in found], ignore_index=True)


def score_predictions(predictions: pd.DataFrame, classes: int) -> list[dict[str, Any]]:
    """Overall and macro accuracy of each run in a predictions table, as measurements for `tidy`."""
    import torch

    keys = [c for c in predictions.columns if c not in ("sample", "label", "predicted")]
    measurements = []
    for values, run in predictions.groupby(keys, dropna=False):
        predicted, label = torch.tensor(run["predicted"].to_numpy()), torch.tensor(run["label"].to_numpy())
        found = scores(confusion_matrix(predicted, label, classes))
        described = dict(zip(keys, values if isinstance(values, tuple) else (values,), strict=True))
        for metric in ("overall_accuracy", "macro_accuracy"):
            measurements.append({**described, "metric": metric, "value": found[metric]})
    return measurements


def bootstrap_interval(
    values: Sequence[float], *, draws: int = 2000, level: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of a few runs; with three runs it is little more than their range."""
    array = np.asarray(values, float)
    picks = np.random.default_rng(seed).integers(len(array), size=(draws, len(array)))
    low, high = np.quantile(array[picks].mean(1), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def summarise(
    table: pd.DataFrame, by: Sequence[str] = ("mask", "scheme", "protocol", "method", "metric")
) -> pd.DataFrame:
    """Mean, SD and bootstrap interval over seeds; one row a group, `runs` says over how many runs."""
    rows = []
    for key, group in table.groupby(list(by), sort=False, dropna=False):
        low, high = bootstrap_interval(group["value"].tolist())
        spread = group["value"].std(ddof=1) if len(group) > 1 else float("nan")
        described = dict(zip(by, key if isinstance(key, tuple) else (key,), strict=True))
        rows.append(
            {**described, "mean": group["value"].mean(), "sd": spread, "low": low, "high": high, "runs": len(group)}
        )
    return pd.DataFrame(rows)


def paired_difference(
    predictions: pd.DataFrame, first: str, second: str, *, draws: int = 2000, level: float = 0.95, seed: int = 0
) -> pd.DataFrame:
    """Accuracy of `second` minus `first` on the same test images, with an interval over images and seeds.

    Both methods see the same images, so resampling images in pairs tells a small gain from luck where two separate
    intervals can't. Images are drawn anew, and with them each method's runs.

    Returns:
        A row per mask, scheme and protocol: `difference`, `low`, `high` (as shares), and `images`.

    Raises:
        ValueError: the two methods predicted different images.
    """
    draw = np.random.default_rng(seed)
    rows = []
    for key, group in predictions.groupby(["mask", "scheme", "protocol"], sort=False):
        right = group.assign(right=group["predicted"] == group["label"])
        matrices = [_runs_by_image(right[right["method"] == method]) for method in (first, second)]
        before, after = matrices  # (runs, images)
        if before is None or after is None:
            continue
        if list(before.columns) != list(after.columns) or before.isna().any(axis=None) or after.isna().any(axis=None):
            raise ValueError(f"{first!r} and {second!r} did not predict the same images of {key}; run both anew")
        rights = before.to_numpy(float), after.to_numpy(float)
        count = before.shape[1]
        # how often each image and each run is drawn, instead of gathering what was drawn
        images = draw.multinomial(count, np.full(count, 1 / count), size=draws) / count
        lines = [draw.multinomial(len(m), np.full(len(m), 1 / len(m)), size=draws) @ m / len(m) for m in rights]
        spread = (images * (lines[1] - lines[0])).sum(1)
        low, high = np.quantile(spread, [(1 - level) / 2, (1 + level) / 2])
        mask, scheme, protocol = key
        rows.append(
            {
                "mask": mask,
                "scheme": scheme,
                "protocol": protocol,
                "difference": float(rights[1].mean() - rights[0].mean()),
                "low": float(low),
                "high": float(high),
                "images": count,
            }
        )
    return pd.DataFrame(rows, columns=["mask", "scheme", "protocol", "difference", "low", "high", "images"])


def _runs_by_image(right: pd.DataFrame) -> pd.DataFrame | None:
    if right.empty:
        return None
    right = right.assign(encoder_seed=right["encoder_seed"].fillna(-1))  # a pivot drops missing keys
    return right.pivot_table(index=["encoder_seed", "head_seed"], columns="sample", values="right", aggfunc="first")


def accuracy_table(table: pd.DataFrame, metric: str = "overall_accuracy") -> pd.DataFrame:
    """For reading: a row a mask and protocol, a column a method, `mean ± SD` in percent over seeds."""
    rows = table[(table["metric"] == metric) & (table["split"] == "test") & (table["task"] == "classification")]
    if rows.empty:
        return pd.DataFrame(columns=["mask", "hidden bands", "protocol", *METHODS])
    summary = summarise(rows, by=("mask", "bands", "protocol", "method"))
    summary["text"] = [percent(mean, sd) for mean, sd in zip(summary["mean"], summary["sd"], strict=True)]
    wide = summary.pivot(index=["mask", "bands", "protocol"], columns="method", values="text")
    wide = wide.reindex(columns=list(METHODS)).astype(object).fillna("–").reset_index()
    wide["mask"] = pd.Categorical(wide["mask"], mask_order(wide["mask"]))
    wide = wide.sort_values(["mask", "protocol"]).astype({"mask": str}).rename(columns={"bands": "hidden bands"})
    return wide.rename_axis(columns=None).reset_index(drop=True)


def percent(mean: float, sd: float = float("nan")) -> str:
    """`84.2 ± 0.3` from shares."""
    return f"{100 * mean:.1f}" + ("" if np.isnan(sd) else f" ± {100 * sd:.1f}")


def mask_order(masks: Iterable[str]) -> list[str]:
    """Mask sets in the thesis' order, others after them by name."""
    found = set(masks)
    return [m for m in bands.THESIS_MASKS if m in found] + sorted(found - set(bands.THESIS_MASKS))


def thesis_tables() -> pd.DataFrame:
    """Every number of the thesis' Tables 4.1 to 4.4 and A.3 to A.6, tidy, by thesis labels (Petcu 2024)."""
    return pd.read_csv(Path(__file__).parent / "thesis_tables.csv", dtype={"table": str, "note": str})


def loss_beside_thesis(history: pd.DataFrame) -> pd.DataFrame:
    """Validation loss before and after fine-tuning, the thesis' last one beside it.

    The two are not comparable as figures (other data, encoder and image size); the order of masks is.
    """
    rows = []
    reference = thesis_tables().query("table in ('4.1', '4.2') and metric == 'val_loss'")
    for mask in mask_order(history["mask"]):
        ours = history[(history["mask"] == mask) & (history["metric"] == "val_loss")]
        if ours.empty:
            continue
        last = ours["epoch"].max()
        theirs = reference[reference["mask"] == mask].sort_values("epoch")["value"]
        rows.append(
            {
                "mask": mask,
                "hidden bands": ours["bands"].iloc[0],
                "pre-trained": ours[ours["epoch"] == 0]["value"].mean(),
                f"after {last} epochs": ours[ours["epoch"] == last]["value"].mean(),
                "thesis, last epoch": theirs.iloc[-1] if len(theirs) else float("nan"),
            }
        )
    return pd.DataFrame(rows)


def accuracy_beside_thesis(table: pd.DataFrame) -> pd.DataFrame:
    """Test accuracy in the thesis' protocol (%), its Table 4.3 beside ours."""
    rows = table[(table["metric"] == "overall_accuracy") & (table["split"] == "test")]
    rows = rows[rows["protocol"].isin(["thesis", "complete"])]
    reference = thesis_tables().query("table == '4.3'").set_index(["mask", "encoder"])["value"]
    out = []
    for mask in mask_order(rows["mask"]):
        line: dict[str, Any] = {"mask": mask}
        for method in METHODS:
            values = rows[(rows["mask"] == mask) & (rows["method"] == method)]["value"]
            line[method] = 100 * values.mean() if len(values) else float("nan")
        for method in ("pre-trained", "fine-tuned"):
            line[f"thesis {method}"] = reference.get((mask, method.replace("-", "")), float("nan"))
        out.append(line)
    return pd.DataFrame(out)


def plot_curves(table: pd.DataFrame, axes: Axes, *, by: str = "mask", ylabel: str = "", scale: float = 1.0) -> None:
    """Mean over runs against epoch, a line a group, shaded by one standard deviation (Figures 4.1 and 4.2)."""
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
    """`python -m bandmask.results outputs/sample`: print the table of an experiment, and where its report is."""
    import sys

    if len(sys.argv) != 2:
        sys.exit("usage: python -m bandmask.results outputs/<experiment>")
    folder = Path(sys.argv[1])
    table = pd.read_parquet(files.require(folder / "results.parquet", "notebooks/06_results.ipynb, or `make demo`"))
    print(f"\nOverall test accuracy (%), mean ± SD over runs. Encoder: {table['encoder'].iloc[0]}.")
    if set(table["dataset"]) == {"sample"}:
        print(
            "Labels are derived from spectral indices of the complete bands: they prove the pipeline, not land cover."
        )
    print("\n" + accuracy_table(table).to_markdown(index=False))
    report = folder / "06_results.html"
    print(f"\nReport: {report.resolve() if report.exists() else 'not made; notebooks/06_results.ipynb makes it'}")


if __name__ == "__main__":
    main()
