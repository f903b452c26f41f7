"""The verbs that make data for networks and train them: rooms, lift-train."""
from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import tyro

from . import config as configs
from .lift.train_config import LiftTrain
from .progress import Progress


def write_rooms(
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"], metavar="DIR")] = Path("rooms"),
    rooms: int = 1,
    photos: int = 24,
    width: int = 256,
    height: int = 256,
    seed: int = 0,
) -> int:
    """Photograph procedural rooms, with exact depth, normals and instance masks.

    Args:
        output: Folder for the rooms, DIR/room-000000 and so on, each with a transforms.json as reconstruct and lift-train read it.
        rooms: How many.
        photos: Of each room.
        width: Pixels.
        height: Pixels.
        seed: Of the first room; the same seed gives the same room.
    """
    for name, value, least in (("rooms", rooms, 1), ("photos", photos, 1), ("width", width, 16), ("height", height, 16), ("seed", seed, 0)):
        if value < least:
            raise ValueError(f"{name} is {value}; expected {least} or more")
    from .rooms import write_rooms

    progress = Progress(rooms, what="rooms")
    try:
        write_rooms(output, rooms, photos, width, height, seed, lambda n, folder: progress(n))
    finally:
        progress.close()
    print(f"rooms: {output}")
    return 0


def lift_train_verb(argv: list[str]) -> Callable[..., int]:
    """Train the network of `splatkit lift`."""
    # The verb's defaults are those of --preset and --config in argv, so that flags only say what differs from them.
    layers = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    layers.add_argument("--preset", nargs="?")
    layers.add_argument("--config", nargs="?")
    chosen, default = layers.parse_known_args(argv)[0], LiftTrain()
    for path in filter(None, [chosen.preset and configs.preset("lift", chosen.preset), chosen.config]):
        default = configs.load_yaml(path, default)

    def lift_train(
        settings: Annotated[LiftTrain, tyro.conf.arg(name="")] = default,
        preset: Annotated[str | None, tyro.conf.arg(metavar="NAME")] = None,
        config: Annotated[Path | None, tyro.conf.arg(metavar="FILE.yaml")] = None,
    ) -> int:
        """Train the network of `splatkit lift`.

        Args:
            preset: Start from configs/lift/NAME.yaml: tiny (the weights that come with splatkit), mvsplat (the published network, for GPUs).
            config: Lay the values of this file over the preset, or over the defaults where none is named; flags come last.
        """
        from .lift.train import lift_train

        progress = Progress(settings.last)
        try:
            weights = lift_train(settings, progress, progress.note)
        finally:
            progress.close()
        if os.environ.get("RANK", "0") == "0":      # of the processes that torchrun started, one speaks
            print(f"weights: {weights}")
        return 0

    return lift_train
