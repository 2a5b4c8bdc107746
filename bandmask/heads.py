"""What stands on a frozen encoder: a map, the thesis' scene MLP, DeepLabV3+ for a class of every pixel; safe loading.

DeepLabV3+ is written to the papers, Chen et al. 2017 (DeepLabV3, arXiv:1706.05587) and 2018 (DeepLabV3+,
arXiv:1802.02611). Its layers are named as in the published DFC2020 checkpoint (Schmitt et al. 2020), which loads.
"""

import contextlib
import hashlib
import warnings
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bandmask import files

HIDDEN = 64  # units between an embedding and its classes (thesis §3.2.2)
RATES = (1, 6, 12, 18)  # of the pyramid's atrous convolutions at an output stride of 16 (DeepLabV3 §3.3)
_LAST = "decoder.last_conv.8"


def scene_head(embedding_dim: int, classes: int, *, seed: int = 0) -> nn.Sequential:
    """The thesis' MLP, D → 64 → classes with ReLU (§3.2.2); initial weights depend on `seed` alone."""
    with _drawing_from(seed):
        return nn.Sequential(nn.Linear(embedding_dim, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, classes))


def with_map(encoder: nn.Module, incomplete: Tensor, complete: Tensor) -> nn.Module:
    """The encoder, and a map behind it that carries its embeddings of incomplete images to complete ones.

    Fitted to embeddings (N, D) of the same training images by ridge regression on them and on how near they lie to up
    to 1,000 of their own (a Gaussian kernel; Nyström), in closed form: no label is needed, and no step of training. The
    penalty is found by leave-one-out. There is no feature map behind it. A ValueError of what are no such embeddings.
    """
    from sklearn.kernel_approximation import Nystroem
    from sklearn.linear_model import RidgeCV

    x, y = (torch.as_tensor(part).double().cpu().numpy() for part in (incomplete, complete))
    if x.ndim != 2 or x.shape != y.shape or len(x) < 2 or not (np.isfinite(x) & np.isfinite(y)).all():
        raise ValueError(f"a map takes finite embeddings (N, D) of the same 2 images or more; got {x.shape}, {y.shape}")
    mean, sd = x.mean(0), x.std(0)
    sd = np.where(sd > 1e-6 * sd.max(), sd, sd.max() or 1) * x.shape[1] ** 0.5  # two images are about √2 apart
    z = (x - mean) / sd
    kernel = Nystroem(gamma=1.0, n_components=min(len(z), 1000), random_state=0).fit(z)
    found = RidgeCV(np.logspace(-4, 3, 15)).fit(np.hstack([z, kernel.transform(z)]), y)
    linear, near = np.split(found.coef_.T, [x.shape[1]])
    if not -found.best_score_ < np.square(x - y).mean():  # left out, each image lies as far away as without a map
        warnings.warn(f"a map of {len(x)} images brings embeddings no nearer to complete ones: give more", stacklevel=2)
    parts = {"mean": mean, "sd": sd, "linear": linear, "bias": found.intercept_, "anchors": kernel.components_}
    parts |= {"near": kernel.normalization_.T @ near}
    carry = _Map({name: torch.from_numpy(part) for name, part in parts.items()})
    return nn.Sequential(encoder, carry).to(getattr(incomplete, "device", "cpu")).eval()


class _Map(nn.Module):
    """Embeddings (B, D) in, those of complete images out; in double, since what is near weighs much and cancels."""

    def __init__(self, parts: Mapping[str, Tensor]) -> None:
        super().__init__()
        for name, part in parts.items():
            self.register_buffer(name, part)

    def forward(self, embeddings: Tensor) -> Tensor:
        of = dict(self.named_buffers())
        z = (embeddings.double() - of["mean"]) / of["sd"]
        near = torch.exp(-torch.cdist(z, of["anchors"]).square())
        return (z @ of["linear"] + near @ of["near"] + of["bias"]).to(embeddings.dtype)


