"""Fine-tuning moves the student towards a teacher that never moves, and can be repeated and resumed exactly.

Images are generated and encoders tiny: what is proved is the procedure, not an accuracy.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import TINY, Run, assert_same_run, generated_pack, same_weights, settled_encoder, stop_at, tiny_encoder
from torch import Tensor, nn

from bandmask import align, bands, encoders, losses, masks, params
from bandmask.align import Tuning, alignment_scores, fine_tune, pretrain_small
from bandmask.batches import Batches, to_reflectance
from bandmask.losses import Objective, clip_loss
from bandmask.masks import FITTED, MaskSpec, fill_values, hide, mask_batch
from bandmask.packs import Pack
from bandmask.train import Compute, adamw

CPU = Compute.of("cpu")
SPEC = MaskSpec(bands=("B04", "B08", "B11", "B12"))


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Pack:
    return generated_pack(tmp_path_factory.mktemp("packs") / "generated", train=64, val=16)


@pytest.fixture(scope="module")
def teacher(pack: Pack) -> nn.Module:
    return settled_encoder(pack)


def tune(teacher: nn.Module, pack: Pack, spec: MaskSpec = SPEC, **options: Any) -> Run:
    fill = fill_values(spec.value, torch.tensor(pack.band_means()))
    defaults = {"epochs": 2, "batch_size": 16, "image_size": 32, "lr": 3e-4, "compute": CPU}
    return fine_tune(copy.deepcopy(teacher), pack, spec, fill, **{**defaults, **options})


@pytest.fixture(scope="module")
def tuned(teacher: nn.Module, pack: Pack) -> Run:
    return tune(teacher, pack)


def images_of(pack: Pack, split: str, size: int = 32) -> Tensor:
    return to_reflectance(torch.from_numpy(pack.images[pack.rows(split)].view(np.int16)), size)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine: bfloat16 and compiling untested")
@pytest.mark.parametrize("compiled", [False, True])
def test_in_bfloat16_compiled_or_not_it_learns_what_float32_learns(teacher: nn.Module, pack: Pack, compiled: bool):
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
def test_no_step_waits_for_the_gpu(teacher: nn.Module, pack: Pack):
    """While the CPU waits, nothing is queued, and the GPU is idle until the next step has begun."""
    gpu = torch.device("cuda")
    teacher = copy.deepcopy(teacher).to(gpu).eval()
    student = copy.deepcopy(teacher).train()
    fill, optimizer = (
        fill_values("dataset_mean", torch.tensor(pack.band_means())),
        adamw(student, lr=1e-4, weight_decay=0),
    )
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


# --- fine-tuning ----------------------------------------------------------------------------------------------------


def test_the_teacher_is_frozen_and_unchanged_and_the_student_moves(teacher: nn.Module, pack: Pack):
    used = copy.deepcopy(teacher)
    fill = fill_values("dataset_mean", torch.tensor(pack.band_means()))
    options = {"epochs": 1, "batch_size": 16, "image_size": 32, "compute": CPU}
    student, _ = fine_tune(used, pack, SPEC, fill, **options)
    assert same_weights(used, teacher)  # parameters and batch-norm statistics, to the last bit
    assert not any(p.requires_grad for p in used.parameters())
    assert all(p.grad is None for p in used.parameters())
    assert not used.training
    before, after = teacher.state_dict(), student.state_dict()
    moved = [name for name in after if not torch.equal(before[name], after[name])]
    assert set(moved) == set(after)  # every parameter learns, every batch norm keeps counting
    assert not student.training
    assert all(p.requires_grad for p in student.parameters())


def test_lowers_the_validation_loss(tuned: Run):
    fell = tuned[1]["val_loss"]
    assert fell.iloc[-1] < 0.8 * fell.iloc[0]


def test_history_starts_with_the_pre_trained_encoder(teacher: nn.Module, pack: Pack, tuned: Run):
    history = tuned[1]
    assert history["epoch"].tolist() == [0, 1, 2]
    images = images_of(pack, "val")
    hidden = SPEC.hidden(torch.tensor(pack.rows("val")), (32, 32))
    fill = fill_values("dataset_mean", torch.tensor(pack.band_means()))
    with torch.no_grad():
        incomplete, complete = teacher(hide(images, hidden, SPEC, fill)), teacher(images)
        embedded = tuned[0](hide(images, hidden, SPEC, fill))
    # one validation batch of 16: the loss is that of the whole split, whatever its order
    assert history["val_loss"].iloc[0] == pytest.approx(float(clip_loss(incomplete, complete)), rel=1e-4)
    cosine = torch.cosine_similarity(incomplete, complete).mean()
    assert history["val_cosine"].iloc[0] == pytest.approx(float(cosine), rel=1e-4)
    # and the last row is of the student that is returned
    assert history["val_loss"].iloc[-1] == pytest.approx(float(clip_loss(embedded, complete)), rel=1e-4)


def test_before_training_complete_images_are_embedded_as_the_teacher_does(teacher: nn.Module, pack: Pack):
    _, history = tune(teacher, pack, MaskSpec(), epochs=1)
    assert history["val_cosine"].iloc[0] == pytest.approx(1, abs=1e-6)
    with torch.no_grad():
        own = clip_loss(teacher(images_of(pack, "val")), teacher(images_of(pack, "val")))
    assert history["val_loss"].iloc[0] == pytest.approx(float(own), rel=1e-4)


@torch.no_grad()
def test_scores_are_of_the_same_pixels_at_every_call(teacher: nn.Module, pack: Pack):
    fill = fill_values("dataset_mean", torch.tensor(pack.band_means()))
    watch = Batches(pack, "val", batch_size=8, shuffle=True, drop_last=True)
    first = alignment_scores(copy.deepcopy(teacher), teacher, watch, SPEC, fill, CPU)
    assert alignment_scores(copy.deepcopy(teacher), teacher, watch, SPEC, fill, CPU) == first
    other = alignment_scores(teacher, teacher, watch, MaskSpec(SPEC.bands, seed=1), fill, CPU)
    assert other != first


def test_same_seed_same_run_and_another_seed_another(teacher: nn.Module, pack: Pack, tuned: Run):
    torch.manual_seed(12345)  # nothing may hang on what was drawn before
    assert_same_run(tune(teacher, pack), tuned)
    other = tune(teacher, pack, seed=1)[1]
    assert (other["train_loss"].iloc[1:] != tuned[1]["train_loss"].iloc[1:]).all()
    masked = tune(teacher, pack, MaskSpec(SPEC.bands, seed=1), epochs=1)[1]
    assert masked["val_loss"].iloc[0] != tuned[1]["val_loss"].iloc[0]


def test_an_interrupted_run_resumes_to_the_same_figures(
    teacher: nn.Module, pack: Pack, tuned: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    checkpoint = tmp_path / "last.ckpt"
    with monkeypatch.context() as patched:
        # the validation before, an epoch with its validation, then a third batch
        stop_at(patched, losses, 1 + 5 + 3)
        with pytest.raises(KeyboardInterrupt):
            tune(teacher, pack, checkpoint=checkpoint)
    (kept,) = tmp_path.iterdir()
    assert kept.match("last-????????.ckpt")
    assert_same_run(tune(teacher, pack, checkpoint=checkpoint), tuned)


@pytest.mark.parametrize("other", ["mask", "teacher", "settings", "code"])
def test_another_training_neither_goes_on_from_a_checkpoint_nor_overwrites_it(
    other: str, teacher: nn.Module, pack: Pack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A small encoder made anew has the old one's name and data; a student of the old one must not come back for it."""
    first = tune(teacher, pack, epochs=1, checkpoint=tmp_path / "last.ckpt")
    (kept,) = tmp_path.iterdir()
    before = kept.read_bytes()
    changed = {"mask": (teacher, pack, MaskSpec(bands=("B02",))), "teacher": (tiny_encoder(seed=9), pack)}
    arguments: tuple[Any, ...] = changed.get(other, (teacher, pack))
    options: dict[str, Any] = {"settings": {"encoder": "satclip"}} if other == "settings" else {}
    if other == "code":
        monkeypatch.setattr(align, "checksum_of_code", lambda *_: "of a module that was changed")
    found = tune(*arguments, epochs=1, checkpoint=tmp_path / "last.ckpt", **options)
    assert len(list(tmp_path.iterdir())) == 2
    assert kept.read_bytes() == before
    assert_same_run(found, tune(*arguments, epochs=1, **options))
    if other in ("mask", "teacher"):
        assert found[1]["val_loss"].iloc[-1] != first[1]["val_loss"].iloc[-1]


