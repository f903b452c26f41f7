"""Speed, memory and accuracy of the CPU rasterizer: prints the table of benchmarks/README.md and writes benchmarks/raster.json.

    python3 scripts/bench_raster.py [--rounds 5] [--data ../shared/data]

Milliseconds are means of the three garden views, of minima over interleaved rounds; cost = time x the fused multiply-add peak of one core, measured in the same run. Calls go to
the C entries with memory that is reused, as in a training loop; `render + backward` is the public call, with torch's allocations.
"""
from __future__ import annotations

import argparse
import functools
import itertools
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from statistics import mean, median

import numpy as np
import torch

from splatkit import native
from splatkit.camera import Cameras
from splatkit.density import neighbour_distance
from splatkit.raster import RasterSettings, operators, render
from splatkit.scene import Scene

ROOT = Path(__file__).resolve().parent.parent
WIDTH, HEIGHT = 648, 420


def garden(data: Path) -> tuple[torch.Tensor, list[Cameras]]:
    """138,766 points and three cameras."""
    z = np.load(data / "garden-points" / "test_garden.npz")
    views, Ks = torch.from_numpy(z["viewmats"]).float(), torch.from_numpy(z["Ks"]).float()
    return torch.from_numpy(z["means3d"]), [Cameras(views[i:i + 1].clone(), Ks[i:i + 1].clone(), WIDTH, HEIGHT) for i in range(3)]


def knn(points: torch.Tensor, n: int) -> Scene:
    """A random subset with sizes from its own density: mean distance to 3 neighbours x lognormal(0.5) per axis, opacity U(0.01, 0.99), SH 3."""
    g = torch.Generator().manual_seed(0)
    means = points[torch.randperm(len(points), generator=g)[:n]].clone()
    log_scales = neighbour_distance(means).clamp_min(1e-6).log()[:, None] + 0.5 * torch.randn(n, 3, generator=g)
    opacity = 0.01 + 0.98 * torch.rand(n, generator=g)
    sh = torch.cat([torch.randn(n, 1, 3, generator=g), 0.05 * torch.randn(n, 15, 3, generator=g)], dim=1)
    return Scene(means, torch.randn(n, 4, generator=g), log_scales, torch.logit(opacity), sh)


def gst(points: torch.Tensor, n: int) -> Scene:
    """gsplat's test recipe: points within +-2, scale U(1e-4, 0.02), random quaternion, opacity U(0, 1)."""
    g = torch.Generator().manual_seed(0)
    inside = points[(points.abs() < 2).all(1)]
    means = inside[torch.randint(len(inside), (n,), generator=g)].clone()
    log_scales = (1e-4 + (0.02 - 1e-4) * torch.rand(n, 3, generator=g)).log()
    opacity = torch.rand(n, generator=g).clamp(1e-4, 1 - 1e-4)
    sh = torch.cat([torch.randn(n, 1, 3, generator=g), 0.05 * torch.randn(n, 15, 3, generator=g)], dim=1)
    return Scene(means, torch.randn(n, 4, generator=g), log_scales, torch.logit(opacity), sh)


