"""Capture: posed photos and sparse points, one result for every source."""
from __future__ import annotations

import functools
import math
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from numpy import ndarray as Array

from .camera import Cameras
from .header import SceneHeader as SceneHeader


@dataclass(frozen=True)
class Lens:
    """The camera of stored pixels that are distorted; io.lens has the arithmetic."""

    model: str                                  # COLMAP's name: SIMPLE_RADIAL, OPENCV, OPENCV_FISHEYE, ...
    K: Float[Array, "3 3"]                      # pixels of width x height, the size as stored
    width: int
    height: int
    params: dict[str, float]                    # distortion coefficients by COLMAP's names; one that is absent is 0


@dataclass(frozen=True)
class Photo:
    """One posed photo on disk. Pixels are read when they are needed (io.photos.load_image), never here."""

    name: str                                   # unique in its capture, as the source file names it
    path: Path
    K: Float[Array, "3 3"]                      # pixels of width x height, no distortion
    width: int
    height: int
    world_to_cam: Float[Array, "4 4"]           # OpenCV axes
    mask: Path | None = None                    # 8-bit image of the photo's size; 0 = pixel is ignored
    depth: Path | None = None                   # 16-bit picture of camera z in the photo's shape; 0 = not known
    depth_unit: float = 1e-3                    # world units of one of its steps
    exposure_group: int = 0
    lens: Lens | None = None                    # the stored pixels came through it; K, width and height are of the ideal picture

    def size_at(self, downscale: float = 1, max_side: int = 0) -> tuple[int, int]:
        """Width and height, rounded down, at 1/downscale of the size and with no side above max_side pixels (0: any)."""
        factor = max(downscale, max(self.width, self.height) / max_side if max_side else 1)
        return max(1, math.floor(self.width / factor)), max(1, math.floor(self.height / factor))

    def camera(self, dtype=torch.float32) -> Cameras:
        """This photo's view, C = 1."""
        return Cameras(torch.as_tensor(self.world_to_cam, dtype=dtype)[None], torch.as_tensor(self.K, dtype=dtype)[None], self.width, self.height)


@dataclass(frozen=True)
class Capture:
    """Posed photos and the sparse points they share, in the world of the input poses (never re-centred or rescaled).

    `photos` are sorted by name. `point_views[i]` are the indices into `photos` that observe point i (empty when unknown).
    """

    photos: tuple[Photo, ...]
    points: Float[Array, "P 3"] = field(default_factory=lambda: np.zeros((0, 3), np.float32))
    points_rgb: UInt8[Array, "P 3"] = field(default_factory=lambda: np.zeros((0, 3), np.uint8))
    point_views: tuple[Int[Array, " _"], ...] = ()
    world: str = "colmap"                       # whose coordinate frame: "colmap", "transforms.json", "rooms"

    def split(self, every: int = 8) -> tuple[list[int], list[int]]:
        """Indices of (training, held-out) photos: 0, every, 2 every, ... by name are held out; every = 0 holds out none."""
        held = [i for i in range(len(self.photos)) if every and i % every == 0]
        return [i for i in range(len(self.photos)) if i not in set(held)], held

    @functools.cached_property
    def _sightings(self) -> tuple[Int[Array, " S"], Int[Array, " S"]]:
        """Photo and point of everything that point_views says, by photo."""
        viewers = np.concatenate([np.zeros(0, np.int64), *self.point_views])
        order = np.argsort(viewers, kind="stable")
        return viewers[order], np.repeat(np.arange(len(self.point_views)), [len(views) for views in self.point_views])[order]

    def sparse_depth(self, photo: int, camera: Cameras) -> Float[torch.Tensor, "H W"]:
        """Depth of the points that `photo` observes in the pixels of `camera` where they are, 0 elsewhere; the nearest where several are."""
        viewers, viewed = self._sightings
        seen = viewed[np.searchsorted(viewers, photo):np.searchsorted(viewers, photo, "right")]
        xyz = torch.from_numpy(self.points[seen]).double()
        pose, K = camera.world_to_cam[0].double().cpu(), camera.K[0].double().cpu()
        x, y, z = (K @ (pose[:3, :3] @ xyz.T + pose[:3, 3:])).float()
        column, row = (x / z).floor(), (y / z).floor()
        inside = (z > 0) & (column >= 0) & (column < camera.width) & (row >= 0) & (row < camera.height)
        depth = torch.full((camera.height * camera.width,), torch.inf)
        depth.scatter_reduce_(0, (row[inside] * camera.width + column[inside]).long(), z[inside], "amin")
        return torch.where(depth.isfinite(), depth, 0).view(camera.height, camera.width).to(camera.device)
