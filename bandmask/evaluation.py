"""What an encoder is worth: scene heads and decoders on it, on complete and on incomplete images, method by method.

Two protocols, called by what happens to the head. *Kept*: it was trained once, on complete images with the pre-trained
encoder, and is in service when bands break; only what stands before it may change. *Retrained*: on incomplete images.
Source: thesis §3.2.2, §4.2.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from bandmask import files, params
from bandmask.batches import Batch, Batches
from bandmask.encoders import check_gaps, default_taps, embed, tap_strides
from bandmask.fills import make_fill
from bandmask.heads import (
    DeepLabV3PlusDecoder,
    SceneHeads,
    SegmentationDecoders,
    create_decoder,
    load_decoder,
    with_map,
)
from bandmask.masks import VALIDATION_EPOCH, Fill, Mask, MaskSpec, mask_batch
from bandmask.packs import IGNORE, Pack
from bandmask.provenance import checksum_of_code
from bandmask.stats import scores
from bandmask.train import Compute, fill_checksum, fit, seed_of, weights_checksum

Task = Literal["classification", "segmentation"]
Heads = SceneHeads | SegmentationDecoders  # of all seeds, side by side on one encoder pass
LR = 0.01  # of Adam, for heads and decoders
STRIDES = (4, 32)  # of what DeepLabV3+ takes: a ResNet's layer1 and layer4 (thesis §3.2.2)
WATCHED = {  # each epoch, on validation images
    "classification": ("overall_accuracy",),
    "segmentation": ("overall_accuracy", "miou_all", "miou_present"),
}
_PARAMETERS = {  # of notebooks 04 and 05, by what `train` calls them
    "classification": {"seeds": "head_seeds", "epochs": "head_epochs", "passes": "encoder_passes"},
    "segmentation": {n: f"decoder_{n}" for n in ("seeds", "epochs", "batch_size", "passes", "width", "weights")},
}
KEPT = {"classification": "head", "segmentation": "decoder"}  # how checkpoints are called
_NOTHING, _ZEROS = MaskSpec(), torch.zeros(13)


@dataclass(frozen=True)
class View:
    """How images reach a head or a decoder: an encoder, and what is hidden from it."""

    encoder: nn.Module
    spec: Mask = _NOTHING
    fill: Fill = _ZEROS
    image_size: int = 256
    batch_size: int = 64

    def __post_init__(self) -> None:
        """A ValueError of native masking before an encoder that doesn't take gaps."""
        if self.spec.bands:
            check_gaps(self.encoder, self.fill)


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

    @classmethod
    def joined(cls, parts: Sequence[Features]) -> Features:
        """A whole pass; maps of a ResNet50 take 5 MB an image of 256 px."""
        maps, truth, samples = zip(*parts, strict=True)
        return cls(tuple(map(torch.cat, zip(*maps, strict=True))), torch.cat(truth), torch.cat(samples))


def feature_batches(
    view: View, batches: Batches, compute: Compute, epoch: int = VALIDATION_EPOCH, epochs: int = 1
) -> Iterator[Features]:
    """One pass of the encoder over incomplete images: feature maps where `batches` have targets, else embeddings.

    `epoch` (of `epochs`) is that of order, augmentation and mask; of validation and test images there is one draw.
    Errors are those of `decoder_taps`; a ValueError of images without a label where it is one an image.
    """
    if len(without := batches.rows[(batches.pack.labels[batches.rows] < 0) & (not batches.targets)]):
        said = f"{len(without)} images of {batches.pack.path} have no label, first rows {without[:5]}"
        raise ValueError(f"{said}. Leave them out, or segment: there a pixel without a label doesn't count")
    compute.place(view.encoder).eval()
    for batch in batches.epoch(max(epoch, 0)):
        yield _seen(view, batch, compute, epoch=epoch, epochs=epochs)


@torch.no_grad()
def _seen(view: View, batch: Batch, compute: Compute, **drawn: int) -> Features:
    taps = () if batch.targets is None else decoder_taps(view.encoder)
    images = mask_batch(batch.images.to(compute.device), batch.samples, view.spec, view.fill, **drawn)
    with compute.autocast():
        embeddings, maps = embed(view.encoder, compute.images(images), taps)
    seen = tuple(maps[tap] for tap in taps) or (embeddings.float(),)
    return Features(seen, batch.labels if batch.targets is None else batch.targets, batch.samples)


