"""Trains lift-tiny, the weights that come with splatkit, in stages of at most 45 minutes; each goes on from the weights in the repository alone.

    python3 scripts/reproduce/lift_tiny.py pilot           # a schedule of its own of --minutes 60: its curve goes to benchmarks/lift_tiny.json
    python3 scripts/reproduce/lift_tiny.py stage           # the next stage: as many steps as fit into --minutes 40; run it until it says that all is done
    python3 scripts/bench_lift_tiny.py --rooms 50          # how good the weights are

A stage starts from splatkit/lift/tiny.safetensors at the step that benchmarks/lift_tiny.json names (from nothing where there is none), and writes both anew:
commit them, and the next stage may run on another machine. Moments of the optimiser start afresh; its step size rises over the first hundred steps of a stage.
Two processes of one thread each, a sample each a step; --processes 1 with --batch 2 makes the same steps in one. Other flags go to `splatkit lift-train`:
on a card, --processes 1 --batch 32 --workers 14 --rooms 40000 --cache FOLDER.
"""
from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
WEIGHTS, FILE = ROOT / "splatkit" / "lift" / "tiny.safetensors", ROOT / "benchmarks" / "lift_tiny.json"
TRIAL = 20      # steps that are timed to know how many fit


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["pilot", "stage"])
    parser.add_argument("--minutes", type=float)
    parser.add_argument("--steps", type=int, default=14_000, help="of the whole schedule; 0: as many as fit into --minutes")
    parser.add_argument("--anew", action="store_true", help="a stage with a schedule of its own, as long as --minutes, from the weights there are")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--batch", type=int, default=1, help="samples a step of each process")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "lift-tiny")
    args, args.more = parser.parse_known_args()
    record = json.loads(FILE.read_text()) if FILE.is_file() else {}
    going_on = args.part == "stage" and WEIGHTS.is_file()
    done = record.get("step", 0) if going_on and not args.anew else 0
    if done >= args.steps > 0:
        print(f"all {args.steps} steps are done")
        return
    seconds = 60 * (args.minutes or {"pilot": 60, "stage": 40}[args.part])
    start = time.monotonic()
    per_step = timed(args)
    fit = max(1, int((seconds - (time.monotonic() - start)) / per_step))
    total = args.steps if args.part == "stage" and args.steps and not args.anew else done + fit
    last = min(total, done + fit)
    print(f"{per_step:.2f} s a step: steps {done} to {last} of {total}", flush=True)
    run = args.work / args.part
    shutil.rmtree(run, ignore_errors=True)
    begin = ["--begin", str(done), "--weights", str(WEIGHTS)] if going_on else []
    train(args, run, ["--steps", str(total), "--end", str(last), *begin])
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    held = [{k: round(x, 5) for k, x in line.items()} for line in lines if "held_psnr" in line]
    record = json.loads(FILE.read_text()) if FILE.is_file() else {}
    if args.part == "pilot":
        record["pilot"] = {"steps": total, "seconds": round(time.monotonic() - start), "samples_a_step": args.processes * args.batch, "flags": args.more, "curve": held}
    else:
        shutil.copy(run / "weights.safetensors", WEIGHTS)
        stage = {"from": done, "to": last, "seconds": round(time.monotonic() - start), "samples_a_step": args.processes * args.batch, "flags": args.more, "curve": held}
        record |= {"step": last, "steps": total, "stages": [*record.get("stages", []), stage]}
    FILE.parent.mkdir(exist_ok=True)
    FILE.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(held[-1]))


def timed(args) -> float:
    """Seconds that a step takes here, without the start."""
    run = args.work / "trial"
    shutil.rmtree(run, ignore_errors=True)
    train(args, run, ["--steps", str(2 * TRIAL), "--hold", "0"])
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return (lines[-1]["seconds"] - lines[0]["seconds"]) / (lines[-1]["step"] - lines[0]["step"])


def train(args, run: Path, flags: list[str]) -> None:
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(args.processes)] if args.processes > 1 else []
    command = [sys.executable, *start, "-m", "splatkit.cli", "lift-train", "--preset", "tiny", "-o", str(run), "--batch", str(args.batch), *args.more, *flags]
    environment = {**os.environ, "OMP_NUM_THREADS": "1" if args.processes > 1 else os.environ.get("OMP_NUM_THREADS", str(os.cpu_count() or 1)),
                   "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)}
    subprocess.run(command, env=environment, cwd=ROOT, check=True)


if __name__ == "__main__":
    main()
