"""Does geometry teach a backbone to match across views? Distillation on procedural rooms against controls, from one small pre-trained ViT.

Stages, each of which goes on where it was stopped: pretrain, ceiling, train, probe, tables. Each ends by itself after --minutes with exit code 3 where there is more to do.
Rows start from the same weights and take the same number of steps on the same target photos; they differ in the label alone:
snd (features through Gaussians at the true depth), snd-blended (the same, blended within objects), control (the moving teacher's own features of the target photo: no
geometry), wrong (depth of another pair), fit3d (after FiT3D: features fitted to five photos, a frozen teacher, L1), mef (after MEF: features of one point agree).
"""
import argparse
import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

from splatkit import config as configs
from splatkit.distill.config import BackboneConfig, DataConfig, Distill
from splatkit.distill.probes import bootstrap

ROOT = Path(__file__).resolve().parents[2]
COMMITTED = ROOT / "benchmarks" / "distill_rooms"       # vit.safetensors, results.json, table.md and pictures
ROWS = ("snd", "snd-blended", "control", "wrong", "fit3d", "mef")
COMPARED = (("snd", "control"), ("snd", "wrong"), ("snd", "untouched"), ("snd-blended", "control"), ("snd", "fit3d"), ("snd", "mef"))
NUMBERS = {"correspondence": ("recall", 1), "depth": ("rmse", -1), "normals": ("rmse_degrees", -1), "segmentation": ("mean_iou", 1)}      # 1: more is better
UNFINISHED = 3


def settings(row: str, seed: int, asked: argparse.Namespace) -> Distill:
    base = configs.load_yaml(ROOT / "configs" / "distill" / "rooms_vit.yaml", Distill(data=DataConfig(rooms=1)))
    base = dataclasses.replace(base, output=asked.output / f"{row}-{seed}", seed=seed, steps=asked.steps, device=asked.device, backbone=BackboneConfig(name="", weights=str(weights(asked))),
                               data=dataclasses.replace(base.data, rooms=asked.rooms, cache=asked.output / "rooms"))
    part = lambda name, **changes: {name: dataclasses.replace(getattr(base, name), **changes)}
    changes = {"snd": {}, "snd-blended": part("label", blend=0.5), "control": {"method": "self"}, "wrong": part("geometry", permuted=True), "mef": {"method": "correspondence"},
               "fit3d": {**part("geometry", optimise=20), **part("data", contexts=4), **part("ema", rate=1.0), **part("loss", kind="features")}}
    return dataclasses.replace(base, **changes[row])


def weights(asked: argparse.Namespace) -> Path:
    made = asked.output / "vit" / "vit.safetensors"
    return made if made.is_file() else COMMITTED / "vit.safetensors"


def run(asked: argparse.Namespace, *command: str) -> None:
    """The command, interrupted when the stage's time is over: all of them go on where they were."""
    left = asked.deadline - time.monotonic()
    if left < 5:
        sys.exit(UNFINISHED)
    print("$ " + " ".join(command), flush=True)
    child = subprocess.Popen(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})
    try:
        code = child.wait(left)
    except subprocess.TimeoutExpired:
        child.send_signal(signal.SIGINT)
        child.wait(120)
        sys.exit(UNFINISHED)
    if code:
        sys.exit(code)


def pretrain(asked: argparse.Namespace) -> None:
    if not weights(asked).is_file():
        run(asked, sys.executable, "scripts/reproduce/pretrain_rooms.py", "-o", str(asked.output / "vit"), "--cache", str(asked.output / "rooms"),
            "--steps", str(asked.pretrain_steps), "--rooms", str(asked.rooms))


def probe(asked: argparse.Namespace, output: Path, files: list[Path], *more: str) -> None:
    run(asked, sys.executable, "-m", "splatkit.cli", "probe", *map(str, files), "-o", str(output), "--device", asked.device, "--data.test-rooms", str(asked.test_rooms),
        "--data.train-rooms", str(asked.head_rooms), "--data.cache", str(asked.output / "rooms"), "--bins", "64",
        *(word for task in ("depth", "normals", "segmentation") for word in (f"--{task}.steps", str(asked.head_steps))), *more)


def ceiling(asked: argparse.Namespace) -> None:
    for blend in ("1.0", "0.5"):
        probe(asked, asked.output / f"ceiling-{blend}", [weights(asked)], "--labels", "--label.blend", blend)


def train(asked: argparse.Namespace) -> None:
    for seed in range(asked.seeds):
        for row in ROWS:
            wanted = settings(row, seed, asked)
            if not (wanted.output / "backbone.safetensors").is_file():
                wanted.output.mkdir(parents=True, exist_ok=True)
                configs.save(wanted, asked.output / f"{row}-{seed}.yaml")
                run(asked, sys.executable, "-m", "splatkit.cli", "distill", "--config", str(asked.output / f"{row}-{seed}.yaml"), "--resume")


