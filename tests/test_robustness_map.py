"""Every subset of bands: scores of the ordinary path, resumed after a kill, and figures equal to brute force."""

from __future__ import annotations

import functools
import re
from itertools import combinations, permutations
from math import comb, factorial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import tiny_encoder
from torch import nn

from bandmask import bands, evaluation, files, masks, results, robustness_map
from bandmask.any_band import AnyBandEncoder, Gate
from bandmask.evaluation import View
from bandmask.fills import Moments, RidgeLocalFill
from bandmask.heads import SceneHeads
from bandmask.packs import Pack
from bandmask.robustness_map import COMPLETE, PART, Scores, filled, score_subsets
from bandmask.train import Compute

CPU = Compute.of("cpu")

GAMES = st.integers(2, 6).flatmap(
    lambda n: st.tuples(st.just(n), st.lists(st.floats(-1, 1), min_size=2**n, max_size=2**n).map(np.array))
)


# --- codes, samples and intervals


def scores(codes: np.ndarray, images: int = 40, heads: int = 2, *, seed: int = 0, groups: int = 0) -> Scores:
    """Generated: the more bands are visible, the likelier an image is right."""
    draw = np.random.default_rng(seed)
    chance = 0.2 + 0.05 * (13 - robustness_map.lost_bands(codes))
    correct = draw.random((len(codes), heads, images)) < chance[:, None, None]
    samples = np.arange(100, 100 + images)
    return Scores(
        codes, correct, samples, samples % 3, np.arange(images) % groups if groups else samples, np.arange(heads)
    )


@given(st.sets(st.sampled_from(bands.NAMES)))
def test_a_code_and_its_bands_are_the_same_thing(visible):
    code = robustness_map.code_of(visible)
    assert robustness_map.visible_bands(code) == tuple(name for name in bands.NAMES if name in visible)
    assert robustness_map.patterns(np.array([code]))[0].tolist() == [name in visible for name in bands.NAMES]
    assert robustness_map.lost_bands(np.array([code])) == [13 - len(visible)]


def test_edges_hold_every_loss_of_two_bands_and_all_that_leave_two() -> None:
    codes = robustness_map.edge_subsets(2)
    assert np.bincount(robustness_map.lost_bands(codes), minlength=14).tolist() == [1, 13, 78, *[0] * 8, 78, 13, 1]


def test_means_by_number_of_lost_bands_are_pandas():
    found = scores(robustness_map.every_subset())
    expected = pd.Series(found.accuracy).groupby(found.lost).mean()
    estimated = robustness_map.estimate(found, robustness_map.mean_weights(found.codes), draws=50)
    np.testing.assert_allclose(estimated["value"], [*expected, expected[1:13].mean()], atol=1e-12)


def test_intervals_are_those_of_a_plain_bootstrap_and_hold_the_truth_as_often_as_they_say():
    codes = np.array([COMPLETE])
    draw, inside, widths = np.random.default_rng(0), 0, []
    for trial in range(200):
        right = draw.random((1, 1, 80)) < 0.7
        found = Scores(codes, right, np.arange(80), np.zeros(80), np.arange(80), np.zeros(1))
        row = robustness_map.estimate(found, np.ones((1, 1)), draws=400, seed=trial).iloc[0]
        inside += row["low"] <= 0.7 <= row["high"]
        widths.append(row["high"] - row["low"])
    assert 0.88 < inside / 200 < 0.99
    assert np.mean(widths) == pytest.approx(2 * 1.96 * np.sqrt(0.7 * 0.3 / 80), rel=0.08)


def test_images_of_one_group_are_drawn_together():
    codes = np.array([COMPLETE])
    right = np.repeat(np.random.default_rng(0).random(10) < 0.5, 12)[None, None]
    alone = Scores(codes, right, np.arange(120), np.zeros(120), np.arange(120), np.zeros(1))
    together = Scores(codes, right, np.arange(120), np.zeros(120), np.repeat(np.arange(10), 12), np.zeros(1))
    narrow, wide = (robustness_map.estimate(s, np.ones((1, 1))).iloc[0] for s in (alone, together))
    assert narrow["value"] == wide["value"]
    assert (wide["high"] - wide["low"]) > 2.5 * (narrow["high"] - narrow["low"])  # √12 in theory


