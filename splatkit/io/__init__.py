"""Scenes to files and back. The format is chosen by the file name's suffix; photos.py and colmap.py read captures."""
from __future__ import annotations

import os
from pathlib import Path

from ..capture import SceneHeader
from ..scene import Scene
from . import ply
from .header import UNSAID
from .reading import Report, silent

FORMATS = {     # suffix: module with write(path, scene, header) and read(path, report)
    ".ply": ply,
}


def save(path: str | os.PathLike, scene: Scene, header: SceneHeader = UNSAID) -> None:
    """Writes the scene in the format of the suffix, as float32. `path` holds the old file or the new one, never a part.

    Raises ValueError for an unknown suffix or a value that is not finite (field and row are named), OSError when the disk refuses.
    """
    _format(path).write(path, scene, header)


def load(path: str | os.PathLike, report: Report = silent) -> tuple[Scene, SceneHeader]:
    """The scene (float32, CPU) and how it must be drawn; what the file does not say about that takes SceneHeader's defaults.

    Rows with a NaN or an infinity are dropped and `report` gets a line that counts them.
    Raises ValueError for an unknown suffix, BadFile for anything wrong with the file, more than 10 % of such rows included.
    """
    return _format(path).read(path, report)


def _format(path):
    suffix = Path(path).suffix.lower()
    if suffix not in FORMATS:
        raise ValueError(f"{path}: unknown scene format {suffix!r}; known: {', '.join(FORMATS)}")
    return FORMATS[suffix]
