"""Who a viewer's server answers, what it says to everybody else, and what becomes of it under hostile clients: nothing."""
import base64
import gc
import itertools
import json
import os
import random
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from mutants import mutants
from raw import Raw, ended, joined
from served import wait_for

from splatkit import Scene, gate
from splatkit.capture import Photo, SceneHeader
from splatkit.gate import BadMessage
from splatkit.serve import Viewer
from splatkit.shown import Shown, View

POSE = [1.0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1, 4, 0, 0, 0, 1]
K = [20.0, 0, 8, 0, 20, 6, 0, 0, 1]
FRAME = {"world_to_cam": POSE, "K": K, "width": 16, "height": 12}


def small(n: int = 10, name: str = "small", views=()) -> Shown:
    g = torch.Generator().manual_seed(0)
    r = lambda *shape: torch.randn(*shape, generator=g)
    return Shown.of(Scene(r(n, 3), r(n, 4), r(n, 3) - 3, r(n), r(n, 4, 3) * 0.3), name, SceneHeader(), views)


@pytest.fixture(scope="module")
def viewer(tmp_path_factory):
    from PIL import Image
    file = tmp_path_factory.mktemp("photos") / "a.png"
    Image.new("RGB", (16, 12), (10, 200, 30)).save(file)
    photo = Photo("a.png", file, torch.tensor(K).view(3, 3).numpy(), 16, 12, torch.tensor(POSE).view(4, 4).numpy())
    said = []
    with Viewer([small(views=(View.of(photo, 16, 12),))], hosts=("box.example",), say=said.append) as viewer:
        yield viewer
    assert said == []       # nothing went wrong inside, in any of these tests


def own(viewer) -> list[tuple[str, str]]:
    return [("Host", f"127.0.0.1:{viewer.port}")]


def with_token(viewer) -> list[tuple[str, str]]:
    return [*own(viewer), ("Authorization", f"Bearer {viewer.gate.token}")]


# ---- the gate


ROUTES = ["/", "/api/scenes", "/api/scene/0", "/api/scene/0/chunk/0/core", "/api/scene/0/photo/0", "/api/scene/0/metrics", "/api/scene/0/frame", "/api/socket"]


def reached(viewer, raw, host, origin, token, route) -> bool:
    """Whether a request gets what the route is for."""
    headers = [("Host", host)] if host is not None else []
    headers += [("Origin", origin)] if origin is not None else []
    secret, hello = viewer.gate.token, {"right": viewer.gate.token, "wrong": "x" * 22}.get(token)
    if token in ("right", "wrong") and route != "/api/socket":
        headers.append(("Authorization", f"Bearer {hello}"))
    if token == "basic":
        headers.append(("Authorization", f"Basic {secret}"))
    if token == "elsewhere":        # where a token must never work
        headers.append(("Cookie", f"token={secret}"))
        route += f"?token={secret}"
    if route.startswith("/api/socket"):
        with Raw(viewer.port) as raw:
            if raw.upgrade(route, headers) != 101:
                return False
            raw.say(**{"type": "hello", "token": hello} if hello else {"type": "watch", "scene": "0", "planes": []})
            if hello:
                raw.say(type="watch", scene="0", planes=[])
            opcode, payload = raw.message()
            return opcode == 1 and json.loads(payload)["type"] == "manifest"
    body = json.dumps(FRAME).encode() if route.startswith("/api/scene/0/frame") else b""
    try:
        status, _, content = raw[0].request("POST" if body else "GET", route, headers, body)
    except ConnectionError:
        status = 0
    if status in (0, 400):      # the server closes what it could not read
        raw[0].close()
        raw[0] = Raw(viewer.port)
    return status == 200 and len(content) > 0


def test_exactly_the_allowed_requests_get_through(viewer):
    p = viewer.port
    hosts = {f"127.0.0.1:{p}": True, f"localhost:{p}": True, f"[::1]:{p}": True, f"box.example:{p}": True, f"LocalHost:{p}": True,
             "127.0.0.1": False, "localhost": False, f"127.0.0.1:{p + 1}": False, f"evil.example:{p}": False, f"127.0.0.1.evil.example:{p}": False,
             f"localhost.:{p}": False, f"0.0.0.0:{p}": False, f"evil@127.0.0.1:{p}": False, None: False}
    origins = {None: True, f"http://127.0.0.1:{p}": True, f"http://box.example:{p}": True, "null": False, "": False, "http://evil.example": False,
               f"http://127.0.0.1:{p + 1}": False, f"https://127.0.0.1:{p}": False}
    tokens = {"right": True, "none": False, "wrong": False, "basic": False, "elsewhere": False}
    raw, cells, wrong, allowed = [Raw(p)], 0, [], 0
    for host, origin, token, route in itertools.product(hosts, origins, tokens, ROUTES):
        expected = hosts[host] and origins[origin] and (tokens[token] or route == "/")
        cells, allowed = cells + 1, allowed + expected
        if reached(viewer, raw, host, origin, token, route) != expected:
            wrong.append((host, origin, token, route))
    raw[0].close()
    assert cells >= 2000 and not wrong
    assert allowed == 5 * 3 * (len(ROUTES) + 4)     # with the right token all of them, and the page with the four others


