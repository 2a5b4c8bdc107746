"""A scene of one's own: the right numbers in the right place under the right name, or a refusal that says what to do.

The reference for the 20 and 60 m bands is GDAL's warper, which `scene` doesn't use; what healthy scenes hold may differ
from what `imagery` of 47b73a7 read by 0.001 DN at most. Products are generated in ESA's layout with the sample's
pixels, see `safe`; files that lie are made as they are met. Real tiles are read where `BANDMASK_DATA` has them.
"""

import copy
import pickle
import re
import shutil
import socketserver
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
import rioxarray
import xarray as xr
from conftest import real_tiles
from rasterio.shutil import copy as copy_raster
from rasterio.transform import Affine, from_origin
from safe import CORNER, SIZE, metadata, native, safe_tree, sample_dn, write_band

from bandmask import bands, datasets, scene
from bandmask.scene import open_scene

L2A = tuple(name for name in bands.NAMES if name != "B10")
GEE = [name.replace("B0", "B") for name in bands.NAMES]  # as Earth Engine writes them
TOP = np.arange(SIZE)[:, None] < 60


@pytest.fixture(scope="module")
def l1c(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return safe_tree(tmp_path_factory.mktemp("l1c"))


@pytest.fixture(scope="module")
def sample() -> xr.DataArray:
    return open_scene(datasets.SAMPLE_FOLDER)


def image(product: Path, band: str) -> Path:
    """The finest file of a band."""
    return min(product.glob(f"GRANULE/*/IMG_DATA/**/*_{band}*.jp2"))


def loose(folder: Path, change=lambda dn: dn, only=bands.NAMES, name="{}.tif", **profile: Any) -> Path:
    """Single-band files at native resolution, their numbers changed."""
    for band in only:
        write_band(folder / name.format(band), change(native(band)), bands.BY_NAME[band].gsd_m, **profile)
    return folder


def stack(folder, labels=None, order=bands.NAMES, extra=(), change=lambda dn: dn, tags=None, **profile) -> Path:
    """A GeoTIFF of all bands, with further channels of one value each, labels, and tags of scale and offset."""
    dn = np.stack([sample_dn()[bands.NAMES.index(band)] for band in order])
    dn = change(np.concatenate([dn, np.ones((len(extra), SIZE, SIZE), dn.dtype) * np.reshape(extra, (-1, 1, 1))]))
    path = write_band(folder / "stack.tif", dn, **profile)
    with rasterio.open(path, "r+") as tif:
        if labels:
            tif.descriptions = tuple(labels)
        if tags:
            tif.scales, tif.offsets = (tags[0],) * len(dn), (tags[1],) * len(dn)
    return path


def added(dn: np.ndarray) -> np.ndarray:
    return dn + np.uint16(1000)


def lacks_its_top(path: Path, **given: Any) -> bool:
    """Whether 60 rows of the stack are hidden, and all others what was written."""
    return np.array_equal(open_scene(path, **given).values, np.where(TOP, np.nan, sample_dn()), equal_nan=True)


def changed(text: Callable[[str], str], level: str = "L1C", baseline: str = "02.04", offset: int | None = None):
    """A SAFE product whose metadata are others."""

    def make(folder: Path) -> Path:
        product = safe_tree(folder, level, baseline, offset=offset)
        path = product / f"MTD_MSI{level}.xml"
        path.write_text(text(path.read_text()))
        return product

    return make


# --- the right numbers in the right place


def test_the_sample_is_what_gdals_warper_makes_of_it(sample: xr.DataArray):
    """Its coarse grids are shifted by 10 and 20 m, so counting pixels would not do; edges have values."""
    ours, theirs = sample.values, datasets.sample_scene()
    seen = ~np.isnan(ours)
    assert np.abs(ours - theirs.values)[seen].max() < 0.01
    assert np.flatnonzero((~seen).any((1, 2))).tolist() == [bands.NAMES.index("B10")]  # which holds zeros
    assert np.array_equal(sample.x, theirs.x)
    assert np.array_equal(sample.y, theirs.y)
    assert (sample.rio.crs, sample.rio.transform()) == (theirs.rio.crs, theirs.rio.transform())
    assert (tuple(sample.band.values), sample.dims, sample.dtype) == (bands.NAMES, ("band", "y", "x"), np.float32)
    assert float(sample.sel(band="B8A").wavelength_nm) == 865
    assert [sample.attrs[name] for name in ("units", "hidden_bands", "level")] == ["DN", (), "L1C"]


def test_a_window_is_a_part_of_the_whole(sample: xr.DataArray):
    """To the bit: what a tile sees must not depend on how the scene is cut."""
    whole = sample.values
    for y, x in ((slice(0, 7), slice(0, 5)), (slice(511, 640), slice(333, 334)), (slice(1000, 1024), slice(900, 1024))):
        assert np.array_equal(sample[:, y, x].values, whole[:, y, x], equal_nan=True)
    picked = sample.sel(band=["B8A", "B02"]).isel(y=[9, 3], x=-1)
    assert np.array_equal(picked.values, whole[[8, 1]][:, [9, 3], -1])
    assert np.array_equal(sample[4, ::100, ::-200].values, whole[4, ::100, ::-200])
    assert sample[:, 5:5].values.shape == (13, 0, 1024)


def test_a_safe_product_holds_what_was_written_into_it(l1c: Path):
    """JPEG 2000 without loss; coarse bands as GDAL's warper gives them."""
    opened = open_scene(l1c)
    for band in ("B02", "B03", "B04", "B08"):
        assert np.array_equal(opened.sel(band=band).values, native(band))
    for name in ("B05", "B09"):
        reference, coarse = (rioxarray.open_rasterio(image(l1c, band)).astype("float32") for band in ("B02", name))
        warped = coarse.rio.reproject_match(reference, resampling=rasterio.enums.Resampling.bilinear).values[0]
        assert np.abs(opened.sel(band=name).values - warped).max() < 0.01


def test_every_way_of_keeping_a_scene_gives_the_same_numbers(l1c: Path, tmp_path: Path):
    archive = shutil.make_archive(str(tmp_path / "odd {brace" / "product"), "zip", l1c.parent)
    files = loose(tmp_path / "loose")
    expected = open_scene(l1c)
    listed = [files / f"{band}.tif" for band in reversed(bands.NAMES)]
    for path in (archive, l1c.parent, l1c / "MTD_MSIL1C.xml", files, listed):
        assert np.array_equal(open_scene(path).values, expected.values)
    with zipfile.ZipFile(tmp_path / "bands.zip", "w") as zipped:
        for path in listed:
            zipped.write(path, f"cut/{path.name}")
            zipped.writestr(f"__MACOSX/cut/._{path.name}", b"\0\5\x16\7")
    assert np.array_equal(open_scene(tmp_path / "bands.zip").values, expected.values)
    assert (expected.attrs["level"], expected.attrs["processing_baseline"]) == ("L1C", "02.04")
    euro = stack(tmp_path / "euro", order=bands.ORDERS["eurosat"])
    assert np.array_equal(open_scene(euro, order="eurosat").values, sample_dn())


def test_nothing_is_read_before_it_is_asked_for(l1c: Path, monkeypatch: pytest.MonkeyPatch):
    opened, read = open_scene(l1c), []
    monkeypatch.setattr(scene._Source, "dn", lambda self, window: read.append(window) or dn(self, window))
    part = pickle.loads(pickle.dumps(opened[:, 60:100, :9]))  # opens its files anew
    cut = opened.rio.clip_box(CORNER[0], CORNER[1] - 500, CORNER[0] + 400, CORNER[1])
    assert (read, part.shape, cut.shape) == ([], (13, 40, 9), (13, 50, 40))
    assert np.array_equal(part.values, opened.values[:, 60:100, :9])
    assert max(window.height for window in read[:13]) == 40
    assert np.array_equal(copy.deepcopy(cut).values, opened.values[:, :50, :40])


dn = scene._Source.dn


# --- what numbers mean


@pytest.mark.parametrize("level", ["L1C", "L2A"])
def test_the_offset_of_baseline_04_is_taken_off(l1c: Path, tmp_path: Path, level: str):
    """The product holds 1000 DN more, as ESA's do; the scene is the same as before, of the finest file of each band."""
    product = safe_tree(tmp_path, level, "04.00", offset=-1000)
    assert np.array_equal(rioxarray.open_rasterio(image(product, "B02")).values[0], added(native("B02")))
    opened, before = open_scene(product), open_scene(l1c)
    assert (opened.attrs["processing_baseline"], opened.attrs["level"]) == ("04.00", level)
    seen = [band for band in bands.NAMES if band not in opened.attrs["hidden_bands"]]
    assert np.abs(opened.sel(band=seen).values - before.sel(band=seen).values).max() < 0.01
    assert opened.attrs["hidden_bands"] == (() if level == "L1C" else ("B10",))
    below = open_scene(sorted((product / "GRANULE").rglob("*_B0[234]*.jp2"))[:3], hide_missing=True)  # metadata above
    assert np.array_equal(below.sel(band="B03").values, native("B03"))


def test_offsets_belong_to_the_bands_that_the_metadata_name(tmp_path: Path):
    """A file that numbers its bands otherwise: its own list says which is which."""
    product = safe_tree(tmp_path, "L2A", "05.09", offset=-1000)
    text = metadata("L2A", "05.09", -1000)
    text = text.replace('band_id="7">-1000', 'band_id="7">-777').replace('bandId="7"', 'bandId="x"')
    text = text.replace('bandId="8"', 'bandId="7"').replace('bandId="x"', 'bandId="8"')
    before = open_scene(product)
    (product / "MTD_MSIL2A.xml").write_text(text)
    raised = (open_scene(product) - before).mean(("y", "x"))
    assert raised.sel(band="B8A") == pytest.approx(223, abs=0.01)
    assert raised.drop_sel(band=["B8A", "B10"]).values == pytest.approx(0)


OLD = "S2A_OPER_{}_L1C_TL_SGS__20151105T205101_A002818_T18SVG"
READ: dict[str, tuple[Callable[[Path], Path], dict[str, Any], str]] = {
    "offset by hand": (lambda t: loose(t, added), {"offset": -1000}, ""),
    "thick cirrus, and the answer is 0": (
        lambda t: stack(t, GEE, change=lambda dn: np.where(np.arange(13)[:, None, None] == 10, 1005, dn).astype("u2")),
        {"offset": 0}, ""),
    "a date after January 2022, and B10 is dark": (lambda t: loose(t, name="T18SVG_20230601T155101_{}.tif"), {}, ""),
    "scale and offset tags": (lambda t: stack(t, L2A, L2A, change=added, tags=(1e-4, -0.1)), {}, ""),
    "scale tag": (lambda t: stack(t, GEE, change=lambda dn: dn * 2, tags=(5e-5, 0)), {}, ""),
    "a path that names an old baseline": (
        lambda t: stack(t / "S2A_MSIL2A_20180105T155101_N0206_R011_T18SVG_20230105T155500.SAFE", L2A, L2A), {}, ""),
    "Sen2Cor at home writes 99": (changed(lambda _: metadata("L2A", "99.99", None), "L2A"), {}, ""),
    "pilots wrote other tags": (
        changed(lambda _: metadata("L2A", "N0205", None).replace("BOA_QU", "L2A_BOA_QU"), "L2A"), {}, ""),
    "12 channels in a named order": (lambda t: stack(t, order=L2A), {"order": "satclip"}, ""),
    "Earth Engine's quality bands": (
        lambda t: stack(t, [*GEE, "QA10", "QA20", "QA60"], extra=(0, 0, 0)), {}, "left out: QA10, QA20, QA60"),
    "… and an order of the 13": (lambda t: stack(t, [*GEE, "QA60"], extra=(0,)), {"order": GEE}, "left out: QA60"),
    "… and an order of all": (
        lambda t: stack(t, [*GEE, "QA60"], extra=(0,)), {"order": [*GEE, "QA60"]}, "left out: QA60"),
    "NDVI, SCL and an unnamed channel": (
        lambda t: stack(t, [*GEE, "NDVI", "SCL", ""], extra=(1, 4, 65535)), {}, "left out: NDVI, SCL, channel 16"),
    "positions in disguise, and an order": (
        lambda t: stack(t, [f"B{n}" for n in range(1, 14)], bands.ORDERS["eurosat"]), {"order": "eurosat"}, ""),
    "names of the Copernicus Browser": (
        lambda t: loose(t, name="2020-01-05-00_00_Sentinel-2_L1C_{}_(Raw).tiff"), {}, ""),
    "pixels of 10 × 9.9996 m": (
        lambda t: stack(t, GEE, transform=Affine(10, 0, CORNER[0], 0, -9.9996, CORNER[1])), {}, ""),
    "DN kept as float": (lambda t: stack(t, GEE, change=lambda dn: dn.astype("float32")), {}, ""),
    "degrees, as Earth Engine exports at a scale of 10": (
        lambda t: stack(t, GEE, crs="EPSG:4326", transform=from_origin(-75.7, 37.7, *[10 / 111_320] * 2)), {},
        "in EPSG:4326, where a pixel is 7.9 × 10.0 m of ground: good for patches and embeddings"),
    "web Mercator, as map servers do": (  # cos(37.7°)
        lambda t: stack(t, GEE, crs="EPSG:3857", transform=from_origin(-8_426_900, 4_538_300, 10, 10)), {},
        "in EPSG:3857, where a pixel is 7.9 × 7.9 m of ground: good for patches and embeddings"),
}  # fmt: skip


@pytest.mark.parametrize("what", READ)
@pytest.mark.filterwarnings("ignore")  # of cirrus
def test_what_a_file_says_is_believed(tmp_path: Path, what: str):
    make, given, said = READ[what]
    opened = open_scene(make(tmp_path), **given)
    for band in ("B02", "B08"):
        assert np.array_equal(opened.sel(band=band).values, native(band)), opened.attrs
    assert said in opened.attrs["note"]


@pytest.mark.parametrize("quantification", [10_000, 1000])
def test_products_of_before_december_2016_are_read(tmp_path: Path, quantification: int):
    """Other names, and at first 1000 DN a reflectance; as a folder, a zip or files, beside what macOS leaves."""
    safe = tmp_path / "in" / "S2A_OPER_PRD_MSIL1C_PDMC_20151105T225101_R011_V20151105T155101_20151105T155101.SAFE"
    for band in bands.NAMES:
        dn = (native(band) * (quantification / 10_000)).round().clip(1).astype(np.uint16)
        folder = safe / "GRANULE" / (OLD.format("MSI") + "_N01.00") / "IMG_DATA"
        write_band(folder / f"{OLD.format('MSI')}_{band}.jp2", dn, bands.BY_NAME[band].gsd_m)
        (folder / f"._{OLD.format('MSI')}_{band}.jp2").write_bytes(b"\0\5\x16\7" + bytes(100))
    (safe / "S2A_OPER_MTD_SAFL1C_PDMC_20151105T225101.xml").write_text(metadata("L1C", "01.00", None, quantification))
    archive = shutil.make_archive(str(tmp_path / "old"), "zip", safe.parent)
    files = sorted(folder.glob("S2A*.jp2"))
    for path in (safe, archive, folder, files):
        opened = open_scene(path)
        assert np.abs(opened.sel(band="B02").values - native("B02")).max() <= 5_000 / quantification
        assert (opened.attrs["level"], opened.attrs["processing_baseline"]) == ("L1C", "01.00")
    (safe / "S2A_OPER_MTD_SAFL1C_PDMC_20160101T000000.xml").write_text(metadata("L1C", "02.00", None, 10_000))
    for path in (folder, files):
        with pytest.raises(ValueError, match="holds metadata of 2 products"):
            open_scene(path)


def test_tags_that_gdal_keeps_beside_the_file_count(tmp_path: Path):
    path = stack(tmp_path, GEE, change=lambda dn: dn * 2)
    said, dn = "<Offset>0</Offset><Scale>5e-05</Scale><NoDataValue>{}</NoDataValue>", native("B02")
    said = "".join(f'<PAMRasterBand band="{n}">{said.format(2 * dn[0, 0])}</PAMRasterBand>' for n in range(1, 14))
    path.with_name("stack.tif.aux.xml").write_text(f"<PAMDataset>{said}</PAMDataset>")
    expected = np.where(dn == dn[0, 0], np.nan, dn)
    assert np.array_equal(open_scene(path).sel(band="B02").values, expected, equal_nan=True)


@pytest.mark.parametrize("tile", ["282D_485L_3_3", "38D_378R_2_3", "433D_629L_3_1"])
def test_real_tiles_are_told_apart_by_offset_and_order(tile: str):
    """282D and 433D carry 1000 DN, the arid 38D none, and its B10 has a mean of 59 DN."""
    folder = real_tiles()[0].parent
    path, right = folder / f"{tile}_S2L1C.tif", None if tile[:2] == "38" else -1000
    assert float(open_scene(path, order="satclip", offset=right).sel(band="B10").mean()) < 70
    wrong = -1000 if right is None else None
    with pytest.raises(ValueError, match="below no light" if wrong else "B10, which sees no ground, is at 10"):
        open_scene(path, order="satclip", offset=wrong)
    with pytest.raises(ValueError, match="pixels are in the order of 'satclip'"):
        open_scene(path, order="eurosat", offset=right)
    low = open_scene(folder / f"{tile}_S2L2A.tif", order="satclip", offset=-1000 if tile[0] == "4" else 0)
    assert (low.attrs["level"], low.attrs["hidden_bands"]) == ("L2A", ("B10",))
    if tile[0] != "4":
        with pytest.raises(ValueError, match="below no light"):
            open_scene(folder / f"{tile}_S2L2A.tif", order="satclip", offset=-1000)


# --- hidden pixels


@pytest.mark.parametrize("value", [0, 1, 65_535])
def test_no_data_and_saturated_pixels_are_hidden_before_the_offset(tmp_path: Path, value: int):
    product = safe_tree(tmp_path, "L1C", "04.00", offset=-1000)
    special = "<SPECIAL_VALUE_INDEX>{}</SPECIAL_VALUE_INDEX>"  # 1 is no data where a product says so
    text = metadata("L1C", "04.00", -1000)
    (product / "MTD_MSIL1C.xml").write_text(text.replace(special.format(0), special.format(min(value, 1))))
    for band, gsd_m in (("B02", 10), ("B05", 20)):
        dn = added(native(band))
        dn[30, 40] = value
        write_band(image(product, band), dn, gsd_m)
    opened = open_scene(product)
    assert np.argwhere(np.isnan(opened.sel(band="B02").values)).tolist() == [[30, 40]]
    hidden = np.isnan(opened.sel(band="B05").values)
    assert hidden[59:63, 79:83].all()  # its own four pixels, and those interpolated from it: none is a bright halo
    assert hidden.sum() == 16
    assert not np.isnan(opened.drop_sel(band=["B02", "B05"]).values).any()


@pytest.mark.parametrize("value", [-10_000, -9999, float(np.finfo(np.float32).min), np.nan, np.inf, 77])
def test_fills_are_hidden_with_a_tag_or_without(tmp_path: Path, value: float):
    dtype = "int16" if value in (-10_000, -9999, 77) else "float32"
    given = {"nodata": value} if value == 77 else {}
    path = stack(tmp_path, GEE, change=lambda dn: np.where(TOP, value, dn).astype(dtype), **given)
    assert lacks_its_top(path)


@pytest.mark.parametrize("where", ["inside", "beside", "alpha"])
def test_a_mask_hides(tmp_path: Path, where: str):
    valid = np.where(TOP, 0, 255).repeat(SIZE, 1).astype(np.uint8)
    path = stack(tmp_path, None if where == "alpha" else GEE, extra=(0,) * (where == "alpha"))
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=where == "inside"), rasterio.open(path, "r+") as tif:
        if where == "alpha":
            tif.write(valid.astype(np.uint16) * 257, 14)
            tif.colorinterp = [rasterio.enums.ColorInterp.gray] * 13 + [rasterio.enums.ColorInterp.alpha]
        else:
            tif.write_mask(valid)
    assert path.with_name("stack.tif.msk").exists() == (where == "beside")
    assert lacks_its_top(path, order="satclip")


