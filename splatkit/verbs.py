"""What the verbs of the command line share: how presets, files and flags lie over each other, notes, and which process speaks."""
from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable

from . import config as configs


def layered(verb: str, argv: list[str], base, otherwise: Callable[[argparse.Namespace], str] | None = None, flags: tuple[str, ...] = ()):
    """`base` with the files of --preset and --config in argv laid over it, so that flags only say what differs from them.

    Where argv names neither, `otherwise` names the preset, given the values of --preset, --config and `flags`, None for what argv lacks.
    """
    layers = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for flag in ("preset", "config", *flags):
        layers.add_argument(f"--{flag}", nargs="?")
    chosen = layers.parse_known_args(argv)[0]
    if otherwise and not chosen.preset and not chosen.config:
        chosen.preset = otherwise(chosen)
    for path in filter(None, [chosen.preset and configs.preset(verb, chosen.preset), chosen.config]):
        base = configs.load_yaml(path, base)
    return base


def note(line: str) -> None:
    """A line for people, beside the results."""
    print(line, file=sys.stderr, flush=True)


def speaks() -> bool:
    """Whether this process prints results: of those that torchrun started, one does."""
    return os.environ.get("RANK", "0") == "0" or os.environ.get("WORLD_SIZE", "1") == "1"
