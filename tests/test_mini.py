"""What comes with the package: 200 real images, bit for bit, and a small set that saw none of them."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import reflectance
from safetensors.torch import load_file

import bandmask as bm
from bandmask import any_band, bands, encoders, evaluation, files, fills, masks
from bandmask.datasets import EUROSAT_CLASSES, open_dataset
from bandmask.packs import Pack
from bandmask.train import Compute, weights_checksum

EUROSAT_DN = [1380, 1143, 1066, 976, 1219, 2043, 2420, 2337, 2641, 726, 11, 1870, 1177]  # means of 1,357 real images
CPU = Compute.of("cpu")


def test_the_embedded_images_are_200_test_images_of_eurosat_bit_for_bit() -> None:
    """By checksums that were taken of EuroSAT's files; and nothing else may be trained on them, by mistake either."""
    mini = open_dataset("eurosat-mini")
    assert [hashlib.sha256(image.tobytes()).hexdigest() for image in mini.images] == mini.index["sha256"].tolist()
    assert sum(file.stat().st_size for file in files.MINI.glob("*.jp2")) < 9e6
    assert [EUROSAT_CLASSES[label] for label in mini.labels] == [f.split("/")[0] for f in mini.index["file"]]
    with pytest.raises(ValueError, match="has no image in split 'train'"):
        mini.rows("train")
    moments = fills.Moments.of(mini)
    assert moments.mean == pytest.approx(mini.band_means())
    assert moments.mean * 1e4 == pytest.approx(EUROSAT_DN, rel=0.05, abs=2)


def test_what_the_embedded_encoder_was_trained_on_holds_none_of_the_embedded_images(eurosat_pack: Pack) -> None:
    mini, made_from = open_dataset("eurosat-mini"), open_dataset("eurosat-mini-train")
    names = [Path(file).stem for file in made_from.index["file"]]
    assert {names[row] for row in made_from.rows("test")} == {Path(file).stem for file in mini.index["file"]}
    assert np.array_equal(made_from.images, eurosat_pack.images)
    official = {names[row] for row in eurosat_pack.rows("test")}
    assert {names[row] for row in made_from.rows("test")} <= official
    pixels = fills.Moments.of(made_from, pixels=10**9)
    assert fills.Moments.of(mini).covariance == pytest.approx(pixels.covariance)


# --- encoder, any-band student and heads


@pytest.fixture(scope="module")
def mini(outputs: Path) -> Pack:
    return open_dataset("eurosat-mini")


def test_the_set_is_small_in_16_bits_and_says_whose_knowledge_it_is() -> None:
    found = sorted((files.MINI / "encoder").rglob("model.safetensors"))
    assert len(found) == 2
    assert sum(file.stat().st_size for file in files.MINI.rglob("*") if file.suffix in (".safetensors", ".npz")) < 8e6
    for path in found:
        state = load_file(path)
        assert {tensor.dtype for tensor in state.values()} <= {torch.float16, torch.int64}
        assert "Galileo" in encoders.read_card(path.parent).notes


def test_its_heads_were_trained_on_its_encoder_and_on_none_of_the_embedded_images(eurosat_pack: Pack) -> None:
    _, made = evaluation.read_in_service(files.MINI / "heads")
    encoder, card = encoders.load_encoder("mini")
    assert made["encoder"] == weights_checksum(encoder)
    assert made["data"] == open_dataset("eurosat-mini-train").fingerprint
    assert card.data["checksum"] == eurosat_pack.checksum


def test_on_real_labels_it_is_right_and_one_for_all_beats_the_free_fill_where_two_bands_are_left(mini: Pack) -> None:
    encoder, _ = encoders.load_encoder("mini")
    student, _ = any_band.load("mini")
    heads, _ = evaluation.in_service("unused", "classification", evaluation.View(encoder, image_size=64), mini)
    lost = tuple(name for name in bands.NAMES if name not in ("B02", "B04"))
    spec = masks.MaskSpec(lost, 1.0, shape="band")
    views = {"complete": evaluation.View(encoder, image_size=64)}
    views["ridge"] = evaluation.View(encoder, spec, fills.RidgeLocalFill(fills.Moments.of(mini), spec.bands), 64)
    views["one for all"] = evaluation.View(student, spec, any_band.MISSING, 64)
    said = {name: evaluation.predict(view, heads, mini, compute=CPU) for name, view in views.items()}
    right = {name: (rows["label"] == rows["predicted"]).mean() for name, rows in said.items()}
    assert right["complete"] > 0.85
    assert right["one for all"] > right["ridge"] + 0.05 > 0.3


def test_complete_images_go_through_the_any_band_student_as_through_the_encoder_bit_for_bit(mini: Pack) -> None:
    images = reflectance(mini, slice(8))
    encoder, _ = encoders.load_encoder("mini")
    with torch.no_grad():
        assert torch.equal(bm.load_encoder("mini").model(images), encoder(images))


def test_heads_refuse_another_encoder(mini: Pack) -> None:
    other = encoders.create_encoder("test_resnet", embedding_dim=128)
    with pytest.raises(ValueError, match="stands on the encoder 'mini'"):
        evaluation.in_service("unused", "classification", evaluation.View(other), mini)
