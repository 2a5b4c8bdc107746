"""Sentinel-2 bands are named, never numbered; a number means another band in every file order.

The table, the channel orders of the data sets, the thesis' mask sets, composites and indices. No torch here.
Source: facts collected from ESA's Sentinel-2 user guide, Petcu 2024 (Table A.1) and opened files.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

DN_PER_REFLECTANCE = 10_000.0  # of L1C and L2A, once the offset of processing baseline 04.00 is taken off


@dataclass(frozen=True)
class Band:
    """One spectral band: ESA name, common name, centre wavelength in nm, native resolution in m, thesis label."""

    name: str
    common_name: str
    wavelength_nm: int
    gsd_m: int
    thesis: str

    @property
    def label(self) -> str:
        """For people: `B08 · nir · 842 nm`."""
        return f"{self.name} · {self.common_name} · {self.wavelength_nm} nm"


# In SatCLIP's channel order, which is the order of every pack and every encoder of this project.
BANDS: tuple[Band, ...] = (
    Band("B01", "coastal", 443, 60, "B1"),
    Band("B02", "blue", 490, 10, "B2"),
    Band("B03", "green", 560, 10, "B3"),
    Band("B04", "red", 665, 10, "B4"),
    Band("B05", "rededge1", 705, 20, "B5"),
    Band("B06", "rededge2", 740, 20, "B6"),
    Band("B07", "rededge3", 783, 20, "B7"),
    Band("B08", "nir", 842, 10, "B8"),
    Band("B8A", "nir08", 865, 20, "B9"),
    Band("B09", "nir09", 945, 60, "B10"),
    Band("B10", "cirrus", 1375, 60, "B11"),
    Band("B11", "swir16", 1610, 20, "B12"),
    Band("B12", "swir22", 2190, 20, "B13"),
)
NAMES: tuple[str, ...] = tuple(band.name for band in BANDS)
BY_NAME: dict[str, Band] = {band.name: band for band in BANDS}
BY_LABEL: dict[str, Band] = {band.thesis: band for band in BANDS}

# Channel order of the files as stored. EuroSAT's GeoTIFFs hold B8A last (confirmed on 1,357 real files: the
# channel with a mean near 11 DN, cirrus, is the tenth).
ORDERS: dict[str, tuple[str, ...]] = {
    "satclip": NAMES,
    "sen12ms": NAMES,
    "eurosat": (*NAMES[:8], "B09", "B10", "B11", "B12", "B8A"),
}

SCHEMES = ("named", "position", "esa")

# The 12 mask sets of the thesis, in its own labels (§3.1.2, Tables 4.1-4.4).
_SETS = "none, B2, B8, B11, B2 B11, B2 B8, B8 B11, B2 B3 B4, B2 B8 B11, B2 B4 B8 B11, B4 B8 B9 B13, B8 B9 B10 B11 B12"
THESIS_MASKS: tuple[str, ...] = tuple(_SETS.split(", "))

# Which bands answer to which part of the spectrum; every band is in one group.
GROUPS: dict[str, tuple[str, ...]] = {
    "visible": ("B02", "B03", "B04"),
    "red edge": ("B05", "B06", "B07"),
    "NIR": ("B08", "B8A"),
    "SWIR": ("B11", "B12"),
    "atmosphere": ("B01", "B09", "B10"),  # 60 m: aerosol, water vapour, cirrus
}

# Red, green and blue channel of well-known composites.
COMPOSITES: dict[str, tuple[str, str, str]] = {
    "true colour": ("B04", "B03", "B02"),
    "colour infrared": ("B08", "B04", "B03"),
    "swir": ("B12", "B8A", "B04"),
    "agriculture": ("B11", "B08", "B02"),
    "moisture": ("B8A", "B11", "B12"),
}

# Normalised differences (a - b) / (a + b).
INDICES: dict[str, tuple[str, str]] = {
    "ndvi": ("B08", "B04"),
    "ndwi": ("B03", "B08"),
    "mndwi": ("B03", "B11"),
    "ndmi": ("B8A", "B11"),
    "ndbi": ("B11", "B08"),
}

_SPELLING = re.compile(r"^B?0*(\d{1,2})(A?)$", re.IGNORECASE)


def parse_bands(bands: str | Iterable[str]) -> tuple[str, ...]:
    """ESA names, without repeats and in SatCLIP order, from `"B2 B8"`, `["B02", "B8A"]` or common names.

    Numbers are ESA's: `B11` is SWIR 1. The thesis' labels are another thing: see `resolve_mask`. A ValueError of an
    unknown band lists what exists.
    """
    found = {parse_band(word) for word in words_of(bands)}
    return tuple(name for name in NAMES if name in found)


def parse_band(word: str) -> str:
    """ESA name of one band, from `B8`, `b08`, `nir`; a `ValueError` that lists what exists otherwise."""
    if name := _known(word):
        return name
    available = ", ".join(f"{band.name} ({band.common_name})" for band in BANDS)
    raise ValueError(f"unknown band {word!r}; available, by name: {available}")


def words_of(bands: str | Iterable[str]) -> list[str]:
    """Spellings of bands one by one, from `"B2, B8"`, `"B2_B8"`, a list, or bands themselves; none of `none`."""
    given = [bands] if isinstance(bands, Band) or not isinstance(bands, Iterable) else bands
    split = re.split(r"[\s,;+_]+", bands.strip()) if isinstance(bands, str) else given
    words = [word.name if isinstance(word, Band) else word for word in split]
    return [] if words in ([""], ["none"]) else words


def resolve_mask(mask: str | Sequence[str], scheme: str = "named", order: str = "satclip") -> tuple[str, ...]:
    """ESA names of the bands that a mask set hides.

    Args:
        mask: `"B8 B11"`, `"B8_B11"` or `"none"`.
        scheme: how labels are read. `named`: the thesis' Table A.1 (`B9` is B8A, `B11` is cirrus); the same
            physical band in every data set. `position`: label n is the n-th channel of the file as stored, which
            is what counting channels does. `esa`: ESA or common names, for masks of one's own.
        order: the file order that `position` counts in, a key of `ORDERS`.

    A ValueError of an unknown scheme, order or label lists what exists.
    """
    if scheme not in SCHEMES:
        raise ValueError(f"unknown mask scheme {scheme!r}; available: {', '.join(SCHEMES)}")
    stored = file_order(order)
    if scheme == "esa":
        return parse_bands(mask)
    by_label = dict(zip(BY_LABEL, NAMES if scheme == "named" else stored, strict=True))
    if unknown := [word for word in words_of(mask) if _thesis_label(word) not in by_label]:
        available = f"available: {', '.join(by_label)}; names (B8A, nir) have scheme 'esa'"
        raise ValueError(f"unknown thesis label {unknown[0]!r}; {available}")
    return parse_bands([by_label[_thesis_label(word)] for word in words_of(mask)])


def _thesis_label(word: str) -> str:
    """As the thesis writes it, without zeros: `b08` is `B8`."""
    return re.sub(r"^B0*(?=\d)", "B", word.strip().upper())


def two_readings(mask: str | Iterable[str]) -> str:
    """Labels that mean one band in ESA's names and another in the thesis, a line each; "" where none does.

    `B11 is swir16 (B11) in ESA's names, cirrus (B10) in the thesis' Table A.1`.
    """
    lines = []
    for word in words_of(mask):
        label = _thesis_label(word)
        thesis, esa = BY_LABEL.get(label), BY_NAME.get(f"B{label[1:]:0>2}")
        if thesis and thesis is not esa:
            other = f"{esa.common_name} ({esa.name})" if esa else "no band"
            here = f"{thesis.common_name} ({thesis.name}) in the thesis' Table A.1"
            lines.append(f"{word} is {other} in ESA's names, {here}")
    return "\n".join(lines)


def mask_slug(mask: str, scheme: str = "named") -> str:
    """Folder name of a mask set: `B2_B8_B11`, `B11-position`, `B11-esa`; `B8`, the same in both readings, has one."""
    words = words_of(mask)
    if scheme == "esa" and not two_readings(words):
        plain = [_thesis_label(word) for word in words]
        if set(plain) <= BY_LABEL.keys():
            words, scheme = plain, "named"
    slug = "_".join(words) or "none"
    return slug if scheme == "named" or slug == "none" else f"{slug}-{scheme}"


def channel_indices(names: Iterable[str]) -> list[int]:
    """0-based channel of each band in SatCLIP order."""
    return [NAMES.index(parse_band(name)) for name in names]


def nearest(channel: int) -> list[int]:
    """The other channels, nearest in wavelength first and cirrus, which sees no ground, last."""
    others = [other for other in range(len(BANDS)) if other != channel]
    away = {c: abs(BANDS[c].wavelength_nm - BANDS[channel].wavelength_nm) for c in others}
    return sorted(others, key=lambda c: (NAMES[c] == "B10", away[c]))


def named(labels: Iterable[object]) -> list[str | None]:
    """ESA name of each label that an array or a file carries, None of one that names no band.

    Labels that count channels (1, 2, 3; B1, B2, B3; B01 to B09 without B8A) name none: they mean another band in every
    file order, which somebody has to say.
    """
    words = [str(label).strip() for label in labels]
    if _counted(words, 2) or any(word.isdigit() for word in words):
        return [None] * len(words)
    return [_known(word) for word in words]


def _known(word: object) -> str | None:
    lowered = word.strip().lower() if isinstance(word, str) else ""  # a number could be a position
    if match := _SPELLING.match(lowered):
        lowered = f"B{int(match[1])}A" if match[2] else f"B{int(match[1]):02d}"
    return next((band.name for band in BANDS if lowered in (band.name, band.common_name)), None)


def _counted(words: Sequence[str], beyond: int) -> bool:
    """Whether words count channels from 1 on: more than so many, or in ESA's spelling past the place of B8A."""
    numbers = [int(match[1]) for word in words if (match := re.fullmatch(r"B?(\d+)", word, re.IGNORECASE))]
    beyond = 8 if "B01" in words else beyond
    in_a_row = len(numbers) > beyond and numbers == [*range(1, len(numbers) + 1)]
    return in_a_row and not any(word.upper() in ("B8A", "B08A", "8A", "NIR08") for word in words)


