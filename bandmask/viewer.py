"""The band-mask visualizer: hide bands of an image, and see what is lost and what encoders make of the rest.

`State` is what is shown and `render` its picture, both without a widget; `BandMaskViewer` puts controls around them.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import anywidget
import ipywidgets
import numpy as np
import torch
import torch.nn.functional as F
import traitlets
import yaml
from ipywidgets import HTML, BoundedIntText, Box, Button, Dropdown, IntText, Layout, ToggleButton, VBox
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from PIL import Image, ImageColor
from torch import Tensor, nn

from bandmask import any_band, bands, datasets, encoders, evaluation, files, fills, masks, params, plots
from bandmask.fills import Moments
from bandmask.heads import SceneHeads
from bandmask.packs import DN_PER_REFLECTANCE, Pack
from bandmask.train import weights_checksum

THEMES = {  # background, text, complete, visible; the last two are told apart by the colour-blind (Okabe and Ito)
    "light": ("#ffffff", "#1a1a1a", "#8a8a8a", "#0072b2"),
    "dark": ("#212121", "#e8e8e8", "#9a9a9a", "#56b4e9"),
}
WIDTH, LEFTS, TOP = 1100, (35, 385, 735), 80  # pixels: of a figure, and where its three pictures stand
# A state's fields by the names that notebooks give them; `theme` belongs to the screen.
PARAMETERS = {name: name for name in ("dataset", "image_row", "mask", "view", "stretch", "pixel")} | {
    f"mask_{name}": name for name in ("ratio", "value", "shape", "seed")
}


@dataclass(frozen=True)
class State:
    """Everything that decides a picture, besides the pixels.

    Attributes:
        dataset: name of the data set, for the parameters; empty if it has none.
        image_row: row of the image in its pack; also the sample whose mask is drawn.
        mask: ESA names of the hidden bands. All 13 may be: here one only looks.
        ratio: expected share of hidden pixels in them.
        value: what is written over them: a number, or one of `masks.CONSTANTS`.
        shape: what is lost together, one of `masks.SHAPES`.
        seed: another seed, another draw.
        view: what is shown: a composite, a band or an index, one of `plots.VIEWS`.
        stretch: percentiles of the complete images that become black and white.
        pixel: row and column whose spectrum is drawn; None is the middle.
        theme: `light` or `dark`.
    """

    dataset: str = ""
    image_row: int = 0
    mask: tuple[str, ...] = ()
    ratio: float = 0.9
    value: str | float = "dataset_mean"
    shape: str = "pixel"
    seed: int = 0
    view: str = "true colour"
    stretch: tuple[float, float] = (2.0, 98.0)
    pixel: tuple[int, int] | None = None
    theme: str = "light"

    def __post_init__(self) -> None:
        """Check every field, and bring `mask` into SatCLIP order."""
        object.__setattr__(self, "mask", self.spec.bands)
        object.__setattr__(self, "value", self.spec.value)
        if self.value in masks.FITTED:
            known = ", ".join(masks.CONSTANTS)
            raise ValueError(
                f"pictures are drawn with mask values {known}, or a number; {self.value!r} needs a data set"
            )
        plots.mode_of(self.view)
        if len(self.stretch) != 2 or not 0 <= self.stretch[0] < self.stretch[1] <= 100:
            raise ValueError(f"stretch holds two rising percentiles, from 0 to 100; got {list(self.stretch)}")
        if self.pixel is not None and len(self.pixel) != 2:
            raise ValueError(f"pixel holds a row and a column, or nothing; got {list(self.pixel)}")
        if self.theme not in THEMES:
            raise ValueError(f"unknown theme {self.theme!r}; available: {', '.join(THEMES)}")
        for name in ("image_row", "seed"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} counts from 0; got {getattr(self, name)}")

    @property
    def spec(self) -> masks.MaskSpec:
        """The mask."""
        return masks.MaskSpec(self.mask, self.ratio, self.value, seed=self.seed, shape=self.shape, allow_all_bands=True)

    def parameters(self) -> dict[str, Any]:
        """Parameters that notebooks take, with bands by their ESA names."""
        found = {name: getattr(self, field_) for name, field_ in PARAMETERS.items()}
        found |= {"mask": " ".join(self.mask) or "none", "mask_value": str(self.value)}
        found |= {"stretch": [float(percentile) for percentile in self.stretch], "pixel": list(self.pixel or ())}
        if not self.dataset:
            del found["dataset"]
        return {**found, "mask_scheme": "esa"}

    def to_yaml(self) -> str:
        """Parameters as YAML, for `papermill -f` and `params.load`; `from_yaml` reads them back."""
        return yaml.safe_dump(self.parameters(), sort_keys=False, default_flow_style=None, width=120)

    @classmethod
    def of_parameters(cls, entries: Mapping[str, Any], order: str = "satclip") -> State:
        """From parameters of a notebook; those that say nothing about a picture are left aside.

        Args:
            entries: by name.
            order: the data set's file order, which `mask_scheme: position` counts in.

        Raises:
            ValueError: a value that no picture can have; says what is possible.
        """
        given: dict[str, Any] = {field_: entries[name] for name, field_ in PARAMETERS.items() if name in entries}
        given["mask"] = bands.resolve_mask(given.get("mask", "none"), entries.get("mask_scheme", "named"), order)
        given["pixel"] = tuple(given.get("pixel") or ()) or None
        given["stretch"] = tuple(given.get("stretch", cls.stretch))
        return cls(**given)

    @classmethod
    def from_yaml(cls, text: str, order: str = "satclip") -> State:
        """From what `to_yaml` wrote, or any parameters of the notebooks.

        Raises:
            ValueError: no YAML mapping, or parameters that are unknown, mistyped or impossible.
        """
        try:
            entries = yaml.safe_load(text) or {}
        except yaml.YAMLError as error:
            raise ValueError(f"this is no YAML: {error}") from error
        if not isinstance(entries, dict):
            raise ValueError(f"parameters are `name: value` lines, this is a {type(entries).__name__}")
        params.validate(entries, "parameters")
        return cls.of_parameters(entries, order)


class Masked(NamedTuple):
    """An image with and without its hidden pixels.

    Attributes:
        complete: reflectance, (13, H, W); NaN where it was never seen.
        incomplete: the same with the mask value in what is hidden.
        hidden: band to pixels, (H, W) bool, of the bands that lost some, never seen ones too.
    """

    complete: np.ndarray
    incomplete: np.ndarray
    hidden: dict[str, np.ndarray]


def mask_image(state: State, complete: np.ndarray, band_means: np.ndarray) -> Masked:
    """Hide what a state says.

    Args:
        state: which bands, how, and with which draw.
        complete: reflectance, (13, H, W) in SatCLIP order, NaN where nothing was seen.
        band_means: of the training split, (13,), for mask values that are means.

    Raises:
        ValueError: not 13 bands, or a pixel that lies outside.
    """
    if complete.ndim != 3 or len(complete) != len(bands.NAMES):
        raise ValueError(f"an image is (13, H, W) in the order {' '.join(bands.NAMES)}; got {complete.shape}")
    height, width = complete.shape[1:]
    row, column = state.pixel or (0, 0)
    if not (0 <= row < height and 0 <= column < width):
        raise ValueError(f"pixel ({row}, {column}) is not there: {height} rows, {width} columns, counted from 0")
    image = torch.as_tensor(np.ascontiguousarray(complete, np.float32))[None]
    drawn = state.spec.hidden(torch.tensor([state.image_row]), (height, width))
    fill = masks.fill_values(state.value, torch.as_tensor(band_means))
    incomplete = masks.hide(image, drawn, state.spec, fill)[0]
    lost = image[0].isnan()
    lost[state.spec.channels] |= drawn[0]
    incomplete = torch.where(incomplete.isnan(), fill[:, None, None], incomplete)
    hidden = {name: layer for name, layer in zip(bands.NAMES, lost.numpy(), strict=True) if layer.any()}
    return Masked(image[0].numpy(), incomplete.numpy(), hidden)


def describe(state: State, masked: Masked) -> str:
    """In words what a picture shows: `10 of 13 bands visible · hidden: B02 90 %, …`."""
    shares = [f"{name} {layer.mean():.0%}" for name, layer in masked.hidden.items()]
    counted = f"{len(bands.NAMES) - len(shares)} of {len(bands.NAMES)} bands visible"
    return f"{counted} · hidden: {', '.join(shares)} · {state.shape}" if shares else f"{counted} · nothing hidden"


def render(
    state: State, image: np.ndarray, band_means: np.ndarray, limits: tuple[np.ndarray, np.ndarray] | None = None
) -> Figure:
    """Complete and incomplete image under one stretch, their difference, a spectrum and histograms.

    Args:
        state: what is hidden and how it is shown.
        image: complete, in reflectance, (13, H, W) in SatCLIP order; NaN where nothing was seen.
        band_means: mean reflectance per band of the training split, (13,), for mask values that are means.
        limits: from `plots.stretch_limits` of the data set; default: of this image, at the state's percentiles.
    """
    masked = mask_image(state, image, band_means)
    limits = limits or plots.stretch_limits(image, *state.stretch)
    background, ink, grey, bright = THEMES[state.theme]
    view, mode = state.view, plots.mode_of(state.view)
    pixel = _pixel(state, image)
    width, high, rows = _panel(view, image.shape[1:])
    height = high + 440
    difference, end = plots.change(masked.complete, masked.incomplete, view, limits)
    scales: dict[str, tuple[str, float, float]] = {"change": (plots.SIGNED_MAP, -end, end)}
    if mode == "composite":
        scales["change"] = plots.CHANGE_MAP, 0.0, end
    else:
        channel = bands.NAMES.index(view) if mode == "band" else 0
        ends = limits[0][channel], limits[1][channel]
        scales["complete"] = ("gray", *ends) if mode == "band" else (plots.INDEX_MAP, -1, 1)
    panels = (
        ("complete", f"{view} · {' '.join(dict.fromkeys(plots.bands_of(view)))}"),
        ("incomplete", plots.lost_channels(view, masked.hidden)),
        ("change", {"composite": "mean of the channels, stretched", "band": "reflectance", "index": "index"}[mode]),
    )
    pictures = (
        plots.picture(masked.complete, view, limits, {}),
        plots.picture(masked.incomplete, view, limits, masked.hidden),
        plots.coloured(difference, *scales["change"]),
    )
    inked = ("text.color", "axes.labelcolor", "xtick.color", "ytick.color", "axes.edgecolor")
    style: Any = {"font.size": 8, "axes.facecolor": background, **dict.fromkeys(inked, ink)}
    with rc_context(style):
        figure = Figure((WIDTH / 100, height / 100), dpi=100, facecolor=background)

        def say(x: float, y: float, text: str, **style: Any) -> None:
            figure.text(x / WIDTH, 1 - y / height, text, **style)  # x and y in pixels from the upper left corner

        def show(picture: np.ndarray, x: int, y: int, size: tuple[int, int]) -> None:
            reduced = picture.shape[1] > size[0]  # every n-th pixel of a large picture would lie about scattered masks
            how = Image.Resampling.BOX if reduced else Image.Resampling.NEAREST
            figure.figimage(np.asarray(Image.fromarray(picture).resize(size, how)), x, height - y - size[1])

        say(35, 30, describe(state, masked), size=11)
        for left, (name, note), picture in zip(LEFTS, panels, pictures, strict=True):
            show(picture, left, TOP, (width, high))
            say(left, 57, name, size=10, weight="bold")
            say(left, 73, note, size=8.5)
            x, y = left + (pixel[1] + 0.5) * width / image.shape[2], TOP + (pixel[0] + 0.5) * high / rows
            for part in range(0, rows, image.shape[1]):
                at = [x / WIDTH], [1 - (y + part * high / rows) / height]
                for colour, wide in (("black", 2.6), ("white", 1.2)):
                    ring: dict[str, Any] = {
                        "marker": "o",
                        "markersize": 9,
                        "fillstyle": "none",
                        "markeredgewidth": wide,
                    }
                    figure.add_artist(Line2D(*at, color=colour, **ring))
            if name in scales:
                map_, *ends_ = scales[name]
                show(plots.coloured(np.linspace(0, 1, 256)[None], map_, 0, 1), left, TOP + high + 12, (330, 8))
                for value, x, side in zip(ends_, (left, left + 330), ("left", "right"), strict=True):
                    say(x, TOP + high + 33, f"{value:.2g}", ha=side)
        _draw_spectrum(
            figure.add_axes((70 / WIDTH, 50 / height, 550 / WIDTH, 220 / height)), masked, pixel, grey, bright
        )
        say(35, height - 285, f"spectrum of pixel {pixel}", size=9, weight="bold")
        bars, first, last = _histograms(masked, (background, grey, bright))
        show(bars, 710, height - 271, (310, 221))
        for row, name in enumerate(bands.NAMES):
            say(682, height - 257 + 17 * row, name)
            if name in masked.hidden:
                say(1025, height - 257 + 17 * row, f"−{masked.hidden[name].mean():.0%}")
        for x, value in zip((710, 865, 1020), np.linspace(first, last, 3), strict=True):
            say(x, height - 36, f"{value:.2f}", ha="center")
        say(865, height - 18, "reflectance", ha="center")
        say(680, height - 285, "histograms: visible pixels before all, in grey", size=9, weight="bold")
    return figure


def pixel_at(view: str, size: tuple[int, int], x: float, y: float) -> tuple[int, int] | None:
    """Row and column of an image (height, width) under a place on its figure, or None beside the pictures.

    `x` and `y` count from the upper left corner, 0 to 1.
    """
    width, high, rows = _panel(view, size)
    for left in LEFTS:
        column, row = (x * WIDTH - left) * size[1] / width, (y * (high + 440) - TOP) * rows / high
        if 0 <= column < size[1] and 0 <= row < rows:
            return int(row) % size[0], int(column)
    return None


def _panel(view: str, size: Sequence[int]) -> tuple[int, int, int]:
    """Width and height of a picture on the figure, and the rows that it shows: Figure 3.1 has the image three times."""
    rows = size[0] * (len(bands.FIGURE_3_1) if view == plots.FIGURE_3_1 else 1)
    zoom = min(330 / size[1], 660 / rows)
    return max(round(size[1] * zoom), 1), max(round(rows * zoom), 1), rows


def _pixel(state: State, image: np.ndarray) -> tuple[int, int]:
    return state.pixel or (image.shape[1] // 2, image.shape[2] // 2)


def _draw_spectrum(axes: Axes, masked: Masked, pixel: tuple[int, int], grey: str, bright: str) -> None:
    """Reflectance against wavelength of one pixel; what is hidden there stands at the mask value, marked."""
    at = (slice(None), *pixel)
    nm = np.array([band.wavelength_nm for band in bands.BANDS])
    lost = np.array([name in masked.hidden and bool(masked.hidden[name][pixel]) for name in bands.NAMES])
    axes.plot(nm, masked.complete[at], "-o", color=grey, markersize=7, label="complete")
    axes.plot(nm[~lost], masked.incomplete[at][~lost], "D", color=bright, markersize=4, label="visible")
    if lost.any():
        hidden: dict[str, Any] = {"color": plots.HIDDEN_COLOUR, "markersize": 8, "label": "hidden: mask value"}
        axes.plot(nm[lost], masked.incomplete[at][lost], "X", **hidden)
    axes.set_xticks([443, 665, 865, 1375, 1610, 2190])
    axes.grid(axis="y", alpha=0.4)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel("wavelength in nm; reflectance")
    axes.legend(loc="lower right", bbox_to_anchor=(1, 0.98), ncols=3, frameon=False, handletextpad=0, columnspacing=1)


def _histograms(masked: Masked, colours: Sequence[str]) -> tuple[np.ndarray, float, float]:
    """A row a band of background, all pixels and in front those still visible, as a picture; and its ends."""
    step = max(1, max(masked.complete.shape) // 128)
    complete = masked.complete[:, ::step, ::step]
    seen = complete[np.isfinite(complete)]
    low, high = np.percentile(seen, (0.2, 99.8)) if seen.size else (0.0, 1.0)
    ends = low, max(high, low + 1e-6)
    palette = np.array([ImageColor.getrgb(colour) for colour in colours], np.uint8)
    bars = []
    for name, values in zip(bands.NAMES, complete, strict=True):
        lost = masked.hidden.get(name, np.zeros(masked.complete.shape[1:], bool))[::step, ::step]
        every, visible = (np.histogram(shown, 62, ends)[0] for shown in (values, values[~lost]))
        level = np.arange(17)[::-1, None] * every.max(initial=1) / 16
        bars.append(palette[(level < every).astype(int) + (level < visible)])
    return np.concatenate(bars), *ends


class Reading(NamedTuple):
    """What one encoder makes of an image: cosine to the complete image by the pre-trained encoder, and its class."""

    encoder: str
    similarity: float
    predicted: str = ""  # by the head in service; empty without one
    probability: float = float("nan")  # mean over heads
    flipped: bool = False  # another class than that of the complete image


@dataclass(frozen=True)
class Effect:
    """Encoders and heads that judge images.

    Attributes:
        pretrained: the encoder in service.
        fine_tuned: encoders by the bands they were fine-tuned for, as folders that `load_encoder` takes, or models.
        heads: trained on complete images with the pre-trained encoder; None predicts nothing.
        classes: names.
        image_size: side of the encoder's input.
        moments: of the training spectra, for the ridge fill; None leaves it out.
        any_band: takes NaN in what is hidden; None leaves it out.
    """

    pretrained: nn.Module
    fine_tuned: Mapping[tuple[str, ...], Path | nn.Module] = field(default_factory=dict)
    heads: SceneHeads | None = None
    classes: Sequence[str] = ()
    image_size: int = 64
    moments: Moments | None = None
    any_band: nn.Module | None = None

    @torch.inference_mode()
    def of(self, image: np.ndarray, spec: masks.MaskSpec, sample: int, fill: Tensor) -> tuple[Reading, list[Reading]]:
        """The complete image, and the incomplete one by each encoder that fits its mask.

        Args:
            image: complete, in reflectance, (13, H, W).
            spec: what is hidden; drawn at the encoder's size, as in training.
            sample: the image's identity in its pack.
            fill: one value per band, (13,).
        """
        size = (self.image_size, self.image_size)
        batch = torch.as_tensor(np.ascontiguousarray(image, np.float32))[None]
        if batch.shape[2:] != size:
            batch = F.interpolate(batch, size=size, mode="bilinear")
        hidden = spec.hidden(torch.tensor([sample]), size)
        gaps = masks.hide(batch, hidden, spec, torch.full((len(bands.NAMES),), torch.nan))
        batch = torch.where(batch.isnan(), fill[:, None, None], batch)
        target = self.pretrained(batch)
        complete = self._read("complete", target, target, "")
        constant = masks.hide(batch, hidden, spec, fill)
        embedded = {"pre-trained": self.pretrained(constant)}
        if self.moments is not None and 0 < len(spec.bands) < len(bands.NAMES):
            ridge = fills.make_fill("ridge", self.moments, spec.bands)
            embedded["pre-trained, ridge fill"] = self.pretrained(masks.hide(batch, hidden, spec, ridge))
        if (found := self.fine_tuned.get(spec.bands)) is not None:
            embedded["fine-tuned"] = (_load(found) if isinstance(found, Path) else found)(constant)
        if self.any_band is not None and not gaps.isnan().all():
            embedded["any-band"] = self.any_band(gaps)
        return complete, [self._read(name, each, target, complete.predicted) for name, each in embedded.items()]

    def _read(self, name: str, embedding: Tensor, target: Tensor, expected: str) -> Reading:
        similarity = float(F.cosine_similarity(embedding, target)[0])
        if self.heads is None:
            return Reading(name, similarity)
        chances = self.heads(embedding).softmax(-1).mean(0)[0]  # (K, 1, C) -> (C,)
        predicted = self.classes[int(chances.argmax())]
        return Reading(name, similarity, predicted, float(chances.max()), bool(expected) and predicted != expected)


def find_effect(experiment: str, pack: Pack, encoder: str = "small", weights: str = "") -> Effect | None:
    """The encoders and heads that an experiment's runs have left, or None where it has no encoder yet.

    Args:
        experiment: folder below `outputs/`.
        pack: its data set.
        encoder: as the notebooks' parameter. Published ones are loaded, and fetched if they must be.
        weights: local checkpoint of a published one.
    """
    folder = params.experiment_folder(experiment)
    source = params.encoder_source(experiment, encoder)
    if isinstance(source, Path) and not source.is_dir():
        return None
    pretrained, card = encoders.load_encoder(source, weights=weights or None)
    fine_tuned: dict[tuple[str, ...], Path | nn.Module] = {}
    every: nn.Module | None = None
    for path in sorted(folder.glob("*/encoder-seed*"), reverse=True):  # the lowest seed of a mask stays
        found = encoders.read_card(path)
        if (path / any_band.MOMENTS).exists():
            every = any_band.load(path)[0]
        elif found.mask and found.mask["bands"]:
            fine_tuned[tuple(found.mask["bands"])] = path
        card = found
    heads = heads_in_service(folder, pretrained)
    return Effect(pretrained, fine_tuned, heads, pack.classes, card.image_size, Moments.of(pack), every)


def heads_in_service(folder: Path, encoder: nn.Module) -> SceneHeads | None:
    """The heads in service of an experiment's folder, if they were trained with this very encoder.

    Raises:
        ValueError: a damaged file.
    """
    if not (path := folder / "in_service" / "classification").is_dir():
        return None
    heads, made = evaluation.read_in_service(path)
    assert isinstance(heads, SceneHeads)
    return heads if made["encoder"] == weights_checksum(encoder) else None


@lru_cache(maxsize=4)
def _load(path: Path) -> nn.Module:
    return encoders.load_encoder(path)[0]


def effect_text(complete: Reading, readings: Sequence[Reading], note: str) -> str:
    """What encoders make of the incomplete image, as HTML; a flipped prediction warns in words, not by colour alone."""
    rows = ""
    for reading, name in [(complete, "complete image, pre-trained"), *((r, r.encoder) for r in readings)]:
        chance = f"{escape(reading.predicted)} ({reading.probability:.0%})" if reading.predicted else "no head"
        flip = "<br><b role='alert'>⚠ the prediction flips</b>" if reading.flipped else ""
        rows += f"<tr><th>{escape(name)}</th><td>{reading.similarity:.3f}</td><td>{chance}{flip}</td></tr>"
    head = "<tr><th>encoder</th><th>cosine to complete</th><th>predicted class</th></tr>"
    style = "<style>.bandmask-effect :is(th, td) {padding: 0 .8em 0 0; text-align: left; line-height: 1.4}</style>"
    return f"{style}<table class='bandmask-effect'>{head}{rows}</table>{escape(note)}"


class Picture(anywidget.AnyWidget):
    """A PNG that reports clicks and arrow keys, and whether the page is dark."""

    _esm = Path(__file__).with_name("picture.js")
    png = traitlets.Bytes(b"").tag(sync=True)
    alt = traitlets.Unicode("").tag(sync=True)
    dark = traitlets.Bool(False).tag(sync=True)


class BandMaskViewer(ipywidgets.Box):
    """Hide bands of an image and see what is lost.

    `state` is what is shown; setting it redraws. Every control is reached with the tab key, and arrow keys on the
    picture move the pixel whose spectrum is drawn.
    """

    def __init__(
        self,
        images: Pack | Sequence[np.ndarray],
        state: State | None = None,
        *,
        band_means: np.ndarray | None = None,
        effect: Effect | None = None,
    ) -> None:
        """Show an image.

        Args:
            images: a pack, or images of one's own in reflectance, each (13, H, W) in SatCLIP order.
            state: what to begin with, and what Reset goes back to.
            band_means: mean reflectance per band, (13,), for mask values that are means; default: of the pack's
                training split, or of the first image.
            effect: encoders and heads to judge the incomplete image with.
        """
        pack = images if isinstance(images, Pack) else None
        self._pack, self._images = pack, images.images if isinstance(images, Pack) else images
        if band_means is None:
            band_means = pack.band_means() if pack else np.nanmean(self.image(0), axis=(1, 2))
        self._band_means, self._effect = np.nan_to_num(band_means), effect
        self._state = self._first = state or State()
        self._known: dict[str, tuple[Any, Any]] = {}  # by kind: of what, and the value
        self._busy = False
        self.picture = Picture(layout=Layout(flex="1 1 40em", min_width="0", max_width="1100px", overflow="auto"))
        self.controls = make_controls(len(self._images))
        self._connect()
        side = VBox(rows_of(self.controls), layout=Layout(flex="1 1 21em", min_width="0", max_width="34em"))
        super().__init__([self.picture, side], layout=Layout(flex_flow="row wrap", align_items="flex-start"))
        self._show()

    @classmethod
    def of_experiment(cls, experiment: str, state: State | None = None) -> BandMaskViewer:
        """The data set of an experiment, with the encoders and heads that its runs have left.

        Args:
            experiment: a file of `params/experiments`, without its ending.
            state: what to begin with.

        Raises:
            FileNotFoundError: no such experiment, or its data are not here.
        """
        entries = params.load(files.project_root() / "params" / "experiments" / f"{experiment}.yaml")
        pack = datasets.open_dataset(entries["dataset"])
        source = entries.get("encoder", "small"), entries.get("weights", "")
        effect = find_effect(entries["experiment"], pack, *source)
        return cls(pack, replace(state or State(), dataset=entries["dataset"]), effect=effect)

    @property
    def state(self) -> State:
        """What is shown."""
        return self._state

    @state.setter
    def state(self, state: State) -> None:
        if state == self._state:
            return
        before, self._state = self._state, state
        try:
            self._show()
        except ValueError:
            self._state = before
            raise

    def change(self, **changes: Any) -> None:
        """Another value of some of the state's fields; an impossible one is said, and nothing else changes."""
        self._try(lambda: replace(self._state, **changes))

    def read(self, text: str) -> None:
        """Show what parameters say, as `State.to_yaml` or a file of `params/` has them."""
        order = self._pack.card["stored_order"] if self._pack else "satclip"
        self._try(lambda: replace(State.from_yaml(text, order), theme=self._state.theme))

    def image(self, row: int) -> np.ndarray:
        """A complete image in reflectance, (13, H, W).

        Raises:
            ValueError: no such row.
        """
        if row >= len(self._images):
            raise ValueError(f"image {row} is not there: {len(self._images)} images, counted from 0")
        if self._pack is None:
            return np.asarray(self._images[row], np.float32)
        image = np.asarray(self._images[row], np.float32) / DN_PER_REFLECTANCE
        image[np.isin(bands.NAMES, self._pack.absent)] = np.nan
        return image

    def limits(self) -> tuple[np.ndarray, np.ndarray]:
        """The stretch of up to 100 images of the data set."""
        count = len(self._images)
        rows = range(0, count, -(-count // 100))
        pixels = np.concatenate([self.image(row)[:, ::2, ::2].reshape(len(bands.NAMES), 1, -1) for row in rows], axis=2)
        return plots.stretch_limits(pixels, *self._state.stretch)

    def _try(self, make: Callable[[], State]) -> None:
        try:
            self.state = make()
            self._say("")
        except ValueError as error:
            self._say(str(error))
            self._fill_controls()

    def _connect(self) -> None:
        """Controls to fields of the state."""
        for name in bands.NAMES:
            self.controls[name].observe(lambda change, name=name: self._toggle({name}, not change["new"]), "value")
        for name in FIELDS:
            self.controls[name].observe(lambda change, name=name: self._given(name, change["new"]), "value")
        for name, hidden in mask_sets().items():
            act = self._toggle if name in bands.GROUPS else lambda hidden: self.change(mask=hidden)
            self.controls[name].on_click(lambda _, hidden=hidden, act=act: act(hidden))
        for name, press in (
            ("resample", lambda: self.change(seed=self._state.seed + 1)),
            ("reset", lambda: self._try(lambda: replace(self._first, theme=self._state.theme))),
            ("copy", lambda: self.picture.send({"copy": self.controls["params"].value})),
            ("read", lambda: self.read(self.controls["params"].value)),
        ):
            self.controls[name].on_click(lambda _, press=press: press())
        self.picture.on_msg(lambda _, content, __: self._pointed(content))
        self.picture.observe(lambda change: self.change(theme="dark" if change["new"] else "light"), "dark")

    def _toggle(self, names: Any, hide: bool | None = None) -> None:
        """Hide bands or show them again; of a group whichever it is not yet."""
        now = set(self._state.mask)
        hide = not now.issuperset(names) if hide is None else hide
        if not self._busy:
            self.change(mask=bands.parse_bands(now.union(names) if hide else now.difference(names)))

    def _given(self, name: str, value: Any) -> None:
        """A value that a person gave a control."""
        if self._busy:
            return
        if name == "mode":
            self.change(view=plots.VIEWS[value][0])
        elif name in ("row", "column"):
            self.change(pixel=(self.controls["row"].value, self.controls["column"].value))
        else:
            self.change(**{name: value.strip() if name == "value" else value})

    def _pointed(self, content: Mapping[str, Any]) -> None:
        """A click or an arrow key on the picture."""
        image = self.image(self._state.image_row)
        height, width = image.shape[1:]
        found = None
        if content.get("type") == "click":
            found = pixel_at(self._state.view, (height, width), content["x"], content["y"])
        elif content.get("type") == "move":
            row, column = _pixel(self._state, image)
            row, column = row + content["down"], column + content["right"]
            found = min(max(row, 0), height - 1), min(max(column, 0), width - 1)
        if found:
            self.change(pixel=found)

    def _show(self) -> None:
        """Draw, bring every control and text up to date, and ask the encoders after the picture has gone out."""
        state = self._state
        image = self._remember("image", state.image_row, lambda: self.image(state.image_row))
        limits = self._remember("limits", state.stretch, self.limits)
        figure = render(state, image, self._band_means, limits)
        judged = state.image_row, state.spec
        if self._known.get("effect", (None,))[0] != judged:
            self.controls["effect"].value = "computing …"
        self._fill_controls()
        with self.picture.hold_sync():
            self.picture.alt = f"{state.view}, complete, incomplete and what changed: {figure.texts[0].get_text()}"
            self.picture.png = to_png(figure)
        self.controls["effect"].value = self._remember("effect", judged, lambda: self._judged(image))

    def _fill_controls(self) -> None:
        state, image = self._state, self.image(self._state.image_row)
        self._busy = True  # what is set here is no wish of a person's
        try:
            fill_controls(self.controls, state, _pixel(state, image))
        finally:
            self._busy = False
        if self._pack and (label := self._pack.labels[state.image_row]) >= 0:
            self.controls["class_"].value = f"<b>class: {escape(self._pack.classes[label])}</b>"

    def _judged(self, image: np.ndarray) -> str:
        """What the encoders say, if there are any."""
        if self._effect is None:
            return "No encoder is here yet. <code>make demo</code> trains a small one."
        spec = self._state.spec
        fill = masks.fill_values(self._state.value, torch.as_tensor(self._band_means))
        note = ""
        if spec.bands and spec.bands not in self._effect.fine_tuned:
            known = "; ".join(" ".join(names) for names in self._effect.fine_tuned)
            there = f"There are encoders for: {known}." if known else "There is none for other bands either."
            note = f"No encoder was fine-tuned for exactly these bands. {there}"
        return effect_text(*self._effect.of(image, spec, self._state.image_row, fill), note)

    def _say(self, text: str) -> None:
        self.controls["said"].value = f"<span role='alert'>⚠ {escape(text)}</span>" if text else ""

    def _remember(self, kind: str, key: Any, make: Callable[[], Any]) -> Any:
        """The last value of its kind, if it is still the one wanted."""
        if kind not in self._known or self._known[kind][0] != key:
            self._known[kind] = key, make()
        return self._known[kind][1]


def to_png(figure: Figure) -> bytes:
    """A figure as PNG, made fast rather than small: it travels no further than the browser."""
    canvas, file = FigureCanvasAgg(figure), io.BytesIO()
    with rc_context({"text.hinting": "no_hinting"}):  # letters take most of the time, and hinting half of theirs
        canvas.draw()
    Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3]).save(file, "png", compress_level=1)
    return file.getvalue()


