"""A class map of a whole scene, tile by tile, in memory that does not grow with the scene's height; maps as GeoTIFFs.

Each tile is predicted exactly as a training image of its size is: on its own. Tiles overlap, and a pixel takes its
class from the one whose centre is nearest, so away from borders none is nearer than half the overlap to the edge of the
window that decided it. One pass over the whole scene would say something else, and each size of image something else
again: DeepLabV3+ pools over its whole image.
"""

from __future__ import annotations

import itertools
import math
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from xml.sax.saxutils import escape

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.colors import to_rgb
from torch import Tensor, nn
from tqdm import tqdm

import bandmask
from bandmask import bands, datasets, files
from bandmask.encoders import Card, embed
from bandmask.evaluation import decoder_taps
from bandmask.fills import RidgeFill
from bandmask.packs import DN_PER_REFLECTANCE, IGNORE, Pack
from bandmask.scene import note_of_pixels, open_raster
from bandmask.train import Compute

if TYPE_CHECKING:
    import xarray as xr
    from rasterio import Affine
    from rasterio.crs import CRS

SCALING = "reflectance = DN / 10000"
_CACHE_BYTES = 256 * 2**20  # of GDAL, in bytes for rasterio: a row of compressed blocks of all bands takes 172 MB


class SceneMaps(NamedTuple):
    """Files of a predicted scene: classes, and the network's confidence in percent; 255 is no data in both."""

    classes: Path
    confidence: Path


class Span(NamedTuple):
    """One tile along one axis: the pixels it sees begin at `start`; of its answer, `skip` on, it owns `low`:`high`."""

    start: int
    skip: int
    low: int
    high: int


