"""Poses for bare photos and films: COLMAP's structure from motion, run by sfm_worker.py in a process of its own."""
from __future__ import annotations

import hashlib
import importlib.util
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile

from .capture import Photo
from .config import SfM
from .errors import BadFile
from .io.atomic import replacing
from .io.checkpoint import lock
from .io.photos import _inside, _photo_file, _stored, load_image
from .io.reading import Report, silent
from .io.source import POSES, RECORD, bare_photos
from .io.video import sharpest_frames

LOG = "log.txt"         # in RUN/sfm: what COLMAP says
EXHAUSTIVE_MAX = 150    # photos: 11,175 pairs of 0.015 to 0.1 s each on two processors
ENOUGH = 0.95           # share of the photos from which no further mapper is tried
LEAST = 3               # photos with poses
FEW = 100               # points that a photo sees on the mean; 400 where poses are good to a millimetre, 20 where steps around a room were too wide and they were wrong
SECONDS_BETWEEN = 5.0   # two lines about one stage
STAGES = {"features": "features", "matching": "matching", "incremental": "incremental mapping", "relaxed": "incremental mapping, lower thresholds",
          "global": "global mapping"}
ADVICE = ("photos join where they share two thirds of what they show with others, are sharp, and were taken from different places; "
          "plain walls, mirrors and moving things cannot be matched")

# What the worker's log says about how far it is.
_STAGE, _FEATURES = re.compile(r"^stage (\w+)"), re.compile(r"Processed file \[(\d+)/(\d+)\]")
_BLOCK = re.compile(r"Processing block \[(\d+)/(\d+)\]")
_REGISTERED = re.compile(r"num_reg_(?:frames|images)=(\d+)")


def pose(data: Path, run: Path, settings: SfM = SfM(), report: Report = silent, keep: bool = False) -> None:
    """Finds the poses of the photos in `data`, or of frames of the film `data`, and puts them into `run`/sfm, where io.source.load_source
    reads them: a COLMAP model, for a film also its frames. Photos stay where they are.

    Where the same photos (names, sizes, times of change) and settings have poses there already, those stay; with `keep` anything else is
    refused. Photos of one size, camera and focal length share one SIMPLE_RADIAL lens. `report` is told how far it is, and which photos
    got no pose. Poses are of pixels as load_image gives them: turned by the EXIF orientation where that swaps the sides.

    Raises BadFile naming the photo that cannot be read, where pycolmap (the extra `sfm`) is missing, its process dies or fewer than
    three photos get a pose; RUN/sfm.new/log.txt holds what COLMAP said.
    """
    film = data.is_file()
    record = {"format": 1, "photos": [_identity(p) for p in ([data] if film else bare_photos(data))], "settings": asdict(settings)}
    if known := _known(run / POSES, record):
        report(f"{data}: {len(known['registered'])} of {known['of']} photos have poses from before, in {run / POSES}")
        return
    if keep:
        raise BadFile(data, "", f"the photos or the --sfm settings are not those whose poses are in {run / POSES}; start anew without --resume")
    if importlib.util.find_spec("pycolmap") is None:
        raise BadFile(data, "", "holds no poses, and finding them needs pycolmap, the extra `sfm`: pip install 'splatkit[sfm]'")
    if not film and (data / "images").is_dir() and (data / "masks").is_dir() and bare_photos(data)[0].parent.name == "images":
        raise BadFile(data / "masks", "", "masks of photos without poses cannot be used, for the photos are undistorted; move them away, or give undistorted photos with poses")
    run.mkdir(parents=True, exist_ok=True)
    with lock(run):
        start, old, folder = time.monotonic(), run / POSES, run / f"{POSES}.new"     # what was found before stays until there is better
        for place in (old, folder):
            if place.exists() and os.listdir(place) and not (place / LOG).is_file():
                raise BadFile(place, "", "holds files that are not of an earlier run; choose another run folder (-o)")
            if data.resolve().is_relative_to(place.resolve()):
                raise BadFile(data, "", f"lies in {place}, which this run would replace; choose another run folder (-o)")
        shutil.rmtree(folder, ignore_errors=True)
        work = folder / "work"
        try:
            (work / "images").mkdir(parents=True)
            (folder / LOG).touch()
            photos = _frames(data, folder / "images", settings.frames, report) if film else _distinct(bare_photos(data), report)
            if len(photos) < LEAST:
                raise BadFile(data, "", f"{len(photos)} photos; at least {LEAST} are needed to find poses")
            names = _copies(photos, work / "images", report)
            result = _run(data, names, _job(work, names, settings, film), folder / LOG, report)
            missing = sorted(set(names.values()) - set(result["registered"]))
            if len(names) - len(missing) < LEAST:
                raise BadFile(data, "", f"poses were found for {len(names) - len(missing)} of {len(names)} photos: {ADVICE}. COLMAP's log: {folder / LOG}")
            (folder / "sparse").mkdir()
            os.replace(work / "model", folder / "sparse" / "0")
        finally:
            shutil.rmtree(work, ignore_errors=True)
        with replacing(folder / RECORD) as file:
            file.write(json.dumps({**record, "of": len(names), **result}, indent=1).encode())
        shutil.rmtree(old, ignore_errors=True)
        os.replace(folder, old)
    report(f"{data}: {len(result['registered'])} of {len(names)} photos have poses ({STAGES[result['mapper']]}, {time.monotonic() - start:.0f} s)")
    if missing:
        more = f" and {len(missing) - 12} more" if len(missing) > 12 else ""
        report(f"{data}: without a pose and left out: {', '.join(missing[:12])}{more}; {ADVICE}")
    if result["observations"] < FEW:
        report(f"{data}: a photo sees only {result['observations']:.0f} points on the mean, so the poses may be wrong; {ADVICE}")


