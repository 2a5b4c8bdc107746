"""DeepLabV3+: two feature maps of an encoder to a class for every pixel. Fresh, or from the published DFC2020 file.

Written to the papers, Chen et al. 2017 (DeepLabV3, arXiv:1706.05587) and 2018 (DeepLabV3+, arXiv:1802.02611). The names
of the layers are those of the published checkpoint of the DFC2020 baseline (Schmitt et al. 2020), so that it loads.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bandmask import bands
from bandmask.encoders import load_checked, read_checkpoint
from bandmask.readers.landcover import NINE_CLASSES

RATES = (1, 6, 12, 18)  # of the pyramid's atrous convolutions at an output stride of 16 (DeepLabV3 §3.3)
MULTI_GRID = (1, 2, 4)  # unit rates of layer4's three blocks, times 2 at an output stride of 16 (DeepLabV3 §3.2.1)

# Ten bands, at 10 and 20 m, in the order of the file: the README of the baseline says "S2 high- and mid-res", and the
# readers that derive from it sort channels 2 3 4 8 and 5 6 7 9 12 13 of SEN12MS, counted from 1.
DFC2020_BANDS = ("B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B11", "B12")
DFC2020_CLASSES = NINE_CLASSES  # its outputs
_LAST = "decoder.last_conv.8"


class _Branch(nn.Module):
    """One atrous convolution, 1×1 at rate 1 and 3×3 above, with batch norm and ReLU."""

    def __init__(self, inputs: int, outputs: int, rate: int) -> None:
        super().__init__()
        self.atrous_conv = _conv(inputs, outputs, 1 if rate == 1 else 3, rate)
        self.bn = nn.BatchNorm2d(outputs)

    def forward(self, high: Tensor) -> Tensor:
        return F.relu(self.bn(self.atrous_conv(high)), inplace=True)


class _Pyramid(nn.Module):
    """Atrous spatial pyramid pooling: four rates and the image's mean, side by side (DeepLabV3 §3.3)."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.aspp1, self.aspp2, self.aspp3, self.aspp4 = (_Branch(channels, width, rate) for rate in RATES)
        self.global_avg_pool = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), _conv(channels, width, 1), nn.BatchNorm2d(width), nn.ReLU(inplace=True)
        )
        self.conv1 = _conv(5 * width, width, 1)
        self.bn1 = nn.BatchNorm2d(width)
        self.dropout = nn.Dropout(0.5)

    def forward(self, high: Tensor) -> Tensor:
        if self.global_avg_pool[2].training and len(high) < 2:
            raise ValueError(
                "a batch of one image can't train DeepLabV3+: the batch norm of its image-level branch sees one value "
                "a channel. Drop a last batch of one, use a larger batch, or call eval() to predict"
            )
        pooled = self.global_avg_pool(high).expand(-1, -1, *high.shape[-2:])  # bilinear from one pixel is constant
        branches = [self.aspp1(high), self.aspp2(high), self.aspp3(high), self.aspp4(high), pooled]
        merged = self.bn1(self.conv1(torch.cat(branches, 1)))  # (B, 5 width, h, w) -> (B, width, h, w)
        return self.dropout(F.relu(merged, inplace=True))


class _Refinement(nn.Module):
    """The pyramid's context and low-level detail to logits, at the detail's resolution (DeepLabV3+ §3.1)."""

    def __init__(self, low_channels: int, classes: int, width: int, low_width: int) -> None:
        super().__init__()
        self.conv1 = _conv(low_channels, low_width, 1)
        self.bn1 = nn.BatchNorm2d(low_width)
        self.last_conv = nn.Sequential(
            *(_conv(width + low_width, width, 3), nn.BatchNorm2d(width), nn.ReLU(inplace=True), nn.Dropout(0.5)),
            *(_conv(width, width, 3), nn.BatchNorm2d(width), nn.ReLU(inplace=True), nn.Dropout(0.1)),
            nn.Conv2d(width, classes, 1),
        )

    def forward(self, context: Tensor, low: Tensor) -> Tensor:
        detail = F.relu(self.bn1(self.conv1(low)), inplace=True)
        return self.last_conv(torch.cat([_resize(context, detail.shape[-2:]), detail], 1))


class DeepLabV3PlusDecoder(nn.Module):
    """DeepLabV3+ without its backbone: what stands on an encoder's feature maps."""

    def __init__(
        self,
        high_channels: int = 2048,
        low_channels: int = 256,
        classes: int = 10,
        *,
        width: int = 256,
        low_width: int = 48,
    ) -> None:
        """`width` channels in the pyramid's branches and the last convolutions, `low_width` for the shallow map."""
        super().__init__()
        self.channels = (low_channels, high_channels)
        self.aspp = _Pyramid(high_channels, width)
        self.decoder = _Refinement(low_channels, classes, width, low_width)

    def forward(self, low: Tensor, high: Tensor, size: tuple[int, int]) -> Tensor:
        """Logits (B, classes, *size). Training takes two images or more: drop a last batch of one.

        Args:
            low: shallow feature map, (B, Cl, S/4, S/4).
            high: deep feature map, (B, Ch, S/32, S/32); brought to S/16, a quarter of `low`'s side, if it is smaller.
            size: height and width of the answer.

        Raises:
            ValueError: channels that this decoder isn't made for; a batch of one in training.
        """
        if (found := (low.shape[1], high.shape[1])) != self.channels:
            raise ValueError(
                f"feature maps of {found} channels (low, high), this decoder takes {self.channels}; create_decoder "
                "fits one to any encoder, the published one goes with layer1 and layer4 of a ResNet50"
            )
        return _segment(self.aspp, self.decoder, low, high, size)


