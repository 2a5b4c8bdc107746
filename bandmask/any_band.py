"""One encoder for every loss: trained on masks drawn anew for each image, and used on images with gaps as they come.

Gaps are filled by ridge regression, corrected by what is visible around them. Where that says nearly all, the encoder
behind it can't be beaten; where few bands are left, a copy aligned on such images knows more. So both look at the
filled image, and how much of it the regression can't explain decides how they are mixed: a complete image gives what
the pre-trained encoder gives, bit for bit, and one whose bands all have enough pixels left gives what that gives behind
the fill.
"""

import warnings
import zipfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from bandmask import bands, encoders, files
from bandmask.align import Objective, fine_tune, middle
from bandmask.batches import Batches
from bandmask.encoders import embed, tap_strides
from bandmask.fills import Moments, RidgeLocalFill
from bandmask.masks import AnyMask, check_batch, hide
from bandmask.moments import FEW
from bandmask.packs import Pack
from bandmask.train import Compute

# A distance alone leaves images alike that the contrast tells apart; the contrast alone leaves an embedding's length
# free, and a head in service depends on it.
OBJECTIVE = Objective(clip=0.1, distance=1.0)
MOMENTS, GATE, PRETRAINED = "moments.npz", "gate.json", "pre-trained"  # beside model.safetensors
MISSING = torch.full((len(bands.NAMES),), torch.nan)  # (13,) the fill that hands gaps to this encoder as they are
DRAWS = 4  # masks of each validation image that the mixture is fitted on


@dataclass(frozen=True)
class Gate:
    """How much of the aligned encoder is mixed in, by how much of an image the fill can't explain; linear between."""

    unexplained: tuple[float, ...] = (0.0, 1e-6)  # ascending shares from 0, see `RidgeLocalFill.unexplained`
    weight: tuple[float, ...] = (0.0, 1.0)  # of the aligned encoder there, 0 to 1, 0 at the first

    def __post_init__(self) -> None:
        """A ValueError of NaN, or no such curve: images would be embedded as if nothing had been learnt."""
        weight = np.array(self.weight)
        if not ((weight >= 0) & (weight <= 1)).all() or not (np.diff(self.unexplained) > 0).all():
            raise ValueError(f"a gate rises over ascending shares, with weights from 0 to 1; got {asdict(self)}")

    def __call__(self, unexplained: Tensor) -> Tensor:
        """Weights (B,) float32."""
        found = np.interp(unexplained.cpu().numpy(), self.unexplained, self.weight)
        return torch.tensor(found, dtype=torch.float32, device=unexplained.device)


class AnyBandEncoder(nn.Module):
    """Embeds reflectance in which gaps are NaN: whole bands, stripes, single pixels, or none at all."""

    takes_gaps = True  # what `bm.load_encoder` asks

    def __init__(self, pretrained: nn.Module, aligned: nn.Module, moments: Moments, gate: Gate | None = None) -> None:
        """From the encoder in service, its copy aligned behind `RidgeLocalFill`, and spectra to fill by.

        Without a gate from `fit_gate`, everything but complete images goes through `aligned` alone.
        """
        super().__init__()
        self.pretrained, self.aligned = pretrained, aligned
        self.fill, self.gate = RidgeLocalFill(moments, few=FEW), gate or Gate()

    @property
    def feature_info(self) -> Any:
        """Of the feature maps, as timm has it."""
        return self.pretrained.feature_info

    def forward(self, images: Tensor) -> Tensor:
        """Embeddings (B, D) of reflectance (B, 13, S, S), NaN = missing; a ValueError of an image without a value."""
        return self._embed(images, [])[0]

    def forward_intermediates(self, images: Tensor, indices: Sequence[int]) -> tuple[Tensor, list[Tensor]]:
        """Embeddings and feature maps, from shallow to deep, mixed alike; what `encoders.embed` calls."""
        taps = list(tap_strides(self))
        embedding, maps = self._embed(images, [taps[index] for index in sorted(indices)])
        return embedding, list(maps.values())

    def forward_head(self, embedding: Tensor) -> Tensor:
        """`forward_intermediates` has been there already."""
        return embedding

    def _embed(self, images: Tensor, taps: Sequence[str]) -> tuple[Tensor, dict[str, Tensor]]:
        check_batch(images, hidden := images.isnan(), bands.NAMES)
        if hidden.flatten(1).all(1).any():
            raise ValueError("an image has no value in any band: nothing can be said of it; leave it out")
        edge = hidden.all(1, keepdim=True)  # of a swath: no gap, and it costs no band its use
        gaps = hidden & ~edge
        filled = torch.where(gaps, self.fill(images.masked_fill(gaps, 0), gaps), images)
        if edge.any():
            filled = torch.where(edge, self.fill(filled.masked_fill(edge, 0), edge.expand_as(hidden)), filled)
        weight = self.gate(self.fill.unexplained(hidden))
        embedding, maps = embed(self.pretrained, filled, taps)
        if (some := weight > 0).any():
            other, others = embed(self.aligned, filled[some], taps)
            embedding = _mixed(embedding, other, weight, some)
            maps = {name: _mixed(maps[name], others[name], weight, some) for name in taps}
        return embedding, maps


def _mixed(pretrained: Tensor, aligned: Tensor, weight: Tensor, some: Tensor) -> Tensor:
    """`pretrained` (B, ...) with `aligned` mixed in where `some` (B,) are; the others are left as they are, exactly."""
    share = weight[some].view(-1, *[1] * (pretrained.ndim - 1))
    return pretrained.index_put((some,), pretrained[some] + share * (aligned - pretrained[some]))


