"""Features of photos in the Gaussians of a finished scene: each gets the mean of what its pixels have, weighted by how much they show of it."""
from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from .. import io
from ..camera import Cameras
from ..errors import BadFile
from ..raster import RasterSettings, uplift
from ..views import run_config, scene_of, views_of
from . import backbone as backbones
from .config import BackboneConfig


@torch.no_grad()
def attach(run: Path, backbone: BackboneConfig, output: Path, channels: int = 32, max_side: int = 0,
           report: Callable[[int, int, int], None] = lambda *a: None) -> tuple[Path, float]:
    """Writes the scene of a run folder with features and returns the file, and the share of the features' variance that is kept.

    Photos are brought to the nearest size that patches fill, cameras with them. Of the backbone's channels the first `channels` principal
    components of all photos' tokens are kept, which is what files and viewers can carry; 0 keeps all. `report(number, of, gaussians)` is called
    after every photo, from 1. Raises BadFile for a folder that is no run or has no scene yet.
    """
    config = run_config(run)
    if not (run / "scene.ply").is_file():
        raise BadFile(run, "scene.ply", "no such file: the run has not come to its first scene")
    scene, header, _ = scene_of(run)
    views, model = views_of(config), backbones.load(backbone)
    model, scene = model.to(views.device), scene.replace(features=None).to(views.device)
    grids, cameras = [], []
    for i in range(len(views.capture.photos)):
        camera, photo = views.camera(i), views.image(i)
        factor = min(1.0, max_side / max(camera.width, camera.height)) if max_side else 1.0
        width, height = (max(1, round(side * factor / model.patch)) * model.patch for side in (camera.width, camera.height))
        small = torch.nn.functional.interpolate(photo.permute(2, 0, 1)[None], (height, width), mode="bilinear", align_corners=False, antialias=True)
        grids.append(model(small)[0].float())
        cameras.append(camera)
        report(i + 1, len(views.capture.photos), len(scene))
    project, kept = components(torch.cat([g.flatten(0, 1) for g in grids]), channels) if channels else (lambda x: x, 1.0)
    lifted = uplift(scene, ((_at_tokens(camera, grid), project(grid)) for camera, grid in zip(cameras, grids)), RasterSettings(**header.settings))
    io.save(output, scene.replace(features=lifted).to("cpu"), header)
    return output, kept


def _at_tokens(camera: Cameras, grid: Float[Tensor, "h w C"]) -> Cameras:
    return camera.resized(grid.shape[1], grid.shape[0])


def components(tokens: Float[Tensor, "T C"], channels: int) -> tuple[Callable[[Tensor], Tensor], float]:
    """The map to the first principal components of tokens (about their mean), and the share of the variance that those have."""
    mean = tokens.double().mean(0)
    centred = tokens.double() - mean
    values, vectors = torch.linalg.eigh(centred.T @ centred)
    channels = min(channels, tokens.shape[1])
    basis = vectors.flip(1)[:, :channels].to(tokens)
    kept = float(values.flip(0)[:channels].sum() / values.sum().clamp(min=1e-30))
    return lambda x: (x - mean.to(x)) @ basis, kept
