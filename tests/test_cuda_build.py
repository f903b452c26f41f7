"""The CUDA library as nvcc builds it, on a machine without a card: no warnings, the entries of splatkit.h and no others, calm without a
driver, and registers, stack and shared memory of every kernel within tests/cuda_budget.json.

`python tests/test_cuda_build.py` writes that table anew from what the kernels use now.
"""
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from splatkit import native

REPO = Path(__file__).resolve().parent.parent
SOURCES = sorted((REPO / "cuda/src").glob("*.cu"), key=lambda path: (path.stem != "cuda_sort", path.name))     # CUB takes longest: first
BUDGET = REPO / "tests/cuda_budget.json"
ARCHITECTURES = ("75", "90")
INSTANCES = 20              # kernels of a file at most: those of cuda_project_vjp.cu take as long as cuda_sort.cu
SLACK = 8                   # registers, for other versions of nvcc
WITHOUT_STACK = ("cuda_blend", "cuda_features", "cuda_project")     # beginnings of the names of files that keep everything in registers


def run(*command) -> str:
    """What the program said."""
    done = subprocess.run([str(word) for word in command], cwd=REPO, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout[-1000:]}\n{done.stderr[-4000:]}"
    return done.stdout + done.stderr


def compile_all(folder: Path) -> dict[str, str]:
    """Objects of every source in `folder`; what ptxas said, by source."""
    gencode = lambda source: [f"-gencode=arch=compute_{a},code=sm_{a}" for a in ARCHITECTURES[source.stem == "cuda_sort":]]      # CUB's kernels take 10 s each time
    flags = ["-std=c++17", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden", "-Werror", "all-warnings", "-Xptxas=-v", "-Icuda/include",
             f"-DSK_ABI={native.ABI}"]
    with ThreadPoolExecutor(2) as pool:
        said = pool.map(lambda source: run("nvcc", *flags, *gencode(source), "-c", source, "-o", folder / f"{source.stem}.o"), SOURCES)
        return {source.stem: text for source, text in zip(SOURCES, said)}


