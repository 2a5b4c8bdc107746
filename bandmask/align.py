"""A copy of an encoder learns to embed incomplete images as the frozen original embeds complete ones.

And where no foundation model is at hand, the small encoder that the copy is made of.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bandmask import bands, datasets, encoders, fills, losses, packs, params, results, train
from bandmask.batches import Batch, Batches, augment
from bandmask.encoders import embed
from bandmask.losses import Objective
from bandmask.masks import AnyMask, Fill, MaskSpec, mask_batch
from bandmask.packs import Pack
from bandmask.provenance import checksum_of_code
from bandmask.train import Compute, adamw, fill_checksum, fit, weights_checksum

NOTEBOOK = "03_fine_tuning"
BATCH_NORMS = ("train", "frozen")
LR_SCHEDULES = ("constant", "cosine")


def fine_tune(
    teacher: nn.Module,
    pack: Pack,
    spec: MaskSpec | AnyMask,
    fill: Fill,
    *,
    objective: Objective | None = None,
    taps: Sequence[str] = ("layer1", "layer4"),
    batch_norm: str = "train",
    epochs: int = 15,
    batch_size: int = 64,
    image_size: int = 256,
    crop_size: int | None = None,
    lr: float = 1e-4,
    lr_schedule: str = "constant",
    weight_decay: float = 0.01,
    seed: int = 0,
    compute: Compute | None = None,
    checkpoint: Path | None = None,
    settings: Mapping[str, Any] | None = None,
) -> tuple[nn.Module, pd.DataFrame]:
    """A copy of the encoder that embeds incomplete images as the frozen original embeds complete ones.

    Teacher and student see the same flipped and blurred image, the student with pixels hidden. As given, this is the
    thesis' method (§3.3.1 and Figure 3.2); `objective` goes past it.

    Args:
        teacher: the pre-trained encoder; it is frozen and left unchanged.
        pack: images; `train` is trained on, `val` watched.
        spec: what is hidden, of all images or drawn for each; its seed decides the mask, `seed` the rest.
        fill: what stands in hidden pixels.
        objective: what the student is pulled to; default: the thesis' CLIP loss alone.
        taps: levels of feature maps that `objective.features` aligns; what a decoder takes.
        batch_norm: `train`: batch norms take the statistics of incomplete batches and follow them slowly; `frozen`:
            they keep the teacher's, so that the student starts as the teacher exactly, on few images above all.
        epochs: the thesis used 15 for one band, 25 for several.
        batch_size: also the number of candidates each image is told apart from, so losses depend on it; of all
            processes together.
        image_size: side after resizing.
        crop_size: side of the part that is seen of it, where a batch draws it; of validation images the middle. For
            transformers, whose cost grows with the square of the number of patches.
        lr: of AdamW.
        lr_schedule: `constant` (the thesis), or `cosine`: rises over a fifth of the epochs, because the first steps of
            AdamW are large and throw a well-trained encoder far off, and falls to 0.
        weight_decay: none on biases and norms.
        seed: of order and augmentation.
        compute: device and precision.
        checkpoint: see `train.fit`.
        settings: more that decides the result, to tell checkpoints apart (which encoder, which data).

    Returns:
        The student in eval mode, and the history with `val_loss`, `val_cosine` and `val_distance`; row 0 is the
        pre-trained encoder.

    Raises:
        ValueError: an unknown `batch_norm` or `lr_schedule`; the encoder has no such taps; what several processes
            can't share.
    """
    objective, compute = objective or Objective(), compute or Compute.of()
    for name, value, known in (("batch_norm", batch_norm, BATCH_NORMS), ("lr_schedule", lr_schedule, LR_SCHEDULES)):
        if value not in known:
            raise ValueError(f"unknown {name} {value!r}; available: {', '.join(known)}")
    levels = tuple(taps) if objective.features else ()
    teacher = compute.place(teacher).eval().requires_grad_(False)
    student = compute.place(copy.deepcopy(teacher)).requires_grad_(True)
    norms = [module for module in student.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    if compute.shard[1] > 1 and not (objective.clip or objective.distance):
        raise ValueError("with several processes every weight must have a gradient; align 'both', or use one process")
    if compute.shard[1] > 1 and compute.device.type == "cpu" and norms and batch_norm == "train":
        raise ValueError("on CPUs batch norms see no other process' images; take batch_norm 'frozen', or one process")
    common: dict[str, Any] = {"image_size": image_size, "device": compute.device, "seed": seed}
    common |= {"shuffle": True, "drop_last": True}
    training = Batches(pack, "train", augment=True, batch_size=batch_size, **common, shard=compute.shard)
    watched = min(batch_size, len(pack.rows("val")))
    shard = compute.shard if watched % compute.shard[1] == 0 else (0, 1)
    validation = Batches(pack, "val", batch_size=watched, **common, shard=shard)
    side = crop_size or image_size
    optimizer = adamw(student, lr=lr, weight_decay=weight_decay)
    teach, learn = compute.faster(_Tapped(teacher, levels)), compute.faster(_Tapped(student, levels))

    def batches(epoch: int) -> Iterator[Batch]:
        if lr_schedule == "cosine":
            for group in optimizer.param_groups:
                group["lr"] = lr * min(5 * (epoch + 1) / epochs, 1) * (1 + math.cos(math.pi * epoch / epochs)) / 2
        places = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        for batch in training.epoch(epoch):
            top, left = torch.randint(image_size - side + 1, (2,), generator=places).tolist()
            yield replace(batch, images=batch.images[..., top : top + side, left : left + side])

    def loss(batch: Batch, epoch: int) -> Tensor:
        incomplete = mask_batch(batch.images, batch.samples, spec, fill, epoch=epoch, epochs=epochs)
        for norm in norms if batch_norm == "frozen" else ():
            norm.eval()
        with compute.autocast():
            with torch.no_grad():
                target, target_maps = teach(compute.images(batch.images))
            embedded, maps = learn(compute.images(incomplete))
            return objective(compute.gather(embedded), compute.gather(target), maps, target_maps)

    key: dict[str, Any] = {"mask": asdict(spec), "fill": fill_checksum(fill), "objective": asdict(objective)}
    key |= {"taps": list(levels), "weights": weights_checksum(teacher), "code": checksum_of_code(__name__)}
    key |= {"batch_norm": batch_norm, "batch_size": batch_size, "image_size": image_size, "lr": lr}
    key |= {
        "crop_size": crop_size,
        "lr_schedule": lr_schedule,
        "weight_decay": weight_decay,
        "seed": seed,
        "data": pack.fingerprint,
    }
    key |= settings or {}

    def watch() -> dict[str, float]:
        return alignment_scores(student, teacher, validation, spec, fill, compute, crop_size)

    lost = f"{spec.fewest} to {spec.most} lost bands" if isinstance(spec, AnyMask) else " ".join(spec.bands)
    label = f"fine-tuning on {lost or 'complete images'}, seed {seed}"
    keep: dict[str, Any] = {"key": key, "watch": watch, "path": checkpoint, "compute": compute, "label": label}
    history = fit(student, optimizer, batches, loss, epochs=epochs, **keep)
    return student, history


@torch.no_grad()
def alignment_scores(
    student: nn.Module,
    teacher: nn.Module,
    batches: Batches,
    spec: MaskSpec | AnyMask,
    fill: Fill,
    compute: Compute,
    crop_size: int | None = None,
) -> dict[str, float]:
    """CLIP loss, mean cosine similarity and `distance`, student on incomplete against teacher on complete images.

    The images and their hidden pixels are the same at every call. Only full batches count, so that the loss always
    has the same number of candidates. Of batches that are shared by processes, each gets the scores of all.
    """
    student.eval()
    found = []
    for batch in batches.epoch(0):
        images = middle(batch.images, crop_size)
        incomplete = mask_batch(images, batch.samples, spec, fill)
        with compute.autocast():
            ours = student(compute.images(incomplete)).float()
            target = teacher(compute.images(images)).float()
        if batches.shard[1] > 1:
            ours, target = compute.gather(ours), compute.gather(target)
        cosine = torch.cosine_similarity(ours, target).mean()
        found.append(torch.stack([losses.clip_loss(ours, target), cosine, losses.distance(ours, target)]))
    means = [float(torch.stack(values).mean()) for values in zip(*found, strict=True)]
    return dict(zip(("val_loss", "val_cosine", "val_distance"), means, strict=True))


def middle(images: Tensor, side: int | None) -> Tensor:
    """The middle of images (B, C, S, S), `side` pixels of it; all of it if that is None."""
    start = (images.shape[-1] - (side or images.shape[-1])) // 2
    return images[..., start : start + side, start : start + side] if side else images


class _Tapped(nn.Module):
    """An encoder with its feature maps: embeddings (B, D), and the map of each tap."""

    def __init__(self, model: nn.Module, taps: Sequence[str]) -> None:
        super().__init__()
        self.model, self.taps = model, tuple(taps)

    def forward(self, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return embed(self.model, images, self.taps)


@dataclass(frozen=True)
class Tuning:
    """What the parameters of notebook 03 come down to."""

    parameters: Mapping[str, Any]
    folder: Path  # `outputs/<experiment>/<mask>`
    pack: Pack
    teacher: nn.Module  # the pre-trained encoder
    card: encoders.Card  # of the teacher
    hidden_bands: tuple[str, ...]  # ESA names
    value: str | float  # of hidden pixels, as `MaskSpec` takes it
    fill: Fill  # what is written over them: a reflectance a band, (13,), or a function fitted to `pack`
    epochs: int  # of one band or of several
    compute: Compute

    @classmethod
    def of(cls, parameters: Mapping[str, Any]) -> Tuning:
        """Open what the parameters name; the pack is made first if needed.

        Args:
            parameters: any of notebook 03's; others are ignored, missing ones have the notebook's defaults.

        Raises:
            ValueError: a value that is not among the valid ones.
            FileNotFoundError: data or encoder are not on this machine.
        """
        given = params.complete(NOTEBOOK, parameters)
        if not given["seeds"] or len(set(given["seeds"])) < len(given["seeds"]):
            raise ValueError(f"seeds names one encoder each, no seed twice; got {given['seeds']}")
        pack = datasets.open_dataset(given["dataset"])
        source = params.encoder_source(given["experiment"], given["encoder"])
        teacher, card = encoders.load_encoder(source, weights=given["weights"] or None)
        folder = params.run_folder(given["experiment"], given["mask"], given["mask_scheme"])
        hidden = bands.resolve_mask(given["mask"], given["mask_scheme"], pack.card["stored_order"])
        value = given["mask_value"]
        epochs = given["epochs_one_band" if len(hidden) <= 1 else "epochs_several_bands"]
        fill, compute = fills.make_fill(value, pack, hidden), Compute.of(given["device"])
        return cls(given, folder, pack, teacher, card, hidden, value, fill, epochs, compute)

    def spec(self, seed: int, *, scheduled: bool = True) -> MaskSpec:
        """What training hides under a seed; not `scheduled`: what hides at the end of the schedule, as tests do."""
        given = self.parameters
        final = MaskSpec(self.hidden_bands, given["mask_ratio"], self.value, seed=seed, shape=given["mask_shape"])
        if not scheduled:
            return final
        schedule, start, stairs = (given[f"mask_{name}"] for name in ("schedule", "start_ratio", "stairs"))
        return replace(final, schedule=schedule, start_ratio=start, stairs=stairs)

    def fine_tune(self) -> tuple[dict[int, nn.Module], pd.DataFrame]:
        """A student a seed, and their histories with `encoder_seed`; from their checkpoints as far as those go."""
        given, compute, students, histories = self.parameters, self.compute, {}, []
        options = {name: given[name] for name in ("batch_size", "image_size", "lr", "batch_norm", "weight_decay")}
        options |= {"epochs": self.epochs, "objective": Objective.of(given["align"], distance=given["align_distance"])}
        options["settings"] = {"teacher": self.card.name, "teacher_data": self.card.data, "weights": given["weights"]}
        for seed in given["seeds"]:
            options |= {"seed": seed, "checkpoint": self.folder / "checkpoints" / f"fine_tuning-seed{seed}.pt"}
            what = (self.spec(seed), self.fill)
            if given["processes"] != 1:  # they leave the checkpoint that is read below
                train.in_processes(
                    _part, given["processes"], compute, self.teacher.cpu(), self.pack.path, *what, options
                )
            students[seed], history = fine_tune(self.teacher, self.pack, *what, compute=compute, **options)
            histories.append(history.assign(encoder_seed=seed))
        return students, pd.concat(histories, ignore_index=True)

    def save(self, students: Mapping[int, nn.Module], history: pd.DataFrame) -> pd.DataFrame:
        """Write `alignment.parquet`, with the loss on test images, and `encoder-seed<n>/`; gives the table."""
        given, name = self.parameters, self.card.name
        rows = history.melt(["epoch", "encoder_seed"], ["train_loss", "val_loss", "val_cosine"], "metric", "value")
        records: list[Any] = rows.assign(split="val").to_dict("records")
        options = {"batch_size": given["batch_size"], "image_size": given["image_size"], "device": self.compute.device}
        tested = Batches(self.pack, "test", **options, shuffle=True, drop_last=True)
        for seed, student in students.items():
            spec = self.spec(seed, scheduled=False)
            value = alignment_scores(student, self.teacher, tested, spec, self.fill, self.compute)["val_loss"]
            row = {"epoch": self.epochs, "encoder_seed": seed, "metric": "test_loss", "value": value, "split": "test"}
            records.append(row)
        common = {column: given[column] for column in ("experiment", "dataset", "mask_value")}
        common |= {column: given[f"mask_{column}"] for column in ("scheme", "ratio", "schedule", "shape")}
        common |= {"mask": given["mask"].replace("_", " "), "bands": " ".join(self.hidden_bands), "encoder": name}
        table = results.tidy(records, **common, task="alignment", method="fine-tuned")
        results.write_table(table, self.folder / "alignment.parquet")
        for seed, student in students.items():
            card = replace(
                self.card,
                name=f"{name}, fine-tuned on {given['mask']} ({given['mask_scheme']}), seed {seed}",
                image_size=given["image_size"],
                parent=name,
                mask=vars(self.spec(seed)),
                seed=seed,
                data={"name": given["dataset"], "checksum": self.pack.checksum, "split": "train"},
            )
            encoders.save_encoder(student, card, self.folder / f"encoder-seed{seed}")
        return table


def _part(
    compute: Compute, teacher: nn.Module, pack: Path, spec: MaskSpec, fill: Fill, options: Mapping[str, Any]
) -> None:
    """What each of several processes does; a pack is opened anew, since pickling would copy its images."""
    fine_tune(teacher, packs.open_pack(pack), spec, fill, compute=compute, **options)


def pretrain_small(
    model: nn.Module,
    pack: Pack,
    *,
    epochs: int,
    batch_size: int = 64,
    image_size: int = 64,
    crop_size: int = 64,
    lr: float = 1e-3,
    weight_decay: float = 0.01,
    temperature: float = 0.1,
    seed: int = 0,
    compute: Compute | None = None,
    checkpoint: Path | None = None,
) -> pd.DataFrame:
    """Train an encoder on complete training images without labels: two views of an image, one embedding (SimCLR).

    Views differ by crop, flips, blur and brightness; no band is ever hidden, so the encoder knows nothing of loss.
    It serves where no foundation model can be had. Source: Chen et al. 2020, arXiv:2002.05709.

    Args:
        model: trained in place.
        pack: only its `train` split is seen.
        epochs: over the split.
        batch_size: images, two views each.
        image_size: side the images come in.
        crop_size: side of the views.
        lr: peak of a cosine schedule with a tenth of the run as warm-up.
        weight_decay: of AdamW.
        temperature: of the contrastive loss.
        seed: of order and views.
        compute: device and precision.
        checkpoint: see `train.fit`.

    Returns:
        The history: `train_loss` is the contrastive loss.
    """
    from kornia.augmentation import RandomResizedCrop

    compute = compute or Compute.of()
    compute.place(model)
    learn = compute.faster(model)
    options: dict[str, Any] = {"shuffle": True, "drop_last": True, "seed": seed, "device": compute.device}
    size = min(batch_size, len(pack.rows("train")))
    training = Batches(pack, "train", batch_size=size, image_size=image_size, **options)
    crop = RandomResizedCrop((crop_size, crop_size), scale=(0.3, 1.0), ratio=(0.8, 1.25))
    optimizer = adamw(model, lr=lr, weight_decay=weight_decay)

    def two_views(epoch: int) -> Iterator[Batch]:
        done = (epoch + 0.5) / epochs
        for group in optimizer.param_groups:
            group["lr"] = lr * (min(done / 0.1, 1.0) * 0.5 * (1 + math.cos(math.pi * done)))
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        for batch in training.epoch(epoch):
            images = torch.cat([_view(batch.images, crop, generator), _view(batch.images, crop, generator)])
            yield Batch(images, batch.labels, batch.samples)

    def loss(batch: Batch, _: int) -> Tensor:
        with compute.autocast():
            first, second = learn(compute.images(batch.images)).chunk(2)
        return losses.clip_loss(first, second, 1 / temperature)

    key: dict[str, Any] = {"task": "pretrain_small", "batch_size": batch_size, "image_size": image_size}
    key |= {"crop_size": crop_size, "code": checksum_of_code(__name__), "weights": weights_checksum(model)}
    key |= {"lr": lr, "weight_decay": weight_decay, "temperature": temperature, "seed": seed, "data": pack.fingerprint}
    label = "pre-training the small encoder"
    return fit(model, optimizer, two_views, loss, epochs=epochs, key=key, path=checkpoint, compute=compute, label=label)


def distil(
    model: nn.Module,
    teacher: nn.Module,
    pack: Pack,
    *,
    epochs: int,
    batch_size: int = 32,
    image_size: int = 64,
    lr: float = 2e-3,
    weight_decay: float = 0.05,
    seed: int = 0,
    compute: Compute | None = None,
    checkpoint: Path | None = None,
) -> pd.DataFrame:
    """Train a small encoder, in place, to embed complete training images as a large one does; weights fit 16 bits.

    Its embedding is the teacher's, each component with mean 0 and SD 1 over the training images. Images are flipped and
    turned, to which the teacher is taken to be blind: it sees each once. The first layer starts divided by the SD of
    each band, so that dark bands count. No label is seen. Source: Hinton et al. 2015, arXiv:1503.02531.

    Arguments and errors are those of `pretrain_small`; the history has `train_loss` (Huber) and `val_loss`.
    """
    compute = compute or Compute.of()
    options: dict[str, Any] = {"batch_size": batch_size, "image_size": image_size, "device": compute.device}
    training = Batches(pack, "train", **options, seed=seed, shuffle=True, drop_last=True)
    validation = Batches(pack, "val", **options)
    compute.place(teacher).eval()
    with torch.no_grad():
        parts = {split: Batches(pack, split, **options).epoch() for split in ("train", "val")}
        targets = {split: torch.cat([teacher(b.images).float() for b in part]) for split, part in parts.items()}
    wanted = targets["train"].new_empty(len(pack.images), targets["train"].shape[1])  # by row of the pack
    for name, values in targets.items():
        wanted[pack.rows(name)] = (values - targets["train"].mean(0)) / targets["train"].std(0)
    first = next(layer for layer in model.modules() if isinstance(layer, nn.Conv2d))
    spread = pack.images[pack.rows("train")].std((0, 2, 3)) / packs.DN_PER_REFLECTANCE
    first.weight.data /= torch.tensor(spread).to(first.weight)[:, None, None]
    compute.place(model)
    optimizer = adamw(model, lr=lr, weight_decay=weight_decay)

    def batches(epoch: int) -> Iterator[Batch]:
        draw = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        for number, batch in enumerate(training.epoch(epoch)):
            done = (epoch + number / len(training)) / epochs
            for group in optimizer.param_groups:
                group["lr"] = lr * min(1, done * epochs / 3 + 0.02) * (1 + math.cos(math.pi * done)) / 2
            turns, flip = torch.randint(4, (1,), generator=draw), torch.rand(1, generator=draw) < 0.5
            images = batch.images.rot90(int(turns), (2, 3))
            yield replace(batch, images=images.flip(3) if flip else images)

    def loss(batch: Batch, _: int) -> Tensor:
        return F.smooth_l1_loss(model(compute.images(batch.images)).float(), wanted[batch.samples])

    @torch.no_grad()
    def watch() -> dict[str, float]:
        model.eval()
        parts = [F.smooth_l1_loss(model(b.images), wanted[b.samples]) * len(b.images) for b in validation.epoch()]
        return {"val_loss": float(sum(parts)) / len(validation.rows)}

    key: dict[str, Any] = {"task": "distil", "batch_size": batch_size, "image_size": image_size, "lr": lr, "seed": seed}
    key |= {"code": checksum_of_code(__name__), "weights": weights_checksum(model), "weight_decay": weight_decay}
    key |= {"teacher": weights_checksum(teacher), "data": pack.fingerprint}
    keep: dict[str, Any] = {"key": key, "watch": watch, "path": checkpoint, "compute": compute, "label": "distilling"}
    history = fit(model, optimizer, batches, loss, epochs=epochs, **keep)
    for value in model.state_dict().values():
        if value.is_floating_point():
            value.copy_(value.half())
    return history


def _view(images: Tensor, crop: Callable[[Tensor], Tensor], generator: torch.Generator) -> Tensor:
    brightness = 0.8 + 0.4 * torch.rand(len(images), 1, 1, 1, generator=generator).to(images.device)
    return augment(crop(images), generator) * brightness
