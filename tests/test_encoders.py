"""Encoders load what was published, refuse what doesn't fit by name, and save what plain timm can read.

No published checkpoint can be downloaded here: the SatCLIP and MoCo files are synthetic, with exactly the keys,
shapes and dtypes that the published ones have (facts.md §3), and random weights.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import sys
import urllib.error
import warnings
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from models import TINY, generated_pack, same_weights, tiny_encoder
from safetensors.torch import load_file
from torch import nn

import bandmask
from bandmask import bands, encoders, published
from bandmask.alignment import fine_tune
from bandmask.encoders import Card, create_encoder, default_taps, embed, load_checked, load_encoder, save_encoder
from bandmask.first_layer import MISSING, mask_aware
from bandmask.masking import MaskSpec, mask_batch

SATCLIP = "satclip-resnet50-l40"


def satclip_checkpoint(visual: dict[str, torch.Tensor], **changes: Any) -> dict[str, Any]:
    """A Lightning dictionary as SatCLIP's: vision encoder in float32, location encoder in float64."""
    state = {
        "model.logit_scale": torch.tensor(2.8952996730804443),
        **{f"model.visual.{name}": tensor for name, tensor in visual.items()},
        "model.location.posenc.frequencies": torch.zeros(4, dtype=torch.float64),
        "model.location.nnet.layers.0.weight": torch.zeros(8, 16, dtype=torch.float64),
        "model.nnet.layers.0.bias": torch.zeros(8, dtype=torch.float64),
        "model.nnet.last_layer.weight": torch.zeros(256, 8, dtype=torch.float64),
    }
    return {
        "epoch": 499,
        "global_step": 6000,
        "pytorch-lightning_version": "2.1.0",
        "state_dict": state,
        "loops": {"fit_loop": {"state_dict": {}}},
        "callbacks": {"ModelCheckpoint{'monitor': 'val_loss'}": {"best_model_path": "", "kth_best_model": {}}},
        "optimizer_states": [],
        "lr_schedulers": [],
        "hparams_name": "kwargs",
        "hyper_parameters": {"embed_dim": 256, "vision_layers": "moco_resnet50", "legendre_polys": 40},
        **changes,
    }


def hollow_visual() -> dict[str, torch.Tensor]:
    """SatCLIP's vision keys and shapes, each tensor one stored zero: a file of kilobytes instead of 94 MB."""
    with torch.device("meta"):
        model = timm.create_model("resnet50", in_chans=13, num_classes=256)
    return {k: torch.zeros((), dtype=v.dtype).expand(v.shape) for k, v in model.state_dict().items()}


def save(content: Any, path: Path) -> Path:
    torch.save(content, path)
    return path


