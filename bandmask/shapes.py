"""What a sensor loses together: single pixels, bands, lines, packets, or what lies under a cloud.

- `pixel`: each pixel on its own, as in the thesis.
- `band`: a band of an image, whole or not at all.
- `stripe`: dead detector lines. They are single columns, because Sentinel-2's detectors sweep along the track.
- `block`: lost packets, squares on a grid that begins elsewhere in every image and band.
- `cloud`: soft-edged blobs, the same pixels in all chosen bands. A pixel is hidden or not, as everywhere here; soft is
  the chance of it, which falls from 1 inside to 0 outside over the edge.

Every draw is an integer hash of (seed, epoch, sample, band, pixel) on the batch's own device, without a loop over
images, so no pixel depends on the batch it came in.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bandmask.devices import send

SHAPES = ("pixel", "band", "stripe", "block", "cloud")
BLOCKS_A_SIDE = 8  # a lost packet is a square, an eighth of the image's shorter side
CLOUDS_A_SIDE = 3  # a cloud is about a third of it


def draw(
    shape: str, seed: int, epoch: int, samples: Tensor, channels: Sequence[int], size: tuple[int, int], ratio: float
) -> Tensor:
    """Hidden pixels, (B, k, H, W) bool, on the device of `samples`.

    The share of hidden pixels is `ratio`: of clouds in every image, to half a pixel; else in expectation, to 2⁻³³,
    because each pixel, column, block or band is drawn on its own. A higher ratio hides the same pixels and more.

    Args:
        shape: one of `SHAPES`.
        seed: any integer.
        epoch: any integer.
        samples: integer identity of each image in its pack, (B,).
        channels: of the k bands.
        size: height and width of the images.
        ratio: 0 to 1.
    """
    result = (len(samples), len(channels), *size)
    threshold = round(ratio * 2**32) - 2**31
    if abs(threshold) >= 2**31 or 0 in result:  # none or all of the 2³² values: nothing to draw
        return torch.full(result, threshold > 0, dtype=torch.bool, device=samples.device)
    key = keys(seed, epoch, samples)  # (B,)
    if shape == "cloud":
        return _clouds(key, size, round(ratio * size[0] * size[1]))[:, None].expand(result).contiguous()
    key = mix64(key[:, None] ^ send(torch.tensor(channels), samples.device))[..., None]  # (B, k, 1)
    drawn = uniform(_units(shape, key, size), key) < threshold  # (B, k, units): all pixels of a unit share its draw
    if shape == "band":
        return drawn[..., None].expand(result).contiguous()
    if shape == "stripe":
        return drawn[:, :, None].expand(result).contiguous()
    return drawn.view(result)


def keys(seed: int, epoch: int, samples: Tensor) -> Tensor:
    """A well-mixed key for each image, (B,) int64, on the device of `samples`: what all draws come from."""
    key = mix64(torch.full((), signed64(seed), device=samples.device))
    key = mix64(key ^ signed64(epoch))
    return mix64(key ^ samples.long())


def mix(key: Tensor, purpose: int) -> Tensor:
    """Further keys of the same images, for a draw that has nothing to do with the others."""
    return mix64(key ^ mix64(torch.full((), purpose, device=key.device)))


def integers(limit: int, key: Tensor) -> Tensor:
    """An integer from 0 to `limit` − 1 of each key, int32, uniform to `limit` / 2¹⁶."""
    return (((key & 0xFFFF) * limit) >> 16).to(torch.int32)


def _units(shape: str, key: Tensor, size: tuple[int, int]) -> Tensor:
    """Number of the unit that each pixel (`pixel`, `block`), column (`stripe`) or image (`band`) belongs to."""
    height, width = size

    def count(end: int) -> Tensor:
        return torch.arange(end, dtype=torch.int32, device=key.device)

    if shape == "block":
        side = max(min(size) // BLOCKS_A_SIDE, 1)
        place = mix64(key)  # (B, k, 1): where the grid begins, drawn apart from what it hides
        rows = (count(height) + integers(side, place)) // side
        columns = (count(width) + integers(side, place >> 16)) // side
        return (rows[..., None] * (width // side + 2) + columns[..., None, :]).flatten(-2)  # (B, k, HW)
    return count({"pixel": height * width, "stripe": width, "band": 1}[shape])


def _clouds(key: Tensor, size: tuple[int, int], count: int) -> Tensor:
    """The `count` cloudiest pixels of each image, (B, H, W) bool, from keys (B,).

    Cloudiness is a smooth random field and, for the soft edge, a draw of each pixel on its own: inside a blob every
    pixel is hidden, outside none, and towards the edge ever fewer. All of it in integers, so that every device gives
    the same pixels.
    """
    height, width = size
    thickness = torch.zeros(len(key), height, width, dtype=torch.int32, device=key.device)
    for octave in range(3):  # large forms, then finer ones at half the height
        key = mix64(key)
        spacing = max(min(size) // CLOUDS_A_SIDE >> octave, 1)
        thickness += _smooth_field(key[:, None], size, spacing) << (2 - octave)
    pixel = torch.arange(height * width, dtype=torch.int32, device=key.device)
    edge = uniform(pixel, mix64(key)[:, None]) >> 17  # ±2¹⁴, a quarter of the SD of the field
    rank = (thickness.flatten(1) + edge).long() * (height * width) + pixel  # the pixel's number breaks ties
    if not count:
        return torch.zeros(len(key), height, width, dtype=torch.bool, device=key.device)
    limit = rank.kthvalue(count, dim=1, keepdim=True).values
    return (rank <= limit).view(len(key), height, width)


def _smooth_field(key: Tensor, size: tuple[int, int], spacing: int) -> Tensor:
    """Value noise: draws of ±2¹⁵ on a lattice that begins elsewhere in every image, (B, H, W) int32 in between.

    Args:
        key: (B, 1).
        size: height and width.
        spacing: of the lattice, in pixels.
    """
    rows, columns = (length // spacing + 3 for length in size)
    nodes = torch.arange(rows * columns, dtype=torch.int32, device=key.device)
    field = (uniform(nodes, key) >> 16).view(-1, rows, columns)
    for axis, (length, shift) in enumerate(zip(size, (0, 16), strict=True), 1):
        place = torch.arange(length, dtype=torch.int32, device=key.device) * 256 // spacing
        place = place + integers(256, mix64(key) >> shift)  # (B, length), in 1/256 of the spacing
        index, part = (place >> 8).long(), place & 255
        weight = part * part * (768 - 2 * part) >> 16  # smoothstep, 0..256
        index = index[:, :, None].expand(-1, -1, columns) if axis == 1 else index[:, None].expand(-1, size[0], -1)
        weight = weight[:, :, None] if axis == 1 else weight[:, None]
        below, above = field.gather(axis, index), field.gather(axis, index + 1)
        field = below + ((above - below) * weight >> 8)
    return field


def signed64(value: int) -> int:
    """Python integer to two's complement, which is what torch's int64 wraps to."""
    value &= 2**64 - 1
    return value - 2**64 if value >= 2**63 else value


def mix64(x: Tensor) -> Tensor:
    """SplitMix64's finaliser (Steele et al. 2014, doi:10.1145/2714064.2660195) in wrapping int64."""
    x = x + signed64(0x9E3779B97F4A7C15)
    x = (x ^ ((x >> 30) & (2**34 - 1))) * signed64(0xBF58476D1CE4E5B9)
    x = (x ^ ((x >> 27) & (2**37 - 1))) * signed64(0x94D049BB133111EB)
    return x ^ ((x >> 31) & (2**33 - 1))


def uniform(unit: Tensor, key: Tensor) -> Tensor:
    """A draw for each unit, uniform over int32: units (n,) or (…, n) and keys (…, 1) give (…, n)."""
    return _mix32(unit ^ key.to(torch.int32), (key >> 32).to(torch.int32))


def _mix32(x: Tensor, salt: Tensor) -> Tensor:
    """A 32-bit mixer with low bias (C. Wellons' `lowbias32`, public domain), in wrapping int32, in place.

    `salt` enters halfway, so that two images whose keys are neighbours don't share shifted copies of one mask.
    """
    x = x ^ ((x >> 16) & 0xFFFF)
    x.mul_(0x7FEB352D).bitwise_xor_((x >> 15).bitwise_and_(0x1FFFF)).bitwise_xor_(salt)
    x.mul_(-0x7B935975).bitwise_xor_((x >> 16).bitwise_and_(0xFFFF))  # −0x7B935975 = 0x846CA68B as int32
    return x
