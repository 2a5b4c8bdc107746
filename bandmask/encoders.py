"""Encoders: 13-band reflectance to embeddings. Published ones, the small one of the sample, and our own checkpoints.

Every encoder takes reflectance (B, 13, S, S) in SatCLIP band order: timm's ResNets, ViTs and ConvNeXts, and those of
`foundation`, which take NaN where something is missing.
Saved ones are a folder with `model.safetensors` (plain timm names) and `card.json`. Neither a checkpoint nor a card can
run code or make timm fetch something. Published: SatCLIP (Klemmer et al. 2023, arXiv:2311.17179) and TorchGeo's
weights of SSL4EO-S12 (Wang et al. 2023, arXiv:2211.07044), all trained on reflectance = DN / 10000.
"""

import hashlib
import math
import platform
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import bandmask
from bandmask import bands, files, foundation
from bandmask.heads import check_finite, load_checked, read_checkpoint

# What a card may ask of `timm.create_model`, and the largest value; others of its arguments name files and addresses.
OPTIONS: dict[str, tuple[type, int]] = {"dynamic_img_size": (bool, 1), "img_size": (int, 2048), "num_heads": (int, 64)}
VIT = "vit_small_patch16_224"
VIT_NOTE = "made for 224 px: its position embeddings are interpolated at other sides, which are multiples of 16"


@dataclass(frozen=True)
class Published:
    """A published checkpoint: what it is called, and where it is found."""

    title: str  # for tables
    architecture: str  # timm name
    entry: str  # TorchGeo's entry; for SatCLIP that of the backbone it keeps frozen
    legendre: int = 0  # of a SatCLIP model, the polynomials of its location encoder, 10 or 40

    @property
    def weights(self) -> Any:
        """TorchGeo's own entry, with `url` and `meta`."""
        import torchgeo.models

        enum, member = self.entry.split(".")
        return getattr(torchgeo.models, enum)[member]

    def fetch(self) -> Path:
        """The file, downloaded if it isn't there, and checked against the checksum that its publisher gave."""
        model, url = self.title.replace(" ", "-"), self.weights.url
        repository, name = f"microsoft/{model}", f"{model.lower()}.ckpt" if self.legendre else Path(url).name
        source = f"{name} of {repository if self.legendre else f'TorchGeo, {url}'}"
        path = Path(torch.hub.get_dir()) / "checkpoints" / name
        try:
            if self.legendre:
                from huggingface_hub import hf_hub_download

                path = Path(hf_hub_download(repository, name)).resolve()
            elif not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                torch.hub.download_url_to_file(url, str(path))
        except Exception as error:  # hubs raise many kinds; the way out is the same
            said = f"{self.title} could not be fetched ({type(error).__name__}: {error})"
            raise FileNotFoundError(f"{said}. Download {source} elsewhere, and pass its path as weights") from error
        # Hugging Face's cache names a file by its checksum, TorchGeo by the first part of it
        expected = re.search(r"^([0-9a-f]{64})$" if self.legendre else r"-([0-9a-f]{8,64})\.pth$", path.name)
        if expected and not files.sha256(path).startswith(expected[1]):
            raise ValueError(f"{path} is not {source}: its checksum is another. Delete it and load again")
        return path


PUBLISHED = {
    f"satclip-{model.lower()}-l{legendre}": Published(f"SatCLIP {model} L{legendre}", architecture, entry, legendre)
    for model, architecture, entry in (
        ("ResNet18", "resnet18", "ResNet18_Weights.SENTINEL2_ALL_MOCO"),
        ("ResNet50", "resnet50", "ResNet50_Weights.SENTINEL2_ALL_MOCO"),
        ("ViT16", VIT, "ViTSmall16_Weights.SENTINEL2_ALL_MOCO"),
    )
    for legendre in (10, 40)
} | {
    "moco-resnet18": Published("MoCo ResNet18", "resnet18", "ResNet18_Weights.SENTINEL2_ALL_MOCO"),
    "moco-resnet50": Published("MoCo ResNet50", "resnet50", "ResNet50_Weights.SENTINEL2_ALL_MOCO"),
    "dino-resnet50": Published("DINO ResNet50", "resnet50", "ResNet50_Weights.SENTINEL2_ALL_DINO"),
    "moco-vit-small": Published("MoCo ViT-S/16", VIT, "ViTSmall16_Weights.SENTINEL2_ALL_MOCO"),
}
_ADAPTED = (*foundation.ADAPTERS, *foundation.CLOUD_LEVELS)  # no architectures of timm's
SATCLIP = "satclip-resnet50-l40"  # the thesis' one
MINI = "mini"  # comes with the package, see `bandmask/mini/README.md`
_MARKS = {VIT: "patch_embed.proj.weight", "resnet50": "layer1.0.conv3.weight", "resnet18": "layer1.0.conv2.weight"}


