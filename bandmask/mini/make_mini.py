"""Make what lies beside this file: the images (`images`), or what was trained for them (`set`).

`BANDMASK_DATA=… python bandmask/mini/make_mini.py images` cuts EuroSAT: `index.csv` says which. A file a band, lossless
JPEG 2000, ten rows of twenty images in the order of the index; beside them `train.json`, the mean and covariance of the
training images in `eurosat-mini-train`. `… set` takes over what `make run EXPERIMENT=mini-train` left in `outputs/`.
"""

import hashlib
import json
import shutil
import sys

import numpy as np
import pandas as pd
import rasterio

from bandmask import datasets, files, fills
from bandmask.bands import NAMES


def images() -> None:
    """Write the images, their checksums and the statistics of the others."""
    index, whole = pd.read_csv(files.MINI / "index.csv"), datasets.open_dataset("eurosat")
    row_of = {file.rpartition("/")[2]: row for row, file in enumerate(whole.index["file"])}
    cut = whole.images[[row_of[file.rpartition("/")[2]] for file in index["file"]]]
    index["sha256"] = [hashlib.sha256(image.tobytes()).hexdigest() for image in cut]  # (13, 64, 64) uint16
    index.to_csv(files.MINI / "index.csv", index=False)
    mosaic = cut.reshape(10, 20, 13, 64, 64).transpose(2, 0, 3, 1, 4).reshape(13, 640, 1280)
    shape = {"height": 640, "width": 1280, "count": 1, "dtype": "uint16", "transform": rasterio.Affine.scale(10, -10)}
    for name, plane in zip(NAMES, mosaic, strict=True):
        path = files.MINI / f"{name}.jp2"
        with rasterio.open(path, "w", driver="JP2OpenJPEG", QUALITY=100, REVERSIBLE="YES", **shape) as file:
            file.write(plane, 1)
        with rasterio.open(path) as file:
            assert np.array_equal(file.read(1), plane)
    made_from = datasets.open_dataset("eurosat-mini-train")
    moments = fills.Moments.of(made_from, pixels=10**9)
    known = {"mean": moments.mean.tolist(), "covariance": moments.covariance.tolist(), "pixels": moments.pixels}
    (files.MINI / "train.json").write_text(json.dumps({"images": len(made_from.rows("train")), **known}))


def trained() -> None:
    """Take over encoder, any-band student and heads from `outputs/mini-train`."""
    made = files.outputs_root() / "mini-train"
    for source, name in (("any-band/encoder-seed0", "encoder"), ("in_service/classification", "heads")):
        shutil.rmtree(files.MINI / name, ignore_errors=True)
        shutil.copytree(made / source, files.MINI / name, copy_function=shutil.copyfile)
    shutil.copyfile(made / "any-band" / "history.csv", files.MINI / "history.csv")


if __name__ == "__main__":
    {"images": images, "set": trained}[sys.argv[1]]()
