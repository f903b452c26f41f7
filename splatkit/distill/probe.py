"""`splatkit probe`: what frozen backbones know of 3D, measured on rooms or on photos with depth and masks; tables, numbers and pictures."""
from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from .. import config as configs
from ..errors import BadConfig, BadFile
from ..io.atomic import replacing
from ..io.reading import Report, silent
from ..raster import device_for
from . import backbone as backbones
from .attach import components
from .config import DataConfig, Distill
from .geometry import geometry_of
from .label import labels_of
from .loop import WEIGHTS
from .photo_lists import ListScene, scannet_pairs
from .probe_config import Probe, ProbeData
from .probes import (Matches, confusion, depth_errors, depth_from, depth_loss, match, mean_iou, normal_errors, normal_loss, rotation_between, segmentation_loss,
                     train_head)
from .samples import Sample
from .student import fingerprint
from .views import PosedScene, View, scenes_of

Extract = Callable[[PosedScene, int, View], Float[Tensor, "h w C"]]      # features of photo i of a scene
BEST = {"depth": "rmse", "normals": "rmse_degrees", "segmentation": "mean_iou", "correspondence": "recall"}      # what the table shows of each task
TURNS = ((0, 15), (15, 30), (30, 60), (60, 180))        # degrees between two cameras, by which recall is told
RECALLS = (5, 10, 20)           # pixels of the photo at match_scale, as for ScanNet
SHOWN = 4                       # photos in the picture of features
LINES = 40                      # matches in the picture of a pair


@dataclass(frozen=True)
class Measured:
    """What one backbone scored: of each task the numbers of each test scene, and their means."""

    name: str
    scenes: dict[str, dict[str, dict[str, float]]]      # task: scene: number
    means: dict[str, dict[str, float]]                  # task: number

    def values(self, task: str, number: str) -> dict[str, float]:
        return {scene: row[number] for scene, row in self.scenes[task].items() if number in row}


def probe(config: Probe, report: Report = silent) -> list[Measured]:
    """Measures each backbone of `config` on the same photos with heads of the same seed, and writes metrics.json, features.png and matches.png.

    Where metrics.json has a backbone already, under the same settings and weights, it is not measured again. `report` hears of every task.
    Raises BadFile or BadConfig for data or weights that cannot be used.
    """
    device = device_for(config.device)
    train, test = (_scenes(config.data, which, report) for which in ("train", "test"))
    config.output.mkdir(parents=True, exist_ok=True)
    path, settings = config.output / "metrics.json", _lasting(config)
    try:
        before = json.loads(path.read_text())
        done = {m["name"]: m for m in before["backbones"]} if before["settings"] == settings else {}
    except (OSError, ValueError, KeyError, TypeError):
        done = {}
    out, keys, pictures = [], {}, {}
    for name, weights in _named(config):
        torch.manual_seed(config.seed)
        model = backbones.load(weights, config.seed).to(device)
        keys[name] = fingerprint(model)
        extractors: dict[str, Extract] = {name: _own_features(model, device)}
        if config.labels and len(keys) == 1:
            extractors[f"{name}, carried"] = _carried_features(model, device, config)
            keys[f"{name}, carried"] = keys[name]
        for row, extract in extractors.items():
            if row in done and done[row]["weights"] == keys[row]:
                out.append(Measured(row, done[row]["scenes"], done[row]["means"]))
                continue
            measured, shown = _measure(row, extract, train, test, config, device, report)
            out.append(measured)
            pictures[row] = shown
            with replacing(path) as file:
                rows = [{**dataclasses.asdict(m), "weights": keys[m.name]} for m in out]
                rows += [old for name, old in done.items() if name not in keys]       # measured before, and to be looked at again later
                file.write(json.dumps({"settings": settings, "backbones": rows}, indent=1).encode())
    if pictures:
        _draw(config.output, pictures)
    return out


def table(measured: Sequence[Measured]) -> str:
    """One line for each backbone: the main number of each task, and below it how far it is from the first one's."""
    tasks = [task for task in BEST if task in measured[0].means]
    cells = [["backbone", *(f"{task} {BEST[task]}" for task in tasks)]]
    for m in measured:
        cells.append([m.name, *(_spelt(m.means[task].get(BEST[task], math.nan), task) for task in tasks)])
    widths = [max(map(len, column)) for column in zip(*cells)]
    lines = ["  ".join(cell.ljust(width) if k == 0 else cell.rjust(width) for k, (cell, width) in enumerate(zip(line, widths))) for line in cells]
    scenes = max(len(rows) for rows in measured[0].scenes.values())
    return "\n".join([*lines, f"{scenes} scenes; depth in metres, normals in degrees (less is better); shares (more is better)"])


