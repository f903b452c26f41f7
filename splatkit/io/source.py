"""What the DATA of a run is: posed photos, smaller copies of them, or bare photos and films, whose poses lie in the run folder."""
from __future__ import annotations

import os
from pathlib import Path

from ..capture import Capture
from ..errors import BadFile
from .photos import find_model_folder, load_capture
from .reading import Report, silent
from .transforms import find_transforms

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".heic", ".heif"})     # what is a photo among the files of a folder
SMALLER = (2, 4, 8)         # images_2 and so on, as mip-NeRF 360 has them
POSES = Path("sfm")         # in the run folder: what sfm.pose finds
RECORD = "poses.json"       # in POSES: what the poses were made from; its presence says that they are whole


def is_bare(data: Path) -> bool:
    """Whether `data` is a film, or a folder with photos but without poses."""
    return data.is_file() or (data.is_dir() and find_model_folder(data) is None and not find_transforms(data) and bare_photos(data) != [])


def bare_photos(data: Path) -> list[Path]:
    """The photos by name that lie in `data`/images, else in `data` itself; not deeper, and no hidden files."""
    for folder in (data / "images", data):
        if found := sorted(p for p in folder.glob("*") if p.suffix.lower() in SUFFIXES and not p.name.startswith(".") and p.is_file()):
            return found
    return []


def load_source(data: Path, run: Path, downscale: float = 1, report: Report = silent) -> tuple[Capture, float]:
    """The capture that `data` means, and by how much its photos are still to be made smaller for 1/downscale of their size.

    Bare photos and films take their poses from the run folder, where sfm.pose has put them. At a downscale of exactly 2, 4 or 8 the
    photos of a COLMAP capture are read from images_2, images_4 or images_8 where that is there (with masks, only where masks_2 is too).
    Raises BadFile as load_capture, and where poses have not been found yet.
    """
    if not os.path.exists(data):
        raise BadFile(data, "", "no such folder or film")
    if is_bare(data):
        if not (run / POSES / RECORD).is_file():
            raise BadFile(run / POSES, "", f"no poses of the photos of {data}; `splatkit reconstruct {data} -o {run}` finds them")
        frames = run / POSES / "images"
        return load_capture(run / POSES, report, images=frames.absolute() if data.is_file() else bare_photos(data)[0].parent.absolute()), downscale
    copies = f"images_{downscale:.0f}"
    if downscale in SMALLER and (data / copies).is_dir() and find_model_folder(data):
        if not (data / "masks").is_dir() or (data / copies.replace("images", "masks")).is_dir():
            report(f"{data}: the photos are read from {copies}")
            return load_capture(data, report, images=copies, shrunk=int(downscale)), 1
    if not find_model_folder(data) and not find_transforms(data):
        raise BadFile(data, "", "no COLMAP model, no transforms.json, and no photos in it or in its folder images")
    return load_capture(data, report), downscale
