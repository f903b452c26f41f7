"""Camera paths: an orbit, a smooth way through posed cameras, or a path file; and what posed cameras say about up and middle."""
from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from .camera import Cameras, look_at
from .config import Reconstruct
from .errors import BadFile
from .io.atomic import replacing
from .io.source import load_source
from .io.reading import read_bytes
from .poses import refined
from .scene import Scene, quat_from_matrix, quat_multiply, rotation_matrices

FRAMES_MAX = 100_000
SIDE_MAX = 1920             # pictures in the size of the photos are made no larger than this unless asked for
SAMPLES_PER_SEGMENT = 256   # of the curve whose length is measured: speed then steps by less than 1% (64: 3%)


@dataclass(frozen=True)
class CameraPath:
    """One camera per frame, and the frames per second they are meant for."""

    cameras: Cameras
    fps: float


# ---- paths


def pinhole(fov_deg: float, width: int, height: int) -> Float[Tensor, "3 3"]:
    """K of square pixels whose shorter side sees `fov_deg`, the principal point in the middle."""
    if not 0 < fov_deg < 180:
        raise ValueError(f"field of view {fov_deg:g} degrees; expected more than 0 and less than 180")
    focal = min(width, height) / 2 / math.tan(math.radians(fov_deg) / 2)
    return torch.tensor([[focal, 0, width / 2], [0, focal, height / 2], [0, 0, 1]], dtype=torch.float64)


def orbit(centre: Float[Tensor, " 3"], up: Float[Tensor, " 3"], radius: float, elevation_deg: float, frames: int, K: Float[Tensor, "3 3"],
          width: int, height: int, start: Float[Tensor, " 3"] | None = None) -> Cameras:
    """One turn around `centre` at constant speed, anticlockwise seen from above; the frame after the last would be the first.

    `radius` is the distance from the centre in world units, `elevation_deg` the angle above the plane through the centre. The first
    frame looks from the side of `start`, a direction; where None, or along up, from any side.
    """
    _check_frames(frames)
    if not (radius > 0 and math.isfinite(radius)) or not abs(elevation_deg) < 90 or not float(up.norm()) > 0:
        raise ValueError(f"orbit: radius {radius:g}, elevation {elevation_deg:g} degrees, up {up.tolist()}; "
                         "expected > 0, inside -90 to 90, not zero")
    centre, up = centre.double(), normalize(up.double(), dim=0)
    side = torch.zeros(3, dtype=torch.float64) if start is None else start.double() - (start.double() @ up) * up
    if side.norm() <= 1e-6 * (0 if start is None else start.norm()):
        side = torch.linalg.cross(up, torch.eye(3, dtype=torch.float64)[up.abs().argmin()])
    side, elevation = normalize(side, dim=0), math.radians(elevation_deg)
    across = torch.linalg.cross(up, side)
    poses = []
    for angle in (2 * math.pi * i / frames for i in range(frames)):
        level = math.cos(angle) * side + math.sin(angle) * across
        poses.append(look_at(centre + radius * (math.cos(elevation) * level + math.sin(elevation) * up), centre, up))
    return Cameras(torch.stack(poses), K.double().repeat(frames, 1, 1), width, height).to(dtype=K.dtype)


def orbit_scene(scene: Scene, up: Float[Tensor, " 3"], frames: int, width: int, height: int, fov_deg: float = 50.0,
                elevation_deg: float = 20.0) -> Cameras:
    """An orbit from which the ball that holds 4/5 of the scene's opacity fills the shorter side of the picture.

    The ball's centre is the median of the means, weighted by opacity, so that a few far Gaussians do not move it.
    """
    if len(scene) == 0:
        raise ValueError("the scene holds no Gaussian to orbit around")
    weights = torch.sigmoid(scene.logit_opacities)
    centre = torch.stack([_quantile(x, weights, 0.5) for x in scene.means.unbind(1)])
    ball = float(_quantile((scene.means - centre).norm(dim=1), weights, 0.8)) or float(scene.scales.max())
    radius = ball / math.sin(math.radians(fov_deg) / 2)
    return orbit(centre, up, radius, elevation_deg, frames, pinhole(fov_deg, width, height).to(scene.dtype), width, height)


