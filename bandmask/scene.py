"""A Sentinel-2 scene on disk as one lazy array on its 10 m grid; a pixel without a value is hidden, which is NaN here.

A stacked GeoTIFF, a folder or list of single-band files, or a product in ESA's SAFE layout, old or new, folder or zip.
Only what is asked for is read: `scene.isel(y=slice(0, 256), x=slice(0, 256)).values` reads 13 windows. What numbers
mean is taken from the file's tags and ESA's metadata; what neither tells is asked for. Two drivers alone open files and
nothing beside them is followed, so no file makes the program read elsewhere or call out.
Source: Sentinel-2 Products Specification Document, issues 13 (before December 2016) and 14.9.
"""

from __future__ import annotations

import io
import math
import re
import threading
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, TypeAlias
from xml.etree import ElementTree

import numpy as np
import psutil
import rasterio
import rioxarray  # noqa: F401  # gives .rio
import xarray as xr
from rasterio import Affine, DatasetReader
from rasterio.crs import CRS
from rasterio.errors import RasterioError, RasterioIOError
from rasterio.warp import transform as warp
from rasterio.windows import Window
from xarray.backends import BackendArray, CachingFileManager
from xarray.core import indexing

from bandmask import bands, identity
from bandmask.files import is_litter
from bandmask.images import LOWEST

GSD_M = 10.0  # of the grid that a scene is brought to, and that encoders here were trained on
METRES_A_DEGREE = 111_320
DISTORTION = 0.03  # by which metres of a grid may differ from those of the ground; web Mercator doubles them at 60°
_RATIOS = (1, 2, 6)  # of Sentinel-2's grids of 10, 20 and 60 m
_PROBE = 64  # pixels a side, of the thinned-out copy that values are judged by
_MOST_BYTES = 2**30  # of one block of a file, which is read as a whole
MAX_SIDE = 4096  # px, of one's own image: larger ones are scenes, or files that lie about their size
_MOST_XML = 16 * 2**20
_OFFSET_DATE = "20220125"  # processing baseline 04.00, the first that adds 1000 DN, begins; the archive followed later
_GRANULE = re.compile(r"(.*GRANULE/[^/]+)/IMG_DATA/")
_BAND = re.compile(r"(?:^|[_.\-])(B0?8A|B\d{1,2})(?:_(\d0)m)?(?:_\(Raw\))?\.(?:jp2|tiff?)$", re.IGNORECASE)
_QUALITY = re.compile(r"GRANULE/[^/]+/QI_DATA/MSK_QUALIT_(B\d\d|B8A)\.jp2$")
_BAD = (3, 4, 5, 6, 8)  # of its channels: lost packets, degraded packets, defective pixels, no data, saturated at L1A
_METADATA = re.compile(r"(?:.*/)?(?:MTD_MSI|S2\w_(?:OPER|USER)_MTD_SAF)(L1C|L2A)(?:_[^/]*)?\.xml$")
_DATE = re.compile(r"(?<!\d)(20\d\d)-?(0[1-9]|1[0-2])-?([0-3]\d)(?!\d)")
_TILE = re.compile(r"(?<![A-Za-z0-9])T\d\d([A-Z]{3})?(?![A-Za-z0-9])")
_LAYER = re.compile(r"(QA\d\d|SCL|AOT|WVP|(TCI|CL[DPM]|SNW|MSK)\w*|[MN]D[A-Z]+I|(data)?mask|alpha|)", re.IGNORECASE)
_Order: TypeAlias = str | Sequence[str] | None
_Layers: TypeAlias = dict[str, tuple[str, int]]  # of each band the file's name and the channel in it, from 1
_READING = threading.Lock()  # GDAL's files are no thread's but one at a time
_KINDS = "a GeoTIFF of all bands, a folder or list of single-band files, or a Sentinel-2 SAFE folder or zip"


