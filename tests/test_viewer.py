"""State, controls and picture of the visualizer always say the same; what encoders say is what training would give."""

from __future__ import annotations

import base64
import io
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor, nn

from bandmask import bands, encoders, evaluation, files, fills, masks, params, plots, viewer
from bandmask.heads import SceneHeads
from bandmask.train import weights_checksum
from bandmask.viewer import BandMaskViewer, Effect, Reading, State, mask_image, render, to_png

SIZE = 24
MEANS = np.linspace(0.1, 0.4, 13)
VIEWS = [name for names in plots.VIEWS.values() for name in names]
CLASSES = ("water", "forest", "town")


def image(size: tuple[int, int] = (SIZE, SIZE), seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(0.02, 0.5, (13, *size)).astype(np.float32)


@pytest.fixture
def widget() -> BandMaskViewer:
    return BandMaskViewer([image(seed=seed) for seed in range(3)])


def press(widget: BandMaskViewer, name: str) -> None:
    widget.controls[name].click()


def pixels(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png))).astype(int)


states = st.builds(
    State,
    dataset=st.sampled_from(["", "sample"]),
    image_row=st.integers(0, 2),
    mask=st.sets(st.sampled_from(bands.NAMES)).map(bands.parse_bands),
    ratio=st.integers(0, 100).map(lambda percent: percent / 100),
    value=st.sampled_from(masks.CONSTANTS) | st.floats(-10, 10),
    shape=st.sampled_from(masks.SHAPES),
    seed=st.integers(0, 2**53),
    view=st.sampled_from(VIEWS),
    stretch=st.sampled_from([(2.0, 98.0), (0.0, 100.0), (12.5, 50.0)]),
    pixel=st.none() | st.tuples(st.integers(0, SIZE - 1), st.integers(0, SIZE - 1)),
)


# --- the state is parameters of the notebooks, and back


@given(states)
def test_what_is_copied_is_parameters_that_load_takes_and_reads_back(state: State) -> None:
    file = files.outputs_root() / "copied.yaml"
    file.write_text(state.to_yaml())
    entries = params.load(file)
    assert State.from_yaml(state.to_yaml()) == State.of_parameters(entries) == state
    assert set(entries) <= {*params.declared("02_band_visualization")}


def test_parameters_of_an_experiment_and_labels_by_position_can_be_read() -> None:
    folder = files.project_root() / "params"
    text = (folder / "experiments" / "sample.yaml").read_text() + (folder / "masks" / "B4_B8_B9_B13.yaml").read_text()
    state = State.from_yaml(text)
    assert (state.dataset, state.mask, state.ratio) == ("sample", ("B04", "B08", "B8A", "B12"), 0.9)
    text = "mask: B11\nmask_scheme: position"
    assert (State.from_yaml(text, "eurosat").mask, State.from_yaml(text, "sen12ms").mask) == (("B11",), ("B10",))


@pytest.mark.parametrize(
    "text",
    [
        *("mask_rato: 0.5", "mask_ratio: high", "mask_ratio: 1.5", "mask: B99", "mask_shape: circle", "view: evi"),
        *(
            "mask_value: ridge",
            "stretch: [9.0, 2.0]",
            "stretch: [2.0]",
            "pixel: [3]",
            "image_row: -1",
            "- list",
            "a: [",
        ),
    ],
)
def test_parameters_that_show_nothing_are_refused_by_name(text: str, widget: BandMaskViewer) -> None:
    with pytest.raises(ValueError, match=text.split(":")[0].removeprefix("mask_").split("_")[0][:4] + "|list|YAML"):
        State.from_yaml(text)
    widget.controls["params"].value = text
    press(widget, "read")
    assert "⚠" in widget.controls["said"].value
    assert widget.state == State()


