"""Posed photos to a scene: `reconstruct` optimises, `evaluate` compares with the photos that were held out."""
from __future__ import annotations

import functools
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from . import config as configs
from . import io
from .camera import Cameras
from .capture import Capture, Photo, SceneHeader
from .config import Reconstruct
from .density import from_points, mcmc_noise, relocate_and_grow
from .errors import BackendUnavailable, BadFile
from .io.atomic import replacing
from .io.photos import load_capture, load_image
from .metrics import l1_ssim, psnr, ssim
from .optim import Adam, exponential_decay, sh_learning_rates
from .raster import RasterSettings, backends, render
from .scene import Scene

PHOTO_CACHE_BYTES = 2 << 30


@dataclass(frozen=True)
class Evaluation:
    """How a scene matches held-out photos. Values are raw: nothing is fitted to a held-out photo."""

    psnr: float                         # mean of the photos' PSNR, dB
    ssim: float
    photos: dict[str, dict[str, float]]
    gaussians: int
    picture: Path | None                # photo beside render

    def __str__(self) -> str:
        lines = [f"{name}: PSNR {v['psnr']:.2f} dB, SSIM {v['ssim']:.4f}" for name, v in self.photos.items()]
        lines.append(f"{len(self.photos)} held-out photos: PSNR {self.psnr:.2f} dB, SSIM {self.ssim:.4f}, {self.gaussians:,} Gaussians")
        return "\n".join(lines + ([f"photo beside render: {self.picture}"] if self.picture else []))


@dataclass(frozen=True)
class Views:
    """The photos of a capture at the size that a run works with."""

    capture: Capture
    downscale: float

    def size(self, photo: Photo) -> tuple[int, int]:
        return max(1, math.floor(photo.width / self.downscale)), max(1, math.floor(photo.height / self.downscale))

    def camera(self, i: int) -> Cameras:
        photo = self.capture.photos[i]
        return photo.camera().resized(*self.size(photo))

    def image(self, i: int) -> Tensor:
        photo = self.capture.photos[i]
        return torch.from_numpy(load_image(photo, *self.size(photo)))