def open_scene(
    path: Path | str | Sequence[Path | str],
    *,
    order: str | Sequence[str] | None = None,
    offset: float | None = None,
    hide: str | Sequence[str] = (),
    hide_missing: bool = False,
) -> xr.DataArray:
    """Open a Sentinel-2 scene: (band, y, x) float32 DN, 13 bands in SatCLIP order, lazily; hidden pixels are NaN.

    DN / 10000 is reflectance, whatever the processing baseline; DN / 1000 without a tag is warned of, mostly if 13
    bands tell. Bands of 20 and 60 m are brought to the 10 m grid by bilinear interpolation of coordinates. A pixel is
    hidden where the file holds 0, 65535 (saturated), its own no-data value, less than −1000 DN or a mask, where ESA's
    quality mask tells of lost or degraded packets, defective, absent or saturated pixels, and where it would be
    interpolated from such a one.

    Args:
        path: a stacked GeoTIFF, a folder or list of single-band files, or a SAFE folder or zip, L1C or L2A.
        order: of a stack that doesn't name its bands: a key of `identity.ORDERS` or the names; twelve channels in an
            order of thirteen are that order without B10, as L2A is exported.
        offset: DN to add to files without ESA's metadata: −1000 from processing baseline 04.00 on, else 0.
        hide: bands to treat as lost though they are there.
        hide_missing: open a scene that lacks bands, which are hidden then. B10 of L2A, which no file has, always is.

    Returns:
        Coordinates `band` (ESA names), `wavelength_nm`, `y`, `x`; CRS and transform by rioxarray; attributes `units`,
        `dn_per_reflectance`, `level`, `hidden_bands` (tuple), `source`, `processing_baseline` and `note`.

    Raises:
        FileNotFoundError: nothing there.
        ValueError: unreadable; bands missing, twice or in another order; no coordinate system; grids that don't belong
            together; numbers that are no DN; an offset that nobody states, or that the values belie.
    """
    identity.check_offset(offset)
    found = _find(path, order, offset)
    level, missing = found.said.level, [name for name in bands.NAMES if name not in found.layers]
    no_cirrus = missing == ["B10"] if level == "unknown" else level == "L2A" and "B10" in missing
    if (lacking := [n for n in missing if n != "B10" or not no_cirrus]) and not hide_missing:
        raise ValueError(f"{found.source} lacks {', '.join(lacking)}; add them, or hide these with hide_missing=True")
    sources = {name: _Source.of(name, found, offset) for name in found.layers}
    grid = _common_grid(found.source, {name: source.grid for name, source in sources.items()})
    empty, notes = _judge(found, sources)
    cirrus = "L2A has no B10: it is hidden, not zero" if level == "L2A" else "B10 is not there: it is hidden, not zero"
    notes = [cirrus] * no_cirrus + [*found.notes, grid.note, *notes]
    hidden = tuple(name for name in bands.NAMES if name in {*missing, *bands.parse_bands(hide), *empty})
    if len(hidden) == len(bands.NAMES):
        raise ValueError(f"{found.source}: every band is hidden; leave one visible")
    lazy = _Bands([None if name in hidden else sources[name] for name in bands.NAMES], grid)
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
    scene.attrs.update(units="DN", dn_per_reflectance=10_000, level=level, hidden_bands=hidden, source=found.source)
    scene.attrs.update(processing_baseline=found.said.baseline, note="; ".join(note for note in notes if note))
    return scene


def read_image(path: Path, names: Sequence[str], offset: float | None = None) -> np.ndarray:
    """(C, H, W) float32 DN of an image whose channels are these bands, as of a scene; NaN where its tags or mask say.

    0, which may be a value of one band, hides where all bands hold it and the file calls it no data. A ValueError of
    other channels, or more than 4,096 pixels a side, before it is read; of tags that mean nothing, or another offset.
    """
    with open_raster(path) as file:
        channels, own, _ = _described(file)
        if len(channels) != len(names) or max(file.shape) > MAX_SIDE:
            expected = f"expected ({len(names)}, H, W), a channel a band, at most {MAX_SIDE} px a side"
            raise ValueError(f"shape {(file.count, *file.shape)}, {expected}")
    if any(said not in (None, name) for said, name in zip(own, names, strict=True)):
        raise ValueError(f"the file calls its bands {' '.join(map(str, own))}, not {' '.join(names)}; give its order")
    layers = {name: (path.name, n) for name, n in zip(names, channels, strict=True)}
    found = _Found(str(path), _Files(path.parent, (path.name,)), layers, _Said(special=()), [])
    sources = [_Source.of(name, found, offset) for name in names]
    planes = [replace(one, special=tuple(value for value in one.special if value)).dn() for one in sources]
    image = np.stack([np.where(dn == 0, dn, dn + one.offset) for dn, one in zip(planes, sources, strict=True)])
    if any(0 in one.special for one in sources):
        image[:, (image == 0).all(0)] = np.nan
    return image


