"""Rooms made from a seed, with everything about them known exactly: colour, depth, normals, instances, cameras, surface points.

World: metres, z up, the floor is z = 0, the room's middle x = y = 0. Rays meet surfaces analytically: geometry is exact but for rounding.
"""
from __future__ import annotations

import functools
import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ..camera import Cameras, unproject

FLOOR, CEILING, WALLS, SOLIDS = 0, 1, (2, 3, 4, 5), 6      # instance ids: walls at -x, +x, -y, +y; solid i is SOLIDS + i
RAYS_AT_ONCE = 1 << 16                                     # about what the caches hold
SPREAD_MAX = 0.03                                          # pixels that differ more from a neighbour are anti-aliased, unless asked otherwise
AMBIENT, LAMP, FILL = (0.40, 0.38, 0.38), (0.95, 0.86, 0.70), (0.16, 0.18, 0.24)       # linear RGB: sky, warm lamp, cool window
TO_WINDOW = (0.5, -0.8, 0.33)                              # direction of the fill light, which throws no shadow

Vector = tuple[float, float, float]
Color = tuple[float, float, float]                         # sRGB in [0, 1]


@dataclass(frozen=True)
class Texture:
    """A colour for every point of a solid: `first` and `second` in a pattern whose features are `size` metres wide."""

    kind: Literal["plain", "checker", "stripes", "noise", "planks", "mosaic", "spots", "marble"]
    first: Color
    second: Color = (0.0, 0.0, 0.0)
    size: float = 0.2


