"""Low-rank adapters (Hu et al. 2022): frozen layers with trainable factors beside them, merged into plain layers again at the end."""
from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

ATTENTION = ("attn.qkv", "attn.q_proj", "attn.k_proj", "attn.v_proj", "attn.proj")      # suffixes of the linear layers of attention in timm


class Adapted(nn.Module):
    """A frozen linear layer or patch convolution W with y = W x + alpha / rank B A dropout(x); B starts at zero, so that y starts as W x."""

    def __init__(self, base: nn.Linear | nn.Conv2d, rank: int, alpha: float, dropout: float, generator: torch.Generator | None = None):
        super().__init__()
        if isinstance(base, nn.Conv2d) and (base.padding not in ((0, 0), "valid") or base.groups != 1 or base.kernel_size != base.stride):
            raise ValueError(f"{base} is no patch embedding; only a convolution whose kernel is as large as its stride can be adapted")
        self.base, self.scale, self.dropout = base.requires_grad_(False), alpha / rank, nn.Dropout(dropout)
        outputs, inputs = base.weight.shape[0], base.weight[0].numel()
        bound = 1 / math.sqrt(inputs)           # what nn.Linear starts with: kaiming uniform with a = sqrt(5)
        self.A = nn.Parameter(torch.empty(rank, inputs, dtype=torch.float32).uniform_(-bound, bound, generator=generator).to(base.weight))
        self.B = nn.Parameter(base.weight.new_zeros(outputs, rank))

    @property
    def weight(self) -> Float[Tensor, "O I"]:
        """W + alpha / rank B A, as a matrix."""
        return self.base.weight.flatten(1) + self.scale * (self.B @ self.A)

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.base, nn.Linear):
            return self.base(x) + self.scale * nn.functional.linear(nn.functional.linear(self.dropout(x), self.A), self.B)
        inner = nn.functional.conv2d(self.dropout(x), self.A.view(-1, *self.base.weight.shape[1:]), stride=self.base.stride)
        return self.base(x) + self.scale * nn.functional.conv2d(inner, self.B[:, :, None, None])

    @torch.no_grad()
    def merged(self) -> nn.Linear | nn.Conv2d:
        """One plain layer that does the same as this one without dropout. It replaces the frozen weights in place."""
        self.base.weight.copy_(self.weight.view_as(self.base.weight))
        return self.base


def adapt(model: nn.Module, rank: int, alpha: float, dropout: float, patch_embed: bool = False, seed: int = 0) -> list[str]:
    """Freezes `model` and puts adapters beside the attention layers qkv and proj, and with `patch_embed` beside the patch embedding, as the
    suffix rule of the paper's code has it. Returns their names; raises ValueError for a model without such layers."""
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    suffixes = (*ATTENTION, "patch_embed.proj") if patch_embed else ATTENTION
    names = [name for name, module in model.named_modules() if f".{name}".endswith(tuple(f".{s}" for s in suffixes)) and isinstance(module, nn.Linear | nn.Conv2d)]
    if not names:
        raise ValueError(f"no layer of {type(model).__name__} is named {', '.join(suffixes)}; train all of it instead")
    for name in names:
        _replace(model, name, Adapted(model.get_submodule(name), rank, alpha, dropout, generator))
    return names


def merge(model: nn.Module) -> nn.Module:
    """Every adapter in `model` replaced by its plain layer: the keys of its state are those of before adapt()."""
    for name in [name for name, module in model.named_modules() if isinstance(module, Adapted)]:
        _replace(model, name, model.get_submodule(name).merged())
    return model


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
