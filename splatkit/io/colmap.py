"""COLMAP sparse models, .bin and .txt, as COLMAP 3.x and 4.x write them (https://colmap.github.io/format.html).

Poses are world to camera, OpenCV axes, quaternions wxyz; pixel centres lie at half integers. rigs.* and frames.* are not needed.
"""
from __future__ import annotations

import os
import re
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int, UInt8
from numpy import ndarray as Array

from ..errors import BadFile
from .reading import read_bytes

MODELS = (      # by COLMAP's model id: name and parameters in file order
    ("SIMPLE_PINHOLE", "f cx cy"), ("PINHOLE", "fx fy cx cy"), ("SIMPLE_RADIAL", "f cx cy k"), ("RADIAL", "f cx cy k1 k2"),
    ("OPENCV", "fx fy cx cy k1 k2 p1 p2"), ("OPENCV_FISHEYE", "fx fy cx cy k1 k2 k3 k4"),
    ("FULL_OPENCV", "fx fy cx cy k1 k2 p1 p2 k3 k4 k5 k6"), ("FOV", "fx fy cx cy omega"), ("SIMPLE_RADIAL_FISHEYE", "f cx cy k"),
    ("RADIAL_FISHEYE", "f cx cy k1 k2"), ("THIN_PRISM_FISHEYE", "fx fy cx cy k1 k2 p1 p2 k3 k4 sx1 sy1"),
    ("RAD_TAN_THIN_PRISM_FISHEYE", "fx fy cx cy k0 k1 k2 k3 k4 k5 p0 p1 s0 s1 s2 s3"), ("SIMPLE_DIVISION", "f cx cy k"),
    ("DIVISION", "fx fy cx cy k"), ("SIMPLE_FISHEYE", "f cx cy"), ("FISHEYE", "fx fy cx cy"), ("EUCM", "fx fy cx cy alpha beta"),
    ("EQUIRECTANGULAR", "w h"))
# A fisheye is no pinhole even where all its coefficients are zero: it maps the angle, not its tangent.
_PINHOLE_AT_ZERO = {"SIMPLE_PINHOLE", "PINHOLE", "SIMPLE_RADIAL", "RADIAL", "OPENCV", "FULL_OPENCV", "FOV", "SIMPLE_DIVISION", "DIVISION"}


@dataclass(frozen=True)
class ColmapCamera:
    """One lens: finite parameters by COLMAP's names, in pixels of width x height."""

    model: str
    width: int
    height: int
    params: dict[str, float]

    @property
    def distortion(self) -> dict[str, float]:
        return {name: value for name, value in self.params.items() if name not in ("f", "fx", "fy", "cx", "cy", "w", "h")}

    @property
    def is_pinhole(self) -> bool:
        return self.model in _PINHOLE_AT_ZERO and not any(self.distortion.values())


@dataclass(frozen=True)
class ColmapImage:
    """One registered image. `quat` has any length but zero; points2d are all its features, those without a 3D point too."""

    name: str
    camera_id: int
    quat: Float[Array, " 4"]                # wxyz, rotates world to camera
    translation: Float[Array, " 3"]
    points2d: Float[Array, "M 2"]           # pixels


@dataclass(frozen=True)
class ColmapModel:
    """A sparse model as the file says it. The track of point p is tracks[track_starts[p]:track_starts[p + 1]], rows of
    (image id, index into that image's points2d); an image may be missing when someone has removed it from the model by hand.
    """

    cameras: dict[int, ColmapCamera]
    images: dict[int, ColmapImage]
    points: Float[Array, "P 3"]
    points_rgb: UInt8[Array, "P 3"]
    track_starts: Int[Array, " P+1"]
    tracks: Int[Array, "T 2"]


def find_model(folder: Path) -> str | None:
    """The suffix of the model that the folder holds: ".bin" (first choice), ".txt" or None."""
    return next((suffix for suffix in (".bin", ".txt") if os.path.exists(folder / f"cameras{suffix}")), None)


