"""The thesis' numbers stand as printed, ours beside them; questions are answered by figure, interval and verdict."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pandas as pd
import pytest
from predictions import COMMON, curve, history, pixels_of, predictions_of, rows

from bandmask import bands, thesis
from bandmask.results import COLUMNS, export_table, tidy
from bandmask.stats import bootstrap_interval, paired_difference
from bandmask.thesis import TABLES, beside, footnotes, printed_rows, questions, readable, table

pytestmark = pytest.mark.filterwarnings("error")
NOTHING = pd.DataFrame(columns=list(COLUMNS)).astype({"value": float, "ratio": float})


# --- as printed -----------------------------------------------------------------------------------------------------


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


# --- ours beside them -----------------------------------------------------------------------------------------------


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
        for method in ("pre-trained",) if mask == "none" else ("pre-trained", "ridge", "fine-tuned"):
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
def test_a_whole_grid_fills_every_cell_and_without_results_the_thesis_stands_alone(name: str, tmp_path: Any):
    found = beside(whole_grid(), name)
    assert found["ours"].notna().all()
    assert (found["our_epoch"].isna() | (found["our_epoch"] == found["epoch"])).all()
    shown = table(whole_grid(), name)
    ours = shown[[column for column in shown if "ours" in column or "difference" in column]]
    assert not (ours[~shown["mask"].str.startswith("none")] == "–").any(axis=None)
    alone = beside(NOTHING, name)
    assert alone["ours"].isna().all()
    printed = printed_rows().query("table == @name")
    assert sorted(alone["thesis"].dropna()) == sorted(printed["value"])
    export_table(table(NOTHING, name), tmp_path / name)
    assert [path.stat().st_size > 100 for path in tmp_path.iterdir()] == [True] * 3
    assert not {",", ", "} & set(table(NOTHING, name).to_numpy().ravel())


def test_figures_are_means_with_intervals_in_the_thesis_unit():
    values = [0.95, 0.96, 0.97]
    row = beside(classified("B8", "fine-tuned", values), "4.3").query("mask == 'B8' and method == 'fine-tuned'").iloc[0]
    assert row["ours"] == pytest.approx(96)
    assert row["sd"] == pytest.approx(1)
    assert (row["low"], row["high"]) == pytest.approx(bootstrap_interval([95.0, 96.0, 97.0]))
    assert row["difference"] == pytest.approx(96 - row["thesis"])
    assert row["difference_low"] == pytest.approx(row["low"] - row["thesis"])
    steps = [0.1] + [0.7 + 0.01 * epoch for epoch in range(1, 21)]
    of = pd.concat([curve("B8", steps, method="fine-tuned"), classified("B8", "fine-tuned", [0.9, 0.92])])
    shown = table(of, "A.3").query("mask == 'B8'").iloc[0]
    cells = ["val ep 1: ours", "val ep 20: ours", "test: ours", "test: difference", "val ep 10: thesis"]
    assert shown[cells].tolist() == ["72.00 ± 1.00", "91.00 ± 1.00", "91.00 ± 1.41", "−5.00 [−6.00, −4.00]", "96.20"]
    one = table(classified("B8", "fine-tuned", [0.96]), "4.3").query("mask == 'B8'").iloc[0]
    assert one[["fine-tuned: ours", "fine-tuned: difference"]].tolist() == ["96.00", "+0.48"]  # no interval


def test_the_nearest_epoch_stands_where_ours_were_shorter_and_the_nearest_length_counts():
    short = history("B8", falling(2.0, 6), runs=1)
    shown = table(short, "4.1").query("mask == 'B8 [d]'").iloc[0]
    assert [shown[f"val ep {epoch}: ours"][-6:] for epoch in (8, 15)] == ["(ep 6)", "(ep 6)"]
    both = pd.concat([short, history("B8", falling(3.0, 15), runs=1, experiment="long")])
    assert beside(both, "4.1").query("mask == 'B8'")["our_epoch"].tolist()[:3] == [1, 8, 15]
    again = pd.concat([classified("B8", "ridge", [0.5, 0.6]), classified("B8", "ridge", [0.9], experiment="again")])
    row = beside(again, "4.3").query("mask == 'B8' and method == 'ridge'").iloc[0]
    assert (row["ours"], row["runs"]) == (pytest.approx(55), 2)  # two experiments are not pooled


def test_settings_schemes_and_heads_find_their_own_runs():
    parts = [
        history("B8", [1.0, 0.9], runs=1),
        history("B8", [1.0, 0.8], runs=1, schedule="gradual", ratio=0.8, experiment="g"),
        history("B8", [1.0, 0.7], runs=1, schedule="gradual", ratio=0.9, experiment="another end"),
        history("B8", [1.0, 0.6], runs=1, ratio=1.0, experiment="r"),
        history("B8", [1.0, 0.5], runs=1, mask_value="-1", experiment="v"),
        classified("B8", "ridge", [0.5]),
        classified("B8", "ridge", [0.1], protocol="kept"),
        rows([0.6], mask="B8", method="ridge", scheme="position", bands="B08"),
        classified("none", "pre-trained", [0.9], protocol="complete"),
    ]
    of = pd.concat(parts)
    ours = beside(of, "A.5").query("mask == 'B8'").groupby("schedule")["ours"].first()
    assert (ours["constant"], ours["gradual"], np.isnan(ours["staircase"])) == (0.9, 0.8, True)
    assert beside(of, "A.6").query("mask == 'B8'")["ours"].iloc[0] == 0.6
    for scheme, value in (("named", 50), ("position", 60)):
        found = beside(of, "4.3", scheme=scheme)
        assert found.query("mask == 'B8' and method == 'ridge'")["ours"].tolist() == [pytest.approx(value)]
        assert found["ours"].iloc[0] == pytest.approx(90)  # complete images belong to both
    with pytest.raises(ValueError, match="several encoders: tiny, other"):
        table(pd.concat([of, of.assign(encoder="other")]), "4.3")
    with pytest.raises(ValueError, match=r"unknown table '4.5' of the thesis; available: 4.1, 4.2"):
        beside(of, "4.5")


def test_only_runs_of_its_encoder_on_its_data_stand_in_the_thesis_tables():
    grid = whole_grid()
    assert thesis.comparable(grid) == thesis.comparable(grid.assign(encoder=thesis.ENCODER)) == []
    same = grid.assign(encoder=thesis.ENCODER, dataset=grid["task"].map(thesis.DATA))
    assert thesis.comparable(same) == list(TABLES)
    on_eurosat = same[same["task"] != "segmentation"]
    assert thesis.comparable(on_eurosat) == [name for name in TABLES if name != "4.4"]
    assert thesis.comparable(same.assign(encoder="stand-in resnet18")) == []


# --- the research questions -----------------------------------------------------------------------------------------

CHANCES = {"pre-trained": 0.4, "ridge": 0.75, "fine-tuned": 0.7}
MASKS = ("B8", "B2 B3 B4")


def predicted(masks: tuple[str, ...] = MASKS, images: int = 150, heads: int = 3) -> pd.DataFrame:
    """Predictions of all methods and protocols: what an image's difficulty leaves right, generated."""
    draw = np.random.default_rng(0)
    hard = draw.random(images)

    def right(chance: float) -> np.ndarray:
        return hard + draw.normal(0, 0.05, (heads, images)) < chance

    complete = right(0.9)
    parts = [predictions_of(complete, "pre-trained", mask=m, protocol="complete") for m in ("none", *masks)]
    for mask in masks:
        for protocol in ("retrained", "kept"):
            for method, chance in CHANCES.items():
                of = {"mask": mask, "protocol": protocol}
                seeds = (0, 1) if method == "fine-tuned" and heads > 1 else (None,)
                parts += [predictions_of(right(chance), method, encoder_seed=seed, **of) for seed in seeds]
    return pd.concat(parts, ignore_index=True)


