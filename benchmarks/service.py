"""Published models that lose bands: the record `bandmask/records/service.csv`, and the cost of filling a tile.

python benchmarks/service.py s2cloudless | holes | ukis | adapt | snap | galileo-nano | presto | pools | cirrus | tile

It takes BANDMASK_DATA and the packages that docs/service.md names, and writes outputs/service/<case>.csv.
"""

from __future__ import annotations

import resource
import sys
import time

import numpy as np
import pandas as pd
import rasterio

import bandmask as bm
from bandmask import bands, files, models, moments, service
from bandmask.stats import Agreement

DATA = files.data_root()
SHIFTED = ("282D_485L_3_3_S2L1C", "433D_629L_3_1_S2L1C", "433D_629L_3_1_S2L2A")  # carry +1000 DN
PLACES = ("282D_485L_3_3", "433D_629L_3_1", "38D_378R_2_3")
FEW = [" ".join(n for n in bands.NAMES if n not in left.split()) for left in service.FEW]


def tiles(level: str) -> list[np.ndarray]:
    """Reflectance of three places."""
    found = []
    for name in (f"{place}_S2{level}" for place in PLACES):
        with rasterio.open(DATA / "tiles" / f"{name}.tif") as file:
            found.append((file.read().astype(np.float32) - 1000 * (name in SHIFTED)) / 10_000)
    return found


def mini(count: int) -> tuple[list[np.ndarray], np.ndarray, tuple[str, ...]]:
    """Reflectance of EuroSAT's test images that ship with the package, and their labels."""
    pack = bm.open_dataset("eurosat-mini")
    rows = np.random.default_rng(0).permutation(len(pack.images))[:count]
    return [pack.images[row].astype(np.float32) / 10_000 for row in rows], pack.labels[rows], pack.classes


