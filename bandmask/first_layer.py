"""What marks hidden pixels for an encoder that takes gaps as NaN; moves to `any_band`."""

import torch

from bandmask import bands

MISSING = torch.full((len(bands.NAMES),), torch.nan)  # (13,) a fill of `masks.hide`
