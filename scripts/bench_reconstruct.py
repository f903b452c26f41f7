"""What `splatkit reconstruct` reaches: held-out PSNR, Gaussians, seconds and memory; writes benchmarks/reconstruct.json.

    python3 scripts/bench_reconstruct.py presets --preset cpu --captures plush --seeds 0 1 2
    python3 scripts/bench_reconstruct.py bare          # plush and banana as bare folders: registered photos, and the run on them
    python3 scripts/bench_reconstruct.py optimisers    # AdamW-GS against Adam: ADC at three thresholds, three seeds, three captures
    python3 scripts/bench_reconstruct.py ablation      # the rows between them, and MCMC at equal cap
    python3 scripts/bench_reconstruct.py refine        # schedules of several lengths from sparse points and from `splatkit lift`: seconds to the same PSNR
    python3 scripts/bench_reconstruct.py tables        # prints what the file holds

Each run is a process of its own; seconds count from its start to its end, evaluation included. Runs that the file already holds are not
done again (--again does); --jobs 2 runs two at a time with one thread each, where seconds are not the point.
"""
from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FILE = ROOT / "benchmarks" / "reconstruct.json"
CAPTURES = ("plush", "banana", "street")
BARE = {"plush": "plush/distorted/images", "banana": "banana/images"}

# Small photos and no opacity reset, so that 54 runs of 7000 steps take less than an hour.
COMPARED = ["--preset", "cpu", "--max-side", "160", "--steps", "7000", "--coarse-fraction", "0", "--dropout", "0", "--max-gaussians", "100000", "--save-every", "7000"]
ADC = ["--densification", "adc", "--adc.grad-threshold"]
SPARSE, DAR, RSR = ["--adamw.sparse", "--adc.clone-opacity-correction"], ["--adamw.attribute-decay"], ["--adamw.state-decay"]
MCMC = ["--densification", "mcmc", "--mcmc.init-scale", "0.1", "--max-gaussians", "12000"]
OPTIMISERS = {"Adam": [], "AdamW-GS": [*SPARSE, *DAR, *RSR]}
ROWS = {**OPTIMISERS, "Sparse": SPARSE, "Sparse + DAR": [*SPARSE, *DAR], "Sparse + RSR": [*SPARSE, *RSR]}
REFINED = {"points": ("1000", "2000", "4000", "8000"), "lifted": ("500", "1000", "2000", "4000")}      # steps from each start
CAP, BELOW = "40000", 0.5       # Gaussians of both; dB below the longest run from points, which is the target
MCMC_ROWS = {"MCMC, Adam": MCMC, "MCMC, AdamW-GS": [*MCMC, *SPARSE[:1], *DAR, *RSR, "--mcmc.opacity-reg", "0", "--mcmc.scale-reg", "0"]}
THRESHOLDS = ("1e-3", "2e-3", "4e-3")
DEAD = 1 / 255      # opacity

_lock = threading.Lock()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["presets", "bare", "optimisers", "ablation", "refine", "tables"])
    parser.add_argument("--captures", nargs="+")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--preset", default="cpu")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("SPLATKIT_DATA", ROOT.parent / "shared" / "data")))
    args = parser.parse_args()
    runs = {"presets": _presets, "bare": _bare, "optimisers": _optimisers, "ablation": _ablation, "refine": _refine, "tables": lambda args: []}[args.part](args)
    known = {} if args.again else {json.dumps(row["run"]) for row in _rows()}
    todo = [run for run in runs if json.dumps(run) not in known]
    with ThreadPoolExecutor(args.jobs) as pool:
        for row in pool.map(lambda run: _done(run, args), todo):
            print(f"{row['run']}: {row['psnr']:.2f} dB, {row['gaussians']:,} Gaussians, {row['seconds']:.0f} s", flush=True)
    _print_tables(_rows())


def _presets(args) -> list[dict]:
    return [{"part": "presets", "capture": c, "seed": s, "flags": ["--preset", args.preset]} for c in args.captures or ["plush"] for s in args.seeds]


def _bare(args) -> list[dict]:
    return [{"part": "bare", "capture": c, "seed": s, "flags": ["--preset", "cpu"]} for c in args.captures or BARE for s in args.seeds]


def _optimisers(args) -> list[dict]:
    return [{"part": "optimisers", "capture": c, "seed": s, "name": name, "threshold": t, "flags": [*COMPARED, *ADC, t, *flags]}
            for s in args.seeds for c in args.captures or CAPTURES for t in THRESHOLDS for name, flags in OPTIMISERS.items()]


def _ablation(args) -> list[dict]:
    adc = [{"part": "optimisers", "capture": c, "seed": s, "name": name, "threshold": "1e-3", "flags": [*COMPARED, *ADC, "1e-3", *flags]}
           for s in args.seeds for c in args.captures or CAPTURES for name, flags in ROWS.items()]
    return adc + [{"part": "mcmc", "capture": c, "seed": s, "name": name, "flags": [*COMPARED, *flags]}
                  for s in args.seeds for c in args.captures or CAPTURES for name, flags in MCMC_ROWS.items()]


