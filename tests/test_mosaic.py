"""A map of a scene says what the network says of each window, lies where the scene lies, and is whole or not there.

Weights are random: what the classes mean doesn't matter here. The scene is the embedded one, or generated around it.
"""

from __future__ import annotations

import dataclasses
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
from models import TINY, tiny_encoder
from torch import nn

from bandmask import datasets, masking
from bandmask.decoders import SegmentationDecoders, create_decoder
from bandmask.encoders import Card, embed
from bandmask.heads import SceneHeads, scene_head
from bandmask.maps import segment
from bandmask.mosaic import SceneMaps, predict_scene, probabilities
from bandmask.readers.imagery import open_scene
from bandmask.readers.tiles import spans
from bandmask.training import Compute
from bandmask.views import TAPS, View, tap_channels

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
    low, high = tap_channels(View(encoder, masking.MaskSpec(), FILL), CPU)
    made = SegmentationDecoders([create_decoder(high, low, 3, width=8, seed=seed) for seed in (0, 1)], (0, 1)).eval()
    images = torch.from_numpy(scene.fillna(1000).values[:, :TILE, :TILE])[None] / 10_000
    with torch.no_grad():
        _, maps = embed(encoder, images, TAPS)
        for decoder in made.decoders:
            last = decoder.decoder.last_conv[8]
            last.weight *= 20
            last.bias -= decoder(maps[TAPS[0]], maps[TAPS[1]], (TILE, TILE)).mean((0, 2, 3))
    return made


@pytest.fixture
def predict(encoder: nn.Module, decoders: SegmentationDecoders, tmp_path: Path) -> Callable[..., SceneMaps]:
    def run(scene: xr.DataArray, head: nn.Module = decoders, model: nn.Module = encoder, **changes: Any) -> SceneMaps:
        options: dict[str, Any] = {"card": CARD, "classes": NAMES, "colours": COLOURS, "fill": FILL, "overlap": OVERLAP}
        options |= {"compute": CPU, "progress": False, "batch_size": 4} | changes
        return predict_scene(scene, model, head, options.pop("folder", tmp_path / "maps"), **options)

    return run


def read(path: Path) -> np.ndarray:
    with rasterio.open(path) as tif:
        return tif.read(1)


# --- what the map says


def test_each_pixel_is_what_predicting_its_window_alone_says(scene, encoder, decoders, predict):
    """By the function that notebooks predict single images with, which knows nothing of tiles."""
    found = predict(scene, SegmentationDecoders([decoders.decoders[0]], (0,)))
    classes = read(found.classes)
    view = View(encoder, masking.MaskSpec(("B08",), 1.0), FILL, TILE)
    one = SegmentationDecoders([decoders.decoders[0]], (0,))
    dn = scene.fillna(0).values
    assert len(np.unique(classes)) > 1
    for row in spans(scene.sizes["y"], TILE, OVERLAP):
        for column in spans(scene.sizes["x"], TILE, OVERLAP):
            window = dn[:, row.start : row.start + TILE, column.start : column.start + TILE]
            image = torch.from_numpy(window)[None] / 10_000
            alone = segment(view, one, image, torch.zeros(1, dtype=torch.long), compute=CPU)[0, 0].numpy()
            own = classes[row.low : row.high, column.low : column.high]
            ours = alone[row.skip :, column.skip :][: own.shape[0], : own.shape[1]]
            assert (own == ours).mean() > 0.999  # sums in batches of another size round otherwise


def test_confidence_is_the_mean_probability_of_the_class_over_seeds(scene, encoder, decoders, predict):
    tile = scene.isel(y=slice(0, TILE), x=slice(0, TILE))
    found = predict(tile)
    images = torch.from_numpy(tile.values)[None] / 10_000
    images = torch.where(images.isnan(), FILL[:, None, None], images)
    separate = [probabilities(encoder, one, images, TILE, TILE, CPU) for one in decoders.decoders]
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


def test_pixels_that_no_band_saw_have_no_class(scene, predict):
    array = scene.load().copy()
    array[:, 100:, :50] = np.nan
    array[3, :20] = np.nan  # lost in one band: predicted
    for path in predict(array):
        values = read(path)
        assert (values[100:, :50] == 255).all()
        assert (np.delete(values, np.s_[100:], 0) != 255).all()


