"""The benchmark behind docs/findings.md: folds test every image once, and the tables say what the predictions say."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from models import TINY, generated_pack, labelled_pack, tiny_encoder

from bandmask import encoders, files


@pytest.fixture
def benchmarks(monkeypatch, tmp_path):
    """The benchmark's modules, with records in a folder of the test's own."""
    monkeypatch.syspath_prepend(files.project_root() / "benchmarks")
    monkeypatch.setenv("BANDMASK_OUTPUTS", str(tmp_path / "outputs"))
    import findings
    import findings_report

    monkeypatch.setattr(findings_report, "FOLDER", tmp_path / "records")
    return findings, findings_report


def test_every_image_is_tested_once_and_never_trained_on(benchmarks, sample_pack):
    findings, _ = benchmarks
    splits = np.stack([findings.folds.splits_of(sample_pack, fold) for fold in range(findings.folds.FOLDS)])
    assert ((splits == "test").sum(0) == 1).all()
    assert ((splits == "val").sum(0) == 1).all()
    for block in sample_pack.index["group"].unique():
        assert all(len(set(of_fold)) == 1 for of_fold in splits[:, sample_pack.index["group"] == block])
    with pytest.raises(ValueError, match="fold 5 does not exist; available: 0 to 4"):
        findings.folds.splits_of(sample_pack, 5)


def test_classes_are_spread_over_the_folds(benchmarks, eurosat_pack):
    findings, _ = benchmarks
    splits = [findings.folds.splits_of(eurosat_pack, fold) for fold in range(findings.folds.FOLDS)]
    tested = [np.bincount(eurosat_pack.labels[split == "test"], minlength=10) for split in splits]
    assert np.ptp(tested, axis=0).max() <= 1


def test_a_row_is_the_same_image_in_every_fold(benchmarks, sample_pack):
    findings, _ = benchmarks
    first, again = (findings.folds.open_fold("sample", fold) for fold in (0, 3))
    for row in (0, 111, 575):
        np.testing.assert_array_equal(first.images[row], sample_pack.images[row])
        np.testing.assert_array_equal(again.images[row], sample_pack.images[row])
        np.testing.assert_array_equal(again.targets[row], sample_pack.targets[row])
    assert first.fingerprint != again.fingerprint
    assert first.card["mean_dn"]["train"] != again.card["mean_dn"]["train"]


@pytest.mark.parametrize("task", ["classification", "segmentation"])
def test_every_method_is_measured_once_and_told(benchmarks, task, monkeypatch, tmp_path, capsys):
    findings, report = benchmarks
    import contenders

    loss = "only B02 B04 left"  # that every method meets
    make = {"classification": generated_pack, "segmentation": labelled_pack}[task]
    pack = make(tmp_path / "whole", train=100, val=10, test=10, size=32)
    pack = replace(pack, index=pack.index.assign(group=[f"block {row % 10}" for row in range(120)]))
    monkeypatch.setattr(findings.folds.datasets, "open_dataset", lambda _: pack)
    for name, value in {"EPOCHS": 1, "ANY_EPOCHS": 1, "PASSES_IN_SERVICE": 1, "PASSES": 1, "DECODER_EPOCHS": 1}.items():
        monkeypatch.setattr(findings, name, value)

    def tiny(dataset, fold, pack, compute):
        card = encoders.Card("tiny", TINY, embedding_dim=16, image_size=32)
        return encoders.save_encoder(tiny_encoder(), card, files.outputs_root() / dataset / "encoder")

    monkeypatch.setattr(findings.folds, "stand_in", tiny)

    def run(*words):
        monkeypatch.setattr("sys.argv", ["findings.py", task, *words])
        findings.main()
        return capsys.readouterr().out

    said = run("--folds", "1", "--losses", loss)
    for method in set(report.METHODS) - {"local", report.BEST_FREE, *contenders.ABLATIONS, *contenders.GONE}:
        assert f"only_B02_B04_left-{method}".replace(" ", "_").replace("'", "") in said
    assert run("--folds", "1", "--losses", loss) == ""  # what is there is not made again
    said = run("--folds", "1", "--methods", "ablations", "--losses", "B2 B3 B4")
    assert said.count("fold 1, B2_B3_B4") == len(contenders.ABLATIONS)
    assert "of folds [1]" in run("record", "--folds", "1")
    page = Path(run("report").strip()).read_text(encoding="utf-8")
    assert loss in page
    assert "one for all − thesis' method" in page
    assert "| any " in page.split("What encoders cost")[1]
    with pytest.raises(SystemExit, match="unknown losses B99; available: B2, B8"):
        run("--losses", "B99")
    with pytest.raises(SystemExit, match=r"nothing was measured below .*fold4"):
        run("record", "--folds", "4")


def predictions(method: str, wrong: list[int], fold: int) -> pd.DataFrame:
    """Generated: 20 images a fold, all of class 1, some predicted as 0."""
    frame = pd.DataFrame({"sample": np.arange(20) + 20 * fold, "label": 1, "predicted": 1, "head_seed": 0})
    frame.loc[wrong, "predicted"] = 0
    return frame.assign(loss="B8", method=method, protocol="kept", split="test", fold=fold)


def test_differences_pool_the_folds_and_count_those_ahead(benchmarks):
    _, report = benchmarks
    ahead = [predictions(report.ONE_FOR_ALL, [], fold) for fold in (0, 1)]
    behind = [predictions(report.THESIS_METHOD, wrong, fold) for fold, wrong in enumerate([list(range(10)), []])]
    ridge = [predictions("ridge", [], fold) for fold in (0, 1)]
    table = pd.concat([*ahead, *behind, *ridge])
    table = table.assign(encoder_seed=0)
    found = report.differences(table, "overall_accuracy").set_index("loss")
    cell = found.loc["B8", "one for all − thesis' method"]
    assert cell.startswith("**+25.0 [")
    assert cell.endswith("] 1/2**")
    assert found.loc["*thesis masks, mean of 1*", "one for all − thesis' method"] == cell
    best = report.scores(table, "overall_accuracy").set_index("loss").loc["B8"]
    assert best[report.ONE_FOR_ALL] == "**100.0**"
    assert best[report.THESIS_METHOD] == "75.0"


@pytest.mark.parametrize("part", [".", "ablations"])
@pytest.mark.parametrize("task", ["classification", "segmentation"])
def test_the_pages_of_this_project_say_what_its_records_say(benchmarks, task, part):
    _, report = benchmarks
    folder = files.project_root() / "docs" / "findings" / part
    table, page = report.recorded(task, folder), (folder / f"{task}.md").read_text(encoding="utf-8")
    test = table[table["split"] == "test"]
    assert sorted(set(test["fold"])) == [0, 1, 2, 3, 4]
    for protocol in report.PROTOCOLS:
        assert report.markdown(report.scores(test[test["protocol"] == protocol], report.METRICS[task])) in page


def test_the_summary_of_the_ablations_says_what_their_pages_say():
    folder = files.project_root() / "docs"
    found = (folder / "findings.md").read_text(encoding="utf-8").split("*What of it does it*")[1].split("### Seg")[0]
    rows = [line.replace("**", "").strip("| ").split(" | ") for line in found.splitlines() if line.startswith("| ")]
    assert len(rows) == 12
    pages = {
        task: (folder / "findings" / "ablations" / f"{task}.md").read_text(encoding="utf-8").replace("**", "")
        for task in ("classification", "segmentation")
    }
    for row in rows[2:]:
        for task, cell in zip(["classification"] * 2 + ["segmentation"] * 2, row[1:], strict=True):
            for said in re.findall(r"[+−]?\d+\.\d(?: \[.*?\])?", cell):
                assert f" {said} " in pages[task], (row[0], task, said)


def test_the_advice_is_one_cell_a_protocol_with_the_gain_on_test_images(benchmarks):
    _, report = benchmarks
    frames = []
    for split in ("val", "test"):
        frames += [predictions("ridge", list(range(10)), fold).assign(split=split) for fold in (0, 1)]
        frames += [predictions(report.ONE_FOR_ALL, [0], fold).assign(split=split) for fold in (0, 1)]
    table = pd.concat(frames).assign(encoder_seed=0)
    (row,) = report.advice(table, "overall_accuracy", {"ridge": 0, report.ONE_FOR_ALL: 80}).itertuples(index=False)
    assert row[0] == "B8"
    assert row[1].startswith("one for all (95.0; +45.0 [")
    assert row[2] == "–"