def usage(said: str) -> dict[str, dict[str, dict[str, int]]]:
    """Registers, stack, spills and static shared memory in bytes by architecture and kernel, out of what ptxas said."""
    pattern = (r"Compiling entry function '(\w+)' for 'sm_(\d+)'(?:.|\n)*?"
               r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads\nptxas info\s*: Used (\d+) registers(.*)")
    found = re.findall(pattern, said)
    names = run("c++filt", "-p", *[row[0] for row in found]).splitlines() if found else []
    out = {a: {} for a in ARCHITECTURES}
    for name, (_, architecture, stack, stores, loads, registers, rest) in zip(names, found):
        shared = re.search(r"(\d+) bytes smem", rest)
        out[architecture][re.sub(r"\(anonymous namespace\)::|sk::", "", name)] = {
            "registers": int(registers), "stack": int(stack), "spills": int(stores) + int(loads), "shared": int(shared[1]) if shared else 0}
    return out


def cuobjdump() -> str | None:
    """The disassembler of the toolkit, or of the package nvidia-cuda-cuobjdump."""
    folders = (Path(p) for p in sys.path)
    return shutil.which("cuobjdump") or next((str(p) for f in folders for p in (f / "nvidia").glob("*/bin/cuobjdump")), None)


def inner_loop(folder: Path, source: str, program: str) -> int:
    """Instructions of the shortest loop of an sm_90 kernel that works out an exponential: the step over a Gaussian, or over as many as it was unrolled to."""
    kernel, functions = LOOPS[source], re.split(r"\n\s*Function : ", run(program, "-sass", "-arch", "sm_90", folder / f"{source}.o"))
    text = next(f for f in functions if re.match(rf"\w*\d+{kernel}(E|I)", f))
    code = re.findall(r"/\*([0-9a-f]{4,5})\*/\s+(.*?)\s*;", text)
    at = [int(address, 16) for address, _ in code]
    loops = [[w for a, (_, w) in zip(at, code) if int(m[1], 16) <= a <= here] for here, (_, words) in zip(at, code)
             if (m := re.search(r"BRA (?:\w+, )?0x([0-9a-f]+)", words)) and int(m[1], 16) < here]
    return min(len(loop) for loop in loops if any("MUFU.EX2" in words for words in loop))


LOOPS = {"cuda_blend": "blend_kernelILb0", "cuda_blend_vjp": "blend_vjp_moments_kernelILb0"}


def table(said: dict[str, str]) -> dict[str, dict[str, dict[str, int]]]:
    """Registers and shared memory on sm_90 by file and kernel: what cuda_budget.json holds. CUB's kernels are not ours."""
    return {name: {kernel: {"registers": u["registers"], "shared": u["shared"]} for kernel, u in sorted(usage(text)["90"].items())}
            for name, text in sorted(said.items()) if name != "cuda_sort"}


@pytest.fixture(scope="module")
def folder(once_per_run) -> Path:
    """Where the objects are, and what ptxas said."""
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not on PATH")
    return once_per_run("cuda", lambda folder: (folder / "said.json").write_text(json.dumps(compile_all(folder))))


@pytest.fixture(scope="module")
def compiled(folder) -> dict[str, str]:
    return json.loads((folder / "said.json").read_text())


@pytest.fixture(scope="module")
def library(folder, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("cuda") / "libsplatkit_cuda.so"
    objects = [folder / f"{source.stem}.o" for source in SOURCES]
    run("nvcc", "-shared", "-cudart", "static", "-gencode=arch=compute_90,code=sm_90", *objects, "-o", path)
    return path


def test_no_file_makes_more_than_a_few_kernels(compiled):
    count = {(name, a): len(kernels) for name, text in compiled.items() for a, kernels in usage(text).items()}
    assert all(n <= INSTANCES for n in count.values()) and sum(count.values()) > 50, count


def test_the_library_offers_the_entries_of_the_header_and_nothing_else(library):
    exported = {line.split()[-1] for line in run("nm", "-D", "--defined-only", library).splitlines()}
    of_std = {name for name in exported if re.match(r"_ZZ?NK?St", name)}      # templates of std:: keep its visibility
    assert exported - of_std == set(native.ENTRIES)


def test_without_a_card_an_entry_says_what_is_missing(library):
    # In a process of its own, which sees no card even where there is one.
    program = """
import ctypes, sys
from pathlib import Path
import torch
from splatkit import native
lib = native.Library(Path(sys.argv[1]), torch.float32)     # compares sk_abi() with the header
x = torch.zeros(64, dtype=torch.float64)
call, parameters = getattr(ctypes.CDLL(sys.argv[1]), "sk_project"), native.ENTRIES["sk_project"].parameters
call.argtypes = [ctypes.c_void_p if p.pointer else native._NUMBER[p.type] for p in parameters]
values = {"n": 1, "cameras": 1, "width": 16, "height": 16, "sh_bands": 1, "rows": None, "stream": None, "scratch_words": 1 << 20}
status = call(*[values.get(p.name, x.data_ptr() if p.pointer else 0) for p in parameters])
print(status, lib.sk_last_error())
"""
    done = subprocess.run([sys.executable, "-c", program, library], cwd=REPO, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
                          capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    assert re.fullmatch(rf"{native.CONST['SK_ERROR']} sk_project: .*(CUDA|driver|device).*\n", done.stdout), done.stdout


def test_no_kernel_spills_and_the_inner_loops_have_no_stack(compiled):
    for name, text in compiled.items():
        if name == "cuda_sort":     # CUB's
            continue
        for architecture, kernels in usage(text).items():
            for kernel, used in kernels.items():
                assert used["spills"] == 0, f"sm_{architecture} {kernel} spills {used['spills']} bytes"
                if name.startswith(WITHOUT_STACK):
                    assert used["stack"] == 0, f"sm_{architecture} {kernel} has a stack of {used['stack']} bytes"


def test_kernels_use_no_more_registers_and_shared_memory_than_they_did(compiled):
    anew = "`python tests/test_cuda_build.py` writes the table anew; look at what changed"
    budget, now = json.loads(BUDGET.read_text()), table(compiled)
    del budget["inner loops"]
    missing = {kernel for kernels in now.values() for kernel in kernels} ^ {kernel for kernels in budget.values() for kernel in kernels}
    assert not missing, f"tests/cuda_budget.json and the sources differ in {sorted(missing)}; {anew}"
    for name, kernels in now.items():
        for kernel, used in kernels.items():
            had = budget[name][kernel]
            assert used["registers"] <= had["registers"] + SLACK and used["shared"] <= had["shared"], f"{kernel}: {used}, was {had}; {anew}"


def test_the_inner_loops_of_blending_have_no_more_instructions_than_they_had(folder):
    program, budget = cuobjdump(), json.loads(BUDGET.read_text())["inner loops"]
    if not program:
        pytest.skip("cuobjdump is missing (the package nvidia-cuda-cuobjdump has it)")
    for source, kernel in LOOPS.items():
        count = inner_loop(folder, source, program)
        assert 20 < count <= 1.05 * budget[source], f"{kernel}: {count} instructions, were {budget[source]}"


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        rows = table(compile_all(Path(scratch)))
        loops = {source: inner_loop(Path(scratch), source, cuobjdump()) for source in LOOPS}
    lines = lambda kernels: ",\n".join(f"  {json.dumps(kernel)}: {json.dumps(used)}" for kernel, used in kernels.items())
    rows["inner loops"] = loops
    files = [f" {json.dumps(name)}: {{\n{lines(kernels)}\n }}" for name, kernels in rows.items() if kernels]
    BUDGET.write_text("{\n" + ",\n".join(files) + "\n}\n")
