"""Pixels are counted exactly as another library counts them, on the labels' own grid; hidden values reach no map.

Images and the published model's weights are generated.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from models import labelled_pack, settled_encoder
from sklearn.metrics import confusion_matrix

from bandmask import maps, segmentation
from bandmask.decoders import DFC2020_CLASSES, Dfc2020Model, SegmentationDecoders
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
def view(pack: Pack) -> View:
    return View(settled_encoder(pack), MaskSpec(("B08",), 0.5), torch.full((13,), 0.2), SIZE, 4)


@pytest.fixture(scope="module")
def decoders(view: View, pack: Pack) -> SegmentationDecoders:
    made, _ = segmentation.make_decoders(view, 3, SEEDS, width=8, compute=CPU)
    segmentation.train_decoders(view, pack, made, epochs=3, compute=CPU, progress=False)
    return made


def test_counts_are_scikit_learns_image_by_image(view: View, pack: Pack, decoders: SegmentationDecoders):
    counts = maps.predict(view, decoders, pack, compute=CPU)
    assert pack.targets is not None
    rows = pack.rows("test")
    images = torch.from_numpy(pack.images[rows].astype(np.float32) / 10_000)
    shown = maps.segment(view, decoders, images, torch.from_numpy(rows), (SIZE, SIZE), compute=CPU)
    for place, seed in enumerate(SEEDS):
        for number, row in enumerate(rows):
            target = pack.targets[row]
            labelled = target != IGNORE
            expected = confusion_matrix(target[labelled], shown[place, number].numpy()[labelled], labels=range(3))
            some = counts[(counts["head_seed"] == seed) & (counts["sample"] == row)]
            found = np.zeros((3, 3), int)
            found[some["label"], some["predicted"]] = some["pixels"]
            assert np.array_equal(found, expected)
    assert counts.groupby("group")["sample"].unique().map(list).to_dict() == {"group 0": [16, 17], "group 1": [18, 19]}


def test_counts_do_not_depend_on_the_batch_size(view: View, pack: Pack, decoders: SegmentationDecoders):
    by_three = View(view.encoder, view.spec, view.fill, SIZE, 3)
    first, second = (maps.predict(v, decoders, pack, compute=CPU) for v in (view, by_three))
    pd.testing.assert_frame_equal(first, second)


def test_a_hidden_pixels_value_reaches_no_map(view: View, pack: Pack):
    """All of B08 is hidden; whatever it held, the map is the same."""
    blind = View(view.encoder, MaskSpec(("B08",), 1.0), view.fill, SIZE, 4)
    decoders, _ = segmentation.make_decoders(blind, 3, SEEDS, width=8, compute=CPU)
    images = torch.rand(2, 13, SIZE, SIZE)
    changed = images.clone()
    changed[:, 7] = torch.nan
    samples = torch.arange(2)
    first, second = (maps.segment(blind, decoders, i, samples, compute=CPU) for i in (images, changed))
    assert torch.equal(first, second)


def test_maps_of_enlarged_images_are_counted_on_the_labels_own_grid(
    view: View, pack: Pack, decoders: SegmentationDecoders
):
    larger = View(view.encoder, MaskSpec(), torch.zeros(13), 2 * SIZE, 4)
    counts = maps.predict(larger, decoders, pack, compute=CPU)
    assert pack.targets is not None
    assert counts.groupby("head_seed")["pixels"].sum().tolist() == [(pack.targets[16:] != IGNORE).sum()] * 2


def test_the_published_model_is_counted_by_the_names_of_its_classes(tmp_path: Path):
    """Its weights are random here; the reference takes its logits and looks the names up."""
    generated = labelled_pack(tmp_path / "first", train=2, val=2, test=2)
    ten = ["Water", "Savanna", *(name for name in DFC2020_CLASSES if name != "Water")]
    renamed = Pack(
        generated.path, generated.images, generated.index, {**generated.card, "classes": ten}, generated.targets
    )
    torch.manual_seed(0)
    model = Dfc2020Model().eval()
    nothing = MaskSpec()
    counts = maps.predict_published(model, renamed, nothing, torch.zeros(13), compute=CPU)
    rows = renamed.rows("test")
    with torch.no_grad():
        logits = model(torch.from_numpy(renamed.images[rows].astype(np.float32) / 10_000))
    names = np.array(DFC2020_CLASSES)[logits.argmax(1).numpy()]
    assert renamed.targets is not None
    for row, shown in zip(rows, names, strict=True):
        labelled = renamed.targets[row] != IGNORE
        expected = pd.Series(shown[labelled]).value_counts().to_dict()
        some = counts[counts["sample"] == row]
        found = some.groupby(some["predicted"].map(ten.__getitem__))["pixels"].sum().to_dict()
        assert found == expected
    with pytest.raises(ValueError, match=r"predicts Forest, .*has no class for"):
        maps.predict_published(model, generated, nothing, torch.zeros(13), compute=CPU)
