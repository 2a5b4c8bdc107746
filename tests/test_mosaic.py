"""A map of a scene says what the network says of each window, lies where the scene lies, and is whole or not there.

Weights are random: what the classes mean doesn't matter here. The scene is the embedded one, or generated around it.
"""

import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import rasterio
import rasterio.shutil
import torch
import xarray as xr
from hypothesis import given
from hypothesis import strategies as st
from models import TINY, tiny_encoder
from torch import Tensor, nn

import bandmask as bm
from bandmask import datasets, fills, masks, mosaic
from bandmask.batches import Batch
from bandmask.encoders import Card, embed
from bandmask.evaluation import View, decoder_taps, segment
from bandmask.heads import SegmentationDecoders, create_decoder
from bandmask.mosaic import SceneMaps, predict_scene, predict_tiles, probabilities, spans
from bandmask.scene import open_scene
from bandmask.train import Compute

CPU = Compute.of("cpu")
TILE, OVERLAP = 64, 16
NAMES, COLOURS = ("a", "b & c", "d"), ("#ff0000", "#00ff00", "#0000ff")
CARD = Card("tiny", TINY, 16, TILE)
FILL = torch.linspace(0.05, 0.3, 13)


@pytest.fixture(scope="module")
def scene() -> xr.DataArray:
    """A cut of the embedded scene, B08 lost: 150 × 130 pixels."""
    whole = open_scene(datasets.SAMPLE_FOLDER, hide="B08")
    return whole.isel(y=slice(400, 550), x=slice(500, 630))


@pytest.fixture(scope="module")
def encoder() -> nn.Module:
    return tiny_encoder()


@pytest.fixture(scope="module")
def decoders(encoder: nn.Module, scene: xr.DataArray) -> SegmentationDecoders:
    """Two seeds, the mean of each class's logits taken off its bias, so that every class occurs."""
    images = torch.from_numpy(scene.fillna(1000).values[:, :TILE, :TILE])[None] / 10_000
    with torch.no_grad():
        low, high = embed(encoder, images, decoder_taps(encoder))[1].values()
        sizes = high.shape[1], low.shape[1]
        made = SegmentationDecoders([create_decoder(*sizes, 3, width=8, seed=seed) for seed in (0, 1)], (0, 1)).eval()
        for decoder in made.decoders:
            last = decoder.decoder.last_conv[8]
            last.weight *= 20
            last.bias -= decoder(low, high, (TILE, TILE)).mean((0, 2, 3))
    return made


@pytest.fixture
def predict(encoder: nn.Module, decoders: SegmentationDecoders, tmp_path: Path) -> Callable[..., SceneMaps]:
    def run(scene: xr.DataArray, head: nn.Module = decoders, model: nn.Module = encoder, **changes: Any) -> SceneMaps:
        options: dict[str, Any] = {"card": CARD, "classes": NAMES, "colours": COLOURS, "fill": FILL, "overlap": OVERLAP}
        options |= {"compute": CPU, "batch_size": 4} | changes
        return predict_scene(scene, model, head, options.pop("folder", tmp_path / "maps"), **options)

    return run


def batch_of(images: Tensor, side: int = TILE) -> Batch:
    """As one gets them of a pack, to be segmented at a size."""
    nothing = torch.zeros(len(images), dtype=torch.long)
    return Batch(images, nothing, nothing, torch.zeros(len(images), side, side, dtype=torch.long))


def read(path: Path) -> np.ndarray:
    with rasterio.open(path) as tif:
        return tif.read(1)


# --- what the map says


def test_decoders_may_be_a_list_and_the_fill_what_numpy_gives(scene, decoders, predict, tmp_path):
    small = scene[:, :TILE, :TILE]
    maps = predict(small, list(decoders.decoders), folder=tmp_path / "own", fill=FILL.double().numpy())
    assert all(np.array_equal(read(own), read(one)) for own, one in zip(maps, predict(small), strict=True))


