"""Adaptive density control (Kerbl et al. 2023, section 5.2): clone, split and prune by screen gradients; opacity reset.

As in `density`, functions return new values; the caller hands the Edit to whatever keeps per-row state.
"""
from __future__ import annotations

import math

import torch
from torch import Tensor

from .density import relocated
from .raster.types import RasterStats
from .scene import LOG_SCALE_MAX, LOG_SCALE_MIN, Edit, Scene, rotation_matrices


@torch.no_grad()
def grow_and_prune(scene: Scene, stats: RasterStats, *, grad_threshold: float = 2e-4, absgrad: bool = False, split_scale: float, cap: int,
                   prune_opacity: float = 0.005, max_world_scale: float | None = None, max_radius_px: float | None = None,
                   clone_opacity_correction: bool = False, split_factor: float = 1.6,
                   generator: torch.Generator | None = None) -> tuple[Scene, Edit]:
    """The scene with Gaussians added where the picture pulls at them and useless ones removed; and how its rows changed.

    A Gaussian grows when its screen gradient, the mean over the views that saw it, is at or over `grad_threshold`; with `absgrad` the
    sum of absolute values per pixel counts instead (AbsGS, Ye et al. 2024; its threshold is higher). Sizes are the largest standard
    deviation in world units:
    - up to `split_scale` (0.01 x scene extent in the paper) it is cloned: an equal copy is added. With `clone_opacity_correction` both
      get opacity 1 - sqrt(1 - o), held within [0.005, 1 - 2^-23], so that they let through as much light as the one did;
    - above, it is split: two Gaussians with its scales / `split_factor`, at places drawn from its own density, take its stead.
    Removed are those whose opacity is below `prune_opacity`, whose size is over `max_world_scale` or whose `stats.max_radius_px` is
    over `max_radius_px`: as they are after growing, but the radius of a split's children is not known yet and does not count. One at
    least stays, the most opaque. Growth never leads over `cap` rows; where it would, the largest gradients win.

    A clone's copy and both children of a split are fresh; a cloned source keeps its moments. One child takes its parent's row. New
    rows go to the lowest pruned places, then to the end; the last rows fill the places that remain. All others keep
    source[i] == i. `stats` are for the scene before; follow the edit, or start new ones as the paper does. Generator on the scene's device.

    Departures from the paper: a Gaussian that would be removed even after growing does not grow, and the correction never leads below
    `prune_opacity`. Else the correction's floor would raise the dead, and cloning would remove the faint.

    Raises ValueError when stats and scene disagree, or an argument is out of range.
    """
    _check(scene, stats, grad_threshold, split_scale, cap, prune_opacity, split_factor)
    n, scene = len(scene), scene.detach()
    if n == 0:
        return scene.clone(), Edit.identity(0, scene.device)
    gradient = (stats.abs_grad_sum if absgrad else stats.grad_sum) / stats.count.clamp(min=1)
    log_scales = scene.log_scales.clamp(LOG_SCALE_MIN, LOG_SCALE_MAX)
    size = log_scales.amax(1).exp()
    large = size > split_scale
    # As logits: the float32 sigmoid of logit(0.005) is below 0.005.
    faint = scene.logit_opacities < _logit(prune_opacity)
    max_size = math.inf if max_world_scale is None else max_world_scale
    unfit = faint | (size > max_size) | (stats.max_radius_px > (math.inf if max_radius_px is None else max_radius_px))
    unfit_grown = torch.where(large, faint | ((log_scales.amax(1) - math.log(split_factor)).exp() > max_size), unfit)

    wants = (gradient >= grad_threshold) & ~unfit_grown
    by_gradient = gradient.where(wants, -math.inf).argsort(descending=True, stable=True)[:int(wants.sum())]
    needed = (1 + unfit[by_gradient].long()).cumsum(0)      # a split that saves its parent from pruning needs two places
    grown = by_gradient[needed <= cap - int((~unfit).sum())].sort().values
    split = large[grown]
    parents, clones = grown[split], grown[~split]
    pruned = unfit.index_fill(0, grown, False)
    if bool(pruned.all()):
        pruned[scene.logit_opacities.argmax()] = False

    after = scene.clone()
    noise = torch.randn(2, len(parents), 3, generator=generator, device=scene.device, dtype=scene.dtype)
    offsets = torch.einsum("pij,cpj->cpi", rotation_matrices(scene.quats[parents]), noise * log_scales[parents].exp())
    children = scene.means[parents] + offsets
    after.means[parents] = children[0]
    after.log_scales[parents] = log_scales[parents] - math.log(split_factor)
    if clone_opacity_correction:
        logits, _ = relocated(scene.logit_opacities[clones], scene.log_scales[clones], torch.full_like(clones, 2))
        after.logit_opacities[clones] = logits.clamp(min=_logit(prune_opacity))

    source, places = _fill(pruned, grown)
    fresh = torch.zeros_like(pruned).index_fill(0, parents, True)[source].index_fill(0, places, True)
    after = after.rows(source)
    after.means[places[split]] = children[1]
    return after, Edit(source, fresh)


@torch.no_grad()
def reset_opacity(scene: Scene, ceiling: float = 0.01) -> tuple[Scene, Edit]:
    """The scene with opacities lowered to `ceiling`, never raised; the edit clears the moments of logit_opacities (Kerbl et al. 2023)."""
    if not 0 < ceiling < 1:
        raise ValueError(f"ceiling {ceiling}; expected 0 < ceiling < 1")
    kept = Edit.identity(len(scene), scene.device)
    lowered = scene.clone()
    lowered.logit_opacities.clamp_(max=_logit(ceiling))
    return lowered, Edit(kept.source, kept.fresh, reset=("logit_opacities",))


def _fill(pruned: Tensor, grown: Tensor) -> tuple[Tensor, Tensor]:
    """Sources [M] of the rows when `pruned` [N] leave and each of `grown` [G] adds one; and the places [G] of the added."""
    n, holes = len(pruned), pruned.nonzero().squeeze(1)
    total = n - len(holes) + len(grown)
    source = torch.arange(total, device=pruned.device)
    places = torch.cat([holes[:len(grown)], source[n:]])
    left = holes[len(grown):]
    # Rows of `total` and beyond that stay are as many as the places left before it: that makes `total` rows.
    source[left[left < total]] = total + (~pruned[total:]).nonzero().squeeze(1)
    source[places] = grown
    return source, places


def _logit(opacity: float) -> float:
    return math.log(opacity / (1 - opacity)) if opacity > 0 else -math.inf


def _check(scene: Scene, stats: RasterStats, grad_threshold: float, split_scale: float, cap: int, prune_opacity: float,
           split_factor: float) -> None:
    if len(stats.grad_sum) != len(scene) or stats.grad_sum.device != scene.device:
        raise ValueError(f"stats have {len(stats.grad_sum)} rows on {stats.grad_sum.device}, the scene {len(scene)} on {scene.device}; "
                         "make them with RasterStats.zeros(len(scene), scene.device) and let them follow every edit")
    if not (grad_threshold >= 0 and split_scale > 0 and cap >= 1 and 0 <= prune_opacity < 1 and split_factor > 0):
        raise ValueError(f"grad_threshold {grad_threshold}, split_scale {split_scale}, cap {cap}, prune_opacity {prune_opacity}, "
                         f"split_factor {split_factor}; expected >= 0, > 0, >= 1, 0 <= prune_opacity < 1, > 0")
