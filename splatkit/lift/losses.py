"""What the lifting network learns from: drawn against photographed views, given depths, and, without any label, input views against each other."""
from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from .. import lpips
from ..camera import Cameras, relative_pose
from ..metrics import ssim_map
from ..raster import render
from .data import Sample
from .model import Lifted
from .rays import pixel_rays
from .train_config import LiftLosses

SSIM_SHARE = 0.85       # of the photometric error; L1 has the rest (Godard et al. 2019, section 3.1)
COARSE = 0.5            # weight of the coarse depth beside the refined one


def losses(found: Lifted, sample: Sample, contexts: int, weights: LiftLosses, perceptual: lpips.Weights | None = None) -> dict[str, Float[Tensor, ""]]:
    """The terms of the loss that have a weight, unweighted, by the names of LiftLosses."""
    inputs = Sample(sample.images[:, :contexts], sample.K[:, :contexts], sample.world_to_cam[:, :contexts], sample.depth[:, :contexts], sample.far)
    terms = {}
    if weights.mse or weights.lpips:
        drawn, photos = targets_drawn(found, sample, contexts), sample.images[:, contexts:].permute(0, 1, 3, 4, 2)
        terms["mse"] = (drawn - photos).square().mean()
        if weights.lpips:
            pairs = list(zip(drawn.flatten(0, 1), photos.flatten(0, 1)))
            terms["lpips"] = torch.stack([lpips.distance(a, b, perceptual) for a, b in pairs]).mean()
    if weights.depth:
        coarse = F.interpolate(inputs.depth, scale_factor=0.25, mode="nearest-exact")
        terms["depth"] = depth_difference(found.depth, inputs.depth) + COARSE * depth_difference(found.coarse_depth, coarse)
    if weights.warp or weights.agreement:
        pairs = [(i, j) for i in range(contexts) for j in range(contexts) if i != j]
        warps = {(i, j): warped(inputs, found.depth, i, j) for i, j in pairs}
        if weights.warp:
            terms["warp"] = torch.stack([warp_difference(inputs, i, [warps[i, j] for j in range(contexts) if j != i], [j for j in range(contexts) if j != i])
                                         for i in range(contexts)]).mean()
        if weights.agreement:
            terms["agreement"] = torch.stack([depth_disagreement(warp) for warp in warps.values()]).mean()
    return terms


def total(terms: dict[str, Tensor], weights: LiftLosses) -> Float[Tensor, ""]:
    return sum(getattr(weights, name) * x for name, x in terms.items() if getattr(weights, name))


def targets_drawn(found: Lifted, sample: Sample, contexts: int) -> Float[Tensor, "B T H W 3"]:
    """The target views as the scenes show them, before black."""
    height, width = sample.images.shape[-2:]
    return torch.stack([render(scene, Cameras(pose[contexts:], K[contexts:], width, height)).color
                        for scene, pose, K in zip(found.scenes, sample.world_to_cam, sample.K)])


def depth_difference(depth: Float[Tensor, "*S"], given: Float[Tensor, "*S"]) -> Float[Tensor, ""]:
    """Mean |log depth - log given| where a depth is given; 0 where none is."""
    known = given > 0
    difference = (depth.log() - torch.where(known, given, 1).log()).abs()
    return torch.where(known, difference, 0).sum() / known.sum().clamp(min=1)


def warped(views: Sample, depth: Float[Tensor, "B V H W"], here: int, there: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """View `there` as seen from `here` by the depth of `here`: its picture [B, 3, H, W], the depth of the points in its camera [B, H, W], the depth that
    it has itself in these places, and which places lie in it. Differentiable in both depths."""
    height, width = depth.shape[-2:]
    points = pixel_rays(views.K[:, here], height, width) * depth[:, here, ..., None]
    relative = relative_pose(views.world_to_cam[:, here], views.world_to_cam[:, there])
    local = torch.einsum("bij,bhwj->bhwi", relative[:, :3, :3], points) + relative[:, None, None, :3, 3]
    z = local[..., 2].clamp(min=1e-3)
    x, y, _ = torch.einsum("bij,bhwj->bhwi", views.K[:, there], local / z[..., None]).unbind(-1)
    place = torch.stack([2 * x / width - 1, 2 * y / height - 1], dim=-1)      # -1 and 1 at the outer edges
    inside = (place.abs() < 1).all(-1) & (local[..., 2] > 1e-3)
    sampled = lambda x: F.grid_sample(x, place.clamp(-2, 2), mode="bilinear", padding_mode="border", align_corners=False)
    return sampled(views.images[:, there]), z, sampled(depth[:, there, None])[:, 0], inside


def photometric(a: Float[Tensor, "B 3 H W"], b: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B H W"]:
    """Per pixel, 0.85 (1 - SSIM) / 2 + 0.15 L1 (Godard et al. 2019, eq. 2)."""
    similar = torch.stack([ssim_map(x.permute(1, 2, 0), y.permute(1, 2, 0)).mean(-1) for x, y in zip(a, b)])
    return SSIM_SHARE * (1 - similar) / 2 + (1 - SSIM_SHARE) * (a - b).abs().mean(1)


def warp_difference(views: Sample, here: int, warps: list[tuple[Tensor, Tensor, Tensor, Tensor]], others: list[int]) -> Float[Tensor, ""]:
    """Photometric error of a view against the others warped to it: each pixel's least over the others that see it, and only where that beats
    the error without any warp, which it does not on what moves with the camera or has no pattern (Godard et al. 2019, eq. 4 and 5)."""
    photo = views.images[:, here]
    errors = torch.stack([torch.where(inside, photometric(picture, photo), torch.inf) for picture, _, _, inside in warps]).amin(0)
    unmoved = torch.stack([photometric(views.images[:, j], photo) for j in others]).amin(0)
    counts = errors < unmoved
    return torch.where(counts, errors, 0).sum() / counts.sum().clamp(min=1)


def depth_disagreement(warp: tuple[Tensor, Tensor, Tensor, Tensor]) -> Float[Tensor, ""]:
    """Mean |a - b| / (a + b) of the depths that two views say of the same points (Bian et al. 2019, eq. 2)."""
    _, moved, own, inside = warp
    return torch.where(inside, (moved - own).abs() / (moved + own), 0).sum() / inside.sum().clamp(min=1)


def seen_in(depth: Float[Tensor, "B V H W"], views: Sample, here: int, there: int, tolerance: float = 0.03) -> Bool[Tensor, "B H W"]:
    """Which pixels of a view another one sees too, by true depths of both: those whose depths agree within a share."""
    _, moved, own, inside = warped(views, depth, here, there)
    return inside & ((moved - own).abs() < tolerance * own)
