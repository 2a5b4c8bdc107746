"""The loss is the thesis' one; fine-tuning moves the student towards a teacher that never moves, and resumes exactly.

Images are generated and encoders tiny: what is proved is the procedure, not an accuracy.
"""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import Run, assert_same_run, generated_pack, same_weights, stop_at, tiny_encoder
from timm.layers import convert_sync_batchnorm
from torch import Tensor, nn

from bandmask import align, bands
from bandmask.align import LOGIT_SCALE, Objective, clip_loss, distance, fine_tune, pretrain_small
from bandmask.batches import Batches, to_reflectance
from bandmask.masks import MaskSpec, fill_values, mask_batch
from bandmask.packs import Pack
from bandmask.train import Compute, adamw

CPU = Compute.of("cpu")
SPEC = MaskSpec(bands=("B04", "B08", "B11", "B12"))


def thesis_loss(incomplete: np.ndarray, complete: np.ndarray, tau: float) -> float:
    """Figures 2.1 to 2.3, summand by summand, in float64."""

    def cosine(a: np.ndarray, b: np.ndarray) -> float:  # Figure 2.3
        return tau * float(a @ b) / (float(np.sqrt(a @ a)) * float(np.sqrt(b @ b)))

    def cross_entropy(n: int, xs: np.ndarray, ys: np.ndarray) -> float:  # Figure 2.2
        similarities = [cosine(xs[n], y) for y in ys]
        return -math.log(math.exp(similarities[n]) / sum(math.exp(s) for s in similarities))

    size = len(incomplete)  # Figure 2.1
    first = sum(cross_entropy(n, incomplete, complete) for n in range(size))
    second = sum(cross_entropy(n, complete, incomplete) for n in range(size))
    return (first + second) / (2 * size)


