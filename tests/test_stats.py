"""Scores are the libraries', a draw is what gathering its images gives, and no interval is decided by luck."""

from __future__ import annotations

import itertools
import math
import warnings
from typing import Any

import numpy as np
import pandas as pd
import pytest
import scipy.stats
import torch
import torchmetrics.functional.classification as reference
from hypothesis import given, settings
from hypothesis import strategies as st
from predictions import joined, pixels_of, predictions_of
from sklearn import metrics

from bandmask import stats
from bandmask.stats import METRICS, drawn, interval, paired_differences, resample, scores, verdict

pytestmark = pytest.mark.filterwarnings("error")  # pandas announces its errors a version ahead
DRAWN = ("overall_accuracy", "macro_accuracy", "miou_present")  # what intervals are of


def confusion(table: pd.DataFrame, classes: int) -> torch.Tensor:
    counts = torch.zeros(classes, classes, dtype=torch.int64)
    for row in table.to_dict("records"):
        counts[row["label"], row["predicted"]] += row.get("pixels", 1)
    return counts


def paired(table: pd.DataFrame, first: str = "pre-trained", second: str = "fine-tuned", **options: Any) -> pd.DataFrame:
    return paired_differences(table, [(first, second)], **options)


@st.composite
def predictions(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Predicted, target and number of classes, of which some are usually absent."""
    classes = draw(st.integers(2, 8))
    pairs = draw(st.lists(st.tuples(st.integers(0, classes - 1), st.integers(0, classes - 1)), min_size=1, max_size=60))
    predicted, target = torch.tensor(pairs).T
    return predicted, target, classes


@settings(max_examples=60)
@given(predictions())
def test_scores_are_scikit_learns_and_torchmetrics(case: tuple[torch.Tensor, torch.Tensor, int]):
    predicted, target, classes = case
    counts = reference.multiclass_confusion_matrix(predicted, target, classes)
    found = scores(counts, [*map(str, range(classes))])
    jaccard = metrics.jaccard_score(target, predicted, labels=range(classes), average=None, zero_division=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scikit-learn warns of classes that are only predicted
        accuracies = [f(target, predicted) for f in (metrics.accuracy_score, metrics.balanced_accuracy_score)]
    iou = reference.multiclass_jaccard_index(predicted, target, classes, average="none").tolist()
    expected = [*accuracies, jaccard.mean(), jaccard[np.unique(target)].mean(), *iou]
    assert [0 if math.isnan(value) else value for value in found.values()] == pytest.approx(expected)
    assert [*found] == [*METRICS, *(f"iou {number}" for number in range(classes))]


def test_nothing_is_nan_not_zero_and_large_counts_are_exact():
    empty = torch.zeros(4, 4, dtype=torch.int64)
    assert all(math.isnan(value) for value in scores(empty, "abcd").values())
    assert scores(torch.tensor([[2**40 + 1, 0], [1, 2**40]]))["overall_accuracy"] == (2**41 + 1) / (2**41 + 2)


@pytest.mark.parametrize("metric", DRAWN)
@pytest.mark.parametrize("kind", ["images", "pixels"])
def test_every_draw_is_what_gathering_the_drawn_groups_gives(metric: str, kind: str, monkeypatch: pytest.MonkeyPatch):
    """The reference draws groups and runs from the same stream, gathers their rows, and scores them one by one.

    Draws are made in chunks to save memory; a chunk's edge must leave no trace.
    """
    monkeypatch.setattr(stats, "_CHUNK", 5)
    if kind == "images":
        table = predictions_of(np.random.default_rng(0).random((3, 15)) < 0.6, "ridge").assign(
            group=lambda t: t["sample"]
        )
    else:
        table = pixels_of("ridge", 0.6, runs=3, images=9, groups=4)
    classes, draws = 5, 12  # more classes than occur
    found = resample({("ridge", "B8"): table}, metric=metric, draws=draws, seed=3)["ridge", "B8"]
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
            scores(sum(parts[run, g] * int(n) for g, n in zip(groups, drawn[draw], strict=True)))[metric]  # type: ignore[arg-type]
            for run in range(3)
        ]
        assert found.draws[draw] == pytest.approx(np.dot(runs[draw], of_runs) / 3, abs=1e-12)
    whole = [scores(confusion(table[table["head_seed"] == run], classes))[metric] for run in range(3)]
    assert found.value == pytest.approx(np.mean(whole), abs=1e-12)
    assert (found.images, found.groups, found.runs) == (table["sample"].nunique(), len(groups), 3)


def test_one_image_that_is_right_and_what_can_not_be_scored():
    side = {("ridge", "B8"): predictions_of(np.ones((1, 1), bool), "ridge", classes=1)}
    for metric in DRAWN:
        found = resample(side, metric=metric, draws=5)["ridge", "B8"]
        assert found.value == 1
        assert np.isnan(found.draws).all(), "of one group every draw is the same: no interval, and nothing is decided"
    with pytest.raises(ValueError, match=r"unknown metric 'miou_all'; available: overall_accuracy, .*miou_present"):
        resample(side, metric="miou_all")
    assert resample({}) == {}


def test_the_interval_of_a_mean_is_scipys_and_a_verdict_follows_it():
    values = np.random.default_rng(1).normal(0.8, 0.05, 30)
    options: dict[str, Any] = {"n_resamples": 5000, "method": "percentile", "rng": 0}
    expected = scipy.stats.bootstrap((values,), np.mean, **options).confidence_interval
    spread = drawn(np.random.default_rng(0), 30, 5000) @ values / 30
    assert interval(spread) == pytest.approx(tuple(expected), abs=0.002)
    assert (verdict(0.1, 0.2), verdict(-0.2, -0.1)) == ("higher", "lower")
    undecided = [(-0.1, 0.1), (0.0, 0.1), (-0.1, 0.0), (math.nan, math.nan)]
    assert {verdict(*ends) for ends in undecided} == {"not decided"}


def two_masks() -> pd.DataFrame:
    draw = np.random.default_rng(7)
    parts = [
        predictions_of(draw.random((3, 70)) < chance, method, mask=mask, encoder_seed=seed, protocol=protocol)
        for mask, protocol in (("B8", "retrained"), ("B8", "kept"), ("B2", "retrained"))
        for method, seed, chance in (("pre-trained", None, 0.6), ("fine-tuned", 0, 0.7), ("fine-tuned", 1, 0.8))
    ]
    return joined(*parts)


def test_equal_methods_do_not_differ_and_runs_that_differ_widen_the_interval():
    """The same predictions twice, but heads that disagree: which runs one happened to train is luck too."""
    draw = np.random.default_rng(3)
    alike = np.tile(draw.random(90) < 0.7, (2, 1))
    table = pd.concat([predictions_of(alike, "pre-trained"), predictions_of(alike, "ridge")])
    for metric in DRAWN:
        row = paired(table, "pre-trained", "ridge", metric=metric).iloc[0]
        assert (row["difference"], row["low"], row["high"]) == pytest.approx((0, 0, 0), abs=1e-12)
    with pytest.raises(ValueError, match="against itself"):
        paired(table, "ridge", "ridge")
    right = draw.random((3, 90)) < np.array([[0.5], [0.7], [0.9]])
    table = pd.concat([predictions_of(right, "pre-trained"), predictions_of(right, "ridge")])
    row = paired(table, "pre-trained", "ridge").iloc[0]
    assert row["difference"] == pytest.approx(0)
    assert row["low"] < -0.05 < 0.05 < row["high"]


def test_interval_covers_the_true_difference_as_often_as_it_says():
    """80 experiments with a known truth; 95 % intervals of 150 images must not be for show."""
    draw = np.random.default_rng(5)
    covered = 0
    for _ in range(80):
        hard = draw.random(150)
        before = hard + draw.normal(0, 0.2, 150) < 0.6
        after = hard + draw.normal(0, 0.2, 150) - 0.1 < 0.6
        table = pd.concat([predictions_of(before, "a"), predictions_of(after, "b")])
        row = paired(table, "a", "b", draws=400).iloc[0]
        covered += row["low"] <= 0.1 <= row["high"]  # 0.1: the threshold moves by a tenth of a uniform scale
    assert 68 <= covered < 80  # 76 expected; always would mean too wide


def test_difference_depends_on_images_not_on_the_order_of_rows():
    for table in (two_masks(), pd.concat([pixels_of("pre-trained", 0.5), pixels_of("fine-tuned", 0.8, seed=1)])):
        table = table[table["protocol"] == "retrained"].reset_index(drop=True)
        expected = paired(table, metric="miou_present")
        shuffled = pd.concat([part.sample(frac=1, random_state=0) for _, part in table.groupby("mask", sort=False)])
        found = paired(shuffled, metric="miou_present")
        pd.testing.assert_frame_equal(found, expected)


def test_pixels_of_a_group_summed_give_the_same_differences_of_as_many_images():
    table = pd.concat([pixels_of("pre-trained", 0.5), pixels_of("fine-tuned", 0.8, seed=1)], ignore_index=True)
    small = stats.by_group(table)
    assert small["pixels"].sum() == table["pixels"].sum()
    assert len(small) < len(table) / 2
    for metric in DRAWN:
        whole = paired(table, metric=metric)
        pd.testing.assert_frame_equal(paired(small, metric=metric), whole)
    assert (whole["images"].item(), whole["groups"].item()) == (12, 4)


def test_a_row_a_mask_and_protocol_and_none_where_a_method_is_missing():
    right = np.arange(40) < 30
    table = joined(
        predictions_of(right, "pre-trained"),
        predictions_of(right, "fine-tuned"),
        predictions_of(right, "pre-trained", protocol="kept"),
        predictions_of(~right, "fine-tuned", protocol="kept"),
        predictions_of(right, "pre-trained", mask="none", protocol="complete"),
    )
    found = paired(table)
    assert found["protocol"].tolist() == ["retrained", "kept"]
    assert found["difference"].tolist() == pytest.approx([0, -0.5])
    empty = paired(table, "pre-trained", "ridge")
    assert len(empty) == 0
    assert list(empty.columns) == list(found.columns)


def test_what_did_not_see_the_same_images_can_not_be_paired():
    """Pairing them by position would be wrong in silence."""
    right = np.arange(40) < 30
    one, both = predictions_of(right, "fine-tuned"), predictions_of([right, right], "pre-trained")
    own = both.assign(group=both["sample"])
    others = r"pre-trained.*B8.*fine-tuned.*same images and labels; run both anew"
    for tables, said in (
        ([both, one.assign(sample=one["sample"] + 1)], others),  # as many images
        ([both, one.iloc[:-5]], others),
        ([both, one.assign(label=(one["label"] + 1) % 4)], others),
        ([own, one.assign(group=0)], others),
        ([one, both.iloc[:-1]], r"pre-trained.*same images"),
        ([one, both, both], "an image twice; compare one experiment at a time"),
        ([one.assign(group=0), both.assign(group=np.arange(80) % 7)], "in two groups"),
        ([one.assign(group=0), both.assign(group=[None, *range(79)])], "have no group"),
    ):
        with pytest.raises(ValueError, match=said):
            paired(pd.concat(tables))


def test_the_mean_over_masks_gives_all_masks_the_same_images():
    """Two masks with the same predictions: their mean is no more certain than either."""
    one = two_masks().query("mask == 'B8' and protocol == 'retrained'")
    table = pd.concat([one, one.assign(mask="B2")])
    alone = paired(one).iloc[0]
    mean = paired(table, average=True)
    assert mean["mask"].tolist() == ["mean of 2"]
    columns = ["difference", "low", "high"]
    assert mean.iloc[0][columns].tolist() == pytest.approx(alone[columns].tolist())
    by_mask = paired(two_masks())
    means = paired(two_masks(), average=True)
    expected = by_mask.groupby("protocol")["difference"].mean()
    assert means.set_index("protocol")["difference"].to_dict() == pytest.approx(expected.to_dict())


def test_complete_runs_are_taken_once():
    """Each mask's run predicts the complete images too, for its own report."""
    right = np.arange(40) < 30
    complete = predictions_of(right, "pre-trained", protocol="complete")
    table = pd.concat([complete.assign(mask=mask) for mask in ("B8", "none", "B2")])
    assert stats.complete_runs(table)["mask"].unique().tolist() == ["none"]
    assert stats.complete_runs(table[table["mask"] != "none"])["mask"].unique().tolist() == ["B8"]
    assert len(stats.complete_runs(predictions_of(right, "pre-trained"))) == 0
