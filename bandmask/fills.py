"""What can be written over hidden pixels for free: the rivals that no table leaves out. None of them knows the task.

Each is a `fill` of `masks.hide`: a function of a batch (B, 13, H, W) whose hidden pixels are zeroed and of `hidden`
(B, k, H, W), which returns (B, k, H, W). It is made for the k bands of a mask from `Moments` of training spectra; for
masks that hide other bands in each image, for all 13. A pixel that is NaN or infinite counts as not seen.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from bandmask import bands
from bandmask.masks import FITTED, Fill, MaskSpec, check_batch, fill_values, hide
from bandmask.moments import ALPHA, ERROR_PRIOR, FEW, VALUE_PRIOR, WIDTHS, Moments
from bandmask.packs import Pack

FILL_NOISE = 0.01  # variance of a filled pixel's error, of its band's; chosen likewise among 0 and 1e-4 to 0.1
NEIGHBOURS = 100  # pixels that a visible one speaks for: at ratio 0.99 of single pixels most of an error is corrected


class _Fitted(ABC):
    """A fill for masks of these bands, from training spectra."""

    def __init__(self, moments: Moments, hidden_bands: Sequence[str] = bands.NAMES) -> None:
        """A ValueError of a band that the moments' source doesn't have."""
        self.moments = moments
        self.bands = bands.parse_bands(hidden_bands)  # in a mask's order, so that no two are swapped
        self.channels = bands.channel_indices(self.bands)
        if absent := [bands.NAMES[c] for c in self.channels if not moments.known[c]]:
            known = f"{', '.join(absent)}; they know {', '.join(np.array(bands.NAMES)[moments.known])}"
            raise ValueError(f"these moments ({moments.level or 'no level given'}) know nothing of {known}")
        # all that decides what is filled in: a checkpoint's checksum of the fill sees this tensor
        penalty = np.full(len(bands.NAMES), ALPHA / moments.pixels)
        self.statistics = torch.tensor(np.vstack([moments.mean, moments.covariance, penalty]))  # (15, 13) float64

    def __call__(self, images: Tensor, hidden: Tensor) -> Tensor:
        """(B, k, H, W) of a batch (B, 13, H, W) and its hidden pixels (B, k, H, W)."""
        check_batch(images, hidden, self.bands)
        with torch.autocast(images.device.type, enabled=False):  # bfloat16 holds three digits of reflectance
            return self._fill(images, hidden)

    @abstractmethod
    def _fill(self, images: Tensor, hidden: Tensor) -> Tensor: ...

    def _mend(self, found: Tensor, images: Tensor, lost: Tensor, wanted: np.ndarray, noise: np.ndarray) -> Tensor:
        """Where a band that is not `lost` (B, 13) is NaN or infinite, the wanted ones again from what is left there."""
        if found.isfinite().all():  # NaN and infinity reach it whatever their weight
            return found
        broken = ~(images.isfinite() | lost[..., None, None])
        image, row, column = broken.any(1).nonzero(as_tuple=True)  # (n,) each
        if not len(image):
            return found
        spectra = images[image, :, row, column]  # (n, 13)
        seen = spectra.isfinite() & ~lost[image]
        cases, which = np.unique(torch.column_stack([image, seen]).cpu().numpy(), axis=0, return_inverse=True)
        weights, biases = self.moments.regressions(cases[:, 1:], noise[cases[:, 0]])
        spectra = spectra.masked_fill(~seen, 0)
        for case, (weight, bias) in enumerate(zip(weights[:, wanted], biases[:, wanted], strict=True)):
            pixels = torch.from_numpy(np.flatnonzero(which.reshape(-1) == case)).to(images.device)
            again = spectra[pixels] @ torch.tensor(weight.T).to(images) + torch.tensor(bias).to(images)
            found[image[pixels], :, row[pixels], column[pixels]] = again.to(found)
        return found


class NearestFill(_Fitted):
    """Copies the nearest band by wavelength that is visible at that very pixel, shifted to the hidden band's level.

    The shift is the difference of the two bands' training means: neighbours see the same ground, but one is brighter
    throughout, and without it copied pixels would stand out by that offset. Cirrus (B10) is copied last, because it
    sees no ground. Where nothing is visible, the band's mean.
    """

    def _fill(self, images: Tensor, hidden: Tensor) -> Tensor:
        means, filled = self.statistics[0].to(images), []
        for target in self.channels:
            value = means[target].expand(images[:, 0].shape)
            for source in reversed(bands.nearest(target)):  # the nearest is written last
                shifted = images[:, source] + (means[target] - means[source])
                seen = shifted.isfinite()
                if source in self.channels:
                    seen = seen & ~hidden[:, self.channels.index(source)]
                value = torch.where(seen, shifted, value)
            filled.append(value)
        return torch.stack(filled, 1)


class LocalFill(_Fitted):
    """The mean of the band's own visible pixels around, in a Gaussian window that widens where few are visible.

    Means of ever narrower windows are taken; each counts the wider one's mean as `VALUE_PRIOR` visible pixels, so a
    window in which none is visible keeps the wider one's. The widest is the image; a band that is wholly hidden gets
    its training mean.
    Source: Knutsson and Westin 1993, doi:10.1109/CVPR.1993.341081 (normalised convolution).
    """

    def _fill(self, images: Tensor, hidden: Tensor) -> Tensor:
        own = images[:, self.channels].to(torch.promote_types(images.dtype, torch.float32))
        seen = own.isfinite() & ~hidden
        return local_mean(own, seen, VALUE_PRIOR, level=self.statistics[0, self.channels].to(own), level_prior=0.0)


class RidgeFill(_Fitted):
    """Per-pixel ridge regression: each hidden band from the bands that are visible everywhere."""

    def __init__(self, moments: Moments, hidden_bands: Sequence[str]) -> None:
        """For masks of these bands; a ValueError where none is hidden, or none is left to predict from."""
        super().__init__(moments, hidden_bands)
        self.visible = [c for c in range(len(bands.NAMES)) if c not in self.channels and moments.known[c]]
        if not self.channels or not self.visible:
            gone = f"{len(self.channels)} of 13 are hidden"
            raise ValueError(f"ridge imputation needs hidden and visible bands; {gone}: use 'ridge_local'")
        weight, bias = moments.regression(self.channels, self.visible)
        self.weight, self.bias = torch.tensor(weight, dtype=torch.float32), torch.tensor(bias, dtype=torch.float32)

    def _fill(self, images: Tensor, hidden: Tensor) -> Tensor:
        weight, bias, there = self.weight.to(images), self.bias.to(images), images[:, self.visible]
        found = torch.einsum("kv,bvhw->bkhw", weight, there) + bias[:, None, None]
        lost = torch.ones(len(images), len(bands.NAMES), dtype=torch.bool, device=images.device)
        lost[:, self.visible] = False
        return self._mend(found, images, lost, np.array(self.channels), np.zeros(lost.shape))


class RidgeLocalFill(_Fitted):
    """Ridge regression, corrected by the local mean of its own errors at the band's visible pixels.

    A band that has lost some pixels is predicted from the bands that lost nothing in that image; where its own pixels
    are visible, the errors of that prediction are known, and nearby hidden pixels share them. Where few are visible the
    correction shrinks to zero. A band that is gone altogether is then predicted from all others, completed as above; if
    the others lost nothing this is the ridge regression exactly. With no band to predict from it is the training means,
    corrected in the same way. With `few`, a band that lost no larger share of an image predicts the others all the
    same, but where it is missing: one dead pixel doesn't cost a band.
    Source: regression kriging (Hengl et al. 2007, doi:10.1016/j.cageo.2007.05.001), with fixed Gaussian windows in
    place of a fitted variogram.
    """

    def __init__(self, moments: Moments, hidden_bands: Sequence[str] = bands.NAMES, few: float = 0.0) -> None:
        """`few`: the share of an image that a band may lose and yet predict others."""
        super().__init__(moments, hidden_bands)
        self.few = few

    def _fill(self, images: Tensor, hidden: Tensor) -> Tensor:
        exact = images.to(torch.promote_types(images.dtype, torch.float32))
        own, places = exact[:, self.channels], torch.tensor(self.channels, device=exact.device)
        seen = own.isfinite() & ~hidden
        touched, gone = hidden.flatten(2).any(2), ~seen.flatten(2).any(2)  # (B, k)
        holed, gone = touched & ~gone, touched & gone
        few = holed & (hidden.flatten(2).float().mean(2) <= self.few)
        some = holed.any(0).nonzero().squeeze(1)  # the others are spared the work
        if len(some):
            there = exact
            if few.any():  # NaN: predicted again from the others, pixel by pixel
                there = exact.index_copy(1, places, own.where(seen, torch.nan))
            predicted = self._predicted(there, touched & ~few, some)
            for place in few.any(0).nonzero().flatten().tolist():  # of itself a band would tell no error
                without = touched & ~few
                without[:, place] = True
                alone = self._predicted(there, without, some.new_tensor([place]))[:, 0]
                column = predicted[:, some == place]
                predicted[:, some == place] = torch.where(few[:, place, None, None], alone, column[:, 0])[:, None]
            error = own[:, some] - predicted
            known = error.isfinite() & seen[:, some]
            no_error = error.new_zeros(len(some))
            corrected = predicted + local_mean(error, known, ERROR_PRIOR, level=no_error, level_prior=ERROR_PRIOR)
            filled = hidden[:, some] & holed[:, some, None, None]
            own[:, some] = torch.where(filled, corrected, own[:, some])
        lost = gone.any(0).nonzero().squeeze(1)
        if len(lost):
            exact = exact.index_copy(1, places, own)
            share = hidden.flatten(2).float().mean(2) * holed
            predicted = self._predicted(exact, gone, lost, share)
            own[:, lost] = torch.where(gone[:, lost, None, None], predicted, own[:, lost])
        return own

    def _predicted(self, images: Tensor, missing: Tensor, wanted: Tensor, filled: Tensor | None = None) -> Tensor:
        """Wanted ones of the mask's bands from those that aren't missing, (B, w, H, W).

        `filled` says how much of each band was filled before, (B, k): it is trusted less.
        """
        lost = all_bands(missing, self.channels) | torch.from_numpy(~self.moments.known).to(images.device)
        noise = np.zeros(lost.shape)
        if filled is not None:
            noise[:, self.channels] = FILL_NOISE * filled.double().cpu().numpy()
            noise *= np.nan_to_num(np.diag(self.moments.covariance))
        weights, biases = self.moments.regressions(~lost.cpu().numpy(), noise)
        channels = np.array(self.channels)[wanted.cpu().numpy()]
        weight, bias = (torch.tensor(part[:, channels]).to(images) for part in (weights, biases))
        there = images.masked_fill(lost[..., None, None], 0)
        found = torch.einsum("bkc,bchw->bkhw", weight, there) + bias[..., None, None]
        return self._mend(found, images, lost, channels, noise)

    def unexplained(self, hidden: Tensor) -> Tensor:
        """How much of each image the regressions can't tell, (B,): 0 for a complete one, 1 if nothing is visible.

        Of a band that is gone, the share of its variance over training spectra that the others don't explain; it falls
        fast with what is visible of the band itself, each such pixel speaking for some `NEIGHBOURS` around, and is 0
        where that explains all but a thousandth. Mean over the 13 bands; hidden (B, k, H, W) bool.
        """
        visible = (~hidden).flatten(2).float().mean(2).cpu().numpy()
        share = np.where(visible < 1, np.exp(-NEIGHBOURS * visible), 0)  # that its own pixels say nothing of, (B, k)
        gone = all_bands(hidden.flatten(2).all(2), self.channels).cpu().numpy()  # (B, 13)
        itself = np.eye(len(bands.NAMES), dtype=bool)[self.channels]  # (k, 13)
        rows, places = np.nonzero(share > 1e-3)
        result = np.zeros(share.shape)
        if len(rows):
            others = ~(gone[rows] | itself[places])  # what each of these bands is predicted from, (n, 13)
            patterns, which = np.unique(others, axis=0, return_inverse=True)
            left = self.moments.unexplained(patterns)[which.reshape(-1), np.array(self.channels)[places]]
            result[rows, places] = left
        return torch.tensor((share * result).sum(1) / len(bands.NAMES), dtype=torch.float32, device=hidden.device)


def complete(images: Tensor, method: str, moments: Moments) -> Tensor:
    """A copy of reflectance (B, 13, H, W) whose NaN is filled, but where no band is visible, or the moments lack it.

    Each image is filled as it is alone.
    """
    hidden = ~images.isfinite()
    hidden &= ~hidden.all(1, keepdim=True)  # the edge of a swath is no gap, and costs no band its use
    touched = [c for c in range(len(bands.NAMES)) if hidden[:, c].any() and moments.known[c]]
    filled = images
    steps = [(touched, touched)]
    if method == "ridge":  # bands with a few gaps predict the others, and are told one by one
        share = hidden.flatten(2).float().mean(2)  # (B, 13)
        cases, which = ((share > 0).int() + (share > FEW).int()).unique(dim=0, return_inverse=True)
        if len(cases) > 1:  # a band that another image lost predicts in this one
            filled = images.clone()
            for case in range(len(cases)):
                filled[which == case] = complete(images[which == case], method, moments)
            return filled
        lost = [c for c in touched if share[0, c] > FEW]
        steps = [(lost, lost), *[([*lost, c], [c]) for c in touched if c not in lost]]
    for lost, wanted in [step for step in steps if step[0]]:
        spec = MaskSpec(bands.parse_bands([bands.NAMES[c] for c in lost]))
        local = method == "ridge_local"
        fill = RidgeLocalFill(moments, spec.bands, FEW) if local else make_fill(method, moments, spec.bands)
        told = hide(images, hidden[:, spec.channels], spec, fill)
        filled = filled.index_copy(1, torch.tensor(wanted, device=images.device), told[:, wanted])
    return filled


def all_bands(of_bands: Tensor, channels: Sequence[int]) -> Tensor:
    """What is said of some bands among all of them: (B, k) bool to (B, 13); False of the others."""
    spread = of_bands.new_zeros(len(of_bands), len(bands.NAMES))
    spread[:, channels] = of_bands
    return spread


def local_mean(values: Tensor, seen: Tensor, prior: float, *, level: Tensor, level_prior: float) -> Tensor:
    """Mean of what is seen around each pixel, (B, k, H, W): normalised convolution with `WIDTHS`, wide to narrow.

    A wider window's mean counts as `prior` seen pixels; the widest is the image, in which `level` (k,) counts as
    `level_prior`, and stands alone where nothing is seen.
    """
    values, total = values.masked_fill(~seen, 0), seen.sum((2, 3))
    mean = (values.sum((2, 3)) + level_prior * level) / (total + level_prior).clamp(min=1)
    result = torch.where(total > 0, mean, level)[..., None, None].expand(values.shape)
    count = seen.to(values)
    for width in WIDTHS:
        places = (torch.arange(length, dtype=torch.float64) / width for length in values.shape[-2:])
        rows, columns = (torch.exp(-(place[:, None] - place).square() / 2).to(values) for place in places)
        # separable, and as matrices rather than convolutions: no edge to pad, however wide the window
        result = (rows @ values @ columns + prior * result) / (rows @ count @ columns + prior)
    return result


_MAKERS = {"nearest": NearestFill, "local": LocalFill, "ridge": RidgeFill, "ridge_local": RidgeLocalFill}


def make_fill(
    value: str | float, source: Pack | Moments, hidden_bands: Sequence[str], moments: Moments | None = None
) -> Fill:
    """What a mask value stands for: reflectance a band (13,), or a function fitted to training spectra.

    Args:
        value: as `MaskSpec.value`.
        source: a pack, whose training split it is fitted to, or moments such as `Moments.shipped("L1C")`.
        hidden_bands: ESA names of the bands that masks hide; with none every value is a constant that is never used.
        moments: of the pack's training split; None takes them, about a second.

    Raises:
        ValueError: an unknown value, `ridge` where no band is always visible, or a band that the source lacks.
    """
    names = bands.parse_bands(hidden_bands)
    if lacking := " ".join(name for name in names if name in getattr(source, "absent", ())):
        raise ValueError(f"these images have no {lacking}, which is missing already: leave it out of what is lost")
    if isinstance(source, Moments):
        moments = source
    if value in FITTED and names:
        return _MAKERS[str(value)](moments or Moments.of(source), names)
    means = torch.tensor(source.mean if isinstance(source, Moments) else source.band_means())
    return fill_values("dataset_mean" if value in FITTED else value, means)
