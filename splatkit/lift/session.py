"""From a request to a scene file: weights, cameras, the network, what is kept, and what is said of it."""
from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from .. import config as configs
from .. import io
from ..camera import Cameras
from ..capture import SceneHeader
from ..errors import BadConfig
from ..evaluation import score
from ..io.formats import of_name
from ..io.reading import Report
from ..paths import estimate_up
from ..raster import RasterSettings, device_for, render
from ..scene import Scene
from .cost import cost
from .lifting import lift, padded_size, size_at, thinned
from .pairs import centre, depth_range, grouped, middle_depth, overlap
from .posed import KINDS, Posed, posed
from .weights import load_weights

CHECKED_MAX = 4


@dataclass(frozen=True)
class Request:
    """The values of the flags of `splatkit lift`, which describes them."""

    photos: tuple[str, ...]
    cameras: Path | None
    output: Path
    weights: str = "tiny"
    sha256: str | None = None
    side: int = 0
    near: float = 0.0
    far: float = 0.0
    joint: bool = False
    official: bool = False
    min_opacity: float = 0.02
    voxel: float = 0.0
    max_gaussians: int = 1_000_000
    check: bool = False
    refine: int = 0
    device: str = "auto"

    def __post_init__(self):
        if self.cameras is None:
            raise BadConfig(f"--cameras is missing: photos without cameras cannot be lifted. Expected {KINDS}; `splatkit reconstruct PHOTOS -o RUN` finds the cameras of "
                            "photos and leaves them in RUN/sfm")
        if len(self.photos) == 1:
            raise BadConfig("one photo: expected two or more")
        for name, fine, expected in (("side", self.side == 0 or 32 <= self.side <= 8192, "0, or 32 to 8192"), ("min_opacity", 0 <= self.min_opacity < 1, "0 to 1"),
                                     ("max_gaussians", self.max_gaussians >= 1, "1 or more"), ("voxel", self.voxel >= 0, "0 or more"), ("refine", self.refine >= 0, "0 or more"),
                                     ("near", 0 <= self.near < float("inf"), "0 or more"), ("far", 0 <= self.far < float("inf"), "0 or more")):
            if not fine:
                raise BadConfig(f"{name.replace('_', '-')} is {getattr(self, name)}; expected {expected}")
        if self.near and self.far and self.near >= self.far:
            raise BadConfig(f"near is {self.near:g} and far {self.far:g}; expected near < far")
        of_name(self.output)        # before the work, not after it


def lift_photos(request: Request, say: Report) -> Iterator[str]:
    """Writes the scene of a request; yields lines that are results, and says to `say` how it comes about.

    Raises BadConfig, BadFile and ValueError in one line for what cannot be lifted, BackendUnavailable for a device that is not there.
    """
    device = device_for(request.device)
    given = posed(request.photos, request.cameras, say)
    if len(given.views) < 2:
        raise ValueError(f"{request.cameras} has {len(given.views)} photo to lift; expected two or more")
    say(f"cameras: {given.said}")
    model, source = load_weights(request.weights, request.sha256)
    say(f"weights: {source}")
    model = model.to(device).requires_grad_(False)
    side = request.side or model.config.side
    padded_size(given.views, side)
    near, far = depth_range(given.views, given.points, request.near, request.far, say)
    depth = middle_depth(given.views, given.points, near, far)
    groups = grouped(given.views, depth, near, far, request.joint, say)
    if device == "cpu":
        say(f"lifting {len(given.views)} photos in {len(groups)} {'pass' if len(groups) == 1 else 'passes'} on the CPU: {cost(model.config, given.views, groups, side)}")
    start = time.monotonic()
    scene = lift(model, given.views, groups, near, far, side, request.official, lambda done, of: say(f"{done} of {of} passes") if of > 1 else None)
    whole, scene = len(scene), thinned(scene, request.min_opacity, request.voxel, request.max_gaussians)
    if len(scene) == 0:
        raise ValueError(f"none of the {whole:,} Gaussians is as opaque as {request.min_opacity:g}; lower --min-opacity")
    scene.check_finite()
    settings = RasterSettings(near=min(RasterSettings().near, 0.2 * near))
    up = tuple(estimate_up(Cameras.cat([view.camera().replace(width=1, height=1) for view in given.views]).to(dtype=torch.float32)).tolist())
    request.output.parent.mkdir(parents=True, exist_ok=True)
    io.save(request.output, scene, SceneHeader(settings.changed(), up, False, request.cameras.resolve().name, 0), say)
    yield f"scene: {request.output} ({len(scene):,} Gaussians of {whole:,}, {time.monotonic() - start:.1f} s)"
    if request.check:
        yield from _check(scene, settings, given, side, depth)
    if request.refine:
        yield from _refine(request, given, say)


@torch.no_grad()
def _check(scene: Scene, settings: RasterSettings, given: Posed, side: int, depth: float) -> Iterator[str]:
    """PSNR and SSIM of photos that were not lifted, see some of the same and were taken nearest to those that were; where there is none, of these."""
    sees = lambda view: max(overlap(view, other, depth) for other in given.views)
    away = lambda view: min(float(np.linalg.norm(centre(view) - centre(other))) for other in given.views)
    others = sorted((view for view in given.others if sees(view) > 0.3), key=away)[:CHECKED_MAX]
    kind = "not lifted" if others else "lifted"
    if not others:
        yield "check: inputs only, not a test of depth (there is no other photo of the same things)"
    for view in others or given.views[:CHECKED_MAX]:
        w, h = size_at(view, side)
        camera = view.camera().to(dtype=torch.float32).resized(w, h)
        mask = view.mask(w, h)
        numbers = score(render(scene, camera, settings=settings).color[0].clamp(0, 1), torch.from_numpy(view.read(w, h)), None if mask is None else torch.from_numpy(mask), None)
        yield f"check: {view.name} ({kind}): PSNR {numbers['psnr']:.2f} dB, SSIM {numbers['ssim']:.3f}"


def _refine(request: Request, given: Posed, say: Report) -> Iterator[str]:
    """Goes on from the scene that was written with `splatkit reconstruct` on the photos of the same folder."""
    from ..reconstruct import reconstruct

    if given.folder is None:
        raise BadConfig(f"--refine needs photos and cameras in a folder that `splatkit reconstruct` reads, and {request.cameras} is none")
    if given.held:
        say(f"{', '.join(given.held)}: held out for the evaluation that follows, but lifted: what it says of them is no test")
    run = request.output.with_name(f"{request.output.stem}-refined")
    preset = configs.preset("reconstruct", "gpu" if device_for(request.device) == "cuda" else "cpu")
    settings = configs.load_yaml(preset, configs.Reconstruct(data=given.folder, output=run))
    settings = dataclasses.replace(settings, init=request.output, steps=request.refine, max_gaussians=request.max_gaussians)
    result = reconstruct(settings, lambda step, gaussians, **numbers: say(f"step {step}/{request.refine}, {gaussians:,} Gaussians, PSNR {numbers['psnr']:.2f}"), say)
    if result:
        yield result.short()
    yield f"scene: {run / 'scene.ply'}"