def _spelt(value: float, task: str) -> str:
    return f"{value:.2f}" if task == "normals" else f"{value:.4f}"


def _named(config: Probe) -> list[tuple[str, backbones.BackboneConfig]]:
    """Every backbone to measure, by the name that the table has for it."""
    out: list[tuple[str, backbones.BackboneConfig]] = []
    for path in config.backbones:
        if path.is_dir():
            if not (path / WEIGHTS).is_file():
                raise BadFile(path, WEIGHTS, "no such file; expected a finished run of `splatkit distill`")
            run = configs.load_yaml(path / "config.yaml", Distill(data=DataConfig(rooms=1)))
            if not any(weights == run.backbone for _, weights in out):
                out.append((f"before {path.name}", run.backbone))
            out.append((path.name, backbones.of_file(path / WEIGHTS)))
        else:
            out.append((path.stem, backbones.of_file(path)))
    out = out or [(config.backbone.name or Path(config.backbone.weights).stem, config.backbone)]
    if twice := {name for name, _ in out if [n for n, _ in out].count(name) > 1}:
        raise BadConfig(f"two backbones are named {sorted(twice)[0]}; rename a folder or a file")
    return out


def _scenes(data: ProbeData, which: str, report: Report) -> list[PosedScene]:
    given = data.train if which == "train" else data.test
    if which == "test" and given is None and data.train is not None:
        raise BadConfig("data.train is given and data.test is not; heads must not be measured on what they were trained on")
    if given is None:
        first, count = (data.first_train_room, data.train_rooms) if which == "train" else (data.first_test_room, data.test_rooms)
        return scenes_of(DataConfig(rooms=count, first_room=first, photos=data.photos, height=data.height, width=data.width, cache=data.cache))
    if given.suffix == ".txt":
        return [ListScene.of(given, data.width, data.height, data.depth_unit)]
    return scenes_of(DataConfig(folder=given, height=data.height, width=data.width, masks=data.masks), report)


def _chosen(scene: PosedScene, data: ProbeData) -> list[int]:
    return list(range(len(scene))) if data.views == 0 else sorted({round(k * (len(scene) - 1) / (data.views - 1)) for k in range(data.views)})


def _own_features(model: backbones.Backbone, device: str) -> Extract:
    @torch.no_grad()
    def extract(scene: PosedScene, i: int, view: View) -> Tensor:
        return model(view.photo[None].to(device))[0].float()
    return extract


def _carried_features(model: backbones.Backbone, device: str, config: Probe) -> Extract:
    """The features of the photos before and behind, through Gaussians: what the label of this photo would be."""
    geometry = geometry_of(config.geometry, device)

    @torch.no_grad()
    def extract(scene: PosedScene, i: int, view: View) -> Tensor:
        near = [max(0, i - 1), min(len(scene) - 1, i + 1)]
        near = [j for j in near if j != i] or [i]
        contexts = tuple(scene.view(j) for j in near)
        sample = Sample(scene.name, tuple(scene.photo_name(j) for j in near), contexts, (view,), scene.depth_range(near[0])).to(device)
        tokens = model(torch.stack([v.photo for v in sample.contexts]))
        own = model(sample.targets[0].photo[None])
        label = labels_of(geometry(sample), tokens, sample.contexts, sample.targets, own, config.label, config.geometry.optimise)[0]
        return torch.where(label.valid[..., None], label.tokens, 0)
    return extract


