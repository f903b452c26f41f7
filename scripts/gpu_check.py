"""Everything that only a card can show: parity with the double CPU library, determinism, traps, sanitizers, memory, and the race against gsplat.

    python3 scripts/gpu_check.py                       # all parts, writes benchmarks/gpu_<card>.json
    python3 scripts/gpu_check.py parity speed          # some of them; the file keeps the others
    python3 scripts/gpu_check.py --dry                 # every part on the CPU and small: shows that the script runs

Each part stays under nine minutes. gsplat's columns need `pip install gsplat` (1.5.3); without it only ours are measured.
"""
import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
from gpu_bench import GROUPS, ROOT, Ours, Theirs, clock, dense, file_of, peak_bytes, pixel_pair, provenance

from splatkit import native
from splatkit.camera import Cameras
from splatkit.raster import RasterSettings, RasterStats, operators, render
from splatkit.scene import Scene


class Bench:
    """What the parts share: the device, how large to be, where data is."""

    def __init__(self, dry: bool, data: Path):
        self.dry, self.data, self.device = dry, data, "cpu" if dry else "cuda"
        self.rounds, self.repeats = (1, 1) if dry else (5, 20)
        try:
            if dry:
                raise ImportError
            import gsplat  # noqa: F401
            self.peer = True
        except ImportError:
            self.peer = False

    def size(self, n: int) -> int:
        return min(n, 2000) if self.dry else n


def drawn(scene: Scene, cameras: Cameras, outputs=("color",), settings=RasterSettings(), seed: int = 3, with_stats: bool = True) -> dict[str, torch.Tensor]:
    """Pictures, their gradients with random weights by every field, pose, K and background, and the stats: on the CPU in double."""
    device, dtype = scene.device, scene.dtype
    leaves = {k: x.detach().clone().requires_grad_() for k, x in scene.fields().items() if k != "features" or "features" in outputs}
    leaves |= {"world_to_cam": cameras.world_to_cam.clone().requires_grad_(), "K": cameras.K.clone().requires_grad_(),
               "background": torch.full((len(cameras), 3), 0.3, dtype=dtype, device=device).requires_grad_()}
    stats = RasterStats.zeros(len(scene), dtype=dtype, device=device) if with_stats else None
    out = render(Scene(**{k: leaves[k] for k in scene.fields() if k in leaves}), cameras.replace(world_to_cam=leaves["world_to_cam"], K=leaves["K"]),
                 outputs=outputs, background=leaves["background"], settings=settings, stats=stats)
    pictures, g = {k: x for k, x in vars(out).items() if x is not None and x.requires_grad}, torch.Generator().manual_seed(seed)
    loss = sum((x * torch.randn(x.shape, generator=g).to(x)).sum() for x in pictures.values())
    grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    found = {**{k: x.detach() for k, x in pictures.items()}, **{f"d {k}": x for k, x in zip(leaves, grads) if x is not None},
             **({"grad_sum": stats.grad_sum, "abs_grad_sum": stats.abs_grad_sum, "weight_sum": stats.weight_sum} if stats else {})}
    return {k: x.double().cpu() for k, x in found.items()}


def parity(b: Bench) -> dict:
    """Relative L2 of the card's float32 against the double CPU library."""
    garden, views = dense(b.data, b.size(100_000), 648, 420)
    pair, front = pixel_pair(40, 64 if b.dry else 128)
    near = RasterSettings(alpha_min=0.0, alpha_max=1.0, transmittance_min=0.0)
    cases = {"garden 100k": (garden, views[0], ("color",), RasterSettings()),
             "garden 100k, depth, antialias": (garden, views[1], ("color", "expected_depth"), RasterSettings(antialias=True)),
             "garden 100k, no cut-offs": (garden.rows(slice(0, 2000)), views[0].resized(160, 104), ("color",), near),
             "two cameras": (garden.rows(slice(0, 20_000)), Cameras.cat([v.resized(333, 217) for v in views[:2]]), ("color",), RasterSettings()),
             "features, 40 channels": (pair, front, ("features",), RasterSettings()),
             "features, colour, depth": (pair, front, ("color", "features", "expected_depth"), RasterSettings())}
    table = {}
    cases = {f"{name}{', no stats' * (not stats)}": (*case, stats) for name, case in cases.items() for stats in (True, False) if stats or case[2] == ("color",)}
    for name, (scene, cameras, outputs, settings, stats) in cases.items():     # without stats the matrix units take part
        card = drawn(scene.to(b.device), cameras.to(b.device), outputs, settings, with_stats=stats)
        exact = drawn(scene.to(dtype=torch.float64), cameras.to(dtype=torch.float64), outputs, settings, with_stats=stats)
        table[name] = {k: float((card[k] - exact[k]).norm() / exact[k].norm().clamp_min(1e-300)) for k in exact}
        print(f"parity, {name}: " + ", ".join(f"{k} {x:.1e}" for k, x in table[name].items()), flush=True)
    return table


