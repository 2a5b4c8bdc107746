"""The band-mask visualizer: hide bands of an image, and see what is lost and what encoders make of the rest.

`State` is what is shown; `BandMaskViewer` is the page, which `viewer.js` lays out. Encoders are imported when the first
is asked for: a picture needs none.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import anywidget
import numpy as np
import torch
import torch.nn.functional as F
import traitlets
import yaml
from PIL import Image
from torch import Tensor, nn

from bandmask import bands, datasets, files, fills, masks, params, plots
from bandmask.bands import DN_PER_REFLECTANCE
from bandmask.heads import SceneHeads
from bandmask.masks import MaskSpec
from bandmask.packs import Pack


@dataclass(frozen=True)
class State:
    """Everything that decides a picture, besides the pixels."""

    spec: MaskSpec = field(default_factory=MaskSpec)  # what is hidden
    image_row: int = 0  # row of the image in its pack; also the sample whose mask is drawn
    view: str = "true colour"  # a composite, a band or an index, one of `plots.VIEWS`
    stretch: tuple[float, float] = (2.0, 98.0)  # percentiles of the complete images that become black and white
    pixel: tuple[int, int] | None = None  # row and column whose spectrum is drawn; None is the middle
    dataset: str = ""  # name of the data set, for the parameters; empty if it has none

    def __post_init__(self) -> None:
        """Check what the mask has not checked."""
        if self.spec.value in (*masks.FITTED, masks.NATIVE):
            known = ", ".join(masks.CONSTANTS)
            raise ValueError(f"pictures are drawn with mask values {known}, or a number; got {self.spec.value!r}")
        plots.mode_of(self.view)
        if len(self.stretch) != 2 or not 0 <= self.stretch[0] < self.stretch[1] <= 100:
            raise ValueError(f"stretch holds two rising percentiles, from 0 to 100; got {list(self.stretch)}")
        if self.pixel is not None and len(self.pixel) != 2:
            raise ValueError(f"pixel holds a row and a column, or nothing; got {list(self.pixel)}")

    @classmethod
    def of_parameters(cls, entries: Mapping[str, Any], order: str = "satclip") -> State:
        """From parameters of a notebook; those that say nothing about a picture are left aside.

        `order` is the data set's file order, which `mask_scheme: position` counts in. A ValueError for a value that no
        picture can have says what is possible.
        """
        given: dict[str, Any] = {**cls().parameters(), "dataset": "", "mask_scheme": "named", **entries}
        hidden = bands.resolve_mask(given["mask"], given["mask_scheme"], order)
        drawn = {name: given[f"mask_{name}"] for name in ("ratio", "value", "shape", "seed")}
        shown = {name: given[name] for name in ("image_row", "view", "dataset")}
        shown |= {"stretch": tuple(given["stretch"]), "pixel": tuple(given["pixel"]) or None}
        return cls(MaskSpec(hidden, **drawn), **shown)

    def parameters(self) -> dict[str, Any]:
        """Parameters that notebooks take, with bands by their ESA names; `of_parameters` reads them back."""
        spec = self.spec
        found: dict[str, Any] = {"dataset": self.dataset} if self.dataset else {}
        found |= {"image_row": self.image_row, "mask": " ".join(spec.bands) or "none", "mask_scheme": "esa"}
        found |= {"mask_ratio": spec.ratio, "mask_value": str(spec.value), "mask_shape": spec.shape}
        found |= {"mask_seed": spec.seed, "view": self.view, "stretch": list(self.stretch)}
        return found | {"pixel": list(self.pixel or ())}


def mask_image(
    image: np.ndarray, spec: MaskSpec, sample: int, band_means: np.ndarray
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Hide what a mask says of an image, as training does; a ValueError for other than 13 bands.

    Args:
        image: reflectance, (13, H, W) in SatCLIP order, NaN where nothing was seen.
        spec: which bands, how, and with which draw.
        sample: the image's row in its pack, which decides the draw.
        band_means: of the training split, (13,), for mask values that are means.

    Returns:
        The image with the mask value in what is hidden or was never seen; band to hidden pixels, (H, W) bool.
    """
    complete = torch.as_tensor(np.ascontiguousarray(image, np.float32))[None]
    drawn = spec.hidden(torch.tensor([sample]), image.shape[1:])
    fill = masks.fill_values(spec.value, torch.as_tensor(band_means))
    lost = complete[0].isnan()
    lost[spec.channels] |= drawn[0]
    incomplete = masks.hide(complete, drawn, spec, fill)[0]
    incomplete = torch.where(incomplete.isnan(), fill[:, None, None], incomplete)
    hidden = {name: layer for name, layer in zip(bands.NAMES, lost.numpy(), strict=True) if layer.any()}
    return incomplete.numpy(), hidden


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
    def of(self, image: np.ndarray, spec: MaskSpec, sample: int, fill: Tensor) -> list[dict[str, Any]]:
        """The complete image, then the incomplete one by each method that there is for its mask.

        Of reflectance (13, H, W), with one value a band, (13,), as `fill`; what is hidden is drawn at the encoder's
        size, as in training, for this row of the pack.

        Returns:
            Of each `method`: `similarity`, the cosine to the complete image by the pre-trained encoder; with heads also
            the class `predicted` and its `probability`, the mean over heads.
        """
        batch, size = torch.as_tensor(np.ascontiguousarray(image, np.float32))[None], (self.image_size,) * 2
        if batch.shape[2:] != size:
            batch = F.interpolate(batch, size=size, mode="bilinear")
        whole = torch.where(batch.isnan(), fill[:, None, None], batch)  # only any-band can take what was never seen

        def hide(images: Tensor, put: masks.Fill) -> Tensor:
            return masks.mask_batch(images, torch.tensor([sample]), spec, put)

        asked: dict[str, tuple[nn.Module, Tensor]] = {"complete": (self.pretrained, whole)}
        if spec.bands:
            asked["pre-trained"] = self.pretrained, hide(whole, fill)
        if 0 < len(spec.bands) < len(bands.NAMES) and self.moments.known[spec.channels].all():
            for name in masks.FITTED:
                asked[name] = self.pretrained, hide(whole, fills.make_fill(name, self.moments, spec.bands))
        if spec.bands in self.tuned:
            asked["fine-tuned"] = _load(self.tuned[spec.bands]), hide(whole, fill)
        gaps = hide(batch, torch.full_like(fill, torch.nan))
        if self.any_band is not None and spec.bands and not gaps.isnan().all():
            asked["any-band"] = _load(self.any_band), gaps
        target, found = self.pretrained(whole), []
        for method, (encoder, given) in asked.items():
            embedding = encoder(given)
            found.append({"method": method, "similarity": float(F.cosine_similarity(embedding, target)[0])})
            if self.heads is not None:
                chances = self.heads(embedding).softmax(-1).mean(0)[0]  # (K, 1, C) -> (C,)
                found[-1] |= {"predicted": self.classes[int(chances.argmax())], "probability": float(chances.max())}
        return found


