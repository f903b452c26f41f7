"""Time to equal PSNR on one card: splatkit's trainer against a loop around gsplat 1.5.3, on photos and on pictures of a known scene.

    python3 scripts/gpu_train.py                                   # all cases, adds to benchmarks/gpu_<card>.json
    python3 scripts/gpu_train.py --cases plush --seeds 0 --steps 7000
    python3 scripts/gpu_train.py --dry                             # on the CPU and tiny: shows that the script runs

Both start from the same Gaussians and see the same photos, which are on the card, in the same order, with the same loss (ours), rates, schedule, cap
and regularisation; each draws its own held-out pictures. The clock runs for the steps alone: not for what comes before them, nor for evaluation. Seconds
are those to the lower of the two final PSNRs, read off the curves of the best so far. Runs that --budget does not reach are not begun.
"""
import argparse
import dataclasses
import functools
import gc
import json
import math
import os
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from gpu_bench import ROOT, dense, file_of, provenance

from splatkit import config as configs
from splatkit import native
from splatkit.camera import Cameras, look_at
from splatkit.config import Reconstruct
from splatkit.density import SH_CONSTANT, from_points, relocated_reference
from splatkit.errors import Diverged, SplatkitError
from splatkit.fit import Fit, View
from splatkit.growth import KINDS
from splatkit.initial import first_scene
from splatkit.metrics import l1_ssim, psnr
from splatkit.optim import exponential_decay
from splatkit.paths import estimate_up, focus
from splatkit.raster import render
from splatkit.reconstruct import extent_of
from splatkit.scene import Scene
from splatkit.views import raster_settings, views_of

PHOTOS = ("plush", "banana")