FIELDS = ("image_row", "mode", "view", "ratio", "shape", "value", "seed", "stretch", "row", "column")


def mask_sets() -> dict[str, tuple[str, ...]]:
    """Bands that one button hides, by its label: groups of the spectrum, then the thesis' mask sets."""
    thesis = {f"thesis {mask}": bands.resolve_mask(mask) for mask in bands.THESIS_MASKS if mask != "none"}
    return {**bands.GROUPS, **thesis}


def make_controls(images: int) -> dict[str, Any]:
    """Every control by the name of its field, band or button."""

    def button(label: str, tooltip: str) -> Button:
        return Button(description=label, tooltip=tooltip, layout=Layout(width="auto"))

    narrow, wide, slow = Layout(width="11em"), Layout(width="20em"), {"continuous_update": False}  # redraw on release
    controls: dict[str, Any] = {
        band.name: ToggleButton(True, description=band.label, layout=Layout(width="auto")) for band in bands.BANDS
    }
    for name, hidden in mask_sets().items():
        only = "hide or show " if name in bands.GROUPS else "hide only "
        controls[name] = button(name, only + " ".join(hidden))
    return controls | {
        "image_row": IntText(0, description="image row", tooltip=f"0 to {images - 1}", layout=narrow),
        "mode": ipywidgets.ToggleButtons(options=list(plots.VIEWS), style={"button_width": "auto"}),
        "view": Dropdown(options=_view_options("composite"), layout=wide),
        "ratio": ipywidgets.FloatSlider(0.9, min=0, max=1, step=0.01, description="ratio", layout=wide, **slow),
        "shape": Dropdown(options=masks.SHAPES, description="shape", layout=narrow),
        "value": ipywidgets.Combobox(options=[*masks.CONSTANTS, "0", "-1"], description="value", layout=wide, **slow),
        "seed": BoundedIntText(0, 0, 2**53, description="seed", layout=narrow),
        "stretch": ipywidgets.FloatRangeSlider(
            value=(2, 98), min=0, max=100, step=0.5, description="stretch %", layout=wide, **slow
        ),
        "row": IntText(description="pixel row", layout=narrow),
        "column": IntText(description="column", layout=narrow),
        "resample": button("resample", "the next seed: another draw of the mask"),
        "reset": button("reset", "what was shown at first"),
        "copy": button("copy as params", "parameters of the notebooks, for papermill -f"),
        "read": button("read params", "show what the parameters in the text say"),
        "params": ipywidgets.Textarea(rows=12, layout=Layout(width="100%", height="auto")),
        **{name: HTML() for name in ("class_", "effect", "said")},
    }


