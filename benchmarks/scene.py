"""Predict whole scenes, and fill a tile's lost bands before a model: megapixels per second and peak memory.

    python benchmarks/scene.py sample       # the embedded scene, by small and by large networks
    python benchmarks/scene.py large        # a generated one of 10980 × 10980 pixels; as JPEG 2000 with --jp2
    python benchmarks/scene.py fill         # B11 and B12 of 10980 × 10980 × 13 generated DN, 512 pixels at a time

Encoders and decoders are random: what they say does not matter here. The large scene repeats the embedded one, 13 bands
at native resolution, 1.3 GB on disk in a temporary folder. Memory is the resident set of this process.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import tempfile
import time
from pathlib import Path

import numpy as np
import rasterio
import rasterio.shutil
from rasterio.transform import from_origin

import bandmask as bm
from bandmask import bands, datasets

SIDE = 10_980
CASES = {  # name: architecture, pixels of a tile, decoder width, tiles a batch
    "demo": ("resnet18", 64, 32, 64),
    "thesis": ("resnet50", 256, 256, 8),
}


def large_scene(folder: Path, jp2: bool) -> None:
    """Single-band files of 10, 20 and 60 m with one corner, the embedded bands repeated; written in strips."""
    for band in bands.BANDS:
        with rasterio.open(datasets.SAMPLE_FOLDER / f"{band.name}.tif") as file:
            dn = file.read(1)[: 6144 // band.gsd_m, : 6144 // band.gsd_m]
        side = SIDE * 10 // band.gsd_m
        across = np.tile(dn.clip(1), (1, -(-side // dn.shape[1])))[:, :side]
        path = folder / f"{band.name}.tif"
        profile = {"driver": "GTiff", "count": 1, "dtype": "uint16", "height": side, "width": side, "tiled": True}
        corner = from_origin(399_960, 4_200_000, band.gsd_m, band.gsd_m)
        with rasterio.open(path, "w", crs="EPSG:32618", transform=corner, **profile) as out:
            for top in range(0, side, len(dn)):
                rows = min(len(dn), side - top)
                out.write(across[None, :rows], window=((top, top + rows), (0, side)))
        if jp2:
            rasterio.shutil.copy(path, path.with_suffix(".jp2"), driver="JP2OpenJPEG", QUALITY=100, REVERSIBLE="YES")
            path.unlink()


def predict(scene, name: str, folder: Path) -> None:
    import torch

    from bandmask import encoders, evaluation, heads

    architecture, size, width, batch = CASES[name]
    encoder = encoders.create_encoder(architecture).eval()
    _, maps = encoders.embed(encoder, torch.zeros(1, 13, size, size), evaluation.decoder_taps(encoder))
    low, high = (found.shape[1] for found in maps.values())
    decoder = heads.create_decoder(high, low, 3, width=width)
    known = {"card": encoders.Card(f"random {architecture}", architecture, image_size=size), "batch_size": batch}
    known |= {"classes": ("a", "b", "c"), "colours": ("#4477aa", "#ee6677", "#228833"), "fill": torch.full((13,), 0.1)}
    bm.predict_scene(scene, encoder, decoder, folder, **known)


def fill() -> None:
    line = np.random.default_rng(0).integers(100, 4000, (13, 1, SIDE)).astype(np.uint16)
    model = bm.guard(lambda x: x[:, 0], bands.NAMES, unit="DN", tile=512)
    model(np.broadcast_to(line, (13, SIDE, SIDE)), distrust="B11 B12")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", choices=("sample", "large", "fill"))
    parser.add_argument("--network", choices=[*CASES], default="demo")
    parser.add_argument("--rows", type=int, default=SIDE, help="of the large scene")
    parser.add_argument("--jp2", action="store_true", help="keep the large scene as JPEG 2000")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder, pixels = Path(temporary), SIDE * SIDE
        if given.case == "large":
            writer = multiprocessing.get_context("spawn").Process(target=large_scene, args=(folder, given.jp2))
            writer.start()  # in a process of its own, whose memory is not counted
            writer.join()
        before, started, used = (
            resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
            time.perf_counter(),
            time.process_time(),
        )
        if given.case == "fill":
            fill()
        else:
            path = folder if given.case == "large" else datasets.SAMPLE_FOLDER
            scene = bm.open_scene(path, hide="B08").isel(y=slice(0, given.rows))
            predict(scene, given.network, folder / "maps")
            pixels = scene.sizes["y"] * scene.sizes["x"]
        seconds, cpu = time.perf_counter() - started, time.process_time() - used
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(f"{given.case}: {seconds:.0f} s ({cpu:.0f} of CPU), {pixels / 1e6 / seconds:.3f} megapixels/s, peak", end=" ")
    print(f"{peak / 1024:.0f} MiB ({before / 1024:.0f} before)")


if __name__ == "__main__":
    main()
