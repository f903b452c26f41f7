"""How the number of Gaussians changes while a scene is fitted: what the loop of `reconstruct` calls, one class for each kind."""
from __future__ import annotations

import torch
from torch import Tensor

from .adc import grow_and_prune, reset_opacity
from .config import Reconstruct
from .density import mcmc_noise, relocate_and_grow
from .raster import RasterStats
from .scene import Edit, Scene


class Fixed:
    """No growth; the base of the others. `extent` is the radius of the cameras in world units."""

    stats: RasterStats | None = None        # what render() fills for `after_step`
    opacity, scale_factor = 0.1, 1.0        # of the first Gaussians (density.from_points)

    def __init__(self, config: Reconstruct, extent: float, n: int):
        self.config, self.extent = config, extent
        self.generator = torch.Generator().manual_seed(config.seed + 1)

    def regularise(self, grads: dict[str, Tensor], scene: Scene) -> None:
        """Adds the gradients of what the loss has beside the photos."""

    def displacement(self, scene: Scene, rate: float) -> Tensor | None:
        """What is added to the means beside the step whose rate for them is `rate`."""

    def after_step(self, scene: Scene, step: int) -> tuple[Scene, Edit | None]:
        """The scene after the changes that are due at this step, and how its rows changed (None: nothing was due)."""
        return scene, None

    def state_dict(self) -> dict[str, Tensor]:
        """Copies of everything that steps change."""
        stats = {f"stats.{name}": x.clone() for name, x in vars(self.stats).items()} if self.stats else {}
        return {"generator": self.generator.get_state(), **stats}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.generator.set_state(state["generator"])
        stats = {name.removeprefix("stats."): x for name, x in state.items() if name.startswith("stats.")}
        self.stats = RasterStats(**stats) if stats else None


class MCMC(Fixed):
    """3DGS-MCMC (Kheradmand et al. 2024)."""

    def __init__(self, config: Reconstruct, extent: float, n: int):
        super().__init__(config, extent, n)
        self.opacity, self.scale_factor = config.mcmc.init_opacity, config.mcmc.init_scale

    @torch.no_grad()
    def regularise(self, grads: dict[str, Tensor], scene: Scene) -> None:
        """Of opacity_reg * mean(opacities) + scale_reg * mean(standard deviations) (eq. 8)."""
        mcmc = self.config.mcmc
        if mcmc.opacity_reg:
            o = torch.sigmoid(scene.logit_opacities)
            grads["logit_opacities"] += mcmc.opacity_reg / len(scene) * o * (1 - o)
        if mcmc.scale_reg:
            grads["log_scales"] += mcmc.scale_reg / (3 * len(scene)) * scene.scales

    def displacement(self, scene: Scene, rate: float) -> Tensor | None:
        return mcmc_noise(scene, rate, self.config.mcmc.noise, self.generator)

    def after_step(self, scene: Scene, step: int) -> tuple[Scene, Edit | None]:
        mcmc = self.config.mcmc
        if not (mcmc.start <= step <= mcmc.stop_fraction * self.config.steps and step % mcmc.every == 0):
            return scene, None
        return relocate_and_grow(scene, self.config.max_gaussians, mcmc.growth, mcmc.dead_opacity, self.generator)


class ADC(Fixed):
    """Adaptive density control (Kerbl et al. 2023)."""

    def __init__(self, config: Reconstruct, extent: float, n: int):
        super().__init__(config, extent, n)
        self.opacity, self.scale_factor = config.adc.init_opacity, config.adc.init_scale
        self.stats = RasterStats.zeros(n)

    def after_step(self, scene: Scene, step: int) -> tuple[Scene, Edit | None]:
        adc = self.config.adc
        if step > adc.stop_fraction * self.config.steps:
            self.stats = None
            return scene, None
        edit = None
        if step >= adc.start and step % adc.every == 0:
            was_reset = 0 < adc.reset_every < step
            scene, edit = grow_and_prune(scene, self.stats, grad_threshold=adc.grad_threshold, absgrad=adc.absgrad, split_scale=adc.split_scale * self.extent,
                                         cap=self.config.max_gaussians, prune_opacity=adc.prune_opacity, max_world_scale=0.1 * self.extent if was_reset else None,
                                         clone_opacity_correction=adc.clone_opacity_correction, generator=self.generator)
            self.stats = RasterStats.zeros(len(scene))
        if adc.reset_every and step % adc.reset_every == 0:
            scene, lowered = reset_opacity(scene)
            edit = edit.then(lowered) if edit else lowered
        return scene, edit


KINDS = {"mcmc": MCMC, "adc": ADC, "none": Fixed}
