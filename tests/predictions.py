"""Generated predictions and results tables for the tests of comparisons, tables and answers."""

from typing import Any

import numpy as np
import pandas as pd

from bandmask.results import tidy

COMMON = {
    "experiment": "test",
    "dataset": "generated",
    "encoder": "tiny",
    "mask": "B8",
    "scheme": "named",
    "bands": "B08",
    "ratio": 0.9,
    "mask_value": "dataset_mean",
    "schedule": "constant",
    "shape": "pixel",
    "task": "classification",
    "protocol": "retrained",
    "method": "fine-tuned",
    "split": "test",
    "metric": "overall_accuracy",
}


def joined(*parts: pd.DataFrame) -> pd.DataFrame:
    return pd.concat(parts, ignore_index=True)


def rows(values: list[float], **changes: Any) -> pd.DataFrame:
    """One run a value."""
    return tidy([{"head_seed": seed, "value": value} for seed, value in enumerate(values)], **{**COMMON, **changes})


def curve(mask, scores, runs=3, seed="head_seed", step=0.01, **changes) -> pd.DataFrame:
    """Validation scores by epoch from 0 on, of heads that differ by 0.01."""
    every = [(run, epoch, value) for run in range(runs) for epoch, value in enumerate(scores)]
    measured = [{"epoch": epoch, seed: run, "value": value + step * run} for run, epoch, value in every]
    return tidy(measured, **{**COMMON, "split": "val", "mask": mask, **changes})


def history(mask: str, losses: list[float], runs: int = 2, **changes: Any) -> pd.DataFrame:
    """Validation losses by epoch from 0 on, of runs that differ by 0.02."""
    shared = {"task": "alignment", "metric": "val_loss", "protocol": None}
    return curve(mask, losses, runs, "encoder_seed", 0.02, **{**shared, **changes})


def predictions_of(right, method, *, encoder_seed=None, classes=4, seed=0, **changes) -> pd.DataFrame:
    """A predictions table from a matrix (heads, images) of what is right."""
    right = np.atleast_2d(right)
    labels = np.random.default_rng(seed).integers(classes, size=right.shape[1])
    sample = 100 + 2 * np.arange(right.shape[1])  # rows of a pack have gaps within a split
    said = [np.where(line, labels, (labels + 1) % classes) for line in right]
    common = {"sample": sample, "label": labels}
    frames = [pd.DataFrame({"head_seed": head, **common, "predicted": each}) for head, each in enumerate(said)]
    described = {"mask": "B8", "scheme": "named", "protocol": "retrained", "method": method, **changes}
    table = pd.concat(frames, ignore_index=True).assign(encoder_seed=encoder_seed, **described)
    return table.astype({"encoder_seed": "Int64"})


def pixels_of(method, share, *, runs=2, images=12, groups=4, classes=3, seed=0, **changes) -> pd.DataFrame:
    """Pixel predictions: each image has 5 to 30 pixels a class, of which about `share` are right; labels are shared."""
    labelled = np.random.default_rng(99).integers(5, 30, (images, classes))
    draw = np.random.default_rng(seed)
    out = []
    for head in range(runs):
        for image in range(images):
            for label in range(classes):
                chances = np.full(classes, (1 - share) / (classes - 1))
                chances[label] = share
                for predicted, count in enumerate(draw.multinomial(labelled[image, label], chances)):
                    cell = {"label": label, "predicted": predicted, "pixels": count}
                    where = {"head_seed": head, "sample": 10 * image, "group": f"scene {image % groups}"}
                    out += [{**where, **cell}] if count else []
    described = {"mask": "B8", "scheme": "named", "protocol": "retrained", "method": method, "encoder_seed": None}
    return pd.DataFrame(out).assign(**{**described, **changes}).astype({"encoder_seed": "Int64"})
