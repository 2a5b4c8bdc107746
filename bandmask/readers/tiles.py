"""Tiles that overlap, predicted one by one, and cut so that each pixel comes from the tile it is most central in.

A pixel takes its class from the tile whose centre is nearest, so away from the scene's borders none is nearer than half
the overlap to the edge of the window that decided it. A row of tiles is in memory at a time, however large the scene.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from bandmask import bands
from bandmask.packs import DN_PER_REFLECTANCE, IGNORE

if TYPE_CHECKING:
    import xarray as xr


class Imputer(Protocol):
    """Predicts bands from the others, as `imputation.RidgeFill` does."""

    bands: tuple[str, ...]

    def __call__(self, images: Tensor, hidden: Tensor) -> Tensor:
        """Reflectance (B, k, H, W) of its k bands, of images (B, 13, H, W) and what is hidden of them."""
        ...


class Span(NamedTuple):
    """One tile along one axis: the pixels it sees begin at `start`; of its answer, `skip` on, it owns `low`:`high`."""

    start: int
    skip: int
    low: int
    high: int


def spans(length: int, tile: int, overlap: int) -> list[Span]:
    """Tiles of one axis that own each pixel once; the last tile is moved back into the scene.

    Raises:
        ValueError: a scene shorter than a tile, or an overlap that leaves no step.
    """
    if not 0 <= overlap < tile:
        raise ValueError(f"overlap is 0 to {tile - 1} pixels, less than a tile; got {overlap}")
    if length < tile:
        raise ValueError(f"the scene is {length} pixels long, a tile takes {tile}; cut a larger scene, or lower tile")
    starts = [*range(0, length - tile, tile - overlap), length - tile]
    middles = [(first + tile + second) // 2 for first, second in itertools.pairwise(starts)]
    return [
        Span(start, low - start, low, high)
        for start, low, high in zip(starts, [0, *middles], [*middles, length], strict=True)
    ]


def patches(length: int, tile: int) -> list[Span]:
    """Tiles of one axis side by side, each owning one pixel of a coarse map; a rest narrower than a tile is left out.

    Raises:
        ValueError: a scene shorter than a tile.
    """
    if length < tile:
        raise ValueError(f"the scene is {length} pixels long, a tile takes {tile}; cut a larger scene, or lower tile")
    return [Span(number * tile, 0, number, number + 1) for number in range(length // tile)]


def predict_strips(
    scene: xr.DataArray,
    predict: Callable[[Tensor], Tensor],
    fill: Tensor,
    rows: Sequence[Span],
    columns: Sequence[Span],
    tile: int,
    batch_size: int,
    device: torch.device,
    *,
    impute: Imputer | None = None,
    progress: bool = False,
) -> Iterator[tuple[Span, np.ndarray, np.ndarray]]:
    """Classes and confidence, a row of tiles at a time: what they own, uint8 (rows, width) each, 255 = no data.

    Args:
        scene: (13, y, x) DN.
        predict: complete reflectance (B, 13, tile, tile) to probabilities (B, C, tile, tile), or (B, C, 1, 1).
        fill: (13,), on `device`.
        rows: tiles down.
        columns: tiles across.
        tile: side in pixels.
        batch_size: tiles a forward.
        device: where `predict` computes.
        impute: what predicts hidden pixels of its `bands`, after all have got `fill`, such as `imputation.RidgeFill`.
        progress: show it.
    """
    batches = [columns[first : first + batch_size] for first in range(0, len(columns), batch_size)]
    jobs = [(row, batch) for row in rows for batch in batches]
    bar = tqdm(total=len(rows) * len(columns), desc="predicting", unit="tile", disable=not progress)
    for number, ((row, batch), window) in enumerate(zip(jobs, _windows(scene, jobs, tile), strict=True)):
        if number % len(batches) == 0:
            strip = np.full((2, row.high - row.low, columns[-1].high), IGNORE, np.uint8)
        tiles = torch.stack([window[:, :, c.start - batch[0].start :][:, :, :tile] for c in batch]).to(device)
        found = _predict_tiles(tiles / DN_PER_REFLECTANCE, predict, fill, impute)
        for column, answer in zip(batch, found, strict=True):
            across, down = column.high - column.low, row.high - row.low
            own = answer[:, row.skip : row.skip + down, column.skip : column.skip + across]
            strip[:, :, column.low : column.high] = own
        bar.update(len(batch))
        if number % len(batches) == len(batches) - 1:
            yield row, strip[0], strip[1]
    bar.close()


def _predict_tiles(
    reflectance: Tensor, predict: Callable[[Tensor], Tensor], fill: Tensor, impute: Imputer | None
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
    answer = torch.full((len(seen), 2, *best.shape[1:]), IGNORE, dtype=torch.uint8, device=fill.device)
    answer[some] = torch.stack([best, (100 * chance).round()], 1).to(torch.uint8)
    if best.shape[1:] != seen.shape[1:]:  # one answer a tile
        seen = (seen.float().mean((1, 2)) >= 0.5)[:, None, None]
    return answer.masked_fill(~seen[:, None], IGNORE).cpu().numpy()


def _windows(scene: xr.DataArray, jobs: Sequence[tuple[Span, Sequence[Span]]], tile: int) -> Iterator[Tensor]:
    """DN (13, tile, across) of each job, the next one read while this one is predicted."""

    def read(job: tuple[Span, Sequence[Span]]) -> Tensor:
        row, batch = job
        across = slice(batch[0].start, batch[-1].start + tile)
        part = scene.isel(y=slice(row.start, row.start + tile), x=across)
        return torch.from_numpy(np.ascontiguousarray(part.values, np.float32))

    with ThreadPoolExecutor(max_workers=1) as pool:
        ahead = pool.submit(read, jobs[0])
        for following in jobs[1:]:
            window = ahead.result()
            ahead = pool.submit(read, following)
            yield window
        yield ahead.result()