class SceneHeads(nn.Module):
    """The heads of several seeds as one module: one pass trains them all, each as if it were alone.

    The sum of their losses has independent gradients, and Adam works element by element.
    """

    def __init__(self, embedding_dim: int, classes: int, seeds: Sequence[int]) -> None:
        """One head a seed, initialised as `scene_head` does."""
        super().__init__()
        self.seeds = tuple(seeds)
        heads = [[*scene_head(embedding_dim, classes, seed=seed).parameters()] for seed in seeds]
        weight1, bias1, weight2, bias2 = (torch.stack(own).detach() for own in zip(*heads, strict=True))
        self.weight1, self.bias1 = nn.Parameter(weight1.mT.contiguous()), nn.Parameter(bias1[:, None])  # (K, D, hidden)
        self.weight2, self.bias2 = nn.Parameter(weight2.mT.contiguous()), nn.Parameter(bias2[:, None])  # (K, hidden, C)

    def forward(self, embeddings: Tensor) -> Tensor:
        """Logits (K, N, C) of embeddings (N, D), shared by all heads, or (K, N, D), one batch a head."""
        if embeddings.ndim == 2:
            embeddings = embeddings.expand(len(self.weight1), -1, -1)
        hidden = torch.relu(torch.baddbmm(self.bias1, embeddings, self.weight1))  # (K, N, hidden)
        return torch.baddbmm(self.bias2, hidden, self.weight2)  # (K, N, C)


