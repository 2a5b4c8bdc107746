"""Accuracy over every subset of bands: how each method loses, at what it is worst, and what each band is worth.

    make run EXPERIMENT=eurosat
    python benchmarks/robustness.py eurosat
    python benchmarks/robustness.py eurosat --subsets sampled --images 60 --methods pre-trained ridge
    python benchmarks/robustness.py eurosat --encoder "aware=outputs/eurosat/aware/encoder-seed0"
    python benchmarks/robustness.py eurosat --folds 0   # of benchmarks/findings.py: its images and encoders
    python benchmarks/robustness.py eurosat --folds 1 2 3 4 --subsets sampled --complete-to 1    # their images together
    python benchmarks/robustness.py eurosat --folds 0 1 2 3 4 --report    # of what was scored before, nothing is run

In transfer: heads trained on complete images with the experiment's pre-trained encoder are in service, and whole bands
are lost. Methods: `pre-trained` (lost bands at the data set's mean), `ridge` (the same encoder; lost bands predicted
from the visible ones), `any-band` (the encoder of `08_any_band_encoder`). By default those whose encoder is there.
`--encoder NAME=FOLDER[:FILL]` adds others; fills: dataset_mean, band_mean, ridge, nan. A folder of an encoder for every
loss gives the whole of it; with a fill, such as ridge, its aligned encoder alone. In FOLDER `{experiment}` stands for
that of the fold, and `*` for the mark of its settings.

Test images; 8,192 subsets of 201 images are 1.6 million encoder passes a method. Every part is kept, so a run that was
stopped goes on. All methods are first scored on a sample of subsets, with tables, then on all.
"""

from __future__ import annotations

import argparse
import itertools
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("TQDM_MININTERVAL", "5")  # a log file gets a line now and then

import folds
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from torch import nn

from bandmask import any_band, bands, datasets, encoders, evaluate, files, fills, first_layer, masking, params, results
from bandmask.heads import SceneHeads
from bandmask.moments import Moments
from bandmask.packs import Pack
from bandmask.report.sentences import with_interval
from bandmask.robustness import lattice, mapping, shapley
from bandmask.robustness.subsets import score_subsets
from bandmask.training import Compute
from bandmask.views import View
from bandmask.visualizer import effects

FILLS = ("dataset_mean", "band_mean", "ridge", "nan")


class Method(NamedTuple):
    """An encoder and what stands in lost bands."""

    name: str
    encoder: nn.Module
    fill: masking.Fill


def methods(experiment: str, given: list[str], chosen: list[str], pretrained: nn.Module, pack: Pack) -> list[Method]:
    """Those that are there, or those asked for.

    Raises:
        ValueError: an unknown method or fill.
        FileNotFoundError: a method whose encoder is not there.
    """
    folder = params.experiment_folder(experiment)
    mean = torch.tensor(pack.band_means())
    made: dict[str, masking.Fill] = {
        "dataset_mean": masking.fill_values("dataset_mean", mean),
        "band_mean": masking.fill_values("band_mean", mean),
        "ridge": fills.RidgeLocalFill(Moments.of(pack)),
        "nan": first_layer.MISSING,
    }
    known: dict[str, tuple[Path | None, str]] = {"pre-trained": (None, "dataset_mean"), "ridge": (None, "ridge")}
    made_by_findings = sorted((folder / "findings" / "any-band").glob("*"))
    known["any-band"] = ([folder / "any-band" / "encoder-seed0", *made_by_findings][-1], "")
    for text in given:
        name, _, path = text.partition("=")
        path, _, fill = path.partition(":")
        place = Path(path.replace("{experiment}", experiment))
        known[name] = next(iter(sorted(place.parent.glob(place.name))), place), fill
    names = chosen or [name for name, (path, _) in known.items() if path is None or path.is_dir()]
    found = []
    for name in names:
        if name not in known:
            raise ValueError(f"unknown method {name!r}; available: {', '.join(known)}, or --encoder NAME=FOLDER[:FILL]")
        path, fill = known[name]
        model, reads_nan = pretrained, False
        if path is not None and (path / any_band.GATE).exists() and not fill:
            model, reads_nan = any_band.load(path)[0], True
        elif path is not None:
            model = encoders.load_encoder(path)[0]
        fill = fill or ("nan" if reads_nan else "dataset_mean")
        if fill not in FILLS:
            raise ValueError(f"unknown fill {fill!r} of {name}; available: {', '.join(FILLS)}")
        found.append(Method(name, model, made[fill]))
    return found


