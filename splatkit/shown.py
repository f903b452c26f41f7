"""A scene as a viewer's server has it: the newest copy, its chunks with versions, and what belongs beside it."""
from __future__ import annotations

import dataclasses
import json
import math
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from . import wire
from .camera import Cameras
from .capture import Photo, SceneHeader
from .gate import finite
from .io.photos import load_image
from .metrics import loss_by_gaussian
from .raster import RasterSettings
from .scene import Scene

CACHE_BYTES = 128 << 20
PHOTO_SIDE_MAX = 1600       # pixels
UP = (0.0, -1.0, 0.0)       # where a scene does not say: COLMAP's worlds often stand so
LOSS_PHOTOS, LOSS_SIDE = 24, 256        # photos that the loss of Gaussians is taken over, and their pixels at most
LOSS_SECONDS = 30.0         # that it stays as it is while a run goes on


class Gone(Exception):
    """A chunk, version or photo that is not there (any more): status and reason."""

    def __init__(self, status: int, why: str):
        super().__init__(why)
        self.status = status


@dataclass(frozen=True)
class View:
    """One of the cameras that a scene was made from, at the size that the run works with."""

    name: str
    width: int
    height: int
    world_to_cam: tuple[float, ...]
    K: tuple[float, ...]
    photo: Photo | None = None

    @staticmethod
    def of(photo: Photo, width: int, height: int) -> View:
        camera = photo.camera(torch.float64).resized(width, height)
        return View(photo.name, width, height, tuple(camera.world_to_cam[0].flatten().tolist()), tuple(camera.K[0].flatten().tolist()), photo)

    def looked_at(self, side: int) -> tuple[Cameras, Tensor]:
        """Its camera and its photo, of at most so many pixels a side. Raises BadFile."""
        camera = Cameras(torch.tensor(self.world_to_cam, dtype=torch.float32).view(1, 4, 4), torch.tensor(self.K, dtype=torch.float32).view(1, 3, 3), self.width, self.height)
        factor = max(1, max(self.width, self.height) / side)
        camera = camera.resized(max(1, int(self.width / factor)), max(1, int(self.height / factor)))
        return camera, torch.from_numpy(load_image(self.photo, camera.width, camera.height))