def pair(size: int, dim: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    draw = np.random.default_rng(seed)
    first = draw.normal(size=(size, dim))
    return torch.tensor(first, dtype=dtype), torch.tensor(first + draw.normal(size=(size, dim)), dtype=dtype)


@given(size=st.integers(2, 12), dim=st.integers(2, 24), seed=st.integers(0, 10_000), tau=st.floats(0.5, 30))
def test_equals_the_thesis_equations(size, dim, seed, tau):
    incomplete, complete = pair(size, dim, seed)
    expected = thesis_loss(incomplete.double().numpy(), complete.double().numpy(), tau)
    assert float(clip_loss(incomplete, complete, tau)) == pytest.approx(expected, rel=2e-5, abs=2e-5)
    assert math.exp(2.8952996730804443) == LOGIT_SCALE, "SatCLIP's"
    assert Objective()(incomplete, complete) == clip_loss(incomplete, complete)


def test_gradient_equals_finite_differences_in_float64():
    incomplete, complete = pair(5, 6, seed=3)
    incomplete.requires_grad_()
    clip_loss(incomplete, complete).backward()
    assert complete.grad is None
    at, target, step = incomplete.detach().double().numpy(), complete.double().numpy(), 1e-6
    expected = np.empty_like(at)
    for place in np.ndindex(*at.shape):
        up, down = at.copy(), at.copy()
        up[place] += step
        down[place] -= step
        expected[place] = (thesis_loss(up, target, LOGIT_SCALE) - thesis_loss(down, target, LOGIT_SCALE)) / (2 * step)
    np.testing.assert_allclose(incomplete.grad.numpy(), expected, rtol=1e-3, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_computed_in_float32_whatever_comes(dtype):
    incomplete, complete = pair(16, 32, dtype=dtype)
    loss = clip_loss(incomplete, complete)
    assert (loss.dtype, loss.ndim) == (torch.float32, 0)
    torch.testing.assert_close(loss, clip_loss(incomplete.float(), complete.float()), rtol=0, atol=0)
    long = torch.tensor([[300.0], [-300.0]], dtype=dtype).expand(2, 8)  # squares overflow float16
    assert torch.isfinite(clip_loss(long, long))


def test_computed_in_float32_under_autocast():
    """Logits reach ±18, where bfloat16 has steps of 0.06 to 0.12: the product of embeddings must leave autocast."""
    incomplete, complete = torch.randn(2, 32, 64, generator=torch.Generator().manual_seed(0))
    incomplete.requires_grad_()
    expected = clip_loss(incomplete, complete)
    gradient = torch.autograd.grad(expected, incomplete)[0]
    with torch.autocast("cpu", torch.bfloat16):
        found = clip_loss(incomplete, complete)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(torch.autograd.grad(found, incomplete)[0], gradient, rtol=1e-5, atol=1e-7)


def test_distance_is_the_squared_error_as_a_share_of_the_target():
    student, teacher = pair(5, 9, dtype=torch.float64)
    error = ((student - teacher) ** 2).sum(1) / (teacher**2).sum(1)
    assert float(distance(student, teacher)) == pytest.approx(float(error.mean()), rel=1e-6)
    assert float(distance(teacher, teacher)) == 0
    assert float(distance(torch.zeros_like(teacher), teacher)) == pytest.approx(1)
    assert float(distance(2 * teacher, teacher)) == pytest.approx(1), "length counts, unlike in a cosine"


def test_levels_of_features_weigh_alike_whatever_their_scale():
    student, teacher = torch.randn(3, 4, 5, 5), torch.randn(3, 4, 5, 5)
    assert torch.allclose(distance(1000 * student, 1000 * teacher), distance(student, teacher))
    zeros = torch.zeros(2, 4, 3, 3)
    assert distance(zeros, zeros) == 0, "a dead level is no error"


def test_an_objective_is_the_weighted_sum_of_its_terms():
    incomplete, complete = pair(4, 6)
    maps = {"layer1": torch.randn(4, 3, 4, 4), "layer4": torch.randn(4, 5, 2, 2)}
    targets = {"layer1": torch.randn(4, 3, 4, 4), "layer4": torch.randn(4, 5, 2, 2)}
    levels = [distance(maps[name], targets[name]) for name in maps]
    expected = 0.5 * clip_loss(incomplete, complete) + 2 * distance(incomplete, complete)
    expected = expected + 3 * (levels[0] + levels[1]) / 2
    found = Objective(clip=0.5, distance=2, features=3)(incomplete, complete, maps, targets)
    assert torch.allclose(found, expected)


def test_aligning_features_alone_leaves_the_embedding_out():
    student, teacher = pair(4, 6)
    student.requires_grad_()
    maps = {"layer1": torch.randn(4, 3, 4, 4, requires_grad=True)}
    Objective.of("features")(student, teacher, maps, {"layer1": torch.randn(4, 3, 4, 4)}).backward()
    assert student.grad is None
    assert maps["layer1"].grad is not None


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Objective.of("pixels"), "unknown alignment 'pixels'; available: embedding, features, both"),
        (lambda: Objective(clip=0), "not all 0"),
        (lambda: Objective(distance=-1), "0 or more"),
        (lambda: Objective(features=math.nan), "0 or more"),
        (lambda: Objective.of("features")(torch.rand(2, 3), torch.rand(2, 3)), "this encoder gave none"),
        (lambda: distance(torch.rand(2, 3), torch.rand(3, 2)), r"\(2, 3\) and \(3, 2\)"),
        (lambda: clip_loss(torch.ones(4, 8), torch.ones(5, 8)), r"two \(N, D\) batches.*\(4, 8\) and \(5, 8\)"),
        (lambda: clip_loss(torch.ones(1, 8), torch.ones(1, 8)), "N ≥ 2"),
        (lambda: clip_loss(torch.ones(2, 4, 8), torch.ones(2, 4, 8)), r"two \(N, D\) batches"),
    ],
)
def test_objectives_that_say_nothing_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_an_encoder_of_complete_images_takes_no_pack_that_lacks_a_band(teacher, pack):
    """Its loss was NaN, after a whole epoch."""
    with pytest.raises(ValueError, match="lacks B10, this encoder takes complete images"):
        tune(teacher, replace(pack, card=pack.card | {"absent": ["B10"]}))


def test_one_validation_image_has_no_other_to_be_told_apart_from(teacher, pack):
    index = pack.index.assign(split=pack.index["split"].replace("val", "train"))
    index.loc[0, "split"] = "val"
    with pytest.raises(ValueError, match=r"1 images in val; each takes 2 or more"):
        tune(teacher, replace(pack, index=index))


def mean_of(pack: Pack) -> Tensor:
    return fill_values("dataset_mean", torch.tensor(pack.band_means()))