def orders(b: Bench) -> dict:
    """Whether the card sorts exactly as the double CPU library does."""
    from splatkit.raster.operators import SPLAT, packed_settings
    scene, views = dense(b.data, b.size(200_000), 648, 420)
    found = []
    for device, dtype in ((b.device, torch.float32), ("cpu", torch.float64)):
        s, c, n = scene.to(device=device, dtype=dtype), views[0].to(device=device, dtype=dtype), len(scene)
        lib = native.library_of(s.means)
        ints, counts = dict(dtype=torch.int64, device=device), torch.zeros(1, 3, dtype=torch.int64, device=device)
        order = torch.zeros(1, n, dtype=torch.int32, device=device)
        lib.sk_project(n, 1, c.width, c.height, -1, 16, packed_settings(RasterSettings()), *[x.contiguous() for x in s.fields().values()], c.world_to_cam, c.K, None, n,
                       s.means.new_empty(1, n, SPLAT), order, s.means.new_empty(1, n), torch.empty(1, n, **ints), counts, *lib.room("PROJECT", n, capacity=n))
        found.append((int(counts[0, 0]), order[0, :int(counts[0, 0])].cpu()))
    return {"visible": [f[0] for f in found], "orders equal": found[0][0] == found[1][0] and torch.equal(found[0][1], found[1][1])}


def determinism(b: Bench) -> dict:
    """Two backward passes bit for bit, and what that costs."""
    scene, views = dense(b.data, b.size(1_000_000), *((96, 64) if b.dry else (1920, 1080)))
    pair, front = pixel_pair(64, 32 if b.dry else 256)
    fixed, result = RasterSettings(deterministic=True), {}
    for name, s, c, outputs in (("colour 1M", scene, views[0], ("color",)), ("64 channels", pair, front, ("features",))):
        s, c = s.to(b.device), c.to(b.device)
        first, second = drawn(s, c, outputs, fixed), drawn(s, c, outputs, fixed)
        result[name] = {"bit-equal": all(torch.equal(first[k], second[k]) for k in first)}
        leaves = s.clone().requires_grad_()
        inputs = [x for k, x in leaves.fields().items() if k in ("means", "quats", "log_scales", "logit_opacities") or k == ("sh" if outputs == ("color",) else "features")]
        tasks = {}
        for label, settings in (("free", RasterSettings()), ("fixed", fixed)):
            out = render(leaves, c, outputs=outputs, settings=settings)
            picture = out.color if outputs == ("color",) else out.features
            tasks[label] = lambda p=picture, v=torch.rand_like(picture): torch.autograd.grad(p, inputs, v, retain_graph=True)
        ms = clock(tasks, b.rounds, b.repeats, b.device)
        result[name] |= {"ms": {k: x["ms"] for k, x in ms.items()}, "cost": ms["fixed"]["ms"] / ms["free"]["ms"]}
    return result


def traps(b: Bench) -> dict:
    """Extreme and wrong input: finite pictures and gradients, or an error that names the field, and a device that still works."""
    scene, cameras = pixel_pair(3, 32)
    scene, cameras, result = scene.rows(slice(0, 600)).to(b.device), cameras.to(b.device), {}
    far = scene.means + torch.tensor([0, 0, 1e6], device=b.device)
    extreme = {"zero quaternions": {"quats": scene.quats * 0}, "tiny quaternions": {"quats": scene.quats * 1e-30}, "log-scale -100": {"log_scales": scene.log_scales * 0 - 100},
               "log-scale 50": {"log_scales": scene.log_scales * 0 + 50}, "logit 100": {"logit_opacities": scene.logit_opacities * 0 + 100},
               "logit -100": {"logit_opacities": scene.logit_opacities * 0 - 100}, "at the camera": {"means": scene.means * 0}, "coincident": {"means": scene.means * 0 + 2},
               "far away": {"means": far}, "behind": {"means": -scene.means}}
    for name, change in extreme.items():
        found = drawn(scene.replace(**change), cameras, ("color", "expected_depth", "features"))
        result[name] = all(bool(x.isfinite().all()) for x in found.values())
    for field in GROUPS:
        bad = getattr(scene, field).clone()
        bad.view(-1)[7] = float("nan")
        try:
            render(scene.replace(**{field: bad}), cameras)
            result[f"NaN in {field}"] = False
        except ValueError as why:
            result[f"NaN in {field}"] = f"scene.{field}" in str(why)
    empty = scene.rows(slice(0, 0))
    result["no Gaussians"] = all(bool(x.isfinite().all()) for x in drawn(empty, cameras, ("color", "expected_depth", "features")).values())
    result["still works"] = bool(drawn(scene, cameras)["color"].isfinite().all())
    print("traps: " + ", ".join(f"{k}: {v}" for k, v in result.items() if v is not True) + f" ({sum(v is True for v in result.values())} of {len(result)} hold)")
    return result


