"""One sample of a step: the label, and the loss of what the student makes of the target photo (paper, section 3 and eq. 5)."""
from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from ..camera import unproject
from .config import Distill
from .geometry import Geometry
from .head import Head, cross_entropy, mean_over_valid, prototype_entropy, token_losses
from .label import Label, labels_of
from .samples import Sample
from .student import Teacher
from .views import View

MATCH_TEMPERATURE = 0.07        # of correspondence: what contrastive losses on unit vectors have (He et al. 2020)
DEPTH_AGREES = 0.03             # relative: a point is seen by both photos


@dataclass
class Tally:
    """Sums over the samples since the last line of metrics, by name."""

    sums: dict[str, float] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)

    def add(self, **values: float | Tensor) -> None:
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + (value.detach() if isinstance(value, Tensor) else value)
            self.counts[name] = self.counts.get(name, 0) + 1

    def means(self) -> dict[str, float]:
        out = {name: float(total) / self.counts[name] for name, total in self.sums.items()}
        self.sums.clear()
        self.counts.clear()
        return out


@dataclass
class Center:
    """The running mean of the teacher's scores, for centering; its next value waits until the optimiser's step is done, so that a batch shares one."""

    value: Tensor | None
    momentum: float
    sums: Tensor | None = None
    count: int = 0

    def see(self, scores: Float[Tensor, "T K"]) -> None:
        self.sums = scores.sum(0) if self.sums is None else self.sums + scores.sum(0)
        self.count += len(scores)

    def step(self, total: Callable[[Tensor], Tensor] = lambda x: x) -> None:
        """`total` adds up over processes."""
        if self.value is None:
            return
        seen = torch.cat([self.value * 0 if self.sums is None else self.sums, self.value.new_tensor([float(self.count)])])
        seen = total(seen)
        if seen[-1] > 0:
            self.value = self.momentum * self.value + (1 - self.momentum) * seen[:-1] / seen[-1]
        self.sums, self.count = None, 0


@torch.no_grad()
def make_labels(samples: list[Sample], teacher: Teacher, geometry: Geometry | None, config: Distill, precision: contextlib.AbstractContextManager) -> list[Label]:
    """Of every target photo of the samples, in order. Without geometry (method self) the teacher's own features of the target photo."""
    targets = [view for sample in samples for view in sample.targets]
    grids = lambda views: teacher.model.backbone(torch.stack([v.photo for v in views])).float()
    with precision:         # once for all samples, each of which has as many photos
        own = context = None
        if config.method == "self" or config.label.blend < 1 and (config.label.regions == "kmeans" or any(v.labels is None for v in targets)):
            own = grids(targets)
        if config.method != "self":
            context = grids([view for sample in samples for view in sample.contexts]).unflatten(0, (len(samples), -1))
    if config.method == "self":
        return [Label(tokens, _kept(view, tokens)) for tokens, view in zip(own, targets)]
    each = [None] * len(samples) if own is None else own.unflatten(0, (len(samples), -1))
    return [label for sample, tokens, target in zip(samples, context, each)
            for label in labels_of(geometry(sample), tokens, sample.contexts, sample.targets, target, config.label, config.geometry.optimise)]


def _kept(view: View, tokens: Float[Tensor, "h w C"]):
    """Tokens at least half of whose patch a photo's mask keeps."""
    h, w = tokens.shape[:2]
    if view.kept is None:
        return torch.ones(h, w, dtype=torch.bool, device=tokens.device)
    return F.adaptive_avg_pool2d(view.kept[None].float(), (h, w))[0] >= 0.5


def loss_of(samples: list[Sample], student: Callable, own_head: Head | None, teacher: Teacher, labels: list[Label], config: Distill, center: Center, precision,
            tally: Tally) -> Float[Tensor, ""]:
    """The mean over target photos of the mean loss over their valid tokens; a photo without a valid token counts as 0. `student` is the Student, or
    what wraps it for several processes, `own_head` its head.

    The paper's mean is over all tokens at once; a mean of means can be added up over micro-batches and processes without one knowing the others' counts.
    """
    photos = torch.stack([v.photo for sample in samples for v in sample.targets])
    valid = torch.stack([label.valid for label in labels])
    counted_as_zero = config.label.coverage == "zero" and config.method == "geometry"
    with precision:
        tokens, scores = student(photos, valid if counted_as_zero else None)
    wanted = torch.stack([label.tokens for label in labels])
    if counted_as_zero:
        wanted, counts = wanted * valid[..., None], torch.ones_like(valid)
    else:
        counts = valid
    flat = counts.flatten(1)
    if config.loss.kind == "dino":
        with torch.no_grad(), precision:
            theirs = (own_head if config.head.shared else teacher.model.head)(wanted).float()
        if config.loss.centering == "mean":
            center.see(theirs[counts])
        loss, excess = cross_entropy(scores.flatten(0, 2), theirs.flatten(0, 2), config.loss.student_temperature, config.loss.teacher_temperature,
                                     center.value, config.loss.centering == "sinkhorn")
        tally.add(excess=torch.stack([mean_over_valid(e, v) for e, v in zip(excess.view_as(flat), flat)]).mean(),
                  prototype_entropy=prototype_entropy(theirs.flatten(0, 2), config.loss.teacher_temperature))
    else:
        loss = token_losses(config.loss.kind, tokens.flatten(0, 2), wanted.flatten(0, 2))
    norms = tokens.detach().norm(dim=-1)[valid].mean() / wanted.norm(dim=-1)[valid].mean() if bool(valid.any()) else 1.0
    tally.add(valid=valid.float().mean(), norm_ratio=norms, without_valid=(~valid.flatten(1).any(1)).float().mean())
    return torch.stack([mean_over_valid(one, v) for one, v in zip(loss.view_as(flat), flat)]).mean()


