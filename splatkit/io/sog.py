"""SOG of PlayCanvas, version 2: a scene as WebP pictures and a meta.json, in one .sog (a zip) or side by side in a folder."""
from __future__ import annotations

import io
import json
import math
import os
import re
import struct
import warnings
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy import ndarray as Array
from PIL import Image
from PIL.WebPImagePlugin import WebPImageFile

from ..errors import BadFile
from ..header import SceneHeader
from . import codebook
from .atomic import replacing
from .fields import Fields, count_of, degree_of, empty, finished, rows
from .packing import LOGITS, morton_order, opacity_bytes, unit_quats, with_largest, without_largest
from .reading import Report, exactly, opened, read_bytes, silent, size_of, strict_json
from .streams import plausible

META = "meta.json"
META_MAX = 1 << 20
PALETTE_MAX = 65536         # a label has 16 bits
COUNT_MAX = 170_000_000     # Pillow refuses pictures a little larger
_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,60}\.webp")     # no folder can be in it
_BANDS = {1: 3, 2: 8, 3: 15}
_ZIP_ERRORS = (zipfile.BadZipFile, NotImplementedError, RuntimeError, zlib.error, EOFError, ValueError, LookupError, OverflowError, struct.error)

Entry = Callable[[str], bytes]      # the bytes of a file of the scene, by name


def read(path: str | os.PathLike, report: Report = silent) -> tuple[Fields, SceneHeader]:
    """The scene of a .sog, a meta.json, or a folder that holds one. Rows that are not finite are dropped and counted to `report`. Raises BadFile.

    Of a zip only meta.json and the pictures that it names are read, of a folder the same and nothing outside it.
    """
    path = Path(path)
    if path.is_dir() or path.name == META:
        folder = path if path.is_dir() else path.parent
        with opened(folder / META) as file:
            if size_of(file) > META_MAX:
                raise BadFile(folder / META, "", f"{size_of(file)} bytes; {META_MAX} is the most")
            meta = file.read()
        size = sum(p.stat().st_size for p in folder.glob("*.webp")) + len(meta)
        return _decoded(path, size, meta, lambda name: read_bytes(folder / name), report)
    with opened(path) as file:
        size = size_of(file)
        if exactly(path, file, 4) != b"PK\3\4":
            raise BadFile(path, "byte 0", "not a SOG file: no zip")
        try:
            archive = zipfile.ZipFile(file)
        except _ZIP_ERRORS as e:
            raise BadFile(path, "zip", f"the directory at its end is damaged or cut: {e}"[:200]) from e

        def entry(name: str) -> bytes:
            try:
                info = archive.getinfo(name)
                if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) or info.flag_bits & 1:
                    raise BadFile(path, f"entry {name}", "is packed by another method than deflate, or encrypted")
                if info.file_size > (META_MAX if name == META else 4 * size + META_MAX):
                    raise BadFile(path, f"entry {name}", f"claims {info.file_size} bytes, in a file of {size}")
                with archive.open(info) as stream:
                    return stream.read()
            except KeyError as e:
                raise BadFile(path, f"entry {name}", "is not in the file") from e
            except _ZIP_ERRORS as e:
                raise BadFile(path, f"entry {name}", f"damaged: {e}"[:200]) from e
        return _decoded(path, size, entry(META), entry, report)