@dataclass(frozen=True)
class Card:
    """What one must know to use an encoder, and where it came from; a ValueError where timm must not be asked that."""

    name: str  # for tables; a small encoder's says that it is one
    architecture: str  # timm name
    embedding_dim: int = 256
    image_size: int = 256  # side in pixels it was trained at
    parent: str | None = None  # the encoder it was fine-tuned from
    mask: dict[str, Any] | None = None  # the `MaskSpec` it was fine-tuned for
    seed: int | None = None  # of that run
    data: dict[str, Any] = field(default_factory=dict)  # name, checksum and split of the images it saw
    bands: tuple[str, ...] = bands.NAMES  # ESA names in the order of its input channels
    scaling: str = "reflectance = DN / 10000"
    versions: dict[str, str] = field(default_factory=dict)  # of bandmask, torch, timm and Python
    notes: str = ""  # anything else, such as limits
    options: dict[str, Any] = field(default_factory=dict)  # further arguments of `timm.create_model`, of `OPTIONS`
    sha256: str = ""  # of `model.safetensors`; `save_encoder` writes it

    def __post_init__(self) -> None:
        """Check what timm is given."""
        _check_asked(self.architecture, self.embedding_dim, self.options)
        if type(self.image_size) is not int or not 1 <= self.image_size <= 8192:
            raise ValueError(f"image_size is a whole number of pixels from 1 to 8192; got {self.image_size!r}")


def create_encoder(
    architecture: str = "resnet50", *, embedding_dim: int = 256, seed: int = 0, **options: Any
) -> nn.Module:
    """A timm model from 13 bands to embeddings (B, embedding_dim), with random weights that depend on `seed` alone.

    ViTs take images of any side that is a multiple of their patch: their position embeddings keep the shape of the
    checkpoint and are interpolated in each forward. A ValueError of what timm lacks, or is not asked (`OPTIONS`).
    """
    import timm

    _check_asked(architecture, embedding_dim, options)
    if architecture not in _ADAPTED and not timm.is_model(architecture):
        near = timm.list_models(f"*{architecture[:6]}*")[:8]
        raise ValueError(f"timm has no architecture {architecture!r}; near: {', '.join(near) or 'none'}")
    if timm.models.is_model_in_modules(architecture, ["vision_transformer"]):
        options = {"dynamic_img_size": True, **options}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if architecture in foundation.CLOUD_LEVELS:
            return foundation.CloudNet()
        if architecture in _ADAPTED:
            return foundation.load(architecture, foundation.RANDOM)
        return timm.create_model(architecture, in_chans=len(bands.NAMES), num_classes=embedding_dim, **options)


def _check_asked(architecture: str, embedding_dim: int, options: Mapping[str, Any]) -> None:
    """`card.json` may come from anywhere: what it asks of timm is plain names and numbers of a bounded size."""
    if not isinstance(architecture, str) or not re.fullmatch(r"[\w-]+", architecture):
        raise ValueError(f"architecture {architecture!r} is no plain name of timm's, such as resnet50")
    if type(embedding_dim) is not int or not 1 <= embedding_dim <= 16_384:
        raise ValueError(f"embedding_dim is a whole number from 1 to 16384; got {embedding_dim!r}")
    for name, value in options.items():
        if name not in OPTIONS:
            raise ValueError(f"option {name!r} is not allowed; available: {', '.join(OPTIONS)}")
        kind, most = OPTIONS[name]
        if type(value) is not kind or not (kind is int) <= value <= most:  # type: ignore[operator]
            raise ValueError(f"option {name} is of type {kind.__name__}, at most {most}; got {value!r}")


