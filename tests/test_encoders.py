"""Encoders load what was published, refuse what doesn't fit by name, and no file makes them run code or call out.

No published checkpoint can be downloaded here: the SatCLIP and MoCo files are synthetic, with exactly the keys, shapes
and dtypes that the published ones have (SatCLIP's `model.py`, TorchGeo's `Weights`), and random weights.
"""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from models import TINY, Evil, same_weights, save, scattered, tiny_encoder
from safetensors.torch import load_file

import bandmask
from bandmask import bands, encoders, files
from bandmask.encoders import PUBLISHED, Card, create_encoder, default_taps, embed, load_encoder, save_encoder
from bandmask.masks import MaskSpec

SATCLIP = "satclip-resnet50-l40"
SIX = [name for name in PUBLISHED if name.startswith("satclip")]


def hollow(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same keys and shapes, each tensor one stored zero: a file of kilobytes instead of 94 MB."""
    return {key: torch.zeros((), dtype=value.dtype).expand(value.shape) for key, value in state.items()}


def visual(architecture: str = "resnet50", num_classes: int = 256) -> dict[str, torch.Tensor]:
    with torch.device("meta"):
        model = timm.create_model(architecture, in_chans=13, num_classes=num_classes)
    return hollow(model.state_dict())


def satclip_checkpoint(state: dict[str, torch.Tensor], legendre: int = 40) -> dict[str, Any]:
    """A Lightning dictionary as SatCLIP's: vision encoder in float32, location encoder in float64."""
    first, last = torch.zeros((), dtype=torch.float64), torch.zeros(256, dtype=torch.float64)
    location = {"layers.0.weight": first.expand(512, legendre**2), "last_layer.bias": last}
    return {
        "epoch": 499,
        "pytorch-lightning_version": "2.1.0",
        "state_dict": {
            "model.logit_scale": torch.tensor(2.8952996730804443),
            **{f"model.visual.{name}": tensor for name, tensor in state.items()},
            **{f"model.nnet.{name}": tensor for name, tensor in location.items()},
            **{f"model.location.nnet.{name}": tensor for name, tensor in location.items()},
        },
        "callbacks": {"ModelCheckpoint{'monitor': 'val_loss'}": {"best_model_path": ""}},
        "hyper_parameters": {"embed_dim": 256, "legendre_polys": legendre},
    }


def card_of(**changes: Any) -> Card:
    mask, data = dataclasses.asdict(MaskSpec(("B08",), seed=4)), {"name": "generated", "checksum": "abc123"}
    return dataclasses.replace(Card("tiny, for B08", TINY, 16, 32, "tiny", mask, 7, data), **changes)


@pytest.fixture
def folder(tmp_path):
    """A saved encoder."""
    return save_encoder(tiny_encoder(), card_of(), tmp_path / "encoder")


def rewrite_card(folder: Path, **change: Any) -> None:
    """With other entries; None leaves one out. By hand: no checksum vouches for them."""
    entries = {**json.loads((folder / "card.json").read_text()), "sum": None, **change}
    (folder / "card.json").write_text(json.dumps({k: v for k, v in entries.items() if v is not None}))


@torch.no_grad()
@pytest.mark.parametrize("name", SIX)
def test_each_satclip_encoder_gives_timm_s_embeddings(name, tmp_path):
    """To the last bit, by its prefix alone; the location encoder is left out."""
    published = PUBLISHED[name]
    source = scattered(timm.create_model(published.architecture, in_chans=13, num_classes=256))
    path = save(satclip_checkpoint(source.state_dict(), published.legendre), tmp_path / "a.ckpt")
    model, card = load_encoder(name, weights=path)
    images = torch.rand(1, 13, card.image_size, card.image_size, generator=torch.Generator().manual_seed(0))
    assert torch.equal(model(images), source(images))
    assert not model.training
    assert (card.name, card.embedding_dim) == (published.title, 256)
    assert (card.image_size, "224 px" in card.notes) == ((224, True) if "vit" in name else (256, False))
    assert card.parent in PUBLISHED
    assert "cirrus" in card.notes


@pytest.mark.parametrize("held", SIX)
def test_a_checkpoint_under_another_name_says_which_of_the_six_it_is(held, tmp_path):
    other = PUBLISHED[held]
    path = save(satclip_checkpoint(visual(other.architecture), other.legendre), tmp_path / "a.ckpt")
    for name in {*SIX} - {held}:
        with pytest.raises(ValueError, match=rf"is not {name}: its layers are those of {held};"):
            load_encoder(name, weights=path)
    path = save(satclip_checkpoint(visual(other.architecture), 20), tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match="its layers are those of another model, with 20 polynomials"):
        load_encoder(held, weights=path)


def test_what_does_not_fit_is_named(tmp_path):
    """Each key in turn: test_heads."""
    whole = satclip_checkpoint(visual("resnet18"))
    for name, value in (
        ("model.visual.fc.bias", None),
        ("model.other.weight", torch.zeros(2)),
        ("model.visual.fc.bias", 3),
    ):
        state = {key: held for key, held in {**whole["state_dict"], name: value}.items() if held is not None}
        path = save({**whole, "state_dict": state}, tmp_path / "a.ckpt")
        with pytest.raises(ValueError, match=name.removeprefix("model.visual.")) as error:
            load_encoder("satclip-resnet18-l40", weights=path)
        assert str(path) in str(error.value)


def test_a_truncated_checkpoint_is_called_damaged(tmp_path):
    """Before 1.6, torch wrote bare pickles. A failed download leaves a web page or a Git LFS pointer."""
    contents = [b"<html>404 Not Found</html>", b"version https://git-lfs"]
    for new in (True, False):
        path = save({"conv1.weight": torch.zeros(2000)}, tmp_path / "a.pth", _use_new_zipfile_serialization=new)
        whole = path.read_bytes()
        contents += [whole[: int(share * len(whole))] for share in (0, 0.3, 0.999)]
    for content in contents:
        path.write_bytes(content)
        with pytest.raises(ValueError, match=rf"{re.escape(str(path))}.*damaged"):
            load_encoder("moco-resnet50", weights=path)


@torch.no_grad()
@pytest.mark.parametrize(
    ("source", "head"), [("moco-resnet18", "fc"), ("dino-resnet50", "fc"), ("moco-vit-small", "head")]
)
def test_torchgeo_s_backbones_give_timm_s_features(source, head, tmp_path):
    """And a fresh last layer, the same every time."""
    reference = scattered(timm.create_model(PUBLISHED[source].architecture, in_chans=13, num_classes=0))
    model, card = load_encoder(source, weights=save(reference.state_dict(), tmp_path / "backbone.pth"))
    images = torch.rand(1, 13, card.image_size, card.image_size, generator=torch.Generator().manual_seed(0))
    assert torch.equal(model.forward_head(model.forward_features(images), pre_logits=True), reference(images))
    fresh = create_encoder(card.architecture)
    assert torch.equal(model.get_submodule(head).weight, fresh.get_submodule(head).weight)
    assert card.name.endswith(f", fresh {head}")
    assert f"untrained {head} (seed 0)" in card.notes


def test_torchgeo_s_entries_exist_and_take_13_bands_in_our_order():
    """The names are TorchGeo's; an entry of another order or scaling would load, and be wrong in silence."""
    for published in PUBLISHED.values():
        entry = published.weights
        assert entry.meta["model"] == published.architecture
        assert [bands.parse_band(name) for name in entry.meta["bands"]] == list(bands.NAMES)
        scaled = entry.transforms({"image": torch.full((1, 13, 256, 256), 10_000.0)})["image"]
        assert torch.equal(scaled, torch.ones_like(scaled))


ASKED = [
    *(("pretrained_cfg_overlay", {"url": "https://example.org/a.pth"}), ("checkpoint_path", "a.pth")),
    *(("pretrained", True), ("drop_rate", 1), ("num_heads", "4"), ("num_heads", 0), ("img_size", 10**9)),
]  # of timm, by a card


@pytest.mark.parametrize("checksum_fits", [False, True])
def test_a_file_planted_in_torch_s_cache_runs_nothing(checksum_fits, monkeypatch, tmp_path):
    """Neither because its checksum is another, nor where 32 bits of it were made to fit."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    cache = tmp_path / "hub" / "checkpoints"
    cache.mkdir(parents=True)
    save(Evil(tmp_path / "marker"), cache / "resnet50_sentinel2_all_moco-df8b932e.pth")
    if checksum_fits:
        monkeypatch.setattr(files, "sha256", lambda _: "df8b932e" + 56 * "0")
    with pytest.raises(ValueError, match="any code" if checksum_fits else "its checksum is another. Delete it"):
        load_encoder("moco-resnet50")
    assert not (tmp_path / "marker").exists()


def test_a_file_changed_in_hugging_face_s_cache_is_refused(monkeypatch, tmp_path):
    blob = tmp_path / "blobs" / (64 * "0")
    blob.parent.mkdir()
    save(satclip_checkpoint(visual()), blob)
    link = tmp_path / "satclip.ckpt"
    link.symlink_to(blob)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *_, **__: str(link))
    with pytest.raises(ValueError, match="its checksum is another"):
        load_encoder(SATCLIP)
    right = blob.rename(blob.with_name(files.sha256(blob)))
    link.unlink()
    link.symlink_to(right)
    assert load_encoder(SATCLIP)[1].name == "SatCLIP ResNet50 L40"


@pytest.mark.parametrize(
    "change",
    [
        *({"options": {name: value}} for name, value in ASKED),
        *({"architecture": name} for name in ("hf-hub:timm/resnet18.a1_in1k", "local-dir:/somewhere", ["resnet18"])),
        *({"embedding_dim": 10**12}, {"embedding_dim": "16"}, {"image_size": 10**9}),
    ],
    ids=str,
)
def test_a_card_asks_timm_for_plain_names_and_bounded_numbers_only(change, monkeypatch, folder):
    rewrite_card(folder, **change)
    monkeypatch.setattr(timm, "create_model", None)  # what is refused must not come that far
    with pytest.raises(ValueError, match=r"card\.json is no encoder card: (option|architecture|embedding|image_size)"):
        load_encoder(folder)
    if "image_size" not in change:
        with pytest.raises(ValueError, match=r"^(option|architecture|embedding_dim)"):
            create_encoder(**{"architecture": TINY, **change.pop("options", {}), **change})


def test_a_flipped_byte_of_the_weights_is_found(folder):
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-1000] ^= 1
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged: its checksum"):
        load_encoder(folder)


def test_cards_of_before_still_load(folder):
    """Without checksum and options, and with the kind of first layer, of which there was more than one."""
    rewrite_card(folder, sha256=None, options=None, first_layer="plain")
    assert same_weights(load_encoder(folder)[0], tiny_encoder())
    rewrite_card(folder, first_layer="mask-aware")
    with pytest.raises(ValueError, match="its first layer was taken out"):
        load_encoder(folder)


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    model = tiny_encoder()
    model.layer1[0].conv1.weight.data[0, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"NaN or infinite weights in layer1\.0\.conv1\.weight"):
        save_encoder(model, card_of(), tmp_path / "other")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("wrong", [{"embedding_dim": 8}, {"architecture": "resnet34"}, {"architecture": "own"}])
def test_what_could_not_be_loaded_again_is_not_saved(wrong, tmp_path):
    with pytest.raises(ValueError, match="load_encoder would not read it"):
        save_encoder(tiny_encoder(), card_of(**wrong), tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_a_checkpoint_that_exists_is_no_missing_encoder(tmp_path):
    path = save(satclip_checkpoint(visual()), tmp_path / "satclip.ckpt")
    with pytest.raises(ValueError, match=rf"is a file; .*weights='{path}'"):
        load_encoder(path)
    with pytest.raises(FileNotFoundError, match=r"nothing\.ckpt"):
        load_encoder(SATCLIP, weights=tmp_path / "nothing.ckpt")


MADE_BY = {
    "sample/encoder": "00_sample_encoder.ipynb made.ipynb -f params/experiments/sample.yaml -p experiment sample",
    "seedy/encoder": "00_sample_encoder.ipynb made.ipynb -p experiment seedy",
    "mine/B2_B8A-esa/encoder-seed3": (
        '03_fine_tuning.ipynb made.ipynb -p experiment mine -p mask "B2 B8A" -p mask_scheme esa -y "seeds: [3]"'
    ),
    "mine/any-band/encoder-seed0/pre-trained": "08_any_band_encoder.ipynb made.ipynb -p experiment mine",
    "mine/any-band/encoder-seed0": "08_any_band_encoder.ipynb made.ipynb -p experiment mine",
}


@pytest.mark.parametrize("folder", MADE_BY)
def test_an_encoder_that_is_not_there_says_which_command_makes_this_one(tmp_path, folder):
    with pytest.raises(FileNotFoundError) as missing:
        load_encoder(tmp_path / folder)
    assert str(missing.value).endswith(f"such a one is made by: papermill notebooks/{MADE_BY[folder]}")


def test_weights_beside_a_saved_folder_are_refused(folder, tmp_path):
    """Ignored in silence, they would leave a table with the wrong encoder in it."""
    with pytest.raises(ValueError, match="weights"):
        load_encoder(folder, weights=tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match=r"no architecture 'resnet5'; near: .*resnet50"):
        create_encoder("resnet5")


def test_seed_alone_decides_initial_weights():
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    first = create_encoder(TINY, seed=3)
    assert torch.equal(torch.rand(1), expected)  # torch's own generator is left alone
    assert same_weights(first, create_encoder(TINY, seed=3))
    assert not torch.equal(first.fc.weight, create_encoder(TINY, seed=4).fc.weight)


@torch.no_grad()
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_round_trip_is_bit_for_bit_and_needs_only_timm(layout, tmp_path):
    model, images = tiny_encoder(seed=2).to(memory_format=layout), torch.rand(3, 13, 32, 32)
    folder = save_encoder(model, card_of(), tmp_path / "encoders" / "B8")
    loaded, card = load_encoder(folder)
    assert same_weights(loaded, model)
    assert torch.equal(loaded(images), tiny_encoder(seed=2)(images))
    assert not loaded.training
    assert {path.name for path in tmp_path.rglob("*")} == {"encoders", "B8", "card.json", "model.safetensors"}
    foreign = timm.create_model(TINY, in_chans=13, num_classes=16)
    foreign.load_state_dict(load_file(folder / "model.safetensors"))
    assert torch.equal(foreign.eval()(images), loaded(images))
    found = files.unsealed(folder / "card.json")
    versions = {"bandmask": bandmask.__version__, "torch": torch.__version__, "timm": timm.__version__}
    versions["python"] = ".".join(map(str, sys.version_info[:3]))
    checksum = files.sha256(folder / "model.safetensors")
    expected = dataclasses.asdict(card_of(versions=versions, sha256=checksum))
    assert found == json.loads(json.dumps(expected)) == json.loads(json.dumps(dataclasses.asdict(card)))


def test_a_damaged_card_is_named(folder):
    strange = b'{"name": "a", "architecture": "resnet18", "bands": [], "colour": 1}'
    edited = (folder / "card.json").read_bytes().replace(b'"seed": 7', b'"seed": 8')
    for content in (
        *(b'{"name": "tiny", "archit', b"[]", b'{"bands": []}', b"\x93\xff\xfe", strange, 10**6 * b"["),
        edited,
    ):
        (folder / "card.json").write_bytes(content)
        with pytest.raises(ValueError, match=r"card\.json is no encoder card"):
            load_encoder(folder)


def test_half_an_encoder_one_of_other_bands_and_weights_of_another_are_refused(tmp_path):
    """Another order of the same 13 channels would load, and be wrong in silence."""
    for order in (bands.ORDERS["eurosat"], bands.NAMES[:10]):
        folder = save_encoder(tiny_encoder(), card_of(bands=order), tmp_path / "encoder")
        with pytest.raises(ValueError, match=r"card\.json: made for bands .*this project feeds"):
            load_encoder(folder)
    for part in ("card.json", "model.safetensors"):
        folder = save_encoder(tiny_encoder(embedding_dim=8), card_of(embedding_dim=8), tmp_path / "encoder")
        rewrite_card(folder, embedding_dim=card_of().embedding_dim)
        with pytest.raises(ValueError, match=r"size mismatch for fc\.weight"):
            load_encoder(folder)
        (folder / part).unlink()
        with pytest.raises(FileNotFoundError, match=re.escape(part)):
            load_encoder(folder)


@pytest.mark.filterwarnings("error")
def test_an_encoder_that_its_record_does_not_vouch_for_is_named(tmp_path):
    folder = save_encoder(tiny_encoder(), card_of(), tmp_path / "B8" / "encoder-seed0")
    record = {"outputs": {f"encoder-seed0/{file.name}": files.sha256(file) for file in folder.iterdir()}}
    written = tmp_path / "B8" / "03_fine_tuning.json"
    written.write_text(json.dumps({**record, "state": "done"}))
    load_encoder(folder)
    written.write_text(json.dumps({**record, "state": "outdated", "error": "lr = 1, was 2"}))
    with pytest.warns(UserWarning, match="03_fine_tuning: outdated: lr = 1, was 2; `make run` makes it again"):
        load_encoder(folder)


@torch.no_grad()
@pytest.mark.parametrize(
    ("architecture", "taps"),
    [("resnet18", ("layer1", "layer4")), (TINY, ("layer4", "layer1")), (TINY, ("layer2",)), (TINY, ())],
)
def test_taps_equal_forward_hooks_in_one_forward(architecture, taps):
    model = create_encoder(architecture, embedding_dim=16, seed=1).eval()
    images = torch.rand(2, 13, 64, 64, generator=torch.Generator().manual_seed(0))
    hooked: dict[str, torch.Tensor] = {}
    for tap in taps:
        model.get_submodule(tap).register_forward_hook(lambda _, __, out, tap=tap: hooked.update({tap: out.clone()}))
    expected = model(images)
    stems = []
    model.conv1.register_forward_hook(lambda *_: stems.append(1))
    embedding, maps = embed(model, images, taps)
    assert len(stems) == 1  # one forward for both
    assert torch.equal(embedding, expected)
    assert maps.keys() == set(taps)
    assert all(torch.equal(maps[tap], hooked[tap]) for tap in taps)


@pytest.mark.parametrize(
    ("architecture", "expected", "shapes"),
    [
        ("resnet50", ("layer1", "layer4"), [(1, 256, 64, 64), (1, 2048, 8, 8)]),  # of the thesis
        ("test_convnext", ("stages.0", "stages.3"), [(1, 24, 64, 64), (1, 64, 8, 8)]),
        (encoders.VIT, ("blocks.3", "blocks.11"), [(1, 384, 16, 16)] * 2),
    ],
)
def test_a_shallow_and_a_deep_tap(architecture, expected, shapes):
    with torch.device("meta"):
        model = create_encoder(architecture).eval()
        assert default_taps(model) == expected
        _, maps = embed(model, torch.rand(1, 13, 256, 256), expected)
        assert [tuple(maps[tap].shape) for tap in expected] == shapes


@torch.no_grad()
def test_a_vit_takes_images_of_other_sides_and_its_card_says_how_timm_makes_it(tmp_path):
    """Whoever has timm alone can make it from the card; at its own side it is timm's own."""
    model = create_encoder("test_vit", embedding_dim=16, seed=3, num_heads=4).eval()
    plain = timm.create_model("test_vit", in_chans=13, num_classes=16, num_heads=4).eval()
    plain.load_state_dict(model.state_dict())
    images = torch.rand(2, 13, 160, 160, generator=torch.Generator().manual_seed(0))
    assert torch.equal(model(images), plain(images))
    made = Card("tiny ViT", "test_vit", embedding_dim=16, options={"num_heads": 4})
    folder = save_encoder(model, made, tmp_path / "encoder")
    card = json.loads((folder / "card.json").read_text())
    assert card["options"] == {"num_heads": 4, "dynamic_img_size": True}
    foreign = timm.create_model(card["architecture"], in_chans=13, num_classes=16, **card["options"]).eval()
    foreign.load_state_dict(load_file(folder / "model.safetensors"))
    small = images[:, :, :64, :64]
    assert torch.equal(foreign(small), model(small))
    assert torch.equal(load_encoder(folder)[0](small), model(small))
