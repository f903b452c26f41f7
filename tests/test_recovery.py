"""A run that died, at any file operation or any moment, is resumed to the bits of the one that did not."""
import os

import pytest
from killing import tried

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")


def test_a_run_stopped_at_any_file_operation_of_a_save_resumes_to_the_same_bits(tmp_path, cpu_library):
    said = tried("operations", tmp_path, 0)
    assert said["operations"] > 30 and not said["differing"]


def test_a_run_killed_ten_times_resumes_to_the_same_bits_and_loses_at_most_a_save_interval(tmp_path, cpu_library):
    said = tried("kills", tmp_path, 10, 0)
    assert said["kills"] == said["resumes"] == 10 and not said["differing"]
    assert said["steps lost at most"] <= said["save_every"]
