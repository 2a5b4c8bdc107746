"""What the codes of a land-cover raster mean: codes become classes, or no label, never something else in silence.

Source: MODIS MCD12Q1 Collection 6, Tables 3 and 8 to 10 of its user guide (Sulla-Menashe & Friedl 2018,
https://lpdaac.usgs.gov/documents/101/MCD12_User_Guide_V6.pdf; the same codes in Earth Engine's catalogue,
`MODIS/006/MCD12Q1`); the simplified IGBP scheme: Yokoya et al. 2020 (IEEE GRSS Data Fusion Contest 2020).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from bandmask.packs import IGNORE


@dataclass(frozen=True)
class Legend:
    """A labelling scheme: band of the land-cover file (1-based), class names, and the class of each code."""

    band: int
    classes: tuple[str, ...]
    codes: dict[int, int]  # code: class, or IGNORE where the legend itself says that there is no label

    def target(self, codes: np.ndarray) -> tuple[np.ndarray, dict[str, int]]:
        """Classes (H, W) uint8, `IGNORE` where there is none, and how many pixels hold each code outside the legend.

        Args:
            codes: (H, W), any integer type.

        Raises:
            ValueError: not integers.
        """
        if not np.issubdtype(codes.dtype, np.integer):
            raise ValueError(f"land-cover codes are {codes.dtype}; expected integers")
        table = np.full(256, IGNORE, np.uint8)
        known = np.zeros(256, bool)
        for code, label in self.codes.items():
            table[code], known[code] = label, True
        codes = codes.astype(np.int64)
        low = codes.clip(0, 255)
        outside = ~known[low] | (low != codes)
        target = table[low]
        target[outside] = IGNORE
        values, numbers = np.unique(codes[outside], return_counts=True) if outside.any() else ((), ())
        return target, {f"code {value}": int(number) for value, number in zip(values, numbers, strict=True)}


SIMPLIFIED = (
    "Forest",
    "Shrubland",
    "Savanna",
    "Grassland",
    "Wetlands",
    "Croplands",
    "Urban/Built-up",
    "Snow/Ice",
    "Barren",
    "Water",
)
NINE_CLASSES = tuple(name for name in SIMPLIFIED if name != "Savanna")

_IGBP_TO_SIMPLIFIED = (1, 1, 1, 1, 1, 2, 2, 3, 3, 4, 5, 6, 7, 6, 8, 9, 10)  # of IGBP 1..17, counted from 1
_IGBP = {
    1: "Evergreen Needleleaf Forests",
    2: "Evergreen Broadleaf Forests",
    3: "Deciduous Needleleaf Forests",
    4: "Deciduous Broadleaf Forests",
    5: "Mixed Forests",
    6: "Closed Shrublands",
    7: "Open Shrublands",
    8: "Woody Savannas",
    9: "Savannas",
    10: "Grasslands",
    11: "Permanent Wetlands",
    12: "Croplands",
    13: "Urban and Built-up Lands",
    14: "Cropland/Natural Vegetation Mosaics",
    15: "Permanent Snow and Ice",
    16: "Barren",
    17: "Water Bodies",
}
_BARE = {1: "Barren", 2: "Permanent Snow and Ice", 3: "Water Bodies"}
_LAND_COVER = {
    **_BARE,
    11: "Evergreen Needleleaf Forests",
    12: "Evergreen Broadleaf Forests",
    13: "Deciduous Needleleaf Forests",
    14: "Deciduous Broadleaf Forests",
    15: "Mixed Broadleaf/Needleleaf Forests",
    16: "Mixed Broadleaf Evergreen/Deciduous Forests",
    21: "Open Forests",
    22: "Sparse Forests",
    31: "Dense Herbaceous",
    32: "Sparse Herbaceous",
    41: "Dense Shrublands",
    42: "Shrubland/Grassland Mosaics",
    43: "Sparse Shrublands",
}
_LAND_USE = {
    **_BARE,
    9: "Urban and Built-up Lands",
    10: "Dense Forests",
    20: "Open Forests",
    25: "Forest/Cropland Mosaics",
    30: "Natural Herbaceous",
    35: "Natural Herbaceous/Croplands Mosaics",
    36: "Herbaceous Croplands",
    40: "Shrublands",
}
_HYDROLOGY = {
    **_BARE,
    10: "Dense Forests",
    20: "Open Forests",
    27: "Woody Wetlands",
    30: "Grasslands",
    40: "Shrublands",
    50: "Herbaceous Wetlands",
    51: "Tundra",
}


def _legend(band: int, names: dict[int, str], *no_label: int) -> Legend:
    codes = {code: label for label, code in enumerate(names)}
    return Legend(band, tuple(names.values()), {**codes, **dict.fromkeys(no_label, IGNORE)})


# Bands of SEN12MS' lc files; 255 is MODIS' fill value, and 0 of IGBP is unclassified in the contest's mapping.
LEGENDS: dict[str, Legend] = {
    "igbp-simplified": Legend(
        1,
        SIMPLIFIED,
        {code: number - 1 for code, number in enumerate(_IGBP_TO_SIMPLIFIED, 1)} | {0: IGNORE, 255: IGNORE},
    ),
    "igbp": _legend(1, _IGBP, 0, 255),
    "lccs-land-cover": _legend(2, _LAND_COVER, 255),
    "lccs-land-use": _legend(3, _LAND_USE, 255),
    "lccs-hydrology": _legend(4, _HYDROLOGY, 255),
}

# Semi-manual labels of the Data Fusion Contest 2020: simplified IGBP counted from 1, 0 is background.
DFC2020 = Legend(1, SIMPLIFIED, {0: IGNORE} | {number: number - 1 for number in range(1, 11)})


def legend_of(labels: str) -> Legend:
    """The labelling scheme of that name; a `ValueError` that lists them if there is none."""
    if labels not in LEGENDS:
        raise ValueError(f"unknown labels {labels!r}; available: {', '.join(LEGENDS)}")
    return LEGENDS[labels]


def without_savanna(target: np.ndarray) -> np.ndarray:
    """Simplified classes in the nine-class form of the contest's published models: savanna has no label there.

    Args:
        target: uint8 classes of `SIMPLIFIED`.

    Returns:
        uint8 classes of `NINE_CLASSES`, `IGNORE` where the target is savanna or has no label.

    Raises:
        ValueError: classes beyond `SIMPLIFIED`.
    """
    if np.any(wrong := (target >= len(SIMPLIFIED)) & (target != IGNORE)):
        raise ValueError(f"classes {np.unique(target[wrong])[:5].tolist()} are none of the ten of 'igbp-simplified'")
    savanna = SIMPLIFIED.index("Savanna")
    nine = np.where(target > savanna, target - 1, target)
    return np.where((target == savanna) | (target == IGNORE), IGNORE, nine).astype(np.uint8)