def test_a_pair_sees_the_same_images_so_what_they_share_cancels():
    codes = robustness_map.every_subset()
    one = scores(codes, seed=1)
    better = Scores(**{**vars(one), "correct": one.correct.copy()})
    better.correct[:, :, 0] = True
    weights = robustness_map.mean_weights(codes)
    itself = robustness_map.estimate(one, weights, minus=one)
    assert (itself.to_numpy() == 0).all()
    found = robustness_map.estimate(better, weights, minus=one)
    np.testing.assert_allclose(
        found["value"],
        robustness_map.estimate(better, weights)["value"] - robustness_map.estimate(one, weights)["value"],
    )
    assert (found["low"] >= 0).all()  # an image that gained can't make a draw worse
    with pytest.raises(ValueError, match="differ in samples, labels"):
        robustness_map.estimate(
            one, weights, minus=Scores(**{**vars(one), "samples": one.samples + 1, "labels": one.labels + 1})
        )
    with pytest.raises(ValueError, match=r"weights have shape \(1, 2\)"):
        robustness_map.estimate(one, np.ones((1, 2)))


def test_pairs_are_looked_up_by_their_bands():
    found = scores(robustness_map.edge_subsets(2))
    pairs = robustness_map.pair_losses(found)
    assert pairs[1, 7] == pairs[7, 1] == found.at(COMPLETE - robustness_map.code_of("B02 B08"))
    assert pairs[4, 4] == found.at(COMPLETE - robustness_map.code_of("B05"))
    with pytest.raises(ValueError, match="is not among the scores"):
        robustness_map.pair_losses(scores(np.array([0, COMPLETE])))


@given(st.lists(st.integers(0, 4), min_size=5, max_size=60), st.integers(1, 60), st.integers(0, 99))
def test_drawn_images_keep_the_proportion_of_classes(labels, count, seed):
    labels = np.array(labels)
    rows = np.arange(len(labels))
    drawn = robustness_map.stratified(labels, rows, count, seed=seed)
    assert len(np.unique(drawn)) == len(drawn) == min(count, len(rows))
    for label in np.unique(labels):
        expected = (labels == label).sum() * len(drawn) / len(labels)
        assert abs((labels[drawn] == label).sum() - expected) <= 2
    more = robustness_map.stratified(labels, rows, count + 3, seed=seed)
    assert set(drawn) <= set(more)


# --- scores


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
    return masks.fill_values("dataset_mean", torch.tensor(sample_pack.band_means()))


@pytest.fixture
def heads(sample_pack: Pack) -> SceneHeads:
    return SceneHeads(32, len(sample_pack.classes), (0, 5, 7))


def some(pack: Pack, count: int = 6) -> np.ndarray:
    return robustness_map.stratified(pack.labels, pack.rows("test"), count)


def images_of(pack: Pack, rows: np.ndarray) -> torch.Tensor:
    return torch.tensor(pack.images[rows].astype(np.float32)) / 10_000


@pytest.mark.parametrize("lost", ["B08", "B02 B03 B04", "B08 B8A B09 B10 B11", "none"])
@pytest.mark.parametrize("ridge", [False, True])
def test_scores_are_those_of_masked_batches(sample_pack: Pack, moments, constant, lost: str, ridge: bool):
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
    code = COMPLETE - robustness_map.code_of(spec.bands)
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
        spec = masks.MaskSpec(robustness_map.visible_bands(COMPLETE - code), 1.0, allow_all_bands=True)
        hidden = torch.ones(2, len(spec.bands), 64, 64, dtype=torch.bool)
        given = fill
        if kind == "ridge":
            given = RidgeLocalFill(moments, spec.bands) if spec.bands else constant
        if kind == "function":
            given = lambda x, h, keep=spec.channels: nearest_visible(x, _wide(h, keep))[:, keep]  # noqa: E731
        expected = masks.hide(images, hidden, spec, given)
        torch.testing.assert_close(batch, expected, rtol=0, atol=2e-5 if kind == "ridge" else 0, equal_nan=True)
        assert torch.equal(batch[:, robustness_map.patterns([code])[0]], images[:, robustness_map.patterns([code])[0]])


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
    codes = np.random.default_rng(0).choice(robustness_map.every_subset(), 20, replace=False)
    for code, before in zip(codes, filled(images, codes, fill), strict=True):
        changed = images.clone()
        changed[:, ~robustness_map.patterns([code])[0]] = 7.7
        assert torch.equal(filled(changed, np.array([code]), fill)[0], before)