def open_raster(address: Path | str | bytes) -> DatasetReader:
    """Open a GeoTIFF, also of bytes, or JPEG 2000; a VRT or WMS description reads other files or calls an address.

    Raises:
        ValueError: another kind of file, damaged, or one whose blocks take more than 1 GiB.
    """
    what = "the file" if isinstance(address, bytes) else str(address)
    given = io.BytesIO(address or b"nothing") if isinstance(address, bytes) else what
    driver = "JP2OpenJPEG" if what.lower().endswith(".jp2") else "GTiff"
    try:
        with rasterio.Env(GDAL_DISABLE_READDIR_ON_OPEN="EMPTY_DIR"):  # overviews and masks beside may be anything
            file = rasterio.open(given, driver=driver)
    except RasterioIOError as error:
        todo = "fetch it again, or export it as GeoTIFF"
        raise ValueError(f"{what} can't be read as GeoTIFF or JPEG 2000 ({error}); {todo}") from error
    if file.tags(ns="OVERVIEWS"):
        raise ValueError(f"{what} keeps its overviews in another file or place; write it anew without")
    height, width = file.block_shapes[0]
    pixels = height * width * (file.count if file.interleaving and file.interleaving.name == "pixel" else 1)
    if pixels * np.dtype(file.dtypes[0]).itemsize > _MOST_BYTES:
        raise ValueError(f"{what} is kept in blocks of {height} × {width} pixels; write it tiled, 512 × 512")
    return file


def note_of_pixels(scene: xr.DataArray) -> str:
    """A note, also warned of, where pixels are not of 10 m, such as after `coarsen`; else, or if unknown, nothing."""
    if not all(axis in scene.coords and scene[axis].size > 1 for axis in "xy"):
        return ""
    transform = scene.rio.transform(recalc=True)
    sides = on_ground(scene.rio.crs, transform, scene.shape[-2:]) if scene.rio.crs else (transform.a, transform.e)
    gsd_m = max(map(abs, sides))
    if math.isclose(gsd_m, GSD_M, rel_tol=0.3):
        return ""
    note = f"pixels of {gsd_m:.0f} m: encoders and detectors here were fitted on {GSD_M:.0f} m, and see another texture"
    warnings.warn(note, stacklevel=3)
    return note


# --- which file holds which band, and what its metadata say


@dataclass(frozen=True)
class _Files:
    """Files of a folder or a zip, by their names in it."""

    root: Path
    names: tuple[str, ...]
    opened: dict[str, CachingFileManager] = field(default_factory=dict, compare=False)

    @classmethod
    def below(cls, path: Path) -> _Files:
        """All of a zip, and of a folder that is a product or holds one; of any other folder those in it alone."""
        if path.is_file():
            try:
                with zipfile.ZipFile(path) as archive:
                    names = archive.namelist()
            except zipfile.BadZipFile as error:
                raise ValueError(f"{path} is damaged or no zip ({error}); fetch it again") from error
        else:
            product = any(_METADATA.match(p.name) or p.suffix == ".SAFE" for p in path.iterdir())
            inside = path.rglob("*") if product else path.iterdir()
            names = sorted(p.relative_to(path).as_posix() for p in inside if p.is_file())
        return cls(path, tuple(name for name in names if not is_litter(name)))

    def path(self, name: str) -> Path | zipfile.Path:
        return zipfile.Path(self.root, name) if self.root.is_file() else self.root / name

    def raster(self, name: str, like: DatasetReader | None = None) -> CachingFileManager:
        """A raster, opened again where it was closed or copied; a mask must lie on the grid of the file it is of."""
        address, root = str(self.root / name), str(self.root.absolute())
        if self.root.is_file():  # GDAL's brackets
            address = f"/vsizip/{root}/{name}" if re.search("[{}]", root) else f"/vsizip/{{{root}}}/{name}"
        manager = self.opened.setdefault(name, CachingFileManager(open_raster, address))
        if like is not None and (shape := manager.acquire().shape) != like.shape:
            raise ValueError(f"{address} is no mask of {like.name}: {shape} pixels; fetch or write it anew")
        return manager

    def xml(self, name: str) -> ElementTree.Element:
        """Bounded before it is read, and without entities, which can stand for gigabytes."""
        try:
            with self.path(name).open("rb") as file:
                data = file.read(_MOST_XML + 1)
            if len(data) > _MOST_XML or b"<!DOCTYPE" in data or b"\0" in data:
                raise ValueError("too large, or with entities")
            return ElementTree.fromstring(data)
        except (ElementTree.ParseError, LookupError, ValueError, RuntimeError, zipfile.BadZipFile) as error:
            raise ValueError(f"{self.root / name} is damaged ({error}); fetch it again") from error


@dataclass(frozen=True)
class _Said:
    """What metadata or names say of a scene's numbers; without offsets, nobody does."""

    level: str = "unknown"
    baseline: str = "unknown"
    factor: float = 1.0  # DN of 1/10000 a stored unit
    offsets: Mapping[str, float] | None = None  # stored units
    special: tuple[float, ...] = (0.0, 65_535.0)  # no data, saturated
    doubt: str = ""  # why an offset may have been added, where nobody says


