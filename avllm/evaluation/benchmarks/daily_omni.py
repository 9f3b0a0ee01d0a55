"""Ask Daily-Omni: multiple choice about videos, where answers need sound and sight together."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from avllm.data.schema import Sample
from avllm.errors import UserError
from avllm.evaluation.benchmarks.base import Benchmark, Score, score_by_form

LETTER = re.compile(r"^\s*\(?([A-Z])[).:]\s*")
FIELDS = ("Question", "Choice", "Answer", "video_id", "Type")


class DailyOmni(Benchmark):
    """Daily-Omni (Zhou et al. 2025, arXiv 2505.17862) as its authors distribute it.

    ``qa.json`` is a list of ``{"Question", "Choice": ["A. ...", ...], "Answer": "B", "video_id",
    "Type", "video_category", "video_duration"}``; the videos are ``Videos/ID/ID_video.mp4`` or
    ``ID/ID_video.mp4``. The kind of a row is its ``Type``, its source the video's duration.

    Args:
        data: the folder with ``qa.json``.
    """

    def __init__(self, *, data: str) -> None:
        self.folder = Path(data)
        if not (self.folder / "qa.json").is_file():
            raise UserError(f"{self.folder} has no qa.json; expected the folder of Daily-Omni")

    @property
    def root(self) -> Path:
        """The folder."""
        return self.folder

    def samples(self) -> list[Sample]:
        """Return a row for each question, with its choices written below it.

        Raises:
            UserError: ``qa.json`` is of another form.
        """
        path = self.folder / "qa.json"
        try:
            records = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(f"{path} is no JSON: {error}") from error
        if not isinstance(records, list):
            raise UserError(f"{path} holds {type(records).__name__}; expected a list of questions")
        return [self._sample(number, record) for number, record in enumerate(records)]

    def _sample(self, number: int, record: dict[str, Any]) -> Sample:
        where = f"{self.folder / 'qa.json'}, question {number}"
        missing = [name for name in FIELDS if name not in record]
        if missing:
            raise UserError(f"{where} has no {', '.join(missing)}; expected {', '.join(FIELDS)}")
        letters = [LETTER.match(choice) for choice in record["Choice"]]
        by_letter = {m[1]: m.string[m.end() :].strip() for m in letters if m is not None}
        if len(by_letter) < len(letters) or record["Answer"] not in by_letter:
            raise UserError(
                f"{where}: choices {record['Choice']} and answer {record['Answer']!r}; "
                "expected choices 'A. ...' and the letter of one"
            )
        listed = [f"({letter}) {choice}" for letter, choice in by_letter.items()]
        content = [
            {"type": "video", "video": self._video(record["video_id"])},
            {"type": "text", "text": "\n".join([record["Question"].strip(), *listed])},
        ]
        messages = [
            {"role": "user", "content": content},
            {"role": "assistant", "content": by_letter[record["Answer"]]},
        ]
        return Sample.model_validate(
            {
                "id": f"daily-omni-{number}",
                "messages": messages,
                "kind": record["Type"],
                "source": str(record.get("video_duration", "unknown")),
                "choices": list(by_letter.values()),
            }
        )

    def _video(self, video: str) -> str:
        """Return the video's path below the folder; the run reports a path without a file."""
        paths = [f"Videos/{video}/{video}_video.mp4", f"{video}/{video}_video.mp4"]
        for path in paths:
            if (self.folder / path).is_file():
                return path
        return paths[0]

    def score(self, sample: Sample, answer: str, duration: float) -> Score:
        """Score as multiple choice, by letter or by text."""
        return score_by_form(sample, answer, duration, refusal=None)
