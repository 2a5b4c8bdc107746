"""Moved to `train`; `fit` here takes the arguments of before, until its last callers are moved too."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from bandmask import train
from bandmask.train import Compute, adamw, explain_out_of_memory, fill_checksum, weights_checksum

__all__ = ["Compute", "adamw", "checkpoint_of", "explain_out_of_memory", "fill_checksum", "fit", "weights_checksum"]


def fit(
    *arguments: Any,
    after_epoch: Any,
    settings: Mapping[str, Any],
    checkpoint: Path | None = None,
    restart: bool = False,
    progress: bool = True,
    **options: Any,
) -> pd.DataFrame:
    """`train.fit(key=settings, path=checkpoint, watch=…)`."""
    if restart and checkpoint:
        for earlier in checkpoint.parent.glob(f"{checkpoint.stem}-????????{checkpoint.suffix}"):
            earlier.unlink()
    done = itertools.count()
    return train.fit(*arguments, key=settings, path=checkpoint, watch=lambda: after_epoch(next(done)), **options)


def checkpoint_of(path: Path | None, settings: Mapping[str, Any], epochs: int) -> Path | None:
    """`train.fit` marks the name itself."""
    return path
