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

import numpy as np
from jaxtyping import Float, UInt8
from numpy import ndarray as Array

from .scene import LOG_SCALE_MAX, LOG_SCALE_MIN, Scene

CHUNK = 65_536                  # rows of a chunk; the last one has what is left
PLANES = ("core", "sh", "features", "float32", "heat")      # by their number on the wire
RECORD = np.dtype([("mean", "<u2", 3), ("log_scale", "u1", 3), ("rotation", "<u4"), ("opacity", "u1"), ("sh0", "u1", 3)])
MESSAGE = struct.Struct("<4sIIIIB3x")       # "SKM1", frame, chunk, version, revision, plane; the chunk's bytes follow
VALUE_MAX = np.float32(1e30)    # beyond it a difference leaves float32
BLOCK = 8192                    # rows that are worked on at once, so that they stay in the cache


def core(scene: Scene) -> bytes:
    """The core plane of a chunk. A row that is not finite becomes transparent."""
    n = len(scene)
    means, log_scales, sh0 = (_columns(x) for x in (scene.means, scene.log_scales, scene.sh[:, 0]))
    quats, logits = _columns(scene.quats), _array(scene.logit_opacities)
    # A sum is not finite where one of its terms is not; the other way round it costs a second look.
    if not all(np.isfinite(x.sum(dtype=np.float64)) for x in (means, log_scales, sh0, quats, logits)):
        unfit = ~np.isfinite(np.concatenate([means, log_scales, sh0, quats, logits[None]])).all(axis=0)
        means, log_scales, sh0, quats = (np.where(unfit, x[:, ~unfit][:, :1] if not unfit.all() else np.float32(0), x) for x in (means, log_scales, sh0, quats))
        logits = np.where(unfit, np.float32(-100), logits)
    means, sh0 = (np.clip(x, -VALUE_MAX, VALUE_MAX) for x in (means, sh0))
    log_scales = np.clip(log_scales, LOG_SCALE_MIN, LOG_SCALE_MAX)
    ranges = [_range(x, axis=1) for x in (means, log_scales, sh0)]
    records = np.empty(n, RECORD)
    for name, columns, (low, high), most in zip(("mean", "log_scale", "sh0"), (means, log_scales, sh0), ranges, (65_535, 255, 255)):
        for k in range(3):
            records[name][:, k] = _quantised(columns[k], low[k], high[k], most)
    records["rotation"] = _rotations(quats)
    records["opacity"] = np.rint(255 / (1 + np.exp(np.clip(-logits, -80, 80))))
    logit_range = np.float32([logits.min(), logits.max()] if n else [0, 0])
    return b"".join([struct.pack("<4sI", b"SKC1", n), *(x.astype("<f4").tobytes() for pair in ranges for x in pair), logit_range.astype("<f4").tobytes(), records.tobytes()])


def sh(scene: Scene) -> bytes:
    """The plane of the SH bands above 0 of a chunk."""
    rest = _array(scene.sh)[:, 1:].reshape(len(scene), 3 * (scene.sh.shape[1] - 1))
    low, high = _range(rest, axis=0)
    if not (np.isfinite(low).all() and np.isfinite(high).all()) or max(-low.min(initial=0), high.max(initial=0)) > VALUE_MAX:
        rest = np.clip(np.nan_to_num(rest, nan=0, posinf=0, neginf=0), -VALUE_MAX, VALUE_MAX)
        low, high = _range(rest, axis=0)
    return struct.pack("<4sII", b"SKH1", len(scene), rest.shape[1] // 3) + low.astype("<f4").tobytes() + high.astype("<f4").tobytes() + _blocks(rest, low, high).tobytes()


def features(scene: Scene) -> bytes:
    """The plane of the features of a chunk: 8 bits a channel."""
    values = np.clip(np.nan_to_num(_array(scene.features), nan=0, posinf=0, neginf=0), -VALUE_MAX, VALUE_MAX)
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
    values = np.clip(np.nan_to_num(values, nan=0, posinf=0, neginf=0), -VALUE_MAX, VALUE_MAX)
    low, high = _range(values, axis=0)
    return struct.pack("<4sII", b"SKT1", *values.shape) + low.astype("<f4").tobytes() + high.astype("<f4").tobytes() + _blocks(values, low, high).tobytes()


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


def message(plane: str, chunk: int, version: int, frame: int, revision: int, data: bytes) -> bytes:
    """A plane of a chunk as a message of the socket."""
    return MESSAGE.pack(b"SKM1", frame, chunk, version, revision, PLANES.index(plane)) + data


def container(manifest: dict, planes: Iterable[bytes]) -> bytes:
    """What an exported page carries: u32 length and JSON of the manifest, then u32 length and bytes of each chunk's core and sh, chunk after chunk."""
    parts = [json.dumps(manifest, allow_nan=False).encode(), *planes]
    return b"".join(part for data in parts for part in (struct.pack("<I", len(data)), data))


def _array(x) -> Array:
    """A tensor of the CPU as float32, without a copy where it is that already."""
    return x.detach().numpy().astype(np.float32, copy=False)


def _columns(x) -> Float[Array, "C n"]:
    return np.ascontiguousarray(_array(x).T)


def _range(x: Array, axis: int) -> tuple[Array, Array]:
    if x.shape[axis] == 0:
        zero = np.zeros(x.shape[1 - axis], np.float32)
        return zero, zero
    return x.min(axis=axis), x.max(axis=axis)


def _quantised(x: Array, low: np.float32, high: np.float32, most: int) -> Array:
    """Rounded, still float32: assigning to whole numbers cuts nothing off."""
    out = x - low
    out *= np.float32(0 if low == high else most / (float(high) - float(low)))
    return np.rint(np.minimum(out, np.float32(most), out=out), out=out)


def _blocks(x: Float[Array, "n C"], low: Float[Array, " C"], high: Float[Array, " C"], most: int = 255) -> UInt8[Array, "n C"]:
    """Each channel quantised in its own range."""
    spread = high.astype(np.float64) - low
    gain = np.where(spread > 0, most / np.where(spread > 0, spread, 1), 0).astype(np.float32)
    out = np.empty(x.shape, np.uint8)
    for at in range(0, len(x), BLOCK):
        block = x[at:at + BLOCK] - low
        block *= gain
        np.minimum(block, np.float32(most), out=block)
        out[at:at + BLOCK] = np.rint(block, out=block)
    return out


def _rotations(quats: Float[Array, "4 n"]) -> Array:
    """Packed; a zero quaternion is the identity."""
    w, x, y, z = quats
    size = np.abs(quats)
    second, fourth = size[1] > size[0], size[3] > size[2]
    upper = np.where(fourth, size[3], size[2]) > np.where(second, size[1], size[0])
    index = np.where(upper, np.uint32(2) + fourth, second.astype(np.uint32))
    largest = np.where(upper, np.where(fourth, z, y), np.where(second, x, w))
    largest = np.where(largest == 0, np.float32(1), largest)
    # Divided by the largest, sign and all: no square leaves the range.
    others = np.stack([np.where(index == 0, x, w), np.where(index <= 1, y, x), np.where(index <= 2, z, y)])
    others /= largest
    gain = np.float32(511.5 * 2**0.5) / np.sqrt(1 + (others * others).sum(axis=0))
    q = np.rint(others * gain + np.float32(511.5)).astype(np.uint32)
    return index << 30 | q[0] << 20 | q[1] << 10 | q[2]
