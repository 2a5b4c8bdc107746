"""Sending to a device: the same values, whether the tensor is there already or not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bandmask.batches import Batches
from bandmask.devices import send
from bandmask.masking import MaskSpec, fill_values, mask_batch
from bandmask.packs import Pack


def test_a_tensor_of_the_cpu_is_not_copied_to_the_cpu() -> None:
    tensor = torch.arange(5)
    assert send(tensor, torch.device("cpu")) is tensor


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine: sending to it untested")
def test_what_arrives_on_the_gpu_is_what_was_sent_and_stays_there() -> None:
    gpu = torch.device("cuda")
    for number in range(200):  # each source is freed at once: the copy must not read memory that another took over
        there = send(torch.full((1000,), number), gpu)
        assert send(there, gpu) is there or torch.equal(send(there, gpu), there)
        assert torch.equal(there.cpu(), torch.full((1000,), number))


class _Asked(TorchDispatchMode):
    """Operations that need a value on the CPU: a GPU has to finish what is queued before they can go on."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.name() in ("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select"):
            self.operations.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("shape", ["pixel", "band", "stripe", "block", "cloud"])
def test_making_batches_and_hiding_pixels_asks_for_no_value(sample_pack: Pack, shape: Any) -> None:
    """What holds on a GPU (tests/test_alignment.py) and can be seen without one."""
    spec, fill = MaskSpec(("B04", "B08"), shape=shape), fill_values("dataset_mean", torch.rand(13))
    batches = Batches(sample_pack, "val", batch_size=16, image_size=48, augment=True, shuffle=True)
    with _Asked() as asked:
        for batch in batches.epoch():
            mask_batch(batch.images, batch.samples, spec, fill, epoch=0)
    assert asked.operations == []
    with _Asked() as asked:
        float(torch.zeros(()))  # the check itself works
    assert asked.operations == ["aten::_local_scalar_dense"]
