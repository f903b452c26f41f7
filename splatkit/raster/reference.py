"""The definition of a picture, in plain torch: what every other backend is tested against.

Every pixel meets every Gaussian, so it is slow; it runs on any device, in float32 and float64, and autograd gives the gradients.
"""
from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..camera import Cameras
from ..scene import Scene, rotation_matrices, sh_basis
from .types import RasterSettings, RasterStats, RenderOutput

PIXELS_X_GAUSSIANS = 1 << 20    # of one chunk; about 30 numbers per pair live at once, in the backward too
DET_MAX_PX4 = 1e30              # a Gaussian larger than this on the screen is not drawn: float32 could not hold what follows


def render_reference(scene: Scene, cameras: Cameras, outputs: tuple[str, ...], background: Float[Tensor, "C 3"] | None,
                     sh_degree: int | None, settings: RasterSettings, stats: RasterStats | None) -> RenderOutput:
    """`splatkit.raster.render`, whose other checks of the arguments have been made."""
    scene.check_finite()
    degree = scene.sh_degree if sh_degree is None else min(sh_degree, scene.sh_degree)
    views = [_render_view(scene, cameras[c], outputs, None if background is None else background[c], degree, settings, stats)
             for c in range(len(cameras))]
    return RenderOutput(**{name: None if value is None else torch.stack([view[name] for view in views])
                           for name, value in views[0].items()})


def _render_view(scene: Scene, camera: Cameras, outputs: tuple[str, ...], background: Float[Tensor, " 3"] | None, degree: int,
                 settings: RasterSettings, stats: RasterStats | None) -> dict[str, Tensor | None]:
    """The fields of RenderOutput for one camera, without the axis C."""
    if "features" not in outputs:
        scene = scene.replace(features=None)
    rows, radii = draw_order(scene, camera, settings)
    near_first = scene.rows(rows)
    splats = project(near_first, camera, settings)
    values = [view_color(near_first, camera, degree)] if "color" in outputs else []
    values += [splats.z[:, None]] + ([near_first.features] if "features" in outputs else [])

    note = _note_backward(splats, rows, radii, camera, stats) if stats is not None and torch.is_grad_enabled() else None
    blended, transmittance, median = blend(splats, torch.cat(values, dim=1), camera, settings, note)

    out = dict.fromkeys(("color", "expected_depth", "median_depth", "features"))
    alpha = 1 - transmittance
    if "color" in outputs:
        color, blended = blended[..., :3], blended[..., 3:]
        out["color"] = color if background is None else color + transmittance[..., None] * background
    if "expected_depth" in outputs:
        covered = alpha > 1e-6
        out["expected_depth"] = torch.where(covered, blended[..., 0] / torch.where(covered, alpha, 1), 0)
    if "median_depth" in outputs:
        out["median_depth"] = median
    if "features" in outputs:
        out["features"] = blended[..., 1:]
    return out | {"alpha": alpha, "visible": radii > 0, "radii_px": radii}


# ---- which Gaussians are drawn, in which order


@torch.no_grad()
def draw_order(scene: Scene, camera: Cameras, settings: RasterSettings) -> tuple[Int[Tensor, " G"], Float[Tensor, " N"]]:
    """The rows that are drawn, front to back with ties by row, and radii_px of all rows (0 = not drawn).

    This is decided before anything that carries a gradient, so what is not drawn (behind the camera, say) cannot send a NaN.
    """
    key = depth_key(scene.means, camera.world_to_cam[0])
    near = torch.tensor(settings.near, dtype=torch.float32, device=scene.device)
    first, last = (0, len(scene)) if camera.rows is None else camera.rows[0].tolist()
    row = torch.arange(len(scene), device=scene.device)
    drawn = (key >= near) & (first <= row) & (row < last)           # a NaN is not >=
    radii = torch.where(drawn, radius_px(project(scene, camera, settings), camera, settings), 0)
    rows = radii.nonzero().squeeze(1)
    return rows[torch.sort(key[rows], stable=True).indices], radii


def depth_key(means: Float[Tensor, "N 3"], world_to_cam: Float[Tensor, "4 4"]) -> Float[Tensor, " N"]:
    """Camera depth that is bit-equal in every backend: float32, one rounding per operation, in this order."""
    x, y, z = means.float().unbind(1)
    r20, r21, r22, t2 = world_to_cam[2].float()
    return ((r20 * x + r21 * y) + r22 * z) + t2


