"""First layers that know what is missing: a hidden pixel reaches them as NaN, and no number stands in for it unasked.

Hide with `MISSING` as the fill of `masking.hide`; `isnan` of the batch is then the map of hidden pixels, and nothing
else of an encoder or of a training changes. Both layers stand in the place of a timm model's first convolution and
keep the names of its weights. A plain encoder gives NaN for such input.
Source of the rescaled one: Liu et al. 2018, arXiv:1804.07723 (partial convolutions), equation 1.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bandmask import bands

KINDS = ("plain", "rescaled", "mask-aware")
MISSING = torch.full((len(bands.NAMES),), torch.nan)  # (13,) the fill of `masking.hide` for the models made here


def rescaled(model: nn.Module) -> nn.Module:
    """A copy whose first layer answers as if the visible inputs of its window spoke for the hidden ones; no training.

    Hidden inputs are 0, and the response, bias apart, is multiplied by (inputs in the window) / (visible ones among
    them), over bands and pixels. Padding is not counted as lost. A window with nothing visible gives 0. Complete
    images give what the model gives, bit for bit.

    Args:
        model: a timm model of 13 bands; left unchanged, and no weights are shared with it.

    Raises:
        ValueError: its first layer is no plain convolution of 13 bands; names the architecture.
    """
    return _replaced(model, Rescaled)


def mask_aware(model: nn.Module, fill: Tensor) -> nn.Module:
    """A copy whose first layer learns what to put in hidden pixels, and what it means that they are hidden.

    Adds to the first layer a value per band, `fill`, and `validity.weight`, a convolution of the map of hidden pixels
    whose response is added; at zero, which is where it starts, the copy equals the model on images filled with `fill`.
    Neither acts on a complete image, whatever is learnt: as long as all else is frozen, batch norms in eval mode
    included, complete images give what the model gives, bit for bit.

    Args:
        model: a timm model of 13 bands; left unchanged, and no weights are shared with it.
        fill: reflectance to begin with, one per band (13,), such as `masking.fill_values` gives.

    Raises:
        ValueError: its first layer is no plain convolution of 13 bands; names the architecture. Or a `fill` of
            another shape, or not finite.
    """
    if fill.shape != (len(bands.NAMES),) or not fill.isfinite().all():
        raise ValueError(
            f"the fill to begin with is one finite reflectance for each of {len(bands.NAMES)} bands; got shape "
            f"{tuple(fill.shape)}, {fill.tolist() if fill.numel() <= len(bands.NAMES) else '…'}"
        )
    copied = _replaced(model, MaskAware)
    layer = first_layer(copied)
    assert isinstance(layer, MaskAware)
    layer.fill.data.copy_(fill)
    return copied


def with_first_layer(model: nn.Module, kind: str) -> nn.Module:
    """A copy with a first layer of this kind, `fill` of a mask-aware one 0: to load saved weights into.

    Raises:
        ValueError: unknown kind; lists what exists.
    """
    check_kind(kind)
    if kind == "mask-aware":
        return mask_aware(model, torch.zeros(len(bands.NAMES)))
    return rescaled(model) if kind == "rescaled" else copy.deepcopy(model)


def kind_of(model: nn.Module) -> str:
    """Which first layer a model has, one of `KINDS`; what isn't made here is plain."""
    kinds = {Rescaled: "rescaled", MaskAware: "mask-aware"}
    return next((kinds[type(module)] for module in model.modules() if type(module) in kinds), "plain")


def check_kind(kind: str) -> None:
    """A `ValueError` that lists the kinds, if there is none of that name."""
    if kind not in KINDS:
        raise ValueError(f"unknown first layer {kind!r}; available: {', '.join(KINDS)}")


def first_layer(model: nn.Module) -> nn.Conv2d:
    """The convolution that sees the image: `conv1` of a ResNet, `patch_embed.proj` of a ViT, `stem.0` of a ConvNeXt.

    Raises:
        ValueError: the model is not timm's, says of no layer that it is the first, or of one that isn't a single
            convolution of 13 bands; names the architecture.
    """
    name, path = _architecture(model), _path(model)
    layer = model.get_submodule(path)
    if not isinstance(layer, nn.Conv2d):
        raise ValueError(f"the first layer of {name}, {path}, is a {type(layer).__name__}; expected a convolution")
    if layer.in_channels != len(bands.NAMES):
        raise ValueError(
            f"the first layer of {name}, {path}, takes {layer.in_channels} bands, expected {len(bands.NAMES)}; "
            "encoders.create_encoder makes one that does"
        )
    return layer


