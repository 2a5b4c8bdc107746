"""Heads trained side by side on one encoder pass an epoch are the heads one would train alone; predictions line up.

Images are generated: three classes with their own spectra, which a tiny random encoder tells apart.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from models import generated_pack, same_weights, settled_encoder, tiny_encoder
from torch import Tensor, nn

from bandmask import bands, classification
from bandmask.batches import Batches, to_reflectance
from bandmask.classification import predict, train_heads
from bandmask.heads import SceneHeads
from bandmask.masking import MaskSpec, fill_values, mask_batch
from bandmask.packs import Pack
from bandmask.training import Compute
from bandmask.views import View, embed_batches

CPU = Compute.of("cpu")
MASKED = MaskSpec(bands=("B04", "B08", "B11"))
SEEDS = (0, 1, 5)
EPOCHS = 6


class Counted(nn.Module):
    """An encoder that counts what passes through it."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.images = 0
        self.inputs: list[Tensor] = []

    def forward(self, images: Tensor) -> Tensor:
        self.images += len(images)
        self.inputs.append(images.clone())
        return self.encoder(images)


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Pack:
    return generated_pack(tmp_path_factory.mktemp("packs") / "generated", train=30, val=12, test=15)


@pytest.fixture(scope="module")
def encoder(pack: Pack) -> nn.Module:
    return settled_encoder(pack)


def view_of(encoder: nn.Module, pack: Pack, spec: MaskSpec = MASKED, **options: Any) -> View:
    fill = fill_values(spec.value, torch.tensor(pack.band_means()))
    return View(encoder, spec, fill, **{"image_size": 32, "batch_size": 8, **options})


def train(view: View, pack: Pack, **options: Any) -> tuple[SceneHeads, pd.DataFrame]:
    defaults = {"seeds": SEEDS, "epochs": EPOCHS, "head_batch_size": 8, "compute": CPU, "progress": False}
    return train_heads(view, pack, **{**defaults, **options})


@pytest.fixture(scope="module")
def trained(encoder: nn.Module, pack: Pack) -> tuple[SceneHeads, pd.DataFrame]:
    return train(view_of(encoder, pack), pack)


def weights_of(heads: SceneHeads, k: int) -> list[Tensor]:
    return [parameter[k] for parameter in heads.parameters()]


