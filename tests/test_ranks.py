"""Two real processes train as one does: loss, gradients, statistics, hidden pixels, checkpoints and figures.

The reference is never a figure written down here: the same function runs in this process, alone.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import ranked
import torch
from torch import nn

from bandmask import objectives
from bandmask.ranks import JoinedBatchNorm, Ranks, gather, main_first, together

pytestmark = pytest.mark.slow
Found = dict[str, Any]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("ranks")
    ranked.make_pack(made)
    return made


@pytest.fixture(scope="module")
def together_found(folder: Path) -> list[Found]:
    """What each of two ranks found."""
    ran = ranked.run_ranks("equal", folder)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return [torch.load(folder / f"equal-rank{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.fixture(scope="module")
def alone(folder: Path) -> Found:
    return {job.__name__: job(folder) for job in (ranked.one_step, ranked.one_step_in_float64, ranked.two_epochs)}


def furthest(found: Found, expected: Found) -> float:
    """Largest difference of any tensor, as a share of that tensor's largest value (or 1, if that is more)."""
    assert found.keys() == expected.keys()
    worst = 0.0
    for name, value in expected.items():
        scale = max(1.0, float(value.abs().max()))
        worst = max(worst, float((found[name].double() - value.double()).abs().max()) / scale)
    return worst


# --- one batch


@pytest.mark.parametrize(("job", "limit"), [("one_step", 1e-5), ("one_step_in_float64", 1e-10)])
def test_loss_gradients_and_statistics_are_those_of_one_process(
    together_found: list[Found], alone: Found, job: str, limit: float
):
    expected = alone[job]
    assert max(float(gradient.abs().max()) for gradient in expected["gradients"].values()) > 0.01
    for rank in together_found:
        found = rank[job]
        for figure, values in expected["history"].items():
            ours = found["history"][figure]
            assert [math.isnan(value) for value in ours] == [math.isnan(value) for value in values]
            for value, other in zip(values, ours, strict=True):
                assert math.isnan(value) or abs(other - value) <= limit * max(1.0, abs(value))
        assert furthest(found["gradients"], expected["gradients"]) <= limit
        assert furthest(found["state"], expected["state"]) <= limit


def test_hidden_pixels_and_augmentation_do_not_depend_on_the_number_of_ranks(together_found: list[Found], alone: Found):
    expected = alone["two_epochs"]["seen"]
    first, second = (rank["two_epochs"]["seen"] for rank in together_found)
    assert first.keys().isdisjoint(second.keys())  # each its own part
    assert len(first) == len(second)
    assert {**first, **second}.keys() == expected.keys()
    for key, image in {**first, **second}.items():
        channels = ranked.SPEC.channels
        assert torch.equal(image[channels] == -1, expected[key][channels] == -1), key
        torch.testing.assert_close(image, expected[key], rtol=1e-6, atol=1e-6)


# --- a run


def test_a_run_is_that_of_one_process(together_found: list[Found], alone: Found):
    expected = alone["two_epochs"]
    for rank in together_found:
        found = rank["two_epochs"]
        for figure, values in expected["history"].items():
            assert found["history"][figure] == pytest.approx(values, rel=1e-3, nan_ok=True)
        assert furthest(found["state"], expected["state"]) < 1e-3
        assert found["kinds"] == expected["kinds"]  # the student is the plain model again


def test_ranks_end_with_the_same_weights_to_the_last_bit(together_found: list[Found]):
    first, second = (rank["two_epochs"] for rank in together_found)
    assert str(first["history"]) == str(second["history"])
    assert all(torch.equal(value, second["state"][name]) for name, value in first["state"].items())


def test_the_checkpoint_is_the_one_of_one_process(folder: Path, together_found: list[Found], alone: Found):
    (ours,) = (folder / "of-2").iterdir()  # no partial files, no file a rank
    (theirs,) = (folder / "of-1").iterdir()
    assert ours.name == theirs.name  # its name tells settings apart: ranks are none
    found, expected = (torch.load(path, weights_only=True) for path in (ours, theirs))
    assert found["settings"] == expected["settings"]
    assert list(found["model"]) == list(expected["model"])
    assert [list(row) for row in found["history"]] == [list(row) for row in expected["history"]]
    assert torch.equal(found["model"]["conv1.0.weight"], together_found[0]["two_epochs"]["state"]["conv1.0.weight"])


