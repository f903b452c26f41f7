"""Held-out PSNR and wall time of `splatkit reconstruct --preset quick` per capture and seed; writes benchmarks/reconstruct.json.

    python3 scripts/bench_reconstruct.py [--captures plush] [--seeds 0 1 2] [--data ../shared/data]

Each run is a process of its own; seconds count from its start to its end, evaluation included.
"""
from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--captures", nargs="+", default=["plush"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--preset", default="quick")
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("SPLATKIT_DATA", ROOT.parent / "shared" / "data")))
    args = parser.parse_args()
    rows = []
    print("| capture | seed | PSNR dB | lowest, highest photo | SSIM | Gaussians | seconds | CPU seconds |\n|---|---|---|---|---|---|---|---|")
    for capture in args.captures:
        for seed in args.seeds:
            with tempfile.TemporaryDirectory() as run:
                wall, cpu = time.monotonic(), _children_cpu()
                subprocess.run([sys.executable, "-m", "splatkit.cli", "reconstruct", str(args.data / capture), "-o", run, "--preset", args.preset, "--seed", str(seed)],
                               check=True, capture_output=True)
                wall, cpu = time.monotonic() - wall, _children_cpu() - cpu
                result = json.loads((Path(run) / "eval" / "metrics.json").read_text())
            photos = [p["psnr"] for p in result["photos"].values()]
            rows.append({"capture": capture, "seed": seed, "preset": args.preset, "seconds": wall, "cpu_seconds": cpu, **result})
            print(f"| {capture} | {seed} | {result['psnr']:.2f} | {min(photos):.2f}, {max(photos):.2f} | {result['ssim']:.4f} | {result['gaussians']:,} | {wall:.1f} | {cpu:.1f} |", flush=True)
        values = [r["psnr"] for r in rows if r["capture"] == capture]
        if len(values) > 1:
            print(f"{capture}: mean {statistics.mean(values):.2f} dB, standard deviation {statistics.stdev(values):.2f} dB over {len(values)} seeds")
    (ROOT / "benchmarks" / "reconstruct.json").write_text(json.dumps(rows, indent=1) + "\n")


def _children_cpu() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


if __name__ == "__main__":
    main()
