"""Tables of docs/findings.md from the recorded predictions, which are kept with the project."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

import pandas as pd
from contenders import (
    ALIGNED,
    AWARE,
    BEST_FREE,
    FEATURES,
    FEATURES_ALONE,
    FOR_ANOTHER,
    FREE,
    LONGER,
    METHODS,
    NO_DISTANCE,
    NO_FEATURES,
    ONE_FOR_ALL,
    THESIS_METHOD,
    TWO_VIEWS,
    passes_for_all,
)
from losses import COMPLETE, KINDS, LOSSES
from recommend import recommend

from bandmask import comparison, files, results
from bandmask.report.sentences import with_interval
from bandmask.resampling import interval, resample

FOLDER = files.project_root() / "docs" / "findings"
ORDER = ["loss", "method", "protocol", "split", "fold", "head_seed", "sample", "label", "predicted"]
PAIRS = (  # what is subtracted, and from what
    (BEST_FREE, ONE_FOR_ALL),
    (THESIS_METHOD, ONE_FOR_ALL),
    (FOR_ANOTHER, ONE_FOR_ALL),
    (BEST_FREE, THESIS_METHOD),
    ("pre-trained", THESIS_METHOD),
    (BEST_FREE, FEATURES),
    (THESIS_METHOD, FEATURES),
    ("pre-trained", FEATURES),
)
PAIRS_OF_VARIANTS = (
    (ONE_FOR_ALL, ALIGNED),
    (ONE_FOR_ALL, TWO_VIEWS),
    (ONE_FOR_ALL, LONGER),
    (THESIS_METHOD, LONGER),
    (ONE_FOR_ALL, AWARE),
    (FEATURES, NO_DISTANCE),
    (FEATURES, NO_FEATURES),
    (FEATURES, FEATURES_ALONE),
    (THESIS_METHOD, NO_DISTANCE),
    (THESIS_METHOD, NO_FEATURES),
    (THESIS_METHOD, FEATURES_ALONE),
)
METRICS = {"classification": "overall_accuracy", "segmentation": "miou_present"}
NAMES = {"overall_accuracy": "overall accuracy", "miou_present": "mIoU of the classes that are there"}
PROTOCOLS = {"kept": "Head in service (transfer)", "retrained": "Head trained anew (thesis)"}


def record(task: str, places: Mapping[int, Path], folder: Path) -> None:
    """Predictions and costs of the folds that were measured, as two small files beside the page that speaks of them.

    Raises:
        SystemExit: nothing was measured.
    """
    measured = sorted(path for place in places.values() for path in (place / task).glob("*.parquet"))
    if not measured:
        raise SystemExit(
            f"nothing was measured below {', '.join(map(str, places.values()))}; run this without `record`"
        )
    table = pd.concat([results.read_table(path) for path in measured], ignore_index=True)
    if "pixels" in table:
        table = comparison.by_group(table).drop(columns="group")
    small = {
        name: "uint16" if name == "sample" else "uint8"
        for name in ("sample", "fold", "head_seed", "label", "predicted")
    }
    table = table.astype(
        {**small, **dict.fromkeys(["loss", "method", "protocol", "split"], "category")} if "pixels" not in table else {}
    )
    table = table.sort_values([name for name in ORDER if name in table], ignore_index=True)
    folder.mkdir(exist_ok=True, parents=True)
    with files.writing(folder / f"{task}.parquet") as partial:
        table.to_parquet(partial, compression="zstd", compression_level=19, index=False)
    rows = []
    for fold, place in places.items():
        for path in sorted((place / "encoders").glob("*/card.json")):
            card = json.loads(path.read_text(encoding="utf-8"))
            rows.append({"fold": fold, "encoder": card["name"], **json.loads(card["notes"])})
    with files.writing(folder / f"{task}_costs.csv") as partial:
        pd.DataFrame(rows).to_csv(partial, index=False)
    print(f"{len(table)} rows of folds {sorted(set(table['fold'].tolist()))}: {folder / task}.parquet")


def recorded(task: str, folder: Path) -> pd.DataFrame:
    """Predictions; each image was tested in one fold, so the folds of a head are one run over all images."""
    path = files.require(
        folder / f"{task}.parquet", f"python benchmarks/findings.py {task}, then the same with `record`"
    )
    table = results.read_table(path)
    text = {name: table[name].astype(str) for name in ("loss", "method", "protocol", "split")}
    table = table.assign(encoder_seed=pd.array([0] * len(table), "Int64"), **text)
    if "pixels" in table:
        table["group"] = table["sample"].astype(str)
    return table


def report(task: str, epochs: int, any_epochs: int, folder: Path) -> Path:
    """Every table, as a page beside the record."""
    table, metric = recorded(task, folder), METRICS[task]
    test = table[table["split"] == "test"]
    complete = test[test["loss"] == COMPLETE.name]
    folds, units = sorted(test["fold"].unique().tolist()), "blocks of patches" if "pixels" in test else "images"
    whole = folder.resolve() == FOLDER
    about = "every method on every loss" if whole else " · ".join(m for m in METHODS if m in set(test["method"]))
    place = "" if whole else f" --to {os.path.relpath(folder, FOLDER.parents[1])}"
    words = os.path.relpath(FOLDER.parent / "findings.md", folder)
    everywhere = table[table["loss"] != COMPLETE.name]
    parts = [
        f"# {task.capitalize()}: {about}",
        f"Made by `python benchmarks/findings.py {task} report{place}` from `{task}.parquet`; what the words mean is "
        f"in [findings.md]({words}). Folds {', '.join(map(str, folds))}: "
        f"{test['sample'].nunique()} {units}, each "
        f"tested once. Percent, {NAMES[metric]}; complete images {shown(complete, metric)}.",
    ]
    for protocol in PROTOCOLS:
        parts += [f"## {PROTOCOLS[protocol]}", markdown(scores(test[test["protocol"] == protocol], metric))]
    found = differences(test, metric)
    for protocol in PROTOCOLS:
        parts += [
            f"## Differences on the same test images: {PROTOCOLS[protocol].lower()}",
            "Points, 95 % interval over images and heads, folds in which the first is ahead; bold: the data decide it.",
            *(markdown(part) for part in side_by_side(found[found["protocol"] == protocol])),
        ]
    parts += [
        "## What encoders cost",
        "Images through them, and seconds of the machine that ran it, median a run.",
        markdown(spent(task, folder)),
    ]
    if everywhere["method"].isin(FREE).any():  # else there is nothing free to advise
        parts += [
            "## What to do",
            "Chosen on validation images: the cheapest method within a standard error of the best, of free ones the "
            "best. In brackets: the score on test images, and there the difference to the best free method.",
            markdown(advice(everywhere, metric, passes_for_all(epochs, any_epochs))),
        ]
    path = folder / f"{task}.md"
    with files.writing(path) as partial:
        partial.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    print(path)
    return path


def markdown(table: pd.DataFrame) -> str:
    return table.to_markdown(index=False, disable_numparse=True)


def advice(everywhere: pd.DataFrame, metric: str, costs: Mapping[str, float]) -> pd.DataFrame:
    """A row a loss that free methods met, a column a protocol."""
    met = set(everywhere[everywhere["method"].isin(FREE)]["loss"].unique())
    everywhere = everywhere[everywhere["loss"].isin(met)]
    splits = (everywhere[everywhere["split"] == split] for split in ("val", "test"))
    found = recommend(*splits, costs, free=FREE, metric=metric)
    test, rows = everywhere[everywhere["split"] == "test"], []
    for loss in LOSSES:
        row = {"loss": loss.name}
        for chosen in found[found["loss"] == loss.name].itertuples():
            same = [loss.name, chosen.protocol, chosen.recommended]
            value = score(test[(test[["loss", "protocol", "method"]] == same).all(axis=1)], metric)
            gain = f"; {with_interval(100 * chosen.gain, 100 * chosen.low, 100 * chosen.high)}" if chosen.gain else ""
            row[PROTOCOLS[str(chosen.protocol)]] = f"{chosen.recommended} ({100 * value:.1f}{gain})"
        if len(row) > 1:
            rows.append(row)
    return pd.DataFrame([{**dict.fromkeys(PROTOCOLS.values(), results.ABSENT), **row} for row in rows])[
        ["loss", *PROTOCOLS.values()]
    ]


def scores(chosen: pd.DataFrame, metric: str) -> pd.DataFrame:
    """A row a loss and for the mean of each kind of losses, a column a method; best in bold."""
    present = set(chosen.loc[chosen["loss"] != COMPLETE.name, "method"].unique())
    methods = [method for method in METHODS if method in present]
    values = {
        (str(loss), str(method)): score(rows, metric)
        for (loss, method), rows in chosen.groupby(["loss", "method"], sort=False)
    }
    rows = []
    for kind, losses in KINDS.items():
        there = [loss for loss in losses if any((loss.name, method) in values for method in methods)]
        lines = {loss.name: {m: values[loss.name, m] for m in methods if (loss.name, m) in values} for loss in there}
        if len(there) > 1:
            every = [method for method in methods if all(method in line for line in lines.values())]
            mean = {m: sum(line[m] for line in lines.values()) / len(lines) for m in every}
            lines[f"*{kind}, mean of {len(there)}*"] = mean
        for name, line in lines.items():
            best = max(round(100 * value, 1) for value in line.values())
            texts = {m: f"{100 * v:.1f}" for m, v in line.items()}
            cells = {m: f"**{text}**" if float(text) == best else text for m, text in texts.items()}
            rows.append({"loss": name, **{m: cells.get(m, results.ABSENT) for m in methods}})
    return pd.DataFrame(rows)


def side_by_side(found: pd.DataFrame) -> list[pd.DataFrame]:
    """Two tables of what was compared: methods, and variants of one; without rows and columns that hold nothing."""
    parts = []
    for pairs in (PAIRS, PAIRS_OF_VARIANTS):
        columns = [column for column in map(difference_of, pairs) if column in found]
        part = found[["loss", *columns]]
        part = part[(part[columns] != results.ABSENT).any(axis=1)]
        parts.append(part.loc[:, (part != results.ABSENT).any()])
    return [part for part in parts if len(part)]


def difference_of(pair: tuple[str, str]) -> str:
    return f"{pair[1]} − {pair[0]}"


def differences(test: pd.DataFrame, metric: str) -> pd.DataFrame:
    """A row a protocol and loss, and for the mean over kinds of losses that both methods met."""
    of_bands = [loss.name for loss in LOSSES if loss.shape == "band"]
    whole = test[(test["method"] == "ridge") & test["loss"].isin(of_bands)]  # where both fills are one
    known = pd.concat([test, whole.assign(method=BEST_FREE)]).rename(columns={"loss": "mask"})
    known = known[known["mask"] != COMPLETE.name]
    rows: dict[tuple[str, str], dict[str, str]] = {}
    for pair in (*PAIRS, *PAIRS_OF_VARIANTS):
        parts = [paired(known, *pair, metric)]
        for name, losses in KINDS.items():
            kind = known[known["mask"].isin([loss.name for loss in losses])]
            mean = paired(kind, *pair, metric, average=True)
            parts.append(mean.assign(mask=[f"*{name}, {of}*" for of in mean["mask"]]))
        for row in pd.concat([part for part in parts if len(part)] or parts).itertuples():
            text = f"{with_interval(100 * row.difference, 100 * row.low, 100 * row.high)} {row.ahead}"
            decided = comparison.verdict(float(row.low), float(row.high)) != "not decided"
            cell = f"**{text}**" if decided else text
            rows.setdefault((str(row.protocol), str(row.mask)), {})[difference_of(pair)] = cell
    order = [loss.name for loss in LOSSES]
    keys = sorted(rows, key=lambda key: (list(PROTOCOLS).index(key[0]), key[1] in order, _place(key[1], order)))
    return pd.DataFrame([{"protocol": p, "loss": m, **rows[p, m]} for p, m in keys]).fillna(results.ABSENT)


def _place(name: str, order: list[str]) -> int:
    """Losses in their order, after the means of their kinds."""
    kinds = list(KINDS)
    return order.index(name) if name in order else kinds.index(max((k for k in kinds if k in name), key=len))


def paired(known: pd.DataFrame, first: str, second: str, metric: str, *, average: bool = False) -> pd.DataFrame:
    """Differences with intervals, and in how many folds `second` is ahead."""
    options = {"metric": metric, "by": ("mask", "protocol"), "average": average}
    both = known[known["method"].isin([first, second])]
    found = comparison.paired_difference(both, first, second, **options)
    if found.empty:
        return found.assign(ahead=[])
    keys = ["protocol"] if average else ["protocol", "mask"]
    single = [
        comparison.paired_difference(part, first, second, draws=2, **options).assign(fold=fold)
        for fold, part in both.groupby("fold")
    ]
    signs = pd.concat(single).groupby(keys)["difference"]
    ahead = {key: f"{(values > 0).sum()}/{len(values)}" for key, values in signs}
    known_keys = [tuple(row) if len(keys) > 1 else (row[0],) for row in found[keys].to_numpy()]
    return found.assign(ahead=[ahead[key] for key in known_keys])


def score(rows: pd.DataFrame, metric: str) -> float:
    return resample({("", ""): rows}, metric=metric, draws=1)["", ""].value


def shown(rows: pd.DataFrame, metric: str) -> str:
    """`71.1 [65.2, 76.9]`."""
    scored = resample({("", ""): rows}, metric=metric)["", ""]
    low, high = interval(scored.draws)
    return f"{100 * scored.value:.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def spent(task: str, folder: Path) -> pd.DataFrame:
    """What the fine-tunings took, as their cards say."""
    costs = pd.read_csv(folder / f"{task}_costs.csv")
    kinds = costs.assign(encoders=costs["encoder"].str.split("-").str[0]).groupby("encoders")
    numbers = kinds[["images_forward", "images_backward", "seconds"]].median().round(0).astype(int)
    return numbers.assign(runs=kinds.size()).reset_index()
