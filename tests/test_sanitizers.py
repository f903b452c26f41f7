"""Degenerate scenes through the CPU library under the address and undefined-behaviour sanitizers (tests/sanitized/scenes.cpp)."""
import pytest
from sanitized.build import COUNT, build, draw


@pytest.mark.parametrize("real", ["float", "double"])
def test_degenerate_scenes_index_no_foreign_memory_and_finite_ones_stay_finite(tmp_path, real):
    assert draw(build(tmp_path, real), 0, COUNT).endswith(f" named and {COUNT} random scenes, 0 broken\n")
