"""Two puzzles of the thesis, by controlled runs: a ratio that is easier than a lower one, and bands that are counted.

    python benchmarks/puzzles.py ratio                           # without training, about 3 minutes on one core
    python benchmarks/puzzles.py ratio --fine-tune --size 32     # with it, about a minute a run on one core
    python benchmarks/puzzles.py order                           # the thesis' own numbers, a second
    python benchmarks/puzzles.py order --fine-tune --size 32     # its pipeline anew, with true names and by position
    python benchmarks/puzzles.py ratio --fold 0                  # of benchmarks/findings.py: its images and encoder

`ratio`: Table A.6 has B8 at ratio 1.0 easier (0.245) than at 0.9 (0.4125). One thing at a time is changed: the ratio,
the shape of what is lost, what stands there, the statistics of batch norms, and enlarging.
`order`: do bands counted by position explain that Table 4.4 found no gain? Masks that counting moves against those
that it can't move; then encoders fine-tuned on EuroSAT, and decoders on the embedded scene in SEN12MS' order.

Needs EuroSAT (`BANDMASK_DATA`) and a stand-in encoder: `papermill notebooks/00_sample_encoder.ipynb 00.ipynb -f
params/experiments/eurosat.yaml`. Every finished step is kept below `outputs/puzzles`; a second call goes on from there.
"""

from __future__ import annotations

import argparse
import functools
import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import folds
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bandmask import alignment, bands, comparison, datasets, encoders, files, imputation, maps, masking, results
from bandmask import segmentation as decoding
from bandmask.batches import Batches
from bandmask.masking import Fill, MaskSpec
from bandmask.packs import Pack
from bandmask.report import puzzles
from bandmask.report.sentences import signed, with_interval
from bandmask.training import Compute, weights_checksum
from bandmask.views import View

BANDS = ("B02", "B08", "B10", "B02 B03 B04")
FILLS = ("dataset_mean", "band_mean", "ridge")
SHAPES = ("stripe", "block", "band")
RUNNING, OF_BATCH, CUT = "running statistics", "batch statistics", "blind to these bands"
BATCH = 64
TUNED, SEEDS, EPOCHS = ("B08", "B02 B03 B04"), (0, 1, 2), 4  # the thesis takes 15 and 25
MOVED, UNMOVED = ("B11", "B8 B9 B10 B11 B12"), ("B8", "B2 B3 B4")
DECODERS = {"epochs": 6, "passes": 1}
PRE_TRAINED, BY_NAME, BY_POSITION = "pre-trained", "fine-tuned, true names", "fine-tuned, by position"


@dataclass(frozen=True)
class Condition:
    """What is hidden from which encoder; the defaults are the thesis', on images that are not enlarged."""

    bands: str
    ratio: float = 0.9
    shape: str = "pixel"
    fill: str = "dataset_mean"
    encoder: str = RUNNING
    enlarged: str = "no"  # or to twice the side, "before masking" as in the thesis, or "after masking"


@dataclass(frozen=True, eq=False)
class World:
    """Images, the pre-trained encoder, and where finished steps are kept."""

    pack: Pack
    teacher: nn.Module
    card: encoders.Card  # its
    folder: Path
    size: int  # of images, in pixels
    compute: Compute = field(default_factory=lambda: folds.float32("cpu"))
    epochs: int = EPOCHS

    @classmethod
    def of(cls, encoder: Path, fold: int | None, size: int, device: str, epochs: int) -> World:
        compute = folds.float32(device)
        pack = datasets.open_dataset("eurosat") if fold is None else folds.open_fold("eurosat", fold)
        encoder = encoder if fold is None else folds.stand_in("eurosat", fold, pack, compute)
        teacher, card = encoders.load_encoder(encoder)
        mark = files.checksum_of([pack.fingerprint, weights_checksum(teacher)])[:8]  # other images, other steps
        folder = files.outputs_root() / "puzzles" / f"{mark}-{size}px"
        return cls(pack, compute.place(teacher), card, folder, size, compute, epochs)

    def kept(self, name: str, make: Callable[[], pd.DataFrame]) -> pd.DataFrame:
        """The table of a step, made unless it is there."""
        path = self.folder / f"{name}.parquet"
        if not path.exists():
            results.write_table(make(), path)
        return pd.read_parquet(path)

    def fill(self, kind: str, hidden: str) -> Fill:
        if kind == "ridge":
            return imputation.RidgeFill.fit(self.pack, hidden.split())
        return masking.fill_values(kind, torch.tensor(self.pack.band_means()))

    @functools.cached_property
    def test(self) -> list[tuple[Tensor, Tensor]]:
        """Test images and their rows, in full batches: a contrastive loss depends on their size."""
        options = {"batch_size": BATCH, "image_size": self.size, "device": self.compute.device}
        found = Batches(self.pack, "test", shuffle=True, drop_last=True, **options)
        return [(batch.images, batch.samples) for batch in found.epoch(0)]

    @torch.no_grad()
    def complete(self, enlarged: bool) -> list[Tensor]:
        """The teacher's embeddings of complete test images, batch by batch."""
        if enlarged not in (known := self.__dict__.setdefault("_complete", {})):
            known[enlarged] = [self.teacher(enlarge(images) if enlarged else images) for images, _ in self.test]
        return known[enlarged]


