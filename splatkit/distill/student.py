"""Student and teacher: what trains, how the teacher follows, and how both are put into a checkpoint."""
from __future__ import annotations

import copy
import zlib

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from . import lora
from .backbone import Backbone
from .config import Distill, EMAConfig
from .head import Head


class Student(nn.Module):
    """A backbone and, for losses that have one, its head."""

    def __init__(self, backbone: Backbone, head: Head | None):
        super().__init__()
        self.backbone, self.head = backbone, head

    def forward(self, photos: Float[Tensor, "B 3 H W"], keep: Bool[Tensor, "B h w"] | None = None) -> tuple[Float[Tensor, "B h w C"], Float[Tensor, "B h w K"] | None]:
        """Patch features in float32, zeroed where `keep` is not set, and their scores."""
        tokens = self.backbone(photos).float()
        if keep is not None:
            tokens = tokens * keep[..., None]
        return tokens, None if self.head is None else self.head(tokens).float()


def student_of(backbone: Backbone, config: Distill) -> Student:
    """The backbone with adapters, or all of it trainable, and a new head. Takes `backbone` over."""
    adapter, head = config.adapter, config.head
    if adapter.kind == "lora":
        lora.adapt(backbone.model, adapter.rank, adapter.alpha, adapter.dropout, adapter.patch_embed, config.seed)
    else:
        backbone.requires_grad_(True)
    has_head = config.loss.kind == "dino" and config.method != "correspondence"
    return Student(backbone, Head(backbone.channels, head.hidden, head.bottleneck, head.prototypes, config.seed) if has_head else None).train()


class Teacher:
    """The student's moving average: theta_T <- rate theta_T + (1 - rate) theta_S, of backbone and head, every so many steps. Its dropout is off and nothing of it trains.

    What of the student is frozen is shared, not copied. With `of` merged the adapters' products are averaged, not their factors, for
    which the teacher is a plain backbone.
    """

    def __init__(self, student: Student, config: EMAConfig):
        self.config = config
        shared = {} if config.of == "merged" else {id(p): p for p in student.parameters() if not p.requires_grad}
        self.model = copy.deepcopy(student, shared).eval()
        if config.of == "merged":
            lora.merge(self.model.backbone.model)
        self.model.requires_grad_(False)

    @torch.no_grad()
    def follow(self, student: Student) -> None:
        mine = dict(self.model.named_parameters())
        followed = self._followed(student)
        torch._foreach_lerp_([mine[name] for name in followed], [x.to(mine[name]) for name, x in followed.items()], 1 - self.config.rate)

    def _followed(self, student: Student) -> dict[str, Tensor]:
        """What of the student is averaged, by the teacher's names."""
        if self.config.of == "factors":
            return trained(student)
        adapters = {name: module for name, module in student.named_modules() if isinstance(module, lora.Adapted)}
        inside = tuple(f"{name}." for name in adapters)
        plain = {name: p for name, p in trained(student).items() if not name.startswith(inside)}
        return plain | {f"{name}.weight": module.weight.view_as(module.base.weight) for name, module in adapters.items()}

    def state(self, student: Student) -> dict[str, Tensor]:
        """What it does not share with the student or with the weights that a run starts from."""
        mine = dict(self.model.named_parameters())
        return {name: mine[name] for name in self._followed(student)}


def trained(student: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in student.named_parameters() if p.requires_grad}


@torch.no_grad()
def fill(into: dict[str, Tensor], saved: dict[str, Tensor], prefix: str) -> None:
    for name, x in into.items():
        x.copy_(saved[prefix + name])


def optimiser_state(optimiser: torch.optim.Optimizer, names: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    """Adam's moments and step counts by parameter; empty before the first step."""
    return {f"adam.{key}.{name}": value for name, p in names.items() for key, value in optimiser.state.get(p, {}).items()}


def fill_optimiser(optimiser: torch.optim.Optimizer, names: dict[str, nn.Parameter], saved: dict[str, Tensor]) -> None:
    for name, p in names.items():
        if f"adam.step.{name}" in saved:
            optimiser.state[p] = {key: saved[f"adam.{key}.{name}"].to(p.device if key != "step" else "cpu") for key in ("step", "exp_avg", "exp_avg_sq")}


def fingerprint(module: nn.Module) -> int:
    """Of the weights that a run starts from: a checkpoint has only what trains."""
    crc = 0
    for name, p in sorted(module.state_dict().items()):
        crc = zlib.crc32(name.encode() + p.detach().cpu().contiguous().numpy().tobytes(), crc)
    return crc
