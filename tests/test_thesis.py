"""The thesis' numbers stand as printed, ours beside them, and only what was made alike."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pandas as pd
import pytest
from predictions import COMMON, curve, history, joined, rows

from bandmask import bands, thesis
from bandmask.results import COLUMNS, tidy
from bandmask.thesis import TABLES, beside, first_experiment, footnotes, printed_rows, select, table

pytestmark = pytest.mark.filterwarnings("error")
NOTHING = pd.DataFrame(columns=list(COLUMNS)).astype({"value": float, "ratio": float})


def test_the_thesis_numbers_are_as_printed():
    found = printed_rows().set_index(["table", "mask", "metric", "epoch", "encoder"]).sort_index()
    assert len(found) == 285
    for key, value in {
        ("4.3", "none", "test_accuracy_percent", 20, "pretrained"): 96.53,
        ("4.3", "B2 B4 B8 B11", "test_accuracy_percent", 20, "pretrained"): 67.52,
        ("4.3", "B2 B4 B8 B11", "test_accuracy_percent", 20, "finetuned"): 95.7,
        ("4.1", "B8", "test_loss", 15, "finetuned"): 0.4125,
        ("4.2", "B8 B9 B10 B11 B12", "test_loss", 25, "finetuned"): 1.75,
        ("4.4", "none", "miou", 20, "pretrained"): 0.604,
        ("4.3", "B2 B11", "test_accuracy_percent", 20, "pretrained"): 95.16,  # where it contradicts itself,
        ("A.4", "B2 B11", "test_accuracy_percent", 20, "pretrained"): 71.51,  # both numbers are kept
    }.items():
        assert np.ravel(found.loc[key, "value"]).tolist() == [value]
    counts = {"4.1": 16, "4.2": 36, "4.3": 23, "4.4": 46, "A.3": 48, "A.4": 48, "A.5": 28, "A.6": 40}
    assert found.groupby("table").size().to_dict() == counts
    assert set(printed_rows()["mask"]) == set(bands.THESIS_MASKS)
    length = found.reset_index().groupby(["table", "block"])[["epoch", "length"]].max()
    assert (length["epoch"] == length["length"]).all()  # counted from 1 where the thesis counts from 0
    notes = {name: {note[1] for note in footnotes(table(NOTHING, name))} for name in TABLES}
    assert set().union(*notes.values()) == set("abcdefg")
    assert (notes["4.3"], notes["A.3"]) == ({"a", "c", "g"}, {"c"})


def loss_on_test(mask: str, value: float, epoch: int, **changes: Any) -> pd.DataFrame:
    measured = [{"encoder_seed": run, "epoch": epoch, "value": value + 0.02 * run} for run in range(2)]
    shared = {"task": "alignment", "metric": "test_loss", "protocol": None, "mask": mask}
    return tidy(measured, **{**COMMON, **shared, **changes})


def falling(start: float, epochs: int) -> list[float]:
    return [start] + [round(start / (1 + epoch), 4) for epoch in range(1, epochs + 1)]


def classified(mask: str, method: str, values: list[float], **changes: Any) -> pd.DataFrame:
    return rows(values, mask=mask, method=method, bands=" ".join(bands.resolve_mask(mask)), **changes)


@functools.cache
def whole_grid() -> pd.DataFrame:
    """Results for every cell of every table: generated figures, thesis' names, epochs and settings."""
    parts = []

    def aligned(mask: str, start: float, length: int, **changes: Any) -> None:
        parts.extend([history(mask, falling(start, length), **changes), loss_on_test(mask, 0.3, length, **changes)])

    for mask in bands.THESIS_MASKS:
        aligned(mask, 2.0, 15 if " " not in mask else 25)
        protocol = "complete" if mask == "none" else "retrained"
        for method in ("pre-trained",) if mask == "none" else ("pre-trained", "fine-tuned"):
            of = {"mask": mask, "method": method, "protocol": protocol}
            parts += [
                rows([0.80, 0.82, 0.84], **of),
                curve(scores=[0.1] + [0.7 + 0.01 * e for e in range(1, 21)], **of),
            ]
            for metric in ("overall_accuracy", "miou_all"):
                parts.append(rows([0.70, 0.71, 0.72], **{**of, "task": "segmentation", "metric": metric}))
    for mask, length in {"none": 25, "B8 B11": 15, "B2 B8": 15, "B2 B8 B11": 15}.items():
        aligned(mask, 3.0, length, experiment=f"epochs-{length}")
    for schedule in ("gradual", "staircase"):
        for mask in ("B2", "B8"):
            aligned(mask, 1.5, 15, experiment=schedule, schedule=schedule, ratio=0.8)
    for mask, ratio, length in (("B8", 0.6, 15), ("B8", 0.99, 15), ("B8", 1.0, 15), ("B2 B8 B11", 1.0, 25)):
        aligned(mask, 4.0, length, experiment=f"ratio-{ratio}", ratio=ratio)
    return pd.concat(parts, ignore_index=True)


