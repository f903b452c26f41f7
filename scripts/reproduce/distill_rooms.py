"""Does geometry teach a backbone to match across views? Distillation on procedural rooms against controls, from one small pre-trained ViT.

Stages, each of which goes on where it was stopped: rooms, pretrain, ceiling, train, probe, tables. Each ends by itself after --minutes with exit code 3 where there is more to do.
Several commands at once (--jobs) say what they do in OUT/logs.
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
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch
from PIL import Image

from splatkit import config as configs
from splatkit.distill.config import BackboneConfig, DataConfig, Distill
from splatkit.distill.probe_config import ProbeData
from splatkit.distill.probes import bootstrap
from splatkit.distill.views import RoomScene, scenes_of

ROOT = Path(__file__).resolve().parents[2]
COMMITTED = ROOT / "benchmarks" / "distill_rooms"       # vit.safetensors, results.json, table.md and pictures
ROWS = ("snd", "control", "wrong", "fit3d", "snd-blended", "mef")       # what must not be missing first, what takes longest before the rest
PICTURED = ("untouched", "snd_0", "snd-blended_0", "control_0", "wrong_0")
COMPARED = (("snd", "control"), ("snd", "wrong"), ("snd", "untouched"), ("snd-blended", "control"), ("snd", "fit3d"), ("snd", "mef"))
NUMBERS = {"correspondence": ("recall", 1), "depth": ("rmse", -1), "normals": ("rmse_degrees", -1), "segmentation": ("mean_iou", 1)}      # 1: more is better
UNFINISHED = 3
FIRST_TEST_ROOM = 9_200        # of those from 9,000 on, some were looked at when the distance of photos and the step size were chosen


def settings(row: str, seed: int, asked: argparse.Namespace) -> Distill:
    base = configs.load_yaml(ROOT / "configs" / "distill" / "rooms_vit.yaml", Distill(data=DataConfig(rooms=1)))
    base = dataclasses.replace(base, output=asked.output / f"{row}-{seed}", seed=seed, steps=asked.steps, device=asked.device, backbone=BackboneConfig(name="", weights=str(weights(asked))),
                               data=dataclasses.replace(base.data, rooms=asked.rooms, cache=asked.output / "rooms"))
    part = lambda name, **changes: {name: dataclasses.replace(getattr(base, name), **changes)}
    changes = {"snd": {}, "snd-blended": part("label", blend=0.5), "control": {"method": "self"}, "wrong": part("geometry", permuted=True), "mef": {"method": "correspondence"},
               "fit3d": {**part("geometry", optimise=4), **part("data", contexts=4), **part("ema", rate=1.0), **part("loss", kind="features")}}
    return dataclasses.replace(base, **changes[row])


def weights(asked: argparse.Namespace) -> Path:
    made = asked.output / "vit" / "vit.safetensors"
    return made if made.is_file() else COMMITTED / "vit.safetensors"


def run(asked: argparse.Namespace, commands: dict[str, list[str]]) -> None:
    """The commands, asked.jobs at once, interrupted when the stage's time is over: all of them go on where they were. One that fails does not stop the others."""
    several, logs = asked.jobs > 1, asked.output / "logs"
    logs.mkdir(exist_ok=True)
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    environment = {**os.environ, "PYTHONPATH": path, **({"OMP_NUM_THREADS": "1"} if several else {})}
    waiting, running, failed = list(commands.items()), {}, 0
    while waiting or running:
        if time.monotonic() > asked.deadline - 5:
            for child in running.values():
                child.send_signal(signal.SIGINT)
            for child in running.values():
                child.wait(120)
            sys.exit(UNFINISHED)
        while waiting and len(running) < asked.jobs:
            name, command = waiting.pop(0)
            print("$ " + " ".join([sys.executable, *command]), flush=True)
            with (logs / f"{name}.log").open("ab") as log:
                running[name] = subprocess.Popen([sys.executable, *command], cwd=ROOT, env=environment, stdout=log if several else None, stderr=log if several else None)
        for name, child in list(running.items()):
            if child.poll() is not None:
                del running[name]
                if child.returncode:
                    failed = child.returncode
                    print(f"{name} ended with {child.returncode}" + "".join(f"\n    {line}" for line in (logs / f"{name}.log").read_text().splitlines()[-8:]), flush=True)
        time.sleep(0.1)
    if failed:
        sys.exit(failed)


