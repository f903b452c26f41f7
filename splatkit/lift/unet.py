"""The U-Net that refines the cost volume and the depth: convolutions per view, attention across the views where it is coarsest."""
from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

GROUPS = 8


class UNet(nn.Module):
    """As many channels in as out. One block a level on the way down, two on the way up, each of them beside what the way down left.

    Height and width must be multiples of 2^(levels - 1). Views lie in the batch as [V B], B fastest.
    """

    def __init__(self, width: int, levels: int, heads: int):
        super().__init__()
        attention = lambda level: [ViewAttention(width, heads)] if level == levels - 1 else []
        down: list[nn.Module] = [nn.Sequential(nn.Conv2d(width, width, 3, padding=1))]
        up: list[nn.Module] = []
        for level in range(levels):
            down += [Sequence(ResBlock(width, width), *attention(level))] + [nn.Sequential(Down(width))] * (level < levels - 1)
        for level in reversed(range(levels)):
            up += [Sequence(ResBlock(2 * width, width), *attention(level)),
                   Sequence(ResBlock(2 * width, width), *attention(level), *([Up(width)] if level else []))]
        self.input_blocks = nn.ModuleList(down)
        self.middle_block = nn.Sequential(ResBlock(width, width), nn.Identity(), ResBlock(width, width))
        self.output_blocks = nn.ModuleList(up)
        self.out = nn.Sequential(*conv_norm(width, width))

    def forward(self, x: Float[Tensor, "N C h w"], n_views: int) -> Float[Tensor, "N C h w"]:
        left = []
        for block in self.input_blocks:
            x = block(x, n_views) if isinstance(block, Sequence) else block(x)
            left.append(x)
        x = self.middle_block(x)
        for block in self.output_blocks:
            x = torch.cat([x, left.pop()], dim=1)       # by a name: what it was made of is not kept while the block runs
            x = block(x, n_views)
        return self.out(x)


class SiLU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.silu(x, inplace=not torch.is_grad_enabled())


class Sequence(nn.Sequential):
    """Hands the number of views to the parts that mix them."""

    def forward(self, x: Tensor, n_views: int) -> Tensor:
        for part in self:
            x = part(x, n_views) if isinstance(part, ViewAttention) else part(x)
        return x


def conv_norm(n_in: int, n_out: int) -> list[nn.Module]:
    return [nn.Conv2d(n_in, n_out, 3, padding=1), nn.GroupNorm(GROUPS, n_out), SiLU()]


class ResBlock(nn.Module):
    def __init__(self, n_in: int, n_out: int):
        super().__init__()
        self.in_layers = nn.Sequential(*conv_norm(n_in, n_out))
        self.out_layers = nn.Sequential(*conv_norm(n_out, n_out))
        self.skip_connection = nn.Conv2d(n_in, n_out, 1) if n_in != n_out else nn.Identity()

    def forward(self, x: Float[Tensor, "N i h w"]) -> Float[Tensor, "N o h w"]:
        out = self.out_layers(self.in_layers(x))
        return out + self.skip_connection(x)


class Down(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.op = nn.Conv2d(width, width, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class Up(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


class ViewAttention(nn.Module):
    """Attention over the pixels of all views together."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Conv1d(width, 3 * width, 1)
        self.proj_out = nn.Conv1d(width, width, 1)
        self.norm = nn.GroupNorm(GROUPS, width)

    def forward(self, x: Float[Tensor, "N C h w"], n_views: int) -> Float[Tensor, "N C h w"]:
        n, c, h, w = x.shape
        tokens = x.view(n_views, n // n_views, c, h * w).permute(1, 2, 0, 3).flatten(2)         # [B, C, V h w]
        q, k, v = self.qkv(tokens).unflatten(1, (self.heads, 3, c // self.heads)).transpose(-1, -2).unbind(2)
        found = F.scaled_dot_product_attention(q, k, v).transpose(-1, -2).flatten(1, 2)
        found = self.proj_out(found).unflatten(2, (n_views, h * w)).permute(2, 0, 1, 3).reshape(n, c, h, w)
        return x + self.norm(found)
