"""Scene: N Gaussians as plain tensors, the one representation that everything shares, and Edit: how its rows change."""
from __future__ import annotations

import dataclasses
import functools
import math
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

LOG_SCALE_MIN, LOG_SCALE_MAX = -30.0, 30.0   # where used; the stored value may lie outside
ABSENT = -100.0                              # logit opacity of what no picture shows
Group = Literal["means", "quats", "log_scales", "logit_opacities", "sh", "features"]


@dataclass(frozen=True)
class Scene:
    """N Gaussians. Fields are unconstrained: every finite value is a valid scene, so they are also what is optimised."""

    means: Float[Tensor, "N 3"]             # world units
    quats: Float[Tensor, "N 4"]             # wxyz, any length; normalised where used, zero is the identity
    log_scales: Float[Tensor, "N 3"]        # ln of the standard deviations (not variances), world units; clamped to [-30, 30] where used
    logit_opacities: Float[Tensor, " N"]
    sh: Float[Tensor, "N K 3"]              # K = (degree+1)^2; colour = max(0, 1/2 + basis . sh)
    features: Float[Tensor, "N F"] | None = None

    def __post_init__(self):
        n = self.means.shape[0] if self.means.ndim else -1
        expected = {"means": (n, 3), "quats": (n, 4), "log_scales": (n, 3), "logit_opacities": (n,), "sh": (n, None, 3), "features": (n, None)}
        for name, value in self.fields().items():
            shape = expected[name]
            if value.ndim != len(shape) or any(e is not None and s != e for s, e in zip(value.shape, shape)):
                raise ValueError(f"scene.{name} has shape {tuple(value.shape)}; expected {_show(shape, n)}")
            if value.dtype != self.means.dtype or value.dtype not in (torch.float32, torch.float64):
                raise TypeError(f"scene.{name} is {value.dtype} and scene.means {self.means.dtype}; all fields must share float32 or float64")
            if value.device != self.means.device:
                raise ValueError(f"scene.{name} is on {value.device} but scene.means on {self.means.device}; move one with .to(...)")
        if math.isqrt(self.sh.shape[1]) ** 2 != self.sh.shape[1] or not 1 <= self.sh.shape[1] <= 16:
            raise ValueError(f"scene.sh has {self.sh.shape[1]} coefficients; expected 1, 4, 9 or 16 (degree 0 to 3)")

    def __len__(self) -> int:
        return self.means.shape[0]

    @property
    def sh_degree(self) -> int:
        return math.isqrt(self.sh.shape[1]) - 1

    @property
    def device(self) -> torch.device:
        return self.means.device

    @property
    def dtype(self) -> torch.dtype:
        return self.means.dtype

    def fields(self) -> dict[str, Tensor]:
        """The tensors by name, in declaration order, without absent features."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if getattr(self, f.name) is not None}

    @property
    def scales(self) -> Float[Tensor, "N 3"]:
        """Standard deviations along the Gaussians' axes, world units."""
        return self.log_scales.clamp(LOG_SCALE_MIN, LOG_SCALE_MAX).exp()

    def map(self, fn) -> Scene:
        """A scene of `fn(tensor)` for every field."""
        return Scene(**{name: fn(value) for name, value in self.fields().items()})

    def to(self, device=None, dtype=None) -> Scene:
        return self.map(lambda x: x.to(device=device, dtype=dtype))

    def detach(self) -> Scene:
        return self.map(Tensor.detach)

    def clone(self) -> Scene:
        """A copy that shares no memory: what a reader outside the training loop is given, between steps."""
        return self.map(lambda x: x.detach().clone())

    def requires_grad_(self, requires: bool = True) -> Scene:
        return self.map(lambda x: x.requires_grad_(requires))

    def rows(self, index: Int[Tensor, " M"] | Bool[Tensor, " N"] | slice) -> Scene:
        return self.map(lambda x: x[index])

    def replace(self, **changes) -> Scene:
        return dataclasses.replace(self, **changes)

    def check_finite(self) -> None:
        """Raises ValueError naming the first field and row that hold a NaN or an infinity."""
        for name, value in self.fields().items():
            finite = torch.isfinite(value)
            if not bool(finite.all()):
                row = int((~finite.reshape(len(self), -1).all(dim=1)).nonzero()[0])
                raise ValueError(f"scene.{name} is not finite in row {row}: {value[row].flatten()[:4].tolist()}; "
                                 "drop such rows with scene.rows(mask) before using the scene")

    def transformed(self, scale: float, rotation: Float[Tensor, "3 3"], translation: Float[Tensor, " 3"]) -> Scene:
        """The scene moved by x -> scale * rotation @ x + translation; orientations and SH bands turn with it.

        A camera moved by the same similarity sees the same picture.
        """
        rotation, translation = rotation.to(self.means), translation.to(self.means)
        if not (torch.isfinite(rotation).all() and (rotation @ rotation.T - torch.eye(3).to(rotation)).abs().max() < 1e-4
                and torch.det(rotation) > 0 and scale > 0):
            raise ValueError("transformed() needs a proper rotation (orthonormal, determinant 1) and a positive scale")
        return self.replace(means=scale * self.means @ rotation.T + translation,
                            quats=quat_multiply(quat_from_matrix(rotation), _identity_where_zero(self.quats)),
                            log_scales=self.log_scales + math.log(scale),
                            sh=rotate_sh(self.sh, rotation))

    def show(self, header=None, height: int = 600):
        """The scene for a cell of a Jupyter notebook; `header`, a SceneHeader, says how it must be drawn, and `height` is in pixels. See splatkit.view.show()."""
        from importlib import import_module     # the one look upwards: what shows a scene stands on it, and nothing here needs it
        return import_module("splatkit.view").show(self, header, height)

    @staticmethod
    def cat(scenes: list[Scene]) -> Scene:
        """The rows of all scenes, in order. Their SH degrees must agree, and all or none carry features."""
        return Scene(**{name: torch.cat([s.fields()[name] for s in scenes]) for name in scenes[0].fields()})


