"""What runs need from outside, data and published weights: where it is on this machine, else how to get it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from bandmask import datasets, encoders, files
from bandmask.packs import SPLITS
from bandmask.readers import dfc2020, eurosat, sen12ms

# Images in train, val and test of data sets that are not packed here.
OFFICIAL = {
    "sample": (360, 72, 144),
    "sample-256": (10, 2, 4),
    "eurosat": (16_200, 5_400, 5_400),
    "eurosat-spatial": (16_200, 5_400, 5_400),
    "sen12ms": (28_618, 6_132, 6_133),  # spring: 40,883 patches, 70 : 15 : 15; whole scenes come near that
    "dfc2020": (3_156, 986, 986),
}


@dataclass(frozen=True)
class Images:
    """How many images each split of a data set has, and who says so."""

    train: int
    val: int
    test: int
    source: str = ""


@dataclass(frozen=True)
class Input:
    """Something that runs need from outside: where it is here, else how to get it."""

    name: str
    found: str = ""
    way_out: str = ""
    optional: bool = False

    @property
    def missing(self) -> bool:
        """It is not here, and no run can do without it."""
        return not self.found and not self.optional


def image_counts(dataset: str) -> Images:
    """Images of each split: of the pack, if it is made, else of the official data set.

    Raises:
        ValueError: a data set of unknown size that is not packed.
    """
    index = files.outputs_root() / "packs" / dataset / "index.parquet"
    if index.exists():
        counts = pd.read_parquet(index, columns=["split"])["split"].value_counts()
        train, val, test = (int(counts.get(split, 0)) for split in SPLITS)
        return Images(train, val, test, "packed here")
    if dataset not in OFFICIAL:
        raise ValueError(f"{dataset!r} is not packed, and its size is only known for {', '.join(OFFICIAL)}")
    return Images(*OFFICIAL[dataset], source="official count")


def datasets_of(parameters: Mapping[str, Any]) -> tuple[str, ...]:
    """Names of an experiment's data sets: `dataset` and, where it segments, `segmentation_dataset`."""
    segments = "segmentation" in parameters["tasks"]
    return (parameters["dataset"], parameters["segmentation_dataset"]) if segments else (parameters["dataset"],)


def inputs(parameters: Mapping[str, Any]) -> tuple[Input, ...]:
    """What the runs of an experiment need from outside, looked for on this machine."""
    needed = [dataset_input(name) for name in datasets_of(parameters)]
    if parameters["encoder"] not in ("stand-in", "small"):  # a small one is made by notebook 00
        needed.append(encoder_input(parameters["encoder"], parameters["weights"]))
    if "segmentation" in parameters["tasks"]:
        needed.append(decoder_input(parameters["decoder_weights"]))
    return tuple(dict.fromkeys(needed))


def dataset_input(name: str) -> Input:
    """A data set by its name in `datasets.open_dataset`.

    Raises:
        ValueError: unknown data set; lists those that are known here.
    """
    if name.startswith("sample"):
        return Input(name, found=str(datasets.SAMPLE_FOLDER))
    known = {
        "eurosat": (eurosat.find_eurosat, "eurosat; eurosat.download_eurosat('data/eurosat')", "2 GB"),
        "eurosat-spatial": (
            eurosat.find_eurosat,
            "eurosat; eurosat.download_eurosat('data/eurosat', spatial=True)",
            "2 GB",
        ),
        "sen12ms": (sen12ms.find_sen12ms, "sen12ms; sen12ms.download_sen12ms('data/sen12ms')", "135 GB on the way"),
        "dfc2020": (dfc2020.find_dfc2020, "dfc2020; dfc2020.download_dfc2020('data/dfc2020')", "5,128 patches"),
    }
    if name not in known:
        raise ValueError(f"unknown data set {name!r}; available: sample, {', '.join(known)}")
    find, fetch, size = known[name]
    found = find()
    if found is None and name == "sen12ms":  # its pack opens without its source
        pack = files.outputs_root() / "packs" / name
        found = pack if (pack / "pack.json").exists() else None
    fetched = f'python -c "from bandmask.readers import {fetch}" ({size}), then BANDMASK_DATA=data'
    return Input(name, str(found or ""), f"set BANDMASK_DATA to the folder that holds it; or {fetched}")


def encoder_input(encoder: str, weights: str) -> Input:
    """A published encoder's checkpoint: the given file, or the one that an earlier download left."""
    name = encoder.split("-")[0]
    if weights:
        there = Path(weights).exists()
        return Input(name, weights if there else "", f"put the file there that `weights` names: {weights}")
    published = encoders.PUBLISHED[encoder]
    if not published.legendre:
        import torch

        file = Path(torch.hub.get_dir()) / "checkpoints" / published.file
        way_out = f"downloaded by the first run, TorchGeo's {published.entry}; or give `weights`"
        return Input(name, str(file) if file.exists() else "", way_out)
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(published.repository, published.file)
    way_out = f"downloaded by the first run, {published.file} from huggingface.co/{published.repository}; or `weights`"
    return Input(name, cached if isinstance(cached, str) else "", way_out)


def decoder_input(weights: str) -> Input:
    """The published decoder that the thesis starts from; without it decoders start from scratch."""
    way_out = "optional: `DeepLabv3+ S2` of github.com/lukasliebel/dfc2020_baseline, given as `decoder_weights`"
    if not weights:
        return Input("dfc2020 decoder", way_out=way_out, optional=True)
    there = Path(weights).exists()
    return Input(
        "dfc2020 decoder", weights if there else "", f"put the file there that `decoder_weights` names: {weights}"
    )