def read_model(folder: Path) -> ColmapModel:
    """The model in `folder`; raises BadFile(path, where, why). Every count is checked against the file before memory is asked for."""
    suffix = find_model(folder)
    if suffix is None:
        raise BadFile(folder, "", "no cameras.bin or cameras.txt")
    binary = suffix == ".bin"
    cameras_path, images_path, points_path = (folder / f"{name}{suffix}" for name in ("cameras", "images", "points3D"))
    cameras = (_cameras_bin if binary else _cameras_txt)(cameras_path, read_bytes(cameras_path))
    images = (_images_bin if binary else _images_txt)(images_path, read_bytes(images_path))
    for image in images.values():
        if image.camera_id not in cameras:
            raise BadFile(images_path, image.name, f"its camera {image.camera_id} is not in {cameras_path.name}")
    return ColmapModel(cameras, images, *(_points_bin if binary else _points_txt)(points_path, read_bytes(points_path)))


class _Cursor:
    """Reads records from bytes; whatever would pass the end is a BadFile."""

    def __init__(self, path, data: bytes):
        self.path, self.data, self.at = path, data, 0

    def bad(self, why: str) -> BadFile:
        return BadFile(self.path, f"byte {self.at}", why)

    def need(self, size: int, what: str) -> None:
        if size > len(self.data) - self.at:
            raise self.bad(f"the file ends early: {what} would take {size} bytes, {len(self.data) - self.at} are left")

    def take(self, record: struct.Struct, what: str) -> tuple:
        self.need(record.size, what)
        self.at += record.size
        return record.unpack_from(self.data, self.at - record.size)

    def count(self, least_bytes: int, what: str) -> int:
        """A 64-bit count of things that take at least so many bytes each."""
        (count,) = self.take(_COUNT, f"the number of {what}")
        self.need(count * least_bytes, f"{count} {what}")
        return count

    def end(self, what: str) -> None:
        if self.at != len(self.data):       # else a count that is too small would drop the rest without a word
            raise self.bad(f"{len(self.data) - self.at} bytes follow the last of the {what}")


_COUNT, _CAMERA, _IMAGE, _POINT = (struct.Struct(layout) for layout in ("<Q", "<IiQQ", "<I7dI", "<Q3d3BdQ"))
_POINT2D = np.dtype([("xy", "<f8", 2), ("point_id", "<i8")])
_POINT_HEAD = np.dtype([("id", "<u8"), ("xyz", "<f8", 3), ("rgb", "u1", 3), ("error", "<f8"), ("track", "<u8")])


def _cameras_bin(path, data: bytes) -> dict[int, ColmapCamera]:
    cursor, cameras = _Cursor(path, data), {}
    for _ in range(cursor.count(_CAMERA.size, "cameras")):
        key, model, width, height = cursor.take(_CAMERA, "a camera")
        if not 0 <= model < len(MODELS):
            raise cursor.bad(f"camera {key} has the unknown model {model}")
        values = cursor.take(struct.Struct(f"<{len(MODELS[model][1].split())}d"), f"camera {key}")
        _add_camera(cameras, cursor.bad, key, MODELS[model], width, height, values)
    cursor.end("cameras")
    return cameras


def _images_bin(path, data: bytes) -> dict[int, ColmapImage]:
    cursor, images, names = _Cursor(path, data), {}, set()
    for _ in range(cursor.count(_IMAGE.size + 9, "images")):
        key, *pose, camera = cursor.take(_IMAGE, "an image")
        end = data.find(b"\0", cursor.at)
        if end < 0:
            raise cursor.bad(f"the file ends inside the name of image {key}")
        name, cursor.at = data[cursor.at:end], end + 1
        n = cursor.count(_POINT2D.itemsize, f"points of image {key}")
        points2d = np.frombuffer(data, _POINT2D, n, cursor.at)["xy"]
        cursor.at += n * _POINT2D.itemsize
        _add_image(images, names, cursor.bad, key, name, camera, np.array(pose), points2d)
    cursor.end("images")
    return images


