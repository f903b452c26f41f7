"""The verbs that make data for networks and train them: rooms, lift-train."""
from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import tyro

from .lift.train_config import LiftTrain
from .progress import Progress
from .verbs import layered, speaks


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
    default = layered("lift", argv, LiftTrain())

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
        if speaks():
            print(f"weights: {weights}")
        return 0

    return lift_train
