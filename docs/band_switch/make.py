"""Put into `docs/front/band_switch.html` what it shows: every choice of bands of one real patch, judged beforehand.

    python docs/band_switch/make.py [row of eurosat-mini]

All 8,192 subsets of the 13 bands go through the encoder that comes with the package, with zeros or a ridge regression
in the hidden bands, and through its copy for every loss. A minute of one core. The page needs no server and asks none.
"""

from __future__ import annotations

import base64
import gzip
import json
import re
import sys
from pathlib import Path

import numpy as np
import torch

from bandmask import any_band, bands, datasets, encoders, evaluation, files, plots
from bandmask.fills import Moments

FILLS = ("zeros", "ridge regression from the others", "nothing: the any-band encoder")
SETS = {
    "all bands": (),
    "no visible light": bands.GROUPS["visible"],
    "no SWIR": bands.GROUPS["SWIR"],
    "10 m bands only": tuple(band.name for band in bands.BANDS if band.gsd_m > 10),
    "60 m bands only": tuple(band.name for band in bands.BANDS if band.gsd_m < 60),
}


def chances(image: np.ndarray, visible: np.ndarray, moments: Moments) -> np.ndarray:
    """Probabilities by the heads in service, (3, P, classes), of an image (13, H, W) and subsets of bands (P, 13)."""
    pretrained, _ = encoders.load_encoder(encoders.MINI)
    every, _ = any_band.load(files.MINI / "encoder")
    heads, _ = evaluation.read_in_service(files.MINI / "heads")
    x = torch.tensor(image)
    found: list[list[np.ndarray]] = [[], [], []]
    with torch.inference_mode():
        for seen in np.array_split(visible, max(len(visible) // 64, 1)):
            weight, bias = (torch.tensor(part, dtype=torch.float32) for part in moments.regressions(seen))
            shown = torch.tensor(seen)[..., None, None]
            ridge = torch.einsum("pij,jhw->pihw", weight, x) + bias[..., None, None]
            gaps = torch.where(shown, x, torch.nan)
            none = ~torch.tensor(seen).any(1)
            gaps[none] = x  # of nothing nothing can be said; the page doesn't show it
            batches = (pretrained, torch.where(shown, x, 0)), (pretrained, torch.where(shown, x, ridge)), (every, gaps)
            for rows, (encoder, batch) in zip(found, batches, strict=True):
                rows.append(heads(encoder(batch)).softmax(-1).mean(0).numpy())
    return np.stack([np.concatenate(rows) for rows in found])


def main(row: int = 60) -> None:
    """Write the page of an image."""
    pack = datasets.open_dataset("eurosat-mini")
    image = (np.asarray(pack.images[row]) / 10_000).astype(np.float32)
    visible = (np.arange(2**13)[:, None] >> np.arange(13)) % 2 == 1
    found = chances(image, visible, Moments.of(pack))
    low, high = plots.stretch_limits(image)
    light = np.clip((image - low[:, None, None]) / (high - low)[:, None, None].clip(1e-6), 0, 1)
    parts = (light, plots.composite(image, "true colour"), found)
    packed = b"".join(np.round(255 * part).astype(np.uint8).tobytes() for part in parts)
    truth, some = pack.classes[pack.labels[row]], visible.any(1)
    right = (found.argmax(-1) == pack.labels[row])[:, some].mean(1)
    shares = [f"{share:.0%} with {name}" for name, share in zip(("zeros", "ridge", "any-band"), right, strict=True)]
    license = "of EuroSAT's test images (Helber et al. 2019, MIT; contains modified Copernicus Sentinel data)"
    page = {
        "bands": [[band.name, band.common_name, band.wavelength_nm] for band in bands.BANDS],
        "classes": pack.classes,
        "truth": truth,
        "fills": FILLS,
        "sets": SETS,
        "about": f"A real Sentinel-2 patch, 640 m wide, that no training saw: {pack.index['file'][row]} {license}. "
        f"Its class is {truth}. All answers were computed beforehand, by the small encoder that comes with bandmask.",
        "share": f"The class of this patch is right in {', '.join(shares)}. It is one patch; notebook 09 has 200.",
        "bytes": base64.b64encode(gzip.compress(packed, 9, mtime=0)).decode(),
    }
    path = Path(__file__).parents[1] / "front" / "band_switch.html"
    held = f"const page = {json.dumps(page)};"
    text = re.sub(r"^const page = .*$", lambda _: held, path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    path.write_text(text, encoding="utf-8")
    print(f"docs/front/band_switch.html: {len(text) / 1e3:.0f} kB; {page['share']}")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
