"""The label of a target photo: the teacher's features of the context photos, carried there by Gaussians (paper, section 3; eq. 1 to 4)."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ..raster import render
from .config import LabelConfig
from .geometry import Carrier
from .maps import blend, blended_and_shrunk, kmeans_regions, shrink, upsample
from .views import View


@dataclass(frozen=True)
class Label:
    """Features that the student must see, and where they are known."""

    tokens: Float[Tensor, "h w C"]
    valid: Bool[Tensor, "h w"]


def regions_of(view: View, tokens: Float[Tensor, "h w C"], config: LabelConfig) -> Int[Tensor, "H W"]:
    """The objects of a photo: its instance masks; where it has none, or is not to use them, k-means regions of its tokens, or one region for all."""
    height, width = view.photo.shape[1:]
    if config.regions == "none":
        return torch.zeros(height, width, dtype=torch.int64, device=tokens.device)
    if config.regions == "masks" and view.labels is not None:
        return view.labels
    return kmeans_regions(tokens, height, width, config.kmeans, seed=0)


def pixel_maps(tokens: Float[Tensor, "V h w C"], views: Sequence[View], config: LabelConfig) -> list[Float[Tensor, "H W C"]]:
    """The token grids of photos at their pixels, inside of objects only where `config` says so."""
    whole = lambda view: torch.zeros(view.photo.shape[1:], dtype=torch.int64, device=tokens.device)
    return [upsample(grid, regions_of(view, grid, config) if config.upsampling == "masks" else whole(view), positions=config.positions, fallback=config.fallback)
            for grid, view in zip(tokens, views)]


@torch.no_grad()
def labels_of(carrier: Carrier, tokens: Float[Tensor, "V h w C"], contexts: Sequence[View], targets: Sequence[View], target_tokens: Float[Tensor, "T h w C"] | None,
              config: LabelConfig, fitting_steps: int = 0) -> list[Label]:
    """The label of each target photo. `target_tokens` are the teacher's own, of which regions are made where there are no masks.

    What Gaussians cover to less than alpha_min is not valid, nor is what a photo's mask leaves out. As the paper's code has it (coverage
    `zero`), features are not divided by alpha and what nothing covers is zero.
    """
    scene = carrier.carrying(pixel_maps(tokens.float(), contexts, config), [v.camera for v in contexts], fitting_steps)
    out = []
    for i, target in enumerate(targets):
        drawn = render(scene, target.camera, outputs=("features",), settings=carrier.settings)
        features, alpha = drawn.features[0], drawn.alpha[0]
        normalised = config.coverage == "normalise"
        weight = 1 / alpha.clamp(min=1e-6) if normalised else torch.ones_like(alpha)
        valid = alpha > (config.alpha_min if normalised else 0)
        if target.kept is not None:
            valid = valid & target.kept
        regions = torch.zeros_like(valid, dtype=torch.int64)
        if config.blend < 1 and config.regions != "none":
            if config.regions == "masks" and target.labels is not None:
                regions = target.labels
            elif target_tokens is not None:
                regions = regions_of(target, target_tokens[i], config)
        if config.shrink == "bilinear":
            out.append(Label(*blended_and_shrunk(features, weight, regions, config.blend if regions.any() else 1.0, valid, *tokens.shape[1:3], config.blend_unlabelled)))
        else:
            features = blend(features * weight[..., None], regions, config.blend if regions.any() else 1.0, valid, config.blend_unlabelled)
            out.append(Label(*shrink(features, valid, *tokens.shape[1:3], config.shrink)))
    return out