def _identity(path: Path) -> list:
    stat = path.stat()
    return [path.name, stat.st_size, stat.st_mtime_ns]


def _known(folder: Path, record: dict) -> dict | None:
    """The record of the poses in `folder` where they were made from just this and are all there."""
    try:
        known = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        same = all(known[key] == value for key, value in record.items()) and (folder / "sparse/0/images.bin").is_file()
        frames = folder / "images"
        return known if same and all((frames / name).is_file() for name in known["registered"] if frames.is_dir()) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _frames(film: Path, folder: Path, wanted: int, report: Report) -> list[Path]:
    folder.mkdir()
    out, told = [], _Told(report)
    for index, pixels in sharpest_frames(film, wanted):
        out.append(folder / f"{index:06d}.jpg")
        Image.fromarray(pixels).save(out[-1], quality=95, subsampling=0)
        told(f"{film}: frames", len(out), wanted)
    return out


def _distinct(photos: list[Path], report: Report) -> list[Path]:
    """Without exact copies, which would stand in for each other in training and evaluation."""
    by_size: dict[int, list[Path]] = {}
    for path in photos:
        by_size.setdefault(path.stat().st_size, []).append(path)
    first: dict[bytes, Path] = {}
    copies = {}
    for path in (p for same in by_size.values() if len(same) > 1 for p in same):
        other = first.setdefault(hashlib.sha256(path.read_bytes()).digest(), path)
        if other is not path:
            copies[path] = other
    if copies:
        report(f"{photos[0].parent}: exact copies of other photos are left out: {', '.join(f'{a.name} ({b.name})' for a, b in list(copies.items())[:12])}")
    return [p for p in photos if p not in copies]


