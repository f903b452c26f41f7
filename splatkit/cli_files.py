"""Verbs of the command line that are about scene files: info, convert, compress, mesh. Parses and prints, as cli.py, which lists them, does."""
from __future__ import annotations

from pathlib import Path
from typing import Annotated

import tyro

from .verbs import note

_Scene = tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="SCENE")]]


def _options(spz_version: int | None, ksplat_level: int | None) -> dict[str, int]:
    """Those of io.save that are given."""
    return {name: value for name, value in (("version", spz_version), ("level", ksplat_level)) if value is not None}


def info(scene: _Scene) -> int:
    """Say what a scene file holds.

    Args:
        scene: A scene file of any format, a folder of an unbundled SOG, or a run folder.
    """
    from .convert import describe

    print(describe(scene, note))
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
    count = run(scene, output, changes, note, **_options(spz_version, ksplat_level))
    size = sum(p.stat().st_size for p in output.parent.glob("*.webp")) if output.name == "meta.json" else output.stat().st_size
    print(f"scene: {output} ({count:,} Gaussians, {size / 1e6:.2f} MB)")
    return 0


def compress(
    scene: _Scene,
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"], metavar="OUT")],
    loss: float = 0.002,
    max_gaussians: int | None = None,
    sh_degree: int | None = None,
    spz_version: int | None = None,
    ksplat_level: int | None = None,
) -> int:
    """Write a scene small, and say what that costs in PSNR.

    Args:
        scene: A run folder, whose photos say what counts, or a scene file, around which an orbit does.
        output: .spz, .sog, .ksplat, .compressed.ply or .splat.
        loss: Leave out the Gaussians that show least, so many that together they have this share in the pictures.
        max_gaussians: Leave out more of them until so many are left.
        sh_degree: Leave out SH coefficients above it.
        spz_version: 2 or 3 (default; gzip), or 4 (Zstandard, not read everywhere).
        ksplat_level: 0 (float32), 1 (default) or 2 (SH in 8 bits).
    """
    from .compress import compress as run

    print(run(scene, output, loss, max_gaussians, sh_degree, note, **_options(spz_version, ksplat_level)))
    return 0


def mesh(
    scene: _Scene,
    output: Annotated[Path | None, tyro.conf.arg(aliases=["-o"], metavar="OUT")] = None,
    voxel: float = 0.0,
    far: float = 0.0,
    truncation: float = 6.0,
    views: int = 2,
    islands: float = 0.02,
) -> int:
    """Make a coloured mesh of a scene's surface (needs the extra `mesh`).

    Args:
        scene: A run folder, whose photos say where to look from, or a scene file, around which an orbit does.
        output: .ply or .glb; default: mesh.ply in the run folder, or beside the file.
        voxel: Side of a cell, in world units; 0: twice what a pixel covers at the median depth.
        far: Leave out what is farther from a camera; 0: three times the median depth.
        truncation: Cells on either side of a surface that know their distance to it.
        views: Cameras that must have seen a piece of surface.
        islands: Remove pieces with fewer triangles than this share of the largest.
    """
    import torch

    from .io.surface import SUFFIXES, write_surface
    from .looking import scene_and_cameras
    from .mesh import Fusing, fuse
    from .raster import RasterSettings

    output = output or (scene / "mesh.ply" if scene.is_dir() else scene.with_suffix(".mesh.ply"))
    if output.suffix.lower() not in SUFFIXES:
        raise ValueError(f"{output}: unknown mesh format {output.suffix!r}; known: {', '.join(SUFFIXES)}")
    gaussians, header, config, cameras = scene_and_cameras(scene, note)
    background = torch.tensor(config.background) if config else None
    surface = fuse(gaussians, cameras, Fusing(voxel, far, truncation, views, islands), RasterSettings(**header.settings), background)
    write_surface(output, surface)
    print(f"mesh: {output} ({len(surface.vertices):,} vertices, {len(surface.triangles):,} triangles)")
    return 0


VERBS = {"info": info, "convert": convert, "compress": compress, "mesh": mesh}
