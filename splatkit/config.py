"""Configuration: a dataclass is schema, default and help text; YAML files hold only what differs.

Order: defaults < preset (a file in configs/<verb>/) < --config file < flags. Saved configs are read back by the same reader.
"""
from __future__ import annotations

import dataclasses
import difflib
import os
import re
import types
import typing
from dataclasses import MISSING, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from tyro.conf import Positional, arg

from .errors import BadConfig

C = TypeVar("C")
PRESETS = Path(__file__).parent / "configs"


@dataclass(frozen=True)
class LearningRates:
    """Adam's step size per field of the scene."""

    means: float = 1.6e-4
    """Of the positions at the first step, times the scene's extent."""
    means_final: float = 1.6e-6
    """Of the positions at the last step, times the scene's extent; log-linear in between."""
    quats: float = 1e-3
    """Of the rotations."""
    log_scales: float = 5e-3
    """Of the log standard deviations."""
    logit_opacities: float = 5e-2
    """Of the opacity logits."""
    sh_dc: float = 2.5e-3
    """Of the view-independent colour."""
    sh_rest: float = 1.25e-4
    """Of the higher spherical harmonics."""


@dataclass(frozen=True)
class MCMC:
    """Densification by relocation and noise (3DGS-MCMC, Kheradmand et al. 2024)."""

    start: int = 500
    """First step at which Gaussians are relocated and added."""
    stop_fraction: float = 0.83
    """Share of the steps after which none are."""
    every: int = 100
    """Steps between two rounds."""
    growth: float = 1.05
    """Largest ratio of Gaussians after to before one round."""
    dead_opacity: float = 0.005
    """Gaussians of at most this opacity are relocated onto live ones."""
    noise: float = 5e5
    """Position noise, times the learning rate of the means."""
    opacity_reg: float = 0.01
    """Weight of the mean opacity in the loss."""
    scale_reg: float = 0.01
    """Weight of the mean standard deviation in the loss."""
    init_opacity: float = 0.5
    """Opacity of the first Gaussians."""
    init_scale: float = 0.1
    """Standard deviation of the first Gaussians, times the distance to their neighbours."""


@dataclass(frozen=True)
class ADC:
    """Densification by cloning, splitting and pruning (Kerbl et al. 2023)."""

    start: int = 500
    """First step at which Gaussians are cloned, split and pruned."""
    stop_fraction: float = 0.5
    """Share of the steps after which none are."""
    every: int = 100
    """Steps between two rounds."""
    grad_threshold: float = 2e-4
    """Mean screen gradient from which a Gaussian grows."""
    absgrad: bool = False
    """Judge by sums of absolute gradients per pixel (AbsGS); wants a threshold of about 8e-4."""
    split_scale: float = 0.01
    """Gaussians larger than this, times the scene's extent, are split instead of cloned."""
    prune_opacity: float = 0.005
    """Gaussians below this opacity are removed."""
    reset_every: int = 3000
    """Steps between two lowerings of all opacities to 0.01; 0 never does. After the first, Gaussians larger than a tenth of the extent are removed too."""
    clone_opacity_correction: bool = False
    """Give a clone and its source the opacities that keep the picture."""
    init_opacity: float = 0.1
    """Opacity of the first Gaussians."""
    init_scale: float = 1.0
    """Standard deviation of the first Gaussians, times the distance to their neighbours."""


@dataclass(frozen=True)
class AdamWGS:
    """What AdamW-GS adds to Adam (Ding et al. 2026). Windows are shares of the steps."""

    sparse: bool = False
    """Step only the Gaussians that the picture shows."""
    attribute_decay: bool = False
    """Let opacities and scales that the photos do not hold shrink, beside the moments (DAR)."""
    state_decay: bool = False
    """Shrink the moments of a random share of the Gaussians now and then (RSR)."""
    opacity_strength: float = 1e-2
    """Of the decay of opacities, over the pixels of a photo."""
    scale_strength: float = 1e-4
    """Of the decay of scales, over the pixels of a photo."""
    ceiling: float = 10.0
    """Most that the decay adds to a step, times the learning rate."""
    opacity_from: float = 0.1
    """Share of the steps from which opacities decay."""
    scale_from: float = 1 / 30
    """Share of the steps from which scales and moments decay."""
    until: float = 0.5
    """Share of the steps until which all three last."""
    state_every: int = 100
    """Steps between two shrinkings of moments."""
    state_share: float = 0.1
    """Share of the Gaussians whose moments shrink."""
    state_share_late: float = 0.1
    """The same from state_late_from on; 0.3 suits scenes of a million Gaussians."""
    state_late_from: float = 0.233
    """Share of the steps from which state_share_late holds."""


