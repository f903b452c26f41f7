"""The viewer's page in headless Chromium on software GL, against Spark and PlayCanvas: prints the table of benchmarks/README.md and writes benchmarks/viewer.json.

    python3 scripts/bench_viewer.py [--only frames --only idle] [--peers FOLDER | --peers none] [--soak 60]

Needs node, viewer/node_modules and Chromium. The peers come from the npm registry into --peers. CPU-ms are user and system time of all processes of a browser;
frames and openings are minima over rounds in which the engines take turns. With --only the other rows of the file stay. What a page does is in viewer/tests/bench/.
"""
from __future__ import annotations

import argparse
import base64
import contextlib
import functools
import http.server
import json
import math
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import chromium                                          # noqa: E402: of the tests' folder
from bench_raster import processor                       # noqa: E402
from bench_wasm import camera_of, made_up                # noqa: E402
from gpu_bench import said                               # noqa: E402
from shows import complete                               # noqa: E402

from splatkit import Scene, io, page, render             # noqa: E402
from splatkit.camera import Cameras                      # noqa: E402
from splatkit.capture import SceneHeader                 # noqa: E402
from splatkit.live import Live                           # noqa: E402
from splatkit.serve import Viewer                        # noqa: E402
from splatkit.shown import Shown                         # noqa: E402

VIEWER = ROOT / "viewer"
PEERS = {"@sparkjsdev/spark": "2.2.0", "playcanvas": "2.23.3", "three": "0.187.0"}
ENGINES = {"webgl": ("ours", "?backend=webgl"), "wasm": ("ours", "?backend=wasm"), "page": ("ours", ""),
           "playcanvas": ("playcanvas", ""), "spark": ("spark", ""), "spark tuned": ("spark", "?tuned")}    # "page": as it chooses itself


@dataclass(frozen=True)
class Row:
    what: str
    must: str
    aim: str
    measured: str
    met: bool | None        # None: not measured, or no bar


