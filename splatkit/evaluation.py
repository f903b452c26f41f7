"""A scene against photos of its capture: PSNR, SSIM and LPIPS per photo, their means and spread, and pictures to look at."""
from __future__ import annotations

import dataclasses
import json
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from . import io, lpips
from .config import Reconstruct
from .errors import BadFile
from .film import color_picture
from .io.atomic import replacing
from .metrics import colour_fitted, psnr, ssim
from .poses import refined
from .raster import render
from .scene import Scene
from .views import Views, raster_settings, run_config, views_of

SPLITS = {"held": "held-out photos", "train": "photos that the scene was trained on", "all": "photos, trained on and held out together"}
COLUMNS = {"psnr": ("PSNR", ".2f"), "psnr_colour_fitted": ("PSNR, colours fitted", ".2f"), "ssim": ("SSIM", ".4f"), "lpips": ("LPIPS", ".4f")}
DIFFERENCE_GAIN = 5     # of the absolute difference in a picture: 0.2 is white


def deviation(values: list[float]) -> float:
    """Standard deviation (n - 1); 0 of a single value, infinite where a picture agrees exactly."""
    return (statistics.stdev(values) if all(map(math.isfinite, values)) else math.inf) if len(values) > 1 else 0.0


STATISTICS = {"mean": statistics.mean, "lowest": min, "highest": max, "deviation": deviation}


@dataclass(frozen=True)
class Evaluation:
    """How a scene matches photos. `psnr` is raw: nothing is fitted to a photo; for `psnr_colour_fitted` the render's colours are, by
    an affine map (metrics.colour_fitted, cut to 0 to 1)."""

    psnr: float                             # means over the photos; PSNR in dB
    psnr_colour_fitted: float
    ssim: float
    lpips: float | None                     # None without weights
    photos: dict[str, dict[str, float]]     # name: the same four, without what is None
    spread: dict[str, dict[str, float]]     # of each of them: lowest, highest and deviation() of the photos
    gaussians: int
    split: str                              # which photos: a key of SPLITS
    picture: Path                           # photo | render | DIFFERENCE_GAIN times the absolute difference

    def __str__(self) -> str:
        """A line per photo, then short()."""
        return self._table(list(self.photos.items()))

    def short(self) -> str:
        """Means and spread."""
        return self._table([])

    def _table(self, rows: list[tuple[str, dict[str, float]]]) -> str:
        kinds = list(self.spread)
        rows = [*rows, *((name, {kind: getattr(self, kind) if name == "mean" else self.spread[kind][name] for kind in kinds}) for name in STATISTICS)]
        cells = [["photo", *(COLUMNS[kind][0] for kind in kinds)], *([name, *(format(row[kind], COLUMNS[kind][1]) for kind in kinds)] for name, row in rows)]
        widths = [max(map(len, column)) for column in zip(*cells)]
        lines = ["  ".join(cell.ljust(width) if k == 0 else cell.rjust(width) for k, (cell, width) in enumerate(zip(line, widths))) for line in cells]
        lines.append(f"{len(self.photos)} {SPLITS[self.split]}, {self.gaussians:,} Gaussians; PSNR in dB")
        return "\n".join([*lines, f"photo | render | {DIFFERENCE_GAIN} x absolute difference: {self.picture}"])


def evaluate(run: Path, split: str = "held", lpips_files: Sequence[Path] = (), pictures: bool = False,
             report: Callable[..., None] = lambda *a, **k: None) -> Evaluation:
    """The scene of a run folder against its held-out photos, those it was trained on, or all; see compare() for what it writes.

    What is not about held-out photos alone goes into eval/train/ or eval/all/. Photos that trained are seen from the cameras that the run
    refined; held-out ones keep their poses (poses.refined). `lpips_files` are weights as lpips.load() takes them.

    Raises BadFile when the folder holds no run, its photos are gone or damaged, or weights cannot be used.
    """
    if split not in SPLITS:
        raise ValueError(f"split {split!r}; expected one of {', '.join(SPLITS)}")
    config = run_config(run)
    if not (run / "scene.ply").is_file():
        raise BadFile(run, "scene.ply", "no such file: the run has not come to its first scene; start it again")
    if not config.data.exists():
        raise BadFile(config.data, "", f"no such folder or film; {run / 'config.yaml'} has the photos there (data), seen from the working folder")
    weights = lpips.load(lpips_files) if lpips_files else None
    views = views_of(config)
    views = dataclasses.replace(views, capture=refined(views.capture, run / "cameras.json"))
    train, held = views.capture.split(config.hold_every)
    chosen = {"held": held, "train": train, "all": sorted(train + held)}[split]
    if not chosen:
        raise BadFile(run, "config.yaml", "hold_every is 0: the run held out no photo to evaluate on; --split train compares with those it has seen")
    scene, _ = io.load(run / "scene.ply")
    return compare(scene.to(views.device), views, chosen, config, run / "eval" / ("" if split == "held" else split), split, weights, pictures, report)


