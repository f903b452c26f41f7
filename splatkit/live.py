"""The side of a run that a browser looks at: copies of its scene, taken between steps."""
from __future__ import annotations

import math
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Int32
from torch import Tensor

from . import native, wire
from .scene import Edit, Scene
from .shown import Shown, State

SHARE = 0.015               # of a run's time that its copies may cost


class Live:
    """The side of a run: takes copies of its scene between steps, never waits. The latest copy wins; without anybody who looks there is none.

    `hand_over(install)` gives work to the server's worker. On the CPU a copy is the core planes, encoded from where the scene lies, unless somebody looks at more: at SH bands
    above 0, as pages do where the run has them, at heat, at a film. It is taken at most `rate` times a second, and so seldom that copies cost SHARE of the time: the run waits
    while one is taken, and a run on the CPU does without what the server spends on it, as if all cores were busy.
    """

    def __init__(self, shown: Shown, hand_over: Callable[[Callable[[], None]], None], rate: float = 2.0):
        self.shown, self.hand_over, self.rate = shown, hand_over, rate
        self.born, self.taken, self.taken_at, self.seconds, self.spent, self.cores = None, 0, -math.inf, 0.0, 0.0, os.cpu_count() or 1
        self.losses: dict[int, Tensor] = {}
        self._rooms: deque[Tensor] = deque()                # for core planes, that nobody reads any more
        self._free: deque[dict[str, Tensor]] = deque()
        self._held: dict[str, Tensor] | None = None         # the buffers of the state that is shown
        self._on_the_way = threading.Event()

    def follow(self, edit: Edit | None, n: int, step: int, device: torch.device | str) -> None:
        """Keeps the step at which each row was made or moved."""
        if self.born is None:
            self.born = torch.full((n,), step, dtype=torch.int32, device=device)
        elif edit is not None:
            self.born = torch.where(edit.fresh, torch.full_like(self.born[:1], step), self.born[edit.source])

    def due(self) -> bool:
        now, cost = time.monotonic(), self.seconds + (self.shown.spent + self.shown.sent - self.spent) / self.cores
        return now >= self.taken_at + max(1 / self.rate, cost / SHARE) and now < max(self.shown.wanted, self.shown.sh_wanted) and not self._on_the_way.is_set()

    def take(self, scene: Scene, step: int, heat: dict[str, Tensor | Callable[[], Tensor]] | None = None, complete: bool = False) -> None:
        """Copies the scene for the server, with the SH bands above 0 only while somebody looks at them or where it is to be `complete`.

        `heat` is copied with a scene, not with core planes: what takes time to make may be a function.
        """
        start, scene, heat = time.perf_counter(), scene.detach(), heat or {}
        sh_wanted = complete or time.monotonic() < self.shown.sh_wanted
        asked = self.shown.scene_wanted > max(self.taken_at, 0.0)       # since the last copy, however long ago that was
        whole = sh_wanted or asked or scene.means.is_cuda or scene.features is not None or native.library_for(scene.means) is None
        complete = whole and (sh_wanted or scene.sh.shape[1] == 1)
        self._on_the_way.set()
        buffers, ready, core, copies = None, None, None, {}
        if whole:
            fields = {**(scene if complete else scene.replace(sh=scene.sh[:, :1])).fields(), **{f"heat.{name}": x if isinstance(x, Tensor) else x() for name, x in heat.items()}}
            if scene.means.is_cuda:     # a copy on the card takes the run no time, and the way to the CPU is the worker's
                copies, ready = {name: x.detach().clone() for name, x in fields.items()}, torch.cuda.Event()
                ready.record()
            else:
                buffers, copies = self._copied(fields)
        else:
            core = wire.cores(scene, self._room)
        self.shown.heat_names = tuple(heat)
        losses = self.losses.copy()
        self.hand_over(lambda: self._install(copies, buffers, core, complete, step, losses, ready))
        self.taken, self.taken_at, self.seconds = self.taken + 1, time.monotonic(), time.perf_counter() - start
        self.spent, self.cores = self.shown.spent + self.shown.sent, math.inf if scene.means.is_cuda else self.cores

    def _room(self, words: int) -> Int32[np.ndarray, " room"]:
        """Memory for core planes, used before where there is such; it comes back when nobody refers to the array any more."""
        buffer = self._rooms.popleft() if self._rooms else torch.empty(0, dtype=torch.int32)
        if len(buffer) < words:
            buffer = torch.empty(words * 5 // 4, dtype=torch.int32)
        room = buffer.numpy()
        weakref.finalize(room, self._rooms.append, buffer).atexit = False
        return room

    def _copied(self, fields: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Buffers, used before where there are such, since fresh memory costs as much as the copy; and the copies that lie in them."""
        buffers = self._free.popleft() if self._free else {}
        for name, x in fields.items():
            if name not in buffers or len(buffers[name]) < len(x) or buffers[name].shape[1:] != x.shape[1:] or buffers[name].dtype != x.dtype:
                buffers[name] = torch.empty((len(x) * 5 // 4, *x.shape[1:]), dtype=x.dtype)
            buffers[name][:len(x)].copy_(x)
        return buffers, {name: buffers[name][:len(x)] for name, x in fields.items()}

    def _install(self, copies: dict[str, Tensor], buffers: dict[str, Tensor] | None, core: wire.Cores | None, complete: bool, step: int, losses: dict[int, Tensor], ready) -> None:
        """In the worker."""
        try:
            if ready is not None:
                ready.synchronize()
                with torch.cuda.stream(torch.cuda.Stream()):
                    copies = {name: x.cpu() for name, x in copies.items()}
                    losses = dict(zip(losses, torch.stack(list(losses.values())).tolist())) if losses else {}
            heat = {name.removeprefix("heat."): copies.pop(name).float() for name in list(copies) if name.startswith("heat.")}
            self.shown.losses = {i: float(x) for i, x in losses.items()}
            self.shown.put(State(None if core is not None else Scene(**copies).to(dtype=torch.float32), complete, step, heat=heat, core=core))
            if self._held is not None:      # nobody reads the state before any more: all readers are in this worker
                self._free.append(self._held)
            self._held = buffers
        finally:
            self._on_the_way.clear()
