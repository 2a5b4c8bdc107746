"""The band-mask visualizer as a widget: controls hold a `State`, and every change of it draws one picture.

What is drawn is `panels.render`, what is counted and said is `bandview` and `effects`; here are only controls.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import replace
from html import escape
from pathlib import Path
from typing import Any

import anywidget
import ipywidgets
import numpy as np
import torch
import traitlets
from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from bandmask import bands, datasets, files, masking, params
from bandmask.packs import DN_PER_REFLECTANCE, Pack
from bandmask.visualizer import controls, panels, pictures
from bandmask.visualizer.bandview import State, describe, mask_image
from bandmask.visualizer.effects import Effect, find_effect


class Picture(anywidget.AnyWidget):
    """A PNG that reports clicks and arrow keys, and whether the page is dark."""

    _esm = Path(__file__).with_name("picture.js")
    png = traitlets.Bytes(b"").tag(sync=True)
    alt = traitlets.Unicode("").tag(sync=True)
    dark = traitlets.Bool(False).tag(sync=True)


class BandMaskViewer(ipywidgets.VBox):
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
        self._images = images.images if isinstance(images, Pack) else images
        self._scale = DN_PER_REFLECTANCE if isinstance(images, Pack) else 1.0
        self._order = images.card["stored_order"] if isinstance(images, Pack) else "satclip"
        self._classes = [images.classes[label] for label in images.labels] if isinstance(images, Pack) else []
        if band_means is None:
            band_means = images.band_means() if isinstance(images, Pack) else np.nanmean(self._images[0], axis=(1, 2))
        self._band_means, self._effect = np.nan_to_num(band_means), effect
        self._state = self._first = state or State()
        self._known: dict[tuple[Any, ...], Any] = {}  # the image and its limits, while they stay the same
        self._busy = False
        self.picture = Picture()
        self.controls = controls.make_controls(len(self._images))
        self._connect()
        super().__init__([*controls.above(self.controls), self.picture, *controls.below(self.controls)])
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
        encoder, weights = entries.get("encoder", "stand-in"), entries.get("weights", "")
        effect = find_effect(entries["experiment"], pack.classes, encoder, weights)
        return cls(pack, replace(state or State(), dataset=entries["dataset"]), effect=effect)

    @property
    def state(self) -> State:
        """What is shown."""
        return self._state

    @state.setter
    def state(self, state: State) -> None:
        if state != self._state:
            self._state = state
            self._show()

    def change(self, **changes: Any) -> None:
        """Another value of some of the state's fields; an impossible one is said, and nothing else changes."""
        try:
            self.state = replace(self._state, **changes)
        except ValueError as error:
            self._say(str(error))
            self._fill_controls()

    def read(self, text: str) -> None:
        """Show what parameters say, as `State.to_yaml` or a file of `params/` has them."""
        try:
            read = State.from_yaml(text, self._order)
        except ValueError as error:
            self._say(str(error))
            return
        if read.image_row >= len(self._images):
            self._say(f"image_row is {read.image_row}; there are {len(self._images)} images, counted from 0")
            return
        self.state = replace(read, theme=self._state.theme)

    def image(self) -> np.ndarray:
        """The complete image in reflectance, (13, H, W)."""
        row = self._state.image_row
        return self._remember(("image", row), lambda: np.asarray(self._images[row], np.float32) / self._scale)

    def _connect(self) -> None:
        """Controls to fields of the state."""
        for name, band in zip(bands.NAMES, (self.controls[n] for n in bands.NAMES), strict=True):
            band.observe(lambda change, name=name: self._toggle((name,), not change["new"]), "value")
        for name in controls.FIELDS:
            self.controls[name].observe(lambda change, name=name: self._given(name, change["new"]), "value")
        for name, hidden in controls.mask_sets().items():
            whole = name in bands.GROUPS
            act = self._toggle if whole else self._hide
            self.controls[name].on_click(lambda _, hidden=hidden, act=act: act(hidden))
        for name, act in (
            ("resample", lambda _: self.change(seed=self._state.seed + 1)),
            ("reset", lambda _: setattr(self, "state", replace(self._first, theme=self._state.theme))),
            ("copy", lambda _: self.picture.send({"copy": self.controls["params"].value})),
            ("read", lambda _: self.read(self.controls["params"].value)),
        ):
            self.controls[name].on_click(act)
        self.picture.on_msg(lambda _, content, __: self._pointed(content))
        self.picture.observe(lambda change: self.change(theme="dark" if change["new"] else "light"), "dark")

    def _toggle(self, names: tuple[str, ...], hide: bool | None = None) -> None:
        """Hide bands or show them again; of a group whichever it is not yet."""
        if self._busy:
            return
        now = set(self._state.mask)
        hide = not now.issuperset(names) if hide is None else hide
        self._hide(now.union(names) if hide else now.difference(names))

    def _hide(self, names: Any) -> None:
        self.change(mask=bands.parse_bands(names))

    def _given(self, name: str, value: Any) -> None:
        """A value that a person gave a control."""
        if self._busy:
            return
        if name == "mode":
            self.change(view=pictures.VIEWS[value][0])
        elif name in ("row", "column"):
            self.change(pixel=(self.controls["row"].value, self.controls["column"].value))
        elif name == "value":
            try:
                self.change(value=masking.parse_value(value.strip()))
            except ValueError as error:
                self._say(str(error))
        else:
            self.change(**{name: value})

    def _pointed(self, content: dict[str, Any]) -> None:
        """A click or an arrow key on the picture."""
        height, width = self.image().shape[1:]
        if content.get("type") == "click":
            found = panels.pixel_at(self._state, (height, width), content["x"], content["y"])
        elif content.get("type") == "move":
            row, column = self._state.pixel or (height // 2, width // 2)
            row, column = row + content["down"], column + content["right"]
            found = min(max(row, 0), height - 1), min(max(column, 0), width - 1)
        else:
            return
        if found:
            self.change(pixel=found)

    def _show(self) -> None:
        """Draw, and bring every control and text up to date."""
        image = self.image()
        stretch = ("limits", self._state.image_row, *self._state.stretch)
        limits = self._remember(stretch, lambda: pictures.stretch_limits(image, *self._state.stretch))
        masked = mask_image(self._state, image, self._band_means)
        figure = panels.draw(self._state, masked, limits)
        self._fill_controls()
        said = describe(self._state, masked)
        self.controls["count"].value = f"<b>{escape(said.split(' · ')[0])}</b>"
        with self.picture.hold_sync():
            self.picture.alt = f"{self._state.view}, complete, incomplete and their difference: {said}"
            self.picture.png = to_png(figure)
        self._say("")
        self._judge(image)

    def _fill_controls(self) -> None:
        row, size = self._state.image_row, self.image().shape[1:]
        self._busy = True  # what is set here is no wish of a person's
        try:
            controls.fill(self.controls, self._state, (size[0], size[1]), self._classes[row] if self._classes else "")
        finally:
            self._busy = False

    def _judge(self, image: np.ndarray) -> None:
        """Ask the encoders, if there are any."""
        if self._effect is None:
            self.controls["effect"].value = "No encoder is loaded: <code>make demo</code> makes the sample's."
            return
        spec, note = self._state.spec, ""
        fill = masking.fill_values(self._state.value, torch.as_tensor(self._band_means))
        complete, readings = self._effect.of(image, spec, self._state.image_row, fill)
        if spec.bands and len(readings) == 1:
            known = "; ".join(" ".join(names) for names in self._effect.fine_tuned) or "none"
            note = f"No encoder was fine-tuned for exactly these bands; there are for: {known}"
        self.controls["effect"].value = controls.effect_text(complete, readings, note)

    def _say(self, text: str) -> None:
        self.controls["said"].value = f"<span role='alert'>⚠ {escape(text)}</span>" if text else ""

    def _remember(self, key: tuple[Any, ...], make: Callable[[], Any]) -> Any:
        """The last value of its kind, if it is still the one wanted."""
        if key not in self._known:
            self._known = {k: v for k, v in self._known.items() if k[0] != key[0]} | {key: make()}
        return self._known[key]


def to_png(figure: Figure) -> bytes:
    """A figure as PNG, made fast rather than small: it travels no further than the browser."""
    canvas, file = FigureCanvasAgg(figure), io.BytesIO()
    with rc_context({"text.hinting": "no_hinting"}):  # letters take most of the time, and hinting half of theirs
        canvas.draw()
    Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3]).save(file, "png", compress_level=1)
    return file.getvalue()
