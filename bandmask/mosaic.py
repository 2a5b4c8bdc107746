"""A class map of a whole scene, tile by tile, that reads no more of it at once than a few tiles; maps as GeoTIFFs.

Each tile is predicted exactly as a training image of its size is: on its own. Tiles overlap, and a pixel takes its
class from the one whose centre is nearest, so away from borders none is nearer than half the overlap to the edge of the
window that decided it. One pass over the whole scene would say something else, and each size of image something else
again: DeepLabV3+ pools over its whole image.
"""

import itertools
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple
from xml.sax.saxutils import escape

import numpy as np
import rasterio
import torch
import torch.nn.functional as F
import xarray as xr
from matplotlib.colors import to_rgb
from rasterio import Affine
from rasterio.crs import CRS
from torch import Tensor, nn
from tqdm import tqdm

import bandmask
from bandmask import bands, files
from bandmask.encoders import Card, embed
from bandmask.evaluation import decoder_taps
from bandmask.fills import RidgeFill
from bandmask.heads import DeepLabV3PlusDecoder, SegmentationDecoders
from bandmask.images import Source
from bandmask.moments import LEVELS
from bandmask.packs import IGNORE
from bandmask.scene import distortion, note_of_pixels
from bandmask.train import Compute

SCALING = "reflectance = DN / 10000"


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
    decoder: nn.Module | Sequence[DeepLabV3PlusDecoder],
    folder: Path | str,
    *,
    card: Card,
    classes: Sequence[str],
    colours: Sequence[str],
    fill: Tensor | np.ndarray | Sequence[float],
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
        encoder: of `encoders.load_encoder`, and its `card`.
        decoder: or decoders, trained on this encoder.
        folder: gets `classes.tif`, `classes.tif.aux.xml` and `confidence.tif`, each whole or not at all.
        classes, colours: names, and hex.
        fill: reflectance written over hidden pixels, (13,), as in training.
        impute: what predicts hidden pixels of its bands instead.
        tile: side in pixels of the scene of one training image, resized if the card's image size is another (default).
        overlap: of neighbouring tiles in pixels; default: a quarter of a tile.

    Raises:
        ValueError: an encoder, decoder, classes or fill that don't fit the scene or each other; a scene smaller than a
            tile, in no metres of ground, with an uneven grid, or whose values are not in the unit that it states.

    Warns where the scene is of another level than the encoder's data, or lacks bands that it never learnt to miss.
    """
    encoder = encoder if isinstance(encoder, nn.Module) else encoder.model  # of `bm.load_encoder`
    if not isinstance(decoder, nn.Module):
        decoder = SegmentationDecoders(decoder, range(len(decoder)))
    fill = torch.as_tensor(fill, dtype=torch.float32)
    compute, tile = compute or Compute.of(), tile or card.image_size
    overlap = tile // 4 if overlap is None else overlap
    compute.place(encoder).eval()
    compute.place(decoder).eval()
    if tuple(fill.shape) != (len(bands.NAMES),) or not (fill.abs() <= 3).all():
        raise ValueError(f"fill is one reflectance a band, (13,), up to 3; got {tuple(fill.shape)} up to {fill.max()}")
    _check_fit(scene, card, classes, colours)
    transform = transform_of(scene)

    def predict(images: Tensor) -> Tensor:
        found = probabilities(encoder, decoder, images, card.image_size, compute)
        if found.shape[1] != len(classes):
            raise ValueError(f"the decoder tells {found.shape[1]} classes apart, {len(classes)} names were given")
        return found

    about = fill.to(compute.device), tile, overlap, batch_size
    maps, hidden = predict_tiles(scene, predict, *about, impute=impute)
    said, learnt = scene.attrs, (card.mask or {}).get("bands")
    if learnt is not None and (surprise := [name for name in hidden if name not in learnt]):
        learnt = f"{card.name} learnt to miss {' '.join(learnt) or 'no band'}"
        warnings.warn(f"{learnt}; this scene lacks {' '.join(surprise)} too", stacklevel=2)
    tags = {name: str(said.get(name, "unknown")) for name in ("level", "processing_baseline", "note")}
    tags |= {"hidden_bands": " ".join(hidden) or "none", "encoder": card.name}
    tags |= {"scene": Path(str(said.get("source", ""))).name}  # a map may be given away: no paths of this machine
    tags |= {"imputed": " ".join(impute.bands) if impute else "none", "tile": f"{tile} pixels, overlap {overlap}"}
    tags |= {"software": f"bandmask {bandmask.__version__}"}
    return _write(Path(folder), maps, scene.rio.crs, transform, dict(zip(classes, colours, strict=True)), tags)


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


def predict_tiles(
    scene: xr.DataArray,
    predict: Callable[[Tensor], Tensor],
    fill: Tensor,
    tile: int,
    overlap: int,
    batch_size: int,
    *,
    impute: RidgeFill | None = None,
) -> tuple[np.ndarray, list[str]]:
    """Classes, and confidence in percent, uint8 (2, y, x), 255 where nothing was seen; the bands without any value.

    `predict` makes complete reflectance (B, 13, tile, tile) on the device of `fill` to probabilities (B, C, tile,
    tile); hidden pixels get `fill` (13,), then those of the bands of `impute` what that predicts.
    """
    source, seen = Source(scene), np.zeros(len(bands.NAMES), bool)
    scale = source.scale  # refused where its values are not in it
    rows, columns = (spans(scene.sizes[axis], tile, overlap) for axis in ("y", "x"))
    batches = [columns[first : first + batch_size] for first in range(0, len(columns), batch_size)]

    def read(row: Span, batch: Sequence[Span]) -> Tensor:
        window = slice(row.start, row.start + tile), slice(batch[0].start, batch[-1].start + tile)
        return torch.from_numpy(source.numbers(window)[0])  # (13, tile, across)

    windows = list(itertools.product(rows, batches))
    maps = np.full((2, scene.sizes["y"], scene.sizes["x"]), IGNORE, np.uint8)
    with ThreadPoolExecutor(max_workers=1) as pool:  # the next window is read while this one is predicted
        ahead = pool.submit(read, *windows[0])
        for place, (row, batch) in enumerate(tqdm(windows, desc="predicting", unit="batch"), start=1):
            window = ahead.result()
            seen |= window.isfinite().any((1, 2)).numpy()
            if place < len(windows):
                ahead = pool.submit(read, *windows[place])
            images = torch.stack([window[:, :, c.start - batch[0].start :][:, :, :tile] for c in batch])
            answers = _predict_batch(images.to(fill.device) / scale, predict, fill, impute)
            for column, answer in zip(batch, answers, strict=True):
                own = answer[:, row.skip :, column.skip :][:, : row.high - row.low, : column.high - column.low]
                maps[:, row.low : row.high, column.low : column.high] = own
    return maps, [name for name, there in zip(bands.NAMES, seen, strict=True) if not there]


def _predict_batch(
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
    for axis, sign in (("x", 1), ("y", -1)):
        steps = sign * np.diff(scene[axis].values) if axis in scene.coords else np.zeros(1)
        if steps.min() <= 0 or np.ptp(steps) > 1e-3 * steps.mean():
            even = "sort it, scene.sortby('y', ascending=False), and take even steps"
            raise ValueError(f"{axis} of the scene is no even grid, north up; {even}")
    note_of_pixels(scene)
    transform, crs = scene.rio.transform(recalc=True), scene.rio.crs
    if said := distortion(crs, transform, scene.shape[-2:]) if crs else "in no coordinate system":
        raise ValueError(f"a map needs metres, the scene is {said}; use scene.open_scene, or warp it to its UTM zone")
    return transform


def _check_fit(scene: xr.DataArray, card: Card, classes: Sequence[str], colours: Sequence[str]) -> None:
    if not hasattr(scene, "dims"):
        raise ValueError(f"a map is of a scene with coordinates, as bm.open_scene opens one; got {type(scene)}")
    if scene.dims != ("band", "y", "x") or tuple(scene["band"].values) != tuple(card.bands):
        there = f"{scene.dims} with {' '.join(map(str, np.atleast_1d(scene['band'].values)))}"
        raise ValueError(f"{card.name} takes (band, y, x) with the bands {' '.join(card.bands)}; the scene has {there}")
    if scene.attrs.get("units") != "DN" or card.scaling != SCALING:
        units = scene.attrs.get("units", "no stated units")
        raise ValueError(f"{card.name} takes {card.scaling!r}, the scene is in {units}; here DN become {SCALING!r}")
    if not 0 < len(classes) == len(colours) < IGNORE:
        raise ValueError(f"{len(classes)} class names and {len(colours)} colours; give one a class, 254 at most")
    if len(set(classes)) < len(classes):
        raise ValueError(f"class names must differ; got {', '.join(classes)}")
    levels = scene.attrs.get("level"), card.data.get("level")
    if {*levels} == {*LEVELS}:
        said = "the scene is {}, {} learnt of {}: classes may mean nothing; open the other product"
        warnings.warn(said.format(levels[0], card.name, levels[1]), stacklevel=3)


# --- class maps as GeoTIFFs that a GIS opens where they belong, in their colours


def _write(
    folder: Path, maps: np.ndarray, crs: CRS, transform: Affine, classes: Mapping[str, str], tags: Mapping[str, str]
) -> SceneMaps:
    """Both maps, or what was there before; GDAL and QGIS look for names in the file beside."""
    paths = SceneMaps(folder / "classes.tif", folder / "confidence.tif")
    categories = "".join(f"<Category>{escape(name)}</Category>\n" for name in classes)
    inner = f'<PAMRasterBand band="1"><CategoryNames>\n{categories}</CategoryNames></PAMRasterBand>'
    with (
        files.writing(paths.classes) as first,
        files.writing(paths.confidence) as second,
        files.writing(folder / "classes.tif.aux.xml") as beside,
    ):
        _write_map(first, maps[0], crs, transform, classes, tags)
        _write_map(second, maps[1], crs, transform, {}, tags)
        beside.write_text(f"<PAMDataset>{inner}</PAMDataset>\n", encoding="utf-8")
    return paths


def _write_map(
    path: Path, values: np.ndarray, crs: CRS, transform: Affine, classes: Mapping[str, str], tags: Mapping[str, str]
) -> None:
    """Values (H, W) uint8 as a cloud-optimized GeoTIFF; of classes their colours (hex), and tags `class_0`, …

    GDAL only prints that a disk ran full while a file was closed, so what was written is read again.
    """
    height, width = values.shape
    profile = {"driver": "COG", "count": 1, "dtype": "uint8", "nodata": IGNORE, "crs": crs, "transform": transform}
    profile |= {"height": height, "width": width, "compress": "DEFLATE", "num_threads": "ALL_CPUS"}
    table: dict[int, Any] = {n: (*(round(255 * c) for c in to_rgb(hue)), 255) for n, hue in enumerate(classes.values())}
    try:
        with rasterio.open(path, "w", **profile, overview_resampling="mode" if classes else "average") as tif:
            tif.write(values, 1)
            tif.update_tags(**tags)
            if classes:
                tif.write_colormap(1, {**table, IGNORE: (255, 255, 255, 0)})  # which is transparent
                tif.update_tags(1, **{f"class_{n}": name for n, name in enumerate(classes)})
        with rasterio.open(path) as tif:
            if not np.array_equal(tif.read(1), values):
                raise OSError("what was written reads otherwise")
    except Exception as error:  # of rasterio's many kinds, the way out is the same
        raise OSError(f"GDAL failed: {error}") from error