def enlarge(images: Tensor) -> Tensor:
    return F.interpolate(images, scale_factor=2, mode="bilinear", align_corners=False)


# --- ratio: without training ------------------------------------------------------------------------------------------


def conditions() -> Iterator[Condition]:
    """One thing changed at a time, what matters most first; the ratio with each fill and with either statistics."""
    ends = (0.9, 1.0)
    plain, batch = ([Condition(hidden, encoder=kind) for hidden in BANDS] for kind in (RUNNING, OF_BATCH))
    yield from (replace(base, ratio=ratio) for ratio, base in itertools.product(ends, plain + batch))
    yield from (replace(base, encoder=f"{base.encoder}, {CUT}") for base in plain + batch)
    yield from (replace(base, shape=shape) for shape, base in itertools.product(SHAPES, plain))
    yield from (
        replace(base, fill=fill, ratio=ratio) for fill, ratio, base in itertools.product(FILLS[1:], ends, plain)
    )
    yield from (replace(base, ratio=ratio) for ratio, base in itertools.product((0.5, 0.99), plain))
    for how, ratio in (("before masking", 0.9), ("before masking", 1.0), ("after masking", 0.9)):
        yield Condition("B08", ratio, enlarged=how)


def measured(world: World, wanted: Iterable[Condition]) -> pd.DataFrame:
    """CLIP loss and cosine similarity of each test image under each condition; no training."""
    frames = []
    for condition in wanted:
        name = " ".join(str(value) for value in asdict(condition).values())
        frame = world.kept(f"pre-trained/{name}", lambda c=condition: aligned(world, world.teacher, c))
        frames.append(frame.assign(**asdict(condition)))
    return pd.concat(frames, ignore_index=True).assign(seed=0)


@torch.no_grad()
def aligned(world: World, encoder: nn.Module, condition: Condition) -> pd.DataFrame:
    """`sample`, `loss` and `cosine` of each test image, incomplete to this encoder and complete to the teacher."""
    spec = MaskSpec(tuple(condition.bands.split()), condition.ratio, shape=condition.shape)
    student = world.compute.place(encoder)
    student = puzzles.with_batch_statistics(student) if OF_BATCH in condition.encoder else student
    student = puzzles.without_bands(student, spec.bands) if CUT in condition.encoder else student
    fill, frames = world.fill(condition.fill, condition.bands), []
    for (images, samples), complete in zip(world.test, world.complete(condition.enlarged != "no"), strict=True):
        seen = enlarge(images) if condition.enlarged == "before masking" else images
        seen = masking.mask_batch(seen, samples, spec, fill)
        seen = enlarge(seen) if condition.enlarged == "after masking" else seen
        losses, cosines = puzzles.alignment_of_images(student(seen), complete)
        found = {"sample": samples, "loss": losses, "cosine": cosines}
        frames.append(pd.DataFrame({name: values.cpu() for name, values in found.items()}))
    return pd.concat(frames, ignore_index=True)


