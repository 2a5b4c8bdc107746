"""Heads and decoders compute what the papers say, seeds side by side don't disturb each other, files load safely.

The DFC2020 checkpoint can't be downloaded here: its files are synthetic, with exactly the keys and shapes that the
published one has (facts.md §4; the ResNet101 of He et al. 2016, Table 1), and generated values.
"""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import Evil, same_weights, save, scattered
from torch import Tensor, nn

from bandmask.heads import (
    DeepLabV3PlusDecoder,
    SceneHeads,
    SegmentationDecoders,
    create_decoder,
    load_checked,
    load_decoder,
    scene_head,
)

SEEDS = (0, 1, 7)
State = dict[str, Tensor]


def embeddings(count: int = 20, dim: int = 24, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed))


def test_seed_alone_decides_the_initial_weights_and_torchs_generator_is_left_alone():
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    heads, first, decoder = SceneHeads(24, 5, SEEDS), scene_head(24, 5, seed=1), tiny_decoder(3)
    assert torch.equal(torch.rand(3), expected)
    for k, seed in enumerate(SEEDS):
        alone = scene_head(24, 5, seed=seed)
        assert torch.equal(heads.weight1[k].T, alone[0].weight)
        assert torch.equal(heads.bias2[k, 0], alone[2].bias)
    assert same_weights(first, scene_head(24, 5, seed=1))
    assert same_weights(decoder, tiny_decoder(3))
    for one, other in ((first, scene_head(24, 5, seed=4)), (decoder, tiny_decoder(4))):
        assert not any(
            torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True) if a.ndim > 1
        )


def test_logits_equal_each_heads_own():
    heads, shared = SceneHeads(24, 5, SEEDS), embeddings()
    own = torch.stack([embeddings(seed=s) for s in SEEDS])
    alone = [scene_head(24, 5, seed=s) for s in SEEDS]
    torch.testing.assert_close(heads(shared), torch.stack([head(shared) for head in alone]), rtol=1e-6, atol=1e-6)
    expected = torch.stack([head(batch) for head, batch in zip(alone, own, strict=True)])
    torch.testing.assert_close(heads(own), expected, rtol=1e-6, atol=1e-6)
    assert heads(shared).shape == (3, 20, 5)


NORM = ("running_mean", "running_var", "weight", "bias")


def norm_keys(name: str, channels: int) -> dict[str, tuple[int, ...]]:
    return {**{f"{name}.{key}": (channels,) for key in NORM}, f"{name}.num_batches_tracked": ()}


def layer_keys(conv: str, shape: tuple[int, ...], norm: str) -> dict[str, tuple[int, ...]]:
    return {f"{conv}.weight": shape, **norm_keys(norm, shape[0])}


DECODER_KEYS = {
    **layer_keys("aspp.aspp1.atrous_conv", (256, 2048, 1, 1), "aspp.aspp1.bn"),
    **{
        key: shape
        for n in (2, 3, 4)
        for key, shape in layer_keys(f"aspp.aspp{n}.atrous_conv", (256, 2048, 3, 3), f"aspp.aspp{n}.bn").items()
    },
    **layer_keys("aspp.global_avg_pool.1", (256, 2048, 1, 1), "aspp.global_avg_pool.2"),
    **layer_keys("aspp.conv1", (256, 1280, 1, 1), "aspp.bn1"),
    **layer_keys("decoder.conv1", (48, 256, 1, 1), "decoder.bn1"),
    **layer_keys("decoder.last_conv.0", (256, 304, 3, 3), "decoder.last_conv.1"),
    **layer_keys("decoder.last_conv.4", (256, 256, 3, 3), "decoder.last_conv.5"),
    "decoder.last_conv.8.weight": (9, 256, 1, 1),
    "decoder.last_conv.8.bias": (9,),
}


PUBLISHED_KEYS = {"backbone.conv1.weight": (64, 10, 7, 7), **DECODER_KEYS}  # and 623 more of its ResNet101


def hollow(keys: dict[str, tuple[int, ...]], outputs: int = 9) -> State:
    """Each tensor is one stored number, its place in the list: kilobytes instead of 240 MB, and no two are alike."""
    state = {}
    for number, (name, shape) in enumerate(keys.items(), 1):
        if name.startswith("decoder.last_conv.8."):
            shape = (outputs, *shape[1:])
        dtype = torch.int64 if name.endswith("tracked") else torch.float32
        state[name] = torch.tensor(number, dtype=dtype).expand(shape)
    return state


