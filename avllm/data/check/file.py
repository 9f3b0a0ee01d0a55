"""Examine one media file: its headers, a decode of what training would read, and its oddities.

:func:`examine` runs in worker processes (``workers.py``); its result is JSON-able, since a journal
holds it.
"""

from __future__ import annotations

import base64
import io
import time
from typing import Any

import torch
from PIL import Image

from avllm.data.check.oddities import (
    frames_by_headers,
    levels,
    missing_sound,
    oddities,
    past_end,
    picture_suffix,
    result_by_headers,
    sound_problems,
)
from avllm.data.check.reasons import REASONS, Problem
from avllm.data.check.uses import Decode, FileJob, PartReader, Use
from avllm.data.media.load import (
    Clip,
    MediaError,
    MediaInfo,
    Sampling,
    load_image,
    load_video,
    probe,
)
from avllm.data.media.whole import decode_whole
from avllm.data.schema import RowError
from avllm.data.store.access import AccessError
from avllm.data.store.http import FetchError
from avllm.data.store.storage import StoreError, check_access
from avllm.errors import OutageError

DAMAGED_SHARE = 0.05  # of packets that cannot be decoded; above it a file is undecodable
THUMBNAIL = 120  # pixels of the shorter side
NO_CONTENT = {"missing", "zero_byte"}  # reasons of files that no decoder needs to open


def examine(reader: PartReader, decode: Decode, job: FileJob) -> dict[str, Any]:
    """Examine a file.

    Args:
        reader: reads its parts.
        decode: ``headers``, ``sample`` (what the reader reads) or ``full`` (also every packet).
        job: the file.

    Returns:
        ``problems`` (of the file itself, [reason, detail] each), ``uses`` (for each use its
        ``problems``, seconds, frames, sound level in dB of full scale, and tokens by stream) and
        ``seconds`` (of one core, that it took).
    """
    torch.set_num_threads(1)
    began = time.process_time()
    try:
        check_access(job.path)
        result = _examine_file(reader, decode, job)
    except (AccessError, FetchError) as error:
        result = result_without_decode(job, "forbidden", str(error))
    except (StoreError, OutageError, OSError) as error:
        # A store that does not answer is no fault of the file.
        result = result_without_decode(job, "unreachable", str(error))
    return {**result, "seconds": round(time.process_time() - began, 3)}


def result_without_decode(job: FileJob, reason: str, detail: str) -> dict[str, Any]:
    """Return the result of a file that could not be examined: each use has this one problem."""
    return {"problems": [], "uses": [{"problems": [Problem(reason, detail)]}] * len(job.uses)}


def _examine_file(reader: PartReader, decode: Decode, job: FileJob) -> dict[str, Any]:
    """Return the result of :func:`examine` without the time that it took."""
    info: MediaInfo | None = None
    header_problems: list[Problem] = []
    pictures_only = all(use.kind == "image" for use in job.uses)
    if not pictures_only:
        try:
            info = probe(job.path, reader.timeout)
        except MediaError as error:
            header_problems.append(Problem(error.reason, error.detail))
    uses = []
    for use in job.uses:
        examiner = _UseExaminer(reader, decode, job.path, use, info, header_problems)
        uses.append(examiner.examine())
    problems: list[Problem] = []
    if info is not None:
        problems += oddities(job, info)
        # A file that no row can use needs no further decode.
        if decode == "full" and any(can_be_used(use) for use in uses):
            problems += _decode_all(job.path, reader.timeout)
    elif pictures_only and not uses[0]["problems"]:
        problems += picture_suffix(job.path)
    return {"problems": problems, "uses": uses}


def can_be_used(use: dict[str, Any]) -> bool:
    """Return whether the result of a use has no errors; warnings may be among its problems."""
    return not any(REASONS[reason].severity == "error" for reason, _ in use["problems"])


class _UseExaminer:
    """Examine one use of a file: read it as training does, or judge it by the headers.

    Args:
        reader: reads the part.
        decode: see :func:`examine`.
        path: of the file.
        use: of the file.
        info: headers of a video or sound file; None when they could not be read.
        header_problems: why not.
    """

    def __init__(
        self,
        reader: PartReader,
        decode: Decode,
        path: str,
        use: Use,
        info: MediaInfo | None,
        header_problems: list[Problem],
    ) -> None:
        self.reader = reader
        self.decode = decode
        self.path = path
        self.use = use
        self.info = None if use.kind == "image" else info
        self.header_problems = [] if use.kind == "image" else header_problems

    def examine(self) -> dict[str, Any]:
        """Return the result of the use."""
        if self._needs_no_decode():
            return {"problems": self.header_problems}
        try:
            if self.decode == "headers" and self.info is not None:
                return result_by_headers(self.path, self.use, self.info)
            return self._result_by_decode()
        except (MediaError, RowError) as error:
            return {"problems": [Problem(error.reason, error.detail)]}

    def _needs_no_decode(self) -> bool:
        if not self.header_problems:
            return False
        return self.decode == "headers" or self.header_problems[0].reason in NO_CONTENT

    def _result_by_decode(self) -> dict[str, Any]:
        """Read the part as training does.

        Raises:
            MediaError, RowError: training would leave the row out.
        """
        (clip,) = self.reader.load_clips([self.use.part(self.path)], None)
        streams = self.reader.order(self.reader.prepare(clip))
        # The headers are damaged, and training reads the file nevertheless: a warning.
        problems = [Problem("damaged", problem.detail) for problem in self.header_problems]
        problems += [Problem(*note) for note in clip.notes]
        result: dict[str, Any] = {"problems": problems}
        if self.use.kind != "image":
            result["seconds"] = round(clip.duration, 3)
        result["tokens"] = {stream: streams.count(stream) for stream in sorted(set(streams))}
        if clip.frames is not None:
            result["frames"] = len(clip.frames.x)
            result |= frames_by_headers(self.use, self.info, clip.duration)
        if clip.sound is not None:
            result |= levels(clip.sound)
            problems += sound_problems(self.use, clip, result["peak_db"], self.info)
        if self.info is not None:
            problems += missing_sound(self.use, self.info)
            problems += past_end(self.use, self.info)
        return result


def _decode_all(path: str, timeout: float) -> list[Problem]:
    """Decode every packet, also between the frames that training happens to read."""
    try:
        whole = decode_whole(path, timeout)
    except MediaError as error:
        return [Problem(error.reason, error.detail)]
    if not whole.broken:
        return []
    reason = "undecodable" if whole.broken > DAMAGED_SHARE * whole.packets else "damaged"
    return [Problem(reason, f"{whole.broken} of {whole.packets} packets cannot be decoded")]


def thumbnail(path: str) -> str:
    """Return the first picture of a file, small, as a JPEG in base64; "" when it has none."""
    for load in (load_image, _load_first_frame):
        try:
            frames = load(path).frames
        except (MediaError, StoreError, OSError):  # a problem already, or a film and no picture
            continue
        if frames is not None:
            image = Image.fromarray(frames.x[0].numpy())
            image.thumbnail((2 * THUMBNAIL, THUMBNAIL))
            jpeg = io.BytesIO()
            image.save(jpeg, "JPEG", quality=70)
            return base64.b64encode(jpeg.getvalue()).decode()
    return ""


def _load_first_frame(path: str) -> Clip:
    sampling = Sampling(num_frames=1, short_side=THUMBNAIL)
    return load_video(path, end=0.01, sampling=sampling, rate=None)
