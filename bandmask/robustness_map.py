"""Accuracy of heads in service with every subset of bands visible.

Bit i of a code is set if band i of `bands.NAMES` is visible: 8191 is a complete image, 0 nothing at all. Whole bands
are lost, the same in all images, so a fill is one affine map a subset and thousands of subsets are matrix products.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from bandmask import bands, files
from bandmask.batches import Batches
from bandmask.fills import RidgeLocalFill
from bandmask.heads import SceneHeads
from bandmask.packs import Pack
from bandmask.stats import drawn, interval
from bandmask.train import Compute, fill_checksum, weights_checksum

BANDS = len(bands.NAMES)
COMPLETE = 2**BANDS - 1
DRAWS = 2000  # of a bootstrap
PART = 64  # subsets a file: with 201 images about a minute of two cores, which is what a kill can cost


@dataclass(frozen=True)
class Scores:
    """Which images were classified rightly, with each subset of bands visible."""

    codes: np.ndarray  # (P,) int64, ascending
    correct: np.ndarray  # (P, K, N) bool, by subset, head and image
    samples: np.ndarray  # (N,) rows of the images in their pack
    groups: np.ndarray  # (N,): images of one group are not independent; each its own, unless the pack says otherwise
    head_seeds: np.ndarray  # (K,)

    def at(self, code: int) -> float:
        """Accuracy with one subset visible; ValueError if it was not looked at."""
        place = int(np.searchsorted(self.codes, code))
        if place == len(self.codes) or self.codes[place] != code:
            raise ValueError(f"subset {code} ({' '.join(visible_bands(code)) or 'nothing'}) is not among the scores")
        return float(self.correct[place].mean())

    def mean(self, chosen: np.ndarray) -> tuple[float, float, float]:
        """Mean accuracy over chosen subsets, (P,) bool, with a 95 % interval over groups of images and heads."""
        by_image = self.correct[chosen].mean(0)  # (K, N)
        groups, owner = np.unique(self.groups, return_inverse=True)
        draw = np.random.default_rng(0)
        times = drawn(draw, len(groups), DRAWS)[:, owner]  # (draws, N)
        heads = drawn(draw, len(by_image), DRAWS) / len(by_image)
        spread = (heads * (times / times.sum(1, keepdims=True) @ by_image.T)).sum(1)
        return float(by_image.mean()), *(interval(spread) if len(groups) > 1 else (np.nan, np.nan))

    def table(self, **described: Any) -> pd.DataFrame:
        """A row a subset and head: what `described` says, bands by name, how many are `lost`, images and accuracy."""
        heads, correct = len(self.head_seeds), self.correct.sum(2).ravel()
        names = [" ".join(visible_bands(code)) for code in self.codes.tolist()]
        hidden = [" ".join(visible_bands(COMPLETE - code)) for code in self.codes.tolist()]
        lost = (~patterns(self.codes)).sum(1)
        columns = {"code": self.codes, "visible": names, "hidden": hidden, "lost": lost}
        repeated = {name: np.repeat(np.asarray(values), heads) for name, values in columns.items()}
        counted = {"correct": correct, "images": len(self.samples), "accuracy": correct / len(self.samples)}
        seeds = np.tile(self.head_seeds, len(self.codes))
        return pd.DataFrame({**described, **repeated, "head_seed": seeds, **counted})


def visible_bands(code: int) -> tuple[str, ...]:
    """ESA names of the bands that a subset leaves visible."""
    return tuple(name for channel, name in enumerate(bands.NAMES) if code >> channel & 1)


def patterns(codes: np.ndarray) -> np.ndarray:
    """(P, 13) bool: which bands each subset leaves visible."""
    return (np.asarray(codes)[:, None] >> np.arange(BANDS) & 1).astype(bool)


def score_subsets(
    encoder: nn.Module,
    fill: Tensor | RidgeLocalFill,
    heads: SceneHeads,
    pack: Pack,
    codes: np.ndarray,
    *,
    rows: Sequence[int] | np.ndarray | str = "test",
    image_size: int = 64,
    batch_size: int = 256,
    compute: Compute | None = None,
    folder: Path | str | None = None,
) -> Scores:
    """Which images the heads classify rightly, with each subset of bands visible.

    Memory is that of the images and one batch, however many subsets there are; convolutions run channels-last.

    Args:
        encoder: (B, 13, S, S) to (B, D); left as it is.
        fill: what stands in lost bands: 13 values, or a regression. NaN for encoders that read it as hidden; where
            nothing is visible they get the training means.
        heads: in service (`evaluation.in_service`).
        rows: a split's name or row numbers.
        batch_size: images an encoder pass; of different subsets.
        folder: finished parts are kept below it, under a mark of all that decides them, and taken from it.

    A ValueError of codes that are no subsets, or a damaged part.
    """
    chosen = np.unique(codes)
    if chosen.dtype.kind not in "iu" or len(chosen) == 0 or chosen[0] < 0 or chosen[-1] > COMPLETE:
        raise ValueError(f"subsets are codes from 0 (nothing visible) to {COMPLETE} (complete); see `bands.code_of`")
    compute = replace(compute or Compute.of("cpu"), channels_last=True)
    batches = Batches(pack, rows, batch_size=256, image_size=image_size, device=compute.device)
    samples = batches.rows
    read = list(batches.epoch())
    images, labels = torch.cat([batch.images for batch in read]), torch.cat([batch.labels for batch in read])
    model = compute.place(copy.deepcopy(encoder)).eval()  # a copy: the caller's keeps its memory format
    judge = copy.deepcopy(heads).to(compute.device).eval()
    nothing = torch.tensor(pack.band_means()).to(images)
    decisive = [weights_checksum(encoder), type(encoder).__name__, fill_checksum(fill), weights_checksum(heads)]
    mark = files.checksum_of([*decisive, list(heads.seeds), pack.fingerprint, samples.tolist(), image_size])[:12]
    kept = folder and Path(folder) / f"subsets-{mark}"
    done: dict[int, np.ndarray] = {}
    for path in sorted(kept.glob("*.npz")) if kept else []:
        done |= _read(path, len(samples))
    missing = np.array([code for code in chosen.tolist() if code not in done], np.int64)
    wide = min(len(images), batch_size)  # images of a batch, of each of so many subsets:
    deep = max(1, batch_size // wide)
    for part in np.split(missing, range(PART, len(missing), PART)) if len(missing) else []:
        right = np.empty((len(part), len(heads.seeds), len(images)), bool)
        for first, start in np.ndindex(-(-len(part) // deep), -(-len(images) // wide)):
            subsets, some = slice(first * deep, (first + 1) * deep), slice(start * wide, (start + 1) * wide)
            batch = filled(images[some], part[subsets], fill, nothing).flatten(0, 1)
            with torch.inference_mode(), compute.autocast():
                embeddings = model(compute.images(batch)).float()
            with torch.inference_mode():
                answers = judge(embeddings).argmax(-1)
            hits = answers.view(len(heads.seeds), -1, len(labels[some])) == labels[some]
            right[subsets, :, some] = hits.transpose(0, 1).cpu().numpy()
        if kept:
            name = f"{part[0]:04d}-{part[-1]:04d}-{files.checksum_of(part.tolist())[:8]}.npz"
            with files.writing(kept / name) as partial, partial.open("wb") as file:
                np.savez_compressed(file, codes=part, right=np.packbits(right, axis=-1))
        done.update(zip(part.tolist(), right, strict=True))
    groups = pack.index["group"].to_numpy()[samples] if "group" in pack.index else samples
    correct = np.stack([done[code] for code in chosen.tolist()])
    seeds = np.array(heads.seeds, np.int64)
    return Scores(chosen, correct, samples, np.unique(groups, return_inverse=True)[1], seeds)


def _read(path: Path, images: int) -> dict[int, np.ndarray]:
    """By subset, which images are right, (K, N) bool, of a finished part."""
    try:
        with np.load(path, allow_pickle=False) as saved:
            right = np.unpackbits(saved["right"], axis=-1, count=images).astype(bool)
            return dict(zip(saved["codes"].tolist(), right, strict=True))
    except (OSError, ValueError, KeyError, BadZipFile) as error:
        raise ValueError(f"{path} is damaged, or holds no scores of subsets ({error}); delete it") from error


def filled(images: Tensor, codes: np.ndarray, fill: Tensor | RidgeLocalFill, nothing: Tensor) -> Tensor:
    """Each image (N, 13, H, W) with each subset of bands visible, (P, N, 13, H, W); lost values don't reach it.

    `nothing`, 13 values, stands in the place of NaN where no band is visible; a ValueError of any other fill.
    """
    visible = patterns(codes)
    seen = torch.from_numpy(visible).to(images.device)[:, None, :, None, None]
    if isinstance(fill, Tensor):
        values = fill.to(images).expand(len(codes), -1)
        empty = ~torch.from_numpy(visible.any(1)).to(images.device)[:, None]
        values = torch.where(values.isnan() & empty, nothing, values)
        return torch.where(seen, images, values[:, None, :, None, None])
    if not isinstance(fill, RidgeLocalFill) or fill.bands != bands.NAMES:
        raise ValueError(f"subsets of bands need 13 values or a RidgeLocalFill for all 13; got a {type(fill).__name__}")
    # one regression for all pixels of a subset: a matrix product
    weights, biases = (torch.as_tensor(a).to(images) for a in fill.moments.regressions(visible))
    pixels = images.transpose(0, 1).flatten(1)  # (13, NHW)
    values = torch.addmm(biases.view(-1, 1), weights.flatten(0, 1), pixels)  # (P·13, NHW)
    values = values.view(len(codes), BANDS, len(images), *images.shape[2:]).transpose(1, 2)
    return torch.where(seen, images, values)
