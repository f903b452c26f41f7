"""Where Gaussians are: the first ones from sparse points, and 3DGS-MCMC (Kheradmand et al. 2024): relocation, growth, noise; and which of them a step leaves out.

Functions return new values; the caller hands the Edit to whatever keeps per-row state (optimiser, stats, viewer).
"""
from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from . import native
from .scene import ABSENT, Edit, Part, Scene, rotation_matrices

SH_CONSTANT = 0.28209479177387814                   # colour = 1/2 + SH_CONSTANT * sh[:, 0]
OPACITY_MIN, OPACITY_MAX = 0.005, 1 - 2.0**-23      # of relocated Gaussians; the upper end is the largest that float32 tells from 1
LOGIT_MIN, LOGIT_MAX = (math.log(p / (1 - p)) for p in (OPACITY_MIN, OPACITY_MAX))


def from_points(points: Float[Tensor, "N 3"], rgb: Shaped[Tensor, "N 3"], sh_degree: int = 3, opacity: float = 0.5,
                scale_factor: float = 0.1) -> Scene:
    """One round Gaussian per point: its standard deviation is scale_factor times the mean distance to the 3 nearest other points.

    `rgb` is uint8 or float in [0, 1]; colour does not depend on direction yet (SH above band 0 is zero). Opacity 0.5 with factor 0.1
    is how 3DGS-MCMC starts, 0.1 with factor 1 how Kerbl et al. 2023 do. Distances are held within 1/100 and 100 times their median, so
    that neither coincident points nor a far outlier make a useless Gaussian; where all points coincide the distance counts as 1.
    """
    if not 0 <= sh_degree <= 3 or not 0 < opacity < 1 or not scale_factor > 0:
        raise ValueError(f"sh_degree {sh_degree}, opacity {opacity}, scale_factor {scale_factor}; expected 0 to 3, 0 < opacity < 1, > 0")
    if not bool(torch.isfinite(points).all()):
        raise ValueError("points hold a NaN or an infinity; drop such rows first")
    distance, n = neighbour_distance(points), len(points)
    apart = distance[distance > 0]
    median = apart.median() if len(apart) else points.new_ones(())
    sigma = scale_factor * distance.clamp(median / 100, median * 100)
    color = rgb.to(points) / 255 if rgb.dtype == torch.uint8 else rgb.to(points)
    sh = points.new_zeros(n, (sh_degree + 1) ** 2, 3)
    sh[:, 0] = (color - 0.5) / SH_CONSTANT
    return Scene(means=points.clone(), quats=points.new_tensor([1.0, 0, 0, 0]).repeat(n, 1), log_scales=sigma.log()[:, None].repeat(1, 3),
                 logit_opacities=points.new_full((n,), math.log(opacity / (1 - opacity))), sh=sh)


def neighbour_distance(points: Float[Tensor, "N 3"], k: int = 3) -> Float[Tensor, " N"]:
    """Exact mean distance from each point to its k nearest others; to fewer where there are fewer, 0 for a single point.

    Points are sorted into boxes of equal count by halving along the longest side. Each box is compared with itself, then a point
    only with boxes nearer than its k-th neighbour so far. There is no cell size to tune: 140k points take 1 to 3 s, clustered or not.
    """
    n, k = len(points), min(k, len(points) - 1)
    if k < 1:
        return points.new_zeros(n)
    levels = max(0, math.ceil(math.log2(n / 128)))
    leaf, inf = math.ceil(n / 2**levels), math.inf
    padded = torch.cat([points, points.new_full((leaf * 2**levels - n, 3), inf)])       # fewer than one pad per box; sorted last
    order = torch.arange(len(padded), device=points.device)[None]
    for _ in range(levels):
        boxed = padded[order]
        axis = (boxed.where(boxed < inf, -inf).amax(1) - boxed.amin(1)).argmax(1)
        along = boxed.gather(2, axis[:, None, None].expand(-1, boxed.shape[1], 1)).squeeze(2)
        order = order.gather(1, along.argsort(1)).view(len(order) * 2, -1)
    boxed = padded[order]                                                               # [boxes, leaf, 3]
    low, high = boxed.amin(1), boxed.where(boxed < inf, -inf).amax(1)

    squared = points.new_empty(len(padded), k)
    for some in torch.arange(len(boxed), device=points.device).split(64):
        mine = boxed[some]
        within = (mine[:, :, None] - mine[:, None]).square().sum(-1)
        within.diagonal(dim1=1, dim2=2).fill_(inf)
        nearest = within.nan_to_num(inf).topk(k, largest=False).values                  # [some, leaf, k]
        reach = nearest[..., -1].where(order[some] < n, -1)
        gap = torch.maximum(low - high[some][:, None], low[some][:, None] - high).clamp(min=0).square().sum(-1)
        gap[torch.arange(len(some)), some] = inf
        box, other = (gap < reach.amax(1, keepdim=True)).nonzero(as_tuple=True)
        gap = torch.maximum(low[other][:, None] - mine[box], mine[box] - high[other][:, None]).clamp(min=0).square().sum(-1)
        pair, member = (gap < reach[box]).nonzero(as_tuple=True)
        point, other, gap = box[pair] * leaf + member, other[pair], gap[pair, member]
        # One box per point and round, the nearest first: most points are done after a few.
        nearest, mine = nearest.view(-1, k), mine.view(-1, 3)
        by_gap = gap.argsort()
        by_gap = by_gap[point[by_gap].argsort(stable=True)]
        counts = point.bincount(minlength=1)
        place = torch.arange(len(point), device=points.device) - (counts.cumsum(0) - counts)[point[by_gap]]
        for round_ in by_gap[place.argsort(stable=True)].split(place.bincount().tolist()):
            round_ = round_[gap[round_] < nearest[point[round_], -1]]
            p = point[round_]
            across = (boxed[other[round_]] - mine[p][:, None]).square().sum(-1)
            nearest[p] = torch.cat([nearest[p], across], dim=1).topk(k, largest=False).values
        squared[order[some].flatten()] = nearest
    return squared[:n].sqrt().mean(1)


