"""What can be put in the place of hidden pixels for free: the rivals that no table leaves out.

Each is a `fill` of `masking.hide`: a function of a batch whose hidden pixels are zeroed, and of which pixels those are.
None of them knows the task or needs an encoder; all are fitted in about a second on training pixels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bandmask import bands
from bandmask.moments import ALPHA, Moments
from bandmask.packs import Pack


class RidgeFill:
    """Per-pixel ridge regression: each hidden band from the bands that are visible everywhere."""

    def __init__(self, hidden_bands: Sequence[str], weight: Tensor, bias: Tensor) -> None:
        """From coefficients (k, 13 − k) and intercepts (k,) in reflectance, k in SatCLIP order."""
        self.bands = bands.parse_bands(hidden_bands)
        hidden = bands.channel_indices(self.bands)
        self.visible = [c for c in range(len(bands.NAMES)) if c not in hidden]
        self.weight, self.bias = weight, bias

    @classmethod
    def fit(
        cls,
        pack: Pack,
        hidden_bands: Sequence[str],
        *,
        split: str = "train",
        pixels: int = 200_000,
        alpha: float = ALPHA,
        seed: int = 0,
    ) -> RidgeFill:
        """Fit on complete pixels of a split.

        Args:
            pack: where they come from.
            hidden_bands: ESA names of the bands to predict.
            split: `train`, so that nothing of the test images is used.
            pixels: number of pixels drawn at random.
            alpha: ridge penalty, on reflectance.
            seed: of the draw.

        Raises:
            ValueError: no band is hidden, or none is left to predict from.
        """
        return cls.of(Moments.of(pack, split=split, pixels=pixels, seed=seed), hidden_bands, alpha=alpha)

    @classmethod
    def of(cls, moments: Moments, hidden_bands: Sequence[str], *, alpha: float = ALPHA) -> RidgeFill:
        """From the moments of training spectra.

        Raises:
            ValueError: no band is hidden, or none is left to predict from.
        """
        names = bands.parse_bands(hidden_bands)  # in a mask's order, so that no two are swapped
        hidden = bands.channel_indices(names)
        if not 0 < len(hidden) < len(bands.NAMES):
            raise ValueError(f"ridge imputation needs hidden and visible bands; {len(hidden)} of 13 are hidden")
        visible = [c for c in range(len(bands.NAMES)) if c not in hidden]
        weight, bias = moments.regression(hidden, visible, alpha)
        return cls(names, torch.tensor(weight, dtype=torch.float32), torch.tensor(bias, dtype=torch.float32))

    def __call__(self, images: Tensor, hidden: Tensor) -> Tensor:
        """Predicted reflectance of the hidden bands, (B, k, H, W); reads only the visible bands of `images`."""
        weight, bias = self.weight.to(images), self.bias.to(images)
        with torch.autocast(images.device.type, enabled=False):  # bfloat16 holds three digits of reflectance
            return torch.einsum("kv,bvhw->bkhw", weight, images[:, self.visible]) + bias[:, None, None]
