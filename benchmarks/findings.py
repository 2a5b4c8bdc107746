"""Every method on every loss in both protocols, on real images: the table of docs/findings.md. Goes on after a kill.

    BANDMASK_DATA=… make run EXPERIMENT=eurosat     # once: the stand-in encoder; or notebooks/00 and its params
    BANDMASK_DATA=… python benchmarks/findings.py classification --seeds 0 1 2 3 4
    python benchmarks/findings.py segmentation --experiment sample --seeds 0 1 2 3 4
    python benchmarks/findings.py classification report

One file a loss, method and encoder seed lies below `outputs/<experiment>/findings/`; what is there is not made again.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import nn

from bandmask import (
    alignment,
    any_band,
    bands,
    classification,
    comparison,
    datasets,
    draws,
    encoders,
    files,
    fills,
    first_layer,
    maps,
    masking,
    params,
    results,
    segmentation,
)
from bandmask.any_band import OBJECTIVE, AnyBandEncoder, fit_gate
from bandmask.draws import AnyMask
from bandmask.fills import RidgeLocalFill
from bandmask.masking import MaskSpec
from bandmask.moments import Moments
from bandmask.objectives import Objective
from bandmask.packs import Pack
from bandmask.recommendation import recommend
from bandmask.resampling import interval, resample
from bandmask.training import Compute, fill_checksum, weights_checksum
from bandmask.views import View


@dataclass(frozen=True)
class Loss:
    """What breaks: bands, how much of them, in which shape."""

    name: str
    bands: tuple[str, ...]
    ratio: float = 0.9
    shape: str = "pixel"

    def spec(self, seed: int = 0, value: str = "dataset_mean") -> MaskSpec:
        return MaskSpec(self.bands, self.ratio, value, seed=seed, shape=self.shape)


def _without(*visible: str) -> tuple[str, ...]:
    return tuple(name for name in bands.NAMES if name not in visible)


THESIS = [Loss(mask, bands.resolve_mask(mask)) for mask in bands.THESIS_MASKS if mask != "none"]
WHOLE = [replace(loss, name=f"{loss.name} whole", ratio=1.0, shape="band") for loss in THESIS]
FEW = [  # few bands are left: where imputation is weak
    Loss("only B02 B03 B04 B08 left", _without("B02", "B03", "B04", "B08"), 1.0, "band"),
    Loss("only B02 B04 left", _without("B02", "B04"), 1.0, "band"),
    Loss("only B08 B11 B12 left", _without("B08", "B11", "B12"), 1.0, "band"),
    Loss("only B05 B12 left", _without("B05", "B12"), 1.0, "band"),
    Loss("only B8A left", _without("B8A"), 1.0, "band"),
]
ODD = [  # faults that follow no model of single pixels
    Loss("B02 B03 B04 striped", ("B02", "B03", "B04"), 0.9, "stripe"),
    Loss("B08 B8A B09 B10 B11 packets", ("B08", "B8A", "B09", "B10", "B11"), 0.75, "block"),
    Loss("all but B10 under cloud", _without("B10"), 0.5, "cloud"),
]
LOSSES = [*THESIS, *FEW, *ODD, *WHOLE]
TRAINED_FOR = [*THESIS, *FEW[:2]]  # losses that encoders of their own are trained for
BEST_FREE = "ridge + local"
VALUES = {  # of the free methods, as mask values
    "pre-trained": "dataset_mean",
    "band mean": "band_mean",
    "nearest": "nearest",
    "local": "local",
    "ridge": "ridge",
    BEST_FREE: "ridge_local",
}
FREE = (*VALUES, "rescaled")
METHODS = (*FREE, "one for all", "thesis' method", "features + distance")
OF_PIXELS = ("local", BEST_FREE)  # of whole bands they are the band mean and the ridge regression
OBJECTIVES = {"thesis' method": Objective(), "features + distance": Objective.of("both", distance=1.0)}


@dataclass(frozen=True, eq=False)  # told apart by identity: what is cached for one plan is of that plan
class Plan:
    """What is measured and how; what decides all figures is in `settings`, what decides some of them in `of_method`."""

    experiment: str
    pack: Pack
    teacher: nn.Module
    card: encoders.Card
    moments: Moments
    compute: Compute
    image_size: int
    epochs: int
    any_epochs: int
    passes: int
    lr: float
    any_lr: float
    decoder_epochs: int
    kinds: tuple[tuple[str, float], ...] = draws.WHOLE
    any_features: float = 0.0

    @property
    def folder(self) -> Path:
        return params.experiment_folder(self.experiment) / "findings"

    def settings(self) -> dict[str, Any]:
        return {"image_size": self.image_size, "data": self.pack.fingerprint, "weights": weights_checksum(self.teacher)}

    def of_method(self, method: str) -> dict[str, Any]:
        """Of an encoder that is trained, so that other settings of one method don't make the others anew."""
        if method == "one for all":
            options = {"epochs": self.any_epochs, "lr": self.any_lr, "lr_schedule": "cosine", "batch_norm": "frozen"}
            return {**options, "objective": replace(OBJECTIVE, features=self.any_features)}
        if method in OBJECTIVES:
            return {"epochs": self.epochs, "lr": self.lr, "objective": OBJECTIVES[method]}
        return {}

    def fill(self, value: str, loss: Loss) -> masking.Fill:
        return fills.make_fill(value, self.pack, loss.bands, self.moments)


