"""Checkpoints that others published: found, read without running their code, and brought to timm's names.

`encoders.load_encoder` makes encoders of them. Source of the layouts: SatCLIP (Klemmer et al. 2023, MIT) and TorchGeo's
weights of SSL4EO-S12 (Wang et al. 2023, arXiv:2211.07044), all trained on reflectance = DN / 10000.
"""

from __future__ import annotations

import math
import pickle
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bandmask import files

LOGIT_SCALE_LOG = 2.8952996730804443  # learnt by SatCLIP; its checkpoint carries it, and the thesis keeps it fixed
SATCLIP = "satclip-resnet50-l40"
SATCLIP_REPOSITORY, SATCLIP_FILE = "microsoft/SatCLIP-ResNet50-L40", "satclip-resnet50-l40.ckpt"
_SATCLIP_IGNORED = ("model.location.", "model.nnet.", "model.logit_scale")


@dataclass(frozen=True)
class TorchGeoWeights:
    """A checkpoint of TorchGeo: for tables, timm's architecture, TorchGeo's names, and the side it was trained at."""

    title: str
    architecture: str
    enum: str
    member: str
    image_size: int = 256

    @property
    def entry(self) -> Any:
        """TorchGeo's own entry, with `url` and `get_state_dict`."""
        import torchgeo.models

        return getattr(torchgeo.models, self.enum)[self.member]


TORCHGEO: dict[str, TorchGeoWeights] = {
    "moco-resnet50": TorchGeoWeights("MoCo ResNet50", "resnet50", "ResNet50_Weights", "SENTINEL2_ALL_MOCO"),
    "dino-resnet50": TorchGeoWeights("DINO ResNet50", "resnet50", "ResNet50_Weights", "SENTINEL2_ALL_DINO"),
    "moco-vit-small": TorchGeoWeights(
        "MoCo ViT-S/16", "vit_small_patch16_224", "ViTSmall16_Weights", "SENTINEL2_ALL_MOCO", 224
    ),
}
PUBLISHED = (SATCLIP, *TORCHGEO)


@dataclass(frozen=True)
class Checkpoint:
    """What a published file holds.

    Attributes:
        name: for tables.
        architecture: timm name.
        state: weights by timm's names; other keys are those that don't belong there.
        origin: for error messages.
        headless: its embedding layer is missing and has to be made anew.
        card: more entries of the encoder's card.
    """

    name: str
    architecture: str
    state: Mapping[str, Tensor]
    origin: str
    headless: bool = False
    card: dict[str, Any] = field(default_factory=dict)


def read_published(source: str, weights: Path | str | None = None, *, allow_pickle: bool = False) -> Checkpoint:
    """The checkpoint of one of `PUBLISHED`, from a local file or downloaded.

    Raises:
        ValueError: the file is damaged, another one, or needs unsafe unpickling.
        FileNotFoundError: no such file, or it can't be downloaded; says what to fetch by hand.
    """
    return _satclip(weights, allow_pickle) if source == SATCLIP else _torchgeo(TORCHGEO[source], weights, allow_pickle)


def _satclip(weights: Path | str | None, allow_pickle: bool) -> Checkpoint:
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
            stacklevel=5,  # who called load_encoder
        )
    visual = {k.removeprefix("model.visual."): v for k, v in state.items() if k.startswith("model.visual.")}
    extra = {k: v for k, v in state.items() if not k.startswith(("model.visual.", *_SATCLIP_IGNORED))}
    card = {
        "parent": "moco-resnet50",
        "data": {"name": "S2-100K", "level": "L2A with B10 = 0"},
        "notes": "B10 was a plane of zeros in its training: it never saw real cirrus",
    }
    return Checkpoint("SatCLIP ResNet50 L40", "resnet50", {**visual, **extra}, str(weights), card=card)


def _torchgeo(published: TorchGeoWeights, weights: Path | str | None, allow_pickle: bool) -> Checkpoint:
    if weights is None:
        try:
            state = published.entry.get_state_dict(progress=True, check_hash=True)
        except OSError as error:
            raise FileNotFoundError(
                f"{published.title}'s weights could not be fetched ({error}). Download TorchGeo's "
                f"{published.enum}.{published.member} where there is a network, and pass the file's path as weights"
            ) from error
    else:
        state = read_checkpoint(weights, allow_pickle=allow_pickle)
    card = {
        "image_size": published.image_size,
        "data": {"name": "SSL4EO-S12", "level": "L1C"},
        "notes": f"backbone of {published.member}",
    }
    origin = str(weights or published.title)
    return Checkpoint(published.title, published.architecture, state, origin, headless=True, card=card)


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
