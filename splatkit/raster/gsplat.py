"""gsplat (Ye et al., Apache-2.0) as a peer: the pictures of render() by its CUDA kernels. Asked for by name, never chosen by "auto"."""
from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable
from importlib.util import find_spec

import torch
from jaxtyping import Float
from torch import Tensor

from ..camera import Cameras
from ..native import constant_when_traced
from ..scene import Scene, unit_quats
from .types import RasterSettings, RasterStats, RenderOutput

# What its kernels hold as literals. The cap on alpha is 0.999 in 1.5.3 and 0.99 in 1.6; ours is taken for either.
FIXED = {"alpha_min": 1 / 255, "alpha_max": 0.99, "transmittance_min": 1e-4, "fov_margin": 0.3, "deterministic": False}


@constant_when_traced
def gsplat_reason() -> str | None:
    """Why gsplat cannot run here, or None. Its kernels are compiled when it draws for the first time: minutes, and nvcc is needed."""
    if find_spec("gsplat") is None:
        return "gsplat is not installed (pip install splatkit[gsplat])"
    return None if torch.cuda.is_available() else "torch sees no CUDA device"


def render_gsplat(scene: Scene, cameras: Cameras, outputs: tuple[str, ...], background: Float[Tensor, "C 3"] | None, sh_degree: int,
                  settings: RasterSettings, stats: RasterStats | None) -> RenderOutput:
    """`splatkit.raster.render` by gsplat.rasterization (1.5.3 or 1.6): float32 on a CUDA device, no median depth, no gradient for K.

    Its pictures are ours but for rounding, except that 1.5.3 caps alpha at 0.999, so that nearly opaque Gaussians hide more; that 1.6 lets
    `antialias` scale an opacity by no less than 0.005; and that nothing deeper than 1e10 is drawn. Colour sends its gradient to
    world_to_cam through the inverse of the whole matrix: the same along rigid motions, not entry by entry.
    `stats` costs a second picture, for the weights, and needs a call without features: gsplat draws them apart, 32 channels at a time, and
    absolute gradients of parts do not add up.

    Raises ValueError where gsplat cannot do what is asked.
    """
    refuse(scene, cameras, outputs, settings, stats)
    if not scene.means.is_cuda:
        raise ValueError(f"backend 'gsplat' was asked to draw a scene on {scene.device}; move it with .to('cuda')")
    scene.check_finite()
    cameras.check()
    from gsplat import rasterization
    return draw(rasterization, scene, cameras, outputs, background, sh_degree, settings, stats)


def refuse(scene: Scene, cameras: Cameras, outputs: tuple[str, ...], settings: RasterSettings, stats: RasterStats | None) -> None:
    """Raises ValueError naming the first thing that gsplat cannot do."""
    if "median_depth" in outputs:
        raise ValueError("backend 'gsplat' draws no median_depth; it draws color, expected_depth and features")
    for name, value in FIXED.items():
        if getattr(settings, name) != value:
            raise ValueError(f"backend 'gsplat' has {name}={value:g} built in; the settings say {getattr(settings, name):g}")
    if scene.dtype != torch.float32:
        raise ValueError(f"backend 'gsplat' draws float32, the scene is {scene.dtype}; convert it with .to(dtype=torch.float32)")
    if cameras.K.requires_grad and torch.is_grad_enabled():
        raise ValueError("backend 'gsplat' has no gradient for K; detach it or take another backend")
    if stats is not None and "features" in outputs:
        raise ValueError("backend 'gsplat' fills stats only without features; draw them in a call of their own")


def draw(rasterization: Callable, scene: Scene, cameras: Cameras, outputs: tuple[str, ...], background: Float[Tensor, "C 3"] | None,
         sh_degree: int, settings: RasterSettings, stats: RasterStats | None) -> RenderOutput:
    """All cameras in one call, or with row ranges one by one, each of its own rows."""
    if cameras.rows is None:
        return _draw_all_rows(rasterization, scene, cameras, outputs, background, sh_degree, settings, stats)
    parts = []
    for c, (first, last) in enumerate(cameras.rows.tolist()):
        of_rows = None if stats is None else RasterStats(**{f.name: getattr(stats, f.name)[first:last] for f in dataclasses.fields(stats)})
        part = _draw_all_rows(rasterization, scene.rows(slice(first, last)), cameras[c], outputs,
                              None if background is None else background[c:c + 1], sh_degree, settings, of_rows)
        radii = torch.nn.functional.pad(part.radii_px, (first, len(scene) - last))
        parts.append(dataclasses.replace(part, radii_px=radii, visible=radii > 0))
    return RenderOutput(**{name: None if value is None else torch.cat([getattr(part, name) for part in parts])
                           for name, value in vars(parts[0]).items()})


