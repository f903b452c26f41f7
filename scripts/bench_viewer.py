"""The viewer's page in headless Chromium on software GL, against Spark and PlayCanvas: prints the table of benchmarks/README.md and writes benchmarks/viewer.json.

    python3 scripts/bench_viewer.py [--only frames --only idle] [--peers FOLDER | --peers none] [--soak 60]

Needs node, viewer/node_modules and Chromium. The peers come from the npm registry into --peers. CPU-ms are user and system time of all processes of a browser;
frames and openings are minima over rounds in which the engines take turns. With --only the other rows of the file stay. What a page does is in viewer/tests/bench/.
"""
from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from bench_raster import processor
from browsers import ENGINES, PEERS, QUICK, ROOT, Bench, Engine, Size, chromium, memory_of
from far_page import far_page
from gpu_bench import said

from splatkit import Scene, render
from splatkit.capture import SceneHeader
from splatkit.live import Live
from splatkit.serve import Viewer
from splatkit.shown import Shown


@dataclass(frozen=True)
class Row:
    what: str
    must: str
    aim: str
    measured: str
    met: bool | None        # None: not measured, or no bar


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


def _openings(b: Bench, names: list[str], file: str) -> dict[str, list[dict]]:
    """What openings of a file took, the engines in turns."""
    _ = b.many if file == "many.ply" else b.scene       # writes it
    each: dict[str, list[dict]] = {name: [] for name in names}
    for _ in range(b.size.openings):
        for name in names:
            with Engine() as e:
                each[name].append(b.opened(e, name, file)[1])
    return each


def opening(b: Bench) -> Iterator[Row | dict]:
    each = _openings(b, ["page", "webgl", *(["playcanvas", "spark"] if b.peers else [])], "scene.ply")
    yield each
    best = {name: min(x["ms"] for x in found) / 1000 for name, found in each.items()}
    yield against("time to final picture against PlayCanvas", 0.75, 0.6, best["page"], best.get("playcanvas"), "s")
    yield against("time to final picture against Spark", 0.45, 0.35, best["page"], best.get("spark"), "s")


def million(b: Bench) -> Iterator[Row | dict]:
    each = _openings(b, ["page", "webgl", *(["playcanvas"] if b.peers else [])], "many.ply")
    yield each
    best = {name: min(x["cpu_s"] for x in found) for name, found in each.items()}
    yield against("1M Gaussians, CPU to final picture against PlayCanvas", 0.25, 0.2, best["page"], best.get("playcanvas"), "CPU-s")


@contextlib.contextmanager
def _near_page(b: Bench, server: Viewer, scene: Scene, idle: bool) -> Iterator[Callable[[], int]]:
    """The page in a browser of this machine; gives what says how many rows of updates it has got."""
    with Engine(idle) as e:
        tab = b.on_server(e.browser, server, scene)
        tab.run("window.rows = 0; const update = app.update.bind(app); app.update = (first, last, more) => { window.rows += last - first; update(first, last, more); }")
        yield lambda: tab.run("return window.rows")


# Where the page of a live run is.
WATCHED = {
    "a page elsewhere": lambda b, server, scene: far_page(server.port, server.gate.token),
    "a browser here that takes what is left": lambda b, server, scene: _near_page(b, server, scene, True),
    "a browser here as urgent as the run": lambda b, server, scene: _near_page(b, server, scene, False),
}


def live(b: Bench) -> Iterator[Row | dict]:
    """A run that changes all rows in each step, on one thread; blocks of it with and without copies for the viewer in turn. The page stays open in both.

    What the live view costs the run is with a page elsewhere: a stand-in, that takes and acknowledges. A browser on the same cores costs what any busy program does beside it.
    """
    found = {where: _beside_a_run(b, watched) for where, watched in WATCHED.items()}
    yield {where: {"costs": costs, "updates": updates} for where, (costs, updates) in found.items()}
    for where, (costs, updates) in found.items():
        # Neighbours, since a shared machine is not as fast from one minute to the next.
        slower = [float(np.median([w[i] / wo[i] - 1 for w, wo in zip(costs["with"], costs["without"])])) for i in (0, 1)]
        seconds = sum(x["seconds"] for x in updates)
        rate, copying = sum(x["rows"] for x in updates) / b.size.many / seconds, sum(x["copying"] for x in updates) / seconds
        judged = where == "a page elsewhere"
        yield Row(f"live update of {b.size.many:,} (SH degree 0) at 1 Hz, {where}: the run is slower by", "<= 2 %, at 0.9 updates/s or more" if judged else "", "",
                  f"{100 * slower[0]:+.1f} % wall, {100 * slower[1]:+.1f} % CPU of its thread, of which copies {100 * copying:.1f} %; {rate:.2f} whole updates/s arrive",
                  slower[0] <= 0.02 and rate >= 0.9 if judged and b.size is not QUICK else None)


def _beside_a_run(b: Bench, watched: Callable[[Bench, Viewer, Scene], AbstractContextManager[Callable[[], int]]]) -> tuple[dict[str, list[tuple[float, float]]], list[dict]]:
    """Wall and CPU seconds of a step in blocks with and without copies, and what came of the copies of each block."""
    shown, some, camera = Shown("run", SceneHeader(), live=True), b.many.rows(slice(0, 20_000)), b.camera()
    threads, moving = torch.get_num_threads(), b.many.replace(means=b.many.means.clone())
    torch.set_num_threads(1)
    costs: dict[str, list[tuple[float, float]]] = {"with": [], "without": []}
    updates = []
    with Viewer([shown]) as server:
        run = Live(shown, server.hand_over, rate=1.0)
        run.take(moving, 0, complete=True)
        with watched(b, server, moving) as arrived:
            time.sleep(min(3.0, b.size.block_s))     # it has the scene
            step = 0
            for k in range(2 * b.size.blocks):
                # First without, then with, then the other way round: what a machine drifts in between cancels.
                how, n, taken, rows, copying = ("without", "with", "with", "without")[k % 4], 0, run.taken, arrived(), 0.0
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
                    updates.append({"seconds": seconds, "steps": n, "taken": run.taken - taken, "copying": copying, "rows": arrived() - rows})
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
