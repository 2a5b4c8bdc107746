"""Predict whole scenes: megapixels per second and peak memory.

    python benchmarks/scene.py              # the embedded scene, and a generated one of 10980 × 10980 pixels
    python benchmarks/scene.py --rows 3000  # only so many of its rows
    python benchmarks/scene.py --jp2        # kept as JPEG 2000, as ESA delivers it; writing it takes minutes

Encoders and decoders are random: what they say does not matter here, only what it takes. The large scene repeats the
embedded one, 13 bands at native resolution, 1.3 GB on disk in a temporary folder; it is no product of ESA's. Memory is
the resident set of this process, sampled ten times a second; what it was before is printed beside.
"""

from __future__ import annotations

import argparse
import multiprocessing
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import rasterio
import rasterio.shutil
import torch
import xarray as xr
from rasterio.transform import from_origin
from torch import nn

from bandmask import bands, datasets, encoders, evaluate, mosaic
from bandmask.heads import SegmentationDecoders
from bandmask.scene import open_scene
from bandmask.training import Compute

SIDE = 10_980
CASES = {  # name: architecture, pixels of a tile, decoder width, tiles a batch
    "demo": ("resnet18", 64, 32, 64),
    "thesis": ("resnet50", 256, 256, 8),
}
CLASSES, COLOURS = ("a", "b", "c"), ("#4477aa", "#ee6677", "#228833")


class Peak:
    """Peak of this process' resident memory while the block runs, in MiB, and the seconds it took."""

    def __enter__(self) -> Peak:
        self.process, self.done = psutil.Process(), threading.Event()
        self.before = self.most = self.process.memory_info().rss
        self.thread = threading.Thread(target=self._watch)
        self.started = time.perf_counter()
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds = time.perf_counter() - self.started
        self.done.set()
        self.thread.join()

    def _watch(self) -> None:
        while not self.done.wait(0.1):
            self.most = max(self.most, self.process.memory_info().rss)

    def __str__(self) -> str:
        return f"{self.seconds:.0f} s, peak {self.most / 2**20:.0f} MiB ({self.before / 2**20:.0f} MiB before)"


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


def models(
    architecture: str, size: int, width: int, classes: int = len(CLASSES)
) -> tuple[nn.Module, SegmentationDecoders, encoders.Card]:
    encoder = encoders.create_encoder(architecture).eval()
    view = evaluate.View(encoder, image_size=size)
    decoders, _ = evaluate.make_decoders(view, classes, (0,), width=width, compute=Compute.of())
    return encoder, decoders, encoders.Card(f"random {architecture}", architecture, image_size=size)


def predict(scene: xr.DataArray, name: str, folder: Path, **options: object) -> tuple[mosaic.SceneMaps, Peak]:
    architecture, size, width, batch = CASES[name]
    encoder, decoders, card = models(architecture, size, width)
    known = {"card": card, "classes": CLASSES, "colours": COLOURS, "fill": torch.full((13,), 0.1), "batch_size": batch}
    with Peak() as peak:
        maps = mosaic.predict_scene(scene, encoder, decoders, folder, **{**known, **options})
    height, width = scene.shape[1:]
    print(
        f"{name} ({architecture}, tiles of {size} px, decoder width {CASES[name][2]}), {height} × {width}: {peak}, "
        f"{height * width / 1e6 / peak.seconds:.3f} megapixels/s"
    )
    return maps, peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=SIDE, help="rows of the large scene")
    parser.add_argument("--case", choices=CASES, default="demo", help="network of the large scene")
    parser.add_argument("--only", choices=("sample", "large"), help="one part alone")
    parser.add_argument("--jp2", action="store_true", help="keep the large scene as JPEG 2000")
    arguments = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, device {Compute.of().device}")
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
            with Peak() as peak:
                scene = open_scene(folder, hide="B08").isel(y=slice(0, arguments.rows))
            print(f"opened, lazily: {peak}")
            predict(scene, arguments.case, folder / "large")


if __name__ == "__main__":
    main()