def report_without_training(rows: pd.DataFrame) -> None:
    """Losses by ratio, fill and statistics, by shape, and enlarged; and for what ratio 1.0 is easier than 0.9."""
    shown, keys = rows[~rows["encoder"].str.endswith(CUT)], ["bands", "fill", "encoder"]
    unblind = shown[(shown["shape"] == "pixel") & (shown["enlarged"] == "no")]
    table, changes = unblind.pivot_table("loss", keys, "ratio", sort=False).sort_index(axis=1).round(3), {}
    for hidden, fill, kind in table.index:
        sides = (
            unblind[(unblind[[*keys, "ratio"]] == [hidden, fill, kind, ratio]).all(axis=1)] for ratio in (1.0, 0.9)
        )
        changes[hidden, fill, kind] = puzzles.paired_interval(*sides, "loss")
    blind = rows[rows["encoder"].str.endswith(CUT)].groupby(["bands", "encoder"])["loss"].mean().round(3)
    table["blind"] = [blind[hidden, f"{kind}, {CUT}"] for hidden, _, kind in table.index]
    table["1.0 − 0.9"] = [with_interval(*found, 3) for found in changes.values()]
    print("\nLoss of the pre-trained encoder on test images by ratio (pixels, not enlarged); blind: at any ratio:\n")
    show(table.reset_index())
    print("\nBy what is lost together, ratio 0.9, dataset mean:\n")
    plain = shown[(shown["encoder"] == RUNNING) & (shown["fill"] == FILLS[0])]
    show(plain[(plain["ratio"] == 0.9) & (plain["enlarged"] == "no")].pivot_table("loss", "bands", "shape", sort=False))
    print("\nB08, enlarged to twice the side, pixels, dataset mean:\n")
    show(plain[(plain["bands"] == "B08") & (plain["shape"] == "pixel")].pivot_table("loss", "enlarged", "ratio"))
    print()
    for fill, kind in dict.fromkeys((fill, kind) for _, fill, kind in changes):
        said = Counter(decided(*found) for key, found in changes.items() if key[1:] == (fill, kind))
        print(
            f"- Without training, {fill}, {kind}: "
            + ", ".join(f"{what} on {n} of {said.total()} sets" for what, n in said.items())
            + "."
        )


def decided(_: float, low: float, high: float) -> str:
    return {"lower": "1.0 is easier", "higher": "1.0 is harder"}.get(comparison.verdict(low, high), "not decided")


def show(table: pd.DataFrame) -> None:
    print(table.round(3).to_markdown(index=table.index.name is not None, floatfmt=".3f").replace("nan", "–  "))


# --- ratio: with fine-tuning ------------------------------------------------------------------------------------------


def tuned(world: World, hidden: str, ratio: float, seed: int, norms: str = "train") -> tuple[nn.Module, pd.DataFrame]:
    """A fine-tuned encoder and its history; made unless it is there."""
    path = world.folder / "students" / f"{hidden} {ratio} seed{seed} {norms} {world.epochs}epochs"
    if not (path / "history.parquet").exists():
        spec = MaskSpec(tuple(hidden.split()), ratio, seed=seed)
        student, history = alignment.fine_tune(
            world.teacher,
            world.pack,
            spec,
            world.fill("dataset_mean", hidden),
            epochs=world.epochs,
            batch_size=BATCH,
            image_size=world.size,
            seed=seed,
            compute=world.compute,
            batch_norm=norms,
        )
        encoders.save_encoder(
            student, replace(world.card, name=path.name, image_size=world.size, mask=asdict(spec)), path
        )
        results.write_table(history, path / "history.parquet")
    return encoders.load_encoder(path)[0], pd.read_parquet(path / "history.parquet")


