"""What a person looks at: an image, what is hidden from it, and how it is shown, as one value.

The value can be written as parameters of the notebooks and read back from them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import yaml

from bandmask import bands, masking, params
from bandmask.visualizer import pictures

THEMES = ("light", "dark")
# A state's fields by the names that notebooks give them; `theme` belongs to the screen.
PARAMETERS = {
    "dataset": "dataset",
    "image_row": "image_row",
    "mask": "mask",
    "mask_ratio": "ratio",
    "mask_value": "value",
    "mask_shape": "shape",
    "mask_seed": "seed",
    "view": "view",
    "stretch": "stretch",
    "pixel": "pixel",
}


@dataclass(frozen=True)
class State:
    """Everything that decides a picture, besides the pixels.

    Attributes:
        dataset: name of the data set, for the parameters; empty if it has none.
        image_row: row of the image in its pack; also the sample whose mask is drawn.
        mask: ESA names of the hidden bands. All 13 may be: here one only looks.
        ratio: expected share of hidden pixels in them.
        value: what is written over them: a number, or one of `masking.CONSTANTS`.
        shape: what is lost together, one of `shapes.SHAPES`.
        seed: another seed, another draw.
        view: what is shown: a composite, a band or an index, one of `pictures.VIEWS`.
        stretch: percentiles of the complete image that become black and white.
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
        if self.value in masking.FITTED:
            known = ", ".join(masking.CONSTANTS)
            raise ValueError(
                f"pictures are drawn with mask values {known}, or a number; {self.value!r} needs a data set"
            )
        pictures.mode_of(self.view)
        low, high = self.stretch
        if not 0 <= low < high <= 100:
            raise ValueError(f"stretch holds two rising percentiles, from 0 to 100; got {list(self.stretch)}")
        if self.theme not in THEMES:
            raise ValueError(f"unknown theme {self.theme!r}; available: {', '.join(THEMES)}")
        if self.image_row < 0:
            raise ValueError(f"image_row counts images from 0; got {self.image_row}")

    @property
    def spec(self) -> masking.MaskSpec:
        """The mask."""
        return masking.MaskSpec(
            self.mask, self.ratio, self.value, seed=self.seed, shape=self.shape, allow_all_bands=True
        )

    def parameters(self) -> dict[str, Any]:
        """Parameters that notebooks take, with bands by their ESA names."""
        found = {name: getattr(self, field) for name, field in PARAMETERS.items()}
        found["mask"] = " ".join(self.mask) or "none"
        found["mask_value"] = str(self.value)
        found["stretch"] = [float(percentile) for percentile in self.stretch]
        found["pixel"] = list(self.pixel or ())
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
        given: dict[str, Any] = {field: entries[name] for name, field in PARAMETERS.items() if name in entries}
        scheme = entries.get("mask_scheme", "named")
        given["mask"] = bands.resolve_mask(given.get("mask", "none"), scheme, order)
        given["value"] = masking.parse_value(given.get("value", cls.value))
        pixel = tuple(given.get("pixel") or ())
        if len(pixel) not in (0, 2):
            raise ValueError(f"pixel holds a row and a column, or nothing; got {list(pixel)}")
        given["pixel"] = pixel or None
        stretch = tuple(given.get("stretch", cls.stretch))
        if len(stretch) != 2:
            raise ValueError(f"stretch holds two rising percentiles, from 0 to 100; got {list(stretch)}")
        return cls(**{**given, "stretch": stretch})

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
        hidden: band to pixels, (H, W) bool, of the bands that lost some in the incomplete image.
        missing: the same of what already the complete image lacks.
    """

    complete: np.ndarray
    incomplete: np.ndarray
    hidden: dict[str, np.ndarray]
    missing: dict[str, np.ndarray]

    @property
    def visible(self) -> int:
        """Number of bands that lost nothing."""
        return len(bands.NAMES) - len(self.hidden)


def mask_image(state: State, complete: np.ndarray, band_means: np.ndarray) -> Masked:
    """Hide what a state says.

    Args:
        state: which bands, how, and with which draw.
        complete: reflectance, (13, H, W), NaN where nothing was seen.
        band_means: of the training split, (13,), for mask values that are means.

    Raises:
        ValueError: not 13 bands.
    """
    if complete.ndim != 3 or len(complete) != len(bands.NAMES):
        raise ValueError(f"an image is (13, H, W) in the order {' '.join(bands.NAMES)}; got {complete.shape}")
    fill = masking.fill_values(state.value, torch.as_tensor(band_means))
    image = torch.as_tensor(np.ascontiguousarray(complete, np.float32))[None]
    size = (image.shape[-2], image.shape[-1])
    drawn = masking.hidden_pixels(state.spec, torch.tensor([state.image_row]), size)
    incomplete = masking.hide(image, drawn, state.spec, fill)[0].numpy()
    hidden = {name: layer for name, layer in zip(state.mask, drawn[0].numpy(), strict=True) if layer.any()}
    missing: dict[str, np.ndarray] = {}
    if not np.isfinite(complete.sum(dtype=np.float64)):  # one pass over a whole image, instead of 13
        unseen = ~np.isfinite(complete)
        missing = {name: layer for name, layer in zip(bands.NAMES, unseen, strict=True) if layer.any()}
        for name, layer in missing.items():
            hidden[name] = hidden.get(name, layer) | layer
            incomplete[bands.NAMES.index(name)][layer] = float(fill[bands.NAMES.index(name)])
    return Masked(image[0].numpy(), incomplete, hidden, missing)


def describe(state: State, masked: Masked) -> str:
    """In words what a picture shows: `10 of 13 bands visible · hidden: B02 90 %, …`."""
    shares = [f"{name} {masked.hidden[name].mean():.0%}" for name in bands.NAMES if name in masked.hidden]
    counted = f"{masked.visible} of {len(bands.NAMES)} bands visible"
    return f"{counted} · hidden: {', '.join(shares)} · {state.shape}" if shares else f"{counted} · nothing hidden"


def lost_channels(view: str, hidden: Mapping[str, np.ndarray]) -> str:
    """Which parts of a view lost pixels: `hidden: B04 (red), B03 (green)`."""
    used = dict.fromkeys(pictures.bands_of(view))
    lost = [name for name in used if name in hidden]
    if len(used) == 3:
        roles = dict(zip(used, ("red", "green", "blue"), strict=True))
        lost = [f"{name} ({roles[name]})" for name in lost]
    return "hidden: " + ", ".join(lost) if lost else "nothing hidden here"