class Workload:
    """A scene, a camera and every buffer of a training step: the C entries as a loop calls them."""

    def __init__(self, scene: Scene, cameras: Cameras, settings: RasterSettings = RasterSettings(), dtype: torch.dtype = torch.float32):
        scene, cameras = scene.to(dtype=dtype), cameras.to(dtype=dtype)
        n, k = len(scene), scene.sh.shape[1]
        w, h = cameras.width, cameras.height
        new, ints = functools.partial(torch.empty, dtype=dtype), dict(dtype=torch.int64)
        self.fields = [x.contiguous() for x in scene.fields().values()]
        self.settings = operators.packed_settings(settings)
        self.splats, self.radii, self.order = new(1, n, operators.SPLAT), new(1, n), torch.empty(1, n, dtype=torch.int32)
        self.tiles, self.counts, self.needed = torch.empty(1, n, **ints), torch.empty(1, 3, **ints), torch.empty(1, **ints)
        self.offsets = torch.empty(operators.tile_count(1, w, h) + 1, **ints)
        self.head = (n, 1, w, h, min(3, scene.sh_degree), k, self.settings, *self.fields, cameras.world_to_cam, cameras.K, None)
        self.color, self.alpha = new(1, h, w, 3), new(1, h, w)
        self.v_color = torch.randn(1, h, w, 3, generator=torch.Generator().manual_seed(1)).to(dtype)
        self.v_splats, self.grads = new(1, n, operators.SPLAT), [torch.empty_like(x) for x in self.fields]
        self.target, self.v_image, self.terms = torch.rand(h, w, 3, generator=torch.Generator().manual_seed(2)).to(dtype), new(h, w, 3), torch.empty(2, dtype=torch.float64)
        self.moments = [(torch.zeros_like(x), torch.zeros_like(x), torch.full((x[0].numel(),), 1e-12)) for x in self.fields]
        self.project(native.cpu_library(dtype))
        self.pairs = torch.empty(int(self.counts[0, 1]), dtype=torch.int32)

    def project(self, lib):
        lib.sk_project(*self.head, self.head[0], self.splats, self.order, self.radii, self.tiles, self.counts, None, 0, None)

    def forward(self, lib):
        self.project(lib)
        n, c, w, h, *_ = self.head
        lib.sk_blend(n, c, w, h, 0, self.settings, self.splats, self.order, self.tiles, self.counts, None, None, len(self.pairs), self.needed, self.pairs,
                     self.offsets, self.color, self.alpha, None, None, None, None, 0, None)

    def backward(self, lib):
        n, c, w, h, *_ = self.head
        lib.sk_blend_vjp(n, c, w, h, 0, self.settings, self.splats, self.tiles, self.counts, None, None, self.pairs, self.offsets, self.color, self.alpha,
                         None, None, self.v_color, None, None, None, self.v_splats, None, None, None, None, 0, None)
        lib.sk_project_vjp(*self.head, self.radii, self.v_splats, *self.grads, None, None, None, 0, None)

    def loss_and_optimiser(self, lib):
        lib.sk_l1_ssim(self.head[2], self.head[3], self.color[0], self.target, None, 0.2, self.terms, self.v_image, None, 0, None)
        for x, g, (m, v, rate) in zip(self.fields, self.grads, self.moments):
            lib.sk_adam(len(x), rate.numel(), x, g, m, v, rate, 0.9, 0.999, 1e-15, 1000, None, None, None, 0, 0.0, 0.0, None)


def minimum(tasks: dict, rounds: int) -> dict:
    """Fewest seconds of each task over interleaved rounds: {name: {wall, cpu}}; the first round warms up."""
    best = {name: {"wall": float("inf"), "cpu": float("inf")} for name in tasks}
    for k in range(rounds + 1):
        for name, task in tasks.items():
            wall, cpu = time.perf_counter(), time.process_time()
            task()
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            if k:
                best[name] = {"wall": min(best[name]["wall"], wall), "cpu": min(best[name]["cpu"], cpu)}
    return best


def speed(points, views, rounds: int) -> tuple[list[dict], dict]:
    isas = [isa for isa in native.ISAS if native.available()[f"cpu_{isa}"] is None]
    best_lib = native.cpu_library(torch.float32, isas[0])
    peaks = {1: 0.0, 2: 0.0}
    rows = []
    for name, scene in [("knn 10k", knn(points, 10_000)), ("knn 100k", knn(points, 100_000)), ("knn 138,766", knn(points, len(points))),
                        ("gst 100k", gst(points, 100_000))]:
        works, tasks = [Workload(scene, cameras) for cameras in views], {}
        for isa, threads, part in itertools.product(isas, (1, 2), ("forward", "backward", "loss_and_optimiser")):
            def task(lib=native.cpu_library(torch.float32, isa), threads=threads, part=part):
                torch.set_num_threads(threads)
                for work in works:
                    getattr(work, part)(lib)
            tasks[isa, threads, part] = task
        for threads in (1, 2):
            def task(threads=threads):
                peaks[threads] = max(peaks[threads], best_lib.sk_fma_peak(threads, 0.05))
            tasks["peak", threads] = task
        trained = Scene(*[x.clone().requires_grad_() for x in scene.fields().values()])
        for threads in (1, 2):
            def task(threads=threads):
                torch.set_num_threads(threads)
                for cameras, work in zip(views, works):
                    torch.autograd.grad(render(trained, cameras).color, list(trained.fields().values()), work.v_color)
            tasks["public", threads] = task
        best = {name: {k: v / len(views) for k, v in row.items()} for name, row in minimum(tasks, rounds).items()}
        for (isa, threads), group in itertools.groupby(((k, v) for k, v in best.items() if len(k) == 3), key=lambda kv: kv[0][:2]):
            parts = {k[2]: v for k, v in group}
            rows.append({"workload": name, "isa": isa, "threads": threads, "pairs": mean(len(w.pairs) for w in works), "visible": mean(int(w.counts[0, 0]) for w in works), **parts})
        for threads in (1, 2):
            rows.append({"workload": name, "isa": "public render + backward", "threads": threads, "forward": best["public", threads]})
    return rows, peaks


