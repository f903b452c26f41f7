"""Weights of the lifting network: published Lightning checkpoints, splatkit's own safetensors, and the file that comes with the package."""
from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from ..config import _overlay
from ..errors import BadConfig, BadFile
from ..io.atomic import replacing
from ..io.re10k import unpickled
from ..io.reading import opened, size_of
from .config import CONFIGS, MVSplatConfig
from .model import MVSplat

PACKAGED = {"tiny": Path(__file__).with_name("tiny.safetensors")}
PUBLISHED = ("re10k", "acid")       # the authors' files are behind a page that must be clicked through
BYTES_MAX = 4 << 30
_HUB = re.compile(r"hf:([\w.-]+/[\w.-]+)/([\w./-]+)")
_OTHERS = ("decoder.", "losses.")   # parts of a training run beside the encoder


@dataclass(frozen=True)
class Weights:
    """Where a network's weights came from."""

    path: Path
    sha256: str             # of the file
    parameters: int

    def __str__(self) -> str:
        return f"{self.path} ({self.parameters:,} parameters, sha256 {self.sha256})"


def load_weights(source: str | Path = "tiny", sha256: str | None = None, config: MVSplatConfig = CONFIGS["mvsplat"]) -> tuple[MVSplat, Weights]:
    """The network that a file holds, float32 on the CPU, and which file that was.

    `source` is a path, "tiny" for the weights in the package, or hf:OWNER/REPOSITORY/FILE for a file of the Hugging Face hub, which is
    downloaded once (needs huggingface_hub). Files are safetensors as save_weights() writes them, or torch files of a published training
    run: the weights under "state_dict", each name with "encoder." before it, for a network of `config`. Nothing but tensors and plain values is ever unpickled.
    Where `sha256` is given, a file with another one is not looked into.

    Raises BadFile naming the file and, where it is about one, the weight that is missing, unknown, of another shape or not finite.
    """
    path = _file_of(str(source))
    with opened(path) as file:
        if (size := size_of(file)) > BYTES_MAX:
            raise BadFile(path, "", f"{size} bytes; at most {BYTES_MAX} are read")
        data = file.read()
    found = hashlib.sha256(data).hexdigest()
    if sha256 is not None and found != sha256.lower():
        raise BadFile(path, "", f"its sha256 is {found}; expected {sha256.lower()}: another file, or a damaged one")
    config, state = _of_safetensors(path, data) if path.suffix == ".safetensors" else (config, _of_torch(path, data))
    _check_state(path, state, shapes_of(config))
    model = _empty(config)
    model.load_state_dict({key: x.float() for key, x in state.items()}, assign=True)
    return model.requires_grad_(), Weights(path, found, sum(x.numel() for x in state.values()))


def save_weights(path: Path, model: MVSplat, half: bool = True) -> None:
    """Writes weights and config as safetensors, whole or not at all; in half precision unless told otherwise.

    Raises ValueError for a weight that is not finite or does not fit half precision.
    """
    state = {key: x.detach().cpu().to(torch.float16 if half else torch.float32).contiguous() for key, x in model.state_dict().items()}
    for key, x in state.items():
        if not bool(torch.isfinite(x).all()):
            raise ValueError(f"weight {key} holds a NaN or an infinity{', or numbers that half precision cannot' if half else ''}")
    with replacing(path) as file:
        file.write(safetensors.torch.save(state, {"splatkit_lift": json.dumps(dataclasses.asdict(model.config))}))


def _file_of(source: str) -> Path:
    if source in PACKAGED:
        if not PACKAGED[source].is_file():
            raise BadFile(PACKAGED[source], "", "these weights do not come with this version; train some (splatkit lift-train), or give --weights FILE with a published checkpoint")
        return PACKAGED[source]
    if source in PUBLISHED:
        raise BadFile(f"{source}.ckpt", "", "the authors of MVSplat offer it on a page that only a browser gets through (github.com/donydchen/mvsplat, Pretrained Models): "
                      f"download it and give --weights PATH/{source}.ckpt, or hf:OWNER/REPOSITORY/{source}.ckpt where a copy is on the Hugging Face hub")
    if source.startswith("hf:"):
        if (named := _HUB.fullmatch(source)) is None:
            raise BadFile(source, "", "expected hf:OWNER/REPOSITORY/FILE")
        return _downloaded(source, named[1], named[2])
    return Path(source)


