"""Sending to a device: the same values, whether the tensor is there already or not."""

from __future__ import annotations

import pytest
import torch

from bandmask.devices import send


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
