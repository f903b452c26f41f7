"""Every reader of input files against seeded damage: what tests/test_fuzz.py runs in part and scripts/soak.py at length.

`fuzz(name, count, seed, folder)` reads mutants of the reader's files in processes of their own, so that a crash or a hang is seen.
"""
import dataclasses
import gzip
import json
import math
import multiprocessing
import resource
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from lifting import SMALL, write_chunk
from mutants import mutants
from PIL import Image
from tiny_colmap import write_capture, write_model

from splatkit import config, io
from splatkit.capture import Photo, SceneHeader
from splatkit.errors import BadConfig, BadFile
from splatkit.io import checkpoint, colmap, re10k
from splatkit.io.depth import load_depth
from splatkit.io.photos import load_image, load_mask
from splatkit.io.transforms import load_transforms
from splatkit.lift.model import MVSplat
from splatkit.lift.weights import load_weights
from splatkit.scene import Scene

SECONDS_MAX = 2.0
SECONDS_SILENT = 12.0       # of a worker, which times itself: it is killed, for what it reads never ends
BYTES_MAX = 64 << 20        # and 4 times the file or the result


@dataclasses.dataclass(frozen=True)
class Reader:
    """`make(folder)` writes a good input and returns the files to damage; `read(folder)` gives the bytes of its result, which it has checked."""

    make: Callable[[Path], list[Path]]
    read: Callable[[Path], int]
    cut_is_refused: bool = True     # a file cut anywhere is never taken
    error: type[Exception] = BadFile
    mutants: int = 2000     # in the tests


def _require(good: bool, what: str) -> None:
    if not good:
        raise AssertionError(what)


def _colmap(text: bool) -> Reader:
    def make(folder):
        suffix = "txt" if text else "bin"
        write_model(folder, text=text)
        return [folder / f"{name}.{suffix}" for name in ("cameras", "images", "points3D")]

    def read(folder):
        model = colmap.read_model(folder)
        numbers = [model.points, *([*i.quat, *i.translation] for i in model.images.values()), *(i.points2d for i in model.images.values()), *(list(c.params.values()) for c in model.cameras.values())]
        _require(all(np.isfinite(x).all() for x in numbers) and len(model.track_starts) == len(model.points) + 1, "not finite")
        return model.points.nbytes + model.tracks.nbytes
    return Reader(make, read)


def _frames(folder: Path) -> list[Path]:
    write_capture(folder / "colmap")
    (folder / "colmap" / "images").rename(folder / "images")
    names = sorted(p.relative_to(folder).as_posix() for p in (folder / "images").rglob("*.png"))
    pose = [[1.0, 0, 0, 1], [0, 1.0, 0, 2], [0, 0, 1.0, 3], [0, 0, 0, 1]]
    top = {"w": 32, "h": 24, "fl_x": 30.0, "fl_y": 31.0, "cx": 16.5, "cy": 11.5, "applied_scale": 2.0, "applied_transform": [[1.0, 0, 0, 0], [0, 0, 1, 0], [0, -1, 0, 0]],
           "frames": [{"file_path": name, "transform_matrix": pose} for name in names]}
    (folder / "transforms.json").write_text(json.dumps(top))
    return [folder / "transforms.json"]


def _read_frames(folder: Path) -> int:
    capture = load_transforms(folder)
    _require(bool(capture.photos) and all(np.isfinite(p.K).all() and np.isfinite(p.world_to_cam).all() for p in capture.photos), "not finite")
    return capture.points.nbytes


_NOISE = np.random.default_rng(0).integers(0, 256, (24, 32, 3), dtype=np.uint8)
_FORMATS = {"JPEG": {"quality": 95}, "PNG": {}, "WebP": {"lossless": True}, "TIFF": {"compression": "tiff_lzw"}}


def _photo(folder: Path, mask: bool = False) -> Photo:
    return Photo("p", folder / "picture", np.array([[50.0, 0, 16], [0, 60.0, 12], [0, 0, 1]]), 32, 24, np.eye(4), mask=folder / "picture" if mask else None)


def _picture(kind: str) -> Reader:
    def make(folder):
        Image.fromarray(_NOISE).save(folder / "picture", kind, **_FORMATS[kind])
        return [folder / "picture"]

    def read(folder):
        pixels = load_image(_photo(folder))
        _require(pixels.shape == (24, 32, 3) and 0 <= pixels.min() <= pixels.max() <= 1, "pixels outside 0 to 1")
        return pixels.nbytes
    return Reader(make, read, cut_is_refused=False)     # bytes behind the last pixel may be missing


