"""Odd names of files: URLs of this machine, no UTF-8, names like those of a shard's members."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from data.media.media_files import RATE, clicks, reason, write_audio

from avllm.data.media.load import load_audio, load_image, probe
from avllm.data.schema import AudioPart, resolve
from avllm.data.store.storage import name_in_utf8
from avllm.inference.asked_files import media_parts


def seconds(name: str | Path) -> float:
    """Duration of a sound that is read under a name, as itself and as a part of a row."""
    part = AudioPart(audio=name_in_utf8(name))
    durations = {
        load_audio(name, rate=RATE).duration,
        probe(name).duration,
        load_audio(resolve(part, Path("/elsewhere")), rate=RATE).duration,
    }
    assert len(durations) == 1
    return durations.pop()


@pytest.mark.parametrize(
    "folder", ["my clip", "100%", "a.tar#3+5", os.fsdecode(b"\xff\xfe"), "ümläut"]
)
def test_files_of_odd_names_are_read(tmp_path: Path, folder: str) -> None:
    (tmp_path / folder).mkdir()
    path = write_audio(tmp_path / "x.wav", clicks(1, RATE, [0.5]), RATE).rename(
        tmp_path / folder / "x.wav"
    )
    assert seconds(path) == 1.0
    (part,) = media_parts(None, str(path), None)
    assert load_audio(resolve(part, None), rate=RATE).duration == 1.0


@pytest.mark.parametrize("start", ["file://", "file://localhost", "file:", "local://"])
def test_urls_of_this_machine_are_read(tmp_path: Path, start: str) -> None:
    (tmp_path / "my clip").mkdir()
    write_audio(tmp_path / "my clip" / "x.wav", clicks(1, RATE, [0.5]), RATE)
    space = " " if start == "local://" else "%20"
    assert seconds(f"{start}{tmp_path}/my{space}clip/x.wav") == 1.0


def test_a_shard_beside_a_folder_with_the_name_of_a_member(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(bytes(1_000))
    (tmp_path / "a.tar#3+5").mkdir()
    path = write_audio(tmp_path / "x.wav", np.ones((1, RATE), np.float32), RATE)
    assert seconds(path.rename(tmp_path / "a.tar#3+5" / "x.wav")) == 1.0


@pytest.mark.parametrize("name", ["a\0b.wav", "file:///a%00b.wav", "\udcff.wav", "a.tar#3+5/x.wav"])
def test_names_of_no_file_are_missing(name: str) -> None:
    for read in (probe, load_image, lambda path: load_audio(path, rate=RATE)):
        assert reason(lambda read=read: read(name)) == "missing"
