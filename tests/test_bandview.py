"""A state is parameters of the notebooks and back, and the mask it draws is the one that training draws."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bandmask import bands, files, masking, params, shapes
from bandmask.visualizer import pictures
from bandmask.visualizer.bandview import State, describe, lost_channels, mask_image

MEANS = np.linspace(0.1, 0.4, 13)
VIEWS = [name for names in pictures.VIEWS.values() for name in names]

states = st.builds(
    State,
    dataset=st.sampled_from(["", "sample", "eurosat"]),
    image_row=st.integers(0, 10**6),
    mask=st.sets(st.sampled_from(bands.NAMES)).map(bands.parse_bands),
    ratio=st.floats(0, 1),
    value=st.sampled_from(masking.CONSTANTS) | st.floats(-10, 10),
    shape=st.sampled_from(shapes.SHAPES),
    seed=st.integers(-(2**53), 2**53),
    view=st.sampled_from(VIEWS),
    stretch=st.tuples(st.floats(0, 49), st.floats(50, 100)),
    pixel=st.none() | st.tuples(st.integers(0, 511), st.integers(0, 511)),
)


def image(size: tuple[int, int] = (10, 14)) -> np.ndarray:
    return np.random.default_rng(1).uniform(0.02, 0.5, (13, *size)).astype(np.float32)


# --- parameters


@given(states)
def test_every_state_round_trips_through_the_parameters(state: State) -> None:
    assert State.from_yaml(state.to_yaml()) == state


@given(states)
def test_params_load_takes_what_is_copied(state: State) -> None:
    """The path that a person takes: the text into a file, the file to papermill through `params.load`."""
    file = files.outputs_root() / "copied.yaml"
    file.write_text(state.to_yaml())
    entries = params.load(file)
    assert State.of_parameters(entries) == state
    assert set(entries) <= {*params.declared("02_band_visualization")}


@pytest.mark.slow
def test_papermill_runs_with_them(tmp_path: Path) -> None:
    """Parameters as copied reach the notebook's own cells: `params.check` and the state read them there."""
    import nbformat

    notebook = nbformat.read(files.project_root() / "notebooks" / "02_band_visualization.ipynb", 4)
    notebook.cells = [cell for cell in notebook.cells if cell.cell_type == "code"][:3]
    notebook.cells.append(nbformat.v4.new_code_cell("print(state)"))
    nbformat.write(notebook, tmp_path / "02_band_visualization.ipynb")
    state = State("sample", 3, ("B08", "B8A"), 0.4, -1.0, "cloud", 5, "ndvi", (1.0, 99.0), (3, 4))
    (tmp_path / "copied.yaml").write_text(state.to_yaml())
    command = [sys.executable, "-m", "papermill", "02_band_visualization.ipynb", "out.ipynb", "-f", "copied.yaml"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert repr(state) in "".join(nbformat.read(tmp_path / "out.ipynb", 4).cells[-1].outputs[0].text)


def test_parameters_of_an_experiment_and_a_mask_can_be_read() -> None:
    folder = files.project_root() / "params"
    text = (folder / "experiments" / "sample.yaml").read_text() + (folder / "masks" / "B4_B8_B9_B13.yaml").read_text()
    state = State.from_yaml(text)
    assert state.mask == ("B04", "B08", "B8A", "B12")
    assert (state.dataset, state.ratio, state.value) == ("sample", 0.9, "dataset_mean")


def test_labels_by_position_count_in_the_data_sets_own_order() -> None:
    text = "mask: B11\nmask_scheme: position"
    assert State.from_yaml(text, "eurosat").mask == ("B11",)
    assert State.from_yaml(text, "sen12ms").mask == ("B10",)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("mask_rato: 0.5", "unknown parameter 'mask_rato'; did you mean 'mask_ratio'"),
        ("mask_ratio: high", "mask_ratio = 'high' is a str; expected float"),
        ("mask_ratio: 1.5", "ratio is the share of hidden pixels"),
        ("mask: B99", "unknown thesis label 'B99'"),
        ("mask_shape: circle", "unknown mask shape 'circle'; available: pixel"),
        ("mask_value: mean", "unknown mask value 'mean'"),
        ("mask_value: ridge", "pictures are drawn with mask values dataset_mean, band_mean, or a number; 'ridge'"),
        ("view: evi", "unknown view 'evi'; available: composite"),
        ("stretch: [98.0, 2.0]", "two rising percentiles"),
        ("stretch: [2.0]", "two rising percentiles"),
        ("pixel: [3]", "a row and a column, or nothing"),
        ("image_row: -1", "counts images from 0"),
        ("- a list", "parameters are `name: value` lines, this is a list"),
        ("a: [", "this is no YAML"),
    ],
)
def test_parameters_that_show_nothing_say_what_is_possible(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        State.from_yaml(text)


def test_an_unknown_theme_lists_what_exists() -> None:
    with pytest.raises(ValueError, match="unknown theme 'blue'; available: light, dark"):
        State(theme="blue")


# --- the mask


@given(st.sampled_from(shapes.SHAPES), st.integers(0, 1000), st.sampled_from(["dataset_mean", "band_mean", -1.0]))
def test_the_mask_is_that_of_training_for_this_sample(shape: str, row: int, value: str | float) -> None:
    state = State(image_row=row, mask=("B02", "B11"), ratio=0.5, shape=shape, value=value, seed=3)
    masked = mask_image(state, image(), MEANS)
    batch = torch.tensor(np.stack([image() * 2, image()]))
    fill = masking.fill_values(value, torch.tensor(MEANS))
    spec = masking.MaskSpec(("B02", "B11"), 0.5, value, seed=3, shape=shape)
    trained = masking.mask_batch(batch, torch.tensor([row + 1, row]), spec, fill)[1]
    np.testing.assert_array_equal(masked.incomplete, trained.numpy())
    np.testing.assert_array_equal(masked.complete, image())


def test_all_bands_may_be_hidden_because_one_only_looks() -> None:
    masked = mask_image(State(mask=bands.NAMES, ratio=1.0, value=0.0), image(), MEANS)
    assert masked.visible == 0
    assert not masked.incomplete.any()


def test_the_image_given_is_left_as_it_was() -> None:
    given_, before = image(), image()
    mask_image(State(mask=("B02",)), given_, MEANS)
    np.testing.assert_array_equal(given_, before)


def test_what_was_never_seen_is_hidden_in_both_and_reaches_no_encoder() -> None:
    torn = image()
    torn[bands.NAMES.index("B10")] = np.nan
    torn[:, 2, 3] = np.nan
    masked = mask_image(State(mask=("B02",), ratio=0.5, value="band_mean"), torn, MEANS)
    assert set(masked.hidden) == set(masked.missing) == set(bands.NAMES)
    assert masked.missing["B10"].all()
    assert masked.missing["B02"].sum() == 1
    assert masked.hidden["B02"].sum() > 30
    assert np.isfinite(masked.incomplete).all()
    np.testing.assert_allclose(masked.incomplete[10], MEANS[10], rtol=1e-6)


@pytest.mark.parametrize("shape", [(12, 8, 8), (13, 8), (3, 8, 8)])
def test_anything_but_13_bands_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"an image is \(13, H, W\) in the order B01 B02"):
        mask_image(State(), np.zeros(shape, np.float32), MEANS)


