"""Configuration: a dataclass, laid over by files; wrong ones are refused by key."""
import dataclasses
from pathlib import Path
from typing import Literal

import pytest

from splatkit import config
from splatkit.distill.config import DataConfig, Distill
from splatkit.distill.probe_config import Probe
from splatkit.errors import BadConfig
from splatkit.lift.train_config import LiftTrain

REPO = Path(__file__).resolve().parent.parent


@dataclasses.dataclass(frozen=True)
class Inner:
    rate: float = 0.1


@dataclasses.dataclass(frozen=True)
class Config:
    folder: Path
    steps: int = 10
    size: tuple[int, int] = (3, 4)
    mode: Literal["fast", "slow"] = "fast"
    crop: float | None = None
    verbose: bool = False
    inner: Inner = dataclasses.field(default_factory=Inner)


def write(tmp_path, text) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize("value", [
    Config(Path("photos")), Config(Path("ü b"), 7, (1, 2), "slow", 1e-12, True, Inner(1e20)), Config(Path("no"), crop=float("inf"))])
def test_a_config_survives_the_way_to_yaml_and_back(value, tmp_path):
    config.save(value, tmp_path / "c.yaml")
    assert config.load_yaml(tmp_path / "c.yaml", Config) == value
    assert [p.name for p in tmp_path.iterdir()] == ["c.yaml"]


def test_the_reconstruct_config_survives_too(tmp_path):
    value = config.Reconstruct(Path("photos"), steps=5, background=(1.0, 0.5, 0.0), lr=config.LearningRates(means=1e-5))
    config.save(value, tmp_path / "c.yaml")
    assert config.load_yaml(tmp_path / "c.yaml", config.Reconstruct) == value


def test_a_file_is_laid_over_an_instance(tmp_path):
    base = Config(Path("a"), steps=5, inner=Inner(0.5))
    assert config.load_yaml(write(tmp_path, "crop: 1e-3\ninner: {}\n"), base) == dataclasses.replace(base, crop=1e-3)
    assert config.load_yaml(write(tmp_path, ""), base) == base


@pytest.mark.parametrize("text, message", [
    ("stepps: 3", r"stepps is not a known key \(did you mean steps\?\); known: folder, steps, size"),
    ("inner:\n  rat: 3", r"inner.rat is not a known key \(did you mean rate\?\); known: rate"),
    ("steps: many", r"steps is 'many' \(str\); expected int"),
    ("steps: 3.0", r"steps is '3.0' \(float\); expected int"),
    ("steps: true", r"steps is 'True' \(bool\); expected int"),
    ("inner: {rate: yes}", r"inner.rate is 'True' \(bool\); expected float"),
    ("inner: 3", r"inner is '3' \(int\); expected keys of Inner"),
    ("size: [1, 2, 3]", r"size is .* expected tuple\[int, int\]"),
    ("size: [1, x]", r"size is .* expected tuple\[int, int\]"),
    ("mode: medium", r"mode is 'medium' \(str\); expected Literal\['fast', 'slow'\]"),
    ("crop: wide", r"crop is 'wide' \(str\); expected float | None"),
    ("folder:", r"folder is empty; expected Path"),
    ("steps: 3", "folder is missing and has no default; expected Path"),
    ("- 1", r"expected lines like"),
    ("a: &x 1\nb: *x", "line 1: anchors and aliases are not allowed"),
    ("b: *x", "line 1: .*"),
    ("<<: {steps: 3}", "line 1: key '<<' is"),
    ("steps: 3\nsteps: 4", "line 2: key 'steps' is repeated"),
    ("steps: !!python/name:os.system x", "line 1: could not determine a constructor"),
    ("steps: [", "line 1"),
])
def test_a_wrong_config_is_refused_by_key(text, message, tmp_path):
    with pytest.raises(BadConfig, match=message) as caught:
        config.load_yaml(write(tmp_path, text), Config)
    assert str(caught.value).startswith(str(tmp_path / "config.yaml"))


def test_a_config_file_that_is_absent_or_no_text_is_refused(tmp_path):
    with pytest.raises(BadConfig, match="cannot be read: No such file"):
        config.load_yaml(tmp_path / "absent.yaml", Config)
    (tmp_path / "b.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(BadConfig, match="cannot be read"):
        config.load_yaml(tmp_path / "b.yaml", Config)


@pytest.mark.parametrize("field, value", [
    ("steps", 0), ("downscale", 0.5), ("downscale", float("nan")), ("hold_every", 1), ("background", (2.0, 0, 0))])
def test_a_value_out_of_range_is_refused_by_name(field, value):
    with pytest.raises(BadConfig, match=f"{field} is .*; expected"):
        config.Reconstruct(Path("x"), **{field: value})


@pytest.mark.parametrize("path", sorted((REPO / "configs").rglob("*.yaml")), ids=lambda p: f"{p.parent.name}-{p.stem}")
def test_every_preset_can_be_loaded(path):
    default = {"reconstruct": config.Reconstruct(Path("x")), "lift": LiftTrain(), "distill": Distill(data=DataConfig(rooms=1)), "probe": Probe()}[path.parent.name]
    assert type(config.load_yaml(config.preset(path.parent.name, path.stem), default)) is type(default)


def test_an_unknown_preset_lists_the_known_ones():
    with pytest.raises(BadConfig, match=r"preset 'quik' of reconstruct is not known \(did you mean quick\?\); known: .*quick"):
        config.preset("reconstruct", "quik")
