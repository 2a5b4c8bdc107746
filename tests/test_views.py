"""What decoders see: feature maps of masked images in the order of their samples, kept whole or not at all.

Images are generated; the encoder is a tiny random one.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from models import labelled_pack, settled_encoder

from bandmask import views
from bandmask.batches import Batches
from bandmask.encoders import create_encoder
from bandmask.masking import MaskSpec, mask_batch
from bandmask.packs import Pack
from bandmask.training import Compute
from bandmask.views import TAPS, Features, View, decoder_taps, feature_batches, keep_features, tap_channels

CPU = Compute.of("cpu")
SPEC = MaskSpec(("B08",), 0.5)
FILL = torch.full((13,), 0.2)


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Pack:
    return labelled_pack(tmp_path_factory.mktemp("pack") / "generated", train=8, val=2, test=2)


@pytest.fixture(scope="module")
def view(pack: Pack) -> View:
    return View(settled_encoder(pack), SPEC, FILL, 64, 3)


def test_feature_maps_are_those_of_the_masked_images_layer_by_layer(pack: Pack, view: View) -> None:
    """The reference runs the encoder's layers by hand, an image at a time."""
    found = list(feature_batches(view, Batches(pack, "train", batch_size=3, targets=True), CPU, mask_epoch=2, epochs=5))
    assert [len(part.samples) for part in found] == [3, 3, 2]
    encoder = view.encoder
    for batch, part in zip(Batches(pack, "train", batch_size=3).epoch(), found, strict=True):
        images = mask_batch(batch.images, batch.samples, SPEC, FILL, epoch=2, epochs=5)
        with torch.no_grad():
            x = encoder.maxpool(encoder.act1(encoder.bn1(encoder.conv1(images))))
            low = encoder.layer1(x)
            high = encoder.layer4(encoder.layer3(encoder.layer2(low)))
        torch.testing.assert_close(part.low, low)
        torch.testing.assert_close(part.high, high)
        assert torch.equal(part.samples, batch.samples)
        assert part.low.shape[-1] == 16
        assert part.high.shape[-1] == 2


def test_targets_come_with_their_images(pack: Pack, view: View) -> None:
    assert pack.targets is not None
    for part in feature_batches(view, Batches(pack, "train", batch_size=3, shuffle=True, targets=True), CPU):
        assert np.array_equal(part.targets.numpy(), pack.targets[part.samples.numpy()])


def test_channels_of_the_taps(view: View) -> None:
    _, maps = views.embed(view.encoder, torch.zeros(1, 13, 64, 64), TAPS)
    assert tap_channels(view, CPU) == (maps["layer1"].shape[1], maps["layer4"].shape[1])


def test_kept_features_are_the_parts_in_order_and_split_again(pack: Pack, view: View) -> None:
    batches = Batches(pack, "train", batch_size=3, targets=True)
    kept = keep_features(feature_batches(view, batches, CPU), 3)
    parts = list(feature_batches(view, batches, CPU))
    for ours, part in zip(kept.split(3), parts, strict=True):
        assert isinstance(ours, Features)
        for field, expected in zip(ours, part, strict=True):
            assert torch.equal(field, expected)
    chosen = kept.take(torch.tensor([5, 0]))
    assert chosen.samples.tolist() == [5, 0]
    assert torch.equal(chosen.high[0], kept.high[5])


def test_too_many_feature_maps_are_refused_at_the_first_batch(pack: Pack, view: View) -> None:
    seen = 0

    def counted():
        nonlocal seen
        for part in feature_batches(view, Batches(pack, "train", batch_size=3, targets=True), CPU):
            seen += 1
            yield part

    with pytest.raises(ValueError, match=r"GiB, more than half of the .* set passes \(decoder_passes\) lower, or to 0"):
        keep_features(counted(), 10**9)
    assert seen == 1


def test_an_encoder_without_these_taps_is_refused_by_name() -> None:
    import timm

    other = timm.create_model("test_vit", in_chans=13, num_classes=4)
    with pytest.raises(ValueError, match=r"no tap .*layer1.* available"):
        tap_channels(View(other.eval(), SPEC, FILL), CPU)


def test_a_vit_is_refused_with_the_reason_and_what_still_works() -> None:
    vit = create_encoder("test_vit")
    with pytest.raises(
        ValueError, match=r"blocks\.0 \(S/16\).* Segmentation needs a ResNet or a ConvNeXt; fine-tuning"
    ):
        decoder_taps(vit)


def test_a_convnext_has_the_maps_that_decoders_take(pack: Pack) -> None:
    encoder = create_encoder("test_convnext").eval()
    view = View(encoder, SPEC, FILL, 64, 2)
    assert decoder_taps(encoder) == ("stages.0", "stages.3")
    part = next(feature_batches(view, Batches(pack, "train", batch_size=2, targets=True), CPU))
    assert part.low.shape == (2, tap_channels(view, CPU)[0], 16, 16)
    assert part.high.shape == (2, tap_channels(view, CPU)[1], 2, 2)
