"""Heads and decoders trained side by side are those one would train alone; predictions line up; nothing leaks.

Images are generated: three classes with their own spectra, which a tiny random encoder tells apart.
"""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from models import generated_pack, labelled_pack, same_weights, settled_encoder, stop_at, tiny_encoder
from sklearn.metrics import confusion_matrix
from torch import Tensor, nn

from bandmask import bands, comparison, datasets, encoders, evaluation, results
from bandmask.batches import Batch, Batches, to_reflectance
from bandmask.comparison import Setup
from bandmask.encoders import create_encoder
from bandmask.evaluation import Features, View, embed_batches, feature_batches, free_view, predict
from bandmask.heads import SegmentationDecoders, with_map
from bandmask.masks import MaskSpec, fill_values, mask_batch
from bandmask.packs import IGNORE, Pack
from bandmask.train import Compute

CPU = Compute.of("cpu")
MASKED = MaskSpec(bands=("B04", "B08", "B11"))
SEEDS, EPOCHS, SIZE = (0, 1, 5), 6, 64


def noted(encoder: nn.Module) -> tuple[nn.Module, list[Tensor]]:
    """A copy of an encoder, and what passes through it."""
    inputs: list[Tensor] = []
    copied = copy.deepcopy(encoder)
    copied.register_forward_pre_hook(lambda _, given: inputs.append(given[0].clone()))
    return copied, inputs


@pytest.fixture(scope="module")
def pack(tmp_path_factory):
    return generated_pack(tmp_path_factory.mktemp("packs") / "generated", train=30, val=12, test=15)


@pytest.fixture(scope="module")
def pixels(tmp_path_factory):
    return labelled_pack(tmp_path_factory.mktemp("packs") / "labelled")


@pytest.fixture(scope="module")
def encoder(pack):
    return settled_encoder(pack)


@pytest.fixture(scope="module")
def pixel_view(pixels):
    return View(settled_encoder(pixels), MaskSpec(("B08",), 0.5), torch.full((13,), 0.2), SIZE, 4)


def view_of(encoder: nn.Module, pack: Pack, spec: MaskSpec = MASKED, **options: Any) -> View:
    fill = fill_values(spec.value, torch.tensor(pack.band_means()))
    return View(encoder, spec, fill, **{"image_size": 32, "batch_size": 8, **options})


def train(view: View, pack: Pack, **options: Any) -> tuple[Any, pd.DataFrame]:
    defaults = {"seeds": SEEDS, "epochs": EPOCHS, "batch_size": 8, "compute": CPU}
    return evaluation.train("classification", view, pack, **{**defaults, **options})


def decode(view: View, pack: Pack, seeds: tuple[int, ...] = (0, 3), **options: Any) -> tuple[Any, pd.DataFrame]:
    defaults = {"seeds": seeds, "width": 8, "epochs": 3, "compute": CPU}
    return evaluation.train("segmentation", view, pack, **{**defaults, **options})


@pytest.fixture(scope="module")
def trained(encoder, pack):
    return train(view_of(encoder, pack), pack)


@pytest.fixture(scope="module")
def decoders(pixel_view, pixels):
    return decode(pixel_view, pixels)[0]


def test_feature_maps_are_those_of_the_masked_images_layer_by_layer(pixels, pixel_view):
    """The reference runs the encoder's layers by hand."""
    batches = Batches(pixels, "train", batch_size=5, targets=True)
    found = list(feature_batches(pixel_view, batches, CPU, 2, 5))
    assert [len(part.samples) for part in found] == [5, 5, 2]
    net: Any = pixel_view.encoder
    for batch, part in zip(batches.epoch(), found, strict=True):
        images = mask_batch(batch.images, batch.samples, pixel_view.spec, pixel_view.fill, epoch=2, epochs=5)
        with torch.no_grad():
            low = net.layer1(net.maxpool(net.act1(net.bn1(net.conv1(images)))))
            high = net.layer4(net.layer3(net.layer2(low)))
        torch.testing.assert_close(part.maps, (low, high))
        assert torch.equal(part.samples, batch.samples)
        assert np.array_equal(part.truth.numpy(), pixels.targets[part.samples.numpy()])
        assert [found.shape[-1] for found in part.maps] == [16, 2]
    kept = Features.joined(found)
    assert torch.equal(kept.maps[1], torch.cat([part.maps[1] for part in found]))
    assert torch.equal(kept.take(torch.tensor([7, 0])).maps[0], kept.maps[0][[7, 0]])


