"""Encoders: 13-band images to embeddings. Published ones, the sample's stand-in, and our own checkpoints.

Every encoder is a timm model that takes reflectance (B, 13, S, S) in SatCLIP band order: ResNets, ViTs, ConvNeXts.
Saved ones are a folder with `model.safetensors` (plain timm names, and those that `first_layer` adds) and `card.json`.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import bandmask
from bandmask import bands, files
from bandmask.first_layer import check_kind, kind_of, with_first_layer
from bandmask.published import LOGIT_SCALE_LOG as LOGIT_SCALE_LOG
from bandmask.published import PUBLISHED, load_checked, read_published
from bandmask.published import SATCLIP_FILE as SATCLIP_FILE
from bandmask.published import SATCLIP_REPOSITORY as SATCLIP_REPOSITORY
from bandmask.published import read_checkpoint as read_checkpoint


@dataclass(frozen=True)
class Card:
    """What one must know to use an encoder, and where it came from.

    Attributes:
        name: for tables; a stand-in's says that it is one.
        architecture: timm name.
        embedding_dim: length of an embedding.
        image_size: side in pixels it was trained at.
        parent: the encoder it was fine-tuned from.
        mask: the `MaskSpec` it was fine-tuned for.
        seed: of that run.
        data: name, checksum and split of the images it saw.
        bands: ESA names in the order of its input channels.
        scaling: from DN to its input.
        versions: of bandmask, torch, timm and Python.
        notes: anything else, such as limits.
        first_layer: one of `first_layer.KINDS`; `save_encoder` writes the model's own.
        options: further arguments of `timm.create_model`, such as a ViT's `dynamic_img_size`.
    """

    name: str
    architecture: str
    embedding_dim: int = 256
    image_size: int = 256
    parent: str | None = None
    mask: dict[str, Any] | None = None
    seed: int | None = None
    data: dict[str, Any] = field(default_factory=dict)
    bands: tuple[str, ...] = bands.NAMES
    scaling: str = "reflectance = DN / 10000"
    versions: dict[str, str] = field(default_factory=dict)
    notes: str = ""
    first_layer: str = "plain"
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check the kind of first layer."""
        check_kind(self.first_layer)


def create_encoder(
    architecture: str = "resnet50", *, embedding_dim: int = 256, seed: int = 0, **options: Any
) -> nn.Module:
    """A timm model with 13 input channels and random weights that depend on `seed` alone.

    ViTs take images of any side that is a multiple of their patch: their position embeddings keep the shape of the
    checkpoint and are interpolated in each forward, exactly as they are at the side they were trained at.

    Args:
        architecture: timm name.
        embedding_dim: length of an embedding.
        seed: of the weights.
        options: further arguments of `timm.create_model`.

    Raises:
        ValueError: timm has no such architecture; lists near ones.
    """
    import timm

    if not timm.is_model(architecture):
        near = timm.list_models(f"*{architecture[:6]}*")[:8]
        raise ValueError(f"timm has no architecture {architecture!r}; near: {', '.join(near) or 'none'}")
    if timm.models.is_model_in_modules(architecture, ["vision_transformer"]):
        options = {"dynamic_img_size": True, **options}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: nn.Module = timm.create_model(
            architecture, in_chans=len(bands.NAMES), num_classes=embedding_dim, **options
        )
    return model


def load_encoder(
    source: str | Path, *, weights: Path | str | None = None, allow_pickle: bool = False, seed: int = 0
) -> tuple[nn.Module, Card]:
    """An encoder in eval mode, and its card.

    Args:
        source: `satclip-resnet50-l40`, TorchGeo's `moco-resnet50`, `dino-resnet50` or `moco-vit-small`, or a folder
            that `save_encoder` wrote.
        weights: a local file instead of the download, for the published ones.
        allow_pickle: load a checkpoint that needs Python's unsafe unpickling. Only for files you trust: they can
            run any code.
        seed: of the fresh last layer that TorchGeo's backbones get.

    Raises:
        ValueError: unknown source; a checkpoint with missing, extra or wrongly shaped keys, all listed; a damaged
            file; a file that needs unsafe unpickling.
        FileNotFoundError: no such file or folder.
    """
    if str(source) in PUBLISHED:
        model, card = _load_published(str(source), weights, allow_pickle, seed)
    elif Path(source).is_dir():
        if weights is not None:
            raise ValueError(
                f"weights={str(weights)!r} goes with {', '.join(PUBLISHED)}; {source} has weights of its own"
            )
        model, card = _load_saved(Path(source))
    elif "/" in str(source) or Path(source).suffix:
        raise FileNotFoundError(
            f"no encoder at {source}; make the sample's stand-in with notebooks/00_sample_encoder.ipynb, a fine-tuned "
            "one with notebooks/03_fine_tuning.ipynb"
        )
    else:
        raise ValueError(f"unknown encoder {str(source)!r}; available: {', '.join(PUBLISHED)}, or a saved folder")
    return model.eval(), card


