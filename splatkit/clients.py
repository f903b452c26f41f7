"""The socket of a viewer's server: one client from its first message to its last, never given more than it takes."""
from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import Awaitable, Callable

from aiohttp import WSMsgType, web

from . import gate, wire
from .gate import Ack, BadMessage, Hello, Watch
from .shown import Gone, Shown, State

POLICY, TOO_MANY, GOING = 1008, 1013, 1001      # codes of a close frame (RFC 6455)
WANTED_SECONDS = 10.0       # how long a run hands over copies after the last sign of a client

Encode = Callable[[Shown, str, int], Awaitable[tuple[int, bytes | memoryview]]]


class Client:
    """What one browser watches and has. Sets of chunks go out one at a time, each once the one before is acknowledged, with what is newest then."""

    def __init__(self, socket: web.WebSocketResponse, scenes: dict[str, Shown], encode: Encode):
        self.socket, self.scenes, self.encode = socket, scenes, encode
        self.poked = asyncio.Event()
        self.key, self.planes = "", ()
        self.frame = self.acknowledged = 0
        self.have: dict[tuple[str, int], int] = {}      # version by plane and chunk
        self.revision, self.metrics_sent, self.done_sent = -1, 0, False

    @property
    def shown(self) -> Shown | None:
        return self.scenes.get(self.key)

    @property
    def idle(self) -> bool:
        """Whether it has all there is."""
        return self.shown is None or self.shown.state is None or (self.revision == self.shown.state.revision and not self._lacking() and self.frame == self.acknowledged)

    def take(self, message: Watch | Ack) -> None:
        """Raises BadMessage for a scene that is not there."""
        if isinstance(message, Ack):
            self.acknowledged = max(self.acknowledged, min(message.frame, self.frame))
        else:
            if message.scene not in self.scenes:
                raise BadMessage("there is no such scene")
            if message.scene != self.key:
                self.have, self.metrics_sent, self.done_sent = {}, 0, False
            self.key, self.planes, self.revision = message.scene, message.planes, -1
        self.poked.set()

    def want(self) -> None:
        """Keeps the run handing over copies, while it is acknowledged that they arrive."""
        if self.shown is not None:
            self.shown.wanted = time.monotonic() + WANTED_SECONDS
            if "sh" in self.planes and self.shown.sh_degree:
                self.shown.sh_wanted = self.shown.wanted

    async def send(self) -> None:
        """Sends whatever is new, until it is cancelled or the socket ends."""
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(WANTED_SECONDS / 2):     # copies may come seldomer than WANTED_SECONDS; that they are wanted must not lapse in between
                    await self.poked.wait()
            self.poked.clear()
            if (shown := self.shown) is None or shown.state is None:
                continue
            if self.frame == self.acknowledged:
                self.want()
            if len(shown.metrics["steps"]) > self.metrics_sent:
                tail = shown.metrics_from(self.metrics_sent)
                self.metrics_sent += len(tail["steps"])
                await self.socket.send_str(json.dumps({"type": "metrics", **tail}))
            if self.frame > self.acknowledged:
                continue
            if self.revision != (state := shown.state).revision:
                await self._send_manifest(shown, state)
            if lacking := self._lacking():
                self.frame, sent = self.frame + 1, False
                for plane, chunk in lacking:
                    with contextlib.suppress(Gone):     # the scene has become smaller meanwhile, or has no SH yet
                        sent |= await self._send_chunk(shown, plane, chunk)
                if sent:
                    self.poked.set()
                else:
                    self.acknowledged = self.frame      # there is nothing that a client could acknowledge
            elif shown.done and not self.done_sent:
                self.done_sent = True
                await self._send_manifest(shown, shown.state)       # it is live no more, and has the last losses
                await self.socket.send_str('{"type": "done"}')

    async def _send_manifest(self, shown: Shown, state: State) -> None:
        self.revision = state.revision
        await self.socket.send_str(f'{{"type": "manifest", {shown.manifest(self.key, state)[1:]}}}')

    async def _send_chunk(self, shown: Shown, plane: str, chunk: int) -> bool:
        """Sends a chunk that belongs to the manifest before it, whatever the run does meanwhile; False where another scene is watched by now."""
        state = None
        while state is None or state.versions[chunk:chunk + 1] != (version,):
            version, data = await self.encode(shown, plane, chunk)
            state = shown.state
        if self.shown is not shown:
            return False
        message = wire.message(plane, chunk, version, self.frame, state.revision, data)
        del data        # it may be part of all chunks, which a client that takes his time must not keep
        if self.revision != state.revision:
            await self._send_manifest(shown, state)
        self.have[plane, chunk] = version
        await self.socket.send_bytes(message)
        shown.count_sent()
        return True

    def _lacking(self) -> list[tuple[str, int]]:
        """What has changed of what it watches: of core the whole first. A chunk that does not fit into the queue is for a request."""
        shown, state = self.shown, self.shown.state
        fits = lambda plane, k: wire.size_of(plane, min(wire.CHUNK, state.count - k * wire.CHUNK), (shown.sh_degree + 1) ** 2, shown.channels) <= gate.QUEUED_MAX
        there = {"core": True, "sh": shown.sh_degree > 0 and state.complete, "features": state.scene is not None and state.scene.features is not None}
        return [(plane, k) for plane in gate.PLANES if plane in self.planes and there[plane]
                for k, version in enumerate(state.versions) if self.have.get((plane, k)) != version and fits(plane, k)]


