"""Controls and state always say the same, and one change of either draws one picture."""

from __future__ import annotations

import io
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor, nn

from bandmask import bands, shapes
from bandmask.visualizer import panels, pictures
from bandmask.visualizer.bandview import State
from bandmask.visualizer.controls import effect_text, make_controls, mask_sets
from bandmask.visualizer.effects import Effect, Reading
from bandmask.visualizer.widget import BandMaskViewer, to_png

SIZE = 24


def images(count: int = 3) -> list[np.ndarray]:
    draw = np.random.default_rng(0)
    return [draw.uniform(0.02, 0.5, (13, SIZE, SIZE)).astype(np.float32) for _ in range(count)]


@pytest.fixture
def widget() -> BandMaskViewer:
    return BandMaskViewer(images())


def press(widget: BandMaskViewer, name: str) -> None:
    widget.controls[name].click()


def drawn(widget: BandMaskViewer) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(widget.picture.png)))


# --- toggles and buttons


def test_there_is_a_toggle_for_each_band_with_its_label(widget: BandMaskViewer) -> None:
    toggles = [widget.controls[name] for name in bands.NAMES]
    assert [toggle.description for toggle in toggles] == [band.label for band in bands.BANDS]
    assert widget.controls["B08"].description == "B08 · nir · 842 nm"
    assert all(toggle.value for toggle in toggles)


def test_a_toggle_hides_its_band_and_shows_it_again(widget: BandMaskViewer) -> None:
    before = widget.picture.png
    widget.controls["B04"].value = False
    assert widget.state.mask == ("B04",)
    assert widget.controls["B04"].style.text_decoration == "line-through"
    assert "12 of 13 bands visible" in widget.controls["count"].value
    assert "12 of 13 bands visible · hidden: B04" in widget.picture.alt
    assert widget.picture.png != before
    widget.controls["B04"].value = True
    assert widget.state.mask == ()
    assert widget.picture.png == before


@pytest.mark.parametrize("name", bands.GROUPS)
def test_a_group_button_hides_its_bands_beside_the_others_and_shows_them_again(
    name: str, widget: BandMaskViewer
) -> None:
    widget.controls["B8A"].value = False
    press(widget, name)
    assert set(widget.state.mask) == {"B8A", *bands.GROUPS[name]}
    press(widget, name)
    assert set(widget.state.mask) == {"B8A"} - set(bands.GROUPS[name])


@pytest.mark.parametrize("mask", [mask for mask in bands.THESIS_MASKS if mask != "none"])
def test_a_thesis_button_hides_its_mask_set_and_nothing_else(mask: str, widget: BandMaskViewer) -> None:
    widget.controls["B01"].value = False
    press(widget, f"thesis {mask}")
    assert widget.state.mask == bands.resolve_mask(mask)
    assert [name for name in bands.NAMES if not widget.controls[name].value] == list(widget.state.mask)


def test_groups_are_the_13_bands_each_once() -> None:
    assert sorted(name for group in bands.GROUPS.values() for name in group) == sorted(bands.NAMES)
    assert len(mask_sets()) == len(bands.GROUPS) + len(bands.THESIS_MASKS) - 1


def test_resample_is_another_draw_and_reset_is_what_was_there_at_first() -> None:
    first = State(mask=("B04",), ratio=0.5, image_row=1)
    widget = BandMaskViewer(images(), first)
    before = widget.picture.png
    press(widget, "resample")
    assert widget.state == replace(first, seed=1)
    assert widget.picture.png != before
    widget.controls["shape"].value = "cloud"
    press(widget, "SWIR")
    press(widget, "reset")
    assert widget.state == first
    assert widget.picture.png == before


# --- the state and the controls


def test_the_sliders_wait_for_their_release() -> None:
    controls = make_controls(1)
    assert not controls["ratio"].continuous_update
    assert not controls["stretch"].continuous_update


