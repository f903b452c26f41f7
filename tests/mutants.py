"""Seeded damage to files: what a bad disk, a cut download or a hostile sender makes of them."""
import random
import re

LIES = (b"0", b"-1", b"2147483648", b"1" + b"0" * 20, b"9" * 300, b"nan", b"inf", b"1e39", b"", b"x", b"\n", b"float", b"list uchar int")


def mutants(data: bytes, count: int, seed: int = 0):
    """`count` damaged versions of data: flipped bits, overwritten runs, cuts, moved spans, and lies in whole numbers or 8-byte counts."""
    rng = random.Random(seed)
    for _ in range(count):
        yield rng.choice((_flip, _run, _cut, _move, _lie_in_text, _lie_in_count))(bytearray(data), rng)


def _flip(data, rng):
    for _ in range(rng.choice((1, 1, 3, 30))):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(data)


def _run(data, rng):
    at, n = rng.randrange(len(data)), rng.choice((1, 4, 8, 64))
    data[at:at + n] = rng.choice((b"\0" * n, b"\xff" * n, rng.randbytes(n)))
    return bytes(data)


def _cut(data, rng):
    return bytes(data[:rng.randrange(len(data))])


def _move(data, rng):
    a, b, n = rng.randrange(len(data)), rng.randrange(len(data)), rng.randrange(1, 64)
    span = data[a:a + n]
    del data[a:a + n]
    data[b:b] = span
    return bytes(data)


def _lie_in_text(data, rng):
    """Another number, word or line in the first 4 kB, where text headers are."""
    words = list(re.finditer(rb"[^\s]+", data[:4096]))
    word = rng.choice(words)
    return bytes(data[:word.start()] + rng.choice(LIES) + data[word.end():])


def _lie_in_count(data, rng):
    at = rng.randrange(max(1, min(len(data) - 8, 4096)))
    data[at:at + 8] = rng.choice((0, 1, 2**31, 2**32 - 1, 2**62, 2**64 - 1, 0x7FF0000000000000)).to_bytes(8, "little")
    return bytes(data)
