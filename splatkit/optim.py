"""Adam and AdamW-GS on a scene: the one place that writes scene tensors in place, with state that follows the edits of density."""
from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from . import native
from .raster import Recorded
from .scene import LOG_SCALE_MAX, LOG_SCALE_MIN, Edit, Group, Part, Scene

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


@dataclass(frozen=True)
class AttributeDecay:
    """Decoupled attribute regularisation (DAR; Ding et al. 2026): every step also takes

        learning rate x min(strength / pixels x d attribute / d parameter / (sqrt(v_hat) + eps), ceiling)

    off logit_opacities (attribute sigmoid) and log_scales (attribute exp). It never enters the moments, so what the photos pull at
    strongly is hardly decayed and what they do not need fades. Each window of steps counts both its ends.
    """

    opacity: float = 1e-2
    scale: float = 1e-4
    ceiling: float = 10.0
    opacity_steps: tuple[int, int] = (3000, 15_000)
    scale_steps: tuple[int, int] = (1000, 15_000)

    def strength(self, group: Group, step: int, pixels: int) -> float:
        """What DAR multiplies the derivative of `group` with at this step; 0 outside of its window."""
        strength, (first, last) = {"logit_opacities": (self.opacity, self.opacity_steps), "log_scales": (self.scale, self.scale_steps)}.get(group, (0.0, (0, -1)))
        return strength / pixels if first <= step <= last else 0.0


@dataclass(frozen=True)
class StateDecay:
    """Re-state regularisation (RSR; Ding et al. 2026): every `every` steps of a window (ends included), after the update, the moments
    of a random share of all rows shrink: m by keep_m, v by keep_v. `shares` are (from this step, share), ascending.
    """

    every: int = 100
    steps: tuple[int, int] = (1000, 15_000)
    shares: tuple[tuple[int, float], ...] = ((1000, 0.1),)
    keep_m: float = 0.2
    keep_v: float = 0.04

    def share(self, step: int) -> float:
        due = self.steps[0] <= step <= self.steps[1] and step % self.every == 0
        return max((entry for entry in self.shares if entry[0] <= step), default=(0, 0.0))[1] if due else 0.0


