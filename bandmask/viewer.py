"""The band-mask visualizer: hide bands of an image, and see what is lost and what encoders make of the rest.

`State` is what is shown and `render` draws it on paper; `BandMaskViewer` is the page, which `viewer.js` lays out.
Encoders are imported when the first is asked for: a picture needs none.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import anywidget
import numpy as np
import torch
import torch.nn.functional as F
import traitlets
import yaml
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor, nn

from bandmask import bands, datasets, files, fills, masks, params, plots
from bandmask.masks import Fill
from bandmask.packs import DN_PER_REFLECTANCE, Pack

if TYPE_CHECKING:
    from bandmask.heads import SceneHeads

COMPLETE_COLOUR, VISIBLE_COLOUR = "#8a8a8a", "#0072b2"  # told apart by the colour-blind (Okabe and Ito)
# A state's fields by the names that notebooks give them.
PARAMETERS = {name: name for name in ("dataset", "image_row", "mask", "view", "stretch", "pixel")} | {
    f"mask_{name}": name for name in ("ratio", "value", "shape", "seed")
}


@dataclass(frozen=True)
class State:
    """Everything that decides a picture, besides the pixels."""

    dataset: str = ""  # name of the data set, for the parameters; empty if it has none
    image_row: int = 0  # row of the image in its pack; also the sample whose mask is drawn
    mask: tuple[str, ...] = ()  # ESA names of the hidden bands; all 13 may be: here one only looks
    ratio: float = 0.9  # expected share of hidden pixels in them
    value: str | float = "dataset_mean"  # what is written over them: a number, or one of `masks.CONSTANTS`
    shape: str = "pixel"  # what is lost together, one of `masks.SHAPES`
    seed: int = 0  # another seed, another draw
    view: str = "true colour"  # a composite, a band or an index, one of `plots.VIEWS`
    stretch: tuple[float, float] = (2.0, 98.0)  # percentiles of the complete images that become black and white
    pixel: tuple[int, int] | None = None  # row and column whose spectrum is drawn; None is the middle

    def __post_init__(self) -> None:
        """Check every field, and bring `mask` into SatCLIP order."""
        object.__setattr__(self, "mask", self.spec.bands)
        object.__setattr__(self, "value", self.spec.value)
        if self.value in masks.FITTED:
            known = ", ".join(masks.CONSTANTS)
            raise ValueError(f"pictures are drawn with mask values {known}, or a number; got {self.value!r}")
        plots.mode_of(self.view)
        if len(self.stretch) != 2 or not 0 <= self.stretch[0] < self.stretch[1] <= 100:
            raise ValueError(f"stretch holds two rising percentiles, from 0 to 100; got {list(self.stretch)}")
        if self.pixel is not None and len(self.pixel) != 2:
            raise ValueError(f"pixel holds a row and a column, or nothing; got {list(self.pixel)}")
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
        found |= {"mask": " ".join(self.mask) or "none", "mask_value": str(self.value), "mask_scheme": "esa"}
        found |= {"stretch": [float(percentile) for percentile in self.stretch], "pixel": list(self.pixel or ())}
        return found if self.dataset else {name: value for name, value in found.items() if name != "dataset"}

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

    def pixel_of(self, image: np.ndarray) -> tuple[int, int]:
        """Row and column whose spectrum is drawn."""
        return self.pixel or (image.shape[-2] // 2, image.shape[-1] // 2)


class Masked(NamedTuple):
    """An image with and without its hidden pixels, in reflectance, (13, H, W)."""

    complete: np.ndarray  # NaN where it was never seen
    incomplete: np.ndarray  # the mask value in what is hidden
    hidden: dict[str, np.ndarray]  # band to pixels, (H, W) bool, of the bands that lost some, never seen ones too

    def lost_at(self, pixel: tuple[int, int]) -> np.ndarray:
        """Which bands are hidden in a pixel, (13,) bool."""
        return np.array([name in self.hidden and bool(self.hidden[name][pixel]) for name in bands.NAMES])


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


class Panel(NamedTuple):
    """A picture (H, W, 3) uint8, what it shows in words, and its colours: a map of matplotlib's and both its ends."""

    picture: np.ndarray
    note: str
    scale: tuple[str, float, float] | None = None


