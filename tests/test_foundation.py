"""Foundation encoders: equal to upstream's own calls, missing as in their training, and nothing unknown runs."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bandmask import bands, files, foundation
from bandmask.align import Objective, fine_tune
from bandmask.encoders import embed, load_encoder, save_encoder
from bandmask.masks import MaskSpec
from bandmask.packs import Pack

FOLDER = (files.data_root() or Path("nowhere")) / "models"
GAPS = torch.full((13,), torch.nan)


def load(name: str) -> foundation.FoundationEncoder:
    """With its weights, or OlmoEarth's random ones; a skip that says why where code or weights aren't here."""
    try:
        return foundation.load(name, foundation.RANDOM if name == "olmoearth-nano" else None)
    except (ModuleNotFoundError, FileNotFoundError) as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module", params=list(foundation.ADAPTERS))
def model(request: pytest.FixtureRequest) -> foundation.FoundationEncoder:
    return load(request.param)


@pytest.fixture
def images() -> Tensor:
    return torch.rand(3, 13, 16, 16, generator=torch.Generator().manual_seed(0)) * 0.4


def without(images: Tensor, *lost: str) -> Tensor:
    gone = images.clone()
    gone[:, bands.channel_indices(lost)] = torch.nan
    return gone


def galileo_itself(model: Any, images: Tensor, lost: set[str]) -> Tensor:
    """Upstream's own input, tokens and mean, built pixel by pixel from what its paper and README say."""
    code = type(model.upstream).load_from_folder.__func__.__globals__
    names = [name if len(name) == 3 else f"B0{name[1]}" for name in code["S2_BANDS"]]
    known = __import__("json").loads((FOLDER / "galileo-nano/normalization.json").read_text())["13"]
    dn = {name: images[:, bands.NAMES.index(name)] * 10_000 for name in names}
    ndvi = (dn["B08"] - dn["B04"]) / (dn["B08"] + dn["B04"])
    x = torch.stack([torch.zeros_like(ndvi)] * 2 + [*dn.values(), ndvi], -1)[:, :, :, None]
    mean, sd = torch.tensor(known["mean"]), torch.tensor(known["std"])
    x[..., :-1] = ((x - (mean - 2 * sd)) / (4 * sd))[..., :-1]  # its `Normalizer` leaves NDVI as it is
    count, side = images.shape[0], images.shape[-1]
    mask = torch.zeros(count, side, side, 1, 7)
    mask[..., 0] = 1
    for number, group in enumerate(foundation.ADAPTERS["galileo-nano"].groups.values(), start=1):
        mask[..., number] = float(bool(lost & set(group)))
    rest = torch.zeros(count, side, side, 16), torch.zeros(count, 1, 6), torch.zeros(count, 18)
    gone = torch.ones(count, side, side, 3), torch.ones(count, 1, 3), torch.ones(count, 4)
    *found, _ = model.upstream(x, *rest, mask, *gone, torch.full((count, 1), foundation.MONTH), patch_size=8)
    return model.upstream.average_tokens(*found)


@torch.no_grad()
def test_galileo_is_upstream_s_own(images: Tensor) -> None:
    model = load("galileo-nano")
    for lost in ((), ("B08",), ("B03", "B8A", "B12")):
        expected = galileo_itself(model, images, set(lost))
        torch.testing.assert_close(model(without(images, *lost)), expected, atol=2e-5, rtol=1e-4)


@torch.no_grad()
def test_presto_sees_means_of_patches_and_drops_what_is_lost(images: Tensor) -> None:
    model = load("presto")
    flat = torch.nn.functional.avg_pool2d(images, 8).repeat_interleave(8, 2).repeat_interleave(8, 3)
    torch.testing.assert_close(model(flat), model(images), atol=1e-5, rtol=1e-4)
    one = flat[:1, :, :8, :8] * 1.0  # one patch is one pixel of upstream's: a mean of itself, and no spread
    order = [bands.NAMES.index(name) for name in model.bands]
    values = one[0, order, 0, 0]
    ndvi = (values[6] - values[2]) / (values[6] + values[2])
    x = torch.cat([torch.zeros(2), values, torch.zeros(4), ndvi[None]])[None, None]
    mask = torch.tensor([1.0] * 2 + [0.0] * 10 + [1.0] * 4 + [0.0])[None, None]
    dynamic_world, nowhere = torch.full((1, 1), 9), torch.zeros(1, 2)
    expected = model.upstream(x, dynamic_world, nowhere, mask, month=foundation.MONTH)
    torch.testing.assert_close(model(one)[:, :128], expected, atol=1e-5, rtol=1e-4)
    assert float(model(one)[:, 128:].max()) < 1e-5


@torch.no_grad()
def test_a_lost_band_is_not_seen_and_one_that_is_not_taken_changes_nothing(model: Any, images: Tensor) -> None:
    absurd = images.clone()
    absurd[:, bands.NAMES.index("B10")] = 7.0
    torch.testing.assert_close(model(absurd), model(images))
    torch.testing.assert_close(model(without(images, "B10")), model(images))
    few = without(images, *(name for name in bands.NAMES if name not in ("B02", "B04")))
    assert not torch.allclose(model(few), model(images), atol=1e-3)
    assert model(few).isfinite().all()
    with pytest.raises(ValueError, match="no value in any band"):
        model(torch.full_like(images, torch.nan))
    with pytest.raises(ValueError, match="multiple of 8"):
        model(images[..., :12, :12])
    with pytest.raises(ValueError, match="13, S, S"):
        model(images[:, :10])