@pytest.mark.parametrize(("tile", "overlap"), [(TILE, OVERLAP), (32, 8)])
def test_each_pixel_is_what_predicting_its_window_alone_says(scene, encoder, decoders, predict, tile, overlap):
    """By the function that notebooks predict single images with, which knows nothing of tiles.

    Those of another size are resized as training images are: EuroSAT's 64 px for SatCLIP to 256, here 32 to 64.
    """
    one, cut = SegmentationDecoders([decoders.decoders[0]], (0,)), scene[:, : 2 * tile + 22, : 2 * tile + 2]
    classes = read(predict(cut, one, tile=tile, overlap=overlap).classes)
    view, dn = View(encoder, masks.MaskSpec(), FILL, TILE), torch.from_numpy(cut.values)
    whole = torch.where(dn.isnan(), FILL[:, None, None], dn / 10_000)[None]
    assert len(np.unique(classes)) > 1
    for row in spans(cut.sizes["y"], tile, overlap):
        for column in spans(cut.sizes["x"], tile, overlap):
            image = whole[..., row.start : row.start + tile, column.start : column.start + tile]
            shown = nn.functional.interpolate(image, (TILE, TILE), mode="bilinear")
            alone = segment(view, one, batch_of(shown, tile), compute=CPU)[0, 0].numpy()
            own = classes[row.low : row.high, column.low : column.high]
            ours = alone[row.skip :, column.skip :][: own.shape[0], : own.shape[1]]
            assert (own == ours).mean() > 0.999  # sums in batches of another size round otherwise


def test_confidence_is_the_mean_probability_of_the_class_over_seeds(scene, encoder, decoders, predict):
    tile = scene.isel(y=slice(0, TILE), x=slice(0, TILE))
    found = predict(tile)
    images = torch.from_numpy(tile.values)[None] / 10_000
    images = torch.where(images.isnan(), FILL[:, None, None], images)
    separate = [probabilities(encoder, one, images, TILE, CPU) for one in decoders.decoders]
    chance, best = torch.stack(separate).mean(0)[0].max(0)
    assert (read(found.classes) == best.numpy()).mean() > 0.999
    assert np.abs(read(found.confidence) - 100 * chance.numpy()).max() <= 0.51
    assert chance.min() >= 1 / 3


def test_what_a_hidden_band_held_reaches_no_map(scene, predict, tmp_path):
    """Lost as a whole when opened, or pixel by pixel in memory: only where values are missing counts."""
    complete = open_scene(datasets.SAMPLE_FOLDER).isel(y=slice(400, 550), x=slice(500, 630)).load()
    erased = complete.where(complete.band != "B08")
    first, second, third = (
        read(predict(array, folder=tmp_path / str(number)).classes)
        for number, array in enumerate((scene, erased, complete))
    )
    assert np.array_equal(first, second)
    assert not np.array_equal(first, third)


def test_what_the_scene_says_of_its_numbers_counts_and_its_values_say_what_is_hidden(scene, encoder, predict, tmp_path):
    """1,000 DN a reflectance; a scene that was mended or hidden since it was opened; another level."""
    mended = bm.fill(scene.load())
    tenth = (mended / 10).assign_attrs(mended.attrs, dn_per_reflectance=1000)
    hidden = bm.hide(mended, "B11").assign_attrs(level="L2A")
    assert (mended.attrs["hidden_bands"], hidden.attrs["hidden_bands"]) == ((), ("B11",))
    first, second = (predict(array, folder=tmp_path / name) for name, array in (("a", mended), ("b", tenth)))
    loaded = predict(mended, model=bm.api.Encoder(encoder, CARD), folder=tmp_path / "d")  # as bm.load_encoder gives it
    assert np.array_equal(read(first.classes), read(loaded.classes))
    assert (read(first.classes) == read(second.classes)).mean() > 0.999
    learnt = dataclasses.replace(CARD, mask={"bands": ["B08"]}, data={"level": "L1C"})
    with pytest.warns(UserWarning, match="learnt to miss B08; this scene lacks B11 too"), \
         pytest.warns(UserWarning, match="the scene is L2A, tiny learnt of L1C"):  # fmt: skip
        third = predict(hidden.assign_attrs(hidden_bands=("B08",)), card=learnt, folder=tmp_path / "c")
    for found, said in ((first, "none"), (third, "B11")):
        with rasterio.open(found.classes) as tif:
            assert tif.tags()["hidden_bands"] == said


# --- the files


def test_a_map_lies_where_its_pixels_lie_whatever_became_of_the_transform(scene):
    """`coarsen`, steps and cuts leave the transform that was written; rows turned over have none."""
    for cut in (
        scene[:, 32:, 8:],
        scene[:, ::2, ::2],
        scene.coarsen(y=2, x=2, boundary="trim").mean(),
        scene.interp(y=scene.y[:75] - 3, x=scene.x[:75] + 4),
    ):
        step = abs(float(cut.y[1] - cut.y[0]))
        corner = float(cut.x[0]) - step / 2, float(cut.y[0]) + step / 2
        assert mosaic.transform_of(cut)[:6] == pytest.approx((step, 0, corner[0], 0, -step, corner[1]))


