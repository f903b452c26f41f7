"""Photos for probes without scenes: lists of files, as the usual splits of NYUv2, ScanNet and ADE20K come, and the ScanNet pairs for matching."""
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ..camera import Cameras
from ..capture import Photo
from ..errors import BadFile
from ..io.depth import load_depth
from ..io.photos import _photo_file, _stored, load_image
from ..io.reading import read_bytes
from .views import SHAPE_SLACK, View, load_labels

NOTHING = ("None", "-")


@dataclass(frozen=True)
class ListScene:
    """Photos of a list, one after the other; they share nothing but what is asked of them, so no pair of them can be matched."""

    name: str
    rows: tuple[tuple[Path | None, ...], ...]       # image, depth, labels, normals
    width: int
    height: int
    depth_unit: float

    @staticmethod
    def of(path: Path, width: int, height: int, depth_unit: float) -> ListScene:
        """Lines of IMAGE DEPTH LABELS NORMALS, of which the later ones may be absent or None, relative to the list's folder. Raises BadFile naming the line."""
        rows = []
        for number, line in enumerate(read_bytes(path).decode("utf-8", "replace").splitlines(), 1):
            if not line.strip():
                continue
            words = [*line.split(), *NOTHING[:1] * 3][:4]
            files = tuple(None if word in NOTHING else path.parent / word.lstrip("/") for word in words)
            if files[0] is None or (lacking := next((f for f in files if f is not None and not f.is_file()), None)):
                raise BadFile(path, f"line {number}", "names no image" if files[0] is None else f"{lacking}: no such file")
            rows.append(files)
        if not rows:
            raise BadFile(path, "", "names no photo")
        return ListScene(path.stem, tuple(rows), width, height, depth_unit)

    def __len__(self) -> int:
        return len(self.rows)

    def photo_name(self, i: int) -> str:
        return self.rows[i][0].name

    def depth_range(self, i: int) -> None:
        return None

    def view(self, i: int) -> View:
        image, depth, labels, normals = self.rows[i]
        photo, size = _unposed(image, depth, self.depth_unit), (self.width, self.height)
        known = load_depth(photo, *size, slack=SHAPE_SLACK)
        facing = None
        if normals is not None:     # 8 bits a component: 0 to 255 is -1 to 1, x right, y down, z forward
            shot = load_image(_unposed(normals), *size)
            facing = torch.from_numpy(shot) * 2 - 1
            facing = torch.where(facing.norm(dim=2, keepdim=True) > 0.5, torch.nn.functional.normalize(facing, dim=2), 0)
        classes = None if labels is None else load_labels(labels, photo, *size)
        return View(torch.from_numpy(load_image(photo, *size)).permute(2, 0, 1).contiguous(), photo.camera().resized(*size), None,
                    None if known is None else torch.from_numpy(known), None, facing, classes)


def _unposed(image: Path, depth: Path | None = None, unit: float = 1e-3) -> Photo:
    with _photo_file(image) as picture:
        (width, height), _ = _stored(picture)
    K = np.array([[float(width), 0, width / 2], [0, float(width), height / 2], [0, 0, 1]])
    return Photo(image.name, image, K, width, height, np.eye(4), depth=depth, depth_unit=unit)


def scannet_pairs(folder: Path, width: int, height: int) -> Iterator[tuple[str, View, View]]:
    """The pairs of ScanNet that matching is measured on: test.npz ("name": room, sequence, photo, photo), intrinsics.npz, and SCENE/{color,depth,pose}/N. BadFile for what lacks."""
    try:
        with np.load(folder / "test.npz") as names, np.load(folder / "intrinsics.npz") as cameras:
            pairs, intrinsics = names["name"], {name: cameras[name] for name in cameras.files}
    except (OSError, ValueError, KeyError) as why:
        raise BadFile(folder, "test.npz, intrinsics.npz", f"cannot be read: {why}") from why
    for room, sequence, *numbers in pairs.tolist():
        scene = f"scene{room:04}_{sequence:02}"
        yield scene, *(_scannet_view(folder / scene, n, intrinsics[scene], width, height) for n in numbers)


def _scannet_view(scene: Path, number: int, K: np.ndarray, width: int, height: int) -> View:
    photo = _unposed(scene / "color" / f"{number}.jpg", scene / "depth" / f"{number}.png")
    pose = np.linalg.inv(np.loadtxt(scene / "pose" / f"{number}.txt"))
    camera = Cameras(torch.tensor(pose, dtype=torch.float32)[None], torch.tensor(K[:3, :3], dtype=torch.float32)[None], photo.width, photo.height)
    depth = torch.from_numpy(load_depth(photo, width, height, slack=SHAPE_SLACK))
    return View(torch.from_numpy(load_image(photo, width, height)).permute(2, 0, 1).contiguous(), camera.resized(width, height), None, depth)
