"""What stands on a frozen encoder: the thesis' scene MLP, and many of them side by side."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


def scene_head(embedding_dim: int, classes: int, *, hidden: int = 64, seed: int = 0) -> nn.Sequential:
    """The thesis' MLP, D → 64 → classes with ReLU (§3.2.2); initial weights depend on `seed` alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(embedding_dim, hidden), nn.ReLU(), nn.Linear(hidden, classes))


class SceneHeads(nn.Module):
    """The heads of several seeds as one module: one pass trains them all, each as if it were alone.

    The sum of their losses has independent gradients, and Adam works element by element, so training them
    together equals training them one by one.
    """

    def __init__(self, embedding_dim: int, classes: int, seeds: Sequence[int], *, hidden: int = 64) -> None:
        """One head a seed, initialised as `scene_head` does."""
        super().__init__()
        self.seeds = tuple(seeds)
        heads = [scene_head(embedding_dim, classes, hidden=hidden, seed=seed) for seed in seeds]
        first, second = zip(*((head[0], head[2]) for head in heads), strict=True)
        self.weight1 = nn.Parameter(torch.stack([layer.weight.detach().T for layer in first]))  # (K, D, hidden)
        self.bias1 = nn.Parameter(torch.stack([layer.bias.detach() for layer in first])[:, None])  # (K, 1, hidden)
        self.weight2 = nn.Parameter(torch.stack([layer.weight.detach().T for layer in second]))  # (K, hidden, C)
        self.bias2 = nn.Parameter(torch.stack([layer.bias.detach() for layer in second])[:, None])  # (K, 1, C)

    def forward(self, embeddings: Tensor) -> Tensor:
        """Logits (K, N, C) of embeddings (N, D), shared by all heads, or (K, N, D), one batch a head."""
        if embeddings.ndim == 2:
            embeddings = embeddings.expand(len(self.weight1), -1, -1)
        hidden = torch.relu(torch.baddbmm(self.bias1, embeddings, self.weight1))  # (K, N, hidden)
        return torch.baddbmm(self.bias2, hidden, self.weight2)  # (K, N, C)