def curves(task: str = "classification") -> pd.DataFrame:
    """Alignment that falls, heads on the fine-tuned encoder that start lower and learn more slowly."""
    slow, fast = [0.1, 0.5, 0.6, 0.7, 0.8, 0.8], [0.1, 0.8, 0.9, 0.9, 0.9, 0.9]
    parts = [curve("none", fast, method="pre-trained", protocol="complete", task=task)]
    for mask in MASKS:
        parts += [history(mask, [3.0, 1.0, 0.4, 0.5], runs=3), curve(mask, slow, method="fine-tuned", task=task)]
    return pd.concat(parts, ignore_index=True)


def ask(of: pd.DataFrame, **options: Any) -> pd.DataFrame:
    found = questions(curves(), {"classification": of}, **{"tasks": ["classification"], "draws": 300, **options})
    return found.set_index(["question", "comparison", "protocol"])


def test_every_question_is_answered_by_figure_interval_and_verdict():
    of = predicted()
    found = ask(of)
    assert found.index.get_level_values("question").unique().tolist() == list(thesis.QUESTIONS)
    assert len(found) == 1 + 4 + 2 + 2 + 6
    assert ((found["low"] <= found["figure"]) & (found["figure"] <= found["high"])).all()
    assert (found["masks"] == 2).all()
    kept = of[of["protocol"] == "kept"]
    expected = paired_difference(kept, "pre-trained", "fine-tuned", average=True).iloc[0]
    row = found.loc["RQ1", "fine-tuned − pre-trained", "kept"]
    assert row["figure"] == pytest.approx(100 * expected["difference"])
    assert (row["low"], row["high"]) == pytest.approx((100 * expected["low"], 100 * expected["high"]), abs=1.5)
    assert (row["verdict"], row["higher on"]) == ("higher", 2)
    assert found.loc["RQ2", "fine-tuned − complete", "kept"]["verdict"] == "lower"
    right = (of["label"] == of["predicted"]).groupby([of["protocol"], of["mask"], of["method"]]).mean()
    by_method, complete = right["kept"].groupby("method").mean(), right["complete", "none", "pre-trained"]
    for method in ("fine-tuned", "ridge"):
        share = (by_method[method] - by_method["pre-trained"]) / (complete - by_method["pre-trained"])
        row = found.loc["main", f"({method} − pre-trained) / (complete − pre-trained)", "kept"]
        assert (row["figure"], row["unit"], row["verdict"]) == (pytest.approx(100 * share), "%", "higher")
    cost = found.loc["main", "pre-trained − complete", "kept"]["figure"]
    assert cost == pytest.approx(100 * (by_method["pre-trained"] - complete))
    loss = found.loc["RQ0", "last epoch − epoch 0", ""]
    assert (loss["figure"], loss["verdict"], loss["drawn"]) == (pytest.approx(-2.5), "lower", "encoders")
    first = found.loc["RQ3", "fine-tuned − complete, score after epoch 1", "retrained"]
    slower = found.loc["RQ3", "fine-tuned − complete, epochs to 95 % of the final score", "retrained"]
    assert (first["figure"], slower["figure"]) == pytest.approx((-30, 2))
    text = readable(found.reset_index()).query("comparison == 'pre-trained − complete' and head == 'head kept'").iloc[0]
    assert text["figure [95 %]"].startswith(f"−{-cost:.1f} [−")
    lines = thesis.summary(found.reset_index())
    assert lines["points"].tolist() == list(thesis.SUMMARY.values())
    assert lines["classification, head kept"][0] == text["figure [95 %]"]
    pd.testing.assert_frame_equal(ask(of), found)