@dataclass(frozen=True)
class _Found:
    """A scene's files, which of them hold its bands, and what is said of them."""

    source: str
    files: _Files
    layers: _Layers
    said: _Said
    notes: Sequence[str]


def _find(path: Path | str | Sequence[Path | str], order: _Order, offset: float | None) -> _Found:
    """Files and channels of bands; what is said of them by metadata in the product or above it, else by names."""
    if isinstance(path, str | Path):
        source, place = str(path), Path(path)
        if not place.exists():
            raise FileNotFoundError(f"no scene at {path}; give {_KINDS}")
        place = place.parent if _METADATA.match(place.name) else place
        stacked = place.is_file() and place.suffix.lower() != ".zip"
        files = _Files(place.parent, (place.name,)) if stacked else _Files.below(place)
    elif not isinstance(path, Sequence):
        raise ValueError(f"a scene is opened from a file; got {type(path).__name__}: give {_KINDS}")
    else:
        files, stacked = _Files(Path(), tuple(str(Path(name).absolute()) for name in path)), False
        source, place = f"{len(files.names)} files", Path(*files.names[:1])
    within = [(files, name) for name in files.names if _METADATA.match(name)]
    if within and offset is not None:
        raise ValueError(f"{source} has ESA's metadata, which state the offset; leave offset={offset:g} out")
    above = [(f.parent, f.name) for folder in place.absolute().parents[:6] for f in sorted(folder.glob("*MTD_*.xml"))]
    stated = sorted(within, key=lambda found: found[1].count("/"))
    stated += [(_Files(folder, (name,)), name) for folder, name in above if _METADATA.match(name)]
    near = [_METADATA.match(name) for those, name in stated if those.root == stated[0][0].root]
    levels = [match[1] for match in near if match]
    if not within and len(set(levels)) < len(levels):
        raise ValueError(f"{stated[0][0].root} holds metadata of {len(levels)} products; keep those of {source} alone")
    said = _read_metadata(*stated[0]) if stated else None
    layers, notes = _stack(place, order) if stacked else (_single(files.names, source), [])
    if said and said.offsets and (lacking := [name for name in layers if name not in said.offsets]):
        raise ValueError(f"{source}: its metadata state an offset for some bands, none for {', '.join(lacking)}")
    return _Found(source, files, layers, said or _named(layers, place), notes)


def _single(names: Sequence[str], source: str) -> _Layers:
    """Single-band files by their names, the finest of each band; of products those of their one granule."""
    images = [(match[1], name) for name in names if (match := _GRANULE.match(name))]
    if len(granules := {granule for granule, _ in images}) > 1:
        raise ValueError(f"{source} holds {len(granules)} granules; open one product, or give the files of one granule")
    found: dict[str, tuple[int, str]] = {}
    for name in [name for _, name in images] or names:
        file = PurePosixPath(name).name
        if not (match := _BAND.search(file)) or file.startswith("MSK_"):
            continue
        band, gsd = bands.parse_band(match[1]), int(match[2] or 0)
        if band in found and (found[band][0] == gsd or not gsd or not found[band][0]):  # 0: nobody says which is finer
            raise ValueError(f"{source}: both {found[band][1]} and {name} would be {band}")
        found[band] = min(found.get(band, (gsd, name)), (gsd, name))
    for what, mark in (("tiles", _TILE), ("dates", _DATE)):
        if len(seen := {m[0] for _, name in found.values() if (m := mark.search(PurePosixPath(name).name))}) > 1:
            listed = ", ".join(sorted(seen))
            raise ValueError(f"{source} holds bands of {len(seen)} {what}, {listed}; give those of one")
    if not found:
        raise ValueError(f"{source} is no scene: no .jp2 or .tif file whose name ends in a band. Give {_KINDS}")
    return {band: (name, 1) for band, (_, name) in found.items()}


def _named(layers: _Layers, place: Path) -> _Said:
    """What names say of a scene without metadata: its level, its baseline, and why an offset may have been added."""
    names = [PurePosixPath(name).name for name, _ in layers.values()]
    parts = [*names, *reversed(place.absolute().parts)]
    levels = [f"L{m[1]}" for part in parts if (m := re.search(r"L(1C|2A)(?![A-Za-z0-9])", part))]
    levels += ["L1C"] * ("B10" in layers) + ["L2A"] * any(re.search(r"_\d0m\.", name) for name in names)
    level = levels[0] if levels else "unknown"
    baselines = [f"{m[1]}.{m[2]}" for part in parts if (m := re.search(r"_N(\d\d)\.?(\d\d)(?![0-9])", part))]
    if baselines:
        offsets: dict[str, float] | None = None if 4 <= float(baselines[0]) < 99 else {}
        return _Said(level, baselines[0], 1.0, offsets, doubt=f"its path names processing baseline {baselines[0]}")
    dates = ["".join(match) for part in parts if part in names or part[:2] == "S2" for match in _DATE.findall(part)]
    latest = max(dates, default="")
    return _Said(level, doubt=f"{latest} stands in its name" if latest >= _OFFSET_DATE else "")


