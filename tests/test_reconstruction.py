"""Reconstruction: begins as ridge imputation, learns what ridge can't, reads nothing hidden; its errors are numpy's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from models import run_script, same_weights, tiny_encoder
from torch import nn

from bandmask import bands
from bandmask.draws import AnyMask
from bandmask.fills import RidgeLocalFill, all_bands
from bandmask.imputation import RidgeFill
from bandmask.masking import MaskSpec, hidden_pixels, hide
from bandmask.moments import Moments
from bandmask.packs import Pack
from bandmask.readers.packing import write_pack
from bandmask.reconstruction.errors import REFERENCE, error_table, evaluate, free_methods, image_errors
from bandmask.reconstruction.heads import Reconstruction, band_sd
from bandmask.reconstruction.panels import difference, plot_reconstruction
from bandmask.reconstruction.training import train_reconstruction
from bandmask.training import fill_checksum
from bandmask.visualizer import pictures

B04, B08, B10 = bands.channel_indices(["B04", "B08", "B10"])


def curved_pack(path: Path, *, count: int = 48, size: int = 16) -> Pack:
    """B08 is a parabola of B04, around its mean: uncorrelated, so ridge knows nothing of it; the others are noise."""
    draw = np.random.default_rng(5)
    images = draw.normal(2000, 200, (count, 13, size, size))
    images[:, B04] = draw.uniform(1000, 3000, (count, size, size))
    images[:, B08] = 1500 + 2000 * ((images[:, B04] - 2000) / 1000) ** 2
    images[:, B10] = draw.integers(5, 20, (count, size, size))
    index = pd.DataFrame({"label": 0, "split": ["train"] * (count - 16) + ["val"] * 8 + ["test"] * 8})
    details = {"classes": ["a"], "source": "generated for a test", "source_checksum": f"curved-{count}-{size}"}
    return write_pack(path, images.clip(0, 60_000).astype(np.uint16), index, name="curved", **details)


@pytest.fixture(scope="module")
def curved(tmp_path_factory: pytest.TempPathFactory) -> Pack:
    return curved_pack(tmp_path_factory.mktemp("curved") / "pack")


@pytest.fixture(scope="module")
def moments(sample_pack: Pack) -> Moments:
    return Moments.of(sample_pack, pixels=20_000)


@pytest.fixture(scope="module")
def trained(curved: Pack) -> tuple[Reconstruction, pd.DataFrame]:
    mask = MaskSpec(("B08",), ratio=1.0)
    options = {"seeds": (0, 1), "epochs": 20, "lr": 1e-2, "batch_size": 8, "progress": False}
    return train_reconstruction(None, curved, mask, Moments.of(curved), **options)


def reflectance(pack: Pack, rows: Sequence[int] | np.ndarray) -> torch.Tensor:
    return torch.tensor(pack.images[np.asarray(rows)].astype(np.float32)) / 10_000


def shaken(made: Reconstruction) -> Reconstruction:
    """With a last layer that is no longer zero, as after training."""
    for head in made.heads.heads:
        nn.init.normal_(head.last.weight, std=0.1)
    return made


@pytest.mark.parametrize("encoder", [None, "tiny"])
def test_untrained_it_is_ridge_imputation_to_the_last_bit(sample_pack: Pack, moments: Moments, encoder) -> None:
    images, samples = reflectance(sample_pack, range(4)), torch.arange(4)
    made = Reconstruction.of(encoder and tiny_encoder(), moments, seeds=(0, 1))
    for mask in (MaskSpec(("B02", "B8A", "B12")), MaskSpec(("B08",), ratio=1.0), AnyMask()):
        hidden = hidden_pixels(mask, samples, (64, 64))
        expected = hide(images, hidden, mask, RidgeLocalFill(moments, mask.bands))
        assert hidden.any()
        for head, fill in enumerate(made.fills(mask)):
            assert torch.equal(hide(images, hidden, mask, fill), expected)
            found = made(images, all_bands(hidden, mask.channels))[head]
            assert torch.allclose(found, expected, atol=1e-6)
            assert torch.equal(found, made.filled(images, all_bands(hidden, mask.channels)))


def test_what_hidden_pixels_held_does_not_reach_the_prediction(sample_pack: Pack, moments: Moments) -> None:
    images = reflectance(sample_pack, range(3))
    made = shaken(Reconstruction.of(tiny_encoder(), moments, seeds=(0,)))
    hidden = AnyMask(fewest=4).hidden(torch.arange(3), (64, 64))
    found = made(images, hidden)
    assert not torch.equal(found[0], made.filled(images, hidden))
    for value in (0.0, 7.0, torch.nan, torch.inf):
        assert torch.equal(made(images.masked_fill(hidden, value), hidden), found)
    assert torch.equal(found[0][~hidden], images[~hidden])  # visible pixels stay as they are
    spoilt = torch.where(hidden, images, images + 0.1)
    assert not torch.equal(made(spoilt, hidden)[0][hidden], found[0][hidden])


def test_an_image_does_not_depend_on_its_company(sample_pack: Pack, moments: Moments) -> None:
    images, mask = reflectance(sample_pack, range(5)), AnyMask(fewest=3)
    made = shaken(Reconstruction.of(tiny_encoder(), moments, seeds=(0,)))
    hidden = mask.hidden(torch.arange(5), (64, 64))
    together = made(images, hidden)[0]
    alone = torch.cat([made(images[[row]], hidden[[row]])[0] for row in range(5)])
    assert torch.allclose(together, alone, atol=1e-5)


def test_the_encoders_maps_matter_once_trained(sample_pack: Pack, moments: Moments) -> None:
    images, hidden = reflectance(sample_pack, range(2)), AnyMask(fewest=3).hidden(torch.arange(2), (64, 64))
    first, second = (shaken_alike(tiny_encoder(seed=seed), moments)(images, hidden) for seed in (0, 1))
    assert not torch.equal(first, second)


def shaken_alike(encoder: nn.Module, moments: Moments) -> Reconstruction:
    torch.manual_seed(0)
    return shaken(Reconstruction.of(encoder, moments, seeds=(0,)))


def test_it_learns_a_parabola_that_ridge_cannot(trained: tuple[Reconstruction, pd.DataFrame], curved: Pack) -> None:
    made, history = trained
    last = history[history["epoch"] == 20]
    assert set(last["head_seed"]) == {0, 1}
    assert (last["val_error"] < 0.4 * last["val_ridge_error"]).all(), last
    first = history[history["epoch"] == 0]
    assert np.allclose(first["val_error"], first["val_ridge_error"])
    table = evaluate(
        curved,
        {"B08": MaskSpec(("B08",), ratio=1.0)},
        {**free_methods(made.ridge.moments), "head": made.fills},
        band_sd(made.ridge.moments),
        draws=200,
    ).set_index("method")
    assert table.loc["head", "rmse"] < 0.4 * table.loc["ridge", "rmse"]
    assert table.loc["head", "difference_high"] < 0
    assert table.loc["head", "runs"] == 2
    assert table.loc["ridge", "rmse_sd"] == pytest.approx(1, abs=0.1)  # ridge knows no more than the mean


def test_heads_trained_side_by_side_are_those_trained_alone(curved: Pack) -> None:
    options = {"epochs": 1, "batch_size": 16, "width": 8, "progress": False}
    known, mask = Moments.of(curved), AnyMask()
    both, _ = train_reconstruction(None, curved, mask, known, seeds=(3, 4), **options)
    alone, _ = train_reconstruction(None, curved, mask, known, seeds=(4,), **options)
    for ours, theirs in zip(both.heads.heads[1].parameters(), alone.heads.heads[0].parameters(), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-6)


def test_training_leaves_the_encoder_as_it_was(curved: Pack) -> None:
    encoder = tiny_encoder()
    options = {"seeds": (0,), "epochs": 1, "width": 8, "progress": False, "image_size": 32}
    made, _ = train_reconstruction(encoder, curved, AnyMask(), Moments.of(curved), **options)
    assert same_weights(encoder, tiny_encoder())
    assert not encoder.training
    assert made.heads.heads[0].last.weight.abs().max() > 0


KILLED = """
import os, sys
from pathlib import Path
from test_reconstruction import curved_pack, resumable
import bandmask.training as training