def hand_labelled() -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Three images of six bands, and clear 0, cloud 1, shadow 2 by hand."""
    images, labels = [], []
    for name in ("sentinel2", "landsat7", "landsat5"):
        stored = np.load(DATA / "clouds" / f"ukis_{name}.npz")
        mask = stored["msk"][..., 0]
        images.append(stored["img"].transpose(2, 0, 1))
        labels.append(np.select([mask == 4, mask == 0], [1, 2], 0))
    return images, labels


def s2cloudless() -> pd.DataFrame:
    """Five dates of one place, three tiles, eight land images; `own` is fitted on the others each time."""
    service.PIXELS = 1600
    images = [date.astype(np.float32) / 10_000 for date in bm.sample_clouds().values] + tiles("L1C") + mini(8)[0]
    model = bm.guard("s2cloudless", images=images)
    return model.robustness(fills=["zero", "mean", "nearest", "none", "land", "own"], progress=True)


def holes() -> pd.DataFrame:
    """s2cloudless where nine pixels in ten of these bands are lost, by the regression corrected around them."""
    images = [date.astype(np.float32) / 10_000 for date in bm.sample_clouds().values] + tiles("L1C")
    images, model, rows = [image[:, ::3, ::3] for image in images], bm.guard("s2cloudless"), []
    own = [model(image).values > 0.4 for image in images]
    for lost in ("B01", "B10", "B02 B03 B04", "B11 B12", "B01 B09 B10", *FEW):
        broken = [bm.hide(image, lost, ratio=0.9) for image in images]
        for fill in ("zero", "land"):
            like = Agreement.of(own, [model(image, fill=fill).values > 0.4 for image in broken])
            rows.append({"lost": lost, "fill": fill, "score": like.score(), "same": like.same})
    return pd.DataFrame(rows)


def ukis() -> pd.DataFrame:
    """Two blocks of each of three images labelled by hand, which are in no pool."""
    images, labels = hand_labelled()
    cut = [(slice(a, a + 256), slice(a, a + 256)) for a in (0, 256)]
    blocks, truth = ([part[..., y, x] for part in parts for y, x in cut] for parts in (images, labels))
    losses = ["B11 B12", "B02 B03 B04", "B08 B11 B12", "B03 B08 B11 B12"]
    fills = ["zero", "mean", "nearest", "all", "land", "cloud", "mixture"]
    table = bm.guard("ukis-csmask-6b-l1c").robustness(blocks, losses, labels=truth, fills=fills, progress=True)
    sibling = bm.guard("ukis-csmask-4b-l1c").robustness([block[:4] for block in blocks], [], labels=truth)
    return pd.concat([table, sibling.assign(lost="B11 B12", fill="the sibling of 4 bands")])


def adapt() -> pd.DataFrame:
    """The U-Net aligned on two of the images, judged on the third."""
    images, rows = hand_labelled()[0], []
    for test, fill in ((0, ""), (1, ""), (1, "cloud")):
        train = [image for place, image in enumerate(images) if place != test]
        options = {"fill": fill, "steps": 60, "batch_size": 2, "side": 192}
        model = bm.guard("ukis-csmask-6b-l1c")
        better = model.adapt([train[0], images[test], train[1]], "B03 B08 B11 B12", **options)
        rows.append({"test": test, "asked": fill, **better.adaptation})
        print(rows[-1], flush=True)
    return pd.DataFrame(rows)


def snap() -> pd.DataFrame:
    """Every subset of eight bands; `own` is fitted on the two other places."""
    names = [name for name in bands.NAMES if name != "B10"]
    found = []
    for name in ("snap-lai", "snap-fapar"):
        channels = [names.index(band) for band in models.load(name)["bands"].split()]
        model = bm.guard(name, images=[tile[channels] for tile in tiles("L2A")])
        found.append(model.robustness(losses="all", fills=["zero", "mean", "nearest", "own"]).assign(model=name))
    return pd.concat(found)


def encoder(name: str) -> pd.DataFrame:
    """A linear probe on a frozen encoder, EuroSAT; `none` is the encoder's own way to say that a band is missing."""
    import torch
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    network = bm.load_encoder(name, weights=DATA / "models" / name).model

    def embed(images: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            parts = [network(torch.from_numpy(images[i : i + 25])) for i in range(0, len(images), 25)]
        return torch.cat(parts).numpy()

    pack = bm.open_dataset("eurosat")
    train = pack.rows("train")
    spectra = (pack.images[train] / np.float32(10_000)).astype(np.float32)
    probe = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=2000))
    probe.fit(embed(spectra), np.array(pack.classes)[pack.labels[train]])
    images, labels, classes = mini(100)
    batch, truth = np.stack(images), np.array(classes)[labels]
    model = bm.guard(lambda x: probe.predict(embed(x)), bands.NAMES, decide="none")
    own, rows = model(batch).values, []
    for lost in ("", "B08", "B11 B12", "B02 B03 B04", "B01 B09 B10", *FEW):
        for fill in ("none", "all", "mean", "zero", "nearest", "mixture") if lost else ("none",):
            found = model(batch, distrust=lost, fill=fill).values
            row = {"lost": lost, "left": 13 - len(lost.split()), "fill": fill if lost else "complete"}
            for what, true in (("", own), ("truth", truth)):
                like = Agreement.of(list(true[:, None]), list(found[:, None]))
                ends = ("score", "low", "high") if not what else ("truth", "truth_low", "truth_high")
                row |= dict(zip(ends, (like.score(), *like.interval()), strict=True))
            rows.append(row | {"metric": "accuracy"})
            print(rows[-1], flush=True)
    return pd.DataFrame(rows)


