"""Notice that a file was replaced by another one of the same name."""

from __future__ import annotations

from dataclasses import dataclass

from avllm.data.schema import MediaPart, resolve


@dataclass(frozen=True)
class FileState:
    """Time of change (ns) and size (bytes) of a file; another file of its name has others."""

    changed: int
    size: int

    @classmethod
    def of(cls, part: MediaPart) -> FileState | None:
        """Return the state of a media part's file; None for URLs and members of shards."""
        try:
            state = resolve(part, None).stat()
        except (OSError, ValueError):  # a name that no file can have
            return None
        return cls(state.st_mtime_ns, state.st_size)
