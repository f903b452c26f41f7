"""Compile guards: the shared arithmetic and the CPU core stay fit for the machines that this one is not (browser, NVIDIA GPU, ARM)."""
import platform
import re
import shutil
import subprocess
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent
HEADERS = sorted((REPO / "cuda/include/sk").glob("*.h"))
CORE = [f"cuda/src/{name}" for name in ("cpu_project.cpp", "cpu_bin.cpp", "cpu_blend.cpp", "cpu_blend_vjp.cpp", "cpu_features.cpp")]
INTRINSICS = {"immintrin.h": "!defined(__CUDACC__) && defined(__SSE4_1__)", "wasm_simd128.h": "defined(__wasm_simd128__)"}     # of the compilers: header, its condition
BARE = ["-std=c++17", "-O2", "-fno-exceptions", "-fno-rtti", "-Icuda/include"]


def tool(name: str) -> str:
    """Where the program is; the test is skipped when it is absent."""
    return shutil.which(name) or pytest.skip(f"{name} is not on PATH")


def run(*command) -> None:
    done = subprocess.run([str(word) for word in command], cwd=REPO, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stderr[-3000:]}"


def wasm_sections(module: bytes) -> dict[int, bytes]:
    """The sections of a WebAssembly module by id."""
    def number(at):   # LEB128
        value = shift = 0
        while True:
            value, shift, at = value | (module[at] & 127) << shift, shift + 7, at + 1
            if module[at - 1] < 128:
                return value, at

    assert module[:8] == b"\0asm\1\0\0\0"
    sections, at = {}, 8
    while at < len(module):
        size, start = number(at + 1)
        sections[module[at]], at = module[start:start + size], start + size
    return sections


def test_the_core_compiles_to_wasm32_and_links_without_imports(tmp_path):
    clang, linker = tool("clang++"), tool("wasm-ld")
    objects = [tmp_path / f"{Path(source).stem}.o" for source in CORE]
    for source, object_ in zip(CORE, objects):
        run(clang, "--target=wasm32", "-msimd128", "-mbulk-memory", "-nostdlib", *BARE, "-c", source, "-o", object_)
    run(linker, "--no-entry", "--export-all", *objects, "-o", tmp_path / "core.wasm")     # an undefined symbol is an error
    IMPORTS, EXPORTS = 2, 7
    sections = wasm_sections((tmp_path / "core.wasm").read_bytes())
    assert IMPORTS not in sections, sections[IMPORTS]
    for function in ("project_chunk", "project_vjp_chunk", "radix_sort", "blend_tile", "blend_tile_vjp", "tile_weights", "sum_weighted"):
        assert function.encode() in sections[EXPORTS]


@pytest.mark.parametrize("compiler", [["aarch64-linux-gnu-g++"], ["clang++", "--target=aarch64-linux-gnu", "-ffreestanding"]],
                         ids=["g++", "clang++"])
@pytest.mark.parametrize("real", ["float", "double"])
def test_the_core_compiles_for_aarch64(tmp_path, compiler, real):
    program, *target = compiler
    for source in CORE:
        run(tool(program), *target, *BARE, "-Werror", f"-DSK_REAL={real}", "-c", source, "-o", tmp_path / "core.o")


@pytest.mark.skipif(platform.machine().lower() not in ("x86_64", "amd64"), reason="the flag is of x86-64")
@pytest.mark.parametrize("real", ["float", "double"])
def test_the_library_compiles_where_there_are_none_of_the_vector_instructions_it_knows(real):
    """As on a processor of another kind: x86-64 before SSE 4.1, by the generic lanes."""
    for source in sorted((REPO / "cuda/src").glob("cpu*.cpp")):
        run(tool("g++"), "-std=c++17", "-fsyntax-only", "-Wno-psabi", "-march=x86-64", "-Icuda/include", "-DSK_ABI=0", f"-DSK_REAL={real}", source)


def test_the_kernels_include_every_header():
    """So that test_cuda_build.py, which compiles the kernels, keeps all of the shared arithmetic fit for nvcc."""
    pages, reached = list((REPO / "cuda/src").glob("cuda*")), set()
    while pages:
        for name in re.findall(r'#include "((?:sk/)?\w+\.h)"', pages.pop().read_text()):
            header = next(f for f in (REPO / "cuda/include" / name, REPO / "cuda/include/sk" / name, REPO / "cuda/src" / name) if f.exists())
            if header not in reached:
                reached.add(header)
                pages.append(header)
    assert set(HEADERS) <= reached


@pytest.mark.parametrize("page", [*HEADERS, *(REPO / page for page in (*CORE, "cuda/src/cpu_core.h", "cuda/src/cpu_tile.h"))],
                         ids=lambda page: page.name)
def test_arithmetic_and_core_include_no_library(page):
    conditions, allowed = [], {"stdint.h", "stddef.h"}
    for line in page.read_text().splitlines():
        if re.match(r"#\s*if", line):
            conditions.append(line)
        elif re.match(r"#\s*endif", line):
            conditions.pop()
        elif header := re.match(r"#\s*include\s*<(.+)>", line):
            guarded = header[1] in INTRINSICS and any(INTRINSICS[header[1]] in c for c in conditions)
            assert header[1] in allowed or guarded, f"{page.name}: {line}"
