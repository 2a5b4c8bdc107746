"""Mean and covariance of 13-band spectra: all that a ridge regression from any bands to any others needs.

One pass over training pixels then serves every subset of bands, where a regression of each would fit 8,191.
Source: Hoerl and Kennard 1970 (ridge regression), with an intercept that is not penalised, as scikit-learn has it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bandmask import bands
from bandmask.packs import DN_PER_REFLECTANCE, Pack
from bandmask.rows import open_rows

ALPHA = 1e-3  # ridge penalty on sums of squared reflectance


@dataclass(frozen=True)
class Moments:
    """Of spectra in reflectance, SatCLIP order, float64.

    Attributes:
        mean: (13,).
        covariance: (13, 13), divided by the number of pixels.
        pixels: how many there were.
    """

    mean: np.ndarray
    covariance: np.ndarray
    pixels: int

    @classmethod
    def of(cls, pack: Pack, *, split: str = "train", pixels: int = 200_000, seed: int = 0) -> Moments:
        """Of complete pixels drawn at random from a split; `train`, so that nothing of the test images is used."""
        draw = np.random.default_rng(seed)
        rows = np.sort(draw.permutation(pack.rows(split))[:2000])
        return cls.of_spectra(_spectra(pack, rows, pixels, draw) / DN_PER_REFLECTANCE)

    @classmethod
    def of_spectra(cls, spectra: np.ndarray) -> Moments:
        """Of reflectance (n, 13).

        Raises:
            ValueError: another shape, fewer than two pixels, or values that are not finite.
        """
        spectra = np.asarray(spectra, np.float64)
        if spectra.ndim != 2 or spectra.shape[1] != len(bands.NAMES) or len(spectra) < 2:
            raise ValueError(f"moments need spectra of {len(bands.NAMES)} bands, two or more; got {spectra.shape}")
        if not np.isfinite(spectra).all():
            raise ValueError("spectra hold NaN or infinite values; leave pixels without data out")
        mean = spectra.mean(0)
        return cls(mean, (spectra - mean).T @ (spectra - mean) / len(spectra), len(spectra))

    def regression(
        self, hidden: Sequence[int], visible: Sequence[int], alpha: float = ALPHA
    ) -> tuple[np.ndarray, np.ndarray]:
        """Ridge coefficients (k, v) and intercepts (k,) of hidden channels from visible ones; of none: the means."""
        hidden, visible = list(hidden), list(visible)
        penalised = self.covariance[np.ix_(visible, visible)] + alpha / self.pixels * np.eye(len(visible))
        weight = np.linalg.solve(penalised, self.covariance[np.ix_(visible, hidden)]).T
        return weight, self.mean[hidden] - weight @ self.mean[visible]

    def regressions(
        self, visible: np.ndarray, alpha: float = ALPHA, noise: np.ndarray | float = 0.0
    ) -> tuple[np.ndarray, np.ndarray]:
        """`regression` of all 13 bands for many patterns of visible bands at once.

        Args:
            visible: (P, 13) bool.
            alpha: ridge penalty.
            noise: variance of the errors that the visible bands are known with, (P, 13) or one for all.

        Returns:
            Coefficients (P, 13, 13), zero where a band is hidden, and intercepts (P, 13). Rows of visible bands
            predict them from themselves, up to the penalty.
        """
        seen = np.asarray(visible, float)
        # a hidden band becomes a unit of its own, so that one solver takes patterns of all sizes
        matrix = self.covariance * seen[:, :, None] * seen[:, None, :]
        matrix += np.eye(len(self.mean)) * np.where(seen > 0, alpha / self.pixels + noise, 1.0)[:, None, :]
        weight = np.linalg.solve(matrix, self.covariance * seen[:, :, None]).transpose(0, 2, 1)
        return weight, self.mean - weight @ self.mean

    def unexplained(self, visible: np.ndarray, alpha: float = ALPHA) -> np.ndarray:
        """Share of each band's variance that ridge regression from the visible ones leaves, (P, 13), from 0 to 1.

        Args:
            visible: patterns, (P, 13) bool; a visible band leaves 0.
            alpha: ridge penalty.
        """
        weight, _ = self.regressions(visible, alpha)
        explained = 2 * np.einsum("pij,ij->pi", weight, self.covariance)
        explained -= np.einsum("pij,jk,pik->pi", weight, self.covariance, weight)
        left = 1 - explained / np.diag(self.covariance).clip(1e-300)
        return np.where(visible, 0.0, left.clip(0, 1))


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
