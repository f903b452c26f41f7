"""Browsers whose CPU time and memory are known, and in them the pages of the viewer and of its peers, as scripts/bench_viewer.py measures them."""
from __future__ import annotations

import base64
import contextlib
import functools
import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import chromium                                          # noqa: E402: of the tests' folder
from bench_wasm import camera_of, made_up                # noqa: E402
from shows import complete                               # noqa: E402

from splatkit import Scene, io, page, render             # noqa: E402
from splatkit.camera import Cameras                      # noqa: E402
from splatkit.capture import SceneHeader                 # noqa: E402
from splatkit.serve import Viewer                        # noqa: E402

VIEWER = ROOT / "viewer"
PEERS = {"@sparkjsdev/spark": "2.2.0", "playcanvas": "2.23.3", "three": "0.187.0"}
ENGINES = {"webgl": ("ours", "?backend=webgl"), "wasm": ("ours", "?backend=wasm"), "page": ("ours", ""),
           "playcanvas": ("playcanvas", ""), "spark": ("spark", ""), "spark tuned": ("spark", "?tuned")}    # "page": as it chooses itself


@dataclass(frozen=True)
class Size:
    """How much is measured."""
    width: int = 640
    height: int = 480
    gaussians: int = 50_000
    many: int = 1_000_000
    rounds: int = 4
    openings: int = 3
    quiet_ms: int = 2000    # without a change of a picture, before it is final
    idle_s: float = 10
    blocks: int = 8        # of the live run, with and without the viewer in turn
    block_s: float = 6


QUICK = Size(160, 120, 2000, 20_000, 1, 1, 150, 1, 2, 0.5)


class Tree:
    """The processes below one, without it."""

    def __init__(self, pid: int):
        self.pid = pid

    def processes(self) -> list[int]:
        parents = {}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            except (OSError, IndexError):      # it has ended
                continue
        found = [self.pid]
        for pid in found:
            found += [child for child, parent in parents.items() if parent == pid]
        return found[1:]

    def cpu(self) -> float:
        """Seconds so far, of those that ended too."""
        ticks = 0
        for pid in self.processes():
            try:
                ticks += sum(map(int, Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:15]))
            except OSError:
                continue
        return ticks / os.sysconf("SC_CLK_TCK")

    def memory(self) -> float:
        """MB, as memory_of."""
        return sum(map(memory_of, self.processes()))


def memory_of(pid: int | str) -> float:
    """MB of a process that are resident, without pages of files: what it has of a library depends on who else maps it. Shared memory is counted by share."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        return sum(int(line.split()[1]) for line in lines if line.startswith(("Pss_Anon:", "Pss_Shmem:"))) / 1024
    except OSError:
        return 0.0


class Clock(threading.Thread):
    """CPU seconds of a tree over time."""

    def __init__(self, tree: Tree):
        super().__init__(daemon=True)
        self.tree, self.seen, self.ended = tree, [], threading.Event()
        self.start()

    def run(self) -> None:
        while not self.ended.wait(0.05):
            self.seen.append((time.time(), self.tree.cpu()))

    def at(self, when: float) -> float:
        self.ended.set()
        self.join()
        return float(np.interp(when, *zip(*self.seen)))


class Engine:
    """A browser of its own with one page."""

    def __init__(self, idle: bool = False):
        self.browser = chromium.Browser(idle)
        self.tree = Tree(self.browser.node.pid)
        if idle:        # a browser has a session of its own, and Linux shares cores among sessions before it looks at their processes
            tab = self.browser.open("about:blank")
            for pid in self.tree.processes():
                with contextlib.suppress(OSError):
                    Path(f"/proc/{pid}/autogroup").write_text("19")
            tab.close()

    def blank(self, size: Size) -> chromium.Page:
        """An empty tab, when the browser has calmed down: window and tab cost it two CPU-seconds, which are none of a viewer's."""
        tab = self.browser.open("about:blank", width=size.width, height=size.height)
        self.settle()
        return tab

    def settle(self, share: float = 0.05, seconds: float = 20) -> None:
        """Until the browser does nothing."""
        end, quiet = time.monotonic() + seconds, 0
        while quiet < 2 and time.monotonic() < end:
            before, start = self.tree.cpu(), time.monotonic()
            time.sleep(0.25)
            quiet = quiet + 1 if self.tree.cpu() - before <= share * (time.monotonic() - start) else 0

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *error) -> None:
        self.browser.quit()


