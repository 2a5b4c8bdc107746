"""First layers that know what is missing: exact on complete images, blind to hidden values, and trainable.

Images are generated unless a test says otherwise; encoders are tiny random ones, with batch norms that have statistics
of their own.
"""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import TINY, same_weights, tiny_encoder
from torch import nn

from bandmask import bands
from bandmask.encoders import Card, create_encoder, embed, load_encoder, save_encoder
from bandmask.first_layer import MISSING, MaskAware, Rescaled, first_layer, kind_of, mask_aware, rescaled
from bandmask.masking import MaskSpec, hidden_pixels, hide, mask_batch
from bandmask.objectives import clip_loss
from bandmask.packs import Pack
from bandmask.training import adamw, weights_checksum

ARCHITECTURES = (TINY, "test_vit", "test_convnext")  # a stem of three convolutions, patches with a bias, a stem
FILL = torch.linspace(0.05, 0.4, 13)
SPEC = MaskSpec(("B02", "B08", "B8A"), 0.6)
WAYS = {"rescaled": rescaled, "mask-aware": lambda model: mask_aware(model, FILL)}


def model_of(architecture: str, seed: int = 0) -> nn.Module:
    """Random weights, with no bias and no batch norm at its initial value."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = timm.create_model(architecture, in_chans=13, num_classes=8)
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point() and tensor.ndim < 2:
                tensor.uniform_(0.5, 1.5) if "var" in name else tensor.add_(torch.randn_like(tensor) * 0.3)
    return model.eval()


def size_of(model: nn.Module) -> int:
    return 160 if model.pretrained_cfg["architecture"] == "test_vit" else 32


def images_of(model: nn.Module, count: int = 2, seed: int = 0) -> torch.Tensor:
    size = size_of(model)
    return torch.rand(count, 13, size, size, generator=torch.Generator().manual_seed(seed)) * 0.5


def incomplete(images: torch.Tensor, fill: torch.Tensor = MISSING, spec: MaskSpec = SPEC) -> torch.Tensor:
    return mask_batch(images, torch.arange(len(images)), spec, fill)


# --- complete images ------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("kind", WAYS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_complete_images_give_the_models_own_bits(architecture: str, kind: str, channels_last: bool):
    model = model_of(architecture)
    images = images_of(model)
    if channels_last:
        model, images = model.to(memory_format=torch.channels_last), images.to(memory_format=torch.channels_last)
    aware = WAYS[kind](model)
    assert kind_of(aware) == kind
    assert torch.equal(aware(images), model(images))
    for tap, found in embed(aware, images, [info["module"] for info in model.feature_info])[1].items():
        assert torch.equal(found, embed(model, images, [tap])[1][tap])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_complete_images_keep_their_bits_when_what_is_new_was_trained(architecture: str):
    teacher = model_of(architecture)
    student = mask_aware(teacher, FILL).requires_grad_(False)
    layer = first_layer(student)
    new = {"fill": layer.fill, "validity": layer.validity.weight}
    for parameter in new.values():
        parameter.requires_grad_(True)
    before = {name: parameter.detach().clone() for name, parameter in new.items()}
    optimizer = adamw(student, lr=0.01, weight_decay=0.01)
    images = images_of(student, 4)
    with torch.no_grad():
        target = teacher(images)
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        loss = clip_loss(student(incomplete(images)), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    channels = SPEC.channels
    others = [c for c in range(13) if c not in channels]
    assert (layer.fill[channels] != before["fill"][channels]).all()
    assert torch.equal(layer.fill[others], before["fill"][others])  # never hidden, so nothing to learn
    assert (layer.validity.weight[:, channels].abs().amax((0, 2, 3)) > 0).all()
    with torch.no_grad():
        assert not torch.equal(student(incomplete(images)), teacher(incomplete(images, FILL)))
        for seed in range(3):
            others_too = images_of(student, 3, seed)
            assert torch.equal(student(others_too), teacher(others_too))


@pytest.mark.parametrize("kind", WAYS)
def test_the_source_model_is_left_alone_and_shares_no_weights(kind: str):
    model = tiny_encoder()
    before = copy.deepcopy(model)
    aware = WAYS[kind](model).requires_grad_(False)
    for parameter in aware.parameters():
        parameter.zero_()
    assert same_weights(model, before)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert kind_of(model) == "plain"


def test_making_one_draws_no_random_numbers():
    """Otherwise what is trained after it would depend on whether it was made."""
    model = tiny_encoder()
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    mask_aware(model, FILL)
    rescaled(model)
    assert torch.equal(torch.rand(3), expected)


# --- incomplete images ----------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_untrained_mask_aware_is_the_model_on_filled_images(architecture: str):
    model = model_of(architecture)
    images = images_of(model)
    assert torch.equal(mask_aware(model, FILL)(incomplete(images)), model(incomplete(images, FILL)))


@pytest.mark.parametrize("kind", WAYS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_hidden_values_do_not_matter_and_gradients_are_finite(architecture: str, kind: str):
    aware = WAYS[kind](model_of(architecture))
    images = images_of(aware)
    hidden = hidden_pixels(SPEC, torch.arange(2), (size_of(aware),) * 2)
    spoilt = images.clone()
    spoilt[:, SPEC.channels] = torch.where(hidden, torch.tensor(torch.inf), images[:, SPEC.channels])
    found = aware(hide(images, hidden, SPEC, MISSING))
    assert torch.equal(found, aware(hide(spoilt, hidden, SPEC, MISSING)))
    found.square().sum().backward()
    for name, parameter in aware.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    seen = images.clone().requires_grad_(True)
    aware(torch.where(incomplete(images).isnan(), torch.nan, seen)).sum().backward()
    assert seen.grad.isfinite().all()
    assert (seen.grad[:, SPEC.channels][hidden] == 0).all()


def test_gradients_of_the_new_parameters_are_those_of_finite_differences():
    layer = mask_aware(model_of(TINY), FILL).conv1[0].double()
    layer.validity.weight.data.normal_(generator=torch.Generator().manual_seed(0))
    images = incomplete(torch.rand(2, 13, 6, 6, generator=torch.Generator().manual_seed(1))).double()

    def response(fill: torch.Tensor, validity: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(layer, {"fill": fill, "validity.weight": validity}, (images,))

    assert torch.autograd.gradcheck(response, (layer.fill, layer.validity.weight), fast_mode=True)


def brute_force(layer: nn.Conv2d, images: torch.Tensor) -> torch.Tensor:
    """Liu et al., equation 1, window by window in float64; padding doesn't count."""
    (kh, kw), (sh, sw), (ph, pw) = layer.kernel_size, layer.stride, layer.padding
    weight = layer.weight.detach().double()
    bias = torch.zeros(len(weight)).double() if layer.bias is None else layer.bias.detach().double()
    height, width = images.shape[-2:]
    rows, columns = (height + 2 * ph - kh) // sh + 1, (width + 2 * pw - kw) // sw + 1
    result = torch.zeros(len(images), len(weight), rows, columns).double()
    for b, image in enumerate(images.double()):
        for i in range(rows):
            for j in range(columns):
                top, left = i * sh - ph, j * sw - pw
                y = slice(max(top, 0), min(top + kh, height))
                x = slice(max(left, 0), min(left + kw, width))
                window = image[:, y, x]
                kernel = weight[:, :, y.start - top : y.stop - top, x.start - left : x.stop - left]
                visible = ~window.isnan()
                if visible.any():
                    total = (kernel * window.nan_to_num(0)).sum((1, 2, 3))
                    result[b, :, i, j] = total * visible.numel() / visible.sum() + bias
    return result


