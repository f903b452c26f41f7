"""A scene as the bytes that the browser reads: chunks of Gaussians in planes, and the container of an exported page. All little-endian.

A plane of a chunk of n rows, in bytes:
- core: "SKC1", u32 n; f32[3] low and high of the means, of the log scales, of SH band 0; f32 low and high of the opacity logits; then n records of 17: u16[3] mean,
  u8[3] log scale, u32 rotation, u8 opacity, u8[3] SH band 0. The rotation has the index of its largest component (of w x y z) in the two highest bits, then ten bits for each of
  the others in order: (q / 1023 * 2 - 1) / sqrt(2), the largest being positive. The opacity is 255 times itself; what is 0 or 255 is read as half a step inside;
- sh: "SKH1", u32 n, u32 c coefficients above band 0; f32[3c] low, f32[3c] high; u8[n, c, 3];
- features: "SKF1", u32 n, u32 channels; f32[channels] scale, f32[channels] offset; i8[n, channels], value = q * scale + offset;
- float32: "SKX1", u32 n, u32 K coefficients; f32 means, quats, log scales, logit opacities, SH, one array after the other;
- heat: "SKT1", u32 n, u32 channels; f32[channels] low, f32[channels] high; u8[n, channels].
A quantised value is round((x - low) / (high - low) * most), 0 where low = high; ranges are the chunk's own.
"""
from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int32, UInt8, UInt32
from numpy import ndarray as Array

from . import native
from .scene import ABSENT, LOG_SCALE_MAX, Scene

CHUNK = 65_536                  # rows of a chunk; the last one has what is left
PLANES = ("core", "sh", "features", "float32", "heat")      # by their number on the wire
RECORD = np.dtype([("mean", "<u2", 3), ("log_scale", "u1", 3), ("rotation", "<u4"), ("opacity", "u1"), ("sh0", "u1", 3)])
MESSAGE = struct.Struct("<4sIIIIB3x")       # "SKM1", frame, chunk, version, revision, plane; the chunk's bytes follow
VALUE_MAX = np.float32(1e30)    # beyond it a difference leaves float32
BLOCK = 16_384                  # rows that are worked on at once: what they need stays in the cache, and fresh memory costs more than the arithmetic


@dataclass(frozen=True)
class Cores:
    """The core planes of a scene's chunks, in a buffer that is there for as long as anybody has one of them."""

    count: int              # rows of the scene
    memory: Int32[Array, "chunks words"]

    def __len__(self) -> int:
        return len(self.memory)

    def __getitem__(self, chunk: int) -> memoryview:
        return memoryview(self.memory[chunk].view(np.uint8))[:size_of("core", min(CHUNK, self.count - chunk * CHUNK), 1)]


