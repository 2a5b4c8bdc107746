"""The thesis' figures from collected results, each on axes of the caller's; a half-finished grid gives half a figure.

Source: Petcu 2024, Figures 4.1 to 4.4, B.1 and B.2.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from bandmask.comparison import first_experiment, select
from bandmask.results import MAKERS, plot_curves

if TYPE_CHECKING:
    from matplotlib.axes import Axes

CONTROL = "control: complete images"


def figure_4_1(
    results: pd.DataFrame, axes: Axes, *, single_band: bool = False, epochs: int = 15, scheme: str = "named"
) -> None:
    """Validation loss of the alignment against epoch, a line a mask set; epoch 0 is the pre-trained encoder.

    Args:
        results: collected rows of `alignment.parquet`, with others or without.
        axes: to draw on.
        single_band: the left figure, masks of one band and none; else the right one, all masks.
        epochs: the first ones are shown, because the decline is steepest there.
        scheme: how mask labels were read.
    """
    rows = first_experiment(select(results, scheme=scheme))
    rows = rows[(rows["task"] == "alignment") & (rows["metric"] == "val_loss") & (rows["epoch"] <= epochs)]
    if single_band:
        rows = rows[~rows["mask"].str.contains(" ")]
    _draw(rows, axes, "alignment", by="mask", ylabel="validation loss")


def figure_4_2(results: pd.DataFrame, axes: Axes, *, scheme: str = "named") -> None:
    """Validation accuracy of scene classification, mean over all masks and runs, pre-trained against fine-tuned.

    Only masks that have both methods count, so that both lines speak of the same images.
    """
    rows = _both(_curves(results, "classification", "overall_accuracy", scheme))
    _draw(rows, axes, "classification", by="method", ylabel="validation accuracy (%)", scale=100)


def figure_4_3(results: pd.DataFrame, axes: Axes, *, scheme: str = "named") -> None:
    """Validation overall accuracy of segmentation, mean over all masks and runs, beside complete images."""
    _segmentation(results, axes, "overall_accuracy", "validation accuracy (%)", scheme)


def figure_4_4(results: pd.DataFrame, axes: Axes, *, scheme: str = "named", metric: str = "miou_all") -> None:
    """Validation mIoU of segmentation, mean over all masks and runs, beside complete images."""
    _segmentation(results, axes, metric, "validation mIoU (%)", scheme)


def figure_b_1(labels: Iterable[int], classes: Sequence[str], axes: Axes) -> None:
    """Number of images per class, a bar a class.

    Args:
        labels: class index of each image, such as `pack.labels`.
        classes: their names, such as `pack.classes`.
        axes: to draw on.
    """
    counts = np.bincount(np.fromiter(labels, int), minlength=len(classes))
    bars = axes.barh(list(classes), counts, color="#4477aa")
    axes.bar_label(bars, padding=3)
    axes.margins(x=0.12)  # room for the numbers
    axes.invert_yaxis()
    axes.margins(x=0.12)  # room for the numbers
    axes.set_xlabel("images")


def figure_b_2(
    results: pd.DataFrame,
    axes: Axes,
    *,
    mask: str = "B8",
    start_ratio: float = 0.2,
    stairs: int = 4,
    scheme: str = "named",
) -> None:
    """Validation loss under each mask schedule; vertical lines show where the staircase rises.

    Args:
        results: collected rows of experiments with different schedules.
        axes: to draw on.
        mask: one mask set.
        start_ratio: where the staircase began.
        stairs: how many levels it had.
        scheme: how mask labels were read.
    """
    rows = select(results, scheme=scheme, ratio=None, schedule=None)
    rows = rows[(rows["task"] == "alignment") & (rows["metric"] == "val_loss") & (rows["mask"] == mask)]
    rows = rows.assign(schedule=rows["schedule"].fillna("constant"))
    final = np.where(rows["schedule"] == "constant", 0.9, 0.8)  # as Table A.5
    rows = first_experiment(rows[np.isclose(rows["ratio"].astype(float), final)])
    _draw(rows, axes, "alignment", by="schedule", ylabel=f"validation loss, {mask}")
    for epoch in rises(rows[rows["schedule"] == "staircase"], start_ratio, stairs):
        axes.axvline(epoch, color="grey", linestyle=":", linewidth=0.9)


def rises(rows: pd.DataFrame, start_ratio: float = 0.2, stairs: int = 4) -> list[int]:
    """Epochs after which the ratio of a staircase run is higher than before."""
    from bandmask.masking import MaskSpec

    if rows.empty:
        return []
    epochs = int(rows["epoch"].max())
    spec = MaskSpec((), float(rows["ratio"].iloc[0]), schedule="staircase", start_ratio=start_ratio, stairs=stairs)
    ratios = [spec.ratio_at(epoch, epochs) for epoch in range(epochs)]
    return [epoch for epoch in range(1, epochs) if ratios[epoch] > ratios[epoch - 1]]


def _segmentation(results: pd.DataFrame, axes: Axes, metric: str, ylabel: str, scheme: str) -> None:
    rows = _curves(results, "segmentation", metric, scheme)
    control = rows[(rows["mask"] == "none") & (rows["protocol"] == "complete")].assign(method=CONTROL)
    _draw(pd.concat([_both(rows), control]), axes, "segmentation", by="method", ylabel=ylabel, scale=100)


def _curves(results: pd.DataFrame, task: str, metric: str, scheme: str) -> pd.DataFrame:
    rows = first_experiment(select(results, scheme=scheme))
    return rows[(rows["task"] == task) & (rows["metric"] == metric) & (rows["split"] == "val")]


def _both(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows of heads trained on incomplete images, of masks that have both methods."""
    rows = rows[(rows["protocol"] == "retrained") & rows["method"].isin(["pre-trained", "fine-tuned"])]
    methods = rows.groupby("mask")["method"].transform("nunique")
    return rows[methods == 2].sort_values("method", ascending=False, kind="stable")  # pre-trained first


def _draw(rows: pd.DataFrame, axes: Axes, task: str, **options: Any) -> None:
    if rows.empty:
        missing = f"not there yet:\nnotebooks/{MAKERS[task]}.ipynb\nor `make run` makes it"
        axes.text(0.5, 0.5, missing, ha="center", va="center", transform=axes.transAxes)
        return
    plot_curves(rows, axes, **options)
