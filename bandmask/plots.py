"""Bands as colours, and figures that several notebooks share: composites, class maps, spectra, curves, differences.

A hidden band is shown as hidden, never by another one; both images stand under the stretch of the complete one.
"""

import base64
import io
import itertools
from collections.abc import Callable, Container, Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap, hsv_to_rgb, to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from bandmask import bands, stats
from bandmask.packs import Pack
from bandmask.results import mask_order

Limits = tuple[np.ndarray, np.ndarray]  # of a stretch: what becomes black and white, a band each, (13,)
HIDDEN_COLOUR, HATCH_COLOUR = "#dd11ff", "#8800bb"  # far from every grey and index, for the colour-blind too
INDEX_MAP, CHANGE_MAP, SIGNED_MAP = "BrBG", "cividis", "PuOr"  # told apart by the colour-blind too
VIEWS: dict[str, tuple[str, ...]] = {  # what can be looked at, by mode
    "composite": tuple(bands.COMPOSITES),
    "band": bands.NAMES,
    "index": tuple(bands.INDICES),
}
UNLABELLED_COLOUR = "#ffffff"
METHOD_COLOURS = {"pre-trained": "#999999", "ridge": "#ccbb44", "ridge_local": "#ee6677", "fine-tuned": "#4477aa"}
METHOD_COLOURS |= {"any-band": "#aa3377"}
LINE_COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00")  # of other lines; Okabe and Ito

# One palette for all classes: of any two colours the least difference is 17 (CIE 1976), whatever cones an eye lacks.
_PALETTE = {
    "#24418f": ("Water", "water", "SeaLake"),
    "#7cc8ef": ("Snow/Ice", "River"),
    "#196127": ("Forest", "forest"),
    "#a0da5e": ("Grassland", "green crops", "Pasture"),
    "#2ca092": ("Wetlands", "tidal marsh", "HerbaceousVegetation"),
    "#8c8a2a": ("Shrubland", "PermanentCrop"),
    "#ea9821": ("Croplands", "AnnualCrop"),
    "#ead9a0": ("Barren", "bare or sparse"),
    "#cb595e": ("Savanna", "Residential"),
    "#832a5f": ("Urban/Built-up", "built-up", "Industrial"),
    "#3d372c": ("Highway",),
}
CLASS_COLOURS = {name: colour for colour, names in _PALETTE.items() for name in names}


def class_colours(names: Sequence[str]) -> list[str]:
    """A colour a class, as hex, the same in every figure; names that the palette lacks take what is left of it.

    Beyond it hues of a golden-angle walk: no two classes have one colour.
    """
    used = {CLASS_COLOURS.get(name) for name in names}
    more = (to_hex(tuple(hsv_to_rgb((n * 0.618 % 1, 0.5 + 0.1 * (n % 4), 0.9)))) for n in itertools.count())
    others = itertools.chain([colour for colour in _PALETTE if colour not in used], more)
    return [CLASS_COLOURS.get(name) or next(others) for name in names]


def stretch_limits(image: np.ndarray, low: float = 2, high: float = 98) -> Limits:
    """Percentiles per band of a complete image (13, H, W), or of all of (N, 13, H, W), each (13,).

    Pixels that are not finite don't count; a band without any other has limits 0 and 1.
    """
    values = np.moveaxis(image, -3, 0).reshape(len(bands.NAMES), -1)
    seen = [band[np.isfinite(band)] for band in values]
    ends = np.array([np.percentile(band, (low, high)) if band.size else (0.0, 1.0) for band in seen])
    return ends[:, 0], ends[:, 1]


def composite(image: np.ndarray, name: str, limits: Limits | None = None) -> np.ndarray:
    """Three bands of an image (13, H, W) as red, green and blue, (H, W, 3) in 0..1.

    All under one gain, that of the widest `stretch_limits` (of the complete image, or of a data set; default: of this
    one): a gain a band would make grey soil neon. Black is each band's own lower limit, because haze brightens blue
    most (dark-object subtraction, Chavez 1988).
    """
    channels = bands.channel_indices(bands.COMPOSITES[name])
    low, high = limits or stretch_limits(image)
    span = max(float((high - low)[channels].max()), 1e-9)
    return np.clip((image[channels].transpose(1, 2, 0) - low[channels]) / span, 0, 1)


