"""The field's panel row: original, masked, reconstructed, and what the reconstruction gets wrong.

A pure function from arrays to a figure. One stretch holds for a whole row, so that a colour that looks alike is alike.
Source: the panel row of He et al. 2022 (masked autoencoders, figure 2), with the signed difference added.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from bandmask import bands
from bandmask.visualizer.pictures import (
    FIGURE_3_1,
    SIGNED_MAP,
    bands_of,
    mode_of,
    normalised_difference,
    picture,
    stretch_limits,
)

DEFAULT_VIEWS = ("true colour", "colour infrared")
SMALLEST_SCALE = 1e-4  # of a difference: one DN
_INCHES = 1.75  # side of a panel


def plot_reconstruction(
    complete: np.ndarray,
    hidden: np.ndarray,
    reconstructions: Mapping[str, np.ndarray],
    views: Sequence[str] = DEFAULT_VIEWS,
    *,
    limits: tuple[np.ndarray, np.ndarray] | None = None,
    title: str = "",
) -> Figure:
    """A row a view: original, masked, then each reconstruction and its signed difference from the original.

    A hidden channel of a composite gives no light, a pixel of which nothing is left has the colour of what is hidden.
    Differences are in reflectance; of a composite the mean over its bands that lost pixels, of an index its own unit.
    All differences of a row share one scale, which ends at the 99th percentile of hidden pixels.

    Args:
        complete: reflectance, (13, H, W).
        hidden: (13, H, W) bool, True = hidden.
        reconstructions: by name, (13, H, W) in reflectance each.
        views: composites, bands and indices, as in `pictures.VIEWS`.
        limits: from `stretch_limits`; of `complete` by default.
        title: over the figure.

    Raises:
        ValueError: no view or reconstruction, an unknown view, or arrays of other shapes.
    """
    _check(complete, hidden, reconstructions, views)
    limits = limits or stretch_limits(complete)
    columns = 2 + 2 * len(reconstructions)
    figure = Figure(figsize=(_INCHES * columns + 1.1, (_INCHES + 0.32) * len(views) + 0.3), layout="constrained")
    if title:
        figure.suptitle(title, fontsize=10)
    grid = figure.subplots(len(views), columns, squeeze=False)
    lost = {name: hidden[channel] for channel, name in enumerate(bands.NAMES) if hidden[channel].any()}
    for axes, view in zip(grid, views, strict=True):
        _show(axes[0], picture(complete, view, limits, {}), "original")
        _show(axes[1], picture(np.where(hidden, 0, complete), view, limits, lost), "masked")
        axes[0].set_ylabel(_label(view), fontsize=8)
        wrong = {name: difference(complete, found, hidden, view) for name, found in reconstructions.items()}
        where = hidden[bands.channel_indices(bands_of(view))].any(0)
        seen = np.abs(np.stack(list(wrong.values()))[:, where])
        scale = max(float(np.percentile(seen, 99)) if seen.size else 0.0, SMALLEST_SCALE)
        for place, (name, found) in enumerate(reconstructions.items()):
            shown, off = axes[2 + 2 * place : 4 + 2 * place]
            _show(shown, picture(found, view, limits, {}), name)
            rms = np.sqrt(np.mean(wrong[name][where] ** 2)) if where.any() else 0.0
            colours = _show(
                off, wrong[name], f"minus original, RMS {rms:.4f}", cmap=SIGNED_MAP, vmin=-scale, vmax=scale
            )
        bar = figure.colorbar(colours, ax=axes, shrink=0.85, pad=0.01, extend="both")
        bar.set_label(view if mode_of(view) == "index" else "reflectance", fontsize=7)
        bar.ax.tick_params(labelsize=7)
    return figure


def difference(complete: np.ndarray, reconstruction: np.ndarray, hidden: np.ndarray, view: str) -> np.ndarray:
    """Reconstruction minus original in what a view shows, (H, W): signed; 0 where nothing was hidden.

    Of a band in reflectance, of a composite the mean over those of its bands that are hidden at that pixel, of an index
    in its unit.
    """
    channels = bands.channel_indices(bands_of(view))
    where = hidden[channels]
    if mode_of(view) == "index":
        apart = normalised_difference(reconstruction, view) - normalised_difference(complete, view)
        return np.where(where.any(0), apart, 0)
    wrong = np.where(where, reconstruction[channels] - complete[channels], 0)
    return wrong.sum(0) / np.maximum(where.sum(0), 1)


def _check(
    complete: np.ndarray, hidden: np.ndarray, reconstructions: Mapping[str, np.ndarray], views: Sequence[str]
) -> None:
    if not views or not reconstructions:
        raise ValueError("give at least one view and one reconstruction: there is nothing to plot")
    if complete.ndim != 3 or len(complete) != len(bands.NAMES):
        raise ValueError(f"an image is (13, H, W), got {complete.shape}")
    for name, array in {"hidden": hidden, **reconstructions}.items():
        if array.shape != complete.shape:
            raise ValueError(f"{name} has shape {array.shape}, the complete image {complete.shape}; they must be equal")
    if hidden.dtype != bool:
        raise ValueError(f"hidden is boolean, True = hidden; got {hidden.dtype}")
    for view in views:
        if mode_of(view) and view == FIGURE_3_1:
            raise ValueError(f"{FIGURE_3_1!r} is three composites; name them as views: {', '.join(bands.FIGURE_3_1)}")


def _label(view: str) -> str:
    """A view, and the bands that it is made of."""
    return bands.BY_NAME[view].label if view in bands.BY_NAME else f"{view}\n{' '.join(bands_of(view))}"


def _show(axes: Any, image: np.ndarray, title: str, **options: Any) -> Any:
    axes.set_title(title, fontsize=8)
    axes.set_xticks([])
    axes.set_yticks([])
    return axes.imshow(image, interpolation="nearest", **options)
