"""Who may speak to a viewer's server, how much, and in what words: the gate of every request, the limits of connections, the closed schema of messages."""
from __future__ import annotations

import hmac
import json
import math
import re
import secrets
from collections.abc import Callable
from dataclasses import dataclass

from aiohttp import web

SOCKETS_MAX = 64            # connections at once: a page that opens more must not keep the trainer from opening files
CLIENTS_MAX = 16            # of those, sockets that have shown the token
HEADER_SECONDS = 10         # for a request's header, and for the first message of a socket
MESSAGE_MAX = 64 * 1024     # bytes of a message, or of a request's body
QUEUED_MAX = 8 << 20        # bytes that wait for one client
MESSAGES_PER_SECOND = 100   # of one client; more wait,
BURST = 200                 # once these are used up
LOCAL = ("127.0.0.1", "localhost", "[::1]")
PLANES = ("core", "sh", "features")     # that can be watched; float32 would not fit into QUEUED_MAX and is fetched
SIDE_MAX = 8192             # pixels of a frame

HEADERS = {
    "Content-Security-Policy": "default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
    "Server": "splatkit",
}


class BadMessage(Exception):
    """A message that is not one of the schema, in a line."""


class Gate:
    """Which requests are answered at all: Host and Origin from a fixed list with the exact port, a token where there is something to see.

    Origin equal to Host proves nothing when a foreign name was made to point here (DNS rebinding), hence the list. `names` are further host names
    under which the server may be reached.
    """

    def __init__(self, names: tuple[str, ...] = ()):
        for name in names:
            if not re.fullmatch(r"[A-Za-z0-9]([A-Za-z0-9.-]{0,251}[A-Za-z0-9])?|\[[0-9A-Fa-f:.]{2,45}\]", name):
                raise ValueError(f"host {name!r}; expected a name or an address as it stands in the browser's address line, without port, like box.example or [fd00::1]")
        self.names = (*LOCAL, *(name.lower() for name in names))
        self.token = secrets.token_urlsafe(16)      # 128 bits
        self.hosts: frozenset[str] = frozenset()    # none before the port is known

    def open_on(self, port: int) -> None:
        self.hosts = frozenset(f"{name}:{port}" for name in self.names) | frozenset(self.names if port == 80 else ())

    def knows(self, token: str) -> bool:
        """Whether it is the token, in a time that does not depend on how much of it is right."""
        return hmac.compare_digest(token.encode("utf-8", "surrogatepass"), self.token.encode())

    def refusal(self, request: web.BaseRequest, open_to_all: bool) -> tuple[int, str] | None:
        """None for a request that may pass, else status and reason. `open_to_all`: the page, which holds no secret, and the socket, whose first message has the token."""
        hosts, origins, credentials = (request.headers.getall(name, []) for name in ("Host", "Origin", "Authorization"))
        if not request.raw_path.startswith("/"):
            return 400, "expected a path, not a whole address"
        if len(hosts) != 1 or hosts[0].lower() not in self.hosts:
            return 403, "this host name is not served here; --host NAME allows another one"
        if origins and (len(origins) != 1 or origins[0].lower() not in {f"http://{host}" for host in self.hosts}):
            return 403, "requests of other origins are not answered"
        if not open_to_all and not (len(credentials) == 1 and credentials[0].startswith("Bearer ") and self.knows(credentials[0].removeprefix("Bearer "))):
            return 401, "the token is missing or wrong; open the address that was printed"
        return None


class Door(web.RequestHandler):
    """A connection. What is no HTTP gets one line and nothing is logged: neither noise nor a token."""

    __slots__ = ()

    def connection_made(self, transport):
        if len(self._manager.connections) >= SOCKETS_MAX:
            transport.abort()
        else:
            super().connection_made(transport)

    def handle_error(self, request, status=500, exc=None, message=None):
        if request.writer.output_size > 0:
            raise ConnectionError("the answer has begun")
        answer = reply(status, "the request could not be read" if status < 500 else "internal error")
        answer.force_close()
        return answer

    def log_exception(self, *args, **kw):
        pass


class Server(web.Server):
    """Connections up to SOCKETS_MAX; one that has not sent a whole header after HEADER_SECONDS is closed."""

    def __init__(self, handler):
        super().__init__(handler, keepalive_timeout=HEADER_SECONDS, lingering_time=0, access_log=None, max_headers=64)

    def __call__(self) -> Door:
        return Door(self, loop=self._loop, **self._kwargs)


