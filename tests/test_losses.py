"""The contrastive loss is the thesis' one: equations of Figures 2.1 to 2.3, symmetric, scaled, and exact."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bandmask.align import LOGIT_SCALE, Objective, clip_loss, distance


def thesis_loss(incomplete: np.ndarray, complete: np.ndarray, tau: float) -> float:
    """Figures 2.1 to 2.3, summand by summand, in float64."""

    def cosine(a: np.ndarray, b: np.ndarray) -> float:  # Figure 2.3
        return tau * float(a @ b) / (float(np.sqrt(a @ a)) * float(np.sqrt(b @ b)))

    def cross_entropy(n: int, xs: np.ndarray, ys: np.ndarray) -> float:  # Figure 2.2
        similarities = [cosine(xs[n], y) for y in ys]
        return -math.log(math.exp(similarities[n]) / sum(math.exp(s) for s in similarities))

    size = len(incomplete)  # Figure 2.1
    first = sum(cross_entropy(n, incomplete, complete) for n in range(size))
    second = sum(cross_entropy(n, complete, incomplete) for n in range(size))
    return (first + second) / (2 * size)


def pair(size: int, dim: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    draw = np.random.default_rng(seed)
    first = draw.normal(size=(size, dim))
    return torch.tensor(first, dtype=dtype), torch.tensor(first + draw.normal(size=(size, dim)), dtype=dtype)


@given(size=st.integers(2, 12), dim=st.integers(2, 24), seed=st.integers(0, 10_000), tau=st.floats(0.5, 30))
def test_equals_the_thesis_equations(size, dim, seed, tau):
    incomplete, complete = pair(size, dim, seed)
    expected = thesis_loss(incomplete.double().numpy(), complete.double().numpy(), tau)
    assert float(clip_loss(incomplete, complete, tau)) == pytest.approx(expected, rel=2e-5, abs=2e-5)
    assert math.exp(2.8952996730804443) == LOGIT_SCALE, "SatCLIP's"
    assert Objective()(incomplete, complete) == clip_loss(incomplete, complete)


def test_gradient_equals_finite_differences_in_float64():
    incomplete, complete = pair(5, 6, seed=3)
    incomplete.requires_grad_()
    clip_loss(incomplete, complete).backward()
    assert complete.grad is None
    at, target, step = incomplete.detach().double().numpy(), complete.double().numpy(), 1e-6
    expected = np.empty_like(at)
    for place in np.ndindex(*at.shape):
        up, down = at.copy(), at.copy()
        up[place] += step
        down[place] -= step
        expected[place] = (thesis_loss(up, target, LOGIT_SCALE) - thesis_loss(down, target, LOGIT_SCALE)) / (2 * step)
    np.testing.assert_allclose(incomplete.grad.numpy(), expected, rtol=1e-3, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_computed_in_float32_whatever_comes(dtype):
    incomplete, complete = pair(16, 32, dtype=dtype)
    loss = clip_loss(incomplete, complete)
    assert (loss.dtype, loss.ndim) == (torch.float32, 0)
    torch.testing.assert_close(loss, clip_loss(incomplete.float(), complete.float()), rtol=0, atol=0)
    long = torch.tensor([[300.0], [-300.0]], dtype=dtype).expand(2, 8)  # squares overflow float16
    assert torch.isfinite(clip_loss(long, long))


def test_computed_in_float32_under_autocast():
    """Logits reach ±18, where bfloat16 has steps of 0.06 to 0.12: the product of embeddings must leave autocast."""
    incomplete, complete = torch.randn(2, 32, 64, generator=torch.Generator().manual_seed(0))
    incomplete.requires_grad_()
    expected = clip_loss(incomplete, complete)
    gradient = torch.autograd.grad(expected, incomplete)[0]
    with torch.autocast("cpu", torch.bfloat16):
        found = clip_loss(incomplete, complete)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(torch.autograd.grad(found, incomplete)[0], gradient, rtol=1e-5, atol=1e-7)


# --- beyond the thesis ----------------------------------------------------------------------------------------------


def test_distance_is_the_squared_error_as_a_share_of_the_target():
    student, teacher = pair(5, 9, dtype=torch.float64)
    error = ((student - teacher) ** 2).sum(1) / (teacher**2).sum(1)
    assert float(distance(student, teacher)) == pytest.approx(float(error.mean()), rel=1e-6)
    assert float(distance(teacher, teacher)) == 0
    assert float(distance(torch.zeros_like(teacher), teacher)) == pytest.approx(1)
    assert float(distance(2 * teacher, teacher)) == pytest.approx(1), "length counts, unlike in a cosine"


def test_levels_of_features_weigh_alike_whatever_their_scale():
    student, teacher = torch.randn(3, 4, 5, 5), torch.randn(3, 4, 5, 5)
    assert torch.allclose(distance(1000 * student, 1000 * teacher), distance(student, teacher))
    zeros = torch.zeros(2, 4, 3, 3)
    assert distance(zeros, zeros) == 0, "a dead level is no error"


def test_an_objective_is_the_weighted_sum_of_its_terms():
    incomplete, complete = pair(4, 6)
    maps = {"layer1": torch.randn(4, 3, 4, 4), "layer4": torch.randn(4, 5, 2, 2)}
    targets = {"layer1": torch.randn(4, 3, 4, 4), "layer4": torch.randn(4, 5, 2, 2)}
    levels = [distance(maps[name], targets[name]) for name in maps]
    expected = 0.5 * clip_loss(incomplete, complete) + 2 * distance(incomplete, complete)
    expected = expected + 3 * (levels[0] + levels[1]) / 2
    found = Objective(clip=0.5, distance=2, features=3)(incomplete, complete, maps, targets)
    assert torch.allclose(found, expected)


def test_aligning_features_alone_leaves_the_embedding_out():
    student, teacher = pair(4, 6)
    student.requires_grad_()
    maps = {"layer1": torch.randn(4, 3, 4, 4, requires_grad=True)}
    Objective.of("features")(student, teacher, maps, {"layer1": torch.randn(4, 3, 4, 4)}).backward()
    assert student.grad is None
    assert maps["layer1"].grad is not None


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Objective.of("pixels"), "unknown alignment 'pixels'; available: embedding, features, both"),
        (lambda: Objective(clip=0), "not all 0"),
        (lambda: Objective(distance=-1), "0 or more"),
        (lambda: Objective(features=math.nan), "0 or more"),
        (lambda: Objective.of("features")(torch.rand(2, 3), torch.rand(2, 3)), "this encoder gave none"),
        (lambda: distance(torch.rand(2, 3), torch.rand(3, 2)), r"\(2, 3\) and \(3, 2\)"),
        (lambda: clip_loss(torch.ones(4, 8), torch.ones(5, 8)), r"two \(N, D\) batches.*\(4, 8\) and \(5, 8\)"),
        (lambda: clip_loss(torch.ones(1, 8), torch.ones(1, 8)), "N ≥ 2"),
        (lambda: clip_loss(torch.ones(2, 4, 8), torch.ones(2, 4, 8)), r"two \(N, D\) batches"),
    ],
)
def test_objectives_that_say_nothing_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