def test_esas_quality_masks_hide_lost_packets(tmp_path: Path):
    product = safe_tree(tmp_path, "L1C", "04.00", offset=-1000)
    marks = np.zeros((8, SIZE, SIZE), np.uint8)
    marks[2, 8:12, 100:], marks[0, 50:] = 1, 1  # of the sensor; of ancillary data, which leaves pixels as they are
    path = image(product, "B03").parents[1] / "QI_DATA/MSK_QUALIT_B03.jp2"
    write_band(path, marks)
    opened = open_scene(product)
    assert np.array_equal(np.isnan(opened.sel(band="B03").values), marks[2] == 1)
    assert not np.isnan(opened.drop_sel(band="B03").values).any()
    shutil.copy(path, path.with_name("MSK_QUALIT_B05.jp2"))  # of another grid
    with pytest.raises(ValueError, match=r"MSK_QUALIT_B05\.jp2 is no mask of "):
        open_scene(product)


def test_a_band_that_is_not_there_is_hidden_and_said(l1c: Path, tmp_path: Path):
    opened = open_scene(stack(tmp_path / "a", [f"{n} (nm)" for n in L2A], L2A))
    assert opened.attrs["hidden_bands"] == ("B10",)
    cirrus, asked = "{} it is hidden, not zero", ": nothing says whether 1000 DN were added; 0 is taken"
    assert cirrus.format("B10 is not there:") in opened.attrs["note"]  # and who knows of which level
    assert asked in opened.attrs["note"]
    known = open_scene(stack(tmp_path / "L2A", L2A, L2A), offset=0).attrs["note"]
    assert cirrus.format("L2A has no B10:") in known
    assert asked not in known
    assert np.isnan(opened.sel(band="B10").values).all()
    zeros = stack(tmp_path / "b", GEE, change=lambda dn: dn * (np.arange(13) != 10)[:, None, None].astype(np.uint16))
    assert re.fullmatch(
        f"darkest pixels are at \\d+ DN{asked}; B10 holds no value: it is hidden", open_scene(zeros).attrs["note"]
    )  # as L2A is exported by some
    assert asked not in open_scene(l1c).attrs["note"]
    opened = open_scene(l1c, hide="nir B2")
    assert opened.attrs["hidden_bands"] == ("B02", "B08")
    assert np.isnan(opened.sel(band=["B02", "B08"]).values).all()
    some = loose(tmp_path / "c", only=[n for n in bands.NAMES if n not in ("B05", "B11")])
    assert open_scene(some, hide_missing=True).attrs["hidden_bands"] == ("B05", "B11")


