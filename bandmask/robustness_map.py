"""Accuracy with every subset of bands visible, what is worst, and what each band is worth.

Bit i of a code is set if band i of `bands.NAMES` is visible: 8191 is a complete image, 0 nothing at all. Whole bands
are lost, the same in all images, so a fill is one affine map a subset and thousands of subsets are matrix products.
Whatever is linear in the accuracies (means, Shapley values, differences) is a matrix of weights over subsets, so
`estimate` gives all figures and intervals.
Source: Shapley 1953; Grabisch and Roubens 1999 (interaction index).
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from math import comb
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from tqdm import tqdm

from bandmask import bands, files
from bandmask.batches import Batches
from bandmask.fills import RidgeLocalFill
from bandmask.heads import SceneHeads
from bandmask.masks import Fill
from bandmask.packs import Pack
from bandmask.stats import drawn, interval
from bandmask.train import Compute, fill_checksum, weights_checksum

BANDS = len(bands.NAMES)
COMPLETE = 2**BANDS - 1
PART = 64  # subsets a file: with 201 images about a minute of two cores, which is what a kill can cost


@dataclass(frozen=True)
class Scores:
    """Which images were classified rightly, with each subset of bands visible."""

    codes: np.ndarray  # (P,) int64, ascending
    correct: np.ndarray  # (P, K, N) bool, by subset, head and image
    samples: np.ndarray  # (N,) rows of the images in their pack
    labels: np.ndarray  # (N,) their classes
    groups: np.ndarray  # (N,): images of one group are not independent; each its own, unless the pack says otherwise
    head_seeds: np.ndarray  # (K,)

    @property
    def accuracy(self) -> np.ndarray:
        """(P,) share of images, mean over heads."""
        return self.correct.mean((1, 2))

    @property
    def lost(self) -> np.ndarray:
        """(P,) how many of the 13 bands are hidden."""
        return lost_bands(self.codes)

    def at(self, code: int) -> float:
        """Accuracy with one subset visible; ValueError if it was not looked at."""
        place = int(np.searchsorted(self.codes, code))
        if place == len(self.codes) or self.codes[place] != code:
            raise ValueError(f"subset {code} ({' '.join(visible_bands(code)) or 'nothing'}) is not among the scores")
        return float(self.correct[place].mean())

    def table(self, **described: Any) -> pd.DataFrame:
        """A row a subset and head: what `described` says, bands by name, how many are `lost`, images and accuracy."""
        heads, correct = len(self.head_seeds), self.correct.sum(2).ravel()
        names = [" ".join(visible_bands(code)) for code in self.codes.tolist()]
        hidden = [" ".join(visible_bands(COMPLETE - code)) for code in self.codes.tolist()]
        columns = {"code": self.codes, "visible": names, "hidden": hidden, "lost": self.lost}
        repeated = {name: np.repeat(np.asarray(values), heads) for name, values in columns.items()}
        counted = {"correct": correct, "images": len(self.samples), "accuracy": correct / len(self.samples)}
        return pd.DataFrame(
            {**described, **repeated, "head_seed": np.tile(self.head_seeds, len(self.codes)), **counted}
        )


def code_of(visible: str | Iterable[str]) -> int:
    """Code of the subset in which these bands are visible; ESA or common names."""
    return sum(1 << channel for channel in bands.channel_indices(bands.parse_bands(visible)))


def visible_bands(code: int) -> tuple[str, ...]:
    """ESA names of the bands that a subset leaves visible, in order of wavelength."""
    return tuple(name for channel, name in enumerate(bands.NAMES) if code >> channel & 1)


def patterns(codes: np.ndarray, count: int = BANDS) -> np.ndarray:
    """(P, count) bool: which bands each subset leaves visible."""
    return (np.asarray(codes)[:, None] >> np.arange(count) & 1).astype(bool)


def lost_bands(codes: np.ndarray, count: int = BANDS) -> np.ndarray:
    """(P,) how many bands of `count` each subset hides."""
    return count - patterns(codes, count).sum(1)


def every_subset() -> np.ndarray:
    """All 8,192 codes, ascending."""
    return np.arange(2**BANDS)


def edge_subsets(most: int = 2) -> np.ndarray:
    """Codes, ascending, that hide, or show, `most` bands or fewer: where a loss begins, and where little is left."""
    lost = lost_bands(every_subset())
    return np.flatnonzero((lost <= most) | (lost >= BANDS - most))


def stratified(labels: np.ndarray, rows: Sequence[int] | np.ndarray, count: int, *, seed: int = 0) -> np.ndarray:
    """`count` of these rows (0: all), each class in its proportion, at random; a larger count holds a smaller one."""
    rows = np.asarray(rows, np.int64)
    if count < 0:
        raise ValueError(f"count is the number of images, 0 for all; got {count}")
    if count == 0 or count >= len(rows):
        return np.sort(rows)
    shuffled = pd.Series(np.random.default_rng(seed).permutation(rows))
    label = pd.Series(np.asarray(labels)[shuffled])
    within = (label.groupby(label).cumcount() + 0.5) / label.groupby(label).transform("size")
    return np.sort(shuffled[within.sort_values(kind="stable").index[:count]].to_numpy())


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

    Memory is that of the images and one batch, however many subsets there are; convolutions run channels-last.

    Args:
        encoder: (B, 13, S, S) to (B, D); left as it is.
        fill: what stands in lost bands: 13 values, `fills.RidgeLocalFill`, or another function for masks of all 13
            bands. NaN for encoders that read it as hidden; where nothing is visible they get the training means.
        heads: in service (`evaluate.in_service`); their seeds are kept.
        pack: where images and labels come from.
        codes: subsets; None takes all 8,192.
        rows: a split's name or row numbers; see `stratified`.
        image_size: side of the encoder's input.
        batch_size: images an encoder pass; of different subsets.
        compute: device and precision.
        folder: finished parts are kept below it, under a mark of all that decides them, and taken from it.
        label: for the progress line.
        progress: show it.

    Raises:
        ValueError: codes that are no subsets; a fill made for other bands; an image twice; a damaged part.
    """
    chosen = np.unique(every_subset() if codes is None else np.asarray(codes))
    if chosen.dtype.kind not in "iu" or len(chosen) == 0 or chosen[0] < 0 or chosen[-1] > COMPLETE:
        raise ValueError(f"subsets are codes from 0 (nothing visible) to {COMPLETE} (complete); see `code_of`")
    compute = replace(compute or Compute.of("cpu"), channels_last=True)
    split = rows if isinstance(rows, str) else np.asarray(rows)
    batches = Batches(pack, split, batch_size=256, image_size=image_size, device=compute.device)
    samples = batches.rows
    if len(np.unique(samples)) < len(samples):
        raise ValueError("an image is named twice in rows; name each once")
    read = list(batches.epoch())
    images, labels = torch.cat([batch.images for batch in read]), torch.cat([batch.labels for batch in read])
    model = compute.place(copy.deepcopy(encoder)).eval()  # a copy: the caller's keeps its memory format
    judge = copy.deepcopy(heads).to(compute.device).eval()
    nothing = torch.tensor(pack.band_means()).to(images)
    kept = folder and Path(folder) / f"subsets-{_mark(encoder, fill, heads, pack, samples, image_size)}"
    done: dict[int, np.ndarray] = {}
    for path in sorted(kept.glob("*.npz")) if kept else []:
        there = _read(path)
        bits = np.unpackbits(there["right"], axis=-1, count=len(samples)).astype(bool)
        done.update(zip(there["codes"].tolist(), bits, strict=True))
    missing = np.array([code for code in chosen.tolist() if code not in done], np.int64)
    bar = tqdm(total=len(missing) * len(samples), desc=label, unit="image", unit_scale=True, disable=not progress)
    wide = min(len(images), batch_size)
    with bar, torch.inference_mode():
        for part in np.split(missing, range(PART, len(missing), PART)) if len(missing) else []:
            right = np.empty((len(part), len(heads.seeds), len(images)), bool)
            for subsets in _slices(len(part), max(1, batch_size // wide)):
                for some in _slices(len(images), wide):
                    batch = filled(images[some], part[subsets], fill, nothing).flatten(0, 1)
                    with compute.autocast():
                        embeddings = model(compute.images(batch)).float()
                    hits = judge(embeddings).argmax(-1).view(len(heads.seeds), -1, len(labels[some])) == labels[some]
                    right[subsets, :, some] = hits.transpose(0, 1).cpu().numpy()
                    bar.update(len(batch))
            if kept:
                name = f"{part[0]:04d}-{part[-1]:04d}-{files.checksum_of(part.tolist())[:8]}.npz"
                with files.writing(kept / name) as partial, partial.open("wb") as file:
                    np.savez_compressed(file, codes=part, right=np.packbits(right, axis=-1))
            done.update(zip(part.tolist(), right, strict=True))
    groups = pack.index["group"].to_numpy()[samples] if "group" in pack.index else samples
    correct = np.stack([done[code] for code in chosen.tolist()])
    seeds = np.array(heads.seeds, np.int64)
    return Scores(chosen, correct, samples, labels.cpu().numpy(), np.unique(groups, return_inverse=True)[1], seeds)


def _read(path: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as saved:
            return {name: saved[name] for name in ("codes", "right")}
    except (OSError, ValueError, KeyError, BadZipFile) as error:
        raise ValueError(f"{path} is damaged, or holds no scores of subsets ({error}); delete it") from error


def _slices(length: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


def filled(images: Tensor, codes: np.ndarray, fill: Fill, nothing: Tensor | None = None) -> Tensor:
    """Each image (N, 13, H, W) with each subset of bands visible, (P, N, 13, H, W); lost values don't reach it.

    `nothing`, 13 values, stands in the place of NaN where no band is visible; a ValueError of a fill for other bands.
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


def _mark(encoder: nn.Module, fill: Fill, heads: SceneHeads, pack: Pack, samples: np.ndarray, image_size: int) -> str:
    """Checksum of all that decides which images are right, but for the subsets."""
    mixed = [_fill_mark(encoder.fill), repr(encoder.gate)] if hasattr(encoder, "gate") else None  # any_band's encoder
    decisive = {
        "encoder": weights_checksum(encoder),
        "architecture": type(encoder).__name__,
        "fill": _fill_mark(fill),
        "mixture": mixed,
        "heads": weights_checksum(heads),
        "seeds": list(heads.seeds),
        "data": pack.fingerprint,
        "samples": samples.tolist(),
        "image_size": image_size,
    }
    return files.checksum_of(decisive)[:12]


def _fill_mark(fill: Any) -> list[Any]:
    """What decides a fill; of one that is fitted, also the moments that it was fitted to."""
    moments = getattr(fill, "moments", None)
    fitted = None if moments is None else [moments.mean.tolist(), moments.covariance.tolist(), moments.pixels]
    return [fill_checksum(fill), getattr(fill, "alpha", None), fitted]


def estimate(
    scores: Scores, weights: np.ndarray, *, minus: Scores | None = None, draws: int = 2000, seed: int = 0
) -> pd.DataFrame:
    """Figures that are linear in the accuracies, with 95 % intervals from resampling groups of images, and heads.

    Args:
        scores: of one method.
        weights: (Q, P), a row a figure. Of subsets that were not looked at, an interval says nothing.
        minus: subtracted, in the same draws of images and heads, so what they have in common cancels.
        draws: number of draws.
        seed: of the draws.

    Returns:
        A row a figure: `value`, `low`, `high`, as shares.

    Raises:
        ValueError: weights of other subsets; methods that were scored on other subsets, images or heads.
    """
    if weights.ndim != 2 or weights.shape[1] != len(scores.codes):
        raise ValueError(f"weights have shape {weights.shape}; for {len(scores.codes)} subsets a row has one for each")
    found = _by_image(scores, weights)
    if minus is not None:
        ours, theirs = vars(scores), vars(minus)
        if differs := [name for name in ours if name != "correct" and not np.array_equal(ours[name], theirs[name])]:
            raise ValueError(f"the two methods differ in {', '.join(differs)}; score both on the same")
        found = found - _by_image(minus, weights)
    groups, owner = np.unique(scores.groups, return_inverse=True)
    draw = np.random.default_rng(seed)
    times = drawn(draw, len(groups), draws)[:, owner]  # (draws, N)
    times = times / times.sum(1, keepdims=True)
    shares = drawn(draw, len(scores.head_seeds), draws) / len(scores.head_seeds)
    ends = [interval((shares * (times @ figure.T)).sum(1)) for figure in found]
    rows = [(figure.mean(), *reach) for figure, reach in zip(found, ends, strict=True)]
    return pd.DataFrame(rows, columns=["value", "low", "high"], dtype=float)


def _by_image(scores: Scores, weights: np.ndarray) -> np.ndarray:
    """(Q, K, N): what each image adds; by head, because all subsets and images at once would be copied as floats."""
    heads = range(len(scores.head_seeds))
    return np.stack([weights @ scores.correct[:, head].astype(float) for head in heads], axis=1)


def mean_weights(codes: np.ndarray) -> np.ndarray:
    """(15, P) weights of the mean over the subsets that lose 0 to 13 bands; NaN where none was looked at.

    The last row is one figure for all losses: every number of lost bands from 1 to 12 counts the same.
    """
    layer = lost_bands(codes) == np.arange(BANDS + 1)[:, None]
    means = layer / np.where(layer.any(1), layer.sum(1), np.nan)[:, None]
    return np.vstack([means, np.nanmean(means[1:BANDS], axis=0)])


def pair_losses(scores: Scores) -> np.ndarray:
    """(13, 13) accuracy with two bands lost; one on the diagonal. ValueError: a pair was not looked at."""
    bits = 1 << np.arange(BANDS)
    return np.array([[scores.at(COMPLETE & ~int(a | b)) for b in bits] for a in bits])


def value_weights(count: int = BANDS) -> np.ndarray:
    """Weights (count, 2^count) that make exact Shapley values of a game's values on all subsets; rows are bands.

    A band's value is what it adds, averaged over all orders in which bands could come back one by one: of a subset of
    `size` others it is 1 / (count · C(count − 1, size)) of what it adds there.
    """
    taken = patterns(np.arange(2**count), count)
    orders = np.array([comb(count - 1, size) for size in range(count)])
    others = (taken.sum(1)[:, None] - taken).clip(max=count - 1)  # of the other bands, how many are visible
    return (np.where(taken, 1.0, -1.0) / orders[others] / count).T


def interaction_weights(count: int = BANDS) -> np.ndarray:
    """Weights (pairs, 2^count) of the Shapley interaction of each pair, in the order of `pairs`.

    Above 0 the two bands are worth more together than apart; below 0 each stands in for the other.
    """
    taken = patterns(np.arange(2**count), count).astype(int)
    size, orders = taken.sum(1), np.array([comb(count - 2, rest) for rest in range(count - 1)])
    both = [taken[:, first] + taken[:, second] for first, second in pairs(count)]
    return np.array([np.where(b == 1, -1.0, 1.0) / orders[size - b] / (count - 1) for b in both])


def pairs(count: int = BANDS) -> list[tuple[int, int]]:
    """Pairs of players (i, j), i < j, in the order of the rows of weights: 78 of 13."""
    return list(combinations(range(count), 2))


def as_matrix(values: np.ndarray, count: int = BANDS) -> np.ndarray:
    """A value of each of `pairs` as a symmetric (count, count) matrix with NaN on the diagonal."""
    matrix = np.full((count, count), np.nan)
    for (first, second), value in zip(pairs(count), values, strict=True):
        matrix[first, second] = matrix[second, first] = value
    return matrix
