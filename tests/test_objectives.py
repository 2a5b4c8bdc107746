"""The contrastive loss is the thesis' one: equations of Figures 2.1 to 2.3, symmetric, scaled, and exact."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bandmask.objectives import LOGIT_SCALE, clip_loss


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


def test_scale_is_satclips():
    assert math.exp(2.8952996730804443) == LOGIT_SCALE
    assert round(LOGIT_SCALE, 3) == 18.089


@settings(max_examples=40, deadline=None)
@given(size=st.integers(2, 12), dim=st.integers(2, 24), seed=st.integers(0, 10_000), tau=st.floats(0.5, 30))
def test_equals_the_thesis_equations(size: int, dim: int, seed: int, tau: float):
    incomplete, complete = pair(size, dim, seed)
    expected = thesis_loss(incomplete.double().numpy(), complete.double().numpy(), tau)
    assert float(clip_loss(incomplete, complete, tau)) == pytest.approx(expected, rel=2e-5, abs=2e-5)


def test_default_scale_is_the_fixed_one():
    incomplete, complete = pair(6, 8)
    expected = thesis_loss(incomplete.double().numpy(), complete.double().numpy(), LOGIT_SCALE)
    assert float(clip_loss(incomplete, complete)) == pytest.approx(expected, rel=1e-5)


def test_gradient_equals_finite_differences_in_float64():
    incomplete, complete = pair(5, 6, seed=3)
    incomplete.requires_grad_()
    clip_loss(incomplete, complete).backward()
    at, target, step = incomplete.detach().double().numpy(), complete.double().numpy(), 1e-6
    expected = np.empty_like(at)
    for place in np.ndindex(*at.shape):
        up, down = at.copy(), at.copy()
        up[place] += step
        down[place] -= step
        expected[place] = (thesis_loss(up, target, LOGIT_SCALE) - thesis_loss(down, target, LOGIT_SCALE)) / (2 * step)
    np.testing.assert_allclose(incomplete.grad.numpy(), expected, rtol=1e-3, atol=2e-6)


def test_a_frozen_teacher_gets_no_gradient_and_the_student_gets_one():
    incomplete, complete = pair(4, 8)
    incomplete.requires_grad_()
    clip_loss(incomplete, complete).backward()
    assert complete.grad is None
    assert incomplete.grad is not None
    assert incomplete.grad.abs().sum() > 0


@pytest.mark.parametrize("size", [2, 7, 64])
def test_equal_embeddings_give_log_n(size: int):
    same = torch.ones(size, 16)
    assert float(clip_loss(same, same)) == pytest.approx(math.log(size), rel=1e-6)


def test_perfect_and_worst_matches():
    basis = torch.eye(8)
    right = math.log1p(7 * math.exp(-LOGIT_SCALE))
    assert float(clip_loss(basis, basis)) == pytest.approx(right, abs=1e-6)
    wrong = math.log(7 + math.exp(LOGIT_SCALE))  # each is nearest to another's
    assert float(clip_loss(basis, basis.roll(1, 0))) == pytest.approx(wrong, rel=1e-6)


def test_length_of_embeddings_does_not_matter():
    incomplete, complete = pair(8, 16)
    lengths = torch.logspace(-3, 3, 8)[:, None]
    torch.testing.assert_close(clip_loss(incomplete * lengths, complete / lengths), clip_loss(incomplete, complete))


def test_symmetric_and_blind_to_the_order_of_images():
    incomplete, complete = pair(9, 16)
    loss = clip_loss(incomplete, complete)
    torch.testing.assert_close(clip_loss(complete, incomplete), loss)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(clip_loss(incomplete[order], complete[order]), loss)
    assert not torch.isclose(clip_loss(incomplete[order], complete), loss)  # the pairing does matter


def test_gradients_follow_a_permutation():
    incomplete, complete = pair(7, 5)
    order = torch.randperm(7, generator=torch.Generator().manual_seed(1))
    first, second = incomplete.clone().requires_grad_(), incomplete[order].clone().requires_grad_()
    clip_loss(first, complete).backward()
    clip_loss(second, complete[order]).backward()
    torch.testing.assert_close(second.grad, first.grad[order])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_computed_in_float32_whatever_comes(dtype: torch.dtype):
    incomplete, complete = pair(16, 32, dtype=dtype)
    loss = clip_loss(incomplete, complete)
    assert loss.dtype == torch.float32
    assert loss.ndim == 0
    torch.testing.assert_close(loss, clip_loss(incomplete.float(), complete.float()), rtol=0, atol=0)


def test_half_precision_embeddings_too_long_for_half_arithmetic():
    """Squares of 300 overflow float16: normalising before the cast would give NaN."""
    long = torch.full((4, 8), 300.0, dtype=torch.float16) * torch.tensor([[1], [-1], [1], [-1]], dtype=torch.float16)
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


@pytest.mark.parametrize(
    ("first", "second"),
    [((4, 8), (4, 7)), ((4, 8), (5, 8)), ((1, 8), (1, 8)), ((0, 8), (0, 8)), ((4,), (4,)), ((2, 4, 8), (2, 4, 8))],
)
def test_wrong_shapes_are_errors_that_show_both(first: tuple[int, ...], second: tuple[int, ...]):
    with pytest.raises(ValueError, match=r"two \(N, D\) batches") as error:
        clip_loss(torch.ones(first), torch.ones(second))
    assert str(first) in str(error.value)
    assert str(second) in str(error.value)
