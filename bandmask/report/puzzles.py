"""What two puzzles of the thesis come down to: how well single images align, and what counting bands changes.

`benchmarks/puzzles.py` measures with them. Source: Petcu 2024, Tables 4.4 and A.6; its appendix leaves the first open.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bandmask import bands
from bandmask.first_layer import first_layer
from bandmask.objectives import LOGIT_SCALE
from bandmask.report.printed import printed_rows
from bandmask.resampling import interval


def alignment_of_images(incomplete: Tensor, complete: Tensor) -> tuple[Tensor, Tensor]:
    """CLIP loss and cosine similarity of each image of a batch; the mean of the losses is `objectives.clip_loss`.

    Args:
        incomplete: student embeddings of masked images, (N, D).
        complete: teacher embeddings of the same images, (N, D).

    Returns:
        Losses and cosines, (N,) each.
    """
    student, teacher = F.normalize(incomplete, dim=1), F.normalize(complete, dim=1)
    logits = LOGIT_SCALE * student @ teacher.T
    target = torch.arange(len(logits), device=logits.device)
    both = [F.cross_entropy(matrix, target, reduction="none") for matrix in (logits, logits.T)]
    return (both[0] + both[1]) / 2, (student * teacher).sum(1)


def with_batch_statistics(encoder: nn.Module) -> nn.Module:
    """A copy in eval mode whose batch norms take each batch's own statistics, as a student's do in training."""
    model = copy.deepcopy(encoder).eval()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean = module.running_var = None  # torch has no others then
    return model


def without_bands(encoder: nn.Module, hidden_bands: Sequence[str]) -> nn.Module:
    """A copy in eval mode whose first layer is blind to these bands, whatever stands in them."""
    model = copy.deepcopy(encoder).eval()
    with torch.no_grad():
        first_layer(model).weight[:, bands.channel_indices(hidden_bands)] = 0
    return model


def moves(mask: str, first: str = "eurosat", second: str = "sen12ms") -> bool:
    """Whether a mask set of the thesis, read by position, hides other bands in one file order than in the other."""
    return bands.resolve_mask(mask, "position", first) != bands.resolve_mask(mask, "position", second)


def gains_of_table_4_4() -> pd.DataFrame:
    """What fine-tuning won in the thesis' segmentation, a row a metric and mask.

    Returns:
        `metric`; `mask`; `gain`, fine-tuned minus pre-trained, in the table's unit; `moves`, as above; `outlying`: one
        of the two figures has an SD above 5 points (`printed.CONTRADICTIONS`, b).
    """
    rows = printed_rows()
    rows = rows[(rows["table"] == "4.4") & (rows["mask"] != "none")]
    found = rows.pivot(index=["metric", "mask"], columns="encoder", values="value")
    found["gain"] = found["finetuned"] - found["pretrained"]
    found["outlying"] = rows.groupby(["metric", "mask"])["marks"].agg("".join).str.contains("b")
    found = found.reset_index().rename_axis(columns=None)
    return found.assign(moves=found["mask"].map(moves))[["metric", "mask", "gain", "moves", "outlying"]]


def permutation_test(first: Sequence[float], second: Sequence[float]) -> tuple[float, float, float, float]:
    """Difference of the means of two small groups, by all ways to divide them: figure, p, and 95 % interval.

    The interval holds every shift of `first` that the two-sided test doesn't reject at 5 %; where there are too few
    ways to reject anything, it is unbounded. Source: Fisher 1935, The Design of Experiments, section 21.
    """
    values, size = np.array([*first, *second], float), len(first)
    places = np.arange(len(values))
    chosen = np.array([np.isin(places, picked) for picked in itertools.combinations(places, size)])  # (ways, values)

    def p(shift: float) -> float:
        moved = values - shift * (places < size)
        gaps = chosen @ moved / size - ~chosen @ moved / (len(values) - size)
        return float((np.abs(gaps) >= abs(gaps[0]) * (1 - 1e-9) - 1e-12).mean())  # the first way is the observed one

    figure = float(values[:size].mean() - values[size:].mean())
    ends = []
    for sign in (-1, 1):
        near, far = 0.0, 1e3 * float(np.ptp(values)) + 1e-9
        if p(figure + sign * far) > 0.05:
            ends.append(sign * float("inf"))
            continue
        while far - near > 1e-6 * max(abs(figure), float(np.ptp(values))):
            middle = (near + far) / 2
            near, far = (middle, far) if p(figure + sign * middle) > 0.05 else (near, middle)
        ends.append(figure + sign * near)
    return figure, p(0.0), ends[0], ends[1]


def paired_interval(
    after: pd.DataFrame, before: pd.DataFrame, column: str, *, draws: int = 2000, seed: int = 0
) -> tuple[float, float, float]:
    """Mean of `after` minus mean of `before` on the same images and seeds, with a 95 % bootstrap interval over both.

    Args:
        after: `sample`, `seed` and `column`; a row an image and seed.
        before: the same.
        column: what is averaged.
        draws: of the bootstrap.
        seed: of the draws.

    Raises:
        ValueError: they are of other images or seeds.
    """
    sides = [frame.pivot(index="seed", columns="sample", values=column) for frame in (after, before)]
    if not (sides[0].index.equals(sides[1].index) and sides[0].columns.equals(sides[1].columns)):
        raise ValueError("a paired difference needs the same images and seeds on both sides; measure both anew")
    values, draw = (sides[0] - sides[1]).to_numpy(), np.random.default_rng(seed)
    seeds, images = (draw.integers(size, size=(draws, size)) for size in values.shape)
    drawn = [values[np.ix_(rows, columns)].mean() for rows, columns in zip(seeds, images, strict=True)]
    return float(values.mean()), *interval(np.array(drawn), 0.95)
