"""A scene on a page of `splatkit view` in a browser, and the pictures that it should show."""
from __future__ import annotations

import math

import numpy as np
import torch
from PIL import Image

from splatkit import Scene, render
from splatkit.camera import Cameras, look_at
from splatkit.capture import Photo, SceneHeader
from splatkit.raster import RasterSettings
from splatkit.serve import Viewer
from splatkit.shown import Shown, View

WIDTH, HEIGHT = 320, 240
K = torch.tensor([[280.0, 0, 163], [0, 270, 118], [0, 0, 1]])
BACKGROUND = [0.1, 0.2, 0.3]


def sphere(n: int, sh_degree: int = 3, channels: int | None = None) -> Scene:
    """A rough sphere of coloured Gaussians; with features, its left half differs from its right."""
    g = torch.Generator().manual_seed(1)
    r = lambda *shape: torch.randn(*shape, generator=g)
    means = torch.nn.functional.normalize(r(n, 3), dim=1) * (1 + 0.15 * r(n, 1))
    sh = torch.cat([r(n, 1, 3) * 0.7, r(n, (sh_degree + 1) ** 2 - 1, 3) * 0.12], dim=1)
    features = None if channels is None else torch.cat([means[:, :1].sign() * 2, r(n, channels - 1) * 0.1], dim=1)
    return Scene(means, r(n, 4), r(n, 3) * 0.5 - 3.4, r(n) * 2 + 1, sh, features)


def camera(position=(0.5, -1.0, -3.2)) -> Cameras:
    return Cameras(look_at(torch.tensor(position), torch.zeros(3), torch.tensor([0.0, -1, 0]))[None], K[None], WIDTH, HEIGHT)


def view_of(cameras: Cameras) -> str:
    """A View of the page."""
    return (f"{{worldToCam: Float32Array.from({cameras.world_to_cam[0].flatten().tolist()}), K: Float32Array.from({cameras.K[0].flatten().tolist()}), "
            f"width: {cameras.width}, height: {cameras.height}}}")


def photos_of(scene: Scene, folder, n: int = 3) -> list[View]:
    """Photos that are renders of the scene, as a capture has them."""
    views = []
    for i in range(n):
        cam = camera((3.2 * math.sin(i), -0.6, -3.2 * math.cos(i)))
        picture = (render(scene.replace(features=None), cam).color[0].clamp(0, 1) * 255).round().byte().numpy()
        file = folder / f"photo{i}.png"
        Image.fromarray(picture).save(file)
        views.append(View.of(Photo(file.name, file, K.numpy(), WIDTH, HEIGHT, cam.world_to_cam[0].numpy()), WIDTH, HEIGHT))
    return views


def complete(scene: Scene) -> str:
    """Whether a page has all of it, as an expression: every plane that it watches, as the server has it."""
    return f"window.splatkit?.scene?.count === {len(scene)} && window.splatkit.complete()"


class Shows:
    """A server and a page on it that has the whole scene."""

    def __init__(self, browser, scene: Scene, header: SceneHeader | None = None, views=(), **options):
        self.said: list[str] = []
        self.viewer = Viewer([Shown.of(scene, "sphere", header or SceneHeader(), tuple(views))], say=self.said.append).start()
        self.page = browser.open(self.viewer.url, **options)
        self.page.wait(complete(scene))
        self.page.run("await app.stage.settled()")

    def __enter__(self):
        return self.page

    def __exit__(self, *error):
        errors = self.page.errors()
        self.page.close()
        self.viewer.close(0)
        if not error[0]:
            assert errors == [] and self.said == []


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return -10 * math.log10(max(float(((a - b) ** 2).mean()), 1e-12))


def drawn(tab, backend: str, cameras: Cameras, look: str = "colour") -> np.ndarray:
    return tab.pixels(f"app.stage.setBackend('{backend}'); app.setBackground({BACKGROUND}); app.fixedView = {view_of(cameras)}; await app.setLook('{look}'); return app.stage.pixels()")


def reference(scene: Scene, cameras: Cameras, settings: RasterSettings | None = None) -> np.ndarray:
    return render(scene.replace(features=None), cameras, background=torch.tensor(BACKGROUND), settings=settings or RasterSettings()).color[0].clamp(0, 1).numpy()
