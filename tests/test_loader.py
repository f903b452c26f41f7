"""splatkit.h's grammar, and the loader of the native libraries."""
import json
from pathlib import Path

import pytest
import torch

from splatkit import native
from splatkit.errors import BackendUnavailable

REPO = Path(__file__).resolve().parent.parent


def test_every_prototype_of_the_header_is_parsed():
    text = (REPO / "cuda/include/splatkit.h").read_text()
    assert len(native.ENTRIES) == sum(line.startswith("SK_API ") for line in text.splitlines())
    assert all(f" {name}(" in text for name in native.ENTRIES)
    adam = native.ENTRIES["sk_adam"]
    assert [(p.name, p.type, p.pointer) for p in adam.parameters[1:3]] == [("columns", "int32_t", False), ("param", "real", True)]
    assert adam.has_status and adam.computes and not native.ENTRIES["sk_cpu_level"].has_status


def test_constants_come_from_the_header():
    assert (native.CONST["SK_OK"], native.CONST["SK_MORE"], native.CONST["SK_ERROR"], native.CONST["SK_SPLAT"]) == (0, 1, 2, 12)


@pytest.mark.parametrize("line", ["SK_API int32_t sk_new(float* x);", "SK_API int32_t sk_new(int64_t n,", "SK_API void sk_new(void);"])
def test_a_line_outside_the_grammar_is_named(line):
    with pytest.raises(ValueError, match="line 2 is no prototype"):
        native.parse_header("\n" + line)


def test_a_tensor_of_the_wrong_dtype_is_refused_by_entry_and_argument(cpu_library):
    x, copies = torch.zeros(3), torch.ones(3, dtype=torch.int32)
    with pytest.raises(TypeError, match="sk_relocate: logit_opacities is torch.float64; expected torch.float32"):
        cpu_library.sk_relocate(3, x.double(), torch.zeros(3, 3), copies, None)
    with pytest.raises(TypeError, match="sk_relocate: copies is torch.int64; expected torch.int32"):
        cpu_library.sk_relocate(3, x, torch.zeros(3, 3), copies.long(), None)


def test_a_strided_tensor_is_refused(cpu_library):
    with pytest.raises(ValueError, match=r"sk_relocate: log_scales \(3, 3\) is not contiguous"):
        cpu_library.sk_relocate(3, torch.zeros(3), torch.zeros(3, 6)[:, ::2], torch.ones(3, dtype=torch.int32), None)


def test_a_tensor_on_another_device_is_refused(cpu_library):
    with pytest.raises(ValueError, match="sk_relocate: log_scales is on meta; expected the CPU"):
        cpu_library.sk_relocate(3, torch.zeros(3), torch.zeros(3, 3, device="meta"), torch.ones(3, dtype=torch.int32), None)


def test_an_integer_that_does_not_fit_is_refused_rather_than_wrapped(cpu_library):
    with pytest.raises(TypeError, match="threads is 4294967297; expected an int within 32 bits"):
        cpu_library.sk_set_threads(2 ** 32 + 1)


def test_arguments_may_be_named_and_must_be_complete(cpu_library):
    assert cpu_library.sk_set_threads(threads=torch.get_num_threads()) == native.CONST["SK_OK"]
    with pytest.raises(TypeError, match="sk_set_threads: got 0 arguments.*expected threads"):
        cpu_library.sk_set_threads()
    with pytest.raises(TypeError, match="unknown .'fibres'"):
        cpu_library.sk_set_threads(1, fibres=2)


def test_an_error_in_the_library_carries_its_text(monkeypatch):
    failing = object.__new__(native.Library)
    failing.real, failing.sk_last_error = torch.float32, lambda: "out of memory"
    monkeypatch.setattr(native.Library, "_function", lambda self, entry: lambda *values: native.CONST["SK_ERROR"])
    with pytest.raises(RuntimeError, match="sk_set_threads: out of memory"):
        failing._method(native.ENTRIES["sk_set_threads"])(1)
    assert failing._method(native.ENTRIES["sk_cpu_level"])() == 2      # a level, no status