@dataclass(frozen=True)
class Edit:
    """How the rows of a scene changed: what optimiser, stats, checkpoint and viewer follow.

    Row i of every per-row quantity comes from row `source[i]` of before. Where `fresh[i]` the moments are cleared and the step
    count is inherited. Groups in `reset` have their moments cleared for all rows. New values are already in the scene that came
    with the edit. `source[i] == i` for every row that was not touched.
    """

    source: Int[Tensor, " M"]
    fresh: Bool[Tensor, " M"]
    reset: tuple[Group, ...] = ()

    @staticmethod
    def identity(n: int, device=None) -> Edit:
        return Edit(torch.arange(n, device=device), torch.zeros(n, dtype=torch.bool, device=device))

    def then(self, later: Edit) -> Edit:
        """One edit that does this one and then `later`."""
        return Edit(self.source[later.source], self.fresh[later.source] | later.fresh, tuple(dict.fromkeys(self.reset + later.reset)))


@dataclass(frozen=True)
class Part:
    """Rows first <= row < last of a scene of `total`: what one of several processes holds."""

    first: int
    last: int
    total: int

    def of(self, x: Tensor) -> Tensor:
        """These rows of a per-row quantity of the whole scene, as a copy."""
        return x[self.first:self.last].clone()


def sh_basis(directions: Float[Tensor, "*B 3"], degree: int) -> Float[Tensor, "*B K"]:
    """Real spherical harmonics up to `degree` (0 to 3) of unit directions, in the order and signs of Kerbl et al. 2023."""
    x, y, z = directions.unbind(-1)
    out = [torch.full_like(x, 0.28209479177387814)]
    if degree >= 1:
        out += [-0.4886025119029199 * y, 0.4886025119029199 * z, -0.4886025119029199 * x]
    if degree >= 2:
        out += [1.0925484305920792 * x * y, -1.0925484305920792 * y * z, 0.31539156525252005 * (2 * z * z - x * x - y * y),
                -1.0925484305920792 * x * z, 0.5462742152960396 * (x * x - y * y)]
    if degree >= 3:
        out += [-0.5900435899266435 * y * (3 * x * x - y * y), 2.890611442640554 * x * y * z,
                -0.4570457994644658 * y * (4 * z * z - x * x - y * y), 0.3731763325901154 * z * (2 * z * z - 3 * x * x - 3 * y * y),
                -0.4570457994644658 * x * (4 * z * z - x * x - y * y), 1.445305721320277 * z * (x * x - y * y),
                -0.5900435899266435 * x * (x * x - 3 * y * y)]
    if not 0 <= degree <= 3:
        raise ValueError(f"SH degree {degree}; expected 0 to 3")
    return torch.stack(out, dim=-1)


def rotate_sh(sh: Float[Tensor, "N K 3"], rotation: Float[Tensor, "3 3"]) -> Float[Tensor, "N K 3"]:
    """Coefficients of the function turned by `rotation`: Y(d) . rotated = Y(rotation^T d) . sh for every direction d."""
    degree = math.isqrt(sh.shape[1]) - 1
    matrix = sh_rotation(rotation, degree).to(sh)
    return torch.cat([torch.einsum("ij,njc->nic", matrix[k, k], sh[:, k]) for k in _bands(degree)], dim=1)


