"""What a faulty band looks like, in a few words, from how far its symptoms are from normal.

Words are for people: they say where to look first, and the benchmark says how often they are right. The decision that
a band is faulty is the detector's, by its score alone.
"""

from __future__ import annotations

import numpy as np

from bandmask.diagnosis.symptoms import SYMPTOMS

CONSTANT = 3e-5  # reflectance: the SD that rounding to whole DN leaves, 1e-4 / √12
DARK = 0.0025  # reflectance: 25 DN, below any band but cirrus
_COLUMNS_OF_NOISE = -1.0  # log of column SD over noise SD: −2.1 of white noise in 64 rows, above 0 of column offsets
WORDS = ("dead", "stuck", "striped", "noisy", "offset or gain", "shifted or blurred", "unlike the other bands")


def looks_like(deviations: np.ndarray, symptoms: np.ndarray, mean: float) -> str:
    """One of `WORDS`.

    Args:
        deviations: of one band from normal, (9,), as `symptoms.Normal.deviations` gives them.
        symptoms: the band's own, (9,), as `symptoms.symptoms` gives them.
        mean: of the band, in reflectance.
    """
    away, own = (dict(zip(SYMPTOMS, values, strict=True)) for values in (deviations, symptoms))
    if np.exp(own["own scatter"]) < CONSTANT:
        return "dead" if abs(mean) < DARK else "stuck"
    # noise has column offsets too, and stripes scatter: which of the two it is, their ratio says
    if away["columns"] > 1 and own["columns"] - own["grain"] > _COLUMNS_OF_NOISE:
        return "striped"
    size = {
        "noisy": max(away["grain"], away["own grain"]),
        "offset or gain": abs(away["level"]),
        "shifted or blurred": max(abs(away["across"]), abs(away["down"]), -away["grain"], -away["own grain"]),
        "unlike the other bands": max(abs(away[name]) for name in ("scatter", "own scatter", "likeness")),
    }
    return max(size, key=lambda word: size[word])