def _points_bin(path, data: bytes):
    cursor, heads, tracks = _Cursor(path, data), [], []
    n, at, size = cursor.count(_POINT.size, "points"), cursor.at, len(data)
    track_length = struct.Struct("<Q").unpack_from
    for i in range(n):      # records have no fixed size: this loop finds them, numpy reads them
        head = at + _POINT.size
        end = head + 8 * track_length(data, head - 8)[0] if head <= size else head
        if end > size:
            cursor.at = at
            raise cursor.bad(f"the file ends early: point {i} takes {end - at} bytes, {size - at} are left")
        heads.append(data[at:head])
        tracks.append(data[head:end])
        at = end
    cursor.at = at
    cursor.end("points")
    head = np.frombuffer(b"".join(heads), _POINT_HEAD)
    track = np.frombuffer(b"".join(tracks), "<u4").reshape(-1, 2)
    return _checked_points(path, head["xyz"], head["rgb"], head["track"], track)


def _cameras_txt(path, data: bytes) -> dict[int, ColmapCamera]:
    cameras, by_name = {}, {name: (name, params) for name, params in MODELS}
    for bad, line in _lines(path, data, b"cameras"):
        words = line.split()
        model = by_name.get(words[1].decode("latin-1")) if len(words) >= 4 else None
        if model is None or len(words) != 4 + len(model[1].split()):
            raise bad(f"expected CAMERA_ID, MODEL, WIDTH, HEIGHT and the model's parameters: {line!r:.80}")
        key, width, height = _integers(bad, [words[0], *words[2:4]])
        _add_camera(cameras, bad, key, model, width, height, _numbers(bad, words[4:]).tolist())
    return cameras


def _images_txt(path, data: bytes) -> dict[int, ColmapImage]:
    images, names = {}, set()
    for bad, line, second in _lines(path, data, b"images", pairs=True):
        words = line.split(maxsplit=9)      # a name may hold spaces
        if len(words) != 10:
            raise bad(f"expected IMAGE_ID, QW, QX, QY, QZ, TX, TY, TZ, CAMERA_ID, NAME: {line!r:.80}")
        key, camera = _integers(bad, [words[0], words[8]])
        observed = _numbers(bad, second.split())
        if len(observed) % 3:
            raise bad(f"{len(observed)} numbers in the line of points; expected X, Y, POINT3D_ID triples")
        _add_image(images, names, bad, key, words[9].rstrip(), camera, _numbers(bad, words[1:8]), observed.reshape(-1, 3)[:, :2])
    return images


