"""A score in a draw is what the metrics say of the images that were drawn: all intervals stand on it."""

from __future__ import annotations

import itertools

import numpy as np
import pandas as pd
import pytest
import sklearn.metrics
import torch
from predictions import pixels_of, predictions_of

from bandmask import metrics
from bandmask.resampling import METRICS, resample

pytestmark = pytest.mark.filterwarnings("error")


def confusion(table: pd.DataFrame, classes: int) -> torch.Tensor:
    counts = torch.zeros(classes, classes, dtype=torch.int64)
    for row in table.to_dict("records"):
        counts[row["label"], row["predicted"]] += row.get("pixels", 1)
    return counts


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("kind", ["images", "pixels"])
def test_every_draw_is_what_gathering_the_drawn_groups_gives(metric: str, kind: str):
    """The reference draws groups and runs from the same stream, gathers their rows, and asks bandmask.metrics."""
    if kind == "images":
        table = predictions_of(np.random.default_rng(0).random((3, 15)) < 0.6, "ridge").assign(
            group=lambda t: t["sample"]
        )
    else:
        table = pixels_of("ridge", 0.6, runs=3, images=9, groups=4)
    classes, draws = 5, 12  # more classes than occur: miou_all must count them
    found = resample({("ridge", "B8"): table}, metric=metric, classes=classes, draws=draws, seed=3)["ridge", "B8"]
    stream = np.random.default_rng(3)
    groups = sorted(table["group"].unique())
    drawn = stream.multinomial(len(groups), np.full(len(groups), 1 / len(groups)), size=draws)
    runs = stream.multinomial(3, np.full(3, 1 / 3), size=draws)
    parts = {
        (run, group): confusion(table[(table["head_seed"] == run) & (table["group"] == group)], classes)
        for run, group in itertools.product(range(3), groups)
    }
    for draw in range(draws):
        of_runs = [
            metrics.scores(sum(parts[run, g] * int(n) for g, n in zip(groups, drawn[draw], strict=True)))[metric]
            for run in range(3)
        ]
        assert found.draws[draw] == pytest.approx(np.dot(runs[draw], of_runs) / 3, abs=1e-12)
    whole = [metrics.scores(confusion(table[table["head_seed"] == run], classes))[metric] for run in range(3)]
    assert found.value == pytest.approx(np.mean(whole), abs=1e-12)
    assert (found.images, found.groups, found.runs) == (table["sample"].nunique(), len(groups), 3)


def test_scores_are_scikit_learns():
    table = predictions_of(np.random.default_rng(0).random((2, 80)) < 0.6, "ridge")
    side = {("ridge", "B8"): table}
    of_runs = [group for _, group in table.groupby("head_seed")]
    references = {
        "overall_accuracy": sklearn.metrics.accuracy_score,
        "macro_accuracy": sklearn.metrics.balanced_accuracy_score,
        "miou_present": lambda label, predicted: sklearn.metrics.jaccard_score(label, predicted, average="macro"),
    }
    for metric, reference in references.items():
        expected = np.mean([reference(run["label"], run["predicted"]) for run in of_runs])
        assert resample(side, metric=metric, draws=2)["ridge", "B8"].value == pytest.approx(expected)


def test_one_image_and_one_run_that_is_all_right():
    side = {("ridge", "B8"): predictions_of(np.ones((1, 1), bool), "ridge", classes=1)}
    for metric in METRICS:
        found = resample(side, metric=metric, draws=5)["ridge", "B8"]
        assert found.value == 1
        assert (found.draws == 1).all()


def test_many_draws_are_those_of_one_piece():
    """Draws are made in chunks to save memory; a chunk's edge must leave no trace."""
    side = {("ridge", "B8"): predictions_of(np.random.default_rng(0).random((3, 40)) < 0.6, "ridge")}
    found = resample(side, draws=700, seed=1)["ridge", "B8"].draws
    stream = np.random.default_rng(1)
    images = stream.multinomial(40, np.full(40, 1 / 40), size=700)
    runs = stream.multinomial(3, np.full(3, 1 / 3), size=700)
    table = side["ridge", "B8"]
    right = (table["label"] == table["predicted"]).to_numpy(float).reshape(3, 40)
    np.testing.assert_allclose(found, ((runs @ right / 3) * images).sum(1) / 40, atol=1e-12)


def test_an_unknown_metric_or_class_is_an_error_that_lists_what_there_is():
    side = {("ridge", "B8"): predictions_of(np.ones((1, 9), bool), "ridge")}
    with pytest.raises(ValueError, match=r"unknown metric 'iou'; available: overall_accuracy, .*miou_present"):
        resample(side, metric="iou")
    with pytest.raises(ValueError, match=r"class 3 occurs .* 2 classes"):
        resample(side, classes=2)
    assert resample({}) == {}
