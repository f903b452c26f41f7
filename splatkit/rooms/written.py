"""Rooms as captures on disk: photos with the COLMAP model that structure from motion would find, or with transforms.json and all that is known exactly."""
from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy import ndarray as Array
from PIL import Image

from ..camera import Cameras
from ..capture import Capture
from ..io.atomic import replacing
from ..io.photos import load_capture
from ..scene import quat_from_matrix
from .cast import Room, RoomViews
from .endless import endless_room, ring_cameras
from .furnished import make_room, orbit

DEPTH_STEP = 2.5e-4     # metres of one step of a depth picture: 16 bits reach 16 m


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
    places, seen = zip(*(room.sees(cameras[c], xyz) for c in range(photos)))
    kept = torch.stack(seen).sum(0) >= 2
    tracks = torch.stack(seen)[:, kept].numpy()
    _write_model(folder / "sparse" / "0", cameras, names, xyz[kept].numpy(), pixels[photo, y, x][kept].numpy(),
                 torch.stack(places)[:, kept].numpy(), tracks)
    return load_capture(folder)


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


def write_rooms(folder: Path, rooms: int = 1, photos: int = 24, width: int = 256, height: int = 256, seed: int = 0, report: Callable[[int, Path], None] = lambda n, path: None) -> None:
    """`folder`/room-<seed>/transforms.json of endless rooms, photographed on an arc, with images/, depth/, instances/ and normals/ beside it; `report(n, room)` after each.

    Depth is 16-bit camera z in steps of DEPTH_STEP; instances are the ids of RoomViews in 8 bits; normals are (n + 1) / 2 in 8 bits, world axes.
    """
    for n in range(rooms):
        room = endless_room(seed + n)
        cameras = ring_cameras(room, photos, width, height, seed + n)
        place = Path(folder) / f"room-{seed + n:06d}"
        _write_transforms(place, cameras, room.cast(cameras))
        report(n + 1, place)


def _write_transforms(folder: Path, cameras: Cameras, views: RoomViews) -> None:
    bits = lambda x: (x * 255).round().to(torch.uint8).numpy()
    pictures = {"images": bits(views.color), "depth": (views.depth / DEPTH_STEP).round().clamp(max=65535).numpy().astype(np.uint16),
                "instances": views.instance.to(torch.uint8).numpy(), "normals": bits((views.normals + 1) / 2)}
    for kind, stack in pictures.items():
        (folder / kind).mkdir(parents=True, exist_ok=True)
        for c, picture in enumerate(stack):
            Image.fromarray(picture).save(folder / kind / f"{c:03d}.png")
    cam_to_world = torch.linalg.inv(cameras.world_to_cam.double())
    cam_to_world[:, :, 1:3] *= -1       # OpenGL's axes
    names = {"file_path": "images", "depth_file_path": "depth", "instance_file_path": "instances", "normal_file_path": "normals"}
    frames = [{**{key: f"{kind}/{c:03d}.png" for key, kind in names.items()}, "transform_matrix": pose} for c, pose in enumerate(cam_to_world.tolist())]
    K = cameras.K[0].double().tolist()
    top = {"camera_model": "PINHOLE", "w": cameras.width, "h": cameras.height, "fl_x": K[0][0], "fl_y": K[1][1], "cx": K[0][2], "cy": K[1][2],
           "depth_unit_scale_factor": DEPTH_STEP, "frames": frames}
    with replacing(folder / "transforms.json") as file:
        file.write(json.dumps(top, indent=1).encode())
