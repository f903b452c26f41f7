"""Posed photos from transforms.json, as nerfstudio, instant-ngp and Blender (NeRF synthetic) write it.

Poses are camera to world, OpenGL axes (x right, y up, z back). The json's world is `applied_scale` times `applied_transform` times
COLMAP's, and so is that of the points in `ply_file_path`.
"""
from __future__ import annotations

import dataclasses
import json
import math
import os
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
from jaxtyping import Float, UInt8
from numpy import ndarray as Array

from ..capture import Capture, Photo
from ..errors import BadFile
from .photos import _MODES, _inside, _photo_file, _refuse_same_file_twice, _stored, fitted, undistorted
from .ply import vertex_records
from .ply_header import read_header
from .reading import Report, opened, silent, size_of

FILES = ("transforms.json", "transforms_train.json")    # what makes a folder a capture; the first one counts
SUFFIXES = ("", ".png", ".jpg", ".jpeg", ".webp")       # tried after file_path, in this order
BYTES_MAX = 64 * 1024 * 1024

_PINHOLE_AT_ZERO = ("SIMPLE_PINHOLE", "PINHOLE", "SIMPLE_RADIAL", "RADIAL", "OPENCV", "FULL_OPENCV")
_DISTORTION = {"OPENCV": ("k1", "k2", "p1", "p2", "k3", "k4"), "OPENCV_FISHEYE": ("k1", "k2", "k3", "k4"),
               "FULL_OPENCV": ("k1", "k2", "p1", "p2", "k3", "k4", "k5", "k6")}
_FOCAL = (("fl_x", "camera_angle_x"), ("fl_y", "camera_angle_y"))
_PLACE = "the folder of the json"

Bad = Callable[[str], Exception]     # from why to the error, with file and entry filled in


def find_transforms(folder: Path) -> list[Path]:
    """The files that load_transforms reads in `folder`, none when it is no such capture."""
    first = next((folder / name for name in FILES if os.path.exists(folder / name)), None)
    test = folder / "transforms_test.json"
    return [] if first is None else [first, test] if first.name != FILES[0] and os.path.exists(test) else [first]


def load_transforms(path: str | os.PathLike, report: Report = silent) -> Capture:
    """The photos that a transforms.json has posed, sorted by name (file_path as written), with the points of its ply_file_path.

    `path` is that file, or a folder: its transforms.json, else its transforms_train.json and transforms_test.json together. Where
    applied_transform is given it is undone, and the world is COLMAP's ("colmap"), else "transforms.json"; applied_scale is undone too.
    Photos, masks and points lie below the file's folder; a file_path without suffix means .png, .jpg, .jpeg or .webp. Intrinsics of a
    frame come before those of the file; without cx, cy the centre is taken, without w, h the size of the photo. Points without colour
    are grey. A photo with lens distortion has the K and the size of its undistorted picture. Depth pictures are depth_file_path in steps of
    depth_unit_scale_factor (a thousandth where it is not given); valid_mask of the file is the mask of frames without mask_path. `report`
    is told of frames without a photo, which are left out, of a missing point file, and what load_capture reports.

    Raises BadFile naming file and frame: no photo at all, not JSON of that kind or over 64 MB, a pose that is no rotation and position
    (within 1e-3), a focal length or lens that cannot be used, a picture that load_capture would refuse, a mask of another size than its
    photo, of more than 8 bits, or of a photo with lens distortion, as a depth picture of one.
    """
    path = Path(path)
    files = find_transforms(path) if os.path.isdir(path) else [path]
    if not files:
        raise BadFile(path, "", f"no {' or '.join(FILES)}")
    if os.path.isdir(path) and (unread := [p.name for p in sorted(path.glob("transforms_*.json")) if p not in files]):
        report(f"{path}: not read: {', '.join(unread)}")
    tops = [_read(file) for file in files]
    applied = [[key in top for key in ("applied_transform", "applied_scale")] for top in tops]
    if applied[0] != applied[-1]:
        raise BadFile(files[-1], "applied_transform, applied_scale", f"not given in both {files[0].name} and {files[-1].name}")
    photos: dict[str, Photo] = {}
    missing: dict[str, None] = {}
    notes: Counter[str] = Counter()
    for file, top in zip(files, tops):
        undo = _undo(top, partial(BadFile, file))
        scale = float(np.cbrt(abs(np.linalg.det(undo[:3, :3]))))
        for i, frame in enumerate(top["frames"]):
            name = _name(frame, "file_path", partial(BadFile, file, f"frames[{i}]"))
            bad = partial(BadFile, file, f"frames[{i}] ({name})")
            if name in photos or name in missing:
                raise bad("its file_path appears twice")
            if (photo_path := _find_photo(file.parent, name)) is None:
                missing[name] = None
                continue
            lens = _lens(top, frame)
            photo = fitted(_photo(name, photo_path, lens, pose(frame, undo, bad), bad), f"the camera of {name}", notes)
            depth, unit = _depth(file.parent, lens, bad)
            photo = dataclasses.replace(photo, mask=_mask(file.parent, photo, lens, bad), depth=depth, depth_unit=unit * scale)
            if (bent := _distortion(lens, bad)) is not None:
                if photo.mask is not None or depth is not None:
                    raise bad(f"{'depth' if photo.mask is None else 'a mask'} of a photo with lens distortion cannot be used: undistort both first")
                photo = undistorted(photo, *bent, file, f"frames[{i}] ({name})", notes)
            photos[name] = photo
    if missing:
        first = ", ".join(list(missing)[:3]) + ", ..." * (len(missing) > 3)
        if not photos:
            raise BadFile(files[0], "frames", f"none of the {len(missing)} photos exists: {first}"[:300])
        report(f"{path}: {len(missing)} of {len(missing) + len(photos)} frames have no photo and are left out: {first}")
    by_name = tuple(photos[name] for name in sorted(photos))
    _refuse_same_file_twice(by_name)
    for note, count in notes.items():
        report(f"{path}: {count} of {len(photos)} photos {note}")
    points = _points(files[0], tops[0], report)
    return Capture(by_name, *points, world="colmap" if applied[0][0] else "transforms.json")


