"""Land-cover codes become the classes that their legends say, and nothing else does."""

from __future__ import annotations

import numpy as np
import pytest
import trees

from bandmask.packs import IGNORE
from bandmask.readers.landcover import DFC2020, LEGENDS, NINE_CLASSES, SIMPLIFIED, legend_of, without_savanna


def classes_of(codes: list[int], labels: str) -> list[int]:
    return LEGENDS[labels].target(np.array([codes]))[0][0].tolist()


def test_igbp_is_simplified_as_the_data_fusion_contest_does() -> None:
    """The table of the facts, counted from 1, written out a second time by hand."""
    names = [*["Forest"] * 5, *["Shrubland"] * 2, *["Savanna"] * 2, "Grassland", "Wetlands", "Croplands"]
    names += ["Urban/Built-up", "Croplands", "Snow/Ice", "Barren", "Water"]
    found = classes_of(list(range(1, 18)), "igbp-simplified")
    assert [SIMPLIFIED[label] for label in found] == names
    published = [0, 1, 1, 1, 1, 1, 2, 2, 3, 3, 4, 5, 6, 7, 6, 8, 9, 10]
    assert found == [number - 1 for number in published[1:]]
    assert classes_of([0, 255], "igbp-simplified") == [IGNORE, IGNORE]


@pytest.mark.parametrize(
    ("labels", "codes", "some"),
    [
        ("igbp", trees.IGBP_CODES, {1: "Evergreen Needleleaf Forests", 9: "Savannas", 17: "Water Bodies"}),
        ("lccs-land-cover", trees.LAND_COVER_CODES, {3: "Water Bodies", 21: "Open Forests", 43: "Sparse Shrublands"}),
        ("lccs-land-use", trees.LAND_USE_CODES, {9: "Urban and Built-up Lands", 36: "Herbaceous Croplands"}),
        ("lccs-hydrology", trees.HYDROLOGY_CODES, {27: "Woody Wetlands", 50: "Herbaceous Wetlands", 51: "Tundra"}),
    ],
)
def test_every_code_of_a_legend_is_a_class_of_its_own(labels: str, codes: tuple[int, ...], some: dict) -> None:
    legend = LEGENDS[labels]
    assert classes_of(list(codes), labels) == list(range(len(codes))) == list(range(len(legend.classes)))
    for code, name in some.items():
        assert legend.classes[classes_of([code], labels)[0]] == name
    target, unknown = legend.target(np.array([[255]]))
    assert (target.item(), unknown) == (IGNORE, {}), "255 is MODIS' fill value"


def test_each_scheme_has_its_band_of_the_file() -> None:
    assert [LEGENDS[name].band for name in ("igbp-simplified", "igbp")] == [1, 1]
    assert [LEGENDS[f"lccs-{name}"].band for name in ("land-cover", "land-use", "hydrology")] == [2, 3, 4]


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int16, np.int32, np.int64])
def test_codes_outside_the_legend_have_no_label_and_are_counted(dtype: type) -> None:
    values = [1, 99, 99, 18]
    values += [300] if np.iinfo(dtype).max > 300 else []
    values += [-7] if np.iinfo(dtype).min < 0 else []
    target, unknown = LEGENDS["igbp"].target(np.array([values]).astype(dtype))
    assert target.dtype == np.uint8
    assert target[0].tolist() == [0] + [IGNORE] * (len(values) - 1)
    expected = {"code 18": 1, "code 99": 2}
    assert unknown == expected | {f"code {value}": 1 for value in values[4:]}


def test_codes_are_integers() -> None:
    with pytest.raises(ValueError, match="float32; expected integers"):
        LEGENDS["igbp"].target(np.ones((1, 1), np.float32))


def test_labels_of_the_contest_are_counted_from_one_and_background_has_none() -> None:
    target, unknown = DFC2020.target(np.array([[0, 1, 3, 10, 11]]))
    assert target[0].tolist() == [IGNORE, 0, 2, 9, IGNORE]
    assert unknown == {"code 11": 1}
    assert DFC2020.classes == SIMPLIFIED


def test_the_nine_class_form_drops_savanna_and_keeps_every_other_name() -> None:
    ten = np.array([*range(10), IGNORE], np.uint8)
    nine = without_savanna(ten)
    assert nine.dtype == np.uint8
    assert len(NINE_CLASSES) == 9
    for before, after in zip(ten.tolist(), nine.tolist(), strict=True):
        if before == IGNORE or SIMPLIFIED[before] == "Savanna":
            assert after == IGNORE
        else:
            assert NINE_CLASSES[after] == SIMPLIFIED[before]
    with pytest.raises(ValueError, match=r"\[12\].*ten"):
        without_savanna(np.array([12], np.uint8))


def test_unknown_labels_are_an_error_that_lists_those_there_are() -> None:
    with pytest.raises(ValueError, match="unknown labels 'corine'; available: igbp-simplified, igbp, lccs-land-cover"):
        legend_of("corine")
