"""Cameras: C pinhole views of one size. OpenCV axes: x right, y down, z forward; the centre of pixel (0, 0) is (0.5, 0.5)."""
from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True)
class Cameras:
    """C pinhole cameras that share an image size.

    `rows[c] = (first, last)` limits camera c to the scene rows first <= row < last: a batch of scenes is their concatenation with
    one range each, a shard or a crop is a range. None means all rows.
    """

    world_to_cam: Float[Tensor, "C 4 4"]    # rigid, last row 0 0 0 1
    K: Float[Tensor, "C 3 3"]               # pixels: fx 0 cx / 0 fy cy / 0 0 1
    width: int
    height: int
    rows: Int[Tensor, "C 2"] | None = None

    def __post_init__(self):
        w2c, K = self.world_to_cam, self.K
        if w2c.ndim != 3 or w2c.shape[1:] != (4, 4):
            raise ValueError(f"world_to_cam has shape {tuple(w2c.shape)}; expected [C, 4, 4] (one camera is C = 1)")
        if K.shape != (w2c.shape[0], 3, 3):
            raise ValueError(f"K has shape {tuple(K.shape)}; expected [{w2c.shape[0]}, 3, 3]")
        if w2c.dtype != K.dtype or w2c.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"world_to_cam is {w2c.dtype} and K {K.dtype}; both must be float32 or both float64")
        if w2c.device != K.device:
            raise ValueError(f"world_to_cam is on {w2c.device} but K on {K.device}; move one with .to(...)")
        if isinstance(self.width, bool) or not (isinstance(self.width, int) and isinstance(self.height, int)):
            raise TypeError(f"image size {self.width!r} x {self.height!r}; expected two int")
        if not (1 <= self.width <= 32768 and 1 <= self.height <= 32768):
            raise ValueError(f"image size {self.width} x {self.height}; expected 1 to 32768 pixels a side")
        if self.rows is not None and (self.rows.shape != (len(self), 2) or self.rows.dtype != torch.int64):
            raise ValueError(f"rows is {self.rows.dtype} {tuple(self.rows.shape)}; expected int64 [{len(self)}, 2]")

    def __len__(self) -> int:
        return self.world_to_cam.shape[0]

    def __getitem__(self, index: int | slice) -> Cameras:
        """The chosen cameras, still batched: cameras[3] is C = 1."""
        s = slice(index, index + 1 or None) if isinstance(index, int) else index
        return self.replace(world_to_cam=self.world_to_cam[s], K=self.K[s], rows=None if self.rows is None else self.rows[s])

    @property
    def device(self) -> torch.device:
        return self.world_to_cam.device

    @property
    def dtype(self) -> torch.dtype:
        return self.world_to_cam.dtype

    @property
    def centres(self) -> Float[Tensor, "C 3"]:
        """Camera positions in the world."""
        return camera_centres(self.world_to_cam)

    def replace(self, **changes) -> Cameras:
        return dataclasses.replace(self, **changes)

    def to(self, device=None, dtype=None) -> Cameras:
        return self.replace(world_to_cam=self.world_to_cam.to(device=device, dtype=dtype), K=self.K.to(device=device, dtype=dtype),
                            rows=None if self.rows is None else self.rows.to(device=device))

    def resized(self, width: int, height: int) -> Cameras:
        """The same views at another image size: K is scaled by both exact ratios."""
        ratio = torch.tensor([width / self.width, height / self.height, 1.0], dtype=torch.float64)
        return self.replace(K=(self.K.double() * ratio.to(self.device, non_blocking=True)[:, None]).to(self.dtype), width=width, height=height)

    def check(self) -> None:
        """Raises ValueError naming the camera whose pose or intrinsics cannot be used."""
        poses, intrinsics = self.world_to_cam.detach().flatten(1).tolist(), self.K.detach().flatten(1).tolist()
        for c, (pose, k) in enumerate(zip(poses, intrinsics)):
            if not all(map(math.isfinite, pose + k)):
                raise ValueError(f"camera {c} holds a NaN or an infinity in world_to_cam or K")
            if k[0] <= 0 or k[4] <= 0:
                raise ValueError(f"camera {c} has focal lengths {k[0]:g}, {k[4]:g}; expected both > 0 (pixels)")
            if k[1] != 0 or k[3] != 0:
                raise ValueError(f"camera {c} has skew {k[1] or k[3]:g}; only K without skew is supported")

    @staticmethod
    def cat(cameras: list[Cameras]) -> Cameras:
        """All cameras in order; they must share the image size."""
        if len({(c.width, c.height) for c in cameras}) != 1:
            raise ValueError("cameras of different image sizes cannot share one Cameras; resize them or render one by one")
        rows = None if cameras[0].rows is None else torch.cat([c.rows for c in cameras])
        return cameras[0].replace(world_to_cam=torch.cat([c.world_to_cam for c in cameras]), K=torch.cat([c.K for c in cameras]), rows=rows)


def camera_centres(world_to_cam: Float[Tensor, "C 4 4"]) -> Float[Tensor, "C 3"]:
    """Positions in the world: -R^T t."""
    rotation, t = world_to_cam[:, :3, :3], world_to_cam[:, :3, 3]
    return -(rotation.transpose(1, 2) @ t[..., None]).squeeze(-1)


def relative_pose(here: Float[Tensor, "*B 4 4"], there: Float[Tensor, "*B 4 4"]) -> Float[Tensor, "*B 4 4"]:
    """From the axes of cameras `here` to those of cameras `there`, by the world_to_cam of both."""
    turn = there[..., :3, :3] @ here[..., :3, :3].transpose(-1, -2)
    shift = there[..., :3, 3:] - turn @ here[..., :3, 3:]
    return torch.cat([torch.cat([turn, shift], dim=-1), there[..., 3:, :]], dim=-2)


def unproject(camera: Cameras, at: Float[Tensor, "*P 2"], z: Float[Tensor, "*P"]) -> Float[Tensor, "*P 3"]:
    """World points at depths z on the rays through places in the picture of one camera, in pixels."""
    K, pose = camera.K[0], camera.world_to_cam[0]
    local = torch.cat([(at - K[:2, 2]) / torch.stack([K[0, 0], K[1, 1]]) * z[..., None], z[..., None]], dim=-1)
    return (local - pose[:3, 3]) @ pose[:3, :3]


def look_at(eye: Float[Tensor, " 3"], target: Float[Tensor, " 3"], up: Float[Tensor, " 3"]) -> Float[Tensor, "4 4"]:
    """world_to_cam of a camera at `eye` that looks at `target` with `up` pointing up in the image (image y points down)."""
    forward = torch.nn.functional.normalize(target - eye, dim=0)
    right = torch.linalg.cross(forward, up)
    if right.norm() < 1e-6:
        raise ValueError("look_at: up is parallel to the viewing direction")
    right = torch.nn.functional.normalize(right, dim=0)
    rotation = torch.stack([right, torch.linalg.cross(forward, right), forward])
    out = torch.eye(4, dtype=eye.dtype, device=eye.device)
    out[:3, :3] = rotation
    out[:3, 3] = -rotation @ eye
    return out
