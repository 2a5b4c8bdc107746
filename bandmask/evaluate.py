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
from torch import Tensor, nn

from bandmask import encoders, files, fills, params, results
from bandmask.batches import Batch, Batches
from bandmask.encoders import default_taps, embed, tap_strides
from bandmask.heads import (
    DFC2020_CLASSES,
    DeepLabV3PlusDecoder,
    Dfc2020Model,
    SceneHeads,
    SegmentationDecoders,
    create_decoder,
    load_decoder,
    load_dfc2020_model,
)
from bandmask.masks import FITTED, VALIDATION_EPOCH, Fill, Mask, MaskSpec, mask_batch
from bandmask.packs import IGNORE, Pack
from bandmask.provenance import checksum_of_code
from bandmask.stats import scores
from bandmask.train import Compute, explain_out_of_memory, fill_checksum, fit, weights_checksum

Task = Literal["classification", "segmentation"]
Heads = SceneHeads | SegmentationDecoders  # of all seeds, side by side on one encoder pass
TAPS = ("layer1", "layer4")  # what DeepLabV3+ takes of a ResNet: S/4 and S/32 (thesis §3.2.2)
STRIDES = (4, 32)
CACHE_SHARE = 0.5  # of the memory that kept feature maps may take
WATCHED = {  # each epoch, on validation images
    "classification": ("overall_accuracy",),
    "segmentation": ("overall_accuracy", "miou_all", "miou_present"),
}
METHODS = ("pre-trained", "ridge", "fine-tuned")
_PARAMETERS = {  # of notebooks 04 and 05, by what is called here
    "classification": {
        "seeds": "head_seeds",
        "epochs": "head_epochs",
        "lr": "head_lr",
        "head_batch_size": "head_batch_size",
        "passes": "encoder_passes",
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
    """What a decoder sees of images: `low` (B, C₁, S/4, S/4), `high` (B, C₄, S/32, S/32), targets and samples."""

    low: Tensor
    high: Tensor
    targets: Tensor
    samples: Tensor

    def take(self, rows: Tensor) -> Features:
        """Those of some images."""
        return Features(*(field[rows] for field in self))

    def split(self, size: int) -> Iterator[Features]:
        """Parts of `size` images, the last one smaller."""
        return map(Features._make, zip(*(field.split(size) for field in self), strict=True))


@torch.no_grad()
def embed_batches(view: View, batches: Batches, compute: Compute, **drawn: int) -> tuple[Tensor, Tensor]:
    """Embeddings (N, D) float32 and labels (N,) of one pass over the images; `drawn` as in `feature_batches`."""
    compute.place(view.encoder).eval()
    embeddings, labels = [], []
    with explain_out_of_memory("embedding images", view.batch_size, image_size=view.image_size):
        for images, batch in _incomplete(view, batches, **drawn):
            with compute.autocast():
                embeddings.append(view.encoder(compute.images(images)).float())
            labels.append(batch.labels)
    return torch.cat(embeddings), torch.cat(labels)


def feature_batches(view: View, batches: Batches, compute: Compute, **drawn: int) -> Iterator[Features]:
    """Feature maps of one pass, batch by batch: at 256 px a ResNet50's take 5 MB an image, too much to keep.

    Args:
        view: encoder and mask.
        batches: with targets.
        compute: device and precision.
        drawn: `epoch` of order and augmentation, `mask_epoch` of the mask's draw, and of how many `epochs`.

    Raises:
        ValueError: the encoder has no such maps, see `decoder_taps`.
    """
    compute.place(view.encoder).eval()
    low, high = taps = decoder_taps(view.encoder)
    for images, batch in _incomplete(view, batches, **drawn):
        with torch.no_grad(), compute.autocast():
            _, maps = embed(view.encoder, compute.images(images), taps)
        assert batch.targets is not None  # Batches refuses a pack without
        yield Features(maps[low], maps[high], batch.targets, batch.samples)


def _incomplete(
    view: View, batches: Batches, *, epoch: int = 0, mask_epoch: int = VALIDATION_EPOCH, epochs: int = 1
) -> Iterator[tuple[Tensor, Batch]]:
    for batch in batches.epoch(epoch):
        yield mask_batch(batch.images, batch.samples, view.spec, view.fill, epoch=mask_epoch, epochs=epochs), batch


def keep_features(parts: Iterator[Features], batches: int) -> Features:
    """Feature maps of a whole pass, in memory.

    Raises:
        ValueError: so many `batches` don't fit in half of the memory; found out at the first.
    """
    kept: list[Features] = []
    for part in parts:
        if not kept:
            device, needed = part.low.device, batches * sum(field.nbytes for field in part) / 2**30
            memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
            there = (torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else memory) / 2**30
            if needed > CACHE_SHARE * there:
                raise ValueError(
                    f"feature maps of all passes take {needed:.1f} GiB, more than half of the {there:.1f} GiB there "
                    "are; set passes (decoder_passes) lower, or to 0, which keeps none"
                )
        kept.append(part)
    return Features(*map(torch.cat, zip(*kept, strict=True)))


def decoder_taps(encoder: nn.Module) -> tuple[str, str]:
    """What DeepLabV3+ takes of an encoder: edges from the map at S/4, context from that at S/32; `TAPS` of a ResNet.

    Raises:
        ValueError: the encoder has no maps of these sizes, as a ViT, whose maps are all at S/16.
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
    epochs: int = 20,
    lr: float = 0.01,
    head_batch_size: int = 64,
    passes: int = 0,
    seed: int = 0,
    compute: Compute | None = None,
    **options: Any,
) -> tuple[SceneHeads, pd.DataFrame]:
    """Train the heads of all seeds side by side, on one pass of the frozen encoder an epoch.

    Each head has its own initial weights and its own order of the images; flips, blur and hidden pixels of an epoch
    are shared, because they belong to the pass. Trained by Adam on `train`; `val` is watched.

    Args:
        view: encoder and mask.
        pack: with labels.
        seeds: one head each.
        epochs: over the training split.
        lr: learning rate.
        head_batch_size: of the heads' steps.
        passes: number of different encoder passes; epoch e uses pass e mod `passes`. 0 makes a new one every
            epoch, as the thesis does; fewer are cheaper and show the heads fewer draws.
        seed: of augmentation and order of the passes.
        compute: device and precision.
        options: `checkpoint` (a file to go on from; a mark of all that decides the result is added to its name),
            `settings` (more of what tells checkpoints apart) and `label`.

    Returns:
        The heads in eval mode, and the history, a row an epoch and head: `epoch`, `train_loss` (mean over heads),
        validation `overall_accuracy`, `head_seed`.

    Raises:
        ValueError: seeds that repeat, or none; epochs, batch size or learning rate that train nothing.
        FloatingPointError: loss or weights that are not finite.
    """
    _check(seeds, epochs=epochs, lr=lr, head_batch_size=head_batch_size, image_size=view.image_size)
    compute = compute or Compute.of()
    passes = min(passes, epochs) or epochs
    drawn: dict[str, Any] = {"batch_size": view.batch_size, "image_size": view.image_size, "seed": seed}
    train = Batches(pack, "train", augment=True, device=compute.device, **drawn)
    watched = embed_batches(view, Batches(pack, "val", device=compute.device, **drawn), compute)
    heads = SceneHeads(watched[0].shape[1], len(pack.classes), seeds).to(compute.device)
    cache: dict[int, tuple[Tensor, Tensor]] = {}

    def batches(epoch: int) -> Iterator[Tensor]:
        turn = epoch % passes
        if turn not in cache:
            if passes == epochs:
                cache.clear()  # each pass is used once: don't keep them
            cache[turn] = embed_batches(view, train, compute, epoch=turn, mask_epoch=turn, epochs=passes)
        count = len(cache[turn][0])
        orders = [torch.randperm(count, generator=torch.Generator().manual_seed(s * 100_003 + epoch)) for s in seeds]
        yield from torch.stack(orders, dim=1).to(compute.device).split(head_batch_size)  # (B, K) rows of the pass

    def loss(rows: Tensor, epoch: int) -> Tensor:
        embeddings, labels = cache[epoch % passes]
        logits = heads(embeddings[rows.T])  # (K, B, C)
        # mean over the batch, sum over heads: each head gets the gradient it would get alone
        return F.cross_entropy(logits.flatten(0, 1), labels[rows.T].flatten()) * rows.shape[1]

    def watch() -> Iterable[dict[str, float]]:
        right = (heads(watched[0]).argmax(-1) == watched[1]).float().mean(1)
        return ({"overall_accuracy": float(share)} for share in right)

    made_from = {"head_batch_size": head_batch_size, "passes": passes, **drawn}
    return heads, _fit(heads, view, pack, batches, loss, watch, epochs, lr, compute, made_from, **options)


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

    `width` is that of the channels inside (256 in the published decoder); `weights` the published DFC2020 checkpoint,
    else they start from scratch.

    Raises:
        ValueError: the encoder has no such taps, or other channels than the published decoder takes.
    """
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


def train_decoders(
    view: View,
    pack: Pack,
    decoders: SegmentationDecoders,
    *,
    epochs: int = 20,
    lr: float = 0.01,
    passes: int = 0,
    seed: int = 0,
    compute: Compute | None = None,
    **options: Any,
) -> pd.DataFrame:
    """Train the decoders of all seeds, in place, on the same pass of the frozen encoder, each as if it were alone.

    They differ in their fresh weights and in dropout; order, blur and hidden pixels of an epoch belong to the pass.
    Only blur augments, as in the thesis (§3.1.1). It names no optimizer for this task; this is Adam, as for its MLP.
    Arguments, history and errors are those of `train_heads`, but: `view.batch_size` is also that of the decoders'
    steps; 0 `passes` make a new one every epoch and keep none, as large data sets need; the history has `miou_all` and
    `miou_present` too.

    Raises:
        ValueError: the passes don't fit in memory, or the pack has no targets.
    """
    _check(decoders.seeds, epochs=epochs, lr=lr, image_size=view.image_size, batch_size=view.batch_size)
    compute = compute or Compute.of()
    passes = min(passes, epochs)
    decoders.to(compute.device)
    drawn: dict[str, Any] = {"image_size": view.image_size, "device": compute.device, "seed": seed, "targets": True}
    size = min(view.batch_size, len(pack.rows("train")))
    train = Batches(
        pack, "train", batch_size=size, augment=True, flip=False, shuffle=True, drop_last=passes == 0, **drawn
    )
    watched = Batches(pack, "val", batch_size=view.batch_size, **drawn)
    kept: dict[int, Features] = {}  # by turn; the validation images under −1
    outputs = pack.targets.shape[1:] if pack.targets is not None else ()

    def one_pass(turn: int) -> Features:
        if turn not in kept:
            epochs_of = {} if turn < 0 else {"epoch": turn, "mask_epoch": turn, "epochs": passes}
            parts = feature_batches(view, watched if turn < 0 else train, compute, **epochs_of)
            kept[turn] = keep_features(parts, passes * len(train) + len(watched))
        return kept[turn]

    def batches(epoch: int) -> Iterator[Features]:
        if passes == 0:
            yield from feature_batches(view, train, compute, epoch=epoch, mask_epoch=epoch, epochs=epochs)
            return
        everything = one_pass(epoch % passes)
        order = torch.randperm(len(train.rows), generator=torch.Generator().manual_seed(seed * 100_003 + epoch))
        for part in order.to(compute.device).split(size):
            if len(part) == size:  # a last, small batch would upset batch norms
                yield everything.take(part)

    def loss(batch: Features, _: int) -> Tensor:
        with compute.autocast():
            logits = decoders(batch.low, batch.high, outputs)  # (K, B, C, H, W)
        return sum_of_losses(logits.float(), batch.targets)

    def watch() -> Iterable[dict[str, float]]:
        parts = feature_batches(view, watched, compute) if passes == 0 else one_pass(-1).split(view.batch_size)
        totals = sum(confusions(decoders, part, len(pack.classes), compute).sum(1) for part in parts)
        assert isinstance(totals, Tensor)
        return map(scores, totals.cpu())

    made_from = {"decoders": weights_checksum(decoders), "batch_size": size, "passes": passes, "seed": seed}
    return _fit(decoders, view, pack, batches, loss, watch, epochs, lr, compute, made_from, **options)


def sum_of_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of each decoder's logits (K, B, C, H, W), mean over labelled pixels, summed over decoders.

    The sum gives each decoder the gradient that it would get alone. A batch without one labelled pixel gives 0.
    """
    count = logits.shape[0]
    shared = targets.expand(count, *targets.shape).flatten(0, 1)
    total = F.cross_entropy(logits.flatten(0, 1), shared, ignore_index=IGNORE, reduction="sum")
    return total / (targets != IGNORE).sum().clamp(min=1)


def _fit(
    heads: Heads,
    view: View,
    pack: Pack,
    batches: Callable[[int], Iterable[Any]],
    loss: Callable[[Any, int], Tensor],
    watch: Callable[[], Iterable[dict[str, float]]],
    epochs: int,
    lr: float,
    compute: Compute,
    made_from: Mapping[str, Any],
    *,
    checkpoint: Path | None = None,
    settings: Mapping[str, Any] | None = None,
    label: str = "training heads",
) -> pd.DataFrame:
    """The one training call; `watch` gives the scores of each head. The history, a row an epoch and head."""
    watched = WATCHED["classification" if isinstance(heads, SceneHeads) else "segmentation"]

    @torch.no_grad()
    def scored() -> dict[str, float]:
        found = zip(heads.seeds, watch(), strict=True)
        return {f"{metric}:{seed}": score[metric] for seed, score in found for metric in watched}

    key = {
        "mask": asdict(view.spec),
        "fill": fill_checksum(view.fill),
        "seeds": list(heads.seeds),
        "lr": lr,
        "image_size": view.image_size,
        "data": pack.fingerprint,
        "code": checksum_of_code(__name__),
        "weights_checksum": weights_checksum(view.encoder),
        **made_from,
        **(settings or {}),
    }
    adam = torch.optim.Adam(heads.parameters(), lr=lr)
    options: dict[str, Any] = {"key": key, "watch": scored, "path": checkpoint, "compute": compute, "label": label}
    wide = fit(heads, adam, batches, loss, epochs=epochs, **options)
    frames = []
    for seed in heads.seeds:
        own = {f"{metric}:{seed}": metric for metric in watched}
        frame = wide[["epoch", "train_loss", *own]].rename(columns=own)
        frames.append(frame.assign(train_loss=wide["train_loss"] / len(heads.seeds), head_seed=seed))
    return pd.concat(frames, ignore_index=True)


def _check(seeds: Sequence[int], **positive: float) -> None:
    if not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(f"each seed makes one head: give one or more, each once; got {list(seeds)}")
    if wrong := {name: value for name, value in positive.items() if not value > 0}:
        raise ValueError(f"must be above 0: {', '.join(f'{name} = {value}' for name, value in wrong.items())}")


@torch.no_grad()
def predict(
    view: View, heads: Heads, pack: Pack, split: str = "test", *, compute: Compute | None = None
) -> pd.DataFrame:
    """What every head says of every image; of decoders, labelled pixels by true and predicted class.

    Returns:
        `head_seed`, `sample` (row in the pack), `group` (what intervals resample: the scene or block of an image, where
        the pack knows it), `label`, `predicted` (class indices) and, of decoders, `pixels`.
    """
    compute = compute or Compute.of()
    heads.to(compute.device).eval()
    options: dict[str, Any] = {"batch_size": view.batch_size, "image_size": view.image_size, "device": compute.device}
    if isinstance(heads, SegmentationDecoders):
        parts = feature_batches(view, Batches(pack, split, targets=True, **options), compute)
        counted = (_rows(confusions(heads, p, len(pack.classes), compute), p.samples, heads.seeds, pack) for p in parts)
        table = pd.concat(counted, ignore_index=True)
        return table.sort_values(["head_seed", "sample"], kind="stable", ignore_index=True)
    batches = Batches(pack, split, **options)
    embeddings, labels = embed_batches(view, batches, compute)
    said = heads(embeddings).argmax(-1).cpu()  # (K, N)
    group = {"group": pack.index["group"].iloc[batches.rows].astype(str).array} if "group" in pack.index else {}
    frames = [
        pd.DataFrame({"head_seed": seed, "sample": batches.rows, **group, "label": labels.cpu(), "predicted": row})
        for seed, row in zip(heads.seeds, said, strict=True)
    ]
    return pd.concat(frames, ignore_index=True)


@torch.no_grad()
def predict_published(
    model: Dfc2020Model, pack: Pack, spec: Mask, fill: Fill, split: str = "test", *, compute: Compute | None = None
) -> pd.DataFrame:
    """The same of the complete published model, as a reference: nothing of it was trained here; its seed is −1.

    Raises:
        ValueError: the pack lacks a class that the model knows by name.
    """
    if missing := [name for name in DFC2020_CLASSES if name not in pack.classes]:
        raise ValueError(f"the published model predicts {', '.join(missing)}, which {pack.path} has no class for")
    compute = compute or Compute.of()
    compute.place(model).eval()
    ours = torch.tensor([pack.classes.index(name) for name in DFC2020_CLASSES], device=compute.device)
    frames = []
    batches = Batches(pack, split, targets=True, batch_size=16, device=compute.device)
    for images, batch in _incomplete(View(model, spec, fill), batches):
        assert batch.targets is not None
        with compute.autocast():
            said = ours[model(compute.images(images)).argmax(1)]
        frames.append(_rows(_counted(said[None], batch.targets, len(pack.classes)), batch.samples, (-1,), pack))
    return pd.concat(frames, ignore_index=True)


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
    images, samples = images.to(compute.device), samples.to(compute.device)
    low, high = taps = decoder_taps(view.encoder)
    incomplete = mask_batch(images, samples, view.spec, view.fill)
    with compute.autocast():
        _, maps = embed(compute.place(view.encoder).eval(), compute.images(incomplete), taps)
        logits = decoders(maps[low], maps[high], size or tuple(images.shape[-2:]))
    return logits.argmax(2).to(torch.uint8).cpu()


@torch.no_grad()
def confusions(decoders: SegmentationDecoders, part: Features, classes: int, compute: Compute) -> Tensor:
    """Counts (K, B, C, C) int64 of true and predicted classes, for each decoder and image."""
    height, width = part.targets.shape[1:]
    with compute.autocast():
        said = decoders(part.low, part.high, (height, width)).argmax(2)  # (K, B, H, W)
    return _counted(said, part.targets, classes)


def _counted(predicted: Tensor, targets: Tensor, classes: int) -> Tensor:
    heads, images = predicted.shape[:2]
    labelled = targets != IGNORE
    cells = torch.where(labelled, targets, 0) * classes + predicted
    cells += torch.arange(heads * images, device=cells.device).view(heads, images, 1, 1) * classes**2
    counts = torch.bincount(cells[labelled.expand_as(cells)], minlength=heads * images * classes**2)
    return counts.view(heads, images, classes, classes)


def _rows(counts: Tensor, samples: Tensor, seeds: Sequence[int], pack: Pack) -> pd.DataFrame:
    """One row a count that is not zero."""
    head, image, label, predicted = counts.nonzero().T.cpu()
    rows = samples.cpu()[image].numpy()
    groups = pack.index["group"].iloc[rows] if "group" in pack.index else pd.Series(rows)
    return pd.DataFrame(
        {
            "head_seed": torch.tensor(seeds)[head].numpy(),
            "sample": rows,
            "group": groups.astype(str).to_numpy(),
            "label": label.numpy(),
            "predicted": predicted.numpy(),
            "pixels": counts[counts > 0].cpu().numpy(),
        }
    )


def training_of(task: Task, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """How heads are trained, of the parameters of notebook 04 or 05."""
    return {name: parameters[parameter] for name, parameter in _PARAMETERS[task].items()}


def _train(
    task: Task, view: View, pack: Pack, training: Mapping[str, Any], compute: Compute, **options: Any
) -> tuple[Heads, pd.DataFrame]:
    if task == "classification":
        return train_heads(view, pack, compute=compute, **training, **options)
    own = dict(training)
    view = replace(view, batch_size=own.pop("batch_size", view.batch_size))
    made = {name: own.pop(name) for name in ("seeds", "width", "weights") if name in own}
    _check(made.get("seeds", (0,)))
    decoders, said = make_decoders(view, len(pack.classes), **made, compute=compute)
    print(said)
    return decoders, train_decoders(view, pack, decoders, compute=compute, **own, **options)


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

    All notebooks and masks of an experiment share them. They lie in `outputs/<experiment>/in_service/<task>`, weights
    and settings, with the checksum of the weights.

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
    given: dict[str, Any] = json.loads(json.dumps(dict(training or {})))
    of = {"encoder": weights_checksum(view.encoder), "data": pack.fingerprint, "image_size": view.image_size}
    code = {"code": checksum_of_code(__name__)}
    if folder.is_dir():
        heads, made = read_in_service(folder)
        asked = {**of, **given, **(code if replace else {})}
        differ = {name: (made.get(name), value) for name, value in asked.items() if made.get(name) != value}
        if not differ:
            return heads, pd.DataFrame(made["history"]).astype({"train_loss": float})
        if not replace:
            raise ValueError(
                f"the heads in {folder} were made from something else: "
                + "; ".join(f"{name}: {there!r} there, {now!r} now" for name, (there, now) in differ.items())
                + f". Make them anew by notebooks/{results.MAKERS[task]} with mask none, or take another experiment"
            )
    given = {**training_of(task, params.declared(results.MAKERS[task])), **given}
    kept = folder.parents[1] / "checkpoints" / f"{_KEPT[task]}_in_service.pt"
    compute = compute or Compute.of()
    heads, history = _train(task, view, pack, given, compute, checkpoint=kept, label=f"{task} on complete images")
    write_in_service(
        folder, heads, {**of, **code, **given, "seeds": list(heads.seeds), "history": history.to_dict("list")}
    )
    return heads, history


def write_in_service(folder: Path, heads: Heads, made: Mapping[str, Any]) -> None:
    """Write heads, and what they were made from, for `read_in_service`: `seeds`, `encoder` and more."""
    from safetensors.torch import save_file

    with files.writing(folder) as partial:
        partial.mkdir(parents=True)
        state = {name: tensor.detach().cpu().contiguous() for name, tensor in heads.state_dict().items()}
        save_file(state, partial / "heads.safetensors")
        made = {**made, "sha256": files.sha256(partial / "heads.safetensors")}
        (partial / "settings.json").write_text(json.dumps(made, indent=1), encoding="utf-8")


def read_in_service(folder: Path | str) -> tuple[Heads, dict[str, Any]]:
    """What `in_service` left: heads in eval mode, and what they were made from (`encoder` is its weights' checksum).

    Raises:
        FileNotFoundError: there are none.
        ValueError: a damaged file, or one that was changed.
    """
    from safetensors.torch import load_file

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


@dataclass(frozen=True)
class Compared:
    """Methods on the same test images, in every protocol.

    Attributes:
        predictions: of `predict`, with `protocol`, `method` and `encoder_seed` (missing where nothing was fine-tuned).
        history: of the heads that were trained, with the same columns.
        views: the first view of each method.
        heads: by protocol and method, the first.
    """

    predictions: pd.DataFrame
    history: pd.DataFrame
    views: Mapping[str, View]
    heads: Mapping[tuple[str, str], Heads]

    def write(
        self, folder: Path, pack: Pack, spec: MaskSpec, *, mask: str, scheme: str, **common: Any
    ) -> tuple[pd.DataFrame, pd.DataFrame]:
        """Write a run's results and predictions; `common` are more columns that all its rows share.

        Complete images are left out of the results of a run that hides bands: they belong to the run of mask `none`.

        Returns:
            Test scores of all, complete images too; predictions with the mask's name.
        """
        task: Task = "segmentation" if "pixels" in self.predictions else "classification"
        known = {"mask": mask.replace("_", " "), "scheme": scheme}
        common |= {**known, "bands": " ".join(spec.bands), "ratio": spec.ratio, "shape": spec.shape, "task": task}
        common |= {"schedule": "constant"}
        keys = ["epoch", "head_seed", "protocol", "method", "encoder_seed", "split"]
        curves: list[Any] = (
            self.history.assign(split="val").melt(keys, list(WATCHED[task]), "metric", "value").to_dict("records")
        )
        scored = [{**row, "split": "test"} for row in results.score_predictions(self.predictions, pack.classes)]
        table = results.tidy(curves + scored, **common)
        if spec.bands:
            table = table[table["protocol"] != "complete"]
        kept = self.predictions.assign(**known)
        for written, name in zip((table, kept), _FILES[task].split(), strict=True):
            results.write_table(written, folder / f"{name}.parquet")
        return results.tidy(scored, **common), kept


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
    load_any_band: Callable[[Path], tuple[nn.Module, encoders.Card]] | None = None,
) -> dict[tuple[str, int], View]:
    """What each method sees of incomplete images, by its name and encoder seed (−1: nothing was fine-tuned).

    Args:
        methods: `pre-trained` and `fine-tuned` have the mask value in hidden pixels; `any-band` sees NaN there; a
            fitted mask value (`nearest`, `local`, `ridge`, `ridge_local`) is the pre-trained encoder behind that fill.
        complete: the pre-trained encoder on complete images.
        spec: what is hidden, the same pixels for all.
        pack: whose training split fills are fitted to.
        fill: what stands in hidden pixels.
        folder: of the run, with `encoder-seed<n>`; `any-band` lies beside it.
        seeds: of fine-tuned encoders.
        learnt: bands that fine-tuned encoders learnt to miss, where these are others than those of `spec`.
        load_any_band: `any_band.load`.

    Raises:
        ValueError: an unknown method; an encoder that was fine-tuned for other bands.
    """
    known = ("pre-trained", *FITTED, "fine-tuned", "any-band")
    if unknown := [name for name in methods if name not in known]:
        raise ValueError(f"unknown method {', '.join(unknown)}; available: {', '.join(known)}")
    views: dict[tuple[str, int], View] = {}
    for method in methods if spec.bands else ():
        if method == "pre-trained":
            views[method, -1] = replace(complete, spec=spec, fill=fill)
        elif method in FITTED:
            views[method, -1] = replace(complete, spec=spec, fill=fills.make_fill(method, pack, spec.bands))
        elif method == "any-band":
            assert load_any_band is not None
            for seed in seeds:
                model, _ = load_any_band(folder.parent / "any-band" / f"encoder-seed{seed}")
                views[method, seed] = replace(complete, encoder=model, spec=spec, fill=torch.full((13,), np.nan))
        else:
            for seed in seeds:
                model, card = encoders.load_encoder(folder / f"encoder-seed{seed}")
                if (found := tuple((card.mask or {}).get("bands", ()))) != tuple(learnt or spec.bands):
                    raise ValueError(f"{folder} holds an encoder for {found}; run notebooks/03_fine_tuning.ipynb anew")
                views[method, seed] = replace(complete, encoder=model, spec=spec, fill=fill)
    return views


def compare_methods(
    experiment: str,
    task: Task,
    pack: Pack,
    complete: View,
    views: Mapping[tuple[str, int], View],
    training: Mapping[str, Any],
    *,
    folder: Path,
    replace: bool = False,
    compute: Compute | None = None,
) -> Compared:
    """Each method behind the head in service, which is kept, and with a head of its own, retrained.

    Args:
        experiment: whose head is in service, see `in_service`.
        task: classification or segmentation.
        pack: `train` is trained on, `test` predicted.
        complete: the pre-trained encoder on complete images.
        views: of `method_views`.
        training: of all heads, see `training_of`.
        folder: of the run, for checkpoints.
        replace: see `in_service`.
        compute: device and precision.
    """
    compute = compute or Compute.of()
    service, history = in_service(experiment, task, complete, pack, training, replace=replace, compute=compute)
    parts: list[pd.DataFrame] = []
    curves: list[pd.DataFrame] = []
    firsts: dict[str, View] = {}
    heads = {("complete", "pre-trained"): service}

    def add(table: pd.DataFrame, protocol: str, method: str, seed: int, to: list[pd.DataFrame]) -> None:
        seeds = pd.array([pd.NA if seed < 0 else seed] * len(table), "Int64")
        to.append(table.assign(protocol=protocol, method=method, encoder_seed=seeds))

    add(predict(complete, service, pack, compute=compute), "complete", "pre-trained", -1, parts)
    add(history, "complete", "pre-trained", -1, curves)
    if training.get("weights") and set(DFC2020_CLASSES) <= set(pack.classes):  # a reference that nothing here trained
        published, first = load_dfc2020_model(training["weights"]), next(iter(views.values()), None)
        for protocol, view in {"complete": complete, **({"kept": first} if first else {})}.items():
            found = predict_published(published, pack, view.spec, view.fill, compute=compute)
            add(found, protocol, "published", -1, parts)
    for (method, seed), view in views.items():
        add(predict(view, service, pack, compute=compute), "kept", method, seed, parts)
        kept = folder / "checkpoints" / f"{_KEPT[task]}_{method}{'' if seed < 0 else f'-seed{seed}'}.pt"
        label = f"{task}, {method}, on incomplete images"
        own, history = _train(task, view, pack, training, compute, checkpoint=kept, label=label)
        add(predict(view, own, pack, compute=compute), "retrained", method, seed, parts)
        add(history, "retrained", method, seed, curves)
        firsts.setdefault(method, view)
        heads.setdefault(("kept", method), service)
        heads.setdefault(("retrained", method), own)
    return Compared(pd.concat(parts, ignore_index=True), pd.concat(curves, ignore_index=True), firsts, heads)