def _read_metadata(files: _Files, name: str) -> _Said:
    """ESA numbers bands from 0 and says in the same file which is which."""
    root, where = files.xml(name), files.root / name
    texts: dict[str, list[tuple[ElementTree.Element, str]]] = {}
    for element in root.iter():
        texts.setdefault(element.tag.rpartition("}")[2], []).append((element, (element.text or "").strip()[:40]))

    def number(text: str, what: str) -> float:
        if not re.fullmatch(r"[-+]?\d+(\.\d*)?([eE][-+]?\d+)?", text) or not math.isfinite(float(text)):
            raise ValueError(f"{where}: the {what} is {text!r}; expected a number. Fetch the product again")
        return float(text)

    tags = [f"{kind}QUANTIFICATION_VALUE" for kind in ("", "BOA_", "L2A_BOA_")]
    values = [text for tag in tags for _, text in texts.get(tag, [])]
    quantification = number(values[0] if values else "", "quantification value")
    if not 1000 <= quantification <= 100_000:
        raise ValueError(f"{where}: the quantification value is {quantification:g}; expected 10000 DN a reflectance")
    found = re.search(r"(\d\d)\.?(\d\d)", " ".join(text for _, text in texts.get("PROCESSING_BASELINE", [])))
    baseline = f"{found[1]}.{found[2]}" if found else "unknown"
    spectral = [element for element, _ in texts.get("Spectral_Information", []) if element.get("physicalBand")]
    ids = {e.get("bandId"): bands.parse_band(str(e.get("physicalBand"))) for e in spectral}
    ids = ids or {str(number): name for number, name in enumerate(bands.NAMES)}
    stated = [*texts.get("RADIO_ADD_OFFSET", []), *texts.get("BOA_ADD_OFFSET", [])]
    offsets = {ids[e.get("band_id")]: number(t, "added offset") for e, t in stated if e.get("band_id") in ids}
    if not offsets and not (found and not 4 <= float(baseline) < 99):  # 99.99, Sen2Cor at home, states it or adds none
        adds = "adds" if found else "may add"
        raise ValueError(f"{where}: baseline {baseline} {adds} an offset, but no metadata state it; fetch it again")
    special = [number(text, "special value") for _, text in texts.get("SPECIAL_VALUE_INDEX", [])]
    level = _METADATA.match(name)[1]  # type: ignore[index]
    return _Said(level, baseline, 1e4 / quantification, offsets, tuple({*_Said.special, *special}))


def _described(file: DatasetReader) -> tuple[list[int], list[str | None], list[str]]:
    """A file's channels, but for alpha; bands by its own descriptions of them, such as `B02 (490 nm)`; and these."""
    channels = [n for n, colour in enumerate(file.colorinterp, 1) if colour.name != "alpha"]
    texts = [(file.descriptions[n - 1] or "").strip() for n in channels]
    return channels, bands.named(re.split(r"[\s,;:(]", text)[0] for text in texts), texts


def _stack(path: Path, order: _Order) -> tuple[_Layers, list[str]]:
    """Bands of a stack by its own descriptions, such as `B02 (490 nm)`, or a given order; what is none is left out."""
    with open_raster(path) as file:
        channels, names, described = _described(file)
    if order is not None:
        listed = identity.ORDERS.get(order, order.split()) if isinstance(order, str) else order
        if listed == [order]:
            raise ValueError(f"unknown channel order {order!r}; available: {', '.join(identity.ORDERS)}, or all names")
        words = ["" if _LAYER.fullmatch(str(word)) else str(word) for word in listed]
        kept = iter(bands.ordered(list(filter(None, words))))
        given = [next(kept) if word else None for word in words]
        if isinstance(order, str) and len(channels) == len(given) - 1 and not any(names):
            given = [name for name in given if name != "B10"]
        if any(names) and [name for name in names if name] != [name for name in given if name]:
            raise ValueError(f"{path} names its bands {' '.join(filter(None, names))}, not as order says; leave it out")
        if not any(names) and len(given) != len(channels):
            raise ValueError(f"{path} has {len(channels)} bands, the order has {len(given)}; give all names as a list")
        names = names if any(names) else given
    if not any(names):
        fitting = [name for name, listed in identity.ORDERS.items() if len(listed) == len(channels)]
        known = "one of " + ", ".join(fitting) if fitting else ""
        with suppress(ValueError), open_raster(path) as file:
            best = identity.identify(file.read(channels, out_shape=(_PROBE, _PROBE)).astype(np.float32)).order
            known += f" (pixels fit {best.value!r}, {best.sure:.0%} sure)" if best.value else " (pixels don't tell)"
        ways = f"order: {known}, or all names" if known else "as order all their names"
        raise ValueError(f"{path} has {len(channels)} bands and doesn't say which; give {ways}, such as ['B01', 'B02']")
    if twice := sorted({name for name in names if name and names.count(name) > 1}):
        raise ValueError(f"{path} has {', '.join(twice)} twice; each band once, please")
    every = list(zip(channels, names, described, strict=True))
    left = [text or f"channel {n}" for n, name, text in every if not name]
    layers = {name: (path.name, n) for n, name, _ in every if name}
    return layers, [f"no band and left out: {', '.join(left)}"] if left else []


