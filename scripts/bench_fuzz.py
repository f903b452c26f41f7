"""Damaged scene files in our readers and in those of others: the same mutants, the same limits. Prints a table and writes benchmarks/fuzz.json.

    python scripts/bench_fuzz.py                    installs the peers into a cache folder first (pip and npm); 300 mutants of each real file
    python scripts/bench_fuzz.py --spz ~/spz        with Niantic's library too, compiled from a checkout of github.com/nianticlabs/spz (g++, zlib, zstd)
    python scripts/bench_fuzz.py --only splatkit plyfile        the other rows of the file stay

Needs the real files beside the project (SPLATKIT_DATA). Every reader runs in a process of its own, which is made anew after a crash or a trap of its WebAssembly, and killed
after 5 s or at 3 GB. Open3D's legacy reader is not asked for: it corrupts its heap as the tensor one does. Spark decodes as in its ExtSplats, in a worker thread of node.
"""
import argparse
import json
import os
import re
import select
import shutil
import subprocess
import sys
import tempfile
import time
import venv
from collections import Counter
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO / "tests"))

from mutants import mutants     # noqa: E402: of the tests' folder

SECONDS_MAX, BYTES_MAX, BYTES_KILLED = 5.0, 1 << 30, 3 << 30
FILES = ["guitar.compressed.ply", "monkey.sog", "playbot_lod4.ply", "playbot_lod4.v4.spz", "playbot_lod4.v3.spz", "playbot_lod4.c0.sh2.ksplat", "playbot_lod4.c1.sh1.ksplat",
         "playbot_lod4.splat", "inria_100_trailing_bytes.ply", "cube_ascii.ply", "cube_v2.spz"]
