"""DLR's cloud masks `ukis-csmask` as an encoder: a U-Net on EfficientNet-B4, whose weights its package ships as ONNX.

Six bands at about 30 m, of Sentinel-2 or Landsat, to clear, cloud and shadow. Apache-2.0; neither weights nor code are
in this repository. It was not trained with missing bands. Source: Wieland et al. 2019, doi:10.1016/j.rse.2019.05.022.
"""

import importlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from bandmask import bands, files

LEVELS = {"ukis-csmask-6b-l1c": "L1C", "ukis-csmask-6b-l2a": "L2A"}
CLASSES = ("clear", "cloud", "shadow")  # of `logits`
WIDTHS = (48, 32, 56, 160, 448)  # channels at S/2, S/4 … S/32


class CloudNet(nn.Module):
    """Embeds reflectance (B, 13, S, S) in SatCLIP order by six of its bands, (B, 448); S a multiple of 32."""

    bands = ("B02", "B03", "B04", "B08", "B11", "B12")  # others are ignored
    feature_info = tuple({"module": f"S/{2**n}", "num_chs": c, "reduction": 2**n} for n, c in enumerate(WIDTHS, 1))
    mean: Tensor
    sd: Tensor

    def __init__(self) -> None:
        """With random weights, and without scaling."""
        from segmentation_models_pytorch import Unet

        super().__init__()
        self.unet = Unet("efficientnet-b4", encoder_weights=None, in_channels=6, classes=len(CLASSES))
        del self.unet.encoder._conv_head, self.unet.encoder._bn1  # behind the deepest map: no part of the U-Net
        self.unet.encoder._drop_connect_rate = 0.0  # without blocks dropped at random, a training gives the same again
        self.register_buffer("mean", torch.zeros(1, 6, 1, 1))
        self.register_buffer("sd", torch.ones(1, 6, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        """Embeddings: means of the deepest map."""
        return self.forward_head(self.unet.encoder(self._scaled(images))[-1])

    def forward_intermediates(self, images: Tensor, indices: Sequence[int]) -> tuple[Tensor, list[Tensor]]:
        """What `forward_head` takes, and those of the five maps; what `encoders.embed` calls."""
        _, *maps = self.unet.encoder(self._scaled(images))
        return maps[-1], [maps[index] for index in sorted(indices)]

    def forward_head(self, deepest: Tensor) -> Tensor:
        """Pool the deepest map."""
        return deepest.mean((2, 3))

    def logits(self, images: Tensor) -> Tensor:
        """What the published network says, (B, 3, S, S) for `CLASSES`, by the decoder it was trained with."""
        return self.unet(self._scaled(images))

    def _scaled(self, images: Tensor) -> Tensor:
        if images.ndim != 4 or images.shape[1] != len(bands.NAMES) or any(side % 32 for side in images.shape[2:]):
            said = f"images are (B, 13, S, S) in the order {', '.join(bands.NAMES)}, sides a multiple of 32 px"
            raise ValueError(f"{said}; got {tuple(images.shape)}")
        return (images[:, bands.channel_indices(self.bands)] - self.mean) / self.sd


def published(name: str, weights: Path | str | None = None) -> tuple[dict[str, Tensor], Path]:
    """The state of a `CloudNet` of a name in `LEVELS`, in float32 (its file has 16 bits), and that file.

    Args:
        name: which.
        weights: its `.onnx` file, with the `.json` beside it, or their folder; default: the installed package.

    Raises:
        FileNotFoundError: a file, or the package `ukis-csmask`, is not there.
        ModuleNotFoundError: `onnx`, which reads it, is not installed.
        ValueError: the file is damaged.
    """
    part = f"model_{name.removeprefix('ukis-csmask-').replace('-', '_')}.onnx"
    path = Path(weights or files.of_package("ukis_csmask"))
    path = files.require(
        path / part if path.is_dir() else path, f"it comes with pip install --no-deps ukis-csmask, {part}"
    )
    known = json.loads(files.require(path.with_suffix(".json"), f"it lies beside {part}").read_bytes())
    try:
        onnx, helper = map(importlib.import_module, ("onnx", "onnx.numpy_helper"))
    except ImportError as error:
        raise ModuleNotFoundError(f"{part} is read by the package onnx: pip install 'bandmask[models]'") from error
    try:
        tensors = onnx.load(path).graph.initializer
    except Exception as error:  # of protobuf's own kinds
        raise ValueError(f"{path} is damaged, or no ONNX file ({error}); fetch it again") from error
    stored = {tensor.name.removeprefix("model."): helper.to_array(tensor) for tensor in tensors}
    state = {f"unet.{key}": torch.from_numpy(value.astype(np.float32)) for key, value in stored.items()}
    scaling = zip(("mean", "sd"), known["data"]["dataset_statistics"]["img"], strict=True)
    return state | {key: torch.tensor(values).view(1, -1, 1, 1) for key, values in scaling}, path
