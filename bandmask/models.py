"""Models that people run every day, as `guard` takes them, by name; loaded if their package is installed.

Weights of others are never in this repository. `pip install 'bandmask[models]'` brings lightgbm and onnxruntime; each
error says how its weights are had.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np


def ask(model: Any, values: np.ndarray) -> np.ndarray:
    """What a model of any kind says to float32 values: torch, ONNX, LightGBM, scikit-learn, a function."""
    if hasattr(model, "get_inputs") and hasattr(model, "run"):  # an ONNX session
        return np.asarray(model.run(None, {model.get_inputs()[0].name: values})[0])
    if hasattr(model, "parameters") and hasattr(model, "state_dict"):  # a torch module
        import torch

        first = next(model.parameters(), None)
        with torch.inference_mode():
            found = model(torch.from_numpy(values).to(first.device if first is not None else "cpu"))
        return found.cpu().numpy()
    return np.asarray(model.predict(values) if hasattr(model, "predict") else model(values))


def s2cloudless() -> dict[str, Any]:
    """Sentinel Hub's cloud probability of a pixel; cloudy above 0.4. Model CC BY-SA 4.0.

    Its package wants opencv and sentinelhub; the booster opens by path, with lightgbm alone.
    """
    path = _file("s2cloudless", "models/pixel_s2_cloud_detector_lightGBM_v0.1.txt")
    try:
        from lightgbm import Booster
    except ImportError as error:
        raise FileNotFoundError("s2cloudless needs lightgbm: pip install 'bandmask[models]'") from error
    bands = "B01 B02 B04 B05 B08 B8A B09 B10 B11 B12"
    return {"predict": Booster(model_file=str(path)), "bands": bands, "takes": "pixels", "decide": 0.4}


def ukis_csmask(kind: str) -> dict[str, Any]:
    """DLR's U-Net for clear, cloud, shadow, at about 30 m: at 10 m it calls clear land shadow. Apache-2.0.

    `kind` is such as `6b-l1c`: six bands or four, L1C or L2A. The float16 weights of its ONNX file go into the same
    network in torch, as float32: any side that is a multiple of 32, and a network that can be aligned.
    """
    import torch
    from segmentation_models_pytorch import Unet

    path = _file("ukis_csmask", f"model_{kind.replace('-', '_')}.onnx")
    card = json.loads(path.with_suffix(".json").read_text())["data"]
    mean, sd = card["dataset_statistics"]["img"]
    network = Unet("efficientnet-b4", encoder_weights=None, in_channels=len(mean), classes=3)
    saved = {name.removeprefix("model."): torch.from_numpy(v.astype(np.float32)) for name, v in _initialisers(path)}
    found = network.load_state_dict(saved, strict=False)
    classifier = ("encoder._conv_head.", "encoder._bn1.", "encoder._fc.")  # which a U-Net leaves out
    unused = [n for n in found.missing_keys if not n.startswith(classifier) and not n.endswith("num_batches_tracked")]
    if unused or found.unexpected_keys:
        raise ValueError(f"{path} is another network: it lacks {unused[:3]}, and holds {found.unexpected_keys[:3]}")
    bands, level = card["dataset_statistics"]["band_names"], kind[-3:].upper()
    normal = {"mean": mean, "sd": sd, "multiple": 32, "level": level}
    return {"predict": network.eval(), "bands": bands, **normal}


def snap(variable: str, view_zenith: float = 5.0, sun_zenith: float = 40.0, azimuth: float = 90.0) -> dict[str, Any]:
    """SNAP's biophysical nets (`lai`, `fapar`, `fcover`, `lai_cab`, `lai_cw`), from satellitetools' text files (MIT).

    Angles are in degrees, `azimuth` between sun and view. Source: Weiss and Baret 2016 (ATBD of S2ToolBox L2B, v1.1).
    """
    name = {"lai": "LAI", "fapar": "FAPAR", "fcover": "FCOVER", "lai_cab": "LAI_Cab", "lai_cw": "LAI_Cw"}[variable]
    folder = _file("satellitetools", f"biophys/snap-auxdata/biophysical/2_1/{name}")

    def read(part: str) -> np.ndarray:
        return np.loadtxt(folder / f"{name}_{part}", delimiter=",", ndmin=2)

    (low, high), (least, most) = read("Normalisation").T, read("Denormalisation")[0]
    inner, bias = read("Weights_Layer1_Neurons"), read("Weights_Layer1_Bias")[0]
    outer, last = read("Weights_Layer2_Neurons").reshape(-1), float(read("Weights_Layer2_Bias")[0, 0])
    angles = np.cos(np.radians([view_zenith, sun_zenith, azimuth]))

    def predict(pixels: np.ndarray) -> np.ndarray:  # (n, 8), or (n, 11) with cosines of the three angles
        every = pixels if pixels.shape[1] == 11 else np.hstack([pixels, np.broadcast_to(angles, (len(pixels), 3))])
        found = np.tanh((2 * (every - low) / (high - low) - 1) @ inner.T + bias) @ outer + last
        return 0.5 * (found + 1) * (most - least) + least

    return {"predict": predict, "bands": "B03 B04 B05 B06 B07 B8A B11 B12", "takes": "pixels", "level": "L2A"}


_LOADERS: dict[str, Any] = {
    "s2cloudless": s2cloudless,
    **{f"ukis-csmask-{kind}": partial(ukis_csmask, kind) for kind in ("4b-l1c", "6b-l1c", "4b-l2a", "6b-l2a")},
    **{f"snap-{name}": partial(snap, name) for name in ("lai", "fapar", "fcover", "lai_cab", "lai_cw")},
}
NAMES = tuple(_LOADERS)


def load(name: str) -> dict[str, Any]:
    """What `guard` needs of a model by name: `predict`, `bands` and the rest.

    Raises:
        ValueError: no such model.
        FileNotFoundError: its package, or what reads its weights, is not installed; says how to get it.
    """
    if name not in _LOADERS:
        raise ValueError(f"unknown model {name!r}; available: {', '.join(NAMES)}")
    return _LOADERS[name]()


def installed() -> tuple[str, ...]:
    """Those of `NAMES` that can be loaded here."""
    packages = {"s2cloudless": ("s2cloudless", "lightgbm"), "ukis": ("ukis_csmask",), "snap": ("satellitetools",)}
    there = {key for key, needs in packages.items() if all(importlib.util.find_spec(need) for need in needs)}
    return tuple(name for name in NAMES if name.split("-")[0] in there)


def _file(package: str, part: str) -> Path:
    """A file of an installed package, none of whose code is run."""
    found = importlib.util.find_spec(package)
    path = Path(found.origin).parent / part if found and found.origin else None
    if path is None or not path.exists():
        project = package.replace("_", "-")
        raise FileNotFoundError(f"{project} or its {part} is not installed: pip install --no-deps {project}")
    return path


def _initialisers(path: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Name and values of an ONNX file's weights: graph (field 7), initializer (5), its dims, type, name and raw data.

    Source: onnx.proto of ONNX 1.16; the onnx package would be a dependency for these lines.
    """
    types = {1: "<f4", 6: "<i4", 7: "<i8", 10: "<f2"}
    graph = next(value for number, value in _fields(memoryview(path.read_bytes())) if number == 7)
    for number, tensor in _fields(graph):
        if number == 5:
            parts = list(_fields(tensor))
            own = dict(parts)
            shape = [value for field, value in parts if field == 1]
            yield bytes(own[8]).decode(), np.frombuffer(own[9], types[own[2]]).reshape(shape)


def _fields(message: memoryview) -> Iterator[tuple[int, Any]]:
    """Number and value of each field of a protocol buffer."""
    at = 0

    def whole() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = message[at]
            at, value, shift = at + 1, value | (byte & 127) << shift, shift + 7
            if byte < 128:
                return value

    while at < len(message):
        key = whole()
        if key & 7 == 0:
            yield key >> 3, whole()
            continue
        size = {1: 8, 5: 4}.get(key & 7) or whole()
        yield key >> 3, message[at : at + size]
        at += size