def reconstruct(config: Reconstruct, report: Callable[..., None] = lambda *a, **k: None) -> Evaluation | None:
    """Fits a scene to the photos of `config.data` and writes the run folder: config.yaml, metrics.jsonl, scene.ply, eval/.

    The scene lives in the world of the photos' poses. `report(step, gaussians, **numbers)` is called after every step. On Ctrl-C the
    scene so far is written before KeyboardInterrupt goes on. Returns the evaluation, None when no photo is held out.

    Raises BadFile for what is wrong with the photos or poses, BackendUnavailable where only the slow reference could draw.
    """
    _check_backend(config.backend)
    views = Views(load_capture(config.data), config.downscale)
    train, held = views.capture.split(config.hold_every)
    if not train:
        raise BadFile(config.data, "", f"{len(held)} photos and all are held out; add photos or set --hold-every 0")
    if len(views.capture.points) == 0:
        raise BadFile(config.data, "points3D", "no sparse points to start from")
    run = config.output
    run.mkdir(parents=True, exist_ok=True)
    configs.save(config, run / "config.yaml")

    cameras = {i: views.camera(i) for i in train}
    bytes_per_photo = 12 * max(c.width * c.height for c in cameras.values())
    image = functools.lru_cache(max(1, PHOTO_CACHE_BYTES // bytes_per_photo))(views.image)
    header = SceneHeader(RasterSettings().changed(), _up(cameras), False, config.data.resolve().name)
    scene, start, last_saved = _first_scene(views.capture, config), time.monotonic(), 0
    extent = _extent(cameras)
    adam = Adam(scene, _rates(config, extent))
    order, generator = torch.Generator().manual_seed(config.seed), torch.Generator().manual_seed(config.seed + 1)
    queue: list[int] = []
    background = torch.tensor(config.background)
    mcmc = config.mcmc

    def save(step: int) -> None:
        io.save(run / "scene.ply", scene.detach(), SceneHeader(header.settings, header.up, header.metric, header.source, step))

    step = 0
    try:
        with (run / "metrics.jsonl").open("w") as log:
            for step in range(1, config.steps + 1):
                queue = queue or [train[i] for i in torch.randperm(len(train), generator=order).tolist()]
                i = queue.pop()
                camera, photo = _at_step(cameras[i], image(i), step / config.steps, config)
                scene.requires_grad_()
                out = render(scene, camera, background=background, sh_degree=min(scene.sh_degree, (step - 1) // config.sh_every), backend=config.backend)
                loss = l1_ssim(out.color[0], photo, config.ssim_weight)
                grads = dict(zip(scene.fields(), torch.autograd.grad(loss, list(scene.fields().values()))))
                scene = scene.detach()
                _add_regularisers(grads, scene, mcmc.opacity_reg, mcmc.scale_reg)
                rate = exponential_decay(step, config.steps, config.lr.means, config.lr.means_final) * extent
                adam.step(scene, grads, learning_rates={"means": rate}, displacement=mcmc_noise(scene, rate, mcmc.noise, generator))
                if mcmc.start <= step <= mcmc.stop_fraction * config.steps and step % mcmc.every == 0:
                    scene, edit = relocate_and_grow(scene, config.max_gaussians, mcmc.growth, mcmc.dead_opacity, generator)
                    adam.follow(edit)
                if step % 100 == 0 or step == config.steps:
                    mse = float((out.color[0].detach() - photo).square().mean())
                    record = {"step": step, "loss": float(loss.detach()), "psnr_train": -10 * math.log10(max(mse, 1e-12)), "gaussians": len(scene),
                              "seconds": round(time.monotonic() - start, 3)}
                    log.write(json.dumps(record) + "\n")
                    log.flush()
                    if step - last_saved >= config.save_every:
                        save(step)
                        last_saved = step
                    report(step, len(scene), psnr=record["psnr_train"])
    except KeyboardInterrupt:
        save(step)
        raise
    save(config.steps)
    return _evaluate(views, held, scene, config, run / "eval") if held else None


def evaluate(run: Path) -> Evaluation:
    """The scene of a run folder against its held-out photos; writes eval/metrics.json and eval/side_by_side.png.

    Raises BadFile when the folder holds no run, or its photos are gone.
    """
    if not (run / "config.yaml").is_file():
        raise BadFile(run, "config.yaml", "no such file; expected a run folder of `splatkit reconstruct`")
    config = configs.load_yaml(run / "config.yaml", Reconstruct)
    _check_backend(config.backend)
    views = Views(load_capture(config.data), config.downscale)
    _, held = views.capture.split(config.hold_every)
    if not held:
        raise BadFile(run, "config.yaml", "hold_every is 0: the run held out no photo to evaluate on")
    scene, _ = io.load(run / "scene.ply")
    return _evaluate(views, held, scene, config, run / "eval")


@torch.no_grad()
def _evaluate(views: Views, held: list[int], scene: Scene, config: Reconstruct, folder: Path) -> Evaluation:
    table, pairs = {}, []
    for i in held:
        photo = views.image(i)
        picture = render(scene, views.camera(i), background=torch.tensor(config.background), backend=config.backend).color[0].clamp(0, 1)
        table[views.capture.photos[i].name] = {"psnr": float(psnr(picture, photo)), "ssim": float(ssim(picture, photo))}
        pairs.append(torch.cat([photo, picture], dim=1))
    mean = {key: sum(row[key] for row in table.values()) / len(table) for key in ("psnr", "ssim")}
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / "metrics.json") as file:
        file.write(json.dumps({**mean, "gaussians": len(scene), "photos": table}, indent=1).encode())
    widest = max(p.shape[1] for p in pairs)
    sheet = torch.cat([torch.nn.functional.pad(p, (0, 0, 0, widest - p.shape[1])) for p in pairs[:: max(1, len(pairs) // 3)][:3]])
    _write_png(folder / "side_by_side.png", sheet)
    return Evaluation(mean["psnr"], mean["ssim"], table, len(scene), folder / "side_by_side.png")


def _write_png(path: Path, picture: Tensor) -> None:
    from PIL import Image   # 0.1 s that the optimisation does not need

    with replacing(path) as file:
        Image.fromarray((picture.clamp(0, 1) * 255).round().to(torch.uint8).numpy()).save(file, "PNG")


def _check_backend(backend: str) -> None:
    known = backends()
    if backend == "auto" and known["cpu"] is not None:
        raise BackendUnavailable(f"the native CPU library is missing ({known['cpu']}). `splatkit doctor` says what to do; "
                                 "--backend reference draws with plain torch, about a thousand times slower")


def _first_scene(capture: Capture, config: Reconstruct) -> Scene:
    points, rgb = torch.from_numpy(capture.points).float(), torch.from_numpy(capture.points_rgb)
    if len(points) > config.max_gaussians:
        keep = torch.randperm(len(points), generator=torch.Generator().manual_seed(config.seed))[: config.max_gaussians].sort().values
        points, rgb = points[keep], rgb[keep]
    return from_points(points, rgb, config.sh_degree, config.mcmc.init_opacity, config.mcmc.init_scale)


def _rates(config: Reconstruct, extent: float) -> dict:
    lr = config.lr
    return {"means": lr.means * extent, "quats": lr.quats, "log_scales": lr.log_scales, "logit_opacities": lr.logit_opacities,
            "sh": sh_learning_rates((config.sh_degree + 1) ** 2, lr.sh_dc, lr.sh_rest)}


def _at_step(camera: Cameras, photo: Tensor, progress: float, config: Reconstruct) -> tuple[Cameras, Tensor]:
    """Camera and photo at the resolution of this part of the run: half size for the first `coarse_fraction` of the steps."""
    if progress > config.coarse_fraction or min(camera.width, camera.height) < 64:
        return camera, photo
    small = torch.nn.functional.interpolate(photo.permute(2, 0, 1)[None], (camera.height // 2, camera.width // 2), mode="area")
    return camera.resized(camera.width // 2, camera.height // 2), small[0].permute(1, 2, 0).contiguous()


@torch.no_grad()
def _add_regularisers(grads: dict[str, Tensor], scene: Scene, opacity: float, scale: float) -> None:
    """Adds the gradient of opacity * mean(opacities) + scale * mean(standard deviations) (Kheradmand et al. 2024, eq. 8)."""
    o = torch.sigmoid(scene.logit_opacities)
    grads["logit_opacities"] += opacity / len(scene) * o * (1 - o)
    grads["log_scales"] += scale / (3 * len(scene)) * scene.log_scales.clamp(-30, 30).exp()


def _extent(cameras: dict[int, Cameras]) -> float:
    """1.1 times the largest distance of a camera from their mean, world units (Kerbl et al. 2023)."""
    centres = torch.cat([c.centres for c in cameras.values()])
    return 1.1 * float((centres - centres.mean(0)).norm(dim=1).max()) or 1.0


def _up(cameras: dict[int, Cameras]) -> tuple[float, float, float]:
    """The mean upward direction of the pictures."""
    up = -torch.cat([c.world_to_cam[:, 1, :3] for c in cameras.values()]).mean(0)
    return tuple(torch.nn.functional.normalize(up, dim=0).tolist())