def test_tiles_of_another_size_are_resized_as_training_images_are(scene, encoder, decoders, predict):
    """EuroSAT's 64 px are shown to SatCLIP at 256; here 32 at 64."""
    tile = scene.isel(y=slice(0, 32), x=slice(0, 32))
    one = SegmentationDecoders([decoders.decoders[0]], (0,))
    small = read(predict(tile, one, tile=32, overlap=0).classes)
    dn = torch.from_numpy(tile.values)
    images = torch.where(dn.isnan(), FILL[:, None, None], dn / 10_000)[None]
    larger = nn.functional.interpolate(images, (TILE, TILE), mode="bilinear")
    view = View(encoder, masking.MaskSpec(), FILL, TILE)
    alone = segment(view, one, larger, torch.zeros(1, dtype=torch.long), (32, 32), compute=CPU)[0, 0]
    assert len(alone.unique()) > 1
    assert np.array_equal(small, alone)


@pytest.mark.parametrize("heads", [scene_head(16, 3, seed=0), SceneHeads(16, 3, (0,))])
def test_a_scene_head_gives_one_class_a_tile(scene, encoder, predict, heads: nn.Module):
    found = predict(scene, heads)
    values = scene.fillna(xr.DataArray(1e4 * FILL.numpy(), dims="band", coords={"band": scene.band})).values / 1e4
    images = torch.stack(
        [torch.from_numpy(values[:, y : y + 64, x : x + 64]).float() for y in (0, 64) for x in (0, 64)]
    )
    with torch.no_grad():
        expected = scene_head(16, 3, seed=0)(encoder(images)).argmax(1).view(2, 2)
    assert np.array_equal(read(found.classes), expected)
    with rasterio.open(found.classes) as tif:
        assert tif.res == (640, 640)
        assert (tif.bounds.left, tif.bounds.top) == (scene.rio.bounds()[0], scene.rio.bounds()[3])


# --- the files


def test_maps_are_cloud_optimized_and_lie_where_the_scene_lies(scene, predict):
    for path in predict(scene):
        with rasterio.open(path) as tif:
            assert tif.tags(ns="IMAGE_STRUCTURE")["LAYOUT"] == "COG"
            assert tif.crs == scene.rio.crs
            assert tif.transform == scene.rio.transform()
            assert tif.shape == scene.shape[1:]
            assert tif.nodata == 255
            assert tif.dtypes == ("uint8",)


def test_maps_carry_names_colours_and_what_was_hidden(scene, predict, tmp_path):
    found = predict(scene)
    with rasterio.open(found.classes) as tif:
        assert [tif.colormap(1)[number] for number in range(3)] == [
            (255, 0, 0, 255),
            (0, 255, 0, 255),
            (0, 0, 255, 255),
        ]
        assert [tif.tags(1)[f"class_{number}"] for number in range(3)] == list(NAMES)
    for path in found:
        with rasterio.open(path) as tif:
            assert tif.tags()["hidden_bands"] == "B08"
            assert tif.tags()["encoder"] == "tiny"
            assert tif.tags()["scene"] == "sample"
            assert not any("/" in value for value in tif.tags().values())
    rasterio.shutil.copy(found.classes, tmp_path / "seen.vrt", driver="VRT")
    categories = ElementTree.parse(tmp_path / "seen.vrt").getroot().iter("Category")
    assert [category.text for category in categories] == list(NAMES)


def test_a_failure_on_the_way_leaves_the_maps_that_were_there(scene, encoder, predict, tmp_path):
    before = {path: path.read_bytes() for path in predict(scene)}
    names = {path.name for path in (tmp_path / "maps").iterdir()}
    assert names == {"classes.tif", "classes.tif.aux.xml", "confidence.tif"}
    calls = 0

    def break_later(*_: object) -> None:
        nonlocal calls
        calls += 1
        if calls > 3:
            raise RuntimeError("the power went out")

    handle = encoder.register_forward_pre_hook(break_later)
    hooked = encoder.stem if hasattr(encoder, "stem") else encoder.conv1
    second = hooked.register_forward_pre_hook(break_later)
    with pytest.raises(RuntimeError, match="the power went out"):
        predict(scene)
    handle.remove()
    second.remove()
    assert {path: path.read_bytes() for path in before} == before
    assert {path.name for path in (tmp_path / "maps").iterdir()} == names
    (tmp_path / "maps" / "notes.txt").write_text("mine")
    predict(scene)
    assert (tmp_path / "maps" / "notes.txt").read_text() == "mine"