@pytest.mark.slow
def test_the_notebook_runs_with_what_is_copied_and_its_picture_is_a_png(tmp_path: Path, sample_pack) -> None:
    """Bands of one's own, by ESA names, as *copy as params* writes them; a figure's name in words is no picture."""
    import nbformat

    state = State("sample", 3, ("B08", "B8A"), 0.4, -1.0, "cloud", 5, "ndvi", (1.0, 99.0), (3, 4))
    (tmp_path / "copied.yaml").write_text(state.to_yaml())
    notebook = files.project_root() / "notebooks" / "02_band_visualization.ipynb"
    command = [sys.executable, "-m", "papermill", str(notebook), "out.ipynb", "-f", "copied.yaml"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    cells = nbformat.read(tmp_path / "out.ipynb", 4).cells
    (cell,) = [cell for cell in cells if "viewer.render(state" in cell.source]
    png = base64.b64decode(cell.outputs[0].data["image/png"])
    shown = (np.asarray(sample_pack.images[3]) / 10_000).astype(np.float32)  # as the notebook divides
    assert (pixels(png) == pixels(to_png(render(state, shown, sample_pack.band_means())))).all()


# --- the mask


@given(st.sampled_from(masks.SHAPES), st.integers(0, 1000), st.sampled_from(["dataset_mean", "band_mean", -1.0]))
def test_the_mask_is_that_of_training_for_this_sample(shape: str, row: int, value: str | float) -> None:
    state = State(image_row=row, mask=("B02", "B11"), ratio=0.5, shape=shape, value=value, seed=3)
    masked = mask_image(state, image(), MEANS)
    batch = torch.tensor(np.stack([image() * 2, image()]))
    fill = masks.fill_values(value, torch.tensor(MEANS))
    trained = masks.mask_batch(batch, torch.tensor([row + 1, row]), state.spec, fill)[1]
    np.testing.assert_array_equal(masked.incomplete, trained.numpy())
    np.testing.assert_array_equal(masked.complete, image())


def test_what_was_never_seen_is_hidden_and_reaches_no_encoder() -> None:
    torn = image()
    torn[bands.NAMES.index("B10")] = np.nan
    torn[:, 2, 3] = np.nan
    masked = mask_image(State(mask=("B02",), ratio=0.5, value="band_mean"), torn, MEANS)
    assert set(masked.hidden) == set(bands.NAMES)
    assert masked.hidden["B10"].all()
    assert masked.hidden["B03"].sum() == 1
    np.testing.assert_allclose(masked.incomplete[10], MEANS[10], rtol=1e-6)
    for view in ("true colour", "B10", "ndvi", plots.FIGURE_3_1):
        to_png(render(State(view=view), torn, MEANS))
    to_png(render(State(), np.full((13, 4, 4), np.nan, np.float32), MEANS))


def test_images_and_pixels_that_are_not_there_are_refused() -> None:
    with pytest.raises(ValueError, match=r"an image is \(13, H, W\) in the order B01 B02"):
        mask_image(State(), np.zeros((12, 8, 8), np.float32), MEANS)
    with pytest.raises(ValueError, match=r"pixel \(24, 0\) is not there: 24 rows, 24 columns"):
        render(State(pixel=(24, 0)), image(), MEANS)


# --- the picture


def panel(png: bytes, view: str, size: tuple[int, int], place: int) -> np.ndarray:
    width, high, _ = viewer._panel(view, size)
    left = viewer.LEFTS[place]
    return pixels(png)[viewer.TOP : viewer.TOP + high, left : left + width]


@pytest.mark.parametrize("view", ["true colour", plots.FIGURE_3_1, "B08", "ndvi"])
def test_hiding_bands_leaves_the_complete_panel_as_it_was(view: str) -> None:
    state = State(view=view, ratio=0.5)
    before, after = (
        to_png(render(each, image(), MEANS)) for each in (state, replace(state, mask=plots.bands_of(view)))
    )
    same = [(panel(before, view, (SIZE, SIZE), n) == panel(after, view, (SIZE, SIZE), n)).all() for n in range(3)]
    assert same == [True, False, False]


def test_the_figure_says_what_is_hidden_and_draws_its_spectrum() -> None:
    state = State(mask=("B04", "B08"), ratio=1.0, value=0.3, pixel=(3, 5))
    figure = render(state, image(), MEANS)
    said = [text.get_text() for text in figure.texts]
    assert said[0] == "11 of 13 bands visible · hidden: B04 100%, B08 100% · pixel"
    assert "hidden: B04 (red)" in said
    assert "spectrum of pixel (3, 5)" in said
    assert said.count("−100%") == 2
    lines = {line.get_label(): line.get_xydata() for line in figure.axes[0].lines}
    nm = [band.wavelength_nm for band in bands.BANDS]
    np.testing.assert_allclose(lines["complete"], np.column_stack([nm, image()[:, 3, 5]]))
    np.testing.assert_allclose(lines["hidden: mask value"], [[nm[3], 0.3], [nm[7], 0.3]])
    assert len(lines["visible"]) == 11


@given(
    st.sampled_from(["true colour", plots.FIGURE_3_1, "B08"]),
    st.tuples(st.integers(1, 300), st.integers(1, 300)),
    st.integers(0, 2),
    st.data(),
)
def test_a_click_on_a_pixel_is_that_pixel(view: str, size: tuple[int, int], place: int, data: st.DataObject) -> None:
    row, column = data.draw(st.integers(0, size[0] - 1)), data.draw(st.integers(0, size[1] - 1))
    width, high, rows = viewer._panel(view, size)
    shown = row + size[0] * data.draw(st.integers(0, rows // size[0] - 1))
    x = (viewer.LEFTS[place] + (column + 0.5) * width / size[1]) / viewer.WIDTH
    y = (viewer.TOP + (shown + 0.5) * high / rows) / (high + 440)
    assert viewer.pixel_at(view, size, x, y) == (row, column)
    assert viewer.pixel_at(view, size, 0.001, y) is None


@pytest.mark.parametrize("theme", viewer.THEMES)
def test_text_and_marks_can_be_read_in_both_themes(theme: str) -> None:
    """Contrast by WCAG 2.2: 4.5 for text, 3 for marks."""

    def luminance(colour: str) -> float:
        parts = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
        linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
        return float(linear @ [0.2126, 0.7152, 0.0722])

    background, text, *marks = viewer.THEMES[theme]
    for colour, least in [(text, 4.5), *((mark, 3) for mark in (*marks, plots.HIDDEN_COLOUR))]:
        low, high = sorted((luminance(colour), luminance(background)))
        assert (high + 0.05) / (low + 0.05) > least
    assert (pixels(to_png(render(State(theme=theme), image(), MEANS)))[0, 0] < 60).all() == (theme == "dark")


# --- the controls


def test_toggles_groups_and_mask_sets_hide_what_they_say(widget: BandMaskViewer) -> None:
    before = widget.picture.png
    widget.controls["B8A"].value = False
    assert widget.state.mask == ("B8A",)
    assert widget.controls["B8A"].style.text_decoration == "line-through"
    assert "12 of 13 bands visible · hidden: B8A" in widget.picture.alt
    for name, group in bands.GROUPS.items():
        for expected in ({"B8A", *group}, {"B8A"} - set(group)):
            press(widget, name)
            assert set(widget.state.mask) == expected
        widget.change(mask=("B8A",))
    for mask in bands.THESIS_MASKS[1:]:
        press(widget, f"thesis {mask}")
        assert widget.state.mask == bands.resolve_mask(mask)
    press(widget, "resample")
    assert widget.state.seed == 1
    press(widget, "reset")
    assert (widget.state, widget.picture.png) == (State(), before)


@pytest.mark.parametrize(
    ("control", "value", "changed"),
    [
        ("ratio", 0.3, {"ratio": 0.3}),
        ("shape", "stripe", {"shape": "stripe"}),
        ("value", " -1 ", {"value": -1.0}),
        ("seed", 7, {"seed": 7}),
        ("image_row", 2, {"image_row": 2}),
        ("stretch", (5.0, 90.0), {"stretch": (5.0, 90.0)}),
        ("view", "swir", {"view": "swir"}),
        ("mode", "index", {"view": "ndvi"}),
        ("row", 3, {"pixel": (3, SIZE // 2)}),
    ],
)
def test_each_control_changes_its_part_of_the_state(control: str, value: object, changed: dict) -> None:
    first = State(mask=("B04", "B03"), ratio=0.5)
    widget = BandMaskViewer([image(seed=seed) for seed in range(3)], first)
    widget.controls[control].value = value
    assert widget.state == replace(first, **changed)


shared = BandMaskViewer([image(seed=seed) for seed in range(3)])


@settings(max_examples=8)
@given(states)
def test_a_state_sets_every_control_and_round_trips_through_the_text(state: State) -> None:
    shared.state = state
    controls = shared.controls
    assert tuple(name for name in bands.NAMES if not controls[name].value) == state.mask
    assert (controls["row"].value, controls["column"].value) == (state.pixel or (SIZE // 2, SIZE // 2))
    for name in ("image_row", "view", "ratio", "shape", "seed", "stretch"):
        assert controls[name].value == getattr(state, name)
    text = controls["params"].value
    shared.state = State(mask=("B10",), view="B10", seed=123)
    controls["params"].value = text
    press(shared, "read")
    assert shared.state == state


@pytest.mark.parametrize(
    ("control", "value", "said"),
    [("image_row", 99999, "image 99999 is not there: 3 images"), ("row", 99, "99"), ("value", "mean", "unknown mask")],
)
def test_what_is_not_there_is_said_and_changes_nothing(
    control: str, value: object, said: str, widget: BandMaskViewer
) -> None:
    before = widget.controls[control].value
    widget.controls[control].value = value
    assert said in widget.controls["said"].value
    assert (widget.state, widget.controls[control].value) == (State(), before)
    widget.controls["seed"].value = 1
    assert widget.controls["said"].value == ""


def test_one_change_draws_one_picture(widget: BandMaskViewer, monkeypatch: pytest.MonkeyPatch) -> None:
    count = []
    draw = viewer.render
    monkeypatch.setattr(viewer, "render", lambda *given: count.append(1) or draw(*given))
    for number, act in enumerate(
        (
            lambda: press(widget, "thesis B8 B9 B10 B11 B12"),
            lambda: setattr(widget.controls["mode"], "value", "band"),
            lambda: setattr(widget.picture, "dark", True),
            lambda: press(widget, "reset"),
            lambda: widget._pointed({"type": "move", "down": -100, "right": 1}),
        ),
        1,
    ):
        act()
        assert len(count) == number
    assert widget.state == State(theme="dark", pixel=(0, SIZE // 2 + 1))
    assert "dark" not in widget.controls["params"].value


# --- encoders


class Means(nn.Module):
    """Embeds an image as its band means: what is hidden shows at once."""

    def forward(self, batch: Tensor) -> Tensor:
        return batch.nan_to_num().mean((2, 3))


def moments() -> fills.Moments:
    return fills.Moments.of_spectra(np.random.default_rng(0).uniform(0, 0.5, (500, 13)))


def test_every_encoder_gets_the_batch_that_training_would_make() -> None:
    spec = masks.MaskSpec(("B02", "B08"), 0.5, "band_mean", shape="block", seed=4)
    effect = Effect(Means(), {spec.bands: Means()}, None, (), SIZE, moments(), Means())
    _, readings = effect.of(image(), spec, 7, torch.tensor(MEANS).float())
    batch, sample = torch.tensor(image())[None], torch.tensor([7])
    seen = [masks.mask_batch(batch, sample, spec, fill) for fill in (torch.tensor(MEANS).float(), torch.zeros(13))]
    ridge = masks.mask_batch(batch, sample, spec, fills.make_fill("ridge", moments(), spec.bands))
    expected = [
        float(torch.cosine_similarity(each.mean((2, 3)), batch.mean((2, 3)))[0])
        for each in (seen[0], ridge, seen[0], seen[1])
    ]
    assert [reading.encoder for reading in readings] == [
        "pre-trained",
        "pre-trained, ridge fill",
        "fine-tuned",
        "any-band",
    ]
    np.testing.assert_allclose([reading.similarity for reading in readings], expected, atol=1e-6)
    assert len(effect.of(image(), masks.MaskSpec(("B02",)), 7, torch.zeros(13))[1]) == 3, "of other bands, not asked"


def test_a_flip_is_reported_by_the_encoder_that_flips_and_no_other() -> None:
    """The fine-tuned one here knows what red was; the pre-trained one sees the mask value."""

    class Knows(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return torch.tensor(image())[None].mean((2, 3))

    heads = SceneHeads(13, 3, (0,), hidden=1)
    with torch.no_grad():
        heads.weight1.zero_()[0, 3, 0], heads.bias1[:] = 100.0, -10.0
        heads.weight2.zero_()[0, 0, 1], heads.bias2.zero_()[0, 0, 0] = 100.0, 0.01
    effect = Effect(Means(), {("B04",): Knows()}, heads, CLASSES, SIZE)
    complete, readings = effect.of(image(), masks.MaskSpec(("B04",), 1.0), 0, torch.full((13,), -1.0))
    assert complete.predicted == "forest"
    assert [(r.predicted, r.flipped) for r in readings] == [("water", True), ("forest", False)]
    text = viewer.effect_text(complete, [*readings, Reading("odd", 0.4, "<b>", 0.8)], "a note")
    assert text.count("⚠ the prediction flips") == 1
    assert text.index("⚠") < text.index("fine-tuned")
    assert "&lt;b&gt; (80%)" in text


def test_what_runs_have_left_is_found_and_old_figures_never_stand_beside_a_new_picture(
    outputs: Path, make_pack
) -> None:
    pack = make_pack(outputs / "effects-pack", n=36, size=16)
    folder = outputs / "effects"
    model = encoders.create_encoder("resnet10t").eval()
    card = encoders.Card("tiny", "resnet10t", image_size=16)
    encoders.save_encoder(model, card, folder / "encoder")
    for run, names in (("B8", ("B08",)), ("none", ())):
        tuned = replace(card, mask=vars(masks.MaskSpec(names)))
        encoders.save_encoder(encoders.create_encoder("resnet10t", seed=1), tuned, folder / run / "encoder-seed0")
    heads = SceneHeads(256, len(pack.classes), (3,))
    made = {"seeds": [3], "encoder": weights_checksum(model)}
    evaluation.write_in_service(folder / "in_service" / "classification", heads, made)
    assert viewer.find_effect("never-made", pack) is None
    effect = viewer.find_effect("effects", pack)
    assert effect is not None
    assert set(effect.fine_tuned) == {("B08",)}, "the mask none is no loss"
    assert effect.heads is not None
    assert viewer.heads_in_service(folder, encoders.create_encoder("resnet10t", seed=5)) is None
    widget = BandMaskViewer(pack, effect=effect)
    said = []
    widget.controls["effect"].observe(lambda change: said.append(change["new"]), "value")
    widget.picture.observe(lambda _: said.append("picture"), "png")
    widget.controls["B05"].value = False
    assert said[:2] == ["computing …", "picture"]
    assert "No encoder was fine-tuned for exactly these bands. There are encoders for: B08." in said[2]
    widget.controls["view"].value = "swir"
    assert said[3:] == ["picture"], "the encoders are asked of a new mask only"
    assert pack.classes[pack.labels[0]] in widget.controls["class_"].value


def test_an_experiment_brings_its_data_and_says_how_to_get_an_encoder(sample_pack) -> None:
    widget = BandMaskViewer.of_experiment("sample", State(image_row=40, mask=("B04",)))
    assert widget.state == State("sample", 40, mask=("B04",))
    np.testing.assert_allclose(widget.image(40), np.asarray(sample_pack.images[40]) / 10_000, rtol=1e-6)
    assert "make demo" in widget.controls["effect"].value
    with pytest.raises(FileNotFoundError, match=r"no parameter file .*nowhere.yaml; beside it: .*sample.yaml"):
        BandMaskViewer.of_experiment("nowhere")
