"""Damaged input files: every reader gives a result of finite values or its one error, soon, and without asking for much memory."""
import pytest
from fuzzing import READERS, fuzz


@pytest.mark.parametrize("name", READERS)
def test_2000_mutants_end_in_a_good_result_or_the_reader_s_error(tmp_path, name):
    verdict = fuzz(name, 2000, 0, tmp_path)
    assert not verdict.wrong, "\n".join(verdict.wrong[:20])
    assert verdict.refused > 200 and verdict.taken + verdict.refused == 2000