def checkpoint(state: State, **more: Any) -> dict[str, Any]:
    return {"model_state_dict": state, "step": 5000, "optimizer_state_dict": {"state": {}, "param_groups": []}, **more}


def test_a_decoder_has_the_published_keys_and_shapes():
    with torch.device("meta"):
        model = DeepLabV3PlusDecoder(classes=9)
    assert {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()} == DECODER_KEYS
    assert len(DECODER_KEYS) == 56


LAST = ("decoder.last_conv.8.weight", "decoder.last_conv.8.bias")


@pytest.mark.parametrize("outputs", [9, 10, 21])
def test_a_last_layer_of_other_classes_is_replaced_and_it_is_said(outputs, tmp_path):
    state = hollow(PUBLISHED_KEYS, outputs)
    old = outputs == 21  # the published file is of torch 1.4: a bare pickle instead of a zip
    path = save(checkpoint(state), tmp_path / "a.pth", _use_new_zipfile_serialization=not old)
    decoder, message = load_decoder(path, classes=10, seed=3)
    assert ("kept" if outputs == 10 else f"gave {outputs} classes, this task has 10: replaced") in message
    replaced = () if outputs == 10 else LAST
    assert all(
        torch.equal(tensor, state[name]) for name, tensor in decoder.state_dict().items() if name not in replaced
    )
    assert decoder.decoder.last_conv[8].weight.shape == (10, 256, 1, 1)
    assert all(p.requires_grad and p.device.type == "cpu" for p in decoder.parameters())


def test_every_single_key_of_a_decoder_counts():
    """Each key in turn, missing, misshapen, not finite, and joined by a stranger, is the one the error names."""
    model, state = tiny_decoder(), tiny_decoder(1).state_dict()
    for key, tensor in state.items():
        named = re.escape(key)
        if not key.endswith("num_batches_tracked"):  # which torch puts in itself; nothing here depends on it
            with pytest.raises(ValueError, match=rf'^file doesn.t fit .*Missing key.*"{named}"\.$'):
                load_checked(model, {name: value for name, value in state.items() if name != key}, "file")
        with pytest.raises(ValueError, match=rf'Unexpected key.*"{named}\.more"'):
            load_checked(model, {**state, f"{key}.more": tensor}, "file")
        with pytest.raises(ValueError, match=rf"size mismatch for {named}: "):
            load_checked(model, {**state, key: tensor[None, None, None]}, "file")
        if tensor.is_floating_point():
            with pytest.raises(ValueError, match=rf"^file holds NaN or infinite weights in {named};"):
                load_checked(model, {**state, key: tensor * torch.nan}, "file")


def test_other_files_are_refused_by_name_and_code_in_them_does_not_run(tmp_path):
    evil = checkpoint({}, args=Evil(tmp_path / "marker"))
    for content, said in (
        (checkpoint({**hollow(PUBLISHED_KEYS), "decoder.bn1.weight": 3}), "decoder.bn1.weight"),
        ({"state_dict": {}, "epoch": 1}, r"no 'model_state_dict', but \['epoch', 'state_dict'\]"),
        (checkpoint({}), "Missing key"),
        (evil, "could run any code"),
    ):
        with pytest.raises(ValueError, match=said) as error:
            load_decoder(save(content, tmp_path / "a.pth"))
        assert str(tmp_path / "a.pth") in str(error.value)
    assert not (tmp_path / "marker").exists()
    with pytest.raises(FileNotFoundError, match=r"nothing\.pth"):
        load_decoder(tmp_path / "nothing.pth")


def tiny_decoder(seed: int = 0, classes: int = 4) -> DeepLabV3PlusDecoder:
    return create_decoder(16, 8, classes, width=8, seed=seed)


