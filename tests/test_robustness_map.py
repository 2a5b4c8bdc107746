"""Every subset of bands: scores of the ordinary path, resumed after a kill, with intervals that hold."""

import numpy as np
import pytest
import torch
from conftest import reflectance
from hypothesis import given
from hypothesis import strategies as st
from models import tiny_encoder
from torch import nn

from bandmask import bands, evaluation, masks, robustness_map
from bandmask.any_band import AnyBandEncoder, Gate
from bandmask.evaluation import View
from bandmask.fills import Moments, NearestFill, RidgeLocalFill
from bandmask.heads import SceneHeads
from bandmask.packs import Pack
from bandmask.robustness_map import COMPLETE, PART, Scores, filled, score_subsets
from bandmask.train import Compute

CPU = Compute.of("cpu")


def scores(codes: np.ndarray, correct: np.ndarray, groups: np.ndarray | None = None) -> Scores:
    samples = np.arange(correct.shape[2])
    return Scores(codes, correct, samples, samples if groups is None else groups, np.arange(correct.shape[1]))


@given(st.sets(st.sampled_from(bands.NAMES)))
def test_a_code_and_its_bands_are_the_same_thing(visible):
    code = bands.code_of(visible)
    assert robustness_map.visible_bands(code) == tuple(name for name in bands.NAMES if name in visible)
    assert robustness_map.patterns(np.array([code]))[0].tolist() == [name in visible for name in bands.NAMES]


def test_a_subset_is_looked_up_by_its_code_and_means_are_numpys():
    codes, correct = np.array([3, 7, COMPLETE]), np.random.default_rng(0).random((3, 2, 40)) < 0.6
    found = scores(codes, correct)
    assert found.at(7) == correct[1].mean()
    assert found.mean(codes < 100)[0] == pytest.approx(correct[:2].mean())
    with pytest.raises(ValueError, match="is not among the scores"):
        found.at(5)


