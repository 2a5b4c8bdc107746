"""Models that people run every day, as `guard` takes them, by name; loaded if their package is installed.

Weights of others are never in this repository. `pip install 'bandmask[models]'` brings lightgbm and onnxruntime; each
error says how its weights are had.
"""

import importlib.util
import json
import threading
from functools import partial
from typing import Any

import numpy as np

from bandmask import files
from bandmask.images import as_array

_MODES = threading.RLock()  # another thread would put a module back into training while this one asks it


def ask(model: Any, values: np.ndarray) -> np.ndarray:
    """What a model of any kind says to float32: torch, in eval mode, ONNX, LightGBM, scikit-learn, a function.

    NaN where an answer is masked. A ValueError of several answers: which one is meant, nobody says.
    """
    if hasattr(model, "get_inputs") and hasattr(model, "run"):  # an ONNX session
        found, *more = model.run(None, {model.get_inputs()[0].name: values})
        found = (found, *more) if more else found
    elif hasattr(model, "parameters") and hasattr(model, "state_dict"):  # a torch module
        import torch

        with _MODES:
            first, training = next(model.parameters(), None), [part for part in model.modules() if part.training]
            try:  # in training it would answer by the batch, or by chance, and its running means would move
                model.eval()
                with torch.inference_mode():
                    found = model(torch.from_numpy(values).to(first.device if first is not None else "cpu"))
            finally:
                for part in training:
                    part.training = True
    else:
        found = model.predict(values) if hasattr(model, "predict") else model(values)
    if isinstance(found, tuple | dict) or (isinstance(found, list) and any(map(np.ndim, found))):
        parts = ", ".join(map(str, found)) if isinstance(found, dict) else len(found)
        raise ValueError(f"the model answers a {type(found).__name__} of {parts}; give one that answers one array")
    return np.array(found if hasattr(found, "dims") else as_array(found))  # a copy: it may write there again


def s2cloudless() -> dict[str, Any]:
    """Sentinel Hub's cloud probability of a pixel; cloudy above 0.4. Model CC BY-SA 4.0.

    Its package wants opencv and sentinelhub; the booster opens by path, with lightgbm alone.
    """
    path = files.of_package("s2cloudless", "models/pixel_s2_cloud_detector_lightGBM_v0.1.txt")
    booster = _reader("lightgbm").Booster(model_file=str(path))
    return {"predict": booster, "bands": "B01 B02 B04 B05 B08 B8A B09 B10 B11 B12", "takes": "pixels", "decide": 0.4}


def ukis_csmask(kind: str) -> dict[str, Any]:
    """DLR's U-Net for clear, cloud, shadow, at about 30 m: at 10 m it calls clear land shadow. Apache-2.0.

    `kind` is such as `6b-l1c`: six bands or four, L1C or L2A. It takes squares of 256 pixels, here 32 of them around.
    """
    path = files.of_package("ukis_csmask", f"model_{kind.replace('-', '_')}.onnx")
    known = json.loads(path.with_suffix(".json").read_text())["data"]["dataset_statistics"]
    mean, sd = known["img"]
    session = _reader("onnxruntime").InferenceSession(str(path))
    square = {"multiple": 256, "tile": 192, "margin": 32, "level": kind[-3:].upper()}
    return {"predict": session, "bands": known["band_names"], "mean": mean, "sd": sd, **square}


def snap(name: str) -> dict[str, Any]:
    """SNAP's biophysical nets (`LAI`, `FAPAR`, `FCOVER`, `LAI_Cab`, `LAI_Cw`), from satellitetools' text files (MIT).

    View from 5° of the zenith, sun 40°, 90° between them. Source: Weiss and Baret 2016 (ATBD of S2ToolBox L2B, v1.1).
    """
    folder = files.of_package("satellitetools", f"biophys/snap-auxdata/biophysical/2_1/{name}")

    def read(part: str) -> np.ndarray:
        return np.loadtxt(folder / f"{name}_{part}", delimiter=",", ndmin=2)

    (low, high), (least, most) = read("Normalisation").T, read("Denormalisation")[0]
    inner, bias = read("Weights_Layer1_Neurons"), read("Weights_Layer1_Bias")[0]
    outer, last = read("Weights_Layer2_Neurons").reshape(-1), float(read("Weights_Layer2_Bias")[0, 0])
    angles = np.cos(np.radians([5.0, 40.0, 90.0]))

    def predict(pixels: np.ndarray) -> np.ndarray:  # (n, 8), or (n, 11) with cosines of the three angles
        every = pixels if pixels.shape[1] == 11 else np.hstack([pixels, np.broadcast_to(angles, (len(pixels), 3))])
        found = np.tanh((2 * (every - low) / (high - low) - 1) @ inner.T + bias) @ outer + last
        return 0.5 * (found + 1) * (most - least) + least

    return {"predict": predict, "bands": "B03 B04 B05 B06 B07 B8A B11 B12", "takes": "pixels", "level": "L2A"}


_LOADERS: dict[str, Any] = {
    "s2cloudless": s2cloudless,
    **{f"ukis-csmask-{kind}": partial(ukis_csmask, kind) for kind in ("4b-l1c", "6b-l1c", "4b-l2a", "6b-l2a")},
    **{f"snap-{name.lower()}": partial(snap, name) for name in ("LAI", "FAPAR", "FCOVER", "LAI_Cab", "LAI_Cw")},
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
    needs = {"s2cloudless": "s2cloudless lightgbm", "ukis": "ukis_csmask onnxruntime", "snap": "satellitetools"}
    there = {key for key, packages in needs.items() if all(importlib.util.find_spec(p) for p in packages.split())}
    return tuple(name for name in NAMES if name.split("-")[0] in there)


def _reader(package: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise FileNotFoundError(f"this model needs {package}: pip install 'bandmask[models]'") from error
