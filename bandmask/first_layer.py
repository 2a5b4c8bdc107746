"""What marks hidden pixels for an encoder that takes gaps as NaN, and timm's first convolution; moves when 08 does."""

from __future__ import annotations

import torch
from torch import nn

from bandmask import bands

MISSING = torch.full((len(bands.NAMES),), torch.nan)  # (13,) a fill of `masking.hide`


def first_layer(model: nn.Module) -> nn.Conv2d:
    """The convolution that sees the image: `conv1` of a ResNet, `patch_embed.proj` of a ViT, `stem.0` of a ConvNeXt."""
    layer = model.get_submodule(model.pretrained_cfg["first_conv"])  # type: ignore[index,arg-type]
    assert isinstance(layer, nn.Conv2d)
    return layer
