"""Class maps lie where their image lies, in their colours, with their names; nothing half-written stays."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import rasterio
import rasterio.shutil
from rasterio.crs import CRS
from rasterio.transform import from_origin

from bandmask import datasets, rasters
from bandmask.packs import Pack
from bandmask.readers import sen12ms
from bandmask.visualizer import viewer

HERE = {"crs": CRS.from_epsg(32618), "transform": from_origin(399960, 4100040, 10, 10)}
NAMES, COLOURS = ("water", "forest"), ("#0000ff", "#00ff00")


def a_map() -> np.ndarray:
    classes = np.zeros((5, 7), np.uint8)
    classes[1:3] = 1
    classes[4, 6] = 255
    return classes


def test_another_program_reads_it_back(tmp_path: Path):
    path = rasters.write_class_map(tmp_path / "new" / "map.tif", a_map(), NAMES, COLOURS, **HERE)
    with rasterio.open(path) as tif:
        assert np.array_equal(tif.read(1), a_map())
        assert tif.crs == HERE["crs"]
        assert tif.transform == HERE["transform"]
        assert tif.nodata == 255
        table = tif.colormap(1)
        assert table[0] == (0, 0, 255, 255)
        assert table[1] == (0, 255, 0, 255)
        assert table[255][3] in (0, 255)  # GeoTIFF's own table knows no transparency; nodata says it
        assert tif.tags(1)["class_1"] == "forest"
    assert [p.name for p in path.parent.iterdir()] == ["map.tif"]


def test_the_sample_lies_where_its_scene_lies(sample_pack: Pack):
    """A patch's own pixels are found in the scene's file at the place its transform says."""
    row = 123
    crs, transform = rasters.georeference(sample_pack, row)
    with rasterio.open(datasets.SAMPLE_FOLDER / "B02.tif") as scene:
        assert crs == scene.crs
        y, x = scene.index(*(transform * (0.5, 0.5)))
        assert np.array_equal(scene.read(1)[y : y + 64, x : x + 64], sample_pack.images[row, 1])


@pytest.mark.parametrize(
    ("classes", "names", "colours", "message"),
    [
        (np.full((2, 2), 7, np.uint8), NAMES, COLOURS, r"classes \[7\] have no name"),
        (np.zeros((2, 2), np.uint8), NAMES, ["#000000"], "2 class names and 1 colours"),
        (np.zeros((1, 2, 2), np.uint8), NAMES, COLOURS, r"is \(H, W\) uint8"),
        (np.zeros((2, 2), np.int64), NAMES, COLOURS, "got .* int64"),
    ],
)
def test_what_makes_no_map_is_refused(tmp_path: Path, classes, names, colours, message):
    with pytest.raises(ValueError, match=message):
        rasters.write_class_map(tmp_path / "map.tif", classes, names, colours, **HERE)
    assert list(tmp_path.iterdir()) == []


def test_a_patch_of_sen12ms_lies_where_its_file_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The tree is generated, in the official layout; every patch has a corner of its own."""
    from trees import generated_codes, generated_image, lc_file, s2_file, write_tif

    for scene in range(1, 8):
        corner = (500_000.0 + 1280 * scene, 4_000_000.0)
        write_tif(s2_file(tmp_path / "sen12ms", scene, 1), generated_image(16, scene), corner=corner)
        write_tif(lc_file(tmp_path / "sen12ms", scene, 1), generated_codes(16, scene), corner=corner)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sen12ms, "SHAPE", (13, 16, 16))
        pack = sen12ms.pack_sen12ms(tmp_path / "sen12ms", tmp_path / "pack", progress=False)
    monkeypatch.setenv("BANDMASK_DATA", str(tmp_path))
    for row in (0, 1):
        crs, transform = rasters.georeference(pack, row)
        with rasterio.open(tmp_path / "sen12ms" / pack.index["file"][row]) as tif:
            assert (crs, transform) == (tif.crs, tif.transform)
    (tmp_path / "sen12ms" / pack.index["file"][0]).unlink()
    with pytest.raises(FileNotFoundError, match=r"is not there yet. Make it first: put the data set back"):
        rasters.georeference(pack, 0)


def test_images_of_no_known_place_are_refused(make_pack, tmp_path: Path):
    with pytest.raises(ValueError, match=r"'generated' lie is not known; available: sample, sen12ms, dfc2020"):
        rasters.georeference(make_pack(tmp_path), 3)


def test_every_land_cover_class_has_a_colour_of_its_own():
    for names in (datasets.SAMPLE_CLASSES, tuple(viewer.CLASS_COLOURS)[:10], [f"class {n}" for n in range(17)]):
        assert len(set(viewer.class_colours(names))) == len(names)


def test_names_of_classes_are_where_gdal_looks_for_them(tmp_path: Path):
    """GDAL itself reads them back, into a VRT."""
    names = ("water & ice", "forest <dense>")
    path = rasters.write_class_map(tmp_path / "map.tif", a_map(), names, COLOURS, **HERE)
    rasters.write_class_names(path, names)
    rasterio.shutil.copy(path, tmp_path / "seen.vrt", driver="VRT")
    band = ElementTree.parse(tmp_path / "seen.vrt").getroot().find("VRTRasterBand")
    assert band is not None
    assert [category.text for category in band.iter("Category")] == list(names)


def test_a_cloud_optimized_copy_is_the_same_map(tmp_path: Path):
    classes = np.random.default_rng(0).integers(0, 2, (700, 900)).astype(np.uint8)
    plain = rasters.write_class_map(tmp_path / "map.tif", classes, NAMES, COLOURS, **HERE)
    path = tmp_path / "new" / "cog.tif"
    path.parent.mkdir()
    rasters.copy_as_cog(plain, path, resampling="mode", tags={"hidden_bands": "B08"})
    with rasterio.open(path) as tif:
        assert np.array_equal(tif.read(1), classes)
        assert (tif.crs, tif.transform, tif.nodata) == (HERE["crs"], HERE["transform"], 255)
        assert tif.colormap(1)[1] == (0, 255, 0, 255)
        assert tif.tags()["hidden_bands"] == "B08"
        assert tif.tags(1)["class_1"] == "forest"
        assert tif.tags(ns="IMAGE_STRUCTURE")["LAYOUT"] == "COG"
        assert tif.overviews(1) == [2]
    assert [p.name for p in path.parent.iterdir()] == ["cog.tif"]
