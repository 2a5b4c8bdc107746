"""Counts to scores: everything is derived from one confusion matrix.

Source: thesis §3.3.2. Its "average accuracy" is the overall accuracy here (Figure 3.3).
"""

from __future__ import annotations

import torch
from torch import Tensor


def confusion_matrix(predicted: Tensor, target: Tensor, classes: int, ignore: int | None = None) -> Tensor:
    """Counts (C, C) int64, rows true, columns predicted; targets equal to `ignore` are left out."""
    from torchmetrics.functional.classification import multiclass_confusion_matrix

    return multiclass_confusion_matrix(predicted.flatten(), target.flatten(), classes, ignore_index=ignore)


def scores(confusion: Tensor) -> dict[str, float]:
    """Scores of a confusion matrix; those of an empty one are NaN.

    Returns:
        `overall_accuracy`: share of all that is right. `macro_accuracy`: mean recall over classes that occur in the
        target. `miou_all`: mean IoU over all classes, absent ones (no target, no prediction) counted as 0, as a
        plain mean over C does. `miou_present`: over classes that occur in the target.
    """
    counts = confusion.double()
    right, true, predicted = counts.diagonal(), counts.sum(1), counts.sum(0)
    present = true > 0
    union = true + predicted - right
    iou = torch.where(union > 0, right / union.clamp(min=1), torch.zeros_like(union))
    if not present.any():
        return dict.fromkeys(("overall_accuracy", "macro_accuracy", "miou_all", "miou_present"), float("nan"))
    return {
        "overall_accuracy": float(right.sum() / counts.sum()),
        "macro_accuracy": float((right[present] / true[present]).mean()),
        "miou_all": float(iou.mean()),
        "miou_present": float(iou[present].mean()),
    }


def class_iou(confusion: Tensor) -> Tensor:
    """Intersection over union per class, (C,) float64; NaN where a class is neither in target nor in prediction."""
    counts = confusion.double()
    right = counts.diagonal()
    return right / (counts.sum(0) + counts.sum(1) - right)
