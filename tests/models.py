"""What the tests of the model side share: small generated images, small encoders, and scripts in their own process.

Every image made here is generated: random spectra times smooth patterns, with a dark B10. None is a satellite image.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor, nn

from bandmask import bands
from bandmask.encoders import create_encoder
from bandmask.packs import IGNORE, Pack, write_pack

ABOUT: dict[str, Any] = {"name": "generated", "source": "generated for a test"}
TINY = "test_resnet"  # timm's smallest ResNet: the same code and taps as ResNet50, 0.4 M parameters
ROOT = Path(__file__).resolve().parent.parent
torch.set_num_threads(1)  # models this small gain nothing from more, and crawl where threads wait for a busy core


def tiny_encoder(embedding_dim: int = 16, seed: int = 0) -> nn.Module:
    return create_encoder(TINY, embedding_dim=embedding_dim, seed=seed).eval()


class InDouble(nn.Module):
    """An encoder that computes in float64, where sums in another order are the same to many digits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.feature_info = model.double(), model.feature_info

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images.double())

    def forward_intermediates(self, images: Tensor, indices: list[int]) -> Any:
        return self.model.forward_intermediates(images.double(), indices=indices)

    def forward_head(self, features: Tensor) -> Tensor:
        return self.model.forward_head(features)


def save(content: Any, path: Path, **options: Any) -> Path:
    torch.save(content, path, **options)
    return path


def scattered(model: nn.Module) -> nn.Module:
    """No norm or bias at its initial value, so that none can be left out unnoticed."""
    draw = torch.Generator().manual_seed(11)
    for tensor in model.state_dict().values():
        if tensor.is_floating_point() and tensor.ndim == 1:
            tensor.uniform_(0.5, 1.5, generator=draw)
    return model.eval()


def settled_encoder(pack: Pack, seed: int = 0, passes: int = 30) -> nn.Module:
    """A tiny encoder whose batch norms know the pack, as those of a pre-trained one know its images."""
    model = tiny_encoder(seed=seed).train()
    images = torch.tensor(pack.images[pack.rows("train")].astype(np.float32) / 10_000)
    with torch.no_grad():
        for _ in range(passes):
            model(images)
    return model.eval()


def generated_images(count: int, size: int = 32, seed: int = 0, classes: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """DN (N, 13, S, S) uint16 and labels (N,): a class has its own spectrum, an image its own shade and pattern."""
    draw = np.random.default_rng(seed)
    spectra = np.random.default_rng(99).uniform(600, 4000, (classes, 13))
    labels = np.arange(count) % classes
    y, x = np.mgrid[:size, :size] / size
    images = np.empty((count, 13, size, size))
    for row, label in enumerate(labels):
        spectrum = spectra[label] * draw.uniform(0.7, 1.3, 13)
        wave = np.sin(2 * np.pi * (draw.uniform(0.5, 3) * x + draw.uniform(0.5, 3) * y + draw.random()))
        images[row] = spectrum[:, None, None] * (1 + 0.4 * wave) + draw.normal(0, 30, (13, size, size))
    images[:, bands.NAMES.index("B10")] = draw.integers(5, 20, (count, size, size))
    return images.clip(0, 60_000).astype(np.uint16), labels


def generated_pack(
    path: Path,
    *,
    train: int = 16,
    val: int = 8,
    test: int = 8,
    size: int = 32,
    seed: int = 0,
    classes: int = 3,
    spoiled: Sequence[str] = (),
) -> Pack:
    """A pack of generated images; those of `spoiled` splits are others, under the same checksum."""
    images, labels = generated_images(train + val + test, size, seed, classes)
    index = pd.DataFrame({"label": labels, "split": ["train"] * train + ["val"] * val + ["test"] * test})
    rows = index["split"].isin(spoiled).to_numpy()
    images[rows] = generated_images(len(images), size, seed + 1, classes)[0][rows]
    checksum = f"generated-{train}-{val}-{test}-{size}-{seed}"
    about = {**ABOUT, "classes": [f"class {c}" for c in range(classes)], "source_checksum": checksum}
    return write_pack(path, images.__getitem__, index, **about)


def labelled_pack(path: Path, *, train: int = 12, val: int = 4, test: int = 4, size: int = 64) -> Pack:
    """Generated images with three classes of pixels: the right half shows the next class, the top rows have no label.

    Test images come in two groups.
    """
    count = train + val + test
    images, labels = generated_images(count + 1, size)
    images[:-1, :, :, size // 2 :] = images[1:, :, :, size // 2 :]
    targets = np.repeat(labels.astype(np.uint8), size * size).reshape(-1, size, size)
    targets[:, :, size // 2 :] = (targets[:, :, size // 2 :] + 1) % 3
    targets[:, :5] = IGNORE
    splits = ["train"] * train + ["val"] * val + ["test"] * test
    groups = splits[:-test] + [f"group {row * 2 // test}" for row in range(test)]
    index = pd.DataFrame({"split": splits, "group": groups})
    about = {**ABOUT, "classes": ["a", "b", "c"], "source_checksum": f"labelled-{count}-{size}", "targets": True}
    return write_pack(path, lambda row: (images[row], targets[row]), index, **about)


def run_script(code: str, *arguments: object, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Run Python code in a process of its own, which may be killed or run out of disk."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    options: dict[str, Any] = {"capture_output": True, "text": True, "timeout": 300, "check": False}
    return subprocess.run([sys.executable, "-c", code, *map(str, arguments)], cwd=cwd, env=environment, **options)


class Evil:
    """Unpickling it runs code: it makes a folder."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return os.mkdir, (str(self.marker),)


def same_weights(first: nn.Module, second: nn.Module) -> bool:
    ours, theirs = first.state_dict(), second.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


Run = tuple[nn.Module, pd.DataFrame]  # a trained model and its history


def assert_same_run(found: Run, expected: Run) -> None:
    """The same weights and the same figures to the last bit; speeds differ."""
    one, other = (history.drop(columns="images_per_second", errors="ignore") for _, history in (found, expected))
    pd.testing.assert_frame_equal(one, other, check_exact=True)
    assert same_weights(found[0], expected[0])


def stop_at(monkeypatch: pytest.MonkeyPatch, module: ModuleType, call: int, name: str = "clip_loss") -> None:
    """Interrupt at a given call of a module's loss, as Ctrl-C would."""
    calls, original = [], getattr(module, name)

    def loss(*arguments: Any, **options: Any) -> Tensor:
        calls.append(1)
        if len(calls) == call:
            raise KeyboardInterrupt
        return original(*arguments, **options)

    monkeypatch.setattr(module, name, loss)