# --- encoders -------------------------------------------------------------------------------------------------------


def tuned(plan: Plan, name: str, seed: int, spec: MaskSpec | AnyMask, fill: masking.Fill, **options: Any) -> nn.Module:
    """A fine-tuned encoder and its cost, from its folder if it is there."""
    decisive = {**plan.settings(), "mask": asdict(spec), "fill": fill_checksum(fill), "seed": seed, **plain(options)}
    folder = plan.folder / "encoders" / f"{name}-seed{seed}-{marked(decisive)}"
    if folder.exists():
        return encoders.load_encoder(folder)[0]
    start = time.perf_counter()
    student, history = alignment.fine_tune(
        plan.teacher,
        plan.pack,
        spec,
        fill,
        image_size=plan.image_size,
        seed=seed,
        compute=plan.compute,
        checkpoint=plan.folder / "checkpoints" / f"{name}-seed{seed}.pt",
        **options,
    )
    images = int(options["epochs"]) * (len(plan.pack.rows("train")) // 64) * 64
    views = options["objective"].views if "objective" in options else 1
    cost = {"images_forward": images * (1 + views), "images_backward": images * views}
    cost["seconds"] = round(time.perf_counter() - start, 1)
    card = encoders.Card(
        name,
        plan.card.architecture,
        plan.card.embedding_dim,
        plan.image_size,
        plan.card.name,
        asdict(spec),
        seed,
        notes=json.dumps(cost),
    )
    print(f"{name}, seed {seed}: {cost}; {history.iloc[-1].round(3).to_dict()}", flush=True)
    encoders.save_encoder(student, card, folder)
    for checkpoint in (plan.folder / "checkpoints").glob(f"{name}-seed{seed}-*.pt"):
        checkpoint.unlink()
    return encoders.load_encoder(folder)[0]


def plain(options: dict[str, Any]) -> dict[str, Any]:
    """Options as JSON can hold them."""
    return {key: asdict(value) if isinstance(value, Objective) else value for key, value in options.items()}


def marked(decisive: dict[str, Any]) -> str:
    """A short mark of all that decides a result, for its name."""
    return files.checksum_of(json.loads(json.dumps(decisive)))[:8]


@dataclass(frozen=True)
class Case:
    """One thing to be measured: a loss, a method, the seed of its encoder, and how to make what the head sees."""

    loss: Loss
    method: str
    seed: int | None
    view: Callable[[], View]

    @property
    def name(self) -> str:
        """Of its file."""
        seed = "" if self.seed is None else f"-seed{self.seed}"
        return f"{self.loss.name}-{self.method}".replace(" ", "_").replace("'", "") + seed


DRAWN = 3, 12  # bands that an image loses in training: what loses fewer, the fill restores
COMPLETE = Loss("none", ())


def cases(plan: Plan, chosen: list[str], seeds: list[int], losses: list[Loss]) -> Iterator[Case]:
    """What is to be measured: what costs nothing first, then seed by seed."""
    if "free" in chosen:
        for loss in losses:
            for method, value in VALUES.items():
                if not (loss.shape == "band" and method in OF_PIXELS):
                    yield Case(loss, method, None, partial(filled, plan, plan.teacher, value, loss))
            yield Case(loss, "rescaled", None, partial(rescaled, plan, loss))
    for seed in seeds:
        if "any" in chosen:
            for loss in [COMPLETE, *losses]:
                yield Case(loss, "one for all", seed, partial(one_for_all, plan, seed, loss))
        for method in OBJECTIVES:
            if method.split()[0].strip("'") in chosen:
                for loss in losses:
                    if loss in TRAINED_FOR:
                        yield Case(loss, method, seed, partial(for_one_loss, plan, method, seed, loss))


def filled(plan: Plan, encoder: nn.Module, value: str, loss: Loss) -> View:
    """An encoder behind a fill."""
    return View(encoder, loss.spec(), plan.fill(value, loss), plan.image_size)


def rescaled(plan: Plan, loss: Loss) -> View:
    """The pre-trained encoder whose first layer leaves out what is hidden."""
    return View(first_layer.rescaled(plan.teacher), loss.spec(), first_layer.MISSING, plan.image_size)


@lru_cache(maxsize=1)
def any_band_encoder(plan: Plan, seed: int) -> AnyBandEncoder:
    """The encoder of this project, trained for no loss in particular; kept whole, so other benchmarks can take it."""
    mask = AnyMask(DRAWN[0], DRAWN[1], plan.kinds, seed=seed)
    aligned = tuned(plan, "any", seed, mask, RidgeLocalFill(plan.moments), **plan.of_method("one for all"))
    folder = plan.folder / "any-band" / f"seed{seed}-{weights_checksum(aligned)[:8]}"
    if not folder.exists():
        gate = fit_gate(
            plan.teacher, aligned, plan.pack, plan.moments, mask, image_size=plan.image_size, compute=plan.compute
        )
        card = replace(plan.card, name=f"one for all, seed {seed}", parent=plan.card.name, seed=seed)
        any_band.save(AnyBandEncoder(plan.teacher, aligned, plan.moments, gate), card, mask, folder)
    return any_band.load(folder)[0]


def one_for_all(plan: Plan, seed: int, loss: Loss) -> View:
    """That encoder facing a loss, with gaps as NaN."""
    return View(any_band_encoder(plan, seed), loss.spec(), first_layer.MISSING, plan.image_size)


def for_one_loss(plan: Plan, method: str, seed: int, loss: Loss) -> View:
    """An encoder fine-tuned for this very loss, as in the thesis."""
    label = f"{method.split()[0].strip(chr(39))}-{loss.name.replace(' ', '_')}"
    fill = plan.fill("dataset_mean", loss)
    encoder = tuned(plan, label, seed, loss.spec(seed), fill, **plan.of_method(method))
    return View(encoder, loss.spec(), fill, plan.image_size)


# --- tasks ----------------------------------------------------------------------------------------------------------


def classify(plan: Plan, view: View, in_service: Any, head_seeds: list[int], protocols: list[str]) -> pd.DataFrame:
    """Predictions of validation and test images in both protocols."""
    frames = []
    heads = {"transfer": in_service}
    if "thesis" in protocols:
        heads["thesis"] = classification.train_heads(
            view, plan.pack, seeds=head_seeds, passes=plan.passes, compute=plan.compute, progress=False
        )[0]
    for protocol, head in heads.items():
        for split in ("val", "test"):
            found = classification.predict(view, head, plan.pack, split, compute=plan.compute)
            frames.append(found.assign(protocol=protocol, split=split))
    return pd.concat(frames, ignore_index=True)


def segment(plan: Plan, view: View, in_service: Any, seeds: list[int], protocols: list[str]) -> pd.DataFrame:
    """Pixels of test images by true and predicted class in both protocols."""
    frames = []
    heads = {"transfer": in_service}
    if "thesis" in protocols:
        heads["thesis"] = decoders_on(plan, view, seeds)
    for protocol, head in heads.items():
        for split in ("val", "test"):
            found = maps.predict(view, head, plan.pack, split, compute=plan.compute)
            frames.append(found.assign(protocol=protocol, split=split))
    return pd.concat(frames, ignore_index=True)


def decoders_on(plan: Plan, view: View, seeds: list[int]) -> Any:
    decoders, _ = segmentation.make_decoders(view, len(plan.pack.classes), seeds, width=32, compute=plan.compute)
    segmentation.train_decoders(
        view,
        plan.pack,
        decoders,
        epochs=plan.decoder_epochs,
        passes=min(plan.passes, plan.decoder_epochs),
        compute=plan.compute,
        progress=False,
    )
    return decoders


def measure(plan: Plan, task: str, options: argparse.Namespace) -> None:
    """All that is not there yet."""
    run = {"classification": classify, "segmentation": segment}[task]
    complete = View(plan.teacher, MaskSpec(), torch.zeros(13), plan.image_size)
    in_service: list[Any] = []

    def served() -> Any:
        if not in_service:
            if task == "classification":
                in_service.append(
                    classification.train_heads(
                        complete,
                        plan.pack,
                        seeds=options.head_seeds,
                        passes=10,
                        compute=plan.compute,
                        checkpoint=plan.folder / "checkpoints" / "head_in_service.pt",
                        progress=False,
                    )[0]
                )
            else:
                in_service.append(decoders_on(plan, complete, options.head_seeds))
        return in_service[0]

    losses = [loss for loss in LOSSES if not options.losses or loss.name in options.losses]
    reference = Case(COMPLETE, "pre-trained", None, lambda: complete)
    heads = {"passes": plan.passes, "head_seeds": options.head_seeds}
    if task == "segmentation":
        heads["decoder_epochs"] = plan.decoder_epochs
    for case in [reference, *cases(plan, options.methods, options.seeds, losses)]:
        decisive = {**plan.settings(), **heads, **plain(plan.of_method(case.method))}
        if case.method == "one for all":
            decisive["kinds"] = plan.kinds
        path = plan.folder / task / f"{case.name}-{marked(decisive)}.parquet"
        if path.exists():
            continue
        view, start = case.view(), time.perf_counter()
        protocols = ["transfer"] if case is reference or case.loss in WHOLE else ["transfer", "thesis"]
        table = run(plan, view, served(), options.head_seeds, protocols)
        table = table.assign(loss=case.loss.name, bands=" ".join(case.loss.bands), method=case.method)
        table["encoder_seed"] = pd.Series(case.seed, table.index, "Int64")
        results.write_table(table, path)
        print(f"{time.strftime('%X')} {case.name}: {said(table)}, {time.perf_counter() - start:.0f} s", flush=True)


def said(table: pd.DataFrame) -> dict[str, float]:
    """Accuracy on test images by protocol, in percent."""
    shown = table[table["split"] == "test"]
    weight = shown["pixels"] if "pixels" in shown else pd.Series(1, shown.index)
    right = ((shown["label"] == shown["predicted"]) * weight).groupby(shown["protocol"]).sum()
    return (100 * right / weight.groupby(shown["protocol"]).sum()).round(1).to_dict()


# --- report ---------------------------------------------------------------------------------------------------------


def costs(plan: Plan) -> dict[str, float]:
    """Encoder passes over a training image that it takes to be ready for every loss of the table; a step is worth four.

    Free methods take none; they are in the order of what they need.
    """
    found = {method: 0.001 * place for place, method in enumerate(FREE)}
    for_each = 4.0 * plan.epochs * len(TRAINED_FOR)
    return {**found, "one for all": 4.0 * plan.any_epochs, "thesis' method": for_each, "features + distance": for_each}


def collected(plan: Plan, task: str) -> pd.DataFrame:
    """Predictions of everything that has been measured; pixels are summed over the images of a group."""
    tables = [results.read_table(path) for path in sorted((plan.folder / task).glob("*.parquet"))]
    if not tables:
        raise SystemExit(f"nothing was measured below {plan.folder / task}; run this without `report` first")
    table = pd.concat(tables, ignore_index=True)
    return comparison.by_group(table) if "pixels" in table else table


def report(plan: Plan, task: str) -> None:
    """The table of losses and methods, what differs from the best free method, and the recommendation."""
    table = collected(plan, task)
    metric = "overall_accuracy" if task == "classification" else "miou_present"
    complete = table[(table["loss"] == "none") & (table["method"] == "pre-trained")]
    print(f"complete images, {metric}: {shown(complete[complete['split'] == 'test'], metric)}\n")
    losses = [loss.name for loss in [COMPLETE, *LOSSES] if loss.name in set(table["loss"])]
    methods = [method for method in METHODS if method in set(table["method"])]
    for protocol in ("transfer", "thesis"):
        chosen = table[(table["split"] == "test") & (table["protocol"] == protocol)]
        rows = []
        for loss in losses:
            group = chosen[chosen["loss"] == loss]
            if len(group) and (loss != "none" or set(group["method"]) - {"pre-trained"}):
                by_method = {method: group[group["method"] == method] for method in methods}
                rows.append({"loss": loss, **{m: shown(rows_, metric) for m, rows_ in by_method.items()}})
        print(f"{protocol} protocol, test, {metric} in percent, mean [95 % interval over images and runs]\n")
        print(pd.DataFrame(rows).to_markdown(index=False), "\n")
    print("differences on the same test images, points, mean [95 % interval over images and runs]\n")
    print(differences(table[table["split"] == "test"], metric).to_markdown(index=False), "\n")
    print("spent on encoders: images through them, and seconds of this machine, median a run\n")
    print(spent(plan).to_markdown(index=False), "\n")
    both = [method for method in methods if method in set(table[table["loss"] != "none"]["method"])]
    known = table[(table["loss"] != "none") & table["method"].isin(both)]
    splits = (known[known["split"] == split] for split in ("val", "test"))
    found = recommend(*splits, costs(plan), free=FREE, metric=metric)
    print("what to do, chosen on validation images, gain on test images:\n")
    print("\n".join(f"- {sentence}" for sentence in found["sentence"]))
    results.write_table(found, plan.folder / f"recommendation_{task}.parquet")


PAIRS = (  # what is subtracted, and from what
    (BEST_FREE, "one for all"),
    ("thesis' method", "one for all"),
    (BEST_FREE, "thesis' method"),
    ("thesis' method", "features + distance"),
    ("pre-trained", "features + distance"),
)


def differences(test: pd.DataFrame, metric: str) -> pd.DataFrame:
    """A row a protocol and loss, and for the mean over kinds of losses that both methods met."""
    of_bands = [loss.name for loss in LOSSES if loss.shape == "band"]
    whole = test[(test["method"] == "ridge") & test["loss"].isin(of_bands)]  # where both fills are one
    known = pd.concat([test, whole.assign(method=BEST_FREE)]).rename(columns={"loss": "mask"})
    rows: dict[tuple[str, str], dict[str, str]] = {}
    for first, second in PAIRS:
        options = {"metric": metric, "by": ("mask", "protocol")}
        found = [paired(known, first, second, **options)]
        for name, losses in (("thesis masks", THESIS), ("few left", FEW)):
            kind = known[known["mask"].isin([loss.name for loss in losses])]
            mean = paired(kind, first, second, average=True, **options)
            found.append(mean.assign(mask=[f"{name}, {of}" for of in mean["mask"]]))
        for row in pd.concat(found).itertuples():
            text = f"{100 * row.difference:+.1f} [{100 * row.low:+.1f}, {100 * row.high:+.1f}]"
            rows.setdefault((str(row.protocol), str(row.mask)), {})[f"{second} − {first}"] = text
    order = ["transfer", "thesis"]
    keys = sorted(rows, key=lambda key: order.index(key[0]))
    return pd.DataFrame([{"protocol": p, "loss": m, **rows[p, m]} for p, m in keys]).fillna(results.ABSENT)


def paired(table: pd.DataFrame, first: str, second: str, **options: Any) -> pd.DataFrame:
    return comparison.paired_difference(table[table["mask"] != "none"], first, second, **options)


def spent(plan: Plan) -> pd.DataFrame:
    """What the fine-tunings that are there took, as their cards say."""
    rows = []
    for path in sorted((plan.folder / "encoders").glob("*/card.json")):
        kind = path.parent.name.split("-")[0]
        rows.append({"encoders": kind, **json.loads(json.loads(path.read_text(encoding="utf-8"))["notes"])})
    if not rows:
        return pd.DataFrame({"encoders": ["none"]})
    kinds = pd.DataFrame(rows).groupby("encoders")
    return kinds.median().assign(runs=kinds.size()).round(0).astype(int).reset_index()


def shown(rows: pd.DataFrame, metric: str) -> str:
    """`71.1 [65.2, 76.9]` of the runs of one method on one loss."""
    if rows.empty:
        return results.ABSENT
    scored = resample({("", ""): rows}, metric=metric)["", ""]
    low, high = interval(scored.draws)
    return f"{100 * scored.value:.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=["classification", "segmentation"])
    parser.add_argument("what", nargs="?", choices=["measure", "report"], default="measure")
    parser.add_argument("--experiment", default="eurosat")
    parser.add_argument("--dataset", default="")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--head-seeds", type=int, nargs="+", default=[0, 1, 2])
    methods = ["free", "any", "thesis", "features"]
    parser.add_argument("--methods", nargs="+", choices=methods, default=methods)
    parser.add_argument("--losses", nargs="*", default=[], help="names; default all")
    parser.add_argument("--epochs", type=int, default=8, help="of fine-tunings for one loss")
    parser.add_argument("--any-epochs", type=int, default=30)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--every-kind", action="store_true", help="one for all: losses of every shape, not bands alone")
    parser.add_argument("--any-lr", type=float, default=3e-4)
    parser.add_argument(
        "--any-features", type=float, default=0.0, help="one for all: weight of feature maps; for decoders"
    )
    parser.add_argument("--passes", type=int, default=3, help="encoder passes that heads cycle through")
    parser.add_argument("--decoder-epochs", type=int, default=10)
    options = parser.parse_args()
    pack = datasets.open_dataset(options.dataset or options.experiment)
    teacher, card = encoders.load_encoder(params.encoder_source(options.experiment, "stand-in"))
    compute = dataclasses.replace(Compute.of(), channels_last=True)
    plan = Plan(
        options.experiment,
        pack,
        teacher,
        card,
        Moments.of(pack),
        compute,
        card.image_size,
        options.epochs,
        options.any_epochs,
        options.passes,
        options.lr,
        options.any_lr,
        options.decoder_epochs,
        draws.KINDS if options.every_kind else draws.WHOLE,
        options.any_features,
    )
    if options.what == "measure":
        measure(plan, options.task, options)
    else:
        report(plan, options.task)


if __name__ == "__main__":
    main()
