"""Intervals that hold, pairs by image, scores in every draw as the metrics define them: nothing is decided by luck."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st
from predictions import COMMON, pixels_of, predictions_of, rows

from bandmask.comparison import (
    bootstrap_interval,
    by_group,
    complete_runs,
    difference_of_runs,
    first_experiment,
    paired_difference,
    select,
    summarise,
    verdict,
)
from bandmask.resampling import METRICS

pytestmark = pytest.mark.filterwarnings("error")  # pandas announces its errors a version ahead


# --- which rows may be averaged -------------------------------------------------------------------------------------


def test_selection_keeps_one_setting_and_the_complete_reference():
    table = pd.concat(
        [
            rows([0.1], mask="B8"),
            rows([0.2], mask="B8", ratio=1.0),
            rows([0.3], mask="B8", schedule="gradual"),
            rows([0.4], mask="B8", scheme="position"),
            rows([0.5], mask="B8", mask_value="-1"),
            rows([0.6], mask="none", ratio=0.5, scheme="position", mask_value="0"),
            rows([0.7], mask="B2", schedule=None, shape=None),  # written before schedules and shapes were kept
            rows([0.8], mask="B8", shape="stripe"),
        ],
        ignore_index=True,
    )
    assert select(table)["value"].tolist() == [0.1, 0.6, 0.7]
    assert select(table, ratio=None)["value"].tolist() == [0.1, 0.2, 0.6, 0.7]
    assert select(table, schedule="gradual")["value"].tolist() == [0.3, 0.6]
    assert select(table, shape="stripe")["value"].tolist() == [0.6, 0.8]
    assert select(table, scheme="position")["value"].tolist() == [0.4, 0.6]
    assert select(table, mask_value=None)["value"].tolist() == [0.1, 0.5, 0.6, 0.7]


@pytest.mark.parametrize("column", ["encoder", "dataset"])
def test_several_encoders_or_data_sets_of_a_task_are_an_error_with_a_way_out(column: str):
    table = pd.concat([rows([0.1]), rows([0.2], **{column: "another"})])
    with pytest.raises(ValueError, match=rf"classification results are of several {column}s: .*another.*table\["):
        select(table)
    tasks = pd.concat([rows([0.1]), rows([0.2], task="segmentation", dataset="another")])
    assert len(select(tasks)) == 2  # each task may have its own


def test_the_same_runs_of_two_experiments_count_once():
    table = pd.concat(
        [
            rows([0.1, 0.2], experiment="one"),
            rows([0.3], experiment="two"),
            rows([0.4], experiment="two", mask="B2"),
            rows([0.5], experiment="one", mask="none", ratio=0.9),
            rows([0.6], experiment="two", mask="none", ratio=0.8, schedule="gradual"),
            rows([0.7], experiment="two", ratio=0.8),
        ],
        ignore_index=True,
    )
    assert first_experiment(table)["value"].tolist() == [0.1, 0.2, 0.4, 0.5, 0.7]


# --- summaries ------------------------------------------------------------------------------------------------------


def test_summary_is_numpys_mean_and_sd_a_group():
    values = {"pre-trained": [0.70, 0.72, 0.75], "fine-tuned": [0.90, 0.91], "ridge": [0.8]}
    table = pd.concat([rows(v, method=m) for m, v in values.items()], ignore_index=True)
    found = summarise(table).set_index("method")
    assert found.index.tolist() == list(values)
    for method, group in values.items():
        row = found.loc[method]
        assert row["mean"] == pytest.approx(np.mean(group))
        assert row["runs"] == len(group)
        described = (row["mask"], row["scheme"], row["protocol"], row["metric"])
        assert described == ("B8", "named", "retrained", COMMON["metric"])
        assert min(group) - 1e-12 <= row["low"] <= row["mean"] <= row["high"] <= max(group) + 1e-12
        assert (row["low"], row["high"]) == bootstrap_interval(group)
    assert found.loc["pre-trained", "sd"] == pytest.approx(np.std(values["pre-trained"], ddof=1))
    assert np.isnan(found.loc["ridge", "sd"])  # one run has no spread; zero would be a claim


def test_summary_never_averages_over_tasks_splits_or_epochs():
    table = pd.concat(
        [
            rows([0.1, 0.2]),
            rows([0.3, 0.4], split="val", epoch=1),
            rows([0.5, 0.6], split="val", epoch=2),
            rows([0.7, 0.8], task="segmentation"),
            rows([0.9, 1.0], schedule="gradual"),
        ],
        ignore_index=True,
    )
    found = summarise(table)
    assert found["mean"].tolist() == pytest.approx([0.15, 0.35, 0.55, 0.75, 0.95])
    assert found["runs"].tolist() == [2] * 5
    assert found["epoch"].tolist()[1:3] == [1, 2]


def test_summary_keeps_groups_whose_key_is_missing():
    table = pd.concat([rows([0.5], protocol=None), rows([0.7])], ignore_index=True)
    assert sorted(summarise(table)["mean"]) == [0.5, 0.7]


def test_summary_by_one_column_and_of_nothing():
    table = pd.concat([rows([0.1, 0.3], mask="B2"), rows([0.5, 0.7], mask="B8")], ignore_index=True)
    found = summarise(table, by=["mask"])
    assert found["mask"].tolist() == ["B2", "B8"]
    assert found["mean"].tolist() == pytest.approx([0.2, 0.6])
    assert list(summarise(table.iloc[:0], by=["mask"]).columns) == list(found.columns)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_interval_holds_the_mean_and_stays_within_the_runs(values: list[float]):
    low, high = bootstrap_interval(values)
    assert min(values) - 1e-12 <= low <= high <= max(values) + 1e-12
    if len(values) <= 3:  # of so few, each run alone is drawn often enough to be an end
        assert (low, high) == pytest.approx((min(values), max(values)))
    assert low <= np.mean(values) + 1e-12
    assert high >= np.mean(values) - 1e-12
    assert bootstrap_interval(values) == (low, high)


def test_interval_is_the_normal_one_for_many_runs():
    values = np.random.default_rng(0).normal(0.8, 0.05, 400)
    low, high = bootstrap_interval(values, draws=4000)
    half = 1.96 * values.std(ddof=1) / 20
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.0006)
    narrow = bootstrap_interval(values, level=0.5)
    assert low < narrow[0] < narrow[1] < high
    assert bootstrap_interval(values, seed=1) != bootstrap_interval(values)


def test_interval_is_scipys():
    values = np.random.default_rng(1).normal(0.8, 0.05, 30)
    found = scipy.stats.bootstrap((values,), np.mean, n_resamples=5000, method="percentile", rng=0)
    assert bootstrap_interval(values, draws=5000) == pytest.approx(tuple(found.confidence_interval), abs=0.002)


def test_difference_of_runs_is_scipys_for_two_samples():
    draw = np.random.default_rng(2)
    after, before = pd.Series(draw.normal(0.8, 0.05, 20)), pd.Series(draw.normal(0.7, 0.05, 25))
    figure, low, high = difference_of_runs([after], [before], draws=5000)
    found = scipy.stats.bootstrap(
        (after, before),
        lambda a, b: a.mean() - b.mean(),
        n_resamples=5000,
        method="percentile",
        vectorized=False,
        rng=0,
    )
    assert figure == pytest.approx(after.mean() - before.mean())
    assert (low, high) == pytest.approx(tuple(found.confidence_interval), abs=0.003)


def test_masks_with_the_same_runs_are_given_the_same_draws():
    """What a seed does to all masks alike must not average out; what cancels between them must."""
    seeds = pd.Series([0.1, 0.2, 0.3])
    same = difference_of_runs([seeds, seeds])
    assert same == pytest.approx(difference_of_runs([seeds]))
    figure, low, high = difference_of_runs([seeds, 0.4 - seeds])
    assert (figure, low, high) == pytest.approx((0.2, 0.2, 0.2))
    apart = difference_of_runs([seeds, seeds.set_axis([7, 8, 9])])  # other runs, drawn for themselves
    assert apart[2] - apart[1] < same[2] - same[1]


def test_verdicts_follow_the_interval():
    assert verdict(0.1, 0.2) == "higher"
    assert verdict(-0.2, -0.1) == "lower"
    assert {verdict(-0.1, 0.1), verdict(0.0, 0.1), verdict(-0.1, 0.0), verdict(float("nan"), float("nan"))} == {
        "not decided"
    }


# --- differences on the same images ---------------------------------------------------------------------------------


def by_pivot(predictions: pd.DataFrame, first: str, second: str, draws: int = 2000) -> pd.DataFrame:
    """How differences were computed while there were images only, kept as a reference."""
    draw = np.random.default_rng(0)
    out = []
    for _, group in predictions.groupby(["mask", "scheme", "protocol"], sort=False):
        right = group.assign(right=group["predicted"] == group["label"], encoder_seed=group["encoder_seed"].fillna(-1))
        wide = [
            right[right["method"] == method].pivot_table(
                index=["encoder_seed", "head_seed"], columns="sample", values="right", aggfunc="first"
            )
            for method in (first, second)
        ]
        before, after = (matrix.to_numpy(float) for matrix in wide)
        count = before.shape[1]
        images = draw.multinomial(count, np.full(count, 1 / count), size=draws) / count
        lines = [
            draw.multinomial(len(m), np.full(len(m), 1 / len(m)), size=draws) @ m / len(m) for m in (before, after)
        ]
        spread = (images * (lines[1] - lines[0])).sum(1)
        low, high = np.quantile(spread, [0.025, 0.975])
        out.append({"difference": after.mean() - before.mean(), "low": low, "high": high, "images": count})
    return pd.DataFrame(out)


def two_masks() -> pd.DataFrame:
    draw = np.random.default_rng(7)
    return pd.concat(
        [
            predictions_of(draw.random((3, 70)) < chance, method, mask=mask, encoder_seed=seed, protocol=protocol)
            for mask, protocol in (("B8", "retrained"), ("B8", "kept"), ("B2", "retrained"))
            for method, seed, chance in (("pre-trained", None, 0.6), ("fine-tuned", 0, 0.7), ("fine-tuned", 1, 0.8))
        ],
        ignore_index=True,
    )


def test_accuracies_have_the_same_differences_and_intervals_as_ever():
    table = two_masks()
    found = paired_difference(table, "pre-trained", "fine-tuned")
    expected = by_pivot(table, "pre-trained", "fine-tuned")
    pd.testing.assert_frame_equal(found[list(expected.columns)], expected, check_exact=False, rtol=1e-12, atol=1e-14)


def test_difference_of_constructed_predictions():
    before = np.arange(100) < 60
    after = np.arange(100) < 75
    table = pd.concat([predictions_of(before, "pre-trained"), predictions_of(after, "fine-tuned", encoder_seed=0)])
    found = paired_difference(table, "pre-trained", "fine-tuned")
    assert len(found) == 1
    row = found.iloc[0]
    assert (row["mask"], row["scheme"], row["protocol"], row["images"]) == ("B8", "named", "retrained", 100)
    assert (row["groups"], row["runs"]) == (100, 1)
    assert row["difference"] == pytest.approx(0.15)
    # fifteen images of a hundred decide: the share of a binomial draw
    half = 1.96 * np.sqrt(0.15 * 0.85 / 100)
    assert (row["low"], row["high"]) == pytest.approx((0.15 - half, 0.15 + half), abs=0.015)
    turned = paired_difference(table, "fine-tuned", "pre-trained").iloc[0]
    assert turned["difference"] == pytest.approx(-0.15)


def test_difference_is_over_all_runs_of_each_method():
    """Three heads on one pre-trained encoder against two encoders with three heads each."""
    draw = np.random.default_rng(2)
    before, first, second = draw.random((3, 80)) < 0.5, draw.random((3, 80)) < 0.7, draw.random((3, 80)) < 0.9
    table = pd.concat(
        [
            predictions_of(before, "pre-trained"),
            predictions_of(first, "fine-tuned", encoder_seed=0),
            predictions_of(second, "fine-tuned", encoder_seed=1),
        ]
    )
    row = paired_difference(table, "pre-trained", "fine-tuned").iloc[0]
    assert row["difference"] == pytest.approx((first.mean() + second.mean()) / 2 - before.mean())
    assert row["low"] < row["difference"] < row["high"]
    assert row["runs"] == 3


def test_equal_methods_do_not_differ():
    right = np.random.default_rng(0).random(90) < 0.7
    table = pd.concat([predictions_of([right, right], "pre-trained"), predictions_of([right, right], "ridge")])
    for metric in METRICS:
        row = paired_difference(table, "pre-trained", "ridge", metric=metric).iloc[0]
        assert (row["difference"], row["low"], row["high"]) == pytest.approx((0, 0, 0), abs=1e-12)
    with pytest.raises(ValueError, match="against itself"):
        paired_difference(table, "ridge", "ridge")


def test_runs_that_differ_widen_the_interval():
    """The same predictions twice, but heads that disagree: which runs one happened to train is luck too."""
    draw = np.random.default_rng(3)
    right = draw.random((3, 90)) < np.array([[0.5], [0.7], [0.9]])
    table = pd.concat([predictions_of(right, "pre-trained"), predictions_of(right, "ridge")])
    row = paired_difference(table, "pre-trained", "ridge").iloc[0]
    assert row["difference"] == pytest.approx(0)
    assert row["low"] < -0.05
    assert row["high"] > 0.05


def test_pairs_are_narrower_than_two_separate_draws():
    """Two methods that fail on the same hard images: resampled in pairs, a small gain stands out."""
    draw = np.random.default_rng(4)
    hard = draw.random(200)
    before, after = hard < 0.70, hard < 0.74
    row = paired_difference(
        pd.concat([predictions_of(before, "pre-trained"), predictions_of(after, "fine-tuned")]),
        "pre-trained",
        "fine-tuned",
    ).iloc[0]
    resampled = [m[draw.integers(200, size=(2000, 200))].mean(1) for m in (before, after)]
    apart = np.subtract(*np.quantile(resampled[1] - resampled[0], [0.975, 0.025]))
    assert row["high"] - row["low"] < 0.5 * apart
    assert row["low"] > 0


def test_interval_covers_the_true_difference_as_often_as_it_says():
    """80 experiments with a known truth; 95 % intervals of 150 images must not be for show."""
    draw = np.random.default_rng(5)
    covered = 0
    for _ in range(80):
        hard = draw.random(150)
        before = hard + draw.normal(0, 0.2, 150) < 0.6
        after = hard + draw.normal(0, 0.2, 150) - 0.1 < 0.6
        table = pd.concat([predictions_of(before, "a"), predictions_of(after, "b")])
        row = paired_difference(table, "a", "b", draws=400, seed=int(draw.integers(1000))).iloc[0]
        covered += row["low"] <= 0.1 <= row["high"]  # 0.1: the threshold moves by a tenth of a uniform scale
    assert 68 <= covered < 80  # 76 expected; always would mean too wide


def test_images_of_one_scene_are_not_independent():
    """Ten images of each scene agree entirely: there are ten scenes' worth of evidence, not a hundred images'."""
    scenes = np.random.default_rng(6).random(10)
    before, after = np.repeat(scenes < 0.5, 10), np.repeat(scenes < 0.8, 10)
    table = pd.concat([predictions_of(before, "pre-trained"), predictions_of(after, "ridge")])
    apart = paired_difference(table, "pre-trained", "ridge").iloc[0]
    grouped = table.assign(group=(table["sample"] - 100) // 20)
    together = paired_difference(grouped, "pre-trained", "ridge").iloc[0]
    assert together["difference"] == pytest.approx(apart["difference"])
    assert (together["images"], together["groups"]) == (100, 10)
    assert together["high"] - together["low"] > 2 * (apart["high"] - apart["low"])  # √10 in the limit


def test_difference_depends_on_images_not_on_the_order_of_rows():
    for table in (two_masks(), pd.concat([pixels_of("pre-trained", 0.5), pixels_of("fine-tuned", 0.8, seed=1)])):
        table = table[table["protocol"] == "retrained"].reset_index(drop=True)
        expected = paired_difference(table, "pre-trained", "fine-tuned", metric="miou_present")
        shuffled = pd.concat([part.sample(frac=1, random_state=0) for _, part in table.groupby("mask", sort=False)])
        found = paired_difference(shuffled, "pre-trained", "fine-tuned", metric="miou_present")
        pd.testing.assert_frame_equal(found, expected)
        again = paired_difference(table, "pre-trained", "fine-tuned", metric="miou_present")
        pd.testing.assert_frame_equal(again, expected)


def test_pixels_of_a_group_summed_give_the_same_differences():
    table = pd.concat([pixels_of("pre-trained", 0.5), pixels_of("fine-tuned", 0.8, seed=1)], ignore_index=True)
    small = by_group(table)
    assert small["pixels"].sum() == table["pixels"].sum()
    assert len(small) < len(table) / 2
    for metric in METRICS:
        whole = paired_difference(table, "pre-trained", "fine-tuned", metric=metric)
        summed = paired_difference(small, "pre-trained", "fine-tuned", metric=metric)
        pd.testing.assert_frame_equal(summed.drop(columns="images"), whole.drop(columns="images"))


def test_a_row_a_mask_and_protocol_and_none_where_a_method_is_missing():
    right = np.arange(40) < 30
    table = pd.concat(
        [
            predictions_of(right, "pre-trained"),
            predictions_of(right, "fine-tuned"),
            predictions_of(right, "pre-trained", protocol="kept"),
            predictions_of(~right, "fine-tuned", protocol="kept"),
            predictions_of(right, "pre-trained", mask="none", protocol="complete"),
        ]
    )
    found = paired_difference(table, "pre-trained", "fine-tuned")
    assert found["protocol"].tolist() == ["retrained", "kept"]
    assert found["difference"].tolist() == pytest.approx([0, -0.5])
    empty = paired_difference(table, "pre-trained", "ridge")
    assert len(empty) == 0
    assert list(empty.columns) == list(found.columns)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda t: t.assign(sample=t["sample"] + 1),  # as many images, but others
        lambda t: t.iloc[:-5],
        lambda t: t.assign(label=(t["label"] + 1) % 4),
        lambda t: t.assign(group=0),
    ],
    ids=["other images", "fewer images", "other labels", "other groups"],
)
def test_methods_that_saw_other_images_can_not_be_paired(spoil: Any):
    """Pairing them by position would be wrong in silence."""
    right = np.arange(40) < 30
    first, other = predictions_of(right, "pre-trained"), spoil(predictions_of(right, "fine-tuned"))
    if "group" in other:
        first["group"] = first["sample"]
    with pytest.raises(ValueError, match=r"pre-trained.*B8.*fine-tuned.*same images and labels; run both anew"):
        paired_difference(pd.concat([first, other]), "pre-trained", "fine-tuned")


def test_runs_of_one_method_must_have_predicted_the_same_images_once():
    right = np.arange(40) < 30
    ridge, both = predictions_of(right, "ridge"), predictions_of([right, right], "pre-trained")
    with pytest.raises(ValueError, match=r"pre-trained.*same images"):
        paired_difference(pd.concat([ridge, both.iloc[:-1]]), "pre-trained", "ridge")
    with pytest.raises(ValueError, match="an image twice; compare one experiment at a time"):
        paired_difference(pd.concat([ridge, both, both]), "pre-trained", "ridge")
    ridge["group"] = 0
    with pytest.raises(ValueError, match="in two groups"):
        paired_difference(pd.concat([ridge, both.assign(group=np.arange(80) % 7)]), "pre-trained", "ridge")
    with pytest.raises(ValueError, match="have no group"):
        paired_difference(pd.concat([ridge, both.assign(group=[None, *range(79)])]), "pre-trained", "ridge")


def test_the_mean_over_masks_gives_all_masks_the_same_images():
    """Two masks with the same predictions: their mean is no more certain than either."""
    one = two_masks().query("mask == 'B8' and protocol == 'retrained'")
    table = pd.concat([one, one.assign(mask="B2")])
    alone = paired_difference(one, "pre-trained", "fine-tuned").iloc[0]
    mean = paired_difference(table, "pre-trained", "fine-tuned", average=True)
    assert mean["mask"].tolist() == ["mean of 2"]
    columns = ["difference", "low", "high"]
    assert mean.iloc[0][columns].tolist() == pytest.approx(alone[columns].tolist())
    opposite = one.assign(mask="B2", method=one["method"].replace({"pre-trained": "x", "fine-tuned": "y"}))
    opposite["method"] = opposite["method"].replace({"x": "fine-tuned", "y": "pre-trained"})
    cancelled = paired_difference(pd.concat([one, opposite]), "pre-trained", "fine-tuned", average=True).iloc[0]
    assert cancelled["difference"] == pytest.approx(0)
    by_mask = paired_difference(two_masks(), "pre-trained", "fine-tuned")
    means = paired_difference(two_masks(), "pre-trained", "fine-tuned", average=True)
    assert means["protocol"].tolist() == ["retrained", "kept"]
    expected = by_mask.groupby("protocol")["difference"].mean()
    assert means.set_index("protocol")["difference"].to_dict() == pytest.approx(expected.to_dict())


# --- against complete images ----------------------------------------------------------------------------------------


def test_complete_runs_are_taken_once():
    """Each mask's run predicts the complete images too, for its own report."""
    right = np.arange(40) < 30
    complete = predictions_of(right, "pre-trained", protocol="complete")
    table = pd.concat([complete.assign(mask=mask) for mask in ("B8", "none", "B2")])
    assert complete_runs(table)["mask"].unique().tolist() == ["none"]
    assert complete_runs(table[table["mask"] != "none"])["mask"].unique().tolist() == ["B8"]
    assert len(complete_runs(predictions_of(right, "pre-trained"))) == 0
