"""What a viewer shows: scene files, run folders, runs while they work; a scene as one HTML file, or in a notebook."""
from __future__ import annotations

import dataclasses
import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from . import page, wire
from .capture import SceneHeader
from .config import Reconstruct
from .errors import BadFile
from .fit import Fit
from .io.atomic import replacing
from .io.reading import Report, silent
from .io.source import load_source
from .live import Live
from .poses import refined
from .reconstruct import Watcher
from .scene import Edit, Scene
from .serve import Viewer
from .shown import Cache, Shown, State, View
from .views import Views, scene_of


def opened(path: Path, say: Report = silent) -> Shown:
    """The scene of a file, or of a run folder with its photos, cameras and metrics; where the photos cannot be had, `say` gets the reason.

    Raises BadFile for what is wrong with the scene or the run.
    """
    scene, header, config = scene_of(path, say)
    name = path.resolve().name
    if config is None:
        return Shown.of(scene, name, header)
    shown = Shown.of(scene, name, header, _views(config, say), config.background)
    for line in _lines(path / "metrics.jsonl"):
        shown.record(line)
    return shown


def _views(config: Reconstruct, say: Report) -> tuple[View, ...]:
    try:
        capture, downscale = load_source(config.data, config.output, config.downscale)
        capture = refined(capture, config.output / "cameras.json")
    except BadFile as why:
        say(f"the run's photos cannot be used: {why}")
        return ()
    return tuple(View.of(photo, *photo.size_at(downscale, config.max_side)) for photo in capture.photos)


def _lines(path: Path) -> Iterator[dict]:
    """The records of a metrics.jsonl; what is none is left out."""
    for line in path.read_text(errors="replace").splitlines() if path.is_file() else []:
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict):
            yield record


class Following:
    """Scene files and run folders as they are on the disk: `shown`, in the order of `paths`, and what another process writes there while it is shown.

    A run that has not come to its first scene is waited for. From `start` to `close` a thread looks every `seconds` for another scene file (a run replaces its own with every checkpoint) and for further
    metrics; what cannot be read leaves what was there, and `say` gets a line. Raises BadFile as `opened`.
    """

    def __init__(self, paths: Sequence[Path], say: Report = silent, seconds: float = 2.0):
        self.files = [path / "scene.ply" if path.is_dir() else path for path in paths]
        for path, file in zip(paths, self.files):
            if (path / "config.yaml").is_file() and not file.exists():
                say(f"{path}: the run has no scene yet; waiting for its first (Ctrl-C ends this)")
                while not file.exists():
                    time.sleep(seconds / 4)
        self.stamps = [_stamp(file) for file in self.files]     # before it is read: what is written meanwhile is read again
        self.paths, self.shown, self.say, self.seconds = paths, [opened(path, say) for path in paths], say, seconds
        self.ended, self.viewer = threading.Event(), None
        self.thread = threading.Thread(target=self._look, name="splatkit-follow", daemon=True)

    def start(self, viewer: Viewer) -> None:
        self.viewer = viewer
        self.thread.start()

    def close(self) -> None:
        self.ended.set()
        self.thread.join(10)

    def _look(self) -> None:
        while not self.ended.wait(self.seconds):
            for k, (path, file, shown) in enumerate(zip(self.paths, self.files, self.shown)):
                try:
                    if (stamp := _stamp(file)) not in (self.stamps[k], None):
                        self.stamps[k] = stamp
                        self._changed(path, shown)
                    if path.is_dir() and self._further(path, shown):
                        self.viewer.poke()
                except (BadFile, OSError) as why:
                    self.say(f"view: {why}")

    def _changed(self, path: Path, shown: Shown) -> None:
        scene, header, _ = scene_of(path)
        if (scene.sh_degree, 0 if scene.features is None else scene.features.shape[1]) != (shown.sh_degree, shown.channels):
            raise BadFile(path, "", f"holds a scene of another kind now (SH degree {scene.sh_degree}); start `splatkit view` anew to see it")
        scene = scene.detach().to("cpu", torch.float32)
        shown.live = True
        self.viewer.hand_over(lambda: shown.put(State(scene, step=header.step)))

    @staticmethod
    def _further(path: Path, shown: Shown) -> bool:
        last = shown.metrics["steps"][-1] if shown.metrics["steps"] else -1
        new = [record for record in _lines(path / "metrics.jsonl") if type(record.get("step")) is int and record["step"] > last]
        for record in new:
            shown.record(record)
        return bool(new)


