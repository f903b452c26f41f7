"""Verbs of the command line that are about features: distill, features, probe. Parses and prints, as cli.py, which lists them, does."""
from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import tyro

from .distill.config import BackboneConfig, DataConfig, Distill
from .distill.probe_config import Probe
from .progress import Progress
from .verbs import layered, note, speaks


def distill_verb(argv: list[str]) -> Callable[..., int]:
    """Teach a vision backbone 3D through Gaussians."""
    # Which data there is may be said by flags alone, and the settings refuse to have none: what has no data yet has no value.
    none_yet = Distill(data=DataConfig(rooms=1))
    default = layered("distill", argv, none_yet)
    if default.data.folder is not None and default.data.rooms == 1:
        default = dataclasses.replace(default, data=dataclasses.replace(default.data, rooms=0))
    elif any(flag.startswith("--data.folder") for flag in argv):
        object.__setattr__(default.data, "rooms", 0)

    def distill(
        settings: Annotated[Distill, tyro.conf.arg(name="")] = default,
        preset: Annotated[str | None, tyro.conf.arg(metavar="NAME")] = None,
        config: Annotated[Path | None, tyro.conf.arg(metavar="FILE.yaml")] = None,
        view: tyro.conf.FlagCreatePairsOff[bool] = False,
        port: int = 0,
    ) -> int:
        """Teach a vision backbone 3D through Gaussians.

        Args:
            preset: Start from configs/distill/NAME.yaml.
            config: Lay the values of this file over the preset, or over the defaults where none is named; flags come last.
            view: Show the student's features of one pair of photos in a browser while it learns.
            port: Of that address; 0 is any free one.
        """
        from .distill.loop import WEIGHTS, distill

        progress = Progress(settings.steps)
        watching = None
        if view:
            from .distill_view import Watching
            watching = Watching(progress.note, port)
        try:
            last = distill(settings, progress, progress.note, watching)
        finally:
            progress.close()
            if watching:
                watching.close()
        if speaks():
            print("  ".join(f"{name} {last[name]:.4g}" for name in ("excess", "loss", "valid", "drift", "skipped") if name in last))
            print(f"backbone: {settings.output / WEIGHTS}")
        return 0

    return distill


def probe_verb(argv: list[str]) -> Callable[..., int]:
    """Measure what a vision backbone knows of 3D: depth, normals, segments, correspondence."""
    default = layered("probe", argv, Probe())

    def probe(
        settings: Annotated[Probe, tyro.conf.arg(name="")] = default,
        preset: Annotated[str | None, tyro.conf.arg(metavar="NAME")] = None,
        config: Annotated[Path | None, tyro.conf.arg(metavar="FILE.yaml")] = None,
    ) -> int:
        """Measure what a vision backbone knows of 3D: depth, normals, segments, correspondence.

        Args:
            preset: Start from configs/probe/NAME.yaml.
            config: Lay the values of this file over the preset, or over the defaults where none is named; flags come last.
        """
        from .distill.probe import probe, table

        print(table(probe(settings, note)))
        print(f"numbers and pictures: {settings.output}")
        return 0

    return probe


def features(
    run: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="RUN")]],
    backbone: BackboneConfig = BackboneConfig(),
    output: Annotated[Path | None, tyro.conf.arg(aliases=["-o"], metavar="OUT")] = None,
    channels: int = 32,
    max_side: int = 0,
) -> int:
    """Give the Gaussians of a finished scene the features of its photos.

    Args:
        run: Run folder of `splatkit reconstruct`.
        backbone: Whose features; --backbone.name "" --backbone.weights FILE takes what `splatkit distill` wrote.
        output: The scene with features; default: RUN/features.ply. `splatkit view` shows them.
        channels: Principal components that are kept; 0 keeps all channels.
        max_side: Photos are made smaller to this many pixels on the longer side; 0 leaves them as the run saw them.
    """
    from .distill.attach import attach

    progress = Progress(0)

    def report(number: int, of: int, gaussians: int) -> None:
        progress.steps = of
        progress(number, gaussians)

    try:
        path, kept = attach(run, backbone, output or run / "features.ply", channels, max_side, report)
    finally:
        progress.close()
    print(f"features: {path}" + (f", {kept:.0%} of their variance" if channels else ""))
    return 0


VERBS = {"distill": distill_verb, "features": features, "probe": probe_verb}
LAYERED = ("distill", "probe")