def save_encoder(model: nn.Module, card: Card, path: Path | str) -> Path:
    """Write `model.safetensors` and `card.json` into a folder, whole or not at all.

    Versions, the kind of first layer and a ViT's dynamic image size are the model's, whatever the card says.
    """
    import timm
    from safetensors.torch import save_file

    versions = {
        "bandmask": bandmask.__version__,
        "torch": torch.__version__,
        "timm": timm.__version__,
        "python": platform.python_version(),
    }
    dynamic = {"dynamic_img_size": True} if getattr(model, "dynamic_img_size", False) else {}
    options = {**card.options, **dynamic}
    with files.writing(path) as partial:
        partial.mkdir(parents=True)
        state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
        save_file(state, partial / "model.safetensors")
        entries = {**asdict(card), "first_layer": kind_of(model), "options": options, "versions": versions}
        (partial / "card.json").write_text(json.dumps(entries, indent=2))
    return Path(path)


def embed(model: nn.Module, images: Tensor, taps: Sequence[str] = ()) -> tuple[Tensor, dict[str, Tensor]]:
    """Embeddings and feature maps in one forward.

    Args:
        model: a timm model.
        images: (B, 13, S, S).
        taps: timm's module names, such as `layer1` and `layer4`: (B, 256, S/4, S/4) and (B, 2048, S/32, S/32) of a
            ResNet50; `blocks.3` and `blocks.11` of a ViT-S/16: its tokens in their places, (B, 384, S/16, S/16).

    Returns:
        Embeddings (B, D), and the feature map of each tap.

    Raises:
        ValueError: the model has no such tap; lists what it has.
    """
    if not taps:
        return model(images), {}
    names = [info["module"] for info in _stages(model)]
    if unknown := [tap for tap in taps if tap not in names]:
        raise ValueError(f"no tap {unknown} in {type(model).__name__}; available: {', '.join(names)}")
    final, maps = model.forward_intermediates(images, indices=[names.index(tap) for tap in taps])  # type: ignore[operator]
    order = sorted(taps, key=names.index)  # timm returns them from shallow to deep
    return model.forward_head(final), dict(zip(order, maps, strict=True))  # type: ignore[operator]


def default_taps(model: nn.Module) -> tuple[str, str]:
    """A shallow and a deep tap: `layer1` and `layer4` of a ResNet, `stages.0` and `stages.3` of a ConvNeXt.

    Of a ViT, whose maps are all of one size, the blocks after a quarter and at the end: `blocks.3` and `blocks.11`
    of twelve.
    """
    stages = _stages(model)
    if len({stage["reduction"] for stage in stages}) == 1:
        return stages[len(stages) // 4]["module"], stages[-1]["module"]
    shallow = next((stage for stage in stages if stage["reduction"] >= 4), stages[0])
    return shallow["module"], stages[-1]["module"]


def tap_strides(model: nn.Module) -> dict[str, int]:
    """Every tap of a model, and how many pixels of the image a pixel of its map spans."""
    return {stage["module"]: stage["reduction"] for stage in _stages(model)}


def _stages(model: nn.Module) -> list[dict[str, Any]]:
    return list(model.feature_info)  # type: ignore[arg-type]


def _load_published(source: str, weights: Path | str | None, allow_pickle: bool, seed: int) -> tuple[nn.Module, Card]:
    found = read_published(source, weights, allow_pickle=allow_pickle)
    model = create_encoder(found.architecture, seed=seed)
    name, state, entries = found.name, dict(found.state), dict(found.card)
    if found.headless:
        head = model.pretrained_cfg["classifier"]  # type: ignore[index]
        fresh = {key: tensor for key, tensor in model.state_dict().items() if key.startswith(f"{head}.")}
        state = {key: tensor for key, tensor in state.items() if not key.startswith(f"{head}.")} | fresh
        name = f"{name}, fresh {head}"
        entries["notes"] += f" with a fresh, untrained {head} (seed {seed})"
    load_checked(model, state, found.origin)
    return model, Card(name, found.architecture, **entries)


def _load_saved(path: Path) -> tuple[nn.Module, Card]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    card = read_card(path)
    plain = create_encoder(card.architecture, embedding_dim=card.embedding_dim, **card.options)
    model = with_first_layer(plain, card.first_layer)
    try:
        state = load_file(files.require(path / "model.safetensors", "save_encoder writes it beside card.json"))
    except SafetensorError as error:
        raise ValueError(f"{path / 'model.safetensors'} is damaged ({error}); make the encoder again") from error
    load_checked(model, state, str(path))
    return model, card


def read_card(path: Path | str) -> Card:
    """The card of a saved encoder.

    Raises:
        ValueError: entries missing or unknown, or made for other bands than this project's 13.
    """
    file = files.require(Path(path) / "card.json", "save_encoder writes it beside model.safetensors")
    try:
        entries = json.loads(file.read_text())
        card = Card(**{**entries, "bands": tuple(entries["bands"])})
    except (TypeError, KeyError, ValueError) as error:
        raise ValueError(f"{file} is no encoder card: {error}") from error
    if card.bands != bands.NAMES:
        raise ValueError(f"{file}: made for bands {card.bands}; this project feeds {bands.NAMES}")
    return card
