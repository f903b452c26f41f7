"""A band of a picture: some whole rows of its tiles, drawn from projected Gaussians alone and bit-equal to those rows of the whole picture."""
from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .. import native
from ..camera import Cameras
from .operators import PAIRS_MAX, TILE, is_deterministic, tile_count

SIDES = (0, 12, 24, 36)         # where sk_project's `tiles` hold x0, x1, y0, y1
COUNT_AGAIN = -1 << 48          # in place of how many tiles of the box are reached


@dataclass(frozen=True)
class Band:
    """Tile rows first to last of a picture with what their backward reads; outside of them the pictures are the background."""

    color: Float[Tensor, "H W 3"]
    alpha: Float[Tensor, "H W"]
    expected_depth: Float[Tensor, "H W"] | None
    background: Float[Tensor, " 3"] | None
    settings: Tensor
    splats: Float[Tensor, "M 12"]
    tiles: Int[Tensor, " M"]
    counts: Int[Tensor, "1 3"]
    pairs: Int[Tensor, " P"]
    tile_offsets: Int[Tensor, " T"]


def tile_rows(height: int) -> int:
    return (height + TILE - 1) // TILE


def boxes(tiles: Int[Tensor, " N"]) -> Int[Tensor, "4 N"]:
    """x0, x1, y0, y1 of what projected Gaussians reach, in tiles, ends excluded; all 0 for one that reaches nothing."""
    return torch.stack([tiles >> bits & 0xFFF for bits in SIDES])


def draw_band(splats: Float[Tensor, "M 12"], depth_keys: Float[Tensor, " M"], tiles: Int[Tensor, " M"], first: int, last: int, camera: Cameras,
              background: Float[Tensor, " 3"] | None, settings: Tensor, with_depth: bool = False) -> Band:
    """Tile rows first <= row < last of one camera's picture. The Gaussians are those that reach them, in the order of their rows in the scene."""
    x0, x1, y0, y1 = boxes(tiles)
    y0, y1 = y0.clamp(min=first), y1.clamp(max=last)
    tiles = x0 | x1 << 12 | y0 << 24 | y1 << 36 | COUNT_AGAIN
    n_pairs = int(((x1 - x0) * (y1 - y0)).sum())     # on a card, which leaves out a box's tiles beside the ellipse, a bound
    if n_pairs > PAIRS_MAX:
        raise ValueError(f"{n_pairs} pairs of Gaussians and tiles in one process; at most {PAIRS_MAX} fit: start more processes")
    order = depth_keys.sort(stable=True).indices.to(torch.int32)
    lib, n, new, size = native.library_of(splats), len(splats), splats.new_empty, (camera.height, camera.width)
    ints = lambda *shape: torch.empty(*shape, dtype=torch.int64, device=splats.device)
    counts = torch.tensor([[n, n_pairs, 0]], device=splats.device)
    color, alpha, depth = new(*size, 3), new(size), new(size) if with_depth else None
    pairs, offsets, needed = torch.empty(n_pairs, dtype=torch.int32, device=splats.device), ints(tile_count(1, camera.width, camera.height) + 1), ints(1)
    lib.sk_blend(n, 1, camera.width, camera.height, 0, settings, splats, order, tiles, counts, None, background, n_pairs, needed, pairs, offsets, color, alpha, depth,
                 None, None, *lib.room("BLEND", n, 1, camera.width, camera.height, 0, n_pairs))
    return Band(color, alpha, depth, background, settings, splats, tiles, counts, pairs, offsets)


def band_gradients(band: Band, v_color: Float[Tensor, "H W 3"] | None, v_alpha: Float[Tensor, "H W"] | None,
                   v_expected_depth: Float[Tensor, "H W"] | None) -> tuple[Float[Tensor, "M 12"], Float[Tensor, " M"]]:
    """Gradients by the band's Gaussians (records of splatkit.h) from those by its rows of the pictures, and the sums of blending weights."""
    lib, (n, (height, width)), settings = native.library_of(band.splats), (len(band.splats), band.alpha.shape), band.settings
    v_splats, weights = torch.empty_like(band.splats), band.splats.new_empty(n)
    given = lambda x: None if x is None else x.contiguous()
    lib.sk_blend_vjp(n, 1, width, height, 0, settings, band.splats, band.tiles, band.counts, None, band.background, band.pairs, band.tile_offsets, band.color,
                     band.alpha, band.expected_depth, None, given(v_color), given(v_alpha), given(v_expected_depth), None, v_splats, None, None, weights,
                     *lib.room("BLEND_VJP", n, 1, width, height, 0, is_deterministic(settings)))
    return v_splats, weights