def tune(teacher: nn.Module, pack: Pack, spec: MaskSpec = SPEC, fill: Tensor | None = None, **options: Any) -> Run:
    fill = mean_of(pack) if fill is None else fill
    defaults = {"epochs": 2, "batch_size": 16, "image_size": 32, "lr": 3e-4, "compute": CPU}
    return fine_tune(copy.deepcopy(teacher), pack, spec, fill, **{**defaults, **options})


@pytest.fixture(scope="module")
def tuned(teacher, pack):
    return tune(teacher, pack)


def images_of(pack: Pack, split: str, size: int = 32) -> Tensor:
    return to_reflectance(torch.from_numpy(pack.images[pack.rows(split)].view(np.int16)), size)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine: bfloat16 and compiling untested")
@pytest.mark.parametrize("compiled", [False, True])
def test_in_bfloat16_compiled_or_not_it_learns_what_float32_learns(teacher, pack, compiled):
    gpu = torch.device("cuda")
    exact, as_float = tune(teacher, pack, epochs=4, compute=Compute(gpu))
    rough, as_bfloat = tune(teacher, pack, epochs=4, compute=Compute(gpu, True, True, compiled))
    learnt = as_float["val_loss"].iloc[0] - as_float["val_loss"].iloc[-1]
    assert learnt > 0.2
    assert np.abs(as_float["val_loss"] - as_bfloat["val_loss"]).max() < 0.1 * learnt
    images = images_of(pack, "test").to(gpu)
    with torch.no_grad():
        assert torch.cosine_similarity(exact(images), rough(images)).min() > 0.995


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine: waiting for it untested")
def test_no_step_waits_for_the_gpu(teacher, pack):
    """While the CPU waits, nothing is queued, and the GPU is idle until the next step has begun."""
    gpu = torch.device("cuda")
    teacher = copy.deepcopy(teacher).to(gpu).eval()
    student = copy.deepcopy(teacher).train()
    fill, optimizer = mean_of(pack), adamw(student, lr=1e-4, weight_decay=0)
    batches = Batches(pack, "train", batch_size=16, image_size=32, augment=True, shuffle=True, device=gpu)

    def steps(epoch: int):
        for batch in batches.epoch(epoch):
            incomplete = mask_batch(batch.images, batch.samples, SPEC, fill, epoch=epoch)
            with torch.no_grad():
                target = teacher(batch.images)
            optimizer.zero_grad(set_to_none=True)
            clip_loss(student(incomplete), target).backward()
            optimizer.step()

    steps(0)  # the first ones load kernels
    torch.cuda.set_sync_debug_mode("error")
    try:
        steps(1)
        with pytest.raises(RuntimeError, match="synchronizing"):
            float(torch.zeros((), device=gpu))  # the check itself works
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_teacher_is_frozen_and_unchanged_and_the_student_moves(teacher, pack):
    used = copy.deepcopy(teacher)
    student, _ = fine_tune(used, pack, SPEC, mean_of(pack), epochs=1, batch_size=16, image_size=32, compute=CPU)
    assert same_weights(used, teacher)  # parameters and batch-norm statistics, to the last bit
    assert not any(p.requires_grad for p in used.parameters())
    assert all(p.grad is None for p in used.parameters())
    assert not used.training
    before, after = teacher.state_dict(), student.state_dict()
    moved = [name for name in after if not torch.equal(before[name], after[name])]
    assert set(moved) == set(after)  # every parameter learns, every batch norm keeps counting
    assert not student.training
    assert all(p.requires_grad for p in student.parameters())


def test_history_starts_with_the_pre_trained_encoder(teacher, pack, tuned):
    history = tuned[1]
    assert history["epoch"].tolist() == [0, 1, 2]
    assert history["train_loss"].isna().tolist() == [True, False, False]
    assert history["val_loss"].iloc[-1] < 0.8 * history["val_loss"].iloc[0]
    images = images_of(pack, "val")
    masked = mask_batch(images, torch.tensor(pack.rows("val")), SPEC, mean_of(pack))
    with torch.no_grad():
        incomplete, complete, embedded = teacher(masked), teacher(images), tuned[0](masked)
    # one validation batch of 16: the loss is that of the whole split, whatever its order
    assert history["val_loss"].iloc[0] == pytest.approx(float(clip_loss(incomplete, complete)), rel=1e-4)
    cosine = torch.cosine_similarity(incomplete, complete).mean()
    assert history["val_cosine"].iloc[0] == pytest.approx(float(cosine), rel=1e-4)
    # and the last row is of the student that is returned
    assert history["val_loss"].iloc[-1] == pytest.approx(float(clip_loss(embedded, complete)), rel=1e-4)


