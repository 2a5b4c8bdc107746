"""What can be put in the place of hidden pixels for free: the rivals that no table leaves out.

Each is a `fill` of `masking.hide`: a function of a batch whose hidden pixels are zeroed, and of which pixels those are.
None of them knows the task or needs an encoder; all are fitted in about a second on training pixels.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
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


class AnyRidge:
    """Per-pixel ridge regression from whatever is visible at that very pixel: one fill for every loss.

    Regressions are solved as patterns of visible bands turn up, at most 8,192 of them, and kept. Where nothing is
    visible at a pixel it gives the bands' means.
    """

    def __init__(self, moments: Moments, hidden_bands: Sequence[str] = bands.NAMES, *, alpha: float = ALPHA) -> None:
        """Of training spectra, for masks of these bands."""
        self.moments, self.alpha = moments, alpha
        self.bands = bands.parse_bands(hidden_bands)
        self.channels = bands.channel_indices(self.bands)
        # decides what is filled in, so it is what `training.fill_checksum` sees
        self.statistics = torch.tensor(np.vstack([moments.mean, moments.covariance]))
        self._known: dict[int, tuple[Tensor, Tensor]] = {}
        # by pattern, as they turn up; no tensor, because it decides nothing that `training.fill_checksum` should see
        self._unknown = np.full(1 << len(bands.NAMES), np.nan, np.float32)

    def unexplained(self, hidden: Tensor) -> Tensor:
        """How much of each image the regressions can't tell, (B,): 0 for a complete one, 1 if nothing is visible.

        The share of a band's variance over training spectra that the visible bands don't explain, mean over bands and
        pixels; a visible band counts as 0.

        Args:
            hidden: (B, k, H, W) bool, True = hidden.
        """
        codes = self._codes(hidden)
        # counted, not sorted: sorting the pixels takes longer on a CPU than all the rest
        there = torch.bincount(codes.flatten(), minlength=len(self._unknown)).nonzero().squeeze(1).cpu().numpy()
        new = there[np.isnan(self._unknown[there])]
        if len(new):
            self._unknown[new] = self.moments.unexplained(_visible(new), self.alpha).mean(1)
        return torch.from_numpy(self._unknown).to(codes.device)[codes].flatten(1).mean(1)

    def _codes(self, hidden: Tensor) -> Tensor:
        """Which bands each pixel has lost, as bits of an integer, (B, H, W)."""
        bits = torch.tensor([1 << channel for channel in self.channels], device=hidden.device)
        return (hidden * bits[:, None, None]).sum(1)

    def __call__(self, images: Tensor, hidden: Tensor) -> Tensor:
        """Predicted reflectance of the masks' bands, (B, k, H, W), right where `hidden`; elsewhere meaningless."""
        codes = self._codes(hidden).flatten()  # (BHW,)
        order = _by_pattern(codes)
        patterns, counts = torch.unique_consecutive(codes[order], return_counts=True)
        self._solve(patterns.tolist())
        spectra = images.movedim(1, -1).reshape(-1, len(bands.NAMES))[order]  # pixels of one pattern side by side
        filled = torch.empty(len(spectra), len(self.channels), dtype=images.dtype, device=images.device)
        start = 0
        for pattern, count in zip(patterns.tolist(), counts.tolist(), strict=True):
            weight, bias = self._known[pattern]
            part = slice(start, start + count)
            if pattern:
                with torch.autocast(images.device.type, enabled=False):
                    filled[part] = torch.addmm(bias.to(images), spectra[part], weight.to(images))
            start += count
        result = torch.empty_like(filled)
        result[order] = filled
        shape = images.shape[0], *images.shape[-2:], len(self.channels)
        return result.view(shape).movedim(-1, 1)

    def _solve(self, patterns: Sequence[int]) -> None:
        new = [pattern for pattern in patterns if pattern not in self._known]
        if new:
            weights, biases = self.moments.regressions(_visible(new), self.alpha)
            for pattern, weight, bias in zip(new, weights[:, self.channels], biases[:, self.channels], strict=True):
                transposed = torch.tensor(weight.T.copy(), dtype=torch.float32)  # (13, k)
                self._known[pattern] = transposed, torch.tensor(bias, dtype=torch.float32)


def _visible(patterns: Sequence[int] | np.ndarray) -> np.ndarray:
    """(P, 13) bool from bits of what is hidden."""
    return (np.array(patterns)[:, None] >> np.arange(len(bands.NAMES)) & 1) == 0


def _by_pattern(codes: Tensor) -> Tensor:
    """Positions of the codes in ascending order; NumPy's radix sort takes a fortieth of torch's time on a CPU."""
    if codes.device.type != "cpu":
        return codes.argsort()
    return torch.from_numpy(np.argsort(codes.numpy().astype(np.uint16), kind="stable"))
