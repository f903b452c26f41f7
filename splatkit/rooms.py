"""Rooms made from a seed, with everything about them known exactly: colour, depth, normals, instances, cameras, surface points.

World: metres, z up, the floor is z = 0, the room's middle x = y = 0. Rays meet surfaces analytically: geometry is exact but for rounding.
"""
from __future__ import annotations

import functools
import math
import struct
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from numpy import ndarray as Array
from PIL import Image
from torch import Tensor

from .camera import Cameras, look_at
from .capture import Capture
from .io.photos import load_capture
from .scene import quat_from_matrix

FLOOR, CEILING, WALLS, SOLIDS = 0, 1, (2, 3, 4, 5), 6      # instance ids: walls at -x, +x, -y, +y; solid i is SOLIDS + i
RAYS_AT_ONCE = 1 << 16                                     # about what the caches hold
SPREAD_MAX = 0.03                                          # pixels that differ more from a neighbour are anti-aliased
AMBIENT, LAMP, FILL = (0.40, 0.38, 0.38), (0.95, 0.86, 0.70), (0.16, 0.18, 0.24)       # linear RGB: sky, warm lamp, cool window
TO_WINDOW = (0.5, -0.8, 0.33)                              # direction of the fill light, which throws no shadow

Vector = tuple[float, float, float]
Color = tuple[float, float, float]                         # sRGB in [0, 1]


@dataclass(frozen=True)
class Texture:
    """A colour for every point of a solid: `first` and `second` in a pattern whose features are `size` metres wide."""

    kind: Literal["plain", "checker", "stripes", "noise", "planks"]
    first: Color
    second: Color = (0.0, 0.0, 0.0)
    size: float = 0.2


@dataclass(frozen=True)
class Solid:
    """A convex body, turned by `yaw` radians about z. `half` are half its sides; a sphere and a cylinder have radius half[0]."""

    kind: Literal["sphere", "box", "cylinder"]
    centre: Vector
    half: Vector
    texture: Texture
    yaw: float = 0.0

    @property
    def is_flat(self) -> bool:
        """Rugs and pictures throw no shadow."""
        return min(self.half) <= 0.02

    def turned(self, v: Float[Tensor, "3 R"], sign: int = 1) -> Float[Tensor, "3 R"]:
        """Vectors in the solid's axes taken to the world's; with sign -1 the way back."""
        c, s = math.cos(self.yaw), sign * math.sin(self.yaw)
        return torch.stack([c * v[0] - s * v[1], s * v[0] + c * v[1], v[2]])

    def meet(self, origin: Float[Tensor, "3 1"], directions: Float[Tensor, "3 R"]) -> tuple[Float[Tensor, " R"], Float[Tensor, "3 R"]]:
        """Distance at which rays from one point outside enter the solid (inf: they miss), and the outward normal there."""
        d = self.turned(directions, -1)
        o = self.turned(origin - _column(self.centre, origin), -1)
        half = _column(self.half, origin)
        if self.kind == "sphere":
            along = -(d * o).sum(0)
            inside = half[0] ** 2 - (o + along * d).square().sum(0)
            t = along - inside.sqrt()                           # NaN: missed
            normal = (o + t * d) / half[0]
        else:
            # Convex, so a ray is inside from its last entry into a slab (or the cylinder's wall) to its first exit from one.
            d = torch.where(d.abs() < 1e-12, 1e-12, d)          # parallel to a slab: it is entered long ago or never, without 0 / 0
            middle, reach = -o / d, half / d.abs()
            if self.kind == "cylinder":
                a, b = d[:2].square().sum(0), (d[:2] * o[:2]).sum(0)
                root = (b * b - a * (o[:2].square().sum() - half[0] ** 2)).sqrt()       # NaN: missed
                middle, reach = torch.stack([-b / a, middle[2]]), torch.stack([root / a, reach[2]])
            t, axis = (middle - reach).max(0)                   # max and min hand a NaN on
            t = torch.where(t < (middle + reach).amin(0), t, math.nan)
            normal = _along(axis, -d.sign())
            if self.kind == "cylinder":
                normal = torch.where(axis == 0, (o + t * d) * _column((1, 1, 0), o) / half[0], -d.sign() * _column((0, 0, 1), o))
        return torch.where(t > 0, t, math.inf), self.turned(normal)