def load_encoder(source: str | Path, *, weights: Path | str | None = None) -> tuple[nn.Module, Card]:
    """An encoder in eval mode, and its card.

    Args:
        source: `mini`, which comes with the package; one of `PUBLISHED`, such as `satclip-resnet50-l40`, or of
            `foundation.ADAPTERS`, such as `galileo-nano`, or of its `CLOUD_LEVELS`, `ukis-csmask-6b-l1c`; or a folder
            that `save_encoder` wrote.
        weights: a local file, or a folder of `foundation`'s, instead of the download.

    Raises:
        ValueError: unknown source; a file that is damaged, of another encoder, or holds code; keys that are missing,
            extra or wrongly shaped; weights that are not finite.
        FileNotFoundError: no such file or folder.
    """
    name, path = str(source), Path(source)
    if name in PUBLISHED:
        model, card = _load_published(name, weights)
    elif name in foundation.ADAPTERS:
        model, card = _load_foundation(name, weights)
    elif name in foundation.CLOUD_LEVELS:
        model, card = _load_clouds(name, weights)
    elif weights is not None and (name == MINI or path.is_dir()):
        raise ValueError(f"weights={str(weights)!r} goes with a published encoder; {source} has weights of its own")
    elif name == MINI:
        model, card = _load_saved(files.MINI / "encoder" / "pre-trained")
    elif path.is_dir():
        model, card = _load_saved(path)
    elif path.is_file():
        named = f"load_encoder({SATCLIP!r}, weights={name!r})"
        raise ValueError(f"{source} is a file; say which encoder's it is, such as {named}. A saved one is a folder")
    elif "/" in name or path.suffix:
        raise FileNotFoundError(f"no encoder at {source}; add your dataset: such a one is made by: {_maker(path)}")
    else:
        known = ", ".join([MINI, *PUBLISHED, *foundation.ADAPTERS, *foundation.CLOUD_LEVELS])
        raise ValueError(f"unknown encoder {name!r}; available: {known}, or a folder such as outputs/sample/encoder")
    return model.eval(), card


def _maker(path: Path) -> str:
    """The command that makes `outputs/<experiment>/encoder`, or `encoder-seed<n>` below a mask's folder there."""
    half = path.name == "pre-trained"  # of one for every loss
    path = path.parent if half else path
    run, seed = path.parent.name, path.name.removeprefix("encoder-seed")
    experiment, notebook, asked = run, "08_any_band_encoder" if half else "00_sample_encoder", ""
    if path.name.startswith("encoder-seed"):
        experiment, notebook = path.parents[1].name if len(path.parents) > 1 else "", "08_any_band_encoder"
        if run != "any-band":
            mask, _, scheme = run.partition("-")  # `bands.mask_slug`
            notebook = "03_fine_tuning"
            asked = f' -p mask "{mask.replace("_", " ")}" -p mask_scheme {scheme or "named"}'
        asked += f' -y "seeds: [{seed}]"' if seed != "0" else ""
    given = f"params/experiments/{experiment}.yaml"
    given = f" -f {given}" if experiment and (files.project_root() / given).exists() else ""
    return f"papermill notebooks/{notebook}.ipynb made.ipynb{given} -p experiment {experiment or 'sample'}{asked}"


def save_encoder(model: nn.Module, card: Card, path: Path | str, *, half: bool = False) -> Path:
    """Write `model.safetensors` and `card.json` into a folder, whole or not at all.

    Versions, checksum and a ViT's dynamic image size are the model's, whatever the card says; `half` keeps weights in
    16 bits. A ValueError of weights that are not finite.
    """
    import timm
    from safetensors.torch import save_file

    versions = {"python": platform.python_version()}
    versions |= {package.__name__: package.__version__ for package in (bandmask, torch, timm)}
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    state |= {name: state[name].half() for name, _ in model.named_parameters() if half}  # buffers are what it scales by
    check_finite(state, f"{card.name} can't be saved: it")
    if card.architecture not in _ADAPTED:  # their code may lie where it was asked for by `weights` alone
        _check_loads(state, card)
    dynamic = {"dynamic_img_size": True} if getattr(model, "dynamic_img_size", False) else {}
    with files.writing(path) as partial:
        partial.mkdir(parents=True)
        save_file(state, partial / "model.safetensors")
        checksum = files.sha256(partial / "model.safetensors")
        card = replace(card, options={**card.options, **dynamic}, sha256=checksum, versions=versions)
        (partial / "card.json").write_text(files.sealed(asdict(card)))
    return Path(path)


