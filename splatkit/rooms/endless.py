"""Endless rooms for learning depth: a seed gives a room, cameras close to each other in it, and what they see; what they are like is tested."""
from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from ..camera import Cameras, look_at
from .cast import SOLIDS, Color, Room, RoomViews, Solid, Texture, Vector

NEAREST = 0.5                       # metres: nothing that a camera sees has a smaller depth
BASELINE = (0.07, 0.17)             # of the two outer cameras, in median depths
FOCAL = (0.75, 1.05)                # in widths of the picture
NOISE = 0.01                        # standard deviation in a photo. Without it plain walls are no harder than patterned ones: their faint shading, exact to 24 bits, can be matched
SPREAD_MAX = 0.08                   # coarser than in `cast`, for speed: of pixels of a pattern, the sharpest edges are anti-aliased
TRIES = 2000
PLAIN = "plain"
PATTERNS = ("checker", "stripes", "noise", "noise", "mosaic", "spots", "marble", "planks")


@dataclass(frozen=True)
class Sample:
    """A room, cameras in it, what they see and their photos of it. Cameras 0 and 1 are the outer ones, the others lie between them."""

    seed: int
    room: Room
    cameras: Cameras
    views: RoomViews
    photos: Float[Tensor, "C H W 3"]        # views.color with the noise and the 8 bits of a camera


def samples(seed: int = 0, photos: int = 3, width: int = 256, height: int = 256) -> Iterator[Sample]:
    """Without end: the samples of `seed`, seed + 1, ..."""
    while True:
        yield sample(seed, photos, width, height)
        seed += 1


def sample(seed: int, photos: int = 3, width: int = 256, height: int = 256) -> Sample:
    """The same bits for the same arguments, on one machine."""
    room = endless_room(seed)
    cameras = close_cameras(room, photos, width, height, seed)
    views = room.cast(cameras, SPREAD_MAX)
    grain = torch.from_numpy(np.random.default_rng([seed, 3]).standard_normal(views.color.shape, np.float32))
    return Sample(seed, room, cameras, views, ((views.color + NOISE * grain).clamp(0, 1) * 255).round() / 255)


def close_cameras(room: Room, photos: int, width: int, height: int, seed: int = 0) -> Cameras:
    """Cameras 0 and 1 at a distance of BASELINE and the others on the way between them, looking about the same way; none nearer to anything than NEAREST.

    Raises ValueError where the room has no place for them.
    """
    rng = np.random.default_rng([seed, 1])
    uniform = lambda low, high: float(rng.uniform(low, high))
    for _ in range(TRIES):
        K = _intrinsics(uniform(*FOCAL) * width, width, height)
        eye, aim = _place(room, rng, 0.8, (0.9, 1.75)), _place(room, rng, 0.1, (0.1, 1.3))
        if room.clearance(eye[None])[0] < _room_for(K, width, height) or (aim - eye).norm() < 1.5:
            continue
        preview = Cameras(look_at(eye, aim, _up(rng, 0.0))[None], K[None], width, height).resized(24, 24)
        depth = room.depths(preview)
        low, middle, high = depth.flatten().quantile(depth.new_tensor([0.05, 0.5, 0.95])).tolist()
        if high / low < 1.8:
            continue
        way = eye.new_tensor([rng.choice((-1, 1)), rng.normal(0, 0.25), rng.normal(0, 0.35)]) @ preview.world_to_cam[0, :3, :3]
        way = way * (uniform(*BASELINE) * middle / way.norm())
        between = [-0.5, 0.5, *(uniform(-0.35, 0.35) for _ in range(photos - 2))]
        eyes = torch.stack([eye + t * way for t in between])
        if room.clearance(eyes).min() < _room_for(K, width, height):
            continue
        toe_in = uniform(0, 1)      # 0: parallel; 1: all look at one point
        aims = [aim + (1 - toe_in) * (e - eye) + 0.02 * middle * torch.from_numpy(rng.normal(size=3)) for e in eyes]
        poses = torch.stack([look_at(e, a, _up(rng, 0.03)) for e, a in zip(eyes, aims)])
        return Cameras(poses, K.expand(len(poses), 3, 3).contiguous(), width, height).to(dtype=torch.float32)
    raise ValueError(f"no place for cameras in a room of {room.size} metres with {len(room.solids)} solids, {NEAREST} m from everything")