def correspondence_loss(samples: list[Sample], student: Callable, precision, tally: Tally) -> Float[Tensor, ""]:
    """Cross-entropy of finding, among all points that both photos see, the feature of the same point in the other photo.

    MEF (You et al. 2024) ranks with SmoothAP where this has the softmax of contrastive learning. Pairs are the target and the first context
    photo; a pair without 2 common points counts as 0.
    """
    pairs = [(sample.targets[0], sample.contexts[0]) for sample in samples]
    with precision:
        tokens, _ = student(torch.stack([view.photo for pair in pairs for view in pair]))
    losses = []
    for (a, b), (fa, fb) in zip(pairs, tokens.unflatten(0, (len(pairs), 2))):
        at_a, at_b = common_points(a, b, *fa.shape[:2])
        tally.add(common_points=len(at_a))
        ones, others = (F.normalize(sample_at(f, at, view), dim=1) for f, at, view in ((fa, at_a, a), (fb, at_b, b)))
        scores = ones @ others.T / MATCH_TEMPERATURE
        same = torch.arange(len(scores), device=scores.device)
        losses.append((F.cross_entropy(scores, same) + F.cross_entropy(scores.T, same)) / 2 if len(same) > 1 else tokens.sum() * 0)
    return torch.stack(losses).mean()


def common_points(a: View, b: View, h: int, w: int) -> tuple[Float[Tensor, "P 2"], Float[Tensor, "P 2"]]:
    """Centres of the h x w patches of `a` whose point `b` sees too, in pixels of each."""
    at = patch_centres(a, h, w)
    z = a.depth[at[:, 1].long(), at[:, 0].long()]
    place, seen = seen_by(at, z, a, b)
    both = (z > 0) & seen
    return at[both], place[both]


def patch_centres(view: View, h: int, w: int) -> Float[Tensor, "P 2"]:
    """Centres of h x w patches of a photo, in its pixels."""
    height, width = view.depth.shape
    y, x = torch.meshgrid((torch.arange(h, device=view.depth.device) + 0.5) * (height / h), (torch.arange(w, device=view.depth.device) + 0.5) * (width / w), indexing="ij")
    return torch.stack([x.flatten(), y.flatten()], dim=1)


def seen_by(at: Float[Tensor, "P 2"], z: Float[Tensor, " P"], a: View, b: View) -> tuple[Float[Tensor, "P 2"], Bool[Tensor, " P"]]:
    """Where the points of `a` at pixel places and camera depths lie in `b`, and which of them `b` sees, by its own depth."""
    height, width = b.depth.shape
    place, depth = project(unproject(a.camera, at, z), b)
    row, column = place[:, 1].floor().long(), place[:, 0].floor().long()
    inside = (depth > 0) & (row >= 0) & (row < height) & (column >= 0) & (column < width)
    surface = b.depth[row.clamp(0, height - 1), column.clamp(0, width - 1)]
    return place, inside & ((surface - depth).abs() < DEPTH_AGREES * depth)


def project(points: Float[Tensor, "P 3"], view: View) -> tuple[Float[Tensor, "P 2"], Float[Tensor, " P"]]:
    """Pixel places and camera depths of world points."""
    K, pose = view.camera.K[0], view.camera.world_to_cam[0]
    local = points @ pose[:3, :3].T + pose[:3, 3]
    return local[:, :2] / local[:, 2:].clamp(min=1e-6) * torch.stack([K[0, 0], K[1, 1]]) + K[:2, 2], local[:, 2]


def sample_at(tokens: Float[Tensor, "h w C"], at: Float[Tensor, "P 2"], view: View) -> Float[Tensor, "P C"]:
    """Features at pixel places, bilinear between the tokens' centres."""
    place = at / at.new_tensor([view.camera.width, view.camera.height]) * 2 - 1
    return F.grid_sample(tokens.permute(2, 0, 1)[None], place[None, None], mode="bilinear", padding_mode="border", align_corners=False)[0, :, 0].T
