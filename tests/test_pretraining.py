"""The stand-in learns from complete training images alone, and can be repeated and resumed exactly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from models import Run, assert_same_run, generated_pack, same_weights, stop_at, tiny_encoder
from torch import Tensor

from bandmask import pretraining
from bandmask.packs import Pack
from bandmask.pretraining import pretrain_stand_in
from bandmask.training import Compute

CPU = Compute.of("cpu")


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Pack:
    return generated_pack(tmp_path_factory.mktemp("packs") / "generated", train=64, val=16)


def pretrain(pack: Pack, **options: Any) -> Run:
    model = tiny_encoder(seed=3)
    defaults = {"epochs": 3, "batch_size": 16, "image_size": 32, "crop_size": 32, "compute": CPU, "progress": False}
    history = pretrain_stand_in(model, pack, **{**defaults, **options})
    return model, history


@pytest.fixture(scope="module")
def stand_in(pack: Pack) -> Run:
    return pretrain(pack)


def test_stand_in_learns(stand_in: Run):
    model, history = stand_in
    assert history["train_loss"].iloc[-1] < 0.8 * history["train_loss"].iloc[1]
    assert not same_weights(model, tiny_encoder(seed=3))
    assert not model.training


def test_stand_in_is_deterministic_and_sees_only_training_images(pack: Pack, stand_in: Run, tmp_path: Path):
    torch.manual_seed(999)
    other = generated_pack(tmp_path / "other", train=64, val=16, spoiled=["val", "test"])
    assert_same_run(pretrain(other), stand_in)


def test_stand_in_of_another_seed_is_another(pack: Pack, stand_in: Run):
    _, history = pretrain(pack, seed=1)
    assert (history["train_loss"].iloc[1:] != stand_in[1]["train_loss"].iloc[1:]).all()


def test_stand_ins_crops_depend_on_the_seed(pack: Pack, monkeypatch: pytest.MonkeyPatch):
    """Two seeds are two draws of everything: crops too, though kornia takes them from torch's own generator."""

    def crops(seed: int) -> list[Tensor]:
        import kornia.augmentation

        found, original = [], kornia.augmentation.RandomResizedCrop.forward

        def forward(self: Any, images: Tensor, *arguments: Any, **options: Any) -> Tensor:
            out = original(self, images, *arguments, **options)
            found.append(self._params["src"].clone())
            return out

        with monkeypatch.context() as patched:
            patched.setattr(kornia.augmentation.RandomResizedCrop, "forward", forward)
            pretrain(pack, epochs=1, seed=seed)
        return found

    first, again, other = crops(0), crops(0), crops(1)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_stand_in_resumes_to_the_same_figures(
    pack: Pack, stand_in: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Crops, brightness and the learning rate of an epoch depend on its number, not on what ran before."""
    checkpoint = tmp_path / "last.ckpt"
    with monkeypatch.context() as patched:
        stop_at(patched, pretraining, 7)  # in the second epoch of four batches each
        with pytest.raises(KeyboardInterrupt):
            pretrain(pack, checkpoint=checkpoint)
    assert_same_run(pretrain(pack, checkpoint=checkpoint), stand_in)
