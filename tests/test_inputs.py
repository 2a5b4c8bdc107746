"""What runs need from outside is found where it is, and named with the way out where it is not."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from bandmask import datasets, encoders, packs
from bandmask.runs import inputs
from bandmask.runs.inputs import Images

NEEDS = {
    "dataset": "eurosat",
    "segmentation_dataset": "sen12ms",
    "tasks": ["classification", "segmentation"],
    "encoder": "satclip-resnet50-l40",
    "weights": "",
    "decoder_weights": "",
}


@pytest.fixture(autouse=True)
def bare_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No data, no outputs, no downloaded weights."""
    import huggingface_hub.constants

    monkeypatch.setenv("BANDMASK_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("BANDMASK_OUTPUTS", str(tmp_path / "outputs"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path


def made(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"made for a test")
    return path


def test_a_bare_machine_lacks_data_and_encoder_but_not_the_optional_decoder():
    found = {item.name: item for item in inputs.inputs(NEEDS)}
    assert {name: item.missing for name, item in found.items()} == {
        "eurosat": True,
        "sen12ms": True,
        "satclip": True,
        "dfc2020 decoder": False,
    }
    assert "BANDMASK_DATA" in found["eurosat"].way_out
    assert "eurosat.download_eurosat(" in found["eurosat"].way_out
    assert "sen12ms.download_sen12ms(" in found["sen12ms"].way_out
    assert encoders.PUBLISHED[encoders.SATCLIP].repository in found["satclip"].way_out
    assert "`weights`" in found["satclip"].way_out
    assert "`decoder_weights`" in found["dfc2020 decoder"].way_out


def test_the_ways_out_name_functions_that_exist():
    """A command that one copies must run."""
    for name in ("eurosat", "eurosat-spatial", "sen12ms", "dfc2020"):
        module, function = re.search(r"import (\w+); \1\.(\w+)\('data/", inputs.dataset_input(name).way_out).groups()
        assert callable(getattr(importlib.import_module(f"bandmask.readers.{module}"), function))


def test_data_are_found_below_bandmask_data(bare_machine: Path):
    archive = made(bare_machine / "data" / "eurosat" / "EuroSATallBands.zip")
    assert inputs.dataset_input("eurosat").found == str(archive)
    (bare_machine / "data" / "sen12ms" / "ROIs1158_spring").mkdir(parents=True)
    assert inputs.dataset_input("sen12ms").found == str(bare_machine / "data" / "sen12ms")


def test_a_packed_sen12ms_needs_no_source(bare_machine: Path):
    """EuroSAT's pack is checked against its source each time, so it does."""
    for name in ("eurosat", "sen12ms"):
        made(bare_machine / "outputs" / "packs" / name / "pack.json")
    assert not inputs.dataset_input("sen12ms").missing
    assert inputs.dataset_input("eurosat").missing


def test_the_sample_is_always_there():
    assert not inputs.dataset_input("sample").missing


def test_an_unknown_data_set_lists_those_known():
    with pytest.raises(ValueError, match=r"unknown data set 'landsat'; available: sample, eurosat"):
        inputs.dataset_input("landsat")


def test_satclip_is_found_in_the_hub_s_cache(bare_machine: Path):
    """The cache's layout is the hub's: refs/main names the snapshot."""
    folder = bare_machine / "hub" / "models--microsoft--SatCLIP-ResNet50-L40"
    made(folder / "refs" / "main").write_text("abc")
    checkpoint = made(folder / "snapshots" / "abc" / "satclip-resnet50-l40.ckpt")
    assert inputs.encoder_input("satclip-resnet50-l40", "").found == str(checkpoint)


def test_moco_is_found_where_torch_keeps_downloads(bare_machine: Path):
    assert inputs.encoder_input("moco-resnet50", "").missing
    name = "resnet50_sentinel2_all_moco-df8b932e.pth"
    checkpoint = made(bare_machine / "torch" / "hub" / "checkpoints" / name)
    assert inputs.encoder_input("moco-resnet50", "").found == str(checkpoint)


@pytest.mark.parametrize("of", [lambda path: inputs.encoder_input("moco-resnet50", path), inputs.decoder_input])
def test_a_given_file_counts_and_a_wrong_path_is_named(bare_machine: Path, of):
    path = bare_machine / "weights.pt"
    assert of(str(path)).missing
    assert str(path) in of(str(path)).way_out
    made(path)
    assert of(str(path)).found == str(path)


def test_an_experiment_without_segmentation_or_published_encoder_needs_its_data_set_only():
    parameters = {**NEEDS, "tasks": ["classification"], "encoder": "stand-in"}
    assert [item.name for item in inputs.inputs(parameters)] == ["eurosat"]


def test_one_data_set_for_both_tasks_is_one_input():
    parameters = {**NEEDS, "dataset": "sample", "segmentation_dataset": "sample", "encoder": "stand-in"}
    assert [item.name for item in inputs.inputs(parameters)] == ["sample", "dfc2020 decoder"]


def test_official_counts_are_those_published():
    """EuroSAT: Helber et al. 2019. SEN12MS spring: thesis §2.2.2. DFC2020: Wang et al. 2025."""
    assert sum(inputs.OFFICIAL["eurosat"]) == 27_000
    assert sum(inputs.OFFICIAL["sen12ms"]) == 40_883
    assert sum(inputs.OFFICIAL["dfc2020"]) == 5_128
    assert np.allclose(np.array(inputs.OFFICIAL["sen12ms"]) / 40_883, [0.7, 0.15, 0.15], atol=1e-4)


def test_the_sample_s_counts_are_those_of_its_patches():
    split = datasets.sample_patches(np.zeros((1024, 1024), np.uint8))["split"].value_counts()
    assert inputs.OFFICIAL["sample"] == tuple(split[name] for name in packs.SPLITS)
    split = datasets.sample_tiles()["split"].value_counts()
    assert inputs.OFFICIAL["sample-256"] == tuple(split[name] for name in packs.SPLITS)


def test_a_pack_s_own_counts_come_before_official_ones(bare_machine: Path):
    assert inputs.image_counts("eurosat") == Images(16_200, 5_400, 5_400, "official count")
    index = made(bare_machine / "outputs" / "packs" / "eurosat" / "index.parquet")
    pd.DataFrame({"split": ["train"] * 5 + ["test"] * 2}).to_parquet(index)
    assert inputs.image_counts("eurosat") == Images(5, 0, 2, "packed here")


def test_a_data_set_of_unknown_size_says_so():
    with pytest.raises(ValueError, match="'landsat' is not packed"):
        inputs.image_counts("landsat")


def test_every_data_set_has_its_count_and_its_way_in():
    for name in datasets.PACKERS:
        assert inputs.image_counts(name).train
        assert inputs.dataset_input(name).name == name
