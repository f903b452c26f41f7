"""Where the Gaussians come from that carry features: known depth, the frozen network of `splatkit lift`, or a scene fitted before."""
from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from ..camera import Cameras, unproject
from ..density import SH_CONSTANT
from ..errors import BadConfig, BadFile
from ..io.atomic import replacing
from ..lift.model import with_near_1
from ..raster import RasterSettings, render, uplift
from ..scene import Scene
from ..views import scene_of
from .config import GeometryConfig
from .samples import Sample
from .views import View

OPACITY = 0.99          # of a Gaussian at a known depth; the rasterizer's alpha_max
SCENES_KEPT = 4         # of `scene`, in memory


@dataclass(frozen=True)
class Carrier:
    """Gaussians that can carry the features of a sample's context photos."""

    scene: Scene                            # colours are those of the photos, where they have any
    pixels: Int[Tensor, " N"] | None        # the pixel that each Gaussian came from, (view H + row) W + column; None: it came from no single one
    settings: RasterSettings = RasterSettings()

    def carrying(self, maps: Sequence[Float[Tensor, "H W C"]], cameras: Sequence[Cameras], steps: int = 0) -> Scene:
        """The scene with features from one map for each context photo: of its own pixel, or the mean of the maps weighted by how much each pixel
        shows of it (uplift); then fitted to the maps in `steps` steps."""
        if self.pixels is not None:
            rows = torch.cat([m.flatten(0, 1) for m in maps])
            every = len(self.pixels) == len(rows) and bool((self.pixels[1:] > self.pixels[:-1]).all())       # then a copy of them all would say the same
            scene = self.scene.replace(features=rows if every else rows[self.pixels])
        else:
            scene = self.scene.replace(features=uplift(self.scene, zip(cameras, maps), self.settings))
        return fit_features(scene, maps, cameras, self.settings, steps) if steps else scene


Geometry = Callable[[Sample], Carrier]      # of the context photos of a sample


def geometry_of(config: GeometryConfig, device: str = "cpu") -> Geometry:
    """What `config` names. Raises BadConfig or BadFile for what it needs and lacks."""
    if config.source == "depth":
        return functools.partial(from_depth, sigma_px=config.sigma_px, permuted=config.permuted)
    if config.source == "scene":
        if config.runs is None:
            raise BadConfig("geometry.source scene needs geometry.runs, a folder with a run of `splatkit reconstruct` for each scene")
        return Fitted(config.runs, config.permuted, device)
    if config.weights is None:
        raise BadConfig("geometry.source lift needs geometry.weights, a file with weights of the network; depth works without where depth is known")
    return Lifting(config, device)


def from_depth(sample: Sample, sigma_px: float = 0.5, permuted: bool = False) -> Carrier:
    """One Gaussian for each context pixel whose depth is known; with `permuted` at the depth of another pair's photo. Raises BadConfig for photos without depth."""
    given = sample.contexts
    if permuted:
        if sample.elsewhere is None:
            raise ValueError("a sample without another pair has no wrong geometry")
        given = tuple(replace(view, depth=other.depth) for view, other in zip(given, sample.elsewhere.contexts))
    if lacking := [name for name, view in zip(sample.names, given) if view.depth is None]:
        raise BadConfig(f"{sample.scene}: photo {lacking[0]} has no depth; take geometry.source lift or scene")
    parts = [at_depth(view, sigma_px) for view in given]
    offset, pixels = 0, []
    for view, (_, own) in zip(given, parts):
        pixels.append(own + offset)
        offset += view.camera.width * view.camera.height
    return Carrier(Scene.cat([scene for scene, _ in parts]), torch.cat(pixels))


