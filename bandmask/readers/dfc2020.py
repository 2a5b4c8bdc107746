"""DFC2020 with semi-manual labels of 10 m, as Copernicus-Bench hands it out: a better reference than MODIS.

Layout of TorchGeo's `CopernicusBenchDFC2020S2`: `dfc2020_s1s2/` with `s2/…_s2_0_p1.tif`, `dfc/…_dfc_0_p1.tif` and the
published lists `dfc-{train,val,test}-new.csv`. Level L1C, 13 bands in SatCLIP's order, 256 × 256 px.
Source: Yokoya et al. 2020 (IEEE GRSS Data Fusion Contest 2020); Wang et al. 2025 (Copernicus-Bench).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from bandmask import files
from bandmask.packs import SPLITS, Pack, open_if_same
from bandmask.readers import landcover
from bandmask.readers.eurosat import decode_tif
from bandmask.readers.packing import read_ahead, write_pack
from bandmask.readers.streaming import Item

SHAPE = (13, 256, 256)
FOLDER, ARCHIVE = "dfc2020_s1s2", "dfc2020.zip"
LABEL_NOTE = (
    "semi-manual labels of 10 m; Copernicus-Bench counts eight classes that occur (no savanna, no snow), so compare "
    "mIoU over present classes. Its files name no scene: patches of one may be in several splits"
)


def find_dfc2020() -> Path | None:
    """The folder below `BANDMASK_DATA` (or its default) that holds Copernicus-Bench's DFC2020, if there is one."""
    root = files.data_root()
    folders = [] if root is None else [root / "dfc2020", root / "copernicus-bench", root]
    return next((f for f in folders if (f / FOLDER).is_dir() or (f / ARCHIVE).is_file()), None)


def download_dfc2020(root: Path | str) -> Path:
    """Fetch the archive through TorchGeo, which checks its md5 sum, and unpack it.

    Returns:
        `root`, as `pack_dfc2020` takes it.

    Raises:
        OSError: no network, or a damaged archive; says how to get it by hand.
    """
    from torchgeo.datasets import CopernicusBenchDFC2020S2 as Published

    try:
        Published(str(root), download=True, checksum=True)
    except (OSError, RuntimeError) as error:
        raise OSError(
            f"can't fetch {ARCHIVE} with md5 {Published.md5}: {error}. Get it from {Published.url} on a machine with a "
            f"network, and put it into {root}"
        ) from error
    return Path(root)