def _refine(args) -> list[dict]:
    return [{"part": "refine", "capture": c, "seed": 0, "start": start, "flags": ["--preset", "cpu", "--dropout", "0", "--mcmc.init-scale", "0.1", "--steps", steps, "--max-gaussians", CAP] if start == "points" else
             ["--check", "--refine", steps, "--max-gaussians", CAP]} for c in args.captures or ("plush", "banana") for start, lengths in REFINED.items() for steps in lengths]


def _command(run: dict, data: Path, folder: str) -> list[str]:
    """What makes folder/run, or folder/run-refined, which stands for it."""
    if run.get("start") == "lifted":
        return ["lift", "--cameras", str(data), "-o", f"{folder}/run.ply", *run["flags"]]
    return ["reconstruct", str(data), "-o", f"{folder}/run", "--seed", str(run["seed"]), *run["flags"]]


def _done(run: dict, args) -> dict:
    """The run's row, written to the file as soon as it is there."""
    data = args.data / (BARE[run["capture"]] if run["part"] == "bare" else run["capture"])
    with tempfile.TemporaryDirectory() as folder:
        start, environment = time.monotonic(), {**os.environ, **({"OMP_NUM_THREADS": "1"} if args.jobs > 1 else {})}
        with open(Path(folder) / "log", "w+") as log:
            child = subprocess.Popen([sys.executable, "-m", "splatkit.cli", *_command(run, data, folder)], stdout=log, stderr=log, env=environment, cwd=ROOT)
            peak = _peak_until_the_end(child.pid)
            _, status, usage = os.wait4(child.pid, 0)
            child.returncode = os.waitstatus_to_exitcode(status)
            seconds = time.monotonic() - start
            if child.returncode:
                log.seek(0)
                raise SystemExit(f"{run} failed:\n{log.read()[-2000:]}")
        made = Path(folder) / ("run-refined" if run.get("start") == "lifted" else "run")
        result = json.loads((made / "eval" / "metrics.json").read_text())
        row = {"run": run, "psnr": result["psnr"], "ssim": result["ssim"], "gaussians": result["gaussians"], "photos": {n: p["psnr"] for n, p in result["photos"].items()},
               "seconds": round(seconds, 1), "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 1), "peak_mib": peak, "threads": 1 if args.jobs > 1 else os.cpu_count(),
               **_of_scene(made, run, args)}
    with _lock:
        rows = [other for other in _rows() if other["run"] != run] + [row]
        FILE.write_text("[\n" + ",\n".join(json.dumps(r) for r in rows) + "\n]\n")
    return row


