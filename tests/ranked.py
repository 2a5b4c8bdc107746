"""Jobs for several processes, `torchrun --nproc-per-node 2 -m ranked JOB FOLDER`; tests call the same functions alone.

Each rank writes what it found to FOLDER/JOB-rank<n>.pt.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from models import ROOT, generated_pack, settled_encoder
from torch import Tensor, nn

from bandmask import alignment, objectives, packs
from bandmask.masking import Fill, MaskSpec, fill_values
from bandmask.ranks import JoinedBatchNorm, Ranks, check_same, main_first, together
from bandmask.training import Compute

SPEC = MaskSpec(bands=("B04", "B08", "B11", "B12"), value=-1.0)
PARTS = (3, 5)  # images of each rank in the test of one batch norm: unequal, as a count must enter the mean
CPU = Compute.of("cpu")


def run_ranks(job: str, folder: Path, processes: int = 2) -> subprocess.CompletedProcess[str]:
    """Start a job under torchrun, as users do."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return subprocess.run(
        [*torchrun, "-m", "ranked", job, str(folder)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def open_pack(folder: Path) -> packs.Pack:
    """Made by the test before any job starts."""
    return packs.open_pack(folder / "pack")


def make_pack(folder: Path) -> packs.Pack:
    return generated_pack(folder / "pack", train=32, val=12)


def tune(folder: Path, teacher: nn.Module | None = None, **options: Any) -> dict[str, Any]:
    """Fine-tune; what is left in the student is enough to compare two runs by."""
    pack = open_pack(folder)
    defaults = {"epochs": 2, "batch_size": 16, "image_size": 32, "lr": 3e-4, "compute": CPU, "progress": False}
    seen: dict[tuple[int, int], Tensor] = {}
    student, history = watching(
        seen,
        lambda: alignment.fine_tune(
            teacher or settled_encoder(pack),
            pack,
            SPEC,
            fill_values(-1.0, torch.tensor(pack.band_means())),
            **{**defaults, **options},
        ),
    )
    return {
        "history": history.drop(columns="images_per_second").to_dict("list"),
        "gradients": {name: p.grad for name, p in student.named_parameters() if p.grad is not None},
        "state": dict(student.state_dict()),
        "kinds": sorted({type(module).__name__ for module in student.modules()}),
        "seen": seen,
    }


def watching(seen: dict[tuple[int, int], Tensor], run: Callable[[], Any]) -> Any:
    """Run with a note of each incomplete image of a training batch, by epoch and sample."""
    original = alignment.mask_batch

    def mask_batch(images: Tensor, samples: Tensor, spec: MaskSpec, fill: Fill, **when: int) -> Tensor:
        incomplete = original(images, samples, spec, fill, **when)
        for sample, image in zip(samples.tolist(), incomplete, strict=True):
            seen[when.get("epoch", -1), sample] = image.clone()
        return incomplete

    alignment.mask_batch = mask_batch
    try:
        return run()
    finally:
        alignment.mask_batch = original


def one_step(folder: Path) -> dict[str, Any]:
    """Two batches that change no weight: the gradient of the last one stays in the parameters."""
    return tune(folder, epochs=1, lr=0.0, weight_decay=0.0)


def one_step_in_float64(folder: Path) -> dict[str, Any]:
    """The same in float64, the loss too, where only an error of the method could be seen."""
    teacher = settled_encoder(open_pack(folder)).double()
    teacher.register_forward_pre_hook(lambda _, inputs: (inputs[0].double(),))  # the student, a copy, takes it along
    original, objectives.clip_loss = objectives.clip_loss, clip_loss_in_float64
    try:
        return tune(folder, teacher, epochs=1, lr=0.0, weight_decay=0.0)
    finally:
        objectives.clip_loss = original


def clip_loss_in_float64(incomplete: Tensor, complete: Tensor) -> Tensor:
    logits = 18.0 * F.normalize(incomplete.double(), dim=1) @ F.normalize(complete.double(), dim=1).T
    target = torch.arange(len(logits))
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def two_epochs(folder: Path) -> dict[str, Any]:
    return tune(folder, checkpoint=folder / f"of-{Ranks.now().count}" / "last.pt")


def batch_of_norm(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Images far from zero, where squares cancel, and the gradient that comes from above."""
    draw = torch.Generator().manual_seed(0)
    shape = (sum(PARTS), 4, 6, 5)
    images = torch.randn(shape, generator=draw, dtype=dtype) * torch.tensor([0.1, 1, 3, 10])[:, None, None] + 50
    return images, torch.randn(shape, generator=draw, dtype=dtype)


def norm(kind: type[nn.Module], dtype: torch.dtype, momentum: float | None) -> nn.Module:
    made = kind(4, eps=1e-3, momentum=momentum).to(dtype)
    with torch.no_grad():
        made.weight.copy_(torch.tensor([0.5, -1, 2, 1.5]))
        made.bias.copy_(torch.tensor([0.1, 0.2, -0.3, 0]))
    return made


def through(layer: nn.Module, images: Tensor, above: Tensor) -> dict[str, Tensor]:
    """Two steps in train mode, one in eval mode; the gradients are those of the last training step."""
    layer.train()
    layer(images * 2 - 7)
    images = images.clone().requires_grad_()
    out = layer(images)
    (out * above).sum().backward()
    assert images.grad is not None
    gradients = {f"{name}.grad": p.grad for name, p in layer.named_parameters()}
    return {
        "out": out.detach(),
        "images.grad": images.grad,
        **gradients,
        **layer.state_dict(),
        "eval": layer.eval()(images).detach(),
    }


def norms(folder: Path) -> dict[str, Any]:
    """This rank's part through a joined batch norm, in both precisions and with both kinds of momentum."""
    rank = Ranks.now().rank
    found = {}
    for dtype in (torch.float32, torch.float64):
        for momentum in (0.1, None):
            images, above = (whole.split(PARTS)[rank] for whole in batch_of_norm(dtype))
            found[dtype, momentum] = through(norm(JoinedBatchNorm, dtype, momentum), images, above)
    return found


def guards(folder: Path) -> dict[str, Any]:
    """What is said of models that can't be trained together, or not exactly, and of ranks that disagree."""
    found: dict[str, Any] = {}
    untracked = nn.Sequential(nn.Conv2d(13, 4, 1), nn.BatchNorm2d(4, track_running_stats=False))
    try:
        with together(untracked):
            pass
    except ValueError as error:
        found["untracked"] = str(error)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with together(nn.Sequential(nn.Conv2d(13, 4, 1), nn.Dropout(0.5))):
            pass
        found["dropout"] = [str(warning.message) for warning in caught]
    check_same(7, "a number")
    try:
        check_same(Ranks.now().rank, "epochs done")
    except RuntimeError as error:
        found["disagree"] = str(error)
    with main_first():
        made = folder / "made-by"
        if not made.exists():
            made.write_text(str(Ranks.now().rank))
        found["made_by"] = made.read_text()
    return found


def equal(folder: Path) -> dict[str, Any]:
    """Every job that ends well, in one start of the processes."""
    jobs = (one_step, one_step_in_float64, two_epochs, norms, guards)
    return {job.__name__: job(folder) for job in jobs}


def killed(folder: Path) -> dict[str, Any]:
    """Rank 1 is killed in the second epoch, as by a machine that runs out of memory."""
    original = alignment.mask_batch

    def mask_batch(*arguments: Any, **when: int) -> Tensor:
        if Ranks.now().rank == 1 and when.get("epoch") == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments, **when)

    alignment.mask_batch = mask_batch
    return tune(folder, checkpoint=folder / "killed" / "last.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    job, folder = sys.argv[1], Path(sys.argv[2])
    torch.save(globals()[job](folder), folder / f"{job}-rank{dist.get_rank()}.pt")
    dist.destroy_process_group()
