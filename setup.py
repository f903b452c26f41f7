"""Builds the native libraries: plain shared objects with a C ABI that ctypes loads, so neither Python nor torch headers are needed.

A missing compiler or a failing compile never fails the install: splatkit/_native/build.json says per library why it is absent,
and `splatkit doctor` shows it. SPLATKIT_NATIVE=0 skips the build.
"""
import hashlib
import json
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

CPU = ["cuda/src/cpu_project.cpp", "cuda/src/cpu_blend.cpp", "cuda/src/cpu_blend_vjp.cpp", "cuda/src/cpu_features.cpp", "cuda/src/cpu_train.cpp",
       "cuda/src/cpu_threads.cpp", "cuda/src/cpu.cpp"]
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


def build(folder):
    """Brings every library in `folder` up to date and writes build.json there."""
    folder.mkdir(parents=True, exist_ok=True)
    record, abi = folder / "build.json", f"-DSK_ABI={header_abi()}"
    try:
        before = json.loads(record.read_text())["libraries"]
    except (OSError, ValueError, KeyError):
        before = {}
    compiler, version = find_compiler()
    skipped = "SPLATKIT_NATIVE=0 at install" if os.environ.get("SPLATKIT_NATIVE") == "0" else None if compiler else version
    inputs = hashlib.sha256(f"{compiler} {version}".encode())
    for path in sorted(p for p in Path("cuda").rglob("*") if p.suffix in (".h", ".cpp")):
        inputs.update(path.as_posix().encode() + b"\0" + path.read_bytes())
    stamps = {name: hashlib.sha256(repr((COMPILE, LINK, row, inputs.hexdigest())).encode()).hexdigest() for name, row in LIBRARIES.items()}
    library = {name: folder / f"libsplatkit_{name}.so" for name in LIBRARIES}
    old = [n for n in LIBRARIES if not (library[n].exists() and before.get(n) == {"reason": None, "stamp": stamps[n]})]
    reasons = dict.fromkeys(LIBRARIES, skipped)
    if not skipped and old:
        with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = {n: [f"{scratch}/{n}-{Path(source).stem}.o" for source in LIBRARIES[n][0]] for n in old}
            compiling = {n: [pool.submit(call, [*compiler, *COMPILE, abi, *LIBRARIES[n][1], "-c", source, "-o", object_])
                             for source, object_ in zip(LIBRARIES[n][0], objects[n])] for n in old}
            for n in old:
                out = f"{library[n]}.new"       # renamed when whole: a process may be running the old one
                reasons[n] = next(filter(None, [job.result() for job in compiling[n]]), None)
                reasons[n] = reasons[n] or call([*compiler, *LINK, *LIBRARIES[n][1], *objects[n], "-o", out])
                if reasons[n] is None:
                    os.replace(out, library[n])
    for n, reason in reasons.items():
        if reason is not None:
            library[n].unlink(missing_ok=True)
        print(f"libsplatkit_{n}.so: {reason or 'ok'}")
    libraries = {n: {"reason": reasons[n], "stamp": stamps[n]} for n in LIBRARIES}
    record.write_text(json.dumps({"compiler": version, "libraries": libraries}, indent=1))


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
