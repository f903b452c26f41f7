"""The browser's rasterizer in node against the native library: CPU milliseconds of a 640 x 480 picture and PSNR. Needs node and viewer/node_modules.

    python scripts/bench_wasm.py [GAUSSIANS ...]        (default: 50000 200000 1000000)

One thread on both sides. Scene: a disc, a torus and a sphere of Gaussians of SH degree 3, about 29 of which reach a pixel at 50,000. A frame is projection,
SH, sort, binning, blending of colour and alpha, and the copy to JavaScript; the least of 25 is printed.
"""
import json
import math
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from splatkit.camera import Cameras, look_at
from splatkit.metrics import psnr
from splatkit.raster import RasterSettings, render
from splatkit.scene import Scene

VIEWER = Path(__file__).resolve().parent.parent / "viewer"
WIDTH, HEIGHT, ROUNDS = 640, 480, 25


def made_up(n: int) -> Scene:
    g = torch.Generator().manual_seed(0)
    u, normal, third = lambda *s: torch.rand(*s, generator=g), lambda *s: torch.randn(*s, generator=g), n // 3
    angle, r = 2 * math.pi * u(third), 1.6 * u(third).sqrt()
    disc = torch.stack([r * angle.cos(), torch.full_like(r, 0.8), r * angle.sin()], 1)
    p, t = 2 * math.pi * u(2, third)
    torus = torch.stack([(0.9 + 0.25 * t.cos()) * p.cos(), 0.25 * t.sin(), (0.9 + 0.25 * t.cos()) * p.sin()], 1)
    sphere = 0.5 * torch.nn.functional.normalize(normal(n - 2 * third, 3), dim=1)
    log_scales = (1.5 * u(n) - 4.98)[:, None] + 0.3 * normal(n, 3) + 0.5 * math.log(50_000 / n)
    sh = torch.cat([0.8 * normal(n, 1, 3), 0.15 * normal(n, 15, 3)], 1)
    return Scene(torch.cat([disc, torus, sphere]), normal(n, 4), log_scales, 2 * normal(n) + 0.5, sh)


def camera_of(width: int, height: int, degrees: float = 0.0) -> Cameras:
    """Of an orbit around it, 50 degrees wide."""
    a, (x, y, z) = math.radians(degrees), (1.8, -1.6, -2.4)
    position = torch.tensor([x * math.cos(a) + z * math.sin(a), y, z * math.cos(a) - x * math.sin(a)])
    focal = 0.5 * width / math.tan(math.radians(25))
    pose = look_at(position, torch.tensor([0.0, 0.2, 0.0]), torch.tensor([0.0, -1.0, 0.0]))
    return Cameras(pose[None], torch.tensor([[[focal, 0, width / 2], [0, focal, height / 2], [0, 0, 1]]]), width, height)


def in_node(script: Path, scene: Scene, camera: Cameras, folder: Path) -> tuple[torch.Tensor, float]:
    """The colour picture, and the least CPU seconds of a frame."""
    header = vars(RasterSettings()) | {"up": [0, -1, 0], "step": None, "name": ""}
    job = {"n": len(scene), "degree": 3, "header": header, "background": [0, 0, 0], "attribute": False, "channels": 0, "pixels": [], "repeat": ROUNDS,
           "camera": {"world_to_cam": camera.world_to_cam.flatten().tolist(), "K": camera.K.flatten().tolist(), "width": WIDTH, "height": HEIGHT}}
    (folder / "job.json").write_text(json.dumps([job]))
    (folder / "in.bin").write_bytes(b"".join(x.contiguous().numpy().tobytes() for x in scene.fields().values()))
    files = [VIEWER / "src" / "splat.wasm", *(folder / name for name in ("job.json", "in.bin", "out.bin"))]
    done = json.loads(subprocess.run(["node", script, *files], check=True, capture_output=True, text=True).stdout)[0]
    color = np.fromfile(folder / "out.bin", "<f4", 3 * WIDTH * HEIGHT)
    return torch.from_numpy(color).reshape(HEIGHT, WIDTH, 3), min(done["cpu"])


def main():
    torch.set_num_threads(1)
    camera = camera_of(WIDTH, HEIGHT)
    print("| Gaussians | wasm CPU ms | native CPU ms | dB to native float32 | dB to native double |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        bundle = [VIEWER / "node_modules" / ".bin" / "esbuild", VIEWER / "tests" / "raster.ts", "--bundle", "--platform=node", "--format=esm", "--log-level=error"]
        subprocess.run([*bundle, f"--outfile={folder / 'raster.mjs'}"], check=True)
        for n in map(int, sys.argv[1:] or ["50000", "200000", "1000000"]):
            scene, seconds = made_up(n), []
            for _ in range(8):
                before = time.process_time()
                single = render(scene, camera).color[0]
                seconds.append(time.process_time() - before)
            double = render(scene.to(dtype=torch.float64), camera.to(dtype=torch.float64)).color[0]
            color, wasm = in_node(folder / "raster.mjs", scene, camera, folder)
            print(f"| {n} | {1000 * wasm:.1f} | {1000 * min(seconds):.1f} | {psnr(color.double(), single.double()):.1f} | {psnr(color.double(), double):.1f} |", flush=True)


if __name__ == "__main__":
    main()