@pytest.mark.parametrize("again", ["Host", "Origin", "Authorization"])
def test_a_header_that_comes_twice_is_refused(viewer, again):
    headers = [*with_token(viewer), ("Origin", f"http://127.0.0.1:{viewer.port}")]
    with Raw(viewer.port) as raw:
        assert raw.request("GET", "/api/scenes", headers)[0] == 200
        assert raw.request("GET", "/api/scenes", [*headers, next(h for h in headers if h[0] == again)])[0] in (400, 401, 403)


def test_a_whole_address_in_the_request_line_is_refused(viewer):
    with Raw(viewer.port) as raw:
        assert raw.request("GET", f"http://127.0.0.1:{viewer.port}/api/scenes", with_token(viewer))[0] == 400


@pytest.mark.parametrize("path", ["/../etc/passwd", "/%2e%2e/etc/passwd", "//etc/passwd", "/api/../api/scenes", "/api/scenes/", "/api/scene/..%2f0", "/api/scene/0/photo/../../config.yaml",
                                  "/api/scene/0/photo/a.png", "/api/scene/-1", "/api/scene/9", "/api/scene/0/chunk/0/..", "/index.html", "/api/scene/0/photo/1", "/api/scene/\xb2"])
def test_no_path_leads_to_a_file(viewer, path):
    with Raw(viewer.port) as raw:
        assert raw.request("GET", path, with_token(viewer))[0] in (400, 404)


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "HEAD", "PATCH", "TRACE"])
def test_other_methods_are_refused_and_no_answer_allows_another_origin(viewer, method):
    with Raw(viewer.port) as raw:
        raw.send(f"{method} /api/scenes HTTP/1.1\r\nHost: 127.0.0.1:{viewer.port}\r\nAuthorization: Bearer {viewer.gate.token}\r\n\r\n".encode())
        while b"\r\n\r\n" not in raw.held:
            raw.held += raw.socket.recv(4096)
        head = raw.held.lower()
        assert b" 405 " in head.split(b"\r\n")[0] and b"access-control" not in head


CASES = {"page": ("GET", "/", ""), "scenes": ("GET", "/api/scenes", "token"), "range": ("GET", "/api/scene/0/chunk/0/core", "token"), "foreign": ("GET", "/api/scenes", "foreign"),
         "no token": ("GET", "/api/scenes", ""), "nothing": ("GET", "/nothing", "token"), "no HTTP": ("\x16\x03\x01", "/", ""), "socket": ("GET", "/api/socket", "upgrade"),
         "bad frame": ("POST", "/api/scene/0/frame", "token")}


@pytest.mark.parametrize("case", CASES)
def test_every_answer_forbids_framing_sniffing_and_foreign_sources(viewer, case):
    method, path, kind = CASES[case]
    headers = {"token": with_token(viewer), "foreign": [("Host", "evil.example")]}.get(kind, own(viewer))
    headers += [("Range", "bytes=0-9")] if case == "range" else []
    headers += [("Upgrade", "websocket"), ("Connection", "Upgrade"), ("Sec-WebSocket-Version", "13"), ("Sec-WebSocket-Key", "AAAAAAAAAAAAAAAAAAAAAA==")] if kind == "upgrade" else []
    with Raw(viewer.port) as raw:
        _, answer, _ = raw.request(method, path, headers)
    policy = dict(part.strip().partition(" ")[::2] for part in answer["content-security-policy"].split(";"))
    assert policy["default-src"] == "'none'" and policy["frame-ancestors"] == "'none'" and policy["base-uri"] == "'none'" and policy["form-action"] == "'none'"
    assert answer["x-content-type-options"] == "nosniff" and answer["referrer-policy"] == "no-referrer" and answer["cache-control"] == "no-store"
    assert not any(name.startswith("access-control") or name == "set-cookie" for name in answer)
    assert "aiohttp" not in answer["server"].lower()


