"""A data set in five parts, each once the test images: what a few hundred images can decide about a method.

    BANDMASK_DATA=… python benchmarks/folds.py eurosat 0     # pack and stand-in encoder of part 0

Part k is tested, the next one validated on, the other three trained on, so an image is tested by an encoder, heads and
fine-tunings that never saw it, and five parts test every image once. EuroSAT's images are spread class by class; the
sample's blocks stay whole, because patches of one block overlap.
Source: Stone 1974, doi:10.1111/j.2517-6161.1974.tb00994.x (cross-validation).
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

import numpy as np
from sklearn.model_selection import GroupKFold, StratifiedKFold

from bandmask import datasets, encoders, files, params, pretraining
from bandmask.packs import Pack, open_if_same
from bandmask.readers.packing import write_pack
from bandmask.training import Compute

FOLDS = 5
DATASETS = ("eurosat", "sample")
IMAGE_SIZE = 64
EPOCHS = 60


def float32(device: str = "auto") -> Compute:
    """Float32 on every device, so that a figure is the same on each, up to rounding."""
    return dataclasses.replace(Compute.of(device, compile=False), amp=False, channels_last=True)


def checkpoint(path: Path, compute: Compute) -> Path | None:
    """None on a GPU, where a training takes seconds and writing its weights each epoch as long."""
    return None if compute.device.type == "cuda" else path


def experiment_of(dataset: str, fold: int) -> str:
    """Folder of a fold below outputs/."""
    return f"{dataset}-fold{fold}"


def splits_of(pack: Pack, fold: int) -> np.ndarray:
    """`train`, `val` or `test` of each image of a pack, (N,).

    Raises:
        ValueError: no such fold.
    """
    if fold not in range(FOLDS):
        raise ValueError(f"fold {fold} does not exist; available: 0 to {FOLDS - 1}")
    grouped = "group" in pack.index
    kind = (
        GroupKFold(FOLDS, shuffle=True, random_state=0)
        if grouped
        else StratifiedKFold(FOLDS, shuffle=True, random_state=0)
    )
    parts = [test for _, test in kind.split(pack.labels, pack.labels, pack.index["group"] if grouped else None)]
    splits = np.full(len(pack.labels), "train", object)
    splits[parts[fold]], splits[parts[(fold + 1) % FOLDS]] = "test", "val"
    return splits


def open_fold(dataset: str, fold: int) -> Pack:
    """The data set with the splits of a fold; images keep their rows, so a row is the same image in every fold.

    Raises:
        ValueError: no such data set or fold.
    """
    whole = datasets.open_dataset(dataset)
    splits = splits_of(whole, fold)
    path = files.outputs_root() / "packs" / experiment_of(dataset, fold)
    options = {"whole": whole.fingerprint, "splits": files.checksum_of(splits.tolist())}
    if (opened := open_if_same(path, whole.checksum, options)) is not None:
        return opened
    rows = range(len(splits))
    items = ((whole.images[r], whole.targets[r]) if whole.targets is not None else whole.images[r] for r in rows)
    return write_pack(
        path,
        items,
        whole.index.assign(split=splits),
        name=dataset,
        classes=whole.classes,
        source=whole.card["source"],
        source_checksum=whole.checksum,
        strict_guard=False,  # the whole pack has been looked at
        targets=whole.targets is not None,
        options=options,
    )


def stand_in(dataset: str, fold: int, pack: Pack, compute: Compute) -> Path:
    """Folder of the fold's stand-in encoder, trained on its complete training images unless it is there."""
    folder = params.experiment_folder(experiment_of(dataset, fold))
    if (folder / "encoder").exists():
        return folder / "encoder"
    model = encoders.create_encoder("resnet18", seed=fold)
    pretraining.pretrain_stand_in(
        model,
        pack,
        epochs=EPOCHS,
        image_size=IMAGE_SIZE,
        crop_size=IMAGE_SIZE,
        seed=fold,
        compute=compute,
        checkpoint=checkpoint(folder / "checkpoints" / "stand_in.pt", compute),
    )
    card = encoders.Card(
        f"stand-in resnet18 ({dataset}, fold {fold})",
        "resnet18",
        image_size=IMAGE_SIZE,
        seed=fold,
        data={"name": dataset, "checksum": pack.checksum, "split": "train"},
        notes="stand-in, contrastively pre-trained on the complete training images of one fold; no foundation model",
    )
    return encoders.save_encoder(model, card, folder / "encoder")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", choices=DATASETS)
    parser.add_argument("folds", type=int, nargs="+")
    options = parser.parse_args()
    for fold in options.folds:
        print(stand_in(options.dataset, fold, open_fold(options.dataset, fold), float32()), flush=True)


if __name__ == "__main__":
    main()
