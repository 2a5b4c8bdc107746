"""One packed array per data set: uint16 DN in SatCLIP order, memory-mapped, with labels, splits and provenance.

A pack is a folder: `images.npy` (N, 13, H, W) uint16, `index.parquet` (a row an image: file, label, split and
where it lies), `pack.json` (data set, band names, classes, source checksum, mean DN per band), and, where pixels have
labels, `targets.npy` (N, H, W) uint8. `packing` writes it.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from bandmask import bands, files

FORMAT = 1
SPLITS = ("train", "val", "test")
CIRRUS_LIMIT_DN = 50.0  # cirrus sees no ground: its mean is near 11 DN in EuroSAT, every other band's is hundreds
IGNORE = 255  # of a target: this pixel has no label
DN_PER_REFLECTANCE = 10_000.0  # L1C and L2A before processing baseline 04.00


@dataclass(frozen=True)
class Pack:
    """A packed data set, opened.

    Attributes:
        path: its folder.
        images: (N, 13, H, W) uint16 DN, SatCLIP order, read-only memory map.
        index: one row an image; `label` (int) and `split` always, `file` and others by data set. Images of one
            `group` (scene, block), where that column is there, are not independent.
        card: `pack.json`.
        targets: (N, H, W) uint8 class of each pixel, `IGNORE` where it has none, read-only memory map; None for a
            data set that has no pixel labels.
    """

    path: Path
    images: np.ndarray
    index: pd.DataFrame
    card: dict[str, Any]
    targets: np.ndarray | None = None

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names; a label, of an image or a pixel, is an index into them."""
        return tuple(self.card["classes"])

    @property
    def checksum(self) -> str:
        """Checksum of the source, which results and encoder cards carry."""
        return str(self.card["source_checksum"])

    @property
    def fingerprint(self) -> str:
        """Checksum of the card: source, rules of cutting and labelling, means. What is trained on it depends on it."""
        return files.checksum_of(self.card)

    @property
    def labels(self) -> np.ndarray:
        """(N,) int64; of a pack with targets that has no labels of its own: each image's most frequent class, or −1."""
        return self.index["label"].to_numpy(np.int64)

    def rows(self, split: str) -> np.ndarray:
        """Row numbers of a split, (n,) int64.

        Raises:
            ValueError: no such split, or no image in it.
        """
        rows = np.flatnonzero((self.index["split"] == split).to_numpy())
        if len(rows) == 0:
            counts = self.index["split"].value_counts().to_dict()
            raise ValueError(f"the pack {self.path} has no image in split {split!r}; it has {counts}")
        return rows

    def band_means(self, split: str = "train") -> np.ndarray:
        """Mean reflectance per band over a split, (13,) float64, as recorded when the pack was written."""
        self.rows(split)  # an empty split has no mean: say so
        return np.array(self.card["mean_dn"][split]) / DN_PER_REFLECTANCE


def open_pack(path: Path | str) -> Pack:
    """Open a pack, memory-mapped.

    Raises:
        FileNotFoundError: nothing there.
        ValueError: written by another format version, or damaged.
    """
    path = files.require(path, "run notebooks/01_data_exploration.ipynb, or bandmask.datasets.pack_*")
    try:
        card = json.loads((path / "pack.json").read_text())
        if not isinstance(card, dict):
            raise ValueError("pack.json holds no mapping")
        images = np.load(path / "images.npy", mmap_mode="r")
        index = pd.read_parquet(path / "index.parquet")
        targets = np.load(path / "targets.npy", mmap_mode="r") if card.get("targets") else None
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is not a whole pack ({error}); delete the folder and pack again") from error
    fits = len(images) == len(index)
    if targets is not None:
        fits = fits and targets.dtype == np.uint8 and targets.shape == (len(images), *images.shape[2:])
    if card.get("format") != FORMAT or card.get("bands") != list(bands.NAMES) or not fits:
        raise ValueError(
            f"{path} was written in another pack format ({card.get('format')!r}, this is {FORMAT}), or its parts "
            "don't fit one another; delete the folder and pack again"
        )
    return Pack(path, images, index, card, targets)


def fitting_order(mean_dn: Sequence[float] | np.ndarray) -> tuple[str, float]:
    """The channel order that fits best, and how sure that is (0 to 1; at most 0.5: no known order fits).

    Cirrus (B10, 1375 nm) sees no ground and is the darkest band, be the place arid, cloudy or open sea, while the bands
    that stand there in another order see it. So the evidence is the ratio of the darkest other channel to B10: on 997
    EuroSAT images one by one its sign is right for all, which no fixed number of DN is (B10's mean is 6 to 257 DN
    there and on cloudy or arid tiles).

    Args:
        mean_dn: mean DN per channel as stored, (13,), of an image or a data set; NaN for a channel without values.
    """
    means = np.asarray(mean_dn, np.float64)
    evidence = {}
    for name, names in bands.ORDERS.items():
        cirrus = names.index("B10")
        others = np.delete(means, cirrus)
        darkest = others[np.isfinite(others)].min(initial=np.inf)
        evidence[name] = float(np.log((max(darkest, 0) + 5) / (max(means[cirrus], 0) + 5)))  # 5 DN: both may be 0
    known = {name: value for name, value in evidence.items() if np.isfinite(value)}
    if not known:
        return "satclip", 0.5
    best = max(known, key=lambda name: known[name])
    return best, float(1 / (1 + np.exp(-3 * known[best])))


def check_band_order(mean_dn: Sequence[float] | np.ndarray, order: str = "satclip", strict: bool = True) -> None:
    """The physical guard: the channel read as B10 is the darkest, see `fitting_order`.

    Args:
        mean_dn: mean DN per band over an image or a data set, (13,), in SatCLIP order; NaN for a band without values
            (if that is B10, nothing can be said and nothing is).
        order: the file order it was read with.
        strict: raise; else warn.

    Raises:
        ValueError: another order fits, which is named, or none does.
    """
    means = np.asarray(mean_dn, np.float64)
    if np.isnan(means[bands.NAMES.index("B10")]):
        return
    fits, sure = fitting_order(means[bands.reorder("satclip", order)])  # back to the order of the file
    if sure > 0.5 and bands.ORDERS[fits] == bands.ORDERS[order]:
        return
    advice = f"it would fit if read as order={fits!r} ({sure:.0%} sure)" if sure > 0.5 else "no known order fits"
    listed = ", ".join(f"{name} {value:.0f}" for name, value in zip(bands.NAMES, means, strict=True))
    problem = (
        f"band order is wrong: read as {order!r}, B10 (cirrus, which sees no ground) should be the darkest channel; "
        f"{advice}. Mean DN: {listed}"
    )
    if strict:
        raise ValueError(problem)
    warnings.warn(problem, stacklevel=3)


def open_if_same(path: Path, checksum: str, options: dict[str, Any]) -> Pack | None:
    """The pack at `path`, if it was made from this source with these options; else None, and it may be made anew."""
    if not (path / "pack.json").exists():
        return None
    try:
        pack = open_pack(path)
    except ValueError:
        return None  # damaged, or another format: made anew, and replaced only once the new one is whole
    same = pack.checksum == checksum and pack.card.get("options") == options
    return pack if same else None
