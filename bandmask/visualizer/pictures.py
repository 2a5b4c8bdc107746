"""Bands as colours: composites, single bands and indices of complete and incomplete images, under one stretch.

Pure functions from arrays to arrays. A hidden band is shown as hidden, never by another one.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

import numpy as np
from matplotlib import colormaps
from matplotlib.colors import to_rgb

from bandmask import bands
from bandmask.plots import HIDDEN_COLOUR as HIDDEN_COLOUR
from bandmask.plots import composite as composite
from bandmask.plots import composite_bands as composite_bands
from bandmask.plots import stretch_limits as stretch_limits

INDEX_MAP, CHANGE_MAP, SIGNED_MAP = "BrBG", "cividis", "PuOr"  # told apart by the colour-blind too
FIGURE_3_1 = "thesis figure 3.1"
VIEWS: dict[str, tuple[str, ...]] = {  # what can be looked at, by mode
    "composite": (*bands.COMPOSITES, FIGURE_3_1),
    "band": bands.NAMES,
    "index": tuple(bands.INDICES),
}


def mode_of(view: str) -> str:
    """`composite`, `band` or `index`.

    Raises:
        ValueError: nothing of that name can be looked at; lists what can.
    """
    for mode, names in VIEWS.items():
        if view in names:
            return mode
    available = "; ".join(f"{mode}: {', '.join(names)}" for mode, names in VIEWS.items())
    raise ValueError(f"unknown view {view!r}; available: {available}")


def bands_of(view: str) -> tuple[str, ...]:
    """Bands that a view is made of; of a composite red, green and blue in this order."""
    mode = mode_of(view)
    if view == FIGURE_3_1:
        return tuple(name for composite_ in bands.FIGURE_3_1 for name in bands.COMPOSITES[composite_])
    return {"composite": bands.COMPOSITES, "index": bands.INDICES}.get(mode, {}).get(view, (view,))  # type: ignore[attr-defined]


def normalised_difference(image: np.ndarray, name: str) -> np.ndarray:
    """An index of `bands.INDICES`, (a − b) / (a + b), (H, W) in −1..1; 0 where both bands are."""
    first, second = image[bands.channel_indices(bands.INDICES[name])]
    total = first + second
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.clip(np.where(total == 0, 0, (first - second) / total), -1, 1)


def picture(
    image: np.ndarray, view: str, limits: tuple[np.ndarray, np.ndarray], hidden: Mapping[str, np.ndarray]
) -> np.ndarray:
    """What a view looks like, (H, W, 3) uint8; Figure 3.1's three composites stand below each other, (3H, W, 3).

    A composite's hidden channel gives no light; a pixel with nothing left to show has the colour of what is hidden.

    Args:
        image: (13, H, W).
        view: one of `VIEWS`.
        limits: from `stretch_limits` of the complete image.
        hidden: band to pixels, (H, W) bool, of the bands that lost some.
    """
    mode = mode_of(view)
    if view == FIGURE_3_1:
        return np.concatenate([picture(image, name, limits, hidden) for name in bands.FIGURE_3_1])
    lost = [hidden.get(name) for name in bands_of(view)]
    if mode == "index":
        shown = coloured(normalised_difference(image, view), INDEX_MAP, -1, 1)
        gone = [layer for layer in lost if layer is not None]  # one band missing, and there is no index
        return _painted(shown, np.logical_or.reduce(gone)) if gone else shown
    channels = bands.channel_indices(bands_of(view))
    low, span = limits[0][channels], np.maximum(limits[1] - limits[0], 1e-9)[channels]
    shown = np.empty((*image.shape[1:], len(channels)), np.uint8)
    for place, (channel, layer) in enumerate(zip(channels, lost, strict=True)):
        light = np.clip((image[channel] - low[place]) * (255 / span[place]), 0, 255)
        shown[..., place] = np.where(np.isfinite(light) if layer is None else ~layer, light, 0)
    shown = shown if len(channels) == 3 else np.repeat(shown, 3, axis=2)
    nothing_left = [layer for layer in lost if layer is not None]
    if len(nothing_left) < len(channels):
        return shown
    return _painted(shown, np.logical_and.reduce(nothing_left))


def change(
    complete: np.ndarray, incomplete: np.ndarray, view: str, limits: tuple[np.ndarray, np.ndarray]
) -> tuple[np.ndarray, float]:
    """Incomplete minus complete in what a view shows, and the value at the end of its colour scale.

    The incomplete image holds the mask value in its hidden pixels, because that is what an encoder gets.

    Returns:
        (H, W): of a band in reflectance and of an index in its unit, both signed; of a composite the mean change of
        its three stretched channels, from 0. Of Figure 3.1 (3H, W).
    """
    mode = mode_of(view)
    if view == FIGURE_3_1:
        parts = [change(complete, incomplete, name, limits)[0] for name in bands.FIGURE_3_1]
        return np.concatenate(parts), 1.0
    if mode == "index":
        return normalised_difference(incomplete, view) - normalised_difference(complete, view), 1.0
    channels = bands.channel_indices(bands_of(view))
    span = np.maximum(limits[1] - limits[0], 1e-9)[channels]
    if mode == "band":
        return incomplete[channels[0]] - complete[channels[0]], float(span[0])
    total = np.zeros(complete.shape[1:], np.float32)
    for channel, low, width in zip(channels, limits[0][channels], span, strict=True):
        before, after = (np.clip((image[channel] - low) / width, 0, 1) for image in (complete, incomplete))
        total += np.abs(after - before)
    return total / 3, 1.0


def coloured(values: np.ndarray, name: str, low: float, high: float) -> np.ndarray:
    """Values in the colours of a matplotlib map, (H, W) to (H, W, 3) uint8; what is not finite is hidden."""
    with np.errstate(invalid="ignore"):
        steps = np.clip((values - low) * (255.999 / (high - low)), 0, 255)
    finite = np.isfinite(steps)
    if finite.all():
        return _table(name)[steps.astype(np.uint8)]
    return _painted(_table(name)[np.where(finite, steps, 0).astype(np.uint8)], ~finite)


def _painted(shown: np.ndarray, where: np.ndarray) -> np.ndarray:
    """With the colour of what is hidden there."""
    return np.where(where[..., None], np.array(_rgb8(HIDDEN_COLOUR), np.uint8), shown)


@lru_cache
def _table(name: str) -> np.ndarray:
    return (colormaps[name](np.arange(256))[:, :3] * 255).round().astype(np.uint8)


def _rgb8(colour: str) -> tuple[int, ...]:
    return tuple(round(255 * part) for part in to_rgb(colour))
