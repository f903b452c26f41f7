"""The first scene of a run: from sparse points, from depth pictures, from nothing but the cameras, or from a scene file."""
from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from . import io
from .camera import Cameras
from .capture import Capture
from .config import Reconstruct
from .density import from_points
from .errors import BadFile
from .growth import KINDS
from .io.depth import load_depth
from .io.photos import load_image, load_mask
from .io.reading import Report
from .paths import focus
from .scene import Scene

FROM_DEPTH, FROM_NOTHING = 30_000, 10_000       # first Gaussians where there are no sparse points


def first_scene(capture: Capture, train: list[int], config: Reconstruct, say: Report) -> Scene:
    """The scene before the first step, on the CPU; at most max_gaussians rows.

    From `config.init`, else the sparse points, else points of the depth pictures of the photos that train, else random points about
    where these photos look; `say` is told of the last two. Raises BadFile where the scene file holds nothing.
    """
    if config.init is not None:
        return _scene_to_go_on(config)
    generator = torch.Generator().manual_seed(config.seed)
    points, rgb = torch.from_numpy(capture.points.astype(np.float32)), torch.from_numpy(capture.points_rgb.copy())
    if len(points) == 0 and (deep := [i for i in train if capture.photos[i].depth]):
        points, rgb = _points_of_depths(capture, deep, min(FROM_DEPTH, config.max_gaussians), generator)
        if len(points):
            say(f"no sparse points: starting from {len(points):,} points of {len(deep)} depth pictures")
    if len(points) == 0:
        points, rgb = _random_points([capture.photos[i].camera() for i in train], min(FROM_NOTHING, config.max_gaussians), generator)
        say(f"no sparse points and no depth: starting from {len(points):,} random points about where the photos look; sparse points, or --init with a scene, do better")
    if len(points) > config.max_gaussians:
        keep = torch.randperm(len(points), generator=generator)[: config.max_gaussians].sort().values
        points, rgb = points[keep], rgb[keep]
    return from_points(points, rgb, config.sh_degree, *KINDS[config.densification].first(config))


def _points_of_depths(capture: Capture, photos: list[int], count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """About `count` pixels of known depth, as many from each photo, as points of the world; and their colours."""
    points, colors = [], []
    for i in photos:
        photo, depth = capture.photos[i], torch.from_numpy(load_depth(capture.photos[i]))
        kept = load_mask(photo)
        y, x = (depth > 0 if kept is None else (depth > 0) & torch.from_numpy(kept)).nonzero(as_tuple=True)
        some = torch.randperm(len(x), generator=generator)[: -(-count // len(photos))]
        x, y = x[some], y[some]
        camera = photo.camera(torch.float64)
        rays = torch.stack([x + 0.5, y + 0.5, torch.ones(len(x))]).double()
        in_camera = torch.linalg.solve(camera.K[0], rays) * depth[y, x]
        rotation, shift = camera.world_to_cam[0, :3, :3], camera.world_to_cam[0, :3, 3]
        points.append(((in_camera.T - shift) @ rotation).float())
        colors.append(torch.from_numpy(np.round(load_image(photo) * 255).astype(np.uint8))[y, x])
    some = torch.randperm(sum(map(len, points)), generator=generator)[:count]
    return torch.cat(points)[some], torch.cat(colors)[some]


def _random_points(cameras: list[Cameras], count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Points of random colour in the ball about the point that the cameras look at, on whose surface the median camera is."""
    centres = torch.cat([c.centres for c in cameras])
    middle = focus(Cameras(torch.cat([c.world_to_cam for c in cameras]), torch.cat([c.K for c in cameras]), 1, 1))
    radius = (centres - middle).norm(dim=1).median().clamp(min=1e-6)
    directions = torch.nn.functional.normalize(torch.randn(count, 3, generator=generator), dim=1)
    points = middle + radius * directions * torch.rand(count, 1, generator=generator) ** (1 / 3)
    return points, torch.randint(0, 256, (count, 3), generator=generator, dtype=torch.uint8)


def _scene_to_go_on(config: Reconstruct) -> Scene:
    """The scene of `config.init` at the run's SH degree: bands that it lacks are zero, those beyond are left out; so are the faintest beyond max_gaussians."""
    scene, _ = io.load(config.init)
    if len(scene) == 0:
        raise BadFile(config.init, "", "holds no Gaussian; leave out --init to start from the sparse points")
    scene = scene.replace(features=None)
    if len(scene) > config.max_gaussians:
        scene = scene.rows(scene.logit_opacities.topk(config.max_gaussians).indices.sort().values)
    bands = (config.sh_degree + 1) ** 2
    sh = scene.sh.new_zeros(len(scene), bands, 3)
    shared = min(bands, scene.sh.shape[1])
    sh[:, :shared] = scene.sh[:, :shared]
    return scene.replace(sh=sh)