def at_depth(view: View, sigma_px: float = 0.5) -> tuple[Scene, Int[Tensor, " N"]]:
    """A ball at each pixel of known depth, of `sigma_px` pixels where all around are known and wider where only some are; and those pixels, row H + column."""
    camera, depth = view.camera, view.depth
    known = depth > 0 if view.kept is None else (depth > 0) & view.kept
    pixels = known.flatten().nonzero().squeeze(1)
    z = depth.flatten()[pixels]
    x, y = pixels % camera.width + 0.5, torch.div(pixels, camera.width, rounding_mode="floor") + 0.5
    share = F.avg_pool2d(known[None, None].to(depth), 5, 1, 2, count_include_pad=False)[0, 0].flatten()[pixels]
    scale = sigma_px * z / (camera.K[0, 0, 0] * camera.K[0, 1, 1]).sqrt() / share.clamp(min=1 / 25).sqrt()
    colors = view.photo.flatten(1)[:, pixels].T
    n = len(pixels)
    quats = z.new_zeros(n, 4)
    quats[:, 0] = 1
    scene = Scene(unproject(camera, torch.stack([x, y], dim=1), z), quats, scale.log()[:, None].expand(n, 3).contiguous(), z.new_full((n,), math.log(OPACITY / (1 - OPACITY))),
                  ((colors - 0.5) / SH_CONSTANT)[:, None])
    return scene, pixels


class Fitted:
    """Scenes that were fitted before: RUNS/NAME, RUNS/NAME.ply, or RUNS itself for all."""

    def __init__(self, runs: Path, permuted: bool, device: str):
        self.runs, self.permuted = runs, permuted
        self.load = functools.lru_cache(SCENES_KEPT)(lambda path: self._load(path, device))

    @staticmethod
    def _load(path: Path, device: str) -> tuple[Scene, RasterSettings]:
        scene, header, _ = scene_of(path)
        return scene.replace(features=None).to(device), RasterSettings(**header.settings)

    def _of(self, sample: Sample) -> Carrier:
        names = [self.runs / sample.scene, self.runs / f"{sample.scene}.ply", self.runs]
        path = next((p for p in names if p.suffix == ".ply" and p.is_file() or (p / "scene.ply").is_file()), None)
        if path is None:
            raise BadFile(self.runs, sample.scene, "no run and no scene file of this scene there, nor is the folder itself a run")
        scene, settings = self.load(path)
        return Carrier(mirrored(scene) if sample.is_mirrored else scene, None, settings)

    def __call__(self, sample: Sample) -> Carrier:
        return _moved(self._of(sample.elsewhere), sample.elsewhere, sample) if self.permuted else self._of(sample)


