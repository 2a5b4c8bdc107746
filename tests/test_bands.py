"""Bands are named: the table, the file orders, the thesis' masks in each scheme, and every spelling people use."""

import itertools
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bandmask import bands, files

# name, common name, nm, native m, thesis label: facts.md §1, typed in anew
TABLE = """
B01 coastal  443 60 B1
B02 blue     490 10 B2
B03 green    560 10 B3
B04 red      665 10 B4
B05 rededge1 705 20 B5
B06 rededge2 740 20 B6
B07 rededge3 783 20 B7
B08 nir      842 10 B8
B8A nir08    865 20 B9
B09 nir09    945 60 B10
B10 cirrus  1375 60 B11
B11 swir16  1610 20 B12
B12 swir22  2190 20 B13
"""

# thesis mask -> what it hides read by Table A.1 (and by position in SEN12MS), and by position in EuroSAT's files
HIDES = {
    "none": ("", ""),
    "B2": ("B02", "B02"),
    "B8": ("B08", "B08"),
    "B11": ("B10", "B11"),
    "B2 B11": ("B02 B10", "B02 B11"),
    "B2 B8": ("B02 B08", "B02 B08"),
    "B8 B11": ("B08 B10", "B08 B11"),
    "B2 B3 B4": ("B02 B03 B04", "B02 B03 B04"),
    "B2 B8 B11": ("B02 B08 B10", "B02 B08 B11"),
    "B2 B4 B8 B11": ("B02 B04 B08 B10", "B02 B04 B08 B11"),
    "B4 B8 B9 B13": ("B04 B08 B8A B12", "B04 B08 B8A B09"),
    "B8 B9 B10 B11 B12": ("B08 B8A B09 B10 B11", "B08 B09 B10 B11 B12"),
}

subsets = st.sets(st.sampled_from(bands.NAMES))


def spellings(name: str) -> list[str]:
    """Ways to write a band that mean this band and no other."""
    short = name.replace("B0", "B")
    return [name, name.lower(), short, short.lower(), short[1:], name[1:], bands.BY_NAME[name].common_name.upper()]


def test_the_table_is_sentinel_2s() -> None:
    rows = [line.split() for line in TABLE.strip().splitlines()]
    assert [[b.name, b.common_name, str(b.wavelength_nm), str(b.gsd_m), b.thesis] for b in bands.BANDS] == rows


def test_eurosat_files_are_reordered_so_that_b8a_comes_ninth() -> None:
    indices = bands.reorder("eurosat")
    assert indices == [0, 1, 2, 3, 4, 5, 6, 7, 12, 8, 9, 10, 11]
    stored = np.array(["B01", "B02", "B03", "B04", "B05", "B06", "B07", "B08", "B09", "B10", "B11", "B12", "B8A"])
    assert tuple(stored[indices]) == bands.NAMES
    for first, second in itertools.product(bands.ORDERS, repeat=2):
        assert [bands.reorder(first, second)[i] for i in bands.reorder(second, first)] == list(range(13))
    assert bands.channel_indices(["B8A", "cirrus"]) == [8, 10]


@given(subsets, st.data())
def test_any_spelling_in_any_order_is_the_same_set_of_bands(subset: set[str], data: st.DataObject) -> None:
    expected = tuple(name for name in bands.NAMES if name in subset)
    words = [data.draw(st.sampled_from(spellings(name))) for name in sorted(subset)]
    words = data.draw(st.permutations(words + words[:2]))  # repeats don't matter
    assert bands.parse_bands(words) == expected
    assert bands.parse_bands(data.draw(st.sampled_from([" ", ",", ", ", ";", "+"])).join(words)) == expected
    assert bands.parse_bands(expected) == bands.parse_bands(" ".join(expected)) == expected
    assert bands.parse_bands([bands.BANDS[3], "B02"]) == ("B02", *bands.parse_bands(bands.BANDS[3]))
    assert all(bands.parse_bands(nothing) == () for nothing in ("", " ", "none", [], ["none"], ()))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        *((w, "unknown band") for w in ("B13", "B00", "B0", "0", "B8B", "B1A", "B09A", "B-1", "B2.0")),
        ("red-edge1 B02", "unknown band 'red-edge1'; available.*rededge1"),
        *((nothing, "unknown band") for nothing in (None, 8)),
        *(([number], "by name") for number in (2, 2.0, None)),  # it could be a position
    ],
)
def test_what_sentinel_2_does_not_have_is_an_error(words: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said) as error:
        bands.parse_bands(words)
    assert all(f"{band.name} ({band.common_name})" in str(error.value) for band in bands.BANDS)


def test_the_thesis_masks_are_those_of_its_tables() -> None:
    tables = pd.read_csv(files.project_root() / "bandmask" / "records" / "thesis_tables.csv")
    assert set(tables["mask"]) == set(bands.THESIS_MASKS) == set(HIDES)


