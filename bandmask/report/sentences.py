"""An answer to a research question, and the words for its figure, its interval and what they decide."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

NAN = float("nan")
METRIC_NAMES = {
    "overall_accuracy": "overall accuracy",
    "macro_accuracy": "macro accuracy",
    "miou_all": "mIoU over all classes",
    "miou_present": "mIoU over present classes",
}


@dataclass(frozen=True)
class Answer:
    """One answer to one question, in one task and protocol.

    Attributes:
        question: RQ0 to RQ3, or main.
        task: alignment, classification or segmentation.
        protocol: retrained (the head is trained on incomplete images) or kept (one trained on complete images stays).
        metric: what the figure is of.
        comparison: what was compared, such as `fine-tuned − ridge`.
        sentence: in words, with figure, interval, what it decides, and what is missing.
        figure: shares (0.01 is one point), losses, or epochs; NaN where nothing could be computed.
        low: end of the 95 % interval, NaN where there is none.
        high: the other end.
        decided: `higher`, `lower`, `not decided` (the interval holds zero, or there is none) or `not answered`.
    """

    question: str
    task: str
    protocol: str
    metric: str
    comparison: str
    sentence: str
    figure: float = NAN
    low: float = NAN
    high: float = NAN
    decided: str = "not answered"


def signed(value: float, decimals: int = 1, *, plus: bool = True) -> str:
    """`+5.6` or `−0.2`; what rounds to zero has no sign."""
    text = f"{value:+.{decimals}f}"
    return text[1:] if float(text) == 0 or (value > 0 and not plus) else text.replace("-", "−")


def with_interval(value: float, low: float, high: float, decimals: int = 1, *, plus: bool = True) -> str:
    """`+1.2 [−0.3, +2.7]`."""
    value_text, *ends = (signed(figure, decimals, plus=plus) for figure in (value, low, high))
    return f"{value_text} [{', '.join(ends)}]"


def interval_text(low: float, high: float, *, scale: float = 1.0, decimals: int = 1, plus: bool = True) -> str:
    """`(95 % interval −0.2 to +1.3)`."""
    if math.isnan(low):
        return "(one run: no interval)"
    ends = [signed(scale * end, decimals, plus=plus) for end in (low, high)]
    return f"(95 % interval {ends[0]} to {ends[1]})"


def masks_text(masks: Sequence[str]) -> str:
    """`mean over 3 masks`, or the one mask."""
    return f"mask {masks[0]}" if len(masks) == 1 else f"mean over {len(masks)} masks"


def decision(decided: str, low: float, *, higher: str = "higher", lower: str = "lower") -> str:
    """`Decided: higher.`; where it isn't, why."""
    if decided == "not decided":
        return (
            "Not decided: one run says nothing of others." if math.isnan(low) else "Not decided: the interval holds 0."
        )
    return f"Decided: {higher if decided == 'higher' else lower}."


def tally(figures: Sequence[float], verdicts: Sequence[str]) -> str:
    """`Higher on 2 of 3 masks (decided on 1), lower on 1 (decided on 0).`"""
    higher, lower = sum(figure > 0 for figure in figures), sum(figure < 0 for figure in figures)
    return (
        f"Higher on {higher} of {len(figures)} masks (decided on {verdicts.count('higher')}), "
        f"lower on {lower} (decided on {verdicts.count('lower')})."
    )


def without(masks: Sequence[str], wanted: Sequence[str], notebook: str) -> str:
    """Which masks an answer is not about, because their runs are missing; empty if there are none."""
    absent = [mask for mask in wanted if mask not in masks]
    return f" Left out until {notebook} has run for them: {', '.join(absent)}." if absent else ""
