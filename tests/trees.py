"""Generated trees in the official layouts of SEN12MS and DFC2020, for tests and benchmarks. No satellite saw them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import rasterio
from rasterio.transform import from_origin

SPRING = "ROIs1158_spring"
CIRRUS = 10  # B10's place in SatCLIP's order, which is SEN12MS'
IGBP_CODES = tuple(range(1, 18))
LAND_COVER_CODES = (1, 2, 3, 11, 12, 13, 14, 15, 16, 21, 22, 31, 32, 41, 42, 43)
LAND_USE_CODES = (1, 2, 3, 9, 10, 20, 25, 30, 35, 36, 40)
HYDROLOGY_CODES = (1, 2, 3, 10, 20, 27, 30, 40, 50, 51)


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
    """(4, size, size) uint16, generated land cover: IGBP, LCCS land cover, land use and hydrology in large cells."""
    draw = np.random.default_rng(1000 + seed)
    cells = -(-size // 4)
    legends = (IGBP_CODES, LAND_COVER_CODES, LAND_USE_CODES, HYDROLOGY_CODES)
    layers = [np.kron(draw.choice(codes, (4, 4)), np.ones((cells, cells))) for codes in legends]
    return np.stack(layers)[:, :size, :size].astype(np.uint16)


def s2_file(root: Path, scene: int, patch: int, season: str = SPRING, kind: str = "s2") -> Path:
    return root / season / f"{kind}_{scene}" / f"{season}_{kind}_{scene}_p{patch}.tif"


def lc_file(root: Path, scene: int, patch: int, season: str = SPRING) -> Path:
    return s2_file(root, scene, patch, season, "lc")


def sen12ms_tree(
    root: Path,
    scenes: Iterable[int] = range(1, 8),
    patches: int = 4,
    *,
    size: int = 16,
    season: str = SPRING,
    channels: list[int] | None = None,
) -> Path:
    """Generated pairs in SEN12MS' layout; `channels` puts the bands of the files into another order."""
    for scene in scenes:
        for patch in range(1, patches + 1):
            image = generated_image(size, seed=100 * scene + patch)
            write_tif(s2_file(root, scene, patch, season), image if channels is None else image[channels])
            write_tif(lc_file(root, scene, patch, season), generated_codes(size, seed=100 * scene + patch))
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
