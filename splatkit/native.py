"""Loads the native libraries and parses splatkit.h: the one room that knows ctypes.

`cpu_library(torch.float32).sk_adam(n, columns, param, ...)` takes Python numbers, torch tensors where the header has pointers, and
None for NULL, by place or by the header's names. The caller owns all memory; the GIL is released during a call. `library.room(...)`
makes the scratch and stream that entries end with.
"""
from __future__ import annotations

import ctypes
import functools
import hashlib
import json
import operator
import os
import platform
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .errors import BackendUnavailable

HERE = Path(__file__).parent
X86 = platform.machine().lower() in ("x86_64", "amd64")
ISAS = ("v4", "v3", "v2") if X86 else ("base",)     # best first
NAMES = (*(f"cpu_{isa}" for isa in ISAS), "cpu_f64", "cuda")

_NUMBER = {"int32_t": ctypes.c_int32, "int64_t": ctypes.c_int64, "double": ctypes.c_double, "void": None}
_LIMIT = {"int32_t": 2 ** 31, "int64_t": 2 ** 63}      # ctypes would wrap around silently
_POINTEE = {"int32_t": torch.int32, "int64_t": torch.int64, "double": torch.float64}


@dataclass(frozen=True)
class Parameter:
    """One parameter of an entry, as splatkit.h spells it without const."""

    name: str
    type: str           # int32_t, int64_t, double, real, void
    pointer: bool


@dataclass(frozen=True)
class Entry:
    """One prototype of splatkit.h."""

    name: str
    returns: str        # int32_t, int64_t, double, text
    parameters: tuple[Parameter, ...]

    @property
    def has_status(self) -> bool:
        """Whether the result is SK_OK, SK_MORE or SK_ERROR. An entry without parameters returns a plain value."""
        return self.returns == "int32_t" and bool(self.parameters)

    @property
    def computes(self) -> bool:
        """Whether the entry runs on the thread pool: those that take a stream."""
        return any(p.name == "stream" for p in self.parameters)


def parse_header(text: str) -> tuple[dict[str, Entry], dict[str, int]]:
    """The entries and the enum constants of splatkit.h; ValueError with the line number where a line leaves its grammar."""
    entries, constants = {}, {}
    for number, line in enumerate(text.splitlines(), 1):
        if enum := re.fullmatch(r"enum \{ (.*) \};", line.strip()):
            constants |= {name: int(value) for name, value in (item.split(" = ") for item in enum[1].split(", "))}
        if not line.startswith("SK_API "):
            continue
        prototype = re.fullmatch(r"SK_API (int32_t|int64_t|double|const char\*) (sk_\w+)\((.*)\);", line.strip())
        words = prototype and [re.fullmatch(r"(?:const )?(int32_t|int64_t|double|real|void)(\*?) (\w+)", p)
                               for p in prototype[3].split(", ") if p != "void"]
        if not prototype or None in words:
            raise ValueError(f"splatkit.h line {number} is no prototype of its grammar: {line[:120]}")
        parameters = tuple(Parameter(name, type_, bool(star)) for type_, star, name in (w.groups() for w in words))
        entries[prototype[2]] = Entry(prototype[2], "text" if "char" in prototype[1] else prototype[1], parameters)
    return entries, constants


def header_abi(header: bytes) -> int:
    """What sk_abi() of a library built from `header` returns (setup.py computes the same)."""
    return int.from_bytes(hashlib.sha256(header).digest()[:8], "big") >> 1


_HEADER = (HERE / "include" / "splatkit.h").read_bytes()
ABI = header_abi(_HEADER)
ENTRIES, CONST = parse_header(_HEADER.decode())


# What kernels read and write four numbers at a time.
_BY_FOUR = {"quats", "sh", "splats", "v_splats", "features", "features_out", "v_features_out", "param", "grad", "m", "v", "m_sh", "v_sh", "v_quats", "map"}
# What torch's own compiled code calls: torch.cuda.current_stream() makes an object first, 35 us a call.
_raw_stream = getattr(torch._C, "_cuda_getCurrentRawStream", None) or (lambda device: torch.cuda.current_stream(device).cuda_stream)