def test_decoders_need_maps_at_two_sizes_which_a_vit_lacks_and_a_convnext_has(pixels):
    with pytest.raises(ValueError, match=r"blocks\.0 \(S/16\).* Segmentation needs a ResNet or a ConvNeXt"):
        evaluation.decoder_taps(create_encoder("test_vit"))
    with pytest.raises(ValueError, match=r"in Sequential; available: none\."):
        evaluation.decoder_taps(with_map(nn.Identity(), *torch.rand(2, 9, 4)))
    view = View(create_encoder("test_convnext").eval(), image_size=SIZE, batch_size=2)
    part = next(feature_batches(view, Batches(pixels, "train", batch_size=2, targets=True), CPU))
    assert [found.shape for found in part.maps] == [(2, 24, 16, 16), (2, 64, 2, 2)]


def test_a_pack_that_lacks_bands_is_refused_before_heads_are_trained_on_nan(pack, monkeypatch):
    monkeypatch.setattr(datasets, "open_dataset", lambda _: replace(pack, card={**pack.card, "absent": ["B10"]}))
    with pytest.raises(ValueError, match=r"lacks B10, Galileo nano .* takes complete images; .* galileo-nano"):
        Setup.of("classification", {"encoder": "mini"})


def of_one(heads: Any, place: int) -> list[Tensor]:
    """Weights and statistics of one head of several."""
    if isinstance(heads, SegmentationDecoders):
        return [*heads.decoders[place].state_dict().values()]
    return [tensor[place] for tensor in heads.state_dict().values()]


@pytest.mark.parametrize(("run", "passes"), [(train, 0), (train, 2), (decode, 0)])
def test_seeds_trained_together_are_the_seeds_trained_alone(run, passes, encoder, pack, pixel_view, pixels):
    """Of decoders to the bit, batch norm statistics too, with dropout in force."""
    view, given, losses = pixel_view, pixels, []
    if run is train:
        view, given = view_of(encoder, pack), pack
    together, history = run(view, given, passes=passes)
    for k, seed in enumerate(together.seeds):
        alone, own = run(view, given, seeds=(seed,), passes=passes)
        near = {"rtol": 1e-4, "atol": 1e-5} if run is train else {"rtol": 0, "atol": 0}
        torch.testing.assert_close(of_one(together, k), of_one(alone, 0), **near)
        rows = history[history["head_seed"] == seed]
        assert rows["overall_accuracy"].tolist() == own["overall_accuracy"].tolist()
        losses.append(own["train_loss"].to_numpy())
    np.testing.assert_allclose(rows["train_loss"], np.mean(losses, axis=0), rtol=1e-4)


def test_heads_and_decoders_learn_what_the_bands_tell(trained, pixel_view, pixels):
    heads, history = trained
    assert list(history.columns) == ["epoch", "train_loss", "overall_accuracy", "head_seed"]
    assert len(history) == (EPOCHS + 1) * len(SEEDS)
    assert history[history["epoch"] == EPOCHS]["overall_accuracy"].min() > 0.8  # of three classes, a third each
    losses = history[history["head_seed"] == 0]["train_loss"]
    assert losses.iloc[-1] < 0.5 * losses.iloc[1]
    assert not torch.allclose(heads.weight1[0], heads.weight1[1])
    decoders, history = decode(pixel_view, pixels, epochs=12, passes=4)
    assert (history[history["epoch"] == 12]["overall_accuracy"] > 0.6).all()
    assert not decoders.training


def test_the_encoder_is_frozen(encoder, pack, pixel_view, pixels):
    for view, given, run in ((view_of(encoder, pack), pack, train), (pixel_view, pixels, decode)):
        used = copy.deepcopy(view.encoder).train()  # even if it comes in train mode, no batch norm may move
        run(replace(view, encoder=used), given, epochs=2)
        assert same_weights(used, view.encoder)
        assert all(parameter.grad is None for parameter in used.parameters())


def test_passes_are_different_draws_as_many_as_asked_for_whatever_the_number_of_seeds(encoder, pack):
    """A new pass has new flips, blur and hidden pixels; a pass used again has the same."""
    copied, inputs = noted(encoder)
    train(view_of(copied, pack, batch_size=64), pack, passes=2, epochs=4)
    _, _, first, second = inputs
    assert [len(given) for given in inputs] == [1, 12, 30, 30]  # of one image a head sees how wide it must be
    red, blue = bands.NAMES.index("B04"), bands.NAMES.index("B02")
    fill = float(fill_values("dataset_mean", torch.tensor(pack.band_means()))[0])
    hidden = [inputs[:, red] == fill for inputs in (first, second)]
    assert all(0.85 < float(h.float().mean()) < 0.95 for h in hidden)
    assert 0.7 < float((hidden[0] == hidden[1]).float().mean()) < 0.9  # 0.9² + 0.1² where draws are independent
    assert not torch.equal(first[:, blue], second[:, blue])


