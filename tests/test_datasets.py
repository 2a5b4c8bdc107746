"""Data sets: bands lie where they should, splits don't leak, bad files are named. Trees are generated."""

import json
import os
import re
import shutil
import tempfile
import zipfile
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import hypothesis.strategies as st
import numpy as np
import pandas as pd
import pytest
import rasterio
import trees
import xarray as xr
from conftest import generated_images
from hypothesis import given
from PIL import Image
from rasterio.io import MemoryFile
from torchgeo.datasets import CopernicusBenchDFC2020S2 as Published
from torchgeo.datasets import EuroSAT
from trees import SPRING, lc_file, s2_file, write_tif

from bandmask import bands, datasets, files
from bandmask.batches import Batches
from bandmask.datasets import SAMPLE_FOLDER, by_share, find_source, open_dataset, target_of
from bandmask.packs import IGNORE, SPLITS, Pack, open_pack

TILE = 64
SIZE = 16  # px of generated trees; real patches have 256
VRT = b"""<VRTDataset rasterXSize="64" rasterYSize="64">%s</VRTDataset>""" % b"".join(
    b"""<VRTRasterBand dataType="UInt16" band="%d"><SimpleSource><SourceFilename>%s</SourceFilename></SimpleSource>
    </VRTRasterBand>"""
    % (i, str(SAMPLE_FOLDER / "B02.tif").encode())
    for i in range(1, 14)
)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "SHAPE", (13, SIZE, SIZE))


def stamp(packed: Pack) -> tuple[int, int]:
    stat = (packed.path / "images.npy").stat()
    return stat.st_ino, stat.st_mtime_ns


def written(image: np.ndarray) -> bytes:
    """A GeoTIFF of this array."""
    with tempfile.TemporaryDirectory() as folder:
        return write_tif(Path(folder) / "image.tif", image).read_bytes()


def huge(path: Path, **layout: Any) -> Path:
    """A few KB that declare 13 × 40,000 × 40,000 pixels, or what is said."""
    profile = {"count": 13, "height": 40_000, "width": 40_000, "blockxsize": 8192, "blockysize": 8192, **layout}
    with rasterio.open(path, "w", driver="GTiff", dtype="uint16", tiled=True, sparse_ok=True, **profile):
        pass
    assert path.stat().st_size < 100_000
    return path


# --- the sample


@pytest.fixture(scope="module")
def scene() -> xr.DataArray:
    return datasets.sample_scene()


@pytest.fixture(scope="module")
def pixel_labels() -> np.ndarray:
    return np.asarray(Image.open(SAMPLE_FOLDER / "labels.png"))


def test_the_files_are_the_ones_whose_checksums_are_recorded() -> None:
    recorded = json.loads((SAMPLE_FOLDER / "checksums.json").read_text())
    assert set(recorded) == set(bands.NAMES) == {p.stem for p in SAMPLE_FOLDER.glob("*.tif")}
    for name in bands.NAMES:
        assert files.sha256(SAMPLE_FOLDER / f"{name}.tif") == recorded[name]["sha256"]


def test_patches_lie_in_the_scene_and_those_of_two_splits_are_320_m_apart(sample_pack, scene) -> None:
    """Overlap or adjacency between training and test patches would let a model be tested on what it learned."""
    index = sample_pack.index
    assert len(index) == len(index[["row", "col"]].drop_duplicates()) == 576
    assert index["row"].between(0, 1024 - TILE).all()
    assert index["col"].between(0, 1024 - TILE).all()
    for first, second in (("train", "test"), ("train", "val"), ("val", "test")):
        one, other = (index[index["split"] == split][["row", "col"]].to_numpy() for split in (first, second))
        gap = np.abs(one[:, None] - other[None]) - TILE  # (n, m, 2); below 0 in both axes: they overlap
        assert gap.max(axis=2).min() >= 32, (first, second)
    assert index["group"].nunique() == 16
    assert (index.groupby("group")["split"].nunique() == 1).all()
    for row in (0, 137, 288, 575):
        y, x = index.loc[row, ["row", "col"]].astype(int)
        assert np.abs(sample_pack.images[row] - scene.values[:, y : y + TILE, x : x + TILE]).max() <= 0.5


def test_labels_and_targets_are_those_of_the_pixels(sample_pack: Pack, pixel_labels: np.ndarray) -> None:
    built = datasets.SAMPLE_CLASSES.index("built-up")
    assert sample_pack.targets is not None
    for row, label in enumerate(sample_pack.labels):
        y, x = sample_pack.index.loc[row, ["row", "col"]].astype(int)
        assert np.array_equal(sample_pack.targets[row], pixel_labels[y : y + TILE, x : x + TILE])
        counts = Counter(sample_pack.targets[row].ravel().tolist())
        assert label == built if counts[built] >= 0.1 * TILE * TILE else counts[label] == max(counts.values())
    assert sample_pack.classes == datasets.SAMPLE_CLASSES
    for split in ("train", "test"):
        assert set(sample_pack.labels[sample_pack.rows(split)]) == set(range(len(datasets.SAMPLE_CLASSES)))
    assert "not land cover" in sample_pack.card["label_note"]
    assert stamp(sample_pack) == stamp(datasets.pack_sample()), "opened, not made again"
    assert sample_pack.path == files.outputs_root() / "packs" / "sample"


# --- EuroSAT, from real files