def look(scene: RoomScene) -> None:
    """All of a room, which is in the cache then."""
    for i in range(len(scene)):
        scene.view(i)


def rooms(asked: argparse.Namespace) -> None:
    """What training and probes will see, if several processes may see it at once; else each looks when it needs to."""
    if asked.jobs > 1:
        data, probes = settings("snd", 0, asked).data, ProbeData()
        scenes = [scene for first, count in ((data.first_room, asked.rooms), (FIRST_TEST_ROOM, asked.test_rooms), (probes.first_train_room, asked.head_rooms))
                  for scene in scenes_of(dataclasses.replace(data, first_room=first, rooms=count))]
        with ProcessPoolExecutor(asked.jobs, get_context("fork"), torch.set_num_threads, (1,)) as pool:
            for _ in pool.map(look, scenes):
                if time.monotonic() > asked.deadline:
                    pool.shutdown(wait=False, cancel_futures=True)
                    sys.exit(UNFINISHED)


def pretrain(asked: argparse.Namespace) -> None:
    if not weights(asked).is_file():
        run(asked, {"pretrain": ["scripts/reproduce/pretrain_rooms.py", "-o", str(asked.output / "vit"), "--cache", str(asked.output / "rooms"), "--steps", str(asked.pretrain_steps),
                                 "--rooms", str(asked.rooms), "--batch", str(asked.pretrain_batch), "--device", asked.device, "--jobs", str(asked.jobs)]})


def probe(asked: argparse.Namespace, output: Path, file: Path, *more: str) -> list[str]:
    return ["-m", "splatkit.cli", "probe", str(file), "-o", str(output), "--device", asked.device, "--data.test-rooms", str(asked.test_rooms), "--data.first-test-room", str(FIRST_TEST_ROOM),
            "--data.train-rooms", str(asked.head_rooms), "--data.cache", str(asked.output / "rooms"), "--bins", "64",
            *(word for task in ("depth", "normals", "segmentation") for word in (f"--{task}.steps", str(asked.head_steps))), *more]


def ceiling(asked: argparse.Namespace) -> None:
    run(asked, {f"ceiling-{blend}": probe(asked, asked.output / f"ceiling-{blend}", weights(asked), "--labels", "--label.blend", blend) for blend in ("1.0", "0.5")})


def train(asked: argparse.Namespace) -> None:
    commands = {}
    for row in ROWS:
        for seed in range(asked.seeds):
            wanted = settings(row, seed, asked)
            if not (wanted.output / "backbone.safetensors").is_file():
                wanted.output.mkdir(parents=True, exist_ok=True)
                configs.save(wanted, asked.output / f"{row}-{seed}.yaml")
                commands[f"{row}-{seed}"] = ["-m", "splatkit.cli", "distill", "--config", str(asked.output / f"{row}-{seed}.yaml"), "--resume"]
    run(asked, commands)


def measured(asked: argparse.Namespace) -> None:
    """Each backbone that is there by itself; what is measured already is looked up again by the command, which knows its weights."""
    made = {"untouched": weights(asked), **{f"{row}_{seed}": asked.output / f"{row}-{seed}" / "backbone.safetensors" for row in ROWS for seed in range(asked.seeds)}}
    commands = {}
    for name, path in made.items():
        if not path.is_file():
            print(f"{path} is missing: the stage train is not done")
            continue
        named = asked.output / f"{name}.safetensors"       # the table has the file's name
        if not named.is_file() or named.stat().st_mtime < path.stat().st_mtime:
            named.write_bytes(path.read_bytes())
        commands[f"probe-{name}"] = probe(asked, asked.output / "probe" / name, named)
    run(asked, commands)


