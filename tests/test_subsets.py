"""Scores of all subsets: those of the ordinary path, nothing that is lost is read, and a kill costs one part."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from models import tiny_encoder
from torch import nn

from bandmask import bands, classification, masking
from bandmask.any_band import AnyBandEncoder, Gate
from bandmask.fills import RidgeLocalFill
from bandmask.heads import SceneHeads
from bandmask.moments import Moments
from bandmask.packs import Pack
from bandmask.robustness import lattice
from bandmask.robustness.lattice import COMPLETE
from bandmask.robustness.subsets import PART, filled, score_subsets
from bandmask.training import Compute
from bandmask.views import View

CPU = Compute.of("cpu")


class Means(nn.Module):
    """A small encoder of which batches are counted: means of bands through a random layer."""

    def __init__(self, seed: int = 0, fails_after: int = 10**9) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.layer = nn.Linear(13, 32)
        self.seen: list[int] = []
        self.fails_after = fails_after

    def __deepcopy__(self, memo: dict) -> Means:
        return self  # so that batches are counted here

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if sum(self.seen) + len(images) > self.fails_after:
            raise KeyboardInterrupt
        self.seen.append(len(images))
        return torch.tanh(self.layer(30 * images.nan_to_num(0.3).mean((2, 3)))).sort(-1).values


@pytest.fixture(scope="module")
def moments(sample_pack: Pack) -> Moments:
    return Moments.of(sample_pack, pixels=20_000)


@pytest.fixture(scope="module")
def constant(sample_pack: Pack) -> torch.Tensor:
    return masking.fill_values("dataset_mean", torch.tensor(sample_pack.band_means()))


@pytest.fixture
def heads(sample_pack: Pack) -> SceneHeads:
    return SceneHeads(32, len(sample_pack.classes), (0, 5, 7))


def some(pack: Pack, count: int = 6) -> np.ndarray:
    return lattice.stratified(pack.labels, pack.rows("test"), count)


def images_of(pack: Pack, rows: np.ndarray) -> torch.Tensor:
    return torch.tensor(pack.images[rows].astype(np.float32)) / 10_000


@pytest.mark.parametrize("lost", ["B08", "B02 B03 B04", "B08 B8A B09 B10 B11", "none"])
@pytest.mark.parametrize("ridge", [False, True])
def test_scores_are_those_of_masked_batches(sample_pack: Pack, moments, constant, lost: str, ridge: bool):
    spec = masking.MaskSpec(bands.parse_bands(lost), 1.0)
    encoder = tiny_encoder(32, seed=3)
    heads = SceneHeads(32, len(sample_pack.classes), (0, 1))
    with torch.no_grad():
        heads.weight1 *= 200  # a fresh network's embeddings of all images are much alike; tell them apart
    fill = RidgeLocalFill(moments, bands.NAMES) if ridge else constant
    given = RidgeLocalFill(moments, spec.bands) if ridge and spec.bands else constant
    rows = some(sample_pack, 24)
    expected = classification.predict(View(encoder, spec, given, 32), heads, sample_pack, rows, compute=CPU)
    code = COMPLETE - lattice.code_of(spec.bands)
    found = score_subsets(
        encoder, fill, heads, sample_pack, codes=np.array([code]), rows=rows, image_size=32, progress=False
    )
    right = (expected["predicted"] == expected["label"]).to_numpy().reshape(2, 24)
    assert found.labels.tolist() == expected["label"].tolist()[:24]
    assert expected["predicted"].nunique() > 1
    assert (found.correct[0] == right).mean() > 0.97  # another memory format: last digits, and so a tie, may differ
    assert not any(
        p.is_contiguous(memory_format=torch.channels_last) for p in encoder.parameters() if p.shape[2:] == (3, 3)
    )


@pytest.mark.parametrize("kind", ["mean", "nan", "ridge", "function"])
def test_what_stands_in_lost_bands_is_what_hide_writes(sample_pack: Pack, moments, constant, kind: str):
    def nearest_visible(images, hidden):
        return images.sum(1, keepdim=True).expand_as(hidden) / (~hidden).sum(1, keepdim=True).clamp(min=1)

    fill = {
        "mean": constant,
        "nan": torch.full((13,), torch.nan),
        "ridge": RidgeLocalFill(moments),
        "function": nearest_visible,
    }[kind]
    images = images_of(sample_pack, some(sample_pack, 2))
    codes = np.array([0, 1, 129, 4095, 8190, COMPLETE])
    found = filled(images, codes, fill)
    assert found.shape == (6, 2, 13, 64, 64)
    for code, batch in zip(codes.tolist(), found, strict=True):
        spec = masking.MaskSpec(lattice.visible_bands(COMPLETE - code), 1.0, allow_all_bands=True)
        hidden = torch.ones(2, len(spec.bands), 64, 64, dtype=torch.bool)
        given = fill
        if kind == "ridge":
            given = RidgeLocalFill(moments, spec.bands) if spec.bands else constant
        if kind == "function":
            given = lambda x, h, keep=spec.channels: nearest_visible(x, _wide(h, keep))[:, keep]  # noqa: E731
        expected = masking.hide(images, hidden, spec, given)
        torch.testing.assert_close(batch, expected, rtol=0, atol=2e-5 if kind == "ridge" else 0, equal_nan=True)
        assert torch.equal(batch[:, lattice.patterns([code])[0]], images[:, lattice.patterns([code])[0]])


def _wide(hidden: torch.Tensor, channels: list[int]) -> torch.Tensor:
    wide = torch.zeros(len(hidden), 13, *hidden.shape[2:], dtype=torch.bool)
    wide[:, channels] = hidden
    return wide


def test_the_encoder_for_every_loss_reads_nan_and_its_mixture_counts(sample_pack: Pack, moments, tmp_path: Path):
    heads, rows = SceneHeads(32, len(sample_pack.classes), (0,)), some(sample_pack)
    pretrained, aligned, codes = tiny_encoder(32, seed=3), tiny_encoder(32, seed=4), np.array([0, 77, COMPLETE])
    options = {"codes": codes, "rows": rows, "image_size": 32, "progress": False, "folder": tmp_path}
    nan, gates = torch.full((13,), torch.nan), (Gate(), Gate((0.0, 1.0), (0.0, 0.0)))
    found = []
    for gate in gates:
        model = AnyBandEncoder(pretrained, aligned, moments, gate)
        found.append(score_subsets(model, nan, heads, sample_pack, **options).correct)
    for model, correct in zip((aligned, pretrained), found, strict=True):
        alone = score_subsets(model, RidgeLocalFill(moments), heads, sample_pack, **options).correct
        assert (correct[1] == alone[1]).mean() > 0.8
    assert len(list(tmp_path.glob("subsets-*"))) == 4
    assert torch.isfinite(filled(images_of(sample_pack, rows), codes[:1], nan, torch.zeros(13))).all()


@pytest.mark.parametrize("kind", ["mean", "ridge"])
def test_lost_values_never_reach_the_encoder(sample_pack: Pack, moments, constant, kind: str):
    fill = constant if kind == "mean" else RidgeLocalFill(moments)
    images = images_of(sample_pack, some(sample_pack, 3))
    codes = np.random.default_rng(0).choice(lattice.every_subset(), 20, replace=False)
    for code, before in zip(codes, filled(images, codes, fill), strict=True):
        changed = images.clone()
        changed[:, ~lattice.patterns([code])[0]] = 7.7
        assert torch.equal(filled(changed, np.array([code]), fill)[0], before)


def test_a_kill_costs_one_part_and_the_rest_is_the_same(sample_pack: Pack, constant, heads, tmp_path: Path):
    codes, rows = lattice.every_subset()[: 5 * PART // 2], some(sample_pack)
    options = {"codes": codes, "rows": rows, "image_size": 16, "batch_size": 60, "progress": False}
    whole = score_subsets(Means(), constant, heads, sample_pack, **options)
    dying = Means(fails_after=int(1.5 * PART) * len(rows))
    with pytest.raises(KeyboardInterrupt):
        score_subsets(dying, constant, heads, sample_pack, **options, folder=tmp_path)
    assert len(list(tmp_path.glob("*/*.npz"))) == 1
    again = Means()
    found = score_subsets(again, constant, heads, sample_pack, **options, folder=tmp_path)
    assert sum(again.seen) == (len(codes) - PART) * len(rows)
    np.testing.assert_array_equal(found.correct, whole.correct)
    assert 0.02 < whole.correct.mean() < 0.98
    never = Means(fails_after=0)
    np.testing.assert_array_equal(
        score_subsets(never, constant, heads, sample_pack, **options, folder=tmp_path).correct, whole.correct
    )


def test_more_subsets_compute_only_those(sample_pack: Pack, constant, heads, tmp_path: Path):
    options = {"rows": some(sample_pack), "image_size": 16, "progress": False, "folder": tmp_path}
    few = lattice.some_subsets(0, 13)
    score_subsets(Means(), constant, heads, sample_pack, codes=few, **options)
    more, encoder = lattice.some_subsets(1, 13), Means()
    found = score_subsets(encoder, constant, heads, sample_pack, codes=more, **options)
    assert sum(encoder.seen) == 6 * len(np.setdiff1d(more, few))
    alone = score_subsets(Means(), constant, heads, sample_pack, codes=more, **{**options, "folder": None})
    np.testing.assert_array_equal(found.correct, alone.correct)


def test_nothing_of_another_setting_is_taken(sample_pack: Pack, moments, constant, heads, tmp_path: Path):
    rows = some(sample_pack)
    options = {"codes": np.array([0, 5]), "rows": rows, "image_size": 16}
    other_moments = RidgeLocalFill(Moments(moments.mean, moments.covariance * 1.1, moments.pixels))
    changes = [
        {},
        {"encoder": Means(1)},
        {"fill": constant * 2},
        {"fill": RidgeLocalFill(moments)},
        {"fill": RidgeLocalFill(moments, alpha=1.0)},
        {"fill": other_moments},
        {"heads": SceneHeads(32, len(sample_pack.classes), (0, 5, 8))},
        {"rows": rows[1:]},
        {"image_size": 32},
    ]
    for change in changes:
        encoder = change.get("encoder", Means())
        given = {"encoder": encoder, "fill": constant, "heads": heads, "pack": sample_pack, **options, **change}
        score_subsets(**given, folder=tmp_path, progress=False)
        assert sum(encoder.seen) == 2 * len(given["rows"]), change
    assert len(list(tmp_path.glob("subsets-*"))) == len(changes)


@pytest.mark.parametrize("batch_size", [1, 4, 6, 13, 1000])
def test_the_size_of_batches_changes_nothing_and_bounds_memory(sample_pack: Pack, constant, heads, batch_size: int):
    options = {"codes": np.arange(0, 8192, 700), "rows": some(sample_pack), "image_size": 16, "progress": False}
    encoder = Means()
    found = score_subsets(encoder, constant, heads, sample_pack, batch_size=batch_size, **options)
    reference = score_subsets(Means(), constant, heads, sample_pack, batch_size=6, **options)
    np.testing.assert_array_equal(found.correct, reference.correct)
    assert max(encoder.seen) <= batch_size
    assert sum(encoder.seen) == 6 * 12


def test_encoder_and_heads_are_left_as_they_were(sample_pack: Pack, constant):
    encoder, heads = tiny_encoder(32).train(), SceneHeads(32, len(sample_pack.classes), (0,)).train()
    before = copy.deepcopy(encoder.state_dict())
    score_subsets(
        encoder, constant, heads, sample_pack, codes=[3], rows=some(sample_pack), image_size=32, progress=False
    )
    assert encoder.training
    assert heads.training
    assert all(torch.equal(before[name], value) for name, value in encoder.state_dict().items())


def test_groups_of_the_pack_are_kept(sample_pack: Pack, constant, heads):
    rows = sample_pack.rows("test")
    found = score_subsets(Means(), constant, heads, sample_pack, codes=[0], image_size=16, progress=False)
    np.testing.assert_array_equal(found.samples, rows)
    names = sample_pack.index["group"].to_numpy()[rows]
    assert (found.groups[:, None] == found.groups).tolist() == (names[:, None] == names).tolist()
    assert len(np.unique(found.groups)) < len(rows)


def test_what_can_not_be_scored_is_refused(sample_pack: Pack, moments, constant, heads, tmp_path: Path):
    options = {"rows": some(sample_pack), "image_size": 16, "progress": False}
    for wrong in ([8192], [-1], [], [0.5]):
        with pytest.raises(ValueError, match=r"from 0 .nothing visible. to 8191"):
            score_subsets(Means(), constant, heads, sample_pack, codes=np.array(wrong), **options)
    with pytest.raises(ValueError, match=r"fill is for bands .'B08',.; subsets of bands need one for all 13"):
        score_subsets(Means(), RidgeLocalFill(moments, ["B08"]), heads, sample_pack, codes=[0], **options)
    with pytest.raises(ValueError, match="named twice"):
        score_subsets(Means(), constant, heads, sample_pack, codes=[0], **{**options, "rows": [3, 3]})
    score_subsets(Means(), constant, heads, sample_pack, codes=[0], **options, folder=tmp_path)
    (part,) = tmp_path.glob("*/*.npz")
    part.write_bytes(part.read_bytes()[:50])
    with pytest.raises(ValueError, match=rf"{part.name} is damaged .*delete it"):
        score_subsets(Means(), constant, heads, sample_pack, codes=[0], **options, folder=tmp_path)


def test_on_real_eurosat_images_a_ridge_is_nearer_to_the_complete_image(eurosat_pack: Pack):
    images = images_of(eurosat_pack, some(eurosat_pack, 8))
    codes = lattice.some_subsets(1, 13)
    codes = codes[lattice.lost_bands(codes) < 13]
    means = torch.tensor(eurosat_pack.band_means()).float()
    errors = [
        (filled(images, codes, fill) - images).square().mean((1, 2, 3, 4)).sqrt()
        for fill in (means, RidgeLocalFill(Moments.of(eurosat_pack, pixels=20_000)))
    ]
    assert (errors[1] <= errors[0]).float().mean() > 0.98
