"""Three decoders on one encoder pass against three separate trainings: time in one run, and whether they are the same.

    python benchmarks/shared_pass.py

Random encoders on the embedded sample: what is learnt does not matter here, only what it takes. Rounds alternate, and
each is the median of its kind.
"""

from __future__ import annotations

import statistics
import time

import numpy as np
import pandas as pd
import torch

from bandmask import datasets, encoders, masking, segmentation
from bandmask.packs import Pack
from bandmask.readers.packing import write_pack
from bandmask.training import Compute
from bandmask.views import View

SEEDS = (0, 1, 2)
CASES = {  # name: architecture, pixels, decoder width, batch, images, rounds
    "demo": ("resnet18", 64, 64, 32, 96, 5),
    "thesis": ("resnet50", 256, 256, 4, 8, 3),
}


def train(view: View, pack: Pack, seeds: tuple[int, ...], width: int, compute: Compute):
    decoders, _ = segmentation.make_decoders(view, len(pack.classes), seeds, width=width, compute=compute)
    started = time.perf_counter()
    history = segmentation.train_decoders(view, pack, decoders, epochs=1, compute=compute)
    return decoders, history, time.perf_counter() - started


def smaller(pack: Pack, images: int) -> Pack:
    """The first images of each split, enough for one measurement."""
    rows = np.concatenate([pack.rows("train")[:images], pack.rows("val")[:4], pack.rows("test")[:4]])
    assert pack.targets is not None
    return write_pack(
        pack.path.with_name(f"benchmark-{images}"),
        ((pack.images[row], pack.targets[row]) for row in rows),
        pd.DataFrame({"split": pack.index["split"].to_numpy()[rows]}),
        name="benchmark",
        classes=pack.classes,
        source="first patches of the sample",
        source_checksum=pack.checksum,
        strict_guard=False,
        targets=True,
    )


def main() -> None:
    compute = Compute.of()
    lines = []
    for name, (architecture, size, width, batch, images, rounds) in CASES.items():
        pack = smaller(datasets.open_dataset("sample"), images)
        encoder = encoders.create_encoder(architecture).eval()
        view = View(encoder, masking.MaskSpec(("B08",)), torch.zeros(13), size, batch)
        together, apart = [], []
        for _ in range(rounds):
            shared, history, seconds = train(view, pack, SEEDS, width, compute)
            together.append(seconds)
            single = [train(view, pack, (seed,), width, compute) for seed in SEEDS]
            apart.append(sum(seconds for _, _, seconds in single))
        gap = max(
            float((ours - theirs).detach().abs().max())
            for place, (alone, _, _) in enumerate(single)
            for ours, theirs in zip(alone.decoders[0].parameters(), shared.decoders[place].parameters(), strict=True)
        )
        last = history[history["epoch"] == 1].set_index("head_seed")["overall_accuracy"]
        scores = max(
            abs(last[seed] - h["overall_accuracy"].iloc[-1]) for seed, (_, h, _) in zip(SEEDS, single, strict=True)
        )
        ratio = statistics.median(b / a for a, b in zip(together, apart, strict=True))
        one, three = statistics.median(together), statistics.median(apart)
        lines.append(
            f"| {name}: {architecture}, {size} px, width {width} | {one:.1f} s | {three:.1f} s | **{ratio:.2f}** "
            f"| {gap:.1e} | {100 * scores:.3f} points |"
        )
    print("| case, one epoch | one pass | three trainings | ratio | largest difference of a weight | of a score |")
    print("| --- | --- | --- | --- | --- | --- |")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
