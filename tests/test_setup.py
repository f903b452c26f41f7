"""setup.py and scripts/run.py: what they build, and what they do where something is missing."""
import ast
import ctypes
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from splatkit import native

REPO = Path(__file__).resolve().parent.parent


def build_in(folder: Path, **environment) -> dict:
    """build.json's libraries after setup.py built a tiny project in `folder`."""
    (folder / "cuda/src").mkdir(parents=True, exist_ok=True)
    shutil.copytree(REPO / "cuda/include", folder / "cuda/include", dirs_exist_ok=True)
    shutil.copy(REPO / "setup.py", folder)
    for source in set(re.findall(r"cuda/src/\w+\.cp?p?u?", (folder / "setup.py").read_text())):
        abi = 'extern "C" __attribute__((visibility("default"))) long sk_abi() { return SK_ABI; }'
        (folder / source).write_text(abi if source.endswith("/cpu.cpp") else "int nothing();")
    environment = {"CUDACXX": "no-such-nvcc", "SPLATKIT_CUDA_ARCHS": "90", **environment}
    done = subprocess.run([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], cwd=folder, capture_output=True, text=True,
                          env={**os.environ, **environment}, timeout=120)
    assert done.returncode == 0, done.stderr
    libraries = json.loads((folder / "splatkit/_native/build.json").read_text())["libraries"]
    assert set(libraries) == set(native.NAMES)
    return libraries


def of_cpu(libraries: dict) -> list[dict]:
    return [record for name, record in libraries.items() if name != "cuda"]


def test_setup_never_imports_torch():
    assert "torch" not in (REPO / "setup.py").read_text().replace("torch headers", "")


def test_a_missing_compiler_does_not_fail_the_install(tmp_path):
    libraries = build_in(tmp_path, CXX="no-such-compiler")
    assert all("no-such-compiler" in record["reason"] for record in of_cpu(libraries)) and "no-such-nvcc" in libraries["cuda"]["reason"]


def test_a_failing_compile_does_not_fail_the_install_and_is_recorded(tmp_path):
    broken = tmp_path / "g++"
    broken.write_text("#!/bin/sh\ncase $1 in --version) echo broken 1.0;; *) echo 'internal compiler error' >&2; exit 1;; esac\n")
    broken.chmod(0o755)
    assert all("internal compiler error" in record["reason"] for record in of_cpu(build_in(tmp_path, CXX=str(broken))))


def test_the_native_build_can_be_skipped(tmp_path):
    assert all("SPLATKIT_NATIVE=0" in record["reason"] for record in build_in(tmp_path, SPLATKIT_NATIVE="0").values())


@pytest.mark.skipif(not (os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")), reason="no C++ compiler")
def test_only_what_is_out_of_date_is_built_again(tmp_path):
    assert all(record["reason"] is None for record in of_cpu(build_in(tmp_path)))
    libraries = sorted((tmp_path / "splatkit/_native").glob("*.so"))
    assert {p.name for p in libraries} == {f"libsplatkit_{name}.so" for name in native.NAMES if name != "cuda"}
    assert all(ctypes.CDLL(str(p)).sk_abi() == ctypes.c_int32(native.ABI).value for p in libraries)     # ctypes' default type is int
    before = [p.stat().st_mtime_ns for p in libraries]
    build_in(tmp_path)
    assert [p.stat().st_mtime_ns for p in libraries] == before
    (tmp_path / "cuda/include/sk/new.h").write_text("// new\n")
    build_in(tmp_path)
    assert all(p.stat().st_mtime_ns > b for p, b in zip(libraries, before))


def test_the_cuda_library_is_built_for_the_cards_that_are_named_and_code_for_later_ones(tmp_path):
    nvcc = tmp_path / "nvcc"
    nvcc.write_text(f"#!/bin/sh\necho \"$@\" >> {tmp_path}/calls\ncase $1 in --version) echo release 13.0;; *) echo 'no room' >&2; exit 1;; esac\n")
    nvcc.chmod(0o755)
    libraries = build_in(tmp_path, CUDACXX=str(nvcc), SPLATKIT_CUDA_ARCHS="90;75")
    assert libraries["cuda"]["reason"] == "no room" and all(record["reason"] is None for record in of_cpu(libraries))
    compiles = [line for line in (tmp_path / "calls").read_text().splitlines() if " -c " in line]
    for line in compiles:
        assert re.findall(r"-gencode=arch=compute_(\d+),code=(\w+?)_(\d+)", line) == [("75", "sm", "75"), ("90", "sm", "90"), ("90", "compute", "90")]
    assert len(compiles) == len(list((REPO / "cuda/src").glob("*.cu")))


@pytest.mark.parametrize("archs, said", [("", "nvidia-smi showed no card"), ("ninety", "SPLATKIT_CUDA_ARCHS is 'ninety'")])
def test_without_a_card_the_cuda_library_says_what_to_do(tmp_path, archs, said):
    if not archs and shutil.which("nvidia-smi"):
        pytest.skip("nvidia-smi is here")
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\necho release 13.0\n")
    nvcc.chmod(0o755)
    assert said in build_in(tmp_path, CUDACXX=str(nvcc), SPLATKIT_CUDA_ARCHS=archs)["cuda"]["reason"]


def test_run_py_explains_itself():
    done = subprocess.run([sys.executable, REPO / "scripts/run.py", "tset"], capture_output=True, text=True, timeout=120)
    assert done.returncode != 0 and done.stderr.strip() == "usage: python3 scripts/run.py demo|test [arguments]"


def test_run_py_parses_on_old_pythons_and_needs_only_the_standard_library():
    tree = ast.parse((REPO / "scripts/run.py").read_text(), feature_version=(3, 6))
    names = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    names |= {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    assert names <= set(sys.stdlib_module_names)