@dataclass(frozen=True)
class State:
    """One copy of a scene, or its core planes alone, and the version of each of its chunks: the revision at which it last changed."""

    scene: Scene | None
    complete: bool = True           # else without the SH bands above 0
    step: int | None = None
    revision: int = 0
    versions: tuple[int, ...] = ()
    heat: dict[str, Tensor] = field(default_factory=dict)
    core: wire.Cores | None = None  # where there is no scene

    @property
    def count(self) -> int:
        return len(self.scene) if self.core is None else self.core.count

    def rows(self, chunk: int) -> slice:
        return slice(chunk * wire.CHUNK, min((chunk + 1) * wire.CHUNK, self.count))

    def after(self, before: State | None) -> State:
        """This copy with versions that follow from those of the one before: a chunk keeps its version where it keeps its bytes.

        Core planes say nothing about the rest: between them and a scene every version changes.
        """
        revision, versions = before.revision + 1 if before else 1, []
        for k in range(-(-self.count // wire.CHUNK)):
            kept = before is not None and k < len(before.versions) and self._equals(before, k)
            versions.append(before.versions[k] if kept else revision)
        return dataclasses.replace(self, revision=revision, versions=tuple(versions))

    def _equals(self, other: State, chunk: int) -> bool:
        rows = self.rows(chunk)
        if other.rows(chunk) != rows or (self.core is None) != (other.core is None):
            return False
        if self.core is not None:
            ours, theirs = np.frombuffer(self.core[chunk], np.uint8), np.frombuffer(other.core[chunk], np.uint8)
            return np.array_equal(ours[:4096], theirs[:4096]) and np.array_equal(ours, theirs)
        ours, theirs = self.scene.fields(), other.scene.fields()
        if ours.keys() != theirs.keys() or any(ours[name].shape[1:] != theirs[name].shape[1:] for name in ours):
            return False
        # The first rows say enough about most chunks of a scene that trains.
        for some in (slice(rows.start, min(rows.start + 256, rows.stop)), rows):
            if not all(_bits_equal(ours[name][some], theirs[name][some]) for name in ours):
                return False
        return True


class Cache:
    """Encoded chunks and photos up to so many bytes; the least recently used go first. For the worker alone."""

    def __init__(self, most: int = CACHE_BYTES):
        self.most, self.held, self.kept = most, 0, OrderedDict()

    def get(self, key, version, make: Callable[[], bytes]) -> bytes:
        if key in self.kept and self.kept[key][0] == version:
            self.kept.move_to_end(key)
            return self.kept[key][1]
        data = make()
        self.held += len(data) - len(self.kept.pop(key, (None, b""))[1])
        self.kept[key] = version, data
        while self.held > self.most and self.kept:
            self.held -= len(self.kept.popitem(last=False)[1][1])
        return data


class Shown:
    """A scene that clients see. `put` and `chunk` are for the one worker of a server, the rest may be read from any thread."""

    def __init__(self, name: str, header: SceneHeader, views: tuple[View, ...] = (), sh_degree: int = 0, channels: int = 0, live: bool = False,
                 background: tuple[float, float, float] = (0.0, 0.0, 0.0)):
        known = {f.name: getattr(RasterSettings(**header.settings), f.name) for f in dataclasses.fields(RasterSettings) if f.name != "deterministic"}
        self.name, self.settings, self.views, self.sh_degree, self.channels, self.live, self.background = name, RasterSettings(**header.settings), views, sh_degree, channels, live, background
        self.header = {**{key: min(value, 1e30) for key, value in known.items()}, "up": list(header.up or UP)}
        self.state: State | None = None
        self.losses: dict[int, float] = {}                  # by view
        self.metrics: dict[str, list] = {"steps": [], "loss": [], "psnr": [], "count": []}
        self.pca: dict | None = None
        self.done = False
        self.spent, self.sent, self._sent_at = 0.0, 0.0, None       # CPU-seconds of the worker; of the thread of the sockets from the first chunk on
        self.wanted, self.scene_wanted, self.sh_wanted = 0.0, 0.0, 0.0      # until when (time.monotonic) someone looks; at more than core planes; at the higher bands
        self.heat_names: tuple[str, ...] = ()               # of what a run hands over with a scene
        self._cameras, self._cameras_at = "[]", -math.inf
        self._loss: tuple[float, State, Tensor] | None = None       # when, of which copy, by Gaussian

    @staticmethod
    def of(scene: Scene, name: str, header: SceneHeader, views: tuple[View, ...] = (), background: tuple[float, float, float] = (0.0, 0.0, 0.0)) -> Shown:
        """A scene that stays as it is."""
        scene = scene.detach().to("cpu", torch.float32)
        shown = Shown(name, header, views, scene.sh_degree, 0 if scene.features is None else scene.features.shape[1], background=background)
        shown.put(State(scene, step=header.step))
        return shown

    def put(self, state: State) -> None:
        """A newer copy takes the place of the one before."""
        if state.scene is not None and state.scene.features is not None and self.pca is None:
            log_scales = state.scene.log_scales.clamp(-30, 30)
            area = (log_scales.sum(1) - log_scales.amin(1)).exp()       # of the ellipse that the two longer axes span
            self.pca = wire.pca(state.scene.features.numpy(), (area * torch.sigmoid(state.scene.logit_opacities)).numpy())
        self.state = state.after(self.state)

    @property
    def present(self) -> State:
        """The newest copy. Raises Gone before there is one."""
        if self.state is None:
            raise Gone(503, f"{self.name} has not begun; ask again")
        return self.state

    @property
    def heats(self) -> list[str]:
        """What Gaussians can be coloured by: what a run hands over, and how far photos are from pictures of them."""
        return [*self.heat_names, *(["loss"] if any(view.photo for view in self.views) else [])]

    def heat(self, chunk: int, name: str) -> tuple[int, bytes]:
        """The version of a chunk and one heat of its rows, as it is now. Raises Gone."""
        state = self.present
        if chunk >= len(state.versions) or name not in self.heats:
            raise Gone(404, f"{self.name} has {len(state.versions)} chunks and the heats {', '.join(self.heats) or 'none'}")
        if state.scene is None or name in self.heat_names and name not in state.heat:
            raise Gone(503, "the run has not handed it over yet; ask again")
        values = state.heat[name] if name in state.heat else self._photo_loss(state)
        return state.versions[chunk], wire.heat(values[state.rows(chunk)][:, None].numpy())

    def _photo_loss(self, state: State) -> Tensor:
        """Of a sample of the photos, evenly taken; it takes a second or two of the worker."""
        if self._loss is not None:
            at, of, values = self._loss
            if of is state or len(values) == len(state.scene) and time.monotonic() < at + LOSS_SECONDS:
                return values
        start, seen = time.thread_time(), [view for view in self.views if view.photo is not None]
        background = torch.tensor(self.background, dtype=torch.float32)
        values = loss_by_gaussian(state.scene.replace(features=None), (view.looked_at(LOSS_SIDE) for view in seen[::-(-len(seen) // LOSS_PHOTOS)]), self.settings, background)
        self._loss = time.monotonic(), state, values
        self.spent += time.thread_time() - start
        return values

    def chunk(self, cache: Cache, plane: str, chunk: int, version: int | None = None) -> tuple[int, bytes | memoryview]:
        """The version of a chunk and one of its planes, as it is now: whoever keeps a memoryview keeps all chunks of its copy. Raises Gone."""
        state = self.present
        if chunk >= len(state.versions):
            raise Gone(404, f"{self.name} has {len(state.versions)} chunks")
        if plane == "features" and (state.scene is None or state.scene.features is None):
            raise Gone(404, f"{self.name} has no {plane}")
        if version not in (None, state.versions[chunk]):
            raise Gone(409, f"version {version} of chunk {chunk} is gone; it is at {state.versions[chunk]}")
        if plane in ("sh", "float32") and not state.complete:
            raise Gone(503, "the run has not handed over its SH yet; ask again")
        if state.core is not None:
            return state.versions[chunk], state.core[chunk]
        rows = state.rows(chunk)

        def encode() -> bytes:
            start = time.thread_time()
            data = wire.ENCODERS[plane](state.scene.rows(rows))
            self.spent += time.thread_time() - start
            return data
        return state.versions[chunk], encode() if plane == "float32" else cache.get((self, plane, chunk), state.versions[chunk], encode)

    def count_sent(self) -> None:
        """After each chunk, in the thread of the sockets: adds what that has spent since the one before."""
        now = time.thread_time()
        self.sent, self._sent_at = self.sent + (0.0 if self._sent_at is None else now - self._sent_at), now

    def manifest(self, key: str, state: State | None = None) -> str:
        """JSON of the newest copy or of that one, without its last brace, so that a message can have its type beside it."""
        state, now = state or self.present, time.monotonic()
        if now - self._cameras_at > 5 or self.done:     # many cameras take milliseconds
            losses = {i: finite(x) for i, x in self.losses.copy().items()}
            self._cameras, self._cameras_at = json.dumps([
                {"name": v.name, "width": v.width, "height": v.height, "world_to_cam": v.world_to_cam, "K": v.K, "photo": i if v.photo else None, "loss": losses.get(i)}
                for i, v in enumerate(self.views)]), now
        counts = [min(wire.CHUNK, state.count - k * wire.CHUNK) for k in range(len(state.versions))]
        said = {"format": "splatkit-scene", "version": 1, "id": key, "name": self.name, "count": state.count, "sh_degree": self.sh_degree, "chunk_size": wire.CHUNK,
                "header": {**self.header, "step": state.step, "name": self.name}, "step": state.step, "live": self.live and not self.done, "revision": state.revision,
                "background": self.background, "chunks": [{"count": n, "version": v} for n, v in zip(counts, state.versions)],
                "features": {"channels": self.channels, "pca": self.pca} if self.channels else None, "heat": self.heats}
        return f'{json.dumps(said, allow_nan=False)[:-1]}, "cameras": {self._cameras}'

    def record(self, record: dict) -> None:
        """A line of metrics.jsonl. What is no such line, and steps that were skipped, say nothing."""
        step, count, loss, psnr = (record.get(name) for name in ("step", "gaussians", "loss", "psnr_train"))
        if type(step) is int and type(count) is int and all(type(x) in (int, float) for x in (loss, psnr)):
            for name, value in (("loss", finite(loss)), ("psnr", [step, finite(psnr)]), ("count", count), ("steps", step)):     # steps last: their number is that of whole rows
                self.metrics[name].append(value)

    def metrics_from(self, first: int) -> dict[str, list]:
        n = len(self.metrics["steps"])
        return {name: values[first:n] for name, values in self.metrics.items()}


def _bits_equal(a: Tensor, b: Tensor) -> bool:
    """Also where both are the same NaN."""
    return np.array_equal(a.numpy().view(np.int32), b.numpy().view(np.int32))
