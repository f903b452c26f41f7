"""Checkpoints of the lifting network: the published layout, our own file, and everything that is wrong with one."""
import functools
import hashlib
import importlib.util
import json
import os

import pytest
import safetensors.torch
import torch
from lifting import SMALL

from splatkit.errors import BadFile
from splatkit.lift import weights
from splatkit.lift.model import MVSplat
from splatkit.lift.weights import load_weights, save_weights

pytestmark = pytest.mark.usefixtures("one_thread")

load = functools.partial(load_weights, config=SMALL)


@pytest.fixture
def as_published():
    """A small network stands for the published one, so that its checkpoints are small."""
    torch.manual_seed(0)
    return MVSplat(SMALL)


def lightning(model, **changes):
    """A checkpoint as Lightning lays it out."""
    state = {f"encoder.{key}": x.detach() for key, x in model.state_dict().items()}
    return {"epoch": 3, "global_step": 300_000, "pytorch-lightning_version": "2.1.2", "state_dict": {**state, **changes}, "loops": {"fit_loop": {}},
            "optimizer_states": [{"state": {0: {"step": torch.tensor(5.0)}}, "param_groups": [{"lr": 2e-4, "betas": (0.9, 0.999)}]}], "lr_schedulers": []}


def same(a, b, tolerance=0.0):
    b = b.state_dict()
    return all(torch.allclose(x, b[key], rtol=0, atol=tolerance) for key, x in a.state_dict().items())


def test_a_published_checkpoint_of_full_size_loads_unchanged(tmp_path, data_dir):
    folder = data_dir.parent / "mvsplat"
    if not folder.is_dir():
        pytest.skip(f"no equality data: {folder} is absent")
    spec = importlib.util.spec_from_file_location("fill_rule", folder / "fill_rule.py")
    rule = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(rule)
    lines = [line.split("\t") for line in (folder / "state_dict_keys.txt").read_text().splitlines() if "\t" in line]
    state = {f"encoder.{key}": torch.from_numpy(rule.fill(key, tuple(map(int, shape.split("x"))), 0)) for key, shape, *_ in lines}
    torch.save({"state_dict": state, "global_step": 1}, tmp_path / "re10k.ckpt")
    model, found = load_weights(tmp_path / "re10k.ckpt")
    assert found.parameters == 11_955_734 and len(model.state_dict()) == 471
    assert all(torch.equal(x, state[f"encoder.{key}"]) for key, x in model.state_dict().items())
    assert found.sha256 == hashlib.sha256((tmp_path / "re10k.ckpt").read_bytes()).hexdigest() and found.sha256 in str(found)


def test_a_training_run_s_other_parts_are_left_out(tmp_path, as_published):
    torch.save(lightning(as_published, **{"losses.0.scale": torch.ones(3), "decoder.background": torch.zeros(3)}), tmp_path / "a.ckpt")
    assert same(as_published, load(tmp_path / "a.ckpt")[0])


def test_a_bare_state_is_taken_too(tmp_path, as_published):
    torch.save(as_published.state_dict(), tmp_path / "a.pth")
    model, _ = load(tmp_path / "a.pth")
    assert same(as_published, model) and all(p.requires_grad and p.is_leaf for p in model.parameters())


@pytest.mark.parametrize("half", [True, False])
def test_our_own_file_brings_its_configuration_along(tmp_path, half):
    torch.manual_seed(0)
    model = MVSplat(SMALL)
    save_weights(tmp_path / "a.safetensors", model, half)
    found, _ = load(tmp_path / "a.safetensors")
    assert found.config == SMALL and same(model, found, 1e-3 if half else 0.0)
    assert (tmp_path / "a.safetensors").stat().st_size < sum(x.numel() for x in model.parameters()) * (2 if half else 4) + 100_000


def test_weights_that_half_precision_cannot_hold_are_not_written(tmp_path):
    model = MVSplat(SMALL)
    model.depth_predictor.proj_feature.bias.data[0] = 1e6
    with pytest.raises(ValueError, match=r"proj_feature\.bias"):
        save_weights(tmp_path / "a.safetensors", model)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("harm, said", [
    (lambda s: s.pop("encoder.backbone.backbone.conv1.weight"), r"backbone\.backbone\.conv1\.weight: is missing; expected"),
    (lambda s: [s.pop(key) for key in list(s) if "transformer" in key], r"layers\.0\.self_attn\.q_proj\.weight: is missing, and \d+ more"),
    (lambda s: s.update({"encoder.epipolar.weight": torch.zeros(1)}), r"epipolar\.weight.: is no weight of MVSplat"),
    (lambda s: s.update({"encoder.depth_predictor.proj_feature.bias": torch.zeros(7)}), r"proj_feature\.bias: is \[7\]; expected \[8\]"),
    (lambda s: s["encoder.depth_predictor.proj_feature.bias"].fill_(torch.nan), r"proj_feature\.bias: holds a NaN"),
    (lambda s: s.update({"encoder.depth_predictor.proj_feature.bias": torch.zeros(8, dtype=torch.int64)}), r"proj_feature\.bias: is torch.int64"),
    (lambda s: s.clear(), "state_dict: expected names"),
], ids=["missing", "many missing", "unknown", "shape", "nan", "dtype", "empty"])
def test_a_checkpoint_that_does_not_fit_names_the_weight(tmp_path, as_published, harm, said):
    top = lightning(as_published)
    top["state_dict"] = {key: x.clone() for key, x in top["state_dict"].items()}
    harm(top["state_dict"])
    torch.save(top, tmp_path / "a.ckpt")
    with pytest.raises(BadFile, match=said):
        load(tmp_path / "a.ckpt")


