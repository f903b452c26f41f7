"""glTF 2.0 with KHR_gaussian_splatting, as .glb or .gltf: scales linear, opacities 0 to 1, y up, which is half a turn around z from the axes of the PLY form."""
from __future__ import annotations

import base64
import binascii
import json
import math
import os
import re
import struct
from pathlib import Path

import numpy as np
from numpy import ndarray as Array

from ..errors import BadFile
from ..header import SceneHeader
from .atomic import replacing
from .fields import Fields, count_of, degree_of, empty, finished
from .header import from_json, to_json
from .packing import log_of_scales, opacities, unit_quats
from .reading import Report, read_bytes, silent, strict_json
from .streams import plausible
from .turning import moved

EXTENSION = "KHR_gaussian_splatting"
DEPTH_MAX, NODES_MAX = 64, 10_000   # of nodes in nodes
_JSON, _BIN = 0x4E4F534A, 0x004E4942
_TYPES = {5120: "<i1", 5121: "<u1", 5122: "<i2", 5123: "<u2", 5126: "<f4"}
_SIZES = {"SCALAR": 1, "VEC2": 2, "VEC3": 3, "VEC4": 4}
_FILE = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_. -]{0,200}")      # no folder can be in it
# glTF has y up, z to the front and so x to the left, the PLY form y down, z to the front and x to the right. These are the signs of x, y, z and of SH coefficients.
_TURN = np.array([-1, -1, 1], np.float32)
_SIGNS = np.array([-1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1], np.float32)


def read(path: str | os.PathLike, report: Report = silent) -> tuple[Fields, SceneHeader]:
    """All Gaussians of the default scene, moved as its nodes say. Rows that are not finite are dropped and counted to `report`. Raises BadFile."""
    data = read_bytes(path)
    if data[:4] == b"glTF":
        known, binary = _chunks(path, data)
    else:
        known, binary = strict_json(path, "JSON", data), None
    file = _File(path, known, binary, len(data))
    parts = [_primitive(file, primitive, matrix) for primitive, matrix in file.primitives()]
    if not parts:
        raise BadFile(path, "meshes", f"no primitive with {EXTENSION} in the scene: not a Gaussian splat scene")
    degree = max(degree_of(f) for f in parts)
    total = sum(count_of(f) for f in parts)
    plausible(path, "nodes", total * (44 + 12 * (degree + 1) ** 2), file.size)
    fields, row = empty(total, degree), 0
    for part in parts:
        for name, value in part.items():
            target = fields[name][row:row + len(value)]
            if name == "sh":
                target[:, value.shape[1]:] = 0
                target = target[:, :value.shape[1]]
            target[:] = value
        row += count_of(part)
    said = known.get("asset", {}).get("extras") if isinstance(known.get("asset"), dict) else None
    try:
        header = from_json(said["splatkit"]) if isinstance(said, dict) and isinstance(said.get("splatkit"), str) else SceneHeader()
    except ValueError as e:
        raise BadFile(path, "asset.extras.splatkit", str(e)) from e
    return finished(path, fields, report), header


def _chunks(path, data: bytes) -> tuple[dict, bytes]:
    if len(data) < 20:
        raise BadFile(path, f"byte {len(data)}", "the file ends early: a GLB has at least 20 bytes")
    version, length, size, kind = struct.unpack_from("<IIII", data, 4)
    if version != 2 or kind != _JSON:
        raise BadFile(path, "byte 4", f"GLB version {version}; 2 with JSON in front is read")
    if not 20 + size <= length <= len(data):
        raise BadFile(path, f"byte {len(data)}", f"the file ends early: it claims {length} bytes with {size} of JSON")
    known, at, binary = strict_json(path, "JSON", data[20:20 + size]), 20 + size, b""
    if at + 8 <= length:
        size, kind = struct.unpack_from("<II", data, at)
        if at + 8 + size > length:
            raise BadFile(path, f"byte {len(data)}", f"the file ends early: a chunk of {size} bytes at byte {at}")
        binary = data[at + 8:at + 8 + size] if kind == _BIN else b""
    return known, binary


