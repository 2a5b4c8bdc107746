"""State and page of the visualizer always say the same; what methods say is what training would give."""

from __future__ import annotations

import base64
import io
import json
import re
import subprocess
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from bandmask import any_band, bands, encoders, evaluation, files, fills, masks, params, plots, viewer
from bandmask.masks import MaskSpec
from bandmask.viewer import BandMaskViewer, State, mask_image

SIZE = 24
MEANS = np.linspace(0.1, 0.4, 13)
VIEWS = [name for names in plots.VIEWS.values() for name in names]


def image(size: tuple[int, int] = (SIZE, SIZE), seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(0.02, 0.5, (13, *size)).astype(np.float32)


@pytest.fixture
def widget() -> BandMaskViewer:
    return BandMaskViewer([image(seed=seed) for seed in range(3)])


def wish(widget: BandMaskViewer, **changes: Any) -> str:
    """What the page sends for changed parameters, and what it then says."""
    widget.receive({"params": json.dumps({**widget.shown["params"], **changes})})
    return widget.shown["said"]


def pixels(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(int)


specs = st.builds(
    MaskSpec,
    st.sets(st.sampled_from(bands.NAMES)).map(bands.parse_bands),
    st.integers(1, 100).map(lambda percent: percent / 100),
    st.sampled_from(masks.CONSTANTS) | st.floats(-10, 10),
    shape=st.sampled_from(masks.SHAPES),
    seed=st.integers(0, 2**53),
)
states = st.builds(
    State,
    specs,
    dataset=st.sampled_from(["", "sample"]),
    image_row=st.integers(0, 2),
    view=st.sampled_from(VIEWS),
    stretch=st.sampled_from([(2.0, 98.0), (0.0, 100.0), (12.5, 50.0)]),
    pixel=st.none() | st.tuples(st.integers(0, SIZE - 1), st.integers(0, SIZE - 1)),
)


shared = BandMaskViewer([image(seed=seed) for seed in range(3)])


@settings(max_examples=12)
@given(states)
def test_a_state_round_trips_through_the_page_and_through_a_file_of_parameters(state: State) -> None:
    shared.show(state)
    shown, file = shared.shown, files.outputs_root() / "copied.yaml"
    assert shown["pixel"] == (state.pixel or (SIZE // 2, SIZE // 2))
    file.write_text("".join(f"{name}: {json.dumps(value)}\n" for name, value in shown["params"].items()))
    assert State.of_parameters(params.load(file)) == state
    assert set(shown["params"]) <= {*params.declared("02_band_visualization")}
    shared.show(State(MaskSpec(("B10",), seed=123), view="B10"))
    shared.receive({"params": file.read_text()})
    assert (shared.state, shared.shown) == (state, {**shown, "answer": shown["answer"] + 2})


def test_parameters_of_an_experiment_and_labels_by_position_can_be_read() -> None:
    folder = files.project_root() / "params"
    state = State.of_parameters(params.load(folder / "experiments/sample.yaml", folder / "masks/B4_B8_B9_B13.yaml"))
    assert (state.dataset, state.spec.bands, state.spec.ratio) == ("sample", ("B04", "B08", "B8A", "B12"), 0.9)
    entries = {"mask": "B11", "mask_scheme": "position"}
    asked = [State.of_parameters(entries, order).spec.bands for order in ("eurosat", "sen12ms")]
    assert asked == [("B11",), ("B10",)]


WRONG = "mask_rato: 0.5|mask_ratio: high|mask_ratio: 1.5|mask: B99|mask_shape: circle|view: evi|mask_value: ridge"
WRONG += "|stretch: [9.0, 2.0]|stretch: [2.0]|pixel: [3]|pixel: [24, 0]|image_row: -1|image_row: 99999|- list|a: ["


@pytest.mark.parametrize("text", WRONG.split("|"))
def test_parameters_that_show_nothing_are_refused_by_name_and_change_nothing(text: str, widget: BandMaskViewer) -> None:
    before = widget.shown
    widget.receive({"params": text})
    said = widget.shown["said"]
    assert re.search(text.split(":")[0].removeprefix("mask_").split("_")[0][:4] + "|list|YAML", said)
    assert "99999" not in text or "3 images" in said
    assert widget.state == State()
    assert widget.shown == {**before, "said": said, "answer": before["answer"] + 1}
    assert wish(widget, mask_seed=1) == "", "what was wrong is not said again"


@pytest.mark.slow
def test_the_notebook_runs_with_what_is_copied_and_its_picture_is_a_png(tmp_path: Path) -> None:
    """Bands of one's own, by ESA names, as *copy as params* writes them; a figure's name in words is no picture."""
    import nbformat

    spec = MaskSpec(("B08", "B8A"), 0.4, -1.0, shape="cloud", seed=5)
    copied = State(spec, 3, "ndvi", (1.0, 99.0), (3, 4), "sample").parameters()
    (tmp_path / "copied.yaml").write_text("".join(f"{name}: {json.dumps(value)}\n" for name, value in copied.items()))
    notebook = files.project_root() / "notebooks" / "02_band_visualization.ipynb"
    command = [sys.executable, "-m", "papermill", str(notebook), "out.ipynb", "-f", "copied.yaml"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    cells = nbformat.read(tmp_path / "out.ipynb", 4).cells
    (cell,) = [cell for cell in cells if "plots.change(" in cell.source]
    assert pixels(base64.b64decode(cell.outputs[0].data["image/png"])).std() > 0


@given(st.sampled_from(masks.SHAPES), st.integers(0, 1000), st.sampled_from(["dataset_mean", "band_mean", -1.0]))
def test_the_mask_is_that_of_training_for_this_sample(shape: str, row: int, value: str | float) -> None:
    spec = MaskSpec(("B02", "B11"), 0.5, value, shape=shape, seed=3)
    batch = torch.tensor(np.stack([image() * 2, image()]))
    fill = masks.fill_values(value, torch.tensor(MEANS))
    trained = masks.mask_batch(batch, torch.tensor([row + 1, row]), spec, fill)[1]
    np.testing.assert_array_equal(mask_image(image(), spec, row, MEANS)[0], trained.numpy())


def test_what_was_never_seen_is_hidden_and_can_be_looked_at() -> None:
    torn = image()
    torn[bands.NAMES.index("B10")] = np.nan
    torn[:, 2, 3] = np.nan
    incomplete, hidden = mask_image(torn, MaskSpec(("B02",), 0.5, "band_mean"), 0, MEANS)
    assert set(hidden) == set(bands.NAMES)
    assert hidden["B10"].all()
    assert hidden["B03"].sum() == 1
    np.testing.assert_allclose(incomplete[10], MEANS[10], rtol=1e-6)
    with warnings.catch_warnings(action="ignore", category=RuntimeWarning):  # means of nothing
        pages = [BandMaskViewer([seen]) for seen in (torn, np.full((13, 4, 4), np.nan, np.float32))]
    for page in pages:
        assert [wish(page, view=view) for view in VIEWS] == [""] * len(VIEWS)
        assert page.shown["spectrum"][10][0] is None, "NaN is no JSON"
    with pytest.raises(ValueError, match=r"\(B, 13, H, W\), float, in the order B01, B02"):
        mask_image(np.zeros((12, 8, 8), np.float32), MaskSpec(), 0, MEANS)


def test_the_page_says_what_is_hidden_and_draws_its_spectrum_and_histograms() -> None:
    spec = MaskSpec(("B04", "B08"), 1.0, 0.3)
    shown = BandMaskViewer([image()], State(spec, pixel=(3, 5))).shown
    assert shown["text"] == "11 of 13 bands visible · hidden: B04 100%, B08 100% · pixel"
    assert shown["panels"][1]["note"] == "hidden: B04 (red)"
    complete, incomplete, lost = (list(values) for values in zip(*shown["spectrum"], strict=True))
    np.testing.assert_allclose(complete, image()[:, 3, 5])
    assert [name for name, hidden in zip(bands.NAMES, lost, strict=True) if hidden] == ["B04", "B08"]
    np.testing.assert_allclose(incomplete, np.where(lost, np.float32(0.3), complete))
    rows = dict(zip(bands.NAMES, shown["histograms"]["rows"], strict=True))
    assert rows["B04"][1] == [0.0] * 48
    assert rows["B05"][0] == rows["B05"][1]
    assert max(rows["B05"][0]) == 1


def test_text_and_marks_can_be_read_in_both_themes() -> None:
    """Contrast by WCAG 2.2: 4.5 for text, 3 for marks."""

    def luminance(colour: str) -> float:
        parts = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
        return float(
            np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4) @ [0.2126, 0.7152, 0.0722]
        )

    themes = [
        dict(re.findall(r"--(\w+): (#\w{6})", theme)) for theme in re.findall("--ink:.*", str(BandMaskViewer._css))
    ]
    assert [theme["lost"] for theme in themes] == [plots.HIDDEN_COLOUR] * 2
    for theme in themes:
        for name, least in (("ink", 4.5), ("whole", 3), ("seen", 3), ("lost", 3)):
            low, high = sorted((luminance(theme[name]), luminance(theme["paper"])))
            assert (high + 0.05) / (low + 0.05) > least


@pytest.fixture(scope="module")
def left(outputs: Path, make_pack) -> tuple[Any, Path]:
    """A pack, and what runs leave of an experiment: all that the effect table can show."""
    pack, folder = make_pack(outputs / "effects-pack", n=36, size=16), outputs / "effects"
    model, other = (encoders.create_encoder("test_resnet", seed=seed).eval() for seed in (0, 1))
    card = encoders.Card("tiny", "test_resnet", image_size=16)
    encoders.save_encoder(model, card, folder / "encoder")
    for run, names in (("B8", ("B08",)), ("none", ())):
        encoders.save_encoder(other, replace(card, mask=vars(MaskSpec(names))), folder / run / "encoder-seed3")
    every = any_band.AnyBandEncoder(model, other, fills.Moments.of(pack))
    any_band.save(every, card, masks.AnyMask(), folder / "any-band" / "encoder-seed0")
    view, training = evaluation.View(model, image_size=16), {"seeds": [3], "epochs": 1}
    evaluation.in_service("effects", "classification", view, pack, training)
    return pack, folder


def test_each_method_gets_the_batch_that_training_would_make(left) -> None:
    pack, folder = left
    effect = viewer.find_effect("effects", pack)
    assert effect is not None
    assert set(effect.tuned) == {("B08",)}, "the mask none is no loss"
    spec, fill = MaskSpec(("B08",), 0.5, "band_mean", shape="block", seed=4), torch.tensor(MEANS).float()
    batch, sample = torch.tensor(image((16, 16)))[None], torch.tensor([7])
    gaps = masks.mask_batch(batch, sample, spec, torch.full((13,), torch.nan))
    free = [masks.mask_batch(batch, sample, spec, fills.make_fill(name, pack, spec.bands)) for name in masks.FITTED]
    model, tuned = (encoders.load_encoder(folder / name)[0] for name in ("encoder", "B8/encoder-seed3"))
    with torch.no_grad():
        constant = masks.mask_batch(batch, sample, spec, fill)
        seen = [model(batch), model(constant), *map(model, free), tuned(constant)]
        seen.append(any_band.load(folder / "any-band" / "encoder-seed0")[0](gaps))
        expected = [float(torch.cosine_similarity(each, seen[0])[0]) for each in seen]
    readings = effect.of(image((16, 16)), spec, 7, fill)
    methods = ["complete", "pre-trained", *masks.FITTED, "fine-tuned", "any-band"]
    assert [r["method"] for r in readings] == methods
    np.testing.assert_allclose([r["similarity"] for r in readings], expected, atol=1e-5)
    assert len(effect.of(image(), replace(spec, bands=("B02",)), 7, fill)) == 7, "of other bands, not asked"
    assert len(effect.of(image(), MaskSpec(), 7, fill)) == 1
    every = MaskSpec(bands.NAMES, 1.0)
    assert [r["method"] for r in effect.of(image(), every, 7, fill)] == ["complete", "pre-trained"]


def test_old_figures_never_stand_beside_a_new_picture(left) -> None:
    pack, folder = left
    assert viewer.find_effect("never-made", pack) is None
    widget = BandMaskViewer(pack, effect=lambda: viewer.find_effect("effects", pack))
    wish(widget, mask="B05")
    widget.receive({"judge": True})
    assert widget.judged["of"] == widget.shown["judged"]
    assert "fine-tuned for exactly these bands; there are for: B08" in widget.judged["note"]
    wish(widget, view="swir", pixel=[1, 1])
    assert widget.judged["of"] == widget.shown["judged"], "methods are asked of a new mask only"
    wish(widget, mask_seed=5)
    assert widget.judged["of"] != widget.shown["judged"], "the page says `computing …`"
    (folder / "any-band" / "encoder-seed0" / "moments.npz").write_bytes(b"damaged")
    viewer._load.cache_clear()
    widget.receive({"judge": True})
    assert "is damaged" in widget.judged["note"]


def test_the_page_opens_on_real_images_and_answers_a_click_within_150_ms_of_cpu() -> None:
    """On their classes, not on those of a head of another data set; torch's threads are counted too."""
    widget, spent = BandMaskViewer.of_experiment("mini", State(MaskSpec(("B04", "B08", "B8A", "B12")), 181)), []
    widget.receive({"judge": True})
    said = {reading["method"]: reading["predicted"] for reading in widget.judged["readings"]}
    assert said.pop("pre-trained") == "Industrial", "a class that flips"
    assert said == dict.fromkeys(["complete", *masks.FITTED, "any-band"], "River")
    for name in bands.NAMES[:9]:
        began = time.process_time()
        assert wish(widget, mask=name) == ""
        spent.append(time.process_time() - began)
    assert np.median(spent) < 0.15


def test_an_experiment_brings_its_data_and_says_how_to_get_an_encoder(sample_pack) -> None:
    widget = BandMaskViewer.of_experiment("sample", State(MaskSpec(("B04",)), 40))
    assert widget.state == State(MaskSpec(("B04",)), 40, dataset="sample")
    np.testing.assert_allclose(widget.image(40), np.asarray(sample_pack.images[40]) / 10_000, rtol=1e-6)
    widget.receive({"judge": True})
    assert "make demo" in widget.judged["note"]
    with pytest.raises(FileNotFoundError, match=r"no parameter file .*nowhere.yaml; beside it: .*sample.yaml"):
        BandMaskViewer.of_experiment("nowhere")