@given(
    seed=st.integers(0, 10_000),
    kernel=st.sampled_from([1, 2, 3, 7]),
    stride=st.sampled_from([1, 2, 4]),
    padding=st.sampled_from([0, 1, 3]),
    bias=st.booleans(),
    ratio=st.sampled_from([0.1, 0.5, 0.97, 1.0]),
)
def test_rescaling_is_that_of_the_paper(seed: int, kernel: int, stride: int, padding: int, bias: bool, ratio: float):
    draw = torch.Generator().manual_seed(seed)
    padding = min(padding, kernel - 1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Conv2d(13, 3, kernel, stride, padding, bias=bias))
    model.pretrained_cfg = {"first_conv": "0", "architecture": "one convolution"}
    images = torch.rand(2, 13, 8, 9, generator=draw)
    images[torch.rand(images.shape, generator=draw) < ratio] = torch.nan
    found = rescaled(model)(images)
    torch.testing.assert_close(found.double(), brute_force(model[0], images), atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_nothing_visible_is_zero_after_the_first_layer():
    model = model_of("test_vit")
    images = images_of(model)
    images[:, :, :16, :16] = torch.nan  # the whole first patch
    found = first_layer(rescaled(model))(images)
    expected = first_layer(model)(images.nan_to_num(0))
    expected[:, :, 0, 0] = 0
    assert torch.equal(found, expected)


@torch.no_grad()
def test_rescaling_counts_exactly_under_autocast():
    """3,328 inputs a patch: counted in bfloat16, a patch that lost one of them would look complete or worse."""
    model = model_of("test_vit")
    images = images_of(model)
    images[:, 0, 0, 0] = torch.nan
    layer = first_layer(rescaled(model))
    with torch.autocast("cpu", torch.bfloat16):
        counts = layer._counts(~images.isnan())
        response = layer(images)
    assert counts.flatten()[:2].tolist() == [3327.0, 3328.0]
    assert response.dtype == torch.bfloat16


@torch.no_grad()
def test_rescaling_keeps_a_flat_grey_image_whatever_is_hidden():
    """Where all inputs are alike and all weights too, the visible ones speak for the hidden ones without error."""
    model = nn.Sequential(nn.Conv2d(13, 2, 3, padding=1))
    model.pretrained_cfg = {"first_conv": "0"}
    model[0].weight.fill_(0.1)
    images = torch.full((2, 13, 8, 8), 0.3)
    torch.testing.assert_close(rescaled(model)(incomplete(images)), model(images))


@torch.no_grad()
def test_real_pixels(sample_pack: Pack):
    """Of the embedded scene, seven of thirteen bands lost in stripes."""
    model = model_of(TINY)
    images = torch.tensor(sample_pack.images[:3, :, :24, :24].astype("float32") / 10_000)
    gone = incomplete(images, spec=MaskSpec(bands.NAMES[1:8], 0.7, shape="stripe"))
    assert gone.isnan().any()
    found = rescaled(model).conv1[0](gone)
    torch.testing.assert_close(found.double(), brute_force(model.conv1[0], gone), atol=1e-5, rtol=1e-5)
    assert mask_aware(model, FILL)(gone).isfinite().all()


@pytest.mark.parametrize("kind", WAYS)
def test_compiled_in_one_graph(kind: str):
    """No branch depends on data: one graph serves complete and incomplete images."""
    model = WAYS[kind](tiny_encoder())
    layer = first_layer(model)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for images in (images_of(model), incomplete(images_of(model))):
        torch.testing.assert_close(compiled(images), layer(images))


# --- saving ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("kind", WAYS)
def test_saved_and_loaded_it_is_the_same(kind: str, tmp_path: Path):
    model = WAYS[kind](tiny_encoder())
    if kind == "mask-aware":
        torch.nn.init.normal_(first_layer(model).validity.weight)
    folder = save_encoder(model, Card("tiny", TINY, embedding_dim=16), tmp_path / "encoder")
    loaded, card = load_encoder(folder)
    assert card.first_layer == kind_of(loaded) == kind
    assert same_weights(loaded, model)
    assert weights_checksum(loaded) == weights_checksum(model)
    images = incomplete(images_of(model))
    assert torch.equal(loaded(images), model(images))
    assert loaded(images).isfinite().all()


def test_names_of_the_weights_are_timms_and_two_more():
    model = tiny_encoder()
    plain, aware = model.state_dict(), mask_aware(model, FILL).state_dict()
    assert aware.keys() - plain.keys() == {"conv1.0.fill", "conv1.0.validity.weight"}
    assert plain.keys() == rescaled(model).state_dict().keys()
    assert all(torch.equal(aware[name], tensor) for name, tensor in plain.items())
    assert torch.equal(aware["conv1.0.fill"], FILL)
    assert weights_checksum(model) == weights_checksum(rescaled(model)) != weights_checksum(mask_aware(model, FILL))


# --- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize(
    ("model", "said"),
    [
        (lambda: timm.create_model(TINY), r"first layer of test_resnet, conv1\.0, takes 3 bands, expected 13"),
        (lambda: nn.Linear(3, 3), "Linear names no single first convolution"),
        (lambda: timm.create_model("repvgg_a0", in_chans=13), "repvgg_a0 names no single first convolution"),
        (
            lambda: timm.create_model("tf_efficientnet_b0", in_chans=13),
            "first layer of tf_efficientnet_b0, conv_stem, is a Conv2dSame, no plain convolution",
        ),
        (lambda: rescaled(tiny_encoder()), "is rescaled already, start from the plain one"),
        (lambda: mask_aware(tiny_encoder(), FILL), "is mask-aware already, start from the plain one"),
    ],
    ids=["three bands", "no timm model", "no first layer", "another convolution", "rescaled twice", "aware twice"],
)
def test_a_model_that_can_not_be_changed_is_named(make, model, said: str):
    with pytest.raises(ValueError, match=said):
        make(model())


@pytest.mark.parametrize("fill", [torch.zeros(12), torch.zeros(1), torch.zeros(13, 1), MISSING], ids=str)
def test_a_fill_that_does_not_fit_is_refused(fill: torch.Tensor):
    with pytest.raises(ValueError, match="one finite reflectance for each of 13 bands"):
        mask_aware(tiny_encoder(), fill)


def test_kinds_of_layers():
    model = create_encoder(TINY, embedding_dim=4)
    assert isinstance(first_layer(rescaled(model)), Rescaled)
    assert isinstance(first_layer(mask_aware(model, FILL)), MaskAware)
    assert MISSING.isnan().all()
    assert MISSING.shape == (len(bands.NAMES),)