def _mask_files(folder: Path) -> list[Path]:
    Image.fromarray(_NOISE[..., 0] // 128 * 255).save(folder / "picture", "PNG")
    return [folder / "picture"]


def _read_mask(folder: Path) -> int:
    kept = load_mask(_photo(folder, mask=True))
    _require(kept.shape == (24, 32) and kept.dtype == bool, "no mask")
    return 4 * kept.nbytes


def _depth_files(folder: Path) -> list[Path]:
    Image.fromarray(_NOISE[..., 0].astype(np.uint16) * 37).save(folder / "picture", "PNG")
    return [folder / "picture"]


def _read_depth(folder: Path) -> int:
    depth = load_depth(dataclasses.replace(_photo(folder), depth=folder / "picture"))
    _require(depth.shape == (24, 32) and bool((np.isfinite(depth) & (depth >= 0)).all()), "no depth")
    return 4 * depth.nbytes


def small_scene(n: int = 20, degree: int = 1, features: int | None = None) -> Scene:
    g = torch.Generator().manual_seed(0)
    r = lambda *shape: torch.randn(*shape, generator=g)
    return Scene(r(n, 3), r(n, 4), r(n, 3), r(n), r(n, (degree + 1) ** 2, 3), None if features is None else r(n, features))


def _splats(name: str, degree: int = 1, features: int | None = None, cut_is_refused: bool = True, **options) -> Reader:
    def make(folder):
        io.save(folder / name, small_scene(20, degree, features), SceneHeader(settings={"antialias": True}, up=(0.0, -0.6, 0.8)), **options)
        return sorted(path for path in folder.iterdir() if path.is_file())

    return Reader(make, lambda folder: _read_scene(folder / name), cut_is_refused)


def _read_scene(path: Path) -> int:
    scene, header = io.load(path)
    scene.check_finite()
    _require(all(math.isfinite(x) for x in header.up or ()), "up is not finite")
    return sum(x.nbytes for x in scene.fields().values())


def _unpacked_spz(folder: Path) -> list[Path]:
    """Damage behind the packing, which its checksum would find at once."""
    io.save(folder / "s.spz", small_scene(), version=3)
    (folder / "s.raw").write_bytes(gzip.decompress((folder / "s.spz").read_bytes()))
    return [folder / "s.raw"]


def _read_unpacked_spz(folder: Path) -> int:
    _write(folder / "s.spz", gzip.compress((folder / "s.raw").read_bytes(), 1))
    return _read_scene(folder / "s.spz")


_STATE = {"scene.means": torch.arange(60.0).reshape(20, 3), "order": torch.arange(50), "visible": torch.arange(9) < 4}


def _checkpoint_file(folder: Path) -> list[Path]:
    return [checkpoint.save(folder, 30, _STATE, {"config": "steps: 30", "photos": ["a", "b"]})]


def _read_checkpoint(folder: Path) -> int:
    found = checkpoint.load(folder)
    if found is None:
        raise BadFile(folder, "", "none")
    _require(found.tensors.keys() == _STATE.keys() and all(torch.equal(x, _STATE[name]) for name, x in found.tensors.items()), "other numbers than were saved")
    return sum(x.nbytes for x in found.tensors.values())


def _yaml_file(folder: Path) -> list[Path]:
    (folder / "c.yaml").write_text(config.to_yaml(config.Reconstruct(data=Path("photos"))))
    return [folder / "c.yaml"]


def _read_yaml(folder: Path) -> int:
    found = config.load_yaml(folder / "c.yaml", config.Reconstruct)
    _require(type(found) is config.Reconstruct and config.to_yaml(found) is not None, "no config")
    return 0


def _lifting_file(folder: Path) -> list[Path]:
    torch.manual_seed(0)
    state = {f"encoder.{key}": x for key, x in MVSplat(SMALL).state_dict().items()}
    torch.save({"state_dict": state, "global_step": 300_000, "loops": {}, "optimizer_states": [{"param_groups": [{"lr": 2e-4}]}]}, folder / "re10k.ckpt")
    return [folder / "re10k.ckpt"]


def _read_lifting(folder: Path) -> int:
    model, weights = load_weights(folder / "re10k.ckpt", config=SMALL)
    _require(all(bool(torch.isfinite(x).all()) for x in model.state_dict().values()), "not finite")
    return 4 * weights.parameters


def _chunk_file(folder: Path) -> list[Path]:
    write_chunk(folder / "000000.torch", {"one": 3, "two": 2})
    return [folder / "000000.torch"]


def _read_chunk(folder: Path) -> int:
    sequences = re10k.read_chunk(folder / "000000.torch")
    _require(all(np.isfinite(s.K_normalised).all() and np.isfinite(s.world_to_cam).all() and len(s.timestamps) == len(s) for s in sequences), "not finite")
    return sum(s.image(i).nbytes for s in sequences for i in range(len(s)))


READERS = {
    "COLMAP .bin": _colmap(False), "COLMAP .txt": _colmap(True), "transforms.json": Reader(_frames, _read_frames),
    **{f"photo, {kind}": _picture(kind) for kind in _FORMATS}, "mask": Reader(_mask_files, _read_mask, cut_is_refused=False),
    "depth picture": Reader(_depth_files, _read_depth, cut_is_refused=False),
    "PLY": _splats("s.ply", features=2), "compressed PLY": _splats("s.compressed.ply"),
    ".splat": _splats("s.splat", 0, cut_is_refused=False),     # whole records may be missing: test_formats.py cuts it inside one
    "SPZ 3": _splats("s.spz"), "SPZ 3 behind its packing": Reader(_unpacked_spz, _read_unpacked_spz), "SPZ 4": _splats("s.spz", version=4),
    **{f"KSPLAT level {level}": _splats("s.ksplat", 2, level=level) for level in (0, 2)},
    "SOG": _splats("s.sog"), "SOG in a folder": _splats("meta.json"), "glTF": _splats("s.glb"), "safetensors": _splats("s.safetensors", features=2),
    "checkpoint": Reader(_checkpoint_file, _read_checkpoint),
    "lifting checkpoint": Reader(_lifting_file, _read_lifting, mutants=500), "RE10K chunk": Reader(_chunk_file, _read_chunk, mutants=500),
    "YAML config": Reader(_yaml_file, _read_yaml, cut_is_refused=False, error=BadConfig),      # a shorter list of settings is a list of settings
}


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What became of the mutants of one reader."""

    taken: int
    refused: int
    wrong: list[str]        # every mutant that neither was taken with a good result nor refused by the reader's error
    slowest: float          # seconds
    memory: int             # bytes, the largest growth of the process during one read


def fuzz(name: str, count: int, seed: int, folder: Path) -> Verdict:
    """`count` mutants of the reader's files, each read once in a process that is made anew after a crash or a hang."""
    done, wrong, totals = 0, [], Counter()
    slowest, memory = 0.0, 0
    context = multiprocessing.get_context("spawn" if torch.cuda.is_initialized() else "fork")
    while done < count:
        ours, theirs = context.Pipe()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)     # forking with threads: the child calls none of them
            worker = context.Process(target=_work, args=(name, done, count, seed, folder, theirs), daemon=True)
            worker.start()
        theirs.close()
        try:
            while done < count and ours.poll(SECONDS_SILENT):
                outcome, seconds, grown = ours.recv()
                totals[outcome if outcome in ("taken", "refused") else "wrong"] += 1
                if outcome not in ("taken", "refused"):
                    wrong.append(f"{name}, seed {seed}, mutant {done}: {outcome}")
                slowest, memory, done = max(slowest, seconds), max(memory, grown), done + 1
            if done < count:
                worker.kill()
                wrong.append(f"{name}, seed {seed}, mutant {done}: the reader hangs")
                done += 1
        except EOFError:
            worker.join()
            wrong.append(f"{name}, seed {seed}, mutant {done}: the process ended with {worker.exitcode}")
            done += 1
        worker.join()
    return Verdict(totals["taken"], totals["refused"], wrong, slowest, memory)


