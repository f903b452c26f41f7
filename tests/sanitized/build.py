"""scenes.cpp with the sources of the CPU library, under sanitizers: what tests/test_sanitizers.py and scripts/soak.py run."""
import os
import platform
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
COUNT = 1000        # random scenes of each in a test run
# Without optimisation, which takes a third of the time to build and leaves more for the sanitizers to see.
FLAGS = ["-std=c++17", "-O0", "-g1", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi", "-pthread", "-Icuda/include", "-DSK_ABI=1"]
SANITIZERS = ["-fsanitize=address,undefined,float-cast-overflow", "-fno-sanitize-recover=all"]


def build(folder: Path, real: str, optimise: str = "-O0") -> Path:
    """The program, for `real` float or double; the test is skipped where there is no g++ with its sanitizers."""
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed")
    (folder / "empty.cpp").write_text("int main() {}")
    if subprocess.run(["g++", *SANITIZERS, folder / "empty.cpp", "-o", folder / "empty"], capture_output=True, check=False).returncode:
        pytest.skip("this g++ has no sanitizer libraries (libasan, libubsan)")
    isa = {"float": "-march=x86-64-v3", "double": "-march=x86-64-v2"}[real] if platform.machine() == "x86_64" and _runs_v3() else ""
    flags = [*FLAGS, optimise, f"-DSK_REAL={real}", *SANITIZERS, *filter(None, [isa])]
    sources = sorted((ROOT / "cuda" / "src").glob("cpu*.cpp"), key=lambda path: -path.stat().st_size) + [HERE / "scenes.cpp"]
    objects = [folder / f"{source.stem}.o" for source in sources]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda pair: _run("g++", *flags, "-c", pair[0], "-o", pair[1]), zip(sources, objects)))
    _run("g++", *flags, *objects, "-o", folder / "scenes")
    return folder / "scenes"


def draw(program: Path, first: int, count: int, timeout: float = 300) -> str:
    """What the program says about the named scenes and `count` random ones; AssertionError with it where it complains or a sanitizer does."""
    return _run(program, first, count, timeout=timeout)


def _runs_v3() -> bool:
    from splatkit import native
    return (native.cpu_level() or 0) >= 3


def _run(*command, timeout: float = 300) -> str:
    done = subprocess.run([str(word) for word in command], cwd=ROOT, capture_output=True, text=True, errors="replace", timeout=timeout, check=False)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout[-2000:]}\n{done.stderr[-6000:]}"
    return done.stdout
