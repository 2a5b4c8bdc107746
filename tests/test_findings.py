"""Notebook 11, behind docs/findings/: folds test every image once, and pages say what the records say."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from bandmask import datasets, files, results
from bandmask.packs import Pack

ROOT = files.project_root()
RECORDS = ROOT / "docs" / "findings"


def splits_of(pack: Pack) -> np.ndarray:
    return np.stack([datasets.fold(pack, k).index["split"] for k in range(5)])


def test_every_image_is_tested_once_and_never_trained_on(sample_pack: Pack) -> None:
    splits = splits_of(sample_pack)
    assert ((splits == "test").sum(0) == 1).all()
    assert ((splits == "val").sum(0) == 1).all()
    for block in sample_pack.index["group"].unique():
        assert all(len(set(of_fold)) == 1 for of_fold in splits[:, sample_pack.index["group"] == block])
    first, again = (datasets.fold(sample_pack, k) for k in (0, 3))
    for folded in (first, again):  # a row is the same image in each
        np.testing.assert_array_equal(folded.images[575], sample_pack.images[575])
        np.testing.assert_array_equal(folded.targets[575], sample_pack.targets[575])
    assert first.fingerprint != again.fingerprint
    assert first.card["mean_dn"]["train"] != again.card["mean_dn"]["train"]
    with pytest.raises(ValueError, match="fold 5 does not exist; available: 0 to 4"):
        datasets.fold(sample_pack, 5)


def test_classes_are_spread_over_the_folds(eurosat_pack: Pack) -> None:
    tested = [np.bincount(eurosat_pack.labels[split == "test"], minlength=10) for split in splits_of(eurosat_pack)]
    assert np.ptp(tested, axis=0).max() <= 1


def test_records_are_read_in_todays_words() -> None:
    for path in RECORDS.rglob("*ation.parquet"):
        alone = path.parent.name.endswith(("-augmented", "-subsets"))  # no head was retrained there
        assert set(results.read_table(path)["protocol"]) == {"kept", *(() if alone else ("retrained",))}, path


def run(folder: Path, task: str, *more: str) -> None:
    """The notebook, as its page names the command."""
    command = [sys.executable, "-m", "papermill", "notebooks/11_findings.ipynb", str(folder / "executed.ipynb")]
    options: dict[str, Any] = {"cwd": ROOT, "env": {**os.environ, "BANDMASK_OUTPUTS": str(folder / "outputs")}}
    options |= {"capture_output": True, "text": True, "timeout": 1800, "check": False}
    done = subprocess.run([*command, "-p", "task", task, *more], **options)
    assert done.returncode == 0, done.stderr[-2000:]


FOUNDATION = tuple(model + of for model in ("galileo-nano", "presto") for of in ("", "-trained", "-behind"))
FOUNDATION += ("galileo-nano-subsets",)
PAGES = [(task, part) for task in ("classification", "segmentation") for part in (".", "ablations")]
PAGES += [("classification", "few-left")]


@pytest.fixture
def inside() -> Iterator[Path]:
    """A folder in the repository, as `report` wants it."""
    with tempfile.TemporaryDirectory(dir=ROOT / "outputs") as name:
        yield Path(name)


@pytest.mark.slow
@pytest.mark.parametrize(("task", "part"), [*PAGES, *(("classification", name) for name in FOUNDATION)])
def test_the_pages_of_this_project_are_those_of_its_records(task: str, part: str, inside: Path) -> None:
    for name in (f"{task}.parquet", f"{task}_costs.csv"):
        shutil.copy(RECORDS / part / name, inside)
    about = ["-f", "params/experiments/foundation.yaml", "-p", "encoder"] if part in FOUNDATION else []
    about += [re.sub("-(trained|behind|subsets)", "", part)] if about else []
    run(inside, task, *about, "-p", "report", str(inside.relative_to(ROOT)))
    made, kept = ((folder / f"{task}.md").read_text(encoding="utf-8") for folder in (inside, RECORDS / part))
    assert made.partition("Folds")[2] == kept.partition("Folds")[2]
    if part in (".", "few-left"):  # what the package looks up is of the same records
        made_now = pd.read_csv(inside / "outputs" / "sample" / f"{task}_recommend.csv")
        shipped = pd.read_csv(results.RECOMMENDED)
        shipped = shipped[(shipped["task"] == task) & (shipped["encoder"] == "small")]
        made_now, shipped = (rows[of_few(rows) == (part != ".")].reset_index(drop=True) for rows in (made_now, shipped))
        pd.testing.assert_frame_equal(made_now, shipped, rtol=0, atol=1e-4)


def of_few(rows: pd.DataFrame) -> pd.Series:
    """Few bands left and the head kept: the map was measured beside, on encoders of another run."""
    asked = (rows["task"] == "classification") & (rows["head"] == "kept") & (rows["shape"] == "band")
    return asked & (rows["measured"].str.count("B") >= 9)


@pytest.mark.slow
@pytest.mark.parametrize("task", ["classification", "segmentation"])
def test_every_method_is_measured_once_and_told(task: str, tmp_path: Path) -> None:
    short = dict.fromkeys(("small_encoder", "any", "head", "decoder"), 1)
    more = [word for name, count in short.items() for word in ("-p", f"{name}_epochs", str(count))]
    more += ["-p", "epochs_one_loss", "1", "-p", "encoder_passes", "1", "-p", "image_size", "32", "-p", "fold", "1"]
    asked = "{losses: [only B02 B04 left], contenders: [free, any, thesis, features, variants, ablations]}"
    run(tmp_path, task, *more, "-y", asked)
    folder = tmp_path / "outputs" / "sample" / f"{task}-fold1"
    found = results.read_table(folder / "findings.parquet")
    assert set(found["method"]) == {
        *("pre-trained", "band mean", "nearest", "ridge", "one for all", "aligned copy alone", "thrice the epochs"),
        *("thesis' method", "features + distance", "thesis' method for another loss"),
        *("features, no distance", "distance, no features", "features alone"),
    }
    files_made = {path: path.stat().st_mtime_ns for path in folder.glob("*/*") if path.parent.name != "checkpoints"}
    run(tmp_path, task, *more, "-y", asked)  # what is there is not made again
    assert files_made == {path: path.stat().st_mtime_ns for path in files_made}
    run(tmp_path, task, "-p", "report", "folds")
    record = results.read_table(tmp_path / "outputs" / "sample" / f"{task}.parquet")
    assert len(record) == len(found)
    page = (tmp_path / "outputs" / "sample" / f"{task}.md").read_text(encoding="utf-8")
    assert "one for all − thesis' method" in page
    assert "| any " in page.split("What encoders cost")[1]


def test_the_summary_of_the_ablations_says_what_their_pages_say() -> None:
    page = (RECORDS / "small-encoder.md").read_text(encoding="utf-8")
    found = page.split("*What of it does it*")[1].split("### Seg")[0]
    rows = [line.replace("**", "").strip("| ").split(" | ") for line in found.splitlines() if line.startswith("| ")]
    assert len(rows) == 12
    pages = {
        task: (RECORDS / "ablations" / f"{task}.md").read_text(encoding="utf-8").replace("**", "")
        for task in ("classification", "segmentation")
    }
    for row in rows[2:]:
        for task, cell in zip(["classification"] * 2 + ["segmentation"] * 2, row[1:], strict=True):
            for said in re.findall(r"[+−]?\d+\.\d(?: \[.*?\])?", cell):
                assert f" {said} " in pages[task], (row[0], task, said)
