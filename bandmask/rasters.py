"""Class maps as GeoTIFFs that a GIS opens where they belong, in their colours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING
from xml.sax.saxutils import escape

import numpy as np

from bandmask import files
from bandmask.datasets import SAMPLE_FOLDER
from bandmask.packs import IGNORE, Pack
from bandmask.readers import dfc2020, sen12ms

if TYPE_CHECKING:
    from rasterio import Affine
    from rasterio.crs import CRS


def georeference(pack: Pack, row: int, source: Path | str | None = None) -> tuple[CRS, Affine]:
    """Coordinate system and transform of a pack's image, read from the file it was cut from.

    Args:
        pack: of the sample, SEN12MS or DFC2020.
        row: of the image.
        source: folder of the data set; default: looked for below `BANDMASK_DATA`.

    Raises:
        FileNotFoundError: that file is not on this machine any more.
        ValueError: a data set whose files hold no place, or can't be reached one by one.
    """
    import rasterio
    from rasterio.windows import Window, transform

    entry, dataset = pack.index.iloc[row], pack.card["dataset"]
    finders = {"sen12ms": sen12ms.find_sen12ms, "dfc2020": dfc2020.find_dfc2020}
    if dataset.startswith("sample"):
        path, corner = SAMPLE_FOLDER / "B02.tif", (int(entry["col"]), int(entry["row"]))
    elif source is not None or dataset in finders:
        path, corner = Path(source or finders[dataset]() or ".") / str(entry["file"]), (0, 0)
    else:
        raise ValueError(f"where images of {dataset!r} lie is not known; available: sample, {', '.join(finders)}")
    with rasterio.open(files.require(path, "put the data set back that it belongs to (BANDMASK_DATA)")) as tif:
        if tif.crs is None:
            raise ValueError(f"{path} has no coordinate system, so a map of it would lie nowhere")
        return tif.crs, transform(Window(*corner, 1, 1), tif.transform)


def write_class_map(
    path: Path | str,
    classes: np.ndarray,
    names: Sequence[str],
    colours: Sequence[str],
    *,
    crs: CRS,
    transform: Affine,
) -> Path:
    """Write a class map (H, W) uint8 with its CRS, a colour table and the classes' names; 255 is no data.

    Args:
        path: a `.tif`.
        classes: indices into `names`, or 255.
        names: kept as tags `class_0`, `class_1`, …
        colours: hex, one a class.
        crs: coordinate system.
        transform: of the map's own pixels.

    Raises:
        ValueError: a class without a name, or names and colours that don't match.
    """
    import rasterio

    if len(names) != len(colours):
        raise ValueError(f"{len(names)} class names and {len(colours)} colours; there must be one a class")
    if classes.ndim != 2 or classes.dtype != np.uint8:
        raise ValueError(f"a class map is (H, W) uint8, got {classes.shape} {classes.dtype}")
    if unknown := sorted(set(np.unique(classes).tolist()) - {*range(len(names)), IGNORE}):
        raise ValueError(f"classes {unknown} have no name; there are {len(names)}, counted from 0, and 255 is no data")
    profile = {"driver": "GTiff", "count": 1, "dtype": "uint8", "nodata": IGNORE, "compress": "deflate"}
    with (
        files.writing(path) as partial,
        rasterio.open(
            partial, "w", **profile, height=classes.shape[0], width=classes.shape[1], crs=crs, transform=transform
        ) as tif,
    ):
        tif.write(classes, 1)
        tif.write_colormap(1, colour_table(colours))
        tif.update_tags(1, **class_tags(names))
    return Path(path)


def colour_table(colours: Sequence[str]) -> dict[int, tuple[int, int, int, int]]:
    """GDAL's table of hex colours, one a class; 255, no data, is transparent."""
    from matplotlib.colors import to_rgb

    shares = [to_rgb(colour) for colour in colours]
    table = {number: (round(255 * r), round(255 * g), round(255 * b), 255) for number, (r, g, b) in enumerate(shares)}
    return {**table, IGNORE: (255, 255, 255, 0)}


def class_tags(names: Sequence[str]) -> dict[str, str]:
    """Names of classes as a file's tags: `class_0`, `class_1`, …"""
    return {f"class_{number}": name for number, name in enumerate(names)}


def write_class_names(path: Path | str, names: Sequence[str]) -> Path:
    """Write the names of a class map's classes where GDAL and QGIS look for them: `<path>.aux.xml`, beside it."""
    categories = "".join(f"      <Category>{escape(name)}</Category>\n" for name in names)
    text = (
        '<PAMDataset>\n  <PAMRasterBand band="1">\n    <CategoryNames>\n'
        f"{categories}    </CategoryNames>\n  </PAMRasterBand>\n</PAMDataset>\n"
    )
    path = Path(path)
    with files.writing(path.with_name(f"{path.name}.aux.xml")) as partial:
        partial.write_text(text, encoding="utf-8")
    return path.with_name(f"{path.name}.aux.xml")


def copy_as_cog(
    source: Path | str, path: Path | str, *, resampling: str, tags: Mapping[str, str] | None = None
) -> None:
    """Copy a GeoTIFF as a cloud-optimized one: tiled, with overviews, so that a part of it is read fast.

    It writes to `path` at once; give one inside `files.writing`.

    Args:
        source: a GeoTIFF, whose colours, tags and no-data value are kept.
        path: of the copy.
        resampling: of the overviews: `mode` for classes, `average` for measures.
        tags: added to those of the source, which is changed.

    Raises:
        OSError: GDAL failed, or what was written reads otherwise, as on a full disk.
    """
    import rasterio
    from rasterio.shutil import copy

    options = {"compress": "DEFLATE", "overview_resampling": resampling, "num_threads": "ALL_CPUS"}
    try:
        with rasterio.open(source, "r+") as tif:
            tif.update_tags(**(tags or {}))
        copy(source, path, driver="COG", **options)
        same = checksum(path) == checksum(source)  # GDAL only prints that a disk ran full while a file was closed
    except Exception as error:  # of rasterio's many kinds, the way out is the same
        raise OSError(f"GDAL failed: {error}") from error
    if not same:
        raise OSError("what was written reads otherwise")


def checksum(path: Path | str) -> int:
    """GDAL's checksum of a raster's first band, read from disk."""
    import rasterio

    with rasterio.open(path) as tif:
        return int(tif.checksum(1))