def mode_of(view: str) -> str:
    """`composite`, `band` or `index`; a ValueError for a name of none, which lists all."""
    for mode, names in VIEWS.items():
        if view in names:
            return mode
    available = "; ".join(f"{mode}: {', '.join(names)}" for mode, names in VIEWS.items())
    raise ValueError(f"unknown view {view!r}; available: {available}")


def bands_of(view: str) -> tuple[str, ...]:
    """Bands that a view is made of; of a composite red, green and blue in this order."""
    mode_of(view)
    return {**bands.COMPOSITES, **bands.INDICES}.get(view, (view,))


def values_of(image: np.ndarray, view: str, limits: Limits) -> np.ndarray:
    """What a view shows of an image (13, H, W): a band or an index in its unit, (H, W), or stretched (H, W, 3).

    An index is (a − b) / (a + b) in −1..1; 0 where both bands are.
    """
    mode = mode_of(view)
    if mode != "index":
        return composite(image, view, limits) if mode == "composite" else image[bands.NAMES.index(view)]
    first, second = image[bands.channel_indices(bands.INDICES[view])]
    total = first + second
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.clip(np.where(total == 0, 0, (first - second) / total), -1, 1)


def picture(image: np.ndarray, view: str, limits: Limits, hidden: Mapping[str, np.ndarray]) -> np.ndarray:
    """What a view of an image (13, H, W) looks like, (H, W, 3) uint8; `hidden` is band to pixels, (H, W) bool.

    NaN is hidden too. A composite's hidden channel gives no light; a pixel with nothing left to show is hatched.
    """
    mode, values, channels = mode_of(view), values_of(image, view, limits), bands.channel_indices(bands_of(view))
    lost = ~np.isfinite(image[channels])
    for layer, name in zip(lost, bands_of(view), strict=True):
        layer |= hidden.get(name, False)
    if mode == "index":  # one band missing, and there is no index
        return hatched(coloured(values, INDEX_MAP, -1, 1), lost.any(0))
    if mode == "band":
        return hatched(coloured(values, "gray", *(float(end[channels[0]]) for end in limits)), lost[0])
    return hatched((255 * np.where(lost.transpose(1, 2, 0), 0, values)).astype(np.uint8), lost.all(0))


def change(complete: np.ndarray, incomplete: np.ndarray, view: str, limits: Limits) -> tuple[np.ndarray, float]:
    """Incomplete minus complete in what a view shows, (H, W), and the value at the end of its colour scale.

    Signed of a band and an index, in their unit; of a composite the mean change of its three stretched channels, from
    0. The incomplete image holds the mask value in its hidden pixels, because that is what an encoder gets.
    """
    difference = values_of(incomplete, view, limits) - values_of(complete, view, limits)
    if difference.ndim == 3:
        return np.abs(difference).mean(-1), 1.0
    spans = dict(zip(bands.NAMES, (limits[1] - limits[0]).tolist(), strict=True))
    return difference, max(spans.get(view, 1.0), 1e-9)


def coloured(values: np.ndarray, name: str, low: float, high: float) -> np.ndarray:
    """Values in the colours of a matplotlib map, (H, W) to (H, W, 3) uint8; what is not finite is hatched."""
    finite = np.isfinite(values)
    steps = np.clip((np.where(finite, values, low) - low) * (255.999 / max(high - low, 1e-9)), 0, 255)
    return hatched(colormaps[name](steps.astype(np.uint8), bytes=True)[..., :3], ~finite)