def _decoded(path, size: int, meta: bytes, entry: Entry, report: Report) -> tuple[Fields, SceneHeader]:
    known = _Meta(path, strict_json(path, META, meta))
    n, degree = known.count, known.degree
    plausible(path, f"{META}, count", n * (44 + 12 * (degree + 1) ** 2), size)
    picture = lambda group, i, channels, exact=None: _picture(path, known.file(group, i), entry, n, channels, exact)
    with np.errstate(over="ignore", invalid="ignore"):
        fields = empty(n, degree)
        lows, highs = picture("means", 0, 3), picture("means", 1, 3)
        low, high = known.limits("mins"), known.limits("maxs")
        x = low + (lows.astype(np.float64) + highs.astype(np.uint16) * 256) / 65535 * (high - low)
        fields["means"][:] = np.sign(x) * np.expm1(np.abs(x))
        quats = picture("quats", 0, 4)
        others = (quats[:, :3] / np.float32(127.5) - 1) * np.float32(math.sqrt(0.5))
        fields["quats"][:] = with_largest(np.maximum(quats[:, 3], 252) - 252, others)
        fields["quats"][quats[:, 3] < 252] = (1, 0, 0, 0)
        fields["log_scales"][:] = known.codebook("scales")[picture("scales", 0, 3)]
        colours = picture("sh0", 0, 4)
        fields["sh"][:, 0] = known.codebook("sh0")[colours[:, :3]]
        fields["logit_opacities"][:] = LOGITS[colours[:, 3]]
        if degree:
            bands, palette = _BANDS[degree], known.palette
            centroids = picture("shN", 0, 3, (64 * bands, -(-palette // 64)))
            table = known.codebook("shN")[centroids.reshape(-1, bands, 3)[:palette]]
            label = picture("shN", 1, 2)
            label = label[:, 0] + label[:, 1].astype(np.int64) * 256
            if n and int(label.max()) >= palette:
                raise BadFile(path, f"entry {known.file('shN', 1)}", f"label {int(label.max())} of {palette} SH vectors, Gaussian {int(label.argmax())}")
            for first in range(0, n, 65536):
                fields["sh"][first:first + 65536, 1:] = table[label[first:first + 65536]]
    return finished(path, fields, report), SceneHeader(settings={"antialias": True} if known.antialias else {})


class _Meta:
    """What meta.json says, checked where it is asked for."""

    def __init__(self, path, known: dict):
        self.path, self.known = path, known
        if known.get("version") != 2:
            raise BadFile(path, f"{META}, version", f"{known.get('version')!r:.40}; SOG version 2 is read")
        self.count = self._whole(known, "count", COUNT_MAX)
        self.antialias = known.get("antialias") is True
        rest = self._object("shN") if known.get("shN") is not None else {"bands": 0}
        self.degree = self._whole(rest, "bands", 3)
        self.palette = self._whole(rest, "count", PALETTE_MAX) if self.degree else 0

    def _object(self, name: str) -> dict:
        found = self.known.get(name)
        if not isinstance(found, dict):
            raise BadFile(self.path, f"{META}, {name}", "expected an object")
        return found

    def _whole(self, of: dict, name: str, most: int) -> int:
        value = of.get(name)
        if type(value) is not int or not 0 <= value <= most:
            raise BadFile(self.path, f"{META}, {name}", f"{value!r:.40}; expected a whole number from 0 to {most}")
        return value

    def _numbers(self, group: str, name: str, least: int, most: int) -> Array:
        value = self._object(group).get(name)
        if not isinstance(value, list) or not least <= len(value) <= most or any(isinstance(x, bool) or not isinstance(x, int | float) or not abs(x) < 1e30 for x in value):
            raise BadFile(self.path, f"{META}, {group}.{name}", f"expected {least if least == most else f'{least} to {most}'} numbers")
        return np.array(value, np.float64)

    def limits(self, name: str) -> Array:
        return self._numbers("means", name, 3, 3)

    def codebook(self, group: str) -> Array:
        """256 numbers; what a shorter one lacks is 0."""
        found = self._numbers(group, "codebook", 1, 256)
        return np.pad(found, (0, 256 - len(found))).astype(np.float32)

    def file(self, group: str, i: int) -> str:
        files = self._object(group).get("files")
        if not isinstance(files, list) or len(files) <= i or not isinstance(files[i], str) or not _NAME.fullmatch(files[i]):
            raise BadFile(self.path, f"{META}, {group}.files", f"{files!r:.60}; expected the name of a .webp beside it")
        return files[i]


def _picture(path, name: str, entry: Entry, n: int, channels: int, exact: tuple[int, int] | None) -> Array:
    """The first pixels of a WebP, one a row. Its size is checked before it is decoded."""
    data, where = entry(name), f"entry {name}"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = WebPImageFile(io.BytesIO(data))
            width, height = image.size
            if exact and (width, height) != exact or not exact and not n <= width * height <= 2 * n + 65536:
                raise BadFile(path, where, f"a picture of {width}x{height}; expected {'x'.join(map(str, exact)) if exact else f'room for {n} Gaussians, and not twice as much'}")
            if getattr(image, "n_frames", 1) != 1:
                raise BadFile(path, where, "is an animation")
            pixels = np.asarray(image.convert("RGBA"))
    except (OSError, SyntaxError, ValueError, EOFError, MemoryError, Image.DecompressionBombError) as e:
        raise BadFile(path, where, f"not a WebP that can be decoded: {e}"[:200]) from e
    flat = pixels.reshape(-1, 4)
    return (flat if exact else flat[:n])[:, :channels]


def write(path: str | os.PathLike, fields: Fields, header: SceneHeader, report: Report = silent) -> None:
    """Writes the rows in Morton order, to a .sog or, for a path that ends in meta.json, into its folder. 16 bits a coordinate, in steps that grow with the distance from 0;
    scales and colours from 256 values each, opacities in 8 bits, rotations in 8 bits, SH of degree 1 and more from at most 65,536 vectors.

    Of the header, only antialias has room. Raises ValueError for a scene that is empty or above COUNT_MAX Gaussians, OSError.
    """
    n, degree = count_of(fields), degree_of(fields)
    if not 0 < n <= COUNT_MAX:
        raise ValueError(f"{path}: {n} Gaussians; SOG holds 1 to {COUNT_MAX} here")
    f = rows(fields, morton_order(fields["means"]))
    width = max(4, math.ceil(math.sqrt(n) / 4) * 4)
    shape = (math.ceil(n / width / 4) * 4, width)
    x = np.sign(f["means"]) * np.log1p(np.abs(f["means"].astype(np.float64)))
    low, high = x.min(axis=0), x.max(axis=0)
    steps = np.rint((x - low) / np.where(high > low, high - low, 1) * 65535).astype(np.uint16)
    scale_codes, scales = codebook.numbers(f["log_scales"])
    colour_codes, colours = codebook.numbers(f["sh"][:, 0])
    largest, others = without_largest(unit_quats(f["quats"]))
    quats = np.clip(np.rint((others * np.float32(math.sqrt(2)) + 1) * 127.5), 0, 255)
    opaque = np.full((n, 1), 255, np.uint8)
    pictures = {"means_l": np.concatenate([steps & 255, opaque], axis=1), "means_u": np.concatenate([steps >> 8, opaque], axis=1),
                "quats": np.concatenate([quats, 252 + largest[:, None]], axis=1), "scales": np.concatenate([scales, opaque], axis=1),
                "sh0": np.concatenate([colours, opacity_bytes(f["logit_opacities"])[:, None]], axis=1)}
    files = {name: _webp(pixels, shape) for name, pixels in pictures.items()}
    meta = {"version": 2, "count": n, "antialias": bool(header.settings.get("antialias")),
            "means": {"mins": low.tolist(), "maxs": np.where(high > low, high, low + 1).tolist(), "files": ["means_l.webp", "means_u.webp"]},
            "scales": {"codebook": scale_codes.tolist(), "files": ["scales.webp"]}, "quats": {"files": ["quats.webp"]},
            "sh0": {"codebook": colour_codes.tolist(), "files": ["sh0.webp"]}}
    if degree:
        bands = _BANDS[degree]
        most = n if n <= 1024 else min(64, 2 ** int(math.log2(n / 1024))) * 1024
        centres, label = codebook.vectors(np.ascontiguousarray(f["sh"][:, 1:].reshape(n, -1)), most)
        codes, indices = codebook.numbers(centres)
        texels = np.concatenate([indices.reshape(-1, 3), np.full((len(centres) * bands, 1), 255, np.uint8)], axis=1)
        files["shN_centroids"] = _webp(texels, (-(-len(centres) // 64), 64 * bands))
        files["shN_labels"] = _webp(np.stack([label & 255, label >> 8, 0 * label, 0 * label + 255], axis=1), shape)
        meta["shN"] = {"count": len(centres), "bands": degree, "codebook": codes.tolist(), "files": ["shN_centroids.webp", "shN_labels.webp"]}
    text = json.dumps(meta).encode()
    path = Path(path)
    if path.name == META:
        for name, data in files.items():
            with replacing(path.with_name(f"{name}.webp")) as file:
                file.write(data)
        with replacing(path) as file:       # last: what it names is there
            file.write(text)
        return
    with replacing(path) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for name, data in [*((f"{name}.webp", data) for name, data in files.items()), (META, text)]:
            archive.writestr(zipfile.ZipInfo(name), data)


def _webp(pixels: Array, shape: tuple[int, int]) -> bytes:
    """Losslessly; the picture is filled up with zeros."""
    full = np.zeros((shape[0] * shape[1], 4), np.uint8)
    full[:len(pixels)] = pixels
    out = io.BytesIO()
    Image.fromarray(full.reshape(*shape, 4), "RGBA").save(out, "WEBP", lossless=True, exact=True, quality=50, method=2)
    return out.getvalue()