def code_of(visible: str | Iterable[str]) -> int:
    """Code of the subset in which these bands are visible: bit i is set if band i of `NAMES` is; 8191 is all."""
    return sum(1 << channel for channel in channel_indices(parse_bands(visible)))


def ordered(names: str | Iterable[str]) -> tuple[str, ...]:
    """ESA names of channels that are given in any spelling, in their order.

    A ValueError of no names, or of names that have no order, count channels, or occur twice.
    """
    words = list(map(str, words_of(names)))
    if not words or isinstance(names, set | frozenset):
        raise ValueError(f"say which bands, in their order, as 'B04 B08' or a list; got {names!r}")
    if "B01" not in words and _counted(words, 2 if "".join(words).isdigit() else 8):
        todo = "give ESA's names in the array's order, B01 (not B1) for its first"
        raise ValueError(f"{words[0]} … {words[-1]} count channels; {todo}")  # other bands in every file order
    found = tuple(map(parse_band, words))
    if len(set(found)) != len(found):
        count = len(found)
        raise ValueError(f"{count} channels need {count} different names; got {count}: {' '.join(found)}")
    return found


def channels_of(shape: Sequence[int], names: str | Iterable[str] | None = None) -> tuple[str, ...]:
    """ESA names of the channels of an array (k, H, W) or (B, k, H, W), in its order.

    `names` are those of `ordered`; without them the array has all 13, in SatCLIP order. A ValueError of an array
    without bands first, or of names that don't fit it.
    """
    if len(shape) not in (3, 4):
        raise ValueError(f"an array of bands is (k, H, W) or (B, k, H, W), bands before rows; got {tuple(shape)}")
    count = shape[-3]
    if names is None and count != len(NAMES):
        every = f"without names an array has all {len(NAMES)}, bands before rows: {' '.join(NAMES)}"
        raise ValueError(f"{count} channels, of {tuple(shape)}: give their names in order, 'B02 B03 B04'; {every}")
    found = NAMES if names is None else ordered(names)
    if len(found) != count:
        raise ValueError(f"{count} channels need {count} different names; got {len(found)}: {' '.join(found)}")
    return found


def file_order(name: str) -> tuple[str, ...]:
    """Channels of a file order; a `ValueError` that lists the orders if there is none of that name."""
    if name not in ORDERS:
        raise ValueError(f"unknown channel order {name!r}; available: {', '.join(ORDERS)}")
    return ORDERS[name]


def reorder(order: str, target: str = "satclip") -> list[int]:
    """Channel indices that bring an image stored in `order` into `target`: `image[reorder("eurosat")]`."""
    stored = file_order(order)
    return [stored.index(name) for name in file_order(target)]
