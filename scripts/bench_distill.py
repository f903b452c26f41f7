"""One step of distillation by stage: seconds of wall clock and of CPU, the share of what geometry adds, and the peak of memory. Prints a table and one line of JSON.

The lifting network is left out: with its cache a step only reads what it made. `--lift WEIGHTS` measures it too, without and with the cache.
"""
import argparse
import contextlib
import dataclasses
import json
import resource
import tempfile
import time
from pathlib import Path

import torch

from splatkit.distill import label, maps
from splatkit.distill.config import DataConfig, Distill, GeometryConfig
from splatkit.distill.geometry import from_depth, geometry_of
from splatkit.distill.label import Label, pixel_maps
from splatkit.distill.loop import Run, take_step
from splatkit.distill.samples import Samples
from splatkit.distill.step import Tally, loss_of
from splatkit.distill.views import RoomScene
from splatkit.raster import device_for, render
from splatkit.shard import ALONE


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--height", type=int, default=336)
    parser.add_argument("--width", type=int, default=448)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--backbone", default="vit_small_patch14_dinov2")
    parser.add_argument("--lift", type=Path)
    asked = parser.parse_args()
    device = device_for(asked.device)
    base = Distill(data=DataConfig(rooms=1, height=asked.height, width=asked.width, gap=(2, 4)), geometry=GeometryConfig("depth"))
    config = dataclasses.replace(base, backbone=dataclasses.replace(base.backbone, name=asked.backbone, weights="random"))
    run = Run(config, device, ALONE)
    sample = Samples([RoomScene(0, 24, asked.width, asked.height)], config.data, 0)[0].to(device)
    wall, cpu = {}, {}

    @contextlib.contextmanager
    def stage(name: str, counted: bool):
        sync = torch.cuda.synchronize if device == "cuda" else lambda: None
        sync()
        start = time.perf_counter(), time.process_time()
        yield
        sync()
        if counted:
            wall[name] = wall.get(name, 0.0) + time.perf_counter() - start[0]
            cpu[name] = cpu.get(name, 0.0) + time.process_time() - start[1]

    for step in range(asked.steps + 1):
        counted, (target,) = step > 0, sample.targets       # the first step is a warm-up
        run.adam.zero_grad(set_to_none=True)
        with torch.no_grad():
            with stage("teacher", counted), run.precision():
                tokens = run.teacher.model.backbone(torch.stack([v.photo for v in sample.contexts])).float()
            with stage("geometry: Gaussians at known depth", counted):
                carrier = from_depth(sample)
            with stage("up-sampling", counted):
                up = pixel_maps(tokens, sample.contexts, config.label)
            with stage("attaching", counted):
                scene = carrier.carrying(up, [v.camera for v in sample.contexts])
            with stage("splatting", counted):
                drawn = render(scene, target.camera, outputs=("features",))
            with stage("blending", counted):
                regions, alpha = label.regions_of(target, tokens[0], config.label), drawn.alpha[0]
                wanted = Label(*maps.blended_and_shrunk(drawn.features[0], 1 / alpha.clamp(min=1e-6), regions, config.label.blend, alpha > config.label.alpha_min, *tokens.shape[1:3]))
            del up, scene, drawn
        with stage("student and head, forward and loss", counted):
            loss = loss_of([sample], run.forward, run.student.head, run.teacher, [wanted], config, run.center, run.precision(), Tally())
        with stage("backward", counted):
            loss.backward()
        with stage("clipping, optimiser, teacher", counted):
            torch.nn.utils.clip_grad_norm_(run.names.values(), config.clip)
            take_step(run, step + 1)
    ours = ("up-sampling", "attaching", "splatting", "blending")
    share = {kind: sum(t[name] for name in ours) / sum(t[name] for name in t if not name.startswith("geometry")) for kind, t in (("wall", wall), ("cpu", cpu))}
    for name in wall:
        print(f"{name:40s} {wall[name] / asked.steps:8.3f} s  {cpu[name] / asked.steps:8.3f} CPU-s")
    peak = torch.cuda.max_memory_allocated() / 2 ** 30 if device == "cuda" else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20
    print(f"up-sampling, attaching, splatting and blending: {share['wall']:.1%} of a step's time, {share['cpu']:.1%} of its CPU time; peak memory {peak:.2f} GiB")
    out = {"backbone": asked.backbone, "size": f"{asked.width}x{asked.height}", "device": torch.cuda.get_device_name() if device == "cuda" else "cpu", "threads": torch.get_num_threads(),
           "wall_s": {k: v / asked.steps for k, v in wall.items()}, "cpu_s": {k: v / asked.steps for k, v in cpu.items()}, "share": share, "peak_gib": peak}
    if asked.lift:
        with tempfile.TemporaryDirectory() as folder:
            lifting = geometry_of(GeometryConfig("lift", asked.lift, Path(folder)), device)
            lifting.model.to(device)
            for name in ("network", "from the cache"):
                start = time.perf_counter()
                lifting(sample)
                out[f"lift, {name}, s"] = time.perf_counter() - start
                print(f"lift, {name}: {out[f'lift, {name}, s']:.3f} s")
    print(json.dumps(out))


if __name__ == "__main__":
    main()