class SegmentationDecoders(nn.Module):
    """The decoders of several seeds, which one pass of the encoder trains, each as if it were alone.

    Each draws its dropout from (its seed, number of training steps done), not from torch's generator. So a decoder
    trained beside others gets the weights that it gets in a `SegmentationDecoders` of its own: to the bit on a CPU, and
    on CUDA as far as torch's kernels are deterministic. The number of steps is in the state dict, so a resumed run
    draws what an uninterrupted one does. It changes each step: don't `torch.compile` this.
    """

    def __init__(self, decoders: Sequence[DeepLabV3PlusDecoder], seeds: Sequence[int]) -> None:
        """Different decoders of the same classes, trained in place, and the seed of each one's dropout."""
        super().__init__()
        if not decoders or not len(set(map(id, decoders))) == len(decoders) == len(seeds):
            raise ValueError(
                f"{len(decoders)} decoders, {len(seeds)} seeds; give different decoders and a seed for each"
            )
        self.decoders = nn.ModuleList(decoders)
        self.seeds = tuple(seeds)
        self.steps = 0  # no buffer: reading one from a GPU each step would stall the queue

    def forward(self, low: Tensor, high: Tensor, size: tuple[int, int]) -> Tensor:
        """Logits (K, B, classes, *size) of feature maps that all decoders share; see `DeepLabV3PlusDecoder`."""
        logits = []
        for seed, decoder in zip(self.seeds, self.decoders, strict=True):
            draw = hashlib.blake2b(f"dropout {seed} {self.steps}".encode(), digest_size=4).digest()
            with _drawing_from(int.from_bytes(draw), high.device):  # in eval mode nothing draws
                logits.append(decoder(low, high, size))
        self.steps += self.training
        return torch.stack(logits)

    def get_extra_state(self) -> Tensor:
        """Training steps done, for the state dict."""
        return torch.tensor(self.steps)

    def set_extra_state(self, state: Tensor) -> None:
        """Go on from a state dict's number of steps."""
        self.steps = int(state)


class Dfc2020Model(nn.Module):
    """The complete published model, whose own predictions stand as a reference: ResNet101 and DeepLabV3+, 9 classes."""

    backbone: Any  # torchvision's ResNet, whose layers are untyped

    def __init__(self) -> None:
        """With random weights; `load_dfc2020_model` reads the published ones."""
        super().__init__()
        self.backbone = _resnet101(len(DFC2020_BANDS))
        parts = DeepLabV3PlusDecoder(classes=len(DFC2020_CLASSES))
        self.aspp, self.decoder = parts.aspp, parts.decoder

    def forward(self, reflectance: Tensor) -> Tensor:
        """Logits (B, 9, S, S) of reflectance (B, 13, S, S) in SatCLIP order; a ValueError if it isn't 13 bands.

        It takes its ten bands, clipped to 0..1 as in its training (DN 0..10000): a hidden pixel filled with −1 is 0.
        """
        if reflectance.shape[1] != len(bands.NAMES):
            raise ValueError(f"{reflectance.shape[1]} channels; give all 13 bands in order: {', '.join(bands.NAMES)}")
        net, chosen = self.backbone, reflectance[:, bands.channel_indices(DFC2020_BANDS)].clamp(0, 1)
        low = net.layer1(net.maxpool(net.relu(net.bn1(net.conv1(chosen)))))  # (B, 256, S/4, S/4)
        high = net.layer4(net.layer3(net.layer2(low)))  # (B, 2048, S/16, S/16)
        return _segment(self.aspp, self.decoder, low, high, (reflectance.shape[-2], reflectance.shape[-1]))


def create_decoder(
    high_channels: int, low_channels: int, classes: int, *, width: int = 256, seed: int = 0
) -> DeepLabV3PlusDecoder:
    """A fresh decoder whose weights depend on `seed` alone: He's normal for convolutions (He et al. 2015, eq. 10)."""
    with _drawing_from(seed):
        return DeepLabV3PlusDecoder(high_channels, low_channels, classes, width=width).apply(_he_normal)