def cores(scene: Scene, room: Callable[[int], Int32[Array, " words"]] = lambda words: np.empty(words, np.int32)) -> Cores:
    """The core planes of all chunks, in `room` for so many words. A row that is not finite becomes transparent.

    By the native library on torch's threads; without one, and where a chunk holds what is not finite or huge, by numpy.
    """
    n, chunks = len(scene), -(-len(scene) // CHUNK)
    words = -(-size_of("core", min(n, CHUNK), 1) // 4)
    out = Cores(n, room(chunks * words)[:chunks * words].reshape(chunks, words))
    library, unfit = native.library_for(scene.means), torch.ones(chunks, dtype=torch.int32)
    if library is not None and n:
        fields = (x.detach().contiguous() for x in (scene.means, scene.quats, scene.log_scales, scene.logit_opacities, scene.sh))
        library.sk_pack_core(n, scene.sh.shape[1], *fields, CHUNK, words, torch.from_numpy(out.memory), unfit, None)
    for k in unfit.nonzero().flatten().tolist():
        out[k][:] = _core(scene.rows(slice(k * CHUNK, (k + 1) * CHUNK)))
    return out


def core(scene: Scene) -> bytes:
    """The core plane of a chunk."""
    assert len(scene) <= CHUNK
    return bytes(cores(scene)[0]) if len(scene) else _core(scene)


def _core(scene: Scene) -> bytes:
    """The same by numpy: what the native library is measured against."""
    n, fields = len(scene), [_array(x) for x in (scene.means, scene.log_scales, scene.sh[:, 0], scene.quats, scene.logit_opacities[:, None])]
    blocks = [slice(at, at + BLOCK) for at in range(0, n, BLOCK)]
    # A sum is finite where all its terms are; the other way round it costs a second look.
    if not all(np.isfinite(x[rows].sum(dtype=np.float64)) for x in fields for rows in blocks):
        fields = _transparent_where_not_finite(fields)
    ranges = [_range_by(blocks, x) for x in fields]
    limits = (VALUE_MAX, np.float32(LOG_SCALE_MAX), VALUE_MAX, VALUE_MAX, VALUE_MAX)        # scales are clamped wherever they are used
    if any(max(-low.min(), high.max()) > limit for (low, high), limit in zip(ranges, limits)):
        fields = [np.clip(x, -limit, limit) for x, limit in zip(fields, limits)]
        ranges = [_range_by(blocks, x) for x in fields]
    records = np.empty(n, RECORD)
    for rows in blocks:
        out = records[rows]
        for name, x, (low, high), most in zip(("mean", "log_scale", "sh0"), fields, ranges, (65_535, 255, 255)):
            columns = _columns(x[rows])
            for k in range(3):
                out[name][:, k] = _quantised(columns[k], low[k], high[k], most)
        out["rotation"] = _rotations(_columns(fields[3][rows]))
        out["opacity"] = np.rint(255 / (1 + np.exp(np.clip(-fields[4][rows, 0], -80, 80))))
    header = np.concatenate([x for pair in (*ranges[:3], ranges[4]) for x in pair]).astype("<f4")
    return b"".join([struct.pack("<4sI", b"SKC1", n), header.tobytes(), records.data if n else b""])


def sh(scene: Scene) -> bytes:
    """The plane of the SH bands above 0 of a chunk."""
    rest = _array(scene.sh)[:, 1:].reshape(len(scene), 3 * (scene.sh.shape[1] - 1))
    low, high = _range(rest, axis=0)
    if not (np.isfinite(low).all() and np.isfinite(high).all()) or max(-low.min(initial=0), high.max(initial=0)) > VALUE_MAX:
        rest = _bounded(rest)
        low, high = _range(rest, axis=0)
    return struct.pack("<4sII", b"SKH1", len(scene), rest.shape[1] // 3) + _ranged(rest, low, high)


def features(scene: Scene) -> bytes:
    """The plane of the features of a chunk: 8 bits a channel."""
    values = _bounded(_array(scene.features))
    low, high = _range(values, axis=0)
    # Whole numbers from -127 to 127 for low to high; a channel that does not vary is all offset.
    scale, offset = ((high - low) / 254).astype("<f4"), (low + (high - low) / 2).astype("<f4")
    q = (_blocks(values, low, high, 254).astype(np.int16) - 127).astype(np.int8)
    return struct.pack("<4sII", b"SKF1", len(scene), values.shape[1]) + scale.tobytes() + offset.tobytes() + np.where(scale == 0, np.int8(0), q).tobytes()


def float32(scene: Scene) -> bytes:
    """The whole of a chunk, without its features, unrounded."""
    fields = (scene.means, scene.quats, scene.log_scales, scene.logit_opacities, scene.sh)
    return b"".join([struct.pack("<4sII", b"SKX1", len(scene), scene.sh.shape[1]), *(_array(x).astype("<f4", copy=False).tobytes() for x in fields)])


def heat(values: Float[Array, "n C"]) -> bytes:
    """The plane of what Gaussians are coloured by beside their colour."""
    values = _bounded(values)
    return struct.pack("<4sII", b"SKT1", *values.shape) + _ranged(values, *_range(values, axis=0))


ENCODERS: dict[str, Callable[[Scene], bytes]] = {"core": core, "sh": sh, "features": features, "float32": float32}


def size_of(plane: str, n: int, coefficients: int, channels: int = 0) -> int:
    """Bytes of a plane of a chunk of n rows, before it is made."""
    return {"core": 88 + RECORD.itemsize * n, "sh": 12 + (24 + 3 * n) * (coefficients - 1), "features": 12 + (8 + n) * channels,
            "float32": 12 + 4 * n * (11 + 3 * coefficients), "heat": 12 + (8 + n) * channels}[plane]


def pca(values: Float[Array, "N C"], weights: Float[Array, " N"], rows: int = 20_000) -> dict[str, list]:
    """The three directions in which the features vary most, weighted, and the 1st and 99th percentile along them, as the manifest has them.

    Fitted once per scene on at most `rows` of it, evenly taken: the same colours from every view. With fewer than three channels the rest of the basis is 0.
    """
    every = max(1, -(-len(values) // rows))
    x, w = np.nan_to_num(values[::every].astype(np.float64)), np.maximum(np.nan_to_num(weights[::every].astype(np.float64)), 1e-12)
    w = w / w.sum() if len(w) else w
    mean = w @ x
    _, _, directions = np.linalg.svd((x - mean) * np.sqrt(w)[:, None], full_matrices=False)
    basis = np.zeros((3, x.shape[1]))
    basis[:len(directions[:3])] = directions[:3]
    # The sign of a singular vector is arbitrary: the largest entry is made positive.
    basis *= np.where(np.take_along_axis(basis, np.abs(basis).argmax(axis=1)[:, None], axis=1) < 0, -1, 1) if x.shape[1] else 1
    along = (x - mean) @ basis.T
    low, high = np.percentile(along, (1, 99), axis=0) if len(x) else np.zeros((2, 3))
    return {"mean": mean.tolist(), "basis": basis.tolist(), "low": low.tolist(), "high": high.tolist()}


def message(plane: str, chunk: int, version: int, frame: int, revision: int, data: bytes | memoryview) -> bytes:
    """A plane of a chunk as a message of the socket."""
    return MESSAGE.pack(b"SKM1", frame, chunk, version, revision, PLANES.index(plane)) + data


def container(manifest: dict, planes: Iterable[bytes]) -> bytes:
    """What an exported page carries: u32 length and JSON of the manifest, then u32 length and bytes of each chunk's core and sh, chunk after chunk."""
    parts = [json.dumps(manifest, allow_nan=False).encode(), *planes]
    return b"".join(part for data in parts for part in (struct.pack("<I", len(data)), data))


def _array(x) -> Array:
    """A tensor of the CPU as float32, without a copy where it is that already."""
    return x.detach().numpy().astype(np.float32, copy=False)


def _bounded(x: Array) -> Array:
    """0 where it is not finite, and nothing beyond VALUE_MAX."""
    return np.clip(np.nan_to_num(x, nan=0, posinf=0, neginf=0), -VALUE_MAX, VALUE_MAX)


def _ranged(x: Float[Array, "n C"], low: Float[Array, " C"], high: Float[Array, " C"]) -> bytes:
    """The ranges of the channels, then 8 bits of each value."""
    return low.astype("<f4").tobytes() + high.astype("<f4").tobytes() + _blocks(x, low, high).tobytes()


def _columns(x: Float[Array, "n C"]) -> Float[Array, "C n"]:
    return np.ascontiguousarray(x.T)


def _range(x: Array, axis: int) -> tuple[Array, Array]:
    if x.shape[axis] == 0:
        zero = np.zeros(x.shape[1 - axis], np.float32)
        return zero, zero
    return x.min(axis=axis), x.max(axis=axis)


def _transparent_where_not_finite(fields: list[Array]) -> list[Array]:
    """Means, ..., logits with the rows that are not finite replaced by the first one that is, out of sight."""
    unfit = ~np.isfinite(np.concatenate(fields, axis=1)).all(axis=1)
    fields = [np.where(unfit[:, None], x[~unfit][:1] if not unfit.all() else np.float32(0), x) for x in fields]
    fields[4][unfit] = ABSENT
    return fields


def _range_by(blocks: list[slice], x: Float[Array, "n C"]) -> tuple[Float[Array, " C"], Float[Array, " C"]]:
    """Of each column."""
    if not blocks:
        return _range(x, axis=0)
    low, high = zip(*(_range(_columns(x[rows]), axis=1) for rows in blocks))
    return np.min(low, axis=0), np.max(high, axis=0)


def _quantised(x: Array, low: np.float32, high: np.float32, most: int) -> Array:
    """Rounded, still float32: assigning to whole numbers cuts nothing off."""
    out = x - low
    out *= np.float32(0 if low == high else min(most / (float(high) - float(low)), 3e38))
    return np.rint(np.minimum(out, np.float32(most), out=out), out=out)


def _blocks(x: Float[Array, "n C"], low: Float[Array, " C"], high: Float[Array, " C"], most: int = 255) -> UInt8[Array, "n C"]:
    """Each channel quantised in its own range."""
    spread = high.astype(np.float64) - low
    gain = np.where(spread > 0, most / np.where(spread > 0, spread, 1), 0).astype(np.float32)
    out = np.empty(x.shape, np.uint8)
    rows = max(1, BLOCK * 4 // max(1, x.shape[1]))
    for at in range(0, len(x), rows):
        block = x[at:at + rows] - low
        block *= gain
        np.minimum(block, np.float32(most), out=block)
        out[at:at + rows] = np.rint(block, out=block)
    return out


def _rotations(quats: Float[Array, "4 n"]) -> UInt32[Array, " n"]:
    """Packed; a zero quaternion is the identity."""
    size, (w, x, y, z) = np.abs(quats), quats.view(np.uint32)
    second, fourth = _mask(size[1] > size[0]), _mask(size[3] > size[2])
    upper = _mask(np.maximum(size[2], size[3]) > np.maximum(size[0], size[1]))
    index = _chosen(second & 1, fourth & 1 | 2, upper)
    largest = _chosen(_chosen(w, x, second), _chosen(y, z, fourth), upper).view(np.float32)
    largest += largest == 0
    # Divided by the largest, sign and all: no square leaves the range.
    others = np.empty((3, len(w)), np.float32)
    for k, (a, b) in enumerate(((w, x), (x, y), (y, z))):       # component k, or the one after it where the largest does not come later
        np.divide(_chosen(a, b, _mask(index <= k)).view(np.float32), largest, out=others[k])
    length = others[0] * others[0]
    length += others[1] * others[1]
    length += others[2] * others[2]
    length += 1
    others *= np.float32(511.5 * 2**0.5) / np.sqrt(length, out=length)
    others += np.float32(511.5)
    q = np.rint(others, out=others).astype(np.uint32)
    return index << 30 | q[0] << 20 | q[1] << 10 | q[2]


def _mask(condition: Bool[Array, " n"]) -> UInt32[Array, " n"]:
    """All bits where it holds."""
    return np.negative(condition.view(np.uint8).astype(np.uint32))


def _chosen(a: UInt32[Array, " n"], b: UInt32[Array, " n"], mask: UInt32[Array, " n"]) -> UInt32[Array, " n"]:
    """b where the mask has its bits, else a: without branches, five times as fast as np.where, which guesses each one."""
    return a ^ (a ^ b) & mask
