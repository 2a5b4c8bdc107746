"""What can be put in the place of hidden pixels for free: the rival that no table leaves out."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from bandmask import bands
from bandmask.packs import DN_PER_REFLECTANCE, Pack


class RidgeFill:
    """Per-pixel ridge regression: each hidden band from the bands that are visible everywhere.

    It is fitted in about a second on training pixels, knows nothing of the task, and needs no encoder. Use it as
    the `fill` of `masking.hide`.
    """

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
        alpha: float = 1e-3,
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
        from sklearn.linear_model import Ridge

        hidden_bands = bands.parse_bands(hidden_bands)  # in a mask's order, so that no two are swapped
        hidden = bands.channel_indices(hidden_bands)
        if not 0 < len(hidden) < len(bands.NAMES):
            raise ValueError(f"ridge imputation needs hidden and visible bands; {len(hidden)} of 13 are hidden")
        visible = [c for c in range(len(bands.NAMES)) if c not in hidden]
        draw = np.random.default_rng(seed)
        rows = pack.rows(split)
        images = np.asarray(pack.images[np.sort(draw.permutation(rows)[:2000])])  # bounds memory on large packs
        spectra = images.transpose(0, 2, 3, 1).reshape(-1, len(bands.NAMES)) / DN_PER_REFLECTANCE
        spectra = spectra[draw.permutation(len(spectra))[:pixels]]
        model = Ridge(alpha=alpha).fit(spectra[:, visible], spectra[:, hidden])
        weight = torch.tensor(np.atleast_2d(model.coef_), dtype=torch.float32)
        bias = torch.tensor(np.atleast_1d(model.intercept_), dtype=torch.float32)
        return cls(hidden_bands, weight, bias)

    def __call__(self, images: Tensor, hidden: Tensor) -> Tensor:
        """Predicted reflectance of the hidden bands, (B, k, H, W); reads only the visible bands of `images`."""
        weight, bias = self.weight.to(images), self.bias.to(images)
        return torch.einsum("kv,bvhw->bkhw", weight, images[:, self.visible]) + bias[:, None, None]
