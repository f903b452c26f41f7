"""From pixels to directions of camera z = 1; K has no skew. All is made where K is, so that a card waits for nothing."""
from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def pixel_grid(like: Tensor, height: int, width: int) -> Float[Tensor, "H W 2"]:
    """x and y of the pixels, in whole numbers."""
    x, y = (torch.arange(n, dtype=like.dtype, device=like.device) for n in (width, height))
    return torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1)


def through(K: Float[Tensor, "*B 3 3"], at: Float[Tensor, "*#B H W 2"]) -> Float[Tensor, "*B H W 3"]:
    """Directions through places in the picture."""
    focal, centre = K.diagonal(dim1=-2, dim2=-1)[..., None, None, :2], K[..., None, None, :2, 2]
    return torch.nn.functional.pad((at - centre) / focal, (0, 1), value=1.0)


def pixel_rays(K: Float[Tensor, "*B 3 3"], height: int, width: int) -> Float[Tensor, "*B H W 3"]:
    """Directions through the centres of the pixels, at halves."""
    return through(K, pixel_grid(K, height, width) + 0.5)


def at_quarter(K: Float[Tensor, "*B 3 3"]) -> Float[Tensor, "*B 3 3"]:
    """K of the pictures at a quarter of the resolution."""
    return torch.cat([0.25 * K[..., :2, :], K[..., 2:, :]], dim=-2)
