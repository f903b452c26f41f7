"""What cameras alone say before anything is lifted: how near and far to look, whether views see the same things, and which belong together."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from numpy import ndarray as Array

from ..io.reading import Report, silent
from .posed import View

MARGIN = 1.25               # near and far lie so much beyond the depths of the sparse points, as in training
POINTS_MIN = 20             # sparse points before a view that say how near and far to look
BASELINES = (2.0, 200.0)    # near and far over the distance to the nearest other view, where there are no points
OVERLAP_WARNED = 0.6        # share of a picture
BASELINE_MIN = 1e-4         # over the depth between near and far: below it, two photos are one
BASELINE_WARNED = (0.02, 0.6)


@dataclass(frozen=True)
class Group:
    """Views that go through the network together, and those of them whose Gaussians are kept."""

    views: tuple[int, ...]
    kept: tuple[int, ...]


def centre(view: View) -> Float[Array, " 3"]:
    return -view.world_to_cam[:3, :3].T @ view.world_to_cam[:3, 3]


def distances(views: Sequence[View]) -> Float[Array, "n n"]:
    places = np.stack([centre(view) for view in views])
    return np.linalg.norm(places[:, None] - places[None], axis=2)


def depth_range(views: Sequence[View], points: Float[Array, "P 3"], near: float = 0, far: float = 0, report: Report = silent) -> tuple[float, float]:
    """Near and far for all views: those given, else by the sparse points before them, else by how far they are apart.

    Raises ValueError where near is not below far, or nothing tells views from the same place how far to look.
    """
    said = "as given"
    if not (near and far):
        depths = np.concatenate([np.zeros(0), *(_depths(view, points) for view in views)])
        apart = distances(views)
        apart = float(np.median(np.where(np.eye(len(views), dtype=bool), np.inf, apart).min(axis=1))) if len(views) > 1 else 0.0
        if len(depths) >= POINTS_MIN * len(views):
            low, high = np.quantile(depths, [0.005, 0.995])
            found, said = (low / MARGIN, max(high * MARGIN, 1.5 * low)), f"of {len(depths):,} sightings of sparse points"
        elif apart > 0:
            found, said = (BASELINES[0] * apart, BASELINES[1] * apart), f"{BASELINES[0]:g} and {BASELINES[1]:g} times the distance of {apart:.4g} between neighbours, for want of sparse points"
        else:
            raise ValueError("all photos were taken from one place: nothing tells how far things are; expected photos from places apart")
        said += " (one of them as given)" if near or far else ""
        near, far = near or float(found[0]), far or float(found[1])
    if not 0 < near < far < np.inf:
        raise ValueError(f"near {near:g}, far {far:g}; expected 0 < near < far")
    report(f"depth: looked for from {near:.4g} to {far:.4g}, {said}")
    return near, far


def _depths(view: View, points: Float[Array, "P 3"]) -> Float[Array, " M"]:
    """Camera z of the points within the picture."""
    return _within(points @ view.world_to_cam[:3, :3].T + view.world_to_cam[:3, 3], view)[1]


def _within(in_camera: Float[Array, "P 3"], view: View) -> tuple[Array, Array]:
    """Which points of the camera's frame lie in the picture, and the depths of those."""
    z = in_camera[:, 2]
    ahead = z > 1e-9 * max(1.0, float(np.abs(z).max(initial=0)))
    x, y = (in_camera[:, :2] / np.where(ahead, z, 1)[:, None] * (view.K[0, 0], view.K[1, 1]) + view.K[:2, 2]).T
    inside = ahead & (x >= 0) & (x <= view.width) & (y >= 0) & (y <= view.height)
    return inside, z[inside]


