"""render(): Gaussians to pictures, differentiable; uplift(): pictures back to Gaussians; and the backends that do it."""
from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from jaxtyping import Float
from torch import Tensor

from .. import native
from ..camera import Cameras
from ..errors import BackendUnavailable
from ..scene import Scene
from .gsplat import gsplat_reason, render_gsplat
from .operators import Recorded, record, render_native, splat_gradients, uplift_native
from .reference import render_reference
from .types import OUTPUTS, RasterSettings, RasterStats, RenderOutput

__all__ = ["OUTPUTS", "RasterSettings", "RasterStats", "Recorded", "RenderOutput", "backends", "device_for", "record", "render", "splat_gradients", "uplift"]


@native.constant_when_traced
def _cpu_reason(dtype: torch.dtype = torch.float32) -> str | None:
    try:
        native.cpu_library(dtype)
    except BackendUnavailable as why:
        return str(why)
    return None


@native.constant_when_traced
def _cuda_reason() -> str | None:
    try:
        native.cuda_library()
    except BackendUnavailable as why:
        return str(why).removeprefix("cuda: ")
    return None


# name -> (what draws, why it cannot run here or None)
BACKENDS: dict[str, tuple[Callable, Callable[[], str | None]]] = {
    "cpu": (render_native, _cpu_reason),
    "reference": (render_reference, lambda: None),
    "cuda": (render_native, _cuda_reason),
    "gsplat": (render_gsplat, gsplat_reason),
}


def backends() -> dict[str, str | None]:
    """Every backend by name, with None where it runs here, else the reason why not."""
    return {name: reason() for name, (_, reason) in BACKENDS.items()}


def device_for(asked: str) -> str:
    """cuda or cpu: `asked`, or by "auto" a card where the CUDA library runs on one. Raises BackendUnavailable where cuda is asked for and does not run."""
    why = backends()["cuda"] if asked != "cpu" else ""
    if asked == "cuda" and why:
        raise BackendUnavailable(f"cuda: {why}; --device cpu works without")
    return "cpu" if asked == "cpu" or why else "cuda"


def render(scene: Scene, cameras: Cameras, *, outputs: tuple[str, ...] = ("color",), background: Float[Tensor, "C 3"] | Float[Tensor, " 3"] | None = None,
           sh_degree: int | None = None, settings: RasterSettings = RasterSettings(), stats: RasterStats | None = None,
           backend: str = "auto") -> RenderOutput:
    """Pictures of `scene` from each of C cameras, differentiable in every field of `scene`, in world_to_cam, K and `background`.

    Gaussians are blended front to back by camera depth, ties by row (Kerbl et al. 2023, eq. 3). `outputs` are any of color,
    expected_depth, median_depth, features; alpha always comes along. Colour is premultiplied by alpha and `background` (black when
    None) shows through the rest; pixel (0, 0) has its centre at (0.5, 0.5). `sh_degree` limits the degree that is evaluated. `stats` is
    filled by the backward pass. `backend` is one of backends(); "auto" takes the native library of the scene's device, and the plain
    torch reference on a CPU without one.

    Raises ValueError or TypeError on a shape, dtype or device mismatch and on values that are not finite, naming field and row;
    BackendUnavailable when `backend` cannot run here, and why.
    """
    if isinstance(outputs, str) or not set(outputs) <= set(OUTPUTS):
        raise ValueError(f"outputs={outputs!r}; expected a tuple of {', '.join(OUTPUTS)}")
    if len(cameras) == 0:
        raise ValueError("no cameras: expected world_to_cam [C, 4, 4] with C >= 1")
    if cameras.dtype != scene.dtype:
        raise TypeError(f"cameras are {cameras.dtype} but the scene is {scene.dtype}; convert one with .to(dtype=...)")
    if cameras.device != scene.device:
        raise ValueError(f"cameras are on {cameras.device} but the scene is on {scene.device}; move one with .to(...)")
    if "features" in outputs and scene.features is None:
        raise ValueError("outputs ask for features but scene.features is None; give them with scene.replace(features=...)")
    if sh_degree is not None and not 0 <= sh_degree <= scene.sh_degree:
        raise ValueError(f"sh_degree={sh_degree}; the scene holds degrees 0 to {scene.sh_degree}")
    if background is not None:
        if background.shape not in ((3,), (len(cameras), 3)):
            raise ValueError(f"background has shape {tuple(background.shape)}; expected [3] or [{len(cameras)}, 3]")
        if background.dtype != scene.dtype or background.device != scene.device:
            raise TypeError(f"background is {background.dtype} on {background.device}; expected {scene.dtype} on {scene.device}")
        background = background.expand(len(cameras), 3)
    if stats is not None and stats.grad_sum.shape[0] != len(scene):
        raise ValueError(f"stats has {stats.grad_sum.shape[0]} rows but the scene {len(scene)}; make it with RasterStats.zeros(len(scene))")
    if not torch.compiler.is_compiling():
        if not cameras.world_to_cam.is_cuda:    # on a card projection counts what is not finite: a look at poses would wait for all that runs
            cameras.check()
        if "features" in outputs and not scene.features.is_cuda and not bool(torch.isfinite(scene.features.detach().sum())):   # the geometry is checked where it is read
            scene.check_finite()
        if cameras.rows is not None and not bool(((cameras.rows >= 0) & (cameras.rows <= len(scene)) & (cameras.rows[:, :1] <= cameras.rows[:, 1:])).all()):
            raise ValueError(f"cameras.rows {cameras.rows.tolist()}; expected 0 <= first <= last <= {len(scene)}")
    draw = _pick(backend, scene)
    return draw(scene, cameras, tuple(outputs), background, scene.sh_degree if sh_degree is None else sh_degree, settings, stats)


