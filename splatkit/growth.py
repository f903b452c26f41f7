"""How the number of Gaussians changes while a scene is fitted: what the loop of `reconstruct` calls, one class for each kind."""
from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .adc import grow_and_prune, reset_opacity
from .config import Reconstruct
from .density import mcmc_noise, relocate_and_grow
from .raster import RasterStats
from .scene import Edit, Part, Scene


class Fixed:
    """No growth; the base of the others. `extent` is the radius of the cameras in world units.

    With `part` the scenes of steps are those rows of a larger one; `after_step` wants the whole of it, and `stats` of the whole, where `due`.
    """

    stats: RasterStats | None = None        # what render() fills for `after_step`
    part: Part | None = None

    @staticmethod
    def first(config: Reconstruct) -> tuple[float, float]:
        """Opacity and scale factor of the first Gaussians (density.from_points)."""
        return 0.1, 1.0

    def __init__(self, config: Reconstruct, extent: float, n: int, device: torch.device | str = "cpu"):
        self.config, self.extent, self.device = config, extent, device
        self.generator = torch.Generator(device).manual_seed(config.seed + 1)

    def pulls(self, scene: Scene) -> dict[str, float]:
        """What the loss has beside the photos, as factors on d opacity / d logit_opacities and d scale / d log_scales."""
        return {}

    @torch.no_grad()
    def regularise(self, grads: dict[str, Tensor], scene: Scene) -> None:
        """Adds the gradients of `pulls`."""
        pulls = self.pulls(scene)
        if pull := pulls.get("logit_opacities"):
            o = torch.sigmoid(scene.logit_opacities)
            grads["logit_opacities"] += pull * o * (1 - o)
        if pull := pulls.get("log_scales"):
            grads["log_scales"] += pull * scene.scales

    def displacement(self, scene: Scene, rate: float) -> Tensor | None:
        """What is added to the means beside the step whose rate for them is `rate`."""

    def map_stats(self, fn: Callable[[Tensor], Tensor]) -> None:
        """`fn` of each per-row statistic in its stead."""
        if self.stats:
            self.stats = RasterStats(**{name: fn(x) for name, x in vars(self.stats).items()})

    def due(self, step: int) -> bool:
        """Whether `after_step` changes the scene at this step."""
        return False

    def after_step(self, scene: Scene, step: int) -> tuple[Scene, Edit | None]:
        """The scene after the changes that are due at this step, and how its rows changed (None: nothing was due)."""
        return scene, None

    def state_dict(self) -> dict[str, Tensor]:
        """Copies of everything that steps change."""
        stats = {f"stats.{name}": x.clone() for name, x in vars(self.stats).items()} if self.stats else {}
        return {"generator": self.generator.get_state(), **stats}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.generator.set_state(state["generator"].cpu())
        stats = {name.removeprefix("stats."): x for name, x in state.items() if name.startswith("stats.")}
        self.stats = RasterStats(**{name: x.to(self.device) for name, x in stats.items()}) if stats else None


class MCMC(Fixed):
    """3DGS-MCMC (Kheradmand et al. 2024)."""

    @staticmethod
    def first(config: Reconstruct) -> tuple[float, float]:
        return config.mcmc.init_opacity, config.mcmc.init_scale

    def pulls(self, scene: Scene) -> dict[str, float]:
        """Of opacity_reg * mean(opacities) + scale_reg * mean(standard deviations) (eq. 8)."""
        mcmc, n = self.config.mcmc, self.part.total if self.part else len(scene)
        return {"logit_opacities": mcmc.opacity_reg / n, "log_scales": mcmc.scale_reg / (3 * n)}

    def displacement(self, scene: Scene, rate: float) -> Tensor | None:
        return mcmc_noise(scene, rate, self.config.mcmc.noise, self.generator, self.part)

    def due(self, step: int) -> bool:
        mcmc = self.config.mcmc
        return mcmc.start <= step <= mcmc.stop_fraction * self.config.steps and step % mcmc.every == 0

    def after_step(self, scene: Scene, step: int) -> tuple[Scene, Edit | None]:
        mcmc = self.config.mcmc
        if not self.due(step):
            return scene, None
        return relocate_and_grow(scene, self.config.max_gaussians, mcmc.growth, mcmc.dead_opacity, self.generator)


class ADC(Fixed):
    """Adaptive density control (Kerbl et al. 2023)."""

    @staticmethod
    def first(config: Reconstruct) -> tuple[float, float]:
        return config.adc.init_opacity, config.adc.init_scale

    def __init__(self, config: Reconstruct, extent: float, n: int, device: torch.device | str = "cpu"):
        super().__init__(config, extent, n, device)
        self.stats = RasterStats.zeros(n, device)

    def due(self, step: int) -> bool:
        adc = self.config.adc
        return step <= adc.stop_fraction * self.config.steps and (self._grows(step) or (adc.reset_every > 0 and step % adc.reset_every == 0))

    def _grows(self, step: int) -> bool:
        return step >= self.config.adc.start and step % self.config.adc.every == 0

    def after_step(self, scene: Scene, step: int) -> tuple[Scene, Edit | None]:
        adc = self.config.adc
        if step > adc.stop_fraction * self.config.steps:
            self.stats = None
            return scene, None
        edit = None
        if self._grows(step):
            was_reset = 0 < adc.reset_every < step
            scene, edit = grow_and_prune(scene, self.stats, grad_threshold=adc.grad_threshold, absgrad=adc.absgrad, split_scale=adc.split_scale * self.extent,
                                         cap=self.config.max_gaussians, prune_opacity=adc.prune_opacity, max_world_scale=0.1 * self.extent if was_reset else None,
                                         clone_opacity_correction=adc.clone_opacity_correction, generator=self.generator)
            self.stats = RasterStats.zeros(len(scene), self.device)
        if adc.reset_every and step % adc.reset_every == 0:
            scene, lowered = reset_opacity(scene)
            edit = edit.then(lowered) if edit else lowered
        return scene, edit


KINDS = {"mcmc": MCMC, "adc": ADC, "none": Fixed}
