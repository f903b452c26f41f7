"""Adam on a scene: the one place that writes scene tensors in place, with state that follows the edits of density."""
from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from . import native
from .scene import Edit, Group, Scene

LearningRates = Mapping[Group, float | Float[Tensor, " columns"]]


def default_learning_rates(scene_extent: float, sh_bands: int = 16) -> dict[Group, float | Tensor]:
    """The rates of Kerbl et al. 2023 for a scene of this radius in world units; `means` is where its exponential decay starts."""
    return {"means": 1.6e-4 * scene_extent, "quats": 1e-3, "log_scales": 5e-3, "logit_opacities": 0.05,
            "sh": sh_learning_rates(sh_bands, 2.5e-3, 2.5e-3 / 20)}


def sh_learning_rates(bands: int, first: float, rest: float) -> Float[Tensor, " columns"]:
    """One rate per column of sh [N, bands, 3]: `first` for the three of the constant band, `rest` for the others."""
    rates = torch.full((bands, 3), rest, dtype=torch.float64)
    rates[0] = first
    return rates.flatten()


def exponential_decay(step: int, steps: int, first: float, last: float) -> float:
    """A rate that falls from `first` at step 0 to `last` at `steps`, by the same factor every step, and stays there."""
    return first * (last / first) ** min(max(step / max(steps, 1), 0.0), 1.0)


