"""The workloads and the clock of gpu_check.py: splatkit's CUDA half against gsplat in one run, interleaved, medians of several rounds.

gsplat gets what is best for it: activated values as leaves, packed both ways, our loss in the training step, torch's fused Adam.
"""
import functools
import platform
import statistics
import subprocess
import time
from pathlib import Path

import numpy as np
import torch

from splatkit.camera import Cameras, look_at
from splatkit.density import SH_CONSTANT, neighbour_distance
from splatkit.metrics import l1_ssim, l1_ssim_and_gradient
from splatkit.optim import Adam, default_learning_rates
from splatkit.raster import record, render, splat_gradients
from splatkit.scene import Scene

GROUPS = ("means", "quats", "log_scales", "logit_opacities", "sh")
ROOT = Path(__file__).resolve().parent.parent


def said(*command: str) -> str:
    """What a command of the project's folder prints; '' where there is none."""
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()


def provenance(dry: bool, commit: str | None, peer: bool) -> dict:
    """What a figure was measured on: card, driver, commit (`commit` where there is no git), versions."""
    return {"card": "none (dry)" if dry else torch.cuda.get_device_name(), "driver": "" if dry else said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
            "commit": commit or said("git", "rev-parse", "--short", "HEAD"), "torch": torch.__version__, "python": platform.python_version(),
            "gsplat": __import__("gsplat").__version__ if peer else None}


def file_of(origin: dict) -> Path:
    """Where the figures of its card are kept."""
    return ROOT / "benchmarks" / f"gpu_{origin['card'].lower().replace(' ', '_')}.json"


@functools.cache
def garden(data: Path) -> tuple:
    """Points, their colours, and the mean distance of each to its three neighbours; poses and intrinsics of three photos, and their size. Where the file
    is absent, a cloud of 20,000 in front of three cameras: enough for a dry run, not for figures."""
    file = data / "garden-points" / "test_garden.npz"
    if file.exists():
        z = np.load(file)
        points, rgb = torch.from_numpy(z["means3d"]), torch.from_numpy(z["colors"]) / 255
        cameras = (torch.from_numpy(z["viewmats"]).float(), torch.from_numpy(z["Ks"]).float(), int(z["width"]), int(z["height"]))
    else:
        g = torch.Generator().manual_seed(0)
        points, rgb = torch.randn(20_000, 3, generator=g), torch.rand(20_000, 3, generator=g)
        poses = torch.stack([look_at(torch.tensor([x, 0.5, -4.0]), torch.zeros(3), torch.tensor([0.0, -1.0, 0.0])) for x in (-1.0, 0.0, 1.0)])
        cameras = (poses, torch.tensor([[500.0, 0, 324], [0, 500, 210], [0, 0, 1]]).repeat(3, 1, 1), 648, 420)
    return points, rgb, neighbour_distance(points).clamp_min(1e-6), cameras


def dense(data: Path, n: int, width: int, height: int) -> tuple[Scene, list[Cameras]]:
    """The 138,766 points of a garden, repeated with jitter to n Gaussians: sizes of the local density x lognormal(0.5), opacity U(0.01, 0.99), SH 3."""
    (points, rgb, spacing, (poses, Ks, w, h)), g = garden(data), torch.Generator().manual_seed(0)
    row = torch.arange(n) % len(points)
    shrink = (len(points) / n) ** (1 / 3) if n > len(points) else 1.0
    means = points[row] + (spacing[row, None] * torch.randn(n, 3, generator=g) * (0.5 if n > len(points) else 0))
    log_scales = (spacing[row] * shrink).log()[:, None] + 0.5 * torch.randn(n, 3, generator=g)
    sh = torch.cat([((rgb - 0.5) / SH_CONSTANT)[:, None], 0.05 * torch.randn(len(points), 15, 3, generator=g)], dim=1)[row]
    scene = Scene(means, torch.randn(n, 4, generator=g), log_scales, torch.logit(0.01 + 0.98 * torch.rand(n, generator=g)), sh)
    views = [Cameras(poses[i:i + 1].clone(), Ks[i:i + 1].clone(), w, h).resized(width, height) for i in range(3)]
    return scene, views


def pixel_pair(channels: int, side: int = 256, n: int | None = None) -> tuple[Scene, Cameras]:
    """Two pixel-aligned Gaussians a pixel with `channels` features, as feed-forward lifting makes them."""
    g, n = torch.Generator().manual_seed(0), n or 2 * side * side
    z = 2 + torch.rand(n, generator=g)
    focal = 0.98 * side
    xy = (torch.rand(n, 2, generator=g) - 0.5) * side / focal * z[:, None]
    scene = Scene(torch.cat([xy, z[:, None]], 1), torch.randn(n, 4, generator=g), torch.log(z / focal)[:, None] + 0.3 * torch.randn(n, 3, generator=g),
                  torch.randn(n, generator=g), torch.randn(n, 1, 3, generator=g), torch.randn(n, channels, generator=g) if channels else None)
    return scene, Cameras(torch.eye(4)[None], torch.tensor([[[focal, 0, side / 2], [0, focal, side / 2], [0, 0, 1]]]), side, side)


