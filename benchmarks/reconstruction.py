"""How well are hidden bands reconstructed: a trained head, with and without an encoder, beside what costs nothing.

    python benchmarks/reconstruction.py --encoder outputs/eurosat/encoder      # after `make run EXPERIMENT=eurosat`
    python benchmarks/reconstruction.py --folds 0 1 2 3 4         # of benchmarks/findings.py: their images and encoders
    python benchmarks/reconstruction.py report --folds 0 1 2 3 4  # what was measured before, their images together

One head a seed is trained on random masks of all kinds (`draws.AnyMask`), and judged on held-out images, in reflectance
and per band, under masks that it was not told of. Negative differences mean: better than ridge with a
local correction. Killed, it goes on from the last epoch; what was measured stays in `outputs/reconstruction`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import folds
import numpy as np
import pandas as pd

from bandmask import datasets, draws, encoders, files, resampling
from bandmask.masking import MaskSpec
from bandmask.moments import Moments
from bandmask.reconstruction.errors import REFERENCE, error_table, free_methods, image_errors
from bandmask.reconstruction.heads import band_sd
from bandmask.reconstruction.training import train_reconstruction
from bandmask.report.sentences import with_interval

ONLY_BLUE_AND_RED = "B01 B03 B05 B06 B07 B08 B8A B09 B10 B11 B12"
SETS = {  # as tables call them: what is hidden
    "B08": "B08",
    "B02 B03 B04": "B02 B03 B04",
    "B08 B8A B09 B10 B11": "B08 B8A B09 B10 B11",
    "all but B02 B04": ONLY_BLUE_AND_RED,
}
RATIOS = (1.0, 0.9)
NO_ENCODER = "head, no encoder"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=["measure", "report"], default="measure")
    parser.add_argument("--encoder", type=Path, nargs="+", default=[], help="folders with model.safetensors")
    parser.add_argument("--dataset", default="eurosat")
    parser.add_argument("--folds", type=int, nargs="+", default=[], help="see folds.py; each has an encoder of its own")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--device", default="auto")
    options = parser.parse_args()
    if options.encoder and options.folds:
        raise SystemExit("--encoder and --folds exclude one another: a fold has an encoder of its own")
    parts: list[int | None] = [*options.folds] or [None]
    if options.what == "measure":
        for fold in parts:
            measure(fold, options)
    names = [name_of(options.dataset, fold) for fold in parts]
    places = [folder_of(name) / "errors.parquet" for name in names]
    for place in places:
        files.require(place, "python benchmarks/reconstruction.py, without `report`")
    errors = pooled([pd.read_parquet(place) for place in places])
    sd = band_sd(Moments.of(datasets.open_dataset(options.dataset)))
    table = error_table(errors, sd)
    target = folder_of(f"{options.dataset}-folds" if len(parts) > 1 else names[0]) / "table.parquet"
    with files.writing(target) as partial:
        table.to_parquet(partial)
    print(report(table), f"\nWritten: {target}, a row a measurement")
    heads = [name for name in table["method"].unique() if name.startswith("head")]
    for name in heads:
        print(verdict(table, name))
    without = error_table(errors, sd, reference=NO_ENCODER)
    for name in heads[1:]:
        print(f"against {NO_ENCODER}: {verdict(without, name)}")


def name_of(dataset: str, fold: int | None) -> str:
    return dataset if fold is None else folds.experiment_of(dataset, fold)


def folder_of(name: str) -> Path:
    return files.outputs_root() / "reconstruction" / name


def measure(fold: int | None, options: argparse.Namespace) -> None:
    """Heads trained, and their errors by image written."""
    compute, name = folds.float32(options.device), name_of(options.dataset, fold)
    pack = datasets.open_dataset(options.dataset) if fold is None else folds.open_fold(options.dataset, fold)
    given = options.encoder if fold is None else [folds.stand_in(options.dataset, fold, pack, compute)]
    moments, folder = Moments.of(pack), folder_of(name)
    methods = free_methods(moments)
    for path in [None, *given]:
        method = NO_ENCODER if path is None else f"head, {path.name}"
        made, history = train_reconstruction(
            None if path is None else encoders.load_encoder(path)[0],
            pack,
            draws.AnyMask(),
            moments,
            seeds=options.seeds,
            epochs=options.epochs,
            compute=compute,
            checkpoint=folder / f"{method.removeprefix('head, ').replace(' ', '_')}.pt",
            label=method,
        )
        last = history[history["epoch"] == options.epochs]
        error, ridge = last["val_error"], last["val_ridge_error"].iloc[0]
        print(f"{name}, {method}: validation {error.mean():.4f} ± {error.std():.4f} SD, {REFERENCE} {ridge:.4f}")
        methods[method] = made.fills
    masks = {
        f"{hidden} · {ratio:.0%}": MaskSpec(tuple(names.split()), ratio=ratio)
        for hidden, names in SETS.items()
        for ratio in RATIOS
    }
    errors = image_errors(pack, masks, methods, device=compute.device)
    with files.writing(folder / "errors.parquet") as partial:
        errors.to_parquet(partial)


def pooled(parts: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """Errors by image of several folds as one: head k of all folds counts as one run over all images.

    Raises:
        ValueError: an image that is in two parts.
    """
    samples = np.concatenate([part["sample"].unique() for part in parts])
    if len(np.unique(samples)) < len(samples):
        raise ValueError("an image is in two parts; each counts once")
    return pd.concat(parts, ignore_index=True)


def report(table: pd.DataFrame) -> str:
    """Root mean square errors in 10⁻⁴ reflectance, a row a mask and band, and the last method's difference to ridge."""
    names = list(table["method"].unique())
    rows = []
    for (mask, band), part in table.groupby(["mask", "band"], sort=False):
        found = part.set_index("method")
        row = {"hidden · ratio": mask, "band": band}
        row |= {name: f"{1e4 * found.loc[name, 'rmse']:.1f}" for name in names}
        for name in names:
            if name.startswith("head"):
                apart, low, high = found.loc[name, ["difference", "difference_low", "difference_high"]] * 1e4
                row[f"{name} − {REFERENCE}"] = with_interval(apart, low, high)
        rows.append(row)
    return pd.DataFrame(rows).to_markdown(index=False, disable_numparse=True)


def verdict(table: pd.DataFrame, method: str) -> str:
    """In how many masks and bands a method is better, worse or not told apart from the reference; and by how much."""
    mine = table[table["method"] == method].set_index(["mask", "band"])
    better, worse = (mine["difference_high"] < 0).sum(), (mine["difference_low"] > 0).sum()
    before = mine["rmse"] - mine["difference"]
    share = 100 * (mine["rmse"] / before - 1)
    low, high = resampling.interval(share.to_numpy(), 0.8)
    return (
        f"{method}: of {len(mine)} masks and bands better in {better}, worse in {worse}, undecided in "
        f"{len(mine) - better - worse}; RMSE {share.mean():+.1f} % on average ({low:+.1f} to {high:+.1f} % in the "
        "middle four fifths)"
    )


if __name__ == "__main__":
    main()
