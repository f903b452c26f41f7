"""Numbers that stand on a device once for all: a card waits for every copy from the CPU, and a CUDA graph cannot hold one."""
from __future__ import annotations

import functools

import torch
from jaxtyping import Float
from torch import Tensor


def constant(values: tuple[float, ...], like: Tensor) -> Float[Tensor, " C"]:
    """`values` on the device and in the dtype of `like`; nobody may write to it."""
    return _made(values, like.dtype, like.device)


@functools.lru_cache(64)
def _made(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):       # it outlives who asks first
        return torch.tensor(values, dtype=dtype, device=device)