def sh_rotation(rotation: Float[Tensor, "*B 3 3"], degree: int) -> Float[Tensor, "*B K K"]:
    """The matrices by which rotations turn coefficients up to `degree`, in float64; not differentiable."""
    directions, fits = _sh_fits(degree, rotation.device)
    before = sh_basis(directions @ rotation.detach().double(), degree)
    out = before.new_zeros(*rotation.shape[:-2], before.shape[-1], before.shape[-1])
    out[..., 0, 0] = 1
    for k, fit in zip(_bands(degree)[1:], fits):
        out[..., k, k] = fit @ before[..., k]
    return out


def _bands(degree: int) -> list[slice]:
    return [slice(band * band, (band + 1) ** 2) for band in range(degree + 1)]


@functools.lru_cache(16)
def _sh_fits(degree: int, device: torch.device) -> tuple[Float[Tensor, "D 3"], list[Tensor]]:
    """Directions, and for each band above 0 what takes the values of a function there to its coefficients: a band is closed under rotation, so that the fit is exact."""
    with torch.inference_mode(False):       # they outlive who asks first
        directions = torch.randn(64, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        directions = torch.nn.functional.normalize(directions, dim=-1)
        values = sh_basis(directions, degree)
        return directions.to(device), [torch.linalg.pinv(values[:, k]).to(device) for k in _bands(degree)[1:]]


def unit_quats(quats: Float[Tensor, "N 4"]) -> Float[Tensor, "N 4"]:
    """Normalised (wxyz); a zero quaternion is the identity and gets no gradient."""
    largest = quats.detach().abs().amax(dim=1, keepdim=True)        # divided out first: squares of tiny or huge entries leave the range
    unit = torch.where(largest > 0, quats / torch.where(largest > 0, largest, 1), torch.tensor([1, 0, 0, 0]).to(quats))
    return torch.nn.functional.normalize(unit, dim=1)


def rotation_matrices(quats: Float[Tensor, "N 4"]) -> Float[Tensor, "N 3 3"]:
    """Of the quaternions (wxyz) as unit_quats() has them."""
    w, x, y, z = unit_quats(quats).unbind(1)
    return torch.stack([1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y),
                        2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x),
                        2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)], dim=1).reshape(-1, 3, 3)


def quat_multiply(a: Float[Tensor, "*A 4"], b: Float[Tensor, "*B 4"]) -> Float[Tensor, "*C 4"]:
    """Hamilton product, wxyz: rotates by b, then by a."""
    aw, ax, ay, az = a.unbind(-1)
    bw, bx, by, bz = b.unbind(-1)
    return torch.stack([aw * bw - ax * bx - ay * by - az * bz, aw * bx + ax * bw + ay * bz - az * by,
                        aw * by - ax * bz + ay * bw + az * bx, aw * bz + ax * by - ay * bx + az * bw], dim=-1)


def quat_from_matrix(rotation: Float[Tensor, "*B 3 3"]) -> Float[Tensor, "*B 4"]:
    """The unit quaternions (wxyz, w >= 0) of rotation matrices."""
    (a, b, c), (d, e, f), (g, h, i) = (row.unbind(-1) for row in rotation.unbind(-2))
    # Rows are the quaternion times four times one of its components. The largest of those is far from zero, so dividing by it is safe (Shepperd 1978).
    rows = torch.stack([torch.stack(row, dim=-1) for row in ((1 + a + e + i, h - f, c - g, d - b), (h - f, 1 + a - e - i, d + b, c + g),
                                                             (c - g, d + b, 1 - a + e - i, h + f), (d - b, c + g, h + f, 1 - a - e + i))], dim=-2)
    best = rows.diagonal(dim1=-2, dim2=-1).argmax(-1)[..., None, None].expand(*rows.shape[:-2], 1, 4)
    q = torch.nn.functional.normalize(rows.gather(-2, best)[..., 0, :], dim=-1)
    return torch.where(q[..., :1] >= 0, q, -q)


def _identity_where_zero(quats: Tensor) -> Tensor:
    zero = (quats == 0).all(dim=-1, keepdim=True)
    return torch.where(zero, torch.tensor([1.0, 0, 0, 0]).to(quats), quats)


def _show(shape, n) -> str:
    return "[" + ", ".join("K" if s is None else "N" if n < 0 and i == 0 else str(s) for i, s in enumerate(shape)) + "]"