def embed_batches(view: View, batches: Batches, compute: Compute) -> tuple[Tensor, Tensor]:
    """Embeddings (N, D) float32 and labels (N,) of one pass over validation or test images."""
    found = Features.joined([*feature_batches(view, batches, compute)])
    return found.maps[0], found.truth


def free_view(method: str, complete: View, spec: MaskSpec, pack: Pack, compute: Compute | None = None) -> View:
    """Incomplete images before an untouched encoder, behind a fill of `make_fill`; a ValueError of an unknown one.

    `ridge mapped`: their embeddings are carried to those of complete images, by `heads.with_map` fitted to `train`;
    `mapped` is `ridge_local mapped`.
    """
    fill = "ridge_local" if method == "mapped" else method.removesuffix(" mapped")
    view = replace(complete, spec=spec, fill=make_fill(fill, pack, spec.bands))
    if not method.endswith("mapped"):
        return view
    compute = compute or Compute.of()
    batches = Batches(pack, "train", image_size=view.image_size, device=compute.device)
    both = [embed_batches(each, batches, compute)[0] for each in (view, complete)]
    return replace(view, encoder=with_map(view.encoder, *both))


def decoder_taps(encoder: nn.Module) -> tuple[str, str]:
    """What DeepLabV3+ takes of an encoder: edges from the map at S/4, context from that at S/32.

    A ValueError if it has none, as a ViT, whose maps are all at S/16.
    """
    strides = tap_strides(encoder)
    taps = default_taps(encoder) if strides else ("", "")
    if tuple(strides.get(tap) for tap in taps) != STRIDES:
        there = ", ".join(f"{tap} (S/{stride})" for tap, stride in strides.items()) or "none"
        said = f"no tap at S/4 and S/32, as a ResNet's layer1 and layer4, in {type(encoder).__name__}"
        raise ValueError(f"{said}; available: {there}. Segmentation needs a ResNet or a ConvNeXt")
    return taps


def _fresh(
    view: View, pack: Pack, seeds: Sequence[int], dense: bool, width: int, weights: Path | str | None, compute: Compute
) -> Heads:
    """Heads or decoders that fit an encoder, one a seed, untrained; a ValueError where they can't stand on it."""
    if not isinstance(seeds, Sequence) or not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(f"each seed makes one head: give a list of one or more, each once; got {seeds!r}")
    sizes: dict[str, Any] = {"image_size": view.image_size, "device": compute.device, "targets": dense}
    one = next(feature_batches(view, Batches(pack, pack.rows("val")[:1], **sizes), compute))
    channels, classes = [found.shape[1] for found in one.maps], len(pack.classes)
    if not dense:
        if classes < 2:
            raise ValueError(f"all labels are {pack.classes[0]}; a head tells classes apart: give two or more")
        if len(unseen := np.setdiff1d(range(classes), pack.labels[pack.rows("train")])):
            names = ", ".join(pack.classes[label] for label in unseen)
            warnings.warn(f"no training image is of {names}: each test image of it will count as wrong", stacklevel=3)
        return SceneHeads(channels[0], classes, seeds)
    if not weights:
        made = [create_decoder(channels[1], channels[0], classes, width=width, seed=seed) for seed in seeds]
        return SegmentationDecoders(made, seeds)
    if channels != [256, 2048]:
        said = f"the published decoder takes 256 and 2048 channels (ResNet50), not {channels}"
        raise ValueError(f"{said}; leave decoder_weights empty, or take a ResNet50")
    loaded, messages = zip(*(load_decoder(weights, classes=classes, seed=seed) for seed in seeds), strict=True)
    print(messages[0])
    return SegmentationDecoders(loaded, seeds)