def sanitizers(b: Bench) -> dict:
    """memcheck and racecheck over small scenes of every kind, in processes of their own."""
    tool = shutil.which("compute-sanitizer") or next((str(p) for p in Path("/usr/local").glob("cuda*/bin/compute-sanitizer")), None)
    if b.dry or tool is None:
        return {"skipped": "dry" if b.dry else "compute-sanitizer is not on PATH"}
    result = {}
    for kind in ("memcheck", "racecheck"):
        done = subprocess.run([tool, "--tool", kind, "--kernel-regex", "kns=sk", "--error-exitcode", "9", sys.executable, __file__, "small"], capture_output=True, text=True,
                              timeout=400, check=False)
        lines = (done.stdout + done.stderr).strip().splitlines()
        result[kind] = {"clean": done.returncode == 0, "said": lines[-8:]}
        print(f"{kind}: {'clean' if done.returncode == 0 else lines[-20:]}", flush=True)
    return result


def small(b: Bench) -> dict:
    """What the sanitizers run: every kernel once on small scenes."""
    from splatkit.metrics import l1_ssim
    scene, cameras = pixel_pair(70, 40, 700)
    scene, cameras = scene.to(b.device), Cameras.cat([cameras, cameras]).to(b.device)
    for settings in (RasterSettings(), RasterSettings(deterministic=True)):
        drawn(scene, cameras, ("color", "expected_depth", "median_depth", "features"), settings)
        drawn(scene, cameras, ("color",), settings)
        drawn(scene, cameras, ("color",), settings, with_stats=False)
    ours = Ours(scene.replace(features=None, sh=torch.randn(len(scene), 16, 3, device=b.device)), [cameras[0]], b.device, [torch.rand(40, 40, 3, device=b.device)])
    ours.step()
    l1_ssim(torch.rand(37, 51, 3, device=b.device).requires_grad_(), torch.rand(37, 51, 3, device=b.device), mask=torch.rand(37, 51, device=b.device) > 0.5).backward()
    from splatkit.density import mcmc_noise, relocated
    from splatkit.raster import uplift
    mcmc_noise(scene, 1e-3)
    relocated(scene.logit_opacities, scene.log_scales, torch.arange(len(scene), device=b.device) % 5 + 1)
    uplift(scene.replace(features=None), [(cameras[0], torch.rand(40, 40, 70, device=b.device))])
    if b.device == "cuda":
        torch.cuda.synchronize()
    return {"ran": True}


def memory(b: Bench) -> dict:
    """Twenty million Gaussians, forward and backward at 1920 x 1080."""
    scene, views = dense(b.data, b.size(20_000_000), *((96, 64) if b.dry else (1920, 1080)))
    leaves, camera = scene.to(b.device).requires_grad_(), views[0].to(b.device)

    def task():
        torch.autograd.grad(render(leaves, camera).color.sum(), list(leaves.fields().values()))
    peak = peak_bytes(task, b.device)
    ms = clock({"forward + backward": task}, 1, 3, b.device)["forward + backward"]["ms"]
    return {"gaussians": len(scene), "peak MB above the scene": peak / 2**20, "forward + backward ms": ms}