def test_loss_of_decoders_is_the_mean_over_labelled_pixels_with_the_gradients_of_each_alone():
    draw = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 4, 6, 6, generator=draw, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(0, 4, (3, 6, 6), generator=draw)
    targets[0] = IGNORE
    found, expected = evaluation.sum_of_losses(logits, targets), 0.0
    for one in logits.detach():
        log = one.log_softmax(1)
        picked = [-log[b, targets[b, y, x], y, x] for b in (1, 2) for y in range(6) for x in range(6)]
        expected += float(torch.stack(picked).mean())
    assert float(found.detach()) == pytest.approx(expected, rel=1e-12)
    (together,) = torch.autograd.grad(found, logits)
    for place in range(2):
        alone = logits[place].detach().requires_grad_()
        (gradient,) = torch.autograd.grad(F.cross_entropy(alone, targets, ignore_index=IGNORE), alone)
        torch.testing.assert_close(together[place], gradient)
    nothing = evaluation.sum_of_losses(logits, torch.full((3, 6, 6), IGNORE))
    assert float(nothing.detach()) == 0
    assert not torch.autograd.grad(nothing, logits)[0].any()


def test_test_images_are_never_seen(encoder, pack, trained, tmp_path):
    other = generated_pack(tmp_path / "other", train=30, val=12, test=15, spoiled=["test"])
    assert not np.array_equal(other.images[other.rows("test")], pack.images[pack.rows("test")])
    heads, history = train(view_of(encoder, pack), other)
    assert same_weights(heads, trained[0])
    pd.testing.assert_frame_equal(history, trained[1])


@pytest.mark.parametrize("task", ["classification", "segmentation"])
def test_a_killed_training_goes_on_to_the_same_weights(task, encoder, pack, pixel_view, pixels, tmp_path):
    run, view, given = decode, pixel_view, pixels
    if task == "classification":
        run, view, given = train, view_of(encoder, pack), pack
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, F, 8, "cross_entropy")  # in the second or third epoch
        with pytest.raises(KeyboardInterrupt):
            run(view, given, checkpoint=tmp_path / "heads.pt")
    resumed = run(view, given, checkpoint=tmp_path / "heads.pt")
    undisturbed = run(view, given)
    assert same_weights(resumed[0], undisturbed[0])
    pd.testing.assert_frame_equal(resumed[1], undisturbed[1])


def test_whatever_decides_a_training_names_its_checkpoint(encoder, pack, tmp_path, monkeypatch):
    """A small encoder made anew has the old one's name; heads know the embeddings of one encoder under one mask.

    That training under another name neither comes back nor overwrites: test_train.
    """
    options: dict[str, Any] = {"epochs": 2, "checkpoint": tmp_path / "heads.ckpt"}
    for view in (view_of(encoder, pack, MaskSpec()), view_of(tiny_encoder(seed=9), pack), view_of(encoder, pack)):
        train(view, pack, **options)
    for other in ({"seeds": (0, 1, 6)}, {"passes": 1}):
        train(view, pack, **options, **other)
    train(view, generated_pack(tmp_path / "other", train=30, val=12, test=15, seed=1), **options)
    monkeypatch.setattr(evaluation, "checksum_of_code", lambda *_: "of a module that was changed")
    train(view, pack, **options)
    assert len(list(tmp_path.glob("heads-????????.ckpt"))) == 7


def test_an_image_without_a_label_is_refused_and_not_counted_as_another(encoder, pixels):
    index = pixels.index.assign(label=[-1 if row == pixels.rows("test")[1] else 0 for row in range(len(pixels.index))])
    pack = replace(pixels, index=index)
    heads, _ = train(view_of(encoder, pack), pack, epochs=1)
    with pytest.raises(ValueError, match=r"1 images of .* have no label, first rows .*, or segment"):
        predict(view_of(encoder, pack), heads, pack)