def test_the_token_has_128_bits_is_new_each_time_and_stands_behind_the_hash():
    a, b = (Viewer([]).start() for _ in "ab")
    try:
        assert len(base64.urlsafe_b64decode(a.gate.token + "==")) == 16 and a.gate.token != b.gate.token
        assert a.url.partition("#")[2] == f"token={a.gate.token}" and a.gate.token not in a.url.partition("#")[0]
    finally:
        a.close(), b.close()


@pytest.mark.parametrize("token", ["", "é\udc80", "x" * 5000, "\0"])
def test_any_text_can_be_compared_with_the_token(viewer, token):
    assert not viewer.gate.knows(token)


def test_the_token_is_printed_once_and_is_in_no_argument_and_no_log(tmp_path):
    from splatkit import io
    io.save(tmp_path / "scene.ply", small().state.scene)
    code = "import logging, sys; logging.basicConfig(level=0); from splatkit.cli import main; sys.exit(main(sys.argv[1:]))"
    program = subprocess.Popen([sys.executable, "-c", code, "view", str(tmp_path / "scene.ply")], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               cwd=Path(__file__).resolve().parent.parent, env={**os.environ, "PYTHONPATH": "."})
    try:
        line = program.stdout.readline()
        token, port = line.strip().partition("#token=")[2], int(line.split(":")[3].partition("/")[0])
        with Raw(port) as raw:
            assert raw.request("GET", "/api/scenes", [("Host", f"127.0.0.1:{port}"), ("Authorization", f"Bearer {token}")])[0] == 200
        raw = joined(port, token)
        assert raw.message()[0] == 1
        raw.close()
        argv = Path(f"/proc/{program.pid}/cmdline").read_text() if sys.platform == "linux" else ""
        program.send_signal(2)
        out, err = program.communicate(timeout=120)
    finally:
        program.kill()
    assert len(token) == 22 and program.returncode == 0
    assert token not in argv + out + err and "Traceback" not in err


@pytest.mark.parametrize("name", ["", "a b", "http://x", "x:80", "x/y", "*", "[::1", "-x", "x" * 300])
def test_a_host_that_no_browser_would_send_is_refused(name):
    with pytest.raises(ValueError, match="without port"):
        gate.Gate((name,))


# ---- messages


GOOD = ['{"type": "hello", "token": "abc"}', '{"type": "watch", "scene": "0", "planes": ["core", "sh"]}', '{"type": "ack", "frame": 7}']


@pytest.mark.parametrize("text", GOOD)
def test_the_messages_of_the_schema_are_read(text):
    assert vars(gate.read_message(text)).items() == {k: tuple(v) if isinstance(v, list) else v for k, v in json.loads(text).items() if k != "type"}.items()


@pytest.mark.parametrize("text", [
    "", "{", "[]", "1", "null", '"hello"', '{"type": "run"}', '{"type": 3}', '{"type": null}', '{"type": ["hello"]}', "{}", '{"type": "hello"}', '{"type": "hello", "token": 3}',
    '{"type": "hello", "token": "a", "path": "/etc/passwd"}', '{"type": "hello", "token": "a", "token": "b"}', '{"type": "hello", "token": "' + "a" * 300 + '"}',
    '{"type": "watch", "scene": 0, "planes": []}', '{"type": "watch", "scene": "0", "planes": "core"}', '{"type": "watch", "scene": "0", "planes": ["float32"]}',
    '{"type": "watch", "scene": "0", "planes": ["core", "core", "core", "core"]}', '{"type": "watch", "scene": "0", "planes": [["core"]]}', '{"type": "ack", "frame": true}',
    '{"type": "ack", "frame": -1}', '{"type": "ack", "frame": 1.0}', '{"type": "ack", "frame": 1e99}', '{"type": "ack", "frame": ' + "9" * 5000 + "}", "[" * 50_000, '{"a":' * 20_000])
def test_what_is_not_in_the_schema_is_refused_in_a_line(text):
    with pytest.raises(BadMessage) as error:
        gate.read_message(text)
    assert "\n" not in str(error.value) and len(str(error.value)) < 120


@pytest.mark.parametrize("change", [{"width": 0}, {"width": 8193}, {"width": 8000, "height": 8000}, {"height": True}, {"K": [0.0] * 9}, {"K": [*K[:8], 2]}, {"K": K[:8]}, {"world_to_cam": [0.0] * 16},
                                    {"world_to_cam": [2.0, *POSE[1:]]}, {"world_to_cam": [*POSE[:15], 2]}, {"background": [0, 0]}, {"background": ["0"] * 3}, {"path": "x"}])