def speed(b: Bench, sizes=(1_000_000, 6_000_000)) -> dict:
    """Forward, backward and the whole training step at 1920 x 1080, SH 3."""
    width, height = (96, 64) if b.dry else (1920, 1080)
    result = {}
    for n in sizes:
        scene, views = dense(b.data, b.size(n), width, height)
        with torch.no_grad():
            targets = [torch.rand(height, width, 3, generator=torch.Generator().manual_seed(i)).to(b.device) for i in range(3)]
        rows = {"ours": Ours(scene, views, b.device, targets)}
        if b.peer:
            rows |= {"gsplat packed": Theirs(scene, views, b.device, targets, True), "gsplat": Theirs(scene, views, b.device, targets, False),
                     "gsplat selective": Theirs(scene, views, b.device, targets, False, True)}
        v = torch.randn(1, height, width, 3, generator=torch.Generator().manual_seed(9)).to(b.device)
        parts = {"forward": {k: r.forward for k, r in rows.items() if "selective" not in k}, "backward": {k: r.backward_of(v) for k, r in rows.items() if "selective" not in k},
                 "step": {k: r.step for k, r in rows.items()} | {"ours by autograd": rows["ours"].step_by_autograd, "ours selective": lambda ours=rows["ours"]: ours.step(sparse=True)}}
        table = {part: clock(tasks, b.rounds, b.repeats, b.device) for part, tasks in parts.items()}
        del parts["backward"]
        table["step MB"] = {k: {"MB": peak_bytes(task, b.device) / 2**20} for k, task in parts["step"].items()}
        for part, row in table.items():
            best = [x for k, x in row.items() if "ours" not in k]
            unit = "MB" if part == "step MB" else "ms"
            ratio = min(x[unit] for k, x in row.items() if "ours" in k) / min(x[unit] for x in best) if best else None
            table[part] = row | ({"ratio": ratio} if best else {})
            print(f"{n:,} {part}: " + ", ".join(f"{k} {x[unit]:.3f}" + (f" +-{x['spread']:.0%}" if "spread" in x else "") for k, x in row.items() if k != "ratio")
                  + (f"; ratio {ratio:.3f}" if best else ""), flush=True)
        result[f"{n}"] = table
        del rows, parts, scene, targets
    return result


