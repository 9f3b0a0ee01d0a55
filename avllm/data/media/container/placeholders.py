"""Replace the lengths that a writer to a pipe could not know: it cannot go back to its header.

WAV, RF64, Wave64, AIFF and AU files declare the bytes of their sound before it. Who writes them to
a pipe puts 0 or the largest number there, or one near it. Plain WAV files are read by libav with
such lengths; the headers of the others are handed to it with the lengths that they would have.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from avllm.data.store.storage import open_bytes, size_of

HEAD = 1 << 16  # bytes in which a header is looked for
# The first bytes of a Wave64 file, and the end that the names of its chunks share.
WAVE64 = b"riff\x2e\x91\xcf\x11\xa5\xd6\x28\xdb\x04\xc1\x00\x00"


def is_placeholder(length: int) -> bool:
    """Return whether a declared length is one that writers put in place of an unknown one.

    They are 0 and numbers at, or a little below, the largest of 31, 32, 63 and 64 bits.
    """
    near_31_bits = 0x7F00_0000 <= length <= 0x8000_1000
    near_32_bits = 0xFF00_0000 <= length <= 0xFFFF_FFFF
    return length == 0 or near_31_bits or near_32_bits or length >= 1 << 62


class Chunk(NamedTuple):
    """Locate a chunk: its name, the position of its content, and its declared size."""

    name: bytes
    start: int
    size: int


def repaired(path: str | Path) -> io.BufferedReader | None:
    """Return the file with true lengths in its header; None where it needs no repair."""
    with open_bytes(path) as file:
        head = file.read(16)
        if head[:4] not in (b"RF64", b"FORM", b".snd", b"riff"):
            return None
        head += file.read(HEAD)
    header = bytearray(head)
    size = size_of(path) or len(head)
    if head.startswith(b"RF64"):
        _repair_rf64(header, size)
    elif head.startswith(b"FORM"):
        _repair_aiff(header, size)
    elif head.startswith(b".snd") and is_placeholder(_number(head, 8, 4, "big")):
        header[8:12] = b"\xff" * 4
    elif head.startswith(WAVE64):
        _repair_wave64(header, size)
    if header == head:
        return None
    return io.BufferedReader(_Overlaid(path, bytes(header)))


def _number(data: bytes | bytearray, start: int, size: int, order: str) -> int:
    return int.from_bytes(data[start : start + size], "big" if order == "big" else "little")


def _chunks(data: bytes | bytearray, order: str) -> Iterator[Chunk]:
    """Yield the chunks of a RIFF or AIFF header, up to the one with the sound."""
    start = 12
    while start + 8 <= len(data):
        chunk = Chunk(bytes(data[start : start + 4]), start + 8, _number(data, start + 4, 4, order))
        yield chunk
        if chunk.name in (b"data", b"SSND"):
            return
        start = chunk.start + chunk.size + chunk.size % 2


def _repair_rf64(header: bytearray, size: int) -> None:
    chunks = {chunk.name: chunk for chunk in _chunks(header, "little")}
    sizes = chunks.get(b"ds64")
    sound = chunks.get(b"data")
    if sizes is None or sound is None:
        return
    at = sizes.start  # bytes of the file, of the sound, and number of samples, 8 bytes each
    if is_placeholder(_number(header, at + 8, 8, "little")):
        header[at : at + 8] = (size - 8).to_bytes(8, "little")
        header[at + 8 : at + 16] = (size - sound.start).to_bytes(8, "little")
        header[at + 16 : at + 24] = bytes(8)


def _repair_wave64(header: bytearray, size: int) -> None:
    start = 40  # after the name, the size and the kind of the file
    while start + 24 <= len(header):
        length = _number(header, start + 16, 8, "little")  # with the chunk's name and itself
        if header[start : start + 4] == b"data":
            if is_placeholder(length) or length == 24:
                header[16:24] = size.to_bytes(8, "little")
                header[start + 16 : start + 24] = (size - start).to_bytes(8, "little")
            return
        start += max(24, length + -length % 8)


def _repair_aiff(header: bytearray, size: int) -> None:
    chunks = {chunk.name: chunk for chunk in _chunks(header, "big")}
    common = chunks.get(b"COMM")
    sound = chunks.get(b"SSND")
    if common is None or sound is None:
        return
    frames = _number(header, common.start + 2, 4, "big")
    declared = (frames, sound.size, _number(header, 4, 4, "big"))
    if not any(is_placeholder(length) or length > 2 * size for length in declared):
        return
    if not any(is_placeholder(length) for length in declared) and sound.size != 8:
        return
    channels = _number(header, common.start, 2, "big")
    bits = _number(header, common.start + 6, 2, "big")
    frame_bytes = max(1, channels * ((bits + 7) // 8))
    content = size - sound.start
    header[4:8] = min(size - 8, 0xFFFF_FFFF).to_bytes(4, "big")
    header[common.start + 2 : common.start + 6] = ((content - 8) // frame_bytes).to_bytes(4, "big")
    header[sound.start - 4 : sound.start] = min(content, 0xFFFF_FFFF).to_bytes(4, "big")


class _Overlaid(io.RawIOBase):
    """Present a file with other first bytes."""

    def __init__(self, path: str | Path, head: bytes) -> None:
        self.name = str(path)
        self._file = open_bytes(path)
        self._head = head

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        position = self._file.tell()
        content = self._file.read(len(buffer))
        overlaid = self._head[position : position + len(content)]
        buffer[: len(content)] = overlaid + content[len(overlaid) :]
        return len(content)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def close(self) -> None:
        self._file.close()
        super().close()
