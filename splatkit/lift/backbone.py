"""Features of every view at a quarter of the resolution: a CNN per picture, then attention within and across the views.

Attention runs in windows: odd blocks shift them by half a window, as Swin does. A shifted window is masked where it wraps around the
border, so that tokens only see those of their own region; the regions of all windows are just the 3 x 3 blocks that the shifted lines cut
the picture into. Attention over those blocks needs neither a roll nor a mask, which at 576 x 880 would be 1 GB.
"""
from __future__ import annotations

import math
from itertools import pairwise, product

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ..constants import constant
from .config import MVSplatConfig

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
QUERIES_MAX = 1024      # rows of an explicit mask that exist at a time
MASKED = -100.0         # added to scores by the published code; e^-100 is 0 beside any other weight


class Backbone(nn.Module):
    """The two parts under the names that the published weights have."""

    def __init__(self, config: MVSplatConfig):
        super().__init__()
        self.backbone = CNN(config)
        self.transformer = MultiViewTransformer(config)

    def forward(self, images: Float[Tensor, "B V 3 H W"], official: bool = False) -> tuple[Float[Tensor, "B V C h w"], Float[Tensor, "B V C h w"]]:
        """Features after the CNN, and after the transformer."""
        local = self.backbone(images.flatten(0, 1)).unflatten(0, images.shape[:2])
        return local, self.transformer(local, official)