def clock(tasks: dict, rounds: int, repeats: int, device: str) -> dict:
    """Milliseconds of each task: {name: {ms, spread}}; median and half range over interleaved rounds of `repeats` calls, after two for warming up."""
    measured = {name: [] for name in tasks}
    for k in range(rounds + 1):
        for name, task in tasks.items():
            count = repeats if k else 3
            if device == "cuda":
                from_, to = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                from_.record()
                for _ in range(count):
                    task()
                to.record()
                to.synchronize()
                spent = from_.elapsed_time(to)
            else:
                start = time.perf_counter()
                for _ in range(count):
                    task()
                spent = (time.perf_counter() - start) * 1e3
            if k:
                measured[name].append(spent / count)
    return {name: {"ms": statistics.median(x), "spread": (max(x) - min(x)) / 2 / statistics.median(x)} for name, x in measured.items()}


def peak_bytes(task, device: str) -> int:
    """Most memory that torch held during a call, above what it held before."""
    if device != "cuda":
        return 0
    task()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    task()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


class Ours:
    """splatkit's public functions on a scene."""

    def __init__(self, scene: Scene, views: list[Cameras], device: str, targets: list[torch.Tensor]):
        self.scene, self.views, self.targets, self.turn = scene.to(device), [v.to(device) for v in views], targets, 0
        self.leaves = self.scene.clone().requires_grad_()
        self.adam = Adam(self.scene, default_learning_rates(1.0, self.scene.sh.shape[1]))

    def view(self) -> int:
        self.turn = (self.turn + 1) % len(self.views)
        return self.turn

    @torch.no_grad()
    def forward(self):
        render(self.scene, self.views[self.view()])

    def backward_of(self, v: torch.Tensor):
        """A function that runs the backward of one picture again and again."""
        out, leaves = render(self.leaves, self.views[0]), list(self.leaves.fields().values())
        return lambda: torch.autograd.grad(out.color, leaves, v, retain_graph=True)

    def step(self, sparse: bool = False):
        i = self.view()
        picture = record(self.scene, self.views[i])
        _, v_color = l1_ssim_and_gradient(picture.color, self.targets[i])
        self.adam.step_recorded(self.scene, picture, splat_gradients(picture, v_color), sparse)

    def step_by_autograd(self):
        i = self.view()
        color = render(self.leaves, self.views[i]).color.squeeze(0)
        grads = torch.autograd.grad(l1_ssim(color, self.targets[i]), list(self.leaves.fields().values()))
        self.adam.step(self.leaves.detach(), dict(zip(GROUPS, grads)))


class Theirs:
    """gsplat.rasterization on the same scene."""

    def __init__(self, scene: Scene, views: list[Cameras], device: str, targets: list[torch.Tensor], packed: bool, selective: bool = False):
        from gsplat import rasterization
        scene = scene.to(device)
        self.views, self.targets, self.turn, self.selective = [v.to(device) for v in views], targets, 0, selective
        self.draw = functools.partial(rasterization, packed=packed, sh_degree=3, near_plane=0.01)
        self.raw = [x.clone().requires_grad_() for x in (scene.means, scene.quats, scene.log_scales, scene.logit_opacities, scene.sh)]
        self.active = [x.detach().clone().requires_grad_() for x in self.activated()]
        groups = [{"params": [p], "lr": 1e-3} for p in self.raw]
        if selective:
            from gsplat.optimizers import SelectiveAdam
            self.adam = SelectiveAdam(groups, eps=1e-15, betas=(0.9, 0.999))
        else:
            self.adam = torch.optim.Adam(groups, eps=1e-15, fused=True)

    view = Ours.view

    def activated(self):
        means, quats, log_scales, logits, sh = self.raw
        return [means, quats, log_scales.exp(), logits.sigmoid(), sh]

    def picture(self, values, i):
        return self.draw(*values, self.views[i].world_to_cam, self.views[i].K, self.views[i].width, self.views[i].height)

    @torch.no_grad()
    def forward(self):
        self.picture(self.active, self.view())

    def backward_of(self, v: torch.Tensor):
        color = self.picture(self.active, 0)[0]
        return lambda: torch.autograd.grad(color, self.active, v, retain_graph=True)

    def step(self):
        i = self.view()
        color, _, meta = self.picture(self.activated(), i)
        l1_ssim(color.squeeze(0), self.targets[i]).backward()
        if self.selective:
            self.adam.step((meta["radii"] > 0).all(-1).any(0))
        else:
            self.adam.step()
        self.adam.zero_grad(set_to_none=True)
