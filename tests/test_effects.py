"""What losing bands does to an encoder is measured on the batch that training would make, by the heads in service."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from bandmask import encoders, evaluate, masking
from bandmask.heads import SceneHeads
from bandmask.masking import MaskSpec
from bandmask.training import weights_checksum
from bandmask.visualizer.effects import Effect, find_effect, heads_in_service

CLASSES = ("water", "forest", "town")
MEANS = torch.linspace(0.1, 0.4, 13)


class Means(nn.Module):
    """Embeds an image as its band means: what is hidden shows at once."""

    def forward(self, images: Tensor) -> Tensor:
        return images.mean((2, 3))


def image(size: int = 16) -> np.ndarray:
    return np.random.default_rng(0).uniform(0.02, 0.5, (13, size, size)).astype(np.float32)


def heads(seeds: tuple[int, ...] = (0, 1)) -> SceneHeads:
    return SceneHeads(13, 3, seeds).eval()


@torch.no_grad()
def red_decides(threshold: float) -> SceneHeads:
    """Forest where the mean of B04 is above a threshold, else water."""
    made = SceneHeads(13, 3, (0,), hidden=1)
    made.weight1.zero_()[0, 3, 0] = 100.0
    made.bias1.fill_(-100.0 * threshold)
    made.weight2.zero_()[0, 0, 1] = 100.0
    made.bias2.zero_()[0, 0, 0] = 0.01
    return made


def test_similarity_is_that_of_the_batch_that_training_masks() -> None:
    spec = MaskSpec(("B02", "B08"), 0.5, "band_mean", shape="block", seed=4)
    _, readings = Effect(Means(), {}, image_size=16).of(image(), spec, 7, MEANS)
    batch = masking.mask_batch(torch.tensor(image())[None], torch.tensor([7]), spec, MEANS)
    expected = torch.cosine_similarity(batch.mean((2, 3)), torch.tensor(image())[None].mean((2, 3)))
    assert [reading.encoder for reading in readings] == ["pre-trained"]
    assert readings[0].similarity == pytest.approx(float(expected[0]), abs=1e-6)


def test_nothing_hidden_is_similarity_1_and_no_flip() -> None:
    complete, readings = Effect(Means(), {}, heads(), CLASSES, 16).of(image(), MaskSpec(), 0, MEANS)
    assert readings[0].similarity == pytest.approx(1)
    assert not readings[0].flipped
    assert readings[0].predicted == complete.predicted
    assert readings[0].probability == pytest.approx(complete.probability)


def test_a_flip_is_reported_by_the_encoder_that_flips_and_no_other() -> None:
    """The fine-tuned one here knows what red was; the pre-trained one sees the mask value."""

    class Knows(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return torch.tensor(image())[None].mean((2, 3))

    effect = Effect(Means(), {("B04",): Knows()}, red_decides(0.1), CLASSES, 16)
    complete, (pretrained, fine_tuned) = effect.of(image(), MaskSpec(("B04",), 1.0), 0, torch.full((13,), -1.0))
    assert complete.predicted == "forest"
    assert (pretrained.predicted, pretrained.flipped) == ("water", True)
    assert (fine_tuned.predicted, fine_tuned.flipped) == ("forest", False)
    assert (pretrained.encoder, fine_tuned.encoder) == ("pre-trained", "fine-tuned")
    assert 0.5 < fine_tuned.probability <= 1


def test_a_fine_tuned_encoder_reads_only_the_mask_it_was_made_for() -> None:
    effect = Effect(Means(), {("B04",): Means()}, image_size=16)
    assert len(effect.of(image(), MaskSpec(("B04",)), 0, MEANS)[1]) == 2
    assert len(effect.of(image(), MaskSpec(("B04", "B08")), 0, MEANS)[1]) == 1


def test_images_are_resized_before_they_are_masked_as_in_training() -> None:
    spec = MaskSpec(("B02",), 0.5, "band_mean")
    _, readings = Effect(Means(), {}, image_size=32).of(image(16), spec, 7, MEANS)
    large = torch.nn.functional.interpolate(torch.tensor(image(16))[None], size=(32, 32), mode="bilinear")
    batch = masking.mask_batch(large, torch.tensor([7]), spec, MEANS)
    expected = torch.cosine_similarity(batch.mean((2, 3)), large.mean((2, 3)))
    assert readings[0].similarity == pytest.approx(float(expected[0]), abs=1e-6)


def test_probabilities_are_means_over_heads() -> None:
    made = heads((0, 1, 2)).requires_grad_(False)
    complete, _ = Effect(Means(), {}, made, CLASSES, 16).of(image(), MaskSpec(), 0, MEANS)
    chances = made(torch.tensor(image())[None].mean((2, 3))).softmax(-1).mean(0)[0]
    assert complete.probability == pytest.approx(float(chances.max()))
    assert complete.predicted == CLASSES[int(chances.argmax())]


def test_an_experiment_without_an_encoder_has_none() -> None:
    assert find_effect("never-made", CLASSES) is None


def test_what_runs_have_left_is_found_and_reads_as_it_did_there(outputs: Path, make_pack) -> None:
    """Real files: an encoder, two fine-tuned ones by `save_encoder`, and heads by their own training."""
    pack = make_pack(outputs / "effects-pack", n=36, size=16)
    folder, size = outputs / "effects", 16
    model = encoders.create_encoder("resnet18").eval()
    card = encoders.Card("tiny", "resnet18", image_size=size)
    encoders.save_encoder(model, card, folder / "encoder")
    students = {}
    for seed, run in ((0, "B8"), (1, "B8"), (0, "B2_B3_B4")):
        spec = MaskSpec(("B08",) if run == "B8" else ("B02", "B03", "B04"), seed=seed)
        student = encoders.create_encoder("resnet18", seed=seed + len(run)).eval()
        tuned = encoders.Card("tuned", "resnet18", image_size=size, mask=vars(spec), seed=seed)
        encoders.save_encoder(student, tuned, folder / run / f"encoder-seed{seed}")
        students[run, seed] = student
    view = evaluate.View(model, MaskSpec(), MEANS, size)
    made, _ = evaluate.in_service("effects", "classification", view, pack, {"seeds": [3, 4], "epochs": 1})
    effect = find_effect("effects", pack.classes)
    assert effect is not None
    assert set(effect.fine_tuned) == {("B08",), ("B02", "B03", "B04")}
    picture = np.asarray(pack.images[5], np.float32) / 10_000
    spec = MaskSpec(("B08",), 0.9)
    complete, (_, tuned_reading) = effect.of(picture, spec, 5, MEANS)
    batch = torch.tensor(picture)[None]
    with torch.no_grad():
        target = model(batch)
        found = students["B8", 0](masking.mask_batch(batch, torch.tensor([5]), spec, MEANS))
        expected = made(target).softmax(-1).mean(0)[0]
    assert tuned_reading.similarity == pytest.approx(float(torch.cosine_similarity(found, target)[0]), abs=1e-5)
    assert complete.predicted == pack.classes[int(expected.argmax())]


def test_heads_of_another_encoder_are_not_taken(tmp_path: Path) -> None:
    model, other = (encoders.create_encoder("resnet10t", seed=seed).eval() for seed in (0, 1))
    assert heads_in_service(tmp_path, model) is None
    made = {"seeds": [1], "encoder": weights_checksum(model)}
    evaluate.write_in_service(tmp_path / "in_service" / "classification", heads((1,)), made)
    found = heads_in_service(tmp_path, model)
    assert found is not None
    assert found.seeds == (1,)
    assert heads_in_service(tmp_path, other) is None
