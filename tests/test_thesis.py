"""Ours stands beside the thesis': the right run, the right epoch, the right unit, and what is missing is said."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from predictions import COMMON, curve, history, pixels_of, predictions_of, rows

from bandmask import bands
from bandmask.comparison import bootstrap_interval, paired_difference
from bandmask.report import thesis
from bandmask.report.printed import TABLES, footnotes
from bandmask.report.thesis import (
    beside,
    missing_runs,
    table_4_1,
    table_4_2,
    table_4_3,
    table_4_4,
    table_a3,
    table_a4,
    table_a5,
    table_a6,
)
from bandmask.results import COLUMNS, export_table, score_predictions, tidy

pytestmark = pytest.mark.filterwarnings("error")

ALL = {
    "4.1": table_4_1,
    "4.2": table_4_2,
    "4.3": table_4_3,
    "4.4": table_4_4,
    "A.3": table_a3,
    "A.4": table_a4,
    "A.5": table_a5,
    "A.6": table_a6,
}
NOTHING = pd.DataFrame(columns=list(COLUMNS)).astype({"value": float, "ratio": float})


def loss_on_test(mask: str, value: float, epoch: int, runs: int = 2, **changes: Any) -> pd.DataFrame:
    measured = [{"encoder_seed": run, "epoch": epoch, "value": value + 0.02 * run} for run in range(runs)]
    shared = {"task": "alignment", "metric": "test_loss", "protocol": None, "mask": mask}
    return tidy(measured, **{**COMMON, **shared, **changes})


def falling(start: float, epochs: int) -> list[float]:
    return [start] + [round(start / (1 + epoch), 4) for epoch in range(1, epochs + 1)]


def classified(mask: str, method: str, values: list[float], **changes: Any) -> pd.DataFrame:
    hidden = " ".join(bands.resolve_mask(mask))
    return rows(values, mask=mask, method=method, bands=hidden, **changes)


@functools.cache
def whole_grid() -> pd.DataFrame:
    """Results for every cell of every table: generated figures, thesis' names, epochs and settings."""
    parts = []
    for mask in bands.THESIS_MASKS:
        length = 15 if " " not in mask else 25
        parts += [history(mask, falling(2.0, length)), loss_on_test(mask, 0.3, length)]
        protocol = "complete" if mask == "none" else "retrained"
        for method in ("pre-trained",) if mask == "none" else ("pre-trained", "ridge", "fine-tuned"):
            of = {"mask": mask, "method": method, "protocol": protocol}
            parts.append(rows([0.80, 0.82, 0.84], **of))
            parts.append(curve(scores=[0.1] + [0.7 + 0.01 * e for e in range(1, 21)], **of))
            for metric in ("overall_accuracy", "miou_all"):
                parts.append(rows([0.70, 0.71, 0.72], **{**of, "task": "segmentation", "metric": metric}))
    more = {"none": [25], "B8 B11": [15], "B2 B8": [15], "B2 B8 B11": [15]}
    for mask, lengths in more.items():
        for length in lengths:
            changes = {"experiment": f"epochs-{length}"}
            parts += [history(mask, falling(3.0, length), **changes), loss_on_test(mask, 0.4, length, **changes)]
    for schedule in ("gradual", "staircase"):
        for mask in ("B2", "B8"):
            changes = {"experiment": schedule, "schedule": schedule, "ratio": 0.8}
            parts += [history(mask, falling(1.5, 15), **changes), loss_on_test(mask, 0.5, 15, **changes)]
    for mask, ratio, length in (("B8", 0.6, 15), ("B8", 0.99, 15), ("B8", 1.0, 15), ("B2 B8 B11", 1.0, 25)):
        changes = {"experiment": f"ratio-{ratio}", "ratio": ratio}
        parts += [history(mask, falling(4.0, length), **changes), loss_on_test(mask, 0.6, length, **changes)]
    return pd.concat(parts, ignore_index=True)


# --- every number beside ours ---------------------------------------------------------------------------------------


