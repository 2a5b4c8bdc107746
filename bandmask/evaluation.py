"""What an encoder is worth: scene heads and decoders on it, on complete and on incomplete images, method by method.

Two protocols, called by what happens to the head. *Kept*: it was trained once, on complete images with the pre-trained
encoder, and is in service when bands break; only what stands before it may change. *Retrained*: on incomplete images.
Source: thesis §3.2.2, §4.2.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from bandmask import bands, datasets, encoders, files, fills, params, results
from bandmask.batches import Batch, Batches
from bandmask.encoders import default_taps, embed, tap_strides
from bandmask.heads import (
    DeepLabV3PlusDecoder,
    SceneHeads,
    SegmentationDecoders,
    create_decoder,
    load_decoder,
)
from bandmask.masks import FITTED, VALIDATION_EPOCH, Fill, Mask, MaskSpec, mask_batch
from bandmask.packs import IGNORE, Pack
from bandmask.provenance import checksum_of_code
from bandmask.stats import scores
from bandmask.train import Compute, explain_out_of_memory, fill_checksum, fit, track, weights_checksum

Task = Literal["classification", "segmentation"]
Heads = SceneHeads | SegmentationDecoders  # of all seeds, side by side on one encoder pass
TAPS = ("layer1", "layer4")  # what DeepLabV3+ takes of a ResNet: S/4 and S/32 (thesis §3.2.2)
STRIDES = (4, 32)
HEADS = ("MLP", "linear", "k-NN")
CACHE_SHARE = 0.5  # of the memory that kept feature maps may take
WATCHED = {  # each epoch, on validation images
    "classification": ("overall_accuracy",),
    "segmentation": ("overall_accuracy", "miou_all", "miou_present"),
}
_PARAMETERS = {  # of notebooks 04 and 05, by what is called here
    "classification": {
        **{name: f"head_{name}" for name in ("seeds", "epochs", "lr")},
        **{"head_batch_size": "head_batch_size", "passes": "encoder_passes"},
    },
    "segmentation": {
        name: f"decoder_{name}" for name in ("seeds", "epochs", "lr", "batch_size", "passes", "width", "weights")
    },
}
_KEPT = {"classification": "head", "segmentation": "decoder"}  # how checkpoints are called
_FILES = {"classification": "results predictions", "segmentation": "segmentation segmentation_predictions"}
_NOTHING, _ZEROS = MaskSpec(), torch.zeros(13)


@dataclass(frozen=True)
class View:
    """How images reach a head or a decoder: an encoder, and what is hidden from it."""

    encoder: nn.Module
    spec: Mask = _NOTHING
    fill: Fill = _ZEROS
    image_size: int = 256
    batch_size: int = 64


class Features(NamedTuple):
    """Embeddings (B, D) and labels (B,), or maps (B, C₁, S/4, S/4), (B, C₄, S/32, S/32) and targets (B, H, W).

    `samples` (B,) are the images' rows in the pack.
    """

    maps: tuple[Tensor, ...]
    truth: Tensor
    samples: Tensor

    def take(self, rows: Tensor | slice) -> Features:
        """Those of some images."""
        return Features(tuple(each[rows] for each in self.maps), self.truth[rows], self.samples[rows])

    def split(self, size: int) -> Iterator[Features]:
        """Parts of `size` images, the last one smaller."""
        return (self.take(slice(start, start + size)) for start in range(0, len(self.samples), size))


def feature_batches(
    view: View,
    batches: Batches,
    compute: Compute,
    *,
    epoch: int = 0,
    mask_epoch: int = VALIDATION_EPOCH,
    epochs: int = 1,
) -> Iterator[Features]:
    """One pass of the encoder over incomplete images: feature maps where `batches` have targets, else embeddings.

    `epoch` is that of order and augmentation, `mask_epoch` (of `epochs`) that of the mask's draw. Maps of a ResNet50
    take 5 MB an image of 256 px. Errors are those of `decoder_taps`.
    """
    compute.place(view.encoder).eval()
    for batch in batches.epoch(epoch):
        taps = () if batch.targets is None else decoder_taps(view.encoder)
        images = mask_batch(batch.images, batch.samples, view.spec, view.fill, epoch=mask_epoch, epochs=epochs)
        explained = explain_out_of_memory("encoding images", view.batch_size, image_size=view.image_size)
        with torch.no_grad(), explained, compute.autocast():
            embeddings, maps = embed(view.encoder, compute.images(images), taps)
        seen = tuple(maps[tap] for tap in taps) or (embeddings.float(),)
        yield Features(seen, batch.labels if batch.targets is None else batch.targets, batch.samples)


def keep_features(parts: Iterable[Features], batches: int = 0) -> Features:
    """A whole pass in memory; a ValueError at the first if so many `batches` don't fit in half of it."""
    kept: list[Features] = []
    for part in parts:
        if batches and not kept:
            device, needed = part.truth.device, batches * sum(each.nbytes for each in (*part.maps, part.truth)) / 2**30
            memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
            there = (torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else memory) / 2**30
            if needed > CACHE_SHARE * there:
                raise ValueError(
                    f"feature maps of all passes take {needed:.1f} GiB, more than half of the {there:.1f} GiB there "
                    "are; set passes (decoder_passes) lower, or to 0, which keeps none"
                )
        kept.append(part)
    maps, truth, samples = zip(*kept, strict=True)
    return Features(tuple(map(torch.cat, zip(*maps, strict=True))), torch.cat(truth), torch.cat(samples))


