"""What losing bands does to an encoder: how far an image's embedding moves, and whether the prediction flips."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bandmask import encoders, evaluate, params
from bandmask.heads import SceneHeads
from bandmask.masks import MaskSpec, mask_batch
from bandmask.training import weights_checksum


@dataclass(frozen=True)
class Reading:
    """What one encoder makes of an incomplete image.

    Attributes:
        encoder: its name.
        similarity: cosine of its embedding to that of the complete image by the pre-trained encoder, whose place it
            takes.
        predicted: class by the head in service; empty without one.
        probability: of that class, mean over heads.
        flipped: the class is another one than that of the complete image.
    """

    encoder: str
    similarity: float
    predicted: str = ""
    probability: float = float("nan")
    flipped: bool = False


@dataclass(frozen=True)
class Effect:
    """Encoders and heads that judge images.

    Attributes:
        pretrained: the encoder in service.
        fine_tuned: encoders by the bands they were fine-tuned for, as folders that `load_encoder` takes, or models.
        heads: trained on complete images with the pre-trained encoder; None predicts nothing.
        classes: names.
        image_size: side of the encoder's input.
    """

    pretrained: nn.Module
    fine_tuned: Mapping[tuple[str, ...], Path | nn.Module]
    heads: SceneHeads | None = None
    classes: Sequence[str] = ()
    image_size: int = 64

    @torch.inference_mode()
    def of(self, image: np.ndarray, spec: MaskSpec, sample: int, fill: Tensor) -> tuple[Reading, list[Reading]]:
        """The complete image, and the incomplete one by each encoder that fits its mask.

        Args:
            image: complete, in reflectance, (13, H, W).
            spec: what is hidden; drawn at the encoder's size, as in training.
            sample: the image's identity in its pack.
            fill: one value per band, (13,).
        """
        batch = torch.as_tensor(np.ascontiguousarray(image, np.float32))[None]
        if batch.shape[2:] != (self.image_size, self.image_size):
            batch = F.interpolate(batch, size=(self.image_size, self.image_size), mode="bilinear")
        incomplete = mask_batch(batch, torch.tensor([sample]), spec, fill)
        judges = {"pre-trained": self.pretrained}
        if (student := self._student(spec.bands)) is not None:
            judges["fine-tuned"] = student
        target = self.pretrained(batch)
        complete = self._read("complete", target, target, "")
        return complete, [
            self._read(name, model(incomplete), target, complete.predicted) for name, model in judges.items()
        ]

    def _student(self, names: tuple[str, ...]) -> nn.Module | None:
        found = self.fine_tuned.get(names)
        return _load(found) if isinstance(found, Path) else found

    def _read(self, name: str, embedding: Tensor, target: Tensor, expected: str) -> Reading:
        similarity = float(F.cosine_similarity(embedding, target)[0])
        if self.heads is None:
            return Reading(name, similarity)
        chances = self.heads(embedding).softmax(-1).mean(0)[0]  # (K, 1, C) -> (C,)
        predicted = self.classes[int(chances.argmax())]
        return Reading(name, similarity, predicted, float(chances.max()), bool(expected) and predicted != expected)


def find_effect(experiment: str, classes: Sequence[str], encoder: str = "stand-in", weights: str = "") -> Effect | None:
    """The encoders and heads that an experiment's runs have left, or None where it has no encoder yet.

    Args:
        experiment: folder below `outputs/`.
        classes: of its data set.
        encoder: as the notebooks' parameter. Published ones are loaded, and fetched if they must be.
        weights: local checkpoint of a published one.
    """
    folder = params.experiment_folder(experiment)
    source = params.encoder_source(experiment, encoder)
    if isinstance(source, Path) and not source.is_dir():
        return None
    pretrained, card = encoders.load_encoder(source, weights=weights or None)
    fine_tuned: dict[tuple[str, ...], Path | nn.Module] = {}
    size = card.image_size
    for path in sorted(folder.glob("*/encoder-seed*"), reverse=True):  # the lowest seed of a mask stays
        found = encoders.read_card(path)
        if found.mask:
            fine_tuned[tuple(found.mask["bands"])] = path
            size = found.image_size
    heads = heads_in_service(folder, pretrained)
    return Effect(pretrained, fine_tuned, heads, tuple(classes), size)


def heads_in_service(folder: Path, encoder: nn.Module) -> SceneHeads | None:
    """The heads in service of an experiment's folder, if they were trained with this very encoder.

    Raises:
        ValueError: a damaged file.
    """
    if not (path := folder / "in_service" / "classification").is_dir():
        return None
    heads, made = evaluate.read_in_service(path)
    assert isinstance(heads, SceneHeads)
    return heads if made["encoder"] == weights_checksum(encoder) else None


@lru_cache(maxsize=4)
def _load(path: Path) -> nn.Module:
    return encoders.load_encoder(path)[0]
