"""Scenes to files and back. The format is chosen by the file's first bytes or its suffix (formats.py); photos.py and colmap.py read captures.

load() and save() are imported when they are first used: they need torch, and what only reads arrays need not wait for it.
"""
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .scenes import load, save

__all__ = ["load", "save"]


def __getattr__(name: str):
    if name in __all__:
        from . import scenes
        globals().update({known: getattr(scenes, known) for known in __all__})
        return globals()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
