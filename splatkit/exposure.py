"""Exposure: a gain and an offset per photo and channel, so that a brighter photo does not make a brighter scene."""
from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from .optim import adam_


class Exposures:
    """seen = exp(log_gain) * color + offset of each of P photos, fitted beside the scene by Adam (Kingma & Ba 2015).

    After each step the mean over the photos is taken off both, so that the scene keeps the photos' mean exposure: what a gain of all would
    do is the scene's to do. A held-out photo is compared at that mean exposure; nothing is fitted to it.
    """

    def __init__(self, photos: int, learning_rate: float, device: torch.device | str = "cpu"):
        new = lambda: torch.zeros(photos, 3, device=device)
        self.log_gain, self.offset = new().requires_grad_(), new().requires_grad_()
        self.learning_rate, self.steps_taken = learning_rate, 0
        self.moments = {name: new() for name in ("m.log_gain", "m.offset", "v.log_gain", "v.offset")}

    @property
    def parameters(self) -> tuple[Tensor, Tensor]:
        return self.log_gain, self.offset

    def apply(self, color: Float[Tensor, "H W 3"], photo: int) -> Float[Tensor, "H W 3"]:
        """The picture as this photo has it."""
        return color * self.log_gain[photo].exp() + self.offset[photo]

    @torch.no_grad()
    def step(self, grads: list[Tensor]) -> None:
        """One step; a gradient that is not finite is left out. On a card, where a look would wait, it counts as zeros."""
        if grads[0].is_cuda:
            grads = [torch.where(torch.isfinite(g).all(), g, 0) for g in grads]
        elif not all(bool(torch.isfinite(g).all()) for g in grads):
            return
        self.steps_taken += 1
        for name, x, g in zip(("log_gain", "offset"), self.parameters, grads):
            adam_(x, g, self.moments[f"m.{name}"], self.moments[f"v.{name}"], x.new_full((3,), self.learning_rate), (0.9, 0.999), 1e-15, self.steps_taken)
            x -= x.mean(0)

    def state_dict(self) -> dict[str, Tensor]:
        """Copies of everything that steps change."""
        return {"log_gain": self.log_gain.detach().clone(), "offset": self.offset.detach().clone(), "steps_taken": torch.tensor(self.steps_taken),
                **{name: x.clone() for name, x in self.moments.items()}}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Goes on exactly where `state_dict` was taken."""
        for name, x in {"log_gain": self.log_gain, "offset": self.offset, **self.moments}.items():
            x.copy_(state[name])
        self.steps_taken = int(state["steps_taken"])
