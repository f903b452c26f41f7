"""`splatkit distill --view`: the student's features of one pair of photos, on the Gaussians of that pair, in a browser while it learns."""
from __future__ import annotations

import time

import torch

from .capture import SceneHeader
from .distill import loop
from .distill.attach import components
from .distill.geometry import from_depth, geometry_of
from .distill.samples import Sample
from .io.reading import Report
from .paths import estimate_up
from .camera import Cameras
from .serve import Viewer
from .shown import Shown, State

CHANNELS = 16       # principal components of the first features; later ones are shown in the same ones, so that a change is seen as one
SECONDS = 5.0       # between two pictures


class Watching(loop.Watcher):
    """The server starts with the first features, and `announce` gets the address. Close it when the run has ended."""

    def __init__(self, announce: Report, port: int = 0):
        self.announce, self.port = announce, port
        self.viewer: Viewer | None = None
        self.shown_at = 0.0

    @torch.no_grad()
    def begun(self, run: loop.Run, sample: Sample) -> None:
        self.sample = sample.to(run.device)
        known = all(view.depth is not None for view in sample.contexts)
        self.carrier = from_depth(self.sample) if known else geometry_of(run.config.geometry, run.device)(self.sample)
        self.project, _ = components(self._tokens(run).flatten(0, 2), CHANNELS)
        up = tuple(estimate_up(Cameras.cat([view.camera for view in sample.contexts])).tolist())
        channels = min(CHANNELS, run.student.backbone.channels)
        self.shown = Shown(run.config.output.resolve().name, SceneHeader(self.carrier.settings.changed(), up), (), 0, channels, live=True)
        self.viewer = Viewer([self.shown], self.port, say=self.announce)
        self._put(run)
        self.viewer.start()
        self.announce(f"view: {self.viewer.url}")

    @torch.no_grad()
    def _tokens(self, run: loop.Run):
        run.student.eval()
        tokens = run.student.backbone(torch.stack([view.photo for view in self.sample.contexts])).float()
        run.student.train()
        return tokens

    def _put(self, run: loop.Run) -> None:
        from .distill.label import pixel_maps

        maps = pixel_maps(self.project(self._tokens(run)), self.sample.contexts, run.config.label)
        scene = self.carrier.carrying(maps, [view.camera for view in self.sample.contexts])
        scene = scene.replace(sh=scene.sh[:, :1].contiguous()).detach().to("cpu", torch.float32)
        self.viewer.hand_over(lambda: self.shown.put(State(scene, step=run.step)))
        self.shown_at = time.monotonic()

    def stepped(self, run: loop.Run) -> None:
        if time.monotonic() - self.shown_at > SECONDS:
            self._put(run)
            self.viewer.poke()

    def close(self) -> None:
        if self.viewer is not None:
            self.shown.done = True
            self.viewer.close()
