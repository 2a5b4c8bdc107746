"""Losses drawn anew for every image: how many bands, then which, then how much of them and in what shape.

One encoder that is to see through every loss must meet them all in training, complete images among them. Every draw
is a function of (seed, epoch, sample) alone, as in `masking`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bandmask import bands as band_table
from bandmask import shapes
from bandmask.masking import VALIDATION_EPOCH

# Shape and share of what the chosen bands lose. A fill that is told by a band's own pixels gives back what has holes,
# so an encoder behind it has most to learn from bands that are gone.
WHOLE = (("band", 1.0),)
# For what is to meet every loss. A band that is gone altogether is the hardest loss and the commonest
# in practice, so it is drawn half of the time; the others keep the encoder from taking every loss for that one.
KINDS = (
    ("band", 1.0),
    ("pixel", 0.9),
    ("band", 1.0),
    ("pixel", 0.5),
    ("band", 1.0),
    ("stripe", 0.9),
    ("band", 1.0),
    ("block", 0.75),
    ("band", 1.0),
    ("cloud", 0.5),
)


@dataclass(frozen=True)
class AnyMask:
    """A random mask for each image; it stands where a `MaskSpec` does.

    Attributes:
        fewest: smallest number of bands that an image loses; 0 leaves some images complete.
        most: largest number; each number from `fewest` to it is equally likely, then each set of that size.
        kinds: pairs of shape and ratio, equally likely; all bands of an image lose the same kind.
        seed: another seed, another draw.
    """

    fewest: int = 0
    most: int = 11
    kinds: tuple[tuple[str, float], ...] = KINDS
    seed: int = 0
    bands: tuple[str, ...] = band_table.NAMES  # each of them may be hidden

    def __post_init__(self) -> None:
        """Check every field."""
        count = len(band_table.NAMES)
        if not 0 <= self.fewest <= self.most < count:
            raise ValueError(
                f"an image loses from fewest to most of {count} bands and keeps one: 0 ≤ fewest ≤ most < {count}; got "
                f"{self.fewest} and {self.most}"
            )
        object.__setattr__(self, "kinds", tuple((str(shape), float(ratio)) for shape, ratio in self.kinds))
        if not self.kinds:
            raise ValueError("give at least one kind, a pair of shape and ratio such as ('pixel', 0.9)")
        for shape, ratio in self.kinds:
            if shape not in shapes.SHAPES or not 0 <= ratio <= 1:
                raise ValueError(
                    f"a kind is a shape of {', '.join(shapes.SHAPES)} and a ratio from 0 to 1; got {shape!r}, {ratio}"
                )

    @property
    def channels(self) -> list[int]:
        """All channels: what `hidden` speaks of."""
        return list(range(len(band_table.NAMES)))

    def hidden(
        self, samples: Tensor, size: tuple[int, int], *, epoch: int = VALIDATION_EPOCH, epochs: int = 1
    ) -> Tensor:
        """Boolean mask of all bands, True = hidden, (B, 13, H, W), on the device of `samples`.

        Args:
            samples: integer identity of each image in its pack, (B,).
            size: height and width of the images.
            epoch: 0-based; negative for validation and test.
            epochs: not used; schedules of a `MaskSpec` are.
        """
        lost, kind = self.lost(samples, epoch=epoch)
        hidden = torch.zeros(len(samples), lost.shape[1], *size, dtype=torch.bool, device=samples.device)
        for number, (shape, ratio) in enumerate(self.kinds):
            chosen = (kind == number).nonzero().squeeze(1)
            if len(chosen):
                drawn = shapes.draw(shape, self.seed, epoch, samples[chosen], self.channels, size, ratio)
                hidden[chosen] = drawn & lost[chosen, :, None, None]
        return hidden

    def lost(self, samples: Tensor, *, epoch: int = VALIDATION_EPOCH) -> tuple[Tensor, Tensor]:
        """Which bands each image loses pixels of, (B, 13) bool, and which of `kinds` it is, (B,) int64."""
        key = shapes.keys(self.seed, epoch, samples)
        number = self.fewest + shapes.integers(self.most - self.fewest + 1, shapes.mix(key, 1))
        kind = shapes.integers(len(self.kinds), shapes.mix(key, 2)).long()
        order = torch.stack([shapes.mix(key, 3 + channel) for channel in self.channels], dim=1)
        rank = order.argsort(dim=1).argsort(dim=1)  # each band's place in a random order of the bands
        return rank < number[:, None], kind
