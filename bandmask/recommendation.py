"""For this loss, do this: the cheapest method within one standard error of the best one on validation images.

Chosen on validation images alone, so that its score on test images is an honest one.
Source: Breiman et al. 1984, Classification and Regression Trees, section 3.4.3 (the one-standard-error rule), here
with the standard error of the difference on the same images.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from bandmask.comparison import verdict
from bandmask.resampling import Resampled, interval, resample

COLUMNS = (
    "loss",
    "protocol",
    "recommended",
    "validation",
    "best free",
    "best of all",
    "gain",
    "low",
    "high",
    "sentence",
)


def recommend(
    validation: pd.DataFrame,
    test: pd.DataFrame,
    costs: Mapping[str, float],
    *,
    free: Sequence[str],
    metric: str = "overall_accuracy",
    draws: int = 2000,
    seed: int = 0,
) -> pd.DataFrame:
    """A row for each loss and protocol, with a sentence to go by.

    Args:
        validation: predictions of validation images by every method, with `loss`, `protocol`, `method` and the columns
            that `resampling.resample` takes.
        test: the same of test images, for the gain that the choice brings there.
        costs: of each method, in any one unit; of equal ones the better is taken.
        free: methods that need no training of an encoder; the recommended one is compared with the best of them on
            validation images.
        metric: one of `resampling.METRICS`.
        draws: of the bootstrap.
        seed: of the draws.

    Returns:
        The columns of `COLUMNS`: scores as shares; `gain` is the test score of `recommended` minus that of `best free`,
        with its interval over images and runs.

    Raises:
        ValueError: a method without a cost, or a loss that no free method was measured on.
    """
    methods = list(validation["method"].unique())
    if unknown := sorted(set(methods) - set(costs)):
        raise ValueError(f"no cost is given for {', '.join(unknown)}; given: {', '.join(costs)}")
    options = {"metric": metric, "draws": draws, "seed": seed}
    rows = []
    for (loss, protocol), group in validation.groupby(["loss", "protocol"], sort=False):
        loss, protocol = str(loss), str(protocol)
        if not set(free) & set(group["method"]):
            raise ValueError(
                f"none of the free methods {', '.join(free)} was measured on {loss}, {protocol}; measured: "
                f"{', '.join(group['method'].unique())}"
            )
        scored = _scores(group, **options)
        best = max(scored, key=lambda method: scored[method].value)
        level = [m for m in scored if _level(scored[m], scored[best])]
        chosen = min(level, key=lambda method: (costs[method], -scored[method].value))
        best_free = max((m for m in scored if m in free), key=lambda method: scored[method].value)
        held_out = test[(test["loss"] == loss) & (test["protocol"] == protocol)]
        found = _scores(held_out[held_out["method"].isin({chosen, best_free})], **options)
        gain, low, high = 0.0, 0.0, 0.0
        if chosen != best_free:
            gain = found[chosen].value - found[best_free].value
            low, high = interval(found[chosen].draws - found[best_free].draws)
        values = (loss, protocol, chosen, scored[chosen].value, best_free, best, gain, low, high)
        sentence = _sentence(loss, protocol, chosen, best_free, found[chosen].value, gain, low, high, free)
        rows.append(dict(zip(COLUMNS, (*values, sentence), strict=True)))
    return pd.DataFrame(rows, columns=list(COLUMNS))


def _scores(predictions: pd.DataFrame, **options: object) -> dict[str, Resampled]:
    """Each method's score and its draws; images are drawn alike for all."""
    sides = {(str(method), ""): rows for method, rows in predictions.groupby("method", sort=False)}
    return {side[0]: scored for side, scored in resample(sides, **options).items()}  # type: ignore[arg-type]


def _level(one: Resampled, best: Resampled) -> bool:
    return best.value - one.value <= float(np.std(best.draws - one.draws))


def _sentence(
    loss: str,
    protocol: str,
    chosen: str,
    best_free: str,
    score: float,
    gain: float,
    low: float,
    high: float,
    free: Sequence[str],
) -> str:
    where = "with the head in service" if protocol == "kept" else "with a head trained anew"
    start = f"{loss}, {where}: use {chosen} ({100 * score:.1f} % on test images)"
    if chosen == best_free:
        return f"{start}; no trained encoder is a standard error better on validation images."
    found = f"{100 * gain:+.1f} points [{100 * low:+.1f}, {100 * high:+.1f}] against {best_free}, the best free one"
    if chosen in free:
        return f"{start}; {found}, and cheaper."
    decided = {"higher": "the data decide it", "lower": "worse on test images"}.get(verdict(low, high), "not decided")
    return f"{start}; {found}: {decided}."