def radius_px(splats: Splats, camera: Cameras, settings: RasterSettings) -> Float[Tensor, " N"]:
    """The larger half side of the box outside of which alpha < alpha_min; 0 where no pixel centre of the picture lies in the box."""
    # alpha = opacity exp(-q/2) falls to alpha_min on the ellipse of Mahalanobis distance^2 q; sqrt(q cov_xx) is its half width.
    q = 2 * torch.log(splats.opacity / settings.alpha_min) if settings.alpha_min > 0 else torch.full_like(splats.opacity, math.inf)
    half = torch.sqrt(q[:, None] * splats.cov_px2[:, [0, 2]])
    last_pixel = torch.tensor([camera.width - 1, camera.height - 1], dtype=half.dtype, device=half.device)
    first = torch.ceil(splats.mean_px - half - 0.5).clamp(min=0)
    last = torch.minimum(torch.floor(splats.mean_px + half - 0.5), last_pixel)
    finite = torch.isfinite(torch.cat([splats.mean_px, splats.cov_px2, splats.inverse], dim=1)).all(dim=1)
    solid = finite & (splats.det_px4 > 0) & (splats.det_px4 < DET_MAX_PX4)
    drawn = solid & (splats.opacity >= settings.alpha_min) & (first <= last).all(dim=1)
    return torch.where(drawn, half.amax(dim=1), 0)


# ---- Gaussians on the screen


@dataclass(frozen=True)
class Splats:
    """G Gaussians as one camera sees them."""

    mean_px: Float[Tensor, "G 2"]
    cov_px2: Float[Tensor, "G 3"]       # xx, xy, yy with the blur
    det_px4: Float[Tensor, " G"]        # of the covariance
    inverse: Float[Tensor, "G 3"]       # of the covariance: xx, xy, yy
    opacity: Float[Tensor, " G"]        # with the antialias factor
    z: Float[Tensor, " G"]              # camera depth of the centre


def project(scene: Scene, camera: Cameras, settings: RasterSettings) -> Splats:
    """The perspective projection of every row, linearised at its centre (Zwicker et al. 2001). Rows behind the camera are nonsense."""
    rotation, translation = camera.world_to_cam[0, :3, :3], camera.world_to_cam[0, :3, 3]
    fx, fy, cx, cy = camera.K[0, 0, 0], camera.K[0, 1, 1], camera.K[0, 0, 2], camera.K[0, 1, 2]
    x, y, z = (scene.means @ rotation.T + translation).unbind(1)

    u = _inside_view(x / z, fx, cx, camera.width, settings.fov_margin)
    v = _inside_view(y / z, fy, cy, camera.height, settings.fov_margin)
    zero = torch.zeros_like(z)
    jacobian = torch.stack([torch.stack([fx / z, zero, -fx * u / z], dim=1), torch.stack([zero, fy / z, -fy * v / z], dim=1)], dim=1)
    axes = jacobian @ rotation @ ellipsoid_axes(scene)              # covariance on the screen = axes axes^T
    sharp = (axes @ axes.mT)[:, [0, 0, 1], [0, 1, 1]]
    cov = sharp + settings.blur_px2 * torch.tensor([1, 0, 1], dtype=sharp.dtype, device=sharp.device)

    # xx yy - xy^2 without its cancellation, for needles (Cauchy-Binet).
    sharp_det = torch.linalg.cross(axes[:, 0], axes[:, 1]).square().sum(dim=1)
    det = sharp_det + settings.blur_px2 * (sharp[:, 0] + sharp[:, 2] + settings.blur_px2)
    opacity = torch.sigmoid(scene.logit_opacities)
    if settings.antialias:
        opacity = opacity * _sqrt_or_zero(sharp_det / det)
    inverse = cov[:, [2, 1, 0]] * torch.tensor([1, -1, 1], dtype=cov.dtype, device=cov.device) / det[:, None]
    return Splats(torch.stack([fx * x / z + cx, fy * y / z + cy], dim=1), cov, det, inverse, opacity, z)


def ellipsoid_axes(scene: Scene) -> Float[Tensor, "N 3 3"]:
    """The three standard-deviation vectors as columns, R S: the covariance in the world is R S^2 R^T."""
    return rotation_matrices(scene.quats) * scene.scales[:, None, :]


def _inside_view(slope: Float[Tensor, " N"], focal: Tensor, centre: Tensor, size: int, margin: float) -> Float[Tensor, " N"]:
    """x/z at which the Jacobian is taken: at most `margin` half views outside the picture, for it grows without bound there."""
    if math.isinf(margin):
        return slope                                                # an infinite limit would send 0 x inf to the focal length
    outside = margin * 0.5 * size / focal
    return slope.clamp(-centre / focal - outside, (size - centre) / focal + outside)


