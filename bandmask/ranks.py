"""Several processes train one model as a single one would: same images, same loss, same gradients, same statistics.

A process is a *rank*. Each takes its part of every batch (`Batches(shard=…)`), and what belongs to a whole batch is
made whole here: the candidates of the contrastive loss, the statistics of batch norms, the mean gradient. In a process
that is alone nothing here does anything. Who starts the ranks is `distributed`.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

PATIENCE = timedelta(days=7)  # for the main rank: packing a large data set takes hours
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


@dataclass(frozen=True)
class Ranks:
    """This process among those that train together.

    Attributes:
        rank: its number, from 0.
        count: how many there are; 1 is a process that is alone.
    """

    rank: int = 0
    count: int = 1

    @classmethod
    def now(cls) -> Ranks:
        """As torch has it; a process that joined no other is alone."""
        if not (dist.is_available() and dist.is_initialized()):
            return cls()
        return cls(dist.get_rank(), dist.get_world_size())

    @property
    def main(self) -> bool:
        """The one that writes files and shows progress."""
        return self.rank == 0

    def shard_of(self, batch_size: int) -> tuple[int, int]:
        """For `Batches(shard=…)`: this rank's part of a batch, or all of it if it can't be shared evenly."""
        return (self.rank, self.count) if batch_size % self.count == 0 else (0, 1)


def gather(part: Tensor) -> Tensor:
    """The rows of all ranks, (ranks · B, …), in the order of ranks; each gives equally many.

    The gradient reaches this rank's own rows, times the number of ranks. Every rank computes the same loss from the
    gathered rows, so the gradients that the ranks would send one another for these rows are all equal to ours; their
    sum is ours times the number of ranks. `DistributedDataParallel` then takes the mean over ranks of what each one's
    rows contribute: the number of ranks cancels, and the sum over ranks is the gradient that one process has.
    """
    return part if Ranks.now().count == 1 else _Gather.apply(part)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: Tensor) -> Tensor:
        part = part.contiguous()
        parts = [torch.empty_like(part) for _ in range(Ranks.now().count)]
        dist.all_gather(parts, part)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        ranks = Ranks.now()
        return gradients[0].chunk(ranks.count)[ranks.rank] * ranks.count


@contextmanager
def together(model: nn.Module) -> Iterator[nn.Module]:
    """What to call in training instead of the model: gradients and batch norms are those of the whole batch.

    Parameters, buffers and keys stay the model's own, so a checkpoint written inside the block is one of the plain
    model, and after it the model is the plain one again. Dropout and stochastic depth draw the same for each rank's
    part, which is not what one process draws: there is a warning.

    Raises:
        ValueError: a batch norm whose statistics can't be joined.
    """
    if Ranks.now().count == 1:
        yield model
        return
    if drawing := [name for name, module in model.named_modules() if _draws(module)]:
        warnings.warn(
            f"{', '.join(drawing[:5])} draw at random in training; with several processes they draw other numbers than "
            "in one, so the run is another one (not a worse one)",
            stacklevel=3,
        )
    device = next(model.parameters()).device
    swapped = list(_swap_batch_norms(model, device.type))
    try:
        yield DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None)
    finally:
        for parent, name, norm in swapped:
            norm.train(getattr(parent, name).training)
            setattr(parent, name, norm)


def _draws(module: nn.Module) -> bool:
    rates = [getattr(module, name, 0) for name in ("drop_rate", "drop_prob")]  # timm's names
    if isinstance(module, nn.modules.dropout._DropoutNd):
        rates.append(module.p)
    return any(isinstance(rate, float | int) and rate > 0 for rate in rates)


def _swap_batch_norms(model: nn.Module, device: str) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    """Put norms over all ranks in the place of batch norms; yields (parent, name, the one that was there)."""
    for parent in list(model.modules()):
        for name, norm in list(parent.named_children()):
            if not isinstance(norm, nn.modules.batchnorm._BatchNorm):
                continue
            if type(norm) not in _BATCH_NORMS or not norm.track_running_stats:
                raise ValueError(
                    f"{name} is a {type(norm).__name__} whose statistics can't be joined over processes; train this "
                    "architecture in one process, or choose one with torch's own batch norms, such as a ResNet"
                )
            kind = JoinedBatchNorm if device == "cpu" else nn.SyncBatchNorm
            joined = kind(norm.num_features, norm.eps, norm.momentum, affine=norm.affine)
            joined._parameters, joined._buffers = norm._parameters, norm._buffers  # shared, whatever happens to them
            setattr(parent, name, joined.train(norm.training))
            yield parent, name, norm


class JoinedBatchNorm(nn.modules.batchnorm._BatchNorm):
    """A batch norm that in train mode takes mean and variance over the images of all ranks.

    It equals `torch.nn.BatchNorm2d` on the joined batch, running statistics and gradients included. For CPUs:
    `torch.nn.SyncBatchNorm`, which does the same, runs on GPUs only.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Normalise (B, C, …)."""
        if not self.training:
            return super().forward(input)
        variance, mean = torch.var_mean(input, [0, *range(2, input.ndim)], correction=0)  # (C,) of our own images
        # Joined in float64: the mean of squares minus the squared mean would cancel in float32.
        mean, variance = mean.double(), variance.double()
        count = torch.full_like(mean, input.numel() / input.shape[1])
        count, first, second = _SumOfRanks.apply(torch.stack([count, count * mean, count * (variance + mean**2)]))
        mean = first / count
        variance = second / count - mean**2
        self._keep(mean.detach(), (variance * count / (count - 1)).detach())
        shape = (1, -1, *[1] * (input.ndim - 2))
        normed = (input - mean.to(input.dtype).view(shape)) * (variance + self.eps).rsqrt().to(input.dtype).view(shape)
        normed = normed if self.weight is None else normed * self.weight.view(shape)
        return normed if self.bias is None else normed + self.bias.view(shape)

    def _keep(self, mean: Tensor, variance: Tensor) -> None:
        """Update the running statistics as torch does: with the unbiased variance."""
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        momentum = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), momentum)
        self.running_var.lerp_(variance.to(self.running_var.dtype), momentum)

    def _check_input_dim(self, input: Tensor) -> None:
        """Any number of dimensions, from (B, C) on."""


class _SumOfRanks(torch.autograd.Function):
    """The sum over ranks; each rank's loss depends on it, so its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        total = value.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].clone()
        dist.all_reduce(total)
        return total


@contextmanager
def main_first() -> Iterator[None]:
    """The block runs in the main rank first, then in the others: what it makes is made once, and found by them."""
    ranks = Ranks.now()
    if ranks.count == 1:
        yield
        return
    waiting = dist.new_group(backend="gloo", timeout=PATIENCE)
    assert isinstance(waiting, dist.ProcessGroup)  # it is of all ranks
    if not ranks.main:
        dist.barrier(group=waiting)
    yield
    if ranks.main:
        dist.barrier(group=waiting)


def check_same(number: int, what: str) -> None:
    """Stop if the ranks don't agree about a number; they would wait for one another for ever.

    Raises:
        RuntimeError: names what differs, and each rank's number.
    """
    if Ranks.now().count == 1:
        return
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    numbers = gather(torch.tensor([number], device=device)).tolist()
    if len(set(numbers)) > 1:
        raise RuntimeError(
            f"the processes don't agree about {what}: {numbers}, in the order of ranks. All must see one folder of "
            "outputs: set BANDMASK_OUTPUTS to one that every machine shares"
        )