def overlap(a: View, b: View, depth: float) -> float:
    """Share of the picture `a` whose contents, at that depth, `b` sees too."""
    x, y = np.meshgrid((np.arange(16) + 0.5) / 16 * a.width, (np.arange(16) + 0.5) / 16 * a.height)
    rays = np.stack([(x - a.K[0, 2]) / a.K[0, 0], (y - a.K[1, 2]) / a.K[1, 1], np.ones_like(x)], -1).reshape(-1, 3)
    relative = b.world_to_cam @ np.linalg.inv(a.world_to_cam)
    return float(_within(depth * rays @ relative[:3, :3].T + relative[:3, 3], b)[0].mean())


def middle_depth(views: Sequence[View], points: Float[Array, "P 3"], near: float, far: float) -> float:
    """What is taken for the depth of the scene: the median of its points, else the middle of near and far, in proportion."""
    depths = np.concatenate([np.zeros(0), *(_depths(view, points) for view in views)])
    return float(np.clip(np.median(depths), near, far)) if len(depths) >= POINTS_MIN * len(views) else float(np.sqrt(near * far))


def check_pair(a: View, b: View, depth: float, near: float, far: float, report: Report = silent) -> None:
    """Raises ValueError for two views of which nothing can be lifted; `report` is told where it will be poor."""
    apart = float(np.linalg.norm(centre(a) - centre(b)))
    if apart < BASELINE_MIN * depth:
        raise ValueError(f"{a.name} and {b.name} were taken from one place ({apart:.2g} apart, depths about {depth:.3g}): there is no depth in them; expected photos from places apart")
    if max(max(overlap(a, b, z), overlap(b, a, z)) for z in (*np.geomspace(near, far, 9), depth)) == 0:
        degrees = np.degrees(np.arccos(np.clip(a.world_to_cam[2, :3] @ b.world_to_cam[2, :3], -1, 1)))
        raise ValueError(f"{a.name} and {b.name} see nothing in common (they look {degrees:.0f} degrees apart): expected views of the same things; are the poses' axes and directions right?")
    if not BASELINE_WARNED[0] <= apart / depth <= BASELINE_WARNED[1]:
        report(f"{a.name} and {b.name} are {apart / depth:.2g} times the depth apart; {BASELINE_WARNED[0]:g} to {BASELINE_WARNED[1]:g} would be good")
    if (share := min(overlap(a, b, depth), overlap(b, a, depth))) < OVERLAP_WARNED:
        report(f"{a.name} and {b.name} share {share:.0%} of their pictures; {OVERLAP_WARNED:.0%} or more would be good")


def nearest_pairs(views: Sequence[View], depth: float) -> list[tuple[int, int]]:
    """For each view another one to lift it with: the nearest of those that see most of the same and are not at the same place."""
    apart, pairs = distances(views), []
    for i, view in enumerate(views):
        others = [j for j in range(len(views)) if j != i and apart[i, j] >= BASELINE_MIN * depth] or [j for j in range(len(views)) if j != i]
        good = [j for j in others if apart[i, j] >= BASELINE_WARNED[0] * depth and min(overlap(view, views[j], depth), overlap(views[j], view, depth)) >= OVERLAP_WARNED]
        pairs.append((i, min(good, key=lambda j: apart[i, j]) if good else max(others, key=lambda j: (min(overlap(view, views[j], depth), overlap(views[j], view, depth)), -apart[i, j]))))
    return pairs


def grouped(views: Sequence[View], depth: float, near: float, far: float, joint: bool, report: Report = silent) -> list[Group]:
    """All views together (`joint`, or two of them), else each with its nearest; two that are each other's nearest share a pass. Raises as check_pair()."""
    everyone = tuple(range(len(views)))
    pairs = [(i, j) for i in everyone for j in everyone[i + 1:]] if joint or len(views) == 2 else nearest_pairs(views, depth)
    for i, j in pairs:
        if i < j or (j, i) not in pairs:
            check_pair(views[i], views[j], depth, near, far, report)
    if joint or len(views) == 2:
        return [Group(everyone, everyone)]
    return [Group((i, j), (i, j)) if (j, i) in pairs else Group((i, j), (i,)) for i, j in pairs if i < j or (j, i) not in pairs]
