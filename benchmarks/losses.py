"""What breaks in the tables of docs/findings.md: the thesis' masks, few bands left, other shapes, whole bands."""

from __future__ import annotations

from dataclasses import dataclass, replace

from bandmask import bands
from bandmask.masking import MaskSpec


@dataclass(frozen=True)
class Loss:
    """Bands, how much of them is gone, and in which shape."""

    name: str
    bands: tuple[str, ...]
    ratio: float = 0.9
    shape: str = "pixel"

    def spec(self, seed: int = 0, value: str = "dataset_mean") -> MaskSpec:
        return MaskSpec(self.bands, self.ratio, value, seed=seed, shape=self.shape)


def _without(*visible: str) -> tuple[str, ...]:
    return tuple(name for name in bands.NAMES if name not in visible)


COMPLETE = Loss("none", ())
THESIS = [Loss(mask, bands.resolve_mask(mask)) for mask in bands.THESIS_MASKS if mask != "none"]
FEW = [  # few bands are left: where imputation is weak
    Loss("only B02 B03 B04 B08 left", _without("B02", "B03", "B04", "B08"), 1.0, "band"),
    Loss("only B02 B04 left", _without("B02", "B04"), 1.0, "band"),
    Loss("only B08 B11 B12 left", _without("B08", "B11", "B12"), 1.0, "band"),
    Loss("only B05 B12 left", _without("B05", "B12"), 1.0, "band"),
    Loss("only B8A left", _without("B8A"), 1.0, "band"),
]
ODD = [  # faults that follow no model of single pixels
    Loss("B02 B03 B04 striped", ("B02", "B03", "B04"), 0.9, "stripe"),
    Loss("B08 B8A B09 B10 B11 packets", ("B08", "B8A", "B09", "B10", "B11"), 0.75, "block"),
    Loss("all but B10 under cloud", _without("B10"), 0.5, "cloud"),
]
WHOLE = [replace(loss, name=f"{loss.name} whole", ratio=1.0, shape="band") for loss in THESIS]
LOSSES = [*THESIS, *FEW, *ODD, *WHOLE]
KINDS = {"thesis masks": THESIS, "few left": FEW, "other shapes": ODD, "thesis masks, whole bands": WHOLE}