def pack_dfc2020(
    source: Path | str | None = None,
    path: Path | str | None = None,
    *,
    skip_bad: bool = False,
    progress: bool = True,
) -> Pack:
    """Pack DFC2020 with its pixel targets in the published splits, or open the pack if it is there.

    Classes are the ten of SEN12MS' `igbp-simplified`, so that models of one can be tested on the other; background
    has no label. `group` is the whole degree of latitude and longitude where a patch lies, as files name no scene.

    Args:
        source: folder that holds `dfc2020_s1s2` (or its zip); default: looked for below `BANDMASK_DATA`.
        path: pack folder; default `outputs/packs/dfc2020`.
        skip_bad: leave missing, unreadable and wrongly shaped files out, and list them in the card, instead of
            stopping once all are known.
        progress: show a progress bar, and the disk needed.

    Raises:
        FileNotFoundError: no DFC2020; says where it was looked for and how to get it.
        ValueError: bad files, all named; an image in two splits; channels in another order.
        OSError: not enough disk.
    """
    source = Path(source) if source else find_dfc2020()
    if source is None:
        raise FileNotFoundError(
            f"DFC2020 was not found. Set BANDMASK_DATA to a folder that holds {FOLDER}/ or {ARCHIVE} (or dfc2020/ with "
            "it), or fetch it with bandmask.readers.dfc2020.download_dfc2020(folder)"
        )
    path = Path(path) if path else files.outputs_root() / "packs" / "dfc2020"
    folder, splits = source / FOLDER, _published_splits(source)
    sizes = [[name, _size(folder / "s2" / _s2(name)), _size(folder / "dfc" / name)] for name in splits]
    checksum, options = files.checksum_of(sizes), {"splits": files.checksum_of(splits), "groups": 1}
    opened = open_if_same(path, checksum, options)
    if opened is not None and (skip_bad or "skipped" not in opened.card):
        return opened
    names = list(splits)
    index = pd.DataFrame({"file": [f"{FOLDER}/s2/{_s2(name)}" for name in names], "split": list(splits.values())})
    index["group"] = list(read_ahead(_place, [folder / "dfc" / name for name in names]))

    def read(name: str) -> Item:
        try:
            image = decode_tif((folder / "s2" / _s2(name)).read_bytes(), SHAPE)
            return image, *landcover.DFC2020.target(_read_labels(folder / "dfc" / name))
        except (ValueError, OSError) as error:
            return error

    return write_pack(
        path,
        lambda start: read_ahead(read, names[start:]),
        index,
        name="dfc2020",
        classes=landcover.DFC2020.classes,
        source="DFC2020 of Copernicus-Bench (Yokoya et al. 2020, CC BY 4.0; contains Copernicus Sentinel data)",
        source_checksum=checksum,
        order="sen12ms",
        targets=True,
        skip_bad=skip_bad,
        progress=progress,
        label_note=LABEL_NOTE,
        options=options,
    )


def _published_splits(source: Path) -> dict[str, str]:
    """`{label file: split}`, as TorchGeo reads the published lists (it unpacks the archive too, if need be)."""
    from torchgeo.datasets import CopernicusBenchDFC2020S2 as Published
    from torchgeo.datasets import DatasetNotFoundError

    splits: dict[str, str] = {}
    for split in SPLITS:
        try:
            names = [str(name) for name in Published(str(source), split=split).files]
        except DatasetNotFoundError as error:
            raise FileNotFoundError(
                f"{source} holds no {FOLDER}/dfc-{split}-new.csv and no {ARCHIVE}; fetch it with "
                "bandmask.readers.dfc2020.download_dfc2020(folder)"
            ) from error
        for name in names:
            if name in splits:
                raise ValueError(f"{name} is in the splits {splits[name]!r} and {split!r}; splits must not overlap")
            splits[name] = split
    return splits


def _read_labels(file: Path) -> np.ndarray:
    import rasterio
    from rasterio.errors import RasterioError

    try:
        with rasterio.open(file) as tif:
            if (tif.height, tif.width) != SHAPE[1:]:
                raise ValueError(f"dfc: shape {(tif.height, tif.width)}, expected {SHAPE[1:]}")
            labels: np.ndarray = tif.read(1)
    except RasterioError as error:
        raise ValueError(f"dfc: missing, truncated or not a GeoTIFF ({_size(file)} bytes)") from error
    return labels


def _place(file: Path) -> str:
    """`N48E008`: whole degrees of a patch's centre; its own name where that is not known."""
    import rasterio
    from rasterio.errors import RasterioError
    from rasterio.warp import transform_bounds

    try:
        with rasterio.open(file) as tif:
            if tif.crs is None:
                return file.stem
            bounds: Any = transform_bounds(tif.crs, "EPSG:4326", *tif.bounds)
    except RasterioError:
        return file.stem
    east, north = int(np.floor((bounds[0] + bounds[2]) / 2)), int(np.floor((bounds[1] + bounds[3]) / 2))
    return f"{'N' if north >= 0 else 'S'}{abs(north):02d}{'E' if east >= 0 else 'W'}{abs(east):03d}"


def _s2(name: str) -> str:
    return name.replace("dfc", "s2")


def _size(file: Path) -> int:
    """Bytes; −1 where there is no file, which reading it will name."""
    return file.stat().st_size if file.exists() else -1