class Adam:
    """Adam (Kingma & Ba 2015) over the groups of a scene, with a learning rate per group or per column of a group; with its three
    switches (`visible` given to step, `attribute_decay`, `state_decay`) it is AdamW-GS (Ding et al. 2026).

    It owns the moments `m` and `v`, shaped like their fields, the steps that each row has taken (`row_steps` [N]) and their number
    in all (`steps_taken`); the scene stays a plain value. Groups without a learning rate are frozen: they have no state, and a
    gradient for them is ignored. Rows change by `follow` only. With `part`, the scene is those rows of a larger one. What a run does not
    change (rates, betas, eps, switches) comes from its configuration and is not part of `state_dict`.
    """

    def __init__(self, scene: Scene, learning_rates: LearningRates, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-15,
                 attribute_decay: AttributeDecay | None = None, state_decay: StateDecay | None = None, seed: int = 0, part: Part | None = None):
        fields = scene.fields()
        if unknown := set(learning_rates) - set(fields):
            raise ValueError(f"learning rates for {sorted(unknown)}; expected some of {sorted(fields)}")
        if not (0 <= betas[0] < 1 and 0 <= betas[1] < 1 and eps >= 0):
            raise ValueError(f"betas {betas} and eps {eps}; expected 0 <= beta < 1 and eps >= 0")
        self.betas, self.eps, self.attribute_decay, self.state_decay, self.part = tuple(betas), eps, attribute_decay, state_decay, part
        self.learning_rates = {group: _per_column(rate, fields[group], group) for group, rate in learning_rates.items()}
        self.steps_taken = 0
        self.row_steps = torch.zeros(len(scene), dtype=torch.int32, device=scene.device)
        self._even: int | None = 0      # what all of row_steps are, where they are alike
        self.generator = torch.Generator().manual_seed(seed)        # draws the rows of state_decay
        # Contiguous whatever the field's strides are: native code walks them row by row.
        self.m = {group: torch.zeros_like(fields[group].detach(), memory_format=torch.contiguous_format) for group in learning_rates}
        self.v = {group: torch.zeros_like(m) for group, m in self.m.items()}

    @torch.no_grad()
    def step(self, scene: Scene, grads: Mapping[Group, Tensor], visible: Bool[Tensor, " N"] | None = None, pixels: int | None = None,
             learning_rates: LearningRates | None = None, displacement: Float[Tensor, "N 3"] | None = None) -> None:
        """One step, in place on the tensors of `scene`; a group absent from `grads` keeps its values and moments.

        Rows that are not `visible` keep values, moments and step count bit by bit (sparse Adam), but for state_decay, which draws from
        all rows. Bias corrections are of each row's own steps. `pixels` of the picture behind the gradients is what attribute_decay
        needs. `learning_rates` replaces the rates of its groups for this step. `displacement` is added to the means after the update:
        the way in for density.mcmc_noise, because nothing else writes scene tensors.

        Raises ValueError, with nothing changed, when shapes disagree (most often an edit that was not followed) or `pixels` is missing.
        """
        fields, rates = self._begin(scene, grads, visible, pixels, learning_rates)
        steps = self.row_steps if self._even is None else self._even
        for group in self.m.keys() & grads.keys():
            decay, ceiling = self._decay(group, pixels)
            adam_(fields[group], grads[group], self.m[group], self.v[group], rates[group], self.betas, self.eps, steps, visible,
                  (_ATTRIBUTES[group], decay, ceiling) if decay else None, self.steps_taken)
        self._finish(scene, displacement)

    @torch.no_grad()
    def step_recorded(self, scene: Scene, picture: Recorded, v_splats: Float[Tensor, "N 12"], sparse: bool = False, learning_rates: LearningRates | None = None,
                      displacement: Float[Tensor, "N 3"] | None = None, pulls: Mapping[Group, float] = {}) -> None:
        """step() straight from the gradient by a picture's projected Gaussians (`raster.splat_gradients`): on a card one kernel goes back through the
        projection and takes the step, so no gradient of the scene is stored. `sparse`: rows that the picture does not show keep everything. `pulls`
        are factors on d opacity / d logit_opacities and d scale / d log_scales that the gradients get beside the picture's. `v_splats` is
        used up.
        """
        if len(picture.radii_px) != len(scene) or v_splats.shape != (len(scene), native.CONST["SK_SPLAT"]):
            raise ValueError(f"the picture shows {len(picture.radii_px)} rows and the gradient is {tuple(v_splats.shape)}, the scene has {len(scene)}; "
                             "record the picture anew after an edit")
        library, visible, camera = native.library_of(scene.means), (picture.radii_px > 0) if sparse else None, picture.camera
        fields, rates = self._begin(scene, {}, visible, camera.width * camera.height, learning_rates)
        groups = ("means", "quats", "log_scales", "logit_opacities", "sh")
        table, row_steps = (None, None) if self._even is not None else (_correction_table(self.steps_taken, self.betas, scene.means), self.row_steps)
        opacity, ceiling = self._decay("logit_opacities", camera.width * camera.height)
        library.sk_project_vjp_adam(
            len(scene), camera.width, camera.height, picture.sh_degree, scene.sh.shape[1], picture.settings, *[fields[g] for g in groups], camera.world_to_cam.contiguous(),
            camera.K.contiguous(), picture.radii_px, v_splats, *[self.m.get(g) for g in groups], *[self.v.get(g) for g in groups],
            torch.cat([rates[g] if g in rates else fields[g].new_zeros(fields[g].shape[1:].numel()) for g in groups]), *self.betas, self.eps,
            1 if self._even is None else self._even, table, row_steps, int(sparse), opacity, self._decay("log_scales", camera.width * camera.height)[0], ceiling,
            pulls.get("logit_opacities", 0.0), pulls.get("log_scales", 0.0), *library.room("PROJECT_VJP"))
        torch.autograd.graph.increment_version([x for g in groups if g in self.m for x in (fields[g], self.m[g], self.v[g])])
        self._finish(scene, displacement)

    def _decay(self, group: Group, pixels: int | None) -> tuple[float, float]:
        """Strength and ceiling of attribute_decay on this group at this step."""
        return (self.attribute_decay.strength(group, self.steps_taken, pixels), self.attribute_decay.ceiling) if self.attribute_decay else (0.0, 0.0)

    def _begin(self, scene: Scene, grads: Mapping[Group, Tensor], visible: Tensor | None, pixels: int | None,
               learning_rates: LearningRates | None) -> tuple[dict[str, Tensor], dict[Group, Tensor]]:
        """Checks a step, counts it, and returns the scene's fields and the rates of this step."""
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
        if self.attribute_decay and not (pixels and pixels > 0):
            raise ValueError(f"pixels is {pixels}; attribute_decay needs the number of pixels of the picture behind the gradients")
        self.steps_taken += 1
        self.row_steps += 1 if visible is None else visible
        self._even = None if visible is not None or self._even is None else self._even + 1
        return fields, rates

    def _finish(self, scene: Scene, displacement: Tensor | None) -> None:
        if displacement is not None:
            scene.means.add_(displacement)
        if self.state_decay and (share := self.state_decay.share(self.steps_taken)):
            # A permutation: torch.multinomial refuses more than 2^24 rows.
            n = self.part.total if self.part else len(scene)
            rows = torch.randperm(n, generator=self.generator)[:math.floor(share * n)].to(scene.device)
            if self.part:
                rows = rows[(rows >= self.part.first) & (rows < self.part.last)] - self.part.first
            for moments, keep in ((self.m, self.state_decay.keep_m), (self.v, self.state_decay.keep_v)):
                for x in moments.values():
                    x[rows] = x[rows] * keep

    def follow(self, edit: Edit, fresh_steps: Literal["inherit", "zero"] = "inherit", whole: Callable[[Tensor], Tensor] = lambda x: x) -> None:
        """Carries the state through an edit: rows from `edit.source`; moments are zero where fresh and in every row of a group in
        `edit.reset`. Fresh rows inherit the step count of their source, so that their first steps are as large as those of Adam with
        one counter for all; "zero" starts them at one learning rate a step. `whole` makes what `edit.source` counts rows of out of
        this state, one tensor after the other: where this is a part of a larger scene, from all its parts."""
        self.row_steps = whole(self.row_steps)[edit.source]
        if fresh_steps == "zero":
            self.row_steps[edit.fresh] = 0
            self._even = None
        for moments in (self.m, self.v):
            for group in moments:
                moments[group] = whole(moments[group])[edit.source]
                moments[group][edit.fresh] = 0
                if group in edit.reset:
                    moments[group].zero_()

    def state_dict(self) -> dict[str, Tensor]:
        """Copies of everything that steps change, as a flat dict of tensors: what a safetensors file holds."""
        moments = {f"{kind}.{group}": x.clone() for kind in ("m", "v") for group, x in getattr(self, kind).items()}
        return {"steps_taken": torch.tensor(self.steps_taken), "row_steps": self.row_steps.clone(), "generator": self.generator.get_state(), **moments}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Goes on exactly where `state_dict` was taken. Raises ValueError, with nothing changed, when it does not fit this optimiser."""
        mine = self.state_dict()
        if state.keys() != mine.keys():
            raise ValueError(f"optimiser state holds {sorted(state)}; expected {sorted(mine)}")
        for name, x in state.items():
            if x.dtype != mine[name].dtype or x.shape != mine[name].shape:
                raise ValueError(f"optimiser state {name} is {x.dtype} {tuple(x.shape)}; "
                                 f"expected {mine[name].dtype} {tuple(mine[name].shape)}")
        taken, rows = int(state["steps_taken"]), state["row_steps"]
        least, most = (int(rows.min()), int(rows.max())) if len(rows) else (0, 0)
        if not 0 <= least <= most <= taken:
            raise ValueError(f"optimiser state row_steps reaches from {least} to {most}; expected 0 to steps_taken, {taken}")
        self.steps_taken = taken
        self.row_steps.copy_(state["row_steps"])
        first = int(self.row_steps[0]) if len(self.row_steps) else 0
        self._even = first if bool((self.row_steps == first).all()) else None
        self.generator.set_state(state["generator"])
        for kind in ("m", "v"):
            for group, x in getattr(self, kind).items():
                x.copy_(state[f"{kind}.{group}"])


_ATTRIBUTES = {"logit_opacities": "opacity", "log_scales": "scale"}
Decay = tuple[str, float, float]        # "opacity" or "scale", strength over pixels, ceiling


def adam_(param: Tensor, grad: Tensor, m: Tensor, v: Tensor, rates: Float[Tensor, " columns"], betas: tuple[float, float], eps: float,
          steps: int | Int[Tensor, " N"], visible: Bool[Tensor, " N"] | None = None, decay: Decay | None = None, most: int | None = None) -> None:
    """One Adam step in place on param, m, v [N, ...]; `steps` counts from 1, for all rows or for each, none of which has taken more than `most` (None: is looked up,
    for which a card is waited for). Native where there is a library for the tensors; on a card it reads 16 bytes at a time, so rows cut out of a tensor may fall to torch."""
    library = native.library_for(param)
    if library is None or not param.is_contiguous() or (param.is_cuda and any(x.data_ptr() % 16 for x in (param, grad, m, v))):
        return adam_reference_(param, grad, m, v, rates, betas, eps, steps, visible, decay)
    attribute, strength, ceiling = decay or ("plain", 0.0, 0.0)
    each = isinstance(steps, Tensor)
    if each and most is None:
        least, most = (int(steps.min()), int(steps.max())) if len(steps) else (0, 0)
        if least < 0:
            raise ValueError(f"a row has taken {least} steps; expected 0 or more")
    table = _correction_table(most, betas, param) if each else None
    library.sk_adam(param.shape[0], rates.numel(), param, grad.contiguous(), m, v, rates, *betas, eps, 1 if each else steps, table, steps.to(torch.int32) if each else None,
                    None if visible is None else visible.to(torch.int32), native.CONST[f"SK_{attribute.upper()}"], strength, ceiling, library.stream)
    torch.autograd.graph.increment_version((param, m, v))     # autograd cannot see a native write: a stale graph must fail, not mislead


def adam_reference_(param: Tensor, grad: Tensor, m: Tensor, v: Tensor, rates: Float[Tensor, " columns"], betas: tuple[float, float],
                    eps: float, steps: int | Int[Tensor, " N"], visible: Bool[Tensor, " N"] | None = None, decay: Decay | None = None) -> None:
    """adam_ in plain torch: the definition (Kingma & Ba 2015, algorithm 1; Ding et al. 2026 for `decay`)."""
    per_row = lambda x: x.to(param).view(-1, *[1] * (param.ndim - 1))
    correct1, correct2 = (per_row(c) for c in _corrections(torch.as_tensor(steps, device=param.device), betas))
    new_m = betas[0] * m + (1 - betas[0]) * grad
    new_v = betas[1] * v + (1 - betas[1]) * grad * grad
    root = new_v.sqrt() * correct2 + eps
    update = new_m * correct1 / root
    if decay is not None:
        attribute, strength, ceiling = decay
        slope = torch.sigmoid(param) * torch.sigmoid(-param) if attribute == "opacity" else param.clamp(LOG_SCALE_MIN, LOG_SCALE_MAX).exp()
        update = update + (strength * slope / root).clamp(max=ceiling)
    new = param - rates.view(1, *param.shape[1:]) * update
    if visible is not None:
        rows = visible.view(-1, *[1] * (param.ndim - 1))
        new, new_m, new_v = new.where(rows, param), new_m.where(rows, m), new_v.where(rows, v)
    param.copy_(new)
    m.copy_(new_m)
    v.copy_(new_v)


def _corrections(steps: Int[Tensor, "*N"], betas: tuple[float, float]) -> tuple[Float[Tensor, "*N"], Float[Tensor, "*N"]]:
    """1 / (1 - beta1^t) and 1 / sqrt(1 - beta2^t) in float64; rows that have taken no step, and so are not visible, get those of one."""
    t = steps.clamp(min=1).double()
    return 1 / (1 - betas[0] ** t), (1 - betas[1] ** t).rsqrt()


def _correction_table(most: int, betas: tuple[float, float], like: Tensor) -> Float[Tensor, "T 2"]:
    """Both corrections of 0 to `most` steps, and of some more."""
    return _corrections_up_to(max(1024, 1 << most.bit_length()), betas, like.dtype, like.device)


@functools.lru_cache(8)
def _corrections_up_to(count: int, betas: tuple[float, float], dtype: torch.dtype, device: torch.device) -> Float[Tensor, "T 2"]:
    return torch.stack(_corrections(torch.arange(count), betas), dim=1).to(device, dtype)


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
