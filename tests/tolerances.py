"""How closely two computations of one thing must agree, by dtype."""
import torch

F32, F64 = torch.float32, torch.float64

ON_PAPER = {F32: 2e-5, F64: 1e-11}          # absolute, on values of order 1: a formula evaluated twice
PICTURE = {F32: 2e-5, F64: 1e-11}           # relative L2, a backend against the reference in float64
PICTURE_OF_MANY = {F32: 5e-4, F64: 1e-11}   # hundreds of Gaussians: somewhere float32 falls on the other side of alpha_min (1e-4 measured)
GRADIENT = {F32: 2e-4, F64: 1e-9}           # relative L2 per field, likewise


def assert_near(actual, expected, tolerance: dict, what: str = "") -> None:
    """Every entry within tolerance[dtype of actual] x max(1, largest expected)."""
    expected = torch.as_tensor(expected, dtype=F64).expand(actual.shape)
    bound = tolerance[actual.dtype] * max(1.0, expected.abs().max().item() if expected.numel() else 1.0)
    worst = (actual.double() - expected).abs().max().item() if expected.numel() else 0.0
    assert worst <= bound, f"{what}: largest difference {worst:.3g}, allowed {bound:.3g}"


def assert_same_l2(actual, expected, tolerance: dict, what: str = "") -> None:
    """|actual - expected| <= tolerance[dtype of actual] |expected|, as vectors; what is infinite must be so in both."""
    assert actual.shape == expected.shape, f"{what}: {tuple(actual.shape)} against {tuple(expected.shape)}"
    same = torch.isinf(actual) & (actual == expected)
    actual, expected = actual.masked_fill(same, 0), expected.masked_fill(same, 0)
    error, size = (actual.double() - expected.double()).norm().item(), expected.double().norm().item()
    allowed = tolerance[actual.dtype]
    assert error <= allowed * size + 1e-30, f"{what}: relative L2 {error / max(size, 1e-300):.3g}, allowed {allowed:.3g}"
