"""A scene moved as a whole, its orientations and SH turned with it. torch is imported only when a scene is really turned."""
from __future__ import annotations

import numpy as np
from numpy import ndarray as Array

from .fields import Fields


def moved(fields: Fields, matrix: Array) -> Fields:
    """The scene moved by a 4x4 matrix, which must be a rotation, one positive scale and a translation. Raises ValueError where it is not."""
    linear = np.asarray(matrix, np.float64)[:3, :3]
    volume = np.linalg.det(linear)
    scale = np.cbrt(volume)
    if not 1e-12 < scale < 1e12 or not np.allclose(np.asarray(matrix)[3], [0, 0, 0, 1]):
        raise ValueError("expected a rotation, one positive scale and a translation: this one mirrors, or has no size")
    turn = linear / scale
    if np.abs(turn @ turn.T - np.eye(3)).max() > 1e-4:
        raise ValueError("expected a rotation, one positive scale and a translation: this one stretches, which SH and viewers cannot follow")
    if np.abs(turn - np.eye(3)).max() < 1e-9:
        with np.errstate(over="ignore"):
            return {**fields, "means": (fields["means"] * scale + matrix[:3, 3]).astype(np.float32), "log_scales": fields["log_scales"] + np.float32(np.log(scale))}
    import torch

    from ..scene import Scene
    scene = Scene(**{name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in fields.items()})
    out = scene.transformed(float(scale), torch.from_numpy(turn), torch.from_numpy(np.array(matrix[:3, 3], np.float64)))
    return {name: value.numpy() for name, value in out.fields().items()}