def _stamp(file: Path) -> tuple[int, int, int] | None:
    """What changes when a file is replaced; None where there is none."""
    try:
        found = file.stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size


class Watching(Watcher):
    """A run in the browser: the server starts with its first scene, and `announce` gets the address. Close it when the run has ended."""

    def __init__(self, announce: Report, port: int = 0, hosts: tuple[str, ...] = (), rate: float = 2.0):
        self.announce, self.port, self.hosts, self.rate = announce, port, hosts, rate
        self.viewer: Viewer | None = None

    def begun(self, fit: Fit, views: Views, train: list[int], header: SceneHeader) -> None:
        photos = views.capture.photos
        shown = Shown(fit.config.output.resolve().name, header, tuple(View.of(photo, *views.size(photo)) for photo in photos), fit.scene.sh_degree, live=True,
                      background=fit.config.background)
        for line in _lines(fit.config.output / "metrics.jsonl"):
            shown.record(line)
        self.shown, self.viewer = shown, Viewer([shown], self.port, self.hosts, self.announce)
        self.live = Live(shown, self.viewer.hand_over, self.rate)
        self.live.follow(None, len(fit.scene), fit.step, fit.scene.device)
        self.live.take(fit.scene, fit.step, self._heat(fit))
        self.viewer.start()
        self.announce(f"view: {self.viewer.url}")

    def stepped(self, fit: Fit, edit: Edit | None, photo: int, loss: Tensor) -> None:
        live = self.live
        live.losses[photo] = loss
        if edit is not None:
            live.follow(edit, len(fit.scene), fit.step, fit.scene.device)
        last = fit.step == fit.config.steps
        if last or live.due():
            live.take(fit.scene, fit.step, self._heat(fit), complete=last)

    def recorded(self, record: dict) -> None:
        self.shown.record(record)
        self.viewer.poke()

    def _heat(self, fit: Fit) -> dict[str, Callable[[], Tensor]]:
        heat, stats = {"age": lambda: fit.step - self.live.born}, fit.growth.stats
        if stats is not None:
            heat["gradient"] = lambda: stats.grad_sum / stats.count.clamp(min=1)
        return heat

    def close(self, whole: bool = True) -> None:
        """Tells the pages that the run has ended, once they have its last scene where it came `whole` to its end."""
        if self.viewer is not None:
            self.shown.done = whole
            self.viewer.close(5.0 if whole else 0.0)


def container(shown: Shown) -> bytes:
    """A scene as an exported page carries it; its photos stay behind."""
    manifest = json.loads(shown.manifest("0") + "}")
    manifest |= {"live": False, "cameras": [{**camera, "photo": None} for camera in manifest["cameras"]], "features": None, "heat": []}
    cache = Cache(0)
    planes = (shown.chunk(cache, plane, k)[1] for k in range(len(shown.state.versions)) for plane in ("core", "sh"))
    return wire.container(manifest, planes)


def export_html(path: Path, out: Path, say: Report = silent) -> Path:
    """Writes a scene file, or the scene of a run folder, as one HTML file that needs no server and connects to nothing.

    Raises BadFile as `opened`, and where this installation has no viewer page.
    """
    text = page.with_scene(container(opened(path, say)))
    with replacing(out) as file:
        file.write(text.encode())
    return out


@dataclasses.dataclass(frozen=True)
class Notebook:
    """A scene that a notebook shows as the value of a cell, with all its data, so that it is still there when the notebook is opened again."""

    text: str
    height: int

    def _repr_html_(self) -> str:
        return page.in_notebook(self.text, self.height)


def show(scene: Scene, header: SceneHeader | None = None, height: int = 600, name: str = "scene") -> Notebook:
    """The scene for a cell of a notebook, about 85 bytes for each Gaussian of SH degree 3. Raises BadFile where this installation has no viewer page."""
    return Notebook(page.with_scene(container(Shown.of(scene, name, header or SceneHeader()))), height)
