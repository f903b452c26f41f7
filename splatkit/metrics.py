"""How close a picture is to another: PSNR, also with colours fitted, SSIM, and the photometric loss (L1 + SSIM) with its gradient; and which Gaussians it comes from."""
from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F
from jaxtyping import Float, Shaped
from torch import Tensor

from . import native
from .camera import Cameras
from .raster import RasterSettings, render, uplift
from .scene import Scene

SSIM_WINDOW, SSIM_SIGMA = 11, 1.5      # Wang et al. 2004, section III-B
SSIM_C1, SSIM_C2 = 0.01**2, 0.03**2


def psnr(image: Float[Tensor, "H W 3"], target: Float[Tensor, "H W 3"], mask: Shaped[Tensor, "H W"] | None = None) -> Float[Tensor, ""]:
    """Peak signal-to-noise ratio in dB of pictures in [0, 1], over pixels with mask != 0; infinite where they agree exactly.

    Nothing is clamped and nothing is fitted: a caller that compares files clamps and rounds `image` first.
    """
    squared = (image - target).square()
    return -10 * torch.log10(squared.mean() if mask is None else squared[mask != 0].mean())


def colour_fitted(image: Float[Tensor, "H W 3"], target: Float[Tensor, "H W 3"], mask: Shaped[Tensor, "H W"] | None = None) -> Float[Tensor, "H W 3"]:
    """`image` through the affine map of colours (3x3 and an offset) that brings it closest to `target`, by least squares over pixels with mask != 0.

    Takes exposure and white balance out of a comparison, at the price that a wrong colour may pass. Nothing is clamped. Where the
    picture's colours do not span all three directions, one of a single colour for one, the smallest map is taken.
    """
    inside = slice(None) if mask is None else (mask != 0).flatten()
    seen, wanted = (x.double().reshape(-1, 3)[inside] for x in (image, target))
    seen_mean, wanted_mean = seen.mean(0), wanted.mean(0)
    seen, wanted = seen - seen_mean, wanted - wanted_mean
    linear = torch.linalg.pinv(seen.T @ seen, rtol=1e-10, hermitian=True) @ (seen.T @ wanted)
    return ((image.double() - seen_mean) @ linear + wanted_mean).to(image.dtype)


def ssim(image: Float[Tensor, "H W 3"], target: Float[Tensor, "H W 3"]) -> Float[Tensor, ""]:
    """Mean structural similarity over pixels and channels (Wang et al. 2004): 11x11 Gaussian window, zeros outside the picture."""
    return ssim_map(image, target).mean()