class _Pyramid(nn.Module):
    """Atrous spatial pyramid pooling: four rates and the image's mean, side by side (DeepLabV3 §3.3)."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        convs = [_conv(channels, width, 1 if rate == 1 else 3, rate) for rate in RATES]  # atrous, the first 1 × 1
        parts = [OrderedDict(atrous_conv=conv, bn=nn.BatchNorm2d(width), relu=nn.ReLU(inplace=True)) for conv in convs]
        self.aspp1, self.aspp2, self.aspp3, self.aspp4 = map(nn.Sequential, parts)
        self.global_avg_pool = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), _conv(channels, width, 1), nn.BatchNorm2d(width), nn.ReLU(inplace=True)
        )
        self.conv1 = _conv(5 * width, width, 1)
        self.bn1 = nn.BatchNorm2d(width)
        self.dropout = nn.Dropout(0.5)

    def forward(self, high: Tensor) -> Tensor:
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

    def __init__(self, high_channels: int = 2048, low_channels: int = 256, classes: int = 10, width: int = 256) -> None:
        """`width`: channels in the pyramid's branches and the last convolutions."""
        super().__init__()
        self.aspp = _Pyramid(high_channels, width)
        self.decoder = _Refinement(low_channels, classes, width, low_width=48)

    def forward(self, low: Tensor, high: Tensor, size: tuple[int, int]) -> Tensor:
        """Logits (B, classes, *size). Training takes two images or more: drop a last batch of one.

        `low` is a shallow feature map, (B, Cl, S/4, S/4), `high` a deep one, (B, Ch, S/32, S/32), brought to S/16 if it
        is smaller.
        """
        height, width = (-(-side // 4) for side in low.shape[-2:])  # S/16, rounded up as strided convolutions do
        if high.shape[-2] < height or high.shape[-1] < width:
            high = _resize(high, (height, width))
        return _resize(self.decoder(self.aspp(high), low), size)


class SegmentationDecoders(nn.Module):
    """The decoders of several seeds, which one pass of the encoder trains, each as if it were alone.

    Each draws its dropout from (its seed, number of training steps done), not from torch's generator: it gets the
    weights that it gets alone, to the bit on a CPU, and on CUDA as far as torch's kernels are deterministic. The number
    is in the state dict, so a resumed run draws what an uninterrupted one does. It changes each step: don't
    `torch.compile` this.
    """

    def __init__(self, decoders: Sequence[DeepLabV3PlusDecoder], seeds: Sequence[int]) -> None:
        """Different decoders of the same classes, trained in place, and the seed of each one's dropout."""
        super().__init__()
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


def create_decoder(
    high_channels: int, low_channels: int, classes: int, *, width: int = 256, seed: int = 0
) -> DeepLabV3PlusDecoder:
    """A fresh decoder whose weights depend on `seed` alone: He's normal for convolutions (He et al. 2015, eq. 10)."""
    with _drawing_from(seed):
        return DeepLabV3PlusDecoder(high_channels, low_channels, classes, width).apply(_he_normal)


def load_decoder(weights: Path | str, *, classes: int = 10, seed: int = 0) -> tuple[DeepLabV3PlusDecoder, str]:
    """The decoder of the published DFC2020 checkpoint, and a sentence on what became of its last layer.

    The file is what the README of github.com/lukasliebel/dfc2020_baseline links as "DeepLabv3+ S2". A last layer of
    another number of `classes` is replaced by a fresh one of this `seed`. A ValueError where it is damaged, no such
    checkpoint, or keys are missing, extra or wrongly shaped.
    """
    checkpoint = read_checkpoint(weights)
    state = checkpoint.get("model_state_dict")
    if not isinstance(state, dict):
        found = sorted(map(str, checkpoint))[:8]
        raise ValueError(f"{weights} is no DFC2020 checkpoint: it has no 'model_state_dict', but {found}")
    own = {name: tensor for name, tensor in state.items() if not name.startswith("backbone.")}
    outputs = len(own[f"{_LAST}.bias"]) if f"{_LAST}.bias" in own else classes
    with torch.device("meta"):  # its initial weights would only be overwritten
        decoder = DeepLabV3PlusDecoder(classes=outputs)
    load_checked(decoder.to_empty(device="cpu"), own, str(weights))
    if outputs == classes:
        return decoder, f"{_LAST} gives {outputs} classes, as many as this task has: kept"
    with _drawing_from(seed):
        decoder.decoder.last_conv[8] = nn.Conv2d(own[f"{_LAST}.weight"].shape[1], classes, 1).apply(_he_normal)
    return decoder, f"{_LAST} gave {outputs} classes, this task has {classes}: replaced by a fresh one (seed {seed})"


def read_checkpoint(path: Path | str) -> dict[str, Any]:
    """What `torch.save` wrote, as tensors and plain values: no code in it runs.

    A ValueError where it is damaged, holds Python objects, or no dictionary.
    """
    path = files.require(path, "check the path given as weights")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged bytes make torch raise many kinds
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        said = f"{path} is damaged, or holds Python objects, which could run any code and are not loaded ({reason})"
        raise ValueError(f"{said}; fetch it again, or save its tensors alone") from error
    if not isinstance(checkpoint, dict):
        raise ValueError(f"{path} holds a {type(checkpoint).__name__}, expected a dictionary of tensors")
    return checkpoint


def load_checked(model: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Load a state dict of which every key must fit and every value be finite; a ValueError names what doesn't."""
    try:
        model.load_state_dict(dict(state))
    except (RuntimeError, TypeError, AttributeError) as error:
        lines = [line.strip()[:300] for line in str(error).splitlines()[1:13]] or [str(error)]
        raise ValueError(f"{source} doesn't fit {type(model).__name__}: {' '.join(lines)}") from error
    check_finite(model.state_dict(), source)


def check_finite(state: Mapping[str, Tensor], source: str) -> None:
    """A ValueError that names the weights which are NaN or infinite, if there are any."""
    if spoilt := [name for name, value in state.items() if not value.isfinite().all()]:
        raise ValueError(f"{source} holds NaN or infinite weights in {', '.join(spoilt[:12])}; make or fetch it again")


def _resize(maps: Tensor, size: Sequence[int]) -> Tensor:
    return F.interpolate(maps, size=tuple(size), mode="bilinear", align_corners=True)


def _conv(inputs: int, outputs: int, kernel: int, rate: int = 1) -> nn.Conv2d:
    """A convolution that keeps the size; batch norm follows, so it has no bias."""
    return nn.Conv2d(inputs, outputs, kernel, padding=rate * (kernel // 2), dilation=rate, bias=False)


def _he_normal(layer: nn.Module) -> None:
    if isinstance(layer, nn.Conv2d):
        nn.init.kaiming_normal_(layer.weight)


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