@dataclass(frozen=True)
class Refine:
    """Cameras that are fitted beside the scene. The first photo's pose and the size of the whole are held; held-out photos keep their poses."""

    poses: bool = False
    """Fit the pose of each photo that trains."""
    focal: bool = False
    """Fit the focal length of each camera: one factor for all photos that share it."""
    pose_lr: float = 5e-4
    """Step size of poses at the first step: radians, and shares of the scene's extent; falls to 0 at the last by half a cosine."""
    focal_lr: float = 1e-3
    """Step size of the focal lengths' logarithms at the first step; falls likewise."""
    start: float = 0.1
    """Share of the steps from which cameras are fitted: before it, the scene knows less than they."""

    def __post_init__(self):
        _require(self, "above 0", pose_lr=self.pose_lr > 0, focal_lr=self.focal_lr > 0)
        _require(self, "0 to 1", start=0 <= self.start <= 1)


@dataclass(frozen=True)
class Depth:
    """Supervision by depth: the loss gets weight x extent x mean |1/rendered - 1/given|."""

    source: Literal["none", "points", "sensor"] = "none"
    """Where the depth comes from: the sparse points that each photo sees, or the photos' depth pictures (depth_file_path of transforms.json)."""
    weight: float = 0.05
    """Of the depth in the loss."""

    def __post_init__(self):
        _require(self, "0 or more, and finite", weight=0 <= self.weight < float("inf"))


@dataclass(frozen=True)
class SfM:
    """How photos without poses, or the frames of a film, get theirs: structure from motion by COLMAP (the extra `sfm`)."""

    matcher: Literal["auto", "exhaustive", "sequential"] = "auto"
    """Which photos are compared: each with every other, or with the next ones by name and some farther on; auto is sequential for a film and for more than 150 photos."""
    mapper: Literal["auto", "incremental", "global"] = "auto"
    """Photo after photo, or all at once; auto begins with incremental and goes on, with lower thresholds and then global, while photos are left over."""
    max_side: int = 1600
    """Features are looked for in photos made smaller to this many pixels on the longer side."""
    frames: int = 60
    """About how many frames of a film are taken: the sharpest of so many equal stretches."""

    def __post_init__(self):
        _require(self, "at least 200", max_side=self.max_side >= 200)
        _require(self, "at least 3", frames=self.frames >= 3)


