"""Scenes made small: Gaussians that hardly show are left out, SH and numbers are shortened by the format, and what that costs is measured in PSNR (`splatkit compress`)."""
from __future__ import annotations

import dataclasses
import math
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from . import io
from .camera import Cameras
from .capture import SceneHeader
from .config import Reconstruct
from .io.reading import Report, silent
from .looking import scene_and_cameras
from .metrics import psnr
from .poses import refined
from .raster import RasterSettings, render
from .raster.operators import uplift_native
from .scene import Scene
from .views import views_of

SUFFIXES = (".spz", ".sog", ".ksplat", ".compressed.ply", ".splat")


@dataclass(frozen=True)
class Compressed:
    """What was written and what it costs."""

    path: Path
    gaussians: tuple[int, int]      # before, after
    bytes: tuple[int, int]
    pruned: float                   # PSNR of the pruned scene's pictures against the whole scene's, dB; inf where they are the same
    written: float                  # the same of the file as it is read back
    held: tuple[float, float] | None    # mean PSNR against a run's held-out photos: of the whole scene, of the file

    def __str__(self) -> str:
        lines = [f"scene: {self.path}", f"{self.gaussians[0]:,} -> {self.gaussians[1]:,} Gaussians, {self.bytes[0] / 1e6:.2f} -> {self.bytes[1] / 1e6:.2f} MB "
                 f"({self.bytes[0] / max(1, self.bytes[1]):.1f} times smaller)",
                 f"pictures against those of the scene: PSNR {self.written:.2f} dB ({self.pruned:.2f} dB after pruning alone)"]
        if self.held:
            lines.append(f"held-out photos: PSNR {self.held[0]:.2f} -> {self.held[1]:.2f} dB ({self.held[1] - self.held[0]:+.2f})")
        return "\n".join(lines)


def compress(source: Path, target: Path, loss: float = 0.002, max_gaussians: int | None = None, sh_degree: int | None = None, report: Report = silent, **options) -> Compressed:
    """Writes the scene of a file or run folder in a small format and measures the cost over the run's photos, or an orbit.

    Gaussians that show least, together at most the share `loss` of what is blended into the pictures, are left out, and more where `max_gaussians` asks.
    Raises ValueError for a format that is not small, BadFile.
    """
    if not target.name.lower().endswith(SUFFIXES):
        raise ValueError(f"{target}: expected a name that ends in {', '.join(SUFFIXES)}; `splatkit convert` writes the others")
    if not 0 <= loss < 1:
        raise ValueError(f"loss {loss}; expected a share from 0 to 1")
    scene, header, config, cameras = scene_and_cameras(source, report)
    settings = RasterSettings(**header.settings)
    kept = scene.rows(shown(scene, cameras, settings, loss, max_gaussians))
    if sh_degree is not None and sh_degree < kept.sh_degree:
        if sh_degree < 0:
            raise ValueError(f"SH degree {sh_degree}; expected 0 to 3")
        kept = kept.replace(sh=kept.sh[:, :(sh_degree + 1) ** 2].contiguous())
    io.save(target, kept, header, report, **options)
    read, said = io.load(target, report)
    small = SceneHeader(settings={**header.settings, **said.settings}, up=header.up)     # what has no room in the file is drawn as before: the numbers are what is judged
    whole = source / "scene.ply" if config else source
    size = whole.stat().st_size if whole.is_file() else sum(p.stat().st_size for p in whole.glob("*"))
    held = None if config is None else against_photos(scene, read, config, small, report)
    background = torch.tensor(config.background) if config else None
    return Compressed(target, (len(scene), len(kept)), (size, os.stat(target).st_size), likeness(scene, kept, cameras, settings, background),
                      likeness(scene, read, cameras, settings, background), held)


@torch.no_grad()
def contributions(scene: Scene, cameras: Cameras, settings: RasterSettings = RasterSettings()) -> Float[Tensor, " N"]:
    """Sums of every Gaussian's blending weights over all pixels of all cameras."""
    weights, sums = scene.means.new_zeros(len(scene)), scene.means.new_zeros(len(scene), 1)
    for i in range(len(cameras)):
        camera = cameras[i].to(scene.device, scene.dtype)
        uplift_native(scene, camera, scene.means.new_ones(camera.height, camera.width, 1), settings, sums, weights)
    return weights


def shown(scene: Scene, cameras: Cameras, settings: RasterSettings, loss: float, max_gaussians: int | None = None) -> Bool[Tensor, " N"]:
    """The Gaussians that contribute most: all but those that together contribute the share `loss`, and at most so many. At least one."""
    weights = contributions(scene, cameras, settings).double()
    order = weights.argsort(stable=True)
    left_out = int((weights[order].cumsum(0) <= loss * weights.sum()).sum())
    if max_gaussians is not None:
        left_out = max(left_out, len(scene) - max(1, max_gaussians))
    kept = torch.ones(len(scene), dtype=torch.bool)
    kept[order[:min(left_out, len(scene) - 1)]] = False
    return kept


@torch.no_grad()
def likeness(a: Scene, b: Scene, cameras: Cameras, settings: RasterSettings, background: Float[Tensor, " 3"] | None = None) -> float:
    """PSNR of b's pictures against a's over all pixels of all cameras, dB."""
    total, count = 0.0, 0
    for i in range(len(cameras)):
        camera = cameras[i].to(a.device, a.dtype)
        x, y = (render(scene, camera, settings=settings, background=background).color[0].clamp(0, 1) for scene in (a, b))
        total, count = total + float((x - y).double().square().sum()), count + x.numel()
    return -10 * math.log10(total / count) if total else math.inf


@torch.no_grad()
def against_photos(before: Scene, after: Scene, config: Reconstruct, header: SceneHeader, report: Report = silent) -> tuple[float, float] | None:
    """Mean PSNR of both scenes over the photos that the run held out; None where it held out none, or they are gone."""
    if not config.data.exists() or not config.hold_every:
        report("there are no held-out photos to measure the cost on")
        return None
    views = views_of(dataclasses.replace(config, device="cpu"))
    views = dataclasses.replace(views, capture=refined(views.capture, config.output / "cameras.json"))
    held = views.capture.split(config.hold_every)[1]
    settings, background, scores = RasterSettings(**header.settings), torch.tensor(config.background), ([], [])
    for i in held:
        photo, mask = views.image(i), views.mask(i)
        for scene, into in zip((before, after), scores):
            into.append(float(psnr(render(scene, views.camera(i), settings=settings, background=background).color[0].clamp(0, 1), photo, mask)))
    return sum(scores[0]) / len(held), sum(scores[1]) / len(held)