# --- what is said


def test_the_count_says_what_the_pixels_say() -> None:
    masked = mask_image(State(mask=("B02", "B03", "B04"), ratio=0.9), image((64, 64)), MEANS)
    shares = ", ".join(f"{name} {layer.mean():.0%}" for name, layer in masked.hidden.items())
    said = describe(State(mask=("B02", "B03", "B04")), masked)
    assert said == f"10 of 13 bands visible · hidden: {shares} · pixel"
    nothing = mask_image(State(mask=("B02",), ratio=0.0), image(), MEANS)
    assert describe(State(), nothing) == "13 of 13 bands visible · nothing hidden"


@pytest.mark.parametrize(
    ("view", "said"),
    [
        ("true colour", "hidden: B04 (red)"),
        ("colour infrared", "hidden: B08 (red), B04 (green)"),
        ("moisture", "nothing hidden here"),
        ("ndvi", "hidden: B08, B04"),
        ("B08", "hidden: B08"),
        ("B11", "nothing hidden here"),
        (pictures.FIGURE_3_1, "hidden: B04, B08"),
    ],
)
def test_lost_channels_are_named_and_no_others(view: str, said: str) -> None:
    hidden = mask_image(State(mask=("B04", "B08")), image(), MEANS).hidden
    assert lost_channels(view, hidden) == said
