"""One fine-tuning, from the parameters of notebook 03 to its checkpoints, in one process or in several.

The notebook and the ranks of `distributed` build it here, so that the checkpoint which ranks wrote is the one that
the notebook finds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
from torch import nn

from bandmask import bands, datasets, encoders, fills, masking, params
from bandmask.alignment import fine_tune
from bandmask.objectives import Objective
from bandmask.packs import Pack
from bandmask.training import Compute

NOTEBOOK = "03_fine_tuning"


@dataclass(frozen=True)
class Tuning:
    """What the parameters of a run come down to.

    Attributes:
        parameters: of notebook 03, all of them.
        folder: `outputs/<experiment>/<mask>`.
        pack: images.
        teacher: the pre-trained encoder.
        card: its card.
        hidden_bands: ESA names.
        value: mask value, as `MaskSpec` takes it.
        fill: what is written over hidden pixels: a reflectance a band, (13,), or a function fitted to `pack`.
        epochs: of one band or of several.
    """

    parameters: Mapping[str, Any]
    folder: Path
    pack: Pack
    teacher: nn.Module
    card: encoders.Card
    hidden_bands: tuple[str, ...]
    value: str | float
    fill: masking.Fill
    epochs: int

    @classmethod
    def of(cls, parameters: Mapping[str, Any]) -> Tuning:
        """Open what the parameters name; the pack is made first if needed.

        Args:
            parameters: any of notebook 03's; others are ignored, missing ones have the notebook's defaults.

        Raises:
            ValueError: a value that is not among the valid ones.
            FileNotFoundError: data or encoder are not on this machine.
        """
        given = complete(parameters)
        pack = datasets.open_dataset(given["dataset"])
        source = params.encoder_source(given["experiment"], given["encoder"])
        teacher, card = encoders.load_encoder(source, weights=given["weights"] or None)
        hidden = bands.resolve_mask(given["mask"], given["mask_scheme"], pack.card["stored_order"])
        value = masking.parse_value(given["mask_value"])
        return cls(
            parameters=given,
            folder=params.run_folder(given["experiment"], given["mask"], given["mask_scheme"]),
            pack=pack,
            teacher=teacher,
            card=card,
            hidden_bands=hidden,
            value=value,
            fill=fills.make_fill(value, pack, hidden),
            epochs=given["epochs_one_band" if len(hidden) <= 1 else "epochs_several_bands"],
        )

    def spec(self, seed: int, *, scheduled: bool = True) -> masking.MaskSpec:
        """What training hides under a seed; not `scheduled`: what hides at the end of the schedule, as tests do."""
        given = self.parameters
        ratio, shape = given["mask_ratio"], given["mask_shape"]
        final = masking.MaskSpec(self.hidden_bands, ratio, self.value, seed=seed, shape=shape)
        if not scheduled:
            return final
        return replace(
            final,
            schedule=given["mask_schedule"],
            start_ratio=given["mask_start_ratio"],
            stairs=given["mask_stairs"],
        )

    def fine_tune(
        self, seed: int, *, compute: Compute, restart: bool = False, progress: bool = True
    ) -> tuple[nn.Module, pd.DataFrame]:
        """The student of one seed and its history; from its checkpoint as far as that goes.

        Args:
            seed: of order, augmentation and hidden pixels.
            compute: device and precision.
            restart: begin anew.
            progress: show it.
        """
        given = self.parameters
        return fine_tune(
            self.teacher,
            self.pack,
            self.spec(seed),
            self.fill,
            epochs=self.epochs,
            batch_size=given["batch_size"],
            image_size=given["image_size"],
            lr=given["lr"],
            objective=Objective.of(given["align"], distance=given["align_distance"]),
            batch_norm=given["batch_norm"],
            weight_decay=given["weight_decay"],
            seed=seed,
            compute=compute,
            checkpoint=self.folder / "checkpoints" / f"fine_tuning-seed{seed}.pt",
            restart=restart,
            settings={"teacher": self.card.name, "teacher_data": self.card.data, "weights": given["weights"]},
            progress=progress,
        )


def complete(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Every parameter of notebook 03: as given, else its default there."""
    return params.complete(NOTEBOOK, parameters)
