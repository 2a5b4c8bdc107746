"""Tables say what was measured: tidy rows, scores as the references have them, files that papers and browsers take."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest
import torch
from predictions import COMMON, history, pixels_of, rows
from sklearn.metrics import confusion_matrix

from bandmask import bands, files, results, stats
from bandmask.results import COLUMNS, METHODS, accuracy_table, collect, recommend, tidy

pytestmark = pytest.mark.filterwarnings("error")  # pandas announces its errors a version ahead


def test_tidy_has_the_tables_columns_in_order_and_their_types():
    table = tidy([{"epoch": 0, "value": 1}, {"epoch": 1, "value": 0.5, "method": "ridge", "mask_value": -1}], **COMMON)
    assert tuple(table.columns) == COLUMNS
    assert table["method"].tolist() == ["fine-tuned", "ridge"]  # what differs wins over what is shared
    assert table["value"].dtype == table["ratio"].dtype == np.float64
    assert {str(table[c].dtype) for c in ("encoder_seed", "head_seed", "epoch")} == {"Int64"}
    assert table["mask_value"].tolist() == ["dataset_mean", "-1"]  # a mixed column would not go into Parquet
    joined = pd.concat([tidy([], **COMMON), rows([0.5])], ignore_index=True)
    pd.testing.assert_frame_equal(joined, rows([0.5]), check_dtype=False)
    with pytest.raises(ValueError, match=rf"\['accuracy'\]; available: {', '.join(COLUMNS)}"):
        tidy([{"accuracy": 1.0}], **COMMON)


def test_collect_takes_what_is_vouched_for_of_each_experiment(tmp_path: Path):
    base, variant, never = (tmp_path / name for name in ("base", "variant", "never"))
    results.write_table(
        rows([0.1, 0.2], mask="B8", protocol="transfer"), base / "B8" / "results.parquet"
    )  # words of before
    results.write_table(rows([0.3], mask="B2", protocol="thesis"), base / "B2" / "results.parquet")
    results.write_table(history("B2", [2.0], runs=1), base / "B2" / "alignment.parquet")
    results.write_table(rows([0.9]), base / "results.parquet")  # the collected table of an earlier time
    (base / "B2_B8").mkdir()
    (base / "B2_B8" / ".results.parquet.partial-1").write_bytes(b"PAR1")  # killed while writing
    results.write_table(history("B8", [3.0], runs=1, experiment="variant"), variant / "B8" / "alignment.parquet")
    found = collect([base], ["results.parquet"])
    columns = ["mask", "protocol", "value"]
    assert found[columns].to_numpy().tolist() == [["B2", "retrained", 0.3], ["B8", "kept", 0.1], ["B8", "kept", 0.2]]
    assert found.index.tolist() == [0, 1, 2]
    every = ["alignment.parquet", "results.parquet"]
    assert collect([base, variant, never], every)["value"].tolist() == [2.0, 0.3, 0.1, 0.2, 3.0]
    with pytest.raises(FileNotFoundError, match=r"never.*04_scene_classification"):
        collect([never, base], every)
    record = {"state": "outdated", "error": "a mask was taken out", "outputs": {"results.parquet": None}}
    (base / "B8" / "04_scene_classification.json").write_text(json.dumps(record))
    with pytest.warns(UserWarning, match="is left out: 04_scene_classification: outdated: a mask was taken out"):
        assert collect([base], ["results.parquet"])["value"].tolist() == [0.3]


def test_scores_of_pixels_are_those_of_the_confusion_with_pixels_as_weights():
    table = pd.concat([pixels_of("ridge", 0.7), pixels_of("fine-tuned", 0.9, encoder_seed=1)], ignore_index=True)
    names = ["water", "forest", "barren"]
    found = results.score_predictions(table, names)
    assert len(found) == 4 * 7  # two methods with two decoders; four metrics and three classes
    for row in found:
        run = table[(table["method"] == row["method"]) & (table["head_seed"] == row["head_seed"])]
        given = run["label"], run["predicted"], run["pixels"]
        counts = torch.tensor(confusion_matrix(*given[:2], sample_weight=given[2]))
        assert row["value"] == pytest.approx(stats.scores(counts, names)[row["metric"]])
    table = pixels_of("ridge", 1.0, runs=1)
    found = {row["metric"]: row["value"] for row in results.score_predictions(table, ["a", "b", "c", "never"])}
    assert np.isnan(found["iou never"])
    assert (found["miou_all"], found["miou_present"], found["iou a"]) == pytest.approx((0.75, 1, 1))


def test_masks_come_in_the_order_of_the_thesis_and_figures_have_their_signs():
    names = ["none", "B2", "B8 B11", "B01", "zebra"]
    assert results.mask_order(["zebra", "B8 B11", "none", "B2", "B01", "B2"]) == names
    assert results.with_interval(1.23, -0.31, 2.66) == "+1.2 [−0.3, +2.7]"
    assert results.with_interval(0.04, np.nan, np.nan) == "0.0"
    assert results.with_interval(12.3, -0.04, 14, plus=False) == "12.3 [0.0, 14.0]"


def accuracies() -> pd.DataFrame:
    """Runs of two masks and the complete reference; B2 B8 lacks the fine-tuned encoder."""
    parts = [
        rows([0.70, 0.72, 0.74], mask="B8", method="pre-trained"),
        rows([0.90], mask="B8", method="ridge"),
        rows([0.88, 0.92], mask="B8", method="fine-tuned"),
        rows([0.50, 0.60], mask="B8", method="pre-trained", protocol="kept"),
        rows([0.60, 0.62], mask="B2 B8", bands="B02 B08", method="pre-trained"),
        rows([0.95, 0.97], mask="none", bands="", method="pre-trained", protocol="complete"),
        rows([0.10], mask="B8", metric="macro_accuracy"),
        rows([0.20], mask="B8", split="val"),
        rows([0.4, 0.6], mask="B8", task="segmentation", metric="miou_all", dataset="sample-256"),
    ]
    return pd.concat(parts, ignore_index=True)


def test_accuracy_table_reads_as_a_paper_does():
    found = accuracy_table(accuracies())
    assert list(found.columns) == ["mask", "hidden bands", "protocol", *METHODS]
    assert found.to_numpy().tolist() == [
        ["none", "", "complete images", "96.0 ± 1.4", "–", "–"],
        ["B8", "B08", "head kept", "55.0 ± 7.1", "–", "–"],
        ["B8", "B08", "head retrained", "72.0 ± 2.0", "90.0", "90.0 ± 2.8"],
        ["B2 B8", "B02 B08", "head retrained", "61.0 ± 1.4", "–", "–"],
    ]
    pixels = accuracy_table(accuracies(), "miou_all", task="segmentation")
    assert pixels[["mask", *METHODS]].to_numpy().tolist() == [["B8", "–", "–", "50.0 ± 14.1"]]
    assert list(accuracy_table(accuracies().iloc[:0]).columns) == list(found.columns)


def test_settings_that_differ_are_told_apart_and_never_averaged():
    parts = [rows([0.5]), rows([0.7], schedule="gradual", experiment="other"), rows([0.6], mask="none", bands="")]
    found = accuracy_table(pd.concat(parts, ignore_index=True))
    assert list(found.columns) == ["mask", "hidden bands", "experiment", "schedule", "protocol", *METHODS]
    assert found[["mask", "schedule", "fine-tuned"]].to_numpy().tolist() == [
        ["none", "constant", "60.0"],
        ["B8", "gradual", "70.0"],
        ["B8", "constant", "50.0"],
    ]


def test_a_run_ends_with_what_notebooks_found_and_links_a_page_of_each(tmp_path: Path):
    results.write_table(accuracies(), tmp_path / "results.parquet")
    (tmp_path / "found.md").write_text("Losing bands costs 30.1 points.")
    (tmp_path / "06_results.html").touch()
    shown = nbformat.v4.new_code_cell("1", outputs=[nbformat.v4.new_output("display_data", {"image/png": PNG})])
    link = nbformat.v4.new_markdown_cell(
        "# 04 · <Scenes>\n\n[on](05_image_segmentation.ipynb), [why](../docs/thesis.md)"
    )
    notebook = nbformat.v4.new_notebook(cells=[link, shown])
    for name in ("B8/04_scene_classification", "B2/04_scene_classification", "B8/05_image_segmentation"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        nbformat.write(notebook, tmp_path / f"{name}.ipynb")
    found, last = results.closing(tmp_path).strip().splitlines()
    assert found == "Losing bands costs 30.1 points."
    assert last.endswith(str(tmp_path / "index.html"))
    assert str(tmp_path / "06_results.html") in last
    index = (tmp_path / "index.html").read_text()
    assert Active(index).found == []
    assert (index.count("<img"), index.count("&lt;Scenes&gt;")) == (3, 3)
    for page in re.findall('href="([^"]+)"', index):
        text = (tmp_path / page).read_text()
        beside = {"05_image_segmentation.html"} if page.startswith("B8") else set()  # else the link leads to the index
        assert set(re.findall('href="([^"#]+)', text)) == {"../index.html"} | beside
    made = (tmp_path / page).stat().st_mtime_ns
    results.write_index(tmp_path)
    assert (tmp_path / page).stat().st_mtime_ns == made  # what is up to date is not made again
    record = (tmp_path / page).with_suffix(".json")
    executed = (tmp_path / page).with_suffix(".ipynb")
    for state, checksum, said in (("outdated", None, 1), ("done", "0" * 64, 1), ("done", files.sha256(executed), 0)):
        record.write_text(json.dumps({"state": state, "outputs": {executed.name: checksum}}))
        assert results.write_index(tmp_path).read_text().count("outdated or edited") == said
    table = {"results.parquet": files.sha256(tmp_path / "results.parquet")}
    made = {"state": "done", "outputs": {**table, "found.md": "0" * 64}}
    (tmp_path / "06_results.json").write_text(json.dumps(made))
    assert "is not shown: 06_results: found.md is not what was written" in results.closing(tmp_path)


def readable() -> pd.DataFrame:
    gains = ["−0.31 [−0.62, +0.10]", "50 % & more"]
    cells = {"mask": ["B8 [d]", "none"], "accuracy (%)": ["96.3 ± 0.2", "–"], "difference": gains}
    return pd.DataFrame({**cells, "under_score": [1.5, np.nan]})


def test_tables_for_papers_hold_what_the_frame_does_and_nothing_unescaped(tmp_path: Path):
    results.export_table(readable(), tmp_path / "tables" / "table_4.3")
    csv, md, tex = (tmp_path / "tables" / f"table_4.3.{kind}" for kind in ("csv", "md", "tex"))
    pd.testing.assert_frame_equal(pd.read_csv(csv), readable())
    cells = [cell.strip() for cell in md.read_text().splitlines()[2].strip("|").split("|")]
    assert cells == ["B8 [d]", "96.3 ± 0.2", "−0.31 [−0.62, +0.10]", "1.5"]
    lines = tex.read_text().splitlines()
    assert (lines[:2], lines[-2:]) == ([r"\begin{tabular}{lllr}", r"\toprule"], [r"\bottomrule", r"\end{tabular}"])
    body = [line for line in lines if line.endswith(r"\\")]
    assert len(body) == 3
    for line in body:
        assert len(re.findall(r"(?<!\\)&", line)) == 3
        bare = re.sub(r"\\[%$#_&{}]|\\[a-z]+(\{\})?", "", line.removesuffix(r"\\"))
        assert not re.search(r"[%#_^~±–−]", bare)
        assert bare.count("$") % 2 == 0
        assert bare.count("{") == bare.count("}")
    assert "$-$0.31 {[}$-$0.62, +0.10{]}" in body[1]  # a bracket after a line's end would be read as a length
    assert r"50 \% \& more" in body[2]
    assert body[2].endswith(r"-- \\")  # what is missing is said to be
    every = results.to_latex(pd.DataFrame({"a": ["\\ ~ ^ { } # _ & % $ < > × →"]})).splitlines()[4]
    assert not re.search(r"[^\\][~^#_&%]|[<>](?!\$)|[×→]", every)


class Active(HTMLParser):
    """What a page would run or fetch."""

    def __init__(self, html: str):
        super().__init__()
        self.found: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        runs = [f"{tag} {name}" for name, value in attrs if name.startswith("on") or "javascript:" in (value or "")]
        away = [f"{tag} {name}" for name, value in attrs if name in ("src", "srcset") and not value.startswith("data:")]
        self.found += runs + away + [tag] * (tag in ("script", "iframe", "object", "embed", "base"))


PNG = (  # of one pixel
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mP8z8BQDwAEhQGAhKmMIQAAAABJRU5ErkJggg=="
)
VIEW, STATE = (f"application/vnd.jupyter.widget-{kind}+json" for kind in ("view", "state"))
EVIL = '<img src=x onerror="alert(1)"><script>alert(1)</script><svg onload=alert(1)>[x](javascript:alert(1))|</td>'


def test_a_page_runs_nothing_whatever_the_names_in_it_are(tmp_path: Path):
    frame = pd.DataFrame({"encoder": [EVIL, "tiny"], EVIL: ["1", "2"]})
    outputs = [
        nbformat.v4.new_output("display_data", {"text/markdown": f"**{EVIL}**"}),
        nbformat.v4.new_output("display_data", {"text/markdown": results.markdown(frame)}),
        nbformat.v4.new_output("display_data", {"text/html": f"<b>{EVIL}</b>"}),
        nbformat.v4.new_output("display_data", {"image/svg+xml": "<svg><script>alert(1)</script></svg>"}),
        nbformat.v4.new_output("display_data", {"image/png": "iVBORw0KGgo="}),
        nbformat.v4.new_output("display_data", {"image/png": "iVBORw0KGgo=", VIEW: {"model_id": "0"}}),
        nbformat.v4.new_output("stream", text=EVIL),
    ]
    cells = [
        nbformat.v4.new_code_cell("secret = 1", outputs=outputs),
        nbformat.v4.new_markdown_cell(f"## Scores\n\n{EVIL}"),
        nbformat.v4.new_markdown_cell("## Curves\n\nWhat a hidden step does:"),
        nbformat.v4.new_code_cell("step = 2"),
    ]
    state = {"widgets": {STATE: {"state": {"0": {"model_name": "VBoxModel"}}, "version_major": 2, "version_minor": 0}}}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=state), tmp_path / "executed.ipynb")
    page = results.write_page(tmp_path / "executed.ipynb", tmp_path / "page.html").read_text(encoding="utf-8")
    assert Active(page).found == []
    assert page.index("Content-Security-Policy") < page.index("<style")
    assert "secret" not in page
    assert (page.count("<th"), page.count("<td>")) == (3, 4)  # names stay text in their cells, tables are tables
    assert '<h2 id="Scores">' in page
    assert '<h2 id="Curves">' in page
    assert "hidden step" not in page, "what leads to code alone"
    assert page.count('src="data:image/png') == 2  # a widget leaves its picture
    assert Active(f"<div>{EVIL}</div>").found  # the reader of this test sees what is there


def test_a_measured_loss_is_found_and_another_one_is_said_to_be_the_nearest():
    assert recommend(["nir", "blue"], "kept")["shared"] == 1
    near = recommend("B8 B2 nir08", encoder="presto")
    assert (near["lost"], near["measured"], near["shared"]) == ("B02 B08 B8A", "B02 B08", 2 / 3)
    assert recommend(["nir", "blue"], "kept")["note"] == ""
    assert "67% of the bands" in near["note"]
    four_left = [name for name in bands.NAMES if name not in ("B02", "B03", "B04", "B08")]
    free, trained = (recommend(four_left, head) for head in ("kept", "retrained"))
    # where few bands are left, fill and map: nothing is trained, and they are the best free method
    assert (free["method"], free["best_free"]) == ("mapped", "mapped")
    assert free["images_trained"] == free["seconds"] == free["gain"] == 0
    assert trained["method"].startswith("fine-tuned")  # unless the head is retrained
    assert trained["images_trained"] > 0 < trained["seconds"]
    for row in (free, trained):
        assert row["shared"] == 1
        assert row["gain_low"] <= row["gain"] <= row["gain_high"]
    two_left = [name for name in bands.NAMES if name not in ("B02", "B04")]
    for encoder in ("galileo-nano", "presto"):
        mapped = recommend(two_left, encoder=encoder)
        assert (mapped["method"], mapped["best_free"], mapped["shared"]) == ("mapped", "native", 1)
        assert mapped["gain_low"] > 0.4
    free = recommend("B02 B03 B04", shape="pixel", head="retrained", task="segmentation")
    assert free["low"] <= free["score"] <= free["high"] < 1


def test_a_loss_of_other_bands_never_lends_its_method():
    rows = {lost: recommend(lost) for lost in ("B01", "B05", "B11 B12", "B02 B08 B8A")}
    assert all((row["measured"], row["shared"], row["method"]) == (lost, 1, "ridge") for lost, row in rows.items())
    assert [row["score"] for row in rows.values()] == [0.8295, 0.8251, 0.762, 0.8183]  # of exactly these losses
    two_left = recommend([name for name in bands.NAMES if name not in ("B03", "B11")])
    assert (two_left["method"], two_left["images_trained"]) == ("any-band", 23040)
    assert 0 < two_left["gain_low"] < two_left["gain"] < two_left["gain_high"]
    for other in ({"encoder": "presto"}, {"head": "retrained"}, {"task": "segmentation"}):
        row = recommend("B11 B12", **other)
        assert (row["measured"], row["method"], row["best_free"]) == ("", "", "")
        assert "bm.evaluate" in row["note"]
        assert row[["score", "low", "high", "complete", "gain", "seconds"]].isna().all()
    with pytest.raises(ValueError, match="every band is lost"):
        recommend(bands.NAMES)
    alone, beside = (recommend(lost, encoder="galileo-nano") for lost in ("B08", "B01 B08 B09 B10"))
    assert alone.drop("lost").equals(beside.drop("lost")), "it takes neither B01, B09 nor B10"
    assert alone["shared"] == 1
    with pytest.raises(ValueError, match="galileo-nano takes none of B01 B09: nothing is lost to it"):
        recommend("B01 B09", encoder="galileo-nano")


@pytest.mark.parametrize(
    "wrong",
    [{"head": "thesis"}, {"shape": "salt"}, {"encoder": "satclip"}, {"lost": ""}],
)
def test_what_was_not_measured_is_an_error_that_lists_what_was(wrong: dict[str, str]):
    with pytest.raises(ValueError, match=r"available: \w+|no band is lost"):
        recommend(**{"lost": "B11", **wrong})
    with pytest.raises(ValueError, match="B99"):
        recommend("B99")
