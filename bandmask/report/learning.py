"""Answers that learning curves give: does the alignment converge (RQ0), how fast do heads learn (RQ3)?

Intervals are over runs alone; the curves were watched on validation images.
"""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from bandmask.comparison import difference_of_runs, verdict
from bandmask.report.sentences import (
    METRIC_NAMES,
    NAN,
    Answer,
    decision,
    interval_text,
    masks_text,
    signed,
    tally,
    without,
)
from bandmask.results import MAKERS, mask_order

_REACHED = 0.95  # of a run's own final value


def converges(rows: pd.DataFrame, masks: Sequence[str] = (), *, draws: int = 2000, seed: int = 0) -> Answer:
    """RQ0: validation loss at the last epoch minus that of the pre-trained encoder (epoch 0).

    Args:
        rows: results of one setting, alignment among them.
        masks: mask sets that should be there.
        draws: of the bootstrap over encoders; where each mask has one, over masks, if there are three or more.
        seed: of the draws.
    """
    rows = rows[(rows["task"] == "alignment") & (rows["metric"] == "val_loss") & (rows["mask"] != "none")]
    curves = {mask: _by_run(rows[rows["mask"] == mask]) for mask in mask_order(rows["mask"])}
    curves = {mask: curve for mask, curve in curves.items() if 0 in curve and len(curve.columns) > 1}
    about = ("RQ0", "alignment", "", "val_loss", "last epoch − epoch 0")
    absent = without(list(curves), mask_order([*masks, *curves]), MAKERS["alignment"])
    if not curves:
        return Answer(*about, f"Alignment: not answered, there is no run; {MAKERS['alignment']} makes them.")
    falls = [curve.iloc[:, -1] - curve[0] for curve in curves.values()]
    over = "; encoders are drawn anew" if min(map(len, falls)) > 1 else ""
    if min(map(len, falls)) < 2 and len(falls) >= 3:
        over = "; masks are drawn anew, because some have one encoder"
        means = pd.Series([fall.mean() for fall in falls], list(curves))
        figure, low, high = difference_of_runs([means], draws=draws, seed=seed)
    else:
        figure, low, high = _difference(falls, (), draws, seed)
    each = [_difference([fall], (), draws, seed) for fall in falls]
    decided = verdict(low, high)
    first, last = (
        sum(float(curve.iloc[:, place].mean()) for curve in curves.values()) / len(curves) for place in (0, -1)
    )
    early = sum(curve.mean().idxmin() != curve.columns[-1] for curve in curves.values())
    sentence = (
        f"Alignment: fine-tuning changes the validation loss by {signed(figure, 2)} "
        f"{interval_text(low, high, decimals=2)}, from {first:.2f} with the pre-trained encoder to {last:.2f} after "
        f"the last epoch, {masks_text(list(curves))}{over}. "
        f"{decision(decided, low, lower='lower, the alignment is learnt')} "
        f"{tally([f for f, _, _ in each], [verdict(lo, hi) for _, lo, hi in each])} "
        f"On {early} of {len(curves)} the lowest loss came before the last epoch."
    )
    return Answer(*about, sentence + absent, figure, low, high, decided)


def learns(
    rows: pd.DataFrame, task: str, metric: str, masks: Sequence[str] = (), *, draws: int = 2000, seed: int = 0
) -> list[Answer]:
    """RQ3: heads on fine-tuned encoders and incomplete images against heads on the pre-trained one and complete images.

    Args:
        rows: results of one setting, with validation scores along the epochs.
        task: classification or segmentation.
        metric: that was watched.
        masks: mask sets that should be there.
        draws: of the bootstrap over runs.
        seed: of the draws.

    Returns:
        Two answers: the score after one epoch, and the epochs that 95 % of a run's own final score takes.
    """
    rows = rows[(rows["task"] == task) & (rows["metric"] == metric) & (rows["split"] == "val") & (rows["epoch"] > 0)]
    control = _by_run(rows[(rows["protocol"] == "complete") & (rows["method"] == "pre-trained")])
    tuned = rows[(rows["protocol"] == "retrained") & (rows["method"] == "fine-tuned")]
    curves = {mask: _by_run(tuned[tuned["mask"] == mask]) for mask in mask_order(tuned["mask"])}
    about = "RQ3", task, "retrained", metric
    names = "fine-tuned − complete, score after epoch 1", "fine-tuned − complete, epochs to 95 % of the final score"
    if not curves or control.empty:
        lacking = "complete images (mask none)" if control.empty else "the fine-tuned encoder"
        what = f"{task.capitalize()}: not answered, there is no learning curve on {lacking}; {MAKERS[task]} makes it."
        return [Answer(*about, name, what) for name in names]
    absent = without(list(curves), mask_order([*masks, *curves]), MAKERS[task])
    out = []
    for name, measure, scale, unit, when, words in (
        (names[0], _first, 100, f"points of validation {METRIC_NAMES[metric]}", "After one epoch", ("higher", "lower")),
        (names[1], _epochs_to, 1, "epochs", "To reach 95 % of their final score", ("slower", "faster")),
    ):
        after, before = [measure(curve) for curve in curves.values()], measure(control)
        figure, low, high = _difference(after, [before], draws, seed)
        each = [_difference([values], [before], draws, seed) for values in after]
        ours, theirs = sum(float(values.mean()) for values in after) / len(after), float(before.mean())
        decided = verdict(low, high)
        sentence = (
            f"{task.capitalize()}, heads trained on incomplete images with the fine-tuned encoder, against heads on "
            f"complete images with the pre-trained one. {when}, the difference is {signed(scale * figure)} {unit} "
            f"{interval_text(low, high, scale=scale)}: {scale * ours:.1f} against {scale * theirs:.1f}, "
            f"{masks_text(list(curves))}. {decision(decided, low, higher=words[0], lower=words[1])} "
            f"{tally([f for f, _, _ in each], [verdict(lo, hi) for _, lo, hi in each])}"
        )
        out.append(Answer(*about, name, sentence + absent, figure, low, high, decided))
    return out


def _first(curve: pd.DataFrame) -> pd.Series:
    """Score of each run after its first epoch."""
    return curve.iloc[:, 0]


def _by_run(curve: pd.DataFrame) -> pd.DataFrame:
    """A row a run, a column an epoch, in order."""
    seeds = {name: curve[name].astype("Int64").fillna(-1) for name in ("encoder_seed", "head_seed")}
    return curve.assign(**seeds).pivot_table(index=list(seeds), columns="epoch", values="value").sort_index(axis=1)


def _epochs_to(curve: pd.DataFrame) -> pd.Series:
    """First epoch at which each run has most of its own final score."""
    reached = curve.ge(_REACHED * curve.iloc[:, -1], axis=0)
    return reached.idxmax(axis=1).astype(float)


def _difference(
    after: Sequence[pd.Series], before: Sequence[pd.Series], draws: int, seed: int
) -> tuple[float, float, float]:
    """As `difference_of_runs`; without an interval where a side has one run, which resampling would not move."""
    figure, low, high = difference_of_runs(after, before, draws=draws, seed=seed)
    single = min(len(values) for values in (*after, *before)) < 2
    return (figure, NAN, NAN) if single else (figure, low, high)
