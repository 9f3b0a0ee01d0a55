"""Write messages as one text by the tokenizer's chat template, with a mark for each media part."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import Any

from transformers import PreTrainedTokenizerBase

from avllm.data.schema import Message, RowError, Sample, TextPart
from avllm.errors import UserError
from avllm.models.configuration_avllm import AVConfig
from avllm.models.rows.chat_template import THINKING, ChatTemplate
from avllm.models.rows.chat_tokens import ChatTokens, Tokenized
from avllm.models.rows.content import in_seconds
from avllm.models.rows.control_text import ControlTokens, match_exactly
from avllm.models.rows.rendered import MARK, PROBE, Range, Rendered, Turn
from avllm.models.rows.template import check_template
from avllm.models.rows.thoughts import ThoughtMarks

MOST_CHATS = 4096  # that are remembered
DEFAULT_TEMPLATE = (
    "{{ bos_token or '' }}{% for m in messages %}"
    "{% if m['role'] == 'system' %}{{ m['content'] + '\n' }}"
    "{% elif m['role'] == 'user' %}{{ 'USER: ' + m['content'] + '\n' }}"
    "{% else %}{{ 'ASSISTANT: ' + m['content'] + eos_token + '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT: ' }}{% endif %}"
)

THOUGHTS_OPEN = "there is no answer: the model's thoughts did not end; raise max_new_tokens"


@dataclass(frozen=True)
class Flat:
    """A message as one string, with a mark for each media part.

    Attributes:
        role: of the message.
        text: the string.
        ranges: of the text parts in ``text``, without the text around media.
        words: the text parts alone, joined.
    """

    role: str
    text: str
    ranges: tuple[Range, ...]
    words: str


def check_media_text(config: AVConfig) -> None:
    """Refuse text around media without exactly one ``{media}``.

    Raises:
        UserError: names the kind of media and the text.
    """
    for kind, text in config.media_text.items():
        if text.count("{media}") != 1:
            raise UserError(f"media_text around {kind} is {text!r}; expected {{media}} in it, once")


class ChatText:
    """Turns chats into text and text into token ids.

    Args:
        tokenizer: the LLM's; it gets a plain chat template if it has none.
        config: system prompt, text around media, placeholders.

    Raises:
        ChatTemplateError: the template is no Jinja, or does not end.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, config: AVConfig) -> None:
        self.tokenizer = tokenizer
        self.config = config
        self._chats: dict[tuple[Any, ...], Rendered] = {}
        if tokenizer.chat_template is None:
            tokenizer.chat_template = DEFAULT_TEMPLATE
        check_template(tokenizer)
        match_exactly(tokenizer)
        llm = config.llm
        self.template = ChatTemplate(tokenizer, llm.get("chat_template_kwargs"), llm.get("date"))
        self.control = ControlTokens(tokenizer, self.template.source, self._some_turns())
        self._tokens = ChatTokens(tokenizer, self.control, config.media_token_ids)
        self._reserved = re.compile(f"[{MARK}{PROBE}{self.control.characters}]")

    def _some_turns(self) -> str:
        """Return a chat of three turns as text; nothing if the template refuses it."""
        turns = [Flat(role, "A", (), "A") for role in ("user", "assistant", "user")]
        try:
            return self._template(turns, generation=False)
        except RowError:
            return ""

    def check(self, message: Message) -> None:
        """Refuse text that contains a character which stands for media or control tokens.

        Raises:
            RowError: ``reserved_text``.
        """
        reserved = self._reserved.search(message.text)
        if reserved:
            raise RowError(
                "reserved_text",
                f"the text holds the character {reserved[0]!r}, which stands for media; leave it "
                "out",
            )
        try:
            message.text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise RowError("reserved_text", f"the text is no Unicode: {error}") from error

    # ---- text --------------------------------------------------------------------------------

    def render(self, messages: Sequence[Message], answer: bool) -> Rendered:
        """Write the chat as text, with a mark for each media part.

        Args:
            messages: the turns.
            answer: False ends the text where the next answer begins: after everything that the
                template writes before an answer, such as empty thoughts.

        Raises:
            RowError: ``chat_template``: the template refuses the roles, or does not write the last
                answer after its prompt.
        """
        contents = [self._flatten(message) for message in messages]
        if self.config.system and contents[0].role != "system":
            contents.insert(0, Flat("system", self.config.system, (), ""))
        key = (answer, *contents)
        if key not in self._chats:  # many rows have the same chat
            if len(self._chats) >= MOST_CHATS:
                self._chats.clear()
            self._chats[key] = self._render(contents, answer)
        return self._chats[key]

    def write(self, sample: Sample, answer: bool) -> str:
        """Write a chat for people, with ``<|video|>`` in the place of a video, and so on."""
        text = self.render(in_seconds(sample.messages), answer).text
        for part in sample.media:
            text = text.replace(MARK, f"<|{part.type}|>", 1)
        return self.control.show(text)

    def rewrites_turns(self) -> bool:
        """Return True if an answer is written otherwise when more turns follow it.

        In a row of several turns, only the last answer then follows the prompt that it would have.
        """
        turns = [Flat(role, "A", (), "A") for role in ("user", "assistant") * 2]
        try:
            return self._render(turns, answer=True).turns[0].trained is None
        except RowError:
            return False

    def tokenize(self, chat: Rendered, runs: Sequence[list[str]]) -> Tokenized:
        """Turn a rendered chat into token ids: see :meth:`ChatTokens.tokenize`."""
        return self._tokens.tokenize(chat, runs)

    def without_thoughts(self, text: str, whole: bool) -> str:
        """Return generated text from where the thoughts of an LLM that thinks end.

        Args:
            text: the decoded tokens.
            whole: False while more is generated: the answer may be still to come.
        """
        marks = self.thought_marks
        return text if marks is None else marks.cut(text, whole)

    def warnings_about(self, text: str) -> tuple[str, ...]:
        """Return, in words, why generated text (with its thoughts) holds no answer."""
        if self.thought_marks is None or not self.thought_marks.are_open(text):
            return ()
        return (THOUGHTS_OPEN,)

    @cached_property
    def thought_marks(self) -> ThoughtMarks | None:
        """Return the words around the LLM's thoughts, by its template; None if it has none."""
        turns = [Flat("user", "A", (), "A")]
        try:
            opening = self._before_answer(turns)
            generation = self._template(turns, generation=True)
        except RowError:  # the template refuses this chat
            return None
        return ThoughtMarks.of(opening, generation, self.template.thinks)

    def after_answer(self) -> str:
        """Return what the template writes after an answer; nothing if it refuses the chat."""
        turns = [Flat("user", "A", (), "A"), Flat("assistant", PROBE, (), "")]
        try:
            return self._template(turns, generation=False).rpartition(PROBE)[2]
        except RowError:
            return ""

    def _flatten(self, message: Message) -> Flat:
        text, ranges, words = "", [], ""
        for is_text, parts in groupby(message.content, lambda part: isinstance(part, TextPart)):
            if is_text:  # neighbours may make up a control token together
                written = "".join(part.text for part in parts if isinstance(part, TextPart))
                hidden = self.control.hide(written, message.role)
                ranges.append((len(text), len(text) + len(hidden)))
                text += hidden
                words += written
                continue
            for part in parts:
                text += self.config.media_text.get(part.type, "{media}").replace("{media}", MARK)
        return Flat(message.role, text, tuple(ranges), words)

    def _render(self, contents: list[Flat], answer: bool) -> Rendered:
        whole = self._template(contents, generation=False) if answer else self._prompt(contents)
        turns: list[Turn] = []
        media = 0
        for place, content in enumerate(contents):
            if content.role == "user":
                media += content.text.count(MARK)
                asked = self._question_ranges(contents, place, whole)
                turns.append(Turn(content.words, asked, "", None, media))
            elif content.role == "assistant":
                trained = self._answer_range(contents, place, whole)
                asked_turn = turns.pop()
                turns.append(
                    Turn(asked_turn.question, asked_turn.asked, content.words, trained, media)
                )
        return Rendered(whole, tuple(turns))

    def _question_ranges(self, contents: list[Flat], place: int, whole: str) -> tuple[Range, ...]:
        """Return the ranges of a user's text in the chat; none if the template changes the text."""
        content = contents[place]
        probe = Flat(content.role, PROBE, (), "")
        start = self._template([*contents[:place], probe], generation=False).find(PROBE)
        written = content.text.strip()  # many templates strip a message
        stripped = len(content.text) - len(content.text.lstrip())
        if whole.startswith(content.text, start):
            written, stripped = content.text, 0
        if start < 0 or not whole.startswith(written, start):
            return ()
        ranges = []
        for low, high in content.ranges:
            first = max(low - stripped, 0)
            last = min(high - stripped, len(written))
            if last > first:
                ranges.append((start + first, start + last))
        return tuple(ranges)

    def _before_answer(self, contents: Sequence[Flat]) -> str:
        """Return the chat up to the text of the next answer, as a finished chat is written."""
        probe = Flat("assistant", PROBE, (), "")
        text, probed, _ = self._template([*contents, probe], generation=False).partition(PROBE)
        return text if probed else self._template(contents, generation=True)

    def _prompt(self, contents: Sequence[Flat]) -> str:
        """Return the chat up to where the LLM begins to write the next answer.

        Rows begin with their prompts, so it is what a finished chat has before the answer. What a
        template adds there (``<think></think>``) belongs to the prompt, except for an LLM that
        thinks: it begins after the template's generation prompt.

        Raises:
            RowError: ``chat_template``: no finished chat begins with the generation prompt.
        """
        opening = self._before_answer(contents)
        generation = self._template(contents, generation=True)
        if self.template.thinks and not opening.startswith(generation):
            raise RowError(
                "chat_template",
                f"the chat template's prompt ends with {generation[-20:]!r}, but it writes "
                "no finished answer after these words: rows could not begin with their prompts. "
                f"Leave {' or '.join(THINKING)} out of model.llm.chat_template_kwargs",
            )
        # White space alone is the beginning of the answer: tokens such as " red" are not cut.
        is_opened = opening.startswith(generation) and not opening[len(generation) :].strip()
        return generation if self.template.thinks or is_opened else opening

    def _answer_range(self, contents: list[Flat], place: int, whole: str) -> Range | None:
        """Return the range of an assistant's message in the chat, with its end marker.

        Returns:
            None if the template writes an earlier turn otherwise than a last one.

        Raises:
            RowError: ``chat_template``: the last answer does not follow its prompt, or not all of
                it is written.
        """
        is_last = place == len(contents) - 1
        prompt = self._prompt(contents[:place])
        start = len(prompt)
        if self.template.thinks:  # an answer without thoughts is trained without the empty ones
            opening = self._before_answer(contents[:place])
            start = len(opening) if whole.startswith(opening) else start
        end = len(whole)
        if not is_last:
            after = self._template(contents[: place + 1], generation=False)
            after = after if whole.startswith(after) else after.rstrip()
            end = len(after) if whole.startswith(after) else -1
        is_written = _without_space(contents[place].text) in _without_space(whole[:end])
        if end >= 0 and whole.startswith(prompt) and is_written:
            return start, end
        if not is_last:
            return None
        raise RowError(
            "chat_template",
            f"the chat template does not write the answer of turn {place} after {prompt[-30:]!r}, "
            "with which its prompt ends; does the answer hold thoughts? Then set enable_thinking "
            "in model.llm.chat_template_kwargs, or take the thoughts out",
        )

    def _template(self, contents: Sequence[Flat], generation: bool) -> str:
        messages = [{"role": content.role, "content": content.text} for content in contents]
        return self.template.write(messages, generation)


def _without_space(text: str) -> str:
    return "".join(text.split())
