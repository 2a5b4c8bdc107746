"""Every kind of scene that is refused, with the words it is refused with, as Markdown.

Run:  python benchmarks/malformed_scenes.py

Scenes are generated as in the tests: the sample's pixels in ESA's layouts, then broken in one way each. One that opens
all the same is an error of this script.
"""

from __future__ import annotations

import re
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from safe import loose_folder, native, safe_tree, sample_dn, write_band, write_stack  # noqa: E402

from bandmask import bands, encoders, heads, mosaic  # noqa: E402
from bandmask.readers import imagery  # noqa: E402


def loose(change: Callable[[Path], object]) -> Callable[[Path], Any]:
    """Thirteen single-band files, of which something is changed."""

    def make(folder: Path) -> Any:
        change(loose_folder(folder / "scene"))
        return imagery.open_scene(folder / "scene")

    return make


def stack(order: tuple[str, ...] = bands.NAMES, given: Any = None, **profile: Any) -> Callable[[Path], Any]:
    """A stacked GeoTIFF."""
    return lambda folder: imagery.open_scene(write_stack(folder / "stack.tif", order, **profile), order=given)


def product(change: Callable[[Path], object], level: str = "L1C", baseline: str = "02.04") -> Callable[[Path], Any]:
    """A SAFE product, of which something is changed."""

    def make(folder: Path) -> Any:
        path = safe_tree(folder, level, baseline)
        change(path)
        return imagery.open_scene(path)

    return make


def rescaled(change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Path], None]:
    """All bands with other numbers."""

    def write(folder: Path) -> None:
        for band in bands.BANDS:
            write_band(folder / f"{band.name}.tif", change(native(band.name)), band.gsd_m)

    return write


def eight_bit(dn: np.ndarray) -> np.ndarray:
    return (dn // 40).clip(1, 255).astype(np.uint8)


def cut_short(folder: Path) -> None:
    path = folder / "B02.tif"
    path.write_bytes(path.read_bytes()[:100])


def other_encoder(folder: Path) -> Any:
    card = encoders.Card("an encoder for another order", "resnet10t", image_size=64, bands=bands.ORDERS["eurosat"])
    scene = imagery.open_scene(loose_folder(folder / "scene"))
    head, model = heads.scene_head(256, 2), encoders.create_encoder("resnet10t")
    maps = {"classes": ("a", "b"), "colours": ("#000000", "#ffffff")}
    return mosaic.predict_scene(scene, model, head, folder / "maps", card=card, **maps, fill=card_fill())


def card_fill() -> Any:
    import torch

    return torch.zeros(len(bands.NAMES))


CASES: dict[str, Callable[[Path], Any]] = {
    "nothing there": lambda folder: imagery.open_scene(folder / "S2A_MSIL1C.SAFE"),
    "a folder without a band": lambda folder: imagery.open_scene(folder),
    "bands missing": loose(lambda folder: [(folder / f"{band}.tif").unlink() for band in ("B05", "B11")]),
    "a band twice": loose(lambda folder: shutil.copy(folder / "B02.tif", folder / "T18SVG_B02_10m.tif")),
    "13 channels without names": stack(),
    "12 channels, and nothing said of B10": stack(tuple(b for b in bands.NAMES if b != "B10"), "satclip"),
    "wrong size": loose(lambda folder: write_band(folder / "B03.tif", native("B03")[:100, :100])),
    "no coordinate system": loose(lambda folder: write_band(folder / "B03.tif", native("B03"), crs=None)),
    "degrees": stack(bands.NAMES, "satclip", crs="EPSG:4326"),
    "mixed zones": loose(lambda folder: write_band(folder / "B03.tif", native("B03"), crs="EPSG:32617")),
    "pixels of 30 m": loose(lambda folder: write_band(folder / "B03.tif", native("B03"), 30)),
    "8 bit": loose(rescaled(eight_bit)),
    "8 bit, kept as 16": loose(rescaled(lambda dn: eight_bit(dn).astype(np.uint16))),
    "reflectance already": loose(rescaled(lambda dn: dn.astype(np.float32) / 10_000)),
    "offset not taken off": loose(rescaled(lambda dn: dn + np.uint16(1000))),
    "no value anywhere": loose(rescaled(lambda dn: np.zeros_like(dn))),
    "a file cut short": loose(cut_short),
    "metadata damaged": product(lambda path: (path / "MTD_MSIL1C.xml").write_text("<oops")),
    "baseline 04.00 without offset": product(lambda path: None, baseline="04.00"),
    "an encoder for another order": other_encoder,
}


def main() -> None:
    assert sample_dn().shape[0] == len(bands.NAMES)
    print("| what is wrong | what is said |\n| --- | --- |")
    for name, make in CASES.items():
        with tempfile.TemporaryDirectory() as temporary:
            try:
                make(Path(temporary))
            except (ValueError, FileNotFoundError) as error:
                said = re.sub(rf"(/vsizip/)?\{{?{re.escape(temporary)}/?\}}?", "…/", str(error)).replace("|", "\\|")
                print(f"| {name} | {type(error).__name__}: {said} |", flush=True)
            else:
                raise SystemExit(f"{name}: opens without a word")


if __name__ == "__main__":
    main()
