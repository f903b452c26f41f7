"""Builds viewer/src/splat.wasm, the CPU rasterizer for the browser, with clang and lld: `python3 scripts/build_wasm.py [OUT]`.

The file is committed, so that nobody needs clang to build the viewer. One clang version gives the same bytes everywhere; the committed ones
are by CLANG. clang, not Emscripten: the core is freestanding, and the module imports nothing.
"""
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "viewer" / "src" / "splat.wasm"
CLANG = 14      # Debian 12: apt install clang lld
SOURCES = ["cpu_project", "cpu_bin", "cpu_blend", "cpu_features", "wasm"]
COMPILE = ["--target=wasm32", "-msimd128", "-mbulk-memory", "-nostdlib", "-ffreestanding", "-std=c++17", "-O3", "-fno-exceptions", "-fno-rtti",
           "-fvisibility=hidden", "-ffunction-sections", "-fno-math-errno", "-fno-trapping-math", "-Icuda/include"]
# The stack stands first, so that one that overflows leaves the memory and traps, instead of writing over data.
LINK = ["--no-entry", "--gc-sections", "--export-dynamic", "--strip-all", "--stack-first", "-z", "stack-size=131072"]


def tools():
    """(clang++, wasm-ld, major version of clang); ("", "", 0) where one of them is absent."""
    clang, linker = shutil.which(os.environ.get("WASM_CXX", "clang++")), shutil.which("wasm-ld")
    if not clang or not linker:
        return "", "", 0
    version = subprocess.run([clang, "--version"], capture_output=True, text=True, check=True).stdout
    return clang, linker, int(re.search(r"version (\d+)", version)[1])


def build(out):
    """Writes the module to `out`."""
    clang, linker, _ = tools()
    with tempfile.TemporaryDirectory() as scratch:
        objects = [f"{scratch}/{name}.o" for name in SOURCES]
        for name, object_ in zip(SOURCES, objects):
            subprocess.run([clang, *COMPILE, "-c", f"cuda/src/{name}.cpp", "-o", object_], cwd=ROOT, check=True)
        subprocess.run([linker, *LINK, *objects, "-o", str(out)], check=True)


def main():
    clang, _, version = tools()
    if not clang:
        sys.exit("build_wasm.py: clang++ or wasm-ld is not on PATH; on Debian: apt install clang lld")
    if version != CLANG:
        print(f"build_wasm.py: this is clang {version}; the committed module is by clang {CLANG}, and its bytes will differ", file=sys.stderr)
    out = Path(sys.argv[1]) if len(sys.argv) > 1 else OUT
    build(out.resolve())
    print(f"{out}: {out.stat().st_size} bytes")


if __name__ == "__main__":
    main()
