"""How well faults are seen: each injected into every image, and the detector's answers counted with intervals.

Healthy and faulty images are the same images, so intervals draw images, and a drawn image counts in both.
Source: Fawcett 2006 (ROC), Efron and Tibshirani 1993 (bootstrap), Wilson 1927 (interval of a share).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from torch import Tensor

from bandmask import bands
from bandmask.diagnosis.detector import Detector
from bandmask.diagnosis.faults import Fault, inject

_Z = 1.959963984540054  # 97.5 % point of the normal distribution


def measure(
    detector: Detector, images: Tensor, samples: Tensor, faults: Sequence[Fault], *, words: bool = False
) -> pd.DataFrame:
    """What the detector says of every image with every fault, a row each.

    Args:
        detector: fitted on images of this size.
        images: healthy, in reflectance, (N, 13, S, S).
        samples: their rows in the pack, (N,).
        faults: what is injected, each into all images.
        words: say also what the faulty bands look like, which takes longer.

    Returns:
        `kind`, `amount`, `bands`, `sample`; `worst`, the highest score of the image at the first look; `detected`, any
        band is called faulty; `found`, all faulty bands are among those; `named`, no others are; `word`, what the first
        faulty band looks like, or "".
    """
    frames = []
    for fault in faults:
        sketch = detector.sketch(inject(images, samples, fault))
        called = detector.faulty(sketch)
        truth = np.isin(np.arange(len(bands.NAMES)), fault.channels)
        rows = {"worst": detector.first_look(sketch).max(1), "detected": called.any(1)}
        rows |= {"found": called[:, truth].all(1), "named": (called == truth).all(1)}
        if words:
            said = detector.looks_like(sketch, called)
            rows["word"] = np.array([word.get(fault.bands[0], "") for word in said])
        described = {"kind": fault.kind, "amount": fault.amount, "bands": " ".join(fault.bands)}
        frames.append(pd.DataFrame({**described, "sample": samples.numpy(), **rows}))
    return pd.concat(frames, ignore_index=True)


def area(healthy: np.ndarray, faulty: np.ndarray) -> float:
    """Area under the ROC curve: the chance that a faulty image scores higher than a healthy one, ties counting half."""
    return float(_wins(healthy, np.asarray(faulty)[:, None]).mean())


def area_interval(
    healthy: np.ndarray, faulty: np.ndarray, *, draws: int = 2000, level: float = 0.95, seed: int = 0
) -> tuple[float, float, float]:
    """Mean area under the ROC curves of K faults, with a bootstrap interval over images: area, low, high.

    Args:
        healthy: worst score of each image, (N,).
        faulty: worst score of the same images with each fault, (N, K).
        draws: of the bootstrap.
        level: of the interval.
        seed: of the draws.

    Raises:
        ValueError: not the same number of images.
    """
    if len(healthy) != len(faulty):
        raise ValueError(f"healthy and faulty are the same images; got {len(healthy)} and {len(faulty)}")
    wins, count = _wins(healthy, faulty), len(healthy)
    weights = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=draws) / count
    drawn = ((weights @ wins) * weights).sum(1)
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return float(wins.mean()), float(low), float(high)


def share_interval(hits: np.ndarray) -> tuple[float, float, float]:
    """A share of images with Wilson's 95 % interval, which is right near 0 and 1 too: share, low, high."""
    count, share = len(hits), float(np.mean(hits))
    middle = (share + _Z**2 / (2 * count)) / (1 + _Z**2 / count)
    half = _Z / (1 + _Z**2 / count) * float(np.sqrt(share * (1 - share) / count + _Z**2 / (4 * count**2)))
    return share, middle - half, middle + half


def mean_interval(
    hits: np.ndarray, *, draws: int = 2000, level: float = 0.95, seed: int = 0
) -> tuple[float, float, float]:
    """Mean over images and faults of (N, K), with a bootstrap interval over images: mean, low, high."""
    each, count = np.asarray(hits, float).mean(1), len(hits)
    weights = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=draws) / count
    low, high = np.quantile(weights @ each, [(1 - level) / 2, (1 + level) / 2])
    return float(each.mean()), float(low), float(high)


def _wins(healthy: np.ndarray, faulty: np.ndarray) -> np.ndarray:
    """(N faulty, M healthy): share of K faults in which that faulty image scores higher."""
    healthy, wins = np.asarray(healthy), np.zeros((len(faulty), len(healthy)))
    for scores in np.asarray(faulty).T:
        wins += (scores[:, None] > healthy) + 0.5 * (scores[:, None] == healthy)
    return wins / faulty.shape[1]
