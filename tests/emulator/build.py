"""cuda/src/*.cu by g++ against the emulator of this folder: a library of splatkit.h that takes CPU tensors."""
import platform
import shutil
import subprocess
from pathlib import Path

import pytest

from splatkit import native

HERE = Path(__file__).resolve().parent
CUDA = HERE.parent.parent / "cuda"
FLAGS = ["-std=c++17", "-fPIC", "-fvisibility=hidden", "-Wno-psabi", "-fno-strict-aliasing", "-DSK_EMULATOR", f"-DSK_ABI={native.ABI}",
         f"-I{HERE}", f"-I{CUDA / 'include'}"]
# To compile the kernels, to compile the emulator, to link.
MODES = {
    "plain": (["-O2"], ["-O2"], []),
    "address": (["-O0", "-g1", "-fsanitize=address,alignment,bounds", "-fno-sanitize-recover=all"], ["-O0", "-g1", "-fsanitize=address"],
                ["-fsanitize=address,alignment,bounds"]),
    "races": (["-O1", "-g1", "-fsanitize=thread"], ["-O2", "-DSK_RACES"], ["-ldl"]),     # races.cpp stands in for libtsan
}


def build(folder: Path, mode: str, sources: Path = CUDA / "src", base: Path | None = None) -> Path:
    """The library made of `sources` in `folder`; objects of `base`, a folder built from the real sources, serve again where they can."""
    if shutil.which("g++") is None or platform.machine() != "x86_64":
        pytest.skip("the emulator is built with g++ and switches stacks on x86-64")
    kernels, emulator, link = MODES[mode]
    changed = {path.name for path in sources.iterdir() if path.read_bytes() != (CUDA / "src" / path.name).read_bytes()}
    objects = []
    for source in [*sorted(sources.glob("cuda*.cu")), HERE / "emulator.cpp", *([HERE / "races.cpp"] if mode == "races" else [])]:
        if source.name == "cuda_sort.cu":       # CUB; the emulator has its own
            continue
        if base and source.name not in changed and not any(f'#include "{name}"' in source.read_text() for name in changed):
            objects.append(base / f"{source.stem}.o")
            continue
        objects.append(folder / f"{source.stem}.o")
        run("g++", *FLAGS, f"-I{sources}", *(kernels if source.suffix == ".cu" else emulator), "-x", "c++", "-c", source, "-o", objects[-1])
        if source.suffix == ".cu" and mode != "address":
            run("objcopy", "--rename-section", ".bss=sk_shared,alloc,load,data,contents", objects[-1])      # see emulator.cpp
    library = folder / f"libsplatkit_emulated_{mode}.so"
    run("g++", "-shared", *objects, *link, "-o", library)
    return library


def run(*command, **how) -> str:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, errors="replace", timeout=300, **how)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout[-2000:]}\n{done.stderr[-6000:]}"
    return done.stdout
