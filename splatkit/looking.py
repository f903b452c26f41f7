"""The cameras that look at a scene when no camera is named: those of a run's photos, or an orbit."""
from __future__ import annotations

from pathlib import Path

from . import paths
from .camera import Cameras
from .capture import SceneHeader
from .config import Reconstruct
from .errors import BadFile
from .io.reading import Report, silent
from .scene import Scene
from .views import scene_of

ORBIT = (24, 640, 480)      # frames, width, height


def scene_and_cameras(path: Path, say: Report = silent) -> tuple[Scene, SceneHeader, Reconstruct | None, Cameras]:
    """A scene file or run folder as views.scene_of() has it, and where to look from. Raises BadFile."""
    scene, header, config = scene_of(path, say)
    photos = None
    if config is not None:
        try:
            photos = paths.photo_cameras(config)
        except BadFile as why:
            say(f"the run's photos cannot be used, an orbit is: {why}")
    if photos is None:
        frames, width, height = ORBIT
        photos = paths.choose("orbit", scene, header.up, None, frames, width=width, height=height).cameras
    return scene, header, config, photos