def embed_batches(view: View, batches: Batches, compute: Compute, **drawn: int) -> tuple[Tensor, Tensor]:
    """Embeddings (N, D) float32 and labels (N,) of one pass over the images; `drawn` as in `feature_batches`."""
    found = keep_features(feature_batches(view, batches, compute, **drawn))
    return found.maps[0], found.truth


def embedded(view: View, pack: Pack, rows: np.ndarray, folder: Path, compute: Compute) -> Features:
    """Embeddings of these images as they lie in the pack; what was embedded before is read from `folder`.

    A file there is named by encoder, mask, fill and images, so that folds share what does not depend on them.
    """
    if isinstance(view.encoder, encoders.Mapped):
        seen = embedded(replace(view, encoder=view.encoder.encoder), pack, rows, folder, compute)
        with torch.no_grad():
            return seen._replace(maps=(view.encoder.map.to(compute.device)(seen.maps[0]),))
    decisive = [weights_checksum(view.encoder), asdict(view.spec), fill_checksum(view.fill), view.image_size]
    path = folder / f"{files.checksum_of(json.loads(json.dumps([*decisive, pack.checksum])))[:16]}.npz"
    known = dict(np.load(path)) if path.exists() else {"rows": np.empty(0, int), "embeddings": np.empty((0, 0))}
    if len(new := np.setdiff1d(rows, known["rows"])):
        batches = Batches(pack, new, batch_size=32, image_size=view.image_size, device=compute.device)
        found = keep_features(feature_batches(view, batches, compute)).maps[0].cpu().numpy()
        have = [known["embeddings"]] if len(known["rows"]) else []
        known = {"rows": np.concatenate([known["rows"], new]), "embeddings": np.concatenate([*have, found])}
        with files.writing(path) as partial:
            np.savez(partial, **known)
    order = np.argsort(known["rows"])
    places = order[np.searchsorted(known["rows"], rows, sorter=order)]
    embeddings = torch.from_numpy(known["embeddings"][places]).to(compute.device)
    labels, samples = (torch.from_numpy(part).to(compute.device) for part in (pack.labels[rows], rows.copy()))
    return Features((embeddings,), labels, samples)


def fit_head(
    kind: str, passes: Sequence[Features], classes: int, seeds: Sequence[int] = (0,), *, epochs: int = 20
) -> Callable[[Tensor], Tensor]:
    """A head of one of `HEADS` on embeddings: a function from (N, D) to classes (K, N).

    `MLP` is the thesis', one a seed, whose epochs cycle through `passes`, trained as `train_heads` does; `linear` is
    logistic regression on standardised embeddings, `k-NN` five neighbours by cosine: of these two there is one, and it
    sees the first pass. A ValueError of another kind.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.neighbors import KNeighborsClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    if kind not in HEADS:
        raise ValueError(f"unknown head {kind!r}; available: {', '.join(HEADS)}")
    first = passes[0].maps[0]
    if kind == "MLP":
        heads = SceneHeads(first.shape[1], classes, seeds).to(first.device)
        adam = torch.optim.Adam(heads.parameters(), lr=0.01)
        for epoch in range(epochs):
            seen = passes[epoch % len(passes)]
            for rows in _orders(len(first), heads.seeds, epoch).to(first.device).split(64):
                loss = _sum_over_heads(heads, seen.take(rows))
                adam.zero_grad()
                loss.backward()
                adam.step()
        return lambda embeddings: heads(embeddings).argmax(-1)
    near = KNeighborsClassifier(5, metric="cosine", weights="distance")
    model = near if kind == "k-NN" else make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
    model.fit(first.cpu().numpy(), passes[0].truth.cpu().numpy())
    return lambda embeddings: torch.from_numpy(model.predict(embeddings.cpu().numpy()))[None]


def _orders(count: int, seeds: Sequence[int], epoch: int) -> Tensor:
    """The order of an epoch's images for each head, (count, K)."""
    draws = [torch.Generator().manual_seed(seed * 100_003 + epoch) for seed in seeds]
    return torch.stack([torch.randperm(count, generator=draw) for draw in draws], dim=1)


def _sum_over_heads(heads: nn.Module, batch: Features) -> Tensor:
    """Cross-entropy, mean over the batch and summed over heads: each gets the gradient that it would get alone."""
    logits = heads(batch.maps[0].transpose(0, 1).contiguous())  # (K, B, C) of (B, K, D)
    return F.cross_entropy(logits.flatten(0, 1), batch.truth.T.flatten()) * len(logits)


@torch.no_grad()
def predicted(head: Callable[[Tensor], Tensor], seen: Features, seeds: Sequence[int], pack: Pack) -> pd.DataFrame:
    """What a head of `fit_head` says of images, as `predict` gives it."""
    counts = _counts(head(seen.maps[0]).to(seen.truth.device), seen.truth, len(pack.classes))
    table = _rows([(counts, seen.samples)], list(seeds)[: len(counts)], pack)
    return table.drop(columns=["pixels", *([] if "group" in pack.index else ["group"])])


