"""Photos to a scene: the loop that fits it and writes the run folder."""
from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import torch
import yaml
from torch import Tensor

from . import config as configs
from . import io
from .camera import Cameras
from .capture import SceneHeader
from .config import Reconstruct
from .errors import BadConfig, BadFile, Diverged
from .evaluation import Evaluation, compare
from .fit import Fit, View
from .growth import KINDS
from .initial import first_scene
from .io import checkpoint
from .io.atomic import replacing
from .io.reading import Report, silent
from .io.source import POSES, RECORD, is_bare
from .optim import exponential_decay
from .paths import estimate_up
from .poses import refined
from .scene import Edit, Scene
from .sfm import pose
from .shard import Shard, joined, versions
from .views import Views, raster_settings, views_of, working_device

PHOTO_CACHE_BYTES = 2 << 30
SKIPS_MAX = 10      # steps without a finite gradient in a row, at which a run stops


class Watcher:
    """What a run tells one who watches it, between its steps, and waits for: who keeps something of the scene keeps a copy. This one does nothing."""

    def begun(self, fit: Fit, views: Views, train: list[int], header: SceneHeader) -> None:
        """Before the first step. `train` are the photos, by their number in the capture, that steps are taken on."""

    def stepped(self, fit: Fit, edit: Edit | None, photo: int, loss: Tensor) -> None:
        """After each step: how rows changed (None: not at all), and the loss on a photo, which a card may still be working on."""

    def recorded(self, record: dict) -> None:
        """A line of metrics.jsonl."""


def reconstruct(config: Reconstruct, report: Callable[..., None] = lambda *a, **k: None, say: Report = silent, watcher: Watcher | None = None) -> Evaluation | None:
    """Fits a scene to the photos of `config.data` and writes the run folder: config.yaml, metrics.jsonl, checkpoint/, scene.ply, eval/;
    for photos without poses and films also sfm/, with the poses (sfm.pose), and where cameras are refined cameras.json with these.

    The scene lives in the world of the photos' poses. `report(step, gaussians, **numbers)` is called every hundred steps, `say(line)` for
    what the user should know about the photos; `watcher` is told of every step. On Ctrl-C the scene so far is written before KeyboardInterrupt goes on. Returns the
    evaluation, None when no photo is held out.

    Under torchrun its processes share the scene (`shard`), on the CPU or on a card each. The first one reports, writes the run folder, and
    evaluates, for which it holds the whole scene; all must see the photos and the run folder. Another number of processes may resume.

    Raises BadFile for what is wrong with the photos or poses or where another process works in the run folder, BadConfig where a
    checkpoint to resume was made with other settings, BackendUnavailable where only the slow reference could draw; ProcessLost and
    EndedElsewhere as `processes.joined` says.
    """
    with joined() as shard:
        first = shard.rank == 0
        if watcher and shard.world > 1:
            raise ValueError("--view shows a run of one process; several share the scene, and none has all of it: leave it out, and see the result with `splatkit view`")
        return _reconstruct(config, report if first else lambda *a, **k: None, say if first else silent, watcher or Watcher(), shard)


def _reconstruct(config: Reconstruct, report: Callable[..., None], say: Report, watcher: Watcher, shard: Shard) -> Evaluation | None:
    working_device(config)          # before anything that takes long
    if is_bare(config.data):
        if shard.world > 1 and not (config.output / POSES / RECORD).is_file():      # the others could not wait for hours
            raise BadFile(config.data, "", f"photos without poses and several processes: start one process with -o {config.output}, which finds the poses first")
        pose(config.data, config.output, config.sfm, say, keep=shard.world > 1 or config.resume and (config.output / "checkpoint").is_dir())
    views = views_of(config, say)
    train, held = views.capture.split(config.hold_every)
    if not train:
        raise BadFile(config.data, "", f"{len(held)} photos and all are held out; add photos or set --hold-every 0")
    if config.depth.source == "points" and not any(map(len, views.capture.point_views)):
        raise BadFile(config.data, "points3D", "--depth.source points needs sparse points with the photos that see them, as a COLMAP model has; leave it out, or take sensor")
    if config.depth.source == "sensor" and not any(views.capture.photos[i].depth for i in train):
        raise BadFile(config.data, "depth_file_path", "--depth.source sensor needs depth pictures, and no photo has one; leave it out, or take points")
    shard.check(views.device, config.backend)
    run = config.output
    run.mkdir(parents=True, exist_ok=True)
    with checkpoint.lock(run) if shard.rank == 0 else contextlib.nullcontext():
        scene = _fit(views, train, config, report, say, watcher, shard)
        if not held or shard.rank != 0:
            return None
        return compare(scene, dataclasses.replace(views, capture=refined(views.capture, run / "cameras.json")), held, config, run / "eval")


