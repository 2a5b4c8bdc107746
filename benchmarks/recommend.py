"""What `bandmask.results.recommend` looks up, from the records of docs/findings: `python benchmarks/recommend.py`.

Of each loss the cheapest method within one standard error of the best on validation images, so that its score on test
images is an honest one. Source: Breiman et al. 1984, Classification and Regression Trees, section 3.4.3 (the
one-standard-error rule), here with the standard error of the difference on the same images.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from bandmask import files, results, stats

METRICS = {"classification": "overall_accuracy", "segmentation": "miou_present"}
METHODS = {  # of the records, as the package calls them; those that are gone from it are not recommended
    "pre-trained": "dataset_mean",
    "band mean": "band_mean",
    "nearest": "nearest",
    "local": "local",
    "ridge": "ridge",
    "ridge + local": "ridge_local",
    "one for all": "any-band",
    "thesis' method": "fine-tuned",
    "features + distance": "fine-tuned, features and distance",
}
ENCODERS = {"one for all": "any", "thesis' method": "thesis", "features + distance": "features"}
FREE = tuple(method for method in METHODS if method not in ENCODERS)
FOLDER = files.project_root() / "docs" / "findings"


def recommend(
    validation: pd.DataFrame,
    test: pd.DataFrame,
    costs: Mapping[str, float],
    *,
    free: Sequence[str],
    metric: str = "overall_accuracy",
    draws: int = 2000,
) -> pd.DataFrame:
    """A row for each loss and protocol: `recommended`, its test score, and its gain there over `best free`.

    Args:
        validation: predictions of validation images by every method, with `loss`, `protocol`, `method` and the columns
            that `stats.resample` takes.
        test: the same of test images.
        costs: of each method, in any one unit; of equal ones the better is taken.
        free: methods that need no training of an encoder.
        metric: one of `stats.METRICS`.
        draws: of the bootstrap.

    Raises:
        ValueError: a method without a cost, or a loss that no free method was measured on.
    """
    if unknown := sorted(set(validation["method"]) - set(costs)):
        raise ValueError(f"no cost is given for {', '.join(unknown)}; given: {', '.join(costs)}")
    rows = []
    for (loss, protocol), group in validation.groupby(["loss", "protocol"], sort=False):
        scored = scores(group, metric, draws)
        if not set(free) & set(scored):
            raise ValueError(f"no free method was measured on {loss}, {protocol}; measured: {', '.join(scored)}")
        best = max(scored, key=lambda method: scored[method].value)
        level = [m for m, one in scored.items() if is_level(one, scored[best])]
        chosen = min(level, key=lambda method: (costs[method], -scored[method].value))
        best_free = max((m for m in scored if m in free), key=lambda method: scored[method].value)
        held_out = test[(test["loss"] == loss) & (test["protocol"] == protocol)]
        found = scores(held_out[held_out["method"].isin({chosen, best_free})], metric, draws)
        low, high = stats.interval(found[chosen].draws)
        gain_low, gain_high = stats.interval(found[chosen].draws - found[best_free].draws)
        rows.append(
            {
                **{"loss": str(loss), "protocol": str(protocol), "recommended": chosen, "best free": best_free},
                **{"score": found[chosen].value, "score_low": low, "score_high": high},
                "gain": found[chosen].value - found[best_free].value,
                **{"low": gain_low, "high": gain_high, "images": found[chosen].images},
            }
        )
    return pd.DataFrame(rows)


def scores(predictions: pd.DataFrame, metric: str, draws: int) -> dict[str, stats.Resampled]:
    """Each method's score and its draws; images are drawn alike for all."""
    sides: dict[stats.Side, pd.DataFrame] = {
        (str(m), ""): rows for m, rows in predictions.groupby("method", sort=False)
    }
    return {str(side[0]): scored for side, scored in stats.resample(sides, metric=metric, draws=draws).items()}


def is_level(one: stats.Resampled, best: stats.Resampled) -> bool:
    return best.value - one.value <= float(np.std(best.draws - one.draws))


def lookup(task: str, draws: int = 2000) -> pd.DataFrame:
    """Rows of `recommend.csv` for one task."""
    from findings_report import recorded
    from losses import COMPLETE, LOSSES

    table, metric = recorded(task, FOLDER), METRICS[task]
    costs = pd.read_csv(FOLDER / f"{task}_costs.csv").groupby("encoder")[["images_forward", "seconds"]].median()
    complete = table[(table["loss"] == COMPLETE.name) & (table["split"] == "test")]
    (of_complete,) = scores(complete.assign(method=""), metric, 2).values()
    out = []
    for loss in LOSSES:
        known = table[(table["loss"] == loss.name) & table["method"].isin(METHODS)]
        names = {m: f"{e}-{loss.name.replace(' ', '_')}" for m, e in ENCODERS.items()} | {"one for all": "any"}
        spent = {m: costs.loc[name] for m, name in names.items() if name in costs.index}
        price = dict.fromkeys(FREE, 0.0) | {method: float(cost["images_forward"]) for method, cost in spent.items()}
        splits = (known[known["split"] == split] for split in ("val", "test"))
        for row in recommend(*splits, price, free=FREE, metric=metric, draws=draws).to_dict("records"):
            about = {"task": task, "head": row["protocol"], "shape": loss.shape, "measured": " ".join(loss.bands)}
            chosen, cost = row["recommended"], spent.get(row["recommended"])
            out.append(
                {
                    **about,
                    "method": METHODS[chosen],
                    **{"score": row["score"], "low": row["score_low"], "high": row["score_high"]},
                    "complete": of_complete.value,
                    "best_free": METHODS[row["best free"]],
                    **{"gain": row["gain"], "gain_low": row["low"], "gain_high": row["high"]},
                    "images_trained": int(price[chosen]),
                    "seconds": 0.0 if cost is None else float(cost["seconds"]),
                }
            )
    return pd.DataFrame(out)


if __name__ == "__main__":
    everything = pd.concat([lookup(task) for task in METRICS], ignore_index=True).round(4)
    with files.writing(results.RECOMMENDED) as partial:
        everything.to_csv(partial, index=False, lineterminator="\n")
    print(results.RECOMMENDED)
