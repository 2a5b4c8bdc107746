"""ukis-csmask's U-Net in torch: equal to its ONNX file, and an encoder like any other."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import bandmask as bm
from bandmask import bands, files, foundation
from bandmask.align import Objective, fine_tune
from bandmask.encoders import create_encoder, embed, load_encoder, save_encoder
from bandmask.evaluation import decoder_taps
from bandmask.masks import MaskSpec

NAME = "ukis-csmask-6b-l1c"
NEEDED = [name for name in ("ukis_csmask", "onnx", "onnxruntime") if importlib.util.find_spec(name) is None]
IMAGE = (files.data_root() or files.project_root() / "nowhere") / "clouds" / "ukis_landsat7.npz"


def test_its_layers_are_those_of_the_published_file() -> None:
    """By the checksum of the file's 655 names and shapes."""
    state = create_encoder(NAME).unet.state_dict().items()
    layers = sorted((key, list(value.shape)) for key, value in state if not key.endswith("num_batches_tracked"))
    assert len(layers) == 655
    assert files.checksum_of(layers) == "1c32490e746e9aafd44aa265506bc1cf18c1a8cbf76961ae2073546fb6ac0bf0"


@pytest.mark.skipif(bool(NEEDED) or not IMAGE.exists(), reason=f"needs {', '.join(NEEDED) or IMAGE}")
def test_it_answers_a_real_image_as_onnxruntime_does() -> None:
    import onnx
    import onnxruntime
    from onnx import numpy_helper

    model, _ = load_encoder(NAME)
    network = onnx.load(foundation.load_clouds(NAME)[1])
    del network.graph.value_info[:]  # types of what is between layers: 16 bits, as the weights, lose two digits
    parts = [part for node in network.graph.node for part in node.attribute]
    for tensor in [*network.graph.initializer, *(part.t for part in parts if part.name == "value")]:
        if tensor.data_type == onnx.TensorProto.FLOAT16:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float32), tensor.name))
    for part in (part for part in parts if part.name == "to" and part.i == onnx.TensorProto.FLOAT16):
        part.i = onnx.TensorProto.FLOAT
    six = torch.from_numpy(np.load(IMAGE)["img"][:256, :256]).permute(2, 0, 1)[None]
    images = torch.full((1, 13, 256, 256), torch.nan)  # what it doesn't take may be missing
    images[:, bands.channel_indices(model.bands)] = six
    given = {"input": ((six - model.mean) / model.sd).numpy()}
    (expected,) = onnxruntime.InferenceSession(network.SerializeToString()).run(None, given)
    with torch.inference_mode():
        np.testing.assert_allclose(model.logits(images).numpy(), expected, atol=1e-4)
    assert bm.load_encoder(NAME)(images).shape == (1, 448)


def test_it_is_tuned_saved_and_tapped_as_any_encoder(make_pack: Any, tmp_path: Path) -> None:
    model, mask = create_encoder(NAME), MaskSpec(("B02",), 1.0, shape="band")
    options: dict[str, Any] = {"objective": Objective(0.1, 1.0, 1.0), "image_size": 32, "batch_size": 4, "epochs": 1}
    student, _ = fine_tune(model, make_pack(tmp_path, n=12, size=32), mask, torch.zeros(13), **options)
    assert not torch.equal(student.unet.encoder._conv_stem.weight, model.unet.encoder._conv_stem.weight)
    card = replace(bm.load_encoder("mini").card, architecture=NAME, embedding_dim=448)
    again, _ = load_encoder(save_encoder(student, card, tmp_path / "own"))
    images, taps = torch.rand(2, 13, 64, 64), decoder_taps(again)
    with torch.no_grad():
        embedding, maps = embed(again, images, taps)
        assert torch.equal(embedding, student(images))
        assert [tuple(maps[tap].shape[1:]) for tap in taps] == [(32, 16, 16), (448, 2, 2)]
    with pytest.raises(ValueError, match="sides a multiple of 32 px"):
        again(images[..., :40])


def test_what_is_not_installed_or_damaged_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "model_6b_l1c.json").write_text("{}")
    (tmp_path / "model_6b_l1c.onnx").write_text("<html>")
    pytest.importorskip("onnx")
    with pytest.raises(ValueError, match="is damaged, or no ONNX file"):
        load_encoder(NAME, weights=tmp_path)
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(ModuleNotFoundError, match=r"read by the package onnx: pip install 'bandmask\[models\]'"):
        load_encoder(NAME, weights=tmp_path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="pip install --no-deps ukis-csmask"):
        load_encoder(NAME)


@pytest.mark.skipif(not IMAGE.exists(), reason=f"needs {IMAGE}")
def test_the_page_packs_images_whole_and_leaves_a_row_between(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    exec((files.project_root() / "docs/findings/clouds.md").read_text().split("```python\n")[1].split("```")[0], {})
    pack = bm.open_dataset("outputs/packs/clouds-landsat5")
    assert pack.index.groupby("split")["group"].unique().map(sorted).to_dict() == {
        "test": ["landsat5, test"],
        "train": ["landsat7, train", "sentinel2, train"],
        "val": ["landsat7, val", "sentinel2, val"],
    }
    assert pack.index["split"].value_counts().to_dict() == {"test": 16, "train": 16, "val": 8}