class Evil:
    """Unpickling it runs code: it makes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return os.mkdir, (str(self.marker),)


# --- published checkpoints ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def satclip(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path]:
    """A timm ResNet50 and the SatCLIP checkpoint that holds it; batch norms have statistics of their own."""
    torch.manual_seed(11)
    model = timm.create_model("resnet50", in_chans=13, num_classes=256)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
            module.weight.data.uniform_(0.5, 1.5)
    path = tmp_path_factory.mktemp("satclip") / encoders.SATCLIP_FILE
    return model.eval(), save(satclip_checkpoint(model.state_dict()), path)


@torch.no_grad()
def test_satclip_checkpoint_gives_the_source_models_embeddings(satclip: tuple[nn.Module, Path]):
    source, path = satclip
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the right logit_scale is no reason to warn
        model, card = load_encoder(SATCLIP, weights=path)
    images = torch.rand(2, 13, 64, 64, generator=torch.Generator().manual_seed(0))
    found = model(images)
    assert found.shape == (2, 256)
    assert found.dtype == torch.float32
    assert torch.equal(found, source(images))
    assert not model.training
    assert (card.architecture, card.embedding_dim, card.bands) == ("resnet50", 256, bands.NAMES)
    assert card.scaling == "reflectance = DN / 10000"
    assert "cirrus" in card.notes


@torch.no_grad()
def test_resnet50_taps_have_the_thesis_shapes(satclip: tuple[nn.Module, Path]):
    embedding, maps = embed(satclip[0], torch.rand(1, 13, 256, 256), taps=("layer1", "layer4"))
    assert embedding.shape == (1, 256)
    assert maps["layer1"].shape == (1, 256, 64, 64)
    assert maps["layer4"].shape == (1, 2048, 8, 8)


def hollow_satclip(path: Path, change: Any) -> Path:
    checkpoint = satclip_checkpoint(hollow_visual())
    change(checkpoint["state_dict"])
    return save(checkpoint, path)


@pytest.mark.parametrize(
    "key", ["conv1.weight", "bn1.running_var", "layer3.5.conv2.weight", "layer4.2.bn3.num_batches_tracked", "fc.bias"]
)
def test_a_missing_key_of_satclip_is_named(key: str, tmp_path: Path):
    path = hollow_satclip(tmp_path / "a.ckpt", lambda state: state.pop(f"model.visual.{key}"))
    with pytest.raises(ValueError, match=rf"1 missing: {re.escape(key)}$") as error:
        load_encoder(SATCLIP, weights=path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("key", "named"),
    [
        ("model.visual.layer5.weight", "layer5.weight"),
        ("model.other.weight", "model.other.weight"),
        ("visual.conv1.weight", "visual.conv1.weight"),
    ],
)
def test_an_extra_key_of_satclip_is_named(key: str, named: str, tmp_path: Path):
    path = hollow_satclip(tmp_path / "a.ckpt", lambda state: state.update({key: torch.zeros(2)}))
    with pytest.raises(ValueError, match=rf"1 extra: {re.escape(named)}$"):
        load_encoder(SATCLIP, weights=path)


@pytest.mark.parametrize(
    ("key", "shape", "named"),
    [
        ("conv1.weight", (64, 3, 7, 7), r"conv1.weight is (64, 3, 7, 7), expected (64, 13, 7, 7)"),
        ("fc.weight", (512, 2048), r"fc.weight is (512, 2048), expected (256, 2048)"),
        ("layer1.0.bn1.weight", (1,), r"layer1.0.bn1.weight is (1,), expected (64,)"),
    ],
)
def test_a_wrong_shape_of_satclip_is_named(key: str, shape: tuple[int, ...], named: str, tmp_path: Path):
    path = hollow_satclip(tmp_path / "a.ckpt", lambda state: state.update({f"model.visual.{key}": torch.zeros(shape)}))
    with pytest.raises(ValueError, match=rf"1 wrong shape: {re.escape(named)}$"):
        load_encoder(SATCLIP, weights=path)


def test_every_single_key_counts():
    """Each key in turn, missing, misshapen, and joined by a stranger, is the one the error names."""
    model = tiny_encoder()
    state = model.state_dict()
    for key, tensor in state.items():
        with pytest.raises(ValueError, match=rf"1 missing: {re.escape(key)}$"):
            load_checked(model, {k: v for k, v in state.items() if k != key}, "file")
        with pytest.raises(ValueError, match=rf"1 wrong shape: {re.escape(key)} is"):
            load_checked(model, {**state, key: tensor[None]}, "file")
        with pytest.raises(ValueError, match=rf"1 extra: {re.escape(key)}\.more$"):
            load_checked(model, {**state, f"{key}.more": tensor}, "file")


def test_a_refused_state_leaves_the_model_as_it_was():
    model, other = tiny_encoder(seed=0), tiny_encoder(seed=1)
    state = other.state_dict()
    state.pop("fc.bias")
    with pytest.raises(ValueError, match=r"fc\.bias"):
        load_checked(model, state, "file")
    assert same_weights(model, tiny_encoder(seed=0))


@pytest.mark.parametrize(("scale", "found"), [(torch.tensor(2.6593), "2.6593"), (None, "none")])
def test_another_logit_scale_is_a_warning_that_says_what_it_means(scale: Any, found: str, tmp_path: Path):
    def change(state: dict[str, Any]) -> None:
        state.pop("model.logit_scale")
        if scale is not None:
            state["model.logit_scale"] = scale

    path = hollow_satclip(tmp_path / "a.ckpt", change)
    with pytest.warns(UserWarning, match="logit_scale") as caught:
        load_encoder(SATCLIP, weights=path)
    message = str(caught[0].message)
    assert found in message
    assert "2.895300" in message
    assert "another SatCLIP model" in message
    assert "embeddings will differ" in message


def test_a_checkpoint_without_state_dict_shows_what_it_has(tmp_path: Path):
    path = save({"weights": torch.zeros(1), "epoch": 3}, tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match=r"no 'state_dict', but \['epoch', 'weights'\]") as error:
        load_encoder(SATCLIP, weights=path)
    assert str(path) in str(error.value)


def test_a_bare_list_is_no_checkpoint(tmp_path: Path):
    with pytest.raises(ValueError, match="holds a list, expected a dictionary"):
        load_encoder(SATCLIP, weights=save([torch.zeros(1)], tmp_path / "a.ckpt"))


@pytest.mark.parametrize("allow_pickle", [False, True])
@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.999])
def test_a_truncated_checkpoint_is_called_damaged(share: float, allow_pickle: bool, tmp_path: Path):
    path = hollow_satclip(tmp_path / "a.ckpt", lambda state: None)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(ValueError, match="damaged") as error:
        load_encoder(SATCLIP, weights=path, allow_pickle=allow_pickle)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("allow_pickle", [False, True])
@pytest.mark.parametrize("length", [2, 3, 20, 100, 4000])
def test_a_truncated_checkpoint_of_an_older_torch_is_called_damaged(length: int, allow_pickle: bool, tmp_path: Path):
    """Before 1.6, torch wrote bare pickles; many published files still are."""
    path = tmp_path / "a.pth"
    torch.save({"conv1.weight": torch.zeros(2000)}, path, _use_new_zipfile_serialization=False)
    assert path.stat().st_size > 4000
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(ValueError, match="damaged"):
        load_encoder("moco-resnet50", weights=path, allow_pickle=allow_pickle)


@pytest.mark.parametrize("allow_pickle", [False, True])
@pytest.mark.parametrize(
    "content",
    [b"<html><body>404 Not Found</body></html>", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"],
)
def test_a_text_file_in_place_of_the_checkpoint_is_called_damaged(content: bytes, allow_pickle: bool, tmp_path: Path):
    """A failed download leaves a web page or a Git LFS pointer; unsafe unpickling is no advice for that."""
    path = tmp_path / "a.ckpt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="damaged or no torch checkpoint") as error:
        load_encoder(SATCLIP, weights=path, allow_pickle=allow_pickle)
    assert "allow_pickle" not in str(error.value)


def test_a_missing_weights_file_is_named(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"nothing\.ckpt") as error:
        load_encoder(SATCLIP, weights=tmp_path / "nothing.ckpt")
    assert "weights" in str(error.value)


def test_code_in_a_checkpoint_does_not_run(tmp_path: Path):
    marker = tmp_path / "marker"
    path = save(satclip_checkpoint(hollow_visual(), hyper_parameters=Evil(marker)), tmp_path / "evil.ckpt")
    with pytest.raises(ValueError, match="allow_pickle=True") as error:
        load_encoder(SATCLIP, weights=path)
    assert "any code" in str(error.value)
    assert not marker.exists()
    torch.load(path, weights_only=False)  # the file is what it claims: asked for by name, the code does run
    assert marker.exists()


def test_a_trusted_checkpoint_with_objects_loads(tmp_path: Path):
    """Lightning keeps hyper-parameters as objects where the training script passed them so."""
    objects = {"spec": MaskSpec(bands=("B08",)), "folder": Path("logs")}
    path = save(satclip_checkpoint(hollow_visual(), hyper_parameters=objects), tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match="allow_pickle=True"):
        load_encoder(SATCLIP, weights=path)
    model, _ = load_encoder(SATCLIP, weights=path, allow_pickle=True)
    assert all(tensor.count_nonzero() == 0 for tensor in model.state_dict().values())


def test_moco_backbone_gets_a_fresh_seeded_fc(satclip: tuple[nn.Module, Path], tmp_path: Path):
    """TorchGeo's file: plain timm names, no fc (its loader accepts fc as the one missing layer)."""
    backbone = {name: tensor for name, tensor in satclip[0].state_dict().items() if not name.startswith("fc.")}
    path = save(backbone, tmp_path / "resnet50_sentinel2_all_moco.pth")
    first, card = load_encoder("moco-resnet50", weights=path, seed=5)
    again, _ = load_encoder("moco-resnet50", weights=path, seed=5)
    other, _ = load_encoder("moco-resnet50", weights=path, seed=6)
    assert not first.training
    assert same_weights(first, again)
    assert torch.equal(first.fc.weight, create_encoder("resnet50", seed=5).fc.weight)
    assert not torch.equal(first.fc.weight, other.fc.weight)
    assert all(torch.equal(first.state_dict()[name], tensor) for name, tensor in backbone.items())
    assert "fresh" in card.name
    assert "seed 5" in card.notes


