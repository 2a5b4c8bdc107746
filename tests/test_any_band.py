"""One encoder for every loss: gaps are NaN, complete images pass as they are, and it loads as it was saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import TINY, generated_pack, settled_encoder
from torch import Tensor, nn

from bandmask import alignment, any_band, encoders
from bandmask.alignment import fine_tune
from bandmask.any_band import OBJECTIVE, AnyBandEncoder
from bandmask.draws import AnyMask
from bandmask.imputation import AnyRidge
from bandmask.masking import MaskSpec, hidden_pixels, hide
from bandmask.moments import Moments
from bandmask.objectives import Objective, distance
from bandmask.packs import Pack
from bandmask.training import Compute
from bandmask.views import View, embed_batches

CPU = Compute.of("cpu")


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Pack:
    return generated_pack(tmp_path_factory.mktemp("packs") / "generated", train=64, val=16)


@pytest.fixture(scope="module")
def teacher(pack: Pack) -> nn.Module:
    return settled_encoder(pack)


@pytest.fixture(scope="module")
def moments(pack: Pack) -> Moments:
    return Moments.of(pack)


@pytest.fixture(scope="module")
def images(pack: Pack) -> Tensor:
    return torch.tensor(pack.images[pack.rows("test")].astype(np.float32)) / 10_000


def card() -> encoders.Card:
    return encoders.Card("any band", TINY, embedding_dim=16, image_size=32)


def test_complete_images_give_what_the_checkpoint_gives(teacher: nn.Module, moments: Moments, images: Tensor):
    assert torch.equal(AnyBandEncoder(teacher, moments)(images), teacher(images))


def test_gaps_are_filled_as_in_training(teacher: nn.Module, moments: Moments, images: Tensor):
    mask = AnyMask(seed=3)
    hidden = hidden_pixels(mask, torch.arange(len(images)), (32, 32))
    expected = teacher(hide(images, hidden, mask, AnyRidge(moments)))
    found = AnyBandEncoder(teacher, moments)(images.masked_fill(hidden, torch.nan))
    assert torch.equal(found, expected)


def test_what_says_nothing_is_refused(teacher: nn.Module, moments: Moments, images: Tensor):
    model = AnyBandEncoder(teacher, moments)
    with pytest.raises(ValueError, match=r"B8A.*got \(2, 3, 8, 8\)"):
        model(torch.rand(2, 3, 8, 8))
    empty = images.clone()
    empty[1] = torch.nan
    with pytest.raises(ValueError, match="no value in any band"):
        model(empty)


def test_loads_as_it_was_saved_and_as_a_plain_encoder_too(
    teacher: nn.Module, moments: Moments, images: Tensor, tmp_path: Path
):
    path = any_band.save(teacher, card(), AnyMask(seed=2), moments, tmp_path / "encoder")
    gaps = images.clone()
    gaps[:, 3:9] = torch.nan
    loaded, found = any_band.load(path)
    assert torch.equal(loaded(gaps), AnyBandEncoder(teacher, moments)(gaps))
    assert found.mask is not None
    assert (found.mask["most"], found.mask["seed"]) == (11, 2)
    plain, _ = encoders.load_encoder(path)
    assert torch.equal(plain(images), teacher(images))


def test_an_encoder_for_one_mask_or_a_damaged_one_is_refused(teacher: nn.Module, moments: Moments, tmp_path: Path):
    encoders.save_encoder(teacher, card(), tmp_path / "plain")
    with pytest.raises(FileNotFoundError, match="08_any_band_encoder"):
        any_band.load(tmp_path / "plain")
    path = any_band.save(teacher, card(), AnyMask(), moments, tmp_path / "encoder")
    file = path / any_band.MOMENTS
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"moments.npz is damaged.*run the notebook again"):
        any_band.load(path)


def tune(teacher: nn.Module, pack: Pack, moments: Moments, **options: object) -> tuple[nn.Module, float]:
    """A student, and its distance on test images of which bands B04 to B12 are gone."""
    defaults = {"epochs": 3, "batch_size": 16, "image_size": 32, "lr": 1e-3, "compute": CPU, "progress": False}
    student, _ = fine_tune(teacher, pack, AnyMask(), AnyRidge(moments), **{**defaults, **options})  # type: ignore[arg-type]
    return student, apart(student, teacher, pack, moments)


def apart(student: nn.Module, teacher: nn.Module, pack: Pack, moments: Moments) -> float:
    from bandmask.batches import Batches

    spec = MaskSpec(("B04", "B05", "B06", "B07", "B08", "B8A", "B09", "B11", "B12"), 1.0)
    options = {"batch_size": 16, "image_size": 32}
    batches = Batches(pack, "test", **options)  # type: ignore[arg-type]
    seen, _ = embed_batches(View(student, spec, AnyRidge(moments, spec.bands), **options), batches, CPU)  # type: ignore[arg-type]
    target, _ = embed_batches(View(teacher, MaskSpec(), torch.zeros(13), **options), batches, CPU)  # type: ignore[arg-type]
    return float(distance(seen, target))


def test_training_brings_incomplete_images_nearer_than_ridge_alone(teacher: nn.Module, pack: Pack, moments: Moments):
    _, tuned = tune(teacher, pack, moments, objective=OBJECTIVE, batch_norm="frozen")
    assert tuned < 0.9 * apart(teacher, teacher, pack, moments)


def test_frozen_norms_keep_the_teachers_statistics_and_the_others_do_not(
    teacher: nn.Module, pack: Pack, moments: Moments
):
    def statistics(model: nn.Module) -> list[Tensor]:
        return [value for name, value in model.state_dict().items() if "running" in name]

    before = statistics(teacher)
    frozen, _ = tune(teacher, pack, moments, epochs=1, objective=OBJECTIVE, batch_norm="frozen")
    assert all(map(torch.equal, statistics(frozen), before))
    free, _ = tune(teacher, pack, moments, epochs=1, objective=OBJECTIVE, batch_norm="train")
    assert not any(map(torch.equal, statistics(free), before))
    with pytest.raises(ValueError, match="unknown batch_norm 'eval'; available: train, frozen"):
        tune(teacher, pack, moments, batch_norm="eval")


def test_feature_maps_come_nearer_where_they_are_aligned(teacher: nn.Module, pack: Pack, moments: Moments):
    taps = ("layer1", "layer4")
    spec = MaskSpec(("B04", "B08", "B11", "B12"))
    fill = torch.full((13,), 0.2)
    rows = torch.arange(8)
    images = torch.tensor(pack.images[pack.rows("test")].astype(np.float32)) / 10_000
    incomplete = hide(images, hidden_pixels(spec, rows, (32, 32)), spec, fill)

    def apart_at(student: nn.Module) -> list[float]:
        with torch.no_grad():
            found, target = encoders.embed(student, incomplete, taps)[1], encoders.embed(teacher, images, taps)[1]
        return [float(distance(found[tap], target[tap])) for tap in taps]

    options = {"epochs": 3, "batch_size": 16, "image_size": 32, "lr": 1e-3, "compute": CPU, "progress": False}
    student, _ = fine_tune(
        teacher, pack, spec, fill, objective=Objective.of("features"), taps=taps, batch_norm="frozen", **options
    )  # type: ignore[arg-type]
    after, before = apart_at(student), apart_at(teacher)
    assert after[0] < before[0], (after, before)
    assert after[1] < before[1], (after, before)
    assert torch.equal(student.state_dict()["fc.weight"], teacher.state_dict()["fc.weight"]), "nothing pulls at it"


def test_several_masks_of_an_image_are_several_draws(
    teacher: nn.Module, pack: Pack, moments: Moments, monkeypatch: pytest.MonkeyPatch
):
    seen: list[Tensor] = []
    original = alignment.mask_batch

    def note(*arguments: Any, **options: Any) -> Tensor:
        seen.append(original(*arguments, **options))
        return seen[-1]

    monkeypatch.setattr(alignment, "mask_batch", note)
    tune(teacher, pack, moments, epochs=1, objective=Objective(views=2))
    steps = seen[1:-1]  # the first and the last are validation's
    assert len(steps) == 2 * 4
    assert not any(torch.equal(one, other) for one, other in zip(steps[::2], steps[1::2], strict=True))