def panels(state: State, masked: Masked, limits: tuple[np.ndarray, np.ndarray]) -> dict[str, Panel]:
    """Complete and incomplete image under one stretch (`plots.stretch_limits`), and their difference."""
    view, mode = state.view, plots.mode_of(state.view)
    difference, end = plots.change(masked.complete, masked.incomplete, view, limits)
    changed = (plots.CHANGE_MAP, 0.0, end) if mode == "composite" else (plots.SIGNED_MAP, -end, end)
    own = (plots.INDEX_MAP, -1.0, 1.0) if mode == "index" else None
    if mode == "band":
        low, high = (float(end[bands.NAMES.index(view)]) for end in limits)
        own = ("gray", low, high)
    unit = {"composite": "mean of the channels, stretched", "band": "reflectance", "index": "index"}[mode]
    used = " ".join(dict.fromkeys(plots.bands_of(view)))
    incomplete = plots.picture(masked.incomplete, view, limits, masked.hidden)
    return {
        "complete": Panel(plots.picture(masked.complete, view, limits, {}), f"{view} · {used}", own),
        "incomplete": Panel(incomplete, plots.lost_channels(view, masked.hidden), own),
        "change": Panel(plots.coloured(difference, *changed), unit, changed),
    }


def render(
    state: State, image: np.ndarray, band_means: np.ndarray, limits: tuple[np.ndarray, np.ndarray] | None = None
) -> Figure:
    """What the page shows, for paper: the `panels`, and the spectrum of a pixel.

    Args:
        state: what is hidden and how it is shown.
        image: complete, in reflectance, (13, H, W) in SatCLIP order; NaN where nothing was seen.
        band_means: mean reflectance per band of the training split, (13,), for mask values that are means.
        limits: from `plots.stretch_limits` of the data set; default: of this image, at the state's percentiles.
    """
    masked, pixel = mask_image(state, image, band_means), state.pixel_of(image)
    figure = Figure((10, 6.6), layout="constrained")
    shown = panels(state, masked, limits or plots.stretch_limits(image, *state.stretch))
    axes = figure.subplot_mosaic([[*shown], ["spectrum"] * 3], height_ratios=(3, 1.6))
    for name, panel in shown.items():
        axes[name].imshow(panel.picture, interpolation="nearest")
        axes[name].set_title(f"{name}\n{panel.note}", fontsize=9)
        axes[name].set(xticks=[], yticks=[])
        for row in range(pixel[0], len(panel.picture), image.shape[1]):  # Figure 3.1 has the image three times
            for colour, width in (("black", 2.6), ("white", 1.2)):
                axes[name].plot(pixel[1], row, "o", color=colour, mfc="none", markersize=8, mew=width)
        if panel.scale:
            colours = ScalarMappable(Normalize(*panel.scale[1:]), panel.scale[0])
            figure.colorbar(colours, ax=axes[name], orientation="horizontal", aspect=40, pad=0.02)
    _draw_spectrum(axes["spectrum"], masked, pixel)
    figure.suptitle(describe(state, masked), fontsize=11)
    return figure


def _draw_spectrum(axes: Axes, masked: Masked, pixel: tuple[int, int]) -> None:
    """Reflectance against wavelength of one pixel; what is hidden there stands at the mask value, marked."""
    nm = np.array([band.wavelength_nm for band in bands.BANDS])
    complete, incomplete, lost = masked.complete[:, *pixel], masked.incomplete[:, *pixel], masked.lost_at(pixel)
    axes.plot(nm, complete, "-o", color=COMPLETE_COLOUR, markersize=7, label="complete")
    axes.plot(nm[~lost], incomplete[~lost], "D", color=VISIBLE_COLOUR, markersize=4, label="visible")
    if lost.any():
        axes.plot(nm[lost], incomplete[lost], "X", color=plots.HIDDEN_COLOUR, ms=8, label="hidden: mask value")
    axes.set(title=f"spectrum of pixel {pixel}", xlabel="wavelength in nm", ylabel="reflectance")
    axes.legend(frameon=False, fontsize=8)


def to_png(figure: Figure) -> bytes:
    """A figure as PNG."""
    figure.savefig(file := io.BytesIO(), format="png", dpi=100)
    return file.getvalue()


