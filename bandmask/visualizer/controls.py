"""The visualizer's controls and where they stand; what they do is `widget`'s."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

import ipywidgets
from ipywidgets import HTML, BoundedIntText, Box, Button, Dropdown, Layout, Textarea, ToggleButton, Widget

from bandmask import bands, masking, shapes
from bandmask.visualizer import pictures
from bandmask.visualizer.bandview import State
from bandmask.visualizer.effects import Reading

FIELDS = ("image_row", "mode", "view", "ratio", "shape", "value", "seed", "stretch", "row", "column")
_FLOW = Layout(flex_flow="row wrap", align_items="center")
_NARROW, _WIDE = Layout(width="11em"), Layout(width="26em")


def mask_sets() -> dict[str, tuple[str, ...]]:
    """Bands that one button hides, by its label: groups of the spectrum, then the thesis' mask sets."""
    thesis = {f"thesis {mask}": bands.resolve_mask(mask) for mask in bands.THESIS_MASKS if mask != "none"}
    return {**bands.GROUPS, **thesis}


def make_controls(images: int) -> dict[str, Any]:
    """Every control by the name of its field, band or button."""
    controls: dict[str, Any] = {
        band.name: ToggleButton(True, description=band.label, layout=Layout(width="auto")) for band in bands.BANDS
    }
    for name, hidden in mask_sets().items():
        tip = f"hide or show {' '.join(hidden)}" if name in bands.GROUPS else f"hide {' '.join(hidden)}, nothing else"
        controls[name] = _button(name, tip)
    slow = {"continuous_update": False}  # redraw on release
    controls.update(
        image_row=BoundedIntText(0, 0, images - 1, description="image row", layout=_NARROW),
        mode=ipywidgets.ToggleButtons(options=list(pictures.VIEWS), style={"button_width": "auto"}),
        view=Dropdown(options=_view_options("composite"), layout=_WIDE),
        ratio=ipywidgets.FloatSlider(0.9, min=0, max=1, step=0.01, description="ratio", layout=_WIDE, **slow),
        shape=Dropdown(options=shapes.SHAPES, description="shape", layout=Layout(width="14em")),
        value=ipywidgets.Combobox(
            options=[*masking.CONSTANTS, "0", "-1"], description="value", layout=Layout(width="18em"), **slow
        ),
        seed=BoundedIntText(0, -(2**53), 2**53, description="seed", layout=_NARROW),
        stretch=ipywidgets.FloatRangeSlider(
            value=(2, 98), min=0, max=100, step=0.5, description="stretch %", layout=_WIDE, **slow
        ),
        row=BoundedIntText(description="pixel row", layout=_NARROW),
        column=BoundedIntText(description="column", layout=_NARROW),
        resample=_button("resample", "the next seed: another draw of the mask"),
        reset=_button("reset", "what was shown at first"),
        copy=_button("copy as params", "parameters of the notebooks, for papermill -f"),
        read=_button("read params", "show what the parameters in the text say"),
        params=Textarea(rows=12, layout=Layout(width="40em", height="auto")),
        count=HTML(),
        class_=HTML(),
        effect=HTML(),
        said=HTML(),
    )
    return controls


def above(controls: Mapping[str, Widget]) -> list[Widget]:
    """Rows of controls that stand above the picture."""
    rows = [
        ["mode", "view", "image_row", "class_"],
        [*bands.NAMES, "count"],
        [*bands.GROUPS],
        [name for name in mask_sets() if name not in bands.GROUPS],
        ["ratio", "shape", "value", "seed", "resample", "reset"],
        ["stretch", "row", "column", "said"],
    ]
    return [Box([controls[name] for name in row], layout=_FLOW) for row in rows]


def below(controls: Mapping[str, Widget]) -> list[Widget]:
    """Rows that stand below it."""
    return [controls["effect"], Box([controls["copy"], controls["read"]], layout=_FLOW), controls["params"]]


def fill(controls: Mapping[str, Any], state: State, size: tuple[int, int], class_name: str) -> None:
    """Bring every control to what a state says."""
    height, width = size
    row, column = state.pixel or (height // 2, width // 2)
    mode = pictures.mode_of(state.view)
    for name in bands.NAMES:
        controls[name].value = name not in state.mask
        controls[name].style.text_decoration = "line-through" if name in state.mask else "none"
        controls[name].tooltip = f"{name} is {'hidden' if name in state.mask else 'visible'}"
    controls["mode"].value = mode
    if controls["view"].options != _view_options(mode):
        controls["view"].options = _view_options(mode)
    controls["row"].max, controls["column"].max = height - 1, width - 1
    controls["row"].value, controls["column"].value = row, column
    controls["value"].value = str(state.value)
    for name in ("image_row", "view", "ratio", "shape", "seed", "stretch"):
        controls[name].value = getattr(state, name)
    controls["params"].value = state.to_yaml()
    controls["class_"].value = escape(class_name)


def effect_text(complete: Reading, readings: list[Reading], note: str) -> str:
    """What encoders make of the incomplete image, as HTML; a flipped prediction warns in words, not by colour alone."""
    head = "<tr><th></th><th>cosine to the complete image</th><th>predicted class</th><th></th></tr>"
    rows = [f"<tr><th>complete image</th><td>1</td><td>{_prediction(complete)}</td><td></td></tr>"]
    for reading in readings:
        flip = "<b role='alert'>⚠ the prediction flips</b>" if reading.flipped else ""
        rows.append(
            f"<tr><th>incomplete, {escape(reading.encoder)} encoder</th><td>{reading.similarity:.3f}</td>"
            f"<td>{_prediction(reading)}</td><td>{flip}</td></tr>"
        )
    style = "<style>.bandmask-effect :is(th, td) {padding: 0 1em 0 0; text-align: left}</style>"
    return f"{style}<table class='bandmask-effect'>{head}{''.join(rows)}</table>{escape(note)}"


def _prediction(reading: Reading) -> str:
    return f"{escape(reading.predicted)} ({reading.probability:.0%})" if reading.predicted else "no head"


def _view_options(mode: str) -> tuple[tuple[str, str], ...]:
    """Labels and values of what a mode can show."""
    if mode == "band":
        return tuple((band.label, band.name) for band in bands.BANDS)
    if mode == "index":
        return tuple((f"{name.upper()} · {' and '.join(made_of)}", name) for name, made_of in bands.INDICES.items())
    return tuple(
        (f"{name} · {' '.join(dict.fromkeys(pictures.bands_of(name)))}", name) for name in pictures.VIEWS[mode]
    )


def _button(label: str, tooltip: str) -> Button:
    return Button(description=label, tooltip=tooltip, layout=Layout(width="auto"))