def test_moco_of_three_channels_is_refused(tmp_path: Path):
    state = {k: v for k, v in hollow_visual().items() if not k.startswith("fc.")}
    path = save({**state, "conv1.weight": torch.zeros(64, 3, 7, 7)}, tmp_path / "rgb.pth")
    with pytest.raises(ValueError, match=r"conv1.weight is \(64, 3, 7, 7\), expected \(64, 13, 7, 7\)"):
        load_encoder("moco-resnet50", weights=path)


def torchgeo_state(source: str, stored: bool = False) -> dict[str, torch.Tensor]:
    """Keys and shapes of TorchGeo's file: timm's, without the last layer. Not `stored`: each tensor is one zero."""
    entry = published.TORCHGEO[source]
    with torch.device("cpu" if stored else "meta"):
        torch.manual_seed(7)
        model = timm.create_model(entry.architecture, in_chans=13, num_classes=0)
    state = model.state_dict()
    return state if stored else {k: torch.zeros((), dtype=v.dtype).expand(v.shape) for k, v in state.items()}


@torch.no_grad()
@pytest.mark.parametrize(
    ("source", "head", "size", "keys"), [("dino-resnet50", "fc", 64, 318), ("moco-vit-small", "head", 224, 150)]
)
def test_torchgeo_s_backbones_give_timm_s_features(source: str, head: str, size: int, keys: int, tmp_path: Path):
    """At the side a ViT was trained at its position embeddings are the file's own, to the bit."""
    state = torchgeo_state(source, stored=True)
    assert len(state) == keys
    model, card = load_encoder(source, weights=save(state, tmp_path / "backbone.pth"), seed=5)
    reference = timm.create_model(card.architecture, in_chans=13, num_classes=0)
    reference.load_state_dict(state)
    images = torch.rand(1, 13, size, size, generator=torch.Generator().manual_seed(0))
    assert torch.equal(model.forward_head(model.forward_features(images), pre_logits=True), reference.eval()(images))
    fresh = create_encoder(card.architecture, seed=5)
    assert torch.equal(model.get_submodule(head).weight, fresh.get_submodule(head).weight)
    assert model(images).shape == (1, 256)
    assert card.name.endswith(f", fresh {head}")
    assert f"untrained {head} (seed 5)" in card.notes