@dataclass(frozen=True)
class Solid:
    """A convex body, turned by `yaw` radians about z. `half` are half its sides or axes; a sphere and a cylinder have radius half[0]."""

    kind: Literal["sphere", "ellipsoid", "box", "cylinder"]
    centre: Vector
    half: Vector
    texture: Texture
    yaw: float = 0.0

    @property
    def is_flat(self) -> bool:
        """Rugs and pictures throw no shadow."""
        return min(self.half) <= 0.02

    def distance(self, points: Float[Tensor, "P 3"]) -> Float[Tensor, " P"]:
        """From points outside to the surface; of an ellipsoid a lower bound. Below 0 inside."""
        local, half = self.turned(points.T - _column(self.centre, points.T), -1), _column(self.half, points.T)
        if self.kind in ("sphere", "ellipsoid"):
            half = half if self.kind == "ellipsoid" else half[:1]
            return ((local / half).norm(dim=0) - 1) * half.min()
        gaps = local.abs() - half
        if self.kind == "cylinder":
            gaps = torch.stack([local[:2].norm(dim=0) - half[0], gaps[2]])
        return gaps.clamp(min=0).norm(dim=0) + gaps.amax(0).clamp(max=0)

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
        elif self.kind == "ellipsoid":
            d, o = d / half, o / half                           # where it is a unit sphere
            a, b = d.square().sum(0), (d * o).sum(0)
            t = (-b - (b * b - a * (o.square().sum() - 1)).sqrt()) / a
            normal = _unit((o + t * d) / half)
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
    walls: Texture | tuple[Texture, Texture, Texture, Texture]      # of all four, or of each in the order of WALLS
    lamp: Vector
    solids: tuple[Solid, ...] = ()

    def cast(self, cameras: Cameras, spread_max: float = SPREAD_MAX) -> RoomViews:
        """Pictures and exact geometry. Cameras must stand inside the room and outside its solids; their dtype is that of the results.

        A pixel's colour is the mean of 2 x 2 rays where it differs by more than `spread_max` from a neighbour's.
        """
        # On a CPU one photo per thread: torch's own threads gain nothing on operations this small, and lose eightfold on a busy machine.
        threads, on_cpu = torch.get_num_threads(), cameras.device.type == "cpu"
        torch.set_num_threads(1 if on_cpu else threads)
        try:
            with ThreadPoolExecutor(threads if on_cpu else 1) as pool:
                views = list(pool.map(lambda c: self._view(cameras[c], spread_max), range(len(cameras))))
        finally:
            torch.set_num_threads(threads)
        return RoomViews(*(torch.stack(part) for part in zip(*views)))

    def _view(self, camera: Cameras, spread_max: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        eye, rotation, K = camera.centres[0][:, None], camera.world_to_cam[0, :3, :3], camera.K[0]
        shape = camera.height, camera.width
        y, x = (i.flatten().to(eye) for i in torch.meshgrid(*map(torch.arange, shape), indexing="ij"))

        def look(x: Tensor, y: Tensor) -> tuple[list[Tensor], Tensor]:
            local = torch.stack([(x - K[0, 2]) / K[0, 0], (y - K[1, 2]) / K[1, 1], torch.ones_like(x)])
            seen = [self.look(eye, rays) for rays in (rotation.T @ _unit(local)).split(RAYS_AT_ONCE, dim=1)]
            return [torch.cat(part, dim=-1) for part in zip(*seen)], local

        (color, distance, normals, instance), local = look(x + 0.5, y + 0.5)
        depth = distance / local.norm(dim=0)
        spread = _most_around(color.view(3, *shape)) + _most_around(-color.view(3, *shape))
        rough = (spread.amax(0).flatten() > spread_max).nonzero().squeeze(1)
        if len(rough):
            corners = [(x[rough] + dx, y[rough] + dy) for dx in (0.25, 0.75) for dy in (0.25, 0.75)]
            color[:, rough] = look(*map(torch.cat, zip(*corners)))[0][0].view(3, 4, -1).mean(1)
        return color.T.view(*shape, 3), depth.view(shape), normals.T.view(*shape, 3), instance.view(shape)

    def depths(self, camera: Cameras) -> Float[Tensor, "H W"]:
        """What `cast` says of depth alone, for one camera."""
        eye = camera.centres[0][:, None]
        away = unprojected(camera, eye.new_ones(camera.height, camera.width)).view(-1, 3).T - eye
        distance = self.trace(eye, _unit(away))[0]
        return (distance / away.square().sum(0).sqrt()).view(camera.height, camera.width)

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
        radius = directions.new_tensor([1.001 * (s.half[0] if s.kind == "sphere" else max(s.half) if s.kind == "ellipsoid" else math.hypot(*s.half)) for s in solids])
        tangent = (to_centre.square().sum(1) - radius * radius).clamp(min=0).sqrt()
        solid, ray = (to_centre @ directions > tangent[:, None]).nonzero(as_tuple=True)
        yield from ((i, rays) for i, rays in enumerate(ray.split(solid.bincount(minlength=len(solids)).tolist())) if len(rays))

    def sees(self, camera: Cameras, xyz: Float[Tensor, "P 3"], tolerance: float = 1e-4) -> tuple[Float[Tensor, "P 2"], Bool[Tensor, " P"]]:
        """Where one camera sees surface points, in pixels, and which of them it does see: in the picture and not hidden by more than `tolerance` metres."""
        eye = camera.centres[0][:, None]
        local = camera.world_to_cam[0, :3, :3] @ (xyz.T - eye)
        place = (camera.K[0] @ local)[:2] / local[2]
        seen = (local[2] > 0.05) & (place > 0.5).all(0) & (place[0] < camera.width - 0.5) & (place[1] < camera.height - 0.5)
        to_point, distance = _unit(xyz[seen].T - eye), local[:, seen].norm(dim=0)
        seen[seen.clone()] = self.trace(eye, to_point)[0] > distance - tolerance
        return place.T, seen

    def correspondences(self, a: Cameras, b: Cameras, depth: Float[Tensor, "H W"]) -> tuple[Float[Tensor, "H W 2"], Bool[Tensor, "H W"]]:
        """For every pixel of camera a, whose depths are given, the place in camera b where the same surface point lies, in pixels, and whether b sees it."""
        place, seen = self.sees(b, unprojected(a, depth).view(-1, 3), tolerance=2e-3)
        return place.view(*depth.shape, 2), seen.view(depth.shape)

    def clearance(self, points: Float[Tensor, "P 3"]) -> Float[Tensor, " P"]:
        """Distance of points to the nearest wall or solid, metres; below 0 outside the room or inside a solid."""
        half = _column(self.size, points.T) / 2
        walls = (half - (points.T - _column((0, 0, self.size[2] / 2), points.T)).abs()).amin(0)
        return torch.stack([walls, *(solid.distance(points) for solid in self.solids)]).amin(0)

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
            if i >= SOLIDS:
                solid = self.solids[i - SOLIDS]
                local = solid.turned(local - _column(solid.centre, local), -1)
            out[:, rows] = _paint(self.texture(i), local)
        return out.square()

    def texture(self, instance: int) -> Texture:
        """What an instance id is made of."""
        if instance >= SOLIDS:
            return self.solids[instance - SOLIDS].texture
        walls = (self.walls,) * 4 if isinstance(self.walls, Texture) else self.walls
        return (self.floor, self.ceiling, *walls)[instance]


def unprojected(camera: Cameras, depth: Float[Tensor, "H W"]) -> Float[Tensor, "H W 3"]:
    """World points at the given depths on the rays through the pixels' centres of one camera."""
    y, x = torch.meshgrid(*(torch.arange(n).to(depth) + 0.5 for n in depth.shape), indexing="ij")
    return unproject(camera, torch.stack([x, y], dim=-1), depth)


def _column(v: Vector, like: Tensor) -> Float[Tensor, "3 1"]:
    return like.new_tensor(v)[:, None]


def _unit(v: Float[Tensor, "3 R"]) -> Float[Tensor, "3 R"]:
    return v * v.square().sum(0).rsqrt()        # five times faster than F.normalize along the first dimension


def _most_around(x: Float[Tensor, "3 H W"]) -> Float[Tensor, "3 H W"]:
    """The largest value in 3 x 3 pixels around each: what max_pool2d gives, eight times as fast."""
    for dim in (1, 2):
        if n := x.shape[dim] - 1:
            pairs = torch.maximum(x.narrow(dim, 0, n), x.narrow(dim, 1, n))
            inner = torch.maximum(pairs.narrow(dim, 0, n - 1), pairs.narrow(dim, 1, n - 1))
            x = torch.cat([pairs.narrow(dim, 0, 1), inner, pairs.narrow(dim, n - 1, 1)], dim)
    return x


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
    elif texture.kind == "mosaic":
        mix = _noise(q.floor())
    elif texture.kind == "spots":
        mix = ((q % 1 - 0.5).square().sum(0) < 0.18).to(q)
    elif texture.kind == "marble":
        mix = 0.5 + 0.5 * torch.sin(2 * math.pi * (q[0] + 0.6 * q[1] + 0.8 * q[2] + 3 * _noise(0.7 * q)))
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
