"""From the heads' raw numbers to a Scene in the world of the input poses."""
from __future__ import annotations

import functools
import math

import torch
from jaxtyping import Float
from torch import Tensor

from ..scene import Scene, quat_from_matrix, quat_multiply, rotate_sh
from .config import MVSplatConfig
from .predictor import Prediction

DRAWN_DEGREE = 3


def pixel_rays(K: Float[Tensor, "*B 3 3"], height: int, width: int) -> Float[Tensor, "*B H W 3"]:
    """Directions of camera z = 1 through the centres of the pixels."""
    y, x = torch.meshgrid(torch.arange(height).to(K) + 0.5, torch.arange(width).to(K) + 0.5, indexing="ij")
    return _through(K, torch.stack([x, y], dim=-1).expand(*K.shape[:-2], height, width, 2))


def _through(K: Tensor, at: Float[Tensor, "*B H W 2"]) -> Float[Tensor, "*B H W 3"]:
    """Directions of camera z = 1 through places in the picture."""
    focal, centre = K[..., None, None, [0, 1], [0, 1]], K[..., None, None, :2, 2]
    return torch.nn.functional.pad((at - centre) / focal, (0, 1), value=1.0)


def camera_depth(prediction: Tensor, K: Float[Tensor, "B V 3 3"], unit_rays: bool) -> Float[Tensor, "B V h w"]:
    """Camera z where the heads predict 1/depth, or 1/distance along the ray (`unit_rays`). `K` is in pixels of the prediction."""
    depth = 1 / prediction
    return depth / pixel_rays(K, *prediction.shape[-2:]).norm(dim=-1) if unit_rays else depth


def to_scenes(prediction: Prediction, K: Float[Tensor, "B V 3 3"], world_to_cam: Float[Tensor, "B V 4 4"], config: MVSplatConfig,
              official: bool = False) -> tuple[Scene, ...]:
    """One scene for each of B samples, differentiable; row = (view * H + y) * W + x.

    A Gaussian lies on a ray through its pixel. Its standard deviations are a range of pixels at its depth. Colours are predicted in axes of
    the camera and in the order of the published rasterizer, and turned into the world; `official` turns them as the published code does,
    which is no rotation (its basis has other signs than its rotation matrices expect), so that its colours depend on the choice of the world.
    """
    b, v, _, h, w = prediction.raw_gaussians.shape
    offset, scale, quat, sh = prediction.raw_gaussians.permute(0, 1, 3, 4, 2).split([2, 3, 4, prediction.raw_gaussians.shape[2] - 9], dim=-1)
    y, x = torch.meshgrid(torch.arange(h).to(K), torch.arange(w).to(K), indexing="ij")
    rays = _through(K, torch.stack([x, y], dim=-1) + offset.sigmoid())      # the middle of the offset is the centre of the pixel
    depth = 1 / prediction.inverse_depth[..., None]
    points = depth * (torch.nn.functional.normalize(rays, dim=-1) if config.unit_rays else rays)
    smallest, largest = config.scale_range
    pixel = 0.1 * (1 / K[..., 0, 0] + 1 / K[..., 1, 1])[..., None, None, None]
    log_scales = ((smallest + (largest - smallest) * scale.sigmoid()) * depth * pixel).log()
    turn = world_to_cam[..., :3, :3].transpose(-1, -2)
    means = torch.einsum("bvij,bvhwj->bvhwi", turn, points - world_to_cam[..., None, None, :3, 3])
    coefficients = sh.unflatten(-1, (3, -1)).transpose(-1, -2)[..., :(DRAWN_DEGREE + 1) ** 2, :]
    degree = math.isqrt(coefficients.shape[-2]) - 1
    coefficients = coefficients * sh_damping(degree).to(sh)[:, None]
    scenes = []
    for i in range(b):
        matrices = torch.stack([sh_to_world(turn[i, j], degree, official) for j in range(v)])
        quats = torch.stack([quat_from_matrix(turn[i, j]) for j in range(v)])[:, None, None]
        scenes.append(Scene(means=means[i].reshape(-1, 3), quats=quat_multiply(quats, quat[i][..., [3, 0, 1, 2]]).reshape(-1, 4),
                            log_scales=log_scales[i].reshape(-1, 3), logit_opacities=prediction.opacity_logits[i].flatten(),
                            sh=torch.einsum("vkj,vhwjc->vhwkc", matrices, coefficients[i]).reshape(v * h * w, -1, 3)))
    return tuple(scenes)


def sh_damping(degree: int) -> Float[Tensor, " K"]:
    """Factors on the predicted coefficients: 1, and 0.1 / 4^l for band l."""
    return torch.cat([torch.full((2 * band + 1,), 0.1 * 0.25 ** band if band else 1.0) for band in range(degree + 1)])


def sh_to_world(cam_to_world: Float[Tensor, "3 3"], degree: int, official: bool = False) -> Float[Tensor, "K K"]:
    """The matrix from predicted coefficients, in axes of the camera, to those of a Scene.

    The published rasterizer evaluates the usual basis at (z, x, y) in place of (x, y, z): the prediction is a scene's colour turned by that
    permutation. `official`: the permuted basis is that of e3nn but for the sign (-1)^index, with whose rotation matrices the coefficients
    are turned before, as they are.
    """
    rotation = cam_to_world.detach().double().cpu()
    standard = _standard_from_predicted(degree)
    if not official:
        return (_turn(rotation, degree) @ standard).to(cam_to_world)
    signs = (-1.0) ** torch.arange((degree + 1) ** 2, dtype=torch.float64)
    in_basis = torch.linalg.inv(standard) @ _turn(rotation, degree) @ standard
    return (standard @ (signs[:, None] * in_basis * signs)).to(cam_to_world)


@functools.cache
def _standard_from_predicted(degree: int) -> Float[Tensor, "K K"]:
    return _turn(torch.tensor([[0.0, 1, 0], [0, 0, 1], [1, 0, 0]], dtype=torch.float64), degree)


def _turn(rotation: Tensor, degree: int) -> Float[Tensor, "K K"]:
    """What rotate_sh does to coefficients."""
    n = (degree + 1) ** 2
    return rotate_sh(torch.eye(n, dtype=torch.float64)[..., None].expand(n, n, 3), rotation)[..., 0].T