# --- what a file must fulfil to be a band: a grid of Sentinel-2's, and numbers that are DN


@dataclass(frozen=True)
class _Grid:
    """Where the pixels of a file lie."""

    crs: CRS
    transform: Affine
    shape: tuple[int, int]
    ground_m: float  # side of a pixel, southward
    note: str = ""  # where units of the grid are no metres on the ground

    @classmethod
    def of(cls, file: DatasetReader, what: str) -> _Grid:
        crs, t = file.crs, file.transform
        metric = crs and crs.is_projected and math.isclose(crs.linear_units_factor[1], 1.0)
        if not (metric or (crs and crs.is_geographic)):
            there = crs.to_string() if crs else "no coordinate system"
            raise ValueError(f"{what} is in {there}; expected metres: write, or reproject to, its UTM zone, 10 m")
        even = 1 if crs.is_geographic else 1e-3
        if t.b or t.d or t.a <= 0 or t.e >= 0 or not math.isclose(t.a, -t.e, rel_tol=even):
            raise ValueError(f"{what} has a rotated or uneven grid ({tuple(t)[:6]}); warp it north up, 10 m")
        if not (note := distortion(crs, t, file.shape)):
            return cls(crs, t, file.shape, -t.e)
        note += ": good for patches and embeddings; for a map, warp it to UTM"
        return cls(crs, t, file.shape, on_ground(crs, t, file.shape)[1], note)


def on_ground(crs: CRS, transform: Affine, shape: Sequence[int]) -> tuple[float, float]:
    """Sides of the pixel in the middle of a grid, in metres of ground: across, and down."""
    row, column = shape[0] / 2, shape[1] / 2
    places = [transform @ place for place in ((column, row), (column + 1, row), (column, row + 1))]
    east, north = map(np.array, warp(crs, "EPSG:4326", *zip(*places, strict=True)))
    steps = np.hypot((east[1:] - east[0]) * math.cos(math.radians(north[0])), north[1:] - north[0])
    return float(steps[0] * METRES_A_DEGREE), float(steps[1] * METRES_A_DEGREE)


def distortion(crs: CRS, transform: Affine, shape: Sequence[int]) -> str:
    """How large pixels are where units of a grid are no metres of ground: degrees, feet, web Mercator's; else ""."""
    across, down = on_ground(crs, transform, shape)
    sides = (across, transform.a), (down, -transform.e)
    if all(math.isclose(*pair, rel_tol=DISTORTION) for pair in sides):
        return ""
    return f"in {crs.to_string()}, where a pixel is {across:.1f} × {down:.1f} m of ground"


def _common_grid(source: str, grids: Mapping[str, _Grid]) -> _Grid:
    """The grid of the finest band, 10 m, which the others cover on 10, 20 or 60 m."""
    finest = min(grids, key=lambda name: -grids[name].transform.e)
    scene = grids[finest]
    if not math.isclose(scene.ground_m, GSD_M, rel_tol=0.25 if scene.note else 1e-3):
        what = f"{scene.ground_m:g} m of ground ({scene.crs.to_string()})" if scene.note else f"{scene.ground_m:g} m"
        raise ValueError(f"{source}: its finest pixels, of {finest}, measure {what}; add the bands of 10 m, in UTM")
    for name, grid in grids.items():
        if grid.crs != scene.crs:
            both = f"{name} is in {grid.crs.to_string()}, {finest} in {scene.crs.to_string()}"
            raise ValueError(f"{source} mixes grids: {both}; give bands of one tile")
        if not any(math.isclose(grid.transform.e, scene.transform.e * ratio, rel_tol=2e-3) for ratio in _RATIOS):
            raise ValueError(f"{source}: pixels of {name} measure {grid.ground_m:g} m; Sentinel-2 has 10, 20 and 60 m")
        corners = ((0, 0), scene.shape[::-1])  # of the scene, in pixels of the file
        (left, top), (right, bottom) = (~grid.transform @ (scene.transform @ corner) for corner in corners)
        if min(left, top, grid.shape[1] - right, grid.shape[0] - bottom) < -0.5:
            sizes = [f"{some.shape} pixels of {some.ground_m:g} m" for some in (grid, scene)]
            said = f"{sizes[0]} don't cover {finest}'s {sizes[1]}"
            raise ValueError(f"{source}: {name} has the wrong size or place: {said}; cut all bands as one")
    return scene


