"""A small vision transformer that has learnt from photos of procedural rooms alone, one photo at a time: what the experiment of distill_rooms.py starts from.

Two crops of a photo, their colours changed, must give the features of one place that are alike, and unlike those of all other places in the batch
(dense contrastive learning, as Pinheiro et al. 2020). Nothing here knows of depth, poses or other views. Resumable; the last step writes OUT/vit.safetensors.
"""
import argparse
import json
import math
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from splatkit.distill import backbone as backbones
from splatkit.distill.config import BackboneConfig
from splatkit.distill.views import RoomScene
from splatkit.io import checkpoint
from splatkit.raster import device_for

MODEL = BackboneConfig("vit_tiny_patch16_224", "random", embed_dim=192, depth=6, num_heads=3, patch_size=8, img_size=96)
TEMPERATURE, PROJECTED = 0.1, 64
SAVE_SECONDS = 45
WIDTH, HEIGHT, PHOTOS, FIRST_ROOM = 128, 96, 24, 20_000


def crop(photos: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Of each photo a part at the same size, maybe mirrored, its colours changed; and the affine map from places in the part to places in the photo (-1 to 1)."""
    n = len(photos)
    device = photos.device
    uniform = lambda low, high, *shape: low + (high - low) * torch.rand(n, *shape, generator=generator, device=device)
    scale, turn = uniform(0.5, 1.0), uniform(-0.2, 0.2)
    mirror = torch.where(uniform(0, 1) < 0.5, -1.0, 1.0)
    shift = uniform(-1, 1, 2) * (1 - scale)[:, None]
    cos, sin = scale * turn.cos(), scale * turn.sin()
    places = torch.stack([torch.stack([mirror * cos, -sin, shift[:, 0]], 1), torch.stack([mirror * sin, cos, shift[:, 1]], 1)], 1)
    parts = F.grid_sample(photos, F.affine_grid(places, list(photos.shape), align_corners=False), padding_mode="reflection", align_corners=False)
    grey = parts.mean(1, keepdim=True)
    parts = grey + (parts - grey) * uniform(0.4, 1.6, 1, 1, 1)
    parts = 0.5 + (parts - 0.5) * uniform(0.6, 1.4, 1, 1, 1) + uniform(-0.15, 0.15, 1, 1, 1) + uniform(-0.08, 0.08, 3, 1, 1)
    return (parts + 0.02 * torch.randn(parts.shape, generator=generator, device=device)).clamp(0, 1), places


def loss_of(model: backbones.Backbone, head: torch.nn.Module, photos: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Cross-entropy of finding a token's place in the other crop among all places of the batch, and how often it is found."""
    (one, to_photo), (other, other_to_photo) = crop(photos, generator), crop(photos, generator)
    tokens = head(model(torch.cat([one, other])))
    mine, theirs = tokens.chunk(2)
    n, h, w, _ = mine.shape
    at = F.affine_grid(to_photo, [n, 1, h, w], align_corners=False).flatten(1, 2)
    turn, shift = other_to_photo[:, :, :2], other_to_photo[:, :, 2:]
    there = (torch.linalg.inv(turn) @ (at.transpose(1, 2) - shift)).transpose(1, 2)
    seen = (there.abs() < 1).all(2) & (at.abs() < 1).all(2)
    found = F.grid_sample(theirs.permute(0, 3, 1, 2), there[:, None], align_corners=False)[:, :, 0].transpose(1, 2)
    a, b = F.normalize(mine.flatten(1, 2)[seen], dim=1), F.normalize(found[seen], dim=1)
    scores = a @ b.T / TEMPERATURE
    same = torch.arange(len(scores), device=scores.device)
    return (F.cross_entropy(scores, same) + F.cross_entropy(scores.T, same)) / 2, (scores.argmax(1) == same).float().mean()


def photos_of(scene: RoomScene) -> np.ndarray:
    """All photos of a room in 8 bits, [PHOTOS, 3, HEIGHT, WIDTH]."""
    return torch.stack([(scene.view(i).photo * 255).round().byte() for i in range(PHOTOS)]).numpy()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rooms", type=int, default=100)
    parser.add_argument("--cache", type=Path)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--jobs", type=int, default=1, help="processes that cast the rooms")
    asked = parser.parse_args()
    scenes = [RoomScene(FIRST_ROOM + i, PHOTOS, WIDTH, HEIGHT, asked.cache) for i in range(asked.rooms)]
    if asked.jobs > 1:
        with ProcessPoolExecutor(asked.jobs, get_context("fork"), torch.set_num_threads, (1,)) as pool:
            seen = list(pool.map(photos_of, scenes))
    else:
        seen = list(map(photos_of, scenes))
    device = device_for(asked.device)       # not before: processes that share a card must not be forked
    photos = torch.from_numpy(np.concatenate(seen)).to(device)
    print(f"{len(photos)} photos", flush=True)
    torch.set_float32_matmul_precision("high")
    asked.output.mkdir(parents=True, exist_ok=True)
    folder = asked.output / "checkpoint"
    folder.mkdir(exist_ok=True)
    model = backbones.load(MODEL, seed=0).train().to(device)
    torch.manual_seed(0)
    head = torch.nn.Sequential(torch.nn.Linear(model.channels, model.channels), torch.nn.GELU(), torch.nn.Linear(model.channels, PROJECTED)).to(device)
    names = {f"{part}.{name}": p for part, module in (("model", model), ("head", head)) for name, p in module.named_parameters()}
    adam = torch.optim.AdamW(names.values(), lr=asked.lr, weight_decay=0.05)
    first = 1
    if saved := checkpoint.load(folder, print):
        first = saved.step + 1
        with torch.no_grad():
            for name, p in names.items():
                p.copy_(saved.tensors[name])
                adam.state[p] = {key: saved.tensors[f"adam.{key}.{name}"].to("cpu" if key == "step" else device) for key in ("step", "exp_avg", "exp_avg_sq")}
    saved_at = time.monotonic()
    warm = max(1, asked.steps // 20)
    for step in range(first, asked.steps + 1):
        generator = torch.Generator(device).manual_seed(step)
        batch = photos[torch.randint(len(photos), (asked.batch,), generator=generator, device=device)].float() / 255
        adam.param_groups[0]["lr"] = asked.lr * min(step / warm, 0.5 + 0.5 * math.cos(math.pi * step / (asked.steps + 1)))
        loss, found = loss_of(model, head, batch, generator)
        adam.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(names.values(), 1.0)
        adam.step()
        if step % 100 == 0:
            print(json.dumps({"step": step, "loss": round(float(loss.detach()), 4), "found": round(float(found), 4)}), flush=True)
        if time.monotonic() - saved_at > SAVE_SECONDS or step == asked.steps:
            saved_at = time.monotonic()
            moments = {f"adam.{key}.{name}": x for name, p in names.items() for key, x in adam.state[p].items()}
            checkpoint.save(folder, step, {**names, **moments}, {})
    backbones.save(model, asked.output / "vit.safetensors", half=True)


if __name__ == "__main__":
    main()
