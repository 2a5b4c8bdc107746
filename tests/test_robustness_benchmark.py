"""The robustness benchmark's report says what was scored, and names methods that are not there."""

from __future__ import annotations

import re
from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from models import TINY, generated_pack, tiny_encoder
from test_lattice import scores

from bandmask import encoders, files, params, results
from bandmask.robustness import lattice


@pytest.fixture
def robustness(monkeypatch):
    monkeypatch.syspath_prepend(files.project_root() / "benchmarks")
    import robustness

    return robustness


@pytest.mark.parametrize("exact", [False, True])
def test_the_report_holds_means_differences_and_worst_subsets(robustness, capsys, exact):
    codes = lattice.every_subset() if exact else lattice.some_subsets(2, 13)
    before, after = scores(codes, images=10, heads=1), scores(codes, images=10, heads=1, seed=1)
    robustness.report({"pre-trained": before, "ridge": after}, exact)
    text = capsys.readouterr().out
    assert f"## {len(codes)} subsets{'' if exact else ' (a sample)'}, 10 test images, 1 heads" in text
    gain = 100 * (after.at(lattice.COMPLETE) - before.at(lattice.COMPLETE))
    assert f"{gain:+.1f} [".replace("-", "−") in text
    assert "ridge − pre-trained" in text
    assert "pre-trained − ridge" not in text
    worst = lattice.extremes(before).iloc[1]
    assert f"{worst['hidden']}: {100 * worst['accuracy']:.1f}" in text
    assert "all but B" in text
    assert ("Shapley interaction" in text) == exact


def test_methods_are_those_whose_encoder_is_there(robustness, sample_pack, monkeypatch, tmp_path):
    monkeypatch.setenv("BANDMASK_OUTPUTS", str(tmp_path))
    model = tiny_encoder()
    found = robustness.methods("mine", [], [], model, sample_pack)
    assert [method.name for method in found] == ["pre-trained", "ridge"]
    card = encoders.Card("tiny", "test_resnet", embedding_dim=16)
    folder = encoders.save_encoder(model, card, params.experiment_folder("mine") / "B8" / "encoder-seed0")
    given = [f"plain={folder}", f"nan={folder}:nan"]
    _, _, plain, nan = robustness.methods("mine", given, [], model, sample_pack)
    assert torch.isfinite(plain.fill).all()
    assert torch.isnan(nan.fill).all()
    with pytest.raises(ValueError, match=r"unknown method 'rigde'; available: pre-trained, ridge, any-band"):
        robustness.methods("mine", [], ["rigde"], model, sample_pack)
    with pytest.raises(ValueError, match="unknown fill 'mean' of plain"):
        robustness.methods("mine", [f"plain={folder}:mean"], [], model, sample_pack)
    with pytest.raises(FileNotFoundError, match="no encoder at"):
        robustness.methods("mine", [], ["any-band"], model, sample_pack)