def hatched(shown: np.ndarray, where: np.ndarray) -> np.ndarray:
    """A picture (H, W, 3) uint8 with what is hidden, (H, W) bool, in one colour, under slanted lines of a second."""
    if not where.any():
        return shown
    period = max(6, max(where.shape) // 24)
    lines = np.add.outer(*map(np.arange, where.shape)) % period < period // 3
    colours = np.array([[round(255 * part) for part in to_rgb(c)] for c in (HIDDEN_COLOUR, HATCH_COLOUR)], np.uint8)
    return np.where(where[..., None], colours[lines.astype(int)], shown)


def lost_channels(view: str, hidden: Container[str]) -> str:
    """Which parts of a view lost pixels: `hidden: B04 (red), B03 (green)`."""
    used = dict.fromkeys(bands_of(view))
    roles = (" (red)", " (green)", " (blue)") if len(used) == 3 else ("",) * len(used)
    lost = [name + role for name, role in zip(used, roles, strict=True) if name in hidden]
    return "hidden: " + ", ".join(lost) if lost else "nothing hidden here"


def plot_images(
    rows: Mapping[Any, Sequence[np.ndarray]], titles: Sequence[str] = (), classes: Sequence[str] = ()
) -> Figure:
    """Pictures in rows, at the width of a page: (H, W, 3), or (H, W) of classes, white where there is none.

    A row's name that is no text is not shown. `titles` are of the columns, or of all pictures; those of `classes` that
    are in a map stand in a legend.
    """
    columns, lines = max(map(len, rows.values())), max((title.count("\n") + 1 for title in titles), default=0)
    titled = 0.2 * lines * (len(rows) if len(titles) > columns else 1)
    side = 8.6 / max(columns, 3)
    size = side * columns + 0.4, (side + 0.1) * len(rows) + titled + 0.5 * bool(classes)
    figure, axes = plt.subplots(len(rows), columns, figsize=size, layout="constrained", squeeze=False)
    colours, present = class_colours(classes), set()
    as_map: dict[str, Any] = {"vmin": -0.5, "vmax": len(classes) - 0.5}
    as_map["cmap"] = ListedColormap(colours or ["k"]).with_extremes(over=UNLABELLED_COLOUR)
    for line, (name, pictures) in zip(axes, rows.items(), strict=True):
        line[0].set_ylabel(name if isinstance(name, str) else "", fontsize=10)
        for axis, shown in zip(line, pictures, strict=False):
            axis.imshow(shown, interpolation="nearest", **(as_map if shown.ndim == 2 else {}))
            present |= set(np.unique(shown).tolist()) if shown.ndim == 2 else set()
        for axis in line[len(pictures) :]:
            axis.set_visible(False)
    for axis, title in zip(axes.ravel(), titles, strict=False):
        axis.set_title(title, fontsize=9)
    keys = [Patch(fc=colours[code], ec="grey", label=name) for code, name in enumerate(classes) if code in present]
    if keys:
        figure.legend(handles=keys, loc="outside lower center", ncols=min(len(keys), 6), frameon=False)
    plt.setp(axes, xticks=[], yticks=[])
    return figure


def plot_gallery(images: Sequence[np.ndarray], titles: Sequence[str]) -> Figure:
    """True colours of images (13, H, W), all under one stretch, each under its title, at most six in a row."""
    limits = stretch_limits(np.concatenate([image.reshape(len(image), 1, -1) for image in images], axis=2))
    shown = [composite(image, "true colour", limits) for image in images]
    columns = -(-len(shown) // -(-len(shown) // 6))
    return plot_images({start: shown[start : start + columns] for start in range(0, len(shown), columns)}, titles)


def typical_rows(pack: Pack, split: str = "test") -> dict[int, int]:
    """The most typical image of each class, class to row of the pack: its mean spectrum is nearest to their median."""
    rows = pack.rows(split)
    means = pd.DataFrame([np.asarray(pack.images[row]).mean((1, 2)) for row in rows], rows)
    off = (means - means.groupby(pack.labels[rows]).transform("median")).abs() / means.std(ddof=0)
    nearest = off.sum(axis=1).groupby(pack.labels[rows]).idxmin()
    return dict(zip(nearest.index.tolist(), nearest.tolist(), strict=True))


def plot_differences(differences: pd.DataFrame, axes: Axes, *, xlabel: str) -> None:
    """Differences of `stats.paired_differences` with their intervals, in points, a bar a row."""
    places, percent = range(len(differences)), 100 * differences[["difference", "low", "high"]]
    axes.hlines(places, percent["low"], percent["high"], color="#4477aa", linewidth=3)
    axes.plot(percent["difference"], places, "ko", markersize=5)
    heads = differences["protocol"].map(stats.PROTOCOLS)
    axes.set_yticks(places, (heads + ": " + differences["comparison"]).to_list())
    axes.axvline(0, color="grey", linewidth=0.8)
    axes.set(xlabel=xlabel, ylim=(len(differences) - 0.5, -0.5))


def plot_curves(table: pd.DataFrame, axes: Axes, *, by: str = "mask", ylabel: str = "", scale: float = 1.0) -> None:
    """Mean over runs against epoch, a line a group, shaded by one standard deviation (Figures 4.1 to 4.4).

    Without rows the axes say so: a half-finished grid gives half a figure.
    """
    if table.empty:
        axes.text(0.5, 0.5, "not there yet:\n`make run` makes it", ha="center", transform=axes.transAxes)
        return
    axes.set_prop_cycle(color=LINE_COLOURS)
    order = mask_order(table[by]) if by == "mask" else list(dict.fromkeys(table[by]))
    for name in order:
        group = scale * table[table[by] == name].groupby("epoch")["value"].agg(["mean", "std"]).fillna(0)
        epochs, (mean, sd) = group.index.to_numpy(float), group.to_numpy(float).T
        colour = "k" if "complete" in str(name) else METHOD_COLOURS.get(str(name).rpartition(", ")[2])
        (line,) = axes.plot(epochs, mean, "o-", label=str(name), color=colour, markersize=3)
        axes.fill_between(epochs, mean - sd, mean + sd, color=line.get_color(), alpha=0.2, linewidth=0)
    axes.set(xlabel="epoch", ylabel=ylabel)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(title=by, frameon=False)


def composite_for(hidden_bands: Sequence[str], absent: Sequence[str] = ()) -> str:
    """The composite that uses most of these bands, and none that images lack; true colour where there is none."""
    lost = set(bands.parse_bands(hidden_bands))
    there = [name for name, of in bands.COMPOSITES.items() if not {*absent} & {*of}]
    return max(there or ["true colour"], key=lambda name: len(lost.intersection(bands.COMPOSITES[name])))


def plot_before_after(
    images: np.ndarray, lossy: np.ndarray, hidden_bands: Sequence[str], titles: Sequence[str] = ()
) -> Figure:
    """Images (B, 13, H, W) above what an encoder gets of them, in the composite that lost most, under one stretch."""
    absent = [band for band, of in zip(bands.NAMES, images.swapaxes(0, 1), strict=True) if np.isnan(of).all()]
    view, limits = composite_for(hidden_bands, absent), stretch_limits(images)
    sides = {"complete": images, "incomplete": lossy}
    rows = {f"{side}\n{view}": [composite(image, view, limits) for image in many] for side, many in sides.items()}
    return plot_images(rows, titles)


def explore(draw: Callable[..., Figure], **options: Sequence[Any]) -> None:
    """Show `draw(**chosen)`, a figure, under a control an option; where no kernel runs, that of each one's first stays.

    A list of texts is a menu, one of truth a button that is pressed or not, any other a slider.
    """
    import ipywidgets
    from IPython.display import display

    controls = {}
    for name, many in options.items():
        if isinstance(many[0], bool):
            controls[name] = ipywidgets.ToggleButton(value=many[0], description=name, layout={"width": "auto"})
        else:
            kind = ipywidgets.Dropdown if isinstance(many[0], str) else ipywidgets.SelectionSlider
            controls[name] = kind(options=many, description=name)
    shown = ipywidgets.Image(format="png")

    def redraw(_: Any = None) -> None:
        figure, file = draw(**{name: control.value for name, control in controls.items()}), io.BytesIO()
        figure.savefig(file, format="png", dpi=100)
        plt.close(figure)  # the cell would show it once more
        shown.value = file.getvalue()

    redraw()
    for control in controls.values():
        control.observe(redraw, "value")
    box = ipywidgets.VBox([ipywidgets.Box([*controls.values()], layout={"flex_flow": "row wrap"}), shown])
    display({**box._repr_mimebundle_(), "image/png": base64.b64encode(shown.value).decode()}, raw=True)
