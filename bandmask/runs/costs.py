"""What a run puts through networks, counted before it runs, and how fast this machine does it, measured.

The counts are those of `alignment.fine_tune`, `classification.train_heads` and `segmentation.train_decoders`, as
notebooks 03 to 05 call them.
"""

from __future__ import annotations

import copy
import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import astuple, dataclass
from typing import Any

import torch
from torch import Tensor

from bandmask.encoders import create_encoder, embed
from bandmask.masking import MaskSpec, mask_batch
from bandmask.objectives import clip_loss
from bandmask.runs.inputs import Images
from bandmask.segmentation import make_decoders, sum_of_losses
from bandmask.training import Compute, adamw
from bandmask.views import TAPS, View

WORK = ("embedding", "fine_tuning", "mapping", "decoder_training", "decoding")
WITHOUT_FINE_TUNING = 2  # methods on incomplete images, besides one fine-tuned encoder a seed: pre-trained and ridge


@dataclass(frozen=True)
class Cost:
    """Images through networks, and how many heads and decoders are trained.

    Attributes:
        embedding: images through a frozen encoder, to embeddings.
        fine_tuning: images of fine-tuning steps; each goes through the teacher, and through the student and back.
        mapping: images through a frozen encoder, to the feature maps that decoders take.
        decoder_training: images of decoder steps, the decoders of all seeds side by side.
        decoding: images through these decoders without a step.
        heads: scene heads trained.
        decoders: decoders trained.
    """

    embedding: int = 0
    fine_tuning: int = 0
    mapping: int = 0
    decoder_training: int = 0
    decoding: int = 0
    heads: int = 0
    decoders: int = 0

    def __add__(self, other: Cost) -> Cost:
        """The cost of both."""
        return Cost(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def __mul__(self, times: int) -> Cost:
        """The cost of doing it several times."""
        return Cost(*(times * value for value in astuple(self)))

    @property
    def forward(self) -> int:
        """Images through frozen encoders."""
        return self.embedding + self.mapping


@dataclass(frozen=True)
class Throughput:
    """Images per second of each kind of work in `Cost`; infinite where there is none. `how` says what was measured."""

    embedding: float
    fine_tuning: float
    mapping: float = math.inf
    decoder_training: float = math.inf
    decoding: float = math.inf
    how: str = ""

    def hours(self, cost: Cost) -> float:
        """How long that work takes at this speed."""
        return sum(getattr(cost, work) / getattr(self, work) for work in WORK) / 3600


def run_cost(
    parameters: Mapping[str, Any], *, hidden: int, first: bool, scenes: Images, pixels: Images | None = None
) -> Cost:
    """Everything that one run, a mask with all its seeds and tasks, puts through networks.

    Not counted: training a stand-in, which an experiment does once, and figures.

    Args:
        parameters: of its experiment, complete.
        hidden: number of bands that its mask hides.
        first: it trains the head and the decoder in service; the other runs only load them.
        scenes: counts of `dataset`.
        pixels: counts of `segmentation_dataset`; needed for segmentation only.

    Raises:
        ValueError: segmentation without its counts.
    """
    total = _alignment(parameters, hidden, scenes) * len(parameters["seeds"])
    methods = WITHOUT_FINE_TUNING + len(parameters["seeds"]) if hidden else 0
    if "classification" in parameters["tasks"]:
        total += _classification(parameters, methods, first, scenes)
    if "segmentation" in parameters["tasks"]:
        if pixels is None:
            raise ValueError("this run segments: give the counts of segmentation_dataset as pixels")
        total += _segmentation(parameters, methods, first, pixels)
    return total


def epochs_of(parameters: Mapping[str, Any], hidden: int) -> int:
    """Epochs of fine-tuning for a mask of so many bands."""
    return int(parameters["epochs_one_band" if hidden <= 1 else "epochs_several_bands"])


def _alignment(parameters: Mapping[str, Any], hidden: int, images: Images) -> Cost:
    """One seed; teacher and student see validation images before training and each epoch, test images at the end."""
    epochs, batch = epochs_of(parameters, hidden), parameters["batch_size"]
    watched = _full_batches(images.val, min(batch, images.val)) * (epochs + 1) + _full_batches(images.test, batch)
    return Cost(embedding=2 * watched, fine_tuning=_full_batches(images.train, batch) * epochs)


def _classification(parameters: Mapping[str, Any], methods: int, first: bool, images: Images) -> Cost:
    """The head in service, trained or loaded, and tested; then each method with it and with heads of its own."""
    epochs = parameters["head_epochs"]
    passes = min(parameters["encoder_passes"], epochs) or epochs
    training = Cost(embedding=passes * images.train + images.val, heads=len(parameters["head_seeds"]))
    in_service = training if first else Cost(embedding=images.val)  # a loaded head is watched once more
    return in_service + training * methods + Cost(embedding=images.test) * (1 + 2 * methods)


def _segmentation(parameters: Mapping[str, Any], methods: int, first: bool, images: Images) -> Cost:
    """As for scenes; but without passes to keep, validation images are mapped anew each epoch."""
    epochs = parameters["decoder_epochs"]
    passes = min(parameters["decoder_passes"], epochs)
    steps = _full_batches(images.train, min(parameters["decoder_batch_size"], images.train)) * epochs
    watched = images.val * (epochs + 1)
    training = Cost(
        mapping=passes * images.train + images.val if passes else steps + watched,
        decoder_training=steps,
        decoding=watched,
        decoders=len(parameters["decoder_seeds"]),
    )
    tested = Cost(mapping=images.test, decoding=images.test)
    return training * (methods + first) + tested * (1 + 2 * methods)


def _full_batches(images: int, size: int) -> int:
    return images // size * size if size else 0


def measure(
    parameters: Mapping[str, Any], *, device: str = "auto", batch_size: int | None = None, seconds: float = 5.0
) -> Throughput:
    """Images per second of an experiment's kinds of work, on random images and weights: speed doesn't depend on them.

    Models are not compiled, as they are in runs on CUDA: compiling takes longer than measuring.

    Args:
        parameters: of the experiment, complete.
        device: `auto`, `cpu`, `cuda`.
        batch_size: images a step; None: 2 on a CPU, where more gain little, else those of the experiment.
        seconds: after so many no further round of one kind begins; two are timed at least, after one to warm up.
    """
    compute = Compute.of(device, compile=False)
    on_cpu = compute.device.type == "cpu"
    architecture = parameters["architecture"] if parameters["encoder"] == "stand-in" else "resnet50"
    encoder = compute.place(create_encoder(architecture)).eval().requires_grad_(False)
    size, batch = parameters["image_size"], batch_size or (2 if on_cpu else parameters["batch_size"])
    images = torch.rand(batch, 13, size, size, device=compute.device)
    found = {
        "embedding": _rate(_embedding_step(encoder, images, compute), batch, compute, seconds),
        "fine_tuning": _rate(_fine_tuning_step(encoder, images, compute), batch, compute, seconds),
    }
    if "segmentation" in parameters["tasks"]:
        size = parameters["segmentation_image_size"]
        batch = batch_size or (2 if on_cpu else parameters["decoder_batch_size"])
        images = torch.rand(batch, 13, size, size, device=compute.device)
        steps = _decoder_steps(parameters, encoder, images, compute)
        found |= {work: _rate(step, batch, compute, seconds) for work, step in steps.items()}
    name = f"CPU (threads: {torch.get_num_threads()})" if on_cpu else torch.cuda.get_device_name(compute.device)
    precision = "bfloat16, not compiled" if compute.amp else "float32"
    how = f"{architecture} at {parameters['image_size']} px, batches of {batch}, {precision}, on {name}"
    return Throughput(**found, how=how)


def _embedding_step(encoder: torch.nn.Module, images: Tensor, compute: Compute) -> Callable[[], None]:
    @torch.no_grad()
    def step() -> None:
        with compute.autocast():
            encoder(compute.images(images))

    return step


def _fine_tuning_step(encoder: torch.nn.Module, images: Tensor, compute: Compute) -> Callable[[], None]:
    """Hide pixels, embed with teacher and student, step: the body of `alignment.fine_tune`."""
    student = copy.deepcopy(encoder).train().requires_grad_(True)
    optimizer = adamw(student, lr=1e-6, weight_decay=0.01)
    fill = torch.full((13,), 0.1, device=compute.device)
    samples = torch.arange(len(images), device=compute.device)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        incomplete = mask_batch(images, samples, MaskSpec(("B08",)), fill)
        with compute.autocast():
            with torch.no_grad():
                target = encoder(compute.images(images))
            loss = clip_loss(student(compute.images(incomplete)), target)
        loss.backward()
        optimizer.step()

    return step


def _decoder_steps(
    parameters: Mapping[str, Any], encoder: torch.nn.Module, images: Tensor, compute: Compute
) -> dict[str, Callable[[], object]]:
    """Feature maps of a batch; a step of all decoders on them; a forward of all decoders."""
    view = View(encoder, MaskSpec(), torch.zeros(13), images.shape[-1])
    decoders, _ = make_decoders(
        view, 10, parameters["decoder_seeds"], width=parameters["decoder_width"], compute=compute
    )
    decoders.to(compute.device)
    optimizer = torch.optim.Adam(decoders.parameters(), lr=1e-6)
    size = (images.shape[-2], images.shape[-1])
    targets = torch.randint(10, (len(images), *size), device=compute.device)

    @torch.no_grad()
    def feature_maps() -> dict[str, Tensor]:
        with compute.autocast():
            return embed(encoder, compute.images(images), TAPS)[1]

    maps = feature_maps()

    def logits() -> Tensor:
        with compute.autocast():
            return decoders(maps[TAPS[0]], maps[TAPS[1]], size)

    def train() -> None:
        decoders.train()
        optimizer.zero_grad(set_to_none=True)
        sum_of_losses(logits().float(), targets).backward()
        optimizer.step()

    @torch.no_grad()
    def decode() -> None:
        decoders.eval()
        logits()

    return {"mapping": feature_maps, "decoder_training": train, "decoding": decode}


def _rate(step: Callable[[], object], images: int, compute: Compute, seconds: float) -> float:
    """Images per second: the median round, after one to warm up."""
    rounds: list[float] = []
    begun = time.perf_counter()
    while len(rounds) < 3 or (time.perf_counter() - begun < seconds and len(rounds) < 20):
        started = time.perf_counter()
        step()
        if compute.device.type == "cuda":
            torch.cuda.synchronize(compute.device)
        rounds.append(time.perf_counter() - started)
    return images / statistics.median(rounds[1:])