def threads(points, cameras) -> dict:
    """Speed-up of forward + backward, and of independent FMA loops, by a second thread: medians over forty rounds of one after the
    other, because neighbours make both cores, or one of them, slower for seconds at a time."""
    lib, work, ratios = native.cpu_library(torch.float32), Workload(knn(points, 100_000), cameras), []
    for _ in range(40):
        seconds, rate = [], []
        for n in (1, 2):
            torch.set_num_threads(n)
            start = time.perf_counter()
            work.forward(lib)
            work.backward(lib)
            seconds.append(time.perf_counter() - start)
            rate.append(lib.sk_fma_peak(n, 0.01))
        ratios.append((seconds[0] / seconds[1], rate[1] / rate[0]))
    return {"speed-up": median(r[0] for r in ratios), "of FMA loops": median(r[1] for r in ratios)}


def accuracy(points, cameras) -> dict:
    """Relative L2 of float gradients against the double library on the same values, and whether the sort orders agree in every build."""
    def grads(scene, cams, settings, dtype):
        scene = scene.to(dtype=dtype).requires_grad_()
        out = render(scene, cams.to(dtype=dtype), settings=settings)
        v = torch.randn(out.color.shape, generator=torch.Generator().manual_seed(3)).to(dtype)
        return dict(zip(scene.fields(), torch.autograd.grad(out.color, list(scene.fields().values()), v)))
    rows = {}
    for name, scene, cams, settings in [("knn 2k, 160x104, smooth", knn(points, 2000), cameras.resized(160, 104), RasterSettings.smooth()),
                                        ("knn 100k", knn(points, 100_000), cameras, RasterSettings()), ("gst 100k", gst(points, 100_000), cameras, RasterSettings())]:
        single, double = grads(scene, cams, settings, torch.float32), grads(scene, cams, settings, torch.float64)
        rows[name] = {k: float((single[k].double() - double[k]).norm() / double[k].norm()) for k in double}
        orders = []
        for lib, dtype in [(native.cpu_library(torch.float32, isa), torch.float32) for isa in native.ISAS if native.available()[f"cpu_{isa}"] is None] + \
                          [(native.cpu_library(torch.float64), torch.float64)]:
            s, c, n = scene.to(dtype=dtype), cams.to(dtype=dtype), len(scene)
            order, counts = torch.zeros(1, n, dtype=torch.int32), torch.zeros(1, 3, dtype=torch.int64)
            lib.sk_project(n, 1, c.width, c.height, -1, 16, operators.packed_settings(settings), *[x.contiguous() for x in s.fields().values()], c.world_to_cam, c.K,
                           None, n, torch.empty(1, n, operators.SPLAT, dtype=dtype), order, torch.empty(1, n, dtype=dtype), torch.empty(1, n, dtype=torch.int64),
                           counts, None, 0, None)
            orders.append(order[0, : int(counts[0, 0])].clone())
        rows[name]["sort orders equal"] = all(torch.equal(orders[0], o) for o in orders)
    return rows


def rounded_picture(points, cameras) -> dict:
    """The least that any float32 renderer can do on knn 2k with smooth settings: relative L2 of the double library's gradients when
    nothing but the picture, which the backward reads, has been rounded to float32."""
    lib, work = native.cpu_library(torch.float64), Workload(knn(points, 2000), cameras.resized(160, 104), RasterSettings.smooth(), torch.float64)
    results = []
    for dtype in (torch.float64, torch.float32):
        work.forward(lib)
        work.color, work.alpha = work.color.to(dtype).double(), work.alpha.to(dtype).double()
        work.backward(lib)
        results.append([g.clone() for g in work.grads])
    return {k: float((a - b).norm() / a.norm()) for k, a, b in zip(("means", "quats", "log_scales", "logit_opacities", "sh"), *results)}


