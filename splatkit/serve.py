"""The server of `splatkit view`: scenes to browsers from a thread of its own, beside a run that it never holds up."""
from __future__ import annotations

import asyncio
import contextlib
import io
import json
import os
import re
import socket
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import torch
from aiohttp import web

from . import clients, gate, page
from .camera import Cameras
from .errors import BadFile
from .film import color_picture
from .io.reading import Report, silent
from .raster import render
from .shown import PHOTO_SIDE_MAX, Cache, Gone, Shown

SLICE = 256 * 1024      # bytes of a body that are written at once
PATIENCE = 60           # seconds that a reader may take for a body
BACKLOG = 512           # connections that wait to be taken: with fewer a burst makes others wait for seconds
ROUTES = [              # method, path, its name; the page and the socket are open to requests without a token
    ("GET", re.compile(r"/"), "page"),
    ("GET", re.compile(r"/api/socket"), "socket"),
    ("GET", re.compile(r"/api/scenes"), "scenes"),
    ("GET", re.compile(r"/api/scene/(?P<key>\d{1,6})"), "scene"),
    ("GET", re.compile(r"/api/scene/(?P<key>\d{1,6})/chunk/(?P<chunk>\d{1,6})/(?P<plane>core|sh|features|float32|heat)"), "chunk"),
    ("GET", re.compile(r"/api/scene/(?P<key>\d{1,6})/photo/(?P<photo>\d{1,6})"), "photo"),
    ("GET", re.compile(r"/api/scene/(?P<key>\d{1,6})/metrics"), "metrics"),
    ("POST", re.compile(r"/api/scene/(?P<key>\d{1,6})/frame"), "frame"),
]
OPEN = ("page", "socket")


