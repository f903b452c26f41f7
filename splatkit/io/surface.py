"""Coloured triangle meshes to .ply and .glb. They are only written: nothing here reads them back."""
from __future__ import annotations

import json
import os
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray as Array

from .atomic import replacing

SUFFIXES = (".ply", ".glb")


@dataclass(frozen=True)
class Surface:
    vertices: Float[Array, "V 3"]       # in the axes of the scene
    triangles: Int[Array, "T 3"]        # anticlockwise seen from outside
    colours: Float[Array, "V 3"]        # sRGB, 0 to 1


def write_surface(path: str | os.PathLike, surface: Surface) -> None:
    """Writes the surface as the suffix says. A .glb has y up, is half a turn around z away from the scene's axes, and is not lit.

    Raises ValueError for another suffix or a surface without triangles, OSError.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in SUFFIXES:
        raise ValueError(f"{path}: unknown mesh format {suffix!r}; known: {', '.join(SUFFIXES)}")
    if not len(surface.triangles):
        raise ValueError(f"{path}: the mesh holds no triangle; nothing is written")
    data = _ply(surface) if suffix == ".ply" else _glb(surface)
    with replacing(path) as file:
        file.writelines(data)


def _ply(s: Surface) -> list[bytes]:
    head = ["ply", "format binary_little_endian 1.0", f"element vertex {len(s.vertices)}", *(f"property float {axis}" for axis in "xyz"),
            *(f"property uchar {name}" for name in ("red", "green", "blue")), f"element face {len(s.triangles)}", "property list uchar int vertex_indices", "end_header\n"]
    vertices = np.empty(len(s.vertices), [("xyz", "<f4", 3), ("rgb", "u1", 3)])
    vertices["xyz"], vertices["rgb"] = s.vertices, np.rint(np.clip(s.colours, 0, 1) * 255)
    faces = np.empty(len(s.triangles), [("count", "u1"), ("indices", "<i4", 3)])
    faces["count"], faces["indices"] = 3, s.triangles
    return ["\n".join(head).encode(), vertices.tobytes(), faces.tobytes()]


def _glb(s: Surface) -> list[bytes]:
    positions = (s.vertices * [-1, -1, 1]).astype("<f4")
    c = np.clip(s.colours, 0, 1)
    linear = np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)       # colours of vertices are linear in glTF
    colours = np.concatenate([np.rint(linear * 65535), np.full((len(c), 1), 65535)], axis=1).astype("<u2")
    pieces = [positions.tobytes(), colours.tobytes(), np.ascontiguousarray(s.triangles, "<u4").tobytes()]
    starts = np.cumsum([0, *map(len, pieces)]).tolist()
    known = {
        "asset": {"version": "2.0", "generator": "splatkit"}, "extensionsUsed": ["KHR_materials_unlit"], "scene": 0, "scenes": [{"nodes": [0]}], "nodes": [{"mesh": 0}],
        "materials": [{"extensions": {"KHR_materials_unlit": {}}, "pbrMetallicRoughness": {}, "doubleSided": True}],
        "meshes": [{"primitives": [{"attributes": {"POSITION": 0, "COLOR_0": 1}, "indices": 2, "material": 0}]}],
        "accessors": [{"bufferView": 0, "componentType": 5126, "count": len(positions), "type": "VEC3", "min": positions.min(0).tolist(), "max": positions.max(0).tolist()},
                      {"bufferView": 1, "componentType": 5123, "normalized": True, "count": len(colours), "type": "VEC4"},
                      {"bufferView": 2, "componentType": 5125, "count": 3 * len(s.triangles), "type": "SCALAR"}],
        "bufferViews": [{"buffer": 0, "byteOffset": start, "byteLength": len(piece), "target": target} for start, piece, target in zip(starts, pieces, (34962, 34962, 34963))],
        "buffers": [{"byteLength": starts[-1]}],
    }
    text = json.dumps(known).encode()
    text += b" " * (-len(text) % 4)
    return [struct.pack("<4sIIII", b"glTF", 2, 28 + len(text) + starts[-1], len(text), 0x4E4F534A), text, struct.pack("<II", starts[-1], 0x004E4942), *pieces]
