"""How a run works: its photos at the size and on the device that its config says, and the settings that it draws with."""
from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from . import config as configs
from . import io
from .camera import Cameras
from .capture import Capture, Photo, SceneHeader
from .config import Reconstruct
from .errors import BackendUnavailable, BadFile
from .io.depth import load_depth
from .io.photos import load_image, load_mask
from .io.reading import Report, silent
from .io.source import load_source
from .raster import RasterSettings, backends, device_for
from .scene import Scene


@dataclass(frozen=True)
class Views:
    """The photos of a capture at the size and on the device that a run works with."""

    capture: Capture
    downscale: float
    max_side: int = 0       # pixels; 0 = any
    device: str = "cpu"

    def size(self, photo: Photo) -> tuple[int, int]:
        return photo.size_at(self.downscale, self.max_side)

    def camera(self, i: int) -> Cameras:
        photo = self.capture.photos[i]
        return photo.camera().resized(*self.size(photo)).to(self.device)

    def image(self, i: int) -> Tensor:
        photo = self.capture.photos[i]
        return torch.from_numpy(load_image(photo, *self.size(photo))).to(self.device)

    def mask(self, i: int) -> Tensor | None:
        """Which of its pixels count; None: all."""
        photo = self.capture.photos[i]
        kept = load_mask(photo, *self.size(photo))
        return None if kept is None else torch.from_numpy(kept).to(self.device)

    def depth(self, i: int, source: str) -> Tensor | None:
        """What `source` of config.Depth knows of its depth."""
        if source == "points":
            return self.capture.sparse_depth(i, self.camera(i))
        depth = load_depth(self.capture.photos[i], *self.size(self.capture.photos[i])) if source == "sensor" else None
        return None if depth is None else torch.from_numpy(depth).to(self.device)


def run_config(run: Path, instead: str = "") -> Reconstruct:
    """What a run folder was made with, wherever the folder is now. Raises BadFile where it is none; `instead` is what else was expected."""
    if not (run / "config.yaml").is_file():
        raise BadFile(run, "config.yaml", f"no such file; expected a run folder of `splatkit reconstruct`{instead}")
    return dataclasses.replace(configs.load_yaml(run / "config.yaml", Reconstruct), output=run)


def scene_of(path: Path, say: Report = silent) -> tuple[Scene, SceneHeader, Reconstruct | None]:
    """The scene of a file (or a folder of an unbundled SOG) or of a run folder, how it must be drawn, and what the run was made with. Raises BadFile."""
    config = run_config(path, " or a scene file") if path.is_dir() and not (path / "meta.json").is_file() else None
    file = path / "scene.ply" if config else path
    scene, header = io.load(file, say)
    if unknown := set(header.settings) - set(RasterSettings.__dataclass_fields__):
        raise BadFile(file, "header", f"must be drawn with {', '.join(sorted(unknown))}, which this version does not know")
    return scene, header, config


def views_of(config: Reconstruct, say: Report = silent) -> Views:
    """The photos of `config.data`. Raises BadFile for what is wrong with them or their poses, BackendUnavailable as working_device()."""
    device = working_device(config)
    capture, downscale = load_source(config.data, config.output, config.downscale, say)
    return Views(capture, downscale, config.max_side, device)


def working_device(config: Reconstruct) -> str:
    """Where the run works. Raises BackendUnavailable where that cannot be, or only at a crawl."""
    known = backends()
    if config.backend == "gsplat":
        if known["gsplat"] is not None or config.device == "cpu":
            raise BackendUnavailable(f"gsplat: {known['gsplat'] or 'it draws on a card, and --device is cpu'}")
        return "cuda"
    device = device_for("cpu" if config.device == "auto" and config.backend not in ("auto", "cuda") else config.device)
    if device == "cpu" and config.backend == "auto" and known["cpu"] is not None:
        raise BackendUnavailable(f"the native CPU library is missing ({known['cpu']}). `splatkit doctor` says what to do; "
                                 "--backend reference draws with plain torch, about a thousand times slower")
    return device


def raster_settings(config: Reconstruct) -> RasterSettings:
    return RasterSettings(antialias=config.antialias)
