"""Render chats by the tokenizer's chat template, with the model's arguments and a fixed date."""

from __future__ import annotations

import datetime
import inspect
import re
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from avllm.data.schema import RowError
from avllm.errors import UserError
from avllm.models.rows.template import render_chat, variables_of
from avllm.registry import suggest

THINKING = ("enable_thinking", "thinking")
"""Arguments by which templates let the LLM think aloud before it answers."""

GIVEN = {"messages", "bos_token", "eos_token", "pad_token", "strftime_now", "raise_exception"}
"""Names that every template is given."""

NOW = re.compile(r"""strftime_now\s*\(\s*(["'])(.*?)\1\s*\)""")


class ChatTemplate:
    """A tokenizer's chat template with its arguments.

    Args:
        tokenizer: the LLM's; its template is read at each call.
        arguments: values that the template reads by name (``chat_template_kwargs``).
        date: ``YYYY-MM-DD``, the day that the template's ``strftime_now`` gives; None for today.

    Raises:
        UserError: an argument that the template does not read.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        arguments: Mapping[str, Any] | None = None,
        date: str | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.arguments = dict(arguments or {})
        self.day = datetime.date.today() if date is None else datetime.date.fromisoformat(date)
        self._sources: dict[str, str] = {}
        self._check_arguments()

    @property
    def source(self) -> str:
        """Return the template's text."""
        return str(self.tokenizer.chat_template)

    @property
    def thinks(self) -> bool:
        """Return True if the LLM is asked to write its thoughts before an answer."""
        return any(bool(self.arguments.get(name)) for name in THINKING)

    def write(self, messages: Sequence[Mapping[str, str]], generation: bool) -> str:
        """Write messages ``{"role", "content"}`` as text.

        Args:
            messages: the turns.
            generation: end with the template's generation prompt.

        Raises:
            RowError: ``chat_template``: the template refuses the roles.
        """
        try:
            return render_chat(
                self.tokenizer,
                [dict(message) for message in messages],
                generation=generation,
                chat_template=self._dated(self.source),
                **self.arguments,
            )
        except TemplateError as error:
            roles = [message["role"] for message in messages]
            raise RowError(
                "chat_template", f"the LLM's chat template refuses roles {roles}: {error}"
            ) from error

    def _dated(self, source: str) -> str:
        """Return the template with the model's date in place of ``strftime_now``'s calls.

        A prompt is then the same on every day. The library passes no functions to templates, so
        the calls themselves are replaced.

        Raises:
            RowError: ``chat_template``: the template computes how it writes a date.
        """
        if source not in self._sources:
            day = datetime.datetime.combine(self.day, datetime.time())
            dated = NOW.sub(lambda call: repr(day.strftime(call[2])), source)
            if re.search(r"strftime_now\s*\(", dated):
                raise RowError(
                    "chat_template",
                    "the chat template computes the form in which it writes today's date, which "
                    "would change prompts from day to day; write the form as a text into it",
                )
            self._sources[source] = dated
        return self._sources[source]

    def _check_arguments(self) -> None:
        if not self.arguments:
            return
        taken = inspect.signature(self.tokenizer.apply_chat_template).parameters
        variables = variables_of(self.source)
        for name in self.arguments:
            if name in taken or name == "messages":
                raise UserError(
                    f"model.llm.chat_template_kwargs.{name} is set by avllm itself; leave it out"
                )
            if name not in variables:
                raise UserError(
                    f"model.llm.chat_template_kwargs.{name}: the LLM's chat template reads no "
                    f"{name!r}; {suggest(name, sorted(variables - taken.keys() - GIVEN))}",
                    reason="unknown_option",
                )
