"""LPIPS, the learned perceptual distance of two pictures (Zhang et al. 2018, version 0.1), with weights from given files; none are downloaded."""
from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import safetensors.torch
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from .constants import constant
from .errors import BadFile
from .io.reading import opened


class Conv(NamedTuple):
    """A convolution with ReLU: its number in torchvision's `features`, channels in and out, side of the kernel, stride, padding."""

    number: int
    inputs: int
    outputs: int
    kernel: int = 3
    stride: int = 1
    padding: int = 1


class Net(NamedTuple):
    """A backbone. Each stage's output is compared; before a stage the picture is max-pooled where `pools` says so."""

    stages: tuple[tuple[Conv, ...], ...]
    pools: tuple[bool, ...]
    pool: int           # its window; its stride is 2
    side_min: int       # pixels, below which a pool would find nothing


NETS = {
    "alex": Net(((Conv(0, 3, 64, 11, 4, 2),), (Conv(3, 64, 192, 5, 1, 2),), (Conv(6, 192, 384),), (Conv(8, 384, 256),), (Conv(10, 256, 256),)),
                (False, True, True, False, False), 3, 31),
    "vgg": Net(((Conv(0, 3, 64), Conv(2, 64, 64)), (Conv(5, 64, 128), Conv(7, 128, 128)), (Conv(10, 128, 256), Conv(12, 256, 256), Conv(14, 256, 256)),
                (Conv(17, 256, 512), Conv(19, 512, 512), Conv(21, 512, 512)), (Conv(24, 512, 512), Conv(26, 512, 512), Conv(28, 512, 512))),
               (False, True, True, True, True), 2, 16),
}
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)      # of pictures in [-1, 1], before the first convolution

# What else such files hold: the classifier of torchvision's networks, and the scaling layer of the `lpips` package.
_UNUSED = re.compile(r"classifier\.\d+\.(weight|bias)|scaling_layer\.(shift|scale)")
_CONV = re.compile(r"(?:features|net\.slice[1-5])\.(\d+\.(?:weight|bias))")
_HEAD = re.compile(r"(?:lin|lins\.)(\d)\.model\.1\.weight")          # the package's full state holds every head under both names


@dataclass(frozen=True)
class Weights:
    """What load() read: which backbone, its tensors as "features.N.weight" and "features.N.bias", and the heads as "lin0" to "lin4"."""

    net: str
    tensors: dict[str, Tensor]

    def to(self, *args) -> Weights:
        return Weights(self.net, {name: x.to(*args) for name, x in self.tensors.items()})


def distance(image: Float[Tensor, "H W 3"], target: Float[Tensor, "H W 3"], weights: Weights) -> Float[Tensor, ""]:
    """LPIPS of two pictures in [0, 1], 0 where they agree: over the stages of the backbone, the spatial mean of the head's weighted sum of squared
    differences of features, which are scaled to unit length per pixel (Zhang et al. 2018, eq. 1).

    Differentiable in both. Raises ValueError for pictures that are too small for the backbone.
    """
    net = NETS[weights.net]
    if min(image.shape[:2]) < net.side_min:
        raise ValueError(f"a picture of {image.shape[1]}x{image.shape[0]} is too small for LPIPS with {weights.net}, which needs {net.side_min} pixels a side; leave it out (--lpips)")
    if image.is_cuda and image.dtype == torch.float32:      # convolutions there may keep ten bits (tf32)
        return distance(image.double(), target.double(), weights).to(image.dtype)
    tensors = weights.to(image).tensors
    shift, scale = (constant(values, image)[:, None, None] for values in (SHIFT, SCALE))
    x = (2 * torch.stack([image, target]).permute(0, 3, 1, 2) - 1 - shift) / scale
    total = image.new_zeros(())
    for k, (stage, pooled) in enumerate(zip(net.stages, net.pools)):
        x = F.max_pool2d(x, net.pool, 2) if pooled else x
        for conv in stage:
            name = f"features.{conv.number}"
            x = F.conv2d(x, tensors[f"{name}.weight"], tensors[f"{name}.bias"], conv.stride, conv.padding).relu_()
        unit = x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10)
        total += F.conv2d((unit[:1] - unit[1:]).square(), tensors[f"lin{k}"]).mean()
    return total