def measured_tuned(
    world: World, wanted: Sequence[str], norms: Sequence[str], seeds: Sequence[int]
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Encoders fine-tuned at ratio 0.9 and 1.0, each tested at both with both statistics; and their histories."""
    frames, histories = [], []
    for seed, norm, hidden, ratio in itertools.product(seeds, norms, wanted, (0.9, 1.0)):
        student, history = tuned(world, hidden, ratio, seed, norm)
        known = {"trained": ratio, "seed": seed, "norms": norm}
        histories.append(history.assign(bands=hidden, **known))
        for tested, kind in itertools.product((0.9, 1.0), (RUNNING, OF_BATCH)):
            condition = Condition(hidden, tested, encoder=kind)
            name = f"fine-tuned/{hidden} {ratio} seed{seed} {norm} {world.epochs}epochs, {tested} {kind}"
            frame = world.kept(name, lambda s=student, c=condition: aligned(world, s, c))
            frames.append(frame.assign(**asdict(condition), **known))
    return pd.concat(frames, ignore_index=True), pd.concat(histories, ignore_index=True)


def report_tuned(rows: pd.DataFrame, histories: pd.DataFrame) -> None:
    """Losses epoch by epoch, by ratio of training and of test, and the difference of the two ratios after training."""
    keys = ["bands", "norms", "trained"]
    print(f"\nLoss by epoch, mean of {rows['seed'].nunique()} seeds, pixels, dataset mean, batch of {BATCH}:\n")
    table = histories.melt([*keys, "epoch"], ["train_loss", "val_loss"], "loss").dropna()
    table["epoch"] = [f"epoch {epoch:.0f}" for epoch in table["epoch"]]
    show(table.pivot_table("value", [*keys, "loss"], "epoch", sort=False).sort_index(axis=1).reset_index())
    print("\nLoss on test images after training:\n")
    table = rows.pivot_table("loss", keys, ["encoder", "ratio"], sort=False)
    table.columns = [f"tested at {ratio}, {kind}" for kind, ratio in table.columns]
    show(table.reset_index())
    print()
    for (hidden, norms, kind), group in rows[rows["trained"] == rows["ratio"]].groupby(["bands", "norms", "encoder"]):
        whole, most = (group[group["ratio"] == ratio] for ratio in (1.0, 0.9))
        found = puzzles.paired_interval(whole, most, "loss")
        print(
            f"- {hidden}, norms {norms}, {kind}: loss at 1.0 minus at 0.9 "
            f"{with_interval(*found, 3)}: {decided(*found)}."
        )


# --- order ------------------------------------------------------------------------------------------------------------


def report_table_4_4() -> None:
    """The thesis' own gains in segmentation: masks that counting moves against those it can't move."""
    gains, masks = puzzles.gains_of_table_4_4(), []
    for mask in gains["mask"].unique():
        mine = gains[gains["mask"] == mask].set_index("metric")
        here, there = (" ".join(bands.resolve_mask(mask, "position", order)) for order in ("eurosat", "sen12ms"))
        line = {"mask": mask, "by position, EuroSAT": here, "SEN12MS": there if here != there else "the same"}
        line["accuracy gain"] = signed(mine.loc["average_accuracy_percent", "gain"], 2)
        line["accuracy gain"] += " (outlying)" if mine.loc["average_accuracy_percent", "outlying"] else ""
        masks.append({**line, "mIoU gain": signed(mine.loc["miou", "gain"], 3), "moves": here != there})
    show(pd.DataFrame(masks).sort_values("moves", kind="stable").drop(columns="moves"))
    print()
    for metric, decimals in (("average_accuracy_percent", 2), ("miou", 3)):
        mine = gains[gains["metric"] == metric]
        for rows, rest in ((mine, ""), (mine[~mine["outlying"]], ", outlying rows left out")):
            if rest and len(rows) == len(mine):
                continue
            moved, kept = rows[rows["moves"]]["gain"], rows[~rows["moves"]]["gain"]
            figure, p, low, high = puzzles.permutation_test(moved, kept)
            bounded = high < float("inf")
            said = (
                with_interval(figure, low, high, decimals)
                if bounded
                else f"{signed(figure, decimals)}, too few for an interval"
            )
            print(
                f"- {metric}{rest}: mean gain of {len(moved)} moved masks {signed(moved.mean(), decimals)}, of "
                f"{len(kept)} others {signed(kept.mean(), decimals)} (above 0: {(kept > 0).sum()}); difference {said}, "
                f"permutation p = {p:.2f}"
            )
    answer = "can't be decided from these numbers"
    if high < 0:
        answer = "can explain it: moved masks gained less than those that counting can't move"
    elif not (kept > 0).any():
        answer = "doesn't explain it: in mIoU, masks that counting can't move gained nothing either"
    print(f"\n- Counting bands {answer}.")


def decoded(world: World, masks: Sequence[str], seeds: Sequence[int]) -> pd.DataFrame:
    """Predictions on the embedded scene of decoders in both protocols, behind each encoder, for each mask."""
    pack, compute, frames = datasets.open_dataset("sample"), world.compute, []
    fill = world.fill("dataset_mean", "B02")

    def decoders(encoder: nn.Module, spec: MaskSpec) -> tuple[View, decoding.SegmentationDecoders]:
        view = View(encoder, spec, fill, world.size, 32)
        made, _ = decoding.make_decoders(view, len(pack.classes), SEEDS, width=32, compute=compute)
        decoding.train_decoders(view, pack, made, compute=compute, progress=False, **DECODERS)
        return view, made

    @functools.cache
    def in_service() -> decoding.SegmentationDecoders:
        return decoders(world.teacher, MaskSpec())[1]

    def both(encoder: nn.Module, spec: MaskSpec) -> pd.DataFrame:
        view, anew = decoders(encoder, spec)
        served = maps.predict(view, in_service(), pack, compute=compute).assign(protocol="transfer")
        return pd.concat([served, maps.predict(view, anew, pack, compute=compute).assign(protocol="thesis")])

    for seed, mask in itertools.product((-1, *seeds), masks):
        hidden = bands.resolve_mask(mask, "position", str(pack.card["stored_order"]))
        spec = MaskSpec(hidden)
        learnt = {BY_NAME: hidden, BY_POSITION: bands.resolve_mask(mask, "position", "eurosat")}
        for method in (PRE_TRAINED,) if seed < 0 else (BY_NAME, BY_POSITION)[: 1 + puzzles.moves(mask)]:
            encoder = world.teacher if seed < 0 else tuned(world, " ".join(learnt[method]), 0.9, seed)[0]
            name = f"decoded/{mask} {method} seed{seed} {world.epochs}epochs"
            frame = world.kept(name, lambda e=encoder, s=spec: both(e, s))
            frames.append(frame.assign(mask=mask, method=method, encoder_seed=seed, scheme="position"))
    return pd.concat(frames, ignore_index=True)


def report_decoded(rows: pd.DataFrame) -> None:
    """What fine-tuning wins in mIoU with either naming, and what naming alone changes."""
    options = {"metric": "miou_all", "classes": len(datasets.SAMPLE_CLASSES)}
    pairs = {
        "gain, true names": (PRE_TRAINED, BY_NAME),
        "gain, by position": (PRE_TRAINED, BY_POSITION),
        "names − position": (BY_POSITION, BY_NAME),
    }
    lines = []
    there = rows["mask"].unique()
    sets = [(mask,) for mask in there] + [tuple(m for m in group if m in there) for group in (UNMOVED, MOVED)]
    for masks in dict.fromkeys(filter(None, sets)):
        mine = rows[rows["mask"].isin(masks)]
        for protocol in ("thesis", "transfer"):
            line = {"mask": masks[0] if len(masks) == 1 else f"mean of {', '.join(masks)}", "protocol": protocol}
            for name, (first, second) in pairs.items():
                found = comparison.paired_difference(mine, first, second, average=len(masks) > 1, **options)
                found = found[found["protocol"] == protocol]
                line[name] = (
                    "–" if found.empty else with_interval(*(100 * found.iloc[0][["difference", "low", "high"]]), 1)
                )
            lines.append(line)
    show(pd.DataFrame(lines))
    mine = rows[rows["mask"].isin(MOVED) & (rows["protocol"] == "thesis")]
    if mine.empty:
        return
    gain, lost = (
        comparison.paired_difference(mine, *pairs[name], average=True, **options).iloc[0] for name in list(pairs)[::2]
    )
    answer = "true names gain, and whether counting loses any of it is not decided"
    if comparison.verdict(gain["low"], gain["high"]) != "higher":
        answer = "no gain is decided even with true names, so there is none for counting to lose"
    elif comparison.verdict(lost["low"], lost["high"]) == "higher":
        answer = "true names gain, and more than counted ones, so counting can explain it here"
    print(f"\n- Moved masks, thesis protocol: {answer}.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("puzzle", choices=("ratio", "order"))
    parser.add_argument("--encoder", type=Path, default=files.outputs_root() / "eurosat" / "encoder")
    parser.add_argument("--fold", type=int, help="of EuroSAT, see folds.py; its encoder is made unless there")
    parser.add_argument("--fine-tune", action="store_true", help="the part that trains")
    parser.add_argument("--epochs", type=int, default=EPOCHS, help="of fine-tuning")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--size", type=int, default=64, help="side of images in pixels; 32 takes a quarter of the time")
    parser.add_argument("--bands", nargs="+", default=TUNED, help="what fine-tuning hides, a set a word: 'B02 B03 B04'")
    parser.add_argument("--masks", nargs="+", default=(*UNMOVED, *MOVED), help="of the order: 'B8 B9 B10 B11 B12'")
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS)
    parser.add_argument("--norms", nargs="+", default=["train"], choices=("train", "frozen"), help="batch norms")
    given = parser.parse_args()
    if given.puzzle == "order" and not given.fine_tune:
        return report_table_4_4()
    world = World.of(given.encoder, given.fold, given.size, given.device, given.epochs)
    if given.puzzle == "order":
        return report_decoded(decoded(world, given.masks, given.seeds))
    if not given.fine_tune:
        return report_without_training(measured(world, conditions()))
    return report_tuned(*measured_tuned(world, given.bands, given.norms, given.seeds))


if __name__ == "__main__":
    main()
