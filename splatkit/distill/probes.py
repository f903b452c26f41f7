"""Probes of frozen features, as functions of tensors: linear heads for depth, normals and segments, and matching across views. (Protocol of Oquab et al. 2024, El Banani et al. 2024.)"""
from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from .probe_config import Head
from .step import patch_centres, sample_at, seen_by
from .views import View

CLIP = 35.0             # largest norm of the gradient of a head


class LinearHead(nn.Module):
    """BatchNorm and one linear layer on token grids; what it says is up-sampled four times, then to the photo, both bilinear (which commutes with the layer)."""

    def __init__(self, channels: int, outputs: int, seed: int):
        super().__init__()
        self.norm, self.linear = nn.BatchNorm2d(channels), nn.Conv2d(channels, outputs, 1)
        with torch.no_grad():
            self.linear.weight.normal_(0, 0.01, generator=torch.Generator().manual_seed(seed))
            self.linear.bias.zero_()

    def forward(self, tokens: Float[Tensor, "B h w C"], height: int, width: int) -> Float[Tensor, "B O H W"]:
        out = self.linear(self.norm(tokens.permute(0, 3, 1, 2)))
        out = F.interpolate(out, scale_factor=4, mode="bilinear", align_corners=False)
        return F.interpolate(out, (height, width), mode="bilinear", align_corners=False)


def depth_from(scores: Float[Tensor, "B K H W"], most: float, least: float = 1e-3) -> Float[Tensor, "B H W"]:
    """The mean of uniform bins from `least` to `most`, weighted by what is left of scores above 0 (as AdaBins, with linear normalisation)."""
    bins = torch.linspace(least, most, scores.shape[1], device=scores.device, dtype=scores.dtype)
    weights = F.relu(scores) + 0.1
    return (weights * bins[:, None, None]).sum(1) / weights.sum(1)


def depth_loss(depth: Float[Tensor, "B H W"], truth: Float[Tensor, "B H W"]) -> Float[Tensor, ""]:
    """Scale-invariant log loss (Eigen et al. 2014, with 0.15 of the squared mean) plus 0.5 times that of log gradients at four scales; where truth is above 0."""
    known = truth > 0
    difference = torch.where(known, depth.clamp(min=1e-6).log() - truth.clamp(min=1e-6).log(), 0)
    count = known.sum().clamp(min=1)
    mean = difference.sum() / count
    scale_invariant = ((difference.square().sum() / count - mean.square()).clamp(min=0) + 0.15 * mean.square() + 1e-12).sqrt()
    gradient = difference.new_zeros(())
    for step in (1, 2, 4, 8):
        d, k = difference[:, ::step, ::step], known[:, ::step, ::step]
        for axis in (1, 2):
            if d.shape[axis] > 1:
                both = k.narrow(axis, 1, k.shape[axis] - 1) & k.narrow(axis, 0, k.shape[axis] - 1)
                gradient = gradient + (d.diff(dim=axis).abs() * both).sum() / both.sum().clamp(min=1)
    return scale_invariant + 0.5 * gradient


def normal_loss(said: Float[Tensor, "B 4 H W"], truth: Float[Tensor, "B H W 3"]) -> Float[Tensor, ""]:
    """Angular distance with its uncertainty: the negative log-likelihood of AngMF (Bae et al. 2021), where truth is not zero."""
    known = truth.square().sum(-1) > 0.25
    cos = (F.normalize(said[:, :3], dim=1).permute(0, 2, 3, 1) * truth).sum(-1).clamp(-1 + 1e-6, 1 - 1e-6)
    kappa = F.elu(said[:, 3]) + 1.01
    loss = -(kappa.square() + 1).log() + kappa * cos.acos() + (1 + (-kappa * math.pi).exp()).log()
    return torch.where(known, loss, 0).sum() / known.sum().clamp(min=1)


def segmentation_loss(scores: Float[Tensor, "B K H W"], truth: Int[Tensor, "B H W"]) -> Float[Tensor, ""]:
    """Cross-entropy over classes from 1; 0 is left out."""
    if not bool((truth > 0).any()):
        return scores.sum() * 0
    return F.cross_entropy(scores, truth - 1, ignore_index=-1)


def train_head(tokens: Sequence[Float[Tensor, "h w C"]], truths: Sequence[Tensor], outputs: int, loss: Callable[[Tensor, Tensor], Tensor], settings: Head, seed: int) -> LinearHead:
    """A head fitted to photos by their frozen features; truths are [H, W] or [H, W, 3]."""
    head = LinearHead(tokens[0].shape[2], outputs, seed).to(tokens[0].device).train()
    adam = torch.optim.AdamW(head.parameters(), lr=settings.lr, weight_decay=settings.weight_decay)
    order, queue = torch.Generator().manual_seed(seed), []
    warm = max(1, round(settings.warmup * settings.steps))
    for step in range(1, settings.steps + 1):
        while len(queue) < settings.batch:
            queue += torch.randperm(len(tokens), generator=order).tolist()
        chosen, queue = queue[:settings.batch], queue[settings.batch:]
        truth = torch.stack([truths[i] for i in chosen])
        left = (step - warm) / max(1, settings.steps - warm + 1)
        adam.param_groups[0]["lr"] = settings.lr * (step / warm if step <= warm else 1 - left if settings.decay == "linear" else 0.5 + 0.5 * math.cos(math.pi * left))
        adam.zero_grad(set_to_none=True)
        loss(head(torch.stack([tokens[i] for i in chosen]).float(), *truth.shape[1:3]), truth).backward()
        nn.utils.clip_grad_norm_(head.parameters(), CLIP)
        adam.step()
    return head.eval()


