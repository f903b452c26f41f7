"""The viewer's server under hostile and careless clients for a while, beside a loop that stands for a run: what scripts/soak.py shows of it.

Run as a program: prints JSON. The loop's steps are timed in turns with and without the clients, so that a busy machine does not count.
"""
import gc
import json
import os
import random
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from raw import Raw, joined                         # noqa: E402: of this folder
from test_serve_security import descriptors, hostile, with_token      # noqa: E402

from splatkit import Scene, io                      # noqa: E402
from splatkit.capture import SceneHeader            # noqa: E402
from splatkit.live import Live                      # noqa: E402
from splatkit.serve import Viewer                   # noqa: E402
from splatkit.shown import Shown                    # noqa: E402


def memory_mb() -> float:
    """Resident."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def taking(viewer, stop, seconds: float = 1e9) -> None:
    """A page that takes and acknowledges everything; it leaves after so many seconds and comes back."""
    while not stop.is_set():
        raw, end = joined(viewer.port, viewer.gate.token), time.monotonic() + seconds
        raw.socket.settimeout(1)
        try:
            while not stop.is_set() and time.monotonic() < end:
                try:
                    opcode, payload = raw.message()
                except TimeoutError:
                    raw.held = b""
                    break
                if opcode == 2:
                    raw.say(type="ack", frame=int.from_bytes(payload[4:8], "little"))
        except ConnectionError:
            pass
        raw.close()


def dribbling(viewer, stop) -> None:
    """A header, a byte each second."""
    while not stop.is_set():
        with Raw(viewer.port) as raw:
            try:
                for byte in b"GET / HTTP/1.1\r\nHost: a-very-long-name-indeed":
                    raw.send(bytes([byte]))
                    if stop.wait(1):
                        return
            except OSError:
                pass


def median_step(live: Live, scene: Scene, seconds: float) -> float:
    """Of a loop that computes, changes the scene, and offers it."""
    took, end, x = [], time.monotonic() + seconds, torch.randn(256, 256)
    while time.monotonic() < end:
        start = time.perf_counter()
        for _ in range(20):
            x = torch.tanh(x @ x)
        scene.means.add_(1e-4)
        if live.due():
            live.take(scene, len(took))
        took.append(time.perf_counter() - start)
    return statistics.median(took)


def soak(seconds: float, messages: int, gaussians: int, seed: int) -> dict:
    g, said = torch.Generator().manual_seed(seed), []
    scene = Scene(torch.randn(gaussians, 3, generator=g), torch.ones(gaussians, 4), torch.zeros(gaussians, 3), torch.zeros(gaussians), torch.zeros(gaussians, 1, 3))
    shown = Shown("soaked", SceneHeader(), live=True)
    viewer = Viewer([shown], say=said.append)
    live = Live(shown, viewer.hand_over)
    live.take(scene, 0)
    with viewer:
        get = lambda: Raw(viewer.port).__enter__()
        median_step(live, scene, 1)
        gc.collect()
        before, quiet, loud, memory = descriptors(), [], [], []
        sent, rng, start = 0, random.Random(seed), time.monotonic()
        while time.monotonic() - start < seconds or sent < messages:
            quiet.append(median_step(live, scene, 2))
            stop = threading.Event()
            silent = [joined(viewer.port, viewer.gate.token) for _ in range(8)]
            halves = [get() for _ in range(20)]
            for i, raw in enumerate(halves):
                raw.send(b"GET / HTTP/1.1\r\nHost: x"[:i])
            counts = [{} for _ in range(2)]
            talk = lambda k: counts[k].update(hostile(viewer, stop, 10**9, rng.randrange(2**30)))
            threads = [threading.Thread(target=taking, args=(viewer, stop, s)) for s in (1e9, 1e9, 1e9, 0.5)]
            threads += [threading.Thread(target=dribbling, args=(viewer, stop)), *(threading.Thread(target=talk, args=(k,)) for k in range(2))]
            for t in threads:
                t.start()
            loud.append(median_step(live, scene, 8))
            stop.set()
            for t in threads:
                t.join(30)
            burst = [get() for _ in range(300)]
            for raw in (*silent, *halves, *burst):
                raw.close()
            sent += sum(c.get("sent", 0) for c in counts)
            gc.collect()
            memory.append((time.monotonic() - start, memory_mb()))
        with tempfile.TemporaryDirectory() as folder:
            io.save(Path(folder) / "scene.ply", scene)      # a run can still save
            files = [open(os.devnull) for _ in range(100)]
            for file in files:
                file.close()
        end = time.monotonic() + 15
        while descriptors() > before and time.monotonic() < end:
            gc.collect()
            time.sleep(0.1)
        after = descriptors()
        with Raw(viewer.port) as raw:
            answers = raw.request("GET", "/api/scenes", with_token(viewer))[0]
    half = [(t, m) for t, m in memory if t >= memory[-1][0] / 3]
    slope = statistics.linear_regression(*zip(*half)).slope * 60 if len(half) > 2 else 0.0
    return {"messages": sent, "descriptors more": after - before, "answers": answers, "said": said[:5], "median quiet ms": 1e3 * statistics.median(quiet),
            "median loud ms": 1e3 * statistics.median(loud), "MB a minute": slope, "MB": memory[-1][1]}


if __name__ == "__main__":
    seconds, messages, gaussians, seed = sys.argv[1:]
    torch.set_num_threads(1)
    print(json.dumps(soak(float(seconds), int(messages), int(gaussians), int(seed))))
