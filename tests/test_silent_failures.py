"""Failures that raise nothing and only make figures wrong: each has a test that would see it."""

import copy

import numpy as np
import pandas as pd
import pytest
import torch
import trees
from models import generated_images, generated_pack, settled_encoder
from test_bands import HIDES

from bandmask import align, bands, datasets, evaluation, masks, packs
from bandmask.batches import Batches
from bandmask.train import Compute

CPU = Compute.of("cpu")
B8 = masks.MaskSpec(("B08",))


@pytest.fixture(scope="module")
def pack(tmp_path_factory):
    return generated_pack(tmp_path_factory.mktemp("silent") / "pack", train=24, val=16, test=16)


@pytest.fixture(scope="module")
def encoder(pack):
    return settled_encoder(pack)


def test_an_embedding_does_not_depend_on_its_batch_mates(pack, encoder):
    """A batch norm left in train mode would tell images of their neighbours."""
    encoder.train()  # as a careless caller might leave it
    view = evaluation.View(encoder, B8, masks.fill_values("band_mean", torch.tensor(pack.band_means())), 32)
    by_size = [evaluation.embed_batches(view, Batches(pack, "test", batch_size=size), CPU)[0] for size in (2, 5, 16)]
    torch.testing.assert_close(by_size[0], by_size[1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(by_size[0], by_size[2], rtol=1e-5, atol=1e-5)


def test_with_nothing_hidden_the_view_is_the_checkpoint(pack, encoder):
    """Complete input gives what the checkpoint gives, bit for bit, whatever the fill."""
    view = evaluation.View(encoder, masks.MaskSpec(), torch.full((13,), float("nan")), 32)
    batches = Batches(pack, "test", batch_size=16)
    found, _ = evaluation.embed_batches(view, batches, CPU)
    with torch.no_grad():
        expected = encoder.eval()(next(batches.epoch()).images)
    assert torch.equal(found, expected)


def test_validation_batches_mix_classes(tmp_path, encoder):
    """Files come sorted by class; batches of one class make the contrastive loss harder and no two runs comparable."""
    images, labels, seen = generated_images(96, classes=3)[0], np.repeat([0, 1, 2], 32), []
    index = pd.DataFrame({"label": labels, "split": ["train"] * 8 + ["val"] * 88})
    about = {"name": "g", "classes": ["a", "b", "c"], "source": "generated", "source_checksum": "x"}
    by_class = packs.write_pack(tmp_path / "sorted", images.__getitem__, index, **about)
    watched = copy.deepcopy(encoder)
    watched.register_forward_pre_hook(lambda _, given: seen.append(given[0][:, 0, 0, 0]))
    align.fine_tune(watched, by_class, B8, torch.zeros(13), epochs=1, batch_size=8, image_size=32, compute=CPU)
    first_pixels = images[:, 0, 0, 0] / np.float32(10_000)
    for batch in seen[1:22:2]:  # the teacher's, complete, before training
        rows = [int(np.abs(first_pixels - float(value)).argmin()) for value in batch]
        assert len(set(labels[rows])) > 1


def test_wrong_band_order_would_hide_another_band_so_it_is_refused(eurosat_source, tmp_path, monkeypatch):
    """Real EuroSAT files read in SatCLIP's order: all shapes fit, all means look plausible but one."""
    monkeypatch.setitem(bands.ORDERS, "eurosat", bands.NAMES)
    monkeypatch.setenv("BANDMASK_OUTPUTS", str(tmp_path))
    with pytest.raises(ValueError, match="pixels are in the order of 'eurosat'"):
        datasets.pack_eurosat()
    assert not (tmp_path / "packs/eurosat").exists()


DN = {band.name: 11 if band.name == "B10" else 500 + band.wavelength_nm for band in bands.BANDS}


@pytest.fixture(scope="module")
def two_orders(tmp_path_factory, make_pack):
    """Packs of one generated ground in EuroSAT's order and in SEN12MS': each band has a DN of its own throughout."""
    ground = np.array([DN[name] for name in bands.NAMES], np.uint16)[None, :, None, None].repeat(6, 0).repeat(8, 3)
    orders = {name: bands.channel_indices(bands.ORDERS[name]) for name in ("eurosat", "sen12ms")}
    return [make_pack(tmp_path_factory.mktemp(n), images=ground[:, order], order=n) for n, order in orders.items()]


@pytest.mark.parametrize("mask", HIDES)
def test_a_named_mask_hides_the_same_bands_in_both_data_sets_and_one_by_position_others(two_orders, mask):
    """Resolved with the pack's own file order and applied to its pixels: their DN say which band was hidden."""
    named, position = ([DN[name] for name in names.split()] for names in HIDES[mask])
    for pack, by_position in zip(two_orders, (position, named), strict=True):
        for scheme, expected in (("named", named), ("position", by_position)):
            spec = masks.MaskSpec(bands.resolve_mask(mask, scheme, pack.card["stored_order"]), ratio=1.0)
            image = torch.tensor(pack.images[:1].astype(np.float32))
            masked = masks.mask_batch(image, torch.tensor([0]), spec, masks.fill_values(-1.0, torch.zeros(13)))
            assert sorted(set(image[masked == -1.0].tolist())) == sorted(expected)


def test_sen12ms_files_in_another_order_are_refused(tmp_path, monkeypatch):
    """A tree written in EuroSAT's order has the right shapes and plausible means; only B10 gives it away."""
    monkeypatch.setattr(datasets, "SHAPE", (13, 16, 16))
    root = trees.sen12ms_tree(tmp_path / "data", channels=bands.channel_indices(bands.ORDERS["eurosat"]))
    monkeypatch.setenv("BANDMASK_DATA", str(root))
    monkeypatch.setenv("BANDMASK_OUTPUTS", str(tmp_path))
    with pytest.raises(ValueError, match="pixels are in the order of 'eurosat'"):
        datasets.pack_sen12ms()
    assert not (tmp_path / "packs/sen12ms").exists()
