"""Packed bytes: gzip written by several threads, and unpacking with a limit: no more than a header asks for and one byte, whatever the packed bytes would like."""
from __future__ import annotations

import itertools
import struct
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import zstandard

from ..errors import BadFile

PIECE = 1 << 20
DEFLATE_MAX = 1032      # bytes out of one byte in, at the very most
FREE = 256 << 20        # bytes that may come out of however few: a large scene of equal Gaussians packs to nothing
RATIO_MAX = 1024        # beyond that, bytes out of one byte in: formats without DEFLATE's own limit are held to about the same


def plausible(path, where: str, unpacked: int, packed: int) -> None:
    """Raises BadFile for a claim that no honest file of this many bytes makes."""
    if unpacked > FREE + RATIO_MAX * packed:
        raise BadFile(path, where, f"claims {unpacked} bytes of data, which cannot be in a file of {packed} bytes")


def gzipped(data: list[memoryview], level: int) -> Iterator[bytes]:
    """One gzip stream of all the pieces. Parts of a megabyte are packed by themselves, two at a time, each ending on a whole byte (as pigz does it)."""
    parts = [piece[at:at + PIECE] for piece in data for at in range(0, len(piece), PIECE)]

    def pack(part: memoryview) -> bytes:
        packer = zlib.compressobj(level, wbits=-15)
        return packer.compress(part) + packer.flush(zlib.Z_FULL_FLUSH)
    checksum = 0
    yield b"\x1f\x8b\x08" + bytes(6) + b"\xff"
    with ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(pack, part) for part in parts[:8]]      # so that little is packed but not written
        for i, part in enumerate(parts):
            yield waiting[i].result()
            waiting[i] = None
            waiting += [pool.submit(pack, later) for later in itertools.islice(parts, i + 8, i + 9)]
            checksum = zlib.crc32(part, checksum)
    yield b"\x03\x00" + struct.pack("<II", checksum, sum(map(len, parts)) & 0xFFFFFFFF)      # an empty last block


class Gunzip:
    """A gzip stream that is unpacked piece by piece."""

    def __init__(self, path, data: bytes):
        self.path, self.data, self.decoder, self.done = path, memoryview(data), zlib.decompressobj(wbits=31), 0

    def read(self, size: int) -> bytes:
        """The next bytes, `size` of them or, where the stream ends before, fewer. Raises BadFile for a damaged or cut stream."""
        pieces, missing = [], size
        while missing and not self.decoder.eof:
            try:
                piece = self.decoder.decompress(self.decoder.unconsumed_tail or self._next(), min(missing, PIECE))
            except zlib.error as e:
                raise self._damaged(str(e)) from e
            if not piece and not self.decoder.unconsumed_tail and not self.decoder.eof and self.done >= len(self.data):
                raise self._damaged("it ends early")
            pieces.append(piece)
            missing -= len(piece)
        return b"".join(pieces)

    def end(self) -> bool:
        """Whether the stream ends here, with the checksum that it promises."""
        return not self.read(1)

    def _next(self) -> bytes:
        piece = self.data[self.done:self.done + PIECE]
        self.done += len(piece)
        return bytes(piece)

    def _damaged(self, why: str) -> BadFile:
        return BadFile(self.path, f"byte {self.done - len(self.decoder.unconsumed_tail)}", f"the gzip stream is damaged or cut: {why}")


def unzstd(path, where: str, data: bytes, size: int) -> bytes:
    """The `size` bytes in a Zstandard frame. Raises BadFile where they are more or fewer."""
    decoder = zstandard.ZstdDecompressor(max_window_size=1 << 27)
    pieces, left = [], size
    try:
        with decoder.stream_reader(data) as stream:
            while left >= 0 and (piece := stream.read(min(left + 1, PIECE))):
                pieces.append(piece)
                left -= len(piece)
    except zstandard.ZstdError as e:
        raise BadFile(path, where, f"the Zstandard stream is damaged or cut: {e}"[:200]) from e
    if left:
        raise BadFile(path, where, f"{size} bytes expected in the Zstandard stream, found {'more' if left < 0 else size - left}")
    return b"".join(pieces)
