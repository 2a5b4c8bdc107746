"""Every method on every loss in both protocols, on real images, in five folds: the tables of docs/findings.md.

    BANDMASK_DATA=… python benchmarks/findings.py classification --folds 0 1 2 3 4   # goes on after a kill
    python benchmarks/findings.py segmentation --folds 0 1 2 3 4                     # the embedded scene
    python benchmarks/findings.py classification record        # what lies below outputs/, to docs/findings/
    python benchmarks/findings.py classification report        # the tables, from docs/findings/

Classification is on EuroSAT, segmentation on the sample's index-derived labels. One file a loss and method lies below
`outputs/<data set>-fold<k>/findings/`; what is there is not made again.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import findings_report
import folds
import pandas as pd
import torch
from contenders import Case, Plan, cases, marked, plain
from losses import COMPLETE, LOSSES, WHOLE

from bandmask import classification, encoders, maps, params, results, segmentation
from bandmask.masking import MaskSpec
from bandmask.moments import Moments
from bandmask.views import View

DATASETS = {"classification": "eurosat", "segmentation": "sample"}
PASSES = 4  # over incomplete images, that heads trained anew cycle through
PASSES_IN_SERVICE = 20  # over complete ones: as many as there are epochs
EPOCHS, ANY_EPOCHS = 20, 20  # the thesis takes 15 for one band and 25 for several
DECODER_EPOCHS, DECODER_WIDTH = 20, 32
HEAD_SEEDS = {"classification": (0, 1, 2), "segmentation": (0,)}
FEATURES = {"classification": 0.0, "segmentation": 1.0}  # weight in the encoder for every loss; decoders take features


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=list(DATASETS))
    parser.add_argument("what", nargs="?", choices=["measure", "record", "report"], default="measure")
    parser.add_argument("--folds", type=int, nargs="+", default=list(range(folds.FOLDS)))
    methods = ["free", "any", "thesis", "features", "variants"]
    parser.add_argument("--methods", nargs="+", choices=[*methods, "ablations"], default=methods)
    parser.add_argument("--losses", nargs="*", default=[], help="names; default all")
    parser.add_argument("--to", type=Path, default=findings_report.FOLDER, help="folder of records and reports")
    options = parser.parse_args()
    dataset = DATASETS[options.task]
    if options.what == "record":
        places = {
            fold: params.experiment_folder(folds.experiment_of(dataset, fold)) / "findings" for fold in options.folds
        }
        findings_report.record(options.task, places, options.to)
    elif options.what == "report":
        findings_report.report(options.task, EPOCHS, ANY_EPOCHS, options.to)
    else:
        known = {loss.name: loss for loss in LOSSES}
        if unknown := sorted(set(options.losses) - set(known)):
            raise SystemExit(f"unknown losses {', '.join(unknown)}; available: {', '.join(known)}")
        losses = [known[name] for name in options.losses or known]
        for fold in options.folds:
            measure(plan_of(dataset, fold, FEATURES[options.task]), options.task, options.methods, losses)


def plan_of(dataset: str, fold: int, any_features: float) -> Plan:
    pack = folds.open_fold(dataset, fold)
    compute = folds.float32()
    teacher, card = encoders.load_encoder(folds.stand_in(dataset, fold, pack, compute))
    folder = params.experiment_folder(folds.experiment_of(dataset, fold)) / "findings"
    trained = {"epochs": EPOCHS, "any_epochs": ANY_EPOCHS, "any_features": any_features}
    return Plan(folder, pack, fold, teacher, card, Moments.of(pack), compute, **trained)


def measure(plan: Plan, task: str, methods: list[str], losses: list[Any]) -> None:
    """All that is not there yet."""
    train, predict = {
        "classification": (heads_on, classification.predict),
        "segmentation": (decoders_on, maps.predict),
    }[task]
    complete = View(plan.teacher, MaskSpec(), torch.zeros(13), plan.card.image_size)
    settings = {**plan.settings(), "passes": [PASSES, PASSES_IN_SERVICE], "head_seeds": HEAD_SEEDS[task]}
    if task == "segmentation":
        settings["decoders"] = [DECODER_EPOCHS, DECODER_WIDTH]
    in_service: list[Any] = []
    for case in [Case(COMPLETE, "pre-trained", lambda: complete), *cases(plan, methods, losses)]:
        mark = marked({**settings, **plain(plan.of_method(case.method))})
        path = plan.folder / task / f"{case.name}-{mark}.parquet"
        if path.exists():
            continue
        if not in_service:
            in_service.append(train(plan, complete, PASSES_IN_SERVICE))
        view, start = case.view(), time.perf_counter()
        heads = {"transfer": in_service[0]}
        if case.loss is not COMPLETE and case.loss not in WHOLE:
            heads["thesis"] = train(plan, view, PASSES)
        table = predictions(plan, view, heads, predict)
        table = table.assign(fold=plan.fold, loss=case.loss.name, method=case.method)
        results.write_table(table, path)
        took = time.perf_counter() - start
        print(f"{time.strftime('%X')} fold {plan.fold}, {case.name}: {said(table)}, {took:.0f} s", flush=True)


def heads_on(plan: Plan, view: View, passes: int) -> Any:
    seeds = HEAD_SEEDS["classification"]
    return classification.train_heads(
        view, plan.pack, seeds=seeds, passes=passes, seed=plan.fold, compute=plan.compute
    )[0]


def decoders_on(plan: Plan, view: View, passes: int) -> Any:
    seeds, classes = HEAD_SEEDS["segmentation"], len(plan.pack.classes)
    decoders, _ = segmentation.make_decoders(view, classes, seeds, width=DECODER_WIDTH, compute=plan.compute)
    options = {"epochs": DECODER_EPOCHS, "passes": passes, "seed": plan.fold, "compute": plan.compute}
    segmentation.train_decoders(view, plan.pack, decoders, **options)
    return decoders


def predictions(plan: Plan, view: View, heads: dict[str, Any], predict: Callable[..., pd.DataFrame]) -> pd.DataFrame:
    """Of validation and test images in each protocol."""
    frames = [
        predict(view, head, plan.pack, split, compute=plan.compute).assign(protocol=protocol, split=split)
        for protocol, head in heads.items()
        for split in ("val", "test")
    ]
    return pd.concat(frames, ignore_index=True)


def said(table: pd.DataFrame) -> dict[str, float]:
    """Accuracy on test images by protocol, in percent."""
    shown = table[table["split"] == "test"]
    weight = shown["pixels"] if "pixels" in shown else pd.Series(1, shown.index)
    right = ((shown["label"] == shown["predicted"]) * weight).groupby(shown["protocol"]).sum()
    return (100 * right / weight.groupby(shown["protocol"]).sum()).round(1).to_dict()


if __name__ == "__main__":
    main()
