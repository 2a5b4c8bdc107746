"""Which bands of an image should be distrusted, and how sure that is.

Every band is compared with its ridge prediction from the others. One faulty band spoils the predictions of its
neighbours, so bands are taken out one at a time: that whose removal leaves the others most normal.
The threshold is set on healthy validation images at a stated rate of false alarms.
Source: split conformal prediction for the rate (Vovk et al. 2005; Bates et al. 2023, doi:10.1214/22-AOS2244).
"""

from __future__ import annotations

import json
import warnings
import zipfile
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from torch import Tensor

from bandmask import bands, files
from bandmask.batches import Batches
from bandmask.diagnosis.elimination import Judge
from bandmask.diagnosis.sketches import Sketch
from bandmask.diagnosis.survey import spread_tiles
from bandmask.moments import Moments
from bandmask.packs import Pack

if TYPE_CHECKING:
    import xarray as xr

FORMAT = 1
RATE = 0.05  # of healthy images in which any band is called faulty
_LEAST_IMAGES = 50  # to fit on
_MOST_IMAGES = 2000  # to fit on: 3,700 numbers each


@dataclass(frozen=True)
class Detector:
    """Fitted on the healthy images of a pack.

    Attributes:
        judge: knows training spectra, for the predictions, and training images, for what is normal.
        worst: score of the worst band of each healthy validation image, (V,).
        rate: share of healthy images in which any band may be called faulty.
        image_size: side of the images in pixels; symptoms depend on it.
        level: processing level of the images, such as `L1C`.
        data: name and checksum of the pack.
    """

    judge: Judge
    worst: np.ndarray
    rate: float
    image_size: int
    level: str = "L1C"
    data: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def fit(cls, pack: Pack, *, rate: float = RATE, level: str = "L1C", seed: int = 0) -> Detector:
        """Fit on training images, set the threshold on validation images; both are taken to be healthy.

        Args:
            pack: where they come from.
            rate: of false alarms, an image.
            level: processing level of the pack's images; all data sets of this project are L1C.
            seed: of the draw of pixels and, where there are more than 2,000, of images.

        Raises:
            ValueError: too few images to fit on, or to hold that rate.
        """
        draw = np.random.default_rng(seed)
        rows = {split: np.sort(draw.permutation(pack.rows(split))[:_MOST_IMAGES]) for split in ("train", "val")}
        if len(rows["train"]) < _LEAST_IMAGES:
            raise ValueError(f"a detector takes {_LEAST_IMAGES} training images or more; {pack.path} has fewer")
        sketch = {
            s: Sketch.join(Sketch.of(batch.images) for batch in Batches(pack, r).epoch()) for s, r in rows.items()
        }
        if any(part.absent.any() for part in sketch.values()):
            raise ValueError(f"{pack.path} has images without a band; fit on complete ones")
        judge = Judge(Moments.of(pack, seed=seed), sketch["train"])
        worst = np.sort(judge.first_look(sketch["val"]).max(1))
        data = {"name": pack.card["dataset"], "checksum": pack.checksum, "train": len(rows["train"]), "val": len(worst)}
        found = cls(judge, worst, rate, pack.images.shape[-1], level, data)
        found.threshold_at(rate)
        return found

    @property
    def threshold(self) -> float:
        """A band whose score is above it is faulty."""
        return self.threshold_at(self.rate)

    def threshold_at(self, rate: float) -> float:
        """The score that the worst band of a healthy image exceeds with at most this chance.

        Raises:
            ValueError: the validation images are too few to say.
        """
        allowed = int(np.floor(rate * (len(self.worst) + 1) + 1e-9)) - 1  # healthy images that may be above
        if not 0 < rate < 1 or allowed < 0:
            raise ValueError(
                f"{len(self.worst)} healthy validation images can't hold a rate of false alarms of {rate}; choose one "
                f"from {1 / (len(self.worst) + 1):.3g} to 1, or give more images"
            )
        return float(np.sort(self.worst)[::-1][allowed])

    def chance(self, scores: np.ndarray) -> np.ndarray:
        """How often the worst band of a healthy image scores as high: a p-value for all bands together."""
        above = len(self.worst) - np.searchsorted(np.sort(self.worst), scores, side="left")
        return (1 + above) / (1 + len(self.worst))

    def sketch(self, images: Tensor | np.ndarray | Sketch) -> Sketch:
        """What the detector sees of images; all that takes images takes this too, and is spared the pixels.

        Raises:
            ValueError: images of another size than those it was fitted on.
        """
        if isinstance(images, Sketch):
            return images
        if tuple(images.shape[-2:]) != (self.image_size, self.image_size):
            raise ValueError(
                f"fitted on images of {self.image_size} × {self.image_size} pixels, got {tuple(images.shape[-2:])}; "
                "cut tiles of that size, or fit on images of yours"
            )
        return Sketch.of(images)

    def first_look(self, images: Tensor | np.ndarray | Sketch) -> np.ndarray:
        """Scores (B, 13) before anything is taken out: enough to tell whether an image has a faulty band."""
        return self.judge.first_look(self.sketch(images))

    def scores(self, images: Tensor | np.ndarray | Sketch) -> np.ndarray:
        """Scores (B, 13): of a faulty band when it was taken out, of others once all faulty ones were; −∞ if absent.

        Args:
            images: reflectance (B, 13, S, S), NaN where there is no value; or what `sketch` gave.
        """
        return self.examine(images)[0]

    def faulty(self, images: Tensor | np.ndarray | Sketch) -> np.ndarray:
        """Bands to distrust, (B, 13) bool."""
        return self.examine(images)[1]

    def examine(self, images: Tensor | np.ndarray | Sketch) -> tuple[np.ndarray, np.ndarray]:
        """`scores` and `faulty` in one search."""
        return self.judge.search(self.sketch(images), self.threshold)

    def looks_like(self, images: Tensor | np.ndarray | Sketch, faulty: np.ndarray) -> list[dict[str, str]]:
        """What each faulty band of each image looks like, such as `[{"B08": "noisy"}, {}]`; see `verdicts.WORDS`."""
        sketch = self.sketch(images)
        each = (sketch.take(np.array([row])) for row in range(len(sketch)))
        return [self.judge.words(one, bad, one.absent[0]) for one, bad in zip(each, faulty, strict=True)]

    def distrust(self, scene: xr.DataArray, *, tiles: int = 64) -> pd.DataFrame:
        """Which bands of a scene to distrust, a row a band.

        Tiles of one scene are alike, so they don't count as independent: the p-value is twice the median over tiles,
        which holds however they depend on one another (Rüger 1978; Vovk and Wang 2020, doi:10.1093/biomet/asaa027).
        A fault in less than half of the scene is therefore not seen; cut there and ask again.

        Args:
            scene: DN (13, y, x) with ESA band names, lazily or not, as `imagery.open_scene` and `datasets.read_sample`
                give it; NaN is a pixel without a value.
            tiles: at most so many are read, spread over the scene.

        Returns:
            `band`, `score` (median over tiles), `false_alarm` (chance of as high a score in a healthy scene),
            `suspicious`, `looks_like`. `attrs`: `tiles`, `threshold`, and `note`, which says what was out of the
            ordinary: absent bands, another processing level.

        Raises:
            ValueError: no band names, values that are no DN, a scene smaller than a tile, or without enough values.
        """
        images, absent = spread_tiles(scene, self.image_size, tiles)
        sketch, factor = Sketch.of(images), 1 if len(images) == 1 else 2
        threshold = self.threshold_at(self.rate / factor)
        scores, faulty = self.judge.search_together(sketch, absent, threshold)
        words = self.judge.words(sketch, faulty, absent)
        if (pair := self.judge.exchanged(sketch, faulty, absent, threshold)) is not None:
            words |= {pair[0]: f"exchanged with {pair[1]}", pair[1]: f"exchanged with {pair[0]}"}
        table = pd.DataFrame({"band": bands.NAMES, "score": np.where(absent, np.nan, scores)})
        table["false_alarm"] = np.where(absent, np.nan, np.minimum(factor * self.chance(scores), 1))
        table["suspicious"] = faulty
        table["looks_like"] = [
            "absent" if gone else words.get(name, "") for name, gone in zip(bands.NAMES, absent, strict=True)
        ]
        note = "; ".join(self._notes(scene, absent))
        table.attrs.update(tiles=len(images), threshold=threshold, note=note)
        return table

    def save(self, path: Path | str) -> Path:
        """Write one `.npz` file, whole or not at all; 15 kB for each image it was fitted on, before compression."""
        card = {"format": FORMAT, "bands": bands.NAMES, "rate": self.rate, "image_size": self.image_size}
        card |= {"level": self.level, "data": self.data, "pixels": self.judge.moments.pixels}
        arrays = {f.name: getattr(self.judge.healthy, f.name) for f in fields(Sketch)}
        with files.writing(path) as partial, partial.open("wb") as file:
            np.savez_compressed(
                file,
                card=np.array(json.dumps(card)),
                worst=self.worst,
                spectrum=self.judge.moments.mean,
                covariance=self.judge.moments.covariance,
                **{f"healthy_{name}": array for name, array in arrays.items()},
            )
        return Path(path)

    @classmethod
    def load(cls, path: Path | str) -> Detector:
        """A saved detector: it gives the same scores.

        Raises:
            FileNotFoundError: nothing there.
            ValueError: damaged, or of another format.
        """
        path = files.require(path, "Detector.fit(pack).save(path), as notebooks/10_faulty_bands.ipynb does")
        try:
            with np.load(path, allow_pickle=False) as saved:
                card = json.loads(str(saved["card"]))
                if card["format"] != FORMAT or tuple(card["bands"]) != bands.NAMES:
                    raise ValueError(f"format {card['format']!r}, this is {FORMAT}")
                healthy = Sketch(*(saved[f"healthy_{f.name}"] for f in fields(Sketch)))
                moments = Moments(saved["spectrum"], saved["covariance"], card["pixels"])
                worst = saved["worst"]
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise ValueError(f"{path} is no whole detector ({error}); fit and save it again") from error
        return cls(Judge(moments, healthy), worst, card["rate"], card["image_size"], card["level"], card["data"])

    def _notes(self, scene: xr.DataArray, absent: np.ndarray) -> list[str]:
        notes = []
        if absent.any():
            gone = " ".join(np.array(bands.NAMES)[absent])
            notes.append(f"{gone}: no values, so nothing is said about them, and the others are judged without them")
        if (level := scene.attrs.get("level")) and level != self.level:
            notes.append(
                f"the scene is {level}, the detector was fitted on {self.level} ({self.data.get('name')}): levels "
                "differ in every band, so scores are not calibrated; fit on images of that level"
            )
            warnings.warn(notes[-1], stacklevel=3)
        return notes
