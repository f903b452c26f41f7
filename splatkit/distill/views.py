"""Scenes of posed photos with what is known of them (depth, instances, normals), from folders or procedural rooms, and single views of them."""
from __future__ import annotations

import contextlib
import functools
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from .. import rooms
from ..camera import Cameras
from ..capture import Capture, Photo
from ..errors import BadFile
from ..io.atomic import replacing
from ..io.depth import load_depth
from ..io.photos import _photo_file, _stored, find_model_folder, load_capture, load_image, load_mask
from ..io.reading import Report, silent
from ..io.transforms import find_transforms
from .config import DataConfig
from .scannet import is_scannet, is_scannetpp, load_scannet, load_scannetpp

MASK_FOLDERS = ("instances", "instance_segmentation", "instance-filt", "instance")      # beside the photos' folder, in this order
SHAPE_SLACK = 0.01              # by which the shape of a picture of labels may differ from its photo's: ScanNet's colour and depth do
OTHER_SEEDS, OTHER_ROOMS = 10_000_000, 8        # how far from each other, and how many, are the rooms that stand in for one
FURNITURE = {"sphere": 4, "ellipsoid": 4, "box": 5, "cylinder": 6}                      # classes of rooms beside floor 1, ceiling 2, wall 3 and 7, what lies flat on them


@dataclass(frozen=True)
class View:
    """One photo and what is known of its pixels."""

    photo: Float[Tensor, "3 H W"]               # 0 to 1
    camera: Cameras                             # C = 1, of this size
    labels: Int[Tensor, "H W"] | None = None    # instances from 1; 0 where there is none
    depth: Float[Tensor, "H W"] | None = None   # camera z, world units; 0 where it is not known
    kept: Bool[Tensor, "H W"] | None = None     # pixels that count; None: all
    normals: Float[Tensor, "H W 3"] | None = None       # camera axes, towards the camera; 0 where not known
    classes: Int[Tensor, "H W"] | None = None   # kinds of things from 1, the same ones in every scene; 0 where not known

    def to(self, device) -> View:
        return View(*(None if x is None else x.to(device) for x in vars(self).values()))

    def mirrored(self) -> View:
        """As a mirror beside the camera shows it: the world is reflected at x = 0, so that a scene mirrored alike (geometry.mirrored) fits."""
        flip = lambda x: None if x is None else x.flip(-1)
        mirror = torch.diag(torch.tensor([-1.0, 1, 1, 1])).to(self.camera.world_to_cam)
        K = self.camera.K.clone()
        K[:, 0, 2] = self.camera.width - K[:, 0, 2]
        normals = None if self.normals is None else self.normals.flip(1) * self.normals.new_tensor([-1, 1, 1])
        return replace(self, photo=flip(self.photo), camera=self.camera.replace(world_to_cam=mirror @ self.camera.world_to_cam @ mirror, K=K),
                       labels=flip(self.labels), depth=flip(self.depth), kept=flip(self.kept), normals=normals, classes=flip(self.classes))


@runtime_checkable
class PosedScene(Protocol):
    """Photos of one place in an order in which neighbours overlap."""

    name: str

    def __len__(self) -> int: ...

    def view(self, i: int) -> View: ...

    def photo_name(self, i: int) -> str: ...

    def depth_range(self, i: int) -> tuple[float, float] | None:
        """Nearest and farthest depth that photo i is likely to see; None where nothing tells."""


