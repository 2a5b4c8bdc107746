"""Out of memory, said so that one knows what to change: the batch, what it needed, what the GPU has, the way out."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_UNITS = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
_SIZE = rf"([\d.]+) ({'|'.join(_UNITS)})"
# The wordings of torch's caching allocator, and of its backend:cudaMallocAsync, which lists its figures.
_TRIED = rf"Tried to allocate {_SIZE}|Requested *: {_SIZE}"
_ALLOCATED = rf"Of the allocated memory {_SIZE} is allocated by PyTorch|Currently allocated *: {_SIZE}"
_CAPACITY = rf"total capacity of {_SIZE}|Device limit *: {_SIZE}"
_FREE = rf"of which {_SIZE} is free|Free \(according to CUDA\) *: {_SIZE}"
_ALLOWED = rf"{_SIZE} allowed;"
_OTHERS = rf"Process \d+ has {_SIZE} memory in use"
_OWN = "this process has"
_DEVICE = r"GPU (\d+) has|Allocation on device (\d+)"
# Without figures: what goes past torch's allocator (pinned memory, handles of cuBLAS and cuDNN), and the CPU's.
_ON_GPU = ("CUDA error: out of memory", "_STATUS_ALLOC_FAILED")
_ON_CPU = "DefaultCPUAllocator: can't allocate memory"


@contextmanager
def explain_out_of_memory(
    what: str, batch_size: int, *, image_size: int | None = None, advice: str = ""
) -> Iterator[None]:
    """Turn torch's out-of-memory errors inside the block into one that names the batch and the memory.

    Args:
        what: was computed, such as "fine-tuning on B8, seed 0".
        batch_size: images a batch.
        image_size: side of the images in pixels, if known.
        advice: a way out that this work has besides those that all work has; a sentence.

    Raises:
        MemoryError: from `torch.OutOfMemoryError`, from errors of CUDA and its libraries that mean the same, and from
            the CPU's allocator. Others pass unchanged.
    """
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        on_gpu = isinstance(error, torch.OutOfMemoryError) or any(sign in text for sign in _ON_GPU)
        if not on_gpu and _ON_CPU not in text:
            raise
        size = f"batch_size {batch_size}" + (f" and image_size {image_size}" if image_size else "")
        place, facts = ("the GPU", _facts_of_gpu(text)) if on_gpu else ("memory", _facts_of_cpu(text))
        verb = "do" if image_size else "does"
        parts = [f"{what}: {size} {verb} not fit {place}.", *facts, *_ways_out(text, batch_size, on_gpu), advice]
        raise MemoryError(" ".join(filter(None, parts))) from error


def _facts_of_gpu(text: str) -> list[str]:
    """Sentences: what was needed, what there is; as many as the message of the error allows."""
    found = re.search(_DEVICE, text)
    device = None if found is None else int(next(filter(None, found.groups())))
    tried, allocated, capacity = (_first(pattern, text) for pattern in (_TRIED, _ALLOCATED, _CAPACITY))
    known = torch.cuda.is_initialized() and (device or 0) < torch.cuda.device_count()
    peak = torch.cuda.max_memory_allocated(device) if known else 0
    facts = []
    if tried is not None:
        held = (peak if allocated is None else allocated) or 0
        needed = _in_words(max(peak, held + tried))
        details = f" ({_in_words(held)} allocated and {_in_words(tried)} more)" if held else " at once"
        facts.append(f"The process needed at least {needed}{details}.")
    elif peak:
        facts.append(f"The process had allocated up to {_in_words(peak)}, and asked for more.")
    if capacity is not None:
        free, others, allowed = _first(_FREE, text), _held_by_others(text), _first(_ALLOWED, text)
        fact = f"GPU {0 if device is None else device} has {_in_words(capacity)}"
        fact += "" if free is None else f", {_in_words(free)} of it free"
        fact += f"; other processes hold {_in_words(others)}" if others else ""
        fact += "" if allowed is None else f"; this process may use {_in_words(allowed)}"
        facts.append(f"{fact}.")
    return facts


def _facts_of_cpu(text: str) -> list[str]:
    tried = re.search(r"you tried to allocate (\d+) bytes", text)
    return [] if tried is None else [f"{_in_words(int(tried[1]))} more were asked for."]


def _ways_out(text: str, batch_size: int, on_gpu: bool) -> list[str]:
    others, capacity = _held_by_others(text), _first(_CAPACITY, text)
    ways = []
    if capacity and others > capacity / 20:  # a desktop's few hundred MiB are not what is in the way
        ways.append("Wait for the other processes, or choose another GPU with CUDA_VISIBLE_DEVICES.")
    smaller = f"batch_size (such as {batch_size // 2}) or image_size" if batch_size > 1 else "image_size"
    ways.append(f"Lower {smaller}, or use a {'GPU' if on_gpu else 'machine'} with more memory.")
    return ways


def _first(pattern: str, text: str) -> int | None:
    found = re.search(pattern, text)
    return None if found is None else _bytes(found)


def _held_by_others(text: str) -> int:
    """Bytes, or 0 where torch can't tell its own process from others, as in a container with numbers of its own."""
    held = [_bytes(found) for found in re.finditer(_OTHERS, text)] if _OWN in text else []
    return sum(size for size in held if size < 2**50)  # 17179869184.00 GiB is the driver's word for unknown


def _bytes(found: re.Match[str]) -> int:
    number, unit = filter(None, found.groups())
    return int(float(number) * _UNITS[unit])


def _in_words(size: int) -> str:
    """As torch writes sizes: 1.50 GiB."""
    unit = next((unit for unit in reversed(_UNITS) if size >= _UNITS[unit]), "bytes")
    return f"{size} bytes" if unit == "bytes" else f"{size / _UNITS[unit]:.2f} {unit}"