def orbit_photos(cameras: Cameras, frames: int) -> Cameras:
    """An orbit around what the cameras look at, at their median distance and height, with the first camera's K and from its side."""
    centre, up = focus(cameras), estimate_up(cameras)
    away = cameras.centres - centre
    distance = away.norm(dim=1).clamp(min=1e-9)
    elevation = math.degrees(float(torch.asin((away @ up / distance).clamp(-1, 1)).median()))
    elevation = min(max(elevation, -85.0), 85.0)
    return orbit(centre, up, float(distance.median()), elevation, frames, cameras.K[0], cameras.width, cameras.height, start=away[0])


def interpolate(cameras: Cameras, frames: int, closed: bool = False) -> Cameras:
    """A smooth path at constant speed through every given camera, in their order; K changes linearly in between.

    An open path starts at the first camera and ends at the last. A closed one goes on to the first, where the frame after the last
    would be. Given cameras lie on the path, but a frame falls on one only where the speed says so. Speed counts a turn of 1 radian as
    the mean distance of the cameras from their middle, so that a camera that only turns takes its time too.

    Positions are a cubic curve through the keys with the tangents of centripetal Catmull-Rom (Yuksel et al. 2011), rotations
    the same on the sphere of quaternions: Bezier curves by slerp (Shoemake 1985). Position and rotation have no kink at a key.
    """
    _check_frames(frames)
    if len(cameras) == 0:
        raise ValueError("interpolate: no cameras to go through")
    keys = cameras.to(dtype=torch.float64)
    p, q, K = keys.centres, torch.stack([quat_from_matrix(r.T) for r in keys.world_to_cam[:, :3, :3]]), keys.K
    n = len(keys)
    segments = torch.arange(n if closed and n > 1 else n - 1)
    if len(segments) == 0:
        return cameras.replace(world_to_cam=cameras.world_to_cam.repeat(frames, 1, 1), K=cameras.K.repeat(frames, 1, 1), rows=None)
    after = (segments + 1) % n
    turn_length = _spread(p)

    def length(step: Float[Tensor, "M 3"], turn: Float[Tensor, "M 3"]) -> Float[Tensor, " M"]:
        return (step.square().sum(1) + turn_length**2 * turn.square().sum(1)).sqrt()

    steps = torch.cat([p[after] - p[segments], _log(quat_multiply(_inverse(q[segments]), q[after]))], dim=1)     # position, rotation vector
    time = length(steps[:, :3], steps[:, 3:]).sqrt()
    time = time.clamp(min=1e-3 * float(time.max()) or 1.0)[:, None]     # equal neighbours: any time will do but none
    rate = steps / time
    if len(segments) == n:
        rate_in, rate_out, time_in, time_out = rate.roll(1, 0), rate, time.roll(1, 0), time
    else:
        rate_in, rate_out = torch.cat([rate[:1], rate]), torch.cat([rate, rate[-1:]])
        time_in, time_out = torch.cat([time[:1], time]), torch.cat([time, time[-1:]])
    tangent = (rate_in * time_out + rate_out * time_in) / (time_in + time_out)
    leave, arrive = tangent[segments] * time / 3, tangent[after] * time / 3
    points = [p[segments], p[segments] + leave[:, :3], p[after] - arrive[:, :3], p[after]]
    turns = [q[segments], quat_multiply(q[segments], _exp(leave[:, 3:])), quat_multiply(q[after], _exp(-arrive[:, 3:])), q[after]]

    def at(u: Float[Tensor, " M"]):
        j = u.long().clamp(max=len(segments) - 1)
        t = (u - j)[:, None]
        K_at = torch.lerp(K[segments[j]], K[after[j]], t[..., None])
        return _bezier([x[j] for x in points], t, torch.lerp), _bezier([x[j] for x in turns], t, _slerp), K_at

    u = torch.linspace(0, len(segments), SAMPLES_PER_SEGMENT * len(segments) + 1, dtype=torch.float64)
    position, rotation, _ = at(u)
    way = length(position.diff(dim=0), _log(quat_multiply(_inverse(rotation[:-1]), rotation[1:])))
    way = torch.cat([way.new_zeros(1), way.cumsum(0)]) if bool(way.sum() > 0) else u
    stops = way[-1] * torch.arange(frames, dtype=torch.float64) / (frames if len(segments) == n else max(frames - 1, 1))
    position, rotation, K_at = at(torch.from_numpy(np.interp(stops.numpy(), way.numpy(), u.numpy())))
    return _posed(position, rotation, K_at, cameras)


