"""The thesis' numbers stand as printed, and where they contradict each other a mark says so."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from bandmask import bands
from bandmask.report import printed
from bandmask.report.printed import CONTRADICTIONS, TABLES, footnotes, printed_rows, thesis_tables

pytestmark = pytest.mark.filterwarnings("error")


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
    with (Path(printed.__file__).parent / "thesis_tables.csv").open(newline="") as file:
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


# --- layout and contradictions --------------------------------------------------------------------------------------


def test_blocks_are_the_printed_rows():
    found = printed_rows()
    assert found.groupby("table")["block"].nunique().to_dict() == {
        "4.1": 4, "4.2": 9, "4.3": 12, "4.4": 12, "A.3": 12, "A.4": 12, "A.5": 7, "A.6": 10,
    }  # fmt: skip
    assert set(found["table"]) == set(TABLES)
    pd.testing.assert_frame_equal(
        found[["table", "mask", "metric", "value"]], thesis_tables()[["table", "mask", "metric", "value"]]
    )
    lengths = found[found["table"] == "A.6"].groupby("block")["length"].unique().map(list).tolist()
    assert lengths == [[15]] * 7 + [[25]] * 3


def test_epochs_count_from_one_in_all_tables():
    found = printed_rows()
    losses = found[found["metric"] == "val_loss"]
    assert losses.groupby("table")["epoch"].unique().map(sorted).to_dict() == {
        "4.1": [1, 8, 15], "4.2": [1, 13, 25], "A.5": [1, 8, 15], "A.6": [1, 8, 13, 15, 25],
    }  # fmt: skip


def marked(mark: str, *tables: str) -> set[tuple[str, str]]:
    found = printed_rows()
    chosen = found[found["marks"].str.contains(mark) & (found["table"].isin(tables) if tables else True)]
    return set(zip(chosen["table"], chosen["mask"], strict=True))


def test_tables_that_disagree_on_the_same_runs_are_marked():
    masks = ("B2 B11", "B4 B8 B9 B13", "B8 B9 B10 B11 B12")
    assert marked("a") == {(table, mask) for table in ("4.3", "A.4") for mask in masks}
    found = printed_rows()
    assert set(found[found["marks"].str.contains("a")]["encoder"]) == {"pretrained"}


def test_spreads_that_look_like_one_outlying_run_are_marked():
    assert marked("b") == {("4.4", mask) for mask in ("B11", "B2 B11", "B2 B8", "B8 B11", "B2 B3 B4")}
    found = printed_rows()
    chosen = found[found["marks"].str.contains("b")]
    assert chosen["sd"].tolist() == [6.01, 5.81, 6.151, 5.74, 6.43]
    others = found[(found["table"] == "4.4") & (found["metric"] != "miou") & ~found["marks"].str.contains("b")]
    assert others["sd"].max() < 1  # as the note says


def test_more_hidden_pixels_with_a_lower_loss_are_marked():
    found = printed_rows()
    chosen = found[found["marks"].str.contains("d")]
    assert set(chosen["metric"]) == {"test_loss"}
    eight = chosen[chosen["mask"] == "B8"]
    assert set(zip(eight["mask_ratio"], eight["value"], strict=True)) == {
        ("0.6", 0.408), ("0.9", 0.4125), ("0.99", 0.347), ("1.0", 0.245),
    }  # fmt: skip
    assert set(chosen["mask"]) == {"B8", "B2 B8 B11"}
    assert set(chosen[chosen["mask"] == "B2 B8 B11"]["length"]) == {25}  # of 15 epochs there is only one ratio


def test_figures_printed_for_two_lengths_are_marked():
    assert marked("f") == {
        ("4.1", "none"), ("4.2", "none"), ("A.5", "none"),
        ("4.2", "B8 B11"), ("A.6", "B8 B11"), ("4.2", "B2 B8"), ("A.6", "B2 B8"),
    }  # fmt: skip


def test_names_savanna_and_a_spread_too_small_are_marked():
    assert {mask for _, mask in marked("c")} == {"B2 B8 B11"}
    assert {table for table, _ in marked("c")} == set(TABLES) - {"4.1", "A.5"}
    assert {table for table, _ in marked("e")} == {"4.4"}
    assert marked("g") == {("4.3", "B2 B8 B11")}  # 94.6 ± 0.004
    three_runs = 100 * np.array([5000, 5000, 5001]) / 5400
    assert three_runs.std() > 0.004  # the smallest spread that isn't none


def test_every_contradiction_marks_something_and_has_its_note():
    used = {mark for marks in printed_rows()["marks"] for mark in marks}
    assert used == set(CONTRADICTIONS)


def test_footnotes_are_those_that_a_table_uses():
    frame = pd.DataFrame(
        {"mask": ["B8 [d]", "B2 B8 B11 [a, c]"], "difference": ["+0.1 [+0.0, +0.2]", "–"], "n": [1, 2]}
    )
    found = footnotes(frame)
    assert [note[:3] for note in found] == ["[a]", "[c]", "[d]"]
    assert found[1].endswith(CONTRADICTIONS["c"])
    assert footnotes(frame.iloc[:0]) == []