def load_decoder(
    weights: Path | str, *, classes: int = 10, seed: int = 0, allow_pickle: bool = False
) -> tuple[DeepLabV3PlusDecoder, str]:
    """The decoder of the published DFC2020 checkpoint, and a sentence on what became of its last layer.

    Args:
        weights: the file that the README of github.com/lukasliebel/dfc2020_baseline links as "DeepLabv3+ S2".
        classes: of this task; a last layer of another number of outputs is replaced.
        seed: of that fresh layer.
        allow_pickle: load a file that needs Python's unsafe unpickling. Only for files you trust.

    Raises:
        FileNotFoundError: no such file.
        ValueError: damaged, no such checkpoint, or keys missing, extra or wrongly shaped, all listed.
    """
    return decoder_of(_published(weights, allow_pickle), str(weights), classes, seed)


def decoder_of(state: Mapping[str, Tensor], source: str, classes: int, seed: int) -> tuple[DeepLabV3PlusDecoder, str]:
    """`load_decoder` of a state dict read from `source`, of which everything but `backbone.*` must fit."""
    own = {name: tensor for name, tensor in state.items() if not name.startswith("backbone.")}
    last = ((f"{_LAST}.weight", 4), (f"{_LAST}.bias", 1))  # either tells the outputs, if the other is at fault
    outputs = next((len(own[name]) for name, ndim in last if name in own and own[name].ndim == ndim), classes)
    with torch.device("meta"):  # its initial weights would only be overwritten
        decoder = DeepLabV3PlusDecoder(classes=outputs)
    load_checked(decoder.to_empty(device="cpu"), own, source)
    if outputs == classes:
        return decoder, f"{_LAST} gives {outputs} classes, as many as this task has: kept"
    with _drawing_from(seed):
        decoder.decoder.last_conv[8] = nn.Conv2d(own[f"{_LAST}.weight"].shape[1], classes, 1).apply(_he_normal)
    return decoder, f"{_LAST} gave {outputs} classes, this task has {classes}: replaced by a fresh one (seed {seed})"


def load_dfc2020_model(weights: Path | str, *, allow_pickle: bool = False) -> Dfc2020Model:
    """The complete published model in eval mode, every key of the file checked; arguments as in `load_decoder`."""
    with torch.device("meta"):
        model = Dfc2020Model()
    load_checked(model.to_empty(device="cpu"), _published(weights, allow_pickle), str(weights))
    return model.eval()


def to_simplified(predicted: Tensor) -> Tensor:
    """Indices into the ten simplified IGBP classes, of indices into `DFC2020_CLASSES`; savanna is never predicted."""
    return predicted + (predicted >= DFC2020_CLASSES.index("Grassland"))


def _published(weights: Path | str, allow_pickle: bool) -> dict[str, Tensor]:
    checkpoint = read_checkpoint(weights, allow_pickle=allow_pickle)
    state = checkpoint.get("model_state_dict")
    if not isinstance(state, Mapping):
        found = sorted(map(str, checkpoint))[:8]
        raise ValueError(f"{weights} is no DFC2020 checkpoint: it has no 'model_state_dict', but {found}")
    if others := [str(name) for name, value in state.items() if not isinstance(value, Tensor)]:
        raise ValueError(f"{weights}: in its model_state_dict these are no tensors: {', '.join(others[:12])}")
    return dict(state)


def _segment(aspp: _Pyramid, decoder: _Refinement, low: Tensor, high: Tensor, size: tuple[int, int]) -> Tensor:
    height, width = (-(-side // 4) for side in low.shape[-2:])  # S/16, rounded up as strided convolutions do
    if high.shape[-2] < height or high.shape[-1] < width:
        high = _resize(high, (height, width))
    return _resize(decoder(aspp(high), low), size)


def _resize(maps: Tensor, size: Sequence[int]) -> Tensor:
    return F.interpolate(maps, size=tuple(size), mode="bilinear", align_corners=True)


def _conv(inputs: int, outputs: int, kernel: int, rate: int = 1) -> nn.Conv2d:
    """A convolution that keeps the size; batch norm follows, so it has no bias."""
    return nn.Conv2d(inputs, outputs, kernel, padding=rate * (kernel // 2), dilation=rate, bias=False)


def _he_normal(layer: nn.Module) -> None:
    if isinstance(layer, nn.Conv2d):
        nn.init.kaiming_normal_(layer.weight)


def _resnet101(inputs: int) -> Any:
    """A torchvision ResNet101 to layer4, at an output stride of 16 and with multi-grid rates in layer4."""
    from torchvision.models import resnet101

    net = resnet101(weights=None, replace_stride_with_dilation=[False, False, True])
    net.conv1 = nn.Conv2d(inputs, 64, 7, stride=2, padding=3, bias=False)
    for block, unit in zip(net.layer4, MULTI_GRID, strict=True):
        block.conv2.dilation = block.conv2.padding = (2 * unit, 2 * unit)
    del net.avgpool, net.fc
    return net


@contextlib.contextmanager
def _drawing_from(seed: int, device: torch.device | None = None) -> Iterator[None]:
    """Inside, torch draws from `seed`, on the CPU and on `device`; afterwards its generators are as they were."""
    gpus = [device] if device is not None and device.type == "cuda" else []
    with torch.random.fork_rng(devices=gpus):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would also seed every GPU, for good
        for gpu in gpus:
            with torch.cuda.device(gpu):
                torch.cuda.manual_seed(seed)
        yield