def spans(length: int, tile: int, overlap: int) -> list[Span]:
    """Tiles of one axis that own each pixel once, the last moved back into the scene; `ValueError` if none fits."""
    if length < tile:
        raise ValueError(f"the scene is {length} pixels long, a tile takes {tile}; cut a larger scene, or lower tile")
    if not 0 <= overlap < tile:
        raise ValueError(f"overlap is 0 to {tile - 1} pixels, less than a tile; got {overlap}")
    starts = [*range(0, length - tile, tile - overlap), length - tile]
    middles = [(first + tile + second) // 2 for first, second in itertools.pairwise(starts)]
    edges = zip(starts, [0, *middles], [*middles, length], strict=True)
    return [Span(start, low - start, low, high) for start, low, high in edges]


def predict_scene(
    scene: xr.DataArray,
    encoder: nn.Module,
    decoder: nn.Module,
    folder: Path | str,
    *,
    card: Card,
    classes: Sequence[str],
    colours: Sequence[str],
    fill: Tensor,
    impute: RidgeFill | None = None,
    tile: int | None = None,
    overlap: int | None = None,
    batch_size: int = 16,
    compute: Compute | None = None,
) -> SceneMaps:
    """Write the class map of a scene and its confidence as cloud-optimized GeoTIFFs, with names, colours and tags.

    Pixels that no band saw have no class. Confidence is the largest softmax probability, mean over seeds; nobody
    calibrated it.

    Args:
        scene: of `scene.open_scene`, or like it: (13, y, x) DN, NaN where hidden, with CRS in metres.
        encoder: of `encoders.load_encoder`.
        decoder: or decoders, trained on this encoder.
        folder: gets `classes.tif`, `classes.tif.aux.xml` and `confidence.tif`, each whole or not at all.
        card: of the encoder.
        classes: names.
        colours: hex, one a class.
        fill: reflectance written over hidden pixels, (13,), as in training.
        impute: what predicts hidden pixels of its bands instead.
        tile: side in pixels of the scene of one training image, resized if the card's image size is another (default).
        overlap: of neighbouring tiles in pixels; default: a quarter of a tile.
        batch_size: tiles a forward.
        compute: device and precision.

    Raises:
        ValueError: an encoder, decoder or classes that don't fit the scene or each other; a fill that is none; a scene
            smaller than a tile, or whose pixels lie nowhere.
    """
    compute, tile = compute or Compute.of(), tile or card.image_size
    overlap = tile // 4 if overlap is None else overlap
    compute.place(encoder).eval()
    compute.place(decoder).eval()
    if tuple(fill.shape) != (len(bands.NAMES),) or not fill.isfinite().all():
        raise ValueError(f"fill is one finite reflectance a band, (13,); got {tuple(fill.shape)}")
    _check_fit(scene, card, classes, colours)
    transform = transform_of(scene)

    def predict(images: Tensor) -> Tensor:
        return probabilities(encoder, decoder, images, card.image_size, compute)

    try:  # one forward of nothing: what doesn't fit fails here, not after an hour
        told = predict(torch.zeros(1, len(card.bands), tile, tile, device=compute.device)).shape[1]
    except RuntimeError as error:
        problem = f"the encoder or decoder doesn't fit the card of {card.name} (13 bands, {card.image_size} pixels)"
        raise ValueError(f"{problem}: {str(error).splitlines()[0]}") from error
    if told != len(classes):
        raise ValueError(f"the decoder tells {told} classes apart, {len(classes)} names were given; one name a class")
    rows, columns = (spans(scene.sizes[axis], tile, overlap) for axis in ("y", "x"))
    strips = predict_strips(
        scene, predict, fill.float().to(compute.device), rows, columns, tile, batch_size, impute=impute
    )
    said = scene.attrs
    tags = {name: str(said.get(name, "unknown")) for name in ("level", "processing_baseline", "note")}
    tags |= {"hidden_bands": " ".join(said.get("hidden_bands", ())) or "none", "encoder": card.name}
    tags |= {"scene": Path(str(said.get("source", ""))).name}  # a map may be given away: no paths of this machine
    tags |= {"imputed": " ".join(impute.bands) if impute else "none", "tile": f"{tile} pixels, overlap {overlap}"}
    tags |= {"software": f"bandmask {bandmask.__version__}"}
    return _write(
        Path(folder), strips, (rows[-1].high, columns[-1].high), scene.rio.crs, transform, classes, colours, tags
    )


@torch.no_grad()
def probabilities(encoder: nn.Module, decoder: nn.Module, images: Tensor, image_size: int, compute: Compute) -> Tensor:
    """Class probabilities (B, C, tile, tile) of a decoder; of several the mean.

    Images are reflectance without gaps, (B, 13, tile, tile), and resized to `image_size`, as in training.
    """
    size = images.shape[-2:]
    if size[0] != image_size:
        images = F.interpolate(images, size=(image_size, image_size), mode="bilinear", align_corners=False)
    with compute.autocast():
        low, high = taps = decoder_taps(encoder)
        _, maps = embed(encoder, compute.images(images), taps)
        logits = decoder(maps[low], maps[high], tuple(size))
    several = logits if logits.ndim == 5 else logits[None]  # (K, B, C, h, w)
    return several.float().softmax(2).mean(0)


def predict_strips(
    scene: xr.DataArray,
    predict: Callable[[Tensor], Tensor],
    fill: Tensor,
    rows: Sequence[Span],
    columns: Sequence[Span],
    tile: int,
    batch_size: int,
    *,
    impute: RidgeFill | None = None,
) -> Iterator[tuple[Span, np.ndarray]]:
    """Classes and confidence, a row of tiles at a time: what they own, uint8 (2, rows, width), 255 = no data.

    `predict` makes complete reflectance (B, 13, tile, tile) on the device of `fill` to probabilities (B, C, tile,
    tile); hidden pixels get `fill` (13,), then those of the bands of `impute` what that predicts.
    """
    batches = [columns[first : first + batch_size] for first in range(0, len(columns), batch_size)]

    def read(row: Span, batch: Sequence[Span]) -> Tensor:
        across = slice(batch[0].start, batch[-1].start + tile)
        part = scene.isel(y=slice(row.start, row.start + tile), x=across)
        return torch.from_numpy(np.ascontiguousarray(part.values, np.float32))  # (13, tile, across)

    jobs = itertools.product(rows, batches)
    bar = tqdm(total=len(rows) * len(columns), desc="predicting", unit="tile")
    with ThreadPoolExecutor(max_workers=1) as pool:  # the next window is read while this one is predicted
        ahead = pool.submit(read, *next(jobs))
        for row in rows:
            strip = np.full((2, row.high - row.low, columns[-1].high), IGNORE, np.uint8)
            for batch in batches:
                window = ahead.result()
                if (following := next(jobs, None)) is not None:
                    ahead = pool.submit(read, *following)
                tiles = torch.stack([window[:, :, c.start - batch[0].start :][:, :, :tile] for c in batch])
                answers = _predict_tiles(tiles.to(fill.device) / DN_PER_REFLECTANCE, predict, fill, impute)
                for column, answer in zip(batch, answers, strict=True):
                    own = answer[:, row.skip :, column.skip :][:, : row.high - row.low, : column.high - column.low]
                    strip[:, :, column.low : column.high] = own
                bar.update(len(batch))
            yield row, strip
    bar.close()


def _predict_tiles(
    reflectance: Tensor, predict: Callable[[Tensor], Tensor], fill: Tensor, impute: RidgeFill | None
) -> np.ndarray:
    """(B, 2, h, w) uint8: class and confidence in percent, 255 where nothing was seen."""
    hidden = reflectance.isnan()
    seen = ~hidden.all(1)  # (B, S, S)
    some = seen.flatten(1).any(1)
    if not some.any():
        return np.full((len(seen), 2, *seen.shape[1:]), IGNORE, np.uint8)
    images = torch.where(hidden, fill[:, None, None], reflectance)
    if impute is not None:
        channels = bands.channel_indices(impute.bands)
        images[:, channels] = torch.where(hidden[:, channels], impute(images, hidden[:, channels]), images[:, channels])
    chance, best = predict(images[some]).max(1)  # (B', h, w)
    answer = torch.full((len(seen), 2, *seen.shape[1:]), IGNORE, dtype=torch.uint8, device=fill.device)
    answer[some] = torch.stack([best, (100 * chance).round()], 1).to(torch.uint8)
    return answer.masked_fill(~seen[:, None], IGNORE).cpu().numpy()


def transform_of(scene: xr.DataArray) -> Affine:
    """Where pixels lie by their own coordinates: a transform that was written once outlives `coarsen` and `sortby`.

    Raises:
        ValueError: no coordinate system, or none in metres; coordinates uneven, or not from north to south.
    """
    crs = scene.rio.crs
    if crs is None or not crs.is_projected or not math.isclose(crs.linear_units_factor[1], 1.0):
        there = crs.to_string() if crs else "no coordinate system"
        raise ValueError(
            f"a map needs metres, the scene is in {there}; use scene.open_scene, or warp it to its UTM zone"
        )
    for axis, sign in (("x", 1), ("y", -1)):
        steps = sign * np.diff(scene[axis].values) if axis in scene.coords else np.zeros(1)
        if steps.min() <= 0 or np.ptp(steps) > 1e-3 * steps.mean():
            raise ValueError(
                f"{axis} of the scene is no even grid, north up; sort it, scene.sortby('y', ascending=False), and take "
                "even steps"
            )
    note_of_pixels(scene)
    return scene.rio.transform(recalc=True)


def _check_fit(scene: xr.DataArray, card: Card, classes: Sequence[str], colours: Sequence[str]) -> None:
    if scene.dims != ("band", "y", "x") or tuple(scene["band"].values) != tuple(card.bands):
        there = f"{scene.dims} with {' '.join(map(str, np.atleast_1d(scene['band'].values)))}"
        raise ValueError(f"{card.name} takes (band, y, x) with the bands {' '.join(card.bands)}; the scene has {there}")
    if scene.attrs.get("units") != "DN" or card.scaling != SCALING:
        units = scene.attrs.get("units", "no stated units")
        raise ValueError(f"{card.name} takes {card.scaling!r}, the scene is in {units}; here DN become {SCALING!r}")
    if card.image_size % 32:
        raise ValueError(f"{card.name} was trained at {card.image_size} pixels; a decoder needs a multiple of 32")
    if not 0 < len(classes) == len(colours) < IGNORE:
        raise ValueError(f"{len(classes)} class names and {len(colours)} colours; give one a class, 254 at most")
    learnt = (card.mask or {}).get("bands")
    if learnt is not None and (surprise := [b for b in scene.attrs.get("hidden_bands", ()) if b not in learnt]):
        learnt = f"{card.name} learnt to miss {' '.join(learnt) or 'no band'}"
        warnings.warn(f"{learnt}; this scene lacks {' '.join(surprise)} too", stacklevel=3)


# --- class maps as GeoTIFFs that a GIS opens where they belong, in their colours


def _write(
    folder: Path,
    strips: Iterator[tuple[Span, np.ndarray]],
    shape: tuple[int, int],
    crs: CRS,
    transform: Affine,
    classes: Sequence[str],
    colours: Sequence[str],
    tags: Mapping[str, str],
) -> SceneMaps:
    """Strips to plain GeoTIFFs, which GDAL then copies: it writes cloud-optimized ones only from whole files.

    GDAL only prints that a disk ran full while a file was closed, so what was written is read again.
    """
    import rasterio
    from rasterio.shutil import copy

    maps = SceneMaps(folder / "classes.tif", folder / "confidence.tif")
    with rasterio.Env(GDAL_CACHEMAX=_CACHE_BYTES), files.writing(folder / ".strips") as partial:
        (partial / "done").mkdir(parents=True)
        plain = [partial / path.name for path in maps]
        with (
            _new(plain[0], shape, crs, transform, tags) as first,
            _new(plain[1], shape, crs, transform, tags) as second,
        ):
            _colour(first, classes, colours)
            second.set_band_description(1, "confidence, percent")
            for row, strip in strips:
                for tif, part in zip((first, second), strip, strict=True):
                    tif.write(part, 1, window=((row.low, row.high), (0, shape[1])))
            sums = [int(tif.checksum(1)) for tif in (first, second)]
        try:
            for source, resampling, checksum in zip(plain, ("mode", "average"), sums, strict=True):
                options = {"compress": "DEFLATE", "overview_resampling": resampling, "num_threads": "ALL_CPUS"}
                copy(source, partial / "done" / source.name, driver="COG", **options)
                for path in (source, partial / "done" / source.name):
                    with rasterio.open(path) as tif:
                        if int(tif.checksum(1)) != checksum:
                            raise OSError("what was written reads otherwise")
        except Exception as error:  # of rasterio's many kinds, the way out is the same
            raise OSError(f"GDAL failed: {error}") from error
    categories = "".join(f"<Category>{escape(name)}</Category>\n" for name in classes)
    inner = f'<PAMRasterBand band="1"><CategoryNames>\n{categories}</CategoryNames></PAMRasterBand>'
    with files.writing(folder / "classes.tif.aux.xml") as partial:  # where GDAL and QGIS look for names
        partial.write_text(f"<PAMDataset>{inner}</PAMDataset>\n", encoding="utf-8")
    for path in maps:  # both are whole by now: no map is left beside another one's confidence
        with files.writing(path) as place:
            os.replace(folder / ".strips" / "done" / path.name, place)
    shutil.rmtree(folder / ".strips")
    return maps


def _new(path: Path, shape: tuple[int, int], crs: CRS, transform: Affine, tags: Mapping[str, str]) -> Any:
    import rasterio

    profile = {"driver": "GTiff", "count": 1, "dtype": "uint8", "nodata": IGNORE, "crs": crs, "transform": transform}
    profile |= {"height": shape[0], "width": shape[1], "compress": "deflate", "bigtiff": "if_safer"}
    tif = rasterio.open(path, "w+", **profile)
    tif.update_tags(**tags)
    return tif


def _colour(tif: Any, names: Sequence[str], colours: Sequence[str]) -> None:
    """GDAL's table of colours, where 255 is transparent, and names as tags `class_0`, `class_1`, …"""
    table: dict[int, Any] = {n: (*(round(255 * c) for c in to_rgb(colour)), 255) for n, colour in enumerate(colours)}
    tif.write_colormap(1, {**table, IGNORE: (255, 255, 255, 0)})
    tif.update_tags(1, **{f"class_{n}": name for n, (name, _) in enumerate(zip(names, colours, strict=True))})


def write_class_map(path: Path, classes: np.ndarray, pack: Pack, row: int, colours: Sequence[str]) -> Path:
    """Write the class map (H, W) uint8 of a pack's image where it lies, with names and colours (hex); 255 is no data.

    Its place is read from the file that the image was cut from: of the sample, or a file each of SEN12MS or DFC2020.

    Raises:
        FileNotFoundError: that file is not on this machine any more.
        ValueError: a data set whose files hold no place, or names and colours that don't match.
    """
    from rasterio.windows import Window, transform

    entry, dataset = pack.index.iloc[row], pack.card["dataset"]
    if dataset.startswith("sample"):
        source, corner = datasets.SAMPLE_FOLDER / "B02.tif", (int(entry["col"]), int(entry["row"]))
    elif dataset in ("sen12ms", "dfc2020"):
        source, corner = (datasets.find_source(dataset) or Path()) / str(entry["file"]), (0, 0)
    else:
        raise ValueError(f"where images of {dataset!r} lie is not known; available: sample, sen12ms, dfc2020")
    with open_raster(files.require(source, "put the data set back that it belongs to (BANDMASK_DATA)")) as tif:
        crs, place = tif.crs, transform(Window(*corner, 1, 1), tif.transform)
    if crs is None:
        raise ValueError(f"{source} has no coordinate system, so a map of it would lie nowhere")
    with files.writing(path) as partial, _new(partial, classes.shape, crs, place, {}) as tif:
        tif.write(classes, 1)
        _colour(tif, pack.classes, colours)
    return path