class Bench:
    """Pages, scenes and the server that they come from, in a folder that is thrown away."""

    def __init__(self, folder: Path, size: Size, peers: Path | None, soak: float):
        self.folder, self.size, self.peers, self.soak = folder, size, peers, soak
        self.wasm = base64.b64encode((VIEWER / "src" / "splat.wasm").read_bytes()).decode()
        self.views = [self.view(3.0 * i) for i in range(40)]
        if peers:
            (folder / "node_modules").symlink_to(peers / "node_modules")
        for name in ("ours", *(["spark", "playcanvas"] if peers else [])):
            self.bundle(name)
        handler = functools.partial(Quiet, directory=str(folder))
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def bundle(self, name: str) -> None:
        scripts = VIEWER / "tests" / "bench"
        if name != "ours":      # bundled beside the peers, so that nothing of them comes from the folder of our page
            for file in (f"{name}.mjs", "harness.mjs"):
                shutil.copy(scripts / file, self.folder)
            scripts = self.folder
        command = [VIEWER / "node_modules" / ".bin" / "esbuild", scripts / f"{name}.mjs", "--bundle", "--minify", "--log-level=error",
                   f"--format={'iife' if name == 'ours' else 'esm'}", f"--outfile={self.folder / name}.js"]
        subprocess.run(list(map(str, command)), check=True)

    def camera(self, degrees: float = 0.0) -> Cameras:
        return camera_of(self.size.width, self.size.height, degrees)

    def view(self, degrees: float = 0.0) -> dict:
        c = self.camera(degrees)
        return {"worldToCam": c.world_to_cam.flatten().tolist(), "K": c.K.flatten().tolist(), "width": c.width, "height": c.height}

    @functools.cached_property
    def scene(self) -> Scene:
        scene = made_up(self.size.gaussians)
        io.save(self.folder / "scene.ply", scene, SceneHeader())
        return scene

    @functools.cached_property
    def many(self) -> Scene:
        scene = made_up(self.size.many)
        scene = scene.replace(sh=scene.sh[:, :1].contiguous())
        io.save(self.folder / "many.ply", scene, SceneHeader())
        return scene

    def opened(self, e: Engine, name: str, file: str) -> tuple[chromium.Page, dict]:
        """A page of an engine that shows a file, and what its opening took: ms from the navigation to the last change of the picture, and the CPU seconds until then."""
        kind, query = ENGINES[name]
        opening = f"<script>window.opening = {json.dumps([f'/{file}', self.views[0], self.size.quiet_ms])}</script>"
        if kind == "ours":
            text = page.page().replace("</body>", f"{opening}<script type=module src=ours.js></script></body>")
        else:
            text = (f"<!doctype html><meta charset=utf-8><style>body{{margin:0}}</style><canvas width={self.size.width} height={self.size.height}></canvas>"
                    f"{opening}<script type=module src={kind}.js></script>")
        (self.folder / f"{kind}.html").write_text(text, encoding="utf-8")
        tab = e.blank(self.size)
        before, clock = e.tree.cpu(), Clock(e.tree)
        tab.goto(url=f"http://127.0.0.1:{self.server.server_port}/{kind}.html{query}")
        tab.wait("window.opened", seconds=400)
        result = tab.run("return window.opened")
        if "error" in result:
            raise RuntimeError(f"{name}: {result['error']}")
        return tab, {"ms": result["ms"], "cpu_s": clock.at(result["clock"] / 1000) - before, "frames": result["frames"]}

    def reference(self, scene: Scene, degrees: float = 0.0) -> np.ndarray:
        return render(scene, self.camera(degrees)).color[0].numpy()

    def picture(self, tab: chromium.Page, view: dict) -> np.ndarray:
        """What the canvas of an engine shows."""
        width, height, data = tab.run("return bench.picture(...argument)", [view, min(self.size.quiet_ms, 600)])
        return np.frombuffer(base64.b64decode(data), np.uint8).reshape(height, width, 4)[::-1, :, :3] / 255.0

    def exact(self, tab: chromium.Page, view: dict) -> np.ndarray:
        """Float colours by WebAssembly of the scene that our page holds."""
        data = base64.b64decode(tab.run("return bench.exact(...argument)", [self.wasm, view]))
        return np.frombuffer(data, np.float32).reshape(self.size.height, self.size.width, 3)

    def on_server(self, browser: chromium.Browser, server: Viewer, scene: Scene) -> chromium.Page:
        """Our page on a server, with the whole scene, under the same script as a page with a file."""
        tab = browser.open(server.url, width=self.size.width, height=self.size.height)
        tab.wait(complete(scene), seconds=120)
        tab.run((self.folder / "ours.js").read_text(encoding="utf-8") + "; await app.stage.settled()")
        return tab


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *said) -> None:
        pass
