"""Scores are those of scikit-learn and torchmetrics, also where classes are absent, ignored, or nothing is left."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import sklearn.metrics
import torch
import torchmetrics.functional.classification as reference
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torchmetrics.functional.classification import multiclass_confusion_matrix

from bandmask.metrics import class_iou, scores


def confusion_matrix(p, t, c, ignore=None):
    return multiclass_confusion_matrix(p.flatten(), t.flatten(), c, ignore_index=ignore)


IGNORE = 255
NAMES = {"overall_accuracy", "macro_accuracy", "miou_all", "miou_present"}


@st.composite
def predictions(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor, int, torch.Tensor]:
    """Predicted, target, number of classes, and which targets to ignore; some classes are usually absent."""
    classes = draw(st.integers(2, 8))
    size = draw(st.integers(1, 60))
    pool = st.integers(0, classes - 1)
    target = draw(st.lists(pool, min_size=size, max_size=size))
    predicted = draw(st.lists(pool, min_size=size, max_size=size))
    ignored = draw(st.lists(st.booleans(), min_size=size, max_size=size))
    return torch.tensor(predicted), torch.tensor(target), classes, torch.tensor(ignored)


@settings(max_examples=60, deadline=None)
@given(predictions())
def test_confusion_matrix_is_scikit_learns(case: tuple[torch.Tensor, torch.Tensor, int, torch.Tensor]):
    predicted, target, classes, ignored = case
    kept = ~ignored
    counts = confusion_matrix(predicted, target.masked_fill(ignored, IGNORE), classes, ignore=IGNORE)
    assert counts.dtype == torch.int64
    assert counts.shape == (classes, classes)
    assert counts.sum() == kept.sum()
    if kept.any():
        expected = sklearn.metrics.confusion_matrix(target[kept], predicted[kept], labels=range(classes))
        assert np.array_equal(counts.numpy(), expected)


@settings(max_examples=60, deadline=None)
@given(predictions())
def test_scores_are_scikit_learns(case: tuple[torch.Tensor, torch.Tensor, int, torch.Tensor]):
    predicted, target, classes, _ = case
    found = scores(confusion_matrix(predicted, target, classes))
    jaccard = sklearn.metrics.jaccard_score(target, predicted, labels=range(classes), average=None, zero_division=0)
    present = np.unique(target)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scikit-learn warns of predicted classes that are not in the target
        macro = sklearn.metrics.balanced_accuracy_score(target, predicted)
    assert found.keys() == NAMES
    assert found["overall_accuracy"] == pytest.approx(sklearn.metrics.accuracy_score(target, predicted))
    assert found["macro_accuracy"] == pytest.approx(macro)
    assert found["miou_all"] == pytest.approx(jaccard.mean())
    assert found["miou_present"] == pytest.approx(jaccard[present].mean())


@settings(max_examples=40, deadline=None)
@given(predictions())
def test_scores_are_torchmetrics(case: tuple[torch.Tensor, torch.Tensor, int, torch.Tensor]):
    predicted, target, classes, ignored = case
    target = target.masked_fill(ignored, IGNORE)
    assume((target != IGNORE).any())
    counts = confusion_matrix(predicted, target, classes, ignore=IGNORE)
    options = {"num_classes": classes, "ignore_index": IGNORE}
    iou = reference.multiclass_jaccard_index(predicted, target, average="none", **options)
    accuracy = reference.multiclass_accuracy(predicted, target, average="micro", **options)
    assert scores(counts)["overall_accuracy"] == pytest.approx(float(accuracy), abs=1e-6)
    np.testing.assert_allclose(class_iou(counts).nan_to_num(0).numpy(), iou.numpy(), atol=1e-6)


def test_by_hand_with_an_absent_and_a_never_true_class():
    # rows true: class 2 is never true but predicted once, class 3 occurs nowhere
    counts = torch.tensor([[3, 1, 0, 0], [0, 4, 1, 0], [0, 0, 0, 0], [0, 0, 0, 0]])
    iou = [3 / 4, 4 / 6, 0.0]
    assert scores(counts) == pytest.approx(
        {
            "overall_accuracy": 7 / 9,
            "macro_accuracy": (3 / 4 + 4 / 5) / 2,
            "miou_all": sum(iou) / 4,
            "miou_present": (iou[0] + iou[1]) / 2,
        }
    )
    per_class = class_iou(counts)
    assert per_class.dtype == torch.float64
    assert per_class[:3].tolist() == pytest.approx(iou)
    assert per_class[3].isnan()


def test_the_thesis_average_accuracy_is_overall_not_macro():
    """Figure 3.3: Σ CM_ii / ΣΣ CM_ij; with unequal classes the mean over classes is another number."""
    counts = torch.tensor([[90, 0], [10, 0]])
    assert scores(counts)["overall_accuracy"] == pytest.approx(0.9)
    assert scores(counts)["macro_accuracy"] == pytest.approx(0.5)


@pytest.mark.parametrize("size", [0, 5])
def test_nothing_left_is_nan_not_zero(size: int):
    target = torch.full((size,), IGNORE)
    counts = confusion_matrix(torch.zeros(size, dtype=torch.long), target, 4, ignore=IGNORE)
    assert counts.sum() == 0
    found = scores(counts)
    assert found.keys() == NAMES
    assert all(math.isnan(value) for value in found.values())
    assert class_iou(counts).isnan().all()


def test_perfect_prediction_scores_one():
    target = torch.tensor([0, 1, 2, 2, 1])
    found = scores(confusion_matrix(target, target, 3))
    assert found == dict.fromkeys(found, 1.0)


def test_ignored_pixels_of_a_map_do_not_count_whatever_is_predicted_there():
    draw = torch.Generator().manual_seed(0)
    target = torch.randint(0, 5, (2, 16, 16), generator=draw)
    predicted = torch.randint(0, 5, (2, 16, 16), generator=draw)
    hole = torch.rand(2, 16, 16, generator=draw) < 0.4
    target[hole] = IGNORE
    counts = confusion_matrix(predicted, target, 5, ignore=IGNORE)
    changed = torch.where(hole, (predicted + 1) % 5, predicted)
    assert torch.equal(confusion_matrix(changed, target, 5, ignore=IGNORE), counts)
    assert counts.sum() == (~hole).sum()


def test_large_counts_are_exact():
    """A test split of maps holds more pixels than float32 can count (2^24)."""
    counts = torch.tensor([[2**40 + 1, 0], [1, 2**40]])
    assert scores(counts)["overall_accuracy"] == (2**41 + 1) / (2**41 + 2)


def test_a_class_out_of_range_is_an_error():
    with pytest.raises((RuntimeError, ValueError), match="3"):
        confusion_matrix(torch.tensor([0, 1]), torch.tensor([0, 3]), 3)
