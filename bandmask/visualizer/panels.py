"""The figure of the band-mask visualizer: a pure function from a state and an image.

Complete, incomplete and their difference stand side by side; below them the spectrum of one pixel and the histograms of
all bands. Nothing here knows of widgets; places on the figure can be turned into pixels.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from PIL import Image

from bandmask import bands
from bandmask.visualizer import pictures
from bandmask.visualizer.bandview import Masked, State, describe, lost_channels, mask_image
from bandmask.visualizer.charts import THEMES, Box, Theme, draw_histograms, draw_spectrum

DPI = 100
WIDTH, SIDE = 11.0, 3.3  # inches: of the figure, and of the square that a picture fits into
_HEAD, _BAR, _CHART, _FOOT, _LEFT, _GAP = 0.85, 0.55, 2.6, 0.5, 0.35, 0.2
_TALLEST = 2.0  # pictures higher than wide may take this many squares


class Layout(NamedTuple):
    """Where things stand."""

    height: float  # of the figure, in inches
    panels: tuple[Box, ...]  # complete, incomplete, difference
    spectrum: Box
    histograms: Box


def layout_of(state: State, size: tuple[int, int]) -> Layout:
    """The layout for images of this height and width; a picture's pixels are squares."""
    rows, columns = size[0] * _copies(state), size[1]
    box = SIDE * float(np.clip(rows / columns, 0.2, _TALLEST))
    scale = min(SIDE / columns, box / rows)
    wide, high = scale * columns, scale * rows
    total = _HEAD + box + _BAR + _CHART + _FOOT
    pitch = (WIDTH - 2 * _LEFT + _GAP) / 3
    lefts = [_LEFT + pitch * place + (pitch - _GAP - wide) / 2 for place in range(3)]
    panels = tuple(Box(left, total - _HEAD - high, wide, high) for left in lefts)
    chart = _CHART - 0.35
    return Layout(total, panels, Box(_LEFT + 0.35, _FOOT, 5.5, chart), Box(7.1, _FOOT, WIDTH - 7.1 - 0.75, chart))


def render(
    state: State,
    image: np.ndarray,
    band_means: np.ndarray,
    *,
    limits: tuple[np.ndarray, np.ndarray] | None = None,
) -> Figure:
    """Complete and incomplete image under one stretch, their difference, a spectrum and histograms.

    Args:
        state: what is hidden and how it is shown.
        image: complete, in reflectance, (13, H, W) in SatCLIP order; NaN where nothing was seen.
        band_means: mean reflectance per band of the training split, (13,), for mask values that are means.
        limits: from `pictures.stretch_limits` of the image at the state's percentiles, if they are known already.
    """
    limits = limits or pictures.stretch_limits(image, *state.stretch)
    return draw(state, mask_image(state, image, band_means), limits)


def draw(state: State, masked: Masked, limits: tuple[np.ndarray, np.ndarray]) -> Figure:
    """`render` of an image that is masked already.

    All of it is drawn on one pair of axes in inches, because matplotlib takes longer to make the ticks of five than to
    draw everything else.
    """
    layout = layout_of(state, (masked.complete.shape[1], masked.complete.shape[2]))
    theme = THEMES[state.theme]
    figure = Figure((WIDTH, layout.height), dpi=DPI, facecolor=theme.background)
    canvas = figure.add_axes((0, 0, 1, 1))
    canvas.set_axis_off()
    canvas.set_autoscale_on(False)
    canvas.set(xlim=(0, WIDTH), ylim=(0, layout.height))
    canvas.text(_LEFT, layout.height - 0.14, describe(state, masked), color=theme.text, va="top", size=11)
    _draw_pictures(canvas, state, masked, limits, layout, theme)
    draw_spectrum(canvas, layout.spectrum, masked, _pixel(state, masked), theme)
    draw_histograms(canvas, layout.histograms, masked, theme)
    return figure


def pixel_at(state: State, size: tuple[int, int], x: float, y: float) -> tuple[int, int] | None:
    """Row and column of the image under a place on the figure, or None beside the pictures.

    Args:
        state: of the figure.
        size: height and width of the image.
        x: from the left edge, 0 to 1.
        y: from the upper edge, 0 to 1.
    """
    height, width = size
    layout = layout_of(state, size)
    for panel in layout.panels:
        column = (x * WIDTH - panel.left) / panel.width * width
        row = (panel.bottom + panel.height - (1 - y) * layout.height) / panel.height * height * _copies(state)
        if 0 <= column < width and 0 <= row < height * _copies(state):
            return int(row) % height, int(column)
    return None


