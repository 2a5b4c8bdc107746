"""The recommendation is made on validation images alone, prefers what is cheap, and says what test images say of it."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from bandmask.recommendation import COLUMNS, recommend

COSTS = {"mean": 0, "ridge": 1, "tuned": 100}


def predictions(right: dict[str, float], images: int = 400, runs: int = 3, seed: int = 0) -> pd.DataFrame:
    """Generated: each method is right on the given share of images, the same images first for every method."""
    draw = np.random.default_rng(seed)
    hardness = draw.permutation(images) / images
    frames = []
    for method, share in right.items():
        for run in range(runs):
            hit = hardness + draw.normal(0, 0.02, images) < share
            frames.append(
                pd.DataFrame(
                    {
                        "sample": np.arange(images),
                        "label": 1,
                        "predicted": hit.astype(int),
                        "method": method,
                        "encoder_seed": run,
                        "head_seed": 0,
                        "loss": "B8",
                        "protocol": "kept",
                    }
                )
            )
    return pd.concat(frames, ignore_index=True)


def one(validation: dict[str, float], test: dict[str, float] | None = None, **options: object) -> pd.Series:
    found = recommend(
        predictions(validation), predictions(test or validation, seed=1), COSTS, free=("mean", "ridge"), **options
    )
    assert list(found.columns) == list(COLUMNS)
    assert len(found) == 1
    return found.iloc[0]


def test_a_trained_encoder_is_recommended_where_it_is_shown_to_be_better():
    row = one({"mean": 0.3, "ridge": 0.6, "tuned": 0.8})
    assert row["recommended"] == "tuned"
    assert row["best free"] == "ridge"
    assert row["gain"] == pytest.approx(0.2, abs=0.03)
    assert row["low"] > 0.1
    assert "the data decide it" in row["sentence"]


def test_what_is_free_is_recommended_where_nothing_is_shown_to_be_better():
    row = one({"mean": 0.3, "ridge": 0.8, "tuned": 0.802})
    assert row["recommended"] == row["best free"] == "ridge"
    assert row["gain"] == 0
    assert "no trained encoder is a standard error better" in row["sentence"]


def test_the_cheapest_of_level_methods_is_taken():
    row = one({"mean": 0.8, "ridge": 0.8, "tuned": 0.8})
    assert row["recommended"] == "mean"


def test_of_methods_that_cost_the_same_the_better_is_taken():
    costs = {"mean": 0, "ridge": 0, "tuned": 100}
    both = predictions({"mean": 0.795, "ridge": 0.8, "tuned": 0.801})
    (chosen,) = recommend(both, both, costs, free=("mean", "ridge"))["recommended"]
    assert chosen == "ridge"


def test_a_cheaper_method_beyond_one_standard_error_is_not_taken():
    """Two points apart on the same 400 images, where a method's own interval is eight points wide."""
    row = one({"mean": 0.78, "ridge": 0.8})
    assert row["recommended"] == "ridge"


def test_test_images_never_decide_what_is_recommended():
    validation = {"mean": 0.3, "ridge": 0.8, "tuned": 0.5}
    row = one(validation, {"mean": 0.3, "ridge": 0.4, "tuned": 0.9})
    assert row["recommended"] == "ridge"
    assert "(40." in row["sentence"] or "(39." in row["sentence"] or "(41." in row["sentence"]


def test_a_gain_that_does_not_hold_on_test_images_is_said_so():
    row = one({"mean": 0.3, "ridge": 0.6, "tuned": 0.8}, {"mean": 0.3, "ridge": 0.8, "tuned": 0.6})
    assert row["recommended"] == "tuned"
    assert row["high"] < 0
    assert "worse on test images" in row["sentence"]


def test_losses_and_protocols_have_a_row_each():
    table = predictions({"mean": 0.3, "ridge": 0.6})
    both = pd.concat([table, table.assign(protocol="retrained"), table.assign(loss="B2 B3 B4")])
    found = recommend(both, both, COSTS, free=("mean", "ridge"))
    rows = list(zip(found["loss"], found["protocol"], strict=True))
    assert rows == [("B8", "kept"), ("B8", "retrained"), ("B2 B3 B4", "kept")]
    assert "with a head trained anew" in found["sentence"].iloc[1]


def test_missing_costs_and_missing_rivals_are_named():
    table = predictions({"ridge": 0.5, "magic": 0.6})
    with pytest.raises(ValueError, match="no cost is given for magic; given: mean, ridge, tuned"):
        recommend(table, table, COSTS, free=("ridge",))
    with pytest.raises(ValueError, match="none of the free methods mean was measured on B8, kept; measured: ridge"):
        recommend(table[table["method"] == "ridge"], table, COSTS, free=("mean",))