# --- training -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("passes", [0, 2])
def test_seeds_trained_together_are_the_seeds_trained_alone(passes: int, encoder: nn.Module, pack: Pack):
    view = view_of(encoder, pack)
    together, history = train(view, pack, passes=passes)
    losses = []
    for k, seed in enumerate(SEEDS):
        alone, own = train(view, pack, seeds=(seed,), passes=passes)
        for ours, theirs in zip(weights_of(together, k), weights_of(alone, 0), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
        rows = history[history["head_seed"] == seed]
        assert rows["val_accuracy"].tolist() == own["val_accuracy"].tolist()
        losses.append(own["train_loss"].to_numpy())
    np.testing.assert_allclose(rows["train_loss"], np.mean(losses, axis=0), rtol=1e-4)


def test_heads_learn_and_differ_by_seed(trained: tuple[SceneHeads, pd.DataFrame]):
    heads, history = trained
    assert list(history.columns) == ["epoch", "train_loss", "head_seed", "val_accuracy"]
    assert len(history) == (EPOCHS + 1) * len(SEEDS)
    assert sorted(history["head_seed"].unique()) == sorted(SEEDS)
    last = history[history["epoch"] == EPOCHS]
    assert last["val_accuracy"].min() > 0.8  # of three classes, a third each
    losses = history[history["head_seed"] == 0]["train_loss"]
    assert losses.iloc[-1] < 0.5 * losses.iloc[1]
    assert not torch.allclose(heads.weight1[0], heads.weight1[1])
    assert not heads.training


def test_the_encoder_is_frozen(encoder: nn.Module, pack: Pack):
    used = copy.deepcopy(encoder).train()  # even if it comes in train mode, no batch norm may move
    train(view_of(used, pack), pack, epochs=2)
    assert same_weights(used, encoder)
    assert all(parameter.grad is None for parameter in used.parameters())


@pytest.mark.parametrize(("passes", "expected"), [(0, EPOCHS), (1, 1), (2, 2), (EPOCHS, EPOCHS), (100, EPOCHS)])
def test_one_encoder_pass_an_epoch_whatever_the_number_of_seeds(
    passes: int, expected: int, encoder: nn.Module, pack: Pack
):
    counted = Counted(encoder)
    train(view_of(counted, pack), pack, passes=passes)
    assert counted.images == 30 * expected + 12  # the training split a pass, the validation split once
    alone = Counted(encoder)
    train(view_of(alone, pack), pack, passes=passes, seeds=(0,))
    assert alone.images == counted.images


def test_passes_are_different_draws(encoder: nn.Module, pack: Pack):
    """A new pass has new flips, blur and hidden pixels; a pass used again has the same."""
    counted = Counted(encoder)
    train(view_of(counted, pack, batch_size=64), pack, passes=2, epochs=4)
    watched, first, second = counted.inputs
    assert (len(watched), len(first), len(second)) == (12, 30, 30)
    red, blue = bands.NAMES.index("B04"), bands.NAMES.index("B02")
    fill = float(fill_values("dataset_mean", torch.tensor(pack.band_means()))[0])
    hidden = [inputs[:, red] == fill for inputs in (first, second)]
    assert all(0.85 < float(h.float().mean()) < 0.95 for h in hidden)
    assert 0.7 < float((hidden[0] == hidden[1]).float().mean()) < 0.9  # 0.9² + 0.1² where draws are independent
    assert not torch.equal(first[:, blue], second[:, blue])


def test_as_many_passes_as_epochs_is_a_new_one_each_epoch(
    encoder: nn.Module, pack: Pack, trained: tuple[SceneHeads, pd.DataFrame]
):
    heads, history = train(view_of(encoder, pack), pack, passes=EPOCHS)
    pd.testing.assert_frame_equal(history, trained[1])
    assert same_weights(heads, trained[0])
    assert not same_weights(train(view_of(encoder, pack), pack, passes=1)[0], heads)


@torch.no_grad()
def test_train_loss_is_the_mean_over_images_and_heads(encoder: nn.Module, pack: Pack):
    """30 images in batches of 8 leave one of 6: without learning, the loss is that of the whole pass."""
    view = view_of(encoder, pack)
    with torch.enable_grad():
        heads, history = train(view, pack, epochs=1, lr=0.0)
    augmented = Batches(pack, "train", batch_size=8, image_size=32, augment=True)
    embeddings, labels = embed_batches(view, augmented, CPU, epoch=0, mask_epoch=0)
    expected = np.mean([float(F.cross_entropy(logits, labels)) for logits in heads(embeddings)])
    found = history[history["epoch"] == 1]["train_loss"]
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_test_images_are_never_seen(
    encoder: nn.Module, pack: Pack, trained: tuple[SceneHeads, pd.DataFrame], tmp_path: Path
):
    other = generated_pack(tmp_path / "other", train=30, val=12, test=15, spoiled=["test"])
    assert not np.array_equal(other.images[other.rows("test")], pack.images[pack.rows("test")])
    heads, history = train(view_of(encoder, pack), other)
    assert same_weights(heads, trained[0])
    pd.testing.assert_frame_equal(history, trained[1])


@pytest.mark.parametrize("passes", [0, 2])
def test_an_interrupted_run_resumes_to_the_same_heads(
    passes: int, encoder: nn.Module, pack: Pack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    checkpoint, calls = tmp_path / "heads.ckpt", []

    def stop(*arguments: Any, **options: Any) -> Tensor:
        calls.append(1)
        if len(calls) == 4 * 3 + 2:  # in the fourth epoch of four batches each
            raise KeyboardInterrupt
        return F.cross_entropy(*arguments, **options)

    with monkeypatch.context() as patched:
        patched.setattr(classification, "F", type("F", (), {"cross_entropy": staticmethod(stop)}))
        with pytest.raises(KeyboardInterrupt):
            train(view_of(encoder, pack), pack, passes=passes, checkpoint=checkpoint)
    resumed = train(view_of(encoder, pack), pack, passes=passes, checkpoint=checkpoint)
    undisturbed = train(view_of(encoder, pack), pack, passes=passes)
    assert same_weights(resumed[0], undisturbed[0])
    pd.testing.assert_frame_equal(resumed[1], undisturbed[1])


@pytest.mark.parametrize(
    "change", [{"seeds": (0, 1, 6)}, {"passes": 3}, {"settings": {"encoder": "satclip"}}, {"lr": 0.5}]
)
def test_other_settings_are_another_training(change: dict[str, Any], encoder: nn.Module, pack: Pack, tmp_path: Path):
    view = view_of(encoder, pack)
    train(view, pack, epochs=4, checkpoint=tmp_path / "heads.ckpt")
    (kept,) = tmp_path.iterdir()
    before = kept.read_bytes()
    found, _ = train(view, pack, epochs=4, checkpoint=tmp_path / "heads.ckpt", **change)
    assert kept.read_bytes() == before
    assert len(list(tmp_path.glob("heads-????????.ckpt"))) == 2
    assert same_weights(found, train(view, pack, epochs=4, **change)[0])


@pytest.mark.parametrize("other", ["mask", "encoder", "code"])
def test_heads_of_another_view_do_not_come_back(
    other: str, encoder: nn.Module, pack: Pack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Heads know the embeddings of one encoder under one mask; a stand-in made anew has the old one's name."""
    checkpoint = tmp_path / "heads.ckpt"
    first, _ = train(view_of(encoder, pack, MaskSpec()), pack, epochs=1, checkpoint=checkpoint)
    view = view_of(encoder, pack, MASKED if other == "mask" else MaskSpec())
    if other == "encoder":
        view = view_of(tiny_encoder(seed=9), pack, MaskSpec())
    if other == "code":
        monkeypatch.setattr(classification, "checksum_of_code", lambda *_: "of a module that was changed")
    found, _ = train(view, pack, epochs=1, checkpoint=checkpoint)
    assert len(list(tmp_path.iterdir())) == 2
    assert same_weights(found, first) == (other == "code")


def test_restart_begins_anew(encoder: nn.Module, pack: Pack, tmp_path: Path):
    checkpoint, view = tmp_path / "heads.ckpt", view_of(encoder, pack)
    train(view, pack, epochs=1, checkpoint=checkpoint)
    (kept,) = tmp_path.iterdir()
    kept.write_bytes(b"half a checkpoint")
    with pytest.raises(ValueError, match="restart=True"):
        train(view, pack, epochs=1, checkpoint=checkpoint)
    anew = train(view, pack, epochs=1, checkpoint=checkpoint, restart=True)
    assert same_weights(anew[0], train(view, pack, epochs=1)[0])


# --- prediction -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_predictions_line_up_with_images_and_labels(
    encoder: nn.Module, pack: Pack, trained: tuple[SceneHeads, pd.DataFrame]
):
    view = view_of(encoder, pack)
    found = predict(view, trained[0], pack, compute=CPU)
    assert list(found.columns) == ["head_seed", "sample", "label", "predicted"]
    assert found["head_seed"].tolist() == [seed for seed in SEEDS for _ in range(15)]
    assert found["sample"].tolist() == pack.rows("test").tolist() * len(SEEDS)
    assert (found["label"].to_numpy() == pack.labels[found["sample"]]).all()
    for sample in pack.rows("test"):  # each image on its own, in the plainest way
        images = to_reflectance(torch.from_numpy(pack.images[[sample]].view(np.int16)), 32)
        embedding = encoder(mask_batch(images, torch.tensor([sample]), view.spec, view.fill))
        expected = trained[0](embedding).argmax(-1).squeeze(1).tolist()
        assert found[found["sample"] == sample]["predicted"].tolist() == expected


def test_accuracy_of_predictions_is_the_history_s(
    encoder: nn.Module, pack: Pack, trained: tuple[SceneHeads, pd.DataFrame]
):
    heads, history = trained
    found = predict(view_of(encoder, pack), heads, pack, "val", compute=CPU)
    accuracy = (found["label"] == found["predicted"]).groupby(found["head_seed"]).mean()
    last = history[history["epoch"] == EPOCHS].set_index("head_seed")["val_accuracy"]
    for seed in SEEDS:
        assert accuracy[seed] == pytest.approx(last[seed])


def test_predictions_do_not_depend_on_the_batch_size(
    encoder: nn.Module, pack: Pack, trained: tuple[SceneHeads, pd.DataFrame]
):
    runs = [predict(view_of(encoder, pack, batch_size=size), trained[0], pack, compute=CPU) for size in (4, 64)]
    pd.testing.assert_frame_equal(*runs)


def test_transfer_changes_only_what_stands_before_the_head(encoder: nn.Module, pack: Pack):
    """The head was trained on complete images; in service the encoder gets incomplete ones, and may be another."""
    complete = view_of(encoder, pack, MaskSpec())
    heads, _ = train(complete, pack)
    kept = copy.deepcopy(heads)
    counted = Counted(encoder)
    transfer = predict(view_of(counted, pack), heads, pack, compute=CPU)
    assert same_weights(heads, kept)
    fill = float(fill_values("dataset_mean", torch.tensor(pack.band_means()))[0])
    seen = torch.cat(counted.inputs)
    for name in bands.NAMES:
        share = float((seen[:, bands.NAMES.index(name)] == fill).float().mean())
        assert share == pytest.approx(0.9 if name in MASKED.bands else 0.0, abs=0.02)
    intact = predict(complete, heads, pack, compute=CPU)
    nothing_hidden = predict(view_of(encoder, pack, MaskSpec(MASKED.bands, ratio=0.0)), heads, pack)
    pd.testing.assert_frame_equal(nothing_hidden, intact)  # complete input gives what complete images gave
    assert (intact["label"] == intact["predicted"]).mean() > 0.8
    assert not transfer["predicted"].equals(intact["predicted"])


def test_thesis_protocol_trains_on_masked_images(encoder: nn.Module, pack: Pack):
    """Heads of the thesis protocol know the mask: on masked images they beat heads that met only complete ones."""
    harsh = MaskSpec(bands=("B02", "B04", "B08", "B11"), value=-1.0)
    masked, complete = view_of(encoder, pack, harsh), view_of(encoder, pack, MaskSpec())
    runs = [train(view, pack)[0] for view in (masked, complete)]
    found = [predict(masked, heads, pack, compute=CPU) for heads in runs]
    thesis, transfer = ((table["label"] == table["predicted"]).mean() for table in found)
    assert thesis > transfer + 0.2


def test_a_function_may_fill_hidden_pixels(encoder: nn.Module, pack: Pack):
    """As ridge regression does: it is given the batch with hidden pixels zeroed, and what it returns is used."""
    counted, asked = Counted(encoder), []

    def fill(images: Tensor, hidden: Tensor) -> Tensor:
        asked.append(float(images[:, MASKED.channels][hidden].abs().max()))
        return torch.full(hidden.shape, 0.777)

    heads = SceneHeads(16, 3, SEEDS)
    predict(View(counted, MASKED, fill, image_size=32, batch_size=8), heads, pack, compute=CPU)
    assert asked == [0.0, 0.0]
    seen = torch.cat(counted.inputs)[:, MASKED.channels]
    assert float((seen == 0.777).float().mean()) == pytest.approx(0.9, abs=0.02)
