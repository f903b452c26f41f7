"""PSNR, SSIM and the photometric loss: values worked out on paper, kornia as oracle, native code against torch."""
import math

import numpy as np
import pytest
import torch

from splatkit import metrics, native

SIZES = [(1, 1), (1, 7), (5, 3), (10, 12), (11, 11), (33, 47)]     # height, width; most are below the 11x11 window


def pictures(height, width, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    target = torch.rand(height, width, 3, generator=g, dtype=dtype)
    return (target + 0.2 * torch.randn(height, width, 3, generator=g, dtype=dtype)).clamp(0, 1), target


def some_mask(height, width):
    return torch.rand(height, width, generator=torch.Generator().manual_seed(5)) > 0.4


def test_psnr_of_a_uniform_error_of_a_tenth_is_20_db():
    image = torch.full((4, 6, 3), 0.5, dtype=torch.float64)
    assert metrics.psnr(image, image + 0.1).item() == pytest.approx(20.0, abs=1e-9)
    assert metrics.psnr(image, image).item() == math.inf


def test_psnr_looks_only_inside_the_mask():
    image = torch.zeros(4, 6, 3)
    target = image.clone()
    target[:, :3], target[:, 3:] = 0.1, 0.9
    mask = torch.zeros(4, 6, dtype=torch.uint8)
    mask[:, :3] = 255
    assert metrics.psnr(image, target, mask).item() == pytest.approx(20.0, abs=1e-5)


def test_fitted_colours_do_not_depend_on_how_they_were_changed_before():
    image, target = pictures(33, 47)
    changed = image @ torch.tensor([[0.7, 0.1, 0.0], [-0.2, 1.3, 0.1], [0.05, 0.0, 0.9]], dtype=torch.float64) + torch.tensor([0.1, -0.05, 0.2], dtype=torch.float64)
    fitted = metrics.psnr(metrics.colour_fitted(image, target), target)
    assert metrics.psnr(metrics.colour_fitted(changed, target), target).item() == pytest.approx(fitted.item(), abs=1e-9)
    assert metrics.psnr(changed, target) < metrics.psnr(image, target) < fitted
    torch.testing.assert_close(metrics.colour_fitted(2 * target - 0.3, target), target, atol=1e-12, rtol=0)


@pytest.mark.parametrize("masked", [False, True])
def test_fitted_colours_are_those_of_least_squares_by_numpy(masked):
    image, target = pictures(12, 15)
    inside = some_mask(12, 15) if masked else torch.ones(12, 15, dtype=torch.bool)
    design = lambda x: np.concatenate([x.reshape(-1, 3).numpy(), np.ones((x[..., 0].numel(), 1))], axis=1)
    solution = np.linalg.lstsq(design(image[inside]), target[inside].numpy(), rcond=None)[0]
    expected = torch.from_numpy((design(image) @ solution).reshape(12, 15, 3))
    other = target.where(inside[..., None], torch.full_like(target, float("nan")))      # pixels outside do not count
    torch.testing.assert_close(metrics.colour_fitted(image, other, inside if masked else None), expected, atol=1e-10, rtol=0)


def test_fitted_colours_of_a_picture_without_colours_are_the_best_grey_ramp_and_finite():
    _, target = pictures(9, 11)
    grey = target.mean(2, keepdim=True).expand(-1, -1, 3)
    for x in (grey, torch.zeros_like(target)):
        design = np.stack([x[..., 0].flatten().numpy(), np.ones(99)], axis=1)
        expected = design @ np.linalg.lstsq(design, target.reshape(-1, 3).numpy(), rcond=None)[0]
        torch.testing.assert_close(metrics.colour_fitted(x, target), torch.from_numpy(expected.reshape(9, 11, 3)), atol=1e-9, rtol=0)


def test_ssim_of_a_picture_with_itself_is_one():
    for height, width in SIZES:
        image, _ = pictures(height, width)
        assert metrics.ssim(image, image).item() == pytest.approx(1.0, abs=1e-12)


def test_ssim_of_constant_pictures_is_the_luminance_term_away_from_the_border():
    a, b = 0.3, 0.6
    middle = metrics.ssim_map(torch.full((23, 23, 3), a, dtype=torch.float64), torch.full((23, 23, 3), b, dtype=torch.float64))[11, 11]
    assert middle[0].item() == pytest.approx((2 * a * b + 1e-4) / (a * a + b * b + 1e-4), abs=1e-12)


def test_ssim_of_one_pixel_follows_from_the_window_centre():
    x, y = 0.8, 0.3
    weights = [math.exp(-(i * i) / (2 * 1.5**2)) for i in range(-5, 6)]
    w = (1 / sum(weights)) ** 2                                      # the only tap that does not fall on the zero padding
    mu_x, mu_y = w * x, w * y
    var_x, var_y, cov = w * x * x - mu_x**2, w * y * y - mu_y**2, w * x * y - mu_x * mu_y
    expected = (2 * mu_x * mu_y + 1e-4) * (2 * cov + 9e-4) / ((mu_x**2 + mu_y**2 + 1e-4) * (var_x + var_y + 9e-4))
    one = lambda v: torch.full((1, 1, 3), v, dtype=torch.float64)
    assert metrics.ssim(one(x), one(y)).item() == pytest.approx(expected, abs=1e-12)


def test_ssim_map_equals_kornia_where_the_window_fits():
    kornia = pytest.importorskip("kornia", reason="kornia (extra: geometry) is the oracle here")
    image, target = pictures(33, 47)
    batched = lambda x: x.permute(2, 0, 1)[None]
    oracle = kornia.metrics.ssim(batched(image), batched(target), 11, padding="valid")[0].permute(1, 2, 0)
    torch.testing.assert_close(metrics.ssim_map(image, target)[5:-5, 5:-5], oracle, atol=1e-10, rtol=0)


def test_loss_of_equal_pictures_is_zero_and_of_opposites_is_large():
    image, _ = pictures(20, 20, torch.float32)
    assert abs(metrics.l1_ssim(image, image).item()) < 1e-6
    assert metrics.l1_ssim(torch.zeros_like(image), torch.ones_like(image)).item() > 0.9


@pytest.mark.parametrize("masked", [False, True])
def test_torch_formula_passes_gradcheck(masked, without_native):
    image, target = pictures(4, 6)
    mask = some_mask(4, 6) if masked else None
    assert torch.autograd.gradcheck(lambda x: metrics.l1_ssim(x, target, 0.2, mask), image.requires_grad_())


@pytest.mark.parametrize("use_native", [False, True], ids=["torch", "native if present"])
def test_masked_pixels_neither_change_the_loss_nor_get_a_gradient(use_native, monkeypatch):
    if not use_native:
        monkeypatch.setattr(native, "library_for", lambda x: None)
    image, target = pictures(15, 21, torch.float32)
    mask = some_mask(15, 21)
    other = torch.where(mask[..., None], image, torch.full_like(image, float("nan"))).requires_grad_()
    loss = metrics.l1_ssim(other, torch.where(mask[..., None], target, 1 - target), 0.2, mask)
    torch.testing.assert_close(loss, metrics.l1_ssim(image, target, 0.2, mask))
    loss.backward()
    assert (other.grad[~mask] == 0).all() and torch.isfinite(other.grad).all() and (other.grad[mask] != 0).any()


def test_a_mask_of_ones_is_no_mask_and_a_mask_of_zeros_is_no_loss():
    image, target = pictures(12, 14)
    ones = torch.ones(12, 14)
    torch.testing.assert_close(metrics.l1_ssim(image, target, 0.2, ones), metrics.l1_ssim(image, target))
    nothing = metrics.l1_ssim(image.requires_grad_(), target, 0.2, ones * 0)
    nothing.backward()
    assert nothing.item() == 0 and (image.grad == 0).all()


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("height, width", SIZES)
def test_native_loss_and_gradient_equal_torch(native_dtype, height, width, masked):
    mask = some_mask(height, width) if masked else None
    image, target = pictures(height, width, native_dtype)
    image.requires_grad_()
    tolerance = dict(atol=2e-6, rtol=1e-5) if native_dtype == torch.float32 else dict(atol=1e-12, rtol=1e-10)
    for weight in (0.0, 0.2, 1.0):
        loss = metrics.l1_ssim(image, target, weight, mask)
        reference = metrics.l1_ssim_reference(image, target, weight, mask)
        torch.testing.assert_close(loss, reference, **tolerance)
        torch.testing.assert_close(torch.autograd.grad(3 * loss, image)[0] / 3, torch.autograd.grad(reference, image)[0], **tolerance)


def test_native_loss_of_constant_pictures_is_finite(native_dtype):
    for a, b in [(0.0, 0.0), (1.0, 1.0), (0.0, 1.0), (0.5, 0.5)]:
        image = torch.full((13, 17, 3), a, dtype=native_dtype, requires_grad=True)
        loss = metrics.l1_ssim(image, torch.full_like(image, b).detach())
        torch.testing.assert_close(loss, metrics.l1_ssim_reference(image, torch.full_like(image, b)), atol=2e-6, rtol=1e-5)
        loss.backward()
        assert torch.isfinite(image.grad).all()


def test_native_loss_without_a_gradient_asked_for_is_the_same_value(native_dtype):
    image, target = pictures(20, 30, native_dtype)
    assert metrics.l1_ssim(image, target).item() == metrics.l1_ssim(image.requires_grad_(), target).item()
    with torch.no_grad():
        assert not metrics.l1_ssim(image, target).requires_grad


def test_pictures_that_do_not_match_are_refused():
    image, target = pictures(6, 8)
    with pytest.raises(ValueError, match=r"expected the same \[H, W, 3\]"):
        metrics._check(image, target[:5], None)      # what l1_ssim calls first; here the shape annotations would speak before it
