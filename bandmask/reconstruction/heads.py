"""Hidden pixels from what an encoder sees around them: a light head that corrects ridge imputation.

An incomplete image is filled by ridge regression with a local correction (`fills`). The head adds to that, from the
encoder's feature maps of the filled image, the filled image itself and which of its pixels are made up. Its last layer
begins at zero: an untrained head is ridge imputation, and a trained one is judged by what it adds to it. As a `fill` of
`masking.hide` it stands wherever ridge imputation does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bandmask import bands
from bandmask.encoders import embed
from bandmask.fills import RidgeLocalFill, all_bands
from bandmask.masking import Mask
from bandmask.moments import Moments
from bandmask.packs import DN_PER_REFLECTANCE
from bandmask.training import Compute, weights_checksum
from bandmask.views import TAPS

SMALLEST_SD = 1 / DN_PER_REFLECTANCE  # a band that never changes (B10 of L2A is 0) must not divide by zero
SMALLEST_VARIANCE = 1e-3  # of a direction of spectra, in the units of their correlation: below lies noise
FARTHEST = 5.0  # SDs from the mean that a head sees, in any direction: beyond (roofs, clouds) ridge alone extrapolates


class ReconstructionHead(nn.Module):
    """Filled image, hidden pixels and feature maps to a correction of each band, at full resolution."""

    def __init__(self, channels: Sequence[int], *, width: int = 32, seed: int = 0) -> None:
        """Weights depend on `seed` alone; the last layer is zero.

        Args:
            channels: of the feature maps, shallow to deep; none for a head without an encoder.
            width: channels inside.
            seed: of the weights.
        """
        super().__init__()
        count = len(bands.NAMES)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.pixel = nn.Conv2d(2 * count, width, 1)
            # group norm: encoders differ in the scale of their maps by orders of magnitude
            self.maps = nn.ModuleList(
                nn.Sequential(nn.GroupNorm(1, size), nn.Conv2d(size, width, 1, bias=False)) for size in channels
            )
            # before the ReLU, so that a weighted mean of what is known around a pixel can pass
            self.around = nn.Conv2d(width, width, 5, padding=2, groups=width)
            self.mix = nn.Conv2d(2 * width, width, 1)
            self.last = nn.Conv2d(width, count, 1)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)  # type: ignore[arg-type]  # there is one

    def forward(self, spectra: Tensor, hidden: Tensor, maps: Sequence[Tensor]) -> Tensor:
        """Corrections in SDs of each band, (B, 13, H, W).

        Args:
            spectra: the filled image, whitened, (B, 13, H, W).
            hidden: (B, 13, H, W) bool.
            maps: from the encoder, in the order of `channels`.
        """
        # channels-last: two to three times as fast on CPUs too, with channels this few
        seen = torch.cat([spectra, hidden.to(spectra.dtype)], 1).contiguous(memory_format=torch.channels_last)
        x, context = self.pixel(seen), None
        for reduce, found in zip(reversed(self.maps), reversed(maps), strict=True):
            reduced = reduce(found)  # deep to shallow, so that only the last step is at full resolution
            context = reduced if context is None else reduced + _resized(context, reduced)
        if context is not None:
            x = x + _resized(context, x)
        mixed = self.mix(F.relu(torch.cat([x, self.around(x)], 1)))
        return self.last(F.relu(mixed))


class ReconstructionHeads(nn.Module):
    """Heads of several seeds on the same images, with the statistics that they need."""

    def __init__(
        self, moments: Moments, channels: Sequence[int], seeds: Sequence[int] = (0, 1, 2), *, width: int = 32
    ) -> None:
        """Of training spectra, for feature maps of these channels; a head a seed.

        Raises:
            ValueError: no seed.
        """
        super().__init__()
        if not seeds:
            raise ValueError("give at least one seed: each makes a head")
        self.seeds = tuple(seeds)
        self.heads = nn.ModuleList(ReconstructionHead(channels, width=width, seed=seed) for seed in seeds)
        sd = band_sd(moments)
        self.register_buffer("mean", torch.tensor(moments.mean, dtype=torch.float32))
        self.register_buffer("sd", torch.tensor(sd, dtype=torch.float32))
        self.register_buffer("whitening", torch.tensor(_whitening(moments, sd), dtype=torch.float32))

    def forward(self, filled: Tensor, hidden: Tensor, maps: Sequence[Tensor]) -> Tensor:
        """Corrections in SDs of each band, (K, B, 13, H, W), K heads.

        Bands are so much alike that their differences, which tell most about a hidden one, are a hundredth of their
        variance: the heads see whitened spectra, in which all directions count alike.
        """
        centred = filled - self.mean[:, None, None]  # type: ignore[index]
        spectra = torch.einsum("cd,bdhw->bchw", self.whitening, centred).clamp(-FARTHEST, FARTHEST)
        return torch.stack([head(spectra, hidden, maps) for head in self.heads])


@dataclass(frozen=True)
class Reconstruction:
    """Heads, the frozen encoder they look through (None: they have none), and the ridge regression they correct."""

    encoder: nn.Module | None
    heads: ReconstructionHeads
    ridge: RidgeLocalFill
    taps: tuple[str, ...] = TAPS
    compute: Compute = field(default_factory=lambda: Compute.of("cpu"))

    @classmethod
    def of(
        cls,
        encoder: nn.Module | None,
        moments: Moments,
        *,
        seeds: Sequence[int] = (0, 1, 2),
        width: int = 32,
        taps: Sequence[str] = TAPS,
        compute: Compute | None = None,
    ) -> Reconstruction:
        """Untrained, which is ridge imputation.

        Args:
            encoder: a timm model that has the taps, or None for heads that see the filled image alone: the control
                that tells what the encoder adds.
            moments: of training spectra in reflectance.
            seeds: a head each.
            width: channels inside a head.
            taps: timm's module names, shallow to deep.
            compute: device and precision.

        Raises:
            ValueError: no seed, or the encoder lacks a tap; lists what it has.
        """
        compute, taps = compute or Compute.of("cpu"), tuple(taps) if encoder is not None else ()
        maps = _maps(encoder, torch.zeros(1, len(bands.NAMES), 64, 64, device=compute.device), taps, compute)
        heads = ReconstructionHeads(moments, [found.shape[1] for found in maps], seeds, width=width)
        return cls(encoder, heads.to(compute.device).eval(), RidgeLocalFill(moments), taps, compute)

    def filled(self, images: Tensor, hidden: Tensor) -> Tensor:
        """Ridge imputation, (B, 13, H, W): `images` where visible; what they hold in hidden pixels is not read.

        Args:
            images: reflectance, (B, 13, H, W).
            hidden: (B, 13, H, W) bool.
        """
        visible = images.masked_fill(hidden, 0)
        return torch.where(hidden, self.ridge(visible, hidden), visible)

    def corrections(self, filled: Tensor, hidden: Tensor) -> Tensor:
        """What the heads add to a filled image, in SDs of each band, (K, B, 13, H, W); the encoder has no gradient."""
        maps = _maps(self.encoder, filled, self.taps, self.compute)
        with self.compute.autocast():
            return self.heads(self.compute.images(filled), hidden, maps).float()

    @torch.no_grad()
    def __call__(self, images: Tensor, hidden: Tensor) -> Tensor:
        """Reconstructed reflectance by each head, (K, B, 13, H, W); visible pixels are as they were.

        Args:
            images: reflectance, (B, 13, H, W); what they hold in hidden pixels is not read.
            hidden: (B, 13, H, W) bool, True = hidden.
        """
        return self.corrected(self.filled(images, hidden), hidden)

    @torch.no_grad()
    def corrected(self, filled: Tensor, hidden: Tensor) -> Tensor:
        """A filled image (B, 13, H, W) with its hidden pixels corrected by each head, (K, B, 13, H, W)."""
        better = filled + self.corrections(filled, hidden) * self.heads.sd[:, None, None]  # type: ignore[index]
        return torch.where(hidden, better, filled)

    def fill(self, mask: Mask, head: int = 0) -> HeadFill:
        """One head as a `fill` of `masking.hide` for the bands of a mask."""
        return HeadFill(self, mask.bands, head)

    def fills(self, mask: Mask) -> list[HeadFill]:
        """Every head as a `fill`, in the order of its seeds."""
        return [self.fill(mask, head) for head in range(len(self.heads.seeds))]


class HeadFill:
    """A head in the place of ridge imputation: predicts hidden pixels of some bands for `masking.hide`."""

    def __init__(self, reconstruction: Reconstruction, hidden_bands: Sequence[str], head: int = 0) -> None:
        """One head, counted from 0, for masks of these bands."""
        heads = reconstruction.heads
        self.bands = bands.parse_bands(hidden_bands)
        self.channels = bands.channel_indices(self.bands)
        self._ridge = RidgeLocalFill(reconstruction.ridge.moments, self.bands)
        alone = ReconstructionHeads(reconstruction.ridge.moments, (), heads.seeds[head : head + 1])
        alone.heads = nn.ModuleList([heads.heads[head]])
        self._reconstruction = replace(reconstruction, heads=alone.to(heads.sd.device).eval())  # type: ignore[arg-type]
        # decides what is filled in, so it is what `training.fill_checksum` sees
        marks = [weights_checksum(model) for model in (alone, reconstruction.encoder) if model is not None]
        self.weights_checksum = torch.tensor(list(bytes.fromhex("".join(marks))))

    def __call__(self, images: Tensor, hidden: Tensor) -> Tensor:
        """Predicted reflectance of the mask's bands, (B, k, H, W)."""
        filled = images.clone()
        filled[:, self.channels] = torch.where(hidden, self._ridge(images, hidden), images[:, self.channels])
        return self._reconstruction.corrected(filled, all_bands(hidden, self.channels))[0][:, self.channels]


def band_sd(moments: Moments) -> np.ndarray:
    """SD of each band over training pixels, (13,), not below one DN."""
    return np.sqrt(np.diag(moments.covariance)).clip(SMALLEST_SD)


@torch.no_grad()
def _maps(encoder: nn.Module | None, images: Tensor, taps: Sequence[str], compute: Compute) -> list[Tensor]:
    """The encoder's feature maps, shallow to deep; none of no encoder."""
    if encoder is None:
        return []
    with compute.autocast():
        _, found = embed(compute.place(encoder).eval(), compute.images(images), taps)
    return list(found.values())


def _whitening(moments: Moments, sd: np.ndarray) -> np.ndarray:
    """(13, 13) that gives spectra unit variance in every direction that is more than noise (ZCA)."""
    values, vectors = np.linalg.eigh(moments.covariance / np.outer(sd, sd))
    return vectors / np.sqrt(values.clip(SMALLEST_VARIANCE)) @ vectors.T / sd


def _resized(x: Tensor, like: Tensor) -> Tensor:
    return F.interpolate(x, size=like.shape[-2:], mode="bilinear", align_corners=False)
