"""A scene of one's own as one lazy array on the 10 m grid; pixels without a value are hidden, which is NaN here.

Only what is asked for is read: `scene.isel(y=slice(0, 256), x=slice(0, 256)).values` reads 13 windows. Arithmetic on
the whole scene reads the whole scene: cut first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from xarray.backends import BackendArray
from xarray.core import indexing

from bandmask import bands
from bandmask.readers.bandfiles import Grid, bands_without_values, common_grid, grid_of, hidden_as_nan, unreadable
from bandmask.readers.products import Layer, Product, find_product


def open_scene(
    path: Path | str | Sequence[Path | str],
    *,
    order: str | Sequence[str] | None = None,
    offset: float | None = None,
    hide: str | Sequence[str] = (),
    hide_missing: bool = False,
) -> xr.DataArray:
    """Open a Sentinel-2 scene: (band, y, x) float32 DN, 13 bands in SatCLIP order, lazily; hidden pixels are NaN.

    Bands of 20 and 60 m are brought to the 10 m grid by bilinear interpolation of coordinates. A pixel is hidden where
    the file holds 0, its own no-data value or 65535 (saturated), and where it would be interpolated from such a one.
    The radiometric offset of processing baseline 04.00 and later is applied, so DN / 10000 is reflectance always.

    Args:
        path: a stacked GeoTIFF, a folder or list of single-band files, or a SAFE folder or zip, L1C or L2A.
        order: of a stack that doesn't name its bands: `satclip`, `eurosat` or the names.
        offset: DN to add to files without ESA's metadata, such as −1000.
        hide: bands to treat as lost though they are there.
        hide_missing: open a scene that lacks bands, which are hidden then. B10 of L2A, which no file has, always is.

    Returns:
        Coordinates `band` (ESA names), `wavelength_nm`, `y`, `x`; CRS and transform by rioxarray; attributes `units`,
        `dn_per_reflectance`, `level`, `hidden_bands` (tuple), `source`, `processing_baseline` and `note`.

    Raises:
        FileNotFoundError: nothing there.
        ValueError: unreadable; bands missing, twice or of unknown order; no coordinate system; grids that don't belong
            together; 8 bit; values that are reflectance already.
    """
    product = find_product(path, order=order, offset=offset)
    if not product.layers:
        raise ValueError(f"{product.source} holds no band")
    grids = {layer.band: grid_of(layer, product.source) for layer in product.layers}
    grid = common_grid(product.source, grids)
    empty = () if product.documented else bands_without_values(product)
    missing = [name for name in bands.NAMES if name not in grids]
    no_cirrus = ["B10"] if product.level == "L2A" and "B10" in missing else []
    if (lacking := [name for name in missing if name not in no_cirrus]) and not hide_missing:
        raise ValueError(
            f"{product.source} lacks {', '.join(lacking)}; add the files, or open it with hide_missing=True, which "
            "hides these bands"
        )
    hide = bands.parse_bands(hide)
    hidden = tuple(name for name in bands.NAMES if {name} & {*missing, *hide, *empty})
    if len(hidden) == len(bands.NAMES):
        raise ValueError(f"{product.source}: every band is hidden; leave one visible")
    notes = [f"L2A has no B10: it is hidden, not zero ({len(hidden)} of 13 bands hidden)"] if no_cirrus else []
    notes += [f"{name} holds no value: it is hidden" for name in empty]
    layers = {layer.band: layer for layer in product.layers}
    sources = [None if n in hidden else _Source.of(layers[n], grids[n], grid) for n in bands.NAMES]
    return _as_array(_Bands(sources, grid.shape), grid, product, hidden, "; ".join(notes))


def _as_array(lazy: _Bands, grid: Grid, product: Product, hidden: tuple[str, ...], note: str) -> xr.DataArray:
    scene = xr.DataArray(
        xr.Variable(("band", "y", "x"), indexing.LazilyIndexedArray(lazy)),
        coords={
            "band": list(bands.NAMES),
            "wavelength_nm": ("band", [band.wavelength_nm for band in bands.BANDS]),
            "y": grid.transform.f + grid.transform.e * (np.arange(grid.shape[0]) + 0.5),
            "x": grid.transform.c + grid.transform.a * (np.arange(grid.shape[1]) + 0.5),
        },
        name="reflectance_dn",
    )
    scene.rio.write_crs(grid.crs, inplace=True)  # in place: a copy would be read
    scene.rio.write_transform(grid.transform, inplace=True)
    scene.attrs.update(
        units="DN",
        dn_per_reflectance=10_000,
        level=product.level,
        hidden_bands=hidden,
        source=product.source,
        processing_baseline=product.baseline or "unknown",
        note=note,
    )
    return scene


@dataclass(frozen=True)
class _Source:
    """One band, read on the scene's grid."""

    layer: Layer
    lazy: xr.DataArray  # of rioxarray: it keeps the file open, and reads windows
    nodata: float | None
    scale: tuple[float, float]  # scene pixels to pixels of the file, down and across
    shift: tuple[float, float]

    @classmethod
    def of(cls, layer: Layer, own: Grid, scene: Grid) -> _Source:
        import rioxarray

        lazy = rioxarray.open_rasterio(layer.address, masked=False, cache=False)
        assert isinstance(lazy, xr.DataArray)
        there, here = own.transform, scene.transform
        scale = here.e / there.e, here.a / there.a
        shift = (here.f - there.f) / there.e, (here.c - there.c) / there.a
        return cls(layer, lazy.isel(band=layer.channel - 1), own.nodata, scale, shift)

    def read(self, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
        """DN (rows, columns) float32, NaN where hidden, or interpolated from a hidden pixel."""
        from rasterio.errors import RasterioIOError

        down, across = (
            _neighbours(wanted, scale, shift, size)
            for wanted, scale, shift, size in zip((rows, columns), self.scale, self.shift, self.lazy.shape, strict=True)
        )
        (top, bottom), (left, right) = ((first.min(), second.max() + 1) for first, second, _ in (down, across))
        try:
            block = self.lazy[top:bottom, left:right].values
        except RasterioIOError as error:
            unreadable(self.layer, error)
        values = hidden_as_nan(block, self.nodata)
        for axis, (first, second, weight), start in ((0, down, top), (1, across, left)):
            before = values.take(first - start, axis)
            if weight.any():
                part = weight.reshape((-1, 1) if axis == 0 else (1, -1))
                before = before * (1 - part) + values.take(second - start, axis) * part
            values = before
        return values + np.float32(self.layer.offset)


def _neighbours(wanted: np.ndarray, scale: float, shift: float, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The two pixels of a file that a scene's pixel lies between, and the share of the second; edges repeat."""
    place = np.round((wanted + 0.5) * scale + shift - 0.5, 6)  # of pixel centres; rounding makes whole ones whole
    first = np.floor(place).astype(int)
    weight = (place - first).astype(np.float32)
    second = np.where(weight > 0, first + 1, first)  # a pixel of no weight must not hide another
    return first.clip(0, size - 1), second.clip(0, size - 1), weight


class _Bands(BackendArray):
    """What xarray asks for values, window by window; a band without a source is NaN throughout."""

    def __init__(self, sources: Sequence[_Source | None], shape: tuple[int, int]) -> None:
        self.sources = sources
        self.shape = (len(sources), *shape)
        self.dtype = np.dtype(np.float32)

    def __getitem__(self, key: indexing.ExplicitIndexer) -> Any:
        return indexing.explicit_indexing_adapter(key, self.shape, indexing.IndexingSupport.OUTER, self._read)

    def _read(self, key: tuple[Any, ...]) -> np.ndarray:
        chosen = [np.arange(size)[part] for size, part in zip(self.shape, key, strict=True)]
        numbers, rows, columns = map(np.atleast_1d, chosen)
        values = np.full((len(numbers), len(rows), len(columns)), np.nan, np.float32)
        if values.size:
            for place, number in enumerate(numbers):
                if (source := self.sources[number]) is not None:
                    values[place] = source.read(rows, columns)
        return values.reshape([len(part) for part in chosen if part.ndim])
