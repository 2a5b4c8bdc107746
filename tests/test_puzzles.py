from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bandmask import bands, encoders, masking
from bandmask.objectives import clip_loss
from bandmask.report import printed, puzzles

few = st.lists(st.integers(-40, 40).map(lambda value: value / 8), min_size=2, max_size=5)


def test_losses_of_images_average_to_the_loss_that_fine_tuning_minimises():
    draw = torch.Generator().manual_seed(0)
    incomplete, complete = torch.randn(2, 12, 8, generator=draw)
    losses, cosines = puzzles.alignment_of_images(incomplete, complete)
    assert losses.shape == cosines.shape == (12,)
    torch.testing.assert_close(losses.mean(), clip_loss(incomplete, complete))
    torch.testing.assert_close(cosines, torch.cosine_similarity(incomplete, complete))


@pytest.fixture(scope="module")
def encoder() -> torch.nn.Module:
    model = encoders.create_encoder("resnet18", embedding_dim=16).eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.running_mean += 0.3  # statistics of other images than those below
    return model


def test_batch_statistics_are_those_of_training_and_leave_the_encoder_alone(encoder):
    images = torch.rand(4, 13, 32, 32)
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    with torch.no_grad():
        found = puzzles.with_batch_statistics(encoder)(images)
        running = encoder(images)
    assert all(torch.equal(before[name], value) for name, value in encoder.state_dict().items())
    trained = encoders.create_encoder("resnet18", embedding_dim=16)  # the same seed, so the same weights
    with torch.no_grad():
        torch.testing.assert_close(found, trained.train()(images))
    assert not torch.allclose(found, running, atol=1e-3)


def test_an_encoder_without_bands_does_not_see_them_and_sees_the_others(encoder):
    blind, images = puzzles.without_bands(encoder, ["B08", "B8A"]), torch.rand(2, 13, 32, 32)
    changed, other = images.clone(), images.clone()
    changed[:, bands.channel_indices(["B08", "B8A"])] = 7.0
    other[:, bands.channel_indices(["B11"])] = 7.0
    with torch.no_grad():
        assert torch.equal(blind(images), blind(changed))
        assert not torch.allclose(blind(images), blind(other))
        assert not torch.allclose(encoder(images), encoder(changed))


def test_statistics_of_the_batch_take_a_constant_plane_away_but_not_salt_and_pepper(encoder):
    """Why ratio 1.0 can be easier: a wholly lost band is a constant, and the first batch norm subtracts it."""
    seen, images = puzzles.with_batch_statistics(encoder), torch.rand(8, 13, 64, 64)
    blind = puzzles.without_bands(seen, ["B08"])
    gaps = {}
    for ratio in (0.9, 1.0):
        spec = masking.MaskSpec(("B08",), ratio)
        incomplete = masking.mask_batch(images, torch.arange(8), spec, torch.full((13,), 5.0))
        with torch.no_grad():  # inside, away from the zeros that convolutions put around an image
            one, two = (model.bn1(model.conv1(incomplete))[..., 4:-4, 4:-4] for model in (seen, blind))
        gaps[ratio] = float((one - two).std() / two.std())
    assert gaps[1.0] < 0.5 * gaps[0.9]


def test_masks_that_counting_moves_name_a_band_after_the_eighth():
    for mask in bands.THESIS_MASKS:
        late = any(int(label[1:]) > 8 for label in mask.split() if label != "none")
        assert puzzles.moves(mask) == late
        assert not puzzles.moves(mask, "satclip", "sen12ms")


def test_gains_of_table_4_4_are_the_differences_of_its_figures():
    gains = puzzles.gains_of_table_4_4()
    assert len(gains) == 2 * (len(bands.THESIS_MASKS) - 1)
    table = printed.thesis_tables().query("table == '4.4'").set_index(["metric", "mask", "encoder"])
    for row in gains.itertuples():
        after, before = (table.loc[(row.metric, row.mask, encoder)] for encoder in ("finetuned", "pretrained"))
        assert row.gain == pytest.approx(after["value"] - before["value"])
        spread = max(after["sd"], before["sd"])
        assert row.outlying == (row.metric.endswith("percent") and spread > 5)
    assert gains["outlying"].sum() == 5


@settings(max_examples=25)
@given(few, few)
def test_the_permutation_test_agrees_with_scipys(first, second):
    figure, p, low, high = puzzles.permutation_test(first, second)
    reference = scipy.stats.permutation_test(
        (np.array(first), np.array(second)), lambda a, b: abs(np.mean(a) - np.mean(b)).round(9), alternative="greater"
    )
    assert figure == pytest.approx(np.mean(first) - np.mean(second))
    assert p == pytest.approx(reference.pvalue)
    assert low <= figure <= high


def test_shifts_inside_the_permutation_interval_are_not_rejected_and_those_outside_are():
    draw = np.random.default_rng(0)
    first, second = draw.normal(1.0, 1, 6), draw.normal(0, 1, 5)
    _, _, low, high = puzzles.permutation_test(first, second)
    for shift in (low + 1e-3, high - 1e-3):
        assert puzzles.permutation_test(first - shift, second)[1] > 0.05
    for shift in (low - 1e-3, high + 1e-3):
        assert puzzles.permutation_test(first - shift, second)[1] <= 0.05


def test_too_few_values_decide_nothing():
    assert puzzles.permutation_test([10.0, 11.0], [0.0, 1.0])[2:] == (-float("inf"), float("inf"))


def _rows(values: np.ndarray) -> pd.DataFrame:
    seeds, samples = (index.ravel() for index in np.indices(values.shape))
    return pd.DataFrame({"seed": seeds, "sample": samples, "loss": values.ravel()})


def test_a_paired_interval_takes_away_what_both_sides_share():
    draw = np.random.default_rng(0)
    shared = draw.normal(0, 5, (3, 60))
    after, before = shared + draw.normal(0.5, 0.2, (3, 60)), shared
    figure, low, high = puzzles.paired_interval(_rows(after), _rows(before).sample(frac=1, random_state=1), "loss")
    assert figure == pytest.approx((after - before).mean())
    assert 0.4 < low < figure < high < 0.6


def test_a_paired_interval_is_wider_where_seeds_differ():
    draw = np.random.default_rng(0)
    noise = draw.normal(0, 0.1, (3, 60))
    alike = puzzles.paired_interval(_rows(noise), _rows(0 * noise), "loss")
    apart = puzzles.paired_interval(_rows(noise + np.array([[-1.0], [0.0], [1.0]])), _rows(0 * noise), "loss")
    assert apart[2] - apart[1] > 5 * (alike[2] - alike[1])


def test_a_paired_interval_refuses_other_images():
    with pytest.raises(ValueError, match="same images and seeds"):
        puzzles.paired_interval(_rows(np.zeros((1, 4))), _rows(np.zeros((1, 5))), "loss")