def measured(asked: argparse.Namespace) -> None:
    untouched = asked.output / "untouched.safetensors"
    if not untouched.is_file():
        untouched.write_bytes(weights(asked).read_bytes())
    files = [untouched]
    for row in ROWS:
        for seed in range(asked.seeds):
            made = asked.output / f"{row}-{seed}" / "backbone.safetensors"
            if not made.is_file():
                sys.exit(f"{made} is missing: run the stage train first")
            named = asked.output / f"{row}_{seed}.safetensors"       # the table has the file's name
            if not named.is_file() or named.stat().st_mtime < made.stat().st_mtime:
                named.write_bytes(made.read_bytes())
            files.append(named)
    probe(asked, asked.output / "probe", files)


def tables(asked: argparse.Namespace) -> None:
    found = {m["name"]: m for m in json.loads((asked.output / "probe" / "metrics.json").read_text())["backbones"]}
    by_row = {"untouched": [found["untouched"]], **{row: [found[f"{row}_{seed}"] for seed in range(asked.seeds)] for row in ROWS}}
    lines = ["| row | " + " | ".join(f"{task} {number}" for task, (number, _) in NUMBERS.items()) + " |", "|---|" + "---:|" * len(NUMBERS)]
    for row, runs in by_row.items():
        lines.append(f"| {row} | " + " | ".join(f"{sum(m['means'][task][number] for m in runs) / len(runs):.4f}" for task, (number, _) in NUMBERS.items()) + " |")
    lines += ["", "| paired difference, per room | " + " | ".join(NUMBERS) + " |", "|---|" + "---:|" * len(NUMBERS)]
    results = {"rows": {row: [m["means"] for m in runs] for row, runs in by_row.items()}, "differences": {}}
    for one, other in COMPARED:
        cells = []
        for task, (number, sign) in NUMBERS.items():
            rooms = sorted(by_row[one][0]["scenes"][task])
            mean = lambda row: torch.tensor([sum(m["scenes"][task][room][number] for m in by_row[row]) / len(by_row[row]) for room in rooms])
            middle, low, high = bootstrap(mean(one) - mean(other))
            results["differences"].setdefault(f"{one} - {other}", {})[task] = {"number": number, "mean": middle, "low": low, "high": high, "rooms": len(rooms), "better_is": "more" if sign > 0 else "less"}
            cells.append(f"{middle:+.4f} [{low:+.4f}, {high:+.4f}]")
        lines.append(f"| {one} - {other} | " + " | ".join(cells) + " |")
    lines += ["", f"{len(rooms)} rooms not seen in training, {asked.seeds} seeds (mean per room); 95 % bootstrap intervals over rooms. Depth in metres and normals in degrees: less is better."]
    for blend in ("1.0", "0.5"):
        path = asked.output / f"ceiling-{blend}" / "metrics.json"
        if path.is_file():
            own, carried = json.loads(path.read_text())["backbones"]
            lines += ["", f"Ceiling without training, blend {blend}: own features against labels: " + "; ".join(
                f"{task} {own['means'][task][number]:.4f} -> {carried['means'][task][number]:.4f}" for task, (number, _) in NUMBERS.items())]
            results[f"ceiling, blend {blend}"] = {"own": own["means"], "carried": carried["means"]}
    results["asked"] = {name: value for name, value in vars(asked).items() if isinstance(value, int | float) and name != "deadline" and math.isfinite(value)}
    out = COMMITTED if asked.commit else asked.output / "tables"
    out.mkdir(parents=True, exist_ok=True)
    (out / "table.md").write_text("\n".join(lines) + "\n")
    (out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    for name in ("features.png", "matches.png"):
        if (asked.output / "probe" / name).is_file():
            (out / name).write_bytes((asked.output / "probe" / name).read_bytes())
    if asked.commit and not (out / "vit.safetensors").is_file():
        (out / "vit.safetensors").write_bytes(weights(asked).read_bytes())
    print("\n".join(lines))


STAGES = {"pretrain": pretrain, "ceiling": ceiling, "train": train, "probe": measured, "tables": tables}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stages", nargs="*", help=f"any of {', '.join(STAGES)}; all in this order where none is named")
    parser.add_argument("-o", "--output", type=Path, default=Path("runs/distill_rooms_experiment"))
    parser.add_argument("--minutes", type=float, default=45)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--pretrain-steps", type=int, default=3000)
    parser.add_argument("--rooms", type=int, default=120)
    parser.add_argument("--test-rooms", type=int, default=50)
    parser.add_argument("--head-rooms", type=int, default=24)
    parser.add_argument("--head-steps", type=int, default=300)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--commit", action="store_true", help="tables and pictures, and the ViT where it is not there, go to benchmarks/distill_rooms")
    asked = parser.parse_args()
    if unknown := [stage for stage in asked.stages if stage not in STAGES]:
        parser.error(f"{unknown[0]} is no stage; known: {', '.join(STAGES)}")
    asked.output = asked.output.resolve()
    asked.output.mkdir(parents=True, exist_ok=True)
    asked.deadline = time.monotonic() + 60 * asked.minutes
    for stage in asked.stages or STAGES:
        STAGES[stage](asked)


if __name__ == "__main__":
    main()