def train(
    task: Task,
    view: View,
    pack: Pack,
    *,
    seeds: Sequence[int] = (0, 1, 2),
    epochs: int = 20,
    batch_size: int | None = None,
    passes: int = 0,
    width: int = 256,
    weights: Path | str | None = None,
    seed: int = 0,
    compute: Compute | None = None,
    checkpoint: Path | None = None,
    label: str = "training heads",
) -> tuple[Heads, pd.DataFrame]:
    """Heads or decoders of all seeds, side by side on the same pass of the frozen encoder, each as if alone.

    Augmentation and hidden pixels of an epoch belong to the pass, which all share. A head has its own initial weights
    and order of the images, a decoder its own fresh weights and dropout; only blur augments decoders' images (§3.1.1).
    Trained by Adam on `train` (the thesis names it for its MLP, and no optimizer for decoders); `val` is watched.

    Args:
        task: heads on embeddings, or decoders on feature maps.
        seeds: one head each.
        batch_size: images a step; default: that of the view.
        passes: number of different encoder passes, kept in memory; epoch e uses pass e mod `passes`. 0 makes a new
            one every epoch, as the thesis does, and keeps no feature map; fewer are cheaper and show fewer draws.
        width: channels inside a decoder; the published one has 256.
        weights: the published DFC2020 checkpoint, else decoders start from scratch.
        seed: of augmentation and order.
        checkpoint: see `train.fit`.

    Returns:
        The heads in eval mode, and a row an epoch and head: `epoch`, `train_loss` (mean over heads), validation scores
        (`WATCHED`), `head_seed`. Errors are those of `train.fit`; a ValueError of a pack without targets, or of an
        encoder that decoders can't stand on.
    """
    compute, dense, images = compute or Compute.of(), task == "segmentation", len(pack.rows("train"))
    batch_size = view.batch_size if batch_size is None else batch_size
    heads = _fresh(view, pack, seeds, dense, width, weights, compute).to(compute.device)
    streamed, passes = dense and passes <= 0, min(passes, epochs) if passes > 0 else epochs
    batch_size, encoded = (min(batch_size, images), batch_size) if dense else (batch_size, view.batch_size)
    drawn: dict[str, Any] = {"image_size": view.image_size, "device": compute.device, "seed": seed, "targets": dense}
    order: dict[str, Any] = {"flip": not dense, "shuffle": dense, "drop_last": streamed, "augment": True}
    training = Batches(pack, "train", batch_size=min(encoded, images), **order, **drawn)
    val = Batches(pack, "val", batch_size=encoded, **drawn)
    kept: dict[int, Features] = {}  # by turn
    watched: list[Features] = []

    def one_pass(turn: int) -> Iterator[Features]:
        return feature_batches(view, training, compute, turn, passes)

    def whole_pass(turn: int) -> Features:
        if turn not in kept:
            if passes == epochs:  # each is used once
                kept.clear()
            kept[turn] = Features.joined([*one_pass(turn)])
        return kept[turn]

    def batches(epoch: int) -> Iterator[Features]:
        if streamed:
            yield from one_pass(epoch)
            return
        everything = whole_pass(epoch % passes)
        draws = [torch.Generator().manual_seed(seed_of(own, epoch, 100_003)) for own in ([seed] if dense else seeds)]
        orders = torch.stack([torch.randperm(images, generator=draw) for draw in draws], dim=1).to(compute.device)
        for rows in orders.split(batch_size):  # (B, 1), or (B, K): each head has its own order
            if not dense:
                yield everything.take(rows)
            elif len(rows) == batch_size:  # a last, small batch would upset batch norms
                yield everything.take(rows[:, 0])

    def loss(batch: Features, _: int) -> Tensor:
        if dense:
            return sum_of_losses(_logits(heads, batch, compute), batch.truth)
        logits = heads(batch.maps[0].transpose(0, 1).contiguous())  # (K, B, C) of (B, K, D)
        # mean over the batch and summed over heads: each gets the gradient that it would get alone
        return F.cross_entropy(logits.flatten(0, 1), batch.truth.T.flatten()) * len(logits)

    @torch.no_grad()
    def watch() -> dict[str, float]:
        parts = watched or [*feature_batches(view, val, compute)]
        watched[:] = [] if streamed else parts
        if dense:
            counts = torch.stack([_confusions(heads, part, pack, compute).sum(1) for part in parts]).sum(0)
            found = [scores(of_one) for of_one in counts.cpu()]
        else:
            right = torch.cat([_logits(heads, part, compute).argmax(-1) == part.truth for part in parts], dim=1)
            found = [{"overall_accuracy": share} for share in right.float().mean(1).tolist()]
        named = zip(seeds, found, strict=True)
        return {f"{metric}:{own}": score[metric] for own, score in named for metric in WATCHED[task]}

    key: dict[str, Any] = {"mask": asdict(view.spec), "fill": fill_checksum(view.fill), "seeds": list(seeds)}
    key |= {"encoder": weights_checksum(view.encoder), "data": pack.fingerprint}
    key |= {"passes": passes, "streamed": streamed, "seed": seed, "batch_size": batch_size, "encoded": encoded}
    key |= {"image_size": view.image_size, "code": checksum_of_code(__name__)}
    adam = torch.optim.Adam(heads.parameters(), lr=LR)
    keep: dict[str, Any] = {"key": key, "watch": watch, "path": checkpoint, "compute": compute, "label": label}
    wide, frames = fit(heads, adam, batches, loss, epochs=epochs, **keep), []
    for own in seeds:
        names = {f"{metric}:{own}": metric for metric in WATCHED[task]}
        frame = wide[["epoch", "train_loss", *names]].rename(columns=names)
        frames.append(frame.assign(train_loss=wide["train_loss"] / len(seeds), head_seed=own))
    return heads, pd.concat(frames, ignore_index=True)


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

    Columns are `head_seed`, `sample` (row in the pack), `group` (what intervals resample: the scene or block of an
    image, where the pack knows it), `label`, `predicted` (class indices) and, of decoders, `pixels`.
    """
    compute, dense = compute or Compute.of(), isinstance(heads, SegmentationDecoders)
    heads.to(compute.device).eval()
    options: dict[str, Any] = {"image_size": view.image_size, "device": compute.device, "targets": dense}
    frames = []
    for part in feature_batches(view, Batches(pack, split, batch_size=view.batch_size, **options), compute):
        counts = _confusions(heads, part, pack, compute)
        head, image, label, predicted = counts.nonzero().T.cpu().numpy()
        rows = part.samples.cpu().numpy()[image]
        groups = pack.index["group"].iloc[rows] if "group" in pack.index else pd.Series(rows)
        columns = {"head_seed": np.array(heads.seeds)[head], "sample": rows, "group": groups.astype(str).to_numpy()}
        columns |= {"label": label, "predicted": predicted, "pixels": counts[counts > 0].cpu().numpy()}
        frames.append(pd.DataFrame(columns))
    table = pd.concat(frames).sort_values("head_seed", kind="stable", ignore_index=True)
    return table if dense else table.drop(columns=["pixels", *([] if "group" in pack.index else ["group"])])


@torch.no_grad()
def segment(view: View, decoders: SegmentationDecoders, batch: Batch, *, compute: Compute | None = None) -> Tensor:
    """Class of every pixel of the batch's targets by every decoder, (K, B, H, W) uint8; the view masks the images."""
    compute = compute or Compute.of()
    compute.place(view.encoder).eval(), decoders.to(compute.device).eval()
    return _logits(decoders, _seen(view, batch, compute), compute).argmax(2).to(torch.uint8).cpu()