class _File:
    """The JSON with what it points to; every step is checked."""

    def __init__(self, path, known: dict, binary: bytes | None, size: int):
        self.path, self.known, self.size, self.buffers = path, known, size, {0: binary} if binary is not None else {}

    def item(self, kind: str, index, of: dict | None = None):
        table = (self.known if of is None else of).get(kind)
        if type(index) is not int or not isinstance(table, list) or not 0 <= index < len(table) or not isinstance(table[index], dict):
            raise BadFile(self.path, kind, f"no entry {index!r:.40}")
        return table[index]

    def whole(self, where: str, of: dict, name: str, default: int | None = None) -> int:
        value = of.get(name, default)
        if type(value) is not int or not 0 <= value < 2 ** 53:
            raise BadFile(self.path, f"{where}.{name}", f"{value!r:.40}; expected a whole number")
        return value

    def indices(self, where: str, value) -> list[int]:
        if value is None:
            return []
        if not isinstance(value, list) or any(type(i) is not int for i in value):
            raise BadFile(self.path, where, f"{value!r:.40}; expected indices")
        return value

    def primitives(self) -> list[tuple[dict, Array]]:
        """Those that are Gaussians, with the matrix from their space to the scene's."""
        if self.known.get("scenes"):
            scene = self.item("scenes", self.known.get("scene", 0))
            roots = self.indices("scenes.nodes", scene.get("nodes"))
        else:
            roots = list(range(len(self.known["nodes"]))) if isinstance(self.known.get("nodes"), list) else []
        found, stack, steps = [], [(i, np.eye(4), 0) for i in reversed(roots)], 0
        while stack:
            index, parent, depth = stack.pop()
            steps += 1
            if depth > DEPTH_MAX or steps > NODES_MAX:
                raise BadFile(self.path, "nodes", "nodes hold one another, or are too many")
            node = self.item("nodes", index)
            matrix = parent @ self._matrix(index, node)
            if "mesh" in node:
                primitives = self.item("meshes", node["mesh"]).get("primitives")
                for primitive in primitives if isinstance(primitives, list) else []:
                    extensions = primitive.get("extensions") if isinstance(primitive, dict) else None
                    if isinstance(extensions, dict) and isinstance(extensions.get(EXTENSION), dict):
                        found.append((primitive, matrix))
            stack += [(i, matrix, depth + 1) for i in reversed(self.indices("nodes.children", node.get("children")))]
        return found

    def _matrix(self, index: int, node: dict) -> Array:
        def numbers(name, default):
            value = node.get(name, default)
            if not isinstance(value, list) or len(value) != len(default) or any(type(x) not in (int, float) or not abs(x) < 1e30 for x in value):
                raise BadFile(self.path, f"nodes[{index}].{name}", f"expected {len(default)} numbers")
            return np.array(value, np.float64)
        if "matrix" in node:
            return numbers("matrix", [0.0] * 16).reshape(4, 4).T
        out, (x, y, z, w) = np.eye(4), numbers("rotation", [0.0, 0.0, 0.0, 1.0])
        length = math.sqrt(x * x + y * y + z * z + w * w)
        if not 0.5 < length < 2:
            raise BadFile(self.path, f"nodes[{index}].rotation", "is no unit quaternion")
        x, y, z, w = x / length, y / length, z / length, w / length
        turn = np.array([[1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)], [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
                         [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)]])
        out[:3, :3], out[:3, 3] = turn * numbers("scale", [1.0] * 3), numbers("translation", [0.0] * 3)
        return out

    def buffer(self, index: int) -> bytes:
        if index not in self.buffers:
            entry = self.item("buffers", index)
            uri = entry.get("uri")
            if isinstance(uri, str) and (data := re.match(r"data:[a-z/.+-]*;base64,", uri)):
                try:
                    self.buffers[index] = base64.b64decode(uri[data.end():], validate=True)
                except (binascii.Error, ValueError) as e:
                    raise BadFile(self.path, f"buffers[{index}].uri", f"not base64: {e}"[:100]) from e
            elif isinstance(uri, str) and _FILE.fullmatch(uri):
                self.buffers[index] = read_bytes(Path(self.path).parent / uri)
                self.size += len(self.buffers[index])
            else:
                raise BadFile(self.path, f"buffers[{index}].uri", f"{uri!r:.60}; expected base64, or the name of a file beside this one")
        return self.buffers[index]

    def attribute(self, attributes: dict, name: str, size: int) -> Array:
        """The numbers of an accessor, [count, size]; normalised whole numbers as the numbers that they mean."""
        where, accessor = f"accessor of {name}", self.item("accessors", attributes.get(name))
        if "sparse" in accessor or "bufferView" not in accessor:
            raise BadFile(self.path, where, "is sparse or has no data, which is not read")
        if _SIZES.get(str(accessor.get("type"))) != size:
            raise BadFile(self.path, where, f"type {accessor.get('type')!r:.20}; expected {size} numbers")
        component = self.whole(where, accessor, "componentType")
        if component not in _TYPES:
            raise BadFile(self.path, where, f"component type {component} is not read")
        kind, n = np.dtype(_TYPES[component]), self.whole(where, accessor, "count")
        view = self.item("bufferViews", accessor["bufferView"])
        data = self.buffer(self.whole(where, view, "buffer"))
        start, length = self.whole(where, view, "byteOffset", 0), self.whole(where, view, "byteLength")
        offset, wide = self.whole(where, accessor, "byteOffset", 0), size * kind.itemsize
        stride = self.whole(where, view, "byteStride", wide)
        if not wide <= stride <= 255 or start + length > len(data) or n and offset + (n - 1) * stride + wide > length:
            raise BadFile(self.path, where, f"{n} rows of {stride} bytes do not fit into {length} bytes at byte {start} of a buffer of {len(data)}")
        found = np.ndarray((n, size), kind, data, start + offset, (stride, kind.itemsize)) if n else np.zeros((0, size), kind)
        if kind.kind == "f" or not accessor.get("normalized"):
            return found
        return np.maximum(found / np.float32(np.iinfo(kind).max), -1)


