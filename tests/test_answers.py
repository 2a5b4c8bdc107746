"""Answers say what the numbers say: figure, interval, verdict, and what is missing; ridge is never left out."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import numpy as np
import pandas as pd
import pytest
from predictions import curve, history, pixels_of, predictions_of

from bandmask.comparison import paired_difference
from bandmask.report.answers import METRICS, QUESTIONS, Answer, answers
from bandmask.report.learning import converges, learns
from bandmask.report.sentences import decision, interval_text, signed, tally, with_interval
from bandmask.resampling import interval, resample

pytestmark = pytest.mark.filterwarnings("error")

CHANCES = {"pre-trained": 0.4, "ridge": 0.75, "fine-tuned": 0.7}
NO_PREDICTIONS = predictions_of(np.ones((1, 1), bool), "ridge").iloc[:0]


def classified(masks: tuple[str, ...] = ("B8", "B2 B3 B4"), images: int = 150, heads: int = 3) -> pd.DataFrame:
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
                seeds = (0, 1) if method == "fine-tuned" else (None,)
                of = {"mask": mask, "protocol": protocol}
                parts += [predictions_of(right(chance), method, encoder_seed=seed, **of) for seed in seeds]
    return pd.concat(parts, ignore_index=True)


def curves(masks: tuple[str, ...] = ("B8", "B2 B3 B4"), task: str = "classification") -> pd.DataFrame:
    """Alignment that falls, heads on the fine-tuned encoder that start lower and learn more slowly."""
    slow, fast = [0.1, 0.5, 0.6, 0.7, 0.8, 0.8], [0.1, 0.8, 0.9, 0.9, 0.9, 0.9]
    parts = [curve("none", fast, method="pre-trained", protocol="complete", task=task)]
    for mask in masks:
        parts.append(history(mask, [3.0, 1.0, 0.4, 0.5], runs=3))
        parts.append(curve(mask, slow, method="fine-tuned", task=task))
    return pd.concat(parts, ignore_index=True)


def ask(table: pd.DataFrame, predictions: dict[str, pd.DataFrame], **options: Any) -> list[Answer]:
    """Answers for the tasks that have predictions."""
    return answers(table, predictions, **{"tasks": list(predictions), **options})


def only(found: list[Answer], question: str, comparison: str = "", protocol: str = "retrained", **more: str) -> Answer:
    chosen = [a for a in found if a.question == question and comparison in a.comparison]
    chosen = [a for a in chosen if a.protocol in ("", protocol) and all(getattr(a, k) == v for k, v in more.items())]
    assert len(chosen) == 1
    return chosen[0]


# --- on a whole grid ------------------------------------------------------------------------------------------------


def test_every_question_is_answered_for_each_task_and_protocol_with_ridge():
    found = ask(curves(), {"classification": classified()}, draws=200)
    assert [(a.question, a.protocol, a.comparison) for a in found] == [
        ("RQ0", "", "last epoch − epoch 0"),
        ("RQ1", "retrained", "fine-tuned − pre-trained"),
        ("RQ1", "retrained", "fine-tuned − ridge"),
        ("RQ1", "kept", "fine-tuned − pre-trained"),
        ("RQ1", "kept", "fine-tuned − ridge"),
        ("RQ2", "retrained", "fine-tuned − complete"),
        ("RQ2", "kept", "fine-tuned − complete"),
        ("RQ3", "retrained", "fine-tuned − complete, score after epoch 1"),
        ("RQ3", "retrained", "fine-tuned − complete, epochs to 95 % of the final score"),
        ("main", "retrained", "(fine-tuned − pre-trained) / (complete − pre-trained)"),
        ("main", "retrained", "(ridge − pre-trained) / (complete − pre-trained)"),
        ("main", "kept", "(fine-tuned − pre-trained) / (complete − pre-trained)"),
        ("main", "kept", "(ridge − pre-trained) / (complete − pre-trained)"),
    ]
    assert {a.question for a in found} == set(QUESTIONS)
    assert all(a.decided in ("higher", "lower", "not decided") for a in found)
    assert all(a.low <= a.figure <= a.high for a in found)


def test_figures_are_means_over_masks_of_differences_on_the_same_images():
    table = classified()
    found = only(ask(curves(), {"classification": table}), "RQ1", "fine-tuned − pre-trained")
    expected = paired_difference(table.query("protocol == 'retrained'"), "pre-trained", "fine-tuned", average=True).iloc[0]
    assert found.figure == pytest.approx(expected["difference"])
    assert (found.low, found.high) == pytest.approx((expected["low"], expected["high"]), abs=0.01)  # other draws
    assert found.decided == "higher"


def test_a_sentence_holds_the_figure_the_interval_and_the_verdict():
    found = ask(curves(), {"classification": classified()}, draws=300)
    for answer in found:
        scale, decimals = {"RQ0": (1, 2), "main": (100, 0)}.get(answer.question, (100, 1))
        scale = 1 if "epochs to" in answer.comparison else scale
        plus = answer.question != "main"  # a share has no sign
        assert signed(scale * answer.figure, decimals, plus=plus) in answer.sentence
        assert interval_text(answer.low, answer.high, scale=scale, decimals=decimals, plus=plus) in answer.sentence
        assert ("Not decided" in answer.sentence) == (answer.decided == "not decided")
        assert re.search(r"mean over 2 masks", answer.sentence)
    higher = only(found, "RQ1", "fine-tuned − pre-trained")
    assert "Decided: higher." in higher.sentence
    assert "Higher on 2 of 2 masks (decided on 2), lower on 0 (decided on 0)." in higher.sentence
    lower = only(found, "RQ2")
    assert "Decided: lower." in lower.sentence
    assert "the pre-trained encoder on complete images" in lower.sentence
    assert "ridge imputation" in only(found, "RQ1", "ridge").sentence


def test_methods_that_are_alike_are_not_decided():
    draw = np.random.default_rng(1)
    parts = [predictions_of(draw.random((3, 60)) < 0.9, "pre-trained", mask="none", protocol="complete")]
    for method in CHANCES:
        parts.append(predictions_of(draw.random((3, 60)) < 0.6, method))
    found = only(ask(curves(("B8",)), {"classification": pd.concat(parts)}), "RQ1", "fine-tuned − ridge")
    assert found.decided == "not decided"
    assert "Not decided: the interval holds 0." in found.sentence
    assert "mask B8" in found.sentence


def test_recovered_share_is_what_is_won_of_what_was_lost():
    table = classified()
    found = ask(curves(), {"classification": table}, draws=500)
    accuracy = (
        (table["label"] == table["predicted"]).groupby([table["protocol"], table["mask"], table["method"]]).mean()
    )
    complete = accuracy["complete", "none", "pre-trained"]
    for protocol in ("retrained", "kept"):
        of = accuracy[protocol].groupby("method").mean()
        for method in ("fine-tuned", "ridge"):
            share = (of[method] - of["pre-trained"]) / (complete - of["pre-trained"])
            answer = only(found, "main", f"({method}", protocol)
            assert answer.figure == pytest.approx(share)
            assert 0 < answer.low < answer.figure < answer.high
            assert f"wins back {100 * share:.0f} % of it" in answer.sentence
            assert "can be told from what is left" in answer.sentence


def test_recovered_share_is_that_of_gathered_draws():
    table = classified(("B8",), images=40).query("protocol in ('retrained', 'complete') and mask in ('none', 'B8')")
    table = table[(table["protocol"] == "retrained") | (table["mask"] == "none")]
    found = only(ask(curves(("B8",)), {"classification": table}, draws=400), "main", "(ridge")
    sides = {(m, "B8"): table.query("protocol == 'retrained' and method == @m") for m in CHANCES}
    order = [str(m) for m in table.query("protocol == 'retrained'")["method"].unique()]
    sides = {(m, "B8"): sides[m, "B8"] for m in sorted(order)}
    sides["complete", ""] = table.query("protocol == 'complete'")
    drawn = {m: side.draws for (m, _), side in resample(sides, draws=400).items()}
    share = (drawn["ridge"] - drawn["pre-trained"]) / (drawn["complete"] - drawn["pre-trained"])
    assert (found.low, found.high) == pytest.approx(interval(share), abs=0.03)


def test_where_nothing_was_lost_nothing_is_won_back():
    right = np.random.default_rng(2).random((3, 60)) < 0.8
    parts = [predictions_of(right, "pre-trained", mask="none", protocol="complete")]
    parts += [predictions_of(right, method) for method in CHANCES]
    found = only(ask(curves(("B8",)), {"classification": pd.concat(parts)}), "main", "(fine-tuned")
    assert found.decided == "not decided"
    assert np.isnan(found.figure)
    assert "that need not be a loss" in found.sentence


def test_segmentation_is_answered_by_accuracy_and_miou_over_scenes():
    parts = [pixels_of("pre-trained", 0.9, mask="none", protocol="complete", seed=7)]
    for place, (method, chance) in enumerate(CHANCES.items()):
        parts.append(pixels_of(method, chance, seed=place))
        parts.append(pixels_of(method, chance, protocol="kept", seed=place + 10))
    ious = [curve("B8", [0.1], task="segmentation", metric=f"iou {name}") for name in "abcd"]  # d never occurs
    table = pd.concat([curves(("B8",), "segmentation"), *ious])
    found = ask(table, {"segmentation": pd.concat(parts)}, draws=300)
    assert {a.metric for a in found if a.question == "RQ1"} == set(METRICS["segmentation"])
    for metric in METRICS["segmentation"]:
        assert only(found, "RQ1", "pre-trained", metric=metric).decided == "higher"
        assert only(found, "RQ2", metric=metric).decided == "lower"
    assert "mIoU over all classes" in only(found, "RQ1", "ridge", metric="miou_all").sentence
    assert only(found, "RQ3", "score after", metric="miou_all").decided == "not answered"  # its curve was not kept


def test_answers_are_the_same_each_time_and_make_a_table():
    table = {"classification": classified(images=60)}
    first, again = ask(curves(), table, draws=100), ask(curves(), table, draws=100)
    assert first == again
    frame = pd.DataFrame(map(dataclasses.asdict, first))
    assert frame["sentence"].str.endswith(".").all()
    other = ask(curves(), table, draws=100, seed=1)
    assert [a.figure for a in other] == [a.figure for a in first]
    assert [a.low for a in other] != [a.low for a in first]


# --- on half a grid -------------------------------------------------------------------------------------------------


def test_nothing_at_all_is_not_answered_and_says_what_to_run():
    nothing = curves().iloc[:0]
    found = ask(nothing, {"classification": NO_PREDICTIONS, "segmentation": NO_PREDICTIONS}, masks=["none", "B8"])
    assert {a.decided for a in found} == {"not answered"}
    assert all(np.isnan(a.figure) for a in found)
    assert all(re.search(r"not answered, there is no .*(03_fine|04_scene|05_image)", a.sentence) for a in found)
    assert only(ask(nothing, {}), "RQ0").decided == "not answered"
    some = answers(curves(), {"classification": classified(images=20)}, draws=20)  # both tasks should be there
    idle = [a for a in some if a.task == "segmentation"]
    assert [a.question for a in idle] == ["RQ1", "RQ2", "RQ3", "main"]  # once each, not for each metric and protocol
    assert [a.question for a in some] == sorted([a.question for a in some], key=list(QUESTIONS).index)


@pytest.mark.parametrize(
    ("lacks", "question", "comparison", "said"),
    [
        ("method == 'ridge'", "RQ1", "fine-tuned − ridge", "there is no run of ridge imputation"),
        ("method == 'ridge'", "main", "(ridge", "there is no run of ridge imputation"),
        ("method == 'fine-tuned'", "RQ1", "fine-tuned − pre-trained", "there is no run of the fine-tuned encoder"),
        ("protocol == 'complete'", "RQ2", "", r"on complete images \(mask none\)"),
        ("protocol == 'complete'", "main", "(fine-tuned", r"on complete images \(mask none\)"),
    ],
)
def test_what_can_not_be_answered_says_which_run_is_missing(lacks: str, question: str, comparison: str, said: str):
    table = classified(images=40).query(f"not ({lacks})")
    found = ask(curves(), {"classification": table}, draws=50)
    answer = only(found, question, comparison)
    assert answer.decided == "not answered"
    assert re.search(said, answer.sentence)
    assert "04_scene_classification" in answer.sentence
    assert only(found, "RQ0").decided == "lower"  # the rest is answered


def test_masks_without_runs_are_named_and_left_out():
    table = classified(images=40)
    table = table[~((table["mask"] == "B8") & (table["method"] == "ridge"))]
    masks = ["none", "B8", "B2 B3 B4", "B11"]
    found = ask(curves(), {"classification": table}, masks=masks, draws=50)
    ridge, tuned = only(found, "RQ1", "ridge"), only(found, "RQ1", "fine-tuned − pre-trained")
    assert "Left out until 04_scene_classification has run for them: B8, B11." in ridge.sentence
    assert "mask B2 B3 B4" in ridge.sentence
    assert "Left out until 04_scene_classification has run for them: B11." in tuned.sentence
    assert "Left out until 03_fine_tuning has run for them: B11." in only(found, "RQ0").sentence
    assert "Left out" not in only(ask(curves(), {"classification": classified(images=40)}, draws=50), "RQ0").sentence


def test_one_run_each_is_said_to_be_one():
    table = classified(heads=1, images=60)
    table = table[table["encoder_seed"].fillna(0) != 1]
    found = ask(curves(), {"classification": table}, draws=50)
    assert "Some have one run, so the interval is over images alone there." in only(found, "RQ1", "ridge").sentence
    assert "one run" not in only(ask(curves(), {"classification": classified()}, draws=50), "RQ1", "ridge").sentence


def test_another_scheme_answers_from_its_own_runs():
    named, position = classified(images=40), classified(images=40)
    position.loc[position["protocol"] != "complete", "scheme"] = "position"
    table = pd.concat([named[named["mask"] == "none"], position[position["mask"] != "none"]])
    found = ask(curves(), {"classification": table}, scheme="position", draws=50)
    assert only(found, "RQ2").decided == "lower"
    assert only(found, "RQ0").decided == "not answered"  # its alignment has not run


def test_results_of_several_encoders_are_an_error():
    table = pd.concat([curves(), curves().assign(encoder="other")])
    with pytest.raises(ValueError, match="several encoders"):
        ask(table, {"classification": classified(images=20)})


# --- curves ---------------------------------------------------------------------------------------------------------


def test_alignment_falls_from_the_pre_trained_encoder_to_the_last_epoch():
    rows = pd.concat([history("B8", [3.0, 1.0, 0.4], runs=3), history("B2", [1.0, 0.5, 0.6], runs=3)])
    found = converges(rows)
    assert found.figure == pytest.approx((-2.6 - 0.4) / 2)
    assert "from 2.02 with the pre-trained encoder to 0.52" in found.sentence
    assert "lower on 2 (decided on 2)" in found.sentence
    assert "On 1 of 2 the lowest loss came before the last epoch." in found.sentence
    assert found.decided == "lower"
    assert "Decided: lower, the alignment is learnt." in found.sentence


def test_one_encoder_says_nothing_of_others_but_three_masks_do():
    masks = {"B2": [1.0, 0.4], "B8": [2.0, 0.5], "B11": [3.0, 0.6]}
    one = pd.concat([history(mask, losses, runs=1) for mask, losses in masks.items()])
    found = converges(one[one["mask"] != "B11"])
    assert found.decided == "not decided"
    assert "(one run: no interval)" in found.sentence
    assert np.isnan(found.low)
    three = converges(one)
    assert three.decided == "lower"
    assert "masks are drawn anew, because some have one encoder" in three.sentence
    assert "drawn" not in found.sentence
    assert (three.low, three.high) == pytest.approx((-2.4, -0.6))


def test_alignment_that_does_not_fall_is_not_said_to_be_learnt():
    found = converges(history("B8", [1.0, 1.2, 1.4], runs=3))
    assert found.decided == "higher"
    assert "learnt" not in found.sentence
    assert converges(history("B8", [1.0], runs=3)).decided == "not answered"  # epoch 0 alone


def test_learning_curves_are_compared_by_start_and_speed():
    start, speed = learns(curves(), "classification", "overall_accuracy")
    assert start.figure == pytest.approx(-0.3)
    assert "51.0 against 81.0" in start.sentence
    assert start.decided == "lower"
    assert speed.figure == pytest.approx(4 - 2)  # 0.8 · 0.95 = 0.76 at epoch 4; 0.9 · 0.95 = 0.855 at epoch 2
    assert "Decided: slower." in speed.sentence
    assert speed.decided == "higher"


@pytest.mark.parametrize("lacks", ["complete", "retrained"])
def test_learning_curves_that_are_missing_are_named(lacks: str):
    rows = curves()
    found = learns(rows[rows["protocol"] != lacks], "classification", "overall_accuracy")
    assert [a.decided for a in found] == ["not answered"] * 2
    assert ("mask none" in found[0].sentence) == (lacks == "complete")
    assert ("fine-tuned" in found[0].sentence) == (lacks == "retrained")


# --- words ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "text"), [(1.26, "+1.3"), (-1.26, "−1.3"), (0.04, "0.0"), (-0.04, "0.0"), (0.0, "0.0")]
)
def test_signs(value: float, text: str):
    assert signed(value) == text


def test_words_follow_the_verdict():
    nan = float("nan")
    assert decision("not decided", nan) == "Not decided: one run says nothing of others."
    assert decision("lower", -1, lower="faster") == "Decided: faster."
    assert interval_text(nan, nan) == "(one run: no interval)"
    assert interval_text(-0.012, 0.034, scale=100) == "(95 % interval −1.2 to +3.4)"
    verdicts = ["higher", "not decided", "not decided"]
    assert tally([0.1, -0.2, 0.0], verdicts) == "Higher on 1 of 3 masks (decided on 1), lower on 1 (decided on 0)."


def test_the_questions_are_the_thesis_own():
    assert list(QUESTIONS) == ["RQ0", "RQ1", "RQ2", "RQ3", "main"]
    assert all(question.endswith("?") for question in QUESTIONS.values())


def test_a_figure_with_its_interval_has_typographic_signs_and_none_on_zero():
    assert with_interval(1.24, -0.31, 2.7) == "+1.2 [−0.3, +2.7]"
    assert with_interval(-0.04, -1.0, 0.02) == "0.0 [−1.0, 0.0]"
    assert with_interval(81.2, 75.5, 86.5, plus=False) == "81.2 [75.5, 86.5]"
    assert with_interval(0.0123, -0.0004, 0.02, 3) == "+0.012 [0.000, +0.020]"