def load(files: Sequence[Path]) -> Weights:
    """The weights in .safetensors or torch files (read with weights_only): the full state of the `lpips` package's alex or vgg, or torchvision's
    alexnet or vgg16 and the package's heads beside it (weights/v0.1/). Heads of version 0.0 look the same and give other numbers.

    Raises BadFile naming the key that is missing, unknown, there twice or of another shape.
    """
    found, source = {}, {}
    for file in files:
        for key, x in _state(file).items():
            if _UNUSED.fullmatch(key):
                continue
            conv, head = _CONV.fullmatch(key), _HEAD.fullmatch(key)
            name = f"features.{conv[1]}" if conv else f"lin{head[1]}" if head else ""
            if not name:
                raise BadFile(file, key, "is no weight of LPIPS with alex or vgg; expected features.N or net.sliceK.N (weight, bias) and linK.model.1.weight")
            if name in found and not torch.equal(found[name], x):
                raise BadFile(file, key, f"is there twice, with another value in {source[name]}; give one backbone and its heads")
            if not x.is_floating_point() or not bool(torch.isfinite(x).all()):
                raise BadFile(file, key, f"expected finite floating-point numbers, not {x.dtype}" if not x.is_floating_point() else "holds a NaN or an infinity")
            found[name], source[name] = x, file
    everything = ", ".join(map(str, files))
    if "features.0.weight" not in found:
        raise BadFile(everything, "features.0.weight", "is missing: the heads need a backbone beside them (torchvision's alexnet or vgg16)")
    net = next((net for net, known in NETS.items() if _shapes(known)["features.0.weight"] == tuple(found["features.0.weight"].shape)), None)
    if net is None:
        raise BadFile(source["features.0.weight"], "features.0.weight", f"is {list(found['features.0.weight'].shape)}; expected alex's [64, 3, 11, 11] or vgg's [64, 3, 3, 3]")
    shapes = _shapes(NETS[net])
    for name, shape in shapes.items():
        if name not in found:
            cure = "give the heads of the lpips package beside the backbone" if name.startswith("lin") else "the backbone is not whole"
            raise BadFile(everything, f"{name}.model.1.weight" if name.startswith("lin") else name, f"is missing for {net}: {cure}")
        if tuple(found[name].shape) != shape:
            raise BadFile(source[name], name, f"is {list(found[name].shape)}; expected {list(shape)} for {net}")
    if unknown := sorted(found.keys() - shapes.keys()):
        raise BadFile(source[unknown[0]], unknown[0], f"does not belong to {net}")
    return Weights(net, {name: found[name].float() for name in shapes})


def _shapes(net: Net) -> dict[str, tuple[int, ...]]:
    """Of everything in Weights.tensors, in order."""
    convs = [conv for stage in net.stages for conv in stage]
    shapes = {f"features.{c.number}.{part}": (c.outputs, c.inputs, c.kernel, c.kernel)[: 4 if part == "weight" else 1] for c in convs for part in ("weight", "bias")}
    return {**shapes, **{f"lin{k}": (1, stage[-1].outputs, 1, 1) for k, stage in enumerate(net.stages)}}


def _state(file: Path) -> dict[str, Tensor]:
    """Names and tensors of one file, on the CPU."""
    with opened(file) as stream:
        try:
            state = safetensors.torch.load(stream.read()) if Path(file).suffix == ".safetensors" else torch.load(stream, map_location="cpu", weights_only=True)
        except OSError:
            raise
        except Exception as e:      # on damaged bytes the unpickler raises about any type
            raise BadFile(file, "", f"is no .safetensors or torch file of tensors alone, or it is damaged: {' '.join(str(e).split())[:150]}") from e
    if not isinstance(state, dict) or not all(isinstance(key, str) and isinstance(x, Tensor) for key, x in state.items()):
        raise BadFile(file, "", "expected a state: names and tensors, nothing else")
    return state
