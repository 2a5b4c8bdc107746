"""DFC2020: what TorchGeo's own class reads is what is packed, in the published splits. All trees are generated."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torchgeo.datasets.copernicus.base
import trees
from torchgeo.datasets import CopernicusBenchDFC2020S2 as Published
from trees import dfc2020_tree, write_tif

from bandmask.packs import IGNORE, SPLITS, Pack
from bandmask.readers import dfc2020
from bandmask.readers.dfc2020 import download_dfc2020, find_dfc2020, pack_dfc2020
from bandmask.readers.landcover import SIMPLIFIED
from bandmask.readers.streaming import BadImagesError

SIZE = 16  # px; real patches have 256


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dfc2020, "SHAPE", (13, SIZE, SIZE))


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    return dfc2020_tree(tmp_path / "dfc2020")


def pack(source: Path, **settings: Any) -> Pack:
    return pack_dfc2020(source, source.parent / "pack", progress=False, **settings)


def test_images_targets_and_splits_are_those_of_torchgeos_class(tree: Path) -> None:
    packed = pack(tree)
    assert packed.targets is not None
    assert packed.classes == Published.classes[1:] == SIMPLIFIED
    for split in SPLITS:
        published = Published(str(tree), split=split)
        rows = packed.rows(split)
        assert len(rows) == len(published) == 4
        for row, sample in zip(rows, (published[i] for i in range(4)), strict=True):
            assert np.array_equal(packed.images[row], sample["image"].numpy())
            labels = sample["mask"].numpy()
            assert np.array_equal(packed.targets[row], np.where(labels == 0, IGNORE, labels - 1))


def test_bands_are_torchgeos_and_the_dark_one_is_b10(tree: Path) -> None:
    packed = pack(tree)
    assert tuple(packed.card["bands"]) == Published.all_bands
    assert np.flatnonzero(packed.band_means() < 0.005).tolist() == [Published.all_bands.index("B10")]


def test_patches_of_one_place_are_a_group(tree: Path) -> None:
    assert pack(tree).index.groupby("group").size().tolist() == [6, 6]
    assert dfc2020._place(tree / "not-there.tif") == "not-there"


def test_the_card_says_what_the_labels_are(tree: Path) -> None:
    card = pack(tree).card
    assert "semi-manual" in card["label_note"]
    assert "contains Copernicus Sentinel data" in card["source"]


def test_the_archive_is_unpacked_by_torchgeo(tree: Path) -> None:
    expected = np.array(pack(tree).images)
    shutil.make_archive(str(tree / "dfc2020"), "zip", tree, "dfc2020_s1s2")
    shutil.rmtree(tree / "dfc2020_s1s2")
    shutil.rmtree(tree.parent / "pack")
    assert np.array_equal(pack(tree).images, expected)


def test_a_pack_of_the_same_files_is_opened_not_made_again(tree: Path) -> None:
    before = (pack(tree).path / "images.npy").stat().st_mtime_ns
    assert (pack(tree).path / "images.npy").stat().st_mtime_ns == before
    lists = tree / "dfc2020_s1s2"
    (lists / "dfc-val-new.csv").write_text((lists / "dfc-val-new.csv").read_text().splitlines()[0])
    assert len(pack(tree).rows("val")) == 1


def test_bad_files_are_all_named_or_left_out(tree: Path) -> None:
    folder = tree / "dfc2020_s1s2"
    (folder / "s2" / "ROIs0000_test_s2_0_p0.tif").unlink()
    (folder / "dfc" / "ROIs0000_test_dfc_0_p1.tif").unlink()
    write_tif(folder / "s2" / "ROIs0000_test_s2_0_p2.tif", trees.generated_image(8))
    write_tif(folder / "dfc" / "ROIs0000_test_dfc_0_p10.tif", np.ones((1, 8, 8), np.int32))
    with pytest.raises(BadImagesError) as caught:
        pack(tree)
    for words in ("4 of 12 images", "No such file", "dfc: missing", "shape (13, 8, 8)", "dfc: shape (8, 8)"):
        assert words in str(caught.value)
    packed = pack(tree, skip_bad=True)
    assert len(packed.images) == 8
    assert len(packed.card["skipped"]) == 4


def test_an_image_in_two_splits_is_an_error_that_names_it(tree: Path) -> None:
    with (tree / "dfc2020_s1s2" / "dfc-test-new.csv").open("a") as file:
        file.write("ROIs0000_test_dfc_0_p10.tif\n")
    with pytest.raises(ValueError, match=r"ROIs0000_test_dfc_0_p10.tif is in the splits 'train' and 'test'"):
        pack(tree)


def test_where_it_is_not_there_the_error_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BANDMASK_DATA", str(tmp_path))
    assert find_dfc2020() is None
    with pytest.raises(FileNotFoundError, match=r"DFC2020 was not found.*BANDMASK_DATA.*download_dfc2020"):
        pack_dfc2020()
    with pytest.raises(FileNotFoundError, match=r"holds no dfc2020_s1s2/dfc-train-new.csv.*download_dfc2020"):
        pack_dfc2020(tmp_path)
    assert find_dfc2020() is None
    root = dfc2020_tree(tmp_path / "dfc2020")
    assert find_dfc2020() == root


def test_without_a_network_the_error_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError("Network is unreachable")

    monkeypatch.setattr(torchgeo.datasets.copernicus.base, "download_and_extract_archive", refuse)
    with pytest.raises(OSError, match=r"can't fetch dfc2020.zip with md5 f10ba017.*unreachable.*hf.co.*put it into"):
        download_dfc2020(tmp_path)
