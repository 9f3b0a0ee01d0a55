"""Find out whether an MP4 file was cut short, by the sizes of its outermost boxes."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from avllm.data.store.storage import open_bytes, size_of


class CutBox(NamedTuple):
    """Hold the kind of an MP4 box that ends after its file, and the number of missing bytes."""

    kind: bytes
    missing: int


def cut_box(path: str | Path) -> CutBox | None:
    """Return the outermost MP4 box that ends after the file; None when there is none."""
    size = size_of(path) or 0
    position = 0
    kind = b""
    with open_bytes(path) as file:
        while position + 8 <= size:
            file.seek(position)
            head = file.read(16)
            length = int.from_bytes(head[:4], "big")
            kind = head[4:8]
            if position == 0 and kind != b"ftyp":
                return None
            if length == 1:
                length = int.from_bytes(head[8:16], "big")
            if length < 8:  # 0: the box reaches to the end of the file, wherever that is
                return None
            position += length
    return CutBox(kind, position - size) if position > size else None


def missing_end(path: str | Path) -> str:
    """Describe the missing end of an MP4 that was cut short; return "" for all other files."""
    cut = cut_box(path)
    return f"{cut.missing} bytes are missing at the end" if cut else ""


# Brands of still pictures in the MP4 container, whose tiles libav takes for video tracks.
STILL_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"mif1", b"mif2", b"avif", b"jpeg"}


def still_brand(path: str | Path) -> str:
    """Return the brand of a HEIC or AVIF picture, from its first bytes; "" for any other file."""
    with open_bytes(path) as file:
        head = file.read(12)
    is_still = head[4:8] == b"ftyp" and head[8:12] in STILL_BRANDS
    return head[8:12].decode() if is_still else ""