def test_maps_lie_where_the_scene_lies_and_carry_names_colours_and_what_was_hidden(scene, predict, tmp_path):
    found = predict(scene)
    with rasterio.open(found.classes) as tif:
        colours = [(255, 0, 0, 255), (0, 255, 0, 255), (0, 0, 255, 255)]
        assert [tif.colormap(1)[number] for number in range(3)] == colours
        assert [tif.tags(1)[f"class_{number}"] for number in range(3)] == list(NAMES)
    for path in found:
        with rasterio.open(path) as tif:
            assert tif.tags(ns="IMAGE_STRUCTURE")["LAYOUT"] == "COG"
            assert (tif.crs, tif.transform, tif.shape) == (scene.rio.crs, scene.rio.transform(), scene.shape[1:])
            assert (tif.nodata, tif.dtypes) == (255, ("uint8",))
            assert tif.tags()["hidden_bands"] == "B08"
            assert tif.tags()["encoder"] == "tiny"
            assert tif.tags()["scene"] == "sample"
            assert not any("/" in value for value in tif.tags().values())
    rasterio.shutil.copy(found.classes, tmp_path / "seen.vrt", driver="VRT")
    categories = ElementTree.parse(tmp_path / "seen.vrt").getroot().iter("Category")
    assert [category.text for category in categories] == list(NAMES)


_FULL_DISK = """
from pathlib import Path
import numpy as np
from rasterio.crs import CRS
from rasterio.transform import from_origin
from bandmask import mosaic

noise = np.random.default_rng(0).integers(0, 250, (2, 4000, 1000), np.uint8)  # 4 MB that can't be compressed, twice
where = CRS.from_epsg(32618), from_origin(0, 0, 10, 10)
maps, ballast = Path("maps"), Path("ballast")
maps.mkdir()
(maps / "classes.tif").write_text("an older map")
for megabytes in (14, 11, 8, 6):
    ballast.write_bytes(bytes(megabytes * 2**20))
    try:
        mosaic._write(maps, noise, *where, {str(n): "#000000" for n in range(250)}, {})
    except OSError as error:
        print("refused" if "can't write maps/c" in str(error) else error)
    print([(p.name, p.stat().st_size) for p in maps.iterdir()])
"""


def test_a_disk_that_runs_full_anywhere_leaves_the_older_map(on_small_disk):
    """In the first map, its overviews, in the second; GDAL itself raises nothing when a file is closed."""
    done = on_small_disk(_FULL_DISK, "size=16m")
    assert done.stdout == "refused\n[('classes.tif', 12)]\n" * 4, done.stdout + done.stderr


# --- what is refused