def _primitive(file: _File, primitive: dict, matrix: Array) -> Fields:
    said, attributes = primitive["extensions"][EXTENSION], primitive.get("attributes")
    if said.get("extensions"):
        raise BadFile(file.path, EXTENSION, f"extended by {said['extensions']!r:.80}, which is not read")
    if said.get("kernel", "ellipse") != "ellipse" or said.get("colorSpace", "srgb_rec709_display") != "srgb_rec709_display":
        raise BadFile(file.path, EXTENSION, f"kernel {said.get('kernel')!r:.40}, colour space {said.get('colorSpace')!r:.40}; ellipse and srgb_rec709_display are read")
    if not isinstance(attributes, dict):
        raise BadFile(file.path, "primitive.attributes", "missing")
    column = lambda name, size: file.attribute(attributes, f"{EXTENSION}:{name}" if name != "POSITION" else name, size)
    degree = max((d for d in (1, 2, 3) if f"{EXTENSION}:SH_DEGREE_{d}_COEF_0" in attributes), default=0)
    columns = {"means": column("POSITION", 3), "quats": column("ROTATION", 4), "scales": column("SCALE", 3), "opacities": column("OPACITY", 1)}
    coefficients = [column(f"SH_DEGREE_{d}_COEF_{i}", 3) for d in range(degree + 1) for i in range(2 * d + 1)]
    n = len(columns["means"])
    for value in (*columns.values(), *coefficients):
        if len(value) != n:
            raise BadFile(file.path, "accessors", f"{len(value)} rows beside {n} of POSITION")
    half = {5121: 0.5 / 255, 5123: 0.5 / 65535}.get(file.item("accessors", attributes[f"{EXTENSION}:OPACITY"])["componentType"])     # of a step, where the step is coarse
    opacity_range = (half, 1 - half) if half else (2.0 ** -150, 1 - 2.0 ** -25)
    fields = empty(n, degree)
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        fields["means"][:] = columns["means"]
        x, y, z, w = columns["quats"].T
        for i, component in enumerate((w, x, y, z)):
            fields["quats"][:, i] = component
        fields["log_scales"][:] = log_of_scales(columns["scales"].astype(np.float32))
        o = columns["opacities"][:, 0].astype(np.float64)
        inside = np.clip(o, *opacity_range)
        fields["logit_opacities"][:] = np.where((o >= 0) & (o <= 1), np.log(inside) - np.log1p(-inside), np.nan)
        for k, value in enumerate(coefficients):
            fields["sh"][:, k] = value
        turned = _turned(fields)
    if (matrix == np.eye(4)).all():
        return turned
    turn = np.diag([*_TURN.astype(np.float64), 1])
    try:
        return moved(turned, turn @ matrix @ turn)
    except ValueError as e:
        raise BadFile(file.path, "nodes", str(e)) from e


