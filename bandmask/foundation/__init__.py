"""Encoders of others, whose code or weights are not here: foundation models trained with missing bands, a cloud mask.

Each foundation model is a row of one table, `adapters.json`. Galileo's one file lies beside its weights, the others'
come from the packages `geoml-presto` and `olmoearth-pretrain-minimal`. Of single files only those are executed, and of
weights only those loaded, that have the SHA-256 of that table. Galileo: Tseng et al. 2025, arXiv:2502.09356; Presto:
Tseng et al. 2023, arXiv:2304.14065; OlmoEarth: Herzog et al. 2025, arXiv:2511.13655.

**Missing** is NaN, and said by patch. A band is lost in a patch where more than half of its pixels are hidden; a lesser
gap takes the mean of what is visible there. A group of bands is a token, dropped where any of its bands is lost. Where
that would leave a patch without a token, groups with a band left keep theirs, and their lost bands take the mean of
training images (only B02 and B04 left: B03 at its mean). NDVI is dropped wherever B04 or B08 is lost.
"""

import hashlib
import importlib
import io
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bandmask import bands, files

PATCH, WIDTH = 8, 128  # pixels; length of a token
MONTH = 6  # July, counted from 0: what an image alone doesn't say
RANDOM = "random"  # instead of a path to weights: as the model starts, to test with
_Built = tuple[nn.Module, Tensor, Tensor, Tensor]  # upstream's encoder; offset, scale and mean of each channel, in DN


@dataclass(frozen=True)
class Adapter:
    """What there is to know of a model: bands, tokens, scaling, and how it says that something is missing."""

    title: str
    source: str  # where it is from, licence, and what it was trained on
    groups: Mapping[str, Sequence[str]]  # a token each; NDVI is made of its two
    missing: str  # `token`: a group's is dropped, as in its training; `zero`: a lost band is 0 after scaling, likewise
    pooling: str  # of patches: `mean`, or `mean and SD`
    address: str  # of its files
    files: Mapping[str, str]  # what its folder holds, weights first, by their place at the address: SHA-256
    build: Callable[[Path], _Built]  # from that folder, with random weights
    patches: Callable[[nn.Module, Tensor, Tensor], Tensor]  # of scaled (B, C, S, S), dropped (B, G, h, w): (B, D, h, w)