def _read(path: Path) -> dict:
    """The file's object, with a list of objects under "frames"; every other entry is unchecked."""
    with opened(path) as file:
        if size_of(file) > BYTES_MAX:
            raise BadFile(path, "", f"{size_of(file)} bytes; at most {BYTES_MAX} are read")
        data = file.read()
    try:
        top = json.loads(data)
    except RecursionError as e:
        raise BadFile(path, "", "JSON is nested too deeply") from e
    except ValueError as e:     # bytes that are no text and integers of over 4300 digits too
        raise BadFile(path, "", f"not JSON: {e}"[:300] if data else "the file is empty") from e
    frames = top.get("frames") if isinstance(top, dict) else None
    if not isinstance(frames, list) or not frames:
        raise BadFile(path, "frames", "expected an object with a list of frames")
    for i, frame in enumerate(frames):
        if not isinstance(frame, dict):
            raise BadFile(path, f"frames[{i}]", f"{_shown(frame)}; expected an object")
    return top


def _undo(top: dict, bad: Callable[[str, str], BadFile]) -> Float[Array, "4 4"]:
    """colmap_from_json: takes applied_transform and applied_scale back; the identity where there are none."""
    applied = np.eye(4)
    if "applied_transform" in top:
        applied = _matrix(top, "applied_transform", partial(bad, ""))
        _axes(applied, partial(bad, "applied_transform"))
    if "applied_scale" in top:
        scale = _number(top, "applied_scale", partial(bad, ""))
        if not 1e-6 < scale < 1e6:
            raise bad("applied_scale", f"{scale:g}; expected 1e-6 to 1e6")
        applied[:3] *= scale
    return np.linalg.inv(applied)


def _lens(top: dict, frame: dict) -> dict:
    """Camera entries, unchecked: the frame's before the file's."""
    lens = {**top, **frame}
    for pair in _FOCAL:     # a frame's own angle is not overruled by the file's focal length
        if any(key in frame for key in pair):
            lens.update({key: frame.get(key) for key in pair})
    return lens


def _photo(name: str, path: Path, lens: dict, world_to_cam: Array, bad: Bad) -> Photo:
    """The photo at the size that the json says, without its distortion."""
    if lens.get("w") is None or lens.get("h") is None:
        with _photo_file(path) as picture:
            (width, height), _ = _stored(picture)
    else:
        width, height = (_number(lens, key, bad) for key in ("w", "h"))
        if any(side != int(side) or not 1 <= side <= 32768 for side in (width, height)):
            raise bad(f"{width:g} x {height:g}; expected 1 to 32768 pixels a side")
    return Photo(name, path, intrinsics(lens, width, height, bad), int(width), int(height), world_to_cam)


