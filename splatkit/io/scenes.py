"""load() and save(): Scene from and to the arrays that the formats read and write."""
from __future__ import annotations

import os

import torch

from ..header import SceneHeader
from ..scene import Scene
from . import formats
from .header import UNSAID
from .reading import Report, silent


def save(path: str | os.PathLike, scene: Scene, header: SceneHeader = UNSAID, report: Report = silent, **options) -> None:
    """Writes the scene in the format of the suffix, from float32. `path` holds the old file or the new one, never a part.

    Formats differ in what they keep (their write() says how exactly); `report` gets a line about what has no room. Options: version of .spz, level of .ksplat.
    Raises ValueError for an unknown suffix or a value that is not finite (field and row are named), OSError when the disk refuses.
    """
    formats.of_name(path)
    scene = scene.detach().to("cpu", torch.float32)
    scene.check_finite()
    formats.write(path, {name: value.contiguous().numpy() for name, value in scene.fields().items()}, header, report, **options)


def load(path: str | os.PathLike, report: Report = silent) -> tuple[Scene, SceneHeader]:
    """The scene (float32, CPU) and how it must be drawn; what the file does not say about that takes SceneHeader's defaults.

    Rows with a NaN or an infinity are dropped and `report` gets a line that counts them.
    Raises ValueError for an unknown format, BadFile for anything wrong with the file, more than 10 % of such rows included.
    """
    fields, header = formats.read(path, report)
    return Scene(**{name: torch.from_numpy(value) for name, value in fields.items()}), header
