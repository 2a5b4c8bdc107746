"""How long a person waits for the band-mask visualizer, and what shapes of masks cost.

Run:  python benchmarks/redraw.py

A redraw is one change of the state, from the control to the PNG that goes to the browser: masking, stretch, picture,
spectrum, histograms. Goals on two cores: 150 ms at 64 px, 400 ms at 512 px. Encoders, if any, judge after the picture
has gone out and are not in it. CPU time stands beside the wall clock's: on a busy machine they differ.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pandas as pd
import torch

from bandmask import bands, datasets, masks
from bandmask.masks import MaskSpec, hidden_pixels
from bandmask.plots import FIGURE_3_1
from bandmask.viewer import BandMaskViewer, State

ROUNDS = 15
GOALS = {64: 150, 512: 400}


def main() -> None:
    scene = datasets.read_sample().values / 10_000
    rows = []
    for size, goal in GOALS.items():
        image = scene[:, 300 : 300 + size, 200 : 200 + size].astype(np.float32)
        widget = BandMaskViewer([image], State(mask=("B02", "B08"), ratio=0.5))
        for view in ("true colour", FIGURE_3_1, "B08", "ndvi"):
            wall, cpu = medians(lambda view=view, widget=widget: redraw(widget, view=view))
            rows.append({"px": size, "what": view, "ms": wall, "CPU ms": cpu, "goal ms": goal})
        for shape in masks.SHAPES:
            wall, cpu = medians(lambda shape=shape, widget=widget: redraw(widget, view="true colour", shape=shape))
            rows.append({"px": size, "what": f"true colour, {shape}", "ms": wall, "CPU ms": cpu, "goal ms": goal})
    print(f"Redraw, medians of {ROUNDS}\n\n{pd.DataFrame(rows).to_markdown(index=False, floatfmt='.0f')}")
    print(f"\nMasks of three bands, medians of {ROUNDS}\n\n{mask_table().to_markdown(index=False, floatfmt='.3g')}")


def redraw(widget: BandMaskViewer, **changes: object) -> None:
    """Another draw of the mask, so that nothing is shown twice."""
    widget.state = replace(widget.state, seed=widget.state.seed + 1, **changes)


def mask_table() -> pd.DataFrame:
    rows = []
    for count, size in ((64, 64), (64, 256), (1, 512)):
        samples = torch.arange(count)
        times = {}
        for shape in masks.SHAPES:
            spec = MaskSpec(bands.GROUPS["visible"], 0.5, shape=shape)
            times[shape], _ = medians(lambda spec=spec, s=samples, p=size: hidden_pixels(spec, s, (p, p)))
        rows += [
            {"images": count, "px": size, "shape": shape, "ms": ms, "against pixel": ms / times["pixel"]}
            for shape, ms in times.items()
        ]
    return pd.DataFrame(rows)


def medians(run: Callable[[], object]) -> tuple[float, float]:
    """Milliseconds by the wall's clock and of the CPU, after two runs to warm up."""
    run(), run()
    walls, cpus = [], []
    for _ in range(ROUNDS):
        wall, cpu = time.perf_counter(), time.process_time()
        run()
        walls.append(1000 * (time.perf_counter() - wall))
        cpus.append(1000 * (time.process_time() - cpu))
    return statistics.median(walls), statistics.median(cpus)


if __name__ == "__main__":
    main()
