"""The thesis' research questions, answered in sentences that are computed: figure, interval, and what they decide.

Each figure is a mean over mask sets, all of which are given the same drawn images and seeds; masks are chosen, not
drawn, so an answer speaks of these masks. Source: Petcu 2024, chapter 1 (the questions), §5.1.2 (its own answers).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from bandmask.comparison import complete_runs, first_experiment, select, verdict
from bandmask.report.learning import converges, learns
from bandmask.report.sentences import METRIC_NAMES, Answer, decision, interval_text, masks_text, signed, tally, without
from bandmask.resampling import Resampled, Side, interval, resample
from bandmask.results import MAKERS, mask_order, pixel_classes

QUESTIONS = {
    "RQ0": "Is a fine-tuned encoder able to converge on the task of aligning its embeddings of incomplete images to "
    "the embeddings of the corresponding complete images, sourced from a pre-trained encoder?",
    "RQ1": "Under conditions of incomplete images, does a decoder's performance on a downstream task increase when "
    "using a fine-tuned encoder, compared to using a pre-trained encoder?",
    "RQ2": "How does a decoder's performance on incomplete images, encoded by the fine-tuned encoder, compare to its "
    "performance on complete images, encoded by the pre-trained encoder?",
    "RQ3": "Does using the fine-tuned encoder on incomplete images affect a decoder's learning curve on a downstream "
    "task, compared to using the pre-trained encoder on complete images?",
    "main": "Can the fine-tuned encoder positively influence downstream task performance and enable information "
    "extrapolation under incomplete input conditions of multispectral imagery?",
}
METRICS = {"classification": ("overall_accuracy",), "segmentation": ("overall_accuracy", "miou_all")}
_CALLED = {
    "pre-trained": "the pre-trained encoder",
    "fine-tuned": "the fine-tuned encoder",
    "ridge": "ridge imputation",
    "complete": "the pre-trained encoder on complete images",
}


def answers(
    results: pd.DataFrame,
    predictions: Mapping[str, pd.DataFrame],
    *,
    masks: Sequence[str] = (),
    scheme: str = "named",
    tasks: Sequence[str] = tuple(METRICS),
    metrics: Mapping[str, Sequence[str]] = METRICS,
    draws: int = 2000,
    seed: int = 0,
) -> list[Answer]:
    """Answers to RQ0 to RQ3 and the main question, from whatever runs there are; each says what it lacks.

    RQ1 and the main question are asked of ridge imputation too, which needs no training.

    Args:
        results: collected results of one or more experiments, alignment and learning curves included; one encoder,
            and one data set a task.
        predictions: by task, of one experiment; pixel predictions of a large
            data set go through `comparison.by_group` first.
        masks: mask sets that should be there; without them, those that are found.
        scheme: how mask labels were read.
        tasks: that should be answered for; one without predictions is said to have no run.
        metrics: by task.
        draws: of the bootstrap.
        seed: of the draws.

    Raises:
        ValueError: results of several encoders or data sets, or methods that predicted different images.
    """
    rows = first_experiment(select(results, scheme=scheme))
    wanted = [mask for mask in masks if mask != "none"]
    idle = [task for task in tasks if task not in predictions or predictions[task].empty]
    asked = [(task, metric) for task in tasks if task not in idle for metric in metrics[task]]
    scored = []
    for task, metric in asked:
        found = predictions[task]
        found = found[(found["scheme"] == scheme) | (found["mask"] == "none")]
        classes = pixel_classes(rows) if metric == "miou_all" and task == "segmentation" else None
        for protocol in ("retrained", "kept"):
            sides = _scores(found, protocol, metric, classes, draws, seed)
            names = mask_order([*wanted, *(str(mask) for _, mask in sides if mask)])
            scored.append(Scored(task, protocol, metric, tuple(names), sides))
    answered = [
        converges(rows, wanted, draws=draws, seed=seed),
        *(one.difference("RQ1", rival) for one in scored for rival in ("pre-trained", "ridge")),
        *(one.difference("RQ2", "complete") for one in scored),
        *(one for task, metric in asked for one in learns(rows, task, metric, wanted, draws=draws, seed=seed)),
        *(one.recovered(method) for one in scored for method in ("fine-tuned", "ridge")),
    ]
    for task in idle:
        what = f"{task.capitalize()}: not answered, there is no run; {MAKERS[task]} makes them."
        answered += [Answer(question, task, "", "", "", what) for question in QUESTIONS if question != "RQ0"]
    return sorted(answered, key=lambda one: list(QUESTIONS).index(one.question))


@dataclass(frozen=True)
class Scored:
    """Scores of all methods and masks of one task, protocol and metric, in draws that all of them share.

    Attributes:
        task: classification or segmentation.
        protocol: retrained or kept.
        metric: of the scores.
        wanted: masks that are there or should be.
        sides: by method and mask; `("complete", "")` is the reference of all masks.
    """

    task: str
    protocol: str
    metric: str
    wanted: tuple[str, ...]
    sides: Mapping[Side, Resampled]

    def difference(self, question: str, rival: str) -> Answer:
        """Fine-tuned minus a rival: pre-trained or ridge (RQ1), or complete images (RQ2)."""
        about = (question, self.task, self.protocol, self.metric, f"fine-tuned − {rival}")
        masks = self._masks("fine-tuned", rival)
        if not masks:
            return Answer(*about, self._not_answered("fine-tuned", rival))
        figure, low, high = self._minus(rival, masks)
        each = [self._minus(rival, [mask]) for mask in masks]
        decided = verdict(low, high)
        sentence = (
            f"{self._where} on incomplete images the fine-tuned encoder has {signed(100 * figure)} points of "
            f"{METRIC_NAMES[self.metric]} against {_CALLED[rival]} {interval_text(low, high, scale=100)}, "
            f"{masks_text(masks)}. {decision(decided, low)} "
            f"{tally([f for f, _, _ in each], [verdict(lo, hi) for _, lo, hi in each])}"
        )
        return Answer(*about, sentence + self._limits(masks, "fine-tuned", rival), figure, low, high, decided)

    def recovered(self, method: str) -> Answer:
        """The main question: the share of what the loss of bands costs that a method wins back from what is left."""
        about = ("main", self.task, self.protocol, self.metric, f"({method} − pre-trained) / (complete − pre-trained)")
        masks = self._masks(method, "pre-trained", "complete")
        if not masks:
            return Answer(*about, self._not_answered(method, "pre-trained", "complete"))
        (won, won_drawn), (before, before_drawn), (top, top_drawn) = (
            self._mean(name, masks) for name in (method, "pre-trained", "complete")
        )
        cost = interval(top_drawn - before_drawn)
        lost = (
            f"{self._where} losing bands costs the pre-trained encoder {signed(100 * (top - before), plus=False)} "
            f"points of {METRIC_NAMES[self.metric]} {interval_text(*cost, scale=100, plus=False)}, {masks_text(masks)}."
        )
        limits = self._limits(masks, method, "pre-trained", "complete")
        if cost[0] <= 0:
            none = f" Not decided: that need not be a loss, so {_CALLED[method]} has none to win back for certain."
            return Answer(*about, lost + none + limits, decided="not decided")
        figure, drawn = (won - before) / (top - before), (won_drawn - before_drawn) / (top_drawn - before_drawn)
        low, high = interval(drawn)
        decided = verdict(low, high)
        words = {
            "higher": "part of what was lost can be told from what is left",
            "lower": "it makes it worse",
        }
        sentence = (
            f" {_CALLED[method].capitalize()} wins back {signed(100 * figure, 0, plus=False)} % of it "
            f"{interval_text(low, high, scale=100, decimals=0, plus=False)}. {decision(decided, low, **words)}"
        )
        return Answer(*about, lost + sentence + limits, figure, low, high, decided)

    @property
    def _where(self) -> str:
        return f"{self.task.capitalize()}, {self.protocol} protocol:"

    def _side(self, method: str, mask: str) -> Resampled | None:
        return self.sides.get((method, "" if method == "complete" else mask))

    def _masks(self, *methods: str) -> list[str]:
        """Masks that have runs of all these methods."""
        return [mask for mask in self.wanted if all(self._side(method, mask) for method in methods)]

    def _mean(self, method: str, masks: Sequence[str]) -> tuple[float, np.ndarray]:
        """Mean over masks: of all images, and in each draw."""
        sides = [side for mask in masks if (side := self._side(method, mask))]
        return float(np.mean([side.value for side in sides])), np.mean([side.draws for side in sides], axis=0)

    def _minus(self, rival: str, masks: Sequence[str]) -> tuple[float, float, float]:
        (after, after_drawn), (before, before_drawn) = self._mean("fine-tuned", masks), self._mean(rival, masks)
        return after - before, *interval(after_drawn - before_drawn)

    def _not_answered(self, *methods: str) -> str:
        there = {method for method, _ in self.sides}
        names = [_CALLED[name] + " (mask none)" * (name == "complete") for name in methods if name not in there]
        what = (
            f"there is no run of {' and none of '.join(names)}" if names else "there is no mask with all of these runs"
        )
        return f"{self._where} {METRIC_NAMES[self.metric]} not answered, {what}; {MAKERS[self.task]} makes them."

    def _limits(self, masks: Sequence[str], *methods: str) -> str:
        sides = [side for mask in masks for method in methods if (side := self._side(method, mask))]
        single = (
            " Some have one run, so the interval is over images alone there." if min(s.runs for s in sides) < 2 else ""
        )
        return single + without(masks, self.wanted, MAKERS[self.task])


def _scores(
    predictions: pd.DataFrame, protocol: str, metric: str, classes: int | None, draws: int, seed: int
) -> dict[Side, Resampled]:
    rows = predictions[predictions["protocol"] == protocol]
    frames: dict[Side, pd.DataFrame] = {
        (str(method), str(mask)): group for (mask, method), group in rows.groupby(["mask", "method"], sort=False)
    }
    if len(complete := complete_runs(predictions)):
        frames["complete", ""] = complete
    return resample(frames, metric=metric, classes=classes, draws=draws, seed=seed)
