"""Figures that several notebooks share: composites, class maps and spectra, learning curves, differences."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap, to_hex
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from bandmask import bands, stats
from bandmask.results import mask_order

HIDDEN_COLOUR = "#d95f8e"  # in no grey scale, told apart by the colour-blind
UNLABELLED_COLOUR = "#ffffff"
METHOD_COLOURS = {"pre-trained": "#999999", "ridge": "#ccbb44", "fine-tuned": "#4477aa"}

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


def class_colours(names: Sequence[str]) -> list[str]:
    """A colour a class, as hex: the usual one of a land-cover map where there is one."""
    others = itertools.cycle(to_hex(colour) for colour in plt.get_cmap("tab20").colors)  # type: ignore[attr-defined]
    return [CLASS_COLOURS.get(name) or next(others) for name in names]


def stretch_limits(image: np.ndarray, low: float = 2, high: float = 98) -> tuple[np.ndarray, np.ndarray]:
    """Percentiles per band of a complete image (13, H, W), each (13,); the incomplete one is shown under the same.

    Pixels that are not finite don't count; a band without any other has limits 0 and 1.
    """
    if np.isfinite(image.sum(dtype=np.float64)):
        return np.percentile(image, low, axis=(1, 2)), np.percentile(image, high, axis=(1, 2))
    seen = [band[np.isfinite(band)] for band in image]
    pairs = [np.percentile(values, (low, high)) if values.size else np.array([0.0, 1.0]) for values in seen]
    return np.array(pairs).T[0], np.array(pairs).T[1]


def composite(
    image: np.ndarray, names: str | Sequence[str], limits: tuple[np.ndarray, np.ndarray] | None = None
) -> np.ndarray:
    """Three bands as red, green and blue, (H, W, 3) in 0..1.

    Args:
        image: (13, H, W), any unit.
        names: a key of `bands.COMPOSITES`, or three bands.
        limits: from `stretch_limits` of the complete image; default: of `image`.

    Raises:
        ValueError: unknown composite; lists what exists.
    """
    channels = bands.channel_indices(composite_bands(names))
    low, high = limits or stretch_limits(image)
    span = np.maximum(high - low, 1e-9)[channels]
    scaled = (image[channels] - low[channels][:, None, None]) / span[:, None, None]
    return np.clip(scaled.transpose(1, 2, 0), 0, 1)


def composite_bands(names: str | Sequence[str]) -> tuple[str, ...]:
    """The three bands of a composite, red first."""
    if isinstance(names, str):
        if names not in bands.COMPOSITES:
            raise ValueError(f"unknown composite {names!r}; available: {', '.join(bands.COMPOSITES)}")
        return bands.COMPOSITES[names]
    if len(names) != 3:
        raise ValueError(f"a composite needs three bands, got {list(names)}")
    return tuple(bands.parse_band(name) for name in names)


def plot_gallery(images: Sequence[np.ndarray], titles: Sequence[str], columns: int = 5) -> Figure:
    """True-colour thumbnails, each under its own stretch."""
    rows = -(-len(images) // columns)
    size = 2.3 * columns, 2.55 * rows
    figure, axes = plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
    for axis, image, title in zip(axes.ravel(), images, titles, strict=False):
        axis.imshow(composite(image, "true colour"), interpolation="nearest")
        axis.set_title(title, fontsize=9)
    for axis in axes.ravel()[len(images) :]:
        axis.set_visible(False)
    no_ticks(axes)
    return figure


def plot_spectra(means: np.ndarray, names: Sequence[str], axes: Axes) -> None:
    """Mean reflectance per band in order of wavelength, a line a class in its colour: `means` is (classes, 13).

    Bands stand at even distances: B08 and B8A are 23 nm apart, B11 and B12 580 nm.
    """
    places = range(len(bands.NAMES))
    for spectrum, name, colour, marker in zip(
        means, names, class_colours(names), itertools.cycle("osD^vPX"), strict=False
    ):
        edge: dict[str, Any] = {"markeredgecolor": "k", "markeredgewidth": 0.5}  # pale colours are seen by it
        axes.plot(places, spectrum, marker=marker, markersize=5, label=name, color=colour, **edge)
    axes.set_xticks(places, [f"{band.name}\n{band.wavelength_nm}" for band in bands.BANDS], fontsize=8)
    axes.set_xlabel("band, wavelength in nm (not to scale)")
    axes.set_ylabel("mean reflectance")
    axes.legend(frameon=False, fontsize=8)


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
    size = 2.2 * columns, 2.3 * rows + 0.6
    figure, axes = plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
    colours = ListedColormap(class_colours(names)).with_extremes(over=UNLABELLED_COLOUR)
    for column, (title, shown) in enumerate([*pictures.items(), *maps.items()]):
        axes[0, column].set_title(title, fontsize=9)
        as_map: dict[str, Any] = (
            {} if column < len(pictures) else {"cmap": colours, "vmin": -0.5, "vmax": len(names) - 0.5}
        )
        for axis, image in zip(axes[:, column], shown, strict=True):
            axis.imshow(image, interpolation="nearest", **as_map)
    present = sorted({int(c) for shown in maps.values() for m in shown for c in np.unique(m) if c < len(names)})
    patches = [Patch(facecolor=class_colours(names)[c], edgecolor="grey", label=names[c]) for c in present]
    across = min(len(patches), columns + 1)
    figure.legend(handles=patches, loc="outside lower center", ncols=across, frameon=False, fontsize=8)
    no_ticks(axes)
    return figure


def plot_differences(differences: pd.DataFrame, axes: Axes, *, xlabel: str) -> None:
    """Differences with their intervals, in points, a bar a row.

    Args:
        differences: of `stats.paired_difference`, with a column `comparison` for their names.
        axes: to draw on.
        xlabel: what differs.
    """
    for place, row in enumerate(differences.to_dict("records")):
        ends = [100 * row["low"], 100 * row["high"]]
        axes.plot(ends, [place, place], color="#4477aa", linewidth=3, solid_capstyle="butt")
        axes.plot(100 * row["difference"], place, "o", color="k", markersize=5)
    heads = differences["protocol"].map(stats.read_protocol).map(stats.PROTOCOLS)
    axes.set_yticks(range(len(differences)), (heads + ": " + differences["comparison"]).to_list())
    axes.axvline(0, color="grey", linewidth=0.8)
    axes.invert_yaxis()
    axes.set_xlabel(xlabel)


def plot_curves(table: pd.DataFrame, axes: Axes, *, by: str = "mask", ylabel: str = "", scale: float = 1.0) -> None:
    """Mean over runs against epoch, a line a group, shaded by one standard deviation (Figures 4.1 to 4.4).

    Without rows the axes say so: a half-finished grid gives half a figure.
    """
    if table.empty:
        axes.text(0.5, 0.5, "not there yet:\n`make run` makes it", ha="center", transform=axes.transAxes)
        return
    order = mask_order(table[by]) if by == "mask" else list(dict.fromkeys(table[by]))
    for name in order:
        group = table[table[by] == name].groupby("epoch")["value"]
        mean, spread = group.mean() * scale, group.std(ddof=1).fillna(0) * scale
        epochs = mean.index.to_numpy(float)
        (line,) = axes.plot(
            epochs, mean.to_numpy(float), label=str(name), color=METHOD_COLOURS.get(str(name)), marker="o", markersize=3
        )
        low, high = (mean - spread).to_numpy(float), (mean + spread).to_numpy(float)
        axes.fill_between(epochs, low, high, color=line.get_color(), alpha=0.2, linewidth=0)
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylabel(ylabel)
    axes.legend(title=by, frameon=False)


def plot_matrix(values: np.ndarray, axes: Axes, *, title: str, label: str, reach: float, cmap: str = "RdBu") -> None:
    """A figure of each pair of bands, (13, 13): its lower triangle in colours that end at ±`reach`, and in digits."""
    shown = np.where(np.tri(len(values), dtype=bool), values, np.nan)
    picture = axes.imshow(shown, cmap=cmap, vmin=-reach, vmax=reach)
    for row, column in zip(*np.nonzero(np.isfinite(shown)), strict=True):
        value = shown[row, column]
        digits = f"{value:+.0f}" if abs(value) >= 10 or reach > 20 else f"{value:+.1f}"
        text = digits.replace("-", "−") if float(digits) else "0"
        ink = "white" if abs(value) > 0.6 * reach else "#222222"
        axes.text(column, row, text, ha="center", va="center", fontsize=8, color=ink)
    axes.figure.colorbar(picture, ax=axes, shrink=0.75, pad=0.02).set_label(label)
    axes.set_xticks(range(len(values)), bands.NAMES, rotation=90)
    axes.set_yticks(range(len(values)), bands.NAMES)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_title(title)


def no_ticks(axes: np.ndarray) -> None:
    """Pictures have no axes to read."""
    for axis in axes.ravel():
        axis.set(xticks=[], yticks=[])
