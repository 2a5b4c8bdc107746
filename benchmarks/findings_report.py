"""Tables of docs/findings.md from the recorded predictions, which are kept with the project."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pandas as pd
from contenders import (
    ALIGNED,
    AWARE,
    BEST_FREE,
    FEATURES,
    FOR_ANOTHER,
    FREE,
    LONGER,
    METHODS,
    ONE_FOR_ALL,
    THESIS_METHOD,
    TWO_VIEWS,
    passes_for_all,
)
from losses import COMPLETE, KINDS, LOSSES

from bandmask import comparison, files, results
from bandmask.recommendation import recommend
from bandmask.resampling import interval, resample

FOLDER = files.project_root() / "docs" / "findings"
ORDER = ["loss", "method", "protocol", "split", "fold", "head_seed", "sample", "label", "predicted"]
PAIRS = (  # what is subtracted, and from what
    (BEST_FREE, ONE_FOR_ALL),
    (THESIS_METHOD, ONE_FOR_ALL),
    (FOR_ANOTHER, ONE_FOR_ALL),
    (BEST_FREE, THESIS_METHOD),
    (THESIS_METHOD, FEATURES),
    ("pre-trained", FEATURES),
    (ONE_FOR_ALL, ALIGNED),
    (ONE_FOR_ALL, TWO_VIEWS),
    (ONE_FOR_ALL, LONGER),
    (ONE_FOR_ALL, AWARE),
)
METRICS = {"classification": "overall_accuracy", "segmentation": "miou_present"}


def record(task: str, places: Mapping[int, Path]) -> None:
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
    FOLDER.mkdir(exist_ok=True)
    with files.writing(FOLDER / f"{task}.parquet") as partial:
        table.to_parquet(partial, compression="zstd", compression_level=19, index=False)
    rows = []
    for fold, place in places.items():
        for path in sorted((place / "encoders").glob("*/card.json")):
            card = json.loads(path.read_text(encoding="utf-8"))
            rows.append({"fold": fold, "encoder": card["name"], **json.loads(card["notes"])})
    with files.writing(FOLDER / f"{task}_costs.csv") as partial:
        pd.DataFrame(rows).to_csv(partial, index=False)
    print(f"{len(table)} rows of folds {sorted(set(table['fold'].tolist()))}: {FOLDER / task}.parquet")


def recorded(task: str) -> pd.DataFrame:
    """Predictions; each image was tested in one fold, so the folds of a head are one run over all images."""
    path = files.require(
        FOLDER / f"{task}.parquet", f"python benchmarks/findings.py {task}, then the same with `record`"
    )
    table = results.read_table(path)
    text = {name: table[name].astype(str) for name in ("loss", "method", "protocol", "split")}
    table = table.assign(encoder_seed=pd.array([0] * len(table), "Int64"), **text)
    if "pixels" in table:
        table["group"] = table["sample"].astype(str)
    return table


def report(task: str, epochs: int, any_epochs: int) -> None:
    """Every table, as Markdown."""
    table, metric = recorded(task), METRICS[task]
    test = table[table["split"] == "test"]
    complete = test[test["loss"] == COMPLETE.name]
    print(f"folds {sorted(set(test['fold'].tolist()))}; complete images, {metric}: {shown(complete, metric)}\n")
    for protocol in ("transfer", "thesis"):
        print(f"{protocol} protocol, test, {metric} in percent\n")
        print(scores(test[test["protocol"] == protocol], metric).to_markdown(index=False, disable_numparse=True), "\n")
    print("differences on the same test images, points, mean [95 % interval over images and heads], folds ahead\n")
    print(differences(test, metric).to_markdown(index=False, disable_numparse=True), "\n")
    print("spent on encoders: images through them, and seconds of one core, median a run\n")
    print(spent(task).to_markdown(index=False, disable_numparse=True), "\n")
    everywhere = table[table["loss"] != COMPLETE.name]
    splits = (everywhere[everywhere["split"] == split] for split in ("val", "test"))
    found = recommend(*splits, passes_for_all(epochs, any_epochs), free=FREE, metric=metric)
    print("what to do, chosen on validation images, gain on test images:\n")
    print("\n".join(f"- {sentence}" for sentence in found["sentence"]))


def scores(chosen: pd.DataFrame, metric: str) -> pd.DataFrame:
    """A row a loss, a column a method; best in bold."""
    rows, methods = [], [method for method in METHODS if method in set(chosen["method"])]
    for loss in LOSSES:
        group = chosen[chosen["loss"] == loss.name]
        means = {method: score(rows_, metric) for method, rows_ in group.groupby("method")}
        if means:
            best = max(round(100 * value, 1) for value in means.values())
            texts = {m: f"{100 * v:.1f}" for m, v in means.items()}
            cells = {m: f"**{t}**" if float(t) == best else t for m, t in texts.items()}
            rows.append({"loss": loss.name, **{m: cells.get(m, results.ABSENT) for m in methods}})
    return pd.DataFrame(rows)


def differences(test: pd.DataFrame, metric: str) -> pd.DataFrame:
    """A row a protocol and loss, and for the mean over kinds of losses that both methods met."""
    of_bands = [loss.name for loss in LOSSES if loss.shape == "band"]
    whole = test[(test["method"] == "ridge") & test["loss"].isin(of_bands)]  # where both fills are one
    known = pd.concat([test, whole.assign(method=BEST_FREE)]).rename(columns={"loss": "mask"})
    known = known[known["mask"] != COMPLETE.name]
    rows: dict[tuple[str, str], dict[str, str]] = {}
    for first, second in PAIRS:
        found = paired(known, first, second, metric)
        for name, losses in KINDS.items():
            kind = known[known["mask"].isin([loss.name for loss in losses])]
            mean = paired(kind, first, second, metric, average=True)
            mean = mean.assign(mask=[f"{name}, {of}" for of in mean["mask"]])
            found = mean if found.empty else pd.concat([found, mean])
        for row in found.itertuples():
            text = f"{100 * row.difference:+.1f} [{100 * row.low:+.1f}, {100 * row.high:+.1f}] {row.ahead}"
            decided = comparison.verdict(float(row.low), float(row.high)) != "not decided"
            cell = f"**{text}**" if decided else text
            rows.setdefault((str(row.protocol), str(row.mask)), {})[f"{second} − {first}"] = cell
    order = ["transfer", "thesis"]
    keys = sorted(rows, key=lambda key: order.index(key[0]))
    return pd.DataFrame([{"protocol": p, "loss": m, **rows[p, m]} for p, m in keys]).fillna(results.ABSENT)


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


def spent(task: str) -> pd.DataFrame:
    """What the fine-tunings took, as their cards say."""
    costs = pd.read_csv(FOLDER / f"{task}_costs.csv")
    kinds = costs.assign(encoders=costs["encoder"].str.split("-").str[0]).groupby("encoders")
    numbers = kinds[["images_forward", "images_backward", "seconds"]].median().round(0).astype(int)
    return numbers.assign(runs=kinds.size()).reset_index()
