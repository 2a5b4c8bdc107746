"""SEN12MS in its official layout: Sentinel-2 patches with MODIS land cover, split by scene, into a pack.

Layout: `ROIs1158_spring/s2_1/ROIs1158_spring_s2_1_p1.tif` with `ROIs1158_spring/lc_1/ROIs1158_spring_lc_1_p1.tif`.
Source: Schmitt et al. 2019 (ISPRS Annals IV-2/W7, 153-160; CC BY 4.0); splits from the authors' repository
schmitt-muc/SEN12MS. Level L1C, 13 bands in SatCLIP's order, 256 × 256 px at 10 m; neighbouring patches overlap.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from bandmask import files
from bandmask.packs import Pack, open_if_same, open_pack
from bandmask.readers import scenes
from bandmask.readers.eurosat import decode_tif
from bandmask.readers.landcover import legend_of
from bandmask.readers.packing import read_ahead, write_pack
from bandmask.readers.scenes import Key, Tree
from bandmask.readers.streaming import BadImagesError, Item, listing_of

SPRING = "ROIs1158_spring"
SHAPE = (13, 256, 256)
SHARE = "https://dataserv.ub.tum.de/s/m1474000"  # for people; the archives come by ftp, as TorchGeo documents
LABEL_NOTE = "MODIS land cover of 500 m cells: about two thirds of the pixels are right, and borders are coarse"
_ARCHIVE = "ftp://m1474000:m1474000@dataserv.ub.tum.de/{}"  # user and password are public
_LISTS = "https://raw.githubusercontent.com/schmitt-muc/SEN12MS/3a41236a28d08d253ebe2fa1a081e5e32aa7eab4/splits/{}"
_RULES = 1  # raise when splits or selection change, so that old packs are made anew


def find_sen12ms(season: str = SPRING) -> Path | None:
    """The folder below `BANDMASK_DATA` (or its default) that holds a season of SEN12MS, if there is one."""
    root = files.data_root()
    folders = [] if root is None else [root / "sen12ms", root / "SEN12MS", root]
    return next((folder for folder in folders if (folder / season).is_dir()), None)


def download_sen12ms(root: Path | str, season: str = SPRING, *, lists: bool = False) -> Path:
    """Fetch the s2 and lc archives of a season, check their md5 sums, and unpack both or nothing.

    Args:
        root: folder to download into; archives that are there already are checked and not fetched again.
        season: one of `scenes.SEASONS`. Spring unpacks to about 70 GB.
        lists: fetch `train_list.txt` and `test_list.txt` of the authors' repository too.

    Returns:
        `root`, as `pack_sen12ms` takes it.

    Raises:
        OSError: no network, or the archive is damaged; says how to get it by hand.
    """
    from torchgeo.datasets import SEN12MS
    from torchvision.datasets.utils import download_url

    scenes.check_season(season)
    root, md5 = Path(root), dict(zip(SEN12MS.filenames, SEN12MS.md5s, strict=True))
    archives = [f"{season}_{kind}.tar.gz" for kind in ("lc", "s2")]
    urls = {name: _ARCHIVE.format(name) for name in archives if not (root / season).is_dir()}
    urls |= {name: _LISTS.format(name) for name in ("train_list.txt", "test_list.txt") if lists}
    for name, url in urls.items():
        try:
            download_url(url, root, name, md5[name])
        except (OSError, RuntimeError) as error:
            raise OSError(
                f"can't fetch {name} with md5 {md5[name]}: {error}. Get {', '.join(urls)} from {SHARE} on a machine "
                f"with a network, put them into {root}, and call this again: it checks and unpacks them"
            ) from error
    if not (root / season).is_dir():
        _unpack([root / name for name in archives], root / season)
    return root


def _unpack(archives: list[Path], folder: Path) -> None:
    """Unpack what lies under `folder.name/` of the archives; `folder` is whole or not there."""
    import tarfile

    with files.writing(folder) as partial:
        partial.mkdir()
        for archive in archives:
            try:
                with tarfile.open(archive) as tar:
                    for member in tar:
                        member.name = member.name.removeprefix("./").removeprefix(f"{folder.name}/")
                        if re.match(r"(s2|lc)_\d+(/|$)", member.name):
                            tar.extract(member, partial, filter="data")
            except (tarfile.TarError, EOFError) as error:
                raise ValueError(f"{archive} is not a whole archive ({error}); delete it and fetch it again") from error
        if not any(partial.iterdir()):
            raise ValueError(f"no folders s2_<scene> or lc_<scene> in {', '.join(map(str, archives))}")


def pack_sen12ms(
    source: Path | str | None = None,
    path: Path | str | None = None,
    *,
    season: str = SPRING,
    labels: str = "igbp-simplified",
    split: str = "scenes",
    max_patches: int | None = None,
    order: str = "sen12ms",
    skip_bad: bool = False,
    progress: bool = True,
) -> Pack:
    """Pack one season of SEN12MS with its pixel targets, or open the pack if it is there. Goes on if interrupted.

    Args:
        source: folder that holds the season's folder; default: looked for below `BANDMASK_DATA`. If there is none,
            a pack made with the same settings is opened all the same.
        path: pack folder; default `outputs/packs/sen12ms`, with a suffix for each setting that is not the default.
        season: one of `scenes.SEASONS`. All 40,883 patches of spring take 72 GB.
        labels: a key of `landcover.LEGENDS`: `igbp-simplified`, `igbp`, `lccs-land-cover`, `lccs-land-use` or
            `lccs-hydrology`.
        split: `scenes` (70 : 15 : 15 of the patches, by scene), `holdout` (the published hold-out and validation
            scenes) or `lists` (`train_list.txt` and `test_list.txt` beside the season's folder, 15 % of the
            training scenes' patches for validation). No scene is in two splits.
        max_patches: pack only so many, spread over scenes and splits; a smaller choice is part of a larger one.
        order: channel order of the files.
        skip_bad: leave unpaired, unreadable and wrongly shaped files out, and list them in the card, instead of
            stopping once all are known.
        progress: show a progress bar, and the disk needed.

    Raises:
        FileNotFoundError: no SEN12MS, or no split lists; says where they were looked for and how to get them.
        ValueError: unknown settings; bad files, all named; channels in another order than `order`.
        OSError: not enough disk.
    """
    legend = legend_of(labels)
    scenes.check_season(season)
    settings = {"season": season, "labels": labels, "split": split, "max_patches": max_patches, "order": order}
    path = Path(path) if path else files.outputs_root() / "packs" / pack_name(season, labels, split, max_patches, order)
    source = Path(source) if source else find_sen12ms(season)
    if source is None:
        return _open_without_source(path, settings)
    tree = scenes.scan(source, season)
    splits, unlisted = scenes.assign(tree.pairs, season, split, source, tree.unpaired)
    chosen = scenes.spread(splits, max_patches)
    named = {key: f"{season}/s2_{key[0]}/{tree.files['s2'][key].name}" for key in chosen}
    scene = [f"{season}_{key[0]}" for key in chosen]
    index = pd.DataFrame({"file": list(named.values()), "scene": scene, "group": scene})
    index["split"] = [splits[key] for key in chosen]
    patches = files.checksum_of([list(named.values()), index["split"].tolist(), _RULES])
    options, checksum = {**settings, "patches": patches}, files.checksum_of([tree.checksum, season, labels])
    opened = open_if_same(path, checksum, options)
    if opened is not None and (skip_bad or not opened.card["skipped"]):
        return opened
    if tree.problems and not skip_bad:
        problems = tree.problems | _bad_headers(tree, chosen)
        raise BadImagesError(
            f"{listing_of(problems, len(tree.pairs) + len(tree.problems))}\n"
            "Fetch these files again, or pass skip_bad=True to leave them out. No pack was written."
        )

    def read(key: Key) -> Item:
        try:
            image = _named("s2", lambda: decode_tif(tree.files["s2"][key].read_bytes(), SHAPE))
            codes = _named("lc", lambda: read_codes(tree.files["lc"][key], legend.band))
            return image, *legend.target(codes)
        except (ValueError, OSError) as error:
            return error

    return write_pack(
        path,
        lambda start: read_ahead(read, chosen[start:]),
        index,
        name="sen12ms",
        classes=legend.classes,
        source=f"SEN12MS {season} (Schmitt et al. 2019, CC BY 4.0; contains Copernicus Sentinel data; MODIS MCD12Q1)",
        source_checksum=checksum,
        order=order,
        targets=True,
        skip_bad=skip_bad,
        progress=progress,
        label_note=LABEL_NOTE,
        skipped=tree.problems,
        unlisted=unlisted,
        options=options,
    )


def read_codes(file: Path, band: int) -> np.ndarray:
    """One band of a land-cover file, (256, 256) integers: 1 IGBP, 2 LCCS land cover, 3 land use, 4 hydrology.

    Raises:
        ValueError: not a GeoTIFF, or of another shape.
    """
    import rasterio
    from rasterio.errors import RasterioError

    try:
        with rasterio.open(file) as tif:
            if (tif.count, tif.height, tif.width) != (4, *SHAPE[1:]):
                raise ValueError(f"shape {(tif.count, tif.height, tif.width)}, expected {(4, *SHAPE[1:])}")
            codes: np.ndarray = tif.read(band)
    except RasterioError as error:
        raise ValueError(f"truncated or not a GeoTIFF ({file.stat().st_size} bytes)") from error
    return codes


def _bad_headers(tree: Tree, keys: Iterable[Key]) -> dict[str, str]:
    """Files whose header says another size or type: cheap enough to name them together with the unpaired ones."""
    import rasterio
    from rasterio.errors import RasterioError

    def problem(file: Path) -> str | None:
        expected = (SHAPE[0] if file.parent.name.startswith("s2") else 4, *SHAPE[1:])
        try:
            with rasterio.open(file) as tif:
                shape = (tif.count, tif.height, tif.width)
        except RasterioError:
            return f"not a GeoTIFF ({file.stat().st_size} bytes)"
        return None if shape == expected else f"shape {shape}, expected {expected}"

    members = [tree.files[kind][key] for key in keys for kind in ("s2", "lc")]
    found = zip(members, read_ahead(problem, members), strict=True)
    return {str(file.relative_to(tree.root)): said for file, said in found if said}


def _named(kind: str, read: Callable[[], np.ndarray]) -> np.ndarray:
    try:
        return read()
    except ValueError as error:
        raise ValueError(f"{kind}: {error}") from error


def _open_without_source(path: Path, settings: dict[str, Any]) -> Pack:
    if (path / "pack.json").exists():
        pack = open_pack(path)
        if {**pack.card.get("options", {}), **settings} == pack.card.get("options"):
            return pack
    raise FileNotFoundError(
        f"{settings['season']} of SEN12MS was not found. Set BANDMASK_DATA to a folder that holds it (or sen12ms/ with "
        f"it), or fetch it with bandmask.readers.sen12ms.download_sen12ms(folder, {settings['season']!r}) or from "
        f"{SHARE}"
    )


def pack_name(
    season: str = SPRING,
    labels: str = "igbp-simplified",
    split: str = "scenes",
    max_patches: int | None = None,
    order: str = "sen12ms",
) -> str:
    """`sen12ms`, or `sen12ms-summer-igbp-500`: a small pack must not replace a large one."""
    usual = (SPRING, "igbp-simplified", "scenes", None, "sen12ms")
    chosen = zip((season, labels, split, max_patches, order), usual, strict=True)
    return "-".join(["sen12ms", *(str(value).split("_")[-1] for value, expected in chosen if value != expected)])
