"""Images as people hand them over: an array, a tensor or a scene, which bands, in which unit, what of it is missing."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias

import numpy as np

from bandmask import bands
from bandmask.bands import DN_PER_REFLECTANCE
from bandmask.moments import LEVELS

# a pixel that is too bright, as ESA and most archives write it: DN and reflectance, and with 1000 DN taken off
SATURATED = np.array([65_535, 6.5535, 64_535, 6.4535], np.float32)
LOWEST = -0.1  # reflectance: what baseline 04.00 can state at the least; below is a no-data value, such as −9999 DN
AXES = (("y", "x"), ("lat", "lon"), ("latitude", "longitude"), ("row", "column"), ("northing", "easting"))
Window: TypeAlias = tuple[slice, slice]  # rows and columns
PIXELS = 4096  # that an image's order is told by


def in_order(images: Any) -> Any:
    """A scene with its dimensions as (…, band, y, x), by their names; anything else as it is.

    A ValueError of a data set of variables, or of dimensions that don't say which are rows and columns.
    """
    if hasattr(images, "data_vars"):
        raise ValueError("a Dataset holds variables; give one array: dataset[name], or dataset.to_array('band')")
    if not hasattr(images, "dims"):
        return images
    rows = [axes for axes in AXES if {*axes, "band"} <= set(images.dims)]
    if not rows:
        known, own = " or ".join("/".join(axes) for axes in AXES), ", ".join(map(str, images.dims))
        raise ValueError(f"a scene has dimensions band, and {known}, in any order; got {own}: images.rename(…) them")
    return images.transpose(..., "band", *rows[0])


def level_of(images: Any) -> str:
    """`L1C` or `L2A` where a scene states it, in any spelling; else ""."""
    stated = str(getattr(images, "attrs", {}).get("level", "")).upper()
    return stated if stated in LEVELS else ""


def as_array(images: Any) -> np.ndarray:
    """Numbers of an array, a tensor or a scene (…, band, y, x), of NaN where a masked array is masked."""
    images = in_order(images)
    images = images.values if hasattr(images, "dims") else images
    if hasattr(images, "detach"):
        images = images.detach().cpu()
        images = images.float() if str(images.dtype) == "torch.bfloat16" else images
    if isinstance(images, np.ma.MaskedArray):
        return np.ma.filled(images.astype(np.promote_types(images.dtype, np.float32)), np.nan)
    return np.asarray(images)


class Source:
    """Images of any kind, an array, a tensor or a scene: (B, C, H, W) read by windows, whose bands, in which unit.

    Args:
        images: (C, H, W) or (B, C, H, W), numpy or torch; or xarray with a dimension `band`.
        names: of the channels, in the array's order; default: those that a scene carries, unless they count channels.
        own: names to take if neither says, where they are as many; else all 13 in SatCLIP's order.

    Raises:
        ValueError: no image; a picture of 8 bit; channels whose bands nobody says.
    """

    def __init__(self, images: Any, names: str | Sequence[str] | None = None, own: Sequence[str] = ()) -> None:
        """Nothing is read yet."""
        about, images = getattr(images, "attrs", {}), in_order(images)
        self.stated, keys = about.get("dn_per_reflectance"), ("_FillValue", "missing_value", "nodata")
        self.nodata = [np.float32(about[key]) for key in keys if about.get(key) is not None]
        if hasattr(images, "dims"):
            if (about.get("scale_factor", 1), about.get("add_offset", 0)) != (1, 0):
                todo = "open the file with bm.open_scene, or with mask_and_scale=True"
                raise ValueError(f"attributes state a scale or offset that its values don't have yet; {todo}")
            if "band" in images.coords:
                labels = images["band"].values.tolist()
                said = bands.named(labels)
                if names is None and None in said:
                    todo = "say which: names='B02 B03 B04', or images.assign_coords(band=[…])"
                    raise ValueError(f"{labels} are no names of bands, or only count channels; {todo}")
                names = list(filter(None, said)) if names is None else bands.channels_of(images.shape, names)
                if any(label not in (None, name) for label, name in zip(said, names, strict=True)):
                    found = f"names say {' '.join(names)}, the scene's own labels {' '.join(map(str, said))}"
                    raise ValueError(f"{found}; leave names out, or relabel it: images.assign_coords(band=[…])")
        if getattr(images, "ndim", 0) not in (3, 4) or not hasattr(images, "dtype") or 0 in images.shape[-3:]:
            found = f"{type(images).__name__} {tuple(getattr(images, 'shape', ()))}"
            raise ValueError(f"images are numpy, torch or a scene, (C, H, W) or (B, C, H, W); got {found}")
        shape = tuple(images.shape)
        self.images, self.batched, self.size = images, len(shape) == 4, (shape[-2], shape[-1])
        self.count = shape[0] if self.batched else 1
        self.names = bands.channels_of(shape, own if names is None and shape[-3] == len(own) else names)
        kind = np.dtype(str(images.dtype).removeprefix("torch.").replace("bfloat", "float"))
        if kind.itemsize == 1:
            raise ValueError(f"values of type {kind} are neither DN nor reflectance; give the bands as measured")
        self._whole = kind.kind in "iu"

    def numbers(
        self, window: Window = (slice(None), slice(None)), channels: Any = slice(None), *, any_unit: bool = False
    ) -> np.ndarray:
        """Values (B, k, h, w) float32, NaN where they were masked, saturated or no data: the same for all who read."""
        part = as_array(self.images[(..., channels, *window)]).astype(np.float32)
        return self._measured(part if self.batched else part[None], DN_PER_REFLECTANCE if any_unit else self.scale)

    def _measured(self, part: np.ndarray, scale: float) -> np.ndarray:
        """Values as they came, NaN where they are no measurement."""
        gone = ~np.isfinite(part) | (part >= SATURATED.min() * scale) | (part < 1.001 * LOWEST * scale)
        for value in self.nodata:
            gone |= part == value
        return np.where(gone, np.float32(np.nan), part)

    def read(self, window: Window, distrusted: Iterable[str]) -> tuple[np.ndarray, np.ndarray]:
        """Values and what of them is missing, bool, both (B, C, h, w); 0 in all bands, or all of a band, is."""
        part = self.numbers(window)
        hidden = np.isnan(part)
        hidden |= ((part == 0) | hidden).all(1, keepdims=True)
        hidden |= (self._blank | np.isin(self.names, list(distrusted)))[..., None, None]
        return part, hidden

    @functools.cached_property
    def _probe(self) -> np.ndarray:
        """(B, C, h, w) of some 64 × 64 pixels of all of it, as they came."""
        for most in (1024, max(self.size)) if hasattr(self.images, "dims") else (max(self.size),):  # a file is read
            sides = [min(side, most) for side in self.size]
            starts = [(whole - side) // 2 for whole, side in zip(self.size, sides, strict=True)]
            step = max(1, min(sides) // 64)
            thin = [slice(start, start + side, step) for start, side in zip(starts, sides, strict=True)]
            part = as_array(self.images[(..., *thin)]).astype(np.float32)
            if np.nan_to_num(part).any((-3, -2, -1)).all():  # in the middle of a scene there may be nothing
                break
        return part if self.batched else part[None]

    @functools.cached_property
    def _blank(self) -> np.ndarray:
        """(B, C): bands of an image without a value that isn't 0, however it is read; but for cirrus, which may be."""
        blank = ~(np.nan_to_num(self._probe).any((2, 3)) | (np.array(self.names) == "B10"))
        for channel in np.flatnonzero(blank.any(0)).tolist():
            blank[:, channel] &= ~np.nan_to_num(self.numbers(channels=[channel])).any((1, 2, 3))
        return blank

    def spectra(self, distrusted: Iterable[str] = ()) -> np.ndarray:
        """DN of some pixels of each image, (B, n, C), NaN where missing, to be told an order and an offset by."""
        part = self._measured(np.where((self._probe == 0).all(1, keepdims=True), np.nan, self._probe), self.scale)
        gone = (self._blank | np.isin(self.names, list(distrusted)))[..., None, None]
        spectra = np.where(gone, np.nan, part).reshape(*part.shape[:2], math.prod(part.shape[2:])).swapaxes(1, 2)
        step = max(1, min(spectra[..., 0].size // PIXELS, spectra.shape[1] // 64))
        return spectra[:, ::step] * (DN_PER_REFLECTANCE / self.scale)

    def each(self) -> list[Source]:
        """Its images, one by one, in the unit of all."""
        parts = [copy.copy(self) for _ in range(self.count)]
        for place, part in enumerate(parts):
            one = slice(place, place + 1)
            part.images, part.count, part.stated, part._blank = self.images[one], 1, self.scale, self._blank[one]
        return parts

    def thinned(self, thin: Window) -> Source:
        """Some rows and columns of it, in the unit of all."""
        other = copy.copy(self)
        part, other.stated = as_array(self.images[(..., *thin)]), self.scale
        other.images = part.copy() if part.flags.writeable else part  # whose it is may write into it
        other.size = other.images.shape[-2], other.images.shape[-1]
        return other

    @functools.cached_property
    def scale(self) -> float:
        """DN a reflectance: stated, or told by values that can only be one of the two."""
        fine = (self._probe > 0) & np.isfinite(self._probe) & ~np.isin(self._probe, SATURATED)
        values = [part[good] for part, good in zip(self._probe, fine, strict=True)]
        high = np.array([np.quantile(part, 0.99) if part.size else np.nan for part in values])
        dn, fractions, top = high >= 50, any((part % 1).any() for part in values), np.nanmax(high, initial=0)
        if dn.any() and (high < 50).any() and not self._whole:
            those = np.flatnonzero(dn).tolist()
            raise ValueError(f"images {those} of the batch hold DN, the others reflectance; bring all to one")
        untold = DN_PER_REFLECTANCE if self._whole or dn.any() else 1.0
        said = untold if self.stated is None else float(self.stated or DN_PER_REFLECTANCE)
        if said > 50 and 0 < top <= 3 and fractions:
            todo = f"not {said:g} DN a reflectance: images.assign_attrs(dn_per_reflectance=1) says so"
            raise ValueError(f"values are in reflectance already (99 % below {top:.3g}), {todo}")
        if top > 3 * said:
            wrong = "" if self.stated is None else f", or dn_per_reflectance={said:g}, which is stated, is wrong"
            found = f"1 % of the values are above {top:.3g}: neither reflectance (below 3) nor DN"
            raise ValueError(f"{found}; of percent, divide by 100; of DN where reflectance is due, by 10,000{wrong}")
        return said

    def back(self, values: np.ndarray, is_map: bool) -> Any:
        """An answer as what came in: a tensor, a map with the scene's coordinates, or numpy."""
        values = values if self.batched else values[0]
        if hasattr(self.images, "detach"):
            import torch

            return torch.from_numpy(np.ascontiguousarray(values)).to(self.images.device)
        if not hasattr(self.images, "dims") or not is_map:
            return values
        import xarray as xr

        *first, band, down, across = self.images.dims
        at = {name: held for name, held in self.images.coords.items() if band not in held.dims}  # its CRS among them
        return xr.DataArray(values, at, (*first, *["class"][: values.ndim - 2 - len(first)], down, across))