def test_a_frame_from_no_camera_is_refused(viewer, change):
    with Raw(viewer.port) as raw:
        status, _, text = raw.request("POST", "/api/scene/0/frame", with_token(viewer), json.dumps({**FRAME, **change}).encode())
    assert status == 400 and b"\n" not in text


def test_numbers_that_are_none_are_refused(viewer):
    for text in (json.dumps({**FRAME, "width": float("nan")}), json.dumps({**FRAME, "K": [float("inf"), *K[1:]]}), json.dumps({**FRAME, "world_to_cam": [*POSE[:3], float("nan"), *POSE[4:]]})):
        with Raw(viewer.port) as raw:
            assert raw.request("POST", "/api/scene/0/frame", with_token(viewer), text.encode())[0] == 400


def test_a_body_over_the_limit_is_refused_unread(viewer):
    with Raw(viewer.port) as raw:
        raw.send(f"POST /api/scene/0/frame HTTP/1.1\r\nHost: 127.0.0.1:{viewer.port}\r\nAuthorization: Bearer {viewer.gate.token}\r\nContent-Length: 10000000000\r\n\r\n".encode())
        assert raw.answer()[0] == 413


def test_a_socket_that_does_not_begin_with_the_token_is_closed(viewer):
    for first in ({"type": "hello", "token": "wrong"}, {"type": "watch", "scene": "0", "planes": []}, {"type": "ack", "frame": 0}):
        with Raw(viewer.port) as raw:
            raw.upgrade("/api/socket", own(viewer))
            raw.say(**first)
            assert "token" in ended(raw)


@pytest.mark.parametrize("kind", ["long", "claim", "fragments", "binary", "reserved", "second hello", "no such scene", "no text"])
def test_a_socket_that_breaks_the_rules_is_closed_and_the_next_one_works(viewer, kind):
    with joined(viewer.port, viewer.gate.token) as raw:
        try:
            if kind == "long":
                raw.frame(b" " * (gate.MESSAGE_MAX + 1))
            elif kind == "claim":
                raw.frame(b"x", length=1 << 62)
            elif kind == "fragments":
                for i in range(100):
                    raw.frame(b" " * 1000, opcode=1 if i == 0 else 0, last=False)
            elif kind == "binary":
                raw.frame(b"abc", opcode=2)
            elif kind == "reserved":
                raw.frame(b"abc", opcode=5)
            elif kind == "second hello":
                raw.say(type="hello", token=viewer.gate.token)
            elif kind == "no such scene":
                raw.say(type="watch", scene="7", planes=[])
            else:
                raw.frame(b"\xff\xfe", opcode=1)
        except ConnectionError:
            pass        # closed while it was still talking
        ended(raw)
    with joined(viewer.port, viewer.gate.token) as raw:
        assert json.loads(raw.message()[1])["type"] == "manifest"


# ---- limits


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def settled(count, seconds: float = 30) -> bool:
    """Whether `count` descriptors are reached again."""
    end = time.monotonic() + seconds
    while descriptors() > count and time.monotonic() < end:
        gc.collect()
        time.sleep(0.02)
    return descriptors() <= count


def test_seventeen_pages_are_one_too_many(viewer):
    raws = [joined(viewer.port, viewer.gate.token) for _ in range(gate.CLIENTS_MAX)]
    try:
        for raw in raws:
            assert json.loads(raw.message()[1])["type"] == "manifest"
        with joined(viewer.port, viewer.gate.token) as raw:
            assert "16 pages" in ended(raw)
    finally:
        for raw in raws:
            raw.close()


def alive(raw: Raw) -> bool:
    """Whether the server has not closed a connection on which it says nothing."""
    raw.socket.setblocking(False)
    try:
        return raw.socket.recv(1) != b""
    except BlockingIOError:
        return True
    except ConnectionError:
        return False


linux = pytest.mark.skipif(sys.platform != "linux", reason="counts descriptors in /proc")


@linux
def test_connections_beyond_the_limit_are_closed_and_descriptors_come_back(viewer):
    time.sleep(0.1)
    before, open_files = descriptors(), []
    raws = [Raw(viewer.port) for _ in range(300)]
    try:
        wait_for(lambda: sum(map(alive, raws)) <= gate.SOCKETS_MAX, seconds=8)       # sooner than those are closed that send no header
        assert descriptors() <= before + 300 + gate.SOCKETS_MAX
        open_files = [open(os.devnull) for _ in range(100)]     # what a run needs to save
    finally:
        for x in [*raws, *open_files]:
            x.close()
    assert settled(before)
    with Raw(viewer.port) as raw:
        assert raw.request("GET", "/api/scenes", with_token(viewer))[0] == 200