def _fit(views: Views, train: list[int], config: Reconstruct, report: Callable[..., None], say: Report, watcher: Watcher, shard: Shard) -> Scene:
    run, start = config.output, time.monotonic()
    cameras = {i: views.camera(i) for i in train}
    all_cameras = list(cameras.values())
    bytes_per_photo = (17 if config.depth.source != "none" else 13) * max(c.width * c.height for c in all_cameras)
    place = {photo: k for k, photo in enumerate(train)}
    view = functools.lru_cache(max(1, _cache_bytes(views.device) // bytes_per_photo))(
        lambda i: View(place[i], cameras[i], views.image(i), views.mask(i), views.depth(i, config.depth.source)))
    settings, extent, background = raster_settings(config), extent_of(all_cameras), torch.tensor(config.background, device=views.device)
    up, source = tuple(estimate_up(Cameras.cat([c.replace(width=1, height=1) for c in all_cameras])).tolist()), config.data.resolve().name
    made_with = {"config": configs.to_yaml(dataclasses.replace(config, data=Path(), output=Path(), init=None, resume=False)),
                 "photos": [views.capture.photos[i].name for i in train], "device": views.device}
    saved = checkpoint.load(run / "checkpoint") if config.resume and (run / "checkpoint").is_dir() else None
    if saved:
        _check_same_run(saved, made_with)
        growth = KINDS[config.densification](config, extent, 0, views.device)
        fit = Fit.resumed(saved, growth, config, all_cameras, shard)
    else:
        scene = first_scene(views.capture, train, config, say).to(views.device)
        growth = KINDS[config.densification](config, extent, len(scene), views.device)
        fit = Fit.first(scene, growth, config, all_cameras, shard)
    shard.agree({**made_with, "poses": torch.cat([x.flatten() for c in all_cameras for x in (c.world_to_cam, c.K)]),
                 "sparse points": torch.from_numpy(views.capture.points), "checkpoint": (fit.step, fit.gaussians), "versions": versions()})
    if shard.rank == 0:
        if not saved:
            shutil.rmtree(run / "checkpoint", ignore_errors=True)
        configs.save(config, run / "config.yaml")
        keep_lines(run / "metrics.jsonl", fit.step)

    def save() -> None:
        scene, fit.floor = fit.whole_scene(), None      # a resumed run works it out anew, so this one does too
        if shard.rank == 0:
            io.save(run / "scene.ply", scene.to("cpu"), SceneHeader(settings.changed(), up, False, source, fit.step))
            if fit.poses:
                fit.poses.save(run / "cameras.json", [views.capture.photos[i] for i in train])
            else:
                (run / "cameras.json").unlink(missing_ok=True)      # of an earlier run here

    watcher.begun(fit, views, train, SceneHeader(settings.changed(), up, False, source, fit.step))
    skipped, skips_max = 0, 1 if fit.recorded else SKIPS_MAX       # where it is looked at every hundred steps only, there is nothing left to go on with
    try:
        with (run / "metrics.jsonl" if shard.rank == 0 else Path(os.devnull)).open("a") as log:
            for step in range(fit.step + 1, config.steps + 1):
                fit.queue = fit.queue or [train[i] for i in torch.randperm(len(train), generator=fit.order).tolist()]
                i = fit.queue.pop()
                coarse = step <= config.coarse_fraction * config.steps
                seen = view(i).halved() if coarse else view(i)
                if config.random_background:
                    background = torch.rand(3, generator=fit.order).to(views.device, non_blocking=True)
                rate = exponential_decay(step, config.steps, config.lr.means, config.lr.means_final) * extent
                loss, color, bad = fit.step_on(seen, background, min(fit.scene.sh_degree, (step - 1) // config.sh_every), settings, rate)
                skipped = skipped + 1 if bad else 0
                if bad:
                    log.write(json.dumps({"step": step, "skipped": True, "not_finite": bad, "photo": views.capture.photos[i].name}) + "\n")
                if skipped == skips_max:
                    raise Diverged(f"{run}: the gradients of {', '.join(bad)} were not finite in {skips_max} steps in a row, up to step {step}; the last checkpoint "
                                   "and scene.ply are as they were before: lower the learning rates (--lr.*) and go on with --resume, or start anew")
                edit = fit.grow(step)
                fit.bound(all_cameras, 1 + coarse, edit)
                watcher.stepped(fit, edit, i, loss)
                if step % 100 == 0 or step == config.steps:
                    mse = float((color - seen.photo)[slice(None) if seen.mask is None else seen.mask].square().mean())
                    record = {"step": step, "loss": float(loss), "psnr_train": -10 * math.log10(max(mse, 1e-12)), "gaussians": fit.gaussians,
                              "seconds": round(time.monotonic() - start, 3)}
                    log.write(json.dumps(record) + "\n")
                    log.flush()
                    watcher.recorded(record)
                    report(step, fit.gaussians, psnr=record["psnr_train"])
                if step % config.save_every == 0 or step == config.steps:
                    save()
                    fit.save(run / "checkpoint", made_with)
    except KeyboardInterrupt:
        save()
        raise
    return fit.whole_scene()


def _check_same_run(saved: checkpoint.Checkpoint, made_with: dict) -> None:
    check_same_settings(saved, made_with["config"], configs.to_yaml(Reconstruct(data=Path())))
    if saved.values.get("device", "cpu") != made_with["device"]:       # random states of one do not go on on the other
        raise BadConfig(f"{saved.path} was made on {saved.values.get('device', 'cpu')}, this run is on {made_with['device']}; give --device {saved.values.get('device', 'cpu')}, "
                        "or start anew with --init scene.ply")
    if saved.values["photos"] != made_with["photos"]:
        raise BadFile(saved.path, "photos", f"it was made with {len(saved.values['photos'])} other photos; start anew without --resume")


def check_same_settings(saved: checkpoint.Checkpoint, config: str, default: str | None = None) -> None:
    """Raises BadConfig naming the settings that differ between the `config` of a checkpoint, as YAML, and this one. An option that was not there yet is as in `default`."""
    was, now = yaml.safe_load(saved.values["config"]), yaml.safe_load(config)
    was = _laid_over(yaml.safe_load(default), was) if default else was
    if other := [name for name in now if was.get(name) != now[name]]:
        raise BadConfig(f"{saved.path} was made with other values of {', '.join(other)}; give the same, or start anew without --resume")


def _laid_over(default: dict, values: dict) -> dict:
    return {key: _laid_over(x, values[key]) if isinstance(x, dict) and isinstance(values.get(key), dict) else values.get(key, x) for key, x in default.items()}


def keep_lines(path: Path, step: int) -> None:
    """Leaves the lines of metrics up to `step`; damaged ones go."""
    kept = []
    for line in path.read_text().splitlines() if path.is_file() and step else []:
        try:
            kept += [line] if json.loads(line)["step"] <= step else []
        except (ValueError, KeyError, TypeError):
            pass
    with replacing(path) as file:
        file.write("".join(f"{line}\n" for line in kept).encode())


def _cache_bytes(device: str) -> int:
    """For photos, where the run works: on a card a third of what is free, since a photo that is read again costs more than its step."""
    return torch.cuda.mem_get_info()[0] // 3 if device == "cuda" else PHOTO_CACHE_BYTES


def extent_of(cameras: list[Cameras]) -> float:
    """1.1 times the largest distance of a camera from their mean, world units (Kerbl et al. 2023)."""
    centres = torch.cat([c.centres for c in cameras])
    return 1.1 * float((centres - centres.mean(0)).norm(dim=1).max()) or 1.0
