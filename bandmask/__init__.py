"""What missing spectral bands cost a satellite image model, and what wins it back: `import bandmask as bm`.

docs/api.md is the page. Names are loaded when they are first used, so importing the package costs nothing.
"""

import importlib
from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("bandmask")
except PackageNotFoundError:  # used from a source tree that was never installed
    __version__ = "0+unknown"

_FROM = {  # module: what it gives to the page
    "bands": ("BANDS", "parse_bands"),
    "scene": ("open_scene",),
    "identity": ("identify",),
    "datasets": ("open_dataset", "pack", "sample_scene", "sample_clouds"),
    "moments": ("Moments",),
    "service": ("guard",),
    "results": ("recommend",),
    "mosaic": ("predict_scene",),
    "api": ("hide", "fill", "fit_moments", "show", "Encoder", "load_encoder", "fine_tune", "evaluate", "detect"),
}
_HOME = {name: module for module, names in _FROM.items() for name in names}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> object:
    """A name of the page, from its module.

    Raises:
        AttributeError: there is none of that name.
    """
    if name == "models":  # a module of its own
        return importlib.import_module("bandmask.models")
    if name not in _HOME:
        raise AttributeError(f"bandmask has no {name!r}; available: {', '.join(__all__)}")
    return getattr(importlib.import_module(f"bandmask.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    """The page's names."""
    return [*__all__, "__version__"]
