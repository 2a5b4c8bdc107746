"""Three descriptions of one environment agree: pyproject.toml, requirements.lock and environment.yml."""

from __future__ import annotations

import re
import tomllib
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
DIRECT = [Requirement(r) for r in [*PROJECT["dependencies"], *EXTRAS["dev"], *EXTRAS["models"]]]
LOCK = (ROOT / "requirements.lock").read_text()
ENTRIES = [line.split() for line in LOCK.replace("\\\n", " ").splitlines() if line.strip() and line[0] != "#"]
PINS = [Requirement(" ".join(word for word in words if not word.startswith("--hash="))) for words in ENTRIES]


def pinned(**environment: str) -> dict[str, list[Version]]:
    """Versions of each package that the lock gives to an environment, this one by default."""
    found: dict[str, list[Version]] = {}
    for pin in PINS:
        (specifier,) = pin.specifier
        assert specifier.operator == "=="
        if pin.marker is None or pin.marker.evaluate(environment):
            found.setdefault(canonicalize_name(pin.name), []).append(Version(specifier.version))
    return found


def test_every_entry_of_the_lock_has_checksums_and_none_names_a_registry():
    """Whoever installs chooses the index, a mirror perhaps; an address in the lock would override it."""
    assert len(PINS) > 100
    for words in ENTRIES:
        hashes = [word for word in words if word.startswith("--hash=")]
        assert hashes
        assert all(re.fullmatch(r"--hash=sha256:[0-9a-f]{64}", word) for word in hashes), words
    assert re.search(r"https?://|^\s*(-i|--index-url|--extra-index-url|--find-links|-f|-e)\b", LOCK, re.M) is None


@pytest.mark.parametrize("platform", ["linux", "darwin"])
@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13"])
def test_each_python_and_platform_gets_one_version_of_each_package_in_its_range(python: str, platform: str):
    system = {"linux": ("Linux", "x86_64"), "darwin": ("Darwin", "arm64")}[platform]
    environment = {"python_version": python, "python_full_version": f"{python}.9", "sys_platform": platform}
    environment |= {"platform_system": system[0], "platform_machine": system[1], "os_name": "posix"}
    found = pinned(**environment)
    assert not [name for name, versions in found.items() if len(versions) > 1]
    for requirement in DIRECT:
        versions = found.get(canonicalize_name(requirement.name), [])
        assert versions, f"{requirement.name} is not in requirements.lock: run `make lock`"
        assert requirement.specifier.contains(versions[0]), f"{versions[0]} is outside {requirement}"


def test_this_environment_is_within_the_ranges_and_torch_is_the_locked_one():
    """A local label (`+cpu`, `+cu130`) is another build of the same version."""
    for requirement in DIRECT:
        installed = metadata.version(requirement.name)
        assert requirement.specifier.contains(installed, prereleases=True), f"{installed} is outside {requirement}"
    for name in ("torch", "torchvision"):
        assert Version(metadata.version(name)).public == pinned()[name][0].public, "not made from requirements.lock"
    boxes = torch.tensor([[0.0, 0.0, 2.0, 2.0], [0.0, 0.0, 2.0, 1.9], [5.0, 5.0, 6.0, 6.0]])
    kept = torchvision.ops.nms(boxes, torch.tensor([0.9, 0.8, 0.7]), 0.5)
    assert kept.tolist() == [0, 2], "of two releases that don't belong together the operators are missing"


def test_conda_gives_a_python_that_the_project_allows_and_leaves_the_packages_to_pyproject():
    """What pyproject.toml lists is installed once, by pip: a second list would drift from it."""
    conda: dict[str, Any] = yaml.safe_load((ROOT / "environment.yml").read_text())
    plain = {re.split(r"[\s<>=!~]", line)[0]: line for line in conda["dependencies"] if isinstance(line, str)}
    assert conda["dependencies"][-1] == {"pip": ["-e .[dev,models]"]}
    assert plain.keys().isdisjoint({canonicalize_name(r.name) for r in DIRECT})
    taken = [f"3.{m}.9" for m in range(8, 30) if Requirement(plain["python"]).specifier.contains(f"3.{m}.9")]
    assert taken
    assert all(SpecifierSet(PROJECT["requires-python"]).contains(version) for version in taken)
