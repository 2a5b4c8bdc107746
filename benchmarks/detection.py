"""Which faults of a band are seen, how surely is the right band named, and what does that buy a classifier in service?

Run:  BANDMASK_DATA=... python benchmarks/detection.py                                  (detection alone)
      BANDMASK_DATA=... python benchmarks/detection.py --encoder outputs/eurosat/encoder  (after `make run
      EXPERIMENT=eurosat`: with the closed loop)

Fitted on training images, threshold on validation images, everything below on test images. Each fault is injected into
each of 13 bands of every test image; `swapped` exchanges a band with the next one. Intervals are 95 %, over images.
Writes detection.parquet and closed_loop.parquet to outputs/detection.
"""

import argparse
import itertools
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from bandmask import bands, comparison, datasets, encoders, files, results
from bandmask.batches import Batches
from bandmask.classification import train_heads
from bandmask.diagnosis import detection, serving
from bandmask.diagnosis.detector import RATE, Detector
from bandmask.diagnosis.faults import Fault
from bandmask.fills import RidgeLocalFill
from bandmask.masking import MaskSpec
from bandmask.training import Compute
from bandmask.views import View

AMOUNTS: dict[str, tuple[float | None, ...]] = {
    "dead": (0.0,),
    "stuck": (0.05, 0.1, 0.2),
    "noisy": (0.001, 0.003, 0.01),
    "striped": (0.001, 0.003, 0.01),
    "dead columns": (0.02, 0.05, 0.2),
    "gain": (1.02, 1.05, 1.1, 1.3),
    "offset": (0.003, 0.01, 0.03),
    "shift": (0.25, 0.5, 1.0),
    "swapped": (None,),
}


def faults_of(kind: str, amount: float | None) -> list[Fault]:
    """The fault in each of 13 bands."""
    if kind == "swapped":
        return [Fault(kind, pair) for pair in itertools.pairwise(bands.NAMES)]
    return [Fault(kind, (name,), amount) for name in bands.NAMES]


def percent(figures: tuple[float, float, float]) -> str:
    return "{:.1f} [{:.1f}, {:.1f}]".format(*(100 * figure for figure in figures))


def detect(detector: Detector, images: torch.Tensor, samples: torch.Tensor, folder: Path) -> None:
    healthy = detector.sketch(images)
    worst, called = detector.first_look(healthy).max(1), detector.faulty(healthy)
    print(f"Threshold {detector.threshold:.2f}, set for {100 * detector.rate:g} % of healthy images.")
    print(f"False alarms on {len(images)} healthy test images: {percent(detection.share_interval(called.any(1)))} % of")
    print(f"images, {100 * called.mean():.2f} % of bands; by band (%):\n")
    print(pd.DataFrame([100 * called.mean(0)], columns=bands.NAMES).round(1).to_markdown(index=False), "\n")
    frames, rows, by_band, words = [], [], [], {}
    for kind, amounts in AMOUNTS.items():
        for amount in amounts:
            found = detection.measure(detector, images, samples, faults_of(kind, amount), words=amount == amounts[-1])
            frames.append(found)
            wide = {name: found.pivot(index="sample", columns="bands", values=name) for name in found.columns[4:8]}
            shares = wide["detected"].mean() * 100
            row = {"fault": kind, "amount": "" if amount is None else f"{amount:g}"}
            rows.append(
                {
                    **row,
                    "AUC": percent(detection.area_interval(worst, wide["worst"].to_numpy())),
                    "detected (%)": percent(detection.mean_interval(wide["detected"].to_numpy())),
                    "faulty bands found (%)": percent(detection.mean_interval(wide["found"].to_numpy())),
                    "and no others (%)": percent(detection.mean_interval(wide["named"].to_numpy())),
                    "worst band": f"{shares.idxmin()} {shares.min():.0f}",
                }
            )
            if kind != "swapped":
                by_band.append({**row, **shares[list(bands.NAMES)].round().astype(int)})
            if "word" in found:
                words[kind] = found.loc[found["found"], "word"].value_counts(normalize=True)
    print(pd.DataFrame(rows).to_markdown(index=False), "\n")
    print("Images with the fault in which any band is called faulty (%), by the faulty band:\n")
    print(pd.DataFrame(by_band).to_markdown(index=False), "\n")
    print("What the faulty band looks like (% of those found), largest amount; a row a fault:\n")
    print((100 * pd.DataFrame(words).T.fillna(0)).round().astype(int).to_markdown(), "\n")
    results.write_table(pd.concat(frames, ignore_index=True), folder / "detection.parquet")


