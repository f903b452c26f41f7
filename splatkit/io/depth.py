"""Depth pictures of photos: what a depth camera saw, or another program estimated, in the units of the world."""
from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float
from numpy import ndarray as Array
from torch import Tensor

from ..capture import Photo
from ..errors import BadFile
from .photos import _photo_file, _same_shape, _stored


def load_depth(photo: Photo, width: int | None = None, height: int | None = None, slack: float = 0.0) -> Float[Array, "H W"] | None:
    """Camera z at each pixel, world units, 0 where it is not known; None for a photo without a depth picture.

    The size is the photo's own unless given. A smaller picture has the nearest known depth of each pixel's area, so that edges stay
    edges. Raises BadFile when the file is cut, damaged, not 16 bits of grey or of another shape than its photo, whose ratio of sides may
    differ by `slack` (ScanNet's colour and depth are stored 0.4 % apart).
    """
    if photo.depth is None:
        return None
    with _photo_file(photo.depth) as image:
        stored, _ = _stored(image)
        alike = _same_shape(stored, (photo.width, photo.height)) or abs(stored[0] * photo.height / (stored[1] * photo.width) - 1) <= slack
        if not image.mode.startswith("I") or not alike:
            raise BadFile(photo.depth, "", f"{stored[0]}x{stored[1]} of kind {image.mode!r}; expected 16 bits of grey in the shape of its photo, {photo.width}x{photo.height}")
        image.load()
        steps = np.asarray(image).astype(np.float32)
    return nearest_known(torch.from_numpy(steps * np.float32(photo.depth_unit)), width or photo.width, height or photo.height).numpy()


def nearest_known(depth: Float[Tensor, "h w"], width: int, height: int) -> Float[Tensor, "H W"]:
    """Another size of a picture of depths, 0 where unknown: the smallest known one in each pixel's area."""
    if depth.shape == (height, width):
        return depth
    away = torch.where(depth > 0, -depth, -torch.inf)
    near = -torch.nn.functional.adaptive_max_pool2d(away[None, None], (height, width))[0, 0]
    return torch.where(near.isfinite(), near, 0)
