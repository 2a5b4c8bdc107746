"""Shared by all tests: outputs in a temporary folder, small generated packs, the sample, real EuroSAT where it is."""

import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pandas as pd
import pytest
import torch

from bandmask import bands, datasets, files
from bandmask.packs import Pack, write_pack

# A busy machine is no failure, so no deadline; and no database of examples in the repository.
hypothesis.settings.register_profile("bandmask", deadline=None, max_examples=60, database=None, print_blob=True)
hypothesis.settings.load_profile("bandmask")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests first, so that at the end no core waits for one that began late."""
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])


@pytest.fixture(scope="session", autouse=True)
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """`BANDMASK_OUTPUTS` of the session, so that no test writes to the user's `outputs/`."""
    folder = tmp_path_factory.mktemp("outputs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BANDMASK_OUTPUTS", str(folder))
        yield folder


def generated_images(n: int, size: int, seed: int = 0, classes: int = 3) -> np.ndarray:
    """(n, 13, size, size) uint16 DN, generated: B01 of image i is 1000 + i throughout, B10 is dark.

    The other bands are noise around a level that rises with the class and with the band, so that a class can be
    learned and no two bands are alike.
    """
    draw = np.random.default_rng(seed)
    level = 600 + 150 * np.arange(13)[None, :, None, None] + 900 * _labels(n, classes)[:, None, None, None]
    images = draw.normal(level, 120, (n, 13, size, size)).clip(100, 65535).astype(np.uint16)
    images[:, bands.NAMES.index("B01")] = 1000 + np.arange(n, dtype=np.uint16)[:, None, None]
    images[:, bands.NAMES.index("B10")] = draw.integers(3, 20, (n, size, size))
    return images


def generated_index(n: int, classes: int = 3) -> pd.DataFrame:
    """Labels, and splits train/val/test in the proportion 4:1:1; every class is in every split if n ≥ 18."""
    splits = np.array(["train", "train", "train", "train", "val", "test"])[np.arange(n) % 6]
    files = [f"generated/{i}" for i in range(n)]
    return pd.DataFrame({"file": files, "label": _labels(n, classes), "split": splits})


def _labels(n: int, classes: int) -> np.ndarray:
    return (np.arange(n) + np.arange(n) // 6) % classes


def reflectance(pack: Pack, rows: np.ndarray) -> torch.Tensor:
    """Images of these rows as encoders get them, (n, 13, H, W) float32."""
    return torch.from_numpy(pack.images[rows].astype(np.float32) / 10_000)


@pytest.fixture(scope="session")
def make_pack() -> Callable[..., Pack]:
    """`make_pack(folder, n=24, size=8, …)`: a small pack of generated data, written by `write_pack`."""

    def make(folder, n=24, size=8, *, classes=3, seed=0, images=None, index=None, **card) -> Pack:
        images = generated_images(n, size, seed, classes) if images is None else images
        index = generated_index(len(images), classes) if index is None else index
        about = {"name": "generated", "classes": [f"class {c}" for c in range(classes)]}
        about |= {"source": "generated data, no satellite saw it", "source_checksum": f"generated-{seed}"}
        return write_pack(Path(folder) / "generated", images.__getitem__, index, **about | card)

    return make


@pytest.fixture(scope="session")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Pack:
    """Generated images to align on, to be read only."""
    from models import generated_pack  # torch, for those who ask alone

    return generated_pack(tmp_path_factory.mktemp("packs") / "generated", train=64, val=16)


@pytest.fixture(scope="session")
def teacher(pack: Pack) -> Any:
    """A tiny encoder that knows them, to be copied."""
    from models import settled_encoder

    return settled_encoder(pack)


@pytest.fixture(scope="session")
def sample_pack(outputs: Path) -> Pack:
    """The embedded sample, packed once a session, to be read only."""
    return datasets.open_dataset("sample")


@pytest.fixture(scope="session")
def eurosat_source() -> Path:
    """The real EuroSAT zip or folder; tests that need it are skipped where there is none."""
    try:
        return datasets.find_source("eurosat")
    except FileNotFoundError:
        pytest.skip("BANDMASK_DATA is absent: no real EuroSAT files on this machine")


def real_tiles() -> list[Path]:
    """Files of real tiles, L1C and L2A; a test that needs them is skipped where there are none."""
    found = sorted(root.glob("tiles/*_S2L*.tif")) if (root := files.data_root()) else []
    return found or pytest.skip("no real tiles: BANDMASK_DATA has no folder `tiles`")


@pytest.fixture(scope="session")
def eurosat_pack(eurosat_source: Path, outputs: Path) -> Pack:
    """Real EuroSAT images, packed once a session, to be read only."""
    return datasets.open_dataset("eurosat")


@pytest.fixture(scope="session")
def on_small_disk(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., subprocess.CompletedProcess[str]]:
    """`on_small_disk(script, options)`: run Python with its working directory on a tmpfs of its own.

    The mount lives in a name space of the subprocess and ends with it.
    """
    disk = tmp_path_factory.mktemp("disk")
    enter = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]

    def run(script: str, options: str = "size=4m", then: str = "true") -> subprocess.CompletedProcess[str]:
        shell = f'mount -t tmpfs -o {options} tmpfs "$1" && cd "$1" && {then} && exec "$2" -c "$3"'
        command = [*enter, shell, "sh", str(disk), sys.executable, script]
        return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)

    try:
        works = run("print('mounted')").stdout == "mounted\n"
    except FileNotFoundError:
        works = False
    if not works:
        pytest.skip("no small disk: `unshare` can't mount a tmpfs for this user here")
    return run
