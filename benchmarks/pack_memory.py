"""Training's memory while the pack grows: 1×, 4× and 16×, and what reading costs.

Run:  python benchmarks/pack_memory.py                       (0.25, 1 and 4 GiB, in the temporary folder)
      python benchmarks/pack_memory.py --gib 4 16 64 --folder /path/on/a/large/disk
      python benchmarks/pack_memory.py --mapped              (reads through the memory map, as it was before: it grows)
      python benchmarks/pack_memory.py --reading             (images/s of reading alone, both ways taking turns)

The packs are generated, no satellite saw them: random codes, every pixel really written, 13 × 256 × 256 uint16 as in
SEN12MS. Each is trained on in a process of its own: one epoch of fine-tuning (ResNet10-T at 32 px: what counts is the
reading) on the train split, which val watches before and after, and one pass of embeddings over the test split, so
that every image is read. Peaks are the kernel's (VmHWM, of this process alone) and, of anonymous memory (RssAnon: what
is no page of a file), that of fifty samples a second. The page cache is in neither: it belongs to no process.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from bandmask import bands
from bandmask.alignment import fine_tune
from bandmask.batches import Batches
from bandmask.encoders import create_encoder
from bandmask.masking import MaskSpec
from bandmask.packs import Pack, open_pack
from bandmask.readers.packing import write_pack
from bandmask.training import Compute
from bandmask.views import View, embed_batches

BATCH = 8
IMAGE_SIZE = 32  # that encoders see


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, nargs="+", default=[0.25, 1, 4], help="sizes of the packs")
    parser.add_argument("--small", action="store_true", help="packs of 64 and 512 MiB")
    parser.add_argument("--mapped", action="store_true", help="read through the memory map")
    parser.add_argument("--reading", action="store_true", help="measure reading alone")
    parser.add_argument("--folder", type=Path, default=None, help="a disk with room for the packs")
    parser.add_argument("--train", type=Path, default=None, help=argparse.SUPPRESS)  # what each process is asked for
    options = parser.parse_args()
    if options.train:
        print(json.dumps(train(open_pack(options.train), mapped=options.mapped)))
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        if options.reading:
            print(reading(Path(folder)).to_markdown(index=False, floatfmt=",.2f"))
            return
        sizes = [1 / 16, 1 / 2] if options.small else options.gib
        print(measure(Path(folder), sizes, mapped=options.mapped).to_markdown(index=False, floatfmt=",.2f"))


def measure(folder: Path, sizes: list[float], *, mapped: bool = False) -> pd.DataFrame:
    """A row a pack of so many GiB, each trained on in a process of its own."""
    needed, free = int(max(sizes) * 2**30), shutil.disk_usage(folder).free
    if needed > 0.9 * free:
        raise SystemExit(f"a pack takes {needed / 2**30:.1f} GiB, {folder} has {free / 2**30:.1f}; give --folder")
    table = []
    for size in sizes:
        pack = generate(folder / f"pack-{size}", int(size * 2**30 / (13 * 256 * 256 * 2)))
        command = [sys.executable, __file__, "--train", str(pack.path), *(["--mapped"] if mapped else [])]
        ran = subprocess.run(command, capture_output=True, text=True, check=True)
        disk = sum(file.stat().st_blocks * 512 for file in pack.path.iterdir()) / 2**30  # holes would not count
        table.append({"images": len(pack.images), "GiB on disk": disk, **json.loads(ran.stdout.splitlines()[-1])})
        shutil.rmtree(pack.path)
    return pd.DataFrame(table)


def generate(path: Path, count: int, size: int = 256) -> Pack:
    """A pack of random codes, 4 : 1 : 1 in train, val and test; B10 is dark, so that the guard lets it pass."""
    index = pd.DataFrame({"label": np.arange(count) % 3, "split": np.resize(["train"] * 4 + ["val", "test"], count)})

    def images() -> Iterator[np.ndarray]:
        draw = np.random.default_rng(0)
        for _ in range(count):
            image = draw.integers(100, 4000, (13, size, size), np.uint16)
            image[bands.NAMES.index("B10")] //= 200
            yield image

    about = {"name": "generated", "source": "benchmarks/pack_memory.py", "source_checksum": "generated"}
    return write_pack(path, images(), index, classes=["a", "b", "c"], **about)


def train(pack: Pack, *, mapped: bool = False) -> dict[str, Any]:
    """Read every image: fine-tune an epoch, then embed the test split; peak memory in MiB, and images/s."""
    if mapped:
        Batches._read = read_mapped
    spec, fill, compute = MaskSpec(("B08",)), torch.full((13,), 0.1), Compute.of("cpu")
    common: dict[str, Any] = {"batch_size": BATCH, "image_size": IMAGE_SIZE}
    with watched() as peaks:
        started = time.perf_counter()
        student, _ = fine_tune(create_encoder("resnet10t"), pack, spec, fill, epochs=1, compute=compute, **common)
        embed_batches(View(student, spec, fill, **common), Batches(pack, "test", **common), compute)
        passes = len(pack.rows("train")) + 2 * len(pack.rows("val")) + len(pack.rows("test"))
        seconds = time.perf_counter() - started
    return {**peaks, "images/s": passes / seconds}


def read_mapped(of: Batches, positions: torch.Tensor, **_: Any) -> tuple[torch.Tensor, None]:
    """What reading was before: rows of the memory map, whose pages stay with the process."""
    images = np.ascontiguousarray(of.pack.images[of.rows[positions.numpy()]])
    return torch.from_numpy(images.view(np.int16)), None


@contextmanager
def watched() -> Iterator[dict[str, float]]:
    """Peaks of this process' memory in MiB, there once the block has ended."""
    peaks: dict[str, float] = {}
    anonymous, ended = [status("RssAnon")], threading.Event()

    def sample() -> None:
        while not ended.wait(0.02):
            anonymous.append(status("RssAnon"))

    sampler = threading.Thread(target=sample, daemon=True)
    sampler.start()
    yield peaks
    ended.set()
    sampler.join()
    peaks |= {"peak RSS (MiB)": status("VmHWM"), "peak of its anonymous part (MiB)": max(anonymous)}