def _measure(name: str, extract: Extract, train: Sequence[PosedScene], test: Sequence[PosedScene], config: Probe, device: str, report: Report):
    """Of one way to get features: the numbers, and what its pictures show."""
    heads: dict[str, torch.nn.Module] = {}
    wanted = [task for task in config.tasks if task != "correspondence"]
    lacking: set[str] = set()
    if wanted:
        report(f"{name}: features of the photos that heads are trained on")
        views = [(scene, i, scene.view(i)) for scene in train for i in _chosen(scene, config.data)]
        tokens = [extract(*view) for view in views]
        truths = {task: [_truth(task, view, config) for _, _, view in views] for task in wanted}
        for task in wanted:
            known = [k for k, truth in enumerate(truths[task]) if truth is not None]
            if not known:
                lacking.add(task)
                report(f"{name}: no photo for training has what {task} needs; it is left out")
                continue
            classes = max(int(truths[task][k].max()) for k in known) if task == "segmentation" else 0
            outputs, loss = {"depth": (config.bins, lambda said, truth: depth_loss(depth_from(said, config.depth_max), truth)), "normals": (4, normal_loss),
                             "segmentation": (max(classes, 1), segmentation_loss)}[task]
            report(f"{name}: {task}")
            heads[task] = train_head([tokens[k].half() for k in known], [truths[task][k].to(device) for k in known], outputs, loss, getattr(config, task), config.seed)
        del tokens, truths
    report(f"{name}: measuring")
    rows: dict[str, dict[str, dict[str, float]]] = {task: {} for task in config.tasks if task not in lacking}
    counts, shown = None, {"photos": [], "features": [], "pair": None}
    for scene in test:
        chosen = _chosen(scene, config.data)
        numbers: dict[str, list[dict[str, float]]] = {task: [] for task in rows}
        scene_counts, seen = None, {}

        def look(i: int) -> tuple[View, Tensor]:
            """A photo of this scene and its features, which several pairs ask for."""
            if i not in seen:
                view = scene.view(i)
                seen[i] = view, extract(scene, i, view)
            return seen[i]

        for i in chosen:
            view, tokens = look(i)
            if len(shown["photos"]) < SHOWN:
                shown["photos"].append(view.photo)
                shown["features"].append(tokens.cpu())
            for task, head in heads.items():
                truth = _truth(task, view, config)
                if truth is None:
                    continue
                with torch.no_grad():
                    said = head(tokens[None], *truth.shape[:2])
                    if task == "depth":
                        depth = depth_from(said, config.depth_max)[0]
                        if config.flip:
                            mirror = extract(scene, i, dataclasses.replace(view, photo=view.photo.flip(-1))) if name.find("carried") < 0 else tokens.flip(1)
                            depth = (depth + depth_from(head(mirror[None], *truth.shape[:2]), config.depth_max)[0].flip(-1)) / 2
                        numbers[task].append(depth_errors(depth.cpu(), truth, config.depth_max))
                    elif task == "normals":
                        numbers[task].append(normal_errors(said[0, :3].cpu(), truth))
                    elif (truth <= said.shape[1]).all():
                        one = confusion(said[0].cpu(), truth)
                        scene_counts = one if scene_counts is None else scene_counts + one
        if "correspondence" in rows and config.data.pairs is None:
            for i, j in _pairs(scene, config.data):
                numbers["correspondence"].append(_matched(*look(i), *look(j), config, shown))
        for task in rows:
            if task == "segmentation" and scene_counts is not None:
                counts = scene_counts if counts is None else counts + scene_counts
                rows[task][scene.name] = {"mean_iou": mean_iou(scene_counts)}
            elif merged := _mean(numbers[task]):
                rows[task][scene.name] = merged
    if "correspondence" in rows and config.data.pairs is not None:
        for k, (scene, a, b) in enumerate(scannet_pairs(config.data.pairs, config.data.width, config.data.height)):
            rows["correspondence"][f"{scene}-{k}"] = _matched(a, extract(None, 0, a), b, extract(None, 1, b), config, shown)
    means = {task: _mean(list(by_scene.values())) for task, by_scene in rows.items()}
    if counts is not None:
        means["segmentation"]["mean_iou"] = mean_iou(counts)
    return Measured(name, rows, means), shown


def _truth(task: str, view: View, config: Probe) -> Tensor | None:
    """What a head should say of a photo, unknown where its mask leaves it out; None where the photo lacks it."""
    if task == "depth":
        truth = None if view.depth is None else torch.where(view.depth <= config.depth_max, view.depth, 0)
    elif task == "normals":
        truth = view.normals
    else:
        truth = view.classes if view.classes is not None else view.labels
    if truth is None or view.kept is None:
        return truth
    return torch.where(view.kept[..., None] if truth.ndim == 3 else view.kept, truth, 0)


