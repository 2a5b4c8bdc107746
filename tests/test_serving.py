"""Repair leaves healthy bands alone and nothing of faulty ones; the loop agrees with the pieces it is made of."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from models import settled_encoder

from bandmask import bands, classification, comparison
from bandmask.diagnosis import serving
from bandmask.diagnosis.detector import Detector
from bandmask.diagnosis.faults import Fault, inject
from bandmask.fills import RidgeLocalFill
from bandmask.imputation import RidgeFill
from bandmask.masking import MaskSpec
from bandmask.moments import Moments
from bandmask.packs import Pack
from bandmask.training import Compute
from bandmask.views import View

CPU = Compute.of("cpu")


@pytest.fixture(scope="module")
def moments(sample_pack: Pack) -> Moments:
    return Moments.of(sample_pack)


@pytest.fixture(scope="module")
def images(sample_pack: Pack) -> torch.Tensor:
    return torch.from_numpy(sample_pack.images[sample_pack.rows("test")[::24]].astype(np.float32) / 10_000)


def flags(count: int, *names: str) -> torch.Tensor:
    faulty = torch.zeros(count, 13, dtype=torch.bool)
    faulty[:, bands.channel_indices(names)] = True
    return faulty


def test_repair_is_ridge_imputation_of_the_faulty_bands_alone(moments: Moments, images: torch.Tensor) -> None:
    faulty = flags(len(images), "B04", "B08")
    faulty[::2] = False
    repaired = serving.repair(images, faulty.numpy(), RidgeLocalFill(moments))
    assert torch.equal(repaired[::2], images[::2])
    fill = RidgeFill.of(moments, ("B04", "B08"))
    expected = fill(images[1::2], torch.ones(1))
    channels = bands.channel_indices(["B04", "B08"])
    others = [c for c in range(13) if c not in channels]
    assert torch.allclose(repaired[1::2][:, channels], expected, atol=1e-5)
    assert torch.equal(repaired[1::2][:, others], images[1::2][:, others])


@pytest.mark.parametrize("junk", [0.0, 7.0, torch.nan, torch.inf])
def test_nothing_of_a_faulty_band_is_left(moments: Moments, images: torch.Tensor, junk: float) -> None:
    faulty, spoilt = flags(len(images), "B04"), images.clone()
    spoilt[:, 3] = junk
    fill = RidgeLocalFill(moments)
    assert torch.equal(serving.repair(spoilt, faulty, fill), serving.repair(images, faulty, fill))


def test_where_every_band_is_faulty_the_means_stand(moments: Moments, images: torch.Tensor) -> None:
    repaired = serving.repair(images[:1], torch.ones(1, 13, dtype=torch.bool), RidgeLocalFill(moments))
    expected = torch.tensor(moments.mean, dtype=torch.float32)[:, None, None].expand(13, 64, 64)
    assert torch.allclose(repaired[0], expected, atol=1e-6)


def test_faults_go_by_turns_and_do_not_depend_on_the_batch(images: torch.Tensor) -> None:
    faults = [Fault("offset", ("B02",), 0.1), Fault("noisy", ("B08", "B12"), 0.1), Fault("swapped", ("B03", "B04"))]
    samples = torch.tensor([5, 0, 1, 2, 3, 4])
    broken, faulty = serving.break_each(images, samples, faults)
    for row, sample in enumerate(samples.tolist()):
        fault = faults[sample % 3]
        assert torch.equal(broken[row], inject(images[row : row + 1], samples[row : row + 1], fault)[0])
        assert faulty[row].nonzero().squeeze(1).tolist() == fault.channels
    with pytest.raises(ValueError, match="one fault or more"):
        serving.break_each(images, samples, [])
    with pytest.raises(ValueError, match=r"each band of each image, \(6, 13\)"):
        serving.repair(images, faulty[:3], RidgeLocalFill)  # type: ignore[arg-type]


def test_the_loop_agrees_with_its_pieces(sample_pack: Pack, moments: Moments, tmp_path: Path) -> None:
    detector, fill, encoder = Detector.fit(sample_pack), RidgeLocalFill(moments), settled_encoder(sample_pack, passes=3)
    complete = View(encoder, MaskSpec(), torch.zeros(13), 64)
    heads, _ = classification.train_heads(complete, sample_pack, seeds=(0, 1), epochs=3, passes=1, compute=CPU)
    faults = [Fault("noisy", (name,), 0.05) for name in ("B03", "B08")]
    rows = serving.closed_loop(sample_pack, faults, detector, fill, encoder, heads, compute=CPU)
    wide = rows.pivot(index=["head_seed", "sample"], columns="method", values="predicted")

    reference = classification.predict(complete, heads, sample_pack, compute=CPU).set_index(["head_seed", "sample"])
    assert wide["healthy"].equals(reference["predicted"].rename("healthy").sort_index())
    named = rows.pivot(index=["head_seed", "sample"], columns="method", values="named")
    assert named["oracle"].all()
    assert not named["do nothing"].any()
    assert named["detector"].mean() > 0.7
    assert (wide["detector"] == wide["oracle"])[named["detector"]].all()
    quiet = named["healthy, detector on"]
    assert (wide["healthy, detector on"] == wide["healthy"])[quiet].all()

    found = comparison.paired_difference(rows.assign(fault="noisy"), "do nothing", "oracle", by=("fault",))
    right = (rows["predicted"] == rows["label"]).groupby(rows["method"]).mean()
    assert found["difference"].item() == pytest.approx(right["oracle"] - right["do nothing"])
    with pytest.raises(ValueError, match="unknown method 'ridge'; available: healthy"):
        serving.closed_loop(sample_pack, faults, detector, fill, encoder, heads, compute=CPU, methods=["ridge"])
