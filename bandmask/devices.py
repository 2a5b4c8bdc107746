"""Small tensors to the device without waiting for it.

A plain copy to a GPU waits until all that was queued there is done. Once a step, that leaves the GPU idle while the
CPU queues the next one.
"""

from __future__ import annotations

import torch
from torch import Tensor


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on `device`; a copy from the CPU to a GPU is queued like any other work."""
    if device.type != "cuda" or tensor.is_cuda:
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