def test_a_class_that_no_training_image_is_of_is_named(encoder, pack, tmp_path):
    emptied = replace(pack, index=pack.index.assign(split=np.where(pack.labels == 1, "test", pack.index["split"])))
    with pytest.warns(UserWarning, match=f"no training image is of {pack.classes[1]}:"):
        evaluation.train("classification", View(encoder, image_size=32), emptied, seeds=(0,), epochs=1)
    alone = replace(pack, card={**pack.card, "classes": ["forest"]}, index=pack.index.assign(label=0))
    with pytest.raises(ValueError, match="all labels are forest"):
        evaluation.train("classification", View(encoder, image_size=32), alone, seeds=(0,), epochs=1)


@pytest.mark.parametrize(
    "wrong", [{"seeds": (0, 0)}, {"seeds": ()}, {"seeds": 3}, {"epochs": 0}, {"epochs": -1}, {"batch_size": 0}]
)
def test_what_trains_nothing_is_refused_by_name(wrong, encoder, pack, pixel_view, pixels):
    (name,) = wrong
    said = "each seed makes one head" if name == "seeds" else f"{name} is 1 or more, got "
    for run, view, given in ((train, view_of(encoder, pack), pack), (decode, pixel_view, pixels)):
        with pytest.raises(ValueError, match=said):
            run(view, given, **wrong)


def test_what_decoders_can_not_stand_on_is_refused(pixel_view, pixels, make_pack, tmp_path):
    with pytest.raises(ValueError, match="a label an image, and none a pixel"):
        decode(pixel_view, make_pack(tmp_path, size=SIZE))
    with pytest.raises(ValueError, match=r"takes 256 and 2048 channels .*leave decoder_weights empty"):
        decode(pixel_view, pixels, weights=tmp_path / "checkpoint.pth")