class Library:
    """One loaded library. Every entry of splatkit.h is a method of the same name.

    An entry with a status returns SK_OK or SK_MORE and raises RuntimeError with the library's text on SK_ERROR. Tensors must have the
    pointer's dtype (`real` is the library's), be contiguous and on `device` ("cpu" or "cuda"; `settings` always on the CPU): TypeError
    or ValueError names entry and parameter.
    """

    device = "cpu"

    def __init__(self, path: Path, real: torch.dtype, device: str = "cpu"):
        self.path, self.real, self.device = path, real, device
        self._dll = ctypes.CDLL(str(path))
        self._threads = 1
        abi = self._function(ENTRIES["sk_abi"])()
        if abi != ABI:
            raise BackendUnavailable(f"{path.name} was built from another splatkit.h ({abi}; the package has {ABI}); reinstall splatkit")
        for entry in ENTRIES.values():
            setattr(self, entry.name, self._method(entry))

    def _function(self, entry: Entry):
        function = getattr(self._dll, entry.name)
        function.restype = ctypes.c_char_p if entry.returns == "text" else _NUMBER[entry.returns]
        function.argtypes = [ctypes.c_void_p if p.pointer else _NUMBER.get(p.type, ctypes.c_double) for p in entry.parameters]
        return function

    def _method(self, entry: Entry):
        function, names = self._function(entry), [p.name for p in entry.parameters]
        # What is checked: integers against their type's limit, tensors' dtype and device. The rest (double, stream) ctypes checks.
        pointees, on = {**_POINTEE, "real": self.real}, operator.attrgetter(f"is_{self.device}")
        integers = [(i, _LIMIT[p.type]) for i, p in enumerate(entry.parameters) if not p.pointer and p.type in _LIMIT]
        pointers = [(i, pointees[p.type], operator.attrgetter("is_cpu") if p.name == "settings" else on) for i, p in enumerate(entry.parameters)
                    if p.pointer and p.type in pointees]
        has_status, computes, error = entry.has_status, entry.computes, CONST["SK_ERROR"]
        on_card = self.device == "cuda"
        aligned = {i for i, p in enumerate(entry.parameters) if on_card and p.name in _BY_FOUR}

        def call(*args, **named):
            if named:
                args = args + tuple(named.pop(name) for name in names[len(args):] if name in named)
            if len(args) != len(names) or named:
                raise TypeError(f"{entry.name}: got {len(args)} arguments, unknown {list(named)}; expected {', '.join(names)}")
            values = list(args)
            for i, limit in integers:
                if not (isinstance(args[i], int) and -limit <= args[i] < limit):
                    raise TypeError(f"{entry.name}: {names[i]} is {args[i]!r:.60}; expected an int within {limit.bit_length()} bits")
            for i, dtype, in_place in pointers:
                if (x := args[i]) is not None:
                    if not (isinstance(x, Tensor) and x.dtype is dtype and in_place(x) and x.is_contiguous()):
                        raise _refusal(f"{entry.name}: {names[i]}", x, dtype, in_place(x) if isinstance(x, Tensor) else True, self.device)
                    values[i] = x.data_ptr()
                    if i in aligned and values[i] % 16:
                        raise ValueError(f"{entry.name}: {names[i]} does not start at a multiple of 16 bytes, as a slice of another tensor may; pass .clone()")
            if on_card and (x := next((args[i] for i, *_ in pointers if args[i] is not None and args[i].is_cuda), None)) is not None:
                if x.get_device() != torch.cuda.current_device():
                    raise ValueError(f"{entry.name}: tensors are on cuda:{x.get_device()}, the current device is cuda:{torch.cuda.current_device()}; "
                                     "work inside `with torch.cuda.device(...)`")
            if computes and torch.get_num_threads() != self._threads:
                self._size_pool()
            try:
                result = function(*values)
            except ctypes.ArgumentError as wrong:
                raise TypeError(f"{entry.name}({', '.join(names)}): {wrong}") from None
            if has_status and result == error:
                raise RuntimeError(f"{entry.name}: {self.sk_last_error()}")
            return result.decode(errors="replace") if entry.returns == "text" else result

        call.__name__ = entry.name
        return call

    def room(self, entry: str, n: int = 0, cameras: int = 1, width: int = 1, height: int = 1, channels: int = 0, capacity: int = 0) -> tuple:
        """The arguments that SK_FOR_<entry> ends with: scratch, its words, stream. A CPU library needs none.

        Raises RuntimeError where the sizes are beyond the library's, as sk_last_error() says.
        """
        words = self._words(CONST[f"SK_FOR_{entry}"], n, cameras, width, height, channels, capacity)
        if words < 0:
            raise RuntimeError(self.sk_last_error())
        return torch.empty(words, dtype=torch.int64, device=self.device) if words else None, words, self.stream

    @functools.lru_cache(maxsize=256)
    def _words(self, *sizes: int) -> int:
        return self.sk_scratch(*sizes)

    @property
    def stream(self) -> int | None:
        """torch's current CUDA stream, None for a CPU library."""
        return _raw_stream(torch.cuda.current_device()) if self.device == "cuda" else None

    def _size_pool(self) -> None:
        threads = torch.get_num_threads()
        self.sk_set_threads(min(threads, 256))
        self._threads = threads


