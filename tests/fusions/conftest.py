"""A tiny world and files of its clips."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import World, make_world

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("fused"), clips=6)


@pytest.fixture(scope="session")
def clips(world: World) -> list[Path]:
    """Files of three clips with a sound track and, as the last, one without."""
    folder = world.captions.parent
    return [folder / f"{number:03d}.mp4" for number in (0, 1, 3, 2)]