@dataclass(frozen=True)
class RoomViews:
    """What C cameras see along the rays through the pixels' centres; where neighbours differ, colour is the mean of 2 x 2 rays instead."""

    color: Float[Tensor, "C H W 3"]         # sRGB in [0, 1]
    depth: Float[Tensor, "C H W"]           # camera z, metres
    normals: Float[Tensor, "C H W 3"]       # world, unit length, towards the camera
    instance: Int[Tensor, "C H W"]          # FLOOR, CEILING, one of WALLS, or SOLIDS + index in Room.solids


@dataclass(frozen=True)
class Room:
    """A box-shaped room seen from inside, with solids in it, a lamp and a window."""

    size: Vector
    floor: Texture
    ceiling: Texture
    walls: Texture
    lamp: Vector
    solids: tuple[Solid, ...] = ()

    def cast(self, cameras: Cameras) -> RoomViews:
        """Pictures and exact geometry. Cameras must stand inside the room and outside its solids; their dtype is that of the results."""
        # On a CPU one photo per thread: torch's own threads gain nothing on operations this small, and lose eightfold on a busy machine.
        threads, on_cpu = torch.get_num_threads(), cameras.device.type == "cpu"
        torch.set_num_threads(1 if on_cpu else threads)
        try:
            with ThreadPoolExecutor(threads if on_cpu else 1) as pool:
                views = list(pool.map(self._view, (cameras[c] for c in range(len(cameras)))))
        finally:
            torch.set_num_threads(threads)
        return RoomViews(*(torch.stack(part) for part in zip(*views)))

    def _view(self, camera: Cameras) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        eye, rotation, K = camera.centres[0][:, None], camera.world_to_cam[0, :3, :3], camera.K[0]
        shape = camera.height, camera.width
        y, x = (i.flatten().to(eye) for i in torch.meshgrid(*map(torch.arange, shape), indexing="ij"))

        def look(x: Tensor, y: Tensor) -> list[Tensor]:
            local = torch.stack([(x - K[0, 2]) / K[0, 0], (y - K[1, 2]) / K[1, 1], torch.ones_like(x)])
            seen = [self.look(eye, rays) for rays in (rotation.T @ _unit(local)).split(RAYS_AT_ONCE, dim=1)]
            color, distance, normals, instance = (torch.cat(part, dim=-1) for part in zip(*seen))
            return [color, distance / local.norm(dim=0), normals, instance]

        color, depth, normals, instance = look(x + 0.5, y + 0.5)
        spread = F.max_pool2d(color.view(3, *shape), 3, 1, 1) + F.max_pool2d(-color.view(3, *shape), 3, 1, 1)
        rough = (spread.amax(0).flatten() > SPREAD_MAX).nonzero().squeeze(1)
        if len(rough):
            corners = [(x[rough] + dx, y[rough] + dy) for dx in (0.25, 0.75) for dy in (0.25, 0.75)]
            color[:, rough] = look(*map(torch.cat, zip(*corners)))[0].view(3, 4, -1).mean(1)
        return color.T.view(*shape, 3), depth.view(shape), normals.T.view(*shape, 3), instance.view(shape)

    def trace(self, origin: Float[Tensor, "3 1"],
              directions: Float[Tensor, "3 R"]) -> tuple[Float[Tensor, " R"], Float[Tensor, "3 R"], Int[Tensor, " R"]]:
        """Distance, normal and instance of what unit rays from one point inside the room meet first."""
        half = _column(self.size, origin) / 2
        o = origin - _column((0, 0, self.size[2] / 2), origin)
        sign = directions.sign()
        distance, axis = ((half * sign - o) / directions).where(sign != 0, math.inf).min(0)
        normals = _along(axis, -sign)
        positive = normals.sum(0) < 0
        instance = torch.where(axis == 2, torch.where(positive, CEILING, FLOOR), WALLS[0] + 2 * axis + positive)
        for i, near in self._near(origin, directions, self.solids):
            t, normal = self.solids[i].meet(origin, directions.index_select(1, near))
            nearer = (t < distance[near]).nonzero().squeeze(1)
            near = near[nearer]
            distance[near], normals[:, near], instance[near] = t[nearer], normal[:, nearer], SOLIDS + i
        return distance, normals, instance

    def _near(self, origin, directions, solids):
        """For each solid that some rays from a point may meet: its index, and which rays, by its bounding sphere."""
        if not solids:
            return
        to_centre = directions.new_tensor([s.centre for s in solids]) - origin.T
        radius = directions.new_tensor([1.001 * (s.half[0] if s.kind == "sphere" else math.hypot(*s.half)) for s in solids])
        tangent = (to_centre.square().sum(1) - radius * radius).clamp(min=0).sqrt()
        solid, ray = (to_centre @ directions > tangent[:, None]).nonzero(as_tuple=True)
        yield from ((i, rays) for i, rays in enumerate(ray.split(solid.bincount(minlength=len(solids)).tolist())) if len(rays))

    def look(self, origin: Float[Tensor, "3 1"], directions: Float[Tensor, "3 R"]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What `trace` says, with the sRGB that the rays see before it. Surfaces are diffuse: a point has one colour from every side."""
        distance, normals, instance = self.trace(origin, directions)
        points = origin + distance * directions
        lamp = _column(self.lamp, origin)
        from_lamp = points - lamp
        range_ = from_lamp.square().sum(0).sqrt()
        from_lamp = from_lamp / range_
        lamplight = -(normals * from_lamp).sum(0).clamp(max=0) * (13.5 / (9 + range_ * range_))
        thick = [solid for solid in self.solids if not solid.is_flat]
        for i, near in self._near(lamp, from_lamp, thick):
            near = near[lamplight[near] > 0]
            lamplight[near] *= thick[i].meet(lamp, from_lamp.index_select(1, near))[0] > range_[near] - 2e-3
        window = (normals * _unit(_column(TO_WINDOW, origin))).sum(0).clamp(min=0)
        strengths = (AMBIENT, self.openness(points, normals)), (LAMP, lamplight), (FILL, window)
        light = sum(_column(color, origin) * strength for color, strength in strengths)
        return (self.albedo(points, instance) * light).clamp(0, 1).sqrt(), distance, normals, instance

    def openness(self, points: Float[Tensor, "3 R"], normals: Float[Tensor, "3 R"]) -> Float[Tensor, " R"]:
        """About which share of the room's ambient light reaches a surface: less near corners and beside solids."""
        half = _column(self.size, points) / 2
        gaps = half - (points - _column((0, 0, self.size[2] / 2), points)).abs()
        out = (1 - 0.28 * torch.exp(gaps / -0.35) * (normals.abs() < 0.5)).prod(0)
        if not (thick := [solid for solid in self.solids if not solid.is_flat]):
            return out
        # The share of the sky that a sphere of the solid's volume takes; from a point of its own surface it takes none.
        centres = points.new_tensor([solid.centre for solid in thick])
        radius2 = points.new_tensor([math.prod(solid.half) ** (2 / 3) for solid in thick])[:, None]
        squared = (points.square().sum(0) - 2 * centres @ points).add_(centres.square().sum(1, keepdim=True)).clamp_(min=1e-4)
        facing = (centres @ normals).sub_((points * normals).sum(0)).clamp_(min=0)
        taken = facing.mul_(radius2).mul_(squared.rsqrt()).div_(torch.maximum(squared, radius2))
        return out * taken.mul_(-0.8).add_(1).prod(0)

    def albedo(self, points: Float[Tensor, "3 R"], instance: Int[Tensor, " R"]) -> Float[Tensor, "3 R"]:
        """Linear RGB reflectance of surface points."""
        out = torch.empty_like(points)
        for i in instance.bincount().nonzero().squeeze(1).tolist():
            rows = (instance == i).nonzero().squeeze(1)
            local = points.index_select(1, rows)
            texture = self.floor if i == FLOOR else self.ceiling if i == CEILING else self.walls
            if i >= SOLIDS:
                solid = self.solids[i - SOLIDS]
                local, texture = solid.turned(local - _column(solid.centre, local), -1), solid.texture
            out[:, rows] = _paint(texture, local)
        return out.square()


def _column(v: Vector, like: Tensor) -> Float[Tensor, "3 1"]:
    return like.new_tensor(v)[:, None]


def _unit(v: Float[Tensor, "3 R"]) -> Float[Tensor, "3 R"]:
    return v * v.square().sum(0).rsqrt()        # five times faster than F.normalize along the first dimension


def _along(axis: Int[Tensor, " R"], v: Float[Tensor, "3 R"]) -> Float[Tensor, "3 R"]:
    """v with all but the given coordinate set to zero."""
    return v * (torch.arange(3, device=v.device)[:, None] == axis)


def _paint(texture: Texture, p: Float[Tensor, "3 R"]) -> Float[Tensor, "3 R"]:
    """sRGB of a texture at points in the axes of what carries it."""
    q = p / texture.size + 0.37                 # an offset, so that no flat side lies on the boundary between two cells
    if texture.kind == "checker":
        mix = q.floor().sum(0) % 2
    elif texture.kind == "stripes":
        mix = (q[0] + q[1] + 0.5 * q[2]).floor() % 2
    elif texture.kind == "noise":
        mix = (0.5 * _noise(q) + 0.3 * _noise(2.1 * q) + 0.2 * _noise(4.3 * q) - 0.2) / 0.6
    elif texture.kind == "planks":
        plank = q[0].floor()
        along = q[1] / 6 + 0.37 * plank
        tone = _noise(torch.stack([plank * 3.3, along.floor() * 5.7, torch.full_like(plank, 0.5)]))
        grain = _noise(q * _column((7.0, 0.6, 1.0), q) + 20 * tone)
        seam = (q[0] % 1 < 0.05) | (along % 1 < 0.008)
        mix = (0.6 * tone + 0.4 * grain).where(~seam, 1.4)
    else:
        mix = torch.zeros_like(q[0])
    first, second = _column(texture.first, q), _column(texture.second, q)
    return (first + mix.clamp(0, 1.4) * (second - first)).clamp(0.01, 1)


@functools.cache
def _lattice() -> Float[Tensor, "33 33 33"]:
    values = torch.rand(32, 32, 32, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    return F.pad(values[None, None], (0, 1, 0, 1, 0, 1), mode="circular")[0, 0]


def _noise(p: Float[Tensor, "3 R"]) -> Float[Tensor, " R"]:
    """Value noise in [0, 1]: random numbers on the integer lattice (period 32), smoothly interpolated."""
    f = p - p.floor()
    place = ((p.floor() % 32 + f * f * (3 - 2 * f)) / 16 - 1).T.reshape(1, 1, 1, -1, 3)
    return F.grid_sample(_lattice().to(p)[None, None], place, align_corners=True).view(-1)


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


def write_capture(folder: Path, room: Room | None = None, photos: int = 24, width: int = 200, height: int = 150, seed: int = 0,
                  points: int = 4000) -> Capture:
    """`folder`/images and a COLMAP model in `folder`/sparse/0 of a room (by default make_room(seed)), read back by io.photos.load_capture.

    The model is what structure from motion would find, without its errors: poses, one PINHOLE camera, about `points` surface points
    with the colour of a photo at that place and a track through every photo that sees them (at least two).
    """
    room, folder, cameras = room or make_room(seed), Path(folder), orbit(photos, width, height, seed)
    views = room.cast(cameras.to(dtype=torch.float32))
    pixels = (views.color * 255).round().to(torch.uint8)
    names = [f"{i:03d}.png" for i in range(photos)]
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for name, image in zip(names, pixels):
        Image.fromarray(image.numpy()).save(folder / "images" / name)

    generator = torch.Generator().manual_seed(seed)
    draw = lambda high: torch.randint(high, (points,), generator=generator)
    photo, y, x = draw(photos), draw(height), draw(width)
    K, rotation, eyes = cameras.K[0], cameras.world_to_cam[:, :3, :3], cameras.centres
    local = torch.stack([(x + 0.5 - K[0, 2]) / K[0, 0], (y + 0.5 - K[1, 2]) / K[1, 1], torch.ones(points)], dim=1).double()
    xyz = torch.einsum("pji,pj->pi", rotation[photo], local * views.depth[photo, y, x, None].double()) + eyes[photo]
    places, seen = zip(*(_see(room, cameras[c], xyz) for c in range(photos)))
    kept = torch.stack(seen).sum(0) >= 2
    tracks = torch.stack(seen)[:, kept].numpy()
    _write_model(folder / "sparse" / "0", cameras, names, xyz[kept].numpy(), pixels[photo, y, x][kept].numpy(),
                 torch.stack(places)[:, kept].numpy(), tracks)
    return load_capture(folder)


def _see(room: Room, camera: Cameras, xyz: Float[Tensor, "P 3"]) -> tuple[Float[Tensor, "P 2"], Bool[Tensor, " P"]]:
    """Where one camera sees surface points, in pixels, and which of them it does see: in the picture and not hidden."""
    eye = camera.centres[0][:, None]
    local = camera.world_to_cam[0, :3, :3] @ (xyz.T - eye)
    place = (camera.K[0] @ local)[:2] / local[2]
    seen = (local[2] > 0.05) & (place > 0.5).all(0) & (place[0] < camera.width - 0.5) & (place[1] < camera.height - 0.5)
    to_point, distance = _unit(xyz[seen].T - eye), local[:, seen].norm(dim=0)
    seen[seen.clone()] = room.trace(eye, to_point)[0] > distance - 1e-4
    return place.T, seen


def _write_model(folder: Path, cameras: Cameras, names: list[str], xyz: Array, rgb: Array, places: Array, tracks: Array) -> None:
    """A COLMAP binary model. places [C, P, 2] in pixels; tracks [C, P]: which photo sees which point. Ids count from 1."""
    folder.mkdir(parents=True, exist_ok=True)
    K = cameras.K[0].tolist()
    camera = struct.pack("<QiiQQ4d", 1, 1, 1, cameras.width, cameras.height, K[0][0], K[1][1], K[0][2], K[1][2])      # model 1 is PINHOLE
    images, index = [struct.pack("<Q", len(names))], np.cumsum(tracks, axis=1) - 1       # index: a point's place in a photo's list
    for c, name in enumerate(names):
        pose = torch.cat([quat_from_matrix(cameras.world_to_cam[c, :3, :3]), cameras.world_to_cam[c, :3, 3]])
        images.append(struct.pack("<i7di", c + 1, *pose.tolist(), 1) + name.encode() + b"\0")
        observed = np.zeros(tracks[c].sum(), dtype=[("place", "<f8", 2), ("point", "<i8")])
        observed["place"], observed["point"] = places[c, tracks[c]], np.flatnonzero(tracks[c]) + 1
        images.append(struct.pack("<Q", len(observed)) + observed.tobytes())
    points = [struct.pack("<Q", len(xyz))]
    for p in range(len(xyz)):
        seen_by = np.flatnonzero(tracks[:, p])
        track = np.stack([seen_by + 1, index[seen_by, p]], axis=1).astype("<i4")
        points.append(struct.pack("<Q3d3BdQ", p + 1, *xyz[p], *rgb[p], 0.0, len(track)) + track.tobytes())
    for name, parts in (("cameras", [camera]), ("images", images), ("points3D", points)):
        (folder / f"{name}.bin").write_bytes(b"".join(parts))