class Adam:
    """Adam (Kingma & Ba 2015) over the groups of a scene, with a learning rate per group or per column of a group.

    It owns the moments `m` and `v`, shaped like their fields, and the number of steps taken; the scene stays a plain value. Groups
    without a learning rate are frozen: they have no state, and a gradient for them is ignored. Rows change by `follow` only.
    What a run does not change (rates, betas, eps) comes from its configuration and is not part of `state_dict`.
    """

    def __init__(self, scene: Scene, learning_rates: LearningRates, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-15):
        fields = scene.fields()
        if unknown := set(learning_rates) - set(fields):
            raise ValueError(f"learning rates for {sorted(unknown)}; expected some of {sorted(fields)}")
        if not (0 <= betas[0] < 1 and 0 <= betas[1] < 1 and eps >= 0):
            raise ValueError(f"betas {betas} and eps {eps}; expected 0 <= beta < 1 and eps >= 0")
        self.betas, self.eps = betas, eps
        self.learning_rates = {group: _per_column(rate, fields[group], group) for group, rate in learning_rates.items()}
        self.steps_taken = 0
        # Contiguous whatever the field's strides are: native code walks them row by row.
        self.m = {group: torch.zeros_like(fields[group].detach(), memory_format=torch.contiguous_format) for group in learning_rates}
        self.v = {group: torch.zeros_like(m) for group, m in self.m.items()}

    @torch.no_grad()
    def step(self, scene: Scene, grads: Mapping[Group, Tensor], visible: Bool[Tensor, " N"] | None = None,
             learning_rates: LearningRates | None = None, displacement: Float[Tensor, "N 3"] | None = None) -> None:
        """One step, in place on the tensors of `scene`; a group absent from `grads` keeps its values and moments.

        Rows that are not `visible` keep values and moments bit by bit (sparse Adam; the bias correction counts all steps).
        `learning_rates` replaces the rates of its groups for this step. `displacement` is added to the means after the update:
        the way in for density.mcmc_noise, because nothing else writes scene tensors.

        Raises ValueError, with nothing changed, when shapes disagree: most often an edit that was not followed.
        """
        fields = scene.fields()
        rates = dict(self.learning_rates)
        for group, rate in (learning_rates or {}).items():
            rates[group] = _per_column(rate, fields[group], group)
        for group, m in self.m.items():
            if fields[group].shape != m.shape:
                raise ValueError(f"scene.{group} is {tuple(fields[group].shape)}, its moments {tuple(m.shape)}; follow(edit) comes first")
            if group in grads and (grads[group].shape, grads[group].dtype, grads[group].device) != (m.shape, m.dtype, m.device):
                raise ValueError(f"gradient of {group} is {grads[group].dtype} {tuple(grads[group].shape)} on {grads[group].device}; "
                                 f"expected {m.dtype} {tuple(m.shape)} on {m.device}")
        self.steps_taken += 1
        for group in self.m.keys() & grads.keys():
            adam_(fields[group], grads[group], self.m[group], self.v[group], rates[group], self.betas, self.eps, self.steps_taken, visible)
        if displacement is not None:
            scene.means.add_(displacement)

    def follow(self, edit: Edit) -> None:
        """Carries the moments through an edit: rows from `edit.source`, zero where fresh and for every row of a group in `edit.reset`."""
        for moments in (self.m, self.v):
            for group in moments:
                moments[group] = moments[group][edit.source]
                moments[group][edit.fresh] = 0
                if group in edit.reset:
                    moments[group].zero_()

    def state_dict(self) -> dict[str, Tensor]:
        """Copies of everything that steps change, as a flat dict of tensors: what a safetensors file holds."""
        moments = {f"{kind}.{group}": x.clone() for kind in ("m", "v") for group, x in getattr(self, kind).items()}
        return {"steps_taken": torch.tensor(self.steps_taken), **moments}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Goes on exactly where `state_dict` was taken. Raises ValueError, with nothing changed, when it does not fit this optimiser."""
        mine = self.state_dict()
        if state.keys() != mine.keys():
            raise ValueError(f"optimiser state holds {sorted(state)}; expected {sorted(mine)}")
        for name, x in state.items():
            if x.dtype != mine[name].dtype or x.shape != mine[name].shape:
                raise ValueError(f"optimiser state {name} is {x.dtype} {tuple(x.shape)}; "
                                 f"expected {mine[name].dtype} {tuple(mine[name].shape)}")
        self.steps_taken = int(state["steps_taken"])
        for kind in ("m", "v"):
            for group, x in getattr(self, kind).items():
                x.copy_(state[f"{kind}.{group}"])


def adam_(param: Tensor, grad: Tensor, m: Tensor, v: Tensor, rates: Float[Tensor, " columns"], betas: tuple[float, float], eps: float,
          step: int, visible: Bool[Tensor, " N"] | None = None) -> None:
    """One Adam step in place on param, m, v [N, ...]; `step` counts from 1. Native on CPU tensors where the library is there."""
    library = native.library_for(param)
    if library is None or not param.is_contiguous():
        return adam_reference_(param, grad, m, v, rates, betas, eps, step, visible)
    library.sk_adam(param.shape[0], rates.numel(), param, grad.contiguous(), m, v, rates, *betas, eps, step,
                    None if visible is None else visible.to(torch.int32), 0)
    torch.autograd.graph.increment_version((param, m, v))     # autograd cannot see a native write: a stale graph must fail, not mislead


def adam_reference_(param: Tensor, grad: Tensor, m: Tensor, v: Tensor, rates: Float[Tensor, " columns"], betas: tuple[float, float],
                    eps: float, step: int, visible: Bool[Tensor, " N"] | None = None) -> None:
    """adam_ in plain torch: the definition (Kingma & Ba 2015, algorithm 1)."""
    new_m = betas[0] * m + (1 - betas[0]) * grad
    new_v = betas[1] * v + (1 - betas[1]) * grad * grad
    m_hat, v_hat = new_m / (1 - betas[0] ** step), new_v / (1 - betas[1] ** step)
    new = param - rates.view(1, *param.shape[1:]) * m_hat / (v_hat.sqrt() + eps)
    if visible is not None:
        rows = visible.view(-1, *[1] * (param.ndim - 1))
        new, new_m, new_v = new.where(rows, param), new_m.where(rows, m), new_v.where(rows, v)
    param.copy_(new)
    m.copy_(new_m)
    v.copy_(new_v)


def _per_column(rate: float | Tensor, field: Tensor, group: str) -> Float[Tensor, " columns"]:
    """`rate` as one number per column of `field` [N, ...] seen as [N, columns]."""
    columns = field.shape[1:].numel()
    if isinstance(rate, Tensor):
        fits = rate.shape == (columns,) and bool(((rate >= 0) & rate.isfinite()).all())
    else:
        fits = rate >= 0 and math.isfinite(rate)
    if not fits:
        raise ValueError(f"learning rate of {group} is {rate}; expected a number or {columns} numbers, finite and not negative")
    return rate.to(field).contiguous() if isinstance(rate, Tensor) else torch.full((columns,), rate, dtype=field.dtype, device=field.device)