@torch.no_grad()
def compare(scene: Scene, views: Views, chosen: list[int], config: Reconstruct, folder: Path, split: str = "held", weights: lpips.Weights | None = None,
            pictures: bool = False, report: Callable[..., None] = lambda *a, **k: None) -> Evaluation:
    """The scene against the chosen photos. Writes metrics.json and side_by_side.png (three of them) into `folder`; with `pictures` also
    NAME.side_by_side.png and NAME.render.png of every photo.

    Pixels that a photo's mask leaves out enter no number, and count as black for SSIM and LPIPS, as what lies beyond the border does.
    `report(number, of, gaussians, psnr=)` is called after every photo, from 1.
    """
    table, sheet, shown = {}, [], set(chosen[:: max(1, len(chosen) // 3)][:3])
    background, weights = torch.tensor(config.background, device=views.device), weights and weights.to(views.device)
    for number, i in enumerate(chosen, 1):
        name, photo, mask = views.capture.photos[i].name, views.image(i), views.mask(i)
        if mask is not None and not bool(mask.any()):
            raise BadFile(views.capture.photos[i].mask, "", f"leaves no pixel of {name} to compare; take the photo out of the capture, or its mask")
        picture = render(scene, views.camera(i), background=background, settings=raster_settings(config), backend=config.backend).color[0].clamp(0, 1)
        row = table[name] = score(picture, photo, mask, weights)
        if pictures or i in shown:
            strip = side_by_side(picture, photo, mask).cpu()
            sheet += [strip] if i in shown else []
            if pictures:
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                _write_png(folder / f"{name}.side_by_side.png", strip)
                _write_png(folder / f"{name}.render.png", picture)
        report(number, len(chosen), len(scene), psnr=row["psnr"])
    values = {kind: [row[kind] for row in table.values()] for kind in COLUMNS if weights or kind != "lpips"}
    means = {kind: statistics.mean(values[kind]) if kind in values else None for kind in COLUMNS}
    spread = {kind: {name: of(x) for name, of in STATISTICS.items() if name != "mean"} for kind, x in values.items()}
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / "metrics.json") as file:
        file.write(json.dumps({"split": split, **means, "gaussians": len(scene), "spread": spread, "photos": table}, indent=1).encode())
    widest = max(strip.shape[1] for strip in sheet)
    _write_png(folder / "side_by_side.png", torch.cat([torch.nn.functional.pad(strip, (0, 0, 0, widest - strip.shape[1])) for strip in sheet]))
    return Evaluation(**means, photos=table, spread=spread, gaussians=len(scene), split=split, picture=folder / "side_by_side.png")


def score(picture: Float[Tensor, "H W 3"], photo: Float[Tensor, "H W 3"], mask: Tensor | None, weights: lpips.Weights | None) -> dict[str, float]:
    """One photo's row of the table."""
    kept = 1 if mask is None else mask[..., None]
    numbers = {"psnr": psnr(picture, photo, mask), "psnr_colour_fitted": psnr(colour_fitted(picture, photo, mask).clamp(0, 1), photo, mask),
               "ssim": ssim(picture * kept, photo * kept)}
    if weights is not None:
        numbers["lpips"] = lpips.distance(picture * kept, photo * kept, weights)
    return {kind: float(x) for kind, x in numbers.items()}


def side_by_side(picture: Float[Tensor, "H W 3"], photo: Float[Tensor, "H W 3"], mask: Tensor | None = None) -> Float[Tensor, "H W3 3"]:
    """Photo | render | DIFFERENCE_GAIN times the absolute difference, which is black where the mask leaves pixels out."""
    difference = DIFFERENCE_GAIN * (picture - photo).abs()
    return torch.cat([photo, picture, difference if mask is None else difference * mask[..., None]], dim=1).clamp(0, 1)


def _write_png(path: Path, picture: Tensor) -> None:
    from PIL import Image  # 0.1 s that the optimisation does not need

    with replacing(path) as file:
        Image.fromarray(color_picture(picture)).save(file, "PNG")