def _check_loads(state: Mapping[str, Tensor], card: Card) -> None:
    """A ValueError of weights that `load_encoder` could not put into the architecture of their card."""
    try:
        fresh = create_encoder(card.architecture, embedding_dim=card.embedding_dim, **card.options)
        load_checked(fresh, state, card.name)
    except ValueError as error:
        said = f"{card.name} can't be saved, load_encoder would not read it: {error}"
        raise ValueError(f"{said}. Use torch.save") from error


def needs(encoder: nn.Module) -> tuple[str, ...]:
    """Bands that an encoder can't do without: none of one that takes gaps."""
    return () if getattr(encoder, "takes_gaps", False) else getattr(encoder, "bands", bands.NAMES)


def check_gaps(encoder: nn.Module, fill: Any) -> None:
    """A ValueError if NaN stands in hidden pixels, and this encoder can't be told so that something is missing."""
    gaps = torch.is_tensor(fill) and bool(fill.isnan().any())
    if gaps and not any(getattr(part, "takes_gaps", False) for part in encoder.modules()):
        raise ValueError("native masking is of encoders that were trained with missing bands, such as galileo-nano")


def embed(model: nn.Module, images: Tensor, taps: Sequence[str] = ()) -> tuple[Tensor, dict[str, Tensor]]:
    """Embeddings (B, D) and the feature map of each tap in one forward, of images (B, 13, S, S).

    `taps` are timm's module names: `layer1` and `layer4` of a ResNet50 give (B, 256, S/4, S/4) and (B, 2048, S/32,
    S/32), `blocks.3` of a ViT-S/16 its tokens in their places, (B, 384, S/16, S/16).
    """
    if not taps:
        return model(images), {}
    names = list(tap_strides(model))
    final, maps = model.forward_intermediates(images, indices=[names.index(tap) for tap in taps])  # type: ignore[operator]
    order = sorted(taps, key=names.index)  # timm returns them from shallow to deep
    return model.forward_head(final), dict(zip(order, maps, strict=True))  # type: ignore[operator]


