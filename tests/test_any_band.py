"""One encoder for every loss: gaps are NaN, complete images pass as they are, and it loads as it was saved."""

from __future__ import annotations

import io
import json
from typing import Any

import numpy as np
import pytest
import torch
from models import TINY, tiny_encoder
from torch import Tensor, nn

from bandmask import any_band, encoders, params
from bandmask.align import Objective, distance, fine_tune
from bandmask.any_band import OBJECTIVE, AnyBandEncoder, Gate, fit_gate
from bandmask.fills import Moments, RidgeLocalFill
from bandmask.masks import AnyMask, MaskSpec, hide
from bandmask.train import Compute

CPU = Compute.of("cpu")


@pytest.fixture(scope="module")
def moments(pack):
    return Moments.of(pack)


@pytest.fixture(scope="module")
def images(pack):
    return torch.tensor(pack.images[pack.rows("test")].astype(np.float32)) / 10_000


@pytest.fixture(scope="module")
def student(teacher, pack, moments):
    """Aligned; batch norms keep the teacher's statistics."""
    how = {"objective": OBJECTIVE, "gentle": True, "epochs": 8, "batch_size": 16, "image_size": 32, "lr": 1e-3}
    found = fine_tune(teacher, pack, AnyMask(), RidgeLocalFill(moments), **how, compute=CPU)[0]
    before = teacher.state_dict()
    assert all(torch.equal(value, before[name]) for name, value in found.state_dict().items() if "running" in name)
    return found


def card() -> encoders.Card:
    return encoders.Card("any band", TINY, embedding_dim=16, image_size=32)


def mixed(teacher: nn.Module, moments: Moments, gate: Gate | None = None, seed: int = 5) -> AnyBandEncoder:
    """With another encoder in the place of an aligned one."""
    return AnyBandEncoder(teacher, tiny_encoder(seed=seed), moments, gate).eval()


def hidden_in(images: Tensor, seed: int = 3, **law: Any) -> Tensor:
    """Whole bands of every second image, half of their lines in the others."""
    hidden = AnyMask(seed=seed, **law).hidden(torch.arange(len(images)), (images.shape[-2], images.shape[-1]))
    hidden[::2, :, ::2] = False
    return hidden


def gaps_in(images: Tensor, seed: int = 3, **law: Any) -> Tensor:
    return images.masked_fill(hidden_in(images, seed, **law), torch.nan)


def test_complete_images_give_what_the_checkpoint_gives(teacher, moments, images):
    model = mixed(teacher, moments)
    assert torch.equal(model(images), teacher(images))
    gaps = gaps_in(images)
    gaps[::2] = images[::2]
    whole = ~gaps.isnan().flatten(1).any(1)
    assert whole.any()
    assert not whole.all()
    assert torch.equal(model(gaps)[whole], teacher(images)[whole]), "beside incomplete images too"


def test_gaps_are_filled_as_in_training(teacher, moments, images):
    hidden = hidden_in(images)
    filled = hide(images, hidden, AnyMask(), RidgeLocalFill(moments))
    ridge_alone = mixed(teacher, moments, Gate((0.0, 1.0), (0.0, 0.0)))
    assert torch.equal(ridge_alone(gaps_in(images)), teacher(filled))
    aligned_alone = mixed(teacher, moments)
    some = aligned_alone.fill.unexplained(hidden) > 1e-6
    assert 0 < some.sum() < hidden.flatten(1).any(1).sum(), "in some images bands are gone, in others much is left"
    found, expected = aligned_alone(gaps_in(images))[some], aligned_alone.aligned(filled)[some]
    assert torch.allclose(found, expected, atol=1e-5)


def test_the_edge_of_a_swath_costs_no_band(teacher, moments, images):
    """A band that lost most of its pixels is told from the others, though nothing is seen of a strip."""
    gaps = images.clone()
    gaps[:, 7, ::8] = gaps[:, 7, 1::2] = torch.nan
    gaps[..., :8] = torch.nan
    inside = gaps[..., 8:].contiguous()
    seen = []
    watch = teacher.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    model = mixed(teacher, moments)
    model(gaps), model(inside)
    watch.remove()
    assert seen[0].isfinite().all()
    assert torch.allclose(seen[0][..., 8:], seen[1], atol=1e-3)
    assert torch.equal(seen[0][:, :7, :, 8:], images[:, :7, :, 8:])


def test_feature_maps_are_mixed_as_embeddings_are(teacher, moments, images):
    gate = Gate((0.0, 0.5), (0.0, 0.8))
    model, gaps = mixed(teacher, moments, gate), gaps_in(images)
    taps = ("layer1", "layer4")
    embedding, maps = encoders.embed(model, gaps, taps)
    assert torch.allclose(embedding, model(gaps), atol=1e-5)
    filled = torch.where(gaps.isnan(), model.fill(images.masked_fill(gaps.isnan(), 0), gaps.isnan()), images)
    weight = gate(model.fill.unexplained(gaps.isnan()))[:, None, None, None]
    for tap in taps:
        one, other = (encoders.embed(part, filled, taps)[1][tap] for part in (teacher, model.aligned))
        assert torch.allclose(maps[tap], (1 - weight) * one + weight * other, atol=1e-5)


def test_what_says_nothing_is_refused(teacher, moments, images):
    model = mixed(teacher, moments)
    with pytest.raises(ValueError, match=r"B8A.*got \(2, 3, 8, 8\)"):
        model(torch.rand(2, 3, 8, 8))
    empty = images.clone()
    empty[1] = torch.nan
    with pytest.raises(ValueError, match="no value in any band"):
        model(empty)


