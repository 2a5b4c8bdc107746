"""Words for people say what was done to a band of real images, most of the time."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from bandmask import bands
from bandmask.diagnosis import verdicts
from bandmask.diagnosis.elimination import Judge
from bandmask.diagnosis.faults import Fault, inject
from bandmask.diagnosis.sketches import Sketch
from bandmask.diagnosis.symptoms import SYMPTOMS
from bandmask.diagnosis.verdicts import looks_like
from bandmask.moments import Moments
from bandmask.packs import Pack


@pytest.fixture(scope="module")
def judge(sample_pack: Pack) -> Judge:
    train = sample_pack.images[sample_pack.rows("train")].astype(np.float32) / 10_000
    return Judge(Moments.of(sample_pack), Sketch.of(train))


@pytest.mark.parametrize(
    ("kind", "amount", "word"),
    [
        ("dead", 0.0, "dead"),
        ("stuck", 0.1, "stuck"),
        ("noisy", 0.01, "noisy"),
        ("striped", 0.01, "striped"),
        ("dead columns", 0.1, "striped"),
        ("offset", 0.05, "offset or gain"),
    ],
)
@pytest.mark.parametrize("name", ["B03", "B11"])
def test_a_plain_fault_is_called_what_it_is(
    judge: Judge, sample_pack: Pack, kind: str, amount: float, word: str, name: str
) -> None:
    import torch

    rows = sample_pack.rows("test")[::12]
    images = torch.from_numpy(sample_pack.images[rows].astype(np.float32) / 10_000)
    broken = Sketch.of(inject(images, torch.from_numpy(rows), Fault(kind, (name,), amount)))
    faulty = np.array(bands.NAMES) == name
    said = Counter(
        judge.words(broken.take(np.array([row])), faulty, np.zeros(13, bool))[name] for row in range(len(rows))
    )
    assert said[word] >= 0.8 * len(rows), said


def test_every_word_can_be_said_and_no_other() -> None:
    said = set()
    for number in range(len(SYMPTOMS)):
        for sign in (-5.0, 5.0):
            for ratio in (-3.0, 1.0):  # of column offsets to noise
                own = np.zeros(9)
                own[SYMPTOMS.index("columns")] = ratio
                away = np.full(9, 0.1)
                away[number] = sign
                said.add(looks_like(away, own, 0.1))
    own = np.full(9, -12.0)
    said |= {looks_like(np.zeros(9), own, mean) for mean in (0.0, 0.1)}
    assert said == set(verdicts.WORDS)