@dataclass(frozen=True)
class Reconstruct:
    """Fit a scene to photos or a film."""

    data: Positional[Annotated[Path, arg(metavar="DATA")]]
    """Folder with photos and their poses (COLMAP or transforms.json), or with photos alone, or a film."""
    output: Annotated[Path, arg(aliases=["-o"], metavar="RUN")] = Path("runs/scene")
    """Run folder: config, metrics, checkpoint, scene.ply, eval/."""
    steps: int = 30_000
    """Optimiser steps."""
    sh_degree: Literal[0, 1, 2, 3] = 3
    """Degree of the view-dependent colour."""
    sh_every: int = 1000
    """Steps after which the next degree of the view-dependent colour joins in."""
    max_gaussians: int = 1_000_000
    """The scene grows up to this many Gaussians."""
    downscale: float = 1
    """Photos are area-averaged to 1/downscale of their size; at 2, 4 or 8 the folder images_2, images_4 or images_8 is read where there is one."""
    max_side: int = 0
    """Photos whose longer side is above this many pixels are made smaller still; 0 leaves them."""
    min_scale: float = 0.0
    """No axis of a Gaussian becomes thinner than this many pixels (standard deviation) of the photo that sees it from nearest: what is finer no photo has shown, and it falls
    apart where one looks closer. 0 sets no bound."""
    hold_every: int = 8
    """Photos 0, n, 2n, ... by name are held out for evaluation; 0 holds out none."""
    ssim_weight: float = 0.2
    """Weight of 1 - SSIM in the loss; L1 has the rest."""
    background: tuple[float, float, float] = (0.0, 0.0, 0.0)
    """Colour behind the scene, 0 to 1."""
    random_background: bool = False
    """Draw over a new colour each step, so that the scene does not hide holes behind the background; evaluation keeps `background`."""
    dropout: float = 0.0
    """Share of the Gaussians, drawn anew each step, that a step leaves out: from none at the first to this at the last. The others are more opaque for it. Where photos are few it
    keeps the scene from explaining each of them by Gaussians that no other photo shows. On a CUDA device a step takes longer with it."""
    exposure: bool = False
    """Fit a gain and an offset per photo, of mean identity, so that the scene need not explain that photos differ in exposure."""
    exposure_lr: float = 1e-3
    """Step size of the gains' logarithms and of the offsets."""
    init: Path | None = None
    """Start from this scene file instead of the sparse points; it must be in the world of the photos' poses."""
    seed: int = 0
    """The same seed on the same CPU gives the same scene, bit by bit."""
    coarse_fraction: float = 0.0
    """Share of the steps, from the first, that work on half-size pictures."""
    save_every: int = 1000
    """Steps between two writings of scene.ply and of a checkpoint."""
    resume: bool = False
    """Go on from the newest checkpoint in the run folder; on a CPU the result is that of a run without a break, bit by bit."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the scene is fitted; auto takes a CUDA device where the CUDA library runs."""
    backend: str = "auto"
    """Rasterizer; `splatkit doctor` lists those that run here."""
    antialias: bool = False
    """Draw small Gaussians fainter instead of thicker (the 2D filter of Mip-Splatting)."""
    densification: Literal["mcmc", "adc", "none"] = "mcmc"
    """How the number of Gaussians grows: relocation and noise, clone and split, or not at all."""
    lr: LearningRates = field(default_factory=LearningRates)
    mcmc: MCMC = field(default_factory=MCMC)
    adc: ADC = field(default_factory=ADC)
    adamw: AdamWGS = field(default_factory=AdamWGS)
    refine: Refine = field(default_factory=Refine)
    depth: Depth = field(default_factory=Depth)
    sfm: SfM = field(default_factory=SfM)

    def __post_init__(self):
        _require(self, "1 or more", steps=self.steps >= 1, save_every=self.save_every >= 1, sh_every=self.sh_every >= 1, max_gaussians=self.max_gaussians >= 1)
        _require(self, "1 or more, and finite", downscale=1 <= self.downscale < 1e4)
        _require(self, "0 or at least 16", max_side=self.max_side == 0 or self.max_side >= 16)
        _require(self, "0 or at least 2", hold_every=self.hold_every >= 0 and self.hold_every != 1)
        _require(self, "0 to 1", ssim_weight=0 <= self.ssim_weight <= 1, coarse_fraction=0 <= self.coarse_fraction <= 1, background=all(0 <= c <= 1 for c in self.background))
        _require(self, "above 0", exposure_lr=self.exposure_lr > 0)
        _require(self, "0 or more, and below 1", dropout=0 <= self.dropout < 1)
        _require(self, "0 or more, and finite", min_scale=0 <= self.min_scale < float("inf"))
        _require(self, "0 to 2^63 - 1", seed=0 <= self.seed < 2 ** 63)


def load_yaml(path: Path | str, base: type[C] | C) -> C:
    """`base`, a config class or an instance of one, with the values of the YAML file laid over it.

    Raises BadConfig on an unknown key, a value of the wrong type or a missing one. Relative paths mean the working folder.
    """
    return _overlay(base, _read(Path(path)), f"{path}: ", "")


def to_yaml(config) -> str:
    """The whole config as YAML, as load_yaml reads it."""
    return yaml.safe_dump(_plain(config), sort_keys=False, allow_unicode=True)


def save(config, path: Path | str) -> None:
    """Writes to_yaml(config), whole or not at all."""
    new = Path(f"{path}.new")
    new.write_text(to_yaml(config), encoding="utf-8")
    os.replace(new, path)


def preset(verb: str, name: str) -> Path:
    """The file of a preset; BadConfig lists those there are."""
    known = {p.stem: p for p in sorted((PRESETS / verb).glob("*.yaml"))}
    if name not in known:
        raise BadConfig(f"preset {name!r} of {verb} is not known{_hint(name, known)}; known: {', '.join(known) or 'none'}")
    return known[name]