@torch.no_grad()
def test_predictions_line_up_with_images_labels_and_history(encoder, pack, trained):
    view, (heads, history) = view_of(encoder, pack), trained
    found = predict(view, heads, pack, compute=CPU)
    assert list(found.columns) == ["head_seed", "sample", "label", "predicted"]
    assert found["head_seed"].tolist() == [seed for seed in SEEDS for _ in range(15)]
    assert found["sample"].tolist() == pack.rows("test").tolist() * len(SEEDS)
    assert (found["label"].to_numpy() == pack.labels[found["sample"]]).all()
    for sample in pack.rows("test"):  # each image on its own, in the plainest way
        images = to_reflectance(torch.from_numpy(pack.images[[sample]].view(np.int16)), 32)
        embedding = encoder(mask_batch(images, torch.tensor([sample]), view.spec, view.fill))
        expected = heads(embedding).argmax(-1).squeeze(1).tolist()
        assert found[found["sample"] == sample]["predicted"].tolist() == expected
    grouped = Pack(pack.path, pack.images, pack.index.assign(group=pack.index.index // 2), pack.card)
    assert (predict(view, heads, grouped)["group"] == (found["sample"] // 2).astype(str)).all()
    pd.testing.assert_frame_equal(predict(view_of(encoder, pack, batch_size=64), heads, pack), found)
    watched = predict(view, heads, pack, "val")
    accuracy = (watched["label"] == watched["predicted"]).groupby(watched["head_seed"]).mean()
    last = history[history["epoch"] == EPOCHS].set_index("head_seed")["overall_accuracy"]
    assert accuracy.to_dict() == pytest.approx(last.to_dict())


def test_a_map_carries_embeddings_to_those_of_complete_images(encoder, pack):
    """A linear function is found exactly, a bent one nearly; images never seen come nearer to complete ones."""
    draw = torch.Generator().manual_seed(0)
    seen, turn = torch.randn(200, 6, generator=draw), torch.randn(6, 6, generator=draw)
    exact = with_map(nn.Identity(), seen, seen @ turn.T + 3)
    torch.testing.assert_close(exact(seen), seen @ turn.T + 3, atol=1e-3, rtol=1e-3)
    bent = with_map(nn.Identity(), seen, seen.abs() @ turn.T)
    with pytest.warns(UserWarning, match="a map of 5 images brings embeddings no nearer"):
        with_map(nn.Identity(), seen[:5], seen[:5] + 0.01)
    half = seen * torch.tensor([0, 1, 1, 1, 1, 1])  # a unit that no training image woke tells nothing of others
    dead = with_map(nn.Identity(), half, half.abs() @ turn.T)
    torch.testing.assert_close(dead(half + torch.eye(6)[0] * 0.01), dead(half), atol=0.05, rtol=0)
    for incomplete, complete in ((seen, seen[1:]), (seen[0], seen[0]), (seen, seen * torch.nan)):
        with pytest.raises(ValueError, match="of the same 2 images or more"):
            with_map(nn.Identity(), incomplete, complete)
    new = torch.randn(200, 6, generator=draw)
    assert (bent(new) - new.abs() @ turn.T).square().mean() < 0.2 * (new.abs() @ turn.T).var()
    complete, masked = view_of(encoder, pack, MaskSpec()), view_of(encoder, pack)
    carried, test = free_view("dataset_mean mapped", complete, MASKED, pack), Batches(pack, "test", image_size=32)
    target, before, after = (embed_batches(view, test, CPU)[0] for view in (complete, masked, carried))
    assert (after - target).square().mean() < 0.7 * (before - target).square().mean()


def test_pixels_are_counted_as_scikit_learn_counts_them_image_by_image(pixel_view, pixels, decoders):
    counts = predict(pixel_view, decoders, pixels, compute=CPU)
    assert pixels.targets is not None
    rows = pixels.rows("test")
    images = torch.from_numpy(pixels.images[rows].astype(np.float32) / 10_000)
    batch = next(Batches(pixels, "test", targets=True).epoch())
    assert torch.equal(batch.images, images)
    shown = evaluation.segment(pixel_view, decoders, batch, compute=CPU)
    for place, seed in enumerate(decoders.seeds):
        for number, row in enumerate(rows):
            target = pixels.targets[row]
            labelled = target != IGNORE
            expected = confusion_matrix(target[labelled], shown[place, number].numpy()[labelled], labels=range(3))
            some = counts[(counts["head_seed"] == seed) & (counts["sample"] == row)]
            found = np.zeros((3, 3), int)
            found[some["label"], some["predicted"]] = some["pixels"]
            assert np.array_equal(found, expected)
    assert counts.groupby("group")["sample"].unique().map(list).to_dict() == {"group 0": [16, 17], "group 1": [18, 19]}
    pd.testing.assert_frame_equal(predict(replace(pixel_view, batch_size=3), decoders, pixels, compute=CPU), counts)
    larger = View(pixel_view.encoder, image_size=2 * SIZE, batch_size=4)  # counted on the labels' own grid
    total = predict(larger, decoders, pixels, compute=CPU).groupby("head_seed")["pixels"].sum()
    assert total.tolist() == [(pixels.targets[16:] != IGNORE).sum()] * 2


def test_a_hidden_pixels_value_reaches_no_map(pixel_view, decoders):
    """All of B08 is hidden; whatever it held, the map is the same."""
    blind = replace(pixel_view, spec=MaskSpec(("B08",), 1.0))
    images, rows, size = torch.rand(2, 13, SIZE, SIZE), torch.arange(2), torch.zeros(2, SIZE, SIZE)
    changed = images.clone()
    changed[:, 7] = torch.nan
    maps = [evaluation.segment(blind, decoders, Batch(i, rows, rows, size), compute=CPU) for i in (images, changed)]
    assert torch.equal(*maps)


TRAINING = {"seeds": [0, 3], "epochs": 2, "passes": 1}


@pytest.mark.parametrize("task", ["classification", "segmentation"])
def test_what_is_in_service_is_made_once_and_found_again(task, encoder, pack, pixel_view, pixels, outputs):
    given, view, training = pack, View(encoder, image_size=32, batch_size=8), TRAINING
    if task == "segmentation":
        given, view = pixels, View(pixel_view.encoder, image_size=SIZE, batch_size=4)
        training = {**TRAINING, "width": 8}

    def serve(view: View, *training: Any, **options: Any) -> tuple[Any, pd.DataFrame]:
        return evaluation.in_service(f"service-{task}", task, view, given, *training, compute=CPU, **options)

    made, history = serve(view, training)
    found, again = serve(view)
    assert same_weights(found, made)
    assert found.seeds == made.seeds
    pd.testing.assert_frame_equal(again, history)
    pd.testing.assert_frame_equal(predict(view, found, given), predict(view, made, given))
    folder = outputs / f"service-{task}" / "in_service" / task
    assert json.loads((folder / "settings.json").read_text())["epochs"] == 2
    for change, said in (({"epochs": 3}, "epochs: 2 there, 3 now"), ({"seeds": [1]}, r"seeds: \[0, 3\] there")):
        with pytest.raises(ValueError, match=said + ".*with mask none"):
            serve(view, {**training, **change})
    other = View(settled_encoder(given, seed=4), image_size=view.image_size, batch_size=view.batch_size)
    with pytest.raises(ValueError, match="encoder: "):
        serve(other)
    with pytest.raises(ValueError, match="complete images"):
        serve(view_of(encoder, pack))
    anew, _ = serve(other, training, replace=True)
    assert not same_weights(anew, made)
    weights = folder / "heads.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    with pytest.raises(ValueError, match="damaged or was changed"):
        serve(other)
    for damaged in ("{bad", "", "[]"):
        (folder / "settings.json").write_text(damaged)
        with pytest.raises(ValueError, match="damaged or was changed"):
            evaluation.read_in_service(folder)
    assert same_weights(serve(other, training, replace=True)[0], anew)
    weights.unlink()
    serve(other, training, replace=True)
    assert same_weights(evaluation.read_in_service(folder)[0], anew)


def test_methods_side_by_side_in_every_protocol(encoder, pack, outputs, monkeypatch):
    """The reference trains and predicts by hand."""
    folder = outputs / "compared" / "B8"
    card = encoders.Card("tuned", "test_resnet", embedding_dim=16, image_size=32, mask=vars(MASKED))
    student = settled_encoder(pack, seed=2)
    encoders.save_encoder(student, card, folder / "encoder-seed7")
    complete, fill = View(encoder, image_size=32, batch_size=8), view_of(encoder, pack).fill
    methods = ["pre-trained", "ridge_local", "mapped", "fine-tuned", "any-band"]
    loaded: list[Path] = []

    def load_any_band(path: Path) -> tuple[nn.Module, encoders.Card]:
        loaded.append(path)
        return NaNs(student), card

    monkeypatch.setattr(comparison.any_band, "load", load_any_band)
    views = comparison.method_views(methods, complete, MASKED, pack, fill, folder, [7])
    assert [*views] == [*((name, -1) for name in methods[:3]), ("fine-tuned", 7), ("any-band", 7)]
    assert loaded == [outputs / "compared" / "any-band" / "encoder-seed7"]
    given = {"experiment": "compared", "mask": "B8", "mask_scheme": "named", "mask_value": "dataset_mean"}
    given |= {"dataset": "generated", "head_seeds": [0, 3], "head_epochs": 2, "encoder_passes": 1}
    setup = Setup("classification", given, folder, pack, "tiny", MASKED, fill, complete, views, CPU)
    found = setup.compare()
    training = {"seeds": (0, 3), "epochs": 2, "passes": 1}
    service, _ = train(complete, pack, **training)
    for (name, seed), view in views.items():
        own, _ = train(view, pack, **training)
        for protocol, heads in {"kept": service, "retrained": own}.items():
            rows = found.predictions.query(f"method == {name!r} and protocol == {protocol!r}").reset_index(drop=True)
            expected = predict(view, heads, pack)
            pd.testing.assert_frame_equal(rows[list(expected)], expected)
            assert rows["encoder_seed"].isna().all() if seed < 0 else (rows["encoder_seed"] == seed).all()
    written = results.read_table(folder / "results.parquet")
    assert set(written["protocol"]) == {"kept", "retrained"}  # complete images belong to the run of mask none
    assert set(found.scored["protocol"]) == {"complete", "kept", "retrained"}
    assert (set(written["split"]), set(written["bands"])) == ({"val", "test"}, {"B04 B08 B11"})
    pd.testing.assert_frame_equal(results.read_table(folder / "predictions.parquet"), found.predictions)
    with pytest.raises(ValueError, match="trained with missing bands, such as galileo-nano"):
        comparison.method_views(["native"], complete, MASKED, pack, fill, folder)
    takes_gaps = NaNs(encoder)
    view = comparison.method_views(["native"], View(takes_gaps), MASKED, pack, fill, folder)["native", -1]
    assert view.encoder is takes_gaps
    assert view.fill.isnan().all()
    for other in (replace(MASKED, bands=("B02",)), replace(MASKED, ratio=0.3), replace(MASKED, value="ridge")):
        with pytest.raises(ValueError, match=r"holds an encoder for MaskSpec\(bands=\('B04', 'B08', 'B11'\)"):
            comparison.method_views(["fine-tuned"], complete, other, pack, fill, folder, [7])


class NaNs(nn.Module):
    """As an encoder for every loss: it reads NaN as lost."""

    takes_gaps = True

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, images: Tensor) -> Tensor:
        return self.encoder(images.nan_to_num(0.14))