def ring_cameras(room: Room, photos: int, width: int, height: int, seed: int = 0, step: float = 0.12) -> Cameras:
    """Cameras on an arc around the middle of a room that look across it, neighbours about `step` median depths apart, none nearer to anything than NEAREST.

    Raises ValueError where the room has no place for them.
    """
    rng = np.random.default_rng([seed, 2])
    uniform = lambda low, high: float(rng.uniform(low, high))
    for _ in range(TRIES):
        K = _intrinsics(uniform(*FOCAL) * width, width, height)
        radius, start, z, turn = uniform(0.9, min(room.size[:2]) / 2 - 0.8), uniform(0, 2 * math.pi), uniform(1.2, 1.75), rng.choice((-1, 1))
        aim = torch.tensor([uniform(-0.5, 0.5), uniform(-0.5, 0.5), uniform(0.3, 0.8)], dtype=torch.float64)
        angles = start + turn * min(step * 2.6 / radius, 2 * math.pi / photos) * torch.arange(photos, dtype=torch.float64)
        eyes = torch.stack([radius * angles.cos(), radius * angles.sin(), z + 0.1 * (3 * angles).sin()], dim=1) + 0.02 * torch.from_numpy(rng.normal(size=(photos, 3)))
        if room.clearance(eyes).min() < _room_for(K, width, height):
            continue
        poses = torch.stack([look_at(eye, aim + 0.05 * torch.from_numpy(rng.normal(size=3)), _up(rng, 0.02)) for eye in eyes])
        return Cameras(poses, K.expand(photos, 3, 3).contiguous(), width, height).to(dtype=torch.float32)
    raise ValueError(f"no place for {photos} cameras in a room of {room.size} metres with {len(room.solids)} solids, {NEAREST} m from everything")


def endless_room(seed: int) -> Room:
    """A room with furniture, the same for the same seed: along the walls, standing about, things on top, pictures; about a third of what one sees is plain."""
    rng = np.random.default_rng([seed, 0])
    uniform = lambda low, high: float(rng.uniform(low, high))
    size = uniform(4.6, 7.5), uniform(4.6, 7.5), uniform(2.5, 3.2)
    solids: list[Solid] = []

    def stand(kind, x: float, y: float, z: float, half: Vector, plain: float, yaw: float, size: tuple[float, float] = (0.05, 0.22)) -> None:
        solids.append(Solid(kind, (x, y, z + half[2]), half, _texture(rng, plain, size), yaw))

    def thing(x: float, y: float, z: float, r: float) -> None:
        """Something within r of (x, y) that stands on z."""
        kind = ("sphere", "ellipsoid", "cylinder", "box")[rng.integers(4)]
        half = {"sphere": (r, r, r), "ellipsoid": (r, uniform(0.5, 0.9) * r, uniform(0.5, 1.5) * r), "cylinder": (0.8 * r, 0.8 * r, uniform(0.5, 1.4) * r),
                "box": (uniform(0.4, 0.7) * r, uniform(0.4, 0.7) * r, uniform(0.4, 1.4) * r)}[kind]
        stand(kind, x, y, z, half, 0.3, uniform(0, 2 * math.pi))

    stand("cylinder", uniform(-0.8, 0.8), uniform(-0.8, 0.8), 0.0, (uniform(0.8, 1.5),) * 2 + (0.008,), 0.15, 0.0, (0.15, 0.4))
    for quarter in range(4):                                    # along each wall, seen from the middle of the room
        yaw, far, reach = quarter * math.pi / 2, size[quarter % 2] / 2, size[1 - quarter % 2] / 2 - 0.7
        at = lambda ahead, left: (math.cos(yaw) * ahead - math.sin(yaw) * left, math.sin(yaw) * ahead + math.cos(yaw) * left)
        if rng.random() < 0.85:
            deep, wide, high, left = uniform(0.16, 0.3), uniform(0.35, 0.8), uniform(0.4, 1.0) if rng.random() < 0.75 else uniform(1.6, 2.1), uniform(-reach, reach)
            stand("box", *at(far - deep - 0.02, left), 0.0, (deep, wide, high / 2), 0.4, yaw)
            thing(*at(far - deep, left + uniform(-0.2, 0.2)), high, uniform(0.1, 0.16))
        for _ in range(rng.integers(1, 3)):
            half = (0.015, uniform(0.25, 0.6), uniform(0.2, 0.45))
            stand("box", *at(far - 0.015, uniform(-reach, reach)), uniform(1.1, size[2] - 1.0), half, 0.1, yaw, (0.06, 0.25))
    taken: list[tuple[float, float, float]] = []
    for _ in range(rng.integers(4, 8)):                         # standing about: tables with things on them, seats, balls
        r = uniform(0.2, 0.55)
        x, y = (uniform(-half / 2 + r + 0.5, half / 2 - r - 0.5) for half in size[:2])
        if any(math.hypot(x - x2, y - y2) < r + r2 + 0.05 for x2, y2, r2 in taken):
            continue
        taken.append((x, y, r))
        if r < 0.33:
            thing(x, y, 0.016, r)
            continue
        high, yaw, boxy = uniform(0.35, 0.75), uniform(0, 2 * math.pi), rng.random() < 0.6
        stand("box" if boxy else "cylinder", x, y, 0.016, (0.75 * r, 0.6 * r, high / 2) if boxy else (0.8 * r, 0.8 * r, high / 2), 0.35, yaw)
        for side in (-0.4, 0.4)[:rng.integers(1, 3)]:
            thing(x + side * r * math.cos(yaw), y + side * r * math.sin(yaw), high + 0.016, uniform(0.08, 0.16))
    return Room(size, floor=_texture(rng, 0.1, (0.12, 0.4)), ceiling=_texture(rng, 0.8, (0.2, 0.5)), walls=tuple(_texture(rng, 0.45, (0.1, 0.5)) for _ in range(4)),
                lamp=(uniform(-1, 1), uniform(-1, 1), size[2] - 0.2), solids=tuple(solids))