def train(
    pretrained: nn.Module,
    pack: Pack,
    mask: AnyMask,
    *,
    objective: Objective = OBJECTIVE,
    image_size: int = 64,
    compute: Compute | None = None,
    **options: Any,
) -> tuple[AnyBandEncoder, pd.DataFrame]:
    """One encoder for what `mask` draws, from the encoder in service, and the history of its alignment.

    `options` are those of `align.fine_tune`, which is gentle here: `epochs`, `lr`, `batch_size`, `crop_size`, `seed`,
    `checkpoint`.
    """
    moments, compute = Moments.of(pack), compute or Compute.of()
    how: dict[str, Any] = {"objective": objective, "gentle": True, "image_size": image_size, "compute": compute}
    aligned, history = fine_tune(pretrained, pack, mask, RidgeLocalFill(moments), **how, **options)
    seen: dict[str, Any] = {"image_size": image_size, "crop_size": options.get("crop_size"), "compute": compute}
    gate = fit_gate(pretrained, aligned, pack, moments, mask, **seen)
    return compute.place(AnyBandEncoder(pretrained, aligned, moments, gate)).eval(), history  # type: ignore[return-value]


@torch.no_grad()
def fit_gate(
    pretrained: nn.Module,
    aligned: nn.Module,
    pack: Pack,
    moments: Moments,
    mask: AnyMask,
    *,
    image_size: int = 64,
    crop_size: int | None = None,
    compute: Compute,
) -> Gate:
    """The mixture that lies nearest to the embeddings of complete images, rising with what the fill can't explain.

    Of one image the best weight is a projection in closed form; over validation images it is fitted as a rising
    function (isotonic regression), each image weighing as much as the two encoders differ on it. Masks are drawn anew.
    """
    from sklearn.isotonic import IsotonicRegression

    fill = RidgeLocalFill(moments)
    both = [compute.place(model).eval() for model in (pretrained, aligned)]
    batches = Batches(pack, "val", image_size=image_size, device=compute.device)
    shares, best, counts = [], [], []
    for draw in range(DRAWS):
        law = replace(mask, fewest=max(mask.fewest, 1), seed=mask.seed + 7_919 * (draw + 1))
        for batch in batches.epoch():
            images = middle(batch.images, crop_size)
            hidden = law.hidden(batch.samples, (images.shape[-2], images.shape[-1]))
            filled = compute.images(hide(images, hidden, law, fill))
            with compute.autocast():
                target = both[0](compute.images(images)).float()
                first, second = (model(filled).float() for model in both)
            step = second - first
            length = step.square().sum(1)
            shares.append(fill.unexplained(hidden))
            best.append((step * (target - first)).sum(1) / length.clamp(min=1e-12))
            counts.append(length)
    x, y, count = (torch.cat(part).double().cpu().numpy() for part in (shares, best, counts))
    found = IsotonicRegression(y_min=0, y_max=1, out_of_bounds="clip").fit(x, y, sample_weight=count)
    knots = np.unique(np.quantile(x, np.linspace(0, 1, 33)))
    return Gate((0.0, *knots[knots > 0].tolist()), (0.0, *found.predict(knots[knots > 0]).tolist()))


def save(
    model: AnyBandEncoder, card: encoders.Card, mask: AnyMask | None, path: Path | str, *, half: bool = False
) -> Path:
    """Write everything that `load` needs into a folder, whole or not at all; the aligned encoder is plain timm."""
    moments, about = model.fill.moments, replace(card, mask=asdict(mask)) if mask else card
    with files.writing(path) as partial:
        encoders.save_encoder(model.aligned, about, partial, half=half)
        before = replace(card, name=card.parent or "pre-trained", parent=None)
        encoders.save_encoder(model.pretrained, before, partial / PRETRAINED, half=half)
        np.savez(partial / MOMENTS, mean=moments.mean, covariance=moments.covariance, pixels=moments.pixels)
        said = {**asdict(model.gate), "sums": {MOMENTS: files.sha256(partial / MOMENTS)}}
        (partial / GATE).write_text(files.sealed(said), encoding="utf-8")
    return Path(path)


def load(path: Path | str) -> tuple[AnyBandEncoder, encoders.Card]:
    """An encoder that takes images with gaps, in eval mode, and its card; `mini` comes with the package.

    A FileNotFoundError of none, or of one for one mask, which has no moments; a ValueError of a damaged file.
    """
    path = files.MINI / "encoder" if str(path) == encoders.MINI else Path(path)
    aligned, card = encoders.load_encoder(path)
    for name in (MOMENTS, GATE):
        files.require(path / name, "notebooks/08_any_band_encoder.ipynb makes encoders for every loss")
        if why := files.distrust(path / name):
            warnings.warn(f"{path / name}: {why}; `make run` makes it again", stacklevel=2)
    try:
        with np.load(path / MOMENTS) as stored:
            moments = Moments(stored["mean"], stored["covariance"], int(stored["pixels"]))
        if not np.isfinite(moments.covariance[moments.known][:, moments.known]).all():
            raise ValueError("a covariance is NaN or infinite")
        said = files.unsealed(path / GATE)
        if said.get("sums", {}).get(MOMENTS, now := files.sha256(path / MOMENTS)) != now:
            raise ValueError(f"{MOMENTS} was edited: its checksum is another one")
        gate = Gate(tuple(said["unexplained"]), tuple(said["weight"]))
    except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path / MOMENTS} or {GATE} is damaged ({error}); run the notebook again") from error
    return AnyBandEncoder(encoders.load_encoder(path / PRETRAINED)[0], aligned, moments, gate).eval(), card