@cache
def _load(path: Path) -> nn.Module:
    from bandmask import any_band, encoders

    return (any_band.load if (path / any_band.MOMENTS).exists() else encoders.load_encoder)(path)[0]


def find_effect(experiment: str, pack: Pack, encoder: str = "small", weights: str = "") -> Effect | None:
    """The encoders and heads that runs left in `outputs/<experiment>`, or None where it has no encoder yet.

    `encoder` and `weights` are as the notebooks' parameters; a damaged file is a ValueError.
    """
    from bandmask import any_band, encoders, evaluation
    from bandmask.train import weights_checksum

    folder, source = params.experiment_folder(experiment), params.encoder_source(experiment, encoder)
    if isinstance(source, Path) and not source.is_dir():
        return None
    pretrained, card = encoders.load_encoder(source, weights=weights or None)
    every = files.MINI / "encoder" if encoder == encoders.MINI else None  # its copy for every loss comes with it
    tuned: dict[tuple[str, ...], Path] = {}
    for path in sorted(folder.glob("*/encoder-seed*"), reverse=True):  # the lowest seed of a mask stays
        if (path / any_band.MOMENTS).exists():
            every = path
        elif (mask := encoders.read_card(path).mask) and mask["bands"]:  # of mask `none` there is nothing to ask
            tuned[tuple(mask["bands"])] = path
    shipped = encoder == encoders.MINI and pack.card["dataset"] == "eurosat-mini"
    service = files.MINI / "heads" if shipped else folder / "in_service" / "classification"
    heads, made = evaluation.read_in_service(service) if service.is_dir() else (None, {})
    if made.get("encoder") != weights_checksum(pretrained):
        heads = None  # of another encoder
    return Effect(pretrained, fills.Moments.of(pack), heads, pack.classes, tuned, every, card.image_size)  # type: ignore[arg-type]


