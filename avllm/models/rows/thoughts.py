"""Separate the thoughts that an LLM writes before its answer from the answer."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ThoughtMarks:
    """The words around an LLM's thoughts, such as ``<think>`` and ``</think>``.

    Attributes:
        begin, end: the words.
        asked: the prompt asks for thoughts; without it, text has thoughts where it begins with
            ``begin``.
        opened: the prompt ends with ``begin``.
    """

    begin: str
    end: str
    asked: bool
    opened: bool

    @classmethod
    def of(cls, opening: str, generation: str, asked: bool) -> ThoughtMarks | None:
        """Find the words in what a chat template writes before an answer; None if there are none.

        Args:
            opening: a finished chat up to its answer, in which thoughts are empty.
            generation: the same chat with the template's generation prompt.
            asked: the prompt asks for thoughts.
        """
        last = opening.split()[-1:] or [""]
        added = generation.removeprefix(opening.rstrip()).split()[-1:] or [""]
        if "/" in last[0]:
            end = last[0]
            begin = end.replace("/", "", 1)
        elif opening and generation.startswith(opening.rstrip()) and added[0][:1] in ("<", "["):
            begin = added[0]
            end = f"{begin[0]}/{begin[1:]}"
        else:
            return None
        opened = asked and generation.rstrip().endswith(begin)
        return cls(begin, end, asked, opened)

    def cut(self, text: str, whole: bool) -> str:
        """Return generated text from where the thoughts end; nothing where they do not end.

        Args:
            text: the decoded tokens.
            whole: False while more is generated: the answer may be still to come.
        """
        may_begin = not whole and self.begin.startswith(text.lstrip())
        if not (self.asked or may_begin or self._begins(text)):
            return text
        _, end, answer = text.rpartition(self.end)
        if end:
            return answer
        return text if whole and not self.are_open(text) else ""

    def are_open(self, text: str) -> bool:
        """Return True if generated text has thoughts that do not end in it."""
        return (self.opened or self._begins(text)) and self.end not in text

    def _begins(self, text: str) -> bool:
        return text.lstrip().startswith(self.begin)
