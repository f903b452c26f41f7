"""What a rasterizer takes and gives: settings, output record, and the accumulator that densification reads."""
from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

OUTPUTS = ("color", "expected_depth", "median_depth", "features")


@dataclass(frozen=True)
class RasterSettings:
    """How Gaussians become pixels. A trained scene must be drawn with the settings it was trained with."""

    near: float = 0.01
    """Gaussians whose centre has a camera depth below this are not drawn."""
    blur_px2: float = 0.3
    """Variance added to both screen axes, in square pixels: part of the trained model (Kerbl et al. 2023)."""
    antialias: bool = False
    """Scale opacity by sqrt(det before / det after the blur) (2D Mip filter, Yu et al. 2024)."""
    alpha_min: float = 1 / 255
    """A Gaussian does not touch pixels where its alpha is below this."""
    alpha_max: float = 0.99
    """Alpha is capped here."""
    transmittance_min: float = 1e-4
    """The first Gaussian that would leave less transmittance than this is not drawn, nor is any behind it."""
    fov_margin: float = 0.3
    """The projection's Jacobian is taken at most this many half fields of view outside the picture."""
    deterministic: bool = False
    """CUDA: equal gradients, bit for bit, however the card orders the sums: they are of 64-bit whole numbers, in which small terms lose bits
    beside pixel gradients more than 10^5 times larger in a Gaussian's tiles (of a large one's: in the picture; by features: more than 10^3 times larger anywhere). A term
    that is not finite makes a gradient NaN. The CPU's are always equal."""

    def __post_init__(self):
        if not (self.near > 0 and self.blur_px2 >= 0 and 0 <= self.alpha_min < 1 and self.alpha_min < self.alpha_max <= 1
                and 0 <= self.transmittance_min < 1 and self.fov_margin >= 0):
            raise ValueError(f"{self}: expected near > 0, blur_px2 >= 0, 0 <= alpha_min < alpha_max <= 1, 0 <= transmittance_min < 1, fov_margin >= 0")

    @staticmethod
    def smooth() -> RasterSettings:
        """No cut-offs, so that the picture is a differentiable function of the scene: what gradcheck runs with."""
        return RasterSettings(alpha_min=0.0, alpha_max=1.0, transmittance_min=0.0, fov_margin=math.inf)

    def changed(self) -> dict[str, float | bool]:
        """The values that differ from the defaults by name: what a SceneHeader stores."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if getattr(self, f.name) != f.default}


@dataclass(frozen=True)
class RenderOutput:
    """C pictures. What was not asked for is None; `alpha`, `visible` and `radii_px` are always there."""

    color: Float[Tensor, "C H W 3"] | None            # premultiplied by alpha, background shining through the rest
    alpha: Float[Tensor, "C H W"]                     # 1 - transmittance behind the last Gaussian
    expected_depth: Float[Tensor, "C H W"] | None     # sum w z / alpha where alpha > 1e-6, else 0; z = camera depth of the centre
    median_depth: Float[Tensor, "C H W"] | None       # z at which transmittance first is <= 0.5, 0 where it never is; no gradient
    features: Float[Tensor, "C H W F"] | None         # sum w f, no background
    visible: Bool[Tensor, "C N"]                      # by global row
    radii_px: Float[Tensor, "C N"]                    # larger half side of the box outside of which alpha < alpha_min; 0 = not drawn


@dataclass
class RasterStats:
    """Sums over the views that were back-propagated, by global row: what densification decides on.

    Gradients are d loss / d pixel position times (width / 2, height / 2), the unit of the usual 2e-4 threshold.
    """

    grad_sum: Float[Tensor, " N"]           # sum over views of the norm of the screen gradient
    abs_grad_sum: Float[Tensor, " N"]       # the same with absolute values taken per pixel
    count: Int[Tensor, " N"]                # views in which the Gaussian was visible
    max_radius_px: Float[Tensor, " N"]
    weight_sum: Float[Tensor, " N"]         # sum of blending weights over pixels and views

    @staticmethod
    def zeros(n: int, device=None, dtype=torch.float32) -> RasterStats:
        z = lambda: torch.zeros(n, device=device, dtype=dtype)
        return RasterStats(z(), z(), torch.zeros(n, device=device, dtype=torch.int64), z(), z())

    def add_view(self, grad: Float[Tensor, "N 2"], abs_grad: Float[Tensor, "N 2"], weights: Float[Tensor, " N"],
                 radii_px: Float[Tensor, " N"], width: int, height: int) -> None:
        """Adds one view's per-row sums; `grad` and `abs_grad` are in loss per pixel of movement."""
        length = lambda g: torch.hypot(g[:, 0] * (width / 2), g[:, 1] * (height / 2))     # a tensor of the unit would wait for a card
        self.grad_sum += length(grad)
        self.abs_grad_sum += length(abs_grad)
        self.count += radii_px > 0
        torch.maximum(self.max_radius_px, radii_px.to(self.max_radius_px), out=self.max_radius_px)
        self.weight_sum += weights

    def follow(self, edit) -> RasterStats:
        """The stats of the scene after `edit`; fresh rows start from zero."""
        def move(x):
            return torch.where(edit.fresh, torch.zeros_like(x[:1]), x[edit.source])
        return RasterStats(**{f.name: move(getattr(self, f.name)) for f in dataclasses.fields(self)})