@pytest.mark.parametrize("source", ["dino-resnet50", "moco-vit-small"])
def test_every_key_of_torchgeo_s_backbones_counts(source: str, tmp_path: Path):
    state = torchgeo_state(source)
    first = next(key for key in state if key.endswith("weight"))
    for change, said in (
        ({k: v for k, v in state.items() if k != first}, f"1 missing: {first}"),
        ({**state, "more.weight": torch.zeros(1)}, "1 extra: more.weight"),
        ({**state, first: torch.zeros(1)}, rf"1 wrong shape: {first} is \(1,\)"),
    ):
        with pytest.raises(ValueError, match=said):
            load_encoder(source, weights=save(change, tmp_path / "backbone.pth"))


def test_torchgeo_s_entries_exist_and_take_13_bands_in_our_order():
    """The names are TorchGeo's; an entry of another order or scaling would load, and be wrong in silence."""
    for entry in published.TORCHGEO.values():
        assert entry.entry.url.endswith(".pth")
        assert entry.entry.meta["model"] == entry.architecture
        assert [bands.parse_band(name) for name in entry.entry.meta["bands"]] == list(bands.NAMES)
        scaled = entry.entry.transforms({"image": torch.full((1, 13, 256, 256), 10_000.0)})["image"]
        assert torch.equal(scaled, torch.ones_like(scaled))