def test_the_gate_prefers_whichever_encoder_is_nearer(teacher, student, pack, moments):
    options = {"image_size": 32, "compute": CPU}
    useless = fit_gate(teacher, tiny_encoder(seed=5), pack, moments, AnyMask(), **options)
    assert useless.weight[0] == 0
    assert useless.weight[1] < 0.05, "a complete-looking image has nothing to win from an encoder that knows nothing"
    assert list(useless.weight) == sorted(useless.weight)
    assert list(useless.unexplained) == sorted(set(useless.unexplained))
    found = fit_gate(teacher, student, pack, moments, AnyMask(), **options)
    assert found.weight[-1] > 0.5, "where little is left, the aligned one is nearer"


@torch.no_grad()
def test_the_mixture_lies_no_farther_than_either_encoder(teacher, student, pack, moments, images):
    gate = fit_gate(teacher, student, pack, moments, AnyMask(), image_size=32, compute=CPU)
    both, apart = AnyBandEncoder(teacher, student, moments, gate).eval(), np.zeros(3)
    for seed in range(8):  # losses as they are drawn, other ones than the gate has met
        gaps = gaps_in(images, seed=100 + seed, fewest=1)
        filled = torch.where(gaps.isnan(), both.fill(gaps.nan_to_num(0), gaps.isnan()), gaps)
        seen = both(gaps), teacher(filled), student(filled)
        apart += [float(distance(embedding, teacher(images))) for embedding in seen]
    assert apart[0] < min(apart[1:]), apart


def test_loads_as_it_was_saved_and_as_a_plain_encoder_too(teacher, moments, images, tmp_path):
    model = mixed(teacher, moments, Gate((0.0, 0.2, 0.7), (0.0, 0.1, 0.9)))
    path = any_band.save(model, card(), AnyMask(seed=2), tmp_path / "encoder")
    loaded, found = any_band.load(path)
    gaps = gaps_in(images)
    assert torch.equal(loaded(gaps), model(gaps))
    assert found.mask is not None
    written = {part.relative_to(path).as_posix() for part in path.rglob("*") if part.is_file()}
    assert written == set(params.ANY_BAND_FILES), "what a run's record must vouch for"
    assert (found.mask["most"], found.mask["seed"]) == (11, 2)
    plain, _ = encoders.load_encoder(path)
    assert torch.equal(plain(images), model.aligned(images))


def test_an_encoder_for_one_mask_or_a_damaged_one_is_refused(teacher, moments, tmp_path):
    encoders.save_encoder(teacher, card(), tmp_path / "plain")
    with pytest.raises(FileNotFoundError, match="08_any_band_encoder"):
        any_band.load(tmp_path / "plain")
    path = any_band.save(mixed(teacher, moments), card(), AnyMask(), tmp_path / "encoder")
    gate, changed, broken = path / any_band.GATE, io.BytesIO(), io.BytesIO()
    np.savez(changed, mean=moments.mean * 0, covariance=moments.covariance, pixels=moments.pixels)
    np.savez(broken, mean=moments.mean, covariance=moments.covariance * np.nan, pixels=1)
    nan = b'{"unexplained": [0.0, 1.0], "weight": [0.0, NaN]}'
    edited = gate.read_bytes().replace(b"1.0", b"0.5")
    damages = {any_band.MOMENTS: (b"PK\x03\x04", broken.getvalue(), changed.getvalue())}
    damages[any_band.GATE] = b'{"weight": 3', nan, b"{}", b"[]", edited
    for name, damage in ((name, each) for name, several in damages.items() for each in several):
        whole = (path / name).read_bytes()
        (path / name).write_bytes(damage)
        with pytest.raises(ValueError, match=r"is damaged.*run the notebook again"):
            any_band.load(path)
        (path / name).write_bytes(whole)
    said = json.loads(gate.read_text())
    gate.write_text(json.dumps({name: said[name] for name in ("unexplained", "weight")}))  # before it held a checksum
    assert any_band.load(path)
    for name in (any_band.MOMENTS, any_band.GATE, "pre-trained/model.safetensors"):
        record = {"state": "done", "outputs": {f"encoder/{name}": "0" * 64}}
        (tmp_path / "08_any_band_encoder.json").write_text(json.dumps(record))
        with pytest.warns(UserWarning, match=f"08_any_band_encoder: .*{name} is not what was written"):
            any_band.load(path)


def test_feature_maps_come_nearer_where_they_are_aligned(teacher, pack, images):
    taps, spec, fill = ("layer1", "layer4"), MaskSpec(("B04", "B08", "B11", "B12")), torch.full((13,), 0.2)
    incomplete = hide(images, spec.hidden(torch.arange(8), (32, 32)), spec, fill)

    def apart_at(student: nn.Module) -> list[float]:
        with torch.no_grad():
            found, target = encoders.embed(student, incomplete, taps)[1], encoders.embed(teacher, images, taps)[1]
        return [float(distance(found[tap], target[tap])) for tap in taps]

    options = {"epochs": 3, "batch_size": 16, "image_size": 32, "lr": 1e-3, "compute": CPU}
    student, _ = fine_tune(teacher, pack, spec, fill, objective=Objective.of("features"), gentle=True, **options)
    after, before = apart_at(student), apart_at(teacher)
    assert after[0] < before[0], (after, before)
    assert after[1] < before[1], (after, before)
    assert torch.equal(student.state_dict()["fc.weight"], teacher.state_dict()["fc.weight"]), "nothing pulls at it"
