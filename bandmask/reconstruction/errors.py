"""How far what stands in hidden pixels is from the truth: errors in reflectance per band, with intervals.

Only hidden pixels count. Every method is a `fill` of `masking.hide`, which never sees what it is to predict, and all
are judged on the same hidden pixels of the same images, so what these have in common cancels in a difference.
Source: Efron and Tibshirani 1993, chapters 8 and 13 (bootstrap of clustered data).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pandas as pd
import torch

from bandmask import bands
from bandmask.batches import Batches
from bandmask.fills import RidgeLocalFill
from bandmask.imputation import RidgeFill
from bandmask.masking import Fill, Mask, fill_values, hidden_pixels, hide
from bandmask.moments import Moments
from bandmask.packs import Pack
from bandmask.resampling import interval, run_shares

Method = Callable[[Mask], Sequence[Fill]]  # its fills for a mask, one a run (seed); none where it can't be applied
REFERENCE = "local ridge"
_SUMS = ("pixels", "error", "absolute", "squared")


def free_methods(moments: Moments) -> dict[str, Method]:
    """What costs nothing to train, from the moments of training spectra in reflectance.

    `dataset mean` and `band mean` are mask values; `ridge` regresses on the bands that a mask leaves alone;
    `local ridge` corrects that by its own errors around.
    """
    means = torch.tensor(moments.mean)
    partly = range(1, len(bands.NAMES))  # `ridge` needs bands to predict, and bands to predict from
    return {
        "dataset mean": lambda mask: [fill_values("dataset_mean", means)],
        "band mean": lambda mask: [fill_values("band_mean", means)],
        "ridge": lambda mask: [RidgeFill.of(moments, mask.bands)] if len(mask.bands) in partly else [],
        REFERENCE: lambda mask: [RidgeLocalFill(moments, mask.bands)],
    }


@torch.no_grad()
def image_errors(
    pack: Pack,
    masks: Mapping[str, Mask],
    methods: Mapping[str, Method],
    *,
    split: str | np.ndarray = "test",
    image_size: int | None = None,
    batch_size: int = 64,
    device: torch.device | str = "cpu",
) -> pd.DataFrame:
    """Sums of errors over the hidden pixels of each image and band: what every figure below is made of.

    Args:
        pack: of complete images.
        masks: by name, as tables call them.
        methods: by name.
        split: a split's name, or row numbers.
        image_size: side in pixels; None keeps the pack's.
        batch_size: images at a time.
        device: where images are filled.

    Returns:
        A row for each `mask`, `method`, `run` (counted from 0), `band` and `sample` (row in the pack) that lost
        pixels: `pixels`, `error` (filled minus true, in reflectance), `absolute`, `squared`, all sums; and `group`,
        which images that are not independent share.
    """
    batches = Batches(pack, split, batch_size=batch_size, image_size=image_size, device=device)
    groups = pack.index["group"].to_numpy() if "group" in pack.index else np.arange(len(pack.images))
    frames = []
    for mask_name, mask in masks.items():
        runs = [(name, run, fill) for name, method in methods.items() for run, fill in enumerate(method(mask))]
        for batch in batches.epoch():
            images, size = batch.images, (batch.images.shape[-2], batch.images.shape[-1])
            hidden = hidden_pixels(mask, batch.samples, size)
            pixels = hidden.sum((2, 3)).double()
            samples = batch.samples.cpu().numpy()
            for name, run, fill in runs:
                wrong = (hide(images, hidden, mask, fill) - images)[:, mask.channels].double() * hidden
                sums = [pixels, *(part.sum((2, 3)) for part in (wrong, wrong.abs(), wrong.square()))]
                columns = {column: part.cpu().numpy().ravel() for column, part in zip(_SUMS, sums, strict=True)}
                columns |= {"band": np.tile(mask.bands, len(samples)), "sample": samples.repeat(len(mask.bands))}
                frames.append(pd.DataFrame({"mask": mask_name, "method": name, "run": run, **columns}))
    if not frames:
        raise ValueError("nothing to measure: give at least one mask and one method")
    errors = pd.concat(frames, ignore_index=True)
    errors["group"] = groups[errors["sample"]]
    return errors[errors["pixels"] > 0].reset_index(drop=True)


def error_table(
    errors: pd.DataFrame,
    sd: Sequence[float] | np.ndarray,
    *,
    reference: str = REFERENCE,
    draws: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> pd.DataFrame:
    """Errors over hidden pixels per mask, band and method, with bootstrap intervals over images and runs.

    Groups of images are drawn anew, the same ones for every method, and with them each method's runs; the interval of
    a difference to `reference` is therefore of pairs.

    Args:
        errors: from `image_errors`.
        sd: of each band over training pixels, (13,), in SatCLIP order; what the `_sd` columns are relative to.
        reference: the method that `difference` is to.
        draws: number of draws.
        level: of the intervals.
        seed: of the draws.

    Returns:
        Columns `mask`, `band`, `method`, `runs`, `images`, `pixels`; `rmse` with `low` and `high`, `mae` and `bias`
        (filled minus true), in reflectance and mean over runs; `rmse_sd` and `mae_sd`, in SDs of the band;
        `difference`, `difference_low`, `difference_high`: RMSE minus that of the reference, negative = better than it,
        NaN where it was not measured.

    Raises:
        ValueError: methods that were measured on other hidden pixels; their figures can't be compared.
    """
    rows = []
    for (mask, band), part in errors.groupby(["mask", "band"], sort=False):
        wide = part.pivot_table(index=["method", "run"], columns="group", values=list(_SUMS), aggfunc="sum")
        counted = wide["pixels"].to_numpy(float)  # (runs of all methods, groups)
        count = counted.shape[-1]
        if not (counted == counted[0]).all():  # NaN, an image that a method was not given, included
            raise ValueError(f"mask {mask}, {band}: methods were measured on other pixels; measure them in one call")
        weights = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=draws).astype(float)
        spreads, means = {}, {}
        for method in part["method"].unique():
            mine = wide.loc[[method]]
            pixels, error, absolute, squared = (mine[name].to_numpy(float) for name in _SUMS)  # (R, G)
            drawn = np.sqrt((weights @ squared.T) / (weights @ pixels.T))  # (draws, R)
            shares = run_shares(np.random.default_rng([seed, len(mine)]), len(mine), draws)  # alike for alike seeds
            spreads[method] = (shares * drawn).sum(1)
            total = pixels.sum(1)
            means[method] = {
                "runs": len(mine),
                "images": part["sample"].nunique(),
                "pixels": int(total[0]),
                "rmse": float(np.sqrt(squared.sum(1) / total).mean()),
                "mae": float((absolute.sum(1) / total).mean()),
                "bias": float((error.sum(1) / total).mean()),
            }
        scale = float(sd[bands.NAMES.index(str(band))])
        for method, figures in means.items():
            low, high = interval(spreads[method], level)
            figures |= {"low": low, "high": high, "rmse_sd": figures["rmse"] / scale, "mae_sd": figures["mae"] / scale}
            apart = [np.nan] * 3
            if reference in means:
                pairs = interval(spreads[method] - spreads[reference], level)
                apart = [figures["rmse"] - means[reference]["rmse"], *pairs]
            columns = ("difference", "difference_low", "difference_high")
            described = {"mask": mask, "band": band, "method": method}
            rows.append({**described, **figures, **dict(zip(columns, apart, strict=True))})
    return pd.DataFrame(rows)


def evaluate(
    pack: Pack,
    masks: Mapping[str, Mask],
    methods: Mapping[str, Method],
    sd: Sequence[float] | np.ndarray,
    *,
    split: str | np.ndarray = "test",
    image_size: int | None = None,
    reference: str = REFERENCE,
    draws: int = 1000,
    device: torch.device | str = "cpu",
) -> pd.DataFrame:
    """`error_table` of `image_errors`: how far each method is from the truth in hidden pixels of held-out images."""
    errors = image_errors(pack, masks, methods, split=split, image_size=image_size, device=device)
    return error_table(errors, sd, reference=reference, draws=draws)