class Rescaled(nn.Conv2d):
    """A convolution of visible inputs alone, scaled up to a full window; made by `rescaled`."""

    def forward(self, input: Tensor) -> Tensor:
        """Response (B, C, H', W') to images (B, 13, H, W), hidden pixels NaN."""
        hidden = input.isnan()
        response = super().forward(torch.where(hidden, 0.0, input))
        seen, there = self._counts(~hidden), self._counts(torch.ones_like(hidden[:1]))
        scale = there / seen.clamp(min=1)
        # (w·x + b) scale + b (1 − scale) = scale w·x + b; where nothing is hidden the convolution's own bits are kept
        result = response * scale
        if self.bias is not None:
            result = result + self.bias[:, None, None] * (1 - scale)
        return (result * (seen > 0)).to(response.dtype)

    def _counts(self, visible: Tensor) -> Tensor:
        """How many visible inputs each window holds, (B, 1, H', W')."""
        window = torch.ones(1, 1, *self.kernel_size, device=visible.device)
        with torch.autocast(visible.device.type, enabled=False):  # bfloat16 counts no further than 256
            return F.conv2d(
                visible.sum(1, keepdim=True, dtype=torch.float32),
                window,
                None,
                self.stride,
                self.padding,
                self.dilation,
            )


class MaskAware(nn.Conv2d):
    """A convolution with a learnt value per hidden band and a learnt response to what is hidden; of `mask_aware`."""

    def __init__(self, *arguments: object, **options: object) -> None:
        """As `nn.Conv2d`."""
        super().__init__(*arguments, **options)  # type: ignore[arg-type]
        self.fill = nn.Parameter(torch.zeros(self.in_channels))
        self.validity = nn.Conv2d(
            self.in_channels,
            self.out_channels,
            self.kernel_size,  # type: ignore[arg-type]
            self.stride,  # type: ignore[arg-type]
            self.padding,  # type: ignore[arg-type]
            self.dilation,  # type: ignore[arg-type]
            bias=False,
            device="meta",  # draws no random numbers
        )
        self.validity.weight = nn.Parameter(torch.zeros(self.validity.weight.shape))

    def forward(self, input: Tensor) -> Tensor:
        """Response (B, C, H', W') to images (B, 13, H, W), hidden pixels NaN."""
        hidden = input.isnan()
        filled = torch.where(hidden, self.fill.to(input.dtype)[:, None, None], input)
        return super().forward(filled) + self.validity(hidden.to(input.dtype))


def _replaced(model: nn.Module, kind: type[nn.Conv2d]) -> nn.Module:
    """A copy of the model with the same weights, its first convolution of another class."""
    layer, path = first_layer(model), _path(model)
    if type(layer) is not nn.Conv2d:
        found = kind_of(model)
        raise ValueError(
            f"the first layer of {_architecture(model)}, {path}, is a {type(layer).__name__}, no plain convolution"
            + (f"; this model is {found} already, start from the plain one" if found != "plain" else "")
        )
    if layer.groups != 1 or layer.padding_mode != "zeros" or isinstance(layer.padding, str):
        raise ValueError(
            f"the first layer of {_architecture(model)}, {path}, has groups {layer.groups}, padding {layer.padding!r} "
            f"of {layer.padding_mode}; expected one group padded with a fixed number of zeros"
        )
    copied = copy.deepcopy(model)
    old = first_layer(copied)
    new = kind(
        old.in_channels,
        old.out_channels,
        old.kernel_size,  # type: ignore[arg-type]
        old.stride,  # type: ignore[arg-type]
        old.padding,  # type: ignore[arg-type]
        old.dilation,  # type: ignore[arg-type]
        bias=old.bias is not None,
        device="meta",  # draws no random numbers
    )
    new.weight, new.bias = old.weight, old.bias
    copied.set_submodule(path, new.to(old.weight).train(old.training))
    return copied


def _path(model: nn.Module) -> str:
    path = (getattr(model, "pretrained_cfg", None) or {}).get("first_conv")
    if not isinstance(path, str):
        raise ValueError(
            f"{_architecture(model)} names no single first convolution (timm's pretrained_cfg['first_conv'] is "
            f"{path!r}); a first layer can be replaced in a ResNet, a ViT or a ConvNeXt of timm"
        )
    return path


def _architecture(model: nn.Module) -> str:
    return str((getattr(model, "pretrained_cfg", None) or {}).get("architecture") or type(model).__name__)