def test_a_whole_grid_fills_every_cell_of_every_table():
    grid = whole_grid()
    assert len(missing_runs(grid)) == 0
    for table in TABLES:
        found = beside(grid, table)
        assert found["ours"].notna().all()
        assert (found["our_epoch"].isna() | (found["our_epoch"] == found["epoch"])).all()
        shown = ALL[table](grid)
        ours = shown[[name for name in shown if "ours" in name or "difference" in name]]
        absent = ours[~shown["mask"].str.startswith("none")] == "–"
        assert not absent.any(axis=None)
        assert "(ep" not in " ".join(ours.to_numpy().ravel())


def test_without_any_results_the_thesis_stands_alone():
    for table, show in ALL.items():
        found = beside(NOTHING, table)
        assert found["ours"].isna().all()
        assert (found["runs"] == 0).all()
        shown = show(NOTHING)
        ours = shown[[name for name in shown if "ours" in name or "difference" in name]]
        assert (ours == "–").all(axis=None)
    assert set(missing_runs(NOTHING)["table"]) == set(TABLES)


def test_difference_is_ours_minus_the_thesis_in_its_unit_with_the_interval_of_our_runs():
    values = [0.952, 0.961, 0.949]
    table = classified("B8", "fine-tuned", values)
    row = beside(table, "4.3").query("mask == 'B8' and method == 'fine-tuned'").iloc[0]
    low, high = bootstrap_interval([100 * value for value in values])
    assert (row["thesis"], row["thesis_sd"]) == (95.52, 1.31)
    assert row["ours"] == pytest.approx(95.4)
    assert row["sd"] == pytest.approx(100 * np.std(values, ddof=1))
    assert row["difference"] == pytest.approx(95.4 - 95.52)
    assert (row["difference_low"], row["difference_high"]) == pytest.approx((low - 95.52, high - 95.52))
    assert row["runs"] == 3
    losses = beside(pd.concat([history("B8", [2.0, 1.0]), loss_on_test("B8", 0.5, 1)]), "4.1")
    assert losses.query("mask == 'B8'")["difference"].tolist() == pytest.approx(
        [1.01 - 0.6449, 1.01 - 0.4436, 1.01 - 0.4107, 0.51 - 0.4125]
    )


def test_rows_are_in_the_thesis_order():
    assert table_4_3(NOTHING)["mask"].str.replace(r" \[.*", "", regex=True).tolist() == [
        "none", "B2", "B8", "B11", "B2 B11", "B2 B8", "B8 B11", "B2 B3 B4", "B2 B8 B11", "B4 B8 B9 B13", "B2 B4 B8 B11",
        "B8 B9 B10 B11 B12",
    ]  # fmt: skip
    assert table_a6(NOTHING)["mask ratio"].tolist() == ["1.0", "0.99", "0.6"] + ["0.9"] * 6 + ["1.0"]
    assert table_a6(NOTHING)["epochs"].tolist() == ["15"] * 7 + ["25"] * 3
    assert table_a5(NOTHING)["mask strategy"].tolist()[1:4] == [
        "constant, 0.9",
        "gradual, 0.2-0.8",
        "staircase, 0.2-0.8",
    ]


def test_the_thesis_figures_stand_as_printed():
    shown = table_4_1(NOTHING).set_index("mask")
    assert shown.loc["B2", "val ep 1: thesis"] == "0.167"
    assert shown.loc["B8 [d]", "test: thesis"] == "0.4125"
    assert shown.loc["none [f]", "val ep 8: thesis"] == "0.060"
    accuracy = table_4_3(NOTHING).set_index("mask")
    assert accuracy.loc["B8 B11", "fine-tuned: thesis"] == "96.00 ± 0.20"
    assert accuracy.loc["B2 B8 B11 [c, g]", "pre-trained: thesis"] == "94.60 ± 0.004"
    assert accuracy.loc["none", "fine-tuned: thesis"] == "–"
    assert (
        table_4_4(NOTHING).set_index(["metric", "mask"]).loc[("mIoU", "B2 [e]"), "pre-trained: thesis"]
        == "0.578 ± 0.008"
    )


