"""Accuracy with every subset of bands visible, for an encoder, a fill and heads in service: streamed and resumable.

Whole bands are lost, the same in all images, so a fill is one affine map of 13 bands for each subset, and thousands of
subsets are matrix products. Images are read and scaled once. What is done is kept part by part: a run that was killed
goes on, and one that asks for more subsets computes only those.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from bandmask import bands, files
from bandmask.any_band import AnyBandEncoder
from bandmask.batches import Batches
from bandmask.fills import RidgeLocalFill
from bandmask.heads import SceneHeads
from bandmask.masking import Fill
from bandmask.memory import explain_out_of_memory
from bandmask.packs import Pack
from bandmask.robustness.lattice import BANDS, Scores, every_subset, patterns
from bandmask.training import Compute, fill_checksum, weights_checksum

PART = 64  # subsets a file: with 201 images about a minute of two cores, which is what a kill can cost


def score_subsets(
    encoder: nn.Module,
    fill: Fill,
    heads: SceneHeads,
    pack: Pack,
    *,
    codes: np.ndarray | None = None,
    rows: str | Sequence[int] | np.ndarray = "test",
    image_size: int = 64,
    batch_size: int = 256,
    compute: Compute | None = None,
    folder: Path | str | None = None,
    label: str = "subsets",
    progress: bool = True,
) -> Scores:
    """Which images the heads classify rightly, with each subset of bands visible.

    Memory is that of the images and one batch, however many subsets there are.

    Args:
        encoder: (B, 13, S, S) to (B, D); left as it is.
        fill: what stands in lost bands: 13 values, `fills.RidgeLocalFill`, or another function for masks of all 13
            bands. NaN for encoders that read it as hidden; where nothing is visible they get the training means.
        heads: trained on complete images; they and their seeds are kept.
        pack: where images and labels come from.
        codes: subsets, see `lattice`; None takes all 8,192.
        rows: a split's name or row numbers; see `lattice.stratified`.
        image_size: side of the encoder's input.
        batch_size: images an encoder pass; of different subsets.
        compute: device and precision. Convolutions run channels-last everywhere.
        folder: finished parts are kept below it, and taken from it; a mark of all that decides them names their
            folder. None keeps none.
        label: for the progress line.
        progress: show it, with images a second.

    Raises:
        ValueError: codes that are no subsets; a fill made for other bands; a damaged part.
        MemoryError: a batch doesn't fit; says what it needed.
    """
    chosen = _checked(every_subset() if codes is None else codes)
    compute = dataclasses.replace(compute or Compute.of("cpu"), channels_last=True)
    samples, images, labels = _load(pack, rows, image_size, compute)
    model = compute.place(copy.deepcopy(encoder)).eval()  # a copy: the caller's keeps its memory format
    judge = copy.deepcopy(heads).to(compute.device).eval()
    nothing = torch.tensor(pack.band_means()).to(images)
    kept = _Parts(folder, _mark(encoder, fill, heads, pack, samples, image_size))
    done = kept.read(chosen, (len(heads.seeds), len(samples)))
    missing = np.array([code for code in chosen.tolist() if code not in done], np.int64)
    bar = tqdm(total=len(missing) * len(samples), desc=label, unit="image", unit_scale=True, disable=not progress)
    with explain_out_of_memory(label, batch_size, image_size=image_size), bar:
        for start in range(0, len(missing), PART):
            part = missing[start : start + PART]
            right = _score(model, fill, nothing, judge, images, labels, part, batch_size, compute, bar)
            kept.write(part, right)
            done.update(zip(part.tolist(), right, strict=True))
    groups = pack.index["group"].to_numpy()[samples] if "group" in pack.index else samples
    correct = np.stack([done[code] for code in chosen.tolist()])
    seeds = np.array(heads.seeds, np.int64)
    return Scores(chosen, correct, samples, labels.cpu().numpy(), np.unique(groups, return_inverse=True)[1], seeds)


def filled(images: Tensor, codes: np.ndarray, fill: Fill, nothing: Tensor | None = None) -> Tensor:
    """Each image with each subset of bands visible; the values of lost bands don't reach it.

    Args:
        images: complete, finite, (N, 13, H, W).
        codes: (P,) subsets.
        fill: as in `score_subsets`.
        nothing: 13 values in the place of NaN where no band is visible; None leaves NaN.

    Returns:
        (P, N, 13, H, W).

    Raises:
        ValueError: a fill made for other bands.
    """
    visible = patterns(codes)
    seen = torch.from_numpy(visible).to(images.device)[:, None, :, None, None]
    if isinstance(fill, Tensor):
        values = fill.to(images).expand(len(codes), -1)
        if nothing is not None:
            empty = ~torch.from_numpy(visible.any(1)).to(images.device)[:, None]
            values = torch.where(values.isnan() & empty, nothing, values)
        return torch.where(seen, images, values[:, None, :, None, None])
    if getattr(fill, "bands", bands.NAMES) != bands.NAMES:
        raise ValueError(f"this fill is for bands {getattr(fill, 'bands', None)}; subsets of bands need one for all 13")
    if isinstance(fill, RidgeLocalFill):  # one regression for all pixels of a subset: a matrix product
        weights, biases = (torch.as_tensor(a).to(images) for a in fill.moments.regressions(visible, fill.alpha))
        pixels = images.transpose(0, 1).flatten(1)  # (13, NHW)
        values = torch.addmm(biases.view(-1, 1), weights.flatten(0, 1), pixels)  # (P·13, NHW)
        values = values.view(len(codes), BANDS, len(images), *images.shape[2:]).transpose(1, 2)
    else:
        parts = []
        for row in seen:
            hidden = (~row).expand(len(images), -1, *images.shape[2:])
            parts.append(fill(images.masked_fill(hidden, 0), hidden))
        values = torch.stack(parts).to(images)
    return torch.where(seen, images, values)


@torch.inference_mode()
def _score(
    model: nn.Module,
    fill: Fill,
    nothing: Tensor,
    heads: SceneHeads,
    images: Tensor,
    labels: Tensor,
    codes: np.ndarray,
    batch_size: int,
    compute: Compute,
    bar: tqdm,
) -> np.ndarray:
    """(P, K, N) bool of these subsets."""
    right = np.empty((len(codes), len(heads.seeds), len(images)), bool)
    for subsets, part in _batches(len(codes), len(images), batch_size):
        batch = filled(images[part], codes[subsets], fill, nothing).flatten(0, 1)
        with compute.autocast():
            embeddings = model(compute.images(batch)).float()
        hits = heads(embeddings).argmax(-1).view(len(heads.seeds), -1, len(labels[part])) == labels[part]  # (K, p, n)
        right[subsets, :, part] = hits.transpose(0, 1).cpu().numpy()
        bar.update(len(batch))
    return right


def _batches(subsets: int, images: int, size: int) -> Iterator[tuple[slice, slice]]:
    """Slices of subsets and images, at most `size` of both together."""
    wide = min(images, size)
    tall = max(1, size // wide)
    for top in range(0, subsets, tall):
        for left in range(0, images, wide):
            yield slice(top, min(top + tall, subsets)), slice(left, min(left + wide, images))


def _load(pack: Pack, rows: Any, image_size: int, compute: Compute) -> tuple[np.ndarray, Tensor, Tensor]:
    chosen = rows if isinstance(rows, str) else np.asarray(rows)
    batches = Batches(pack, chosen, batch_size=256, image_size=image_size, device=compute.device, resident=False)
    if len(np.unique(batches.rows)) < len(batches.rows):
        raise ValueError("an image is named twice in rows; name each once")
    parts = list(batches.epoch())
    return batches.rows, torch.cat([part.images for part in parts]), torch.cat([part.labels for part in parts])


def _checked(codes: np.ndarray) -> np.ndarray:
    codes = np.unique(np.asarray(codes))
    if codes.dtype.kind not in "iu" or len(codes) == 0 or codes[0] < 0 or codes[-1] >= 2**BANDS:
        raise ValueError(f"subsets are codes from 0 (nothing visible) to {2**BANDS - 1} (complete); see lattice")
    return codes.astype(np.int64)


def _mark(encoder: nn.Module, fill: Fill, heads: SceneHeads, pack: Pack, samples: np.ndarray, image_size: int) -> str:
    """Checksum of all that decides which images are right, but for the subsets."""
    decisive = {
        "encoder": weights_checksum(encoder),
        "architecture": type(encoder).__name__,
        "fill": _fill_mark(fill),
        "mixture": [_fill_mark(encoder.fill), repr(encoder.gate)] if isinstance(encoder, AnyBandEncoder) else None,
        "heads": weights_checksum(heads),
        "seeds": list(heads.seeds),
        "data": pack.fingerprint,
        "samples": samples.tolist(),
        "image_size": image_size,
    }
    return files.checksum_of(decisive)[:12]


def _fill_mark(fill: Fill) -> list[Any]:
    """What decides a fill; of one that is fitted, also the moments that it was fitted to."""
    moments = getattr(fill, "moments", None)
    fitted = None if moments is None else [moments.mean.tolist(), moments.covariance.tolist(), moments.pixels]
    return [fill_checksum(fill), getattr(fill, "alpha", None), fitted]


class _Parts:
    """Finished subsets in files, each written as a whole."""

    def __init__(self, folder: Path | str | None, mark: str) -> None:
        self.folder = None if folder is None else Path(folder) / f"subsets-{mark}"

    def read(self, codes: np.ndarray, shape: tuple[int, int]) -> dict[int, np.ndarray]:
        """(K, N) bool of each of these codes that is there."""
        wanted = set(codes.tolist())
        found: dict[int, np.ndarray] = {}
        for path in sorted(self.folder.glob("*.npz")) if self.folder else []:
            try:
                with np.load(path, allow_pickle=False) as saved:
                    there, bits = saved["codes"].tolist(), saved["right"]
                right = np.unpackbits(bits, axis=-1, count=shape[1]).astype(bool).reshape(len(there), *shape)
            except (OSError, ValueError, KeyError, BadZipFile) as error:
                raise ValueError(f"{path} is damaged ({error}); delete it, and its subsets are made anew") from error
            found.update((code, row) for code, row in zip(there, right, strict=True) if code in wanted)
        return found

    def write(self, codes: np.ndarray, right: np.ndarray) -> None:
        if self.folder is None:
            return
        name = f"{codes[0]:04d}-{codes[-1]:04d}-{files.checksum_of(codes.tolist())[:8]}.npz"
        with files.writing(self.folder / name) as partial, partial.open("wb") as file:
            np.savez_compressed(file, codes=codes, right=np.packbits(right, axis=-1))