REFUSED: dict[str, tuple[dict[str, Any], Callable[[xr.DataArray], xr.DataArray] | None]] = {
    r"takes \(band, y, x\) with the bands B02 B03": ({"card": dataclasses.replace(CARD, bands=("B02", "B03"))}, None),
    "tiny takes 'DN / 3000', the scene is in DN": ({"card": dataclasses.replace(CARD, scaling="DN / 3000")}, None),
    "the scene is 150 pixels long, a tile takes 256": ({"tile": 256}, None),
    "overlap is 0 to 63 pixels": ({"overlap": 64}, None),
    "tells 3 classes apart, 2 names were given": ({"classes": ("a", "b"), "colours": COLOURS[:2]}, None),
    "3 class names and 2 colours": ({"colours": COLOURS[:2]}, None),
    r"fill is one reflectance a band, \(13,\), up to 3; got \(12,\)": ({"fill": torch.zeros(12)}, None),
    "up to 3000": ({"fill": FILL * 1e4}, None),
    "the scene has .* with B02 B03": ({}, lambda scene: scene.sel(band=["B02", "B03"])),
    "the scene is in no stated units": ({}, lambda scene: scene.drop_attrs()),
    "values are in reflectance already": ({}, lambda scene: (scene / 1e4).assign_attrs(scene.attrs)),
    "a map is of a scene with coordinates": ({}, lambda scene: scene.values),
    "the scene is in EPSG:4326": ({}, lambda scene: scene.load().copy().rio.write_crs(4326)),
    r"EPSG:3857, where a pixel is \d.* m of ground": ({}, lambda scene: scene.load().copy().rio.write_crs(3857)),
    "y of the scene is no even grid, north up; sort it": ({}, lambda scene: scene.sortby("y")),
    "x of the scene is no even grid": ({}, lambda scene: scene[:, :, [*range(64), 100]]),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_does_not_fit_is_refused_before_anything_is_read(scene, predict, tmp_path, message: str):
    changes, change = REFUSED[message]
    with pytest.raises(ValueError, match=message):
        predict(change(scene) if change else scene, **changes)
    assert not (tmp_path / "maps").exists()


# --- where tiles lie, and what comes out


def generated(height: int, width: int) -> xr.DataArray:
    """Generated DN."""
    dn = np.random.default_rng(0).uniform(1, 4000, (13, height, width)).astype(np.float32)
    return xr.DataArray(dn, dims=("band", "y", "x"))


@given(st.integers(1, 400), st.integers(1, 80), st.data())
def test_every_pixel_is_owned_once_by_the_tile_it_is_most_central_in(length: int, tile: int, data: st.DataObject):
    tile = min(tile, length)
    overlap = data.draw(st.integers(0, tile - 1))
    found = spans(length, tile, overlap)
    assert [pixel for span in found for pixel in range(span.low, span.high)] == list(range(length))
    for span in found:
        assert 0 <= span.start <= length - tile
        assert span.skip == span.low - span.start >= 0
        assert span.high - span.start <= tile
    for span, following in itertools.pairwise(found):
        assert min(span.start + tile - span.high, following.low - following.start) >= overlap // 2
    for span in found:  # the tile whose centre is nearest
        for pixel in (span.low, span.high - 1):
            distances = [abs(pixel + 0.5 - (other.start + tile / 2)) for other in found]
            assert distances[found.index(span)] <= min(distances) + 0.5


def test_an_imputer_fills_hidden_pixels_of_its_bands_alone():
    array = generated(32, 32)
    whole = torch.from_numpy(array.values.copy()) / 10_000
    array[3, 10:20], array[5, 15:25], array[:, 30:] = np.nan, np.nan, np.nan  # the last rows were never seen
    moments = fills.Moments.of_spectra(whole.flatten(1).T.double().numpy())
    ridge, seen = fills.RidgeFill(moments, ("B04",)), list[Tensor]()

    def look(images: Tensor) -> Tensor:
        seen.append(images)
        return torch.ones(1, 1, 32, 32)

    strip, _ = predict_tiles(array, look, FILL, 32, 0, 1, impute=ridge)
    assert (strip[:, 30:] == 255).all()
    assert (strip[0, :30] == 0).all()
    given, missing = seen[0][0], torch.from_numpy(array.isnull().values)
    assert torch.equal(given[~missing], whole[~missing])
    assert torch.allclose(given[5, 15:25], FILL[5])
    expected = ridge(torch.where(missing, FILL[:, None, None], whole)[None], missing[None, 3:4])[0, 0, 10:20]
    assert torch.allclose(given[3, 10:20], expected)


def test_tiles_that_nothing_was_seen_in_are_not_predicted():
    """Half of a Sentinel-2 tile can lie outside the swath."""
    array = generated(64, 64)
    array[:, :, :32] = np.nan
    predicted = 0

    def count(images: Tensor) -> Tensor:
        nonlocal predicted
        predicted += len(images)
        return torch.ones(len(images), 1, 32, 32)

    (classes, _), _ = predict_tiles(array, count, FILL, 32, 0, 5)
    assert predicted == 2
    assert (classes[:, :32] == 255).all()
    (classes, _), _ = predict_tiles(xr.full_like(array, np.nan), count, FILL, 32, 0, 5)
    assert (classes == 255).all()
    assert predicted == 2


def test_no_more_is_read_at_once_than_a_batch_of_tiles(monkeypatch):
    """However large the scene."""
    array = xr.DataArray(np.broadcast_to(np.float32(1000), (13, 320, 4000)), dims=("band", "y", "x"))
    cut, read = xr.DataArray.isel, list[tuple[int, ...]]()

    def watched(array: xr.DataArray, indexers: dict[str, slice]) -> xr.DataArray:
        read.append((found := cut(array, indexers)).shape)
        return found

    monkeypatch.setattr(xr.DataArray, "isel", watched)
    predict_tiles(array, lambda images: torch.ones(len(images), 1, 320, 320), FILL, 320, 80, 4)
    assert max(read) == (13, 320, 320 + 3 * 240)
    assert len(read) == -(-len(spans(4000, 320, 80)) // 4) + 1, "some pixels once, to tell their unit"