@dataclass(frozen=True)
class Size:
    """How much is measured."""
    width: int = 640
    height: int = 480
    gaussians: int = 50_000
    many: int = 1_000_000
    rounds: int = 4
    openings: int = 2
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


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Both clamped to what a screen shows."""
    return -10 * math.log10(max(float(np.square(a.clip(0, 1).astype(np.float64) - b.clip(0, 1)).mean()), 1e-13))


def against(what: str, must: float, aim: float, ours: float, theirs: float | None, unit: str) -> Row:
    bars, digits = (f"<= {must:.3g}x", f"{aim:.3g}x"), 0 if unit == "CPU-ms" else 2
    if theirs is None:
        return Row(what, *bars, f"{ours:.3g} {unit}; no peer", None)
    return Row(what, *bars, f"{ours / theirs:.3f}x ({ours:,.{digits}f} / {theirs:,.{digits}f} {unit})", ours <= must * theirs)


# ---- measures: rows, and the numbers behind them


def parity(b: Bench) -> Iterator[Row | dict]:
    found = {"float": [], "webgl": [], "wasm": []}
    degrees, scene = (0, 120, 240), b.scene
    with Engine() as e:
        for name in ("webgl", "wasm"):
            tab, _ = b.opened(e, name, "scene.ply")
            for a in degrees:
                found[name].append(psnr(b.picture(tab, b.view(a)), b.reference(scene, a)))
                if name == "wasm":
                    found["float"].append(psnr(b.exact(tab, b.view(a)), b.reference(scene, a)))
            tab.close()
    yield found
    least = {name: min(values) for name, values in found.items()}
    yield Row("wasm picture (float) against the native rasterizer, file", ">= 80 dB", "95 dB", f"{least['float']:.1f} dB; on the 8-bit canvas {least['wasm']:.1f}", least["float"] >= 80)
    yield Row("WebGL2 canvas against the native rasterizer, file", ">= 48 dB", "51 dB", f"{least['webgl']:.1f} dB", least["webgl"] >= 48)


def wire(b: Bench) -> Iterator[Row | dict]:
    found = {"float": [], "webgl": [], "wasm": []}
    with Viewer([Shown.of(b.scene, "bench", SceneHeader())]) as server, Engine() as e:
        tab = b.on_server(e.browser, server, b.scene)
        for a in (0, 120, 240):
            reference = b.reference(b.scene, a)
            found["float"].append(psnr(b.exact(tab, b.view(a)), reference))
            for name in ("webgl", "wasm"):
                tab.run(f"app.stage.setBackend('{name}')")
                found[name].append(psnr(b.picture(tab, b.view(a)), reference))
    yield found
    least = {name: min(values) for name, values in found.items()}
    yield Row("the same over the wire, after the last chunk", ">= 55 dB", "60 dB", f"{least['float']:.1f} dB (float); on the 8-bit canvas wasm {least['wasm']:.1f}, WebGL2 {least['webgl']:.1f}",
              least["float"] >= 55)


def frames(b: Bench) -> Iterator[Row | dict]:
    """CPU-ms of a frame while the camera goes around: projection, order, blend, canvas."""
    names, _ = [name for name in ENGINES if name != "page" and (b.peers or ENGINES[name][0] == "ours")], b.scene
    number = {"webgl": 16, "wasm": 30, "playcanvas": 16, "spark": 4, "spark tuned": 4}
    each: dict[str, dict[str, list[float]]] = {name: {"orbit": [], "still": [], "wall": []} for name in names}
    engines, tabs, shown = {}, {}, {}
    try:
        for name in names:
            engines[name] = Engine()
            tabs[name], _ = b.opened(engines[name], name, "scene.ply")
            shown[name] = psnr(b.picture(tabs[name], b.view()), b.reference(b.scene))
        for i in range(b.size.rounds):
            for name in names:
                n = max(2, number[name] // (1 if b.size.rounds > 1 else 4))
                for how in ("orbit", "still") if name != "wasm" else ("orbit",):
                    start, before = time.monotonic(), engines[name].tree.cpu()
                    tabs[name].run("await bench.frames(...argument)", [b.views[8 * i % 40:][:n] if how == "orbit" else b.views[:1], n])
                    each[name][how].append(1000 * (engines[name].tree.cpu() - before) / n)
                    if how == "orbit":
                        each[name]["wall"].append(1000 * (time.monotonic() - start) / n)
    finally:
        for e in engines.values():
            e.browser.quit()
    yield {name: {**lists, "psnr": shown[name]} for name, lists in each.items()}
    best = {name: min(lists["orbit"]) for name, lists in each.items()}
    spark = min((best[name] for name in ("spark", "spark tuned") if name in best), default=None)
    yield against("WebGL2 frame against Spark", 1 / 4, 1 / 5, best["webgl"], spark, "CPU-ms")
    yield against("WebGL2 frame against PlayCanvas", 1.1, 1.0, best["webgl"], best.get("playcanvas"), "CPU-ms")
    yield against("wasm frame against PlayCanvas", 1 / 3, 1 / 5, best["wasm"], best.get("playcanvas"), "CPU-ms")
    yield against("wasm frame against Spark", 1 / 15, 1 / 26, best["wasm"], spark, "CPU-ms")


def opening(b: Bench) -> Iterator[Row | dict]:
    names, _ = ["page", "webgl", *(["playcanvas", "spark"] if b.peers else [])], b.scene
    each: dict[str, list[dict]] = {name: [] for name in names}
    for _ in range(b.size.openings):
        for name in names:
            with Engine() as e:
                each[name].append(b.opened(e, name, "scene.ply")[1])
    yield each
    best = {name: min(x["ms"] for x in found) / 1000 for name, found in each.items()}
    yield against("time to final picture against PlayCanvas", 0.75, 0.6, best["page"], best.get("playcanvas"), "s")
    yield against("time to final picture against Spark", 0.45, 0.35, best["page"], best.get("spark"), "s")


def million(b: Bench) -> Iterator[Row | dict]:
    names, found, _ = ["page", "webgl", *(["playcanvas"] if b.peers else [])], {}, b.many
    for name in names:
        with Engine() as e:
            found[name] = b.opened(e, name, "many.ply")[1]
    yield found
    yield against("1M Gaussians, CPU to final picture against PlayCanvas", 0.25, 0.2, found["page"]["cpu_s"], found["playcanvas"]["cpu_s"] if b.peers else None, "CPU-s")


def live(b: Bench) -> Iterator[Row | dict]:
    """A run that changes all rows in each step, on one thread; blocks of it with and without copies for the viewer in turn. The tab stays open in both. A browser on another machine takes none
    of the run's time: one with the lowest priority stands for it, and then one with the run's own."""
    found = {idle: _beside_a_run(b, idle) for idle in (True, False)}
    yield {"browser that takes what is left" if idle else "browser as urgent as the run": {"costs": costs, "updates": updates} for idle, (costs, updates) in found.items()}
    for idle, (costs, updates) in found.items():
        slower = [float(np.median([x[i] for x in costs["with"]]) / np.median([x[i] for x in costs["without"]]) - 1) for i in (0, 1)]
        seconds = sum(x["seconds"] for x in updates)
        rate, copying = sum(x["rows"] for x in updates) / b.size.many / seconds, sum(x["copying"] for x in updates) / seconds
        yield Row(f"live update of {b.size.many:,} (SH degree 0) at 1 Hz, the browser {'takes what is left' if idle else 'as urgent as the run'}: the run is slower by", "<= 2 %" if idle else "", "",
                  f"{100 * slower[0]:+.1f} % wall, {100 * slower[1]:+.1f} % CPU of its thread, of which copies {100 * copying:.1f} %; {rate:.2f} whole updates/s arrive",
                  slower[0] <= 0.02 and rate >= 0.9 if idle and b.size is not QUICK else None)


def _beside_a_run(b: Bench, idle: bool) -> tuple[dict[str, list[tuple[float, float]]], list[dict]]:
    """Wall and CPU seconds of a step in blocks with and without copies, and what came of the copies of each block."""
    shown, some, camera = Shown("run", SceneHeader(), live=True), b.many.rows(slice(0, 20_000)), b.camera()
    threads, moving = torch.get_num_threads(), b.many.replace(means=b.many.means.clone())
    torch.set_num_threads(1)
    costs: dict[str, list[tuple[float, float]]] = {"with": [], "without": []}
    updates = []
    with Viewer([shown]) as server, Engine(idle) as e:
        run = Live(shown, server.hand_over, rate=1.0)
        run.take(moving, 0, complete=True)
        tab = b.on_server(e.browser, server, moving)
        tab.run("window.rows = 0; const update = app.update.bind(app); app.update = (first, last, more) => { window.rows += last - first; update(first, last, more); }")
        step = 0
        for k in range(2 * b.size.blocks):
            how, n, taken, rows, copying = ("without", "with")[k % 2], 0, run.taken, tab.run("return window.rows"), 0.0
            start, cpu = time.perf_counter(), time.thread_time()
            while time.perf_counter() < start + b.size.block_s:
                render(some, camera)
                moving.means.add_(1e-7)
                step, n = step + 1, n + 1
                if how == "with" and run.due():
                    before = time.perf_counter()
                    run.take(moving, step)
                    copying += time.perf_counter() - before
            seconds = time.perf_counter() - start
            costs[how].append((seconds / n, (time.thread_time() - cpu) / n))
            if how == "with":
                updates.append({"seconds": seconds, "steps": n, "taken": run.taken - taken, "copying": copying, "rows": tab.run("return window.rows") - rows})
            time.sleep(min(1.0, b.size.block_s / 2))    # what is under way arrives
    torch.set_num_threads(threads)
    return costs, updates


def idle(b: Bench) -> Iterator[Row | dict]:
    spent = []
    with Viewer([Shown.of(b.scene, "bench", SceneHeader())]) as server, Engine() as e:
        b.on_server(e.browser, server, b.scene)
        time.sleep(min(3.0, b.size.idle_s))
        for _ in range(3):
            before, start = e.tree.cpu(), time.monotonic()
            time.sleep(b.size.idle_s / 3)
            spent.append(1000 * (e.tree.cpu() - before) / (time.monotonic() - start))
    yield {"cpu_ms_per_s": spent}
    yield Row("idle tab", "< 20 CPU-ms/s", "0", f"{np.median(spent):.1f} CPU-ms/s", bool(np.median(spent) < 20))


def soak(b: Bench) -> Iterator[Row | dict]:
    """Memory of server and browser beside a run of `--soak` minutes, whose Gaussians all change and sometimes grow."""
    if not b.soak:
        return
    shown, scene, seen = Shown("run", SceneHeader(), sh_degree=3, live=True), b.scene.replace(means=b.scene.means.clone()), []
    with Viewer([shown]) as server, Engine() as e:
        run = Live(shown, server.hand_over)
        run.take(scene, 0, complete=True)
        tab = b.on_server(e.browser, server, scene)
        start, step = time.monotonic(), 0
        while (minutes := (time.monotonic() - start) / 60) < b.soak:
            scene.means.add_(1e-6)
            step += 1
            if run.due():
                run.take(scene.rows(slice(0, len(scene) - step % 7)), step, {"age": torch.zeros(len(scene) - step % 7)})
            if step % 50 == 0:
                shown.record({"step": step, "gaussians": len(scene), "loss": 1 / step, "psnr_train": 20.0})
            if not seen or minutes > seen[-1][0] + b.soak / 200:
                tab.collect()       # what nothing holds any more says only when it was collected last
                seen.append((minutes, memory_of("self"), e.tree.memory(), tab.run("return performance.memory ? performance.memory.usedJSHeapSize / 1e6 : 0")))
            time.sleep(0.05)
    after = np.array(seen)[len(seen) // 4:]     # caches fill first
    earlier, later = np.triu_indices(len(after), 1)
    server_mb, tab_mb = (float(np.median((after[later, i] - after[earlier, i]) / (after[later, 0] - after[earlier, 0]))) for i in (1, 2))       # of Theil and Sen: the median slope of pairs
    yield {"minutes": b.soak, "samples of minute, server MB, browser MB, heap MB": seen, "copies": run.taken}
    yield Row(f"live soak of {b.soak:g} min: server, browser", "flat (< 0.5 MB/min)", "", f"{server_mb:+.2f}, {tab_mb:+.2f} MB/min; {run.taken} copies", max(server_mb, tab_mb) < 0.5)


MEASURES = {"parity": parity, "wire": wire, "frames": frames, "opening": opening, "million": million, "live": live, "idle": idle, "soak": soak}


def installed(folder: str) -> Path | None:
    """The peers' folder, filled where it is not; None for `none`."""
    if folder == "none":
        return None
    path = Path(folder).expanduser().resolve()
    versions = lambda: {name: json.loads(file.read_text())["version"] for name in PEERS if (file := path / "node_modules" / name / "package.json").exists()}
    if versions() != PEERS:
        path.mkdir(parents=True, exist_ok=True)
        subprocess.run(["npm", "install", "--no-save", "--no-audit", "--no-fund", *(f"{name}@{version}" for name, version in PEERS.items())], cwd=path, check=True, stdout=sys.stderr)
    return path