def close_the_loop(detector: Detector, pack, source: str, size: int, seeds: list[int], folder: Path) -> None:
    compute = Compute.of("cpu")
    encoder, card = encoders.load_encoder(source)
    view = View(encoder, MaskSpec(), torch.zeros(13), size)
    heads, _ = train_heads(view, pack, seeds=seeds, passes=10, compute=compute, label="head on complete images")
    fill = RidgeLocalFill(detector.judge.moments)
    frames = []
    for kind, amounts in AMOUNTS.items():
        faults = faults_of(kind, amounts[-1])
        methods = serving.METHODS if not frames else serving.METHODS[2:]  # healthy images are the same for all
        rows = serving.closed_loop(
            pack, faults, detector, fill, encoder, heads, image_size=size, compute=compute, methods=methods
        )
        frames.append(rows.assign(fault=kind if amounts[-1] is None else f"{kind} {amounts[-1]:g}"))
    table = pd.concat(frames, ignore_index=True)
    results.write_table(table, folder / "closed_loop.parquet")
    right = (table["predicted"] == table["label"]).groupby([table["fault"], table["method"]], sort=False).mean() * 100
    wide = right.unstack("method").reindex(columns=serving.METHODS[2:]).round(1)
    for name, (first, second) in {
        "detector − do nothing": ("do nothing", "detector"),
        "detector − oracle": ("oracle", "detector"),
    }.items():
        found = comparison.paired_difference(table, first, second, by=("fault",)).set_index("fault")
        wide[name] = [percent(tuple(row)) for row in found[["difference", "low", "high"]].to_numpy()]
    first = right.xs(table["fault"].iloc[0], level="fault")
    cost = comparison.paired_difference(table, "healthy", "healthy, detector on", by=("fault",)).iloc[0]
    print(
        f"Closed loop, {card.name}, test accuracy (%), mean over {len(seeds)} heads; one fault an image, bands in turn."
    )
    print(f"Healthy images: {first['healthy']:.1f}; with the detector on: {first['healthy, detector on']:.1f},")
    print(f"difference {percent((cost['difference'], cost['low'], cost['high']))} points.\n")
    print(wide.to_markdown())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="eurosat")
    parser.add_argument("--encoder", help="folder of an encoder; without it, detection alone")
    parser.add_argument("--image-size", type=int, default=64, help="pixels that the encoder takes")
    parser.add_argument("--rate", type=float, default=RATE, help="of false alarms, an image")
    parser.add_argument("--images", type=int, default=10**9, help="test images, at most")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the heads")
    options = parser.parse_args()
    start, folder = time.perf_counter(), files.outputs_root() / "detection"
    pack = datasets.open_dataset(options.dataset)
    detector = Detector.fit(pack, rate=options.rate)
    print(f"Fitted on {len(detector.judge.healthy)} training images in {time.perf_counter() - start:.0f} s.")
    rows = pack.rows("test")
    rows = rows[np.linspace(0, len(rows) - 1, min(options.images, len(rows))).astype(int)]
    batches = list(Batches(pack, rows).epoch())
    detect(detector, *(torch.cat([getattr(b, name) for b in batches]) for name in ("images", "samples")), folder)
    if options.encoder:
        close_the_loop(detector, pack, options.encoder, options.image_size, options.seeds, folder)
    print(f"\n{time.perf_counter() - start:.0f} s in all.")


if __name__ == "__main__":
    main()
