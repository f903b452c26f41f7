"""The one door to timm and torchvision, which are optional, and one of which may not be importable beside this torch as it is."""
from __future__ import annotations

import importlib
import importlib.util
import re
import sys
from types import ModuleType

from .errors import BackendUnavailable

_libraries: list = []     # op schemas live as long as the object that registered them


def timm() -> ModuleType:
    """The package timm. Raises BackendUnavailable where it is not installed."""
    if importlib.util.find_spec("timm") is None:
        raise BackendUnavailable("vision backbones need timm, the extra `distill`: pip install 'splatkit[distill]'")
    torchvision()
    return importlib.import_module("timm")


def torchvision() -> ModuleType:
    """The package torchvision, importable also where its library of operators does not load (a CUDA build beside a CPU-only torch).

    There the schemas of the operators that its import looks for (nms, qnms) are registered without code: to call them still fails, and nothing here does.
    """
    import torch

    if importlib.util.find_spec("torchvision") is None:
        raise BackendUnavailable("timm needs torchvision, the extra `distill`: pip install 'splatkit[distill]'")
    for _ in range(8):
        try:
            return importlib.import_module("torchvision")
        except RuntimeError as why:
            missing = re.search(r"operator torchvision::(\w+) does not exist", str(why))
            if missing is None:
                raise
        _libraries.append(torch.library.Library("torchvision", "FRAGMENT"))
        _libraries[-1].define(f"{missing[1]}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
    raise BackendUnavailable(f"torchvision does not load beside torch {torch.__version__}: operator torchvision::{missing[1]} is missing")