# --- which run, which epoch -----------------------------------------------------------------------------------------


def test_shorter_runs_stand_with_the_epochs_they_have():
    table = pd.concat([history("B8", falling(2.0, 6)), loss_on_test("B8", 0.5, 6)])
    shown = table_4_1(table).query("mask == 'B8 [d]'").iloc[0]
    assert shown["val ep 1: ours"] == "1.010 ± 0.014"
    assert shown["val ep 8: ours"] == shown["val ep 15: ours"] == "0.296 ± 0.014 (ep 6)"
    assert shown["test: ours"] == "0.510 ± 0.014 (ep 6)"
    assert shown["test: difference"] == "+0.098 [+0.088, +0.108]"


def test_epoch_zero_is_the_pre_trained_encoder_and_never_the_thesis_first_epoch():
    """Table A.5 counts epochs from 0: its first is our 1."""
    table = history("B8", [9.0, 1.0, 0.5], runs=1)
    assert beside(table, "A.5").query("mask == 'B8' and schedule == 'constant'")["ours"].tolist()[0] == 1.0
    only_before = table[table["epoch"] == 0]
    assert beside(only_before, "4.1")["ours"].isna().all()


def test_the_experiment_of_the_thesis_length_is_taken():
    """Table A.6 has B2 B8 B11 at 15 and at 25 epochs; the base has the one, a variant the other."""
    long, short = falling(2.0, 25), falling(5.0, 15)
    table = pd.concat(
        [
            history("B2 B8 B11", long, runs=1, experiment="thesis"),
            history("B2 B8 B11", short, runs=1, experiment="thesis-epochs-15"),
        ]
    )
    found = beside(table, "A.6").query("mask == 'B2 B8 B11' and mask_ratio == '0.9' and metric == 'val_loss'")
    assert found["ours"].tolist() == [short[1], short[8], short[15], long[1], long[13], long[25]]
    assert beside(table, "4.2").query("mask == 'B2 B8 B11' and metric == 'val_loss'")["ours"].tolist()[-1] == long[25]
    alone = beside(table[table["experiment"] == "thesis"], "A.6").query("mask == 'B2 B8 B11' and length == 15")
    assert alone["ours"].tolist()[:3] == [long[1], long[8], long[15]]  # a constant mask knows nothing of its end


def test_the_same_runs_of_two_experiments_are_not_pooled():
    table = pd.concat([classified("B8", "ridge", [0.5, 0.6]), classified("B8", "ridge", [0.9], experiment="again")])
    row = beside(table, "4.3").query("mask == 'B8' and method == 'ridge'").iloc[0]
    assert (row["ours"], row["runs"]) == (pytest.approx(55), 2)


def test_schedules_and_ratios_find_their_own_runs():
    table = pd.concat(
        [
            history("B8", [1.0, 0.9], runs=1),
            history("B8", [1.0, 0.8], runs=1, schedule="gradual", ratio=0.8, experiment="g"),
            history("B8", [1.0, 0.7], runs=1, schedule="gradual", ratio=0.9, experiment="another end"),
            history("B8", [1.0, 0.6], runs=1, ratio=1.0, experiment="r"),
            history("B8", [1.0, 0.5], runs=1, mask_value="-1", experiment="v"),
        ]
    )
    ours = beside(table, "A.5").query("mask == 'B8'").groupby("schedule")["ours"].first()
    assert ours["constant"] == 0.9
    assert ours["gradual"] == 0.8
    assert np.isnan(ours["staircase"])
    assert beside(table, "A.6").query("mask == 'B8'")["ours"].iloc[0] == 0.6
    assert beside(table, "4.1", mask_value="-1").query("mask == 'B8'")["ours"].iloc[0] == 0.5


