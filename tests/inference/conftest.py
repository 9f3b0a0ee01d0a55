"""One tiny checkpoint and three tiny clips for all tests here."""

from __future__ import annotations

from pathlib import Path

import pytest
from answering import make_checkpoint
from tiny import COLOURS, write_clip


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint folder whose answers depend on what is seen and heard."""
    return make_checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def clips(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Red with a low tone, blue without a sound track, green and longer with a high tone."""
    folder = tmp_path_factory.mktemp("clips")
    kinds = [("red", 300.0, 1.0), ("blue", None, 1.0), ("green", 1500.0, 2.5)]
    return [write_clip(folder / f"{name}.mp4", COLOURS[name], hertz, s) for name, hertz, s in kinds]
