"""The table of formats: which file is read and written by which page, and what each has room for. Works on arrays, without torch; load() and save() in __init__ are for Scene."""
from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..errors import BadFile
from ..header import SceneHeader
from . import compressed_ply, gltf, ksplat, ply, sog, splat, spz, tensors
from .fields import Fields, Stream, degree_of
from .header import UNSAID
from .reading import Report, silent


@dataclass(frozen=True)
class Format:
    """One format. `read(path, report)` gives fields and header, `write(path, fields, header, report, **options)` the file."""

    name: str
    suffixes: tuple[str, ...]           # of file names; the longest that fits counts
    read: Callable[..., tuple[Fields, SceneHeader]]
    write: Callable[..., None]
    sh_degree: int = 3                  # the highest that it holds
    features: bool = False
    header: bool = False                # False: of it, at most that the scene is antialiased
    antialias: bool = True
    read_stream: Callable[..., Stream | None] | None = None     # where rows can pass block by block; it gives None for a file that cannot
    write_stream: Callable[..., int] | None = None

    def options(self) -> set[str]:
        """Names of what write() takes beyond the scene."""
        return set(inspect.signature(self.write).parameters) - {"path", "fields", "header", "report"}


FORMATS = (
    Format("PLY", (".ply",), ply.read, ply.write, features=True, header=True, read_stream=ply.read_stream, write_stream=ply.write_stream),
    Format("compressed PLY", (".compressed.ply",), ply.read, compressed_ply.write, header=True),
    Format("splat", (".splat",), splat.read, splat.write, 0, antialias=False, read_stream=splat.read_stream, write_stream=splat.write_stream),
    Format("SPZ", (".spz",), spz.read, spz.write),
    Format("KSPLAT", (".ksplat",), ksplat.read, ksplat.write, 2, antialias=False),
    Format("SOG", (".sog", sog.META), sog.read, sog.write),
    Format("glTF", (".glb", ".gltf"), gltf.read, gltf.write, header=True),
    Format("safetensors", (".safetensors",), tensors.read, tensors.write, features=True, header=True),
)
_MAGICS = {b"ply\n": "PLY", b"ply\r": "PLY", b"\x1f\x8b": "SPZ", spz.MAGIC: "SPZ", b"PK\3\4": "SOG", b"glTF": "glTF"}


def of_name(path: str | os.PathLike) -> Format:
    """The format that a file of this name is written in. Raises ValueError for an unknown suffix."""
    name = Path(path).name.lower()
    fitting = [(len(suffix), known) for known in FORMATS for suffix in known.suffixes if name.endswith(suffix)]
    if fitting:
        return max(fitting, key=lambda f: f[0])[1]
    raise ValueError(f"{path}: unknown scene format {Path(path).suffix!r}; known: {', '.join(s for f in FORMATS for s in f.suffixes)}")


def of_file(path: str | os.PathLike) -> Format:
    """The format of a file that is there: what its first bytes say, else its name. Raises ValueError where neither says anything."""
    if os.path.isdir(path):
        if os.path.isfile(Path(path) / sog.META):
            return next(f for f in FORMATS if f.name == "SOG")
        raise BadFile(path, "", f"not a regular file, and no folder with a {sog.META} of an unbundled SOG")
    try:
        with open(path, "rb") if os.path.isfile(path) else open(os.devnull, "rb") as file:
            head = file.read(4)
    except OSError as e:
        raise BadFile(path, "", f"cannot be read: {e.strerror or e}") from e
    for magic, name in _MAGICS.items():
        if head.startswith(magic):
            return next(f for f in FORMATS if f.name == name)
    return of_name(path)


def read(path: str | os.PathLike, report: Report = silent) -> tuple[Fields, SceneHeader]:
    """The scene and how it must be drawn. Raises ValueError for an unknown format, BadFile for anything wrong with the file."""
    return of_file(path).read(path, report)


def write(path: str | os.PathLike, fields: Fields, header: SceneHeader = UNSAID, report: Report = silent, **options) -> None:
    """Writes the scene in the format of the name. `report` hears what has no room in it. Raises ValueError for an unknown suffix or option."""
    form = of_name(path)
    if unknown := options.keys() - form.options():
        raise ValueError(f"{path}: {form.name} has no option {', '.join(sorted(unknown))}{'; known: ' + ', '.join(sorted(form.options())) if form.options() else ''}")
    fields = fitting(path, form, fields, header, report)
    form.write(path, fields, header, report, **options)


def fitting(path, form: Format, fields: Fields, header: SceneHeader, report: Report) -> Fields:
    """What of the scene the format holds. `report` hears of the rest."""
    lost = lost_by(form, degree_of(fields), "features" in fields, header)
    if lost:
        report(f"{path}: {form.name} has no room for {', '.join(lost)}")
    return {name: value for name, value in fields.items() if name != "features" or form.features}


def lost_by(form: Format, degree: int, features: bool, header: SceneHeader) -> list[str]:
    kept = {"antialias"} if form.antialias else set()
    lost = [f"SH above degree {form.sh_degree}"] if degree > form.sh_degree else []
    lost += ["features"] if features and not form.features else []
    if not form.header:
        lost += [f"the setting {name}" for name in sorted(header.settings.keys() - kept)]
        lost += ["the direction of up"] if header.up is not None else []
    return lost
