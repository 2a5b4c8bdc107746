"""A run's parameters come down to one thing, whoever asks: the notebook or a rank."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import TINY, same_weights

from bandmask import encoders, masking, params
from bandmask.masking import FITTED, MaskSpec
from bandmask.packs import Pack
from bandmask.training import Compute
from bandmask.tuning import NOTEBOOK, Tuning, complete


@pytest.fixture(scope="module")
def given(sample_pack: Pack) -> dict[str, Any]:
    model = encoders.create_encoder(TINY, embedding_dim=16)
    card = encoders.Card("tiny", TINY, embedding_dim=16, image_size=32)
    encoders.save_encoder(model, card, params.experiment_folder("tuning") / "encoder")
    return {"experiment": "tuning", "image_size": 32, "epochs_one_band": 1, "epochs_several_bands": 2}


def test_parameters_are_the_notebooks_and_only_those():
    defaults = params.declared(NOTEBOOK)
    assert complete({}) == defaults
    assert complete({"lr": 0.5, "head_epochs": 3, "masks": ["B8"]}) == {**defaults, "lr": 0.5}


def test_epochs_follow_the_number_of_bands(given: dict[str, Any]):
    assert Tuning.of({**given, "mask": "B8"}).epochs == 1
    assert Tuning.of({**given, "mask": "none"}).epochs == 1
    assert Tuning.of({**given, "mask": "B2 B3 B4"}).epochs == 2


def test_masks_of_training_and_of_testing(given: dict[str, Any]):
    of_masks = {"mask_value": "-1", "mask_schedule": "gradual", "mask_ratio": 0.8, "mask_shape": "stripe"}
    tuning = Tuning.of({**given, "mask": "B2 B8", **of_masks})
    training = MaskSpec(("B02", "B08"), 0.8, -1.0, "gradual", 0.2, 4, seed=3, shape="stripe")
    assert tuning.spec(3) == training
    assert tuning.spec(3, scheduled=False) == MaskSpec(("B02", "B08"), 0.8, -1.0, seed=3, shape="stripe")
    assert tuning.fill.tolist() == [-1.0] * 13


@pytest.mark.parametrize("value", FITTED)
def test_a_fitted_mask_value_is_made_for_the_masks_bands(value: str, given: dict[str, Any]):
    tuning = Tuning.of({**given, "mask": "B2 B8", "mask_value": value})
    assert callable(tuning.fill)
    assert tuning.fill.bands == tuning.spec(0).bands == ("B02", "B08")
    assert tuning.spec(0).value == value  # which the card of the fine-tuned encoder says
    images = torch.rand(2, 13, 32, 32)
    assert masking.mask_batch(images, torch.arange(2), tuning.spec(0), tuning.fill).isfinite().all()
    assert isinstance(Tuning.of({**given, "mask": "none", "mask_value": value}).fill, torch.Tensor)


def test_runs_with_different_fills_share_no_checkpoint(given: dict[str, Any]):
    first, second = (
        Tuning.of({**given, "mask": "B11", "mask_scheme": "esa", "mask_value": value}).fine_tune(
            0, compute=Compute.of("cpu"), progress=False
        )[0]
        for value in ("dataset_mean", "ridge")
    )
    assert len(list((params.run_folder("tuning", "B11", "esa") / "checkpoints").iterdir())) == 2
    assert not same_weights(first, second)


def test_a_second_one_reads_the_checkpoint_of_the_first(given: dict[str, Any]):
    compute = Compute.of("cpu")
    student, history = Tuning.of(given).fine_tune(0, compute=compute, progress=False)
    read, again = Tuning.of(given).fine_tune(0, compute=compute, progress=False)
    assert same_weights(student, read)
    assert again.equals(history)  # its speed as well: nothing was measured anew
    assert len(list((params.run_folder("tuning", "B8") / "checkpoints").iterdir())) == 1
    other, _ = Tuning.of(given).fine_tune(1, compute=compute, progress=False)
    assert not same_weights(other, read)
    assert not torch.equal(next(student.parameters()), next(Tuning.of(given).teacher.parameters()))