def framed(cameras: Cameras, width: int | None, height: int | None) -> Cameras:
    """The same views at another size, pixels kept square: enlarged until they cover it, what sticks out is cut off evenly.

    With one of the two given the other follows from the shape of the picture.
    """
    for name, size in (("width", width), ("height", height)):
        if size is not None and size < 1:
            raise ValueError(f"{name} is {size}; expected 1 or more pixels")
    width = width or (cameras.width if height is None else max(1, round(cameras.width * height / cameras.height)))
    height = height or max(1, round(cameras.height * width / cameras.width))
    scale = max(width / cameras.width, height / cameras.height)
    K = cameras.K.double()
    middle = torch.tensor([cameras.width / 2, cameras.height / 2], dtype=torch.float64)
    K = torch.cat([scale * K[:, :2], K[:, 2:]], dim=1)
    K[:, :2, 2] += torch.tensor([width / 2, height / 2], dtype=torch.float64) - scale * middle
    return cameras.replace(K=K.to(cameras.dtype), width=width, height=height)


def photo_cameras(config: Reconstruct) -> Cameras:
    """The views of a run's photos by name, at the size of the first as the run used it, but at most SIDE_MAX a side.

    Raises BadFile when the photos or their poses are not there.
    """
    capture, downscale = load_source(config.data, config.output, config.downscale)
    photos = refined(capture, config.output / "cameras.json").photos
    if config.refine.poses:     # the others kept poses that the scene does not agree with
        photos = [photos[i] for i in capture.split(config.hold_every)[0]]
    size = photos[0].size_at(downscale, min(config.max_side or SIDE_MAX, SIDE_MAX))
    return Cameras.cat([framed(photo.camera(), *size) for photo in photos])


