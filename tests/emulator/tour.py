"""What the emulated kernels are shown at work on. Each subject computes the same in either dtype: float32 is the emulator's, float64 the
double library's.

As a program, `python tour.py LIBRARY` walks through all of them: what AddressSanitizer watches, which no running Python can load.
"""
import dataclasses
import functools
import sys
from pathlib import Path

import torch
from backends import OUTPUTS, SMOOTH, random_scene, ring

from splatkit import density, metrics, native, optim, raster
from splatkit.raster.types import RasterSettings, RasterStats
from splatkit.scene import Scene

F32, F64 = torch.float32, torch.float64
DEFAULT, FIXED = RasterSettings(), RasterSettings(deterministic=True)
real_library = native.cpu_library


def emulate(path: Path) -> native.Library:
    """From here on the library at `path` works on float32."""
    library = native.Library(path, F32)
    native.cpu_library = lambda dtype, isa=None: library if dtype is F32 else real_library(dtype, isa)
    return library


def drawn(scene, cameras, settings=DEFAULT, outputs=OUTPUTS, stats=True, dtype=F32) -> dict:
    """Outputs by name, the gradient of a weighted sum of them by every input, and the stats."""
    scene, cameras = scene.to(dtype=dtype), cameras.to(dtype=dtype)
    leaves = {name: x.detach().clone().requires_grad_() for name, x in scene.fields().items()}
    pose, K = cameras.world_to_cam.clone().requires_grad_(), cameras.K.clone().requires_grad_()
    background = torch.full((len(cameras), 3), 0.3, dtype=dtype, requires_grad=True)
    sums = RasterStats.zeros(len(scene), dtype=dtype) if stats else None
    out = raster.render(Scene(**leaves), cameras.replace(world_to_cam=pose, K=K), outputs=outputs, background=background, settings=settings,
                        stats=sums, backend="cpu")
    g, named = torch.Generator().manual_seed(7), {k: v for k, v in vars(out).items() if v is not None}
    sum((x * torch.randn(x.shape, generator=g).to(x)).sum() for x in named.values() if x.requires_grad).backward()
    gradients = {**{name: x.grad for name, x in leaves.items()}, "world_to_cam": pose.grad, "K": K.grad, "background": background.grad}
    return ({name: x.detach() for name, x in named.items()} | {f"gradient of {name}": x for name, x in gradients.items() if x is not None}
            | {f"stats.{f.name}": getattr(sums, f.name) for f in dataclasses.fields(RasterStats) if sums})


@functools.cache
def settled(make, cameras, settings) -> Scene:
    """make(seed) of the first seed with which no pixel is so near to a cut-off that rounding to float32 may carry it across."""
    for seed in range(50):
        scene, seen = make(seed), []
        for step in (-1, 1):
            moved = dataclasses.replace(settings, alpha_min=settings.alpha_min * (1 + 4e-6 * step),
                                        transmittance_min=settings.transmittance_min * (1 + 1e-5 * step))
            out = raster.render(scene, cameras, outputs=("median_depth",), settings=moved, backend="cpu")
            seen.append((out.alpha, out.visible))
        if all(torch.equal(a, b) for a, b in zip(*seen)):
            return scene
    raise AssertionError("no seed without a pixel on the edge of a cut-off")


def picture(make, cameras, settings=DEFAULT, outputs=OUTPUTS, stats=False):
    return lambda dtype: drawn(settled(make, cameras, settings), cameras, settings, outputs, stats, dtype)


def grown(by: float, **how):
    def make(seed):
        scene = random_scene(seed=seed, **how)
        return scene.replace(log_scales=(scene.log_scales + by).float().double(),
                             logit_opacities=scene.logit_opacities - (2 if by else 0))      # some light reaches the background
    return make


