"""Pictures of complete and incomplete images: pure functions from arrays to figures, and the band-mask visualizer."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap, to_hex
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from bandmask import bands
from bandmask.stats import PROTOCOLS
from bandmask.visualizer.bandview import State as State
from bandmask.visualizer.panels import render as render
from bandmask.visualizer.pictures import HIDDEN_COLOUR, composite, composite_bands, stretch_limits
from bandmask.visualizer.widget import BandMaskViewer as BandMaskViewer

UNLABELLED_COLOUR = "#ffffff"

# IGBP classes as MODIS maps show them (MCD12Q1 user guide), the sample's in like colours; others get matplotlib's.
CLASS_COLOURS = {
    "Forest": "#009900",
    "Shrubland": "#c6b044",
    "Savanna": "#fbff13",
    "Grassland": "#b6ff05",
    "Wetlands": "#27ff87",
    "Croplands": "#c24f44",
    "Urban/Built-up": "#a5a5a5",
    "Snow/Ice": "#69fff8",
    "Barren": "#f9ffa4",
    "Water": "#1c0dff",
    "water": "#1c0dff",
    "tidal marsh": "#27a387",
    "forest": "#009900",
    "green crops": "#b6ff05",
    "bare or sparse": "#e2c87a",
    "built-up": "#8c4a8c",
}


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
    _no_ticks(axes.ravel())
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
    _no_ticks(axes.ravel())
    figure.suptitle(title)
    return figure


def plot_gallery(images: Sequence[np.ndarray], titles: Sequence[str], columns: int = 5) -> Figure:
    """True-colour thumbnails, each under its own stretch."""
    rows = -(-len(images) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(2.3 * columns, 2.55 * rows), layout="constrained", squeeze=False
    )
    for axis, image, title in zip(axes.ravel(), images, titles, strict=False):
        axis.imshow(composite(image, "true colour"), interpolation="nearest")
        axis.set_title(title, fontsize=9)
    for axis in axes.ravel()[len(images) :]:
        axis.set_visible(False)
    _no_ticks(axes.ravel())
    return figure


def plot_spectra(means: np.ndarray, names: Sequence[str], axes: Axes) -> None:
    """Mean reflectance per band in order of wavelength, a line a class: `means` is (classes, 13).

    Bands stand at even distances: B08 and B8A are 23 nm apart, B11 and B12 580 nm.
    """
    places = range(len(bands.NAMES))
    for spectrum, name, colour in zip(means, names, itertools.cycle(plt.get_cmap("tab10").colors), strict=False):  # type: ignore[attr-defined]
        axes.plot(places, spectrum, marker="o", markersize=3, label=name, color=colour)
    axes.set_xticks(places, [f"{band.name}\n{band.wavelength_nm}" for band in bands.BANDS], fontsize=8)
    axes.set_xlabel("band, wavelength in nm (not to scale)")
    axes.set_ylabel("mean reflectance")
    axes.legend(frameon=False, fontsize=8)


def class_colours(names: Sequence[str]) -> list[str]:
    """A colour a class, as hex: the usual one of a land-cover map where there is one."""
    others = itertools.cycle(to_hex(colour) for colour in plt.get_cmap("tab20").colors)  # type: ignore[attr-defined]
    return [CLASS_COLOURS.get(name) or next(others) for name in names]


def plot_segmentation(
    pictures: Mapping[str, Sequence[np.ndarray]], maps: Mapping[str, Sequence[np.ndarray]], names: Sequence[str]
) -> Figure:
    """Images and class maps side by side, a row an image (as the thesis' Figures B.3 to B.6).

    Args:
        pictures: title to composites, each (H, W, 3).
        maps: title to class maps, each (H, W); what is no class is drawn white.
        names: of the classes.
    """
    rows, columns = len(next(iter(maps.values()))), len(pictures) + len(maps)
    figure, axes = plt.subplots(
        rows, columns, figsize=(2.2 * columns, 2.3 * rows + 0.6), layout="constrained", squeeze=False
    )
    colours = ListedColormap(class_colours(names)).with_extremes(over=UNLABELLED_COLOUR)
    for column, (title, shown) in enumerate([*pictures.items(), *maps.items()]):
        axes[0, column].set_title(title, fontsize=9)
        for axis, image in zip(axes[:, column], shown, strict=True):
            if column < len(pictures):
                axis.imshow(image, interpolation="nearest")
            else:
                axis.imshow(image, cmap=colours, vmin=-0.5, vmax=len(names) - 0.5, interpolation="nearest")
    present = sorted({int(c) for shown in maps.values() for m in shown for c in np.unique(m) if c < len(names)})
    patches = [Patch(facecolor=class_colours(names)[c], edgecolor="grey", label=names[c]) for c in present]
    figure.legend(
        handles=patches, loc="outside lower center", ncols=min(len(patches), columns + 1), frameon=False, fontsize=8
    )
    _no_ticks(axes.ravel())
    return figure


def plot_differences(differences: pd.DataFrame, axes: Axes, *, xlabel: str) -> None:
    """Differences with their intervals, in points, a bar a row.

    Args:
        differences: of `comparison.paired_difference`, with a column `comparison` for their names.
        axes: to draw on.
        xlabel: what differs.
    """
    for place, row in enumerate(differences.to_dict("records")):
        ends = [100 * row["low"], 100 * row["high"]]
        axes.plot(ends, [place, place], color="#4477aa", linewidth=3, solid_capstyle="butt")
        axes.plot(100 * row["difference"], place, "o", color="k", markersize=5)
    names = differences["protocol"].replace(PROTOCOLS) + ": " + differences["comparison"]
    axes.set_yticks(range(len(differences)), names.to_list())
    axes.axvline(0, color="grey", linewidth=0.8)
    axes.invert_yaxis()
    axes.set_xlabel(xlabel)


def _no_ticks(axes: np.ndarray) -> None:
    for axis in axes:
        axis.set_xticks([])
        axis.set_yticks([])