def _pairs(scene: PosedScene, data: ProbeData) -> list[tuple[int, int]]:
    gap = min(data.pair_gap, len(scene) - 1)
    starts = _chosen(scene, data)
    return [(i, i + gap) for i in starts if i + gap < len(scene)] or ([(0, gap)] if gap else [])


def _matched(a: View, fa: Tensor, b: View, fb: Tensor, config: Probe, shown: dict) -> dict[str, float]:
    if a.depth is None or b.depth is None:
        return {}
    matches = match(fa, fb, a.to(fa.device), b.to(fa.device), config.match_scale, config.matches, config.seen_only)
    if len(matches.error) == 0:
        return {}
    if shown["pair"] is None:
        shown["pair"] = (a.photo, b.photo, matches)
    recall = {"recall": matches.recall(a.camera.width * config.match_scale / 16), **{f"recall_{r}px": matches.recall(r) for r in RECALLS}}
    turn = rotation_between(a, b)
    band = next((f"recall_turned_{low}_{high}" for low, high in TURNS if low <= turn < high), None)
    return recall | ({band: matches.recall(10)} if band else {})


def _mean(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: float(np.mean([row[name] for row in rows if name in row])) for name in names}


def _lasting(config: Probe) -> str:
    """The settings that numbers depend on."""
    plain = dataclasses.replace(config, backbones=(), output=Path(), device="auto", data=dataclasses.replace(config.data, cache=None))
    return configs.to_yaml(dataclasses.replace(plain, backbone=dataclasses.replace(plain.backbone, weights="random"), geometry=dataclasses.replace(plain.geometry, cache=None)))


def _draw(folder: Path, shown: dict[str, dict]) -> None:
    """features.png: photos, and below them a row for each backbone, in the three first principal components of its own features; matches.png: a pair for each, its best matches
    as lines, green where they are right."""
    first = next(iter(shown.values()))
    rows = [torch.cat([photo.permute(1, 2, 0) for photo in first["photos"]], dim=1)]
    for one in shown.values():
        project, _ = components(torch.cat([f.flatten(0, 1) for f in one["features"]]), 3)
        flat = [project(f) for f in one["features"]]
        low, high = torch.cat([f.flatten(0, 1) for f in flat]).quantile(torch.tensor([0.02, 0.98]), dim=0)
        pictures = [((f - low) / (high - low).clamp(min=1e-9)).clamp(0, 1) for f in flat]
        height, width = first["photos"][0].shape[1:]
        rows.append(torch.cat([F.interpolate(p.permute(2, 0, 1)[None], (height, width), mode="nearest")[0].permute(1, 2, 0) for p in pictures], dim=1))
    widest = max(row.shape[1] for row in rows)
    _write(folder / "features.png", torch.cat([F.pad(row, (0, 0, 0, widest - row.shape[1])) for row in rows]))
    pairs = [one["pair"] for one in shown.values() if one["pair"] is not None]
    if pairs:
        _write(folder / "matches.png", torch.cat([_pair(*pair) for pair in pairs]))


def _pair(a: Tensor, b: Tensor, matches: Matches) -> Float[Tensor, "H W 3"]:
    from PIL import Image, ImageDraw

    larger = max(1, round(480 / a.shape[2]))
    both = (torch.cat([a, b], dim=2).permute(1, 2, 0) * 255).byte().repeat_interleave(larger, 0).repeat_interleave(larger, 1)
    image = Image.fromarray(both.cpu().numpy())
    pen, shift = ImageDraw.Draw(image), a.shape[2]
    radius = a.shape[2] / 64
    for k in torch.linspace(0, len(matches.error) - 1, min(LINES, len(matches.error))).long().tolist():
        right = float(matches.error[k]) <= radius
        (xa, ya), (xb, yb) = matches.at_a[k].tolist(), matches.at_b[k].tolist()
        pen.line([(larger * xa, larger * ya), (larger * (xb + shift), larger * yb)], fill=(60, 220, 90) if right else (230, 60, 60))
    return torch.from_numpy(np.asarray(image).astype(np.float32) / 255)


def _write(path: Path, picture: Float[Tensor, "H W 3"]) -> None:
    from PIL import Image

    with replacing(path) as file:
        Image.fromarray((picture.clamp(0, 1) * 255).round().byte().cpu().numpy()).save(file, "PNG")
