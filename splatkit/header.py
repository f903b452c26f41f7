"""SceneHeader: how a scene must be drawn. Apart from Capture, so that what reads files without torch can have it."""
from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class SceneHeader:
    """How a scene must be drawn; travels with it through every file format that has room for it.

    `settings` are the names and values of RasterSettings that differ from the INRIA defaults (near, blur_px2, antialias, ...).
    """

    settings: dict[str, float | bool] = field(default_factory=dict)
    up: tuple[float, float, float] | None = None    # unit vector in the scene's world
    metric: bool = False                            # True when one unit is one metre
    source: str = ""                                # what the scene was made from
    step: int = 0                                   # optimiser steps behind it