def _work(name: str, first: int, count: int, seed: int, folder: Path, out) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")     # as for a user: a decoder's warning is no error
    reader = READERS[name]
    files = reader.make(folder)
    whole = [path.read_bytes() for path in files]
    reader.read(folder)
    per_file = [mutants(data, -(-count // len(files)), seed * 1000 + i) for i, data in enumerate(whole)]
    for i in range(count):
        path, data = files[i % len(files)], whole[i % len(files)]
        damaged = next(per_file[i % len(files)])
        if i < first:
            continue
        _write(path, damaged)
        before, start = _peak(), seconds_of_own()
        size = 0
        try:
            size, outcome = reader.read(folder), "taken"
        except reader.error as e:
            outcome = "refused" if str(e).isprintable() and len(str(e)) < 2000 else f"its message is {str(e)!r:.200}"
        except BaseException as e:
            outcome = f"{type(e).__name__}: {e}"[:300]
        seconds, grown = seconds_of_own() - start, _peak() - before
        # An empty points3D.txt is how COLMAP's FAQ tells users to say that there are no points.
        if outcome == "taken" and reader.cut_is_refused and len(damaged) < len(data) and data.startswith(damaged) and (damaged or path.name != "points3D.txt"):
            outcome = f"cut to {len(damaged)} of {len(data)} bytes and taken"
        if seconds > SECONDS_MAX:
            outcome = f"took {seconds:.1f} s ({outcome})"
        if grown > BYTES_MAX + 4 * max(len(damaged), size):
            outcome = f"took {grown >> 20} MiB ({outcome})"
        out.send((outcome, seconds, grown))
        _write(path, data)


def _write(path: Path, data: bytes) -> None:
    """Over what is there: a file that is emptied first is brought to the disk at once by some file systems, a millisecond each time."""
    with path.open("r+b") as file:
        file.write(data)
        file.truncate()


def seconds_of_own() -> float:
    """A clock that stands still while this process waits for a core that others have, where the system says so."""
    try:
        waited = int(Path("/proc/self/schedstat").read_text().split()[1])
    except OSError:
        waited = 0
    return time.perf_counter() - 1e-9 * waited


def _peak() -> int:
    """The most memory that this process has held, in bytes: once it was high, a read must go beyond to be noticed."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def damaged_input(name: str, number: int, count: int, seed: int, folder: Path) -> Path:
    """Writes mutant `number` of a run of `count` into `folder` to look at; returns the damaged file."""
    files = READERS[name].make(folder)
    per_file = [mutants(path.read_bytes(), -(-count // len(files)), seed * 1000 + i) for i, path in enumerate(files)]
    for i in range(number + 1):
        damaged = next(per_file[i % len(files)])
    files[number % len(files)].write_bytes(damaged)
    return files[number % len(files)]