def _depth(root: Path, lens: dict, bad: Bad) -> tuple[Path | None, float]:
    """The frame's depth picture and the length of its step in the json's world: nerfstudio's names and its default of a millimetre."""
    if lens.get("depth_file_path") is None:
        return None, 1e-3
    unit = 1e-3 if lens.get("depth_unit_scale_factor") is None else _number(lens, "depth_unit_scale_factor", bad)
    if not 0 < unit < 1e6:
        raise bad(f"depth_unit_scale_factor {unit:g}; expected above 0 and below 1e6")
    if not os.path.isfile(path := _inside(root, _name(lens, "depth_file_path", bad), _PLACE)):
        raise BadFile(path, "", "no such depth picture; take depth_file_path out of the frame to do without")
    return path, unit


def _mask(root: Path, photo: Photo, lens: dict, bad: Bad) -> Path | None:
    """The frame's mask, else the file's: mask_path, or valid_mask for pixels that no frame has."""
    key = next((key for key in ("mask_path", "valid_mask") if lens.get(key) is not None), None)
    if key is None:
        return None
    mask = _inside(root, _name(lens, key, bad), _PLACE)
    with _photo_file(mask) as picture:
        size, _ = _stored(picture)
        if size != (photo.width, photo.height) or picture.mode not in _MODES:
            raise BadFile(mask, "", f"{size[0]}x{size[1]} of kind {picture.mode!r}; expected 8 bits and the size of its photo, "
                                    f"{photo.width}x{photo.height}")
    return mask


def _distortion(lens: dict, bad: Bad) -> tuple[str, dict[str, float]] | None:
    """COLMAP's model and the coefficients that are not zero; None for an ideal pinhole."""
    model = "OPENCV" if lens.get("camera_model") is None else lens["camera_model"]
    fisheye = model == "OPENCV_FISHEYE" or bool(lens.get("is_fisheye"))     # instant-ngp's word
    if not fisheye and model not in _PINHOLE_AT_ZERO:
        raise bad(f"camera_model {_shown(model)}; known: {', '.join(_PINHOLE_AT_ZERO)}, OPENCV_FISHEYE")
    model = "OPENCV_FISHEYE" if fisheye else model if model == "FULL_OPENCV" else "OPENCV"      # nerfstudio reads PINHOLE with k1 so too
    values = {name: _number(lens, name, bad) for name in _DISTORTION["FULL_OPENCV"] if lens.get(name) is not None}
    params = {name: value for name, value in values.items() if value}
    if unknown := params.keys() - set(_DISTORTION[model]):
        raise bad(f"{', '.join(sorted(unknown))}: not a coefficient of {model}; its own are {', '.join(_DISTORTION[model])}")
    return (model, params) if fisheye or params else None


def intrinsics(lens: dict, width: float, height: float, bad: Bad) -> Float[Array, "3 3"]:
    """K of a frame's entries, in pixels of width x height. Raises bad(why) for what is no camera."""
    focal = []
    for (length, angle), side in zip(_FOCAL, (width, height)):
        if lens.get(length) is not None:
            focal.append(_number(lens, length, bad))
        elif lens.get(angle) is not None:
            radians = _number(lens, angle, bad)
            if not 1e-6 < radians < math.pi:
                raise bad(f"{angle} {radians:g}; expected radians between 0 and pi")
            focal.append(side / 2 / math.tan(radians / 2))
    if not focal:
        raise bad("no fl_x or camera_angle_x")
    fx, fy = focal[0], focal[-1]        # one alone means square pixels
    cx, cy = (side / 2 if lens.get(key) is None else _number(lens, key, bad) for key, side in (("cx", width), ("cy", height)))
    if not (1e-6 < fx < 1e9 and 1e-6 < fy < 1e9 and abs(cx) < 1e9 and abs(cy) < 1e9):
        raise bad(f"fx={fx:g} fy={fy:g} cx={cx:g} cy={cy:g}: the focal lengths must be above 1e-6 and all below 1e9 pixels")
    return np.array([[fx, 0, cx], [0, fy, cy], [0, 0, 1.0]])


def pose(frame: dict, undo: Array, bad: Bad) -> Float[Array, "4 4"]:
    """world_to_cam of a frame: OpenCV axes, in the world that `undo` leads to. Raises bad(why) for what is no pose."""
    cam_to_world = undo @ _matrix(frame, "transform_matrix", bad)
    axes, centre = _axes(cam_to_world, bad), cam_to_world[:3, 3]
    if np.linalg.det(axes) < 0:
        raise bad("transform_matrix is a mirror image, not a rotation")
    if not np.abs(centre).max() < 1e15:
        raise bad(f"transform_matrix has the position {centre.tolist()}")
    axes[:, 1:] *= -1       # OpenGL's y up, z back to OpenCV's y down, z forward
    out = np.eye(4)
    out[:3, :3], out[:3, 3] = axes.T, -axes.T @ centre
    return out