def table(rows: list[dict]) -> str:
    met = {True: "met", False: "missed", None: ""}
    return "\n".join(["| what | must | aim | measured | |", "|---|---|---|---|---|", *(f"| {r['what']} | {r['must']} | {r['aim']} | {r['measured']} | {met[r['met']]} |" for r in rows)])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=MEASURES, action="append", help="this measure; may be given several times")
    parser.add_argument("--peers", default="~/.cache/splatkit/viewer-peers", help="where the peers are or are installed; none: without them")
    parser.add_argument("--quick", action="store_true", help="tiny: shows that all of it runs, measures nothing")
    parser.add_argument("--soak", type=float, default=0, metavar="MINUTES", help="of a live run, whose memory is watched")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "viewer.json")
    options = parser.parse_args()
    if reason := chromium.missing():
        print(f"cannot run: {reason}", file=sys.stderr)
        return 2
    peers = installed(options.peers)
    result = json.loads(options.out.read_text()) if options.only and options.out.exists() else {"measures": {}}
    result |= {"machine": processor(), "cores": os.cpu_count(), "versions": {
        "chromium": said(chromium.chromium(), "--version"), "node": said("node", "--version"), "python": platform.python_version(), "torch": torch.__version__, **(PEERS if peers else {})}}
    commit = said("git", "rev-parse", "--short", "HEAD") + ("+" if said("git", "status", "--porcelain", "--untracked-files=no") else "")
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), QUICK if options.quick else Size(), peers, options.soak)
        for name in options.only or MEASURES:
            start, parts = time.monotonic(), list(MEASURES[name](bench))
            if parts:
                result["measures"][name] = {"rows": [asdict(x) for x in parts[1:]], "numbers": parts[0], "commit": commit, "load": os.getloadavg()[0], "seconds": time.monotonic() - start}
                print("\n".join(table(result["measures"][name]["rows"]).splitlines()[0 if name == (options.only or list(MEASURES))[0] else 2:]), flush=True)
                options.out.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
