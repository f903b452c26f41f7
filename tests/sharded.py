"""What each process of the sharded tests runs."""
import dataclasses
import os
import sys
import time
import traceback
from pathlib import Path

import lift_training
import torch
import torch.distributed as dist
from backends import random_scene, ring

from splatkit import cli, config, processes
from splatkit.camera import Cameras
from splatkit.config import ADC, AdamWGS, Refine
from splatkit.density import from_points
from splatkit.errors import BadConfig
from splatkit.fit import Fit, View
from splatkit.growth import KINDS
from splatkit.io import checkpoint
from splatkit.io.photos import load_capture
from splatkit.lift.train import lift_train
from splatkit.lift.train_config import LiftTrain
from splatkit.raster import RasterSettings, RasterStats
from splatkit.reconstruct import reconstruct
from splatkit.scene import Scene
from splatkit.shard import ALONE, Shard
from splatkit.views import Views

ALL = AdamWGS(sparse=True, attribute_decay=True, state_decay=True, state_every=10)
QUICK_ADC = ADC(start=40, every=20, stop_fraction=0.8, grad_threshold=1e-4, reset_every=50)


def settings(photos: Path, output: Path, **changes) -> config.Reconstruct:
    quick = config.load_yaml(config.preset("reconstruct", "demo"), config.Reconstruct(data=photos, output=output))
    return dataclasses.replace(quick, **{"steps": 60, "max_gaussians": 700, "hold_every": 5, "save_every": 30, "dropout": 0.1, "adamw": ALL, "refine": Refine(poses=True, focal=True), "adc": QUICK_ADC,
                                         "mcmc": dataclasses.replace(quick.mcmc, start=20, every=20), **changes})


def cases() -> dict[str, tuple[Scene, Cameras]]:
    """Of many Gaussians, half of them at the places of the other half so that only their rows tell them apart; of fewer than processes; of one row of tiles."""
    many = random_scene(300, dtype=torch.float32)
    many = many.replace(means=torch.cat([many.means[:150], many.means[:150].flip(0)]))
    return {"many": (many, ring(1, 150, 117, dtype=torch.float32)), "double": (many.to(dtype=torch.float64), ring(1, 150, 117)),
            "two": (random_scene(2, dtype=torch.float32), ring(1, 60, 50, dtype=torch.float32)), "flat": (many, ring(1, 90, 14, dtype=torch.float32))}


def step(scene: Scene, camera: Cameras, shard: Shard = ALONE) -> dict[str, torch.Tensor]:
    """Pictures, and gradients of a fixed random functional of them, gathered from all processes."""
    n, part = len(scene), shard.part(len(scene))
    own = (scene.map(part.of) if part else scene.clone()).requires_grad_()
    camera = camera.replace(world_to_cam=camera.world_to_cam.clone().requires_grad_(), K=camera.K.clone().requires_grad_())
    stats = RasterStats.zeros(len(own), dtype=scene.dtype)
    out = shard.render(own, camera, outputs=("color", "expected_depth"), background=scene.means.new_tensor([0.2, 0.5, 0.7]), settings=RasterSettings(antialias=True), stats=stats)
    g = torch.Generator().manual_seed(3)
    sum((x * torch.randn(x.shape, generator=g).to(x)).sum() for x in (out.color, out.alpha, out.expected_depth)).backward()
    gathered = {name: shard.gather(x, n) for name, x in [*((f"d {k}", x.grad) for k, x in own.fields().items()), *vars(stats).items(), ("radii", out.radii_px[0])]}
    return {"color": out.color.detach(), "alpha": out.alpha.detach(), "expected_depth": out.expected_depth.detach(), "d world_to_cam": camera.world_to_cam.grad,
            "d K": camera.K.grad} | gathered


def do_steps(shard: Shard, folder: Path) -> None:
    for name, (scene, camera) in cases().items():
        torch.save(step(scene, camera, shard), folder / f"{name}.{shard.rank}.{shard.world}.pt")