@dataclass(frozen=True)
class _Source:
    """A band's file, and what its numbers mean: DN = factor × stored + offset."""

    what: str
    file: CachingFileManager
    channel: int
    factor: float
    offset: float
    known: bool  # somebody states the offset
    special: tuple[float, ...]  # stored numbers that are no value
    mask: tuple[CachingFileManager, int] | None  # 0 where hidden; channel 0 is the file's own mask
    quality: CachingFileManager | None  # ESA's, 1 in any channel of `_BAD` where hidden

    @classmethod
    def of(cls, band: str, found: _Found, offset: float | None) -> _Source:
        (name, channel), files, said = found.layers[band], found.files, found.said
        what, manager = f"{band} of {found.source}", files.raster(name)
        file: DatasetReader = manager.acquire()
        alpha = [n for n, colour in enumerate(file.colorinterp, 1) if colour.name == "alpha"]
        kind = np.dtype(file.dtypes[channel - 1])
        if str(files.root / name) != found.source and (count := file.count - len(alpha)) > 1:
            raise ValueError(f"{what} lies in a file of {count} bands ({file.name}); expected one band")
        if kind.itemsize == 1:
            raise ValueError(f"{what} is 8 bit, a picture and no measurement; take the original product, 16 bit")
        if kind.kind not in "uif":
            raise ValueError(f"{what} is {kind}; expected DN, 16 bit or float")
        scale, tagged, nodata = (values[channel - 1] for values in (file.scales, file.offsets, file.nodatavals))
        special = {*said.special, *([] if nodata is None else [nodata])}
        if files.path(f"{name}.aux.xml").exists():  # GDAL's, beside the file
            for element in files.xml(f"{name}.aux.xml").iterfind(f"PAMRasterBand[@band='{channel}']"):
                scale = float(element.findtext("Scale", str(scale)))
                tagged = float(element.findtext("Offset", str(tagged)))
                special.add(float(element.findtext("NoDataValue", "0")))
        try:
            factor, added = identity.of_tags(scale, tagged)
        except ValueError as error:
            raise ValueError(f"{what}: its {error}") from error
        factor = factor if (scale, tagged) != (1, 0) else said.factor
        if offset is not None and tagged != 0 and offset != added:
            raise ValueError(f"{what}: its tags state an offset of {added:g} DN; leave offset={offset:g} out")
        known = offset is not None or tagged != 0 or said.offsets is not None
        if offset is None:
            offset = added or factor * (said.offsets or {}).get(band, 0.0)
        if kind.kind != "f":
            special = {v for v in special if v.is_integer() and np.iinfo(kind).min <= v <= np.iinfo(kind).max}
        own = any(flag.name == "per_dataset" for flag in file.mask_flag_enums[channel - 1])
        mask = (manager, alpha[0]) if alpha else (manager, 0) if own else None
        if files.path(f"{name}.msk").exists():
            beside = files.raster(f"{name}.msk", like=file)
            mask = beside, channel if beside.acquire().count > 1 else 1
        marks = [other for other in files.names if (match := _QUALITY.search(other)) and match[1] == band]
        quality = files.raster(marks[0], like=file) if marks else None
        stored = tuple(kind.type(value) for value in special)
        return cls(what, manager, channel, factor, offset, known, stored, mask, quality)

    @cached_property
    def grid(self) -> _Grid:
        """Where its pixels lie."""
        return _Grid.of(self.file.acquire(), self.what)

    def dn(self, window: Window | None = None, shape: tuple[int, int] | None = None) -> np.ndarray:
        """DN (H, W) float32 before the offset, NaN where hidden."""
        where: dict[str, Any] = {"window": window, "out_shape": shape}
        file: DatasetReader = self.file.acquire()
        try:
            stored = file.read(self.channel, **where)
            values = stored.astype(np.float32)
            if self.factor != 1:
                values *= np.float32(self.factor)
            hidden = ~np.isfinite(values) | (values < LOWEST * bands.DN_PER_REFLECTANCE)
            for value in self.special:
                hidden |= stored == value
            if self.mask is not None:
                masking, channel = self.mask[0].acquire(), self.mask[1]
                hidden |= (masking.read(channel, **where) if channel else file.read_masks(self.channel, **where)) == 0
            if self.quality is not None:
                hidden |= self.quality.acquire().read(_BAD, **{**where, "out_shape": shape and (5, *shape)}).any(0)
        except RasterioError as error:
            raise ValueError(f"{self.what} can't be read from {file.name} ({error}); fetch it again") from error
        values[hidden] = np.nan
        return values

    def on(self, scene: _Grid, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
        """DN (rows, columns) float32 of the scene's grid, NaN where hidden or interpolated from a hidden pixel.

        GDAL's warper gives the same numbers, but fills a hidden pixel from its neighbours.
        """
        there, here = self.grid.transform, scene.transform
        down = _neighbours(rows, here.e / there.e, (here.f - there.f) / there.e, self.grid.shape[0])
        across = _neighbours(columns, here.a / there.a, (here.c - there.c) / there.a, self.grid.shape[1])
        (top, bottom), (left, right) = ((first.min(), second.max() + 1) for first, second, _ in (down, across))
        values = self.dn(Window(left, top, right - left, bottom - top))
        for axis, (first, second, weight), start in ((0, down, top), (1, across, left)):
            before = values.take(first - start, axis)
            if weight.any():
                part = weight.reshape((-1, 1) if axis == 0 else (1, -1))
                before = before * (1 - part) + values.take(second - start, axis) * part
            values = before
        return values + np.float32(self.offset)


def _neighbours(wanted: np.ndarray, scale: float, shift: float, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The two pixels of a file that a scene's pixel lies between, and the share of the second; edges repeat."""
    place = np.round((wanted + 0.5) * scale + shift - 0.5, 6)  # of pixel centres; rounding makes whole ones whole
    first = np.floor(place).astype(int)
    weight = (place - first).astype(np.float32)
    second = np.where(weight > 0, first + 1, first)  # a pixel of no weight must not hide another
    return first.clip(0, size - 1), second.clip(0, size - 1), weight


def _judge(found: _Found, sources: Mapping[str, _Source]) -> tuple[list[str], list[str]]:
    """Bands without a value in a thinned-out copy of the scene, whose numbers are judged: DN, offset, order; notes."""
    copies = {name: source.dn(shape=(_PROBE, _PROBE)).ravel() for name, source in sources.items()}
    empty = [name for name, values in copies.items() if np.isnan(values).all()]
    if len(empty) == len(copies):
        raise ValueError(f"{found.source} holds no value: every pixel looked at is 0, no data or saturated")
    note = identity.judge(
        np.stack(list(copies.values()), 1),
        tuple(copies),
        np.array([source.offset for source in sources.values()], np.float32),
        source=found.source,
        doubt=None if all(source.known for source in sources.values()) else found.said.doubt,
    )
    return empty, [note, *(f"{name} holds no value: it is hidden" for name in empty)]


class _Bands(BackendArray):
    """What xarray asks for values, window by window; a band without a source is NaN throughout."""

    def __init__(self, sources: Sequence[_Source | None], grid: _Grid) -> None:
        self.sources, self.grid = sources, grid
        self.shape = (len(sources), *grid.shape)
        self.dtype = np.dtype(np.float32)

    def __getitem__(self, key: indexing.ExplicitIndexer) -> Any:
        return indexing.explicit_indexing_adapter(key, self.shape, indexing.IndexingSupport.OUTER, self._read)

    def _read(self, key: tuple[Any, ...]) -> np.ndarray:
        chosen = [np.arange(size)[part] for size, part in zip(self.shape, key, strict=True)]
        numbers, rows, columns = map(np.atleast_1d, chosen)
        shape = len(numbers), len(rows), len(columns)
        if 4 * math.prod(shape) > (free := psutil.virtual_memory().available):
            asked = f"{' × '.join(map(str, shape))} pixels take {4 * math.prod(shape) / 2**30:.0f} GiB"
            raise ValueError(f"{asked}, {free / 2**30:.0f} are free; cut the scene first: scene.isel(y=slice(0, 1024))")
        values = np.full(shape, np.nan, np.float32)
        with _READING:
            for place, number in enumerate(numbers if values.size else []):
                if (source := self.sources[number]) is not None:
                    values[place] = source.on(self.grid, rows, columns)
        return values.reshape([len(part) for part in chosen if part.ndim])