class FoundationEncoder(nn.Module):
    """Embeds reflectance (B, 13, S, S) in SatCLIP order, NaN = missing by the rule of this module; S a multiple of 8.

    Bands that a model doesn't take are ignored. All patches of an image attend to each other in Galileo and OlmoEarth,
    so that cost grows with S⁴: 64 px are quick on a CPU, 256 px are not.
    """

    takes_gaps = True  # what `bm.load_encoder` asks
    feature_info = ({"module": "patches", "num_chs": WIDTH, "reduction": PATCH},)  # one map, of patches, as timm has it
    offset: Tensor
    scale: Tensor
    mean: Tensor  # (1, C, 1, 1) each, DN

    def __init__(self, name: str, folder: Path) -> None:
        """A row of `ADAPTERS`, with random weights."""
        super().__init__()
        self.name, self.adapter = name, ADAPTERS[name]
        self.upstream, *constants = self.adapter.build(folder)
        for key, parameter in list(self.upstream.named_parameters()):
            if not parameter.requires_grad:  # tables of sines, which no training may change
                of, _, leaf = key.rpartition(".")
                delattr(self.upstream.get_submodule(of), leaf)
                self.upstream.get_submodule(of).register_buffer(leaf, parameter.data)
        for module in self.upstream.modules():
            if type(module).__name__ == "Attention":
                module.register_forward_pre_hook(_without_needless_mask)
        for key, values in zip(("offset", "scale", "mean"), constants, strict=True):
            self.register_buffer(key, values.float().view(1, -1, 1, 1))
        self.bands = tuple(dict.fromkeys(band for group in self.adapter.groups.values() for band in group))

    def forward(self, images: Tensor) -> Tensor:
        """Embeddings: means of tokens (B, 128), or means and SDs (B, 256)."""
        return self.forward_head(self._patches(images))

    def forward_intermediates(self, images: Tensor, indices: Sequence[int]) -> tuple[Any, list[Tensor]]:
        """What `forward_head` takes, and the map (B, 128, S/8, S/8); what `encoders.embed` calls."""
        found = self._patches(images)
        return found, [found[0]] * len(indices)

    def forward_head(self, found: tuple[Tensor, Tensor]) -> Tensor:
        """Pool the patches that have a token."""
        maps, seen = found
        weight = (seen / seen.sum((1, 2), keepdim=True))[:, None]  # (B, 1, h, w)
        mean = (maps * weight).sum((2, 3))
        if self.adapter.pooling == "mean":
            return mean
        variance = ((maps - mean[..., None, None]).square() * weight).sum((2, 3))
        return torch.cat([mean, (variance + 1e-12).sqrt()], 1)  # the root of 0 has no gradient

    def _patches(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Vectors (B, 128, h, w), 0 where a patch has no token, and where there is one, (B, h, w)."""
        order, title = ", ".join(bands.NAMES), self.adapter.title
        if images.ndim != 4 or images.shape[1] != len(bands.NAMES):
            raise ValueError(f"images are (B, 13, S, S), NaN where missing, in the order {order}; got {images.shape}")
        if images.shape[2] != images.shape[3] or images.shape[3] % PATCH:
            raise ValueError(f"{title} takes squares, sides a multiple of {PATCH} px; got {tuple(images.shape[2:])}")
        dn = torch.stack([images[:, bands.NAMES.index(band)] for band in self.bands], 1).float() * 10_000
        hidden = dn.isnan()
        seen = 1 - F.avg_pool2d(hidden.float(), PATCH)  # (B, C, h, w), share of a patch
        lost = seen < 0.5
        if hidden.any():
            local = F.avg_pool2d(dn.masked_fill(hidden, 0), PATCH) / seen.clamp(min=1e-6)
            dn = torch.where(hidden, _pixels(torch.where(lost, self.mean[:, : len(self.bands)], local)), dn)
        groups = [torch.stack([lost[:, self.bands.index(band)] for band in of]) for of in self.adapter.groups.values()]
        some, every = (torch.stack([how(group, 0) for group in groups], 1) for how in (torch.any, torch.all))
        if "NDVI" in self.adapter.groups:
            every[:, -1] = some[:, -1]
            red, nir = dn[:, self.bands.index("B04")], dn[:, self.bands.index("B08")]
            dn = torch.cat([dn, ((nir - red) / (nir + red).clamp(min=1e-6))[:, None]], 1)
        scaled, dropped = (dn - self.offset) / self.scale, every
        if self.adapter.missing == "token":
            dropped = torch.where(some.all(1, keepdim=True), every, some)
        else:
            scaled = scaled.masked_fill(_pixels(lost), 0)
        there = ~dropped.all(1)
        if not there.flatten(1).any(1).all():
            raise ValueError(f"an image has no value in any band that {title} takes: {', '.join(self.bands)}")
        return self.adapter.patches(self.upstream, scaled, dropped) * there[:, None], there


def _without_needless_mask(_: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
    """Tokens that all images lack are gone already; a mask that hides nothing more doubles the time."""
    return tuple(None if torch.is_tensor(it) and it.dtype == torch.bool and it.all() else it for it in given)


def _pixels(of_patches: Tensor) -> Tensor:
    return of_patches.repeat_interleave(PATCH, 2).repeat_interleave(PATCH, 3)


def load(name: str, weights: Path | str | None = None) -> FoundationEncoder:
    """A published foundation encoder in eval mode; ready for `fine_tune`, and for images with gaps.

    Args:
        name: of `ADAPTERS`.
        weights: the folder of its files, or its weights file there; by default `models/<name>` in the data folder, else
            a download. `random` leaves it as it starts.

    Raises:
        ValueError: a file that is not the known one, which is neither executed nor loaded.
        FileNotFoundError: a file is not there and can't be fetched, or the package of the model's code not installed.
        RuntimeError: that package is of another version than the weights.
    """
    folder = _folder(name, weights)
    model, (file, known) = FoundationEncoder(name, folder).eval(), next(iter(ADAPTERS[name].files.items()))
    if weights != RANDOM:
        path = Path(weights) if weights and Path(weights).is_file() else folder / Path(file).name
        state = torch.load(io.BytesIO(_checked(path, known)), map_location="cpu", weights_only=True)
        own, wanted = {key.removeprefix("encoder."): value for key, value in state.items()}, model.upstream.state_dict()
        # what is left out: decoders, and of OlmoEarth what other sensors enter by
        model.upstream.load_state_dict({key: value for key, value in own.items() if key in wanted})
    return model


def _folder(name: str, weights: Path | str | None) -> Path:
    """Where the files of a model lie; they are fetched if nobody says where."""
    if weights and weights != RANDOM:
        path = Path(weights)
        return path if path.is_dir() else files.require(path, f"weights is the folder of {name}, or its file").parent
    if (data := files.data_root()) and (data / "models" / name).is_dir():
        return data / "models" / name
    folder, of = Path(torch.hub.get_dir()) / "checkpoints" / name, ADAPTERS[name]
    for place, (file, sha256) in enumerate(of.files.items()):
        path, url = folder / Path(file).name, f"{of.address}/{file}"
        if path.exists() or (weights == RANDOM and not place):
            continue
        try:
            folder.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(path), hash_prefix=sha256, progress=False)
        except Exception as error:  # hubs raise many kinds; the way out is the same
            said = f"{name}: {path.name} could not be fetched ({type(error).__name__}: {error})"
            raise FileNotFoundError(f"{said}. Download {url} elsewhere, and pass its folder as weights") from error
    return folder


def _checked(path: Path, known: str) -> bytes:
    """The content of a file, which has the known SHA-256: what is hashed is what is then used."""
    content = files.require(path, "give the folder that holds all files of the model").read_bytes()
    if (found := hashlib.sha256(content).hexdigest()) != known:
        raise ValueError(f"{path} is not the known {path.name}: SHA-256 {found[:8]}…, known {known[:8]}…")
    return content


def _execute(source: bytes, name: str) -> ModuleType:
    module = ModuleType(name)
    module.__package__ = name.rpartition(".")[0]
    exec(compile(source, name, "exec"), module.__dict__)
    return module


def _galileo(folder: Path) -> _Built:
    _, *others = ADAPTERS["galileo-nano"].files.items()
    content = {Path(file).name: _checked(folder / Path(file).name, known) for file, known in others}
    config, known = (json.loads(content[file]) for file in ("config.json", "normalization.json"))
    code = _execute(content["single_file_galileo.py"], "_bandmask_galileo")
    # without blocks that are dropped at random, a training gives the same again
    upstream = code.Encoder(**{**config["model"]["encoder"], "drop_path": 0.0})
    mean, sd = (torch.tensor(known["13"][key][2:]) for key in ("mean", "std"))  # behind two of Sentinel-1
    ndvi = torch.arange(len(mean)) == len(mean) - 1  # upstream leaves it as it is
    return upstream, (mean - 2 * sd).where(~ndvi, 0), (4 * sd).where(~ndvi, 1), mean


def _galileo_patches(upstream: Any, scaled: Tensor, dropped: Tensor) -> Tensor:
    count, _, height, width = scaled.shape
    first = [torch.zeros(count, 2, height, width, device=scaled.device), torch.ones_like(dropped[:, :1])]  # Sentinel-1
    both = torch.cat([first[0], scaled], 1), _pixels(torch.cat([first[1], dropped], 1).float())
    images, masks = (part.permute(0, 2, 3, 1)[:, :, :, None] for part in both)  # (B, S, S, 1, C)
    space, time, static = (height, width), (1,), ()  # nothing else is known of the place
    others = [scaled.new_zeros(count, *shape) for shape in ((*space, 16), (*time, 6), (*static, 18))]
    gone = [scaled.new_ones(count, *shape) for shape in ((*space, 3), (*time, 3), (*static, 4))]
    months = torch.full((count, 1), MONTH, device=scaled.device)
    found = upstream(images, *others, masks, *gone, months, patch_size=PATCH)
    return _mean_token(found[0][:, :, :, 0], found[4][:, :, :, 0] == 0)


def _mean_token(tokens: Tensor, kept: Tensor) -> Tensor:
    """(B, D, h, w), the mean of tokens (B, h, w, G, D) that are kept (B, h, w, G)."""
    weight = kept[..., None].float()
    return ((tokens * weight).sum(3) / weight.sum(3).clamp(min=1)).permute(0, 3, 1, 2)


def _presto(_: Path) -> _Built:
    starts = {"S1": 0, "S2_RGB": 2, "S2_Red_Edge": 5, "S2_NIR_10m": 8, "S2_NIR_20m": 9, "S2_SWIR": 10}
    starts |= {"ERA5": 12, "SRTM": 14, "NDVI": 16, "": 17}
    ends = [*starts.values()][1:]
    groups = {key: list(range(start, end)) for (key, start), end in zip(starts.items(), ends, strict=False)}
    # four names of modules that import Earth Engine
    parts: dict[str, dict[str, Any]] = {
        "dataops.pipelines.dynamicworld": {"DynamicWorld2020_2021": type("", (), {"class_amount": 9})},
        "dataops.pipelines.s1_s2_era5_srtm": {"BANDS_GROUPS_IDX": groups},
        "model": dict.fromkeys(("FinetuningHead", "FineTuningModel", "Seq2Seq"), nn.Module),
        "utils": {"default_model_path": None, "device": torch.device("cpu")},
    }
    for part, names in parts.items():
        sys.modules[f"_bandmask_presto.{part}"] = module = ModuleType(part)
        vars(module).update(names)
    path = files.of_package("presto", "presto.py", pip="geoml-presto")
    code = _execute(_checked(path, _PRESTO), "_bandmask_presto.presto")
    scale = torch.tensor([10_000.0] * 10 + [1.0])
    return code.Presto.construct().encoder, torch.zeros(11), scale, torch.tensor(_MEAN)


def _presto_patches(upstream: Any, scaled: Tensor, dropped: Tensor) -> Tensor:
    count, _, height, width = dropped.shape
    mean = F.avg_pool2d(scaled[:, :-1], PATCH)  # Presto is of pixels: a patch is one, coarser
    red, nir = mean[:, 2], mean[:, 6]
    ndvi = ((nir - red) / (nir + red).clamp(min=1e-6))[:, None]
    rows = torch.cat([mean, ndvi], 1).permute(0, 2, 3, 1).flatten(0, 2)  # (N, 11), N = B h w
    gone = dropped.permute(0, 2, 3, 1).flatten(0, 2).float()  # (N, 6)
    x = torch.cat([F.pad(rows[:, :10], (2, 4)), rows[:, 10:]], 1)  # (N, 17)
    lengths = torch.tensor([3, 3, 1, 1, 2], device=x.device)
    mask = torch.cat([F.pad(gone[:, :5].repeat_interleave(lengths, 1), (2, 4), value=1.0), gone[:, 5:]], 1)
    upstream.forward.__globals__["device"] = x.device
    none = torch.full((len(x), 1), 9, device=x.device)  # the class of Dynamic World that is missing
    where = x.new_zeros(len(x), 2)  # latitude and longitude, which it can't do without
    found = upstream(x[:, None], dynamic_world=none, latlons=where, mask=mask[:, None], month=MONTH)
    return found.view(count, height, width, -1).permute(0, 3, 1, 2)


def _olmoearth(_: Path) -> _Built:
    name = "olmoearth_pretrain_minimal"
    root = files.of_package(name)
    if mine := name not in sys.modules:  # its __init__ wants a hub's client
        sys.modules[name] = ModuleType(name)
        sys.modules[name].__path__ = [str(root)]
    try:
        code = importlib.import_module(f"{name}.olmoearth_pretrain_v1.olmoearth_pretrain_v1")
    finally:
        if mine:
            del sys.modules[name]
    known = json.loads((root / "olmoearth_pretrain_v1/data/norm_configs/computed.json").read_text())["sentinel2_l2a"]
    mean, sd = (
        torch.tensor([known[band][key] for band in ADAPTERS["olmoearth-nano"].groups["all"]]) for key in ("mean", "std")
    )
    made = code.OlmoEarthPretrain_v1("nano", "v1.2", supported_modality_names=["sentinel2_l2a"], drop_path=0.0)
    return made.model.encoder, mean - 2 * sd, 4 * sd, mean


def _olmoearth_patches(upstream: Any, scaled: Tensor, dropped: Tensor) -> Tensor:
    count = len(scaled)
    when = torch.tensor([1, MONTH, 2020], device=scaled.device).expand(count, 1, 3)
    sample = sys.modules[type(upstream).__module__].MaskedOlmoEarthSample
    gone = _pixels(dropped).permute(0, 2, 3, 1)[:, :, :, None].expand(-1, -1, -1, -1, scaled.shape[1]) * 3  # MISSING
    images = scaled.permute(0, 2, 3, 1)[:, :, :, None]
    found = upstream(sample(timestamps=when, sentinel2_l2a=images, sentinel2_l2a_mask=gone), patch_size=PATCH)
    tokens = found["tokens_and_masks"]
    return _mean_token(tokens.sentinel2_l2a[:, :, :, 0], tokens.sentinel2_l2a_mask[:, :, :, 0] == 0)


# DN of Galileo's training images: Presto's code says none, and its images are of the same source
_MEAN = (1395.0, 1338.0, 1343.0, 1544.0, 2186.0, 2525.0, 2410.0, 2750.0, 2235.0, 1475.0, 0.29)
_PRESTO = "12f1f17cb4acbf4a88209ff07e17dc41a1e2e1702e462502a9c3904b87396d85"  # of the package's `presto.py`
_CODE = {  # how each is built, and how its patches are embedded
    "galileo-nano": (_galileo, _galileo_patches),
    "presto": (_presto, _presto_patches),
    "olmoearth-nano": (_olmoearth, _olmoearth_patches),
}
_ROWS: dict[str, Any] = json.loads(Path(__file__).with_name("adapters.json").read_text(encoding="utf-8"))
ADAPTERS = {name: Adapter(**row, build=_CODE[name][0], patches=_CODE[name][1]) for name, row in _ROWS.items()}


# --- a published cloud mask as an encoder

CLOUD_LEVELS = {"ukis-csmask-6b-l1c": "L1C", "ukis-csmask-6b-l2a": "L2A"}
CLOUD_CLASSES = ("clear", "cloud", "shadow")  # of `logits`
CLOUD_DIMS = (48, 32, 56, 160, 448)  # channels at S/2, S/4 … S/32


class CloudNet(nn.Module):
    """DLR's cloud masks `ukis-csmask`, a U-Net on EfficientNet-B4: six bands at about 30 m, of Sentinel-2 or Landsat.

    Embeds reflectance (B, 13, S, S) in SatCLIP order, (B, 448); S a multiple of 32. It was not trained with missing
    bands. Source: Wieland et al. 2019, doi:10.1016/j.rse.2019.05.022; weights, as ONNX, of its package, Apache-2.0.
    """

    bands = ("B02", "B03", "B04", "B08", "B11", "B12")  # others are ignored
    feature_info = tuple({"module": f"S/{2**n}", "num_chs": c, "reduction": 2**n} for n, c in enumerate(CLOUD_DIMS, 1))
    mean: Tensor
    sd: Tensor

    def __init__(self) -> None:
        """With random weights, and without scaling."""
        from segmentation_models_pytorch import Unet

        super().__init__()
        self.unet = Unet("efficientnet-b4", encoder_weights=None, in_channels=6, classes=len(CLOUD_CLASSES))
        del self.unet.encoder._conv_head, self.unet.encoder._bn1  # behind the deepest map: no part of the U-Net
        self.unet.encoder._drop_connect_rate = 0.0  # without blocks dropped at random, a training gives the same again
        self.register_buffer("mean", torch.zeros(1, 6, 1, 1))
        self.register_buffer("sd", torch.ones(1, 6, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        """Embeddings: means of the deepest map."""
        return self.forward_head(self.unet.encoder(self._scaled(images))[-1])

    def forward_intermediates(self, images: Tensor, indices: Sequence[int]) -> tuple[Tensor, list[Tensor]]:
        """What `forward_head` takes, and those of the five maps; what `encoders.embed` calls."""
        _, *maps = self.unet.encoder(self._scaled(images))
        return maps[-1], [maps[index] for index in sorted(indices)]

    def forward_head(self, deepest: Tensor) -> Tensor:
        """Pool the deepest map."""
        return deepest.mean((2, 3))

    def logits(self, images: Tensor) -> Tensor:
        """What the published network says, (B, 3, S, S) for `CLOUD_CLASSES`, by the decoder it was trained with."""
        return self.unet(self._scaled(images))

    def _scaled(self, images: Tensor) -> Tensor:
        if images.ndim != 4 or images.shape[1] != len(bands.NAMES) or any(side % 32 for side in images.shape[2:]):
            said = f"images are (B, 13, S, S) in the order {', '.join(bands.NAMES)}, sides a multiple of 32 px"
            raise ValueError(f"{said}; got {tuple(images.shape)}")
        return (images[:, bands.channel_indices(self.bands)] - self.mean) / self.sd


def load_clouds(name: str, weights: Path | str | None = None) -> tuple[dict[str, Tensor], Path]:
    """The state of a `CloudNet` of a name in `CLOUD_LEVELS`, in float32 (its file has 16 bits), and that file.

    Args:
        name: which.
        weights: its `.onnx` file, with the `.json` beside it, or their folder; default: the installed package.

    Raises:
        FileNotFoundError: a file, or the package `ukis-csmask`, is not there.
        ModuleNotFoundError: `onnx`, which reads it, is not installed.
        ValueError: the file is damaged.
    """
    part = f"model_{name.removeprefix('ukis-csmask-').replace('-', '_')}.onnx"
    path = Path(weights or files.of_package("ukis_csmask"))
    path = files.require(
        path / part if path.is_dir() else path, f"it comes with pip install --no-deps ukis-csmask, {part}"
    )
    known = json.loads(files.require(path.with_suffix(".json"), f"it lies beside {part}").read_bytes())
    try:
        onnx, helper = map(importlib.import_module, ("onnx", "onnx.numpy_helper"))
    except ImportError as error:
        raise ModuleNotFoundError(f"{part} is read by the package onnx: pip install 'bandmask[models]'") from error
    try:
        tensors = onnx.load(path).graph.initializer
    except Exception as error:  # of protobuf's own kinds
        raise ValueError(f"{path} is damaged, or no ONNX file ({error}); fetch it again") from error
    stored = {tensor.name.removeprefix("model."): helper.to_array(tensor) for tensor in tensors}
    state = {f"unet.{key}": torch.tensor(value, dtype=torch.float32) for key, value in stored.items()}
    scaling = zip(("mean", "sd"), known["data"]["dataset_statistics"]["img"], strict=True)
    return state | {key: torch.tensor(values).view(1, -1, 1, 1) for key, values in scaling}, path
