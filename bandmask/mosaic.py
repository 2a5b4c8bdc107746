"""A class map of a whole scene, tile by tile, in memory that does not grow with the scene's height.

Each tile is predicted exactly as a training image of its size is: on its own. So the map says of a pixel what the
network says of one window around it. That is not what one pass over the whole scene would say, and can't be:
DeepLabV3+ pools over its whole image, so each size of image is another question. A network whose field of view ends
within half the overlap gives the same map either way, away from the scene's borders.
"""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bandmask
from bandmask import bands, files, rasters
from bandmask.decoders import DeepLabV3PlusDecoder, SegmentationDecoders
from bandmask.encoders import Card, embed
from bandmask.packs import IGNORE
from bandmask.readers.tiles import Imputer, Span, patches, predict_strips, spans
from bandmask.training import Compute
from bandmask.views import TAPS

if TYPE_CHECKING:
    import xarray as xr

SCALING = "reflectance = DN / 10000"
_CACHE_BYTES = 256 * 2**20  # of GDAL, in bytes for rasterio: a row of compressed blocks of all bands takes 172 MB


class SceneMaps(NamedTuple):
    """Files of a predicted scene: classes, and the network's confidence in percent; 255 is no data in both."""

    classes: Path
    confidence: Path


def predict_scene(
    scene: xr.DataArray,
    encoder: nn.Module,
    head: nn.Module,
    folder: Path | str,
    *,
    card: Card,
    classes: Sequence[str],
    colours: Sequence[str],
    fill: Tensor | None = None,
    impute: Imputer | None = None,
    tile: int | None = None,
    overlap: int | None = None,
    batch_size: int = 16,
    compute: Compute | None = None,
    progress: bool = True,
) -> SceneMaps:
    """Write the class map of a scene and its confidence as cloud-optimized GeoTIFFs, with names, colours and tags.

    A decoder gives a class a pixel; a scene head a class a tile, without overlap, and a strip narrower than a tile at
    the southern and eastern border is left out. Pixels that no band saw have no class; a tile has one if half of it
    was seen. Confidence is the largest softmax probability, mean over seeds; nobody calibrated it.

    Args:
        scene: of `imagery.open_scene`, or like it: (13, y, x) DN, NaN where hidden, with CRS and transform.
        encoder: of `encoders.load_encoder`.
        head: decoder or decoders (`decoders`), or a scene head or heads (`heads`), trained on this encoder.
        folder: gets `classes.tif`, `classes.tif.aux.xml` and `confidence.tif`, each whole or not at all.
        card: of the encoder.
        classes: names.
        colours: hex, one a class.
        fill: reflectance written over hidden pixels, (13,), as in training (`masking.fill_values`); default: the
            number in the card's mask.
        impute: what predicts hidden pixels of its bands instead, such as an `imputation.RidgeFill`.
        tile: side in pixels of the scene of one training image; default: the card's image size. Tiles of another size
            are resized, as training images were.
        overlap: of neighbouring tiles in pixels; default: a quarter of a tile.
        batch_size: tiles a forward.
        compute: device and precision.
        progress: show it.

    Raises:
        ValueError: an encoder, head or classes that don't fit the scene or each other; a fill nobody knows; a scene
            smaller than a tile.
    """
    compute = compute or Compute.of()
    tile = tile or card.image_size
    compute.place(encoder).eval()
    compute.place(head).eval()
    fill = _fill(card, fill).to(compute.device)
    dense = isinstance(head, DeepLabV3PlusDecoder | SegmentationDecoders)
    _check_fit(scene, card, classes, colours, dense)

    def predict(images: Tensor) -> Tensor:
        return probabilities(encoder, head, images, tile, card.image_size, compute)

    _check_answers(predict, tile, card, len(classes), compute.device)
    height, width = scene.sizes["y"], scene.sizes["x"]
    overlap = tile // 4 if overlap is None else overlap
    rows, columns = (spans(n, tile, overlap) if dense else patches(n, tile) for n in (height, width))
    step = 1 if dense else tile
    strips = predict_strips(
        scene, predict, fill, rows, columns, tile, batch_size, compute.device, impute=impute, progress=progress
    )
    tags = _tags(scene, card, tile, overlap if dense else 0, impute)
    transform = scene.rio.transform()
    transform = type(transform)(transform.a * step, 0, transform.c, 0, transform.e * step, transform.f)
    return _write(
        Path(folder), strips, (rows[-1].high, columns[-1].high), scene.rio.crs, transform, classes, colours, tags
    )


