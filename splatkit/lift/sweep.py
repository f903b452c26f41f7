"""The plane sweep: how well each pixel's features match those of the other views, for every candidate depth.

A CPU takes planes one at a time, forward and backward: of the warped features, 128 times the features in size, one plane exists. A card takes as many as
keep it busy.
"""
from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from ..camera import relative_pose
from .rays import pixel_grid, through

Z_MIN = 1e-3
AT_ONCE = {"cpu": 1, "cuda": 1 << 25}       # warped numbers that exist at a time, or one plane of them


def depth_planes(near: Float[Tensor, "B V"], far: Float[Tensor, "B V"], count: int) -> Float[Tensor, "B V D"]:
    """1/depth of the candidates, from 1/far to 1/near in equal steps."""
    return 1 / far[..., None] + (1 / near - 1 / far)[..., None] * torch.linspace(0, 1, count, dtype=near.dtype, device=near.device)


def correlate(features: Float[Tensor, "B V C h w"], K: Float[Tensor, "B V 3 3"], world_to_cam: Float[Tensor, "B V 4 4"],
              planes: Float[Tensor, "B V D"], official: bool = False) -> Float[Tensor, "B V D h w"]:
    """Dot product of each view's features with those of the others warped to it, over sqrt(C), mean over the others; 0 where a warp leaves the picture.

    Differentiable in the features, not in cameras and planes. `K` is in pixels of the features' size, and the whole-numbered pixel (0, 0)
    stands for K's (0, 0), as the published weights know it: half a pixel off on both sides. `official` projects with the K of the view
    that is warped to, into the others too.
    """
    n_views = features.shape[1]
    out = []
    for i in range(n_views):
        total = features.new_zeros(())
        for j in range(n_views):
            if j != i:
                relative = relative_pose(world_to_cam[:, i], world_to_cam[:, j])
                total = total + _Sweep.apply(features[:, i], features[:, j], K[:, i], K[:, i if official else j], relative, planes[:, i])
        out.append(total / (n_views - 1))
    return torch.stack(out, dim=1)


class _Sweep(torch.autograd.Function):
    """[B, D, h, w] of one pair of views; a plane's warped features are made again in backward instead of kept."""

    @staticmethod
    def forward(ctx, here: Tensor, there: Tensor, K_here: Tensor, K_there: Tensor, relative: Tensor, planes: Tensor) -> Tensor:
        b, c, h, w = here.shape
        ray, shift = _homographies(K_here, K_there, relative, h, w)
        out = here.new_empty(b, planes.shape[1], h, w)
        scaled = here / c ** 0.5
        for part in _parts(here, planes):
            warped = F.grid_sample(there, _grid(ray, shift, planes[:, part], h, w), mode="bilinear", padding_mode="zeros", align_corners=True)
            torch.sum(warped.view(b, c, -1, h, w).mul_(scaled[:, :, None]), dim=1, out=out[:, part])
        ctx.save_for_backward(here, there, ray, shift, planes)
        return out

    @staticmethod
    def backward(ctx, gradient: Tensor):
        here, there, ray, shift, planes = ctx.saved_tensors
        b, c, h, w = here.shape
        to_here, to_there = torch.zeros_like(here), torch.zeros_like(there)
        for part in _parts(here, planes):
            grid = _grid(ray, shift, planes[:, part], h, w)
            scaled = gradient[:, None, part] / c ** 0.5
            to_here += F.grid_sample(there, grid, mode="bilinear", padding_mode="zeros", align_corners=True).view(b, c, -1, h, w).mul_(scaled).sum(2)
            # Bilinear, zeros outside; the gradient of the picture, not that of the grid.
            to_there += torch.ops.aten.grid_sampler_2d_backward((here[:, :, None] * scaled).flatten(2, 3), there, grid, 0, 0, True, [True, False])[0]
        return to_here, to_there, None, None, None, None


def _parts(features: Tensor, planes: Tensor) -> list[slice]:
    """Which planes are taken together."""
    count = planes.shape[1]
    step = max(1, AT_ONCE[features.device.type] // features.numel())
    return [slice(first, min(first + step, count)) for first in range(0, count, step)]


def _homographies(K_here: Tensor, K_there: Tensor, relative: Tensor, h: int, w: int) -> tuple[Tensor, Tensor]:
    """a [B, 3, h w] and b [B, 3, 1]: a pixel of 1/depth s here is at the homogeneous a / s + b there."""
    rays = through(K_here, pixel_grid(K_here, h, w)).flatten(1, 2).transpose(1, 2)
    return K_there @ (relative[:, :3, :3] @ rays), K_there @ relative[:, :3, 3:]


def _grid(ray: Tensor, shift: Tensor, inverse_depths: Float[Tensor, "B D"], h: int, w: int) -> Tensor:
    """Where the pixels of D planes lie there, below each other, [B, D h, w, 2]; -1 and 1 in the centres of the outermost pixels."""
    x, y, z = (ray[:, :, None] / inverse_depths[:, None, :, None] + shift[..., None]).unbind(1)
    z = z.clamp(min=Z_MIN)
    return torch.stack([2 * x / z / (w - 1) - 1, 2 * y / z / (h - 1) - 1], dim=-1).view(len(z), -1, w, 2)
