"""Imports point one way, and importing the package costs nothing heavy."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
HEAVY = ("torch", "timm", "torchgeo", "pandas", "matplotlib", "sklearn", "rasterio", "xarray")


def loaded_by(statement: str) -> set[str]:
    """Top-level modules in a fresh Python after a statement."""
    code = f"import sys; {statement}; print(*sorted({{name.split('.')[0] for name in sys.modules}}))"
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(ran.stdout.split())


def test_layers_import_downwards_only():
    """The contract stands in pyproject.toml; each module must have its place there."""
    tool = Path(sys.executable).with_name("lint-imports")
    if not tool.exists():
        pytest.skip("import-linter is not installed: pip install -e .[dev]")
    ran = subprocess.run([str(tool), "--no-cache"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "1 kept, 0 broken" in ran.stdout


def test_importing_the_package_loads_nothing_heavy():
    loaded = loaded_by("import bandmask")
    assert "bandmask" in loaded
    assert loaded.isdisjoint({*HEAVY, "numpy"})


@pytest.mark.parametrize("module", ["bands", "files", "params"])
def test_the_light_modules_stay_light(module: str):
    """Band names, folders and parameters are needed by tools that never train, such as the build of the graph."""
    assert loaded_by(f"import bandmask.{module}").isdisjoint(HEAVY)
