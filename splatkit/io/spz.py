"""SPZ of Niantic: versions 2 and 3 (one gzip stream) and 4 (a Zstandard stream for each attribute). Axes are turned between its right-up-back and the right-down-front of the PLY form."""
from __future__ import annotations

import math
import os
import struct

import numpy as np
import zstandard
from numpy import ndarray as Array

from ..errors import BadFile
from ..header import SceneHeader
from .atomic import replacing
from .fields import Fields, count_of, degree_of, empty, finished
from .packing import LOGITS, opacity_bytes, to_bytes, unit_quats, with_largest, without_largest
from .reading import Report, read_bytes, silent
from .streams import DEFLATE_MAX, Gunzip, gzipped, plausible, unzstd

MAGIC = b"NGSP"
GZIP_LEVEL, ZSTD_LEVEL = 3, 3       # 1M Gaussians of degree 3 are to be packed in 2 s
SH_BITS = (5, 4)                    # of degree 1 and of higher ones, as Niantic's writer has them: more pack badly

_COLOUR_SCALE = 0.15
_ANTIALIASED, _EXTENSIONS = 1, 2
_COORDINATES, _RIGHT_UP_BACK = 0xADBE0003, (0, 4)       # the extension that says which axes the numbers have, and its values for the usual ones
# What turning y and z does to the coefficients of degrees 1 to 3.
_SIGNS = np.array([-1, -1, 1, -1, 1, 1, -1, 1, -1, 1, -1, -1, 1, -1, 1], np.float32)
_TURN = np.array([1, -1, -1], np.float32)


def read(path: str | os.PathLike, report: Report = silent) -> tuple[Fields, SceneHeader]:
    """The scene, and whether it must be drawn antialiased. Rows are finite by the format. Raises BadFile."""
    data = read_bytes(path)
    return decode(path, data, report)


def decode(path, data: bytes, report: Report = silent) -> tuple[Fields, SceneHeader]:
    """The same from the bytes of a file; `path` is for messages."""
    if data[:4] == MAGIC:
        header, planes = _version_4(path, data)
    elif data[:2] == b"\x1f\x8b":
        header, planes = _version_2_and_3(path, data)
    else:
        raise BadFile(path, "byte 0", "not an SPZ file: neither a gzip stream nor NGSP" if data else "the file is empty")
    fields = _unpacked(header, planes)
    return finished(path, fields, report), SceneHeader(settings={"antialias": True} if header.flags & _ANTIALIASED else {})


class _Header:
    """Of either kind: what the first 16 bytes say."""

    def __init__(self, path, data: bytes):
        magic, self.version, self.n, self.degree, self.bits, self.flags, self.last = struct.unpack("<4sIIBBBB", data)
        if magic != MAGIC:
            raise BadFile(path, "magic", "not an SPZ file: a gzip stream of something else")
        if self.degree > 3:
            raise BadFile(path, "header", f"SH degree {self.degree}; expected 0 to 3")
        if self.bits > 24:
            raise BadFile(path, "header", f"{self.bits} fractional bits; a position has 24")
        rest = (self.degree + 1) ** 2 - 1
        self.widths = [9, 1, 3, 3, 3 if self.version == 2 else 4, 3 * rest]     # bytes a Gaussian: position, opacity, colour, scale, rotation, SH
        self.size = self.n * sum(self.widths)

    def plane(self, data: bytes, i: int) -> Array:
        return np.frombuffer(data, np.uint8).reshape(self.n, self.widths[i])


def _version_2_and_3(path, data: bytes) -> tuple[_Header, list[Array]]:
    stream = Gunzip(path, data)
    head = stream.read(16)
    if len(head) < 16:
        raise BadFile(path, f"byte {len(head)} of the unpacked data", "the file ends early: 16 bytes of header expected")
    header = _Header(path, head)
    if header.version not in (2, 3):
        raise BadFile(path, "version", f"SPZ version {header.version} in a gzip stream; versions 2 and 3 are known")
    if header.size > DEFLATE_MAX * len(data):
        raise BadFile(path, "header", f"{header.n} Gaussians cannot be in a file of {len(data)} bytes")
    planes, at = [], 16
    for i, width in enumerate(header.widths):
        piece = stream.read(header.n * width)
        at += len(piece)
        if len(piece) < header.n * width:
            raise BadFile(path, f"byte {at} of the unpacked data", f"the file ends early: {16 + header.size} bytes expected")
        planes.append(header.plane(piece, i))
    if header.flags & _EXTENSIONS:
        _refuse_other_axes(path, stream.read(64 << 10))
    elif not stream.end():
        raise BadFile(path, "header", f"asks for {16 + header.size} bytes of data, but more follow")
    return header, planes