def _axes(matrix: Array, bad: Bad) -> Float[Array, "3 3"]:
    """The nearest orthonormal columns to those of matrix[:3, :3], which may all be longer by one factor; det is 1 or -1."""
    scale = np.linalg.norm(matrix[:3, :3]) / math.sqrt(3)
    if not 1e-6 < scale < 1e6:
        raise bad(f"the axes of the transform have the length {scale:g}; expected 1e-6 to 1e6")
    axes = matrix[:3, :3] / scale
    if np.abs(axes.T @ axes - np.eye(3)).max() > 1e-3:
        raise bad("the axes of the transform are not at right angles and of one length")
    u, _, v = np.linalg.svd(axes)
    return u @ v


def _matrix(source: dict, key: str, bad: Bad) -> Float[Array, "4 4"]:
    rows = source.get(key)
    if not (isinstance(rows, list) and len(rows) in (3, 4) and all(isinstance(row, list) and len(row) == 4 for row in rows)):
        raise bad(f"{key}: expected 3 or 4 rows of 4 numbers")
    out = np.eye(4)
    for i, row in enumerate(rows):
        out[i] = [_number({key: value}, key, bad) for value in row]
    if np.abs(out[3] - (0, 0, 0, 1)).max() > 1e-6:
        raise bad(f"{key}: the last row is {out[3].tolist()}; expected 0, 0, 0, 1")
    return out


def _number(source: dict, key: str, bad: Bad) -> float:
    value = source[key]
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e15:
        raise bad(f"{key}: {_shown(value)}; expected a number below 1e15")
    return float(value)


def _name(source: dict, key: str, bad: Bad) -> str:
    """A file name that can be printed."""
    name = source.get(key)
    if not isinstance(name, str) or not name or any(ord(c) < 32 or ord(c) == 127 or 0xD800 <= ord(c) < 0xE000 for c in name):
        raise bad(f"{key}: {_shown(name)}; expected a file name")
    return name


def _shown(value) -> str:
    """What came, for an error; not what is in it, for that may be nested as deep as the parser goes."""
    return type(value).__name__ if isinstance(value, list | dict) else f"{value!r:.80}"


def _find_photo(root: Path, name: str) -> Path | None:
    paths = (_inside(root, name + suffix, _PLACE) for suffix in SUFFIXES)
    return next((path for path in paths if os.path.isfile(path)), None)


def _points(path: Path, top: dict, report: Report) -> tuple[Float[Array, "P 3"], UInt8[Array, "P 3"]]:
    """The vertices of ply_file_path in the world of the photos, and their colours."""
    if top.get("ply_file_path") is None:
        return np.zeros((0, 3)), np.zeros((0, 3), np.uint8)
    source = _inside(path.parent, _name(top, "ply_file_path", partial(BadFile, path, "")), _PLACE)
    if not os.path.exists(source):
        report(f"{source}: no such file, so there are no sparse points")
        return np.zeros((0, 3)), np.zeros((0, 3), np.uint8)
    with opened(source) as file:
        header = read_header(source, file)
        vertex = header.element("vertex")
        if vertex is None or vertex.has_list or not {*"xyz"} <= vertex.types.keys():
            raise BadFile(source, "header", "expected an element vertex with x, y, z and no lists")
        rows = vertex_records(source, file, header)
    undo = _undo(top, partial(BadFile, path))
    xyz = np.stack([rows[name].astype(np.float64) for name in "xyz"], axis=1)
    rgb = np.full((len(rows), 3), 128.0)
    for i, name in enumerate(("red", "green", "blue")):
        if name in vertex.types:
            rgb[:, i] = rows[name]
    _all(source, np.abs(xyz).max(axis=1, initial=0) < 1e15, "its position is not usable")       # false for NaN too
    _all(source, ((rgb >= 0) & (rgb <= 255) & (rgb == np.floor(rgb))).all(axis=1), "its colour is not whole numbers from 0 to 255")
    xyz = xyz @ undo[:3, :3].T + undo[:3, 3]
    _all(source, np.abs(xyz).max(axis=1, initial=0) < 1e15, "its position is not usable")
    return xyz, rgb.astype(np.uint8)


def _all(path: Path, good: Array, why: str) -> None:
    if not good.all():
        raise BadFile(path, f"vertex {int(good.argmin())}", why)