PIP = ["numpy", "plyfile==1.1.5", "gsply[spz]==0.4.6", "open3d>=0.19,<0.21"]
NPM = {"@playcanvas/splat-transform": "2.7.1", "@sparkjsdev/spark": "2.2.0", "three": "0.187.0"}
SERVE = r'''
import json, math, resource, sys, time, warnings
warnings.simplefilter("ignore")
import numpy as np
READ
print("ready", flush=True)
for line in sys.stdin:
    start, base = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        arrays = read(line.strip())
        n = len(arrays[0])
        said = "taken" if n and all(np.isfinite(np.asarray(a, float)).all() for a in arrays) else "not finite" if n else "empty"
    except CLEAN as e:
        said, n = "refused", 0
    except BaseException as e:
        said, n = "foreign", type(e).__name__
    print(json.dumps([said, n, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - base]), flush=True)
'''
READERS = {     # name: (what it opens, how it reads, what it means to raise)
    "splatkit": (r".*", "from splatkit.io import formats\nfrom splatkit.errors import BadFile\nread = lambda path: list(formats.read(path)[0].values())", "BadFile"),
    "plyfile": (r".*\.ply", "from plyfile import PlyData, PlyParseError\n"
                "def read(path):\n    v = PlyData.read(path)['vertex'].data\n    return [v[n] for n in v.dtype.names]", "PlyParseError"),
    "gsply": (r"(?!cube_ascii).*(\.ply|\.spz)", "import gsply\n"
              "def read(path):\n    d = gsply.plyread(path) if path.endswith('.ply') else gsply.read_spz(path)\n"
              "    return [np.asarray(getattr(d, n)) for n in ('means', 'scales', 'quats', 'opacities', 'sh0')]", "(ValueError, OSError)"),
    "Open3D tensor": (r".*(?<!compressed)(\.ply|\.splat|\.spz)", "import open3d as o3d\no3d.utility.set_verbosity_level(o3d.utility.VerbosityLevel.Error)\n"
                      "def read(path):\n    p = o3d.t.io.read_point_cloud(path).point\n    return [p[n].numpy() for n in p] or [np.zeros(0)]", "RuntimeError"),
    "splat-transform": (r".*", None, None),
    "Spark": (r"(?!cube_ascii)(?!.*\.v4\.).*", None, None),
    "spz": (r"(?!cube_ascii).*(?<!compressed)(\.ply|\.spz)", None, None),
}
NODE = r'''
import fs from "fs"; import readline from "readline";
console.log = console.warn = console.error = () => {};
const peak = () => Number(/VmHWM:\s+(\d+)/.exec(fs.readFileSync("/proc/self/status", "utf8"))[1]);
READ
process.stdout.write("ready\n");
for await (const path of readline.createInterface({ input: process.stdin })) {
  const base = peak();
  let said, n, finite;
  try {
    [n, finite] = await read(path.split("/").pop(), new Uint8Array(fs.readFileSync(path)));
    said = !n ? "empty" : finite ? "taken" : "not finite";
  } catch (why) {
    n = why?.constructor?.name ?? "";
    said = n === "RuntimeError" ? "crash" : n === "Error" ? "refused" : "foreign";       // the first: WebAssembly's, of a trap
  }
  process.stdout.write(JSON.stringify([said, n, peak() - base]) + "\n");
}
'''
NODE_READS = {
    "splat-transform": r'''
import { readFile, getInputFormat, MemoryReadFileSystem } from "@playcanvas/splat-transform";
async function read(name, bytes) {
  const fileSystem = new MemoryReadFileSystem();
  fileSystem.set(name, bytes);
  const [table] = await readFile({ filename: name, inputFormat: getInputFormat(name), options: { unbundled: false, lodSelect: [] }, params: [], fileSystem });
  return [table.numRows, table.columns.every((c) => c.data.every(Number.isFinite))];
}
''',
    # Its worker is a browser's: a thread of node gets the names that it uses, and what it throws goes over with its class, which a message does not keep.
    "Spark": r'''
import { Worker as Thread } from "worker_threads";
import { ExtSplats } from "@sparkjsdev/spark";
const SELF = `
const { parentPort } = require("worker_threads"), listeners = new Set();
globalThis.self = globalThis;
console.log = console.warn = console.error = () => {};
self.addEventListener = (kind, act) => kind === "message" && listeners.add(act);
self.removeEventListener = (kind, act) => listeners.delete(act);
self.postMessage = (m, o) => parentPort.postMessage(m.error === undefined ? m : { id: m.id, error: { threw: m.error?.constructor?.name ?? "?" } }, o?.transfer);
parentPort.on("message", (data) => [...listeners].forEach((act) => act({ data })));
`;
globalThis.Worker = class {
  constructor(url) {
    this.thread = new Thread(SELF + decodeURIComponent(url.slice(url.indexOf(",") + 1)), { eval: true });
    this.thread.on("message", (data) => this.onmessage({ data }));
  }
  postMessage(message, { transfer } = {}) { this.thread.postMessage(message, transfer); }
};
async function read(fileName, fileBytes) {
  const splats = new ExtSplats({ fileBytes, fileName });
  await splats.initialized.catch((why) => {
    throw why?.threw ? new ({ RuntimeError: WebAssembly.RuntimeError, Error, String: Error }[why.threw] ?? TypeError)() : why;
  });
  let finite = true;
  splats.forEachSplat((i, center, scales, quaternion, opacity, color) => {
    finite &&= [...center, ...scales, ...quaternion, opacity, color.r, color.g, color.b].every(Number.isFinite);
  });
  return [splats.numSplats, finite];
}
''',
}
SPZ = r'''
#include <sys/resource.h>
#include <cmath>
#include <iostream>
#include <typeinfo>
#include "load-spz.h"
static long peak() { rusage use; getrusage(RUSAGE_SELF, &use); return use.ru_maxrss; }
int main() {
    std::cout << "ready" << std::endl;
    for (std::string path; std::getline(std::cin, path);) {
        const long base = peak();
        std::string said = "taken", what = "0";
        try {
            const bool ply = path.size() > 4 && path.substr(path.size() - 4) == ".ply";
            const spz::GaussianCloud cloud = ply ? spz::loadSplatFromPly(path, {}) : spz::loadSpz(path, {});
            what = std::to_string(cloud.numPoints);
            if (!cloud.numPoints) said = "refused";     // as its README says of an empty cloud
            for (const auto *values : {&cloud.positions, &cloud.scales, &cloud.rotations, &cloud.alphas, &cloud.colors, &cloud.sh})
                for (float value : *values) if (!std::isfinite(value)) said = "not finite";
        } catch (const std::exception &why) {
            said = "foreign";
            what = typeid(why).name();
        }
        std::cout << "[\"" << said << "\", \"" << what << "\", " << peak() - base << "]" << std::endl;
    }
}
'''
COLUMNS = ["files", "crash", "hang", "over 1 GB", "refused", "foreign", "empty", "not finite", "cut and taken", "taken"]