@pytest.mark.parametrize("name", TABLES)
def test_a_whole_grid_fills_every_cell_and_without_results_the_thesis_stands_alone(name: str):
    found = beside(whole_grid(), name)
    assert found["ours"].notna().all()
    assert (found["our_epoch"].isna() | (found["our_epoch"] == found["epoch"])).all()
    shown = table(whole_grid(), name)
    ours = shown[[column for column in shown if "ours" in column]]
    assert not (ours[~shown["mask"].str.startswith("none")] == "–").any(axis=None)
    alone = beside(NOTHING, name)
    assert alone["ours"].isna().all()
    printed = printed_rows().query("table == @name")
    assert sorted(alone["thesis"].dropna()) == sorted(printed["value"])
    assert not {",", ", "} & set(table(NOTHING, name).to_numpy().ravel())


def test_figures_are_means_with_their_spread_in_the_thesis_unit():
    of = classified("B8", "fine-tuned", [0.95, 0.96, 0.97])
    row = beside(of, "4.3").query("mask == 'B8' and method == 'fine-tuned'").iloc[0]
    assert (row["ours"], row["sd"], row["runs"]) == (pytest.approx(96), pytest.approx(1), 3)
    steps = [0.1] + [0.7 + 0.01 * epoch for epoch in range(1, 21)]
    of = pd.concat([curve("B8", steps, method="fine-tuned"), classified("B8", "fine-tuned", [0.9, 0.92])])
    shown = table(of, "A.3").query("mask == 'B8'").iloc[0]
    cells = ["val ep 1: ours", "val ep 20: ours", "test: ours", "val ep 10: thesis"]
    assert shown[cells].tolist() == ["72.00 ± 1.00", "91.00 ± 1.00", "91.00 ± 1.41", "96.20"]
    one = table(classified("B8", "fine-tuned", [0.96]), "4.3").query("mask == 'B8'").iloc[0]
    assert one["fine-tuned: ours"] == "96.00"  # one run has no spread


def test_the_nearest_epoch_stands_where_ours_were_shorter_and_the_nearest_length_counts():
    short = history("B8", falling(2.0, 6), runs=1)
    shown = table(short, "4.1").query("mask == 'B8 [d]'").iloc[0]
    assert [shown[f"val ep {epoch}: ours"][-6:] for epoch in (8, 15)] == ["(ep 6)", "(ep 6)"]
    both = pd.concat([short, history("B8", falling(3.0, 15), runs=1, experiment="long")])
    assert beside(both, "4.1").query("mask == 'B8'")["our_epoch"].tolist()[:3] == [1, 8, 15]
    runs = [classified("B8", "fine-tuned", [0.5, 0.6]), classified("B8", "fine-tuned", [0.9], experiment="again")]
    row = beside(pd.concat(runs), "4.3").query("mask == 'B8' and method == 'fine-tuned'").iloc[0]
    assert (row["ours"], row["runs"]) == (pytest.approx(55), 2)  # two experiments are not pooled