def heads_of(
    experiment: str, given: Path | None, encoder: nn.Module, pack: Pack, image_size: int, compute: Compute
) -> SceneHeads:
    """Heads in service: those in the folder given, or the experiment's; else trained as notebook 04 does, and kept.

    Raises:
        FileNotFoundError: a folder was given, and holds none of this encoder; nothing is written there.
    """
    folder = params.experiment_folder(experiment)
    if (heads := effects.heads_in_service(given or folder, encoder)) is not None:
        return heads
    if given is not None:
        raise FileNotFoundError(f"no finished head_in_service of this encoder in {given}; leave --heads out")
    print(f"no heads in service below {folder}: training them on complete images", flush=True)
    view = View(encoder, image_size=image_size)
    return evaluate.in_service(experiment, "classification", view, pack, {"passes": 10}, compute=compute)[0]


def interval(row: pd.Series, digits: int = 1, *, plus: bool = False) -> str:
    return with_interval(100 * row.value, 100 * row.low, 100 * row.high, digits, plus=plus)


def column(found: pd.DataFrame, **options) -> list[str]:
    return [interval(row, **options) for row in found.itertuples()]


def report(scored: dict[str, lattice.Scores], exact: bool) -> None:
    """Everything measured, as Markdown."""
    first = next(iter(scored.values()))
    codes, images = first.codes, len(first.samples)
    print(f"\n## {len(codes)} subsets{'' if exact else ' (a sample)'}, {images} test images, ", end="")
    print(f"{len(first.head_seeds)} heads; percent, 95 % intervals over images and heads\n")
    weights, every = lattice.mean_weights(codes), lattice.overall_weights(codes)
    lost = pd.DataFrame({"lost bands": range(len(weights)), "subsets": (weights > 0).sum(1)})
    for name, scores in scored.items():
        lost[name] = column(lattice.estimate(scores, weights))
    print("### Mean accuracy by number of lost bands\n")
    print(lost.to_markdown(index=False))
    print("\nMean over 1 to 12 lost bands, each number alike:\n")
    print(pd.DataFrame({n: column(lattice.estimate(s, every)) for n, s in scored.items()}).to_markdown(index=False))
    compare(scored, weights, every)
    print("\n### Worst subset at each number of lost bands (hidden bands, accuracy)\n")
    worst = {"lost bands": range(len(weights))}
    for name, scores in scored.items():
        found = lattice.extremes(scores).set_index("lost")
        worst[name] = [f"{short(row)}: {100 * row.accuracy:.1f}" for row in found.itertuples()]
    print(pd.DataFrame(worst).to_markdown(index=False))
    print(f"\n### Shapley value of each band (points of accuracy){'' if exact else ', estimated'}\n")
    worth = pd.DataFrame({"band": [band.label for band in bands.BANDS]})
    for name, scores in scored.items():
        worth[name] = column(lattice.estimate(scores, shapley.value_weights(codes)), digits=2)
    print(worth.to_markdown(index=False))
    if (lattice.lost_bands(codes) == 2).sum() == len(shapley.pairs()):
        interactions(scored, exact)


def picture(scored: dict[str, lattice.Scores], path: Path) -> None:
    """How accuracy falls, and every subset as a cell, in one figure."""
    wide = len(scored)
    figure = plt.figure(figsize=(4.4 * wide, 12), layout="constrained")
    grid = figure.add_gridspec(2, wide, height_ratios=[4, 6])
    first = next(iter(scored.values()))
    chance = np.bincount(first.labels).max() / len(first.labels)
    mapping.plot_losses(scored, figure.add_subplot(grid[0, :]), chance=chance)
    for column, (name, scores) in enumerate(scored.items()):
        mapping.plot_map(scores, figure.add_subplot(grid[1, column]), title=name, chance=chance)
    with files.writing(path) as partial:
        figure.savefig(partial, dpi=110, format="png")
    plt.close(figure)


