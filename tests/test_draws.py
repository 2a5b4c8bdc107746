"""Masks drawn for each image: counts are uniform, draws don't depend on the batch, and only valid laws are taken."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare

from bandmask import bands
from bandmask.draws import KINDS, AnyMask
from bandmask.masking import fill_values, hidden_pixels, hide, mask_batch

SAMPLES = torch.arange(20_000)


@given(seed=st.integers(-(2**40), 2**40), epoch=st.integers(-1, 10_000), start=st.integers(0, 2**40))
def test_an_images_mask_does_not_depend_on_its_batch(seed: int, epoch: int, start: int):
    mask, samples = AnyMask(seed=seed), start + torch.arange(12)
    together = mask.hidden(samples, (8, 8), epoch=epoch)
    assert torch.equal(together[[7, 2]], mask.hidden(samples[[7, 2]], (8, 8), epoch=epoch))
    assert torch.equal(together, AnyMask(seed=seed).hidden(samples, (8, 8), epoch=epoch))


def test_every_number_of_lost_bands_is_equally_likely_and_so_is_every_band():
    lost, kind = AnyMask().lost(SAMPLES, epoch=3)
    numbers = torch.bincount(lost.sum(1), minlength=13).numpy()
    assert numbers[12] == 0
    assert numbers[13:].sum() == 0
    assert chisquare(numbers[:12]).pvalue > 1e-3
    assert chisquare(lost.sum(0).numpy()).pvalue > 1e-3
    assert chisquare(torch.bincount(kind, minlength=len(KINDS)).numpy()).pvalue > 1e-3


def test_sets_of_one_size_are_equally_likely():
    lost, _ = AnyMask(fewest=2, most=2).lost(SAMPLES)
    assert (lost.sum(1) == 2).all()
    pairs = (lost.long() @ (2 ** torch.arange(13))).numpy()
    _, counts = np.unique(pairs, return_counts=True)
    assert len(counts) == 78
    assert chisquare(counts).pvalue > 1e-3


def test_epochs_and_seeds_are_draws_of_their_own():
    first, _ = AnyMask().lost(SAMPLES, epoch=0)
    for other in (AnyMask().lost(SAMPLES, epoch=1)[0], AnyMask(seed=1).lost(SAMPLES, epoch=0)[0]):
        agreement = (first == other).float().mean()
        share = first.float().mean()
        assert agreement == pytest.approx(float(share**2 + (1 - share) ** 2), abs=0.03)


def test_bands_lose_what_their_kind_says():
    mask = AnyMask(fewest=1, kinds=(("band", 1.0), ("pixel", 0.5)))
    samples = torch.arange(300)
    lost, kind = mask.lost(samples, epoch=2)
    hidden = mask.hidden(samples, (16, 16), epoch=2)
    share = hidden.float().mean((2, 3))
    assert (share[~lost] == 0).all(), "what was not drawn is whole"
    assert (share[(kind == 0)[:, None] & lost] == 1).all()
    half = share[(kind == 1)[:, None] & lost]
    assert half.mean() == pytest.approx(0.5, abs=0.01)
    assert half.min() > 0.3


def test_nothing_lost_leaves_images_as_they_are_and_hidden_values_never_reach_the_batch():
    mask, samples = AnyMask(), torch.arange(40)
    images = torch.rand(40, 13, 16, 16)
    fill = fill_values(0.25, torch.rand(13))
    hidden = hidden_pixels(mask, samples, (16, 16), epoch=4)
    masked = mask_batch(images, samples, mask, fill, epoch=4)
    whole = ~hidden.flatten(1).any(1)
    assert whole.any()
    assert torch.equal(masked[whole], images[whole])
    assert torch.equal(masked[~hidden], images[~hidden])
    spoilt = torch.where(hidden, torch.nan, images)
    assert torch.equal(hide(spoilt, hidden, mask, fill), masked)


def test_stands_where_a_mask_spec_does():
    mask = AnyMask()
    assert mask.bands == bands.NAMES
    assert mask.channels == list(range(13))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fewest": -1}, "0 ≤ fewest ≤ most < 13"),
        ({"most": 13}, "got 0 and 13"),
        ({"fewest": 5, "most": 4}, "got 5 and 4"),
        ({"kinds": ()}, "at least one kind"),
        ({"kinds": (("circle", 0.5),)}, "pixel, band, stripe, block, cloud.*'circle'"),
        ({"kinds": (("pixel", 1.5),)}, "from 0 to 1; got 'pixel', 1.5"),
    ],
)
def test_laws_that_say_nothing_are_refused(options: dict[str, object], message: str):
    with pytest.raises(ValueError, match=message):
        AnyMask(**options)  # type: ignore[arg-type]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine: masks on CUDA are not compared")
def test_the_same_on_a_gpu():
    mask, samples = AnyMask(), torch.arange(64)
    assert torch.equal(mask.hidden(samples.cuda(), (16, 16), epoch=1).cpu(), mask.hidden(samples, (16, 16), epoch=1))
