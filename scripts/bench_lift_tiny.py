"""How good lift-tiny is on rooms that no training saw: depth and new views, beside what needs no network; writes benchmarks/lift_tiny.json.

    python3 scripts/bench_lift_tiny.py --weights tiny --rooms 50
    python3 scripts/bench_lift_tiny.py --data ../shared/data/shelf-rgbd --gap 2 3      # pairs of a capture with depth pictures

Depth: mean |predicted - true| / true over the pixels of the input views that both see, by three ways: the network, the best constant of each picture
(the one that makes its own error least, which only the truth knows), and a 7x7 SAD sweep over as many planes as the network has. New views: PSNR of the
view between, by four ways: the network's scene, the nearest input photo, that photo moved by the plane at the true median depth, and the coloured points
of the SAD sweep drawn as Gaussians of a pixel's size.
"""
from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F

from splatkit.camera import Cameras
from splatkit.lift.rays import pixel_rays
from splatkit.lift.data import Sample, collated, room_sample, training
from splatkit.lift.losses import seen_in, warped
from splatkit.lift.sweep import depth_planes
from splatkit.lift.train import _lifted
from splatkit.lift.train_config import LiftTrain
from splatkit.lift.weights import load_weights
from splatkit.raster import render
from splatkit.scene import Scene

ROOT = Path(__file__).resolve().parent.parent
FILE = ROOT / "benchmarks" / "lift_tiny.json"
WINDOW = 7
COLUMNS = ("abs_rel lift-tiny", "abs_rel constant", "abs_rel SAD 7x7", "PSNR lift-tiny", "PSNR nearest photo", "PSNR planar warp", "PSNR SAD cloud")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", default="tiny")
    parser.add_argument("--rooms", type=int, default=50)
    parser.add_argument("--first", type=int, default=0, help="seed of the first room; those that train begin at 1,000,000")
    parser.add_argument("--side", type=int, help="pixels; default: what the weights were trained on")
    parser.add_argument("--data", type=Path, help="a capture with depth pictures in place of rooms")
    parser.add_argument("--gap", type=int, nargs=2, default=(2, 4))
    parser.add_argument("--pairs", type=int, default=20, help="of a capture")
    parser.add_argument("--json", type=Path, default=FILE)
    args = parser.parse_args()
    model, weights = load_weights(args.weights)
    side = args.side or model.config.side
    config = LiftTrain(width=side, height=side, augment=False, data=(args.data,) if args.data else (), gap=tuple(args.gap))
    source = training(config, print) if args.data else lambda number: room_sample(config, args.first, number)
    rows, start = [], time.monotonic()
    with torch.no_grad():
        for number in range(args.pairs if args.data else args.rooms):
            rows.append(measured(model, collated([source(number)])))
            print(f"{number}: " + "  ".join(f"{x:.3f}" for x in rows[-1].values()), flush=True)
    name = f"{args.data.resolve().name}, {len(rows)} pairs" if args.data else f"{len(rows)} unseen rooms from seed {args.first}"
    record = {"data": name, "side": side, "weights": weights.sha256, "parameters": weights.parameters, "seconds": round(time.monotonic() - start, 1),
              "mean": {k: statistics.fmean(row[k] for row in rows) for k in COLUMNS}, "median": {k: statistics.median(row[k] for row in rows) for k in COLUMNS}}
    known = json.loads(args.json.read_text()) if args.json.is_file() else {}
    known.setdefault("tables", {})[name] = record
    args.json.parent.mkdir(exist_ok=True)
    args.json.write_text(json.dumps(known, indent=1) + "\n")
    print(table(record))


def table(record: dict) -> str:
    mean = record["mean"]
    rows = [f"{record['data']}, {record['side']} px, mean of all", "", "| | lift-tiny | " + " | ".join(k.partition(" ")[2] for k in COLUMNS[1:3]) + " |", "|---|---|---|---|",
            "| depth, AbsRel | " + " | ".join(f"{mean[k]:.3f}" for k in COLUMNS[:3]) + " |", "",
            "| | lift-tiny | " + " | ".join(k.partition(" ")[2] for k in COLUMNS[4:]) + " |", "|---|---|---|---|---|", "| new view, dB | " + " | ".join(f"{mean[k]:.2f}" for k in COLUMNS[3:]) + " |"]
    return "\n".join(rows)


