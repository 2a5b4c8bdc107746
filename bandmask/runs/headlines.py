"""What a run came to, in one line, from the table it left; read without pandas, for the sake of hundreds of runs."""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

OF_RUN = {  # as results.MAKERS, which comes with torch
    "alignment": "03_fine_tuning",
    "classification": "04_scene_classification",
    "segmentation": "05_image_segmentation",
}
_METRICS = {"04_scene_classification": ("overall_accuracy", "accuracy"), "05_image_segmentation": ("miou_all", "mIoU")}


def headline(notebook: str, table: Path) -> str:
    """`val cosine 0.934, test loss 1.250`, `accuracy: retrained 84.2 %, kept 77.3 %`; empty for other notebooks.

    Means over seeds: at the last epoch for fine-tuning, of the fine-tuned encoder on test images for tasks, of the
    pre-trained one on complete images for the run of no mask.

    Args:
        notebook: that wrote the table, such as `03_fine_tuning`.
        table: tidy results as Parquet.

    Raises:
        Exception: the file can't be read; pyarrow has several for a damaged one.
    """
    if notebook not in OF_RUN.values():
        return ""
    written = table.stat()
    return _read(notebook, table, written.st_mtime_ns, written.st_size)


@lru_cache(maxsize=4096)
def _read(notebook: str, path: Path, _modified: int, _size: int) -> str:
    """Read once for each version of a file: `--follow` asks every second."""
    return _alignment(path) if notebook == OF_RUN["alignment"] else _scores(path, *_METRICS[notebook])


def _alignment(path: Path) -> str:
    rows = _rows(path, "metric", "epoch", "value")
    last = max((epoch for metric, epoch, _ in rows if metric == "val_cosine"), default=0)
    cosine = _mean(value for metric, epoch, value in rows if metric == "val_cosine" and epoch == last)
    loss = _mean(value for metric, _, value in rows if metric == "test_loss")
    parts = {"val cosine": cosine, "test loss": loss}
    return ", ".join(f"{name} {value:.3f}" for name, value in parts.items() if value is not None)


def _scores(path: Path, metric: str, shown: str) -> str:
    values: dict[tuple[str, str], list[float]] = {}
    for split, measured, method, protocol, value in _rows(path, "split", "metric", "method", "protocol", "value"):
        if split == "test" and measured == metric:
            values.setdefault((method, protocol), []).append(value)
    wanted = [("fine-tuned", "retrained"), ("fine-tuned", "kept")]
    if not any(key in values for key in wanted):
        wanted = [("pre-trained", "complete")]  # the run of no mask
    means = {protocol: _mean(values.get((method, protocol), [])) for method, protocol in wanted}
    parts = [f"{protocol} {100 * mean:.1f} %" for protocol, mean in means.items() if mean is not None]
    return f"{shown}: {', '.join(parts)}" if parts else ""


def _rows(path: Path, *columns: str) -> list[tuple[Any, ...]]:
    from pyarrow import parquet

    table = parquet.ParquetFile(path).read(list(columns), use_threads=False).to_pydict()
    return list(zip(*(table[name] for name in columns), strict=True))


def _mean(values: Iterable[float | None]) -> float | None:
    usable = [value for value in values if value is not None and math.isfinite(value)]
    return sum(usable) / len(usable) if usable else None
