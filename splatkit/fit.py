"""What the steps of a run change, and one step of it: picture, loss, gradients, optimiser."""
from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .camera import Cameras
from .config import Reconstruct
from .exposure import Exposures
from .growth import Fixed
from .io import checkpoint
from .metrics import l1_ssim
from .optim import Adam, AttributeDecay, StateDecay, sh_learning_rates
from .raster import RasterSettings, record, render, splat_gradients
from .scene import Scene


@dataclass
class Fit:
    """Everything that the steps of a run change."""

    config: Reconstruct
    scene: Scene
    adam: Adam
    growth: Fixed
    exposures: Exposures | None
    order: torch.Generator      # shuffles the photos
    queue: list[int]            # those still to come in this round
    step: int = 0

    def save(self, folder: Path, values: dict) -> None:
        parts = {"scene": self.scene.detach().fields(), "adam": self.adam.state_dict(), "growth": self.growth.state_dict(),
                 "exposures": self.exposures.state_dict() if self.exposures else {},
                 "order": {"generator": self.order.get_state(), "queue": torch.tensor(self.queue, dtype=torch.int64)}}
        folder.mkdir(exist_ok=True)
        checkpoint.save(folder, self.step, {f"{part}.{name}": x.cpu() for part, state in parts.items() for name, x in state.items()}, values)

    @staticmethod
    def first(scene: Scene, growth: Fixed, config: Reconstruct, extent: float, photos: int) -> Fit:
        exposures = Exposures(photos, config.exposure_lr, scene.device) if config.exposure else None
        return Fit(config, scene, _optimiser(scene, config, extent), growth, exposures, torch.Generator().manual_seed(config.seed), [])

    @staticmethod
    def resumed(saved: checkpoint.Checkpoint, growth: Fixed, config: Reconstruct, extent: float, photos: int) -> Fit:
        part = lambda name: {k.removeprefix(name): x for k, x in saved.tensors.items() if k.startswith(name)}
        fit = Fit.first(Scene(**part("scene.")).to(growth.device), growth, config, extent, photos)
        fit.adam.load_state_dict(part("adam."))
        fit.growth.load_state_dict(part("growth."))
        if fit.exposures:
            fit.exposures.load_state_dict(part("exposures."))
        fit.order.set_state(saved.tensors["order.generator"])
        fit.queue, fit.step = saved.tensors["order.queue"].tolist(), saved.step
        return fit

    def step_on(self, camera: Cameras, photo: Tensor, mask: Tensor | None, place: int, background: Tensor, sh_degree: int, settings: RasterSettings,
                rate: float) -> tuple[Tensor, Tensor, list[str]]:
        """One step of the optimiser on photo number `place`, `rate` being that of the means.

        Returns the loss and the picture before the step, and the fields whose gradient was not finite: then no step was taken.
        """
        go = self._by_recorded_picture if records(self.scene, self.config) else self._by_autograd
        return go(camera, photo, mask, place, background, sh_degree, settings, rate)

    def _loss(self, color: Tensor, photo: Tensor, mask: Tensor | None, place: int) -> tuple[Tensor, Tensor, Tensor]:
        """The photometric loss of a picture, its gradient by that, and the picture as this photo's exposure has it."""
        with torch.enable_grad():
            color = color.detach().requires_grad_()
            seen = self.exposures.apply(color, place) if self.exposures else color
            loss = l1_ssim(seen, photo, self.config.ssim_weight, mask)
            v_color, *v_exposure = torch.autograd.grad(loss, [color, *(self.exposures.parameters if self.exposures else ())])
        if self.exposures:
            self.exposures.step(v_exposure)
        return loss.detach(), v_color, seen.detach()

    def _by_recorded_picture(self, camera, photo, mask, place, background, sh_degree, settings, rate):
        """On a card. What is not finite is judged by the loss alone, and only where it is looked at anyway, every hundred steps: a look waits for the card."""
        scene = self.scene.detach()
        picture = record(scene, camera, background, sh_degree, settings)
        loss, v_color, seen = self._loss(picture.color, photo, mask, place)
        self.adam.step_recorded(scene, picture, splat_gradients(picture, v_color, self.growth.stats), self.config.adamw.sparse, {"means": rate},
                                self.growth.displacement(scene, rate), self.growth.pulls(scene))
        return loss, seen, ["the loss"] if self.step % 100 == 99 and not bool(torch.isfinite(loss)) else []

    def _by_autograd(self, camera, photo, mask, place, background, sh_degree, settings, rate):
        """The same by any backend, judged by the gradients."""
        scene = self.scene.requires_grad_()
        out = render(scene, camera, background=background, sh_degree=sh_degree, settings=settings, stats=self.growth.stats, backend=self.config.backend)
        loss, v_color, seen = self._loss(out.color[0], photo, mask, place)
        grads = dict(zip(scene.fields(), torch.autograd.grad(out.color, list(scene.fields().values()), v_color[None])))
        scene = scene.detach()
        if bad := [name for name, g in grads.items() if not bool(torch.isfinite(g.sum()))]:
            for x in vars(self.growth.stats).values() if self.growth.stats else ():
                x.nan_to_num_(0, 0, 0)
            return loss, seen, bad
        self.growth.regularise(grads, scene)
        self.adam.step(scene, grads, out.visible[0] if self.config.adamw.sparse else None, camera.width * camera.height, learning_rates={"means": rate},
                       displacement=self.growth.displacement(scene, rate))
        return loss, seen, []


def records(scene: Scene, config: Reconstruct) -> bool:
    """Whether steps go back through the recorded picture, which stores no gradient of the scene: by the CUDA library."""
    return scene.means.is_cuda and config.backend in ("auto", "cuda")


def _optimiser(scene: Scene, config: Reconstruct, extent: float) -> Adam:
    lr, adamw, at = config.lr, config.adamw, lambda share: round(share * config.steps)
    rates = {"means": lr.means * extent, "quats": lr.quats, "log_scales": lr.log_scales, "logit_opacities": lr.logit_opacities,
             "sh": sh_learning_rates((config.sh_degree + 1) ** 2, lr.sh_dc, lr.sh_rest)}
    decay = AttributeDecay(adamw.opacity_strength, adamw.scale_strength, adamw.ceiling, (at(adamw.opacity_from), at(adamw.until)), (at(adamw.scale_from), at(adamw.until)))
    shrink = StateDecay(adamw.state_every, (at(adamw.scale_from), at(adamw.until)), ((0, adamw.state_share), (at(adamw.state_late_from), adamw.state_share_late)))
    return Adam(scene, rates, attribute_decay=decay if adamw.attribute_decay else None, state_decay=shrink if adamw.state_decay else None, seed=config.seed + 2)
