"""Poses and focal lengths as a run refines them: a rigid motion per photo, a factor per camera."""
from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from .camera import Cameras, camera_centres
from .capture import Capture, Photo
from .errors import BadFile
from .io.atomic import replacing
from .io.reading import read_bytes
from .io.transforms import intrinsics, pose
from .optim import adam_


class Poses:
    """The cameras of P photos, fitted beside the scene by Adam (Kingma & Ba 2015) in the tangent space of their poses.

    A step of photo i moves its camera by world_to_cam <- exp(twist) world_to_cam, twist = (rotation in radians, shift in units of
    `extent`), and multiplies both focal lengths of all photos that share its intrinsics by one factor. What a common motion or size of
    all cameras would do is the scene's to do: the first photo's pose stays, and so does the root mean square distance of the others from
    it. Only photos that train are fitted; `refined` says what that means for the others.
    """

    def __init__(self, cameras: Sequence[Cameras], extent: float, pose_lr: float, focal_lr: float):
        """`cameras` are those of the photos, C = 1 each. A rate of 0 leaves poses, or focal lengths, as they are."""
        device, P = cameras[0].device, len(cameras)
        self.world_to_cam = torch.cat([c.world_to_cam for c in cameras]).double()
        keys = [(c.width, c.height, *c.K.flatten().tolist()) for c in cameras]
        kinds = {key: g for g, key in enumerate(dict.fromkeys(keys))}
        self.camera_of = [kinds[key] for key in keys]
        new = lambda *shape: torch.zeros(*shape, device=device)
        self.log_focal = new(len(kinds))
        self.moments = {"m.twist": new(P, 6), "v.twist": new(P, 6), "m.focal": new(len(kinds)), "v.focal": new(len(kinds))}
        self.twist_steps, self.focal_steps = [0] * P, [0] * len(kinds)
        self.rates = torch.tensor([pose_lr] * 3 + [pose_lr * extent] * 3, device=device)
        self.pose_lr, self.focal_lr = pose_lr, focal_lr
        self.size = self._away().norm()

    def camera(self, camera: Cameras, photo: int) -> Cameras:
        """`camera`, that of this photo at any size, as refined so far; its pose and K are leaves that ask for gradients."""
        K = camera.K.clone()
        K[0, :2, :2] *= self.log_focal[self.camera_of[photo]].exp()
        return camera.replace(world_to_cam=self.world_to_cam[photo, None].to(camera.dtype).requires_grad_(), K=K.requires_grad_())

    @torch.no_grad()
    def step(self, photo: int, camera: Cameras, v_pose: Float[Tensor, "1 4 4"], v_K: Float[Tensor, "1 3 3"], decay: float = 1.0) -> None:
        """One step by the gradients at `camera`; both rates are multiplied by `decay`. A gradient that is not finite is left out."""
        if not bool(torch.isfinite(v_pose.sum() + v_K.sum())):
            return
        if self.pose_lr and photo:
            i, W, v = photo, self.world_to_cam[photo], v_pose[0].double()
            # At twist 0 the columns c of world_to_cam move by rotation x c, the last by shift beside.
            rotation = torch.linalg.cross(W[:3].T, v[:3].T).sum(0)
            gradient, twist = torch.cat([rotation, v[:3, 3]]).to(self.rates)[None], self.rates.new_zeros(1, 6)
            self.twist_steps[i] += 1
            adam_(twist, gradient, self.moments["m.twist"][i:i + 1], self.moments["v.twist"][i:i + 1], self.rates * decay, (0.9, 0.999), 1e-15, self.twist_steps[i])
            self.world_to_cam[i] = _rigid(twist[0].double()) @ W
            self._hold_size()
        if self.focal_lr:
            g = self.camera_of[photo]
            gradient = (v_K[0, 0, 0] * camera.K[0, 0, 0] + v_K[0, 1, 1] * camera.K[0, 1, 1]).to(self.log_focal)
            self.focal_steps[g] += 1
            adam_(self.log_focal[g:g + 1, None], gradient.reshape(1, 1), self.moments["m.focal"][g:g + 1, None], self.moments["v.focal"][g:g + 1, None],
                  self.log_focal.new_full((1,), self.focal_lr * decay), (0.9, 0.999), 1e-15, self.focal_steps[g])

    def _away(self) -> Float[Tensor, "P 3"]:
        """Where the cameras are from the first one."""
        centres = camera_centres(self.world_to_cam)
        return centres - centres[0]

    def _hold_size(self) -> None:
        away = self._away()
        size = away.norm()
        centres = camera_centres(self.world_to_cam[:1]) + away * torch.where(size > 0, self.size / size, 1)
        self.world_to_cam[1:, :3, 3] = -torch.einsum("pij,pj->pi", self.world_to_cam[1:, :3, :3], centres[1:])

    def state_dict(self) -> dict[str, Tensor]:
        """Copies of everything that steps change."""
        return {"world_to_cam": self.world_to_cam.clone(), "log_focal": self.log_focal.clone(), **{name: x.clone() for name, x in self.moments.items()},
                "twist_steps": torch.tensor(self.twist_steps), "focal_steps": torch.tensor(self.focal_steps)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Goes on exactly where `state_dict` was taken."""
        for name, x in {"world_to_cam": self.world_to_cam, "log_focal": self.log_focal, **self.moments}.items():
            x.copy_(state[name])
        self.twist_steps, self.focal_steps = state["twist_steps"].tolist(), state["focal_steps"].tolist()

    def save(self, path: Path, photos: Sequence[Photo]) -> None:
        """The refined cameras as a transforms.json in the world of the input poses (applied_transform is the identity): OpenGL axes, intrinsics
        of each photo at its full size without distortion."""
        flip = torch.tensor([1.0, -1, -1, 1], dtype=torch.float64)
        frames = []
        for i, photo in enumerate(photos):
            factor = float(self.log_focal[self.camera_of[i]].double().exp())
            frames.append({"file_path": photo.name, "w": photo.width, "h": photo.height, "fl_x": photo.K[0, 0] * factor, "fl_y": photo.K[1, 1] * factor,
                           "cx": photo.K[0, 2], "cy": photo.K[1, 2], "transform_matrix": (torch.linalg.inv(self.world_to_cam[i].cpu()) * flip).tolist()})
        with replacing(path) as file:
            file.write(json.dumps({"camera_model": "PINHOLE", "applied_transform": torch.eye(4)[:3].tolist(), "frames": frames}, indent=1).encode())


def refined(capture: Capture, path: Path) -> Capture:
    """The capture with the cameras that `Poses.save` wrote to `path`; as it is where there is no such file. A photo that did not train keeps
    its pose, and has the focal length that was fitted to those of the same intrinsics.

    Raises BadFile where the file is no such thing.
    """
    if not path.exists():
        return capture
    try:
        frames = {frame["file_path"]: frame for frame in json.loads(read_bytes(path))["frames"]}
        kind = lambda photo: (photo.width, photo.height, *photo.K.flatten().tolist())
        factors = {kind(photo): frames[photo.name]["fl_x"] / photo.K[0, 0] for photo in capture.photos if photo.name in frames}
        posed = lambda photo, frame: dataclasses.replace(photo, K=intrinsics(frame, photo.width, photo.height, ValueError), world_to_cam=pose(frame, np.eye(4), ValueError))
        focal = lambda photo: dataclasses.replace(photo, K=photo.K * [[factors.get(kind(photo), 1.0)] * 2 + [1.0]])
        photos = tuple(posed(photo, frames[photo.name]) if photo.name in frames else focal(photo) for photo in capture.photos)
    except (ValueError, KeyError, TypeError, RecursionError) as e:
        raise BadFile(path, "", "not the cameras that a run wrote; take the file away to use those of the photos") from e
    return dataclasses.replace(capture, photos=photos)


def _rigid(twist: Float[Tensor, " 6"]) -> Float[Tensor, "4 4"]:
    """exp of (rotation, shift) in se(3)."""
    generator = twist.new_zeros(4, 4)
    x, y, z = twist[:3]
    generator[0, 1], generator[0, 2], generator[1, 0], generator[1, 2], generator[2, 0], generator[2, 1] = -z, y, z, -x, -y, x
    generator[:3, 3] = twist[3:]
    return torch.linalg.matrix_exp(generator)