def ssim_map(image: Float[Tensor, "H W 3"], target: Float[Tensor, "H W 3"]) -> Float[Tensor, "H W 3"]:
    """Structural similarity of every pixel and channel, in plain torch: the definition that native code is tested against."""
    if image.is_cuda and image.dtype == torch.float32:      # convolutions there may keep ten bits (tf32), and variances are differences
        return ssim_map(image.double(), target.double()).to(image.dtype)
    offsets = torch.arange(SSIM_WINDOW, dtype=image.dtype, device=image.device) - SSIM_WINDOW // 2
    window = torch.softmax(-offsets.square() / (2 * SSIM_SIGMA**2), dim=0)
    moments = torch.stack([image, target, image * image, target * target, image * target]).permute(0, 3, 1, 2).flatten(0, 1)[:, None]
    moments = F.conv2d(moments, window.view(1, 1, -1, 1), padding=(SSIM_WINDOW // 2, 0))
    moments = F.conv2d(moments, window.view(1, 1, 1, -1), padding=(0, SSIM_WINDOW // 2))
    mu_x, mu_y, xx, yy, xy = moments.view(5, 3, *image.shape[:2]).permute(0, 2, 3, 1)
    var_x, var_y, cov = xx - mu_x * mu_x, yy - mu_y * mu_y, xy - mu_x * mu_y
    return ((2 * mu_x * mu_y + SSIM_C1) * (2 * cov + SSIM_C2)) / ((mu_x**2 + mu_y**2 + SSIM_C1) * (var_x + var_y + SSIM_C2))


def l1_ssim(image: Float[Tensor, "H W 3"], target: Float[Tensor, "H W 3"], ssim_weight: float = 0.2,
            mask: Shaped[Tensor, "H W"] | None = None) -> Float[Tensor, ""]:
    """Photometric loss (1 - w) L1 + w (1 - SSIM), differentiable in `image` (Kerbl et al. 2023, eq. 7, w = 0.2).

    Both terms are means over channels and over pixels with mask != 0; a mask without such a pixel gives loss 0. Both pictures
    count as zero outside the mask, as they do beyond their border, so that no masked pixel enters through an SSIM window.
    Native code computes value and gradient in one pass on CPU and CUDA tensors; elsewhere, or without the library, the torch formula does.

    Raises ValueError when the pictures do not match.
    """
    _check(image, target, mask)
    if native.library_for(image) is None:
        return l1_ssim_reference(image, target, ssim_weight, mask)
    with_gradient = torch.is_grad_enabled() and image.requires_grad
    inputs = (image, target.detach(), None if mask is None else mask != 0, ssim_weight, with_gradient)
    if torch.compiler.is_compiling():
        return torch.ops.splatkit.l1_ssim(*inputs)[0]
    return (_L1SSIM.apply(*inputs) if with_gradient else _l1_ssim(*inputs))[0]


@torch.no_grad()
def l1_ssim_and_gradient(image: Float[Tensor, "H W 3"], target: Float[Tensor, "H W 3"], ssim_weight: float = 0.2,
                         mask: Shaped[Tensor, "H W"] | None = None) -> tuple[Float[Tensor, ""], Float[Tensor, "H W 3"]]:
    """l1_ssim and its gradient by `image`, outside of autograd. Needs the native library of the pictures' device."""
    _check(image, target, mask)
    return _l1_ssim(image, target, None if mask is None else mask != 0, ssim_weight, True)


def l1_ssim_reference(image: Float[Tensor, "H W 3"], target: Float[Tensor, "H W 3"], ssim_weight: float = 0.2,
                      mask: Shaped[Tensor, "H W"] | None = None) -> Float[Tensor, ""]:
    """l1_ssim in plain torch, differentiable in both pictures: the definition."""
    if mask is None:
        return (1 - ssim_weight) * (image - target).abs().mean() + ssim_weight * (1 - ssim(image, target))
    inside = (mask != 0)[..., None]
    image, target = image.where(inside, 0), target.where(inside, 0)
    per_pixel = (1 - ssim_weight) * (image - target).abs() + ssim_weight * (1 - ssim_map(image, target))
    return per_pixel.where(inside, 0).sum() / (3 * inside.sum()).clamp(min=1)


def inverse_depth_l1(depth: Float[Tensor, "H W"], target: Float[Tensor, "H W"], mask: Shaped[Tensor, "H W"] | None = None) -> Float[Tensor, ""]:
    """Mean |1/depth - 1/target| over pixels where both are above 0 and mask != 0, per world unit; 0 where there is none. Inverse, so that
    far surfaces, whose depth is known least, count least."""
    both = (depth > 0) & (target > 0) if mask is None else (depth > 0) & (target > 0) & (mask != 0)
    inverse = lambda x: 1 / torch.where(both, x, 1)
    return (inverse(depth) - inverse(target)).abs().sum() / both.sum().clamp(min=1)


def _check(image: Tensor, target: Tensor, mask: Tensor | None) -> None:
    if image.shape != target.shape or image.ndim != 3 or image.shape[2] != 3 or image.numel() == 0:
        raise ValueError(f"image is {tuple(image.shape)} and target {tuple(target.shape)}; expected the same [H, W, 3] with H, W > 0")
    if image.dtype != target.dtype or image.device != target.device:
        raise ValueError(f"image is {image.dtype} on {image.device} and target {target.dtype} on {target.device}; make them alike")
    if mask is not None and (mask.shape != image.shape[:2] or mask.device != image.device):
        raise ValueError(f"mask is {tuple(mask.shape)} on {mask.device}; expected {tuple(image.shape[:2])} on {image.device}")


# One operator twice: for torch.compile an opaque node with known shapes, for eager calls an autograd.Function, which costs less.
_ops = torch.library.Library("splatkit", "FRAGMENT")
_ops.define("l1_ssim(Tensor image, Tensor target, Tensor? mask, float ssim_weight, bool with_gradient) -> (Tensor, Tensor)")


@torch.library.impl(_ops, "l1_ssim", "CPU")
@torch.library.impl(_ops, "l1_ssim", "CUDA")
def _l1_ssim(image, target, mask, ssim_weight, with_gradient):
    """(loss, its gradient in image, or an empty tensor when that is not wanted)."""
    v_image, library = image.new_empty(image.shape if with_gradient else 0), native.library_of(image)
    if mask is not None:
        image, target = image.where(mask[..., None], 0), target.where(mask[..., None], 0)
    terms, (height, width, _) = torch.empty(2, dtype=torch.float64, device=image.device), image.shape
    library.sk_l1_ssim(width, height, image.contiguous(), target.contiguous(), None if mask is None else mask.to(image.dtype).contiguous(), ssim_weight,
                       terms, v_image if with_gradient else None, *library.room("L1_SSIM", width=width, height=height))
    loss = (1 - ssim_weight) * terms[0] + ssim_weight * (1 - terms[1])
    if mask is not None:
        loss = loss.where(mask.any(), 0)    # not asked before: on a card the answer would be waited for
        if with_gradient:
            v_image *= mask[..., None]
    return loss.to(image.dtype), v_image


@torch.library.register_fake("splatkit::l1_ssim")
def _(image, target, mask, ssim_weight, with_gradient):
    return image.new_empty(()), image.new_empty(image.shape if with_gradient else 0)


def _save_gradient(ctx, inputs, output):
    ctx.save_for_backward(output[1])


def _scale_gradient(ctx, v_loss, _v_gradient):
    return ctx.saved_tensors[0] * v_loss, None, None, None, None


torch.library.register_autograd("splatkit::l1_ssim", _scale_gradient, setup_context=_save_gradient)


class _L1SSIM(torch.autograd.Function):
    """l1_ssim without the dispatcher."""

    @staticmethod
    def forward(ctx, *inputs):
        loss, v_image = _l1_ssim(*inputs)
        ctx.save_for_backward(v_image)
        ctx.mark_non_differentiable(v_image)
        ctx.set_materialize_grads(False)
        return loss, v_image

    backward = staticmethod(torch.autograd.function.once_differentiable(_scale_gradient))


def loss_by_gaussian(scene: Scene, views: Iterable[tuple[Cameras, Float[Tensor, "H W 3"]]], settings: RasterSettings = RasterSettings(),
                     background: Float[Tensor, "3"] | None = None) -> Float[Tensor, " N"]:
    """How far pictures are from their photos where each Gaussian is seen: the mean absolute difference over all pixels of `views`, by its blending weight there.

    0 for one that none of them shows. `views` are one camera each and the photo at that camera's size.
    """
    def differences() -> Iterator[tuple[Cameras, Tensor]]:
        for camera, photo in views:
            yield camera, (render(scene, camera, background=background, settings=settings).color[0].clamp(0, 1) - photo).abs().mean(dim=-1, keepdim=True)

    with torch.no_grad():
        return uplift(scene, differences(), settings)[:, 0]
