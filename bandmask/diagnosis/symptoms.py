"""Nine symptoms of a band, each read off its residual or itself, and what is normal for them in healthy images.

A band's residual is what it shows beyond its ridge prediction from the other trusted bands. What is normal depends on
the scene: a town leaves a rougher residual than a lake. So each symptom is first predicted from what the trusted bands
show (means, scatter, grain), and only what is left over counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bandmask import bands
from bandmask.diagnosis.sketches import Sketch
from bandmask.moments import Moments

SYMPTOMS: tuple[str, ...] = (
    "level",  # mean residual, in reflectance: offset, gain
    "scatter",  # log SD of the residual
    "grain",  # log SD of its white noise, by Immerkær's filter: noise
    "columns",  # log SD of its column offsets: stripes
    "own scatter",  # log SD of the band itself: constant bands have none
    "own grain",  # log SD of the band's own white noise
    "likeness",  # correlation of the band with its prediction
    "across",  # correlation of the residual with the prediction's gradient across: a shift
    "down",  # the same with the gradient down
)
FLOOR = 1e-5  # reflectance, a tenth of a DN: what an SD is at least, so that a constant band has a logarithm
_BANDS = len(bands.NAMES)
_PENALTY = 10.0  # ridge penalty on standardised features, in images
_TAIL = 0.005  # of healthy images lie beyond a deviation of 1, on either side: symptoms differ most in their tails


def symptoms(sketch: Sketch, moments: Moments, distrusted: Sequence[int] = ()) -> tuple[np.ndarray, np.ndarray]:
    """Symptoms of all bands, and what of the trusted bands explains them.

    Args:
        sketch: of N images.
        moments: of healthy training spectra, for the predictions.
        distrusted: channels that no band may be predicted from.

    Returns:
        (N, 13, 9), and features (N, 13, 42), those of the band itself and of distrusted ones 0.
    """
    own = np.eye(_BANDS)
    trusted = 1 - own
    trusted[:, list(distrusted)] = 0
    weights, biases = moments.regressions(trusted)
    places = np.arange(_BANDS)
    predict, bias = weights[places, places], biases[places, places]  # (13, 13): a row predicts its band
    rest = own - predict
    covariance, across, down = np.split(sketch.spread[:, :_BANDS], 3, axis=2)
    steep = [sketch.spread[:, part, part] for part in (slice(_BANDS, 2 * _BANDS), slice(2 * _BANDS, None))]
    expected = sketch.mean @ predict.T + bias
    scatter, own_scatter, expected_scatter = (_form(covariance, row) for row in (rest, own, predict))
    grain, own_grain, expected_grain = (_form(sketch.grain, row) for row in (rest, own, predict))
    columns, expected_columns = (_form(sketch.columns, row) for row in (rest, predict))
    found = [
        sketch.mean - expected,
        *map(_log_sd, (scatter, grain, columns, own_scatter, own_grain)),
        _form(covariance, own, predict) / (_sd(own_scatter) * _sd(expected_scatter)),
        _form(across, rest, predict) / (_sd(scatter) * _sd(_form(steep[0], predict))),
        _form(down, rest, predict) / (_sd(scatter) * _sd(_form(steep[1], predict))),
    ]
    shown = [sketch.mean, *(_log_sd(np.diagonal(part, axis1=1, axis2=2)) for part in (covariance, sketch.grain))]
    of_trusted = np.concatenate(shown, 1)[:, None] * np.tile(trusted, 3)  # (N, 13, 39)
    of_prediction = np.stack([_log_sd(part) for part in (expected_scatter, expected_grain, expected_columns)], -1)
    return np.stack(found, -1), np.concatenate([of_trusted, of_prediction], -1)


@dataclass(frozen=True)
class Normal:
    """What is normal in healthy images when some channels are distrusted.

    Attributes:
        distrusted: those channels.
        centre: of the features, (13, 42).
        scale: of the features, (13, 42).
        slope: of symptoms on standardised features, (13, 42, 9).
        middle: median of what is left over, (13, 9).
        below: how far below it one healthy image in 200 lies, (13, 9).
        above: how far above it one healthy image in 200 lies, (13, 9).
    """

    distrusted: tuple[int, ...]
    centre: np.ndarray
    scale: np.ndarray
    slope: np.ndarray
    middle: np.ndarray
    below: np.ndarray
    above: np.ndarray

    @classmethod
    def of(cls, sketch: Sketch, moments: Moments, distrusted: Sequence[int] = ()) -> Normal:
        """Of healthy images; what is left over of each is taken as if it had not been fitted on."""
        found, features = symptoms(sketch, moments, distrusted)
        centre, scale = features.mean(0), features.std(0)
        scale = np.where(scale > 1e-9, scale, 1.0)
        shown = ((features - centre) / scale).transpose(1, 0, 2)  # (13, N, 42)
        mean = found.mean(0)
        inverse = np.linalg.inv(shown.transpose(0, 2, 1) @ shown + _PENALTY * np.eye(shown.shape[2]))
        slope = inverse @ shown.transpose(0, 2, 1) @ (found - mean).transpose(1, 0, 2)
        leverage = ((shown @ inverse) * shown).sum(-1) + 1 / len(sketch)
        left = (found - mean).transpose(1, 0, 2) - shown @ slope
        left /= (1 - leverage)[..., None]  # leave-one-out residuals of a ridge regression (Golub et al. 1979)
        middle, (low, high) = np.median(left, 1), np.quantile(left, (_TAIL, 1 - _TAIL), axis=1)
        below, above = np.maximum(middle - low, 1e-12), np.maximum(high - middle, 1e-12)
        return cls(tuple(distrusted), centre, scale, slope, middle + mean, below, above)

    def deviations(self, sketch: Sketch, moments: Moments) -> np.ndarray:
        """How far symptoms are from what is normal for such a scene, in units of a rare healthy one, (N, 13, 9)."""
        found, features = symptoms(sketch, moments, self.distrusted)
        usual = np.einsum("ncf,cfs->ncs", (features - self.centre) / self.scale, self.slope, optimize=True)
        away = found - usual - self.middle
        return away / np.where(away < 0, self.below, self.above)

    def scores(self, sketch: Sketch, moments: Moments) -> np.ndarray:
        """The largest deviation of each band, (N, 13); −∞ of distrusted channels.

        The largest, and no distance: a fault shows in one or two symptoms, and each has its own long tail.
        """
        scores = np.abs(self.deviations(sketch, moments)).max(-1)
        scores[:, list(self.distrusted)] = -np.inf
        return scores


def _form(matrix: np.ndarray, left: np.ndarray, right: np.ndarray | None = None) -> np.ndarray:
    """`left[c] · matrix[n] · right[c]` for every image and band, (N, 13)."""
    return np.einsum("ncb,cb->nc", left @ matrix, left if right is None else right)


def _sd(variance: np.ndarray) -> np.ndarray:
    return np.sqrt(np.maximum(variance, 0) + FLOOR**2)


def _log_sd(variance: np.ndarray) -> np.ndarray:
    return np.log(_sd(variance))
