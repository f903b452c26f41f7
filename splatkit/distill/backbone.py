"""Vision transformers of timm as token grids: made by name, loaded from the network, a file or nowhere, and written as plain timm files."""
from __future__ import annotations

import copy
import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from .. import _compat
from ..errors import BackendUnavailable, BadConfig, BadFile
from ..io.atomic import replacing
from ..io.reading import opened
from .config import BackboneConfig

OVERRIDES = ("embed_dim", "depth", "num_heads", "patch_size", "img_size")       # of BackboneConfig; 0 leaves what the name says


class Backbone(nn.Module):
    """Patch features of photos in [0, 1], after the final norm; mean and standard deviation of photos are those the model was trained with."""

    def __init__(self, model: nn.Module, config: BackboneConfig):
        super().__init__()
        self.model, self.config = model, config
        cfg = model.pretrained_cfg
        self.register_buffer("mean", torch.tensor(cfg["mean"])[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(cfg["std"])[:, None, None], persistent=False)
        self.patch, self.channels = model.patch_embed.patch_size[0], model.num_features

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Tokens down and across of a photo. Raises ValueError for one that patches do not fill."""
        if height % self.patch or width % self.patch:
            raise ValueError(f"photos of {width}x{height} pixels are no whole patches of {self.config.name}; make both sides multiples of {self.patch}")
        return height // self.patch, width // self.patch

    def all_tokens(self, photos: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B T C"]:
        """Class token and registers first (model.num_prefix_tokens of them), then the patches row by row."""
        return self.model.forward_features((photos - self.mean) / self.std)

    def forward(self, photos: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B h w C"]:
        h, w = self.grid(*photos.shape[2:])
        return self.all_tokens(photos)[:, self.model.num_prefix_tokens:].unflatten(1, (h, w))

    def with_class(self, photos: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B h w D"]:
        """Patch features with the class token's beside each where the model has one: D = 2 C, else C."""
        h, w = self.grid(*photos.shape[2:])
        tokens = self.all_tokens(photos)
        patches = tokens[:, self.model.num_prefix_tokens:]
        if self.model.num_prefix_tokens:
            patches = torch.cat([patches, tokens[:, :1].expand_as(patches)], dim=2)
        return patches.unflatten(1, (h, w))


def load(config: BackboneConfig, seed: int = 0) -> Backbone:
    """The backbone that `config` names, in evaluation mode, float32, on the CPU.

    Raises BadConfig for a name that timm does not know or a model without patches, BackendUnavailable where timm is missing or weights
    cannot be had, BadFile for weights of another model.
    """
    timm = _compat.timm()
    if config.weights.endswith((".safetensors", ".pth", ".pt", ".bin")) and config.name == "":
        config = of_file(Path(config.weights))
    if not timm.is_model(config.name):
        close = timm.list_models(f"*{config.name.split('_')[-1]}*")[:5] if config.name else []
        raise BadConfig(f"backbone {config.name!r} is not known to timm{'; there are ' + ', '.join(close) if close else ''}")
    changed = {name: getattr(config, name) for name in OVERRIDES if getattr(config, name)}
    networked = config.weights == "pretrained"
    if networked and changed:
        raise BadConfig(f"the published weights of {config.name} are of the model as it is; leave out {', '.join(changed)}, or name a file with weights")
    random_state = torch.get_rng_state()
    torch.manual_seed(seed)
    try:
        model = timm.create_model(config.name, pretrained=networked, num_classes=0, dynamic_img_size=True, **changed)
    except TypeError as why:
        raise BadConfig(f"backbone {config.name!r} is no vision transformer with patch tokens that timm makes at any size: {why}") from why
    except Exception as why:        # what fetches weights raises errors of a dozen packages
        if not networked:
            raise
        raise BackendUnavailable(f"the weights of {config.name} cannot be fetched ({type(why).__name__}: {str(why).splitlines()[0]:.120}); name a local file: "
                                 "--backbone.weights FILE.safetensors, or take random ones: --backbone.weights random") from why
    finally:
        torch.set_rng_state(random_state)
    if not hasattr(model, "patch_embed") or not hasattr(model, "num_prefix_tokens"):
        raise BadConfig(f"backbone {config.name!r} has no patch tokens; expected a vision transformer")
    if not networked and config.weights != "random":
        _fill(model, Path(config.weights))
    return Backbone(model, config).eval()


def _fill(model: nn.Module, path: Path) -> None:
    state = _tensors(path)
    state = {name.removeprefix("module.").removeprefix("backbone.").removeprefix("model."): x for name, x in state.items()}
    wanted = model.state_dict()
    if lacking := [name for name in wanted if name not in state]:
        from timm.models import vision_transformer

        try:                        # the layouts that models were published in: Meta's names, other sizes of the position embedding
            state = vision_transformer.checkpoint_filter_fn(state, model)
        except Exception as why:
            raise BadFile(path, lacking[0], f"is missing: weights of another model than {type(model).__name__} has ({len(lacking)} of {len(wanted)} tensors)") from why
        lacking = [name for name in wanted if name not in state]
    wrong = next((name for name in wanted if name in state and state[name].shape != wanted[name].shape), None)
    if lacking or wrong:
        shape = "is missing" if lacking else f"is {list(state[wrong].shape)}; expected {list(wanted[wrong].shape)}"
        raise BadFile(path, lacking[0] if lacking else wrong, f"{shape}: weights of another model")
    model.load_state_dict({name: state[name].float() for name in wanted})


def _tensors(path: Path) -> Mapping[str, Tensor]:
    with opened(path):
        pass
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except SafetensorError as why:
            raise BadFile(path, "", f"no whole safetensors file: {why}") from why
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as why:        # pickles fail in any way
        raise BadFile(path, "", f"cannot be read as weights: {str(why).splitlines()[0]:.120}") from why
    for key in ("model", "state_dict", "teacher"):
        found = found[key] if isinstance(found, dict) and isinstance(found.get(key), dict) else found
    if not isinstance(found, dict) or not all(isinstance(x, Tensor) for x in found.values()):
        raise BadFile(path, "", "holds no tensors by name")
    return found


def save(backbone: Backbone, path: Path, half: bool = False) -> None:
    """Writes the merged backbone's tensors under timm's names, and in the header which model they are of: timm.create_model(NAME,
    checkpoint_path=path) loads it, and so does load() with weights alone. The file is there whole or not at all."""
    from safetensors.torch import save as packed

    from .lora import merge

    model = merge(copy.deepcopy(backbone.model))
    state = {name: x.detach().cpu().to(torch.float16 if half and x.is_floating_point() else x.dtype).contiguous() for name, x in model.state_dict().items()}
    about = {name: getattr(backbone.config, name) for name in ("name", *OVERRIDES)}
    with replacing(path) as file:
        file.write(packed(state, metadata={"format": "pt", "splatkit": json.dumps(about)}))


def of_file(path: Path) -> BackboneConfig:
    """The backbone whose weights a file of save() holds. Raises BadFile for another file, whose model must be named."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(os.fspath(path), "pt") as file:
            about = json.loads((file.metadata() or {}).get("splatkit", "null"))
    except (SafetensorError, OSError, ValueError) as why:
        raise BadFile(path, "", f"cannot be read as weights: {why}") from why
    if not isinstance(about, dict) or not isinstance(about.get("name"), str) or not all(type(about.get(name, 0)) is int for name in OVERRIDES):
        raise BadFile(path, "header", "does not say which model its weights are of; name it: --backbone.name NAME")
    return BackboneConfig(name=about["name"], weights=str(path), **{name: about.get(name, 0) for name in OVERRIDES})
