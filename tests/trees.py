"""Generated trees in the official layouts of SEN12MS and DFC2020, for tests and benchmarks. No satellite saw them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import rasterio
from rasterio.transform import from_origin

SPRING = "ROIs1158_spring"
CIRRUS = 10  # B10's place in SatCLIP's order, which is SEN12MS'


def write_tif(path: Path, array: np.ndarray, *, corner: tuple[float, float] = (500_000.0, 4_000_000.0)) -> Path:
    """(bands, H, W) as a GeoTIFF of 10 m in UTM zone 32N."""
    path.parent.mkdir(parents=True, exist_ok=True)
    count, height, width = array.shape
    profile = {"driver": "GTiff", "count": count, "height": height, "width": width, "dtype": array.dtype}
    with rasterio.open(path, "w", crs="EPSG:32632", transform=from_origin(*corner, 10, 10), **profile) as tif:
        tif.write(array)
    return path


def generated_image(size: int, seed: int = 0) -> np.ndarray:
    """(13, size, size) uint16 DN in SatCLIP's order, generated: no two bands alike, B10 dark."""
    draw = np.random.default_rng(seed)
    level = 800 + 150 * np.arange(13)[:, None, None] + 40 * (seed % 20)
    image = draw.normal(level, 60, (13, size, size)).clip(100, 9000).astype(np.uint16)
    image[CIRRUS] = draw.integers(3, 20, (size, size))
    return image


def generated_codes(size: int, seed: int = 0) -> np.ndarray:
    """(4, size, size) uint16, generated land cover in large cells: IGBP codes, and three layers that nobody reads."""
    cells = np.random.default_rng(1000 + seed).integers(1, 18, (4, 4, 4))
    return cells.repeat(-(-size // 4), 1).repeat(-(-size // 4), 2)[:, :size, :size].astype(np.uint16)


def s2_file(root: Path, scene: int, patch: int, kind: str = "s2") -> Path:
    return root / SPRING / f"{kind}_{scene}" / f"{SPRING}_{kind}_{scene}_p{patch}.tif"


def lc_file(root: Path, scene: int, patch: int) -> Path:
    return s2_file(root, scene, patch, "lc")


def sen12ms_tree(
    root: Path,
    scenes: Iterable[int] = range(1, 8),
    patches: int = 4,
    *,
    size: int = 16,
    channels: list[int] | None = None,
) -> Path:
    """Generated pairs in SEN12MS' layout; `channels` puts the bands of the files into another order."""
    for scene in scenes:
        for patch in range(1, patches + 1):
            image = generated_image(size, seed=100 * scene + patch)
            write_tif(s2_file(root, scene, patch), image if channels is None else image[channels])
            write_tif(lc_file(root, scene, patch), generated_codes(size, seed=100 * scene + patch))
    return root


def dfc2020_tree(root: Path, per_split: int = 4, *, size: int = 16) -> Path:
    """Generated pairs and lists in the layout of TorchGeo's `CopernicusBenchDFC2020S2`, at two places on Earth."""
    folder = root / "dfc2020_s1s2"
    for number, split in enumerate(("train", "val", "test")):
        names = [f"ROIs0000_test_dfc_0_p{10 * i + number}.tif" for i in range(per_split)]
        for i, name in enumerate(names):
            corner = (500_000.0 + 400_000 * (i % 2), 4_000_000.0)
            write_tif(folder / "s2" / name.replace("dfc", "s2"), generated_image(size, 10 * i + number), corner=corner)
            labels = np.random.default_rng(10 * i + number).choice([0, 1, 2, 4, 5, 6, 7, 9, 10], (1, size, size))
            write_tif(folder / "dfc" / name, labels.astype(np.int32), corner=corner)
        (folder / f"dfc-{split}-new.csv").write_text("".join(f"{name}\n" for name in names))
    return root