@torch.no_grad()
def probabilities(
    encoder: nn.Module, head: nn.Module, images: Tensor, tile: int, image_size: int, compute: Compute
) -> Tensor:
    """Class probabilities (B, C, tile, tile) of a decoder, (B, C, 1, 1) of a scene head; mean over seeds.

    Args:
        encoder: in eval mode, on the device.
        head: likewise.
        images: reflectance without gaps, (B, 13, tile, tile).
        tile: side of the answer.
        image_size: side that images are resized to, as in training.
        compute: device and precision.
    """
    if images.shape[-1] != image_size:
        images = F.interpolate(images, size=(image_size, image_size), mode="bilinear", align_corners=False)
    with compute.autocast():
        if isinstance(head, DeepLabV3PlusDecoder | SegmentationDecoders):
            _, maps = embed(encoder, compute.images(images), TAPS)
            logits = head(maps[TAPS[0]], maps[TAPS[1]], (tile, tile))
        else:
            logits = head(encoder(compute.images(images)))[..., None, None]
    several = logits if logits.ndim == 5 else logits[None]  # (K, B, C, h, w)
    return several.float().softmax(2).mean(0)


def _fill(card: Card, fill: Tensor | None) -> Tensor:
    if fill is None:
        value = (card.mask or {}).get("value")
        if not isinstance(value, int | float):
            raise ValueError(
                f"the card of {card.name} doesn't tell what stands for a hidden pixel (mask value: {value}); pass "
                "fill, such as masking.fill_values('dataset_mean', torch.tensor(pack.band_means())), and for a value "
                "that is fitted to a data set impute as well: fills.make_fill(value, pack, hidden_bands)"
            )
        return torch.full((len(bands.NAMES),), float(value))
    if tuple(fill.shape) != (len(bands.NAMES),) or not fill.isfinite().all():
        raise ValueError(f"fill is one finite reflectance a band, (13,); got {tuple(fill.shape)}")
    return fill.float()


def _check_fit(scene: xr.DataArray, card: Card, classes: Sequence[str], colours: Sequence[str], dense: bool) -> None:
    if scene.dims != ("band", "y", "x") or tuple(scene["band"].values) != tuple(card.bands):
        raise ValueError(
            f"{card.name} takes (band, y, x) with the bands {' '.join(card.bands)}; the scene has {scene.dims} with "
            f"{' '.join(map(str, np.atleast_1d(scene['band'].values)))}"
        )
    if scene.attrs.get("units") != "DN" or card.scaling != SCALING:
        raise ValueError(
            f"{card.name} takes {card.scaling!r}, the scene is in {scene.attrs.get('units', 'no stated units')}; here "
            f"DN become {SCALING!r}"
        )
    if scene.rio.crs is None:
        raise ValueError(
            "the scene has no coordinate system, so a map of it would lie nowhere; open it with open_scene"
        )
    if dense and card.image_size % 32:
        raise ValueError(f"{card.name} was trained at {card.image_size} pixels; a decoder needs a multiple of 32")
    if not 0 < len(classes) == len(colours) < IGNORE:
        raise ValueError(f"{len(classes)} class names and {len(colours)} colours; give one a class, 254 at most")
    learnt = (card.mask or {}).get("bands")
    if learnt is not None and (surprise := [b for b in scene.attrs.get("hidden_bands", ()) if b not in learnt]):
        warnings.warn(
            f"{card.name} learnt to miss {' '.join(learnt) or 'no band'}; this scene lacks {' '.join(surprise)} too",
            stacklevel=3,
        )