def random(*shape, seed=0, dtype=F32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def loss(masked: bool):
    def run(dtype):
        image, target = (random(45, 37, 3, seed=seed, dtype=dtype).sigmoid() for seed in (1, 2))
        image.requires_grad_()
        value = metrics.l1_ssim(image, target, 0.2, random(45, 37, seed=3) > -1 if masked else None)
        value.backward()
        return {"loss": value.detach(), "gradient": image.grad}
    return run


def adam(columns: int, steps, visible: bool, decay=None):
    def run(dtype):
        n = 300
        x = {name: random(n, columns, seed=i, dtype=dtype) for i, name in enumerate(("param", "grad", "m", "v"))}
        x["v"].square_()
        rates = torch.linspace(0.5, 1.5, columns).to(dtype)     # large: the step must not drown in the parameter
        seen = random(n, seed=5) > 0 if visible else None
        t = torch.arange(1, n + 1) if steps == "by row" else steps
        optim.adam_(x["param"], x["grad"], x["m"], x["v"], rates, (0.9, 0.999), 1e-15, t, seen, decay)
        del x["grad"]
        return x
    return run


def projection_and_adam(degree: int, steps, sparse: bool):
    def run(dtype):
        scene = settled(small(degree=degree), ONE, DEFAULT).to(dtype=dtype)
        scene = scene.rows(torch.arange(len(scene)).repeat(4)).clone()     # several blocks
        seen = raster.record(scene, ONE.to(dtype=dtype), torch.full((3,), 0.3, dtype=dtype))
        v_splats = raster.splat_gradients(seen, random(ONE.height, ONE.width, 3, seed=6, dtype=dtype))
        before, rates = scene.clone(), {group: 0.5 for group in scene.fields()}
        decay = optim.AttributeDecay(opacity=500, scale=5, ceiling=0.5, opacity_steps=(0, 9), scale_steps=(0, 9))
        optimizer = optim.Adam(scene, rates, attribute_decay=decay)
        for i, group in enumerate(optimizer.m):      # large v: a step is no sign of a gradient near 0
            optimizer.m[group].copy_(random(*optimizer.m[group].shape, seed=i, dtype=dtype))
            optimizer.v[group].fill_(1)
        if steps == "by row":
            optimizer.row_steps += torch.arange(len(scene)) % 5
            optimizer._even = None
        optimizer.step_recorded(scene, seen, v_splats, sparse, pulls={"logit_opacities": 0.3, "log_scales": 0.2})
        moved = {name: x - before.fields()[name] for name, x in scene.fields().items()}
        return moved | {f"{kind}.{group}": x for kind in "mv" for group, x in getattr(optimizer, kind).items()}
    return run


def noise(dtype):
    scene, means = random_scene(300, degree=0, dtype=dtype), torch.zeros(300, 3, dtype=dtype)
    lib = native.cpu_library(dtype)
    lib.sk_mcmc_noise(300, means, scene.quats, scene.log_scales, scene.logit_opacities - 5, random(300, 3, dtype=dtype), 50.0, None)
    return {"noise": means}


def relocated(dtype):
    logits, scales = random(300, seed=1, dtype=dtype) * 2, random(300, 3, seed=2, dtype=dtype)
    return dict(zip(("logits", "log_scales"), density.relocated(logits, scales, torch.arange(300) % 30 + 1)))


def lifted(channels: int):
    def run(dtype):
        scene, cameras = settled(small(channels=1), TWO, DEFAULT), TWO.to(dtype=dtype)
        maps = random(2, TWO.height, TWO.width, channels, seed=4, dtype=dtype)
        return {"features": raster.uplift(scene.to(dtype=dtype).replace(features=None), ((cameras[c], maps[c]) for c in range(2)))}
    return run


def small(**how):
    return grown(0, n=60, **how)


ONE, TWO = ring(1, 45, 37), ring(2, 47, 35)
RANGES = ring(3, 33, 40).replace(rows=torch.tensor([[0, 60], [10, 40], [20, 20]]))
SUBJECTS = {
    **{f"colour of degree {degree}": picture(small(degree=degree), ONE, outputs=("color",)) for degree in range(4)},
    "every output": picture(small(channels=5), TWO),
    "every output and stats": picture(small(channels=5), TWO, stats=True),
    "deterministic colour": picture(small(degree=1), ONE, FIXED, outputs=("color",)),
    "deterministic, every output and stats": picture(small(channels=5), TWO, FIXED, stats=True),
    "depth alone": picture(small(), TWO, outputs=("expected_depth", "median_depth")),
    "alpha alone": picture(small(), TWO, outputs=()),
    **{f"{channels} channels": picture(small(degree=0, channels=channels), ONE, outputs=("features",)) for channels in (1, 4, 40, 64, 130)},
    "deterministic, 70 channels": picture(small(degree=0, channels=70), TWO, FIXED, outputs=("color", "features")),
    "antialiased": picture(small(degree=1, channels=3), TWO, RasterSettings(antialias=True), stats=True),
    "row ranges": picture(small(degree=1, channels=3), RANGES, stats=True),
    "whole-picture Gaussians": picture(grown(2.5, n=30, degree=1), ring(1, 100, 90), outputs=("color",)),
    "a picture of 34 rows of tiles": picture(grown(3, n=8, degree=0), ring(1, 17, 530), outputs=("color",)),
    "one pixel": picture(grown(2, n=5, channels=2), ring(1, 1, 1)),
    "without cut-offs": picture(grown(0, n=20, degree=1, channels=3), ring(1, 19, 17), dataclasses.replace(SMOOTH, fov_margin=0.3),
                                outputs=("color", "features")),
    "deterministic, without cut-offs": picture(grown(0, n=20, degree=1, channels=3), ring(1, 19, 17), dataclasses.replace(SMOOTH, fov_margin=0.3, deterministic=True),
                                               outputs=("color", "features")),
    "loss": loss(masked=False),
    "loss under a mask": loss(masked=True),
    "Adam": adam(48, 7, visible=False),
    "Adam of three columns, visible rows": adam(3, 7, visible=True),
    "Adam with steps by row": adam(4, "by row", visible=True),
    "Adam, opacity decays": adam(1, 7, False, ("opacity", 0.5, 1.0)),
    "Adam, scales decay": adam(3, "by row", False, ("scale", 0.05, 1.0)),
    **{f"projection's gradient and Adam, degree {degree}": projection_and_adam(degree, 1, sparse=False) for degree in range(4)},
    "projection's gradient and Adam, steps by row": projection_and_adam(3, "by row", sparse=True),
    "noise": noise,
    "relocation": relocated,
    "uplift of 5 channels": lifted(5),
    "uplift of 70 channels": lifted(70),
}


def distance(actual: dict, expected: dict) -> dict[str, float]:
    """Relative L2 by name, infinities apart, which must be the same."""
    out = {}
    for name, y in expected.items():
        x, y = actual[name].double(), y.double()
        assert x.shape == y.shape and torch.equal(x.isinf(), y.isinf()), name
        x, y = x.masked_fill(x.isinf(), 0), y.masked_fill(y.isinf(), 0)
        out[name] = ((x - y).norm() / y.norm().clamp(min=1e-30)).item()
    return out


def main() -> None:
    emulate(Path(sys.argv[1]))
    for name, subject in SUBJECTS.items():
        print(name, flush=True)
        subject(F32)


if __name__ == "__main__":
    main()
