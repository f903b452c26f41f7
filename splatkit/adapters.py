"""Cameras and scenes to other libraries and back: pytorch3d, gsplat, open3d, nerfstudio. Each is imported where it is asked for; arrays go over, never files."""
from __future__ import annotations

import importlib
import math
from collections.abc import Mapping
from types import ModuleType

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from .camera import Cameras
from .density import SH_CONSTANT, from_points
from .errors import BackendUnavailable
from .scene import LOG_SCALE_MIN, Scene, unit_quats

_HOW = {"pytorch3d": "pip install 'splatkit[pytorch3d]' --no-build-isolation", "open3d": "pip install 'splatkit[mesh]'", "nerfstudio": "pip install nerfstudio"}
_SYSTEM = {"open3d": "libusb-1.0-0"}      # what a package needs and its wheel does not bring


def imported(name: str) -> ModuleType:
    """An optional library. Raises BackendUnavailable that says how to get it."""
    try:
        return importlib.import_module(name)
    except ImportError as why:
        package = name.partition(".")[0]
        if package in _SYSTEM and "shared object" in str(why):
            raise BackendUnavailable(f"{package} is there, but cannot be imported ({why}); it needs a library of the system, on Debian `apt install {_SYSTEM[package]}`") from why
        raise BackendUnavailable(f"{package} cannot be imported ({why}); `{_HOW[package]}` brings it") from why


# pytorch3d: x left, y up, z forward; points are rows, X_view = X R + T; the pixel grid is ours


def pytorch3d_arguments(cameras: Cameras) -> dict[str, Tensor | bool]:
    """What pytorch3d.renderer.PerspectiveCameras takes for these cameras, in screen space (in_ndc=False)."""
    flip = torch.tensor([-1.0, -1.0, 1.0]).to(cameras.K)
    K, pose = cameras.K, cameras.world_to_cam
    size = torch.tensor([[cameras.height, cameras.width]], device=K.device).expand(len(cameras), 2)
    return {"R": pose[:, :3, :3].transpose(1, 2) * flip, "T": pose[:, :3, 3] * flip, "focal_length": K[:, (0, 1), (0, 1)], "principal_point": K[:, :2, 2],
            "image_size": size, "in_ndc": False}


def to_pytorch3d(cameras: Cameras):
    """A PerspectiveCameras that projects every point to the same pixels. Raises BackendUnavailable without pytorch3d."""
    return imported("pytorch3d.renderer").PerspectiveCameras(**pytorch3d_arguments(cameras), device=cameras.device)


def from_pytorch3d(cameras) -> Cameras:
    """The views of a PerspectiveCameras in screen space, of its K where it has one. Raises ValueError for one in NDC, without image size, or of several sizes, and for other cameras."""
    if not cameras.is_perspective():
        raise ValueError(f"{type(cameras).__name__} is not perspective; expected a PerspectiveCameras")
    if cameras.in_ndc():
        raise ValueError("the cameras are in NDC; make them with in_ndc=False, focal lengths and principal points in pixels, and image_size")
    sizes = {tuple(int(x) for x in row) for row in cameras.image_size} if cameras.image_size is not None else set()
    if len(sizes) != 1:
        raise ValueError(f"the cameras have {len(sizes)} image sizes; expected one for all")
    (height, width), = sizes
    flip = torch.tensor([-1.0, -1.0, 1.0]).to(cameras.R)
    n = len(cameras.R)
    if cameras.K is not None:       # what it projects by; focal_length is 1 then
        focal, principal = cameras.K[:, (0, 1), (0, 1)], cameras.K[:, :2, 2]
    else:
        focal, principal = cameras.focal_length.reshape(len(cameras.focal_length), -1), cameras.principal_point
    return Cameras(_poses((cameras.R * flip).transpose(1, 2), cameras.T * flip), _intrinsics(focal.expand(n, 2), principal.expand(n, 2)), width, height)


# gsplat: the dictionaries of its trainer and of its rasterization()


