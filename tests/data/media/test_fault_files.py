"""Read files that were misread once, where present; each kind has a test with its own input."""

from __future__ import annotations

from pathlib import Path

import pytest

from avllm.data.check.file import examine
from avllm.data.check.uses import FileJob, PlainReader, Use

FOLDER = Path(__file__).resolve().parents[3] / "../shared/faults"
REASONS = {  # of the use, and of the file
    ("antiphase.wav", "audio"): (["cancelling_channels"], []),
    ("both.ts", "video"): ([], ["clock_restarts"]),
    ("nan.wav", "audio"): (["bad_values"], []),
    ("two.mkv", "video"): ([], ["several_tracks"]),
    ("circle.mp4", "video"): (["no_sound_track"], []),
    ("moving.mp4", "video"): (["no_sound_track"], ["interlaced"]),
    ("half.webm", "video"): (["no_sound_track"], []),
    ("a.webp", "video"): (["no_sound_track"], []),
    ("a.webp", "image"): (["animation"], []),
    ("16000x1.png", "image"): ([], []),
    ("grey12in16.png", "image"): (["value_range"], []),
    ("art.mp3", "audio"): ([], []),
    ("art.mp3", "video"): (["no_video"], []),
    ("streamed_7fffffff.wav", "audio"): ([], []),
    ("cut.mkv", "video"): ([], []),
    ("far_timestamp.mp4", "video"): (["absurd_header"], []),
    ("tiles.heic", "video"): (["undecodable"], []),
}


@pytest.mark.skipif(not FOLDER.is_dir(), reason="the files are not present")
@pytest.mark.parametrize(("name", "kind"), REASONS)
def test_files_that_were_misread(name: str, kind: str) -> None:
    result = examine(PlainReader(), "sample", FileJob(str(FOLDER / name), (Use(kind),)))
    of_use = [reason for reason, _ in result["uses"][0]["problems"]]
    of_file = [reason for reason, _ in result["problems"]]
    assert (of_use, of_file) == REASONS[name, kind]
