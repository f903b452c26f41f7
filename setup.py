"""Builds the native libraries: plain shared objects with a C ABI that ctypes loads, so neither Python nor torch headers are needed.

A missing compiler or a failing compile never fails the install: splatkit/_native/build.json says per library why it is absent,
and `splatkit doctor` shows it. SPLATKIT_NATIVE=0 skips the build. The CUDA library is built for the cards that are here, or for the
compute capabilities that SPLATKIT_CUDA_ARCHS names ("90", "75;90", "all").
"""
import hashlib
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

CPU = ["cuda/src/cpu_project.cpp", "cuda/src/cpu_bin.cpp", "cuda/src/cpu_blend.cpp", "cuda/src/cpu_blend_vjp.cpp", "cuda/src/cpu_features.cpp",
       "cuda/src/cpu_train.cpp", "cuda/src/cpu_pack.cpp", "cuda/src/cpu_threads.cpp", "cuda/src/cpu_raster.cpp", "cuda/src/cpu.cpp"]
COMPILE = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi", "-pthread", "-Icuda/include"]
LINK = ["-shared", "-pthread"]

# libsplatkit_<name>.so: its sources and the flags beside COMPILE. One library per instruction set, never one for all: inline templates
# merge into one weak symbol, so the x86-64-v2 code of a common library would run AVX-512.
X86 = {
    "cpu_v2": (CPU, ["-march=x86-64-v2"]),
    "cpu_v3": (CPU, ["-march=x86-64-v3"]),
    "cpu_v4": (CPU, ["-march=x86-64-v4", "-mprefer-vector-width=512"]),
    "cpu_f64": (CPU, ["-march=x86-64-v2", "-DSK_REAL=double"]),
}
OTHER = {"cpu_base": (CPU, []), "cpu_f64": (CPU, ["-DSK_REAL=double"])}
LIBRARIES = X86 if platform.machine().lower() in ("x86_64", "amd64") else OTHER

CUDA = [f"cuda/src/{name}.cu" for name in ("cuda_sort", "cuda_project_vjp", "cuda_features", "cuda_blend_vjp", "cuda_project", "cuda_blend", "cuda_bin", "cuda_loss",
                                            "cuda_fixed", "cuda_train", "cuda")]     # the slowest to compile first
NVCC = ["-std=c++17", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden", "-Icuda/include"]
EVERY_CARD = ["75", "80", "86", "89", "90", "100", "120"]


def header_abi():
    """What sk_abi() returns: the first 63 bits of the header's sha256 (splatkit/native.py computes the same)."""
    return int.from_bytes(hashlib.sha256(Path("cuda/include/splatkit.h").read_bytes()).digest()[:8], "big") >> 1


def find_compiler():
    """The command of the C++ compiler and its version line; ([], reason) when there is none."""
    for command in filter(None, [os.environ.get("CXX"), "g++", "clang++"]):
        words = shlex.split(command)
        if words and shutil.which(words[0]):
            version = subprocess.run([*words, "--version"], capture_output=True, text=True, check=False).stdout
            return words, version.partition("\n")[0]
        if command == os.environ.get("CXX"):
            return [], f"$CXX is {command!r}, which was not found at install"
    return [], "no C++ compiler: neither $CXX, g++ nor clang++ was found at install"


def call(command):
    """None, or the last lines of what the failing command wrote to stderr."""
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    why = "\n".join(done.stderr.strip().splitlines()[-8:]) or f"{command[0]} ended with {done.returncode}"
    return why if done.returncode else None


def find_cuda():
    """The nvcc command, its version line and -gencode flags for the cards; ([], reason, []) when there is nothing to build with or for."""
    nvcc = next(filter(None, [os.environ.get("CUDACXX"), shutil.which("nvcc"), shutil.which("/usr/local/cuda/bin/nvcc")]), None)
    if nvcc is None:
        return [], "nvcc was not found at install: neither $CUDACXX, on PATH, nor /usr/local/cuda/bin/nvcc", []
    wanted = os.environ.get("SPLATKIT_CUDA_ARCHS", "")
    if not wanted:
        try:
            query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
            wanted = " ".join(re.findall(r"\d+", subprocess.run(query, capture_output=True, text=True, check=True, timeout=60).stdout.replace(".", "")))
        except (OSError, subprocess.SubprocessError):
            wanted = ""
        if not wanted:
            return [], "nvidia-smi showed no card at install; SPLATKIT_CUDA_ARCHS=90 (say) builds for one that is elsewhere", []
    archs = EVERY_CARD if wanted == "all" else wanted.replace(";", " ").replace(",", " ").split()
    if not archs or not all(re.fullmatch(r"\d+", a) for a in archs):
        return [], f"SPLATKIT_CUDA_ARCHS is {wanted!r}; expected compute capabilities without the point, as in '75;90', or 'all'", []
    archs = sorted(set(archs), key=int)
    gencode = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in archs] + [f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}"]
    try:
        version = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout.strip().rpartition("\n")[2]
    except (OSError, subprocess.SubprocessError) as why:
        return [], f"{nvcc} does not run: {why}", []
    return [nvcc], version, gencode


