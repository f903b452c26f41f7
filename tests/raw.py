"""HTTP and WebSocket by hand, for what no well-behaved client sends."""
import contextlib
import json
import socket
import struct


class Raw:
    """A connection to a port of this machine."""

    ahead = 1 << 16      # bytes that are read at once, though fewer are asked for

    def __init__(self, port: int, timeout: float = 30):
        self.socket = socket.create_connection(("127.0.0.1", port), timeout)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.held = b""

    def close(self) -> None:
        self.socket.close()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.close()

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def received(self, most: int, flags: int = 0) -> bytes:
        data = self.socket.recv(most, flags)
        if not data:
            raise ConnectionResetError("the server closed")
        return data

    def take(self, n: int) -> bytes:
        pieces, length = [self.held], len(self.held)
        while length < n:
            pieces.append(self.received(max(self.ahead, n - length)))
            length += len(pieces[-1])
        held = b"".join(pieces)
        out, self.held = held[:n], held[n:]
        return out

    def request(self, method: str, path: str, headers: list[tuple[str, str]], body: bytes = b"") -> tuple[int, dict[str, str], bytes]:
        """Status, headers (lower case) and body."""
        lines = [f"{method} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in headers)]
        lines += [f"Content-Length: {len(body)}"] if body else []
        self.send("\r\n".join([*lines, "", ""]).encode("latin-1") + body)
        return self.answer()

    def answer(self) -> tuple[int, dict[str, str], bytes]:
        while b"\r\n\r\n" not in self.held:
            self.held += self.received(1 << 16)
        head, _, self.held = self.held.partition(b"\r\n\r\n")
        first, *lines = head.decode("latin-1").split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        return int(first.split()[1]), headers, self.take(int(headers.get("content-length", 0)))

    def upgrade(self, path: str, headers: list[tuple[str, str]]) -> int:
        """Status of a WebSocket handshake."""
        return self.request("GET", path, [*headers, ("Upgrade", "websocket"), ("Connection", "Upgrade"), ("Sec-WebSocket-Version", "13"), ("Sec-WebSocket-Key", "AAAAAAAAAAAAAAAAAAAAAA==")])[0]

    def frame(self, payload: bytes, opcode: int = 1, last: bool = True, length: int | None = None) -> None:
        """A masked frame; `length` is a lie about it."""
        n = len(payload) if length is None else length
        size = struct.pack(">B", 0x80 | n) if n < 126 else struct.pack(">BH", 0x80 | 126, n) if n < 1 << 16 else struct.pack(">BQ", 0x80 | 127, n)
        self.send(struct.pack(">B", (0x80 if last else 0) | opcode) + size + b"\0\0\0\0" + payload)

    def say(self, **message) -> None:
        self.frame(json.dumps(message).encode())

    def message(self) -> tuple[int, bytes]:
        """Opcode and payload of the next frame of the server that is no ping."""
        while True:
            opcode, n = self.header()
            payload = self.take(n)
            if opcode != 9:
                return opcode, payload

    def header(self) -> tuple[int, int]:
        """Opcode of the next frame of the server, and how many bytes of payload follow."""
        first, second = self.take(2)
        n = second & 127
        return first & 15, struct.unpack(">H", self.take(2))[0] if n == 126 else struct.unpack(">Q", self.take(8))[0] if n == 127 else n

    def drop(self, n: int) -> None:
        """As take, without looking: Linux throws the bytes away."""
        n -= len(self.take(min(n, len(self.held))))
        while n > 0:
            n -= len(self.received(min(n, 1 << 20), socket.MSG_TRUNC))


def joined(port: int, token: str, planes=("core",), scene: str = "0") -> Raw:
    """A socket that has said hello and watches."""
    raw = Raw(port)
    assert raw.upgrade("/api/socket", [("Host", f"127.0.0.1:{port}")]) == 101
    raw.say(type="hello", token=token)
    raw.say(type="watch", scene=scene, planes=list(planes))
    return raw


def ended(raw: Raw) -> str:
    """What a server that closes this socket says last, '' where it says nothing."""
    said = ""
    with contextlib.suppress(ConnectionError):
        while True:
            opcode, payload = raw.message()
            if opcode == 8:
                return said or payload[2:].decode()
            if opcode == 1 and json.loads(payload)["type"] == "error":
                said = json.loads(payload)["message"]
    return said
