"""The plane sweep: how well each pixel's features match those of the other views, for every candidate depth.

Planes are taken one at a time, forward and backward: of the warped features, 128 times the features in size, one plane exists.
"""
from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

Z_MIN = 1e-3


def depth_planes(near: Float[Tensor, "B V"], far: Float[Tensor, "B V"], count: int) -> Float[Tensor, "B V D"]:
    """1/depth of the candidates, from 1/far to 1/near in equal steps."""
    return 1 / far[..., None] + (1 / near - 1 / far)[..., None] * torch.linspace(0, 1, count).to(near)


def correlate(features: Float[Tensor, "B V C h w"], K: Float[Tensor, "B V 3 3"], world_to_cam: Float[Tensor, "B V 4 4"],
              planes: Float[Tensor, "B V D"], official: bool = False) -> Float[Tensor, "B V D h w"]:
    """Dot product of each view's features with those of the others warped to it, over sqrt(C), mean over the others; 0 where a warp leaves the picture.

    Differentiable in the features, not in cameras and planes. `K` is in pixels of the features' size, and the whole-numbered pixel (0, 0)
    stands for K's (0, 0), as the published weights know it: half a pixel off on both sides. `official` projects with the K of the view
    that is warped to, into the others too.
    """
    n_views = features.shape[1]
    cam_to_world = torch.linalg.inv(world_to_cam)
    out = []
    for i in range(n_views):
        total = features.new_zeros(())
        for j in range(n_views):
            if j != i:
                relative = world_to_cam[:, j] @ cam_to_world[:, i]
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
        for d in range(planes.shape[1]):
            warped = F.grid_sample(there, _grid(ray, shift, planes[:, d], h, w), mode="bilinear", padding_mode="zeros", align_corners=True)
            torch.sum(warped.mul_(scaled), dim=1, out=out[:, d])
        ctx.save_for_backward(here, there, ray, shift, planes)
        return out

    @staticmethod
    def backward(ctx, gradient: Tensor):
        here, there, ray, shift, planes = ctx.saved_tensors
        c, h, w = here.shape[1:]
        to_here, to_there = torch.zeros_like(here), torch.zeros_like(there)
        for d in range(planes.shape[1]):
            grid = _grid(ray, shift, planes[:, d], h, w)
            scaled = gradient[:, d, None] / c ** 0.5
            to_here += F.grid_sample(there, grid, mode="bilinear", padding_mode="zeros", align_corners=True).mul_(scaled)
            # Bilinear, zeros outside; the gradient of the picture, not that of the grid.
            to_there += torch.ops.aten.grid_sampler_2d_backward(here * scaled, there, grid, 0, 0, True, [True, False])[0]
        return to_here, to_there, None, None, None, None


def _homographies(K_here: Tensor, K_there: Tensor, relative: Tensor, h: int, w: int) -> tuple[Tensor, Tensor]:
    """a [B, 3, h w] and b [B, 3, 1]: a pixel of 1/depth s here is at the homogeneous a / s + b there."""
    y, x = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    pixels = torch.stack([x, y, torch.ones_like(x)]).flatten(1).to(K_here)
    return K_there @ (relative[:, :3, :3] @ (torch.linalg.inv(K_here) @ pixels)), K_there @ relative[:, :3, 3:]


def _grid(ray: Tensor, shift: Tensor, inverse_depth: Tensor, h: int, w: int) -> Tensor:
    """Where the pixels of one plane lie there, [B, h, w, 2], -1 and 1 in the centres of the outermost pixels."""
    x, y, z = (ray / inverse_depth[:, None, None] + shift).unbind(1)
    z = z.clamp(min=Z_MIN)
    return torch.stack([2 * x / z / (w - 1) - 1, 2 * y / z / (h - 1) - 1], dim=-1).view(-1, h, w, 2)