def _check_answers(
    predict: Callable[[Tensor], Tensor], tile: int, card: Card, classes: int, device: torch.device
) -> None:
    """One forward of nothing: an encoder or head that doesn't fit fails here, not after an hour."""
    try:
        found = predict(torch.zeros(1, len(card.bands), tile, tile, device=device)).shape[1]
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"the encoder or head doesn't fit the card of {card.name} (13 bands, {card.image_size} pixels, embedding "
            f"of {card.embedding_dim}): {reason}"
        ) from error
    if found != classes:
        raise ValueError(f"the head tells {found} classes apart, {classes} names were given; one name a class")


def _tags(scene: xr.DataArray, card: Card, tile: int, overlap: int, impute: Imputer | None) -> dict[str, str]:
    attributes = scene.attrs
    return {
        "hidden_bands": " ".join(attributes.get("hidden_bands", ())) or "none",
        "scene": Path(str(attributes.get("source", ""))).name,  # a map may be given away: no paths of this machine
        "level": str(attributes.get("level", "unknown")),
        "processing_baseline": str(attributes.get("processing_baseline", "unknown")),
        "note": str(attributes.get("note", "")),
        "encoder": card.name,
        "imputed": " ".join(impute.bands) if impute else "none",
        "tile": f"{tile} pixels, overlap {overlap}",
        "software": f"bandmask {bandmask.__version__}",
    }


def _write(
    folder: Path,
    strips: Iterator[tuple[Span, np.ndarray, np.ndarray]],
    shape: tuple[int, int],
    crs: object,
    transform: object,
    classes: Sequence[str],
    colours: Sequence[str],
    tags: dict[str, str],
) -> SceneMaps:
    """Strips to plain GeoTIFFs, which GDAL then copies: it writes cloud-optimized ones only from whole files."""
    import rasterio

    maps = SceneMaps(folder / "classes.tif", folder / "confidence.tif")
    profile = {"driver": "GTiff", "count": 1, "dtype": "uint8", "nodata": IGNORE, "crs": crs, "transform": transform}
    profile |= {"height": shape[0], "width": shape[1], "compress": "deflate", "bigtiff": "if_safer"}
    with rasterio.Env(GDAL_CACHEMAX=_CACHE_BYTES), files.writing(folder / ".strips") as partial:
        partial.mkdir()
        plain = SceneMaps(partial / "classes.tif", partial / "confidence.tif")
        with (
            rasterio.open(plain.classes, "w+", **profile) as class_map,
            rasterio.open(plain.confidence, "w+", **profile) as confidence,
        ):
            class_map.write_colormap(1, rasters.colour_table(colours))
            class_map.update_tags(1, **rasters.class_tags(classes))
            confidence.set_band_description(1, "confidence, percent")
            for row, found, chance in strips:
                window = ((row.low, row.high), (0, shape[1]))
                class_map.write(found, 1, window=window)
                confidence.write(chance, 1, window=window)
            written = [int(tif.checksum(1)) for tif in (class_map, confidence)]
        if written != [rasters.checksum(path) for path in plain]:  # a disk that runs full while closing raises nothing
            raise OSError("what was written reads otherwise")
        (partial / "done").mkdir()
        for source, resampling in zip(plain, ("mode", "average"), strict=True):
            rasters.copy_as_cog(source, partial / "done" / source.name, resampling=resampling, tags=tags)
    rasters.write_class_names(maps.classes, classes)
    for path in maps:  # both are whole by now: no map is left beside another one's confidence
        with files.writing(path) as place:
            os.replace(folder / ".strips" / "done" / path.name, place)
    shutil.rmtree(folder / ".strips")
    return maps
