"""Scenes in the layouts of ScanNet and ScanNet++ as captures: which files there are, and poses and cameras from them."""
from __future__ import annotations

from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
from numpy import ndarray as Array

from ..capture import Capture, Photo
from ..errors import BadFile
from ..io.photos import _inside, _photo_file, _stored, fitted
from ..io.reading import Report, opened, silent
from ..io.transforms import _lens, _name, _read, intrinsics, pose

# ScanNet++: (poses, photos) as FiT3D arranges scenes, and as they are published.
LAYOUTS = (("transforms_train.json", "images"), ("dslr/nerfstudio/transforms_undistorted.json", "dslr/resized_undistorted_images"))


def is_scannet(folder: Path) -> bool:
    return (folder / "pose").is_dir() and (folder / "color").is_dir()


def is_scannetpp(folder: Path) -> bool:
    return any((folder / poses).is_file() and (folder / photos).is_dir() for poses, photos in LAYOUTS) and not (folder / "transforms.json").is_file()


def load_scannet(folder: Path, report: Report = silent) -> Capture:
    """color/N.jpg with pose/N.txt (camera to world, OpenCV axes, metres) and depth/N.png (millimetres), by number, with intrinsic/intrinsic_color.txt.

    Photos whose pose is not finite, which ScanNet writes where tracking was lost, are left out and counted. Raises BadFile for any other pose that is none.
    """
    K = _rows(folder / "intrinsic" / "intrinsic_color.txt")[:3, :3]
    notes: Counter[str] = Counter()
    photos, lost = [], 0
    for path in sorted((p for p in (folder / "color").iterdir() if p.suffix.lower() in (".jpg", ".png") and p.stem.isdigit()), key=lambda p: int(p.stem)):
        if not (folder / "pose" / f"{path.stem}.txt").is_file():
            lost += 1
            continue
        cam_to_world = _rows(folder / "pose" / f"{path.stem}.txt")
        if not np.isfinite(cam_to_world).all():
            lost += 1
            continue
        if np.abs(cam_to_world[:3, :3].T @ cam_to_world[:3, :3] - np.eye(3)).max() > 1e-2:
            raise BadFile(folder / "pose" / f"{path.stem}.txt", "", "is no rotation and position")
        depth = folder / "depth" / f"{path.stem}.png"
        width, height = _size(path)
        photos.append(fitted(Photo(path.name, path, K, width, height, np.linalg.inv(cam_to_world), depth=depth if depth.is_file() else None), path.name, notes))
    if lost:
        report(f"{folder}: {lost} of {lost + len(photos)} photos have no pose and are left out")
    if not photos:
        raise BadFile(folder / "color", "", "no photo with a pose: expected color/0.jpg with pose/0.txt and so on")
    return Capture(tuple(photos), world="scannet")


def load_scannetpp(folder: Path, report: Report = silent) -> Capture:
    """The photos of a ScanNet++ scene that its nerfstudio file has posed, sorted by name, those marked as bad left out. Raises BadFile as load_transforms."""
    poses, root = next((folder / poses, folder / photos) for poses, photos in LAYOUTS if (folder / poses).is_file() and (folder / photos).is_dir())
    notes: Counter[str] = Counter()
    top, photos, left_out = _read(poses), [], 0
    for i, frame in enumerate(top["frames"]):
        name = _name(frame, "file_path", partial(BadFile, poses, f"frames[{i}]"))
        bad = partial(BadFile, poses, f"frames[{i}] ({name})")
        path = _inside(root, name) if (root / name).is_file() else _inside(folder, name)
        if not path.is_file() or frame.get("is_bad") is True:
            left_out += 1
            continue
        lens, (width, height) = _lens(top, frame), _size(path)
        width, height = int(lens.get("w") or width), int(lens.get("h") or height)
        if any(lens.get(k) for k in ("k1", "k2", "k3", "k4", "p1", "p2")):
            raise bad("has lens distortion; give the undistorted photos of the scene")
        photos.append(fitted(Photo(name, path, intrinsics(lens, width, height, bad), width, height, pose(frame, np.eye(4), bad)), name, notes))
    if left_out:
        report(f"{folder}: {left_out} of {left_out + len(photos)} frames are marked as bad or have no photo, and are left out")
    if not photos:
        raise BadFile(poses, "frames", f"none of the {left_out} photos can be used")
    return Capture(tuple(sorted(photos, key=lambda photo: photo.name)), world="transforms.json")


def _rows(path: Path) -> Array:
    with opened(path) as file:
        try:
            rows = np.array([[float(x) for x in line.split()] for line in file.read().decode("ascii").splitlines() if line.strip()])
        except (ValueError, UnicodeDecodeError) as why:
            raise BadFile(path, "", "expected rows of numbers") from why
    if rows.shape not in ((4, 4), (3, 3), (3, 4)):
        raise BadFile(path, "", f"expected 4 rows of 4 numbers, got {'x'.join(map(str, rows.shape))}")
    return rows


def _size(path: Path) -> tuple[int, int]:
    with _photo_file(path) as picture:
        return _stored(picture)[0]
