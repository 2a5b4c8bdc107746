"""Who meets the losses in docs/findings.md: free fills, encoders for one loss each, and one encoder for every loss."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import folds
from losses import FEW, THESIS, WHOLE, Loss
from torch import nn

from bandmask import alignment, any_band, draws, encoders, files, fills, first_layer, masking
from bandmask.any_band import OBJECTIVE, AnyBandEncoder, fit_gate
from bandmask.draws import AnyMask
from bandmask.fills import RidgeLocalFill
from bandmask.masking import MaskSpec
from bandmask.moments import Moments
from bandmask.objectives import Objective
from bandmask.packs import Pack
from bandmask.training import Compute, fill_checksum, weights_checksum
from bandmask.views import View

BEST_FREE, BEST_FREE_VALUE = "ridge + local", "ridge_local"
VALUES = {  # of the free methods, as mask values
    "pre-trained": "dataset_mean",
    "band mean": "band_mean",
    "nearest": "nearest",
    "local": "local",
    "ridge": "ridge",
    BEST_FREE: BEST_FREE_VALUE,
}
OF_PIXELS = ("local", BEST_FREE)  # of whole bands they are the band mean and the ridge regression
FREE = (*VALUES, "rescaled")
THESIS_METHOD, FEATURES, FOR_ANOTHER = "thesis' method", "features + distance", "thesis' method for another loss"
NO_DISTANCE, NO_FEATURES, FEATURES_ALONE = "features, no distance", "distance, no features", "features alone"
OBJECTIVES = {THESIS_METHOD: Objective(), FEATURES: Objective.of("both", distance=1.0)}
ABLATIONS = {  # what of the last does it
    NO_DISTANCE: Objective.of("both"),
    NO_FEATURES: Objective.of("embedding", distance=1.0),
    FEATURES_ALONE: Objective.of("features"),
}
FOR_ONE = [*THESIS, *FEW[:2]]  # losses that encoders of their own are trained for
WIDEST = THESIS[-1]  # the encoder that meets losses it was not made for
ONE_FOR_ALL = "one for all"
TWO_VIEWS, LONGER = "two masks an image", "thrice the epochs"  # variants of it, as are those below
AWARE, ALIGNED = "mask-aware layer", "aligned copy alone"
VARIANTS = (ALIGNED, TWO_VIEWS, LONGER, AWARE)
GONE = ("rescaled", TWO_VIEWS, AWARE)  # no longer made; their figures are kept
METHODS = (*FREE, ONE_FOR_ALL, THESIS_METHOD, FEATURES, FOR_ANOTHER, *VARIANTS, *ABLATIONS)
DRAWN = 3, 12  # bands that an image loses in training: what loses fewer, the fill restores


@dataclass(frozen=True, eq=False)  # told apart by identity: what is cached for one plan is of that plan
class Plan:
    """What is trained and how, on one fold.

    Attributes:
        folder: encoders and checkpoints go there.
        pack: images with the splits of the fold.
        fold: seed of everything.
        teacher: the pre-trained encoder.
        card: its card.
        moments: of the training images.
        compute: device and precision.
        epochs: of fine-tunings for one loss.
        any_epochs: of that for every loss.
        lr: of fine-tunings for one loss.
        any_lr: of that for every loss.
        any_features: weight of feature maps in that for every loss; decoders need it.
    """

    folder: Path
    pack: Pack
    fold: int
    teacher: nn.Module
    card: encoders.Card
    moments: Moments
    compute: Compute
    epochs: int
    any_epochs: int
    lr: float = 1e-4
    any_lr: float = 3e-4
    any_features: float = 0.0

    def settings(self) -> dict[str, Any]:
        """What decides every figure."""
        return {
            "image_size": self.card.image_size,
            "data": self.pack.fingerprint,
            "weights": weights_checksum(self.teacher),
        }

    def of_method(self, method: str) -> dict[str, Any]:
        """What decides an encoder that is trained, so that other settings of one method don't make the others anew."""
        if method in (ONE_FOR_ALL, *VARIANTS):
            epochs = self.any_epochs * (3 if method == LONGER else 1)
            options = {"epochs": epochs, "lr": self.any_lr, "lr_schedule": "cosine", "batch_norm": "frozen"}
            return {**options, "objective": replace(OBJECTIVE, features=self.any_features)}
        if method in (*OBJECTIVES, *ABLATIONS, FOR_ANOTHER):
            objective = {**OBJECTIVES, **ABLATIONS}.get(method, Objective())
            return {"epochs": self.epochs, "lr": self.lr, "objective": objective}
        return {}

    def fill(self, value: str, loss: Loss) -> masking.Fill:
        return fills.make_fill(value, self.pack, loss.bands, self.moments)

    def view(self, encoder: nn.Module, loss: Loss, fill: masking.Fill) -> View:
        return View(encoder, loss.spec(), fill, self.card.image_size)


