"""Between token grids and pixels, minding which object a pixel belongs to: labels of tokens, up-sampling, blending, shrinking, regions without masks.

Labels are whole numbers per pixel, 0 where nothing is known. Token (i, j) of patches p pixels wide is centred at pixel ((j + 1/2) p, (i + 1/2) p).
"""
from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

Positions = Literal["half_pixel", "align_corners"]
REGIONS_BY_MATRIX = 128      # up to so many regions a product with their membership is the faster way to their sums
MAJORITY = 0.5      # share of a patch that a label must cover to name its token


def patch_of(labels: Int[Tensor, "H W"], h: int, w: int) -> int:
    """Pixels a side of the patches of an h x w grid over `labels`. Raises ValueError for a grid that does not divide the picture."""
    height, width = labels.shape
    if height % h or width % w or height // h != width // w:
        raise ValueError(f"a picture of {width}x{height} has no square patches in a grid of {w}x{h} tokens; its sides must be multiples of the patch")
    return width // w


def token_labels(labels: Int[Tensor, "H W"], h: int, w: int, positions: Positions = "half_pixel") -> Int[Tensor, "h w"]:
    """The label of each token: that of most of its patch where it covers half of it, else that of the patch's centre.

    With align_corners, as the paper's code has it: the label at the pixel that the token would lie on if the first and the last token lay on the first and last pixel.
    """
    height, width = labels.shape
    if positions == "align_corners":
        at = lambda n, size: (torch.arange(n, device=labels.device) * ((size - 1) / max(n - 1, 1))).round().long()
        return labels[at(h, height)[:, None], at(w, width)]
    p = patch_of(labels, h, w)
    patches = labels.reshape(h, p, w, p).transpose(1, 2).reshape(h, w, p * p)
    most = patches.mode(dim=2).values
    covers = (patches == most[..., None]).sum(2) >= MAJORITY * p * p
    return torch.where(covers, most, patches[..., (p // 2) * p + p // 2])


def upsample(tokens: Float[Tensor, "h w C"], labels: Int[Tensor, "H W"], grid_labels: Int[Tensor, "h w"] | None = None, positions: Positions = "half_pixel",
             fallback: Literal["ladder", "zero"] = "ladder") -> Float[Tensor, "H W C"]:
    """A feature for every pixel: the bilinear mean of those of the four tokens around it that carry its label (paper, eq. 2 and 3).

    Where none of the four does, `ladder` takes those of the 4 x 4 tokens around it that do, by inverse distance, and where those lack
    it too plain bilinear; `zero`, as the paper's code has it, gives zeros. `grid_labels` are those of token_labels() unless given;
    labels that are all equal give plain bilinear interpolation.
    """
    (h, w, channels), (height, width) = tokens.shape, labels.shape
    if positions == "half_pixel":
        patch_of(labels, h, w)
    grid_labels = token_labels(labels, h, w, positions) if grid_labels is None else grid_labels
    flat, grid = tokens.reshape(h * w, channels), grid_labels.flatten()
    y, x = _places(height, h, positions, tokens), _places(width, w, positions, tokens)
    y0, x0 = y.floor().clamp(0, max(h - 2, 0)).long(), x.floor().clamp(0, max(w - 2, 0)).long()
    fy, fx = y - y0, x - x0
    around = lambda rows, columns: (rows[:, None, :, None] * w + columns[None, :, None, :]).flatten(2).flatten(0, 1)       # [H W, tokens around each pixel]
    pair = torch.arange(2, device=tokens.device)
    index = around((y0[:, None] + pair).clamp(max=h - 1), (x0[:, None] + pair).clamp(max=w - 1))
    wy, wx = torch.stack([1 - fy, fy], 1), torch.stack([1 - fx, fx], 1)
    bilinear = (wy[:, None, :, None] * wx[None, :, None, :]).flatten(2).flatten(0, 1)
    own = labels.flatten()
    weights = bilinear * (grid[index] == own[:, None])
    total = weights.sum(1)
    out = _mixed(flat, index, weights / torch.where(total > 0, total, 1)[:, None])
    lacking = (total <= 0).nonzero().squeeze(1)
    if len(lacking) and fallback == "ladder":
        ring = torch.arange(-1, 3, device=tokens.device)
        row, column = lacking // width, lacking % width
        rows, columns = y0[row, None] + ring, x0[column, None] + ring
        inside = ((rows >= 0) & (rows < h))[:, :, None] & ((columns >= 0) & (columns < w))[:, None, :]
        ringed = (rows.clamp(0, h - 1)[:, :, None] * w + columns.clamp(0, w - 1)[:, None, :]).flatten(1)
        distance = torch.hypot((rows - y[row, None])[:, :, None], (columns - x[column, None])[:, None, :]).flatten(1)
        near = inside.flatten(1) & (grid[ringed] == own[lacking, None])
        weights = near / distance.clamp(min=1e-6)
        total = weights.sum(1, keepdim=True)
        out[lacking] = torch.where(total > 0, _mixed(flat, ringed, weights / total.clamp(min=1e-12)), _mixed(flat, index[lacking], bilinear[lacking]))
    return out.reshape(height, width, channels)


def _places(pixels: int, tokens: int, positions: Positions, like: Tensor) -> Float[Tensor, " P"]:
    """Where the pixels' centres lie among the tokens, in token indices, no farther out than the outermost tokens."""
    i = torch.arange(pixels, device=like.device, dtype=like.dtype)
    place = i * ((tokens - 1) / max(pixels - 1, 1)) if positions == "align_corners" else (i + 0.5) * (tokens / pixels) - 0.5
    return place.clamp(0, tokens - 1)


def _mixed(rows: Float[Tensor, "T C"], index: Int[Tensor, "P K"], weights: Float[Tensor, "P K"]) -> Float[Tensor, "P C"]:
    return F.embedding_bag(index, rows, per_sample_weights=weights.to(rows.dtype), mode="sum")


def region_means(features: Float[Tensor, "H W C"], labels: Int[Tensor, "H W"], valid: Bool[Tensor, "H W"] | None = None) -> Float[Tensor, "H W C"]:
    """At each pixel the mean of the valid features that carry its label; zeros where a label has none."""
    _, region = labels.flatten().unique(return_inverse=True)
    counts = features.new_zeros(int(region.max()) + 1)
    counted = torch.ones_like(region, dtype=features.dtype) if valid is None else valid.flatten().to(features.dtype)
    counts.index_add_(0, region, counted)
    sums = features.new_zeros(len(counts), features.shape[2]).index_add_(0, region, features.flatten(0, 1) * counted[:, None])
    return (sums / counts.clamp(min=1)[:, None])[region].reshape(features.shape)


def blend(features: Float[Tensor, "H W C"], labels: Int[Tensor, "H W"], a: float, valid: Bool[Tensor, "H W"] | None = None, unlabelled: bool = False) -> Float[Tensor, "H W C"]:
    """a times each pixel's feature plus 1 - a times the mean of its region (paper, eq. 4): 1 leaves them, 0 gives region means.

    Pixels that are not valid enter no mean. Label 0 is a region only where `unlabelled` says so, else its pixels stay as they are.
    """
    if a == 1:
        return features
    blended = a * features + (1 - a) * region_means(features, labels, valid)
    return blended if unlabelled else torch.where((labels == 0)[..., None], features, blended)


def shrink(features: Float[Tensor, "H W C"], valid: Bool[Tensor, "H W"], h: int, w: int, how: Literal["bilinear", "area"] = "bilinear") -> tuple[Float[Tensor, "h w C"], Bool[Tensor, "h w"]]:
    """Features of an h x w token grid and which of them are valid: those of whose weights at least half lies on valid pixels, which alone count."""
    resize = {"bilinear": lambda x: F.interpolate(x, (h, w), mode="bilinear", align_corners=False), "area": lambda x: F.adaptive_avg_pool2d(x, (h, w))}[how]
    seen = valid.to(features.dtype)
    share = resize(seen[None, None])[0, 0]
    small = resize((features * seen[..., None]).permute(2, 0, 1)[None])[0].permute(1, 2, 0)
    return small / share.clamp(min=1e-6)[..., None], share >= 0.5


def blended_and_shrunk(features: Float[Tensor, "H W C"], weight: Float[Tensor, "H W"], labels: Int[Tensor, "H W"], a: float, valid: Bool[Tensor, "H W"], h: int, w: int,
                       unlabelled: bool = False) -> tuple[Float[Tensor, "h w C"], Bool[Tensor, "h w"]]:
    """shrink(blend(features * weight, labels, a, valid, unlabelled), valid, h, w), looking once at all pixels, for the means, and again only at the four
    that each token takes."""
    height, width, channels = features.shape
    flat, region, seen = features.reshape(-1, channels), labels.flatten().unique(return_inverse=True)[1], valid.flatten()
    count = int(region.max()) + 1
    counted = torch.where(seen, weight.flatten(), 0)
    if count <= REGIONS_BY_MATRIX:
        member = torch.zeros(count, len(region), dtype=features.dtype, device=features.device).scatter_(0, region[None], counted[None])
        sums = member @ flat
    else:
        sums = features.new_zeros(count, channels).index_add_(0, region, flat * counted[:, None])
    means = sums / features.new_zeros(count).index_add_(0, region, seen.to(features.dtype)).clamp(min=1)[:, None]
    places = lambda tokens, pixels: ((torch.arange(tokens, device=features.device, dtype=features.dtype) + 0.5) * (pixels / tokens) - 0.5).clamp(0, pixels - 1)
    y, x = places(h, height), places(w, width)
    y0, x0 = y.floor().long(), x.floor().long()
    pair = torch.arange(2, device=features.device)
    index = ((y0[:, None] + pair).clamp(max=height - 1)[:, None, :, None] * width + (x0[:, None] + pair).clamp(max=width - 1)[None, :, None, :]).flatten(2)
    wy, wx = torch.stack([1 - (y - y0), y - y0], 1), torch.stack([1 - (x - x0), x - x0], 1)
    taps = (wy[:, None, :, None] * wx[None, :, None, :]).flatten(2) * seen[index]
    share = taps.sum(2)
    own = torch.where((labels.flatten()[index] == 0) & (not unlabelled), 1.0, a)
    small = torch.einsum("hwk,hwkc->hwc", taps * own * weight.flatten()[index], flat[index]) + torch.einsum("hwk,hwkc->hwc", taps * (1 - own), means[region[index]])
    return small / share.clamp(min=1e-6)[..., None], share >= 0.5


def kmeans_regions(tokens: Float[Tensor, "h w C"], height: int, width: int, regions: int, seed: int, iterations: int = 10) -> Int[Tensor, "H W"]:
    """Labels from 1 for pictures without masks: k-means over the unit-length tokens, each region as wide as its patches."""
    h, w, channels = tokens.shape
    points = F.normalize(tokens.reshape(h * w, channels).float(), dim=1)
    regions = min(regions, h * w)
    start = torch.randperm(h * w, generator=torch.Generator().manual_seed(seed))[:regions]
    centres = points[start.to(points.device)]
    for _ in range(iterations):
        nearest = (points @ centres.T).argmax(1)
        sums = torch.zeros_like(centres).index_add_(0, nearest, points)
        centres = torch.where((sums.norm(dim=1) > 0)[:, None], F.normalize(sums, dim=1), centres)
    labels = (points @ centres.T).argmax(1).reshape(h, w) + 1
    return labels.repeat_interleave(height // h, 0).repeat_interleave(width // w, 1)