@torch.no_grad()
def relocate_and_grow(scene: Scene, cap: int, growth: float = 1.05, dead_opacity: float = OPACITY_MIN,
                      generator: torch.Generator | None = None) -> tuple[Scene, Edit]:
    """The scene with dead Gaussians moved onto living ones and up to growth * N rows, at most `cap`; and how its rows changed.

    Dead are those with opacity <= dead_opacity. Each of them, and each new row, becomes a copy of a living Gaussian drawn in
    proportion to opacity, with replacement; the c Gaussians that share a place then get the opacity and scale that keep the
    picture (`relocated`). Moved rows keep their index and new ones are appended, so untouched rows have source[i] == i. Fresh are
    moved and new rows and their sources too, for the moments belong to the values of before. A scene larger than the cap only
    relocates; one without a living Gaussian comes back as it is. Generator on the scene's device.

    Departure from the paper: moves and additions are drawn together, with one correction for all copies, instead of in two rounds.
    """
    n, scene = len(scene), scene.detach()
    opacity = torch.sigmoid(scene.logit_opacities)
    dead = opacity <= dead_opacity
    moved = dead.nonzero().squeeze(1)
    n_new = max(0, min(cap, math.ceil(growth * n)) - n)
    # Inverse transform sampling: torch.multinomial refuses more than 2^24 rows. Doubles, so that small opacities are not lost in the sum.
    cumulative = torch.where(dead, 0, opacity).double().cumsum(0)
    if n == 0 or len(moved) + n_new == 0 or not cumulative[-1] > 0:
        return scene.clone(), Edit.identity(n, scene.device)
    draws = 1 - torch.rand(len(moved) + n_new, dtype=torch.float64, generator=generator, device=scene.device)      # in (0, 1]
    drawn = torch.searchsorted(cumulative, draws * cumulative[-1])      # the first row that lifts the sum to the draw: never a dead one

    sources, extra = drawn.unique(return_counts=True)
    logit_opacities, log_scales = relocated(scene.logit_opacities[sources], scene.log_scales[sources], extra + 1)
    source = torch.cat([torch.arange(n, device=scene.device), drawn[len(moved):]])
    source[moved] = drawn[:len(moved)]
    corrected = scene.clone()
    corrected.logit_opacities[sources], corrected.log_scales[sources] = logit_opacities, log_scales
    fresh = source != torch.arange(len(source), device=scene.device)
    fresh[sources] = True
    return corrected.rows(source), Edit(source, fresh)


def relocated(logit_opacities: Float[Tensor, " M"], log_scales: Float[Tensor, "M 3"],
              copies: Int[Tensor, " M"]) -> tuple[Float[Tensor, " M"], Float[Tensor, "M 3"]]:
    """Logit opacity and log scales of each of `copies` equal Gaussians that together stand in for one (Kheradmand et al. 2024, eq. 9).

    At the centre the copies let through as much light as the one did, and along a line through it they have the same integral of
    alpha. Opacities end in [0.005, 1 - 2^-23].
    """
    logit_opacities = logit_opacities.clamp(max=LOGIT_MAX).contiguous()
    if (library := native.library_for(logit_opacities)) is not None:
        out = logit_opacities.clone(), log_scales.clone(memory_format=torch.contiguous_format)
        library.sk_relocate(len(copies), *out, copies.to(torch.int32), library.stream)
    else:
        out = relocated_reference(logit_opacities, log_scales, copies)
    return out[0].clamp(LOGIT_MIN, LOGIT_MAX), out[1]


