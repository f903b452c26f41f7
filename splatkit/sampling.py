"""How finely photos sample a place: what one of their pixels measures there."""
from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from .camera import Cameras

CAMERAS_MAX = 64        # of more, so many evenly spread ones stand for all
BORDER = 0.15           # of a picture's size around it still counts as seen, as Gaussians reach into it from there


@torch.no_grad()
def pixel_sizes(means: Float[Tensor, "N 3"], cameras: Sequence[Cameras], near: float = 0.01) -> Float[Tensor, " N"]:
    """Width in the world of a pixel of that camera, of those that see a point, in which it is largest on the screen; 0 where none sees it.

    Detail below it is no photo's (the sampling limit of Yu et al., Mip-Splatting, 2024, section 4.1).
    """
    least = torch.full_like(means[:, 0], torch.inf)
    for camera in cameras[::-(-len(cameras) // CAMERAS_MAX)]:
        local = means @ camera.world_to_cam[0, :3, :3].T + camera.world_to_cam[0, :3, 3]
        z, focal, centre = local[:, 2], camera.K[0].diagonal()[:2], camera.K[0, :2, 2]
        place = local[:, :2] / z[:, None] * focal + centre
        size = place.new_tensor([camera.width, camera.height])
        seen = (z > near) & ((place > -BORDER * size) & (place < (1 + BORDER) * size)).all(1)
        least = torch.where(seen, torch.minimum(least, z / focal.max()), least)
    return torch.where(least == torch.inf, 0, least)
