"""Posed video in the formats of RealEstate10K: text files of cameras, `.torch` chunks of photos and cameras, evaluation indices.

A camera is eighteen numbers: fx, fy, cx, cy over the picture's width and height, two zeros, and the 3 x 4 world_to_cam row by row
(OpenCV axes). A chunk, as the data of pixelSplat and MVSplat comes (ACID and DTU too), is a torch file of a list of sequences.
"""
from __future__ import annotations

import io
import json
import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from numpy import ndarray as Array

from ..errors import BadFile
from .photos import _MODES, PIXELS_MAX, _decoder
from .reading import Report, opened, silent, size_of

BYTES_MAX = 2 << 30
ROTATION_ERROR_MAX = 1e-3


@dataclass(frozen=True)
class Sequence:
    """One video: n photos as they are stored, and their cameras."""

    path: Path                                  # of the chunk
    key: str
    url: str
    timestamps: Int[Array, " n"]                # microseconds
    K_normalised: Float[Array, "n 3 3"]         # row 0 over the picture's width, row 1 over its height
    world_to_cam: Float[Array, "n 4 4"]
    pictures: tuple[bytes, ...]                 # JPEG or PNG

    def __len__(self) -> int:
        return len(self.pictures)

    def image(self, i: int) -> UInt8[Array, "H W 3"]:
        """Pixels of photo i. Raises BadFile when it is damaged."""
        data, where = self.pictures[i], f"{self.key}, photo {i}"
        try:
            decoder = _decoder(self.path, data[:12])
            with decoder(io.BytesIO(data)) as picture:
                if picture.size[0] * picture.size[1] > PIXELS_MAX or picture.mode not in _MODES:
                    raise ValueError(f"{picture.size[0]}x{picture.size[1]} pixels of kind {picture.mode!r}")
                return np.array(picture.convert("RGB"))
        except Exception as e:      # on damaged bytes Pillow's decoders raise about any type
            raise BadFile(self.path, where, f"the picture is cut or damaged: {e}"[:200]) from e

    def K(self, i: int, width: int, height: int) -> Float[Array, "3 3"]:
        """Intrinsics of photo i in pixels of that size."""
        return self.K_normalised[i] * np.array([[width], [height], [1.0]])


def read_chunk(path: Path) -> list[Sequence]:
    """The sequences of a `.torch` chunk. Only tensors and plain values are ever unpickled; pictures are decoded when they are asked for.

    Raises BadFile naming the sequence and what is wrong with it: an entry that is missing or of another kind, cameras that are none.
    """
    with opened(path) as file:
        if (size := size_of(file)) > BYTES_MAX:
            raise BadFile(path, "", f"{size} bytes; at most {BYTES_MAX} are read")
        entries = unpickled(path, file.read())
    if not isinstance(entries, list) or not entries:
        raise BadFile(path, "", f"holds {type(entries).__name__}; expected a list of sequences")
    return [_sequence(path, i, entry) for i, entry in enumerate(entries)]


def unpickled(path: Path, data: bytes):
    """What a torch file holds, as long as that is tensors and plain values; BadFile for everything else. There is no other way to read one."""
    try:
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as e:      # on damaged bytes the unpickler raises about any type
        named = re.search(r"(?:GLOBAL|global|function|class) ([\w.]+\.[\w.]+)", str(e))
        said = "".join(c if c.isprintable() else " " for c in str(e))
        why = f"it wants to run or build {named[1]}: only tensors and plain values are read" if named else f"it is no torch file, or damaged: {' '.join(said.split())[:150]}"
        raise BadFile(path, "", why) from e


def read_txt(path: Path) -> tuple[str, Int[Array, " n"], Float[Array, "n 3 3"], Float[Array, "n 4 4"]]:
    """URL, timestamps (microseconds), intrinsics over the picture's size and world_to_cam of a text file of cameras.

    A line is a timestamp and eighteen numbers, or these alone (timestamps are then -1); a first line that is no camera is the URL.
    Raises BadFile naming the line.
    """
    with opened(path) as file:
        if (size := size_of(file)) > 64 << 20:
            raise BadFile(path, "", f"{size} bytes; at most {64 << 20} are read")
        lines = file.read().decode("utf-8", "replace").splitlines()
    url, times, rows = "", [], []
    for number, line in enumerate(lines, 1):
        words = line.split()
        if not words:
            continue
        if number == 1 and len(words) not in (18, 19):
            url = line.strip()
            continue
        try:
            values = [float(word) for word in words]
            times.append(int(words[0]) if len(words) == 19 else -1)
        except ValueError as e:
            raise BadFile(path, f"line {number}", f"{line!r:.80}; expected numbers") from e
        if len(values) not in (18, 19):
            raise BadFile(path, f"line {number}", f"{len(values)} numbers; expected a timestamp and 18, or 18")
        if not -1 <= times[-1] < 2 ** 62:
            raise BadFile(path, f"line {number}", f"timestamp {words[0]:.30}; expected microseconds")
        rows.append(values[-18:])
    if not rows:
        raise BadFile(path, "", "holds no camera; expected lines of a timestamp and 18 numbers")
    K, world_to_cam = cameras(np.array(rows), lambda i, why: BadFile(path, f"camera {i}", why))
    return url, np.array(times), K, world_to_cam


