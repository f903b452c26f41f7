"""What a client of a viewer's server does: asks, and takes what a page would take."""
import json
import time

import torch
import unwire
from raw import Raw, joined

from splatkit import Scene, wire


def scene_of(n: int, sh_degree: int = 1, channels: int | None = None, seed: int = 0) -> Scene:
    g = torch.Generator().manual_seed(seed)
    r = lambda *shape: torch.randn(*shape, generator=g)
    return Scene(r(n, 3), r(n, 4), r(n, 3) * 0.5 - 3, r(n), r(n, (sh_degree + 1) ** 2, 3) * 0.3, None if channels is None else r(n, channels))


def get(viewer, path: str, *headers: tuple[str, str], body: bytes = b"") -> tuple[int, dict[str, str], bytes]:
    with Raw(viewer.port) as raw:
        return raw.request("POST" if body else "GET", path, [("Host", f"127.0.0.1:{viewer.port}"), ("Authorization", f"Bearer {viewer.gate.token}"), *headers], body)


def wait_for(condition, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


class Page:
    """What a browser does: takes manifests and chunks, and acknowledges."""

    def __init__(self, viewer, planes=("core", "sh"), scene="0"):
        self.raw, self.manifests, self.chunks, self.metrics, self.done, self.frames = joined(viewer.port, viewer.gate.token, planes, scene), [], {}, [], False, []
        self.planes = planes

    def take(self, acknowledge: bool = True) -> str:
        opcode, payload = self.raw.message()
        if opcode == 2:
            meta, data = unwire.message(payload)
            self.chunks[wire.PLANES[meta["plane"]], meta["chunk"]] = (meta, data)
            self.frames.append(meta)
            count = self.manifests[-1]["chunks"][meta["chunk"]]["count"]
            assert meta["revision"] == self.manifests[-1]["revision"] and unwire.header(data, data[:4], 1) == [count]
            if acknowledge:
                self.raw.say(type="ack", frame=meta["frame"])
            return "chunk"
        if opcode == 8:
            raise ConnectionResetError
        message = json.loads(payload)
        kind = message.pop("type")
        if kind == "manifest":
            self.manifests.append(message)
        elif kind == "metrics":
            self.metrics.append(message)
        else:
            assert kind == "done", message
            self.done = True
        return kind

    def whole(self) -> bool:
        """Whether it has every chunk of the last manifest in the version that it says."""
        m = self.manifests[-1] if self.manifests else None
        return m is not None and all((plane, k) in self.chunks and self.chunks[plane, k][0]["version"] == chunk["version"]
                                     for k, chunk in enumerate(m["chunks"]) for plane in self.planes if plane != "sh" or m["sh_degree"])

    def take_all(self) -> None:
        while not self.whole():
            self.take()