def _downloaded(source: str, repository: str, name: str) -> Path:
    """The file in the hub's cache on this machine, where it is put first if it is not there."""
    try:
        import huggingface_hub as hub
    except ImportError as e:
        raise BadFile(source, "", "needs huggingface_hub (pip install huggingface_hub), or download the file and give its path") from e
    try:
        return Path(hub.hf_hub_download(repository, name, local_files_only=True))
    except Exception:       # not in the cache; which type says so has changed between versions
        pass
    try:
        return Path(hub.hf_hub_download(repository, name, etag_timeout=10))
    except Exception as e:
        raise BadFile(source, "", f"cannot be downloaded ({type(e).__name__}: {_line(e)}); without a network, give the path of a file") from e


def _of_safetensors(path: Path, data: bytes) -> tuple[MVSplatConfig, dict[str, Tensor]]:
    try:
        state = safetensors.torch.load(data)
        text = json.loads(data[8:8 + int.from_bytes(data[:8], "little")])["__metadata__"]["splatkit_lift"]
        values = json.loads(text)
    except Exception as e:      # the header's own error, or any way in which it is not what save_weights wrote
        raise BadFile(path, "", f"is no file of lifting weights, or it is damaged: {_line(e)}") from e
    try:
        return _overlay(MVSplatConfig, values if isinstance(values, dict) else {"": values}, "", ""), state
    except BadConfig as e:
        raise BadFile(path, "splatkit_lift", str(e)) from e


def _of_torch(path: Path, data: bytes) -> dict[str, Tensor]:
    top = unpickled(path, data)
    state = top.get("state_dict", top) if isinstance(top, dict) else None
    if not isinstance(state, dict) or not state or not all(isinstance(key, str) and isinstance(x, Tensor) for key, x in state.items()):
        raise BadFile(path, "state_dict", "expected names and tensors")
    if any(key.startswith("encoder.") for key in state):
        state = {key.removeprefix("encoder."): x for key, x in state.items() if not key.startswith(_OTHERS)}
    return state


def _empty(config: MVSplatConfig) -> MVSplat:
    """A network without memory for its weights."""
    with torch.device("meta"):
        return MVSplat(config)


@functools.cache
def shapes_of(config: MVSplatConfig) -> dict[str, torch.Size]:
    """Of all weights, by name."""
    return {key: x.shape for key, x in _empty(config).state_dict().items()}


def _check_state(path: Path, state: dict[str, Tensor], expected: dict[str, torch.Size]) -> None:
    """BadFile naming the first weight that keeps `state` from being `expected`."""
    if missing := [key for key in expected if key not in state]:
        raise BadFile(path, missing[0], f"is missing{f', and {len(missing) - 1} more of {len(expected)} weights' if missing[1:] else ''}; expected a checkpoint of MVSplat")
    if unknown := [key for key in state if key not in expected]:
        raise BadFile(path, f"{unknown[0]!r:.100}", f"is no weight of MVSplat{f', nor are {len(unknown) - 1} more' if unknown[1:] else ''}")
    for key, x in state.items():
        if x.shape != expected[key]:
            raise BadFile(path, key, f"is {list(x.shape)}; expected {list(expected[key])}")
        if not x.is_floating_point() or x.layout != torch.strided:
            raise BadFile(path, key, f"is {x.dtype}, {x.layout}; expected dense floating-point numbers")
        if not bool(torch.isfinite(x.float()).all()):
            raise BadFile(path, key, "holds a NaN or an infinity")


def _line(error: Exception) -> str:
    return " ".join("".join(c if c.isprintable() else " " for c in str(error)).split())[:150]
