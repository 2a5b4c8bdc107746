from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from types import ModuleType

import pytest
import torch

from bandmask import encoders, files, masking, objectives
from bandmask.packs import Pack


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(files.project_root() / "benchmarks")
        yield importlib.import_module("puzzles")


@pytest.fixture
def world(script: ModuleType, make_pack: Callable[..., Pack], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(script, "BATCH", 8)
    pack = make_pack(tmp_path, n=96, size=32)
    teacher = encoders.create_encoder("resnet18", embedding_dim=16).eval()
    card = encoders.Card("random", "resnet18", embedding_dim=16)
    return script.World(pack, teacher, card, tmp_path / "kept", 32, epochs=1)


def test_what_nothing_changes_is_compared_with_itself(script):
    """Every condition is one step from the thesis' own, and each ratio of 0.9 has its 1.0."""
    wanted = list(script.conditions())
    assert len(set(wanted)) == len(wanted)
    for condition in wanted:
        plain = script.Condition(condition.bands)
        changed = [name for name, value in asdict(condition).items() if value != getattr(plain, name)]
        assert len([name for name in changed if name != "ratio"]) <= 1, condition
    for condition in wanted:
        if condition.ratio == 0.9 and condition.shape == "pixel" and "before" in condition.enlarged:
            assert replace(condition, ratio=1.0) in wanted


def test_losses_are_those_that_fine_tuning_watches_and_finished_steps_are_kept(script, world):
    condition = script.Condition("B08", ratio=0.9)
    rows = script.measured(world, [condition])
    spec, fill = masking.MaskSpec(("B08",), 0.9), world.fill("dataset_mean", "B08")
    losses = []
    with torch.no_grad():
        for images, samples in world.test:
            incomplete = world.teacher(masking.mask_batch(images, samples, spec, fill))
            losses.append(objectives.clip_loss(incomplete, world.teacher(images)))
    assert rows["loss"].mean() == pytest.approx(float(torch.stack(losses).mean()), rel=1e-5)
    (path,) = world.folder.rglob("*.parquet")
    before = path.stat().st_mtime_ns
    assert script.measured(world, [condition]).equals(rows)
    assert path.stat().st_mtime_ns == before


def test_the_report_says_for_what_a_whole_loss_is_easier(script, world, capsys):
    wanted = [c for c in script.conditions() if c.bands == "B08" and c.fill == "dataset_mean"]
    script.report_without_training(script.measured(world, wanted))
    said = capsys.readouterr().out
    assert "| B08     | dataset_mean | running statistics |" in said
    assert "- Without training, dataset_mean, batch statistics: " in said


def test_fine_tuned_encoders_are_kept_and_compared_by_ratio(script, world, capsys):
    rows, histories = script.measured_tuned(world, ["B08"], ["train"], [0])
    assert set(rows["trained"]) == set(rows["ratio"]) == {0.9, 1.0}
    students = {path: path.stat().st_mtime_ns for path in world.folder.rglob("model.safetensors")}
    assert len(students) == 2
    assert script.measured_tuned(world, ["B08"], ["train"], [0])[0].equals(rows)
    assert students == {path: path.stat().st_mtime_ns for path in students}
    script.report_tuned(rows, histories)
    assert "loss at 1.0 minus at 0.9" in capsys.readouterr().out


def test_the_thesis_own_numbers_answer_the_order(script, capsys):
    script.report_table_4_4()
    said = capsys.readouterr().out
    assert "miou: mean gain of 7 moved masks −0.015, of 4 others −0.015 (above 0: 0)" in said
    assert "Counting bands doesn't explain it" in said
    assert "| B4 B8 B9 B13      | B04 B08 B8A B09        | B04 B08 B8A B12" in said