def test_heads_given_in_vain_are_an_error_and_nothing_is_written_there(robustness, sample_pack, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no finished head_in_service.*leave --heads out"):
        robustness.heads_of("mine", tmp_path, tiny_encoder(), sample_pack, 32, robustness.Compute.of("cpu"))
    assert not list(tmp_path.iterdir())


def test_the_picture_has_a_curve_and_a_map_for_each_method(robustness, tmp_path):
    codes = lattice.every_subset()
    scored = {"pre-trained": scores(codes, images=6, heads=1), "ridge": scores(codes, images=6, heads=1, seed=1)}
    robustness.picture(scored, tmp_path / "made" / "map.png")
    height, width, _ = plt.imread(tmp_path / "made" / "map.png").shape
    assert (height, width) == (1320, 968)


def test_folds_are_pooled_as_one_method_over_all_their_images(robustness):
    codes = lattice.some_subsets(1, 13)
    first, second = scores(codes, images=10), scores(codes, images=6, seed=1)
    second = replace(second, samples=second.samples + 50)
    both = robustness.pooled([first, second])
    np.testing.assert_allclose(both.accuracy, (10 * first.accuracy + 6 * second.accuracy) / 16)
    assert len(np.unique(both.groups)) == 16
    assert both.correct.shape == (len(codes), 2, 16)
    with pytest.raises(ValueError, match="an image is in two parts"):
        robustness.pooled([first, first])
    with pytest.raises(ValueError, match="the parts differ in codes"):
        robustness.pooled([first, scores(codes[1:], images=6, seed=1)])
    with pytest.raises(ValueError, match="one part or more"):
        robustness.pooled([])


def test_every_fold_is_scored_with_its_own_encoder_and_told_together(robustness, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("BANDMASK_OUTPUTS", str(tmp_path / "outputs"))
    pack = generated_pack(tmp_path / "whole", train=40, val=10, test=10, size=32)
    monkeypatch.setattr(robustness.folds.datasets, "open_dataset", lambda _: pack)
    for fold in (1, 2):
        card = encoders.Card("tiny", TINY, embedding_dim=16, image_size=32)
        model = tiny_encoder(seed=fold)
        encoders.save_encoder(model, card, params.experiment_folder(f"eurosat-fold{fold}") / "encoder")
    words = ["eurosat", "--folds", "1", "2", "--subsets", "sampled", "--complete-to", "1", "--each", "1"]
    monkeypatch.setattr("sys.argv", ["robustness.py", *words])
    robustness.main()
    said = capsys.readouterr().out
    tested = [sum(robustness.folds.splits_of(pack, fold) == "test") for fold in (1, 2)]
    assert f"## 158 subsets (a sample), {sum(tested)} test images" in said
    assert "eurosat-fold2, ridge: 158 subsets" in said
    assert "ridge − pre-trained" in said
    path = files.outputs_root() / "eurosat-folds" / "robustness" / "robustness.parquet"
    table = results.read_table(path)
    assert set(table["images"]) == {sum(tested)}
    path.unlink()
    monkeypatch.setattr("sys.argv", [*words_of("--folds", "1", "2"), "--report", "--methods", "pre-trained", "ridge"])
    monkeypatch.setattr(robustness, "part_of", None)  # nothing is run
    robustness.main()
    assert capsys.readouterr().out == said[said.index("\n## 158") :]
    pd.testing.assert_frame_equal(results.read_table(path), table)


def words_of(*words):
    return ["robustness.py", "eurosat", *words]


def test_a_report_of_what_was_never_scored_says_so(robustness, monkeypatch, tmp_path):
    monkeypatch.setenv("BANDMASK_OUTPUTS", str(tmp_path))
    monkeypatch.setattr("sys.argv", words_of("--folds", "3", "--report"))
    with pytest.raises(FileNotFoundError, match=r"nothing was scored in .*eurosat-fold3.*leave --report out"):
        robustness.main()


def test_an_encoder_of_each_fold_is_found_by_its_pattern(robustness, sample_pack, monkeypatch, tmp_path):
    monkeypatch.setenv("BANDMASK_OUTPUTS", str(tmp_path))
    for fold in (0, 1):
        folder = params.experiment_folder(f"eurosat-fold{fold}") / "encoders" / f"thesis-{fold}abc"
        encoders.save_encoder(tiny_encoder(seed=fold), encoders.Card("tiny", "test_resnet", embedding_dim=16), folder)
    given = [f"thesis={tmp_path}/{{experiment}}/encoders/thesis-*"]
    for fold in (0, 1):
        (*_, found) = robustness.methods(f"eurosat-fold{fold}", given, [], tiny_encoder(), sample_pack)
        assert found.name == "thesis"
        assert torch.equal(found.encoder.conv1[0].weight, tiny_encoder(seed=fold).conv1[0].weight)


def test_the_page_says_what_the_record_of_five_folds_says():
    folder = files.project_root() / "docs"
    table = results.read_table(folder / "findings" / "robustness_folds.parquet")
    assert set(table["images"]) == {997}
    lost = 13 - table["code"].map(lambda code: int(code).bit_count())
    means = 100 * table.assign(lost=lost).groupby(["lost", "method"])["accuracy"].mean().unstack()
    page = (folder / "findings.md").read_text(encoding="utf-8").split("**The same on all five folds**")[1]
    rows = {int(line.split(" | ")[0][2:]): line for line in page.splitlines() if re.match(r"\| \d+ \| \d+ \|", line)}
    assert sorted(rows) == list(range(14))
    for number, line in rows.items():
        _, subsets, *cells = line.strip("| ").split(" | ")
        assert int(subsets) == table[lost == number]["code"].nunique()
        shown = [float(cell.split(" [")[0]) for cell in cells[:3]]
        assert shown == pytest.approx(means.loc[number, ["pre-trained", "ridge", "any-band"]].tolist(), abs=0.051)
