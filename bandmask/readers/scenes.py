"""SEN12MS' patches by name and by scene: patches of one scene overlap, thus scenes are split, never patches.

Source of the published lists: the authors' repository schmitt-muc/SEN12MS, `splits/SEN12MS_holdOutScenes.txt` and
`splits/ValidationScenes.txt`; `train_list.txt` and `test_list.txt` are those of Schmitt & Wu 2021.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Set
from dataclasses import dataclass
from pathlib import Path

from bandmask import files
from bandmask.packs import SPLITS

Key = tuple[int, int]  # scene and patch

SEASONS = ("ROIs1158_spring", "ROIs1868_summer", "ROIs1970_fall", "ROIs2017_winter")
CHOICES = ("scenes", "holdout", "lists")
SHARES = {"train": 0.70, "val": 0.15, "test": 0.15}  # of the patches, as near as whole scenes come to it
HOLD_OUT: dict[str, tuple[int, ...]] = {
    "ROIs1158_spring": (15, 17, 63, 97, 124, 146),
    "ROIs1868_summer": (15, 19, 43, 72, 79, 104, 131),
    "ROIs1970_fall": (30, 35, 39, 47, 61, 120, 141, 144),
    "ROIs2017_winter": (32, 64, 107, 135, 146),
}
VALIDATION: dict[str, tuple[int, ...]] = {
    "ROIs1158_spring": (44, 45, 77, 112, 113, 117),
    "ROIs1868_summer": (26, 36, 55, 73, 89, 113),
    "ROIs1970_fall": (1, 3, 14, 20, 57, 62, 93, 130, 142),
    "ROIs2017_winter": (69, 77, 103, 144),
}
_NAME = re.compile(r"(?P<season>ROIs\d+_[a-z]+)_(?P<kind>s1|s2|lc)_(?P<scene>\d+)_p(?P<patch>\d+)(?:\.tif)?")


@dataclass(frozen=True)
class Tree:
    """The files of one season: `files[kind][scene, patch]` and, named, those that fit no pair."""

    root: Path
    season: str
    files: dict[str, dict[Key, Path]]
    problems: dict[str, str]
    checksum: str

    @property
    def pairs(self) -> list[Key]:
        """Scene and patch of all pairs, in order."""
        return sorted(self.files["s2"].keys() & self.files["lc"].keys())

    @property
    def unpaired(self) -> set[Key]:
        """Those of which one file is missing; `problems` names them."""
        return self.files["s2"].keys() ^ self.files["lc"].keys()


def scan(source: Path | str, season: str) -> Tree:
    """Find the pairs of a season by name; no file is opened.

    Raises:
        FileNotFoundError: no folder of that season, or no pair in it.
    """
    root = Path(source)
    files.require(root / season, f"bandmask.readers.sen12ms.download_sen12ms({str(root)!r}, {season!r})")
    found: dict[str, dict[Key, Path]] = {"s2": {}, "lc": {}}
    problems: dict[str, str] = {}
    sizes = []
    for folder in sorted(p for kind in found for p in (root / season).glob(f"{kind}_*")):
        for file in sorted(folder.glob("*.tif")):
            name = str(file.relative_to(root))
            sizes.append([name, file.stat().st_size])
            match = _NAME.fullmatch(file.name)
            if match is None or match["season"] != season or f"{match['kind']}_{match['scene']}" != folder.name:
                problems[name] = f"not a name of {season}/{folder.name}"
            else:
                found[match["kind"]][int(match["scene"]), int(match["patch"])] = file
    for kind, other in (("s2", "lc"), ("lc", "s2")):
        for key in sorted(found[kind].keys() - found[other].keys()):
            problems[str(found[kind][key].relative_to(root))] = f"has no {other} file"
    tree = Tree(root, season, found, problems, files.checksum_of(sizes))
    if not tree.pairs:
        raise FileNotFoundError(
            f"{root / season} holds no pair like s2_1/{season}_s2_1_p1.tif and lc_1/{season}_lc_1_p1.tif "
            f"({len(sizes)} .tif files); fetch it with bandmask.readers.sen12ms.download_sen12ms"
        )
    return tree


def assign(
    keys: list[Key], season: str, split: str, root: Path, unpaired: Set[Key] = frozenset()
) -> tuple[dict[Key, str], int]:
    """The split of each patch, all patches of a scene in one, and how many patches no list names.

    Args:
        keys: scene and patch of each pair there is.
        season: whose published scenes count.
        split: `scenes`, `holdout` or `lists`.
        root: where `train_list.txt` and `test_list.txt` lie.
        unpaired: patches that may be listed though they are no pair: they are named elsewhere.

    Raises:
        ValueError: unknown choice, a scene in two splits, or a split that would be empty.
        FileNotFoundError: no lists, or patches of the lists are not there.
    """
    if split == "scenes":
        by_scene = by_share(Counter(scene for scene, _ in keys), season, SHARES)
        splits = {key: by_scene[key[0]] for key in keys}
    elif split == "holdout":
        held = dict.fromkeys(VALIDATION[season], "val") | dict.fromkeys(HOLD_OUT[season], "test")
        splits = {key: held.get(key[0], "train") for key in keys}
    elif split == "lists":
        splits = _from_lists(set(keys), season, root, unpaired)
    else:
        raise ValueError(f"unknown split {split!r}; available: {', '.join(CHOICES)}")
    if empty := [name for name in SPLITS if name not in splits.values()]:
        raise ValueError(
            f"split={split!r} leaves {' and '.join(empty)} empty: {season} has the scenes "
            f"{sorted({scene for scene, _ in keys})} here; fetch all scenes, or choose another of {', '.join(CHOICES)}"
        )
    return splits, len(keys) - len(splits)


def by_share(patches: dict[int, int], season: str, shares: dict[str, float]) -> dict[int, str]:
    """The split of each scene, from a hash of its name: the split that has least of its share takes the next scene.

    Args:
        patches: number of patches of each scene.
        season: part of the hashed name.
        shares: of the patches, for each split.
    """
    have = dict.fromkeys(shares, 0)
    found = {}
    for scene in sorted(patches, key=lambda scene: _hash(season, scene)):
        name = min(shares, key=lambda name: have[name] / shares[name])
        found[scene] = name
        have[name] += patches[scene]
    return found


def spread(splits: dict[Key, str], max_patches: int | None) -> list[Key]:
    """Patches in order, or so many of them, spread over splits and scenes; fewer are always part of more.

    Raises:
        ValueError: fewer than one a split.
    """
    if max_patches is None:
        return sorted(splits)
    if max_patches < len(SPLITS):
        raise ValueError(f"max_patches is {len(SPLITS)} or more (one a split), got {max_patches}")
    turns: Counter[str | int] = Counter()
    sizes = Counter(splits.values())
    members: dict[str, dict[int, list[Key]]] = {name: {} for name in sizes}
    for key in sorted(splits, key=lambda key: _hash(*key)):
        members[splits[key]].setdefault(key[0], []).append(key)
    order = []
    for name, of_scenes in members.items():
        in_turn = [(turn, _hash(scene), key) for scene, keys in of_scenes.items() for turn, key in enumerate(keys)]
        for _, _, key in sorted(in_turn):  # a patch of each scene, then a second of each
            order.append((turns[name] / sizes[name], name, key))  # each split in proportion to its size
            turns[name] += 1
    return sorted(key for _, _, key in sorted(order)[:max_patches])


def _from_lists(keys: Set[Key], season: str, root: Path, unpaired: Set[Key]) -> dict[Key, str]:
    listed = {name: _read_list(root / f"{name}_list.txt", season) for name in ("train", "test")}
    both = {scene for scene, _ in listed["train"]} & {scene for scene, _ in listed["test"]}
    if both:
        raise ValueError(
            f"train_list.txt and test_list.txt in {root} both hold patches of {season}, scenes {sorted(both)[:10]} "
            f"({len(both)} in all); a scene belongs to one split, as its patches overlap"
        )
    if missing := sorted((listed["train"] | listed["test"]) - keys - unpaired):
        raise FileNotFoundError(
            f"{len(missing)} of {sum(map(len, listed.values()))} listed patches of {season} are not there as a pair, "
            f"first {[f'{season}_s2_{scene}_p{patch}.tif' for scene, patch in missing[:3]]}; fetch them, or choose "
            "split='scenes' or 'holdout', which take what is there"
        )
    listed = {name: found & keys for name, found in listed.items()}
    shares = {name: SHARES[name] for name in ("train", "val")}
    training = by_share(Counter(scene for scene, _ in listed["train"]), season, shares)
    return {key: training[key[0]] for key in listed["train"]} | dict.fromkeys(listed["test"], "test")


def _read_list(path: Path, season: str) -> set[Key]:
    files.require(path, "it comes with SEN12MS: bandmask.readers.sen12ms.download_sen12ms(folder, lists=True)")
    found = set()
    for line in path.read_text().split():
        match = _NAME.fullmatch(Path(line).name)
        if match is None:
            raise ValueError(f"{path}: {line!r} is no name like {season}_s2_1_p1.tif")
        if match["season"] == season:
            found.add((int(match["scene"]), int(match["patch"])))
    return found


def _hash(*words: object) -> str:
    return hashlib.sha256("/".join(map(str, words)).encode()).hexdigest()


def check_season(season: str) -> None:
    """A `ValueError` that lists the seasons if there is none of that name."""
    if season not in SEASONS:
        raise ValueError(f"unknown season {season!r}; available: {', '.join(SEASONS)}")
