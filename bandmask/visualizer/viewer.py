"""Pictures of complete and incomplete images: pure functions from arrays to figures, and the band-mask visualizer."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from bandmask import bands
from bandmask.plots import CLASS_COLOURS as CLASS_COLOURS
from bandmask.plots import HIDDEN_COLOUR, composite, composite_bands, no_ticks, stretch_limits
from bandmask.plots import UNLABELLED_COLOUR as UNLABELLED_COLOUR
from bandmask.plots import class_colours as class_colours
from bandmask.plots import plot_differences as plot_differences
from bandmask.plots import plot_gallery as plot_gallery
from bandmask.plots import plot_segmentation as plot_segmentation
from bandmask.plots import plot_spectra as plot_spectra
from bandmask.visualizer.bandview import State as State
from bandmask.visualizer.panels import render as render
from bandmask.visualizer.widget import BandMaskViewer as BandMaskViewer


def plot_all_bands(complete: np.ndarray, hidden: np.ndarray, hidden_bands: Sequence[str], title: str = "") -> Figure:
    """All 13 bands, complete above incomplete, hidden pixels in one colour (as the thesis' Figures B.7 to B.11).

    Args:
        complete: (13, H, W).
        hidden: (k, H, W) bool, True = hidden, in the order of `hidden_bands`.
        hidden_bands: ESA names.
        title: of the figure.
    """
    limits = stretch_limits(complete)
    where = dict(zip(map(bands.parse_band, hidden_bands), hidden, strict=True))
    grey = plt.get_cmap("gray").with_extremes(bad=HIDDEN_COLOUR)
    figure, axes = plt.subplots(2, len(bands.NAMES), figsize=(16, 3.1), layout="constrained")
    for channel, name in enumerate(bands.NAMES):
        view = {"cmap": grey, "vmin": limits[0][channel], "vmax": limits[1][channel], "interpolation": "nearest"}
        incomplete = np.ma.masked_array(complete[channel], where.get(name, np.zeros_like(hidden[:1].any(0))))
        axes[0, channel].imshow(complete[channel], **view)
        axes[1, channel].imshow(incomplete, **view)
        weight = "bold" if name in where else "normal"
        axes[0, channel].set_title(f"{name}\n{bands.BY_NAME[name].wavelength_nm} nm", fontsize=8, fontweight=weight)
    for row, label in zip(axes, ("complete", "incomplete"), strict=True):
        row[0].set_ylabel(label)
    no_ticks(axes)
    figure.suptitle(title)
    return figure


def plot_composites(
    complete: np.ndarray,
    incomplete: np.ndarray,
    hidden_bands: Sequence[str] = (),
    names: Sequence[str] = ("true colour", "swir", "agriculture"),
    title: str = "",
) -> Figure:
    """Composites of an image, complete above incomplete under one stretch; a channel that lost pixels is named."""
    limits = stretch_limits(complete)
    hidden_bands = bands.parse_bands(hidden_bands)
    figure, axes = plt.subplots(2, len(names), figsize=(3 * len(names), 6.4), layout="constrained", squeeze=False)
    for column, name in enumerate(names):
        chosen = composite_bands(name)
        axes[0, column].imshow(composite(complete, name, limits), interpolation="nearest")
        axes[1, column].imshow(composite(incomplete, name, limits), interpolation="nearest")
        lost = [
            f"{c} ({colour})" for c, colour in zip(chosen, ("red", "green", "blue"), strict=True) if c in hidden_bands
        ]
        axes[0, column].set_title(f"{name}\n{' '.join(chosen)}", fontsize=9)
        axes[1, column].set_title("hidden: " + ", ".join(lost) if lost else "nothing hidden", fontsize=9)
    for row, label in zip(axes, ("complete", "incomplete"), strict=True):
        row[0].set_ylabel(label)
    no_ticks(axes)
    figure.suptitle(title)
    return figure
