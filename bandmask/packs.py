"""One packed array per data set: uint16 DN in SatCLIP order, memory-mapped, with labels, splits and provenance.

A pack is a folder: `images.npy` (N, 13, H, W) uint16, `index.parquet` (a row an image: file, label, split and
where it lies), `pack.json` (data set, band names, classes, source checksum, mean DN per band).
It is written under a temporary name and renamed, so a pack that exists is whole.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from bandmask import bands, files

FORMAT = 1
SPLITS = ("train", "val", "test")
CIRRUS_LIMIT_DN = 50.0  # cirrus sees no ground: its mean is near 11 DN in EuroSAT, every other band's is hundreds
DN_PER_REFLECTANCE = 10_000.0  # L1C and L2A before processing baseline 04.00


@dataclass(frozen=True)
class Pack:
    """A packed data set, opened.

    Attributes:
        path: its folder.
        images: (N, 13, H, W) uint16 DN, SatCLIP order, read-only memory map.
        index: one row an image; `label` (int) and `split` always, `file` and others by data set.
        card: `pack.json`.
    """

    path: Path
    images: np.ndarray
    index: pd.DataFrame
    card: dict[str, Any]

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names; a label is an index into them."""
        return tuple(self.card["classes"])

    @property
    def checksum(self) -> str:
        """Checksum of the source, which results and encoder cards carry."""
        return str(self.card["source_checksum"])

    @property
    def labels(self) -> np.ndarray:
        """(N,) int64."""
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


def write_pack(
    path: Path | str,
    images: Iterable[np.ndarray],
    index: pd.DataFrame,
    *,
    name: str,
    classes: Sequence[str],
    source: str,
    source_checksum: str,
    order: str = "satclip",
    strict_guard: bool = True,
    **card: Any,
) -> Pack:
    """Write and open a pack. Images are streamed, so memory stays flat; nothing is left behind if this fails.

    Args:
        path: folder to make; an older pack there is replaced only once the new one is whole.
        images: one (13, H, W) uint16 array a row of `index`, in its order, channels in `order`.
        index: columns `label` and `split` at least.
        name: of the data set.
        classes: names; labels index into them.
        source: where it came from, for people.
        source_checksum: of the source.
        order: file order of the channels, a key of `bands.ORDERS`.
        strict_guard: refuse a pack whose cirrus channel is not where `order` says; False warns instead, for a
            single scene (open sea alone can break the rule).
        card: further entries of `pack.json`.

    Raises:
        ValueError: images of different shapes, or channels in another order than `order`.
        OSError: the folder can't be written.
    """
    path, count = Path(path), len(index)
    _check_index(index, classes)
    if path.exists() and not (path / "pack.json").exists() and not (path.is_dir() and not any(path.iterdir())):
        raise ValueError(f"{path} is there and is no pack; it is not overwritten. Choose another folder for the pack")
    indices = bands.reorder(order)
    totals: dict[str, np.ndarray] = {}
    with files.writing(path) as partial:
        partial.mkdir(parents=True)
        with (partial / "images.npy").open("wb") as file:  # not a memory map: on a full disk that dies of SIGBUS
            shape: tuple[int, ...] = ()
            written = 0
            for row, image in enumerate(images):
                if not shape:
                    shape = (len(bands.NAMES), *image.shape[1:])
                    header = {"descr": "<u2", "fortran_order": False, "shape": (count, *shape)}
                    np.lib.format.write_array_header_1_0(file, header)
                if image.shape != shape or image.ndim != 3 or image.dtype != np.uint16:
                    raise ValueError(
                        f"image {row} is {image.shape} {image.dtype}; a pack holds (13, H, W) uint16 of one size, "
                        f"here {shape}"
                    )
                if row == count:
                    raise ValueError(f"more than {count} images for {count} rows; there must be one a row")
                ordered = np.ascontiguousarray(image[indices], dtype="<u2")
                file.write(ordered.data)
                split = str(index["split"].iloc[row])
                totals[split] = totals.get(split, 0) + ordered.mean(axis=(1, 2), dtype=np.float64)
                written += 1
        if written != count:
            raise ValueError(f"{written} images for {count} rows; there must be one a row")
        counts = index["split"].value_counts()
        mean_dn = {split: total / counts[split] for split, total in totals.items()}
        overall = sum(totals.values()) / count
        check_band_order(np.asarray(overall), order=order, strict=strict_guard)
        index.to_parquet(partial / "index.parquet", index=False)
        everything = {
            **card,
            "format": FORMAT,
            "dataset": name,
            "bands": list(bands.NAMES),
            "classes": list(classes),
            "source": source,
            "source_checksum": source_checksum,
            "stored_order": order,
            "mean_dn": {split: [round(float(v), 4) for v in mean] for split, mean in mean_dn.items()},
        }
        (partial / "pack.json").write_text(json.dumps(everything, indent=2))
    return open_pack(path)


def _check_index(index: pd.DataFrame, classes: Sequence[str]) -> None:
    if missing := {"label", "split"} - set(index.columns):
        raise ValueError(f"the index of a pack needs columns 'label' and 'split'; {sorted(missing)} are not there")
    if index.empty:
        raise ValueError("0 rows, so no image: a pack holds one at least")
    if wrong := sorted(set(index["label"]) - set(range(len(classes)))):
        raise ValueError(f"labels {wrong[:5]} have no class; there are {len(classes)}, counted from 0")
    if unknown := set(index["split"]) - set(SPLITS):
        raise ValueError(f"unknown split {sorted(map(str, unknown))}; available: {', '.join(SPLITS)}")


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
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is not a whole pack ({error}); delete the folder and pack again") from error
    if card.get("format") != FORMAT or card.get("bands") != list(bands.NAMES) or len(images) != len(index):
        raise ValueError(
            f"{path} was written in another pack format ({card.get('format')!r}, this is {FORMAT}), or its parts "
            "don't fit one another; delete the folder and pack again"
        )
    return Pack(path, images, index, card)


def check_band_order(mean_dn: np.ndarray, *, order: str = "satclip", strict: bool = True) -> None:
    """The physical guard: the channel called B10 is dark, mean below 50 DN, and no other is.

    Args:
        mean_dn: mean DN per channel over a data set, (13,), in SatCLIP order.
        order: the file order it was read with, for the message.
        strict: raise; else warn.

    Raises:
        ValueError: the rule is broken; names the order that would fit, if one does.
    """
    dark = [bands.NAMES[i] for i in np.flatnonzero(np.asarray(mean_dn) < CIRRUS_LIMIT_DN)]
    if dark == ["B10"]:
        return
    means = ", ".join(f"{name} {value:.0f}" for name, value in zip(bands.NAMES, mean_dn, strict=True))
    advice = "no known order fits: check how the channels were written"
    if len(dark) == 1:
        stored = np.asarray(mean_dn)[bands.reorder("satclip", order)]  # back to the order of the file
        channel = int(np.argmin(stored))
        fitting = [name for name, names in bands.ORDERS.items() if names[channel] == "B10"]
        if fitting:
            advice = f"it would fit if read as order={fitting[0]!r}"
    problem = (
        f"band order is wrong: read as {order!r}, cirrus (B10) should be the one channel with a mean below "
        f"{CIRRUS_LIMIT_DN:.0f} DN, but the dark channels are {dark or 'none'}; {advice}. Mean DN: {means}"
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