def decoder_taps(encoder: nn.Module) -> tuple[str, str]:
    """What DeepLabV3+ takes of an encoder: edges from the map at S/4, context from that at S/32; `TAPS` of a ResNet.

    A ValueError if it has none, as a ViT, whose maps are all at S/16.
    """
    taps, strides = default_taps(encoder), tap_strides(encoder)
    if tuple(strides[tap] for tap in taps) != STRIDES:
        there = ", ".join(f"{tap} (S/{stride})" for tap, stride in strides.items())
        raise ValueError(
            f"no tap at S/4 and S/32, as a ResNet's layer1 and layer4, in {type(encoder).__name__}; available: "
            f"{there}. Segmentation needs a ResNet or a ConvNeXt; fine-tuning and scene heads take any encoder"
        )
    return taps


def tap_channels(view: View, compute: Compute) -> tuple[int, int]:
    """Channels of the two taps: 256 and 2048 of a ResNet50."""
    low, high = taps = decoder_taps(view.encoder)
    probe = torch.zeros(1, 13, 64, 64, device=compute.device)
    with torch.no_grad():
        _, maps = embed(compute.place(view.encoder).eval(), probe, taps)
    return maps[low].shape[1], maps[high].shape[1]


def train_heads(
    view: View,
    pack: Pack,
    *,
    seeds: Sequence[int] = (0, 1, 2),
    head_batch_size: int = 64,
    compute: Compute | None = None,
    **training: Any,
) -> tuple[SceneHeads, pd.DataFrame]:
    """Scene heads of all `seeds`, each with its own initial weights and order of the images, and their history.

    `head_batch_size` is that of their steps; all else, and what comes back, as in `train_on`.
    """
    _check_seeds(seeds)
    compute = compute or Compute.of()
    one = Batches(pack, pack.rows("val")[:1], image_size=view.image_size, device=compute.device)
    heads = SceneHeads(embed_batches(view, one, compute)[0].shape[1], len(pack.classes), seeds)
    return heads, train_on(view, pack, heads, head_batch_size, compute=compute, **training)


def make_decoders(
    view: View,
    classes: int,
    seeds: Sequence[int] = (0, 1, 2),
    *,
    width: int = 256,
    weights: Path | str | None = None,
    compute: Compute | None = None,
) -> tuple[SegmentationDecoders, str]:
    """Decoders that fit an encoder's taps, one a seed, and a sentence on where their weights are from.

    `width` channels inside (the published decoder: 256); `weights` is the published DFC2020 checkpoint, else they start
    from scratch. A ValueError for an encoder without such taps, or with other channels than the published one takes.
    """
    _check_seeds(seeds)
    low, high = tap_channels(view, compute or Compute.of())
    if not weights:
        fresh = [create_decoder(high, low, classes, width=width, seed=seed) for seed in seeds]
        return SegmentationDecoders(fresh, seeds), "decoders start from scratch: no checkpoint was given"
    if (low, high) != (256, 2048):
        raise ValueError(
            f"the published decoder takes 256 and 2048 channels (ResNet50), this encoder's taps have {low} and {high}; "
            "leave decoder_weights empty, or take a ResNet50"
        )
    loaded, messages = zip(*(load_decoder(weights, classes=classes, seed=seed) for seed in seeds), strict=True)
    return SegmentationDecoders(loaded, seeds), messages[0]


def train_decoders(view: View, pack: Pack, decoders: SegmentationDecoders, **training: Any) -> pd.DataFrame:
    """`train_on` with steps of `view.batch_size` images; only blur augments, as in the thesis (§3.1.1).

    The decoders differ in their fresh weights and in dropout, and see the same images in the same order. With 0
    `passes` features are kept nowhere, as large data sets need.
    """
    return train_on(view, pack, decoders, min(view.batch_size, len(pack.rows("train"))), **training)


