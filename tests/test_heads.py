"""Many heads side by side are the same heads as one by one: initial weights, logits, gradients, and Adam's steps."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from bandmask.heads import SceneHeads, scene_head

SEEDS = (0, 1, 7)


def embeddings(count: int = 20, dim: int = 24, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed))


def assert_same_weights(heads: SceneHeads, alone: list[torch.nn.Sequential], **tolerance: float) -> None:
    for k, head in enumerate(alone):
        torch.testing.assert_close(heads.weight1[k].T, head[0].weight, **tolerance)
        torch.testing.assert_close(heads.bias1[k, 0], head[0].bias, **tolerance)
        torch.testing.assert_close(heads.weight2[k].T, head[2].weight, **tolerance)
        torch.testing.assert_close(heads.bias2[k, 0], head[2].bias, **tolerance)


def test_the_thesis_head():
    head = scene_head(256, 10)
    assert [type(layer).__name__ for layer in head] == ["Linear", "ReLU", "Linear"]
    assert [tuple(p.shape) for p in head.parameters()] == [(64, 256), (64,), (10, 64), (10,)]


def test_seed_alone_decides_the_initial_weights():
    torch.manual_seed(1)
    first = scene_head(24, 5, seed=3)
    torch.manual_seed(2)
    second, other = scene_head(24, 5, seed=3), scene_head(24, 5, seed=4)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first.parameters(), other.parameters(), strict=True))


def test_making_heads_leaves_torchs_generator_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    SceneHeads(8, 3, SEEDS)
    assert torch.equal(torch.rand(3), expected)


def test_side_by_side_starts_as_one_by_one():
    heads, alone = SceneHeads(24, 5, SEEDS), [scene_head(24, 5, seed=s) for s in SEEDS]
    assert_same_weights(heads, alone, rtol=0, atol=0)


@pytest.mark.parametrize("hidden", [1, 64])
def test_logits_equal_each_heads_own(hidden: int):
    heads, shared = SceneHeads(24, 5, SEEDS, hidden=hidden), embeddings()
    own = torch.stack([embeddings(seed=s) for s in SEEDS])
    alone = [scene_head(24, 5, hidden=hidden, seed=s) for s in SEEDS]
    torch.testing.assert_close(heads(shared), torch.stack([head(shared) for head in alone]), rtol=1e-6, atol=1e-6)
    expected = torch.stack([head(batch) for head, batch in zip(alone, own, strict=True)])
    torch.testing.assert_close(heads(own), expected, rtol=1e-6, atol=1e-6)
    assert heads(shared).shape == (3, 20, 5)


def test_training_together_equals_training_one_by_one():
    """Adam divides by the gradient's own size, so any leak between heads, or a scaled loss, would show."""
    heads, alone = SceneHeads(24, 5, SEEDS), [scene_head(24, 5, seed=s) for s in SEEDS]
    together = torch.optim.Adam(heads.parameters(), lr=0.01)
    optimizers = [torch.optim.Adam(head.parameters(), lr=0.01) for head in alone]
    for step in range(25):
        batches = torch.stack([embeddings(16, seed=1000 * s + step) for s in SEEDS])  # each head its own images
        labels = torch.stack(
            [torch.randint(5, (16,), generator=torch.Generator().manual_seed(9000 * s + step)) for s in SEEDS]
        )
        together.zero_grad()
        logits = heads(batches)
        sum(F.cross_entropy(logits[k], labels[k]) for k in range(len(SEEDS))).backward()
        together.step()
        for k, (head, optimizer) in enumerate(zip(alone, optimizers, strict=True)):
            optimizer.zero_grad()
            F.cross_entropy(head(batches[k]), labels[k]).backward()
            optimizer.step()
    assert_same_weights(heads, alone, rtol=1e-4, atol=1e-5)
    assert not torch.equal(heads.weight2[0].T, scene_head(24, 5, seed=0)[2].weight)  # it did learn


def test_gradients_do_not_leak_between_heads():
    heads = SceneHeads(24, 5, SEEDS)
    heads(embeddings())[1].square().sum().backward()
    for parameter in heads.parameters():
        assert parameter.grad[1].abs().sum() > 0
        assert parameter.grad[[0, 2]].abs().sum() == 0