def test_the_scheme_decides_and_complete_images_belong_to_both():
    table = pd.concat(
        [
            classified("B8", "ridge", [0.5]),
            rows([0.6], mask="B8", method="ridge", scheme="position", bands="B08"),
            classified("none", "pre-trained", [0.9], protocol="complete"),
        ]
    )
    named, position = beside(table, "4.3"), beside(table, "4.3", scheme="position")
    at = "mask == 'B8' and method == 'ridge'"
    assert (named.query(at)["ours"].iloc[0], position.query(at)["ours"].iloc[0]) == (
        pytest.approx(50),
        pytest.approx(60),
    )
    assert named["ours"].iloc[0] == position["ours"].iloc[0] == pytest.approx(90)
    assert position.query("mask == 'B11'")["hidden bands"].iloc[0] == "–"  # depends on the file, and no run says
    assert named.query("mask == 'B11'")["hidden bands"].iloc[0] == "B10"


def test_transfer_never_gets_into_the_thesis_tables():
    table = pd.concat(
        [classified("B8", "fine-tuned", [0.9]), classified("B8", "fine-tuned", [0.1], protocol="kept")]
    )
    assert beside(table, "4.3").query("mask == 'B8' and method == 'fine-tuned'")["ours"].tolist() == [pytest.approx(90)]


def test_mixed_encoders_and_unknown_tables_are_errors():
    table = pd.concat([classified("B8", "ridge", [0.5]), classified("B8", "ridge", [0.5], encoder="other")])
    with pytest.raises(ValueError, match="several encoders: tiny, other"):
        table_4_3(table)
    with pytest.raises(ValueError, match=r"unknown table '4.5' of the thesis; available: 4.1, 4.2"):
        beside(table, "4.5")


# --- for reading ----------------------------------------------------------------------------------------------------


def scored(predictions: pd.DataFrame, classes: int | list[str], **changes: Any) -> pd.DataFrame:
    found = score_predictions(predictions, classes)
    shared = {k: v for k, v in COMMON.items() if k not in ("mask", "scheme", "protocol", "method", "metric")}
    return tidy(found, **{**shared, **changes})


def test_accuracy_table_has_gains_on_the_same_images_and_ridge():
    draw = np.random.default_rng(0)
    predictions = pd.concat(
        [
            predictions_of(draw.random((3, 60)) < chance, method, protocol=protocol)
            for protocol in ("retrained", "kept")
            for method, chance in (("pre-trained", 0.6), ("ridge", 0.8), ("fine-tuned", 0.9))
        ]
    )
    table = scored(predictions, 4)
    shown = table_4_3(table, predictions).query("mask == 'B8'").iloc[0]
    gain = paired_difference(predictions.query("protocol == 'retrained'"), "pre-trained", "fine-tuned").iloc[0]
    expected = f"{100 * gain['difference']:+.2f} [{100 * gain['low']:+.2f}, {100 * gain['high']:+.2f}]".replace(
        "-", "−"
    )
    assert shown["fine-tuned − pre-trained: ours"] == expected
    assert shown["ridge: ours"] != "–"
    assert table_4_3(table, predictions)["fine-tuned − pre-trained: ours"].tolist().count("–") == 11
    assert "fine-tuned − pre-trained: ours" not in table_4_3(table)


def test_segmentation_table_has_accuracy_in_percent_and_miou_as_a_share():
    predictions = pd.concat([pixels_of("pre-trained", 0.6), pixels_of("fine-tuned", 0.8, seed=1)])
    table = scored(predictions, ["a", "b", "c", "never"], task="segmentation")
    shown = table_4_4(table, predictions).set_index(["metric", "mask"])
    assert len(shown) == 24
    accuracy, miou = shown.loc[("accuracy (%)", "B8")], shown.loc[("mIoU", "B8 [e]")]
    value = table.query("metric == 'miou_all' and method == 'fine-tuned'")["value"]
    assert miou["fine-tuned: ours"] == f"{value.mean():.3f} ± {value.std():.3f}"
    assert float(accuracy["fine-tuned: ours"].split()[0]) == pytest.approx(80, abs=5)
    gain = value.mean() - table.query("metric == 'miou_all' and method == 'pre-trained'")["value"].mean()
    assert miou["fine-tuned − pre-trained: ours"].startswith(f"{gain:+.3f} [")  # the class that never occurs counts too
    present = table_4_4(table, miou="miou_present").set_index(["metric", "mask"]).loc[("mIoU", "B8 [e]")]
    assert float(present["fine-tuned: ours"].split()[0]) == pytest.approx(4 / 3 * value.mean(), abs=0.002)