def fit_to(steps: int, fit: Fit, photos: Path) -> Fit:
    """Steps of a double-precision fit, a photo after the other."""
    views = Views(load_capture(photos), 1)
    for step in range(fit.step + 1, steps + 1):
        i = step % 4
        camera, photo = views.camera(i).to(dtype=torch.float64), views.image(i).double()
        assert not fit.step_on(View(i, camera, photo), torch.zeros(3, dtype=torch.float64), min(2, step // 20), RasterSettings(), 1e-3)[2]
        fit.grow(step)
    return fit


def new_fit(kind: str, photos: Path, shard: Shard, saved: checkpoint.Checkpoint | None = None) -> Fit:
    given, capture = settings(photos, Path(), densification=kind), load_capture(photos)
    scene = from_points(torch.from_numpy(capture.points).double()[:301], torch.from_numpy(capture.points_rgb)[:301], 3, *KINDS[kind].first(given))
    g = torch.Generator().manual_seed(4)        # none round: the gradient by its rotation would be nothing but rounding, and Adam makes whole steps of that
    scene = scene.replace(quats=torch.randn(301, 4, generator=g, dtype=torch.float64), log_scales=scene.log_scales + 0.3 * torch.randn(301, 3, generator=g, dtype=torch.float64))
    growth, cameras = KINDS[kind](given, 2.0, len(scene)), [photo.camera(torch.float64) for photo in capture.photos[:4]]
    return Fit.resumed(saved, growth, given, cameras, shard) if saved else Fit.first(scene, growth, given, cameras, shard)


def fits(shard: Shard, folder: Path) -> None:
    for kind in KINDS:
        fit = new_fit(kind, folder / "photos", shard)
        for steps in (30, 60):
            fit_to(steps, fit, folder / "photos").save(folder / f"{kind}.{shard.world}.{steps}", {})


def do_fits(shard: Shard, folder: Path) -> None:
    fits(shard, folder)
    for kind in KINDS:
        saved = checkpoint.load(folder / f"{kind}.1.30")
        fit_to(60, new_fit(kind, folder / "photos", shard, saved), folder / "photos").save(folder / f"{kind}.resumed", {})


def do_run(shard: Shard, folder: Path) -> None:
    seen = []
    result = reconstruct(settings(folder / "photos", folder / "run.2"), lambda step, n, **_: seen.append((step, n)))
    (folder / f"result.{shard.rank}").write_text(f"{seen} {result and result.psnr}")


def do_disagree(shard: Shard, folder: Path) -> None:
    try:
        shard.agree({"photos": ["a.png"], "poses": torch.arange(3.0) + shard.rank})
    except BadConfig as why:
        (folder / f"disagree.{shard.rank}").write_text(str(why))


def lift_in_double(config: LiftTrain, say=lambda line: None) -> None:
    torch.set_default_dtype(torch.float64)
    try:
        lift_train(config, say=say)
    finally:
        torch.set_default_dtype(torch.float32)


def do_lift(shard: Shard, folder: Path) -> None:
    said = []
    lift_train(lift_training.settings(folder / "pair", **lift_training.PAIR))
    lift_in_double(lift_training.settings(folder / "two", steps=3, batch=1, accumulate=2, rooms=8), said.append)
    if shard.rank == 0:
        (folder / "said of two").write_text(said[0].partition("; ")[2])


def waiting(environment: dict[str, str], said: Path, waits: Path, silent: int) -> None:
    """One of two processes, of which one never takes part in an exchange that the other waits in."""
    os.environ.update(environment)
    sys.stdout = sys.stderr = said.open("w", buffering=1)
    processes.STUCK = 1.0
    with processes.joined() as me:
        if me.rank == silent:
            time.sleep(600)
        waits.touch()
        with processes.exchange():
            dist.all_reduce(torch.zeros(1))


def process(environment: dict[str, str], said: Path, jobs: tuple[str, ...], folder: Path, command: list[str]) -> None:
    """One process of a run: some jobs, or a command of the command line, whose exit code it ends with. `said` gets what it says."""
    os.environ.update(environment)
    torch.set_num_threads(1)
    sys.stdout = sys.stderr = said.open("w", buffering=1)
    if command:
        sys.exit(cli.main(command))
    dist.init_process_group("gloo")
    try:
        for job in jobs:
            globals()[f"do_{job}"](Shard(dist.get_rank(), dist.get_world_size()), folder)
    except BaseException:
        traceback.print_exc()
        raise
    finally:
        dist.destroy_process_group()