def _copies(state: State) -> int:
    """How often the image is shown in a panel."""
    return len(bands.FIGURE_3_1) if state.view == pictures.FIGURE_3_1 else 1


def _draw_pictures(canvas: Axes, state: State, masked: Masked, limits: Any, layout: Layout, theme: Theme) -> None:
    view, mode = state.view, pictures.mode_of(state.view)
    difference, end = pictures.change(masked.complete, masked.incomplete, view, limits)
    map_, low = (pictures.CHANGE_MAP, 0.0) if mode == "composite" else (pictures.SIGNED_MAP, -end)
    made_of = " ".join(dict.fromkeys(pictures.bands_of(view)))
    panels = (
        ("complete", f"{view} · {made_of}", pictures.picture(masked.complete, view, limits, masked.missing)),
        (
            "incomplete",
            lost_channels(view, masked.hidden),
            pictures.picture(masked.incomplete, view, limits, masked.hidden),
        ),
        ("difference", _UNITS[mode], pictures.coloured(difference, map_, low, end)),
    )
    for box, (name, note, picture) in zip(layout.panels, panels, strict=True):
        _draw_image(canvas, box, _fitted(picture, round(box.width * DPI)), name)
        _mark(canvas, box, state, masked)
        weight = "bold" if note.startswith("hidden:") else "normal"
        canvas.text(box.left, box.y(1) + 0.24, name, color=theme.text, size=10, weight="bold")
        canvas.text(box.left, box.y(1) + 0.07, note, color=theme.text, size=8.5, weight=weight)
    if mode != "composite":
        channel = bands.NAMES.index(view) if mode == "band" else None
        ends = (-1.0, 1.0) if channel is None else (limits[0][channel], limits[1][channel])
        _draw_scale(canvas, layout.panels[0], "gray" if mode == "band" else pictures.INDEX_MAP, ends, theme)
    _draw_scale(canvas, layout.panels[2], map_, (low, end), theme)


_UNITS = {
    "composite": "mean change of the three channels, stretched",
    "band": "reflectance, incomplete − complete",
    "index": "index, incomplete − complete",
}


def _draw_image(canvas: Axes, box: Box, picture: np.ndarray, name: str) -> None:
    image = AxesImage(canvas, interpolation="nearest", extent=(box.left, box.x(1), box.bottom, box.y(1)))
    image.set_data(picture)
    image.set_gid(name)
    canvas.add_image(image)


def _mark(canvas: Axes, box: Box, state: State, masked: Masked) -> None:
    """A ring around the pixel whose spectrum is drawn."""
    height, width = masked.complete.shape[1:]
    row, column = _pixel(state, masked)
    copies = _copies(state)
    y = [box.y(1 - (row + 0.5 + copy * height) / (height * copies)) for copy in range(copies)]
    x = [box.x((column + 0.5) / width)] * copies
    for colour, wide in (("black", 2.6), ("white", 1.2)):
        canvas.plot(x, y, "o", markersize=9, fillstyle="none", color=colour, markeredgewidth=wide)


def _draw_scale(canvas: Axes, panel: Box, name: str, ends: tuple[float, float], theme: Theme) -> None:
    """The colours of a picture with the values at their ends, below it."""
    box = Box(panel.left, panel.bottom - 0.14, panel.width, 0.08)
    _draw_image(canvas, box, pictures.coloured(np.linspace(0, 1, 256)[None], name, 0, 1), "scale")
    for at, value, side in ((0, ends[0], "left"), (1, ends[1], "right")):
        canvas.text(box.x(at), box.bottom - 0.04, f"{value:.2g}", ha=side, va="top", size=8, color=theme.text)


def _pixel(state: State, masked: Masked) -> tuple[int, int]:
    """The state's pixel, within the image."""
    height, width = masked.complete.shape[1:]
    row, column = state.pixel or (height // 2, width // 2)
    return min(max(row, 0), height - 1), min(max(column, 0), width - 1)


def _fitted(picture: np.ndarray, width: int) -> np.ndarray:
    """A picture larger than its place, averaged down to it: every n-th pixel would lie about scattered masks."""
    if picture.shape[1] <= width:
        return picture
    height = max(round(picture.shape[0] * width / picture.shape[1]), 1)
    return np.asarray(Image.fromarray(picture).resize((width, height), Image.Resampling.BOX))
