"""Three descriptions of one environment agree: pyproject.toml, requirements.lock and environment.yml."""

from __future__ import annotations

import re
import tomllib
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CONDA: dict[str, Any] = yaml.safe_load((ROOT / "environment.yml").read_text())
DIRECT = [Requirement(r) for r in [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["dev"]]]


@dataclass(frozen=True)
class Pin:
    """One entry of the lock: `name==version ; marker`, and its hashes."""

    requirement: Requirement
    hashes: tuple[str, ...]

    @property
    def name(self) -> str:
        return canonicalize_name(self.requirement.name)

    @property
    def version(self) -> Version:
        (specifier,) = self.requirement.specifier
        assert specifier.operator == "=="
        return Version(specifier.version)

    def applies(self, **environment: str) -> bool:
        return self.requirement.marker is None or self.requirement.marker.evaluate(environment)


def read_lock() -> list[Pin]:
    joined = (ROOT / "requirements.lock").read_text().replace("\\\n", " ")
    lines = [line for line in joined.splitlines() if line.strip() and not line.startswith("#")]
    pins = []
    for line in lines:
        words, *hashes = re.split(r"\s+--hash=", line.strip())
        pins.append(Pin(Requirement(words), tuple(hashes)))
    return pins


PINS = read_lock()


# --- the lock -------------------------------------------------------------------------------------------------------


def test_every_entry_of_the_lock_has_checksums():
    assert len(PINS) > 100
    for pin in PINS:
        assert pin.version, pin.requirement
        assert pin.hashes, f"{pin.requirement} has no hash"
        assert all(re.fullmatch(r"sha256:[0-9a-f]{64}", h) for h in pin.hashes), pin.requirement
        assert pin.requirement.url is None


@pytest.mark.parametrize("requirement", DIRECT, ids=lambda r: r.name)
def test_every_direct_dependency_is_pinned_within_its_range(requirement: Requirement):
    pins = [pin for pin in PINS if pin.name == canonicalize_name(requirement.name)]
    assert pins, f"{requirement.name} is not in requirements.lock: run `make lock`"
    for pin in pins:
        assert requirement.specifier.contains(pin.version), f"{pin.requirement} is outside {requirement}"


@pytest.mark.parametrize("platform", ["linux", "darwin"])
@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13"])
def test_each_python_and_platform_gets_one_version_of_each_package(python: str, platform: str):
    environment = {
        "python_version": python,
        "python_full_version": f"{python}.9",
        "sys_platform": platform,
        "platform_system": {"linux": "Linux", "darwin": "Darwin"}[platform],
        "platform_machine": {"linux": "x86_64", "darwin": "arm64"}[platform],
        "os_name": "posix",
    }
    names = [pin.name for pin in PINS if pin.applies(**environment)]
    assert len(names) == len(set(names)), sorted({n for n in names if names.count(n) > 1})
    assert {canonicalize_name(r.name) for r in DIRECT} <= set(names)


def test_the_lock_names_no_registry():
    """Whoever installs chooses the index, a mirror perhaps; an address in the lock would override it."""
    text = (ROOT / "requirements.lock").read_text()
    assert re.search(r"https?://", text) is None
    assert not re.search(r"^\s*(-i|--index-url|--extra-index-url|--find-links|-f)\b", text, re.MULTILINE)


def test_no_editable_or_local_entry_is_locked():
    assert canonicalize_name(PROJECT["name"]) not in {pin.name for pin in PINS}


# --- this environment -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["torch", "torchvision"])
def test_installed_torch_is_the_locked_one(name: str):
    """A local label (`+cpu`, `+cu130`) is another build of the same version."""
    (pin,) = [pin for pin in PINS if pin.name == name and pin.applies()]
    installed = Version(metadata.version(name))
    assert installed.public == pin.version.public, "this environment was not made from requirements.lock: run `make`"


def test_torchvision_belongs_to_this_torch():
    """Of two releases that don't belong together, the operators are missing, and only at the first use."""
    from torchvision.ops import nms

    boxes = torch.tensor([[0.0, 0.0, 2.0, 2.0], [0.0, 0.0, 2.0, 1.9], [5.0, 5.0, 6.0, 6.0]])
    assert nms(boxes, torch.tensor([0.9, 0.8, 0.7]), 0.5).tolist() == [0, 2]


@pytest.mark.parametrize("requirement", DIRECT, ids=lambda r: r.name)
def test_installed_packages_are_within_their_ranges(requirement: Requirement):
    installed = metadata.version(requirement.name)
    assert requirement.specifier.contains(installed, prereleases=True), f"{installed} is outside {requirement}"


# --- environment.yml ------------------------------------------------------------------------------------------------


def conda_dependencies() -> tuple[list[str], list[str]]:
    """Conda's own lines, and those given to pip."""
    plain = [line for line in CONDA["dependencies"] if isinstance(line, str)]
    (pip,) = [line["pip"] for line in CONDA["dependencies"] if isinstance(line, dict)]
    return plain, pip


def test_conda_makes_an_environment_of_the_projects_name():
    assert CONDA["name"] == PROJECT["name"]
    assert CONDA["channels"] == ["conda-forge"]  # one channel: no mixing of builds, no licence of `defaults`


def test_conda_takes_a_python_that_the_project_allows():
    (line,) = [line for line in conda_dependencies()[0] if re.match(r"python\b", line)]
    conda, ours = SpecifierSet(line.removeprefix("python").replace(" ", "")), SpecifierSet(PROJECT["requires-python"])
    minors = [f"3.{minor}.9" for minor in range(8, 30)]
    taken = [version for version in minors if conda.contains(version)]
    assert taken
    assert all(ours.contains(version) for version in taken)


def test_conda_leaves_the_packages_to_pyproject():
    """What pyproject.toml lists is installed once, by pip: a second list here would drift from it."""
    plain, pip = conda_dependencies()
    assert "pip" in plain
    (line,) = pip
    match = re.fullmatch(r"-e \.\[(\w+(?:,\w+)*)\]", line)
    assert match, f"{line!r} should install this project, editable, with an extra"
    assert set(match[1].split(",")) <= set(PROJECT["optional-dependencies"])
    named = {canonicalize_name(re.split(r"[\s<>=!~]", word)[0]) for word in plain}
    assert named.isdisjoint({canonicalize_name(r.name) for r in DIRECT})
