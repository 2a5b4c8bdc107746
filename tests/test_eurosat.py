"""Real EuroSAT files become the right pack; damaged ones, wrong orders and wrong splits are errors that name them."""

from __future__ import annotations

import os
import re
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from rasterio.io import MemoryFile

from bandmask import bands
from bandmask.datasets import open_dataset
from bandmask.packs import SPLITS, Pack, open_pack
from bandmask.readers.eurosat import EUROSAT_CLASSES, find_eurosat, pack_eurosat

INSIDE = "ds/images/remote_sensing/otherDatasets/sentinel_2/tif"
REORDER = [0, 1, 2, 3, 4, 5, 6, 7, 12, 8, 9, 10, 11]

# Mean DN per file channel of 1,357 real images (facts.md §1), here in SatCLIP order
MEAN_DN = [1380, 1143, 1066, 976, 1219, 2043, 2420, 2337, 2641, 726, 11, 1870, 1177]


@pytest.fixture(scope="session")
def real(eurosat_source: Path) -> dict[str, bytes]:
    """24 real files, `{"Forest_1": bytes}`; every class is among them."""
    with zipfile.ZipFile(eurosat_source) as archive:
        members = sorted(n for n in archive.namelist() if n.endswith(".tif"))
        chosen = [n for c in EUROSAT_CLASSES for n in [m for m in members if Path(m).parent.name == c][:3]][:24]
        assert {Path(n).parent.name for n in chosen} >= set(EUROSAT_CLASSES[:8])
        return {Path(n).stem: archive.read(n) for n in chosen}