def through_photos(cameras: Cameras, frames: int) -> Cameras:
    """interpolate() through the photos, or through every so many where there are more than one for 4 frames: hand-held photos shake."""
    keys = min(len(cameras), max(2, frames // 4))
    chosen = torch.linspace(0, len(cameras) - 1, keys).round().long()
    return interpolate(cameras.replace(world_to_cam=cameras.world_to_cam[chosen], K=cameras.K[chosen], rows=None), frames)


def choose(name: str | None, scene: Scene, up: tuple[float, float, float] | None, photos: Cameras | None, frames: int | None = None,
           fps: float | None = None, width: int | None = None, height: int | None = None) -> CameraPath:
    """The path that `name` means: orbit, capture or a .json file; None is capture where there are photos, else orbit.

    An orbit follows the photos' cameras; without photos it goes around the scene and its `up`, -y where None, as COLMAP's worlds often
    stand. What is None of the rest is 120 frames, 30 a second and the photos' size or 1280x720; or what the file says.
    """
    name = name or ("orbit" if photos is None else "capture")
    if name.endswith(".json"):
        path = read_path(name)
        cameras = path.cameras if frames is None else interpolate(path.cameras, frames)
        return CameraPath(framed(cameras, width, height), path.fps if fps is None else fps)
    if name not in ("orbit", "capture"):
        raise ValueError(f"path {name!r}; expected orbit, capture or a file that ends in .json")
    frames, fps = 120 if frames is None else frames, 30.0 if fps is None else fps
    if photos is not None:
        cameras = orbit_photos(photos, frames) if name == "orbit" else through_photos(photos, frames)
        return CameraPath(framed(cameras, width, height), fps)
    if name == "capture":
        raise ValueError("the path capture goes through a run's photos, and a scene file has none; give the run folder, or --path orbit")
    empty = Cameras(torch.eye(4)[None], torch.eye(3)[None], 1280, 720)
    size = framed(empty, width, height)
    return CameraPath(orbit_scene(scene, torch.tensor(up or (0.0, -1.0, 0.0)), frames, size.width, size.height), fps)


# ---- what posed cameras say about the world


def estimate_up(cameras: Cameras) -> Float[Tensor, " 3"]:
    """The world's upward direction: the one to which the cameras' right axes are most orthogonal, on the side of their mean up.

    People tilt a camera far more than they roll it. Where the right axes span no plane (few views, one direction) or no direction
    is clearly orthogonal to them (rolled views), it is the mean up of the pictures.
    """
    rotation = cameras.world_to_cam[:, :3, :3].double()
    mean_up, mean_forward = -rotation[:, 1].mean(0), rotation[:, 2].mean(0)
    _, sizes, directions = torch.linalg.svd(rotation[:, 0], full_matrices=True)
    sizes, up = torch.nn.functional.pad(sizes, (0, 3 - len(sizes))), directions[2]
    if sizes[1] > max(0.1 * sizes[0], 3 * sizes[2]):
        towards = float(up @ mean_up)
        towards = towards if abs(towards) > 0.1 else -float(up @ mean_forward)      # all look straight down: up is where they come from
        return (up if towards >= 0 else -up).to(cameras.dtype)
    if mean_up.norm() < 1e-6:
        mean_up = -rotation[0, 1]
    return normalize(mean_up, dim=0).to(cameras.dtype)


def focus(cameras: Cameras) -> Float[Tensor, " 3"]:
    """The point nearest to all optical axes (least squares).

    Where the axes are nearly parallel, or meet behind the cameras, it lies in front of the mean camera, as far as the cameras
    are from their middle on average (1 for a single place).
    """
    centres, forward = cameras.centres.double(), cameras.world_to_cam[:, 2, :3].double()
    across = torch.eye(3, dtype=torch.float64, device=forward.device) - forward[:, :, None] * forward[:, None, :]
    total = across.sum(0)
    if float(torch.linalg.eigvalsh(total)[0]) > 1e-3 * len(cameras):
        point = torch.linalg.solve(total, (across @ centres[..., None]).sum(0).squeeze(-1))
        if float(((point - centres) * forward).sum(1).median()) > 0:
            return point.to(cameras.dtype)
    ahead = forward.mean(0) if forward.mean(0).norm() > 1e-6 else forward[0]
    return (centres.mean(0) + _spread(centres) * normalize(ahead, dim=0)).to(cameras.dtype)


# ---- path files


def write_path(file: str | os.PathLike, path: CameraPath) -> None:
    """Writes {"width", "height", "fps", "frames": [{"world_to_cam": 4x4, "K": 3x3}]}, whole or not at all."""
    cameras = path.cameras
    cameras.check()
    frames = [{"world_to_cam": pose, "K": K} for pose, K in zip(cameras.world_to_cam.double().tolist(), cameras.K.double().tolist())]
    text = json.dumps({"width": cameras.width, "height": cameras.height, "fps": path.fps, "frames": frames}, allow_nan=False)
    with replacing(file) as out:
        out.write(text.encode())


def read_path(file: str | os.PathLike) -> CameraPath:
    """The camera path of a JSON file as write_path writes it (float64). Raises BadFile saying which entry is wrong."""
    try:
        data = json.loads(read_bytes(file).decode())
    except (ValueError, RecursionError) as why:     # ValueError: no JSON, no UTF-8
        raise BadFile(file, "", f"is no JSON: {why}") from why
    if not isinstance(data, dict):
        raise BadFile(file, "", f"holds a JSON {type(data).__name__}; expected an object with width, height, fps and frames")
    for side in ("width", "height"):
        if type(data.get(side)) is not int or not 1 <= data[side] <= 32768:
            raise BadFile(file, side, f"{data.get(side)!r:.40}; expected a whole number, 1 to 32768")
    fps, frames = data.get("fps"), data.get("frames")
    if type(fps) not in (int, float) or not 0 < fps <= 1000:
        raise BadFile(file, "fps", f"{fps!r:.40}; expected a number above 0, at most 1000")
    if not isinstance(frames, list) or not 1 <= len(frames) <= FRAMES_MAX:
        raise BadFile(file, "frames", f"expected a list of 1 to {FRAMES_MAX} frames")
    poses, Ks = [], []
    for i, frame in enumerate(frames):
        if not isinstance(frame, dict):
            raise BadFile(file, f"frames[{i}]", "expected an object with world_to_cam and K")
        pose, K = _matrix(file, i, frame, "world_to_cam", 4), _matrix(file, i, frame, "K", 3)
        rotation = pose[:3, :3]
        if not np.allclose(rotation @ rotation.T, np.eye(3), atol=1e-3) or np.linalg.det(rotation) < 0 or (pose[3] != [0, 0, 0, 1]).any():
            raise BadFile(file, f"frames[{i}].world_to_cam", "is not rigid: expected a rotation and a translation above 0 0 0 1")
        if not (K[0, 0] > 0 and K[1, 1] > 0 and K[0, 1] == K[1, 0] == K[2, 0] == K[2, 1] == 0 and K[2, 2] == 1):
            raise BadFile(file, f"frames[{i}].K", "expected fx 0 cx / 0 fy cy / 0 0 1 with fx, fy > 0 (pixels)")
        poses.append(pose)
        Ks.append(K)
    cameras = Cameras(torch.from_numpy(np.stack(poses)), torch.from_numpy(np.stack(Ks)), data["width"], data["height"])
    return CameraPath(cameras, float(fps))


def _matrix(file, i: int, frame: dict, name: str, size: int) -> np.ndarray:
    rows = frame.get(name)
    shaped = isinstance(rows, list) and len(rows) == size and all(isinstance(r, list) and len(r) == size for r in rows)
    # float32 is what is drawn in, so nothing beyond its range is a place.
    if not shaped or not all(type(x) in (int, float) and abs(x) < 1e30 for r in rows for x in r):
        raise BadFile(file, f"frames[{i}].{name}", f"expected {size} rows of {size} finite numbers")
    return np.array(rows, dtype=np.float64)


# ---- rotations and curves


def _check_frames(frames: int) -> None:
    if not 1 <= frames <= FRAMES_MAX:
        raise ValueError(f"{frames} frames; expected 1 to {FRAMES_MAX}")


def _posed(position: Tensor, rotation: Tensor, K: Tensor, like: Cameras) -> Cameras:
    """Cameras at `position` whose camera-to-world rotation is the quaternion `rotation`."""
    world_to_cam = torch.eye(4, dtype=torch.float64).repeat(len(position), 1, 1)
    world_to_cam[:, :3, :3] = rotation_matrices(rotation).transpose(1, 2)
    world_to_cam[:, :3, 3] = -(world_to_cam[:, :3, :3] @ position[..., None]).squeeze(-1)
    return Cameras(world_to_cam.to(like.world_to_cam), K.to(like.K), like.width, like.height)


def _spread(places: Float[Tensor, "C 3"]) -> float:
    """Their mean distance from their middle; 1 where they differ by no more than the rounding of float32."""
    spread = float((places - places.mean(0)).norm(dim=1).mean())
    return spread if spread > 1e-6 * float(places.abs().max()) else 1.0


def _quantile(values: Float[Tensor, " N"], weights: Float[Tensor, " N"], share: float) -> Float[Tensor, ""]:
    """The smallest value at or below which `share` of the weight lies."""
    ordered, order = values.double().sort()
    below = weights.double()[order].cumsum(0)
    return ordered[int(torch.searchsorted(below, share * below[-1])) if below[-1] > 0 else len(ordered) // 2].to(values.dtype)


def _bezier(controls: list[Tensor], t: Tensor, mix) -> Tensor:
    """De Casteljau's algorithm, with `mix(a, b, t)` for the straight line."""
    while len(controls) > 1:
        controls = [mix(a, b, t) for a, b in zip(controls, controls[1:])]
    return controls[0]


def _slerp(a: Float[Tensor, "M 4"], b: Float[Tensor, "M 4"], t: Float[Tensor, "M 1"]) -> Float[Tensor, "M 4"]:
    """The shorter way from a to b at constant speed; Shoemake 1985."""
    return normalize(quat_multiply(a, _exp(t * _log(quat_multiply(_inverse(a), b)))), dim=-1)


def _inverse(q: Float[Tensor, "M 4"]) -> Float[Tensor, "M 4"]:
    return q * q.new_tensor([1, -1, -1, -1])


def _log(q: Float[Tensor, "M 4"]) -> Float[Tensor, "M 3"]:
    """Rotation vector of unit quaternions, at most pi long."""
    q = torch.where(q[:, :1] < 0, -q, q)
    sine = q[:, 1:].norm(dim=1, keepdim=True)
    return q[:, 1:] * torch.where(sine > 1e-12, 2 * torch.atan2(sine, q[:, :1]) / sine.clamp(min=1e-12), 2.0)


def _exp(v: Float[Tensor, "M 3"]) -> Float[Tensor, "M 4"]:
    half = v.norm(dim=1, keepdim=True) / 2
    return torch.cat([half.cos(), v / 2 * torch.sinc(half / math.pi)], dim=1)
