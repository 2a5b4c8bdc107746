"""What people call: `import bandmask as bm`. The kind of thing that goes in comes out: a scene, an array, a tensor.

Arrays are `(13, H, W)` or `(B, 13, H, W)` in SatCLIP's order, or hold other channels whose names are given. A scene,
from `open_scene`, knows its bands and its unit. NaN is a hidden pixel everywhere. docs/api.md is the page.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bandmask import bands as band_table
from bandmask import encoders as encoder_files
from bandmask import fills, identity, masks
from bandmask.bands import DN_PER_REFLECTANCE
from bandmask.images import Source, as_array, level_of
from bandmask.moments import require_reflectance
from bandmask.packs import Pack

if TYPE_CHECKING:
    import xarray as xr
    from matplotlib.figure import Figure

Images = TypeVar("Images", "np.ndarray", Tensor, "xr.DataArray")
ALL = band_table.NAMES
METHODS = ("ridge_local", "ridge", "local", "nearest", "band_mean")
LARGEST_PATCH = 1024  # pixels a side: an embedding is of one patch, and a whole tile's would say nothing


def hide(
    images: Images, bands: str | Iterable[str], *, ratio: float = 1.0, shape: str = "pixel", seed: int = 0,
    names: str | Sequence[str] | None = None,
) -> Images:  # fmt: skip
    """A copy in which pixels of some bands are NaN.

    Args:
        images: `(13, H, W)`, `(B, 13, H, W)`, or other channels with their `names`; a scene. Integers become float32.
        bands: ESA or common names: `"B8A swir16"`.
        ratio: expected share of each band's pixels, 0 to 1.
        shape: what is lost together: `pixel`, `band`, `stripe`, `block` or `cloud`.
        seed: another seed, another draw. Image i of a batch is its i-th sample, as in a pack.
        names: of the channels, in their order, where they are not the 13 in SatCLIP's.

    Raises:
        ValueError: an unknown band, or one that the images don't have; channels without names.

    >>> float(np.isnan(hide(np.ones((13, 8, 8)), "B8A swir16")).mean() * 13)
    2.0
    """
    whole, channels, back = _taken(images, names)
    lost = band_table.parse_bands(bands)
    if absent := [name for name in lost if name not in channels]:
        raise ValueError(f"{', '.join(absent)}: not among the channels {' '.join(channels)}")
    if not hasattr(seed, "__index__"):
        raise ValueError(f"a seed is a whole number; got {seed}")
    spec = masks.MaskSpec(lost, ratio, seed=int(seed), shape=shape)
    hidden = spec.hidden(torch.arange(len(whole), device=whole.device), (whole.shape[-2], whole.shape[-1]))
    return back(masks.hide(whole, hidden, spec, torch.full((len(ALL),), torch.nan)))


def fill(
    images: Images, method: str = "ridge_local", *, moments: fills.Moments | str | None = None,
    names: str | Sequence[str] | None = None,
) -> Images:  # fmt: skip
    """A copy in which NaN, and what is no measurement, is filled from what is visible; no other value changes.

    Args:
        images: reflectance, as in `hide`; a scene in DN. 65535 and what lies below −1000 DN is no measurement; 0 is.
        method: `ridge_local` (regression from the visible bands, corrected around each gap), `ridge`, `local`,
            `nearest` or `band_mean`.
        moments: mean and covariance of the spectra that a regression is fitted to: `L1C` or `L2A` of the package
            (default: a scene's level, else L1C, with a warning where pixels look like L2A), or `fit_moments` of images
            of your own, which is better.
        names: of the channels, as in `hide`. Bands that are not among them are used as missing, and not returned.

    Raises:
        ValueError: DN where reflectance is due; an image without a value; an unknown method or moments; `ridge` where
            no band is whole, but for 5 % of its pixels.

    A band that the moments don't know, B10 of L2A, stays NaN; so does a pixel of which no band is visible.

    >>> gap = hide(np.full((13, 8, 8), 0.1), "B08", ratio=0.5)
    >>> np.isnan(fill(gap)).any()
    np.False_
    """
    stated = level_of(images)
    untold = "L1C" if moments is None and not stated else ""
    whole, _, back = _taken(images, names, reflectance=True, level=untold)
    if not isinstance(moments, fills.Moments):
        moments = fills.Moments.shipped(untold or stated if moments is None else moments)
    hidden = ~whole.isfinite()
    if (empty := hidden.flatten(1).all(1)).any():
        raise ValueError(f"image {int(empty.nonzero()[0])} of {len(whole)} holds no value; nothing to fill it from")
    require_reflectance(moments)
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}; available: {', '.join(METHODS)}")
    return back(fills.complete(whole, method, moments))


def fit_moments(images: Any, *, names: str | Sequence[str] | None = None) -> fills.Moments:
    """Mean and covariance of complete spectra of your own, for `fill(…, moments=)`: reflectance or a scene.

    Pixels with a gap are left out. Bands that the images lack, as L2A lacks B10, stay unknown: such a fill leaves them
    NaN. A data set's: `Moments.of(open_dataset(…))`.

    Raises:
        ValueError: fewer than 1,000 complete pixels, which can't tell bands apart; DN where reflectance is due.
    """
    whole, _, _ = _taken(images, names, reflectance=True)
    spectra = whole.movedim(1, -1).flatten(0, -2)
    there = spectra.isfinite().any(0)
    spectra = spectra[spectra[:, there].isfinite().all(1)]
    if len(spectra) < 1000:
        had = " ".join(name for name, is_there in zip(ALL, there.tolist(), strict=True) if is_there) or "no band"
        said = f"{len(spectra)} pixels with a value in each of {had}; it takes 1,000 to tell bands apart"
        raise ValueError(f"{said}: give more images, leave out bands that are mostly missing, or `moments` altogether")
    return fills.Moments.of_spectra(spectra.double().cpu().numpy())


class Encoder:
    """An encoder that takes what `hide` and `fill` take. `model` is plain torch, `card` says what it was made from."""

    def __init__(self, model: nn.Module, card: encoder_files.Card) -> None:
        """From `encoders.load_encoder`, or a model and a card of one's own."""
        self.model, self.card = model.eval(), card
        self.takes_gaps = bool(getattr(model, "takes_gaps", False))  # NaN means missing to it
        self.needs = encoder_files.needs(model)  # bands that it can't do without

    def __repr__(self) -> str:
        """`Encoder(SatCLIP ResNet50 L40: 256 numbers of 256 px, needs B01 B02 …)`."""
        takes = f"needs {' '.join(self.needs)}" if self.needs else "takes gaps"
        return f"Encoder({self.card.name}: {self.card.embedding_dim} numbers of {self.card.image_size} px, {takes})"

    @torch.inference_mode()
    def __call__(self, images: Any, *, names: str | Sequence[str] | None = None) -> Any:
        """Embeddings `(B, D)`, or `(D,)` of one image: a tensor if a tensor came in, else numpy.

        Args:
            images: patches in reflectance, as in `fill`; they are resized to the side that the encoder was trained at.
            names: of the channels; bands that are not among them are missing.

        Raises:
            ValueError: DN where reflectance is due; NaN or absent bands, unless the encoder is one for every loss;
                more than 1,024 pixels a side.
        """
        known = getattr(getattr(self.model, "fill", None), "moments", None)  # of what one for every loss was trained on
        of_l1c, level = known is not None and known.known[ALL.index("B10")], level_of(images)
        whole, _, _ = _taken(images, names, reflectance=True, level="L1C" if of_l1c and not level else "")
        whole = whole.float()
        if of_l1c and level == "L2A":
            said = f"the scene is L2A, {self.card.name} was trained on L1C: its embedding may mean nothing"
            warnings.warn(f"{said}. Open the L1C", stacklevel=2)
        if max(whole.shape[-2:]) > LARGEST_PATCH:
            size = f"{whole.shape[-1]} × {whole.shape[-2]} pixels"
            raise ValueError(f"an embedding is of one patch, this is {size}; cut it first")
        if gone := [name for name in self.needs if not whole[:, ALL.index(name)].isfinite().all()]:
            said = f"{self.card.name} takes complete images; {' '.join(gone)} have gaps: bm.fill first (pixels of which"
            raise ValueError(f"{said} nothing is seen stay: cut them off), or load an encoder for every loss (08)")
        side = self.card.image_size
        if tuple(whole.shape[-2:]) != (side, side):  # the mean of what is there: plain interpolation spreads NaN
            parts = whole.nan_to_num(0), whole.isfinite().to(whole)
            value, there = (F.interpolate(part, (side, side), mode="bilinear", align_corners=False) for part in parts)
            whole = (value / there).where(there >= 0.5, torch.nan)
        found = self.model(whole)
        found = found if getattr(images, "ndim", 4) == 4 else found[0]
        return found if isinstance(images, Tensor) else found.cpu().numpy()

    def save(self, folder: Path | str) -> Path:
        """`model.safetensors` and `card.json`, and what one for every loss needs beside; `load_encoder` reads them."""
        from bandmask import any_band

        if isinstance(self.model, any_band.AnyBandEncoder):
            return any_band.save(self.model, self.card, None, folder)
        return encoder_files.save_encoder(self.model, self.card, folder)


def load_encoder(source: str | Path, *, weights: Path | str | None = None) -> Encoder:
    """A published encoder by name, a folder that a notebook saved, or one for every loss.

    Args:
        source: `mini`, for every loss, which comes with the package; `satclip-resnet50-l40` and its five siblings,
            `moco-resnet50`, …; or a folder.
        weights: a local file instead of the download.

    Raises:
        ValueError, FileNotFoundError: unknown, absent or damaged; the message lists what there is.
    """
    from bandmask import any_band

    if weights is None and (str(source) == encoder_files.MINI or (Path(source) / any_band.GATE).exists()):
        return Encoder(*any_band.load(source))
    return Encoder(*encoder_files.load_encoder(source, weights=weights))


def show(*images: Any, view: str = "true colour", titles: Sequence[str] | None = None, names: Any = None) -> Figure:
    """Images side by side under one stretch, that of the first; hidden pixels are hatched in one colour.

    Args:
        images: scenes or arrays, each one image; larger ones are thinned to 1,000 pixels a side.
        view: `true colour`, `colour infrared`, `swir`, …, a band, or an index such as `ndvi`.
        titles: one each.
        names: of the channels, as in `hide`.

    A ValueError of no image, or another number of titles. DN and reflectance side by side are brought to one unit.

    >>> show(np.random.default_rng(0).random((13, 8, 8))).get_axes()[0].get_title()
    'true colour'
    """
    import matplotlib.pyplot as plt

    from bandmask import plots

    if not images or (titles is not None and len(titles) != len(images)):
        raise ValueError(f"show takes one image or more, and a title each; got {len(images)}, titles {titles}")
    pictures = []
    for image in images:
        whole, _, _ = _taken(image, names)
        if len(whole) > 1:
            raise ValueError(f"this is a batch of {len(whole)}; give one image each: bm.show(*images)")
        step = max(1, max(whole.shape[-2:]) // 1000)
        pictures.append(whole[0, :, ::step, ::step].cpu().numpy())
    units = [DN_PER_REFLECTANCE if np.nanquantile(p, 0.99) >= 50 else 1.0 for p in pictures if np.isfinite(p).any()]
    if len(set(units)) > 1 and len(units) == len(pictures):
        pictures = [p * np.float32(units[0] / unit) for p, unit in zip(pictures, units, strict=True)]
    limits = plots.stretch_limits(pictures[0])
    titles = titles or [view] + [f"{view}, hidden pixels marked"] * (len(pictures) - 1)
    size = 4.2 * len(pictures), 4.5
    figure, axes = plt.subplots(1, len(pictures), figsize=size, layout="constrained", squeeze=False)
    for axis, image, title in zip(axes[0], pictures, titles, strict=True):
        lost = {name: ~np.isfinite(band) for name, band in zip(ALL, image, strict=True) if not np.isfinite(band).all()}
        axis.imshow(plots.picture(image, view, limits, lost), interpolation="nearest")
        axis.set(title=title, xticks=[], yticks=[])
    plt.close(figure)  # a notebook shows what a cell returns; open figures would be shown twice
    return figure


def fine_tune(
    encoder: Encoder,
    dataset: Pack | str,
    lost: str | Iterable[str],
    *,
    ratio: float = 0.9,
    shape: str = "pixel",
    method: str = "",
    **training: Any,
) -> tuple[Encoder, pd.DataFrame]:
    """A copy that embeds images without these bands as the original embeds complete ones; what notebook 03 does.

    Args:
        encoder: stays as it is.
        dataset: a pack, or its name or folder; `train` is trained on, `val` watched, no label is used.
        lost, ratio, shape: as in `hide`.
        method: what stands in hidden pixels: as in `fill`, `dataset_mean` (the thesis), or `native`, NaN. Default:
            `native` of an encoder that takes gaps, else `dataset_mean`.
        training: of `align.fine_tune`: `epochs`, `batch_size`, `lr`, `objective`, `seed`, `compute`, …

    Returns:
        The copy, and the history: `train_loss`, `val_loss`, `val_cosine`, `val_distance` an epoch; row 0: the original.
    """
    from bandmask import align

    pack, side = _opened(dataset, encoder), encoder.card.image_size
    method = method or ("native" if encoder.takes_gaps else "dataset_mean")
    spec = _loss_of(lost, ratio, value=method, seed=training.get("seed", 0), shape=shape)
    value = fills.make_fill(method, pack, spec.bands)
    student, history = align.fine_tune(encoder.model, pack, spec, value, image_size=side, **training)
    name = f"{encoder.card.name}, fine-tuned on {' '.join(spec.bands)}"
    card = replace(encoder.card, name=name, parent=encoder.card.name, mask=asdict(spec), seed=spec.seed, sha256="")
    return Encoder(student, card), history


def evaluate(
    encoders: Encoder | Mapping[str, Encoder],
    dataset: Pack | str,
    lost: str | Iterable[str],
    *,
    ratio: float = 0.9,
    shape: str = "pixel",
    methods: Sequence[str] = ("dataset_mean", "ridge_local"),
    **training: Any,
) -> pd.DataFrame:
    """Test accuracy without these bands, the head kept and the head retrained; what notebook 04 does.

    Args:
        encoders: one, or several by name; the first is in service: the head that is kept was trained behind it.
        dataset: a pack with a label an image, or its name or folder.
        lost, ratio, shape: as in `hide`.
        methods: what stands in hidden pixels before the first encoder, `native` if it takes gaps; `ridge mapped` and
            the like put a map behind it, fitted without labels (`heads.with_map`). One made by `fine_tune` gets
            what it was fine-tuned behind; of the others, one that takes gaps gets them as they are, any other the
            dataset mean.
        training: of `evaluation.train`: `seeds`, `epochs`, …

    Returns:
        A row a method and head (`complete`, `kept`, `retrained`): `accuracy` with its 95 % interval `low`, `high`,
        over test images (or their groups) and head seeds.
    """
    from bandmask import evaluation, stats

    names = encoders if isinstance(encoders, Mapping) else {"pre-trained": encoders}
    pack = _opened(dataset, *(names.values() or [encoders]))
    first, *others = names.items()
    if len({of.card.embedding_dim for of in names.values()}) > 1:
        widths = ", ".join(f"{name} {of.card.embedding_dim}" for name, of in names.items())
        raise ValueError(f"embeddings of different length can't share the kept head: {widths}; call once for each")
    spec = _loss_of(lost, ratio, seed=training.get("seed", 0), shape=shape)
    mean = fills.make_fill("dataset_mean", pack, spec.bands)
    complete = evaluation.View(first[1].model, image_size=first[1].card.image_size, fill=mean)
    asked, compute = [methods] if isinstance(methods, str | float | int) else methods, training.get("compute")
    free = {name: evaluation.free_view(name, complete, spec, pack, compute) for name in map(str, asked)}
    views = {f"{first[0]}, {method}": view for method, view in free.items()}
    for name, other in others:
        behind = (other.card.mask or {}).get("value", "native" if other.takes_gaps else "dataset_mean")
        value = fills.make_fill(behind, pack, spec.bands)
        views[name] = evaluation.View(other.model, spec, value, other.card.image_size)
    served, _ = evaluation.train("classification", complete, pack, **training)
    found = {(first[0], "complete"): evaluation.predict(complete, served, pack)}
    found |= {(name, "kept"): evaluation.predict(view, served, pack) for name, view in views.items()}
    for name, view in views.items():
        own, _ = evaluation.train("classification", view, pack, **training)
        found[name, "retrained"] = evaluation.predict(view, own, pack)
    scored = stats.resample({side: table.assign(encoder_seed=-1) for side, table in found.items()})
    rows = [(*side, score.value, *stats.interval(score.draws)) for side, score in scored.items()]
    return pd.DataFrame(rows, columns=["method", "head", "accuracy", "low", "high"])


def detect(scene: xr.DataArray, dataset: Pack | str = "") -> pd.DataFrame:
    """Which bands of a scene look broken, beside healthy images of the same level; what notebook 10 does.

    Args:
        scene: from `open_scene`; cut it first, a detector reads all it is given.
        dataset: 50 healthy images or more, of all 13 bands, to fit a detector on, a pack or its name; default: the one
            that comes with the package, of 796 images of EuroSAT, L1C.

    Returns:
        A row a band: `score`, `false_alarm` (its chance), `suspicious`, `looks_like`; `attrs["note"]` says what speaks
        against believing it.
    """
    from bandmask.detector import Detector

    return (Detector.fit(_opened(dataset)) if dataset else Detector.shipped()).distrust(scene)


def _loss_of(lost: str | Iterable[str], ratio: float, **drawn: Any) -> masks.MaskSpec:
    """What is hidden; a ValueError where that is nothing."""
    spec = masks.MaskSpec(band_table.parse_bands(lost), ratio, **drawn)
    if not spec.bands or not ratio:
        raise ValueError(f"nothing is lost: lost={lost!r}, ratio={ratio}; name a band, and a share above 0")
    return spec


def _opened(dataset: Pack | str, *encoders: Encoder) -> Pack:
    """A pack; a ValueError where it lacks bands that one of these encoders can't do without."""
    from bandmask import datasets

    if wrong := [of for of in encoders if not isinstance(of, Encoder)]:
        raise ValueError(f"take an encoder of bm.load_encoder, or several by name; got {wrong[0]!r:.80}")
    pack = dataset if isinstance(dataset, Pack) else datasets.open_dataset(str(dataset))
    for of in encoders:
        pack.require_complete(of.card.name, of.needs)
    return pack


def _taken(
    images: Any, names: str | Sequence[str] | None, *, reflectance: bool = False, level: str = ""
) -> tuple[Tensor, tuple[str, ...], Callable[[Tensor], Any]]:
    """Images as a batch of all bands, (B, 13, H, W) float, NaN in those that they lack.

    Also the names of the channels that they have, and the way back to what came in. A scene in DN comes out as such.
    """
    source = Source(images, names)
    scale, places = float(source.stated or 1) if reflectance else 1.0, band_table.channel_indices(source.names)
    if reflectance:
        values, hidden = source.read((slice(None), slice(None)), ())
        if zeros := [n for n, z in zip(source.names, (hidden & (values == 0)).any((0, 2, 3)), strict=True) if z]:
            said = f"{' '.join(zeros)}: 0 throughout an image, or in pixels that are 0 in all bands, is taken"
            warnings.warn(f"{said} as measured (a guard takes it as missing); put NaN there if it is not", stacklevel=3)
        if source.scale != scale:
            raise ValueError("DN where reflectance is due; divide by 10,000")
        identity.check(source.spectra(), source.names, source="these images", level=level)
    else:
        values = source.numbers(any_unit=True)
    given = numbers = torch.from_numpy(values)
    if isinstance(images, Tensor) or str(source.images.dtype) == "float64":  # as exact as it came, and where it lies
        exact = images
        if not isinstance(images, Tensor):  # only an array that is no tensor's, turned or read-only, is copied
            exact = torch.from_numpy(np.require(as_array(source.images), None, ["C", "W"]))
        given = exact if source.batched else exact[None]
        given = given.to(torch.promote_types(given.dtype, torch.float32))
        given = given.masked_fill(numbers.isnan().to(given.device), torch.nan)
    whole = given.new_full((len(given), len(ALL), *source.size), torch.nan)
    whole[:, places] = given / scale if scale != 1 else given

    def back(result: Tensor) -> Any:
        result = result[:, places]
        # what was visible stays to the last bit: DN to reflectance and back would round
        result = torch.where(given.isfinite() & result.isfinite(), given, result * scale) if scale != 1 else result
        gone = [name for name, band in zip(source.names, result.movedim(1, 0), strict=True) if band.isnan().all()]
        result = result if source.batched else result[0]
        if hasattr(images, "dims"):
            found = source.images.copy(data=result.numpy()).transpose(*images.dims)
            if "hidden_bands" in found.attrs:
                found.attrs["hidden_bands"] = tuple(gone)
            return found
        return result if isinstance(images, Tensor) else result.numpy()

    return whole, source.names, back