def train_on(
    view: View,
    pack: Pack,
    heads: Heads,
    batch_size: int,
    *,
    epochs: int = 20,
    lr: float = 0.01,
    passes: int = 0,
    seed: int = 0,
    compute: Compute | None = None,
    checkpoint: Path | None = None,
    label: str = "training heads",
) -> pd.DataFrame:
    """Train the heads of all seeds in place, side by side on the same pass of the frozen encoder, each as if alone.

    Augmentation and hidden pixels of an epoch belong to the pass, which all share. Trained by Adam on `train` (the
    thesis names it for its MLP, and no optimizer for decoders); `val` is watched.

    Args:
        view: encoder and mask.
        pack: with labels; of decoders with targets.
        heads: to train; left in eval mode.
        batch_size: images a step.
        epochs: over the training split.
        lr: learning rate.
        passes: number of different encoder passes; epoch e uses pass e mod `passes`. 0 makes a new one every
            epoch, as the thesis does; fewer are cheaper and show the heads fewer draws.
        seed: of augmentation and order.
        compute: device and precision.
        checkpoint: file to go on from; a mark of all that decides the result is added to its name.
        label: of the progress line.

    Returns:
        A row an epoch and head: `epoch`, `train_loss` (mean over heads), validation scores (`WATCHED`), `head_seed`.

    Raises:
        ValueError: what trains nothing; passes that don't fit in memory; a pack without targets.
        FloatingPointError: loss or weights that are not finite.
    """
    given = {"epochs": epochs, "lr": lr, "batch_size": batch_size, "image_size": view.image_size}
    if wrong := [f"{name} = {value}" for name, value in given.items() if not value > 0]:
        raise ValueError(f"must be above 0: {', '.join(wrong)}")
    compute, dense = compute or Compute.of(), isinstance(heads, SegmentationDecoders)
    heads.to(compute.device)
    streamed, passes = dense and passes <= 0, min(passes, epochs) if passes > 0 else epochs
    encoded = batch_size if dense else view.batch_size
    drawn: dict[str, Any] = {"image_size": view.image_size, "device": compute.device, "seed": seed, "targets": dense}
    order: dict[str, Any] = {"flip": not dense, "shuffle": dense, "drop_last": streamed}
    train = Batches(pack, "train", batch_size=encoded, augment=True, **order, **drawn)
    val = Batches(pack, "val", batch_size=view.batch_size, **drawn)
    watched = WATCHED["segmentation" if dense else "classification"]
    kept: dict[int, Features] = {}  # by turn; those of validation images under −1

    def one_pass(turn: int) -> Iterator[Features]:
        if turn < 0:
            return feature_batches(view, val, compute)
        return feature_batches(view, train, compute, epoch=turn, mask_epoch=turn, epochs=passes)

    def whole_pass(turn: int) -> Features:
        if turn not in kept:
            if turn > 0 and passes == epochs:  # each is used once
                kept.pop(turn - 1, None)
            kept[turn] = keep_features(one_pass(turn), (1 if passes == epochs else passes) * len(train) + len(val))
        return kept[turn]

    def batches(epoch: int) -> Iterator[Features]:
        if streamed:
            yield from one_pass(epoch)
            return
        everything, count = whole_pass(epoch % passes), len(train.rows)
        orders = _orders(count, (seed,) if dense else heads.seeds, epoch).to(compute.device)
        for rows in orders.split(batch_size):  # (B, 1), or (B, K): each head has its own order
            if not dense:
                yield everything.take(rows)
            elif len(rows) == batch_size:  # a last, small batch would upset batch norms
                yield everything.take(rows[:, 0])

    def loss(batch: Features, _: int) -> Tensor:
        if dense:
            return sum_of_losses(_logits(heads, batch, compute), batch.truth)
        return _sum_over_heads(heads, batch)

    @torch.no_grad()
    def watch() -> dict[str, float]:
        if dense:
            parts = one_pass(-1) if streamed else whole_pass(-1).split(view.batch_size)
            counts = torch.stack([_confusions(heads, part, pack, compute).sum(1) for part in parts]).sum(0)
            found = [scores(of_one) for of_one in counts.cpu()]
        else:
            seen = whole_pass(-1)
            right = (_logits(heads, seen, compute).argmax(-1) == seen.truth).float().mean(1)
            found = [{"overall_accuracy": share} for share in right.tolist()]
        named = zip(heads.seeds, found, strict=True)
        return {f"{metric}:{own}": score[metric] for own, score in named for metric in watched}

    key = {
        **{"mask": asdict(view.spec), "fill": fill_checksum(view.fill), "encoder": weights_checksum(view.encoder)},
        **{"heads": weights_checksum(heads), "seeds": list(heads.seeds), "data": pack.fingerprint},
        **{"lr": lr, "passes": passes, "streamed": streamed, "seed": seed, "steps": batch_size},
        **{"batch_size": encoded, "image_size": view.image_size, "code": checksum_of_code(__name__)},
    }
    adam = torch.optim.Adam(heads.parameters(), lr=lr)
    options: dict[str, Any] = {"key": key, "watch": watch, "path": checkpoint, "compute": compute, "label": label}
    wide, frames = fit(heads, adam, batches, loss, epochs=epochs, **options), []
    for own in heads.seeds:
        names = {f"{metric}:{own}": metric for metric in watched}
        frame = wide[["epoch", "train_loss", *names]].rename(columns=names)
        frames.append(frame.assign(train_loss=wide["train_loss"] / len(heads.seeds), head_seed=own))
    return pd.concat(frames, ignore_index=True)


def _check_seeds(seeds: Sequence[int]) -> None:
    if not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(f"each seed makes one head: give one or more, each once; got {list(seeds)}")