def test_a_kill_costs_one_part_and_the_rest_is_the_same(sample_pack: Pack, constant, heads, tmp_path: Path):
    codes, rows = robustness_map.every_subset()[: 5 * PART // 2], some(sample_pack)
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
    few = robustness_map.edge_subsets(0)
    score_subsets(Means(), constant, heads, sample_pack, codes=few, **options)
    more, encoder = robustness_map.edge_subsets(1), Means()
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
    with pytest.raises(ValueError, match=rf"{part.name} is damaged.*delete it"):
        score_subsets(Means(), constant, heads, sample_pack, codes=[0], **options, folder=tmp_path)


# --- what a band is worth


def by_orders(values: np.ndarray, count: int) -> np.ndarray:
    """Marginal contributions, averaged over all orders."""
    found = np.zeros(count)
    for order in permutations(range(count)):
        code = 0
        for player in order:
            found[player] += values[code | 1 << player] - values[code]
            code |= 1 << player
    return found / factorial(count)


def interaction_by_subsets(values: np.ndarray, count: int, first: int, second: int) -> float:
    """Grabisch and Roubens' sum over subsets without the two."""
    rest = [p for p in range(count) if p not in (first, second)]
    a, b, total = 1 << first, 1 << second, 0.0
    for size in range(count - 1):
        for chosen in combinations(rest, size):
            code = sum(1 << p for p in chosen)
            step = values[code | a | b] - values[code | a] - values[code | b] + values[code]
            total += step / ((count - 1) * comb(count - 2, size))
    return total


value_weights = functools.cache(lambda count: robustness_map.value_weights(count))


interaction_weights = functools.cache(lambda count: robustness_map.interaction_weights(count))


def values_of(game: np.ndarray, count: int) -> np.ndarray:
    return value_weights(count) @ game


def interactions_of(game: np.ndarray, count: int) -> np.ndarray:
    return robustness_map.as_matrix(interaction_weights(count) @ game, count)


@given(GAMES)
def test_values_are_the_mean_over_all_orders(game):
    count, values = game
    np.testing.assert_allclose(values_of(values, count), by_orders(values, count), atol=1e-12)


@given(GAMES)
def test_interactions_are_the_sum_over_all_subsets(game):
    count, values = game
    found = interactions_of(values, count)
    for first, second in combinations(range(count), 2):
        expected = interaction_by_subsets(values, count, first, second)
        np.testing.assert_allclose(found[first, second], expected, atol=1e-12)
        assert found[first, second] == found[second, first]


@given(st.integers(0, 2**32 - 1))
def test_thirteen_bands_share_out_the_whole_accuracy(seed):
    game = np.random.default_rng(seed).random(2**13)
    np.testing.assert_allclose(values_of(game, 13).sum(), game[-1] - game[0], atol=1e-10)


def test_a_null_player_gets_nothing_and_equal_players_the_same():
    codes = robustness_map.every_subset()
    seen = robustness_map.patterns(codes)
    game = (seen[:, 2] | seen[:, 7]) * 0.6 + seen[:, 4] * seen[:, 5] * 0.3
    found, pairs = values_of(game, 13), interactions_of(game, 13)
    np.testing.assert_allclose(found[[2, 7, 4, 5]], [0.3, 0.3, 0.15, 0.15], atol=1e-12)
    assert np.abs(np.delete(found, [2, 4, 5, 7])).max() < 1e-12
    assert pairs[2, 7] < -0.1 < 0.1 < pairs[4, 5]  # one stands in for the other; only together
    assert np.abs(pairs[0, 1:]).max() < 1e-12


def test_known_games():
    additive = robustness_map.patterns(np.arange(32), 5) @ np.array([1.0, 2, 0, -1, 5])
    np.testing.assert_allclose(values_of(additive, 5), [1, 2, 0, -1, 5], atol=1e-12)
    assert np.nanmax(np.abs(interactions_of(additive, 5))) < 1e-12
    majority = (robustness_map.patterns(np.arange(32), 5).sum(1) >= 3).astype(float)
    np.testing.assert_allclose(values_of(majority, 5), 0.2, atol=1e-12)
    # gloves: player 0 has a left one, 1 and 2 a right one each; a pair is worth 1 (values 4/6, 1/6, 1/6)
    seen = robustness_map.patterns(np.arange(8), 3)
    gloves = (seen[:, 0] & (seen[:, 1] | seen[:, 2])).astype(float)
    np.testing.assert_allclose(values_of(gloves, 3), [2 / 3, 1 / 6, 1 / 6], atol=1e-12)


def test_the_page_says_what_the_record_of_five_folds_says():
    folder = files.project_root() / "docs"
    table = results.read_table(folder / "findings" / "robustness_folds.parquet")
    assert set(table["images"]) == {997}
    lost = 13 - table["code"].map(lambda code: int(code).bit_count())
    means = 100 * table.assign(lost=lost).groupby(["lost", "method"])["accuracy"].mean().unstack()
    page = (folder / "findings/small-encoder.md").read_text(encoding="utf-8").split("**The same on all five folds**")[1]
    rows = {int(line.split(" | ")[0][2:]): line for line in page.splitlines() if re.match(r"\| \d+ \| \d+ \|", line)}
    assert sorted(rows) == list(range(14))
    for number, line in rows.items():
        _, subsets, *cells = line.strip("| ").split(" | ")
        assert int(subsets) == table[lost == number]["code"].nunique()
        shown = [float(cell.split(" [")[0]) for cell in cells[:3]]
        assert shown == pytest.approx(means.loc[number, ["pre-trained", "ridge", "any-band"]].tolist(), abs=0.051)
