"""What the lifting network trains on: rooms without end, posed captures, chunks of RealEstate10K. Sample n is the same whoever asks for it, and when."""
from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from .. import rooms
from ..camera import Cameras
from ..capture import Capture, Photo
from ..errors import BadFile
from ..io.atomic import replacing
from ..io.depth import load_depth
from ..io.photos import area_average, find_model_folder, load_image
from ..io.re10k import Sequence, read_chunk
from ..io.reading import Report
from ..io.source import load_source
from ..io.transforms import find_transforms
from .model import with_near_1
from .train_config import LiftTrain

FIRST_ROOM, HELD_ROOM = 1_000_000, 500_000      # seeds of rooms; those below are for tests and benchmarks
ROOMS_PER_SEED = 1_000_000_000
SAMPLES_PER_CHUNK = 64                          # in a row, since a chunk of 100 MB is read for them
CHUNK_DEPTHS = (1.0, 100.0)                     # near and far that networks are trained with on RealEstate10K and ACID
MARGIN = 1.25                                   # near and far lie so much beyond the depths that are known


@dataclass(frozen=True)
class Sample:
    """N views of a place, the inputs first. The world is scaled so that `near` is 1; a batch has one more dimension in front."""

    images: Float[Tensor, "*B N 3 H W"]         # 0 to 1
    K: Float[Tensor, "*B N 3 3"]                # pixels
    world_to_cam: Float[Tensor, "*B N 4 4"]
    depth: Float[Tensor, "*B N H W"]            # camera z; 0 where it is not known
    far: Float[Tensor, "*B"]

    def to(self, like: Tensor) -> Sample:
        """On the device and in the precision of a tensor."""
        return Sample(*(x.to(like, non_blocking=True) for x in vars(self).values()))


Source = Callable[[int], Sample]


def collated(samples: list[Sample]) -> Sample:
    return Sample(*(torch.stack(x) for x in zip(*(vars(sample).values() for sample in samples))))


