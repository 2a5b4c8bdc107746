"""Encoders: 13-band images to embeddings. SatCLIP, MoCo, the sample's stand-in, and our own checkpoints.

Every encoder is a plain timm model that takes reflectance (B, 13, S, S) in SatCLIP band order. Saved ones are a
folder with `model.safetensors` (plain timm names) and `card.json`.
Source of the checkpoint layouts: SatCLIP (Klemmer et al. 2023, MIT) and TorchGeo's weights.
"""

from __future__ import annotations

import json
import math
import pickle
import platform
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import bandmask
from bandmask import bands, files
from bandmask.first_layer import check_kind, kind_of, with_first_layer

LOGIT_SCALE_LOG = 2.8952996730804443  # learnt by SatCLIP; its checkpoint carries it, and the thesis keeps it fixed
SATCLIP_REPOSITORY, SATCLIP_FILE = "microsoft/SatCLIP-ResNet50-L40", "satclip-resnet50-l40.ckpt"
PUBLISHED = ("satclip-resnet50-l40", "moco-resnet50")
_SATCLIP_IGNORED = ("model.location.", "model.nnet.", "model.logit_scale")


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

    def __post_init__(self) -> None:
        """Check the kind of first layer."""
        check_kind(self.first_layer)


def create_encoder(architecture: str = "resnet50", *, embedding_dim: int = 256, seed: int = 0) -> nn.Module:
    """A timm model with 13 input channels and random weights that depend on `seed` alone.

    Raises:
        ValueError: timm has no such architecture; lists near ones.
    """
    import timm

    if not timm.is_model(architecture):
        near = timm.list_models(f"*{architecture[:6]}*")[:8]
        raise ValueError(f"timm has no architecture {architecture!r}; near: {', '.join(near) or 'none'}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: nn.Module = timm.create_model(architecture, in_chans=len(bands.NAMES), num_classes=embedding_dim)
    return model


def load_encoder(
    source: str | Path, *, weights: Path | str | None = None, allow_pickle: bool = False, seed: int = 0
) -> tuple[nn.Module, Card]:
    """An encoder in eval mode, and its card.

    Args:
        source: `satclip-resnet50-l40`, `moco-resnet50`, or a folder that `save_encoder` wrote.
        weights: a local file instead of the download, for the two published ones.
        allow_pickle: load a checkpoint that needs Python's unsafe unpickling. Only for files you trust: they can
            run any code.
        seed: of the fresh `fc` that MoCo's backbone gets.

    Raises:
        ValueError: unknown source; a checkpoint with missing, extra or wrongly shaped keys, all listed; a damaged
            file; a file that needs unsafe unpickling.
        FileNotFoundError: no such file or folder.
    """
    if str(source) == "satclip-resnet50-l40":
        model, card = _load_satclip(weights, allow_pickle)
    elif str(source) == "moco-resnet50":
        model, card = _load_moco(weights, allow_pickle, seed)
    elif Path(source).is_dir():
        if weights is not None:
            raise ValueError(
                f"weights={str(weights)!r} goes with {' or '.join(PUBLISHED)}; {source} has weights of its own"
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

    Versions and the kind of first layer are the model's, whatever the card says.
    """
    import timm
    from safetensors.torch import save_file

    versions = {
        "bandmask": bandmask.__version__,
        "torch": torch.__version__,
        "timm": timm.__version__,
        "python": platform.python_version(),
    }
    with files.writing(path) as partial:
        partial.mkdir(parents=True)
        state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
        save_file(state, partial / "model.safetensors")
        (partial / "card.json").write_text(
            json.dumps({**asdict(card), "first_layer": kind_of(model), "versions": versions}, indent=2)
        )
    return Path(path)


def embed(model: nn.Module, images: Tensor, taps: Sequence[str] = ()) -> tuple[Tensor, dict[str, Tensor]]:
    """Embeddings and feature maps in one forward.

    Args:
        model: a timm model.
        images: (B, 13, S, S).
        taps: timm's module names, such as `layer1` and `layer4`: (B, 256, S/4, S/4) and (B, 2048, S/32, S/32) of a
            ResNet50.

    Returns:
        Embeddings (B, D), and the feature map of each tap.

    Raises:
        ValueError: the model has no such tap; lists what it has.
    """
    if not taps:
        return model(images), {}
    names = [info["module"] for info in model.feature_info]  # type: ignore[union-attr]
    if unknown := [tap for tap in taps if tap not in names]:
        raise ValueError(f"no tap {unknown} in {type(model).__name__}; available: {', '.join(names)}")
    final, maps = model.forward_intermediates(images, indices=[names.index(tap) for tap in taps])  # type: ignore[operator]
    order = sorted(taps, key=names.index)  # timm returns them from shallow to deep
    return model.forward_head(final), dict(zip(order, maps, strict=True))  # type: ignore[operator]


def _load_satclip(weights: Path | str | None, allow_pickle: bool) -> tuple[nn.Module, Card]:
    if weights is None:
        from huggingface_hub import hf_hub_download

        try:
            weights = hf_hub_download(SATCLIP_REPOSITORY, SATCLIP_FILE)
        except Exception as error:  # the hub raises many kinds; the way out is the same
            raise FileNotFoundError(
                f"SatCLIP's checkpoint could not be fetched ({type(error).__name__}: {error}). Download "
                f"{SATCLIP_FILE} from Hugging Face, {SATCLIP_REPOSITORY}, and pass its path as weights"
            ) from error
    checkpoint = read_checkpoint(weights, allow_pickle=allow_pickle)
    state = checkpoint.get("state_dict")
    if not isinstance(state, Mapping):
        raise ValueError(f"{weights} is no SatCLIP checkpoint: it has no 'state_dict', but {sorted(checkpoint)[:8]}")
    scale = state.get("model.logit_scale")
    if scale is None or not math.isclose(float(scale), LOGIT_SCALE_LOG, abs_tol=1e-6):
        found = "none" if scale is None else f"{float(scale):.6f}"
        warnings.warn(
            f"{weights}: logit_scale is {found}, SatCLIP-ResNet50-L40 has {LOGIT_SCALE_LOG:.6f}. This is another "
            "SatCLIP model or a retrained one; embeddings will differ from those of the published encoder",
            stacklevel=3,
        )
    visual = {k.removeprefix("model.visual."): v for k, v in state.items() if k.startswith("model.visual.")}
    extra = {k: v for k, v in state.items() if not k.startswith(("model.visual.", *_SATCLIP_IGNORED))}
    model = create_encoder("resnet50")
    load_checked(model, {**visual, **extra}, str(weights))
    data = {"name": "S2-100K", "level": "L2A with B10 = 0"}
    note = "B10 was a plane of zeros in its training: it never saw real cirrus"
    return model, Card("SatCLIP ResNet50 L40", "resnet50", parent="moco-resnet50", data=data, notes=note)


def _load_moco(weights: Path | str | None, allow_pickle: bool, seed: int) -> tuple[nn.Module, Card]:
    if weights is None:
        from torchgeo.models import ResNet50_Weights

        try:
            state = ResNet50_Weights.SENTINEL2_ALL_MOCO.get_state_dict(progress=True, check_hash=True)
        except OSError as error:
            raise FileNotFoundError(
                f"MoCo's weights could not be fetched ({error}). Download TorchGeo's "
                "ResNet50_Weights.SENTINEL2_ALL_MOCO where there is a network, and pass the file's path as weights"
            ) from error
    else:
        state = read_checkpoint(weights, allow_pickle=allow_pickle)
    model = create_encoder("resnet50", seed=seed)
    fresh = {name: tensor for name, tensor in model.state_dict().items() if name.startswith("fc.")}
    backbone = {name: tensor for name, tensor in state.items() if not name.startswith("fc.")}
    load_checked(model, {**backbone, **fresh}, str(weights or "MoCo"))
    data = {"name": "SSL4EO-S12", "level": "L1C"}
    note = f"backbone of SENTINEL2_ALL_MOCO with a fresh, untrained fc (seed {seed})"
    return model, Card("MoCo ResNet50, fresh fc", "resnet50", data=data, notes=note)


def _load_saved(path: Path) -> tuple[nn.Module, Card]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    card = read_card(path)
    model = with_first_layer(create_encoder(card.architecture, embedding_dim=card.embedding_dim), card.first_layer)
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


def read_checkpoint(path: Path | str, *, allow_pickle: bool = False) -> dict[str, Any]:
    """A `torch.save` file, loaded safely; unsafe unpickling happens only if it was asked for by name.

    Raises:
        FileNotFoundError: no such file.
        ValueError: damaged, or it holds more than tensors and plain values.
    """
    path = files.require(path, "check the path given as weights")
    damaged = f"{path} is damaged or no torch checkpoint"
    with path.open("rb") as file:
        start = file.read(2)
    if not start.startswith((b"PK", b"\x80")):  # neither torch's zip nor a pickle: an error page, a pointer file
        raise ValueError(f"{damaged}: it begins with {start!r}; fetch it again")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=not allow_pickle)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, IndexError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        if allow_pickle or not isinstance(error, pickle.UnpicklingError):
            raise ValueError(f"{damaged} ({reason}); fetch it again") from error
        raise ValueError(
            f"{path} holds Python objects, not only tensors; loading it could run any code in it. If you trust "
            f"where it came from, pass allow_pickle=True. ({reason})"
        ) from error
    if not isinstance(checkpoint, dict):
        raise ValueError(f"{path} holds a {type(checkpoint).__name__}, expected a dictionary of tensors")
    return checkpoint


def load_checked(model: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Load a state dict of which every key must fit.

    Raises:
        ValueError: lists the missing, the extra and the wrongly shaped keys.
    """
    expected = model.state_dict()
    missing = sorted(expected.keys() - state.keys())
    extra = sorted(state.keys() - expected.keys())
    shapes = [
        f"{name} is {tuple(state[name].shape)}, expected {tuple(expected[name].shape)}"
        for name in expected.keys() & state.keys()
        if state[name].shape != expected[name].shape
    ]
    problems = [("missing", missing), ("extra", extra), ("wrong shape", sorted(shapes))]
    lines = [
        f"{len(found)} {kind}: {', '.join(found[:12])}{' …' * (len(found) > 12)}" for kind, found in problems if found
    ]
    if lines:
        raise ValueError(f"{source} doesn't fit {type(model).__name__}: " + "; ".join(lines))
    model.load_state_dict(dict(state))