def test_each_dtype_has_its_library(cpu_library):
    assert native.cpu_library(torch.float64).real is torch.float64 and cpu_library.real is torch.float32
    with pytest.raises(TypeError, match="float32 and float64, not for torch.float16"):
        native.cpu_library(torch.float16)


def test_an_instruction_set_can_be_forced(cpu_library, monkeypatch):
    lowest = native.ISAS[-1]
    monkeypatch.setenv("SPLATKIT_ISA", lowest)
    assert native.cpu_isa() == lowest and native.cpu_library(torch.float32).path.name == f"libsplatkit_cpu_{lowest}.so"
    monkeypatch.setenv("SPLATKIT_ISA", "v9")
    with pytest.raises(ValueError, match=f"'v9'.*expected one of .*{lowest}"):
        native.cpu_library(torch.float32)


@pytest.mark.skipif(not native.X86, reason="x86-64 levels")
def test_an_instruction_set_that_the_processor_lacks_is_refused(monkeypatch):
    monkeypatch.setattr(native, "cpu_level", lambda: 2)
    with pytest.raises(BackendUnavailable, match="cpu_v4: this processor runs x86-64-v2 at most"):
        native._load.__wrapped__("cpu_v4")


def test_a_library_built_from_another_header_says_reinstall(cpu_library, monkeypatch):
    monkeypatch.setattr(native, "ABI", native.ABI ^ 1)
    with pytest.raises(BackendUnavailable, match="built from another splatkit.h.*reinstall"):
        native.Library(cpu_library.path, torch.float32)


def test_a_missing_library_says_why_and_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(native, "HERE", tmp_path)
    with pytest.raises(BackendUnavailable, match="cpu_f64: it was never built.*install splatkit again"):
        native._open.__wrapped__("cpu_f64")
    (tmp_path / "_native").mkdir()
    (tmp_path / "_native" / "build.json").write_text(json.dumps({"libraries": {"cpu_f64": {"reason": "no C++ compiler"}}}))
    with pytest.raises(BackendUnavailable, match="cpu_f64: no C.. compiler"):
        native._open.__wrapped__("cpu_f64")


def test_the_pool_follows_torch_threads(cpu_library, monkeypatch):
    asked = []
    monkeypatch.setattr(cpu_library, "sk_set_threads", asked.append)
    monkeypatch.setattr(cpu_library, "_threads", -1)
    relocate_nothing = lambda: cpu_library.sk_relocate(0, torch.zeros(0), torch.zeros(0, 3), torch.zeros(0, dtype=torch.int32), None)
    relocate_nothing()
    relocate_nothing()
    assert asked == [torch.get_num_threads()]


# ---- the CUDA library, without a card


@pytest.fixture
def a_card(monkeypatch):
    """torch as if there were a card of compute capability 8.6."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    for name, value in (("is_available", True), ("get_device_capability", (8, 6)), ("get_device_name", "Some Card")):
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)


def test_without_cuda_in_torch_or_a_card_the_reason_says_which(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "install a CUDA build of torch" in native._no_card()
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no card, no driver, or a driver too old" in native._no_card()


@pytest.mark.parametrize("archs, fits", [([75, 90], False), ([90, 100], False), ([80], True), ([86, 90], True), ([75], True), ([], True)])
def test_a_library_for_other_cards_says_how_to_build_for_this_one(a_card, monkeypatch, archs, fits):
    """Code runs on later cards of its generation; code for the newest named is there to be compiled for later generations."""
    monkeypatch.setattr(native, "_built_for", lambda: archs)
    assert (native._no_card() is None) == fits
    if not fits:
        assert "Some Card has 8.6; install again here, or with SPLATKIT_CUDA_ARCHS=86" in native._no_card()


def test_a_cuda_scene_never_falls_back_and_double_on_a_card_is_refused():
    with pytest.raises(TypeError, match="works in float32, not in torch.float64"):
        native.cuda_library(torch.float64)
    if not torch.cuda.is_available():
        from backends import camera, gaussians
        from splatkit import raster
        with pytest.raises(BackendUnavailable, match="^cuda: .*available here: "):
            raster.render(gaussians([0, 0, 1], dtype=torch.float32), camera(dtype=torch.float32), backend="cuda")
