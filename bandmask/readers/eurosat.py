"""EuroSAT's multispectral GeoTIFFs, from the official archive's layout, into a pack.

Source: Helber et al. 2019 (MIT licence); contains Copernicus Sentinel data. Its files hold B8A last.
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pandas as pd
from tqdm import tqdm

from bandmask import bands, files
from bandmask.packs import SPLITS, Pack, open_if_same
from bandmask.readers.packing import write_pack
from bandmask.readers.streaming import BadImagesError

EUROSAT_SHAPE = (13, 64, 64)
EUROSAT_CLASSES = (
    "AnnualCrop",
    "Forest",
    "HerbaceousVegetation",
    "Highway",
    "Industrial",
    "Pasture",
    "PermanentCrop",
    "Residential",
    "River",
    "SeaLake",
)


def find_eurosat() -> Path | None:
    """The EuroSAT zip or folder below `BANDMASK_DATA` (or its default), if there is one."""
    root = files.data_root()
    if root is None:
        return None
    for folder in (root / "eurosat", root):
        for candidate in (*sorted(folder.glob("EuroSATallBands*.zip")), folder / "ds", folder / "tif"):
            if candidate.exists():
                return candidate if candidate.suffix == ".zip" else folder
    return None


def download_eurosat(root: Path | str, *, spatial: bool = False) -> Path:
    """Fetch EuroSAT's zip and split files through TorchGeo, which checks their md5 sums.

    Args:
        root: folder to download into.
        spatial: fetch the lists of the spatial split (`eurosat-spatial-*.txt`) too.

    Returns:
        The zip. Needs the network and 2 GB of disk, 5 GB while unpacking.
    """
    from torchgeo.datasets import EuroSAT, EuroSATSpatial

    root = Path(root)
    for kind in (EuroSAT, EuroSATSpatial) if spatial else (EuroSAT,):
        for split in SPLITS:
            kind(str(root), split=split, download=True, checksum=True)
    return root / "EuroSATallBands.zip"


def pack_eurosat(
    source: Path | str | None = None,
    path: Path | str | None = None,
    *,
    split_files: dict[str, Path | str] | None = None,
    split_prefix: str = "eurosat",
    order: str = "eurosat",
    skip_bad: bool = False,
    progress: bool = True,
) -> Pack:
    """Pack EuroSAT, or open the pack if the same source and splits are packed already.

    Args:
        source: zip or folder in the official layout (`…/<Class>/<Class>_N.tif`); default: looked for below
            `BANDMASK_DATA`.
        path: pack folder; default `outputs/packs/eurosat`.
        split_files: your own `{"train": file, "val": file, "test": file}` with a `.jpg` or `.tif` name a line.
        split_prefix: else the files `<prefix>-{train,val,test}.txt` beside the source: `eurosat` is the official
            split, `eurosat-spatial` the spatial one.
        order: channel order of the files.
        skip_bad: leave unreadable, wrongly shaped or empty images out, and list them in the card, instead of
            stopping once all are listed.
        progress: show a progress bar.

    Raises:
        FileNotFoundError: no source or no split files; says where they were looked for and how to get them.
        ValueError: bad images, all named; or channels in another order than `order`.
    """
    source = Path(source) if source else find_eurosat()
    if source is None:
        raise FileNotFoundError(
            "EuroSAT was not found. Set BANDMASK_DATA to a folder that holds EuroSATallBands.zip and "
            "eurosat-{train,val,test}.txt, or fetch both with bandmask.readers.eurosat.download_eurosat(folder)"
        )
    files.require(source, "set BANDMASK_DATA to EuroSAT's folder, or bandmask.readers.eurosat.download_eurosat(folder)")
    path = Path(path) if path else files.outputs_root() / "packs" / "eurosat"
    folder = source.parent if source.is_file() else source
    lists = split_files or {split: folder / f"{split_prefix}-{split}.txt" for split in SPLITS}
    names = _read_splits(lists)
    checksum = _source_checksum(source)
    options = {"splits": files.checksum_of(names), "order": order, "skip_bad": skip_bad}
    if (opened := open_if_same(path, checksum, options)) is not None:
        return opened

    read, members = _open_source(source)
    missing = [name for name in names if name not in members]
    if missing:
        raise FileNotFoundError(
            f"{len(missing)} of {len(names)} images of the split files are not in {source}, first {missing[:3]}; "
            f"it holds {len(members)} .tif files"
        )
    index = pd.DataFrame(
        {
            "file": [members[name] for name in names],
            "label": [EUROSAT_CLASSES.index(name.split("_")[0]) for name in names],
            "split": list(names.values()),
        }
    )
    bad: dict[str, str] = {}

    def images() -> Iterator[np.ndarray]:
        """Every good image; goes on after a bad one, so that one run names them all."""
        for file in tqdm(index["file"], desc="packing EuroSAT", disable=not progress, mininterval=1):
            try:
                image = decode_tif(read(file), EUROSAT_SHAPE)
            except (ValueError, OSError) as error:  # a file that can't be opened is a bad one too
                bad[file] = str(error)
                continue
            yield image
        if bad:
            listing = "\n".join(f"  {file}: {problem}" for file, problem in bad.items())
            raise BadImagesError(
                f"{len(bad)} of {len(index)} images can't be packed:\n{listing}\n"
                "Fetch these files again, or pass skip_bad=True to leave them out. No pack was written."
            )

    def write(skipped: dict[str, str]) -> Pack:
        return write_pack(
            path,
            images(),
            index,
            name="eurosat",
            classes=EUROSAT_CLASSES,
            source=f"{source.name} (Helber et al. 2019, MIT; contains Copernicus Sentinel data)",
            source_checksum=checksum,
            order=order,
            skipped=skipped,
            options=options,
        )

    try:
        return write({})
    except BadImagesError:
        if not skip_bad or len(bad) == len(index):
            raise
    skipped = dict(bad)
    bad.clear()
    index = index[~index["file"].isin(skipped)].reset_index(drop=True)
    return write(skipped)


def decode_tif(data: bytes, shape: tuple[int, ...] | None = None) -> np.ndarray:
    """One image file to (13, H, W) uint16 DN, channels as stored.

    Raises:
        ValueError: truncated, not a TIFF, other than 13 bands, another size than `shape`, not uint16 (a float file
            may hold NaN), or nothing but zeros.
    """
    from rasterio.errors import RasterioError
    from rasterio.io import MemoryFile

    try:
        if not data:
            raise RasterioError("empty file")
        with MemoryFile(data) as memory, memory.open() as tif:
            image = tif.read()
    except RasterioError as error:
        raise ValueError(f"truncated or not a GeoTIFF ({len(data)} bytes)") from error
    if len(image) != len(bands.NAMES):
        raise ValueError(f"{len(image)} bands, expected 13")
    if image.dtype != np.uint16:
        nans = f", {np.isnan(image).mean():.0%} of it NaN" if np.isnan(image).any() else ""
        raise ValueError(f"pixels are {image.dtype}{nans}; expected uint16 DN (reflectance × 10000)")
    if shape is not None and image.shape != shape:
        raise ValueError(f"shape {image.shape}, expected {shape}")
    if not image.any():
        raise ValueError("nothing but zeros: no image there")
    return image


def _read_splits(lists: dict[str, Path | str]) -> dict[str, str]:
    """`{"Forest_12": "train", …}` from split files, checked for unknown classes and for images in two splits."""
    unknown = set(lists) - set(SPLITS)
    if unknown:
        raise ValueError(f"unknown split {sorted(unknown)}; available: {', '.join(SPLITS)}")
    found: dict[str, str] = {}
    for split, file in lists.items():
        path = files.require(file, "split files come with EuroSAT: bandmask.readers.eurosat.download_eurosat(folder)")
        for line in path.read_text().split():
            name = Path(line).stem
            if name.split("_")[0] not in EUROSAT_CLASSES:
                raise ValueError(f"{path}: {line!r} is of no EuroSAT class; classes: {', '.join(EUROSAT_CLASSES)}")
            if found.get(name, split) != split:
                raise ValueError(f"{path}: {line!r} is in the split {found[name]!r} too; splits must not overlap")
            found[name] = split
    return found


def _open_source(source: Path) -> tuple[Callable[[str], bytes], dict[str, str]]:
    """A function that reads a member's bytes, and `{"Forest_12": member}`."""
    if source.is_dir():
        found = {p.stem: str(p.relative_to(source)) for p in sorted(source.rglob("*.tif"))}
        return (lambda name: (source / name).read_bytes()), found
    try:
        archive = zipfile.ZipFile(source)
    except zipfile.BadZipFile as error:
        raise ValueError(f"{source} is not a whole zip file ({error}); fetch it again") from error

    def read(name: str) -> bytes:
        try:
            return archive.read(name)
        except (zipfile.BadZipFile, EOFError, zlib.error) as error:  # a damaged member: let the caller name it
            raise ValueError(f"damaged in the zip ({error})") from error

    return read, {Path(n).stem: n for n in archive.namelist() if n.lower().endswith(".tif")}


def _source_checksum(source: Path) -> str:
    """Checksum of a zip's bytes; of a folder, of its names, sizes and times (reading 2 GB twice would take minutes)."""
    if source.is_file():
        return files.sha256(source)
    stats = [
        (str(p.relative_to(source)), p.lstat().st_size, p.lstat().st_mtime_ns) for p in sorted(source.rglob("*.tif"))
    ]
    return files.checksum_of(stats)