def features(b: Bench, counts=(3, 32, 128, 384, 1024)) -> dict:
    """N channels at 256 x 256 from 131,072 pixel-aligned Gaussians, forward and backward."""
    result = {}
    for channels in counts:
        scene, camera = pixel_pair(channels, 32 if b.dry else 256)
        leaves, camera = scene.to(b.device).requires_grad_(), camera.to(b.device)
        inputs = [leaves.means, leaves.quats, leaves.log_scales, leaves.logit_opacities, leaves.features]
        v = torch.randn(1, camera.height, camera.width, channels, generator=torch.Generator().manual_seed(1)).to(b.device)
        tasks = {"ours": lambda: torch.autograd.grad(render(leaves, camera, outputs=("features",)).features, inputs, v), "ours forward": lambda: render(leaves, camera, outputs=("features",))}
        if b.peer:
            from gsplat import rasterization
            active = [x.detach().clone().requires_grad_() for x in (leaves.means, leaves.quats, leaves.log_scales.exp(), leaves.logit_opacities.sigmoid(), leaves.features)]
            for chunk in (32, 64) if channels > 32 else (32,):
                def theirs(active=active, chunk=chunk, channels=channels):
                    out = rasterization(*active, camera.world_to_cam, camera.K, camera.width, camera.height, packed=False, channel_chunk=chunk)[0]
                    torch.autograd.grad(out, active, v)
                tasks[f"gsplat chunk {chunk}"] = theirs
        row = clock(tasks, min(b.rounds, 3), max(1, b.repeats // 2), b.device)
        best = [x["ms"] for k, x in row.items() if "gsplat" in k]
        result[str(channels)] = row | ({"ratio": row["ours"]["ms"] / min(best)} if best else {})
        print(f"{channels} channels: " + ", ".join(f"{k} {x['ms']:.3f} +-{x['spread']:.0%}" for k, x in row.items()) + (f"; ratio {row['ours']['ms'] / min(best):.3f}" if best else ""), flush=True)
    return result


def kernels(b: Bench) -> dict:
    """Microseconds of each kernel in a training step at 1M and 6M, and of 384 channels."""
    from torch.profiler import ProfilerActivity, profile
    width, height = (96, 64) if b.dry else (1920, 1080)
    result = {}
    for n in (1_000_000, 6_000_000):
        scene, views = dense(b.data, b.size(n), width, height)
        ours = Ours(scene, views, b.device, [torch.rand(height, width, 3, device=b.device) for _ in range(3)])
        result[str(n)] = ours.step
        if n == 1_000_000:
            s, c, v = scene.to(b.device).requires_grad_(), views[0].to(b.device), torch.rand(1, height, width, 3, device=b.device)
            result["1000000 deterministic"] = lambda: torch.autograd.grad(render(s, c, settings=RasterSettings(deterministic=True)).color, list(s.fields().values()), v)
    scene, camera = pixel_pair(384, 32 if b.dry else 256)
    leaves, camera = scene.to(b.device).requires_grad_(), camera.to(b.device)
    inputs = [leaves.means, leaves.quats, leaves.log_scales, leaves.logit_opacities, leaves.features]
    result["384 channels"] = lambda: torch.autograd.grad(render(leaves, camera, outputs=("features",)).features.sum(), inputs)
    for name, task in result.items():
        for _ in range(4):
            task()
        with profile(activities=[ProfilerActivity.CUDA if b.device == "cuda" else ProfilerActivity.CPU]) as p:
            for _ in range(6):
                task()
            if b.device == "cuda":
                torch.cuda.synchronize()
        key = "self_device_time_total" if b.device == "cuda" else "self_cpu_time_total"
        times: dict[str, float] = {}
        for e in p.key_averages():
            words = re.findall(r"\w+_kernel(?=[<(])|DeviceRadixSort\w+|DeviceScan\w+", e.key)
            name_ = words[0] if words else e.key[:40]
            times[name_] = times.get(name_, 0) + getattr(e, key) / 6
        result[name] = dict(sorted(times.items(), key=lambda kv: -kv[1])[:24])
        print(f"kernels, {name}, us a step: " + ", ".join(f"{k} {x:.0f}" for k, x in result[name].items() if x >= 0.5), flush=True)
    return result


def graphs(b: Bench) -> dict:
    """Milliseconds of a training step, launch by launch and replayed as a CUDA graph of one view, which takes the host's share away and most gaps between kernels."""
    width, height = (96, 64) if b.dry else (1920, 1080)
    scene, views = dense(b.data, b.size(1_000_000), width, height)
    result = {}
    for name, sparse in (("dense", False), ("selective", True)):
        ours = Ours(scene, views[:1], b.device, [torch.rand(height, width, 3, device=b.device)])
        tasks = {"launches": lambda o=ours, s=sparse: o.step(s)}
        if b.device == "cuda":
            for _ in range(3):
                ours.step(sparse)
            torch.cuda.synchronize()
            room = operators.GRAPH_ROOM
            try:
                operators.GRAPH_ROOM = 1      # about as many pairs are sorted as without the graph
                with torch.cuda.graph(graph := torch.cuda.CUDAGraph()):
                    ours.step(sparse)
            finally:
                operators.GRAPH_ROOM = room
            tasks["graph"] = graph.replay
        result[name] = clock(tasks, b.rounds, b.repeats, b.device)
        print(f"graphs, {name}: " + ", ".join(f"{k} {x['ms']:.3f} ms +-{x['spread']:.1%}" for k, x in result[name].items()), flush=True)
    return result


def ceilings(b: Bench) -> dict:
    """What the card does at most: multiply-adds in registers and bytes copied."""
    peak = native.library_of(torch.zeros(1, device=b.device)).sk_fma_peak(1, 0.02)
    x = torch.empty(1 << (20 if b.dry else 30), dtype=torch.uint8, device=b.device)
    y = torch.empty_like(x)
    ms = clock({"copy": lambda: y.copy_(x)}, 3, 5, b.device)["copy"]["ms"]
    return {"FMA GFLOP/s": peak, "copy GB/s": 2 * x.numel() / ms / 1e6}


PARTS = {f.__name__: f for f in (ceilings, parity, orders, traps, determinism, sanitizers, speed, features, kernels, graphs, memory)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help=f"any of {', '.join(PARTS)}; all when none is named")
    parser.add_argument("--dry", action="store_true")
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("SPLATKIT_DATA", ROOT.parent / "shared" / "data")))
    parser.add_argument("--out", type=Path, help="the JSON file (default: benchmarks/gpu_<card>.json; with --dry: none)")
    parser.add_argument("--commit", help="what to write down as the commit where there is no git")
    args = parser.parse_args()
    bench = Bench(args.dry, args.data)
    if args.parts == ["small"]:
        small(bench)
        return
    if not args.dry and (why := native.available()["cuda"]):
        sys.exit(f"gpu_check.py: {why}")
    origin = provenance(args.dry, args.commit, bench.peer)
    out = args.out or (None if args.dry else file_of(origin))
    result = json.loads(out.read_text()) if out and out.exists() else {}
    for name in args.parts or PARTS:
        start = time.monotonic()
        found = PARTS[name](bench)
        result[name] = {"result": found, "seconds": round(time.monotonic() - start, 1), **origin}
        print(f"-- {name}: {result[name]['seconds']} s", flush=True)
        if out:
            out.write_text(json.dumps(result, indent=1) + "\n")
    if not out:
        print(json.dumps({k: v["result"] for k, v in result.items()})[:2000])


if __name__ == "__main__":
    main()
