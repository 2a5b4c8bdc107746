"""What fine-tuning minimises: the symmetric CLIP loss between embeddings of incomplete and complete images.

Source: thesis §2.1.2 (Figures 2.1 to 2.3) and §3.3.1; the scale is SatCLIP's, kept fixed.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from bandmask.encoders import LOGIT_SCALE_LOG

LOGIT_SCALE = math.exp(LOGIT_SCALE_LOG)  # 18.089, the thesis' temperature τ


def clip_loss(incomplete: Tensor, complete: Tensor, logit_scale: float = LOGIT_SCALE) -> Tensor:
    """Cross-entropy of matching each incomplete image with its own complete one, and the other way round.

    It depends on the batch size: N equal similarities give log N, so compare losses at one batch size only.

    Args:
        incomplete: student embeddings of masked images, (N, D), any length.
        complete: teacher embeddings of the same images, (N, D).
        logit_scale: multiplies the cosine similarities.

    Returns:
        Mean over both directions, a scalar in float32 whatever the autocast dtype.

    Raises:
        ValueError: shapes differ, or fewer than two images (nothing to contrast).
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