def relocated_reference(logit_opacities: Float[Tensor, " M"], log_scales: Float[Tensor, "M 3"],
                        copies: Int[Tensor, " M"]) -> tuple[Float[Tensor, " M"], Float[Tensor, "M 3"]]:
    """relocated() in plain torch, without its clamps: the definition.

    With o' = 1 - (1 - o)^(1/c) the scale factor is o / sum_{i=1..c} sum_{k<i} binomial(i-1, k) (-1)^k o'^(k+1) / sqrt(k+1). The terms of
    equal k add up to binomial(c, k+1), which leaves one sum. Its terms alternate and reach 1 / (1 - o) in size: hence double.
    """
    c, o = copies.double(), torch.sigmoid(logit_opacities.double())
    log_transmittance = -torch.nn.functional.softplus(logit_opacities.double()) / c         # of one copy
    o_copy = -torch.expm1(log_transmittance)
    term, total = torch.ones_like(o), torch.zeros_like(o)
    for j in range(1, int(copies.max()) + 1 if len(copies) else 1):
        term = term * (c - j + 1).clamp(min=0) / j * o_copy                                 # binomial(c, j) o'^j, 0 beyond c
        total = total - (-1) ** j * term / math.sqrt(j)
        if bool((term < 1e-18).all()):
            break
    new_logits = torch.log(o_copy) - log_transmittance
    return new_logits.to(logit_opacities), log_scales + (torch.log(o) - torch.log(total)).to(log_scales)[:, None]


@torch.no_grad()
def mcmc_noise(scene: Scene, learning_rate: float, noise_scale: float = 5e5,
               generator: torch.Generator | None = None, part: Part | None = None) -> Float[Tensor, "N 3"]:
    """Random displacement of every mean, world units: Sigma n * gate(opacity) * noise_scale * learning_rate, n standard normal.

    gate = 1 / (1 + exp(-100 ((1 - opacity) - 0.995))), so only nearly transparent Gaussians wander (Kheradmand et al. 2024).
    `learning_rate` is that of the means. With `part`, `scene` is those rows of a larger one, whose numbers are drawn. A value, not an
    in-place change: pass it to Adam.step(displacement=...), the only writer.
    """
    noise = torch.randn(part.total if part else len(scene), 3, dtype=scene.dtype, device=scene.device, generator=generator)
    noise = part.of(noise) if part else noise
    if (library := native.library_for(noise)) is None:
        return mcmc_noise_reference(scene, noise, noise_scale * learning_rate)
    displacement = torch.zeros_like(noise)      # native code adds to means: to zero here
    library.sk_mcmc_noise(len(scene), displacement, scene.quats.contiguous(), scene.log_scales.contiguous(),
                          scene.logit_opacities.contiguous(), noise, noise_scale * learning_rate, library.stream)
    return displacement


def mcmc_noise_reference(scene: Scene, noise: Float[Tensor, "N 3"], scale: float) -> Float[Tensor, "N 3"]:
    """Sigma (noise * gate(opacity) * scale) in plain torch: the definition."""
    gate = torch.sigmoid(100 * (0.005 - torch.sigmoid(scene.logit_opacities)))
    R = rotation_matrices(scene.quats)
    pushed = noise * (gate * scale)[:, None]
    return torch.einsum("nij,nj,nkj,nk->ni", R, scene.scales.square(), R, pushed)


def dropped(scene: Scene, rate: float, generator: torch.Generator | None = None, part: Part | None = None) -> Scene:
    """The scene with each Gaussian left out with probability `rate`, 0 <= rate < 1, and the others 1 / (1 - rate) times as opaque (DropGaussian, Park et al. 2025).

    On the mean over the draws each opacity is what it was, but that none goes above 1 - 1e-6. Logit opacities are new, the other fields are the scene's; gradients reach
    those of `scene`, except where a Gaussian is left out, at that bound, or transparent (below 1e-30). With `part`, `scene` is those rows of a larger one, for all of which is drawn.
    Generator on the scene's device.
    """
    draws = torch.rand(part.total if part else len(scene), device=scene.device, generator=generator)
    kept = (part.of(draws) if part else draws) >= rate
    opacity = (torch.sigmoid(scene.logit_opacities) / (1 - rate)).clamp(1e-30, 1 - 1e-6)
    return scene.replace(logit_opacities=torch.where(kept, torch.logit(opacity), ABSENT))
