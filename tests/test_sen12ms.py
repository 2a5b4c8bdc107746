"""SEN12MS: pairs are found by name, bad files are named, targets are the codes' classes. All trees are generated."""

from __future__ import annotations

import hashlib
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
import torchvision.datasets.utils
import trees
from trees import SPRING, lc_file, s2_file, sen12ms_tree, write_tif

from bandmask import files
from bandmask.packs import IGNORE, Pack
from bandmask.readers import scenes, sen12ms, streaming
from bandmask.readers.landcover import LEGENDS, SIMPLIFIED
from bandmask.readers.sen12ms import download_sen12ms, find_sen12ms, pack_sen12ms
from bandmask.readers.streaming import BadImagesError

SIZE = 16  # px; real patches have 256


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sen12ms, "SHAPE", (13, SIZE, SIZE))


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """7 generated scenes of 4 patches."""
    return sen12ms_tree(tmp_path / "sen12ms")


def pack(source: Path, path: Path | None = None, **settings: Any) -> Pack:
    return pack_sen12ms(source, path or source.parent / "pack", progress=False, **settings)


def listing(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def read(file: Path) -> np.ndarray:
    with rasterio.open(file) as tif:
        return tif.read()


# --- what is packed


def test_images_and_targets_are_those_of_the_files(tree: Path) -> None:
    packed = pack(tree)
    assert packed.images.shape == (28, 13, SIZE, SIZE)
    assert packed.targets is not None
    assert packed.classes == SIMPLIFIED
    simplified = np.array([0, 1, 1, 1, 1, 1, 2, 2, 3, 3, 4, 5, 6, 7, 6, 8, 9, 10])  # the facts, counted from 1
    for row, file in enumerate(packed.index["file"]):
        codes = read(tree / file.replace("s2", "lc"))[0]
        assert np.array_equal(packed.images[row], read(tree / file))
        assert np.array_equal(packed.targets[row], simplified[codes] - 1)
        assert packed.labels[row] == np.bincount(packed.targets[row].ravel()).argmax()


@pytest.mark.parametrize("labels", list(LEGENDS))
def test_each_scheme_takes_its_band_and_its_classes(tree: Path, labels: str) -> None:
    packed = pack(tree, labels=labels)
    band = {"igbp-simplified": 0, "igbp": 0, "lccs-land-cover": 1, "lccs-land-use": 2, "lccs-hydrology": 3}[labels]
    assert packed.classes == LEGENDS[labels].classes
    codes = read(tree / packed.index["file"][5].replace("s2", "lc"))[band]
    assert np.array_equal(np.asarray(packed.targets)[5], np.vectorize(LEGENDS[labels].codes.get)(codes))
    assert "counts" not in packed.card


def test_scenes_are_groups_and_stay_in_one_split(tree: Path) -> None:
    index = pack(tree).index
    assert set(index["scene"]) == {f"{SPRING}_{scene}" for scene in range(1, 8)}
    assert (index["group"] == index["scene"]).all()
    assert (index.groupby("scene")["split"].nunique() == 1).all()
    assert set(index["split"]) == {"train", "val", "test"}
    assert index["file"][0] == f"{SPRING}/s2_1/{SPRING}_s2_1_p1.tif"
    of_file = index["file"].str.extract(r"_s2_(\d+)_p")[0]
    assert (SPRING + "_" + of_file == index["scene"]).all()


def test_codes_outside_the_legend_have_no_label_and_are_counted_in_the_card(tree: Path) -> None:
    for patch, count in ((1, 3), (2, 5)):
        codes = read(lc_file(tree, 4, patch))
        codes[0].flat[:count] = 99
        codes[0].flat[count : count + 2] = 0
        write_tif(lc_file(tree, 4, patch), codes)
    packed = pack(tree)
    assert packed.card["counts"] == {"code 99": 8}, "0 is no label by the contest's own mapping, and not counted"
    row = packed.index["file"].tolist().index(f"{SPRING}/s2_4/{SPRING}_s2_4_p1.tif")
    assert (np.asarray(packed.targets)[row].ravel()[:5] == IGNORE).all()


def test_the_card_says_where_labels_come_from_and_how_good_they_are(tree: Path) -> None:
    card = pack(tree).card
    assert "MODIS" in card["source"]
    assert "contains Copernicus Sentinel data" in card["source"]
    assert "two thirds" in card["label_note"]
    assert card["stored_order"] == "sen12ms"
    assert card["options"]["season"] == SPRING


@pytest.mark.parametrize("season", scenes.SEASONS)
def test_any_season_can_be_packed(tmp_path: Path, season: str) -> None:
    root = sen12ms_tree(tmp_path / "data", season=season, patches=2)
    assert pack(root, season=season).index["file"].str.startswith(season).all()
    with pytest.raises(ValueError, match="unknown season 'ROIs1_autumn'; available: ROIs1158_spring, ROIs1868_summer"):
        pack(root, season="ROIs1_autumn")


def test_published_scenes_are_held_out(tmp_path: Path) -> None:
    root = sen12ms_tree(tmp_path / "data", scenes=(1, 2, 44, 63), patches=2)
    found = pack(root, split="holdout").index.groupby("scene")["split"].first()
    assert {int(scene.split("_")[-1]): split for scene, split in found.items()} == {
        1: "train",
        2: "train",
        44: "val",
        63: "test",
    }


def test_lists_choose_patches_and_the_card_counts_those_left_out(tree: Path) -> None:
    names = [f"{SPRING}_s2_{scene}_p{patch}.tif" for scene in range(1, 8) for patch in (1, 2, 3)]
    (tree / "train_list.txt").write_text("\n".join(names[:15]))
    (tree / "test_list.txt").write_text("\n".join(names[15:]))
    packed = pack(tree, split="lists")
    assert len(packed.images) == 21
    assert packed.card["unlisted"] == 7
    test = packed.index[packed.index["split"] == "test"]
    assert test["file"].str.split("/").str[-1].tolist() == sorted(names[15:])


def test_a_listed_patch_without_its_pair_is_bad_like_any_other(tree: Path) -> None:
    names = [f"{SPRING}_s2_{scene}_p{patch}.tif" for scene in range(1, 8) for patch in range(1, 5)]
    (tree / "train_list.txt").write_text("\n".join(names[:20]))
    (tree / "test_list.txt").write_text("\n".join(names[20:]))
    lc_file(tree, 7, 4).unlink()
    with pytest.raises(BadImagesError, match=r"_s2_7_p4\.tif: has no lc file"):
        pack(tree, split="lists")
    packed = pack(tree, split="lists", skip_bad=True)
    assert len(packed.images) == 27
    assert packed.card["unlisted"] == 0


def test_a_small_pack_is_part_of_a_larger_one(tree: Path) -> None:
    small, large = (pack(tree, tree.parent / str(n), max_patches=n) for n in (5, 12))
    assert len(small.images) == 5
    assert set(small.index["file"]) <= set(large.index["file"])
    both = small.index.merge(large.index, on="file", suffixes=("", "_large"))
    assert (both["split"] == both["split_large"]).all()
    assert large.index["scene"].nunique() == 7


# --- what is wrong is named


def test_unpaired_and_mis_sized_files_are_named_in_one_error(tree: Path) -> None:
    lc_file(tree, 2, 1).unlink()
    s2_file(tree, 3, 2).unlink()
    s2_file(tree, 5, 1).rename(s2_file(tree, 5, 1).with_name(f"{SPRING}_s2_6_p99.tif"))
    write_tif(s2_file(tree, 1, 1), trees.generated_image(SIZE // 2))
    write_tif(lc_file(tree, 1, 2), trees.generated_codes(SIZE)[:1])
    s2_file(tree, 1, 3).write_bytes(b"not a GeoTIFF")
    with pytest.raises(BadImagesError) as caught:
        pack(tree)
    message = str(caught.value)
    for words in (
        f"{SPRING}/s2_2/{SPRING}_s2_2_p1.tif: has no lc file",
        f"{SPRING}/lc_3/{SPRING}_lc_3_p2.tif: has no s2 file",
        f"{SPRING}/lc_5/{SPRING}_lc_5_p1.tif: has no s2 file",
        f"{SPRING}/s2_5/{SPRING}_s2_6_p99.tif: not a name of {SPRING}/s2_5",
        f"{SPRING}/s2_1/{SPRING}_s2_1_p1.tif: shape (13, 8, 8), expected (13, 16, 16)",
        f"{SPRING}/lc_1/{SPRING}_lc_1_p2.tif: shape (1, 16, 16), expected (4, 16, 16)",
        f"{SPRING}/s2_1/{SPRING}_s2_1_p3.tif: not a GeoTIFF (13 bytes)",
        "7 of 29 images",
        "skip_bad=True",
    ):
        assert words in message
    assert listing(tree.parent) == ["sen12ms"]


def bad_files(tree: Path) -> dict[str, str]:
    """Files spoiled in every way that shows only when they are read: `{s2 file: problem}`."""
    write_tif(s2_file(tree, 1, 1), trees.generated_image(SIZE // 2))
    write_tif(s2_file(tree, 1, 2), trees.generated_image(SIZE)[:12])
    write_tif(s2_file(tree, 1, 3), trees.generated_image(SIZE).astype(np.float32))
    write_tif(s2_file(tree, 2, 1), np.zeros((13, SIZE, SIZE), np.uint16))
    s2_file(tree, 2, 2).write_bytes(s2_file(tree, 2, 2).read_bytes()[:900])
    s2_file(tree, 2, 3).write_bytes(b"")
    write_tif(lc_file(tree, 3, 1), trees.generated_codes(SIZE)[:1])
    lc_file(tree, 3, 2).write_bytes(b"not a GeoTIFF")
    write_tif(lc_file(tree, 3, 3), trees.generated_codes(SIZE).astype(np.float32))
    said = {
        (1, 1): r"s2: shape \(13, 8, 8\), expected \(13, 16, 16\)",
        (1, 2): "s2: 12 bands, expected 13",
        (1, 3): "s2: pixels are float32",
        (2, 1): "s2: nothing but zeros",
        (2, 2): "s2: truncated or not a GeoTIFF",
        (2, 3): "s2: truncated or not a GeoTIFF",
        (3, 1): r"lc: shape \(1, 16, 16\), expected \(4, 16, 16\)",
        (3, 2): "lc: truncated or not a GeoTIFF",
        (3, 3): "land-cover codes are float32",
    }
    return {str(s2_file(Path(), *key)): problem for key, problem in said.items()}


def test_bad_files_are_all_named_with_what_is_wrong(tree: Path) -> None:
    bad = bad_files(tree)
    with pytest.raises(BadImagesError) as caught:
        pack(tree)
    assert "9 of 28 images" in str(caught.value)
    for file, problem in bad.items():
        assert caught.match(f"{file}: {problem}")
    assert not (tree.parent / "pack").exists()


def test_bad_files_are_left_out_and_listed_if_asked_for(tree: Path) -> None:
    bad = bad_files(tree)
    lc_file(tree, 7, 4).unlink()
    packed = pack(tree, skip_bad=True)
    assert len(packed.images) == 28 - 9 - 1
    assert set(packed.card["skipped"]) == {*bad, str(s2_file(Path(), 7, 4))}
    assert not set(packed.index["file"]) & set(packed.card["skipped"])
    for row, file in enumerate(packed.index["file"]):
        assert np.array_equal(packed.images[row], read(tree / file))
    with pytest.raises(BadImagesError):
        pack(tree)  # a pack with files left out is not passed off as a whole one
    assert pack(tree, skip_bad=True).card == packed.card


def test_files_in_another_channel_order_are_refused(tmp_path: Path) -> None:
    root = sen12ms_tree(tmp_path / "data", channels=[0, 1, 2, 3, 4, 5, 6, 7, 9, 10, 11, 12, 8])  # as EuroSAT's files
    with pytest.raises(ValueError, match=r"read as 'sen12ms', cirrus.*it would fit if read as order='eurosat'"):
        pack(root)
    assert listing(tmp_path) == ["data"]


def test_no_such_folder_and_no_pairs_are_errors_that_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="download_sen12ms"):
        pack(tmp_path / "data")
    (tmp_path / "data" / SPRING / "s2_1").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match=r"holds no pair like s2_1/.*0 .tif files"):
        pack(tmp_path / "data")


# --- again


def test_a_pack_of_the_same_files_and_settings_is_opened_not_made_again(tree: Path) -> None:
    before = (pack(tree).path / "images.npy").stat().st_mtime_ns
    assert (pack(tree).path / "images.npy").stat().st_mtime_ns == before
    for change in ({"labels": "igbp"}, {"max_patches": 10}, {"max_patches": 11}):
        after = (pack(tree, **change).path / "images.npy").stat().st_mtime_ns
        assert after != before
        before = after
    write_tif(s2_file(tree, 8, 1), trees.generated_image(SIZE))
    write_tif(lc_file(tree, 8, 1), trees.generated_codes(SIZE))
    assert f"{SPRING}_8" in set(pack(tree).index["scene"]), "a further scene makes another source"


def test_an_interrupted_packing_goes_on(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = pack(tree, tree.parent / "undisturbed")
    monkeypatch.setattr(streaming, "SAVE_ROWS", 4)
    decoded: list[int] = []
    decode = sen12ms.decode_tif

    def breaking(data: bytes, shape: tuple[int, ...]) -> np.ndarray:
        decoded.append(1)
        if len(decoded) > 20:
            raise RuntimeError("the machine stopped")
        return decode(data, shape)

    monkeypatch.setattr(sen12ms, "decode_tif", breaking)
    with pytest.raises(RuntimeError, match="the machine stopped"):
        pack(tree)
    noted = json.loads((tree.parent / ".pack.packing" / "progress.json").read_text())["read"]
    assert noted > 0
    decoded.clear()
    monkeypatch.setattr(sen12ms, "decode_tif", lambda data, shape: decoded.append(1) or decode(data, shape))
    packed = pack(tree)
    assert len(decoded) == 28 - noted
    for name in listing(expected.path):
        assert (packed.path / name).read_bytes() == (expected.path / name).read_bytes()


# --- found, and fetched


def test_it_is_found_below_the_data_root(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BANDMASK_DATA", str(tree.parent))
    assert find_sen12ms() == tree
    assert find_sen12ms("ROIs1970_fall") is None
    monkeypatch.setenv("BANDMASK_DATA", str(tree))
    assert find_sen12ms() == tree


def test_packs_of_other_settings_have_other_places(
    tree: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A small pack must not replace one of 72 GB."""
    monkeypatch.setenv("BANDMASK_OUTPUTS", str(tmp_path_factory.mktemp("outputs")))
    assert pack_sen12ms(tree, progress=False).path == files.outputs_root() / "packs" / "sen12ms"
    small = pack_sen12ms(tree, labels="igbp", max_patches=9, progress=False)
    assert small.path.name == "sen12ms-igbp-9"
    monkeypatch.setenv("BANDMASK_DATA", str(files.outputs_root()))
    assert len(pack_sen12ms().images) == 28, "the pack is there though the source is not"
    with pytest.raises(FileNotFoundError, match=r"ROIs1970_fall of SEN12MS was not found.*BANDMASK_DATA.*dataserv"):
        pack_sen12ms(season="ROIs1970_fall")


@pytest.fixture
def archives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Generated archives in a folder that stands for the server; their md5 sums stand for the published ones."""
    from torchgeo.datasets import SEN12MS

    served = sen12ms_tree(tmp_path / "server")
    for kind in ("lc", "s2"):
        with tarfile.open(served / f"{SPRING}_{kind}.tar.gz", "w:gz") as tar:
            for folder in sorted((served / SPRING).glob(f"{kind}_*")):
                tar.add(folder, f"{SPRING}/{folder.name}")
    for name in ("train", "test"):
        (served / f"{name}_list.txt").write_text(f"{name}\n")
    sums = {file.name: hashlib.md5(file.read_bytes()).hexdigest() for file in served.glob("*.*")}
    published = zip(SEN12MS.filenames, SEN12MS.md5s, strict=True)
    monkeypatch.setattr(SEN12MS, "md5s", tuple(sums.get(name, md5) for name, md5 in published))

    def retrieve(url: str, filename: Path, chunk_size: int = 0) -> None:
        Path(filename).write_bytes((served / url.rsplit("/", 1)[1]).read_bytes())

    monkeypatch.setattr(torchvision.datasets.utils, "_urlretrieve", retrieve)
    monkeypatch.setattr(torchvision.datasets.utils, "_get_redirect_url", lambda url, max_hops: url)
    return served


def test_archives_are_fetched_checked_and_unpacked(tmp_path: Path, archives: Path) -> None:
    root = download_sen12ms(tmp_path / "data", lists=True)
    assert listing(root / SPRING) == sorted(f"{kind}_{scene}" for kind in ("lc", "s2") for scene in range(1, 8))
    fetched = [f"{SPRING}_lc.tar.gz", f"{SPRING}_s2.tar.gz", "test_list.txt", "train_list.txt"]
    assert listing(root) == [SPRING, *fetched]
    assert len(pack(root).images) == 28
    before = (root / SPRING).stat().st_mtime_ns
    download_sen12ms(root)
    assert (root / SPRING).stat().st_mtime_ns == before


def test_a_wrong_md5_sum_unpacks_nothing(tmp_path: Path, archives: Path) -> None:
    with (archives / f"{SPRING}_s2.tar.gz").open("ab") as file:
        file.write(b"more")
    with pytest.raises(OSError, match=r"can't fetch ROIs1158_spring_s2.tar.gz with md5.*put them into"):
        download_sen12ms(tmp_path / "data")
    assert not (tmp_path / "data" / SPRING).exists()


def test_an_archive_that_breaks_off_unpacks_nothing(tmp_path: Path, archives: Path) -> None:
    whole = archives / f"{SPRING}_s2.tar.gz"
    whole.write_bytes(whole.read_bytes()[:20_000])
    with pytest.raises(ValueError, match="is not a whole archive"):
        sen12ms._unpack([archives / f"{SPRING}_lc.tar.gz", whole], tmp_path / "data" / SPRING)
    assert listing(tmp_path / "data") == []


def test_without_a_network_the_error_says_how_to_get_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError("Network is unreachable")

    monkeypatch.setattr(torchvision.datasets.utils, "_urlretrieve", refuse)
    monkeypatch.setattr(torchvision.datasets.utils, "_get_redirect_url", refuse)
    md5 = "6e2e8fa8b8cba77ddab49fd20ff5c37b"
    message = rf"can't fetch ROIs1158_spring_lc.tar.gz with md5 {md5}: Network.*dataserv.ub.tum.de"
    with pytest.raises(OSError, match=message):
        download_sen12ms(tmp_path / "data")