def _histograms(masked: Masked) -> dict[str, Any]:
    """Pixels in 48 steps of reflectance, of each band all and those still visible, as parts of its fullest step."""
    step = max(1, max(masked.complete.shape) // 128)
    complete = masked.complete[:, ::step, ::step]
    seen = complete[np.isfinite(complete)]
    low, high = np.percentile(seen, (0.2, 99.8)) if seen.size else (0.0, 1.0)
    ends, rows = (float(low), float(max(high, low + 1e-6))), []
    for name, values in zip(bands.NAMES, complete, strict=True):
        lost = masked.hidden.get(name, np.zeros(masked.complete.shape[1:], bool))[::step, ::step]
        every, visible = (np.histogram(shown, 48, ends)[0] for shown in (values, values[~lost]))
        parts = [(counts / every.max(initial=1)).round(3).tolist() for counts in (every, visible)]
        rows.append([*parts, f"−{masked.hidden[name].mean():.0%}" if name in masked.hidden else ""])
    return {"ends": ends, "rows": rows}


class Reading(NamedTuple):
    """What one method makes of an image: cosine to the complete image by the pre-trained encoder, and its class."""

    method: str
    similarity: float
    predicted: str = ""  # by the head in service; empty without one
    probability: float = 0.0  # mean over heads
    flipped: bool = False  # another class than that of the complete image


@dataclass(frozen=True)
class Effect:
    """Encoders and heads that judge images."""

    pretrained: nn.Module  # the encoder in service
    moments: fills.Moments  # of the training spectra, for the ridge fill
    heads: SceneHeads | None = None  # trained on complete images with that encoder; None predicts nothing
    classes: Sequence[str] = ()
    tuned: Mapping[tuple[str, ...], Path] = field(default_factory=dict)  # `<run>/encoder-seed<n>` by the hidden bands
    any_band: Path | None = None  # `any-band/encoder-seed<n>`
    image_size: int = 64

    @torch.inference_mode()
    def of(self, image: np.ndarray, spec: masks.MaskSpec, sample: int, fill: Tensor) -> list[Reading]:
        """The complete image, then the incomplete one by each method that there is for its mask.

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
        whole = torch.where(batch.isnan(), fill[:, None, None], batch)  # only any-band can take what was never seen
        target = self.pretrained(whole)
        readings = [self._read("complete", target, target, "")]
        for method, (encoder, put) in self._methods(spec, fill).items():
            given = masks.mask_batch(batch if method == "any-band" else whole, torch.tensor([sample]), spec, put)
            if not given.isnan().all():
                readings.append(self._read(method, encoder(given), target, readings[0].predicted))
        return readings

    def _methods(self, spec: masks.MaskSpec, fill: Tensor) -> dict[str, tuple[nn.Module, Fill]]:
        """Encoders, and what stands in hidden pixels, as in `evaluation.method_views`; without loading any twice."""
        found: dict[str, tuple[nn.Module, Fill]] = {"pre-trained": (self.pretrained, fill)} if spec.bands else {}
        if 0 < len(spec.bands) < len(bands.NAMES) and set(spec.bands) <= set(self.moments.bands):
            found["ridge"] = self.pretrained, fills.make_fill("ridge", self.moments, spec.bands)
        if (path := self.tuned.get(spec.bands)) is not None:
            found["fine-tuned"] = _load(path), fill
        if found and self.any_band is not None:
            found["any-band"] = _load(self.any_band), torch.full((len(bands.NAMES),), torch.nan)
        return found

    def _read(self, method: str, embedding: Tensor, target: Tensor, expected: str) -> Reading:
        similarity = float(F.cosine_similarity(embedding, target)[0])
        if self.heads is None:
            return Reading(method, similarity)
        chances = self.heads(embedding).softmax(-1).mean(0)[0]  # (K, 1, C) -> (C,)
        predicted = self.classes[int(chances.argmax())]
        return Reading(method, similarity, predicted, float(chances.max()), bool(expected) and predicted != expected)


@cache
def _load(path: Path) -> nn.Module:
    from bandmask import any_band, encoders

    return (any_band.load if (path / any_band.MOMENTS).exists() else encoders.load_encoder)(path)[0]


def find_effect(experiment: str, pack: Pack, encoder: str = "small", weights: str = "") -> Effect | None:
    """The encoders and heads that an experiment's runs have left, or None where it has no encoder yet.

    Args:
        experiment: folder below `outputs/`.
        pack: its data set.
        encoder: as the notebooks' parameter. Published ones are loaded, and fetched if they must be.
        weights: local checkpoint of a published one.

    Raises:
        ValueError: a damaged file.
    """
    from bandmask import any_band, encoders, evaluation
    from bandmask.train import weights_checksum

    folder, source = params.experiment_folder(experiment), params.encoder_source(experiment, encoder)
    if isinstance(source, Path) and not source.is_dir():
        return None
    pretrained, card = encoders.load_encoder(source, weights=weights or None)
    tuned: dict[tuple[str, ...], Path] = {}
    every, heads, service = None, None, folder / "in_service" / "classification"
    if encoder == encoders.MINI:  # its student and heads come with it
        every, service = files.MINI / "encoder", files.MINI / "heads"
    for path in sorted(folder.glob("*/encoder-seed*"), reverse=True):  # the lowest seed of a mask stays
        card = encoders.read_card(path)
        if (path / any_band.MOMENTS).exists():
            every = path
        elif card.mask and card.mask["bands"]:  # of mask `none` there is nothing to ask
            tuned[tuple(card.mask["bands"])] = path
    if service.is_dir():
        found, made = evaluation.read_in_service(service)
        heads = found if made["encoder"] == weights_checksum(pretrained) else None  # of this very encoder
    if encoder == encoders.MINI and pack.card["dataset"] == "eurosat-mini":  # all of it comes with the package
        every, heads = every or files.MINI / "encoder", heads or evaluation.read_in_service(files.MINI / "heads")[0]
    return Effect(pretrained, fills.Moments.of(pack), heads, pack.classes, tuned, every, card.image_size)  # type: ignore[arg-type]


class BandMaskViewer(anywidget.AnyWidget):
    """Hide bands of an image and see what is lost.

    `state` is what is shown; setting it redraws. The page sends parameters as notebooks know them, one wish at a time,
    and the next only when the picture of the last has come: what was wished for in between is never drawn. Methods are
    asked when no wish is left.
    """

    _esm, _css = (Path(__file__).with_name(f"viewer.{ending}") for ending in ("js", "css"))
    options = traitlets.Dict().tag(sync=True)  # what can be chosen
    shown = traitlets.Dict().tag(sync=True)
    thumbnails = traitlets.Dict().tag(sync=True)
    judged = traitlets.Dict().tag(sync=True)  # what methods say, and `of` which picture

    def __init__(
        self,
        images: Pack | Sequence[np.ndarray],
        state: State | None = None,
        *,
        band_means: np.ndarray | None = None,
        effect: Effect | Callable[[], Effect | None] | None = None,
    ) -> None:
        """Show an image.

        Args:
            images: a pack, or images of one's own in reflectance, each (13, H, W) in SatCLIP order.
            state: what to begin with, and what Reset goes back to.
            band_means: mean reflectance per band, (13,), for mask values that are means; default: of the pack's
                training split, or of the first image.
            effect: methods to judge the incomplete image with, or what finds them once the picture is there.
        """
        pack = images if isinstance(images, Pack) else None
        self._pack, self._images = pack, images.images if isinstance(images, Pack) else images
        if band_means is None:
            band_means = pack.band_means() if pack else np.nanmean(self.image(0), axis=(1, 2))
        self._band_means, self._effect = np.nan_to_num(band_means), effect
        self._state = state or State()
        self._known: dict[str, tuple[Any, Any]] = {}  # by kind: of what, and the value
        self._answers = 0
        labels = [int(label) for label in pack.labels] if pack else [-1] * len(self._images)
        options = {
            **{"bands": [[band.name, band.label, band.wavelength_nm] for band in bands.BANDS], "groups": bands.GROUPS},
            **{"thesis": {f"thesis {m}": bands.resolve_mask(m) for m in bands.THESIS_MASKS if m != "none"}},
            **{"views": plots.VIEWS, "shapes": masks.SHAPES, "values": [*masks.CONSTANTS, "0", "-1"]},
            **{"classes": pack.classes if pack else (), "labels": labels, "first": self._state.parameters()},
        }
        super().__init__(options=options, shown=self._draw())
        self.on_msg(lambda _, content, __: self.receive(content))

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
        state = replace(state or State(), dataset=entries["dataset"])
        return cls(pack, state, effect=lambda: find_effect(entries["experiment"], pack, *source))

    @property
    def state(self) -> State:
        """What is shown; what can't be shown is a ValueError, and changes nothing."""
        return self._state

    @state.setter
    def state(self, state: State) -> None:
        before, self._state = self._state, state
        try:
            self.shown = self._draw()
        except ValueError:
            self._state = before
            raise

    def receive(self, content: Mapping[str, Any]) -> None:
        """A wish of the page: `params` to show (YAML), `thumbnails` of rows, or to `judge` what is shown."""
        if "thumbnails" in content:
            limits = self._remember("limits", self._state.stretch, self.limits)
            shown = {row: plots.picture(self.image(row), "true colour", limits, {}) for row in content["thumbnails"]}
            self.thumbnails = {str(row): _png(picture) for row, picture in shown.items()}
        elif "judge" in content:
            self.judged = self._judge()
        else:
            order = self._pack.card["stored_order"] if self._pack else "satclip"
            try:
                self.state = State.from_yaml(content["params"], order)
            except ValueError as error:
                self._answers += 1
                self.shown = {**self.shown, "said": str(error), "answer": self._answers}

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
        rows = range(0, len(self._images), -(-len(self._images) // 100))
        pixels = np.concatenate([self.image(row)[:, ::2, ::2].reshape(len(bands.NAMES), 1, -1) for row in rows], axis=2)
        return plots.stretch_limits(pixels, *self._state.stretch)

    def _draw(self) -> dict[str, Any]:
        """All that the page shows, except what methods say."""
        state = self._state
        image = self._remember("image", state.image_row, lambda: self.image(state.image_row))
        limits = self._remember("limits", state.stretch, self.limits)
        masked, pixel = mask_image(state, image, self._band_means), state.pixel_of(image)
        spectra = masked.complete[:, *pixel], masked.incomplete[:, *pixel], masked.lost_at(pixel)
        self._answers += 1
        return {
            **{"answer": self._answers, "said": "", "params": state.parameters(), "yaml": state.to_yaml()},
            **{"text": describe(state, masked), "judged": repr((state.image_row, state.spec))},
            **{"size": image.shape[1:], "pixel": pixel, "histograms": _histograms(masked)},
            "panels": [
                {"name": name, "note": panel.note, "png": _png(panel.picture), "scale": _scale(panel)}
                for name, panel in panels(state, masked, limits).items()
            ],
            "spectrum": [  # complete, incomplete and whether it is hidden; NaN is no JSON
                [None if np.isnan(whole) else float(whole), float(rest), bool(lost)]
                for whole, rest, lost in zip(*spectra, strict=True)
            ],
        }

    def _judge(self) -> dict[str, Any]:
        """What methods make of what is shown, if there are any."""
        state, note, readings = self._state, "", []
        try:
            effect = self._remember("effect", None, self._effect if callable(self._effect) else lambda: self._effect)
            if effect is None:
                note = "No encoder is here yet. `make demo` trains a small one."
            else:
                fill = masks.fill_values(state.value, torch.as_tensor(self._band_means))
                image = self.image(state.image_row)
                readings = effect.of(image, state.spec, state.image_row, fill)
                if state.mask and state.mask not in effect.tuned:
                    known = "; ".join(" ".join(names) for names in effect.tuned)
                    there = f"There are encoders for: {known}." if known else "There is none for other bands either."
                    note = f"No encoder was fine-tuned for exactly these bands. {there}"
        except (OSError, ValueError) as error:
            note = f"⚠ {error}"
        return {"of": self.shown["judged"], "readings": [reading._asdict() for reading in readings], "note": note}

    def _remember(self, kind: str, key: Any, make: Callable[[], Any]) -> Any:
        """The last value of its kind, if it is still the one wanted."""
        if kind not in self._known or self._known[kind][0] != key:
            self._known[kind] = key, make()
        return self._known[kind][1]


def _png(picture: np.ndarray) -> bytes:
    Image.fromarray(picture).save(file := io.BytesIO(), "png", compress_level=1)  # it travels to the browser only
    return file.getvalue()


def _scale(panel: Panel) -> dict[str, Any] | None:
    if panel.scale is None:
        return None
    name, *ends = panel.scale
    colours = plots.coloured(np.linspace(0, 1, 256)[None], name, 0, 1)
    return {"png": _png(colours), "ends": [f"{end:.2g}" for end in ends]}
