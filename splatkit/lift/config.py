"""The sizes of the lifting network; the published ones are the defaults."""
from __future__ import annotations

from dataclasses import dataclass

from ..errors import BadConfig


@dataclass(frozen=True)
class MVSplatConfig:
    """What the shapes of the weights depend on, and two things that weights were trained with: `unit_rays` and `side`."""

    feature_dim: int = 128
    """Channels of the features at a quarter of the resolution."""
    cnn_widths: tuple[int, int, int] = (64, 96, 128)
    """Channels of the convolutional stages, at a half, a quarter and a quarter of the resolution."""
    blocks: int = 6
    """Of the transformer: self-attention, then attention to the other views and a feed-forward net."""
    ffn_factor: int = 4
    """Width of the feed-forward net over that of its input."""
    depth_candidates: int = 128
    """Planes of the sweep, equally far from each other in 1/depth."""
    cost_width: int = 128
    """Channels of the U-Net that refines the cost volume."""
    cost_heads: int = 4
    """Attention heads of that net."""
    refine_width: int = 32
    """Channels of the U-Net that refines depth at full resolution."""
    gaussian_width: int = 168
    """Channels between the two convolutions that end in the Gaussians' numbers."""
    sh_degree: int = 4
    """Degree that is predicted; bands above 3 are never drawn."""
    scale_range: tuple[float, float] = (0.5, 15.0)
    """Smallest and largest standard deviation, in tenths of a pixel's width along x and along y together."""
    unit_rays: bool = True
    """The depth that the heads predict is used as a distance along the ray, as the published weights were trained; else as camera z."""
    side: int = 256
    """Shorter side in pixels of the pictures that the weights were trained on."""

    def __post_init__(self):
        limits = {"feature_dim": (8, 4096), "blocks": (1, 64), "ffn_factor": (1, 16), "depth_candidates": (2, 1024), "cost_width": (8, 4096), "cost_heads": (1, 64),
                  "refine_width": (8, 1024), "gaussian_width": (1, 4096), "sh_degree": (0, 4), "side": (32, 8192)}
        for name, (least, most) in limits.items():
            if not least <= getattr(self, name) <= most:
                raise BadConfig(f"{name} is {getattr(self, name)}; expected {least} to {most}")
        if not all(1 <= n <= 4096 for n in self.cnn_widths):
            raise BadConfig(f"cnn_widths is {self.cnn_widths}; expected three of 1 to 4096")
        for name in ("feature_dim", "cost_width", "refine_width"):
            if getattr(self, name) % 8:
                raise BadConfig(f"{name} is {getattr(self, name)}; expected a multiple of 8, the number of groups that are normalised")
        if self.cost_width % self.cost_heads:
            raise BadConfig(f"cost_heads is {self.cost_heads}; expected a divisor of cost_width, {self.cost_width}")
        if not 0 < self.scale_range[0] < self.scale_range[1]:
            raise BadConfig(f"scale_range is {self.scale_range}; expected 0 < smallest < largest")


CONFIGS = {
    "mvsplat": MVSplatConfig(),
    "tiny": MVSplatConfig(feature_dim=64, cnn_widths=(32, 48, 64), blocks=4, ffn_factor=2, depth_candidates=64, cost_width=64, cost_heads=2, refine_width=16,
                          gaussian_width=32, sh_degree=1, unit_rays=False, side=128),
}
