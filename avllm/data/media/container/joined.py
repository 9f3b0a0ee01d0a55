"""Find a second file that follows the first in one file, which players and libav do not read.

``cat a.wav b.wav`` gives such a file: the header of the first says where it ends. Containers
without a header for the whole file are read to their end, see ``restarts.py``.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import IO

from avllm.data.media.container.placeholders import is_placeholder
from avllm.data.store.storage import open_bytes, size_of, url_of

FLAC_BEGINS = b"fLaC\x00\x00\x00\x22"  # with the head of the block that comes first
AT_ONCE = 1 << 20  # bytes that are searched at a time
MOST_PIECES = 1_000_000  # chunks, boxes or tags that are followed: about 1 s
SEARCHED = 64 << 20  # bytes of a FLAC file; larger ones are not read for it, nor remote ones


def second_file(path: str | Path, container: str) -> int | None:
    """Return the byte at which a second file of the same kind begins; None without one.

    Args:
        path: of the file.
        container: libav's name of its format.
    """
    size = size_of(path) or 0
    with open_bytes(path) as file:
        if container in ("wav", "avi"):
            return _after_riff(file, size)
        if container.startswith("mov"):
            return _second_box(file, size)
        if container == "flv":
            return _after_tags(file, size)
        if container == "flac" and size <= SEARCHED and url_of(path) is None:
            return _second_flac(file)
    return None


def _at(file: IO[bytes], position: int, count: int) -> bytes:
    file.seek(position)
    return file.read(count)


def _after_riff(file: IO[bytes], size: int) -> int | None:
    """Follow the sizes of RIFF chunks; long AVI files have several, the later ones named AVIX."""
    kind = _at(file, 0, 12)[8:]
    position = 0
    for _ in range(MOST_PIECES):
        if position + 12 > size:
            return None
        head = _at(file, position, 12)
        length = int.from_bytes(head[4:8], "little")
        if head[:4] != b"RIFF" or is_placeholder(length):
            return None
        if position and head[8:] == kind:
            return position
        position += 8 + length + length % 2
    return None


def _second_box(file: IO[bytes], size: int) -> int | None:
    """Follow the outermost boxes of an MP4 file; a file has one box ``ftyp``, at its beginning."""
    position = 0
    for _ in range(MOST_PIECES):
        if position + 8 > size:
            return None
        head = _at(file, position, 16)
        length = int.from_bytes(head[:4], "big")
        if length == 1:
            length = int.from_bytes(head[8:16], "big")
        if position and head[4:8] == b"ftyp":
            return position
        if length < 8:
            return None
        position += length
    return None


def _after_tags(file: IO[bytes], size: int) -> int | None:
    """Follow the tags of an FLV file: 11 bytes, the content, and its size again."""
    position = 9 + 4
    for _ in range(MOST_PIECES):
        if position + 15 > size:
            return None
        head = _at(file, position, 4)
        if head[:3] == b"FLV":
            return position
        position += 11 + int.from_bytes(head[1:], "big") + 4
    return None


def _second_flac(file: IO[bytes]) -> int | None:
    """Search for the beginning of a FLAC file: nothing says where the first one ends."""
    for position, content in _pieces(file):
        found = content.find(FLAC_BEGINS)
        if found >= 0:
            return position + found
    return None


def _pieces(file: IO[bytes]) -> Iterator[tuple[int, bytes]]:
    """Yield the content after the first byte, in pieces that overlap, with their positions."""
    position = 1
    while content := _at(file, position, AT_ONCE):
        yield position, content
        if len(content) < AT_ONCE:
            return
        position += AT_ONCE - len(FLAC_BEGINS)