def reply(status: int, text: str, kind: str = "text/plain", headers: dict[str, str] | None = None) -> web.Response:
    """An answer with the headers that all have."""
    return web.Response(status=status, text=text, content_type=kind, headers={**HEADERS, **(headers or {})})


# ---- messages


@dataclass(frozen=True)
class Hello:
    token: str


@dataclass(frozen=True)
class Watch:
    """Send these planes of this scene, now and when they change."""

    scene: str
    planes: tuple[str, ...]


@dataclass(frozen=True)
class Ack:
    """The client has shown this set of chunks and can take the next."""

    frame: int


@dataclass(frozen=True)
class Frame:
    """Draw the scene from this camera."""

    world_to_cam: tuple[float, ...]
    K: tuple[float, ...]
    width: int
    height: int
    background: tuple[float, ...] = (0.0, 0.0, 0.0)


def _text(limit: int) -> Callable:
    return lambda x: isinstance(x, str) and len(x) <= limit


def _whole(most: int) -> Callable:
    return lambda x: type(x) is int and 0 <= x <= most


def _numbers(count: int) -> Callable:
    return lambda x: isinstance(x, list) and len(x) == count and all(type(v) in (int, float) and abs(v) < 1e30 for v in x)


def _planes(x) -> bool:
    return isinstance(x, list) and len(x) <= len(PLANES) and all(isinstance(p, str) and p in PLANES for p in x)


def _pose(x) -> bool:
    """A rigid motion, to the rounding of float32."""
    if not _numbers(16)(x) or x[12:] != [0, 0, 0, 1]:
        return False
    rows = [x[0:3], x[4:7], x[8:11]]
    return all(abs(sum(a * b for a, b in zip(rows[i], rows[j])) - (i == j)) < 1e-3 for i in range(3) for j in range(3))


def _pinhole(x) -> bool:
    return _numbers(9)(x) and x[0] > 0 and x[4] > 0 and x[1] == x[3] == x[6] == x[7] == 0 and x[8] == 1


MESSAGES = {
    "hello": (Hello, {"token": _text(200)}),
    "watch": (Watch, {"scene": _text(20), "planes": _planes}),
    "ack": (Ack, {"frame": _whole(2**32 - 1)}),
}
FRAME = {"world_to_cam": _pose, "K": _pinhole, "width": _whole(SIDE_MAX), "height": _whole(SIDE_MAX), "background": _numbers(3)}


def read_message(text: str) -> Hello | Watch | Ack:
    """The message. Raises BadMessage for whatever is not exactly one of the three: another type, a missing, wrong, repeated or further entry."""
    entries = _object(text)
    kind = entries.pop("type", None)
    if not isinstance(kind, str) or kind not in MESSAGES:
        raise BadMessage(f"a message's type is one of {', '.join(MESSAGES)}")
    cls, schema = MESSAGES[kind]
    return cls(**_checked(kind, entries, schema))


def read_frame(text: str) -> Frame:
    """The camera of a picture that is asked for. Raises BadMessage likewise."""
    frame = Frame(**_checked("a frame", {"background": [0, 0, 0], **_object(text)}, FRAME))
    if frame.width * frame.height == 0 or frame.width * frame.height > 4096 * 4096:
        raise BadMessage("a frame has from 1 to 16 million pixels")
    return frame


def _object(text: str) -> dict:
    def once(pairs):
        if len(dict(pairs)) != len(pairs):
            raise BadMessage("a message has each entry once")
        return dict(pairs)
    try:
        found = json.loads(text, object_pairs_hook=once)
    except (ValueError, RecursionError) as why:
        raise BadMessage("a message is JSON") from why
    if not isinstance(found, dict):
        raise BadMessage("a message is a JSON object")
    return found


def _checked(kind: str, entries: dict, schema: dict[str, Callable]) -> dict:
    if entries.keys() != schema.keys():
        raise BadMessage(f"{kind} has the entries {', '.join(schema)}")
    for name, fits in schema.items():
        if not fits(entries[name]):
            raise BadMessage(f"{kind}: {name} is not what it should be")
    return {name: tuple(x) if isinstance(x, list) else x for name, x in entries.items()}


def finite(x: float | None) -> float | None:
    """What JSON can hold."""
    return x if x is not None and math.isfinite(x) else None