def test_the_finest_file_is_taken_and_pictures_and_masks_are_none(tmp_path: Path):
    loose(tmp_path, name="T_{}_60m.jp2", only=("B05",))
    loose(tmp_path, name="T_{}_20m.jp2", only=("B05", "B11"))
    loose(tmp_path, name="T_{}_10m.jp2", only=("B02",))
    for name in ("TCI.jp2", "SCL_20m.jp2", "B03.txt", "AB01.tif", "MSK_DETFOO_B04.jp2", "._B01.tif"):
        (tmp_path / name).touch()
    opened = open_scene(tmp_path, hide_missing=True, offset=0)
    assert opened.attrs["hidden_bands"] == tuple(n for n in bands.NAMES if n not in ("B02", "B05", "B11"))
    assert opened.attrs["level"] == "L2A"


# --- what is refused, and with which words

B05 = native("B05")


def with_file(name: str, dn: np.ndarray, gsd_m: float = 20, **options: Any) -> Callable[[Path], Path]:
    """A folder of bands, one file written anew."""
    return lambda folder: write_band(loose(folder) / name, dn, gsd_m, **options).parent


def without(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / f"{name}.tif").unlink()
    return folder


def twice(folder: Path) -> Path:
    product = safe_tree(folder)
    shutil.copytree(product, folder / "b.SAFE")
    return folder