class Lifting:
    """The frozen feed-forward network, and what it made of pairs before, on disk in half precision."""

    def __init__(self, config: GeometryConfig, device: str):
        self.config, self.device = config, device
        if not config.weights.is_file():
            raise BadFile(config.weights, "", "no such file; geometry.weights names the weights of `splatkit lift`")
        self.weights = hashlib.sha256(config.weights.read_bytes()).hexdigest()[:16]
        self.hits = self.misses = 0

    @functools.cached_property
    def model(self) -> torch.nn.Module:
        from ..lift.weights import load_weights
        return load_weights(self.config.weights)[0].to(self.device).eval().requires_grad_(False)

    def key(self, sample: Sample) -> str:
        """Names everything that the Gaussians depend on: weights, pixels and cameras as the data has them (not as they are mirrored), and the range of depth."""
        views = [v.mirrored() for v in sample.contexts] if sample.is_mirrored else sample.contexts
        said = hashlib.sha256(f"{self.weights} near 1 {sample.scene} {sample.names} {sample.depth_range}".encode())
        for view in views:
            for x in (view.photo, view.camera.K, view.camera.world_to_cam):
                said.update(x.float().cpu().contiguous().numpy().tobytes())
        return f"{sample.scene}-{said.hexdigest()[:32]}"

    @torch.no_grad()
    def _of(self, sample: Sample) -> Carrier:
        views = [v.mirrored() for v in sample.contexts] if sample.is_mirrored else sample.contexts
        path = self.config.cache and self.config.cache / f"{self.key(sample)}.safetensors"
        scene = path and _kept(path)
        self.hits, self.misses = self.hits + (scene is not None), self.misses + (scene is None)
        if scene is None:
            stacked = lambda xs: torch.stack(list(xs))[None].to(self.device)
            near, far = sample.depth_range or (1.0, 100.0)
            poses = torch.stack([v.camera.world_to_cam[0] for v in views]).double().cpu()
            origin = torch.linalg.inv(poses)[:, :3, 3].mean(0)
            depths = (torch.full((1, len(views)), x, device=self.device) for x in (1.0, far / near))
            scene = self.model(stacked(v.photo for v in views), stacked(v.camera.K[0] for v in views), with_near_1(poses, near, origin)[None].to(self.device), *depths).scenes[0]
            scene = scene.transformed(near, torch.eye(3), origin)
            if path:
                _keep(path, scene)
        scene = scene.to(sample.contexts[0].photo.device)
        width, height = views[0].camera.width, views[0].camera.height
        pixels = torch.arange(len(scene), device=scene.device)
        if sample.is_mirrored:
            scene, pixels = mirrored(scene), (pixels // width) * width + (width - 1 - pixels % width)
        if any(v.kept is not None for v in sample.contexts):
            kept = torch.cat([(torch.ones(height, width, dtype=torch.bool, device=scene.device) if v.kept is None else v.kept).flatten() for v in sample.contexts])[pixels]
            scene, pixels = scene.rows(kept), pixels[kept]
        return Carrier(scene, pixels)

    def __call__(self, sample: Sample) -> Carrier:
        return _moved(self._of(sample.elsewhere), sample.elsewhere, sample) if self.config.permuted else self._of(sample)


def _keep(path: Path, scene: Scene) -> None:
    from safetensors.torch import save

    path.parent.mkdir(parents=True, exist_ok=True)
    centre = scene.means.mean(0)        # half precision is finest near zero
    tensors = {name: x.half().cpu().contiguous() for name, x in scene.replace(means=scene.means - centre).fields().items()}
    with replacing(path) as file:
        file.write(save({**tensors, "centre": centre.cpu()}))


def _kept(path: Path) -> Scene | None:
    """What _keep() wrote; None where there is nothing, or nothing whole."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(path)
        centre = tensors.pop("centre")
        scene = Scene(**{name: x.float() for name, x in tensors.items()})
        scene.check_finite()
        return scene.replace(means=scene.means + centre)
    except (OSError, SafetensorError, KeyError, TypeError, ValueError):
        return None


def mirrored(scene: Scene) -> Scene:
    """The scene reflected at x = 0. Higher bands of colour are left out: what is carried are features, and only a picture for people would want them."""
    quats = torch.where((scene.quats == 0).all(1, keepdim=True), scene.quats.new_tensor([1, 0, 0, 0]), scene.quats)
    return scene.replace(means=scene.means * scene.means.new_tensor([-1, 1, 1]), quats=quats * quats.new_tensor([1, 1, -1, -1]), sh=scene.sh[:, :1].contiguous())


def _moved(carrier: Carrier, there: Sample, here: Sample) -> Carrier:
    """What stands before the first camera of one sample put before that of another."""
    move = torch.linalg.inv(here.contexts[0].camera.world_to_cam[0]) @ there.contexts[0].camera.world_to_cam[0]
    scene = carrier.scene.replace(sh=carrier.scene.sh[:, :1].contiguous()).transformed(1.0, move[:3, :3], move[:3, 3])
    return replace(carrier, scene=scene)


def fit_features(scene: Scene, maps: Sequence[Float[Tensor, "H W C"]], cameras: Sequence[Cameras], settings: RasterSettings, steps: int, lr: float = 0.05) -> Scene:
    """The scene with features moved by `steps` of Adam so that their pictures come nearer to the maps, a view after the other (as FiT3D fits them, Yue et al. 2024)."""
    with torch.enable_grad():
        features = scene.features.clone().requires_grad_()
        adam = torch.optim.Adam([features], lr=lr * float(scene.features.std().clamp(min=1e-6)))
        for step in range(steps):
            i = step % len(maps)
            out = render(scene.replace(features=features), cameras[i], outputs=("features",), settings=settings)
            difference = (out.features[0] - out.alpha[0, ..., None].detach() * maps[i]).abs().mean()
            adam.zero_grad(set_to_none=True)
            difference.backward()
            adam.step()
    return scene.replace(features=features.detach())