kept = training._save

def dying(path, model, optimizer, history, fingerprint):
    kept(path, model, optimizer, history, fingerprint)
    if len(history) == 3:
        os._exit(9)  # after epoch 2

training._save = dying
resumable(curved_pack(Path(sys.argv[1]) / "pack"), Path(sys.argv[1]) / "head.pt")
"""


def resumable(pack: Pack, checkpoint: Path) -> tuple[Reconstruction, pd.DataFrame]:
    torch.set_num_threads(1)
    options = {"seeds": (0, 1), "epochs": 4, "width": 8, "batch_size": 16, "progress": False, "checkpoint": checkpoint}
    return train_reconstruction(None, pack, AnyMask(), Moments.of(pack), **options)


def test_killed_and_resumed_it_ends_with_the_figures_of_an_undisturbed_run(curved: Pack, tmp_path: Path) -> None:
    ran = run_script(KILLED, tmp_path)
    assert ran.returncode == 9, ran.stderr
    resumed, again = resumable(curved, tmp_path / "head.pt")
    undisturbed, history = resumable(curved, tmp_path / "other" / "head.pt")
    assert same_weights(resumed.heads, undisturbed.heads)
    pd.testing.assert_frame_equal(again, history)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"mask": MaskSpec()}, "hides nothing"), ({"seeds": ()}, "at least one seed"), ({"taps": ("layer9",)}, "layer9")],
)
def test_what_can_not_be_trained_is_refused(curved: Pack, change: dict, message: str) -> None:
    given = {"mask": AnyMask(), "seeds": (0,), "epochs": 1, **change}
    with pytest.raises(ValueError, match=message):
        train_reconstruction(tiny_encoder(), curved, moments=Moments.of(curved), **given)


def test_a_fill_carries_the_mark_of_its_weights_and_of_its_encoder(moments: Moments) -> None:
    def mark(encoder: nn.Module, head: int, scale: float) -> str:
        made = Reconstruction.of(encoder, moments, seeds=(0, 1), width=8)
        nn.init.constant_(made.heads.heads[0].last.bias, scale)
        return fill_checksum(made.fill(MaskSpec(("B08",)), head))

    settings = [(0, 0, 0.0), (1, 0, 0.0), (0, 1, 0.0), (0, 0, 1.0)]
    assert len({mark(tiny_encoder(seed=seed), head, scale) for seed, head, scale in settings}) == 4
    assert mark(tiny_encoder(), 0, 0.5) == mark(tiny_encoder(), 0, 0.5)


def test_a_band_that_never_changes_does_not_divide_by_zero(moments: Moments) -> None:
    """B10 of L2A products is 0 throughout."""
    flat = moments.covariance.copy()
    flat[B10] = flat[:, B10] = 0
    made = shaken(Reconstruction.of(None, Moments(moments.mean, flat, moments.pixels), seeds=(0,)))
    images = torch.full((1, 13, 8, 8), 0.1)
    assert made(images, torch.rand(1, 13, 8, 8) < 0.5).isfinite().all()


def reference_errors(pack: Pack, spec: MaskSpec, fill, rows: np.ndarray) -> dict[str, np.ndarray]:
    """Errors of hidden pixels, band by band, with numpy in float64, one image at a time."""
    found: dict[str, list[np.ndarray]] = {name: [] for name in spec.bands}
    for row in rows:
        image = reflectance(pack, [row])
        hidden = hidden_pixels(spec, torch.tensor([row]), (64, 64))
        filled = hide(image, hidden, spec, fill)
        for place, name in enumerate(spec.bands):
            channel, where = bands.NAMES.index(name), hidden[0, place].numpy()
            wrong = filled[0, channel].numpy().astype(np.float64) - image[0, channel].numpy().astype(np.float64)
            found[name].append(wrong[where])
    return {name: np.concatenate(parts) for name, parts in found.items()}


def test_figures_are_numpys_on_real_pixels(sample_pack: Pack, moments: Moments) -> None:
    spec, rows = MaskSpec(("B04", "B08", "B10"), ratio=0.5), sample_pack.rows("test")[:9]
    sd = band_sd(moments)
    table = evaluate(sample_pack, {"three": spec}, free_methods(moments), sd, split=rows, draws=50)
    for method, fill in (
        ("ridge", RidgeFill.of(moments, spec.bands)),
        (REFERENCE, RidgeLocalFill(moments, spec.bands)),
    ):
        for name, wrong in reference_errors(sample_pack, spec, fill, rows).items():
            row = table[(table["method"] == method) & (table["band"] == name)].iloc[0]
            assert row["pixels"] == len(wrong)
            assert row["images"] == 9
            assert row["rmse"] == pytest.approx(np.sqrt(np.mean(wrong**2)), rel=1e-5)
            assert row["mae"] == pytest.approx(np.mean(np.abs(wrong)), rel=1e-5)
            assert row["bias"] == pytest.approx(np.mean(wrong), rel=1e-4, abs=1e-8)
            assert row["rmse_sd"] == pytest.approx(row["rmse"] / sd[bands.NAMES.index(name)])


def test_on_real_pixels_the_free_methods_come_in_their_order(sample_pack: Pack, moments: Moments) -> None:
    rows = sample_pack.rows("test")[::8]
    masks = {"pixels": MaskSpec(("B03", "B04", "B08")), "all": AnyMask()}
    table = evaluate(sample_pack, masks, free_methods(moments), band_sd(moments), split=rows, draws=50)
    pixels = table[table["mask"] == "pixels"].pivot(index="band", columns="method", values="rmse")
    assert (pixels[REFERENCE] < 1.01 * pixels["ridge"]).all()  # it may use what is visible of the bands themselves
    assert (pixels[REFERENCE] < 0.9 * pixels["ridge"]).any()
    assert (pixels["ridge"] < pixels["band mean"] / 2).all()
    assert (pixels["band mean"] <= pixels["dataset mean"] + 1e-6).all()
    assert "ridge" not in set(table.loc[table["mask"] == "all", "method"])  # no band is visible everywhere


def made_up_errors(rng: np.random.Generator, images: int = 40, runs: int = 3) -> pd.DataFrame:
    """A head of three runs that is a tenth better than ridge in every image, though images differ tenfold."""
    pixels, level = rng.integers(20, 90, images), rng.uniform(0.01, 0.1, images)
    frames = []
    for method, count, factor in ((REFERENCE, 1, 1.0), ("head", runs, 0.9)):
        for run in range(count):
            wrong = level * factor * (1 + 0.001 * run)
            sums = {"pixels": pixels, "error": wrong * pixels, "absolute": wrong * pixels, "squared": wrong**2 * pixels}
            place = {"mask": "m", "band": "B08", "sample": range(images), "group": range(images)}
            frames.append(pd.DataFrame({**place, "method": method, "run": run, **sums}))
    return pd.concat(frames, ignore_index=True)


def test_the_interval_of_a_difference_is_of_pairs() -> None:
    errors = made_up_errors(np.random.default_rng(0))
    table = error_table(errors, np.ones(13), draws=2000).set_index("method")
    head, ridge = table.loc["head"], table.loc[REFERENCE]
    assert head["low"] < head["rmse"] < head["high"]
    assert head["high"] > ridge["low"]  # of each alone the intervals overlap
    assert head["difference_low"] < head["difference"] < head["difference_high"] < 0
    assert (ridge["difference"], ridge["difference_low"], ridge["difference_high"]) == (0, 0, 0)
    repeated = error_table(errors.sample(frac=1, random_state=1), np.ones(13), draws=2000).set_index("method")
    assert repeated.loc["head", "low"] == pytest.approx(head["low"], rel=1e-9)


def test_the_bootstrap_agrees_with_drawing_images_one_by_one() -> None:
    errors = made_up_errors(np.random.default_rng(1), runs=1)
    table = error_table(errors, np.ones(13), draws=4000).set_index("method")
    ridge = errors[errors["method"] == REFERENCE]
    picks = np.random.default_rng(9).integers(len(ridge), size=(4000, len(ridge)))
    squared, pixels = ridge["squared"].to_numpy(), ridge["pixels"].to_numpy()
    spread = np.sqrt(squared[picks].sum(1) / pixels[picks].sum(1))
    low, high = np.quantile(spread, [0.025, 0.975])
    assert table.loc[REFERENCE, "low"] == pytest.approx(low, rel=0.03)
    assert table.loc[REFERENCE, "high"] == pytest.approx(high, rel=0.03)


def test_groups_are_drawn_whole(sample_pack: Pack, moments: Moments) -> None:
    """Overlapping patches of one block are not independent: the interval must be wider than that of single patches."""
    masks = {"B08": MaskSpec(("B08",), ratio=1.0)}
    methods: dict[str, Callable] = {"ridge": free_methods(moments)["ridge"]}
    errors = image_errors(sample_pack, masks, methods, split="test")
    assert errors["group"].nunique() < errors["sample"].nunique()
    grouped = error_table(errors, np.ones(13), reference="ridge").iloc[0]
    single = error_table(errors.assign(group=errors["sample"]), np.ones(13), reference="ridge").iloc[0]
    assert grouped["rmse"] == pytest.approx(single["rmse"])
    assert grouped["high"] - grouped["low"] > 1.2 * (single["high"] - single["low"])


def test_methods_measured_on_other_pixels_are_not_compared() -> None:
    errors = made_up_errors(np.random.default_rng(0))
    fewer = errors[(errors["method"] == REFERENCE) | (errors["sample"] > 3)]
    other = errors.assign(pixels=errors["pixels"] + (errors["run"] == 2))
    for spoilt in (fewer, other):
        with pytest.raises(ValueError, match="other pixels"):
            error_table(spoilt, np.ones(13))


def panel_inputs(size: int = 24) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    draw = np.random.default_rng(2)
    complete = draw.uniform(0.02, 0.4, (13, size, size)).astype(np.float32)
    hidden = np.zeros(complete.shape, bool)
    hidden[[B04, B08], : size // 2] = True
    return complete, hidden, np.where(hidden, complete + 0.05, complete).astype(np.float32)


def test_the_panel_row_shows_original_masked_reconstructed_and_difference() -> None:
    complete, hidden, found = panel_inputs()
    views = ("colour infrared", "B08", "ndvi")
    figure = plot_reconstruction(complete, hidden, {"ridge": found, "head": complete}, views)
    panels = [axes for axes in figure.axes if axes.images and axes.get_title()]
    assert [axes.get_title().split(",")[0] for axes in panels] == 3 * [
        "original", "masked", "ridge", "minus original", "head", "minus original"
    ]  # fmt: skip
    original, masked, _, off, head, none = (axes.images[0].get_array() for axes in panels[6:12])  # the row of B08
    assert np.array_equal(original, pictures.picture(complete, "B08", pictures.stretch_limits(complete), {}))
    assert (np.asarray(masked)[:12] == np.array([0xD9, 0x5F, 0x8E])).all()  # what is hidden has its own colour
    assert np.array_equal(np.asarray(masked)[12:], np.asarray(original)[12:])
    assert np.array_equal(head, original)
    assert np.allclose(off[:12], 0.05, atol=1e-6)
    assert not np.asarray(off)[12:].any()
    assert not np.asarray(none).any()
    low, high = panels[9].images[0].get_clim()
    assert -low == high == pytest.approx(0.05, rel=1e-3)  # signed and symmetric: no change is the middle colour
    assert "RMS 0.0500" in panels[9].get_title()


def test_a_composites_difference_counts_only_its_hidden_bands() -> None:
    complete, hidden, found = panel_inputs()
    apart = difference(complete, found, hidden, "colour infrared")  # B08, B04, B03: two of three are hidden above
    assert np.allclose(apart[:12], 0.05, atol=1e-6)
    assert not apart[12:].any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"views": ()}, "at least one view"),
        ({"views": ("B13",)}, "unknown view 'B13'"),
        ({"views": (pictures.FIGURE_3_1,)}, "three composites"),
        ({"hidden": np.zeros((2, 4, 4), bool)}, r"hidden has shape \(2, 4, 4\)"),
        ({"hidden": np.zeros((13, 24, 24))}, "boolean"),
    ],
)
def test_what_can_not_be_plotted_is_refused(change: dict, message: str) -> None:
    complete, hidden, found = panel_inputs()
    with pytest.raises(ValueError, match=message):
        plot_reconstruction(**{"complete": complete, "hidden": hidden, "reconstructions": {"a": found}, **change})
