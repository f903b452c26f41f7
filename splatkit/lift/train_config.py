"""The settings of `splatkit lift-train`."""
from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from ..config import _require
from .config import CONFIGS, MVSplatConfig


@dataclass(frozen=True)
class LiftLosses:
    """What a step makes smaller: a sum of terms with these weights. Depths count in logarithms; a world's scale changes none of them."""

    mse: float = 1.0
    """Of the mean squared difference of the drawn from the photographed target views."""
    lpips: float = 0.0
    """Of LPIPS between them; needs --loss.lpips-weights."""
    lpips_weights: tuple[Path, ...] = ()
    """Files with the weights of LPIPS, as `splatkit eval --lpips` takes them."""
    depth: float = 0.0
    """Of |log predicted - log given| of the input views' depths, where they are given; the coarse prediction counts half as much."""
    warp: float = 0.0
    """Of the difference (SSIM and L1) between an input view and the others, warped into it by its predicted depth: needs no depth."""
    agreement: float = 0.0
    """Of |a - b| / (a + b) of two input views' depths of the same point: needs no depth either."""

    def __post_init__(self):
        weights = {name: getattr(self, name) for name in ("mse", "lpips", "depth", "warp", "agreement")}
        _require(self, "0 or more, and finite", **{name: 0 <= x < float("inf") for name, x in weights.items()})
        _require(self, "above 0 for at least one term", mse=any(weights.values()))
        _require(self, "given where lpips is above 0, and only there", lpips_weights=bool(self.lpips_weights) == (self.lpips > 0))


@dataclass(frozen=True)
class LiftTrain:
    """Train the lifting network on posed photos or on rooms without end."""

    data: Positional[Annotated[tuple[Path, ...], arg(metavar="[DATA ...]")]] = ()
    """Folders of captures (COLMAP or transforms.json, also with depth pictures), of such folders, or of RealEstate10K chunks; none: procedural rooms."""
    output: Annotated[Path, arg(aliases=["-o"], metavar="RUN")] = Path("runs/lift")
    """Run folder: config, metrics, checkpoint, weights.safetensors."""
    network: MVSplatConfig = field(default_factory=lambda: CONFIGS["tiny"])
    weights: str | None = None
    """Start from these weights (a file, or a name as `splatkit lift --weights` takes it); the network is theirs."""
    steps: int = 10_000
    """Optimiser steps of the whole schedule."""
    begin: int = 0
    """Step of the schedule at which this run starts, from --weights: a stage of a longer training."""
    end: int = 0
    """Step of the schedule at which this run ends; 0: the last."""
    batch: int = 1
    """Samples in one pass of one process."""
    accumulate: int = 1
    """Passes whose gradients are averaged for one step."""
    width: int = 128
    """Pixels of the pictures, a multiple of 16; photos are made smaller to cover it and cut evenly."""
    height: int = 128
    """The same downwards."""
    contexts: int = 2
    """Input views of a sample."""
    targets: int = 1
    """Views of a sample that are drawn and compared with their photos."""
    gap: tuple[int, int] = (2, 8)
    """Frames from the first to the last input view, least and most; the target views lie between. Of captures and chunks."""
    near: float = 0.0
    """Nearest depth that is looked for; 0: by the depths or sparse points of the input views (captures), 1 (chunks). Rooms know theirs."""
    far: float = 0.0
    """Farthest; 0: likewise, 100 for chunks."""
    rooms: int = 0
    """How many different rooms there are, each used again and again: a quarter of them at first, all from three quarters of the schedule on; 0: no end of them."""
    cache: Path | None = None
    """Folder that keeps what was seen of each room, so that it is cast once only; runs may share it."""
    augment: bool = True
    """Mirror half of the samples, and change brightness and contrast of rooms."""
    lr: float = 2e-4
    """AdamW's step size after the warm-up; falls to 0 at the last step by half a cosine."""
    warmup: int = 200
    """Steps over which the step size rises from 0: of the schedule, and of each stage."""
    weight_decay: float = 0.01
    """Of AdamW, on weights of more than one dimension."""
    clip: float = 0.5
    """Largest norm of a step's gradient; a longer one is shortened to it."""
    loss: LiftLosses = field(default_factory=LiftLosses)
    amp: Literal["auto", "none", "bf16"] = "auto"
    """Convolutions and linear layers compute in bfloat16; auto: on a GPU, not on a CPU."""
    workers: int = 1
    """Processes that prepare samples ahead; 0: none, the run does it itself."""
    hold: int = 8
    """Held-out samples (rooms, and the chunks of a folder test/) on which quality is measured; 0: none."""
    hold_every: int = 500
    """Steps between two measurements."""
    save_every: int = 500
    """Steps between two writings of weights and checkpoint."""
    seed: int = 0
    """The same seed on the same CPU gives the same weights, bit by bit."""
    resume: bool = False
    """Go on from the newest checkpoint in the run folder where there is one; on a CPU the result is that of a run without a break, bit by bit."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the network is trained."""

    def __post_init__(self):
        _require(self, "1 or more", **{name: getattr(self, name) >= 1 for name in ("steps", "batch", "accumulate", "hold_every", "save_every")})
        _require(self, "0 or more", **{name: getattr(self, name) >= 0 for name in ("begin", "end", "targets", "rooms", "warmup", "workers", "hold", "weight_decay", "near", "far")})
        _require(self, "a multiple of 16, 32 or more", width=self.width % 16 == 0 and self.width >= 32, height=self.height % 16 == 0 and self.height >= 32)
        _require(self, "2 or more", contexts=self.contexts >= 2)
        _require(self, "least and most, at least the number of views less 1", gap=self.contexts + self.targets - 1 <= self.gap[0] <= self.gap[1])
        _require(self, "above 0", lr=self.lr > 0, clip=self.clip > 0)
        _require(self, "after begin and not after steps", end=self.begin < self.last <= self.steps)
        _require(self, "above near", far=self.near == 0 or self.far == 0 or self.near < self.far)
        _require(self, "0 to 2^31 - 1", seed=0 <= self.seed < 2**31)
        _require(self, "1 or more for a loss on target views", targets=self.targets >= 1 or self.loss.mse == self.loss.lpips == 0)
        _require(self, "0 without --weights", begin=self.begin == 0 or self.weights is not None)

    @property
    def last(self) -> int:
        """The step at which this run ends."""
        return self.end or self.steps