def cpu_library(dtype: torch.dtype, isa: str | None = None) -> Library:
    """The CPU library whose `real` is `dtype`; for float32 the one of instruction set `isa`, by default cpu_isa().

    Raises BackendUnavailable that says why there is none and what to do.
    """
    if dtype is torch.float64:
        return _load("cpu_f64")
    if dtype is not torch.float32:
        raise TypeError(f"native libraries exist for float32 and float64, not for {dtype}; convert with scene.to(dtype=torch.float32)")
    isa = isa or cpu_isa()
    if isa not in ISAS:
        raise ValueError(f"instruction set {isa!r} (argument or SPLATKIT_ISA); expected one of {', '.join(ISAS)}")
    return _load(f"cpu_{isa}")


def cuda_library(dtype: torch.dtype = torch.float32) -> Library:
    """The CUDA library, which works in float32. Raises BackendUnavailable that says why there is none and what to do."""
    if dtype is not torch.float32:
        raise TypeError(f"the CUDA library works in float32, not in {dtype}; convert with scene.to(dtype=torch.float32)")
    return _load("cuda")


def library_of(x: Tensor) -> Library:
    """The library of x's device and dtype. Raises BackendUnavailable where there is none, TypeError for another dtype."""
    return cuda_library(x.dtype) if x.is_cuda else cpu_library(x.dtype)


def constant_when_traced(function):
    """torch.compiler.assume_constant_result, by the mark that it leaves, without importing the compiler: that takes as long as torch itself.

    For answers that do not change within a process, where tracing must not look into files.
    """
    function._dynamo_marked_constant = True
    return function


@constant_when_traced
def library_for(x: Tensor) -> Library | None:
    """The library that works on tensors like x, or None where torch has to do: no library, or another device or dtype."""
    try:
        return library_of(x) if x.device.type in ("cpu", "cuda") else None
    except BackendUnavailable:
        return None
    except TypeError:
        if x.is_cuda:       # double on a card
            return None
        raise


def cpu_isa() -> str:
    """The instruction set of the float32 library in use: v2, v3, v4 (x86-64 levels) or base. SPLATKIT_ISA forces one, else the best."""
    return os.environ.get("SPLATKIT_ISA") or _best_isa()


def available() -> dict[str, str | None]:
    """Every native library of this platform by name, with None where it runs here, else the reason why not."""
    return {name: _reason(name) for name in NAMES}


