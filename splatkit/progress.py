"""The line that says how far a loop is."""
from __future__ import annotations

import shutil
import sys
import time
from collections import deque


class Progress:
    """One line that says how far a loop is: redrawn in place on a terminal, else a fresh line about every 5 s.

    Called as progress(step, gaussians, psnr=25.1, loss=0.03): steps count from 1, gaussians may be left out, any further numbers are shown by name.
    """

    def __init__(self, steps: int, stream=None, clock=time.monotonic, what: str = "step"):
        self.steps, self.stream, self.clock, self.what = steps, stream or sys.stderr, clock, what
        self.redraws = self.stream.isatty()
        self.seconds_between = 0.2 if self.redraws else 5.0
        self.recent = deque([(clock(), 0)], maxlen=20)      # (time, step) of the last lines: the rate is theirs
        self.drawn = False

    def __call__(self, step: int, gaussians: int | None = None, **values: float) -> None:
        now = self.clock()
        if now - self.recent[-1][0] < self.seconds_between and step < self.steps:
            return
        self.recent.append((now, step))
        rate = (step - self.recent[0][1]) / max(now - self.recent[0][0], 1e-9)
        left = round((self.steps - step) / rate) if rate > 0 else 0
        numbers = [f"{name} {value:.4g}" for name, value in values.items()]
        clock = f"{left // 3600}:{left // 60 % 60:02}:{left % 60:02}" if left >= 3600 else f"{left // 60}:{left % 60:02}"
        line = "  ".join([f"{self.what} {step}/{self.steps}", *numbers, *([f"{gaussians:,} Gaussians"] if gaussians is not None else []), f"{rate:.1f} it/s", f"{clock} left"])
        if self.redraws:
            line = "\r\x1b[K" + line[:shutil.get_terminal_size().columns - 1]
        print(line, end="" if self.redraws else "\n", file=self.stream, flush=True)
        self.drawn = True

    def note(self, line: str) -> None:
        """Prints a line of its own."""
        self.close()
        print(line, file=self.stream, flush=True)

    def close(self) -> None:
        """Ends the line, so that what is printed next stands below it."""
        if self.redraws and self.drawn:
            print(file=self.stream, flush=True)
        self.drawn = False