def test_test_images_are_never_seen(teacher: nn.Module, pack: Pack, tuned: Run, tmp_path: Path):
    """Another test split, the same run: nothing leaks from there."""
    other = generated_pack(tmp_path / "other", train=64, val=16, spoiled=["test"])
    assert not np.array_equal(other.images[other.rows("test")], pack.images[pack.rows("test")])
    fill = fill_values("dataset_mean", torch.tensor(pack.band_means()))
    options = {"epochs": 2, "batch_size": 16, "image_size": 32, "lr": 3e-4, "compute": CPU}
    assert_same_run(fine_tune(copy.deepcopy(teacher), other, SPEC, fill, **options), tuned)


def test_teacher_sees_complete_images_and_student_the_same_ones_incomplete(teacher: nn.Module, pack: Pack):
    """Thesis §3.3.1 and Figure 3.2: one flipped and blurred image, with pixels hidden from the student alone."""
    used, seen = copy.deepcopy(teacher), {"teacher": [], "student": []}

    def note(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen["teacher" if module is used else "student"].append((module.training, inputs[0].clone()))

    used.register_forward_pre_hook(note)  # the student, a copy, takes it along
    spec = MaskSpec(bands=("B08",), value=-1.0)
    fill = fill_values(-1.0, torch.tensor(pack.band_means()))
    options = {"epochs": 1, "batch_size": 16, "image_size": 48, "compute": CPU}
    fine_tune(used, pack, spec, fill, **options)
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


def test_of_a_crop_teacher_and_student_see_the_same_part(teacher: nn.Module, pack: Pack):
    """With nothing hidden a student that stays as it is agrees with its teacher, on crops too."""
    options = {"batch_norm": "frozen", "objective": Objective(0.0, 1.0), "lr": 1e-12, "epochs": 1}
    _, history = tune(teacher, pack, MaskSpec(SPEC.bands, ratio=0.0), crop_size=16, **options)
    assert history["train_loss"].iloc[1] < 1e-9
    cropped, whole = (tune(teacher, pack, crop_size=size, **options)[1] for size in (16, None))
    assert cropped["train_loss"].iloc[1] != whole["train_loss"].iloc[1]


def test_a_cosine_schedule_rises_then_falls_and_is_that_of_a_resumed_run(
    teacher: nn.Module, pack: Pack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    rates: list[float] = []
    original = torch.optim.AdamW.step

    def note(self: torch.optim.AdamW, *arguments: Any, **options: Any) -> Any:
        rates.append(self.param_groups[0]["lr"])
        return original(self, *arguments, **options)

    monkeypatch.setattr(torch.optim.AdamW, "step", note)
    whole = tune(teacher, pack, epochs=5, lr=1e-3, lr_schedule="cosine")
    by_epoch = rates[::4]
    assert by_epoch[0] == pytest.approx(1e-3)
    assert by_epoch == sorted(by_epoch, reverse=True)
    assert by_epoch[-1] < 1e-4
    rates.clear()
    tune(teacher, pack, epochs=10, lr=1e-3, lr_schedule="cosine")
    assert rates[0] < rates[4], "a first fifth of two epochs rises"
    with monkeypatch.context() as patched:
        stop_at(patched, losses, 11)
        with pytest.raises(KeyboardInterrupt):
            tune(teacher, pack, epochs=5, lr=1e-3, lr_schedule="cosine", checkpoint=tmp_path / "run.pt")
    resumed = tune(teacher, pack, epochs=5, lr=1e-3, lr_schedule="cosine", checkpoint=tmp_path / "run.pt")
    assert_same_run(resumed, whole)
    with pytest.raises(ValueError, match="unknown lr_schedule 'linear'; available: constant, cosine"):
        tune(teacher, pack, lr_schedule="linear")


# --- the small encoder ----------------------------------------------------------------------------------------------


def pretrain(pack: Pack, **options: Any) -> Run:
    model = tiny_encoder(seed=3)
    defaults = {"epochs": 3, "batch_size": 16, "image_size": 32, "crop_size": 32, "compute": CPU}
    return model, pretrain_small(model, pack, **{**defaults, **options})


@pytest.fixture(scope="module")
def stand_in(pack: Pack) -> Run:
    return pretrain(pack)


def test_small_encoder_learns_from_training_images_alone_and_every_draw_is_its_seeds(
    pack: Pack, stand_in: Run, tmp_path: Path
):
    model, history = stand_in
    assert history["train_loss"].iloc[-1] < 0.8 * history["train_loss"].iloc[1]
    assert not model.training
    torch.manual_seed(999)
    other = generated_pack(tmp_path / "other", train=64, val=16, spoiled=["val", "test"])
    assert_same_run(pretrain(other), stand_in)
    assert (pretrain(pack, seed=1)[1]["train_loss"].iloc[1:] != history["train_loss"].iloc[1:]).all()


def test_distilling_comes_nearer_to_the_teacher_without_labels_in_weights_that_fit_16_bits(
    pack: Pack, teacher: nn.Module, tmp_path: Path
):
    def distil(data: Pack) -> Run:
        model = tiny_encoder(seed=3)
        options = {"epochs": 4, "batch_size": 16, "image_size": 32, "compute": CPU}
        return model, align.distil(model, copy.deepcopy(teacher), data, **options)

    model, history = distil(pack)
    assert history["val_loss"].iloc[-1] < history["val_loss"].iloc[0]
    assert all(torch.equal(value, value.half().to(value)) for value in model.state_dict().values())
    assert history["train_loss"].iloc[-1] < 0.9 * history["train_loss"].iloc[1]
    other = generated_pack(tmp_path / "other", train=64, val=16, spoiled=["test"])
    assert_same_run(distil(other), (model, history))


def test_its_crops_depend_on_the_seed(pack: Pack, monkeypatch: pytest.MonkeyPatch):
    """Two seeds are two draws of everything: crops too, though kornia takes them from torch's own generator."""
    import kornia.augmentation

    original, found = kornia.augmentation.RandomResizedCrop.forward, []

    def forward(self: Any, images: Tensor, *arguments: Any, **options: Any) -> Tensor:
        out = original(self, images, *arguments, **options)
        found.append(self._params["src"].clone())
        return out

    monkeypatch.setattr(kornia.augmentation.RandomResizedCrop, "forward", forward)
    for seed in (0, 0, 1):
        pretrain(pack, epochs=1, seed=seed)
    first, again, other = found[:8], found[8:16], found[16:]
    assert all(map(torch.equal, first, again))
    assert not any(map(torch.equal, first, other))


def test_small_encoder_resumes_to_the_same_figures(
    pack: Pack, stand_in: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Crops, brightness and the learning rate of an epoch depend on its number, not on what ran before."""
    with monkeypatch.context() as patched:
        stop_at(patched, losses, 7)  # in the second epoch of four batches each
        with pytest.raises(KeyboardInterrupt):
            pretrain(pack, checkpoint=tmp_path / "last.ckpt")
    assert_same_run(pretrain(pack, checkpoint=tmp_path / "last.ckpt"), stand_in)


# --- what the parameters of notebook 03 come down to ----------------------------------------------------------------


@pytest.fixture(scope="module")
def given(sample_pack: Pack) -> dict[str, Any]:
    model = encoders.create_encoder(TINY, embedding_dim=16)
    card = encoders.Card("tiny", TINY, embedding_dim=16, image_size=32)
    encoders.save_encoder(model, card, params.experiment_folder("tuning") / "encoder")
    return {"experiment": "tuning", "image_size": 32, "epochs_one_band": 1, "epochs_several_bands": 2, "device": "cpu"}


def test_epochs_follow_the_number_of_bands_and_seeds_are_told_apart(given: dict[str, Any]):
    assert [Tuning.of({**given, "mask": mask}).epochs for mask in ("B8", "none", "B2 B3 B4")] == [1, 1, 2]
    for seeds in ([0, 0], []):
        with pytest.raises(ValueError, match="no seed twice"):
            Tuning.of({**given, "seeds": seeds})


def test_masks_of_training_and_of_testing(given: dict[str, Any]):
    of_masks = {"mask_value": "-1", "mask_schedule": "gradual", "mask_ratio": 0.8, "mask_shape": "stripe"}
    tuning = Tuning.of({**given, "mask": "B2 B8", **of_masks})
    training = MaskSpec(("B02", "B08"), 0.8, -1.0, "gradual", 0.2, 4, seed=3, shape="stripe")
    assert tuning.spec(3) == training
    assert tuning.spec(3, scheduled=False) == MaskSpec(("B02", "B08"), 0.8, -1.0, seed=3, shape="stripe")
    assert tuning.fill.tolist() == [-1.0] * 13


@pytest.mark.parametrize("value", FITTED)
def test_a_fitted_mask_value_is_made_for_the_masks_bands(value: str, given: dict[str, Any]):
    tuning = Tuning.of({**given, "mask": "B2 B8", "mask_value": value})
    assert tuning.fill.bands == tuning.spec(0).bands == ("B02", "B08")
    assert tuning.spec(0).value == value  # which the card of the fine-tuned encoder says
    images = torch.rand(2, 13, 32, 32)
    assert masks.mask_batch(images, torch.arange(2), tuning.spec(0), tuning.fill).isfinite().all()
    assert isinstance(Tuning.of({**given, "mask": "none", "mask_value": value}).fill, Tensor)


def test_table_and_encoders_of_a_run_and_a_second_one_reads_its_checkpoints(given: dict[str, Any]):
    tuning = Tuning.of({**given, "seeds": [0, 1]})
    students, history = tuning.fine_tune()
    assert not same_weights(students[0], students[1])
    read, again = Tuning.of({**given, "seeds": [0, 1]}).fine_tune()
    assert again.equals(history)
    assert all(same_weights(students[seed], read[seed]) for seed in (0, 1))
    table = tuning.save(students, history)
    counts = table.groupby(["encoder_seed", "metric"]).size()
    assert counts.to_dict() == {
        (seed, metric): 1 if metric == "test_loss" else 2
        for seed in (0, 1)
        for metric in ("test_loss", "train_loss", "val_loss", "val_cosine")
    }
    loaded, card = encoders.load_encoder(tuning.folder / "encoder-seed1")
    assert same_weights(loaded, students[1])
    assert (card.seed, card.parent, list(card.mask["bands"])) == (1, "tiny", ["B08"])
    assert len(list((tuning.folder / "checkpoints").iterdir())) == 2
    Tuning.of({**given, "mask_value": "ridge"}).fine_tune()
    assert len(list((tuning.folder / "checkpoints").iterdir())) == 3, "another fill is another training"