def _draw_all_rows(rasterization: Callable, scene: Scene, cameras: Cameras, outputs: tuple[str, ...],
                   background: Float[Tensor, "C 3"] | None, sh_degree: int, settings: RasterSettings,
                   stats: RasterStats | None) -> RenderOutput:
    color, depth, features = (name in outputs for name in ("color", "expected_depth", "features"))
    noted = stats is not None and torch.is_grad_enabled()
    # Colours alone may be trained, and the view still counts: gsplat's screen positions have a gradient where the means have one.
    means = scene.means.detach().requires_grad_() if noted and not scene.means.requires_grad else scene.means
    # Quaternions go in normalised: gsplat squares before it divides, and zero would be no rotation at all.
    geometry = {"means": means, "quats": unit_quats(scene.quats), "scales": scene.scales, "opacities": torch.sigmoid(scene.logit_opacities),
                "viewmats": cameras.world_to_cam, "Ks": cameras.K}
    fixed = {"width": cameras.width, "height": cameras.height, "near_plane": settings.near, "eps2d": settings.blur_px2, "packed": False,
             "rasterize_mode": "antialiased" if settings.antialias else "classic"}

    # Depth comes as a last channel. "ED" ignores colours: it also draws an alpha of which nothing else is wanted.
    mode = "ED" if not (color or features) else "RGB+ED" if depth else "RGB"
    values, alpha, meta = rasterization(
        **geometry, **fixed, colors=scene.sh if color else scene.features if features else means, sh_degree=sh_degree if color else None,
        backgrounds=background if color else None, render_mode=mode, absgrad=noted)
    drawn_features = values[..., :scene.features.shape[1]] if features and not color else None
    if features and color:
        drawn_features = rasterization(**geometry, **fixed, colors=scene.features, render_mode="RGB")[0]

    radii = _radii_px(meta, cameras.width, cameras.height)
    if noted:
        _note_backward(meta["means2d"], (values, alpha), stats, radii, _weights(rasterization, geometry, fixed), cameras)
    return RenderOutput(values[..., :3] if color else None, alpha[..., 0], values[..., -1] if depth else None, None, drawn_features,
                        radii > 0, radii)


@torch.no_grad()
def _radii_px(meta: dict, width: int, height: int) -> Float[Tensor, "C N"]:
    """RenderOutput.radii_px. gsplat rounds half sides up to pixels, and its box need only touch the picture; ours holds a pixel centre."""
    rounded_up, mean, (xx, xy, yy) = meta["radii"], meta["means2d"], meta["conics"].unbind(-1)     # not drawn: radii 0, the rest unset
    covariance = torch.stack([yy, xx], dim=-1) / (xx * yy - xy * xy)[..., None]
    half = torch.sqrt(2 * torch.log(meta["opacities"] / FIXED["alpha_min"])[..., None] * covariance)
    half = half.nan_to_num(nan=torch.inf).clamp((rounded_up - 1).to(mean), rounded_up.to(mean))    # of a needle the determinant cancels
    last_pixel = torch.tensor([width - 1, height - 1]).to(mean)
    first, last = torch.ceil(mean - half - 0.5).clamp(min=0), torch.minimum(torch.floor(mean + half - 0.5), last_pixel)
    drawn = (rounded_up > 0).all(dim=-1) & (first <= last).all(dim=-1)
    return torch.where(drawn, half.amax(dim=-1), 0)


@torch.enable_grad()
def _weights(rasterization: Callable, geometry: dict[str, Tensor], fixed: dict) -> Float[Tensor, "C N"]:
    """Sums over pixels of the blending weights: the derivative of a picture of ones by each Gaussian's one."""
    geometry = {name: x.detach() for name, x in geometry.items()}
    ones = geometry["means"].new_ones(len(geometry["Ks"]), len(geometry["means"]), 1).requires_grad_()
    picture = rasterization(**geometry, **fixed, colors=ones, render_mode="RGB")[0]
    return torch.autograd.grad(picture.sum(), ones)[0][..., 0]


def _note_backward(means2d: Float[Tensor, "C N 2"], pictures: tuple[Tensor, ...], stats: RasterStats, radii: Float[Tensor, "C N"],
                   weights: Float[Tensor, "C N"], cameras: Cameras) -> None:
    """Has the backward add every view to `stats`. gsplat's positions are in pixels, as add_view expects."""
    # gsplat leaves `absgrad` on the very object means2d, so somebody must keep it until then: not its own hook, for neither would ever
    # be freed, but what is made of it.
    alive, size = weakref.ref(means2d), (cameras.width, cameras.height)
    for picture in pictures:
        picture.register_hook(lambda grad, kept=means2d: None)

    def add_views(grad: Float[Tensor, "C N 2"]) -> None:
        for c in range(len(radii)):
            stats.add_view(grad[c].detach(), alive().absgrad[c], weights[c], radii[c], *size)

    means2d.register_hook(add_views)
