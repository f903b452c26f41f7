"""3D Gaussian splatting: one scene representation and one rasterizer from a laptop's CPU to a GPU cluster.

Names are imported when they are first used: the console script imports this file, and torch costs seconds where help should be instant.
"""
from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from . import io
    from .camera import Cameras, look_at
    from .capture import Capture, Photo, SceneHeader
    from .errors import BackendUnavailable, BadConfig, BadFile, Diverged, SplatkitError
    from .raster import RasterSettings, RasterStats, RenderOutput, render, uplift
    from .scene import Edit, Scene

_HOME = {
    "io": (),
    "camera": ("Cameras", "look_at"),
    "capture": ("Capture", "Photo", "SceneHeader"),
    "errors": ("BackendUnavailable", "BadConfig", "BadFile", "Diverged", "SplatkitError"),
    "raster": ("RasterSettings", "RasterStats", "RenderOutput", "render", "uplift"),
    "scene": ("Edit", "Scene"),
}
__all__ = ["io", "Cameras", "look_at", "Capture", "Photo", "SceneHeader", "BackendUnavailable", "BadConfig", "BadFile", "Diverged", "SplatkitError",
           "RasterSettings", "RasterStats", "RenderOutput", "render", "uplift", "Edit", "Scene"]


def __getattr__(name: str):
    for module, names in _HOME.items():
        if name == module or name in names:
            home = import_module(f".{module}", __name__)
            globals()[name] = home if name == module else getattr(home, name)
            return globals()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