def default_taps(model: nn.Module) -> tuple[str, str]:
    """A shallow and a deep tap: `layer1` and `layer4` of a ResNet, `stages.0` and `stages.3` of a ConvNeXt.

    Of a ViT, whose maps are all of one size, the blocks after a quarter and at the end: `blocks.3` and `blocks.11`.
    """
    strides = tap_strides(model)
    names = list(strides)
    if len(set(strides.values())) == 1:
        return names[len(names) // 4], names[-1]
    return next((name for name in names if strides[name] >= 4), names[0]), names[-1]


def tap_strides(model: nn.Module) -> dict[str, int]:
    """Every tap of a model, and how many pixels of the image a pixel of its map spans; none behind `with_map`."""
    return {stage["module"]: stage["reduction"] for stage in getattr(model, "feature_info", ())}


def _load_published(name: str, weights: Path | str | None) -> tuple[nn.Module, Card]:
    found = PUBLISHED[name]
    path = Path(weights) if weights is not None else found.fetch()
    state = read_checkpoint(path)
    if found.legendre:
        state = _satclip(name, state, path)
    model = create_encoder(found.architecture)
    side, note = (224, f"; {VIT_NOTE}") if found.architecture == VIT else (256, "")
    if found.legendre:
        load_checked(model, state, str(path))
        parent = next(key for key, other in PUBLISHED.items() if other.entry == found.entry and not other.legendre)
        data = {"name": "S2-100K", "level": "L2A with B10 = 0"}
        notes = f"B10 was a plane of zeros in its training: it never saw real cirrus{note}"
        return model, Card(found.title, found.architecture, 256, side, parent, data=data, notes=notes)
    head = model.pretrained_cfg["classifier"]  # type: ignore[index]
    backbone = {key: value for key, value in state.items() if not key.startswith(f"{head}.")}
    fresh = {key: value for key, value in model.state_dict().items() if key.startswith(f"{head}.")}
    load_checked(model, backbone | fresh, str(path))
    data = {"name": "SSL4EO-S12", "level": "L1C"}
    notes = f"backbone of {found.entry.split('.')[1]} with a fresh, untrained {head} (seed 0){note}"
    return model, Card(f"{found.title}, fresh {head}", found.architecture, 256, side, data=data, notes=notes)


def _load_foundation(name: str, weights: Path | str | None) -> tuple[nn.Module, Card]:
    of = foundation.ADAPTERS[name]
    model = foundation.load(name, weights)
    lost = "a group of bands is a token, dropped" if of.missing == "token" else "a lost band is 0 after scaling"
    random = "random weights: it knows nothing; " if weights == foundation.RANDOM else ""
    notes = f"{random}takes {' '.join(model.bands)}, NaN = missing ({lost}); 64 px are quick on a CPU"
    dim = foundation.WIDTH * (1 if of.pooling == "mean" else 2)
    title = f"{of.title}, random weights" if random else of.title
    return model, Card(title, name, dim, 64, data={"name": of.source}, notes=notes)


def _load_clouds(name: str, weights: Path | str | None) -> tuple[nn.Module, Card]:
    model, (state, path) = foundation.CloudNet(), foundation.load_clouds(name, weights)
    load_checked(model, state, str(path))
    data = {"name": "SPARCS, CloudSEN12+ and others, at about 30 m", "level": foundation.CLOUD_LEVELS[name]}
    return model, Card(name, name, foundation.CLOUD_DIMS[-1], data=data, notes=f"takes {' '.join(model.bands)} alone")


def _satclip(name: str, checkpoint: Mapping[str, Any], path: Path) -> dict[str, Tensor]:
    """The vision encoder of a Lightning checkpoint, if it is the one of that name."""
    state = checkpoint.get("state_dict")
    if not isinstance(state, Mapping):
        raise ValueError(f"{path} is no SatCLIP checkpoint: it has no 'state_dict', but {sorted(checkpoint)[:8]}")
    beside = ("model.location.", "model.nnet.", "model.logit_scale")
    visual = {k.removeprefix("model.visual."): v for k, v in state.items() if not k.startswith(beside)}
    architecture = next((timm_name for timm_name, key in _MARKS.items() if key in visual), None)
    layer = state.get("model.nnet.layers.0.weight")  # of the location encoder, (512, L²)
    legendre = math.isqrt(layer.shape[1]) if layer is not None and layer.ndim == 2 else None
    alike = {key: of for key, of in PUBLISHED.items() if of.legendre and of.architecture == architecture}
    fits = [key for key, of in alike.items() if legendre in (None, of.legendre)]
    if architecture and name not in fits:
        held = " or ".join(fits) or f"another model, with {legendre} polynomials"
        raise ValueError(f"{path} is not {name}: its layers are those of {held}; load it by that name")
    return visual


def _load_saved(path: Path) -> tuple[nn.Module, Card]:
    from safetensors import SafetensorError
    from safetensors.torch import load

    for name in ("model.safetensors", "card.json"):
        if why := files.distrust(path / name):
            warnings.warn(f"{path / name}: {why}; `make run` makes it again", stacklevel=3)  # who called load_encoder
    card = read_card(path)
    model = create_encoder(card.architecture, embedding_dim=card.embedding_dim, **card.options)
    content = files.require(path / "model.safetensors", "save_encoder writes it beside card.json").read_bytes()
    if card.sha256 and hashlib.sha256(content).hexdigest() != card.sha256:
        raise ValueError(f"{path}/model.safetensors is damaged: its checksum is not the one in card.json; make it anew")
    try:
        load_checked(model, load(content), str(path))
    except SafetensorError as error:
        raise ValueError(f"{path}/model.safetensors is damaged ({error}); make it anew") from error
    return model, card


def read_card(path: Path | str) -> Card:
    """The card of a saved encoder; a ValueError of entries that are missing, unknown or not allowed, or other bands."""
    file = files.require(Path(path) / "card.json", "save_encoder writes it beside model.safetensors")
    try:
        entries = files.unsealed(file)
        if entries.pop("first_layer", "plain") != "plain":  # of cards before 2026-12
            raise ValueError("its first layer was taken out; use the release that made it")
        card = Card(**{**entries, "bands": tuple(entries["bands"])})
    except (TypeError, KeyError, AttributeError, ValueError, RecursionError) as error:
        raise ValueError(f"{file} is no encoder card: {error}") from error
    if card.bands != bands.NAMES:
        raise ValueError(f"{file}: made for bands {card.bands}; this project feeds {bands.NAMES}")
    return card