def status(name: str) -> float:
    """An entry of /proc/self/status in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) / 1024


def reading(folder: Path, rounds: int = 41) -> pd.DataFrame:
    """Batches alone, read both ways in turn in one process, from a warm page cache: images/s, ratios of rounds.

    By the CPU time of one thread, which work beside it disturbs less than the clock.
    """
    torch.set_num_threads(1)
    table = []
    for size, count, taken in ((64, 4000, 512), (256, 400, 128)):
        pack = generate(folder / f"reading-{size}", count, size)
        np.asarray(pack.images[:, :, ::16, 0]).sum()  # from here on every page is in the cache, and in the map
        ways = {"file": Batches._read, "memory map": read_mapped}
        rates: dict[str, list[float]] = {way: [] for way in ways}
        for number in range(rounds):
            some = np.random.default_rng(number).permutation(count)[:taken]
            for way in (list(ways), list(ways)[::-1])[number % 2]:
                Batches._read = ways[way]
                batches = Batches(pack, some, batch_size=64)
                started = time.process_time()
                for _ in batches.epoch():
                    pass
                rates[way].append(taken / (time.process_time() - started))
        Batches._read = ways["file"]
        ratios = [ours / before for ours, before in zip(*rates.values(), strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        medians = {f"{way} (images/s of CPU)": statistics.median(values) for way, values in rates.items()}
        ratio = {"ratio, median": middle, "first quartile": low, "third quartile": high}
        table.append({"pixels": size, **medians, **ratio})
    return pd.DataFrame(table)


if __name__ == "__main__":
    main()
