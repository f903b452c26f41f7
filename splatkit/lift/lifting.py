"""Views to a scene: pictures of any size through the network, in groups, and what is kept of its Gaussians."""
from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from ..scene import Scene, quat_from_matrix, rotation_matrices
from .model import MULTIPLE, SIDE_MIN, MVSplat, with_near_1
from .pairs import Group, centre
from .posed import View

ASPECT_MAX = 8


def size_at(view: View, side: int) -> tuple[int, int]:
    """Width and height of a photo whose shorter side is made `side` pixels, if it has more."""
    factor = min(1.0, side / min(view.width, view.height))
    return max(1, round(view.width * factor)), max(1, round(view.height * factor))


def padded_size(views: Sequence[View], side: int) -> tuple[int, int]:
    """Width and height of the pictures that the network sees: all views fit, and both are multiples of 16. ValueError for photos too small or too thin."""
    for view in views:
        w, h = size_at(view, side)
        if max(w, h) > ASPECT_MAX * min(w, h) or min(view.width, view.height) < 16:
            raise ValueError(f"{view.name} has {view.width}x{view.height} pixels; expected 16 or more a side, and one side at most {ASPECT_MAX} times the other")
    sizes = np.array([size_at(view, side) for view in views]).max(axis=0)
    return tuple(int(max(SIDE_MIN, -(-n // MULTIPLE) * MULTIPLE)) for n in sizes)


@torch.no_grad()
def lift(model: MVSplat, views: Sequence[View], groups: Sequence[Group], near: float, far: float, side: int, official: bool = False,
         report: Callable[[int, int], None] = lambda done, of: None) -> Scene:
    """The Gaussians of all views, on the CPU, in the world of their cameras.

    Every view must be kept by one group. Photos are made smaller to `side` pixels on the shorter side and padded by reflection to what the
    network takes; what comes out of padding, or of pixels that a photo's mask leaves out, is dropped. The world is scaled so that near is 1,
    as in training, and back. `report(done, of)` counts groups.
    """
    device, found = next(model.parameters()).device, {}
    origin = np.mean([centre(view) for view in views], axis=0)
    for number, group in enumerate(groups, 1):
        chosen = [views[i] for i in group.views]
        width, height = padded_size(chosen, side)
        images, counts = zip(*(_picture(view, side, width, height) for view in chosen))
        K = np.stack([view.K * np.array([[w / view.width], [h / view.height], [1.0]]) for view in chosen for w, h in [size_at(view, side)]])
        poses = with_near_1(torch.as_tensor(np.stack([view.world_to_cam for view in chosen])), near, torch.from_numpy(origin))
        tensor = lambda x: torch.as_tensor(x, dtype=torch.float32, device=device)[None]
        out = model(torch.stack(images)[None].to(device), tensor(K), tensor(poses), tensor(np.ones(len(chosen))), tensor(np.full(len(chosen), far / near)), official=official)
        for place, i in enumerate(group.views):
            if i in group.kept:
                rows = slice(place * height * width, (place + 1) * height * width)
                found[i] = out.scenes[0].rows(rows).rows(counts[place].flatten().to(device)).to("cpu")
        report(number, len(groups))
    scene = Scene.cat([found[i] for i in sorted(found)])
    return scene.transformed(near, torch.eye(3), torch.from_numpy(origin).float())


def _picture(view: View, side: int, width: int, height: int) -> tuple[Tensor, Tensor]:
    """[3, height, width] with the photo in its upper left, and which pixels count."""
    w, h = size_at(view, side)
    pixels, mask = view.read(w, h), view.mask(w, h)
    counts = torch.zeros(height, width, dtype=torch.bool)
    counts[:h, :w] = True if mask is None else torch.from_numpy(mask)
    padded = np.pad(pixels, ((0, height - h), (0, width - w), (0, 0)), mode="reflect")
    return torch.from_numpy(np.ascontiguousarray(padded)).permute(2, 0, 1), counts


def thinned(scene: Scene, min_opacity: float = 0.0, voxel: float = 0.0, max_gaussians: int = 0) -> Scene:
    """The scene without what is fainter than `min_opacity`, one Gaussian for each cube of side `voxel` (world units; 0: any), and at most
    `max_gaussians` (0: any): where there are more, cubes of the size at which few are left over, then the faintest of those go."""
    scene = scene.rows(scene.logit_opacities >= torch.logit(torch.tensor(min_opacity))) if min_opacity > 0 else scene
    scene = merged(scene, voxel) if voxel > 0 else scene
    if max_gaussians and len(scene) > max_gaussians:
        high = 2 * float(scene.scales.amax(dim=1).median())
        while len(_cubes(scene.means, high).unique()) > max_gaussians:
            high *= 2
        low = 0.0
        for _ in range(6):
            middle = (low + high) / 2
            if len(_cubes(scene.means, middle).unique()) > max_gaussians:
                low = middle
            else:
                high = middle
        scene = merged(scene, low) if low > 0 else scene
        if len(scene) > max_gaussians:
            scene = scene.rows(scene.logit_opacities.topk(max_gaussians).indices.sort().values)
    return scene


def merged(scene: Scene, voxel: float) -> Scene:
    """One Gaussian for each cube that holds any: colour is the mean weighted by opacity, place and shape those of the Gaussian with the mean and the covariance of all,
    so that nothing shows between them, opacity that of the most opaque one.

    What several views say of one place of a surface is so said once.
    """
    cube, held = _cubes(scene.means, voxel).unique(return_inverse=True, return_counts=True)[1:]
    n = len(held)
    weights = scene.logit_opacities.sigmoid().clamp(min=1e-6)
    total = weights.new_zeros(n).index_add_(0, cube, weights)
    mean = lambda x: x.new_zeros(n, *x.shape[1:]).index_add_(0, cube, x * weights.view(-1, *[1] * (x.ndim - 1))) / total.view(-1, *[1] * (x.ndim - 1))
    order = torch.argsort(scene.logit_opacities, stable=True)
    order = order[torch.argsort(cube[order], stable=True)]
    kept, means = scene.rows(order[held.cumsum(0) - 1]), mean(scene.means)
    axes = rotation_matrices(scene.quats) * scene.scales[:, None]
    away = (scene.means - means[cube])[..., None]
    variances, turns = torch.linalg.eigh(mean(axes @ axes.mT + away @ away.mT))
    turns = turns * torch.linalg.det(turns).sign()[:, None, None]
    alone = (held == 1)[:, None]      # as it was, to the bit
    return kept.replace(means=torch.where(alone, kept.means, means), sh=mean(scene.sh), quats=torch.where(alone, kept.quats, quat_from_matrix(turns)),
                        log_scales=torch.where(alone, kept.log_scales, 0.5 * variances.clamp(min=1e-20).log()))


def _cubes(means: Tensor, side: float) -> Tensor:
    """A number for each row that is the same for all in one cube."""
    cell = ((means - means.amin(dim=0)) / side).floor().long().clamp(max=2 ** 20)
    return (cell[:, 0] << 42) | (cell[:, 1] << 21) | cell[:, 2]