def build(folder):
    """Brings every library in `folder` up to date and writes build.json there."""
    folder.mkdir(parents=True, exist_ok=True)
    record, abi = folder / "build.json", f"-DSK_ABI={header_abi()}"
    try:
        before = json.loads(record.read_text())["libraries"]
    except (OSError, ValueError, KeyError):
        before = {}
    compiler, version = find_compiler()
    nvcc, cuda_version, gencode = find_cuda()
    # Per library: compiler, what it said, sources, flags to compile and to link with.
    plan = {name: (compiler, version, sources, [*COMPILE, abi, *flags], [*LINK, *flags]) for name, (sources, flags) in LIBRARIES.items()}
    plan["cuda"] = (nvcc, cuda_version, CUDA, [*NVCC, abi, *gencode], ["-shared", "-cudart", "static", *gencode])
    code = hashlib.sha256()
    for path in sorted(p for p in Path("cuda").rglob("*") if p.suffix in (".h", ".cpp", ".cu")):
        code.update(path.as_posix().encode() + b"\0" + path.read_bytes())
    stamps = {name: hashlib.sha256(repr((row, code.hexdigest())).encode()).hexdigest() for name, row in plan.items()}
    library = {name: folder / f"libsplatkit_{name}.so" for name in plan}
    never = "SPLATKIT_NATIVE=0 at install" if os.environ.get("SPLATKIT_NATIVE") == "0" else None
    reasons = {name: never or (None if row[0] else row[1]) for name, row in plan.items()}
    old = [n for n in plan if reasons[n] is None and not (library[n].exists() and before.get(n) == {"reason": None, "stamp": stamps[n]})]
    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = {n: [f"{scratch}/{n}-{Path(source).stem}.o" for source in plan[n][2]] for n in old}
        compiling = {n: [pool.submit(call, [*plan[n][0], *plan[n][3], "-c", source, "-o", object_]) for source, object_ in zip(plan[n][2], objects[n])] for n in old}
        for n in old:
            out = f"{library[n]}.new"       # renamed when whole: a process may be running the old one
            reasons[n] = next(filter(None, [job.result() for job in compiling[n]]), None)
            reasons[n] = reasons[n] or call([*plan[n][0], *plan[n][4], *objects[n], "-o", out])
            if reasons[n] is None:
                os.replace(out, library[n])
    for n, reason in reasons.items():
        if reason is not None:
            library[n].unlink(missing_ok=True)
        print(f"libsplatkit_{n}.so: {reason or 'ok'}")
    libraries = {n: {"reason": reasons[n], "stamp": stamps[n]} for n in plan}
    archs = sorted({int(a) for flag in gencode for a in re.findall(r"compute_(\d+)", flag)})
    record.write_text(json.dumps({"compiler": version, "libraries": libraries, "cuda_archs": archs}, indent=1))


class BuildNative(build_ext):
    """The build step of setuptools that `pip install`, editable or not, runs."""

    def folder(self):
        in_place = self.inplace or self.editable_mode
        return Path("splatkit/_native") if in_place else Path(self.build_lib, "splatkit/_native")

    def run(self):
        build(self.folder())

    def get_source_files(self):
        return [p.as_posix() for p in Path("cuda").rglob("*") if p.is_file()]

    def get_outputs(self):
        return [str(p) for p in self.folder().glob("*")]

    def get_output_mapping(self):
        return {}


class Wheel(bdist_wheel):
    """One wheel serves every Python: there is no Python ABI in it."""

    def get_tag(self):
        return "py3", "none", super().get_tag()[2]


setup(ext_modules=[Extension("splatkit._native", [])], cmdclass={"build_ext": BuildNative, "bdist_wheel": Wheel})
