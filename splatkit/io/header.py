"""SceneHeader as one line of JSON: what every scene format with room for text carries."""
from __future__ import annotations

import json
import math
from dataclasses import asdict

from ..header import SceneHeader

UNSAID = SceneHeader()      # what a file means that says nothing about how to draw it: the INRIA defaults


def to_json(header: SceneHeader) -> str:
    """One ASCII line of strict JSON. Infinite settings are written as the string "inf", for JSON has no infinity."""
    known = asdict(header)
    known["settings"] = {name: "inf" if value == math.inf else value for name, value in header.settings.items()}
    line = json.dumps(known, ensure_ascii=True, allow_nan=False)
    from_json(line)     # what cannot be read back must not be written
    return line


def from_json(line: str) -> SceneHeader:
    """The header; unknown keys are ignored, missing ones take their defaults. Raises ValueError saying which entry is wrong."""
    try:
        known = json.loads(line)
    except RecursionError as e:
        raise ValueError("JSON is nested too deeply") from e
    if not isinstance(known, dict):
        raise ValueError(f"expected a JSON object, not {type(known).__name__}")
    header = SceneHeader()
    settings = known.get("settings", {})
    if not isinstance(settings, dict):
        raise ValueError("settings: expected an object")
    up = known.get("up")
    if up is not None:
        if not isinstance(up, list) or len(up) != 3:
            raise ValueError(f"up: {up!r:.40}; expected three numbers")
        up = tuple(_number("up", x) for x in up)
    metric, source, step = (known.get(name, getattr(header, name)) for name in ("metric", "source", "step"))
    if not isinstance(metric, bool):
        raise ValueError(f"metric: {metric!r:.40}; expected true or false")
    if not isinstance(source, str):
        raise ValueError(f"source: {source!r:.40}; expected a text")
    if isinstance(step, bool) or not isinstance(step, int) or not 0 <= step < 2**63:
        raise ValueError(f"step: {step!r:.40}; expected a whole number >= 0")
    return SceneHeader({name: _setting(name, value) for name, value in settings.items()}, up, metric, source, step)


def _setting(name: str, value) -> float | bool:
    if isinstance(value, bool):
        return value
    return math.inf if value == "inf" else _number(name, value)


def _number(name: str, value) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e308:
        raise ValueError(f"{name}: {value!r:.40}; expected a finite number")
    return float(value)