def to_gsplat(scene: Scene) -> dict[str, Tensor]:
    """The parameters of gsplat's trainer and exporter: scales as logarithms, opacities as logits, sh0 [N,1,3] and shN [N,K-1,3]."""
    out = {"means": scene.means, "scales": scene.log_scales, "quats": scene.quats, "opacities": scene.logit_opacities, "sh0": scene.sh[:, :1], "shN": scene.sh[:, 1:]}
    return out if scene.features is None else out | {"features": scene.features}


def from_gsplat(splats: Mapping[str, Tensor]) -> Scene:
    """The scene of such a dictionary, `splats` of a checkpoint too. Raises ValueError naming what is missing."""
    if missing := sorted({"means", "scales", "quats", "opacities", "sh0"} - splats.keys()):
        raise ValueError(f"no {', '.join(missing)} among {', '.join(sorted(splats))}; expected the parameters of gsplat's trainer")
    sh = torch.cat([splats["sh0"], *([splats["shN"]] if "shN" in splats else [])], dim=1)
    return Scene(splats["means"], splats["quats"], splats["scales"], splats["opacities"], sh, splats.get("features"))


def gsplat_arguments(scene: Scene, cameras: Cameras) -> dict:
    """What gsplat.rasterization() takes for these pictures: activated values, SH as colours."""
    return {"means": scene.means, "quats": unit_quats(scene.quats), "scales": scene.scales, "opacities": torch.sigmoid(scene.logit_opacities), "colors": scene.sh,
            "sh_degree": scene.sh_degree, "viewmats": cameras.world_to_cam, "Ks": cameras.K, "width": cameras.width, "height": cameras.height}


# open3d: point clouds, plain ones or with the attributes that its own reader gives to splats


def to_open3d(scene: Scene):
    """An open3d.t.geometry.PointCloud with colours and all attributes of the Gaussians, as open3d's reader has them: scales linear, opacities as logits. Raises BackendUnavailable without open3d."""
    o3d = imported("open3d")
    scene = scene.detach().to("cpu", torch.float32)
    tensor = lambda x: o3d.core.Tensor(x.contiguous().numpy())
    cloud = o3d.t.geometry.PointCloud(tensor(scene.means))
    columns = {"colors": (0.5 + SH_CONSTANT * scene.sh[:, 0]).clamp(0, 1), "f_dc": scene.sh[:, 0], "opacity": scene.logit_opacities[:, None],
               "scale": scene.scales, "rot": scene.quats}
    if scene.sh_degree:
        columns["f_rest"] = scene.sh[:, 1:]
    for name, value in columns.items():
        cloud.point[name] = tensor(value)
    return cloud


def from_open3d(cloud, sh_degree: int = 3) -> Scene:
    """The Gaussians of a cloud that has their attributes; else one round Gaussian for each point, as density.from_points makes them, grey where there are no colours.

    Takes both kinds of clouds, open3d.geometry and open3d.t.geometry. Raises ValueError for an empty one.
    """
    column = lambda x: torch.from_numpy(np.array(x if isinstance(x, np.ndarray) else x.cpu().numpy(), np.float32))
    if hasattr(cloud, "point"):
        found = {name: column(cloud.point[name]) for name in cloud.point}
    else:
        found = {"positions": column(np.asarray(cloud.points))} | ({"colors": column(np.asarray(cloud.colors))} if cloud.has_colors() else {})
    points = found.get("positions", torch.zeros(0, 3))
    if not len(points):
        raise ValueError("the cloud holds no points")
    if {"f_dc", "opacity", "scale", "rot"} <= found.keys():
        n = len(points)
        sh = torch.cat([found["f_dc"].reshape(n, 1, 3), *([found["f_rest"].reshape(n, -1, 3)] if "f_rest" in found else [])], dim=1)
        return Scene(points, found["rot"], found["scale"].log().clamp(min=LOG_SCALE_MIN), found["opacity"].reshape(n), sh)
    return from_points(points, found.get("colors", torch.full_like(points, 0.5)).clamp(0, 1), sh_degree)


# nerfstudio: cameras in OpenGL's axes (y up, z backward), and the state of its splatfacto