def training(config: LiftTrain, say: Report, batch: int = 0) -> Source:
    """Sample n of a training: of each place in `config.data` as many, of rooms where there is none. `batch` samples are a step of all processes; 0: of this one."""
    total = config.steps * (batch or config.batch * config.accumulate)
    sources = [_source(path, config, say) for path in config.data] or [functools.partial(room_sample, config, FIRST_ROOM + config.seed * ROOMS_PER_SEED, total=total)]

    def sample(number: int) -> Sample:
        found = sources[number % len(sources)](number // len(sources))
        return mirrored(found) if config.augment and np.random.default_rng([config.seed, number, 1]).random() < 0.5 else found
    return sample


def held_out(config: LiftTrain, say: Report) -> Source | None:
    """Samples that no training sees: other rooms, or the folder test/ of the first place with chunks; None where there is neither."""
    if not config.data:
        return functools.partial(room_sample, dataclasses.replace(config, rooms=0), HELD_ROOM, augment=False)
    return next((_chunks(chunks, config) for path in config.data if (chunks := sorted((path / "test").glob("*.torch")))), None)


def room_sample(config: LiftTrain, first: int, number: int, augment: bool | None = None, total: int = 1) -> Sample:
    """A room's cameras that are close to each other; where config.rooms are used again, number is one of `total`."""
    images, depth, cameras = _room(config, first + (_used_again(config, number, total) if config.rooms else number))
    near, far = float(depth.min()) / 1.05, float(depth.max()) * 1.05
    if config.augment if augment is None else augment:
        rng = np.random.default_rng([first, number])
        near, far = near / rng.uniform(1, 1.4), far * rng.uniform(1, 1.6)
        images = (images ** rng.uniform(0.7, 1.4) * torch.from_numpy(rng.uniform(0.7, 1.05, (3, 1, 1))).float()).clamp(max=1)
    return _normalised(images, cameras.K, cameras.world_to_cam, depth, near, far)


def _used_again(config: LiftTrain, number: int, total: int) -> int:
    """Which of config.rooms a sample is of: any of a quarter of them at first, and of all from three quarters of the schedule on, so that they can be cast meanwhile."""
    in_use = math.ceil(config.rooms * min(1, 0.25 + number / total))
    return int(np.random.default_rng([config.seed, 5, number]).integers(in_use))


def _room(config: LiftTrain, seed: int) -> tuple[Float[Tensor, "N 3 H W"], Float[Tensor, "N H W"], Cameras]:
    """Photos, depths and cameras of a room, from the cache where it has them."""
    count, width, height = config.contexts + config.targets, config.width, config.height
    path = config.cache and config.cache / f"room-{seed}-{count}x{width}x{height}.safetensors"
    if path:
        with contextlib.suppress(OSError, SafetensorError):      # not there, or not whole
            kept = load_file(path)
            return kept["images"].float() / 255, kept["depth"], Cameras(kept["world_to_cam"], kept["K"], width, height)
    seen = rooms.sample(seed, count, width, height)
    images, depth, cameras = seen.photos.permute(0, 3, 1, 2), seen.views.depth, seen.cameras
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as file:
            file.write(save({"images": (images * 255).round().byte().contiguous(), "depth": depth, "K": cameras.K, "world_to_cam": cameras.world_to_cam}))
    return images, depth, cameras


def mirrored(sample: Sample) -> Sample:
    """Left and right exchanged, in pictures and in the world."""
    flip = torch.diag(sample.K.new_tensor([-1.0, 1, 1, 1]))
    K = sample.K.clone()
    K[..., 0, 2] = sample.images.shape[-1] - K[..., 0, 2]
    return Sample(sample.images.flip(-1), K, flip @ sample.world_to_cam @ flip, sample.depth.flip(-1), sample.far)


def _normalised(images: Tensor, K: Tensor, world_to_cam: Tensor, depth: Tensor, near: float, far: float) -> Sample:
    return Sample(images.contiguous(), K.float(), with_near_1(world_to_cam, near), depth / near, torch.tensor(far / near))


def _source(path: Path, config: LiftTrain, say: Report) -> Source:
    """Of one place: a folder of chunks (or its train/), a capture, or a folder of captures."""
    if chunks := sorted((path / "train").glob("*.torch")) or sorted(path.glob("*.torch")):
        return _chunks(chunks, config)
    if not path.is_dir():
        raise BadFile(path, "", "no such folder; expected a capture, a folder of captures, or chunks (*.torch)")
    is_capture = lambda folder: folder.is_dir() and bool(find_model_folder(folder) or find_transforms(folder))
    folders = [path] if is_capture(path) else sorted(folder for folder in path.iterdir() if is_capture(folder))
    if not folders:
        raise BadFile(path, "", "no capture (COLMAP model or transforms.json), no folder of captures, no chunks (*.torch or train/*.torch)")
    captures = [load_source(folder, folder, 1, say)[0] for folder in folders]
    for folder, capture in zip(folders, captures):
        if len(capture.photos) <= config.gap[0]:
            raise BadFile(folder, "", f"{len(capture.photos)} photos; --gap {config.gap[0]} {config.gap[1]} needs at least {config.gap[0] + 1} in a row")
    return lambda number: _of_capture(captures, folders, config, number)


def _frames(count: int, config: LiftTrain, rng: np.random.Generator) -> list[int]:
    """Which of `count` frames in a row are the inputs, evenly spread over a gap, and which the targets between the outer ones."""
    gap = int(rng.integers(config.gap[0], min(config.gap[1], count - 1) + 1))
    first = int(rng.integers(count - gap))
    inputs = [first + round(gap * i / (config.contexts - 1)) for i in range(config.contexts)]
    others = [i for i in range(first + 1, first + gap) if i not in inputs]
    return [*inputs, *(int(i) for i in rng.choice(others, config.targets, replace=False))]


def _of_capture(captures: list[Capture], folders: list[Path], config: LiftTrain, number: int) -> Sample:
    rng = np.random.default_rng([config.seed, number, 2])
    at = int(rng.integers(len(captures)))
    chosen = _frames(len(captures[at].photos), config, rng)
    images, cameras, depths = zip(*(_fitted(captures[at].photos[i], config.width, config.height) for i in chosen))
    known = [x[x > 0] for x in depths[:config.contexts]]
    if config.near == 0 or config.far == 0:
        known += [x[x > 0] for i, camera in zip(chosen[:config.contexts], cameras) if len(captures[at].point_views) for x in [captures[at].sparse_depth(i, camera)]]
        if sum(map(len, known)) < 10:
            raise BadFile(folders[at], captures[at].photos[chosen[0]].name, "neither depth pictures nor sparse points say how far to look; give --near and --far")
    values = torch.cat(known)
    near, far = config.near or float(values.quantile(0.005)) / MARGIN, config.far or float(values.quantile(0.995)) * MARGIN
    batch = Cameras.cat(list(cameras))
    return _normalised(torch.stack(images), batch.K, batch.world_to_cam, torch.stack(depths), near, far)


def _fitted(photo: Photo, width: int, height: int) -> tuple[Tensor, Cameras, Tensor]:
    """A photo made smaller (or larger) until it covers the size, what sticks out cut off evenly; its camera, and its depth or zeros."""
    scale = max(width / photo.width, height / photo.height)
    size = max(width, round(scale * photo.width)), max(height, round(scale * photo.height))
    left, top = (size[0] - width) // 2, (size[1] - height) // 2
    cut = lambda x: torch.from_numpy(np.ascontiguousarray(x[top:top + height, left:left + width]))
    depth = load_depth(photo, *size)
    camera = photo.camera(torch.float64).resized(*size)
    K = camera.K - torch.tensor([[0, 0, left], [0, 0, top], [0, 0, 0.0]], dtype=torch.float64)
    return (cut(load_image(photo, *size)).permute(2, 0, 1), camera.replace(K=K, width=width, height=height),
            cut(depth) if depth is not None else torch.zeros(height, width))


def _chunks(files: list[Path], config: LiftTrain) -> Source:
    chunk = functools.lru_cache(2)(lambda file: [sequence for sequence in read_chunk(file) if len(sequence) > config.gap[0]])

    def sample(number: int) -> Sample:
        rng = np.random.default_rng([config.seed, number, 3])
        order = np.random.default_rng([config.seed, 4, number // (SAMPLES_PER_CHUNK * len(files))]).permutation(len(files))
        file = files[order[number // SAMPLES_PER_CHUNK % len(files)]]
        if not (sequences := chunk(file)):
            raise BadFile(file, "", f"no sequence is longer than --gap {config.gap[0]} frames")
        return _of_sequence(sequences[rng.integers(len(sequences))], config, rng)
    return sample


def _of_sequence(sequence: Sequence, config: LiftTrain, rng: np.random.Generator) -> Sample:
    chosen = _frames(len(sequence), config, rng)
    images, Ks = [], []
    for i in chosen:
        pixels = sequence.image(i)
        height, width = pixels.shape[:2]
        scale = max(config.width / width, config.height / height)
        size = max(config.width, math.floor(scale * width + 0.5)), max(config.height, math.floor(scale * height + 0.5))
        left, top = (size[0] - config.width) // 2, (size[1] - config.height) // 2
        smaller = area_average(pixels, *size)[top:top + config.height, left:left + config.width]
        images.append(torch.from_numpy(np.ascontiguousarray(smaller)).float().permute(2, 0, 1) / 255)
        Ks.append(torch.from_numpy(sequence.K(i, *size)).double() - torch.tensor([[0, 0, left], [0, 0, top], [0, 0, 0.0]], dtype=torch.float64))
    poses = torch.from_numpy(sequence.world_to_cam[chosen])
    depth = torch.zeros(len(chosen), config.height, config.width)
    return _normalised(torch.stack(images), torch.stack(Ks), poses, depth, config.near or CHUNK_DEPTHS[0], config.far or CHUNK_DEPTHS[1])
