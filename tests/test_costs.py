"""Costs counted beforehand are what training really puts through networks; hours follow from measured speeds.

Images are generated. The counters sit on the first convolution of the encoder and of the decoders.
"""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from models import TINY, generated_images, tiny_encoder
from torch import nn

from bandmask import alignment, classification, maps, segmentation
from bandmask.batches import Batches
from bandmask.decoders import SegmentationDecoders, create_decoder
from bandmask.masking import MaskSpec
from bandmask.packs import Pack
from bandmask.readers import packing
from bandmask.runs import costs
from bandmask.runs.costs import Cost, Throughput
from bandmask.runs.inputs import Images
from bandmask.training import Compute
from bandmask.views import View, tap_channels

CPU = Compute.of("cpu")
SIZE = 32
COUNTS = Images(10, 3, 5)
FILL = torch.full((13,), 0.2)
PARAMETERS: dict[str, Any] = {
    "tasks": ["classification", "segmentation"],
    "encoder": "stand-in",
    "architecture": TINY,
    "image_size": SIZE,
    "segmentation_image_size": SIZE,
    "seeds": [0, 1],
    "batch_size": 4,
    "epochs_one_band": 2,
    "epochs_several_bands": 3,
    "head_epochs": 3,
    "head_seeds": [0, 1, 2],
    "encoder_passes": 0,
    "decoder_epochs": 3,
    "decoder_seeds": [0, 1],
    "decoder_batch_size": 4,
    "decoder_width": 8,
    "decoder_passes": 0,
}
NO_TASKS = {**PARAMETERS, "tasks": []}


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Pack:
    """10 + 3 + 5 generated images with generated targets: no split is a multiple of a batch."""
    images, labels = generated_images(18, SIZE)
    targets = np.repeat(labels.astype(np.uint8), SIZE * SIZE).reshape(18, SIZE, SIZE)
    return packing.write_pack(
        tmp_path_factory.mktemp("pack") / "generated",
        zip(images, targets, strict=True),
        pd.DataFrame({"label": labels, "split": ["train"] * 10 + ["val"] * 3 + ["test"] * 5}),
        name="generated",
        classes=["a", "b", "c"],
        source="generated for a test",
        source_checksum="costs",
        targets=True,
    )


def counted(module: nn.Module) -> SimpleNamespace:
    """Images that go through a module, in train and in eval mode; copies of the module count into the same."""
    seen = SimpleNamespace(training=0, frozen=0)

    def count(module: nn.Module, given: tuple[torch.Tensor, ...], _: torch.Tensor) -> None:
        kind = "training" if module.training else "frozen"
        setattr(seen, kind, getattr(seen, kind) + len(given[0]))

    module.register_forward_hook(count)
    return seen


@pytest.mark.parametrize(("hidden", "epochs"), [(("B08",), 2), (("B02", "B08"), 3)])
def test_fine_tuning_puts_through_what_was_counted(pack: Pack, hidden: tuple[str, ...], epochs: int):
    """As notebook 03 does it."""
    encoder = tiny_encoder()
    seen = counted(encoder.conv1)
    assert costs.epochs_of(NO_TASKS, len(hidden)) == epochs
    for seed in NO_TASKS["seeds"]:
        spec = MaskSpec(hidden, seed=seed)
        options = {"batch_size": 4, "image_size": SIZE, "compute": CPU}
        student, _ = alignment.fine_tune(encoder, pack, spec, FILL, epochs=epochs, **options)
        tested = Batches(pack, "test", batch_size=4, image_size=SIZE, shuffle=True, drop_last=True)
        alignment.alignment_scores(student, encoder, tested, spec, FILL, CPU)
    expected = costs.run_cost(NO_TASKS, hidden=len(hidden), first=False, scenes=COUNTS)
    assert seen.training == expected.fine_tuning
    assert seen.frozen == expected.embedding + expected.fine_tuning, "the teacher sees each step's images too"


@pytest.mark.parametrize("passes", [0, 2])
def test_scenes_put_through_what_was_counted(pack: Pack, tmp_path: Path, passes: int):
    """As notebook 04 does it: `none` first, then a mask, with the encoders of two seeds."""
    encoder = tiny_encoder()
    seen = counted(encoder.conv1)
    complete = View(encoder, MaskSpec(), FILL, SIZE)
    incomplete = View(encoder, MaskSpec(("B08",)), FILL, SIZE)
    options = {"epochs": 3, "passes": passes, "compute": CPU}

    def scenes(methods: int) -> int:
        heads, before = [], seen.frozen
        service, _ = classification.train_heads(complete, pack, **options, checkpoint=tmp_path / "service.pt")
        classification.predict(complete, service, pack, compute=CPU)
        for _ in range(methods):
            classification.predict(incomplete, service, pack, compute=CPU)
            heads.append(classification.train_heads(incomplete, pack, **options)[0])
            classification.predict(incomplete, heads[-1], pack, compute=CPU)
        return seen.frozen - before

    parameters = {**PARAMETERS, "tasks": ["classification"], "encoder_passes": passes}
    for hidden, first, methods in ((0, True, 0), (1, False, 4)):
        both = costs.run_cost(parameters, hidden=hidden, first=first, scenes=COUNTS)
        alone = costs.run_cost(NO_TASKS, hidden=hidden, first=first, scenes=COUNTS)
        assert scenes(methods) == both.embedding - alone.embedding
        assert both.heads == 3 * (methods + first)


