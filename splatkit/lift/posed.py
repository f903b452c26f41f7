"""The photos that are to be lifted and their cameras, from every kind of file that holds cameras."""
from __future__ import annotations

import zipfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float
from numpy import ndarray as Array

from ..camera import Cameras
from ..capture import Capture, Photo
from ..errors import BadFile
from ..io import re10k
from ..io.photos import _photo_file, _stored, area_average, find_model_folder, load_capture, load_image, load_mask
from ..io.reading import Report, opened, silent
from ..io.transforms import find_transforms, load_transforms

KINDS = "a COLMAP folder, a transforms.json, a RealEstate10K .txt or .torch chunk, or an .npz"
NPZ = "K [n, 3, 3], and world_to_cam or cam_to_world [n, 4, 4]; names [n] and axes (opencv or opengl) if you like"
POSES = {"world_to_cam": False, "w2c": False, "cam_to_world": True, "c2w": True}     # name in an npz: whether it is to be inverted
PIXELS_FROM = 20        # a focal length above this is in pixels, for over the picture's width it would be a view of three degrees


@dataclass(frozen=True)
class View:
    """A photo with its camera. `read(w, h)` gives its pixels in 0 to 1 at a smaller size, `mask(w, h)` which of them count (None: all)."""

    name: str
    K: Float[Array, "3 3"]          # pixels of width x height
    width: int
    height: int
    world_to_cam: Float[Array, "4 4"]
    read: Callable[[int, int], Float[Array, "H W 3"]]
    mask: Callable[[int, int], Bool[Array, "H W"] | None] = lambda w, h: None

    def camera(self) -> Cameras:
        return Cameras(torch.tensor(self.world_to_cam, dtype=torch.float64)[None], torch.tensor(self.K, dtype=torch.float64)[None], self.width, self.height)


@dataclass(frozen=True)
class Posed:
    """Views to lift, those of the same source that are left over, and what is known about where things are."""

    views: list[View]
    others: list[View]
    said: str                       # which conventions the cameras are in
    points: Float[Array, "P 3"] = field(default_factory=lambda: np.zeros((0, 3)))
    folder: Path | None = None      # what `splatkit reconstruct` can read


def posed(photos: Sequence[str], cameras: Path, report: Report = silent) -> Posed:
    """The photos with the cameras that `cameras` has for them: KINDS. No photos: all that a capture trains on, every eighth being left over.

    Photos are matched by file, else by name, to those that a folder or json lists; by timestamp, else in order, to the rows of a text file;
    by name, else in order, to an npz. Of a chunk they are written KEY:NUMBER. Raises BadFile or ValueError for what does not fit.
    """
    if cameras.suffix == ".torch":
        return _of_chunk(photos, cameras)
    if cameras.suffix in (".txt", ".npz"):
        if not photos:
            raise ValueError(f"{cameras} holds cameras alone: name the photos that they are of")
        return _of_txt(photos, cameras) if cameras.suffix == ".txt" else _of_npz(photos, cameras)
    if cameras.suffix == ".json":
        return _of_capture(photos, load_transforms(cameras, report), cameras.parent if cameras.name in ("transforms.json", "transforms_train.json") else None, cameras)
    if not cameras.is_dir():
        raise BadFile(cameras, "", f"expected {KINDS}" if cameras.exists() else f"no such file or folder; expected {KINDS}")
    if find_model_folder(cameras) is None and not find_transforms(cameras):
        raise BadFile(cameras, "", f"holds no cameras; expected {KINDS}")
    return _of_capture(photos, *_capture(photos, cameras, report), cameras)


def _capture(photos: Sequence[str], folder: Path, report: Report) -> tuple[Capture, Path]:
    """The capture of a folder, or of a model whose photos are two folders up, as COLMAP has it, or where the named ones are."""
    if (folder / "images").is_dir() or find_model_folder(folder) is None:
        return load_capture(folder, report), folder
    root = folder.resolve().parents[1]
    if (root / "images").is_dir() and find_model_folder(root) is not None and find_model_folder(root).resolve() == find_model_folder(folder).resolve():
        return load_capture(root, report), root
    images = Path(photos[0]).resolve().parent if photos else folder
    return load_capture(folder, report, images=images), folder


def _of_capture(photos: Sequence[str], capture: Capture, folder: Path | None, source: Path) -> Posed:
    if photos:
        chosen = [_among(Path(name), capture, source) for name in photos]
        left = [i for i in range(len(capture.photos)) if i not in set(chosen)]
    else:
        chosen, left = capture.split()
    _refuse_twice([capture.photos[i].name for i in chosen])
    views = [View(p.name, p.K, p.width, p.height, p.world_to_cam, partial(load_image, p), partial(load_mask, p)) for p in capture.photos]
    kind = "COLMAP's world" if capture.world == "colmap" else f"the world of {capture.world}"
    said = f"{len(capture.photos)} photos of {source}, intrinsics in pixels, {kind}, {len(capture.points):,} sparse points"
    return Posed([views[i] for i in chosen], [views[i] for i in left], said, capture.points.astype(np.float64), folder)