@dataclass(frozen=True)
class Case:
    """One thing to be measured: a loss, a method, and how to make what the head sees."""

    loss: Loss
    method: str
    view: Callable[[], View]

    @property
    def name(self) -> str:
        """Of its file."""
        return _of_file(f"{self.loss.name}-{self.method}")


def cases(plan: Plan, chosen: list[str], losses: list[Loss]) -> Iterator[Case]:
    """What is to be measured: what costs nothing first.

    Args:
        plan: of the fold.
        chosen: of `free`, `any`, `thesis`, `features`, `variants`, `ablations`.
        losses: of `losses.LOSSES`.
    """
    if "free" in chosen:
        for loss in losses:
            for method, value in VALUES.items():
                if not (loss.shape == "band" and method in OF_PIXELS):
                    yield Case(loss, method, partial(_filled, plan, value, loss))
    if "any" in chosen:
        for loss in losses:
            yield Case(loss, ONE_FOR_ALL, partial(_one_for_all, plan, loss))
    if "variants" in chosen:
        for loss in (loss for loss in losses if loss in FEW):
            yield Case(loss, ALIGNED, partial(_aligned, plan, loss))
            yield Case(loss, LONGER, partial(_one_for_all, plan, loss, LONGER))
    for loss in losses:
        for method in OBJECTIVES:
            if method.split()[0].strip("'") in chosen and loss in FOR_ONE:
                yield Case(loss, method, partial(_for_one_loss, plan, method, loss, loss))
        if "ablations" in chosen and loss in FOR_ONE:
            for method in ABLATIONS:
                yield Case(loss, method, partial(_for_one_loss, plan, method, loss, loss))
        if "thesis" in chosen and loss not in THESIS:
            made_for = THESIS[WHOLE.index(loss)] if loss in WHOLE else WIDEST  # the same bands, of pixels not of bands
            yield Case(loss, FOR_ANOTHER, partial(_for_one_loss, plan, THESIS_METHOD, made_for, loss))


def _of_file(name: str) -> str:
    return name.replace(" ", "_").replace("'", "").replace(",", "")


def _filled(plan: Plan, value: str, loss: Loss) -> View:
    """The pre-trained encoder behind a fill."""
    return plan.view(plan.teacher, loss, plan.fill(value, loss))


def _one_for_all(plan: Plan, loss: Loss, method: str = ONE_FOR_ALL) -> View:
    """The encoder of this project facing a loss, with gaps as NaN."""
    return plan.view(any_band_encoder(plan, method), loss, first_layer.MISSING)


def _for_one_loss(plan: Plan, method: str, made_for: Loss, met: Loss) -> View:
    """An encoder fine-tuned for one loss, as in the thesis."""
    label = _of_file(f"{method if method in ABLATIONS else method.split()[0]}-{made_for.name}")
    fill = plan.fill("dataset_mean", made_for)
    encoder = tuned(plan, label, made_for.spec(plan.fold), fill, **plan.of_method(method))
    return plan.view(encoder, met, plan.fill("dataset_mean", met))