@torch.no_grad()
def test_a_patch_mostly_hidden_is_lost_and_a_lesser_gap_takes_the_mean_of_the_rest(model: Any, images: Tensor) -> None:
    most, some = images.clone(), images.clone()
    most[:, 7, :8, :5] = torch.nan  # B08, 40 of 64 pixels of the first patch
    whole = images.clone()
    whole[:, 7, :8, :8] = torch.nan
    torch.testing.assert_close(model(most), model(whole), atol=1e-5, rtol=1e-4)
    some[:, 7, :8, :2] = torch.nan
    filled = images.clone()
    filled[:, 7, :8, :2] = images[:, 7, :8, 2:8].mean((1, 2))[:, None, None]
    torch.testing.assert_close(model(some), model(filled), atol=1e-5, rtol=1e-4)


def test_it_is_saved_tuned_and_tapped_as_any_encoder(model: Any, make_pack: Any, tmp_path: Path) -> None:
    pack: Pack = make_pack(tmp_path, n=12, size=16)
    _, card = load_encoder(model.name, weights=foundation.RANDOM)
    options = {"objective": Objective(0.1, 1.0, 1.0), "image_size": 16, "batch_size": 4, "epochs": 1}
    student, history = fine_tune(model, pack, MaskSpec(("B02", "B08"), 1.0, shape="band"), GAPS, **options)
    assert history["train_loss"].iloc[-1] > 0
    own, tables = dict(student.named_parameters()), dict(student.named_buffers())
    moved = [key for key, value in model.named_parameters() if not torch.equal(value, own[key])]
    assert moved
    assert not any("pos_embed" in key or "month_embed" in key for key in own)
    assert all(torch.equal(value, tables[key]) for key, value in model.named_buffers())
    save_encoder(student, replace(card, embedding_dim=card.embedding_dim), tmp_path / "own")
    again, _ = load_encoder(tmp_path / "own")
    save_encoder(student, card, tmp_path / "half", half=True)  # of weights: an offset of 2753 DN would be 2752
    scaled, halved = (dict(it.named_buffers()) for it in (student, load_encoder(tmp_path / "half")[0]))
    assert all(torch.equal(value, halved[key]) for key, value in scaled.items())
    images = torch.rand(2, 13, 16, 16) * 0.3
    with torch.no_grad():
        embedding, maps = embed(student, images, ("patches",))
        assert torch.equal(embedding, again(images))
    assert maps["patches"].shape == (2, 128, 2, 2)
    assert embedding.shape == (2, card.embedding_dim)


@pytest.mark.parametrize("name", ["galileo-nano", "presto"])
def test_only_known_weights_and_known_code_are_used(name: str, tmp_path: Path) -> None:
    load(name)
    shutil.copytree(FOLDER / name, tmp_path / name)
    weights = Path(next(iter(foundation.ADAPTERS[name].files))).name
    assert foundation.load(name, tmp_path / name / weights).name == name  # the file serves as well as the folder
    content = bytearray((tmp_path / name / weights).read_bytes())
    content[-1] ^= 1
    (tmp_path / name / weights).write_bytes(content)
    with pytest.raises(ValueError, match=f"not the known {weights}"):
        foundation.load(name, tmp_path / name)
    if name == "galileo-nano":
        (tmp_path / name / "single_file_galileo.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
        with pytest.raises(ValueError, match=r"not the known single_file_galileo\.py"):
            foundation.load(name, tmp_path / name)
        assert not (tmp_path / "ran").exists()


def test_olmoearth_takes_its_own_of_the_published_state(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Its file holds a target encoder and two more sensors: of the encoder 86 tensors, 1,090,224 values."""
    model = load("olmoearth-nano")
    own = {key: torch.rand_like(value) for key, value in model.upstream.state_dict().items()}
    place = "patch_embeddings.per_modality_embeddings.{0}.{0}__0.{1}"
    others = {}
    for sensor, count in (("landsat", 11), ("sentinel1", 2)):
        shapes = {"pixel_proj.0.weight": (12, count), "pixel_proj.0.bias": (12,)}
        shapes |= {"proj.weight": (128, 768), "proj.bias": (128,)}
        others |= {place.format(sensor, part): torch.rand(shape) for part, shape in shapes.items()}
        others[f"composite_encodings.per_modality_channel_embeddings.{sensor}"] = torch.rand(1, 32)
    whole = {key: value for key, value in {**own, **others}.items() if not key.startswith("project_and")}
    assert (len(whole), sum(value.numel() for value in whole.values())) == (86, 1_090_224)
    state = {
        f"{part}.{key}": value for part in ("encoder", "target_encoder") for key, value in {**own, **others}.items()
    }
    torch.save(state, tmp_path / "weights.pth")
    adapter = foundation.ADAPTERS["olmoearth-nano"]
    with pytest.raises(ValueError, match=r"not the known weights\.pth"):
        foundation.load("olmoearth-nano", tmp_path)
    files_ = {"weights.pth": files.sha256(tmp_path / "weights.pth")}
    monkeypatch.setitem(foundation.ADAPTERS, "olmoearth-nano", replace(adapter, files=files_))
    loaded = foundation.load("olmoearth-nano", tmp_path)
    assert all(torch.equal(value, own[key]) for key, value in loaded.upstream.state_dict().items())


def test_without_files_and_network_it_says_what_to_fetch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("BANDMASK_DATA", str(tmp_path))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    with pytest.raises(FileNotFoundError, match=r"Download https://.*encoder\.pt .* pass its folder as weights"):
        foundation.load("galileo-nano")
    with pytest.raises(FileNotFoundError, match="folder of presto"):
        foundation.load("presto", tmp_path / "absent")