def nerfstudio_arguments(cameras: Cameras) -> dict:
    """What nerfstudio.cameras.cameras.Cameras takes for these cameras."""
    flip = torch.tensor([1.0, -1.0, -1.0]).to(cameras.K)
    pose = torch.cat([cameras.world_to_cam[:, :3, :3].transpose(1, 2) * flip, cameras.centres[..., None]], dim=2)
    K = cameras.K
    return {"camera_to_worlds": pose, "fx": K[:, 0, 0], "fy": K[:, 1, 1], "cx": K[:, 0, 2], "cy": K[:, 1, 2], "width": cameras.width, "height": cameras.height}


def to_nerfstudio(cameras: Cameras):
    """A nerfstudio Cameras of the same views. Raises BackendUnavailable without nerfstudio."""
    return imported("nerfstudio.cameras.cameras").Cameras(**nerfstudio_arguments(cameras))


def from_nerfstudio(cameras) -> Cameras:
    """The views of a nerfstudio Cameras, or of one that an index took out of it. Raises ValueError where they differ in size, have lens distortion or are not perspective."""
    sizes = {(int(w), int(h)) for w, h in zip(torch.as_tensor(cameras.width).flatten(), torch.as_tensor(cameras.height).flatten())}
    if len(sizes) != 1:
        raise ValueError(f"the cameras have {len(sizes)} image sizes; expected one for all")
    distortion = getattr(cameras, "distortion_params", None)
    if distortion is not None and bool((distortion != 0).any()):
        raise ValueError("the cameras have lens distortion; undistort the photos first, as load_capture does")
    if bool((cameras.camera_type != 1).any()):      # nerfstudio's CameraType.PERSPECTIVE
        raise ValueError("the cameras are not all perspective; expected camera_type CameraType.PERSPECTIVE")
    pose = cameras.camera_to_worlds.reshape(-1, *cameras.camera_to_worlds.shape[-2:])
    rotation = (pose[:, :3, :3] * torch.tensor([1.0, -1.0, -1.0]).to(pose)).transpose(1, 2)
    translation = -(rotation @ pose[:, :3, 3:])[..., 0]
    flat = lambda x: x.reshape(-1)
    K = _intrinsics(torch.stack([flat(cameras.fx), flat(cameras.fy)], dim=1), torch.stack([flat(cameras.cx), flat(cameras.cy)], dim=1))
    (width, height), = sizes
    return Cameras(_poses(rotation, translation), K, width, height)


def from_splatfacto(state: Mapping[str, Tensor]) -> Scene:
    """The scene of a splatfacto model's state, or of the `pipeline` state of a nerfstudio checkpoint, in nerfstudio's world. Raises ValueError naming what is missing.

    Read the checkpoint with torch.load(path, weights_only=True): a file of a stranger may not be unpickled otherwise.
    """
    names = {name.rpartition("gauss_params.")[2]: value for name, value in state.items() if "gauss_params." in name}
    if missing := sorted({"means", "scales", "quats", "opacities", "features_dc", "features_rest"} - names.keys()):
        raise ValueError(f"no gauss_params.{missing[0]} in the state; expected that of splatfacto")
    n = len(names["means"])
    sh = torch.cat([names["features_dc"][:, None], names["features_rest"]], dim=1)
    if sh.shape[1] == 1:        # trained with sh_degree 0, splatfacto keeps the logits of colours
        sh = (torch.sigmoid(sh) - 0.5) / SH_CONSTANT
    if math.isqrt(sh.shape[1]) ** 2 != sh.shape[1]:
        raise ValueError(f"features_rest has {sh.shape[1] - 1} coefficients; expected 0, 3, 8 or 15")
    return Scene(names["means"], names["quats"], names["scales"], names["opacities"].reshape(n), sh)


def _poses(rotation: Float[Tensor, "C 3 3"], translation: Float[Tensor, "C 3"]) -> Float[Tensor, "C 4 4"]:
    out = torch.eye(4).to(rotation).repeat(len(rotation), 1, 1)
    out[:, :3, :3], out[:, :3, 3] = rotation, translation
    return out


def _intrinsics(focal: Float[Tensor, "C 2"], principal: Float[Tensor, "C 2"]) -> Float[Tensor, "C 3 3"]:
    out = torch.eye(3).to(focal).repeat(len(focal), 1, 1)
    out[:, 0, 0], out[:, 1, 1], out[:, :2, 2] = focal[:, 0], focal[:, 1], principal
    return out