def features(rounds: int) -> dict:
    """Forward and backward of 384 channels against 3 colours, 256x256, 131,072 pixel-aligned Gaussians."""
    g = torch.Generator().manual_seed(0)
    n, side = 131_072, 256
    z = 2 + torch.rand(n, generator=g)
    xy = (torch.rand(n, 2, generator=g) - 0.5) * 256 / 250 * z[:, None]
    scene = Scene(torch.cat([xy, z[:, None]], 1), torch.randn(n, 4, generator=g), torch.log(z / 250)[:, None] + 0.3 * torch.randn(n, 3, generator=g),
                  torch.randn(n, generator=g), torch.randn(n, 1, 3, generator=g), torch.randn(n, 384, generator=g))
    cams = Cameras(torch.eye(4)[None], torch.tensor([[[250.0, 0, 128], [0, 250, 128], [0, 0, 1]]]), side, side)
    v3, v384 = torch.randn(1, side, side, 3, generator=g), torch.randn(1, side, side, 384, generator=g)
    geometry = [x.requires_grad_() for x in (scene.means, scene.quats, scene.log_scales, scene.logit_opacities, scene.sh, scene.features)][:4]

    def colour():
        torch.autograd.grad(render(scene, cams).color, [*geometry, scene.sh], v3)

    def feature():
        torch.autograd.grad(render(scene, cams, outputs=("features",)).features, [*geometry, scene.features], v384)

    torch.set_num_threads(2)
    best = minimum({"3": colour, "384": feature}, rounds)
    return {"3 channels": best["3"], "384 channels": best["384"], "ratio": best["384"]["wall"] / best["3"]["wall"]}


def memory(data: Path) -> dict:
    """Peak resident memory of one forward and backward at knn 100k above its inputs, in a process of its own."""
    code = f"""
import sys; sys.path.insert(0, {str(ROOT / 'scripts')!r})
import torch, bench_raster as b
from splatkit.raster import render
points, (cameras, *_) = b.garden(b.Path({str(data)!r}))
scene = b.knn(points, 100_000).requires_grad_()
small = b.knn(points, 100).requires_grad_()
torch.autograd.grad(render(small, cameras).color.sum(), list(small.fields().values()))
def status(key): return int(next(l for l in open('/proc/self/status') if l.startswith(key)).split()[1]) / 1024
open('/proc/self/clear_refs', 'w').write('5')
before = status('VmRSS')
grads = torch.autograd.grad(render(scene, cameras).color.sum(), list(scene.fields().values()))
print(status('VmHWM') - before, sum(g.numel() * 4 for g in grads) / 2**20)
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    return {"peak MB above inputs": float(out[0]), "of which gradients MB": float(out[1])}


def processor() -> str:
    """The processor's name and model numbers as Linux tells them."""
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines() if ":" in line)
        info = {k.strip(): v.strip() for k, v in lines.items()}
        return f"{info['model name']} (family {info['cpu family']}, model {info['model']}, stepping {info['stepping']})"
    except (OSError, KeyError):
        return platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("SPLATKIT_DATA", ROOT.parent / "shared" / "data")))
    args = parser.parse_args()
    points, views = garden(args.data)
    rows, peaks = speed(points, views, args.rounds)
    peak = peaks[1]
    print(f"{processor()}, {os.cpu_count()} cores; FMA peak {peak:.0f} GFLOP/s on one core, {peaks[2]:.0f} on two")
    print("| workload | build | threads | forward ms (CPU) | GFLOP | backward ms (CPU) | GFLOP | loss + Adam ms | GFLOP |\n|---|---|---|---|---|---|---|---|---|")
    for r in rows:
        cells = [f"{r[p]['wall'] * 1e3:.1f} ({r[p]['cpu'] * 1e3:.1f}) | {r[p]['wall'] * peak:.2f}" if p in r else " | " for p in ("forward", "backward", "loss_and_optimiser")]
        print(f"| {r['workload']} | {r['isa']} | {r['threads']} | {' | '.join(cells)} |")
    by = {(r["workload"], r["isa"], r["threads"]): r for r in rows}
    best, total = native.ISAS[0], lambda r: r["forward"]["wall"] + r["backward"]["wall"]
    summary = {"two threads": threads(points, views[1])}
    if ("knn 100k", "v3", 1) in by and best == "v4":
        summary["AVX2 / AVX-512"] = total(by["knn 100k", "v3", 1]) / total(by["knn 100k", "v4", 1])
    result = {"machine": processor(), "cores": os.cpu_count(), "fma_peak_gflops": peaks, "speed": rows, "summary": summary,
              "features": features(args.rounds), "memory": memory(args.data), "accuracy": accuracy(points, views[0]), "accuracy limit": rounded_picture(points, views[0])}
    for key in ("summary", "features", "memory", "accuracy limit"):
        print(f"{key}: " + json.dumps(result[key]))
    for name, row in result["accuracy"].items():
        print(f"float against double, {name}: " + ", ".join(f"{k} {v:.1e}" if not isinstance(v, bool) else f"{k}: {v}" for k, v in row.items()))
    (ROOT / "benchmarks" / "raster.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