@linux
def test_half_headers_are_closed_in_time(monkeypatch):
    monkeypatch.setattr(gate, "HEADER_SECONDS", 0.5)
    with Viewer([small()]) as viewer:
        before = descriptors()
        raws = [Raw(viewer.port) for _ in range(40)]
        for i, raw in enumerate(raws):
            raw.send(b"GET / HTTP/1.1\r\nHost: x"[:i])
        silent = Raw(viewer.port)
        silent.upgrade("/api/socket", own(viewer))      # and never says hello
        used = Raw(viewer.port)
        assert used.request("GET", "/api/scenes", with_token(viewer))[0] == 200
        used.send(b"GET / HT")
        start = time.monotonic()
        for raw in [*raws, used]:
            assert raw.socket.recv(1) == b""
        assert "token" in ended(silent)
        assert time.monotonic() - start < 8      # HEADER_SECONDS is 10 where nobody changed it
        for raw in [*raws, silent, used]:
            raw.close()
        assert settled(before)


@linux
def test_clients_that_never_read_hold_little_memory_and_harm_nobody(viewer):
    """Eight of them watch a scene whose chunks are over a megabyte, while a ninth gets everything."""
    g = torch.Generator().manual_seed(1)
    n = 200_000
    big = Shown.of(Scene(torch.randn(n, 3, generator=g), torch.ones(n, 4), torch.zeros(n, 3), torch.zeros(n), torch.zeros(n, 9, 3)), "big", SceneHeader())
    with Viewer([big]) as viewer:
        silent = [joined(viewer.port, viewer.gate.token, ("core", "sh")) for _ in range(8)]
        time.sleep(0.3)
        with joined(viewer.port, viewer.gate.token, ("core", "sh")) as raw:
            got = [raw.message() for _ in range(9)]
        assert [opcode for opcode, _ in got] == [1] + [2] * 8
        for client in viewer.clients:
            assert client.socket._req.transport.get_write_buffer_size() <= gate.QUEUED_MAX
        for raw in silent:
            raw.close()


def hostile(viewer, stop, count: int, seed: int) -> dict[str, int]:
    """Mutated messages to sockets that have shown the token, each followed by a look whether the server still answers."""
    rng, sent, reopened = random.Random(seed), 0, 0
    corpus = [*GOOD, '{"type": "hello", "token": "%s"}' % viewer.gate.token]
    streams = [mutants(text.encode(), count, seed + i) for i, text in enumerate(corpus)]
    raw = joined(viewer.port, viewer.gate.token)
    while sent < count and not stop.is_set():
        sent += 1
        try:
            raw.frame(next(rng.choice(streams)), opcode=rng.choice((1, 1, 1, 2)))
            raw.frame(b"", opcode=9)
            while (opcode := raw.message()[0]) != 10:       # its pong says that all before it was read
                if opcode == 8:
                    raise ConnectionError
        except ConnectionError:
            raw.close()
            raw, reopened = joined(viewer.port, viewer.gate.token), reopened + 1
    raw.close()
    return {"sent": sent, "reopened": reopened}


@linux
def test_mutated_messages_leave_no_traceback_no_descriptor_and_a_server_that_answers(viewer, capfd, caplog):
    before = descriptors()
    said = hostile(viewer, threading.Event(), 200, 5)
    assert said["sent"] == 200 and said["reopened"] > 70
    with Raw(viewer.port) as raw:
        assert raw.request("GET", "/api/scenes", with_token(viewer))[0] == 200
    assert settled(before)
    end = time.monotonic() + 30
    while viewer.clients and time.monotonic() < end:
        time.sleep(0.02)
    assert not viewer.clients
    out, err = capfd.readouterr()
    assert out == err == "" and not caplog.records


def test_mutated_requests_end_in_an_answer_or_a_closed_connection(viewer, capfd, caplog):
    request = f"GET /api/scene/0/chunk/0/core?version=1 HTTP/1.1\r\nHost: 127.0.0.1:{viewer.port}\r\nAuthorization: Bearer {viewer.gate.token}\r\nRange: bytes=0-5\r\nConnection: close\r\n\r\n"
    for data in mutants(request.encode(), 300, 9):
        with Raw(viewer.port) as raw:
            try:
                raw.send(data)
                raw.socket.shutdown(1)
                while raw.socket.recv(4096):
                    pass
            except ConnectionError:
                pass
    with Raw(viewer.port) as raw:
        assert raw.request("GET", "/api/scenes", with_token(viewer))[0] == 200
    out, err = capfd.readouterr()
    assert out == err == "" and not caplog.records