class Marker:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("place", ["top", "state"])
def test_a_file_that_would_run_something_runs_nothing(tmp_path, as_published, place):
    marker = tmp_path / "marker"
    top = lightning(as_published)
    (top if place == "top" else top["state_dict"])["encoder.x"] = Marker(str(marker))
    torch.save(top, tmp_path / "a.ckpt")
    with pytest.raises(BadFile, match="mkdir.*only tensors and plain values"):
        load(tmp_path / "a.ckpt")
    assert not marker.exists()
    torch.load(tmp_path / "a.ckpt", weights_only=False)     # and it would have
    assert marker.exists()


def test_another_checksum_stops_before_anything_is_read(tmp_path, as_published, monkeypatch):
    torch.save(lightning(as_published), tmp_path / "a.ckpt")
    right = hashlib.sha256((tmp_path / "a.ckpt").read_bytes()).hexdigest()
    assert same(as_published, load(tmp_path / "a.ckpt", right.upper())[0])
    monkeypatch.setattr(torch, "load", lambda *a, **k: pytest.fail("it was read"))
    with pytest.raises(BadFile, match=f"its sha256 is {right}; expected 00"):
        load(tmp_path / "a.ckpt", "00")


@pytest.mark.parametrize("content", [b"", b"PK\3\4", b"\x80\2}q\0.", b"hello"], ids=["empty", "zip", "pickle", "text"])
@pytest.mark.parametrize("name", ["a.ckpt", "a.safetensors"])
def test_what_is_no_checkpoint_is_refused(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(BadFile, match=f"{name}: "):
        load(tmp_path / name)


@pytest.mark.parametrize("text, said", [("[]", "not a known key"), ('{"blocks": 1e9}', "blocks"), ('{"blocks": 100000}', "1 to 64"), ('{"width": 3}', "width is not a known key"), ("x", "no file of lifting")])
def test_a_configuration_in_a_file_is_not_believed(tmp_path, text, said):
    (tmp_path / "a.safetensors").write_bytes(safetensors.torch.save({"a": torch.zeros(1)}, {"splatkit_lift": text}))
    with pytest.raises(BadFile, match=said):
        load(tmp_path / "a.safetensors")


def test_safetensors_of_something_else_are_refused(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(safetensors.torch.save({"a": torch.zeros(1)}, {"format": "pt"}))
    with pytest.raises(BadFile, match="no file of lifting weights"):
        load(tmp_path / "a.safetensors")
    (tmp_path / "b.safetensors").write_bytes(safetensors.torch.save({"a": torch.zeros(1)}, {"splatkit_lift": json.dumps({})}))
    with pytest.raises(BadFile, match=r"conv1\.weight: is missing"):
        load(tmp_path / "b.safetensors")


def test_names_without_a_file_say_where_to_get_one(monkeypatch, tmp_path):
    monkeypatch.setitem(weights.PACKAGED, "tiny", tmp_path / "tiny.safetensors")
    for name, said in (("tiny", "do not come with this version"), ("re10k", "give --weights PATH/re10k.ckpt"), ("hf:nonsense", "expected hf:OWNER"), ("nowhere.ckpt", "no such file")):
        with pytest.raises(BadFile, match=said):
            load_weights(name)


def test_a_file_of_the_hub_comes_from_its_cache_or_the_network_or_says_that_there_is_none(tmp_path, as_published, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    torch.save(lightning(as_published), tmp_path / "a.ckpt")
    asked = []
    def download(repository, name, local_files_only=False, **_):
        asked.append((repository, name, local_files_only))
        if local_files_only:
            raise FileNotFoundError("not in the cache")
        if name == "there/a.ckpt":
            return str(tmp_path / "a.ckpt")
        raise ConnectionError("no\nnetwork")
    monkeypatch.setattr(hub, "hf_hub_download", download)
    assert same(as_published, load("hf:someone/mvsplat/there/a.ckpt")[0])
    assert asked == [("someone/mvsplat", "there/a.ckpt", True), ("someone/mvsplat", "there/a.ckpt", False)]
    with pytest.raises(BadFile, match="cannot be downloaded .ConnectionError: no network.; without a network, give the path"):
        load("hf:someone/mvsplat/gone.ckpt")


def test_without_the_hub_s_client_a_line_says_so(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
    with pytest.raises(BadFile, match="pip install huggingface_hub"):
        load("hf:someone/mvsplat/a.ckpt")
