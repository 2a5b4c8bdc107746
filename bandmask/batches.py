"""A pack as device batches: reflectance, resized, flipped and blurred on whole batches; no per-image Python.

Source of the augmentations: SatCLIP (random flips, Gaussian blur with kernel 3 and sigma 0.1 to 2), thesis §3.1.1.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from kornia.filters import filter2d_separable, get_gaussian_kernel1d
from torch import Tensor

from bandmask import bands
from bandmask.bands import DN_PER_REFLECTANCE
from bandmask.packs import Pack

_Raw = list[Tensor]  # DN as int16 bits and, if asked for, targets as stored
DEVICE_SHARE = 0.5  # of the accelerator's free memory that a resident pack may take
LOADED_AT_ONCE = 256  # images that pass through memory on their way to a resident pack


@dataclass(frozen=True)
class Batch:
    """Images as reflectance (B, 13, S, S) float32, labels (B,) int64, and each image's row in its pack (B,) int64.

    Bands that the data set lacks are NaN. `targets`, if asked for: class of each pixel of the pack's own grid,
    (B, H, W) int64, `packs.IGNORE` = no label.
    """

    images: Tensor
    labels: Tensor
    samples: Tensor
    targets: Tensor | None = None


class Batches:
    """The images of a split, batch by batch, on a device.

    Order and augmentation of an epoch are functions of (seed, epoch) alone, so a resumed run sees what an
    undisturbed one sees. On CUDA the split lives on the device when it fits; else it streams from the disk through
    pinned memory, two batches ahead. Memory doesn't grow with the pack.
    """

    def __init__(
        self,
        pack: Pack,
        split: str | Sequence[int] | np.ndarray,
        *,
        batch_size: int = 64,
        image_size: int | None = None,
        augment: bool = False,
        flip: bool = True,
        targets: bool = False,
        shuffle: bool = False,
        drop_last: bool = False,
        seed: int = 0,
        device: torch.device | str = "cpu",
        shard: tuple[int, int] = (0, 1),
    ) -> None:
        """Choose the images, of a split or by row number, and how they come.

        Args:
            image_size: side in pixels after bilinear resizing; None keeps the pack's.
            augment: random flips, and a Gaussian blur.
            flip: False leaves the flips out, as the thesis does for segmentation (§3.1.1).
            targets: give the class of each pixel too; flipped with the image.
            shuffle: a new order each epoch; else the pack's.
            drop_last: leave out a last batch that is not full (a contrastive loss depends on the batch size).
            shard: (rank, ranks): each process gets its part of every batch, the same images as they come to one.

        A ValueError of an empty split, fewer images than one batch with `drop_last`, `targets` of a pack without, or
        batches that can't be shared evenly.
        """
        if targets and pack.targets is None:
            asked = "choose a data set for segmentation, such as sample or sen12ms"
            raise ValueError(f"the pack {pack.path} has a label an image, and none a pixel; {asked}")
        self.pack, self.device, self.seed, self.shard = pack, torch.device(device), seed, shard
        rows, last = pack.rows(split) if isinstance(split, str) else np.asarray(split), len(pack.images) - 1
        if rows.dtype.kind not in "iu" or not len(rows) or rows.min() < 0 or rows.max() > last:
            asked = f"one or more integers from 0 to {last}; of a boolean mask take np.flatnonzero"
            raise ValueError(f"rows are {asked}. Got {rows} ({rows.dtype})")
        self.rows = rows.astype(np.int64)
        self.batch_size, self.augment, self.shuffle, self.drop_last = batch_size, augment, shuffle, drop_last
        self.image_size, self.flip, self.targets = image_size or pack.images.shape[-1], flip, targets
        self._stored: dict[str, Any] = {"images": pack.images, **({"targets": pack.targets} if targets else {})}
        self._absent = bands.channel_indices(pack.absent)
        if drop_last and len(self.rows) < batch_size:
            raise ValueError(f"{len(self.rows)} images don't fill one batch of {batch_size}; lower batch_size")
        if shard != (0, 1) and not (0 <= shard[0] < shard[1] and drop_last and batch_size % shard[1] == 0):
            asked = "(rank, ranks): choose a batch size that is a multiple of ranks, and drop_last=True"
            raise ValueError(f"a batch of {batch_size} can't be shared evenly by shard={shard}, {asked}")
        self._labels = torch.from_numpy(pack.labels[self.rows]).to(self.device)
        self._samples = torch.from_numpy(self.rows).to(self.device)
        size = len(self.rows) * pack.images[:1].nbytes
        fits = self.device.type == "cuda" and size < DEVICE_SHARE * torch.cuda.mem_get_info(device)[0]
        self._resident = self._load() if fits else None

    def __len__(self) -> int:
        """Batches an epoch."""
        full, rest = divmod(len(self.rows), self.batch_size)
        return full + (rest > 0 and not self.drop_last)

    def epoch(self, epoch: int = 0) -> Iterator[Batch]:
        """The batches of one epoch, in its order, with its augmentation."""
        mixed = np.random.SeedSequence([part % 2**64 for part in (self.seed, epoch)]).generate_state(1, np.uint64)[0]
        generator, count = torch.Generator().manual_seed(int(mixed % 2**63)), len(self.rows)
        order = torch.randperm(count, generator=generator) if self.shuffle else torch.arange(count)
        rank, ranks = self.shard
        whole = order.split(self.batch_size)[: len(self)]
        parts = [batch.chunk(ranks)[rank] for batch in whole]
        draws = [torch.rand(3, len(batch), generator=generator).chunk(ranks, 1)[rank] for batch in whole]
        # sent to the device at once, before the first step: nothing in the loop then waits for the device
        sizes = [len(part) for part in parts]
        places, drawn = (send(torch.cat(all_, -1), self.device).split(sizes, -1) for all_ in (parts, draws))
        for where, draws, (raw, *stored) in zip(places, drawn, self._fetch(parts, places), strict=True):
            images = to_reflectance(raw, self.image_size)
            if self._absent:
                images[:, self._absent] = torch.nan
            targets = stored[0].long() if stored else None
            if self.augment:
                if self.flip:
                    images, targets = flip(images, draws[:2]), targets if targets is None else flip(targets, draws[:2])
                images = blur(images, draws[2])
            yield Batch(images, self._labels[where], self._samples[where], targets)

    def _fetch(self, parts: list[Tensor], places: Sequence[Tensor]) -> Iterator[_Raw]:
        """What is stored of each batch, on the device; `parts` are positions in the split, `places` the same there."""
        if self._resident is not None:
            for where in places:
                yield [stored[where] for stored in self._resident]
        elif self.device.type != "cuda":
            buffer = self._empty(len(parts[0])) if parts else []
            for part in parts:  # each is scaled, and so copied, before the next is read: memory anew costs as much
                yield self._read(part, buffer)
        else:
            with ThreadPoolExecutor(max_workers=1) as pool:
                reads = (pool.submit(self._read, part, self._empty(len(part), pin_memory=True)) for part in parts)
                ahead = list(islice(reads, 2))
                while ahead:
                    read = ahead.pop(0).result()
                    ahead += islice(reads, 1)
                    yield [stored.to(self.device, non_blocking=True) for stored in read]

    def _read(self, positions: Tensor, into: _Raw) -> _Raw:
        """What is stored of these positions of the split, in the first of `into`, which is on the CPU."""
        found = [buffer[: len(positions)] for buffer in into]
        for (name, array), out in zip(self._stored.items(), found, strict=True):
            self.pack.read(self.rows[positions.numpy()], out.numpy().view(array.dtype), name)
        return found

    def _empty(self, count: int, **options: Any) -> _Raw:
        # torch has few operations on uint16: the bits travel as int16 and are read as DN on the device
        pairs = zip(self._stored.values(), (torch.int16, torch.uint8), strict=False)
        return [torch.empty((count, *array.shape[1:]), dtype=kind, **options) for array, kind in pairs]

    def _load(self) -> _Raw:
        """The whole split on the device, part by part: the CPU's memory holds one of them at a time."""
        parts = torch.arange(len(self.rows)).split(LOADED_AT_ONCE)
        there = [[one.to(self.device) for one in self._read(part, self._empty(len(part)))] for part in parts]
        return [torch.cat(pieces) for pieces in zip(*there, strict=True)]


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on `device`; a copy from the CPU to a GPU is queued like any other work.

    A plain copy waits until all that was queued there is done, and leaves the GPU idle while the CPU queues the next.
    """
    if device.type != "cuda" or tensor.is_cuda:
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def to_reflectance(raw: Tensor, image_size: int) -> Tensor:
    """DN bits (B, C, H, W) int16 to reflectance (B, C, S, S) float32: DN / 10000, unclipped, bilinear to S."""
    images = raw.view(torch.uint16).to(torch.float32).div_(DN_PER_REFLECTANCE)
    if images.shape[-1] != image_size or images.shape[-2] != image_size:
        images = F.interpolate(images, size=(image_size, image_size), mode="bilinear", align_corners=False)
    return images


def flip(images: Tensor, draws: Tensor) -> Tensor:
    """Flip (B, …, H, W) left-right where `draws[0]` and top-bottom where `draws[1]` is below ½, (2, B)."""
    chosen = (send(draws, images.device) < 0.5).view(2, -1, *[1] * (images.ndim - 1))
    for flipped, axis in zip(chosen, (-1, -2), strict=True):
        images = torch.where(flipped, images.flip(axis), images)
    return images


def blur(images: Tensor, draws: Tensor) -> Tensor:
    """Gaussian blur (B, C, H, W), kernel 3, with sigma 0.1 to 2 as `draws` (B,) go from 0 to 1.

    As kornia's `gaussian_blur2d`, which looks at sigma first and makes the CPU wait for the GPU.
    """
    kernel = get_gaussian_kernel1d(3, 0.1 + 1.9 * send(draws, images.device)[:, None])
    return filter2d_separable(images, kernel, kernel, border_type="reflect")