def rows_of(controls: Mapping[str, Any]) -> list[ipywidgets.Widget]:
    """Controls in rows under their headings, what one wants to see beside the picture first."""
    thesis = [name for name in mask_sets() if name not in bands.GROUPS]
    rows = {
        "Image": ["image_row", "class_", "said"],
        "What encoders make of it": ["effect"],
        "Show": ["mode", "view"],
        "Bands: press to hide or show": [*bands.NAMES],
        "Groups of bands": [*bands.GROUPS],
        "How they are hidden": ["ratio", "shape", "value", "seed", "resample", "reset"],
        "Mask sets of the thesis": thesis,
        "Stretch, and pixel of the spectrum": ["stretch", "row", "column"],
        "Parameters": ["copy", "read", "params"],
    }
    flow = Layout(flex_flow="row wrap", align_items="center")
    headed = ([HTML(f"<b>{head}</b>"), Box([controls[n] for n in row], layout=flow)] for head, row in rows.items())
    return [part for pair in headed for part in pair]


def fill_controls(controls: Mapping[str, Any], state: State, pixel: tuple[int, int]) -> None:
    """Bring every control to what a state says."""
    mode = plots.mode_of(state.view)
    for name in bands.NAMES:
        controls[name].value = name not in state.mask
        controls[name].style.text_decoration = "line-through" if name in state.mask else "none"
        controls[name].tooltip = f"{name} is {'hidden' if name in state.mask else 'visible'}"
    controls["mode"].value = mode
    if controls["view"].options != _view_options(mode):
        controls["view"].options = _view_options(mode)
    controls["row"].value, controls["column"].value = pixel
    controls["value"].value = str(state.value)
    for name in ("image_row", "view", "ratio", "shape", "seed", "stretch"):
        controls[name].value = getattr(state, name)
    controls["params"].value = state.to_yaml()


def _view_options(mode: str) -> tuple[tuple[str, str], ...]:
    """Labels and values of what a mode can show."""
    if mode == "band":
        return tuple((band.label, band.name) for band in bands.BANDS)
    return tuple((f"{name} · {' '.join(dict.fromkeys(plots.bands_of(name)))}", name) for name in plots.VIEWS[mode])
