"""The check reports what reading a file had to do; values that are no numbers are bad rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data.check.checked_rows import reasons_of
from data.media.media_files import RATE, clicks, write_audio, write_clip
from data.media.test_media_picture_faults import joined, write_animation
from data.media.test_media_sound_faults import HIGH, LOW, write_tracks
from PIL import Image

from avllm.data.check.file import examine
from avllm.data.check.reasons import REASONS
from avllm.data.check.uses import Decode, FileJob, PlainReader, Use


def found(path: Path, *uses: Use, decode: Decode = "sample") -> tuple[list[str], list[str]]:
    """The reasons of a file and of its uses."""
    result: dict[str, Any] = examine(PlainReader(), decode, FileJob(str(path), uses))
    of_uses = []
    for use in result["uses"]:
        of_uses += reasons_of(use)
    return reasons_of(result), of_uses


def test_channels_that_cancel_are_named(tmp_path: Path) -> None:
    path = write_audio(tmp_path / "a.wav", np.stack([LOW, -LOW]), RATE, layout="stereo")
    assert found(path, Use("audio")) == ([], ["cancelling_channels"])


def test_several_tracks_are_named_unless_one_is_chosen(tmp_path: Path) -> None:
    path = write_tracks(tmp_path / "a.mka", [LOW, HIGH], default=1)
    for decode in ("headers", "sample"):
        assert found(path, Use("audio"), decode=decode)[0] == ["several_tracks"], decode
        assert found(path, Use("audio", track=0), decode=decode) == ([], []), decode
        assert found(path, Use("audio", track=2), decode=decode)[1] == ["no_audio"], decode


def test_a_clock_that_restarts_is_named(tmp_path: Path) -> None:
    part = write_clip(tmp_path / "part.ts", seconds=1, sound=clicks(1, 48_000, [0.5]))
    path = joined(tmp_path / "a.ts", part, part)
    for decode in ("headers", "sample"):
        assert found(path, Use("video"), decode=decode) == (["clock_restarts"], []), decode
    full = found(path, Use("video"), decode="full")  # the packet at the seam may be damaged
    assert set(full[0]) - {"damaged"} == {"clock_restarts"}
    assert full[1] == []


def test_pictures_that_are_scaled_or_stand_still_are_named(tmp_path: Path) -> None:
    Image.fromarray(np.full((8, 8), 4000, np.uint16)).save(tmp_path / "a.png")
    assert found(tmp_path / "a.png", Use("image")) == ([], ["value_range"])
    path = write_animation(tmp_path / "a.webp", [500, 500])
    assert found(path, Use("image")) == ([], ["animation"])
    for decode in ("headers", "sample", "full"):
        assert found(path, Use("video", sound="off"), decode=decode) == ([], []), decode


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e9])
def test_values_that_are_no_sound_are_an_error(tmp_path: Path, value: float) -> None:
    sound = LOW.copy()
    sound[5_000] = value
    path = write_audio(tmp_path / "a.wav", sound[None], RATE, "pcm_f32le")
    assert found(path, Use("audio")) == ([], ["bad_values"])
    assert REASONS["bad_values"].severity == "error"