def stacked(paths: list[Path], parts: int, to: Path) -> None:
    """The last of `parts` strips of each picture, below all of the first one."""
    pictures = [Image.open(path) for path in paths if path.is_file()]
    if pictures:
        height = pictures[0].height // parts
        strips = [pictures[0], *(picture.crop((0, picture.height - height, picture.width, picture.height)) for picture in pictures[1:])]
        whole = Image.new("RGB", (pictures[0].width, sum(strip.height for strip in strips)))
        top = 0
        for strip in strips:
            whole.paste(strip, (0, top))
            top += strip.height
        whole.save(to)


def tables(asked: argparse.Namespace) -> None:
    found = {m["name"]: m for path in sorted((asked.output / "probe").glob("*/metrics.json")) for m in json.loads(path.read_text())["backbones"]}
    names = {"untouched": ["untouched"], **{row: [f"{row}_{seed}" for seed in range(asked.seeds)] for row in ROWS}}
    by_row = {row: runs for row, of_row in names.items() if (runs := [found[name] for name in of_row if name in found])}
    if lacking := [name for of_row in names.values() for name in of_row if name not in found]:
        print(f"not measured: {', '.join(lacking)}")
    lines = ["| row | " + " | ".join(f"{task} {number}" for task, (number, _) in NUMBERS.items()) + " |", "|---|" + "---:|" * len(NUMBERS)]
    for row, runs in by_row.items():
        lines.append(f"| {row}{f', {len(runs)} of {asked.seeds} seeds' if len(runs) < len(names[row]) else ''} | " + " | ".join(f"{sum(m['means'][task][number] for m in runs) / len(runs):.4f}" for task, (number, _) in NUMBERS.items()) + " |")
    lines += ["", "| paired difference, per room | " + " | ".join(NUMBERS) + " |", "|---|" + "---:|" * len(NUMBERS)]
    results = {"rows": {row: [m["means"] for m in runs] for row, runs in by_row.items()}, "differences": {}}
    for one, other in COMPARED:
        if one not in by_row or other not in by_row:
            continue
        cells = []
        for task, (number, sign) in NUMBERS.items():
            scenes = sorted(by_row[one][0]["scenes"][task])
            mean = lambda row: torch.tensor([sum(m["scenes"][task][scene][number] for m in by_row[row]) / len(by_row[row]) for scene in scenes])
            middle, low, high = bootstrap(mean(one) - mean(other))
            results["differences"].setdefault(f"{one} - {other}", {})[task] = {"number": number, "mean": middle, "low": low, "high": high, "rooms": len(scenes), "better_is": "more" if sign > 0 else "less"}
            cells.append(f"{middle:+.4f} [{low:+.4f}, {high:+.4f}]")
        lines.append(f"| {one} - {other} | " + " | ".join(cells) + " |")
    lines += ["", f"{asked.test_rooms} rooms not seen in training, {asked.seeds} seeds (mean per room); 95 % bootstrap intervals over rooms. Depth in metres and normals in degrees: less is better."]
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
    for name, parts in (("features.png", 2), ("matches.png", 1)):
        stacked([asked.output / "probe" / backbone / name for backbone in PICTURED], parts, out / name)
    if asked.commit and not (out / "vit.safetensors").is_file():
        (out / "vit.safetensors").write_bytes(weights(asked).read_bytes())
    print("\n".join(lines))


STAGES = {"rooms": rooms, "pretrain": pretrain, "ceiling": ceiling, "train": train, "probe": measured, "tables": tables}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stages", nargs="*", help=f"any of {', '.join(STAGES)}; all in this order where none is named")
    parser.add_argument("-o", "--output", type=Path, default=Path("runs/distill_rooms_experiment"))
    parser.add_argument("--minutes", type=float, default=45)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--pretrain-steps", type=int, default=3000)
    parser.add_argument("--pretrain-batch", type=int, default=8)
    parser.add_argument("--rooms", type=int, default=120)
    parser.add_argument("--test-rooms", type=int, default=50)
    parser.add_argument("--head-rooms", type=int, default=24)
    parser.add_argument("--head-steps", type=int, default=300)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--jobs", type=int, default=1, help="commands at once, of one thread each")
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