@pytest.mark.parametrize(
    ("control", "value", "changed"),
    [
        ("ratio", 0.3, {"ratio": 0.3}),
        ("shape", "stripe", {"shape": "stripe"}),
        ("value", "band_mean", {"value": "band_mean"}),
        ("value", " -1 ", {"value": -1.0}),
        ("seed", 7, {"seed": 7}),
        ("image_row", 2, {"image_row": 2}),
        ("stretch", (5.0, 90.0), {"stretch": (5.0, 90.0)}),
        ("view", "swir", {"view": "swir"}),
        ("mode", "index", {"view": "ndvi"}),
        ("mode", "band", {"view": "B01"}),
        ("row", 3, {"pixel": (3, SIZE // 2)}),
        ("column", 4, {"pixel": (SIZE // 2, 4)}),
    ],
)
def test_each_control_changes_its_part_of_the_state(control: str, value: object, changed: dict) -> None:
    first = State(mask=("B04", "B03"), ratio=0.5)
    widget = BandMaskViewer(images(), first)
    widget.controls[control].value = value
    assert widget.state == replace(first, **changed)


states = st.builds(
    State,
    image_row=st.integers(0, 2),
    mask=st.sets(st.sampled_from(bands.NAMES)).map(bands.parse_bands),
    ratio=st.integers(0, 100).map(lambda percent: percent / 100),
    value=st.sampled_from(["dataset_mean", "band_mean", -1.0, 0.25]),
    shape=st.sampled_from(shapes.SHAPES),
    seed=st.integers(-5, 2**40),
    view=st.sampled_from([name for names in pictures.VIEWS.values() for name in names]),
    stretch=st.sampled_from([(2.0, 98.0), (0.0, 100.0), (12.5, 50.0)]),
    pixel=st.none() | st.tuples(st.integers(0, SIZE - 1), st.integers(0, SIZE - 1)),
)
shared = BandMaskViewer(images())


@settings(max_examples=8)
@given(states)
def test_a_state_sets_every_control_and_round_trips_through_the_text(state: State) -> None:
    """From any state to any other; what the controls show, and the text, is the state that was set."""
    shared.state = state
    controls = shared.controls
    assert tuple(name for name in bands.NAMES if not controls[name].value) == state.mask
    assert (controls["row"].value, controls["column"].value) == (state.pixel or (SIZE // 2, SIZE // 2))
    assert controls["mode"].value == pictures.mode_of(state.view)
    for name in ("image_row", "view", "ratio", "shape", "seed", "stretch"):
        assert controls[name].value == getattr(state, name)
    text = controls["params"].value
    shared.state = State(mask=("B10",), view="B10", seed=123)
    controls["params"].value = text
    press(shared, "read")
    assert shared.state == state
    assert controls["said"].value == ""


def test_one_change_draws_one_picture(widget: BandMaskViewer, monkeypatch: pytest.MonkeyPatch) -> None:
    count = []
    draw = panels.draw
    monkeypatch.setattr(panels, "draw", lambda *given: count.append(1) or draw(*given))
    for change in (
        lambda: setattr(widget.controls["B04"], "value", False),
        lambda: press(widget, "thesis B8 B9 B10 B11 B12"),
        lambda: setattr(widget.controls["mode"], "value", "band"),
        lambda: setattr(widget.controls["ratio"], "value", 0.2),
        lambda: setattr(widget.picture, "dark", True),
        lambda: press(widget, "reset"),
    ):
        count.clear()
        change()
        assert len(count) == 1
    press(widget, "reset")
    assert len(count) == 1, "the same state again draws nothing"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("mask_rato: 1", "did you mean &#x27;mask_ratio&#x27;"),
        ("image_row: 3", "there are 3 images, counted from 0"),
        ("mask_ratio: 2.0", "ratio is the share"),
    ],
)
def test_text_that_shows_nothing_is_said_and_changes_nothing(text: str, said: str, widget: BandMaskViewer) -> None:
    before = widget.state
    widget.controls["params"].value = text
    press(widget, "read")
    assert said in widget.controls["said"].value
    assert widget.state == before


def test_an_impossible_value_is_said_and_changes_nothing(widget: BandMaskViewer) -> None:
    widget.controls["value"].value = "mean"
    assert "unknown mask value &#x27;mean&#x27;" in widget.controls["said"].value
    assert widget.state == State()
    widget.controls["value"].value = "0"
    assert widget.controls["said"].value == ""


# --- the picture


def test_a_click_and_arrow_keys_move_the_pixel(widget: BandMaskViewer) -> None:
    layout = panels.layout_of(State(), (SIZE, SIZE))
    box = layout.panels[1]
    x, y = box.x(0.01) / panels.WIDTH, 1 - box.y(0.99) / layout.height
    widget._pointed({"type": "click", "x": x, "y": y})
    assert widget.state.pixel == (0, 0)
    for down, right, expected in (
        (1, 0, (1, 0)),
        (0, 10, (1, 10)),
        (-10, 0, (0, 10)),
        (100, 100, (SIZE - 1, SIZE - 1)),
    ):
        widget._pointed({"type": "move", "down": down, "right": right})
        assert widget.state.pixel == expected
    widget._pointed({"type": "click", "x": 0.0, "y": 0.0})
    widget._pointed({"type": "something else"})
    assert widget.state.pixel == (SIZE - 1, SIZE - 1)


def test_the_pictures_theme_is_the_pages_and_no_parameter(widget: BandMaskViewer) -> None:
    assert tuple(drawn(widget)[0, 0]) == (255, 255, 255)
    widget.picture.dark = True
    assert drawn(widget)[0, 0].max() < 50
    press(widget, "reset")
    assert widget.state.theme == "dark"
    assert "dark" not in widget.controls["params"].value


def test_the_picture_is_what_render_draws(widget: BandMaskViewer) -> None:
    widget.controls["B03"].value = False
    means = images()[0].mean((1, 2))
    assert to_png(panels.render(widget.state, images()[0], means)) == widget.picture.png


def test_a_pack_shows_its_images_in_reflectance_with_their_classes(sample_pack) -> None:
    widget = BandMaskViewer(sample_pack, State(image_row=40))
    np.testing.assert_allclose(widget.image(), np.asarray(sample_pack.images[40]) / 10_000, rtol=1e-6)
    assert widget.controls["class_"].value == sample_pack.classes[sample_pack.labels[40]]
    assert widget.controls["image_row"].max == len(sample_pack.images) - 1


def test_an_experiment_brings_its_data_and_says_how_to_get_an_encoder(sample_pack) -> None:
    widget = BandMaskViewer.of_experiment("sample", State(mask=("B04",)))
    assert widget.state == State("sample", mask=("B04",))
    assert "make demo" in widget.controls["effect"].value
    with pytest.raises(FileNotFoundError, match=r"no parameter file .*nowhere.yaml; beside it: .*sample.yaml"):
        BandMaskViewer.of_experiment("nowhere")


# --- encoders


def test_a_flip_is_warned_of_in_words() -> None:
    readings = [Reading("pre-trained", 0.4, "town", 0.8, True), Reading("fine-tuned", 0.95, "<forest>", 0.7, False)]
    text = effect_text(Reading("complete", 1.0, "<forest>", 0.9), readings, "a note")
    assert text.count("⚠ the prediction flips") == 1
    assert text.index("pre-trained") < text.index("⚠") < text.index("fine-tuned")
    assert "0.400" in text
    assert "town (80%)" in text
    assert "&lt;forest&gt; (70%)" in text
    assert "a note" in text
    assert "no head" in effect_text(Reading("complete", 1.0), [], "")


def test_encoders_judge_what_is_shown() -> None:
    class Means(nn.Module):
        def forward(self, batch: Tensor) -> Tensor:
            return batch.mean((2, 3))

    widget = BandMaskViewer(images(), effect=Effect(Means(), {("B04",): Means()}, image_size=SIZE))
    assert "1.000" in widget.controls["effect"].value
    widget.controls["value"].value = "-1"
    widget.controls["B04"].value = False
    said = widget.controls["effect"].value
    assert "fine-tuned encoder" in said
    assert "1.000" not in said
    widget.controls["B05"].value = False
    assert "No encoder was fine-tuned for exactly these bands; there are for: B04" in widget.controls["effect"].value


def test_the_widget_comes_from_the_viewer_and_costs_nothing_to_those_who_do_not_draw() -> None:
    code = "import sys, bandmask.visualizer.bandview"
    code += "; print('ipywidgets' in sys.modules, 'matplotlib.pyplot' in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.split() == ["False", "False"]
    from bandmask.visualizer import viewer

    assert viewer.BandMaskViewer is BandMaskViewer
    assert viewer.render is panels.render
