"""Verbs of the command line that are about scene files: info, convert. Parses and prints, as cli.py, which lists them, does."""
from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import tyro

_Scene = tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="SCENE")]]
_note = lambda line: print(line, file=sys.stderr)


def info(scene: _Scene) -> int:
    """Say what a scene file holds.

    Args:
        scene: A scene file of any format, a folder of an unbundled SOG, or a run folder.
    """
    from .convert import describe

    print(describe(scene, _note))
    return 0


def convert(
    scene: _Scene,
    output: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="OUT")]],
    sh_degree: int | None = None,
    max_gaussians: int | None = None,
    crop: Annotated[tuple[float, float, float, float, float, float] | None, tyro.conf.arg(metavar="X Y Z X Y Z")] = None,
    filter: Annotated[tuple[str, ...], tyro.conf.arg(metavar="CONDITION [...]")] = (),
    scale: float = 1.0,
    rotate: Annotated[tuple[float, float, float], tyro.conf.arg(metavar="X Y Z")] = (0.0, 0.0, 0.0),
    shift: Annotated[tuple[float, float, float], tyro.conf.arg(metavar="X Y Z")] = (0.0, 0.0, 0.0),
    spz_version: int | None = None,
    ksplat_level: int | None = None,
) -> int:
    """Write a scene file in another format, or a part of it, moved.

    Args:
        scene: A scene file of any format, a folder of an unbundled SOG, or a run folder.
        output: .ply, .compressed.ply, .splat, .spz, .ksplat, .sog, a meta.json (an unbundled SOG into its folder), .glb, .gltf or .safetensors.
        sh_degree: Leave out SH coefficients above it.
        max_gaussians: Keep those of the largest opacity times area.
        crop: Keep what lies in a box, given by its lowest and its highest corner.
        filter: Keep what fulfils all conditions on opacity, scale (the largest of three), x, y or z, as in: --filter "opacity>=0.05" "scale<1".
        scale: Make the scene so many times as large. Crop and filters come before, and are about SCENE as it is.
        rotate: Turn it by degrees around x, then y, then z.
        shift: Then move it.
        spz_version: 2 or 3 (default; gzip), or 4 (Zstandard, not read everywhere).
        ksplat_level: 0 (float32), 1 (default) or 2 (SH in 8 bits).
    """
    from .convert import Changes
    from .convert import convert as run

    changes = Changes(sh_degree, max_gaussians, crop, filter, scale, rotate, shift)
    options = {name: value for name, value in (("version", spz_version), ("level", ksplat_level)) if value is not None}
    count = run(scene, output, changes, _note, **options)
    size = sum(p.stat().st_size for p in output.parent.glob("*.webp")) if output.name == "meta.json" else output.stat().st_size
    print(f"scene: {output} ({count:,} Gaussians, {size / 1e6:.2f} MB)")
    return 0


VERBS = {"info": info, "convert": convert}