def _version_4(path, data: bytes) -> tuple[_Header, list[Array]]:
    if len(data) < 32:
        raise BadFile(path, f"byte {len(data)}", "the file ends early: 32 bytes of header expected")
    header, (toc,) = _Header(path, data[:16]), struct.unpack("<I", data[16:20])
    if header.version != 4:
        raise BadFile(path, "version", f"SPZ version {header.version}; versions 2, 3 and 4 are known")
    expected = [header.n * width for width in header.widths if header.n * width]
    plausible(path, "header", header.size, len(data))
    if header.last != len(expected):
        raise BadFile(path, "header", f"{header.last} streams; {len(expected)} expected")
    if not 32 <= toc <= len(data) - 16 * len(expected):
        raise BadFile(path, "header", f"the table of streams lies at byte {toc} of {len(data)}")
    if header.flags & _EXTENSIONS:
        _refuse_other_axes(path, data[32:toc])
    table = struct.unpack_from(f"<{2 * len(expected)}Q", data, toc)
    at, streams = toc + 16 * len(expected), []
    if at + sum(table[::2]) != len(data):
        raise BadFile(path, f"byte {len(data)}", f"the streams take {sum(table[::2])} bytes from byte {at} on, which is not where the file ends")
    for packed, unpacked, size in zip(table[::2], table[1::2], expected):
        if unpacked != size:
            raise BadFile(path, f"byte {at}", f"the stream claims {unpacked} bytes; {size} expected for {header.n} Gaussians")
        streams.append(unzstd(path, f"byte {at}", data[at:at + packed], size))
        at += packed
    following = iter(streams)
    return header, [header.plane(next(following) if header.n * width else b"", i) for i, width in enumerate(header.widths)]


def _refuse_other_axes(path, records: bytes) -> None:
    """Extensions are passed over, but for the one that gives all numbers another meaning."""
    at = 0
    while at + 8 <= len(records):
        kind, length = struct.unpack_from("<II", records, at)
        if kind == _COORDINATES and int.from_bytes(records[at + 8:at + 8 + min(length, 4)], "little") not in _RIGHT_UP_BACK:
            raise BadFile(path, "extension ADBE0003", "the scene is stored in axes of its own, which is not read; convert it with its own program first")
        at += 8 + length


def _unpacked(header: _Header, planes: list[Array]) -> Fields:
    positions, alphas, colours, scales, rotations, rest = planes
    n = header.n
    fields = empty(n, header.degree)
    fixed = np.zeros((n * 3, 4), np.uint8)
    fixed[:, 1:] = positions.reshape(n * 3, 3)
    fields["means"][:] = (fixed.view("<i4").reshape(n, 3) >> 8) * (_TURN * np.float32(2.0 ** -header.bits))
    fields["logit_opacities"][:] = LOGITS[alphas[:, 0]]
    fields["log_scales"][:] = (np.arange(256, dtype=np.float32) / 16 - 10)[scales]
    fields["sh"][:, 0] = ((np.arange(256) / 255 - 0.5) / _COLOUR_SCALE).astype(np.float32)[colours]
    if header.version == 2:
        xyz = rotations.astype(np.float32) / np.float32(127.5) - 1
        xyzw = [xyz[:, 0], xyz[:, 1], xyz[:, 2], np.sqrt(np.maximum(0, 1 - (xyz * xyz).sum(axis=1)))]
    else:       # the largest of x, y, z, w in the top two bits; the others, the last one lowest, in sign and 9 bits of size
        word = np.ascontiguousarray(rotations).view("<u4")[:, 0]
        steps = np.stack([word >> s & 1023 for s in (20, 10, 0)], axis=1)
        table = np.concatenate([np.arange(512), -np.arange(512)]).astype(np.float32) * np.float32(math.sqrt(0.5) / 511)
        xyzw = list(with_largest(word >> 30, table[steps]).T)
    for to, (component, sign) in enumerate(zip((xyzw[3], *xyzw[:3]), (1, 1, -1, -1))):
        np.multiply(component, np.float32(sign), out=fields["quats"][:, to])
    if header.degree:
        k = rest.shape[1] // 3
        np.multiply(rest.reshape(n, k, 3) - np.float32(128), (_SIGNS[:k] / 128)[:, None], out=fields["sh"][:, 1:])
    return fields


