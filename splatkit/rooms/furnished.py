"""Rooms to photograph from all around: furniture and things about a table in the middle, and a ring of cameras that looks at it."""
from __future__ import annotations

import math

import numpy as np
import torch

from ..camera import Cameras, look_at
from .cast import Color, Room, Solid, Texture, Vector

PALETTE: tuple[tuple[Color, Color], ...] = (        # pairs that are told apart in lamplight
    ((0.86, 0.34, 0.22), (0.97, 0.82, 0.58)), ((0.16, 0.42, 0.50), (0.86, 0.90, 0.82)), ((0.90, 0.66, 0.20), (0.52, 0.25, 0.12)),
    ((0.36, 0.52, 0.30), (0.84, 0.86, 0.60)), ((0.58, 0.22, 0.36), (0.95, 0.74, 0.70)), ((0.20, 0.26, 0.48), (0.92, 0.80, 0.50)),
    ((0.93, 0.88, 0.78), (0.60, 0.42, 0.28)), ((0.30, 0.60, 0.62), (0.96, 0.94, 0.86)))
WOOD = ((0.80, 0.58, 0.36), (0.46, 0.28, 0.15)), ((0.72, 0.50, 0.34), (0.36, 0.22, 0.14)), ((0.86, 0.70, 0.50), (0.58, 0.40, 0.24))
WALL_COLORS = (((0.93, 0.87, 0.76), (0.88, 0.80, 0.68)), ((0.80, 0.86, 0.82), (0.72, 0.79, 0.74)), ((0.92, 0.82, 0.76), (0.86, 0.73, 0.66)),
               ((0.84, 0.86, 0.90), (0.74, 0.78, 0.85)))


def make_room(seed: int = 0) -> Room:
    """A furnished room, the same for the same seed: a rug, a table with things on it, things around it, pictures on the walls."""
    rng = np.random.default_rng(seed)
    uniform = lambda low, high: float(rng.uniform(low, high))
    pick = lambda options: options[rng.integers(len(options))]
    pairs = [PALETTE[i] for i in rng.permutation(len(PALETTE))]
    solids: list[Solid] = []

    def texture(kinds=("checker", "stripes", "noise", "noise", "plain"), size=(0.08, 0.16)) -> Texture:
        pair = pairs[len(solids) % len(pairs)]
        return Texture(pick(kinds), *(pair if rng.random() < 0.5 else pair[::-1]), uniform(*size))

    at = lambda yaw, ahead, left: (math.cos(yaw) * ahead - math.sin(yaw) * left, math.sin(yaw) * ahead + math.cos(yaw) * left)

    def stand(kind, x, y, z, half: Vector, paint: Texture, yaw=None) -> None:
        solids.append(Solid(kind, (x, y, z + half[2]), half, paint, uniform(0, 2 * math.pi) if yaw is None else yaw))

    size = uniform(5.6, 6.4), uniform(5.6, 6.4), uniform(2.6, 2.9)
    stand("cylinder", 0.0, 0.0, 0.0, (1.5, 1.5, 0.008), texture(("noise", "stripes", "checker"), (0.22, 0.34)))
    wood, top, width = pick(WOOD), uniform(0.40, 0.52), uniform(0.46, 0.56)
    if rng.random() < 0.5:
        stand("cylinder", 0.0, 0.0, 0.016, (0.09, 0.09, (top - 0.066) / 2), Texture("plain", wood[1]))
        stand("cylinder", 0.0, 0.0, top - 0.05, (width, width, 0.025), Texture("planks", *wood, 0.12))
    else:
        stand("box", 0.0, 0.0, 0.016, (width * 0.8, width * 0.8, (top - 0.016) / 2), Texture("planks", *wood, 0.12), uniform(-0.5, 0.5))

    def thing(x, y, z, r, tallest) -> None:
        """Something within r of (x, y) that stands on z."""
        kind, height = ("sphere", "cylinder", "box")[len(solids) % 3], uniform(0.25, 0.5) * tallest
        wide, deep = {"sphere": (0.9, 0.9), "cylinder": (0.75, 0.75), "box": (uniform(0.5, 0.7), uniform(0.5, 0.7))}[kind]
        stand(kind, x, y, z, (wide * r, deep * r, wide * r if kind == "sphere" else height), texture())

    turn = uniform(0, 2 * math.pi)
    for count, near, far, z, smallest, largest, tallest in ((3, 0.24, 0.24, top, 0.13, 0.17, 0.34), (5, 0.95, 1.15, 0.016, 0.2, 0.3, 0.6)):
        for i in range(count):                  # on the table, then around it
            angle, distance = turn + 2 * math.pi * i / count + uniform(-0.2, 0.2), uniform(near, far)
            thing(*at(angle, distance, 0.0), z, uniform(smallest, largest), tallest)
    for quarter in range(4):                    # along each wall, seen from the middle of the room: a sideboard and pictures
        yaw, far = quarter * math.pi / 2, size[quarter % 2] / 2
        side, high = pick((-1, 1)), uniform(0.4, 0.65)
        stand("box", *at(yaw, far - 0.18, side * 1.1), 0.0, (0.16, uniform(0.45, 0.6), high / 2), Texture("planks", *pick(WOOD), 0.15), yaw)
        thing(*at(yaw, far - 0.18, side * uniform(0.95, 1.25)), high, 0.15, 0.4)
        for sideways in (side * 1.1, side * uniform(-0.9, -0.7)):
            half, picture = (0.02, uniform(0.35, 0.55), uniform(0.22, 0.32)), texture(("noise", "checker", "stripes"), (0.12, 0.22))
            stand("box", *at(yaw, far - 0.02, sideways), uniform(0.95, 1.05), half, picture, yaw)
    return Room(size, floor=Texture("planks", *pick(WOOD), uniform(0.14, 0.2)), ceiling=Texture("plain", (0.95, 0.94, 0.90)),
                walls=Texture(pick(("stripes", "noise")), *pick(WALL_COLORS), uniform(0.3, 0.5)),
                lamp=(uniform(-0.7, 0.7), uniform(-0.7, 0.7), size[2] - 0.25), solids=tuple(solids))


def orbit(photos: int, width: int, height: int, seed: int = 0, turn_degrees: float = 360.0) -> Cameras:
    """Cameras on a jittered ring of 2 m around the middle of a room, at heights from 1.1 to 1.6 m, that look inward and down."""
    rng = np.random.default_rng(seed)
    poses, up = [], torch.tensor([0.0, 0, 1], dtype=torch.float64)
    for i in range(photos):
        angle = math.radians(turn_degrees) * i / photos + rng.uniform(-0.04, 0.04)
        radius, z = 2.0 + rng.uniform(-0.1, 0.1), 1.35 + 0.25 * math.sin(2 * angle + 1) + rng.uniform(-0.03, 0.03)
        eye = torch.tensor([radius * math.cos(angle), radius * math.sin(angle), z], dtype=torch.float64)
        target = torch.tensor([rng.uniform(-0.1, 0.1), rng.uniform(-0.1, 0.1), 0.55 + rng.uniform(-0.03, 0.03)], dtype=torch.float64)
        poses.append(look_at(eye, target, up))
    K = torch.tensor([[0.8 * width, 0, width / 2], [0, 0.8 * width, height / 2], [0, 0, 1]], dtype=torch.float64)
    return Cameras(torch.stack(poses), K.expand(photos, 3, 3).contiguous(), width, height)