def depth_errors(depth: Float[Tensor, "H W"], truth: Float[Tensor, "H W"], most: float) -> dict[str, float]:
    """RMSE, AbsRel and the shares within factors of 1.25, 1.25^2 and 1.25^3, over pixels with a known depth of at most `most`."""
    known = (truth > 0) & (truth <= most)
    if not bool(known.any()):
        return {}
    d, t = depth[known].double().clamp(min=1e-3), truth[known].double()
    ratio = torch.maximum(d / t, t / d)
    return {"rmse": float((d - t).square().mean().sqrt()), "abs_rel": float(((d - t).abs() / t).mean()), **{f"delta{k}": float((ratio < 1.25 ** k).double().mean()) for k in (1, 2, 3)}}


def normal_errors(said: Float[Tensor, "3 H W"], truth: Float[Tensor, "H W 3"]) -> dict[str, float]:
    """Root mean square of the angle in degrees, and the shares below 11.25, 22.5 and 30 degrees."""
    known = truth.square().sum(-1) > 0.25
    if not bool(known.any()):
        return {}
    angle = torch.rad2deg((F.normalize(said, dim=0).permute(1, 2, 0) * truth).sum(-1)[known].double().clamp(-1, 1).acos())
    return {"rmse_degrees": float(angle.square().mean().sqrt()), **{f"below_{limit:g}": float((angle < limit).double().mean()) for limit in (11.25, 22.5, 30)}}


def confusion(scores: Float[Tensor, "K H W"], truth: Int[Tensor, "H W"]) -> Int[Tensor, "K K"]:
    """Pixels by true class (from 1) and by the class that scores highest."""
    classes, known = scores.shape[0], truth > 0
    return torch.bincount((truth[known] - 1) * classes + scores.argmax(0)[known], minlength=classes * classes).view(classes, classes)


def mean_iou(confusion: Int[Tensor, "K K"]) -> float:
    """Intersection over union, mean over the classes that are there."""
    hit = confusion.diag().double()
    union = confusion.sum(0) + confusion.sum(1) - confusion.diag()
    there = confusion.sum(1) > 0
    return float((hit[there] / union[there]).mean())


@dataclass(frozen=True)
class Matches:
    """Best matches of one photo in another, the best first."""

    at_a: Float[Tensor, "M 2"]          # pixels of the first photo
    at_b: Float[Tensor, "M 2"]          # of the second: where the match is
    error: Float[Tensor, " M"]          # its distance there from where the point really is, in pixels of the photo at `scale`

    def recall(self, radius: float) -> float:
        return float((self.error <= radius).double().mean()) if len(self.error) else math.nan


@torch.no_grad()
def match(fa: Float[Tensor, "h w C"], fb: Float[Tensor, "h w C"], a: View, b: View, scale: float = 0.25, most: int = 1000, seen_only: bool = False) -> Matches:
    """Pixels of `a` (of its picture at `scale`) with a known depth, each matched to the pixel of `b` of the highest cosine; of these the `most`
    with the best ratio of nearest to second-nearest distance. With `seen_only` just pixels whose point is in `b`, and not hidden there."""
    at_a, z = _places(a, scale)
    at_b, _ = _places(b, scale)
    there, seen = seen_by(at_a, z, a, b)
    if seen_only:
        at_a, there = at_a[seen], there[seen]
    if len(at_a) == 0 or len(at_b) < 2:
        return Matches(at_a[:0], at_a[:0], z[:0])
    ones, others = F.normalize(sample_at(fa.float(), at_a, a), dim=1), F.normalize(sample_at(fb.float(), at_b, b), dim=1)
    near, index = (1 - ones @ others.T).clamp(min=0).topk(2, dim=1, largest=False)
    weight = 1 - near[:, 0] / near[:, 1].clamp(min=1e-9)
    best = weight.argsort(descending=True, stable=True)[:most]
    matched = at_b[index[best, 0]]
    return Matches(at_a[best], matched, (matched - there[best]).norm(dim=1) * scale)


def _places(view: View, scale: float) -> tuple[Float[Tensor, "P 2"], Float[Tensor, " P"]]:
    """Centres of the pixels of a photo at a scale, in its own pixels, and the depth there, where it is known and the photo's mask keeps it."""
    height, width = view.depth.shape
    at = patch_centres(view, round(height * scale), round(width * scale))
    row, column = at[:, 1].long(), at[:, 0].long()
    z = view.depth[row, column]
    known = z > 0 if view.kept is None else (z > 0) & view.kept[row, column]
    return at[known], z[known]


def rotation_between(a: View, b: View) -> float:
    """Degrees that one camera is turned against the other."""
    turn = a.camera.world_to_cam[0, :3, :3].double() @ b.camera.world_to_cam[0, :3, :3].double().T
    return math.degrees(math.acos(max(-1.0, min(1.0, float(turn.trace() - 1) / 2))))


def bootstrap(differences: Float[Tensor, " N"], draws: int = 10_000, seed: int = 0, level: float = 0.95) -> tuple[float, float, float]:
    """Mean of paired differences, and the ends of its percentile bootstrap interval; rows, such as rooms, are what is drawn."""
    x = differences.double()
    picked = torch.randint(len(x), (draws, len(x)), generator=torch.Generator().manual_seed(seed))
    means = x[picked].mean(1)
    low, high = means.quantile((1 - level) / 2), means.quantile((1 + level) / 2)
    return float(x.mean()), float(low), float(high)
