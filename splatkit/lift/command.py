"""`splatkit lift`: its flags and what it says."""
from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

import tyro


def lift(
    photos: tyro.conf.Positional[Annotated[tuple[str, ...], tyro.conf.arg(metavar="PHOTO [PHOTO ...]")]] = (),
    cameras: Annotated[Path | None, tyro.conf.arg(metavar="X")] = None,
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"], metavar="SCENE.ply")] = Path("scene.ply"),
    weights: str = "tiny",
    sha256: str | None = None,
    side: int = 0,
    near: float = 0.0,
    far: float = 0.0,
    joint: tyro.conf.FlagCreatePairsOff[bool] = False,
    official: tyro.conf.FlagCreatePairsOff[bool] = False,
    min_opacity: float = 0.02,
    voxel: float = 0.0,
    max_gaussians: int = 1_000_000,
    check: tyro.conf.FlagCreatePairsOff[bool] = False,
    refine: Annotated[int, tyro.conf.arg(metavar="STEPS")] = 0,
    device: Literal["auto", "cpu", "cuda"] = "auto",
) -> int:
    """Turn two or more posed photos into a scene in one pass of a network.

    Args:
        photos: Photos of one place. None: all photos of the folder of --cameras, but for every eighth, which are left for --check. Of a .torch chunk: KEY:NUMBER.
        cameras: Where the photos' cameras are: a COLMAP folder (sfm/ in a run folder of `splatkit reconstruct` is one), a transforms.json or its folder,
            a RealEstate10K .txt or .torch chunk, or an .npz with K and world_to_cam or cam_to_world.
        output: The scene that is written, in the world of the cameras.
        weights: Those in the package (tiny), a checkpoint of MVSplat (re10k.ckpt, acid.ckpt), a file of `splatkit lift-train`, or hf:OWNER/REPOSITORY/FILE.
        sha256: Of the weights' file; another one is not read.
        side: Photos are made smaller to this many pixels on the shorter side; 0: as many as the weights were trained at.
        near: Camera depth from which things are looked for; 0: by the sparse points, or by the distance of the cameras.
        far: Camera depth up to which things are looked for; 0: likewise.
        joint: Lift more than two photos all together instead of each with its nearest neighbour.
        official: Compute what the published code does, flaws included (one lens for all views, a misplaced mask with three and more, colours that depend on the world).
        min_opacity: Fainter Gaussians are dropped.
        voxel: Gaussians in a cube of this side, in world units, become one; 0: only where max-gaussians asks for it.
        max_gaussians: At most this many are written: more are merged in cubes as small as possible, and the faintest dropped.
        check: Draw up to four photos that were not lifted and say how well they are met; where there are none, those that were.
        refine: Go on with this many steps of `splatkit reconstruct` from the lifted scene, into a run folder beside it.
        device: Where the network runs.
    """
    from .session import Request, lift_photos

    request = Request(photos, cameras, output, weights, sha256, side, near, far, joint, official, min_opacity, voxel, max_gaussians, check, refine, device)
    for line in lift_photos(request, lambda line: print(line, file=sys.stderr, flush=True)):
        print(line, flush=True)
    return 0
