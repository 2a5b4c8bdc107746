"""What fine-tuning minimises: the thesis' symmetric CLIP loss, and beyond it distances of embeddings and feature maps.

Source: thesis §2.1.2 (Figures 2.1 to 2.3) and §3.3.1; the scale is SatCLIP's, kept fixed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

LOGIT_SCALE_LOG = 2.8952996730804443  # learnt by SatCLIP ResNet50 L40; its checkpoint carries it
LOGIT_SCALE = math.exp(LOGIT_SCALE_LOG)  # 18.089, the thesis' temperature τ
ALIGN = ("embedding", "features", "both")


def clip_loss(incomplete: Tensor, complete: Tensor, logit_scale: float = LOGIT_SCALE) -> Tensor:
    """Cross-entropy of matching each incomplete image with its own complete one, and the other way round.

    Student embeddings (N, D) of masked images and teacher embeddings (N, D) of the same images, of any length, give the
    mean over both directions, a scalar in float32 whatever the autocast dtype. N equal similarities give log N, so
    compare losses at one batch size only. A ValueError where shapes differ, or of fewer than two images.
    """
    if incomplete.shape != complete.shape or incomplete.ndim != 2 or len(incomplete) < 2:
        raise ValueError(
            f"clip_loss needs two (N, D) batches of the same images, N ≥ 2; got {tuple(incomplete.shape)} and "
            f"{tuple(complete.shape)}"
        )
    with torch.autocast(incomplete.device.type, enabled=False):  # autocast would take the product in bfloat16
        student = F.normalize(incomplete.float(), dim=1)
        teacher = F.normalize(complete.float(), dim=1)
        logits = logit_scale * student @ teacher.T  # (N, N)
        target = torch.arange(len(logits), device=logits.device)
        return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def distance(incomplete: Tensor, complete: Tensor) -> Tensor:
    """Squared distance to the target as a share of the target's own squared length, mean over images.

    Of embeddings (N, D) or feature maps (N, C, H, W) of student and teacher. What a cosine leaves free, an embedding's
    length, counts here. Each image and each feature level weighs alike, whatever its scale: 0 is equal, 1 is what an
    output of zero has. A scalar in float32 whatever the autocast dtype; a ValueError where shapes differ.
    """
    if incomplete.shape != complete.shape:
        raise ValueError(
            f"distance needs two tensors of one shape; got {tuple(incomplete.shape)} and {tuple(complete.shape)}"
        )
    with torch.autocast(incomplete.device.type, enabled=False):
        target = complete.float().flatten(1)
        error = (incomplete.float().flatten(1) - target).square().sum(1)
        return (error / target.square().sum(1).clamp(min=1e-12)).mean()


@dataclass(frozen=True)
class Objective:
    """What the student is pulled to: a weighted sum of terms that are about 1 at the start or less."""

    clip: float = 1.0  # of `clip_loss` between embeddings; the thesis has this term alone
    distance: float = 0.0  # of `distance` between embeddings, which keeps their length
    features: float = 0.0  # of `distance` between feature maps, mean over levels

    def __post_init__(self) -> None:
        """Check every field."""
        weights = (self.clip, self.distance, self.features)
        if not all(math.isfinite(weight) and weight >= 0 for weight in weights) or not any(weights):
            raise ValueError(f"weights of an objective are 0 or more and not all 0; got {weights}")

    @classmethod
    def of(cls, align: str = "embedding", *, distance: float = 0.0) -> Objective:
        """From a parameter: `embedding` (the thesis), `features`, or `both`; a ValueError for another word."""
        if align not in ALIGN:
            raise ValueError(f"unknown alignment {align!r}; available: {', '.join(ALIGN)}")
        return cls(float(align != "features"), distance, float(align != "embedding"))

    def __call__(
        self,
        incomplete: Tensor,
        complete: Tensor,
        maps: Mapping[str, Tensor] | None = None,
        targets: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """The loss of a step: of embeddings (N, D), and of feature maps (N, C, H, W) by level where `features` counts.

        `incomplete` and `maps` are the student's, `complete` and `targets` the teacher's of the same images.
        """
        total = torch.zeros((), device=incomplete.device)
        if self.clip:
            total = total + self.clip * clip_loss(incomplete, complete)
        if self.distance:
            total = total + self.distance * distance(incomplete, complete)
        if self.features:
            if not maps or not targets:
                raise ValueError("aligning features needs feature maps of student and teacher; this encoder gave none")
            levels = [distance(maps[name], targets[name]) for name in targets]
            total = total + self.features * torch.stack(levels).mean()
        return total
