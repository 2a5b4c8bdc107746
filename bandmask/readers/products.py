"""What a scene on disk is: which file holds which band, and what its numbers mean.

A stacked GeoTIFF, a folder or list of single-band files, or a Sentinel-2 product in ESA's SAFE layout, as a folder or
a zip. Nothing is read here but names and ESA's metadata; `imagery` opens what is found. (`scenes` is another thing: the
splits of SEN12MS.)
Source: Sentinel-2 Products Specification Document, issue 14.9 (layout, `MTD_MSIL1C.xml` and `MTD_MSIL2A.xml`).
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from xml.etree import ElementTree

from bandmask import bands

RASTERS = (".jp2", ".tif", ".tiff")
OFFSET_SINCE, OFFSET_DATE = 4.0, "20220125"  # processing baseline that added an offset of −1000 DN, and its first day
_IMAGE = re.compile(r"GRANULE/([^/]+)/IMG_DATA/(?:R\d0m/)?[^/]*_(B\d\d|B8A)(?:_(\d0)m)?\.jp2$")
_LOOSE = re.compile(r"(?:^|[_.\-])(B0?8A|B\d{1,2})(?:_(\d0)m)?$", re.IGNORECASE)
_METADATA = re.compile(r"(?:.*/)?MTD_MSIL(1C|2A)\.xml$")
_KINDS = "a GeoTIFF of all bands, a folder or list of single-band files, or a Sentinel-2 SAFE folder or zip"


@dataclass(frozen=True)
class Layer:
    """Where one band lies: an address that GDAL opens, the channel in that file (from 1), what is added to its DN."""

    band: str
    address: str
    channel: int = 1
    offset: float = 0.0


@dataclass(frozen=True)
class Product:
    """The bands found, one layer each, in SatCLIP order.

    Attributes:
        source: path it was found at, for messages and tags.
        layers: of the bands that are there.
        level: `L1C`, `L2A` or `unknown`.
        baseline: ESA's processing baseline, such as `05.09`, where the metadata state it.
        documented: ESA's metadata came with it, so its numbers need no guessing.
    """

    source: str
    layers: tuple[Layer, ...]
    level: str = "unknown"
    baseline: str | None = None
    documented: bool = False


def find_product(
    path: Path | str | Sequence[Path | str],
    *,
    order: str | Sequence[str] | None = None,
    offset: float | None = None,
) -> Product:
    """Find out which file holds which band.

    Args:
        path: a stacked GeoTIFF, a folder or list of single-band files (`…_B02.jp2`, `B02.tif`), a SAFE folder or zip,
            or its `MTD_MSIL1C.xml`.
        order: of a stack: `satclip` or `eurosat`, or the bands' names; needed where the file doesn't name its bands.
            Twelve channels in a named order are that order without B10, as L2A is exported.
        offset: DN to add to files that come without ESA's metadata: −1000 from processing baseline 04.00 on, else 0.

    Raises:
        FileNotFoundError: nothing there.
        ValueError: no scene; a band that is there twice; an order that is unknown or doesn't fit; an offset that only
            metadata could tell.
    """
    if not isinstance(path, str | Path):
        tree = _Tree(Path(), tuple(str(Path(name).absolute()) for name in path))
        return _loose(tree, tree.names, f"{len(tree.names)} files", offset)
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no scene at {path}; give {_KINDS}")
    if _METADATA.match(path.name):
        path = path.parent
    if path.is_file() and path.suffix.lower() != ".zip":
        return _stack(path, order, offset)
    tree = _Tree.of(path)
    found = [name for name in tree.names if _METADATA.match(name)]
    if found:
        if offset is not None:
            raise ValueError(f"{path} has ESA's metadata, which state the offset; leave offset={offset} out")
        return _safe(tree, min(found, key=lambda name: name.count("/")), str(path))
    return _loose(tree, tree.names, str(path), offset)


@dataclass(frozen=True)
class _Tree:
    """Files of a folder or a zip, by their names in it."""

    root: Path
    names: tuple[str, ...]

    @classmethod
    def of(cls, path: Path) -> _Tree:
        if path.is_file():
            try:
                with zipfile.ZipFile(path) as archive:
                    return cls(path, tuple(archive.namelist()))
            except zipfile.BadZipFile as error:
                raise ValueError(f"{path} is damaged or no zip ({error}); fetch it again") from error
        inner = sorted(path.glob("*.SAFE"))
        if len(inner) > 1:
            raise ValueError(f"{path} holds {len(inner)} products; open one: {', '.join(p.name for p in inner[:4])}")
        path = inner[0] if inner else path
        deep = bool(inner or [p for p in path.iterdir() if _METADATA.match(p.name)])  # else a folder may be anything
        found = path.rglob("*") if deep else path.iterdir()
        return cls(path, tuple(sorted(p.relative_to(path).as_posix() for p in found if p.is_file())))

    def address(self, name: str) -> str:
        # braces: GDAL's way to say where the archive's name ends
        return f"/vsizip/{{{self.root.absolute()}}}/{name}" if self.root.is_file() else str(self.root / name)

    def read(self, name: str) -> bytes:
        if not self.root.is_file():
            return (self.root / name).read_bytes()
        with zipfile.ZipFile(self.root) as archive:
            return archive.read(name)


def _safe(tree: _Tree, metadata: str, source: str) -> Product:
    try:
        root = ElementTree.fromstring(tree.read(metadata))
    except ElementTree.ParseError as error:
        raise ValueError(f"{source}: {metadata} is damaged ({error}); fetch the product again") from error
    level = f"L{_METADATA.match(metadata)[1]}"  # type: ignore[index]
    baseline = _text(root, "PROCESSING_BASELINE")
    offsets = _offsets(root, source, baseline)
    found = [(match, name) for name in tree.names if (match := _IMAGE.search(name))]
    if len(granules := sorted({match[1] for match, _ in found})) > 1:
        raise ValueError(
            f"{source} holds {len(granules)} granules ({', '.join(granules[:3])} …); give the files of one as a list"
        )
    finest: dict[str, tuple[int, str]] = {}
    for match, name in found:
        gsd = int(match[3] or bands.BY_NAME[match[2]].gsd_m)
        if match[2] not in finest or gsd < finest[match[2]][0]:
            finest[match[2]] = (gsd, name)
    if not finest:
        raise ValueError(f"{source} has metadata but no image below GRANULE/*/IMG_DATA; is it unpacked as a whole?")
    layers = {band: Layer(band, tree.address(name), 1, offsets[band]) for band, (_, name) in finest.items()}
    return Product(source, _sorted(layers), level, baseline, documented=True)


def _offsets(root: ElementTree.Element, source: str, baseline: str | None) -> dict[str, float]:
    """DN to add, a band; ESA numbers bands from 0 and says in the same file which is which."""
    quantification = _text(root, "QUANTIFICATION_VALUE") or _text(root, "BOA_QUANTIFICATION_VALUE")
    if quantification is None or float(quantification) != 10_000:
        raise ValueError(f"{source}: the quantification value is {quantification}; expected 10000 DN a reflectance")
    named = {
        element.get("bandId"): bands.parse_band(element.get("physicalBand", ""))
        for element in _all(root, "Spectral_Information")
    }
    ids = named or {str(number): name for number, name in enumerate(bands.NAMES)}
    stated = [*_all(root, "RADIO_ADD_OFFSET"), *_all(root, "BOA_ADD_OFFSET")]
    offsets = {ids[e.get("band_id")]: float(e.text or "nan") for e in stated if e.get("band_id") in ids}
    if not offsets and baseline is not None and float(baseline) >= OFFSET_SINCE:
        raise ValueError(
            f"{source}: processing baseline {baseline} adds an offset, but its metadata state none; fetch it again"
        )
    return {name: offsets.get(name, 0.0) for name in bands.NAMES}


def _loose(tree: _Tree, names: Iterable[str], source: str, offset: float | None) -> Product:
    found: dict[str, tuple[int, str]] = {}
    for name in names:
        path = PurePosixPath(name)
        match = _LOOSE.search(path.stem)
        if path.suffix.lower() not in RASTERS or not match or path.name.startswith("MSK_"):
            continue
        band = bands.parse_band(match[1])
        gsd = int(match[2] or 0)
        if band in found and (found[band][0] == gsd or not gsd or not found[band][0]):  # 0: nobody says which is finer
            raise ValueError(f"{source}: both {PurePosixPath(found[band][1]).name} and {path.name} would be {band}")
        if band not in found or gsd < found[band][0]:
            found[band] = (gsd, name)
    if not found:
        raise ValueError(
            f"{source} is no scene: no {' or '.join(RASTERS)} file whose name ends in a band, such as "
            f"T31UFU_20200101T105441_B02.jp2 or B8A.tif, and no MTD_MSIL1C.xml or MTD_MSIL2A.xml. Give {_KINDS}"
        )
    dates = {match[1] for _, name in found.values() if (match := re.search(r"_(\d{8})T\d{6}_", name))}
    if offset is None and dates and max(dates) >= OFFSET_DATE:
        raise ValueError(
            f"{source} was acquired on {max(dates)}: from processing baseline 04.00 on, 1000 DN were added to all "
            "bands, which only ESA's metadata tell. Open the whole SAFE product, or give offset=-1000 (or 0, if that "
            "was taken off already)"
        )
    level = "L2A" if any(gsd for gsd, _ in found.values()) else "L1C" if "B10" in found else "unknown"
    layers = {band: Layer(band, tree.address(name), 1, offset or 0.0) for band, (_, name) in found.items()}
    return Product(source, _sorted(layers), level)


def _stack(path: Path, order: str | Sequence[str] | None, offset: float | None) -> Product:
    import rasterio
    from rasterio.errors import RasterioIOError

    try:
        with rasterio.open(path) as tif:
            count, described = tif.count, tif.descriptions
    except RasterioIOError as error:
        raise ValueError(f"{path} can't be read ({error}). Give {_KINDS}") from error
    names = _described(described)
    if order is not None:
        given = _ordered(order, count, path)
        if names and names != given:
            raise ValueError(f"{path} names its bands {' '.join(names)}, order says {' '.join(given)}; leave order out")
        names = given
    if names is None:
        raise ValueError(
            f"{path} has {count} bands and doesn't say which; give order: {', '.join(bands.ORDERS)}, or their names, "
            f"such as {list(bands.NAMES[:3])}"
        )
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"{path} has {', '.join(twice)} twice; each band once, please")
    layers = {name: Layer(name, str(path), channel, offset or 0.0) for channel, name in enumerate(names, 1)}
    return Product(str(path), _sorted(layers), "L1C" if "B10" in layers else "unknown")


def _described(descriptions: Sequence[str | None]) -> tuple[str, ...] | None:
    """Bands by the file's own descriptions, such as `B02` or `B02 (490 nm)`, if all of them are bands."""
    words = [re.split(r"[\s,;:(]", text.strip())[0] if text else "" for text in descriptions]
    if any(word.isdigit() for word in words):
        return None  # a number means another band in every file order
    try:
        return tuple(bands.parse_band(word) for word in words)
    except ValueError:
        return None


def _ordered(order: str | Sequence[str], count: int, path: Path) -> tuple[str, ...]:
    names = bands.file_order(order) if isinstance(order, str) else tuple(map(bands.parse_band, order))
    if isinstance(order, str) and count == len(names) - 1:
        names = tuple(name for name in names if name != "B10")
    if len(names) != count:
        raise ValueError(
            f"{path} has {count} bands, the order has {len(names)} ({' '.join(names)}); give the names of all {count} "
            "as a list"
        )
    return names


def _sorted(layers: dict[str, Layer]) -> tuple[Layer, ...]:
    return tuple(layers[name] for name in bands.NAMES if name in layers)


def _all(root: ElementTree.Element, tag: str) -> list[ElementTree.Element]:
    return [element for element in root.iter() if element.tag.rpartition("}")[2] == tag]


def _text(root: ElementTree.Element, tag: str) -> str | None:
    found = _all(root, tag)
    return found[0].text if found else None