def _logits(heads: nn.Module, seen: Features, compute: Compute) -> Tensor:
    """(K, B, C) float32 of scene heads, (K, B, C, H, W) of decoders."""
    if isinstance(heads, SceneHeads):
        return heads(seen.maps[0])
    with compute.autocast():
        logits = heads(*seen.maps, tuple(seen.truth.shape[1:]))
    return logits.float()


def _confusions(heads: nn.Module, seen: Features, pack: Pack, compute: Compute) -> Tensor:
    """Counts (K, B, C, C) int64 of true and predicted classes, for each head and image."""
    predicted, classes = _logits(heads, seen, compute).argmax(2), len(pack.classes)
    count, images, *pixels = predicted.shape
    labelled = seen.truth != IGNORE
    cells = torch.where(labelled, seen.truth, 0) * classes + predicted
    cells += torch.arange(count * images, device=cells.device).view(count, images, *(1 for _ in pixels)) * classes**2
    counts = torch.bincount(cells[labelled.expand_as(cells)], minlength=count * images * classes**2)
    return counts.view(count, images, classes, classes)


def training_of(task: Task, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """How heads are trained, of the parameters of notebook 04 or 05."""
    return {name: parameters[parameter] for name, parameter in _PARAMETERS[task].items()}


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

    All notebooks and masks of an experiment share them. They lie in `outputs/<experiment>/in_service/<task>`. With
    `eurosat-mini`, which has test images alone, come heads of its own.

    Args:
        experiment: folder below `outputs/`.
        view: the pre-trained encoder, from which nothing is hidden.
        training: of `train`; what is not given is as found, or else as notebook 04 or 05 declares it.
        replace: train anew where they are damaged, or were made from something else, code included; only for who makes
            them (notebooks 04 and 05 with mask `none`), because what stands on the old ones is not made anew here.

    A ValueError where bands are hidden, of heads that were made from something else (and each difference), or damaged.
    """
    if view.spec.bands:
        raise ValueError(f"what is in service was trained on complete images; this view hides {view.spec.bands}")
    given: dict[str, Any] = json.loads(json.dumps(dict(training or {})))
    code = {"code": checksum_of_code(__name__)}
    of = {"encoder": weights_checksum(getattr(view.encoder, "pretrained", view.encoder)), "data": pack.fingerprint}
    asked = {**of, "image_size": view.image_size, **given, **(code if replace else {})}
    folder = params.experiment_folder(experiment) / "in_service" / task
    if shipped := pack.card["dataset"] == "eurosat-mini":
        folder, asked, replace = files.MINI / "heads", {"encoder": of["encoder"]}, False
    if folder.is_dir():
        try:
            heads, made = read_in_service(folder)
        except (FileNotFoundError, ValueError) as damaged:
            if not replace:
                raise
            print(f"trained anew: {damaged}")
            made = {}
        differ = [f"{k}: {made.get(k)!r} there, {now!r} now" for k, now in asked.items() if made.get(k) != now]
        if not differ:
            return heads, pd.DataFrame(made["history"]).astype({"train_loss": float})
        if shipped:
            raise ValueError("the head that comes with eurosat-mini stands on the encoder 'mini', and this is another")
        if not replace:
            anew = f"run notebooks/{params.TASK_FILES[task][0]} with mask none, or take another experiment"
            raise ValueError(f"the heads in {folder} were made from something else: {'; '.join(differ)}; {anew}")
    given = {**training_of(task, params.declared(params.TASK_FILES[task][0])), **given}
    checkpoint = folder.parents[1] / "checkpoints" / f"{KEPT[task]}_in_service.pt"
    about: dict[str, Any] = {"compute": compute, "checkpoint": checkpoint, "label": f"{task} on complete images"}
    heads, history = train(task, view, pack, **given, **about)
    made = {**of, "image_size": view.image_size, **code, **given, "history": history.to_dict("list")}
    with files.writing(folder) as partial:
        partial.mkdir(parents=True)
        state = {name: tensor.detach().cpu().contiguous() for name, tensor in heads.state_dict().items()}
        save_file(state, partial / "heads.safetensors")
        made["sha256"] = files.sha256(partial / "heads.safetensors")
        (partial / "settings.json").write_text(json.dumps(made, indent=1), encoding="utf-8")
    return heads, history


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
            heads = SceneHeads(state["weight1"].shape[1], state["bias2"].shape[2], seeds)
        else:
            layers = ("aspp.aspp1.atrous_conv", "decoder.conv1", "decoder.last_conv.8")
            (width, high), (_, low), (classes, _) = (state[f"decoders.0.{n}.weight"].shape[:2] for n in layers)
            heads = SegmentationDecoders([DeepLabV3PlusDecoder(high, low, classes, width) for _ in seeds], seeds)
        heads.load_state_dict(state)
    except (KeyError, OSError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged or was changed ({error}); delete {folder} and run its notebook") from error
    return heads.eval(), made