def _peak_until_the_end(pid: int) -> int:
    """MiB that were resident at most, of a child that is not waited for yet. What the kernel says of one that has ended counts its parent's memory too, from before its exec."""
    peak = 0
    while os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        peak = max([peak, *(int(line.split()[1]) // 1024 for line in lines if line.startswith("VmHWM:"))])
        time.sleep(0.1)
    return peak


def _of_scene(run_folder: Path, run: dict, args) -> dict:
    """What eval/ does not say: the share of Gaussians that are all but invisible, PSNR at the photos' full size, registered photos."""
    import torch

    from splatkit import config, io
    from splatkit.evaluation import evaluate

    scene, _ = io.load(run_folder / "scene.ply")
    found: dict = {"dead_share": round(float((torch.sigmoid(scene.logit_opacities) < DEAD).float().mean()), 4)}
    if run["part"] == "bare":
        from splatkit.io.source import load_source
        capture, _ = load_source(args.data / BARE[run["capture"]], run_folder, 1)
        found["registered"] = len(capture.photos)
        found["offered"] = sum(p.is_file() for p in (args.data / BARE[run["capture"]]).iterdir())
    if run["part"] == "presets":
        import dataclasses
        settings = config.load_yaml(run_folder / "config.yaml", config.Reconstruct)
        config.save(dataclasses.replace(settings, max_side=0, downscale=1), run_folder / "config.yaml")
        found["psnr_full_size"] = evaluate(run_folder).psnr
    return found


def _rows() -> list[dict]:
    return json.loads(FILE.read_text()) if FILE.exists() else []


def _mean(values: list[float]) -> str:
    return f"{statistics.mean(values):.2f}" + (f" +-{statistics.stdev(values) / math.sqrt(len(values)):.2f}" if len(values) > 1 else "")


def _print_tables(rows: list[dict]) -> None:
    of = lambda part: [r for r in rows if r["run"]["part"] == part]
    if of("presets") or of("bare"):
        print("\n| capture | preset | seed | PSNR dB | lowest, highest photo | at full size | SSIM | Gaussians | seconds | CPU seconds | peak MiB | registered |\n" + "|---" * 12 + "|")
    for r in of("presets") + of("bare"):
        run, photos = r["run"], r["photos"].values()
        registered = f"{r['registered']} of {r['offered']}" if "registered" in r else ""
        full = f"{r['psnr_full_size']:.2f}" if "psnr_full_size" in r else ""
        print(f"| {run['capture']}{' (bare)' * (run['part'] == 'bare')} | {run['flags'][1]} | {run['seed']} | {r['psnr']:.2f} | {min(photos):.2f}, {max(photos):.2f} | {full} | {r['ssim']:.4f} | "
              f"{r['gaussians']:,} | {r['seconds']:.0f} | {r['cpu_seconds']:.0f} | {r['peak_mib'] or ''} | {registered} |")
    if compared := of("optimisers"):
        print("\n| capture | threshold | Adam: PSNR dB, Gaussians | AdamW-GS: PSNR dB, Gaussians |\n|---|---|---|---|")
        for capture in CAPTURES:
            for t in THRESHOLDS:
                cells = []
                for name in OPTIMISERS:
                    some = [r for r in compared if (r["run"]["capture"], r["run"]["threshold"], r["run"]["name"]) == (capture, t, name)]
                    cells.append(f"{_mean([r['psnr'] for r in some])}, {statistics.mean(r['gaussians'] for r in some):,.0f}" if some else "")
                print(f"| {capture} | {t} | {cells[0]} | {cells[1]} |")
        differences = {c: d for c in CAPTURES if (d := _at_equal_count([r for r in compared if r["run"]["capture"] == c]))}
        for capture, d in differences.items():
            print(f"{capture}: AdamW-GS - Adam at equal count {_mean(d)} dB over {len(d)} seeds")
        if len(differences) > 1:
            print(f"mean over captures: {statistics.mean(statistics.mean(d) for d in differences.values()):+.2f} dB")
        print("\n| ablation at 1e-3 | " + " | ".join(CAPTURES) + " |\n|---|---|---|---|")
        for name in ROWS:
            _print_row(name, [r for r in compared if r["run"]["name"] == name and r["run"]["threshold"] == "1e-3"])
    if refined := of("refine"):
        print(f"\n| capture | start | steps: PSNR dB in seconds | seconds to {BELOW} dB below the longest run from points |\n|---|---|---|---|")
        for capture in dict.fromkeys(r["run"]["capture"] for r in refined):
            found = {(r["run"]["start"], steps): (r["seconds"], r["psnr"]) for r in refined if r["run"]["capture"] == capture for steps in r["run"]["flags"]}
            runs = {start: [found[start, steps] for steps in lengths if (start, steps) in found] for start, lengths in REFINED.items()}
            if all(len(x) == len(REFINED[start]) for start, x in runs.items()):
                needed = {start: _seconds_to(runs["points"][-1][1] - BELOW, x) for start, x in runs.items()}
                for start, x in runs.items():
                    print(f"| {capture} | {start} | " + ", ".join(f"{steps}: {value:.2f} in {t:.0f}" for steps, (t, value) in zip(REFINED[start], x)) + f" | {needed[start]:.0f} |")
                print(f"{capture}: {needed['lifted'] / needed['points']:.2f} of the time from points")
    for name in MCMC_ROWS:
        _print_row(name, [r for r in of("mcmc") if r["run"]["name"] == name])


def _print_row(name: str, rows: list[dict]) -> None:
    cells = []
    for capture in CAPTURES:
        some = [r for r in rows if r["run"]["capture"] == capture]
        cells.append(f"{_mean([r['psnr'] for r in some])}, {statistics.mean(r['gaussians'] for r in some):,.0f}, dead {statistics.mean(r['dead_share'] for r in some):.1%}" if some else "")
    if any(cells):
        print(f"| {name} | " + " | ".join(cells) + " |")


def _at_equal_count(rows: list[dict]) -> list[float]:
    """Per seed: the mean over AdamW-GS's runs of its PSNR less Adam's at the same count, read off Adam's curve (linear in log count, ends prolonged)."""
    found = []
    for seed in sorted({r["run"]["seed"] for r in rows}):
        curve = {name: sorted((math.log(r["gaussians"]), r["psnr"]) for r in rows if r["run"]["seed"] == seed and r["run"]["name"] == name) for name in OPTIMISERS}
        if len(curve["Adam"]) < 2 or not curve["AdamW-GS"]:
            continue
        found.append(statistics.mean(value - _read_off(curve["Adam"], at) for at, value in curve["AdamW-GS"]))
    return found


def _seconds_to(psnr: float, runs: list[tuple[float, float]]) -> float:
    """By runs of several lengths, shortest first: where their PSNR passes `psnr`, linear in log seconds; those of the first where it is enough; infinite where none is."""
    before = None
    for seconds, value in runs:
        if value >= psnr:
            return seconds if before is None else math.exp(_read_off([(before[1], math.log(before[0])), (value, math.log(seconds))], psnr))
        before = seconds, value
    return math.inf


def _read_off(curve: list[tuple[float, float]], at: float) -> float:
    i = max(1, min(len(curve) - 1, sum(x < at for x, _ in curve)))
    (x0, y0), (x1, y1) = curve[i - 1], curve[i]
    return y0 + (y1 - y0) * (at - x0) / (x1 - x0)


if __name__ == "__main__":
    main()
