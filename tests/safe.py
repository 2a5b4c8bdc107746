"""Generated Sentinel-2 products in ESA's layout: names, folders and metadata are made up, pixels are the sample's.

ESA's own products can't be shipped with the tests. These follow the Products Specification Document (issue 14.9): one
JPEG 2000 a band, grids of 10, 20 and 60 m with one corner, quality masks and pictures beside that are no bands.
"""

import functools
import shutil
from pathlib import Path

import numpy as np
import rasterio
from rasterio.transform import from_origin

from bandmask import bands, datasets

SIZE = 240  # pixels of 10 m: whole pixels of 20 and 60 m
CORNER = (436_740.0, 4_176_420.0)  # of the sample, in EPSG:32618
TILE, START = "T18SVG", "20160105T155101"
L2A_BANDS = {10: ("B02", "B03", "B04", "B08"), 20: ("B05", "B06", "B07", "B8A", "B11", "B12"), 60: ("B01", "B09")}


@functools.cache
def sample_dn() -> np.ndarray:
    """(13, 240, 240) uint16 of the embedded scene; B10's zeros are 1 here, as products hold no zero but no data."""
    scene = datasets.sample_scene().isel(y=slice(0, SIZE), x=slice(0, SIZE)).values
    return scene.round().clip(1, 60_000).astype(np.uint16)


def native(band: str, gsd_m: int | None = None) -> np.ndarray:
    """A band on its own grid: means of blocks."""
    step = (gsd_m or bands.BY_NAME[band].gsd_m) // 10
    dn = sample_dn()[bands.NAMES.index(band)]
    return dn.reshape(SIZE // step, step, SIZE // step, step).mean((1, 3)).round().astype(np.uint16)


def write_band(path: Path, dn: np.ndarray, gsd_m: float = 10, *, crs: str | None = "EPSG:32618", **profile) -> Path:
    """(H, W) or (C, H, W) as a GeoTIFF, or without loss as JPEG 2000, by the file's name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    driver = {"driver": "GTiff"}
    if path.suffix == ".jp2":
        driver = {"driver": "JP2OpenJPEG", "quality": 100, "reversible": "yes", "blockxsize": 64, "blockysize": 64}
    layers, transform = dn.reshape(-1, *dn.shape[-2:]), from_origin(*CORNER, gsd_m, gsd_m)
    shape = dict(zip(("count", "height", "width"), layers.shape, strict=True), dtype=dn.dtype)
    with rasterio.open(path, "w", **driver, **shape, crs=crs, **{"transform": transform, **profile}) as file:
        file.write(layers)
    return path


def safe_tree(root: Path, level: str = "L1C", baseline: str = "02.04", *, offset: int | None = None) -> Path:
    """A SAFE folder below `root`; DN are those of `native` minus `offset`, so that applying it gives them back."""
    name = f"S2A_MSI{level}_{START}_N{baseline.replace('.', '')}_R011_{TILE}_20160105T155500.SAFE"
    granule = root / name / "GRANULE" / f"{level}_{TILE}_A002818_{START}"
    written = {f"{TILE}_{START}_{band.name}.jp2": (band.name, band.gsd_m) for band in bands.BANDS if level == "L1C"}
    for gsd_m, names in L2A_BANDS.items() if level == "L2A" else ():
        finer = [band for gsd, some in L2A_BANDS.items() if gsd < gsd_m for band in some if band != "B08"]
        for band in (*names, *finer):  # ESA repeats finer bands in the coarser folders
            written[f"R{gsd_m}m/{TILE}_{START}_{band}_{gsd_m}m.jp2"] = (band, gsd_m)
    for file, (band, gsd_m) in written.items():
        write_band(granule / "IMG_DATA" / file, native(band, gsd_m) - np.uint16((offset or 0) % 65536), gsd_m)
    image = granule / "IMG_DATA" / next(iter(written))
    picture = image.with_name(f"{TILE}_{START}_TCI{'_10m' if level == 'L2A' else ''}.jp2")
    shutil.copy(image, picture)
    (granule / "QI_DATA").mkdir()
    shutil.copy(image, granule / "QI_DATA" / "MSK_DETFOO_B02.jp2")
    (granule / "MTD_TL.xml").write_text("<Tile/>")
    (root / name / f"MTD_MSI{level}.xml").write_text(metadata(level, baseline, offset))
    return root / name


def metadata(level: str, baseline: str, offset: int | None, quantification: int = 10_000) -> str:
    """The parts of `MTD_MSIL1C.xml` or `MTD_MSIL2A.xml` that say what DN mean."""
    values = f'<QUANTIFICATION_VALUE unit="none">{quantification}</QUANTIFICATION_VALUE>'
    outer, inner = "Radiometric_Offset_List", "RADIO_ADD_OFFSET"
    if level == "L2A":
        aot = '<AOT_QUANTIFICATION_VALUE unit="none">1000.0</AOT_QUANTIFICATION_VALUE>'
        values = f"<QUANTIFICATION_VALUES_LIST>{values.replace('QUANT', 'BOA_QUANT')}{aot}</QUANTIFICATION_VALUES_LIST>"
        outer, inner = ("BOA_ADD_OFFSET_VALUES_LIST", "BOA_ADD_OFFSET")
    stated = "".join(f'<{inner} band_id="{number}">{offset}</{inner}>' for number in range(13))
    spectral = "".join(
        f'<Spectral_Information bandId="{number}" physicalBand="{band.name.replace("B0", "B")}"/>'
        for number, band in enumerate(bands.BANDS)
    )
    product = f"Level-{level[1:]}_User_Product"
    return f"""<?xml version="1.0" encoding="UTF-8"?>
<n1:{product} xmlns:n1="https://psd-14.sentinel2.eo.esa.int/PSD/User_Product_Level-{level[1:]}.xsd">
  <n1:General_Info>
    <Product_Info><PROCESSING_BASELINE>{baseline}</PROCESSING_BASELINE></Product_Info>
    <Product_Image_Characteristics>
      <Special_Values><SPECIAL_VALUE_TEXT>NODATA</SPECIAL_VALUE_TEXT><SPECIAL_VALUE_INDEX>0</SPECIAL_VALUE_INDEX></Special_Values>
      {values}
      {"" if offset is None else f"<{outer}>{stated}</{outer}>"}
      <Spectral_Information_List>{spectral}</Spectral_Information_List>
    </Product_Image_Characteristics>
  </n1:General_Info>
</n1:{product}>
"""