@dataclass(frozen=True)
class CaptureScene:
    """Photos on disk, brought to one size."""

    name: str
    capture: Capture
    labels: tuple[Path | None, ...]     # one for each photo
    width: int
    height: int

    def __len__(self) -> int:
        return len(self.capture.photos)

    def photo_name(self, i: int) -> str:
        return self.capture.photos[i].name

    def view(self, i: int) -> View:
        photo, size = self.capture.photos[i], (self.width, self.height)
        depth, kept = load_depth(photo, *size, slack=SHAPE_SLACK), load_mask(photo, *size)
        return View(torch.from_numpy(load_image(photo, *size)).permute(2, 0, 1).contiguous(), photo.camera().resized(*size),
                    None if self.labels[i] is None else load_labels(self.labels[i], photo, *size),
                    None if depth is None else torch.from_numpy(depth), None if kept is None else torch.from_numpy(kept))

    def depth_range(self, i: int) -> tuple[float, float] | None:
        photo = self.capture.photos[i]
        if len(self.capture.points) >= 20:
            z = self.capture.points @ photo.world_to_cam[2, :3] + photo.world_to_cam[2, 3]
            z = z[z > 0]
        else:
            depth = load_depth(photo, *photo.size_at(4), slack=SHAPE_SLACK)
            z = np.zeros(0) if depth is None else depth[depth > 0]
        return (0.7 * float(np.quantile(z, 0.02)), 1.5 * float(np.quantile(z, 0.98))) if len(z) >= 20 else None


@dataclass(frozen=True)
class RoomScene:
    """A procedural room, seen by cameras on an arc around its middle; everything about it is exact. With a cache it is seen once only."""

    seed: int
    photos: int
    width: int
    height: int
    cache: Path | None = None

    @property
    def name(self) -> str:
        return f"room-{self.seed}"

    def __len__(self) -> int:
        return self.photos

    def photo_name(self, i: int) -> str:
        return f"{i:03}"

    def view(self, i: int) -> View:
        return _room_view(self, i)

    def depth_range(self, i: int) -> tuple[float, float]:
        depth = _packed_room_view(self, i)["depth"]
        return 0.8 * float(depth.min()), 1.2 * float(depth.max())


@functools.lru_cache(256)
def _room(scene: RoomScene) -> tuple[rooms.Room, Cameras]:
    """The room of a scene and its cameras. About one room in fifty has no place for cameras: the next that has some, of a seed far away, stands in."""
    for seed in range(scene.seed, scene.seed + OTHER_ROOMS * OTHER_SEEDS, OTHER_SEEDS):
        room = rooms.endless_room(seed)
        with contextlib.suppress(ValueError):
            return room, rooms.ring_cameras(room, scene.photos, scene.width, scene.height, seed)
    raise ValueError(f"no place for {scene.photos} cameras in rooms of seed {scene.seed} and others; ask for fewer photos")


@functools.lru_cache(4096)
def _packed_room_view(scene: RoomScene, i: int) -> dict[str, np.ndarray]:
    """A view in 11 bytes a pixel, its camera, and the kind of thing that each instance is: all that is needed without making the room."""
    path = scene.cache and scene.cache / f"room-{scene.seed}-{scene.photos}x{scene.width}x{scene.height}-{i}.npz"
    if path:
        try:
            with np.load(path) as kept:
                return {name: kept[name] for name in ("color", "depth", "normals", "instance", "K", "world_to_cam", "kinds")}
        except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile):      # not there, or not whole
            pass
    room, cameras = _room(scene)
    seen = room.cast(cameras[i])
    normals = seen.normals[0] @ cameras.world_to_cam[i, :3, :3].T
    packed = {"color": (seen.color[0] * 255).round().byte().numpy(), "depth": seen.depth[0].numpy(), "normals": (normals * 127).round().to(torch.int8).numpy(),
              "instance": seen.instance[0].to(torch.uint8).numpy(), "K": cameras.K[i].numpy(), "world_to_cam": cameras.world_to_cam[i].numpy(),
              "kinds": np.array([1, 2, 3, 3, 3, 3, *(7 if solid.is_flat else FURNITURE[solid.kind] for solid in room.solids)])}
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as file:
            np.savez(file, **packed)
    return packed


def _room_view(scene: RoomScene, i: int) -> View:
    packed = {name: torch.from_numpy(x) for name, x in _packed_room_view(scene, i).items()}
    instance = packed["instance"].long()
    camera = Cameras(packed["world_to_cam"][None], packed["K"][None], scene.width, scene.height)
    return View(packed["color"].permute(2, 0, 1).float() / 255, camera, instance + 1, packed["depth"], None, F.normalize(packed["normals"].float(), dim=2), packed["kinds"][instance])


