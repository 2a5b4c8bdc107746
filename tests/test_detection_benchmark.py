"""The benchmark behind section 4 of docs/findings.md: what the detector said of each image, and the tables of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from models import TINY, generated_pack, tiny_encoder
from sklearn.metrics import roc_auc_score

from bandmask import encoders, files, results


@pytest.fixture
def benchmarks(monkeypatch, tmp_path):
    """The benchmark's modules, with outputs in a folder of the test's own."""
    monkeypatch.syspath_prepend(files.project_root() / "benchmarks")
    monkeypatch.setenv("BANDMASK_OUTPUTS", str(tmp_path / "outputs"))
    import detection
    import detection_report

    return detection, detection_report


def test_every_fault_is_measured_once_and_told(benchmarks, monkeypatch, tmp_path, capsys):
    detection, _ = benchmarks
    pack = generated_pack(tmp_path / "whole", train=100, val=10, test=10, size=32)
    pack = replace(pack, index=pack.index.assign(group=[f"block {row % 10}" for row in range(120)]))
    monkeypatch.setattr(detection.folds.datasets, "open_dataset", lambda _: pack)
    monkeypatch.setattr(detection, "AMOUNTS", {"dead": (0.0,), "gain": (1.1, 1.3), "swapped": (None,)})
    monkeypatch.setattr(detection.findings, "PASSES_IN_SERVICE", 1)

    def tiny(dataset, fold, pack, compute):
        card = encoders.Card("tiny", TINY, embedding_dim=16, image_size=32)
        return encoders.save_encoder(tiny_encoder(), card, files.outputs_root() / dataset / "encoder")

    monkeypatch.setattr(detection.folds, "stand_in", tiny)

    def run(*words):
        monkeypatch.setattr("sys.argv", ["detection.py", *words])
        detection.main()
        return capsys.readouterr().out

    with pytest.raises(SystemExit, match=r"nothing was measured below .*fold1"):
        run("record", "--folds", "1", "--to", str(tmp_path))
    said = run("--folds", "1", "2")
    for fault in ("dead-0", "gain-1.1", "gain-1.3", "swapped", "dead: healthy"):
        assert f"fold 1, {fault}" in said
    assert run("--folds", "1", "2") == ""  # what is there is not made again
    assert "of folds [1, 2]" in run("record", "--folds", "1", "2", "--to", str(tmp_path))
    page = Path(run("report", "--to", str(tmp_path)).strip()).read_text(encoding="utf-8")
    assert "Folds 1, 2: 48 images, each tested once" in page
    loop = page.split("## The loop closed")[1]
    assert {line.split("|")[1].strip() for line in loop.splitlines() if line.startswith("| ")} == {
        *("fault", "none", "dead 0", "gain 1.3", "swapped")
    }
    record = results.read_table(tmp_path / "detection.parquet")
    assert len(record) == 48 * (1 + 13 * 3 + 12)
    kept = results.read_table(tmp_path / "closed_loop.parquet")
    assert len(kept) == 48 * 3 * (3 * 3 + 2)  # heads; faults by methods, and healthy images twice


def said_of(kind: str, worst: np.ndarray, band: str = "B01", fold: int = 0) -> pd.DataFrame:
    """Generated: images whose highest score is `worst`, in thresholds."""
    frame = pd.DataFrame({"sample": np.arange(len(worst)) + 100 * fold, "worst": worst, "detected": worst > 1})
    bands = np.where(worst > 1, "B03", "") if kind == "none" else band
    amount = np.nan if kind == "none" else 1.3
    named = {"found": worst > 1, "named": worst > 1}
    return frame.assign(kind=kind, amount=amount, bands=bands, fold=fold, word="", **named)


def test_the_area_is_of_all_folds_against_the_same_images(benchmarks):
    _, report = benchmarks
    draw = np.random.default_rng(0)
    healthy, faulty = draw.uniform(0, 1.1, 40), draw.uniform(0.5, 2, 40)
    table = pd.concat(
        [said_of("none", healthy[part], fold=fold) for fold, part in enumerate((slice(20), slice(20, 40)))]
        + [said_of("gain", faulty[part], fold=fold) for fold, part in enumerate((slice(20), slice(20, 40)))]
    )
    normal = table[table["kind"] == "none"]
    (row,) = report.seen(normal, table[table["kind"] != "none"]).to_dict("records")
    area = 100 * roc_auc_score([0] * 40 + [1] * 40, np.concatenate([healthy, faulty]))
    assert row["AUC"].startswith(f"{area:.1f} [")
    assert row["seen"].startswith(f"{100 * (faulty > 1).mean():.1f} [")
    assert row["fault"] == "gain"
    words = report.false_alarms(normal)
    assert f"{100 * (healthy > 1).mean():.1f} [" in words
    assert f"{100 * (healthy > 1).mean() / 13:.2f} % of bands" in words


def test_differences_draw_the_same_heads_on_both_sides(benchmarks):
    """A head that is wrong for both methods alike says nothing about their difference."""
    _, report = benchmarks
    frames = []
    for seed, right in ((0, 1.0), (1, 0.5)):
        label = np.arange(40) % 2
        predicted = np.where(np.arange(40) < 40 * right, label, 1 - label)
        one = pd.DataFrame({"sample": np.arange(40), "label": label, "predicted": predicted})
        frames += [one.assign(head_seed=seed, encoder_seed=0, method=name) for name in ("oracle", "detector")]
    assert report.difference(pd.concat(frames), "oracle", "detector") == "0.0 [0.0, 0.0]"


def test_the_page_of_this_project_says_what_its_records_say(benchmarks):
    _, report = benchmarks
    folder = files.project_root() / "docs" / "findings"
    found, loop = report.recorded("detection", folder), report.recorded("closed_loop", folder)
    page = (folder / "detection.md").read_text(encoding="utf-8")
    healthy, faulty = found[found["kind"] == report.HEALTHY], found[found["kind"] != report.HEALTHY]
    assert sorted(set(healthy["fold"])) == [0, 1, 2, 3, 4]
    assert healthy["sample"].is_unique
    assert report.markdown(report.seen_by_band(faulty)) in page
    assert report.markdown(report.closed(loop)) in page