def test_settings_schemes_and_heads_find_their_own_runs():
    parts = [
        history("B8", [1.0, 0.9], runs=1),
        history("B8", [1.0, 0.8], runs=1, schedule="gradual", ratio=0.8, experiment="g"),
        history("B8", [1.0, 0.7], runs=1, schedule="gradual", ratio=0.9, experiment="another end"),
        history("B8", [1.0, 0.6], runs=1, ratio=1.0, experiment="r"),
        history("B8", [1.0, 0.5], runs=1, mask_value="-1", experiment="v"),
        classified("B8", "pre-trained", [0.5]),
        classified("B8", "pre-trained", [0.1], protocol="kept"),
        rows([0.6], mask="B8", method="pre-trained", scheme="position", bands="B08"),
        classified("none", "pre-trained", [0.9], protocol="complete"),
    ]
    of = pd.concat(parts)
    ours = beside(of, "A.5").query("mask == 'B8'").groupby("schedule")["ours"].first()
    assert (ours["constant"], ours["gradual"], np.isnan(ours["staircase"])) == (0.9, 0.8, True)
    assert beside(of, "A.6").query("mask == 'B8'")["ours"].iloc[0] == 0.6
    for scheme, value in (("named", 50), ("position", 60)):
        found = beside(of, "4.3", scheme=scheme)
        assert found.query("mask == 'B8' and method == 'pre-trained'")["ours"].tolist() == [pytest.approx(value)]
        assert found["ours"].iloc[0] == pytest.approx(90)  # complete images belong to both
    with pytest.raises(ValueError, match="several encoders: tiny, other"):
        table(pd.concat([of, of.assign(encoder="other")]), "4.3")


def test_only_runs_of_its_encoder_on_its_data_stand_in_the_thesis_tables():
    grid = whole_grid()
    assert thesis.comparable(grid) == thesis.comparable(grid.assign(encoder=thesis.ENCODER)) == []
    same = grid.assign(encoder=thesis.ENCODER, dataset=grid["task"].map(thesis.DATA))
    assert thesis.comparable(same) == list(TABLES)
    on_eurosat = same[same["task"] != "segmentation"]
    assert thesis.comparable(on_eurosat) == [name for name in TABLES if name != "4.4"]
    assert thesis.comparable(same.assign(encoder="stand-in resnet18")) == []


def test_selection_keeps_one_setting_and_the_complete_reference():
    table = joined(
        rows([0.1], mask="B8"),
        rows([0.2], mask="B8", ratio=1.0),
        rows([0.3], mask="B8", schedule="gradual"),
        rows([0.4], mask="B8", scheme="position"),
        rows([0.5], mask="B8", mask_value="-1"),
        rows([0.6], mask="none", ratio=0.5, scheme="position", mask_value="0"),
        rows([0.7], mask="B2", schedule=None, shape=None),  # written before schedules and shapes were kept
        rows([0.8], mask="B8", shape="stripe"),
    )
    assert select(table)["value"].tolist() == [0.1, 0.6, 0.7]
    assert select(table, variants=True)["value"].tolist() == [0.1, 0.2, 0.3, 0.6, 0.7]
    assert select(table, scheme="position")["value"].tolist() == [0.4, 0.6]
    for column in ("encoder", "dataset"):
        several = pd.concat([rows([0.1]), rows([0.2], **{column: "another"})])
        with pytest.raises(ValueError, match=rf"classification results are of several {column}s: .*another.*table\["):
            select(several)
        assert len(select(pd.concat([rows([0.1]), rows([0.2], task="segmentation", **{column: "another"})]))) == 2


def test_the_same_runs_of_two_experiments_count_once():
    table = joined(
        rows([0.1, 0.2], experiment="one"),
        rows([0.3], experiment="two"),
        rows([0.4], experiment="two", mask="B2"),
        rows([0.5], experiment="one", mask="none", ratio=0.9),
        rows([0.6], experiment="two", mask="none", ratio=0.8, schedule="gradual"),
        rows([0.7], experiment="two", ratio=0.8),
    )
    assert first_experiment(table)["value"].tolist() == [0.1, 0.2, 0.4, 0.5, 0.7]
