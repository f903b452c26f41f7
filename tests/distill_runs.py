"""Small runs of distillation that several tests share, and what each process of the tests with two runs."""
import os
import sys
from pathlib import Path

import torch

from splatkit import cli
from splatkit.distill.config import Adapter, BackboneConfig, DataConfig, Distill, EMAConfig, GeometryConfig, HeadConfig

TINY = BackboneConfig("vit_tiny_patch16_224", "random", embed_dim=32, depth=2, num_heads=2, patch_size=8, img_size=48)


def settings(output: Path, **changes) -> Distill:
    """Two rooms at 64 x 48 pixels, their true depth, a network of two blocks."""
    return Distill(**{"output": output, "steps": 20, "batch": 2, "log_every": 1, "save_every": 4, "lr": 2e-3, "backbone": TINY, "adapter": Adapter(dropout=0.1),
                      "head": HeadConfig(prototypes=256, hidden=64, bottleneck=32), "geometry": GeometryConfig(source="depth"), "ema": EMAConfig(every=1),
                      "data": DataConfig(rooms=2, photos=16, height=48, width=64, gap=(2, 4)), "device": "cpu", **changes})


def process(environment: dict[str, str], said: Path, config_file: Path, rest: list[str]) -> None:
    """One process of a run of several, as torchrun starts them. `said` gets what it says."""
    os.environ.update(environment)
    torch.set_num_threads(1)
    sys.stdout = sys.stderr = said.open("w", buffering=1)
    sys.exit(cli.main(["distill", "--config", str(config_file), *rest]))