def write(path: str | os.PathLike, fields: Fields, header: SceneHeader, report: Report = silent, version: int = 3) -> None:
    """Writes the rows in their order. Steps: positions 2^-12 or 2^-16 of the scene's extent, whichever is finer and fits; log scales 1/16, clamped to [-10, 5.94];
    opacities 1/255; colours 1/76.5 of an SH coefficient, clamped to [-3.3, 3.3]; SH of degree 1 1/16, of higher ones 1/8, clamped to [-1, 1]; rotations 9 bits (version 2: 8).

    Of the header, only antialias has room. Raises ValueError for another version or positions beyond 2^23, OSError.
    """
    if version not in (2, 3, 4):
        raise ValueError(f"SPZ version {version}; 2, 3 and 4 can be written")
    farthest = float(np.abs(fields["means"]).max(initial=0))
    if farthest >= 2 ** 23 - 1:
        raise ValueError(f"{path}: a position of {farthest:.3g} does not fit into SPZ, which ends at 2^23")
    fits = math.floor(23 - math.log2(max(farthest, 2.0 ** -30)) - 1e-6)
    bits = max(0, min(24, fits, max(12, 16 - math.floor(math.log2(max(farthest, 2.0 ** -30))))))
    n, degree = count_of(fields), degree_of(fields)
    flags = _ANTIALIASED if header.settings.get("antialias") else 0
    planes = [np.ascontiguousarray(p) for p in _packed(fields, bits, version) if p.size]
    head = struct.pack("<4sIIBBBB", MAGIC, version, n, degree, bits, flags, len(planes) if version == 4 else 0)
    with replacing(path) as file:
        if version == 4:
            packed = [zstandard.ZstdCompressor(level=ZSTD_LEVEL).compress(p.data) for p in planes]
            file.write(head + struct.pack("<I12x", 32))
            file.write(b"".join(struct.pack("<QQ", len(c), p.nbytes) for c, p in zip(packed, planes)))
            file.writelines(packed)
        else:
            file.writelines(gzipped([memoryview(head), *(memoryview(plane).cast("B") for plane in planes)], GZIP_LEVEL))


def _packed(f: Fields, bits: int, version: int) -> list[Array]:
    n, degree = count_of(f), degree_of(f)
    fixed = np.rint(f["means"].astype(np.float64) * (_TURN * 2.0 ** bits)).astype("<i4")
    positions = fixed.view(np.uint8).reshape(n, 3, 4)[:, :, :3]
    scales = np.clip(np.rint((f["log_scales"] + 10) * 16), 0, 255).astype(np.uint8)
    colours = to_bytes(f["sh"][:, 0] * np.float32(_COLOUR_SCALE) + np.float32(0.5))
    quats = unit_quats(f["quats"]) * np.array([1, 1, -1, -1], np.float32)
    xyzw = quats[:, [1, 2, 3, 0]]
    if version == 2:
        rotations = np.clip(np.rint(np.where(xyzw[:, 3:] < 0, -1, 1) * xyzw[:, :3] * 127.5 + 127.5), 0, 255).astype(np.uint8)
    else:
        largest, others = without_largest(xyzw)
        size = np.minimum(np.rint(np.abs(others) * np.float32(511 * math.sqrt(2))), 511).astype(np.uint32) | (others < 0).astype(np.uint32) << 9
        rotations = (largest.astype(np.uint32) << 30 | size[:, 0] << 20 | size[:, 1] << 10 | size[:, 2]).astype("<u4")
    planes = [positions, opacity_bytes(f["logit_opacities"]), colours, scales, rotations]
    if degree:
        k = f["sh"].shape[1] - 1
        steps = np.array([1 << 8 - SH_BITS[0]] * 3 + [1 << 8 - SH_BITS[1]] * (k - 3), np.float32)[:, None]
        rest = f["sh"][:, 1:] * (_SIGNS[:k, None] * 128 / steps)
        np.rint(rest, out=rest)
        rest *= steps
        rest += 128
        planes.append(np.clip(rest, 0, 255, out=rest).astype(np.uint8))
    return planes