def read_index(path: Path, report: Report = silent) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
    """Context and target photos by sequence of an evaluation index. Sequences without any (null) are left out; `report` is told how many."""
    with opened(path) as file:
        if (size := size_of(file)) > 64 << 20:
            raise BadFile(path, "", f"{size} bytes; at most {64 << 20} are read")
        try:
            top = json.loads(file.read())
        except (ValueError, RecursionError) as e:
            raise BadFile(path, "", "not JSON") from e
    if not isinstance(top, dict) or not top:
        raise BadFile(path, "", "expected an object of sequences")
    index = {}
    for key, entry in top.items():
        if entry is None:
            continue
        chosen = [entry.get(name) if isinstance(entry, dict) else None for name in ("context", "target")]
        if not all(isinstance(x, list) and x and all(type(i) is int and 0 <= i < 10 ** 9 for i in x) for x in chosen):
            raise BadFile(path, f"{key!r:.80}", "expected null, or lists of photo numbers under context and target")
        index[key] = tuple(chosen[0]), tuple(chosen[1])
    if not index:
        raise BadFile(path, "", f"all {len(top)} entries are null: there is nothing to evaluate")
    if len(index) < len(top):
        report(f"{path}: {len(top) - len(index)} of {len(top)} sequences have no photos to evaluate (null) and are left out")
    return index


def cameras(rows: Float[Array, "n 18"], bad) -> tuple[Float[Array, "n 3 3"], Float[Array, "n 4 4"]]:
    """Intrinsics over the picture's size, and world_to_cam, of rows of numbers. Raises bad(row, why) for what is no camera."""
    rows = rows.astype(np.float64)
    K, world_to_cam = np.zeros((len(rows), 3, 3)), np.tile(np.eye(4), (len(rows), 1, 1))
    for i, row in enumerate(rows):
        if not np.isfinite(row).all() or np.abs(row).max() > 1e12:
            raise bad(i, "holds a NaN, an infinity or a huge number")
        fx, fy, cx, cy = row[:4]
        if fx > 20 and fy > 20:
            raise bad(i, f"fx={fx:g} fy={fy:g} look like pixels; expected them over the picture's width and height")
        if not (0.05 < fx <= 20 and 0.05 < fy <= 20 and -1 <= cx <= 2 and -1 <= cy <= 2):
            raise bad(i, f"fx={fx:g} fy={fy:g} cx={cx:g} cy={cy:g}; expected 0.05 to 20 and -1 to 2, over the picture's width and height")
        world_to_cam[i, :3] = row[6:].reshape(3, 4)
        turn = world_to_cam[i, :3, :3]
        if np.abs(turn @ turn.T - np.eye(3)).max() > ROTATION_ERROR_MAX or np.linalg.det(turn) < 0:
            raise bad(i, "the first three columns of world_to_cam are no rotation")
        K[i] = [[fx, 0, cx], [0, fy, cy], [0, 0, 1]]
    return K, world_to_cam


def _sequence(path: Path, number: int, entry) -> Sequence:
    bad = partial(BadFile, path, f"sequence {number}")
    if not isinstance(entry, dict):
        raise bad(f"is {type(entry).__name__}; expected an object")
    key = entry.get("key")
    if not isinstance(key, str) or not key.isprintable() or len(key) > 200:
        raise bad("key: expected a name")
    bad = partial(BadFile, path, f"sequence {number} ({key})")
    rows, times, pictures, url = (entry.get(name) for name in ("cameras", "timestamps", "images", "url"))
    if not isinstance(rows, torch.Tensor) or rows.ndim != 2 or rows.shape[1] != 18 or len(rows) == 0 or not rows.is_floating_point() or rows.layout != torch.strided:
        raise bad(f"cameras: {_shown(rows)}; expected floating-point numbers [n, 18]")
    if not isinstance(pictures, list) or len(pictures) != len(rows):
        raise bad(f"images: {len(pictures) if isinstance(pictures, list) else 'no list'}; expected {len(rows)}, as many as cameras")
    for i, picture in enumerate(pictures):
        if not isinstance(picture, torch.Tensor) or picture.dtype != torch.uint8 or picture.ndim != 1 or picture.layout != torch.strided:
            raise bad(f"images[{i}]: {_shown(picture)}; expected the bytes of a picture")
    if not isinstance(times, torch.Tensor) or times.shape != (len(rows),) or times.dtype != torch.int64 or times.layout != torch.strided:
        raise bad(f"timestamps: {_shown(times)}; expected int64 [{len(rows)}]")
    K, world_to_cam = cameras(rows.float().numpy(), lambda i, why: bad(f"cameras[{i}]: {why}"))
    return Sequence(path, key, url if isinstance(url, str) else "", times.numpy(), K, world_to_cam, tuple(x.numpy().tobytes() for x in pictures))


def _shown(x) -> str:
    return f"{x.dtype} {list(x.shape)}" if isinstance(x, torch.Tensor) else type(x).__name__