class BandMaskViewer(anywidget.AnyWidget):
    """Hide bands of an image and see what is lost.

    `state` is what is shown. The page sends parameters as notebooks know them, one wish at a time, and the next only
    when the picture of the last has come: what was wished for in between is never drawn. Methods are asked when no wish
    is left.
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
        effect: Callable[[], Effect | None] = lambda: None,
    ) -> None:
        """Show images of a pack, or of one's own in reflectance, each (13, H, W) in SatCLIP order.

        `state` is what to begin with, and what Reset goes back to; `effect` finds methods once the picture is there.
        """
        self._pack = pack = images if isinstance(images, Pack) else None
        self._images = images.images if isinstance(images, Pack) else images
        means = pack.band_means() if pack else np.nanmean(self.image(0), axis=(1, 2))
        self._band_means = np.where(np.isnan(means), np.nanmean(means), means)  # the page takes no NaN
        self._effect, self._limits = cache(effect), lru_cache(4)(self.limits)
        self.state, self._answers = state or State(), 0
        labels = [int(label) for label in pack.labels] if pack else [-1] * len(self._images)
        options = {
            **{"bands": [[band.name, band.label, band.wavelength_nm] for band in bands.BANDS], "groups": bands.GROUPS},
            **{"thesis": {f"thesis {m}": bands.resolve_mask(m) for m in bands.THESIS_MASKS if m != "none"}},
            **{"views": plots.VIEWS, "shapes": masks.SHAPES, "values": [*masks.CONSTANTS, "0", "-1"]},
            **{"classes": pack.classes if pack else (), "labels": labels, "first": self.state.parameters()},
        }
        super().__init__(options=options, shown=self._draw(self.state))
        self.on_msg(lambda _, content, __: self.receive(content))

    @classmethod
    def of_experiment(cls, experiment: str, state: State | None = None) -> BandMaskViewer:
        """The data set of an experiment of `params/experiments`, with the encoders and heads that its runs have left.

        A FileNotFoundError if there is no such experiment, or its data are not here.
        """
        entries = params.load(files.project_root() / "params" / "experiments" / f"{experiment}.yaml")
        pack = datasets.open_dataset(entries["dataset"])
        source = entries.get("encoder", "small"), entries.get("weights", "")
        state = replace(state or State(), dataset=entries["dataset"])
        return cls(pack, state, lambda: find_effect(entries["experiment"], pack, *source))

    def show(self, state: State) -> None:
        """Draw a state; one that can't be shown is a ValueError, and changes nothing."""
        self.shown = self._draw(state)
        self.state = state

    def receive(self, content: Mapping[str, Any]) -> None:
        """A wish of the page: `params` to show (YAML), `thumbnails` of rows, or to `judge` what is shown."""
        if "thumbnails" in content:
            limits = self._limits(self.state.stretch)
            shown = {row: plots.picture(self.image(row), "true colour", limits, {}) for row in content["thumbnails"]}
            self.thumbnails = {str(row): _png(picture) for row, picture in shown.items()}
        elif "judge" in content:
            self.judged = self._judge()
        else:
            try:
                entries = yaml.safe_load(content["params"]) or {}
                if not isinstance(entries, dict):
                    raise ValueError(f"parameters are `name: value` lines, this is a {type(entries).__name__}")
                params.validate(entries, "parameters")
                self.show(State.of_parameters(entries, self._pack.card["stored_order"] if self._pack else "satclip"))
            except (ValueError, yaml.YAMLError) as error:
                self._answers += 1
                self.shown = {**self.shown, "said": str(error), "answer": self._answers}

    def image(self, row: int) -> np.ndarray:
        """A complete image in reflectance, (13, H, W), NaN where nothing was seen; a ValueError if there is none."""
        if not 0 <= row < len(self._images):
            raise ValueError(f"image {row} is not there: {len(self._images)} images, counted from 0")
        image = np.asarray(self._images[row], np.float32)
        if self._pack is not None:
            image = image / DN_PER_REFLECTANCE
            image[np.isin(bands.NAMES, self._pack.absent)] = np.nan
        return image

    def limits(self, stretch: tuple[float, float]) -> plots.Limits:
        """The percentiles of up to 100 images of the data set, a band each."""
        rows = range(0, len(self._images), -(-len(self._images) // 100))
        pixels = np.concatenate([self.image(row)[:, ::2, ::2].reshape(len(bands.NAMES), 1, -1) for row in rows], axis=2)
        return plots.stretch_limits(pixels, *stretch)

    def _draw(self, state: State) -> dict[str, Any]:
        """All that the page shows, except what methods say."""
        image, limits = self.image(state.image_row), self._limits(state.stretch)
        incomplete, hidden = mask_image(image, state.spec, state.image_row, self._band_means)
        height, width = image.shape[1:]
        row, column = state.pixel or (height // 2, width // 2)
        if not (0 <= row < height and 0 <= column < width):
            raise ValueError(f"pixel ({row}, {column}) is not there: {height} rows, {width} columns, counted from 0")
        shares = [f"{name} {layer.mean():.0%}" for name, layer in hidden.items()]
        said = f"hidden: {', '.join(shares)} · {state.spec.shape}" if shares else "nothing hidden"
        lost = [name in hidden and bool(hidden[name][row, column]) for name in bands.NAMES]
        spectrum = zip(image[:, row, column].tolist(), incomplete[:, row, column].tolist(), lost, strict=True)
        self._answers += 1
        return {
            **{"answer": self._answers, "said": "", "params": state.parameters()},
            "text": f"{len(bands.NAMES) - len(shares)} of {len(bands.NAMES)} bands visible · {said}",
            **{"judged": repr((state.image_row, state.spec)), "size": (height, width), "pixel": (row, column)},
            "panels": panels(state.view, limits, image, incomplete, hidden),
            "histograms": _histograms(image, hidden, (float(limits[0].min()), float(limits[1].max()))),
            # complete, incomplete and whether it is hidden; NaN is no JSON
            "spectrum": [[None if np.isnan(whole) else whole, rest, gone] for whole, rest, gone in spectrum],
        }

    def _judge(self) -> dict[str, Any]:
        """What methods make of what is shown, if there are any."""
        state, note, readings = self.state, "", []
        try:
            if (effect := self._effect()) is None:
                note = "No encoder is here yet. `make demo` trains a small one."
            else:
                fill = masks.fill_values(state.spec.value, torch.as_tensor(self._band_means))
                readings = effect.of(self.image(state.image_row), state.spec, state.image_row, fill)
                if state.spec.bands and state.spec.bands not in effect.tuned:
                    note = "No encoder was fine-tuned for exactly these bands"
                    note += "; there are for: " + "; ".join(map(" ".join, effect.tuned)) if effect.tuned else ""
        except (OSError, ValueError) as error:
            note = f"⚠ {error}"
        return {"of": self.shown["judged"], "readings": readings, "note": note}


def panels(
    view: str, limits: plots.Limits, image: np.ndarray, incomplete: np.ndarray, hidden: Mapping[str, np.ndarray]
) -> list[dict[str, Any]]:
    """Complete and incomplete image under one stretch, and their difference, as the page lays them out.

    Each has a `name`, a `note`, a `png`, and a `scale`: its colours as PNG and both their `ends`, or None.
    """
    mode, names = plots.mode_of(view), tuple(dict.fromkeys(plots.bands_of(view)))
    black, white = (float(end[bands.NAMES.index(names[0])]) for end in limits)
    own = {"composite": None, "band": ("gray", black, white), "index": (plots.INDEX_MAP, -1.0, 1.0)}[mode]
    difference, end = plots.change(image, incomplete, view, limits)
    changed = (plots.CHANGE_MAP, 0.0, end) if mode == "composite" else (plots.SIGNED_MAP, -end, end)
    unit = {"composite": "mean of the channels, stretched", "band": "reflectance", "index": "index"}[mode]
    pictures = {
        "complete": (f"{view} · {' '.join(names)}", plots.picture(image, view, limits, {}), own),
        "incomplete": (plots.lost_channels(view, hidden), plots.picture(incomplete, view, limits, hidden), own),
        "change": (unit, plots.coloured(difference, *changed), changed),
    }
    found = []
    for name, (note, picture, colours) in pictures.items():
        scale = None
        if colours:
            png = _png(plots.coloured(np.linspace(0, 1, 256)[None], colours[0], 0, 1))
            scale = {"png": png, "ends": [f"{each:.2g}" for each in colours[1:]]}
        found.append({"name": name, "note": note, "png": _png(picture), "scale": scale})
    return found


def _histograms(image: np.ndarray, hidden: Mapping[str, np.ndarray], ends: tuple[float, float]) -> dict[str, Any]:
    """Pixels in 48 steps of reflectance, of each band all and those still visible, as parts of its fullest step."""
    step, rows = max(1, max(image.shape) // 128), []
    for name, band in zip(bands.NAMES, image, strict=True):
        lost = hidden.get(name, np.zeros(band.shape, bool))
        thinned = band[::step, ::step], np.where(lost, np.nan, band)[::step, ::step]
        every, visible = (np.histogram(values, 48, ends)[0] for values in thinned)
        rows.append([(counts / every.max(initial=1)).round(3).tolist() for counts in (every, visible)])
    return {"ends": ends, "rows": rows}


def _png(picture: np.ndarray) -> bytes:
    Image.fromarray(picture).save(file := io.BytesIO(), "png", compress_level=1)  # it travels to the browser only
    return file.getvalue()