def _among(path: Path, capture: Capture, source: Path) -> int:
    """The number of a named photo in the capture."""
    if not path.is_file():
        raise BadFile(path, "", "no such photo")
    same = [i for i, photo in enumerate(capture.photos) if photo.path.resolve() == path.resolve()]
    same = same or [i for i, photo in enumerate(capture.photos) if Path(photo.name).name == path.name]
    if len(same) != 1:
        known = ", ".join(photo.name for photo in capture.photos[:3]) + ", ..." * (len(capture.photos) > 3)
        raise BadFile(path, "", f"{len(same) or 'no'} of the {len(capture.photos)} photos of {source} {'have its name' if same else 'is this one'}; it knows {known}")
    return same[0]


def _refuse_twice(names: Sequence[str]) -> None:
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise ValueError(f"{twice[0]} is given twice; expected different photos")


def _of_chunk(names: Sequence[str], path: Path) -> Posed:
    sequences = {s.key: s for s in re10k.read_chunk(path)}
    def view(sequence: re10k.Sequence, i: int) -> View:
        pixels = sequence.image(i)
        height, width = pixels.shape[:2]
        return View(f"{sequence.key}:{i}", sequence.K(i, width, height), width, height, sequence.world_to_cam[i], lambda w, h: area_average(pixels, w, h) / np.float32(255))
    chosen = []
    for name in names:
        key, _, number = name.rpartition(":")
        if key not in sequences or not number.isdecimal() or int(number) >= len(sequences[key]):
            some = ", ".join(f"{s.key}:0 to {len(s) - 1}" for s in list(sequences.values())[:3])
            raise BadFile(path, f"{name!r:.80}", f"is no photo of this chunk; expected KEY:NUMBER, as in {some}")
        chosen.append((key, int(number)))
    _refuse_twice(names)
    if len({key for key, _ in chosen}) != 1:
        some = ", ".join(f"{s.key} ({len(s)} photos)" for s in list(sequences.values())[:5])
        raise BadFile(path, "", f"expected photos KEY:NUMBER of one sequence; it holds {some}")
    sequence, numbers = sequences[chosen[0][0]], [i for _, i in chosen]
    between = [i for i in range(min(numbers), max(numbers)) if i not in numbers]
    between = between[len(between) // 4:: max(1, len(between) // 4)][:4] if between else []
    said = f"{len(sequence)} photos of sequence {sequence.key}, intrinsics over the picture's size, world_to_cam with OpenCV axes"
    return Posed([view(sequence, i) for i in numbers], [view(sequence, i) for i in between], said)


def _of_txt(names: Sequence[str], path: Path) -> Posed:
    _, times, K, world_to_cam = re10k.read_txt(path)
    stems = [Path(name).stem for name in names]
    if all(stem.isdecimal() and len(stem) < 19 and (times == int(stem)).sum() == 1 for stem in stems):
        rows, how = [int(np.flatnonzero(times == int(stem))[0]) for stem in stems], "matched by timestamp"
    elif len(times) == len(names):
        rows, how = list(range(len(names))), "in order"
    else:
        raise BadFile(path, "", f"holds {len(times)} cameras for {len(names)} photos whose names are none of its timestamps; expected one row for each photo, or photos named TIMESTAMP.jpg")
    _refuse_twice(names)
    views = [_view(Path(name), lambda w, h, k=K[row]: k * np.array([[w], [h], [1.0]]), world_to_cam[row]) for name, row in zip(names, rows)]
    return Posed(views, [], f"{len(times)} cameras of {path}, {how}, intrinsics over the picture's size, world_to_cam with OpenCV axes")


def _of_npz(names: Sequence[str], path: Path) -> Posed:
    K, poses, known, axes = _read_npz(path)
    if known is not None:
        stems = {name: i for i, name in enumerate(known)}
        rows = [next((stems[key] for key in (name, Path(name).name, Path(name).stem) if key in stems), None) for name in names]
        if None in rows:
            raise BadFile(path, "names", f"has no {names[rows.index(None)]}; it has {', '.join(known[:3])}{', ...' if len(known) > 3 else ''}")
    elif len(K) == len(names):
        rows = list(range(len(names)))
    else:
        raise BadFile(path, "", f"holds {len(K)} cameras for {len(names)} photos; expected one for each, in their order, or names")
    _refuse_twice(names)
    pixels = bool((K[rows][:, [0, 1], [0, 1]] > PIXELS_FROM).all())
    scaled = lambda w, h, row: K[row] if pixels else K[row] * np.array([[w], [h], [1.0]])
    turned, axes_said = _opencv_axes(poses[rows], axes)
    views = [_view(Path(name), partial(scaled, row=row), pose) for name, row, pose in zip(names, rows, turned)]
    for view in views:
        side, centre = (view.width, view.height), view.K[:2, 2]
        if not all(0.1 < view.K[i, i] / side[i] < 20 and -0.5 < centre[i] / side[i] < 1.5 for i in range(2)):
            raise BadFile(path, "K", f"fx={view.K[0, 0]:g} fy={view.K[1, 1]:g} cx={centre[0]:g} cy={centre[1]:g} cannot be of {view.name}, which has {view.width}x{view.height} pixels: "
                          "expected pixels of that size, or all over the picture's width and height")
    said = f"{len(K)} cameras of {path}, intrinsics {'in pixels' if pixels else 'over the size of the picture'}, {axes_said}"
    return Posed(views, [], said)


def _read_npz(path: Path) -> tuple[Array, Array, list[str] | None, str]:
    """K, world_to_cam in the file's axes, names and axes ("" where it does not say). Nothing is unpickled."""
    with opened(path) as file:
        try:
            with np.load(file, allow_pickle=False) as held:
                arrays = {key: held[key] for key in held.files if key in ("K", "names", "axes", *POSES)}
        except (ValueError, OSError, EOFError, KeyError, zipfile.BadZipFile, zipfile.LargeZipFile, NotImplementedError, RuntimeError, MemoryError, SyntaxError, TypeError, AttributeError) as e:
            raise BadFile(path, "", f"no npz of plain arrays, or damaged: {' '.join(str(e).split())[:100]}") from e
    named = [key for key in POSES if key in arrays]
    if "K" not in arrays or len(named) != 1:
        raise BadFile(path, "", f"has {', '.join(sorted(arrays)) or 'nothing'} of what it should: {NPZ}")
    K, poses = arrays["K"], arrays[named[0]]
    if K.dtype.kind not in "fiu" or poses.dtype.kind not in "fiu" or K.shape != (len(K), 3, 3) or poses.shape not in ((len(K), 4, 4), (len(K), 3, 4)):
        raise BadFile(path, f"K, {named[0]}", f"{K.dtype} {list(K.shape)} and {poses.dtype} {list(poses.shape)}; expected numbers: {NPZ}")
    K, full = K.astype(np.float64), np.tile(np.eye(4), (len(K), 1, 1))
    full[:, :3] = poses[:, :3]
    for i, (k, pose) in enumerate(zip(K, full)):
        if not (np.isfinite(k).all() and np.isfinite(pose).all() and k[0, 0] > 0 and k[1, 1] > 0 and abs(k[0, 1]) + abs(k[1, 0]) == 0 and np.abs(k[2] - (0, 0, 1)).max() < 1e-6):
            raise BadFile(path, f"camera {i}", "K or the pose holds a NaN, a focal length that is not above 0, or skew")
        if np.abs(pose[:3, :3] @ pose[:3, :3].T - np.eye(3)).max() > 1e-3 or np.linalg.det(pose[:3, :3]) < 0:
            raise BadFile(path, f"{named[0]}[{i}]", "its first three columns are no rotation")
    axes = str(arrays["axes"]).lower() if "axes" in arrays else ""
    if axes not in ("", "opencv", "opengl"):
        raise BadFile(path, "axes", f"{axes!r:.40}; expected opencv or opengl")
    names = [str(name) for name in arrays["names"]] if "names" in arrays and arrays["names"].shape == (len(K),) else None
    return K, np.linalg.inv(full) if POSES[named[0]] else full, names, axes


def _opencv_axes(world_to_cam: Float[Array, "n 4 4"], axes: str) -> tuple[Float[Array, "n 4 4"], str]:
    """The poses with OpenCV axes, and how that was decided: as the file says, else so that cameras that turn to one place have it before them."""
    if not axes:
        ahead = _meeting_depth(world_to_cam)
        axes, how = ("opengl" if ahead < 0 else "opencv"), "by where the cameras meet" if ahead else "assumed, for they look the same way; axes in the file would say"
    else:
        how = "as the file says"
    flip = np.diag([1.0, -1, -1, 1]) if axes == "opengl" else np.eye(4)
    return flip @ world_to_cam, f"poses with {'OpenGL' if axes == 'opengl' else 'OpenCV'} axes ({how})"


def _meeting_depth(world_to_cam: Float[Array, "n 4 4"]) -> float:
    """Median depth of the point nearest to all optical axes; 0 where they are nearly parallel."""
    forward, centres = world_to_cam[:, 2, :3], -np.einsum("nji,nj->ni", world_to_cam[:, :3, :3], world_to_cam[:, :3, 3])
    across = np.eye(3) - forward[:, :, None] * forward[:, None, :]
    if np.linalg.eigvalsh(across.sum(0))[0] < 1e-3 * len(forward):
        return 0.0
    point = np.linalg.solve(across.sum(0), np.einsum("nij,nj->i", across, centres))
    return float(np.median(((point - centres) * forward).sum(1)))


def _view(path: Path, K: Callable[[int, int], Array], world_to_cam: Array) -> View:
    """A photo of its own, whose intrinsics follow from its size."""
    width, height = _size(path)
    photo = Photo(path.name, path, K(width, height), width, height, world_to_cam)
    return View(path.name, photo.K, width, height, world_to_cam, partial(load_image, photo))


def _size(path: Path) -> tuple[int, int]:

    with _photo_file(path) as picture:
        return _stored(picture)[0]
