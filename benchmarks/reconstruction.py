"""How well are hidden bands reconstructed: a trained head, with and without an encoder, beside what costs nothing.

    python benchmarks/reconstruction.py --encoder outputs/eurosat/encoder      # after `make run EXPERIMENT=eurosat`
    python benchmarks/reconstruction.py --fold 0                  # of benchmarks/findings.py: its images and encoder

One head a seed is trained on random masks of all kinds (`draws.AnyMask`), and judged on held-out images, in reflectance
and per band, under masks that it was not told of. Negative differences mean: better than ridge with a
local correction. Killed, it goes on from the last epoch; what was measured stays in `outputs/reconstruction`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import folds
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", type=Path, nargs="+", default=[], help="folders with model.safetensors")
    parser.add_argument("--dataset", default="eurosat")
    parser.add_argument("--fold", type=int, help="of the data set, see folds.py; its encoder is then made unless there")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--device", default="auto")
    options = parser.parse_args()
    compute = folds.float32(options.device)
    if options.fold is None:
        name, pack = options.dataset, datasets.open_dataset(options.dataset)
    else:
        name, pack = folds.experiment_of(options.dataset, options.fold), folds.open_fold(options.dataset, options.fold)
        options.encoder = options.encoder or [folds.stand_in(options.dataset, options.fold, pack, compute)]
    moments, folder = Moments.of(pack), files.outputs_root() / "reconstruction" / name
    methods = free_methods(moments)
    for path in [None, *options.encoder]:
        name = "head, no encoder" if path is None else f"head, {path.name}"
        made, history = train_reconstruction(
            None if path is None else encoders.load_encoder(path)[0],
            pack,
            draws.AnyMask(),
            moments,
            seeds=options.seeds,
            epochs=options.epochs,
            compute=compute,
            checkpoint=folder / f"{name.removeprefix('head, ').replace(' ', '_')}.pt",
            label=name,
        )
        last = history[history["epoch"] == options.epochs]
        error, ridge = last["val_error"], last["val_ridge_error"].iloc[0]
        print(f"{name}: validation {error.mean():.4f} ± {error.std():.4f} SD, {REFERENCE} {ridge:.4f}", flush=True)
        methods[name] = made.fills
    masks = {
        f"{name} · {ratio:.0%}": MaskSpec(tuple(hidden.split()), ratio=ratio)
        for name, hidden in SETS.items()
        for ratio in RATIOS
    }
    errors = image_errors(pack, masks, methods, device=compute.device)
    table = error_table(errors, band_sd(moments))
    for name, frame in (("errors", errors), ("table", table)):
        with files.writing(folder / f"{name}.parquet") as partial:
            frame.to_parquet(partial)
    print(report(table), f"\nWritten: {folder}/table.parquet, a row a measurement, and errors.parquet, by image")
    for name in methods:
        if name.startswith("head"):
            print(verdict(table, name))
    if options.encoder:
        print(verdict(error_table(errors, band_sd(moments), reference="head, no encoder"), name))


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
