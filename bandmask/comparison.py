"""Methods side by side, before the head in service, which is kept, and before one retrained: notebooks 04 and 05."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
from torch import Tensor, nn

from bandmask import any_band, bands, datasets, encoders, fills, params, results
from bandmask.batches import Batch
from bandmask.evaluation import KEPT, WATCHED, Heads, Task, View, free_view, in_service, predict, train, training_of
from bandmask.masks import Fill, MaskSpec, mask_batch
from bandmask.packs import Pack
from bandmask.train import Compute


def method_views(
    methods: Sequence[str],
    complete: View,
    spec: MaskSpec,
    pack: Pack,
    fill: Fill,
    folder: Path,
    seeds: Sequence[int] = (0,),
    *,
    learnt: Sequence[str] | None = None,
    compute: Compute | None = None,
) -> dict[tuple[str, int], View]:
    """What each method sees of incomplete images, by its name and encoder seed (−1: nothing was fine-tuned).

    Args:
        methods: `pre-trained` and `fine-tuned` have `fill` in hidden pixels; `any-band` sees NaN there, and so does the
            pre-trained encoder itself in `native`, if it takes gaps; `nearest`, `local`, `ridge` and `ridge_local` are
            the pre-trained encoder behind that fill, fitted to `pack`; `mapped` and `native mapped` are `ridge_local`
            and `native` with `heads.with_map`, fitted to `pack`.
        complete: the pre-trained encoder on complete images.
        spec: what is hidden, the same pixels for all; where it is nothing, there are no views.
        folder: of the run, with `encoder-seed<n>`; `any-band` lies beside it.
        seeds: of fine-tuned encoders.
        learnt: bands that these learnt to miss, where they are others than those of `spec`.

    A ValueError of an unknown method, or an encoder that was fine-tuned for another mask, or doesn't take gaps.
    """
    masked, views = replace(complete, spec=spec), {}
    for method in methods if spec.bands else ():
        for seed in seeds if method in ("fine-tuned", "any-band") else (-1,):
            view = replace(masked, fill=fill)
            if method == "any-band":
                model: nn.Module = any_band.load(folder.parent / "any-band" / f"encoder-seed{seed}")[0]
                view = replace(masked, encoder=model, fill=any_band.MISSING)
            elif method == "fine-tuned":
                model, card = encoders.load_encoder(folder / f"encoder-seed{seed}")
                found = replace(MaskSpec(**(card.mask or {})), schedule=spec.schedule, seed=spec.seed)
                if found != replace(spec, bands=tuple(learnt or spec.bands)):
                    raise ValueError(f"{folder} holds an encoder for {found}; run notebooks/03_fine_tuning.ipynb anew")
                view = replace(view, encoder=model)
            elif method != "pre-trained":
                view = free_view(method, complete, spec, pack, compute)
            views[method, seed] = view
    return views


class Compared(NamedTuple):
    """Methods on the same test images in every protocol.

    Tables have `protocol`, `method` and `encoder_seed`, which is missing where nothing was fine-tuned.
    """

    scored: pd.DataFrame  # tidy test scores
    predictions: pd.DataFrame
    history: pd.DataFrame
    service: Heads


@dataclass(frozen=True)
class Setup:
    """What the parameters of notebook 04 or 05 come down to; printed, it says what is hidden from which encoder."""

    task: Task
    parameters: Mapping[str, Any]  # all of the notebook's
    folder: Path  # `outputs/<experiment>/<mask>`
    pack: Pack  # what is classified or segmented
    encoder: str  # name of the pre-trained one
    spec: MaskSpec  # what is hidden
    fill: Fill  # what stands there
    complete: View  # the pre-trained encoder on complete images
    views: Mapping[tuple[str, int], View]  # of `method_views`
    compute: Compute
    note: str = ""  # what a reader of the figures must know

    @classmethod
    def of(cls, task: Task, parameters: Mapping[str, Any]) -> Setup:
        """Open what parameters name; errors are those of `method_views` and of what opens data and encoders."""
        p, dense = params.complete(results.MAKERS[task], parameters), task == "segmentation"
        if dense and (of_embeddings := [method for method in p["methods"] if method.endswith("mapped")]):
            raise ValueError(f"{', '.join(of_embeddings)} maps embeddings, which no decoder sees; take ridge")
        compute, folder = Compute.of(p["device"]), params.run_folder(p["experiment"], p["mask"], p["mask_scheme"])
        tuned_on = datasets.open_dataset(p["dataset"])
        pack = datasets.open_dataset(p["segmentation_dataset"]) if dense else tuned_on
        source = params.encoder_source(p["experiment"], p["encoder"])
        encoder, card = encoders.load_encoder(source, weights=p["weights"] or None)
        pack.require_complete(card.name, encoders.needs(encoder))
        scheme = p["mask_scheme"]
        lost, learnt = (bands.resolve_mask(p["mask"], scheme, of.card["stored_order"]) for of in (pack, tuned_on))
        spec = MaskSpec(lost, p["mask_ratio"], p["mask_value"], shape=p["mask_shape"])
        fill = fills.make_fill(spec.value, tuned_on, lost)  # as in 03
        side, size = ("segmentation_image_size", p["decoder_batch_size"]) if dense else ("image_size", 64)
        complete = View(encoder, image_size=p[side], batch_size=size)
        given = complete, spec, pack, fill, folder, p["seeds"]
        views = method_views(p["methods"], *given, learnt=learnt, compute=compute)
        said = [pack.card.get("label_note", ""), bands.two_readings(p["mask"]) if scheme != "position" else ""]
        said += [f"fine-tuned encoders learnt to miss {' '.join(learnt)}: others than these"] * (learnt != lost)
        note = "\n".join(filter(None, said))
        return cls(task, p, folder, pack, card.name, spec, fill, complete, views, compute, note)

    def __str__(self) -> str:
        """What is hidden from which encoder, and what a reader must know."""
        lost = " ".join(self.spec.bands) or "nothing"
        return f"{self.encoder} on {self.pack.path.name}; hidden: {lost}\n{self.note}".strip()

    def lossy(self, batch: Batch) -> Tensor:
        """A batch as the pre-trained encoder gets it: the mask value in hidden pixels."""
        return mask_batch(batch.images, batch.samples, self.spec, self.fill)

    def compare(self) -> Compared:
        """Each method behind the head in service, which is kept, and with a head of its own, retrained.

        Results and predictions are written to the run's folder. With mask none the head in service is made anew at
        need; complete images are left out of the results of other runs.
        """
        training, compute = training_of(self.task, self.parameters), self.compute
        predictions: list[pd.DataFrame] = []
        curves: list[pd.DataFrame] = []

        def judge(heads: Heads, view: View, protocol: str, method: str, seed: int, *learnt: pd.DataFrame) -> None:
            named: dict[str, Any] = {"protocol": protocol, "method": method}
            named["encoder_seed"] = pd.NA if seed < 0 else seed
            said = predict(view, heads, self.pack, compute=compute)
            predictions.append(said.assign(**named).astype({"encoder_seed": "Int64"}))
            curves.extend(one.assign(**named).astype({"encoder_seed": "Int64"}) for one in learnt)

        of = (self.parameters["experiment"], self.task, self.complete, self.pack)
        service, history = in_service(*of, training, replace=not self.spec.bands, compute=compute)
        judge(service, self.complete, "complete", "pre-trained", -1, history)
        for (method, seed), view in self.views.items():
            judge(service, view, "kept", method, seed)
            name = f"{KEPT[self.task]}_{method}{'' if seed < 0 else f'-seed{seed}'}.pt"
            about: dict[str, Any] = {"checkpoint": self.folder / "checkpoints" / name, "compute": compute}
            about |= {"label": f"{self.task}, {method}, on incomplete images", **training}
            own, history = train(self.task, view, self.pack, **about)
            judge(own, view, "retrained", method, seed, history)
        history = pd.concat(curves, ignore_index=True)
        return Compared(*self._write(pd.concat(predictions, ignore_index=True), history), history, service)

    def _write(self, predictions: pd.DataFrame, curves: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
        """Write results and predictions; gives test scores, and predictions."""
        p, spec = self.parameters, self.spec
        known = {"mask": p["mask"].replace("_", " "), "scheme": p["mask_scheme"]}
        common = {name: p[name] for name in ("experiment", "mask_value")} | known | {"task": self.task}
        common |= {"dataset": p["segmentation_dataset" if self.task == "segmentation" else "dataset"]}
        common |= {"encoder": self.encoder, "bands": " ".join(spec.bands), "schedule": "constant"}
        common |= {"ratio": spec.ratio, "shape": spec.shape}
        keys = ["epoch", "head_seed", "protocol", "method", "encoder_seed", "split"]
        learnt = curves.assign(split="val").melt(keys, list(WATCHED[self.task]), "metric", "value")
        scored = [{**row, "split": "test"} for row in results.score_predictions(predictions, self.pack.classes)]
        table = results.tidy([*learnt.to_dict("records"), *scored], **common)  # type: ignore[list-item]
        table = table[table["protocol"] != "complete"] if spec.bands else table
        kept = predictions.assign(**known)
        for written, name in zip((table, kept), params.TASK_FILES[self.task][1:], strict=True):
            results.write_table(written, self.folder / name)
        return results.tidy(scored, **common), kept
