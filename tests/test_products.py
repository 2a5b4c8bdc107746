"""What lies on disk is taken for what it is, or refused; nothing is guessed that metadata could tell.

Products are generated in ESA's layout, see `safe`.
"""

from __future__ import annotations

import shutil
import zipfile
from pathlib import Path

import pytest
from safe import START, TILE, loose_folder, metadata, safe_tree, write_stack

from bandmask import bands
from bandmask.readers.products import Product, find_product


@pytest.fixture(scope="module")
def l1c(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return safe_tree(tmp_path_factory.mktemp("l1c"))


@pytest.fixture(scope="module")
def l2a(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return safe_tree(tmp_path_factory.mktemp("l2a"), "L2A", "05.09", offset=-1000)


@pytest.fixture(scope="module")
def loose(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return loose_folder(tmp_path_factory.mktemp("loose"))


def files_of(product: Product) -> dict[str, str]:
    return {layer.band: Path(layer.address).name for layer in product.layers}


def empty_files(folder: Path, *names: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).touch()
    return folder


# --- SAFE


def test_l1c_has_thirteen_bands_and_no_quality_mask_or_picture_among_them(l1c: Path):
    product = find_product(l1c)
    assert files_of(product) == {band: f"{TILE}_{START}_{band}.jp2" for band in bands.NAMES}
    assert (product.level, product.baseline, product.documented) == ("L1C", "02.04", True)
    assert {layer.offset for layer in product.layers} == {0.0}


def test_l2a_takes_each_band_from_its_finest_folder_and_has_no_b10(l2a: Path):
    product = find_product(l2a)
    found = files_of(product)
    assert "B10" not in found
    assert len(found) == 12
    for band, gsd_m in {"B02": 10, "B08": 10, "B05": 20, "B8A": 20, "B12": 20, "B01": 60, "B09": 60}.items():
        assert found[band] == f"{TILE}_{START}_{band}_{gsd_m}m.jp2"
    assert product.level == "L2A"
    assert {layer.offset for layer in product.layers} == {-1000.0}


def test_folder_zip_parent_and_metadata_file_are_the_same_product(l1c: Path, tmp_path: Path):
    archive = Path(shutil.make_archive(str(tmp_path / "product"), "zip", l1c.parent))
    found = [find_product(path) for path in (l1c, l1c.parent, l1c / "MTD_MSIL1C.xml", archive)]
    assert len({tuple(files_of(product).items()) for product in found}) == 1
    assert {(product.level, product.baseline) for product in found} == {("L1C", "02.04")}
    assert found[3].layers[0].address.startswith("/vsizip/{")


def test_offsets_belong_to_the_bands_that_the_metadata_name(l2a: Path, tmp_path: Path):
    """A file that numbers its bands otherwise: its own list says which is which."""
    other = shutil.copytree(l2a, tmp_path / l2a.name)
    text = metadata("L2A", "05.09", -1000)
    text = text.replace('band_id="7">-1000', 'band_id="7">-777').replace('bandId="7"', 'bandId="x"')
    text = text.replace('bandId="8"', 'bandId="7"').replace('bandId="x"', 'bandId="8"')
    (other / "MTD_MSIL2A.xml").write_text(text)
    offsets = {layer.band: layer.offset for layer in find_product(other).layers}
    assert (offsets["B8A"], offsets["B08"]) == (-777.0, -1000.0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<n1:Level-1C_User", "MTD_MSIL1C.xml is damaged"),
        (metadata("L1C", "04.00", None), "baseline 04.00 adds an offset, but its metadata state none"),
        (metadata("L1C", "02.04", None, quantification=1000), "quantification value is 1000; expected 10000"),
    ],
)
def test_metadata_that_can_not_be_trusted_are_refused(l1c: Path, tmp_path: Path, text: str, message: str):
    other = shutil.copytree(l1c, tmp_path / l1c.name)
    (other / "MTD_MSIL1C.xml").write_text(text)
    with pytest.raises(ValueError, match=message):
        find_product(other)


def test_a_product_without_images_or_with_two_granules_is_refused(l1c: Path, tmp_path: Path):
    other = shutil.copytree(l1c, tmp_path / l1c.name)
    granule = next((other / "GRANULE").iterdir())
    shutil.copytree(granule, granule.with_name("L1C_T18SVH_A002818_20160105T155101"))
    with pytest.raises(ValueError, match="holds 2 granules"):
        find_product(other)
    shutil.rmtree(other / "GRANULE")
    with pytest.raises(ValueError, match="no image below GRANULE"):
        find_product(other)


def test_two_products_in_one_folder_are_not_chosen_from(l1c: Path, tmp_path: Path):
    for name in ("a.SAFE", "b.SAFE"):
        (tmp_path / name).mkdir()
    with pytest.raises(ValueError, match=r"holds 2 products; open one: a.SAFE, b.SAFE"):
        find_product(tmp_path)


def test_an_offset_by_hand_does_not_overrule_metadata(l1c: Path):
    with pytest.raises(ValueError, match="leave offset=-1000 out"):
        find_product(l1c, offset=-1000)


# --- loose files


def test_a_folder_and_a_list_of_files_are_the_same(loose: Path):
    listed = find_product([loose / f"{band}.tif" for band in reversed(bands.NAMES)])
    assert files_of(listed) == files_of(find_product(loose)) == {band: f"{band}.tif" for band in bands.NAMES}
    assert [layer.band for layer in listed.layers] == list(bands.NAMES)


@pytest.mark.parametrize("name", ["T31UFU_20200101T105441_{}.jp2", "{}.tif", "cut-{}.TIF", "x_{}_20m.jp2"])
def test_names_that_end_in_a_band_are_read(tmp_path: Path, name: str):
    empty_files(tmp_path, *(name.format(band) for band in bands.NAMES), "TCI.jp2", "SCL_20m.jp2", "B02.txt", "AB01.tif")
    assert files_of(find_product(tmp_path)) == {band: name.format(band) for band in bands.NAMES}


def test_of_two_resolutions_the_finer_is_taken_and_tells_the_level(tmp_path: Path):
    empty_files(tmp_path, "T_B02_60m.jp2", "T_B02_10m.jp2", "T_B02_20m.jp2", "T_B05_20m.jp2")
    product = find_product(tmp_path)
    assert files_of(product) == {"B02": "T_B02_10m.jp2", "B05": "T_B05_20m.jp2"}
    assert product.level == "L2A"


def test_a_band_that_is_there_twice_is_not_chosen_from(tmp_path: Path):
    with pytest.raises(ValueError, match=r"both B02.jp2 and B02.tif would be B02"):
        find_product(empty_files(tmp_path, "B02.tif", "B02.jp2"))


def test_a_file_that_does_not_tell_its_resolution_is_not_taken_for_the_finest(tmp_path: Path):
    with pytest.raises(ValueError, match=r"both B02.tif and T_B02_10m.tif would be B02"):
        find_product(empty_files(tmp_path, "B02.tif", "T_B02_10m.tif"))


def test_a_recent_scene_without_metadata_needs_an_offset(tmp_path: Path):
    empty_files(tmp_path, *(f"T31UFU_20220601T105441_{band}.jp2" for band in bands.NAMES))
    with pytest.raises(ValueError, match=r"acquired on 20220601.* give offset=-1000 \(or 0"):
        find_product(tmp_path)
    assert {layer.offset for layer in find_product(tmp_path, offset=-1000).layers} == {-1000.0}
    assert {layer.offset for layer in find_product(tmp_path, offset=0).layers} == {0.0}


# --- stacks


def test_a_stack_that_names_its_bands_needs_no_order(tmp_path: Path):
    product = find_product(write_stack(tmp_path / "named.tif", bands.ORDERS["eurosat"], described=True))
    assert [(layer.band, layer.channel) for layer in product.layers][8:] == [
        ("B8A", 13),
        ("B09", 9),
        ("B10", 10),
        ("B11", 11),
        ("B12", 12),
    ]


def test_a_stack_is_read_in_the_order_given(tmp_path: Path):
    plain = write_stack(tmp_path / "plain.tif", bands.ORDERS["eurosat"])
    assert next(x.channel for x in find_product(plain, order="eurosat").layers if x.band == "B8A") == 13
    assert next(x.channel for x in find_product(plain, order="satclip").layers if x.band == "B8A") == 9
    three = write_stack(tmp_path / "three.tif", ("B04", "B03", "B02"))
    found = {layer.band: layer.channel for layer in find_product(three, order=["red", "B3", "B02"]).layers}
    assert found == {"B04": 1, "B03": 2, "B02": 3}


def test_twelve_channels_in_a_named_order_lack_b10(tmp_path: Path):
    twelve = write_stack(tmp_path / "twelve.tif", tuple(band for band in bands.NAMES if band != "B10"))
    found = {layer.band: layer.channel for layer in find_product(twelve, order="satclip").layers}
    assert "B10" not in found
    assert (found["B09"], found["B11"], found["B12"]) == (10, 11, 12)


@pytest.mark.parametrize(
    ("order", "message"),
    [
        (None, "has 13 bands and doesn't say which; give order: satclip, sen12ms, eurosat"),
        ("landsat", "unknown channel order 'landsat'"),
        (["B02", "B03"], "has 13 bands, the order has 2"),
        (["B02"] * 13, "has B02 twice"),
        ([*bands.NAMES[:12], "B99"], "unknown band 'B99'"),
    ],
)
def test_an_order_that_is_unknown_or_does_not_fit_is_refused(tmp_path: Path, order, message: str):
    with pytest.raises(ValueError, match=message):
        find_product(write_stack(tmp_path / "plain.tif", bands.NAMES), order=order)


def test_an_order_against_the_files_own_names_is_refused(tmp_path: Path):
    named = write_stack(tmp_path / "named.tif", bands.NAMES, described=True)
    with pytest.raises(ValueError, match="leave order out"):
        find_product(named, order="eurosat")


def test_descriptions_that_are_numbers_name_no_band(tmp_path: Path):
    """Channel 9 is B8A in one order and B09 in another."""
    import rasterio

    numbered = write_stack(tmp_path / "numbered.tif", bands.NAMES)
    with rasterio.open(numbered, "r+") as tif:
        tif.descriptions = tuple(map(str, range(1, 14)))
    with pytest.raises(ValueError, match="doesn't say which"):
        find_product(numbered)


# --- no scene


def test_nothing_there(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"no scene at .*nowhere; give a GeoTIFF of all bands"):
        find_product(tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["page.tif", "page.zip", "folder"])
def test_what_is_no_scene_is_told_what_would_be_one(tmp_path: Path, name: str):
    path = tmp_path / name
    if path.suffix:
        path.write_text("<html>404</html>")
    else:
        empty_files(path, "TCI.jp2", "notes.txt")
    with pytest.raises(ValueError, match=r"can't be read|no zip|is no scene: no .jp2"):
        find_product(path)


def test_a_zip_of_single_band_files_is_a_scene_too(loose: Path, tmp_path: Path):
    with zipfile.ZipFile(tmp_path / "bands.zip", "w") as archive:
        for band in bands.NAMES:
            archive.write(loose / f"{band}.tif", f"cut/{band}.tif")
    assert files_of(find_product(tmp_path / "bands.zip")) == {band: f"{band}.tif" for band in bands.NAMES}
