"""Predict whole scenes: megapixels per second and peak memory.

    python benchmarks/scene.py              # the embedded scene, and a generated one of 10980 × 10980 pixels
    python benchmarks/scene.py --rows 3000 --jp2  # 3000 of its rows, kept as JPEG 2000

Encoders and decoders are random: what they say does not matter here. The large scene repeats the embedded one, 13 bands
at native resolution, 1.3 GB on disk in a temporary folder. Memory is the resident set of this process.
"""

from __future__ import annotations

import argparse
import multiprocessing
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import psutil
import rasterio
import rasterio.shutil
import torch
import xarray as xr
from rasterio.transform import from_origin

from bandmask import bands, datasets, encoders, evaluation, mosaic
from bandmask.scene import open_scene

SIDE = 10_980
CASES = {  # name: architecture, pixels of a tile, decoder width, tiles a batch
    "demo": ("resnet18", 64, 32, 64),
    "thesis": ("resnet50", 256, 256, 8),
}
CLASSES, COLOURS = ("a", "b", "c"), ("#4477aa", "#ee6677", "#228833")


@contextmanager
def peak(what: str, pixels: int = 0) -> Iterator[None]:
    """Say how long the block took, and the peak of this process' resident memory meanwhile."""
    process, done = psutil.Process(), threading.Event()
    seen = [process.memory_info().rss]

    def watch() -> None:
        while not done.wait(0.1):
            seen.append(process.memory_info().rss)

    thread, started = threading.Thread(target=watch), time.perf_counter()
    thread.start()
    yield
    seconds = time.perf_counter() - started
    done.set()
    thread.join()
    speed = f", {pixels / 1e6 / seconds:.3f} megapixels/s" if pixels else ""
    print(f"{what}: {seconds:.0f} s, peak {max(seen) / 2**20:.0f} MiB ({seen[0] / 2**20:.0f} MiB before){speed}")


def large_scene(folder: Path, jp2: bool) -> Path:
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
    return folder


def predict(scene: xr.DataArray, name: str, folder: Path) -> None:
    architecture, size, width, batch = CASES[name]
    encoder = encoders.create_encoder(architecture).eval()
    decoders, _ = evaluation.make_decoders(evaluation.View(encoder, image_size=size), len(CLASSES), (0,), width=width)
    known = {"card": encoders.Card(f"random {architecture}", architecture, image_size=size), "batch_size": batch}
    known |= {"classes": CLASSES, "colours": COLOURS, "fill": torch.full((13,), 0.1)}
    rows, columns = scene.shape[1:]
    what = f"{name} ({architecture}, tiles of {size} px, decoder width {width}), {rows} × {columns}"
    with peak(what, rows * columns):
        mosaic.predict_scene(scene, encoder, decoders, folder, **known)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=SIDE, help="rows of the large scene")
    parser.add_argument("--only", choices=("sample", "large"), help="one part alone")
    parser.add_argument("--jp2", action="store_true", help="keep the large scene as JPEG 2000")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if arguments.only in (None, "sample"):
            sample = open_scene(datasets.SAMPLE_FOLDER, hide="B08")
            for name in CASES:
                predict(sample, name, folder / f"sample-{name}")
        if arguments.only in (None, "large"):
            writer = multiprocessing.get_context("spawn").Process(target=large_scene, args=(folder, arguments.jp2))
            writer.start()  # in a process of its own, whose memory is not counted
            writer.join()
            with peak("opened, lazily"):
                scene = open_scene(folder, hide="B08").isel(y=slice(0, arguments.rows))
            predict(scene, "demo", folder / "large")


if __name__ == "__main__":
    main()