def test_learning_curves_and_test_accuracy_stand_in_one_row():
    steps = [0.1] + [0.7 + 0.01 * epoch for epoch in range(1, 21)]
    table = pd.concat(
        [
            curve("B8", steps, method="fine-tuned"),
            curve("B8", steps, method="pre-trained"),
            classified("B8", "fine-tuned", [0.9, 0.92]),
        ]
    )
    shown = table_a3(table).query("mask == 'B8'").iloc[0]
    assert shown["val ep 1: ours"] == "72.00 ± 1.00"
    assert shown["val ep 20: ours"] == "91.00 ± 1.00"
    assert shown["test: ours"] == "91.00 ± 1.41"
    assert shown["test: difference"] == "−5.00 [−6.00, −4.00]"
    assert shown["val ep 10: thesis"] == "96.20"
    other = table_a4(table).query("mask == 'B8'").iloc[0]
    assert (other["val ep 1: ours"], other["test: ours"]) == ("72.00 ± 1.00", "–")


def test_one_run_has_no_interval():
    shown = table_4_3(classified("B8", "fine-tuned", [0.96])).query("mask == 'B8'").iloc[0]
    assert shown["fine-tuned: ours"] == "96.00"
    assert shown["fine-tuned: difference"] == "+0.48"


def test_contradictions_are_marked_in_the_rows_and_noted_below():
    notes = {table: {note[1] for note in footnotes(show(NOTHING))} for table, show in ALL.items()}
    assert notes == {
        "4.1": {"d", "f"},
        "4.2": {"c", "d", "f"},
        "4.3": {"a", "c", "g"},
        "4.4": {"b", "c", "e"},
        "A.3": {"c"},
        "A.4": {"a", "c"},
        "A.5": {"d", "f"},
        "A.6": {"c", "d", "f"},
    }


def test_every_table_can_be_exported(tmp_path: Path):
    for table, show in ALL.items():
        for path in export_table(show(NOTHING), tmp_path / f"table_{table}"):
            assert path.stat().st_size > 100


# --- what is missing ------------------------------------------------------------------------------------------------


def test_half_a_grid_says_which_runs_are_missing_and_what_makes_them():
    grid = whole_grid()
    lacks = (grid["mask"] == "B8") & (grid["method"] == "ridge") & (grid["task"] == "classification")
    lacks |= (grid["mask"] == "B2") & (grid["metric"] == "test_loss") & (grid["schedule"] == "constant")
    lacks |= (grid["mask"] == "none") & (grid["task"] == "segmentation")
    found = missing_runs(grid[~lacks])
    assert found[["table", "mask", "method", "missing", "notebook"]].to_numpy().tolist() == [
        ["4.1", "B2", "fine-tuned", "test_loss", "03_fine_tuning"],
        ["4.3", "B8", "ridge", "test_accuracy_percent", "04_scene_classification"],
        ["4.4", "none", "pre-trained", "average_accuracy_percent, miou", "05_image_segmentation"],
        ["A.5", "B2", "fine-tuned", "test_loss", "03_fine_tuning"],
    ]
    assert found["epochs"].tolist()[0] == 15
    assert missing_runs(grid[~lacks], tables=["A.6"]).empty


def test_results_of_before_schedules_were_kept_fill_the_constant_rows():
    table = history("B8", [2.0, 1.0], schedule=None)
    assert beside(table, "4.1").query("mask == 'B8'")["ours"].iloc[0] == pytest.approx(1.01)


def test_all_tables_are_functions_of_this_module():
    names = {name for name in vars(thesis) if name.startswith("table_")}
    assert names == {show.__name__ for show in ALL.values()}
