"""MVSplat (Chen et al. 2024): pictures with cameras to Gaussians in one forward pass."""
from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..scene import Scene
from .adapter import camera_depth, to_scenes
from .backbone import Backbone
from .config import MVSplatConfig
from .predictor import DepthPredictor
from .rays import at_quarter

MULTIPLE = 16       # of which height and width must be one
SIDE_MIN = 32


@dataclass(frozen=True)
class Lifted:
    """What the network finds for B samples of V views; differentiable."""

    depth: Float[Tensor, "B V H W"]             # camera z in the centres of the pixels
    coarse_depth: Float[Tensor, "B V h w"]      # the same at a quarter of the resolution, from the planes alone
    confidence: Float[Tensor, "B V H W"]        # highest probability of a plane
    scenes: tuple[Scene, ...]                   # B; row = (view * H + y) * W + x, in the world of the poses


class MVSplat(nn.Module):
    """The network. Parameters have the published names, so that a published checkpoint is its state without the prefix "encoder."."""

    def __init__(self, config: MVSplatConfig = MVSplatConfig()):
        super().__init__()
        self.config = config
        self.backbone = Backbone(config)
        self.depth_predictor = DepthPredictor(config)

    def forward(self, images: Float[Tensor, "B V 3 H W"], K: Float[Tensor, "B V 3 3"], world_to_cam: Float[Tensor, "B V 4 4"], near: Float[Tensor, "B V"],
                far: Float[Tensor, "B V"], *, official: bool = False) -> Lifted:
        """Depth and Gaussians of V >= 2 views in 0 to 1, of any intrinsics (pixels, half-pixel centres); near and far are camera z per view.

        `official` computes what the published code does where that is wrong: the K of one view for both of a pair, attention misplaced
        between three and more views, colours that depend on the choice of the world. Without it all three are right, and two views of the same
        K differ by the rotation of the colours alone. What lies between near and far is found, nothing else.

        Raises ValueError on shapes, sizes that are no multiple of 16 or below 32, devices that differ, and near and far out of order.
        """
        _check(images, K, world_to_cam, near, far)
        local, features = self.backbone(images, official)
        found = self.depth_predictor(images, local, features, K, world_to_cam, near, far, official)
        return Lifted(camera_depth(found.inverse_depth, K, self.config.unit_rays), camera_depth(found.coarse_inverse_depth, at_quarter(K), self.config.unit_rays),
                      found.confidence, to_scenes(found, K, world_to_cam, self.config, official))


def with_near_1(world_to_cam: Float[Tensor, "*B 4 4"], near: float, origin: Float[Tensor, " 3"] | None = None) -> Float[Tensor, "*B 4 4"]:
    """The poses, in float32, in the world that the network is trained in: `origin` is 0 there and the camera depth `near` is 1; far is far / near.

    The network's correction of a depth is in absolute units, so that in a world of another scale it is of another size. What comes out goes
    back by Scene.transformed(near, identity, origin), its depths by * near.
    """
    poses = world_to_cam.double().clone()       # small numbers in float32, whatever the world's origin is
    moved = poses[..., :3, 3] if origin is None else poses[..., :3, 3] + poses[..., :3, :3] @ origin.to(poses)
    poses[..., :3, 3] = moved / near
    return poses.float()


def _check(images: Tensor, K: Tensor, world_to_cam: Tensor, near: Tensor, far: Tensor) -> None:
    if images.ndim != 5 or images.shape[2] != 3 or not images.is_floating_point():
        raise ValueError(f"images are {images.dtype} {tuple(images.shape)}; expected floating point [B, V, 3, H, W] in 0 to 1")
    b, v, _, h, w = images.shape
    if b < 1 or v < 2:
        raise ValueError(f"{b} samples of {v} views; expected 1 or more samples of 2 or more views")
    if h % MULTIPLE or w % MULTIPLE or min(h, w) < SIDE_MIN:
        raise ValueError(f"pictures of {w} x {h} pixels; expected multiples of {MULTIPLE}, {SIDE_MIN} or more: pad them")
    for name, x, shape in (("K", K, (b, v, 3, 3)), ("world_to_cam", world_to_cam, (b, v, 4, 4)), ("near", near, (b, v)), ("far", far, (b, v))):
        if x.shape != shape:
            raise ValueError(f"{name} has shape {tuple(x.shape)}; expected {list(shape)}")
        if x.device != images.device:
            raise ValueError(f"{name} is on {x.device} but the images are on {images.device}; move one with .to(...)")
    if images.is_cuda:      # a look at the values would wait for the card
        return
    if not bool(((near > 0) & (near < far) & torch.isfinite(far)).all()):
        raise ValueError(f"near {near.tolist()}, far {far.tolist()}; expected 0 < near < far")
    if not (bool(torch.isfinite(world_to_cam).all()) and bool(torch.isfinite(K).all()) and bool((K[..., [0, 1], [0, 1]] > 0).all())):
        raise ValueError("a pose or K holds a NaN or an infinity, or a focal length that is not above 0")
    if bool((K[..., 0, 1] != 0).any()) or bool((K[..., 1, 0] != 0).any()):
        raise ValueError("a K has skew; only K without skew is supported")
