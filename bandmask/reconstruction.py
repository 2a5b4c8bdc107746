"""Hidden pixels from what an encoder sees around them: a light head that corrects ridge imputation.

An incomplete image is filled by ridge regression from what is visible at each pixel. The head adds to that, from the
encoder's feature maps of the filled image, the filled image itself and which of its pixels are made up. Its last layer
begins at zero: an untrained head is ridge imputation, and a trained one is judged by what it adds to it. As a `fill` of
`masking.hide` it stands wherever ridge imputation does.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, is_dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bandmask import bands
from bandmask.batches import Batch, Batches, flip
from bandmask.encoders import embed
from bandmask.imputation import AnyRidge
from bandmask.masking import VALIDATION_EPOCH, Mask, hidden_pixels
from bandmask.moments import Moments
from bandmask.packs import DN_PER_REFLECTANCE, Pack
from bandmask.provenance import checksum_of_code
from bandmask.training import Compute, adamw, checkpoint_of, fit, weights_checksum
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
    ridge: AnyRidge
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
        return cls(encoder, heads.to(compute.device).eval(), AnyRidge(moments), taps, compute)

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
        self._ridge = AnyRidge(reconstruction.ridge.moments, self.bands)
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


def train_reconstruction(
    encoder: nn.Module | None,
    pack: Pack,
    mask: Mask,
    moments: Moments,
    *,
    seeds: Sequence[int] = (0, 1, 2),
    epochs: int = 12,
    lr: float = 3e-3,
    weight_decay: float = 1e-4,
    width: int = 32,
    batch_size: int = 32,
    image_size: int | None = None,
    taps: Sequence[str] = TAPS,
    seed: int = 0,
    compute: Compute | None = None,
    checkpoint: Path | None = None,
    restart: bool = False,
    settings: dict[str, Any] | None = None,
    label: str = "training reconstruction",
    progress: bool = True,
) -> tuple[Reconstruction, pd.DataFrame]:
    """Train heads of all seeds side by side on hidden pixels, each as if it were alone; the encoder stays as it is.

    The error is in SDs of each band, so that cirrus, with a mean near 11 DN, counts as near infrared does. It is
    quadratic up to one SD and linear beyond (Huber), so that a few roofs and clouds don't decide. Images are flipped,
    not blurred: a blurred image is easier to restore than those that come.

    Args:
        encoder: frozen; sees the ridge-filled image. None for heads without one.
        pack: `train` is trained on, `val` watched.
        mask: what is hidden in training; `draws.AnyMask` gives one head for every loss, a `MaskSpec` a head for one.
        moments: of training spectra in reflectance, for ridge imputation and SDs.
        seeds: a head each; they share order, flips and masks.
        epochs: over the training split.
        lr: where AdamW begins; falls to 0 along a cosine, an epoch a step.
        weight_decay: of AdamW.
        width: channels inside a head.
        batch_size: images a step.
        image_size: side in pixels; None keeps the pack's. Enlarged images leak: a visible pixel carries a trace of
            its hidden neighbours.
        taps: where the encoder is tapped, shallow to deep.
        seed: of order, flips and `torch`.
        compute: device and precision.
        checkpoint: file to resume from; a mark of all that decides the result is added to its name.
        restart: begin anew.
        settings: what tells checkpoints apart.
        label: for the progress line.
        progress: show it.

    Returns:
        The reconstruction in eval mode, and the history, a row an epoch and head: `epoch`, `head_seed`, `train_loss`
        (mean over heads), `val_error`, and `val_ridge_error`, both root mean squares in SDs over hidden pixels.

    Raises:
        ValueError: no seed, an encoder without the taps, or a mask that hides nothing.
    """
    if not mask.bands:
        raise ValueError("this mask hides nothing, so there is nothing to learn from; give a mask with bands")
    compute = compute or Compute.of()
    made = Reconstruction.of(encoder, moments, seeds=seeds, width=width, taps=taps, compute=compute)
    options: dict[str, Any] = {"image_size": image_size, "device": compute.device, "seed": seed}
    train = Batches(pack, "train", batch_size=min(batch_size, len(pack.rows("train"))), shuffle=True, **options)
    watched = Batches(pack, "val", batch_size=batch_size, **options)
    optimizer = adamw(made.heads, lr=lr, weight_decay=weight_decay)

    def incomplete(batch: Batch, epoch: int) -> tuple[Tensor, Tensor, Tensor]:
        size = (batch.images.shape[-2], batch.images.shape[-1])
        drawn = hidden_pixels(mask, batch.samples, size, epoch=epoch, epochs=epochs)
        hidden = all_bands(drawn, mask.channels)
        filled = made.filled(batch.images, hidden)
        return filled, hidden, (batch.images - filled) / made.heads.sd[:, None, None]  # type: ignore[index]

    def batches(epoch: int) -> Iterator[Batch]:
        for group in optimizer.param_groups:
            group["lr"] = lr * (1 + np.cos(np.pi * epoch / epochs)) / 2
        draw = torch.Generator().manual_seed(seed * 100_003 + epoch)
        for batch in train.epoch(epoch):
            yield replace(batch, images=flip(batch.images, torch.rand(2, len(batch.images), generator=draw)))

    def loss(batch: Batch, epoch: int) -> Tensor:
        filled, hidden, missing = incomplete(batch, epoch)
        found = made.corrections(filled, hidden)
        wrong = F.huber_loss(found, missing.expand_as(found), reduction="none")
        # sum over heads: each gets the gradient that it would get alone
        return (wrong * hidden).sum() / hidden.sum().clamp(min=1)

    @torch.no_grad()
    def after_epoch(_: int) -> dict[str, float]:
        totals, count = torch.zeros(len(made.heads.seeds) + 1, dtype=torch.float64), 0
        for batch in watched.epoch():
            filled, hidden, missing = incomplete(batch, VALIDATION_EPOCH)
            wrong = torch.cat([missing - made.corrections(filled, hidden), missing[None]])
            totals += (wrong.square() * hidden).sum((1, 2, 3, 4)).double().cpu()
            count += int(hidden.sum())
        return dict(zip(names, (totals / max(count, 1)).sqrt().tolist(), strict=True))

    names = [*(f"val_error_{head_seed}" for head_seed in made.heads.seeds), "val_ridge_error"]
    decisive = {
        "mask": [type(mask).__name__, asdict(mask) if is_dataclass(mask) else repr(mask)],
        "moments": made.ridge.statistics.tolist(),
        "seeds": list(seeds),
        "lr": lr,
        "weight_decay": weight_decay,
        "width": width,
        "batch_size": batch_size,
        "image_size": train.image_size,
        "taps": list(made.taps),
        "seed": seed,
        "data": pack.fingerprint,
        "code": checksum_of_code(__name__),
        "weights_checksum": weights_checksum(encoder) if encoder is not None else None,
        **(settings or {}),
    }
    wide = fit(
        made.heads,
        optimizer,
        batches,
        loss,
        epochs=epochs,
        after_epoch=after_epoch,
        settings=decisive,
        checkpoint=checkpoint_of(checkpoint, decisive, epochs),
        restart=restart,
        compute=compute,
        label=label,
        progress=progress,
    )
    tidy = wide.melt(["epoch", "train_loss", "val_ridge_error"], names[:-1], "head_seed", "val_error")
    tidy["head_seed"] = tidy["head_seed"].str.removeprefix("val_error_").astype(int)
    return made, tidy.assign(train_loss=tidy["train_loss"] / len(made.heads.seeds))


def all_bands(hidden: Tensor, channels: Sequence[int]) -> Tensor:
    """Hidden pixels of some bands among all of them: (B, k, H, W) to (B, 13, H, W); the others are visible."""
    spread = hidden.new_zeros(len(hidden), len(bands.NAMES), *hidden.shape[2:])
    spread[:, list(channels)] = hidden
    return spread


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