class CNN(nn.Module):
    """A residual network with instance normalisation (the encoder of RAFT and GMFlow)."""

    def __init__(self, config: MVSplatConfig):
        super().__init__()
        a, b, c = config.cnn_widths
        self.conv1 = nn.Conv2d(3, a, 7, stride=2, padding=3, bias=False)
        self.layer1 = nn.Sequential(Residual(a, a, 1), Residual(a, a, 1))
        self.layer2 = nn.Sequential(Residual(a, b, 2), Residual(b, b, 1))
        self.layer3 = nn.Sequential(Residual(b, c, 1), Residual(c, c, 1))
        self.conv2 = nn.Conv2d(c, config.feature_dim, 1)

    def forward(self, images: Float[Tensor, "N 3 H W"]) -> Float[Tensor, "N C h w"]:
        mean, std = (constant(values, images)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
        x = F.relu(F.instance_norm(self.conv1((images - mean) / std)), inplace=True)
        return self.conv2(self.layer3(self.layer2(self.layer1(x))))


class Residual(nn.Module):
    def __init__(self, n_in: int, n_out: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(n_in, n_out, 3, stride=stride, padding=1, bias=False)
        self.conv2 = nn.Conv2d(n_out, n_out, 3, padding=1, bias=False)
        if stride > 1 or n_in != n_out:
            self.downsample = nn.Sequential(nn.Conv2d(n_in, n_out, 1, stride=stride), nn.InstanceNorm2d(n_out))

    def forward(self, x: Float[Tensor, "N i H W"]) -> Float[Tensor, "N o h w"]:
        y = F.relu(F.instance_norm(self.conv1(x)))
        y = F.relu(F.instance_norm(self.conv2(y)))
        return F.relu((self.downsample(x) if hasattr(self, "downsample") else x) + y)


class MultiViewTransformer(nn.Module):
    def __init__(self, config: MVSplatConfig):
        super().__init__()
        self.layers = nn.ModuleList(Block(config) for _ in range(config.blocks))

    def forward(self, features: Float[Tensor, "B V C h w"], official: bool = False) -> Float[Tensor, "B V C h w"]:
        """`official` misplaces the shifted windows' mask between three and more views, as the published code does."""
        v, c, h, w = features.shape[1:]
        position = window_position_code(c, h // 2, w // 2, features.device).to(features.dtype).repeat(1, 2, 2)
        x = (features + position).permute(0, 1, 3, 4, 2).contiguous()
        for number, block in enumerate(self.layers):
            x = block(x, shifted=number % 2 == 1, misaligned=official and v > 2)
        return x.permute(0, 1, 4, 2, 3)


class Block(nn.Module):
    def __init__(self, config: MVSplatConfig):
        super().__init__()
        self.self_attn = Attention(config.feature_dim)
        self.cross_attn_ffn = Attention(config.feature_dim, config.ffn_factor)

    def forward(self, x: Float[Tensor, "B V h w C"], shifted: bool, misaligned: bool) -> Float[Tensor, "B V h w C"]:
        """Other views are looked at as they were before this block."""
        n_views = x.shape[1]
        if misaligned and shifted:
            attend_others = attend_misaligned
        else:
            attend_others = attend_in_blocks
        own = self.self_attn(x, x, lambda q, k, v: attend_in_blocks(q, k[:, :, None], v[:, :, None], shifted))
        others = lambda y: torch.stack([torch.cat([y[:, :i], y[:, i + 1:]], dim=1) for i in range(n_views)], dim=1)
        return self.cross_attn_ffn(own, x, lambda q, k, v: attend_others(q, others(k), others(v), shifted))


class Attention(nn.Module):
    """One head, and with `ffn_factor` the feed-forward net behind it; what comes out is added to the source."""

    def __init__(self, dim: int, ffn_factor: int = 0):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.merge = (nn.Linear(dim, dim, bias=False) for _ in range(4))
        self.norm1 = nn.LayerNorm(dim)
        if ffn_factor:
            wide = 2 * dim * ffn_factor
            self.mlp = nn.Sequential(nn.Linear(2 * dim, wide, bias=False), nn.GELU(), nn.Linear(wide, dim, bias=False))
            self.norm2 = nn.LayerNorm(dim)

    def forward(self, source: Float[Tensor, "B V h w C"], target: Float[Tensor, "B V h w C"], attend) -> Float[Tensor, "B V h w C"]:
        message = self.norm1(self.merge(attend(self.q_proj(source), self.k_proj(target), self.v_proj(target))))
        if hasattr(self, "mlp"):
            message = self.norm2(self.mlp(torch.cat([source, message], dim=-1)))
        return source + message


def window_position_code(channels: int, height: int, width: int, device: torch.device | None = None) -> Float[Tensor, "C h w"]:
    """Sines and cosines of the place in a window, from above 0 to 2 pi along each side: y in the first half of the channels, x in the second."""
    half = channels // 2
    frequency = 10000.0 ** (-2 * (torch.arange(half, device=device) // 2) / half)
    def code(n: int) -> Tensor:
        angle = (torch.arange(1, n + 1, device=device) / (n + 1e-6) * 2 * math.pi)[:, None] * frequency
        return torch.stack([angle[:, 0::2].sin(), angle[:, 1::2].cos()], dim=2).flatten(1).T
    return torch.cat([code(height)[:, :, None].expand(-1, -1, width), code(width)[:, None, :].expand(-1, height, -1)])


def cuts(n: int, shifted: bool) -> list[tuple[int, int]]:
    """First and last of the stretches that windows of half of `n` cut it into."""
    window = n // 2
    return list(pairwise([0, window // 2, window // 2 + window, n] if shifted else [0, window, n]))


def attend_in_blocks(q: Float[Tensor, "B V h w C"], k: Float[Tensor, "B V O h w C"], v: Float[Tensor, "B V O h w C"], shifted: bool) -> Float[Tensor, "B V h w C"]:
    """Each view's tokens attend to the tokens of its O target views that lie in the same block."""
    out = torch.empty_like(q)
    for (top, bottom), (left, right) in product(cuts(q.shape[2], shifted), cuts(q.shape[3], shifted)):
        place = (..., slice(top, bottom), slice(left, right), slice(None))
        # Head and batch in front: the kernels that never hold all scores want four dimensions.
        queries, keys, values = (x[place].flatten(2, -2).flatten(0, 1)[:, None] for x in (q, k, v))
        found = F.scaled_dot_product_attention(queries, keys, values)
        out[place] = found.view(out[place].shape)
    return out


def attend_misaligned(q: Float[Tensor, "B V h w C"], k: Float[Tensor, "B V O h w C"], v: Float[Tensor, "B V O h w C"], shifted: bool) -> Float[Tensor, "B V h w C"]:
    """Shifted windows as the published code has them for O > 1 other views: keys are in order of pixel, then view, the mask in order of view, then pixel."""
    height, width, others = q.shape[2], q.shape[3], k.shape[2]
    shift = (height // 4, width // 4)
    q, k, v = (x.roll((-shift[0], -shift[1]), dims=(-3, -2)) for x in (q, k, v))
    region = (torch.arange(height) >= height // 2).long() + (torch.arange(height) >= height - shift[0]).long()
    column = (torch.arange(width) >= width // 2).long() + (torch.arange(width) >= width - shift[1]).long()
    region = (3 * region[:, None] + column).to(q.device)
    out = torch.empty_like(q)
    for (top, bottom), (left, right) in product(cuts(height, False), cuts(width, False)):
        place = (..., slice(top, bottom), slice(left, right), slice(None))
        ids = region[top:bottom, left:right].flatten()
        queries = q[place].flatten(2, 3).flatten(0, 1)[:, None]
        keys, values = (x[place].flatten(3, 4).transpose(2, 3).flatten(2, 3).flatten(0, 1)[:, None] for x in (k, v))
        found = [F.scaled_dot_product_attention(queries[:, :, s], keys, values, attn_mask=MASKED * (ids[s, None] != ids.repeat(others)).to(q.dtype))
                 for s in (slice(i, i + QUERIES_MAX) for i in range(0, len(ids), QUERIES_MAX))]
        out[place] = torch.cat(found, dim=2).view(out[place].shape)
    return out.roll(shift, dims=(2, 3))