@lru_cache(maxsize=2)
def any_band_encoder(plan: Plan, method: str = ONE_FOR_ALL) -> AnyBandEncoder:
    """The encoder of this project, trained for no loss in particular; kept whole, so other benchmarks can take it."""
    mask, name = _drawn(plan), {ONE_FOR_ALL: "any", LONGER: "any_longer"}[method]
    aligned = tuned(plan, name, mask, RidgeLocalFill(plan.moments), **plan.of_method(method))
    folder = plan.folder / name.replace("_", "-").replace("any", "any-band") / weights_checksum(aligned)[:8]
    if not folder.exists():
        options = {"image_size": plan.card.image_size, "compute": plan.compute}
        gate = fit_gate(plan.teacher, aligned, plan.pack, plan.moments, mask, **options)
        card = replace(plan.card, name=f"{method}, fold {plan.fold}", parent=plan.card.name)
        any_band.save(AnyBandEncoder(plan.teacher, aligned, plan.moments, gate), card, mask, folder)
    return any_band.load(folder)[0]


def _drawn(plan: Plan) -> AnyMask:
    return AnyMask(DRAWN[0], DRAWN[1], draws.WHOLE, seed=plan.fold)


def _aligned(plan: Plan, loss: Loss) -> View:
    """The aligned copy behind the same fill, without the pre-trained encoder beside it."""
    return plan.view(any_band_encoder(plan).aligned, loss, plan.fill(BEST_FREE_VALUE, loss))


def tuned(
    plan: Plan,
    name: str,
    spec: MaskSpec | AnyMask,
    fill: masking.Fill,
    *,
    teacher: nn.Module | None = None,
    **options: Any,
) -> nn.Module:
    """A fine-tuned encoder, from its folder if it is there; its card says what it took."""
    decisive = {**plan.settings(), "mask": asdict(spec), "fill": fill_checksum(fill), **plain(options)}
    folder = plan.folder / "encoders" / f"{name}-{marked(decisive)}"
    if folder.exists():
        return encoders.load_encoder(folder)[0]
    checkpoint, start = plan.folder / "checkpoints" / f"{name}.pt", time.perf_counter()
    student, history = alignment.fine_tune(
        teacher or plan.teacher,
        plan.pack,
        spec,
        fill,
        image_size=plan.card.image_size,
        seed=plan.fold,
        compute=plan.compute,
        checkpoint=folds.checkpoint(checkpoint, plan.compute),
        **options,
    )
    images = int(options["epochs"]) * (len(plan.pack.rows("train")) // 64) * 64
    cost = {"images_forward": 2 * images, "images_backward": images}
    cost["seconds"] = round(time.perf_counter() - start, 1)
    card = replace(plan.card, name=name, parent=plan.card.name, mask=asdict(spec), notes=json.dumps(cost))
    print(f"{name}: {cost}; {history.iloc[-1].round(3).to_dict()}", flush=True)
    encoders.save_encoder(student, card, folder)
    for left in checkpoint.parent.glob(f"{name}-*.pt"):
        left.unlink()
    return encoders.load_encoder(folder)[0]


def plain(options: dict[str, Any]) -> dict[str, Any]:
    """Options as JSON can hold them."""
    return {key: asdict(value) if isinstance(value, Objective) else value for key, value in options.items()}


def marked(decisive: dict[str, Any]) -> str:
    """A short mark of all that decides a result, for its name."""
    return files.checksum_of(json.loads(json.dumps(decisive)))[:8]


def passes_for_all(epochs: int, any_epochs: int) -> dict[str, float]:
    """Encoder passes over a training image to be ready for every loss of the table; a fine-tuning step is worth four.

    Free methods take none.
    """
    found = dict.fromkeys(FREE, 0.0)
    for_each = 4.0 * epochs * len(FOR_ONE)
    trained = {**dict.fromkeys((THESIS_METHOD, FEATURES, *ABLATIONS), for_each), FOR_ANOTHER: 4.0 * epochs}
    for_all = {TWO_VIEWS: 7.0 * any_epochs, LONGER: 12.0 * any_epochs}
    return {**found, **dict.fromkeys((ONE_FOR_ALL, ALIGNED, AWARE), 4.0 * any_epochs), **for_all, **trained}