def test_satclip_without_a_network_says_what_to_do(monkeypatch: pytest.MonkeyPatch):
    """The hub's call is replaced: a machine with a network would really fetch 200 MB."""

    def fail(*_: Any, **__: Any) -> str:
        raise ConnectionError("no route to host")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", fail)
    with pytest.raises(FileNotFoundError, match="no route to host") as error:
        load_encoder(SATCLIP)
    for part in (encoders.SATCLIP_FILE, encoders.SATCLIP_REPOSITORY, "weights"):
        assert part in str(error.value)


def test_moco_without_a_network_says_what_to_do(monkeypatch: pytest.MonkeyPatch):
    """The download is replaced, for the same reason; `URLError` is what torch.hub raises without a network."""

    def fail(*_: Any, **__: Any) -> None:
        raise urllib.error.URLError("no such cable")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", fail)
    with pytest.raises(FileNotFoundError, match="no such cable") as error:
        load_encoder("moco-resnet50")
    assert "SENTINEL2_ALL_MOCO" in str(error.value)
    assert "weights" in str(error.value)


# --- names ----------------------------------------------------------------------------------------------------------


def test_an_unknown_encoder_lists_what_exists():
    with pytest.raises(ValueError, match="unknown encoder 'resnet-50'") as error:
        load_encoder("resnet-50")
    assert all(name in str(error.value) for name in encoders.PUBLISHED)


def test_a_missing_folder_says_which_notebook_makes_it(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"00_sample_encoder\.ipynb") as error:
        load_encoder(tmp_path / "encoders" / "B8")
    assert str(tmp_path / "encoders" / "B8") in str(error.value)
    assert "03_fine_tuning.ipynb" in str(error.value)


def test_weights_beside_a_saved_folder_are_refused(tmp_path: Path):
    """Ignored in silence, they would leave a table with the wrong encoder in it."""
    folder = save_encoder(tiny_encoder(), card_of(), tmp_path / "encoder")
    with pytest.raises(ValueError, match="weights"):
        load_encoder(folder, weights=tmp_path / "other.ckpt")


def test_an_unknown_architecture_lists_near_ones():
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


# --- saved encoders -------------------------------------------------------------------------------------------------


def card_of(**changes: Any) -> Card:
    card = Card(
        "tiny, fine-tuned for B08",
        TINY,
        embedding_dim=16,
        image_size=32,
        parent="tiny",
        mask=dataclasses.asdict(MaskSpec(bands=("B08",), seed=4)),
        seed=7,
        data={"name": "generated", "checksum": "abc123", "split": "train"},
    )
    return dataclasses.replace(card, **changes)


