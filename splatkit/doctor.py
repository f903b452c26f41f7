"""What runs on this machine, what does not, why, and what to do about it: the text of `splatkit doctor`."""
from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import subprocess
import sys

import torch

from . import __version__, native
from .raster import backends

EXTRAS = {      # the package that each of them brings, and what for
    "sfm": ("pycolmap", "poses for bare photos"), "video": ("av", "films in and out"), "heic": ("pillow_heif", "HEIC photos"), "mesh": ("open3d", "meshes"),
}


def report() -> list[str]:
    """The lines of `splatkit doctor`."""
    level, runs = native.cpu_level(), {"reference": "runs, slowly: for checking"}
    lines = [
        f"splatkit   {__version__}",
        f"python     {platform.python_version()} ({sys.executable})",
        f"torch      {torch.__version__}, {torch.get_num_threads()} threads of {os.cpu_count()} processors",
        f"processor  {platform.machine()}{f', runs x86-64-v{level}' if level else ''}; instruction set in use: {native.cpu_isa()}"
        f"{' (SPLATKIT_ISA)' if os.environ.get('SPLATKIT_ISA') else ''}",
        f"card       {_card()}",
        "compilers  " + "; ".join(f"{name}: {_version(name)}" for name in ("g++", "clang++", "nvcc")),
        "native libraries",
        *(f"  {name:<9}  {_indent(reason or 'ok')}" for name, reason in native.available().items()),
        "backends",
        *(f"  {name:<9}  {_indent(reason or runs.get(name, 'runs'))}" for name, reason in backends().items()),
        "optional parts",
        *(f"  {extra:<9}  {what}: {_installed(extra, package)}" for extra, (package, what) in EXTRAS.items()),
    ]
    if not can_render():
        lines += ["Nothing here renders at a useful speed.",
                  "Put g++ or clang++ on PATH (Debian: apt install g++), then install splatkit again."]
    return lines


def _installed(extra: str, package: str) -> str:
    return "ok" if importlib.util.find_spec(package) else f"not installed; pip install 'splatkit[{extra}]'"


def _card() -> str:
    if not torch.cuda.is_available():
        return "none that torch can use"
    major, minor = torch.cuda.get_device_capability()
    return f"{torch.cuda.get_device_name()}, compute capability {major}.{minor}, torch's CUDA {torch.version.cuda}"


def can_render() -> bool:
    """Whether any backend but the slow reference runs here."""
    return any(reason is None for name, reason in backends().items() if name != "reference")


def _version(compiler: str) -> str:
    """The line in which the compiler says its version."""
    if shutil.which(compiler) is None:
        return "not found"
    try:
        text = subprocess.run([compiler, "--version"], capture_output=True, text=True, timeout=20, check=False).stdout
    except (OSError, subprocess.SubprocessError) as why:
        return f"does not run: {why}"
    lines = [line.strip() for line in text.splitlines() if any(c.isdigit() for c in line)]
    release = [line for line in lines if "release" in line]     # nvcc begins with its copyright
    return (release or lines or ["no version"])[0]


def _indent(text: str) -> str:
    return text.replace("\n", "\n" + " " * 13)
