"""Decoders of all seeds on one encoder pass are those one would train alone; pixels are counted exactly.

Images are generated: three classes with their own spectra, left and right half of an image of different classes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from models import labelled_pack, same_weights, settled_encoder
from torch import nn

from bandmask import segmentation
from bandmask.masking import MaskSpec
from bandmask.packs import IGNORE, Pack
from bandmask.training import Compute
from bandmask.views import View

CPU = Compute.of("cpu")
SIZE = 64
SEEDS = (0, 3)


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Pack:
    return labelled_pack(tmp_path_factory.mktemp("pack") / "generated")


@pytest.fixture(scope="module")
def encoder(pack: Pack) -> nn.Module:
    return settled_encoder(pack)


@pytest.fixture(scope="module")
def view(encoder: nn.Module) -> View:
    return View(encoder, MaskSpec(("B08",), 0.5), torch.full((13,), 0.2), SIZE, 4)


def trained(view: View, pack: Pack, seeds: tuple[int, ...] = SEEDS, **options: Any):
    decoders, _ = segmentation.make_decoders(view, 3, seeds, width=8, compute=CPU)
    settings = {"epochs": 3, "lr": 0.01, "compute": CPU, "progress": False, **options}
    return decoders, segmentation.train_decoders(view, pack, decoders, **settings)


@pytest.mark.parametrize("passes", [0, 2])
def test_decoders_side_by_side_are_those_trained_alone(view: View, pack: Pack, passes: int):
    together, history = trained(view, pack, passes=passes)
    for place, seed in enumerate(SEEDS):
        alone, its_history = trained(view, pack, (seed,), passes=passes)
        for (name, ours), theirs in zip(
            alone.decoders[0].state_dict().items(), together.decoders[place].state_dict().values(), strict=True
        ):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5, msg=name)
        rows = history[history["head_seed"] == seed].reset_index(drop=True)
        for metric in segmentation.WATCHED:
            np.testing.assert_allclose(rows[metric], its_history[metric], atol=5e-3)


def test_one_encoder_pass_an_epoch_whatever_the_number_of_decoders(view: View, pack: Pack):
    passed: list[int] = []

    class Counted(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner, self.feature_info = inner, inner.feature_info

        def forward_intermediates(self, images, **options):
            passed.append(len(images))
            return self.inner.forward_intermediates(images, **options)

        def forward_head(self, *arguments, **options):
            return self.inner.forward_head(*arguments, **options)

    counted = View(Counted(view.encoder), view.spec, view.fill, SIZE, 4)
    totals = []
    for seeds in ((0,), (0, 1, 2)):
        decoders, _ = segmentation.make_decoders(counted, 3, seeds, width=8, compute=CPU)
        passed.clear()
        segmentation.train_decoders(counted, pack, decoders, epochs=2, compute=CPU, progress=False)
        totals.append(sum(passed))
    assert totals == [2 * 12 + 3 * 4] * 2, "train images once an epoch, validation images before and after each"
    decoders, _ = segmentation.make_decoders(counted, 3, SEEDS, width=8, compute=CPU)
    passed.clear()
    segmentation.train_decoders(counted, pack, decoders, epochs=4, passes=2, compute=CPU, progress=False)
    assert sum(passed) == 2 * 12 + 4, "kept passes are not made anew"


def test_it_learns_what_the_bands_tell(view: View, pack: Pack):
    decoders, history = trained(view, pack, epochs=12, passes=4)
    last = history[history["epoch"] == 12]
    assert (last["overall_accuracy"] > 0.6).all(), "a third is chance"
    assert last["train_loss"].mean() < history[history["epoch"] == 1]["train_loss"].mean()
    assert not decoders.training


def test_the_encoder_stays_frozen_and_in_eval_mode(view: View, pack: Pack):
    before = {name: tensor.clone() for name, tensor in view.encoder.state_dict().items()}
    trained(view, pack)
    assert not view.encoder.training
    assert all(torch.equal(before[name], tensor) for name, tensor in view.encoder.state_dict().items())


def test_loss_is_the_mean_over_labelled_pixels_in_float64():
    draw = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 4, 6, 6, generator=draw)
    targets = torch.randint(0, 4, (3, 6, 6), generator=draw)
    targets[0] = IGNORE
    expected = 0.0
    for one in logits.double():
        log = one.log_softmax(1)
        picked = [-log[b, targets[b, y, x], y, x] for b in (1, 2) for y in range(6) for x in range(6)]
        expected += float(torch.stack(picked).mean())
    assert float(segmentation.sum_of_losses(logits, targets)) == pytest.approx(expected, rel=1e-6)


def test_a_batch_without_a_label_teaches_nothing_and_breaks_nothing():
    logits = torch.randn(2, 3, 4, 6, 6, requires_grad=True)
    loss = segmentation.sum_of_losses(logits, torch.full((3, 6, 6), IGNORE))
    loss.backward()
    assert loss.item() == 0
    assert logits.grad is not None
    assert not logits.grad.any()


def test_a_killed_training_goes_on_to_the_same_decoders(view: View, pack: Pack, tmp_path: Path):
    whole, history = trained(view, pack, epochs=3)
    checkpoint = tmp_path / "decoders.pt"
    stopped, _ = segmentation.make_decoders(view, 3, SEEDS, width=8, compute=CPU)
    saved = segmentation.fit

    def dies(*arguments: Any, **options: Any):
        after = options["after_epoch"]

        def after_epoch(done: int):
            if done == 2:
                raise KeyboardInterrupt
            return after(done)

        return saved(*arguments, **{**options, "after_epoch": after_epoch})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(segmentation, "fit", dies)
        with pytest.raises(KeyboardInterrupt):
            segmentation.train_decoders(
                view, pack, stopped, epochs=3, lr=0.01, compute=CPU, progress=False, checkpoint=checkpoint
            )
    resumed, its_history = trained(view, pack, epochs=3, checkpoint=checkpoint)
    assert same_weights(resumed, whole)
    pd.testing.assert_frame_equal(its_history, history)


def test_other_decoders_are_another_training(view: View, pack: Pack, tmp_path: Path):
    first, _ = trained(view, pack, checkpoint=tmp_path / "decoders.pt")
    second, _ = trained(view, pack, checkpoint=tmp_path / "decoders.pt", lr=0.02)
    assert len(list(tmp_path.glob("decoders-????????.pt"))) == 2
    assert same_weights(second, trained(view, pack, lr=0.02)[0])
    assert not same_weights(second, first)


def test_a_pack_with_a_label_an_image_is_refused(view: View, make_pack, tmp_path: Path):
    plain = make_pack(tmp_path, size=SIZE)
    with pytest.raises(ValueError, match="a label an image, and none a pixel"):
        trained(view, plain)


def test_the_published_decoder_needs_a_resnet50(view: View, tmp_path: Path):
    with pytest.raises(ValueError, match=r"takes 256 and 2048 channels .*leave decoder_weights empty"):
        segmentation.make_decoders(view, 10, weights=tmp_path / "checkpoint.pth", compute=CPU)


def test_sum_of_losses_has_the_gradients_of_each_alone():
    logits = torch.randn(3, 2, 4, 5, 5, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(0, 4, (2, 5, 5))
    (together,) = torch.autograd.grad(segmentation.sum_of_losses(logits, targets), logits)
    for place in range(3):
        alone = logits[place].detach().requires_grad_()
        (gradient,) = torch.autograd.grad(F.cross_entropy(alone, targets), alone)
        torch.testing.assert_close(together[place], gradient)