def uplift(scene: Scene, views: Iterable[tuple[Cameras, Tensor]], settings: RasterSettings = RasterSettings()) -> Float[Tensor, "N F"]:
    """Features [N,F] that every Gaussian collects from feature maps: the mean of the map, weighted by its blending weight at each pixel.

    `views` yields (one camera, map [H,W,F]); the map may have any resolution, the camera is brought to its size. A Gaussian that no pixel
    shows gets zeros. Memory: N x F numbers plus one view. (Row-sum lifting: the transpose of feature rendering over the transpose of
    ones; Marrie et al. 2024.)

    Raises ValueError when maps differ in F or are not [H,W,F].
    """
    sums = weights = None
    for camera, feature_map in views:
        if len(camera) != 1 or feature_map.ndim != 3:
            raise ValueError(f"uplift: got {len(camera)} cameras and a map of shape {tuple(feature_map.shape)}; expected one camera and [H, W, F] a view")
        if sums is None:
            sums, weights = scene.means.new_zeros(len(scene), feature_map.shape[2]), scene.means.new_zeros(len(scene))
        if feature_map.shape[2] != sums.shape[1]:
            raise ValueError(f"uplift: a map has {feature_map.shape[2]} channels, the first had {sums.shape[1]}")
        camera = camera.resized(feature_map.shape[1], feature_map.shape[0])
        camera.check()
        uplift_native(scene.detach(), camera, feature_map.to(scene.means), settings, sums, weights)
    if sums is None:
        raise ValueError("uplift: no views were given")
    return sums.div_(torch.where(weights > 0, weights, 1)[:, None])


def _pick(backend: str, scene: Scene) -> Callable:
    if backend == "auto":
        backend = "cuda" if scene.device.type == "cuda" else "cpu" if _cpu_reason(scene.dtype) is None else "reference"
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r}; expected auto, {', '.join(BACKENDS)}")
    draw, reason = BACKENDS[backend]
    why = _cpu_reason(scene.dtype) if backend == "cpu" else reason()
    if why is not None:
        raise BackendUnavailable(f"{backend}: {why}; available here: {', '.join(n for n, r in backends().items() if r is None)}")
    if backend in ("cpu", "cuda") and scene.device.type != backend:
        raise ValueError(f"backend {backend!r} was asked to draw a scene on {scene.device}; move it with .to({backend!r})")
    if backend == "cuda" and scene.dtype != torch.float32:
        raise TypeError(f"backend 'cuda' draws float32, the scene is {scene.dtype}; convert it with .to(dtype=torch.float32)")
    return draw
