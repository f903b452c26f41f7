"""The networks behind LPIPS as torchvision and the `lpips` package publish them, with random weights, in the layouts of their files."""
import torch
from torch import nn

# torchvision's `features`, one entry per number there, as (channels, kernel, stride, padding), ReLU "R" or pool "P"; the pool's window; what is compared.
ALEX = ([(64, 11, 4, 2), "R", "P", (192, 5, 1, 2), "R", "P", (384, 3, 1, 1), "R", (256, 3, 1, 1), "R", (256, 3, 1, 1), "R"], 3, (1, 4, 7, 9, 11))
VGG = ([layer for block in ([64] * 2, [128] * 2, [256] * 3, [512] * 3, [512] * 3) for layer in [x for c in block for x in ((c, 3, 1, 1), "R")] + ["P"]], 2, (3, 8, 15, 22, 29))
PUBLISHED = {"alex": ALEX, "vgg": VGG}


def published(net: str) -> nn.Sequential:
    """The convolutions of the network; their values are not set."""
    layers, pool, _ = PUBLISHED[net]
    channels, modules = 3, []
    for layer in layers:
        if isinstance(layer, tuple):
            modules.append(nn.utils.skip_init(nn.Conv2d, channels, *layer))
            channels = layer[0]
        else:
            modules.append(nn.ReLU() if layer == "R" else nn.MaxPool2d(pool, 2))
    return nn.Sequential(*modules)


def random_state(net: str) -> tuple[dict, dict]:
    """A backbone, as torchvision names it, and heads, as the package does."""
    g, (layers, _, taps) = torch.Generator().manual_seed(3), PUBLISHED[net]
    backbone = {f"features.{name}": torch.randn(x.shape, generator=g) * (x[0].numel() / 2) ** -0.5 for name, x in published(net).state_dict().items()}
    return backbone, {f"lin{k}.model.1.weight": torch.rand(1, layers[tap - 1][0], 1, 1, generator=g) for k, tap in enumerate(taps)}


def packaged(net: str, backbone: dict, heads: dict) -> dict:
    """The same as the full state of the package."""
    taps = PUBLISHED[net][2]
    slice_of = lambda number: 1 + sum(number > tap for tap in taps)
    full = {f"net.slice{slice_of(int(name.split('.')[1]))}.{name.removeprefix('features.')}": x for name, x in backbone.items()}
    scaling = {"scaling_layer.shift": torch.zeros(1, 3, 1, 1), "scaling_layer.scale": torch.ones(1, 3, 1, 1)}
    return {**scaling, **full, **heads, **{name.replace("lin", "lins."): x for name, x in heads.items()}}


def write(path, *states):
    torch.save({name: x for state in states for name, x in state.items()}, path)
    return path
