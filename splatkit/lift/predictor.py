"""From features to depth and the raw numbers of a Gaussian per pixel. In a merged batch views come first: [V B], B fastest."""
from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from .config import MVSplatConfig
from .rays import at_quarter
from .sweep import correlate, depth_planes
from .unet import GROUPS, UNet

STRIP = 64      # rows of a picture whose Gaussians are made at a time


@dataclass(frozen=True)
class Prediction:
    """What the heads say of every pixel."""

    inverse_depth: Float[Tensor, "B V H W"]
    opacity_logits: Float[Tensor, "B V H W"]
    raw_gaussians: Float[Tensor, "B V R H W"]           # 2 offsets, 3 scales, 4 of the quaternion, 3 x K of the colour
    coarse_inverse_depth: Float[Tensor, "B V h w"]      # expectation over the planes, at a quarter of the resolution
    confidence: Float[Tensor, "B V H W"]                # highest probability of a plane


class DepthPredictor(nn.Module):
    """Cost volume, depth by softmax, refinement at full resolution; the names are those of the published weights."""

    def __init__(self, config: MVSplatConfig):
        super().__init__()
        dim, planes, cost, fine = config.feature_dim, config.depth_candidates, config.cost_width, config.refine_width
        raw = 9 + 3 * (config.sh_degree + 1) ** 2
        conv = lambda n_in, n_out: nn.Conv2d(n_in, n_out, 3, padding=1)
        self.planes = planes
        self.corr_refine_net = nn.Sequential(conv(planes + dim, cost), nn.GroupNorm(GROUPS, cost), nn.GELU(), UNet(cost, 3, config.cost_heads), conv(cost, planes))
        self.regressor_residual = nn.Conv2d(planes + dim, planes, 1)
        self.depth_head_lowres = nn.Sequential(conv(planes, 2 * planes), nn.GELU(), conv(2 * planes, planes))
        self.upsampler = nn.Sequential(conv(2 * dim, dim), nn.Upsample(scale_factor=4, mode="bilinear", align_corners=True), nn.GELU())
        self.proj_feature = conv(dim, fine)
        self.refine_unet = nn.Sequential(conv(3 + fine + 2, fine), nn.GroupNorm(4, fine), nn.GELU(), UNet(fine, 5, heads=1))
        self.to_gaussians = nn.Sequential(conv(fine + 3 + dim, config.gaussian_width), nn.GELU(), conv(config.gaussian_width, raw))
        self.to_disparity = nn.Sequential(conv(fine, 2 * fine), nn.GELU(), conv(2 * fine, 2))

    def forward(self, images: Float[Tensor, "B V 3 H W"], local: Float[Tensor, "B V C h w"], features: Float[Tensor, "B V C h w"], K: Float[Tensor, "B V 3 3"],
                world_to_cam: Float[Tensor, "B V 4 4"], near: Float[Tensor, "B V"], far: Float[Tensor, "B V"], official: bool = False) -> Prediction:
        """`local` and `features` are those of Backbone; `K` is in pixels of the pictures."""
        b, v = images.shape[:2]
        merged = lambda x: x.transpose(0, 1).flatten(0, 1)
        split = lambda x: x.unflatten(0, (v, b)).transpose(0, 1)
        planes = depth_planes(near, far, self.planes)
        correlation = merged(correlate(features, at_quarter(K), world_to_cam, planes, official))
        coarse, peak = self._coarse(correlation, merged(features), merged(planes), v)
        disparity = F.interpolate(coarse, scale_factor=4, mode="bilinear", align_corners=True)
        confidence = F.interpolate(peak, scale_factor=4, mode="nearest")
        pictures, both = merged(images), torch.cat([merged(features), merged(local)], dim=1)
        if torch.is_grad_enabled():
            upsampled = self.upsampler(both)
            refined = self._refine(pictures, self.proj_feature(upsampled), disparity, confidence, n_views=v)
            raw, change = self.to_gaussians(torch.cat([refined, pictures, upsampled], dim=1)), self.to_disparity(refined)
        else:       # at full resolution what lies between two convolutions is the peak of memory: less of it at a time, and made twice rather than kept
            refined = self._refine(pictures, torch.cat([self.proj_feature(self.upsampler(x)) for x in both.split(b)]), disparity, confidence, n_views=v)
            raw, change = self._heads(refined, pictures, both, b)
        lowest, highest = (merged(1 / x)[:, None, None, None] for x in (far, near))
        inverse_depth = (disparity + change[:, :1]).clamp(lowest, highest)
        return Prediction(split(inverse_depth[:, 0]), split(change[:, 1]), split(raw), split(coarse[:, 0]), split(confidence[:, 0]))

    def _coarse(self, correlation: Tensor, features: Tensor, planes: Tensor, n_views: int) -> tuple[Tensor, Tensor]:
        """1/depth and the highest probability of a plane, at a quarter of the resolution."""
        x = torch.cat([correlation, features], dim=1)
        stem, norm, gelu, unet, last = self.corr_refine_net
        refined = last(unet(gelu(norm(stem(x))), n_views)) + self.regressor_residual(x)
        probability = self.depth_head_lowres(refined).softmax(dim=1)
        return (probability * planes[:, :, None, None]).sum(dim=1, keepdim=True), probability.amax(dim=1, keepdim=True)

    def _refine(self, *inputs: Tensor, n_views: int) -> Tensor:
        stem, norm, gelu, unet = self.refine_unet
        x = torch.cat(inputs, dim=1)
        del inputs      # nothing of full resolution waits for the U-Net to end
        x = stem(x)
        x = norm(x)
        x = gelu(x)
        return unet(x, n_views)

    def _heads(self, refined: Tensor, pictures: Tensor, both: Tensor, size: int) -> tuple[Tensor, Tensor]:
        """to_gaussians and to_disparity by view and strip of rows. The two convolutions of each see two rows beyond a strip."""
        n, _, height, width = refined.shape
        # Channels last: a third faster on a CPU, and the order in which the numbers are used.
        raw, change = (refined.new_empty(n, net[-1].out_channels, height, width).contiguous(memory_format=torch.channels_last) for net in (self.to_gaussians, self.to_disparity))
        for first in range(0, n, size):
            views = slice(first, first + size)
            upsampled = self.upsampler[:-1](both[views])
            for top in range(0, height, STRIP):
                start, inner = max(0, top - 2), slice(top, min(top + STRIP, height))
                part = [x[:, :, start:inner.stop + 2].contiguous(memory_format=torch.channels_last) for x in (refined[views], pictures[views], upsampled)]
                kept = slice(top - start, inner.stop - start)
                raw[views, :, inner] = self.to_gaussians(torch.cat([*part[:2], self.upsampler[-1](part[2])], dim=1))[:, :, kept]
                change[views, :, inner] = self.to_disparity(part[0])[:, :, kept]
        return raw, change
