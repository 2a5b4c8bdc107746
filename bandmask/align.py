"""A copy of an encoder learns to embed incomplete images as the frozen original embeds complete ones.

It minimises the thesis' symmetric CLIP loss (§2.1.2, Figures 2.1 to 2.3, §3.3.1; the scale is SatCLIP's, kept fixed),
and beyond it distances of embeddings and feature maps. And where no foundation model is at hand, the small encoder
that the copy is made of.
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

from bandmask import packs
from bandmask.batches import Batch, Batches, blur, flip
from bandmask.encoders import check_gaps, default_taps, embed, needs
from bandmask.masks import AnyMask, Fill, MaskSpec, mask_batch
from bandmask.packs import Pack
from bandmask.provenance import checksum_of_code
from bandmask.train import Compute, adamw, fill_checksum, fit, seed_of

LOGIT_SCALE = math.exp(2.8952996730804443)  # learnt by SatCLIP ResNet50 L40: 18.089, the thesis' temperature τ
ALIGN = ("embedding", "features", "both")


def clip_loss(incomplete: Tensor, complete: Tensor, logit_scale: float = LOGIT_SCALE) -> Tensor:
    """Cross-entropy of matching each incomplete image with its own complete one, and the other way round.

    Student embeddings (N, D) of masked images and teacher embeddings (N, D) of the same images, of any length, give the
    mean over both directions, a scalar in float32 whatever the autocast dtype. N equal similarities give log N, so
    compare losses at one batch size only. A ValueError where shapes differ, or of fewer than two images.
    """
    if incomplete.shape != complete.shape or incomplete.ndim != 2 or len(incomplete) < 2:
        shapes = f"{tuple(incomplete.shape)} and {tuple(complete.shape)}"
        raise ValueError(f"clip_loss needs two (N, D) batches of the same images, N ≥ 2; got {shapes}")
    with torch.autocast(incomplete.device.type, enabled=False):  # autocast would take the product in bfloat16
        student = F.normalize(incomplete.float(), dim=1)
        teacher = F.normalize(complete.float(), dim=1)
        logits = logit_scale * student @ teacher.T  # (N, N)
        target = torch.arange(len(logits), device=logits.device)
        return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def distance(incomplete: Tensor, complete: Tensor) -> Tensor:
    """Squared distance to the target as a share of the target's own squared length, mean over images.

    Of embeddings (N, D) or feature maps (N, C, H, W) of student and teacher. What a cosine leaves free, an embedding's
    length, counts here. Each image and each feature level weighs alike, whatever its scale: 0 is equal, 1 is what an
    output of zero has. A scalar in float32 whatever the autocast dtype; a ValueError where shapes differ.
    """
    if incomplete.shape != complete.shape:
        raise ValueError(f"distance needs one shape; got {tuple(incomplete.shape)} and {tuple(complete.shape)}")
    with torch.autocast(incomplete.device.type, enabled=False):
        target = complete.float().flatten(1)
        error = (incomplete.float().flatten(1) - target).square().sum(1)
        return (error / target.square().sum(1).clamp(min=1e-12)).mean()


@dataclass(frozen=True)
class Objective:
    """What the student is pulled to: a weighted sum of terms that are about 1 at the start or less."""

    clip: float = 1.0  # of `clip_loss` between embeddings; the thesis has this term alone
    distance: float = 0.0  # of `distance` between embeddings, which keeps their length
    features: float = 0.0  # of `distance` between feature maps, mean over levels

    def __post_init__(self) -> None:
        """Check every field."""
        weights = (self.clip, self.distance, self.features)
        if not all(math.isfinite(weight) and weight >= 0 for weight in weights) or not any(weights):
            raise ValueError(f"weights of an objective are 0 or more and not all 0; got {weights}")

    @classmethod
    def of(cls, align: str = "embedding", *, distance: float = 0.0) -> Objective:
        """From a parameter: `embedding` (the thesis), `features`, or `both`; a ValueError for another word."""
        if align not in ALIGN:
            raise ValueError(f"unknown alignment {align!r}; available: {', '.join(ALIGN)}")
        return cls(float(align != "features"), distance, float(align != "embedding"))

    def __call__(
        self,
        incomplete: Tensor,
        complete: Tensor,
        maps: Mapping[str, Tensor] | None = None,
        targets: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """The loss of a step: of embeddings (N, D), and of feature maps (N, C, H, W) by level where `features` counts.

        `incomplete` and `maps` are the student's, `complete` and `targets` the teacher's of the same images.
        """
        total = torch.zeros((), device=incomplete.device)
        if self.clip:
            total = total + self.clip * clip_loss(incomplete, complete)
        if self.distance:
            total = total + self.distance * distance(incomplete, complete)
        if self.features:
            if not maps or not targets:
                raise ValueError("aligning features needs feature maps of student and teacher; this encoder gave none")
            levels = [distance(maps[name], targets[name]) for name in targets]
            total = total + self.features * torch.stack(levels).mean()
        return total


def fine_tune(
    teacher: nn.Module,
    pack: Pack,
    spec: MaskSpec | AnyMask,
    fill: Fill,
    *,
    objective: Objective | None = None,
    gentle: bool = False,
    epochs: int = 15,
    batch_size: int = 64,
    image_size: int = 256,
    crop_size: int | None = None,
    lr: float = 1e-4,
    seed: int = 0,
    compute: Compute | None = None,
    checkpoint: Path | None = None,
) -> tuple[nn.Module, pd.DataFrame]:
    """A copy of the encoder that embeds incomplete images as the frozen original embeds complete ones.

    Teacher and student see the same flipped and blurred image, the student with pixels hidden. As given, this is the
    thesis' method (§3.3.1 and Figure 3.2); `objective` and `gentle` go past it.

    Args:
        teacher: the pre-trained encoder; it is frozen and left unchanged.
        pack: images; `train` is trained on, `val` watched.
        spec: what is hidden, of all images or drawn for each; its seed decides the mask, `seed` order and augmentation.
        objective: what the student is pulled to; default: the thesis' CLIP loss alone.
        gentle: batch norms keep the teacher's statistics, so that the student starts as the teacher exactly, and the
            rate rises over a fifth of the epochs and falls to 0 by a cosine: the first steps of AdamW are large and
            throw a well-trained encoder far off. Else norms follow incomplete batches, and the rate is constant.
        epochs: the thesis used 15 for one band, 25 for several.
        batch_size: also the number of candidates each image is told apart from, so losses depend on it; of all
            processes together.
        crop_size: side of the part that is seen of an image, where a batch draws it; of validation images the middle.
            For transformers, whose cost grows with the square of the number of patches.
        checkpoint: see `train.fit`.

    Returns:
        The student in eval mode, and the history with `val_loss`, `val_cosine` and `val_distance`; row 0 is the
        pre-trained encoder. Errors are those of `train.fit`; a ValueError of what several processes can't share, of
        native masking of an encoder that doesn't take gaps, or of absent bands that it can't do without.
    """
    check_gaps(teacher, fill)
    pack.require_complete("this encoder", needs(teacher))
    objective, compute = objective or Objective(), compute or Compute.of()
    levels = tuple(dict.fromkeys(default_taps(teacher))) if objective.features else ()  # what a decoder takes
    teacher = compute.place(teacher).eval().requires_grad_(False)
    student = compute.place(copy.deepcopy(teacher)).requires_grad_(True)
    if compute.shard[1] > 1 and not (objective.clip or objective.distance):
        raise ValueError("with several processes every weight must have a gradient; align 'both', or use one process")
    common: dict[str, Any] = {"image_size": image_size, "device": compute.device, "seed": seed}
    common |= {"shuffle": True, "drop_last": True}
    training = Batches(pack, "train", augment=True, batch_size=batch_size, **common, shard=compute.shard)
    if (watched := min(batch_size, len(pack.rows("val")))) < 2:
        said = f"batches of {batch_size}, {len(pack.rows('val'))} images in val"
        raise ValueError(f"an image is told apart from others of its batch: {said}; each takes 2 or more")
    shard = compute.shard if watched % compute.shard[1] == 0 else (0, 1)
    validation = Batches(pack, "val", batch_size=watched, **common, shard=shard)
    side = crop_size or image_size
    optimizer = adamw(student, lr=lr, weight_decay=0.01)
    teach, learn = compute.faster(_Tapped(teacher, levels)), compute.faster(_Tapped(student, levels))
    # looked for now: several GPUs have exchanged them
    norms = [module for module in student.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    if compute.shard[1] > 1 and compute.device.type == "cpu" and norms and not gentle:
        raise ValueError("on CPUs batch norms see no other process' images; be gentle, or use one process")

    def batches(epoch: int) -> Iterator[Batch]:
        for group in optimizer.param_groups if gentle else ():
            group["lr"] = lr * min(5 * (epoch + 1) / epochs, 1) * (1 + math.cos(math.pi * epoch / epochs)) / 2
        places = torch.Generator().manual_seed(seed_of(seed, epoch))
        for batch in training.epoch(epoch):
            top, left = torch.randint(image_size - side + 1, (2,), generator=places).tolist()
            yield replace(batch, images=batch.images[..., top : top + side, left : left + side])

    def loss(batch: Batch, epoch: int) -> Tensor:
        incomplete = mask_batch(batch.images, batch.samples, spec, fill, epoch=epoch, epochs=epochs)
        for norm in norms if gentle else ():
            norm.eval()
        with compute.autocast():
            with torch.no_grad():
                target, target_maps = teach(compute.images(batch.images))
            embedded, maps = learn(compute.images(incomplete))
            return objective(compute.gather(embedded), compute.gather(target), maps, target_maps)

    def watch() -> dict[str, float]:
        return alignment_scores(student, teacher, validation, spec, fill, compute, crop_size)

    key: dict[str, Any] = {"mask": asdict(spec), "fill": fill_checksum(fill), "objective": asdict(objective)}
    key |= {"taps": levels, "gentle": gentle, "batch_size": batch_size, "image_size": image_size}
    key |= {"crop_size": crop_size, "lr": lr, "seed": seed, "data": pack.fingerprint}
    key |= {"code": checksum_of_code(__name__)}
    lost = f"{spec.fewest} to {spec.most} lost bands" if isinstance(spec, AnyMask) else " ".join(spec.bands)
    label = f"fine-tuning on {lost or 'complete images'}, seed {seed}"
    keep: dict[str, Any] = {"key": key, "watch": watch, "path": checkpoint, "compute": compute, "label": label}
    return student, fit(student, optimizer, batches, loss, epochs=epochs, **keep)


def part(
    compute: Compute, teacher: nn.Module, pack: Path, spec: MaskSpec, fill: Fill, options: Mapping[str, Any]
) -> None:
    """`fine_tune` as each of several processes does it, for `train.in_processes`; `pack` is a path, opened anew."""
    fine_tune(teacher, packs.open_pack(pack), spec, fill, compute=compute, **options)


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
        found.append(torch.stack([clip_loss(ours, target), cosine, distance(ours, target)]))
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


def pretrain_small(
    model: nn.Module,
    pack: Pack,
    *,
    epochs: int,
    image_size: int = 64,
    crop_size: int = 64,
    lr: float = 1e-3,
    seed: int = 0,
    compute: Compute | None = None,
    checkpoint: Path | None = None,
) -> pd.DataFrame:
    """Train an encoder on complete training images without labels: two views of an image, one embedding (SimCLR).

    Views differ by crop, flips, blur and brightness; no band is ever hidden, so the encoder knows nothing of loss.
    It serves where no foundation model can be had. Source: Chen et al. 2020, arXiv:2002.05709.

    The model is trained in place, on batches of 64 images of the `train` split, two views of `crop_size` pixels each;
    `lr` is the peak of a cosine schedule with a tenth of the run as warm-up. Gives the history of `train.fit`, of which
    `train_loss` is the contrastive loss.
    """
    from kornia.augmentation import RandomResizedCrop

    compute = compute or Compute.of()
    learn = compute.faster(compute.place(model))
    options: dict[str, Any] = {"shuffle": True, "drop_last": True, "seed": seed, "device": compute.device}
    size = min(64, len(pack.rows("train")))
    training = Batches(pack, "train", batch_size=size, image_size=image_size, **options)
    crop = RandomResizedCrop((crop_size, crop_size), scale=(0.3, 1.0), ratio=(0.8, 1.25))
    optimizer = adamw(model, lr=lr, weight_decay=0.01)

    def two_views(epoch: int) -> Iterator[Batch]:
        done = (epoch + 0.5) / epochs
        for group in optimizer.param_groups:
            group["lr"] = lr * (min(done / 0.1, 1.0) * 0.5 * (1 + math.cos(math.pi * done)))
        generator = torch.Generator().manual_seed(seed_of(seed, epoch))
        for batch in training.epoch(epoch):
            images = torch.cat([_view(batch.images, crop, generator), _view(batch.images, crop, generator)])
            yield Batch(images, batch.labels, batch.samples)

    def loss(batch: Batch, _: int) -> Tensor:
        with compute.autocast():
            first, second = learn(compute.images(batch.images)).chunk(2)
        return clip_loss(first, second, 10.0)

    key: dict[str, Any] = {"batch_size": size, "image_size": image_size, "crop_size": crop_size, "lr": lr, "seed": seed}
    key |= {"code": checksum_of_code(__name__), "data": pack.fingerprint}
    label = "pre-training the small encoder"
    return fit(model, optimizer, two_views, loss, epochs=epochs, key=key, path=checkpoint, compute=compute, label=label)


def _view(images: Tensor, crop: Callable[[Tensor], Tensor], generator: torch.Generator) -> Tensor:
    brightness = 0.8 + 0.4 * torch.rand(len(images), 1, 1, 1, generator=generator).to(images.device)
    draws = torch.rand(3, len(images), generator=generator)
    return blur(flip(crop(images), draws[:2]), draws[2]) * brightness