def pools() -> pd.DataFrame:
    """One ridge against mixtures, s2cloudless: every pool is made without the date or tile that is tested."""
    from sklearn.mixture import GaussianMixture

    draw, pack = np.random.default_rng(0), bm.open_dataset("eurosat")
    dates = [date.reshape(13, -1).T / 10_000 for date in bm.sample_clouds().values]
    places = [tile.reshape(13, -1).T for tile in tiles("L1C")]
    train = pack.spectra(pixels=150_000)
    water = (train[:, 2] - train[:, 11]) / (train[:, 2] + train[:, 11]) > 0.3
    tests = [("date", d, part[::4]) for d, part in enumerate(dates)] + [
        ("tile", t, p[::20]) for t, p in enumerate(places)
    ]
    tests.append(("land", 0, pack.spectra(split="val", pixels=4000)))
    booster, own, found = models.load("s2cloudless"), [], {}
    channels = bands.channel_indices(booster["bands"].split())
    losses = ["B01", "B10", "B02 B03 B04", "B11 B12", "B08 B11 B12", "B01 B09 B10", *FEW]

    def cloudy(spectra: np.ndarray) -> np.ndarray:
        return models.ask(booster["predict"], spectra[:, channels]) > booster["decide"]

    for what, which, spectra in tests:
        left = [d for place, d in enumerate(dates) if (what, which) != ("date", place)]
        clouds = [d for place, d in enumerate(dates[:2]) if (what, which) != ("date", place)]
        other = [t[::45] for place, t in enumerate(places) if (what, which) != ("tile", place)]
        varied = np.vstack([train[:60_000], train[water][:10_000], *clouds, *(d[::3] for d in left), *other])
        of = bm.Moments.of_spectra
        known = {"all": of(np.vstack([train, *(d[:10_000] for d in left)])), "varied": of(varied)}
        known |= {"land": of(train[~water]), "water": of(train[water])}
        known["cloud"] = of(np.vstack([*clouds, train[train[:, 1] > 0.2][:4000]]))
        kinds = {kind: known[kind] for kind in moments.KINDS}
        known["mixture"] = moments.Mixture(kinds, tuple(moments.KINDS.values()))
        for count in (6, 12):
            some = varied[draw.permutation(len(varied))[:30_000]]
            fitted = GaussianMixture(count, reg_covar=1e-6, max_iter=60, random_state=0).fit(some)
            parts = zip(fitted.means_, fitted.covariances_, strict=True)
            clusters = {str(k): bm.Moments(mean, spread, 30_000 // count) for k, (mean, spread) in enumerate(parts)}
            known[f"{count} clusters"] = moments.Mixture(clusters, tuple(fitted.weights_))
        own.append(cloudy(spectra))
        for lost in losses:
            hidden = bands.channel_indices(lost.split())
            visible = [channel for channel in range(13) if channel not in hidden]
            for name, pool in known.items():
                filled = spectra.copy()
                filled[:, hidden] = pool.tell(spectra[:, visible].T, visible, hidden).T
                found.setdefault((lost, name), []).append(cloudy(filled))
        print(what, which, flush=True)
    scored = {key: Agreement.of(own, answers) for key, answers in found.items()}
    return pd.DataFrame(
        [(*key, a.score(), *a.interval()) for key, a in scored.items()],
        columns=["lost", "fill", "score", "low", "high"],
    )


def cirrus() -> pd.DataFrame:
    """s2cloudless without B10 on the twelve EuroSAT images in which B10 is brightest; most are in the pools."""
    pack = bm.open_dataset("eurosat")
    rows = np.argsort([-float(image[10].mean()) for image in pack.images])[:12]
    images = [pack.images[row].astype(np.float32)[:, ::2, ::2] / 10_000 for row in rows]
    return bm.guard("s2cloudless").robustness(images, ["B10"])


def tile() -> pd.DataFrame:
    """Filling 10,980² × 13 generated DN, read 512 pixels at a time as from a file."""
    part = np.random.default_rng(0).integers(100, 4000, (13, 512, 512)).astype(np.uint16)

    class Generated:
        ndim, shape, dtype = 3, (13, 10_980, 10_980), part.dtype

        def __getitem__(self, window: tuple) -> np.ndarray:
            rows, columns = window[-2:]
            return part[:, : rows.stop - rows.start, : columns.stop - columns.start]

    model, began = bm.guard(lambda x: x[:, 0], bands.NAMES, unit="DN", tile=512), time.process_time()
    model(Generated(), distrust="B11 B12", progress=True)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return pd.DataFrame([{"cpu_s": time.process_time() - began, "peak_mb": peak, "torch": "torch" in sys.modules}])


if __name__ == "__main__":
    case = sys.argv[1]
    cases = (s2cloudless, holes, ukis, adapt, snap, pools, cirrus, tile)
    run = {function.__name__: function for function in cases}
    table = run[case]() if case in run else encoder(case)
    if "model" not in table and case in ("s2cloudless", "ukis", "galileo-nano", "presto"):
        table = table.assign(model="ukis-csmask-6b-l1c" if case == "ukis" else case)
    folder = files.outputs_root() / "service"
    folder.mkdir(parents=True, exist_ok=True)
    table.to_csv(folder / f"{case}.csv", index=False)
    print(table.round(3).to_string())
