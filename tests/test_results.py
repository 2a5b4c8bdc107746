"""Tables say what was measured: tidy rows, scores as the references have them, files that papers can take."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
import sklearn.metrics
from predictions import COMMON, history, pixels_of, predictions_of, rows

from bandmask import results
from bandmask.comparison import by_group
from bandmask.results import (
    COLUMNS,
    METHODS,
    accuracy_table,
    collect,
    export_table,
    percent,
    pixel_classes,
    plot_curves,
    read_table,
    score_predictions,
    tidy,
    to_latex,
    write_table,
)

mpl.use("Agg")
import matplotlib.pyplot as plt

pytestmark = pytest.mark.filterwarnings("error")  # pandas announces its errors a version ahead


# --- tidy rows ------------------------------------------------------------------------------------------------------


def test_tidy_has_the_tables_columns_in_order_and_their_types():
    table = tidy([{"epoch": 0, "value": 1}, {"epoch": 1, "value": 0.5, "method": "ridge"}], **COMMON)
    assert tuple(table.columns) == COLUMNS
    assert table["method"].tolist() == ["fine-tuned", "ridge"]  # what differs wins over what is shared
    assert table["value"].dtype == table["ratio"].dtype == np.float64
    assert table["epoch"].tolist() == [0, 1]
    assert table["encoder_seed"].isna().all()
    assert {str(table[c].dtype) for c in ("encoder_seed", "head_seed", "epoch")} == {"Int64"}


def test_a_mask_value_is_text_whatever_it_was():
    """A column of numbers and names would not go into Parquet."""
    table = tidy([{"value": 1.0, "mask_value": -1}, {"value": 1.0, "mask_value": "band_mean"}])
    assert table["mask_value"].tolist() == ["-1", "band_mean"]


def test_an_unknown_column_is_an_error_that_lists_what_exists():
    with pytest.raises(ValueError, match=r"unknown result column \['accuracy'\]; available: experiment, ") as error:
        tidy([{"accuracy": 1.0}], **COMMON)
    assert all(column in str(error.value) for column in COLUMNS)
    with pytest.raises(ValueError, match="colour"):
        tidy([{"value": 1.0}], colour="blue")


def test_no_measurements_are_an_empty_table_that_joins_others():
    empty = tidy([], **COMMON)
    assert tuple(empty.columns) == COLUMNS
    assert len(empty) == 0
    joined = pd.concat([empty, rows([0.5])], ignore_index=True)
    pd.testing.assert_frame_equal(joined, rows([0.5]), check_dtype=False)


def test_a_table_survives_its_file(tmp_path: Path):
    table = pd.concat([rows([0.1, 0.2]), rows([0.3], encoder_seed=4)], ignore_index=True)
    path = write_table(table, tmp_path / "deep" / "results.parquet")
    pd.testing.assert_frame_equal(pd.read_parquet(path), table)


def test_a_failed_write_keeps_the_old_table(tmp_path: Path):
    path = write_table(rows([0.1]), tmp_path / "results.parquet")
    mixed = pd.DataFrame({"value": [1, "two", object()]})
    with pytest.raises(Exception, match=r"(?i)object|convert"):
        write_table(mixed, path)
    pd.testing.assert_frame_equal(pd.read_parquet(path), rows([0.1]))
    assert [p.name for p in tmp_path.iterdir()] == ["results.parquet"]


def test_collect_takes_finished_runs_and_passes_by_the_others(tmp_path: Path):
    write_table(rows([0.1, 0.2], mask="B8"), tmp_path / "B8" / "results.parquet")
    write_table(rows([0.3], mask="B2"), tmp_path / "B2" / "results.parquet")
    write_table(rows([0.9], mask="B2"), tmp_path / "B2" / "alignment.parquet")
    write_table(rows([0.9]), tmp_path / "results.parquet")  # the collected table of an earlier time
    (tmp_path / "B11").mkdir()  # started, nothing written yet
    (tmp_path / "B2_B8").mkdir()
    (tmp_path / "B2_B8" / ".results.parquet.partial-1").write_bytes(b"PAR1")  # killed while writing
    (tmp_path / "checkpoints").mkdir()
    found = collect(tmp_path)
    assert found[["mask", "value"]].to_numpy().tolist() == [["B2", 0.3], ["B8", 0.1], ["B8", 0.2]]
    assert found.index.tolist() == [0, 1, 2]
    assert collect(tmp_path, "alignment.parquet")["value"].tolist() == [0.9]


@pytest.mark.parametrize("prepare", [lambda folder: None, lambda folder: (folder / "B8").mkdir(parents=True)])
def test_nothing_to_collect_says_what_to_run(prepare: Any, tmp_path: Path):
    folder = tmp_path / "sample"
    prepare(folder)
    with pytest.raises(FileNotFoundError, match="no finished run below") as error:
        collect(folder)
    assert str(folder) in str(error.value)
    assert "04_scene_classification.ipynb" in str(error.value)


def test_results_of_before_schedules_and_shapes_were_kept_had_constant_ones_of_pixels(tmp_path: Path):
    table = rows([0.1, 0.2], schedule="gradual", shape="stripe")
    write_table(table, tmp_path / "B2" / "results.parquet")
    write_table(table.drop(columns="shape"), tmp_path / "B4" / "results.parquet")
    write_table(table.drop(columns=["schedule", "shape"]), tmp_path / "B8" / "results.parquet")
    found = collect(tmp_path)
    assert found["schedule"].tolist() == [*["gradual"] * 4, *["constant"] * 2]
    assert found["shape"].tolist() == [*["stripe"] * 2, *["pixel"] * 4]
    assert tuple(found.columns) == COLUMNS
    kept = write_table(predictions_of(np.ones((1, 5), bool), "ridge"), tmp_path / "predictions.parquet")
    assert "schedule" not in read_table(kept)  # predictions never had one


def test_each_table_can_be_made_smaller_before_they_are_joined(tmp_path: Path):
    table = pixels_of("ridge", 0.7)
    for mask in ("B2", "B8"):
        write_table(table.assign(mask=mask), tmp_path / mask / "segmentation_predictions.parquet")
    found = collect(tmp_path, "segmentation_predictions.parquet", each=by_group)
    assert len(found) < len(table)
    assert found["pixels"].sum() == 2 * table["pixels"].sum()


@pytest.mark.parametrize(
    ("name", "notebook"),
    [
        ("alignment.parquet", "03_fine_tuning"),
        ("predictions.parquet", "04_scene_classification"),
        ("segmentation.parquet", "05_image_segmentation"),
        ("segmentation_predictions.parquet", "05_image_segmentation"),
    ],
)
def test_nothing_to_collect_names_the_notebook_that_makes_it(name: str, notebook: str, tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=rf"{name}.*{notebook}\.ipynb"):
        collect(tmp_path, name)


def test_several_experiments_are_gathered_and_what_has_not_run_is_passed_by(tmp_path: Path):
    base, variant, never = (tmp_path / name for name in ("base", "variant", "never"))
    write_table(rows([0.1]), base / "B8" / "results.parquet")
    write_table(history("B8", [2.0, 1.0], runs=1), base / "B8" / "alignment.parquet")
    write_table(history("B8", [3.0], runs=1, experiment="variant"), variant / "B8" / "alignment.parquet")
    tasks = ["alignment", "classification", "segmentation"]
    found = results.gather([base, variant, never], tasks)
    assert found["value"].tolist() == [2.0, 1.0, 0.1, 3.0]
    assert tuple(found.columns) == COLUMNS
    with pytest.raises(FileNotFoundError, match="never"):
        results.gather([never, base], tasks)


# --- scores ---------------------------------------------------------------------------------------------------------


def test_scores_of_predictions_are_scikit_learns():
    draw = np.random.default_rng(1)
    table = pd.concat(
        [
            predictions_of(draw.random((2, 60)) < 0.6, "pre-trained"),
            predictions_of(draw.random((2, 60)) < 0.8, "fine-tuned", encoder_seed=0),
            predictions_of(draw.random((2, 60)) < 0.8, "fine-tuned", encoder_seed=1),
        ],
        ignore_index=True,
    )
    found = score_predictions(table, 4)
    assert len(found) == 6 * 2
    for row in found:
        same_encoder = table["encoder_seed"].fillna(-1) == (-1 if pd.isna(row["encoder_seed"]) else row["encoder_seed"])
        run = table[(table["method"] == row["method"]) & same_encoder & (table["head_seed"] == row["head_seed"])]
        assert len(run) == 60
        score = {
            "overall_accuracy": sklearn.metrics.accuracy_score,
            "macro_accuracy": sklearn.metrics.balanced_accuracy_score,
        }[row["metric"]]
        assert row["value"] == pytest.approx(score(run["label"], run["predicted"]))
    described = {k: v for k, v in COMMON.items() if k not in ("mask", "scheme", "protocol", "method", "metric")}
    assert len(tidy(found, **described)) == 12  # they are measurements of the results table


def test_scores_of_pixels_are_scikit_learns_with_pixels_as_weights():
    table = pd.concat([pixels_of("ridge", 0.7), pixels_of("fine-tuned", 0.9, encoder_seed=1)], ignore_index=True)
    names = ["water", "forest", "barren"]
    found = score_predictions(table, names)
    assert len(found) == 4 * 7  # two methods with two decoders; four metrics and three classes
    for row in found:
        run = table[(table["method"] == row["method"]) & (table["head_seed"] == row["head_seed"])]
        given = {"y_true": run["label"], "y_pred": run["predicted"], "sample_weight": run["pixels"]}
        jaccard = sklearn.metrics.jaccard_score(**given, average=None)
        expected = {
            "overall_accuracy": sklearn.metrics.accuracy_score(**given),
            "macro_accuracy": sklearn.metrics.balanced_accuracy_score(**given),
            "miou_all": jaccard.mean(),
            "miou_present": jaccard.mean(),
            **{f"iou {name}": value for name, value in zip(names, jaccard, strict=True)},
        }
        assert row["value"] == pytest.approx(expected[row["metric"]])
    assert {row["metric"] for row in score_predictions(table, 3)} == {m for m in expected if not m.startswith("iou")}


def test_a_class_that_never_occurs_has_no_iou_and_counts_as_zero_in_the_mean_over_all():
    table = pixels_of("ridge", 1.0, runs=1)
    found = {row["metric"]: row["value"] for row in score_predictions(table, ["a", "b", "c", "never"])}
    assert np.isnan(found["iou never"])
    assert (found["miou_all"], found["miou_present"], found["iou a"]) == pytest.approx((0.75, 1, 1))


def test_images_have_no_iou_even_with_names():
    table = predictions_of(np.ones((1, 30), bool), "ridge")
    found = score_predictions(table, ["a", "b", "c", "d"])
    assert [row["metric"] for row in found] == ["overall_accuracy", "macro_accuracy"]
    assert pixel_classes(tidy(found, task="classification")) is None
    pixels = score_predictions(pixels_of("ridge", 0.5), ["a", "b", "c"])
    assert pixel_classes(tidy([{k: v for k, v in row.items()} for row in pixels], task="segmentation")) == 3


def test_masks_come_in_the_order_of_the_thesis():
    assert results.mask_order(["zebra", "B8 B11", "none", "B2", "B01", "B2"]) == [
        "none",
        "B2",
        "B8 B11",
        "B01",
        "zebra",
    ]


def test_percent():
    assert percent(0.8421, 0.0031) == "84.2 ± 0.3"
    assert percent(0.8421) == "84.2"


# --- tables for reading ---------------------------------------------------------------------------------------------


def accuracies() -> pd.DataFrame:
    """Runs of two masks and the complete reference; B2 B8 lacks the fine-tuned encoder."""
    return pd.concat(
        [
            rows([0.70, 0.72, 0.74], mask="B8", method="pre-trained"),
            rows([0.90], mask="B8", method="ridge"),
            rows([0.88, 0.92], mask="B8", method="fine-tuned"),
            rows([0.50, 0.60], mask="B8", method="pre-trained", protocol="kept"),
            rows([0.60, 0.62], mask="B2 B8", bands="B02 B08", method="pre-trained"),
            rows([0.95, 0.97], mask="none", bands="", method="pre-trained", protocol="complete"),
            rows([0.10], mask="B8", metric="macro_accuracy"),
            rows([0.20], mask="B8", split="val"),
        ],
        ignore_index=True,
    )


def test_accuracy_table_reads_as_a_paper_does():
    found = accuracy_table(accuracies())
    assert list(found.columns) == ["mask", "hidden bands", "protocol", *METHODS]
    assert found.to_numpy().tolist() == [
        ["none", "", "complete images", "96.0 ± 1.4", "–", "–"],
        ["B8", "B08", "head kept", "55.0 ± 7.1", "–", "–"],
        ["B8", "B08", "head retrained", "72.0 ± 2.0", "90.0", "90.0 ± 2.8"],
        ["B2 B8", "B02 B08", "head retrained", "61.0 ± 1.4", "–", "–"],
    ]


def test_accuracy_table_of_nothing_is_empty_with_its_columns():
    found = accuracy_table(accuracies().iloc[:0])
    assert list(found.columns) == ["mask", "hidden bands", "protocol", *METHODS]
    assert len(found) == 0


def test_accuracy_table_of_another_metric_where_other_methods_are_missing_altogether():
    found = accuracy_table(accuracies(), "macro_accuracy")
    assert found[list(METHODS)].to_numpy().tolist() == [["–", "–", "10.0"]]


def test_accuracy_table_of_pixels():
    table = pd.concat([accuracies(), rows([0.4, 0.6], task="segmentation", metric="miou_all")], ignore_index=True)
    found = accuracy_table(table, "miou_all", task="segmentation")
    assert found[["mask", *METHODS]].to_numpy().tolist() == [["B8", "–", "–", "50.0 ± 14.1"]]
    assert len(accuracy_table(table)) == 4


def test_settings_that_differ_are_told_apart_and_never_averaged():
    table = pd.concat(
        [rows([0.5]), rows([0.7], schedule="gradual", experiment="other"), rows([0.6], mask="none", bands="")],
        ignore_index=True,
    )
    found = accuracy_table(table)
    assert list(found.columns) == ["mask", "hidden bands", "experiment", "schedule", "protocol", *METHODS]
    assert found[["mask", "schedule", "fine-tuned"]].to_numpy().tolist() == [
        ["none", "constant", "60.0"],
        ["B8", "gradual", "70.0"],
        ["B8", "constant", "50.0"],
    ]


# --- tables for papers ----------------------------------------------------------------------------------------------


def readable() -> pd.DataFrame:
    return pd.DataFrame(
        {
            "mask": ["B8 [d]", "none"],
            "accuracy (%)": ["96.3 ± 0.2", "–"],
            "difference": ["−0.31 [−0.62, +0.10]", "50 % & more"],
            "under_score": [1.5, np.nan],
        }
    )


def test_a_table_is_written_in_three_ways_beside_each_other(tmp_path: Path):
    paths = export_table(readable(), tmp_path / "tables" / "table_4.3")
    assert [path.name for path in paths] == ["table_4.3.csv", "table_4.3.tex", "table_4.3.md"]
    assert sorted(path.name for path in (tmp_path / "tables").iterdir()) == sorted(path.name for path in paths)
    pd.testing.assert_frame_equal(pd.read_csv(paths[0]), readable())
    lines = paths[2].read_text().splitlines()
    assert [cell.strip() for cell in lines[2].strip("|").split("|")] == [
        "B8 [d]",
        "96.3 ± 0.2",
        "−0.31 [−0.62, +0.10]",
        "1.5",
    ]


def test_a_failed_export_leaves_all_three_as_they_were(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    export_table(readable(), tmp_path / "table")
    before = {path.name: path.read_text() for path in tmp_path.iterdir()}
    write = Path.write_text

    def full(path: Path, text: str, **options: Any) -> int:
        if ".md" in path.name:
            raise OSError(28, "No space left on device")
        return write(path, text, **options)

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space left"):
        export_table(readable().iloc[:1], tmp_path / "table")
    monkeypatch.undo()
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == before


def test_latex_has_as_many_cells_a_row_as_columns_and_nothing_unescaped():
    text = to_latex(readable())
    assert text.startswith(r"\begin{tabular}{lllr}" + "\n\\toprule\n")
    assert text.endswith("\\bottomrule\n\\end{tabular}\n")
    body = [line for line in text.splitlines() if line.endswith(r"\\")]
    assert len(body) == 3
    for line in body:
        assert len(re.findall(r"(?<!\\)&", line)) == 3
        bare = re.sub(r"\\[%$#_&{}]|\\[a-z]+(\{\})?", "", line.removesuffix(r"\\"))
        assert not re.search(r"[%#_^~±–−]", bare)
        assert bare.count("$") % 2 == 0
        assert bare.count("{") == bare.count("}")
    assert r"96.3 $\pm$ 0.2" in text
    assert r"50 \% \& more" in text
    assert r"under\_score" in text
    assert "$-$0.31 {[}$-$0.62, +0.10{]}" in text  # a bracket after a line's end would be read as a length
    assert body[2].endswith(r"-- \\")  # what is missing is said to be


def test_every_special_character_of_latex_is_escaped():
    text = to_latex(pd.DataFrame({"a": ["\\ ~ ^ { } # _ & % $ < > × →"]}))
    assert (
        r"\textbackslash{} \textasciitilde{} \textasciicircum{} \{ \} \# \_ \& \% \$ $<$ $>$ $\times$ $\to$ \\" in text
    )


# --- the command ----------------------------------------------------------------------------------------------------


def test_the_command_prints_both_tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any):
    pixels = rows([0.4, 0.6], task="segmentation", metric="miou_all", dataset="sample-256")
    write_table(pd.concat([accuracies(), pixels]), tmp_path / "results.parquet")
    monkeypatch.setattr(sys, "argv", ["results", str(tmp_path)])
    results.main()
    said = capsys.readouterr().out
    assert "Classification, overall accuracy on test images (%)" in said
    assert "Segmentation, miou all on test images (%)" in said
    assert "Segmentation, overall accuracy" not in said  # there is none
    assert "they prove the pipeline only" in said
    assert "96.0 ± 1.4" in said
    assert "50.0 ± 14.1" in said
    assert "not made" in said


# --- curves ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def axes() -> Any:
    figure, axis = plt.subplots()
    yield axis
    plt.close(figure)


def test_curves_draw_the_mean_and_a_band_of_one_sd(axes: Any):
    table = pd.concat([history("B8", [2.0, 1.0, 0.5], runs=3), history("none", [0.4, 0.3, 0.2], runs=3)])
    plot_curves(table, axes, ylabel="validation loss", scale=100)
    assert [line.get_label() for line in axes.lines] == ["none", "B8"]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["none", "B8"]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("epoch", "validation loss")
    for line, band, losses in zip(axes.lines, axes.collections, ([0.4, 0.3, 0.2], [2.0, 1.0, 0.5]), strict=True):
        mean, sd = 100 * (np.array(losses) + 0.02), 100 * np.std([0, 0.02, 0.04], ddof=1)
        assert line.get_xdata().tolist() == [0, 1, 2]
        np.testing.assert_allclose(line.get_ydata(), mean)
        vertices = band.get_paths()[0].vertices
        for epoch in range(3):
            heights = vertices[vertices[:, 0] == epoch, 1]
            assert (heights.min(), heights.max()) == pytest.approx((mean[epoch] - sd, mean[epoch] + sd))
        assert band.get_facecolor()[0, :3] == pytest.approx(mpl.colors.to_rgb(line.get_color()))
        assert band.get_facecolor()[0, 3] < 0.5  # lines stay visible through it


def test_one_run_has_no_band(axes: Any):
    plot_curves(history("B8", [2.0, 1.0], runs=1), axes)
    vertices = axes.collections[0].get_paths()[0].vertices
    assert set(vertices[:, 1].round(9)) <= {2.0, 1.0}


def test_curves_by_method(axes: Any):
    table = pd.concat([history("B8", [2.0, 1.0], method=method) for method in ("pre-trained", "fine-tuned")])
    plot_curves(table, axes, by="method")
    assert [line.get_label() for line in axes.lines] == ["pre-trained", "fine-tuned"]
    assert axes.get_legend().get_title().get_text() == "method"


def test_old_words_of_protocols_are_read(tmp_path: Path):
    write_table(rows([0.5]).assign(protocol=["transfer"]), tmp_path / "a.parquet")
    write_table(rows([0.5]).assign(protocol=["thesis"]), tmp_path / "b.parquet")
    assert [read_table(tmp_path / name)["protocol"].item() for name in ("a.parquet", "b.parquet")] == [
        "kept",
        "retrained",
    ]
