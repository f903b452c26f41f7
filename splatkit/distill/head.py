"""The projection head and the losses: what the student must say of the features that the teacher's label has."""
from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn


class Head(nn.Module):
    """Scores of `prototypes` for every feature: an MLP of three layers, unit length in the bottleneck, and a linear layer of unit rows times a gain.

    (Caron et al. 2021, as the paper has it: 2048 hidden, 256 in the bottleneck, 65,536 prototypes; weights truncated normal 0.02, gains 1.)
    """

    def __init__(self, channels: int, hidden: int = 2048, bottleneck: int = 256, prototypes: int = 65536, seed: int = 0):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(channels, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, bottleneck))
        self.directions = nn.Parameter(torch.empty(prototypes, bottleneck))
        self.gains = nn.Parameter(torch.ones(prototypes, 1))
        generator = torch.Generator().manual_seed(seed)
        for layer in self.layers:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02, generator=generator)
                nn.init.zeros_(layer.bias)
        bound = 1 / math.sqrt(bottleneck)
        nn.init.uniform_(self.directions, -bound, bound, generator=generator)

    def forward(self, features: Float[Tensor, "*B C"]) -> Float[Tensor, "*B K"]:
        return F.linear(F.normalize(self.layers(features), dim=-1, eps=1e-6), self.gains * F.normalize(self.directions, dim=1))


def cross_entropy(student: Float[Tensor, "T K"], teacher: Float[Tensor, "T K"], student_temperature: float = 1.0, teacher_temperature: float = 1.0,
                  center: Float[Tensor, " K"] | None = None, sinkhorn: bool = False) -> tuple[Float[Tensor, " T"], Float[Tensor, " T"]]:
    """Of every token -sum p log q (paper, eq. 5), p of the teacher without gradient, and how far it is above its least value, the entropy of p.

    At temperatures of 1 all but the excess is a constant near ln K, and the excess is (1 - cos of the bottleneck's vectors) / width (measured to three
    digits). `center` is taken from the teacher's scores first; `sinkhorn` makes the tokens use all prototypes alike (Caron et al. 2020).
    """
    log_q = F.log_softmax(student / student_temperature, dim=1)
    with torch.no_grad():
        scores = (teacher if center is None else teacher - center) / teacher_temperature
        log_p = _sinkhorn(scores) if sinkhorn else F.log_softmax(scores, dim=1)
        p, difference = log_p.exp(), log_p - log_q
        # sum p (log p - log q) - p + q: each term is at least 0, and what rounds off the sums of p and q, 1e-6 in float32, cancels.
        excess = (p * (difference + torch.expm1(-difference))).sum(1)
    return -(p * log_q).sum(1), excess


def _sinkhorn(scores: Float[Tensor, "T K"], iterations: int = 3) -> Float[Tensor, "T K"]:
    """log of the assignment of tokens to prototypes that is nearest to softmax(scores) and gives each prototype the same share."""
    log_p = scores.double()
    for _ in range(iterations):
        log_p = log_p - torch.logsumexp(log_p, dim=0)
        log_p = log_p - torch.logsumexp(log_p, dim=1, keepdim=True)
    return log_p.to(scores.dtype)


def token_losses(kind: Literal["cosine", "features"], student: Float[Tensor, "T C"], label: Float[Tensor, "T C"]) -> Float[Tensor, " T"]:
    """Losses on the features themselves, without a head: 1 - cos, or the mean absolute difference."""
    return 1 - F.cosine_similarity(student, label, dim=1) if kind == "cosine" else (student - label).abs().mean(1)


def mean_over_valid(losses: Float[Tensor, " T"], valid: Bool[Tensor, " T"]) -> Float[Tensor, ""]:
    """The mean over the valid tokens; 0, with zero gradients, where there is none."""
    return torch.where(valid, losses, 0).sum() / valid.sum().clamp(min=1)


@torch.no_grad()
def prototype_entropy(scores: Float[Tensor, "T K"], temperature: float) -> float:
    """Entropy of the mean assignment over ln K: 1 where all prototypes are used alike, 0 where one has everything."""
    mean = F.softmax(scores / temperature, dim=1).mean(0)
    return float(-(mean * mean.clamp(min=1e-30).log()).sum() / math.log(len(mean)))