def _turned(f: Fields) -> Fields:
    """Half a turn around z, exactly. Done twice it is nothing, but for the sign of quaternions."""
    w, x, y, z = f["quats"].T
    sh = f["sh"].copy()
    sh[:, 1:] *= _SIGNS[:sh.shape[1] - 1, None]
    return {**f, "means": f["means"] * _TURN, "quats": np.stack([z, y, -x, -w], axis=1), "sh": sh}


def write(path: str | os.PathLike, fields: Fields, header: SceneHeader, report: Report = silent) -> None:
    """Writes float32 in the rows' order: a .glb, or a .gltf and a .bin beside it. Log scales and logits come back within 1e-6 of their size, logits above 16 within 1.

    Raises ValueError for more than 4 GiB, OSError.
    """
    path, n, degree = Path(path), count_of(fields), degree_of(fields)
    f = _turned(fields)
    quats = unit_quats(f["quats"])
    with np.errstate(over="ignore"):
        scales = np.minimum(np.exp(f["log_scales"].astype(np.float64)), np.finfo(np.float32).max)
    columns = {"POSITION": f["means"], f"{EXTENSION}:ROTATION": quats[:, [1, 2, 3, 0]], f"{EXTENSION}:SCALE": scales,
               f"{EXTENSION}:OPACITY": opacities(f["logit_opacities"].astype(np.float64))[:, None]}
    columns |= {f"{EXTENSION}:SH_DEGREE_{d}_COEF_{i}": f["sh"][:, d * d + i] for d in range(degree + 1) for i in range(2 * d + 1)}
    accessors: list[dict] = []
    views: list[dict] = []
    at = 0
    for column in columns.values():
        views.append({"buffer": 0, "byteOffset": at, "byteLength": 4 * column.size, "target": 34962})
        accessors.append({"bufferView": len(views) - 1, "componentType": 5126, "count": n, "type": {1: "SCALAR", 3: "VEC3", 4: "VEC4"}[column.shape[1]]})
        at += 4 * column.size
    if n:
        accessors[0] |= {"min": f["means"].min(axis=0).tolist(), "max": f["means"].max(axis=0).tolist()}
    described = {"kernel": "ellipse", "colorSpace": "srgb_rec709_display", "sortingMethod": "cameraDistance", "projection": "perspective"}
    primitive = {"attributes": {name: i for i, name in enumerate(columns)}, "mode": 0, "extensions": {EXTENSION: described}}
    buffer: dict = {"byteLength": at}
    known = {"asset": {"version": "2.0", "generator": "splatkit", "extras": {"splatkit": to_json(header)}}, "extensionsUsed": [EXTENSION], "scene": 0,
             "scenes": [{"nodes": [0]}], "nodes": [{"mesh": 0}], "meshes": [{"primitives": [primitive]}], "accessors": accessors, "bufferViews": views,
             "buffers": [buffer]}
    pieces = lambda: (np.ascontiguousarray(column, "<f4").tobytes() for column in columns.values())
    if path.suffix.lower() == ".gltf":
        binary = path.with_suffix(".bin")
        if not _FILE.fullmatch(binary.name):
            raise ValueError(f"{path}: expected a file name of letters, digits, spaces, dots, dashes; or write a .glb")
        buffer["uri"] = binary.name
        with replacing(binary) as file:
            file.writelines(pieces())
        with replacing(path) as file:
            file.write(json.dumps(known).encode("ascii"))
        return
    text = json.dumps(known).encode("ascii")
    text += b" " * (-len(text) % 4)
    if 28 + len(text) + at >= 2 ** 32:
        raise ValueError(f"{path}: {at} bytes do not fit into a .glb, which ends at 4 GiB; write a .gltf")
    with replacing(path) as file:
        file.write(struct.pack("<4sIIII", b"glTF", 2, 28 + len(text) + at, len(text), _JSON) + text + struct.pack("<II", at, _BIN))
        file.writelines(pieces())