def cpu_level() -> int | None:
    """The x86-64 level that this processor runs (2, 3, 4; 0 elsewhere), None when there is no library to ask."""
    try:
        return _open(f"cpu_{ISAS[-1]}").sk_cpu_level()
    except BackendUnavailable:
        return None


@functools.cache
def _best_isa() -> str:
    return next((isa for isa in ISAS if _reason(f"cpu_{isa}") is None), ISAS[-1])


@functools.cache
def _reason(name: str) -> str | None:
    try:
        _load(name)
    except BackendUnavailable as why:
        return str(why)
    return None


@functools.cache
def _load(name: str) -> Library:
    if X86 and name in ("cpu_v4", "cpu_v3") and (level := cpu_level()) is not None and level < int(name[-1]):
        raise BackendUnavailable(f"{name}: this processor runs x86-64-v{level} at most; unset SPLATKIT_ISA or name a lower one")
    if name == "cuda" and (why := _no_card()):
        raise BackendUnavailable(f"cuda: {why}")
    return _open(name)


def _no_card() -> str | None:
    """Why no kernel can run here."""
    if torch.version.cuda is None:
        return "this torch was built without CUDA; install a CUDA build of torch"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device: no card, no driver, or a driver too old for this torch"
    try:
        major, minor = torch.cuda.get_device_capability()
    except RuntimeError as why:
        return f"the card does not answer: {str(why).splitlines()[0]}"
    archs, card = _built_for(), 10 * major + minor
    if archs and not any(a // 10 == major and a <= card for a in archs) and max(archs) > card:     # code of the same generation, or code to compile for later ones
        return (f"the library was built for compute capabilities {', '.join(f'{a // 10}.{a % 10}' for a in archs)}, {torch.cuda.get_device_name()} has {major}.{minor}; "
                f"install again here, or with SPLATKIT_CUDA_ARCHS={card}")
    return None


def _built_for() -> list[int]:
    """Compute capabilities, times ten, that setup.py built the CUDA library for; empty where that is not known."""
    try:
        return json.loads((HERE / "_native" / "build.json").read_text()).get("cuda_archs", [])
    except (OSError, ValueError):
        return []


@functools.cache
def _open(name: str) -> Library:
    path = HERE / "_native" / f"libsplatkit_{name}.so"
    if not path.exists():
        raise BackendUnavailable(f"{name}: {_build_record(name)}; when that is mended, install splatkit again")
    try:
        library = Library(path, torch.float64 if name.endswith("f64") else torch.float32, "cuda" if name == "cuda" else "cpu")
        if name == "cuda":
            library.room("PROJECT", 1)      # asks the card for the first time
    except (OSError, AttributeError) as why:    # built for another system, or an entry is missing
        raise BackendUnavailable(f"{name}: {path.name} does not load: {why}; install splatkit again") from why
    except RuntimeError as why:
        raise BackendUnavailable(f"{name}: the card cannot be used: {str(why).splitlines()[0]}; is it full, or its driver older than CUDA {torch.version.cuda}?") from why
    return library


def _build_record(name: str) -> str:
    """Why setup.py left the library out."""
    try:
        record = json.loads((HERE / "_native" / "build.json").read_text())
        return record["libraries"][name]["reason"] or "it was built, but the file is gone"
    except (OSError, ValueError, KeyError):
        return "it was never built (no splatkit/_native/build.json)"


def _refusal(what: str, x, dtype: torch.dtype, in_place: bool, device: str) -> Exception:
    """The error for an argument that is not the tensor that its pointer needs."""
    if not isinstance(x, Tensor):
        return TypeError(f"{what} is {type(x).__name__}; expected a {dtype} tensor or None")
    if x.dtype is not dtype:
        return TypeError(f"{what} is {x.dtype}; expected {dtype}")
    if not in_place:
        return ValueError(f"{what} is on {x.device}; expected {'the CPU' if device == 'cpu' else 'a CUDA device'}")
    return ValueError(f"{what} {tuple(x.shape)} is not contiguous (strides {x.stride()}); pass .contiguous()")
