"""What can be put in the place of hidden pixels for free: the rival that no table leaves out."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from bandmask import bands
from bandmask.packs import DN_PER_REFLECTANCE, Pack
from bandmask.rows import open_rows


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
        spectra = _spectra(pack, np.sort(draw.permutation(rows)[:2000]), pixels, draw) / DN_PER_REFLECTANCE
        model = Ridge(alpha=alpha).fit(spectra[:, visible], spectra[:, hidden])
        weight = torch.tensor(np.atleast_2d(model.coef_), dtype=torch.float32)
        bias = torch.tensor(np.atleast_1d(model.intercept_), dtype=torch.float32)
        return cls(hidden_bands, weight, bias)

    def __call__(self, images: Tensor, hidden: Tensor) -> Tensor:
        """Predicted reflectance of the hidden bands, (B, k, H, W); reads only the visible bands of `images`."""
        weight, bias = self.weight.to(images), self.bias.to(images)
        return torch.einsum("kv,bvhw->bkhw", weight, images[:, self.visible]) + bias[:, None, None]


def _spectra(pack: Pack, rows: np.ndarray, pixels: int, draw: np.random.Generator) -> np.ndarray:
    """DN of pixels drawn at random from these images, (pixels, 13); one image at a time is in memory."""
    images, _ = open_rows(pack)
    image = np.empty((1, *pack.images.shape[1:]), pack.images.dtype)
    size = image[0, 0].size
    drawn = draw.permutation(len(rows) * size)[:pixels]
    order = np.argsort(drawn, kind="stable")
    spectra = np.empty((len(drawn), len(bands.NAMES)), image.dtype)
    ends = np.searchsorted(drawn[order], size * np.arange(1, len(rows)))  # of the pixels of each image
    for row, places in zip(rows, np.split(order, ends), strict=True):
        images.read(row[None], image)
        spectra[places] = image[0].reshape(len(bands.NAMES), size).T[drawn[places] % size]
    return spectra