class Viewer:
    """Serves scenes on this machine, at `url`, from `start` to `close`.

    `port` 0 is any free one. `hosts` are further names under which browsers may reach it; with one, other machines can connect, by plain HTTP.
    `say` gets a line for what goes wrong inside.
    """

    def __init__(self, scenes: list[Shown], port: int = 0, hosts: tuple[str, ...] = (), say: Report = silent):
        self.scenes = {str(i): shown for i, shown in enumerate(scenes)}
        self.gate, self.port, self.say, self.everywhere = gate.Gate(hosts), port, say, bool(hosts)
        self.clients: set[clients.Client] = set()
        self.worker = ThreadPoolExecutor(1, "splatkit-encode", initializer=_step_back)
        self.cache = Cache()
        self.loop: asyncio.AbstractEventLoop | None = None
        self.thread = threading.Thread(target=self._run, name="splatkit-view", daemon=True)
        self._sockets: list[socket.socket] = []
        self._up = threading.Event()
        self._text = page.page()
        self._policy = ""

    @property
    def url(self) -> str:
        """With the token behind the #, which browsers do not send: print it, and nothing else."""
        return f"http://{self.gate.names[3] if self.everywhere else '127.0.0.1'}:{self.port}/#token={self.gate.token}"

    def start(self) -> Viewer:
        """Raises OSError where the port is taken."""
        self._sockets = _listening(self.port, self.everywhere)
        self.port = self._sockets[0].getsockname()[1]
        self.gate.open_on(self.port)
        own = " ".join(f"ws://{host}" for host in sorted(self.gate.hosts) if not host.startswith("["))      # 'self' is not yet a socket's everywhere; [::1] is no source there
        self._policy = page.policy(self._text, f"'self' {own}") + "; frame-ancestors 'none'"
        self.loop = asyncio.new_event_loop()
        self.thread.start()
        self._up.wait()
        return self

    def hand_over(self, work) -> None:
        """Has the worker do it, then tells the clients. Never waits, from any thread."""
        with contextlib.suppress(RuntimeError):     # closed meanwhile
            self.worker.submit(self._do, work)

    def poke(self) -> None:
        """Has every client look for what is new. From any thread."""
        with contextlib.suppress(RuntimeError, AttributeError):     # not begun, or closed
            self.loop.call_soon_threadsafe(lambda: [client.poked.set() for client in self.clients])

    def close(self, seconds: float = 5.0) -> None:
        """Ends when each client has all there is, at the latest after `seconds`."""
        if self.thread.is_alive():
            with contextlib.suppress(TimeoutError):
                asyncio.run_coroutine_threadsafe(self._close(seconds), self.loop).result(seconds + 10)
            self.loop.call_soon_threadsafe(self.loop.stop)
            self.thread.join(10)
        self.worker.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> Viewer:
        return self.start()

    def __exit__(self, *error) -> None:
        self.close(0 if error[0] else 5.0)

    # ---- in the thread

    def _run(self) -> None:
        asyncio.set_event_loop(self.loop)
        self.loop.set_exception_handler(lambda loop, context: self.say(f"view: {context.get('exception') or context['message']}"))
        self.loop.run_until_complete(self._listen())
        self._up.set()
        try:
            self.loop.run_forever()
        finally:
            self.loop.run_until_complete(self.loop.shutdown_asyncgens())
            self.loop.close()

    async def _listen(self) -> None:
        self.server = gate.Server(self._answer)
        self._listeners = [await self.loop.create_server(self.server, sock=s, backlog=BACKLOG) for s in self._sockets]

    async def _close(self, seconds: float) -> None:
        for listener in self._listeners:
            listener.close()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._in_worker(self.poke)        # behind the last copy of a run
                while not all(client.idle and (client.done_sent or not (client.shown and client.shown.done)) for client in self.clients):
                    await asyncio.sleep(0.02)
        for client in list(self.clients):
            with contextlib.suppress(Exception):
                async with asyncio.timeout(2):
                    await client.socket.close(code=clients.GOING, message=b"the server has ended")
        await self.server.shutdown(0.1)     # connections that only wait for another request would keep it for as long as it may take

    def _do(self, work) -> None:
        try:
            work()
        except Exception as why:
            self.say(f"view: {type(why).__name__}: {why}")
        self.poke()

    def _in_worker(self, work, *arguments):
        return self.loop.run_in_executor(self.worker, work, *arguments)

    async def _encode(self, shown: Shown, plane: str, chunk: int) -> tuple[int, bytes | memoryview]:
        return await self._in_worker(shown.chunk, self.cache, plane, chunk)

    async def _answer(self, request: web.BaseRequest) -> web.StreamResponse:
        """The one door of all requests."""
        path = request.raw_path.partition("?")[0]
        found = next(((method, match, name) for method, pattern, name in ROUTES if (match := pattern.fullmatch(path))), None)
        try:
            if refusal := self.gate.refusal(request, open_to_all=found is not None and found[2] in OPEN):
                return gate.reply(*refusal)
            if found is None:
                raise Gone(404, "there is nothing here")
            method, match, name = found
            if request.method != method:
                return gate.reply(405, f"expected {method}", headers={"Allow": method})
            return await getattr(self, f"_{name}")(request, **match.groupdict())
        except Gone as why:
            return gate.reply(why.status, str(why))
        except ConnectionError:
            raise
        except Exception as why:
            self.say(f"view: {name}: {type(why).__name__}: {why}")
            return gate.reply(500, "internal error; the terminal says more")

    def _shown(self, key: str) -> Shown:
        if key not in self.scenes:
            raise Gone(404, "there is no such scene")
        return self.scenes[key]

    async def _page(self, request):
        return gate.reply(200, self._text, "text/html", {"Content-Security-Policy": self._policy})

    async def _socket(self, request):
        return await clients.attend(request, self.gate, self.scenes, self.clients, self._encode)

    async def _scenes(self, request):
        return _json({"scenes": [{"id": key, "name": shown.name, "live": shown.live and not shown.done} for key, shown in self.scenes.items()]})

    async def _scene(self, request, key):
        return gate.reply(200, self._shown(key).manifest(key) + "}", "application/json")

    async def _metrics(self, request, key):
        return _json(self._shown(key).metrics_from(0))

    async def _chunk(self, request, key, chunk, plane):
        version = request.query.get("version")
        if version is not None and not re.fullmatch(r"\d{1,15}", version):
            return gate.reply(400, "version: expected a whole number")
        shown = self._shown(key)
        if plane == "heat":
            name = request.query.get("name", "")
            if name in shown.heats:
                await self._handed_over(shown, sh=False)
            try:
                now, data = await self._in_worker(shown.heat, int(chunk), name)
            except BadFile as why:
                self.say(f"view: {why}")
                raise Gone(404, "a photo cannot be read; the terminal says more") from why
            return await _body(request, data, "application/octet-stream", {"X-Version": str(now)})
        if plane in ("sh", "float32"):
            await self._handed_over(shown)
        now, data = await self._in_worker(shown.chunk, self.cache, plane, int(chunk), None if version is None else int(version))
        return await _body(request, bytes(data), "application/octet-stream", {"X-Version": str(now)})      # a reader may take his time, and would keep all chunks

    async def _handed_over(self, shown: Shown, sh: bool = True) -> None:
        """Waits for a copy of the scene, up to WANTED_SECONDS: a run on the CPU hands over more than core planes, and any run `sh`, only while somebody wants them."""
        until = shown.scene_wanted = shown.wanted = time.monotonic() + clients.WANTED_SECONDS
        if sh:
            shown.sh_wanted = until
        while (state := shown.state) and not (state.complete if sh else state.scene is not None) and not shown.done and time.monotonic() < until:
            await asyncio.sleep(0.1)

    async def _photo(self, request, key, photo):
        shown, number = self._shown(key), int(photo)
        if number >= len(shown.views) or shown.views[number].photo is None:
            raise Gone(404, "there is no such photo")
        try:
            data = await self._in_worker(self.cache.get, (shown, "photo", number), 0, lambda: _jpeg(shown.views[number]))
        except BadFile as why:
            self.say(f"view: {why}")
            raise Gone(404, "the photo cannot be read; the terminal says more") from why
        return await _body(request, data, "image/jpeg")

    async def _frame(self, request, key):
        shown = self._shown(key)
        if (request.content_length or 0) > gate.MESSAGE_MAX:
            return gate.reply(413, f"expected at most {gate.MESSAGE_MAX} bytes")
        try:
            async with asyncio.timeout(gate.HEADER_SECONDS):
                text = (await request.content.readexactly(request.content_length or 0)).decode()
            wanted = gate.read_frame(text)
        except (gate.BadMessage, UnicodeDecodeError, asyncio.IncompleteReadError) as why:
            return gate.reply(400, str(why) if isinstance(why, gate.BadMessage) else "expected a JSON object with its Content-Length")
        except TimeoutError:
            return gate.reply(408, "the camera did not come in time")
        await self._handed_over(shown)
        return await _body(request, await self._in_worker(_drawn, shown, wanted), "image/png")


