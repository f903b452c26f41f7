"""What a live view costs a run: steps of a reconstruction while a page watches against steps while none does, in turns; prints one table.

    python scripts/bench_live.py                                a million Gaussians on the CPU, SH degree 0 and 3, a copy each second
    python scripts/bench_live.py --gaussians 200000 --rate 2
"""
import argparse
import contextlib
import os
import statistics
import tempfile
import time
from pathlib import Path

import torch
from far_page import far_page

from splatkit import Scene, config, io, rooms
from splatkit.reconstruct import reconstruct
from splatkit.view import Watching


class Turns(Watching):
    """Steps in turns of so many with and without a page; the first steps of a turn do not count."""

    def __init__(self, planes: tuple[str, ...], each: int, rate: float):
        super().__init__(lambda line: None, rate=rate)
        self.planes, self.each = planes, each
        self.seconds, self.copies, self.page, self.last, self.count = {True: [], False: []}, [], None, None, 0
        self.phases = {True: 0.0, False: 0.0}

    def stepped(self, fit, edit, photo, loss):
        copies = self.live.taken
        super().stepped(fit, edit, photo, loss)
        now, place = time.perf_counter(), self.count % self.each
        if self.last is not None and place >= 2:
            self.seconds[self.page is not None].append(now - self.last)
            self.phases[self.page is not None] += now - self.last
            self.copies.append(self.live.taken - copies)
        self.count += 1
        if self.count % self.each == 0:
            if self.page:
                self.leave()
                self.shown.wanted = self.shown.sh_wanted = 0.0
            else:
                self.page = contextlib.ExitStack()
                self.arrived = self.page.enter_context(far_page(self.viewer.port, self.viewer.gate.token, self.planes))
                time.sleep(3)
        self.last = time.perf_counter()

    def leave(self):
        if self.page:
            rows = self.arrived()
            self.page.close()
            if not rows:
                raise RuntimeError("nothing arrived while the run was watched")
            self.page = None


def measured(options, sh_degree: int) -> str:
    torch.manual_seed(0)
    n, planes = options.gaussians, ("core", "sh") if sh_degree and options.sh else ("core",)
    scene = Scene(torch.rand(n, 3) * 4 - 2, torch.randn(n, 4), torch.randn(n, 3) * 0.3 - 5.5, torch.randn(n), torch.randn(n, (sh_degree + 1) ** 2, 3) * 0.2)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        rooms.write_capture(folder / "photos", photos=8, width=options.width, height=options.width * 3 // 4, points=1000)
        io.save(folder / "first.ply", scene)
        steps = 2 * options.each * options.turns
        settings = config.Reconstruct(folder / "photos", folder / "run", steps=steps, sh_degree=sh_degree, sh_every=1, densification="none", init=folder / "first.ply", save_every=10**6,
                                      hold_every=0, device=options.device)
        turns = Turns(planes, options.each, options.rate)
        try:
            reconstruct(settings, watcher=turns)
        finally:
            turns.leave()
            turns.close(False)
    off, on = (statistics.median(turns.seconds[watched]) for watched in (False, True))
    mean = {k: statistics.mean(v) for k, v in turns.seconds.items()}
    return (f"| {n:,} | {sh_degree} | {' '.join(planes)} | {1e3 * off:.0f} | {1e3 * on:.0f} | {100 * (on / off - 1):+.1f} % | {100 * (mean[True] / mean[False] - 1):+.1f} % | "
            f"{sum(turns.copies) / turns.phases[True]:.2f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gaussians", type=int, default=1_000_000)
    parser.add_argument("--degrees", type=int, nargs="+", default=[0, 3])
    parser.add_argument("--sh", action="store_true", help="the page watches the SH bands above 0 too")
    parser.add_argument("--rate", type=float, default=1.0, help="copies a second at most")
    parser.add_argument("--width", type=int, default=640)
    parser.add_argument("--each", type=int, default=20, help="steps of a turn")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    print(f"{os.cpu_count()} cores, {torch.get_num_threads()} threads\n")
    print("| Gaussians | SH | planes | step alone, ms | step watched, ms | median | mean | copies a second |\n|---|---|---|---|---|---|---|---|", flush=True)
    for degree in options.degrees:
        print(measured(options, degree), flush=True)


if __name__ == "__main__":
    main()
