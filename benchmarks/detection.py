"""Which faults of a band are seen, how surely is the right band named, and what does that buy a classifier in service?

    BANDMASK_DATA=… python benchmarks/detection.py              # five folds of EuroSAT; goes on after a stop
    BANDMASK_DATA=… python benchmarks/detection.py --folds 0 --parts detection     # without encoders
    python benchmarks/detection.py record                       # what lies below outputs/, to docs/findings/
    python benchmarks/detection.py report                       # the tables, from docs/findings/

In each fold: fitted on training images, threshold on validation images, everything below on test images. Each fault is
injected into each of 13 bands of every test image; `swapped` exchanges a band with the next one. The closed loop takes
the fold's stand-in encoder (benchmarks/folds.py), with heads trained on complete images, and one fault an image.
"""

from __future__ import annotations

import argparse
import itertools
import time
from pathlib import Path

import detection_report
import findings
import folds
import numpy as np
import pandas as pd
import torch
from findings_report import FOLDER

from bandmask import bands, params, results
from bandmask.batches import Batches
from bandmask.diagnosis import detection, serving
from bandmask.diagnosis.detector import Detector
from bandmask.diagnosis.faults import Fault
from bandmask.fills import RidgeLocalFill
from bandmask.masking import MaskSpec
from bandmask.packs import Pack
from bandmask.views import View

DATASET = "eurosat"
PARTS = ("detection", "loop")
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=["measure", "record", "report"], default="measure")
    parser.add_argument("--folds", type=int, nargs="+", default=list(range(folds.FOLDS)))
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--to", type=Path, default=FOLDER, help="folder of records and report")
    options = parser.parse_args()
    if options.what == "record":
        detection_report.record({fold: folder_of(fold) for fold in options.folds}, options.to)
    elif options.what == "report":
        detection_report.report(options.to)
    else:
        for part, fold in itertools.product(options.parts, options.folds):
            {"detection": detect, "loop": close_the_loop}[part](fold, folder_of(fold))


def folder_of(fold: int) -> Path:
    return params.experiment_folder(folds.experiment_of(DATASET, fold)) / "detection"


def detector_of(pack: Pack, folder: Path) -> Detector:
    """Fitted on the fold's training images, unless it is there."""
    if (path := folder / "detector.npz").exists():
        return Detector.load(path)
    detector = Detector.fit(pack)
    detector.save(path)
    return detector


def faults_of(kind: str, amount: float | None) -> list[Fault]:
    """The fault in each of 13 bands."""
    if kind == "swapped":
        return [Fault(kind, pair) for pair in itertools.pairwise(bands.NAMES)]
    return [Fault(kind, (name,), amount) for name in bands.NAMES]


def detect(fold: int, folder: Path) -> None:
    """What the detector says of every test image, healthy and with every fault; a file a fault."""
    pack = folds.open_fold(DATASET, fold)
    detector = detector_of(pack, folder)
    batches = list(Batches(pack, "test").epoch())
    images, samples = (torch.cat([getattr(batch, name) for batch in batches]) for name in ("images", "samples"))
    if not (path := folder / "healthy.parquet").exists():
        sketch = detector.sketch(images)
        called, names = detector.faulty(sketch), np.array(bands.NAMES)
        worst = detector.first_look(sketch).max(1) / detector.threshold
        rows = {
            "bands": [" ".join(names[row]) for row in called],
            "detected": called.any(1),
            "worst": worst,
            "word": "",
        }
        healthy = {"kind": detection_report.HEALTHY, "amount": None, "sample": samples.numpy(), **rows, "fold": fold}
        results.write_table(pd.DataFrame(healthy), path)
    for kind, amounts in AMOUNTS.items():
        for amount in amounts:
            if (path := folder / f"{name_of(kind, amount)}.parquet").exists():
                continue
            start = time.perf_counter()
            found = detection.measure(detector, images, samples, faults_of(kind, amount), words=amount == amounts[-1])
            found["worst"] /= detector.threshold  # so that folds are of one scale: above 1 is faulty
            results.write_table(found.assign(fold=fold), path)
            seen = f"{100 * found['detected'].mean():.1f} % seen, {time.perf_counter() - start:.0f} s"
            print(f"{time.strftime('%X')} fold {fold}, {name_of(kind, amount)}: {seen}", flush=True)


def name_of(kind: str, amount: float | None) -> str:
    return kind.replace(" ", "_") if amount is None else f"{kind.replace(' ', '_')}-{amount:g}"


def close_the_loop(fold: int, folder: Path) -> None:
    """Classes that heads in service say, with one fault an image and bands in turn; a file a fault."""
    missing = {
        kind: path for kind in AMOUNTS if not (path := folder / "loop" / f"{name_of(kind, None)}.parquet").exists()
    }
    if not missing:
        return
    plan = findings.plan_of(DATASET, fold, findings.FEATURES["classification"])
    complete = View(plan.teacher, MaskSpec(), torch.zeros(13), plan.card.image_size)
    heads = findings.heads_on(plan, complete, findings.PASSES_IN_SERVICE)
    detector, fill = detector_of(plan.pack, folder), RidgeLocalFill(plan.moments)
    for kind, path in missing.items():
        amount = AMOUNTS[kind][-1]
        first = kind == next(iter(AMOUNTS))  # healthy images are the same for all
        rows = serving.closed_loop(
            plan.pack,
            faults_of(kind, amount),
            detector,
            fill,
            plan.teacher,
            heads,
            image_size=plan.card.image_size,
            compute=plan.compute,
            methods=serving.METHODS if first else serving.METHODS[2:],
        )
        results.write_table(rows.assign(kind=kind, amount=amount, fold=fold), path)
        right = (rows["predicted"] == rows["label"]).groupby(rows["method"], sort=False).mean()
        said = ", ".join(f"{method} {100 * share:.1f}" for method, share in right.items())
        print(f"{time.strftime('%X')} fold {fold}, {kind}: {said}", flush=True)


if __name__ == "__main__":
    main()
