"""Settings of `splatkit probe`: schema, defaults and help text. No torch here."""
from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from ..config import _require
from .config import BackboneConfig, GeometryConfig, LabelConfig

TASKS = ("depth", "normals", "segmentation", "correspondence")


@dataclass(frozen=True)
class ProbeData:
    """What heads are trained on and what is measured. Rooms unless folders or lists are given."""

    train: Path | None = None
    """A posed folder with depth or masks, a folder of such, or a list (.txt): lines of IMAGE DEPTH LABELS NORMALS, paths from the list's folder, None for what there is not."""
    test: Path | None = None
    """Likewise."""
    pairs: Path | None = None
    """Folder of the ScanNet pairs for correspondence (test.npz, intrinsics.npz and the scenes), instead of the test data."""
    train_rooms: int = 24
    """Procedural rooms that heads are trained on."""
    test_rooms: int = 12
    """Procedural rooms that are measured."""
    first_train_room: int = 5000
    """Seed of the first of them."""
    first_test_room: int = 9000
    """Seed of the first of them."""
    photos: int = 24
    """Photos of each room."""
    views: int = 6
    """Photos of each scene that are used, evenly over it; 0 is all."""
    pair_gap: int = 4
    """Photos from one of a pair to the other."""
    height: int = 96
    """Photos are brought to this size."""
    width: int = 128
    """Likewise."""
    cache: Path | None = None
    """Folder in which what is seen of rooms is kept."""
    depth_unit: float = 1e-3
    """Metres of a step of depth pictures that a list names."""
    masks: str = "auto"
    """As data.masks of distillation."""

    def __post_init__(self):
        _require(self, "1 or more", train_rooms=self.train_rooms >= 1, test_rooms=self.test_rooms >= 1, pair_gap=self.pair_gap >= 1, height=self.height >= 8, width=self.width >= 8)
        _require(self, "0 or at least 2", views=self.views == 0 or self.views >= 2)
        _require(self, "above 0", depth_unit=self.depth_unit > 0)


@dataclass(frozen=True)
class Head:
    """Training of one linear head; the paper's numbers are in configs/probe/paper.yaml."""

    steps: int = 400
    """Optimiser steps."""
    batch: int = 8
    """Photos of a step."""
    lr: float = 1e-3
    """Step size of AdamW after the warm-up."""
    weight_decay: float = 0.01
    """Of AdamW."""
    warmup: float = 0.04
    """Share of the steps."""
    decay: Literal["cosine", "linear"] = "cosine"
    """How the step size falls to 0."""

    def __post_init__(self):
        _require(self, "1 or more", steps=self.steps >= 1, batch=self.batch >= 1)
        _require(self, "above 0", lr=self.lr > 0)


@dataclass(frozen=True)
class Probe:
    """Measure what vision backbones know of 3D by linear heads on their frozen features, and by matching them."""

    backbones: Positional[Annotated[tuple[Path, ...], arg(metavar="RUN_OR_FILE [...]")]] = ()
    """Run folders of `splatkit distill`, of which the backbone is measured before and after, and files that it wrote."""
    output: Annotated[Path, arg(aliases=["-o"], metavar="OUT")] = Path("runs/probe")
    """Folder for metrics.json and pictures."""
    tasks: tuple[Literal["depth", "normals", "segmentation", "correspondence"], ...] = TASKS
    """What to measure."""
    backbone: BackboneConfig = field(default_factory=lambda: BackboneConfig(weights="random"))
    """Where no run or file is named: one backbone by name."""
    labels: bool = False
    """Measure the ceiling too: what the features of the untaught backbone are worth once Gaussians have carried them from neighbouring photos."""
    bins: int = 256
    """Of the depth head."""
    depth_max: float = 20.0
    """Metres: the last bin; deeper pixels are left out."""
    flip: bool = True
    """Depth: the mean over a photo and its mirror image."""
    match_scale: float = 0.25
    """Correspondence: pixels are those of the photo at this scale."""
    matches: int = 1000
    """Best matches of a pair that are counted."""
    seen_only: bool = True
    """Count only pixels that the other photo of the pair sees too; the protocol for ScanNet counts all."""
    seed: int = 0
    """Of the heads and of the order of photos."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where it runs."""
    data: ProbeData = field(default_factory=ProbeData)
    depth: Head = field(default_factory=Head)
    normals: Head = field(default_factory=Head)
    segmentation: Head = field(default_factory=Head)
    geometry: GeometryConfig = field(default_factory=lambda: GeometryConfig(source="depth"))
    """Of the ceiling."""
    label: LabelConfig = field(default_factory=LabelConfig)
    """Of the ceiling."""

    def __post_init__(self):
        _require(self, "above 0", depth_max=self.depth_max > 0, match_scale=0 < self.match_scale <= 1)
        _require(self, "2 or more", bins=self.bins >= 2)
        _require(self, "1 or more", matches=self.matches >= 1)