def listing(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@torch.no_grad()
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_round_trip_is_bit_for_bit(layout: torch.memory_format, tmp_path: Path):
    model, images = tiny_encoder(seed=2).to(memory_format=layout), torch.rand(3, 13, 32, 32)
    assert save_encoder(model, card_of(), tmp_path / "encoders" / "B8") == tmp_path / "encoders" / "B8"
    loaded, card = load_encoder(tmp_path / "encoders" / "B8")
    assert same_weights(loaded, model)
    assert torch.equal(loaded(images), tiny_encoder(seed=2)(images))
    assert not loaded.training
    assert listing(tmp_path) == ["encoders", "encoders/B8", "encoders/B8/card.json", "encoders/B8/model.safetensors"]
    assert (card.name, card.seed, card.mask["bands"]) == ("tiny, fine-tuned for B08", 7, ["B08"])


@torch.no_grad()
def test_a_saved_encoder_needs_only_timm(tmp_path: Path):
    folder, images = save_encoder(tiny_encoder(seed=2), card_of(), tmp_path / "encoder"), torch.rand(3, 13, 32, 32)
    model = timm.create_model(TINY, in_chans=13, num_classes=16)
    model.load_state_dict(load_file(folder / "model.safetensors"))
    embeddings = model.eval()(images)
    assert torch.equal(embeddings, load_encoder(folder)[0](images))


def test_the_card_tells_what_a_user_must_know(tmp_path: Path):
    folder = save_encoder(tiny_encoder(), card_of(), tmp_path / "encoder")
    card = json.loads((folder / "card.json").read_text())
    assert card["architecture"] == TINY
    assert card["embedding_dim"] == 16
    assert card["bands"] == list(bands.NAMES)  # in the order of the input channels
    assert card["scaling"] == "reflectance = DN / 10000"
    assert card["mask"]["bands"] == ["B08"]
    assert (card["mask"]["ratio"], card["mask"]["seed"]) == (0.9, 4)
    assert card["seed"] == 7
    assert card["data"]["checksum"] == "abc123"
    assert card["parent"] == "tiny"
    assert card["versions"] == {
        "bandmask": bandmask.__version__,
        "torch": torch.__version__,
        "timm": timm.__version__,
        "python": ".".join(map(str, sys.version_info[:3])),
    }


@pytest.mark.parametrize(
    "content",
    [
        b'{"name": "tiny", "archit',
        b"",
        b"[]",
        b'{"architecture": "resnet18", "bands": []}',
        b'{"name": "tiny", "architecture": "resnet18", "bands": null}',
        b'{"name": "tiny", "architecture": "resnet18", "bands": [], "colour": "blue"}',
        b"\x93\xff\xfe binary",
    ],
    ids=["truncated", "empty", "list", "entry missing", "no bands", "unknown entry", "binary"],
)
def test_a_damaged_card_is_named(content: bytes, tmp_path: Path):
    folder = save_encoder(tiny_encoder(), card_of(), tmp_path / "encoder")
    (folder / "card.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"card\.json is no encoder card"):
        load_encoder(folder)


@pytest.mark.parametrize("order", [bands.ORDERS["eurosat"], bands.NAMES[:10]])
def test_an_encoder_of_other_bands_is_refused(order: tuple[str, ...], tmp_path: Path):
    """Another order of the same 13 channels would load, and be wrong in silence."""
    folder = save_encoder(tiny_encoder(), card_of(bands=order), tmp_path / "encoder")
    with pytest.raises(ValueError, match=r"card\.json: made for bands .*this project feeds"):
        load_encoder(folder)


def test_damaged_weights_are_named(tmp_path: Path):
    folder = save_encoder(tiny_encoder(), card_of(), tmp_path / "encoder")
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged"):
        load_encoder(folder)


@pytest.mark.parametrize("part", ["card.json", "model.safetensors"])
def test_half_an_encoder_is_an_error_that_names_the_missing_half(part: str, tmp_path: Path):
    folder = save_encoder(tiny_encoder(), card_of(), tmp_path / "encoder")
    (folder / part).unlink()
    with pytest.raises(FileNotFoundError, match=re.escape(part)):
        load_encoder(folder)


def test_weights_that_do_not_fit_the_card_are_refused(tmp_path: Path):
    folder = save_encoder(tiny_encoder(embedding_dim=8), card_of(), tmp_path / "encoder")
    with pytest.raises(ValueError, match=r"fc.weight is \(8, \d+\), expected \(16, \d+\)"):
        load_encoder(folder)


@pytest.mark.parametrize("failing", ["weights", "card"])
def test_a_failed_save_leaves_the_old_encoder(failing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    old = tiny_encoder(seed=1)
    folder = save_encoder(old, card_of(), tmp_path / "encoder")
    before = listing(tmp_path)
    if failing == "weights":

        def half(_: Any, path: Path) -> None:
            Path(path).write_bytes(b"half")
            raise OSError(28, "No space left on device", str(path))

        monkeypatch.setattr("safetensors.torch.save_file", half)
        expected, card = OSError, card_of()
    else:
        expected, card = TypeError, card_of(data={"path": object()})  # no JSON: fails after the weights are written
    with pytest.raises(expected):
        save_encoder(tiny_encoder(seed=2), card, folder)
    monkeypatch.undo()
    assert listing(tmp_path) == before
    assert same_weights(load_encoder(folder)[0], old)


def test_saving_over_an_encoder_replaces_it_whole(tmp_path: Path):
    folder = save_encoder(tiny_encoder(seed=1), card_of(), tmp_path / "encoder")
    (folder / "notes.txt").write_text("of the old one")
    save_encoder(tiny_encoder(seed=2), card_of(seed=8), folder)
    model, card = load_encoder(folder)
    assert same_weights(model, tiny_encoder(seed=2))
    assert card.seed == 8
    assert listing(tmp_path) == ["encoder", "encoder/card.json", "encoder/model.safetensors"]


# --- features -------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize(
    ("architecture", "taps"),
    [("resnet18", ("layer1", "layer4")), (TINY, ("layer4", "layer1")), (TINY, ("layer2",))],
)
def test_taps_equal_forward_hooks_in_one_forward(architecture: str, taps: tuple[str, ...]):
    model = create_encoder(architecture, embedding_dim=16, seed=1).eval()
    images = torch.rand(2, 13, 64, 64, generator=torch.Generator().manual_seed(0))
    hooked: dict[str, torch.Tensor] = {}
    handles = [
        model.get_submodule(tap).register_forward_hook(lambda _, __, out, tap=tap: hooked.update({tap: out.clone()}))
        for tap in taps
    ]
    expected = model(images)
    for handle in handles:
        handle.remove()
    stems = []
    model.conv1.register_forward_hook(lambda *_: stems.append(1))
    embedding, maps = embed(model, images, taps)
    assert len(stems) == 1  # one forward for both
    assert torch.equal(embedding, expected)
    assert maps.keys() == set(taps)
    assert all(torch.equal(maps[tap], hooked[tap]) for tap in taps)


@torch.no_grad()
def test_without_taps_it_is_the_models_own_forward():
    model, images = tiny_encoder(), torch.rand(2, 13, 32, 32)
    embedding, maps = embed(model, images)
    assert torch.equal(embedding, model(images))
    assert maps == {}


def test_gradients_reach_the_encoder_through_taps():
    model = tiny_encoder().train()
    _, maps = embed(model, torch.rand(2, 13, 32, 32), ("layer1",))
    maps["layer1"].sum().backward()
    assert next(model.parameters()).grad.abs().sum() > 0


def test_an_unknown_tap_lists_what_the_model_has():
    with pytest.raises(ValueError, match=r"no tap \['layer5'\] in ResNet.*layer1, layer2, layer3, layer4"):
        embed(tiny_encoder(), torch.rand(1, 13, 32, 32), ("layer1", "layer5"))


# --- other architectures --------------------------------------------------------------------------------------------


@torch.no_grad()
def test_tokens_of_a_vit_are_maps_in_their_places():
    """The reference takes the tokens of each block and lays them out by hand."""
    model = create_encoder("test_vit", embedding_dim=16).eval()
    images = torch.rand(2, 13, 48, 80, generator=torch.Generator().manual_seed(0))
    low, high = taps = default_taps(model)
    tokens: dict[str, torch.Tensor] = {}
    for tap in taps:
        model.get_submodule(tap).register_forward_hook(lambda _, __, out, tap=tap: tokens.update({tap: out.clone()}))
    embedding, maps = embed(model, images, taps)
    assert torch.equal(embedding, model(images))
    for tap in (low, high):
        assert maps[tap].shape == (2, model.embed_dim, 3, 5)
        for row in range(3):
            for column in range(5):
                place = model.num_prefix_tokens + row * 5 + column
                assert torch.equal(maps[tap][:, :, row, column], tokens[tap][:, place])


@pytest.mark.parametrize(
    ("architecture", "expected"),
    [
        (TINY, ("layer1", "layer4")),
        ("resnet50", ("layer1", "layer4")),
        ("test_convnext", ("stages.0", "stages.3")),
        ("vit_small_patch16_224", ("blocks.3", "blocks.11")),
    ],
)
def test_a_shallow_and_a_deep_tap(architecture: str, expected: tuple[str, str]):
    with torch.device("meta"):
        model = create_encoder(architecture)
    assert default_taps(model) == expected


@torch.no_grad()
def test_a_vit_takes_images_of_other_sides_and_is_timm_s_own_at_its_own():
    model = create_encoder("test_vit", embedding_dim=16, seed=3).eval()
    plain = timm.create_model("test_vit", in_chans=13, num_classes=16).eval()
    plain.load_state_dict(model.state_dict())
    images = torch.rand(2, 13, 160, 160, generator=torch.Generator().manual_seed(0))
    assert torch.equal(model(images), plain(images))
    assert model(images[:, :, :64, :64]).isfinite().all()


@torch.no_grad()
def test_a_saved_card_says_how_timm_makes_the_model(tmp_path: Path):
    """Whoever has timm alone can make it from the card, whatever sides its images have."""
    model = create_encoder("test_vit", embedding_dim=16, seed=3, num_heads=4).eval()
    made = Card("tiny ViT", "test_vit", embedding_dim=16, options={"num_heads": 4})
    folder = save_encoder(model, made, tmp_path / "encoder")
    card = json.loads((folder / "card.json").read_text())
    assert card["options"] == {"num_heads": 4, "dynamic_img_size": True}
    assert card["first_layer"] == "plain"
    foreign = timm.create_model(card["architecture"], in_chans=13, num_classes=16, **card["options"]).eval()
    foreign.load_state_dict(load_file(folder / "model.safetensors"))
    images = torch.rand(2, 13, 64, 64)
    assert torch.equal(foreign(images), model(images))
    assert torch.equal(load_encoder(folder)[0](images), model(images))


def test_a_card_from_before_first_layers_still_loads(tmp_path: Path):
    folder = save_encoder(tiny_encoder(), card_of(), tmp_path / "encoder")
    entries = json.loads((folder / "card.json").read_text())
    del entries["first_layer"], entries["options"]
    (folder / "card.json").write_text(json.dumps(entries))
    model, card = load_encoder(folder)
    assert same_weights(model, tiny_encoder())
    assert (card.first_layer, card.options) == ("plain", {})


def test_an_unknown_first_layer_is_named(tmp_path: Path):
    with pytest.raises(ValueError, match="unknown first layer 'gated'; available: plain, rescaled, mask-aware"):
        card_of(first_layer="gated")
    folder = save_encoder(tiny_encoder(), card_of(), tmp_path / "encoder")
    text = (folder / "card.json").read_text()
    (folder / "card.json").write_text(text.replace('"plain"', '"gated"'))
    with pytest.raises(ValueError, match=r"card\.json is no encoder card: unknown first layer 'gated'"):
        load_encoder(folder)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["resnet50", "vit_small_patch16_224"])
def test_the_method_on_other_encoders_from_checkpoint_to_checkpoint(architecture: str, tmp_path: Path):
    """Two steps of fine-tuning at 64 px with hidden pixels given as NaN."""
    saved = save_encoder(
        create_encoder(architecture, embedding_dim=16), card_of(architecture=architecture), tmp_path / "plain"
    )
    plain, card = load_encoder(saved)
    teacher = mask_aware(plain, torch.full((13,), 0.2))
    pack = generated_pack(tmp_path / "pack", train=4, val=2, test=2, size=64)
    images = torch.tensor(pack.images[:2].astype("float32") / 10_000)
    spec = MaskSpec(("B08", "B11"), 0.9)
    with torch.no_grad():
        expected = plain(images)
        assert torch.equal(teacher(images), expected)
    student, history = fine_tune(teacher, pack, spec, MISSING, epochs=1, batch_size=2, image_size=64, progress=False)
    assert history[["val_loss", "val_cosine"]].notna().all(axis=None)
    assert history["train_loss"].iloc[1:].notna().all()
    assert not same_weights(student, teacher)
    with torch.no_grad():
        assert torch.equal(teacher(images), expected)
        loaded, _ = load_encoder(save_encoder(student, card, tmp_path / "fine-tuned"))
        incomplete = mask_batch(images, torch.arange(2), spec, MISSING)
        assert incomplete.isnan().any()
        found = loaded(incomplete)
        assert found.isfinite().all()
        assert torch.equal(found, student(incomplete))