def test_same_seed_same_run_and_another_seed_another(teacher, pack, tuned):
    torch.manual_seed(12345)  # nothing may hang on what was drawn before
    assert_same_run(tune(teacher, pack), tuned)
    other = tune(teacher, pack, seed=1)[1]
    assert (other["train_loss"].iloc[1:] != tuned[1]["train_loss"].iloc[1:]).all()
    masked = tune(teacher, pack, MaskSpec(SPEC.bands, seed=1), epochs=1)[1]
    assert masked["val_loss"].iloc[0] != tuned[1]["val_loss"].iloc[0]


def test_an_interrupted_run_resumes_to_the_same_figures(teacher, pack, tuned, tmp_path, monkeypatch):
    checkpoint = tmp_path / "last.ckpt"
    with monkeypatch.context() as patched:
        # the validation before, an epoch with its validation, then a third batch
        stop_at(patched, align, 1 + 5 + 3)
        with pytest.raises(KeyboardInterrupt):
            tune(teacher, pack, checkpoint=checkpoint)
    (kept,) = tmp_path.iterdir()
    assert kept.match("last-????????.ckpt")
    assert_same_run(tune(teacher, pack, checkpoint=checkpoint), tuned)


def test_whatever_decides_a_run_names_its_checkpoint(teacher, pack, tmp_path, monkeypatch):
    """A small encoder made anew has the old one's name and data; a student of the old one must not come back for it.

    That a run under another name neither goes on from a checkpoint nor overwrites it: test_train.
    """
    options: dict[str, Any] = {"epochs": 1, "checkpoint": tmp_path / "last.ckpt"}
    data = generated_pack(tmp_path / "packs" / pack.path.name, train=64, val=16, seed=1)  # in a folder of the same name
    tune(teacher, data, fill=mean_of(pack), **options)
    for run in ((teacher, pack, MaskSpec(("B02",))), (tiny_encoder(seed=9), pack), (teacher, pack)):
        tune(*run, **options)
    tune(teacher, pack, gentle=True, **options)
    monkeypatch.setattr(align, "checksum_of_code", lambda *_: "of a module that was changed")
    tune(teacher, pack, **options)
    assert len(list(tmp_path.glob("last-????????.ckpt"))) == 6


def test_test_images_are_never_seen(teacher, pack, tuned, tmp_path):
    """Another test split, the same run: nothing leaks from there."""
    other = generated_pack(tmp_path / "other", train=64, val=16, spoiled=["test"])
    assert not np.array_equal(other.images[other.rows("test")], pack.images[pack.rows("test")])
    assert_same_run(tune(teacher, other), tuned)