@pytest.mark.parametrize("passes", [0, 2])
def test_pixels_put_through_what_was_counted(pack: Pack, tmp_path: Path, passes: int):
    """As notebook 05 does it; the decoders of both seeds share each pass of the encoder."""
    encoder = tiny_encoder()
    complete = View(encoder, MaskSpec(), FILL, SIZE, 4)
    incomplete = View(encoder, MaskSpec(("B08",)), FILL, SIZE, 4)
    low, high = tap_channels(complete, CPU)
    mapped = counted(encoder.conv1)
    options = {"epochs": 3, "passes": passes, "compute": CPU}

    def decoders() -> tuple[SegmentationDecoders, SimpleNamespace]:
        made = SegmentationDecoders([create_decoder(high, low, 3, width=8, seed=s) for s in (0, 1)], (0, 1))
        return made, counted(made.decoders[1].decoder.conv1)

    def pixels(methods: int) -> tuple[int, int, int]:
        before, counters = mapped.frozen, []
        service, seen = decoders()
        counters.append(seen)
        segmentation.train_decoders(complete, pack, service, **options, checkpoint=tmp_path / "service.pt")
        maps.predict(complete, service, pack, compute=CPU)
        for _ in range(methods):
            maps.predict(incomplete, service, pack, compute=CPU)
            own, seen = decoders()
            counters.append(seen)
            segmentation.train_decoders(incomplete, pack, own, **options)
            maps.predict(incomplete, own, pack, compute=CPU)
        return mapped.frozen - before, sum(c.training for c in counters), sum(c.frozen for c in counters)

    parameters = {**PARAMETERS, "tasks": ["segmentation"], "decoder_passes": passes}
    for hidden, first, methods in ((0, True, 0), (1, False, 4)):
        expected = costs.run_cost(parameters, hidden=hidden, first=first, scenes=COUNTS, pixels=COUNTS)
        assert pixels(methods) == (expected.mapping, expected.decoder_training, expected.decoding)
        assert expected.decoders == 2 * (methods + first)


def test_a_small_run_by_hand():
    """10 + 3 + 5 scenes, 9 + 4 + 2 images with pixel labels; batches of 4, two encoder seeds, so four methods."""
    found = costs.run_cost(PARAMETERS, hidden=1, first=False, scenes=COUNTS, pixels=Images(9, 4, 2))
    assert asdict(found) == {
        # 2 seeds · teacher and student · (3 images · (2 + 1) epochs + 4 tested); the loaded head; 4 trainings; 9 tests
        "embedding": 2 * 2 * (3 * 3 + 4) + 3 + 4 * (3 * 10 + 3) + 9 * 5,
        "fine_tuning": 2 * 8 * 2,  # two full batches of 10 images
        "mapping": 4 * (3 * 8 + 4 * 4) + 9 * 2,  # 4 trainings of 3 epochs, watched 4 times; 9 tests
        "decoder_training": 4 * 3 * 8,
        "decoding": 4 * 4 * 4 + 9 * 2,
        "heads": 4 * 3,
        "decoders": 4 * 2,
    }


def test_more_validation_images_than_a_batch_are_watched_in_full_batches():
    found = costs.run_cost(NO_TASKS, hidden=1, first=True, scenes=Images(10, 6, 5))
    assert found.embedding == 2 * 2 * (4 * 3 + 4)


def test_segmentation_without_its_counts_is_an_error():
    with pytest.raises(ValueError, match="give the counts of segmentation_dataset"):
        costs.run_cost(PARAMETERS, hidden=1, first=True, scenes=COUNTS)


def test_hours_are_images_over_speed():
    speed = Throughput(embedding=100, fine_tuning=20, mapping=50, decoder_training=2, decoding=10)
    work = Cost(360_000, 72_000, 180_000, 7_200, 36_000, heads=99, decoders=99)
    assert speed.hours(work) == pytest.approx(1 + 1 + 1 + 1 + 1)
    assert speed.hours(work * 3 + work) == pytest.approx(20)
    assert work.forward == 540_000


def test_work_that_is_not_there_takes_no_time():
    assert Throughput(embedding=1, fine_tuning=1).hours(Cost(embedding=3_600)) == 1


def test_the_median_round_counts_and_the_first_does_not(monkeypatch: pytest.MonkeyPatch):
    """A clock of the test's own: rounds take 100 (warming up), 1, 2 and 50 seconds, and then it is time to stop."""
    now = iter([0, 0, 100, 100, 101, 101, 103, 103, 103, 153, 153])
    monkeypatch.setattr(costs, "time", SimpleNamespace(perf_counter=lambda: next(now)))
    calls = []
    assert costs._rate(lambda: calls.append(1), 6, CPU, seconds=150) == 6 / 2
    assert len(calls) == 4, "the third round ended at 103 seconds, the fourth after 150"


@pytest.mark.parametrize("tasks", [[], ["segmentation"]])
def test_speeds_are_measured_for_the_work_there_is(tasks: list[str]):
    speed = costs.measure({**PARAMETERS, "tasks": tasks}, device="cpu", seconds=0)
    measured = [getattr(speed, work) for work in costs.WORK]
    assert all(rate > 0 for rate in measured)
    assert [math.isfinite(rate) for rate in measured] == [True, True, *([bool(tasks)] * 3)]
    assert f"{TINY} at {SIZE} px" in speed.how
    assert "CPU" in speed.how