def test_where_nothing_is_decided_nothing_is_said_to_be():
    draw = np.random.default_rng(1)
    right = draw.random((3, 60)) < 0.8
    parts = [predictions_of(right, "pre-trained", mask="none", protocol="complete")]
    parts += [
        predictions_of(draw.random((3, 60)) < 0.8 if m == "ridge" else right, m, protocol="kept") for m in CHANCES
    ]
    found = ask(pd.concat(parts))
    assert found.loc["RQ1", "fine-tuned − ridge", "kept"]["verdict"] == "not decided"
    share = found.loc["main", "(fine-tuned − pre-trained) / (complete − pre-trained)", "kept"]
    assert np.isnan(share["figure"])  # what need not be a loss has nothing to win back
    assert share["verdict"] == "not decided"


def test_half_a_grid_says_which_masks_are_missing_and_what_makes_them():
    of = predicted(images=40)
    of = of[~((of["mask"] == "B8") & (of["method"] == "ridge"))]
    found = ask(of, masks=["none", *MASKS, "B11"], draws=50)
    ridge = found.loc["RQ1", "fine-tuned − ridge", "kept"]
    assert (ridge["masks"], ridge["missing"]) == (1, "B8, B11: 04_scene_classification")
    assert found.loc["RQ0", "last epoch − epoch 0", ""]["missing"] == "B11: 03_fine_tuning"
    nothing = questions(NOTHING, {}, masks=["none", "B8"])
    assert set(nothing["verdict"]) == {"no run"}
    assert nothing["figure"].isna().all()
    assert nothing["missing"].str.fullmatch("B8: 0[345]_.*").all()
    assert (readable(nothing)["figure [95 %]"] == "–").all()
    assert ask(predicted(heads=1, images=60), draws=50).loc["RQ1", "fine-tuned − ridge", "kept"]["drawn"] == "images"
    with pytest.raises(ValueError, match="several encoders"):
        questions(pd.concat([curves(), curves().assign(encoder="other")]), {})


def test_losses_of_one_encoder_a_mask_are_drawn_over_masks():
    parts = [history(mask, [3.0, 1.0 - 0.1 * place], runs=1) for place, mask in enumerate(("B2", "B8", "B11"))]
    row = questions(pd.concat(parts), {}, tasks=[]).iloc[0]
    assert (row["figure"], row["drawn"], row["verdict"]) == (pytest.approx(-2.1), "masks", "lower")
    alone = questions(parts[0], {}, tasks=[]).iloc[0]
    assert (alone["figure"], alone["verdict"], np.isnan(alone["low"])) == (pytest.approx(-2.0), "not decided", True)


def test_segmentation_is_asked_by_accuracy_and_miou_over_scenes():
    parts = [pixels_of("pre-trained", 0.9, mask="none", protocol="complete", seed=7)]
    for place, (method, chance) in enumerate(CHANCES.items()):
        parts += [
            pixels_of(method, chance, seed=place + 10 * kept, protocol=("retrained", "kept")[kept]) for kept in (0, 1)
        ]
    ious = [curve("B8", [0.1], task="segmentation", metric=f"iou {name}") for name in "abcd"]  # d never occurs
    of = pd.concat([curves("segmentation"), *ious])
    found = questions(of, {"segmentation": pd.concat(parts)}, tasks=["segmentation"], draws=300)
    accuracy, miou = (
        found[(found["question"] == "RQ1") & (found["metric"] == m)] for m in thesis.METRICS["segmentation"]
    )
    assert accuracy["verdict"].tolist() == miou["verdict"].tolist()
    assert miou["figure"].iloc[0] < accuracy["figure"].iloc[0]  # the class that never occurs counts too
    assert (found[found["question"] == "RQ3"]["verdict"] == "no run").tolist() == [False, False, True, True]