def test_teacher_sees_complete_images_and_student_the_same_ones_incomplete(teacher, pack):
    """Thesis §3.3.1 and Figure 3.2: one flipped and blurred image, with pixels hidden from the student alone."""
    used, seen = copy.deepcopy(teacher), {"teacher": [], "student": []}

    def note(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen["teacher" if module is used else "student"].append((module.training, inputs[0].clone()))

    used.register_forward_pre_hook(note)  # the student, a copy, takes it along
    spec, fill = MaskSpec(bands=("B08",), value=-1.0), torch.full((13,), -1.0)
    fine_tune(used, pack, spec, fill, epochs=1, batch_size=16, image_size=48, compute=CPU)
    assert len(seen["teacher"]) == len(seen["student"]) == 1 + 4 + 1
    nir = bands.NAMES.index("B08")
    for (taught, complete), (_, incomplete) in zip(seen["teacher"], seen["student"], strict=True):
        assert complete.shape == (16, 13, 48, 48)
        differs = complete != incomplete
        assert differs[:, nir].float().mean() == pytest.approx(0.9, abs=0.02)
        assert (incomplete[:, nir][differs[:, nir]] == -1).all()
        differs[:, nir] = False
        assert not differs.any()  # the other bands, flips and blur are the same
        assert not taught
    assert [learning for learning, _ in seen["student"]] == [False, True, True, True, True, False]
    drawn = [incomplete[:, nir] == -1 for _, incomplete in seen["student"]]
    assert torch.equal(drawn[0], drawn[-1])  # validation hides the same pixels before and after


def test_of_a_crop_teacher_and_student_see_the_same_part(teacher, pack):
    """With nothing hidden a student that stays as it is agrees with its teacher, on crops too."""
    options = {"gentle": True, "objective": Objective(0.0, 1.0), "lr": 1e-12, "epochs": 1}
    _, history = tune(teacher, pack, MaskSpec(SPEC.bands, ratio=0.0), crop_size=16, **options)
    assert history["train_loss"].iloc[1] < 1e-9
    cropped, whole = (tune(teacher, pack, crop_size=size, **options)[1] for size in (16, None))
    assert cropped["train_loss"].iloc[1] != whole["train_loss"].iloc[1]


def test_gentle_batch_norms_stay_though_several_gpus_exchange_them(teacher, pack, monkeypatch):
    monkeypatch.setattr(Compute, "faster", lambda _, model: convert_sync_batchnorm(model))
    student, _ = tune(teacher, pack, epochs=1, gentle=True)  # of a norm that is in training PyTorch asks for a GPU
    told, kept = ({name: value for name, value in of.named_buffers()} for of in (student, teacher))
    assert all(torch.equal(told[name], kept[name]) for name in kept)


def test_a_cosine_schedule_rises_then_falls_and_is_that_of_a_resumed_run(teacher, pack, tmp_path, monkeypatch):
    rates: list[float] = []
    original = torch.optim.AdamW.step

    def note(self: torch.optim.AdamW, *arguments: Any, **options: Any) -> Any:
        rates.append(self.param_groups[0]["lr"])
        return original(self, *arguments, **options)

    monkeypatch.setattr(torch.optim.AdamW, "step", note)
    whole = tune(teacher, pack, epochs=5, lr=1e-3, gentle=True)
    by_epoch = rates[::4]
    assert by_epoch[0] == pytest.approx(1e-3)
    assert by_epoch == sorted(by_epoch, reverse=True)
    assert by_epoch[-1] < 1e-4
    rates.clear()
    for epochs, stop in ((10, 8), (5, 11)):  # in the second epoch, in the third
        with monkeypatch.context() as patched:
            stop_at(patched, align, stop)
            with pytest.raises(KeyboardInterrupt):
                tune(teacher, pack, epochs=epochs, lr=1e-3, gentle=True, checkpoint=tmp_path / "run.pt")
    assert rates[0] < rates[4], "a first fifth of two epochs rises"
    resumed = tune(teacher, pack, epochs=5, lr=1e-3, gentle=True, checkpoint=tmp_path / "run.pt")
    assert_same_run(resumed, whole)


def pretrain(pack: Pack, **options: Any) -> Run:
    model = tiny_encoder(seed=3)
    defaults = {"epochs": 8, "image_size": 32, "crop_size": 32, "compute": CPU}
    return model, pretrain_small(model, pack, **{**defaults, **options})


@pytest.fixture(scope="module")
def stand_in(pack):
    return pretrain(pack)


def test_small_encoder_learns_from_training_images_alone_and_every_draw_is_its_seeds(pack, stand_in, tmp_path):
    model, history = stand_in
    assert history["train_loss"].iloc[-1] < 0.8 * history["train_loss"].iloc[1]
    assert not model.training
    torch.manual_seed(999)
    other = generated_pack(tmp_path / "other", train=64, val=16, spoiled=["val", "test"])
    assert_same_run(pretrain(other), stand_in)
    assert (pretrain(pack, seed=1)[1]["train_loss"].iloc[1:] != history["train_loss"].iloc[1:]).all()


def test_small_encoder_resumes_to_the_same_figures(pack, stand_in, tmp_path, monkeypatch):
    """Crops, brightness and the learning rate of an epoch depend on its number, not on what ran before."""
    with monkeypatch.context() as patched:
        stop_at(patched, align, 3)  # in the third epoch, of one batch
        with pytest.raises(KeyboardInterrupt):
            pretrain(pack, checkpoint=tmp_path / "last.ckpt")
    assert_same_run(pretrain(pack, checkpoint=tmp_path / "last.ckpt"), stand_in)
