"""Images per second of reading, masking and fine-tuning, each beside a plain way of doing it.

Run:  make bench            (or python benchmarks/throughput.py --device cuda --architecture resnet50 --image-size 256)

Both sides of a comparison run in one process, in turns, and the median of the ratios counts: timings of one machine
vary more between minutes than between methods. Each case has a process of its own, so peak memory is its own too.
Without EuroSAT (BANDMASK_DATA) the sample's patches are used, and reading is not compared: TorchGeo has no reader
for them.
"""

from __future__ import annotations

import argparse
import copy
import multiprocessing
import resource
import statistics
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import islice
from pathlib import Path

import pandas as pd
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.functional import gaussian_blur, hflip, vflip

from bandmask import datasets, encoders, masks
from bandmask.align import clip_loss
from bandmask.batches import Batches
from bandmask.train import Compute, adamw

BATCH, ROUNDS, MASK = 64, 7, ("B02", "B03", "B04")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--architecture", default="resnet18")
    parser.add_argument("--image-size", type=int, default=64)
    parser.add_argument("--cases", nargs="+", choices="abcd", default=list("abcd"), help="letters; default all")
    options = parser.parse_args()
    dataset = "sample" if datasets.absent("eurosat") else "eurosat"
    cases = {"a reading": reading, "b fine-tuning step": step, "c whole loop": whole_loop, "d mask": mask}
    rows = []
    for name, case in cases.items():
        if name[0] not in options.cases:
            continue
        if case is reading and dataset == "sample":
            print("a reading: skipped, EuroSAT is not there (set BANDMASK_DATA)")
            continue
        print(f"{name} ...", flush=True)
        rows.append({"case": name, **alone(case, dataset, options)})
    what = f"{options.architecture} at {options.image_size} px"
    print(f"\n{dataset}, {what}, batch {BATCH}, medians of {ROUNDS} rounds\n")
    print(pd.DataFrame(rows).to_markdown(index=False, floatfmt=".4g"))


def alone(case: Callable[..., dict], dataset: str, options: argparse.Namespace) -> dict:
    """Run a case in a fresh process."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_report, case, dataset, options).result()


def _report(case: Callable[..., dict], dataset: str, options: argparse.Namespace) -> dict:
    result = case(datasets.open_dataset(dataset), Compute.of(options.device), options)
    kilobytes = sum(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return {**result, "peak GiB": kilobytes / 2**20}


def compare(ours: Callable[[], int], other: Callable[[], int], unit: str, names: tuple[str, str]) -> dict:
    """Median throughput of both, and the median ratio of neighbouring rounds, after one round to warm up."""
    speeds: tuple[list[float], list[float]] = ([], [])
    for turn in range(ROUNDS + 1):
        for work, speed in zip((ours, other), speeds, strict=True):
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            started = time.perf_counter()
            images = work()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if turn:
                speed.append(images / (time.perf_counter() - started))
    ratios = [a / b for a, b in zip(*speeds, strict=True)]
    return {
        "ours": f"{statistics.median(speeds[0]):.4g} {unit}, {names[0]}",
        "beside": f"{statistics.median(speeds[1]):.4g} {unit}, {names[1]}",
        "ratio": statistics.median(ratios),
        "ratios from": min(ratios),
        "to": max(ratios),
    }


def reading(pack, compute: Compute, options: argparse.Namespace) -> dict:
    """(a) The pack against TorchGeo's data set in a DataLoader with two workers, on the same files."""
    from torchgeo.datasets import EuroSAT

    source = datasets.find_source("eurosat")
    with tempfile.TemporaryDirectory() as folder:
        with zipfile.ZipFile(source) as archive:
            archive.extractall(folder)
        for file in source.parent.glob("eurosat-*.txt"):
            (Path(folder) / file.name).write_text(file.read_text())
        loader = DataLoader(EuroSAT(folder, split="train"), batch_size=BATCH, num_workers=2, persistent_workers=True)
        batches = Batches(pack, "train", batch_size=BATCH, device=compute.device)

        def torchgeo_epoch() -> int:
            return sum(len((batch["image"] / 10_000).to(compute.device)) for batch in loader)

        def pack_epoch() -> int:
            return sum(len(batch.images) for batch in batches.epoch())

        return compare(pack_epoch, torchgeo_epoch, "images/s", ("pack", "TorchGeo, 2 workers"))