class _Loader(yaml.SafeLoader):
    """Plain YAML: what one sees is what one gets. Aliases, merge keys and repeated keys are refused."""

    def compose_node(self, parent, index):
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent) or event.anchor is not None:
            raise yaml.MarkedYAMLError(problem="anchors and aliases are not allowed", problem_mark=event.start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key, _ in node.value:
            if key.tag == "tag:yaml.org,2002:merge" or not isinstance(key, yaml.ScalarNode) or key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"key {key.value!r} is repeated, a merge or no plain name", problem_mark=key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


# YAML 1.1 reads 1e-3 as text, for want of a dot.
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+[eE][-+]?[0-9]+$"), list("-+0123456789"))


def _read(path: Path) -> dict:
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (OSError, UnicodeDecodeError) as why:
        raise BadConfig(f"{path}: cannot be read: {getattr(why, 'strerror', None) or why}") from why
    except (yaml.YAMLError, ValueError) as why:     # ValueError: a date like 2024-99-99
        mark = getattr(why, "problem_mark", None)
        said = " ".join(str(getattr(why, "problem", None) or why).split())      # a character that YAML does not allow is told in two lines
        raise BadConfig(f"{path}: {f'line {mark.line + 1}: ' if mark else ''}{said}") from why
    if values is not None and not isinstance(values, dict):
        raise BadConfig(f"{path}: got {_show(values)}; expected lines like `steps: 3000`")
    return values or {}


def _overlay(base, values: dict, where: str, prefix: str):
    """`base` with `values` laid over it; errors begin with `where`, keys are shown after `prefix`."""
    cls = base if isinstance(base, type) else type(base)
    hints, fields_ = typing.get_type_hints(cls), {f.name: f for f in dataclasses.fields(cls)}
    changes = {}
    for key, value in values.items():
        if key not in fields_:
            raise BadConfig(f"{where}{prefix}{key} is not a known key{_hint(str(key), fields_)}; known: {', '.join(fields_)}")
        if dataclasses.is_dataclass(hints[key]):
            if not isinstance(value, dict):
                raise BadConfig(f"{where}{prefix}{key} is {_show(value)}; expected keys of {hints[key].__name__} below it")
            inner = hints[key] if isinstance(base, type) else getattr(base, key)
            changes[key] = _overlay(inner, value, where, f"{prefix}{key}.")
        else:
            converted = _convert(value, hints[key])
            if converted is MISSING:
                raise BadConfig(f"{where}{prefix}{key} is {_show(value)}; expected {_spell(hints[key])}")
            changes[key] = converted
    if not isinstance(base, type):
        return dataclasses.replace(base, **changes)
    if lacking := [n for n, f in fields_.items() if n not in changes and f.default is MISSING and f.default_factory is MISSING]:
        raise BadConfig(f"{where}{prefix}{lacking[0]} is missing and has no default; expected {_spell(hints[lacking[0]])}")
    return cls(**changes)


def _convert(value, hint) -> Any:
    """`value`, as YAML gave it, as the annotated type; MISSING where it is none."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return next((c for c in (_convert(value, a) for a in args) if c is not MISSING), MISSING)
    if origin is Literal:
        return next((a for a in args if a == value and type(a) is type(value)), MISSING)
    if origin is tuple:
        wanted = args[:1] * len(value) if isinstance(value, list) and args[1:] == (...,) else args
        if not isinstance(value, list) or len(value) != len(wanted):
            return MISSING
        items = tuple(_convert(v, a) for v, a in zip(value, wanted))
        return MISSING if MISSING in items else items
    if hint is Path:
        return Path(value) if isinstance(value, str) else MISSING
    if hint is float:
        return float(value) if type(value) in (int, float) else MISSING
    return value if type(value) is hint else MISSING


def _plain(value):
    if dataclasses.is_dataclass(value):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, tuple):
        return [_plain(v) for v in value]
    return str(value) if isinstance(value, Path) else value


def _require(config, expected: str, **fine: bool) -> None:
    """BadConfig naming the first field whose condition does not hold."""
    for name, ok in fine.items():
        if not ok:
            raise BadConfig(f"{name} is {getattr(config, name)}; expected {expected}")


def _hint(name: str, known) -> str:
    close = difflib.get_close_matches(name, list(known), 1)
    return f" (did you mean {close[0]}?)" if close else ""


def _show(value) -> str:
    return f"{str(value)[:60]!r} ({type(value).__name__})" if value is not None else "empty"


def _spell(hint) -> str:
    plain = isinstance(hint, type) and not typing.get_args(hint)
    return hint.__name__ if plain else str(hint).replace("typing.", "").replace("pathlib.", "")
