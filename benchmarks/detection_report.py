"""Tables of section 4 of docs/findings.md from what the detector said of each image, which is kept with the project."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from findings_report import markdown

from bandmask import bands, comparison, files, results
from bandmask.diagnosis import detection, serving
from bandmask.diagnosis.detector import RATE
from bandmask.report.sentences import with_interval
from bandmask.resampling import interval, resample

HEALTHY = "none"
UNITS = {
    "dead": "level, reflectance",
    "stuck": "level, reflectance",
    "noisy": "SD, reflectance",
    "striped": "SD, reflectance",
    "dead columns": "share of columns",
    "gain": "factor",
    "offset": "reflectance",
    "shift": "pixels",
}


def record(places: Mapping[int, Path], folder: Path) -> None:
    """What was said of each image in the folds that were measured, as two small files.

    Raises:
        SystemExit: nothing was measured.
    """
    for name, pattern in (("detection", "*.parquet"), ("closed_loop", "loop/*.parquet")):
        measured = sorted(path for place in places.values() for path in place.glob(pattern))
        if not measured:
            raise SystemExit(
                f"nothing was measured below {', '.join(map(str, places.values()))}; run this without `record`"
            )
        table = pd.concat([results.read_table(path) for path in measured], ignore_index=True)
        table = table.drop(columns="encoder_seed", errors="ignore").dropna(axis=1, how="all")
        table["amount"] = table["amount"].astype("float32")
        small = {"sample": "uint16", **dict.fromkeys(("fold", "head_seed", "label", "predicted"), "uint8")}
        small |= dict.fromkeys(("kind", "bands", "method"), "category")
        table = table.astype({column: kind for column, kind in small.items() if column in table})
        if "worst" in table:
            table["worst"] = table["worst"].round(3).astype("float32")
            table["word"] = table["word"].fillna("").astype("category")
        keys = [key for key in ("kind", "amount", "bands", "method", "fold", "head_seed", "sample") if key in table]
        folder.mkdir(exist_ok=True, parents=True)
        with files.writing(folder / f"{name}.parquet") as partial:
            table.sort_values(keys, ignore_index=True).to_parquet(
                partial, compression="zstd", compression_level=19, index=False
            )
        print(f"{len(table)} rows of folds {sorted(set(table['fold'].tolist()))}: {folder / name}.parquet")


def recorded(name: str, folder: Path) -> pd.DataFrame:
    path = files.require(folder / f"{name}.parquet", "python benchmarks/detection.py, then the same with `record`")
    table = results.read_table(path)
    text = {column: table[column].astype(str) for column in ("kind", "bands", "word", "method") if column in table}
    return table.assign(**text)


def report(folder: Path) -> Path:
    """Every table, as a page beside the records."""
    found, loop = recorded("detection", folder), recorded("closed_loop", folder)
    healthy, faulty = found[found["kind"] == HEALTHY], found[found["kind"] != HEALTHY]
    picture = curves(healthy, faulty, folder / "detection.png")
    parts = [
        "# Which band is broken?",
        "Made by `python benchmarks/detection.py report` from `detection.parquet` and `closed_loop.parquet`; section 4 "
        f"of [findings.md](../findings.md) says what was done. {tested(healthy)}. Percent, 95 % intervals over images.",
        "## Healthy images",
        false_alarms(healthy),
        "## Faults, each in every band",
        "AUC: of an image's highest score in units of its fold's threshold, against the same images when healthy.",
        markdown(seen(healthy, faulty)),
        f"![ROC of each fault, over its bands; dashed: the stated rate]({picture.name})",
        "## Seen, by the faulty band",
        "Images in which any band is called faulty.",
        markdown(seen_by_band(faulty)),
        "## What the faulty band looks like",
        "Of those found, at the largest amount; a row a fault.",
        markdown(words(faulty)),
        "## The loop closed",
        f"{tested(loop)}. Accuracy of three heads in service, one fault an image and bands in turn; differences in "
        "points on the same images, over images and heads.",
        markdown(closed(loop)),
    ]
    path = folder / "detection.md"
    with files.writing(path) as partial:
        partial.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    print(path)
    return path


def curves(healthy: pd.DataFrame, faulty: pd.DataFrame, path: Path) -> Path:
    """ROC of every fault over its bands, a panel a kind and a line an amount, as PNG."""
    normal = np.sort(healthy["worst"].to_numpy())
    allowed = np.arange(len(normal) + 1) / len(normal)  # healthy images above the threshold
    levels = np.concatenate([[np.inf], normal[::-1]])
    kinds = list(dict.fromkeys(kind for (kind, _), _ in by_fault(faulty)))
    figure, grid = plt.subplots(3, 3, figsize=(10, 9), sharex=True, sharey=True, layout="constrained")
    for axes, kind in zip(grid.flat, kinds, strict=False):
        amounts = [(amount, part) for (of, amount), part in by_fault(faulty) if of == kind]
        for shade, (amount, part) in zip(np.linspace(0.75, 0.15, len(amounts)), amounts, strict=True):
            found = np.searchsorted(np.sort(part["worst"].to_numpy()), levels, side="right")
            colour = plt.get_cmap("viridis")(shade)
            axes.step(100 * allowed, 100 * (1 - found / len(part)), where="post", label=amount or None, color=colour)
        axes.axvline(100 * RATE, color="0.6", linestyle="--", linewidth=1)
        axes.set(title=kind, xscale="symlog", xlim=(0, 100), ylim=(0, 101), xticks=[0, 1, 5, 20, 100])
        axes.set_xticklabels(["0", "1", "5", "20", "100"])
        if amounts[0][0]:
            axes.legend(title=UNITS.get(kind), fontsize=8, title_fontsize=8)
    figure.supxlabel("healthy images with a false alarm (%)")
    figure.supylabel("images with the fault in which any band is called faulty (%)")
    with files.writing(path) as partial:
        figure.savefig(partial, dpi=90, format="png")
    plt.close(figure)
    return path


def tested(rows: pd.DataFrame) -> str:
    return (
        f"Folds {', '.join(map(str, sorted(set(rows['fold']))))}: {rows['sample'].nunique()} images, each tested once"
    )


def percent(figures: tuple[float, float, float], *, plus: bool = False) -> str:
    return with_interval(*(100 * figure for figure in figures), plus=plus)


def false_alarms(healthy: pd.DataFrame) -> str:
    called = healthy["bands"].str.split().map(set)
    by_band = pd.DataFrame([{name: f"{100 * called.map(lambda c, n=name: n in c).mean():.1f}" for name in bands.NAMES}])
    by_fold = healthy.groupby("fold")["detected"].mean() * 100
    share = percent(detection.share_interval(healthy["detected"].to_numpy()))
    return (
        f"Threshold set on validation images for {100 * RATE:g} % of images with any false alarm. On test images: "
        f"{share} % of images, {100 * called.map(len).mean() / len(bands.NAMES):.2f} % of bands; in single "
        f"folds {', '.join(f'{value:.1f}' for value in by_fold)} %. By band:\n\n{markdown(by_band)}"
    )


def seen(healthy: pd.DataFrame, faulty: pd.DataFrame) -> pd.DataFrame:
    """A row a fault and amount."""
    normal, rows = healthy.set_index("sample")["worst"].sort_index(), []
    for (kind, amount), part in by_fault(faulty):
        wide = {
            name: part.pivot(index="sample", columns="bands", values=name).loc[normal.index].to_numpy()
            for name in ("worst", "detected", "found", "named")
        }
        shares = 100 * part.groupby("bands")["detected"].mean()
        rows.append(
            {
                "fault": kind,
                "amount": amount,
                "AUC": percent(detection.area_interval(normal.to_numpy(), wide["worst"])),
                "seen": percent(detection.mean_interval(wide["detected"])),
                "broken bands named": percent(detection.mean_interval(wide["found"])),
                "and no others": percent(detection.mean_interval(wide["named"])),
                "hardest band, seen": f"{shares.idxmin()} {shares.min():.0f}",
            }
        )
    return pd.DataFrame(rows)


def seen_by_band(faulty: pd.DataFrame) -> pd.DataFrame:
    rows = []
    for (kind, amount), part in by_fault(faulty[faulty["kind"] != "swapped"]):
        shares = (100 * part.groupby("bands")["detected"].mean()).round().astype(int)
        rows.append({"fault": kind, "amount": amount, **shares[list(bands.NAMES)].astype(str)})
    return pd.DataFrame(rows)


def words(faulty: pd.DataFrame) -> pd.DataFrame:
    found = faulty[faulty["found"].astype(bool) & (faulty["word"] != "")]
    table = pd.crosstab(found["kind"], found["word"], normalize="index") * 100
    kinds = [kind for kind in faulty["kind"].unique() if kind in table.index]
    return table.loc[kinds].round().astype(int).astype(str).rename_axis("fault").reset_index()


def closed(loop: pd.DataFrame) -> pd.DataFrame:
    """A row a fault, those that hurt most first; each image was tested in one fold, so folds of a head are one run."""
    loop = loop.assign(encoder_seed=pd.array([0] * len(loop), "Int64"), mask=loop["kind"])
    none, on = serving.METHODS[:2]
    healthy = loop[loop["method"].isin((none, on))]
    rows = [
        {
            "fault": "none",
            "do nothing": accuracy(healthy[healthy["method"] == none]),
            "detector": accuracy(healthy[healthy["method"] == on]),
            "oracle": results.ABSENT,
            "detector − do nothing": difference(healthy, none, on),
            "detector − oracle": results.ABSENT,
        }
    ]
    broken = []
    for kind, part in loop[~loop["method"].isin((none, on))].groupby("kind"):
        amount = part["amount"].iloc[0]
        broken.append(
            {
                "fault": str(kind) if pd.isna(amount) else f"{kind} {amount:g}",
                **{name: accuracy(part[part["method"] == name]) for name in serving.METHODS[2:]},
                "detector − do nothing": difference(part, "do nothing", "detector"),
                "detector − oracle": difference(part, "oracle", "detector"),
            }
        )
    return pd.DataFrame([*rows, *sorted(broken, key=lambda row: float(row["do nothing"]))])


def accuracy(rows: pd.DataFrame) -> str:
    return f"{100 * (rows['label'] == rows['predicted']).mean():.1f}"


def difference(rows: pd.DataFrame, first: str, second: str) -> str:
    """Of methods whose heads are the same ones in service, so a drawn head counts in both."""
    one, other = (rows[rows["method"] == name] for name in (first, second))
    scored = resample({("heads", first): one, ("heads", second): other})
    spread = scored["heads", second].draws - scored["heads", first].draws
    low, high = interval(spread)
    text = percent((scored["heads", second].value - scored["heads", first].value, low, high), plus=True)
    return f"**{text}**" if comparison.verdict(low, high) != "not decided" else text


def by_fault(faulty: pd.DataFrame):
    """Kind and amount as text, and the rows, in the order of the record."""
    for (kind, amount), part in faulty.groupby(["kind", "amount"], sort=True, dropna=False):
        yield (str(kind), "" if np.isnan(amount) else f"{amount:g}"), part