def measured(model, sample: Sample) -> dict[str, float]:
    """Of one pair and the view between."""
    inputs = Sample(sample.images[:, :2], sample.K[:, :2], sample.world_to_cam[:, :2], sample.depth[:, :2], sample.far)
    found, swept = _lifted(model, sample, 2), sad_sweep(inputs, model.config.depth_candidates)
    known = inputs.depth > 0
    both = torch.stack([seen_in(inputs.depth, inputs, i, 1 - i) for i in range(2)], dim=1) & known
    error = lambda depth: float(((depth - inputs.depth).abs() / inputs.depth.clamp(min=1e-6))[both].mean())
    constant = torch.stack([best_constant(inputs.depth[0, i][both[0, i]]).expand_as(inputs.depth[0, i]) for i in range(2)])[None]
    target, photo = Cameras(sample.world_to_cam[0, 2:3], sample.K[0, 2:3], *sample.images.shape[:-3:-1]), sample.images[0, 2]
    decibels = lambda picture: float(-10 * (picture.clamp(0, 1) - photo).square().mean().log10())
    drawn = lambda scene: render(scene, target).color[0].permute(2, 0, 1)
    centres = Cameras(sample.world_to_cam[0], sample.K[0], target.width, target.height).centres
    near = int((centres[:2] - centres[2]).norm(dim=1).argmin())
    return dict(zip(COLUMNS, (error(found.depth), error(constant), error(swept), decibels(drawn(found.scenes[0])), decibels(sample.images[0, near]),
                              decibels(planar_warp(sample, near)), decibels(drawn(cloud(inputs, swept))))))


def best_constant(depth: torch.Tensor) -> torch.Tensor:
    """The constant c with the least mean |c - d| / d: the median of the depths, each counting 1 / d."""
    ordered = depth.sort().values
    weight = (1 / ordered).cumsum(0)
    return ordered[int((weight >= weight[-1] / 2).nonzero()[0])]


def sad_sweep(views: Sample, planes: int) -> torch.Tensor:
    """The depth [1, 2, H, W] of the plane at which a window of 7 x 7 pixels differs least from the other photo (sum of absolute differences)."""
    inverse = depth_planes(torch.ones(1, 1), views.far[:, None], planes)[0, 0]
    out = []
    for i in range(2):
        costs = []
        for d in inverse.tolist():
            flat = torch.full_like(views.depth, 1 / d)
            picture, _, _, inside = warped(views, flat, i, 1 - i)
            cost = torch.where(inside[:, None], (picture - views.images[:, i]).abs(), 1).sum(1, keepdim=True)
            costs.append(F.avg_pool2d(cost, WINDOW, 1, WINDOW // 2, count_include_pad=False)[0, 0])
        out.append(1 / inverse[torch.stack(costs).argmin(0)])
    return torch.stack(out)[None]


def planar_warp(sample: Sample, near: int) -> torch.Tensor:
    """The photo of an input view as it would look from the target if all lay at its median depth; black where it does not reach."""
    swapped = Sample(sample.images[:, [2, near]], sample.K[:, [2, near]], sample.world_to_cam[:, [2, near]], sample.depth[:, [2, near]], sample.far)
    middle = sample.depth[0, near][sample.depth[0, near] > 0].median()
    picture, _, _, inside = warped(swapped, torch.full_like(swapped.depth, float(middle)), 0, 1)
    return torch.where(inside[:, None], picture, sample.images[:, near])[0]


def cloud(views: Sample, depth: torch.Tensor) -> Scene:
    """A round Gaussian for every pixel: at its depth, of its colour, half a pixel wide."""
    height, width = depth.shape[-2:]
    points = pixel_rays(views.K, height, width) * depth[..., None]
    turn = views.world_to_cam[..., :3, :3].transpose(-1, -2)
    means = torch.einsum("bvij,bvhwj->bvhwi", turn, points - views.world_to_cam[..., None, None, :3, 3]).reshape(-1, 3)
    size = (0.5 * depth / views.K[..., 0, 0][..., None, None]).reshape(-1, 1).log().expand(-1, 3)
    sh = ((views.images.permute(0, 1, 3, 4, 2).reshape(-1, 1, 3) - 0.5) / 0.28209479177387814)
    quats = F.one_hot(torch.zeros(len(means), dtype=torch.long), 4).float()
    return Scene(means, quats, size.contiguous(), torch.full((len(means),), 3.0), sh)


if __name__ == "__main__":
    main()