def bilinear(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """First and last points are those of the input."""
    return F.interpolate(maps, size=size, mode="bilinear", align_corners=True)


def norm(x: Tensor, state: State, name: str, batch: bool = False) -> Tensor:
    mean, variance, weight, bias = (state[f"{name}.{key}"] for key in NORM)
    return F.batch_norm(x, mean.clone(), variance.clone(), weight, bias, training=batch)


def described(state: State, low: Tensor, high: Tensor, size: tuple[int, int], batch: bool = False) -> Tensor:
    """The decoder as facts.md §4 and the papers describe it, in plain arithmetic, without dropout."""
    quarter = (low.shape[2] // 4, low.shape[3] // 4)
    if tuple(high.shape[2:]) != quarter:
        high = bilinear(high, quarter)
    branches = []
    for number, rate in ((1, 1), (2, 6), (3, 12), (4, 18)):
        weight = state[f"aspp.aspp{number}.atrous_conv.weight"]
        x = F.conv2d(high, weight, padding=0 if number == 1 else rate, dilation=rate)
        branches.append(norm(x, state, f"aspp.aspp{number}.bn", batch).relu())
    mean = F.conv2d(high.mean((2, 3), keepdim=True), state["aspp.global_avg_pool.1.weight"])
    branches.append(bilinear(norm(mean, state, "aspp.global_avg_pool.2", batch).relu(), quarter))
    x = F.conv2d(torch.cat(branches, 1), state["aspp.conv1.weight"])
    x = norm(x, state, "aspp.bn1", batch).relu()
    detail = norm(F.conv2d(low, state["decoder.conv1.weight"]), state, "decoder.bn1", batch).relu()
    x = torch.cat([bilinear(x, (low.shape[2], low.shape[3])), detail], 1)
    x = norm(F.conv2d(x, state["decoder.last_conv.0.weight"], padding=1), state, "decoder.last_conv.1", batch).relu()
    x = norm(F.conv2d(x, state["decoder.last_conv.4.weight"], padding=1), state, "decoder.last_conv.5", batch).relu()
    return bilinear(F.conv2d(x, state["decoder.last_conv.8.weight"], state["decoder.last_conv.8.bias"]), size)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    ("low", "high", "size"),
    [
        ((16, 16), (2, 2), (64, 64)),
        ((96, 96), (12, 12), (96, 96)),  # at 24×24 all rates see neighbours
        ((16, 32), (2, 4), (50, 130)),
        ((16, 16), (4, 4), (64, 64)),  # at S/16 already
    ],
)
@torch.no_grad()
def test_logits_are_those_of_the_description(low, high, size, training):
    decoder = scattered(tiny_decoder()).double().train(training)
    for module in decoder.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    draw = torch.Generator().manual_seed(1)
    shallow = torch.rand(2, 8, *low, generator=draw, dtype=torch.float64)
    deep = torch.rand(2, 16, *high, generator=draw, dtype=torch.float64)
    state = {name: tensor.clone() for name, tensor in decoder.state_dict().items()}
    found = decoder(shallow, deep, size)
    assert found.shape == (2, 4, *size)
    expected = described(state, shallow, deep, size, batch=training)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_fresh_convolutions_are_hes_normal_and_norms_start_at_one():
    """And dropout stands where the description puts it."""
    decoder = create_decoder(64, 32, 10, width=32)
    found = {name: module.p for name, module in decoder.named_modules() if isinstance(module, nn.Dropout)}
    assert found == {"aspp.dropout": 0.5, "decoder.last_conv.3": 0.5, "decoder.last_conv.7": 0.1}
    for module in decoder.modules():
        if isinstance(module, nn.Conv2d):
            fan_in = module.weight[0].numel()
            assert float(module.weight.detach().std()) == pytest.approx((2 / fan_in) ** 0.5, rel=0.15)
            assert (module.bias is None) == (module is not decoder.decoder.last_conv[8])
        if isinstance(module, nn.BatchNorm2d):
            assert module.weight.eq(1).all()
            assert module.bias.eq(0).all()


def test_dropout_differs_by_seed_and_by_step_and_leaves_torchs_generator_alone():
    low, high = torch.rand(4, 8, 16, 16), torch.rand(4, 16, 2, 2)
    twins = SegmentationDecoders([tiny_decoder(), tiny_decoder()], (0, 1)).train()  # the same weights
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first, second = twins(low, high, (64, 64)), twins(low, high, (64, 64))
    assert torch.equal(torch.rand(3), expected)
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first[0], second[0])
    again = SegmentationDecoders([tiny_decoder(), tiny_decoder()], (0, 1)).train()
    assert torch.equal(again(low, high, (64, 64)), first)
    assert torch.equal(twins.eval()(low, high, (64, 64)), twins(low, high, (64, 64)))
    assert twins.steps == 2
