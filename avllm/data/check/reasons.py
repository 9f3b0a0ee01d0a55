"""List all reasons that a check can give, with severity, meaning and advice for report and page."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

Severity = Literal["error", "warning"]


class Reason(NamedTuple):
    """Describe a reason: how bad it is, what it means, and what helps."""

    severity: Severity
    meaning: str
    advice: str


class Problem(NamedTuple):
    """Hold a key of ``REASONS``, and what was seen."""

    reason: str
    detail: str


REASONS: dict[str, Reason] = {
    # the file
    "missing": Reason("error", "no such file", "correct the path, or fetch the file again"),
    "zero_byte": Reason("error", "the file is empty", "fetch it again"),
    "undecodable": Reason("error", "no decoder can read it", "fetch it again, or convert it"),
    "absurd_header": Reason(
        "error",
        "the header declares what no camera or microphone makes",
        "fetch it again",
    ),
    "truncated": Reason("error", "the file ends before its header says so", "fetch it again"),
    "bad_values": Reason(
        "error",
        "decoded values are not finite, or far out of range",
        "export it again",
    ),
    "no_video": Reason(
        "error",
        "the row asks for a picture, the file has none",
        "give it as an audio part",
    ),
    "no_audio": Reason(
        "error",
        "the row asks for sound, the file (or the interval) has none",
        'set sound: "auto"',
    ),
    "empty_interval": Reason(
        "error",
        "the interval lies outside the file",
        "correct start and end",
    ),
    "forbidden": Reason(
        "error",
        "the row names a file that rows may not name",
        "name its folder with --media-root or its host with --allow-url, or remove the row",
    ),
    "too_large": Reason("error", "it is larger than what is fetched", "cut it, or copy it here"),
    "timeout": Reason(
        "error",
        "decoding takes too long or hangs",
        "convert the file, or raise --timeout",
    ),
    "unreachable": Reason(
        "error",
        "its store cannot be reached",
        "restore access, and check again",
    ),
    "crashed": Reason("error", "decoding it kills the process", "convert the file"),
    "damaged": Reason(
        "warning",
        "some packets cannot be decoded",
        "fetch it again if there are many",
    ),
    "no_sound_track": Reason(
        "warning",
        "a video without a sound track",
        'set sound: "off", or leave the row out',
    ),
    "silent": Reason(
        "warning",
        "the sound track holds silence",
        'set sound: "off", or leave the row out',
    ),
    "cancelling_channels": Reason(
        "warning",
        "the channels cancel each other when they are mixed, and one is heard alone",
        "none, if one channel is enough; else mix it to mono",
    ),
    "several_tracks": Reason(
        "warning",
        "the file has several sound tracks, and one is heard",
        'choose another with "track"',
    ),
    "clock_restarts": Reason(
        "warning",
        "the timestamps begin again or jump ahead within the file, as after `cat a.ts b.ts`",
        "none, if its parts belong together; else cut it there",
    ),
    "second_file": Reason(
        "warning",
        "another file follows in the file, as after `cat a.wav b.wav`, and is not read",
        "none, if the first is meant; else join them with a program for media",
    ),
    "interlaced": Reason(
        "warning",
        "the picture is interlaced; one of its two fields is seen",
        "none; or deinterlace it with a better filter",
    ),
    "high_dynamic_range": Reason(
        "warning",
        "the picture is HDR, and mapped to the standard range by a plain curve",
        "none; or convert it to SDR (BT.709) with a better one",
    ),
    "animation": Reason(
        "warning",
        "an animated picture is used as an image; its first frame is seen",
        "give it as a video part",
    ),
    "value_range": Reason(
        "warning",
        "values of the picture use only a part of their bits, and were scaled",
        "none, if it was recorded so",
    ),
    "late_sound": Reason(
        "warning",
        "the sound begins after the picture",
        "none, if it was recorded so",
    ),
    "short_sound": Reason(
        "warning",
        "the sound ends before the picture",
        "none, if it was recorded so",
    ),
    "short_picture": Reason(
        "warning",
        "the picture ends before the sound",
        "cut the sound, or give an end",
    ),
    "wrong_extension": Reason("warning", "the suffix is another container's", "rename it"),
    "odd_rate": Reason("warning", "an unusual frame rate or sampling rate", "convert the file"),
    "past_end": Reason("warning", "the interval ends after the file", "correct the end"),
    "duplicate_media": Reason("warning", "another file has the same bytes", "keep one of the two"),
    # the row
    "malformed": Reason(
        "error",
        "the line is no sample, and training refuses the manifest",
        "repair the line",
    ),
    "empty_manifest": Reason(
        "error",
        "the manifest holds no row, and training refuses it",
        "write rows, or leave the manifest out",
    ),
    "duplicate_id": Reason(
        "error",
        "the id occurs twice in one manifest; training refuses the manifest",
        "give each row an id",
    ),
    "unlisted_id": Reason("error", "the id holds a tab or a line break", "give the row another id"),
    "id_in_two_manifests": Reason(
        "warning",
        "the id occurs in several manifests",
        "none, or give each row an id; a quarantine list removes all rows with an id",
    ),
    "empty_text": Reason("warning", "a turn holds nothing at all", "write what is asked"),
    "empty_answer": Reason(
        "error",
        "the last turn is no answer, or an answer is empty",
        "write the answer",
    ),
    "answer_outside_choices": Reason(
        "warning",
        "an answer is none of the row's choices, so no model can be right",
        "correct choices, or the answers",
    ),
    "long_text": Reason(
        "warning",
        "a text of unusual length",
        "check that the right field was taken",
    ),
    "too_long": Reason(
        "error",
        "more tokens than the longest row",
        "raise --max-length, or shorten the answer",
    ),
    "placeholder": Reason(
        "warning",
        "the text holds a placeholder for media, which is read as text",
        "make media parts where media are meant",
    ),
    "control_text": Reason(
        "warning",
        "the text holds a control token of the LLM, which is read as text",
        "none, if it is meant as text",
    ),
    "reserved_text": Reason(
        "error",
        "the text holds characters or words that stand for something else",
        "take them out of the text",
    ),
    "unexpected": Reason(
        "error",
        "no row can be made, for a reason that has no name",
        "read the detail; leave the row out",
    ),
    "no_encoder": Reason(
        "error",
        "the model has no encoder for a part",
        "leave the row out, or change the model",
    ),
    "chat_template": Reason(
        "error",
        "the model's chat template refuses the row",
        "use another template",
    ),
    "no_answer": Reason("error", "no token of the row is trained on", "see `avllm data show`"),
    "outside_clip": Reason("error", "a time lies outside its clip", "correct the time"),
    "no_duration": Reason(
        "error",
        "a time is of a clip of unknown length",
        "take the time codec `seconds`, or leave the row out",
    ),
    "region_cropped": Reason(
        "error",
        "nothing of a region is left in the picture that the model sees",
        "leave the region out, or take an encoder that sees whole pictures",
    ),
    "no_clip": Reason("error", "a time comes before its clip", "name a clip that comes before it"),
    "no_licence": Reason("warning", "the row names no licence", "write it with a recipe"),
    # training against test
    "test_id": Reason(
        "error",
        "a test row of the same source has this id",
        "leave it out of training",
    ),
    "test_media": Reason("error", "a test row shows the same bytes", "leave it out of training"),
    "test_caption": Reason(
        "warning",
        "a test row has the same answer, word for word",
        "leave it out of training",
    ),
    "malformed_test": Reason(
        "error",
        "a test line is no sample, and is not compared",
        "repair the line",
    ),
    "same_id_as_test": Reason(
        "warning",
        "a test row of another source has this id",
        "check whether it is the same row",
    ),
}

UNLISTED = {"malformed", "empty_manifest", "duplicate_id", "malformed_test"}
"""Reasons of rows that no quarantine list can set aside: training refuses their manifest before."""


@dataclass(frozen=True)
class Finding:
    """Report a problem of one row.

    Attributes:
        id: of the row; "" where the line has none.
        manifest: of the row.
        line: number in the manifest, from 1.
        source: of the row.
        reason: a key of ``REASONS``.
        detail: what was seen.
        path: the file with the problem, or None.
        mistake: what rows with this reason are counted by; "" where the reason says all.
    """

    id: str
    manifest: str
    line: int
    source: str
    reason: str
    detail: str
    path: str | None = None
    mistake: str = ""

    @property
    def location(self) -> str:
        """Name manifest and line; the manifest alone where no line is meant."""
        return f"{self.manifest} line {self.line}" if self.line else self.manifest

    @property
    def severity(self) -> Severity:
        """Return the severity of the reason."""
        return REASONS[self.reason].severity