async def attend(request: web.BaseRequest, door: gate.Gate, scenes: dict[str, Shown], clients: set[Client], encode: Encode) -> web.StreamResponse:
    """Speaks with one socket until it ends. Its first message must be a Hello with the token, within HEADER_SECONDS."""
    socket = web.WebSocketResponse(max_msg_size=gate.MESSAGE_MAX, compress=False, heartbeat=30, timeout=2, writer_limit=1 << 16)
    if not socket.can_prepare(request):
        return gate.reply(426, "expected a WebSocket", headers={"Upgrade": "websocket"})
    socket.headers.update(gate.HEADERS)
    await socket.prepare(request)
    client, sender = Client(socket, scenes, encode), None
    try:
        try:
            async with asyncio.timeout(gate.HEADER_SECONDS):
                first = _read(await socket.receive())
        except TimeoutError:
            first = None
        if not isinstance(first, Hello) or not door.knows(first.token):
            await _end(socket, POLICY, "the token is missing or wrong; open the address that was printed")
            return socket
        if len(clients) >= gate.CLIENTS_MAX:
            await _end(socket, TOO_MANY, f"{gate.CLIENTS_MAX} pages are open already; close one")
            return socket
        clients.add(client)
        sender = asyncio.create_task(_quietly(client.send()))
        paid = time.monotonic()     # until when its messages have used up their time
        while (message := _read(await socket.receive())) is not None:
            if isinstance(message, Hello):
                raise BadMessage("hello comes once")
            client.take(message)
            now = time.monotonic()
            paid = max(paid, now - gate.BURST / gate.MESSAGES_PER_SECOND) + 1 / gate.MESSAGES_PER_SECOND
            await asyncio.sleep(max(0, paid - now))
    except BadMessage as why:
        await _end(socket, POLICY, str(why))
    except ConnectionError:
        pass
    finally:
        clients.discard(client)
        if sender:
            sender.cancel()
    return socket


def _read(message) -> Hello | Watch | Ack | None:
    """None at the end of a socket. Raises BadMessage."""
    if message.type == WSMsgType.TEXT:
        return gate.read_message(message.data)
    if message.type == WSMsgType.BINARY:
        raise BadMessage("a message is text")
    return None


async def _end(socket: web.WebSocketResponse, code: int, why: str) -> None:
    """Says why, for the page to show, and closes."""
    with contextlib.suppress(ConnectionError):
        async with asyncio.timeout(5):
            await socket.send_str(json.dumps({"type": "error", "message": why}))
            await socket.close(code=code, message=why.encode()[:120])


async def _quietly(sending: Awaitable[None]) -> None:
    """A client that is gone is no news; the reader ends with it."""
    with contextlib.suppress(ConnectionError):
        await sending
