"""Reliability at length: fuzzed readers, killed runs, sanitized scenes; prints one table. The tests run the same in small.

    python scripts/soak.py                               everything
    python scripts/soak.py --only fuzz --mutants 5000    one part: fuzz, kills, operations, sanitizers or server
    python scripts/soak.py --only fuzz --format SOG --format glTF       fuzz of these readers alone
"""
import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from fuzzing import READERS, fuzz           # noqa: E402: of the tests' folder
from killing import tried                   # noqa: E402
from sanitized.build import build, draw     # noqa: E402

Row = tuple[str, str, bool]     # what was tried, what became of it, whether that is good


def fuzzed(options) -> Iterator[Row]:
    for name in options.format or READERS:
        with tempfile.TemporaryDirectory() as folder:
            v = fuzz(name, options.mutants, options.seed, Path(folder))
        for line in v.wrong[:10]:
            print(line, file=sys.stderr)
        yield (f"{name}: {options.mutants:,} mutants", f"{v.taken:,} taken, {v.refused:,} refused, {len(v.wrong)} wrong; slowest {v.slowest:.2f} s, memory {v.memory >> 20} MiB", not v.wrong)


def killed(options) -> Iterator[Row]:
    with tempfile.TemporaryDirectory() as folder:
        said = tried("kills", folder, options.kills, options.seed, timeout=60 + 10 * options.kills)
    good = not said["differing"] and said["steps lost at most"] <= said["save_every"]
    yield (f"{said['kills']} SIGKILLs in {said['runs']} runs", f"{said['resumes']} resumes, {len(said['differing'])} differ, at most {said['steps lost at most']} steps lost "
           f"at a save every {said['save_every']}", good)


def stopped(options) -> Iterator[Row]:
    with tempfile.TemporaryDirectory() as folder:
        said = tried("operations", folder, 1, timeout=1200)
    yield f"stopped at each of {said['operations']} file operations", f"{len(said['differing'])} resumed runs differ", not said["differing"]


def sanitized(options) -> Iterator[Row]:
    for real in ("float", "double"):
        with tempfile.TemporaryDirectory() as folder:
            program = build(Path(folder), real, "-O1")
            try:
                said, good = draw(program, options.seed, options.scenes, timeout=60 + options.scenes).strip(), True
            except AssertionError as why:
                said, good = str(why)[:2000], False
        yield f"sanitizers, {real}", said, good


def served(options) -> Iterator[Row]:
    """A program of its own: what it holds is counted."""
    command = [sys.executable, str(Path(__file__).resolve().parent.parent / "tests" / "serving.py"), options.minutes * 60, options.messages, 100_000, options.seed]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=options.minutes * 120 + options.messages + 300, check=False)
    if done.returncode or "Traceback" in done.stderr:
        yield "viewer's server", done.stderr[-2000:], False
        return
    said = json.loads(done.stdout)
    grown = said["median loud ms"] / said["median quiet ms"] - 1
    yield (f"viewer's server, {said['messages']:,} mutated messages", f"said {said['said']}, {said['descriptors more']} descriptors more, answers {said['answers']}",
           not said["said"] and said["descriptors more"] <= 0 and said["answers"] == 200 and done.stderr == "")
    yield "memory of a server that is misused", f"{said['MB']:.0f} MB, {said['MB a minute']:+.2f} a minute", said["MB a minute"] < 0.5
    yield "median step beside it, one thread", f"{said['median quiet ms']:.2f} ms, {100 * grown:+.1f} % with all clients", grown <= 0.02


PARTS = {"fuzz": fuzzed, "kills": killed, "operations": stopped, "sanitizers": sanitized, "server": served}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=PARTS, action="append", help="this part; may be given several times")
    parser.add_argument("--format", choices=READERS, action="append", metavar="NAME", help=f"a reader to fuzz, instead of all; may be given several times: {'; '.join(READERS)}")
    parser.add_argument("--mutants", type=int, default=20_000, help="of each reader's files")
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--scenes", type=int, default=20_000, help="random scenes of each precision under the sanitizers")
    parser.add_argument("--minutes", type=float, default=10, help="of misuse of the viewer's server")
    parser.add_argument("--messages", type=int, default=100_000, help="mutated ones to it, at least")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    all_good = True
    print("| what | result | seconds | |\n|---|---|---|---|")
    for name in options.only or PARTS:
        start = time.monotonic()
        for what, became, good in PARTS[name](options):
            print(f"| {what} | {became} | {time.monotonic() - start:.0f} | {'ok' if good else 'FAILED'} |", flush=True)
            start, all_good = time.monotonic(), all_good and good
    return 0 if all_good else 1


if __name__ == "__main__":
    sys.exit(main())