class Worker:
    """A reader in a process of its own."""

    def __init__(self, command: list[str], folder: Path):
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=folder, bufsize=0,
                                        env={**os.environ, "PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"})
        if self.process.stdout.readline() != b"ready\n":
            raise SystemExit(f"a reader does not start: {' '.join(command)[:300]}")

    def read(self, path: Path, seconds: float = SECONDS_MAX) -> tuple[str, object, int]:
        self.process.stdin.write(f"{path}\n".encode())
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if select.select([self.process.stdout], [], [], 0.05)[0]:
                line = self.process.stdout.readline()
                if not line:
                    return "crash", self.process.wait(), 0
                if line.startswith(b'["'):      # else something that a library prints
                    return tuple(json.loads(line))
            if self.resident() > BYTES_KILLED:
                return "over 1 GB", "killed at 3 GB", 0
        return "hang", None, 0

    def resident(self) -> int:
        try:
            return int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        except OSError:
            return 0

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


def started(name: str, peers: Path | None, spz: Path | None) -> tuple[list[str], str]:
    """How a reader is started here, and the version of a peer. Installs or compiles it where it is not; raises LookupError where it cannot be had."""
    _, read, clean = READERS[name]
    if name == "splatkit":
        return [sys.executable, "-c", SERVE.replace("READ", read, 1).replace("CLEAN", clean)], ""
    if peers is None:
        raise LookupError("--peers none")
    peers.mkdir(parents=True, exist_ok=True)
    if name == "spz":
        return compiled(peers, spz)
    if name in NODE_READS:
        package = "@sparkjsdev/spark" if name == "Spark" else "@playcanvas/splat-transform"
        if not shutil.which("npm"):
            raise LookupError("npm is absent")
        if not (peers / "node_modules" / package).exists():
            subprocess.run(["npm", "install", "--no-save", "--ignore-scripts", "--no-audit", "--no-fund", *(f"{n}@{v}" for n, v in NPM.items())], cwd=peers, check=True, stdout=sys.stderr)
        (peers / f"{name}.mjs").write_text(NODE.replace("READ", NODE_READS[name], 1))
        return ["node", str(peers / f"{name}.mjs")], json.loads((peers / "node_modules" / package / "package.json").read_text())["version"]
    if not (peers / "bin" / "python").exists():
        venv.create(peers, with_pip=True)
        subprocess.run([peers / "bin" / "pip", "install", "-q", *PIP], check=True, stdout=sys.stderr)
    python = str(peers / "bin" / "python")
    said = subprocess.run([python, "-c", f"import importlib.metadata as m; print(m.version({name.split()[0].lower()!r}))"], capture_output=True, text=True, check=True).stdout.strip()
    return [python, "-c", SERVE.replace("READ", read, 1).replace("CLEAN", clean)], said


