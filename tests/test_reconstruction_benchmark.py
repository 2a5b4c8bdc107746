"""The reconstruction benchmark: folds are measured with their own encoders, and told together and again."""

from __future__ import annotations

import pandas as pd
import pytest
from models import TINY, generated_pack, tiny_encoder

from bandmask import encoders, files


@pytest.fixture
def reconstruction(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(files.project_root() / "benchmarks")
    monkeypatch.setenv("BANDMASK_OUTPUTS", str(tmp_path / "outputs"))
    import reconstruction

    return reconstruction


def run(module, monkeypatch, capsys, *words):
    monkeypatch.setattr("sys.argv", ["reconstruction.py", *words])
    module.main()
    return capsys.readouterr().out


def test_folds_are_measured_alone_and_told_together(reconstruction, monkeypatch, tmp_path, capsys):
    pack = generated_pack(tmp_path / "whole", train=40, val=10, test=10, size=32)
    monkeypatch.setattr(reconstruction.datasets, "open_dataset", lambda _: pack)
    asked = []

    def tiny(dataset, fold, pack, compute):
        asked.append(fold)
        card = encoders.Card("tiny", TINY, embedding_dim=16, image_size=32)
        return encoders.save_encoder(tiny_encoder(seed=fold), card, tmp_path / str(fold) / "encoder")

    monkeypatch.setattr(reconstruction.folds, "stand_in", tiny)
    folds = ["--folds", "1", "2"]
    said = run(reconstruction, monkeypatch, capsys, *folds, "--epochs", "1", "--seeds", "0")
    assert asked == [1, 2]
    assert "eurosat-fold2, head, encoder: validation " in said
    errors = [pd.read_parquet(reconstruction.folder_of(f"eurosat-fold{fold}") / "errors.parquet") for fold in (1, 2)]
    images = [set(part["sample"]) for part in errors]
    splits = [reconstruction.folds.splits_of(pack, fold) for fold in (1, 2)]
    assert [sorted(part) for part in images] == [(split == "test").nonzero()[0].tolist() for split in splits]
    again = run(reconstruction, monkeypatch, capsys, "report", *folds)
    assert asked == [1, 2]  # nothing is measured anew
    assert said.endswith(again)
    assert "| B02 B03 B04 · 90% " in again
    path = reconstruction.folder_of("eurosat-folds") / "table.parquet"
    told = pd.read_parquet(path).set_index(["mask", "band", "method"]).loc[("B08 · 100%", "B08", "ridge"), "rmse"]
    both = pd.concat(errors)
    ridge = both[(both["mask"] == "B08 · 100%") & (both["band"] == "B08") & (both["method"] == "ridge")]
    assert told == pytest.approx((ridge["squared"].sum() / ridge["pixels"].sum()) ** 0.5)


def test_what_can_not_be_told_together_is_refused(reconstruction, monkeypatch, capsys):
    part = pd.DataFrame({"sample": [3, 3, 4]})
    with pytest.raises(ValueError, match="an image is in two parts"):
        reconstruction.pooled([part, part])
    with pytest.raises(SystemExit, match="--encoder and --folds exclude one another"):
        run(reconstruction, monkeypatch, capsys, "--encoder", "here", "--folds", "0")
    with pytest.raises(FileNotFoundError, match=r"errors\.parquet.*reconstruction\.py, without"):
        run(reconstruction, monkeypatch, capsys, "report", "--folds", "0")