def _sqrt_or_zero(x: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
    """sqrt(max(0, x)) with a zero gradient where it is 0."""
    return torch.where(x > 0, torch.sqrt(torch.where(x > 0, x, 1)), 0)


def view_color(scene: Scene, camera: Cameras, degree: int) -> Float[Tensor, "N 3"]:
    """max(0, 1/2 + Y(direction) . sh): the direction sends a gradient to the means and to the pose."""
    offset = scene.means - camera.centres[0]
    squared = (offset * offset).sum(dim=1, keepdim=True)
    direction = torch.where(squared > 0, offset / torch.sqrt(torch.where(squared > 0, squared, 1)), 0)
    basis = sh_basis(direction, degree)
    return (0.5 + torch.einsum("nk,nkc->nc", basis, scene.sh[:, :basis.shape[1]])).clamp(min=0)


# ---- blending


def blend(splats: Splats, values: Float[Tensor, "G D"], camera: Cameras, settings: RasterSettings,
          note) -> tuple[Float[Tensor, "H W D"], Float[Tensor, "H W"], Float[Tensor, "H W"]]:
    """Front to back over all pixels: sums of weight x value, the transmittance behind the last Gaussian, and the median depth."""
    columns, rows = (torch.arange(s, dtype=splats.z.dtype, device=splats.z.device) + 0.5 for s in (camera.width, camera.height))
    centres = torch.cartesian_prod(rows, columns).flip(1)
    chunks = centres.split(max(1, PIXELS_X_GAUSSIANS // max(1, len(splats.z))))
    # With a checkpoint the backward holds the pairs of one chunk at a time as well.
    parts = [checkpoint(_blend_pixels, splats, values, pixels, settings, note, use_reentrant=False, preserve_rng_state=False)
             for pixels in chunks]
    if note is not None:
        note.weights += sum(weights for *_, weights in parts)
    return tuple(torch.cat(part).reshape(camera.height, camera.width, *part[0].shape[1:]) for part in list(zip(*parts))[:3])


def _blend_pixels(splats: Splats, values: Float[Tensor, "G D"], pixels: Float[Tensor, "P 2"], settings: RasterSettings,
                  note) -> tuple[Float[Tensor, "P D"], Float[Tensor, " P"], Float[Tensor, " P"], Float[Tensor, " G"]]:
    alpha = _alpha(splats, pixels, settings, note)
    # T only falls, so "every Gaussian from the first that would leave T < transmittance_min" are those where the plain product is below.
    with torch.no_grad():
        live = torch.cumprod(1 - alpha, dim=1) >= settings.transmittance_min
    alpha = torch.where(live, alpha, 0)
    transmittance = torch.cumprod(torch.cat([torch.ones_like(pixels[:, :1]), 1 - alpha], dim=1), dim=1)     # before each; after the last
    weights = alpha * transmittance[:, :-1]
    n_before_median = (transmittance[:, 1:] > 0.5).sum(dim=1)
    z_or_zero = torch.cat([splats.z.detach(), splats.z.new_zeros(1)])
    left = transmittance[:, -1].clone()         # a view would keep all pairs of the chunk in memory
    return weights @ values, left, z_or_zero[n_before_median], weights.detach().sum(dim=0)


def _alpha(splats: Splats, pixels: Float[Tensor, "P 2"], settings: RasterSettings, note) -> Float[Tensor, "P G"]:
    """Of every Gaussian at every pixel centre; 0 where it does not touch the pixel. No gradient where it is cut or capped."""
    mean = splats.mean_px.expand(len(pixels), -1, -1)
    if note is not None and mean.requires_grad:
        mean.register_hook(note.add_pixels)
    dx, dy = (pixels[:, None, :] - mean).unbind(-1)
    xx, xy, yy = splats.inverse.unbind(1)
    alpha = splats.opacity * torch.exp(-0.5 * (xx * dx * dx + 2 * xy * dx * dy + yy * dy * dy))
    return torch.where(alpha >= settings.alpha_min, alpha.clamp(max=settings.alpha_max), 0)


# ---- statistics of the backward


class _Note:
    """What RasterStats needs of one view: filled while the chunks are blended and while their backward runs."""

    def __init__(self, splats: Splats):
        self.abs_grad = torch.zeros_like(splats.mean_px, requires_grad=False)
        self.weights = torch.zeros_like(splats.z, requires_grad=False)

    def add_pixels(self, grad: Float[Tensor, "P G 2"]) -> None:
        self.abs_grad += grad.detach().abs().sum(dim=0)


def _note_backward(splats: Splats, rows: Int[Tensor, " G"], radii: Float[Tensor, " N"], camera: Cameras, stats: RasterStats) -> _Note:
    """Has the backward of this view add itself to `stats`, once the gradients of all pixels have arrived."""
    note = _Note(splats)

    def add_view(grad: Float[Tensor, "G 2"]) -> None:
        by_row = lambda x: x.new_zeros(len(radii), *x.shape[1:]).index_copy(0, rows, x.detach())
        stats.add_view(by_row(grad), by_row(note.abs_grad), by_row(note.weights), radii, camera.width, camera.height)
        note.abs_grad.zero_()

    if not splats.mean_px.requires_grad:
        splats.mean_px.requires_grad_()         # colours alone may be trained, and the view still counts
    splats.mean_px.register_hook(add_view)
    return note
