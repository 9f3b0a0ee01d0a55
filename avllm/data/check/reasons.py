"""All that a check can find, how bad it is, and what helps: the one list that report and page are made from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

Severity = Literal["error", "warning"]


class Reason(NamedTuple):
    """How bad something is, what it means, and what helps."""

    severity: Severity
    meaning: str
    advice: str


REASONS: dict[str, Reason] = {
    # the file
    "missing": Reason("error", "no such file", "correct the path, or fetch the file again"),
    "zero_byte": Reason("error", "the file is empty", "fetch it again"),
    "undecodable": Reason("error", "no decoder can read it", "fetch it again, or convert it"),
    "absurd_header": Reason("error", "the header declares what no camera or microphone makes", "fetch it again"),
    "truncated": Reason("error", "the file ends before its header says so", "fetch it again"),
    "no_video": Reason("error", "the row asks for a picture, the file has none", "give it as an audio part"),
    "no_audio": Reason("error", "the row asks for sound, the file (or the interval) has none", 'say sound: "auto"'),
    "empty_interval": Reason("error", "the interval lies outside the file", "correct start and end"),
    "timeout": Reason("error", "decoding takes too long or hangs", "convert the file, or raise --timeout"),
    "unreachable": Reason("error", "the store that it lies in cannot be reached", "see to that, and check again"),
    "crashed": Reason("error", "decoding it kills the process", "convert the file"),
    "damaged": Reason("warning", "some packets cannot be decoded", "fetch it again if there are many"),
    "no_sound_track": Reason("warning", "a video without a sound track", 'say sound: "off", or leave the row out'),
    "silent": Reason("warning", "the sound track holds silence", 'say sound: "off", or leave the row out'),
    "late_sound": Reason("warning", "the sound begins after the picture", "nothing, if the recording is so"),
    "short_sound": Reason("warning", "the sound ends before the picture", "nothing, if the recording is so"),
    "short_picture": Reason("warning", "the picture ends before the sound", "cut the sound, or give an end"),
    "wrong_extension": Reason("warning", "the file's name ends for another container", "rename it"),
    "odd_rate": Reason("warning", "an unusual frame rate or sampling rate", "convert the file"),
    "past_end": Reason("warning", "the interval ends after the file", "correct the end"),
    "duplicate_media": Reason("warning", "another file has the same bytes", "keep one of the two"),
    # the row
    "malformed": Reason("error", "the line is no sample, and training refuses the manifest", "repair the line"),
    "duplicate_id": Reason("error", "the id stands twice; training refuses the manifest", "give each row its own"),
    "unlisted_id": Reason("error", "the id holds a tab or a line break", "give the row another id"),
    "id_in_two_manifests": Reason("warning", "the id stands in two manifests", "a quarantine list means both rows"),
    "empty_text": Reason("error", "a turn holds nothing at all", "write what is asked"),
    "empty_answer": Reason("error", "the last turn is no answer, or an empty one", "write the answer"),
    "long_text": Reason("warning", "a text of unusual length", "look whether a field was taken for another"),
    "too_long": Reason("error", "more tokens than the longest row", "raise --max-length, or shorten the answer"),
    "placeholder": Reason("error", "a placeholder for media stands in the text", "media are parts, not text"),
    "reserved_text": Reason("error", "the text holds a token that stands for media", "take it out of the text"),
    "no_encoder": Reason("error", "the model has no encoder for a part", "leave the row out, or change the model"),
    "chat_template": Reason("error", "the model's chat template refuses the row", "use another template"),
    "no_answer": Reason("error", "no token of the row is trained on", "see `avllm data show`"),
    "no_licence": Reason("warning", "the row does not say its licence", "recipes write it"),
    # training against test
    "test_id": Reason("error", "a test row of the same source has this id", "leave it out of training"),
    "test_media": Reason("error", "a test row shows the same bytes", "leave it out of training"),
    "test_caption": Reason("warning", "a test row has the same answer, word for word", "leave it out of training"),
    "malformed_test": Reason("error", "a test line is no sample, nothing is held against it", "repair the line"),
    "same_id_as_test": Reason("warning", "a test row of another source has this id", "look whether it is the same"),
}

MENDED = {"malformed", "duplicate_id", "malformed_test"}
"""Training refuses manifests with such rows before it looks into a quarantine list: none can set them aside."""


@dataclass(frozen=True)
class Finding:
    """Something about one row.

    Attributes:
        id: of the row; "" where the line has none.
        manifest, line: where it stands.
        source: the row's.
        reason: a key of ``REASONS``.
        detail: what was seen.
        path: the file that it is about, or None.
    """

    id: str
    manifest: str
    line: int
    source: str
    reason: str
    detail: str
    path: str | None = None

    @property
    def severity(self) -> Severity:
        """How bad it is."""
        return REASONS[self.reason].severity
