"""Out of memory is explained, in torch's real words; and training's memory does not grow with the pack."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bandmask import files
from bandmask.memory import explain_out_of_memory

# Real messages: torch 2.5 (pytorch issue 16417 and its like), torch 2.9 and later (other link at the end), a process
# that torch.cuda.set_per_process_memory_fraction bounds, CUDA graphs, and backend:cudaMallocAsync.
HINT = "If reserved but unallocated memory is large try setting PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True to "
OLD_HINT = (
    HINT
    + "avoid fragmentation.  See documentation for Memory Management  (https://pytorch.org/docs/stable/notes/cuda.html#environment-variables)"
)
NEW_HINT = (
    HINT
    + "avoid fragmentation.  See documentation for Memory Management  (https://docs.pytorch.org/docs/stable/notes/cuda.html#optimizing-memory-usage-with-pytorch-cuda-alloc-conf)"
)
ALONE = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 23.65 GiB of which 11.06 MiB is "
    "free. Including non-PyTorch memory, this process has 23.60 GiB memory in use. Of the allocated memory 22.90 GiB "
    f"is allocated by PyTorch, and 194.87 MiB is reserved by PyTorch but unallocated. {OLD_HINT}"
)
SHARED = (
    "CUDA out of memory. Tried to allocate 996.00 MiB. GPU 3 has a total capacity of 44.43 GiB of which 9.06 MiB is "
    "free. Process 2102129 has 17.54 GiB memory in use. Including non-PyTorch memory, this process has 26.81 GiB "
    "memory in use. Of the allocated memory 26.44 GiB is allocated by PyTorch, and 59.88 MiB is reserved by PyTorch "
    f"but unallocated. {NEW_HINT}"
)
CONTAINER = SHARED.replace("Including non-PyTorch memory, this process", "Process 774649")
UNKNOWN = SHARED.replace("17.54 GiB", "17179869184.00 GiB")
BOUNDED = (
    "CUDA out of memory. Tried to allocate 250.00 MiB. GPU 0 has a total capacity of 79.19 GiB of which 2.07 GiB is "
    "free. Including non-PyTorch memory, this process has 77.11 GiB memory in use. 75.23 GiB allowed; Of the allocated "
    "memory 74.23 GiB is allocated by PyTorch, with 1.50 GiB allocated in private pools (e.g., CUDA Graphs), and "
    f"943.54 MiB is reserved by PyTorch but unallocated. {NEW_HINT}"
)
ASYNC = (
    "Allocation on device 1 would exceed allowed memory. (out of memory)\nCurrently allocated     : 4.86 GiB\n"
    "Requested               : 10.12 GiB\nDevice limit            : 24.00 GiB\nFree (according to CUDA): 0 bytes\n"
    "PyTorch limit (set by user-supplied memory fraction)\n                        : 17179869184.00 GiB"
)
NO_FIGURES = (
    "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported at some other API call, so the "
    "stacktrace below might be incorrect.\nFor debugging consider passing CUDA_LAUNCH_BLOCKING=1"
)
CUBLAS = "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"


# What these messages are put together from, in c10/cuda/CUDACachingAllocator.cpp and CUDAMallocAsyncAllocator.cpp.
WORDS = (
    *("CUDA out of memory. Tried to allocate ", ". GPU ", " has a total capacity of ", " of which ", " is free. "),
    *("Including non-PyTorch memory, this process", "Process ", " has ", " memory in use. ", " allowed; "),
    *("Of the allocated memory ", " is allocated by PyTorch, ", " bytes", " KiB", " MiB", " GiB"),
    *("Allocation on device ", " would exceed allowed memory. (out of memory)", "Currently allocated     : "),
    *("Requested               : ", "Device limit            : ", "Free (according to CUDA): "),
)
WHAT = "fine-tuning on B8, seed 0"


def explained(error: Exception, batch_size: int = 64, **options: object) -> str:
    with (
        pytest.raises(MemoryError) as caught,
        explain_out_of_memory("fine-tuning on B8, seed 0", batch_size, **options),
    ):
        raise error
    assert caught.value.__cause__ is error  # the allocator's own words stay in the traceback
    return str(caught.value)


def test_batch_needs_capacity_and_way_out_are_named() -> None:
    assert explained(torch.OutOfMemoryError(ALONE), image_size=256) == (
        "fine-tuning on B8, seed 0: batch_size 64 and image_size 256 do not fit the GPU. The process needed at least "
        "24.90 GiB (22.90 GiB allocated and 2.00 GiB more). GPU 0 has 23.65 GiB, 11.06 MiB of it free. Lower "
        "batch_size (such as 32) or image_size, or use a GPU with more memory."
    )


@pytest.mark.parametrize(
    ("message", "figures"),
    [
        (
            SHARED,
            "27.41 GiB (26.44 GiB allocated and 996.00 MiB more). GPU 3 has 44.43 GiB, 9.06 MiB of it free; other",
        ),
        (
            BOUNDED,
            "74.47 GiB (74.23 GiB allocated and 250.00 MiB more). GPU 0 has 79.19 GiB, 2.07 GiB of it free; this",
        ),
        (ASYNC, "14.98 GiB (4.86 GiB allocated and 10.12 GiB more). GPU 1 has 24.00 GiB, 0 bytes of it free."),
    ],
)
def test_figures_of_every_wording_are_found(message: str, figures: str) -> None:
    assert f"The process needed at least {figures}" in explained(torch.OutOfMemoryError(message))


def test_a_gpu_that_others_use_is_named_as_such() -> None:
    told = explained(torch.OutOfMemoryError(SHARED))
    assert "other processes hold 17.54 GiB. Wait for the other processes, or choose another GPU" in told


@pytest.mark.parametrize("message", [ALONE, CONTAINER, UNKNOWN, BOUNDED, ASYNC])
def test_other_processes_are_not_blamed_unless_torch_can_tell_them_from_its_own(message: str) -> None:
    assert "other processes" not in explained(torch.OutOfMemoryError(message))


def test_what_the_process_may_use_is_told() -> None:
    assert "; this process may use 75.23 GiB. Lower" in explained(torch.OutOfMemoryError(BOUNDED))


@pytest.mark.parametrize("error", [RuntimeError(NO_FIGURES), RuntimeError(CUBLAS), torch.OutOfMemoryError("new words")])
def test_without_figures_the_batch_and_the_way_out_are_still_named(error: Exception) -> None:
    told = explained(error, 8)
    assert told.startswith("fine-tuning on B8, seed 0: batch_size 8 does not fit the GPU. ")
    assert told.endswith("Lower batch_size (such as 4) or image_size, or use a GPU with more memory.")


def test_one_image_a_batch_can_only_be_made_smaller_and_work_adds_ways_of_its_own() -> None:
    told = explained(torch.OutOfMemoryError(ALONE), 1, advice="Or train on more GPUs with torchrun.")
    assert told.endswith(" Lower image_size, or use a GPU with more memory. Or train on more GPUs with torchrun.")


def test_a_gpu_that_torch_does_not_know_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """The explanation must not fail in place of the error that it explains."""
    peaks = {0: 40 * 2**30, None: 40 * 2**30}
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: peaks[device])
    assert "needed at least 27.41 GiB (26.44 GiB allocated" in explained(torch.OutOfMemoryError(SHARED))  # GPU 3
    assert "needed at least 40.00 GiB" in explained(torch.OutOfMemoryError(ALONE))  # GPU 0


def test_the_cpus_own_allocator_is_explained_too() -> None:
    words = r"batch_size 4 does not fit memory\. 1048576\.00 GiB more were asked for\."
    with pytest.raises(MemoryError, match=words), explain_out_of_memory(WHAT, 4):
        torch.empty(2**50, dtype=torch.uint8)


@pytest.mark.parametrize("error", [RuntimeError("shapes differ"), ValueError("no"), KeyboardInterrupt()])
def test_other_errors_pass_unchanged(error: BaseException) -> None:
    with pytest.raises(type(error)) as caught, explain_out_of_memory("fine-tuning", 64):
        raise error
    assert caught.value is error


def test_the_installed_torch_still_uses_these_words() -> None:
    library = Path(torch.__file__).parent / "lib" / "libc10_cuda.so"
    if not library.exists():
        pytest.skip("this torch was built without CUDA: its allocator's words are untested")
    words = library.read_bytes()
    assert [word for word in WORDS if word.encode() not in words] == []


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine: its real error untested")
def test_a_real_gpu_that_is_asked_for_more_than_it_has() -> None:
    total = torch.cuda.mem_get_info()[1]
    words = r"needed at least .* GiB.*GPU 0 has .* GiB, .* of it free"
    with pytest.raises(MemoryError, match=words), explain_out_of_memory(WHAT, 64):
        torch.empty(2 * total, dtype=torch.uint8, device="cuda")


# --- larger than memory


@pytest.mark.slow
def test_memory_of_training_stays_flat_while_the_pack_grows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each training in a process of its own, packs of 64 and 512 MiB: after three steps its own memory has settled."""
    monkeypatch.syspath_prepend(files.project_root() / "benchmarks")
    import pack_memory

    read, mapped = pack_memory.measure(tmp_path, [1 / 16, 1 / 2]), pack_memory.measure(tmp_path, [1 / 2], mapped=True)
    (small, large), (before,) = read["peak RSS (MiB)"], mapped["peak RSS (MiB)"]
    grown = 1024 * (read["GiB on disk"][1] - read["GiB on disk"][0])
    assert grown > 400
    assert abs(large - small) < 0.3 * grown, (small, large)  # 71 MiB on one processor, 15 on another
    assert before - large > 0.6 * grown, (large, before)  # read as it was before, it grows: this test can tell