@dataclass(frozen=True)
class Case:
    """What both trainers are given, all of it on the device."""

    config: Reconstruct
    first: Scene
    extent: float
    train: list[View]
    held: list[View]

    def rate(self, step: int) -> float:
        """Of the means."""
        lr = self.config.lr
        return exponential_decay(step, self.config.steps, lr.means, lr.means_final) * self.extent

    def degree(self, step: int) -> int:
        return min(self.config.sh_degree, (step - 1) // self.config.sh_every)

    def warming_up(self) -> "Case":
        """The same for a few steps, growth among them."""
        config, soon = self.config, dict(start=5, every=5)
        return dataclasses.replace(self, config=dataclasses.replace(config, steps=20, sh_every=5, mcmc=dataclasses.replace(config.mcmc, **soon), adc=dataclasses.replace(config.adc, **soon)))


class Ours:
    """The steps of `splatkit reconstruct`."""

    def __init__(self, case: Case):
        config = case.config
        growth = KINDS[config.densification](config, case.extent, len(case.first), case.first.device)
        self.case, self.settings = case, raster_settings(config)
        self.background = torch.zeros(3, device=case.first.device)
        self.fit = Fit.first(case.first.clone(), growth, config, [view.camera for view in case.train])

    def step(self, step: int, view: View) -> None:
        _, _, bad = self.fit.step_on(view, self.background, self.case.degree(step), self.settings, self.case.rate(step))
        if bad:
            raise Diverged(f"{', '.join(bad)} not finite at step {step}")
        self.fit.grow(step)

    def picture(self, camera: Cameras) -> torch.Tensor:
        return render(self.fit.scene, camera, background=self.background, settings=self.settings).color[0]

    @property
    def gaussians(self) -> int:
        return self.fit.gaussians


class Theirs:
    """A training loop around gsplat's public functions, as its documentation has it: an optimiser per parameter, a strategy behind each step.

    SelectiveAdam is left out: it would not step what a picture does not show, which is another trainer than the one that the strategies were made
    for. DefaultStrategy knows no cap, and in 1.5.3 never lowers opacities, whatever its reset_every; so neither does ours here.
    """

    def __init__(self, case: Case, rasterization: Callable):
        from gsplat import DefaultStrategy, MCMCStrategy
        config, scene, lr = case.config, case.first, case.config.lr
        self.case, self.rasterization, self.mcmc = case, rasterization, config.densification == "mcmc"
        torch.manual_seed(config.seed)
        fields = {"means": (scene.means, case.rate(1)), "scales": (scene.log_scales, lr.log_scales), "quats": (scene.quats, lr.quats),
                  "opacities": (scene.logit_opacities, lr.logit_opacities), "sh0": (scene.sh[:, :1], lr.sh_dc), "shN": (scene.sh[:, 1:], lr.sh_rest)}
        self.params = torch.nn.ParameterDict({name: torch.nn.Parameter(x.detach().clone(memory_format=torch.contiguous_format)) for name, (x, _) in fields.items()})
        self.optimizers = {name: torch.optim.Adam([{"params": self.params[name], "lr": rate}], eps=1e-15, betas=(0.9, 0.999), fused=True)
                           for name, (_, rate) in fields.items()}
        # The strategies begin after refine_start_iter and end before refine_stop_iter; ours counts both ends.
        kind = config.mcmc if self.mcmc else config.adc
        window = {"refine_start_iter": kind.start - 1, "refine_stop_iter": math.floor(kind.stop_fraction * config.steps) + 1, "refine_every": kind.every}
        if self.mcmc:
            self.strategy = MCMCStrategy(cap_max=config.max_gaussians, noise_lr=config.mcmc.noise, min_opacity=config.mcmc.dead_opacity, **window)
            self.state = self.strategy.initialize_state()
        else:
            self.strategy = DefaultStrategy(prune_opa=config.adc.prune_opacity, grow_grad2d=config.adc.grad_threshold, grow_scale3d=config.adc.split_scale,
                                            absgrad=config.adc.absgrad, **window)
            self.state = self.strategy.initialize_state(scene_scale=case.extent)
        self.strategy.check_sanity(self.params, self.optimizers)

    def draw(self, camera: Cameras, degree: int) -> tuple:
        p = self.params
        return self.rasterization(p["means"], p["quats"], torch.exp(p["scales"]), torch.sigmoid(p["opacities"]), torch.cat([p["sh0"], p["shN"]], 1), camera.world_to_cam,
                                  camera.K, camera.width, camera.height, near_plane=0.01, packed=False, sh_degree=degree, absgrad=not self.mcmc and self.strategy.absgrad)

    def step(self, step: int, view: View) -> None:
        config, rate = self.case.config, self.case.rate(step)
        color, _, info = self.draw(view.camera, self.case.degree(step))
        loss = l1_ssim(color[0], view.photo, config.ssim_weight, view.mask)
        if self.mcmc:
            loss = loss + config.mcmc.opacity_reg * torch.sigmoid(self.params["opacities"]).mean() + config.mcmc.scale_reg * torch.exp(self.params["scales"]).mean()
        else:
            self.strategy.step_pre_backward(self.params, self.optimizers, self.state, step, info)
        loss.backward()
        self.optimizers["means"].param_groups[0]["lr"] = rate
        for optimizer in self.optimizers.values():
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.strategy.step_post_backward(self.params, self.optimizers, self.state, step, info, **({"lr": rate} if self.mcmc else {"packed": False}))

    def picture(self, camera: Cameras) -> torch.Tensor:
        return self.draw(camera, self.case.config.sh_degree)[0][0]

    @property
    def gaussians(self) -> int:
        return len(self.params["means"])


def peer(dry: bool) -> Callable | None:
    """gsplat's rasterization; None where gsplat is not installed, with a dry run its plain torch functions in place of kernels."""
    try:
        import gsplat
    except ImportError:
        return None
    if not dry:
        from gsplat.cuda._backend import _C
        if _C is None:
            raise SystemExit("gpu_train.py: gsplat has no compiled extension here; put gsplat_cuda.so where it looks for it, or nvcc on PATH")
        return gsplat.rasterization
    from gsplat.cuda import _torch_impl as plain
    from gsplat.strategy import ops

    def relocation(opacities, scales, ratios, binoms):
        logits, log_scales = relocated_reference(torch.logit(opacities), scales.log(), ratios)
        return torch.sigmoid(logits), log_scales.exp()
    ops.quat_scale_to_covar_preci, ops.compute_relocation = plain._quat_scale_to_covar_preci, relocation
    return functools.partial(plain_rasterization, plain)


def plain_rasterization(plain, means, quats, scales, opacities, colors, viewmats, Ks, width, height, *, near_plane, packed, sh_degree, absgrad) -> tuple:
    """gsplat.rasterization of one camera by its plain torch functions, every Gaussian in every pixel: for tiny pictures."""
    covariances, _ = plain._quat_scale_to_covar_preci(quats, scales, compute_preci=False)
    radii, means2d, depths, conics, _ = plain._fully_fused_projection(means, covariances, viewmats, Ks, width, height, near_plane=near_plane)
    order = depths[0].detach().argsort()
    order = order[(radii[0, order] > 0).all(-1)]
    rgb = (plain._spherical_harmonics(sh_degree, means - torch.linalg.inv(viewmats)[0, :3, 3], colors) + 0.5).clamp(min=0)[order]
    x, y = torch.meshgrid(torch.arange(width) + 0.5, torch.arange(height) + 0.5, indexing="xy")
    dx, dy = ((pixel.reshape(-1, 1) - means2d[0, order, axis]) for axis, pixel in enumerate((x, y)))
    a, b, c = conics[0, order].unbind(-1)
    alpha = (opacities[order] * torch.exp(-0.5 * (a * dx * dx + c * dy * dy) - b * dx * dy)).clamp(max=0.999)
    through = (1 - alpha).cumprod(1)
    weights = alpha * torch.cat([torch.ones_like(through[:, :1]), through[:, :-1]], 1)
    info = {"width": width, "height": height, "n_cameras": 1, "radii": radii, "gaussian_ids": None, "means2d": means2d}
    return (weights @ rgb).view(1, height, width, 3), 1 - through[:, -1:].view(1, height, width, 1), info


def schedule(args) -> Reconstruct:
    """The preset for cards with what this benchmark changes."""
    config, steps = configs.load_yaml(configs.preset("reconstruct", "gpu"), Reconstruct(data=args.data)), args.steps
    scaled = lambda of_30000: max(1, round(of_30000 / 30_000 * steps))
    return dataclasses.replace(config, steps=steps, densification=args.preset, max_gaussians=args.cap, sh_every=scaled(1000), max_side=32 if args.dry else 0,
                               device="cpu" if args.dry else "cuda", mcmc=dataclasses.replace(config.mcmc, start=scaled(500), every=args.every),
                               adc=dataclasses.replace(config.adc, start=scaled(500), every=args.every, reset_every=0))


def photo_case(name: str, config: Reconstruct) -> Case:
    """A capture at full resolution."""
    config = dataclasses.replace(config, data=config.data / name)
    views = views_of(config, lambda line: print(line, flush=True))
    train, held = views.capture.split(config.hold_every)
    seen = lambda chosen: [View(place, views.camera(i), views.image(i), views.mask(i)) for place, i in enumerate(chosen)]
    first, trained_on = first_scene(views.capture, train, config, print).to(views.device), seen(train)
    return Case(config, first, extent_of([view.camera for view in trained_on]), trained_on, seen(held))


@torch.no_grad()
def teacher_case(config: Reconstruct, gaussians: int, count: int, start: int, width: int, height: int) -> Case:
    """`count` pictures of a known scene from two rings of cameras about what its photos look at; the first Gaussians are some of its own, moved by a hundredth
    of the extent or so."""
    device, g = config.device, torch.Generator().manual_seed(5)
    teacher, photos = dense(config.data, gaussians, width, height)
    cameras = Cameras.cat(photos)
    middle, up = focus(cameras), estimate_up(cameras)
    away = cameras.centres - middle
    above, radius = (away @ up).median(), (away - (away @ up)[:, None] * up).norm(dim=1).median()
    across = torch.nn.functional.normalize(torch.linalg.cross(up, away[0]), dim=0)
    along = torch.linalg.cross(across, up)
    turns, rings = 2 * math.pi * torch.arange(count) / count, torch.tensor([0.85, 1.15]).repeat(count)[:count]
    eyes = middle + radius * (turns.cos()[:, None] * across + turns.sin()[:, None] * along) + (rings * above)[:, None] * up
    poses = [Cameras(look_at(eye, middle, up)[None], cameras.K[:1], width, height).to(device) for eye in eyes]
    # Large ones, and those right before a camera, would be fog that other cameras do not see.
    teacher = teacher.replace(log_scales=teacher.log_scales.clamp(max=math.log(0.03 * float(radius)))).rows(torch.cdist(teacher.means, eyes).amin(1) > 0.4 * radius)
    on_device = teacher.to(device)
    views = [View(k, camera, render(on_device, camera).color[0].clamp(0, 1)) for k, camera in enumerate(poses)]
    held = views[::config.hold_every]
    train = [dataclasses.replace(view, place=place) for place, view in enumerate(view for k, view in enumerate(views) if k % config.hold_every)]
    extent, rows = extent_of([view.camera for view in train]), torch.randperm(len(teacher), generator=g)[:start]
    points = teacher.means[rows] + 0.01 * extent * torch.randn(len(rows), 3, generator=g)
    rgb = (0.5 + SH_CONSTANT * teacher.sh[rows, 0]).clamp(0, 1)
    return Case(config, from_points(points, rgb, config.sh_degree, *KINDS[config.densification].first(config)).to(device), extent, train, held)


def made(name: str, args) -> Case:
    config = schedule(args)
    if name in PHOTOS:
        return photo_case(name, config)
    return teacher_case(config, 1000, 8, 100, 48, 32) if args.dry else teacher_case(config, 1_000_000, 60, 100_000, 1024, 680)


@torch.no_grad()
def held_out_psnr(trainer, held: list[View]) -> float:
    return float(torch.stack([psnr(trainer.picture(view.camera).clamp(0, 1), view.photo, view.mask) for view in held]).mean())


def now(device: str) -> float:
    """Seconds, when all that was asked of the device is done."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def photos_in_order(case: Case) -> list[int]:
    """Of each step: every photo once in each round."""
    g, steps, count = torch.Generator().manual_seed(case.config.seed), case.config.steps, len(case.train)
    return [i for _ in range(-(-steps // count)) for i in torch.randperm(count, generator=g).tolist()][:steps]


def trained(new: Callable, case: Case, name: str, evaluations: int) -> dict:
    """One run: {curve: [seconds, step, held-out PSNR], psnr, seconds, gaussians, peak MB above photos and first Gaussians}."""
    device, every = case.config.device, max(1, case.config.steps // evaluations)
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if device == "cuda" else 0
    trainer, seconds = new(case), 0.0
    curve = [(0.0, 0, held_out_psnr(trainer, case.held))]
    start = now(device)
    for step, i in enumerate(photos_in_order(case), 1):
        trainer.step(step, case.train[i])
        if step % every == 0 or step == case.config.steps:
            seconds += now(device) - start
            curve.append((round(seconds, 4), step, held_out_psnr(trainer, case.held)))
            print(f"  {name}: step {step:,}, {seconds:.2f} s, {curve[-1][2]:.2f} dB, {trainer.gaussians:,} Gaussians", flush=True)
            start = now(device)
    peak = torch.cuda.max_memory_allocated() - before if device == "cuda" else 0
    return {"curve": curve, "psnr": curve[-1][2], "seconds": seconds, "gaussians": trainer.gaussians, "peak MB": peak / 2**20}


def seconds_to(curve: list[tuple[float, int, float]], target: float) -> float | None:
    """When the best PSNR so far reaches the target, linear in between; None where it never does."""
    at, best = 0.0, -math.inf
    for seconds, _, value in curve:
        if value >= target:
            return seconds if best == -math.inf else at + (target - best) / (value - best) * (seconds - at)
        at, best = seconds, max(best, value)
    return None


def compared(runs: dict[str, dict]) -> dict:
    """Seconds of both to the lower of their final PSNRs, and the ratio of ours to theirs."""
    if len(runs) < 2:
        return {}
    target = min(run["psnr"] for run in runs.values())
    ours, theirs = (seconds_to(runs[name]["curve"], target) for name in ("ours", "gsplat"))
    return {"target PSNR": target, "ours s": ours, "gsplat s": theirs, "ratio": ours / theirs if ours is not None and theirs else None}


def attempt(what: str, errors: list[str], do: Callable):
    """do(), or None and its error noted: one run that fails must not cost the others."""
    try:
        return do()
    except (SplatkitError, RuntimeError, ValueError, TypeError, AssertionError, OSError, KeyError, AttributeError, IndexError) as why:
        traceback.print_exc()
        errors.append(f"{what}: {type(why).__name__}: {str(why).splitlines()[0] if str(why) else ''}")
        print(f"-- {errors[-1]}", flush=True)
        return None


def line(name: str, runs: dict[str, dict], found: dict) -> str:
    finals = ", ".join(f"{who} {run['psnr']:.2f} dB in {run['seconds']:.2f} s ({run['gaussians']:,} Gaussians, {run['peak MB']:.0f} MB)" for who, run in runs.items())
    ratio = found.get("ratio")
    return f"{name}: {finals}" + (f"; to {found['target PSNR']:.2f} dB: ours {found['ours s']:.2f} s, gsplat {found['gsplat s']:.2f} s, ratio {ratio:.3f}" if ratio is not None else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=[*PHOTOS, "teacher"], default=[*PHOTOS, "teacher"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, help="the length of the schedule (default: 3000; with --dry: 24)")
    parser.add_argument("--preset", choices=["mcmc", "adc"], default="mcmc", help="how the number of Gaussians grows, on both sides")
    parser.add_argument("--cap", type=int, help="most Gaussians, of MCMC on both sides (default: 300,000)")
    parser.add_argument("--every", type=int, help="steps between two rounds of growth (default: 100)")
    parser.add_argument("--budget", type=float, default=200, help="seconds in all: no pair of runs is begun that would, by the last of its case, end later")
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("SPLATKIT_DATA", ROOT.parent / "shared" / "data")))
    parser.add_argument("--out", type=Path, help="the JSON file (default: benchmarks/gpu_<card>.json; with --dry: none)")
    parser.add_argument("--commit", help="what to write down as the commit where there is no git")
    parser.add_argument("--dry", action="store_true")
    args = parser.parse_args()
    begun = time.monotonic()
    args.steps, args.cap, args.every = args.steps or (24 if args.dry else 3000), args.cap or (150 if args.dry else 300_000), args.every or (6 if args.dry else 100)
    if args.dry:
        torch.set_num_threads(1)        # so little work is done sooner than threads on busy cores have met
    elif (why := native.available()["cuda"]):
        sys.exit(f"gpu_train.py: {why}")
    rasterization = peer(args.dry)
    origin = provenance(args.dry, args.commit, rasterization is not None)
    out = args.out or (None if args.dry else file_of(origin))
    trainers = {"ours": Ours} | ({"gsplat": lambda case: Theirs(case, rasterization)} if rasterization else {})
    cases: dict[str, Case | None] = {}
    took: dict[str, float] = {}
    result: dict = {"steps": args.steps, "preset": args.preset, "cap": args.cap, "every": args.every, "cases": {}, "errors": []}
    for seed in args.seeds:
        for name in args.cases:
            if time.monotonic() - begun + took.get(name, 0) > args.budget:
                print(f"-- {name}, seed {seed}: not begun, the budget does not reach", flush=True)
                continue
            if name not in cases:
                cases[name] = attempt(name, result["errors"], lambda: made(name, args))
                if case := cases[name]:
                    print(f"{name}: {len(case.train)} photos to train on, {len(case.held)} held out, {case.train[0].camera.width} x {case.train[0].camera.height}, "
                          f"{len(case.first):,} first Gaussians, extent {case.extent:.3g}, {time.monotonic() - begun:.0f} s gone", flush=True)
                    for who, new in trainers.items():
                        attempt(f"{name}, {who}, warming up", result["errors"], lambda: trained(new, case.warming_up(), f"{name}, {who}, warming up", 1))
            if not cases[name]:
                continue
            case = dataclasses.replace(cases[name], config=dataclasses.replace(cases[name].config, seed=seed))
            since = time.monotonic()
            runs = {who: run for who, new in trainers.items() if (run := attempt(f"{name}, {who}, seed {seed}", result["errors"],
                                                                                 lambda: trained(new, case, f"{name}, {who}, seed {seed}", 4 if args.dry else 20)))}
            found, took[name] = compared(runs), time.monotonic() - since
            result["cases"].setdefault(name, {})[str(seed)] = runs | {"compared": found}
            print(line(f"{name}, seed {seed}", runs, found), flush=True)
            if out:
                _write(out, result, origin, begun)
    for name, seeds in result["cases"].items():
        rows = [row["compared"] for row in seeds.values() if row["compared"].get("ratio") is not None]
        if rows:
            mean = lambda key: statistics.mean(row[key] for row in rows)
            finals = ", ".join(f"{who} {statistics.mean(row[who]['psnr'] for row in seeds.values() if who in row):.2f} dB" for who in trainers)
            print(f"{name}: ours {mean('ours s'):.2f} s, gsplat {mean('gsplat s'):.2f} s, ratio {mean('ratio'):.3f} "
                  f"({min(row['ratio'] for row in rows):.3f} to {max(row['ratio'] for row in rows):.3f} over {len(rows)} seeds), final {finals}", flush=True)
    if out:
        _write(out, result, origin, begun)
    if result["errors"]:
        sys.exit("gpu_train.py: " + "; ".join(result["errors"]))


def _write(out: Path, result: dict, origin: dict, begun: float) -> None:
    """Lays this run's part over those that the file holds."""
    parts = json.loads(out.read_text()) if out.exists() else {}
    parts["training"] = {"result": result, "seconds": round(time.monotonic() - begun, 1), **origin}
    out.write_text(json.dumps(parts, indent=1) + "\n")


if __name__ == "__main__":
    main()
