"""Damaged input files: every reader gives a result of finite values or its one error, soon, and without asking for much memory."""
import faulthandler
import os
import re
import signal
import time

import fuzzing
import numpy as np
import pytest
from fuzzing import READERS, Reader, fuzz


@pytest.mark.parametrize("name", READERS)
def test_mutants_end_in_a_good_result_or_the_reader_s_error(tmp_path, name):
    count = READERS[name].mutants
    verdict = fuzz(name, count, 0, tmp_path)
    assert not verdict.wrong, "\n".join(verdict.wrong[:20])
    assert verdict.refused > count // 10 and verdict.taken + verdict.refused == count


@pytest.mark.parametrize("harm, seen", [
    (lambda: (faulthandler.disable(), os.kill(os.getpid(), signal.SIGSEGV)), "the process ended with -11"), (lambda: time.sleep(60), "the reader hangs"),
    (lambda: {}["x"], "KeyError"), (lambda: np.ones(100 << 17).sum(), "took 1.. MiB"), (lambda: time.sleep(0.2), "took 0.2 s"), (lambda: None, "and taken"),
], ids=["crash", "hang", "exception", "memory", "slow", "cut"])
def test_what_a_reader_must_not_do_is_noticed(tmp_path, monkeypatch, harm, seen):
    def make(folder):
        (folder / "f").write_bytes(b"good")
        return [folder / "f"]
    reads = []      # of one process: the first is of the undamaged file

    def read(folder):
        reads.append(folder)
        if len(reads) > 1:
            harm()
        return 0
    monkeypatch.setitem(READERS, "bad", Reader(make, read))
    monkeypatch.setattr(fuzzing, "SECONDS_MAX", 0.1)
    monkeypatch.setattr(fuzzing, "SECONDS_SILENT", 2.0)
    assert any(re.search(seen, line) for line in fuzz("bad", 1 if "hang" in seen else 10, 2, tmp_path).wrong)
