"""What a file must fulfil to be a band of a scene: a grid of Sentinel-2's, and numbers that are DN."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, NoReturn

import numpy as np

from bandmask.packs import CIRRUS_LIMIT_DN
from bandmask.readers.products import Layer, Product

if TYPE_CHECKING:
    from rasterio import Affine
    from rasterio.crs import CRS

GSD_M = 10.0  # of the grid that a scene is brought to, and that encoders here were trained on
SATURATED = 65_535
_RATIOS = (1, 2, 6)  # of Sentinel-2's grids of 10, 20 and 60 m
_PROBE = 64  # pixels a side, of the thinned-out copy that values are judged by


@dataclass(frozen=True)
class Grid:
    """Where the pixels of a file lie, and what it calls no data."""

    crs: CRS
    transform: Affine
    shape: tuple[int, int]
    nodata: float | None

    @property
    def gsd_m(self) -> float:
        """Side of a pixel in metres."""
        return float(self.transform.a)

    @property
    def bounds(self) -> tuple[float, float, float, float]:
        """West, south, east, north."""
        t, (height, width) = self.transform, self.shape
        return t.c, t.f + t.e * height, t.c + t.a * width, t.f


def grid_of(layer: Layer, source: str) -> Grid:
    """The grid of a band's file.

    Raises:
        ValueError: unreadable; several bands where one is expected; 8 bit; no coordinate system, or none in metres; a
            rotated grid.
    """
    import rasterio
    from rasterio.errors import RasterioIOError

    try:
        with rasterio.open(layer.address) as file:
            crs, transform, shape = file.crs, file.transform, file.shape
            kind, nodata, count = file.dtypes[layer.channel - 1], file.nodata, file.count
    except RasterioIOError as error:
        unreadable(layer, error)
    what = f"{layer.band} of {source}"
    if count > 1 and source != layer.address:
        raise ValueError(f"{what} lies in a file of {count} bands ({layer.address}); expected one band")
    if kind in ("uint8", "int8"):
        raise ValueError(f"{what} is 8 bit, a picture and no measurement; take the original product, 16 bit")
    if kind.startswith("complex"):
        raise ValueError(f"{what} is {kind}; expected DN, 16 bit or float")
    if crs is None:
        raise ValueError(f"{what} has no coordinate system, so it lies nowhere; write the one it was made in")
    if not crs.is_projected or not math.isclose(crs.linear_units_factor[1], 1.0):
        raise ValueError(f"{what} is in {crs.to_string()}; expected metres: reproject it to its UTM zone, 10 m")
    if transform.b or transform.d or transform.a <= 0 or not math.isclose(transform.a, -transform.e):
        raise ValueError(f"{what} has a rotated or uneven grid ({tuple(transform)[:6]}); warp it north up, 10 m")
    return Grid(crs, transform, shape, nodata)


def common_grid(source: str, grids: dict[str, Grid]) -> Grid:
    """The grid of the finest band, 10 m, which the others lie on in Sentinel-2's way.

    Raises:
        ValueError: no band of 10 m; coordinate systems or pixel sizes that don't belong together; a band that doesn't
            cover the finest one.
    """
    finest = min(grids, key=lambda name: grids[name].gsd_m)
    scene = grids[finest]
    if not math.isclose(scene.gsd_m, GSD_M, rel_tol=1e-3):
        raise ValueError(
            f"{source}: the finest pixels, of {finest}, measure {scene.gsd_m:g} m; a scene is read on a grid of 10 m. "
            "Add the bands of 10 m, or resample it"
        )
    height, width = scene.shape
    for name, grid in grids.items():
        if grid.crs != scene.crs:
            raise ValueError(
                f"{source} mixes grids: {name} is in {grid.crs.to_string()}, {finest} in {scene.crs.to_string()}; give "
                "bands of one tile"
            )
        if not any(math.isclose(grid.gsd_m, GSD_M * ratio, rel_tol=1e-3) for ratio in _RATIOS):
            raise ValueError(
                f"{source} mixes grids: pixels of {name} measure {grid.gsd_m:g} m; Sentinel-2 has 10, 20 and 60 m"
            )
        west, south, east, north = (own - wanted for own, wanted in zip(grid.bounds, scene.bounds, strict=True))
        if max(west, south, -east, -north) > grid.gsd_m / 2:
            raise ValueError(
                f"{source}: {name} has the wrong size: {grid.shape[1]} × {grid.shape[0]} pixels of {grid.gsd_m:g} m "
                f"don't cover the {width} × {height} pixels of {finest}; give bands of one cut"
            )
    return scene


def bands_without_values(product: Product) -> tuple[str, ...]:
    """Bands without one value in a thinned-out copy of the scene, which is judged on the way.

    Raises:
        ValueError: no band has a value; the numbers are reflectance or of 8 bit; B10 shows an offset that nobody gave.
    """
    import rasterio
    from rasterio.errors import RasterioIOError

    valid: dict[str, np.ndarray] = {}
    for layer in product.layers:
        try:
            with rasterio.open(layer.address) as file:
                shape = tuple(min(_PROBE, side) for side in file.shape)
                dn = hidden_as_nan(file.read(layer.channel, out_shape=shape), file.nodata)
        except RasterioIOError as error:
            unreadable(layer, error)
        valid[layer.band] = dn[np.isfinite(dn)]
    top = max((float(dn.max()) for dn in valid.values() if dn.size), default=None)
    if top is None:
        raise ValueError(f"{product.source} holds no value: every pixel looked at is 0, no data or saturated")
    if top <= 3:
        raise ValueError(
            f"{product.source} is in reflectance already (largest value {top:.3g}); expected DN: multiply by 10000"
        )
    if top <= 255:
        raise ValueError(
            f"{product.source} is 8 bit (largest value {top:.0f}), a picture and no measurement; take the original "
            "product, 16 bit"
        )
    cirrus = valid.get("B10", np.empty(0))
    if cirrus.size and not product.layers[0].offset and 0 < np.median(cirrus) - 900 < 100 + 4 * CIRRUS_LIMIT_DN:
        raise ValueError(
            f"{product.source}: B10, which sees no ground, is at {np.median(cirrus):.0f} DN, so 1000 DN were added, as "
            "from processing baseline 04.00 on. Open the whole SAFE product, or give offset=-1000"
        )
    return tuple(name for name, dn in valid.items() if not dn.size)


def hidden_as_nan(dn: np.ndarray, nodata: float | None) -> np.ndarray:
    """DN as float32, with NaN where they are 0, saturated, no data or not finite."""
    values = dn.astype(np.float32)
    hidden = (dn == 0) | (dn == SATURATED)
    if nodata is not None:
        hidden |= dn == nodata
    values[hidden] = np.nan
    values[np.isinf(values)] = np.nan
    return values


def unreadable(layer: Layer, error: Exception) -> NoReturn:
    """Raise a ValueError that names the file."""
    raise ValueError(f"{layer.band} can't be read from {layer.address} ({error}); fetch the file again") from error
