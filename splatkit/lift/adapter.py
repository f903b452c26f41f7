"""From the heads' raw numbers to a Scene in the world of the input poses."""
from __future__ import annotations

import functools
import math

import torch
from jaxtyping import Float
from torch import Tensor

from ..scene import Scene, quat_from_matrix, quat_multiply, sh_rotation
from .config import MVSplatConfig
from .predictor import Prediction
from .rays import pixel_grid, pixel_rays, through

DRAWN_DEGREE = 3


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
    rays = through(K, pixel_grid(K, h, w) + offset.sigmoid())      # the middle of the offset is the centre of the pixel
    depth = 1 / prediction.inverse_depth[..., None]
    points = depth * (torch.nn.functional.normalize(rays, dim=-1) if config.unit_rays else rays)
    smallest, largest = config.scale_range
    pixel = 0.1 * (1 / K[..., 0, 0] + 1 / K[..., 1, 1])[..., None, None, None]
    log_scales = ((smallest + (largest - smallest) * scale.sigmoid()) * depth * pixel).log()
    turn = world_to_cam[..., :3, :3].transpose(-1, -2)
    means = torch.einsum("bvij,bvhwj->bvhwi", turn, points - world_to_cam[..., None, None, :3, 3])
    quats = quat_multiply(quat_from_matrix(turn)[:, :, None, None], quat.roll(1, -1))
    coefficients = sh.unflatten(-1, (3, -1)).transpose(-1, -2)[..., :(DRAWN_DEGREE + 1) ** 2, :]
    degree = math.isqrt(coefficients.shape[-2]) - 1
    damped = coefficients * sh_damping(degree, sh.device)[:, None]
    colours = torch.einsum("bvkj,bvhwjc->bvhwkc", sh_to_world(turn, degree, official), damped)
    fields = (x.flatten(1, 3) for x in (means, quats, log_scales, prediction.opacity_logits, colours))
    return tuple(Scene(*parts) for parts in zip(*(x.unbind() for x in fields)))


def sh_damping(degree: int, device: torch.device | None = None) -> Float[Tensor, " K"]:
    """Factors on the predicted coefficients: 1, and 0.1 / 4^l for band l."""
    return torch.cat([torch.full((2 * band + 1,), 0.1 * 0.25 ** band if band else 1.0, device=device) for band in range(degree + 1)])


def sh_to_world(cam_to_world: Float[Tensor, "*B 3 3"], degree: int, official: bool = False) -> Float[Tensor, "*B K K"]:
    """The matrices from predicted coefficients, in axes of the camera, to those of a Scene.

    The published rasterizer evaluates the usual basis at (z, x, y) in place of (x, y, z): the prediction is a scene's colour turned by that
    permutation. `official`: the permuted basis is that of e3nn but for the sign (-1)^index, with whose rotation matrices the coefficients
    are turned before, as they are.
    """
    standard, back, signs = _standard_from_predicted(degree, cam_to_world.device)
    turn = sh_rotation(cam_to_world, degree)
    return (standard @ (signs[:, None] * (back @ turn @ standard) * signs) if official else turn @ standard).to(cam_to_world)


@functools.lru_cache(16)
def _standard_from_predicted(degree: int, device: torch.device) -> tuple[Float[Tensor, "K K"], Float[Tensor, "K K"], Float[Tensor, " K"]]:
    """The permutation's matrix, its inverse, and the signs between it and e3nn's basis."""
    standard = sh_rotation(torch.tensor([[0.0, 1, 0], [0, 0, 1], [1, 0, 0]]), degree)
    return tuple(x.to(device) for x in (standard, standard.T, (-1.0) ** torch.arange(len(standard), dtype=torch.float64)))