def test_one_process_reads_what_ranks_finished(
    folder: Path, together_found: list[Found], monkeypatch: pytest.MonkeyPatch
):
    """Notebook 03 after torchrun: nothing is trained again."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a finished run must not train")

    monkeypatch.setattr(objectives, "clip_loss", refuse)
    read = ranked.tune(folder, checkpoint=folder / "of-2" / "last.pt")
    assert str(read["history"]) == str(together_found[0]["two_epochs"]["history"])
    assert furthest(read["state"], together_found[0]["two_epochs"]["state"]) == 0


def test_a_run_killed_under_two_ranks_goes_on_in_one(folder: Path, alone: Found):
    ran = ranked.run_ranks("killed", folder)
    assert ran.returncode != 0
    (checkpoint,) = (folder / "killed").iterdir()
    assert len(torch.load(checkpoint, weights_only=True)["history"]) == 2  # the pre-trained encoder, and one epoch
    found = ranked.tune(folder, checkpoint=folder / "killed" / "last.pt")
    assert {epoch for epoch, _ in found["seen"]} == {1, -1}  # only the second epoch was trained here
    for figure, values in alone["two_epochs"]["history"].items():
        assert found["history"][figure] == pytest.approx(values, rel=1e-3, nan_ok=True)
    assert furthest(found["state"], alone["two_epochs"]["state"]) < 1e-3


# --- batch norms


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_a_joined_batch_norm_is_torchs_on_the_joined_batch(
    together_found: list[Found], dtype: torch.dtype, limit: float, momentum: float | None
):
    expected = ranked.through(ranked.norm(nn.BatchNorm2d, dtype, momentum), *ranked.batch_of_norm(dtype))
    parts = [rank["norms"][dtype, momentum] for rank in together_found]
    joined = {name: torch.cat([part[name] for part in parts]) for name in ("out", "images.grad", "eval")}
    summed = {name: parts[0][name] + parts[1][name] for name in ("weight.grad", "bias.grad")}
    kept = {name: parts[0][name] for name in ("running_mean", "running_var", "num_batches_tracked", "weight", "bias")}
    assert furthest({**joined, **summed, **kept}, expected) < limit
    assert all(torch.equal(parts[0][name], parts[1][name]) for name in kept)
    own, above = (whole.split(ranked.PARTS)[0] for whole in ranked.batch_of_norm(dtype))
    apart = ranked.through(ranked.norm(nn.BatchNorm2d, dtype, momentum), own, above)
    assert furthest({"out": apart["out"]}, {"out": joined["out"][: ranked.PARTS[0]]}) > 0.01  # joining matters


def test_a_joined_batch_norm_evaluates_as_torchs():
    images = torch.randn(4, 4, 3, 3)
    ours, theirs = ranked.norm(JoinedBatchNorm, torch.float32, 0.1), ranked.norm(nn.BatchNorm2d, torch.float32, 0.1)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    assert torch.equal(ours.eval()(images), theirs.eval()(images))


# --- what is refused, and being alone


def test_what_cannot_be_trained_together_is_said(together_found: list[Found]):
    found = together_found[1]["guards"]
    assert "1 is a BatchNorm2d whose statistics can't be joined" in found["untracked"]
    assert len(found["dropout"]) == 1
    assert found["dropout"][0].startswith("1 draw at random in training")
    assert "don't agree about epochs done: [0, 1]" in found["disagree"]


def test_the_main_rank_makes_what_the_others_find(together_found: list[Found]):
    assert [rank["guards"]["made_by"] for rank in together_found] == ["0", "0"]


def test_a_process_that_is_alone_notices_nothing():
    assert Ranks.now() == Ranks(0, 1)
    part, model = torch.randn(3, 4), nn.BatchNorm2d(4)
    assert gather(part) is part
    with together(model) as learner, main_first():
        assert learner is model


def test_a_batch_is_shared_only_if_it_can_be_shared_evenly():
    assert Ranks(1, 4).shard_of(64) == (1, 4)
    assert Ranks(1, 4).shard_of(30) == (0, 1)
