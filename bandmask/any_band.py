"""One encoder for every loss: trained on masks drawn anew for each image, and used on images with gaps as they come.

The gaps are filled by ridge regression from what is visible at that very pixel, and the encoder is aligned on top. So
it begins as the pre-trained encoder behind the best free fill, and training can only add to that.
"""

from __future__ import annotations

import zipfile
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from bandmask import bands, encoders, files
from bandmask.draws import AnyMask
from bandmask.imputation import AnyRidge
from bandmask.moments import Moments
from bandmask.objectives import Objective

# Chosen on validation images of EuroSAT (docs/findings.md). A distance alone leaves images alike that the contrast
# tells apart; the contrast alone leaves an embedding's length free, and a head in service depends on it.
OBJECTIVE = Objective(clip=0.1, distance=1.0)
MOMENTS = "moments.npz"  # beside model.safetensors: what the fill is made from


class AnyBandEncoder(nn.Module):
    """Embeds reflectance in which gaps are NaN: whole bands, stripes, single pixels, or none at all."""

    def __init__(self, encoder: nn.Module, moments: Moments) -> None:
        """From an encoder that was aligned behind `AnyRidge`, and the moments of the spectra it was trained on."""
        super().__init__()
        self.encoder, self.fill = encoder, AnyRidge(moments)

    def forward(self, images: Tensor) -> Tensor:
        """Embeddings (B, D) of reflectance (B, 13, S, S) in SatCLIP order, NaN = missing.

        Raises:
            ValueError: not 13 bands, or an image without a single value.
        """
        if images.ndim != 4 or images.shape[1] != len(bands.NAMES):
            raise ValueError(
                f"images are (B, 13, S, S), NaN where missing, in the order {', '.join(bands.NAMES)}; "
                f"got {tuple(images.shape)}"
            )
        hidden = images.isnan()
        if hidden.flatten(1).all(1).any():
            raise ValueError("an image has no value in any band: nothing can be said of it; leave it out")
        visible = images.masked_fill(hidden, 0)
        return self.encoder(torch.where(hidden, self.fill(visible, hidden), visible))


def save(encoder: nn.Module, card: encoders.Card, mask: AnyMask, moments: Moments, path: Path | str) -> Path:
    """Write encoder, card and moments into a folder, whole or not at all; `load` reads it."""
    with files.writing(path) as partial:
        encoders.save_encoder(encoder, replace(card, mask=asdict(mask)), partial)
        np.savez(partial / MOMENTS, mean=moments.mean, covariance=moments.covariance, pixels=moments.pixels)
    return Path(path)


def load(path: Path | str) -> tuple[AnyBandEncoder, encoders.Card]:
    """An encoder that takes images with gaps, in eval mode, and its card.

    Raises:
        FileNotFoundError: no such folder, or an encoder for one mask, which has no moments.
        ValueError: a damaged file.
    """
    model, card = encoders.load_encoder(path)
    return AnyBandEncoder(model, load_moments(path)).eval(), card


def load_moments(path: Path | str) -> Moments:
    """Moments of the training spectra, from a folder that `save` wrote; raises as `load` does."""
    file = files.require(Path(path) / MOMENTS, "notebooks/08_any_band_encoder.ipynb makes encoders for every loss")
    try:
        with np.load(file) as stored:
            return Moments(stored["mean"], stored["covariance"], int(stored["pixels"]))
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise ValueError(f"{file} is damaged ({error}); run the notebook again") from error
