"""What one pass of the lifting network takes on this CPU: CPU seconds, and memory by stage; writes benchmarks/lift.json.

    python3 scripts/bench_lift.py                    # 256x256 and 576x880, two views, the published network and the small one
    python3 scripts/bench_lift.py --sizes 256x256

Weights are random: time and memory do not depend on them. Each size is a process of its own, with one thread. Memory is what the process
holds at most beyond what it held before the pass, with the network loaded. The published code took 5.2 CPU seconds and 1.25 GiB at
256x256 on a machine of 270 GFLOP/s (multiply-adds in registers, one core); seconds are compared after scaling by that peak.
"""
from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FILE = ROOT / "benchmarks" / "lift.json"
PUBLISHED = {"CPU s": 5.2, "GiB": 1.25, "GFLOP/s": 270.0}
MUST = {"256x256": 0.7, "880x576": 1.5}         # GiB


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["256x256", "880x576"], metavar="WIDTHxHEIGHT")
    parser.add_argument("--networks", nargs="+", default=["mvsplat", "tiny"])
    parser.add_argument("--one", nargs=2, metavar=("NETWORK", "SIZE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args.one[0], *map(int, args.one[1].split("x")))))
        return
    rows = []
    for network in args.networks:
        for size in args.sizes:
            done = subprocess.run([sys.executable, __file__, "--one", network, size], capture_output=True, text=True, cwd=ROOT)
            if done.returncode:
                sys.exit(done.stderr)
            rows.append(json.loads(done.stdout.splitlines()[-1]))
            print(line(rows[-1]), flush=True)
    FILE.write_text(json.dumps({"machine": processor(), "published": PUBLISHED, "rows": rows}, indent=1) + "\n")


def measure(network: str, width: int, height: int) -> dict:
    import torch

    from splatkit import native
    from splatkit.lift.config import CONFIGS
    from splatkit.lift.model import MVSplat

    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = MVSplat(CONFIGS[network]).requires_grad_(False)
    images = torch.rand(1, 2, 3, height, width)
    K = torch.tensor([[0.9 * width, 0, width / 2], [0, 0.9 * width, height / 2], [0, 0, 1]]).repeat(1, 2, 1, 1)
    poses = torch.eye(4).repeat(1, 2, 1, 1)
    poses[0, 1, 0, 3] = -0.3
    inputs = images, K, poses, torch.ones(1, 2), torch.full((1, 2), 100.0)
    small = torch.rand(1, 2, 3, 32, 32), *inputs[1:]
    model(*small)       # what libraries allocate once
    p, stages, open_ = model.depth_predictor, {}, []
    named = {"CNN": model.backbone.backbone, "transformer": model.backbone.transformer, "cost volume and its U-Net": p.corr_refine_net[3], "depth head": p.depth_head_lowres,
             "refinement U-Net": p.refine_unet[3]}
    before = status("VmRSS")
    for name, module in named.items():
        def enter(module, taken):
            reset_peak()
            open_.append(time.process_time())
        def leave(module, taken, given, name=name):
            stages[name] = {"CPU s": round(time.process_time() - open_.pop(), 3), "GiB": round(status("VmHWM") - before, 3)}
            reset_peak()
        module.register_forward_pre_hook(enter)
        module.register_forward_hook(leave)
    peaks = [native.cpu_library(torch.float32).sk_fma_peak(1, 0.005) for _ in range(20)]
    start = time.process_time()
    model(*inputs)
    seconds = time.process_time() - start
    stages["heads and Gaussians"] = {"GiB": round(status("VmHWM") - before, 3)}
    peaks += [native.cpu_library(torch.float32).sk_fma_peak(1, 0.005) for _ in range(20)]
    return {"network": network, "size": f"{width}x{height}", "views": 2, "CPU s": round(seconds, 2), "GiB": max(s["GiB"] for s in stages.values()), "GFLOP/s": round(max(peaks), 1), "stages": stages}


def reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def status(key: str) -> float:
    """GiB."""
    return int(re.search(rf"{key}:\s*(\d+)", Path("/proc/self/status").read_text())[1]) / 2 ** 20


def line(row: dict) -> str:
    allowed = PUBLISHED["CPU s"] * PUBLISHED["GFLOP/s"] / row["GFLOP/s"]
    limits = f"; must: {MUST[row['size']]} GiB" if row["size"] in MUST else ""
    limits += f", {allowed:.1f} CPU s at this machine's {row['GFLOP/s']:.0f} GFLOP/s" if row["size"] == "256x256" else ""
    stages = ", ".join(f"{name} {s['GiB']:.2f}" for name, s in row["stages"].items())
    return f"{row['network']} {row['size']}: {row['CPU s']:.2f} CPU s, {row['GiB']:.2f} GiB ({stages}){limits}"


def processor() -> str:
    return re.search(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text())[1]


if __name__ == "__main__":
    main()
