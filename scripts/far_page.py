"""A page of a live run as if it were on another machine: takes what the server sends and acknowledges it, but draws nothing, and takes what others leave of this machine.

    echo PORT TOKEN PLANE ... | python scripts/far_page.py

Prints after each chunk of core how many rows have come so far. Without torch, so that it starts at once.
"""
import contextlib
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

HEADER = 24     # bytes of a message before the chunk's own (wire.MESSAGE)


@contextlib.contextmanager
def far_page(port: int, token: str, planes: tuple[str, ...] = ("core",)) -> Iterator[Callable[[], int]]:
    """A far page on a server, until the end of the block; gives what says how many rows it has got."""
    program = subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True)
    rows = [0]
    reader = threading.Thread(target=lambda: [rows.__setitem__(0, int(line)) for line in program.stdout], daemon=True)
    reader.start()

    def arrived() -> int:
        if program.poll() is not None:
            raise RuntimeError(f"the far page ended with {program.returncode}")
        return rows[0]
    try:
        program.stdin.write(" ".join([str(port), token, *planes]) + "\n")
        program.stdin.flush()
        yield arrived
    finally:
        program.kill()
        program.wait()
        reader.join()
        program.stdin.close()
        program.stdout.close()


def main() -> None:
    sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))
    from raw import joined

    with contextlib.suppress(OSError):      # Linux shares cores among sessions before it looks at their processes
        Path("/proc/self/autogroup").write_text("19")
    os.nice(19)
    port, token, *planes = sys.stdin.readline().split()
    raw, rows = joined(int(port), token, planes), 0
    raw.ahead = 1
    while True:
        opcode, payload = head_of(raw, HEADER + 8)
        if opcode != 2:
            continue
        raw.say(type="ack", frame=int.from_bytes(payload[4:8], "little"))
        if payload[HEADER:HEADER + 4] == b"SKC1":
            rows += int.from_bytes(payload[HEADER + 4:HEADER + 8], "little")
            print(rows, flush=True)


def head_of(raw, count: int) -> tuple[int, bytes]:
    """Opcode and first bytes of the next frame. The rest is dropped where it lies: reading it would take the run memory traffic that a page elsewhere does not."""
    opcode, n = raw.header()
    payload = raw.take(min(n, count))
    raw.drop(n - len(payload))
    return opcode, payload


if __name__ == "__main__":
    main()