REFUSED: dict[str, tuple[Callable[[Path], Any], dict[str, Any], str]] = {
    # files
    "nothing there": (lambda t: t / "S2A.SAFE", {}, "no scene at .*S2A.SAFE; give a GeoTIFF"),
    "no band": (lambda t: t, {}, "is no scene: no .jp2 or .tif file whose name ends in a band"),
    "no zip": (lambda t: (t / "a.zip").write_text("404") and t / "a.zip", {}, "damaged or no zip"),
    "a page": (lambda t: (t / "a.tif").write_text("<html>") and t / "a.tif", {}, "can't be read as GeoTIFF"),
    "two products": (twice, {}, "holds 2 granules; open one"),
    "a band twice": (with_file("T18SVG_B02_10m.tif", native("B02"), 10), {}, r"both .*B02\S*.tif and .*B02\S*.tif"),
    "two tiles": (lambda t: loose(loose(t, only=L2A[:9], name="T32TQM_{}.tif"), only=L2A[9:], name="T33TUM_{}.tif"), {},
        "bands of 2 tiles, T32TQM, T33TUM; give those of one"),
    "two dates": (lambda t: loose(loose(t, only=L2A[:9], name="20200101_{}.tif"), only=L2A[9:], name="20180101_{}.tif"),
        {}, "bands of 2 dates, 20180101, 20200101"),
    "a band in reflectance": (
        with_file("B08.tif", native("B08").astype(np.float32) / 1e4, 10), {}, "B08 in reflectance, the others in DN"),
    "an offset in reflectance beside DN": (
        lambda t: stack(t, GEE, change=added, tags=(1, -0.1)), {}, "an offset of -0.1, reflectance, and a scale of 1"),
    "bands missing": (lambda t: without(loose(t), "B05", "B11"), {}, r"lacks B05, B11; .*hide_missing=True"),
    "all hidden": (loose, {"hide": bands.NAMES}, "every band is hidden"),
    "damaged": (lambda t: (loose(t) / "B05.tif").write_bytes(b"<html>404") and t, {}, r"B05.tif can't be read"),
    "three in a band's file": (
        lambda t: stack(loose(t), order=bands.NAMES[1:4]).rename(t / "B05.tif").parent, {}, "file of 3 bands"),
    # grids
    "no 10 m band": (lambda t: without(loose(t), "B02", "B03", "B04", "B08"), {"hide_missing": True},
                     "of B05, measure 20 m; .*add the bands of 10 m"),
    "no place": (with_file("B05.tif", B05, crs=None), {}, "B05 of .* is in no coordinate system"),
    "feet": (with_file("B05.tif", B05, crs="EPSG:2225"), {}, "expected metres"),
    "two zones": (with_file("B05.tif", B05, crs="EPSG:32617"), {}, "B05 is in EPSG:32617, B01 in EPSG:32618|B02 in"),
    "30 m": (with_file("B05.tif", native("B05", 30), 30), {}, "pixels of B05 measure 30 m"),
    "too small": (with_file("B05.tif", B05[:100]), {}, "B05 has the wrong size or place: .100, 120. pixels of 20 m"),
    "beside": (with_file("B05.tif", B05, transform=from_origin(CORNER[0] + 20, CORNER[1], 20, 20)), {}, "wrong size"),
    "rotated": (with_file("B05.tif", B05, transform=Affine(19, 5, 0, 5, -19, 0)), {}, "rotated or uneven"),
    "degrees of 100 m": (
        lambda t: stack(t, GEE, crs="EPSG:4326", transform=from_origin(0, 0, 1e-3, 1e-3)), {}, "measure 111.32 m"),
    "web Mercator at 60 degrees": (
        lambda t: stack(t, GEE, crs="EPSG:3857", transform=from_origin(0, 8_400_000, 10, 10)), {},
        "measure 5.00.* m of ground .EPSG:3857.; add the bands of 10 m, in UTM"),
    # numbers
    "8 bit": (with_file("B05.tif", (B05 / 40).astype("uint8")), {}, "B05 of .* is 8 bit, a picture"),
    "8 bit kept as 16": (lambda t: loose(t, lambda dn: dn // 256), {}, "8 bit or percent .*, a picture"),
    "reflectance with glint": (
        lambda t: stack(t, GEE, change=lambda dn: np.where(dn > 5000, 3.4, dn / 1e4).astype("float32")), {},
        "in reflectance already"),
    "percent": (lambda t: stack(t, GEE, change=lambda dn: (dn / 100).astype("float32")), {}, "8 bit or percent"),
    "a wrong scale tag": (lambda t: stack(t, GEE, tags=(0.009, 0)), {}, "check the scale in its tags"),
    "a scale of nothing": (lambda t: stack(t, GEE, tags=(-1, 0)), {}, "tags state scale -1"),
    # offsets
    "added, B10 tells": (lambda t: loose(t, added), {}, r"B10, which sees no ground, is at 10.* offset=-1000"),
    "added, no B10": (lambda t: loose(t, added, L2A), {}, "darkest pixels are at .* offset=-1000 .or 0"),
    "a new date": (lambda t: loose(t, only=L2A, name="S2A_18SVG_20230823_0_{}.tif"), {}, "20230823 stands in its"),
    "a new baseline": (
        lambda t: stack(t / "S2A_MSIL2A_20180105T155101_N0500_R011", L2A, L2A), {}, "names processing baseline 05.00"),
    "against the tags": (
        lambda t: stack(t, GEE, change=added, tags=(1e-4, -0.1)), {"offset": 0}, "state an offset of -1000 DN; leave"),
    "added once more": (loose, {"offset": 1000}, "offset=1000 is no DN to take off; give -1000"),
    "true": (loose, {"offset": True}, "offset=True is no DN"),
    "never added": (loose, {"offset": -1000}, "an offset of -1000 puts B.. at -[0-9]+ DN, below no light"),
    "against metadata": (safe_tree, {"offset": -1000}, "metadata, which state the offset; leave offset=-1000 out"),
    # metadata
    "cut short": (changed(lambda text: text[:200]), {}, "MTD_MSIL1C.xml is damaged"),
    "no offset": (changed(str, baseline="04.00"), {}, "baseline 04.00 adds an offset, but no metadata state it"),
    "no baseline": (changed(str, baseline="?"), {}, "baseline unknown may add an offset, but no metadata state it"),
    "half an offset": (
        changed(lambda text: text.replace('band_id="3"', 'band_id="x"'), "L2A", "05.09", -1000), {}, "none for B04"),
    "an offset of nan": (changed(lambda text: text.replace(">-1000<", ">NaN<", 1), "L2A", "05.09", -1000), {},
                         "the added offset is 'NaN'; expected a number"),
    "an offset of 1e999": (changed(lambda text: text.replace(">-1000<", ">1e999<", 1), "L2A", "05.09", -1000), {},
                           "the added offset is '1e999'"),
    "quantification": (changed(lambda text: text.replace(">10000<", ">1<")), {}, "quantification value is 1; expected"),
    # order
    "no names": (stack, {}, "13 bands and doesn't say which; give order: one of satclip, eurosat .pixels fit 'sat"),
    "positions in disguise": (
        lambda t: stack(t, [f"B{n}" for n in range(1, 11)], bands.NAMES[:10]), {}, "doesn't say which"),
    "no names, and no order of so many": (
        lambda t: stack(t, order=bands.NAMES[:11]), {}, "give as order all their names, such as"),
    "unknown order": (stack, {"order": "landsat"}, "unknown channel order 'landsat'; available: .*, bigearthnet, "),
    "too few names in one string": (stack, {"order": "B01 B02"}, "13 bands, the order has 2"),
    "twice": (stack, {"order": ["B02"] * 13}, "13 channels need 13 different names; got 13: B02 B02"),
    "a typo in the order": (
        lambda t: stack(t, order=bands.NAMES[1:4]), {"order": ["B02", "B03", "BO4"], "hide_missing": True},
        "unknown band 'BO4'; available"),
    "an order that counts": (
        lambda t: stack(t, order=bands.NAMES[1:11]), {"order": [f"B{n}" for n in range(1, 11)]}, "count channels"),
    "against its names": (lambda t: stack(t, GEE), {"order": "eurosat"}, "leave it out"),
    "EuroSAT's order": (
        lambda t: stack(t, order=bands.ORDERS["eurosat"]), {"order": "satclip"}, "are in the order of 'eurosat'"),
    "SatCLIP's order": (stack, {"order": "eurosat"}, "pixels are in the order of 'satclip'"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_no_scene_or_lies_is_refused_with_what_to_do(tmp_path: Path, what: str):
    make, given, message = REFUSED[what]
    path = make(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        open_scene(path, **given)


# --- no file makes the program read elsewhere, call out, or ask for memory it can't have


@pytest.fixture
def calls() -> Any:
    """Who calls a server on this machine, and its address."""
    asked: list[Any] = []
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), lambda *call: asked.append(call)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield asked, f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def wms(address: str) -> str:
    return (
        f'<GDAL_WMS><Service name="TMS"><ServerUrl>{address}/${{z}}/${{x}}/${{y}}</ServerUrl></Service><DataWindow>'
        "<UpperLeftX>0</UpperLeftX><UpperLeftY>0</UpperLeftY><LowerRightX>256</LowerRightX><LowerRightY>-256"
        "</LowerRightY><SizeX>240</SizeX><SizeY>240</SizeY><TileCountX>1</TileCountX><TileCountY>1</TileCountY>"
        "</DataWindow><Projection>EPSG:32618</Projection><BandsCount>1</BandsCount><DataType>UInt16</DataType></GDAL_WMS>"
    )


@pytest.mark.parametrize("where", ["B02.tif", "B02.tif.msk", "B02.tif.ovr", "tag", "vrt", "stack"])
def test_no_file_reads_another_or_calls_out(tmp_path: Path, calls: Any, where: str):
    asked, address = calls
    folder = loose(tmp_path / "in")
    secret = write_band(tmp_path / "secret.tif", native("B02") + 1, 10)
    path: Path = folder
    if where == "tag":
        with rasterio.open(folder / "B02.tif", "r+") as tif:
            tif.update_tags(ns="OVERVIEWS", OVERVIEW_FILE=f"/vsicurl/{address}/x.tif")
    elif where in ("vrt", "stack"):
        path = folder / "B02.tif" if where == "vrt" else tmp_path / "stack.tif"
        copy_raster(secret, path, driver="VRT")
        path = folder if where == "vrt" else path
    else:
        (folder / where).write_text(wms(address))
    if where == "B02.tif.ovr":  # what is beside is not looked at
        assert np.array_equal(open_scene(path).sel(band="B02").values, native("B02"))
    else:
        with pytest.raises(ValueError, match=r"can't be read as GeoTIFF|overviews in another file or place"):
            open_scene(path, hide_missing=True)
    assert asked == []


@pytest.mark.parametrize("kind", ["large", "entities"])
def test_metadata_are_bounded_before_they_are_read(tmp_path: Path, kind: str):
    """3 MB of a zip that are gigabytes of XML, and an entity that stands for others, stand for others."""
    names = "".join(f'<!ENTITY e{n} "{f"&e{n - 1};" * 10}">' for n in range(1, 9))
    bomb = f'<!DOCTYPE a [<!ENTITY e0 "{"x" * 100}">{names}]><a><QUANTIFICATION_VALUE>&e8;</QUANTIFICATION_VALUE></a>'
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.SAFE/MTD_MSIL1C.xml", bomb if kind == "entities" else "<a>" + " " * 2**26)
    with pytest.raises(ValueError, match="too large, or with entities") as raised:
        open_scene(tmp_path / "bomb.zip")
    assert len(str(raised.value)) < 1000


def test_a_small_file_that_declares_a_large_one_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    whole = {"driver": "GTiff", "count": 13, "height": 40_000, "width": 40_000, "dtype": "uint16", "crs": "EPSG:32618"}
    whole |= {"transform": from_origin(*CORNER, 10, 10), "SPARSE_OK": "TRUE", "INTERLEAVE": "BAND"}
    with rasterio.open(tmp_path / "a.tif", "w", BIGTIFF="YES", **whole, blockysize=40_000):
        pass
    assert (tmp_path / "a.tif").stat().st_size < 5000
    with pytest.raises(ValueError, match="kept in blocks of 40000 × 40000 pixels; write it tiled"):
        open_scene(tmp_path / "a.tif", order="satclip")
    opened = open_scene(stack(tmp_path, GEE))
    monkeypatch.setattr(scene.psutil, "virtual_memory", lambda: type("Memory", (), {"available": 10**6}))
    with pytest.raises(ValueError, match=r"13 × 240 × 240 pixels take .* cut the scene first"):
        np.asarray(opened)
    assert opened[:, :10].values.shape == (13, 10, SIZE)
