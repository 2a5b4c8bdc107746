"""The visualizer's two charts, drawn on a canvas in inches: the spectrum of a pixel, and histograms of all bands."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection, PolyCollection
from matplotlib.ticker import MaxNLocator

from bandmask import bands
from bandmask.visualizer.bandview import Masked
from bandmask.visualizer.pictures import HIDDEN_COLOUR

BINS = 48


class Theme(NamedTuple):
    """Colours of a figure; `complete` and `incomplete` are Okabe and Ito's, told apart by the colour-blind."""

    background: str
    text: str
    faint: str
    complete: str
    incomplete: str


THEMES = {
    "light": Theme("#ffffff", "#1a1a1a", "#c9c9c9", "#8a8a8a", "#0072b2"),
    "dark": Theme("#212121", "#e8e8e8", "#4d4d4d", "#9a9a9a", "#56b4e9"),
}


class Box(NamedTuple):
    """A place on the figure, in inches from its lower left corner."""

    left: float
    bottom: float
    width: float
    height: float

    def x(self, parts: Any) -> Any:
        """From parts of the width, 0 to 1."""
        return self.left + self.width * parts

    def y(self, parts: Any) -> Any:
        """From parts of the height, 0 to 1."""
        return self.bottom + self.height * parts


def draw_spectrum(canvas: Axes, box: Box, masked: Masked, pixel: tuple[int, int], theme: Theme) -> None:
    """Reflectance against wavelength of one pixel; what is hidden there stands at the mask value, marked."""
    row, column = pixel
    nm = np.array([band.wavelength_nm for band in bands.BANDS])
    x = box.x((nm - 400) / 1850)
    complete, incomplete = masked.complete[:, row, column], masked.incomplete[:, row, column]
    lost = np.array([name in masked.hidden and bool(masked.hidden[name][row, column]) for name in bands.NAMES])
    finite = np.r_[complete[np.isfinite(complete)], incomplete, 0.0]
    ticks = MaxNLocator(4).tick_values(finite.min(), finite.max())

    def y(values: Any) -> Any:
        return box.y((values - ticks[0]) / (ticks[-1] - ticks[0]))

    series = [
        ("complete", "-o", theme.complete, 7, x, y(complete)),
        ("visible", "D", theme.incomplete, 4, x[~lost], y(incomplete[~lost])),
    ]
    if lost.any():
        series.append(("hidden: mask value", "X", HIDDEN_COLOUR, 8, x[lost], y(incomplete[lost])))
    for place, (name, style, colour, size, xs, ys) in enumerate(series):
        canvas.plot(xs, ys, style, color=colour, markersize=size, label=name)
        canvas.plot(box.x(0.4 + 0.17 * place), box.y(1) + 0.2, style[-1], color=colour, markersize=size)
        canvas.text(box.x(0.42 + 0.17 * place), box.y(1) + 0.2, name, va="center", size=8, color=theme.text)
    lines = [[(box.left, y(tick)), (box.x(1), y(tick))] for tick in ticks]
    canvas.add_collection(LineCollection(lines, colors=theme.faint, linewidths=0.6, zorder=0), autolim=False)
    for tick in ticks:
        canvas.text(box.left - 0.06, y(tick), f"{tick:.3g}", ha="right", va="center", size=8, color=theme.text)
    for tick in (443, 665, 865, 1375, 1610, 2190):
        canvas.text(
            box.x((tick - 400) / 1850), box.bottom - 0.06, str(tick), ha="center", va="top", size=8, color=theme.text
        )
    _name_chart(canvas, box, f"spectrum of pixel ({row}, {column})", "wavelength in nm; reflectance", theme)


def draw_histograms(canvas: Axes, box: Box, masked: Masked, theme: Theme) -> None:
    """A row a band: all pixels in grey, those still visible in front; at the right the share that is hidden."""
    height, width = masked.complete.shape[1:]
    seen = masked.complete[:, :: max(height // 64, 1), :: max(width // 64, 1)]
    seen = seen[np.isfinite(seen)]
    low, high = np.percentile(seen, (0.2, 99.8)) if seen.size else (0.0, 1.0)
    high = max(high, low + 1e-6)
    pitch = 1 / len(bands.NAMES)
    grey, bright, lines = [], [], []
    for place, name in enumerate(bands.NAMES):
        base = 1 - pitch * (place + 1)
        values, layer = masked.complete[place], masked.hidden.get(name)
        counts = bin_counts(values, low, high)
        peak = max(counts.max(), 1)
        grey.append(_outline(box, base, pitch, counts / peak))
        bright.append(
            grey[-1] if layer is None else _outline(box, base, pitch, bin_counts(values[~layer], low, high) / peak)
        )
        lines.append([(box.left, box.y(base)), (box.x(1), box.y(base))])
        canvas.text(box.left - 0.06, box.y(base), name, ha="right", size=8, color=theme.text)
        if layer is not None:
            canvas.text(box.x(1) + 0.05, box.y(base), f"−{layer.mean():.0%}", size=8, color=theme.text)
    for outlines, colour in ((grey, theme.complete), (bright, theme.incomplete)):
        canvas.add_collection(PolyCollection(outlines, facecolor=colour, edgecolor="none"), autolim=False)
    canvas.add_collection(LineCollection(lines, colors=theme.faint, linewidths=0.6, zorder=0), autolim=False)
    for tick in MaxNLocator(4).tick_values(low, high):
        if low <= tick <= high:
            x = box.x((tick - low) / (high - low))
            canvas.text(x, box.bottom - 0.06, f"{tick:.3g}", ha="center", va="top", size=8, color=theme.text)
    _name_chart(canvas, box, "histograms: visible pixels before all pixels (grey)", "reflectance", theme)


def bin_counts(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """Pixels in each bin, those beyond the ends left out; many times faster than `np.histogram`."""
    with np.errstate(invalid="ignore"):
        steps = np.clip((values.ravel() - low) * (BINS / (high - low)) + 1, 0, BINS + 1)  # the ends have bins too
    steps = np.where(np.isfinite(steps), steps, 0)
    return np.bincount(steps.astype(np.intp), minlength=BINS + 2)[1:-1]


def _outline(box: Box, base: float, pitch: float, heights: np.ndarray) -> np.ndarray:
    """A histogram that stands at `base` and ends below the next row."""
    middles = box.x((np.arange(BINS) + 0.5) / BINS)
    tops = box.y(base + 0.92 * pitch * heights)
    return np.column_stack([np.r_[middles[0], middles, middles[-1]], np.r_[box.y(base), tops, box.y(base)]])


def _name_chart(canvas: Axes, box: Box, title: str, below: str, theme: Theme) -> None:
    canvas.text(box.left - 0.3, box.y(1) + 0.2, title, va="center", size=9, color=theme.text, weight="bold")
    canvas.text(box.x(0.5), box.bottom - 0.28, below, ha="center", va="top", size=8, color=theme.text)
