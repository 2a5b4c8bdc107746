"""Class maps as GeoTIFFs that a GIS opens where they belong, in their colours."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from bandmask import dfc2020, files, sen12ms
from bandmask.datasets import SAMPLE_FOLDER
from bandmask.packs import IGNORE, Pack

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
    from matplotlib.colors import to_rgba

    if len(names) != len(colours):
        raise ValueError(f"{len(names)} class names and {len(colours)} colours; there must be one a class")
    if classes.ndim != 2 or classes.dtype != np.uint8:
        raise ValueError(f"a class map is (H, W) uint8, got {classes.shape} {classes.dtype}")
    if unknown := sorted(set(np.unique(classes).tolist()) - {*range(len(names)), IGNORE}):
        raise ValueError(f"classes {unknown} have no name; there are {len(names)}, counted from 0, and 255 is no data")
    profile = {"driver": "GTiff", "count": 1, "dtype": "uint8", "nodata": IGNORE, "compress": "deflate"}
    table = {number: tuple(round(255 * part) for part in to_rgba(colour)) for number, colour in enumerate(colours)}
    with (
        files.writing(path) as partial,
        rasterio.open(
            partial, "w", **profile, height=classes.shape[0], width=classes.shape[1], crs=crs, transform=transform
        ) as tif,
    ):
        tif.write(classes, 1)
        tif.write_colormap(1, {**table, IGNORE: (255, 255, 255, 0)})
        tif.update_tags(1, **{f"class_{number}": name for number, name in enumerate(names)})
    return Path(path)
