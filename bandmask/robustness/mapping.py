"""Pictures of what losing bands does: curves, bars, pairs, and all 8,192 subsets at once. Scores in, axes drawn.

Each function draws on axes of the caller's and returns nothing; where a colour means a method, `colours` gives it, the
same in every figure.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from bandmask import bands
from bandmask.robustness import lattice
from bandmask.robustness.lattice import BANDS, COMPLETE, Scores

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's, told apart by the colour-blind; and a shape each, for print without colour.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
_MARKERS = ("o", "s", "^", "D", "v", "P")
_LOST, _KEPT = "#3b3b3b", "#e6e6e6"


def colours(names: Iterable[str]) -> dict[str, str]:
    """A colour a method, in this order.

    Raises:
        ValueError: more methods than colours that can be told apart.
    """
    names = list(names)
    if len(names) > len(_COLOURS):
        raise ValueError(f"{len(names)} methods in one figure can't be told apart; give {len(_COLOURS)} or fewer")
    return dict(zip(names, _COLOURS, strict=False))


def plot_losses(
    scored: Mapping[str, Scores], axes: Axes, *, chance: float | None = None, quantile: float = 0.1
) -> None:
    """Accuracy against the number of lost bands: mean, the middle subsets shaded, best and worst subset.

    Args:
        scored: methods by name.
        axes: to draw on.
        chance: accuracy of always naming the most frequent class.
        quantile: the shade leaves out this share of subsets at either end.
    """
    from matplotlib.lines import Line2D

    palette = colours(scored)
    for (name, colour), marker in zip(palette.items(), _MARKERS, strict=False):
        accuracy = pd.Series(100 * scored[name].accuracy).groupby(scored[name].lost)
        low, high = accuracy.quantile(quantile), accuracy.quantile(1 - quantile)
        mean = accuracy.mean()
        axes.fill_between(mean.index, low, high, color=colour, alpha=0.13, linewidth=0)
        axes.plot(mean.index, accuracy.max(), color=colour, linewidth=0.9, linestyle=":")
        axes.plot(mean.index, accuracy.min(), color=colour, linewidth=1.1, linestyle="--")
        axes.plot(mean.index, mean, color=colour, linewidth=2.2, marker=marker, markersize=5)
    grey = "#555555"
    lines = [
        Line2D([], [], color=grey, linewidth=2.2),
        Line2D([], [], color=grey, linewidth=0.9, linestyle=":"),
        Line2D([], [], color=grey, linewidth=1.1, linestyle="--"),
    ]
    keys = [Line2D([], [], color=c, marker=m, linewidth=2.2) for c, m in zip(palette.values(), _MARKERS, strict=False)]
    if chance is not None:
        axes.axhline(100 * chance, color="#999999", linewidth=0.9, zorder=0)
        axes.text(0, 100 * chance, "always the most frequent class", size=8, color="#777777", va="bottom")
    texts = [*palette, "mean", "best subset", "worst subset"]
    axes.legend([*keys, *lines], texts, frameon=False, fontsize=8.5, loc="upper left", bbox_to_anchor=(1, 1))
    axes.set(xlabel="number of lost bands", ylabel="test accuracy (%)", xlim=(-0.2, BANDS + 0.2), ylim=(0, 101))
    axes.set_xticks(range(BANDS + 1))
    _plain(axes)
    axes.set_title(
        f"How accuracy falls as bands are lost\nshaded: the middle {1 - 2 * quantile:.0%} of subsets", size=11
    )


def plot_worth(worth: Mapping[str, pd.DataFrame], axes: Axes, *, note: str = "") -> None:
    """Shapley value of each band in order of wavelength, a bar a method, with intervals.

    Args:
        worth: from `lattice.estimate` with `shapley.value_weights`, by method.
        axes: to draw on.
        note: a second line of the title, such as that values are estimated.
    """
    width = 0.8 / max(len(worth), 1)
    for place, (name, colour) in enumerate(colours(worth).items()):
        figures = 100 * worth[name]
        x = np.arange(BANDS) + (place - (len(worth) - 1) / 2) * width
        reach = [figures["value"] - figures["low"], figures["high"] - figures["value"]]
        axes.bar(x, figures["value"], width * 0.92, color=colour, label=name)
        axes.errorbar(x, figures["value"], reach, fmt="none", ecolor="#333333", elinewidth=0.9, capsize=1.5)
    axes.axhline(0, color="#333333", linewidth=0.8)
    axes.set_xticks(range(BANDS), [f"{b.name}\n{b.common_name}\n{b.wavelength_nm}" for b in bands.BANDS], size=8)
    axes.set(ylabel="points of accuracy", xlabel="band, centre wavelength (nm)")
    axes.legend(frameon=False, fontsize=8.5)
    _plain(axes)
    axes.set_title(
        "\n".join(["What each band is worth: its share of the accuracy", *([note] if note else [])]), size=11
    )


def plot_interactions(matrix: np.ndarray, axes: Axes, *, title: str, reach: float | None = None) -> None:
    """Interaction of each pair in points, lower triangle; blue: worth more together, red: each stands in for the other.

    Args:
        matrix: (13, 13) as shares, from `shapley.as_matrix`.
        axes: to draw on.
        title: says which interaction.
        reach: points at which the colours end; give panels beside each other the same.
    """
    shown = np.where(np.tri(BANDS, k=-1, dtype=bool), 100 * matrix, np.nan)
    reach = reach or max(np.nanmax(np.abs(shown)), 0.1)
    picture = axes.imshow(shown, cmap="RdBu", vmin=-reach, vmax=reach)
    _number_cells(axes, shown, reach, "{:+.1f}")
    bar = axes.figure.colorbar(picture, ax=axes, shrink=0.7, pad=0.02)
    bar.set_label("points: each stands in for the other  ←  0  →  only together", size=8.5)
    _name_both(axes)
    axes.set_title(title, size=11)


def plot_pairs(
    scores: Scores, axes: Axes, *, title: str = "Accuracy with two bands lost", reach: float | None = None
) -> None:
    """Accuracy change in points against complete images with two bands lost; on the diagonal with one.

    Args:
        scores: of one method, with all losses of one and two bands.
        axes: to draw on.
        title: above it.
        reach: points at which the colours end; give panels beside each other the same.
    """
    change = 100 * (lattice.pair_losses(scores) - scores.at(COMPLETE))
    shown = np.where(np.tri(BANDS, dtype=bool), change, np.nan)
    reach = reach or max(np.nanmax(np.abs(shown)), 0.1)
    picture = axes.imshow(shown, cmap="PuOr", vmin=-reach, vmax=reach)
    _number_cells(axes, shown, reach, "{:+.0f}")
    axes.figure.colorbar(picture, ax=axes, shrink=0.7, pad=0.02).set_label("points against complete images", size=8.5)
    _name_both(axes)
    axes.set_title(f"{title}\n(one band on the diagonal; complete: {100 * scores.at(COMPLETE):.1f} %)", size=11)


def plot_extremes(scores: Scores, axes: Axes, *, worst: bool = True, title: str = "") -> None:
    """Which bands are lost in the worst subset of each size, dark, with the accuracy beside it; or in the best one."""
    found = lattice.extremes(scores, worst=worst)
    lost = ~lattice.patterns(found["code"].to_numpy())
    axes.pcolormesh(lost.astype(float), cmap=_two(), vmin=0, vmax=1, edgecolors="white", linewidth=1.6)
    axes.invert_yaxis()
    for row, (size, accuracy, subsets) in enumerate(
        zip(found["lost"], found["accuracy"], found["subsets"], strict=True)
    ):
        axes.text(BANDS + 0.3, row + 0.5, f"{100 * accuracy:.0f} %", va="center", size=9)
        axes.text(BANDS + 2.2, row + 0.5, f"of {subsets:,}", va="center", size=7.5, color="#777777")
        axes.text(-0.25, row + 0.5, str(size), va="center", ha="right", size=9)
    axes.set_xticks(np.arange(BANDS) + 0.5, bands.NAMES, rotation=90, size=9)
    axes.xaxis.tick_top()
    axes.set_yticks([])
    axes.set_ylabel("number of lost bands", labelpad=18)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    name = "worst" if worst else "best"
    axes.set_title(title or f"The {name} loss of each size (dark: lost)", size=11)


def plot_map(scores: Scores, axes: Axes, *, title: str = "All 8,192 subsets of bands", chance: float = 0.0) -> None:
    """Every subset as one cell: B01 to B07 down, B08 to B12 across, neighbours differ in one band.

    Strips beside the map say which bands are visible there: light visible, dark lost. Subsets that were not looked at
    stay white.

    Args:
        scores: of one method.
        axes: to draw on.
        title: above it.
        chance: where the colours begin.
    """
    down, across = 7, BANDS - 7
    rows, columns = _gray(down), _gray(across)
    accuracy = np.full(2**BANDS, np.nan)
    accuracy[scores.codes] = 100 * scores.accuracy
    values = accuracy[rows[:, None] | columns << down]
    extent = (0, len(columns), len(rows), 0)
    picture = axes.imshow(values, extent=extent, aspect="auto", cmap="viridis", vmin=100 * chance, vmax=100)
    strips = ((rows, down, bands.NAMES[:down], False), (columns, across, bands.NAMES[down:], True))
    for codes, count, names, above in strips:
        seen = lattice.patterns(codes, count).astype(float)
        box = (0, 1.012, 1, 0.17) if above else (-0.285, 0, 0.275, 1)
        strip = axes.inset_axes(box)
        strip.imshow(seen.T if above else seen, aspect="auto", cmap=_two().reversed(), vmin=0, vmax=1)
        strip.set_xticks([] if above else range(count), [] if above else names, rotation=90, size=8)
        strip.set_yticks(range(count) if above else [], names if above else [], size=8)
        for line in np.arange(count + 1) - 0.5:
            (strip.axhline if above else strip.axvline)(line, color="white", linewidth=1.4)
        if above:
            strip.set_title(f"{title}\nstrips: light visible, dark lost", size=11)
        strip.tick_params(length=0)
        strip.spines[:].set_visible(False)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.figure.colorbar(picture, ax=axes, shrink=0.8, pad=0.02).set_label("test accuracy (%)")


def _gray(count: int) -> np.ndarray:
    """Codes of `count` bands, from all visible on, each differing from the last in one band (Gray 1953)."""
    steps = np.arange(2**count)
    return (2**count - 1) ^ steps ^ steps >> 1


def _two():  # type: ignore[no-untyped-def]
    from matplotlib.colors import ListedColormap

    return ListedColormap([_KEPT, _LOST])


def _number_cells(axes: Axes, shown: np.ndarray, reach: float, style: str) -> None:
    for row, column in zip(*np.nonzero(np.isfinite(shown)), strict=True):
        value = shown[row, column]
        ink = "white" if abs(value) > 0.6 * reach else "#222222"
        text = style.format(value).replace("-", "−")
        axes.text(column, row, text if float(style.format(value)) else "0", ha="center", va="center", size=7, color=ink)


def _name_both(axes: Axes) -> None:
    axes.set_xticks(range(BANDS), bands.NAMES, rotation=90, size=8.5)
    axes.set_yticks(range(BANDS), bands.NAMES, size=8.5)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def _plain(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.7)
    axes.set_axisbelow(True)
