"""Tiles spread over a scene, as many as are needed to judge it: a product of 10,980 pixels a side is not read whole."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from bandmask import bands
from bandmask.diagnosis.sketches import complete
from bandmask.packs import DN_PER_REFLECTANCE

if TYPE_CHECKING:
    import xarray as xr

_TRIED = 4  # places tried for each tile wanted: many of a swath's tiles lie outside of it


def spread_tiles(scene: xr.DataArray, size: int, most: int) -> tuple[np.ndarray, np.ndarray]:
    """Reflectance (K, 13, size, size) of up to `most` tiles in SatCLIP order, and which bands are absent, (13,) bool.

    Tiles lie on a grid without overlap; of a large scene, evenly spread ones are read. A band that most of them lack is
    absent. A tile counts where every band that is there has enough values. DN are rounded, as in packs.

    Args:
        scene: DN (13, y, x) with ESA names as `band`; lazily read, tile by tile.
        size: side in pixels.
        most: how many are wanted.

    Raises:
        ValueError: other dimensions or bands, values that are no DN, a scene smaller than a tile, or too few values.
    """
    if scene.dims != ("band", "y", "x") or "band" not in scene.coords:
        raise ValueError(f"a scene has dimensions (band, y, x) and ESA band names; got {scene.dims}")
    names = [bands.parse_band(str(name)) for name in scene["band"].values]
    if sorted(names) != sorted(bands.NAMES):
        lacking = ", ".join(sorted(set(bands.NAMES) - set(names))) or "none, but some are there twice"
        raise ValueError(f"a scene has 13 bands, absent ones NaN; lacking: {lacking}. `imagery.open_scene` adds them")
    if scene.sizes["y"] < size or scene.sizes["x"] < size:
        raise ValueError(f"the scene is {scene.sizes['y']} × {scene.sizes['x']} pixels, a tile takes {size}")
    order = [names.index(name) for name in bands.NAMES]
    per_reflectance = float(scene.attrs.get("dn_per_reflectance", DN_PER_REFLECTANCE))
    places = _places(scene.sizes["y"] // size, scene.sizes["x"] // size, _TRIED * most)
    tiles = []
    for row, column in places:
        part = scene.isel(y=slice(row * size, (row + 1) * size), x=slice(column * size, (column + 1) * size))
        # packs hold whole DN: unrounded, an interpolated band is smoother than any that a detector was fitted on
        values = np.asarray(part.values, np.float32)[order].round()
        if np.isfinite(values).mean() > 0.25:
            tiles.append(values / per_reflectance)
        if len(tiles) == most:
            break
    if not tiles:
        raise ValueError(f"none of {len(places)} tiles of the scene has values in a quarter of its pixels and bands")
    images = np.stack(tiles)
    there = np.isfinite(images).mean((2, 3)) >= 0.5  # (K, 13)
    absent = there.mean(0) < 0.5
    images[:, absent] = np.nan
    fits = (there | absent).all(1)
    fits[fits] = complete(images[fits])
    if not fits.any() or (~absent).sum() < 2:
        raise ValueError(
            "no tile of the scene has pixels with a value in every band; mark bands that are mostly empty as lost, "
            "with imagery.open_scene(..., hide=...)"
        )
    return _checked(images[fits]), absent


def _places(rows: int, columns: int, most: int) -> list[tuple[int, int]]:
    """Tiles of a grid, in an order in which the first ones are spread over it already."""
    count = rows * columns
    step = next(s for s in range(max(round(count * 0.618), 1), 2 * count + 1) if np.gcd(s, count) == 1)
    return [divmod(number * step % count, columns) for number in range(min(count, most))]


def _checked(images: np.ndarray) -> np.ndarray:
    middle = float(np.nanmedian(np.abs(images)))
    if not 1e-3 < middle < 2:
        raise ValueError(
            f"the scene's median is {middle:.3g} as reflectance, expected about 0.1: its values are no DN, or its "
            "attribute dn_per_reflectance is wrong; `imagery.open_scene` sets it"
        )
    return images