def sum_of_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of each decoder's logits (K, B, C, H, W), mean over labelled pixels, summed over decoders.

    The sum gives each decoder the gradient that it would get alone. A batch without one labelled pixel gives 0.
    """
    shared = targets.expand(len(logits), *targets.shape).flatten(0, 1)
    total = F.cross_entropy(logits.flatten(0, 1), shared, ignore_index=IGNORE, reduction="sum")
    return total / (targets != IGNORE).sum().clamp(min=1)


@torch.no_grad()
def predict(
    view: View, heads: Heads, pack: Pack, split: str | np.ndarray = "test", *, compute: Compute | None = None
) -> pd.DataFrame:
    """What every head says of every image; of decoders, labelled pixels by true and predicted class.

    Returns:
        `head_seed`, `sample` (row in the pack), `group` (what intervals resample: the scene or block of an image, where
        the pack knows it), `label`, `predicted` (class indices) and, of decoders, `pixels`.
    """
    compute, dense = compute or Compute.of(), isinstance(heads, SegmentationDecoders)
    heads.to(compute.device).eval()
    options: dict[str, Any] = {"image_size": view.image_size, "device": compute.device, "targets": dense}
    parts = feature_batches(view, Batches(pack, split, batch_size=view.batch_size, **options), compute)
    table = _rows(((_confusions(heads, part, pack, compute), part.samples) for part in parts), heads.seeds, pack)
    return table if dense else table.drop(columns=["pixels", *([] if "group" in pack.index else ["group"])])


@torch.no_grad()
def segment(
    view: View,
    decoders: SegmentationDecoders,
    images: Tensor,
    samples: Tensor,
    size: tuple[int, int] | None = None,
    *,
    compute: Compute | None = None,
) -> Tensor:
    """Class of every pixel by every decoder, (K, B, H, W) uint8, of complete images that the view then masks.

    `images` are reflectance (B, 13, S, S), S a multiple of 32; `samples` (B,) their identities, which hidden pixels
    depend on; `size` H and W of the answer, by default S and S.
    """
    compute = compute or Compute.of()
    decoders.to(compute.device).eval()
    low, high = taps = decoder_taps(view.encoder)
    incomplete = mask_batch(images.to(compute.device), samples.to(compute.device), view.spec, view.fill)
    with compute.autocast():
        _, maps = embed(compute.place(view.encoder).eval(), compute.images(incomplete), taps)
        logits = decoders(maps[low], maps[high], size or tuple(images.shape[-2:]))
    return logits.argmax(2).to(torch.uint8).cpu()


def _logits(heads: nn.Module, seen: Features, compute: Compute) -> Tensor:
    """(K, B, C) float32 of scene heads, (K, B, C, H, W) of decoders."""
    if isinstance(heads, SceneHeads):
        return heads(seen.maps[0])
    with compute.autocast():
        logits = heads(*seen.maps, tuple(seen.truth.shape[1:]))
    return logits.float()


def _confusions(heads: nn.Module, seen: Features, pack: Pack, compute: Compute) -> Tensor:
    """Counts (K, B, C, C) int64 of true and predicted classes, for each head and image."""
    return _counts(_logits(heads, seen, compute).argmax(2), seen.truth, len(pack.classes))


def _counts(predicted: Tensor, truth: Tensor, classes: int) -> Tensor:
    heads, images, *pixels = predicted.shape
    labelled = truth != IGNORE
    cells = torch.where(labelled, truth, 0) * classes + predicted
    cells += torch.arange(heads * images, device=cells.device).view(heads, images, *(1 for _ in pixels)) * classes**2
    counts = torch.bincount(cells[labelled.expand_as(cells)], minlength=heads * images * classes**2)
    return counts.view(heads, images, classes, classes)


def _rows(counted: Iterable[tuple[Tensor, Tensor]], seeds: Sequence[int], pack: Pack) -> pd.DataFrame:
    """One row a count (K, B, C, C) that is not zero, of images whose rows in the pack are given (B,)."""
    frames = []
    for counts, samples in counted:
        head, image, label, predicted = counts.nonzero().T.cpu().numpy()
        rows = samples.cpu().numpy()[image]
        groups = pack.index["group"].iloc[rows] if "group" in pack.index else pd.Series(rows)
        columns = {"head_seed": np.array(seeds)[head], "sample": rows, "group": groups.astype(str).to_numpy()}
        columns |= {"label": label, "predicted": predicted, "pixels": counts[counts > 0].cpu().numpy()}
        frames.append(pd.DataFrame(columns))
    return pd.concat(frames).sort_values("head_seed", kind="stable", ignore_index=True)


def training_of(task: Task, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """How heads are trained, of the parameters of notebook 04 or 05."""
    return {name: parameters[parameter] for name, parameter in _PARAMETERS[task].items()}


def _train(
    task: Task, view: View, pack: Pack, training: Mapping[str, Any], compute: Compute, **options: Any
) -> tuple[Heads, pd.DataFrame]:
    options |= {**training, "compute": compute}
    if task == "classification":
        return train_heads(view, pack, **options)
    view = replace(view, batch_size=options.pop("batch_size", view.batch_size))
    made = {name: options.pop(name) for name in ("seeds", "width", "weights") if name in options}
    decoders, said = make_decoders(view, len(pack.classes), **made, compute=compute)
    if made.get("weights"):
        print(said)
    return decoders, train_decoders(view, pack, decoders, **options)


def in_service(
    experiment: str,
    task: Task,
    view: View,
    pack: Pack,
    training: Mapping[str, Any] | None = None,
    *,
    replace: bool = False,
    compute: Compute | None = None,
) -> tuple[Heads, pd.DataFrame]:
    """The heads in service of an experiment, and their history: found, or trained on complete images and kept.

    All notebooks and masks of an experiment share them. They lie in `outputs/<experiment>/in_service/<task>`.

    Args:
        experiment: folder below `outputs/`.
        task: whose heads.
        view: the pre-trained encoder, from which nothing is hidden.
        pack: of the experiment.
        training: of `training_of`; what is not given is as found, or else as notebook 04 or 05 declares it.
        replace: train anew where they were made from something else, code included; only for who makes them (notebooks
            04 and 05 with mask `none`), because what stands on the old ones is not made anew here.
        compute: device and precision.

    Raises:
        ValueError: bands are hidden; heads that were made from something else, and each difference; a damaged file.
    """
    if view.spec.bands:
        raise ValueError(f"what is in service was trained on complete images; this view hides {view.spec.bands}")
    folder = params.experiment_folder(experiment) / "in_service" / task
    if (shipped := shipped_heads(view, pack)) is not None:
        return shipped
    given: dict[str, Any] = json.loads(json.dumps(dict(training or {})))
    of = {"encoder": weights_checksum(view.encoder), "data": pack.fingerprint, "image_size": view.image_size}
    code = {"code": checksum_of_code(__name__)}
    if folder.is_dir():
        heads, made = read_in_service(folder)
        asked = {**of, **given, **(code if replace else {})}
        differ = [f"{k}: {made.get(k)!r} there, {now!r} now" for k, now in asked.items() if made.get(k) != now]
        if not differ:
            return heads, pd.DataFrame(made["history"]).astype({"train_loss": float})
        if not replace:
            raise ValueError(
                f"the heads in {folder} were made from something else: {'; '.join(differ)}. Make them anew by "
                f"notebooks/{results.MAKERS[task]} with mask none, or take another experiment"
            )
    given = {**training_of(task, params.declared(results.MAKERS[task])), **given}
    kept = folder.parents[1] / "checkpoints" / f"{_KEPT[task]}_in_service.pt"
    label = f"{task} on complete images"
    heads, history = _train(task, view, pack, given, compute or Compute.of(), checkpoint=kept, label=label)
    made = {**of, **code, **given, "seeds": list(heads.seeds), "history": history.to_dict("list")}
    write_in_service(folder, heads, made)
    return heads, history


def shipped_heads(view: View, pack: Pack) -> tuple[SceneHeads, pd.DataFrame] | None:
    """The heads that come with `eurosat-mini`, which has test images alone, and their history; None of other packs.

    Raises:
        ValueError: they stand on the encoder `mini`, and this is another.
    """
    if pack.card["dataset"] != "eurosat-mini":
        return None
    heads, made = read_in_service(files.MINI / "heads")
    if made["encoder"] != weights_checksum(getattr(view.encoder, "pretrained", view.encoder)):
        raise ValueError(
            "eurosat-mini has test images alone, so no head is trained on it, and the one that comes with it stands on "
            "the encoder 'mini'; for another encoder take a data set with a training split"
        )
    assert isinstance(heads, SceneHeads)
    return heads, pd.DataFrame(made["history"]).astype({"train_loss": float})


def write_in_service(folder: Path, heads: Heads, made: Mapping[str, Any]) -> None:
    """Write heads, and what they were made from, for `read_in_service`: `seeds`, `encoder` and more."""
    with files.writing(folder) as partial:
        partial.mkdir(parents=True)
        state = {name: tensor.detach().cpu().contiguous() for name, tensor in heads.state_dict().items()}
        save_file(state, partial / "heads.safetensors")
        made = {**made, "sha256": files.sha256(partial / "heads.safetensors")}
        (partial / "settings.json").write_text(json.dumps(made, indent=1), encoding="utf-8")


def read_in_service(folder: Path | str) -> tuple[Heads, dict[str, Any]]:
    """What `in_service` left: heads in eval mode, and what they were made from (`encoder` is its weights' checksum).

    A FileNotFoundError if there are none, a ValueError for files that are damaged or were changed.
    """
    path = files.require(Path(folder) / "heads.safetensors", "notebooks/04 and 05 train what is in service")
    try:
        made = json.loads(path.with_name("settings.json").read_text(encoding="utf-8"))
        if made["sha256"] != files.sha256(path):
            raise ValueError("its checksum is another")
        state, seeds = load_file(path), made["seeds"]
        heads: Heads
        if "weight1" in state:
            (_, inputs, hidden), classes = state["weight1"].shape, state["bias2"].shape[2]
            heads = SceneHeads(inputs, classes, seeds, hidden=hidden)
        else:
            layers = ("aspp.aspp1.atrous_conv", "decoder.conv1", "decoder.last_conv.8")
            (width, high), (_, low), (classes, _) = (state[f"decoders.0.{n}.weight"].shape[:2] for n in layers)
            made_anew = [DeepLabV3PlusDecoder(high, low, classes, width=width) for _ in seeds]
            heads = SegmentationDecoders(made_anew, seeds)
        heads.load_state_dict(state)
    except (KeyError, OSError, RuntimeError, ValueError) as error:
        raise ValueError(f"{path} is damaged or was changed ({error}); delete {folder} and run its notebook") from error
    return heads.eval(), made


def method_views(
    methods: Sequence[str],
    complete: View,
    spec: MaskSpec,
    pack: Pack,
    fill: Fill,
    folder: Path,
    seeds: Sequence[int] = (0,),
    *,
    learnt: Sequence[str] | None = None,
    compute: Compute | None = None,
    load_any_band: Callable[[Path], tuple[nn.Module, encoders.Card]] | None = None,
) -> dict[tuple[str, int], View]:
    """What each method sees of incomplete images, by its name and encoder seed (−1: nothing was fine-tuned).

    Args:
        methods: `pre-trained` and `fine-tuned` have `fill` in hidden pixels; `any-band` sees NaN there, and so does the
            pre-trained encoder itself in `native`, if it takes gaps; `nearest`, `local`, `ridge` and `ridge_local` are
            the pre-trained encoder behind that fill, fitted to `pack`; `mapped` and `native mapped` are `ridge_local`
            and `native` with a linear map to the embeddings of complete images, fitted to `pack`.
        complete: the pre-trained encoder on complete images.
        spec: what is hidden, the same pixels for all; where it is nothing, there are no views.
        pack: of the experiment.
        fill: the mask value.
        folder: of the run, with `encoder-seed<n>`; `any-band` lies beside it.
        seeds: of fine-tuned encoders.
        learnt: bands that these learnt to miss, where they are others than those of `spec`.
        compute: device and precision, where something is fitted to embeddings.
        load_any_band: `any_band.load`.

    Raises:
        ValueError: an unknown method; an encoder that was fine-tuned for other bands, or doesn't take gaps.
    """
    known = ("pre-trained", "native", *FITTED, "mapped", "native mapped", "fine-tuned", "any-band")
    if (unknown := [name for name in methods if name not in known]) or not methods:
        raise ValueError(f"unknown method {', '.join(unknown) or '(none given)'}; available: {', '.join(known)}")
    views: dict[tuple[str, int], View] = {}
    masked = replace(complete, spec=spec, fill=fill)
    gaps = torch.full((13,), torch.nan)
    if {"native", "native mapped"} & {*methods} and not getattr(complete.encoder, "takes_gaps", False):
        raise ValueError("native masking is of encoders that were trained with missing bands, such as galileo-nano")
    for method in methods if spec.bands else ():
        if method.startswith("native") or method == "mapped":
            behind = gaps if method.startswith("native") else fills.make_fill("ridge_local", pack, spec.bands)
            view = replace(masked, fill=behind)
            views[method, -1] = mapped(view, complete, pack, compute) if method.endswith("mapped") else view
        if method in ("pre-trained", *FITTED):
            free = fill if method == "pre-trained" else fills.make_fill(method, pack, spec.bands)
            views[method, -1] = replace(masked, fill=free)
        for seed in seeds if method in ("fine-tuned", "any-band") else ():
            if method == "any-band":
                assert load_any_band is not None
                model, _ = load_any_band(folder.parent / "any-band" / f"encoder-seed{seed}")
                views[method, seed] = replace(masked, encoder=model, fill=gaps)
                continue
            model, card = encoders.load_encoder(folder / f"encoder-seed{seed}")
            if (found := tuple((card.mask or {}).get("bands", ()))) != tuple(learnt or spec.bands):
                raise ValueError(f"{folder} holds an encoder for {found}; run notebooks/03_fine_tuning.ipynb anew")
            views[method, seed] = replace(masked, encoder=model)
    return views


def mapped(view: View, complete: View, pack: Pack, compute: Compute | None = None) -> View:
    """A view whose embeddings are carried to those of complete images, by `encoders.Mapped` fitted to `train`."""
    compute, both = compute or Compute.of(), []
    for each in (view, complete):
        batches = Batches(pack, "train", image_size=view.image_size, device=compute.device)
        both.append(embed_batches(each, batches, compute)[0])
    return replace(view, encoder=encoders.Mapped.fit(view.encoder, *both))


@dataclass(frozen=True)
class Compared:
    """Methods on the same test images in every protocol: what was predicted, and the heads and their history.

    Tables have `protocol`, `method` and `encoder_seed`, missing where nothing was fine-tuned; heads that were retrained
    are named as their views.
    """

    predictions: pd.DataFrame
    history: pd.DataFrame
    service: Heads
    retrained: Mapping[tuple[str, int], Heads]

    def write(
        self, folder: Path, pack: Pack, spec: MaskSpec, *, mask: str, scheme: str, **common: Any
    ) -> tuple[pd.DataFrame, pd.DataFrame]:
        """Write a run's results and predictions; `common` are more columns of all rows. Test scores, and predictions.

        Complete images are left out of the results of a run that hides bands: they belong to the run of mask `none`.
        """
        task: Task = "segmentation" if "pixels" in self.predictions else "classification"
        known = {"mask": mask.replace("_", " "), "scheme": scheme}
        common |= {**known, "bands": " ".join(spec.bands), "ratio": spec.ratio, "shape": spec.shape, "task": task}
        common |= {"schedule": "constant"}
        keys = ["epoch", "head_seed", "protocol", "method", "encoder_seed", "split"]
        curves = self.history.assign(split="val").melt(keys, list(WATCHED[task]), "metric", "value")
        scored = [{**row, "split": "test"} for row in results.score_predictions(self.predictions, pack.classes)]
        table = results.tidy([*curves.to_dict("records"), *scored], **common)  # type: ignore[list-item]
        table = table[table["protocol"] != "complete"] if spec.bands else table
        kept = self.predictions.assign(**known)
        for written, name in zip((table, kept), _FILES[task].split(), strict=True):
            results.write_table(written, folder / f"{name}.parquet")
        return results.tidy(scored, **common), kept


def compare_methods(
    experiment: str,
    task: Task,
    pack: Pack,
    complete: View,
    views: Mapping[tuple[str, int], View],
    training: Mapping[str, Any],
    *,
    folder: Path,
    compute: Compute | None = None,
) -> Compared:
    """Each method (`method_views`) behind the head in service, which is kept, and with a head of its own, retrained.

    Arguments are those of `in_service`; without views, for mask none, the head in service is made anew at need.
    Checkpoints go to the run's `folder`.
    """
    compute = compute or Compute.of()
    parts: list[pd.DataFrame] = []
    curves: list[pd.DataFrame] = []
    retrained: dict[tuple[str, int], Heads] = {}

    def add(to: list[pd.DataFrame], table: pd.DataFrame, protocol: str, method: str, seed: int = -1) -> None:
        seeds = pd.array([pd.NA if seed < 0 else seed] * len(table), "Int64")
        to.append(table.assign(protocol=protocol, method=method, encoder_seed=seeds))

    service, history = in_service(experiment, task, complete, pack, training, replace=not views, compute=compute)
    add(parts, predict(complete, service, pack, compute=compute), "complete", "pre-trained")
    add(curves, history, "complete", "pre-trained")
    for (method, seed), view in views.items():
        add(parts, predict(view, service, pack, compute=compute), "kept", method, seed)
        name = f"{_KEPT[task]}_{method}{'' if seed < 0 else f'-seed{seed}'}.pt"
        path, label = folder / "checkpoints" / name, f"{task}, {method}, on incomplete images"
        own, history = _train(task, view, pack, training, compute, checkpoint=path, label=label)
        add(parts, predict(view, own, pack, compute=compute), "retrained", method, seed)
        add(curves, history, "retrained", method, seed)
        retrained[method, seed] = own
    return Compared(pd.concat(parts, ignore_index=True), pd.concat(curves, ignore_index=True), service, retrained)


@dataclass(frozen=True)
class Setup:
    """What the parameters of notebook 04 or 05 come down to; printed, it says what is hidden, and from which encoder.

    Attributes:
        task: whose heads.
        parameters: all of the notebook's.
        folder: `outputs/<experiment>/<mask>`.
        pack: what is classified or segmented.
        card: of the pre-trained encoder.
        spec: what is hidden.
        fill: what stands there.
        complete: the pre-trained encoder on complete images.
        views: of `method_views`.
        compute: device and precision.
        note: what a reader of the figures must know.
    """

    task: Task
    parameters: Mapping[str, Any]
    folder: Path
    pack: Pack
    card: encoders.Card
    spec: MaskSpec
    fill: Fill
    complete: View
    views: Mapping[tuple[str, int], View]
    compute: Compute
    note: str

    @classmethod
    def of(cls, task: Task, parameters: Mapping[str, Any], load_any_band: Any = None) -> Setup:
        """Open what parameters name; errors are those of `method_views` and of what opens data and encoders."""
        p, dense = params.complete(results.MAKERS[task], parameters), task == "segmentation"
        compute, folder = Compute.of(p["device"]), params.run_folder(p["experiment"], p["mask"], p["mask_scheme"])
        track(p["track"], folder, task, p)
        tuned_on = datasets.open_dataset(p["dataset"])
        name = p["segmentation_dataset"] if dense else p["dataset"]
        pack = datasets.open_dataset(name)
        encoder, card = encoders.load_encoder(
            params.encoder_source(p["experiment"], p["encoder"]), weights=p["weights"] or None
        )
        scheme = p["mask_scheme"]
        lost, learnt = (bands.resolve_mask(p["mask"], scheme, of.card["stored_order"]) for of in (pack, tuned_on))
        spec = MaskSpec(lost, p["mask_ratio"], p["mask_value"], shape=p["mask_shape"])
        fill = fills.make_fill(spec.value, tuned_on, lost)  # as in 03
        sizes = ("segmentation_image_size", "decoder_batch_size") if dense else ("image_size", "head_batch_size")
        complete = View(encoder, image_size=p[sizes[0]], batch_size=p[sizes[1]] if dense else 64)
        views = method_views(
            p["methods"], complete, spec, pack, fill, folder, p["seeds"], learnt=learnt, load_any_band=load_any_band
        )
        said = [pack.card.get("label_note", ""), bands.two_readings(p["mask"]) if scheme != "position" else ""]
        said += [f"fine-tuned encoders learnt to miss {' '.join(learnt)}: others than these"] * (learnt != lost)
        return cls(task, p, folder, pack, card, spec, fill, complete, views, compute, "\n".join(filter(None, said)))

    def __str__(self) -> str:
        """What is hidden from which encoder, and what a reader must know."""
        lost = " ".join(self.spec.bands) or "nothing"
        return f"{self.card.name} on {self.pack.path.name}; hidden: {lost}\n{self.note}".strip()

    def lossy(self, batch: Batch) -> Tensor:
        """A batch as the pre-trained encoder gets it: the mask value in hidden pixels."""
        return mask_batch(batch.images, batch.samples, self.spec, self.fill)

    def compare(self) -> tuple[Compared, pd.DataFrame, pd.DataFrame]:
        """`compare_methods`, test scores and predictions; the two tables are written to the run's folder."""
        p, training = self.parameters, training_of(self.task, self.parameters)
        where: dict[str, Any] = {"folder": self.folder, "compute": self.compute}
        compared = compare_methods(p["experiment"], self.task, self.pack, self.complete, self.views, training, **where)
        data = p["segmentation_dataset" if self.task == "segmentation" else "dataset"]
        about = {"experiment": p["experiment"], "dataset": data, "encoder": self.card.name, "mask": p["mask"]}
        about |= {"scheme": p["mask_scheme"], "mask_value": p["mask_value"]}
        return compared, *compared.write(self.folder, self.pack, self.spec, **about)
