"""Tables say what was measured: tidy rows, intervals that hold, pairs by image, and the thesis' own numbers beside."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
import sklearn.metrics
from hypothesis import given, settings
from hypothesis import strategies as st

from bandmask import bands, results
from bandmask.results import (
    COLUMNS,
    METHODS,
    accuracy_beside_thesis,
    accuracy_table,
    bootstrap_interval,
    collect,
    loss_beside_thesis,
    paired_difference,
    percent,
    plot_curves,
    score_predictions,
    summarise,
    thesis_tables,
    tidy,
    write_table,
)

mpl.use("Agg")
import matplotlib.pyplot as plt

pytestmark = pytest.mark.filterwarnings("error")  # pandas announces its errors a version ahead

COMMON = {
    "experiment": "test",
    "dataset": "generated",
    "encoder": "tiny",
    "mask": "B8",
    "scheme": "named",
    "bands": "B08",
    "ratio": 0.9,
    "mask_value": "dataset_mean",
    "task": "classification",
    "protocol": "thesis",
    "method": "fine-tuned",
    "split": "test",
    "metric": "overall_accuracy",
}


def rows(values: list[float], **changes: Any) -> pd.DataFrame:
    """One run a value."""
    return tidy([{"head_seed": seed, "value": value} for seed, value in enumerate(values)], **{**COMMON, **changes})


# --- tidy rows ------------------------------------------------------------------------------------------------------


def test_tidy_has_the_tables_columns_in_order_and_their_types():
    table = tidy([{"epoch": 0, "value": 1}, {"epoch": 1, "value": 0.5, "method": "ridge"}], **COMMON)
    assert tuple(table.columns) == COLUMNS
    assert table["method"].tolist() == ["fine-tuned", "ridge"]  # what differs wins over what is shared
    assert table["value"].dtype == table["ratio"].dtype == np.float64
    assert table["epoch"].tolist() == [0, 1]
    assert table["encoder_seed"].isna().all()
    assert {str(table[c].dtype) for c in ("encoder_seed", "head_seed", "epoch")} == {"Int64"}


def test_a_mask_value_is_text_whatever_it_was():
    """A column of numbers and names would not go into Parquet."""
    table = tidy([{"value": 1.0, "mask_value": -1}, {"value": 1.0, "mask_value": "band_mean"}])
    assert table["mask_value"].tolist() == ["-1", "band_mean"]


def test_an_unknown_column_is_an_error_that_lists_what_exists():
    with pytest.raises(ValueError, match=r"unknown result column \['accuracy'\]; available: experiment, ") as error:
        tidy([{"accuracy": 1.0}], **COMMON)
    assert all(column in str(error.value) for column in COLUMNS)
    with pytest.raises(ValueError, match="colour"):
        tidy([{"value": 1.0}], colour="blue")


def test_no_measurements_are_an_empty_table_that_joins_others():
    empty = tidy([], **COMMON)
    assert tuple(empty.columns) == COLUMNS
    assert len(empty) == 0
    joined = pd.concat([empty, rows([0.5])], ignore_index=True)
    pd.testing.assert_frame_equal(joined, rows([0.5]), check_dtype=False)


def test_a_table_survives_its_file(tmp_path: Path):
    table = pd.concat([rows([0.1, 0.2]), rows([0.3], encoder_seed=4)], ignore_index=True)
    path = write_table(table, tmp_path / "deep" / "results.parquet")
    pd.testing.assert_frame_equal(pd.read_parquet(path), table)


def test_a_failed_write_keeps_the_old_table(tmp_path: Path):
    path = write_table(rows([0.1]), tmp_path / "results.parquet")
    mixed = pd.DataFrame({"value": [1, "two", object()]})
    with pytest.raises(Exception, match=r"(?i)object|convert"):
        write_table(mixed, path)
    pd.testing.assert_frame_equal(pd.read_parquet(path), rows([0.1]))
    assert [p.name for p in tmp_path.iterdir()] == ["results.parquet"]


def test_collect_takes_finished_runs_and_passes_by_the_others(tmp_path: Path):
    write_table(rows([0.1, 0.2], mask="B8"), tmp_path / "B8" / "results.parquet")
    write_table(rows([0.3], mask="B2"), tmp_path / "B2" / "results.parquet")
    write_table(rows([0.9], mask="B2"), tmp_path / "B2" / "alignment.parquet")
    write_table(rows([0.9]), tmp_path / "results.parquet")  # the collected table of an earlier time
    (tmp_path / "B11").mkdir()  # started, nothing written yet
    (tmp_path / "B2_B8").mkdir()
    (tmp_path / "B2_B8" / ".results.parquet.partial-1").write_bytes(b"PAR1")  # killed while writing
    (tmp_path / "checkpoints").mkdir()
    found = collect(tmp_path)
    assert found[["mask", "value"]].to_numpy().tolist() == [["B2", 0.3], ["B8", 0.1], ["B8", 0.2]]
    assert found.index.tolist() == [0, 1, 2]
    assert collect(tmp_path, "alignment.parquet")["value"].tolist() == [0.9]


@pytest.mark.parametrize("prepare", [lambda folder: None, lambda folder: (folder / "B8").mkdir(parents=True)])
def test_nothing_to_collect_says_what_to_run(prepare: Any, tmp_path: Path):
    folder = tmp_path / "sample"
    prepare(folder)
    with pytest.raises(FileNotFoundError, match="no finished run below") as error:
        collect(folder)
    assert str(folder) in str(error.value)
    assert "04_scene_classification.ipynb" in str(error.value)


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
        assert (row["mask"], row["scheme"], row["protocol"], row["metric"]) == (
            "B8",
            "named",
            "thesis",
            COMMON["metric"],
        )
        assert min(group) - 1e-12 <= row["low"] <= row["mean"] <= row["high"] <= max(group) + 1e-12
        assert (row["low"], row["high"]) == bootstrap_interval(group)
    assert found.loc["pre-trained", "sd"] == pytest.approx(np.std(values["pre-trained"], ddof=1))
    assert np.isnan(found.loc["ridge", "sd"])  # one run has no spread; zero would be a claim


def test_summary_keeps_groups_whose_key_is_missing():
    table = pd.concat([rows([0.5], protocol=None), rows([0.7])], ignore_index=True)
    assert sorted(summarise(table)["mean"]) == [0.5, 0.7]


def test_summary_by_one_column():
    table = pd.concat([rows([0.1, 0.3], mask="B2"), rows([0.5, 0.7], mask="B8")], ignore_index=True)
    found = summarise(table, by=["mask"])
    assert found["mask"].tolist() == ["B2", "B8"]
    assert found["mean"].tolist() == pytest.approx([0.2, 0.6])


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


# --- predictions ----------------------------------------------------------------------------------------------------


def predictions_of(
    right: np.ndarray, method: str, *, encoder_seed: int | None = None, classes: int = 4, seed: int = 0, **changes: Any
) -> pd.DataFrame:
    """A predictions table from a matrix (heads, images) of what is right."""
    right = np.atleast_2d(right)
    labels = np.random.default_rng(seed).integers(classes, size=right.shape[1])
    frames = [
        pd.DataFrame(
            {
                "head_seed": head,
                "sample": 100 + 2 * np.arange(len(line)),  # rows of a pack have gaps within a split
                "label": labels,
                "predicted": np.where(line, labels, (labels + 1) % classes),
            }
        )
        for head, line in enumerate(right)
    ]
    described = {"mask": "B8", "scheme": "named", "protocol": "thesis", "method": method, **changes}
    table = pd.concat(frames, ignore_index=True).assign(encoder_seed=encoder_seed, **described)
    return table.astype({"encoder_seed": "Int64"})


def test_scores_of_predictions_are_scikit_learns():
    draw = np.random.default_rng(1)
    table = pd.concat(
        [
            predictions_of(draw.random((2, 60)) < 0.6, "pre-trained"),
            predictions_of(draw.random((2, 60)) < 0.8, "fine-tuned", encoder_seed=0),
            predictions_of(draw.random((2, 60)) < 0.8, "fine-tuned", encoder_seed=1),
        ],
        ignore_index=True,
    )
    found = score_predictions(table, classes=4)
    assert len(found) == 6 * 2
    for row in found:
        same_encoder = table["encoder_seed"].fillna(-1) == (-1 if pd.isna(row["encoder_seed"]) else row["encoder_seed"])
        run = table[(table["method"] == row["method"]) & same_encoder & (table["head_seed"] == row["head_seed"])]
        assert len(run) == 60
        score = {
            "overall_accuracy": sklearn.metrics.accuracy_score,
            "macro_accuracy": sklearn.metrics.balanced_accuracy_score,
        }[row["metric"]]
        assert row["value"] == pytest.approx(score(run["label"], run["predicted"]))
    described = {k: v for k, v in COMMON.items() if k not in ("mask", "scheme", "protocol", "method", "metric")}
    assert len(tidy(found, **described)) == 12  # they are measurements of the results table


def test_difference_of_constructed_predictions():
    before = np.arange(100) < 60
    after = np.arange(100) < 75
    table = pd.concat([predictions_of(before, "pre-trained"), predictions_of(after, "fine-tuned", encoder_seed=0)])
    found = paired_difference(table, "pre-trained", "fine-tuned")
    assert len(found) == 1
    row = found.iloc[0]
    assert (row["mask"], row["scheme"], row["protocol"], row["images"]) == ("B8", "named", "thesis", 100)
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


def test_a_method_does_not_differ_from_itself():
    right = np.random.default_rng(0).random(90) < 0.7
    table = pd.concat([predictions_of([right, right], "pre-trained"), predictions_of([right, right], "ridge")])
    row = paired_difference(table, "pre-trained", "ridge").iloc[0]
    assert (row["difference"], row["low"], row["high"]) == pytest.approx((0, 0, 0), abs=1e-12)


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


def test_difference_depends_on_images_not_on_the_order_of_rows():
    draw = np.random.default_rng(6)
    table = pd.concat(
        [
            predictions_of(draw.random((2, 50)) < 0.6, "pre-trained"),
            predictions_of(draw.random((2, 50)) < 0.7, "ridge"),
        ],
        ignore_index=True,
    )
    expected = paired_difference(table, "pre-trained", "ridge")
    shuffled = table.sample(frac=1, random_state=0)
    pd.testing.assert_frame_equal(paired_difference(shuffled, "pre-trained", "ridge"), expected)
    pd.testing.assert_frame_equal(paired_difference(table, "pre-trained", "ridge"), expected)


def test_a_row_a_mask_and_protocol_and_none_where_a_method_is_missing():
    right = np.arange(40) < 30
    table = pd.concat(
        [
            predictions_of(right, "pre-trained"),
            predictions_of(right, "fine-tuned"),
            predictions_of(right, "pre-trained", protocol="transfer"),
            predictions_of(~right, "fine-tuned", protocol="transfer"),
            predictions_of(right, "pre-trained", mask="none", protocol="complete"),
        ]
    )
    found = paired_difference(table, "pre-trained", "fine-tuned")
    assert found["protocol"].tolist() == ["thesis", "transfer"]
    assert found["difference"].tolist() == pytest.approx([0, -0.5])
    empty = paired_difference(table, "pre-trained", "ridge")
    assert len(empty) == 0
    assert list(empty.columns) == list(found.columns)


def test_methods_that_saw_other_images_can_not_be_paired():
    """As many images, but others: pairing them by position would be wrong in silence."""
    right = np.arange(40) < 30
    other = predictions_of(right, "fine-tuned")
    other["sample"] += 1
    with pytest.raises(ValueError, match="same"):
        paired_difference(pd.concat([predictions_of(right, "pre-trained"), other]), "pre-trained", "fine-tuned")
    fewer = predictions_of(right, "fine-tuned").iloc[:-5]
    with pytest.raises(ValueError, match="same"):
        paired_difference(pd.concat([predictions_of(right, "pre-trained"), fewer]), "pre-trained", "fine-tuned")


# --- the thesis -----------------------------------------------------------------------------------------------------


def thesis_value(table: str, mask: str, metric: str, epoch: int, encoder: str, **more: str) -> float:
    found = thesis_tables()
    chosen = (found["table"] == table) & (found["mask"] == mask) & (found["metric"] == metric)
    chosen &= (found["epoch"] == epoch) & (found["encoder"] == encoder)
    for column, value in more.items():
        chosen &= found[column] == value
    values = found[chosen]["value"]
    assert len(values) == 1
    return float(values.iloc[0])


def test_thesis_tables_hold_every_row_of_the_file():
    with (Path(results.__file__).parent / "thesis_tables.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    found = thesis_tables()
    assert len(found) == len(lines) == 285
    assert found["table"].value_counts().to_dict() == {
        "4.1": 16, "4.2": 36, "4.3": 23, "4.4": 46, "A.3": 48, "A.4": 48, "A.5": 28, "A.6": 40,
    }  # fmt: skip
    for column in ("table", "mask", "encoder", "metric"):
        assert found[column].tolist() == [line[column] for line in lines]
    assert found["value"].tolist() == [float(line["value"]) for line in lines]
    assert found["epoch"].tolist() == [int(line["epoch"]) for line in lines]
    sds = [float(line["sd"]) if line["sd"] else float("nan") for line in lines]
    np.testing.assert_array_equal(found["sd"], sds)


def test_thesis_numbers_as_printed():
    accuracy, loss = "test_accuracy_percent", "test_loss"
    assert thesis_value("4.3", "none", accuracy, 20, "pretrained") == 96.53
    assert thesis_value("4.3", "B2 B4 B8 B11", accuracy, 20, "pretrained") == 67.52
    assert thesis_value("4.3", "B2 B4 B8 B11", accuracy, 20, "finetuned") == 95.7
    assert thesis_value("4.1", "B8", loss, 15, "finetuned") == 0.4125
    assert thesis_value("4.2", "B8 B9 B10 B11 B12", loss, 25, "finetuned") == 1.75
    assert thesis_value("4.4", "none", "miou", 20, "pretrained") == 0.604
    assert thesis_value("A.6", "B8", loss, 14, "finetuned", mask_ratio="1.0") == 0.245
    # where the thesis contradicts itself, both numbers are kept
    assert thesis_value("4.3", "B2 B11", accuracy, 20, "pretrained") == 95.16
    assert thesis_value("A.4", "B2 B11", accuracy, 20, "pretrained") == 71.51


def test_thesis_tables_speak_of_the_twelve_mask_sets():
    found = thesis_tables()
    assert set(found["mask"]) == set(bands.THESIS_MASKS)
    assert set(found[found["table"] == "4.3"]["mask"]) == set(bands.THESIS_MASKS)
    assert (found["mask"] == "none").sum() == 4 + 4 + 1 + 2 + 4 + 4 + 4  # read as text, not as a missing value


def test_thesis_tables_are_safe_from_their_readers():
    """The file is read once; whoever changes the table changes a copy."""
    try:
        table = thesis_tables()
        table.loc[:, "value"] = 0.0
        table["note"] = "changed"
        assert thesis_value("4.3", "none", "test_accuracy_percent", 20, "pretrained") == 96.53
        assert "changed" not in set(thesis_tables()["note"])
    finally:  # if this fails, other tests shall not read zeros
        getattr(thesis_tables, "cache_clear", lambda: None)()


def test_masks_come_in_the_order_of_the_thesis():
    assert results.mask_order(["zebra", "B8 B11", "none", "B2", "B01", "B2"]) == [
        "none",
        "B2",
        "B8 B11",
        "B01",
        "zebra",
    ]


def test_percent():
    assert percent(0.8421, 0.0031) == "84.2 ± 0.3"
    assert percent(0.8421) == "84.2"


# --- tables for reading ---------------------------------------------------------------------------------------------


def accuracies() -> pd.DataFrame:
    """Runs of two masks and the complete reference; B2 B8 lacks the fine-tuned encoder."""
    return pd.concat(
        [
            rows([0.70, 0.72, 0.74], mask="B8", method="pre-trained"),
            rows([0.90], mask="B8", method="ridge"),
            rows([0.88, 0.92], mask="B8", method="fine-tuned"),
            rows([0.50, 0.60], mask="B8", method="pre-trained", protocol="transfer"),
            rows([0.60, 0.62], mask="B2 B8", bands="B02 B08", method="pre-trained"),
            rows([0.95, 0.97], mask="none", bands="", method="pre-trained", protocol="complete"),
            rows([0.10], mask="B8", metric="macro_accuracy"),
            rows([0.20], mask="B8", split="val"),
        ],
        ignore_index=True,
    )


def test_accuracy_table_reads_as_a_paper_does():
    found = accuracy_table(accuracies())
    assert list(found.columns) == ["mask", "hidden bands", "protocol", *METHODS]
    assert found.to_numpy().tolist() == [
        ["none", "", "complete", "96.0 ± 1.4", "–", "–"],
        ["B8", "B08", "thesis", "72.0 ± 2.0", "90.0", "90.0 ± 2.8"],
        ["B8", "B08", "transfer", "55.0 ± 7.1", "–", "–"],
        ["B2 B8", "B02 B08", "thesis", "61.0 ± 1.4", "–", "–"],
    ]


def test_accuracy_table_of_nothing_is_empty_with_its_columns():
    found = accuracy_table(accuracies().iloc[:0])
    assert list(found.columns) == ["mask", "hidden bands", "protocol", *METHODS]
    assert len(found) == 0


def test_accuracy_table_of_another_metric_where_other_methods_are_missing_altogether():
    found = accuracy_table(accuracies(), "macro_accuracy")
    assert found[list(METHODS)].to_numpy().tolist() == [["–", "–", "10.0"]]


def test_accuracy_beside_the_thesis_is_in_percent_and_knows_what_is_missing():
    found = accuracy_beside_thesis(accuracies()).set_index("mask")
    assert found.index.tolist() == ["none", "B8", "B2 B8"]
    assert list(found.columns) == [*METHODS, "thesis pre-trained", "thesis fine-tuned"]
    assert found.loc["B8"].tolist() == pytest.approx([72, 90, 90, 94.63, 95.52])
    assert found.loc["B2 B8", ["pre-trained", "thesis pre-trained", "thesis fine-tuned"]].tolist() == pytest.approx(
        [61, 94.76, 95.65]
    )
    assert found.loc["B2 B8", ["ridge", "fine-tuned"]].isna().all()
    assert found.loc["none", "pre-trained"] == pytest.approx(96)
    assert found.loc["none", "thesis pre-trained"] == 96.53
    assert np.isnan(found.loc["none", "thesis fine-tuned"])  # the thesis has none


def test_a_mask_of_ones_own_has_no_thesis_beside_it():
    found = accuracy_beside_thesis(rows([0.5], mask="nir red", method="pre-trained")).iloc[0]
    assert found["pre-trained"] == pytest.approx(50)
    assert np.isnan(found["thesis pre-trained"])


def history(mask: str, losses: list[float], runs: int = 2, **changes: Any) -> pd.DataFrame:
    """Validation losses by epoch, of runs that differ by 0.02."""
    measured = [
        {"epoch": epoch, "encoder_seed": run, "value": value + 0.02 * run}
        for run in range(runs)
        for epoch, value in enumerate(losses)
    ]
    shared = {**COMMON, "task": "alignment", "metric": "val_loss", "split": "val", "mask": mask, **changes}
    return tidy(measured, **shared)


def test_loss_beside_the_thesis():
    table = pd.concat(
        [
            history("B8", [2.0, 1.0, 0.5]),
            history("none", [0.4, 0.3, 0.2]),
            history("B8", [9.0, 9.0, 9.0], metric="train_loss"),
        ]
    )
    found = loss_beside_thesis(table).set_index("mask")
    assert found.index.tolist() == ["none", "B8"]
    assert found.loc["B8", "hidden bands"] == "B08"
    assert found.loc["B8", ["pre-trained", "after 2 epochs", "thesis, last epoch"]].tolist() == pytest.approx(
        [2.01, 0.51, 0.4107]
    )
    assert found.loc["none", "thesis, last epoch"] == 0.055


def test_loss_of_runs_of_different_length_and_of_ones_own_masks():
    table = pd.concat([history("B8", [2.0, 1.0]), history("nir red", [3.0, 2.0, 1.0], bands="B04 B08")])
    found = loss_beside_thesis(table).set_index("mask")
    assert found.loc["B8", "after 1 epochs"] == pytest.approx(1.01)
    assert found.loc["nir red", "after 2 epochs"] == pytest.approx(1.01)
    assert found.loc["B8", ["after 2 epochs"]].isna().all()
    assert np.isnan(found.loc["nir red", "thesis, last epoch"])


def test_a_mask_without_validation_losses_is_left_out_not_an_error():
    """The collected table holds scene classification too."""
    table = pd.concat([history("B8", [2.0, 1.0]), rows([0.7], mask="B2", epoch=3)])
    assert loss_beside_thesis(table)["mask"].tolist() == ["B8"]


# --- curves ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def axes() -> Any:
    figure, axis = plt.subplots()
    yield axis
    plt.close(figure)


def test_curves_draw_the_mean_and_a_band_of_one_sd(axes: Any):
    table = pd.concat([history("B8", [2.0, 1.0, 0.5], runs=3), history("none", [0.4, 0.3, 0.2], runs=3)])
    plot_curves(table, axes, ylabel="validation loss", scale=100)
    assert [line.get_label() for line in axes.lines] == ["none", "B8"]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["none", "B8"]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("epoch", "validation loss")
    for line, band, losses in zip(axes.lines, axes.collections, ([0.4, 0.3, 0.2], [2.0, 1.0, 0.5]), strict=True):
        mean, sd = 100 * (np.array(losses) + 0.02), 100 * np.std([0, 0.02, 0.04], ddof=1)
        assert line.get_xdata().tolist() == [0, 1, 2]
        np.testing.assert_allclose(line.get_ydata(), mean)
        vertices = band.get_paths()[0].vertices
        for epoch in range(3):
            heights = vertices[vertices[:, 0] == epoch, 1]
            assert (heights.min(), heights.max()) == pytest.approx((mean[epoch] - sd, mean[epoch] + sd))
        assert band.get_facecolor()[0, :3] == pytest.approx(mpl.colors.to_rgb(line.get_color()))
        assert band.get_facecolor()[0, 3] < 0.5  # lines stay visible through it


def test_one_run_has_no_band(axes: Any):
    plot_curves(history("B8", [2.0, 1.0], runs=1), axes)
    vertices = axes.collections[0].get_paths()[0].vertices
    assert set(vertices[:, 1].round(9)) <= {2.0, 1.0}


def test_curves_by_method(axes: Any):
    table = pd.concat([history("B8", [2.0, 1.0], method=method) for method in ("pre-trained", "fine-tuned")])
    plot_curves(table, axes, by="method")
    assert [line.get_label() for line in axes.lines] == ["pre-trained", "fine-tuned"]
    assert axes.get_legend().get_title().get_text() == "method"