def _points_txt(path, data: bytes):
    heads, tracks = [], []
    for bad, line in _lines(path, data, b"points"):
        values = _numbers(bad, line.split())
        if len(values) < 8 or len(values) % 2:
            raise bad(f"expected POINT3D_ID, X, Y, Z, R, G, B, ERROR and (IMAGE_ID, POINT2D_IDX) pairs: {line!r:.80}")
        colour, track = values[4:7], values[8:]
        if not ((colour >= 0) & (colour < 256)).all() or not ((track >= 0) & (track < 2**32) & (track == np.floor(track))).all():
            raise bad(f"a colour or an index of the track is out of range: {line!r:.80}")
        heads.append(values[1:7])
        tracks.append(track.astype(np.uint32))
    head = np.array(heads).reshape(-1, 6)
    track = np.concatenate([np.empty(0, np.uint32), *tracks]).reshape(-1, 2)
    return _checked_points(path, head[:, :3], head[:, 3:].astype(np.uint8), np.array([len(t) // 2 for t in tracks], np.int64), track)


def _lines(path, data: bytes, what: bytes, pairs: bool = False):
    """(function that makes the BadFile, line) for every line that is neither empty nor a comment; with `pairs` also the next line."""
    lines = data.split(b"\n")
    ended = lines[-1] == b""
    if ended:
        lines.pop()
    stated = re.search(rb"^# Number of " + what + rb": (\d{1,18})\b", data[:1024], re.MULTILINE)
    found, i = 0, 0
    while i < len(lines):
        line, number = lines[i].strip(), i + 1
        i += 1
        if not line or line.startswith(b"#"):
            continue
        bad = lambda why, number=number: BadFile(path, f"line {number}", why)
        found += 1
        if pairs:
            if i == len(lines) and stated:
                raise bad("the file ends before the line of points of this image")
            second = lines[i] if i < len(lines) else b""
            i += 1
        yield (bad, line, second) if pairs else (bad, line)
    # COLMAP states the count in a comment: the only way to notice a text file that was cut between two lines.
    if stated and (found != int(stated[1]) or not ended):
        why = f"{found} {what.decode()} found where the comment on top says {int(stated[1])}" if ended else "the last line has no end"
        raise BadFile(path, f"line {len(lines)}", f"{why}: the file was cut, or edited without its comment")
    if not found and not stated and (data or what != b"points"):    # COLMAP's FAQ tells users with known poses to make points3D.txt empty
        raise BadFile(path, "", f"holds no {what.decode()} and no comment that says so")


def _integers(bad, words: list[bytes]) -> list[int]:
    if not all(re.fullmatch(rb"[0-9]{1,18}", word) for word in words):
        raise bad(f"expected whole numbers: {b' '.join(words)!r:.80}")
    return [int(word) for word in words]


def _numbers(bad, words: list[bytes]) -> np.ndarray:
    try:
        return np.array(list(map(float, words)), dtype=np.float64)
    except ValueError as e:
        raise bad(f"not a number: {e}"[:120]) from e


def _add_camera(cameras: dict, bad, key: int, model: tuple[str, str], width: int, height: int, values) -> None:
    if key in cameras:
        raise bad(f"camera {key} appears twice")
    if not (1 <= width <= 32768 and 1 <= height <= 32768):
        raise bad(f"camera {key} is {width} x {height}; expected 1 to 32768 pixels a side")
    if not np.isfinite(values).all():
        raise bad(f"camera {key} has a parameter that is not finite: {list(values)}")
    cameras[key] = ColmapCamera(model[0], width, height, dict(zip(model[1].split(), values)))


def _add_image(images: dict, names: set, bad, key: int, raw_name: bytes, camera: int, pose: np.ndarray, points2d: np.ndarray) -> None:
    try:
        name = raw_name.decode("utf-8")
    except UnicodeDecodeError as e:
        raise bad(f"the name of image {key} is not UTF-8: {raw_name!r:.80}") from e
    if not name or any(ord(c) < 32 or ord(c) == 127 for c in name):
        raise bad(f"image {key} has the name {name!r:.80}")
    if key in images or name in names:
        raise bad(f"image {key} ({name}) appears twice")
    if not np.abs(pose).max() < 1e15 or np.linalg.norm(pose[:4]) < 1e-6:      # NaN fails the first
        raise bad(f"image {key} ({name}) has no valid pose: {pose.tolist()}")
    if not np.isfinite(points2d).all():
        raise bad(f"image {key} ({name}) has a point that is not finite")
    names.add(name)
    images[key] = ColmapImage(name, camera, pose[:4], pose[4:], points2d)


def _checked_points(path, xyz, rgb, track_lengths, track):
    good = (np.abs(xyz) < 1e15).all(axis=1)     # false for NaN too; squares of anything less are still finite in float32
    if not good.all():
        i = int(good.argmin())
        raise BadFile(path, f"point {i}", f"its position is not usable: {xyz[i].tolist()}")
    starts = np.concatenate([[0], np.cumsum(track_lengths.astype(np.int64))])
    packed = lambda x: np.empty(x.shape, x.dtype) if len(x) == 0 else np.ascontiguousarray(x)      # numpy calls any empty array contiguous, torch does not
    return packed(xyz), packed(rgb), starts, track.astype(np.int64)