def test_intervals_are_as_wide_as_in_theory_and_images_of_one_group_are_drawn_together():
    right = np.repeat(np.random.default_rng(0).random(10) < 0.5, 12)[None, None]
    (value, *narrow), (same, *wide) = (
        scores(np.array([COMPLETE]), right, groups).mean(np.array([True])) for groups in (None, np.arange(120) // 12)
    )
    assert value == same == right.mean()
    assert np.ptp(narrow) == pytest.approx(2 * 1.96 * right.std() / np.sqrt(120), rel=0.1)
    assert np.ptp(wide) > 2.5 * np.ptp(narrow)  # √12 in theory


class Means(nn.Module):
    """A small encoder of which batches are counted: means of bands through a random layer."""

    def __init__(self, seed: int = 0, fails_after: int = 10**9) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.layer, self.seen, self.fails_after = nn.Linear(13, 32), [], fails_after

    def __deepcopy__(self, memo):
        return self  # so that batches are counted here

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if sum(self.seen) + len(images) > self.fails_after:
            raise KeyboardInterrupt
        self.seen.append(len(images))
        return torch.tanh(self.layer(30 * images.nan_to_num(0.3).mean((2, 3)))).sort(-1).values


@pytest.fixture(scope="module")
def moments(sample_pack):
    return Moments.of(sample_pack, pixels=20_000)


@pytest.fixture(scope="module")
def constant(sample_pack):
    return masks.fill_values("dataset_mean", torch.tensor(sample_pack.band_means()))


@pytest.fixture
def heads(sample_pack):
    return SceneHeads(32, len(sample_pack.classes), (0, 5, 7))


def some(pack: Pack, count: int = 6) -> np.ndarray:
    return pack.rows("test")[:: len(pack.rows("test")) // count][:count]


@pytest.mark.parametrize("lost", ["B02 B03 B04", "none"])
@pytest.mark.parametrize("ridge", [False, True])
def test_scores_are_those_of_masked_batches(sample_pack, moments, constant, lost, ridge):
    spec = masks.MaskSpec(bands.parse_bands(lost), 1.0)
    encoder = tiny_encoder(32, seed=3)
    heads = SceneHeads(32, len(sample_pack.classes), (0, 1))
    with torch.no_grad():
        heads.weight1 *= 200  # a fresh network's embeddings of all images are much alike; tell them apart
    fill = RidgeLocalFill(moments, bands.NAMES) if ridge else constant
    given = RidgeLocalFill(moments, spec.bands) if ridge and spec.bands else constant
    rows = some(sample_pack, 24)
    expected = evaluation.predict(View(encoder, spec, given, 32), heads, sample_pack, compute=CPU)
    expected = expected[expected["sample"].isin(rows)]
    code = COMPLETE - bands.code_of(spec.bands)
    found = score_subsets(encoder, fill, heads, sample_pack, np.array([code]), rows=rows, image_size=32)
    right = (expected["predicted"] == expected["label"]).to_numpy().reshape(2, 24)
    assert found.samples.tolist() == expected["sample"].tolist()[:24]
    assert expected["predicted"].nunique() > 1
    assert (found.correct[0] == right).mean() > 0.97  # another memory format: last digits, and so a tie, may differ
    assert not any(
        p.is_contiguous(memory_format=torch.channels_last) for p in encoder.parameters() if p.shape[2:] == (3, 3)
    )


@pytest.mark.parametrize("kind", ["mean", "nan", "ridge"])
def test_what_stands_in_lost_bands_is_what_hide_writes(sample_pack, moments, constant, kind):
    fill = {"mean": constant, "nan": torch.full((13,), torch.nan), "ridge": RidgeLocalFill(moments)}[kind]
    images = reflectance(sample_pack, some(sample_pack, 2))
    codes = np.array([1, 129, 4095, 8190, COMPLETE] + [0] * (kind != "nan"))
    found = filled(images, codes, fill, constant)
    assert found.shape == (len(codes), 2, 13, 64, 64)
    for code, batch in zip(codes.tolist(), found, strict=True):
        spec = masks.MaskSpec(robustness_map.visible_bands(COMPLETE - code), 1.0)
        hidden = torch.ones(2, len(spec.bands), 64, 64, dtype=torch.bool)
        given = RidgeLocalFill(moments, spec.bands) if kind == "ridge" and spec.bands else fill
        expected = masks.hide(images, hidden, spec, constant if kind == "ridge" and not spec.bands else given)
        torch.testing.assert_close(batch, expected, rtol=0, atol=2e-5 if kind == "ridge" else 0, equal_nan=True)
        assert torch.equal(batch[:, robustness_map.patterns([code])[0]], images[:, robustness_map.patterns([code])[0]])


def test_the_encoder_for_every_loss_reads_nan_and_its_mixture_counts(sample_pack, moments, tmp_path):
    heads, rows = SceneHeads(32, len(sample_pack.classes), (0,)), some(sample_pack)
    pretrained, aligned, codes = tiny_encoder(32, seed=3), tiny_encoder(32, seed=4), np.array([0, 77, COMPLETE])
    options = {"codes": codes, "rows": rows, "image_size": 32, "folder": tmp_path}
    nan, gates = torch.full((13,), torch.nan), (Gate(), Gate((0.0, 1.0), (0.0, 0.0)))
    found = []
    for gate in gates:
        model = AnyBandEncoder(pretrained, aligned, moments, gate)
        found.append(score_subsets(model, nan, heads, sample_pack, **options).correct)
    for model, correct in zip((aligned, pretrained), found, strict=True):
        alone = score_subsets(model, RidgeLocalFill(moments), heads, sample_pack, **options).correct
        assert (correct[1] == alone[1]).mean() > 0.8
    assert len(list(tmp_path.glob("subsets-*"))) == 4
    assert torch.isfinite(filled(reflectance(sample_pack, rows), codes[:1], nan, torch.zeros(13))).all()


def test_a_kill_costs_one_part_and_the_rest_is_the_same(sample_pack, constant, heads, tmp_path):
    codes, rows = np.arange(5 * PART // 2), some(sample_pack)
    given = (constant, heads, sample_pack, codes)
    options = {"rows": rows, "image_size": 16, "batch_size": 60}
    whole = score_subsets(Means(), *given, **options)
    with pytest.raises(KeyboardInterrupt):
        score_subsets(Means(fails_after=int(1.5 * PART) * len(rows)), *given, **options, folder=tmp_path)
    assert len(list(tmp_path.glob("*/*.npz"))) == 1
    for computed in (len(codes) - PART, 0):
        again = Means()
        found = score_subsets(again, *given, **options, folder=tmp_path)
        assert sum(again.seen) == computed * len(rows)
        np.testing.assert_array_equal(found.correct, whole.correct)
    assert 0.02 < whole.correct.mean() < 0.98


def test_nothing_of_another_setting_is_taken(sample_pack, moments, constant, heads, tmp_path):
    rows = some(sample_pack)
    options = {"codes": np.array([0, 5]), "rows": rows, "image_size": 16}
    other_moments = RidgeLocalFill(Moments(moments.mean, moments.covariance * 1.1, moments.pixels))
    other_heads = SceneHeads(32, len(sample_pack.classes), (0, 5, 8))
    changes = [
        *({}, {"encoder": Means(1)}, {"fill": constant * 2}, {"fill": RidgeLocalFill(moments)}),
        *({"fill": other_moments}, {"heads": other_heads}, {"rows": rows[1:]}, {"image_size": 32}),
    ]
    for change in changes:
        encoder = change.get("encoder", Means())
        given = {"encoder": encoder, "fill": constant, "heads": heads, "pack": sample_pack, **options, **change}
        score_subsets(**given, folder=tmp_path)
        assert sum(encoder.seen) == 2 * len(given["rows"]), change
    assert len(list(tmp_path.glob("subsets-*"))) == len(changes)


@pytest.mark.parametrize("batch_size", [4, 13])
def test_the_size_of_batches_changes_nothing_and_bounds_memory(sample_pack, constant, heads, batch_size):
    options = {"codes": np.arange(0, 8192, 700), "rows": some(sample_pack), "image_size": 16}
    encoder = Means()
    found = score_subsets(encoder, constant, heads, sample_pack, batch_size=batch_size, **options)
    reference = score_subsets(Means(), constant, heads, sample_pack, batch_size=6, **options)
    np.testing.assert_array_equal(found.correct, reference.correct)
    assert max(encoder.seen) <= batch_size
    assert sum(encoder.seen) == 6 * 12


def test_groups_of_the_pack_are_kept(sample_pack, constant, heads):
    rows = sample_pack.rows("test")
    found = score_subsets(Means(), constant, heads, sample_pack, codes=[0], image_size=16)
    np.testing.assert_array_equal(found.samples, rows)
    names = sample_pack.index["group"].to_numpy()[rows]
    assert (found.groups[:, None] == found.groups).tolist() == (names[:, None] == names).tolist()
    assert len(np.unique(found.groups)) < len(rows)


def test_what_can_not_be_scored_is_refused(sample_pack, moments, constant, heads, tmp_path):
    options = {"rows": some(sample_pack), "image_size": 16}
    for wrong in ([8192], [-1], [], [0.5]):
        with pytest.raises(ValueError, match=r"from 0 .nothing visible. to 8191"):
            score_subsets(Means(), constant, heads, sample_pack, codes=np.array(wrong), **options)
    for fill in (RidgeLocalFill(moments, ["B08"]), NearestFill(moments)):  # of which it would take the moments alone
        with pytest.raises(ValueError, match="need 13 values or a RidgeLocalFill for all 13; got a"):
            score_subsets(Means(), fill, heads, sample_pack, codes=[0], **options)
    score_subsets(Means(), constant, heads, sample_pack, codes=[0], **options, folder=tmp_path)
    (part,) = tmp_path.glob("*/*.npz")
    part.write_bytes(part.read_bytes()[:50])
    with pytest.raises(ValueError, match=rf"{part.name} is damaged.*delete it"):
        score_subsets(Means(), constant, heads, sample_pack, codes=[0], **options, folder=tmp_path)