def load_labels(path: Path, photo: Photo, width: int, height: int) -> Int[Tensor, "H W"]:
    """A picture of whole numbers at another size, by the nearest pixel. Raises BadFile for one that is damaged, in colour or of another shape than its photo."""
    with _photo_file(path) as image:
        stored, _ = _stored(image)
        if not (image.mode in ("1", "L", "P") or image.mode.startswith("I")):
            raise BadFile(path, "", f"has pixels of kind {image.mode!r}; expected whole numbers, one channel of 8 or 16 bits")
        if abs(stored[0] * photo.height / (stored[1] * photo.width) - 1) > SHAPE_SLACK:
            raise BadFile(path, "", f"is {stored[0]}x{stored[1]}, which is not the shape of {photo.name}, {photo.width}x{photo.height}")
        image.load()
        values = torch.from_numpy(np.asarray(image).astype(np.int64))
    at = lambda n, size: ((torch.arange(n) + 0.5) * (size / n)).long()
    return values[at(height, stored[1])[:, None], at(width, stored[0])]


def scenes_of(config: DataConfig, report: Report = silent) -> list[PosedScene]:
    """The scenes that `config` means. `report` is told which have no masks. Raises BadFile where there are none, or one has fewer than three photos."""
    if config.folder is None:
        return [RoomScene(config.first_room + i, config.photos, config.width, config.height, config.cache) for i in range(config.rooms)]
    folders = [config.folder] if _is_posed(config.folder) else sorted(p for p in config.folder.iterdir() if p.is_dir() and _is_posed(p)) if config.folder.is_dir() else []
    if not folders:
        raise BadFile(config.folder, "", "no posed photos: expected a COLMAP model, transforms.json, a ScanNet or ScanNet++ scene, or a folder of such" if config.folder.exists() else "no such folder")
    out: list[PosedScene] = []
    for folder in folders:
        load = load_scannet if is_scannet(folder) else load_scannetpp if is_scannetpp(folder) else load_capture
        capture = load(folder, report)
        labels = label_files(capture, folder, config.masks)
        if lacking := labels.count(None):
            report(f"{folder}: {'no instance masks' if lacking == len(labels) else f'{lacking} of {len(labels)} photos have no instance mask'}")
        if len(capture.photos) < config.contexts + 1:
            raise BadFile(folder, "", f"{len(capture.photos)} photos; {config.contexts} context photos and a target need {config.contexts + 1}")
        out.append(CaptureScene(folder.resolve().name, capture, tuple(labels), config.width, config.height))
    return out


def _is_posed(folder: Path) -> bool:
    return folder.is_dir() and (is_scannet(folder) or is_scannetpp(folder) or find_model_folder(folder) is not None or bool(find_transforms(folder)))


def label_files(capture: Capture, folder: Path, masks: str) -> list[Path | None]:
    """The picture of labels of each photo: NAME.png or STEM.png in the folder of masks, in `folder` or beside the photos' folder. Raises BadFile where a named folder is absent."""
    if masks == "none":
        return [None] * len(capture.photos)
    beside = capture.photos[0].path.parent.parent
    places = [root / name for root in (folder, beside) for name in (MASK_FOLDERS if masks == "auto" else (masks,))]
    place = next((p for p in places if p.is_dir()), None)
    if place is None and masks != "auto":
        raise BadFile(folder / masks, "", "no such folder of masks; --data.masks auto looks for the usual names, none does without")
    return [None if place is None else _first([place / f"{photo.name}.png", place / f"{photo.path.name}.png", place / f"{photo.path.stem}.png"]) for photo in capture.photos]


def _first(paths: Sequence[Path]) -> Path | None:
    return next((p for p in paths if p.is_file()), None)
