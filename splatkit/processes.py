"""How the processes that torchrun started begin together, wait for each other, and end together: with what went wrong in one said once, or who was lost."""
from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from .errors import EndedElsewhere, ProcessLost, SplatkitError

TIMEOUT = timedelta(minutes=10)     # of one exchange: the slowest thing the others wait for is the first process's writing of a checkpoint
LAST_WORDS = 3.0                    # seconds in which processes that end say why
STUCK = 12.0                        # seconds after SIGTERM in which a process ends by itself; torchrun kills it after 30

stopping = threading.Event()        # Ctrl-C was pressed: all processes stop behind the same step
_ending = threading.Event()         # this process is about to end: SIGTERM has nothing to add
_said = ""                          # why this process ends, as it told the others
_wakeup = -1                        # where signals of this process are written down, for the thread that hears them while the main one waits outside of Python


@dataclass(frozen=True)
class Process:
    """A process by its number, from 0, among `world`."""

    rank: int
    world: int


@contextmanager
def exchange() -> Iterator[None]:
    """Around what waits for the other processes: ProcessLost where the connection breaks."""
    try:
        yield
    except RuntimeError as why:
        _ending.set()
        raise ProcessLost(f"the connection to the other processes broke: {str(why).splitlines()[0]}") from why


@contextmanager
def joined() -> Iterator[Process]:
    """This process among those that torchrun started, alone where it did not; the group is left at the end.

    A process that raises ends the others too, within seconds: what went wrong is raised as it is in the first process, and the others
    raise EndedElsewhere. Where a process is lost without a word, all others raise ProcessLost. So does one that is sent SIGTERM, which
    is what torchrun does with the others; where it waits in an exchange that nothing ends, it says who was lost and exits with 2. Ctrl-C sets
    `stopping`, for the run to look at between its steps. A default process group that the caller has made is used as it is, and is the caller's to end.
    """
    if dist.is_available() and dist.is_initialized():
        yield Process(dist.get_rank(), dist.get_world_size())
        return
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or "RANK" not in os.environ:
        yield Process(0, 1)
        return
    try:
        store, rank, world = next(iter(dist.rendezvous("env://", timeout=TIMEOUT)))
        store = dist.PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)      # torchrun's store keeps the addresses of processes before a restart
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
        by = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
        dist.init_process_group(by, store=store, rank=rank, world_size=world, timeout=TIMEOUT)
    except (RuntimeError, ValueError) as why:
        raise ProcessLost(f"this process found no other of the {os.environ['WORLD_SIZE']} that WORLD_SIZE names: {str(why).splitlines()[0]}") from why
    me, words = Process(rank, world), dist.PrefixStore("splatkit", store)
    with _signals(me, words):
        try:
            yield me
        except ProcessLost as lost:
            _ending.set()
            raise _told(lost, me, words) from lost
        except (SplatkitError, ValueError, TypeError, OSError) as error:
            _ending.set()
            _say(words, rank, " ".join(str(error).split()) or type(error).__name__)
            if rank == 0:
                raise
            raise EndedElsewhere(f"process {rank}: {error}") from error
        except KeyboardInterrupt:
            _say(words, rank, "interrupted")
            raise
        finally:
            dist.destroy_process_group()


@contextmanager
def _signals(me: Process, words: dist.Store) -> Iterator[None]:
    """Ctrl-C is noted, SIGTERM raises ProcessLost; only the main thread can ask for that."""
    global _said, _wakeup
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def told_to_end(*_):
        if not _ending.is_set():
            _ending.set()
            raise ProcessLost("this process was told to end (SIGTERM)")
    _ending.clear()
    _said = ""
    told, _wakeup = os.pipe()
    os.set_blocking(_wakeup, False)
    left, woken_before = threading.Event(), signal.set_wakeup_fd(_wakeup, warn_on_full_buffer=False)
    threading.Thread(target=_end_where_stuck, args=(told, left, me, words), daemon=True).start()
    before = [(number, signal.signal(number, does)) for number, does in ((signal.SIGINT, lambda *_: stopping.set()), (signal.SIGTERM, told_to_end))]
    try:
        yield
    finally:
        left.set()
        stopping.clear()
        _ending.clear()
        for number, handler in before:
            signal.signal(number, handler)
        signal.set_wakeup_fd(woken_before)
        os.close(_wakeup)
        _wakeup = -1


def _forget_wakeup() -> None:
    """In a process that is forked off: its signals are its own."""
    global _wakeup
    if _wakeup >= 0:
        signal.set_wakeup_fd(-1)
        _wakeup = -1


os.register_at_fork(after_in_child=_forget_wakeup)


def _end_where_stuck(told: int, left: threading.Event, me: Process, words: dist.Store) -> None:
    """Ends this process some time after SIGTERM where its main thread cannot: an exchange waits as long as the other side neither answers nor closes the connection."""
    with open(told, "rb", buffering=0) as signals:
        while (number := signals.read(1)) and number[0] != signal.SIGTERM:
            pass
    if number and not left.wait(STUCK):
        lost = ProcessLost("this process was told to end (SIGTERM), and others do not answer; --resume goes on from the last checkpoint")
        # By another thread, for the store may wait too: for a process that is silent and keeps it, or for this one's main thread.
        found: list[SplatkitError] = []
        asking = threading.Thread(target=lambda: found.append(_told(lost, me, words)), daemon=True)
        asking.start()
        asking.join(LAST_WORDS + 1)
        error = SplatkitError(_said) if _said else found[0] if found else lost
        if not isinstance(error, EndedElsewhere):
            sys.stderr.write(f"splatkit: {error}\n")
            sys.stderr.flush()
        os._exit(2)


def _say(words: dist.Store, rank: int, text: str) -> None:
    global _said
    _said = text or _said
    try:
        words.set(str(rank), _said)
    except RuntimeError:        # the process that kept the store is gone
        pass


def _told(lost: ProcessLost, me: Process, words: dist.Store) -> SplatkitError:
    """What an exchange that broke means, after what the others said before they ended."""
    _say(words, me.rank, "")
    others, said, deadline = set(range(me.world)) - {me.rank}, {}, time.monotonic() + LAST_WORDS
    try:
        while len(said) < len(others) and not any(said.values()) and time.monotonic() < deadline:
            said |= {rank: words.get(str(rank)).decode() for rank in others - said.keys() if words.check([str(rank)])}
            time.sleep(0.05)
    except RuntimeError:
        said = {rank: "" for rank in others - {0}}
    if reason := next(((rank, text) for rank, text in said.items() if text), None):
        text = f"process {reason[0]}: {reason[1]}"
        return SplatkitError(text) if me.rank == 0 else EndedElsewhere(text)
    if silent := sorted(others - said.keys()):
        return ProcessLost(f"process {', '.join(map(str, silent))} of {me.world} (counted from 0) was lost: killed, out of memory, or its machine or network is gone; "
                           "--resume goes on from the last checkpoint")
    return ProcessLost(f"{lost}; --resume goes on from the last checkpoint")