@pytest.mark.parametrize("mask", HIDES)
def test_thesis_masks_hide_what_each_reading_says(mask: str) -> None:
    named, position = (tuple(bands_.split()) for bands_ in HIDES[mask])
    assert bands.resolve_mask(mask, "named", "eurosat") == named
    assert bands.resolve_mask(mask, "named", "sen12ms") == named
    assert bands.resolve_mask(mask, "position", "sen12ms") == named
    assert bands.resolve_mask(mask, "position", "eurosat") == position
    assert bands.resolve_mask(bands.mask_slug(mask)) == named
    assert bands.resolve_mask(mask.split()) == named
    assert bands.resolve_mask(named, "esa") == named


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (("B8A", "named", "satclip"), "unknown thesis label 'B8A'.*B13.*scheme 'esa'"),
        (("B2 B14", "position", "eurosat"), "unknown thesis label 'B14'"),
        (("B2", "index", "satclip"), "unknown mask scheme 'index'; available: named, position, esa"),
        (("B2", "named", "landsat"), "unknown channel order 'landsat'; available: satclip, sen12ms, eurosat"),
        (("B99", "esa", "satclip"), "unknown band 'B99'"),
    ],
)
def test_masks_that_mean_nothing_are_errors_that_list_what_exists(mask: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bands.resolve_mask(*mask)


@given(st.permutations(bands.NAMES), st.integers(1, 13), st.booleans(), st.data())
def test_channels_are_named_in_the_arrays_own_order(order: list[str], count: int, batch: bool, data) -> None:
    shape, names = (*((2,) if batch else ()), count, 8, 9), tuple(order[:count])
    words = [data.draw(st.sampled_from([w for w in spellings(name) if not w.isdigit()])) for name in names]
    assert bands.channels_of(shape, words) == bands.channels_of(shape, " ".join(words)) == names
    assert bands.channels_of((13, 8, 9)) == bands.channels_of((2, 13, 8, 9)) == bands.NAMES


@pytest.mark.parametrize(
    ("shape", "names", "message"),
    [
        ((12, 8, 8), None, "12 channels.* give their names.*B01 B02"),
        ((8, 8, 13), None, "bands before rows"),
        ((13, 8), None, r"\(k, H, W\) or \(B, k, H, W\)"),
        ((3, 8, 8), "B02 B03", "3 channels need 3 different names; got 2: B02 B03"),
        ((2, 8, 8), "B02 b2", "2 different names"),
        ((13, 8, 8), "B02", "13 channels need 13"),
        ((2, 8, 8), "B02 B99", "unknown band 'B99'"),
        ((10, 8, 8), [f"B{n}" for n in range(1, 11)], "B1 … B10 count channels"),
        ((3, 8, 8), [1, 2, 3], "1 … 3 count channels"),
    ],
)
def test_an_array_whose_bands_are_unknown_is_refused(shape: tuple[int, ...], names: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bands.channels_of(shape, names)


@pytest.mark.parametrize("label", ["{}", "B{}", "b{}", "B0{}", "band {}", "B{:02d}"])
@pytest.mark.parametrize("count", [4, 10])
def test_labels_that_count_channels_name_no_band(label: str, count: int) -> None:
    found = bands.named(label.format(n) for n in range(1, count + 1))
    written = count == 4 and label.startswith(("B0", "B{:0"))  # as ESA writes them
    assert found == (list(bands.NAMES[:4]) if written else [None] * count)


def test_labels_of_an_array_are_names_where_they_are() -> None:
    earth_engine = [name.replace("B0", "B") for name in bands.NAMES]
    assert tuple(bands.named([*earth_engine, "QA60"])) == (*bands.NAMES, None)
    assert bands.named(["B2", "B3", "nir", "SCL"]) == ["B02", "B03", "B08", None]
    assert bands.named([2, 3, 4]) == [None] * 3


def test_slugs_are_folder_names_that_tell_schemes_apart() -> None:
    assert bands.mask_slug("B2 B8 B11") == bands.mask_slug("B2,B8;B11") == bands.mask_slug("B2_B8_B11") == "B2_B8_B11"
    assert (bands.mask_slug("B8A", "esa"), bands.mask_slug("", "position")) == ("B8A-esa", "none")
    assert bands.mask_slug("B08 b2", "esa") == "B8_B2"
    pairs = [(mask, scheme) for mask in bands.THESIS_MASKS if mask != "none" for scheme in ("named", "esa", "position")]
    for first, second in itertools.combinations(pairs, 2):
        if bands.mask_slug(*first) == bands.mask_slug(*second):  # one folder holds one set of bands
            assert bands.resolve_mask(*first) == bands.resolve_mask(*second)


def test_a_label_that_means_two_bands_says_both():
    assert "cirrus (B10)" in bands.two_readings("B8 B11")
    assert "swir16 (B11)" in bands.two_readings("B8 B11")
    assert bands.two_readings("B2 B8 nir08 B8A none") == ""