_FULL_DISK = """
from pathlib import Path
import numpy as np
from rasterio.crs import CRS
from rasterio.transform import from_origin
from bandmask import mosaic
from bandmask.readers.tiles import Span

noise = np.random.default_rng(0).integers(0, 250, (20, 200, 1000), np.uint8)  # 4 MB that can't be compressed, twice
where = (4000, 1000), CRS.from_epsg(32618), from_origin(0, 0, 10, 10)
maps, ballast = Path("maps"), Path("ballast")
maps.mkdir()
(maps / "classes.tif").write_text("an older map")
for megabytes in (13, 7, 4, 1):
    ballast.write_bytes(bytes(megabytes * 2**20))
    strips = ((Span(200 * n, 0, 200 * n, 200 * n + 200), part, part) for n, part in enumerate(noise))
    try:
        mosaic._write(maps, strips, *where, [str(n) for n in range(250)], ["#000000"] * 250, {})
    except OSError as error:
        print("refused" if "can't write maps/.strips" in str(error) else error)
    print([(p.name, p.stat().st_size) for p in maps.iterdir()])
"""


def test_a_disk_that_runs_full_anywhere_leaves_the_older_map(on_small_disk):
    """While strips are written, when they are closed, in the first copy, in the second; GDAL itself raises nothing."""
    done = on_small_disk(_FULL_DISK, "size=16m")
    assert done.stdout == "refused\n[('classes.tif', 12)]\n" * 4, done.stdout + done.stderr


# --- what is refused


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"card": dataclasses.replace(CARD, bands=("B02", "B03"))},
            r"tiny takes \(band, y, x\) with the bands B02 B03",
        ),
        ({"card": dataclasses.replace(CARD, scaling="DN / 3000")}, "tiny takes 'DN / 3000', the scene is in DN"),
        ({"card": dataclasses.replace(CARD, image_size=50)}, "trained at 50 pixels; a decoder needs a multiple of 32"),
        ({"card": dataclasses.replace(CARD, image_size=256)}, "the scene is 150 pixels long, a tile takes 256"),
        ({"tile": 256}, "the scene is 150 pixels long, a tile takes 256"),
        ({"overlap": 64}, "overlap is 0 to 63 pixels"),
        ({"classes": ("a", "b"), "colours": COLOURS[:2]}, "tells 3 classes apart, 2 names were given"),
        ({"colours": COLOURS[:2]}, "3 class names and 2 colours"),
        ({"fill": None}, r"doesn't tell what stands for a hidden pixel \(mask value: None\); pass fill"),
        ({"fill": torch.zeros(12)}, r"fill is one finite reflectance a band, \(13,\); got \(12,\)"),
        ({"fill": torch.full((13,), torch.nan)}, "fill is one finite reflectance"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_read(scene, predict, tmp_path, changes, message: str):
    with pytest.raises(ValueError, match=message):
        predict(scene, **changes)
    assert not (tmp_path / "maps").exists()


def test_scenes_that_are_none_are_refused(scene, predict):
    with pytest.raises(ValueError, match=r"the scene has .* with B02 B03"):
        predict(scene.sel(band=["B02", "B03"]))
    with pytest.raises(ValueError, match="the scene is in no stated units"):
        predict(scene.drop_attrs())
    with pytest.raises(ValueError, match="the scene has no coordinate system"):
        predict(scene.load().copy().drop_vars("spatial_ref"))


def test_models_that_do_not_fit_each_other_are_refused(scene, encoder, predict):
    import timm

    with pytest.raises(ValueError, match=r"doesn't fit the card of tiny \(13 bands"):
        predict(scene, model=timm.create_model(TINY, in_chans=3, num_classes=16).eval())
    with pytest.raises(ValueError, match="feature maps of"):
        predict(scene, create_decoder(2048, 256, 3, width=8))
    with pytest.raises(ValueError, match="embedding of 16"):
        predict(scene, scene_head(256, 3))


def test_the_cards_own_mask_value_is_the_fill(scene, predict, tmp_path):
    card = dataclasses.replace(CARD, mask={"bands": ["B08"], "value": -1.0})
    by_card = read(predict(scene, card=card, fill=None).confidence)
    by_hand = read(predict(scene, fill=torch.full((13,), -1.0), folder=tmp_path / "hand").confidence)
    assert np.array_equal(by_card, by_hand)


def test_a_band_that_the_encoder_never_learnt_to_miss_is_a_warning(scene, predict):
    card = dataclasses.replace(CARD, mask={"bands": ["B02"], "value": -1.0})
    with pytest.warns(UserWarning, match="tiny learnt to miss B02; this scene lacks B08 too"):
        predict(scene, card=card)