def compiled(peers: Path, spz: Path | None) -> tuple[list[str], str]:
    """Niantic's library behind the lines of a Worker."""
    if spz is None:
        raise LookupError("no --spz, a checkout of github.com/nianticlabs/spz")
    if not (spz / "src" / "cc" / "load-spz.cc").exists():
        raise LookupError(f"{spz} has no src/cc/load-spz.cc: no checkout of github.com/nianticlabs/spz")
    (peers / "spz.cc").write_text(SPZ)
    subprocess.run(["g++", "-std=c++17", "-O2", "-I", spz / "src" / "cc", peers / "spz.cc", *sorted((spz / "src" / "cc").glob("*.cc")), "-lz", "-lzstd", "-o", peers / "spz-reader"], check=True)
    number = re.search(r"VERSION (\d+\.\d+\.\d+)", (spz / "CMakeLists.txt").read_text())[1]
    commit = subprocess.run(["git", "-C", spz, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    return [str(peers / "spz-reader")], f"{number} {commit}".strip()


def tried(name: str, command: list[str], data: Path, count: int, seed: int, folder: Path) -> Counter:
    """What became of `count` mutants of every file that the reader opens, and of the file itself."""
    total, worker = Counter(), Worker(command, folder)
    try:
        for number, file in enumerate(FILES):
            if not re.fullmatch(READERS[name][0], file):
                continue
            whole, suffix = (data / file).read_bytes(), "".join(Path(file).suffixes[-2:] if "compressed" in file else Path(file).suffixes[-1:])
            path = folder / f"m{suffix}"
            path.write_bytes(whole)
            said, n, _ = worker.read(path, 60)      # some compile themselves first
            if said != "taken":
                print(f"{name}: {file} itself is {said} ({n})", file=sys.stderr)
                total["good files not read"] += 1

            def again():
                worker.end()
                fresh = Worker(command, folder)
                (folder / f"good{suffix}").write_bytes(whole)
                fresh.read(folder / f"good{suffix}", 60)
                return fresh
            if said in ("crash", "hang", "over 1 GB"):
                worker = again()
            for mutant in mutants(whole, count, seed * 1000 + number):
                path.write_bytes(mutant)
                said, what, grown = worker.read(path)
                ended = said in ("crash", "hang", "over 1 GB")
                if not ended and grown * 1024 > BYTES_MAX:
                    said = "over 1 GB"
                elif said == "taken" and len(mutant) < len(whole) and whole.startswith(mutant) and not (suffix == ".splat" and len(mutant) % 32 == 0):
                    if not file.startswith("inria"):        # bytes after its data may go
                        said = "cut and taken"
                total[said] += 1
                total["files"] += 1
                if ended or grown * 1024 > BYTES_MAX:       # what it holds now would hide the next one
                    worker = again()
    finally:
        worker.end()
    return total


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mutants", type=int, default=300, help="of each real file")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", nargs="+", choices=READERS)
    parser.add_argument("--peers", default="~/.cache/splatkit/fuzz-peers", help="where the peers are or are installed; none: without them")
    parser.add_argument("--spz", type=Path, help="a checkout of github.com/nianticlabs/spz; without it that reader is left out")
    parser.add_argument("--output", type=Path, default=REPO / "benchmarks" / "fuzz.json")
    options = parser.parse_args()
    data = Path(os.environ.get("SPLATKIT_DATA") or REPO.parent / "shared" / "data") / "splats"
    peers = None if options.peers == "none" else Path(options.peers).expanduser().resolve()
    result = {"mutants": options.mutants, "seed": options.seed, "versions": {}, "readers": {}}
    before = json.loads(options.output.read_text()) if options.output.exists() else {}
    same = (before.get("mutants"), before.get("seed")) == (options.mutants, options.seed)
    if options.only and same:
        result |= before
    print(f"| reader | {' | '.join(COLUMNS)} |\n|{'---|' * (len(COLUMNS) + 1)}")
    for name in options.only or READERS:
        try:
            command, number = started(name, peers, options.spz and options.spz.expanduser().resolve())
        except LookupError as why:
            print(f"{name} is left out: {why}", file=sys.stderr)
            if same and name in before["readers"]:      # what is known of it stays
                result["readers"][name], result["versions"][name] = before["readers"][name], before["versions"].get(name, "")
            continue
        with tempfile.TemporaryDirectory() as folder:
            total = tried(name, command, data, options.mutants, options.seed, Path(folder))
        result["readers"][name], result["versions"][name] = dict(total), number or "this one"
        print(f"| {f'{name} {number}'.strip()} | {' | '.join(str(total[column]) for column in COLUMNS)} |", flush=True)
    options.output.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
