"""How fast scene files are read, written and converted: one scene in every format. Prints a table and writes benchmarks/formats.json.

    python scripts/bench_formats.py                     1,000,000 Gaussians of SH degree 3
    python scripts/bench_formats.py --gaussians 100000 --rounds 1

Seconds are minima over rounds, with the files in the page cache; peak memory is that of a process of its own, the interpreter included.
"""
import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))

from splatkit.header import SceneHeader         # noqa: E402: of this checkout
from splatkit.io import formats                 # noqa: E402

FILES = [("s.ply", {}), ("s.compressed.ply", {}), ("s.splat", {}), ("2.spz", {"version": 2}), ("3.spz", {"version": 3}), ("4.spz", {"version": 4}), ("0.ksplat", {"level": 0}),
         ("1.ksplat", {"level": 1}), ("2.ksplat", {"level": 2}), ("s.sog", {}), ("s.glb", {}), ("s.safetensors", {})]
CONVERSIONS = [("s.ply", "c.ply", []), ("s.ply", "c.ply", ["--filter", "opacity>0.1", "--sh-degree", "1"]), ("s.ply", "c.splat", []), ("s.splat", "c.ply", []), ("s.ply", "c.ply", ["--max-gaussians", "500000"])]


def scene(n: int) -> dict:
    """Numbers spread as trained scenes spread them: positions in clusters, SH that fall with their degree."""
    rng = np.random.default_rng(0)
    r = lambda *shape: rng.standard_normal(shape, np.float32)
    sh = r(n, 16, 3) * np.float32(0.1)
    sh[:, 0] *= 10
    means = r(200, 3)[rng.integers(0, 200, n)] * 4 + r(n, 3) * np.float32(0.5)
    return {"means": means, "quats": r(n, 4), "log_scales": r(n, 3) - 5, "logit_opacities": 2 * r(n), "sh": sh}


def least(rounds: int, act) -> float:
    """Seconds of the fastest of so many."""
    best = float("inf")
    for _ in range(rounds):
        start = time.perf_counter()
        act()
        best = min(best, time.perf_counter() - start)
    return best


def page_cache_seconds(path: Path, rounds: int) -> float:
    """Reading the file into fresh memory with nothing else done."""
    return least(rounds, path.read_bytes)


def alone(*command) -> tuple[float, float]:
    """(seconds, peak MB) of a command of splatkit in a process of its own."""
    # VmHWM: what getrusage says of a child begins with what its parent held.
    program = ("import sys; from splatkit.cli import main; code = main(sys.argv[1:]); "
               "print(next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')), file=sys.stderr); sys.exit(code)")
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", program, *map(str, command)], capture_output=True, text=True, cwd=REPO, check=True)
    return time.perf_counter() - start, int(done.stderr.split()[-1]) * 1024 / 1e6


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gaussians", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="+", help="file names, as 3.spz")
    parser.add_argument("--output", type=Path, default=REPO / "benchmarks" / "formats.json")
    options = parser.parse_args()
    fields, header = scene(options.gaussians), SceneHeader()
    result = {"gaussians": options.gaussians, "sh_degree": 3, "rounds": options.rounds, "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} processors",
              "load": os.getloadavg()[0], "formats": {}, "convert": []}
    with tempfile.TemporaryDirectory() as folder:
        print("| file | MB | bytes a Gaussian | written in s | read in s | read, MB/s | of the page cache's rate |\n|---|---|---|---|---|---|---|")
        for name, settings in FILES:
            if options.only and name not in options.only:
                continue
            path = Path(folder) / name
            wrote = least(1 if name.endswith(".sog") else options.rounds, lambda: formats.write(path, fields, header, **settings))
            size = path.stat().st_size
            read, cache = least(options.rounds, lambda: formats.read(path)), page_cache_seconds(path, options.rounds)
            result["formats"][name] = {"bytes": size, "write_s": wrote, "read_s": read, "page_cache_s": cache}
            print(f"| {name} | {size / 1e6:.1f} | {size / options.gaussians:.1f} | {wrote:.2f} | {read:.3f} | {size / read / 1e6:.0f} | {cache / read:.2f} |", flush=True)
        info = least(options.rounds, lambda: alone("info", Path(folder) / "s.ply")) if not options.only or "s.ply" in options.only else None
        result["info_s"] = info
        print(f"\nsplatkit info on the PLY: {info and round(info, 2)} s\n\n| conversion | s | MB/s of input | peak MB |\n|---|---|---|---|")
        for source, target, flags in CONVERSIONS:
            if not (Path(folder) / source).exists():
                continue
            size = (Path(folder) / source).stat().st_size
            seconds, peak = min((alone("convert", Path(folder) / source, Path(folder) / target, *flags) for _ in range(options.rounds)))
            result["convert"].append({"from": source, "to": target, "flags": flags, "s": seconds, "MB_per_s": size / seconds / 1e6, "peak_MB": peak})
            print(f"| {source} to {target} {' '.join(flags)} | {seconds:.2f} | {size / seconds / 1e6:.0f} | {peak:.0f} |", flush=True)
    options.output.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