def plain_pixels(sample: Sample) -> Float[Tensor, "C H W"]:
    """1 where a plain material is seen, else 0."""
    room = sample.room
    return torch.tensor([float(room.texture(i).kind == PLAIN) for i in range(SOLIDS + len(room.solids))])[sample.views.instance]


def _texture(rng: np.random.Generator, plain: float, size: tuple[float, float]) -> Texture:
    """Two colours that differ in brightness; plain with the given probability."""
    kind = PLAIN if rng.random() < plain else PATTERNS[rng.integers(len(PATTERNS))]
    hue, bright = 1 - rng.uniform(0, 0.8) * rng.uniform(0, 1, 3), rng.uniform(0.6, 1.0)
    first = hue / hue.max() * bright
    second = np.clip(rng.uniform(0.15, 0.65) * first + rng.uniform(-0.15, 0.15, 3), 0.03, 1)
    pair: list[Color] = [tuple(float(x) for x in color) for color in (first, second)]
    return Texture(kind, *(pair if rng.random() < 0.5 else pair[::-1]), float(np.exp(rng.uniform(*np.log(size)))))


def _place(room: Room, rng: np.random.Generator, margin: float, heights: tuple[float, float]) -> Float[Tensor, " 3"]:
    xy = [rng.uniform(-half / 2 + margin, half / 2 - margin) for half in room.size[:2]]
    return torch.tensor([*xy, rng.uniform(*heights)], dtype=torch.float64)


def _up(rng: np.random.Generator, roll: float) -> Float[Tensor, " 3"]:
    return torch.tensor([roll * rng.normal(), roll * rng.normal(), 1.0], dtype=torch.float64)


def _intrinsics(focal: float, width: int, height: int) -> Float[Tensor, "3 3"]:
    return torch.tensor([[focal, 0, width / 2], [0, focal, height / 2], [0, 0, 1]], dtype=torch.float64)


def _room_for(K: Float[Tensor, "3 3"], width: int, height: int) -> float:
    """How far from everything a camera must stand so that even in a corner of its picture no depth is below NEAREST."""
    return NEAREST * math.hypot(1, width / 2 / float(K[0, 0]), height / 2 / float(K[1, 1]))
