"""What the rasterizer tests share: every backend by name, and small scenes and cameras to show it."""
import math

import pytest
import torch

from splatkit import raster
from splatkit.camera import Cameras, look_at
from splatkit.errors import BackendUnavailable
from splatkit.raster.types import RasterSettings
from splatkit.scene import Scene

BACKENDS = ("reference", "cpu")
OUTPUTS = ("color", "expected_depth", "median_depth", "features")
SMOOTH = RasterSettings.smooth()

each_backend = pytest.mark.parametrize("backend, dtype", [pytest.param(backend, dtype, id=f"{backend}-{str(dtype)[6:]}")
                                                          for backend in BACKENDS for dtype in (torch.float32, torch.float64)])
each_backend_in_double = pytest.mark.parametrize("backend", BACKENDS)


def render(scene, cameras, *, backend, **arguments):
    """splatkit.raster.render; the test is skipped with the reason when the backend cannot run here."""
    try:
        return raster.render(scene, cameras, backend=backend, **arguments)
    except BackendUnavailable as reason:
        pytest.skip(str(reason))


def camera(width=17, height=15, focal=20.0, cx=None, cy=None, world_to_cam=None, dtype=torch.float64, rows=None) -> Cameras:
    """One camera at the origin that looks along +z, its principal point in the middle unless given."""
    cx, cy = width / 2 if cx is None else cx, height / 2 if cy is None else cy
    K = torch.tensor([[[focal, 0, cx], [0, focal, cy], [0, 0, 1]]], dtype=dtype)
    w2c = torch.eye(4, dtype=dtype) if world_to_cam is None else world_to_cam.to(dtype)
    return Cameras(w2c[None], K, width, height, None if rows is None else torch.tensor([rows]))


def logit(opacity: float) -> float:
    return math.log(opacity / (1 - opacity))


def gaussians(means, scale=0.1, opacity=0.8, color=(1.0, 1.0, 1.0), dtype=torch.float64, features=None) -> Scene:
    """Round Gaussians of one plain colour each; scale, opacity and color are one for all or one per row."""
    means = torch.as_tensor(means, dtype=dtype).reshape(-1, 3)
    n = len(means)
    per_row = lambda value, *shape: torch.as_tensor(value, dtype=dtype).expand(n, *shape)
    quats = torch.tensor([1.0, 0, 0, 0], dtype=dtype).repeat(n, 1)
    log_scales = per_row(scale).log()[:, None].repeat(1, 3)
    sh = (per_row(color, 3)[:, None, :] - 0.5) / 0.28209479177387814
    return Scene(means, quats, log_scales, torch.special.logit(per_row(opacity)), sh.clone(), features)


def random_scene(n, seed=0, degree=3, channels=0, dtype=torch.float64) -> Scene:
    """Gaussians of all shapes around the origin, for a `ring` of cameras. Its values are float32 numbers in either dtype."""
    g = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(*shape, generator=g)
    sh = torch.cat([0.8 * normal(n, 1, 3), 0.2 * normal(n, (degree + 1) ** 2 - 1, 3)], dim=1)
    return Scene(means=0.5 * normal(n, 3), quats=normal(n, 4), log_scales=-2.2 + 0.6 * normal(n, 3), logit_opacities=1.5 * normal(n),
                 sh=sh, features=normal(n, channels) if channels else None).to(dtype=dtype)


def ring(count, width=24, height=20, dtype=torch.float64, distance=2.5) -> Cameras:
    """Cameras around the origin, each with its own focal lengths and off-centre principal point. Values are float32 numbers."""
    views = []
    for i in range(count):
        angle = 0.4 + 2 * math.pi * i / count
        eye = distance * torch.tensor([math.cos(angle), -0.3 - 0.1 * i, math.sin(angle)])
        w2c = look_at(eye, torch.tensor([0.05, -0.1, 0.0]), torch.tensor([0.0, -1.0, 0.1]))
        K = torch.tensor([[width * 1.1, 0, width * (0.5 + 0.06 * i)], [0, width * 1.15, height * (0.47 - 0.05 * i)], [0, 0, 1]])
        views.append(Cameras(w2c[None], K[None], width, height))
    return Cameras.cat(views).to(dtype=dtype)
