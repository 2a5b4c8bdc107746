"""Fine-tuning moves the student towards a teacher that never moves, and can be repeated and resumed exactly.

Images are generated and encoders tiny: what is proved is the procedure, not an accuracy.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from models import Run, assert_same_run, generated_pack, same_weights, settled_encoder, stop_at, tiny_encoder
from torch import Tensor, nn

from bandmask import align, bands
from bandmask.align import Objective, clip_loss, fine_tune, pretrain_small
from bandmask.batches import Batches, to_reflectance
from bandmask.masks import MaskSpec, fill_values, mask_batch
from bandmask.packs import Pack
from bandmask.train import Compute, adamw

CPU = Compute.of("cpu")
SPEC = MaskSpec(bands=("B04", "B08", "B11", "B12"))


@pytest.fixture(scope="module")
def pack(tmp_path_factory):
    return generated_pack(tmp_path_factory.mktemp("packs") / "generated", train=64, val=16)


@pytest.fixture(scope="module")
def teacher(pack):
    return settled_encoder(pack)


def mean_of(pack: Pack) -> Tensor:
    return fill_values("dataset_mean", torch.tensor(pack.band_means()))


def tune(teacher: nn.Module, pack: Pack, spec: MaskSpec = SPEC, **options: Any) -> Run:
    defaults = {"epochs": 2, "batch_size": 16, "image_size": 32, "lr": 3e-4, "compute": CPU}
    return fine_tune(copy.deepcopy(teacher), pack, spec, mean_of(pack), **{**defaults, **options})


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


@pytest.mark.parametrize("other", ["mask", "teacher", "data", "gentle", "code"])
def test_another_training_neither_goes_on_from_a_checkpoint_nor_overwrites_it(
    other, teacher, pack, tmp_path, monkeypatch
):
    """A small encoder made anew has the old one's name and data; a student of the old one must not come back for it."""
    first = tune(teacher, pack, epochs=1, checkpoint=tmp_path / "last.ckpt")
    (kept,) = tmp_path.iterdir()
    before = kept.read_bytes()
    changed = {"mask": (teacher, pack, MaskSpec(bands=("B02",))), "teacher": (tiny_encoder(seed=9), pack)}
    if other == "data":  # in a folder of the same name
        changed[other] = (teacher, generated_pack(tmp_path / "packs" / pack.path.name, train=64, val=16, seed=1))
    arguments: tuple[Any, ...] = changed.get(other, (teacher, pack))
    options: dict[str, Any] = {"gentle": True} if other == "gentle" else {}
    if other == "code":
        monkeypatch.setattr(align, "checksum_of_code", lambda *_: "of a module that was changed")
    found = tune(*arguments, epochs=1, checkpoint=tmp_path / "last.ckpt", **options)
    assert len(list(tmp_path.glob("last-*"))) == 2
    assert kept.read_bytes() == before
    assert_same_run(found, tune(*arguments, epochs=1, **options))
    if other in changed:
        assert found[1]["val_loss"].iloc[-1] != first[1]["val_loss"].iloc[-1]


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
