"""Cut the embedded images out of EuroSAT: `BANDMASK_DATA=… python bandmask/mini/make_mini.py`.

`index.csv` says which. A file a band, lossless JPEG 2000, ten rows of twenty images in the order of the index; beside
them `train.json`, the mean and covariance of all other training and validation pixels that are there.
"""

import hashlib
import json

import numpy as np
import pandas as pd
import rasterio

from bandmask import datasets, fills
from bandmask.bands import NAMES


def main() -> None:
    """Write the images, their checksums and the statistics of the others into `datasets.MINI_FOLDER`."""
    folder = datasets.MINI_FOLDER
    index, whole = pd.read_csv(folder / "index.csv"), datasets.open_dataset("eurosat")
    row_of = {file.rpartition("/")[2]: row for row, file in enumerate(whole.index["file"])}
    images = whole.images[[row_of[file.rpartition("/")[2]] for file in index["file"]]]
    index["sha256"] = [hashlib.sha256(image.tobytes()).hexdigest() for image in images]  # (13, 64, 64) uint16
    index.to_csv(folder / "index.csv", index=False)
    mosaic = images.reshape(10, 20, 13, 64, 64).transpose(2, 0, 3, 1, 4).reshape(13, 640, 1280)
    shape = {
        "height": 640,
        "width": 1280,
        "count": 1,
        "dtype": "uint16",
        "transform": rasterio.Affine(10, 0, 0, 0, -10, 0),
    }
    for name, plane in zip(NAMES, mosaic, strict=True):
        path = folder / f"{name}.jp2"
        with rasterio.open(path, "w", driver="JP2OpenJPEG", QUALITY=100, REVERSIBLE="YES", **shape) as file:
            file.write(plane, 1)
        with rasterio.open(path) as file:
            assert np.array_equal(file.read(1), plane)
    rest = datasets.open_dataset("eurosat-rest")
    moments = fills.Moments.of(rest, pixels=10**9)
    known = {"mean": moments.mean.tolist(), "covariance": moments.covariance.tolist(), "pixels": moments.pixels}
    (folder / "train.json").write_text(json.dumps({"images": len(rest.rows("train")), **known}))


if __name__ == "__main__":
    main()
