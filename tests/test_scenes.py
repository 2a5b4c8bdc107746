"""Splits of SEN12MS: by scene, the same every time, near the shares, and as published where that is asked for."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import given

from bandmask.readers import scenes
from bandmask.readers.scenes import HOLD_OUT, SEASONS, VALIDATION, Key

SPRING = "ROIs1158_spring"
SIZES = st.dictionaries(st.integers(1, 150), st.integers(1, 40), min_size=3, max_size=40)


def keys_of(sizes: dict[int, int]) -> list[Key]:
    return [(scene, patch) for scene, size in sizes.items() for patch in range(size)]


@given(SIZES)
def test_no_scene_is_in_two_splits_and_no_split_is_empty(sizes: dict[int, int]) -> None:
    splits, unlisted = scenes.assign(keys_of(sizes), SPRING, "scenes", Path())
    assert unlisted == 0
    assert set(splits) == set(keys_of(sizes))
    assert all(len({splits[key] for key in splits if key[0] == scene}) == 1 for scene in sizes)
    assert set(splits.values()) == {"train", "val", "test"}


def test_of_many_scenes_the_patches_are_split_70_15_15() -> None:
    sizes = {scene: 100 + 7 * (scene % 40) for scene in range(1, 150)}
    splits, _ = scenes.assign(keys_of(sizes), SPRING, "scenes", Path())
    shares = {name: count / len(splits) for name, count in Counter(splits.values()).items()}
    assert shares == pytest.approx({"train": 0.70, "val": 0.15, "test": 0.15}, abs=0.02)


def test_the_split_does_not_depend_on_the_order_of_files_and_does_on_the_season() -> None:
    sizes = {scene: 5 for scene in range(1, 40)}
    first, _ = scenes.assign(keys_of(sizes), SPRING, "scenes", Path())
    again, _ = scenes.assign(keys_of(sizes)[::-1], SPRING, "scenes", Path())
    other, _ = scenes.assign(keys_of(sizes), "ROIs1970_fall", "scenes", Path())
    assert first == again
    assert first != other


@pytest.mark.parametrize("split", ["scenes", "holdout"])
def test_too_few_scenes_for_a_split_are_an_error_that_names_them(split: str) -> None:
    with pytest.raises(ValueError, match=r"leaves .*test empty: ROIs1158_spring has the scenes \[7, 8\] here"):
        scenes.assign(keys_of({7: 50, 8: 50}), SPRING, split, Path())


def test_an_unknown_split_is_an_error_that_lists_those_there_are() -> None:
    with pytest.raises(ValueError, match="unknown split 'random'; available: scenes, holdout, lists"):
        scenes.assign(keys_of({1: 1}), SPRING, "random", Path())


# --- published scenes and lists


@pytest.mark.parametrize("season", SEASONS)
def test_published_scenes_of_hold_out_and_validation_are_apart(season: str) -> None:
    assert not set(HOLD_OUT[season]) & set(VALIDATION[season])


def test_there_are_as_many_published_scenes_as_the_repository_lists() -> None:
    assert [len(HOLD_OUT[season]) for season in SEASONS] == [6, 7, 8, 5]
    assert [len(VALIDATION[season]) for season in SEASONS] == [6, 6, 9, 4]


def test_hold_out_scenes_are_tested_on_and_validation_scenes_are_not_trained_on() -> None:
    splits, _ = scenes.assign(keys_of({scene: 3 for scene in range(1, 150)}), SPRING, "holdout", Path())
    for name, expected in (("test", {15, 17, 63, 97, 124, 146}), ("val", {44, 45, 77, 112, 113, 117})):
        assert {scene for (scene, _), split in splits.items() if split == name} == expected


def write_lists(root: Path, train: list[Key], test: list[Key]) -> None:
    """As published: names of s2 files of all seasons (generated names)."""
    for name, keys in (("train", train), ("test", test)):
        lines = [f"{SPRING}_s2_{scene}_p{patch}.tif" for scene, patch in keys]
        (root / f"{name}_list.txt").write_text("\n".join([*lines, "ROIs1970_fall_s2_1_p9999.tif"]))


def test_lists_are_followed_and_validation_scenes_come_out_of_training(tmp_path: Path) -> None:
    keys = keys_of({scene: 4 for scene in range(1, 21)})
    train = [key for key in keys if key[0] <= 15 and key[1] < 3]
    test = [key for key in keys if key[0] > 16]
    write_lists(tmp_path, train, test)
    splits, unlisted = scenes.assign(keys, SPRING, "lists", tmp_path)
    assert {key for key, split in splits.items() if split == "test"} == set(test)
    assert {key for key, split in splits.items() if split in ("train", "val")} == set(train)
    validation = {scene for (scene, _), split in splits.items() if split == "val"}
    assert validation
    assert not validation & {scene for (scene, _), split in splits.items() if split == "train"}
    assert unlisted == len(keys) - len(train) - len(test)


def test_a_scene_in_both_lists_is_an_error_that_names_it(tmp_path: Path) -> None:
    keys = keys_of({scene: 4 for scene in range(1, 6)})
    write_lists(tmp_path, [key for key in keys if key != (3, 0)], [(3, 0)])
    with pytest.raises(ValueError, match=r"both hold patches of ROIs1158_spring, scenes \[3\]"):
        scenes.assign(keys, SPRING, "lists", tmp_path)


def test_listed_patches_that_are_not_there_are_named_and_counted(tmp_path: Path) -> None:
    keys = keys_of({scene: 4 for scene in range(1, 6)})
    write_lists(tmp_path, [*keys[:-4], (77, 1), (78, 2)], keys[-4:])
    with pytest.raises(FileNotFoundError, match=r"2 of 22 listed patches.*ROIs1158_spring_s2_77_p1.tif"):
        scenes.assign(keys, SPRING, "lists", tmp_path)


def test_without_lists_the_error_says_how_to_get_them(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"train_list.txt.*download_sen12ms\(folder, lists=True\)"):
        scenes.assign(keys_of({1: 1}), SPRING, "lists", tmp_path)
    (tmp_path / "train_list.txt").write_text("scene_1.tif")
    with pytest.raises(ValueError, match=r"train_list.txt: 'scene_1.tif' is no name like"):
        scenes.assign(keys_of({1: 1}), SPRING, "lists", tmp_path)


# --- a small choice


@given(SIZES, st.integers(3, 200), st.integers(0, 100))
def test_fewer_patches_are_part_of_more_and_every_split_has_some(sizes: dict[int, int], few: int, further: int) -> None:
    splits, _ = scenes.assign(keys_of(sizes), SPRING, "scenes", Path())
    small, large = scenes.spread(splits, few), scenes.spread(splits, few + further)
    assert set(small) <= set(large) <= set(splits)
    assert small == sorted(small)
    assert len(small) == min(few, len(splits))
    assert {splits[key] for key in small} == {"train", "val", "test"}


def test_a_small_choice_takes_from_all_scenes_and_keeps_the_shares() -> None:
    splits, _ = scenes.assign(keys_of({scene: 100 for scene in range(1, 101)}), SPRING, "scenes", Path())
    chosen = scenes.spread(splits, 200)
    assert set(Counter(scene for scene, _ in chosen).values()) == {2}
    assert len({scene for scene, _ in chosen}) == 100
    assert Counter(splits[key] for key in chosen) == pytest.approx({"train": 140, "val": 30, "test": 30}, abs=2)


def test_all_patches_are_chosen_where_no_number_is_given() -> None:
    splits, _ = scenes.assign(keys_of({1: 2, 2: 2, 3: 2}), SPRING, "scenes", Path())
    assert scenes.spread(splits, None) == sorted(splits) == scenes.spread(splits, 1000)
    with pytest.raises(ValueError, match="max_patches is 3 or more"):
        scenes.spread(splits, 2)