INSIDE = "ds/images/remote_sensing/otherDatasets/sentinel_2/tif"
REORDER = [0, 1, 2, 3, 4, 5, 6, 7, 12, 8, 9, 10, 11]
# Mean DN per channel of 1,357 real images (facts.md §1), in SatCLIP order
MEAN_DN = [1380, 1143, 1066, 976, 1219, 2043, 2420, 2337, 2641, 726, 11, 1870, 1177]


@pytest.fixture(scope="session")
def real(eurosat_source: Path) -> dict[str, bytes]:
    """24 real files, `{"Forest_1": bytes}`; eight classes are among them."""
    with zipfile.ZipFile(eurosat_source) as archive:
        members = sorted(n for n in archive.namelist() if n.endswith(".tif"))
        few = [n for c in datasets.EUROSAT_CLASSES for n in [m for m in members if Path(m).parent.name == c][:3]]
        return {Path(n).stem: archive.read(n) for n in few[:24]}


def lay_out(folder: Path, images: dict[str, bytes], form: str = "folder", inside: str = INSIDE) -> Path:
    """Files in the official layout, as a folder or zip, with split lists of their own: two to train, one each else."""
    folder.mkdir(parents=True, exist_ok=True)
    members = {f"{inside}/{name.split('_')[0]}/{name}.tif": data for name, data in images.items()}
    for index, split in enumerate(SPLITS):
        names = [name for i, name in enumerate(images) if (0, 1, 2, 0)[i % 4] == index]
        (folder / f"eurosat-{split}.txt").write_text("".join(f"{name}.jpg\n" for name in names))
    if form != "folder":
        with zipfile.ZipFile(folder / f"{form}.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            for member, data in members.items():
                archive.writestr(member, data)
        return folder / f"{form}.zip"
    for member, data in members.items():
        (folder / member).parent.mkdir(parents=True, exist_ok=True)
        (folder / member).write_bytes(data)
    return folder


def packed(pack: Callable[..., Pack], data: Path, **options: Any) -> Pack:
    """Pack beside the data."""
    with mock.patch.dict(os.environ, BANDMASK_DATA=str(data), BANDMASK_OUTPUTS=str(data)):
        return pack(**options)


def eurosat(source: Path, **options: Any) -> Pack:
    return packed(datasets.pack_eurosat, source.parent if source.is_file() else source, **options)


def read_directly(data: bytes) -> np.ndarray:
    with MemoryFile(data) as memory, memory.open() as tif:
        return tif.read()


def as_float(image: np.ndarray) -> np.ndarray:
    image = image.astype(np.float32)
    image[:, :16] = np.nan
    return image


SPOILT: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "truncated": (lambda data: data[: len(data) * 2 // 3], "truncated or damaged|can't be read as GeoTIFF"),
    "empty": (lambda data: b"", "truncated or damaged|can't be read as GeoTIFF"),
    "a web page": (lambda data: b"<html>404 not found</html>", "truncated or damaged|can't be read as GeoTIFF"),
    "12 bands": (lambda data: written(read_directly(data)[:12]), r"shape \(12, 64, 64\)"),
    "float with NaN": (lambda data: written(as_float(read_directly(data))), "float32; a pack holds .* uint16"),
    "zeros": (lambda data: written(np.zeros((13, 64, 64), np.uint16)), "nothing but zeros"),
    "smaller": (lambda data: written(read_directly(data)[:, :32, :32]), r"shape \(13, 32, 32\)"),
    "a VRT that reads another file": (lambda data: VRT, "truncated or damaged|can't be read as GeoTIFF"),
}


def test_all_real_images_are_packed_with_their_splits_classes_and_means(eurosat_pack, eurosat_source) -> None:
    assert eurosat_pack.images.shape == (997, 13, 64, 64)
    counts = dict(zip(eurosat_pack.classes, np.bincount(eurosat_pack.labels, minlength=10).tolist(), strict=True))
    assert [counts[name] for name in ("Residential", "River", "Pasture", "SeaLake")] == [168, 162, 28, 38]
    file = eurosat_pack.index["file"]
    assert [Path(f).parent.name for f in file] == [eurosat_pack.classes[label] for label in eurosat_pack.labels]
    for split in SPLITS:
        names = (eurosat_source.parent / f"eurosat-{split}.txt").read_text().split()
        rows = eurosat_pack.rows(split)
        assert [Path(f).stem for f in file.iloc[rows]] == [Path(name).stem for name in names]
        means = eurosat_pack.images[rows].mean((0, 2, 3), dtype=np.float64)
        assert eurosat_pack.band_means(split) * 10_000 == pytest.approx(means, abs=1e-3)
    mean = np.asarray(eurosat_pack.images).mean((0, 2, 3))
    assert mean == pytest.approx(MEAN_DN, rel=0.05, abs=2)
    assert eurosat_pack.band_means("train").mean() == pytest.approx(0.1431, rel=0.03)  # the thesis' dataset mean
    for row in (0, 1, 250, 598, 599, 800, 996):
        with rasterio.open(f"zip://{eurosat_source}!{file.iloc[row]}") as tif:
            assert np.array_equal(eurosat_pack.images[row], tif.read()[REORDER])


@pytest.mark.parametrize(("form", "inside"), [("EuroSAT_MS", "EuroSAT_MS"), ("EuroSATallBands", INSIDE)])
def test_a_zip_and_a_folder_are_the_same_pack_however_they_are_laid_out(tmp_path, monkeypatch, real, form, inside):
    """As Zenodo and TorchGeo hand them out, also in a folder with an unbalanced brace, and with what macOS leaves."""
    one = lay_out(tmp_path / "a {zip", real, form, inside)
    with zipfile.ZipFile(one, "a") as archive:
        for name in real:
            archive.writestr(f"__MACOSX/{inside}/Forest/{name}.tif", b"litter")
            archive.writestr(f"{inside}/Forest/._{name}.tif", b"litter")
    other = lay_out(tmp_path / "folder", real, inside=inside)
    for name in real:
        (other / inside / f"._{name}.tif").write_bytes(b"litter")
    for source in (one, other):
        monkeypatch.setenv("BANDMASK_DATA", str(source.parent if source == one else source))
        assert find_source("eurosat") == source
    one, other = eurosat(one), eurosat(other)
    assert np.array_equal(one.images, other.images)
    assert one.index[["label", "split"]].equals(other.index[["label", "split"]])
    for row, file in enumerate(one.index["file"]):
        assert np.array_equal(one.images[row], read_directly(real[Path(file).stem])[REORDER])


def test_both_splits_can_be_opened_by_name_side_by_side(tmp_path, monkeypatch, real) -> None:
    folder = lay_out(tmp_path / "data", real, "EuroSATallBands").parent
    for split, other in zip(SPLITS, ("test", "train", "val"), strict=True):
        shutil.copy(folder / f"eurosat-{split}.txt", folder / f"eurosat-spatial-{other}.txt")
    monkeypatch.setenv("BANDMASK_DATA", str(folder))
    monkeypatch.setenv("BANDMASK_OUTPUTS", str(tmp_path / "outputs"))
    official, spatial = open_dataset("eurosat"), open_dataset("eurosat-spatial")
    assert set(official.index["file"][official.rows("val")]) == set(spatial.index["file"][spatial.rows("train")])
    assert stamp(official) == stamp(open_dataset("eurosat"))
    (folder / "a-train.txt").write_text(f"\n  {(names := list(real))[0]}.tif\r\nForest/{names[5]}.jpg\n\n")
    (folder / "a-val.txt").write_text("")
    (folder / "a-test.txt").write_text("")
    own = eurosat(folder / "EuroSATallBands.zip", splits="a")
    assert [Path(file).stem for file in own.index["file"]] == [names[0], names[5]]


@pytest.mark.parametrize("change", ["nothing", "time", "splits", "zip", "file", "damaged pack"])
def test_a_changed_source_or_split_or_a_damaged_pack_is_packed_again(tmp_path, real, change: str) -> None:
    source = lay_out(tmp_path, real, "folder" if change == "file" else "EuroSATallBands")
    before = eurosat(source)
    old, images = stamp(before), {name: read_directly(data) for name, data in real.items()}
    if change == "time":  # a zip is known by its content
        source.touch()
    elif change == "splits":
        train, val = ((tmp_path / f"eurosat-{split}.txt").read_text() for split in ("train", "val"))
        (tmp_path / "eurosat-train.txt").write_text(val)
        (tmp_path / "eurosat-val.txt").write_text(train)
    elif change == "zip":
        lay_out(tmp_path, dict(reversed(real.items())), "EuroSATallBands")
    elif change == "file":
        name = list(real)[3]
        images[name][0] += 1
        file = next(source.rglob(f"{name}.tif"))
        file.write_bytes(written(images[name]))
        os.utime(file, ns=(1, 1))
    elif change == "damaged pack":
        (before.path / "index.parquet").write_bytes(b"")
    after = eurosat(source)
    assert (stamp(after) == old) == (change in ("nothing", "time"))
    for row, file in enumerate(after.index["file"]):
        split = after.index["split"].iloc[row]
        assert f"{Path(file).stem}.jpg" in (tmp_path / f"eurosat-{split}.txt").read_text().split()
        assert np.array_equal(after.images[row], images[Path(file).stem][REORDER])


@pytest.mark.parametrize("form", ["EuroSATallBands", "folder"])
def test_bad_files_are_all_named_and_the_pack_before_stays(tmp_path, real, form: str) -> None:
    before = stamp(eurosat(lay_out(tmp_path, real, form)))
    names = list(real)
    bad = dict(zip([names[0], *names[5::2]], SPOILT.values(), strict=False))
    source = lay_out(tmp_path, real | {name: spoil(real[name]) for name, (spoil, _) in bad.items()}, form)
    with pytest.raises(ValueError, match=f"{len(bad)} of 24 images can't be packed") as error:
        eurosat(source)
    lines = str(error.value).splitlines()[1 : 1 + len(bad)]
    for name, (_, problem) in bad.items():
        assert any(re.search(f"/{name}.tif: .*{problem}", line) for line in lines), (name, problem)
    assert stamp(open_pack(tmp_path / "packs" / "eurosat")) == before


@pytest.mark.parametrize("place", [0, 0.99])
def test_a_damaged_member_of_a_zip_is_named_and_half_a_zip_is_refused(tmp_path, real, place: float) -> None:
    source = lay_out(tmp_path, real, "EuroSATallBands")
    with zipfile.ZipFile(source) as archive:
        member = archive.infolist()[7]
    content = bytearray(source.read_bytes())
    start = member.header_offset + 30 + len(member.filename) + int(place * (member.compress_size - 100))
    content[start : start + 100] = bytes(byte ^ 0xFF for byte in content[start : start + 100])
    source.write_bytes(content)
    with pytest.raises(ValueError, match=f"1 of 24 images can't be packed:\n  {member.filename}: damaged in the zip"):
        eurosat(source)
    source.write_bytes(source.read_bytes()[: source.stat().st_size // 2])
    with pytest.raises(ValueError, match="is not a whole zip file"):
        eurosat(source)


def test_a_member_that_is_a_bomb_or_lies_about_its_size_is_refused_before_it_is_read(tmp_path, real) -> None:
    names = list(real)
    lies = huge(tmp_path / "huge.tif").read_bytes()
    source = lay_out(tmp_path / "data", real | {names[3]: bytes(200_000_000), names[6]: lies}, "EuroSATallBands")
    assert source.stat().st_size < 10_000_000
    with pytest.raises(ValueError, match=r"2 of 24 (.|\n)*more than 1,064,960 bytes(.|\n)*in blocks of 8192"):
        eurosat(source)


@pytest.mark.parametrize(
    ("lines", "error", "message"),
    [
        ("Desert_1.jpg\n", ValueError, "'Desert_1.jpg' is of no EuroSAT class"),
        ("{first}.jpg\n", ValueError, "'{first}.jpg' is in the split 'train' too"),
        ("Forest_9999.jpg\n", FileNotFoundError, r"1 of 19 images of the split files are not in .*\['Forest_9999'\]"),
        (None, FileNotFoundError, r"eurosat-val.txt is not there yet.*docs/thesis.md"),
    ],
)
def test_split_files_that_do_not_fit_are_refused_by_line(tmp_path, real, lines, error, message: str) -> None:
    source, first = lay_out(tmp_path, real), next(iter(real))
    if lines is None:
        (source / "eurosat-val.txt").unlink()
    else:
        (source / "eurosat-val.txt").write_text(lines.format(first=first))
    with pytest.raises(error, match=message.replace("{first}", first)):
        eurosat(source)
    assert not (tmp_path / "packs" / "eurosat").exists()


def test_data_sets_that_are_not_there_are_errors_that_say_where_to_put_them(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("BANDMASK_DATA", str(tmp_path))
    for name in ("eurosat", "sen12ms", "dfc2020"):
        with pytest.raises(FileNotFoundError, match=rf"{name} is not there: set BANDMASK_DATA to .*docs/thesis.md"):
            datasets.PACKERS[name]()
        assert datasets.absent(name)
    for folder in ("dfc2020_s1s2", SPRING):
        (tmp_path / folder).mkdir()
    with pytest.raises(FileNotFoundError, match=r"holds no dfc2020_s1s2/dfc-train-new.csv.*BANDMASK_DATA"):
        datasets.pack_dfc2020()
    with pytest.raises(FileNotFoundError, match=r"ROIs1158_spring holds no s2_1/ROIs1158_spring_s2_1_p1.tif"):
        datasets.pack_sen12ms()


# --- land cover


def test_codes_become_the_classes_of_their_legend_and_nothing_else_does() -> None:
    names = [*["Forest"] * 5, *["Shrubland"] * 2, *["Savanna"] * 2, "Grassland", "Wetlands", "Croplands"]
    names += ["Urban/Built-up", "Croplands", "Snow/Ice", "Barren", "Water"]
    assert [datasets.SIMPLIFIED[label] for label in target_of(np.array([range(1, 18)]), datasets.IGBP)[0]] == names
    assert target_of(np.array([[0, 1, 3, 10, 11]]), datasets.DFC2020)[0].tolist() == [IGNORE, 0, 2, 9, IGNORE]
    for values in (
        np.uint8([1, 99, 18, 0, 255]),
        np.int16([1, 300, -7, 256, -1]),
        np.int64([1, 2**40, -(2**40), 18, 99]),
    ):
        assert target_of(values[None], datasets.IGBP)[0].tolist() == [0, *[IGNORE] * 4]
    with pytest.raises(ValueError, match="float32; expected integers"):
        target_of(np.ones((1, 1), np.float32), datasets.DFC2020)


# --- SEN12MS


@given(st.lists(st.integers(1, 40), min_size=3, max_size=40), st.randoms())
def test_no_group_is_in_two_splits_and_no_split_is_empty(sizes: list[int], random) -> None:
    groups = [group for group, size in enumerate(sizes) for _ in range(size)]
    splits = dict(zip(groups, by_share(groups), strict=True))
    assert by_share(groups) == [splits[group] for group in groups]
    assert set(splits.values()) == set(SPLITS)
    random.shuffle(groups)
    assert by_share(groups) == [splits[group] for group in groups], "whatever their order"


def test_shares_are_kept_also_of_each_kind() -> None:
    groups = [scene for scene in range(1, 150) for _ in range(100 + 7 * (scene % 40))]
    splits = by_share(groups)
    shares = {name: count / len(splits) for name, count in Counter(splits).items()}
    assert shares == pytest.approx({"train": 0.70, "val": 0.15, "test": 0.15}, abs=0.02)
    kinds = ["a"] * 40 + ["b"] * 20
    table = pd.crosstab(kinds, by_share(range(60), kinds))
    assert table.loc["a", ["train", "val", "test"]].tolist() == [28, 6, 6]
    assert table.loc["b", ["train", "val", "test"]].tolist() == [14, 3, 3]
    with pytest.raises(ValueError, match="2 images or groups are too few: test would be empty"):
        by_share([7, 7, 8, 8])


@pytest.fixture
def tree(tmp_path: Path, small: None) -> Path:
    """7 generated scenes of 4 patches."""
    return trees.sen12ms_tree(tmp_path / "sen12ms")


def sen12ms(source: Path) -> Pack:
    return packed(datasets.pack_sen12ms, source)


def read(file: Path) -> np.ndarray:
    with rasterio.open(file) as tif:
        return tif.read()


def test_images_targets_and_groups_are_those_of_the_files(tree: Path) -> None:
    for patch, count in ((1, 3), (2, 5)):
        codes = read(lc_file(tree, 4, patch))
        codes[0].flat[:count] = 99
        codes[0].flat[count : count + 2] = 0
        write_tif(lc_file(tree, 4, patch), codes)
    (tree / SPRING / "s2_1" / f"._{SPRING}_s2_1_p9.tif").write_bytes(b"litter of macOS")
    packed = sen12ms(tree)
    assert packed.images.shape == (28, 13, SIZE, SIZE)
    assert packed.classes == datasets.SIMPLIFIED
    assert packed.targets is not None
    for row, file in enumerate(packed.index["file"]):
        assert np.array_equal(packed.images[row], read(tree / file))
        codes = read(tree / file.replace("s2", "lc"))[0]
        assert np.array_equal(packed.targets[row], np.vectorize(lambda c: datasets.IGBP.get(c, IGNORE))(codes))
    index = packed.index
    assert (index["group"] == SPRING + "_" + index["file"].str.extract(r"_s2_(\d+)_p")[0]).all()
    assert (index.groupby("group")["split"].nunique() == 1).all()
    assert set(index["split"]) == set(SPLITS)


def test_bad_files_are_all_named(tree: Path) -> None:
    write_tif(s2_file(tree, 1, 1), trees.generated_image(SIZE // 2))
    s2_file(tree, 2, 2).write_bytes(VRT)
    write_tif(lc_file(tree, 3, 1), trees.generated_codes(SIZE)[:1])
    lc_file(tree, 3, 2).write_bytes(VRT)
    write_tif(lc_file(tree, 3, 3), trees.generated_codes(SIZE).astype(np.float32))
    said = {
        s2_file(Path(), 1, 1): r"s2: shape \(13, 8, 8\), expected \(13, 16, 16\)",
        s2_file(Path(), 2, 2): "s2: .*can't be read as GeoTIFF",
        s2_file(Path(), 3, 1): r"lc: shape \(1, 16, 16\), expected \(4, 16, 16\)",
        s2_file(Path(), 3, 2): "lc: .*can't be read as GeoTIFF",
        s2_file(Path(), 3, 3): "lc: land-cover codes are float32",
        s2_file(Path(), 4, 1): "lc: .*No such file",
    }
    lc_file(tree, 4, 1).unlink()
    with pytest.raises(ValueError, match="6 of 28 images") as caught:
        sen12ms(tree)
    for file, problem in said.items():
        assert caught.match(f"{file}: {problem}")
    assert not (tree / "packs" / "sen12ms").exists()


# --- datasets.DFC2020


@pytest.fixture
def contest(tmp_path: Path, small: None) -> Path:
    return trees.dfc2020_tree(tmp_path / "dfc2020")


def dfc2020(source: Path) -> Pack:
    return packed(datasets.pack_dfc2020, source)


def test_images_targets_and_splits_are_those_of_torchgeos_class(contest: Path, monkeypatch) -> None:
    monkeypatch.setenv("BANDMASK_DATA", str(contest.parent))
    assert find_source("dfc2020") == contest
    packed = dfc2020(contest)
    assert packed.targets is not None
    assert packed.classes == Published.classes[1:] == datasets.SIMPLIFIED
    assert tuple(packed.card["bands"]) == Published.all_bands
    for split in SPLITS:
        published = Published(str(contest), split=split)
        rows = packed.rows(split)
        assert len(rows) == len(published) == 4
        for row, sample in zip(rows, (published[i] for i in range(4)), strict=True):
            assert np.array_equal(packed.images[row], sample["image"].numpy())
            labels = sample["mask"].numpy()
            assert np.array_equal(packed.targets[row], np.where(labels == 0, IGNORE, labels - 1))
    assert packed.index.groupby("group").size().tolist() == [6, 6], "patches of one place are a group"
    assert stamp(packed) == stamp(dfc2020(contest))
    shutil.make_archive(str(contest / "dfc2020"), "zip", contest, "dfc2020_s1s2")
    shutil.rmtree(contest / "dfc2020_s1s2")
    shutil.rmtree(contest / "packs")
    assert np.array_equal(dfc2020(contest).images, packed.images), "the archive is unpacked by TorchGeo"


def test_bad_files_of_the_contest_are_named_and_splits_do_not_overlap(contest: Path) -> None:
    folder = contest / "dfc2020_s1s2"
    (folder / "dfc" / "ROIs0000_test_dfc_0_p1.tif").unlink()  # its place is not known either
    with pytest.raises(ValueError, match=r"1 of 12 (.|\n)*dfc: .*No such file"):
        dfc2020(contest)
    with (folder / "dfc-test-new.csv").open("a") as file:
        file.write("ROIs0000_test_dfc_0_p10.tif\n")
    with pytest.raises(ValueError, match=r"ROIs0000_test_dfc_0_p10.tif is in the splits 'train' and 'test'"):
        dfc2020(contest)
    (folder / "dfc-train-new.csv").write_text("../../secret_dfc.tif\n")
    with pytest.raises(ValueError, match=r"\.\./\.\./secret_dfc.tif lies outside of dfc2020_s1s2/dfc"):
        dfc2020(contest)


# --- one's own

L2A = [name for name in bands.NAMES if name != "B10"]


def own(folder: Path, images: Any, **options: Any) -> Pack:
    """Packed below a folder; if nothing else is said, with the classes 0, 1, 2, 0, …, in SatCLIP's order."""
    labels = None if isinstance(images, Path) else np.arange(len(images)) % 3
    return datasets.pack(images, **{"labels": labels, "bands": "satclip", "path": folder / "own"} | options)


def labelled(images: np.ndarray, order: str = "satclip", **attributes: Any) -> xr.DataArray:
    return xr.DataArray(images, {"band": list(bands.ORDERS[order])}, ("n", "band", "y", "x"), attrs=attributes)


def in_folder(folder: Path, images: np.ndarray, **said: Any) -> Path:
    """A GeoTIFF an image, which says of itself what is given, and the table of their labels, 0 and 1 in turn."""
    for row, image in enumerate(images):
        with rasterio.open(write_tif(folder / f"{row}.tif", image), "r+") as tif:
            for name, values in said.items():
                setattr(tif, name, values)
    names = [f"{row}.tif" for row in range(len(images))]
    pd.DataFrame({"file": names, "label": np.arange(len(images)) % 2}).to_csv(folder / "labels.csv", index=False)
    return folder


def test_arrays_of_ones_own_become_a_pack_that_is_opened_by_its_path(tmp_path: Path) -> None:
    images, names = generated_images(60, 8), np.array(["wood", "field", "lake"])[np.arange(60) % 3]
    turned = {"labels": names, "bands": ["B12", *bands.NAMES[:12]], "unit": "reflectance"}
    made = own(tmp_path, images[:, [12, *range(12)]] / 1e4, **turned)
    assert np.array_equal(made.images, images)
    assert [made.classes[label] for label in made.labels] == names.tolist()
    assert pd.crosstab(made.index["label"], made.index["split"]).to_numpy().min() >= 2, "each class is in each split"
    assert open_dataset(str(made.path)).fingerprint == made.fingerprint
    grouped = own(tmp_path / "grouped", images, groups=np.arange(60) // 6)
    assert (grouped.index.groupby("group")["split"].nunique() == 1).all()
    assert stamp(grouped) == stamp(own(tmp_path / "grouped", images, groups=np.arange(60) // 6))
    with pytest.raises(ValueError, match="unknown data set 'landsat'; available: sample, eurosat-mini"):
        open_dataset("landsat")


def test_a_torchgeo_data_set_becomes_a_pack(tmp_path: Path, real: dict[str, bytes]) -> None:
    """TorchGeo's own class reads the files, in their order, as floats."""
    published = EuroSAT(str(lay_out(tmp_path / "data", real)), split="train")
    made = own(tmp_path, published, labels=None, bands="eurosat", classes=published.classes)
    assert len(made.images) == 12
    for row, image in enumerate(made.images):
        assert np.array_equal(image, published[row]["image"].numpy()[REORDER])
        assert made.labels[row] == int(published[row]["label"])


def test_bands_that_ones_own_images_lack_are_nan_in_batches_and_means(tmp_path: Path) -> None:
    """0 DN would be a measurement: black in B10 and everywhere else."""
    images = np.delete(generated_images(30, 8), 10, 1)
    made = own(tmp_path, images, bands=L2A, level="L2A")
    assert made.absent == ("B10",)
    assert np.isnan(made.band_means()).tolist() == [name == "B10" for name in bands.NAMES]
    batch = next(Batches(made, "train", image_size=16, augment=True).epoch()).images
    assert batch.isfinite().float().mean((0, 2, 3)).tolist() == [float(name != "B10") for name in bands.NAMES]
    with pytest.warns(UserWarning, match="^B10: 0 in all images, taken as measured"):
        assert own(tmp_path / "zeros", np.insert(images, 10, 0, 1)).absent == ()
    images[3, 7] = 0
    with pytest.raises(ValueError, match="1 of 30 images can't be packed:\n  image 3: B08: nothing but zeros"):
        own(tmp_path, images, bands=L2A, level="L2A")


def test_a_folder_with_a_table_and_arrays_with_classes_of_pixels_become_packs(tmp_path: Path) -> None:
    images, masks = generated_images(12, 8), np.arange(12)[:, None, None].repeat(8, 1).repeat(8, 2) % 2
    folder, csv = in_folder(tmp_path / "in", images), tmp_path / "other.csv"
    table = pd.read_csv(folder / "labels.csv").assign(split=["train"] * 8 + ["val"] * 2 + ["test"] * 2)
    table.assign(label=["01", "NA ", "01 ", " NA"] * 3).to_csv(csv, index=False)  # no number, no gap, two classes
    arrays = own(tmp_path / "pixels", images, labels=masks, classes=["01", "NA"], splits=table["split"])
    for made in (arrays, own(tmp_path, folder, labels=csv)):
        assert np.array_equal(made.images, images)
        assert made.index["split"].tolist() == table["split"].tolist()
        assert (made.classes, made.labels.tolist()) == (("01", "NA"), [0, 1] * 6)
    assert np.array_equal(arrays.targets, masks)
    table.assign(label=[1, 2] * 6).rename(columns={"label": " label"}).to_csv(csv, index=False)
    made = own(tmp_path, folder, labels=csv, classes=["1", "2", "3"])
    assert made.labels.tolist() == [0, 1] * 6  # the classes called 1 and 2, not those counted so
    (folder / "again.tif").symlink_to(folder / "0.tif")
    for changed, encoding, message in (
        (table.assign(label=[None, *np.arange(11) % 2]), "utf-8", r"1 of 12 images have no label, first \['0.tif'\]"),
        (table.assign(file="../0.tif"), "utf-8", r"'../0.tif'.* lie outside of"),
        (table.assign(file=["0.tif", "./0.tif", *table["file"][2:]]), "utf-8", "1 images .* more than once, .*/0.tif"),
        (table.assign(file=[*table["file"][:11], "again.tif"]), "utf-8", "1 images .* more than once, .*/0.tif"),
        (table.assign(label=[-1, 1] * 6), "utf-8", r"labels \[-1\] have no class"),
        (table, "utf-16", "other.csv is no CSV in UTF-8"),
    ):
        changed.to_csv(csv, index=False, encoding=encoding)
        with pytest.raises(ValueError, match=message):
            own(tmp_path / "refused", folder, labels=csv)
    (folder / "3.tif").write_bytes(VRT)
    huge(folder / "4.tif")
    side = dict.fromkeys(("height", "width", "blockxsize", "blockysize"), 4096)
    huge(folder / "5.tif", count=3000, interleave="band", **side)  # 94 GiB, were they read
    bad = r"3 of 12 (.|\n)*3.tif: .*can't be read.*\n.*4.tif: .*in blocks.*\n.*5.tif: shape \(3000, 4096, 4096\)"
    with pytest.raises(ValueError, match=bad):
        own(tmp_path / "refused", folder)


THIRDS = ["train"] * 20 + ["val"] * 5 + ["test"] * 5
REFUSED: list[tuple[Callable[[Any], Any], dict[str, Any], str]] = [
    (lambda dn: np.where(dn == dn[3, 2, 4, 4], np.nan, dn), {}, "NaN"),
    (lambda dn: np.ma.masked_equal(dn, dn[3, 2, 4, 4]), {}, "hidden by the file.s tags or mask"),
    (lambda dn: np.where(dn == dn[3, 2, 4, 4], 65535, dn), {}, r"without data, 1 values: .*saturated \(65535\)"),
    (lambda dn: dn / 1e4, {}, "give unit='reflectance'"),
    (lambda dn: np.where(dn > 3000, -9999.0, dn), {}, "no-data value"),
    (lambda dn: dn + 1000.0, {}, "offset=-1000"),
    (lambda dn: [*dn[:29], dn[29, :, :4]], {}, "images are of several sizes"),
    (lambda dn: [np.ma.masked_equal(each, dn[3, 2, 4, 4]) for each in dn], {}, "hidden by the file.s tags or mask"),
    (lambda dn: dn[:, :12], {}, "12 channels need 12 different names"),
    (lambda dn: dn[:, [*range(8), 9, 10, 11, 12, 8]], {}, "in the order of 'eurosat'"),
    (lambda dn: (dn // 32).clip(0, 255).astype(np.uint8), {}, "type uint8 are neither DN nor reflectance"),
    (lambda dn: dn / 100, {}, "8 bit or percent .*, a picture and no measurement"),
    (lambda dn: dn / 100, {"unit": "reflectance"}, "8 bit, or percent, which divided by 100"),
    (lambda dn: np.where(np.arange(13)[:, None, None] == 3, -999.0, dn), {}, "B04 is at -999 DN, below no light"),
    # what is said twice must agree
    (lambda dn: labelled(dn, "eurosat"), {}, r"names say B01 .*, the scene's own labels B01 .* B12 B8A;"),
    (lambda dn: labelled(dn, scale_factor=1e-3), {}, "a scale or offset that its values don't have yet"),
    (lambda dn: labelled(dn, dn_per_reflectance=1000), {}, "the images state 1000 DN a reflectance, unit='DN' means"),
    (lambda dn: labelled(dn, level="L2A"), {}, "the images state level L2A; give level='L2A'"),
    (lambda dn: labelled(dn, _FillValue=dn[3, 2, 4, 4]), {}, "pixels without data"),
    (lambda dn: dn, {"splits": THIRDS, "groups": [0] * 30}, "group 0 is in 3 splits"),
    (lambda dn: dn, {"classes": ["a", "b", "a"]}, "3 classes, of which a twice"),
    (lambda dn: dn, {"groups": [0.0] * 10 + [np.nan] * 20}, r"20 of 30 images have no group, first \['image 10'"),
    # NumPy makes the word nan of what is missing in a list of words
    (lambda dn: dn, {"groups": ["a"] * 10 + [np.nan] * 20}, r"20 of 30 images have no group, first \['image 10'"),
    (lambda dn: dn, {"labels": ["sea", "land", np.nan] * 10}, r"10 of 30 images have no label, first \['image 2'"),
    (lambda dn: dn, {"groups": [(0, 1)] * 30}, "30 groups of 30 images; give one each, a word or a number"),
    (lambda dn: dn, {"splits": THIRDS[:5]}, "5 splits of 30 images"),
    (lambda dn: dn, {"offset": "-1000"}, "offset='-1000' is no DN to take off"),
    (lambda dn: dn, {"level": "l1c"}, "unknown level 'l1c'; available: L1C, L2A"),
    # an offset that nobody stated, and one that pixels belie
    (lambda dn: np.delete(dn, 10, 1) + 1000, {"bands": L2A, "level": "L2A"},
        r"darkest pixels are at \d+ DN.*offset=-1000 \(or 0, if none"),
    (lambda dn: (dn + 1000) * (np.arange(13) != 10)[:, None, None], {}, "darkest pixels"),  # as some export L2A
    (lambda dn: dn, {"offset": -1000}, "DN, below no light: offset=-1000, but none was added"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "options", "message"), REFUSED)
def test_arrays_that_can_be_no_dn_or_contradict_what_is_said_are_refused(tmp_path, change, options, message) -> None:
    with pytest.raises(ValueError, match=message):
        own(tmp_path, change(generated_images(30, 8)), **options)
    assert not (tmp_path / "own").exists()


def test_what_an_array_or_a_file_says_of_itself_counts(tmp_path: Path) -> None:
    images = generated_images(30, 8)
    true = labelled(images, dn_per_reflectance=10_000, level="L1C", _FillValue=60_000)
    assert np.array_equal(own(tmp_path, true).images, images)
    folder = in_folder(tmp_path / "in", images[:, [3, 2, 1, 7]], descriptions=("B04", "B03 (560 nm)", "", "B08"))
    with pytest.raises(ValueError, match=r"30 of 30 (.|\n)*calls its bands B04 B03 None B08, not B02 B03 B04 B08"):
        own(tmp_path / "b", folder, bands="B02 B03 B04 B08")
    assert own(tmp_path / "b", folder, bands="B04 B03 B02 B08").labels.tolist() == [0, 1] * 15


def test_an_offset_is_taken_off_where_it_is_stated_and_said_to_be_likely_where_it_is_not(tmp_path: Path) -> None:
    images = generated_images(30, 8) + np.uint16(1000)
    channels, about = bands.channel_indices(L2A), {"bands": L2A, "level": "L2A"}
    zeros = images * (np.arange(13) != 10)[:, None, None].astype(np.uint16)  # B10 of L2A, as some export it
    for row, kept in enumerate(({"images": images[:, channels], **about}, {"images": zeros})):
        made = own(tmp_path / str(row), offset=-1000, **kept)
        assert np.array_equal(made.images[:, channels], images[:, channels] - 1000)
    mixed = np.where(np.arange(30)[:, None, None, None] < 8, images, images - np.uint16(1000))[:, channels]
    with pytest.warns(UserWarning, match="22 of 30 images have no pixel below 900 DN: cloud or bright"):
        own(tmp_path / "mixed", mixed, **about)
    stated = own(tmp_path / "stated", images[:, channels], offset=0, **about)
    assert np.array_equal(stated.images[:, channels], images[:, channels])


@pytest.mark.parametrize(
    ("factor", "added", "tags", "said", "refused"),
    [
        (2, 0, (5e-5, 0.0), None, ""),  # half a DN a unit
        (1, 1000, (1e-4, -0.1), None, ""),  # reflectance
        (1, 1000, (1.0, -1000.0), None, ""),  # DN
        (1, 1000, (1e-4, -0.1), -1000.0, ""),  # said twice, taken off once
        (1, 1000, (1e-4, -0.1), 0.0, "its tags state an offset of -1000 DN; leave offset=0 out"),
        (1, 0, (1e-4, -0.1), None, "DN, below no light"),  # nothing was added
        (1, 0, (-1e-4, 0.0), None, "its tags state scale -"),
    ],
)
def test_scale_and_offset_in_tags_are_applied_unless_they_are_belied(tmp_path, factor, added, tags, said, refused):
    dn = generated_images(12, 8)
    tagged = {"scales": tags[:1] * 13, "offsets": tags[1:] * 13}
    folder = in_folder(tmp_path / "in", dn * np.uint16(factor) + np.uint16(added), **tagged)
    with pytest.raises(ValueError, match=refused) if refused else nullcontext():
        assert np.array_equal(own(tmp_path, folder, offset=said).images, dn)


def test_what_lies_beside_an_image_counts_and_reads_nothing_else(tmp_path: Path) -> None:
    """As of a scene: tags that GDAL keeps beside, and masks; a VRT called `.msk` could ask another host."""
    dn = generated_images(12, 8)
    folder = in_folder(tmp_path / "in", dn + np.uint16(1000))
    valid = np.array([255, 0], np.uint8).repeat(32).reshape(8, 8)
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=False), rasterio.open(folder / "5.tif", "r+") as tif:
        tif.write_mask(valid)
    said = "<PAMRasterBand band='{}'><Offset>-0.1</Offset><Scale>1e-4</Scale></PAMRasterBand>"
    for row in range(12):
        beside = "".join(said.format(n) for n in range(1, 14))
        (folder / f"{row}.tif.aux.xml").write_text(f"<PAMDataset>{beside}</PAMDataset>")
    (folder / "3.tif.msk").write_bytes(VRT)
    with pytest.raises(ValueError, match=r"2 of 12 .*\n  3.tif: .*msk can't be read.*\n  5.tif: pixels without"):
        own(tmp_path, folder)
    for name in ("3.tif.msk", "5.tif.msk"):
        (folder / name).unlink()
    assert np.array_equal(own(tmp_path, folder).images, dn)


def test_every_image_is_tested_in_one_fold_and_groups_stay_together(tmp_path, make_pack) -> None:
    whole = make_pack(tmp_path, n=30)
    folds = [datasets.fold(whole, k) for k in range(5)]
    assert sorted(row for fold in folds for row in fold.rows("test")) == list(range(30))
    for k, fold in enumerate(folds):
        assert np.array_equal(fold.images, whole.images)
        assert fold.rows("val").tolist() == folds[(k + 1) % 5].rows("test").tolist()
    targets = np.arange(30 * 64).reshape(30, 8, 8) // 100 % 2
    about = {"labels": targets, "classes": ["a", "b"], "groups": np.arange(30) // 3}
    pixels = own(tmp_path, generated_images(30, 8), **about)
    grouped = datasets.fold(pixels, 2)
    assert (grouped.index.groupby("group")["split"].nunique() == 1).all()
    assert np.array_equal(grouped.targets, targets)
    assert stamp(grouped) == stamp(datasets.fold(pixels, 2))
    with pytest.raises(ValueError, match="fold 5 does not exist; available: 0 to 4"):
        datasets.fold(whole, 5)
