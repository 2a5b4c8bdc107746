"""The thesis' figures show what was measured, of masks that can be compared, and say what is not there yet."""

from __future__ import annotations

from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from predictions import curve, history, rows

from bandmask.report.figures import (
    CONTROL,
    figure_4_1,
    figure_4_2,
    figure_4_3,
    figure_4_4,
    figure_b_1,
    figure_b_2,
    rises,
)

mpl.use("Agg")
import matplotlib.pyplot as plt

pytestmark = pytest.mark.filterwarnings("error")


@pytest.fixture
def axes() -> Any:
    figure, axis = plt.subplots()
    yield axis
    plt.close(figure)


def labels(axes: Any) -> list[str]:
    return [line.get_label() for line in axes.lines]


def test_losses_of_single_bands_and_of_all_in_the_thesis_order(axes: Any):
    table = pd.concat(
        [
            history("B2 B3 B4", [3.0] * 26),
            history("B8", [2.0] * 16),
            history("none", [1.0] * 16, scheme="position"),
            history("B8", [9.0] * 16, ratio=1.0, experiment="ratio-1.0"),
            history("B8", [9.0] * 16, metric="train_loss"),
        ]
    )
    figure_4_1(table, axes, single_band=True)
    assert labels(axes) == ["none", "B8"]
    figure_4_1(table, axes.figure.add_subplot())
    everything = axes.figure.axes[-1]
    assert labels(everything) == ["none", "B8", "B2 B3 B4"]
    assert everything.lines[2].get_xdata().tolist() == list(range(16))  # the first 15 epochs, and 0
    assert everything.lines[1].get_ydata().max() < 3
    assert everything.get_ylabel() == "validation loss"


def test_accuracy_is_averaged_over_masks_that_have_both_methods(axes: Any):
    table = pd.concat(
        [
            curve("B8", [0.1, 0.5], method="pre-trained"),
            curve("B8", [0.1, 0.8], method="fine-tuned"),
            curve("B2", [0.1, 0.7], method="pre-trained"),
            curve("B2", [0.1, 0.9], method="fine-tuned"),
            curve("B11", [0.1, 0.0], method="pre-trained"),  # not fine-tuned yet
            curve("B8", [0.1, 0.0], method="ridge"),
            curve("B8", [0.1, 0.0], method="fine-tuned", protocol="kept"),
        ]
    )
    figure_4_2(table, axes)
    assert labels(axes) == ["pre-trained", "fine-tuned"]
    assert [line.get_ydata()[1] for line in axes.lines] == pytest.approx([61, 86])  # heads are 0, 1 and 2 points better
    spread = np.std([0.5, 0.51, 0.52, 0.7, 0.71, 0.72], ddof=1)
    heights = axes.collections[0].get_paths()[0].vertices
    assert heights[heights[:, 0] == 1, 1].max() == pytest.approx(61 + 100 * spread)


def test_segmentation_stands_beside_complete_images(axes: Any):
    parts = []
    for metric, level in (("overall_accuracy", 0.5), ("miou_all", 0.3), ("miou_present", 0.4)):
        task = {"task": "segmentation", "metric": metric}
        parts += [
            curve("B8", [0.1, level], method="pre-trained", **task),
            curve("B8", [0.1, level + 0.1], method="fine-tuned", **task),
            curve("none", [0.1, level + 0.2], method="pre-trained", protocol="complete", **task),
        ]
    table = pd.concat(parts)
    figure_4_3(table, axes)
    assert labels(axes) == ["pre-trained", "fine-tuned", CONTROL]
    assert [line.get_ydata()[1] for line in axes.lines] == pytest.approx([51, 61, 71])
    for metric, level in (("miou_all", 30), ("miou_present", 40)):
        other = axes.figure.add_subplot()
        figure_4_4(table, other, metric=metric)
        assert [line.get_ydata()[1] for line in other.lines] == pytest.approx([level + 1, level + 11, level + 21])
        assert "mIoU" in other.get_ylabel()


@pytest.mark.parametrize(
    ("figure", "notebook"),
    [
        (figure_4_1, "03_fine_tuning"),
        (figure_4_2, "04_scene_classification"),
        (figure_4_3, "05_image_segmentation"),
        (figure_4_4, "05_image_segmentation"),
        (figure_b_2, "03_fine_tuning"),
    ],
)
def test_a_figure_of_nothing_says_what_makes_it(figure: Any, notebook: str, axes: Any):
    figure(rows([0.5]), axes)
    assert len(axes.lines) == 0
    assert notebook in axes.texts[0].get_text()


def test_classes_are_counted(axes: Any):
    figure_b_1(np.array([0, 0, 2, 0]), ["forest", "never", "river"], axes)
    assert [bar.get_width() for bar in axes.patches] == [3, 0, 1]
    assert [text.get_text() for text in axes.get_yticklabels()] == ["forest", "never", "river"]
    assert [text.get_text() for text in axes.texts] == ["3", "0", "1"]


def test_schedules_with_a_line_where_the_staircase_rises(axes: Any):
    table = pd.concat(
        [
            history("B8", [2.0] * 16),
            history("B8", [1.0] * 16, schedule="gradual", ratio=0.8, experiment="gradual"),
            history("B8", [0.5] * 16, schedule="staircase", ratio=0.8, experiment="staircase"),
            history("B2", [9.0] * 16),
            history("B8", [9.0] * 16, ratio=1.0, experiment="ratio-1.0"),
        ]
    )
    figure_b_2(table, axes)
    assert labels(axes)[:3] == ["constant", "gradual", "staircase"]
    assert [line.get_ydata()[0] for line in axes.lines[:3]] == pytest.approx([2.01, 1.01, 0.51])
    # 15 epochs in four levels: epochs 1-4, 5-8, 9-12 and 13-15 (counted from 1) have 0.2, 0.4, 0.6 and 0.8
    assert [line.get_xdata()[0] for line in axes.lines[3:]] == [4, 8, 12]


def test_the_staircase_rises_where_its_ratio_does():
    from bandmask.masking import MaskSpec

    run = history("B8", [1.0] * 11, schedule="staircase", ratio=0.8)
    spec = MaskSpec((), 0.8, schedule="staircase", stairs=3)
    ratios = [spec.ratio_at(epoch, 10) for epoch in range(10)]
    assert rises(run, stairs=3) == [e for e in range(1, 10) if ratios[e] != ratios[e - 1]]
    assert len(rises(run, stairs=3)) == 2
    assert rises(run.iloc[:0]) == []