async def _body(request: web.BaseRequest, data: bytes, kind: str, headers: dict[str, str] | None = None) -> web.StreamResponse:
    """The bytes, or the range of them that was asked for, in slices: a reader who takes his time fills no memory, and one who takes too long is left."""
    try:
        wanted = request.http_range
    except ValueError:
        return gate.reply(416, "the range is none", headers={"Content-Range": f"bytes */{len(data)}"})
    first, last, _ = wanted.indices(len(data))
    partial = wanted.start is not None or wanted.stop is not None
    if partial and first >= last:
        return gate.reply(416, "nothing lies in the range", headers={"Content-Range": f"bytes */{len(data)}"})
    answer = web.StreamResponse(status=206 if partial else 200, headers={**gate.HEADERS, **(headers or {}), "Content-Type": kind, "Accept-Ranges": "bytes"})
    if partial:
        answer.headers["Content-Range"] = f"bytes {first}-{last - 1}/{len(data)}"
    answer.content_length = last - first
    await answer.prepare(request)
    try:
        async with asyncio.timeout(PATIENCE):
            for at in range(first, last, SLICE):
                await answer.write(data[at:min(at + SLICE, last)])
            await answer.write_eof()
    except TimeoutError:
        if request.transport is not None:
            request.transport.abort()
        raise ConnectionResetError("a reader that does not read") from None
    return answer


def _json(value) -> web.Response:
    return gate.reply(200, json.dumps(value, allow_nan=False), "application/json")


def _jpeg(view) -> bytes:
    from PIL import Image
    out = io.BytesIO()
    Image.fromarray(color_picture(view.looked_at(PHOTO_SIDE_MAX)[1])).save(out, "JPEG", quality=90)
    return out.getvalue()


def _drawn(shown: Shown, frame: gate.Frame) -> bytes:
    """PNG of the scene from a camera, by the rasterizer that runs draw with."""
    from PIL import Image
    camera = Cameras(torch.tensor(frame.world_to_cam, dtype=torch.float32).view(1, 4, 4), torch.tensor(frame.K, dtype=torch.float32).view(1, 3, 3), frame.width, frame.height)
    if (scene := shown.present.scene) is None:
        raise Gone(503, "the run has not handed over its scene yet; ask again")
    with torch.no_grad():
        color = render(scene.replace(features=None), camera, background=torch.tensor(frame.background, dtype=torch.float32), settings=shown.settings).color[0]
    out = io.BytesIO()
    Image.fromarray(color_picture(color)).save(out, "PNG", compress_level=1)
    return out.getvalue()


def _listening(port: int, everywhere: bool) -> list[socket.socket]:
    """Sockets of one port on 127.0.0.1 and, where there is IPv6, on ::1; with `everywhere` on all addresses. Raises OSError where IPv4's is taken."""
    out = [socket.create_server(("" if everywhere else "127.0.0.1", port), backlog=BACKLOG)]
    with contextlib.suppress(OSError):
        out.append(socket.create_server(("::" if everywhere else "::1", out[0].getsockname()[1]), family=socket.AF_INET6, backlog=BACKLOG))
    return out


def _step_back() -> None:
    """On Linux a thread has a priority of its own: the worker takes what the run leaves."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