def lay_out(folder: Path, images: dict[str, bytes], form: str = "folder") -> Path:
    """Files in the official layout, as a folder or zip, with split lists of their own: two to train, one each else."""
    folder.mkdir(parents=True, exist_ok=True)
    members = {f"{INSIDE}/{name.split('_')[0]}/{name}.tif": data for name, data in images.items()}
    for index, split in enumerate(("train", "val", "test")):
        names = [name for i, name in enumerate(images) if (0, 1, 2, 0)[i % 4] == index]
        (folder / f"eurosat-{split}.txt").write_text("".join(f"{name}.jpg\n" for name in names))
    if form == "zip":
        with zipfile.ZipFile(folder / "EuroSATallBands.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            for member, data in members.items():
                archive.writestr(member, data)
        return folder / "EuroSATallBands.zip"
    for member, data in members.items():
        (folder / member).parent.mkdir(parents=True, exist_ok=True)
        (folder / member).write_bytes(data)
    return folder


def pack(source: Path, **options: Any) -> Pack:
    """Pack beside the source."""
    beside = source.parent if source.is_file() else source
    return pack_eurosat(source, beside / "packs" / "eurosat", progress=False, **options)


def read_directly(data: bytes) -> np.ndarray:
    with MemoryFile(data) as memory, memory.open() as tif:
        return tif.read()


def written(image: np.ndarray) -> bytes:
    """A GeoTIFF of this array, somewhere in Virginia."""
    count, height, width = image.shape
    place = {"crs": "EPSG:32618", "transform": rasterio.Affine(10, 0, 400_000, 0, -10, 4_200_000)}
    with MemoryFile() as memory:
        with memory.open(driver="GTiff", count=count, height=height, width=width, dtype=image.dtype, **place) as tif:
            tif.write(image)
        return memory.read()


def as_float(image: np.ndarray) -> np.ndarray:
    image = image.astype(np.float32)
    image[:, :16] = np.nan
    return image


DAMAGE: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "truncated": (lambda data: data[: len(data) * 2 // 3], "truncated or not a GeoTIFF"),
    "cut by a byte": (lambda data: data[:-1], "truncated or not a GeoTIFF"),
    "empty": (lambda data: b"", "truncated or not a GeoTIFF"),
    "a web page": (lambda data: b"<html>404 not found</html>", "truncated or not a GeoTIFF"),
    "12 bands": (lambda data: written(read_directly(data)[:12]), "12 bands, expected 13"),
    "float with NaN": (lambda data: written(as_float(read_directly(data))), "float32, 25% of it NaN; expected uint16"),
    "zeros": (lambda data: written(np.zeros((13, 64, 64), np.uint16)), "nothing but zeros"),
    "smaller": (lambda data: written(read_directly(data)[:, :32, :32]), r"shape \(13, 32, 32\)"),
}


# --- the right pack


def test_all_real_images_are_packed_with_their_splits_and_classes(eurosat_pack: Pack) -> None:
    assert eurosat_pack.images.shape == (997, 13, 64, 64)
    assert eurosat_pack.index["split"].value_counts().to_dict() == {"train": 599, "val": 197, "test": 201}
    counts = np.bincount(eurosat_pack.labels, minlength=10)
    assert dict(zip(eurosat_pack.classes, counts, strict=True)) == {
        "AnnualCrop": 38,
        "Forest": 166,
        "HerbaceousVegetation": 38,
        "Highway": 32,
        "Industrial": 164,
        "Pasture": 28,
        "PermanentCrop": 163,
        "Residential": 168,
        "River": 162,
        "SeaLake": 38,
    }
    files = eurosat_pack.index["file"]
    assert files.is_unique
    assert [Path(f).parent.name for f in files] == [eurosat_pack.classes[label] for label in eurosat_pack.labels]


def test_mean_dn_per_band_is_that_of_the_published_files(eurosat_pack: Pack) -> None:
    mean = np.asarray(eurosat_pack.images).mean((0, 2, 3))
    assert mean == pytest.approx(MEAN_DN, rel=0.05, abs=2)
    assert [name for name, value in zip(bands.NAMES, mean, strict=True) if value < 50] == ["B10"]
    assert eurosat_pack.band_means("train").mean() == pytest.approx(0.1431, rel=0.03)  # the thesis' dataset mean
    for split in SPLITS:
        rows = eurosat_pack.rows(split)
        assert eurosat_pack.band_means(split) * 10_000 == pytest.approx(
            eurosat_pack.images[rows].mean((0, 2, 3), dtype=np.float64), abs=1e-3
        )


def test_images_are_what_rasterio_reads_in_satclip_order(eurosat_pack: Pack, eurosat_source: Path) -> None:
    for row in (0, 1, 250, 598, 599, 800, 996):
        file = eurosat_pack.index["file"].iloc[row]
        with rasterio.open(f"zip://{eurosat_source}!{file}") as tif:
            assert np.array_equal(eurosat_pack.images[row], tif.read()[REORDER])


def test_rows_follow_the_split_files(eurosat_pack: Pack, eurosat_source: Path) -> None:
    for split in SPLITS:
        names = (eurosat_source.parent / f"eurosat-{split}.txt").read_text().split()
        packed = eurosat_pack.index["file"].iloc[eurosat_pack.rows(split)]
        assert [Path(file).stem for file in packed] == [Path(name).stem for name in names]


def test_a_zip_and_an_extracted_folder_are_the_same_pack(tmp_path: Path, real: dict[str, bytes]) -> None:
    one, other = (pack(lay_out(tmp_path / form, real, form)) for form in ("zip", "folder"))
    assert len(one.images) == len(real) == 24
    assert np.array_equal(one.images, other.images)
    assert one.index[["label", "split"]].equals(other.index[["label", "split"]])
    for row, file in enumerate(one.index["file"]):
        assert np.array_equal(one.images[row], read_directly(real[Path(file).stem])[REORDER])


def test_split_files_of_ones_own(tmp_path: Path, real: dict[str, bytes]) -> None:
    source = lay_out(tmp_path / "data", real)
    names = list(real)
    (tmp_path / "a.txt").write_text(f"\n  {names[0]}.tif\r\n{names[5].split('_')[0]}/{names[5]}.jpg\n\n")
    (tmp_path / "b.txt").write_text(f"{names[9]}.jpg")
    packed = pack(source, split_files={"train": tmp_path / "a.txt", "test": str(tmp_path / "b.txt")})
    assert [Path(file).stem for file in packed.index["file"]] == [names[0], names[5], names[9]]
    assert list(packed.index["split"]) == ["train", "train", "test"]


def test_a_spatial_split_goes_by_its_prefix(tmp_path: Path, real: dict[str, bytes]) -> None:
    source = lay_out(tmp_path, real)
    for split in SPLITS:
        shutil.copy(source / f"eurosat-{split}.txt", source / f"eurosat-spatial-{split}.txt")
    moved = (source / "eurosat-spatial-val.txt").read_text() + (source / "eurosat-spatial-test.txt").read_text()
    (source / "eurosat-spatial-val.txt").write_text(moved)
    (source / "eurosat-spatial-test.txt").write_text("")
    counts = pack(source, split_prefix="eurosat-spatial").index["split"].value_counts().to_dict()
    assert counts == {"train": 12, "val": 12}


def test_both_splits_can_be_opened_by_name_side_by_side(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, real: dict[str, bytes]
) -> None:
    source = lay_out(tmp_path / "data", real, "zip")
    for split, other in zip(SPLITS, ("test", "train", "val"), strict=True):
        shutil.copy(source.parent / f"eurosat-{split}.txt", source.parent / f"eurosat-spatial-{other}.txt")
    monkeypatch.setenv("BANDMASK_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("BANDMASK_OUTPUTS", str(tmp_path / "outputs"))
    official, spatial = open_dataset("eurosat"), open_dataset("eurosat-spatial")
    assert official.path != spatial.path
    assert set(official.index["file"][official.rows("val")]) == set(spatial.index["file"][spatial.rows("train")])
    assert stamp(open_dataset("eurosat")) == stamp(official)
    assert stamp(open_dataset("eurosat-spatial")) == stamp(spatial)


# --- opened again, or made again


def stamp(packed: Pack) -> tuple[int, int]:
    stat = (packed.path / "images.npy").stat()
    return stat.st_ino, stat.st_mtime_ns


@pytest.mark.parametrize("form", ["zip", "folder"])
def test_an_unchanged_source_is_not_packed_again(tmp_path: Path, real: dict[str, bytes], form: str) -> None:
    source = lay_out(tmp_path, real, form)
    first = stamp(pack(source))
    assert stamp(pack(source)) == first
    (source.parent / "EuroSATallBands.zip").touch() if form == "zip" else None
    assert stamp(pack(source)) == first, "a zip is known by its content, not by its time"


@pytest.mark.parametrize("change", ["splits", "zip", "damaged pack"])
def test_a_changed_source_or_split_or_a_damaged_pack_is_packed_again(
    tmp_path: Path, real: dict[str, bytes], change: str
) -> None:
    source = lay_out(tmp_path, real, "zip")
    before = pack(source)
    old = stamp(before)
    if change == "splits":
        train, val = ((tmp_path / f"eurosat-{split}.txt").read_text() for split in ("train", "val"))
        (tmp_path / "eurosat-train.txt").write_text(val)
        (tmp_path / "eurosat-val.txt").write_text(train)
    elif change == "zip":
        lay_out(tmp_path, dict(reversed(real.items())), "zip")
    else:
        (before.path / "index.parquet").write_bytes(b"")
    after = pack(source)
    assert stamp(after) != old
    assert len(after.images) == 24
    for row, file in enumerate(after.index["file"]):
        split = after.index["split"].iloc[row]
        assert f"{Path(file).stem}.jpg" in (tmp_path / f"eurosat-{split}.txt").read_text().split()
        assert np.array_equal(after.images[row], read_directly(real[Path(file).stem])[REORDER])


def test_a_changed_file_in_a_folder_is_packed_again(tmp_path: Path, real: dict[str, bytes]) -> None:
    source = lay_out(tmp_path, real)
    first = pack(source)
    name = list(real)[3]
    file = source / first.index["file"][first.index["file"].str.contains(f"{name}.tif")].iloc[0]
    brighter = read_directly(real[name])
    brighter[0] += 1
    file.write_bytes(written(brighter))
    os.utime(file, ns=(1, 1))
    again = pack(source)
    row = int(np.flatnonzero(again.index["file"].str.contains(f"{name}.tif"))[0])
    assert np.array_equal(again.images[row], brighter[REORDER])


# --- what is refused


def test_files_read_in_the_wrong_order_are_refused_with_the_right_one_named(
    tmp_path: Path, real: dict[str, bytes]
) -> None:
    source = lay_out(tmp_path, real)
    before = stamp(pack(source))
    with pytest.raises(ValueError, match=r"read as 'satclip'.*B10.*order='eurosat'"):
        pack(source, order="satclip")
    assert stamp(open_pack(tmp_path / "packs" / "eurosat")) == before
    assert [p.name for p in (tmp_path / "packs").iterdir()] == ["eurosat"]


@pytest.mark.parametrize("form", ["zip", "folder"])
@pytest.mark.parametrize("older", [False, True])
def test_one_error_names_every_bad_file_and_the_older_pack_stays(
    tmp_path: Path, real: dict[str, bytes], form: str, older: bool
) -> None:
    before = stamp(pack(lay_out(tmp_path, real, form))) if older else None
    names = list(real)
    bad = dict(zip(names[5::2], DAMAGE.values(), strict=False))
    assert len(bad) == len(DAMAGE)
    source = lay_out(tmp_path, real | {name: spoil(real[name]) for name, (spoil, _) in bad.items()}, form)
    with pytest.raises(ValueError, match=f"{len(bad)} of 24 images can't be packed") as error:
        pack(source)
    lines = str(error.value).splitlines()[1 : 1 + len(bad)]
    for name, (_, problem) in bad.items():
        assert any(re.search(f"/{name}.tif: .*{problem}", line) for line in lines), (name, problem)
    assert not any(f"/{name}." in str(error.value) for name in names if name not in bad)
    assert "skip_bad=True" in str(error.value)
    if older:
        assert stamp(open_pack(tmp_path / "packs" / "eurosat")) == before
    assert [p.name for p in (tmp_path / "packs").iterdir()] == (["eurosat"] if older else [])


def test_bad_files_are_left_out_if_asked_for_and_the_others_keep_their_labels(
    tmp_path: Path, real: dict[str, bytes]
) -> None:
    names = list(real)
    bad = dict(zip(names[5::2], DAMAGE.values(), strict=False))
    source = lay_out(tmp_path, real | {name: spoil(real[name]) for name, (spoil, _) in bad.items()})
    packed = pack(source, skip_bad=True)
    good = [name for name in names if name not in bad]
    assert sorted(Path(file).stem for file in packed.index["file"]) == sorted(good)
    assert sorted(Path(file).stem for file in packed.card["skipped"]) == sorted(bad)
    for row, file in enumerate(packed.index["file"]):
        name = Path(file).stem
        assert np.array_equal(packed.images[row], read_directly(real[name])[REORDER])
        assert packed.classes[packed.labels[row]] == name.split("_")[0]
        split = packed.index["split"].iloc[row]
        assert f"{name}.jpg" in (source / f"eurosat-{split}.txt").read_text()
    expected = packed.images[packed.rows("train")].mean((0, 2, 3), dtype=np.float64) / 10_000
    assert packed.band_means("train") == pytest.approx(expected, abs=1e-8)
    assert stamp(pack(source, skip_bad=True)) == stamp(packed)


@pytest.mark.parametrize("skip_bad", [False, True])
def test_a_wrongly_sized_file_is_the_bad_one_even_if_it_comes_first(
    tmp_path: Path, real: dict[str, bytes], skip_bad: bool
) -> None:
    names = list(real)
    source = lay_out(tmp_path, real | {names[0]: written(read_directly(real[names[0]])[:, :32, :32])})
    if skip_bad:
        assert pack(source, skip_bad=True).images.shape == (23, 13, 64, 64)
    else:
        with pytest.raises(ValueError, match=f"1 of 24 images can't be packed:\n.*/{names[0]}.tif: shape") as error:
            pack(source)
        assert not any(f"/{name}." in str(error.value) for name in names[1:])


def test_nothing_but_bad_files_is_an_error_even_if_they_may_be_skipped(tmp_path: Path, real: dict[str, bytes]) -> None:
    source = lay_out(tmp_path, dict.fromkeys(real, b"<html>404</html>"))
    with pytest.raises(ValueError, match="24 of 24 images can't be packed"):
        pack(source, skip_bad=True)


@pytest.mark.parametrize("place", [0, 0.002, 0.3, 0.99])
def test_a_damaged_member_of_a_zip_is_named(tmp_path: Path, real: dict[str, bytes], place: float) -> None:
    source = lay_out(tmp_path, real, "zip")
    with zipfile.ZipFile(source) as archive:
        member = archive.infolist()[7]
    content = bytearray(source.read_bytes())
    start = member.header_offset + 30 + len(member.filename) + int(place * (member.compress_size - 100))
    content[start : start + 100] = bytes(byte ^ 0xFF for byte in content[start : start + 100])
    source.write_bytes(content)
    with pytest.raises(ValueError, match=f"1 of 24 images can't be packed:\n  {member.filename}: damaged in the zip"):
        pack(source)
    assert len(pack(source, skip_bad=True).images) == 23


def test_files_that_can_not_be_opened_are_named_with_the_other_bad_ones(tmp_path: Path, real: dict[str, bytes]) -> None:
    """Data managers leave links to files that were never fetched."""
    names = list(real)
    source = lay_out(tmp_path, real | {names[3]: b""})
    place = {name: next(source.rglob(f"{name}.tif")) for name in (names[6], names[9])}
    for file in place.values():
        file.unlink()
    place[names[6]].symlink_to(tmp_path / "never-fetched.tif")
    place[names[9]].mkdir()
    with pytest.raises(ValueError, match="3 of 24 images can't be packed") as error:
        pack(source)
    assert all(f"/{names[i]}.tif: " in str(error.value) for i in (3, 6, 9))
    assert len(pack(source, skip_bad=True).images) == 21


def test_half_a_zip_is_an_error_that_says_to_fetch_it_again(tmp_path: Path, real: dict[str, bytes]) -> None:
    source = lay_out(tmp_path, real, "zip")
    source.write_bytes(source.read_bytes()[: source.stat().st_size // 2])
    with pytest.raises(ValueError, match=rf"{re.escape(str(source))} is not a whole zip file.*fetch it again"):
        pack(source)


@pytest.mark.parametrize(
    ("lines", "error", "message"),
    [
        (
            "Desert_1.jpg\n",
            ValueError,
            r"eurosat-val.txt: 'Desert_1.jpg' is of no EuroSAT class; .*AnnualCrop.*SeaLake",
        ),
        ("{first}.jpg\n", ValueError, r"eurosat-val.txt: '{first}.jpg' is in the split 'train' too"),
        ("Forest_9999.jpg\n", FileNotFoundError, r"1 of 19 images of the split files are not in .*\['Forest_9999'\]"),
        (None, FileNotFoundError, r"eurosat-val.txt is not there yet"),
    ],
    ids=["unknown class", "overlapping splits", "missing image", "missing list"],
)
def test_split_files_that_do_not_fit_are_refused_by_line(
    tmp_path: Path, real: dict[str, bytes], lines: str | None, error: type[Exception], message: str
) -> None:
    source, first = lay_out(tmp_path, real), next(iter(real))
    if lines is None:
        (source / "eurosat-val.txt").unlink()
    else:
        (source / "eurosat-val.txt").write_text(lines.format(first=first))
    with pytest.raises(error, match=message.replace("{first}", first)):
        pack(source)
    assert not (tmp_path / "packs" / "eurosat").exists()


def test_split_files_without_a_name_in_them_are_refused(tmp_path: Path, real: dict[str, bytes]) -> None:
    source = lay_out(tmp_path, real)
    for split in SPLITS:
        (source / f"eurosat-{split}.txt").write_text("\n")
    with pytest.raises(ValueError, match=r"0 images|no image|empty"):
        pack(source)


def test_an_unknown_split_is_refused_with_those_that_exist(tmp_path: Path, real: dict[str, bytes]) -> None:
    source = lay_out(tmp_path, real)
    with pytest.raises(ValueError, match=r"unknown split \['validation'\]; available: train, val, test"):
        pack(source, split_files={"validation": source / "eurosat-val.txt"})


def test_the_source_folder_is_never_replaced_by_the_pack(tmp_path: Path, real: dict[str, bytes]) -> None:
    source = lay_out(tmp_path / "data", real)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises((ValueError, OSError), match=re.escape(str(source))):
        pack_eurosat(source, source, progress=False)
    assert sorted(tmp_path.rglob("*")) == before


# --- where it is looked for


@pytest.mark.parametrize(
    ("makes", "found"),
    [
        ("eurosat/EuroSATallBands.zip", "eurosat/EuroSATallBands.zip"),
        ("EuroSATallBands.zip", "EuroSATallBands.zip"),
        ("eurosat/EuroSATallBands-subset.zip", "eurosat/EuroSATallBands-subset.zip"),
        (f"eurosat/{INSIDE}/Forest/Forest_1.tif", "eurosat"),
        (f"{INSIDE}/Forest/Forest_1.tif", "."),
        ("eurosat/tif/Forest/Forest_1.tif", "eurosat"),
        ("other/thing.zip", None),
    ],
)
def test_eurosat_is_found_below_the_data_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, makes: str, found: str | None
) -> None:
    monkeypatch.setenv("BANDMASK_DATA", str(tmp_path))
    assert find_eurosat() is None
    (tmp_path / makes).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / makes).touch()
    assert find_eurosat() == (tmp_path / found if found else None)


def test_no_eurosat_is_an_error_that_says_where_to_put_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BANDMASK_DATA", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"BANDMASK_DATA.*download_eurosat\(folder\)"):
        pack_eurosat()
    with pytest.raises(FileNotFoundError, match=r"elsewhere.zip.*download_eurosat\(folder\)"):
        pack_eurosat(tmp_path / "elsewhere.zip")
