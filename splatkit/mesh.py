"""A scene's surface as a coloured mesh: depth and colour drawn from many cameras, fused into a truncated signed distance field (Curless and Levoy 1996) by open3d."""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from .camera import Cameras
from .errors import BackendUnavailable
from .io.surface import Surface
from .raster import RasterSettings, render
from .scene import Scene

ALPHA_MIN = 0.5             # less covered pixels have no depth


@dataclass(frozen=True)
class Fusing:
    """How depth becomes a surface. Lengths in world units; 0 is chosen from the scene."""

    voxel: float = 0.0          # side of a cell; 0: twice what a pixel covers at the median depth
    far: float = 0.0            # depths beyond are left out; 0: three times the median
    truncation: float = 6.0     # voxels on either side of a surface that know their distance to it
    views: int = 2              # that must have seen a piece of surface
    islands: float = 0.02       # pieces with fewer triangles than this share of the largest piece are removed


@torch.no_grad()
def fuse(scene: Scene, cameras: Cameras, fusing: Fusing = Fusing(), settings: RasterSettings = RasterSettings(), background: Float[Tensor, " 3"] | None = None,
         report: Callable[[int, int], None] = lambda view, of: None) -> Surface:
    """The surface that the cameras see, where depth is that at which half of the light is stopped.

    `report(view, of)` is called after every camera, from 1. Raises BackendUnavailable without open3d, ValueError where no camera sees a surface.
    """
    o3d = _open3d()
    drawn = [_drawn(scene, cameras[i], settings, background) for i in range(len(cameras))]
    depths = np.concatenate([d[d > 0][::16] for d, _ in drawn])
    if not len(depths):
        raise ValueError("no camera sees a surface: no pixel is covered by half; give a run folder, or check the scene with `splatkit view`")
    median, K = float(np.median(depths)), cameras.K.double().cpu().numpy()
    voxel = fusing.voxel or 2 * median / float(np.median(K[:, 0, 0]))
    far = fusing.far or 3 * median
    if voxel <= 0 or far <= 0 or fusing.truncation < 1:
        raise ValueError(f"voxel {voxel:g}, far {far:g}, truncation {fusing.truncation:g}; expected lengths above 0 and at least 1 voxel")
    core, cpu = o3d.core, o3d.core.Device("CPU:0")
    grid = o3d.t.geometry.VoxelBlockGrid(("tsdf", "weight", "color"), (core.float32,) * 3, ((1,), (1,), (3,)), voxel, 16, 20_000, cpu)
    for i, (depth, colour) in enumerate(drawn):
        if not ((depth > 0) & (depth < far)).any():
            continue
        centred = K[i].copy()
        centred[:2, 2] -= 0.5       # open3d's pixels have their centres at whole numbers
        pose = core.Tensor(cameras.world_to_cam[i].double().cpu().numpy())
        image, picture, k = o3d.t.geometry.Image(core.Tensor(depth)), o3d.t.geometry.Image(core.Tensor(colour)), core.Tensor(centred)
        blocks = grid.compute_unique_block_coordinates(image, k, pose, 1.0, far, fusing.truncation)
        grid.integrate(blocks, image, picture, k, k, pose, 1.0, far, fusing.truncation)
        report(i + 1, len(cameras))
    mesh = grid.extract_triangle_mesh(fusing.views - 0.5)
    return _cleaned(o3d, mesh, fusing.islands)


def _drawn(scene: Scene, camera: Cameras, settings: RasterSettings, background) -> tuple[np.ndarray, np.ndarray]:
    out = render(scene, camera.to(scene.device, scene.dtype), outputs=("color", "median_depth"), settings=settings, background=background)
    alpha = out.alpha[0]
    depth = torch.where(alpha >= ALPHA_MIN, out.median_depth[0], 0)
    colour = out.color[0] / alpha.clamp(min=ALPHA_MIN)[..., None] if background is None else out.color[0]
    return depth.float().cpu().contiguous().numpy(), colour.clamp(0, 1).float().cpu().contiguous().numpy()


def _cleaned(o3d, mesh, islands: float) -> Surface:
    """Without small pieces that hang in the air, and without vertices that no triangle uses."""
    if not len(mesh.vertex.positions) or not len(mesh.triangle.indices):
        raise ValueError("the surface is empty: no piece was seen by enough views; lower --views or enlarge --voxel")
    legacy = mesh.to_legacy()
    label, counts, _ = legacy.cluster_connected_triangles()
    label, counts = np.asarray(label), np.asarray(counts)
    legacy.remove_triangles_by_mask(counts[label] < islands * counts.max())
    legacy.remove_unreferenced_vertices()
    surface = Surface(np.asarray(legacy.vertices, np.float64), np.asarray(legacy.triangles, np.int64), np.asarray(legacy.vertex_colors, np.float64))
    assert len(surface.triangles) and len(surface.colours) == len(surface.vertices)
    return surface


def _open3d():
    try:
        import open3d
    except ImportError as why:
        raise BackendUnavailable(f"meshes need open3d ({why}); `pip install splatkit[mesh]` brings it") from why
    return open3d