class PlainDataset(Dataset):
    """As one would write it first: every image transformed and masked alone, in a DataLoader's worker."""

    def __init__(self, pack, size: int) -> None:
        self.pack, self.rows, self.size = pack, pack.rows("train"), size

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        image = torch.from_numpy(self.pack.images[self.rows[index]].astype("float32")) / 10_000
        if image.shape[-1] != self.size:
            image = F.interpolate(image[None], (self.size, self.size), mode="bilinear", align_corners=False)[0]
        if torch.rand(()) < 0.5:
            image = hflip(image)
        if torch.rand(()) < 0.5:
            image = vflip(image)
        image = gaussian_blur(image, [3, 3], [float(torch.empty(()).uniform_(0.1, 2.0))] * 2)
        masked = image.clone()
        for channel in masks.MaskSpec(MASK).channels:
            masked[channel][torch.rand(image.shape[1:]) < 0.9] = 0.1431
        return image, masked


def trainer(compute: Compute, options: argparse.Namespace) -> Callable[[torch.Tensor, torch.Tensor], None]:
    """One optimiser step on a batch of complete and incomplete images."""
    teacher = compute.place(encoders.create_encoder(options.architecture)).eval().requires_grad_(False)
    student = copy.deepcopy(teacher).requires_grad_(True).train()
    optimizer = adamw(student, lr=1e-4, weight_decay=0.01)
    teach, learn = compute.faster(teacher), compute.faster(student)

    def train(images: torch.Tensor, incomplete: torch.Tensor) -> None:
        optimizer.zero_grad(set_to_none=True)
        with compute.autocast():
            with torch.no_grad():
                target = teach(compute.images(images))
            loss = clip_loss(learn(compute.images(incomplete)), target)
        loss.backward()
        optimizer.step()

    return train


def our_steps(pack, compute: Compute, options: argparse.Namespace, train, limit: int) -> Iterator[int]:
    """Images of each step of this project's loop."""
    spec = masks.MaskSpec(MASK)
    fill = masks.fill_values("dataset_mean", torch.tensor(pack.band_means()))
    drawn = {"augment": True, "shuffle": True, "drop_last": True, "device": compute.device}
    batches = Batches(pack, "train", batch_size=BATCH, image_size=options.image_size, **drawn)
    for batch in islice(batches.epoch(), limit):
        train(batch.images, masks.mask_batch(batch.images, batch.samples, spec, fill, epoch=0))
        yield len(batch.images)


def step(pack, compute: Compute, options: argparse.Namespace) -> dict:
    """(b) This loop against a plain one: float32, NCHW, images transformed and masked one by one in two workers."""
    train = trainer(compute, options)
    plain_compute = Compute(compute.device)
    plain_train = trainer(plain_compute, options)
    loader = DataLoader(PlainDataset(pack, options.image_size), BATCH, shuffle=True, num_workers=2, drop_last=True)
    limit = 5

    def plain() -> int:
        images = 0
        for complete, incomplete in islice(loader, limit):
            plain_train(complete.to(compute.device), incomplete.to(compute.device))
            images += len(complete)
        return images

    def ours() -> int:
        return sum(our_steps(pack, compute, options, train, limit))

    return compare(ours, plain, "images/s", ("this loop", "plain loop"))


def whole_loop(pack, compute: Compute, options: argparse.Namespace) -> dict:
    """(c) The loop end to end against its own step on a batch that is on the device already."""
    train = trainer(compute, options)
    batch = next(Batches(pack, "train", batch_size=BATCH, image_size=options.image_size, device=compute.device).epoch())
    limit = 5

    def resident() -> int:
        for _ in range(limit):
            train(batch.images, batch.images)
        return limit * BATCH

    def ours() -> int:
        return sum(our_steps(pack, compute, options, train, limit))

    return compare(ours, resident, "images/s", ("end to end", "step on a resident batch"))


def mask(pack, compute: Compute, options: argparse.Namespace) -> dict:
    """(d) Drawing and hiding against a plain copy of the same tensor."""
    images = torch.rand(BATCH, 13, options.image_size, options.image_size, device=compute.device)
    samples = torch.arange(BATCH, device=compute.device)
    spec, fill, repeats = masks.MaskSpec(MASK), torch.zeros(13, device=compute.device), 20

    def ours() -> int:
        for epoch in range(repeats):
            masks.mask_batch(images, samples, spec, fill, epoch=epoch)
        return repeats * BATCH

    def plain() -> int:
        for _ in range(repeats):
            images.clone()
        return repeats * BATCH

    return compare(ours, plain, "images/s", ("mask of 3 bands", "copy"))


if __name__ == "__main__":
    main()