def _copies(photos: list[Path], folder: Path, report: Report) -> dict[str, str]:
    """Fills `folder` with what COLMAP reads, a folder per camera: links to upright JPEGs and PNGs, and of other photos upright JPEGs.

    Returns the photos' names by the path of the copy. Every photo is decoded once, so that a damaged one is named before hours of work.
    """
    names: dict[str, str] = {}
    cameras: dict[tuple, int] = {}
    told = _Told(report)
    for i, path in enumerate(photos):
        if not _inside(path.parent, path.name).name.isprintable():
            raise BadFile(path, "", "a name that cannot be printed; rename the photo")
        with _photo_file(path) as image:
            stored, orientation = _stored(image)
            turned = orientation >= 5 and stored[0] != stored[1]
            width, height = stored[::-1] if turned else stored
            exif = image.info.get("exif", b"")
            camera = cameras.setdefault((width, height, *_lens_of(exif)), len(cameras))
            as_it_is = isinstance(image, JpegImageFile | PngImageFile) and not turned
            if as_it_is:
                if isinstance(image, JpegImageFile):
                    image.draft("RGB", (width // 8 or 1, height // 8 or 1))     # decodes all of the file, but in a third of the time
                image.load()
        name = f"{camera:03d}/{i:05d}{path.suffix.lower() if as_it_is else '.jpg'}"
        copy = folder / name
        copy.parent.mkdir(exist_ok=True)
        if as_it_is:
            try:
                copy.symlink_to(path.absolute())
            except OSError:     # a file system or a Windows user without links
                shutil.copyfile(path, copy)
        else:
            pixels = load_image(Photo(path.name, path, np.diag([float(width), width, 1]), width, height, np.eye(4)))
            Image.fromarray((pixels * 255).round().astype(np.uint8)).save(copy, quality=95, exif=_upright(exif))
        names[name] = path.name
        told("reading photos", i + 1, len(photos))
    return names


def _lens_of(exif: bytes) -> tuple[str, ...]:
    """What tells one camera and zoom from another; nothing where the photo does not say."""
    try:
        tags = Image.Exif()
        tags.load(exif)
        focal = tags.get_ifd(ExifTags.IFD.Exif)
        return tuple(str(value) for value in (tags.get(ExifTags.Base.Make), tags.get(ExifTags.Base.Model), focal.get(ExifTags.Base.FocalLength),
                                              focal.get(ExifTags.Base.FocalLengthIn35mmFilm)))
    except Exception:       # a hint, not pixels: a damaged one must not cost the photo
        return ()


def _upright(exif: bytes) -> Image.Exif:
    """What COLMAP finds the focal length in, without the orientation."""
    tags = Image.Exif()
    try:
        tags.load(exif)
        kept = Image.Exif()
        for tag in (ExifTags.Base.Make, ExifTags.Base.Model):
            if tag in tags:
                kept[tag] = tags[tag]
        kept.get_ifd(ExifTags.IFD.Exif).update({tag: value for tag, value in tags.get_ifd(ExifTags.IFD.Exif).items()
                                                if tag in (ExifTags.Base.FocalLength, ExifTags.Base.FocalLengthIn35mmFilm)})
        return kept
    except Exception:       # as above
        return Image.Exif()


def _job(work: Path, names: dict[str, str], settings: SfM, film: bool) -> dict:
    auto = "sequential" if film or len(names) > EXHAUSTIVE_MAX else "exhaustive"
    matcher = auto if settings.matcher == "auto" else settings.matcher
    ordered = sorted(names, key=lambda name: Path(name).name)       # by the number of the photo, not by the folder of its camera
    chosen = pairs(len(names), matcher == "sequential")
    (work / "pairs.txt").write_text("".join(f"{ordered[i]} {ordered[j]}\n" for i, j in chosen), encoding="utf-8")
    mappers = {"auto": ["incremental", "relaxed", "global"], "incremental": ["incremental", "relaxed"], "global": ["global"]}
    places = {name: str((work / place).absolute()) for name, place in (
        ("database", "database.db"), ("pairs", "pairs.txt"), ("images", "images"), ("scratch", "models"), ("model", "model"), ("result", "result.json"), ("file", "job.json"))}
    (work / "models").mkdir()
    return {**places, "names": names, "max_side": settings.max_side, "matcher": matcher, "n_pairs": len(chosen),
            "mappers": mappers[settings.mapper], "enough": ENOUGH * len(names)}


def pairs(n: int, sequential: bool) -> list[tuple[int, int]]:
    """Which of n photos are compared: all with all; or each with its next ten and the 16th, 32nd, ... after it, and some thirty over the
    whole way with each other, so that a way which comes back to where it began is closed."""
    if not sequential:
        return list(itertools.combinations(range(n), 2))
    steps = sorted({*range(1, 11), *(2 ** k for k in range(4, 10))})
    near = {(i, i + step) for i in range(n) for step in steps if i + step < n}
    return sorted(near | set(itertools.combinations(range(0, n, -(-n // 30)), 2)))


def _run(data: Path, names: dict[str, str], job: dict, log: Path, report: Report) -> dict:
    """What the worker says about its job, in a process that ends with this block."""
    Path(job["file"]).write_text(json.dumps(job), encoding="utf-8")
    command = [sys.executable, "-P", str(Path(__file__).with_name("sfm_worker.py")), job["file"]]
    # A session of its own: Ctrl-C reaches this process alone, which ends the other.
    with open(log, "wb") as copy, subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True) as worker:
        try:
            assert worker.stdout is not None
            last = _follow(worker.stdout, copy, len(names), job["matcher"], report)
        except BaseException:
            worker.kill()
            raise
    try:
        result = json.loads(Path(job["result"]).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        result = None
    if worker.returncode != 0 or result is None:
        code = worker.returncode
        how = f"was ended by {signal.Signals(-code).name}{', perhaps for want of memory' if code == -9 else ''}" if code < 0 else f"failed: {last}"
        raise BadFile(data, "", f"COLMAP's process {how}; its log: {log}")
    return result


def _follow(lines: Iterable[bytes], copy, photos: int, matcher: str, report: Report) -> str:
    """Reports what the log says about how far the worker is, and copies the log. The last line comes out."""
    told, stage, last = _Told(report), "", ""
    for raw in lines:
        copy.write(raw)
        line = raw.decode("utf-8", "replace").rstrip()
        last = line[:300] if line else last
        if found := _STAGE.search(line):
            stage = STAGES[found[1]]
            what = f" of {photos} photos" + (f" ({matcher})" if found[1] == "matching" else "")
            report(f"{stage}{what}")
        elif found := _FEATURES.search(line):
            told(f"{stage}: photo", int(found[1]), int(found[2]))
        elif found := _BLOCK.search(line):
            told(f"{stage}: part", int(found[1]), int(found[2]))
        elif found := _REGISTERED.search(line):
            told(f"{stage}: registered", int(found[1]), photos)
    return last


class _Told:
    """Reports "WHAT k of n" not more often than every SECONDS_BETWEEN, the last one always."""

    def __init__(self, report: Report):
        self.report, self.next = report, time.monotonic() + SECONDS_BETWEEN

    def __call__(self, what: str, k: int, n: int) -> None:
        if k == n or time.monotonic() >= self.next:
            self.report(f"{what} {k} of {n}")
            self.next = time.monotonic() + SECONDS_BETWEEN