def short(row) -> str:
    """Lost bands, or what is left where that is shorter."""
    if len(row.hidden) <= len(row.visible):
        return row.hidden or "none"
    return f"all but {row.visible}" if row.visible else "all"


def compare(scored: dict[str, lattice.Scores], *weights) -> None:
    """Differences on the same images."""
    references = [name for name in ("pre-trained", "ridge") if name in scored]
    pairs = [(a, b) for b in references for a in scored if a != b and (a, b) != ("pre-trained", "ridge")]
    pairs = pairs or list(itertools.combinations(scored, 2))
    if not pairs:
        return
    table = pd.DataFrame({"lost bands": [*range(len(bands.NAMES) + 1), "1 to 12"]})
    for after, before in pairs:
        found = pd.concat([lattice.estimate(scored[after], w, minus=scored[before]) for w in weights])
        table[f"{after} − {before}"] = column(found, plus=True)
    print("\n### Paired differences (points)\n")
    print(table.to_markdown(index=False))


def interactions(scored: dict[str, lattice.Scores], exact: bool) -> None:
    """Strongest pairs."""
    make = shapley.interaction_weights if exact else shapley.first_loss_weights
    title = "Shapley interaction" if exact else "Both lost against the two losses added up"
    print(f"\n### {title} (points): below 0 one band stands in for the other\n")
    rows = []
    for name, scores in scored.items():
        found = lattice.estimate(scores, make(scores.codes))
        found["pair"] = [f"{bands.NAMES[a]} {bands.NAMES[b]}" for a, b in shapley.pairs()]
        order = found.sort_values("value", kind="stable")
        for row in pd.concat([order.head(4), order.tail(2)]).itertuples():
            rows.append({"method": name, "pair": row.pair, "interaction": interval(row, 2, plus=True)})
    print(pd.DataFrame(rows).to_markdown(index=False), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", help="folder below outputs/ that holds encoder/")
    parser.add_argument("--dataset", default="eurosat")
    parser.add_argument("--methods", nargs="*", default=[], help="default: all whose encoder is there")
    parser.add_argument("--encoder", action="append", default=[], metavar="NAME=FOLDER[:FILL]", help="another method")
    parser.add_argument("--heads", type=Path, help="folder with in_service/classification; default: the experiment's")
    parser.add_argument("--subsets", choices=["exact", "sampled"], default="exact")
    parser.add_argument("--each", type=int, default=39, help="subsets of each number lost in the sample")
    parser.add_argument(
        "--complete-to", type=int, default=2, help="the sample has all that lose or leave so many bands"
    )
    parser.add_argument("--images", type=int, default=0, help="test images, stratified by class; 0: all")
    parser.add_argument("--folds", type=int, nargs="+", default=[], help="see folds.py; of their experiments")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--seed", type=int, default=0, help="of images and sampled subsets")
    parser.add_argument("--report", action="store_true", help="tables and picture of what was scored before")
    given = parser.parse_args()
    names = [folds.experiment_of(given.dataset, fold) for fold in given.folds] or [given.experiment]
    folder = params.experiment_folder(f"{given.dataset}-folds" if len(names) > 1 else names[0]) / "robustness"
    if given.report:
        tell([scored_before(name, given.methods) for name in names], folder, given.dataset)
        return
    parts = [part_of(name, fold, given) for name, fold in itertools.zip_longest(names, given.folds)]
    rounds = [lattice.some_subsets(given.complete_to, given.each, seed=given.seed)]
    if given.subsets == "exact":
        rounds.append(lattice.every_subset())  # what the sample has done is not done again
    for codes in rounds:
        tell([part.score(codes, given.batch_size) for part in parts], folder, given.dataset)


def scored_before(experiment: str, chosen: list[str]) -> dict[str, lattice.Scores]:
    """Of the methods asked for, or of all that are there.

    Raises:
        FileNotFoundError: one of them, or all, were not scored.
    """
    folder = params.experiment_folder(experiment) / "robustness"
    names = chosen or [path.stem for path in sorted(folder.glob("*.npz"))]
    if not names:
        raise FileNotFoundError(f"nothing was scored in {folder}; leave --report out")
    return {name: lattice.Scores.load(folder / f"{name}.npz") for name in names}


def tell(found: list[dict[str, lattice.Scores]], folder: Path, dataset: str) -> None:
    """Table, picture and report of what every part has, their images together."""
    common = [name for name in found[0] if all(name in scored for scored in found)]
    scored = {name: pooled([of_part[name] for of_part in found]) for name in common}
    tables = [scores.table(method=name, dataset=dataset) for name, scores in scored.items()]
    results.write_table(pd.concat(tables, ignore_index=True), folder / "robustness.parquet")
    if exact := len(next(iter(scored.values())).codes) == len(lattice.every_subset()):
        picture(scored, folder / "map.png")
    report(scored, exact)
    print(f"\nwritten: {folder / 'robustness.parquet'}")


class Part(NamedTuple):
    """An experiment, or a fold: images, methods, and the heads in service."""

    folder: Path
    pack: Pack
    rows: np.ndarray
    methods: list[Method]
    heads: SceneHeads
    image_size: int
    compute: Compute

    def score(self, codes: np.ndarray, batch_size: int) -> dict[str, lattice.Scores]:
        """Of each method; what is there is not scored again."""
        scored = {}
        for method in self.methods:
            began = time.monotonic()
            scored[method.name] = score_subsets(
                method.encoder,
                method.fill,
                self.heads,
                self.pack,
                codes=codes,
                rows=self.rows,
                image_size=self.image_size,
                batch_size=batch_size,
                compute=self.compute,
                folder=self.folder,
                label=f"{method.name}, {len(codes)} subsets",
            )
            took = time.monotonic() - began
            print(f"{self.folder.parent.name}, {method.name}: {len(codes)} subsets after {took:.0f} s", flush=True)
            scored[method.name].save(self.folder / f"{method.name.replace(' ', '')}.npz")
        return scored


def pooled(parts: Sequence[lattice.Scores]) -> lattice.Scores:
    """Scores of other images on the same subsets, such as those of the folds of a cross-validation, as one.

    Head k of all parts counts as one run over all images, as if it were one method that was fitted part by part. Images
    of two parts are of different groups.

    Raises:
        ValueError: nothing to pool; parts with other subsets or heads; an image that is in two parts.
    """
    if not parts:
        raise ValueError("give the scores of one part or more")
    first = parts[0]
    if differs := [
        name
        for part in parts
        for name in ("codes", "head_seeds")
        if not np.array_equal(getattr(part, name), getattr(first, name))
    ]:
        raise ValueError(f"the parts differ in {differs[0]}; score all with the same")
    samples = np.concatenate([part.samples for part in parts])
    if len(np.unique(samples)) < len(samples):
        raise ValueError("an image is in two parts; each counts once")
    starts = np.cumsum([0, *(part.groups.max() + 1 for part in parts[:-1])])
    return lattice.Scores(
        first.codes,
        np.concatenate([part.correct for part in parts], axis=2),
        samples,
        np.concatenate([part.labels for part in parts]),
        np.concatenate([part.groups + start for part, start in zip(parts, starts, strict=True)]),
        first.head_seeds,
    )


def part_of(experiment: str, fold: int | None, given: argparse.Namespace) -> Part:
    pack = datasets.open_dataset(given.dataset) if fold is None else folds.open_fold(given.dataset, fold)
    folder, compute = params.experiment_folder(experiment), folds.float32(given.device)
    pretrained, card = encoders.load_encoder(folder / "encoder")
    found = methods(experiment, given.encoder, given.methods, pretrained, pack)
    heads = heads_of(experiment, given.heads, pretrained, pack, card.image_size, compute)
    rows = lattice.stratified(pack.labels, pack.rows("test"), given.images, seed=given.seed)
    print(f"{experiment}: {len(rows)} test images; methods: {', '.join(m.name for m in found)}", flush=True)
    return Part(folder / "robustness", pack, rows, found, heads, card.image_size, compute)


if __name__ == "__main__":
    main()
