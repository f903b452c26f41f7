"""What lifting will take on this CPU, before it starts: the network's operations over the speed of a convolution that is timed here."""
from __future__ import annotations

import math
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from .config import MVSplatConfig
from .lifting import padded_size, size_at
from .pairs import Group
from .posed import View
from .weights import shapes_of

# Measured for the published network at 256x256 and 576x880 (scripts/bench_lift.py):
SAMPLE = 600                # operations that a warped feature of the sweep costs as much as
OVERHEAD = 1.3              # time over that of convolutions and products alone
_LEVELS = {"corr_refine_net": 3, "refine_unet": 5}
_COARSE = ("corr_refine_net", "regressor_residual", "depth_head_lowres", "upsampler")      # parts of the predictor at a quarter of the resolution


@dataclass(frozen=True)
class Cost:
    seconds: float
    bytes: float        # beside what the process already holds

    def __str__(self) -> str:
        return f"{f'about {self.seconds:.0f} s' if self.seconds >= 1.5 else 'a second or two'} and {self.bytes / 2 ** 30:.2g} GiB of memory"


def cost(config: MVSplatConfig, views: Sequence[View], groups: Sequence[Group], side: int) -> Cost:
    """The largest tensors are those of the refinement U-Net and of the Gaussians' numbers, at full resolution."""
    work, most, raw = 0.0, 0.0, 9 + 3 * (config.sh_degree + 1) ** 2
    for group in groups:
        width, height = padded_size([views[i] for i in group.views], side)
        work += operations(config, len(group.views), width, height)
        most = max(most, len(group.views) * width * height * 4.0 * (8 * config.refine_width + raw + config.feature_dim))
    kept = sum(math.prod(size_at(view, side)) for view in views) * 4.0 * (2 + raw)
    return Cost(OVERHEAD * work / speed(), most + 2 * kept + 2.0 ** 26)


def operations(config: MVSplatConfig, views: int, width: int, height: int) -> float:
    """Additions and multiplications of one pass, or what costs as much."""
    pixels, tokens = views * width * height, width * height / 16
    linear = sum(2 * math.prod(shape) * resolution(key) for key, shape in shapes_of(config).items() if len(shape) > 1)
    # A view's tokens attend to their own and to those of all other views, in four windows, or nine of uneven size in every other block.
    attention = sum(4 * config.feature_dim * views * views * tokens ** 2 * (0.25 if block % 2 == 0 else 0.140625) for block in range(config.blocks))
    return pixels * linear + attention + SAMPLE * (views - 1) * pixels / 16 * config.depth_candidates * config.feature_dim


def resolution(key: str) -> float:
    """How often a weight is applied, over the pixels of the pictures."""
    if key.startswith("backbone."):
        return 1 / 4 if re.match(r"backbone\.backbone\.(conv1|layer1)", key) else 1 / 16
    part = key.split(".")[1]
    share = 1 / 16 if part in _COARSE else 1.0
    if (block := re.search(r"(input|output)_blocks\.(\d+)\.", key)) is not None:
        level = int(block[2]) // 2 if block[1] == "input" else _LEVELS[part] - 1 - int(block[2]) // 2
        return share / 4 ** (level - (".conv." in key))      # what comes after enlarging works at the finer level
    return share / 4 ** (_LEVELS[part] - 1) if "middle_block" in key else share


def speed() -> float:
    """Operations per second of a convolution like those of the network, by this process's threads."""
    x, w, best = torch.rand(1, 128, 64, 64), torch.rand(128, 128, 3, 3), math.inf
    with torch.no_grad():
        for _ in range(4):
            start = time.perf_counter()
            F.conv2d(x, w, padding=1)
            best = min(best, time.perf_counter() - start)
    return 2 * w.numel() * 64 * 64 / best
